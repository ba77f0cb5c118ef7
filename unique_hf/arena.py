"""Buffers of a whole cache in few large blocks, which a later call can get at the same addresses. Imports torch.

torch keeps freed blocks and gives them out again where the size fits. So a captured step needs no memory held for it
between calls: a call asks for blocks of the same sizes, puts each in its old place, and compares addresses. Blocks
come back only where nothing else is cut from them. So they are large and fill whole segments, and are asked for on the
stream of the step: torch keeps what was freed apart by stream, and the prompt would take it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

BLOCK_BYTES = 32 << 20
# from 10 MiB on torch asks the device for a segment per block
LEAST_BYTES = 12 << 20
# and sizes that are a multiple of this fill a segment
SEGMENT_BYTES = 2 << 20
ALIGN_BYTES = 512
# a filled cache is moved into blocks only where they take at most one part in FREE_SHARE of the free memory
FREE_SHARE = 2


class Spec(NamedTuple):
    """A tensor to place.

    Args:
        shape (`tuple`): Its shape.
        dtype (`torch.dtype`): Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes it takes, alignment included."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def free_bytes(device: torch.device) -> int:
    """Memory that can be had: free on the device, or kept by torch without use."""
    if device.type != "cuda":
        return 1 << 40
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Arena:
    """Where the buffers of a cache lie: which layer in which block, and at which addresses last time.

    Args:
        layers (`Sequence`): Layers that were read; their shapes and dtypes are taken.
        capacity (`int`): Slots to provide, whole pages.
        stream (`torch.cuda.Stream`, *optional*): The stream of the step.
        like (`tuple`, *optional*): Keys and values of new tokens, whose shapes and dtypes are taken where no layer was
            read.
    """

    def __init__(
        self, layers: Sequence[Any], capacity: int, stream: Any = None,
        like: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):  # fmt: skip
        self.capacity, self.stream = capacity, stream
        pairs = [like or (layer.keys, layer.values) for layer in layers]
        self.device = pairs[0][0].device
        self.settings = layers[0].index.settings
        self.slot_bytes = slot_bytes(pairs)
        self._layers = [_specs(layer, *pair, capacity) for layer, pair in zip(layers, pairs)]
        self._sizes: list[int] = []
        # block and offset of each layer
        self._places: list[tuple[int, int]] = []
        for specs in self._layers:
            if not self._sizes or self._sizes[-1] >= BLOCK_BYTES:
                self._sizes.append(0)
            self._places.append((len(self._sizes) - 1, self._sizes[-1]))
            self._sizes[-1] += sum(spec.bytes for spec in specs if spec is not None)
        self._sizes = [-(-max(size, LEAST_BYTES) // SEGMENT_BYTES) * SEGMENT_BYTES for size in self._sizes]
        self._addresses = [0] * len(self._sizes)

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self._sizes)

    def move(self, layers: Sequence[Any]) -> None:
        """Move filled layers into new blocks, one block after the other: what they leave is freed at once.

        Args:
            layers (`Sequence`): The layers of the constructor.
        """
        for index, size in enumerate(self._sizes):
            block = self._block(size)
            self._addresses[index] = block.data_ptr()
            self._hand_out(layers, index, block)

    def provide(self, layers: Sequence[Any]) -> None:
        """Give empty layers their buffers, at the addresses of the last time where torch has those blocks to give.

        Args:
            layers (`Sequence`): As many empty layers.
        """
        if self.stream is not None:
            # blocks count as free once the work that read them is done
            torch.cuda.current_stream(self.device).synchronize()
        pool = [self._block(size) for size in self._sizes]
        chosen: list[torch.Tensor | None] = []
        for size, address in zip(self._sizes, self._addresses):
            same = [i for i, block in enumerate(pool) if (block.data_ptr(), block.numel()) == (address, size)]
            chosen.append(pool.pop(same[0]) if same else None)
        for index, size in enumerate(self._sizes):
            block = chosen[index]
            if block is None:
                block = pool.pop(next(i for i, other in enumerate(pool) if other.numel() == size))
            self._addresses[index] = block.data_ptr()
            self._hand_out(layers, index, block)

    def _block(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            if self.stream is None:
                return torch.empty(size, dtype=torch.uint8, device=self.device)
            current = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self.stream):
                block = torch.empty(size, dtype=torch.uint8, device=self.device)
        block.record_stream(current)
        current.wait_stream(self.stream)
        return block

    def _hand_out(self, layers: Sequence[Any], index: int, block: torch.Tensor) -> None:
        for layer, specs, (home, offset) in zip(layers, self._layers, self._places):
            if home != index:
                continue
            tensors: list[torch.Tensor | None] = []
            for spec in specs:
                if spec is None:
                    tensors.append(None)
                    continue
                size = math.prod(spec.shape) * spec.dtype.itemsize
                tensors.append(block[offset : offset + size].view(spec.dtype).view(spec.shape))
                offset += spec.bytes
            layer.move_to(*tensors, settings=self.settings)


def slot_bytes(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Bytes of one slot, all rows and layers together, from the keys and values of each layer."""
    cached = (tensor[:, :, :1] for pair in pairs for tensor in pair)
    return sum(tensor.numel() * tensor.element_size() for tensor in cached)


def in_blocks(layers: Sequence[Any]) -> bool:
    """Whether layers lie in an arena: own buffers of a layer share no storage."""
    pairs = [layer.buffers() for layer in layers]
    return all(p is not None and p[0].untyped_storage()._cdata == p[1].untyped_storage()._cdata for p in pairs)


def _specs(layer: Any, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> list[Spec | None]:
    found: list[Spec | None] = [
        Spec((*tensor.shape[:2], capacity, tensor.shape[3]), tensor.dtype) for tensor in (keys, values)
    ]
    for level in layer.index.levels:
        pages = level.room(capacity)
        for tensor in level.stats or level.blank(keys):
            if tensor is None:
                found.append(None)
            else:
                found.append(Spec((*tensor.shape[:2], pages, *tensor.shape[3:]), tensor.dtype))
    return found
