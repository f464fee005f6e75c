"""Experts in 8 and 4 bits as DeepSeek-R1 and gpt-oss publish them answer as their weights written plainly do."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import family_cases
from family_cases import DEEPSEEK, SMALL, Case, make_checkpoint
from family_harness import CPU, PARTED_WAYS, WAYS, Expected, Harness, load_expected, run_layouts

from argosy.cluster.protocol.errors import ConfigError
from argosy.kernels import mxfp4
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext, init_parallel

CLOSE = 1e-3
WIDE = {"hidden_size": 128, "moe_intermediate_size": 256, "num_hidden_layers": 2, "n_routed_experts": 4}
E4M3 = torch.float8_e4m3fn
# greedy answers of a model whose weights were rounded are its own: they are compared with the rounded model's


def block_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers and a scale for each 128 x 128 of them."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.rand(rows, columns) * 0.002 + 0.0005
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / whole).clamp(-448, 448).to(E4M3), scale


def plain(stored: Tensor, scale: Tensor) -> Tensor:
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: stored.shape[0], : stored.shape[1]]
    return stored.float() * whole


def is_packed(name: str) -> bool:
    """What DeepSeek's FP8 checkpoints pack: all products but the router and the head."""
    return name.endswith("proj.weight") or "kv_a_proj_with_mqa.weight" in name


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def answers_of(folder: Path, model_folder: Path) -> None:
    """Ask transformers again, of weights that were changed after it wrote them."""
    import transformers

    model = getattr(transformers, json.loads((model_folder / "config.json").read_text())["architectures"][0])
    made = model.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokens, logits = family_cases.greedy_answers(made)
    torch.save({"prompts": family_cases.PROMPTS, "tokens": tokens, "logits": logits}, folder / "expected.pt")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 in FP8 blocks, and what transformers answers with the same weights written plainly."""
    folder, plainly = tmp_path_factory.mktemp("fp8"), tmp_path_factory.mktemp("plain")
    case = Case("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK | WIDE | {"n_group": 2, "topk_group": 1})
    make_checkpoint(folder, "deepseek", case=case)
    tensors = load_file(folder / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed[name] = tensor
        if is_packed(name):
            packed[name], packed[f"{name}_scale_inv"] = block_scales(tensor)
            tensors[name] = plain(packed[name], packed[f"{name}_scale_inv"])
    save_file(tensors, plainly / "model.safetensors", metadata={"format": "pt"})
    (plainly / "config.json").write_text((folder / "config.json").read_text())
    answers_of(folder, plainly)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"})
    return folder


def differences(folder: Path, expected: Expected, num_layers: int = 2) -> float:
    rank = make_plan(num_layers, 1, 1).ranks[0]
    harness = Harness(folder, rank, init_parallel(rank, "", CPU, 1.0))
    return max(harness.largest_difference(expected, way) for way in WAYS)


def test_deepseek_in_blocks_of_8_bits(deepseek: Path) -> None:
    """R1 as it is published: attention, dense layers and experts are e4m3 with a scale a block."""
    assert differences(deepseek, load_expected(deepseek)) < CLOSE


def test_a_cut_inside_a_block_says_what_to_do(deepseek: Path) -> None:
    """Four ranks would halve a block of scales."""
    rank = make_plan(2, 4, 1).ranks[0]
    with pytest.raises(ConfigError, match="enable_expert_parallel"):
        Harness(deepseek, rank, ParallelContext(rank, CPU, 1.0))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss with experts in MXFP4, and transformers' answers with its own reading of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, plainly = tmp_path_factory.mktemp("mxfp4"), tmp_path_factory.mktemp("plain")
    settings = SMALL | {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    settings |= {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 2}
    case = Case("GptOssConfig", "GptOssForCausalLM", settings)
    make_checkpoint(folder, "gpt-oss", case=case)
    tensors = load_file(folder / "model.safetensors")
    packed = {name: tensor for name, tensor in tensors.items() if not name.endswith(("up_proj", "down_proj"))}
    for name in set(tensors) - set(packed):
        experts, inputs, outputs = tensors[name].shape
        packed[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        packed[f"{name}_scales"] = torch.randint(122, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
        read = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"], dtype=torch.float32)
        tensors[name] = read.contiguous()
        assert tensors[name].shape == (experts, inputs, outputs)
        ours = mxfp4.unpack(packed[f"{name}_blocks"], packed[f"{name}_scales"], torch.float32)
        assert torch.equal(ours.transpose(1, 2), read)  # bit for bit
    save_file(tensors, plainly / "model.safetensors", metadata={"format": "pt"})
    (plainly / "config.json").write_text((folder / "config.json").read_text())
    answers_of(folder, plainly)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def test_gpt_oss_in_4_bits(gpt_oss: Path) -> None:
    """20b and 120b as they are published."""
    assert differences(gpt_oss, load_expected(gpt_oss)) < CLOSE


def test_in_parts(deepseek: Path, gpt_oss: Path, tmp_path: Path) -> None:
    """Cut inside the experts (inputs of down may begin inside a block of 32), and whole experts on each rank, which
    tokens reach by sums or by being sent there."""
    both = [("r1", str(deepseek), 2, None), ("oss", str(gpt_oss), 2, None)]
    found = run_layouts({"TP2": both, "EP2": both, "A2A2": both, "A2A4": both, "TP4": both[1:]}, tmp_path)
    for rank in found:
        assert max(rank.values()) < CLOSE, rank
    assert [len(rank) for rank in found] == [9 * len(PARTED_WAYS)] * 2 + [3 * len(PARTED_WAYS)] * 2
