"""Experts of 4 and 8 bits as GPTQ, AWQ and compressed-tensors publish them answer as their plain weights do."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.cluster.protocol.quant_spec import choose_quantization
from argosy.kernels.moe_reference import IntExpertWeight
from argosy.placement.matrix_bytes import matrix_bytes
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import make_plan
from argosy.placement.planner import make_serving
from argosy.placement.process_groups import ParallelContext, init_parallel
from argosy.placement.rank_memory import StageBytes
from argosy.workers.layers.int_experts import IntExperts
from argosy.workers.loading.stream import load_weights
from argosy.workers.models.registry import build_model

from .test_int_weights import FORMATS, Format

sys.path.insert(0, str(Path(__file__).parent))
import family_cases
from family_harness import CPU, PARTED_WAYS, WAYS, Harness, load_expected, run_layouts

SHAPE = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 128,
    "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = ("gptq 4 bits", "gptq v2, ordered", "awq", "packed 4 bits, zeros", "int8, channel")
ORDERED = Format(4, 32, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, ordered=True)
PACKED = {name: FORMATS[name] for name in ("gptq 4 bits", "awq", "packed 4 bits", "int8, channel")}
PACKED |= {"gptq, ordered": ORDERED, "packed 8 bits, zeros, ordered": FORMATS["packed 8 bits, zeros, ordered"]}
PACKED |= {"bitsandbytes": FORMATS["bitsandbytes"]}


def write(folder: Path, form: Format, *, shuffled: bool = True, inner: int = 64) -> None:
    """A Qwen3-MoE in this format, and beside it what transformers answers with the plain weights. An order that the
    format has is a random one, unless not `shuffled`."""
    plainly = folder / "plain"
    plainly.mkdir()
    config = transformers.Qwen3MoeConfig(**SHAPE | {"moe_intermediate_size": inner}, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(3)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(plainly)
    plain, stored, rng = load_file(plainly / "model.safetensors"), {}, np.random.default_rng(11)
    orders = {columns: rng.permutation(columns) if shuffled else np.arange(columns) for columns in {64, inner}}
    for name, value in plain.items():
        stored[name] = value
        if name.endswith("_proj.weight"):
            del stored[name]
            layer = form.draw(rng, *value.shape, orders[value.shape[1]])
            plain[name] = layer.plain.float()
            stored.update(form.tensors(name.removesuffix(".weight"), layer))
    save_file(plain, plainly / "model.safetensors", metadata={"format": "pt"})
    made = transformers.Qwen3MoeForCausalLM.from_pretrained(plainly, dtype=torch.float32).eval()
    tokens, logits = family_cases.greedy_answers(made)
    torch.save({"prompts": family_cases.PROMPTS, "tokens": tokens, "logits": logits}, folder / "expected.pt")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((plainly / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"quantization_config": form.config}))


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_whole_numbers(name: str, tmp_path: Path) -> None:
    """Somebody has Qwen3-30B-A3B in 4 bits: it runs, with the file's numbers, and the planner knows what it takes."""
    write(tmp_path, FORMATS[name])
    rank = make_plan(2, 1, 1).ranks[0]
    harness = Harness(tmp_path, rank, init_parallel(rank, "", CPU, 1.0))
    expected = load_expected(tmp_path)
    assert max(harness.largest_difference(expected, way) for way in WAYS) < 1e-3
    shape = read_model_shape(tmp_path)
    experts = sum(
        parameter.nbytes for key, parameter in harness.model.named_parameters() if ".experts." in key
    )  # fmt: skip
    sizes = StageBytes(shape, make_serving(shape, dtype="float32"))
    assert experts == 4 * 2 * 4 * 3 * 64 * 64 < sizes.layer_bytes(1, 0, 2)


@pytest.fixture
def used_memory() -> Iterator[None]:
    """New tensors hold what is no number, as memory that was somebody else's may; a fresh process has zeros in it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def experts_of(folder: Path, tp_size: int, tp_rank: int, *, whole: bool) -> IntExperts:
    """Those of the first layer of one rank."""
    spec = read_model_spec(folder).as_served(None, expert_parallel=whole, all2all="sum")
    rank = make_plan(2, tp_size, 1).ranks[tp_rank]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.float32, CPU)
    load_weights(model, folder, spec)
    found = model.layers["0"].mlp.experts
    assert isinstance(found, IntExperts)
    return found


@pytest.mark.usefixtures("used_memory")
@pytest.mark.parametrize("name", PACKED)
def test_packed_experts_are_the_files_numbers_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card they stay packed: alone, cut over two ranks (down to groups of 32 inputs, and through
    inputs that have an order), and whole on each."""
    write(tmp_path, PACKED[name])
    for tp_size, whole in ((1, False), (2, False), (2, True)):
        for rank in range(tp_size):
            monkeypatch.setattr(IntExperts, "packs_on_cpu", False)
            plain = experts_of(tmp_path, tp_size, rank, whole=whole)
            monkeypatch.setattr(IntExperts, "packs_on_cpu", True)
            packed = experts_of(tmp_path, tp_size, rank, whole=whole)
            for product in ("gate_up", "down"):
                want, got = getattr(plain, product), getattr(packed, product)
                assert isinstance(got, IntExpertWeight)
                assert (got.order_EJ is not None) == ("ordered" in name)
                for expert in range(len(want)):
                    assert torch.equal(got.of(expert).float(), want[expert])


@pytest.mark.usefixtures("used_memory")
def test_packed_experts_that_need_fewer_places_than_they_could_leave_the_rest_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order was announced and is the plain one: each of two ranks has two whole groups, where it might have had a
    part of all four, and so a unit of places more."""
    write(tmp_path, ORDERED, shuffled=False, inner=128)
    for rank in range(2):
        monkeypatch.setattr(IntExperts, "packs_on_cpu", False)
        want = experts_of(tmp_path, 2, rank, whole=False).down
        monkeypatch.setattr(IntExperts, "packs_on_cpu", True)
        got = experts_of(tmp_path, 2, rank, whole=False).down
        assert isinstance(got, IntExpertWeight)
        assert (got.packed.num_inputs, got.num_inputs) == (160, 64)
        for expert in range(len(want)):
            assert torch.equal(got.of(expert).float(), want[expert])


@pytest.mark.parametrize("name", ["gptq, ordered", "awq"])
def test_packed_experts_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model with them, by their definition."""
    monkeypatch.setattr(IntExperts, "packs_on_cpu", True)
    write(tmp_path, PACKED[name])
    rank = make_plan(2, 1, 1).ranks[0]
    harness = Harness(tmp_path, rank, init_parallel(rank, "", CPU, 1.0))
    expected = load_expected(tmp_path)
    assert max(harness.largest_difference(expected, way) for way in WAYS) < 1e-3


def test_plain_experts_are_rounded_to_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quantization int4` means the experts, too, which are nearly all of a mixture's weights."""
    write(tmp_path, FORMATS["awq"])
    plainly = tmp_path / "plain"
    monkeypatch.setattr(IntExperts, "packs_on_cpu", True)
    spec = msgspec.structs.replace(read_model_spec(plainly), quantization=choose_quantization({}, "int4"))
    rank = make_plan(2, 1, 1).ranks[0]
    model = build_model(spec, rank, ParallelContext(rank, CPU, 5.0), torch.bfloat16, CPU)
    load_weights(model, plainly, spec)
    experts = model.layers["1"].mlp.experts
    assert isinstance(experts.down, IntExpertWeight)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    stored = load_file(plainly / "model.safetensors")[name]
    steps = (stored.amax(1) - stored.amin(1).clamp(max=0.0)) / 15
    off = experts.down.of(3).float() - stored
    assert bool((off.abs() <= 0.51 * steps[:, None] + 0.01 * stored.abs() + 1e-4).all())
    shape = read_model_shape(plainly)
    serving = make_serving(shape, dtype="bfloat16", quantization="int4")
    wanted = sum(
        matrix_bytes(shape, m, serving.weight_format, serving.dtype_bytes, 1)
        for m in shape.layer(1).matrices
        if m.is_experts
    )
    assert wanted == sum(parameter.nbytes for parameter in experts.parameters())


def test_in_parts(tmp_path: Path) -> None:
    """Cut over two ranks, whole on each, and reached by tokens that are sent there."""
    models = []
    for name in ("gptq v2, ordered", "awq"):
        folder = tmp_path / name.split()[0]
        folder.mkdir()
        write(folder, FORMATS[name])
        models.append((name, str(folder), 2, None))
    found = run_layouts({"TP2": models, "EP2": models[:1], "A2A2": models[1:]}, tmp_path)
    assert [len(rank) for rank in found] == [4 * len(PARTED_WAYS)] * 2 + [0, 0]
    for rank in found[:2]:
        assert max(rank.values()) < 1e-3, rank
