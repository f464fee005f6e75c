"""How much of the work the next step takes, so that all pipeline stages are busy with steps of the same size.

    stage 0   | A | B | A | B |         A and B are halves of the requests that decode. When stage 0 comes back to A,
    stage 1       | A | B | A | B |     its tokens have just left stage 1, and come over the device's own wire.

A request that decodes is in every `num_stages`th step: sooner, stage 0 would wait for its token; later, the weights
would be read for smaller groups. Prompts are cut so that neighbouring steps carry the same share of them: a step of
8000 tokens between steps of 30 leaves every other stage idle. Where all places are taken, prompts come one by one: cut
into smaller pieces, they go beside the rows of many steps in a row, and fill what such steps are padded to.
"""

from collections.abc import Sequence
from typing import Final

from argosy.cluster.request import Request

MIN_PIECE: Final = 512
"""Prompt tokens that aren't cut further: so many cost a stage little more than reading its weights does."""
SMALL_PIECE: Final = 64
"""The same beside rows that decode, for whose tokens the weights are read anyway. Ranks record such steps."""
SMALL_PIECE_ROWS: Final = 8
"""Rows of a step beside which pieces are so small: with fewer of them a prompt's own wait counts more."""
STEP_UNIT: Final = 64
"""Ranks pad the tokens of a recorded step with prompts to a multiple of so many."""
PIECES_PER_STAGE: Final = 8
"""With c pieces over p stages a prompt takes (c + p - 1) / (c p) of its time on one: 56 % with 8 on 2. And where
prompts come and go, a stage waits for what its step and the other's differ by: a piece."""


class MicroBatches:
    """The shares of `num_stages` > 1 stages. With `is_async` steps needn't wait until the driver knows a token."""

    def __init__(self, num_stages: int, max_tokens: int, *, is_async: bool):
        self.num_stages = num_stages
        self._max_tokens, self._is_async = max_tokens, is_async
        self._piece = self._num_left = 0  # tokens: of a piece, and of the prompts that are cut like this

    def num_groups(self, num_decoding: int, *, has_prompts: bool) -> int:
        """Into how many steps the requests that decode are split: one alone is in every step, unless prompts fill
        the steps between."""
        return max(1, min(self.num_stages, num_decoding + has_prompts))

    def take(
        self, decoding: Sequence[Request], next_step_id: int, applied_step_id: int, *, has_prompts: bool
    ) -> list[Request]:
        """Whose turn it is, in the order of `decoding`."""
        num_groups = self.num_groups(len(decoding), has_prompts=has_prompts)
        latest = max(next_step_id - num_groups, applied_step_id) if self._is_async else applied_step_id
        idle = [request for request in decoding if request.last_step_id <= latest]
        if not idle and self._is_async and not has_prompts:
            idle = list(decoding)  # all of them are in the last step: halve them now
        share = -(-len(decoding) // num_groups)
        if len(idle) > share:  # those who waited longest; the order stays, so that steady groups have steady rows
            cut = sorted(request.last_step_id for request in idle)[share - 1]
            sooner = sum(request.last_step_id < cut for request in idle)
            idle = _first_of(idle, cut, share - sooner)
        return idle

    def prompt_budget(self, num_prompt_tokens: int, num_decoding: int, num_rows: int = 0) -> int:
        """How many tokens the step may take for prompts, of so many that could be computed now (more than all stages'
        share may be cut off), with so many requests that decode, of which this step has `num_rows`. Not fewer until
        these are through, but for what fills the step."""
        if not num_prompt_tokens:
            self._piece = self._num_left = 0
            return self._max_tokens
        piece = -(-num_prompt_tokens // (self.num_stages * PIECES_PER_STAGE))
        if piece >= self._piece or self._num_left <= 0:
            self._piece, self._num_left = piece, num_prompt_tokens
        taken = max(self._piece, self._least_piece(num_decoding))
        if num_rows >= SMALL_PIECE_ROWS and taken > SMALL_PIECE:  # more wait: what would be padding is theirs
            taken += -(num_rows + taken) % STEP_UNIT
        taken = min(taken, self._max_tokens)
        self._num_left -= taken
        return taken

    def _least_piece(self, num_decoding: int) -> int:
        return SMALL_PIECE if -(-num_decoding // self.num_stages) >= SMALL_PIECE_ROWS else MIN_PIECE

    @property
    def most_tokens(self) -> int:
        """Waiting tokens beyond so many make no difference to `prompt_budget`."""
        return self._max_tokens * self.num_stages * PIECES_PER_STAGE


def _first_of(idle: list[Request], cut: int, num_at_cut: int) -> list[Request]:
    """All who were last scheduled before step `cut`, and the first of those who were in it."""
    taken = []
    for request in idle:
        if request.last_step_id < cut:
            taken.append(request)
        elif request.last_step_id == cut and num_at_cut:
            num_at_cut -= 1
            taken.append(request)
    return taken
