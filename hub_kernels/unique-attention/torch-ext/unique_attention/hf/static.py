"""The cache layer of fixed capacity with page statistics. May import Transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from ..settings import UniqueConfig
from .pages import PageIndex, tag, wait_for_readers


class UniqueStaticLayer(StaticLayer):
    """A cache layer of fixed capacity with page statistics; all lengths stay on the device, as `torch.compile` needs.

    Args:
        max_cache_len (`int`): Slots.
        settings (`UniqueConfig`, *optional*): Wake the layer at once.
    """

    def __init__(self, max_cache_len: int, settings: UniqueConfig | None = None, **kwargs: Any):
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.index = PageIndex()
        # for the report only: exact in eager runs, not advanced in compiled code, set right again by each prefill
        self.host_length = 0
        if settings is not None:
            self.index.wake(settings)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens and return the whole buffers, as tagged views.

        Args:
            key_states (`torch.Tensor`): `[B, HK, T, D]`.
            value_states (`torch.Tensor`): `[B, HK, T, DV]`.
        Returns:
            `tuple`: Keys `[B, HK, S, D]` and values `[B, HK, S, DV]` with `S = max_cache_len`.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not torch.compiler.is_compiling():
            if key_states.shape[2] > 1 and self.index.settings is not None:
                self.host_length = int(self.cumulative_length)
            else:
                self.host_length += key_states.shape[2]
        return tag(keys, self), tag(values, self)

    def reset(self) -> None:
        """Zero the cache; the statistics keep their storage, whose address compiled steps know."""
        super().reset()
        self.index.restart()
        self.host_length = 0

    def prefetch(self) -> None:
        """Move keys and values back to the device."""
        wait_for_readers(self)
        super().prefetch()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self.index.select_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))
