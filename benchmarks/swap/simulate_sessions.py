"""The loads of `bench_swap.py` in virtual time: the real scheduler and both tiers against the prices of an H200.

    python benchmarks/swap/simulate_sessions.py                                  # 8B, 28 sessions of 4096 tokens
    python benchmarks/swap/simulate_sessions.py --device-tokens 65536 --sessions 34 --history 7168 --turns 3
    python benchmarks/swap/simulate_sessions.py --load fresh                     # prompts that never repeat
    python benchmarks/swap/simulate_sessions.py --load shared                    # prompts with few shared beginnings

Says of each mode what clients saw, what was copied, and in which state a request spends the time before its first
token: waiting for room, its blocks on their way in, or computing. No GPU; seconds on any machine.
"""

import argparse
import heapq
import itertools
import json
import random
import statistics
from collections.abc import Iterator
from typing import Any

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.cluster.request import Request, RequestStatus, make_requests
from argosy.cluster.simulated_replica import SimulatedReplica, StepSize

BLOCK, BLOCK_BYTES = 16, 2 * 2**20
LINK = 51e9  # bytes a second, each way, as orders reached it in such a run
PREFILL = 21.5e-6  # seconds a token of a long prompt
EAGER = 8e-3
RECORDED_TOKENS = 256  # of a step with prompts that is recorded, beside up to 64 rows
RECORDED, PAIR = 1.2e-3, 9e-9  # what such a step takes beyond one of its rows alone, and for each pair of tokens


def step_seconds(size: StepSize) -> list[float]:
    """An 8B model in 16 bits on one H200: weights, what is looked back on, and prompts.

    A step with more prompt than is recorded is launched kernel by kernel: 7 to 11 ms more, by what each of 7 rows'
    tokens took there.
    """
    seconds = 4.5e-3 + size.context_tokens * 131_072 / 4.4e12
    if not size.prefill_tokens:
        return [seconds]
    if size.num_decodes + size.prefill_tokens <= RECORDED_TOKENS and size.num_decodes <= 64:
        return [seconds + RECORDED + size.prefill_pairs * PAIR]
    return [seconds + EAGER + size.prefill_tokens * PREFILL]


class Clients:
    """Requests that come when others end: whoever reads the ends from `run` sends what comes next, and when."""

    def __init__(self, replica: SimulatedReplica):
        self.replica, self._count = replica, itertools.count()
        self._coming: list[tuple[float, int, list[int], int]] = []
        self.alive: list[Request] = []
        self.states: dict[int, dict[str, float]] = {}
        self.ends: list[tuple[float, Request]] = []
        self.now = 0.0

    def send(self, when: float, prompt: list[int], num_tokens: int) -> int:
        """A request at that time; its number."""
        number = next(self._count)
        heapq.heappush(self._coming, (when, number, prompt, num_tokens))
        return number

    def run(self) -> Iterator[Request]:
        """Each request that ends; whoever reads may send others. Until nothing is left."""
        replica = self.replica
        while self._coming or replica.next_seconds < float("inf"):
            when = self._coming[0][0] if self._coming else float("inf")
            if when <= replica.next_seconds:
                _, number, prompt, num_tokens = heapq.heappop(self._coming)
                self._pass(when)
                message = GenerateRequest(stream_id=number, request_id=str(number), prompt_token_ids=prompt,
                                          params=TokenParams(max_tokens=num_tokens, temperature=0.0))  # fmt: skip
                (request,) = make_requests(message, arrival=number, now=when, max_len=1 << 20, deltas=[])
                self.alive.append(request)
                self.states[number] = {"waiting": 0.0, "loading": 0.0, "computing": 0.0}
                replica.add(request, when)
                continue
            self._pass(replica.next_seconds)
            ended = replica.advance()
            for request in ended:
                self.alive.remove(request)
                self.ends.append((self.now, request))
                yield request

    def _pass(self, when: float) -> None:
        seconds, self.now = when - self.now, when
        for request in self.alive:
            if request.first_token_seconds < 0:
                state = {RequestStatus.WAITING: "waiting", RequestStatus.LOADING: "loading"}
                self.states[request.stream_id][state.get(request.status, "computing")] += seconds


def sessions(args: argparse.Namespace, clients: Clients) -> list[Request]:
    """As in `bench_swap.py`: the requests of all turns but the first, which everybody has had when they begin."""
    rng = random.Random(1)
    turn_of: dict[int, tuple[int, int]] = {}
    waiting, measured = [], []
    for session in range(args.sessions):
        prompt = [rng.randrange(1 << 30) for _ in range(args.history + args.question)]
        turn_of[clients.send(0.0, prompt, args.answer)] = (session, 0)
    for request in clients.run():
        session, turn = turn_of[request.stream_id]
        if turn:
            measured.append(request)
        else:
            waiting.append((session, request))
        ready = waiting if len(waiting) == args.sessions else [] if not turn else [(session, request)]
        if turn + 1 < args.turns:
            for number, before in ready:
                prompt = [*before.token_ids, *(rng.randrange(1 << 30) for _ in range(args.question))]
                turn_of[clients.send(clients.now, prompt, args.answer)] = (number, turn + 1)
        if ready is waiting:
            waiting = []
    return measured


def prompts(args: argparse.Namespace, clients: Clients) -> list[Request]:
    """Poisson arrivals; `shared`: prompts begin with one of so many beginnings, some asked for far more than others."""
    rng = random.Random(2)
    beginnings = [[rng.randrange(1 << 30) for _ in range(args.prefix_len)] for _ in range(args.prefixes)]
    weights = [1.0 / (place + 1) for place in range(args.prefixes)]
    now = 0.0
    for _ in range(args.requests):
        now += rng.expovariate(args.rate)
        is_shared = args.load == "shared" and rng.random() < args.share
        head = rng.choices(beginnings, weights)[0] if is_shared else []
        prompt = [*head, *(rng.randrange(1 << 30) for _ in range(args.input - len(head)))]
        clients.send(now, prompt, args.answer)
    return list(clients.run())


def measure(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One mode of memory under the load."""
    config = ServingConfig.from_mapping(
        {"model": "8b", "block_size": BLOCK, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
    )
    seconds = BLOCK_BYTES / LINK
    host = SwapCosts(int(args.host_gib * 2**30 / BLOCK_BYTES), BLOCK_BYTES, seconds, seconds, PREFILL)
    replica = SimulatedReplica(0, config, args.device_tokens // BLOCK, step_seconds, leaps=False,
                               swap=host if mode == "swap" else NO_SWAP)  # fmt: skip
    clients = Clients(replica)
    measured = (sessions if args.load == "sessions" else prompts)(args, clients)
    first = sorted(request.first_token_seconds - request.arrival_seconds for request in measured)
    begun = min(request.arrival_seconds for request in measured)
    gaps = [
        (when - request.first_token_seconds) / max(1, request.num_output_tokens - 1)
        for when, request in clients.ends if request in measured
    ]  # fmt: skip
    metrics = replica.metrics
    states = [clients.states[request.stream_id] for request in measured]
    row = {
        "load": args.load, "mode": mode, "seconds": round(clients.now - begun, 3),
        "tokens_per_second": round(sum(one.num_output_tokens for one in measured) / (clients.now - begun), 1),
        "ttft_p50_ms": round(1e3 * statistics.median(first), 1),
        "ttft_p99_ms": round(1e3 * first[min(len(first) - 1, int(0.99 * len(first)))], 1),
        "ms_per_token_p50": round(1e3 * statistics.median(gaps), 2),
        **{f"{name}_ms": round(1e3 * statistics.mean(state[name] for state in states), 1) for name in states[0]},
        "cached_tokens": metrics.cached_tokens, "host_hits": metrics.host_hits,
        "blocks_out": metrics.swap_blocks["out"], "blocks_in": metrics.swap_blocks["in"],
        "tokens_recomputed": metrics.tokens_recomputed,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def main() -> int:
    """Both modes, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=("sessions", "fresh", "shared"), default="sessions")
    parser.add_argument("--device-tokens", type=int, default=32768)
    parser.add_argument("--host-gib", type=float, default=40.0)
    parser.add_argument("--sessions", type=int, default=28)
    parser.add_argument("--history", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--question", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=15.0)
    parser.add_argument("--input", type=int, default=2048)
    parser.add_argument("--prefixes", type=int, default=60)
    parser.add_argument("--prefix-len", type=int, default=1536)
    parser.add_argument("--share", type=float, default=0.7)
    args = parser.parse_args()
    again, swap = (measure(mode, args) for mode in ("recompute", "swap"))
    print(json.dumps({
        "load": args.load, "summary": "swap against recompute",
        "throughput": round(swap["tokens_per_second"] / again["tokens_per_second"], 3),
        "ttft_p99": round(swap["ttft_p99_ms"] / again["ttft_p99_ms"], 3),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
