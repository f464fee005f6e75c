"""One step: put together row by row, then sent as a `SchedulerOutput` and remembered until its answer comes."""

from collections.abc import Sequence

from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.request import Request, RequestStatus


class Step:
    """A step in flight: whose row is where, and who gets a token.

    `handles` are those of the rows when the step was made; meanwhile they may belong to others. Who decodes is in one
    of `num_groups` steps.
    """

    __slots__ = ("handles", "num_decodes", "num_groups", "rows", "sampling", "step_id")

    def __init__(self, output: SchedulerOutput, rows: Sequence[Request], sampling: Sequence[Request], num_decodes: int):
        self.step_id, self.handles = output.step_id, output.rows
        self.rows, self.sampling, self.num_decodes = rows, sampling, num_decodes
        self.num_groups = 1


class Draft:
    """The step that is being put together. `budget` is how many tokens it may still compute."""

    __slots__ = ("budget", "copies", "decodes", "grown", "has_preempted", "new", "prefills")

    def __init__(self, budget: int):
        self.budget = budget
        self.decodes: list[Request] = []
        self.prefills: list[tuple[Request, int, bool]] = []  # request, tokens, whether more is to come
        self.grown: list[tuple[Request, list[int]]] = []
        self.new: list[NewRequest] = []
        self.copies: list[tuple[int, int]] = []
        self.has_preempted = False

    def drop_preempted(self) -> None:
        """Take out who was preempted after it was counted in. (Prefills go in order: none of theirs is counted yet.)"""
        self.decodes = [request for request in self.decodes if request.is_decoding]
        self.grown = [pair for pair in self.grown if pair[0].status is RequestStatus.RUNNING]

    def complete(
        self, step_id: int, epoch: int, decode_rows: Sequence[int], given_back: Sequence[int]
    ) -> tuple[SchedulerOutput, Step]:
        """The message to the ranks, and what to remember. `decode_rows` are the handles of `decodes`."""
        new_blocks = tuple((request.handle, added) for request, added in self.grown)
        if not self.prefills:
            output = SchedulerOutput(
                step_id=step_id,
                epoch=epoch,
                rows=decode_rows,
                new_blocks=new_blocks,
                finished=given_back,
            )
            return output, Step(output, self.decodes, self.decodes, len(self.decodes))
        prefills = sorted(self.prefills, key=lambda row: row[1] > 1)  # rows of one token first
        num_decodes = len(self.decodes)
        rows = [*self.decodes, *(request for request, _, _ in prefills)]
        num_tokens = [1] * num_decodes + [count for _, count, _ in prefills]
        output = SchedulerOutput(
            step_id=step_id,
            epoch=epoch,
            rows=[*decode_rows, *(request.handle for request, _, _ in prefills)],
            num_tokens=num_tokens if len(num_tokens) != sum(num_tokens) else (),
            partial=[num_decodes + place for place, row in enumerate(prefills) if row[2]],
            new_requests=self.new,
            new_blocks=new_blocks,
            block_copies=self.copies,
            finished=given_back,
        )
        sampling = [*self.decodes, *(request for request, _, is_partial in prefills if not is_partial)]
        return output, Step(output, rows, sampling, num_decodes)
