"""The growing cache layer with page statistics, and the explicit `UniqueCache`. May import Transformers.

This layer and that of `static.py` replace the stock full-attention ones of `DynamicCache(config=...)` and
`StaticCache(config=...)`. They are dormant, that is exactly their parents, until the unique attention function wakes
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from .. import ops
from ..settings import UniqueConfig
from .pages import PageIndex, spare_capacity, tag, wait_for_readers, writable
from .settings import settings_of


class UniqueDynamicLayer(DynamicLayer):
    """A growing cache layer with page statistics.

    Awake, keys and values live in buffers of whole pages with spare room (at most 1/32 of the length, or 256 tokens),
    and `keys` / `values` are views of the slots in use. Under grad the parent's concatenation is used.

    Args:
        settings (`UniqueConfig`, *optional*): Wake the layer at once; by default it sleeps until unique attention
            reads it.
    """

    def __init__(self, settings: UniqueConfig | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.index = PageIndex()
        self.fixed_lens: torch.Tensor | None = None
        self.counters: torch.Tensor | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._between: Callable[[], int | None] | None = None
        # called once with the first keys and values, when there is no token yet: who knows how long the call will get
        # may bring buffers by `move_to`
        self.provider: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        # pairs of keys and values, or `None`: memory with spare room, and what was last shown as keys and values
        self._buffers: Any = None
        self._views: Any = None
        if settings is not None:
            self.index.wake(settings)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all cached ones, as tagged views.

        Args:
            key_states (`torch.Tensor`): `[B, HK, T, D]`.
            value_states (`torch.Tensor`): `[B, HK, T, DV]`.
        Returns:
            `tuple`: Keys `[B, HK, S, D]` and values `[B, HK, S, DV]`; in fixed mode S is the capacity.
        Raises:
            ValueError: The new tokens do not fit the cached ones in batch, heads, head dim or dtype.
        """
        if self.fixed_lens is not None:
            return self._update_fixed(key_states, value_states)
        if self.index.settings is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            if self.is_initialized and torch.is_autocast_enabled(key_states.device.type):
                # keys come out of fp32 rotations, values of 16-bit products: the parent promotes, and so stays in fp32
                key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
            self._check(key_states, value_states)
            if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
                # in-place writes would break the graph of earlier steps
                super().update(key_states, value_states, *args, **kwargs)
                self._drop_buffers()
            else:
                self._append(key_states, value_states)
            keys, values = self.keys, self.values
        return tag(keys, self), tag(values, self)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.get_seq_length() == 0:
            return
        for name, new, old in (("keys", key_states, self.keys), ("values", value_states, self.values)):
            shape, expected = list(new.shape), [*old.shape[:2], new.shape[2], old.shape[3]]
            if shape != expected or new.dtype != old.dtype:
                raise ValueError(
                    f"expected new {name} of shape {expected} and {old.dtype} to follow the cached ones, got {shape} "
                    f"and {new.dtype}: this cache belongs to another model or batch; start a new one "
                    "(past_key_values=None)"
                )

    def _owns_buffers(self) -> bool:
        # whoever assigns `keys` directly (parent methods, models, users) thereby ends the use of the buffer
        return self._buffers is not None and self._unchanged() and writable(self._buffers[0])

    def _unchanged(self) -> bool:
        return self._views is None or (self._views[0] is self.keys and self._views[1] is self.values)

    def _notice(self) -> None:
        """Where somebody assigned the tensors, what the pages hold is not known any more."""
        if not self._unchanged():
            self.index.forget()
            self._drop_buffers()

    def _suits(self, *new: torch.Tensor) -> bool:
        # buffers that were brought for an empty layer may be meant for another batch
        return all(
            (x.shape[:2], x.shape[3], x.dtype, x.device) == (old.shape[:2], old.shape[3], old.dtype, old.device)
            for x, old in zip(new, self._buffers)
        )

    def _drop_buffers(self) -> None:
        self._buffers, self._views = None, (self.keys, self.values)

    def _show(self, length: int) -> None:
        keys, values = self._buffers
        self.keys, self.values = self._views = (keys[:, :, :length], values[:, :, :length])

    def _reserve(self, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int) -> None:
        """Move the cached tokens to buffers of `capacity` slots (shapes, dtype and device from the new tokens)."""
        length = self.get_seq_length()
        buffers = []
        for new, old in ((key_states, self.keys), (value_states, self.values)):
            buffer = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
            if length:
                buffer[:, :, :length].copy_(old)
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])
        self._show(length)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[2]
        provider, self.provider = self.provider, None
        if provider is not None and length == 0:
            provider(key_states, value_states)
        self._notice()
        if not self._owns_buffers() or self._buffers[0].shape[2] < end or not self._suits(key_states, value_states):
            self._reserve(key_states, value_states, spare_capacity(end, self.index.settings.page_size))
        self._buffers[0][:, :, length:end].copy_(key_states)
        self._buffers[1][:, :, length:end].copy_(value_states)
        self._show(end)

    # --- the captured step: lengths live on the device and belong to the runner ---

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values with their spare slots, `[B, HK, capacity, D]`, where the layer owns such buffers now."""
        return self._buffers if self.fixed_lens is not None or self._owns_buffers() else None

    def move_to(
        self, keys: torch.Tensor, values: torch.Tensor, *stats: torch.Tensor | None, settings: UniqueConfig
    ) -> None:
        """Go on in buffers that the caller brings; what is cached is copied there.

        Args:
            keys (`torch.Tensor`): `[B, HK, capacity, D]`, whole pages.
            values (`torch.Tensor`): `[B, HK, capacity, DV]`.
            *stats (`torch.Tensor`): The fields of `PageStats` for `capacity / P` pages; then, where the settings have
                super-pages, theirs.
            settings (`UniqueConfig`): Settings of the model, under which an empty layer wakes.
        """
        length = self.get_seq_length()
        if length:
            keys[:, :, :length].copy_(self.keys)
            values[:, :, :length].copy_(self.values)
        else:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._buffers = (keys, values)
        self._show(length)
        self.index.wake(settings)
        fields = len(ops.PageStats._fields)
        self.index.move_to(*(ops.PageStats(*stats[i : i + fields]) for i in range(0, len(stats), fields)))

    @property
    def num_counters(self) -> int:
        """Size of the counters that `enter_fixed` takes."""
        return self.keys.shape[0] * self.keys.shape[1] * ops.ROW_COUNTERS

    def enter_fixed(
        self, seq_lens: torch.Tensor, capacity: int, counters: torch.Tensor | None = None,
        between: Callable[[], int | None] | None = None,
    ) -> None:  # fmt: skip
        """Freeze shapes and addresses for a captured decode step.

        From here `update` writes to slots `seq_lens - T .. seq_lens - 1`, returns the whole buffers, and no length is
        read on the host. A prefill or decode call must have run on this layer before.

        Args:
            seq_lens (`torch.Tensor`): `[B]`, device; slots in use, the tokens of the coming step included. Owned and
                advanced by the caller, shared by all layers.
            capacity (`int`): Slots to provide.
            counters (`torch.Tensor`, *optional*): `num_counters` int32 zeros, scratch of `unique_decode`; with them
                the new token is not written by `update` but handed to the decode op, which writes it on the way.
            between (`Callable`, *optional*): Gives the number of cached tokens where no step runs, else `None`.
        Raises:
            ValueError: The layer is asleep, empty, or longer than `capacity`.
        """
        index, length = self.index, self.get_seq_length()
        if index.settings is None or index.stats is None or not 0 < length <= capacity:
            raise ValueError(
                f"expected a layer that unique attention has read, with 1 to {capacity} tokens; got {length} tokens, "
                f"{'awake' if index.settings else 'asleep'}: run the prefill first, or raise `capacity`"
            )
        self._notice()
        page_size = index.settings.page_size
        capacity = math.ceil(capacity / page_size) * page_size
        index.refresh(self.keys, None, index.seq_starts)
        if not self._owns_buffers() or self._buffers[0].shape[2] < capacity:
            self._reserve(self.keys, self.values, capacity)
        index.reserve(self._buffers[0].shape[2])
        self.fixed_lens, self.counters, self._between = seq_lens, counters, between

    def leave_fixed(self, length: int) -> None:
        """Return to the growing form.

        Args:
            length (`int`): Tokens in the cache now, as counted by the runner.
        """
        self.fixed_lens = self.counters = self._pending = self._between = None
        self._show(length)
        for level in self.index.levels:
            level.covered = length

    def _update_fixed(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._buffers
        if self.counters is not None:
            self._pending = (key_states, value_states)
            return tag(keys, self), tag(values, self)
        index, settings, slots = self.index, self.index.settings, keys.shape[2]
        kept: dict[str, Any] = {"score": settings.score, "stats_dtype": settings.stats_dtype}
        kept.update(seq_starts=index.seq_starts)
        new, lens = (key_states, value_states), self.fixed_lens
        ops.append_tokens(keys, values, index.first(slots), *new, lens, page_size=settings.page_size, **kept)
        if index.upper is not None:
            kept.update(seq_lens=lens, num_new=key_states.shape[2], out=index.upper.first(slots))
            ops.page_stats(keys, page_size=settings.super_page_size, **kept)
        return tag(keys, self), tag(values, self)

    def take_pending(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The token of the last update in fixed mode, once, where the decode op is to write it."""
        pending, self._pending = self._pending, None
        return pending

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the mask must cover; in fixed mode the capacity."""
        if self.fixed_lens is not None:
            return self._buffers[0].shape[2], 0
        return super().get_mask_sizes(query_length)

    def get_seq_length(self) -> Any:
        """Cached tokens; within a step in fixed mode a 0-dim device tensor, without the one token of that step."""
        if self.fixed_lens is not None:
            length = None if self._between is None else self._between()
            return self.fixed_lens.max() - 1 if length is None else length
        return super().get_seq_length()

    # --- what generate does to a cache: the parent's result, statistics and buffers carried along ---

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens at the end; the sign rule is the parent's and depends on the version of Transformers."""
        self._notice()
        owned = self._owns_buffers()
        super().crop(tokens_to_remove)
        if owned:
            self._show(self.keys.shape[2])
        elif not self._unchanged():
            self._drop_buffers()
        self.index.shorten(self.get_seq_length())

    def reset(self) -> None:
        """Forget all tokens. A dormant layer does what its parent does."""
        super().reset()
        self.index.clear()
        if self.index.settings is not None:
            self.keys = self.values = self._buffers = self._views = None
            self.is_initialized = False

    def offload(self) -> None:
        """Move keys and values to the CPU; the statistics are small and stay where they are used."""
        self._moved(super().offload)

    def prefetch(self) -> None:
        """Move keys and values back to the device."""
        wait_for_readers(self)
        self._moved(super().prefetch)

    def _moved(self, move: Callable[[], None]) -> None:
        self._notice()
        move()
        if not self._unchanged():
            self._drop_buffers()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        if self.index.settings is None:
            super().reorder_cache(beam_idx)
        else:
            self._select_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.index.settings is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._select_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows."""
        if self.index.settings is None:
            super().batch_select_indices(indices)
        else:
            self._select_rows(lambda rows: rows[indices.to(rows.device) if torch.is_tensor(indices) else indices])

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        length = self.get_seq_length()
        if length == 0:
            return
        self._notice()
        if self._owns_buffers():
            self._buffers = (select(self._buffers[0]), select(self._buffers[1]))
            self._show(length)
        else:
            self.keys, self.values = select(self.keys), select(self.values)
            self._drop_buffers()
        self.index.select_rows(select)


class UniqueCache(DynamicCache):
    """The cache of unique attention made by hand, for `past_key_values=`; `generate` makes the same one by itself.

    Args:
        config (`PreTrainedConfig`): The model's configuration, with the settings in
            `config.get_text_config().unique_attention`.
        offloading (`bool`, *optional*, defaults to `False`): Keep keys and values on the CPU between uses.
    Raises:
        TypeError: `config` is not a model configuration.
    """

    def __init__(self, config: PreTrainedConfig, offloading: bool = False):
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"expected the model's configuration, got {type(config).__name__}: "
                "write UniqueCache(config=model.config)"
            )
        super().__init__(config=config, offloading=offloading)
        settings = settings_of(config)
        for layer in self.layers:
            if hasattr(layer, "index"):
                layer.index.wake(settings)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the parent's; a layer index beyond the configuration is a clear error."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"expected a layer index below {len(self.layers)}, got {layer_idx}: this cache was made for another "
                "model; write UniqueCache(config=model.config) with the configuration of the model that runs"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
