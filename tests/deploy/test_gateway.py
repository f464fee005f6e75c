"""Text in, text out: what reaches the driver, what reaches the user, and what is called off."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import (
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestLost,
    UnknownModel,
    WeightError,
)
from argosy.cluster.protocol.messages import TokenDelta, TokenLogprobs
from argosy.cluster.protocol.sampling import FinishReason, SamplingParams, TokenParams
from argosy.deploy.gateway import Gateway
from argosy.deploy.outputs import RequestOutput
from argosy.deploy.scripted_engine import ScriptedClient, Submitted, delta, tokens_script
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(argosy.__file__).parent / "default_model"
TOKENIZER = Tokenizer.load(MODEL)


def ids(text: str) -> list[int]:
    """Without the beginning token."""
    return TOKENIZER.encode(text, add_special_tokens=False)


def gateway(client: ScriptedClient, tokenizer: Tokenizer | None = TOKENIZER, **settings: Any) -> Gateway:
    """A gateway for the embedded model over a scripted engine."""
    config = ServingConfig.from_mapping({"model": str(MODEL), "generation_config": "vllm", **settings})
    return Gateway(client, tokenizer, config)


def complete(client: ScriptedClient, prompt: str | list[int] = "Hi", **params: Any) -> RequestOutput:
    """One whole answer."""
    return asyncio.run(gateway(client).complete(prompt, SamplingParams(**params)))


def token_params(client: ScriptedClient, prompt: str | list[int] = "Hi", **params: Any) -> TokenParams:
    """What the driver was asked."""
    complete(client, prompt, **params)
    return client.submitted[-1].params


def test_a_whole_answer_with_all_that_users_of_vllm_expect() -> None:
    """Prompt, ids, text, figures, reasons, cached tokens."""
    words = ids(" there is")
    output = complete(ScriptedClient(tokens_script(words)), "Hello", n=2, logprobs=2, prompt_logprobs=1)
    assert output.prompt == "Hello"
    assert output.prompt_token_ids == TOKENIZER.encode("Hello")
    assert (output.finished, output.num_cached_tokens) == (True, 3)
    assert [(a.index, a.text, a.token_ids, a.finish_reason) for a in output.outputs] == [
        (index, " there is", words, "length") for index in range(2)
    ]
    position = output.outputs[0].logprobs[0]  # type: ignore[index]  # asked for
    assert position[words[0]] == (-1.0, 2, TOKENIZER.decode([words[0]]))
    assert position[words[0] + 1].rank == 1
    assert output.outputs[0].cumulative_logprob == -1.0 * len(words)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_the_driver_gets_numbers_only() -> None:
    """Everything that needs text or a model's files is worked out at the edge."""
    client = ScriptedClient()
    params = token_params(
        client,
        "Hi",
        max_tokens=None,
        bad_words=["cat"],
        logit_bias={5: 1000.0, "3": -1.0},
        stop_token_ids=[9],
        allowed_token_ids=[1, 2],
        prompt_logprobs=0,
    )
    assert params.max_tokens == 256 - len(TOKENIZER.encode("Hi"))
    assert set(params.bad_word_ids) == {tuple(ids("cat")), tuple(ids(" cat"))}
    assert params.logit_bias == ((3, -1.0), (5, 100.0))
    assert params.eos_token_ids == (TOKENIZER.eos_token_id, 6)
    assert not params.read_prefix_cache
    assert params.seed != token_params(client, "Hi").seed
    assert token_params(client, ignore_eos=True).eos_token_ids == ()
    assert token_params(client, max_tokens=9999).max_tokens < 256
    assert token_params(client, seed=7).seed == 7
    ids_seen = {asked.request_id for asked in client.submitted}
    assert len(ids_seen) == len(client.submitted)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], {}, InvalidRequest, "prompt"),
        ([4096], {}, InvalidRequest, "prompt"),
        ([-1], {}, InvalidRequest, "prompt"),
        ([True], {}, InvalidRequest, "prompt"),
        ([1.0], {}, InvalidRequest, "prompt"),
        ([2**40], {}, InvalidRequest, "prompt"),
        ("a\ud800", {}, InvalidRequest, "prompt"),
        ([5] * 256, {}, ContextTooLong, "prompt"),
        ("word " * 300, {}, ContextTooLong, "prompt"),
        ("x" * 1_000_000, {}, ContextTooLong, "prompt"),
        ("Hi", {"logprobs": 21}, InvalidRequest, "logprobs"),
        ("Hi", {"logprobs": -1}, InvalidRequest, "logprobs"),
        ("Hi", {"prompt_logprobs": 2**30}, InvalidRequest, "prompt_logprobs"),
        ("Hi", {"stop_token_ids": [4096]}, InvalidRequest, "stop_token_ids"),
        ("Hi", {"allowed_token_ids": [5000]}, InvalidRequest, "allowed_token_ids"),
        ("Hi", {"logit_bias": {4096: 1.0}}, InvalidRequest, "logit_bias"),
        ("Hi", {"logprob_token_ids": [1] * 129}, InvalidRequest, "logprob_token_ids"),
        ("Hi", {"bad_words": ["  "]}, InvalidRequest, "bad_words"),
        ("Hi", {"bad_words": ["x"] * 257}, InvalidRequest, "bad_words"),
        ("Hi", {"bad_words": ["\udc00"]}, InvalidRequest, "bad_words"),
        ("Hi", {"min_tokens": 400, "max_tokens": 500}, InvalidRequest, "min_tokens"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_driver_hears_of_it(
    prompt: Any, params: dict[str, Any], error: type[Exception], param: str
) -> None:
    """A bad request costs its sender only."""
    client = ScriptedClient()
    with pytest.raises(error) as caught:
        complete(client, prompt, **params)
    assert caught.value.param == param  # type: ignore[attr-defined]  # each of `error` has it
    assert client.submitted == []


def test_ids_end_at_the_smaller_of_vocabulary_and_logits() -> None:
    """A padded vocabulary has logits without tokens, a trimmed one tokens without logits: both ends are closed."""
    with pytest.raises(InvalidRequest, match="0 to 4095"):
        complete(ScriptedClient(vocab_size=5000), [4096])
    with pytest.raises(InvalidRequest, match="0 to 99"):
        complete(ScriptedClient(vocab_size=100, eos_token_ids=()), [100])


def test_a_stop_string_over_three_tokens_ends_the_answer_and_calls_off_the_rest() -> None:
    """The driver goes on making tokens until it hears of it; none of those is seen."""
    words = ids("The end. And more, and more.")
    client = ScriptedClient(tokens_script(words))
    output = complete(client, n=2, stop=["end. A"])
    for answer in output.outputs:
        assert (answer.text, answer.finish_reason, answer.stop_reason) == ("The ", "stop", "end. A")
        assert answer.token_ids == words[: len(answer.token_ids)]
        assert len(answer.token_ids) < len(words)
    assert client.submitted[0].aborted == [0, 1]


def test_the_end_token_is_counted_and_not_read() -> None:
    """As in vLLM: the ids hold it, the text does not, unless it was asked for."""
    script = tokens_script([*ids("Yes"), 6], finish=FinishReason.STOP)
    output = complete(ScriptedClient(script), skip_special_tokens=False).outputs[0]
    assert (output.text, output.token_ids[-1], output.stop_reason) == ("Yes", 6, None)
    shown = complete(ScriptedClient(script), skip_special_tokens=False, include_stop_str_in_output=True).outputs[0]
    assert shown.text == "Yes<|end_of_turn|>"


def test_a_stop_string_does_not_count_in_the_first_min_tokens() -> None:
    """`min_tokens` promises so many tokens."""
    words = ids("end end end")
    output = complete(ScriptedClient(tokens_script(words)), stop="end", min_tokens=len(ids("end"))).outputs[0]
    assert output.text == "end "


def test_whoever_stops_listening_frees_the_work() -> None:
    """A client goes away in mid-answer: its request is aborted at once, others are not touched."""
    client = ScriptedClient(tokens_script(range(100, 140)))

    async def main() -> None:
        async for _ in gateway(client).generate("Hi", SamplingParams(max_tokens=40)):
            break
        await asyncio.sleep(0)

    asyncio.run(main())
    assert client.submitted[0].aborted == [None]

    async def cancelled() -> None:
        client.gate = asyncio.Event()
        task = asyncio.create_task(gateway(client).complete("Hi", SamplingParams(max_tokens=40)))
        while not (len(client.submitted) == 2 and client.submitted[1].num_taken):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(cancelled(), 10))
    assert client.submitted[1].aborted == [None]


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("overloaded", Overloaded, 503),
        ("deadline_exceeded", DeadlineExceeded, 408),
        ("request_lost", RequestLost, 500),
        ("invalid_request_error", InvalidRequest, 400),
    ],
)
def test_an_error_of_the_driver_is_raised_as_the_class_that_the_driver_raised(
    code: str, kind: type[Exception], status: int
) -> None:
    """It travelled as code, sentence and status; a script catches it as what it is."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        yield [
            delta(
                finish_reason=FinishReason.ERROR, error_code=code, error_message="as it was said", retry_after_seconds=7
            )
        ]

    with pytest.raises(kind, match="as it was said") as caught:
        complete(ScriptedClient(script))
    assert caught.value.http_status == status  # type: ignore[attr-defined]  # each of `error` has it
    assert caught.value.retry_after_seconds == 7  # type: ignore[attr-defined]  # each of `error` has it


def test_one_failed_answer_of_several_ends_the_others() -> None:
    """Nobody waits for an answer that can't be given whole."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        yield [delta(0, [100]), delta(1, [], finish_reason=FinishReason.LOST, error_code="request_lost")]
        yield [delta(0, [101])]

    client = ScriptedClient(script)
    with pytest.raises(RequestLost):
        complete(client, n=2)
    assert client.submitted[0].aborted == [None]


def test_priorities_names_and_truncation() -> None:
    """Priority only where the policy is priority; a name that is served; the end of a long prompt is kept."""
    client = ScriptedClient()
    params = SamplingParams()
    with pytest.raises(InvalidRequest, match="priority"):
        asyncio.run(gateway(client).complete("Hi", params, priority=1))
    asyncio.run(gateway(client, policy="priority").complete("Hi", params, priority=1, cache_salt="s"))
    assert (client.submitted[-1].priority, client.submitted[-1].cache_salt) == (1, "s")
    door = gateway(client, served_model_name=["a", "b"])
    assert (door.check_model(None), door.check_model("b")) == ("a", "b")
    with pytest.raises(UnknownModel):
        door.check_model("c")
    asyncio.run(door.complete(list(range(10, 20)), params, truncate_prompt_tokens=3))
    assert client.submitted[-1].prompt_token_ids == [17, 18, 19]
    asyncio.run(door.complete(list(range(300)), params, truncate_prompt_tokens=-1, truncation_side="right"))
    assert client.submitted[-1].prompt_token_ids == list(range(255))
    text = "word " * 20_000  # so long that it is refused unread where nothing is cut off
    asyncio.run(door.complete(text, params, truncate_prompt_tokens=7))
    assert client.submitted[-1].prompt_token_ids == TOKENIZER.encode(text)[-7:]
    with pytest.raises(ContextTooLong, match=r"has at least [0-9]+ tokens and this model takes at most 256"):
        asyncio.run(door.complete(text, params))


def test_without_a_tokenizer_ids_go_in_and_out() -> None:
    """`skip_tokenizer_init`: no text at all, and a clear word where text is needed."""
    door = gateway(ScriptedClient(tokens_script([7, 8])), None)
    output = asyncio.run(door.complete([1, 2], SamplingParams()))
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [7, 8])
    for prompt, params in (("Hi", SamplingParams()), ([1], SamplingParams(stop="x"))):
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            asyncio.run(door.complete(prompt, params))


def test_the_models_own_sampling_defaults_are_read() -> None:
    """generation_config.json says temperature 0.7; "vllm" says that nobody asked it."""
    client = ScriptedClient()
    config = ServingConfig.from_mapping({"model": str(MODEL)})
    assert Gateway(client, TOKENIZER, config).default_sampling_params().temperature == 0.7
    assert gateway(client).default_sampling_params() == SamplingParams()


def test_figures_of_chosen_tokens_come_without_those_of_the_best() -> None:
    """`logprob_token_ids` alone: the sampled token and the chosen ones, which have no rank."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        yield [delta(0, [7], logprobs=[TokenLogprobs(3, [7, 9], [-1.0, -2.0])], finish_reason=FinishReason.LENGTH)]

    answer = complete(ScriptedClient(script), logprob_token_ids=[9]).outputs[0]
    assert answer.logprobs == [{7: (-1.0, 3, TOKENIZER.token_text(7)), 9: (-2.0, None, TOKENIZER.token_text(9))}]


def test_defaults_that_can_not_be_served_are_refused_at_start(tmp_path: Path) -> None:
    """A generation_config.json with a negative temperature would refuse every request that says nothing."""
    (tmp_path / "generation_config.json").write_text('{"temperature": -1.0}')
    config = ServingConfig.from_mapping({"model": str(tmp_path)})
    with pytest.raises(WeightError, match=r"generation_config\.json: temperature: -1\.0"):
        Gateway(ScriptedClient(), TOKENIZER, config)
