"""Which linear layer of a model is packed how, by the names of its parts in the checkpoint."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import nn

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.int_quant_spec import IntScheme
from argosy.cluster.protocol.model_spec import CONFIG_FILE, ModelSpec
from argosy.workers.layers.linear import ParallelLinear
from argosy.workers.quantization.base import Cut
from argosy.workers.quantization.fp8 import Fp8Method
from argosy.workers.quantization.int_weights import IntWeightMethod

WEIGHT = ".weight"
# where checkpoints keep the scale of keys or values, behind the name of the attention module
KV_SCALE_NAMES = {"k": ("k_scale", "k_proj.k_scale"), "v": ("v_scale", "v_proj.v_scale")}


class Loadable(Protocol):
    """What is asked of a model."""

    def checkpoint_tensors(self) -> Iterable[tuple[str, nn.Module, str, Cut]]:
        """(name in the checkpoint, module, its parameter, the cut)."""


def choose_methods(model: Loadable, spec: ModelSpec) -> None:
    """Give the layers that `spec.quantization` means their method. Raises `UnsupportedModel` where parts of one product
    differ, or where nothing could be packed."""
    if spec.quantization is None:
        return
    parts: dict[ParallelLinear, list[tuple[str, Cut]]] = {}
    for name, module, parameter, cut in model.checkpoint_tensors():
        if isinstance(module, ParallelLinear) and parameter == "weight":
            parts.setdefault(module, []).append((name.removesuffix(WEIGHT), cut))
    if not parts:
        raise UnsupportedModel(
            CONFIG_FILE, "quantization_config", f"{spec.architecture} has no layers that we can pack"
        )
    for module, named in parts.items():
        schemes = [spec.quantization.scheme_of(name) for name, _ in named]
        if any(scheme != schemes[0] for scheme in schemes):
            names = ", ".join(name for name, _ in named)
            raise UnsupportedModel(
                CONFIG_FILE, "quantization_config", f"treats parts of one product differently: {names}"
            )
        if schemes[0] is not None:
            cuts = [cut for _, cut in named]
            scheme = schemes[0]
            module.use(IntWeightMethod(scheme, cuts) if isinstance(scheme, IntScheme) else Fp8Method(scheme, cuts))


def kv_scale_names(model: Loadable) -> Iterator[tuple[nn.Module, str, tuple[str, ...]]]:
    """(the fused projection, "k" or "v", names that the scale may have in the checkpoint) of every layer here."""
    for name, module, parameter, _ in model.checkpoint_tensors():
        for kind, endings in KV_SCALE_NAMES.items():
            owner, found, _ = name.rpartition(f".{kind}_proj{WEIGHT}")
            if found and parameter == "weight":
                yield module, kind, tuple(f"{owner}.{ending}" for ending in endings)
