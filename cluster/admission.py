"""Whether a `GenerateRequest` may be served at all, before anything is allocated for it."""

from collections.abc import Iterable, Sequence

from argosy.cluster.protocol.errors import ContextTooLong, InvalidRequest
from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import MAX_LOGIT_BIAS, MAX_N, MAX_TOKEN_LIST, TokenParams

_MAX_SALT_CHARS = 1024
_MAX_PRIORITY = 2**31


def check_request(message: GenerateRequest, *, vocab_size: int, max_model_len: int, max_logprobs: int) -> None:
    """Raises `InvalidRequest` or `ContextTooLong` naming the field, the value and what would be accepted."""
    prompt, params = message.prompt_token_ids, message.params
    if not prompt:
        raise InvalidRequest("prompt", "[]", "must hold at least one token")
    if not 1 <= message.n <= MAX_N:
        raise InvalidRequest("n", message.n, f"must be from 1 to {MAX_N}")
    if params.max_tokens < 1:
        raise InvalidRequest("max_tokens", params.max_tokens, "must be at least 1")
    if not -_MAX_PRIORITY < message.priority < _MAX_PRIORITY:
        raise InvalidRequest("priority", message.priority, "must fit 32 bits")
    if len(message.cache_salt) > _MAX_SALT_CHARS:
        raise InvalidRequest("cache_salt", message.cache_salt, f"at most {_MAX_SALT_CHARS} characters")
    if message.deadline_seconds is not None and not message.deadline_seconds > 0:
        raise InvalidRequest("deadline_seconds", message.deadline_seconds, "must be above 0")
    if len(message.generated_token_ids) > message.n:
        raise InvalidRequest(
            "generated_token_ids", f"{len(message.generated_token_ids)} lists", "one for each of the n"
        )
    longest = max((len(ids) for ids in message.generated_token_ids), default=0)
    if len(prompt) + 1 > max_model_len or len(prompt) + longest > max_model_len:
        raise ContextTooLong(len(prompt) + longest, max_model_len)
    check_token_ids("prompt", prompt, vocab_size)
    for generated in message.generated_token_ids:
        check_token_ids("generated_token_ids", generated, vocab_size)
    _check_params(params, vocab_size, max_logprobs)


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """The one place where token ids from outside are compared with the width of the logits."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(field, wrong, f"token ids of this model are from 0 to {vocab_size - 1}")


def _check_params(params: TokenParams, vocab_size: int, max_logprobs: int) -> None:
    lists: tuple[tuple[str, Iterable[int]], ...] = (
        ("stop_token_ids", params.stop_token_ids),
        ("eos_token_ids", params.eos_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
        ("logprob_token_ids", params.logprob_token_ids),
        ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
        ("bad_words", [token_id for word in params.bad_word_ids for token_id in word]),
    )
    for field, given in lists:
        token_ids = tuple(given)
        limit = MAX_LOGIT_BIAS if field == "logit_bias" else MAX_TOKEN_LIST
        if len(token_ids) > limit:
            raise InvalidRequest(field, f"{len(token_ids)} ids", f"at most {limit} ids")
        check_token_ids(field, token_ids, vocab_size)
    if not -(2**63) <= params.seed < 2**63:
        raise InvalidRequest("seed", params.seed, "must fit 64 bits, signed")
    for field, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        check_num_logprobs(field, count, vocab_size, max_logprobs)


def check_num_logprobs(field: str, count: int | None, vocab_size: int, max_logprobs: int) -> None:
    """So many at each position; -1: the whole vocabulary. `max_logprobs` -1: any number. Raises `InvalidRequest`."""
    if count is None:
        return
    if count < -1:
        raise InvalidRequest(field, count, "must be from 0 on, or -1: the whole vocabulary")
    if max_logprobs != -1 and (vocab_size if count == -1 else count) > max_logprobs:
        whole = f"; the whole vocabulary is {vocab_size}" if count == -1 else ""
        raise InvalidRequest(field, count, f"at most {max_logprobs} (the server's --max-logprobs){whole}")
