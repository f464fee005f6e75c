"""What a model is made of, as counted matrices: for planning, also of models that no rank of ours can run yet.

A `ModelShape` follows from the facts in `ModelSpec` (`model_families.shape_from_spec`), which come from a `config.json`
alone: in a model folder, or of the published configs that ship with us (`model_sources.read_model_shape`).
"""

from typing import Literal

import msgspec

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.model_spec import ModelSpec, kv_bytes_per_token
from argosy.placement.weight_format import WeightFormat

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
    spec: ModelSpec
    kinds: tuple[LayerShape, ...]
    layer_kinds: tuple[int, ...]
    final_norm_size: int = 0
    first_norm_size: int = 0  # after the embedding (BLOOM)
    inner_size: int = 0  # the widest that a token's hidden state becomes inside a layer
    latent_head_work: int = 0  # MLA: multiply-adds a head and cached token
    weight_format: WeightFormat = WeightFormat()
    checkpoint_bytes: int | None = None  # of its safetensors, where they are here

    @property
    def num_layers(self) -> int:
        """Layers that can be split over stages."""
        return len(self.layer_kinds)

    @property
    def table_width(self) -> int:
        """Columns of the embedding and of the head."""
        return self.spec.embedding_size or self.spec.hidden_size

    def layer(self, index: int) -> LayerShape:
        """The shape of one layer."""
        return self.kinds[self.layer_kinds[index]]

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the whole model, a tied head counted once."""
        spec = self.spec
        layers = sum(self.layer(index).num_weights for index in range(self.num_layers))
        tables = spec.vocab_size * (self.table_width * (1 if spec.tied else 2) + spec.head_bias)
        tables += (spec.position_rows + 2 * spec.embedding_size) * spec.hidden_size
        return layers + tables + self.final_norm_size + self.first_norm_size

    @property
    def num_active_parameters(self) -> int:
        """Those that one token multiplies with: of experts only the chosen ones; no embedding."""
        layers = sum(
            matrix.num_weights // matrix.count * matrix.active
            for index in range(self.num_layers)
            for matrix in self.layer(index).matrices
        )
        return layers + self.spec.vocab_size * self.table_width

    def kv_bytes_per_token(self, dtype_bytes: int, tp_size: int, num_layers: int, *, scale_bytes: int = 0) -> int:
        """KV bytes of one token on one rank that has `num_layers` layers."""
        return kv_bytes_per_token(self.spec, dtype_bytes, tp_size, num_layers, scale_bytes=scale_bytes)

    def why_not_tp(self, tp_size: int) -> str | None:
        """What can't be divided by so many ranks, in words; None when all can."""
        spec = self.spec
        try:
            spec.check_layout(tp_size)
        except ConfigError as error:
            if spec.moe is None or not self.deals_experts(tp_size):
                return str(error)
        return None

    def deals_experts(self, tp_size: int) -> bool:
        """Whether each rank of a group has whole experts: as asked for, or since their width can't be divided."""
        moe = self.spec.moe
        if moe is None or tp_size == 1:
            return False
        if moe.expert_parallel:
            return True
        if moe.intermediate_size % tp_size == 0:
            return False
        dealt = msgspec.structs.replace(self.spec, moe=msgspec.structs.replace(moe, expert_parallel=True))
        try:
            dealt.check_layout(tp_size)
        except ConfigError:
            return False
        return True
