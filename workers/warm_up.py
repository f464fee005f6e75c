"""The steps that a rank runs before the first request: the largest, to be measured, and one of each kind, so that no
request waits for a compiler. (rows, tokens a row, rows of one token beside, tokens in the cache before)."""

from argosy.cluster.protocol.model_spec import kv_heads_per_rank
from argosy.kernels import step_ops
from argosy.placement.step_memory import EVEN_CARD
from argosy.workers.long_steps import NUM_BUFFERS
from argosy.workers.model_runner import ModelRunner

CPU_PROMPT_TOKENS = 32  # a CPU has no compilation to warm up, only thread pools and allocators
CPU_ROWS = 8
WARM_UP_CONTEXT = 2048
MOST_CUT_ROWS = 256  # whose contexts are cut into pieces: more rows fill a card as they are


def largest_shapes(runner: ModelRunner) -> list[tuple[int, int]]:
    """The steps that need most: a full token budget of prompts, and all rows sampling.

    Of steps that are computed in slices one of as many as have a buffer and two more needs what the longest does.
    """
    scheduler, long_steps = runner.config.scheduler, runner.long_steps
    budgets = [scheduler.max_num_batched_tokens]
    if long_steps is not None:
        budgets = [min(budgets[0], (NUM_BUFFERS + 2) * long_steps.slice_tokens), long_steps.slice_tokens]
    shapes = []
    for budget in budgets:
        tokens = min(budget, runner.max_model_len)
        shapes.append((max(1, min(budget // tokens, scheduler.max_num_seqs)), tokens))
    return [*shapes, (scheduler.max_num_seqs, 1)]


def prompt_shape(runner: ModelRunner) -> tuple[int, int]:
    """The step of prompts whose seconds a token stand for what it costs to compute them: as full as steps get."""
    if runner.device.type == "cuda":
        return largest_shapes(runner)[0]
    return 1, min(4 * CPU_PROMPT_TOKENS, runner.config.scheduler.max_num_batched_tokens, runner.max_model_len)


def warm_up_shapes(runner: ModelRunner) -> list[tuple[int, ...]]:
    """Steps before the first request: (rows, tokens a row, rows of one token beside, tokens in the cache before).

    The same on every rank. On a GPU the largest ran already, to be measured; each kind of batch that attention has a
    kernel of its own for comes once here, behind nothing and behind a context that is worth being cut into pieces.
    """
    scheduler = runner.config.scheduler
    tokens = min(CPU_PROMPT_TOKENS, scheduler.max_num_batched_tokens, runner.max_model_len)
    if runner.device.type == "cuda":
        heads = kv_heads_per_rank(runner.spec, runner.rank.tp_size)
        # by the multiprocessors of the card that sizes were measured on, whatever this one has: ranks must agree
        few, some, many = 1, 32, min(256, scheduler.max_num_seqs - 1)
        others = step_ops.rows_of_each_kind(heads, scheduler.max_num_seqs - 1, EVEN_CARD, (few, some, many))
        wanted = [(tokens, few), (4 * tokens, some), (16 * tokens, many), *((tokens, rows) for rows in others)]
        mixed: list[tuple[int, ...]] = [
            (1, count, beside)
            for count, beside in wanted
            if beside < scheduler.max_num_seqs
            and count <= runner.max_model_len
            and count + beside <= scheduler.max_num_batched_tokens
        ]
        behind = min(WARM_UP_CONTEXT, runner.max_model_len - 16 * tokens)
        if behind > 0 and mixed and tokens == CPU_PROMPT_TOKENS:
            few_each = (min(4, scheduler.max_num_seqs - 1), tokens // 4, 1)
            mixed += [(*shape, behind) for shape in (*mixed, few_each) if shape[2] <= MOST_CUT_ROWS]
        return [(1, tokens), *mixed, *((1 << power, 1) for power in range(scheduler.max_num_seqs.bit_length()))]
    return [(1, tokens), (min(CPU_ROWS, scheduler.max_num_seqs), 1), (1, 1)]
