"""Every family in every layout answers as transformers does: float32, greedy, whole, chunked, preempted, swapped, n.

What is compared are all logits before all tokens, with the expected tokens fed: a token that differs can't hide.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import CASES, FALLBACKS, WHOLE_ONLY, make_checkpoint, num_layers_of
from family_harness import CPU, FOUND, LAYOUTS, PARTED_WAYS, WAYS, Expected, Harness, note, run_layouts

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import init_parallel
from argosy.workers.attention.triton_backend import TritonBackend

CLOSE = 2e-4  # logits are a few units; float32 sums in another order differ by some 1e-6
EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek v2", "deepseek v2 lite", "deepseek v3", "olmoe")
EXPERTS += ("granite moe", "granite moe shared", "glm4 moe")
CARD = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
CLOSE_ON_A_CARD = 1e-2  # tensor cores multiply float32 in parts
RUNS = [(name, layout) for layout in ("TP2", "PP2", "TP2xPP2") for name in CASES]
MANY = ("llama", "llama, one kv head, biases", "qwen3", "bloom", "falcon 40b", "olmo2", "command-r", "gpt-oss")
RUNS += [(name, "TP4") for name in (*MANY, "deepseek v3")]  # more ranks than key/value heads
RUNS += [(name, layout) for name in EXPERTS for layout in ("EP2", "A2A2")]  # whole experts on each rank
RUNS += [
    (name, layout)
    for layout in ("EP4", "A2A4")
    for name in ("mixtral", "qwen3-moe", "gpt-oss", "deepseek v3", "granite moe")
]
if os.environ.get(FOUND):  # the table in the docs is being made
    RUNS += [(name, "A2A4") for name in EXPERTS if (name, "A2A4") not in RUNS]
RUNS += [("mixtral", "A2A2xPP2"), ("deepseek v3", "A2A2xPP2")]
SUMMED = tuple(name for name in EXPERTS if not name.startswith("granite"))  # whose sums are launches with norms
RUNS += [(name, "SUM2") for name in ("llama", "qwen3", *SUMMED, "phi3", "smollm3", "seed-oss", "ernie 4.5")]
RUNS += [(name, "SUMEP2") for name in ("mixtral", "qwen2-moe", "gpt-oss", "deepseek v3")] + [
    ("llama", "SUM2xPP2"),
    ("mixtral", "SUM2xPP2"),
    ("deepseek v3", "SUM2xPP2"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Expected]]:
    """All checkpoints, once."""
    torch.set_num_threads(1)
    made = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp("model")
        made[name] = (folder, make_checkpoint(folder, name))
    return made


@pytest.fixture(scope="module")
def answers(
    folders: dict[str, tuple[Path, Expected]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    """What the ranks of all layouts of more than one rank found."""
    models: dict[str, list[tuple[str, str, int, int | None]]] = {layout: [] for layout in LAYOUTS}
    for name, layout in RUNS:
        models[layout].append((name, str(folders[name][0]), num_layers_of(name), CASES[name].max_model_len))
    deadline_seconds = 900.0 if os.environ.get(FOUND) else 240.0
    return run_layouts(models, tmp_path_factory.mktemp("answers"), deadline_seconds=deadline_seconds)


@pytest.mark.parametrize("name", CASES)
def test_one_rank_equals_transformers(name: str, folders: dict[str, tuple[Path, Expected]]) -> None:
    """Somebody serves this model on one card: in one piece, in chunks, preempted, swapped, three answers at once."""
    folder, expected = folders[name]
    rank = make_plan(num_layers_of(name), 1, 1).ranks[0]
    harness = Harness(folder, rank, init_parallel(rank, "", CPU, 1.0), max_model_len=CASES[name].max_model_len)
    differences = {way: harness.largest_difference(expected, way) for way in WAYS}
    for way, difference in differences.items():
        note(name, way, difference)
    assert max(differences.values()) < CLOSE, differences
    assert harness.num_parameters == harness.spec.num_parameters


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_a_layout_equals_transformers(name: str, layout: str, answers: list[dict[str, float]]) -> None:
    """On two or four cards every rank has the logits that one big model would have."""
    tp_size, pp_size = LAYOUTS[layout]
    for found in answers[: tp_size * pp_size]:
        differences = {way: found[f"{name}|{layout}|{way}"] for way in PARTED_WAYS}
        note(name, layout, max(differences.values()))
        assert max(differences.values()) < CLOSE, differences


@pytest.mark.parametrize("name", CASES)
def test_the_planner_counts_every_parameter(name: str, folders: dict[str, tuple[Path, Expected]]) -> None:
    """A plan is made from `num_parameters` before anything is loaded."""
    spec = read_model_spec(folders[name][0])
    from safetensors import safe_open

    with safe_open(folders[name][0] / "model.safetensors", "pt") as file:
        stored = sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118  # not a dict
    assert spec.num_parameters == stored


def test_the_table_in_the_docs_has_every_case() -> None:
    """Somebody adds a family and forgets `benchmarks/families/make_table.py`, or leaves an answer that differs."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("make_table.py -->")
    rows = [line.split(" | ") for line in rest.partition("<!-- end")[0].splitlines() if line.startswith("| ")]
    named = [row[0].removeprefix("| ").removesuffix(" (transformers' modules)") for row in rows[1:]]
    assert named == [*CASES, *FALLBACKS]
    assert "differs" not in rest
    parts = {name: row[6:9] for name, row in zip(named, rows[1:], strict=True)}  # TP2, PP2, TP2xPP2
    assert all(cell != "–" for row in rows[1:] for cell in row[1:6])  # every way on one rank
    assert [name for name, cells in parts.items() if "–" in cells] == [*WHOLE_ONLY]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CASES)
def test_a_card_equals_transformers(name: str, tmp_path: Path) -> None:
    """The kernels in place of torch: in float32, where what they may differ in is the order of sums."""
    expected = make_checkpoint(tmp_path, name, wide=True)
    rank, device = make_plan(num_layers_of(name), 1, 1).ranks[0], torch.device("cuda", 0)
    harness = Harness(
        tmp_path, rank, init_parallel(rank, "", device, 1.0), max_model_len=CASES[name].max_model_len,
        backend=TritonBackend(), device=device, block_size=16,
    )  # fmt: skip
    differences = {way: harness.largest_difference(expected, way) for way in WAYS}
    assert max(differences.values()) < CLOSE_ON_A_CARD, differences


def errors_of_transformers(folder: Path, expected: Expected, device: torch.device) -> torch.Tensor:
    """In bfloat16, of the logits before each expected token, the others fed: as `Harness.errors`."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}  # others leave soft caps out in some versions
    model = AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()
    made = []
    for prompt, tokens in zip(expected.prompts, expected.tokens, strict=True):
        ids = torch.tensor([prompt + tokens[:-1]], device=device)
        made.append(model(ids, use_cache=False).logits[0, len(prompt) - 1 :].float().cpu())
    want_PNV = expected.logits_PNV
    return (torch.stack(made) - want_PNV).norm(dim=-1) / want_PNV.norm(dim=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_card_in_bfloat16_is_as_near_to_exact_numbers_as_transformers_is(name: str, tmp_path: Path) -> None:
    """The kernels as they are served. Judged by float32; medians, since a rounding may choose another expert."""
    expected = make_checkpoint(tmp_path, name, wide=True)
    rank = make_plan(num_layers_of(name), 1, 1).ranks[0]
    harness = Harness(
        tmp_path, rank, init_parallel(rank, "", CARD, 1.0), max_model_len=CASES[name].max_model_len,
        backend=TritonBackend() if CARD.type == "cuda" else None, device=CARD, block_size=16, dtype=torch.bfloat16,
    )  # fmt: skip
    ours, theirs = harness.errors(expected).median(), errors_of_transformers(tmp_path, expected, CARD).median()
    assert float(ours) < 1.5 * float(theirs) + 0.005, (float(ours), float(theirs))
