"""Page selection (Eq. 4): sink and recent pages, then the best scores, ties to the lower page id.

Exact without reading every score: the K' best pages lie in the K' groups of neighbouring pages with the highest
peaks (a group beyond those has K' better pages before it). So a row searches its peaks, gathers the scores of the
few groups that are left, and searches those; a row of few pages is searched at once. A search counts the keys above
several trial thresholds at a time and stops as soon as one keeps the number wanted: no sort, no atomics, the same
answer on every run.

May import torch, triton and `_common`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    CHOSEN,
    COUNTERS,
    LISTED,
    SCORED,
    await_row,
    end_in_order,
    row_end,
    row_extent,
    row_start,
    signal_row,
    stride_of,
    target_of,
)

LOWEST = tl.constexpr(-2147483648)
HIGHEST = tl.constexpr(2147483647)
# pages that are searched one by one; counts of them share 32 bits
MAX_CANDIDATES = 16384
# rows of at most this many pages are searched without groups
MAX_SINGLE = 1024
# comparisons of a thread in one pass of a search
COMPARED = 16


@triton.jit
def ordered(x):
    """float32 as int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    """The float32 of an ordered key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(values_ptr, index, mask):
    """Ordered keys, the lowest outside the mask; NaN ranks as -inf, and the two zeros are one."""
    x = tl.load(values_ptr + index, mask=mask, other=0.0)
    return tl.where(mask, ordered(tl.where(x == x, x, float("-inf")) + 0.0), LOWEST)


@triton.jit
def _extremes(top, low, count, other_top, other_low, other_count):
    """Combines what `_search` begins with."""
    return tl.maximum(top, other_top), tl.minimum(low, other_low), count + other_count


@triton.jit
def _bounds(keys):
    """Greatest and least key, and how many there are; the lowest is none."""
    found = keys > LOWEST
    return tl.reduce((keys, tl.where(found, keys, HIGHEST), found.to(tl.int32)), 0, _extremes)


@triton.jit
def _thresholds(low, high, linear, THRESHOLDS: tl.constexpr):
    """Keys in equal steps between `low` and `high`: steps of the values if `linear`, else of the keys."""
    part = tl.arange(0, THRESHOLDS) + 1
    key = low + tl.maximum(high // (THRESHOLDS + 1) - low // (THRESHOLDS + 1), 1) * part
    bottom = _unordered(low)
    step = (_unordered(high - 1) - bottom) * (1.0 / (THRESHOLDS + 1))
    # infinities and their differences have no parts
    key = tl.where(linear & (step >= 0.0) & (step < float("inf")), ordered(bottom + step * part + 0.0), key)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def _count(keys, thresholds):
    """How many keys reach each threshold."""
    return tl.sum((keys[:, None] >= thresholds[None, :]).to(tl.int32), axis=0)


@triton.jit
def _search(
    keys, values_ptr, begin, end, wanted, enough,
    TILE: tl.constexpr, SINGLE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Where to cut so that `wanted` to `enough` keys are taken, or, if ties forbid it, the key that must be shared.

    Returns a key, how many keys exceed it, which are taken, and how many of those equal to it are. `keys` are the
    first `TILE` of `begin .. end - 1`; fewer than `wanted` are all taken. A pass compares about `AT_ONCE` keys with
    thresholds.
    """
    THRESHOLDS: tl.constexpr = max(4, min(32, AT_ONCE // TILE))
    offs = tl.arange(0, TILE)
    top, low, reach_low = _bounds(keys)
    if not SINGLE:
        for tile in range(begin + TILE, end, TILE):
            more = _bounds(load_keys(values_ptr, tile + offs, tile + offs < end))
            top, low, reach_low = _extremes(top, low, reach_low, more[0], more[1], more[2])
    high = top + 1
    reach_high = tl.full((), 0, tl.int32)
    trial = tl.full((), 0, tl.int32)
    while (reach_low > enough) & (low < high - 1):
        # most values are told apart soonest by equal steps, those bunched beside an outlier by the order of the keys
        thresholds = _thresholds(low, high, (trial & 1) == 0, THRESHOLDS)
        trial += 1
        reach = _count(keys, thresholds)
        if not SINGLE:
            for tile in range(begin + TILE, end, TILE):
                reach += _count(load_keys(values_ptr, tile + offs, tile + offs < end), thresholds)
        # thresholds may be rounded out of order, which does no harm: each is judged by its own count
        met = reach >= wanted
        low = tl.max(tl.where(met, thresholds, low), axis=0)
        high = tl.min(tl.where(met, high, thresholds), axis=0)
        reach_low = tl.min(tl.where(met, reach, reach_low), axis=0)
        reach_high = tl.max(tl.where(met, reach_high, reach), axis=0)
    tie = reach_low > enough
    return tl.where(tie, low, low - 1), tl.where(tie, reach_high, reach_low), tl.where(tie, enough - reach_high, 0)


@triton.jit
def _positions(keys, key, tied, num_above, num_tied):
    """Which keys are taken (all above `key`, the first `tied` equal to it) and at which position, in order."""
    is_above = (keys > key).to(tl.int32)
    is_tied = (keys == key).to(tl.int32)
    # both counts in one scan, 16 bits each
    both = is_above + (is_tied << 16)
    before = tl.cumsum(both, axis=0) - both
    tied_before = num_tied + (before >> 16)
    take = (is_above != 0) | ((is_tied != 0) & (tied_before < tied))
    pos = num_above + (before & 0xFFFF) + tl.minimum(tied_before, tied)
    count = tl.sum(both, axis=0)
    return take, pos, num_above + (count & 0xFFFF), num_tied + (count >> 16)


@triton.jit
def store_best(keys, pages, ids_ptr, wanted, TILE: tl.constexpr, AT_ONCE: tl.constexpr):
    """The `wanted` best of some pages, which come in ascending order."""
    key, _, tied = _search(keys, ids_ptr, 0, 0, wanted, wanted, TILE, True, AT_ONCE)
    take, pos, _, _ = _positions(keys, key, tied, 0, 0)
    tl.store(ids_ptr + pos, pages, mask=take)


@triton.jit
def store_forced(
    ids_ptr, first_page, last_page, K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr
):
    """The first `SINK` and the last `RECENT` of `K` page ids."""
    offs_k = tl.arange(0, BLOCK_K)
    forced = tl.where(offs_k < SINK, first_page + offs_k, last_page - K + offs_k)
    is_forced = (offs_k < SINK) | ((offs_k >= K - RECENT) & (offs_k < K))
    tl.store(ids_ptr + offs_k, forced, mask=is_forced)


@triton.jit
def select_row(
    scores_ptr, peaks_ptr, ids_ptr, groups_ptr, first_page, last_page,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Eq. 4 for a row of more than `K` pages: writes their ids.

    The row has pages `first_page .. last_page - 1`; `peaks` holds the best score of every `GS` pages, forced pages
    left out; `groups` is scratch of `GROUPS` ids. A row of at most `TILE` pages needs neither (`GS` 1).
    """
    wanted: tl.constexpr = K - SINK - RECENT
    begin = first_page + SINK
    end = last_page - RECENT
    store_forced(ids_ptr, first_page, last_page, K, BLOCK_K, SINK, RECENT)
    if GS == 1:
        pages = begin + tl.arange(0, TILE)
        keys = load_keys(scores_ptr, pages, pages < end)
        store_best(keys, pages, ids_ptr + SINK, wanted, TILE, AT_ONCE)
    else:
        # the groups that can hold a page to keep
        first_group = begin // GS
        last_group = tl.cdiv(end, GS)
        offs = tl.arange(0, TILE)
        peaks = load_keys(peaks_ptr, first_group + offs, first_group + offs < last_group)
        key, above, tied = _search(peaks, peaks_ptr, first_group, last_group, wanted, GROUPS, TILE, SINGLE, AT_ONCE)
        num_above = 0
        num_tied = 0
        for tile in range(first_group, tl.minimum(last_group, first_group + TILE) if SINGLE else last_group, TILE):
            peaks = load_keys(peaks_ptr, tile + offs, tile + offs < last_group)
            take, pos, num_above, num_tied = _positions(peaks, key, tied, num_above, num_tied)
            tl.store(groups_ptr + pos, tile + offs, mask=take)
        num_groups = above + tied
        tl.debug_barrier()
        # the pages of those groups, in ascending order
        offs_c = tl.arange(0, GROUPS * GS)
        group = tl.load(groups_ptr + offs_c // GS, mask=offs_c // GS < num_groups, other=0)
        pages = group * GS + offs_c % GS
        inside = (offs_c // GS < num_groups) & (pages >= begin) & (pages < end)
        keys = load_keys(scores_ptr, pages, inside)
        # as many groups as pages to keep were cut no higher than the pages will be: fewer values to tell apart
        keys = tl.where((keys >= key) | (num_groups < wanted), keys, LOWEST)
        store_best(keys, pages, ids_ptr + SINK, wanted, GROUPS * GS, AT_ONCE)


@triton.jit
def list_all(ids_ptr, first_page, count, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The ids of a row that keeps all its pages; `-1` for a row that attends to more than `K`."""
    offs_k = tl.arange(0, BLOCK_K)
    listed = (offs_k < count) & (count <= K)
    tl.store(ids_ptr + offs_k, tl.where(listed, first_page + offs_k, -1), mask=offs_k < K)


@triton.jit
def store_peaks(peaks_ptr, scores, first, begin, end, num_pages, GS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The best score of every `GS` pages from `first` (a multiple of `GS`) on, candidates `begin .. end - 1` only."""
    pages = first + tl.arange(0, BLOCK_N)
    candidates = tl.where((pages >= begin) & (pages < end), scores, float("-inf"))
    best = tl.max(tl.reshape(candidates, (BLOCK_N // GS, GS)), axis=1)
    groups = first // GS + tl.arange(0, BLOCK_N // GS)
    tl.store(peaks_ptr + groups, best, mask=groups * GS < num_pages)


@triton.jit(do_not_specialize=["num_pages"])
def _page_peaks_fwd_kernel(
    scores_ptr, peaks_ptr, len_ptr, start_ptr,
    stride_sb, stride_sh, stride_pb, stride_ph, stride_len, stride_start, num_pages,
    P: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, GS: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Program `(block of pages, kv head, row)` writes the peaks of its pages."""
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    last_page = tl.cdiv(row_end(len_ptr, stride_len, pid_b, num_pages * P, HAS_LENS), P)
    first_page = row_start(start_ptr, stride_start, pid_b, HAS_STARTS) // P
    first = tl.program_id(0) * BLOCK_N
    pages = first + tl.arange(0, BLOCK_N)
    scores = tl.load(
        scores_ptr + pid_b * stride_sb + pid_h * stride_sh + pages, mask=pages < num_pages, other=float("-inf")
    )
    row_peaks = peaks_ptr + pid_b * stride_pb + pid_h * stride_ph
    store_peaks(row_peaks, scores, first, first_page + SINK, last_page - RECENT, num_pages, GS, BLOCK_N)


@triton.jit(do_not_specialize=["capacity", "dense_pages", "programs"])
def _page_select_fwd_kernel(
    scores_ptr, peaks_ptr, ids_ptr, groups_ptr, counter_ptr, len_ptr, start_ptr,
    stride_sb, stride_sh, stride_pb, stride_ph, stride_ib, stride_ih, stride_len, stride_start,
    capacity, dense_pages, programs,
    P: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
    SINGLE: tl.constexpr, AT_ONCE: tl.constexpr, HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
    AWAIT: tl.constexpr, SIGNAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 4. Program `(kv head, row)` writes its `K` page ids.

    A row of at most `dense_pages` pages of `P / RATIO` tokens is dense: all its pages, or `-1` if those are more than
    `K`. `AWAIT`: `programs` programs score a row first; `SIGNAL`: others wait for the ids.
    """
    if PDL:
        if not AWAIT:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid_h = tl.program_id(0).to(tl.int64)
    pid_b = tl.program_id(1).to(tl.int64)
    row = pid_b * tl.num_programs(0) + pid_h
    _, start, end, first_page, last_page = row_extent(
        len_ptr, start_ptr, stride_len, stride_start, pid_b, capacity, P, HAS_LENS, HAS_STARTS
    )
    small: tl.constexpr = P // RATIO
    row_ids = ids_ptr + pid_b * stride_ib + pid_h * stride_ih
    if AWAIT:
        await_row(counter_ptr + row * COUNTERS + SCORED, programs)
        # ready for the next call
        tl.store(counter_ptr + row * COUNTERS + SCORED, 0)
    if (tl.cdiv(end, small) - start // small <= dense_pages) | (last_page - first_page <= K):
        list_all(row_ids, first_page, last_page - first_page, K, BLOCK_K)
    else:
        select_row(
            scores_ptr + pid_b * stride_sb + pid_h * stride_sh, peaks_ptr + pid_b * stride_pb + pid_h * stride_ph,
            row_ids, groups_ptr + row * GROUPS,
            first_page, last_page, K, BLOCK_K, SINK, RECENT, GS, GROUPS, TILE, SINGLE, AT_ONCE,
        )  # fmt: skip
    if SIGNAL:
        signal_row(counter_ptr + row * COUNTERS + (LISTED if RATIO > 1 else CHOSEN))
    if PDL and AWAIT:
        end_in_order(row)


class SelectPlan(NamedTuple):
    """Sizes of a selection: pages per group, groups that are searched page by page, peaks held in registers."""

    group_size: int
    groups: int
    tile: int
    single: bool

    def peaks(self, num_pages: int) -> int:
        """Number of peaks of a row."""
        return triton.cdiv(num_pages, self.group_size) if self.group_size > 1 else 1


def plan_selection(num_pages: int, num_scored: int) -> SelectPlan:
    """Sizes for the best `num_scored` of `num_pages` pages; few, so that growing contexts do not recompile."""
    if num_pages <= MAX_SINGLE:
        return SelectPlan(1, 1, max(512, triton.next_power_of_2(num_pages)), True)
    groups = max(16, triton.next_power_of_2(num_scored))
    # as many peaks as pages to search after them
    group_size = 2
    while (
        group_size < 16 and group_size * group_size * groups * 2 < num_pages and groups * group_size < MAX_CANDIDATES
    ):
        group_size *= 2
    if groups * group_size > MAX_CANDIDATES:
        raise NotImplementedError(
            f"the Triton selection keeps at most {MAX_CANDIDATES // 2} scored pages, got {num_scored}; use a larger "
            "`page_size` or a smaller `budget`, or impl='reference'."
        )
    num_peaks = triton.cdiv(num_pages, group_size)
    tile = 256 if num_peaks <= 256 else 512 if num_peaks <= 512 else 1024 if num_peaks <= 1024 else 2048
    return SelectPlan(group_size, groups, tile, num_peaks <= tile)


def write_peaks(scores, peaks, plan, *, page_size, sink_pages, recent_pages, seq_lens, seq_starts):
    """Fills `peaks [B, HK, groups]` from `scores [B, HK, N]`."""
    batch, num_kv_heads, num_pages = scores.shape
    _page_peaks_fwd_kernel[(triton.cdiv(num_pages, 1024), num_kv_heads, batch)](
        scores, peaks, seq_lens, seq_starts,
        *scores.stride()[:2], *peaks.stride()[:2], stride_of(seq_lens), stride_of(seq_starts), num_pages,
        P=page_size, SINK=sink_pages, RECENT=recent_pages, GS=plan.group_size, BLOCK_N=1024,
        HAS_LENS=seq_lens is not None, HAS_STARTS=seq_starts is not None, num_warps=4,
    )  # fmt: skip


def launch_select(
    scores, peaks, groups, page_ids, plan, *, page_size, sink_pages, recent_pages, seq_lens, seq_starts, capacity=None,
    ratio=1, dense_pages=0, programs=None, counters=None, pdl=False,
):  # fmt: skip
    """Fills `page_ids [B, HK, K]` from `scores [B, HK, N]` and their `peaks`; `groups` is scratch.

    With `counters` the launches before and after are in step row by row: `programs` of the one before score a row,
    unless they are done by then (`None`).
    """
    batch, num_kv_heads, num_pages = scores.shape
    num_kept = page_ids.shape[-1]
    _page_select_fwd_kernel[(num_kv_heads, batch)](
        scores, peaks, page_ids, groups, counters, seq_lens, seq_starts,
        *scores.stride()[:2], *peaks.stride()[:2], *page_ids.stride()[:2],
        stride_of(seq_lens), stride_of(seq_starts), capacity or num_pages * page_size, dense_pages, programs or 0,
        P=page_size, RATIO=ratio, K=num_kept, BLOCK_K=triton.next_power_of_2(num_kept),
        SINK=sink_pages, RECENT=recent_pages,
        GS=plan.group_size, GROUPS=plan.groups, TILE=plan.tile, SINGLE=plan.single,
        HAS_LENS=seq_lens is not None, HAS_STARTS=seq_starts is not None,
        AWAIT=programs is not None, SIGNAL=counters is not None, PDL=pdl,
        **search_settings(batch * num_kv_heads, target_of(scores.device)),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def search_settings(rows: int, target) -> dict:
    """Warps and comparisons at once: more where multiprocessors are idle anyway. Measured on an H200."""
    num_warps = 8 if rows <= target.num_sms else 4
    return {"num_warps": num_warps, "AT_ONCE": 32 * num_warps * COMPARED}


def padded(rows: tuple[int, int], columns: int, device) -> torch.Tensor:
    """Scratch `[*rows, columns]` whose rows are aligned, whatever their length, so that they load in wide words."""
    return torch.empty((*rows, -(-columns // 64) * 64), dtype=torch.float32, device=device)[..., :columns]


def select_pages(scores, page_ids, *, page_size, sink_pages, recent_pages, seq_lens, seq_starts):
    """Fills `page_ids [B, HK, K]` from `scores [B, HK, N]`."""
    batch, num_kv_heads, num_pages = scores.shape
    plan = plan_selection(num_pages, page_ids.shape[-1] - sink_pages - recent_pages)
    peaks = padded((batch, num_kv_heads), plan.peaks(num_pages), scores.device)
    lengths = {"page_size": page_size, "sink_pages": sink_pages, "recent_pages": recent_pages,
               "seq_lens": seq_lens, "seq_starts": seq_starts}  # fmt: skip
    if plan.group_size > 1:
        write_peaks(scores, peaks, plan, **lengths)
    groups = torch.empty((batch, num_kv_heads, plan.groups), dtype=torch.int32, device=scores.device)
    launch_select(scores, peaks, groups, page_ids, plan, **lengths)
    return page_ids
