"""Checkpoints of 4 and 8 bits as their formats lay them out, written here by plain loops, and what we make of them.

The reference is the number that the format's own description gives: (number - zero) * scale in the scale's own type,
which is float16 for GPTQ and AWQ and the model's for compressed-tensors; bit for bit.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from argosy.cluster.protocol.errors import UnsupportedModel, WeightError
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.loading.stream import load_weights
from argosy.workers.models.registry import build_model

from .family_harness import Harness

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
AWQ_POSITIONS = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_words(numbers: np.ndarray, bits: int, axis: int) -> Tensor:
    """Neighbours along `axis` share a word, the first one in the lowest bits."""
    per = 32 // bits
    numbers = np.moveaxis(numbers.astype(np.uint64), axis, 0)
    words = np.zeros((-(-numbers.shape[0] // per), *numbers.shape[1:]), dtype=np.uint64)
    for i in range(numbers.shape[0]):
        words[i // per] |= numbers[i] << np.uint64(bits * (i % per))
    return torch.from_numpy(np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis).copy())


@dataclass
class Layer:
    """Numbers, scales and zeros of one weight, and what they mean."""

    numbers_OI: np.ndarray
    scale_OG: np.ndarray
    zero_OG: np.ndarray
    group_I: np.ndarray  # of each input

    @property
    def plain(self) -> Tensor:
        zero, scale = self.zero_OG[:, self.group_I], self.scale_OG[:, self.group_I]
        return torch.from_numpy((self.numbers_OI - zero).astype(scale.dtype) * scale)


@dataclass
class Format:
    """A way to write a layer, with the config that announces it."""

    bits: int
    group: int
    config: dict[str, Any]
    symmetric: bool = False
    ordered: bool = False
    names: list[str] = field(default_factory=list)

    def draw(self, rng: np.random.Generator, rows: int, columns: int, order: np.ndarray) -> Layer:
        group = columns if self.group == -1 else self.group
        numbers = rng.integers(0, 1 << self.bits, (rows, columns))
        kept = np.float16 if self.config["quant_method"] in ("gptq", "awq") else np.float32
        largest = 0.32 / (1 << self.bits)  # weights of one size, whatever their bits
        scale = (rng.random((rows, -(-columns // group))) * largest + largest / 10).astype(kept)
        if self.config["quant_method"] == "bitsandbytes":  # the file has 127 steps
            scale = (scale * np.float32(127)) / np.float32(127)
        middle = 1 << (self.bits - 1)
        zero = np.full(scale.shape, middle) if self.symmetric else rng.integers(1, 1 << self.bits, scale.shape)
        place = np.argsort(order) if self.ordered else np.arange(columns)
        return Layer(numbers, scale, zero, place // group)

    def tensors(self, name: str, layer: Layer) -> dict[str, Tensor]:
        numbers, zero = layer.numbers_OI, layer.zero_OG
        scale = torch.from_numpy(layer.scale_OG)
        method = self.config["quant_method"]
        if method == "gptq":
            offset = 0 if self.config.get("checkpoint_format") == "gptq_v2" else 1
            return {
                f"{name}.qweight": pack_words(numbers.T, self.bits, 0),
                f"{name}.qzeros": pack_words((zero.T - offset) % (1 << self.bits), self.bits, 1),
                f"{name}.scales": scale.t().contiguous(),
                f"{name}.g_idx": torch.from_numpy(layer.group_I.astype(np.int32)),
            }
        if method == "awq":
            where = np.arange(numbers.shape[0]).reshape(-1, 8)[:, AWQ_POSITIONS].reshape(-1)
            return {
                f"{name}.qweight": pack_words(numbers.T[:, where], 4, 1),
                f"{name}.qzeros": pack_words(zero.T[:, where], 4, 1),
                f"{name}.scales": scale.t().contiguous(),
            }
        if method == "bitsandbytes":
            largest = scale[:, 0] * np.float32(127)
            assert torch.equal(largest / 127, scale[:, 0])
            return {
                f"{name}.weight": torch.from_numpy((numbers - 128).astype(np.int8)),
                f"{name}.SCB": largest,
                f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        if self.config["format"] == "int-quantized":
            return {
                f"{name}.weight": torch.from_numpy((numbers - 128).astype(np.int8)),
                f"{name}.weight_scale": scale,
            }
        found = {
            f"{name}.weight_packed": pack_words(numbers, self.bits, 1),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(numbers.shape),
        }
        if not self.symmetric:
            found[f"{name}.weight_zero_point"] = pack_words(zero, self.bits, 0)
        if self.ordered:
            found[f"{name}.weight_g_idx"] = torch.from_numpy(layer.group_I.astype(np.int32))
        return found


def compressed(bits: int, group: int, form: str, *, symmetric: bool, order: str | None = None) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group, "actorder": order,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FORMATS = {
    "gptq 4 bits": Format(4, 32, GPTQ),
    "gptq 8 bits, one group": Format(8, -1, GPTQ | {"bits": 8, "group_size": -1}),
    "gptq v2, ordered": Format(
        4, 16, GPTQ | {"group_size": 16, "desc_act": True, "checkpoint_format": "gptq_v2"}, ordered=True
    ),
    "gptq, ordered, the last group of fewer": Format(4, 48, GPTQ | {"group_size": 48, "desc_act": True}, ordered=True),
    "gptq, the last group of fewer": Format(4, 40, GPTQ | {"group_size": 40}),
    "packed 4 bits, the last group of fewer": Format(
        4, 40, compressed(4, 40, "pack-quantized", symmetric=True), symmetric=True
    ),
    "awq": Format(4, 64, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
    "packed 4 bits": Format(4, 32, compressed(4, 32, "pack-quantized", symmetric=True), symmetric=True),
    "packed 4 bits, zeros": Format(4, 16, compressed(4, 16, "pack-quantized", symmetric=False)),
    "packed 8 bits, channel": Format(8, -1, compressed(8, -1, "pack-quantized", symmetric=True), symmetric=True),
    "packed 4 bits, ordered": Format(
        4, 16, compressed(4, 16, "pack-quantized", symmetric=True, order="group"), symmetric=True, ordered=True
    ),
    "packed 8 bits, zeros, ordered": Format(
        8, 32, compressed(8, 32, "pack-quantized", symmetric=False, order="group"), ordered=True
    ),
    "int8, channel": Format(8, -1, compressed(8, -1, "int-quantized", symmetric=True), symmetric=True),
    "bitsandbytes": Format(8, -1, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False,
        "_load_in_8bit": True, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0}, symmetric=True),
}  # fmt: skip


def write(folder: Path, form: Format) -> dict[str, Tensor]:
    """A Llama in this format. Returns its plain weights by name."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, torch_dtype="float32")
    plain = {name: value.clone() for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    rng = np.random.default_rng(11)
    stored: dict[str, Tensor] = {}
    orders = {columns: rng.permutation(columns) for columns in (64, 192)}
    for name, value in plain.items():
        if not name.endswith("_proj.weight"):
            stored[name] = value
            continue
        layer = form.draw(rng, *value.shape, orders[value.shape[1]])
        plain[name] = layer.plain
        stored.update(form.tensors(name.removesuffix(".weight"), layer))
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": form.config})
    )
    return plain


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_rank_has_the_formats_numbers_bit_for_bit(name: str, tp_size: int, tmp_path: Path) -> None:
    plain = write(tmp_path, FORMATS[name])
    spec = read_model_spec(tmp_path)
    for rank in make_plan(2, tp_size, 1).ranks:
        model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.float32, CPU)
        load_weights(model, tmp_path, spec)
        for number in range(2):
            layer = model.layers[str(number)]
            prefix = f"model.layers.{number}"

            def share(what: str, axis: int, prefix: str = prefix, place: int = rank.tp_rank) -> Tensor:
                return plain[f"{prefix}.{what}.weight"].chunk(tp_size, axis)[place].float()

            qkv = torch.cat([share(f"self_attn.{kind}_proj", 0) for kind in "qkv"])
            gate_up = torch.cat([share(f"mlp.{kind}_proj", 0) for kind in ("gate", "up")])
            for ours, want in (
                (layer.attention.qkv_proj, qkv), (layer.attention.o_proj, share("self_attn.o_proj", 1)),
                (layer.mlp.gate_up_proj, gate_up), (layer.mlp.down_proj, share("mlp.down_proj", 1)),
            ):  # fmt: skip
                assert torch.equal(_weight(ours), want)


def _weight(layer: Any) -> Tensor:
    """What the layer multiplies with, whatever form it was brought into."""
    return layer.method.apply(layer, torch.eye(layer.num_in if not hasattr(layer, "share") else layer.share)).t()


@pytest.mark.parametrize("name", ["gptq v2, ordered", "awq"])
def test_the_model_answers_as_transformers_does_with_the_plain_weights(name: str, tmp_path: Path) -> None:
    plain = write(tmp_path, FORMATS[name])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2))
    model.load_state_dict({key: value.float() for key, value in plain.items()})
    prompt = [5, 17, 60, 3, 44, 9, 80]
    model.generation_config.eos_token_id = None  # which may be chosen here, too
    want = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    rank = make_plan(2, 1, 1).ranks[0]
    harness = Harness(tmp_path, rank, ParallelContext(rank, CPU, 5.0))
    row = harness.sequence(prompt, 32)
    for step in range(12):
        logits = harness.step([(row, len(prompt) if step == 0 else 1)])
        row.ids.append(int(logits[0].argmax()))
    assert row.ids == want[0].tolist()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"bits": 3}, "quantization_config.bits"),
        ({"group_size": 12}, "quantization_config.group_size"),
        ({"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format"),
        ({"quant_method": "awq", "version": "gemv"}, "quantization_config.version"),
        ({"quant_method": "quip"}, "quantization_config.quant_method"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], names: str, tmp_path: Path) -> None:
    write(tmp_path, FORMATS["gptq 4 bits"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=names.replace(".", r"\.")):
        read_model_spec(tmp_path)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_of_zeros_that_the_model_has_no_place_for_are_left_out(value: float, tmp_path: Path) -> None:
    """Older writers of GPTQ give every layer a bias; one that is not 0 means something else."""
    write(tmp_path, FORMATS["gptq 4 bits"])
    path = tmp_path / "model.safetensors"
    stored = load_file(path) | {"model.layers.1.mlp.up_proj.bias": torch.full((192,), value, dtype=torch.float16)}
    save_file(stored, path)
    spec, rank = read_model_spec(tmp_path), make_plan(2, 1, 1).ranks[0]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.float32, CPU)
    if value:
        with pytest.raises(WeightError, match=r"up_proj\.bias: not part of a LlamaForCausalLM"):
            load_weights(model, tmp_path, spec)
    else:
        load_weights(model, tmp_path, spec)


def test_packed_weights_without_their_config_are_named(tmp_path: Path) -> None:
    """Older checkpoints have it in a file of their own: what is missing there can be given by hand."""
    plain = write(tmp_path, FORMATS["gptq 4 bits"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    quantization = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    rank = make_plan(2, 1, 1).ranks[0]

    def load(overrides: dict[str, Any]) -> Any:
        spec = read_model_spec(tmp_path, overrides)
        model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.float32, CPU)
        load_weights(model, tmp_path, spec)
        return model

    with pytest.raises(WeightError, match=r"\.qweight: config.json lacks the quantization_config.*--hf-overrides"):
        load({})
    made = load({"quantization_config": quantization})
    assert torch.equal(_weight(made.layers["1"].mlp.down_proj), plain["model.layers.1.mlp.down_proj.weight"].float())


@pytest.mark.parametrize(("wanted", "bits"), [("int8", 8), ("int4", 4)])
def test_plain_weights_are_rounded_as_they_are_loaded_the_same_in_every_layout(
    wanted: str, bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, torch_dtype="float32")
    source = transformers.LlamaForCausalLM(config)
    source.save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path, quantization=wanted)
    shares = []
    for rank in make_plan(2, 2, 1).ranks:
        model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.float32, CPU)
        load_weights(model, tmp_path, spec)
        shares.append(_weight(model.layers["0"].mlp.down_proj))
    rank = make_plan(2, 1, 1).ranks[0]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.float32, CPU)
    load_weights(model, tmp_path, spec)
    whole = _weight(model.layers["0"].mlp.down_proj)
    assert torch.equal(torch.cat(shares, 1), whole)
    plain = source.state_dict()["model.layers.0.mlp.down_proj.weight"]
    step = plain.abs().view(64, -1, 64).amax(-1).repeat_interleave(64, 1) * 2 / ((1 << bits) - 1)
    assert float(((whole - plain).abs() / step).max()) <= 1.0
    assert not torch.equal(whole, plain)


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_come_in_every_layout(name: str, tmp_path: Path) -> None:
    """Speed is measured without checkpoints: `load_format="dummy"` draws words where a checkpoint has them."""
    write(tmp_path, FORMATS[name])
    (tmp_path / "model.safetensors").unlink()
    spec = read_model_spec(tmp_path)
    rank = make_plan(2, 1, 1).ranks[0]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.float32, CPU)
    load_weights(model, tmp_path, spec, load_format="dummy")
    for layer in (model.layers["0"].attention.qkv_proj, model.layers["1"].mlp.down_proj):
        spread = float(_weight(layer).std())
        assert 0.005 < spread < 0.05
    assert all(layer.attention.shape.is_packed for layer in model.layers.values())  # attention makes room for them
