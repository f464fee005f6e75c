"""What the tests of this room share: tiny models, ranks in this process or in others, and the real scheduler's loop."""

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from argosy.cluster.clock import MonotonicClock
from argosy.cluster.metrics import Metrics
from argosy.cluster.oracle import write_oracle_model
from argosy.cluster.protocol.channel import Channel, Listener
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.kv_groups import kv_groups
from argosy.cluster.protocol.messages import (
    AllocateCache,
    FromRank,
    GenerateRequest,
    Hello,
    ModelRunnerOutput,
    SchedulerOutput,
    StartWorker,
    StopWorker,
    WorkerError,
    WorkerReady,
    WorkerReport,
)
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.cluster.protocol.swap import SwapCosts
from argosy.cluster.request import Request, make_requests
from argosy.cluster.scheduler import Scheduler
from argosy.placement.plan import PlacementPlan, make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.host_pool import make_host_pool
from argosy.workers.memory import MemoryLedger, choose_num_offloaded
from argosy.workers.model_runner import ModelRunner

DEADLINE_SECONDS = 60.0
VOCAB = 128
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from uniform, so that greedy choices are no coin tosses
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def write_family(folder: Path, family: str) -> Path:
    """A tiny random model of the family, saved by transformers in fp32."""
    import transformers

    torch.manual_seed(len(family))
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **extra}, dtype="float32")
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32)
    for module_name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases that do something
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in module_name else 0.0, std=0.2)
    model.save_pretrained(folder / family)
    return folder / family


def transformers_greedy(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """What transformers would say, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def make_config(folder: Path, **settings: Any) -> ServingConfig:
    """Small numbers, so that blocks, chunks and rows meet their borders all the time."""
    defaults = {
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "cpu_threads": 1,
        "num_gpu_blocks_override": 128,
    }
    return ServingConfig.from_mapping({**defaults, **settings})


def oracle_config(folder: Path, **settings: Any) -> ServingConfig:
    """The same for the model whose next token is a hash of its blocks."""
    return make_config(write_oracle_model(folder / "oracle"), load_format="dummy", **settings)


class Ranks(Protocol):
    """Who carries out steps."""

    def submit(self, output: SchedulerOutput) -> None:
        """Send a step."""

    def next_answer(self) -> ModelRunnerOutput:
        """The oldest step's outcome."""


class InProcessRank:
    """One rank, called directly; messages go through msgpack as on the wire."""

    def __init__(self, config: ServingConfig, num_blocks: int, num_host_blocks: int = 0, device_name: str = "cpu"):
        spec = read_model_spec(config.model.model)
        (rank,) = make_plan(spec.num_layers, 1, 1).ranks
        device = torch.device(device_name)
        self.runner = ModelRunner(
            config, spec, ParallelContext(rank, device, DEADLINE_SECONDS),
            device=device, dtype=torch.float32, cache_dtype=torch.float32,
        )  # fmt: skip
        offloaded = choose_num_offloaded(self.runner, MemoryLedger())
        self.runner.load(Path(config.model.model), None, num_offloaded=offloaded)
        self.runner.allocate(num_blocks)
        if num_host_blocks:
            assert self.runner.kv_cache is not None
            self.runner.host_pool = make_host_pool(self.runner.kv_cache.tensors, num_host_blocks)
        self._answers: deque[ModelRunnerOutput] = deque()

    def submit(self, output: SchedulerOutput) -> None:
        """Runs it at once."""
        outcome = self.runner.execute(_over_the_wire(output))
        self.runner.batch.check()
        assert outcome is not None
        self._answers.append(_over_the_wire(outcome.result()))

    def next_answer(self) -> ModelRunnerOutput:
        """The oldest."""
        return self._answers.popleft()


class RankHosts:
    """Processes that each play one rank after another, so that importing torch is paid once."""

    def __init__(self, count: int, log_folder: Path, script: str = __file__):
        self.logs = [log_folder / f"host-{i}.log" for i in range(count)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, script],
                stdin=subprocess.PIPE,
                stdout=log.open("wb"),
                stderr=subprocess.STDOUT,
                env=env,
            )
            for log in self.logs
        ]

    def boot(self, place: int, boot: dict[str, Any]) -> None:
        """Let a process be this rank now."""
        stdin = self.processes[place].stdin
        assert stdin is not None
        stdin.write(msgspec.json.encode(boot) + b"\n")
        stdin.flush()

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=2)


class RemoteRanks:
    """A group of real ranks behind real channels; this process is their driver."""

    def __init__(
        self,
        hosts: RankHosts,
        config: ServingConfig,
        num_blocks: int,
        socket_folder: Path,
        rendezvous: str,
        num_host_blocks: int = 0,
    ):
        self.config = config
        spec = read_model_spec(config.model.model)
        parallel = config.parallel
        self.plan: PlacementPlan = make_plan(
            spec.num_layers, parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        )
        listener = Listener.bind(f"unix:{socket_folder}/driver")
        secret = os.urandom(8).hex()
        for rank in self.plan.ranks:
            boot = {
                "rank": rank,
                "config": config,
                "driver_address": listener.address,
                "secret": secret,
                "node": "here",
            }
            hosts.boot(rank.global_rank, boot)
        self.channels: dict[int, Channel] = {}
        for _ in self.plan.ranks:
            channel = Channel(listener.accept(DEADLINE_SECONDS), FromRank)
            hello = channel.recv(DEADLINE_SECONDS)
            assert isinstance(hello, Hello)
            assert hello.secret == secret
            self.channels[hello.global_rank] = channel
        listener.close()
        self._send(StartWorker(epoch=0, rendezvous=rendezvous, deadline_seconds=DEADLINE_SECONDS))
        self.reports: list[WorkerReport] = self._wait_for_all(WorkerReport)
        self._send(AllocateCache(num_blocks=num_blocks, num_host_blocks=num_host_blocks))
        self.ready: list[WorkerReady] = self._wait_for_all(WorkerReady)
        (self.answering,) = [rank.global_rank for rank in self.plan.ranks if rank.answers]

    def _send(self, message: object) -> None:
        for channel in self.channels.values():
            channel.send(message)

    def _wait_for_all(self, kind: type) -> list[Any]:
        return [self.wait_for(global_rank, kind) for global_rank in sorted(self.channels)]

    def wait_for(self, global_rank: int, kind: type) -> Any:
        """The next message of this kind from this rank; progress is passed over, an error fails the test."""
        while True:
            message = self.channels[global_rank].recv(DEADLINE_SECONDS)
            assert not isinstance(message, WorkerError), message
            if isinstance(message, kind):
                return message

    def submit(self, output: SchedulerOutput) -> None:
        """To every rank."""
        self._send(output)

    def next_answer(self) -> ModelRunnerOutput:
        """From the one that answers."""
        answer: ModelRunnerOutput = self.wait_for(self.answering, ModelRunnerOutput)
        return answer

    def stop(self) -> None:
        """Send the ranks home; their processes can be others afterwards."""
        self._send(StopWorker())
        for channel in self.channels.values():
            channel.close()


def start(
    hosts: RankHosts, config: ServingConfig, num_blocks: int, folder: Path, num_host_blocks: int = 0
) -> RemoteRanks:
    """A group of ranks in the layout of the config, which meet where nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{probe.getsockname()[1]}"
    return RemoteRanks(hosts, config, num_blocks, folder, rendezvous, num_host_blocks)


def greedy(prompt: Sequence[int], num_tokens: int, *, stream_id: int = 0, n: int = 1, **params: Any) -> GenerateRequest:
    """Ask for so many tokens."""
    wanted = TokenParams(**{"max_tokens": num_tokens, "temperature": 0.0, **params})
    return GenerateRequest(
        stream_id=stream_id, request_id=f"{stream_id:032x}", prompt_token_ids=prompt, params=wanted, n=n
    )


class Run:
    """Requests through the real scheduler and these ranks, with as many steps in flight as there would be."""

    def __init__(
        self, ranks: Ranks, config: ServingConfig, num_blocks: int, *, max_len: int = 250, num_host_blocks: int = 0
    ):
        """With `num_host_blocks` requests that have to make room are always swapped, never computed anew."""
        self.ranks, self.max_len = ranks, max_len
        self.metrics = Metrics()
        self.scheduler = Scheduler(config, MonotonicClock(), self.metrics)
        self.groups = kv_groups(read_model_spec(config.model.model), config.model.max_model_len)
        swap = SwapCosts(num_host_blocks=num_host_blocks, block_bytes=1, in_seconds=1e-9, token_seconds=1.0)
        self.scheduler.begin_epoch(0, num_blocks, self.groups, swap=swap)
        self.requests: list[Request] = []
        self.num_steps = 0

    def add(self, message: GenerateRequest) -> list[Request]:
        """One more request, now."""
        made = make_requests(
            message, arrival=len(self.requests), now=self.num_steps, max_len=self.max_len, deltas=[], owner=None
        )
        self.requests += made
        self.scheduler.add(made)
        return made

    def step(self) -> bool:
        """Send what may be sent, then take one answer. False when nothing is left to do."""
        scheduler = self.scheduler
        while scheduler.num_steps_in_flight < scheduler.max_steps_in_flight:
            output = scheduler.schedule()
            if output is None:
                break
            self.ranks.submit(output)
            self.num_steps += 1
        if not scheduler.num_steps_in_flight:
            return False
        scheduler.update(self.ranks.next_answer())
        return True

    def finish(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Step until all have ended."""
        while self.step():
            on_step()
        assert all(request.is_finished for request in self.requests)

    def abort(self, request: Request) -> None:
        """Its owner has gone."""
        if not request.is_finished:
            self.scheduler.end(request, FinishReason.ABORT)


def answers(requests: Sequence[Request]) -> list[list[int]]:
    """What each has generated."""
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def _over_the_wire(message: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))


def be_ranks() -> None:
    """Play the rank that each line of the input describes."""
    from argosy.workers.worker import WorkerBoot, run_worker

    for line in sys.stdin.buffer:
        status = run_worker(msgspec.json.decode(line, type=WorkerBoot))
        print(f"ended with {status}", flush=True)


if __name__ == "__main__":
    be_ranks()
