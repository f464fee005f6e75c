"""A rank whose steps are recorded, without a card: a replay does again what was recorded, over the same buffers."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rig import InProcessRank

from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.placement.step_memory import prompt_places
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.prompt_graphs import Kind
from argosy.workers.step_recording import make_graphs

KINDS = [(24, 2), (32, 2), (32, 6)]  # room for sixteen prompts beside the decode rows, and always more tokens


class Again:
    """What a replay does: the same calls, whatever stands in the buffers now. What it leaves is where it was left."""

    def __init__(self, run: Callable[[], Any], made: Any):
        self._run, self._made = run, made
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        made = self._run()
        if isinstance(made, Tensor):
            self._made.copy_(made)


class FakeRecorder:
    """As `Recorder`. What was computed while recording is spoiled: only a replay makes results."""

    def __init__(self) -> None:
        self.made: list[Again] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        yield

    def record(self, run: Callable[[], Any]) -> tuple[Again, Any]:
        made = run()
        if isinstance(made, Tensor):
            made.fill_(float("nan"))
        self.made.append(Again(run, made))
        return self.made[-1], made


class Forgetful(TorchBackend):
    """Asks the metadata in each layer: what it worked out for a step was right for that step alone."""

    def rotate_and_store(self, qkv_TD: Tensor, *args: Any) -> Tensor:
        metadata = next(arg for arg in args if isinstance(arg, AttentionMetadata))
        metadata.scratch.clear()
        return super().rotate_and_store(qkv_TD, *args)


class Recorded(InProcessRank):
    """A rank whose steps are recorded, as on a card: the host learns no token before the driver does."""

    def __init__(self, config: Any, num_blocks: int, kinds: list[Kind] = KINDS):
        super().__init__(config, num_blocks)
        runner = self.runner
        runner.backend, runner.batch.lives_on_device = Forgetful(), True
        for staging in runner.batch._staging:
            staging.is_shared = False  # steps that are not recorded say which rows they have, as on a card
        self.recorder = FakeRecorder()
        with torch.inference_mode():
            runner.graphs = make_graphs(runner, 8, kinds)
            assert runner.kv_cache is not None
            before = [tensor.clone() for tensor in runner.kv_cache.tensors]
            runner.graphs.record(self.recorder)  # type: ignore[arg-type]  # a stand-in
        assert all(torch.equal(*pair) for pair in zip(before, runner.kv_cache.tensors, strict=True)), (
            "wrote to the cache"
        )
        self.kinds: list[Kind | None] = []  # of the steps that were not of decode rows alone
        prompts = runner.graphs.prompts
        assert prompts is not None
        begin = prompts.begin

        def noted(output: SchedulerOutput) -> Any:
            begun = begin(output)
            self.kinds.append(None if begun is None else begun[1])
            if begun is not None:
                self._check_places(len(output.rows), sum(output.num_tokens) or len(output.rows))
                self._check_attention(begun[0].metadata, begun[1])
                inputs, batch = begun[0], self.runner.batch
                num_blocks = -(-int(inputs.end_R.max()) // batch.block_size)
                assert batch.num_groups * len(inputs.handles_R) * num_blocks <= prompts._most_entries
            return begun

        prompts.begin = noted  # type: ignore[method-assign]  # the same, noted

    def _check_attention(self, metadata: AttentionMetadata, kind: Kind) -> None:
        """What a card's kernels are told: the most there may be, and each place of a decode row once."""
        num_tokens, num_decodes = kind
        for one in (metadata, *metadata.others):
            assert one.is_padded
            assert (one.max_query_len, one.max_context_len) == (num_tokens, self.runner.spec.max_position)
            assert (one.num_decode_rows, one.num_rows) == (num_decodes, num_decodes + prompt_places(num_tokens))
            assert one.order_R is not None
            assert sorted(one.order_R.tolist()) == list(range(num_decodes))
            assert len(one.query_start_R1) == one.num_rows + 1 == len(one.context_len_R) + 1

    def _check_places(self, num_rows: int, num_tokens: int) -> None:
        """Places where no row is have no tokens and no context, whatever stood there in the step before."""
        assert self.runner.graphs is not None
        assert self.runner.graphs.prompts is not None
        fixed = self.runner.graphs.prompts._fixed
        counts_R = fixed.starts_R1.diff()
        assert int((fixed.context_R > 0).sum()) == num_rows
        assert counts_R.min() >= 0
        assert int(counts_R.sum()) == num_tokens
        assert not counts_R[fixed.context_R == 0].any()
