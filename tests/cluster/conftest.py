"""A driver on simulated ranks in virtual time, and what its requests must give whatever happens to them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argosy.cluster.clock import ManualClock
from argosy.cluster.driver import Driver
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.messages import GenerateRequest, TokenDelta
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.cluster.simulation import SimulatedExecutor, Simulation, hash_token

sys.path.insert(0, str(Path(__file__).parent))
VOCAB_SIZE = 101


class World(Simulation):
    """One replica with one edge. Settings are given by their flat names."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        step_seconds: float = 0.01,
        late_answers: bool = False,
        fails: Callable[[], bool] = lambda: False,
        windows: tuple[int, ...] = (0,),
        swap: SwapCosts = NO_SWAP,
        swap_lag: int = 0,
        **settings: Any,
    ) -> None:
        given = {"model": "m", "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **settings}
        self.config = ServingConfig.from_mapping(given)
        self.clock, self.metrics = ManualClock(), Metrics()
        draw = hash_token(VOCAB_SIZE)
        executor = SimulatedExecutor(
            self.config,
            self.clock,
            num_blocks=num_blocks,
            step_seconds=step_seconds,
            next_token=lambda token_ids, params: -1 if fails() else draw(token_ids, params),
            late_answers=late_answers,
            windows=windows,
            swap=swap,
            swap_lag=swap_lag,
        )
        self.groups = KVGroups(windows)
        executor.keeps_outputs = True
        super().__init__(Driver(self.config, executor, self.clock, self.metrics), executor)
        self.sent: dict[int, GenerateRequest] = {}

    def ready(self) -> "World":
        """Start, and wait for the ranks."""
        self.driver.start()
        self.round()
        return self

    def ask(self, prompt: list[int], *, max_tokens: int = 8, **fields: Any) -> int:
        """Send a request; its stream id. Names of `GenerateRequest` and of `TokenParams` are both understood."""
        stream_id = len(self.sent)
        own = {name: fields.pop(name) for name in tuple(fields) if name in GenerateRequest.__struct_fields__}
        params = TokenParams(max_tokens=max_tokens, **{"seed": stream_id, **fields})
        message = GenerateRequest(
            stream_id=stream_id, request_id=f"{stream_id:032x}", prompt_token_ids=prompt, params=params, **own
        )
        self.sent[stream_id] = message
        self.send(message)
        self.collect()
        return stream_id

    def expected(self, stream_id: int, index: int = 0) -> tuple[list[int], FinishReason]:
        """What an undisturbed run gives."""
        message = self.sent[stream_id]
        params = message.params
        draw, seed = hash_token(VOCAB_SIZE), params.seed + index
        token_ids, answer = list(message.prompt_token_ids), list[int]()
        longest = min(params.max_tokens, self.driver.info.max_model_len - len(token_ids))
        capacity = self.groups.num_tokens(self.executor.num_blocks, self.config.cache.block_size)
        longest = longest if capacity is None else min(longest, capacity - len(token_ids))
        while True:
            sampled = TokenParams(max_tokens=1, seed=seed, temperature=params.temperature)
            token_id = draw(token_ids, sampled)
            token_ids.append(token_id)
            answer.append(token_id)
            if len(answer) >= params.min_tokens and token_id in (*params.eos_token_ids, *params.stop_token_ids):
                return answer, FinishReason.STOP
            if len(answer) >= longest:
                return answer, FinishReason.LENGTH

    def ends(self, stream_id: int, index: int = 0) -> list[TokenDelta]:
        """All final words on an answer; there must be exactly one in the end."""
        return [delta for delta in self.deltas.get((stream_id, index), ()) if delta.finish_reason is not None]

    def assert_exact(self, stream_id: int, index: int = 0) -> None:
        """The answer is that of an undisturbed run, to the token."""
        answer, reason = self.expected(stream_id, index)
        assert self.tokens(stream_id, index) == answer, (stream_id, index)
        assert [end.finish_reason for end in self.ends(stream_id, index)] == [reason]


@pytest.fixture
def world() -> Callable[..., World]:
    """Makes a `World` whose ranks are ready."""

    def make(**settings: Any) -> World:
        return World(**settings).ready()

    return make


@pytest.fixture
def unstarted_world() -> Callable[..., World]:
    """Makes a `World` that nobody has started yet."""
    return World
