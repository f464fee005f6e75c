"""`LLM`: an engine of this program's own, for scripts and notebooks.

    with LLM("path/or/hub-name", max_model_len=4096) as llm:
        for output in llm.generate(["Once upon a time", "In the beginning"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

Names, defaults and results are vLLM's. The engine is a driver and its ranks in processes of their own; this side keeps
a tokenizer and one connection, on an event loop in a thread, so that it also works where a loop already runs.
"""

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

import msgspec
from tqdm import tqdm

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import (
    ChannelClosed,
    ClusterError,
    ConfigError,
    InvalidRequest,
    RequestAborted,
    ServingError,
)
from argosy.cluster.protocol.sampling import SamplingParams
from argosy.cluster.replica_client import ReplicaClient, connect_engine
from argosy.deploy import prompts as forms
from argosy.deploy import settings
from argosy.deploy.gateway import Gateway, PreparedRequest
from argosy.deploy.model_folder import load_tokenizer, localize
from argosy.deploy.names_of_vllm import describe_missing
from argosy.deploy.outputs import RequestOutput
from argosy.deploy.progress import StartProgress
from argosy.deploy.token_params import read_generation_config
from argosy.deploy.tokenizer import Tokenizer

if TYPE_CHECKING:
    from argosy.deploy.launch import Engine

T = TypeVar("T")

_BACKENDS: Final[Mapping[object, Literal["ray", "local"]]] = {
    None: "ray",
    "ray": "ray",
    "mp": "local",
    "uni": "local",
    "local": "local",
}
_ONE_DAY_SECONDS: Final = 86_400.0  # a batch may take long; a server's ten minutes for a request would cut it off
_CONNECT_SECONDS: Final = 30.0
_CALL_OFF_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0


class Metric(msgspec.Struct, frozen=True):
    """One live figure of the engine."""

    name: str
    value: float


class LLM:
    """A model that is ready to generate. Takes vLLM's arguments; see `argosy serve --help` for what each does.

    `distributed_executor_backend` is "ray" (default: a Ray cluster of this program's own, or the one it runs in), or
    "mp" for plain processes without Ray. Arguments of vLLM that nothing here depends on are accepted with one warning;
    unknown ones raise `ConfigError` with the nearest name.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        distributed_executor_backend: str | None = None,
        **options: Any,
    ):
        given = {
            "request_deadline_seconds": _ONE_DAY_SECONDS,
            **options,
            "tokenizer": tokenizer,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "dtype": dtype,
            "seed": seed,
        }
        if distributed_executor_backend not in _BACKENDS:
            raise ConfigError(f"distributed_executor_backend={distributed_executor_backend!r}: must be 'ray' or 'mp'")
        config = settings.config_from_kwargs(settings.choose_model(model), given)
        self._start(localize(config), _BACKENDS[distributed_executor_backend])

    @classmethod
    def from_config(cls, config: ServingConfig, *, backend: Literal["ray", "local"] = "ray") -> Self:
        """An engine for settings that were already read."""
        llm = cls.__new__(cls)
        llm._start(localize(config), backend)
        return llm

    def _start(self, config: ServingConfig, backend: Literal["ray", "local"]) -> None:
        # Ray and its dependencies cost a second: they are loaded with the engine, not with this module.
        from argosy.deploy.launch import launch_engine

        self.config = config
        tokenizer = load_tokenizer(config)  # this and the next before anything starts: a mistake costs a second
        read_generation_config(config.model.model, config.model.generation_config)
        is_shown = sys.stderr.isatty()
        progress = StartProgress(is_quiet=not is_shown)
        if not is_shown:  # in a log: that it goes on, and that it is done, since Ray alone may take half a minute
            print(f"argosy: starting {config.model.served_model_name[0]} ...", file=sys.stderr, flush=True)
        self._engine = launch_engine(config, backend=backend, on_progress=progress)
        progress.close()
        if not is_shown:
            print(f"argosy: ready after {progress.seconds:.1f} s", file=sys.stderr, flush=True)
        self._loop = _LoopThread()
        # Also when nobody closes it: at exit, or when the last reference goes.
        self._finalizer = weakref.finalize(self, _close, self._loop, self._engine)
        try:
            self._gateway = self._loop.run(_connect(self._engine, tokenizer, config))
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------ generating

    def generate(
        self,
        prompts: object,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: object = None,
        priority: Sequence[int] | int | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; results in the order of the prompts.

        A prompt is a text, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": [...]}`; one of them or a
        list. All are checked before any runs: the first wrong one raises.
        """
        self._check_open()
        _refuse_lora(lora_request)
        many = forms.normalise_prompts(prompts)
        params = forms.normalise_params(sampling_params, self.get_default_sampling_params(), len(many))
        priorities = forms.normalise_priorities(priority, len(many))
        requests = self._run(
            self._prepare(
                [
                    self._gateway.prepare(
                        prompt.content,
                        chosen,
                        field="prompts" if len(many) == 1 else f"prompts[{place}]",
                        priority=sooner,
                        cache_salt=prompt.cache_salt,
                    )
                    for place, (prompt, chosen, sooner) in enumerate(zip(many, params, priorities, strict=True))
                ]
            )
        )
        return self._collect(requests, use_tqdm)

    def chat(
        self,
        messages: object,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: object = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation (a list of messages) or several, by the model's chat template."""
        self._check_open()
        _refuse_lora(lora_request)
        if chat_template is not None:
            raise InvalidRequest("chat_template", chat_template, "give it to LLM(..., chat_template=...) instead")
        texts = [
            self._gateway.render_chat(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in forms.normalise_conversations(messages)
        ]
        params = forms.normalise_params(sampling_params, self.get_default_sampling_params(), len(texts))
        requests = self._run(
            self._prepare(
                [
                    # the template has written the special tokens already
                    self._gateway.prepare(text, chosen, field="messages", add_special_tokens=False)
                    for text, chosen in zip(texts, params, strict=True)
                ]
            )
        )
        return self._collect(requests, use_tqdm)

    def __getattr__(self, name: str) -> Any:
        """What vLLM's has and this hasn't is told by what it is for."""
        raise AttributeError(f"LLM has no {name}{describe_missing(name)}", name=name, obj=self)

    # -------------------------------------------------------------------------------------------------- questions

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: `encode`, `decode`, `apply_chat_template`."""
        if self._gateway.tokenizer is None:
            raise ConfigError("there is no tokenizer: skip_tokenizer_init was set")
        return self._gateway.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's `generation_config.json` recommends."""
        return self._gateway.default_sampling_params()

    def get_world_size(self) -> int:
        """Number of ranks."""
        return self.config.parallel.tensor_parallel_size * self.config.parallel.pipeline_parallel_size

    def get_metrics(self) -> list[Metric]:
        """The engine's live figures by name."""
        self._check_open()
        reply = self._run(self._gateway.client.stats())
        return [Metric(name, value) for name, value in sorted(reply.values.items())]

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False when running requests hold some."""
        self._check_open()
        return self._run(self._gateway.client.reset_prefix_cache())

    # ------------------------------------------------------------------------------------------------------ ending

    def run(self, work: Callable[[Gateway], Coroutine[Any, Any, T]]) -> T:
        """Run something of your own in the engine's event loop, and wait for it."""
        self._check_open()
        return self._run(work(self._gateway))

    def close(self) -> None:
        """Stop the engine and everything that was started for it. May be called twice."""
        self._finalizer()

    shutdown = close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ChannelClosed("this LLM was closed; make a new one")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.run(work, self._look)
        except ServingError as error:
            if not self._engine.has_lost_ray:
                raise
            raise ClusterError(
                "Ray lost its raylet: killed, maybe for want of memory, or with an agent of Ray's that it shares its "
                "fate with; make another LLM in another process"
            ) from error

    def _look(self) -> None:
        """Once a second while something runs: without a raylet no driver is started again, and waiting is in vain."""
        if not self._engine.has_lost_ray and self._engine.lost_part() == "raylet":
            self._engine.has_lost_ray = True
            client = self._gateway.client
            if isinstance(client, ReplicaClient):
                self._loop.loop.call_soon_threadsafe(client.give_up)

    async def _prepare(self, checks: Iterable[Coroutine[Any, Any, PreparedRequest]]) -> list[PreparedRequest]:
        waiting = list(checks)
        try:
            return [await waiting.pop(0) for _ in range(len(waiting))]
        finally:
            for check in waiting:  # those after the first that was refused
                check.close()

    def _collect(self, requests: list[PreparedRequest], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        if not requests:
            return []
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        bar = make_bar(total=len(requests), desc="Processed prompts", unit="prompt", disable=use_tqdm is False)
        try:
            return self._run(self._collect_all(requests, lambda: bar.update(1)))
        finally:
            bar.close()

    async def _collect_all(self, requests: list[PreparedRequest], on_done: Callable[[], object]) -> list[RequestOutput]:
        # More than the engine can run at once wait there, so that it never runs dry, and the rest wait here, so that
        # its bounded queue never refuses any.
        scheduler = self.config.scheduler
        room = asyncio.Semaphore(max(1, min(4 * scheduler.max_num_seqs, scheduler.max_num_waiting or 1)))

        async def one(request: PreparedRequest) -> RequestOutput:
            async with room:
                output = await self._gateway.collect(request)
            on_done()
            return output

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(request)) for request in requests]
        return [task.result() for task in running]


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="argosy-llm", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], look: Callable[[], None] = lambda: None) -> T:
        """Wait for `work`, looking round each second; Ctrl-C calls it off. Of a group's errors one is raised."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            while not concurrent.futures.wait([future], timeout=_LOOK_SECONDS).done:
                look()
            return future.result()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        except concurrent.futures.CancelledError:
            raise RequestAborted() from None
        except KeyboardInterrupt:
            future.cancel()
            raise

    def call_off(self) -> None:
        """End what still runs in it."""
        if self._thread.is_alive():
            calling_off = asyncio.run_coroutine_threadsafe(_call_off_tasks(), self.loop)
            with contextlib.suppress(concurrent.futures.TimeoutError):  # they end with the thread
                calling_off.result(timeout=2 * _CALL_OFF_SECONDS)

    def stop(self) -> None:
        """Call off what still runs, and end the loop and the thread."""
        self.call_off()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout=10.0)
        if not self._thread.is_alive():
            self.loop.close()


async def _call_off_tasks() -> None:
    """Of this loop, but for this one: a task that is dropped with its loop complains on standard error."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=_CALL_OFF_SECONDS)


async def _connect(engine: "Engine", tokenizer: Tokenizer | None, config: ServingConfig) -> Gateway:
    client = await connect_engine(
        engine.address,
        engine.secret,
        timeout_seconds=_CONNECT_SECONDS,
        # Ray starts a driver that died again; a local one is gone for good
        patience_seconds=config.parallel.start_deadline_seconds if engine.name else 0.0,
        max_moves=config.scheduler.max_recoveries,
    )
    return Gateway(client, tokenizer, config)


def _close(loop: _LoopThread, engine: "Engine") -> None:
    with contextlib.ExitStack() as ends:  # each of them, whatever becomes of the one before
        ends.callback(loop.stop)
        ends.callback(engine.close)
        loop.call_off()  # who looks after drivers would miss this one, and at exit no thread can be had to look for it


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _refuse_lora(lora_request: object) -> None:
    if lora_request is not None:
        raise InvalidRequest("lora_request", lora_request, "adapters are not served yet; leave it out")
