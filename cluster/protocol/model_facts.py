"""One model, as numbers: what the planner, the cache and the layers need to know. No torch, no files."""

from typing import Final

import msgspec

from argosy.cluster.protocol.config_json import CONFIG_FILE
from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.quant_spec import QuantSpec
from argosy.cluster.protocol.rope_spec import RopeSpec

DTYPES: Final = ("float32", "bfloat16", "float16")
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_scaled": 1, "int8": 1}
KV_SCALE_BYTES: Final = {"fp8_scaled": 1, "int8": 1}  # beside the numbers of each token and head in such a cache


class MoESpec(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts in place of the MLP. Sizes are of the whole model, not of one rank."""

    num_experts: int
    top_k: int
    intermediate_size: int  # of one expert
    scoring: str = "softmax"  # "softmax", "sigmoid", or "softmax_after" the choice of the top k
    renormalise: bool = False  # the chosen weights are made to sum to 1
    scaling_factor: float = 1.0  # what they are multiplied by afterwards
    correction_bias: bool = False  # added to the scores for the choice only
    num_groups: int = 1
    top_groups: int = 1  # the choice is among the experts of so many groups
    group_score: str = "max"  # of a group: its best score, or "top2": the sum of its two best
    router_bias: bool = False
    expert_bias: bool = False
    shared_size: int = 0  # inner width of the expert that sees every token; 0: none
    shared_gate: bool = False  # it is weighted by a sigmoid of its own
    swiglu_limit: float = 0.0  # gpt-oss: gate and up are clamped; 0: plain
    swiglu_alpha: float = 1.702
    layers: tuple[bool, ...] = ()  # which layers have experts; empty: all
    expert_parallel: bool = False  # a rank of the tensor-parallel group has whole experts, not a part of each
    all2all: str = "auto"  # with whole experts: "sum" over the group, "all_to_all", or what was measured to be faster

    def own_experts(self, tp_size: int, tp_rank: int) -> range:
        """The experts of one rank of a group that has whole ones: as even as can be, none where there are too few."""
        return range(tp_rank * self.num_experts // tp_size, (tp_rank + 1) * self.num_experts // tp_size)

    @property
    def shared_is_whole(self) -> bool:
        """Whether each rank has all of the shared expert: where tokens are divided over the ranks, not weights."""
        return self.expert_parallel and self.all2all == "all_to_all"


class MLASpec(msgspec.Struct, frozen=True, kw_only=True):
    """Attention whose keys and values are products of one small latent vector a token (DeepSeek)."""

    q_rank: int  # 0: the query is one product
    kv_rank: int
    nope_size: int  # of a head, not rotated
    rope_size: int  # of a head, rotated; its key is shared by all heads
    value_size: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as numbers."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float = 1e-6
    activation: str = "silu"  # "silu", "gelu_tanh", "gelu" or "relu"
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeSpec = RopeSpec()
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()  # one for each layer; empty: all, if there is a window
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    # what families other than Llama's differ in
    norm: str = "rms"  # "rms", "rms_plus_one" (1 + w), "layer", "layer_no_bias"
    block: str = "sequential"  # or "parallel", "parallel_two_norms", "sandwich", "norm_after", "post_norm"
    position: str = "rotary"  # or "learned", "alibi", "none"
    position_rows: int = 0  # of the table of learned positions
    position_offset: int = 0  # of position 0 in it
    local_rope: RopeSpec | None = None  # of layers with a window, where it differs
    unrotated_layers: tuple[bool, ...] = ()  # one for each layer; empty: all are rotated
    qk_norm_kind: str = "head"  # "head", "full" (over all heads together), "layer_head" (LayerNorm, a weight a head)
    gated: bool = True  # the MLP has a gate
    embedding_size: int = 0  # 0: hidden_size; else projected to it and back
    embedding_norm: bool = False
    final_norm: bool = True
    head_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    final_soft_cap: float | None = None
    attention_scale: float | None = None  # None: head_size ** -0.5
    attention_soft_cap: float | None = None
    alibi_max: float = 8.0
    alibi_scale: float = 1.0
    clip_qkv: float | None = None
    sinks: bool = False
    moe: MoESpec | None = None
    mla: MLASpec | None = None
    source: str = ""  # the folder, of a model that transformers' own modules run
    source_overrides: str = ""  # JSON: what replaces keys of its config.json for them, too
    quantization: QuantSpec | None = None  # how linear layers are packed; None: as they are

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer; None: it sees everything before it."""
        if self.windowed_layers and not self.windowed_layers[layer]:
            return None
        return self.sliding_window

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.moe is not None and (not self.moe.layers or self.moe.layers[layer])

    def as_served(
        self, max_model_len: int | None, *, expert_parallel: bool = False, all2all: str = "auto"
    ) -> "ModelSpec":
        """The same for sequences of at most `max_model_len` tokens (some rotations depend on what is promised)."""
        if self.position == "learned" and (max_model_len or 0) > self.max_position:
            raise ConfigError(
                f"max_model_len={max_model_len} exceeds the {self.max_position} positions that the model has learned; "
                f"use {self.max_position} or less"
            )
        spec = msgspec.structs.replace(self, max_position=max_model_len or self.max_position)
        return spec.with_experts(expert_parallel=expert_parallel, all2all=all2all)

    def with_experts(self, *, expert_parallel: bool, all2all: str = "auto") -> "ModelSpec":
        """The same with whole experts on each rank of a group, if it has experts, reached in this way."""
        if self.moe is None or not expert_parallel:
            return self
        moe = msgspec.structs.replace(self.moe, expert_parallel=True, all2all=all2all)
        return msgspec.structs.replace(self, moe=moe)

    def check_layout(self, tp_size: int, pp_size: int = 1) -> None:
        """Raise `ConfigError` when heads or widths can't be divided over so many ranks."""
        if pp_size > self.num_layers:
            raise ConfigError(
                f"pipeline_parallel_size={pp_size} exceeds the model's {self.num_layers} layers; "
                f"use {self.num_layers} or fewer"
            )
        if self.moe is not None and self.moe.expert_parallel and self.moe.num_experts < tp_size:
            raise ConfigError(
                f"tensor_parallel_size={tp_size} exceeds {CONFIG_FILE}'s num_experts={self.moe.num_experts}: with "
                f"enable_expert_parallel a rank would have none; use {self.moe.num_experts} or fewer, or leave it out"
            )
        for name, count in self._divided():
            if count % tp_size:
                raise ConfigError(
                    f"tensor_parallel_size={tp_size} does not divide {CONFIG_FILE}'s {name}={count}; "
                    f"possible: {self._possible_tp_sizes()}"
                )
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel_size={tp_size} neither divides nor is a multiple of {CONFIG_FILE}'s "
                f"num_key_value_heads={self.num_kv_heads}; possible: {self._possible_tp_sizes()}"
            )

    def _divided(self) -> list[tuple[str, int]]:
        """What a tensor-parallel group has equal parts of: (key, how many)."""
        divided = [("num_attention_heads", self.num_heads)]
        if self.source:  # of widths that can't be divided, each rank has all
            return divided
        if not all(self.has_experts(layer) for layer in range(self.num_layers)):
            divided.append(("intermediate_size", self.intermediate_size))
        if self.moe is not None:
            if not self.moe.expert_parallel:  # whole experts are dealt out, to some ranks one more
                divided.append(("moe_intermediate_size", self.moe.intermediate_size))
            if not self.moe.shared_is_whole:
                divided.append(("shared_expert_intermediate_size", self.moe.shared_size))
        return divided

    def _possible_tp_sizes(self) -> str:
        sizes = [
            n
            for n in range(1, min(self.num_heads, 64) + 1)
            if all(not count % n for _, count in self._divided())
            and (not self.num_kv_heads % n or not n % self.num_kv_heads)
        ]
        return ", ".join(map(str, sizes))

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the whole model, a tied head counted once."""
        width = self.embedding_size or self.hidden_size
        total = self.vocab_size * width * (1 if self.tied else 2) + self.vocab_size * self.head_bias
        total += 2 * self.embedding_size * self.hidden_size + self.position_rows * self.hidden_size
        norm = self._norm_parameters
        total += norm * (self.embedding_norm + self.final_norm)
        norms = {"sequential": 2, "parallel": 1, "sandwich": 4}.get(self.block, 2)
        return total + sum(
            norms * norm + self._attention_parameters + self._mlp_parameters(layer) for layer in range(self.num_layers)
        )

    @property
    def _norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def _attention_parameters(self) -> int:
        width, mla = self.hidden_size, self.mla
        if mla is not None:
            q_in, q_out = mla.q_rank or width, self.num_heads * (mla.nope_size + mla.rope_size)
            count = q_in * q_out + (width * mla.q_rank + mla.q_rank) + width * (mla.kv_rank + mla.rope_size)
            count += mla.kv_rank + mla.kv_rank * self.num_heads * (mla.nope_size + mla.value_size)
            return count + self.num_heads * mla.value_size * width
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        count = width * (2 * q + 2 * kv) + (q + 2 * kv) * self.qkv_bias + width * self.o_bias
        count += self.num_heads * self.sinks
        return count + (2 * self.head_size if self.qk_norm_kind == "head" else q + kv) * self.qk_norm

    def _mlp_parameters(self, layer: int) -> int:
        def mlp(inner: int, *, bias: bool, gated: bool) -> int:
            ups = 2 if gated else 1
            return (ups + 1) * self.hidden_size * inner + (ups * inner + self.hidden_size) * bias

        if self.moe is None or not self.has_experts(layer):
            return mlp(self.intermediate_size, bias=self.mlp_bias, gated=self.gated)
        moe = self.moe
        count = moe.num_experts * mlp(moe.intermediate_size, bias=moe.expert_bias, gated=True)
        count += moe.num_experts * (self.hidden_size + moe.router_bias + moe.correction_bias)
        return (
            count
            + mlp(moe.shared_size, bias=False, gated=True) * bool(moe.shared_size)
            + (self.hidden_size * moe.shared_gate)
        )


def kv_heads_per_rank(spec: ModelSpec, tp_size: int) -> int:
    """Key/value heads that one rank holds: its share, or one that it has in common with others."""
    return 1 if spec.mla is not None else max(1, spec.num_kv_heads // tp_size)


def kv_sizes(spec: ModelSpec) -> tuple[int, int]:
    """Numbers that a layer's two caches hold for each token and head: (key, value).

    Latent attention stores the latent vector in the first and the rotated key, which all heads share, in the second:
    576 numbers a token for DeepSeek V3 whatever the layout, where full heads would take 128 * (192 + 128).
    """
    return (spec.mla.kv_rank, spec.mla.rope_size) if spec.mla is not None else (spec.head_size, spec.head_size)


def kv_bytes_per_token(
    spec: ModelSpec, dtype_bytes: int, tp_size: int, num_layers: int, *, scale_bytes: int = 0
) -> int:
    """KV bytes of one token on one rank that has `num_layers` layers; `scale_bytes` for each head of each cache."""
    a_head = sum(size * dtype_bytes + scale_bytes for size in kv_sizes(spec))
    return num_layers * kv_heads_per_rank(spec, tp_size) * a_head
