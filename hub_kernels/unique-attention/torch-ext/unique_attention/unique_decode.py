"""One decode step: append and score (Eq. 1 to 3) in one launch, select and attend (Eq. 4 and 5) in the next.

The second launch may start while the first drains. A row that is split over several programs repeats the (cheap)
selection in each of them, and each takes a slice of the result. Where no row can have more pages than it attends to
there is one launch only. May import torch, triton and the other kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import FP8, row_length, row_start, target_of
from ._page_dot import prepare_group, score_pages
from .page_score import Appending, launch_scores, page_scores, plan_scoring, stats_arguments
from .page_select import check_listed, list_all, plan_selection, select_listed, select_row, write_peaks
from .page_stats import append_row, append_tokens, write_token
from .sparse_decode import attend_pages, capacity_of, finish_row, launch_decode, plan_attention, row_bytes, split_of

# pages that a warp scores at once inside the second launch, and the depth of that pipeline; measured on an H200
PAGES_PER_WARP = 32
SCORE_STAGES = 3


@triton.jit
def _score_listed(
    qa, qb, qc, qd, qe, qf, qg, qh, norm, q_ptr, codes_ptr, scales_ptr, spread_ptr, supers_ptr, scores_ptr,
    stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp,
    row, head, first_page, last_page, num_pages, weight, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, G: tl.constexpr,
    KS: tl.constexpr, RATIO: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Eq. 2 and 3 for the pages of `KS` listed super-pages, in that order; `-inf` outside the given pages."""
    for begin in tl.range(0, KS * RATIO, BLOCK_N, num_stages=STAGES):
        offs = begin + tl.arange(0, BLOCK_N)
        listed = tl.load(supers_ptr + offs // RATIO, mask=offs < KS * RATIO, other=-1)
        pages = listed * RATIO + offs % RATIO
        inside = (listed >= 0) & (pages >= first_page) & (pages < last_page)
        scores = score_pages(
            qa, qb, qc, qd, qe, qf, qg, qh, norm, q_ptr, codes_ptr, scales_ptr, spread_ptr, scores_ptr, scores_ptr,
            stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp, 0, 0,
            row, head, pages, inside, num_pages, weight, scale,
            D, BD, C, BC, NG, G, KIND, FORM, VOTE, False, DP4A, NATIVE_FP8,
        )  # fmt: skip
        tl.store(scores_ptr + offs, scores, mask=offs < KS * RATIO)


@triton.jit
def _choose_pages(
    qa, qb, qc, qd, qe, qf, qg, qh, norm, q_ptr, codes_ptr, scales_ptr, spread_ptr,
    scores_ptr, peaks_ptr, groups_ptr, supers_ptr, listed_ptr, ids_ptr,
    stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp,
    row, head, first_page, last_page, first_pos, last_pos, num_pages, weight, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    KS: tl.constexpr, BLOCK_KS: tl.constexpr, FIRSTS: tl.constexpr, LASTS: tl.constexpr, RATIO: tl.constexpr,
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr,
    DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Eq. 4 for a row of more than `K` pages: positions `first_pos .. last_pos - 1` of the page ids.

    With `RATIO` > 1 the scores are those of super-pages, and the pages of the best ones are scored and compete. The
    pointers are the row's.
    """
    first_super = first_page // RATIO
    last_super = tl.cdiv(last_page, RATIO)
    if RATIO == 1:
        select_row(
            scores_ptr, peaks_ptr, ids_ptr, groups_ptr, first_page, last_page, first_pos, last_pos,
            K, BLOCK_K, SINK, RECENT, GS, GROUPS, TILE, SINGLE,
        )  # fmt: skip
    else:
        if last_super - first_super <= KS:
            list_all(supers_ptr, first_super, last_super - first_super, KS, BLOCK_KS)
        else:
            select_row(
                scores_ptr, peaks_ptr, supers_ptr, groups_ptr, first_super, last_super, 0, KS,
                KS, BLOCK_KS, FIRSTS, LASTS, GS, GROUPS, TILE, SINGLE,
            )  # fmt: skip
        tl.debug_barrier()
        _score_listed(
            qa, qb, qc, qd, qe, qf, qg, qh, norm, q_ptr, codes_ptr, scales_ptr, spread_ptr, supers_ptr, listed_ptr,
            stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp,
            row, head, first_page + SINK, last_page - RECENT, num_pages, weight, scale,
            D, BD, C, BC, NG, G, KS, RATIO, BLOCK_N, STAGES, KIND, FORM, VOTE, DP4A, NATIVE_FP8,
        )  # fmt: skip
        tl.debug_barrier()
        select_listed(
            listed_ptr, supers_ptr, ids_ptr, first_page, last_page, first_pos, last_pos,
            K, BLOCK_K, SINK, RECENT, KS, RATIO, BLOCK_KS * RATIO,
        )  # fmt: skip


@triton.jit(do_not_specialize=[
    "num_pages", "num_supers", "num_peaks", "capacity", "dense_pages", "stride_mask", "stride_table"
])  # fmt: skip
def _unique_decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, len_ptr, start_ptr, mask_ptr, table_ptr,
    k_new_ptr, v_new_ptr, codes_ptr, scales_ptr, spread_ptr, super_codes_ptr, super_scales_ptr, super_spread_ptr,
    scores_ptr, peaks_ptr, groups_ptr, supers_ptr, listed_ptr, ids_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_vb, stride_vh, stride_vp, stride_vt, stride_ob, stride_oh,
    stride_len, stride_start, stride_mask, stride_table,
    stride_nb, stride_nh, stride_wb, stride_wh,
    stride_cb, stride_ch, stride_cp, stride_cv, stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    stride_ucb, stride_uch, stride_ucp, stride_ucv, stride_usb, stride_ush, stride_usp, stride_usv,
    stride_udb, stride_udh, stride_udp,
    num_pages, num_supers, num_peaks, capacity, dense_pages, weight, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    KS: tl.constexpr, BLOCK_KS: tl.constexpr, FIRSTS: tl.constexpr, LASTS: tl.constexpr, RATIO: tl.constexpr,
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    SCORE_STAGES: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr, DP4A: tl.constexpr,
    NATIVE_FP8: tl.constexpr, HAS_LENS: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, APPEND: tl.constexpr, SELECT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 4 and 5. Program `(split, kv head, row)` selects, and attends to its slice of the selected pages.

    A row of at most `dense_pages` pages attends to all of them and selects nothing. With `RATIO` > 1 the scores given
    are those of super-pages of so many pages, and the pages of the best ones are scored here. Without `SELECT` every
    row is dense, and nothing ran before: with `APPEND` one more program per row writes the new token and its
    statistics.
    """
    split = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    row = pid_b * tl.num_programs(1) + pid_h
    length = row_length(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    end = tl.minimum(length, capacity)
    start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
    last_page = tl.cdiv(end, P)
    first_page = tl.minimum(start // P, last_page)
    count = last_page - first_page
    dense = count <= dense_pages
    row_q = q_ptr + pid_b * stride_qb
    row_k = k_ptr + pid_b * stride_kb + pid_h * stride_kh
    row_v = v_ptr + pid_b * stride_vb + pid_h * stride_vh
    row_c = codes_ptr + pid_b * stride_cb + pid_h * stride_ch
    row_d = spread_ptr + pid_b * stride_db + pid_h * stride_dh
    row_s = scales_ptr
    if KIND >= FP8:
        row_s += pid_b * stride_sb + pid_h * stride_sh
    row_ids = ids_ptr + row * K
    row_mask = mask_ptr
    if HAS_MASK:
        row_mask += pid_b * stride_mask
    if APPEND:
        if split == SPLITS:
            append_row(
                k_ptr, v_ptr, k_new_ptr, v_new_ptr, codes_ptr, scales_ptr, spread_ptr,
                super_codes_ptr, super_scales_ptr, super_spread_ptr, mask_ptr, table_ptr,
                stride_kb, stride_kh, stride_kp, stride_kt, stride_vb, stride_vh, stride_vp, stride_vt,
                stride_nb, stride_nh, stride_wb, stride_wh,
                stride_cb, stride_ch, stride_cp, stride_cv, stride_sb, stride_sh, stride_sp, stride_sv,
                stride_db, stride_dh, stride_dp,
                stride_ucb, stride_uch, stride_ucp, stride_ucv, stride_usb, stride_ush, stride_usp, stride_usv,
                stride_udb, stride_udh, stride_udp,
                stride_mask, stride_table, pid_b, pid_h, start, end, length,
                P, D, DV, C, BC, BDV, NG, RATIO, KIND, FORM, HAS_MASK, HAS_TABLE,
            )  # fmt: skip
            return
    listed = tl.where(dense, count, K)
    first_pos, last_pos = split_of(listed, split, SPLITS, 1 if P > BLOCK_T else BLOCK_T // P)
    if APPEND:
        # the program of the last pages reads the new token, so it writes it too: the same bytes
        if (first_pos < listed) & (last_pos == listed) & (length <= capacity):
            write_token(
                row_k, k_new_ptr + pid_b * stride_nb + pid_h * stride_nh,
                row_v, v_new_ptr + pid_b * stride_wb + pid_h * stride_wh,
                table_ptr, stride_table, stride_kp, stride_kt, stride_vp, stride_vt, pid_b, length - 1,
                P, D, DV, BD, BDV, HAS_TABLE,
            )  # fmt: skip
    qa, qb, qc, qd, qe, qf, qg, qh, norm = prepare_group(
        row_q, stride_qh, stride_qd, pid_h, scale, D, BD, C, BC, NG, G, KIND, FORM, VOTE, DP4A
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    if dense:
        if split == 0:
            list_all(row_ids, first_page, count, K, BLOCK_K)
    elif SELECT:
        part = row * SPLITS + split
        _choose_pages(
            qa, qb, qc, qd, qe, qf, qg, qh, norm, row_q, row_c, row_s, row_d,
            scores_ptr + row * num_supers, peaks_ptr + row * num_peaks, groups_ptr + part * GROUPS,
            supers_ptr + part * KS, listed_ptr + part * KS * RATIO, row_ids,
            stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp,
            pid_b, pid_h, first_page, last_page, first_pos, last_pos, num_pages, weight, scale,
            D, BD, C, BC, NG, G, K, BLOCK_K, SINK, RECENT, KS, BLOCK_KS, FIRSTS, LASTS, RATIO, GS, GROUPS, TILE,
            SINGLE, BLOCK_N, SCORE_STAGES, KIND, FORM, VOTE, DP4A, NATIVE_FP8,
        )  # fmt: skip
    tl.debug_barrier()
    acc, m_i, l_i = attend_pages(
        row_q, stride_qh, stride_qd, row_k, row_v, row_ids, row_mask, table_ptr, stride_table,
        stride_kp, stride_kt, stride_vp, stride_vt,
        pid_b, pid_h * G, start, end, first_page, first_pos, last_pos, dense, scale, softcap,
        P, D, DV, BD, BDV, G, GP, BLOCK_T, STAGES, HAS_MASK, HAS_TABLE, HAS_SOFTCAP,
    )  # fmt: skip
    finish_row(
        acc, m_i, l_i, out_ptr + pid_b * stride_ob, stride_oh, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, row, pid_h * G,
        split, DV, BDV, G, GP, SPLITS, HAS_SINKS,
    )  # fmt: skip


class Scratch(NamedTuple):
    """What a step leaves in memory for itself; after the scores one part per program."""

    scores: torch.Tensor
    peaks: torch.Tensor
    groups: torch.Tensor
    supers: torch.Tensor
    listed: torch.Tensor


def _scratch(rows, splits, num_scored, selection, upper, ratio, device) -> Scratch:
    """`num_scored` scores of the first level and their peaks; groups, kept super-pages and scores of their pages."""
    kept = upper.num_kept if upper is not None else 0
    check_listed(kept, ratio)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    return Scratch(
        empty(rows, num_scored), empty(rows, selection.peaks(num_scored)),
        empty(rows * splits, selection.groups, dtype=torch.int32), empty(rows * splits, kept, dtype=torch.int32),
        empty(rows * splits, kept * ratio),
    )  # fmt: skip


def _launch_scores(
    q, stats, scored, scratch, scoring, selection, appending, *, config, level, dense_pages, page_table, capacity, pdl,
    seq_lens, seq_starts, score_weight, softmax_scale,
):  # fmt: skip
    """The launches before the selection: append, scores of the first level, and their vote where heads vote apart."""
    shape = (q.shape[0], stats.codes.shape[1], -1)
    scores, peaks = scratch.scores.view(shape), scratch.peaks.view(shape)
    forced = {"sink_pages": level.sink_pages, "recent_pages": level.recent_pages}
    lengths = {"seq_lens": seq_lens, "seq_starts": seq_starts}
    naming = {"stats_dtype": config.stats_dtype, "page_size": level.page_size, "page_table": page_table}
    scaling = {"score_weight": score_weight, "softmax_scale": softmax_scale}
    if not scoring.per_head:
        launch_scores(
            q, scored, scores, peaks, scoring, **naming, **lengths, **scaling, capacity=capacity,
            ratio=level.page_size // config.page_size, dense_pages=dense_pages, forced=tuple(forced.values()),
            group_size=selection.group_size, appending=None if appending.new is None else appending, pdl=pdl,
        )  # fmt: skip
        return
    naming["score"] = config.score
    if appending.new is not None:
        k, v, new, _, token_mask = appending
        append_tokens(k, v, stats, *new, **lengths, **naming, token_mask=token_mask)
    page_scores(q, stats, scores, group_reduce=config.group_reduce, **naming, **lengths, **scaling)
    if selection.group_size > 1:
        write_peaks(scores, peaks, selection, page_size=level.page_size, **forced, **lengths)


def unique_decode(
    q, k, v, stats, out, page_ids, *, config, score_weight, softmax_scale, softcap, sinks, seq_lens, seq_starts,
    token_mask, page_table, dense_below, counters, new, super_stats,
):  # fmt: skip
    """Fills `out [B, H, 1, DV]` and `page_ids [B, HK, K]`; with `new` keys and values the cache and the statistics."""
    batch, num_kv_heads, page_size = q.shape[0], k.shape[1], config.page_size
    rows, target = batch * num_kv_heads, target_of(q.device)
    num_pages = stats.codes.shape[2] if page_table is None else page_table.shape[1]
    dense_pages = max(config.num_kept, dense_below // page_size)
    upper = config.upper
    # the level that is scored first
    level, scored = (config, stats) if upper is None else (upper, super_stats)
    num_scored, ratio = num_pages if upper is None else scored.codes.shape[2], level.page_size // page_size
    naming = {"score": config.score, "stats_dtype": config.stats_dtype}
    scoring = plan_scoring(q, scored, num_scored, group_reduce=config.group_reduce, **naming)
    if upper is not None and scoring.blocks == 1:
        # the program that appends reads a whole super-page
        scoring = scoring._replace(num_warps=max(2, scoring.num_warps))
    selection = plan_selection(num_scored, level.num_kept - level.sink_pages - level.recent_pages)
    # rows that cannot have more pages than they attend to need no scores
    select = num_pages > dense_pages
    launch = launch_decode(
        rows, min(dense_pages, num_pages) * page_size, row_bytes(k, v), target.num_sms,
        selecting=num_scored if select else 0, levels=1 if upper is None else 2,
    )  # fmt: skip
    lengths = {"seq_lens": seq_lens, "seq_starts": seq_starts}
    scratch = _scratch(rows, launch.splits, num_scored, selection, upper, ratio, q.device)
    pdl = select and not scoring.per_head and target.dependent_launch
    forced = (level.sink_pages, level.recent_pages)
    capacity = capacity_of(k, page_table, page_size)
    if select:
        _launch_scores(
            q, stats, scored, scratch, scoring, selection, Appending(k, v, new, stats, token_mask), config=config,
            level=level, dense_pages=dense_pages, page_table=page_table, capacity=capacity, pdl=pdl, **lengths,
            score_weight=score_weight, softmax_scale=softmax_scale,
        )  # fmt: skip
    call = plan_attention(
        q, k, v, out, launch, page_size=page_size, page_table=page_table, **lengths, token_mask=token_mask,
        softcap=softcap, sinks=sinks, counters=counters,
    )  # fmt: skip
    tensors, strides = stats_arguments(stats, config.stats_dtype, page_table is not None)
    super_tensors, super_strides = stats_arguments(scored, config.stats_dtype, page_table is not None)
    append = new is not None and not select
    # copies ahead pay where few programs share a multiprocessor, and fit where page vectors are short
    narrow = stats.codes.shape[-1] * stats.codes.element_size() <= 128
    stages = SCORE_STAGES if narrow and rows < 2 * target.num_sms else 1
    new_strides = (*new[0].stride()[:2], *new[1].stride()[:2]) if append else (0, 0, 0, 0)
    _unique_decode_fwd_kernel[(launch.splits + append, num_kv_heads, batch)](
        *call.tensors, *(new if append else (None, None)), *tensors, *super_tensors, *scratch, page_ids,
        *call.strides, *new_strides, *strides, *super_strides,
        num_pages, num_scored, scratch.peaks.shape[-1], capacity, dense_pages, score_weight, softmax_scale,
        softcap or 0.0,
        K=config.num_kept, BLOCK_K=triton.next_power_of_2(config.num_kept),
        SINK=config.sink_pages, RECENT=config.recent_pages,
        KS=level.num_kept, BLOCK_KS=triton.next_power_of_2(level.num_kept), FIRSTS=forced[0], LASTS=forced[1],
        RATIO=ratio, GS=selection.group_size, GROUPS=selection.groups, TILE=selection.tile, SINGLE=selection.single,
        BLOCK_N=launch.num_warps * PAGES_PER_WARP, SCORE_STAGES=stages, **(scoring.constants | call.constants),
        APPEND=append, SELECT=select, PDL=pdl, num_warps=launch.num_warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
