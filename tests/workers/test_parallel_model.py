"""What must hold of a model on a rank besides its answers: where blocks lie, copies, other backends, random weights.

That every family in every layout answers as transformers does is in `test_model_families`.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import make_checkpoint, num_layers_of
from family_harness import CPU, Expected, Harness

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext, init_parallel
from argosy.workers.attention.triton_backend import TritonBackend
from argosy.workers.loading.stream import load_weights
from argosy.workers.models.registry import build_model

CLOSE = 2e-4
NAMES = ("mistral", "qwen3", "gemma2", "bloom")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Expected]]:
    """A few families, once."""
    torch.set_num_threads(1)
    folders = {name: tmp_path_factory.mktemp("model") for name in NAMES}
    return {name: (folder, make_checkpoint(folder, name)) for name, folder in folders.items()}


def alone(folder: Path, name: str, *, seed: int = 0) -> Harness:
    """The whole model in this process."""
    rank = make_plan(num_layers_of(name), 1, 1).ranks[0]
    return Harness(folder, rank, init_parallel(rank, "", CPU, 1.0), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_backend_equals_the_torch_backend(name: str, models: dict[str, tuple[Path, Expected]]) -> None:
    """On a GPU the same model runs on `kernels.ops`; on a CPU those are the plain references."""
    folder, expected = models[name]
    harness = alone(folder, name)
    harness.backend = TritonBackend()
    assert harness.largest_difference(expected, "chunked") < CLOSE


def test_where_blocks_lie_changes_no_bit(models: dict[str, tuple[Path, Expected]]) -> None:
    """A request comes back after preemption and gets other blocks: its tokens may not depend on which."""
    folder, expected = models["qwen3"]
    logits = []
    for seed in (1, 2):
        harness = alone(folder, "qwen3", seed=seed)
        with torch.inference_mode():
            rows = [harness.sequence(prompt, 40) for prompt in expected.prompts]
            logits.append(harness.prefill(rows))
    assert torch.equal(*logits)


def test_blocks_are_copied_in_every_layer(models: dict[str, tuple[Path, Expected]]) -> None:
    """Copy-on-write: two answers share a block until one of them writes to it."""
    folder, expected = models["qwen3"]
    harness = alone(folder, "qwen3")
    with torch.inference_mode():
        row = harness.sequence(expected.prompts[3], 20)
        harness.prefill([row])
    source, target = row.blocks[0], harness.free[0]
    harness.cache.copy_blocks([(source, target)])
    for k_cache, v_cache in harness.cache.layers:
        assert torch.equal(k_cache[source], k_cache[target])
        assert torch.equal(v_cache[source], v_cache[target])
        assert k_cache[source].abs().sum() > 0


def test_random_weights_are_one_model_in_every_layout(models: dict[str, tuple[Path, Expected]]) -> None:
    """A plan is tried with `load_format` dummy before the weights are there: logits must not depend on the layout."""
    spec = read_model_spec(models["qwen3"][0])
    heads = []
    for tp_size in (1, 2):
        rank = make_plan(spec.num_layers, tp_size, 1).ranks[0]
        model = build_model(spec, rank, ParallelContext(rank, CPU, 1.0), torch.float32, CPU)
        load_weights(model, "nowhere", spec, load_format="dummy", seed=3)
        layer = model.layers["0"]
        heads.append((layer.attention.qkv_proj.weight, layer.mlp.down_proj.weight, model.norm.weight))
    one, two = heads
    assert torch.equal(one[0][:48], two[0][:48])
    assert torch.equal(one[1][:, :40], two[1])
    assert 0.01 < float(one[1].std()) < 0.03
    assert torch.equal(one[2], torch.ones(48))
