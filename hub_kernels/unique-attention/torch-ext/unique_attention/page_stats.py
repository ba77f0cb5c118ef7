"""Page statistics (Eq. 1): recompute pages from cached keys, or append tokens and refresh the pages they touch.

May import torch, triton and `_common`.
"""

import triton
import triton.language as tl

from ._common import (
    BF16,
    FORM,
    FP8,
    FP32,
    INT8,
    KIND,
    MINMAX,
    ROUND,
    SCALAR,
    encode_fp8,
    end_in_order,
    int4_dims,
    physical_page,
    round_up_bf16,
    row_end,
    row_length,
    row_start,
    stats_arguments,
    stride_of,
    token_strides,
)


@triton.jit
def _store_codes(
    x,  # [NPG, 2, BC] float32
    codes_ptr,  # of this vector, row and head
    scales_ptr,
    page_offs_c,  # [NPG] offsets of the pages
    page_offs_s,
    mask_page,
    D: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    NG: tl.constexpr,
    KIND: tl.constexpr,
):
    """Quantises one vector per page and stores codes and scales. The dims are in the order of int4 bytes."""
    offs_h = tl.arange(0, 2)[None, :, None]
    offs_c = tl.arange(0, BC)[None, None, :]
    dims = int4_dims(offs_c, offs_h, C)  # [1, 2, BC]
    mask_dim = (offs_c < C) & (dims < D)
    mask = mask_page[:, None, None] & mask_dim
    out = codes_ptr + page_offs_c[:, None, None] + dims
    if KIND == FP32 or KIND == BF16:
        tl.store(out, x.to(codes_ptr.dtype.element_ty), mask=mask)
    elif KIND == FP8 or KIND == INT8:
        absmax = tl.max(tl.max(tl.abs(x), axis=2), axis=1)  # [NPG]
        scale = round_up_bf16(tl.div_rn(absmax, tl.full(absmax.shape, 448.0 if KIND == FP8 else 127.0, tl.float32)))
        divisor = tl.where(scale > 0, scale, 1.0)[:, None, None]
        scaled = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
        tl.store(scales_ptr + page_offs_s, scale.to(scales_ptr.dtype.element_ty), mask=mask_page)
        if KIND == FP8:
            tl.store(out, encode_fp8(scaled), mask=mask)
        else:
            tl.store(out, ((scaled + ROUND) - ROUND).to(tl.int8), mask=mask)
    else:
        scale = tl.zeros_like(x)
        for g in tl.static_range(NG):
            in_group = tl.broadcast_to(((dims // 32) == g) & mask_dim, x.shape)
            absmax = tl.max(tl.max(tl.where(in_group, tl.abs(x), 0.0), axis=2), axis=1)
            scale_g = round_up_bf16(tl.div_rn(absmax, tl.full(absmax.shape, 7.0, tl.float32)))
            tl.store(scales_ptr + page_offs_s + g, scale_g.to(scales_ptr.dtype.element_ty), mask=mask_page)
            scale = tl.where(in_group, scale_g[:, None, None], scale)
        scaled = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
        code = ((scaled + ROUND) - ROUND).to(tl.int32) + 8
        packed = tl.sum(tl.where(offs_h == 0, code, code << 4), axis=1)  # [NPG, BC]
        offs_byte = tl.arange(0, BC)[None, :]
        tl.store(
            codes_ptr + page_offs_c[:, None] + offs_byte,
            packed.to(tl.uint8),
            mask=mask_page[:, None] & (offs_byte < C),
        )


@triton.jit
def _read_token(
    k_ptr, k_new_ptr, mask_ptr, physical, stride_kp, stride_kt, stride_nt, slots, in_page, mask_page, dims, mask_dim,
    start, end, first_new, APPEND: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One token of each page, float32 `[NPG, 2, BC]` and zero where it does not count, and whether it does."""
    valid = mask_page & (slots >= start) & (slots < end)
    if HAS_MASK:
        valid &= tl.load(mask_ptr + slots, mask=valid, other=0, cache_modifier=".cg")
    seen = valid[:, None, None] & mask_dim
    # past the first cache wherever a dependent launch may not have waited for anything yet
    where_k = k_ptr + (physical * stride_kp + in_page * stride_kt)[:, None, None] + dims
    if APPEND:
        old = tl.load(where_k, mask=seen & (slots < first_new)[:, None, None], other=0.0, cache_modifier=".cg")
        is_new = seen & (slots >= first_new)[:, None, None]
        token_n = (slots - first_new).to(tl.int64) * stride_nt
        fresh = tl.load(k_new_ptr + token_n[:, None, None] + dims, mask=is_new, other=0.0, cache_modifier=".cg")
        key = tl.where(is_new, fresh, old)
    else:
        key = tl.load(where_k, mask=seen, other=0.0)
    return key.to(tl.float32), valid, seen


@triton.jit
def _write_tokens(
    k_ptr, k_new_ptr, v_ptr, v_new_ptr, physical, mask_page, pages, end, first_new,
    stride_kp, stride_kt, stride_nt, stride_vp, stride_vt, stride_wt,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr, BDV: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes the tokens from `first_new` on that lie in these pages."""
    offs_d = tl.arange(0, 2 * BC)[None, :]
    offs_v = tl.arange(0, BDV)[None, :]
    # most pages of an append have one new token, and it comes late
    for t in tl.range(tl.maximum(first_new - tl.max(pages, axis=0) * P, 0), P, loop_unroll_factor=UNROLL):
        slots = pages * P + t
        is_new = (mask_page & (slots >= first_new) & (slots < end))[:, None]
        token = (slots - first_new).to(tl.int64)[:, None]
        key = tl.load(k_new_ptr + token * stride_nt + offs_d, mask=is_new & (offs_d < D), cache_modifier=".cg")
        value = tl.load(v_new_ptr + token * stride_wt + offs_v, mask=is_new & (offs_v < DV), cache_modifier=".cg")
        tl.store(k_ptr + (physical * stride_kp + t * stride_kt)[:, None] + offs_d, key, mask=is_new & (offs_d < D))
        tl.store(v_ptr + (physical * stride_vp + t * stride_vt)[:, None] + offs_v, value, mask=is_new & (offs_v < DV))


@triton.jit
def refresh_pages(
    k_ptr, k_new_ptr, v_ptr, v_new_ptr, codes_ptr, scales_ptr, spread_ptr, mask_ptr, table_ptr, stride_table,
    stride_kp, stride_kt, stride_nt, stride_vp, stride_vt, stride_wt, stride_cp, stride_cv, stride_sp, stride_sv,
    stride_dp, b, page_begin, first_page, last_page, start, end, first_new,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BDV: tl.constexpr,
    NG: tl.constexpr, NPG: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, APPEND: tl.constexpr,
    WRITE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Eq. 1 for pages `page_begin .. page_begin + NPG - 1` of a row; the pointers are those of the row.

    With `APPEND` the tokens from `first_new` on come from `k_new`, and `WRITE` writes them and their values to the
    cache. Tokens are added one by one, in order: the same numbers whatever the tile.
    """
    pages = page_begin + tl.arange(0, NPG)
    mask_page = (pages >= first_page) & (pages < last_page)
    physical = physical_page(table_ptr, stride_table, b, pages, mask_page, HAS_TABLE)
    dims = int4_dims(tl.arange(0, BC)[None, None, :], tl.arange(0, 2)[None, :, None], C)
    mask_dim = (tl.arange(0, BC)[None, None, :] < C) & (dims < D)
    # padded head dims run out of predicates sooner
    UNROLL: tl.constexpr = min(P, 16 if NPG == 1 and 2 * BC == D else 4)
    if WRITE:
        _write_tokens(
            k_ptr, k_new_ptr, v_ptr, v_new_ptr, physical, mask_page, pages, end, first_new,
            stride_kp, stride_kt, stride_nt, stride_vp, stride_vt, stride_wt, P, D, DV, BC, BDV, UNROLL,
        )  # fmt: skip
    count = tl.zeros((NPG,), tl.float32)
    total = tl.zeros((NPG,), tl.float32)
    if FORM == MINMAX:
        first = tl.full((NPG, 2, BC), float("-inf"), tl.float32)
        second = tl.full((NPG, 2, BC), float("inf"), tl.float32)
    else:
        first = tl.zeros((NPG, 2, BC), tl.float32)
        second = tl.zeros((NPG, 2, BC), tl.float32)
    origin = tl.zeros((NPG, 2, BC), tl.float32)
    for t in tl.range(P, loop_unroll_factor=UNROLL):
        key, valid, seen = _read_token(
            k_ptr, k_new_ptr, mask_ptr, physical, stride_kp, stride_kt, stride_nt, pages * P + t, t, mask_page, dims,
            mask_dim, start, end, first_new, APPEND, HAS_MASK,
        )  # fmt: skip
        if FORM == MINMAX:
            first = tl.where(seen, tl.maximum(first, key), first)
            second = tl.where(seen, tl.minimum(second, key), second)
        else:
            # sums of distances from the first token that counts: one pass, and exact where all tokens are equal
            origin = tl.where((count == 0.0)[:, None, None], key, origin)
            distance = tl.where(seen, key - origin, 0.0)
            first += distance
            second += distance * distance
        count += valid.to(tl.float32)
    if FORM == MINMAX:
        first = tl.where(first == float("-inf"), 0.0, first)
        second = tl.where(second == float("inf"), 0.0, second)
    else:
        # divided, not multiplied by a reciprocal: the same numbers as the reference
        divisor = tl.broadcast_to(tl.maximum(count, 1.0)[:, None, None], (NPG, 2, BC))
        shift = tl.div_rn(first, divisor)
        variance = tl.maximum(tl.div_rn(second - first * shift, divisor), 0.0)
        first = origin + shift
        second = tl.sqrt(variance)
        if FORM == SCALAR:
            total = tl.sqrt(tl.sum(tl.sum(variance, axis=2), axis=1))
    offs_pc = physical * stride_cp
    offs_ps = physical * stride_sp
    _store_codes(first, codes_ptr, scales_ptr, offs_pc, offs_ps, mask_page, D, C, BC, NG, KIND)
    if FORM > SCALAR:
        second_scales = scales_ptr
        if KIND >= FP8:
            second_scales += stride_sv
        _store_codes(second, codes_ptr + stride_cv, second_scales, offs_pc, offs_ps, mask_page, D, C, BC, NG, KIND)
    tl.store(spread_ptr + physical * stride_dp, total.to(spread_ptr.dtype.element_ty), mask=mask_page)


@triton.jit
def write_token(
    key, value, k_ptr, v_ptr, table_ptr, stride_table, stride_kp, stride_kt, stride_vp, stride_vt, b, slot,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Writes a row's new key and value to `slot`."""
    physical = physical_page(table_ptr, stride_table, b, slot // P, True, HAS_TABLE)
    offs_d = tl.arange(0, BD)
    offs_v = tl.arange(0, BDV)
    tl.store(k_ptr + physical * stride_kp + (slot % P) * stride_kt + offs_d, key, mask=offs_d < D)
    tl.store(v_ptr + physical * stride_vp + (slot % P) * stride_vt + offs_v, value, mask=offs_v < DV)


@triton.jit(do_not_specialize=[
    # strides of scales and spread change class with the number of pages
    "num_pages", "num_new", "capacity", "stride_mask", "stride_table",
    "stride_sb", "stride_sh", "stride_db", "stride_dh",
])  # fmt: skip
def _page_stats_fwd_kernel(
    k_ptr, k_new_ptr, v_ptr, v_new_ptr, codes_ptr, scales_ptr, spread_ptr,
    len_ptr, start_ptr, mask_ptr, table_ptr,
    stride_kb, stride_kh, stride_kp, stride_kt,
    stride_nb, stride_nh, stride_nt,
    stride_vb, stride_vh, stride_vp, stride_vt,
    stride_wb, stride_wh, stride_wt,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    stride_len, stride_start, stride_mask, stride_table,
    num_pages, num_new, capacity,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BDV: tl.constexpr,
    NG: tl.constexpr, NPG: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr,
    ONLY_NEW: tl.constexpr, APPEND: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 1. Program `(block of NPG pages, kv head, row)` writes the statistics of its pages.

    `ONLY_NEW` starts at the page of the first of the last `num_new` tokens; `APPEND` takes those tokens from `k_new`
    and `v_new` and writes them to the cache as well. `PDL`: the launches around it may run at the same time. They
    write the same token themselves and use no statistics that change here: that page is forced.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    end = row_end(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
    # a length beyond the capacity: the tokens that do not fit are dropped
    first_new = row_length(len_ptr, stride_len, pid_b, capacity, HAS_LENS) - num_new
    page_begin = tl.program_id(0) * NPG
    first_page = 0
    last_page = num_pages
    if ONLY_NEW:
        page_begin += tl.maximum(first_new, 0) // P
        last_page = tl.minimum(num_pages, tl.cdiv(end, P))
    elif HAS_TABLE:
        # entries of the table outside the row name nothing
        first_page = start // P
        last_page = tl.minimum(num_pages, tl.cdiv(end, P))
    if page_begin < last_page:
        row_s = scales_ptr
        if KIND >= FP8:
            row_s += pid_b * stride_sb + pid_h * stride_sh
        row_mask = mask_ptr
        if HAS_MASK:
            row_mask += pid_b * stride_mask
        row_n = k_new_ptr
        row_v = v_ptr
        row_w = v_new_ptr
        if APPEND:
            row_n += pid_b * stride_nb + pid_h * stride_nh
            row_v += pid_b * stride_vb + pid_h * stride_vh
            row_w += pid_b * stride_wb + pid_h * stride_wh
        refresh_pages(
            k_ptr + pid_b * stride_kb + pid_h * stride_kh, row_n, row_v, row_w,
            codes_ptr + pid_b * stride_cb + pid_h * stride_ch, row_s,
            spread_ptr + pid_b * stride_db + pid_h * stride_dh, row_mask, table_ptr, stride_table,
            stride_kp, stride_kt, stride_nt, stride_vp, stride_vt, stride_wt, stride_cp, stride_cv, stride_sp,
            stride_sv, stride_dp, pid_b, page_begin, first_page, last_page, start, end, first_new,
            P, D, DV, C, BC, BDV, NG, NPG, KIND, FORM, APPEND, APPEND, HAS_MASK, HAS_TABLE,
        )  # fmt: skip
    if PDL:
        end_in_order(tl.program_id(0) + pid_h + pid_b)


def stats_sizes(head_dim: int, *, score: str, stats_dtype: str) -> dict:
    """The compile-time constants of statistics."""
    half = (head_dim + 1) // 2
    return {
        "C": half, "BC": triton.next_power_of_2(half), "NG": (head_dim + 31) // 32, "KIND": KIND[stats_dtype],
        "FORM": FORM[score],
    }  # fmt: skip


def _launch(
    k, v, k_new, v_new, stats, *, page_size, score, stats_dtype, seq_lens, seq_starts, token_mask, page_table, num_new,
    pdl=False,
):  # fmt: skip
    """Fills in strides and tile sizes; the grid covers the pages that `num_new` tokens can touch, or all pages."""
    paged = page_table is not None
    tensors, strides = stats_arguments(stats, stats_dtype, paged)
    batch = page_table.shape[0] if paged else k.shape[0]
    num_kv_heads, head_dim = k.shape[1], k.shape[-1]
    num_pages = page_table.shape[1] if paged else stats.codes.shape[2]
    capacity = num_pages * page_size if paged else k.shape[2]
    sizes = stats_sizes(head_dim, score=score, stats_dtype=stats_dtype)
    value_dim = 1 if v is None else v.shape[-1]
    pages_per_program = 1 if num_new == 1 else max(1, min(16, 2048 // (2 * sizes["BC"])))
    touched = num_pages if num_new is None else min(num_pages, (num_new - 1 + page_size - 1) // page_size + 1)
    new_strides = (0, 0, 0) if k_new is None else k_new.stride()[:3]
    new_value_strides = (0, 0, 0) if v_new is None else v_new.stride()[:3]
    value_strides = (0, 0, 0, 0) if v is None else token_strides(v, paged, page_size)
    _page_stats_fwd_kernel[(triton.cdiv(touched, pages_per_program), num_kv_heads, batch)](
        k, k_new, v, v_new, *tensors, seq_lens, seq_starts, token_mask, page_table,
        *token_strides(k, paged, page_size), *new_strides, *value_strides, *new_value_strides,
        *strides, stride_of(seq_lens), stride_of(seq_starts), stride_of(token_mask), stride_of(page_table),
        num_pages, num_new or 0, capacity,
        P=page_size, D=head_dim, DV=value_dim, BDV=triton.next_power_of_2(value_dim), NPG=pages_per_program, **sizes,
        ONLY_NEW=num_new is not None, APPEND=k_new is not None,
        HAS_LENS=seq_lens is not None, HAS_STARTS=seq_starts is not None,
        HAS_MASK=token_mask is not None, HAS_TABLE=paged, PDL=pdl,
        num_warps=1 if pages_per_program == 1 else 4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def page_stats(k, stats, **settings):
    """Writes the statistics of all pages, or of those the last `num_new` tokens touch, into `stats`."""
    _launch(k, None, None, None, stats, **settings)


def append_tokens(k_cache, v_cache, stats, k_new, v_new, **settings):
    """Writes new keys and values to the last slots of each row and refreshes the pages they touch, in one launch.

    With `pdl` it may start as soon as the launch before has.
    """
    _launch(k_cache, v_cache, k_new, v_new, stats, num_new=k_new.shape[2], **settings)
