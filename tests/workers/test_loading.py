"""Folders that are broken in every way we could think of: refused in one line, before any memory is taken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel, WeightError
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.loading.resolve import resolve_model
from argosy.workers.loading.stream import LoadReport, load_weights
from argosy.workers.models.decoder import Decoder
from argosy.workers.models.registry import build_model

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def tensors() -> dict[str, Tensor]:
    """All that the config asks for."""
    shapes = {"model.embed_tokens.weight": (50, 32), "lm_head.weight": (50, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{x}_proj.weight": (32, 32) for x in "qo"}
        shapes |= {f"{stem}.self_attn.{x}_proj.weight": (16, 32) for x in "kv"}
        shapes |= {f"{stem}.mlp.{x}_proj.weight": (48, 32) for x in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (32, 48)}
        shapes |= {f"{stem}.{x}_layernorm.weight": (32,) for x in ("input", "post_attention")}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def load(folder: Path, *, tp_size: int = 1, tp_rank: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """What a rank does at start."""
    spec = read_model_spec(folder)
    rank = make_plan(spec.num_layers, tp_size, 1).ranks[tp_rank]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 1.0), dtype, CPU)
    load_weights(model, folder, spec)
    return model


def change_config(**changes: Any) -> Callable[[Path], None]:
    """None takes a key away."""

    def change(folder: Path) -> None:
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    """None takes a tensor away; "__" stands for "."."""

    def change(folder: Path) -> None:
        kept = load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            kept.pop(name.replace("__", "."), None)
            if tensor is not None:
                kept[name.replace("__", ".")] = tensor
        save_file(kept, folder / "model.safetensors")

    return change


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Replace a file."""
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )  # type: ignore[return-value]  # writes, gives nothing


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header(text: str, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    return struct.pack("<Q", len(text)) + text.encode() + data


def index(weight_map: Any) -> Callable[[Path], None]:
    """An index beside the one file."""
    return write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


ENTRY = '"model.norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}'
BROKEN: dict[str, tuple[Callable[[Path], None], type[WeightError], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), WeightError, ["config.json", "missing"]),
    "config is no JSON": (write("config.json", "{"), WeightError, ["config.json", "JSON"]),
    "config is a list": (write("config.json", "[1]"), WeightError, ["config.json", "object"]),
    "config nested deep": (write("config.json", "[" * 100_000), WeightError, ["config.json", "JSON"]),
    "no architecture": (change_config(architectures=None), WeightError, ["architectures", "None"]),
    "unknown architecture": (
        change_config(architectures=["GrokForCausalLM"]),
        UnsupportedModel,
        ["architectures", "GrokForCausalLM", "LlamaForCausalLM, MistralForCausalLM"],
    ),
    "missing key": (change_config(hidden_size=None), WeightError, ["config.json", "hidden_size", "missing"]),
    "wrong type": (change_config(num_hidden_layers="2"), WeightError, ["num_hidden_layers", "'2'", "integer"]),
    "a bool for a number": (change_config(vocab_size=True), WeightError, ["vocab_size", "True"]),
    "negative": (change_config(intermediate_size=-1), WeightError, ["intermediate_size", "-1"]),
    "NaN": (write("config.json", json.dumps({**CONFIG, "rms_norm_eps": float("nan")})), WeightError, ["rms_norm_eps"]),
    "heads": (change_config(num_key_value_heads=3), WeightError, ["num_key_value_heads", "3", "4"]),
    "odd head": (change_config(head_dim=7), WeightError, ["head_dim", "7", "even"]),
    "activation": (change_config(hidden_act="elu"), UnsupportedModel, ["hidden_act", "elu", "silu"]),
    "rope type": (
        change_config(rope_scaling={"rope_type": "mrope", "factor": 2}),
        UnsupportedModel,
        ["rope_scaling.rope_type", "mrope", "llama3"],
    ),
    "rope without factor": (
        change_config(rope_scaling={"type": "linear"}),
        WeightError,
        ["rope_scaling.factor", "missing"],
    ),
    "rope is a list": (change_config(rope_parameters=[1]), WeightError, ["rope_parameters", "[1]"]),
    "rope per layer type": (
        change_config(rope_parameters={"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}),
        UnsupportedModel,
        ["rope_parameters", "differs"],
    ),
    "dtype": (change_config(torch_dtype="float8"), UnsupportedModel, ["torch_dtype", "float8"]),
    "quantised": (
        change_config(quantization_config={"quant_method": "bitnet"}),
        UnsupportedModel,
        ["quantization_config", "bitnet", "supported: fp8"],
    ),
    "eos": (change_config(eos_token_id="</s>"), WeightError, ["eos_token_id", "</s>"]),
    "generation config": (
        write("generation_config.json", '{"eos_token_id": [1, -5]}'),
        WeightError,
        ["generation_config.json", "eos_token_id"],
    ),
    "missing tensor": (
        change_tensors(model__layers__1__mlp__up_proj__weight=None),
        WeightError,
        ["model.layers.1.mlp.up_proj.weight", "missing"],
    ),
    "untied without head": (change_tensors(lm_head__weight=None), WeightError, ["lm_head", "tie_word_embeddings"]),
    "extra tensor": (
        change_tensors(model__layers__0__self_attn__q_proj__bias=torch.zeros(32)),
        WeightError,
        ["model.safetensors", "q_proj.bias", "not part"],
    ),
    "extra layer": (
        change_tensors(model__layers__2__mlp__up_proj__weight=torch.zeros(48, 32)),
        WeightError,
        ["model.layers.2.mlp.up_proj.weight", "not part"],
    ),
    "wrong shape": (
        change_tensors(model__norm__weight=torch.zeros(31)),
        WeightError,
        ["model.safetensors", "model.norm.weight", "[31]", "[32]"],
    ),
    "wrong dtype": (
        change_tensors(model__norm__weight=torch.zeros(32, dtype=torch.int64)),
        WeightError,
        ["model.safetensors", "model.norm.weight", "I64"],
    ),
    "cut off": (cut_off, WeightError, ["model.safetensors", "cut off"]),
    "empty file": (write("model.safetensors", b""), WeightError, ["model.safetensors", "cut off"]),
    "a page of HTML": (write("model.safetensors", "<!DOCTYPE html>" * 9), WeightError, ["model.safetensors"]),
    "repeated name": (
        write("model.safetensors", header(f"{{{ENTRY},{ENTRY}}}", b"0000")),
        WeightError,
        ["model.norm.weight", "twice"],
    ),
    "overlapping": (
        write("model.safetensors", header(f"{{{ENTRY},{ENTRY.replace('norm', 'mean')}}}", b"0000")),
        WeightError,
        ["overlaps"],
    ),
    "wrong length": (
        write("model.safetensors", header("{" + ENTRY.replace("[2]", "[3]") + "}", b"0000")),
        WeightError,
        ["model.norm.weight", "needs 6 bytes, not 4"],
    ),
    "unknown dtype in header": (
        write("model.safetensors", header("{" + ENTRY.replace("BF16", "X9") + "}", b"0000")),
        WeightError,
        ["model.norm.weight", "header"],
    ),
    "index to nowhere": (index({"lm_head.weight": "a.safetensors"}), WeightError, ["index.json", "a.safetensors"]),
    "index out of the folder": (index({"a": "../../x.safetensors"}), WeightError, ["index.json", "../../x"]),
    "index promises too much": (
        index({"lm_head.weight": "model.safetensors", "ghost": "model.safetensors"}),
        WeightError,
        ["index.json", "ghost"],
    ),
    "pickled weights": (only_pickles, UnsupportedModel, ["pytorch_model.bin", "safetensors"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), WeightError, ["model.safetensors", "missing"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's download stopped half-way, or they edited a config: they read what is wrong and where."""
    monkeypatch.setattr(Decoder, "allocate", lambda self: pytest.fail("allocated before the checks"))
    breaking, error_type, words = BROKEN[kind]
    breaking(folder)
    with pytest.raises(error_type) as caught:
        load(folder)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_heads_that_cannot_be_divided_are_refused(folder: Path) -> None:
    """--tensor-parallel-size 3 for a model of 4 heads."""
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3 .*num_attention_heads=4; possible: 1, 2, 4"):
        load(folder, tp_size=3)


def test_a_sound_folder_loads_and_converts(folder: Path) -> None:
    """bf16 files, float32 arithmetic: values are those of the file."""
    saved = load_file(folder / "model.safetensors")
    model = load(folder)
    qkv = model.layers["1"].attention.qkv_proj.weight
    assert qkv.dtype == torch.float32
    assert torch.equal(qkv[:32].bfloat16(), saved["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(qkv[48:].bfloat16(), saved["model.layers.1.self_attn.v_proj.weight"])


def test_a_rank_reads_only_its_slices(folder: Path) -> None:
    """Rank 3 of 4 with two key/value heads: its own query head, a shared key head, a quarter of the MLP."""
    saved = load_file(folder / "model.safetensors")
    model = load(folder, tp_size=4, tp_rank=3)
    layer = model.layers["0"]
    k = saved["model.layers.0.self_attn.k_proj.weight"].float()
    assert torch.equal(layer.attention.qkv_proj.weight[8:16], k[8:])
    down = saved["model.layers.0.mlp.down_proj.weight"].float()
    assert torch.equal(layer.mlp.down_proj.weight, down[:, 36:])
    embed = saved["model.embed_tokens.weight"].float()
    assert torch.equal(model.embed.weight[:11], embed[39:])  # 50 words over 4 ranks: 13, 13, 13, 11
    assert not model.embed.weight[11:].any()


def test_shards_are_read_and_progress_is_told(folder: Path) -> None:
    """Big models come in several files with an index."""
    saved = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(saved)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: saved[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index(weight_map)(folder)
    spec = read_model_spec(folder)
    rank = make_plan(2, 1, 1).ranks[0]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 1.0), torch.float32, CPU)
    told: list[float] = []
    report = load_weights(model, folder, spec, told.append)
    assert isinstance(report, LoadReport)
    assert report.num_tensors == len(names)
    assert report.read_bytes == sum(tensor.nbytes for tensor in saved.values())
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert torch.equal(model.norm.weight.bfloat16(), saved["model.norm.weight"])


def test_the_last_stage_of_a_tied_model_loads_the_embedding_as_head(folder: Path) -> None:
    """Two stages, one table: each has a copy."""
    change_config(tie_word_embeddings=True)(folder)
    change_tensors(lm_head__weight=None)(folder)
    spec = read_model_spec(folder)
    rank = make_plan(2, 1, 2).ranks[1]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 1.0), torch.float32, CPU)
    load_weights(model, folder, spec)
    assert model.embed is None
    saved = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight.bfloat16(), saved)


def test_code_in_a_folder_is_left_alone(folder: Path) -> None:
    """`auto_map` names a Python file; it is not even looked at."""
    change_config(auto_map={"AutoModelForCausalLM": "evil.Model"})(folder)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    load(folder)


def test_a_name_that_is_nowhere_is_one_clear_line() -> None:
    """A typing mistake, or no network."""
    with pytest.raises(
        WeightError, match=r"^nobody/no-such-model: is no folder here.*downloaded: HF_HUB_OFFLINE"
    ) as caught:
        resolve_model("nobody/no-such-model")
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightError, match="neither a folder here nor a name"):
        resolve_model("/no/such/folder")
