"""The batch's tensors beside those that a slow reader of the same step messages would make."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.workers.input_batch import InputBatch

BLOCK_SIZE, MAX_SEQS, MAX_LEN = 4, 8, 60
PARAMS = TokenParams(max_tokens=10)


def make_batch(**changes: Any) -> InputBatch:
    """A small one on the CPU."""
    settings = {
        "max_num_seqs": MAX_SEQS, "max_model_len": MAX_LEN, "max_num_batched_tokens": 64,
        "block_size": BLOCK_SIZE, "vocab_size": 100, "device": torch.device("cpu"),
    }  # fmt: skip
    return InputBatch(**{**settings, **changes})


@dataclass
class Twin:
    """What the test itself knows of one request."""

    tokens: list[int]
    num_prompt: int
    computed: int
    blocks: list[int] = field(default_factory=list)


def naive_step(twins: dict[int, Twin], output: SchedulerOutput) -> dict[str, list]:
    """Token by token."""
    tokens, positions, slots, starts, lengths, tables, sampling = [], [], [], [0], [], [], []
    for place, handle in enumerate(output.rows):
        twin, count = twins[handle], output.num_tokens[place] if output.num_tokens else 1
        for p in range(twin.computed, twin.computed + count):
            tokens.append(twin.tokens[p])
            positions.append(p)
            slots.append(twin.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE)
        starts.append(len(tokens))
        lengths.append(twin.computed + count)
        tables.append(twin.blocks)
        if place not in output.partial:
            sampling.append(place)
    return {
        "tokens": tokens,
        "positions": positions,
        "slots": slots,
        "starts": starts,
        "lengths": lengths,
        "tables": tables,
        "sampling": sampling,
    }


def random_step(rng: random.Random, twins: dict[int, Twin], step_id: int) -> SchedulerOutput:
    """Some requests end, some come, and the rest go on by a token or a chunk."""
    finished = [h for h in list(twins) if rng.random() < 0.15 or len(twins[h].tokens) >= MAX_LEN - 1]
    for h in finished:
        del twins[h]
    new_requests, new_blocks = [], []
    for h in range(MAX_SEQS):
        if h not in twins and rng.random() < 0.3:
            tokens = [rng.randrange(100) for _ in range(rng.randint(1, 30))]
            computed = rng.randrange(len(tokens))
            twins[h] = Twin(tokens, rng.randint(1, len(tokens)), computed)
            twins[h].blocks = [rng.randrange(500) for _ in range(-(-len(tokens) // BLOCK_SIZE))]
            new_requests.append(
                NewRequest(h, list(tokens), twins[h].num_prompt, computed, list(twins[h].blocks), PARAMS)
            )
    rows = [h for h in twins if rng.random() < 0.8]
    rng.shuffle(rows)
    counts = {h: rng.randint(1, min(7, len(twins[h].tokens) - twins[h].computed)) for h in rows}
    rows.sort(key=lambda h: counts[h] > 1)
    for h in rows:
        missing = -(-(twins[h].computed + counts[h]) // BLOCK_SIZE) - len(twins[h].blocks)
        if missing > 0:
            added = [rng.randrange(500) for _ in range(missing)]
            twins[h].blocks += added
            new_blocks.append((h, added))
    partial = [i for i, h in enumerate(rows) if twins[h].computed + counts[h] < len(twins[h].tokens)]
    num_tokens = [] if all(counts[h] == 1 for h in rows) else [counts[h] for h in rows]
    return SchedulerOutput(
        step_id=step_id, epoch=0, rows=rows, num_tokens=num_tokens, partial=partial, new_requests=new_requests,
        new_blocks=new_blocks, finished=finished,
    )  # fmt: skip


def test_random_schedules_give_the_tensors_that_a_slow_reader_would_make() -> None:
    """Hundreds of steps of chunks, decodes, arrivals and ends; handles change hands all the time."""
    rng = random.Random(11)
    batch, twins = make_batch(), {}
    num_decode_steps = 0
    for step_id in range(400):
        output = random_step(rng, twins, step_id)
        batch.apply(output)
        if not output.rows:
            continue
        expected = naive_step(twins, output)
        inputs = batch.build(output)
        metadata = inputs.metadata
        assert inputs.token_ids_T.tolist() == expected["tokens"]
        assert inputs.positions_T.tolist() == expected["positions"]
        assert metadata.slot_mapping_T.tolist() == expected["slots"]
        assert metadata.query_start_R1.tolist() == expected["starts"]
        assert metadata.context_len_R.tolist() == expected["lengths"]
        assert metadata.max_context_len == max(expected["lengths"])
        counts = np.diff(expected["starts"])
        assert metadata.num_context_tokens == sum(expected["lengths"][metadata.num_decode_rows :])
        assert metadata.max_query_len == counts.max()
        assert all(counts[: metadata.num_decode_rows] == 1)
        assert metadata.num_decode_rows == int((counts == 1).sum())
        for row, blocks in enumerate(expected["tables"]):
            used = -(-expected["lengths"][row] // BLOCK_SIZE)
            assert metadata.block_table_RB[row, :used].tolist() == blocks[:used]
        rows = list(range(len(output.rows))) if inputs.sample_rows_S is None else inputs.sample_rows_S.tolist()
        assert rows == expected["sampling"]
        last = [expected["starts"][r + 1] - 1 for r in rows]
        hidden = list(range(len(rows))) if inputs.hidden_rows_S is None else inputs.hidden_rows_S.tolist()
        assert hidden == last
        assert inputs.sample_positions_S.tolist() == [expected["lengths"][r] for r in rows]
        num_decode_steps += inputs.num_tokens_R is None
        batch.advance(inputs)
        sampled = np.array([rng.randrange(100) for _ in rows])
        batch.append_sampled(inputs, sampled)
        for place, handle in enumerate(output.rows):
            twins[handle].computed = expected["lengths"][place]
        for row, token_id in zip(rows, sampled.tolist(), strict=True):
            twins[output.rows[row]].tokens.append(token_id)
        batch.check()
    assert num_decode_steps > 20


def test_the_rows_of_a_steady_batch_are_known_as_such() -> None:
    """What was gathered for the rows of the last step may be used again only when they sampled the same then."""
    batch = make_batch()
    new = [NewRequest(h, [1, 2, 3], 3, 0, [h], PARAMS) for h in (0, 1)]
    steps = [
        SchedulerOutput(step_id=0, epoch=0, rows=[0, 1], num_tokens=[2, 3], partial=[0], new_requests=new),
        SchedulerOutput(step_id=1, epoch=0, rows=[0, 1]),
        SchedulerOutput(step_id=2, epoch=0, rows=[0, 1], new_blocks=[(0, [5]), (1, [6])]),
        SchedulerOutput(step_id=3, epoch=0, rows=[1], finished=[0]),
        SchedulerOutput(step_id=4, epoch=0, rows=[1]),
    ]
    same = []
    for output in steps:
        batch.apply(output)
        inputs = batch.build(output)
        same.append(inputs.same_rows)
        batch.advance(inputs)
        batch.append_sampled(inputs, np.full(inputs.num_sampled, 7))
    assert same == [False, False, True, False, True]


def test_on_a_device_rows_that_decode_beside_a_prompt_are_ordered_by_length() -> None:
    """Those with long contexts first; the prompt is not among them, and nothing else of the step moves."""
    batch = make_batch()
    batch.lives_on_device = True  # as on a GPU, where kernels take rows in this order
    lengths = (9, 50, 30, 12)
    requests = [
        NewRequest(row, [1] * n, n, n - 1 if row < 3 else 0, list(range(row * 15, row * 15 + 15)), PARAMS)
        for row, n in enumerate(lengths)
    ]
    output = SchedulerOutput(step_id=0, epoch=0, rows=[0, 1, 2, 3], num_tokens=[1, 1, 1, 12], new_requests=requests)
    batch.apply(output)
    metadata = batch.build(output).metadata
    assert metadata.num_decode_rows == 3
    assert metadata.order_R is not None
    assert metadata.order_R.tolist() == [1, 2, 0]
    assert metadata.context_len_R.tolist() == list(lengths)


def test_on_a_device_a_token_comes_from_where_it_is_known() -> None:
    """The first row's next token was sampled and never left the device; the other one's is the last of its prompt."""
    batch = make_batch()
    batch.lives_on_device = True
    for staging in batch._staging:
        staging.is_shared = False
    new = [NewRequest(0, [11, 12, 13], 3, 0, [0], PARAMS), NewRequest(1, [21, 22, 23], 3, 0, [1], PARAMS)]
    first = SchedulerOutput(step_id=0, epoch=0, rows=[0, 1], num_tokens=[3, 2], partial=[1], new_requests=new)
    batch.apply(first)
    inputs = batch.build(first)
    batch.advance(inputs)
    batch.append_sampled_device(inputs, torch.tensor([77]))
    start_R = np.array([3, 2])
    known_R = batch.known_tokens(np.array([0, 1]), start_R)
    assert known_R is not None
    assert known_R.tolist() == [-1, 23]
    assert batch.known_tokens(np.array([0]), start_R[:1]) is None
    second = SchedulerOutput(step_id=1, epoch=0, rows=[0, 1])
    batch.apply(second)
    inputs = batch.build(second)
    assert inputs.token_ids_T.tolist() == [77, 23]
    assert inputs.positions_T.tolist() == [3, 2]


def test_rows_of_a_step_that_was_built_elsewhere_are_others() -> None:
    """Recorded steps in between: the same requests again, but not what was gathered of them."""
    batch = make_batch()
    batch.apply(SchedulerOutput(step_id=0, epoch=0, rows=[], new_requests=[NewRequest(0, [1], 1, 0, [0], PARAMS)]))
    steps = [SchedulerOutput(step_id=1 + step, epoch=0, rows=[0]) for step in range(3)]
    same = []
    for output in steps:
        same.append(batch.build(output).same_rows)
        if output.step_id == 2:
            batch.forget_rows()
    assert same == [False, True, False]


def test_an_id_outside_of_the_vocabulary_costs_only_its_own_request() -> None:
    """The doors refuse it; should one come through, the embedding must not be asked for it."""
    batch = make_batch()
    new = [NewRequest(0, [1, 100], 2, 0, [0], PARAMS), NewRequest(1, [1, 99], 2, 0, [1], PARAMS)]
    output = SchedulerOutput(step_id=0, epoch=0, rows=[0, 1], num_tokens=[2, 2], new_requests=new)
    batch.apply(output)
    assert batch.build(output).token_ids_T.tolist() == [1, 99, 1, 99]
    assert list(batch.poisoned) == [0]
    assert "vocabulary of 100" in batch.poisoned[0]
    batch.apply(SchedulerOutput(step_id=1, epoch=0, rows=[], finished=[0]))
    assert not batch.poisoned
