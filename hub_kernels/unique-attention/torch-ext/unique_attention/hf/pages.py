"""What a cache layer knows beside keys and values: settings, page statistics, padding. Imports torch and `..ops`.

Views that a layer hands out name it, so that attention finds what it knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from ..settings import UniqueConfig

# spare room of a growing buffer: one part in GROWTH of its length, at least MIN_SPARE tokens. 1/32 keeps the memory
# over the bare cache at 3 %, and copies 32 tokens per appended one: little beside the `budget` tokens each step reads
GROWTH = 32
MIN_SPARE = 256
# storage holds a multiple of so many pages: kernels are compiled for the alignment of its strides
ALIGN_PAGES = 16


def spare_capacity(length: int, page_size: int) -> int:
    """Slots to reserve for `length` tokens: whole pages with room to grow, 1/32 of the length or 256 tokens.

    Args:
        length (`int`): Tokens that must fit.
        page_size (`int`): Tokens per page.
    Returns:
        `int`: A multiple of `page_size`.
    """
    return math.ceil((length + max(MIN_SPARE, length // GROWTH)) / page_size) * page_size


def writable(tensor: torch.Tensor) -> bool:
    """Whether in-place writes are allowed here: tensors born in inference mode are read-only outside it."""
    if torch.compiler.is_compiling():
        # not traceable, and compiled steps stay in the mode they were traced in
        return True
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


def tag(tensor: torch.Tensor, layer: Any) -> torch.Tensor:
    """A fresh view of a cached tensor that names its layer (tagging the stored tensor itself would make a cycle)."""
    view = tensor.view_as(tensor)
    view._unique_layer = layer
    return view


def layer_of(key: torch.Tensor, value: torch.Tensor) -> Any:
    """The cache layer that handed out both tensors, or `None` where a model changed one of them after the update."""
    layer = getattr(key, "_unique_layer", None)
    return layer if layer is not None and getattr(value, "_unique_layer", None) is layer else None


def map_rows(tensor: torch.Tensor, select: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a selection along dim 0; fp8 codes travel as bytes, since torch has no fp8 `index_select`."""
    if tensor.element_size() == 1 and tensor.is_floating_point():
        return select(tensor.view(torch.uint8)).view(tensor.dtype)
    return select(tensor)


def wait_for_readers(layer: Any) -> None:
    """Let the stream that brings an offloaded layer back wait for what is under way on the default stream.

    Transformers up to 5.17 does not: memory is then filled anew while it is read, and copies are read half done.
    """
    if layer.is_initialized and layer.device.type == "cuda":
        torch.cuda.current_stream(layer.device).wait_stream(torch.cuda.default_stream(layer.device))


class PageIndex:
    """Page statistics of one cache layer, kept up to date lazily from the cached keys.

    `settings` is `None` while the layer is dormant. `covered` tokens have current statistics; whatever shortens or
    replaces the keys lowers it, and the next `refresh` recomputes the pages beyond it. Where the settings have
    super-pages, `upper` is the index of these, and goes through whatever this one does.
    """

    def __init__(self):
        self.settings: UniqueConfig | None = None
        self.stats: ops.PageStats | None = None
        self.upper: PageIndex | None = None
        self.built_with: tuple[int, str, str] | None = None
        self.covered = 0
        self.seq_starts: torch.Tensor | None = None
        self.starts_host: list[int] | None = None

    def wake(self, settings: UniqueConfig) -> None:
        """Adopt the settings of the model that reads the layer.

        Args:
            settings (`UniqueConfig`): Settings of the calling model.
        Raises:
            ValueError: The cache already has statistics for another page size.
        """
        if settings is self.settings:
            return
        key = (settings.page_size, settings.score, settings.stats_dtype)
        if self.built_with is not None and key != self.built_with:
            if key[0] != self.built_with[0] and self.covered:
                raise ValueError(
                    f"expected page_size={self.built_with[0]}, with which this cache was filled, got "
                    f"page_size={key[0]}: start a new cache (past_key_values=None), or configure the model back"
                )
            # another score or storage needs other numbers per page; they are recomputed from the cached keys
            self.forget()
        self.settings, upper = settings, settings.upper
        if upper is None:
            self.upper = None
        else:
            if self.upper is None or self.upper.settings.page_size != upper.page_size:
                # no state hangs on super-pages: others are built from the cached keys
                self.upper = PageIndex()
            self.upper.wake(upper)

    @property
    def levels(self) -> tuple[PageIndex, ...]:
        """This index and, where there are super-pages, theirs."""
        return (self,) if self.upper is None else (self, self.upper)

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Bytes of the statistics of one page, all kv heads together; then those of a super-page."""
        return tuple(
            sum(t[0, :, 0].numel() * t.element_size() for t in level.stats if t is not None) for level in self.levels
        )

    def forget(self) -> None:
        """Drop the statistics; the next `refresh` builds them from scratch."""
        for level in self.levels:
            level.stats, level.built_with, level.covered = None, None, 0

    def clear(self) -> None:
        """Forget everything about the tokens seen (the settings stay)."""
        self.forget()
        self.seq_starts = self.starts_host = None

    def restart(self) -> None:
        """No tokens any more; the statistics keep their storage."""
        self.shorten(0)
        self.seq_starts = self.starts_host = None

    def shorten(self, length: int) -> None:
        """The keys were cropped to `length` tokens; the next append rewrites the page that lost some of its tokens."""
        for level in self.levels:
            level.covered = min(level.covered, length)

    def pages(self, slots: int) -> int:
        """Pages that hold `slots` slots."""
        return math.ceil(slots / self.settings.page_size)

    def room(self, slots: int) -> int:
        """Pages to provide for `slots` slots: a multiple of 16."""
        return math.ceil(self.pages(slots) / ALIGN_PAGES) * ALIGN_PAGES

    def blank(self, keys: torch.Tensor) -> ops.PageStats:
        """The statistics of one page of such keys as tensors without memory: shapes and dtypes of their storage."""
        named = {"score": self.settings.score, "stats_dtype": self.settings.stats_dtype}
        return ops.empty_stats((*keys.shape[:2], 1), keys.shape[3], **named, device="meta")

    def reserve(self, slots: int) -> None:
        """Make room for the statistics of `slots` slots, keeping those that exist."""
        if self.upper is not None:
            self.upper.reserve(slots)
        old, num_pages = self.stats, self.room(slots)
        if old is None or (old.spread.shape[2] >= num_pages and writable(old.spread)):
            return
        kept = min(old.spread.shape[2], num_pages)

        def grow(tensor: torch.Tensor) -> torch.Tensor:
            grown = tensor.new_zeros((*tensor.shape[:2], num_pages, *tensor.shape[3:]))
            grown[:, :, :kept] = tensor[:, :, :kept]
            return grown

        self.stats = ops.PageStats(*(None if tensor is None else grow(tensor) for tensor in old))

    def move_to(self, stats: ops.PageStats, *upper: ops.PageStats) -> None:
        """Go on in storage that the caller brings, one per level, with the pages that are covered."""
        if self.upper is not None:
            self.upper.move_to(*upper)
        if self.stats is None:
            self.covered = 0
        else:
            pages = self.pages(self.covered)
            for new, old in zip(stats, self.stats):
                if new is not None:
                    new[:, :, :pages].copy_(old[:, :, :pages])
        self.stats = stats
        self.built_with = (self.settings.page_size, self.settings.score, self.settings.stats_dtype)

    def first(self, slots: int) -> ops.PageStats:
        """Views of the statistics of the pages that hold the first `slots` slots."""
        pages = self.pages(slots)
        return ops.PageStats(*(None if tensor is None else tensor[:, :, :pages] for tensor in self.stats))

    def refresh(
        self, keys: torch.Tensor, token_mask: torch.Tensor | None, seq_starts: torch.Tensor | None
    ) -> ops.PageStats:
        """Bring the statistics up to date with `keys` and return those of its pages.

        Args:
            keys (`torch.Tensor`): `[B, HK, S, D]`, all cached keys, every slot in use.
            token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, `False` for padding.
            seq_starts (`torch.Tensor`, *optional*): `[B]`, first valid slot of each row.
        Returns:
            `PageStats`: Statistics of the `ceil(S / P)` pages; views, valid until the next refresh.
        """
        settings, length = self.settings, keys.shape[2]
        if self.stats is not None and self.stats.spread.shape[:2] != keys.shape[:2]:
            self.forget()
        fresh = self.covered if self.stats is not None else 0
        if fresh < length:
            kwargs = {"page_size": settings.page_size, "score": settings.score, "stats_dtype": settings.stats_dtype}
            kwargs.update(seq_starts=seq_starts, token_mask=token_mask)
            if self.stats is None:
                self.stats = ops.page_stats(keys, **kwargs)
                self.reserve(length)
            else:
                if self.stats.spread.shape[2] < self.pages(length) or not writable(self.stats.spread):
                    self.reserve(spare_capacity(length, settings.page_size))
                # storage that came empty is filled by the same kernel as one that is made here
                ops.page_stats(keys, **kwargs, num_new=length - fresh if fresh else None, out=self.first(length))
            self.built_with = (settings.page_size, settings.score, settings.stats_dtype)
            self.covered = length
        if self.upper is not None:
            self.upper.refresh(keys, token_mask, seq_starts)
        return self.first(length)

    def select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Carry the statistics and the padding along when the rows of the cache are reordered, repeated or dropped."""
        for level in self.levels:
            if level.stats is not None:
                level.stats = ops.PageStats(*(None if t is None else map_rows(t, select) for t in level.stats))
        if self.seq_starts is not None:
            self.seq_starts = select(self.seq_starts)
        if self.starts_host is not None and self.seq_starts is not None:
            if len(set(self.starts_host)) == 1:
                # equal starts: only the number of rows matters, and asking for it needs no device sync
                self.starts_host = self.starts_host[:1] * self.seq_starts.shape[0]
            else:
                self.starts_host = self.seq_starts.tolist()

    def refresh_static(
        self,
        keys: torch.Tensor,
        num_new: int,
        host_length: int,
        seq_lens: torch.Tensor,
        token_mask: torch.Tensor | None,
        seq_starts: torch.Tensor | None,
    ) -> ops.PageStats:
        """As `refresh` for keys with unused slots: lengths stay on the device, and only `num_new` is a Python number.

        Args:
            keys (`torch.Tensor`): `[B, HK, S, D]`, the whole static buffer.
            num_new (`int`): Tokens appended by the last update.
            host_length (`int`): Tokens seen by eager updates; its distance to `covered` tells what other attention
                functions appended in between.
            seq_lens (`torch.Tensor`): `[B]`, slots in use.
            token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, `False` for padding.
            seq_starts (`torch.Tensor`, *optional*): `[B]`, first valid slot of each row.
        Returns:
            `PageStats`: Statistics of all pages of the buffer.
        """
        settings, appended = self.settings, num_new
        kwargs = {"page_size": settings.page_size, "score": settings.score, "stats_dtype": settings.stats_dtype}
        kwargs.update(seq_lens=seq_lens, seq_starts=seq_starts, token_mask=token_mask)
        if self.stats is None or self.stats.spread.shape[:2] != keys.shape[:2] or not writable(self.stats.spread):
            self.stats = ops.page_stats(keys, **kwargs)
            self.built_with = (settings.page_size, settings.score, settings.stats_dtype)
            if not torch.compiler.is_compiling():
                # as the parent does for its buffers: without it, compiled steps cannot become CUDA graphs
                for tensor in self.stats:
                    if tensor is not None:
                        torch._dynamo.mark_static_address(tensor)
        else:
            if not torch.compiler.is_compiling():
                num_new = max(num_new, host_length - self.covered)
            ops.page_stats(keys, **kwargs, num_new=num_new, out=self.stats)
        if not torch.compiler.is_compiling():
            self.covered = host_length
        if self.upper is not None:
            self.upper.refresh_static(keys, appended, host_length, seq_lens, token_mask, seq_starts)
        return self.stats
