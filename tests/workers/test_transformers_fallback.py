"""Models that are none of ours run through transformers' modules with our cache, or are refused with the reason."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import FALLBACKS, REFUSED, make_checkpoint, num_layers_of
from family_harness import CPU, PARTED_WAYS, WAYS, Harness, run_layouts

from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext, init_parallel
from argosy.workers.models import transformers_fallback
from argosy.workers.models.transformers_fallback import TransformersFallback

CLOSE = 2e-4


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
    assert max(differences.values()) < CLOSE, differences


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


def test_two_stages(tmp_path: Path) -> None:
    """A model that no card holds: layers whose output is a tensor or a tuple, windows, experts, scaled embeddings."""
    models = []
    for name in ("gpt bigcode", "glm4", "minimax m2", "nemotron", "helium"):
        folder = tmp_path / name.split()[0]
        make_checkpoint(folder, name)
        models.append((name, str(folder), num_layers_of(name), None))
    for rank in run_layouts({"PP2": models}, tmp_path)[:2]:
        assert len(rank) == len(models) * len(PARTED_WAYS)
        assert max(rank.values()) < CLOSE, rank


def test_a_stage_holds_its_own_layers_alone(tmp_path: Path) -> None:
    """The others' weights are let go of before anything comes to the device."""
    make_checkpoint(tmp_path, "arcee")
    whole = sum(parameter.numel() for parameter in served(tmp_path, "arcee").model.inner.model.layers.parameters())
    own = []
    for rank in make_plan(3, 1, 2).ranks:
        model = Harness(tmp_path, rank, ParallelContext(rank, CPU, 1.0)).model
        own.append(sum(parameter.numel() for parameter in model.inner.model.layers.parameters()))
    assert [round(3 * count / whole) for count in own] in ([1, 2], [2, 1])


def test_no_groups_of_ranks(tmp_path: Path) -> None:
    """Somebody asks for a group of two cards: told what to do instead, before anything is loaded."""
    make_checkpoint(tmp_path, "arcee")
    rank = make_plan(3, 2, 1).ranks[0]
    with pytest.raises(ConfigError, match=r"ArceeForCausalLM.*data_parallel_size"):
        Harness(tmp_path, rank, ParallelContext(rank, CPU, 1.0))
    shape = read_model_shape(tmp_path)
    assert [shape.why_not_tp(tp_size) is None for tp_size in (1, 2)] == [True, False], "nor is one planned"
