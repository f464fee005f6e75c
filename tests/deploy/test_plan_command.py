"""`argosy plan` as a user types it."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import huggingface_hub
import pytest

from argosy.deploy import cli
from argosy.deploy.plan_text import describe_topology
from argosy.placement.calibration import FOLDER as CALIBRATIONS
from argosy.placement.calibration import default_calibration
from argosy.placement.model_sources import CONFIG_FOLDER
from argosy.placement.topology import ClusterTopology, Link, Node, NodeLink


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, what was printed, what was complained about."""
    code = cli.main(["plan", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_plan_says_where_everything_goes_and_what_it_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, cards, stages, blocks, times, cost, and why the others lost."""
    code, shown, _ = run(capsys, "llama-3.1-70b", "--gpus", "4 x H200", "--price", "3")
    assert code == 0
    for part in ("70.55 B parameters, 141.11 GB", "plan: 2 x TP2 x PP1, 4 of 4 devices", "layers 0-79", "H200 0,1",
                 "KV cache", "first token", "output tokens/s", "a million output tokens at 12.00 an hour",
                 "why not another:", "% slower", "lacks",
                 "argosy serve meta-llama/Llama-3.1-70B -tp 2 -pp 1 -dp 2"):  # fmt: skip
        assert part in shown, part
    assert "█" in shown


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("llama-3.1-8b", "--price", "nan"), "--price nan: must be a number from 0"),
        (("llama-3.1-8b", "--price", "-3"), "--price -3.0: must be a number from 0"),
        (("llama-3.1-8b", "--concurrency", "0"), "--concurrency 0: must be a number from 1"),
        (("llama-3.1-8b", "--max-tpot-ms", "-1"), "--max-tpot-ms -1.0: must be a number above 0"),
        (("llama-3.1-8b", "--max-model-len", "200000"), "exceeds the 131072 positions of llama-3.1-8b"),
        (("",), "model='': name a folder"),
    ],
)
def test_what_makes_no_plan_is_refused(words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A cost of nan was printed, a command that can't start was advised, and no name was the folder one stood in."""
    code, _, complaint = run(capsys, *words, "--gpus", "H200")
    assert code == 2
    assert named in complaint


def test_json_holds_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes and seconds, every rank with node, card and layers, every loser with its reason."""
    code, shown, _ = run(capsys, "deepseek-r1", "--gpus", "8 x H100", "--nodes", "2", "--json")
    answer = json.loads(shown)
    assert code == 0
    assert answer["chosen"]["fits"]
    assert answer["settings"]["tensor_parallel_size"] * answer["settings"]["pipeline_parallel_size"] == 16
    assert len(answer["ranks"]) == 16
    assert {rank["node"] for rank in answer["ranks"]} == {"node-0", "node-1"}
    stages = answer["replicas"][0]["stages"]
    assert sum(stage["last_layer"] - stage["first_layer"] for stage in stages) == 61
    assert min(stage["num_blocks"] for stage in stages) == answer["replicas"][0]["num_blocks"]
    assert all(loser["why"] for loser in answer["losers"])


def test_without_a_cluster_it_says_what_the_model_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of cards: 405B takes 8 H200, 4 in FP8, 2 in 4 bits."""
    code, shown, _ = run(capsys, "llama-3.1-405b", "--json")
    assert code == 0
    needs = {row["format"]: row["needs"]["H200"] for row in json.loads(shown)}
    assert needs == {"bfloat16": "8", "fp8": "4", "awq": "2"}
    _, shown, _ = run(capsys, "llama-3.1-8b")  # in words
    assert "fewest GPUs that hold it" in shown


def test_a_picture_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Valid SVG with a box a card; what is not used says so."""
    path = tmp_path / "plan.svg"
    words = ["llama-3.1-8b", "--gpus=4xL4", "--nodes", "3", "-tp", "2", "-pp", "1", "--replicas", "1", "--svg"]
    code, _, _ = run(capsys, *words, str(path))
    assert code == 0
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert text.count(">GPU ") == 12
    assert text.count("not used") == 10
    assert "replica 0 rank 1" in text


def test_what_cannot_be_is_refused_with_reasons(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """No plan is exit code 1, a mistake is 2; both say what to do in words."""
    code, _, complaint = run(capsys, "llama-3.1-405b", "--gpus", "4 x A10G")
    assert code == 1
    assert "lacks" in complaint
    assert "--quantization fp8" in complaint
    code, _, complaint = run(capsys, "llama-3.1-8b", "--gpus", "8 x GTX")
    assert (code, "unknown GPU model" in complaint) == (2, True)
    code, _, complaint = run(capsys, "llama-3.1-8b", "--gpus", "1 x L4", "--cluster", "x.yaml")
    assert (code, "one of --cluster" in complaint) == (2, True)
    code, _, complaint = run(capsys, "llama-3.1-8b", "--cluster", str(tmp_path / "none.yaml"))
    assert (code, "none.yaml" in complaint) == (2, True)
    code, _, complaint = run(capsys, "llama-99", "--gpus", "1 x L4")
    assert (code, "known by name" in complaint) == (2, True)
    code, _, complaint = run(capsys, "llama-3.1-8b", "--gpus", "1 x H200", "--svg", str(tmp_path / "a" / "b.svg"))
    assert code == 2
    assert "can't be written: No such file or directory; name a file in a folder of yours" in complaint


def test_a_larger_share_of_the_cards_is_named_where_that_is_all_that_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With its value, which does; not where no share of such a card holds the model."""
    code, _, complaint = run(capsys, "llama-3.1-8b", "--gpus", "1 x L4", "--gpu-memory-utilization", "0.7")
    assert code == 1
    found = re.search(r"\(--gpu-memory-utilization (0\.\d\d) would do\)", complaint)
    assert found, complaint
    assert run(capsys, "llama-3.1-8b", "--gpus", "1 x L4", "--gpu-memory-utilization", found[1])[0] == 0
    less = f"{float(found[1]) - 0.02:.2f}"
    assert run(capsys, "llama-3.1-8b", "--gpus", "1 x L4", "--gpu-memory-utilization", less)[0] == 1
    for words in (("llama-3.1-70b", "--gpus", "1 x L4"), ("llama-3.1-8b", "--gpus", "1 x L4", "-q", "none",
                  "--kv-cache-memory-bytes", "20GiB", "--gpu-memory-utilization", "0.7")):  # fmt: skip
        code, _, complaint = run(capsys, *words)
        assert (code, "would do" in complaint) == (1, False), complaint


def test_bytes_and_lengths_are_written_as_for_serve(capsys: pytest.CaptureFixture[str]) -> None:
    """2GiB and 8k, and what is none is said."""
    words = ("llama-3.1-8b", "--gpus", "1 x H200", "--json")
    short = json.loads(run(capsys, *words, "--kv-cache-memory-bytes", "2GiB", "--max-model-len", "8k")[1])
    long = json.loads(run(capsys, *words, "--kv-cache-memory-bytes", str(2 << 30), "--max-model-len", "8192")[1])
    assert short == long
    args = cli.build_parser().parse_args(["bench", "--kv-cache-memory-bytes", "2GiB", "--usable-memory", "18.3G"])
    assert (args.kv_cache_memory_bytes, args.usable_memory) == (2 << 30, int(18.3 * 2**30))
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["bench", "--kv-cache-memory-bytes", "much"])
    assert "'much'" in capsys.readouterr().err


def test_settings_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """FP8 keys and values double the blocks; half the memory is less than half of them."""

    def blocks(*words: str) -> int:
        _, shown, _ = run(capsys, "llama-3.1-8b", "--gpus", "1 x H100", "--json", *words)
        return int(json.loads(shown)["replicas"][0]["num_blocks"])

    plain = blocks()
    assert blocks("--kv-cache-dtype", "fp8_e4m3") in (2 * plain, 2 * plain + 1)
    assert blocks("--kv-cache-dtype", "int8") == pytest.approx(2 * 128 / 129 * plain, abs=2)
    assert blocks("--gpu-memory-utilization", "0.46") < plain / 2
    assert blocks("-q", "fp8") > plain


def test_the_same_by_hand_is_all_that_was_planned_with(capsys: pytest.CaptureFixture[str]) -> None:
    """Replicas, and each setting of `serve`, in any of its names; a format that only checkpoints have is none."""
    words = ["--swap-space", "64", "--kv-cache-dtype", "int8_per_token_head", "--cpu-offload-gb", "2"]
    _, shown, _ = run(capsys, "llama-3.1-8b", "--gpus", "2 x H200", "-tp", "1", "-q", "int4", *words)
    line = shown.splitlines()[-1]
    for part in ("-tp 1 -pp 1 -dp 2", "--swap-space 64", "--kv-cache-dtype int8", "--cpu-offload-gb 2", "int4"):
        assert part in line, part
    _, shown, _ = run(capsys, "llama-3.1-8b", "--gpus", "1 x H200", "-q", "awq")
    assert shown.splitlines()[-1].endswith("argosy serve meta-llama/Llama-3.1-8B -tp 1 -pp 1")


def test_bounds_of_stages_are_planned_with(capsys: pytest.CaptureFixture[str]) -> None:
    """As many stages as bounds, each within its own; layers move to where room is; the words for `serve` say both."""
    words = ["llama-3.1-8b", "--gpus", "2 x H200", "--max-num-seqs", "1024", "--max-num-batched-tokens", "8192"]
    _, shown, _ = run(capsys, *words, "--stage-memory-gb", "[0,14]", "--json")
    replica = json.loads(shown)["replicas"][0]
    first, second = replica["stages"]
    assert second["limit_bytes"] == 14 * 2**30 < first["limit_bytes"]
    assert replica["num_blocks"] * second["block_bytes"] <= second["limit_bytes"] - second["weight_bytes"]
    counts = [stage["last_layer"] - stage["first_layer"] for stage in (first, second)]
    assert counts[0] > counts[1] + 8
    _, shown, _ = run(capsys, *words, "--stage-memory-gb", "[0,14]")
    assert shown.splitlines()[-1].endswith(
        f"--pipeline-layers [{counts[0]},{counts[1]}] --max-num-seqs 1024 --max-num-batched-tokens 8192 "
        "--stage-memory-gb [0,14]"
    )
    code, _, complaint = run(capsys, *words, "--stage-memory-gb", "[0,14]", "-pp", "1")
    assert (code, "stage_memory_gb=[0.0, 14.0] must be 1 number" in complaint) == (2, True)
    code, _, complaint = run(capsys, *words, "--stage-memory-gb", "14")
    assert (code, "--stage-memory-gb 14: must be a JSON list" in complaint) == (2, True)


def test_links_that_are_known_are_told_and_not_the_default() -> None:
    """A cluster whose links were all measured was shown with the 25 Gbit/s that are taken for granted."""

    def told(num_links: int, rates: tuple[float, ...]) -> str:
        names = ["a", "b", "c"]
        pairs = [("a", "b"), ("a", "c"), ("b", "c")][:num_links]
        way = [Link(kind="network", gbytes_per_second=rate, latency_us=9.0, measured=True) for rate in rates]
        links = tuple(NodeLink(first=x, second=y, link=one) for (x, y), one in zip(pairs, way, strict=True))
        nodes = tuple(Node(node_id=name, address=name) for name in names)
        return describe_topology(ClusterTopology(nodes=nodes, links=links)).partition("between nodes ")[2]

    assert told(0, ()) == "network 2.8 GB/s"
    assert told(1, (0.19,)) == "network 2.8 GB/s, 1 link of 0.19 GB/s (measured)"
    assert told(3, (3.1, 2.97, 3.0)) == "3 links of 2.97 to 3.1 GB/s (measured)"


def test_a_model_on_the_hub_is_planned_by_its_config_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name that does not ship: a few kB are fetched, or taken from the cache, and no weights."""
    asked: list[tuple[str, object]] = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(tmp_path)

    config = json.loads((CONFIG_FOLDER / "llama-3.2-1b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, shown, _ = run(capsys, "some-one/New-Model", "--gpus", "1 x L4")
    assert code == 0
    assert "some-one/New-Model: " in shown
    assert "layers 0-2 " in shown
    assert shown.splitlines()[-1].startswith("the same by hand: argosy serve some-one/New-Model")
    assert asked == [("some-one/New-Model", ["config.json"])]
    code, _, told = run(capsys, "no-model", "--gpus", "1 x L4")
    assert (code, "none of the models known by name" in told) == (2, True)


def test_the_command_that_is_said_would_start(capsys: pytest.CaptureFixture[str]) -> None:
    """A card whose cache is shorter than the model: without a length the start would be refused."""
    code, shown, _ = run(capsys, "llama-3.1-8b", "--gpus", "1 x L4")
    found = re.search(r"cache holds ([\d,]+) tokens, fewer than the 131,072 .* --max-model-len (\d+) or less", shown)
    assert code == 0
    assert found is not None
    assert found[1].replace(",", "") == found[2]
    assert shown.splitlines()[-1].endswith(f" --max-model-len {found[2]}")
    for length, is_noted in ((8192, False), (100_000, True)):
        _, shown, _ = run(capsys, "llama-3.1-8b", "--gpus", "1 x L4", "--max-model-len", str(length))
        assert ("fewer than" in shown) == is_noted
        assert shown.splitlines()[-1].count("--max-model-len") == 1


def test_ratios_of_another_device_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    """A file that `argosy bench --calibration` made on a laptop says little of a card."""
    file = CALIBRATIONS / "nvidia_h200.json"
    shown = run(capsys, "llama-3.1-8b", "--gpus", "1 x H200", "--calibration", str(file))[1]
    assert "was measured on" not in shown
    shown = run(capsys, "llama-3.1-8b", "--gpus", "1 x L4", "--calibration", str(file))[1]
    assert "note: the calibration was measured on H200: its ratios may be far off for L4" in shown


def test_a_plan_says_how_far_off_plans_were_on_such_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle and at worst, by kind, with the row that it was; of cards that nobody measured on just that."""
    shown = run(capsys, "llama-3.1-8b", "--gpus", "1 x H200")[1]
    judged = default_calibration("H200").judged
    assert {one.kind for one in judged} == {"decode step", "throughput", "KV blocks", "start", "first token"}
    assert "of rows measured on H200, half were foretold within; the worst" in shown
    for one in judged:
        (line,) = (line for line in shown.splitlines() if f"{one.rows} {one.kind}" in line)
        assert f"{one.middle:.1%}" in line, line
        assert f"{one.most:+.1%} ({one.row})" in line, line
    assert re.search(r"start +\d s with kernels compiled before", shown)
    answer = json.loads(run(capsys, "llama-3.1-8b", "--gpus", "1 x H200", "--json")[1])
    assert answer["forecasts_judged"]["H200"][0]["kind"] == "decode step"
    assert 4 < answer["start_seconds"] < 10
    shown = run(capsys, "llama-3.1-8b", "--gpus", "2 x L4", "--max-model-len", "4096")[1]
    assert "nobody measured on L4: H200's ratios" in shown
    assert "kernels compiled" not in shown
    assert "set by hand from" in run(capsys, "gpt2", "--gpus", "1 x CPU", "--dtype", "float32")[1]
