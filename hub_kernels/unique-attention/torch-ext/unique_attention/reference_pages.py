"""Rows, pages and slots of the cache, and its page statistics, in eager torch. Imports torch and settings only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_stats import PageStats, empty_stats, page_vectors, quantize


def row_bounds(
    batch: int, num_slots: int, seq_lens: Tensor | None, seq_starts: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First slot and end of every row, `[B]` int64 each; the whole capacity where nothing is given."""
    end = torch.full((batch,), num_slots, device=device) if seq_lens is None else seq_lens.to(device, torch.int64)
    start = torch.zeros_like(end) if seq_starts is None else seq_starts.to(device, torch.int64)
    return start, end


def page_bounds(start: Tensor, end: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """First page and end page of every row: `seq_starts // P` and `ceil(seq_lens / P)`."""
    return start // page_size, (end + page_size - 1) // page_size


def num_slots(x: Tensor, page_table: Tensor | None, page_size: int) -> int:
    """Logical slots of a row: S, or N * P with a page table."""
    return x.shape[2] if page_table is None else page_table.shape[1] * page_size


def valid_slots(slots: Tensor, start: Tensor, end: Tensor, token_mask: Tensor | None) -> Tensor:
    """Which of the slots `[B, HK or 1, M]` hold a token that takes part; slots outside `token_mask` do not."""
    valid = (slots >= start[:, None, None]) & (slots < end[:, None, None])
    if token_mask is None:
        return valid
    width = token_mask.shape[1]
    row = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    return valid & (slots < width) & token_mask[row, slots.clamp(0, width - 1)]


def _locate(row: Tensor, slots: Tensor, page_table: Tensor | None, page_size: int) -> tuple[Tensor, Tensor]:
    # slots outside the row are read somewhere harmless and masked by the caller
    if page_table is None:
        return row, slots
    physical = page_table[row, (slots // page_size).clamp(0, page_table.shape[1] - 1)]
    return physical.clamp(min=0).to(torch.int64), slots % page_size


def gather_slots(x: Tensor, slots: Tensor, page_table: Tensor | None, page_size: int) -> Tensor:
    """Tokens of a cache at logical slots, reading nothing else.

    Args:
        x (`torch.Tensor`): `[B, HK, S, D]`, or `[num_pages, HK, P, D]` with a page table.
        slots (`torch.Tensor`): `[B, HK or 1, M]` int64; out-of-range slots give arbitrary tokens.
        page_table (`torch.Tensor`, *optional*): `[B, N]`.
        page_size (`int`): P.
    Returns:
        `torch.Tensor`: `[B, HK, M, D]`.
    """
    device = slots.device
    row = torch.arange(slots.shape[0], device=device)[:, None, None]
    head = torch.arange(x.shape[1], device=device)[None, :, None]
    outer, inner = _locate(row, slots.clamp(0, num_slots(x, page_table, page_size) - 1), page_table, page_size)
    if x.is_contiguous():  # one flat index: several times faster on the CPU
        return F.embedding((outer * x.shape[1] + head) * x.shape[2] + inner, x.view(-1, x.shape[-1]))
    return x[outer, head, inner]


def page_stats(
    k: Tensor,
    *,
    page_size: int,
    score: str = "scalar",
    stats_dtype: str = "int4",
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    num_new: int | None = None,
    out: PageStats | None = None,
) -> PageStats:
    """Statistics of the pages of a key cache, from scratch or for the pages that the last tokens touched.

    Equation: over valid t, mean_p = avg_t k_t, var_p = avg_t (k_t - mean_p)^2, std_p = sqrt(sum_d var_p[d]) (Eq. 1).

    Args:
        k (`torch.Tensor`): `[B, HK, S, D]`, or `[num_pages, HK, P, D]` with a page table; any float dtype, after RoPE.
        page_size (`int`): Tokens per page P.
        score (`str`, *optional*, defaults to `"scalar"`): Which vectors are kept: mean (`"mean"`, `"scalar"`); mean
            and std per dim (`"diagonal"`, `"absolute"`, `"moment"`); max and min (`"minmax"`); mean, first principal
            direction times its std, residual std (`"principal"`); none (`"oracle"`).
        stats_dtype (`str`, *optional*, defaults to `"int4"`): Storage, see `quantize`.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use; all slots by default.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot (left padding).
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, tokens that count.
        page_table (`torch.Tensor`, *optional*): `[B, N]` logical to physical pages.
        num_new (`int`, *optional*): Only write the pages that hold the last `num_new` tokens of each row, into `out`.
        out (`PageStats`, *optional*): Statistics to write into, in place.
    Returns:
        `PageStats`: `out`, or new ones; all-zero for pages without valid tokens.
    Raises:
        ValueError: `num_new` without `out`.

    Numerics: fp32 accumulation (fp64 for fp64 keys), two passes; touched pages are recomputed from their keys, so
    appending and recomputing agree bit for bit.
    """
    if num_new is not None and out is None:
        raise ValueError(
            f"`num_new={num_new}` updates existing statistics: expected `out`, got None; pass the PageStats."
        )
    batch = k.shape[0] if page_table is None else page_table.shape[0]
    slots_per_row = num_slots(k, page_table, page_size)
    start, end = row_bounds(batch, slots_per_row, seq_lens, seq_starts, k.device)
    first, stop = page_bounds(start, end, page_size)
    if num_new is None:
        pages = torch.arange(-(-slots_per_row // page_size), device=k.device).expand(batch, -1)
        touched = torch.ones_like(pages, dtype=torch.bool) if page_table is None else pages >= first[:, None]
    else:
        span = torch.arange((num_new + page_size - 2) // page_size + 1, device=k.device)
        pages = ((end - num_new).clamp(min=0) // page_size)[:, None] + span
        touched = pages < stop[:, None]
    if page_table is not None:
        touched = touched & (pages < stop[:, None])
    slots = (pages[..., None] * page_size + torch.arange(page_size, device=k.device)).flatten(1)[:, None]
    x = gather_slots(k, slots, page_table, page_size).unflatten(2, (-1, page_size))
    valid = valid_slots(slots, start, end, token_mask).unflatten(2, (-1, page_size))
    fresh = quantize(*page_vectors(x, valid, score), stats_dtype)
    if out is None and page_table is None:
        return fresh
    if out is None:
        out = empty_stats(tuple(k.shape[:2]), k.shape[-1], score, stats_dtype, k)
    row, column = touched.nonzero(as_tuple=True)
    for target, source in zip(out, fresh):
        if target is None or source is None:  # storage without scales
            continue
        if page_table is None:
            target[row, :, pages[row, column]] = source[row, :, column]
        else:
            target[page_table[row, pages[row, column]].long()] = source[row, :, column]
    return out


def append_tokens(
    k_cache: Tensor,
    v_cache: Tensor,
    stats: PageStats,
    k_new: Tensor,
    v_new: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    score: str,
    stats_dtype: str,
    seq_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    page_table: Tensor | None = None,
) -> None:
    """Write the newest tokens into the cache and refresh the statistics of the pages they touch, in place.

    Equation: slots seq_lens - T .. seq_lens - 1 of row b get the T new tokens; then Eq. 1 on the touched pages.

    Args:
        k_cache (`torch.Tensor`): `[B, HK, S, D]`, or `[num_pages, HK, P, D]` with a page table; written.
        v_cache (`torch.Tensor`): `[B, HK, S, DV]`, or paged like `k_cache`; written.
        stats (`PageStats`): Written.
        k_new (`torch.Tensor`): `[B, HK, T, D]`.
        v_new (`torch.Tensor`): `[B, HK, T, DV]`.
        seq_lens (`torch.Tensor`): `[B]` slots in use, the new tokens included; slots below 0 are not written,
            so a row of length 0 stays untouched.
        page_size (`int`): Tokens per page P.
        score (`str`): Score form of `stats`.
        stats_dtype (`str`): Storage of `stats`.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot (left padding).
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, tokens that count.
        page_table (`torch.Tensor`, *optional*): `[B, N]` logical to physical pages.
    Raises:
        ValueError: a row is longer than the cache.
    """
    num_new, capacity = k_new.shape[2], num_slots(k_cache, page_table, page_size)
    if seq_lens.numel() and int(seq_lens.max()) > capacity:
        raise ValueError(
            f"Expected seq_lens <= {capacity}, the slots of a row, got {int(seq_lens.max())}; grow the cache."
        )
    slots = seq_lens.to(k_cache.device, torch.int64)[:, None] - num_new + torch.arange(num_new, device=k_cache.device)
    row, token = (slots >= 0).nonzero(as_tuple=True)
    outer, inner = _locate(row, slots[row, token], page_table, page_size)
    k_cache[outer, :, inner] = k_new[row, :, token].to(k_cache.dtype)
    v_cache[outer, :, inner] = v_new[row, :, token].to(v_cache.dtype)
    page_stats(
        k_cache,
        page_size=page_size,
        score=score,
        stats_dtype=stats_dtype,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        token_mask=token_mask,
        page_table=page_table,
        num_new=num_new,
        out=stats,
    )
