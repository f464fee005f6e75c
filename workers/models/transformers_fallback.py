"""Any other decoder that transformers knows: its own modules, with our paged attention through its attention interface.

Correct first: stages of whole layers, groups that gather (`strangers_group`), no recorded graphs, weights as
transformers loads them. What its modules would
compute without our cache (recurrent states, chunked masks, biases of positions, an encoder) is refused by name before
anything is served, and so is an architecture whose attention does not ask the interface. T = tokens, H = head size.
"""

import copy
import json
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.cluster.protocol.config_json import read_json
from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.model_spec import CONFIG_FILE, ModelSpec, override
from argosy.placement.plan import RankInfo, make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.attention.base import AttentionBackend, AttentionMetadata, AttentionShape
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.forward_context import ForwardContext
from argosy.workers.kv_cache import KVCache
from argosy.workers.loading.names import NameTable
from argosy.workers.models.strangers_group import HeadShare, share_linear_layers
from argosy.workers.models.strangers_stage import StrangersStage, layers_of
from argosy.workers.quantization.base import Cut

NAME = "argosy"  # of our attention in the interface
NOT_SAID = "not said"
CHECKED_TOKENS = 16  # of a prompt that both attentions answer before anything is served
LARGEST_ERROR, LARGEST_ERROR_OF_16_BITS = 1e-3, 0.1  # of logits: several times what roundings come to
KNOWN_LAYERS, CHUNKED = {"full_attention", "sliding_attention"}, "chunked_attention"


class _Everything(set[str]):
    """Transformers itself says what it misses in a checkpoint."""

    def __contains__(self, name: object) -> bool:
        return True


class _Bridge:
    """From an attention module of transformers to our cache; each module has it as an attribute."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.ctx: ForwardContext | None = None
        self.positions_T: Tensor | None = None
        self.layers_seen: set[int] = set()
        self.first_layer = 0  # whose cache is the first here
        self.share: HeadShare | None = None  # of a tensor-parallel group, once it was tried alone


class _Output:
    """What a model's layers gave to its head, which may look for things that we have not asked for."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int | slice) -> Any:
        return self.last_hidden_state if place == 0 else ()


class _Given(nn.Module):
    """In the place of a model's layers: gives its head what they gave."""

    hidden: Tensor

    def forward(self, *args: Any, **options: Any) -> _Output:
        """The hidden state, as a model's output."""
        return _Output(self.hidden)


class TransformersFallback(nn.Module):
    """A model of transformers', or a stage of it."""

    NAMES = NameTable({})
    records_graphs = False  # modules of others may ask the device for values

    def __init__(
        self, spec: ModelSpec, rank: RankInfo, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        spec.check_layout(rank.tp_size, rank.pp_size)
        self.spec, self.rank, self.parallel, self.dtype, self.device = spec, rank, parallel, dtype, device
        self._config = _read_config(spec)
        self._bridge = _Bridge(spec)
        self.inner: Any = None
        self._head: Any = None
        self._trunk: Any = None
        self._given = _Given()
        self._stage: StrangersStage | None = None  # None: all layers

    # ------------------------------------------------------------------------------------------------------ loading

    def checkpoint_tensors(self) -> Iterator[tuple[str, nn.Module, str, Cut]]:
        """None of ours: transformers reads its files."""
        return iter(())

    def known_names(self) -> set[str]:
        """Whatever transformers makes of them."""
        return _Everything()

    def allocate(self, modules: Collection[nn.Module] | None = None) -> None:
        """Let transformers load the folder; without weight files (`load_format` dummy) they are random."""
        _register()
        try:
            model = self._load()
        except KeyError as error:
            if error.args != (NAME,):
                raise
            raise _refused(self.spec, "it has a list of attentions of its own") from error
        if not model._supports_attention_backend:
            raise _refused(self.spec, "its attention does not go through transformers' attention interface")
        # several ranks: there is memory for one's part on the device, so the whole is tried where the files were read
        is_alone = self.rank.pp_size == self.rank.tp_size == 1
        tried_on = self.device if is_alone else torch.device("cpu")
        self.inner = model.to(tried_on).eval().requires_grad_(False)
        for module in self.inner.modules():
            if hasattr(module, "layer_idx"):
                module.argosy_bridge = self._bridge
        head = copy.copy(self.inner)
        trunk = _trunk_of(self.spec, self.inner)
        head._modules = {**self.inner._modules, trunk: self._given}
        self._trunk = (getattr(self.inner, trunk),)  # the same
        self._head = (head,)  # in a tuple: its modules are counted where they live
        try:
            self._try(tried_on)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise _refused(self.spec, f"its modules fail over our cache: {error}") from error
        if self._stage is not None:
            self._stage.empty()
        if self.rank.tp_size > 1:
            share_linear_layers(self.inner, self.parallel)
            self._bridge.share = HeadShare(self.parallel, self.spec.num_kv_heads)
        self.inner.to(self.device)

    def _load(self) -> Any:
        import transformers  # seconds of import: only for models that need it

        make: Any = transformers.AutoModelForCausalLM
        options = {"dtype": self.dtype, "attn_implementation": NAME, "trust_remote_code": False}
        if any(Path(self.spec.source).glob("*.safetensors")):
            return make.from_pretrained(
                self.spec.source, config=self._config, local_files_only=True, use_safetensors=True, **options
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # ranks of a group have the same ones
            return make.from_config(self._config, **options)

    def finish(self, modules: Collection[nn.Module] | None = None) -> None:
        """All is in shape."""

    @torch.inference_mode()
    def _try(self, device: torch.device) -> None:
        """It must answer as it does with transformers' own attention; then it is cut to this rank's stage.

        Raises `UnsupportedModel` when it doesn't: what an attention does beyond asking the interface we can't know.
        """
        ids_T = torch.arange(1, CHECKED_TOKENS + 1, device=device) % self.spec.vocab_size
        positions_T = torch.arange(CHECKED_TOKENS, device=device)
        self.inner.set_attn_implementation("eager")
        want_TV = self.inner(input_ids=ids_T[None], use_cache=False).logits[0, :, : self.spec.vocab_size].float()
        self.inner.set_attn_implementation(NAME)
        rank, self.rank = self.rank, make_plan(self.spec.num_layers, 1, 1).ranks[0]
        cache = KVCache.allocate(self.spec, self.rank, 1, CHECKED_TOKENS, self.dtype, device)
        ends = sorted({0, rank.first_layer, rank.last_layer, self.spec.num_layers})
        layers = layers_of(self.inner, self.spec.num_layers) if rank.pp_size > 1 else None
        if layers is None and rank.pp_size > 1:
            raise _refused(self.spec, "its layers are no list that stages could share; use pipeline_parallel_size=1")
        middle, parts, gives_tuple = CHECKED_TOKENS // 2, [], False
        for part in (slice(0, middle), slice(middle, CHECKED_TOKENS)):  # the second looks back on the first
            hidden_TD: Tensor | None = None
            for first, last in pairwise(ends):
                self._stage = None if layers is None else StrangersStage(layers, first, last)
                ctx = self._trial(cache, part, device)
                if self._stage is not None:
                    self._stage.gives_tuple = gives_tuple
                hidden_TD = self.forward(None if first else ids_T[part], hidden_TD, positions_T[part], ctx)
                if self._stage is not None:
                    gives_tuple = self._stage.gives_tuple
                    self._stage.undo()
            assert hidden_TD is not None
            parts.append(self.compute_logits(hidden_TD))
        errors_T = (torch.cat(parts) - want_TV).norm(dim=-1) / want_TV.norm(dim=-1)
        worst = float(errors_T.median())  # a single token may have been given other experts by a rounding
        if not worst < (LARGEST_ERROR if self.dtype == torch.float32 else LARGEST_ERROR_OF_16_BITS):
            way = " and layers on several stages (use pipeline_parallel_size=1)" if rank.pp_size > 1 else ""
            raise _refused(self.spec, f"its answers differ by {worst:.1%} with our attention{way} in place of its own")
        self.rank, self._stage = rank, None
        if layers is not None:
            self._stage = StrangersStage(layers, rank.first_layer, rank.last_layer)
            self._stage.gives_tuple = gives_tuple

    def _trial(self, cache: KVCache, tokens: slice, device: torch.device) -> ForwardContext:
        """Some tokens of one short prompt, in the one block that there is."""
        backend: AttentionBackend = TorchBackend()
        if device.type == "cuda":
            from argosy.workers.attention.triton_backend import TritonBackend  # Triton, which a CPU host has no need of

            backend = TritonBackend()
        count = tokens.stop - tokens.start
        metadata = AttentionMetadata(
            num_rows=1, num_decode_rows=0, max_query_len=count, max_context_len=tokens.stop,
            query_start_R1=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_len_R=torch.tensor([tokens.stop], dtype=torch.int32, device=device),
            block_table_RB=torch.zeros((1, 1), dtype=torch.int32, device=device),
            slot_mapping_T=torch.arange(tokens.start, tokens.stop, device=device),
        )  # fmt: skip
        return ForwardContext(backend, cache, metadata)

    # ------------------------------------------------------------------------------------------------------ running

    def forward(
        self, token_ids_T: Tensor | None, hidden_TD: Tensor | None, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """[T, D]: the final hidden state of each token, or what the next stage gets."""
        bridge, stage, rank = self._bridge, self._stage, self.rank
        bridge.ctx, bridge.positions_T = ctx, positions_T
        first, last = (rank.first_layer, rank.last_layer) if stage is None else (stage.first, stage.last)
        bridge.first_layer = rank.first_layer
        bridge.layers_seen.clear()
        if stage is not None:
            stage.given_TD = hidden_TD if first else None
        if token_ids_T is None:  # their embedding is not looked at
            token_ids_T = torch.zeros_like(positions_T)
        (trunk,) = self._trunk
        output = trunk(input_ids=token_ids_T[None], position_ids=positions_T[None], use_cache=False, return_dict=True)
        bridge.ctx = None
        if len(bridge.layers_seen) != last - first:
            raise _refused(self.spec, f"only {len(bridge.layers_seen)} of its {last - first} layers attend")
        hidden: Tensor = output.last_hidden_state[0] if last == self.spec.num_layers else stage.made_TD  # type: ignore[union-attr]  # the last layer's
        return hidden

    def compute_raw_logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, vocabulary] in the model's numbers, with all that its head does to them."""
        (head,) = self._head
        self._given.hidden = hidden_SD[None]
        ids = torch.zeros((1, len(hidden_SD)), dtype=torch.int64, device=hidden_SD.device)
        logits: Tensor = head(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        del self._given.hidden
        return logits[:, : self.spec.vocab_size]

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        """The same in float32, contiguous."""
        return self.compute_raw_logits(hidden_SD).float().contiguous()


def _read_config(spec: ModelSpec) -> Any:
    """Transformers' config, and the reasons why it can't be served this way. Code of the folder is never run."""
    import transformers

    if getattr(transformers, spec.architecture, None) is None:
        raise UnsupportedModel(
            CONFIG_FILE, "architectures", f"{spec.architecture!r} is neither ours nor one of transformers' own models"
        )
    config = _as_overridden(spec)
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(spec, "it has an encoder")
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:  # type: ignore[attr-defined, unused-ignore]  # private
        raise _refused(spec, "transformers has no causal language model for its config")
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS
    chunk = getattr(text, "attention_chunk_size", None)
    if CHUNKED in kinds and chunk:
        if spec.max_position > chunk:
            raise _refused(
                spec, f"chunked layers; they see everything up to {chunk} tokens: use --max-model-len {chunk}"
            )
        kinds.remove(CHUNKED)
    if kinds:
        raise _refused(spec, f"layers of these kinds: {', '.join(sorted(map(str, kinds)))}")
    return config


def _as_overridden(spec: ModelSpec) -> Any:
    """Transformers' config of the folder, with what replaces some of its keys (`hf_overrides`)."""
    import transformers

    options = {"local_files_only": True, "trust_remote_code": False}
    if not spec.source_overrides:
        return transformers.AutoConfig.from_pretrained(spec.source, **options)
    config = override(read_json(Path(spec.source, CONFIG_FILE)), json.loads(spec.source_overrides))
    with tempfile.TemporaryDirectory(prefix="argosy-") as folder:  # it reads whole files only, and renames old keys
        Path(folder, CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(folder, **options)


def _trunk_of(spec: ModelSpec, model: Any) -> str:
    """The name of the part that has the layers; some models have another than they say."""
    for name in (model.base_model_prefix, "model", "transformer"):
        if name in model._modules:
            return str(name)
    raise _refused(spec, "which of its parts has the layers is not to be seen")


def _refused(spec: ModelSpec, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        CONFIG_FILE, "architectures", f"{spec.architecture} can't run through transformers' modules: {reason}"
    )


def _window(spec: ModelSpec, module: Any, layer: int) -> int | None:
    """Of a module that leaves its window to the mask, which we have none of: as the config says, if it says so."""
    config = getattr(module, "config", None)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] == "full_attention"):
        return None
    if kinds is None:
        raise _refused(spec, "which layers have its sliding window is not in its config")
    return window


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **options: Any) -> None:
    """Every row of ours knows its own context."""


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | str | None = NOT_SAID,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' modules call: [1, heads, T, H] each, rotated; gives [1, T, heads, H]."""
    bridge: _Bridge = module.argosy_bridge
    ctx, spec, layer = bridge.ctx, bridge.spec, int(module.layer_idx)
    assert ctx is not None
    assert bridge.positions_T is not None
    if layer in bridge.layers_seen:
        raise _refused(spec, "it attends more than once a layer, and the cache has room for one")
    if attention_mask is not None or options.get("position_bias") is not None:
        raise _refused(spec, "it adds to its attention's logits")
    if not getattr(module, "is_causal", True):
        raise _refused(spec, "its attention is not causal")
    num_heads, size, value_size = query.shape[1], query.shape[3], value.shape[3]
    key, value = (_as_cached(spec, part) for part in (key, value))
    query = F.pad(query, (0, spec.head_size - size))  # what keys are padded with counts nothing
    window = _window(spec, module, layer) if isinstance(sliding_window, str) else sliding_window
    shape = AttentionShape(
        num_heads=num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        scale=size**-0.5 if scaling is None else float(scaling),
        sliding_window=window,
        soft_cap=softcap,
        sinks_N=s_aux,
    )
    if (share := bridge.share) is not None:
        heads = share.heads(num_heads)
        query, key, value = query[:, heads], key[:, share.kv_heads], value[:, share.kv_heads]
        sinks_N = None if s_aux is None else s_aux[heads]
        shape = replace(shape, num_heads=query.shape[1], num_kv_heads=key.shape[1], sinks_N=sinks_N)
    qkv_TD = torch.cat((query[0], key[0], value[0])).transpose(0, 1).reshape(query.shape[2], -1)
    place = layer - bridge.first_layer
    cache = ctx.kv_cache.layers[place]
    out_TD = ctx.backend.forward(qkv_TD, bridge.positions_T, None, cache, ctx.metadata_of(place), shape, None)
    bridge.layers_seen.add(layer)
    if share is not None:
        out_TD = share.gather(out_TD.view(query.shape[2], -1))
    return out_TD.view(1, -1, num_heads, spec.head_size)[..., :value_size], None


def _as_cached(spec: ModelSpec, part: Tensor) -> Tensor:
    """Keys or values [1, heads, T, H] of a layer as the cache has them, which is one for layers of several shapes."""
    times, rest = divmod(spec.num_kv_heads, part.shape[1])
    if rest or part.shape[3] > spec.head_size:
        asked = (spec.num_kv_heads, spec.head_size)
        raise _refused(spec, f"its keys are {tuple(part.shape[1::2])} and its config says {asked}")
    if times > 1:
        part = part.repeat_interleave(times, 1)
    return F.pad(part, (0, spec.head_size - part.shape[3]))
