"""Fill a model: read only this rank's slices, in file order, and prove first that nothing is missing or wrong.

The order matters: names, shapes and dtypes are compared from the headers alone; then memory is allocated; then read.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from argosy.cluster.protocol.errors import WeightError
from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.workers.loading.checkpoint import LOADABLE_DTYPES, Checkpoint, TensorEntry
from argosy.workers.loading.fast_read import Slice, read_slices
from argosy.workers.loading.kv_scales import load_kv_scales
from argosy.workers.loading.names import NameTable
from argosy.workers.quantization.base import Cut
from argosy.workers.weight_offload import WeightOffload

DUMMY_STD = 0.02  # logits of a few units at any width
POOL_SIZE = 1_048_573  # a prime: rows of a matrix start at different places
MAX_NAMES_SHOWN = 3
PACKED_SPREAD = 448 / (8 * DUMMY_STD)  # random e4m3 numbers reach to eight times their spread
# last words of what packed checkpoints hold beside weights; which of them are needed is checked by name
PACKED_NAMES = {
    "weight_scale", "input_scale", "k_scale", "v_scale", "q_scale", "output_scale", "kv_scale",
    "g_idx", "weight_g_idx", "weight_shape", "weight_zero_point", "SCB", "weight_format",
    "input_zero_point",
}  # fmt: skip
PACKED_WEIGHTS = (".qweight", ".weight_packed", ".SCB", ".weight_scale", ".weight_scale_inv")

_ELSEWHERE = torch.empty(0)  # the target of what is stored by whoever asked for it


class LoadableModel(Protocol):
    """What loading needs of a model (`models.decoder.Decoder`)."""

    NAMES: NameTable
    spec: ModelSpec
    device: torch.device

    def checkpoint_tensors(self) -> Iterable[tuple[str, nn.Module, str, Cut]]:
        """What this rank reads: (name in the checkpoint, module, its parameter, the cut)."""

    def known_names(self) -> set[str]:
        """All tensors that a checkpoint of this model may hold."""

    def allocate(self, modules: Collection[nn.Module] | None = None) -> None:
        """Give the parameters memory, those of these modules alone if some are named."""

    def finish(self, modules: Collection[nn.Module] | None = None) -> None:
        """All are loaded, or all of these modules."""

    def modules(self) -> Iterable[nn.Module]:
        """All modules, the model itself first."""

    def parameters(self) -> Iterable[Tensor]:
        """All parameters."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did on this rank."""

    num_tensors: int
    num_bytes: int  # of the parameters, in the dtype that is computed in
    read_bytes: int  # of the slices, in the dtype of the files
    seconds: float


@dataclass(frozen=True, slots=True)
class _Read:
    """One slice on its way: from a tensor of the checkpoint into a parameter."""

    name: str
    module: nn.Module
    parameter: str
    cut: Cut


class _Progress:
    """What share of the bytes is there."""

    def __init__(self, total: int, report: Callable[[float], None]):
        self._total, self._done, self._report = max(total, 1), 0, report

    def add(self, count: int) -> None:
        """So many more."""
        self._done += count
        self._report(self._done / self._total)


def load_weights(
    model: LoadableModel,
    folder: str | Path,
    spec: ModelSpec,
    on_progress: Callable[[float], None] | None = None,
    *,
    load_format: str = "auto",
    seed: int = 0,
    offload: WeightOffload | None = None,
) -> LoadReport:
    """Allocate and fill the parameters of `model` from `folder`, or with random numbers for `load_format` "dummy".

    The layers of `offload` come last, one at a time: no more than one of them is on the device by itself.
    Raises `WeightError` before anything is allocated when the checkpoint does not hold exactly this model.
    """
    start = time.perf_counter()
    report = on_progress or (lambda fraction: None)
    reads = [_Read(*read) for read in model.checkpoint_tensors()]
    checkpoint: Checkpoint | None = None
    if load_format != "dummy":
        checkpoint = Checkpoint.open(folder)
        aliases = {alias: read.name.rpartition(".")[2] for read in reads for alias in read.cut.aliases}
        checkpoint.entries = {
            _without_alias(model.NAMES.canonical(name), aliases): entry for name, entry in checkpoint.entries.items()
        }
        check_checkpoint(checkpoint, model, reads)
    total = len(reads) if checkpoint is None else sum(checkpoint.entries[read.name].num_bytes for read in reads)
    progress = _Progress(total, report)
    num_bytes = num_read = 0
    with torch.inference_mode(False), torch.no_grad():
        if checkpoint is not None and spec.quantization is not None and spec.quantization.has_kv_scales:
            load_kv_scales(checkpoint, model)
        for layer, modules, own_reads in _parts(model, reads, offload):
            model.allocate(modules)
            if checkpoint is None:
                _fill_randomly(model, own_reads, seed, progress)
            else:
                num_read += _fill(checkpoint, model, own_reads, progress)
            # before they are finished: as they are stored; those of layers to come have no memory yet
            part = model if layer is None else layer
            num_bytes += sum(parameter.nbytes for parameter in part.parameters() if not parameter.is_meta)
            model.finish(modules)
            if offload is not None and layer is not None:
                offload.pack(layer)
        if offload is not None:
            offload.open()
    report(1.0)
    return LoadReport(len(reads), num_bytes, num_read, time.perf_counter() - start)


def _parts(
    model: LoadableModel, reads: list[_Read], offload: WeightOffload | None
) -> Iterator[tuple[nn.Module | None, list[nn.Module], list[_Read]]]:
    """(offloaded layer, its modules, its reads), one after the other; first everything else, as layer None."""
    own = [] if offload is None else [(layer, offload.modules_of(layer)) for layer in offload.layers]
    moved = {module for _, modules in own for module in modules}
    resident = [module for module in model.modules() if module not in moved]
    yield None, resident, [read for read in reads if read.module not in moved]
    for layer, modules in own:
        names = set(modules)
        yield layer, modules, [read for read in reads if read.module in names]


def check_checkpoint(checkpoint: Checkpoint, model: LoadableModel, reads: list[_Read]) -> None:
    """Compare names, shapes and dtypes with what `model` needs. Raises `WeightError` with the first that differ."""
    missing = [read.name for read in reads if read.name not in checkpoint.entries]
    if missing:
        hint = "; is tie_word_embeddings wrong in config.json?" if missing == ["lm_head.weight"] else ""
        words = next((name for name in checkpoint.entries if name.endswith(PACKED_WEIGHTS)), None)
        if words is not None and model.spec.quantization is None:
            hint = (
                f", which have {words}: config.json lacks the quantization_config of packed weights; give it with "
                "--hf-overrides"
            )
        raise WeightError(str(checkpoint.folder), _some(missing), f"missing from the safetensors{hint}")
    known = model.known_names()
    packed = model.spec.quantization is not None
    extra = [
        name
        for name in checkpoint.entries
        if name not in known
        and not model.NAMES.is_ignored(name)
        and not (packed and name.rpartition(".")[2] in PACKED_NAMES)
        and not (packed and name.endswith(".bias") and checkpoint.is_zero(name))  # GPTQ's writers give all layers one
    ]
    if extra:
        file = checkpoint.entries[extra[0]].file.name
        raise WeightError(file, _some(extra), f"not part of a {model.spec.architecture} with this config.json")
    for read in reads:
        entry = checkpoint.entries[read.name]
        if entry.shape not in (read.cut.full_shape, *read.cut.other_shapes):
            raise WeightError(
                entry.file.name,
                entry.name,
                f"has shape {list(entry.shape)}; config.json asks for {list(read.cut.full_shape)}",
            )
        dtypes = read.cut.dtypes or LOADABLE_DTYPES
        if entry.dtype not in dtypes:
            raise WeightError(entry.file.name, entry.name, f"has dtype {entry.dtype}; supported: {', '.join(dtypes)}")


def _without_alias(name: str, aliases: dict[str, str]) -> str:
    """The name with the last word that we use."""
    stem, dot, last = name.rpartition(".")
    return f"{stem}{dot}{aliases.get(last, last)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN])
    return shown if len(names) <= MAX_NAMES_SHOWN else f"{shown} and {len(names) - MAX_NAMES_SHOWN} more"


def _fill(checkpoint: Checkpoint, model: LoadableModel, reads: list[_Read], progress: _Progress) -> int:
    """Read file after file, each from front to back."""
    by_file: dict[Path, list[tuple[TensorEntry, _Read]]] = {}
    for read in reads:
        entry = checkpoint.entries[read.name]
        by_file.setdefault(entry.file, []).append((entry, read))
    num_read = 0
    for pairs in by_file.values():
        pairs.sort(key=lambda pair: pair[0].offset)
    if model.device.type != "cpu":
        return _fill_device(by_file, model.device, progress)
    for path in sorted(by_file):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for entry, read in by_file[path]:
                    target = _target(read)
                    if target is None:
                        continue
                    if all(part == slice(None) for part in read.cut.source):
                        tensor = file.get_tensor(entry.name)
                    else:
                        tensor = file.get_slice(entry.name)[read.cut.source]
                    _put(read, target, tensor)
                    num_read += tensor.nbytes
                    progress.add(entry.num_bytes)
        except (SafetensorError, OSError) as error:
            raise WeightError(path.name, "", f"can't be read: {error}") from error
    return num_read


def _fill_device(
    by_file: dict[Path, list[tuple[TensorEntry, _Read]]],
    device: torch.device,
    progress: _Progress,
) -> int:
    """The same onto a GPU, with reading and copying at the same time."""
    found = [(path, entry, read, _target(read)) for path in sorted(by_file) for entry, read in by_file[path]]
    kept = [(path, entry, read, target) for path, entry, read, target in found if target is not None]
    slices = read_slices([Slice(entry, read.cut.source) for _, entry, read, _ in kept], device)
    num_read = 0
    for path, entry, read, target in kept:
        try:
            tensor = next(slices)
        except OSError as error:
            raise WeightError(path.name, entry.name, f"can't be read: {error}") from error
        _put(read, target, tensor)
        num_read += tensor.nbytes
        progress.add(entry.num_bytes)
    slices.close()
    return num_read


def _fill_randomly(model: LoadableModel, reads: list[_Read], seed: int, progress: _Progress) -> None:
    """Weights that depend on (seed, name) alone.

    On a CPU the full tensor is made and cut, so that every layout is the same model; its numbers are a window of one
    pool of draws, since drawing each anew takes seconds for half a billion. On a GPU this rank's part is drawn on the
    device, because an 8B model has to be there in about a second.
    """
    on_cpu = model.device.type == "cpu"
    generator = torch.Generator(model.device)
    pool = torch.empty(POOL_SIZE if on_cpu else 0, device=model.device)
    pool.normal_(0.0, DUMMY_STD, generator=generator.manual_seed(seed & (2**63 - 1)))
    for read in reads:
        progress.add(1)
        target = _target(read)
        if target is None:
            continue
        digest = hashlib.blake2b(f"{seed}:{read.name}".encode(), digest_size=8).digest()
        own_seed = int.from_bytes(digest, "little") >> 1
        if len(read.cut.full_shape) == 1 and read.parameter == "weight":  # norms
            target.fill_(1.0)
        elif read.cut.dummy is not None:
            target.fill_(read.cut.dummy)
        elif on_cpu:
            if not read.cut.packs:
                pool = pool.to(target.dtype)
            part = _window(pool, own_seed % POOL_SIZE, read.cut.full_shape)[read.cut.source]
            _put(read, target, part * PACKED_SPREAD if read.cut.dtypes else part)
        elif read.cut.packs:
            shape = [len(range(size)[part]) for size, part in zip(read.cut.full_shape, read.cut.source, strict=True)]
            part = torch.empty(shape, dtype=torch.bfloat16, device=model.device)
            part.normal_(0.0, DUMMY_STD, generator=generator.manual_seed(own_seed))
            _put(read, target, part * PACKED_SPREAD if read.cut.dtypes else part)
        else:
            target.normal_(0.0, DUMMY_STD, generator=generator.manual_seed(own_seed))


def _window(pool: Tensor, first: int, shape: tuple[int, ...]) -> Tensor:
    """A tensor filled from place `first` of the pool on, round and round."""
    full = torch.empty(shape, dtype=pool.dtype)
    flat, at = full.view(-1), 0
    while at < flat.numel():
        piece = pool[first : first + flat.numel() - at]
        flat[at : at + piece.numel()] = piece
        at, first = at + piece.numel(), 0
    return full


def _put(read: _Read, target: Tensor, tensor: Tensor) -> None:
    """What was read (or drawn) to where it belongs."""
    if read.cut.store is not None:
        read.cut.store(tensor)
    else:
        target.copy_(tensor if read.cut.arrange is None else read.cut.arrange(tensor))


def _target(read: _Read) -> Tensor | None:
    """Where the slice goes. None: checked, but kept by another rank alone (the bias of a row-parallel layer)."""
    if read.cut.store is not None:
        return _ELSEWHERE
    parameter: Tensor | None = getattr(read.module, read.parameter)
    return None if parameter is None else parameter.data[read.cut.target_rows]
