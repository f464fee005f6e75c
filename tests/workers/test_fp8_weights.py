"""FP8 checkpoints of every spelling, and plain ones rounded as they come: the right weights in every layout.

What must come out is worked out here, on whole tensors, in plain torch; a rank must have its cut of it to the bit.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel, WeightError
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.deploy.launch import resolve
from argosy.kernels.fp8_reference import Rounding, dequantize_rows, quantize_rows
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.loading.stream import load_weights
from argosy.workers.models.decoder import Decoder
from argosy.workers.models.registry import build_model
from argosy.workers.quantization.fp8 import Fp8Method
from argosy.workers.worker import _cache_dtype

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 96, 160, 4, 2, 24
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "intermediate_size": INNER,
    "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "torch_dtype": "float32",
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
IGNORED = "model.layers.1.self_attn"  # stays plain where a format says so
Format = tuple[dict[str, Any], Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]


def by_tensor(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One scale, of shape [1], and one of the inputs."""
    scale = weight.abs().amax() / 448
    stored = {"weight_scale": scale.reshape(1), "input_scale": torch.tensor([0.05])}
    return (weight / scale).to(E4M3), stored


def by_tensor_without_axes(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales of no axis, as AutoFP8 and transformers write them."""
    scale = weight.abs().amax() / 448
    return (weight / scale).to(E4M3), {"weight_scale_inv": scale, "activation_scale": torch.tensor(0.05)}


def by_channel(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A scale a row, in bfloat16."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    return (weight / scale.float()).to(E4M3), {"weight_scale": scale}


def by_block(rows: int, columns: int, name: str) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """A scale a block; those at the end are cut off."""

    def pack(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scale = torch.empty(math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns))
        values = torch.empty_like(weight)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scale[i, j] = weight[block].abs().amax() / 448
                values[block] = weight[block] / scale[i, j]
        return values.to(E4M3), {name: scale}

    return pack


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A config of compressed-tensors."""
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"], "weights": {**kind, "dynamic": False, **weights},
        "input_activations": None if inputs is None else {**kind, **inputs},
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*layers\\.1\\.self_attn.*"], **more,
    }  # fmt: skip


TOKEN = {"strategy": "token", "dynamic": True}
FIXED = {"strategy": "tensor", "dynamic": False}
FORMATS: dict[str, Format] = {
    "compressed, tensor, fixed inputs": (compressed({"strategy": "tensor"}, FIXED), by_tensor),
    "compressed, channel": (compressed({"strategy": "channel"}, TOKEN), by_channel),
    "compressed, channel, plain inputs": (compressed({"strategy": "channel"}, None), by_channel),
    "compressed, block": (
        compressed({"strategy": "block", "block_structure": [32, 32]}, {"strategy": "group", "dynamic": True}),
        by_block(32, 32, "weight_scale"),
    ),
    "fp8, tensor, fixed inputs": (
        {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": [IGNORED]},
        by_tensor_without_axes,
    ),
    "fp8, block": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
         "modules_to_not_convert": ["lm_head", IGNORED]},
        by_block(128, 128, "weight_scale_inv"),
    ),
    "fp8, small blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 64], "modules_to_not_convert": [IGNORED]},
        by_block(32, 64, "weight_scale_inv"),
    ),
}  # fmt: skip


def plain_tensors() -> dict[str, Tensor]:
    """A small model whose rows and columns differ in size, so that every scale matters."""
    torch.manual_seed(3)
    tensors = {"model.embed_tokens.weight": torch.randn(50, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    tensors["lm_head.weight"] = torch.randn(50, HIDDEN)
    for layer in range(2):
        stem = f"model.layers.{layer}"
        tensors |= {f"{stem}.{norm}_layernorm.weight": torch.ones(HIDDEN) for norm in ("input", "post_attention")}
        for name, (rows, columns) in SHAPES.items():
            sizes = torch.linspace(0.1, 3.0, rows)[:, None] * torch.linspace(2.0, 0.2, columns)
            tensors[f"{stem}.{name}.weight"] = torch.randn(rows, columns) * sizes
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    """A model folder."""
    folder.mkdir()
    config = CONFIG if quantization is None else {**CONFIG, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def packed(form: Format) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the checkpoint, the plain tensors that they mean)."""
    stored, meant = plain_tensors(), plain_tensors()
    for name in [name for name in stored if "_proj." in name and not name.startswith(IGNORED)]:
        stored[name], scales = form[1](stored[name])
        stem = name.removesuffix(".weight")
        stored |= {f"{stem}.{suffix}": scale for suffix, scale in scales.items()}
        scale = next(scale for suffix, scale in scales.items() if suffix.startswith("weight"))
        meant[name] = stored[name].float() * spread(scale.float(), tuple(stored[name].shape), form[0])
    return stored, meant


def spread(scale: Tensor, shape: tuple[int, ...], config: dict[str, Any]) -> Tensor:
    """A scale for each number."""
    block = config.get("weight_block_size")
    if block is None and "config_groups" in config:
        block = config["config_groups"]["group_0"]["weights"].get("block_structure")
    if block is None:
        return scale.expand(shape) if scale.ndim != 1 else scale
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def load(folder: Path, tp_size: int, tp_rank: int, quantization: str | None = None, pp_rank: int = 0) -> Decoder:
    """One rank of the model, as it is when steps may come."""
    spec = read_model_spec(folder, None, quantization)
    ranks = make_plan(spec.num_layers, tp_size, 2 if pp_rank else 1).ranks
    rank = next(rank for rank in ranks if (rank.tp_rank, rank.pp_rank) == (tp_rank, pp_rank))
    model = build_model(spec, rank, ParallelContext(rank, CPU, 1.0), torch.float32, CPU)
    load_weights(model, folder, spec)
    return model


def weights(model: Decoder) -> dict[str, Tensor]:
    """What it multiplies with."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("_proj.weight")}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_packed_checkpoint_is_the_plain_one_that_it_means(tmp_path: Path, form: Format, tp_size: int) -> None:
    """Cuts go through blocks of 128 and of 32; with 4 ranks, two share a key/value head. Not a bit differs."""
    stored, meant = packed(form)
    folder, plain = write(tmp_path / "packed", stored, form[0]), write(tmp_path / "plain", meant, None)
    for tp_rank in range(tp_size):
        got, want = (weights(load(f, tp_size, tp_rank)) for f in (folder, plain))
        assert got.keys() == want.keys()
        for name, weight in want.items():
            assert torch.equal(got[name], weight), name


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_are_rounded_as_the_checkpoint_says(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fixed scale, by token, by groups as wide as the blocks (cut ones on the second rank), or not at all."""
    monkeypatch.setattr(Fp8Method, "rounds_on_cpu", True)
    form = FORMATS[name]
    folder = write(tmp_path / "packed", packed(form)[0], form[0])
    model = load(folder, 2, 1)
    layer = model.layers["0"].mlp.down_proj
    x_TI = torch.randn(3, INNER // 2) * 20
    fixed = torch.tensor([0.05]) if "fixed" in name else None
    group = {"fp8, block": math.gcd(128, INNER // 2), "fp8, small blocks": 16, "compressed, block": 16}.get(name, 0)
    rounded = dequantize_rows(quantize_rows(x_TI, Rounding(group, fixed)))
    want = torch.nn.functional.linear(x_TI if "plain" in name else rounded, layer.weight)
    torch.testing.assert_close(layer.method.apply(layer, x_TI), want, rtol=1e-5, atol=1e-4)
    if fixed is not None:
        assert float(rounded.abs().max()) <= 448 * 0.05 + 1e-4 < float(x_TI.abs().max())


def test_the_last_stage_loads_what_it_needs(tmp_path: Path) -> None:
    """Two stages: names of the layers of other stages, scales included, are no strangers."""
    form = FORMATS["fp8, block"]
    stored, meant = packed(form)
    folder, plain = write(tmp_path / "packed", stored, form[0]), write(tmp_path / "plain", meant, None)
    got, want = (weights(load(f, 1, 0, pp_rank=1)) for f in (folder, plain))
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_tensor", "fp8_block"])
def test_rounding_while_loading_gives_every_layout_the_same_weights(tmp_path: Path, quantization: str) -> None:
    """Scales come from the whole tensor, also where a rank keeps a part of its rows or columns."""
    tensors = plain_tensors()
    folder = write(tmp_path / "plain", tensors, None)
    pack = {"fp8": by_channel, "fp8_per_tensor": by_tensor, "fp8_block": by_block(128, 128, "scale")}[quantization]
    for name in [name for name in tensors if "_proj." in name]:
        values, scales = pack(tensors[name])
        scale = next(iter(scales.values()))
        if quantization == "fp8":
            scale = tensors[name].abs().amax(1, keepdim=True) / 448
            values = (tensors[name] / scale).to(E4M3)
        config = {"weight_block_size": [128, 128]} if quantization == "fp8_block" else {}
        tensors[name] = values.float() * spread(scale, tuple(values.shape), config)
    meant = write(tmp_path / "meant", tensors, None)
    for tp_size in (1, 2, 4):
        for tp_rank in range(tp_size):
            got, want = weights(load(folder, tp_size, tp_rank, quantization)), weights(load(meant, tp_size, tp_rank))
            for name, weight in want.items():
                torch.testing.assert_close(got[name], weight, rtol=1e-6, atol=0, msg=name)


def test_what_is_rounded_is_not_far_from_what_was_there(tmp_path: Path) -> None:
    """Three bits of mantissa: a number moves by at most a sixteenth, or by the spacing next to zero."""
    folder = write(tmp_path / "plain", plain_tensors(), None)
    got, want = weights(load(folder, 1, 0, "fp8")), weights(load(folder, 1, 0))
    for name, weight in want.items():
        assert not torch.equal(got[name], weight)
        spacing = weight.abs().amax(1, keepdim=True) / 448 * 2**-9
        assert bool(((got[name] - weight).abs() <= weight.abs() / 16 + spacing).all()), name


def test_random_weights_are_one_model_in_every_layout(tmp_path: Path) -> None:
    """To measure a plan before its weights are there: packed formats too."""
    for name, quantization in FORMATS.items():
        folder = write(tmp_path / name.replace(" ", "_"), plain_tensors(), quantization[0])
        spec = read_model_spec(folder)
        found = []
        for tp_size in (1, 2):
            rank = make_plan(spec.num_layers, tp_size, 1).ranks[0]
            model = build_model(spec, rank, ParallelContext(rank, CPU, 1.0), torch.float32, CPU)
            load_weights(model, folder, spec, load_format="dummy", seed=3)
            found.append(weights(model)["layers.0.mlp.down_proj.weight"])
        assert torch.equal(found[0][:, : INNER // 2], found[1])
        assert 0.01 < float(found[0].std()) < 0.03


def group(**changes: Any) -> dict[str, Any]:
    """A config of compressed-tensors whose only group says something else."""
    config = compressed({"strategy": "channel"}, TOKEN)
    config["config_groups"]["group_0"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, ["quantization_config.fmt", "e5m2"]),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]}, ["weight_block_size", "100"]),
        ({"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "static"}, ["dynamic"]),
        ({"quant_method": "bitnet"}, ["quant_method", "bitnet"]),
        (group(weights={"num_bits": 4, "type": "float", "strategy": "tensor"}), ["group_0.weights", "num_bits 4"]),
        (group(weights={"num_bits": 8, "type": "float", "strategy": "group"}), ["strategy", "group"]),
        (group(output_activations={"num_bits": 8}), ["output_activations"]),
        (group(targets="Linear"), ["targets", "list"]),
        (compressed({"strategy": "channel"}, TOKEN, ignore=["re:("]), ["ignore", "regular expression"]),
        (compressed({"strategy": "channel"}, TOKEN, ignore=["re:.*q_proj"]), ["parts of one product", "q_proj"]),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    """Wrong numbers would be worse than none: file, key and value are named."""
    folder = write(tmp_path / "packed", {}, config)
    with pytest.raises(UnsupportedModel) as caught:
        load(folder, 1, 0)
    for word in ("config.json", *words):
        assert word in str(caught.value)


def test_a_checkpoint_that_contradicts_its_config_is_refused(tmp_path: Path) -> None:
    """A scale is missing, has the wrong shape, or the weight is not what the config says."""
    form = FORMATS["fp8, block"]
    name = "model.layers.0.mlp.down_proj"
    for number, (change, words) in enumerate(
        [
            ({f"{name}.weight_scale_inv": None}, ["weight_scale", "missing"]),
            ({f"{name}.weight_scale_inv": torch.ones(3, 2)}, ["weight_scale", "[3, 2]", "[1, 2]"]),
            ({f"{name}.weight": torch.ones(HIDDEN, INNER)}, [f"{name}.weight", "F32", "F8_E4M3"]),
            ({f"{name}.strange": torch.ones(1)}, [f"{name}.strange", "not part of"]),
        ]
    ):
        stored = {key: value for key, value in {**packed(form)[0], **change}.items() if value is not None}
        with pytest.raises(WeightError) as caught:
            load(write(tmp_path / str(number), stored, form[0]), 1, 0)
        for word in words:
            assert word in str(caught.value)


def test_scales_of_keys_and_values_come_from_the_checkpoint(tmp_path: Path) -> None:
    """A calibrated checkpoint: what it says is used and, with no other wish, the cache is e4m3. Else they are 1."""
    stored, _ = packed(FORMATS["compressed, channel"])
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config = compressed({"strategy": "channel"}, TOKEN, kv_cache_scheme=scheme)
    scales = {f"model.layers.{i}.self_attn.{kind}": torch.tensor([0.1 + i]) for i in (0, 1) for kind in ("k_scale",)}
    scales |= {f"model.layers.{i}.self_attn.v_proj.v_scale": torch.tensor(0.2 + i) for i in (0, 1)}
    folder = write(tmp_path / "packed", stored | scales, config)
    layers = load(folder, 2, 1).layers
    for i in (0, 1):
        assert layers[str(i)].attention.shape.kv_scales == pytest.approx((0.1 + i, 0.2 + i))
    resolved, _, _ = resolve(ServingConfig.from_mapping({"model": str(folder)}))
    assert resolved.cache.kv_cache_dtype == "fp8_e4m3"
    resolved, _, _ = resolve(ServingConfig.from_mapping({"model": str(folder), "kv_cache_dtype": "float32"}))
    assert resolved.cache.kv_cache_dtype == "float32"
    del scales["model.layers.1.self_attn.k_scale"]
    with pytest.raises(WeightError, match=r"layers\.1\.self_attn\.k_scale"):
        load(write(tmp_path / "incomplete", stored | scales, config), 1, 0)
    plain = load(write(tmp_path / "plain", stored, FORMATS["compressed, channel"][0]), 1, 0)
    assert plain.layers["0"].attention.shape.kv_scales == (1.0, 1.0)


def test_a_card_that_does_not_know_e4m3_says_so_before_steps_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 takes FP8 checkpoints (made plain) and refuses an FP8 cache, by name and with a way out."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    card = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='fp8_e4m3': NVIDIA A100 .* use int8 or auto"):
        _cache_dtype("fp8_e4m3", torch.bfloat16, card)
    assert _cache_dtype("auto", torch.bfloat16, card) == torch.bfloat16
    assert _cache_dtype("fp8_e4m3", torch.bfloat16, CPU) == E4M3
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _cache_dtype("fp8_e4m3", torch.bfloat16, card) == E4M3


def test_the_setting_must_fit_the_checkpoint(tmp_path: Path) -> None:
    """`quantization` rounds plain weights; for packed ones it may only repeat what they are."""
    plain = write(tmp_path / "plain", {}, None)
    form = FORMATS["compressed, channel"]
    folder = write(tmp_path / "packed", {}, form[0])
    with pytest.raises(ConfigError, match=r"quantization='nf3'.*fp8, fp8_per_tensor, fp8_block"):
        read_model_spec(plain, None, "nf3")
    with pytest.raises(ConfigError, match=r"quantization='awq'.*compressed-tensors"):
        read_model_spec(folder, None, "awq")
    for wanted in (None, "compressed-tensors", "fp8"):
        spec = read_model_spec(folder, None, wanted)
        assert spec.quantization is not None
        assert spec.quantization.method == "compressed-tensors"
    assert read_model_spec(plain).quantization is None
