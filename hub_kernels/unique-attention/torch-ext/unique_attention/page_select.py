"""Page selection (Eq. 4): sink and recent pages, then the best scores, ties to the lower page id.

The search counts scores above three trial thresholds at a time, in the integer order of float32, and stops as soon as a threshold keeps exactly
the pages wanted: no sort, no atomics, the same answer on every run. May import torch, triton and `_common`.
"""

import triton
import triton.language as tl

from ._common import row_end, row_start, stride_of


# the most scores one program holds in registers; longer rows are read again from cache in every pass
MAX_TILE = 16384


@triton.jit
def _load_keys(scores_ptr, pages, last_page, outside):
    """Scores as int32 in the same order; `outside` beyond the candidates."""
    bits = tl.load(scores_ptr + pages, mask=pages < last_page, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(pages < last_page, bits ^ ((bits >> 31) & 0x7FFFFFFF), outside)


@triton.jit
def _count_three(keys, first, second, third):
    """How many keys reach each of three ascending thresholds; at most 32767 keys."""
    pair = tl.sum((keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 16), axis=0)
    return pair & 0xFFFF, pair >> 16, tl.sum((keys >= third).to(tl.int32), axis=0)


@triton.jit
def _threshold(scores_ptr, first_page, last_page, wanted, TILE: tl.constexpr, SINGLE: tl.constexpr):
    """The largest key that at least `wanted` candidates reach, and how many exceed it."""
    lowest: tl.constexpr = -2147483648
    offs = tl.arange(0, TILE)
    keys = _load_keys(scores_ptr, first_page + offs, last_page, lowest)
    top = tl.max(keys, axis=0)
    bottom = tl.min(tl.where(first_page + offs < last_page, keys, 2147483647), axis=0)
    if not SINGLE:
        for begin in range(first_page + TILE, last_page, TILE):
            more = _load_keys(scores_ptr, begin + offs, last_page, lowest)
            top = tl.maximum(top, tl.max(more, axis=0))
            bottom = tl.minimum(bottom, tl.min(tl.where(begin + offs < last_page, more, 2147483647), axis=0))
    low = bottom.to(tl.int64)
    high = top.to(tl.int64) + 1
    reach_low = last_page - first_page
    while (reach_low != wanted) & (high - low > 1):
        width = high - low
        first = low + ((width + 3) >> 2)
        second = low + ((2 * width + 3) >> 2)
        third = low + ((3 * width + 3) >> 2)
        third = tl.minimum(third, high - 1)
        second = tl.minimum(second, third)
        first = tl.minimum(first, second)
        n1, n2, n3 = _count_three(keys, first.to(tl.int32), second.to(tl.int32), third.to(tl.int32))
        if not SINGLE:
            for begin in range(first_page + TILE, last_page, TILE):
                more = _load_keys(scores_ptr, begin + offs, last_page, lowest)
                m1, m2, m3 = _count_three(more, first.to(tl.int32), second.to(tl.int32), third.to(tl.int32))
                n1 += m1
                n2 += m2
                n3 += m3
        high = tl.where(n3 >= wanted, high, tl.where(n2 >= wanted, third, tl.where(n1 >= wanted, second, first)))
        low = tl.where(n3 >= wanted, third, tl.where(n2 >= wanted, second, tl.where(n1 >= wanted, first, low)))
        reach_low = tl.where(n3 >= wanted, n3, tl.where(n2 >= wanted, n2, tl.where(n1 >= wanted, n1, reach_low)))
    key = low.to(tl.int32)
    above = tl.sum((keys > key).to(tl.int32), axis=0)
    if not SINGLE:
        for begin in range(first_page + TILE, last_page, TILE):
            more = _load_keys(scores_ptr, begin + offs, last_page, lowest)
            above += tl.sum((more > key).to(tl.int32), axis=0)
    return key, above


@triton.jit
def select_row(
    scores_ptr, ids_ptr, first_page, last_page, first_pos, last_pos,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    TILE: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Eq. 4 for the pages `first_page .. last_page - 1` of one row; writes positions `first_pos .. last_pos - 1` of the `K` ids."""
    offs_k = tl.arange(0, BLOCK_K)
    in_slice = (offs_k >= first_pos) & (offs_k < last_pos)
    num_pages = last_page - first_page
    if num_pages <= K:
        tl.store(ids_ptr + offs_k, tl.where(offs_k < num_pages, first_page + offs_k, -1), mask=in_slice)
    else:
        forced = tl.where(offs_k < SINK, first_page + offs_k, last_page - K + offs_k)
        tl.store(ids_ptr + offs_k, forced, mask=in_slice & ((offs_k < SINK) | (offs_k >= K - RECENT)))
        wanted: tl.constexpr = K - SINK - RECENT
        begin = first_page + SINK
        end = last_page - RECENT
        key, above = _threshold(scores_ptr, begin, end, wanted, TILE, SINGLE)
        tied = wanted - above
        offs = tl.arange(0, TILE)
        num_above = 0
        num_tied = 0
        for tile in range(begin, tl.minimum(end, begin + TILE) if SINGLE else end, TILE):
            keys = _load_keys(scores_ptr, tile + offs, end, -2147483648)
            is_above = (keys > key).to(tl.int32)
            is_tied = ((keys == key) & (tile + offs < end)).to(tl.int32)
            # both counts in one scan: 16 bits each
            both = is_above + (is_tied << 16)
            before = tl.cumsum(both, axis=0) - both
            above_before = num_above + (before & 0xFFFF)
            tied_before = num_tied + (before >> 16)
            take = (is_above != 0) | ((is_tied != 0) & (tied_before < tied))
            pos = SINK + above_before + tl.minimum(tied_before, tied)
            tl.store(ids_ptr + pos, tile + offs, mask=take & (pos >= first_pos) & (pos < last_pos))
            if not SINGLE:
                count = tl.sum(both, axis=0)
                num_above += count & 0xFFFF
                num_tied += count >> 16


@triton.jit(do_not_specialize=["num_pages"])
def _page_select_fwd_kernel(
    scores_ptr, ids_ptr, len_ptr, start_ptr,
    stride_sb, stride_sh, stride_ib, stride_ih, stride_len, stride_start, num_pages,
    P: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    TILE: tl.constexpr, SINGLE: tl.constexpr, HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Eq. 4. Program `(kv head, row)` writes its `K` page ids."""
    pid_h = tl.program_id(0).to(tl.int64)
    pid_b = tl.program_id(1).to(tl.int64)
    last_page = tl.cdiv(row_end(len_ptr, stride_len, pid_b, num_pages * P, HAS_LENS), P)
    first_page = tl.minimum(row_start(start_ptr, stride_start, pid_b, HAS_STARTS) // P, last_page)
    select_row(
        scores_ptr + pid_b * stride_sb + pid_h * stride_sh, ids_ptr + pid_b * stride_ib + pid_h * stride_ih,
        first_page, last_page, 0, K, K, BLOCK_K, SINK, RECENT, TILE, SINGLE,
    )  # fmt: skip


def tile_for(num_pages: int) -> int:
    """Scores one program holds at a time; few sizes, so that growing contexts do not recompile."""
    tile = 1024
    while tile < min(num_pages, MAX_TILE):
        tile *= 4
    return tile


def select_pages(scores, page_ids, *, page_size, sink_pages, recent_pages, seq_lens, seq_starts):
    """Fills `page_ids [B, HK, K]` from `scores [B, HK, N]`."""
    batch, num_kv_heads, num_pages = scores.shape
    num_kept = page_ids.shape[-1]
    tile = tile_for(num_pages)
    _page_select_fwd_kernel[(num_kv_heads, batch)](
        scores, page_ids, seq_lens, seq_starts,
        *scores.stride()[:2], *page_ids.stride()[:2], stride_of(seq_lens), stride_of(seq_starts), num_pages,
        P=page_size, K=num_kept, BLOCK_K=triton.next_power_of_2(num_kept), SINK=sink_pages, RECENT=recent_pages,
        TILE=tile, SINGLE=num_pages <= tile, HAS_LENS=seq_lens is not None, HAS_STARTS=seq_starts is not None,
        num_warps=max(4, min(16, tile // 1024)),
    )  # fmt: skip
    return page_ids
