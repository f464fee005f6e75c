"""`LLM` over an engine that is a few lines long: order, forms, refusals, ends."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from argosy import LLM, SamplingParams
from argosy.cluster.protocol.errors import ChannelClosed, ConfigError, ContextTooLong, InvalidRequest
from argosy.cluster.protocol.messages import EngineInfo, StatsReply, TokenDelta
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.deploy import launch, offline

INFO = EngineInfo(
    model="m", max_model_len=64, vocab_size=4096, num_blocks=9, block_size=16, tensor_parallel_size=1,
    pipeline_parallel_size=1, dtype="float32", max_logprobs=20, max_num_seqs=4,
)  # fmt: skip


class EchoStream:
    """Answers with the prompt's first token, as often as asked for; the shortest prompts come last."""

    def __init__(self, prompt: Sequence[int], params: TokenParams):
        self.prompt, self.params = prompt, params

    async def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        await asyncio.sleep(0.02 / len(self.prompt))
        token_ids = [self.prompt[0]] * self.params.max_tokens
        yield [TokenDelta(1, 0, token_ids, FinishReason.LENGTH)]

    def abort(self, index: int | None = None) -> None:
        """Nothing runs."""


class EchoClient:
    """What `LLM` needs of `DriverClient`."""

    info, closed = INFO, False

    def __init__(self) -> None:
        self.submitted: list[list[int]] = []
        self.passes: list[int] = []  # requests that came in one pass of the event loop
        self._in_pass = False

    def submit(self, prompt: Sequence[int], params: TokenParams, **options: object) -> EchoStream:
        self.submitted.append(list(prompt))
        if not self._in_pass:
            self._in_pass = True
            self.passes.append(0)
            asyncio.get_running_loop().call_soon(self._end_pass)
        self.passes[-1] += 1
        return EchoStream(prompt, params)

    def _end_pass(self) -> None:
        self._in_pass = False

    async def stats(self) -> StatsReply:
        return StatsReply(values={"argosy_requests_running": 0.0})

    async def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """No processes: a client that echoes, and an engine that remembers being closed."""
    client, closed = EchoClient(), []

    async def connect(address: str, secret: str, **_: Any) -> Any:
        return client

    fake = SimpleNamespace(name="", address="", secret="", info=INFO, close=lambda: closed.append(True), client=client)
    fake.has_lost_ray, fake.lost_part = False, lambda: ""
    fake.closed = closed
    monkeypatch.setattr(offline, "connect_engine", connect)
    monkeypatch.setattr(launch, "launch_engine", lambda config, **options: fake)
    yield fake
    assert closed, "an LLM left its engine running"


def test_results_come_in_the_order_of_the_prompts(engine: SimpleNamespace) -> None:
    """The second ends first."""
    with LLM() as llm:
        outputs = llm.generate([[5], [6, 6, 6, 6]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [[5, 5], [6, 6]]
    assert all(output.finished for output in outputs)


def test_what_is_asked_at_once_is_sent_at_once(engine: SimpleNamespace) -> None:
    """One pass of the event loop, which is what a client sends together (`cluster.driver_client`)."""
    with LLM() as llm:
        llm.generate([[place + 1] for place in range(50)], SamplingParams(max_tokens=1), use_tqdm=False)
        llm.generate(["one", "two"], SamplingParams(max_tokens=1), use_tqdm=False)
    assert engine.client.passes == [50, 2]


def test_one_wrong_prompt_and_none_runs(engine: SimpleNamespace) -> None:
    """The last of three is too long: nothing was submitted for the first two."""
    with LLM() as llm:
        with pytest.raises(ContextTooLong):
            llm.generate([[5], [6], [7] * 64], use_tqdm=False)
        with pytest.raises(InvalidRequest, match=r"prompts\[1\]"):
            llm.generate(["fine", 3], use_tqdm=False)
        with pytest.raises(InvalidRequest, match="adapters"):
            llm.generate("fine", lora_request=object())
    assert engine.client.submitted == []


def test_params_one_each_and_many_prompts_than_the_engine_holds(engine: SimpleNamespace) -> None:
    """More prompts than the engine's queue takes wait on this side."""
    with LLM(max_num_seqs=1, max_num_waiting=1) as llm:
        params = [SamplingParams(max_tokens=1 + place % 3) for place in range(40)]
        outputs = llm.generate([[place + 1] for place in range(40)], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + place % 3 for place in range(40)]


def test_chat_goes_through_the_template(engine: SimpleNamespace) -> None:
    """The model that ships has one."""
    with LLM() as llm:
        output = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1), use_tqdm=False)[0]
        assert "hi" in (output.prompt or "")
        tokenizer = llm.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("hello there"), skip_special_tokens=True) == "hello there"
        assert llm.reset_prefix_cache()
        assert llm.get_metrics()[0].name == "argosy_requests_running"
        assert llm.get_world_size() == 1


def test_it_works_where_a_loop_already_runs(engine: SimpleNamespace) -> None:
    """A notebook."""

    async def cell() -> int:
        with LLM() as llm:
            return len(llm.generate("hello", SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].token_ids)

    assert asyncio.run(cell()) == 3


def test_after_the_end_it_says_so(engine: SimpleNamespace) -> None:
    """Closing twice is fine; asking after is a sentence, not a hang."""
    llm = LLM()
    llm.close()
    llm.shutdown()
    with pytest.raises(ChannelClosed, match="was closed"):
        llm.generate([[1]], use_tqdm=False)
    assert engine.closed == [True]


def test_what_only_others_have_is_told_by_what_it_is_for(engine: SimpleNamespace) -> None:
    """A script for vLLM learns what to write instead; `hasattr` and `getattr` go on saying that it isn't there."""
    with LLM() as llm:
        with pytest.raises(AttributeError, match="LLM has no embed: poolings are not served yet"):
            llm.embed(["a"])
        with pytest.raises(AttributeError, match=r"LLM has no generat$"):
            llm.generat("a")
        assert not hasattr(llm, "sleep")


def test_arguments_are_checked_before_anything_starts() -> None:
    """Typos, unknown backends."""
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM(max_model_length=4)
    with pytest.raises(ConfigError, match="'ray' or 'mp'"):
        LLM(distributed_executor_backend="mpi")


def test_the_loop_ends_with_nothing_left_in_it() -> None:
    """What still waits there is called off, so that no dropped task writes to somebody's terminal."""
    thread = offline._LoopThread()

    async def start() -> asyncio.Task[None]:
        return asyncio.create_task(asyncio.sleep(1000.0), name="waits for ever")

    waiting = thread.run(start())
    thread.stop()
    assert waiting.cancelled()
    assert thread.loop.is_closed()


def test_an_engine_is_closed_however_calling_off_ends() -> None:
    """Whoever presses Ctrl-C while tasks are called off must not leave ranks on the cards."""
    done: list[str] = []

    def call_off() -> None:
        done.append("call off")
        raise KeyboardInterrupt

    loop: Any = SimpleNamespace(call_off=call_off, stop=lambda: done.append("stop"))
    engine: Any = SimpleNamespace(close=lambda: done.append("close"))
    with pytest.raises(KeyboardInterrupt):
        offline._close(loop, engine)
    assert done == ["call off", "close", "stop"]
