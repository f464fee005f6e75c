"""The figures' frame: what a row says besides its figure, and the table people read."""

from pathlib import Path

import pytest

from argosy.cluster.protocol.errors import ConfigError, WeightError
from argosy.deploy import bench, bench_models, cli


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
