"""Second level of a selection: scores of the pages of listed super-pages (Eq. 2 and 3), and the best of them (Eq. 4).

May import torch, triton and the other kernels.
"""

import triton
import triton.language as tl

from ._common import (
    CHOSEN,
    COUNTERS,
    FP8,
    LISTED,
    RESCORED,
    await_row,
    end_in_order,
    row_extent,
    signal_row,
    stats_arguments,
    stride_of,
    target_of,
)
from ._page_dot import load_block, prepare_group, score_pages
from .page_score import Scoring
from .page_select import (
    MAX_CANDIDATES,
    list_all,
    load_keys,
    search_settings,
    store_best,
    store_forced,
)


@triton.jit(do_not_specialize=["num_pages", "capacity", "dense_pages"])
def _listed_score_fwd_kernel(
    q_ptr, codes_ptr, scales_ptr, spread_ptr, supers_ptr, out_ptr, counter_ptr, len_ptr, start_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    stride_len, stride_start, num_pages, capacity, dense_pages, weight, scale,
    P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    G: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, KS: tl.constexpr, RATIO: tl.constexpr,
    BLOCK_N: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
    CHAINED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 2 and 3. Program `(BLOCK_N pages, kv head, row)` scores pages of the `KS` listed super-pages, in that order.

    Writes `[B, HK, KS * RATIO]`; `-inf` for forced pages and for those outside the row.
    """
    if PDL:
        if not CHAINED:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    row = pid_b * tl.num_programs(1) + pid_h
    _, _, _, first_page, last_page = row_extent(
        len_ptr, start_ptr, stride_len, stride_start, pid_b, capacity, P, HAS_LENS, HAS_STARTS
    )
    row_q = q_ptr + pid_b * stride_qb
    qa, qb, qc, qd, qe, qf, qg, qh, norm = prepare_group(
        row_q, stride_qh, stride_qd, pid_h, scale, D, BD, C, BC, NG, G, KIND, FORM, VOTE, DP4A, True
    )
    if CHAINED:
        await_row(counter_ptr + row * COUNTERS + LISTED, 1)
    if last_page - first_page > dense_pages:
        row_s = scales_ptr
        if KIND >= FP8:
            row_s += pid_b * stride_sb + pid_h * stride_sh
        offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        listed = tl.load(supers_ptr + row * KS + offs // RATIO, mask=offs < KS * RATIO, other=-1)
        pages = listed * RATIO + offs % RATIO
        inside = (listed >= 0) & (pages >= first_page + SINK) & (pages < last_page - RECENT)
        physical = pages.to(tl.int64)
        row_codes = codes_ptr + pid_b * stride_cb + pid_h * stride_ch
        codes, scales, spread = load_block(
            row_codes, row_s, spread_ptr + pid_b * stride_db + pid_h * stride_dh, stride_cp, stride_sp, stride_dp,
            physical, inside, D, BD, C, BC, NG, KIND, FORM, DP4A,
        )  # fmt: skip
        scores = score_pages(
            qa, qb, qc, qd, qe, qf, qg, qh, norm, codes, scales, spread, row_q, row_codes, row_s, out_ptr,
            stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, 0,
            pid_h, pages, physical, inside, num_pages, weight, scale,
            D, BD, C, BC, NG, G, KIND, FORM, VOTE, DP4A, NATIVE_FP8,
        )  # fmt: skip
        tl.store(out_ptr + row * (KS * RATIO) + offs, scores, mask=offs < KS * RATIO)
    if CHAINED:
        signal_row(counter_ptr + row * COUNTERS + RESCORED)
        if PDL:
            end_in_order(tl.program_id(0) + row)


@triton.jit(do_not_specialize=["capacity", "dense_pages", "programs"])
def _listed_select_fwd_kernel(
    scores_ptr, supers_ptr, ids_ptr, counter_ptr, len_ptr, start_ptr, stride_len, stride_start,
    capacity, dense_pages, programs,
    P: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    KS: tl.constexpr, RATIO: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, CHAINED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 4. Program `(kv head, row)` writes the ids of the `K` best pages of `KS` listed super-pages.

    Their scores come in that order. A row of at most `dense_pages` pages is dense.
    """
    if PDL:
        if not CHAINED:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid_b = tl.program_id(1).to(tl.int64)
    row = pid_b * tl.num_programs(0) + tl.program_id(0)
    _, _, _, first_page, last_page = row_extent(
        len_ptr, start_ptr, stride_len, stride_start, pid_b, capacity, P, HAS_LENS, HAS_STARTS
    )
    row_ids = ids_ptr + row * K
    row_counters = counter_ptr
    if CHAINED:
        row_counters += row * COUNTERS
        await_row(row_counters + RESCORED, programs)
        # ready for the next call
        tl.store(row_counters + LISTED, 0)
        tl.store(row_counters + RESCORED, 0)
    if last_page - first_page <= dense_pages:
        list_all(row_ids, first_page, last_page - first_page, K, BLOCK_K)
    else:
        store_forced(row_ids, first_page, last_page, K, BLOCK_K, SINK, RECENT)
        offs = tl.arange(0, TILE)
        listed = tl.load(supers_ptr + row * KS + offs // RATIO, mask=offs < KS * RATIO, other=-1)
        pages = listed * RATIO + offs % RATIO
        inside = (listed >= 0) & (pages >= first_page + SINK) & (pages < last_page - RECENT)
        keys = load_keys(scores_ptr + row * (KS * RATIO), offs, inside)
        store_best(keys, pages, row_ids + SINK, K - SINK - RECENT, TILE, AT_ONCE)
    if CHAINED:
        signal_row(row_counters + CHOSEN)
        if PDL:
            end_in_order(row)


def check_listed(num_supers: int, ratio: int):
    """Refuses more super-pages, of `ratio` pages each, than a program can search page by page."""
    if num_supers and triton.next_power_of_2(num_supers) * ratio > MAX_CANDIDATES:
        raise NotImplementedError(
            f"the Triton selection searches at most {MAX_CANDIDATES} pages one by one, got {num_supers} super-pages "
            f"of {ratio}; use a smaller `super_budget`, a larger `page_size`, or impl='reference'."
        )


def choose_listed(
    q, stats, supers, page_ids, scoring: Scoring, *, page_size, ratio, score_weight, stats_dtype, softmax_scale,
    seq_lens, seq_starts, capacity, dense_pages, forced, scores, counters=None, pdl=False,
):  # fmt: skip
    """Fills `page_ids [B, HK, K]` with the best pages of super-pages `supers [B, HK, KS]`; -1 is none.

    `forced` are the sink and recent pages, `scores [B, HK, KS * ratio]` is scratch. With `counters` the launches
    before and after are in step row by row.
    """
    batch, num_kv_heads, num_pages = stats.codes.shape[:3]
    num_kept, num_supers = page_ids.shape[-1], supers.shape[-1]
    tensors, strides = stats_arguments(stats, stats_dtype, False)
    block_n, num_warps = scoring.listed
    programs = triton.cdiv(num_supers * ratio, block_n)
    shared = {
        "P": page_size, "SINK": forced[0], "RECENT": forced[1], "KS": num_supers, "RATIO": ratio,
        "HAS_LENS": seq_lens is not None, "HAS_STARTS": seq_starts is not None,
        "CHAINED": counters is not None, "PDL": pdl, **({"launch_pdl": True} if pdl else {}),
    }  # fmt: skip
    row_strides = (stride_of(seq_lens), stride_of(seq_starts))
    _listed_score_fwd_kernel[(programs, num_kv_heads, batch)](
        q, *tensors, supers, scores, counters, seq_lens, seq_starts,
        q.stride(0), q.stride(1), q.stride(-1), *strides, *row_strides,
        num_pages, capacity, dense_pages, score_weight, softmax_scale,
        **scoring.constants, BLOCK_N=block_n, num_warps=num_warps, **shared,
    )  # fmt: skip
    _listed_select_fwd_kernel[(num_kv_heads, batch)](
        scores, supers, page_ids, counters, seq_lens, seq_starts, *row_strides, capacity, dense_pages, programs,
        K=num_kept, BLOCK_K=triton.next_power_of_2(num_kept), TILE=triton.next_power_of_2(num_supers) * ratio,
        **search_settings(batch * num_kv_heads, target_of(q.device)), **shared,
    )  # fmt: skip
