"""An engine of a model in which some layers have windows, and a rank of it that dies. No Ray in it."""

import asyncio
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))
from engine_rig import rank_processes

from argosy.cluster.driver_client import DriverClient
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.sampling import TokenParams
from argosy.deploy.launch import Engine, launch_engine

GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 256, "sliding_window": 20,
    "max_position_embeddings": 512, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16, "torch_dtype": "float32",
}  # fmt: skip


async def ask(engine: Engine, *, kill_after: int = 0) -> tuple[list[list[int]], dict[str, float]]:
    """Eight prompts at once, each past several windows; after so many tokens of the first a rank is killed."""
    client = await DriverClient.connect(engine.address, engine.secret, timeout_seconds=60.0)
    draw = random.Random(4)
    prompts = [[draw.randrange(256) for _ in range(20 * number + 5)] for number in range(8)]

    async def one(number: int) -> list[int]:
        token_ids: list[int] = []
        params = TokenParams(max_tokens=120, temperature=0.9, seed=number)
        is_alive = bool(kill_after) and number == 0
        async for deltas in client.submit(prompts[number], params):
            token_ids += [token for delta in deltas for token in delta.token_ids]
            if is_alive and len(token_ids) >= kill_after:
                is_alive = False
                rank_processes(engine)[0].kill()
        return token_ids

    async with asyncio.timeout(120.0):
        answers = await asyncio.gather(*(one(number) for number in range(8)))
    values = (await client.stats()).values
    await client.close()
    return answers, values


def test_a_rank_dies_and_every_answer_goes_on(tmp_path: Path, private_tmp: str) -> None:
    """kill -9 of one of two stages: tables, windows and names begin anew, tokens are those of an undisturbed run; and
    the ledgers of both ranks are among the figures and add up."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    config = ServingConfig.from_mapping(
        {"model": str(tmp_path), "load_format": "dummy", "device": "cpu", "cpu_threads": 1, "block_size": 4,
         "pipeline_parallel_size": 2, "num_gpu_blocks_override": 300, "max_num_batched_tokens": 64, "max_num_seqs": 8,
         "skip_tokenizer_init": True}
    )  # fmt: skip
    with launch_engine(config, backend="local") as engine:
        assert engine.info.kv_windows == (0, 20, 20)
        expected, _ = asyncio.run(ask(engine))
        assert all(len(answer) == 120 for answer in expected)
        answers, values = asyncio.run(ask(engine, kill_after=30))
    assert answers == expected
    assert values["argosy_epoch"] == 1
    assert values["argosy_kv_blocks_used"] == 0
    for rank in (0, 1):
        prefix = f'argosy_rank_memory_bytes{{rank="{rank}",place="device",purpose='
        ledger = {name[len(prefix) :]: size for name, size in values.items() if name.startswith(prefix)}
        total = values[f'argosy_rank_memory_total_bytes{{rank="{rank}"}}']
        assert total == sum(ledger.values()) > ledger['"kv"}'] > 0
