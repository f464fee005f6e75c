"""The sum over a group with the addition and the norm: arithmetic here, with all ranks' buffers on one device.

How ranks wait for each other can only be seen on several cards: `tests/workers/test_group_sum_gpu.py`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import group_push, group_sum, ops, reference

Near = Callable[[Tensor, Tensor], None]


class Group:
    """Buffers of all ranks: flags (unused), parts, results, choices."""

    def __init__(self, world: int, rows: int, width: int, dtype: torch.dtype, device: torch.device):
        self.part_bytes = -(-rows * width * dtype.itemsize // 256) * 256
        self.at = group_sum.FLAG_BYTES
        size = self.at + 2 * self.part_bytes + world * rows * 8
        self.buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(world)]
        self.bases_W = torch.tensor([b.data_ptr() for b in self.buffers], dtype=torch.int64, device=device)
        self.counters = torch.zeros(group_sum.MAX_PROGRAMS, dtype=torch.int32, device=device)
        self.rows, self.width, self.dtype = rows, width, dtype

    def view(self, rank: int, at: int) -> Tensor:
        size = self.rows * self.width * self.dtype.itemsize
        return self.buffers[rank][at : at + size].view(self.dtype).view(self.rows, self.width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("world", "rows", "width"), [(2, 1, 64), (2, 5, 200), (4, 3, 96), (3, 7, 129)])
def test_every_rank_gets_the_norm_of_the_sum(
    world: int, rows: int, width: int, dtype: torch.dtype, device: torch.device, assert_near: Near
) -> None:
    group = Group(world, rows, width, dtype, device)
    parts = [torch.randn(rows, width, dtype=dtype, device=device) for _ in range(world)]
    for rank, part in enumerate(parts):
        group.view(rank, group.at).copy_(part)
    before, weight = torch.randn(rows, width, dtype=dtype, device=device), torch.randn(width, device=device).to(dtype)
    total = torch.stack([part.float() for part in parts]).sum(0)
    residuals = [before.clone() for _ in range(world)]

    made = [
        group_sum.sum_add_norm(
            group.bases_W, group.counters, rank, residuals[rank], weight, 1e-5, parts_bytes=group.at, meet=False
        )
        for rank in range(world)
    ]

    want_residual = (before.float() + total).to(dtype)
    for rank in range(world):
        assert_near(residuals[rank], want_residual)
        assert_near(made[rank], reference.rms_norm(want_residual, weight, 1e-5))
        assert torch.equal(made[rank], made[0]), "ranks must agree to the last bit"


@pytest.mark.parametrize(("world", "rows", "width"), [(2, 9, 64), (4, 10, 72)])
@pytest.mark.parametrize("normed", [True, False])
def test_ranks_may_share_the_rows_out(
    world: int, rows: int, width: int, normed: bool, device: torch.device, assert_near: Near
) -> None:
    """Each rank's launch writes its rows to all; after the last one everybody has everything."""
    dtype = torch.float16
    group = Group(world, rows, width, dtype, device)
    parts = [torch.randn(rows, width, dtype=dtype, device=device) for _ in range(world)]
    for rank, part in enumerate(parts):
        group.view(rank, group.at).copy_(part)
    before, weight = torch.randn(rows, width, dtype=dtype, device=device), torch.randn(width, device=device).to(dtype)
    residuals = [before.clone() for _ in range(world)]
    shared_at = group.at + group.part_bytes

    made = [
        group_sum.sum_add_norm(
            group.bases_W, group.counters, rank, residuals[rank], weight if normed else None, 1e-5,
            parts_bytes=group.at, shared_bytes=shared_at, shared_TD=group.view(rank, shared_at), meet=False,
        )
        for rank in range(world)
    ]  # fmt: skip

    want = (before.float() + torch.stack([part.float() for part in parts]).sum(0)).to(dtype)
    for rank in range(world):
        assert_near(residuals[rank][rank::world], want[rank::world])
        assert torch.equal(residuals[rank][(rank + 1) % world :: world], before[(rank + 1) % world :: world])
        assert_near(made[rank], reference.rms_norm(want, weight, 1e-5) if normed else want)


@pytest.mark.parametrize("normed", [True, False])
def test_parts_that_were_copied_here_are_summed_added_and_normed(
    normed: bool, device: torch.device, assert_near: Near
) -> None:
    own, before = (torch.randn(5, 72, device=device).half() for _ in range(2))
    staged = torch.randn(3, 9, 72, device=device).half()[:, :5]  # the room is for more rows
    residual, weight, out = before.clone(), torch.randn(72, device=device).half(), torch.empty_like(own)
    group_sum.add_staged_norm(own, staged, residual, weight if normed else None, 1e-5, out)
    want = (before.float() + own.float() + staged.float().sum(0)).half()
    assert_near(residual, want)
    assert_near(out, reference.rms_norm(want, weight, 1e-5) if normed else want)


def test_a_residual_can_begin_with_the_sum(device: torch.device, assert_near: Near) -> None:
    group = Group(2, 4, 40, torch.float32, device)
    for rank in range(2):
        group.view(rank, group.at).copy_(torch.randn(4, 40, device=device))
    want = group.view(0, group.at) + group.view(1, group.at)
    residual, weight = torch.full((4, 40), 1e9, device=device), torch.ones(40, device=device)
    group_sum.sum_add_norm(
        group.bases_W, group.counters, 0, residual, weight, 1e-5, parts_bytes=group.at, add=False, meet=False
    )
    assert_near(residual, want)


def test_the_most_likely_of_all_ranks_is_chosen_by_all(device: torch.device) -> None:
    """Ties go to the lowest id, a row without a number is known to all, and ids are those of the whole vocabulary."""
    world, rows, share = 3, 70, 50
    group = Group(world, rows, 8, torch.float16, device)
    logits = torch.randn(rows, world * share, dtype=torch.float16, device=device)
    logits[1, 7] = logits[1, 120] = 60.0  # a tie between ranks
    logits[2, 60] = float("nan")
    logits[3, :] = float("-inf")
    chosen: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):  # without waiting, a rank sees what the others left in the round before
        chosen = []
        for rank in range(world):
            own = logits[:, rank * share : (rank + 1) * share]
            chosen.append(
                group_sum.choose_over_group(
                    group.bases_W,
                    group.counters,
                    rank,
                    own,
                    own.float().argmax(-1),
                    rank * share,
                    place_bytes=group.at + 2 * group.part_bytes,
                    max_rows=rows,
                    meet=False,
                )
            )
    ordinary = [row for row in range(rows) if row not in (2, 3)]
    want = logits.float().argmax(-1)
    for ids, values in chosen:
        assert torch.equal(ids[ordinary], want[ordinary])
        assert torch.equal(values[ordinary], logits.float().max(-1).values[ordinary])
        assert values[2].isnan()
        assert values[3] == float("-inf")


def test_a_token_of_another_rank_is_a_row_of_zeros(device: torch.device) -> None:
    table = torch.randn(10, 33, device=device)
    out = torch.full((4, 33), 7.0, device=device)
    ids = torch.tensor([20, 29, 19, 30], device=device)
    ops.embed_share(ids, table, 20, out)
    assert torch.equal(out[:2], table[[0, 9]])
    assert not out[2:].any()
    if device.type == "cpu":
        from argosy.kernels import embedding

        by_kernel = embedding.embed_share(ids, table, 20, torch.full((4, 33), 7.0))
        assert torch.equal(by_kernel, out)


@pytest.mark.parametrize(("world", "num_experts", "top_k", "scatters"), [(2, 8, 2, False), (4, 6, 3, True)])
def test_parts_of_ranks_without_experts_of_a_token_are_not_read(
    world: int, num_experts: int, top_k: int, scatters: bool, device: torch.device, assert_near: Near
) -> None:
    """What they hold may be anything, here NaN; a rank of six experts over four has one or two."""
    rows, width, dtype = 7, 72, torch.float16
    group = Group(world, rows, width, dtype, device)
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(rows)]).int().to(device)
    owners = torch.empty(num_experts, dtype=torch.int64, device=device)
    for rank in range(world):
        owners[rank * num_experts // world : (rank + 1) * num_experts // world] = rank
    total = torch.zeros(rows, width, device=device)
    for rank in range(world):
        part = torch.randn(rows, width, dtype=dtype, device=device)
        asked = (owners[ids.long()] == rank).any(1)
        total[asked] += part[asked].float()
        group.view(rank, group.at).copy_(part.masked_fill(~asked[:, None], float("nan")))
    before, weight = torch.randn(rows, width, dtype=dtype, device=device), torch.randn(width, device=device).to(dtype)
    residuals = [before.clone() for _ in range(world)]
    shared_at = group.at + group.part_bytes

    made = [
        group_sum.sum_add_norm(
            group.bases_W, group.counters, rank, residuals[rank], weight, 1e-5, parts_bytes=group.at,
            shared_bytes=shared_at if scatters else None, shared_TD=group.view(rank, shared_at) if scatters else None,
            meet=False, asked=(ids, num_experts),
        )
        for rank in range(world)
    ]  # fmt: skip

    want = reference.rms_norm((before.float() + total).to(dtype), weight, 1e-5)
    for rank in range(world):
        assert_near(made[rank], want)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize(
    ("world", "rows", "width", "normed", "add"),
    [(2, 1, 64, True, True), (2, 5, 130, True, False), (4, 6, 96, False, True), (3, 64, 40, True, True)],
)
def test_words_that_bring_their_turn_give_the_same_sum(
    world: int, rows: int, width: int, normed: bool, add: bool, scatter: bool, device: torch.device, assert_near: Near
) -> None:
    """Without waiting, a rank sees what the others sent in the round before; so the second round counts."""
    dtype = torch.float16
    at = 256
    boxes = [
        torch.zeros(at + group_push.inbox_bytes(world, width), dtype=torch.uint8, device=device) for _ in range(world)
    ]
    bases_W = torch.tensor([box.data_ptr() for box in boxes], dtype=torch.int64, device=device)
    counters = [torch.zeros(group_sum.MAX_PROGRAMS, dtype=torch.int32, device=device) for _ in range(world)]
    parts = [torch.randn(rows, width, dtype=dtype, device=device) for _ in range(world)]
    before, weight = torch.randn(rows, width, dtype=dtype, device=device), torch.randn(width, device=device).to(dtype)
    for _ in range(2 + scatter):  # parts, then results
        residuals = [before.clone() for _ in range(world)]
        made = [
            group_push.push_add_norm(
                bases_W, counters[rank], rank, parts[rank], residuals[rank], weight if normed else None, 1e-5,
                inbox_at=at, scatter=scatter, add=add, wait=False,
            )
            for rank in range(world)
        ]  # fmt: skip
    total = torch.stack([part.float() for part in parts]).sum(0)
    want = (total + before.float() if add else total).to(dtype)
    for rank in range(world):
        own = slice(rank, None, world) if scatter else slice(None)
        assert_near(residuals[rank][own], want[own])
        if scatter and rows > 1:
            assert torch.equal(residuals[rank][(rank + 1) % world :: world], before[(rank + 1) % world :: world])
        assert_near(made[rank], reference.rms_norm(want, weight, 1e-5) if normed else want)
        assert torch.equal(made[rank], made[0]), "ranks must agree to the last bit"
        assert (counters[rank][:rows] == 2 + scatter).all()
        assert not counters[rank][rows:].any()


def test_words_carry_16_bits_and_an_even_width() -> None:
    assert group_push.suits(64, 4096, torch.bfloat16)
    assert not group_push.suits(65, 4096, torch.bfloat16)
    assert not group_push.suits(1, 4096, torch.float32)
    assert not group_push.suits(1, 129, torch.float16)
