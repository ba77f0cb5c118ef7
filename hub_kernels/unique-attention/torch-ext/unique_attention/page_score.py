"""Page scores (Eq. 2) and the vote of a query group (Eq. 3). May import torch, triton and the other kernels.

The vote "mean" is linear for every score but "diagonal", so a group needs a single averaged query.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import (
    COUNTERS,
    FP8,
    SCORED,
    physical_page,
    prefetch,
    row_end,
    row_extent,
    signal_row,
    stats_arguments,
    stride_of,
    target_of,
)
from ._page_dot import VOTE, VOTE_MAX, VOTE_MEAN, VOTE_SOFTMAX_MEAN, load_block, prepare_group, score_pages
from .page_select import store_peaks
from .page_stats import stats_sizes


@triton.jit
def _load_next(
    codes_ptr, scales_ptr, spread_ptr, table_ptr, stride_cp, stride_sp, stride_dp, stride_table,
    row, offs, pages, first_page, stop,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, HAS_TABLE: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """A block of pages: `offs` past the pointers, or wherever the table has them."""
    inside = (pages >= first_page) & (pages < stop)
    physical = offs
    if HAS_TABLE:
        physical = physical_page(table_ptr, stride_table, row, pages, inside, True)
    return load_block(
        codes_ptr, scales_ptr, spread_ptr, stride_cp, stride_sp, stride_dp, physical, inside,
        D, BD, C, BC, NG, KIND, FORM, DP4A,
    )  # fmt: skip


@triton.jit
def score_blocks(
    qa, qb, qc, qd, qe, qf, qg, qh, norm, q_ptr, codes_ptr, scales_ptr, spread_ptr, out_ptr, peaks_ptr, table_ptr,
    stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp, stride_og, stride_table,
    row, head, begin, stop, first_page, last_page, num_pages, weight, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, G: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, GS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr, HAS_TABLE: tl.constexpr,
    DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Eq. 2 and 3 for pages `begin .. stop - 1` of a row, in blocks of `BLOCK_N`; the pointers are the row's.

    With `STAGES` 0 a block is loaded into registers while the one before it is scored.
    """
    offs = tl.arange(0, BLOCK_N)
    if not HAS_TABLE:
        # pages lie in order: the pointers go on with the blocks, and 32 bits are enough from there
        first = tl.cast(begin, tl.int64)
        codes_ptr += first * stride_cp
        spread_ptr += first * stride_dp
        if KIND >= FP8:
            scales_ptr += first * stride_sp
    if STAGES == 0:
        next_codes, next_scales, next_spread = _load_next(
            codes_ptr, scales_ptr, spread_ptr, table_ptr, stride_cp, stride_sp, stride_dp, stride_table,
            row, offs, begin + offs, first_page, last_page, D, BD, C, BC, NG, KIND, FORM, HAS_TABLE, DP4A,
        )  # fmt: skip
    for block in tl.range(begin, stop, BLOCK_N, num_stages=max(STAGES, 1)):
        pages = block + offs
        inside = (pages >= first_page) & (pages < last_page)
        physical = offs
        if HAS_TABLE:
            physical = physical_page(table_ptr, stride_table, row, pages, inside, True)
        if STAGES == 0:
            codes, scales, spread = next_codes, next_scales, next_spread
            next_codes, next_scales, next_spread = _load_next(
                codes_ptr, scales_ptr, spread_ptr, table_ptr, stride_cp, stride_sp, stride_dp, stride_table,
                row, offs + BLOCK_N, pages + BLOCK_N, first_page, stop, D, BD, C, BC, NG, KIND, FORM, HAS_TABLE, DP4A,
            )  # fmt: skip
        else:
            codes, scales, spread = load_block(
                codes_ptr, scales_ptr, spread_ptr, stride_cp, stride_sp, stride_dp, physical, inside,
                D, BD, C, BC, NG, KIND, FORM, DP4A,
            )  # fmt: skip
        best = score_pages(
            qa, qb, qc, qd, qe, qf, qg, qh, norm, codes, scales, spread, q_ptr, codes_ptr, scales_ptr, out_ptr,
            stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_og,
            head, pages, physical, inside, num_pages, weight, scale,
            D, BD, C, BC, NG, G, KIND, FORM, VOTE, DP4A, NATIVE_FP8,
        )  # fmt: skip
        if not HAS_TABLE:
            codes_ptr += BLOCK_N * stride_cp
            spread_ptr += BLOCK_N * stride_dp
            if KIND >= FP8:
                scales_ptr += BLOCK_N * stride_sp
        if VOTE == VOTE_MEAN or VOTE == VOTE_MAX:
            tl.store(out_ptr + pages, best, mask=pages < num_pages)
            if GS > 1:
                store_peaks(peaks_ptr, best, block, first_page + SINK, last_page - RECENT, num_pages, GS, BLOCK_N)


@triton.jit(do_not_specialize=[
    "num_pages", "num_peaks", "capacity", "dense_pages", "stride_table"
])  # fmt: skip
def _page_score_fwd_kernel(
    q_ptr, codes_ptr, scales_ptr, spread_ptr, out_ptr, peaks_ptr, counter_ptr, len_ptr, start_ptr, table_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    stride_ob, stride_oh, stride_og,
    stride_len, stride_start, stride_table,
    num_pages, num_peaks, capacity, dense_pages, weight, scale,
    P: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, G: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, GS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_TABLE: tl.constexpr,
    SELECTING: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
    SIGNAL: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 2 and 3. Program `(BLOCKS blocks of BLOCK_N pages, kv head, row)` scores its pages for the `G` heads.

    Writes `[B, HK, N]`, or `[B, HK, G, N]` before a vote that needs the best score of each head first. `SELECTING`
    leaves out what the selection of the next launch does not read: rows of at most `dense_pages` pages of `P / RATIO`
    tokens are dense. It reads peaks too where groups have more than one page. `SIGNAL`: every program is counted when
    it is done. `PREFETCH`: the first block is asked for before the launch before has ended.
    """
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * (BLOCK_N * BLOCKS)
    row_codes = codes_ptr + pid_b * stride_cb + pid_h * stride_ch
    row_s = scales_ptr
    if KIND >= FP8:
        row_s += pid_b * stride_sb + pid_h * stride_sh
    row_spread = spread_ptr + pid_b * stride_db + pid_h * stride_dh
    if PREFETCH:
        # statistics of earlier steps, while the launch before ends; as far as the row goes, which may be out of date
        pages = tl.cdiv(row_end(len_ptr, stride_len, pid_b, capacity, HAS_LENS), P)
        pages = tl.minimum(tl.minimum(num_pages, pages) - begin, BLOCK_N)
        if pages > 0:
            prefetch(row_codes + begin * stride_cp, pages * stride_cp)
            if KIND >= FP8:
                prefetch(row_s + begin * stride_sp, pages * stride_sp)
            prefetch(row_spread + begin * stride_dp, pages * stride_dp)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _, start, end, first_page, last_page = row_extent(
        len_ptr, start_ptr, stride_len, stride_start, pid_b, capacity, P, HAS_LENS, HAS_STARTS
    )
    row_out = out_ptr + pid_b * stride_ob + pid_h * stride_oh
    wanted = begin < last_page
    if SELECTING:
        small: tl.constexpr = P // RATIO
        wanted = wanted & (begin + BLOCK_N * BLOCKS > first_page)
        wanted = wanted & (tl.cdiv(end, small) - start // small > dense_pages)
    if wanted:
        row_peaks = peaks_ptr
        if GS > 1:
            row_peaks += (pid_b * tl.num_programs(1) + pid_h) * num_peaks
        row_q = q_ptr + pid_b * stride_qb
        qa, qb, qc, qd, qe, qf, qg, qh, norm = prepare_group(
            row_q, stride_qh, stride_qd, pid_h, scale, D, BD, C, BC, NG, G, KIND, FORM, VOTE, DP4A, False
        )
        score_blocks(
            qa, qb, qc, qd, qe, qf, qg, qh, norm, row_q, row_codes, row_s, row_spread, row_out, row_peaks, table_ptr,
            stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp, stride_og, stride_table,
            pid_b, pid_h, begin, tl.minimum(begin + BLOCKS * BLOCK_N, last_page), first_page, last_page, num_pages,
            weight, scale,
            D, BD, C, BC, NG, G, SINK, RECENT, GS, BLOCK_N, STAGES, KIND, FORM, VOTE, HAS_TABLE, DP4A, NATIVE_FP8,
        )  # fmt: skip
    if not SELECTING:
        nothing = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        scored = tl.maximum(tl.cdiv(last_page - begin, BLOCK_N), 0) * BLOCK_N
        for block in range(begin + scored, begin + BLOCKS * BLOCK_N, BLOCK_N):
            pages = block + tl.arange(0, BLOCK_N)
            for g in tl.static_range(1 if VOTE == VOTE_MEAN or VOTE == VOTE_MAX else G):
                tl.store(row_out + g * stride_og + pages, nothing, mask=pages < num_pages)
    if SIGNAL:
        signal_row(counter_ptr + (pid_b * tl.num_programs(1) + pid_h) * COUNTERS + SCORED)


@triton.jit(do_not_specialize=["num_pages"])
def _page_vote_fwd_kernel(
    in_ptr, out_ptr, stride_ib, stride_ih, stride_ig, stride_ob, stride_oh, num_pages, scale,
    G: tl.constexpr, BLOCK_N: tl.constexpr, VOTE: tl.constexpr,
):  # fmt: skip
    """Eq. 3, votes that need the best score of each head. Program `(kv head, row)` reads `[G, N]`, writes `[N]`."""
    row_in = in_ptr + tl.program_id(1).to(tl.int64) * stride_ib + tl.program_id(0).to(tl.int64) * stride_ih
    row_out = out_ptr + tl.program_id(1).to(tl.int64) * stride_ob + tl.program_id(0).to(tl.int64) * stride_oh
    offs = tl.arange(0, BLOCK_N)
    for g in tl.static_range(G):
        best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        for begin in range(0, num_pages, BLOCK_N):
            x = tl.load(row_in + g * stride_ig + begin + offs, mask=begin + offs < num_pages, other=float("-inf"))
            best = tl.maximum(best, x)
        top = tl.max(best, axis=0)
        norm = 1.0
        if VOTE == VOTE_SOFTMAX_MEAN:
            mass = tl.zeros((BLOCK_N,), tl.float32)
            for begin in range(0, num_pages, BLOCK_N):
                x = tl.load(row_in + g * stride_ig + begin + offs, mask=begin + offs < num_pages, other=float("-inf"))
                mass += tl.exp((x - top) * scale)
            norm = tl.sum(mass, axis=0) * G
        for begin in range(0, num_pages, BLOCK_N):
            mask = begin + offs < num_pages
            x = tl.load(row_in + g * stride_ig + begin + offs, mask=mask, other=float("-inf"))
            outside = x == float("-inf")
            x = tl.exp((x - top) * scale) / norm if VOTE == VOTE_SOFTMAX_MEAN else x - top
            if g > 0:
                earlier = tl.load(row_out + begin + offs, mask=mask, other=0.0)
                x = x + earlier if VOTE == VOTE_SOFTMAX_MEAN else tl.maximum(x, earlier)
            tl.store(row_out + begin + offs, tl.where(outside, float("-inf"), x), mask=mask)


# programs per multiprocessor up to which the launch before is worth a prefetch
PREFETCHED = 8
# pages per block at head dim 128, warps, blocks per program, depth of the loads' pipeline (0: registers); where
# programs are many, few, very few; measured on an H200. No blocks: by the pages that a multiprocessor has to score
SCORE_LAUNCH = {
    "fp32": (32, 4, 1, 1), "bf16": (32, 1, 8, 3), "fp8": (32, 1, 8, 3), "int8": (32, 1, 0, 0), "int4": (32, 1, 0, 0),
}  # fmt: skip
FEW_LAUNCH = {"bf16": (32, 4, 1, 1), "fp8": (64, 1, 1, 1), "int8": (32, 1, 2, 0), "int4": (32, 1, 2, 0)}
FEWEST_LAUNCH = {"int8": (32, 1, 1, 1), "int4": (32, 1, 1, 1)}
# codes that are unpacked to float32, for want of dp4a or of whole groups: more threads, or the vectors spill
UNPACKED_LAUNCH = (32, 4, 1, 1)
# pages per block and warps for pages of listed super-pages
LISTED_LAUNCH = {"fp32": (32, 4), "bf16": (32, 4)}


class Scoring(NamedTuple):
    """The compile-time side of a score pass."""

    constants: dict
    block_n: int
    num_warps: int
    blocks: int
    stages: int
    per_head: bool
    # pages per program and warps for pages of listed super-pages
    listed: tuple[int, int]


def plan_scoring(q, stats, num_pages, *, score, group_reduce, stats_dtype) -> Scoring:
    """Constants and launch settings from shapes and storage."""
    codes, num_kv_heads, head_dim = stats.codes, stats.codes.shape[1], q.shape[-1]
    target = target_of(q.device)
    integer = target.dp4a and (
        (stats_dtype == "int8" and head_dim % 4 == 0) or (stats_dtype == "int4" and head_dim % 32 == 0)
    )
    block_d = triton.next_power_of_2(head_dim)
    constants = {
        **stats_sizes(head_dim, score=score, stats_dtype=stats_dtype), "D": head_dim, "BD": block_d,
        "G": q.shape[1] // num_kv_heads, "VOTE": VOTE[group_reduce],
        "DP4A": integer and codes.stride(-2) * codes.element_size() % 4 == 0, "NATIVE_FP8": target.native_fp8,
    }  # fmt: skip
    per_head = group_reduce in ("softmax_mean", "shifted_max")
    rows = q.shape[0] * num_kv_heads
    squared = score in ("diagonal", "moment")
    unpacked = stats_dtype in ("int8", "int4") and (squared or not constants["DP4A"])
    launch = UNPACKED_LAUNCH if unpacked else SCORE_LAUNCH[stats_dtype]
    listed = launch[:2] if unpacked else LISTED_LAUNCH.get(stats_dtype, (64, 1))
    share = rows * num_pages // target.num_sms
    if launch[2] == 0:
        # the query is prepared once per program: more blocks each, where programs are many
        launch = (*launch[:2], 4 if share <= 4_000 else 8 if share <= 20_000 else 16, launch[3])
    if not unpacked and (per_head or share < 8 * launch[0] * launch[2]):
        launch = FEW_LAUNCH.get(stats_dtype, launch)
        if share <= 128:
            launch = FEWEST_LAUNCH.get(stats_dtype, launch)
    block_n, num_warps, blocks, stages = launch
    # a warp has a lane per page
    least = 32 if num_warps == 1 and constants["DP4A"] else 16
    block_n, listed_n = (max(least, n * 128 // max(block_d, 64)) for n in (block_n, listed[0]))
    return Scoring(constants, block_n, num_warps, blocks, stages, per_head, (listed_n, listed[1]))


def launch_scores(
    q, stats, out, peaks, scoring, *, page_size, score_weight, stats_dtype, softmax_scale, seq_lens, seq_starts,
    page_table, capacity, ratio=1, dense_pages=None, forced=(0, 0), group_size=1, counters=None, pdl=False,
):  # fmt: skip
    """One score pass into `out [B, HK, N]`, or `[B, HK, G, N]` for a vote that needs each head's best score first.

    With `dense_pages` for a selection in the next launch: that wants `peaks [B, HK, groups]` as well. Returns the
    number of programs that score a row; all are counted in `counters` if there are any.
    """
    paged = page_table is not None
    batch, num_kv_heads, num_pages = out.shape[0], out.shape[1], out.shape[-1]
    tensors, strides = stats_arguments(stats, stats_dtype, paged)
    programs = triton.cdiv(num_pages, scoring.block_n * scoring.blocks)
    # what is asked for in one piece is a row's own
    packed = not paged and stats.codes[0, 0].is_contiguous()
    _page_score_fwd_kernel[(programs, num_kv_heads, batch)](
        q, *tensors, out, peaks, counters, seq_lens, seq_starts, page_table,
        q.stride(0), q.stride(1), q.stride(-1), *strides,
        out.stride(0), out.stride(1), out.stride(2) if scoring.per_head else 0,
        stride_of(seq_lens), stride_of(seq_starts), stride_of(page_table),
        num_pages, 0 if peaks is None else peaks.stride(1), capacity, dense_pages or 0, score_weight, softmax_scale,
        P=page_size, RATIO=ratio, **scoring.constants,
        SINK=forced[0], RECENT=forced[1], GS=group_size,
        BLOCK_N=scoring.block_n, BLOCKS=scoring.blocks, STAGES=scoring.stages,
        HAS_LENS=seq_lens is not None, HAS_STARTS=seq_starts is not None, HAS_TABLE=paged,
        SELECTING=dense_pages is not None, SIGNAL=counters is not None,
        PREFETCH=pdl and packed and programs * num_kv_heads * batch <= PREFETCHED * target_of(q.device).num_sms,
        PDL=pdl,
        num_warps=scoring.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return programs


def page_scores(
    q, stats, out, *, page_size, score, score_weight, group_reduce, stats_dtype, softmax_scale, seq_lens, seq_starts,
    page_table,
):  # fmt: skip
    """Fills `out [B, HK, N]`."""
    batch, num_kv_heads, num_pages = out.shape
    scoring = plan_scoring(q, stats, num_pages, score=score, group_reduce=group_reduce, stats_dtype=stats_dtype)
    group = scoring.constants["G"]
    raw = out
    if scoring.per_head:
        raw = torch.empty((batch, num_kv_heads, group, num_pages), dtype=torch.float32, device=q.device)
    launch_scores(
        q, stats, raw, None, scoring, page_size=page_size, score_weight=score_weight, stats_dtype=stats_dtype,
        softmax_scale=softmax_scale, seq_lens=seq_lens, seq_starts=seq_starts, page_table=page_table,
        capacity=num_pages * page_size,
    )  # fmt: skip
    if scoring.per_head:
        _page_vote_fwd_kernel[(num_kv_heads, batch)](
            raw, out, *raw.stride()[:3], *out.stride()[:2], num_pages, softmax_scale,
            G=group, BLOCK_N=1024, VOTE=VOTE[group_reduce], num_warps=4,
        )  # fmt: skip
    return out
