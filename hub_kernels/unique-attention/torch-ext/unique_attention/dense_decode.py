"""Decode attention over all pages of rows (Eq. 5), with the statistics of their last page (Eq. 1), in one launch.

May import torch, triton and the other kernels.
"""

import triton
import triton.language as tl

from ._common import (
    FP8,
    row_extent,
    stats_arguments,
)
from .page_select import list_all
from .page_stats import refresh_pages, stats_sizes, write_token
from .sparse_decode import ALL_ROWS, Attending, Launch, attend_pages, load_query, load_token, new_strides
from .split_rows import finish_row, split_of


@triton.jit(do_not_specialize=[
    "capacity", "stride_mask", "stride_table", "stride_sb", "stride_sh", "stride_db", "stride_dh"
])  # fmt: skip
def _dense_decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, ml_ptr, counter_ptr, sinks_ptr, len_ptr, start_ptr, mask_ptr, table_ptr,
    ids_ptr, k_new_ptr, v_new_ptr, codes_ptr, scales_ptr, spread_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_vb, stride_vh, stride_vp, stride_vt, stride_ob, stride_oh,
    stride_len, stride_start, stride_mask, stride_table, stride_ib, stride_ih,
    stride_nb, stride_nh, stride_wb, stride_wh,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    capacity, scale, softcap,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, GM: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_NEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 5. Program `(split, kv head, row)` attends to its slice of the pages of the row.

    The last token of a row may be `HAS_NEW`, not in the cache yet: then one more program per row refreshes the
    statistics of its page (Eq. 1).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    # what needs no length is asked for first
    q = load_query(q_ptr + pid_b * stride_qb, stride_qh, stride_qd, pid_h * G, k_ptr.dtype.element_ty, D, BD, G, GP)
    row_n = k_new_ptr
    row_w = v_new_ptr
    if HAS_NEW:
        row_n += pid_b * stride_nb + pid_h * stride_nh
        row_w += pid_b * stride_wb + pid_h * stride_wh
        key, value = load_token(row_n, row_w, D, DV, BD, BDV)
    length, start, end, first_page, last_page = row_extent(
        len_ptr, start_ptr, stride_len, stride_start, pid_b, capacity, P, HAS_LENS, HAS_STARTS
    )
    row_k = k_ptr + pid_b * stride_kb + pid_h * stride_kh
    row_v = v_ptr + pid_b * stride_vb + pid_h * stride_vh
    row_mask = mask_ptr
    if HAS_MASK:
        row_mask += pid_b * stride_mask
    if split < SPLITS:
        count = last_page - first_page
        if split == 0:
            list_all(ids_ptr + pid_b * stride_ib + pid_h * stride_ih, first_page, count, K, BLOCK_K)
        first_pos, last_pos = split_of(count, split, SPLITS, 1 if P > BLOCK_T else BLOCK_T // P)
        if HAS_NEW:
            # the program of the last pages writes the new token, which it reads
            last = ((first_pos < count) & (last_pos == count)) | ((count == 0) & (split == 0))
            if last & (length > 0) & (length <= capacity):
                write_token(
                    key, value, row_k, row_v, table_ptr, stride_table, stride_kp, stride_kt, stride_vp, stride_vt,
                    pid_b, length - 1, P, D, DV, BD, BDV, HAS_TABLE,
                )  # fmt: skip
                tl.debug_barrier()
        acc, m_i, l_i = attend_pages(
            q, row_k, row_v, ids_ptr, row_mask, table_ptr, stride_table, stride_kp, stride_kt, stride_vp, stride_vt,
            pid_b, start, end, first_page, first_pos, last_pos, True, scale, softcap,
            P, D, DV, BD, BDV, GP, BLOCK_T, STAGES, ALL_ROWS, HAS_MASK, HAS_TABLE, HAS_SOFTCAP,
        )  # fmt: skip
        finish_row(
            acc, m_i, l_i, out_ptr + pid_b * stride_ob, stride_oh, acc_ptr, ml_ptr, counter_ptr, sinks_ptr,
            pid_b * tl.num_programs(1) + pid_h, pid_h * G, split,
            DV, BDV, G, GP, GM, SPLITS, AT_ONCE, HAS_SINKS, False,
        )  # fmt: skip
    elif HAS_NEW:
        if (length > 0) & (length <= capacity):
            row_s = scales_ptr
            if KIND >= FP8:
                row_s += pid_b * stride_sb + pid_h * stride_sh
            refresh_pages(
                row_k, row_n, row_v, row_w, codes_ptr + pid_b * stride_cb + pid_h * stride_ch, row_s,
                spread_ptr + pid_b * stride_db + pid_h * stride_dh, row_mask, table_ptr, stride_table,
                stride_kp, stride_kt, 0, stride_vp, stride_vt, 0, stride_cp, stride_cv, stride_sp, stride_sv,
                stride_dp, pid_b, (length - 1) // P, 0, last_page, start, end, length - 1,
                P, D, DV, C, BC, BDV, NG, 1, KIND, FORM, True, False, HAS_MASK, HAS_TABLE,
            )  # fmt: skip


def launch_dense(
    call: Attending, page_ids, launch: Launch, stats, *, capacity, softmax_scale, softcap, new, score, stats_dtype, pdl
):
    """One attention pass over all pages of all rows, into the `out` of the call and `page_ids`.

    A token in `new` keys and values is the last one of its row: it goes to the cache, and into `stats`.
    """
    batch, num_kv_heads, num_kept = page_ids.shape
    tensors, strides = stats_arguments(stats, stats_dtype, call.constants["HAS_TABLE"])
    _dense_decode_fwd_kernel[(launch.splits + (new is not None), num_kv_heads, batch)](
        *call.tensors, page_ids, *(new or (None, None)), *tensors,
        *call.strides, *page_ids.stride()[:2], *new_strides(new), *strides,
        capacity, softmax_scale, softcap or 0.0,
        K=num_kept, BLOCK_K=triton.next_power_of_2(num_kept), **call.constants,
        **stats_sizes(call.constants["D"], score=score, stats_dtype=stats_dtype),
        HAS_NEW=new is not None, PDL=pdl,
        num_warps=launch.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
