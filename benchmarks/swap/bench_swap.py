"""Four times more KV than the device holds: swapped to host memory, computed anew (the default), or with room for all.

    python benchmarks/swap/bench_swap.py --model 8b                                     one H200
    python benchmarks/swap/bench_swap.py --model tiny --device-tokens 2048 --sessions 16 --history 480 --rows 48

Two loads. `sessions`: each keeps asking, with all that was said so far, a few new tokens, and gets a short answer, as
an agent or a chat does; the first turn is the same everywhere and is left out. `answers`: all requests come at once and
grow until they no longer fit, so that the youngest have to make room. In both, what all of them need together at the
end is `--oversubscribed` times what the device has room for. All modes serve the same requests with the same settings
but for the two that say how much memory there is. Greedy; the answers of the modes are compared.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

from argosy.cluster.protocol.sampling import SamplingParams
from argosy.deploy import bench, bench_models, launch
from argosy.deploy.gateway import Gateway
from argosy.deploy.offline import LLM

BLOCK = 16
MODES = ("recompute", "swap", "room", "room_and_swap")


class Answer(NamedTuple):
    """What one request saw, in seconds from when it was sent."""

    token_ids: list[int]
    num_cached: int
    first_seconds: float
    last_seconds: float


async def ask(gateway: Gateway, prompt: list[int], num_tokens: int) -> Answer:
    """One request, greedy and exactly so long."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens, detokenize=False)
    started, first, last, cached, token_ids = time.perf_counter(), 0.0, 0.0, 0, list[int]()
    async with aclosing(gateway.stream(await gateway.prepare(prompt, params))) as batches:
        async for batch in batches:
            last = time.perf_counter() - started
            first = first or last
            for delta in batch:
                token_ids += delta.token_ids
                cached = delta.num_cached_tokens if delta.num_cached_tokens is not None else cached
    return Answer(token_ids, cached, first, last)


def draw(seed: int, count: int, vocab: int) -> list[int]:
    """Token ids that nobody else has."""
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


def sessions(args: argparse.Namespace, vocab: int, salt: int = 0) -> Any:
    """The work of all sessions: one turn after the other, all sessions at once."""

    async def work(gateway: Gateway) -> dict[str, Any]:
        turns: list[tuple[int, Answer, int]] = []  # turn, what it saw, tokens computed before and again
        moments: list[float] = []
        said: dict[int, list[int]] = {}
        story: list[tuple[int, int, float, float, float]] = []  # session, turn, when sent, first and last token after
        barrier = asyncio.Barrier(args.sessions)

        async def session(number: int) -> None:
            history = draw(number + salt, args.history, vocab)
            for turn in range(args.turns):
                if turn == 1:
                    await barrier.wait()  # everybody has had the first turn: from here on it is measured
                    moments.append(time.perf_counter())
                known = len(history) - 1 if turn else 0
                history += draw(1000 * number + turn + 1 + salt, args.question, vocab)
                sent = time.perf_counter()
                answer = await ask(gateway, history, args.answer)
                story.append((number, turn, sent, answer.first_seconds, answer.last_seconds))
                turns.append((turn, answer, max(0, known - answer.num_cached) if turn else 0))
                history += answer.token_ids
            said[number] = history

        async with asyncio.TaskGroup() as tasks:
            for number in range(args.sessions):
                tasks.create_task(session(number))
        seconds = time.perf_counter() - min(moments)
        later = [(answer, again) for turn, answer, again in turns if turn]
        return {
            **figures([answer for answer, _ in later], seconds),
            "turns_per_second": round(len(later) / seconds, 3),
            "computed_again": sum(again for _, again in later),
            "known_tokens": sum(max(0, args.history - 1) for _ in later),
            "said": [said[number] for number in sorted(said)],
            "story": [[number, turn, *(round(1e3 * at, 1) for at in (sent - min(moments), first, last))]
                      for number, turn, sent, first, last in story],
        }  # fmt: skip

    return work


def answers(args: argparse.Namespace, vocab: int, salt: int = 77_000) -> Any:
    """Long answers to short prompts, all at once."""

    async def work(gateway: Gateway) -> dict[str, Any]:
        started = time.perf_counter()
        prompts = [draw(salt + number, args.prompt, vocab) for number in range(args.rows)]
        got = await asyncio.gather(*(ask(gateway, prompt, args.long_answer) for prompt in prompts))
        seconds = time.perf_counter() - started
        return {**figures(got, seconds), "said": [answer.token_ids for answer in got]}

    return work


def idle(args: argparse.Namespace, vocab: int) -> Any:
    """Answers for which there is room, one crowd after the other: from the second on each takes the place of cached
    content, which a host tier copies out. The first run warms up; the median of the others counts. (Rows times tokens
    must fit `--device-tokens`, or only the modes with room have no pressure.)"""
    crowd = argparse.Namespace(**{**vars(args), "rows": args.idle_rows})

    async def work(gateway: Gateway) -> dict[str, Any]:
        runs = [await answers(crowd, vocab, 100_000 * repeat)(gateway) for repeat in range(args.idle_repeats + 1)]
        rates = sorted(run["tokens_per_second"] for run in runs[1:])
        return {**runs[-1], "tokens_per_second": statistics.median(rates), "spread": [rates[0], rates[-1]]}

    return work


def figures(got: list[Answer], seconds: float) -> dict[str, Any]:
    """Rates, and what clients waited."""
    first = sorted(answer.first_seconds for answer in got)
    gaps = [(a.last_seconds - a.first_seconds) / max(1, len(a.token_ids) - 1) for a in got]
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(len(answer.token_ids) for answer in got) / seconds, 2),
        "ttft_p50_ms": round(1e3 * statistics.median(first), 1),
        "ttft_p99_ms": round(1e3 * first[min(len(first) - 1, int(0.99 * len(first)))], 1),
        "ms_per_token_p50": round(1e3 * statistics.median(gaps), 2),
    }


def run(mode: str, args: argparse.Namespace, loads: dict[str, Any]) -> list[dict[str, Any]]:
    """An engine for the mode, all loads on it."""
    with tempfile.TemporaryDirectory(prefix="argosy-swap-") as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        tokens = int(args.device_tokens * (args.oversubscribed + 1 if mode.startswith("room") else 1))
        if args.trace:
            os.environ["ARGOSY_TRACE"] = f"{args.trace}.{mode}"
            defaults: Any = launch.launch_engine.__kwdefaults__
            defaults["rank_module"] = "traced_rank"
        began = time.perf_counter()
        with LLM(
            str(folder), **options, distributed_executor_backend="local", block_size=BLOCK,
            num_gpu_blocks_override=tokens // BLOCK, max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens, max_model_len=args.max_model_len,
            tensor_parallel_size=args.tensor_parallel_size, swap_space=args.swap_space if "swap" in mode else 0,
            cpu_threads=args.cpu_threads,
        ) as llm:  # fmt: skip
            print(f"{mode}: ready after {time.perf_counter() - began:.1f} s", flush=True)
            rows = []
            for name, work in loads.items():
                if name == "idle" or mode != "room_and_swap":
                    rows.append(measure(llm, mode, name, work, args))
        return rows


def measure(llm: LLM, mode: str, name: str, work: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One load on an engine whose cache is empty."""
    llm.run(lambda gateway: warm_up(gateway, args))
    if name == "sessions":  # what is compiled when it is first used, must be: a mode that runs first would pay for all
        few = {**vars(args), "sessions": 2 + args.device_tokens // args.history, "turns": 2}
        llm.run(sessions(argparse.Namespace(**few), 4000, salt=500_000))
    llm.reset_prefix_cache()
    before = {metric.name: metric.value for metric in llm.get_metrics()}
    found = llm.run(work)
    after = {metric.name: metric.value - before.get(metric.name, 0.0) for metric in llm.get_metrics()}
    out_seconds, in_seconds = (after[f'argosy_swap_seconds_total{{direction="{way}"}}'] for way in ("out", "in"))
    out_bytes, in_bytes = (after[f'argosy_swap_bytes_total{{direction="{way}"}}'] for way in ("out", "in"))
    row = {
        "load": name, "mode": mode, **found,
        "preemptions": int(after["argosy_preemptions_total"]),
        "tokens_recomputed": int(after["argosy_tokens_recomputed_total"]),
        "host_hits": int(after["argosy_host_tier_hits_total"]),
        "out_gib": round(out_bytes / 2**30, 3), "in_gib": round(in_bytes / 2**30, 3),
        "out_gbytes_per_second": round(out_bytes / out_seconds / 1e9, 2) if out_seconds else None,
        "in_gbytes_per_second": round(in_bytes / in_seconds / 1e9, 2) if in_seconds else None,
    }  # fmt: skip
    print(json.dumps({key: value for key, value in row.items() if key not in ("said", "story")}), flush=True)
    return row


def warm_up(gateway: Gateway, args: argparse.Namespace) -> Coroutine[Any, Any, Any]:
    """A few requests of the same shape."""

    async def work() -> None:
        await asyncio.gather(*(ask(gateway, [7] * (50 + number), 8) for number in range(4)))

    return work()


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the aims of the issue come to."""
    found = []
    for load in ("sessions", "answers"):
        by_mode = {row["mode"]: row for row in rows if row["load"] == load}
        if not {"recompute", "swap"} <= by_mode.keys():
            continue
        swap, again = by_mode["swap"], by_mode["recompute"]
        same = [a == b for a, b in zip(swap["said"], again["said"], strict=True)]
        found.append({
            "load": load, "summary": "swap against recompute",
            "throughput": round(swap["tokens_per_second"] / again["tokens_per_second"], 3),
            "ttft_p99": round(swap["ttft_p99_ms"] / again["ttft_p99_ms"], 3),
            "tokens_recomputed": [again["tokens_recomputed"], swap["tokens_recomputed"]],
            "computed_again": [again.get("computed_again"), swap.get("computed_again")],
            "same_answers": f"{sum(same)} of {len(same)}",
        })  # fmt: skip
    rates = {row["mode"]: row["tokens_per_second"] for row in rows if row["load"] == "idle"}
    for plain, swap_mode in (("room", "room_and_swap"), ("recompute", "swap")):
        if {plain, swap_mode} <= rates.keys():
            found.append({"load": "idle", "summary": f"cost without pressure, {swap_mode}",
                          "slower": round(1 - rates[swap_mode] / rates[plain], 4)})  # fmt: skip
    return found


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a shape of argosy bench, or a folder")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--loads", nargs="+", choices=("sessions", "answers", "idle"), default=["sessions", "answers"])
    parser.add_argument("--device-tokens", type=int, default=32768, help="that the device's blocks hold")
    parser.add_argument("--oversubscribed", type=float, default=4.0)
    parser.add_argument("--swap-space", default="auto")
    parser.add_argument("--sessions", type=int, default=28)
    parser.add_argument("--history", type=int, default=4096, help="tokens of the first prompt")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--question", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rows", type=int, default=170, help="of the load `answers`")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--long-answer", type=int, default=512)
    parser.add_argument("--idle-rows", type=int, default=64)
    parser.add_argument("--idle-repeats", type=int, default=5)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--cpu-threads", type=int)
    parser.add_argument(
        "--trace", help="write each step to this file and the mode's name (needs benchmarks/gpu on the path)"
    )
    parser.add_argument("--requests", help="append what each request of `sessions` saw to this file")
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    about = {key: value for key, value in bench.describe_machine().items() if key != "cores"}
    vocab = 4000
    longest = args.history + args.turns * (args.question + args.answer)
    print(f"sessions need {args.sessions * longest / args.device_tokens:.2f} x the device's tokens, "
          f"answers {args.rows * (args.prompt + args.long_answer) / args.device_tokens:.2f} x", flush=True)  # fmt: skip
    every = {"sessions": sessions(args, vocab), "answers": answers(args, vocab), "idle": idle(args, vocab)}
    loads = {name: every[name] for name in args.loads}
    rows = [row for mode in args.modes for row in run(mode, args, loads)]
    for row in [*rows, *summarise(rows)]:
        row = {"benchmark": "swap", "model": args.model, **row, **about}
        row.pop("said", None)
        if (story := row.pop("story", None)) and args.requests:
            with open(args.requests, "a", encoding="utf-8") as file:
                file.write(json.dumps({"mode": row["mode"], "story": story}) + "\n")
        if "summary" in row:
            print(json.dumps(row), flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
