"""Which ways there are through a stage's layers for so few tokens that launches, not bytes, are what they wait for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.fp8_one_token import Fp8OneToken, open_fp8_one_token
from argosy.workers.layers.layer_chain import LayerChain, open_layer_chain

if TYPE_CHECKING:  # it imports this file
    from argosy.workers.models.decoder import DecoderLayer

Chain = LayerChain | Fp8OneToken


def open_chains(
    parallel: ParallelContext, layers: "Sequence[DecoderLayer]", width: int, dtype: torch.dtype
) -> list[Chain]:
    """All there are for these layers. Collective over a group, and alike on its ranks."""
    kinds = (open_layer_chain, open_fp8_one_token)
    opened = [opens(parallel, layers, width=width, dtype=dtype) for opens in kinds]
    return [chain for chain in opened if chain is not None]
