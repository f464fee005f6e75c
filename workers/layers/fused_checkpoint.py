"""Checkpoint tensors that hold several of our projections at once, and those that are stored transposed.

BLOCKS     [all of part 1 | all of part 2 | ..]                   Phi-3, GPT-2, MPT, Falcon with one key/value head
GROUPED    for each key/value head: its query heads, then k, v    GPT-NeoX, BLOOM (one query head each), Falcon
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from argosy.workers.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from argosy.workers.loading.names import Slot
from argosy.workers.quantization.base import Cut


def cuts_of(module: nn.Module, slot: Slot) -> Iterator[tuple[str, Cut] | tuple[str, str, Cut]]:
    """What `module` reads for `slot`: (last word of the tensor's name, our parameter if it is called otherwise, cut).

    Several cuts may be of one tensor.
    """
    if slot is Slot.BLOCKS:
        assert isinstance(module, MergedColumnParallelLinear)
        yield from _blocks(module)
    elif slot is Slot.GROUPED:
        assert isinstance(module, QKVParallelLinear)
        yield from _grouped(module)
    elif slot is Slot.STACKED:
        yield from module.stacked_cuts()  # type: ignore[operator]  # of experts
    elif slot in (Slot.STACKED_UP, Slot.STACKED_DOWN):
        yield from module.stored_cuts(slot)  # type: ignore[operator]  # of experts
    else:
        cuts: dict[str, Cut] = module.cuts(slot)  # type: ignore[operator]  # every layer of ours has it
        yield from cuts.items()


def _blocks(layer: MergedColumnParallelLinear) -> Iterator[tuple[str, Cut]]:
    total, offset = sum(full for full, _, _ in layer.rows.values()), 0
    for full, source, target in layer.rows.values():
        rows = slice(offset + source.start, offset + source.stop)
        yield from layer.method.cuts(Cut((total, layer.num_in), (rows, slice(None)), target)).items()
        if layer.has_bias:
            yield "bias", Cut((total,), (rows,), target)
        offset += full


def _grouped(layer: QKVParallelLinear) -> Iterator[tuple[str, Cut]]:
    (q_full, q_rows, _), (kv_full, kv_rows, _) = layer.rows["q"], layer.rows["k"]
    size = (kv_rows.stop - kv_rows.start) // layer.num_kv_heads
    group = q_full // kv_full  # query heads that share a key/value head
    first, last = kv_rows.start // size, kv_rows.stop // size
    first_q, num_q = q_rows.start // size - first * group, layer.num_heads
    stride = (group + 2) * size

    def arrange(rows: Tensor) -> Tensor:
        heads = rows.reshape(last - first, group + 2, size, *rows.shape[1:])
        q = heads[:, :group].flatten(0, 1)[first_q : first_q + num_q]
        parts = (q.flatten(0, 1), heads[:, group].flatten(0, 1), heads[:, group + 1].flatten(0, 1))
        return torch.cat(parts)

    total, source = kv_full // size * stride, slice(first * stride, last * stride)
    yield "weight", Cut((total, layer.num_in), (source, slice(None)), arrange=arrange)
    if layer.has_bias:
        yield "bias", Cut((total,), (source,), arrange=arrange)


def transposed(cut: Cut) -> Cut:
    """The same cut of a weight that the checkpoint has as [inputs, outputs]."""
    return cut._replace(full_shape=cut.full_shape[::-1], source=cut.source[::-1], arrange=_transpose)


def _transpose(weight: Tensor) -> Tensor:
    return weight.t()
