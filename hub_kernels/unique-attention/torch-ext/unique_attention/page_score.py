"""Page scores (Eq. 2) and the vote of a query group (Eq. 3). May import torch, triton and `_common`.

The vote "mean" is linear for every score but "diagonal", so a group needs a single averaged query. A page vector meets one
query vector: that is a matrix-vector product, done on the CUDA cores without unpacking into tensor-core layouts.
8-bit and 4-bit codes are multiplied as integers (`dp4a`), the query as a 15-bit fixed-point number in two int8 limbs.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    ABSOLUTE,
    DIAGONAL,
    FORM,
    FP8,
    INT4,
    INT8,
    KIND,
    MEAN,
    MINMAX,
    MOMENT,
    ROUND,
    SCALAR,
    decode_fp8,
    page_strides,
    physical_page,
    row_end,
    row_start,
    stride_of,
    target_of,
)


# how the heads of a group vote; the kernels branch on these at compile time
VOTE = {"mean": 0, "max": 1, "softmax_mean": 2, "shifted_max": 3}
VOTE_MEAN, VOTE_MAX, VOTE_SOFTMAX_MEAN, VOTE_SHIFTED_MAX = (tl.constexpr(i) for i in range(4))


@triton.jit
def _fixed_point_words(x):
    """Query `[W, 4]` as a 15-bit fixed-point number: packed int8 limbs `high [W]`, `low [W]` (`128 * high + low`) and the step."""
    absmax = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    step = absmax / 16256.0
    whole = (x * tl.where(absmax > 0, 16256.0 / absmax, 0.0) + ROUND) - ROUND
    number = whole.to(tl.int32)
    high = (number + 64) >> 7
    low = number - (high << 7)
    shift = tl.arange(0, 4)[None, :] * 8
    return tl.sum((high & 0xFF) << shift, axis=1), tl.sum((low & 0xFF) << shift, axis=1), step


@triton.jit
def _dot4(codes, high, low):
    """Per word: the sum of four int8 codes times four 15-bit numbers."""
    return tl.inline_asm_elementwise(
        "{ .reg .s32 t; dp4a.s32.s32 t, $1, $2, 0; shl.b32 t, t, 7; dp4a.s32.s32 $0, $1, $3, t; }",
        "=r,r,r,r",
        [codes, high, low],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _group_query(
    q_ptr, stride_qh, stride_qd, first_head, offs, mask, scale,
    GROUP: tl.constexpr, FORM: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The query vector (shape of `offs`) that meets page vector `VECTOR`, averaged over `GROUP` heads."""
    total = tl.zeros(offs.shape, tl.float32)
    for g in tl.static_range(GROUP):
        x = tl.load(q_ptr + (first_head + g) * stride_qh + offs * stride_qd, mask=mask, other=0.0).to(tl.float32)
        if FORM == MINMAX:
            x = tl.maximum(x, 0.0) if VECTOR == 0 else tl.minimum(x, 0.0)
        elif VECTOR == 1:
            if FORM == ABSOLUTE:
                x = tl.abs(x)
            else:
                x = x * x
                if FORM == MOMENT:
                    x = x * (0.5 * scale)
        total += x
    return total / GROUP


@triton.jit
def _group_norm(q_ptr, stride_qh, stride_qd, first_head, D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr):
    """Mean over the group of the query norms."""
    offs_d = tl.arange(0, BD)
    total = 0.0
    for g in tl.static_range(GROUP):
        x = tl.load(q_ptr + (first_head + g) * stride_qh + offs_d * stride_qd, mask=offs_d < D, other=0.0)
        x = x.to(tl.float32)
        total += tl.sqrt(tl.sum(x * x, axis=0))
    return total / GROUP


@triton.jit
def _dot_pages(
    q_ptr, stride_qh, stride_qd, first_head, codes_ptr, scales_ptr, offs_pc, offs_ps, mask_page, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VECTOR: tl.constexpr,
    DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """`query . page vector` for `[BLOCK_N]` pages in float32."""
    if DP4A and KIND == INT8:
        words: tl.constexpr = D // 4
        offs_w = tl.arange(0, BD // 4)
        codes = tl.load(
            codes_ptr.to(tl.pointer_type(tl.int32)) + (offs_pc // 4)[:, None] + offs_w[None, :],
            mask=mask_page[:, None] & (offs_w < words)[None, :],
            other=0,
        )
        page_scale = tl.load(scales_ptr + offs_ps, mask=mask_page, other=0.0).to(tl.float32)
        offs = offs_w[:, None] * 4 + tl.arange(0, 4)[None, :]
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, offs, offs < D, scale, GROUP, FORM, VECTOR)
        high, low, step = _fixed_point_words(x)
        products = tl.sum(_dot4(codes, high[None, :], low[None, :]), axis=1)
        dot = products.to(tl.float32) * (page_scale * step)
    elif DP4A and KIND == INT4:
        # two groups of 32 dims a half: words of the low nibbles, then of the high ones
        offs_w = tl.arange(0, C // 4)
        packed = tl.load(
            codes_ptr.to(tl.pointer_type(tl.int32)) + (offs_pc // 4)[:, None] + offs_w[None, :],
            mask=mask_page[:, None],
            other=0,
        )
        dot = tl.zeros(offs_pc.shape, tl.float32)
        groups: tl.constexpr = C // 32
        for half in tl.static_range(2):
            offs = half * C + offs_w[:, None] * 4 + tl.arange(0, 4)[None, :]
            x = _group_query(q_ptr, stride_qh, stride_qd, first_head, offs, offs < D, scale, GROUP, FORM, VECTOR)
            high, low, step = _fixed_point_words(x)
            nibbles = (packed >> (4 * half)) & 0x0F0F0F0F
            # codes are stored with 8 added
            ones = tl.full(high.shape, 0x08080808, tl.int32)
            products = _dot4(nibbles, high[None, :], low[None, :]) - _dot4(ones, high, low)[None, :]
            products = tl.sum(tl.reshape(products, (offs_pc.shape[0], groups, 8)), axis=2)  # [BLOCK_N, groups]
            offs_g = half * groups + tl.arange(0, groups)
            group_scale = tl.load(
                scales_ptr + offs_ps[:, None] + offs_g[None, :], mask=mask_page[:, None], other=0.0
            ).to(tl.float32)
            dot += tl.sum(products.to(tl.float32) * group_scale, axis=1) * step
    elif KIND == INT4:
        offs_c = tl.arange(0, BC)
        packed = tl.load(
            codes_ptr + offs_pc[:, None] + offs_c[None, :], mask=mask_page[:, None] & (offs_c < C)[None, :], other=0
        ).to(tl.int32)
        dot = tl.zeros(offs_pc.shape, tl.float32)
        for half in tl.static_range(2):
            dims = half * C + offs_c
            mask_dim = (offs_c < C) & (dims < D)
            x = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, mask_dim, scale, GROUP, FORM, VECTOR)
            group_scale = tl.load(
                scales_ptr + offs_ps[:, None] + (dims // 32)[None, :],
                mask=mask_page[:, None] & mask_dim[None, :],
                other=0.0,
            ).to(tl.float32)
            vector = (((packed >> (4 * half)) & 15) - 8).to(tl.float32) * group_scale
            if VECTOR == 1 and (FORM == MOMENT or FORM == DIAGONAL):
                vector = vector * vector
            dot += tl.sum(vector * x[None, :], axis=1)
    else:
        offs_d = tl.arange(0, BD)
        codes = tl.load(
            codes_ptr + offs_pc[:, None] + offs_d[None, :], mask=mask_page[:, None] & (offs_d < D)[None, :], other=0
        )
        if KIND == FP8:
            vector = decode_fp8(codes, NATIVE_FP8)
        else:
            vector = codes.to(tl.float32)
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, offs_d, offs_d < D, scale, GROUP, FORM, VECTOR)
        squared: tl.constexpr = VECTOR == 1 and (FORM == MOMENT or FORM == DIAGONAL)
        if squared:
            vector = vector * vector
        dot = tl.sum(vector * x[None, :], axis=1)
        if KIND == FP8 or KIND == INT8:
            page_scale = tl.load(scales_ptr + offs_ps, mask=mask_page, other=0.0).to(tl.float32)
            if squared:
                page_scale = page_scale * page_scale
            dot = dot * page_scale
    return dot


@triton.jit(do_not_specialize=["num_pages", "capacity"])
def _page_score_fwd_kernel(
    q_ptr, codes_ptr, scales_ptr, spread_ptr, out_ptr, len_ptr, start_ptr, table_ptr,
    stride_qb, stride_qh, stride_qd,
    stride_cb, stride_ch, stride_cp, stride_cv,
    stride_sb, stride_sh, stride_sp, stride_sv,
    stride_db, stride_dh, stride_dp,
    stride_ob, stride_oh, stride_og,
    stride_len, stride_start, stride_table,
    num_pages, capacity, weight, scale,
    P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    G: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_TABLE: tl.constexpr,
    DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Eq. 2 and 3. Program `(block of BLOCK_N pages, kv head, row)` scores its pages with the `G` query heads of the group.

    Writes `[B, HK, N]`, or `[B, HK, G, N]` before a vote that needs the best score of each head first.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    end = row_end(len_ptr, stride_len, pid_b, capacity, HAS_LENS)
    begin = tl.program_id(0) * BLOCK_N
    if begin < tl.cdiv(end, P):
        start = row_start(start_ptr, stride_start, pid_b, HAS_STARTS)
        pages = begin + tl.arange(0, BLOCK_N)
        inside = (pages >= start // P) & (pages < tl.cdiv(end, P))
        physical = physical_page(table_ptr, stride_table, pid_b, pages, inside, HAS_TABLE)
        row_c = codes_ptr + pid_b * stride_cb + pid_h * stride_ch
        row_s = scales_ptr
        next_s = scales_ptr
        if KIND >= FP8:
            row_s += pid_b * stride_sb + pid_h * stride_sh
            next_s = row_s + stride_sv
        offs_pc = physical * stride_cp
        offs_ps = physical * stride_sp
        row_q = q_ptr + pid_b * stride_qb
        linear: tl.constexpr = FORM != DIAGONAL
        averaged: tl.constexpr = VOTE == VOTE_MEAN and linear
        group: tl.constexpr = G if averaged else 1
        best = tl.full((BLOCK_N,), float("-inf") if VOTE == VOTE_MAX else 0.0, tl.float32)
        row_out = out_ptr + pid_b * stride_ob + pid_h * stride_oh
        spread = tl.zeros((BLOCK_N,), tl.float32)
        if FORM == SCALAR:
            offs_pd = pid_b * stride_db + pid_h * stride_dh + physical * stride_dp
            spread = tl.load(spread_ptr + offs_pd, mask=inside, other=0.0).to(tl.float32)
        for g in tl.static_range(1 if averaged else G):
            head = pid_h * G + g
            score = _dot_pages(
                row_q, stride_qh, stride_qd, head, row_c, row_s, offs_pc, offs_ps, inside, scale,
                D, BD, C, BC, NG, group, KIND, FORM, 0, DP4A, NATIVE_FP8,
            )  # fmt: skip
            if FORM == SCALAR:
                score += spread * (weight * _group_norm(row_q, stride_qh, stride_qd, head, D, BD, group))
            elif FORM != MEAN:
                offset = _dot_pages(
                    row_q, stride_qh, stride_qd, head, row_c + stride_cv, next_s, offs_pc, offs_ps,
                    inside, scale, D, BD, C, BC, NG, group, KIND, FORM, 1, DP4A and FORM == ABSOLUTE, NATIVE_FP8,
                )  # fmt: skip
                if FORM == DIAGONAL:
                    offset = tl.sqrt(offset)
                score += offset if FORM == MINMAX else weight * offset
            if VOTE == VOTE_MAX:
                best = tl.maximum(best, score)
            elif VOTE == VOTE_MEAN:
                best += score if averaged else score / G
            else:
                tl.store(
                    row_out + g * stride_og + pages, tl.where(inside, score, float("-inf")), mask=pages < num_pages
                )
        if VOTE == VOTE_MEAN or VOTE == VOTE_MAX:
            tl.store(row_out + pages, tl.where(inside, best, float("-inf")), mask=pages < num_pages)
    else:
        pages = begin + tl.arange(0, BLOCK_N)
        nothing = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        row_out = out_ptr + pid_b * stride_ob + pid_h * stride_oh
        for g in tl.static_range(1 if VOTE == VOTE_MEAN or VOTE == VOTE_MAX else G):
            tl.store(row_out + g * stride_og + pages, nothing, mask=pages < num_pages)


@triton.jit(do_not_specialize=["num_pages"])
def _page_vote_fwd_kernel(
    in_ptr, out_ptr, stride_ib, stride_ih, stride_ig, stride_ob, stride_oh, num_pages, scale,
    G: tl.constexpr, BLOCK_N: tl.constexpr, VOTE: tl.constexpr,
):  # fmt: skip
    """Eq. 3, votes that compare a head's scores with its best. Program `(kv head, row)` reads `[G, N]`, writes `[N]`."""
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


def launch_score(stats_dtype: str, block_d: int, integer: bool) -> tuple[int, int]:
    """Pages per program and warps: 32 registers of codes a thread."""
    registers = block_d // {"int8": 4, "int4": 8}[stats_dtype] if integer else block_d // 2
    return max(16, min(256, 4096 // registers)), 4


def page_scores(
    q, stats, out, *, page_size, score, score_weight, group_reduce, stats_dtype, softmax_scale, seq_lens, seq_starts,
    page_table, dependents=False,
):  # fmt: skip
    """Fills `out [B, HK, N]`; `dependents` lets the next kernel of the stream start early."""
    codes, scales, spread = stats
    paged = page_table is not None
    batch, _, num_pages = out.shape
    num_kv_heads, head_dim = codes.shape[1], q.shape[-1]
    group = q.shape[1] // num_kv_heads
    half = (head_dim + 1) // 2
    target = target_of(q.device)
    width = codes.stride(-2) * codes.element_size()
    integer = (
        stats_dtype == "int8" and width % 4 == 0 or stats_dtype == "int4" and half % 32 == 0 and half & (half - 1) == 0
    )
    per_head = group_reduce in ("softmax_mean", "shifted_max")
    raw = (
        torch.empty((batch, num_kv_heads, group, num_pages), dtype=torch.float32, device=q.device) if per_head else out
    )
    block_n, num_warps = launch_score(stats_dtype, triton.next_power_of_2(head_dim), integer and target.dp4a)
    scale_strides = (0, 0, 0, 0) if scales is None else (*page_strides(scales, paged), scales.stride(-2))
    _page_score_fwd_kernel[(triton.cdiv(num_pages, block_n), num_kv_heads, batch)](
        q, codes.view(torch.uint8) if stats_dtype == "fp8" else codes, scales, spread, raw,
        seq_lens, seq_starts, page_table,
        q.stride(0), q.stride(1), q.stride(-1),
        *page_strides(codes, paged), codes.stride(-2), *scale_strides, *page_strides(spread, paged),
        raw.stride(0), raw.stride(1), raw.stride(2) if per_head else 0,
        stride_of(seq_lens), stride_of(seq_starts), stride_of(page_table),
        num_pages, num_pages * page_size, score_weight, softmax_scale,
        P=page_size, D=head_dim, BD=triton.next_power_of_2(head_dim), C=half, BC=triton.next_power_of_2(half),
        NG=(head_dim + 31) // 32, G=group, BLOCK_N=block_n, KIND=KIND[stats_dtype], FORM=FORM[score],
        VOTE=VOTE[group_reduce], HAS_LENS=seq_lens is not None, HAS_STARTS=seq_starts is not None, HAS_TABLE=paged,
        DP4A=target.dp4a and integer, NATIVE_FP8=target.native_fp8, PDL=dependents and target.dependent_launch,
        num_warps=num_warps,
    )  # fmt: skip
    if per_head:
        _page_vote_fwd_kernel[(num_kv_heads, batch)](
            raw, out, *raw.stride()[:3], *out.stride()[:2], num_pages, softmax_scale,
            G=group, BLOCK_N=1024, VOTE=VOTE[group_reduce], num_warps=4,
        )  # fmt: skip
    return out
