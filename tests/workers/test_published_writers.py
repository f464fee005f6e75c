"""Checkpoints that a format's own library wrote, where it is installed (`pip install compressed-tensors`).

`test_int_weights` writes by plain loops what the formats' descriptions say; here the publishers' code says it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import family_cases
from family_harness import CPU, Expected, Harness
from safetensors.torch import save_file

from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext

library = pytest.importorskip("compressed_tensors", reason="without compressed-tensors, which wrote such checkpoints")
WEIGHTS: dict[str, dict[str, Any]] = {
    "4 bits": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    "4 bits, zeros": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    "8 bits": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True},
    "8 bits, channel": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "e4m3, channel": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
}
SHAPE = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


def write(folder: Path, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A Llama that the library rounded and packed. Returns the weights that it says this means."""
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, dtype="float32")
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.1)
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        groups = module.weight.view(module.weight.shape[0], -1, args.group_size or module.weight.shape[1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        module.weight_scale.copy_(scale.view_as(module.weight_scale))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.copy_(zero.view_as(module.weight_zero_point))
        zeros = getattr(module, "weight_zero_point", None)
        module.weight.copy_(fake_quantize(module.weight, module.weight_scale, zeros, args))
        module.quantization_status = QuantizationStatus.FROZEN
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    compressor.update_config(folder)
    return plain


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_the_library_wrote_is_read_as_it_means_it(name: str, tmp_path: Path) -> None:
    """Logits of transformers with the weights that the library makes of its words again."""
    import transformers

    plain = write(tmp_path, WEIGHTS[name])
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({key: plain[key] for key in model.state_dict()})
    expected = Expected(family_cases.PROMPTS, *family_cases.greedy_answers(model))
    (rank,) = make_plan(2, 1, 1).ranks
    harness = Harness(tmp_path, rank, ParallelContext(rank, CPU, 1.0))
    assert harness.largest_difference(expected) < 2e-4
    ours = dict(harness.model.named_parameters())
    for layer in range(2):  # on a CPU numbers are made plain when they are read
        for part in ("attention.o_proj", "mlp.down_proj"):
            theirs = plain[f"model.layers.{layer}.{part.replace('attention', 'self_attn')}.weight"]
            assert torch.equal(ours[f"layers.{layer}.{part}.weight"].float(), theirs), (layer, part)
