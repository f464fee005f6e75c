"""Which tensor is in which shard file, with shape and dtype: from the headers alone, every one of them checked.

Only safetensors is read. A header is `u64 length, JSON, data`; nothing in it is trusted before it was proved sound.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argosy.cluster.protocol.errors import UnsupportedModel, WeightError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
LOADABLE_DTYPES = ("F32", "BF16", "F16")
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, unread."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its data in the file, for reading in order
    num_bytes: int


class Checkpoint:
    """All tensors of a folder by name."""

    def __init__(self, folder: Path, entries: dict[str, TensorEntry]):
        self.folder, self.entries = folder, entries

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read and check all headers. Raises `WeightError` or `UnsupportedModel` naming the file."""
        folder = Path(folder)
        entries: dict[str, TensorEntry] = {}
        index = _read_index(folder / INDEX_FILE) if (folder / INDEX_FILE).exists() else None
        for path in _shards(folder, index):
            for entry in read_header(path):
                if entry.name in entries:
                    raise WeightError(path.name, entry.name, f"is also in {entries[entry.name].file.name}")
                entries[entry.name] = entry
        for name, file in (index or {}).items():
            if name not in entries or entries[name].file.name != file:
                raise WeightError(INDEX_FILE, name, f"is not in {file}, where the index says it is")
        return cls(folder, entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    def is_zero(self, name: str) -> bool:
        """Whether all numbers of a (small) tensor are 0."""
        entry = self.entries[name]
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            return not any(file.read(entry.num_bytes))


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file. Raises `WeightError` when it is cut off or contradicts itself."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise WeightError(path.name, "", "is cut off or not a safetensors file: its header does not fit")
            values = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise WeightError(path.name, "", f"can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightError(path.name, "", f"has a broken header: {error}") from error
    if not isinstance(values, dict):
        raise WeightError(path.name, "", "has a broken header: not an object")
    data_start = 8 + length
    entries = [_entry(path, name, value, data_start) for name, value in values.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry.offset)
    end = data_start
    for entry in entries:
        if entry.offset < end:
            raise WeightError(path.name, entry.name, "overlaps the tensor before it")
        end = entry.offset + entry.num_bytes
    if end > size:
        raise WeightError(path.name, entries[-1].name, f"is cut off: the file has {size} bytes and needs {end}")
    return entries


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (first, last) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, first, last)
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("negative or not a number")
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightError(path.name, name, f"has a broken header entry: {error!r:.100}") from error
    if num_bytes != last - first:
        raise WeightError(path.name, name, f"{dtype} {list(shape)} needs {num_bytes} bytes, not {last - first}")
    return TensorEntry(name, path, dtype, shape, data_start + first, num_bytes)


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} is there twice")
        values[key] = value
    return values


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(path.name, "", f"is not readable as JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise WeightError(path.name, "weight_map", "is missing") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(path.name, "weight_map", "must map tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightError(path.name, name, f"{file!r:.80}: must be the name of a .safetensors file of this folder")
    return weight_map


def _shards(folder: Path, index: dict[str, str] | None) -> list[Path]:
    if index is not None:
        paths = [folder / file for file in sorted(set(index.values()))]
        for path in paths:
            if not path.is_file():
                raise WeightError(INDEX_FILE, "weight_map", f"names {path.name}, which is not in the folder")
        return paths
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    for pattern in OTHER_FORMATS:
        for path in sorted(folder.glob(pattern)):
            raise UnsupportedModel(path.name, "", "only safetensors are read; convert with save_pretrained")
    raise WeightError(str(folder), SINGLE_FILE, "is missing: the folder holds no safetensors")
