"""One decode step: append and score (Eq. 1 to 3) in one launch, select and attend (Eq. 4 and 5) in the next.

The second launch may start while the first drains. A row that is split over several programs repeats the (cheap)
selection in each of them, and each takes a slice of the result. May import torch, triton and the other kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import FP8, row_end, row_length, row_start, stride_of, target_of, token_strides
from .page_score import page_scores, plan_scoring, score_blocks, stats_arguments
from .page_select import list_all, plan_selection, select_row, write_peaks
from .page_stats import append_tokens, refresh_pages
from .sparse_decode import attend_pages, capacity_of, finish_row, launch_decode, plan_attention, row_bytes, split_of


@triton.jit(do_not_specialize=["num_pages", "num_peaks", "capacity", "dense_pages", "stride_mask", "stride_table"])
def _unique_score_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_new_ptr, v_new_ptr, codes_ptr, scales_ptr, spread_ptr, scores_ptr, peaks_ptr,
    len_ptr, start_ptr, mask_ptr, table_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_vb, stride_vh, stride_vp, stride_vt,
    stride_nb, stride_nh, stride_wb, stride_wh,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    stride_len, stride_start, stride_mask, stride_table,
    num_pages, num_peaks, capacity, dense_pages, weight, scale,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, NG: tl.constexpr, G: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, GS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr,
    DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr, HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr, APPEND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 2 and 3. Program `(pages, kv head, row)` scores its pages, unless the row is dense.

    With `APPEND` one more program per row writes the new token and the statistics of its page (Eq. 1); that page is
    recent and needs no score.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    row = pid_b * tl.num_programs(1) + pid_h
    length = row_length(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    end = tl.minimum(length, capacity)
    start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
    last_page = tl.cdiv(end, P)
    first_page = tl.minimum(start // P, last_page)
    row_c = codes_ptr + pid_b * stride_cb + pid_h * stride_ch
    row_s = scales_ptr
    if KIND >= FP8:
        row_s += pid_b * stride_sb + pid_h * stride_sh
    row_d = spread_ptr + pid_b * stride_db + pid_h * stride_dh
    begin = pid * (BLOCK_N * BLOCKS)
    inside = begin < last_page and begin + BLOCK_N * BLOCKS > first_page
    if inside and last_page - first_page > dense_pages:
        score_blocks(
            q_ptr + pid_b * stride_qb, row_c, row_s, row_d, scores_ptr + row * num_pages, peaks_ptr + row * num_peaks,
            table_ptr, stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp, 0, stride_table,
            pid_b, pid_h, begin, first_page, last_page, num_pages, weight, scale,
            D, BD, C, BC, NG, G, SINK, RECENT, GS, BLOCK_N, BLOCKS, KIND, FORM, VOTE, HAS_TABLE, True,
            DP4A, NATIVE_FP8,
        )  # fmt: skip
    if APPEND:
        if pid == tl.num_programs(0) - 1 and end > 0:
            row_mask = mask_ptr
            if HAS_MASK:
                row_mask += pid_b * stride_mask
            refresh_pages(
                k_ptr + pid_b * stride_kb + pid_h * stride_kh, k_new_ptr + pid_b * stride_nb + pid_h * stride_nh,
                v_ptr + pid_b * stride_vb + pid_h * stride_vh, v_new_ptr + pid_b * stride_wb + pid_h * stride_wh,
                row_c, row_s, row_d, row_mask, table_ptr, stride_table,
                stride_kp, stride_kt, 0, stride_vp, stride_vt, 0, stride_cp, stride_cv, stride_sp, stride_sv,
                stride_dp, pid_b, (end - 1) // P, 0, last_page, start, end, length - 1,
                P, D, DV, C, BC, BDV, NG, 1, KIND, FORM, True, HAS_MASK, HAS_TABLE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_pages", "num_peaks", "capacity", "dense_pages", "stride_mask", "stride_table"])
def _unique_decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, len_ptr, start_ptr, mask_ptr, table_ptr,
    scores_ptr, peaks_ptr, ids_ptr, groups_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_vb, stride_vh, stride_vp, stride_vt, stride_ob, stride_oh,
    stride_len, stride_start, stride_mask, stride_table,
    num_pages, num_peaks, capacity, dense_pages, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 4 and 5. Program `(split, kv head, row)` selects, and attends to its slice of the selected pages.

    A row of at most `dense_pages` pages attends to all of them and selects nothing.
    """
    split = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    row = pid_b * tl.num_programs(1) + pid_h
    end = row_end(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
    last_page = tl.cdiv(end, P)
    first_page = tl.minimum(start // P, last_page)
    count = last_page - first_page
    row_q = q_ptr + pid_b * stride_qb
    row_k = k_ptr + pid_b * stride_kb + pid_h * stride_kh
    row_v = v_ptr + pid_b * stride_vb + pid_h * stride_vh
    row_ids = ids_ptr + row * K
    row_mask = mask_ptr
    if HAS_MASK:
        row_mask += pid_b * stride_mask
    pages_per_tile: tl.constexpr = 1 if P > BLOCK_T else BLOCK_T // P
    if PDL:
        tl.extra.cuda.gdc_wait()
    if count <= dense_pages:
        if split == 0:
            list_all(row_ids, first_page, count, K, BLOCK_K)
        first_pos, last_pos = split_of(count, split, SPLITS, pages_per_tile)
        acc, m_i, l_i = attend_pages(
            row_q, stride_qh, stride_qd, row_k, row_v, row_ids, row_mask, table_ptr, stride_table,
            stride_kp, stride_kt, stride_vp, stride_vt,
            pid_b, pid_h * G, start, end, first_page, first_pos, last_pos, scale, softcap,
            P, D, DV, BD, BDV, G, GP, BLOCK_T, STAGES, True, HAS_MASK, HAS_TABLE, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        first_pos, last_pos = split_of(K, split, SPLITS, pages_per_tile)
        select_row(
            scores_ptr + row * num_pages, peaks_ptr + row * num_peaks, row_ids,
            groups_ptr + (row * SPLITS + split) * GROUPS, first_page, last_page, first_pos, last_pos,
            K, BLOCK_K, SINK, RECENT, GS, GROUPS, TILE, SINGLE,
        )  # fmt: skip
        tl.debug_barrier()
        acc, m_i, l_i = attend_pages(
            row_q, stride_qh, stride_qd, row_k, row_v, row_ids, row_mask, table_ptr, stride_table,
            stride_kp, stride_kt, stride_vp, stride_vt,
            pid_b, pid_h * G, start, end, 0, first_pos, last_pos, scale, softcap,
            P, D, DV, BD, BDV, G, GP, BLOCK_T, STAGES, False, HAS_MASK, HAS_TABLE, HAS_SOFTCAP,
        )  # fmt: skip
    finish_row(
        acc, m_i, l_i, out_ptr + pid_b * stride_ob, stride_oh, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, row, pid_h * G,
        split, DV, BDV, G, GP, SPLITS, HAS_SINKS,
    )  # fmt: skip


class Scratch(NamedTuple):
    """What the first launch leaves to the second."""

    scores: torch.Tensor
    peaks: torch.Tensor


def _launch_score(q, k, v, stats, new, scratch, scoring, selection, *, config, dense_pages, weight, scale, where, pdl):
    """Append and score; `where` holds lengths, mask and page table."""
    num_pages, num_peaks = scratch.scores.shape[-1], scratch.peaks.shape[-1]
    batch, num_kv_heads, page_size = q.shape[0], k.shape[1], config.page_size
    lens, starts, mask, table = where
    tensors, strides = stats_arguments(stats, config.stats_dtype, table is not None)
    programs = triton.cdiv(num_pages, scoring.block_n * scoring.blocks) + (new is not None)
    block_dv = triton.next_power_of_2(v.shape[-1])
    _unique_score_fwd_kernel[(programs, num_kv_heads, batch)](
        q, k, v, *(new or (None, None)), *tensors, *scratch, *where,
        q.stride(0), q.stride(1), q.stride(-1),
        *token_strides(k, table is not None, page_size), *token_strides(v, table is not None, page_size),
        *((0, 0, 0, 0) if new is None else (*new[0].stride()[:2], *new[1].stride()[:2])), *strides,
        *(stride_of(x) for x in where),
        num_pages, num_peaks, capacity_of(k, table, page_size), dense_pages, weight, scale,
        P=page_size, DV=v.shape[-1], BDV=block_dv, **scoring.constants,
        SINK=config.sink_pages, RECENT=config.recent_pages, GS=selection.group_size,
        BLOCK_N=scoring.block_n, BLOCKS=scoring.blocks,
        HAS_LENS=lens is not None, HAS_STARTS=starts is not None, HAS_MASK=mask is not None,
        HAS_TABLE=table is not None, APPEND=new is not None, PDL=pdl, num_warps=scoring.num_warps,
    )  # fmt: skip


def _launch_attend(call, scratch, page_ids, launch, selection, *, config, capacity, dense_pages, scale, softcap, pdl):
    """Select and attend."""
    batch, num_kv_heads, num_pages = scratch.scores.shape
    rows, num_kept = batch * num_kv_heads, config.num_kept
    groups = torch.empty((rows * launch.splits, selection.groups), dtype=torch.int32, device=page_ids.device)
    _unique_decode_fwd_kernel[(launch.splits, num_kv_heads, batch)](
        *call.tensors, *scratch, page_ids, groups, *call.strides,
        num_pages, scratch.peaks.shape[-1], capacity, dense_pages, scale, softcap or 0.0,
        K=num_kept, BLOCK_K=triton.next_power_of_2(num_kept), SINK=config.sink_pages, RECENT=config.recent_pages,
        GS=selection.group_size, GROUPS=selection.groups, TILE=selection.tile, SINGLE=selection.single,
        **call.constants, PDL=pdl, num_warps=launch.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def unique_decode(
    q, k, v, stats, out, page_ids, *, config, score_weight, softmax_scale, softcap, sinks, seq_lens, seq_starts,
    token_mask, page_table, dense_below, counters, new,
):  # fmt: skip
    """Fills `out [B, H, 1, DV]` and `page_ids [B, HK, K]`; with `new` keys and values the cache and `stats` too."""
    batch, num_kv_heads, page_size = q.shape[0], k.shape[1], config.page_size
    num_pages = stats.codes.shape[2] if page_table is None else page_table.shape[1]
    selection = plan_selection(num_pages, config.num_kept - config.sink_pages - config.recent_pages)
    dense_pages = max(config.num_kept, dense_below // page_size)
    target = target_of(q.device)
    naming = {"score": config.score, "group_reduce": config.group_reduce, "stats_dtype": config.stats_dtype}
    scoring = plan_scoring(q, stats, num_pages, **naming)
    shape = (batch, num_kv_heads)
    scratch = Scratch(
        torch.empty((*shape, num_pages), dtype=torch.float32, device=q.device),
        torch.empty((*shape, selection.peaks(num_pages)), dtype=torch.float32, device=q.device),
    )
    lengths = {"seq_lens": seq_lens, "seq_starts": seq_starts}
    stored = {"page_size": page_size, "page_table": page_table}
    # the tile of the appended page costs registers: worth a launch less where few rows leave the device idle anyway
    few = batch * num_kv_heads <= target.num_sms and page_size * scoring.constants["BD"] <= 2048
    together = few and not scoring.per_head
    if new is not None and not together:
        named = {"score": config.score, "stats_dtype": config.stats_dtype, "token_mask": token_mask}
        append_tokens(k, v, stats, *new, **lengths, **stored, **named)
        new = None
    pdl = not scoring.per_head and target.dependent_launch
    if scoring.per_head:
        scaling = {"score_weight": score_weight, "softmax_scale": softmax_scale}
        page_scores(q, stats, scratch.scores, **naming, **lengths, **stored, **scaling)
        forced = {"sink_pages": config.sink_pages, "recent_pages": config.recent_pages}
        write_peaks(*scratch, selection, page_size=page_size, **forced, **lengths)
    else:
        _launch_score(
            q, k, v, stats, new, scratch, scoring, selection, config=config, dense_pages=dense_pages,
            weight=score_weight, scale=softmax_scale, where=(seq_lens, seq_starts, token_mask, page_table), pdl=pdl,
        )  # fmt: skip
    tokens = min(dense_pages, num_pages) * page_size
    launch = launch_decode(batch * num_kv_heads, tokens, row_bytes(k, v), target.num_sms)
    call = plan_attention(
        q, k, v, out, launch, **lengths, **stored, token_mask=token_mask, softcap=softcap, sinks=sinks,
        counters=counters,
    )  # fmt: skip
    _launch_attend(
        call, scratch, page_ids, launch, selection, config=config, dense_pages=dense_pages,
        capacity=capacity_of(k, page_table, page_size), scale=softmax_scale, softcap=softcap, pdl=pdl,
    )  # fmt: skip
