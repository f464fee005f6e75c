"""The least that an H200 needs for a row of the suite, however good the kernels.

Bytes are read once, multiplications go at the tensor cores' rate, and nothing else takes time. How far a figure and its
goal are from that says what is left to win.

Prompts: twice the weights that a token meets, a token (shared beginnings once), and their attention. A decode step: its
weights at the rate of reading alone, or its multiplications where they take longer, and then the cached keys and values
of each row, which are another kernel; all requests decode together once all prompts are computed. Cards of a group or a
pipeline share all evenly and at no cost; a row of decode goes through a pipeline's stages one after the other.
"""

from typing import NamedTuple

from argosy.deploy import workload
from argosy.deploy.bench_table import Group
from argosy.placement.model_shape import ModelShape
from argosy.placement.model_sources import read_model_shape

READ_RATE = 4.44e12  # bytes a second, reading alone, measured
PRODUCT_RATE = 796e12  # operations a second in 16 bits, 8192 x 8192 x 8192, measured; twice that in FP8
PREFIX = 2048  # tokens that the prompts of `prefix256` share
SHAPES = {"06b": "qwen3-0.6b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}


class Costs(NamedTuple):
    """Of one model in one precision, over all cards."""

    weight_bytes: float  # of a decode step
    layer_operations: float  # a token, in 16-bit ones
    head_operations: float
    kv_bytes: float  # a token
    attention_operations: float  # a query and key


def shape_of(model: str) -> ModelShape:
    """Of a suite's model. Raises `KeyError` for others."""
    return read_model_shape(SHAPES[model])


def costs_of(model: str, is_fp8: bool) -> Costs:
    """FP8 halves the layers; the head stays as it is."""
    shape = shape_of(model)
    spec = shape.spec
    head = spec.vocab_size * spec.hidden_size
    layers = shape.num_active_parameters - head
    return Costs(
        weight_bytes=(1 if is_fp8 else 2) * layers + 2 * head,
        layer_operations=2 * layers / (2 if is_fp8 else 1),
        head_operations=2 * head,
        kv_bytes=shape.kv_bytes_per_token(2, 1, spec.num_layers),
        attention_operations=4 * spec.num_heads * spec.head_size * spec.num_layers,
    )


def step_seconds(costs: Costs, rows: float, context: float) -> tuple[float, float]:
    """Products and attention of a decode step on one card."""
    operations = rows * (costs.layer_operations + costs.head_operations)
    products = max(costs.weight_bytes / READ_RATE, operations / PRODUCT_RATE)
    return products, rows * context * costs.kv_bytes / READ_RATE


def prompt_seconds(costs: Costs, lengths: list[int], cached: int = 0) -> float:
    """All prompts of these lengths, of which that many first tokens are there already but for one of them."""
    new = sum(lengths) - cached * (len(lengths) - 1)
    pairs = sum((length * length - cached * cached) / 2 for length in lengths)
    return (new * costs.layer_operations + pairs * costs.attention_operations) / PRODUCT_RATE


def limit(group: Group, name: str) -> float | None:
    """Milliseconds a step of `decode` rows, output tokens a second of others; None for a start."""
    if name == "start":
        return None
    costs = costs_of(group.model, group.quantization == "fp8")
    requests = workload.make(name, vocab=shape_of(group.model).spec.vocab_size)
    prompts, outputs = [len(one.prompt) for one in requests], [one.max_tokens for one in requests]
    if name.startswith("decode"):  # the median request waits for the prompts of half of the others
        steps = outputs[0] - 1
        products, attention = step_seconds(costs, len(requests), prompts[0] + outputs[0] / 2)
        others = prompt_seconds(costs, prompts[: len(requests) // 2]) / steps
        return 1e3 * (products + attention + others) / group.tensor_parallel_size
    cached = PREFIX if name.startswith("prefix") else 0
    seconds = prompt_seconds(costs, prompts, cached)
    for step in range(1, max(outputs)):
        contexts = [prompt - cached + step for prompt, made in zip(prompts, outputs, strict=True) if made > step]
        seconds += sum(step_seconds(costs, len(contexts), (sum(contexts) + cached) / len(contexts)))
    return sum(outputs) * group.num_cards / seconds
