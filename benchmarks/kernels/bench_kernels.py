"""Our kernels against the libraries' best on the same card: `python benchmarks/kernels/bench_kernels.py [part ...]`.

Prints a JSON line a measurement and a table last; `--out FILE` appends the lines to a file. Parts: linear, decode,
prefill, small, sampling, blocks, step. "step" chains the kernels of a whole decode step with weights of the real size.
"""

# ruff: noqa: B023 - every closure here is called within the turn of the loop that made it
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import Report, copies_for, microseconds, run_parts
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from argosy.kernels import gemv, norm_ahead, ops, step_ops
from argosy.kernels.norm_ahead import NormAhead

BF16 = torch.bfloat16
LINEARS = {
    "8b qkv": (4096, 6144, False), "8b o": (4096, 4096, False), "8b gate_up": (4096, 28672, True),
    "8b down": (14336, 4096, False), "8b lm_head": (4096, 128256, False),
    "06b qkv": (1024, 4096, False), "06b o": (2048, 1024, False), "06b gate_up": (1024, 6144, True),
    "06b down": (3072, 1024, False), "06b lm_head": (1024, 151936, False),
}  # fmt: skip
STEPS = {  # hidden, layers, query heads, key/value heads, MLP width, vocabulary, norm of q and k
    "8b": (4096, 32, 32, 8, 14336, 128256, False),
    "06b": (1024, 28, 16, 8, 3072, 151936, True),
}


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def linear(report: Report) -> None:
    """x W^T alone, and with the norm before and the gate or residual after, against cuBLAS and separate kernels."""
    for name, (num_in, num_out, gated) in LINEARS.items():
        size = num_in * num_out * 2
        weights = [rand(num_out, num_in) / 64 for _ in range(copies_for(size, 40))]
        norm = rand(num_in)
        for tokens in (1, 8, 16, 64):
            x = rand(tokens, num_in)
            residual = rand(tokens, num_out)

            def library(w: Tensor) -> object:
                y = F.linear(ops.rms_norm(x, norm, 1e-6), w)
                return ops.silu_and_mul(y) if gated else residual.add_(y)

            def door(w: Tensor) -> object:
                return ops.fused_linear(
                    x, w, norm_weight_I=norm, eps=1e-6, gated=gated, residual_TO=None if gated else residual
                )  # fmt: skip

            runs = {"cublas": lambda w: F.linear(x, w), "cublas + separate": library, "fused_linear": door}
            if gemv.suits(x, weights[0]):
                runs["gemv"] = lambda w: gemv.fused_linear(x, w)
            for label, run in runs.items():
                us, spread = microseconds([lambda w=w, run=run: run(w) for w in weights])
                report.add(
                    label, f"{name} {num_in}x{num_out} tokens {tokens}", us, spread, TBps=round(size / us / 1e6, 2)
                )


def decode(report: Report) -> None:
    """Paged decode attention, alone and with rotation and KV write inside, against SDPA over dense keys."""
    rotations = torch.randn(8192, 128, device="cuda")
    for heads, kv_heads, size in ((32, 8, 128), (16, 8, 128), (14, 2, 64)):
        for rows, context in ((1, 256), (1, 4096), (8, 1024), (64, 384), (64, 1024), (256, 384), (256, 1024)):
            moved = rows * context * kv_heads * size * 4
            sets = copies_for(moved, 16)
            calls, fused, dense = [], [], []
            turns = rotations[:, :size].contiguous()
            per_row = context // 16
            for _ in range(sets):
                k_cache, v_cache = rand(rows * per_row, 16, kv_heads, size), rand(rows * per_row, 16, kv_heads, size)
                table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
                lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
                q = rand(rows, heads, size)
                qkv = rand(rows, (heads + 2 * kv_heads) * size)
                positions = lengths.long() - 1
                fused.append(
                    lambda a=(qkv, positions, turns, k_cache, v_cache, positions, table,
                              lengths): ops.decode_attention(
                        *a, num_heads=heads, scale=0.1, max_context=8192, inputs_early=True)
                )  # fmt: skip
                calls.append(
                    lambda a=(q, k_cache, v_cache, table, lengths): ops.paged_attention(*a, scale=0.1, max_context=8192)
                )
                k, v = (x.view(rows, context, kv_heads, size).transpose(1, 2) for x in (k_cache, v_cache))
                dense.append(
                    lambda a=(q[:, :, None], k, v): F.scaled_dot_product_attention(*a, scale=0.1, enable_gqa=True)
                )
            case = f"{heads}/{kv_heads}x{size} rows {rows} context {context}"
            us, spread = microseconds(calls)
            report.add("paged_attention", case, us, spread, TBps=round(moved / us / 1e6, 2))
            us, spread = microseconds(fused)
            report.add("decode_attention", case, us, spread, TBps=round(moved / us / 1e6, 2))
            if context >= 384 and rows >= 8 and size == 128:
                us, spread = microseconds(dense)
                report.add("SDPA dense", case, us, spread, TBps=round(moved / us / 1e6, 2))


def prefill(report: Report) -> None:
    """New prompts, and a chunk after a long prefix, against SDPA (cuDNN) over dense keys."""
    for heads, kv_heads, size in ((32, 8, 128), (16, 8, 128)):
        for rows, queries, context in (
            (16, 512, 512),
            (4, 2048, 2048),
            (1, 8192, 8192),
            (4, 512, 4096),
            (64, 16, 1024),
        ):
            per_row = context // 16
            calls = []
            pairs = rows * (queries * (context - queries) + queries * (queries + 1) / 2)
            flops = 4 * pairs * heads * size
            for _ in range(4):
                k_cache, v_cache = rand(rows * per_row, 16, kv_heads, size), rand(rows * per_row, 16, kv_heads, size)
                table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
                lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
                starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * queries
                q = rand(rows * queries, heads, size)
                calls.append(
                    lambda a=(q, k_cache, v_cache, starts, lengths, table): ops.prefill_attention(*a, scale=0.1)
                )
            case = f"{heads}/{kv_heads}x{size} {rows} x {queries} of {context}"
            us, spread = microseconds(calls)
            report.add("prefill_attention", case, us, spread, TFLOPs=round(flops / us / 1e6))
            if queries == context:
                q4 = rand(rows, queries, heads, size).transpose(1, 2)
                k4, v4 = (rand(rows, context, kv_heads, size).transpose(1, 2) for _ in range(2))
                for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                    with sdpa_kernel(backend):
                        us, spread = microseconds(
                            [lambda a=(q4, k4, v4): F.scaled_dot_product_attention(*a, is_causal=True, enable_gqa=True)]
                        )
                    report.add(f"SDPA {backend.name[:5]}", case, us, spread, TFLOPs=round(flops / us / 1e6))


def small(report: Report) -> None:
    """Norms, gates, rotation with KV write: microseconds for few tokens, bandwidth for many."""
    for tokens in (1, 64, 8192):
        sets = 2 if tokens < 8192 else 4
        x = [rand(tokens, 4096) for _ in range(sets)]
        y = [rand(tokens, 4096) for _ in range(sets)]
        wide = [rand(tokens, 28672) for _ in range(sets)]
        weight = rand(4096)
        qkv = [rand(tokens, 6144) for _ in range(sets)]
        caches = [rand(1024, 16, 8, 128), rand(1024, 16, 8, 128)]
        table = torch.randn(8192, 128, device="cuda")
        positions, slots = torch.arange(tokens, device="cuda"), torch.randperm(16384, device="cuda")[:tokens]
        head_weight = rand(128)
        plain = {"num_heads": 32}
        normed = plain | {"q_norm_weight_H": head_weight, "k_norm_weight_H": head_weight}
        cases = {
            "rms_norm 4096": (2 * 8192, [lambda a=a: ops.rms_norm(a, weight, 1e-6) for a in x]),
            "add_rms_norm 4096": (4 * 8192, [
                lambda a=a, b=b: ops.add_rms_norm(a, b, weight, 1e-6) for a, b in zip(x, y, strict=True)]),
            "silu_and_mul 2x14336": (3 * 28672, [lambda a=a: ops.silu_and_mul(a) for a in wide]),
            "rope_and_store 32/8x128": (2 * 12288, [
                lambda a=a: ops.rope_and_store(a, positions, table, *caches, slots, **plain) for a in qkv]),
            "rope_and_store 32/8x128 + qk norm": (2 * 12288, [
                lambda a=a: ops.rope_and_store(a, positions, table, *caches, slots, **normed) for a in qkv]),
        }  # fmt: skip
        for name, (bytes_a_token, calls) in cases.items():
            us, spread = microseconds(calls)
            report.add("small", f"{name} tokens {tokens}", us, spread, TBps=round(bytes_a_token * tokens / us / 1e6, 2))


def sampling(report: Report) -> None:
    for vocabulary in (128256, 151936):
        for rows in (1, 64, 256):
            logits = [rand(rows, vocabulary) * 2 for _ in range(copies_for(rows * vocabulary * 2, 8))]
            zeros, ones = torch.zeros(rows, device="cuda"), torch.ones(rows, device="cuda")
            off = torch.zeros(rows, device="cuda", dtype=torch.int32)
            seeds, positions = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda")
            columns = {
                "greedy": ((zeros, off, ones, zeros), {"any_random": False}),
                "random": ((ones, off, ones, zeros), {"any_filter": False}),
                "top_k 50": ((ones, off + 50, ones, zeros), {}),
                "top_p 0.9": ((ones, off, ones * 0.9, zeros), {}),
                "top_k 20 top_p 0.95 t 0.6": ((ones * 0.6, off + 20, ones * 0.95, zeros), {}),
            }
            for name, (parameters, flags) in columns.items():
                us, spread = microseconds(
                    [
                        lambda a=a, p=parameters, f=flags: step_ops.sample_rows(a, *p, seeds, positions, **f)
                        for a in logits
                    ]
                )
                report.add("sample_rows", f"{name} rows {rows} vocabulary {vocabulary}", us, spread)
            us, spread = microseconds([lambda a=a: a.argmax(-1) for a in logits])
            report.add("torch argmax", f"rows {rows} vocabulary {vocabulary}", us, spread)


def blocks(report: Report) -> None:
    """Copy and swap of blocks through the 64 tensors of an 8b model. Not captured: host lists, wall of one call."""
    caches = [rand(512, 16, 8, 128) for _ in range(64)]
    host = [torch.zeros(256, 16, 8, 128, dtype=BF16).pin_memory() for _ in caches]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for count in (1, 16, 128):
        pairs = [(2 * i, 2 * i + 1) for i in range(count)]
        halves = [(2 * i, i) for i in range(count)]
        back = [(b, a) for a, b in halves]
        for name, call in {
            "copy": lambda p=pairs: ops.copy_blocks(caches, p),
            "to host": lambda p=halves: ops.swap_blocks(caches, host, p),
            "from host": lambda p=back: ops.swap_blocks(host, caches, p),
        }.items():
            call()
            torch.cuda.synchronize()
            times = []
            for _ in range(5):
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) * 1000)
            us = sorted(times)[2]
            moved = count * 64 * 32768
            report.add("blocks", f"{name} {count} blocks x 64 tensors", us, 0.0, GBps=round(moved / us / 1e3, 1))


class Step:
    """All kernels of a decode step of a model's shape, with random weights: norms, projections, attention over 256
    tokens, head, argmax."""

    norms_ahead = True  # where the kernels can

    def __init__(
        self, hidden: int, layers: int, heads: int, kv_heads: int, wide: int, vocabulary: int, qk_norm: bool
    ):  # fmt: skip
        self.layers, self.heads, self.kv_heads, self.size = layers, heads, kv_heads, 128
        self.shapes = {
            "qkv": (hidden, (heads + 2 * kv_heads) * self.size), "o": (heads * self.size, hidden),
            "gate_up": (hidden, 2 * wide), "down": (wide, hidden), "head": (hidden, vocabulary),
        }  # fmt: skip
        names = ("qkv", "o", "gate_up", "down")
        self.weights = [[self._weight(name) for name in names] for _ in range(layers)]
        self.head, self.embedding, self.norm = self._weight("head"), rand(vocabulary, hidden), rand(hidden)
        self.head_norm = {"q_norm_weight_H": rand(128), "k_norm_weight_H": rand(128)} if qk_norm else {}
        self.rotations = torch.randn(8192, 128, device="cuda")
        self.bytes = 2 * (self.head.numel() + sum(w.numel() for layer in self.weights for w in layer))

    def _weight(self, name: str) -> Tensor:
        num_in, num_out = self.shapes[name]
        return rand(num_out, num_in) / math.sqrt(num_in)

    def _of_norm(self, h: Tensor, weight: Tensor, normed: NormAhead | None, *, gated: bool = False) -> Tensor:
        """A product of the norm of `h`, which the one before may have left."""
        if normed is None:
            return ops.fused_linear(h, weight, norm_weight_I=self.norm, gated=gated)
        return norm_ahead.fused_linear(h, weight, normed=normed, gated=gated)

    def _add(self, h: Tensor, x: Tensor, weight: Tensor, following: Tensor | None) -> NormAhead | None:
        """`h` += a product; what it leaves for the one that follows."""
        ahead = None
        if following is not None and self.norms_ahead:
            ahead = norm_ahead.between(h, weight, following, self.norm, 1e-6)
        if ahead is None:
            ops.fused_linear(x, weight, residual_TO=h)
        else:
            norm_ahead.fused_linear(x, weight, residual_TO=h, ahead=ahead)
        return ahead

    def of(self, rows: int, context: int = 256) -> Callable[[], Tensor]:
        """A step of `rows` rows, ready to be captured."""
        per_row = 512 // 16
        caches = [[rand(rows * per_row, 16, self.kv_heads, self.size) for _ in range(2)] for _ in range(self.layers)]
        blocks_RB = torch.arange(rows * per_row, device="cuda").view(rows, per_row).int()
        lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        positions = lengths.long() - 1
        slots = blocks_RB[:, (context - 1) // 16].long() * 16 + (context - 1) % 16
        tokens = torch.arange(rows, device="cuda")
        attention = {"num_heads": self.heads, "scale": 0.1, "max_context": 8192, "inputs_early": True, **self.head_norm}

        def run() -> Tensor:
            h = F.embedding(tokens, self.embedding)
            normed = None
            for layer, ((qkv_w, o_w, gate_up_w, down_w), cache) in enumerate(zip(self.weights, caches, strict=True)):
                qkv = self._of_norm(h, qkv_w, normed)
                a = ops.decode_attention(
                    qkv, positions, self.rotations, *cache, slots, blocks_RB, lengths, **attention
                )  # fmt: skip
                normed = self._add(h, a.view(rows, -1), o_w, gate_up_w)
                act = self._of_norm(h, gate_up_w, normed, gated=True)
                following = self.weights[layer + 1][0] if layer + 1 < self.layers else None
                normed = self._add(h, act, down_w, following)
            return step_ops.argmax_rows(ops.fused_linear(h, self.head, norm_weight_I=self.norm))

        return run


def step(report: Report) -> None:
    for name, shape in STEPS.items():
        chain = Step(*shape)
        for rows in (1, 8, 16, 64, 256):
            if report.profiles:
                report.profile(f"{name} rows {rows}", chain.of(rows))
                continue
            us, spread = microseconds([chain.of(rows)], launches=1)
            report.add(
                "step", f"{name} rows {rows} context 256", us, spread, weights_TBps=round(chain.bytes / us / 1e6, 2)
            )
        del chain
        torch.cuda.empty_cache()


PARTS = {"linear": linear, "decode": decode, "prefill": prefill, "small": small, "sampling": sampling, "blocks": blocks,
         "step": step}  # fmt: skip


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], PARTS, profiles=True)
