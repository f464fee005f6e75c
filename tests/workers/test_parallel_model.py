"""Every family in every layout answers as transformers does: one folder, ragged prompts, float32, greedy.

This file is also the program of one rank (`python test_parallel_model.py job.json index`): four such processes run all
families in all layouts with more than one rank, because starting a process costs more than all of the arithmetic.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.plan import RankInfo, make_plan
from argosy.placement.process_groups import ParallelContext, destroy_parallel, init_parallel
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.attention.triton_backend import TritonBackend
from argosy.workers.forward_context import ForwardContext
from argosy.workers.kv_cache import KVCache
from argosy.workers.loading.stream import load_weights
from argosy.workers.models.registry import build_model

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, NUM_NEW = 4, 64, 6
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2), "TP4": (4, 1), "TP2xPP2": (2, 2)}
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 80, "vocab_size": 101, "max_position_embeddings": 128, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama biases, one kv head": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral window": ("Mistral", {"sliding_window": 6, "head_dim": 16}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": False}),
}
# all families in the layout that has everything; the simpler ones (which `test_parallel_ranks` has too) for a few
RUNS = [(name, "TP2xPP2") for name in FAMILIES]
RUNS += [(name, layout) for name in ("llama tied llama3", "qwen3") for layout in ("TP2", "PP2", "TP4")]
PROMPTS = [[7], [1, 2, 3, 4, 5], list(range(20, 32)), list(range(60, 77))]


class Harness:
    """A stage that generates greedily: what the model runner does, in forty lines."""

    def __init__(self, folder: str | Path, rank: RankInfo, parallel: ParallelContext, *, seed: int = 0):
        self.spec = read_model_spec(folder)
        self.rank, self.parallel = rank, parallel
        self.model = build_model(self.spec, rank, parallel, torch.float32, CPU)
        load_weights(self.model, folder, self.spec, rank)
        self.backend: TorchBackend | TritonBackend = TorchBackend()
        self.cache = KVCache.allocate(self.spec, rank, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
        per_row = NUM_BLOCKS // len(PROMPTS)
        self.blocks = [order[row * per_row : (row + 1) * per_row] for row in range(len(PROMPTS))]

    def step(self, rows: list[tuple[int, int, list[int]]]) -> Tensor:
        """Run (row, computed, token ids) each; logits after each row's last token, on every rank."""
        rows = sorted(rows, key=lambda row: len(row[2]) > 1)
        positions = [p for _, computed, ids in rows for p in range(computed, computed + len(ids))]
        slots = [
            self.blocks[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for row, computed, ids in rows
            for p in range(computed, computed + len(ids))
        ]
        lengths = [computed + len(ids) for _, computed, ids in rows]
        starts = [0]
        for _, _, ids in rows:
            starts.append(starts[-1] + len(ids))
        metadata = AttentionMetadata(
            num_rows=len(rows),
            num_decode_rows=sum(len(ids) == 1 for _, _, ids in rows),
            query_start_R1=torch.tensor(starts, dtype=torch.int32),
            context_len_R=torch.tensor(lengths, dtype=torch.int32),
            block_table_RB=torch.tensor([self.blocks[row] for row, _, _ in rows], dtype=torch.int32),
            slot_mapping_T=torch.tensor(slots),
            max_query_len=max(len(ids) for _, _, ids in rows),
            max_context_len=max(lengths),
        )
        ctx = ForwardContext(self.backend, self.cache, metadata)
        token_ids = torch.tensor([token for _, _, ids in rows for token in ids])
        hidden = None
        if self.parallel.previous_rank is not None:
            hidden = torch.empty(len(positions), self.spec.hidden_size)
            dist.recv(hidden, src=self.parallel.previous_rank)
        out = self.model(token_ids if self.rank.is_first_stage else None, hidden, torch.tensor(positions), ctx)
        logits = torch.empty(len(rows), self.spec.vocab_size)
        if self.parallel.next_rank is not None:
            dist.send(out, dst=self.parallel.next_rank)
        else:
            logits = self.model.compute_logits(out[torch.tensor(starts[1:]) - 1])
        if self.rank.pp_size > 1:
            dist.broadcast(logits, src=self.rank.tp_size * (self.rank.pp_size - 1))
        in_order = torch.empty_like(logits)
        in_order[torch.tensor([row for row, _, _ in rows])] = logits
        return in_order

    @torch.inference_mode()
    def generate(self, chunk: int = 1000) -> tuple[list[list[int]], Tensor]:
        """Greedy tokens of all prompts, and the logits of the first of them."""
        computed = [0] * len(PROMPTS)
        first = torch.empty(len(PROMPTS), self.spec.vocab_size)
        while rows := [
            (r, computed[r], p[computed[r] :][:chunk]) for r, p in enumerate(PROMPTS) if computed[r] < len(p)
        ]:
            logits = self.step_some(rows)
            for r, _, ids in rows:
                computed[r] += len(ids)
                first[r] = logits[r]
        tokens = [[int(i)] for i in first.argmax(-1)]
        for _ in range(NUM_NEW - 1):
            logits = self.step([(r, computed[r], tokens[r][-1:]) for r in range(len(PROMPTS))])
            for r in range(len(PROMPTS)):
                computed[r] += 1
                tokens[r].append(int(logits[r].argmax()))
        return tokens, first

    def step_some(self, rows: list[tuple[int, int, list[int]]]) -> Tensor:
        """A step of some of the prompts; logits at their places."""
        full = torch.zeros(len(PROMPTS), self.spec.vocab_size)
        renamed = [(place, computed, ids) for place, (_, computed, ids) in enumerate(rows)]
        blocks = self.blocks
        self.blocks = [blocks[r] for r, _, _ in rows]
        full[[r for r, _, _ in rows]] = self.step(renamed)[: len(rows)]
        self.blocks = blocks
        return full


def run_rank(job: dict[str, Any], index: int) -> None:
    """The life of one of the four processes."""
    torch.set_num_threads(1)
    for number, run in enumerate(job["runs"]):
        tp_size, pp_size = run["layout"]
        if index >= tp_size * pp_size:
            continue
        rank = make_plan(SMALL["num_hidden_layers"], tp_size, pp_size).ranks[index]
        parallel = init_parallel(rank, run["rendezvous"], CPU, 30.0)
        tokens, logits = Harness(run["folder"], rank, parallel).generate()
        answer = {"tokens": tokens, "logits": logits.tolist()}
        Path(job["answers"], f"{number}-{index}.json").write_text(json.dumps(answer))
        dist.barrier()
        destroy_parallel(parallel)


if __name__ == "__main__":
    run_rank(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Reference:
    """One folder saved by transformers, and what transformers generates from it."""

    def __init__(self, folder: Path, name: str):
        import transformers  # a second of import: only where it is compared with

        family, changes = FAMILIES[name]
        torch.manual_seed(len(name))
        config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # transformers starts norms at 1 and biases at 0: nothing would be tested
                torch.nn.init.normal_(parameter, float("norm" in parameter_name), 0.3)
        model.save_pretrained(folder)
        self.folder = folder
        self.tokens: list[list[int]] = []
        logits = []
        with torch.inference_mode():
            for prompt in PROMPTS:
                ids = list(prompt)
                for step in range(NUM_NEW):
                    last = model(torch.tensor([ids])).logits[0, -1]
                    if step == 0:
                        logits.append(last)
                    ids.append(int(last.argmax()))
                self.tokens.append(ids[len(prompt) :])
        self.logits = torch.stack(logits)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """All families, once."""
    torch.set_num_threads(1)
    return {name: Reference(tmp_path_factory.mktemp("model"), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def answers(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What all layouts of more than one rank answered, by (family, layout): a list with one answer a rank."""
    folder = tmp_path_factory.mktemp("answers")
    runs = [
        {
            "folder": str(references[name].folder),
            "layout": LAYOUTS[layout],
            "rendezvous": f"127.0.0.1:{free_port()}",
        }
        for name, layout in RUNS
    ]
    job = folder / "job.json"
    job.write_text(json.dumps({"runs": runs, "answers": str(folder)}))
    ranks = [subprocess.Popen([sys.executable, __file__, str(job), str(index)]) for index in range(4)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return {
        pair: [
            json.loads((folder / f"{number}-{index}.json").read_text())
            for index in range(LAYOUTS[pair[1]][0] * LAYOUTS[pair[1]][1])
        ]
        for number, pair in enumerate(RUNS)
    }


def alone(reference: Reference, *, seed: int = 0) -> Harness:
    """The whole model in this process."""
    rank = make_plan(SMALL["num_hidden_layers"], 1, 1).ranks[0]
    return Harness(reference.folder, rank, init_parallel(rank, "", CPU, 1.0), seed=seed)


@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_a_family_in_a_layout_equals_transformers(
    name: str, layout: str, references: dict[str, Reference], answers: dict[tuple[str, str], Any]
) -> None:
    """Somebody serves this model on two or four ranks: every rank has the logits that one big model would have."""
    for answer in answers[name, layout]:
        torch.testing.assert_close(torch.tensor(answer["logits"]), references[name].logits, atol=1e-4, rtol=1e-4)
        assert answer["tokens"] == references[name].tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_equals_transformers_whole_and_in_chunks(name: str, references: dict[str, Reference]) -> None:
    """Prompts of 1 to 17 tokens in one step; then the same prompts five tokens at a time."""
    harness = alone(references[name])
    for chunk in (1000, 5):
        tokens, logits = harness.generate(chunk)
        torch.testing.assert_close(logits, references[name].logits, atol=1e-4, rtol=1e-4)
        assert tokens == references[name].tokens


@pytest.mark.parametrize("name", ["mistral window", "qwen3"])
def test_the_kernels_backend_equals_the_torch_backend(name: str, references: dict[str, Reference]) -> None:
    """On a GPU the same model runs on `kernels.ops`; on a CPU those are the plain references."""
    harness = alone(references[name])
    harness.backend = TritonBackend()
    tokens, logits = harness.generate(5)
    torch.testing.assert_close(logits, references[name].logits, atol=1e-4, rtol=1e-4)
    assert tokens == references[name].tokens


def test_where_blocks_lie_changes_no_bit(references: dict[str, Reference]) -> None:
    """A request comes back after preemption and gets other blocks: its tokens may not depend on which."""
    tokens, logits = alone(references["qwen3"], seed=1).generate()
    others, other_logits = alone(references["qwen3"], seed=2).generate()
    assert tokens == others
    assert torch.equal(logits, other_logits)


def test_blocks_are_copied_in_every_layer(references: dict[str, Reference]) -> None:
    """Copy-on-write: two answers share a block until one of them writes to it."""
    harness = alone(references["qwen3"])
    harness.generate()
    source, target = harness.blocks[3][0], harness.blocks[0][-1]
    harness.cache.copy_blocks([(source, target)])
    for k_cache, v_cache in harness.cache.layers:
        assert torch.equal(k_cache[source], k_cache[target])
        assert torch.equal(v_cache[source], v_cache[target])
        assert k_cache[source].abs().sum() > 0


def test_random_weights_are_one_model_in_every_layout(references: dict[str, Reference]) -> None:
    """A plan is tried with `load_format` dummy before the weights are there: logits must not depend on the layout."""
    spec = read_model_spec(references["qwen3"].folder)
    heads = []
    for tp_size in (1, 2):
        rank = make_plan(spec.num_layers, tp_size, 1).ranks[0]
        model = build_model(spec, rank, ParallelContext(rank, CPU, 1.0), torch.float32, CPU)
        load_weights(model, "nowhere", spec, rank, load_format="dummy", seed=3)
        layer = model.layers["0"]
        heads.append((layer.attention.qkv_proj.weight, layer.mlp.down_proj.weight, model.norm.weight))
    one, two = heads
    assert torch.equal(one[0][:48], two[0][:48])
    assert torch.equal(one[1][:, :40], two[1])
    assert 0.01 < float(one[1].std()) < 0.03
    assert torch.equal(one[2], torch.ones(48))
