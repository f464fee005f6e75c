"""Layers of published shapes on a card: do they give what plain torch gives in float32, and how fast are they?

    python benchmarks/gpu/check_families.py mixtral gpt-oss deepseek-r1 llama-405b

A slice is the first few layers of a model at its full width, with random weights in bfloat16. It answers prompts,
chunks of prompts and decode steps by our kernels; then a copy in float32 answers the same by the plain definitions in
`kernels.reference`, `moe_reference`, `mla_reference` and `fp8_reference`. The copy takes the same experts: which of two
nearly equal ones is chosen says nothing about a kernel. What numbers of 16 bits, or rounding inputs to 8, cost any
implementation is measured beside it: the same plain definitions in the slice's own numbers. Ours may not be further
from float32 than those by more than a fifth. Then decode steps of the layers alone are recorded as a graph and timed;
`weights` is what a step reads of them at least, as a share of the card's 4.8 TB/s; `limit`: with keys and values.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from family_shapes import COMMON, SHAPES, narrowed
from plain_definitions import of_groups, plain_torch, remembered, unpacked
from torch import Tensor

from argosy.cluster.protocol.model_spec import ModelSpec, read_model_spec
from argosy.kernels.moe_reference import IntExpertWeight
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext, init_parallel
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.attention.triton_backend import TritonBackend
from argosy.workers.forward_context import ForwardContext
from argosy.workers.kv_cache import KVCache
from argosy.workers.loading.stream import load_weights
from argosy.workers.models.registry import build_model

BLOCK = 16
CARD_BYTES_A_SECOND = 4.8e12  # an H200's data sheet
WORSE, LEAST_BOUND = 1.2, 0.005  # than plain torch in the same numbers; below that nothing is worth a word


class Slice:
    """A model of few layers, its cache, and rows in it."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int,
        parallel: ParallelContext | None = None,
    ):
        rank = make_plan(spec.num_layers, 1, 1).ranks[0] if parallel is None else parallel.rank
        self.spec, self.device = spec, device
        self.model = build_model(spec, rank, parallel or init_parallel(rank, "", device, 1.0), dtype, device)
        if spec.quantization is None:
            self.model.allocate()
        else:
            load_weights(self.model, "nowhere", spec, load_format="dummy")
        self.cache = KVCache.allocate(spec, rank, num_blocks, BLOCK, dtype, device)
        self.backend = TritonBackend()

    def draw(self) -> None:
        """Random weights of a plausible size; norms near 1."""
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in self.model.named_parameters():
            is_norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            parameter.data.normal_(float(is_norm and "plus_one" not in self.spec.norm), 0.02, generator=generator)

    def take(self, other: "Slice") -> None:
        """The same weights in our numbers."""
        for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.data.copy_(theirs.data)

    def take_meaning(self, other: "Slice") -> None:
        """The weights of a packed model, unpacked. Both are finished."""
        packed = dict(other.model.named_modules())
        for name, module in self.model.named_modules():
            theirs = packed[name]
            for key, mine in module.named_parameters(recurse=False):
                if key == "weight" and getattr(theirs, "words", None) is not None:
                    mine.data.copy_(of_groups(theirs.method))
                    continue
                if isinstance(getattr(theirs, key), IntExpertWeight):
                    for expert in range(len(mine)):
                        mine.data[expert] = getattr(theirs, key).of(expert)
                    continue
                values, scale = getattr(theirs, key), getattr(theirs, f"{key}_scale", None)
                if scale is None or values.ndim < 3:
                    mine.data.copy_(values if scale is None else unpacked(values, scale))
                    continue
                for expert in range(len(values)):  # all at once would not fit
                    mine.data[expert] = unpacked(values[expert], scale[expert])

    def metadata(self, counts: list[int], lengths: list[int], blocks: Tensor) -> tuple[AttentionMetadata, Tensor]:
        """Rows of `counts` new tokens, the last of `lengths`; and positions."""
        device = self.device
        places = [torch.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)]
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        positions = torch.cat(places)
        table = blocks.cpu()
        slots = table[rows, positions // BLOCK].long() * BLOCK + positions % BLOCK
        starts = torch.tensor([0, *counts]).cumsum(0)
        made = AttentionMetadata(
            num_rows=len(counts),
            num_decode_rows=sum(c == 1 for c in counts),
            query_start_R1=starts.int().to(device),
            context_len_R=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table_RB=blocks.to(device),
            slot_mapping_T=slots.to(device),
            max_query_len=max(counts),
            max_context_len=max(lengths),
        )
        return made, positions.to(device)

    @torch.inference_mode()
    def step(self, ids: Tensor, counts: list[int], lengths: list[int], blocks: Tensor) -> Tensor:
        """Logits after each row's last token."""
        metadata, positions = self.metadata(counts, lengths, blocks)
        hidden = self.model(ids, None, positions, ForwardContext(self.backend, self.cache, metadata))
        last = torch.tensor(counts, device=self.device).cumsum(0) - 1
        return self.model.compute_logits(hidden[last])


def spec_of(name: str) -> ModelSpec:
    """What a config of this shape says."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(dict(COMMON, **SHAPES[name])))
        return read_model_spec(folder)


def unchecked(name: str, device: torch.device) -> tuple[Slice, dict[str, Any]]:
    """A slice to be timed alone: some seconds instead of ten to thirty."""
    spec = spec_of(name)
    ours = Slice(spec, torch.bfloat16, device, 20000)
    if spec.quantization is None:
        ours.draw()
        ours.model.finish()
    return ours, {"model": name, "layers": spec.num_layers, "ok": True, "checked": False}


def check(name: str, device: torch.device, *, narrow: int) -> tuple[Slice, dict[str, Any]]:
    """Compare a slice with its definition. Returns it for timing, and what was found."""
    spec = spec_of(name)
    num_blocks = 40 if narrow > 1 else 20000
    ours = Slice(spec, torch.float32 if narrow > 1 else torch.bfloat16, device, num_blocks)
    if spec.quantization is None:
        ours.draw()
        exact = Slice(spec, torch.float32, device, num_blocks=200)
        exact.take(ours)
        ours.model.finish(), exact.model.finish()
    else:  # as they were loaded; the definition reads what they mean, in numbers of 32 bits
        exact = Slice(msgspec.structs.replace(spec, quantization=None), torch.float32, device, num_blocks=200)
        if spec.mla is None:  # a CPU keeps other copies from then on; latent attention has its weights only then
            exact.take_meaning(ours)
        exact.model.finish()
        if spec.mla is not None:
            exact.take_meaning(ours)
    generator = torch.Generator().manual_seed(1)
    prompts = [max(4, n // narrow) for n in (40, 300, 23, 700)]  # halves are no decodes, which come first
    blocks = torch.randperm(200 if narrow == 1 else 40, generator=generator)
    per_row = len(blocks) // 4
    blocks = blocks.int().view(4, per_row)
    ids = [torch.randint(0, spec.vocab_size, (n + 3,), generator=generator).to(device) for n in prompts]
    plans = [([n // 2 for n in prompts], [n // 2 for n in prompts]), ([n - n // 2 for n in prompts], prompts)]
    plans += [([1] * 4, [n + step for n in prompts]) for step in (1, 2)]
    chosen: list[tuple[Tensor, Tensor]] = []
    got = []
    for counts, lengths in plans:
        step_ids = torch.cat([row[n - c : n] for row, c, n in zip(ids, counts, lengths, strict=True)])
        with remembered(chosen):
            got.append(ours.step(step_ids, counts, lengths, blocks))

    def by_definition(model: Slice) -> list[Tensor]:
        made = []
        with plain_torch(iter(chosen)):
            for counts, lengths in plans:
                step_ids = torch.cat([row[n - c : n] for row, c, n in zip(ids, counts, lengths, strict=True)])
                made.append(model.step(step_ids, counts, lengths, blocks))
        return made

    want = by_definition(exact)
    del exact

    def errors(found: list[Tensor]) -> list[float]:
        return [float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in zip(found, want, strict=True)]

    mine, plain = errors(got), errors(by_definition(ours))
    found = {
        "model": name, "layers": spec.num_layers, "worst_relative_error": max(mine), "plain_torch": max(plain),
        "by_step": mine, "ok": max(mine) < max(LEAST_BOUND, WORSE * max(plain)),
    }  # fmt: skip
    return ours, found


def time_decode(ours: Slice, num_rows: int, context: int) -> dict[str, Any]:
    """One decode step as a CUDA graph."""
    device, spec = ours.device, ours.spec
    per_row = -(-context // BLOCK)
    total = ours.cache.num_blocks
    blocks = (torch.arange(num_rows * per_row) % total).int().view(num_rows, per_row)
    metadata, positions = ours.metadata([1] * num_rows, [context] * num_rows, blocks)
    ids = torch.randint(0, spec.vocab_size, (num_rows,), device=device)
    ctx = ForwardContext(ours.backend, ours.cache, metadata)

    def run() -> None:
        ours.model(ids, None, positions, ctx)

    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run(), run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(20):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 20)
    seconds = sorted(times)[2] / 1000
    read = sum(p.nbytes for p in ours.model.layers.parameters())
    if spec.moe is not None:  # of the experts, those that are asked at all
        share = 1 - (1 - spec.moe.top_k / spec.moe.num_experts) ** num_rows
        experts = sum(p.nbytes for n, p in ours.model.layers.named_parameters() if ".experts." in n)
        read -= int(experts * (1 - share))
    width = 2 * spec.num_kv_heads * spec.head_size if spec.mla is None else spec.mla.kv_rank + spec.mla.rope_size
    seen = sum(min(context, spec.window_of(layer) or context) for layer in range(spec.num_layers))
    cached = num_rows * seen * width * torch.bfloat16.itemsize
    return {
        "rows": num_rows, "context": context, "step_ms": seconds * 1e3, "ms_a_layer": seconds * 1e3 / spec.num_layers,
        "tokens_a_second": num_rows / seconds, "weights": read / seconds / CARD_BYTES_A_SECOND,
        "limit": (read + cached) / seconds / CARD_BYTES_A_SECOND,
    }  # fmt: skip


def main() -> int:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*SHAPES, []], help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--narrow", type=int, default=1, help="divide widths, to try this script on a CPU")
    parser.add_argument("--no-check", action="store_true", help="only time decode steps")
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = torch.cuda.get_device_name(0) if on_gpu else "CPU"
    failed = []
    for name in args.models or SHAPES:
        if args.narrow > 1:
            SHAPES[name] = narrowed(SHAPES[name], args.narrow)
        started = time.perf_counter()
        try:
            ours, found = unchecked(name, device) if args.no_check else check(name, device, narrow=args.narrow)
        except Exception as error:  # the others are to be measured, too
            found = {"model": name, "error": f"{type(error).__name__}: {error}"[:500]}
            failed.append(name)
            print(json.dumps(found), flush=True)
            torch.cuda.empty_cache()
            if "CUDA" in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        found["machine"] = machine
        if not found["ok"]:
            failed.append(name)
        print(json.dumps(found), flush=True)
        rows = []
        for num_rows in args.rows if on_gpu else ():
            try:
                rows.append({"model": name, "machine": machine, **time_decode(ours, num_rows, args.context)})
            except RuntimeError as error:  # the other sizes are to be measured, too
                rows.append({"model": name, "rows": num_rows, "error": f"{type(error).__name__}: {error}"[:300]})
                failed.append(name)
            print(json.dumps(rows[-1]), flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in (*([] if args.no_check else [found]), *rows))
        print(f"# {name}: {time.perf_counter() - started:.1f} s", flush=True)
        del ours
        if on_gpu:
            torch.cuda.empty_cache()
    print(f"# failed: {', '.join(failed) or 'none'}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
