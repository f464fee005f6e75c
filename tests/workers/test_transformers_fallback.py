"""Models that are none of ours run through transformers' modules with our cache, or are refused with the reason."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import family_harness
from family_cases import FALLBACKS, NUM_NEW, REFUSED, WHOLE_ONLY, Case, make_checkpoint, num_layers_of
from family_harness import CPU, FOUND, PARTED_WAYS, WAYS, Harness, note, run_layouts

from argosy import LLM, SamplingParams
from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext, init_parallel
from argosy.workers.attention.triton_backend import TritonBackend
from argosy.workers.models import transformers_fallback
from argosy.workers.models.transformers_fallback import TransformersFallback

CLOSE = 2e-4
CLOSE_ON_A_CARD = 1e-2  # tensor cores multiply float32 in parts
NUM_CARDS = torch.cuda.device_count()


def served(folder: Path, name: str) -> Harness:
    rank = make_plan(num_layers_of(name), 1, 1).ranks[0]
    return Harness(folder, rank, init_parallel(rank, "", CPU, 1.0))


@pytest.mark.parametrize("name", FALLBACKS)
def test_a_model_of_transformers_answers_as_there(name: str, tmp_path: Path) -> None:
    """Windows of some layers, experts, one key/value head, a head without rotation: its modules, our blocks."""
    expected = make_checkpoint(tmp_path, name)
    harness = served(tmp_path, name)
    assert type(harness.model) is TransformersFallback
    differences = {way: harness.largest_difference(expected, way) for way in WAYS}
    for way, difference in differences.items():
        note(name, way, difference)
    assert max(differences.values()) < CLOSE, differences


@pytest.mark.parametrize(
    "overrides",
    [{"rope_theta": 20.0}, {"rms_norm_eps": 0.5}, {"architectures": ["ArceeForCausalLM"], "model_type": "arcee"}],
    ids=lambda overrides: next(iter(overrides)),
)
def test_overrides_of_the_config_reach_its_modules(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--hf-overrides` was read for the cache alone: modules were made by what stands in the folder."""
    changed = {key: value for key, value in overrides.items() if key not in ("architectures", "model_type")}
    arcee = FALLBACKS["arcee"]
    expected = make_checkpoint(tmp_path, "arcee", case=replace(arcee, settings=arcee.settings | changed))
    config = json.loads((tmp_path / "config.json").read_text())
    if "rope_theta" in overrides:
        config["rope_parameters"]["rope_theta"] = 10_000.0
    others = {"architectures": ["OurOwn"], "model_type": "ours", "rms_norm_eps": 1e-6}
    config |= {key: others[key] for key in overrides if key in others}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(family_harness, "read_model_spec", lambda folder: read_model_spec(folder, overrides))
    assert served(tmp_path, "arcee").largest_difference(expected, WAYS[0]) < CLOSE


EYES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2,
}  # fmt: skip
MORE_EYES = EYES | {
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}
WITH_EYES = {
    "gemma4": Case("Gemma4Config", "Gemma4ForConditionalGeneration", {
        "text_config": FALLBACKS["gemma4"].settings, "vision_config": EYES, "audio_config": None}),
    "llama4": Case("Llama4Config", "Llama4ForConditionalGeneration", {
        "text_config": FALLBACKS["llama4, up to a chunk"].settings, "vision_config": MORE_EYES}),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_EYES)
def test_models_with_eyes_answer_to_text(name: str, tmp_path: Path) -> None:
    """As these are published: the text's numbers in a config of their own, and weights of a vision tower beside."""
    expected = make_checkpoint(tmp_path, name, case=WITH_EYES[name])
    (rank,) = make_plan(3, 1, 1).ranks
    harness = Harness(tmp_path, rank, init_parallel(rank, "", CPU, 1.0), max_model_len=128)
    assert max(harness.largest_difference(expected, way) for way in WAYS) < CLOSE


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_wrong_is_refused(reason: str, tmp_path: Path) -> None:
    """Without our knowing its masks, a model would answer, only not what it should."""
    make_checkpoint(tmp_path, reason)
    with pytest.raises(UnsupportedModel, match=reason):
        served(tmp_path, reason)


def test_an_attention_that_is_not_what_it_seems_is_found_before_anything_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its reason: a short prompt is answered with transformers' own attention and with ours first."""
    make_checkpoint(tmp_path, "arcee")
    attend = transformers_fallback._attend

    def forgetful(*args: Any, **options: Any) -> Any:
        return attend(*args, **options | {"scaling": 0.1})

    monkeypatch.setattr(transformers_fallback, "_attend", forgetful)
    with pytest.raises(UnsupportedModel, match=r"ArceeForCausalLM.*its answers differ by \d"):
        served(tmp_path, "arcee")


def test_layouts(tmp_path: Path) -> None:
    """A model that no card holds: layers whose output is a tensor or a tuple, windows, experts, scaled embeddings;
    groups that share heads, or have several ranks for each key/value head; widths that can't be divided."""
    models = []
    for name in FALLBACKS:
        folder = tmp_path / name.replace(" ", "")
        make_checkpoint(folder, name)
        models.append((name, str(folder), num_layers_of(name), None))
    some = [model for model in models if model[0] in ("glm4", "gpt bigcode", "minimax m2")]
    runs = {"TP2": models, "TP2xPP2": some, "TP4": some[:2]}
    if os.environ.get(FOUND):  # the table in the docs is being made
        split = [model for model in models if model[0] not in WHOLE_ONLY]
        runs |= {"PP2": split, "TP2xPP2": split}
    found = run_layouts(runs, tmp_path, deadline_seconds=600.0)
    for rank in found:
        for key, difference in rank.items():
            name, layout, _ = key.split("|")
            note(name, layout, difference)
        assert max(rank.values()) < CLOSE, rank
    assert len(found[0]) == sum(map(len, runs.values())) * len(PARTED_WAYS)


@pytest.mark.parametrize("name", WHOLE_ONLY)
def test_layers_that_ask_for_tokens_are_not_split_over_stages(name: str, tmp_path: Path) -> None:
    """Found by the trial before anything is served, which gives later stages what they will have."""
    make_checkpoint(tmp_path, name)
    rank = make_plan(num_layers_of(name), 1, 2).ranks[1]
    with pytest.raises(UnsupportedModel, match=r"differ by .* on several stages \(use pipeline_parallel_size=1\)"):
        Harness(tmp_path, rank, ParallelContext(rank, CPU, 1.0))


def test_a_stage_holds_its_own_layers_alone(tmp_path: Path) -> None:
    """The others' weights are let go of before anything comes to the device."""
    make_checkpoint(tmp_path, "arcee")
    whole = sum(parameter.numel() for parameter in served(tmp_path, "arcee").model.inner.model.layers.parameters())
    own = []
    for rank in make_plan(3, 1, 2).ranks:
        model = Harness(tmp_path, rank, ParallelContext(rank, CPU, 1.0)).model
        own.append(sum(parameter.numel() for parameter in model.inner.model.layers.parameters()))
    assert [round(3 * count / whole) for count in own] in ([1, 2], [2, 1])


def test_a_rank_of_a_group_holds_its_part_of_every_linear_layer(tmp_path: Path) -> None:
    """Embedding and norms are whole, and so is a head of an odd number of rows."""
    make_checkpoint(tmp_path, "arcee")
    (alone,) = make_plan(3, 1, 1).ranks
    counts = []
    for rank in (alone, *make_plan(3, 2, 1).ranks):
        inner = Harness(tmp_path, rank, ParallelContext(rank, CPU, 1.0)).model.inner
        counts.append({name: parameter.numel() for name, parameter in inner.named_parameters()})
    whole, *parts = counts
    cut = [name for name, count in whole.items() if 2 * parts[0][name] == count]
    assert parts[0] == parts[1]
    assert len(cut) == 3 * 6, "four of attention, two of the MLP (it has no gate)"
    assert all("proj" not in name for name in whole.keys() - set(cut))


def test_a_group_that_heads_can_not_be_divided_over(tmp_path: Path) -> None:
    """Told which sizes do, before anything is loaded; nor is one planned."""
    make_checkpoint(tmp_path, "arcee")
    rank = make_plan(3, 3, 1).ranks[0]
    with pytest.raises(ConfigError, match="num_attention_heads=4; possible: 1, 2, 4"):
        Harness(tmp_path, rank, ParallelContext(rank, CPU, 1.0))
    shape = read_model_shape(tmp_path)
    assert [shape.why_not_tp(tp_size) is None for tp_size in (1, 2, 3, 4)] == [True, True, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not NUM_CARDS, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", FALLBACKS)
def test_a_card_answers_as_transformers(name: str, tmp_path: Path) -> None:
    """Its modules around our kernels, over a cache in blocks of 16."""
    expected = make_checkpoint(tmp_path, name, wide=True)
    rank, device = make_plan(num_layers_of(name), 1, 1).ranks[0], torch.device("cuda", 0)
    parallel = init_parallel(rank, "", device, 1.0)
    harness = Harness(tmp_path, rank, parallel, backend=TritonBackend(), device=device, block_size=16)
    differences = {way: harness.largest_difference(expected, way) for way in WAYS}
    assert max(differences.values()) < CLOSE_ON_A_CARD, differences


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "tp_size", "pp_size"), [("minimax m2", 2, 1), ("gemma4", 2, 1), ("glm4", 1, 2), ("minimax m2", 2, 2)]
)
def test_cards_together_answer_as_transformers(name: str, tp_size: int, pp_size: int, tmp_path: Path) -> None:
    """Whole engines: gathers and hand-overs over NCCL, prompts in pieces, rows that come and go."""
    if tp_size * pp_size > NUM_CARDS:
        pytest.skip(f"needs {tp_size * pp_size} NVIDIA GPUs, here are {NUM_CARDS}")
    expected = make_checkpoint(tmp_path, name, wide=True)
    assert engine_tokens(tmp_path, expected.prompts, tp_size, pp_size) == expected.tokens


def engine_tokens(folder: Path, prompts: list[list[int]], tp_size: int, pp_size: int, **settings: Any) -> Any:
    """Greedy, of an engine in float32."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False)
    with LLM(
        str(folder), dtype="float32", distributed_executor_backend="mp", skip_tokenizer_init=True, max_num_seqs=8,
        max_num_batched_tokens=16, num_gpu_blocks_override=64, cpu_threads=1, tensor_parallel_size=tp_size,
        pipeline_parallel_size=pp_size, **settings,
    ) as llm:  # fmt: skip
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_an_engine_of_two_ranks(tmp_path: Path) -> None:
    """Somebody serves a model of transformers with `tensor_parallel_size=2`."""
    expected = make_checkpoint(tmp_path, "arcee")
    assert engine_tokens(tmp_path, expected.prompts, 2, 1, device="cpu") == expected.tokens
