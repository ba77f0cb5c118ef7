"""One decode step: score, select, attend (Eq. 2 to 5), in one launch for many rows, in two for few.

With many rows one program scores a block of pages, and the last program of a row goes on to select and attend while
other rows are still being scored: memory stays busy. With few rows the second launch spreads a row over the device;
each of its programs repeats the (cheap) selection and takes a slice of the result.

May import torch, triton and the other kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import FP8, row_end, row_start, target_of
from .page_score import Scoring, page_scores, plan_scoring, score_block, stats_arguments
from .page_select import list_all, plan_selection, select_row, write_peaks
from .page_stats import append_tokens, refresh_pages
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

SCORE_CONSTANTS = ("C", "BC", "NG", "KIND", "FORM", "VOTE", "DP4A", "NATIVE_FP8")


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


@triton.jit(do_not_specialize=["num_pages", "num_peaks", "capacity", "dense_pages"])
def _unique_decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, len_ptr, start_ptr, mask_ptr, table_ptr,
    codes_ptr, scales_ptr, spread_ptr, k_new_ptr, v_new_ptr, scores_ptr, peaks_ptr, ids_ptr, groups_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_vb, stride_vh, stride_vp, stride_vt, stride_ob, stride_oh,
    stride_len, stride_start, stride_mask, stride_table,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    stride_nb, stride_nh, stride_wb, stride_wh,
    num_pages, num_peaks, capacity, dense_pages, weight, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    GS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr,
    FORM: tl.constexpr, VOTE: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    APPEND: tl.constexpr, SCORE: tl.constexpr, DECODE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 2 to 5, or a part.

    `SCORE`: program `(block of pages, kv head, row)` scores its pages; with `APPEND` one more program per row
    writes the new token and the statistics of its page, which is recent and so needs no score. `DECODE`: program
    `(split, kv head, row)` selects and attends. Both: the program that finishes a row's scores decodes the row.
    """
    pid = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    if PDL and SCORE:
        tl.extra.cuda.gdc_launch_dependents()
    row = pid_b * tl.num_programs(1) + pid_h
    end = row_end(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
    last_page = tl.cdiv(end, P)
    first_page = tl.minimum(start // P, last_page)
    row_q = q_ptr + pid_b * stride_qb
    row_k = k_ptr + pid_b * stride_kb + pid_h * stride_kh
    row_v = v_ptr + pid_b * stride_vb + pid_h * stride_vh
    row_scores = scores_ptr + row * num_pages
    row_peaks = peaks_ptr + row * num_peaks
    row_mask = mask_ptr
    if HAS_MASK:
        row_mask += pid_b * stride_mask
    split = pid
    ready = True
    if SCORE:
        split = 0
        row_c = codes_ptr + pid_b * stride_cb + pid_h * stride_ch
        row_s = scales_ptr
        if KIND >= FP8:
            row_s += pid_b * stride_sb + pid_h * stride_sh
        row_d = spread_ptr + pid_b * stride_db + pid_h * stride_dh
        # programs beyond the end of a row leave at once: the others are counted
        blocks = tl.cdiv(last_page, BLOCK_N)
        ready = pid < tl.maximum(blocks, 1)
        if ready and last_page - first_page > dense_pages:
            score_block(
                row_q, row_c, row_s, row_d, row_scores, row_peaks, table_ptr,
                stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_dp, 0, stride_table,
                pid_b, pid_h, pid * BLOCK_N, first_page, last_page, num_pages, weight, scale,
                D, BD, C, BC, NG, G, SINK, RECENT, GS, BLOCK_N, KIND, FORM, VOTE, HAS_TABLE, True,
                DP4A, NATIVE_FP8,
            )  # fmt: skip
        if APPEND:
            if pid == tl.num_programs(0) - 1:
                ready = True
                refresh_pages(
                    row_k, k_new_ptr + pid_b * stride_nb + pid_h * stride_nh,
                    row_v, v_new_ptr + pid_b * stride_wb + pid_h * stride_wh, row_c, row_s, row_d, row_mask,
                    table_ptr, stride_table, stride_kp, stride_kt, 0, stride_vp, stride_vt, 0, stride_cp, stride_cv,
                    stride_sp, stride_sv, stride_dp, pid_b, tl.maximum(end - 1, 0) // P, last_page, start, end, 1,
                    P, D, DV, C, BC, BDV, NG, 1, KIND, FORM, True, HAS_MASK, HAS_TABLE,
                )  # fmt: skip
        if DECODE and ready:
            tl.debug_barrier()
            arrivals = tl.maximum(blocks, 1) + (1 if APPEND else 0)
            ready = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel", scope="gpu") == arrivals - 1
            if ready:
                tl.store(counter_ptr + row, 0)
    if PDL and DECODE:
        tl.extra.cuda.gdc_wait()
    if DECODE and ready:
        _row_decode(
            row_q, row_k, row_v,
            row_scores, row_peaks, ids_ptr + row * K, groups_ptr + (row * SPLITS + split) * GROUPS,
            out_ptr + pid_b * stride_ob, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, row_mask, table_ptr,
            stride_qh, stride_qd, stride_kp, stride_kt, stride_vp, stride_vt, stride_oh, stride_table,
            pid_b, pid_h, row, split, start, end, first_page, last_page, dense_pages, scale, softcap,
            P, D, DV, BD, BDV, G, GP, K, BLOCK_K, SINK, RECENT, GS, GROUPS, TILE, SINGLE, BLOCK_T, STAGES, SPLITS,
            HAS_MASK, HAS_TABLE, HAS_SOFTCAP, HAS_SINKS,
        )  # fmt: skip


class Plan(NamedTuple):
    """How a decode step is launched: fused or in two parts, warps and pages of a score program, the attention part."""

    fused: bool
    score_warps: int
    score_block: int
    launch: Launch


def plan_decode(rows: int, tokens: int, row_bytes: int, num_sms: int, scoring: Scoring) -> Plan:
    """Fuses where rows alone fill the device twice; otherwise splits rows until they do."""
    if rows >= 2 * num_sms and not scoring.per_head:
        launch = Launch(64 if row_bytes > 256 else 128, 2, 8, 1)
        block = scoring.block_n // scoring.num_warps * launch.num_warps
        return Plan(True, launch.num_warps, min(1024, block), launch)
    return Plan(False, scoring.num_warps, scoring.block_n, launch_decode(rows, tokens, row_bytes, num_sms))


def unique_decode(
    q, k, v, stats, out, page_ids, *, config, score_weight, softmax_scale, softcap, sinks, seq_lens, seq_starts,
    token_mask, page_table, dense_below, counters, new,
):  # fmt: skip
    """Fills `out [B, H, 1, DV]` and `page_ids [B, HK, K]`; with `new` keys and values the cache and `stats` too."""
    batch, num_kv_heads = q.shape[0], k.shape[1]
    rows, page_size, num_kept = batch * num_kv_heads, config.page_size, config.num_kept
    num_pages = stats.codes.shape[2] if page_table is None else page_table.shape[1]
    selection = plan_selection(num_pages, num_kept - config.sink_pages - config.recent_pages)
    dense_pages = max(num_kept, dense_below // page_size)
    target = target_of(q.device)
    naming = {"score": config.score, "group_reduce": config.group_reduce, "stats_dtype": config.stats_dtype}
    scoring = plan_scoring(q, stats, **naming)
    tokens = min(dense_pages, num_pages) * page_size
    plan = plan_decode(rows, tokens, row_bytes(k, v), target.num_sms, scoring)
    scratch = {"dtype": torch.float32, "device": q.device}
    scores = torch.empty((batch, num_kv_heads, num_pages), **scratch)
    peaks = torch.empty((batch, num_kv_heads, selection.peaks(num_pages)), **scratch)
    groups = torch.empty((rows * plan.launch.splits, selection.groups), dtype=torch.int32, device=q.device)
    lengths = {"seq_lens": seq_lens, "seq_starts": seq_starts}
    stored = {"page_size": page_size, "page_table": page_table}
    # the tile of the appended page must not cost the score programs their registers
    together = not scoring.per_head and page_size * scoring.constants["BD"] <= 1024 * plan.score_warps
    if new is not None and not together:
        named = {"score": config.score, "stats_dtype": config.stats_dtype, "token_mask": token_mask}
        append_tokens(k, v, stats, *new, **lengths, **stored, **named)
        new = None
    if scoring.per_head:
        page_scores(
            q, stats, scores, **naming, **lengths, **stored, score_weight=score_weight, softmax_scale=softmax_scale
        )
        forced = {"sink_pages": config.sink_pages, "recent_pages": config.recent_pages}
        write_peaks(scores, peaks, selection, page_size=page_size, **forced, **lengths)
    call = plan_attention(
        q, k, v, out, plan.launch, **lengths, **stored, token_mask=token_mask, softcap=softcap, sinks=sinks,
        counters=counters,
    )  # fmt: skip
    tensors, strides = stats_arguments(stats, config.stats_dtype, page_table is not None)
    new_strides = (0, 0, 0, 0) if new is None else (*new[0].stride()[:2], *new[1].stride()[:2])
    blocks = triton.cdiv(num_pages, plan.score_block) + (new is not None)
    dependent = not plan.fused and not scoring.per_head and target.dependent_launch

    def launch(programs: int, num_warps: int, score: bool, decode: bool, **options):
        _unique_decode_fwd_kernel[(programs, num_kv_heads, batch)](
            *call.tensors, *tensors, *(new or (None, None)), scores, peaks, page_ids, groups,
            *call.strides, *strides, *new_strides,
            num_pages, peaks.shape[-1], capacity_of(k, page_table, page_size), dense_pages,
            score_weight, softmax_scale, softcap or 0.0,
            K=num_kept, BLOCK_K=triton.next_power_of_2(num_kept), SINK=config.sink_pages, RECENT=config.recent_pages,
            GS=selection.group_size, GROUPS=selection.groups, TILE=selection.tile, SINGLE=selection.single,
            **call.constants, **{name: scoring.constants[name] for name in SCORE_CONSTANTS},
            BLOCK_N=plan.score_block, APPEND=new is not None, SCORE=score, DECODE=decode, PDL=dependent,
            num_warps=num_warps, **options,
        )  # fmt: skip

    if plan.fused:
        launch(blocks, plan.launch.num_warps, True, True)
        return
    if not scoring.per_head:
        launch(blocks, plan.score_warps, True, False)
    launch(plan.launch.splits, plan.launch.num_warps, False, True, **({"launch_pdl": True} if dependent else {}))
