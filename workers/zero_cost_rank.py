"""A rank whose model costs nothing: the real messages, no tensors, tokens that follow from position alone.

It stands in for a worker where the control path is measured and where the life of a group is tested. Runs as
`python -m argosy.workers.zero_cost_rank` with the same JSON on its input as `worker_main`.

The token after position p of a request whose prompt starts with token t is `(t + p) % 997`: whatever loses, repeats
or mixes up positions shows at once.
"""

import os
import sys
from typing import Any

import msgspec

from argosy.cluster.protocol.channel import Channel
from argosy.cluster.protocol.errors import ChannelClosed
from argosy.cluster.protocol.messages import (
    AllocateCache,
    Hello,
    ModelRunnerOutput,
    Ping,
    Pong,
    SchedulerOutput,
    StartWorker,
    StopWorker,
    ToRank,
    WorkerProgress,
    WorkerReady,
    WorkerReport,
)
from argosy.placement.plan import RankInfo

MODULUS = 997
NUM_BLOCKS = 4096
FIXED_TOKENS = "ARGOSY_FIXED_TOKENS"  # in the environment: every token is 7, so that not even counting costs anything


def expected_token(first_token: int, num_tokens: int) -> int:
    """What follows `num_tokens` tokens of a request whose prompt starts with `first_token`."""
    return (first_token + num_tokens) % MODULUS


class ZeroCostRank:
    """Remembers of each request its first token and how far it is."""

    def __init__(self, rank: RankInfo, channel: Channel, num_blocks: int = NUM_BLOCKS):
        self.rank, self.channel, self.num_blocks = rank, channel, num_blocks
        self.epoch = 0
        self.last_step_id = -1
        self._first: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self._is_fixed = FIXED_TOKENS in os.environ

    def serve(self) -> int:
        """Answer until told to stop, or until the driver goes away."""
        try:
            while not isinstance(message := self.channel.recv(), StopWorker):
                self.handle(message)
        except ChannelClosed:
            return 1
        finally:
            self.channel.close()
        return 0

    def handle(self, message: Any) -> None:
        """Answer one message."""
        me = self.rank.global_rank
        if isinstance(message, SchedulerOutput):
            token_ids = self.step(message)
            self.last_step_id = message.step_id
            if self.rank.answers:
                self.channel.send(ModelRunnerOutput(step_id=message.step_id, epoch=message.epoch, token_ids=token_ids))
        elif isinstance(message, StartWorker):
            self.epoch = message.epoch
            self.channel.send(WorkerProgress(global_rank=me, phase="loading weights", fraction=1.0))
            self.channel.send(
                WorkerReport(
                    global_rank=me,
                    epoch=self.epoch,
                    num_blocks=self.num_blocks,
                    block_bytes=1,
                    free_bytes=0,
                    weight_bytes=0,
                    activation_bytes=0,
                    device="cpu",
                    node=os.uname().nodename,
                )
            )
        elif isinstance(message, AllocateCache):
            self.channel.send(WorkerReady(global_rank=me, epoch=self.epoch))
        elif isinstance(message, Ping):
            self.channel.send(Pong(global_rank=me, nonce=message.nonce, step_id=self.last_step_id))

    def step(self, output: SchedulerOutput) -> list[int]:
        """The tokens of one step, in row order (none from a rank that does not answer)."""
        if not self.rank.answers:
            return []
        if self._is_fixed:
            return [7] * (len(output.rows) - len(output.partial))
        first, computed = self._first, self._computed
        for new in output.new_requests:
            first[new.handle] = new.token_ids[0]
            computed[new.handle] = new.num_computed_tokens
        partial = set(output.partial)
        token_ids = []
        num_tokens = output.num_tokens or (1,) * len(output.rows)
        for place, (handle, count) in enumerate(zip(output.rows, num_tokens, strict=True)):
            computed[handle] += count
            if place not in partial:
                token_ids.append((first[handle] + computed[handle]) % MODULUS)
        return token_ids


def run_boot(given: bytes) -> int:
    """Be the rank that this JSON says. Also what the Ray actor calls."""
    boot = msgspec.json.decode(given)
    rank = msgspec.convert(boot["rank"], RankInfo)
    override = boot["config"]["cache"].get("num_gpu_blocks_override")
    channel = Channel.connect(boot["driver_address"], ToRank)
    channel.send(Hello(role="rank", secret=boot["secret"], global_rank=rank.global_rank, pid=os.getpid()))
    return ZeroCostRank(rank, channel, override or NUM_BLOCKS).serve()


def main() -> int:
    """The plain process: the boot is its input."""
    return run_boot(sys.stdin.buffer.read())


if __name__ == "__main__":
    sys.exit(main())
