"""A tensor-parallel group for models that transformers made, whatever they look like inside.

Each rank keeps equal parts of the outputs of every linear layer and of the heads of attention; what a layer needs
whole is gathered. Nothing has to be known of a model for that, and every number is computed once, so a rank's answers
are those of one that has all. It costs a gather a linear layer where models of ours pay two sums a block: correct
first. Embeddings, norms and experts (no linear layers in transformers) are whole on every rank.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.placement.process_groups import ParallelContext


class HeadShare:
    """Which of the heads of attention this rank has, and so which keys and values its cache holds."""

    def __init__(self, parallel: ParallelContext, num_kv_heads: int):
        self.parallel = parallel
        rank, size = parallel.rank.tp_rank, parallel.tp_size
        first = rank * num_kv_heads // size  # several ranks have the same one where there are more of them
        self.kv_heads = slice(first, first + max(1, num_kv_heads // size))

    def heads(self, num_heads: int) -> slice:
        """Of the queries of a layer with so many."""
        rank, size = self.parallel.rank.tp_rank, self.parallel.tp_size
        return slice(rank * num_heads // size, (rank + 1) * num_heads // size)

    def gather(self, out_TD: Tensor) -> Tensor:
        """[T, heads of this rank x head size] -> of all ranks."""
        return self.parallel.all_gather_last_dim(out_TD)


def share_linear_layers(model: nn.Module, parallel: ParallelContext) -> None:
    """Leave this rank its part of every linear layer of `model` whose outputs can be divided equally."""
    from transformers.pytorch_utils import Conv1D

    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    modules: list[Any] = list(model.modules())
    for module in modules:
        is_turned = type(module) is Conv1D  # [inputs, outputs]
        if not is_turned and type(module) is not nn.Linear:
            continue
        whole_OI: Tensor = module.weight.T if is_turned else module.weight
        share, rest = divmod(whole_OI.shape[0], parallel.tp_size)
        if rest:
            continue
        own = slice(parallel.rank.tp_rank * share, (parallel.rank.tp_rank + 1) * share)
        weight_OI = whole_OI[own]
        if id(module.weight) not in embedded:  # a tied head is a view of the embedding, which is whole
            weight_OI = weight_OI.clone(memory_format=torch.contiguous_format)
        bias = module.bias
        module.weight = nn.Parameter(weight_OI, requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias[own].clone(), requires_grad=False)
        module.forward = partial(_gathered, module, parallel)


def _gathered(module: Any, parallel: ParallelContext, x: Tensor) -> Tensor:
    """All outputs of a linear layer of which this rank has a part."""
    return parallel.all_gather_last_dim(F.linear(x, module.weight, module.bias))
