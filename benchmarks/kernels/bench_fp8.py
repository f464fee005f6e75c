"""FP8 products and roundings against the limits of the card: `python benchmarks/kernels/bench_fp8.py [part ...]`.

Prints a JSON line a measurement and a table last; `--out FILE` appends the lines to a file. Parts: few (1 to 16 tokens,
read speed), many (cuBLAS by row and by tensor, Triton by row and by block), rounding (with norm or gate), cache (decode
attention over e4m3 and over 16 bits), step (all kernels of a decode step).
"""

# ruff: noqa: B023 - every closure here is called within the turn of the loop that made it
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_kernels import LINEARS, STEPS, rand
from timing import Report, copies_for, microseconds, run_parts
from torch import Tensor

from argosy.kernels import (
    activation,
    fp8_gemm,
    fp8_gemv,
    fp8_one,
    fp8_ops,
    fp8_quantize,
    fp8_reference,
    ops,
    rms_norm,
    step_ops,
)
from argosy.kernels.fp8_reference import Fp8Rows, Fp8Weight, Rounding

BF16 = torch.bfloat16
LAYERS = {name: shape for name, shape in LINEARS.items() if name.startswith("8b") and "head" not in name}


def random_weight(num_out: int, num_in: int, block: tuple[int, int] | None = None) -> Fp8Weight:
    return fp8_reference.quantize_weight(rand(num_out, num_in) / 64, block)


def weights_of(num_out: int, num_in: int, block: tuple[int, int] | None, at_most: int) -> list[Fp8Weight]:
    """Enough copies that none is found in a cache; the same numbers, since making them takes longer than measuring."""
    first = random_weight(num_out, num_in, block)
    count = copies_for(num_out * num_in, at_most)
    return [Fp8Weight(first.values_OI.clone(), first.scale.clone(), block) for _ in range(count)]


def few(report: Report) -> None:
    """The fused kernel at its sizes, and cuBLAS over rounded activations with everything that it needs around it."""
    for name, (num_in, num_out, gated) in LAYERS.items():
        adds, norm = name.endswith((" o", "down")), rand(num_in)
        for block in (None, (128, 128)):
            weights = weights_of(num_out, num_in, block, 30)
            for tokens in (1, 8, 16):
                x = rand(tokens, num_in)
                residual = rand(tokens, num_out) if adds else None
                rounding = Rounding(block[1] if block else 0)

                def fused(w: Fp8Weight) -> object:
                    return fp8_gemv.fused_linear(
                        x, w, norm_weight_I=None if adds else norm, residual_TO=residual, gated=gated
                    )

                def rounded(w: Fp8Weight) -> object:
                    if adds:
                        return residual.add_(fp8_ops.linear(fp8_ops.quantize_rows(x, rounding), w, None, BF16))
                    y = fp8_ops.linear(fp8_ops.norm_and_quantize(x, norm, 1e-6, rounding), w, None, BF16)
                    return ops.silu_and_mul(y) if gated else y

                for label, run in {"fp8_gemv": fused, "round + product": rounded}.items():
                    us, spread = microseconds([lambda w=w, run=run: run(w) for w in weights])
                    case = f"{name} {num_in}x{num_out} tokens {tokens}{' blocks' if block else ''}"
                    report.add(label, case, us, spread, TBps=round(num_in * num_out / us / 1e6, 2))


def by_tensor(rows: Fp8Rows, weight: Fp8Weight) -> Tensor:
    """cuBLAS with one scale a side."""
    return torch._scaled_mm(
        rows.values_TI, weight.values_OI.t(), scale_a=rows.scale_TG[:1, :1], scale_b=weight.scale[:1].view(1, 1),
        out_dtype=BF16, use_fast_accum=True,
    )  # fmt: skip


def by_block(rows: Fp8Rows, weight: Fp8Weight) -> Tensor:
    """cuBLAS with scales by group of 128 and by block of 128 x 128, where torch and the card have it."""
    scale_b = weight.scale.t()
    return torch._scaled_mm(
        rows.values_TI, weight.values_OI.t(), scale_a=rows.scale_TG, scale_b=scale_b, out_dtype=BF16
    )


def many(report: Report) -> None:
    """Products alone."""
    for name, (num_in, num_out, _) in LAYERS.items():
        by_row, blocks = (weights_of(num_out, num_in, block, 8) for block in (None, (128, 128)))
        for tokens in (32, 64, 128, 256, 512, 2048, 8192):
            x = rand(tokens, num_in)
            rows, grouped = (fp8_quantize.quantize(x, Rounding(group)) for group in (0, 128))
            runs = {
                "cublas by row": (by_row, lambda w: fp8_gemm.library_linear(rows, w, None, BF16)),
                "cublas by tensor": (by_row, lambda w: by_tensor(rows, w)),
                "triton by row": (by_row, lambda w: fp8_gemm.triton_linear(rows, w, None, BF16)),
                "triton by block": (blocks, lambda w: fp8_gemm.triton_linear(grouped, w, None, BF16)),
                "cublas by block": (blocks, lambda w: by_block(grouped, w)),
            }
            for label, (weights, run) in runs.items():
                try:
                    us, spread = microseconds([lambda w=w: run(w) for w in weights], replays=3)
                except Exception as error:  # not every torch and card has each
                    print("skipped", label, name, tokens, " ".join(str(error).split())[:200], flush=True)
                    continue
                report.add(
                    label, f"{name} {num_in}x{num_out} tokens {tokens}", us, spread,
                    TFLOPs=round(2 * tokens * num_in * num_out / us / 1e6, 1),
                    TBps=round(num_in * num_out / us / 1e6, 2),
                )  # fmt: skip


def rounding(report: Report) -> None:
    """Each beside the kernel that writes 16 bits instead."""
    weight = rand(4096)
    for tokens in (1, 64, 256, 8192):
        x, residual, wide = rand(tokens, 4096), rand(tokens, 4096), rand(tokens, 28672)
        kept = Rounding()
        cases = {
            "round 4096": lambda: fp8_quantize.quantize(x, kept),
            "add, norm, round 4096": lambda: fp8_ops.norm_and_quantize(x, weight, 1e-6, kept, residual),
            "add, norm 4096": lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-6),
            "gate, round 2 x 14336": lambda: fp8_ops.gate_and_quantize(wide, kept),
            "gate 2 x 14336": lambda: activation.silu_and_mul(wide),
            "gate, round by 128, 2 x 14336": lambda: fp8_ops.gate_and_quantize(wide, Rounding(128)),
        }
        for name, run in cases.items():
            us, spread = microseconds([run], launches=50, replays=3)
            report.add("rounding", f"{name} tokens {tokens}", us, spread)


def cache(report: Report) -> None:
    """Decode attention with rotation and store inside, the same keys and values in 16 bits and in e4m3."""
    turns = torch.randn(8192, 128, device="cuda")
    for rows, context in ((1, 256), (1, 4096), (8, 1024), (64, 384), (64, 1024), (256, 384), (256, 1024)):
        per_row = context // 16
        table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
        lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        positions = lengths.long() - 1
        slots = table[:, -1].long() * 16 + 15
        for dtype in (BF16, torch.float8_e4m3fn):
            size = rows * context * 8 * 128 * 2 * dtype.itemsize
            calls = []
            for _ in range(copies_for(size, 8)):
                k_cache, v_cache = (rand(rows * per_row, 16, 8, 128).to(dtype) for _ in range(2))
                qkv = rand(rows, 48 * 128)
                calls.append(
                    lambda k=k_cache, v=v_cache, x=qkv: ops.decode_attention(
                        x, positions, turns, k, v, slots, table, lengths, num_heads=32, scale=0.1, inputs_early=True
                    )
                )
            us, spread = microseconds(calls)
            report.add(
                "decode_attention", f"{str(dtype)[6:]} 32/8x128 rows {rows} context {context}", us, spread,
                TBps=round(size / us / 1e6, 2),
            )  # fmt: skip


class Fp8Step:
    """All kernels of a decode step as a decoder launches them, with random weights and a 16-bit head."""

    def __init__(self, hidden: int, layers: int, heads: int, kv_heads: int, wide: int, vocabulary: int, qk_norm: bool):
        self.layers, self.heads, self.kv_heads = layers, heads, kv_heads
        self.shapes = {
            "qkv": (hidden, (heads + 2 * kv_heads) * 128), "o": (heads * 128, hidden), "gate_up": (hidden, 2 * wide),
            "down": (wide, hidden),
        }  # fmt: skip
        self.weights = [
            [fp8_reference.quantize_weight(rand(num_out, num_in) / 64) for num_in, num_out in self.shapes.values()]
            for _ in range(layers)
        ]
        self.head, self.embedding, self.norm = rand(vocabulary, hidden) / 64, rand(vocabulary, hidden), rand(hidden)
        self.rotations = torch.randn(8192, 128, device="cuda")
        self.ones: dict[str, Any] = {}  # sizes of `fp8_one` by product, for one row of it
        packed = sum(w.values_OI.numel() for layer in self.weights for w in layer)
        self.bytes = packed + 2 * self.head.numel()

    def of(self, rows: int, context: int = 256, *, rounded: bool | None = None) -> Callable[[], Tensor]:
        """A step of `rows` rows, ready to be captured. `rounded`: activations, too; without, from two rows on."""
        per_row = 512 // 16
        caches = [[rand(rows * per_row, 16, self.kv_heads, 128) for _ in range(2)] for _ in range(self.layers)]
        blocks_RB = torch.arange(rows * per_row, device="cuda").view(rows, per_row).int()
        lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        positions = lengths.long() - 1
        slots = blocks_RB[:, (context - 1) // 16].long() * 16 + (context - 1) % 16
        tokens = torch.arange(rows, device="cuda")
        options = {"num_heads": self.heads, "scale": 0.1, "max_context": 8192, "inputs_early": True}
        options["rings"] = bool(self.ones)
        rounding = Rounding()

        def attend(qkv: Tensor, cache: list[Tensor]) -> Tensor:
            return ops.decode_attention(
                qkv, positions, self.rotations, *cache, slots, blocks_RB, lengths, **options
            ).view(rows, -1)  # fmt: skip

        def one() -> Tensor:
            h = F.embedding(tokens, self.embedding)
            for (qkv_w, o_w, gate_up_w, down_w), cache in zip(self.weights, caches, strict=True):
                seen = attend(fp8_ops.fused_linear(h, qkv_w, rounding=rounding, norm_weight_I=self.norm), cache)
                fp8_ops.fused_linear(seen, o_w, rounding=rounding, residual_TO=h)
                act = fp8_ops.fused_linear(h, gate_up_w, rounding=rounding, norm_weight_I=self.norm, gated=True)
                fp8_ops.fused_linear(act, down_w, rounding=rounding, residual_TO=h)
            return step_ops.argmax_rows(ops.fused_linear(h, self.head, norm_weight_I=self.norm))

        def several() -> Tensor:
            h, delta = F.embedding(tokens, self.embedding), None
            for (qkv_w, o_w, gate_up_w, down_w), cache in zip(self.weights, caches, strict=True):
                if delta is None:
                    x = fp8_ops.norm_and_quantize(h, self.norm, 1e-6, rounding)
                else:
                    x = fp8_ops.norm_and_quantize(delta, self.norm, 1e-6, rounding, h)
                seen = attend(fp8_ops.linear(x, qkv_w, None, BF16), cache)
                delta = fp8_ops.linear(fp8_ops.quantize_rows(seen, rounding), o_w, None, BF16, pieces=True)
                x = fp8_ops.norm_and_quantize(delta, self.norm, 1e-6, rounding, h)
                inner = fp8_ops.gated_linear(x, gate_up_w, None, BF16)
                if inner is None:
                    act = fp8_ops.gate_and_quantize(fp8_ops.linear(x, gate_up_w, None, BF16), rounding)
                else:
                    act = fp8_ops.quantize_rows(inner, rounding)
                delta = fp8_ops.linear(act, down_w, None, BF16, pieces=down_w is not self.weights[-1][-1])
            x = ops.add_rms_norm(delta, h, self.norm, 1e-6)[0]
            return step_ops.argmax_rows(ops.measured_linear(x, self.head))

        def alone() -> Tensor:
            h, parts = F.embedding(tokens, self.embedding), None
            normed = (self.norm, 1e-6)
            for (qkv_w, o_w, gate_up_w, down_w), cache in zip(self.weights, caches, strict=True):
                kept = None if parts is None else torch.empty_like(h)
                qkv = fp8_one.linear(h, qkv_w, None, self.ones["qkv"], norm=normed, parts_P1I=parts, kept_1I=kept)
                h = h if kept is None else kept
                parts = fp8_one.linear(attend(qkv, cache), o_w, None, self.ones["o"])
                kept = torch.empty_like(h)
                act = fp8_one.linear(
                    h, gate_up_w, None, self.ones["gate_up"], norm=normed, parts_P1I=parts, kept_1I=kept, gated=True
                )  # fmt: skip
                h, parts = kept, fp8_one.linear(act, down_w, None, self.ones["down"])
            x = ops.add_rms_norm(parts.sum(0).to(BF16), h, self.norm, 1e-6)[0]
            return step_ops.argmax_rows(ops.measured_linear(x, self.head))

        if self.ones:
            return alone
        return several if (rows > 1 if rounded is None else rounded) else one


def step(report: Report) -> None:
    """The kernels of a whole step."""
    chain = Fp8Step(*STEPS["8b"])
    for rows in (1, 8, 16, 64, 256):
        us, spread = microseconds([chain.of(rows)], launches=1)
        report.add(
            "step", f"8b rows {rows} context 256", us, spread, weights_TBps=round(chain.bytes / us / 1e6, 2)
        )  # fmt: skip


PARTS = {"step": step, "few": few, "many": many, "rounding": rounding, "cache": cache}


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], PARTS)
