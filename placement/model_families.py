"""From a `config.json` to a `ModelShape`: one function a family."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import UnsupportedModel, WeightError
from argosy.placement.model_shape import DTYPE_BYTES, LayerShape, Matrix, ModelShape
from argosy.placement.weight_format import format_from_config

CONFIG_FILE: Final = "config.json"


class _Config:
    """Typed look-ups in a `config.json`, under any of several names."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def integer(self, *names: str, default: int | None = None, low: int = 1) -> int:
        """A whole number of at least `low` under the first name that is there."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**40:
                    raise WeightError(CONFIG_FILE, name, f"{value!r:.80}: must be an integer of at least {low}")
                return value
        if default is None:
            raise WeightError(CONFIG_FILE, names[0], "is missing")
        return default

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        return default if value is None else bool(value)


def shape_from_config(config: Mapping[str, Any], *, name: str = "") -> ModelShape:
    """The shape from the content of a `config.json`. Raises `WeightError` or `UnsupportedModel`."""
    given = config.get("architectures")
    architecture = given[0] if isinstance(given, list) and given and isinstance(given[0], str) else ""
    maker = _MAKERS.get(architecture)
    if maker is None:
        raise UnsupportedModel(
            CONFIG_FILE, "architectures", f"{given!r:.80}: can't be sized; known: {', '.join(sorted(_MAKERS))}"
        )
    shape: ModelShape = maker(_Config(config), architecture, name)
    return shape


def _dtype(read: _Config) -> str:
    value = read.values.get("dtype") or read.values.get("torch_dtype") or "float32"
    dtype = str(value).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(CONFIG_FILE, "torch_dtype", f"{dtype!r:.80}: known: {', '.join(DTYPE_BYTES)}")
    return dtype


def _attention(
    width: int, heads: int, kv_heads: int, head: int, *, bias: bool, o_bias: bool
) -> tuple[Matrix, Matrix, Matrix]:
    return (
        Matrix(name="q", num_out=heads * head, num_in=width, cut="column", bias=bias),
        Matrix(name="kv", num_out=2 * kv_heads * head, num_in=width, cut="kv", bias=bias),
        Matrix(name="o", num_out=width, num_in=heads * head, cut="row", bias=o_bias),
    )


def _gated(width: int, inner: int, prefix: str = "", *, bias: bool = False) -> tuple[Matrix, Matrix]:
    return (
        Matrix(name=f"{prefix}gate_up", num_out=2 * inner, num_in=width, cut="column", bias=bias),
        Matrix(name=f"{prefix}down", num_out=width, num_in=inner, cut="row", bias=bias),
    )


def _experts(width: int, inner: int, count: int, active: int) -> tuple[Matrix, ...]:
    return (
        Matrix(name="router", num_out=count, num_in=width, cut="none", quantised=False),
        Matrix(
            name="experts.gate_up", num_out=2 * inner, num_in=width, cut="expert_column", count=count, active=active
        ),
        Matrix(name="experts.down", num_out=width, num_in=inner, cut="expert_row", count=count, active=active),
    )


def _decoder(read: _Config, architecture: str, name: str) -> ModelShape:
    """Llama, Mistral, Qwen and their mixtures of experts: pre-norm, gated MLP, rotations."""
    width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", default=heads)
    head = read.integer("head_dim", default=max(1, width // heads))
    layers = read.integer("num_hidden_layers")
    inner = read.integer("intermediate_size", default=4 * width)
    is_qwen2 = architecture.startswith("Qwen2")
    has_qk_norm = architecture.startswith("Qwen3")
    bias = is_qwen2 or read.boolean("attention_bias", False)
    o_bias = read.boolean("attention_bias", False) and not is_qwen2
    attention = _attention(width, heads, kv_heads, head, bias=bias, o_bias=o_bias)
    norms = 2 * width + 2 * head * has_qk_norm
    dense = LayerShape(
        matrices=(*attention, *_gated(width, inner, bias=read.boolean("mlp_bias", False))), norm_size=norms
    )
    count = read.integer("num_local_experts", "num_experts", default=0, low=0)
    kinds: tuple[LayerShape, ...] = (dense,)
    layer_kinds, expert_size = (0,) * layers, 0
    if count and architecture in ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        expert_size = read.integer("moe_intermediate_size", default=inner)
        active = read.integer("num_experts_per_tok", default=2)
        matrices = (*attention, *_experts(width, expert_size, count, active))
        if (shared := read.integer("shared_expert_intermediate_size", default=0, low=0)) > 0:
            gate = Matrix(name="shared.gate", num_out=1, num_in=width, cut="none", quantised=False)
            matrices = (*matrices, *_gated(width, shared, "shared."), gate)
        sparse = LayerShape(matrices=matrices, norm_size=norms)
        step, plain = read.integer("decoder_sparse_step", default=1), read.values.get("mlp_only_layers") or []
        kinds = (dense, sparse)
        layer_kinds = tuple(int((index + 1) % step == 0 and index not in plain) for index in range(layers))
        if 0 not in layer_kinds:
            inner = expert_size
    window, windowed = _windows(read, architecture, layers)
    return ModelShape(
        name=name, architecture=architecture, hidden_size=width, num_heads=heads, num_kv_heads=kv_heads,
        head_size=head, intermediate_size=inner, vocab_size=read.integer("vocab_size"),
        max_position=read.integer("max_position_embeddings", default=4096), dtype=_dtype(read),
        tied=read.boolean("tie_word_embeddings", False), kinds=kinds, layer_kinds=layer_kinds,
        final_norm_size=width, num_experts=count, expert_size=expert_size, sliding_window=window, windowed=windowed,
        weight_format=format_from_config(read.values),
    )  # fmt: skip


def _windows(read: _Config, architecture: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = read.integer("sliding_window", default=0, low=0)
    if not window or not (architecture.startswith(("Mistral", "Mixtral")) or read.boolean("use_sliding_window", False)):
        return None, ()
    if architecture.startswith("Qwen"):
        first = read.integer("max_window_layers", default=28, low=0)
        return window, tuple(index >= first for index in range(layers))
    return window, (True,) * layers


def _deepseek(read: _Config, architecture: str, name: str) -> ModelShape:
    """DeepSeek V2 and V3: latent attention, the first layers dense, then experts with some shared by all tokens."""
    width, heads, layers = (
        read.integer("hidden_size"),
        read.integer("num_attention_heads"),
        read.integer("num_hidden_layers"),
    )
    q_rank, kv_rank = read.integer("q_lora_rank", default=0, low=0), read.integer("kv_lora_rank")
    nope, rope, value = read.integer("qk_nope_head_dim"), read.integer("qk_rope_head_dim"), read.integer("v_head_dim")
    bias = read.boolean("attention_bias", False)
    q = (
        Matrix(name="q_a", num_out=q_rank, num_in=width, cut="none", bias=bias),
        Matrix(name="q_b", num_out=heads * (nope + rope), num_in=q_rank, cut="column"),
    ) if q_rank else (Matrix(name="q", num_out=heads * (nope + rope), num_in=width, cut="column"),)  # fmt: skip
    attention = (
        *q,
        Matrix(name="kv_a", num_out=kv_rank + rope, num_in=width, cut="none", bias=bias),
        Matrix(name="kv_b", num_out=heads * (nope + value), num_in=kv_rank, cut="column"),
        Matrix(name="o", num_out=width, num_in=heads * value, cut="row", bias=bias),
    )
    inner, expert = read.integer("intermediate_size"), read.integer("moe_intermediate_size", default=1)
    count, active = read.integer("n_routed_experts", default=0, low=0), read.integer("num_experts_per_tok", default=1)
    shared = read.integer("n_shared_experts", default=0, low=0) * expert
    first_sparse, every = (
        read.integer("first_k_dense_replace", default=0, low=0),
        read.integer("moe_layer_freq", default=1),
    )
    norms = 2 * width + q_rank + kv_rank
    corrected = count if read.values.get("topk_method") == "noaux_tc" else 0  # a bias a expert
    kinds = [LayerShape(matrices=(*attention, *_gated(width, inner)), norm_size=norms)]
    if count:
        mixture = (*_experts(width, expert, count, active), *(_gated(width, shared, "shared.") if shared else ()))
        kinds.append(LayerShape(matrices=(*attention, *mixture), norm_size=norms + corrected))
    sparse = tuple(int(count > 0 and i >= first_sparse and i % every == 0) for i in range(layers))
    return ModelShape(
        name=name, architecture=architecture, hidden_size=width, num_heads=heads, num_kv_heads=heads,
        head_size=nope + rope, intermediate_size=inner, vocab_size=read.integer("vocab_size"),
        max_position=read.integer("max_position_embeddings", default=4096), dtype=_dtype(read),
        tied=read.boolean("tie_word_embeddings", False), kinds=tuple(kinds), layer_kinds=sparse, final_norm_size=width,
        latent_size=kv_rank + rope, latent_head_work=2 * kv_rank + rope, num_experts=count, expert_size=expert,
        weight_format=format_from_config(read.values),
    )  # fmt: skip


def _plain_layer(width: int, heads: int, inner: int, *, bias: bool = True) -> LayerShape:
    """Attention and an MLP of two matrices, LayerNorms with biases."""
    head = width // heads
    return LayerShape(
        matrices=(
            *_attention(width, heads, heads, head, bias=bias, o_bias=bias),
            Matrix(name="up", num_out=inner, num_in=width, cut="column", bias=bias),
            Matrix(name="down", num_out=width, num_in=inner, cut="row", bias=bias),
        ),
        norm_size=4 * width,
    )


def _gpt2(read: _Config, architecture: str, name: str) -> ModelShape:
    width, heads = read.integer("n_embd", "hidden_size"), read.integer("n_head", "num_attention_heads")
    positions = read.integer("n_positions", "n_ctx", "max_position_embeddings")
    inner = read.integer("n_inner", default=4 * width)
    return _plain_model(
        read, architecture, name, width, heads, inner, layers=read.integer("n_layer", "num_hidden_layers"),
        max_position=positions, position_rows=positions, tied=read.boolean("tie_word_embeddings", True),
    )  # fmt: skip


def _opt(read: _Config, architecture: str, name: str) -> ModelShape:
    width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    positions = read.integer("max_position_embeddings")
    return _plain_model(
        read, architecture, name, width, heads, read.integer("ffn_dim"), layers=read.integer("num_hidden_layers"),
        max_position=positions, position_rows=positions + 2, tied=read.boolean("tie_word_embeddings", True),
    )  # fmt: skip


def _bloom(read: _Config, architecture: str, name: str) -> ModelShape:
    width, heads = read.integer("hidden_size", "n_embed"), read.integer("n_head", "num_attention_heads")
    shape = _plain_model(
        read, architecture, name, width, heads, 4 * width, layers=read.integer("n_layer", "num_hidden_layers"),
        max_position=read.integer("seq_length", default=2048), position_rows=0,
        tied=read.boolean("tie_word_embeddings", True),
    )  # fmt: skip
    return msgspec.structs.replace(shape, first_norm_size=2 * width)


def _plain_model(
    read: _Config, architecture: str, name: str, width: int, heads: int, inner: int,
    *, layers: int, max_position: int, position_rows: int, tied: bool,
) -> ModelShape:  # fmt: skip
    if width % heads:
        raise WeightError(CONFIG_FILE, "hidden_size", f"{width}: must be divisible by the {heads} heads")
    return ModelShape(
        name=name, architecture=architecture, hidden_size=width, num_heads=heads, num_kv_heads=heads,
        head_size=width // heads, intermediate_size=inner, vocab_size=read.integer("vocab_size"),
        max_position=max_position, dtype=_dtype(read), tied=tied, kinds=(_plain_layer(width, heads, inner),),
        layer_kinds=(0,) * layers, position_rows=position_rows, final_norm_size=2 * width,
        weight_format=format_from_config(read.values),
    )  # fmt: skip


_MAKERS: Final = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "MixtralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
            "OracleForCausalLM",
        ),
        _decoder,
    ),
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
    "GPT2LMHeadModel": _gpt2,
    "OPTForCausalLM": _opt,
    "BloomForCausalLM": _bloom,
}
