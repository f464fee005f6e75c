"""One answer's tokens to text and figures: joins the detokenizer, the stop strings and the end tokens."""

from collections.abc import Sequence

from argosy.cluster.protocol.messages import TokenDelta, TokenLogprobs
from argosy.cluster.protocol.sampling import FinishReason, SamplingParams, TokenParams
from argosy.deploy.detokenizer import IncrementalDetokenizer, StopStrings
from argosy.deploy.outputs import Logprob, PositionLogprobs, TextDelta
from argosy.deploy.tokenizer import Tokenizer


class AnswerText:
    """One of a request's n answers: its text so far, as far as later text depends on it."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, token_params: TokenParams, index: int):
        self.ended = False
        self._index = index
        self._tokenizer = tokenizer
        self._text: IncrementalDetokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._text = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        self._stops = (
            StopStrings(params.stop, include_in_output=params.include_stop_str_in_output) if params.stop else None
        )
        self._ends = frozenset((*token_params.eos_token_ids, *token_params.stop_token_ids))
        self._keep_end = params.include_stop_str_in_output
        self._num_logprobs = 0 if params.logprobs is None and params.logprob_token_ids else params.logprobs
        self._num_prompt_logprobs = params.prompt_logprobs
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, delta: TokenDelta) -> TextDelta:
        """The text that these tokens make certain."""
        token_ids, finish, stop_reason = delta.token_ids, delta.finish_reason, delta.stop_token_id
        reason: int | str | None = stop_reason
        num_read = len(token_ids)
        if finish is FinishReason.STOP and not self._keep_end and token_ids and token_ids[-1] in self._ends:
            num_read -= 1  # the end token ends the text, it is not part of it
        text, found = "", None
        if self._text is not None:
            if self._stops is None:
                text = self._text.push(token_ids if num_read == len(token_ids) else token_ids[:num_read])
                if finish is not None:
                    text += self._text.flush()
            else:
                text, found, num_used = self._read_until_stop(token_ids[:num_read], finish is not None)
                if found is not None:
                    token_ids, finish, reason = token_ids[:num_used], FinishReason.STOP, found
        self._num_tokens += len(token_ids)
        self.ended = finish is not None
        out = TextDelta(index=self._index, text=text, token_ids=token_ids, num_cached_tokens=delta.num_cached_tokens)
        if self._num_logprobs is not None and delta.logprobs:
            out.logprobs = [self._figures(f, self._num_logprobs) for f in delta.logprobs[: len(token_ids)]]
        if delta.prompt_logprobs is not None:
            num = self._num_prompt_logprobs or 0
            out.prompt_logprobs = [self._figures(f, num) if f is not None else None for f in delta.prompt_logprobs]
        if finish is not None:
            out.finish_reason, out.stop_reason = finish.value, reason
            out.timing, out.num_preemptions = delta.timing, delta.num_preemptions
            out.num_recoveries = delta.num_recoveries
        return out

    def _read_until_stop(self, token_ids: Sequence[int], is_last: bool) -> tuple[str, str | None, int]:
        """(text, stop string found, tokens used). Stop strings don't count in text of the first `min_tokens` tokens."""
        assert self._text is not None
        assert self._stops is not None
        parts = []
        for place, token_id in enumerate(token_ids):
            text = self._text.push((token_id,))
            if self._num_tokens + place < self._min_tokens:
                parts.append(text)
                continue
            text, found = self._stops.feed(text)
            parts.append(text)
            if found is not None:
                return "".join(parts), found, place + 1
        if is_last:
            text, found = self._stops.feed(self._text.flush())
            parts.append(text)
            if found is not None:
                return "".join(parts), found, len(token_ids)
            parts.append(self._stops.flush())
        return "".join(parts), None, len(token_ids)

    def _figures(self, figures: TokenLogprobs, num_best: int) -> PositionLogprobs:
        """Token id -> logprob, rank, text: the token itself first, then the best, then those that were asked for."""
        name = self._tokenizer.token_text if self._tokenizer is not None else _no_text
        ids, logprobs = figures.top_ids, figures.top_logprobs
        found = {ids[0]: Logprob(logprobs[0], figures.rank, name(ids[0]))}
        if num_best < 0:
            num_best = len(ids) - 1
        for place in range(1, len(ids)):
            if ids[place] not in found:
                rank = place if place <= num_best else None
                found[ids[place]] = Logprob(logprobs[place], rank, name(ids[place]))
        return found


def _no_text(token_id: int) -> str | None:
    return None
