"""A scheduler that is driven step by step, by hand: for the files of tests that do so."""

from typing import Any

from argosy.cluster.clock import ManualClock
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import GenerateRequest, ModelRunnerOutput, SchedulerOutput, TokenDelta
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import Request, make_requests
from argosy.cluster.scheduler import Scheduler


class Desk:
    """A scheduler, and who asks it."""

    def __init__(self, *, num_blocks: int = 64, **settings: Any):
        given = {"model": "m", "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, "watermark": 0.0}
        self.metrics, self.deltas = Metrics(), list[TokenDelta]()
        self.scheduler = Scheduler(ServingConfig.from_mapping({**given, **settings}), ManualClock(), self.metrics)
        self.scheduler.begin_epoch(0, num_blocks)
        self._arrivals = 0

    def add(self, num_prompt: int, *, max_tokens: int = 20, n: int = 1, priority: int = 0, **params: Any) -> Request:
        """A request with a prompt of its own; the first of its answers."""
        self._arrivals += 1
        message = GenerateRequest(
            stream_id=self._arrivals,
            request_id=str(self._arrivals),
            prompt_token_ids=[self._arrivals * 100 + place for place in range(num_prompt)],
            params=TokenParams(max_tokens=max_tokens, **params),
            n=n,
            priority=priority,
        )
        requests = make_requests(message, arrival=self._arrivals, now=0.0, max_len=10_000, deltas=self.deltas)
        self.scheduler.add(requests)
        return requests[0]

    def schedule(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        assert output is not None
        return output

    def answer(self, output: SchedulerOutput, *token_ids: int, **fields: Any) -> None:
        num_sampled = len(output.rows) - len(output.partial)
        given = list(token_ids) or [9] * num_sampled
        self.scheduler.update(ModelRunnerOutput(step_id=output.step_id, epoch=output.epoch, token_ids=given, **fields))
        self.scheduler.check()

    def step(self, *token_ids: int) -> SchedulerOutput:
        output = self.schedule()
        self.answer(output, *token_ids)
        return output
