"""What a model is made of, as counted matrices: for planning, also of models that no rank of ours can run yet.

A `ModelShape` comes from a `config.json` alone (`model_families.shape_from_config`), from a model folder, or from the
published configs that ship with us (`model_sources.read_model_shape`). Nothing of the model's code is run.
"""

from typing import Final, Literal

import msgspec

from argosy.placement.weight_format import WeightFormat

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "float8_e4m3fn": 1}

Cut = Literal["column", "row", "kv", "expert_column", "expert_row", "none"]
"""How a tensor-parallel group shares a matrix: by outputs, by inputs, by key/value head, or not at all.

Experts are cut by their width where it can be divided, and else dealt out."""


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """One weight matrix of a layer, or `count` alike (experts), of which a token uses `active`."""

    name: str
    num_out: int
    num_in: int
    cut: Cut
    count: int = 1
    active: int = 1
    quantised: bool = True  # by a weight format; routers and norms never are
    bias: bool = False

    @property
    def num_weights(self) -> int:
        """Numbers in all of them, biases included."""
        return self.count * self.num_out * (self.num_in + self.bias)

    @property
    def is_experts(self) -> bool:
        """Whether a token chooses among several."""
        return self.count > 1


class LayerShape(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of layer."""

    matrices: tuple[Matrix, ...]
    norm_size: int  # numbers in its norms, which every rank has

    @property
    def num_weights(self) -> int:
        """Numbers in the layer."""
        return sum(matrix.num_weights for matrix in self.matrices) + self.norm_size


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A whole model. Layer i is `kinds[layer_kinds[i]]`."""

    name: str
    architecture: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    dtype: str  # of the weights, or of what isn't quantised
    tied: bool
    kinds: tuple[LayerShape, ...]
    layer_kinds: tuple[int, ...]
    position_rows: int = 0  # of a learned position table
    final_norm_size: int = 0
    first_norm_size: int = 0  # after the embedding (BLOOM)
    latent_size: int = 0  # MLA: numbers of KV a token and layer, the same on every rank; 0: key and value heads
    latent_head_work: int = 0  # MLA: multiply-adds a head and cached token
    num_experts: int = 0
    expert_size: int = 0  # width of one expert
    sliding_window: int | None = None
    windowed: tuple[bool, ...] = ()  # by layer
    weight_format: WeightFormat = WeightFormat()
    checkpoint_bytes: int | None = None  # of its safetensors, where they are here

    @property
    def num_layers(self) -> int:
        """Layers that can be split over stages."""
        return len(self.layer_kinds)

    def layer(self, index: int) -> LayerShape:
        """The shape of one layer."""
        return self.kinds[self.layer_kinds[index]]

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the whole model, a tied head counted once."""
        layers = sum(self.layer(index).num_weights for index in range(self.num_layers))
        tables = self.vocab_size * self.hidden_size * (1 if self.tied else 2) + self.position_rows * self.hidden_size
        return layers + tables + self.final_norm_size + self.first_norm_size

    @property
    def num_active_parameters(self) -> int:
        """Those that one token multiplies with: of experts only the chosen ones; no embedding."""
        layers = sum(
            matrix.num_weights // matrix.count * matrix.active
            for index in range(self.num_layers)
            for matrix in self.layer(index).matrices
        )
        return layers + self.vocab_size * self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: float, tp_size: int, first_layer: int, last_layer: int) -> float:
        """KV bytes of one token on one rank that has the layers [first_layer, last_layer)."""
        num_layers = last_layer - first_layer
        if self.latent_size:
            return num_layers * self.latent_size * dtype_bytes
        return 2 * num_layers * max(1, self.num_kv_heads // tp_size) * self.head_size * dtype_bytes

    def why_not_tp(self, tp_size: int) -> str | None:
        """What can't be divided by so many ranks, in words; None when all can."""
        if self.num_heads % tp_size:
            return f"TP{tp_size} does not divide {self.num_heads} attention heads"
        if not self.latent_size and self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            return f"TP{tp_size} neither divides nor is a multiple of {self.num_kv_heads} key/value heads"
        if self.num_experts and self.num_experts % tp_size and self.expert_size % tp_size:
            return f"TP{tp_size} divides neither {self.num_experts} experts nor their width {self.expert_size}"
        if self.intermediate_size % tp_size:
            return f"TP{tp_size} does not divide the intermediate size {self.intermediate_size}"
        unit = self.weight_format.smallest_share
        if unit > 1 and (self.intermediate_size // tp_size) % unit:
            return f"TP{tp_size} cuts {self.weight_format.name} blocks of {unit} (width {self.intermediate_size})"
        return None
