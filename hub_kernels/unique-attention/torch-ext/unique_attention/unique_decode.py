"""One decode step: score, select, attend (Eq. 2 to 5), in one launch for many rows, in two for few.

With many rows one program scores a block of pages, and the last program of a row goes on to select and attend while
other rows are still being scored: memory stays busy. With few rows the second launch spreads a row over the device;
each of its programs repeats the (cheap) selection and takes a slice of the result.

May import torch, triton and the other kernels.
"""

import torch
import triton
import triton.language as tl

from ._common import FP8, row_end, row_start, target_of
from .page_score import page_scores, plan_scoring, score_block, stats_arguments
from .page_select import list_all, plan_selection, select_row
from .sparse_decode import (
    Launch,
    attend_pages,
    capacity_of,
    finish_row,
    launch_decode,
    plan_attention,
    row_bytes,
    split_of,
)


@triton.jit
def _row_decode(
    q_ptr, k_ptr, v_ptr, scores_ptr, peaks_ptr, ids_ptr, groups_ptr, out_ptr, acc_ptr, ml_ptr, counter_ptr, sinks_ptr,
    mask_ptr, table_ptr,
    stride_qh, stride_qd, stride_kp, stride_kt, stride_vp, stride_vt, stride_oh, stride_table,
    b, h, row, split, start, end, first_page, last_page, dense_pages, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_TABLE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Eq. 4 and 5 for one split of a row; up to `dense_pages` pages it attends to all. The pointers are the row's."""
    count = last_page - first_page
    pages_per_tile: tl.constexpr = 1 if P > BLOCK_T else BLOCK_T // P
    if count <= dense_pages:
        if split == 0:
            list_all(ids_ptr, first_page, count, K, BLOCK_K)
        first_pos, last_pos = split_of(count, split, SPLITS, pages_per_tile)
        acc, m_i, l_i = attend_pages(
            q_ptr, stride_qh, stride_qd, k_ptr, v_ptr, ids_ptr, mask_ptr, table_ptr, stride_table,
            stride_kp, stride_kt, stride_vp, stride_vt,
            b, h * G, start, end, first_page, first_pos, last_pos, scale, softcap,
            P, D, DV, BD, BDV, G, GP, BLOCK_T, STAGES, True, HAS_MASK, HAS_TABLE, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        first_pos, last_pos = split_of(K, split, SPLITS, pages_per_tile)
        select_row(
            scores_ptr, peaks_ptr, ids_ptr, groups_ptr, first_page, last_page, first_pos, last_pos,
            K, BLOCK_K, SINK, RECENT, GS, GROUPS, TILE, SINGLE,
        )  # fmt: skip
        tl.debug_barrier()
        acc, m_i, l_i = attend_pages(
            q_ptr, stride_qh, stride_qd, k_ptr, v_ptr, ids_ptr, mask_ptr, table_ptr, stride_table,
            stride_kp, stride_kt, stride_vp, stride_vt,
            b, h * G, start, end, 0, first_pos, last_pos, scale, softcap,
            P, D, DV, BD, BDV, G, GP, BLOCK_T, STAGES, False, HAS_MASK, HAS_TABLE, HAS_SOFTCAP,
        )  # fmt: skip
    finish_row(
        acc, m_i, l_i, out_ptr, stride_oh, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, row, h * G, split,
        DV, BDV, G, GP, SPLITS, HAS_SINKS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pages", "capacity", "dense_pages"])
def _unique_decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, len_ptr, start_ptr, mask_ptr, table_ptr,
    codes_ptr, scales_ptr, spread_ptr, scores_ptr, peaks_ptr, ids_ptr, groups_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_vb, stride_vh, stride_vp, stride_vt, stride_ob, stride_oh,
    stride_len, stride_start, stride_mask, stride_table,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    num_pages, num_peaks, capacity, dense_pages, weight, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
    FORM: tl.constexpr, VOTE: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, SCORE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 2 to 5 if `SCORE`: program `(block of pages, kv head, row)` scores its pages, the last of a row decodes it.

    Otherwise Eq. 4 and 5: program `(split, kv head, row)` decodes its share of a row whose scores are there.
    """
    pid = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    row = pid_b * tl.num_programs(1) + pid_h
    end = row_end(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
    last_page = tl.cdiv(end, P)
    first_page = tl.minimum(start // P, last_page)
    row_q = q_ptr + pid_b * stride_qb
    row_scores = scores_ptr + row * num_pages
    row_peaks = peaks_ptr + row * num_peaks
    split = pid
    ready = True
    if SCORE:
        split = 0
        begin = pid * BLOCK_N
        # programs beyond the end of a row leave at once: the others are counted
        blocks = tl.maximum(tl.cdiv(last_page, BLOCK_N), 1)
        ready = pid < blocks
        if ready:
            if last_page - first_page > dense_pages:
                row_s = scales_ptr
                if KIND >= FP8:
                    row_s += pid_b * stride_sb + pid_h * stride_sh
                score_block(
                    row_q, codes_ptr + pid_b * stride_cb + pid_h * stride_ch, row_s,
                    spread_ptr + pid_b * stride_db + pid_h * stride_dh, row_scores, row_peaks, table_ptr,
                    stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp, 0, stride_table,
                    pid_b, pid_h, begin, first_page, last_page, num_pages, weight, scale,
                    D, BD, C, BC, NG, G, SINK, RECENT, GS, BLOCK_N, KIND, FORM, VOTE, HAS_TABLE, True,
                    DP4A, NATIVE_FP8,
                )  # fmt: skip
            tl.debug_barrier()
            ready = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel", scope="gpu") == blocks - 1
            if ready:
                tl.store(counter_ptr + row, 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ready:
        row_mask = mask_ptr
        if HAS_MASK:
            row_mask += pid_b * stride_mask
        _row_decode(
            row_q, k_ptr + pid_b * stride_kb + pid_h * stride_kh, v_ptr + pid_b * stride_vb + pid_h * stride_vh,
            row_scores, row_peaks, ids_ptr + row * K, groups_ptr + (row * SPLITS + split) * GROUPS,
            out_ptr + pid_b * stride_ob, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, row_mask, table_ptr,
            stride_qh, stride_qd, stride_kp, stride_kt, stride_vp, stride_vt, stride_oh, stride_table,
            pid_b, pid_h, row, split, start, end, first_page, last_page, dense_pages, scale, softcap,
            P, D, DV, BD, BDV, G, GP, K, BLOCK_K, SINK, RECENT, GS, GROUPS, TILE, SINGLE, BLOCK_T, STAGES, SPLITS,
            HAS_MASK, HAS_TABLE, HAS_SOFTCAP, HAS_SINKS,
        )  # fmt: skip


def launch_unique(rows: int, tokens: int, row_bytes: int, num_sms: int) -> tuple[bool, Launch, int]:
    """Whether to fuse the score pass, launch settings, and how many score blocks one warp of a fused program takes."""
    if rows >= 2 * num_sms:
        block_t = 64 if row_bytes > 256 else 128
        return True, Launch(block_t, 2, 8, 1), 1
    return False, launch_decode(rows, tokens, row_bytes, num_sms), 1


def unique_decode(
    q, k, v, stats, out, page_ids, *, config, score_weight, softmax_scale, softcap, sinks, seq_lens, seq_starts,
    token_mask, page_table, dense_below, counters,
):  # fmt: skip
    """Fills `out [B, H, 1, DV]` and `page_ids [B, HK, K]`."""
    batch, num_kv_heads = q.shape[0], k.shape[1]
    rows, page_size, num_kept = batch * num_kv_heads, config.page_size, config.num_kept
    capacity = capacity_of(k, page_table, page_size)
    num_pages = stats.codes.shape[2] if page_table is None else page_table.shape[1]
    plan = plan_selection(num_pages, num_kept - config.sink_pages - config.recent_pages)
    dense_pages = max(num_kept, dense_below // page_size)
    target = target_of(q.device)
    tokens = min(max(num_kept, dense_pages), num_pages) * page_size
    fused, launch, share = launch_unique(rows, tokens, row_bytes(k, v), target.num_sms)
    naming = {"score": config.score, "group_reduce": config.group_reduce, "stats_dtype": config.stats_dtype}
    scoring = plan_scoring(q, stats, **naming)
    fused = fused and not scoring.per_head
    scratch = {"dtype": torch.float32, "device": q.device}
    scores = torch.empty((batch, num_kv_heads, num_pages), **scratch)
    peaks = torch.empty((batch, num_kv_heads, plan.peaks(num_pages)), **scratch)
    groups = torch.empty((rows * launch.splits, plan.groups), dtype=torch.int32, device=q.device)
    lengths = {"seq_lens": seq_lens, "seq_starts": seq_starts, "page_table": page_table}
    if not fused:
        page_scores(
            q, stats, scores, **naming, **lengths, page_size=page_size, score_weight=score_weight,
            softmax_scale=softmax_scale, peaks=peaks, plan=plan, sink_pages=config.sink_pages,
            recent_pages=config.recent_pages, dense_pages=dense_pages,
        )  # fmt: skip
    call = plan_attention(
        q, k, v, out, launch, **lengths, page_size=page_size, token_mask=token_mask, softcap=softcap, sinks=sinks,
        counters=counters,
    )  # fmt: skip
    tensors, strides = stats_arguments(stats, config.stats_dtype, page_table is not None)
    block_n = max(16, min(1024, scoring.block_n // scoring.num_warps * launch.num_warps * share))
    dependent = not fused and not scoring.per_head and target.dependent_launch
    grid = (triton.cdiv(num_pages, block_n) if fused else launch.splits, num_kv_heads, batch)
    _unique_decode_fwd_kernel[grid](
        *call.tensors, *tensors, scores, peaks, page_ids, groups, *call.strides, *strides,
        num_pages, peaks.shape[-1], capacity, dense_pages, score_weight, softmax_scale, softcap or 0.0,
        K=num_kept, BLOCK_K=triton.next_power_of_2(num_kept), SINK=config.sink_pages, RECENT=config.recent_pages,
        GS=plan.group_size, GROUPS=plan.groups, TILE=plan.tile, SINGLE=plan.single, **call.constants,
        **{name: scoring.constants[name] for name in ("C", "BC", "NG", "KIND", "FORM", "VOTE", "DP4A", "NATIVE_FP8")},
        BLOCK_N=block_n, SCORE=fused, PDL=dependent, num_warps=launch.num_warps,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
