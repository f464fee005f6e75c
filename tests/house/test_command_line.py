"""The command line grows on purpose: a new flag is a line here, and a setting in the config."""

import pytest

from argosy.deploy import cli

SHARED = ["--help", "-h"]
EXPECTED = {
    "serve": """
        --activation-offload-gb --activation-slice-tokens --all2all-backend --api-key --api-keys-file
        --api-server-count --async-scheduling --block-size --chat-template --config --cpu-offload-gb --cpu-threads
        --data-parallel-size --device --disable-log-stats --download-dir --drain-seconds --dtype
        --enable-chunked-prefill --enable-expert-parallel --enable-prefix-caching --enforce-eager --generation-config
        --gpu-memory-utilization --hf-overrides --hf-token --host --job-dir --kv-cache-dtype --kv-cache-memory-bytes
        --kv-offloading-size
        --layout --load-format --load-in-4bit --load-in-8bit --max-body-bytes --max-logprobs --max-model-len
        --max-num-batched-tokens --max-num-seqs --max-num-waiting --max-upload-bytes --model
        --num-gpu-blocks-override --pipeline-layers
        --pipeline-parallel-size --port --quantization --ray-address --request-deadline-seconds --response-role
        --revision --scheduling-policy --seed --served-model-name --skip-tokenizer-init --stage-memory-gb
        --start-deadline-seconds --step-deadline-seconds --swap-space --tensor-parallel-size --tokenizer
        --tokenizer-revision -dp -pp -q -tp
    """,
    "chat": "--api-key --max-tokens --model --seed --stop --system --temperature --url",
    "complete": "--api-key --max-tokens --model --seed --stop --temperature --url",
    "submit": """
        --again --api-key --endpoint --key --max-tokens --model --output --seed --temperature --url --wait --window
    """,
    "batch": """
        --activation-offload-gb --activation-slice-tokens --all2all-backend --async-scheduling --backend --block-size
        --chat-template --cpu-offload-gb --cpu-threads --data-parallel-size --device --download-dir --dtype
        --enable-chunked-prefill --enable-expert-parallel --enable-prefix-caching --endpoint --enforce-eager
        --generation-config --gpu-memory-utilization --hf-overrides --hf-token --kv-cache-dtype --kv-cache-memory-bytes
        --kv-offloading-size
        --layout --load-format --load-in-4bit --load-in-8bit --max-logprobs --max-model-len --max-num-batched-tokens
        --max-num-seqs --max-num-waiting --model --num-gpu-blocks-override --output --pipeline-layers
        --pipeline-parallel-size --quantization
        --ray-address --request-deadline-seconds --revision --scheduling-policy --seed --served-model-name
        --skip-tokenizer-init --stage-memory-gb --start-deadline-seconds --step-deadline-seconds --swap-space
        --tensor-parallel-size --tokenizer --tokenizer-revision -dp -o -pp -q -tp
    """,
    "jobs": "--api-key --limit --output --url",
    "doctor": "--json --no-all-reduce --port --ray-address",
    "plan": """
        --activation-offload-gb --activation-slice-tokens --all --all2all-backend --block-size --calibration --cluster
        --concurrency --cpu-offload-gb --data-parallel-size --dtype --enable-expert-parallel --gpu-memory-utilization
        --gpus --input-len --json --kv-cache-dtype --kv-cache-memory-bytes --max-model-len --max-num-batched-tokens
        --max-num-seqs --max-tpot-ms --max-ttft-ms --network --nodes --objective --offload-gb --output-len
        --pipeline-parallel-size --price --quantization --ray-address --replicas --stage-memory-gb --svg --swap-space
        --tensor-parallel-size -dp -pp -q -tp
    """,
    "simulate": """
        --activation-offload-gb --activation-slice-tokens --all2all-backend --arrivals --block-size --burst-size
        --calibration --cluster --cpu-offload-gb --data-parallel-size --dtype --enable-expert-parallel
        --gpu-memory-utilization --gpus --input-len --json --kv-cache-dtype --kv-cache-memory-bytes --lengths
        --max-model-len --max-num-batched-tokens --max-num-seqs --network --nodes --offload-gb --output-len
        --pipeline-parallel-size --prefix-len --prefixes --quantization --rate --ray-address --replicas --requests
        --seed --slo-tpot-ms --slo-ttft-ms --stage-memory-gb --step-by-step --svg --swap-space --tensor-parallel-size
        --trace --workload -dp -pp -q -tp
    """,
    "bench": """
        --api-key --backend --calibration --cards --cold-start --concurrency --cpu-threads --dtype --enforce-eager
        --gpu-memory-utilization --kv-cache-memory-bytes --list --max-model-len --max-num-batched-tokens --max-num-seqs
        --model --note --one-at-a-time --output --over --peer --pipeline-parallel-size --quantization --repeats --rows
        --suite --tensor-parallel-size --url --usable-memory --workload -pp -q -tp
    """,
}


@pytest.mark.parametrize("command", sorted(EXPECTED))
def test_the_command_line_grows_on_purpose(command: str) -> None:
    """Negations (--no-x) follow from their switch and are not listed."""
    flags = [
        flag
        for flag in cli.flags_of(cli.build_parser(), command)
        if not flag.startswith("--no-") or flag == "--no-all-reduce"
    ]
    assert flags == sorted([*SHARED, *EXPECTED[command].split()])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing a new user types."""
    assert cli.main([]) == 0
    assert "argosy serve" in capsys.readouterr().out
    for command in EXPECTED:
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: argosy {command}")
        assert len(shown.splitlines()) < 180


def test_a_mistake_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback for a typo."""
    assert cli.main(["serve", "--max-num-seq", "3"]) == 2
    shown = capsys.readouterr().err
    assert shown == "argosy: unknown flag --max-num-seq; did you mean --max-num-seqs?\n"
    for word, told in (("sevre", "did you mean 'argosy serve'?"), ("zzz", "'argosy --help' lists the commands")):
        assert cli.main([word]) == 2
        assert capsys.readouterr().err == f"argosy: there is no command {word!r}; {told}\n"
