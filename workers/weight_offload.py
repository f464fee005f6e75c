"""Layers whose weights live in the host's memory and come to the device while the layers before them compute.

    link      | copy 2      | copy 4      | copy 7      |          two buffers, in turn
    device    | 0 1 .         2 3 .         4 5 6 .       7 |

All large tensors of such a layer lie packed in one block of pinned memory, so that a layer is one copy. On the device
they are views of a buffer, the same one in every step: a recorded graph has the copies in it, and no layer or weight
format knows about any of this. What has one dimension (norms, biases) stays on the device: a neighbour may read it.

Each forward pass stands for itself: it begins to copy when it starts and has waited for every copy when it ends.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from argosy.placement.weight_offload import NUM_BUFFERS
from argosy.workers.host_memory import pinned_bytes

ALIGNMENT = 512  # bytes: where tensors begin in a buffer, for every kernel's loads
_FORMATS = ("argosy.workers.quantization.", "argosy.kernels.")  # whose objects keep tensors of a layer

Layer = TypeVar("Layer", bound=nn.Module)


@dataclasses.dataclass(slots=True)
class _View:
    """A tensor of a layer, and where in the layer's bytes it lies."""

    tensor: Tensor
    at: int
    offset: int  # of the tensor in its own storage, in numbers
    shape: torch.Size
    stride: tuple[int, ...]

    def bind(self, buffer: Tensor) -> None:
        """Let the tensor be a view of `buffer` from now on."""
        first = (buffer.storage_offset() + self.at) // self.tensor.itemsize + self.offset
        self.tensor.set_(buffer.untyped_storage(), first, self.shape, self.stride)  # type: ignore[call-overload, unused-ignore]  # torch's own


class WeightOffload:
    """The offloaded layers of one stage on one rank."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], device: torch.device):
        """`layers`: in the order in which they run. Each must come through `pack` once it is loaded, then `open`."""
        self.layers, self.device = list(layers), device
        self._place = {id(layer): place for place, layer in enumerate(self.layers)}
        counts = Counter(id(module) for layer in self.layers for module in set(layer.modules()))
        shared = {module for module, count in counts.items() if count > 1}
        self._shared = shared | {id(module) for module in _without(model, set(self._place))}
        self._host: list[Tensor] = []
        self._views: list[list[_View]] = []
        self._buffers: list[Tensor] = []
        self._copies: Any = None  # the stream of the link; None on a CPU
        self._arrived: list[Any] = []  # events, one a layer
        self._spent: list[Any] = []

    @property
    def host_bytes(self) -> int:
        """In the host's memory."""
        return sum(block.nbytes for block in self._host)

    @property
    def buffer_bytes(self) -> int:
        """On the device."""
        return sum(buffer.nbytes for buffer in self._buffers)

    # ------------------------------------------------------------------------------------------------------ loading

    def modules_of(self, layer: nn.Module) -> list[nn.Module]:
        """The modules of an offloaded layer that are of no other part of the model."""
        return [module for module in layer.modules() if id(module) not in self._shared]

    @torch.no_grad()
    def pack(self, layer: nn.Module) -> None:
        """Move what the layer has to the host. It can't run until `open`. In the order of `layers`."""
        assert self._place[id(layer)] == len(self._host), "layers are packed in the order in which they run"
        found = self._storages(layer)
        sizes = [-(-storage.nbytes() // ALIGNMENT) * ALIGNMENT for storage, _ in found]
        host, at, views = pinned_bytes(sum(sizes), self.device), 0, []
        for (storage, tensors), size in zip(found, sizes, strict=True):
            num_bytes = storage.nbytes()
            whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage, 0, (num_bytes,), (1,))
            host[at : at + num_bytes].copy_(whole)
            for tensor in tensors:
                views.append(_View(tensor, at, int(tensor.storage_offset()), tensor.shape, tensor.stride()))
            at += size
        for view in views:
            view.tensor.set_()  # type: ignore[call-overload, unused-ignore]  # gives its memory back
        self._host.append(host)
        self._views.append(views)

    def _storages(self, layer: nn.Module) -> list[tuple[torch.UntypedStorage, list[Tensor]]]:
        """The memory that the layer's large tensors have on the device, and which they are."""
        by_memory: dict[int, list[Tensor]] = {}
        for tensor in _tensors(layer, self._shared, set()):
            if tensor.layout == torch.strided and tensor.device == self.device and tensor.numel():
                by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        return [
            (tensors[0].untyped_storage(), tensors)
            for tensors in by_memory.values()
            if max(tensor.ndim for tensor in tensors) > 1
        ]

    @torch.no_grad()
    def open(self) -> None:
        """All layers are packed: make the buffers, and let the layers look at them."""
        assert len(self._host) == len(self.layers)
        size = max((block.nbytes for block in self._host), default=0)
        self._buffers = [
            torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(min(NUM_BUFFERS, len(self._host)))
        ]
        for place, views in enumerate(self._views):
            for view in views:
                view.bind(self._buffers[place % NUM_BUFFERS])
        self._views.clear()
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
            make: Any = torch.cuda.Event  # torch gives it no types
            self._arrived, self._spent = ([make() for _ in self._host] for _ in range(2))

    # ------------------------------------------------------------------------------------------------------ running

    def in_turn(self, layers: Sequence[Layer]) -> Iterator[Layer]:
        """All layers of the stage, each with its weights there while the loop's body runs."""
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))  # nobody computes with the buffers now
        for place in range(len(self._buffers)):
            self._copy(place)
        for layer in layers:
            place_of_layer = self._place.get(id(layer))
            if place_of_layer is None:
                yield layer
                continue
            if self._copies is not None:
                torch.cuda.current_stream(self.device).wait_event(self._arrived[place_of_layer])
            yield layer
            following = place_of_layer + NUM_BUFFERS
            if following < len(self._host):
                if self._copies is not None:
                    self._spent[place_of_layer].record(torch.cuda.current_stream(self.device))
                    self._copies.wait_event(self._spent[place_of_layer])
                self._copy(following)

    def _copy(self, place: int) -> None:
        host, buffer = self._host[place], self._buffers[place % NUM_BUFFERS]
        if self._copies is None:
            buffer[: host.nbytes].copy_(host)
            return
        with torch.cuda.stream(self._copies):
            buffer[: host.nbytes].copy_(host, non_blocking=True)
            self._arrived[place].record(self._copies)


def _without(module: nn.Module, left_out: set[int]) -> Iterator[nn.Module]:
    """The module and all inside it, but for those that are left out and what only they have."""
    yield module
    for inner in module.children():
        if id(inner) not in left_out:
            yield from _without(inner, left_out)


def _tensors(thing: Any, shared: set[int], seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that a layer, its modules and their weight formats hold, once; nothing of shared modules."""
    if id(thing) in seen or id(thing) in shared:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    inside: Any = ()
    if isinstance(thing, nn.Module):
        inside = vars(thing).values()
    elif isinstance(thing, dict):
        inside = thing.values()
    elif isinstance(thing, list | tuple):
        inside = thing
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        inside = [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    elif type(thing).__module__.startswith(_FORMATS):
        inside = getattr(thing, "__dict__", {}).values()
    for each in list(inside):
        yield from _tensors(each, shared, seen)
