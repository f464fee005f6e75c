"""Real GPUs under Ray: an actor for each card, whole layouts behind `LLM` and behind `argosy serve`, and the blocks
that `argosy plan` promised. Layouts that need more cards are left out; `tests/deploy/test_on_gpu.py` has the rest.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "workers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))
from rig import FAMILIES, SHAPE
from test_on_gpu import (
    DEVICE,
    ENVIRONMENT,
    NUM_CARDS,
    USED_MIB,
    WIDE,
    answer,
    distance,
    engine,
    regret_of,
    score,
    used_mib,
)

from argosy import LLM, SamplingParams
from argosy.deploy import bench_models
from argosy.deploy.owned_folder import short_temp_folder
from argosy.deploy.ray_session import RaySession
from argosy.placement.ports import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(DEVICE == "cuda" and not NUM_CARDS, reason="needs an NVIDIA GPU"),
]
DEFAULT_MODEL = Path(__file__).parents[2] / "argosy" / "default_model"
PROMPTS = [[3 + (7 * i + 13 * j) % 900 for j in range(length)] for i, length in enumerate((1, 5, 16, 17, 33, 64, 100))]


def layouts(*sizes: tuple[int, int]) -> list[Any]:
    """(TP, PP), each left out where there are fewer cards."""
    return [
        pytest.param(tp, pp, marks=pytest.mark.skipif(tp * pp > NUM_CARDS, reason=f"needs {tp * pp} cards"))
        for tp, pp in sizes
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of float32 with the tokenizer that ships."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    vocab = json.loads((DEFAULT_MODEL / "config.json").read_text())["vocab_size"]
    name, extra = FAMILIES["llama"]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **WIDE, **extra, "head_dim": 64, "vocab_size": vocab})
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEFAULT_MODEL / file, folder / file)
    return folder


@pytest.fixture
def short_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="t", dir=short_temp_folder(20))
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("tp", "pp"), layouts((2, 2), (1, 1), (4, 1), (2, 1), (1, 2)))
def test_actors_with_a_card_each_say_what_transformers_says(
    tp: int, pp: int, folder: Path, ray_session: RaySession
) -> None:
    """In float32, prompts in pieces and decode steps in graphs; as many cards are opened as there are ranks."""
    before = used_mib()
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "distributed_executor_backend": "ray"}
    with engine(folder, dtype="float32", **sizes) as llm:
        assert len(llm._engine.ranks) == tp * pp
        tokens, scores = answer(llm, PROMPTS)
        opened = [now - then > USED_MIB for now, then in zip(used_mib(), before, strict=True)]
    sequences = [[*prompt, *made] for prompt, made in zip(PROMPTS, tokens, strict=True)]
    exact, best = score(folder, sequences, torch.float32)
    assert distance(scores, exact) < 1e-3
    assert regret_of(exact, best) < 1e-3
    if DEVICE == "cuda":
        assert sum(opened) == tp * pp, (before, opened)


@pytest.mark.parametrize(("tp", "pp"), layouts((2, 2), (4, 1), (1, 1)))
def test_a_server_over_cards_says_what_one_process_says(tp: int, pp: int, folder: Path, short_tmp: str) -> None:
    """`argosy serve --tensor-parallel-size --pipeline-parallel-size`, asked over HTTP; Ctrl-C ends it."""
    flags = ["--dtype", "float32", "--device", DEVICE, "--max-model-len", "256", "--max-num-seqs", "8"]
    flags += ["--num-gpu-blocks-override", "256", "--cpu-threads", "1"]
    flags += ["--tensor-parallel-size", str(tp), "--pipeline-parallel-size", str(pp)]
    port = free_port("127.0.0.1")
    environment = {**ENVIRONMENT, "TMPDIR": short_tmp, "PYTHONSAFEPATH": "1", "XDG_STATE_HOME": f"{short_tmp}/state"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-P", "-m", "argosy.deploy.cli", "serve", str(folder), *flags, "--port", str(port)]
    with (
        open(f"{short_tmp}/errors", "w+b") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
        ) as server,
    ):
        assert server.stdout is not None
        try:
            shown = b""
            while b"Try it" not in shown:
                line = server.stdout.readline()
                assert line, shown.decode() + Path(f"{short_tmp}/errors").read_text()
                shown += line
            assert f"TP{tp} x PP{pp}".encode() in shown
            body = {"prompt": PROMPTS, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as said:
                choices = json.load(said)["choices"]
            server.send_signal(signal.SIGINT)
            assert server.wait(60.0) == 0
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
    assert [len(choice["token_ids"]) for choice in choices] == [24] * len(PROMPTS)
    sequences = [[*prompt, *choice["token_ids"]] for prompt, choice in zip(PROMPTS, choices, strict=True)]
    assert regret_of(*score(folder, sequences, torch.float32)) < 1e-3


@pytest.mark.parametrize(("tp", "pp"), layouts((1, 1), (2, 1), (2, 2)))
def test_ranks_have_the_blocks_that_the_plan_says(
    tp: int, pp: int, tmp_path: Path, ray_session: RaySession, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty H200 as `argosy plan` has it from its data sheet, and as ranks find it: to the block."""
    if DEVICE != "cuda" or "H200" not in torch.cuda.get_device_name():
        pytest.skip("the bytes of an H200 are foretold exactly, others' are not")
    sizes = ["-tp", str(tp), "-pp", str(pp)]
    model, more = bench_models.make_folder("8b", tmp_path)
    command = [sys.executable, "-P", "-m", "argosy.deploy.cli", "plan", str(model), *sizes, "--json"]
    command += ["--gpus", f"{tp * pp} x H200", "--dtype", "bfloat16", "--replicas", "1"]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with LLM(str(model), dtype="bfloat16", tensor_parallel_size=tp, pipeline_parallel_size=pp, **more) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
        outputs = llm.generate([[5, 6, 7]] * 4, params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 4
        found = llm._engine.info.num_blocks
    with capsys.disabled():
        print(f"TP{tp} x PP{pp}: {found} blocks, {planned['chosen']['num_blocks']} planned")
    assert found == planned["chosen"]["num_blocks"]
