"""One step on this rank: batch, forward, then sample or hand on.

T tokens of the step, S rows that sample, D model width, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.kv_groups import kv_groups
from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.cluster.protocol.sampling import TokenParams
from argosy.placement.process_groups import ParallelContext
from argosy.placement.stage_transport import StageTransport
from argosy.placement.weight_offload import offloaded_places
from argosy.workers.attention.base import AttentionBackend
from argosy.workers.attention.triton_backend import TritonBackend
from argosy.workers.cuda_graphs import CUDAGraphRunner
from argosy.workers.device import ThreadChoice
from argosy.workers.forward_context import ForwardContext
from argosy.workers.host_pool import HostPool
from argosy.workers.input_batch import InputBatch
from argosy.workers.kv_cache import KVCache
from argosy.workers.loading.stream import LoadReport, load_weights
from argosy.workers.long_steps import LongHidden, LongSteps, slice_tokens_of
from argosy.workers.models.registry import build_model
from argosy.workers.native_steps import cpu_backend
from argosy.workers.prompt_graphs import Kind
from argosy.workers.prompt_logprobs import PromptLogprobs
from argosy.workers.quantization.base import count_products
from argosy.workers.sampler import LogprobTensors, Sampled, Sampler, mark_failures
from argosy.workers.step_inputs import StepInputs
from argosy.workers.step_outcome import StepOutcome
from argosy.workers.step_recording import record_graphs
from argosy.workers.token_return import TokenReturn
from argosy.workers.weight_offload import WeightOffload

WARM_UP_EPOCH = -1


class ModelRunner:
    """The model's part of this rank, its KV cache, and the requests it knows."""

    def __init__(
        self,
        config: ServingConfig,
        spec: ModelSpec,
        parallel: ParallelContext,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        cache_scales: bool = False,
    ):
        self.config, self.spec, self.parallel, self.rank = config, spec, parallel, parallel.rank
        self.device, self.dtype, self.cache_dtype = device, dtype, cache_dtype
        self.cache_scales = cache_scales  # of the cache, one for each token and head
        scheduler = config.scheduler
        self.max_model_len = config.model.max_model_len or spec.max_position
        self.kv_groups = kv_groups(spec, self.max_model_len)
        self.model = build_model(spec, self.rank, parallel, dtype, device)
        # what is packed for a CPU is no parameter that could be moved
        eager = config.parallel.enforce_eager or bool(config.offload.cpu_offload_gb)
        on_cpu = device.type != "cuda"
        self.backend: AttentionBackend = cpu_backend(self.model, dtype, eager) if on_cpu else TritonBackend()
        slice_tokens = slice_tokens_of(config, self.model, spec.hidden_size * dtype.itemsize)
        # that go through the model at once
        self.most_tokens = max(slice_tokens or scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        self.transport = StageTransport(
            parallel,
            spec.hidden_size,
            dtype,
            timeout_seconds=config.parallel.start_deadline_seconds,
            max_steps_in_flight=config.max_steps_in_flight,
            max_tokens=self.most_tokens,
            max_rows=scheduler.max_num_seqs,
        )
        self.batch = InputBatch(
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            block_size=config.cache.block_size,
            vocab_size=spec.vocab_size,
            device=device,
            max_steps_in_flight=config.max_steps_in_flight,
            num_groups=self.kv_groups.num_groups,
        )
        self._token_return: TokenReturn | None = None
        if self.rank.pp_size > 1 and (self.rank.is_first_stage or self.rank.is_last_stage):
            self._token_return = TokenReturn(self.batch, self.transport)
        self.sampler = Sampler(scheduler.max_num_seqs, spec.vocab_size, device, gives_logprobs=self.rank.answers)
        self.kv_cache: KVCache | None = None
        self.host_pool: HostPool | None = None
        self.offload: WeightOffload | None = None
        self.long_steps: LongSteps | None = None
        if slice_tokens is not None:
            self.long_steps = LongSteps(
                self.model, self.rank, self.transport, slice_tokens=slice_tokens,
                max_tokens=scheduler.max_num_batched_tokens, width=spec.hidden_size, dtype=dtype, device=device,
            )  # fmt: skip
        self.graphs: CUDAGraphRunner | None = None
        self._threads: ThreadChoice | None = None  # on a CPU
        self.last_step_id = -1
        self._prompt_logprobs = PromptLogprobs(self.batch, self.device, answers=self.rank.answers)
        self._side_stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and self.rank.answers:
            self._side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]  # torch's own

    # ----------------------------------------------------------------------------------------------------- starting

    def load(self, folder: Path, on_progress: Callable[[float], None] | None, *, num_offloaded: int = 0) -> LoadReport:
        """Fill the weights of this rank, those of so many layers in the host's memory."""
        model = self.config.model
        if num_offloaded:
            layers = list(self.model.layers.values())
            chosen = [layers[place] for place in offloaded_places(len(layers), num_offloaded)]
            self.offload = WeightOffload(self.model, chosen, self.device)
        report = load_weights(
            self.model, folder, self.spec, on_progress, load_format=model.load_format, seed=model.seed,
            offload=self.offload,
        )  # fmt: skip
        if self.offload is not None:
            self.model.offload = self.offload
        if hasattr(self.model, "open_group_sum"):
            self.model.open_group_sum(self.most_tokens, self.config.scheduler.max_num_seqs)
        num_products, num_weights = count_products(self.model)
        if self.device.type == "cpu" and num_products:
            alone = self.rank.tp_size == self.rank.pp_size == 1  # others' time would be taken for ours
            self._threads = ThreadChoice(
                torch.get_num_threads(), num_products, num_weights, self.dtype.itemsize, learns=alone
            )
        return report

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache; from now on steps may come."""
        self.kv_cache = KVCache.allocate(
            self.spec, self.rank, num_blocks, self.config.cache.block_size, self.cache_dtype, self.device,
            scaled=self.cache_scales, groups=self.kv_groups,
        )  # fmt: skip

    @property
    def chooses_over_group(self) -> bool:
        """Whether the model finds the most likely token without gathering the logits of all ranks."""
        return getattr(self.model, "chooses_over_group", False)

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on this rank."""
        return KVCache.block_bytes(
            self.spec, self.rank, self.config.cache.block_size, self.cache_dtype, scaled=self.cache_scales,
            groups=self.kv_groups,
        )  # fmt: skip

    def warm_up(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Run steps of (rows, tokens a row), so that no request pays for what only the first use of a shape costs.

        A third number is that of rows with one token beside them, a fourth how many tokens of each row are in the cache
        already. All write to block 0, which is zeroed afterwards.
        """
        assert self.kv_cache is not None
        params = TokenParams(max_tokens=1, temperature=1.0, top_p=0.9)
        for step, shape in enumerate(shapes):
            num_rows, num_tokens, beside, context = (*shape, 0, 0)[:4]
            counts = [1] * beside + [num_tokens] * num_rows
            requests = [
                NewRequest(handle, [0] * length, length, context, self._warm_up_blocks(length), params)
                for handle, length in enumerate(context + count for count in counts)
            ]
            output = SchedulerOutput(
                step_id=step,
                epoch=WARM_UP_EPOCH,
                rows=list(range(len(counts))),
                num_tokens=counts,
                new_requests=requests,
                finished=list(range(len(counts))),
            )
            outcome = self.execute(output)
            if outcome is not None:
                outcome.result()
        self.execute(SchedulerOutput(step_id=-1, epoch=WARM_UP_EPOCH, rows=[], finished=sorted(self.batch.active)))
        self.take_tokens()
        self.transport.flush()
        self.transport.timeout_seconds = self.config.parallel.step_deadline_seconds
        for tensor in self.kv_cache.tensors:
            tensor[0].zero_()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last_step_id = -1

    def _warm_up_blocks(self, num_tokens: int) -> list[int]:
        return [0] * (-(-num_tokens // self.batch.block_size) * self.kv_groups.num_groups)

    def record_graphs(self, on_progress: Callable[[float], None] | None = None) -> None:
        """Record steps as CUDA graphs, on a GPU and unless `enforce_eager`. After `allocate` and `warm_up`."""
        self.graphs = record_graphs(self, on_progress)

    # -------------------------------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepOutcome | None:
        """Carry out one step. What comes back is for the driver; None on ranks that don't answer."""
        assert self.kv_cache is not None
        started = time.perf_counter()
        self._apply(output)
        if output.swaps is not None:
            assert self.host_pool is not None
            self.host_pool.begin(output.step_id, output.swaps)
        if output.block_copies:
            self.kv_cache.copy_blocks(output.block_copies)
        if not len(output.rows):
            self.last_step_id = output.step_id
            return self._empty(output, started)
        if self._token_return is not None and self.rank.is_first_stage:
            self._token_return.prepare(self.batch.handles_of(output.rows))
        outcome = None
        recorded = self._begin_recorded(output)
        if recorded is not None:
            inputs, kind = recorded
            if kind is None:
                outcome = self._replay(output, inputs, started)
            else:
                outcome = self._replay_prompts(output, inputs, kind, started)
        else:
            inputs = self.batch.build(output)
            if self._threads is not None:
                self._threads.choose(inputs.num_tokens)
            hidden_TD = self._forward(inputs, self.kv_cache)
            if hidden_TD is not None:
                outcome = self._sample(output, inputs, hidden_TD, started)
            if self._threads is not None:
                self._threads.finished()
            if self.graphs is not None:
                self.graphs.take_over(inputs)
        self.batch.advance(inputs)
        if self._token_return is not None and self.rank.is_first_stage:
            self._token_return.note(inputs)
        self.last_step_id = output.step_id
        return outcome if self.rank.answers else None

    def _begin_recorded(self, output: SchedulerOutput) -> tuple[StepInputs, Kind | None] | None:
        """What a recorded step needs is on its way; None: run it eagerly. A kind: it has prompts."""
        if self.graphs is None or self._prompt_logprobs:
            return None
        inputs = self.graphs.begin(output)
        return (inputs, None) if inputs is not None else self.graphs.begin_prompts(output)

    @property
    def has_tokens_to_take(self) -> bool:
        """Whether this is the first of several stages, and the last one has sent tokens that no step needed yet."""
        return self._token_return is not None and self._token_return.is_outstanding

    def take_tokens(self) -> None:
        """Take all tokens that were sent to us. On a GPU it only queues that; a sender must not wait for ever."""
        while self._token_return is not None and self._token_return.is_outstanding:
            self._token_return.take()

    def _apply(self, output: SchedulerOutput) -> None:
        self.batch.apply(output)
        for handle in output.finished:
            self.sampler.forget(handle)
            self._prompt_logprobs.forget(handle)
        if self.rank.is_last_stage:
            for request in output.new_requests:
                self.sampler.add(request)
                self._prompt_logprobs.add(request)

    def _asked_rows(self, inputs: StepInputs) -> Tensor | None:
        """Tokens that sample, on the last stage of a step with others: its last layer may leave the others out."""
        if not self.rank.is_last_stage or self._prompt_logprobs or inputs.num_sampled == inputs.num_tokens:
            return None
        return inputs.hidden_rows_S

    def _forward(self, inputs: StepInputs, kv_cache: KVCache) -> Tensor | LongHidden | None:
        """The final hidden states; None where the next stage goes on."""
        if self.long_steps is not None and self.long_steps.takes(inputs.num_tokens):
            return self.long_steps.run(inputs, self.backend, kv_cache, keeps_all=bool(self._prompt_logprobs))
        context = ForwardContext(self.backend, kv_cache, inputs.metadata, self._asked_rows(inputs))
        hidden_TD = None if self.rank.is_first_stage else self.transport.receive(inputs.num_tokens)
        token_ids_T = inputs.token_ids_T if self.rank.is_first_stage else None
        made_TD: Tensor = self.model(token_ids_T, hidden_TD, inputs.positions_T, context)
        if self.rank.is_last_stage:
            return made_TD
        self.transport.send(made_TD)
        return None

    def _replay(self, output: SchedulerOutput, inputs: StepInputs, started: float) -> StepOutcome | None:
        """A decode step by its recorded graph; the draw as well where all rows take the most likely token."""
        assert self.graphs is not None
        self.batch.forget_rows()
        num_rows = inputs.num_rows
        if not self.rank.is_first_stage:
            self.transport.receive(num_rows, self.graphs.hidden_RD[:num_rows])
        result = self.graphs.run(num_rows)
        if not self.rank.is_last_stage:
            self.transport.send(result, changes=True)  # the next replay writes there again
            return None
        if self.sampler.is_greedy:
            sampled = Sampled(self.graphs.run_greedy(num_rows).clone())
            self._hand_back()
        else:
            if self.chooses_over_group:
                result = self.model.gather_logits(result)
            sampled = self.sampler.sample(result, inputs.handles_R, inputs.end_R, self._history)
            inputs.sample_handles_device_S = self.graphs.handles_R[:num_rows].long()
            self._remember(inputs, sampled.token_ids_S)
        return self._outcome(output, inputs, sampled, [], started)

    def _replay_prompts(
        self, output: SchedulerOutput, inputs: StepInputs, kind: Kind, started: float
    ) -> StepOutcome | None:
        """A small step with prompts by its recorded graph; the draw is queued behind it."""
        assert self.graphs is not None
        prompts = self.graphs.prompts
        assert prompts is not None
        self.batch.forget_rows()
        if not self.rank.is_first_stage:
            self.transport.receive(inputs.num_tokens, prompts.hidden_TD(inputs.num_tokens))
        result = prompts.run(kind, inputs)
        if not self.rank.is_last_stage:
            self.transport.send(result, changes=True)  # the next replay writes there again
            return None
        return self._sample(output, inputs, result, started)

    def _sample(
        self, output: SchedulerOutput, inputs: StepInputs, hidden_TD: Tensor | LongHidden, started: float
    ) -> StepOutcome | None:
        """Every TP rank of the last stage draws, from the same logits, the same tokens."""
        prompt_logprobs = []
        if self._prompt_logprobs:
            prompt_logprobs = self._prompt_logprobs.make(self.model.compute_logits, inputs, hidden_TD)
        sampled = None
        if inputs.num_sampled:
            # fewer rows than tokens: the model gave those that were asked for
            if isinstance(hidden_TD, LongHidden):
                hidden_SD = hidden_TD.sampled_SD
            elif inputs.hidden_rows_S is None or hidden_TD.shape[0] < inputs.num_tokens:
                hidden_SD = hidden_TD
            else:
                hidden_SD = hidden_TD[inputs.hidden_rows_S]
            if self.chooses_over_group and self.sampler.is_greedy:
                sampled = Sampled(mark_failures(*self.model.choose(self.model.compute_own_logits(hidden_SD))))
            else:
                on_gpu = self.device.type == "cuda"  # where the sampler's kernels take 16 bits
                compute_logits = self.model.compute_raw_logits if on_gpu else self.model.compute_logits
                sampled = self.sampler.sample(
                    compute_logits(hidden_SD), inputs.sample_handles_S, inputs.sample_positions_S, self._history,
                )  # fmt: skip
            self._remember(inputs, sampled.token_ids_S)
        return self._outcome(output, inputs, sampled, prompt_logprobs, started)

    def _outcome(
        self,
        output: SchedulerOutput,
        inputs: StepInputs,
        sampled: Sampled | None,
        prompt_logprobs: list[tuple[int, int, LogprobTensors]],
        started: float,
    ) -> StepOutcome | None:
        if not self.rank.answers:
            return None
        poisoned = {} if not self.batch.poisoned else dict(self.batch.poisoned)
        return StepOutcome(
            output, inputs, sampled, prompt_logprobs, poisoned, started, self._side_stream, self.host_pool
        )

    def _remember(self, inputs: StepInputs, token_ids_S: Tensor) -> None:
        # a row that failed goes on with token 0 until the driver has heard of it
        if self.batch.lives_on_device:
            self.batch.append_sampled_device(inputs, token_ids_S.clamp(min=0))
            self._hand_back()
            if not self.sampler.processor.needs_history:
                return
            token_ids_S = token_ids_S.cpu()  # waits for the step: the price of bad words of several tokens
            self.batch.append_sampled(inputs, np.maximum(token_ids_S.numpy(), 0))
            return
        self.batch.append_sampled(inputs, np.maximum(token_ids_S.numpy(), 0))
        self._hand_back()

    def _hand_back(self) -> None:
        """What this step sampled stands in the table of last tokens: the first stage will ask for it."""
        if self._token_return is not None:
            self._token_return.send()

    def _history(self, handle: int, start: int, end: int) -> Sequence[int]:
        ids: list[int] = self.batch.token_ids_NL[handle, start:end].tolist()
        return ids

    def _empty(self, output: SchedulerOutput, started: float) -> StepOutcome | None:
        """The outcome of a step without rows (it only told us what is over)."""
        if not self.rank.answers:
            return None
        return StepOutcome(output, None, None, [], {}, started, None, self.host_pool)
