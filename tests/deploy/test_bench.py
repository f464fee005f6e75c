"""The figures' frame: what a row says besides its figure, and the table people read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.cluster.protocol.errors import ConfigError, WeightError
from argosy.deploy import bench, bench_engine, bench_models, cli, workload
from argosy.deploy.bench_load import Timing


def row(engine: str, rate: float) -> dict[str, object]:
    """One measured row, as short as the table allows."""
    return {
        "model": "tiny", "dtype": "float32", "workload": "cpu64", "engine": engine, "output_tokens_per_second": rate,
        "machine": "a machine", "cores": 2,
    }  # fmt: skip


def test_the_ratio_is_to_the_peers_best_mode() -> None:
    """Beating its slowest mode proves nothing."""
    text = bench.table(
        [row("argosy", 300.0), row("transformers one by one", 50.0), row("transformers static batch", 100.0)]
    )
    ours = next(line for line in text.splitlines() if " argosy " in line)
    assert ours.rstrip().endswith("3.00")
    assert "a machine, 2 cores; medians; ratio to" in text
    assert bench.table([row("argosy", 300.0)]).endswith("2 cores; medians")  # no peer, no ratio


def test_a_workload_that_is_none_is_said_before_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was said after the start, which takes minutes for large models."""
    monkeypatch.setattr(bench, "_measure", lambda args: pytest.fail("it began to measure"))
    args = cli.build_parser().parse_args(["bench", "--workload", "cpu8", "decode9"])
    with pytest.raises(ConfigError, match="unknown workload 'decode9'; there are"):
        bench.main(args)


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--concurrency", "8", "0"]])
def test_a_figure_of_nothing_is_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No repeats started an engine, and ended with the traceback of a median of nothing."""
    monkeypatch.setattr(bench, "_measure", lambda args: pytest.fail("it began to measure"))
    with pytest.raises(ConfigError, match=f"{words[0]} 0: must be at least 1"):
        bench.main(cli.build_parser().parse_args(["bench", *words]))


def test_a_row_names_machine_versions_and_commit() -> None:
    """A figure without them can't be compared with anything."""
    about = bench.describe_machine()
    assert about["machine"]
    assert about["argosy"]
    assert {"python", "commit", "versions", "gpus", "cores", "time"} <= set(about)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_random_shapes_are_those_the_peers_were_measured_with(name: str, tmp_path: Path) -> None:
    """The names stand for exact shapes."""
    folder, options = bench_models.make_folder(name, tmp_path)
    assert options == {"load_format": "dummy", "skip_tokenizer_init": True}
    assert bench_models.vocab_size(folder) == {"tiny": 4096, "small": 32000}[name]


def test_a_folder_is_taken_as_it_is_and_a_typo_is_not(tmp_path: Path) -> None:
    """`--model tny` is no shape, and no folder either."""
    with pytest.raises(WeightError):
        bench_models.make_folder("tny", tmp_path)


def test_a_decode_step_is_the_time_between_tokens_and_a_rate_all_tokens_over_all_seconds() -> None:
    """Two runs of two requests: medians over runs, the middle of a run's requests, first tokens apart."""
    runs = [(100.0, 2.0, [0.2, 0.4], [0.004, 0.006]), (120.0, 1.5, [0.1, 0.3], [0.003, 0.003])]
    step = bench_engine.summary("decode8", runs)
    assert (step["figure"], step["unit"], step["spread"]) == (4.0, "ms/step", [3.0, 5.0])
    assert step["repeats"] == 2
    assert step["ttft_ms_p50"] == pytest.approx(250.0)
    rate = bench_engine.summary("chat1000", runs)
    assert (rate["figure"], rate["unit"], rate["spread"]) == (110.0, "output tokens/s", [100.0, 120.0])
    assert rate["ms_per_token"] == pytest.approx(3.5)


def test_what_is_measured_are_the_tokens_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of ten seconds: tokens of all answers over it, gaps without the first token; each repeat other tokens, the
    digest that of the workload itself; prefixes are forgotten before each."""
    seen: list[list[int]] = []
    forgotten: list[int] = []

    def run(llm: object, requests: workload.Workload) -> tuple[float, list[Any]]:
        seen.append(requests[0].prompt)
        timing = SimpleNamespace(first_token_ts=1.0, last_token_ts=2.27, num_generation_tokens=128,
                                 first_token_latency=0.5)  # fmt: skip
        return 10.0, [SimpleNamespace(metrics=timing) for _ in requests]

    monkeypatch.setattr(bench_engine, "run", run)
    llm: Any = SimpleNamespace(reset_prefix_cache=lambda: forgotten.append(len(seen)))
    row = bench_engine.measure(llm, "fixed256x128", 128256, 3)
    assert row["figure"] == 256 * 128 / 10
    assert row["ms_per_token"] == pytest.approx(10.0)
    assert (row["digest"], row["requests"], row["repeats"]) == ("675e12bd1d74200a", 256, 3)
    assert forgotten == [1, 2, 3]
    assert len({tuple(prompt) for prompt in seen}) == 4, "the warm-up's and each repeat's are others"


def test_a_server_gets_the_very_requests_of_the_suite_and_is_compared_with_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shape's own vocabulary, so the digests that vLLM was measured with; all at once unless it is said how many;
    other tokens in each run. With the vocabulary of another model, and an error instead of the table, it was."""
    asked: list[tuple[int, int, tuple[int, ...]]] = []

    async def run_load(url: str, requests: workload.Workload, *, concurrency: int, api_key: str | None) -> Any:
        asked.append((len(requests), concurrency, tuple(requests[0].prompt)))
        return 10.0, [Timing(one.max_tokens, 0.5, 0.5 + 0.004 * (one.max_tokens - 1)) for one in requests]

    class OneModel:
        def __init__(self, url: str, api_key: str | None = None):
            assert url == "http://here:1"

        def __enter__(self) -> "OneModel":
            return self

        def __exit__(self, *error: object) -> None:
            return

        def models(self) -> list[str]:
            return ["some-name"]

    monkeypatch.setattr(bench.bench_http, "run_load", run_load)
    monkeypatch.setattr(bench, "Client", OneModel)
    words = ["bench", "--url", "http://here:1", "--model", "8b", "--workload", "fixed512x256", "decode8"]
    assert bench.main(cli.build_parser().parse_args([*words, "-tp", "2", "--repeats", "2"])) == 0
    out = capsys.readouterr().out
    first, second = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    assert (first["digest"], first["figure"], first["group"]) == ("ce8e18ca5b4b33bf", 512 * 256 / 10, "8b-bf16-TP2")
    assert (second["digest"], second["figure"]) == ("99e01f5718fafdd8", 4.0)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("8b-bf16-TP2/")}
    assert "17,200" in rows["8b-bf16-TP2/fixed512x256"]
    assert f"{512 * 256 / 10 / 17_200:.2f}" in rows["8b-bf16-TP2/fixed512x256"]
    assert [count for _, count, _ in asked[1:]] == [512, 512, 8, 8]
    assert len({prompt for *_, prompt in asked}) == 5
    asked.clear()
    words = ["bench", "--url", "http://here:1", "--concurrency", "4", "16", "--repeats", "1"]
    assert bench.main(cli.build_parser().parse_args(words)) == 0
    assert [count for _, count, _ in asked[1:]] == [4, 16]
    assert "some-name" in capsys.readouterr().out
