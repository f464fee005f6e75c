"""Where a product of a rank may send its numbers itself, instead of writing them for the kernel that sums them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Outlet:
    """An inbox of a group's ranks (`group_push`, which says what a turn is). The product says whether it `sent`."""

    bases_W: Tensor  # int64, the addresses of all ranks' buffers on this GPU
    counters: Tensor  # int32, the turns of rows that are over
    rank: int
    inbox_at: int  # byte of a buffer
    scatter: bool = False  # each row to the rank that sums it, row % ranks; else all to all
    sent: bool = False
