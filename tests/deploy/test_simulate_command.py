"""`argosy simulate` as a user types it, and the workloads it makes."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import cli
from argosy.deploy.simulate_report import percentile, sparkline
from argosy.deploy.simulate_workload import WorkloadSpec, generate, named, read_trace

ONE = ("llama-3.1-8b", "--gpus", "1 x H200")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, what was printed, what was complained about."""
    code = cli.main(["simulate", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_workload_on_a_plan_gives_a_table_and_load_over_time(capsys: pytest.CaptureFixture[str]) -> None:
    """What a user wants to know before renting anything."""
    code, shown, _ = run(capsys, *ONE, "--requests", "200", "--rate", "20", "--slo-ttft-ms", "100")
    assert code == 0
    for part in ("200 requests", "output tokens/s", "first token", "p99", "within TTFT <= 100 ms", "goodput",
                 "stages idle", "wasted", "preemptions", "load over"):  # fmt: skip
        assert part in shown, part


@pytest.mark.parametrize("flag", ["--input-len", "--output-len", "--slo-ttft-ms", "--slo-tpot-ms"])
def test_lengths_and_promises_of_nothing_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A length of 0 was divided by, with a traceback."""
    code, _, complaint = run(capsys, *ONE, "--requests", "20", flag, "0")
    assert code == 2
    assert complaint.startswith(f"argosy: {flag} 0")


def test_the_same_seed_gives_the_same_json(capsys: pytest.CaptureFixture[str]) -> None:
    """And so does stepping instead of leaping; another seed does not."""
    words = (*ONE, "--requests", "150", "--rate", "8", "--lengths", "lognormal", "--json")
    first = run(capsys, *words, "--seed", "7")[1]
    assert first == run(capsys, *words, "--seed", "7")[1]
    assert first == run(capsys, *words, "--seed", "7", "--step-by-step")[1]
    assert first != run(capsys, *words, "--seed", "8")[1]
    figures = json.loads(first)
    assert figures["requests"] == 150
    assert figures["refused"] == 0
    assert figures["ttft_seconds"]["p50"] <= figures["ttft_seconds"]["p99"]
    assert figures["load"]


def test_more_load_makes_requests_wait(capsys: pytest.CaptureFixture[str]) -> None:
    """Four times what a card can do: the queue grows and few keep their time; four cards keep up."""

    def figures(*words: str) -> Any:
        common = ("--requests", "800", "--lengths", "fixed", "--slo-ttft-ms", "500", "--json")
        return json.loads(run(capsys, *words, *common)[1])

    light, heavy = (figures(*ONE, "--rate", rate) for rate in ("10", "160"))
    four = figures("llama-3.1-8b", "--gpus", "4 x H200", "--rate", "160")
    attained = [run["slo"]["attainment"] for run in (light, heavy, four)]
    assert attained[0] == 1.0
    assert attained[1] < 0.6
    assert attained[2] > attained[1] + 0.2


def test_shared_prefixes_and_bursts(capsys: pytest.CaptureFixture[str]) -> None:
    """Three quarters of each prompt are shared by one of five: most of it is found cached."""
    code, shown, _ = run(
        capsys, *ONE, "--requests", "300", "--arrivals", "bursts", "--burst-size", "60", "--rate", "10", "--lengths",
        "fixed", "--prefixes", "5", "--prefix-len", "384", "--json",
    )  # fmt: skip
    assert code == 0
    assert 0.65 < json.loads(shown)["prefix_hit_rate"] < 0.75


def test_a_host_tier_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    """More shared prefixes than a small cache holds: with `--swap-space` they come back from the host, and sooner."""
    words = (
        *(*ONE, "--kv-cache-memory-bytes", str(2**31), "--requests", "60", "--prefixes", "12", "--prefix-len", "2048"),
        *("--input-len", "2100", "--output-len", "16", "--lengths", "fixed", "--arrivals", "at-once"),
    )
    again, swapped = (json.loads(run(capsys, *words, *more, "--json")[1]) for more in ((), ("--swap-space", "8")))
    assert again["host_tier_tokens"] == again["swapped_blocks"]["in"] == 0
    assert swapped["host_tier_tokens"] > 10_000
    assert swapped["seconds"] < 0.8 * again["seconds"]
    shown = run(capsys, *words, "--swap-space", "8")[1]
    assert "blocks went to host memory" in shown


def test_a_pipeline_shows_its_bubbles(capsys: pytest.CaptureFixture[str]) -> None:
    """Two stages under load are busy; the picture is drawn."""
    words = ("llama-3.1-8b", "--gpus", "2 x H100", "-pp", "2", "--replicas", "1", "--workload", "cpu64", "--json")
    stages = json.loads(run(capsys, *words)[1])["stages"]
    assert [row["stage"] for row in stages] == [0, 1]
    assert all(0.0 <= row["bubble"] < 0.5 for row in stages)


def test_load_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Valid SVG with a line a figure."""
    path = tmp_path / "load.svg"
    assert run(capsys, *ONE, "--requests", "50", "--rate", "20", "--svg", str(path))[0] == 0
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4


def test_traces_are_read_and_checked(tmp_path: Path) -> None:
    """JSON lines and CSV, in any order; a bad line is named."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival": 2, "input": 9, "output": 3}\n{"arrival": 1, "input": 8, "output": 2, "prefix": 4, '
                    '"prefix_len": 5}\n', encoding="utf-8")  # fmt: skip
    first, second = read_trace(path)
    assert (first.seconds, first.input_len, first.prefix, first.prefix_len) == (1.0, 8, 4, 5)
    assert (second.seconds, second.output_len, second.prefix) == (2.0, 3, -1)
    table = tmp_path / "t.csv"
    table.write_text("arrival,input,output\n0.5,10,20\n", encoding="utf-8")
    assert read_trace(table)[0].output_len == 20
    for text, named_problem in (
        ('{"arrival": 1, "input": 0, "output": 1}', "line 1: input=0"),
        ('{"arrival": 1}', "line 1: input=None"),
        ('{"arrival": 1, "input": 4, "output": 1}\n{', "line 2: is no JSON"),
        ("[1]", "holds no request"),
        ("", "holds no request"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=named_problem):
            read_trace(path)


def test_a_trace_is_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As users recorded it."""
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"arrival": n / 10, "input": 50, "output": 10}) for n in range(40)))
    figures = json.loads(run(capsys, *ONE, "--trace", str(path), "--json")[1])
    assert figures["requests"] == 40
    assert figures["output_tokens"] == 400


def test_arrivals_come_as_asked() -> None:
    """Means are kept, bursts come together, seeds matter."""
    spec = WorkloadSpec(num_requests=4000, rate=50.0, lengths="lognormal", input_len=200, output_len=100, max_len=10**6)
    found = list(generate(spec))
    assert found[-1].seconds == pytest.approx(80, rel=0.1)
    assert sum(one.input_len for one in found) / 4000 == pytest.approx(200, rel=0.1)
    bursts = list(generate(WorkloadSpec(num_requests=100, arrivals="bursts", burst_size=25, rate=5.0)))
    assert len({one.seconds for one in bursts}) == 4
    assert [one.seconds for one in generate(WorkloadSpec(num_requests=3, arrivals="even", rate=2.0))] == [0, 0.5, 1.0]
    assert len({one.seconds for one in generate(WorkloadSpec(num_requests=9, arrivals="at-once"))}) == 1
    for bad in ({"num_requests": 0}, {"rate": 0.0}, {"input_len": 10, "num_prefixes": 1, "prefix_len": 10}):
        with pytest.raises(ConfigError):
            WorkloadSpec(**bad)  # type: ignore[arg-type]  # wrong on purpose


def test_workloads_of_the_benchmark_have_their_lengths() -> None:
    """`--workload` is what `argosy bench` sends."""
    assert sum(one.output_len for one in named("fixed512x256")) == 512 * 256
    prefixed = list(named("prefix256"))
    assert {one.prefix for one in prefixed} == {0}
    assert {one.prefix_len for one in prefixed} == {2048}


def test_mistakes_are_answered_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line."""
    assert "say on what" in run(capsys, "llama-3.1-8b")[2]
    assert "not both" in run(capsys, *ONE, "--workload", "chat1000", "--trace", "x")[2]
    assert "unknown workload" in run(capsys, *ONE, "--workload", "chat")[2]
    assert "rate=0" in run(capsys, *ONE, "--rate", "0")[2]


def test_small_helpers() -> None:
    """Nearest rank, and bars that show the smallest of something."""
    assert percentile([], 50) == 0.0
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (50, 75, 99, 100)] == [2.0, 3.0, 4.0, 4.0]
    assert sparkline([0, 0.01, 1]) == " ▁█"
