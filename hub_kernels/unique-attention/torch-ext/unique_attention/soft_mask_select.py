"""Thresholds of the soft mask and the tiles that it leaves open (Eq. 6). May import torch and triton.

Thresholds. The scores of a block of queries against all pages are recomputed on the tensor cores as often as needed,
which is cheaper than storing them (256 flop against 4 bytes per score at D = 128). A pass counts, for every query at
once, the scores at or above 7 values inside its bracket `[low, high)`, with `#(score >= low) > K'` and `#(score >=
high) <= K'`; the bracket shrinks until exactly K' scores lie at or above `high`. A last pass finds the smallest score
above and the largest below. Exact for any values; equal scores on both sides of the cut give that score.

Tiles. A tile is BLOCK_T queries by BLOCK_S keys. It is open when any of its queries has a forced page there, or a
page with `g >= skip_below`. Kernels with larger tiles join those of the map; every block of queries gets the ascending
list of its open tiles (forward and dq walk it), every block of keys its transpose (dk and dv).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .soft_mask_fwd import RUNTIME


class Thresholds(NamedTuple):
    """`theta [B, HK, T]` fp32, -inf if all is open; pages `above`, `below` of the K'-th and next best score."""

    theta: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor


@triton.jit
def candidate_scores(
    fq, fp_ptr, fs_ptr, nq, pages, low_page, high_page, N,
    NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores `[rows, n]` of the pages `[n]` for all rows, and which of them a row may choose."""
    offs_f = tl.arange(0, NUM_FEATURES)
    here = pages < N
    fp = tl.load(fp_ptr + pages[:, None] * NUM_FEATURES + offs_f[None, :], mask=here[:, None], other=0.0)
    score = tl.dot(fq, tl.trans(fp), input_precision=PRECISION)
    if HAS_SCALAR:
        score = tl.fma(nq[:, None], tl.load(fs_ptr + pages, mask=here, other=0.0)[None, :], score)
    free = (pages[None, :] >= low_page[:, None]) & (pages[None, :] < high_page[:, None])
    return score, free


@triton.jit(do_not_specialize=[*RUNTIME, "num_free"])
def _soft_mask_fwd_threshold_kernel(
    fq_ptr, nq_ptr, fp_ptr, fs_ptr, start_ptr, theta_ptr, above_ptr, below_ptr,
    stride_start_b, stride_start_t,
    T, N, HK, num_free, sink_pages, recent_pages,
    PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr, WITH_IDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (b * HK, block of queries from the last) writes theta (Eq. 6) and the two pages that set it."""
    pid_bh = tl.program_id(0).to(tl.int64)
    pid_t = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    offs_t = (pid_t * BLOCK_T).to(tl.int32) + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    starts = start_ptr + (pid_bh // HK) * stride_start_b
    start = tl.load(starts + offs_t.to(tl.int64) * stride_start_t, mask=mask_t, other=0).to(tl.int32)
    low_page = start // PAGE_SIZE + sink_pages
    high_page = offs_t // PAGE_SIZE - recent_pages + 1
    choose = mask_t & (high_page - low_page > num_free)  # queries that see more than K pages
    first = tl.min(tl.where(choose, low_page, N)) // BLOCK_N * BLOCK_N
    last = tl.max(tl.where(choose, high_page, 0))
    fp_ptr += pid_bh * N * NUM_FEATURES
    fs_ptr += pid_bh * N
    row = pid_bh * T + offs_t
    offs_f = tl.arange(0, NUM_FEATURES)
    offs_n = tl.arange(0, BLOCK_N)
    fq = tl.load(fq_ptr + row[:, None] * NUM_FEATURES + offs_f[None, :], mask=mask_t[:, None], other=0.0)
    nq = tl.zeros([BLOCK_T], tl.float32)
    if HAS_SCALAR:
        nq = tl.load(nq_ptr + row, mask=mask_t, other=0.0)

    # bracket: all candidates are >= low, none is >= high
    smallest = tl.full([BLOCK_T, BLOCK_N], float("inf"), tl.float32)
    largest = tl.full([BLOCK_T, BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for n in range(first, last, BLOCK_N):
        score, free = candidate_scores(
            fq, fp_ptr, fs_ptr, nq, n + offs_n, low_page, high_page, N, NUM_FEATURES, HAS_SCALAR, PRECISION
        )
        smallest = tl.minimum(smallest, tl.where(free, score, float("inf")))
        largest = tl.maximum(largest, tl.where(free, score, float("-inf")))
        total += tl.where(free, score, 0.0)
        square += tl.where(free, score * score, 0.0)
    low = tl.where(choose, tl.min(smallest, axis=1), 0.0)
    top = tl.where(choose, tl.max(largest, axis=1), 0.0)
    high = top + tl.maximum(tl.abs(top), 1e-30) * 1e-6
    count_low = (high_page - low_page).to(tl.float32)
    count_high = tl.zeros([BLOCK_T], tl.float32)
    # a first guess as if the scores were Gaussian, in fractions of the bracket
    mean = tl.sum(total, axis=1) / tl.maximum(count_low, 1.0)
    spread = tl.sqrt(tl.maximum(tl.sum(square, axis=1) / tl.maximum(count_low, 1.0) - mean * mean, 0.0))
    width = tl.maximum(high - low, 1e-30)
    aim = (mean + spread * _gaussian_quantile((num_free + 0.5) / tl.maximum(count_low, 1.0)) - low) / width
    step = 0.05 * spread / width
    tries = 0
    going = tl.max(choose.to(tl.int32))
    while going > 0:
        low, high, count_low, count_high = _shrink(
            low, high, count_low, count_high, aim, step, tries % 3 == 2, num_free,
            fq, fp_ptr, fs_ptr, nq, low_page, high_page, first, last, N,
            NUM_FEATURES, HAS_SCALAR, PRECISION, BLOCK_T, BLOCK_N,
        )  # fmt: skip
        # then where evenly spread scores would be cut, as closely around it as their count lets one trust it
        inside = tl.maximum(count_low - count_high, 1.0)
        aim = (count_low - num_free - 0.5) / inside
        step = tl.minimum(0.45 * tl.sqrt(tl.maximum(aim * (1.0 - aim), 1.0 / inside) / inside), 0.04)
        tries += 1
        # equal scores around the cut end when fp32 has no more numbers between the ends
        wide = high - low > 2e-7 * tl.maximum(tl.abs(high), tl.abs(low))
        going = tl.max((choose & wide & (count_high != num_free)).to(tl.int32)) * (tries < 40).to(tl.int32)

    smallest = tl.full([BLOCK_T, BLOCK_N], float("inf"), tl.float32)
    largest = tl.full([BLOCK_T, BLOCK_N], float("-inf"), tl.float32)
    page_above = tl.zeros([BLOCK_T, BLOCK_N], tl.int32)
    page_below = tl.zeros([BLOCK_T, BLOCK_N], tl.int32)
    for n in range(first, last, BLOCK_N):
        score, free = candidate_scores(
            fq, fp_ptr, fs_ptr, nq, n + offs_n, low_page, high_page, N, NUM_FEATURES, HAS_SCALAR, PRECISION
        )
        over = free & (score >= high[:, None]) & (score < smallest)
        under = free & (score < high[:, None]) & (score > largest)
        smallest = tl.where(over, score, smallest)
        largest = tl.where(under, score, largest)
        if WITH_IDS:
            page_above = tl.where(over, (n + offs_n)[None, :], page_above)
            page_below = tl.where(under, (n + offs_n)[None, :], page_below)
    below = tl.max(largest, axis=1)
    above = tl.min(smallest, axis=1)
    tied = count_high != num_free
    theta = tl.where(choose, tl.where(tied, below, 0.5 * (above + below)), float("-inf"))
    tl.store(theta_ptr + row, theta, mask=mask_t)
    if WITH_IDS:
        id_below = tl.min(tl.where(largest == below[:, None], page_below, N), axis=1)
        id_above = tl.min(tl.where(smallest == above[:, None], page_above, N), axis=1)
        id_above = tl.where(tied, id_below, id_above)
        tl.store(above_ptr + row, tl.where(choose, id_above, 0), mask=mask_t)
        tl.store(below_ptr + row, tl.where(choose, id_below, 0), mask=mask_t)


@triton.jit
def _shrink(
    low, high, count_low, count_high, aim, step, even, num_free, fq,
    fp_ptr, fs_ptr,
    nq, low_page, high_page, first, last, N,
    NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One pass over the scores: brackets and their counts cut at 7 values each."""
    # seven ascending values inside the bracket: around the aim, or evenly spaced to be sure that it shrinks
    width = high - low
    c1 = low + width * tl.where(even, 0.125, _inside(aim - 8.0 * step, aim))
    c2 = low + width * tl.where(even, 0.25, _inside(aim - 3.0 * step, aim))
    c3 = low + width * tl.where(even, 0.375, _inside(aim - step, aim))
    c4 = low + width * tl.where(even, 0.5, _inside(aim, aim))
    c5 = low + width * tl.where(even, 0.625, _inside(aim + step, aim))
    c6 = low + width * tl.where(even, 0.75, _inside(aim + 3.0 * step, aim))
    c7 = low + width * tl.where(even, 0.875, _inside(aim + 8.0 * step, aim))
    # counted is what lies below a cut: adding the sign of a difference takes two instructions, a comparison three
    zero = tl.zeros([BLOCK_T, BLOCK_N], tl.int32)
    n1, n2, n3, n4, n5, n6, n7 = zero, zero, zero, zero, zero, zero, zero
    offs_n = tl.arange(0, BLOCK_N)
    for n in range(first, last, BLOCK_N):
        score, free = candidate_scores(
            fq, fp_ptr, fs_ptr, nq, n + offs_n, low_page, high_page, N, NUM_FEATURES, HAS_SCALAR, PRECISION
        )
        score = tl.where(free, score, float("-inf"))
        n1 += _is_below(score, c1)
        n2 += _is_below(score, c2)
        n3 += _is_below(score, c3)
        n4 += _is_below(score, c4)
        n5 += _is_below(score, c5)
        n6 += _is_below(score, c6)
        n7 += _is_below(score, c7)
    visited = (last - first + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    n1 = visited - tl.sum(n1, axis=1)
    n2 = visited - tl.sum(n2, axis=1)
    n3 = visited - tl.sum(n3, axis=1)
    n4 = visited - tl.sum(n4, axis=1)
    n5 = visited - tl.sum(n5, axis=1)
    n6 = visited - tl.sum(n6, axis=1)
    n7 = visited - tl.sum(n7, axis=1)
    new_low, new_high, new_count_low, new_count_high = low, high, count_low, count_high
    # the highest cut with more than K' scores above it is the new low, the lowest with at most K' the new high
    new_low, new_count_low = _raise(new_low, new_count_low, c1, n1, num_free)
    new_low, new_count_low = _raise(new_low, new_count_low, c2, n2, num_free)
    new_low, new_count_low = _raise(new_low, new_count_low, c3, n3, num_free)
    new_low, new_count_low = _raise(new_low, new_count_low, c4, n4, num_free)
    new_low, new_count_low = _raise(new_low, new_count_low, c5, n5, num_free)
    new_low, new_count_low = _raise(new_low, new_count_low, c6, n6, num_free)
    new_low, new_count_low = _raise(new_low, new_count_low, c7, n7, num_free)
    new_high, new_count_high = _lower(new_high, new_count_high, c7, n7, num_free)
    new_high, new_count_high = _lower(new_high, new_count_high, c6, n6, num_free)
    new_high, new_count_high = _lower(new_high, new_count_high, c5, n5, num_free)
    new_high, new_count_high = _lower(new_high, new_count_high, c4, n4, num_free)
    new_high, new_count_high = _lower(new_high, new_count_high, c3, n3, num_free)
    new_high, new_count_high = _lower(new_high, new_count_high, c2, n2, num_free)
    new_high, new_count_high = _lower(new_high, new_count_high, c1, n1, num_free)
    return new_low, new_high, new_count_low, new_count_high


@triton.jit
def _is_below(score, cut):
    """1 where a score is below the cut of its row: the sign of their difference, which is exact."""
    return ((score - cut[:, None]).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _inside(fraction, aim):
    """A fraction of the bracket that cuts off something at both ends."""
    aim = tl.minimum(tl.maximum(aim, 0.001), 0.999)
    return tl.minimum(tl.maximum(fraction, 0.1 * aim), 1.0 - 0.1 * (1.0 - aim))


@triton.jit
def _gaussian_quantile(share):
    """How many standard deviations above the mean the largest `share` of a Gaussian begins; good to 0.003."""
    tail = tl.minimum(tl.maximum(tl.minimum(share, 1.0 - share), 1e-6), 0.5)
    t = tl.sqrt(-1.3862944 * tl.log2(tail))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + 0.04481 * t))
    return tl.where(share < 0.5, z, -z)


@triton.jit
def _raise(low, count_low, cut, count, num_free):
    more = count > num_free
    return tl.where(more, cut, low), tl.where(more, count.to(tl.float32), count_low)


@triton.jit
def _lower(high, count_high, cut, count, num_free):
    fewer = count <= num_free
    return tl.where(fewer, cut, high), tl.where(fewer, count.to(tl.float32), count_high)


@triton.jit(do_not_specialize=RUNTIME)
def _soft_mask_fwd_tiles_kernel(
    fq_ptr, nq_ptr, fp_ptr, fs_ptr, start_ptr, theta_ptr, below_ptr, open_ptr,
    stride_start_b, stride_start_t,
    T, N, NQB, NKB, HK, sink_pages, recent_pages, inv_temperature, cut,
    PAGE_SIZE: tl.constexpr, NUM_FEATURES: tl.constexpr, HAS_SCALAR: tl.constexpr, WITH_IDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (PARTS blocks of queries from the last, b * HK) writes their rows of the map of open tiles."""
    pid_t = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    first_t = (pid_t * BLOCK_T * PARTS).to(tl.int32)
    offs_t = first_t + tl.arange(0, BLOCK_T * PARTS)
    mask_t = offs_t < T
    starts = start_ptr + (pid_bh // HK) * stride_start_b
    start = tl.load(starts + offs_t.to(tl.int64) * stride_start_t, mask=mask_t, other=0).to(tl.int32) // PAGE_SIZE
    own = offs_t // PAGE_SIZE
    low_page = start + sink_pages
    high_page = own - recent_pages + 1
    fp_ptr += pid_bh * N * NUM_FEATURES
    fs_ptr += pid_bh * N
    row = pid_bh * T + offs_t
    offs_f = tl.arange(0, NUM_FEATURES)
    fq = tl.load(fq_ptr + row[:, None] * NUM_FEATURES + offs_f[None, :], mask=mask_t[:, None], other=0.0)
    theta = tl.load(theta_ptr + row, mask=mask_t, other=float("-inf"))
    nq = tl.zeros([BLOCK_T * PARTS], tl.float32)
    if HAS_SCALAR:
        nq = tl.load(nq_ptr + row, mask=mask_t, other=0.0)
    if WITH_IDS:
        below = tl.load(below_ptr + row, mask=mask_t, other=-1)
    # log g >= log(skip_below) is score >= theta + temperature * logit(skip_below): no division by a tiny temperature
    floor = theta * inv_temperature + cut

    TILES: tl.constexpr = BLOCK_C * CHUNK // BLOCK_S
    first_of_part = first_t + tl.arange(0, PARTS) * BLOCK_T
    last_of_part = tl.minimum(first_of_part + BLOCK_T, T) - 1
    block = pid_t * PARTS + tl.arange(0, PARTS)
    open_rows = open_ptr + (pid_bh * NQB + block)[:, None] * NKB
    own_first = first_t // BLOCK_S  # tiles on the diagonal are always listed
    last_t = tl.minimum(first_t + BLOCK_T * PARTS, T) - 1
    first = tl.minimum(tl.min(tl.where(mask_t, start, N)) * PAGE_SIZE // BLOCK_S, own_first) // TILES * TILES
    for tile in range(first, last_t // BLOCK_S + 1, TILES):
        pages = (tile * BLOCK_S + tl.arange(0, BLOCK_C) * CHUNK) // PAGE_SIZE
        score, free = candidate_scores(
            fq, fp_ptr, fs_ptr, nq, pages, low_page, high_page, N, NUM_FEATURES, HAS_SCALAR, PRECISION
        )
        seen = (pages[None, :] >= start[:, None]) & (pages[None, :] <= own[:, None]) & mask_t[:, None]
        is_open = seen & (~free | (theta[:, None] == float("-inf")) | (score * inv_temperature >= floor[:, None]))
        if WITH_IDS:
            is_open = is_open | (seen & (pages[None, :] == below[:, None]))
        is_open = tl.reshape(is_open.to(tl.int32), (PARTS, BLOCK_T, TILES, BLOCK_C // TILES))
        any_open = tl.max(tl.max(is_open, axis=3), axis=1)  # [PARTS, TILES]
        offs_k = (tile + tl.arange(0, TILES))[None, :]
        any_open = tl.where(offs_k >= (first_of_part // BLOCK_S)[:, None], 1, any_open)
        any_open = tl.where(offs_k * BLOCK_S <= last_of_part[:, None], any_open, 0)
        tl.store(open_rows + offs_k, any_open.to(tl.uint8), mask=(offs_k < NKB) & (block < NQB)[:, None])


@triton.jit(do_not_specialize=["num_lists", "length", "rows", "columns", "stride_list", "stride_item"])
def _soft_mask_fwd_list_kernel(
    open_ptr, list_ptr, count_ptr, num_lists, length, rows, columns, stride_list, stride_item,
    JOIN_LISTS: tl.constexpr, JOIN_ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of queries or keys, b * HK) writes the ascending list of the blocks that are open with it."""
    pid = tl.program_id(0).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    open_ptr += pid_bh * rows * columns + pid * JOIN_LISTS * stride_list
    list_ptr += (pid_bh * num_lists + pid) * length
    # the last block may join fewer rows of the map than the others, and reads its last one again
    last = rows - pid * JOIN_LISTS - 1
    count = 0
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        is_open = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(JOIN_LISTS):
            for j in tl.static_range(JOIN_ITEMS):
                item = offs * JOIN_ITEMS + j
                at = open_ptr + tl.minimum(i, last) * stride_list + item.to(tl.int64) * stride_item
                is_open |= tl.load(at, mask=item < columns, other=0).to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(is_open, axis=0) - 1, offs, mask=is_open > 0)
        count += tl.sum(is_open, axis=0)
    tl.store(count_ptr + pid_bh * num_lists + pid, count)


def open_lists(
    is_open: torch.Tensor, length: int, of_map: dict, tile: dict, by_keys: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block of queries has to visit, or with `by_keys` what a block of keys has to.

    Args:
        is_open (`torch.Tensor`): `[B * HK, *, *]` uint8 map of the open tiles.
        length (`int`): Tokens T.
        of_map (`dict`): BLOCK_T and BLOCK_S of the tiles of the map.
        tile (`dict`): BLOCK_T and BLOCK_S of the tiles to list, multiples of those of the map.
        by_keys (`bool`): Lists of blocks of queries, one per block of keys, instead of the other way round.
    Returns:
        `tuple`: `[B * HK, NQB, NKB]` ascending lists and `[B * HK, NQB]` how many entries count; with `by_keys`
        `[B * HK, NKB, NQB]` and `[B * HK, NKB]`.
    """
    rows, strides = is_open.shape[0], (is_open.shape[2], 1)
    names = ("BLOCK_S", "BLOCK_T") if by_keys else ("BLOCK_T", "BLOCK_S")
    sizes = is_open.shape[:0:-1] if by_keys else is_open.shape[1:]
    num_lists, num_items = (triton.cdiv(length, tile[name]) for name in names)
    join_lists, join_items = (tile[name] // of_map[name] for name in names)
    lists = torch.empty(rows, num_lists, num_items, dtype=torch.int32, device=is_open.device)
    counts = torch.empty(rows, num_lists, dtype=torch.int32, device=is_open.device)
    _soft_mask_fwd_list_kernel[(num_lists, rows)](
        is_open, lists, counts, num_lists, num_items, *sizes, *(reversed(strides) if by_keys else strides),
        JOIN_LISTS=join_lists, JOIN_ITEMS=join_items, BLOCK=256, num_warps=1,
    )  # fmt: skip
    return lists, counts


def select_tiles(
    fq, nq, fp, fs, layout, meta: dict, select: dict, threshold_grad: bool
) -> tuple[Thresholds, torch.Tensor]:
    """Thresholds of all queries and the tiles that the soft mask leaves open.

    Equation: theta = (S_(K') + S_(K'+1)) / 2 over the free pages of a query, -inf where it has at most K' (Eq. 6).

    Args:
        fq (`torch.Tensor`): `[B, HK, T, F]`; nq, fp, fs (`torch.Tensor`): The other features.
        layout (`Layout`): First valid slots and validity of the rows.
        meta (`dict`): Compile-time and run-time settings shared by the kernels.
        select (`dict`): `num_free` K', `cut` (logit of the smallest gate that counts), launches of both kernels.
        threshold_grad (`bool`): Also return the pages that set theta, and keep their tiles open.
    Returns:
        `tuple`: [`Thresholds`], and the map of open tiles `[B * HK, *, *]` uint8.

    Numerics: theta is exact for the fp32 scores; deterministic; cost about 8 passes of a T x N x F product.
    """
    B, HK, T, F = fq.shape
    N, device = fp.shape[2], fq.device
    theta = torch.empty(B, HK, T, dtype=torch.float32, device=device)
    pair = (2, B, HK, T) if threshold_grad else (2, 0)
    above, below = torch.empty(pair, dtype=torch.int32, device=device)
    pages = {name: meta[name] for name in ("PAGE_SIZE", "HAS_SCALAR", "PRECISION")}
    pages |= {"NUM_FEATURES": F, "WITH_IDS": threshold_grad}
    forced = (meta["sink_pages"], meta["recent_pages"])
    starts = layout.start.stride()
    _soft_mask_fwd_threshold_kernel[(B * HK, triton.cdiv(T, select["threshold"]["BLOCK_T"]))](
        fq, nq, fp, fs, layout.start, theta, above, below, *starts, T, N, HK, select["num_free"], *forced,
        **pages, **select["threshold"],
    )  # fmt: skip
    block_t, block_s, parts = (select["tiles"][name] for name in ("BLOCK_T", "BLOCK_S", "PARTS"))
    # a page is scored once, and once per tile where it is larger than one
    chunk = min(meta["PAGE_SIZE"], block_s)
    NQB, NKB = triton.cdiv(T, block_t), triton.cdiv(T, block_s)
    is_open = torch.zeros(B * HK, NQB, NKB, dtype=torch.uint8, device=device)
    _soft_mask_fwd_tiles_kernel[(triton.cdiv(NQB, parts), B * HK)](
        fq, nq, fp, fs, layout.start, theta, below, is_open, *starts, T, N, NQB, NKB, HK, *forced,
        meta["inv_temperature"], select["cut"],
        **pages, **select["tiles"], CHUNK=chunk, BLOCK_C=max(select["chunks"], block_s // chunk),
    )  # fmt: skip
    return Thresholds(theta, above, below), is_open
