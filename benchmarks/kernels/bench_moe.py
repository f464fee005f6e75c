"""A layer's experts on one card, beside what the card's memory and tensor cores allow and beside other ways to do it.

    python benchmarks/kernels/bench_moe.py --output moe.jsonl

Per published shape and number of tokens, in microseconds, each recorded as a graph where it can be: ours (grouping, two
grouped products, gate, weighted sum), a loop over experts in plain torch, torch's own grouped product
(`torch._grouped_mm`), and the block of the installed transformers. `error` is that of ours against the definition in
float32 with the same weights; `limit` is the larger of the bytes of the weights of the experts asked at 4.8 TB/s and
the multiplications at 989 TFLOP/s (1979 where weights are e4m3).
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tune_moe import random_int_experts

from argosy.deploy import bench_table
from argosy.kernels import moe_ops, moe_reference

CARD_BYTES_A_SECOND, CARD_FLOPS = 4.8e12, 989e12
# name -> experts, chosen, width, inner width, format
SHAPES = {
    "mixtral-8x7b": (8, 2, 4096, 14336, "plain"),
    "qwen3-30b-a3b": (128, 8, 2048, 768, "plain"),
    "mixtral-8x7b in 4 bits": (8, 2, 4096, 14336, "int4"),
    "qwen3-30b-a3b in 4 bits": (128, 8, 2048, 768, "int4"),
    "qwen3-30b-a3b in 8 bits": (128, 8, 2048, 768, "int8"),
    "qwen3-30b-a3b in 4 bits, groups of 32, ordered": (128, 8, 2048, 768, "int4 ordered"),
    "gpt-oss-120b": (128, 4, 2880, 2880, "mxfp4"),
    "deepseek-r1, 32 experts of a rank": (32, 1, 7168, 2048, "e4m3"),
    "granite-3-3b-a800m": (40, 8, 1536, 512, "plain"),
}
INT_KINDS: dict[str, dict[str, Any]] = {
    "int4": {}, "int8": {"bits": 8}, "int4 ordered": {"group": 32, "ordered": True},
}  # fmt: skip


def main() -> int:
    """Measure within the time given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048, 8192])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--alone", action="store_true", help="only ours")
    parser.add_argument("--output")
    args = parser.parse_args()
    started, machine = time.perf_counter(), torch.cuda.get_device_name(0)
    for name in args.shapes:
        layer = Layer(*SHAPES[name])
        for tokens in args.tokens:
            if time.perf_counter() - started > args.seconds:
                return 0
            line = {
                "bench": "experts",
                "shape": name,
                "tokens": tokens,
                "machine": machine,
                **layer.measure(tokens, alone=args.alone),
            }
            bench_table.tell(line, args.output)
    return 0


class Layer:
    """One layer's experts with random weights."""

    def __init__(self, experts: int, top_k: int, width: int, inner: int, kind: str):
        self.experts, self.top_k, self.width, self.inner, self.kind = experts, top_k, width, inner, kind
        shapes = ((experts, 2 * inner, width), (experts, width, inner))
        self.weights = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02) for shape in shapes]
        self.options: dict[str, Any] = {}
        self.stored: list[Any] = self.weights
        if kind in INT_KINDS:
            self.stored = [random_int_experts(*shape, **INT_KINDS[kind]) for shape in shapes]
        if kind == "mxfp4":
            self.stored = [
                torch.randint(0, 256, (e, o, i // 2), device="cuda", dtype=torch.uint8) for e, o, i in shapes
            ]
            scales = [torch.full((e, o, i // 32), 119, device="cuda", dtype=torch.uint8) for e, o, i in shapes]
            self.options = {"gate_up_scale": scales[0], "down_scale": scales[1], "limit": 7.0, "alpha": 1.702}
        if kind == "e4m3":
            self.stored = [weight.to(torch.float8_e4m3fn) for weight in self.weights]
            scales = [torch.ones(e, o // 128, i // 128, device="cuda") for e, o, i in shapes]
            self.options = {"gate_up_scale": scales[0], "down_scale": scales[1]}

    def measure(self, tokens: int, *, alone: bool = False) -> dict[str, Any]:
        """Microseconds of each way."""
        x = torch.randn(tokens, self.width, device="cuda", dtype=torch.bfloat16)
        ids, weights = moe_reference.choose_experts(torch.randn(tokens, self.experts, device="cuda"), self.top_k)
        asked = len(ids.unique())
        sizes = [w.packed.num_bytes / self.experts if self.kind in INT_KINDS else w[0].nbytes for w in self.stored]
        read = asked * sum(sizes)
        flops = 6 * tokens * self.top_k * self.width * self.inner
        limit = max(read / CARD_BYTES_A_SECOND, flops / (CARD_FLOPS * (2 if self.kind == "e4m3" else 1))) * 1e6
        exact = [weight.float() for weight in self.stored] if self.kind == "plain" else self.stored
        want = moe_reference.experts(x.float(), *exact, ids, weights, **self.options)
        del exact
        error = (moe_ops.experts(x, *self.stored, ids, weights, **self.options) - want).norm() / want.norm()
        found: dict[str, Any] = {"experts_asked": asked, "limit": limit, "error": round(float(error), 5)}
        ways: dict[str, tuple[Callable[[], object], bool]] = {
            "ours": (lambda: moe_ops.experts(x, *self.stored, ids, weights, **self.options), True),
            "torch loop": (lambda: moe_reference.experts(x, *self.weights, ids, weights), False),
            "torch grouped": (lambda: grouped(x, *self.weights, ids, weights), True),
        }
        block = self._transformers(tokens)
        if alone:
            ways = {"ours": ways["ours"]}
        elif block is not None:
            ways["transformers"] = (lambda: block(x[None]), False)
        for name, (run, records) in ways.items():
            try:
                found[name] = timed(run, records=records)
            except Exception as error:  # a peer that this version lacks
                found[name] = f"{type(error).__name__}: {str(error)[:80]}"
        if isinstance(found["ours"], float):
            found["share_of_limit"] = round(limit / found["ours"], 3)
        return {
            key: round(value, 1) if isinstance(value, float) and value > 1 else value for key, value in found.items()
        }

    def _transformers(self, tokens: int) -> Callable[[Tensor], object] | None:
        """The block of the family whose shape it is, with this layer's weights."""
        if (self.experts, self.width) != (8, 4096):
            return None
        try:
            from transformers import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

            config = MixtralConfig(hidden_size=self.width, intermediate_size=self.inner)
            with torch.device("meta"):
                block = MixtralSparseMoeBlock(config).to(torch.bfloat16)
            block = block.to_empty(device="cuda").eval()
            for parameter in block.parameters():
                parameter.data.normal_(0, 0.02)
            return block
        except Exception:  # another version has other names
            return None


def grouped(x_TD: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """By torch's grouped product: rows in the order of their experts."""
    flat, order = ids_TK.flatten().sort()
    ends = (flat[:, None] == torch.arange(len(gate_up_EID), device=flat.device)).sum(0).cumsum(0).int()
    rows = x_TD[order // ids_TK.shape[1]]
    both = torch._grouped_mm(rows, gate_up_EID.transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, -1)
    made = torch._grouped_mm(F.silu(gate) * up, down_EDI.transpose(1, 2), offs=ends)
    made = made * weights_TK.flatten()[order, None].to(made.dtype)
    return torch.zeros_like(x_TD).index_add_(0, order // ids_TK.shape[1], made)


@torch.inference_mode()
def timed(run: Callable[[], object], *, records: bool) -> float:
    """Microseconds of one call, the median of five rounds."""
    run(), run()
    torch.cuda.synchronize()
    repeats, replay = 5, run
    if records:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                run()
            replay, repeats = graph.replay, 20
        except RuntimeError:  # it asks the device for values
            torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeats)
    return sorted(times)[2]


if __name__ == "__main__":
    sys.exit(main())
