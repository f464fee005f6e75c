"""What rounding does to a model's answers: logits of the same weights in 16 bits and rounded, token by token.

    python benchmarks/quality/compare_precision.py                              the default model, on what there is
    python benchmarks/quality/compare_precision.py --shape 8b --tokens 1024     random weights of a published shape

Teacher forced: every variant sees the same text, and after each token its distribution is compared with that of the
plain model. KL is in nats (mean and largest over positions), top-1 is how often the most likely token is the same;
"plain again" repeats the plain model one token a step: what arithmetic in another order alone does.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.deploy import bench_table
from argosy.deploy.bench_models import GPU_SHAPES, make_folder
from argosy.deploy.tokenizer import Tokenizer
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.attention.triton_backend import TritonBackend
from argosy.workers.device import TORCH_DTYPES
from argosy.workers.forward_context import ForwardContext
from argosy.workers.kv_cache import KVCache
from argosy.workers.loading.stream import load_weights
from argosy.workers.models.registry import build_model
from argosy.workers.quantization.fp8 import Fp8Method

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODEL = ROOT / "argosy" / "default_model"
TEXTS = ("README.md", "DECISIONS.md", "benchmarks/README.md")
BLOCK_SIZE = 16


class Variant(NamedTuple):
    """One way to run the model."""

    name: str
    quantization: str | None = None
    rounds_inputs: bool = True  # on a CPU; a GPU rounds the inputs of more than one token
    kv_dtype: torch.dtype | None = None
    kv_scaled: bool = False  # with a scale for each token and head; int8 always has them
    one_by_one: bool = False
    folder: str | None = None  # a checkpoint of the same model in another format


def variants(names: list[str], device: torch.device) -> list[Variant]:
    """All that are compared with the plain model."""
    found = [Variant("plain again, token by token", one_by_one=True)]
    for name in names:
        if device.type == "cpu":
            found.append(Variant(f"{name}, weights only", name, rounds_inputs=False))
            found.append(Variant(f"{name}, weights and inputs", name))
        else:
            found.append(Variant(f"{name}, weights and inputs", name))
            found.append(Variant(f"{name}, token by token: weights only", name, one_by_one=True))
    found.append(Variant("cache int8", kv_dtype=torch.int8))
    found.append(Variant("cache e4m3", kv_dtype=torch.float8_e4m3fn))
    found.append(Variant("cache e4m3 with scales", kv_dtype=torch.float8_e4m3fn, kv_scaled=True))
    found += [Variant(f"{name} and cache e4m3", name, kv_dtype=torch.float8_e4m3fn) for name in names[:1]]
    return found


class Scored(NamedTuple):
    """Log probabilities after each token, and what the model takes."""

    log_probs_TV: Tensor
    weight_bytes: int
    cache_bytes_a_token: int


def score(folder: str, variant: Variant, ids: list[int], args: argparse.Namespace, device: torch.device) -> Scored:
    """Run the text through one variant; a step of all tokens, or of one each for the last `--one-by-one` of them."""
    folder = variant.folder or folder
    spec = read_model_spec(folder, None, variant.quantization)
    rank = make_plan(spec.num_layers, 1, 1).ranks[0]
    dtype = TORCH_DTYPES[args.dtype]
    Fp8Method.rounds_on_cpu = variant.rounds_inputs
    model = build_model(spec, rank, ParallelContext(rank, device, 60.0), dtype, device)
    report = load_weights(model, folder, spec, load_format="dummy" if args.shape else "auto", seed=args.seed)
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    kv_dtype = variant.kv_dtype or dtype
    cache = KVCache.allocate(spec, rank, num_blocks, BLOCK_SIZE, kv_dtype, device, scaled=variant.kv_scaled)
    backend = TritonBackend() if device.type == "cuda" else TorchBackend()
    found = []
    with torch.inference_mode():
        alone = min(args.one_by_one, len(ids) - 1) if variant.one_by_one else 0
        starts = [0, *range(len(ids) - alone, len(ids))]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            hidden = model(
                torch.tensor(ids[start:stop], device=device), None, torch.arange(start, stop, device=device),
                ForwardContext(backend, cache, _metadata(start, stop, num_blocks, device)),
            )  # fmt: skip
            found += [torch.log_softmax(model.compute_logits(part), -1).cpu() for part in hidden.split(256)]
    return Scored(
        torch.cat(found), report.num_bytes, KVCache.block_bytes(spec, rank, 1, kv_dtype, scaled=variant.kv_scaled)
    )


def _metadata(start: int, stop: int, num_blocks: int, device: torch.device) -> AttentionMetadata:
    """One row with the tokens [start, stop) of a text."""
    return AttentionMetadata(
        num_rows=1,
        num_decode_rows=int(stop - start == 1),
        query_start_R1=torch.tensor([0, stop - start], dtype=torch.int32, device=device),
        context_len_R=torch.tensor([stop], dtype=torch.int32, device=device),
        block_table_RB=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        slot_mapping_T=torch.arange(start, stop, device=device),
        max_query_len=stop - start,
        max_context_len=stop,
    )


def compare(plain: Tensor, other: Tensor) -> dict[str, float]:
    """KL(plain || other) and top-1 agreement."""
    kl_T = (plain.exp() * (plain - other)).sum(-1)
    same = plain.argmax(-1) == other.argmax(-1)
    return {
        "kl_mean": round(float(kl_T.mean()), 6),
        "kl_max": round(float(kl_T.max()), 6),
        "top1": round(float(same.float().mean()), 4),
    }


def text_ids(folder: str, count: int) -> list[int]:
    """Tokens of the project's own texts, which the default model has not seen."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS if (ROOT / name).exists())
    return Tokenizer.load(folder).encode(text)[:count]


def main() -> int:
    """Compare, print a JSON line a variant and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="a model folder")
    parser.add_argument("--shape", choices=sorted(GPU_SHAPES), help="random weights of this shape instead")
    parser.add_argument("--quantization", nargs="+", default=["fp8", "fp8_per_tensor", "fp8_block"])
    parser.add_argument("--packed", nargs="+", default=[], help="folders of the same model (see write_quantized.py)")
    parser.add_argument("--only-packed", action="store_true", help="these alone")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TORCH_DTYPES))
    parser.add_argument("--tokens", type=int, default=512, help="length of the text")
    parser.add_argument("--one-by-one", type=int, default=64, help="last tokens that such variants run in steps of one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(prefix="argosy-quality-") as parent:
        folder = args.model
        if args.shape:
            folder = str(make_folder(args.shape, Path(parent))[0])
            generator = torch.Generator().manual_seed(args.seed)
            ids = torch.randint(3, GPU_SHAPES[args.shape]["vocab_size"], (args.tokens,), generator=generator).tolist()
        else:
            ids = text_ids(folder, args.tokens)
        name = args.shape or Path(folder).name
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        plain = score(folder, Variant("plain"), ids, args, device)
        about = {"model": name, "dtype": args.dtype, "device": device_name, "tokens": len(ids)}
        rows = []
        packed = [Variant(Path(other).name, folder=other) for other in args.packed]
        for variant in packed if args.only_packed else [*variants(args.quantization, device), *packed]:
            scored = score(folder, variant, ids, args, device)
            row = {**about, "variant": variant.name, **compare(plain.log_probs_TV, scored.log_probs_TV)}
            row["weights_ratio"] = round(scored.weight_bytes / plain.weight_bytes, 3)
            row["cache_ratio"] = round(scored.cache_bytes_a_token / plain.cache_bytes_a_token, 3)
            rows.append(row)
            bench_table.tell(row, args.output)
    print(f"\n{name} on {device_name}, {len(ids)} tokens, beside {args.dtype}")
    for row in rows:
        print(
            f"{row['variant']:42} KL {row['kl_mean']:.5f} (largest {row['kl_max']:.4f})  top-1 {row['top1']:.1%}  "
            f"weights {row['weights_ratio']:.2f}x  cache {row['cache_ratio']:.2f}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
