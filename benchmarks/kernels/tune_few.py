"""Steps of 2 to 16 rows on one card: norms between products, sizes of products and of attention, by a step's time.

    python benchmarks/kernels/tune_few.py --model 8b --out FILE

A step of six layers and a head as it is, with no launches for norms, and then greedily with what each product and
attention may take instead. Compiled in many processes before. Prints every try and writes the table that came out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_fp8 import Fp8Step
from bench_kernels import STEPS, Step, rand
from few_sizes import short
from timing import microseconds

from argosy.kernels import gemv, gemv_split, paged_attention, tuning
from argosy.kernels.norm_ahead import NormAhead

Sizes = dict[str, int]
LAYERS = 6
KEEP = 0.998  # of the time before, or a change is noise
CONTEXTS = (192, 320)  # decode rows of the benchmark go from 128 to 384
ATTENTION = (  # tokens of a tile, least piece, programs a multiprocessor, stages, warps, first tiles before the wait
    (128, 512, 1, 5, 4, 0), (128, 512, 1, 3, 8, 0), (64, 512, 1, 5, 4, 0), (64, 512, 1, 4, 8, 0), (64, 64, 4, 3, 2, 0),
    (128, 512, 1, 3, 8, 1), (128, 512, 1, 5, 8, 1), (128, 512, 1, 4, 4, 1), (64, 512, 1, 4, 8, 1),
    (64, 512, 1, 6, 8, 1), (64, 512, 1, 5, 4, 1), (64, 128, 4, 4, 8, 1), (64, 128, 4, 4, 4, 1), (128, 128, 2, 3, 8, 1),
    (64, 64, 4, 3, 4, 1), (32, 512, 1, 6, 4, 1),
)  # fmt: skip
FP8 = "8b-fp8"
PRODUCTS = {  # rows, width, stages, pieces of the inputs, first weights before the wait, early
    "8b": {
        "qkv": ((64, 128, 6, 1, 0, 0), (64, 128, 4, 1, 0, 0), (64, 128, 4, 1, 1, 0), (64, 128, 4, 1, 0, 1),
                (64, 128, 4, 1, 1, 1), (64, 256, 4, 1, 0, 0), (64, 64, 8, 1, 0, 1)),
        "o": ((64, 256, 4, 1, 0, 0), (64, 128, 4, 2, 0, 0), (64, 128, 4, 2, 1, 0), (64, 128, 4, 2, 0, 1),
              (64, 128, 4, 2, 1, 1), (64, 128, 6, 1, 0, 0)),
        "gate_up": ((128, 64, 5, 1, 0, 0), (128, 64, 5, 1, 0, 1), (128, 64, 4, 1, 0, 0), (128, 64, 4, 1, 0, 1),
                    (128, 128, 3, 1, 0, 0), (128, 64, 6, 1, 0, 0)),
        "down": ((64, 128, 6, 2, 0, 0), (64, 128, 4, 4, 0, 0), (64, 128, 4, 4, 0, 1), (64, 128, 4, 2, 0, 1),
                 (64, 128, 4, 2, 1, 1), (64, 64, 6, 4, 0, 0), (64, 128, 3, 4, 0, 0)),
        "head": ((128, 128, 4, 1, 0, 0),),
    },
    "06b": {
        "qkv": ((64, 128, 6, 1, 0, 0), (64, 128, 6, 1, 1, 0), (64, 128, 4, 2, 0, 0), (64, 128, 4, 2, 1, 0),
                (64, 256, 4, 1, 1, 0), (64, 128, 6, 1, 0, 1), (64, 128, 6, 1, 1, 1)),
        "o": ((64, 128, 6, 4, 0, 0), (64, 128, 4, 4, 1, 0), (64, 128, 6, 2, 1, 0), (64, 128, 4, 8, 1, 0),
              (64, 256, 2, 8, 1, 0), (64, 128, 6, 4, 0, 1)),
        "gate_up": ((64, 128, 6, 1, 0, 1), (64, 128, 6, 1, 0, 0), (64, 128, 6, 1, 1, 0), (64, 128, 6, 1, 1, 1),
                    (64, 256, 4, 1, 1, 0), (64, 128, 4, 2, 1, 0)),
        "down": ((64, 128, 6, 4, 0, 0), (64, 128, 6, 4, 1, 0), (64, 128, 4, 8, 1, 0), (64, 256, 3, 4, 1, 0),
                 (64, 128, 6, 4, 0, 1), (64, 128, 4, 8, 0, 0)),
        "head": ((128, 128, 4, 1, 0, 0), (128, 128, 3, 1, 0, 0), (64, 128, 4, 1, 0, 0)),
    },
    FP8: {},  # attention alone
}  # fmt: skip


def tries_of(model: str, name: str) -> Iterator[Sizes]:
    """What a product may take."""
    for height, width, stages, splits, first, early in PRODUCTS[model][name]:
        sizes = {"kernel": gemv.SPLIT, "rows": height, "width": width, "stages": stages, "warps": 4, "splits": splits,
                 "prefetch": 512, "first": first, "early": early, "library": 0}  # fmt: skip
        if name in ("o", "down"):
            yield {**sizes, "norm": 1}
        yield sizes


def attention_tries() -> Iterator[Sizes]:
    """What attention of a few rows may take."""
    for block_l, piece, per_sm, stages, warps, late in ATTENTION:
        yield {"block_l": block_l, "min_piece": piece, "per_sm": per_sm, "stages": stages, "warps": warps, "late": late}


def shapes_of(model: str) -> dict[str, tuple[int, int]]:
    """(inputs, weight rows) of each product."""
    hidden, _, heads, kv_heads, wide, vocabulary, _ = STEPS[model.partition("-")[0]]
    return {"qkv": (hidden, (heads + 2 * kv_heads) * 128), "o": (heads * 128, hidden), "gate_up": (hidden, 2 * wide),
            "down": (wide, hidden), "head": (hidden, vocabulary)}  # fmt: skip


def compile_part(index: int, of: int, model: str, rows: int, *, only: bool) -> None:
    """Every kernel that will be timed, run once; this process does each `of`-th."""
    hidden, _, heads, kv_heads, _, _, qk_norm = STEPS[model.partition("-")[0]]
    norm, x = rand(hidden), rand(rows, hidden)
    squares = torch.ones(-(-hidden // 64), gemv_split.tile_of(rows), device="cuda")
    calls = []
    for name, (num_in, num_out) in shapes_of(model).items():
        for sizes in () if only else tries_of(model, name):
            if name in ("o", "down") and "norm" not in sizes:
                continue  # both are compiled with the other
            calls.append(lambda a=(name, num_in, num_out, sizes): product(*a))
    for sizes in attention_tries():
        calls.append(lambda s=sizes: attend(s))

    def product(name: str, num_in: int, num_out: int, sizes: Sizes) -> None:
        weight, linear = torch.zeros(num_out, num_in, device="cuda", dtype=torch.bfloat16), gemv.fused_linear
        if name in ("o", "down"):
            ahead = gemv_split.ahead_for(x, norm, 1e-6, sizes)
            linear(rand(rows, num_in), weight, residual_TO=x, sizes=sizes)
            linear(rand(rows, num_in), weight, residual_TO=x, ahead=ahead, sizes=sizes)
        elif name == "head":
            linear(x, weight, sizes=sizes)
        else:
            normed = NormAhead(x, squares, norm, 1e-6)
            linear(x, weight, normed=normed, gated=name == "gate_up", sizes=sizes)

    def attend(sizes: Sizes) -> None:
        caches = [rand(rows * 32, 16, kv_heads, 128) for _ in range(2)]
        blocks = torch.arange(rows * 32, device="cuda").view(rows, 32).int()
        lengths = torch.full((rows,), 100, device="cuda", dtype=torch.int32)
        more = {"q_norm_weight_H": rand(128), "k_norm_weight_H": rand(128)} if qk_norm else {}
        paged_attention.decode_attention(
            rand(rows, (heads + 2 * kv_heads) * 128), lengths.long(), torch.zeros(8192, 128, device="cuda"), *caches,
            lengths.long(), blocks, lengths, num_heads=heads, scale=0.1, max_context=8192, inputs_early=True,
            sizes=sizes, **more,
        )  # fmt: skip

    for number, call in enumerate(calls):
        if number % of == index:
            try:
                call()
            except Exception as error:  # too large a program
                print("skipped", number, str(error)[:80], flush=True)
    torch.cuda.synchronize()


class Chain:
    """A step, timed at several lengths of context."""

    def __init__(self, model: str, rows: int):
        hidden, _, *rest = STEPS[model.partition("-")[0]]
        self.step: Any = (Fp8Step if model == FP8 else Step)(hidden, LAYERS, *rest)
        self.runs = [self.step.of(rows, context) for context in CONTEXTS]
        self.use(new=False)

    def use(self, *, new: bool) -> None:
        """With norms as the sizes say, or with launches for them."""
        self.step.norms_ahead = new

    def times(self) -> list[float]:
        return [microseconds([run], launches=1, replays=15)[0] for run in self.runs]


def main() -> int:
    """Compile, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRODUCTS), default="8b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--out", required=True, help="the table to read and write")
    parser.add_argument("--seconds", type=float, default=60, help="what is not tried by then is left")
    parser.add_argument("--attention", action="store_true", help="nothing but attention, products as they are")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    args = parser.parse_args()
    args.attention |= args.model == FP8
    if args.compile_part:
        index, of = map(int, args.compile_part.split("/"))
        compile_part(index, of, args.model, args.rows, only=args.attention)
        return 0
    began, workers = time.perf_counter(), min(20, os.cpu_count() or 1)
    others = [subprocess.Popen([sys.executable, *sys.argv, "--compile-part", f"{i}/{workers}"]) for i in range(workers)]
    table = json.loads(Path(args.out).read_text())
    tuning.pick = lambda kernel, key, device: table.get(kernel, {}).get(key)  # type: ignore[assignment]
    chain = Chain(args.model, args.rows)
    for other in others:
        other.wait()
    print(f"compiled after {time.perf_counter() - began:.1f} s", flush=True)
    for rows in sorted({1, args.rows}):
        lines(f"{rows} rows as they are", chain.step.of(rows, CONTEXTS[-1]))
    print(f"as it is, contexts {CONTEXTS}: {chain.times()}", flush=True)
    bucket = 1 if args.rows == 1 else 16
    _, _, heads, kv_heads, *_ = STEPS[args.model.partition("-")[0]]
    kind = f"h128_some_g{heads // kv_heads}" if args.rows > 4 else "h128_few"
    slots = [(table["paged_attention"], kind, "attention", list(attention_tries()))]
    starts = [{}] if args.attention else [{}, {"new": 1}, {"new": 1, "early": 1}]
    for name in () if args.attention else ("down", "o", "gate_up", "qkv", *(["head"] if args.rows > 1 else [])):
        num_in, num_out = shapes_of(args.model)[name]
        slots.append((table["gemv"], f"{num_in}x{num_out}x{bucket}", name, list(tries_of(args.model, name))))
    begin, best, best_table = json.dumps(table), float("inf"), ""
    chain.use(new=True)
    for number, start in enumerate(starts):
        for part, entries in json.loads(begin).items():
            table[part].clear()
            table[part].update(entries)
        if start.get("new"):  # norms with the products, by the first sizes of each, or the first that end early
            for entries, key, name, tries in slots[1:]:
                if name != "head":
                    entries[key] = next((t for t in tries if t["early"] == start.get("early", 0)), tries[0])
            check(chain)
        now = sum(chain.times())
        until = began + args.seconds - (args.seconds - 25) / len(starts) * (len(starts) - 1 - number)
        print(f"start {number}: {now:.1f} of both", flush=True)
        improve(chain, slots, now, until)
        if sum(chain.times()) < best:
            best, best_table = sum(chain.times()), json.dumps(table, indent=1, sort_keys=True)
            Path(args.out).write_text(best_table + "\n")
        print(f"start {number} came to {chain.times()}", flush=True)
        for entries, key, name, _ in slots:
            print(f"    {name} {short(entries.get(key, {}))}", flush=True)
        lines(f"{args.rows} rows, start {number}", chain.runs[-1])
    print(f"{args.model} {args.rows} rows: {best:.1f} of both; {time.perf_counter() - began:.1f} s", flush=True)
    return 0


Slot = tuple[dict[str, Sizes], str, str, list[Sizes]]  # where its sizes stand, under which key, its name, what to try


def improve(chain: "Chain", slots: list[Slot], now: float, until: float) -> None:
    """Change one thing at a time while that helps; what looks better is looked at twice."""
    changed = True
    while changed and time.perf_counter() < until:
        changed = False
        for entries, key, name, tries in slots:
            for sizes in tries:
                if time.perf_counter() > until or entries.get(key) == sizes:
                    continue
                old = entries.get(key)
                entries[key] = sizes
                try:
                    times = chain.times()
                    kept = sum(times) < now * KEEP
                    again = sum(chain.times()) if kept else 0.0
                    kept = kept and again < now * KEEP
                except Exception as error:  # too large a program
                    print(f"    {name} {short(sizes)} {str(error)[:80]}", flush=True)
                    times, kept, again = [1e9], False, 0.0
                told = " ".join(f"{t:.1f}" for t in times)
                print(f"    {name} {told} {short(sizes)}{' kept' if kept else ''}", flush=True)
                if kept:
                    now, changed = max(sum(times), again), True
                elif old is None:
                    del entries[key]
                else:
                    entries[key] = old


def lines(title: str, run: Callable[[], object]) -> None:
    """Where a layer's time goes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
    from profile_step import timeline

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    print(title, flush=True)
    try:
        timeline(graph.replay)
    except StopIteration:
        print("    no layers were found in it", flush=True)


def check(chain: Chain) -> None:
    """The same tokens, but for ties, with and without launches for the norms."""
    found = []
    for new in (False, True):
        chain.use(new=new)
        found.append(chain.runs[0]())
    print(f"tokens alike: {(found[0] == found[1]).float().mean():.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
