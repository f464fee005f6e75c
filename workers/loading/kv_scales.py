"""Scales of keys and values that a checkpoint was calibrated with, one of each a layer. Without them a cache has 1."""

import math

from safetensors import safe_open

from argosy.cluster.protocol.errors import WeightError
from argosy.workers.layers.linear import QKVParallelLinear
from argosy.workers.loading.checkpoint import Checkpoint
from argosy.workers.quantization.choose import Loadable, kv_scale_names


def load_kv_scales(checkpoint: Checkpoint, model: Loadable) -> None:
    """Read them into the layers that make keys and values. Raises `WeightError` for one that is missing or no scale."""
    for module, kind, names in kv_scale_names(model):
        if not isinstance(module, QKVParallelLinear):
            continue
        entry = next((checkpoint.entries[name] for name in names if name in checkpoint.entries), None)
        if entry is None:
            raise WeightError(str(checkpoint.folder), names[0], "missing, though config.json has a kv_cache_scheme")
        with safe_open(entry.file, framework="pt", device="cpu") as file:
            scales = file.get_tensor(entry.name).float().reshape(-1)
        scale = float(scales[0]) if scales.numel() == 1 else math.nan
        if not (math.isfinite(scale) and scale > 0.0):
            raise WeightError(entry.file.name, entry.name, "must be one number above 0")
        k_scale, v_scale = module.kv_scales
        module.kv_scales = (scale, v_scale) if kind == "k" else (k_scale, scale)
