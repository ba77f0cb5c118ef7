"""Page selection (Eq. 4): sink and recent pages, then the best scores, ties to the lower page id.

Exact without reading every score: the K' best pages lie in the K' groups of neighbouring pages with the highest
peaks (a group beyond those has K' better pages before it). So a row searches its peaks, gathers the scores of the
few groups that are left, and searches those; a row of few pages is searched at once. A search counts the keys above
three trial thresholds at a time and stops as soon as a threshold keeps the number wanted: no sort, no atomics, the
same answer on every run.

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
    row_end,
    row_start,
    signal_row,
    stride_of,
)

LOWEST = tl.constexpr(-2147483648)
# pages that are searched one by one; counts of them share 32 bits
MAX_CANDIDATES = 16384
# rows of at most this many pages are searched without groups
MAX_SINGLE = 1024
SELECT_WARPS = 4


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
def _between(low, high):
    """The integer halfway, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def load_keys(values_ptr, index, mask):
    """Ordered keys, the lowest outside the mask; NaN ranks as -inf, and the two zeros are one."""
    x = tl.load(values_ptr + index, mask=mask, other=0.0)
    return tl.where(mask, ordered(tl.where(x == x, x, float("-inf")) + 0.0), LOWEST)


@triton.jit
def _count_three(keys, first, second, third, TILE: tl.constexpr):
    """How many keys reach each of three ascending thresholds; at most 32767 keys."""
    a = (keys >= first).to(tl.int32)
    b = (keys >= second).to(tl.int32)
    c = (keys >= third).to(tl.int32)
    if TILE <= 512:
        # the three counts in one sum, 10 bits each
        total = tl.sum(a + (b << 10) + (c << 20), axis=0)
        return total & 1023, (total >> 10) & 1023, total >> 20
    else:
        pair = tl.sum(a + (b << 16), axis=0)
        return pair & 0xFFFF, pair >> 16, tl.sum(c, axis=0)


@triton.jit
def _thresholds(low, high, linear):
    """Three ascending keys inside `low .. high`: quarters of the values if `linear`, else of the keys."""
    second = _between(low, high)
    first = _between(low, second)
    third = _between(second, high)
    bottom = _unordered(low)
    step = 0.25 * (_unordered(high - 1) - bottom)
    # infinities and their differences have no quarters
    if linear & (step >= 0.0) & (step < float("inf")):
        first = ordered(bottom + step + 0.0)
        second = ordered(bottom + 2.0 * step + 0.0)
        third = ordered(bottom + 3.0 * step + 0.0)
    third = tl.minimum(tl.maximum(third, low + 1), high - 1)
    second = tl.minimum(tl.maximum(second, low + 1), third)
    first = tl.minimum(tl.maximum(first, low + 1), second)
    return first, second, third


@triton.jit
def _search(keys, values_ptr, begin, end, wanted, enough, TILE: tl.constexpr, SINGLE: tl.constexpr):
    """Where to cut so that `wanted` to `enough` keys are taken, or, if ties forbid it, the key that must be shared.

    Returns a key and how many keys exceed it: those are taken, and of the keys equal to it as many as are still
    wanted. `keys` are the first `TILE` of `begin .. end - 1`; fewer than `wanted` are all taken.
    """
    offs = tl.arange(0, TILE)
    top = tl.max(keys, axis=0)
    low = tl.min(tl.where(keys > LOWEST, keys, 0x7FFFFFFF), axis=0)
    reach_low = tl.sum((keys > LOWEST).to(tl.int32), axis=0)
    if not SINGLE:
        for tile in range(begin + TILE, end, TILE):
            more = load_keys(values_ptr, tile + offs, tile + offs < end)
            top = tl.maximum(top, tl.max(more, axis=0))
            low = tl.minimum(low, tl.min(tl.where(more > LOWEST, more, 0x7FFFFFFF), axis=0))
            reach_low += tl.sum((more > LOWEST).to(tl.int32), axis=0)
    high = top + 1
    reach_high = tl.full((), 0, tl.int32)
    trial = tl.full((), 0, tl.int32)
    while (reach_low > enough) & (low < high - 1):
        # most values are told apart soonest by their quarters, those bunched beside an outlier by the order of the
        # keys
        first, second, third = _thresholds(low, high, (trial & 1) == 0)
        trial += 1
        n1, n2, n3 = _count_three(keys, first, second, third, TILE)
        if not SINGLE:
            for tile in range(begin + TILE, end, TILE):
                more = load_keys(values_ptr, tile + offs, tile + offs < end)
                m1, m2, m3 = _count_three(more, first, second, third, TILE)
                n1 += m1
                n2 += m2
                n3 += m3
        if n3 >= wanted:
            low = third
            reach_low = n3
        elif n2 >= wanted:
            low = second
            reach_low = n2
            high = third
            reach_high = n3
        elif n1 >= wanted:
            low = first
            reach_low = n1
            high = second
            reach_high = n2
        else:
            high = first
            reach_high = n1
    tie = reach_low > enough
    return tl.where(tie, low, low - 1), tl.where(tie, reach_high, reach_low)


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
def store_best(keys, pages, ids_ptr, wanted, TILE: tl.constexpr):
    """The `wanted` best of some pages, which come in ascending order."""
    key, above = _search(keys, ids_ptr, 0, 0, wanted, wanted, TILE, True)
    take, pos, _, _ = _positions(keys, key, wanted - above, 0, 0)
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
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr,
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
        store_best(keys, pages, ids_ptr + SINK, wanted, TILE)
    else:
        # the groups that can hold a page to keep
        first_group = begin // GS
        last_group = tl.cdiv(end, GS)
        offs = tl.arange(0, TILE)
        peaks = load_keys(peaks_ptr, first_group + offs, first_group + offs < last_group)
        key, above = _search(peaks, peaks_ptr, first_group, last_group, wanted, GROUPS, TILE, SINGLE)
        num_above = 0
        num_tied = 0
        for tile in range(first_group, tl.minimum(last_group, first_group + TILE) if SINGLE else last_group, TILE):
            peaks = load_keys(peaks_ptr, tile + offs, tile + offs < last_group)
            take, pos, num_above, num_tied = _positions(peaks, key, GROUPS - above, num_above, num_tied)
            tl.store(groups_ptr + pos, tile + offs, mask=take)
        num_groups = num_above + tl.minimum(num_tied, GROUPS - above)
        tl.debug_barrier()
        # the pages of those groups, in ascending order
        offs_c = tl.arange(0, GROUPS * GS)
        group = tl.load(groups_ptr + offs_c // GS, mask=offs_c // GS < num_groups, other=0)
        pages = group * GS + offs_c % GS
        inside = (offs_c // GS < num_groups) & (pages >= begin) & (pages < end)
        keys = load_keys(scores_ptr, pages, inside)
        store_best(keys, pages, ids_ptr + SINK, wanted, GROUPS * GS)


@triton.jit
def list_all(ids_ptr, first_page, count, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The ids of a row that keeps all its pages; `-1` for a row that attends to more than `K`."""
    offs_k = tl.arange(0, BLOCK_K)
    listed = (offs_k < count) & (count <= K)
    tl.store(ids_ptr + offs_k, tl.where(listed, first_page + offs_k, -1), mask=offs_k < K)


@triton.jit
def store_peaks(peaks_ptr, scores, pages, begin, end, num_pages, GS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The best score of every `GS` neighbouring pages among the candidates `begin .. end - 1`."""
    candidates = tl.where((pages >= begin) & (pages < end), scores, float("-inf"))
    best = tl.max(tl.reshape(candidates, (BLOCK_N // GS, GS)), axis=1)
    groups = tl.min(tl.reshape(pages, (BLOCK_N // GS, GS)), axis=1) // GS
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
    pages = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = tl.load(
        scores_ptr + pid_b * stride_sb + pid_h * stride_sh + pages, mask=pages < num_pages, other=float("-inf")
    )
    row_peaks = peaks_ptr + pid_b * stride_pb + pid_h * stride_ph
    store_peaks(row_peaks, scores, pages, first_page + SINK, last_page - RECENT, num_pages, GS, BLOCK_N)


@triton.jit(do_not_specialize=[
    "capacity", "dense_pages", "programs", "stride_sb", "stride_sh", "stride_pb", "stride_ph"
])  # fmt: skip
def _page_select_fwd_kernel(
    scores_ptr, peaks_ptr, ids_ptr, groups_ptr, counter_ptr, len_ptr, start_ptr,
    stride_sb, stride_sh, stride_pb, stride_ph, stride_ib, stride_ih, stride_len, stride_start,
    capacity, dense_pages, programs,
    P: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
    SINGLE: tl.constexpr, HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
    AWAIT: tl.constexpr, SIGNAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 4. Program `(kv head, row)` writes its `K` page ids.

    A row of at most `dense_pages` pages of `P / RATIO` tokens is dense: all its pages, or `-1` if those are more than
    `K`. `AWAIT`: `programs` programs score a row first; `SIGNAL`: others wait for the ids.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid_h = tl.program_id(0).to(tl.int64)
    pid_b = tl.program_id(1).to(tl.int64)
    row = pid_b * tl.num_programs(0) + pid_h
    end = row_end(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
    last_page = tl.cdiv(end, P)
    first_page = tl.minimum(start // P, last_page)
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
            first_page, last_page, K, BLOCK_K, SINK, RECENT, GS, GROUPS, TILE, SINGLE,
        )  # fmt: skip
    if SIGNAL:
        signal_row(counter_ptr + row * COUNTERS + (LISTED if RATIO > 1 else CHOSEN))


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
    tile = 512 if num_peaks <= 512 else 2048
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
    scores, peaks, groups, page_ids, plan, *, page_size, sink_pages, recent_pages, seq_lens, seq_starts,
    capacity=None, ratio=1, dense_pages=0, programs=None, counters=None, pdl=False,
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
        AWAIT=programs is not None, SIGNAL=counters is not None, PDL=pdl, num_warps=SELECT_WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def selection_scratch(rows: int, num_pages: int, plan: SelectPlan, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the peaks and the groups of a selection among `num_pages` pages of each row."""
    peaks = torch.empty((rows, plan.peaks(num_pages)), dtype=torch.float32, device=device)
    return peaks, torch.empty((rows, plan.groups), dtype=torch.int32, device=device)


def select_pages(scores, page_ids, *, page_size, sink_pages, recent_pages, seq_lens, seq_starts):
    """Fills `page_ids [B, HK, K]` from `scores [B, HK, N]`."""
    batch, num_kv_heads, num_pages = scores.shape
    plan = plan_selection(num_pages, page_ids.shape[-1] - sink_pages - recent_pages)
    peaks, groups = selection_scratch(batch * num_kv_heads, num_pages, plan, scores.device)
    peaks = peaks.view(batch, num_kv_heads, -1)
    lengths = {"page_size": page_size, "sink_pages": sink_pages, "recent_pages": recent_pages,
               "seq_lens": seq_lens, "seq_starts": seq_starts}  # fmt: skip
    if plan.group_size > 1:
        write_peaks(scores, peaks, plan, **lengths)
    launch_select(scores, peaks, groups, page_ids, plan, **lengths)
    return page_ids
