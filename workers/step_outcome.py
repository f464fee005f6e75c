"""What a step drew, on its way from the device to the driver's message."""

import time

import torch
from torch import Tensor

from argosy.cluster.protocol.messages import ModelRunnerOutput, SchedulerOutput
from argosy.workers.host_pool import HostPool
from argosy.workers.sampler import FAILURES, LogprobTensors, Sampled
from argosy.workers.step_inputs import StepInputs


class StepOutcome:
    """What a step drew, on its way from the device to the driver. `result` may be asked on another thread."""

    def __init__(
        self,
        output: SchedulerOutput,
        inputs: StepInputs | None,
        sampled: Sampled | None,
        prompt_logprobs: list[tuple[int, int, LogprobTensors]],
        poisoned: dict[int, str],
        started: float,
        side_stream: "torch.cuda.Stream | None",
        host_pool: HostPool | None = None,
    ):
        self._output, self._inputs, self._sampled, self._prompt_logprobs = output, inputs, sampled, prompt_logprobs
        self._poisoned, self._started, self._host_pool = poisoned, started, host_pool
        self._token_ids: Tensor | None = None if sampled is None else sampled.token_ids_S
        self._copied: torch.cuda.Event | None = None
        if side_stream is not None and self._token_ids is not None:
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
            computed.record()
            with torch.cuda.stream(side_stream):
                side_stream.wait_event(computed)
                on_device = self._token_ids
                self._token_ids = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
                self._token_ids.copy_(on_device, non_blocking=True)
                on_device.record_stream(side_stream)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
                self._copied.record()

    def result(self) -> ModelRunnerOutput:
        """The message for the driver; waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids: list[int] = [] if self._token_ids is None else self._token_ids.tolist()
        failed = self._failures(token_ids) if self._poisoned or min(token_ids, default=0) < 0 else []
        sampled, figures = self._sampled, []
        if sampled is not None and sampled.logprobs is not None:
            figures = sampled.logprobs.to_messages()
        swapped_in_step_id, swap_seconds = (-1, (0.0, 0.0)) if self._host_pool is None else self._host_pool.report()
        return ModelRunnerOutput(
            step_id=self._output.step_id,
            epoch=self._output.epoch,
            token_ids=token_ids,
            logprobs=figures,
            prompt_logprobs=[
                (handle, first, [figure for _, figure in tensors.to_messages()])
                for handle, first, tensors in self._prompt_logprobs
            ],
            failed=failed,
            step_seconds=time.perf_counter() - self._started,
            swapped_in_step_id=swapped_in_step_id,
            swap_seconds=swap_seconds,
        )

    def _failures(self, token_ids: list[int]) -> list[tuple[int, str]]:
        """Which rows failed and why; their token ids become -1."""
        assert self._inputs is not None
        rows = self._inputs.sample_rows_S
        failed = []
        for place, token_id in enumerate(token_ids):
            row = place if rows is None else int(rows[place])
            problem = self._poisoned.get(int(self._inputs.handles_R[row])) or FAILURES.get(token_id)
            if problem is not None:
                token_ids[place] = -1
                failed.append((row, problem))
        return failed
