"""Scores (Eq. 2) and votes (Eq. 3) of some pages, in every storage. May import torch, triton and `_common`.

A page vector meets one query vector: that is a matrix-vector product, done on the CUDA cores without unpacking into
tensor-core layouts. 8-bit and 4-bit codes are multiplied as integers, four at a time (`dp4a`).
"""

import triton
import triton.language as tl

from ._common import (
    ABSOLUTE,
    DIAGONAL,
    FP8,
    INT4,
    INT8,
    MEAN,
    MINMAX,
    MOMENT,
    ROUND,
    SCALAR,
    decode_fp8,
    int4_dims,
)

# how the heads of a group vote; the kernels branch on these at compile time
VOTE = {"mean": 0, "max": 1, "softmax_mean": 2, "shifted_max": 3}
VOTE_MEAN, VOTE_MAX, VOTE_SOFTMAX_MEAN, VOTE_SHIFTED_MAX = (tl.constexpr(i) for i in range(4))


@triton.jit
def _pack_words(x):
    """int8-sized integers `[..., 4]` as one int32 word each."""
    shift = tl.arange(0, 4) * 8
    return tl.sum((x & 0xFF) << tl.reshape(shift, [1] * (len(x.shape) - 1) + [4]), axis=len(x.shape) - 1)


@triton.jit
def _round(x):
    """Nearest even integer of float32 numbers below 2**22."""
    return ((x + ROUND) - ROUND).to(tl.int32)


@triton.jit
def _dot4_wide(codes, high, low):
    """Per word: the sum of four int8 codes times four 15-bit numbers `128 * high + low`."""
    return tl.inline_asm_elementwise(
        "{ .reg .s32 t; dp4a.s32.s32 t, $1, $2, 0; shl.b32 t, t, 7; dp4a.s32.s32 $0, $1, $3, t; }",
        "=r,r,r,r",
        [codes, high, low],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _dot8_nibbles(packed, first, second):
    """Per word: four low nibbles times four int8 numbers plus four high nibbles times four others."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b, t; and.b32 a, $1, 0x0F0F0F0F; shr.u32 b, $1, 4; and.b32 b, b, 0x0F0F0F0F;"
        " dp4a.s32.s32 t, a, $2, 0; dp4a.s32.s32 $0, b, $3, t; }",
        "=r,r,r,r",
        [packed, first, second],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _group_query(
    q_ptr, stride_qh, stride_qd, first_head, offs, mask, scale,
    GROUP: tl.constexpr, FORM: tl.constexpr, VECTOR: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """The query vector (shape of `offs`) that meets page vector `VECTOR`, averaged over `GROUP` heads."""
    total = tl.zeros(offs.shape, tl.float32)
    for g in tl.static_range(GROUP):
        x = tl.load(
            q_ptr + (first_head + g) * stride_qh + offs * stride_qd,
            mask=mask,
            other=0.0,
            cache_modifier=".cg" if FRESH else "",
        ).to(tl.float32)
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
def group_norm(
    q_ptr, stride_qh, stride_qd, first_head,
    D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Mean over the group of the query norms."""
    offs_d = tl.arange(0, BD)
    total = 0.0
    for g in tl.static_range(GROUP):
        x = tl.load(
            q_ptr + (first_head + g) * stride_qh + offs_d * stride_qd,
            mask=offs_d < D,
            other=0.0,
            cache_modifier=".cg" if FRESH else "",
        ).to(tl.float32)
        total += tl.sqrt(tl.sum(x * x, axis=0))
    return total / GROUP


@triton.jit
def prepare_query(
    q_ptr, stride_qh, stride_qd, first_head, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VECTOR: tl.constexpr, DP4A: tl.constexpr,
    FRESH: tl.constexpr,
):  # fmt: skip
    """The query vector that meets page vector `VECTOR`, as the four values that `dot_pages` wants for this storage."""
    if DP4A and KIND == INT8:
        # 15-bit fixed-point numbers in two int8 limbs: high words, low words, step
        dims = tl.arange(0, BD // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, dims < D, scale, GROUP, FORM, VECTOR, FRESH)
        absmax = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
        number = _round(x * tl.where(absmax > 0, 16256.0 / absmax, 0.0))
        high = (number + 64) >> 7
        words = _pack_words(high)
        step = absmax / 16256.0
        return words, _pack_words(number - (high << 7)), step, step
    elif DP4A and KIND == INT4:
        # int8 numbers with a step per group of 32 dims: words of the two halves, step, and a correction, since codes
        # are stored with 8 added
        offs_g = tl.arange(0, BD // 32)
        offs_w = tl.arange(0, 4)
        dims = offs_g[:, None, None] * 32 + offs_w[None, :, None] * 4 + offs_w[None, None, :]
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, dims < D, scale, GROUP, FORM, VECTOR, FRESH)
        dims += 16
        y = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, dims < D, scale, GROUP, FORM, VECTOR, FRESH)
        absmax = tl.max(tl.max(tl.maximum(tl.abs(x), tl.abs(y)), axis=2), axis=1)  # [groups]
        factor = tl.where(absmax > 0, 127.0 / absmax, 0.0)[:, None, None]
        first = _round(x * factor)
        second = _round(y * factor)
        correction = 8 * tl.sum(tl.sum(first + second, axis=2), axis=1)
        return _pack_words(first), _pack_words(second), absmax / 127.0, correction
    elif KIND == INT4:
        offs_c = tl.arange(0, BC)
        dims = int4_dims(offs_c, 0, C)
        mask = (offs_c < C) & (dims < D)
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, mask, scale, GROUP, FORM, VECTOR, FRESH)
        dims = int4_dims(offs_c, 1, C)
        mask = (offs_c < C) & (dims < D)
        y = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, mask, scale, GROUP, FORM, VECTOR, FRESH)
        return x, y, x, x
    else:
        offs_d = tl.arange(0, BD)
        x = _group_query(
            q_ptr, stride_qh, stride_qd, first_head, offs_d, offs_d < D, scale, GROUP, FORM, VECTOR, FRESH
        )
        return x, x, x, x


@triton.jit
def load_pages(
    codes_ptr, scales_ptr, offs_pc, offs_ps, mask_page,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    KIND: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Vectors of `[BLOCK_N]` pages as they are stored, and their scales (zeros for kinds without)."""
    scales = tl.zeros(offs_pc.shape, tl.float32)
    if DP4A and KIND == INT8:
        offs_w = tl.arange(0, BD // 4)
        codes = tl.load(
            codes_ptr.to(tl.pointer_type(tl.int32)) + (offs_pc // 4)[:, None] + offs_w[None, :],
            mask=mask_page[:, None] & (offs_w < D // 4)[None, :],
            other=0,
        )
    elif DP4A and KIND == INT4:
        # groups of 32 dims are 4 words of codes; they come first so that lanes beside each other read one page
        offs_g = tl.arange(0, BD // 32)
        mask = (offs_g < NG)[:, None] & mask_page[None, :]
        words = offs_g[:, None, None] * 4 + (offs_pc // 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
        codes = tl.load(codes_ptr.to(tl.pointer_type(tl.int32)) + words, mask=mask[:, :, None], other=0)
        scales = tl.load(scales_ptr + offs_g[:, None] + offs_ps[None, :], mask=mask, other=0.0)
    elif KIND == INT4:
        offs_c = tl.arange(0, BC)
        mask = mask_page[:, None] & (offs_c < C)[None, :]
        codes = tl.load(codes_ptr + offs_pc[:, None] + offs_c[None, :], mask=mask, other=0)
        scales = tl.load(scales_ptr + offs_ps[:, None] + (offs_c // 16)[None, :], mask=mask, other=0.0)
    else:
        offs_d = tl.arange(0, BD)
        codes = tl.load(
            codes_ptr + offs_pc[:, None] + offs_d[None, :], mask=mask_page[:, None] & (offs_d < D)[None, :], other=0
        )
    if KIND == FP8 or KIND == INT8:
        scales = tl.load(scales_ptr + offs_ps, mask=mask_page, other=0.0)
    return codes, scales


@triton.jit
def dot_pages(
    qa, qb, qc, qd, codes, scales,
    D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    KIND: tl.constexpr, SQUARED: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """`query . page vector` (its square if `SQUARED`) of `[BLOCK_N]` loaded pages, float32."""
    scales = scales.to(tl.float32)
    if DP4A and KIND == INT8:
        products = _dot4_wide(codes, qa[None, :], qb[None, :])
        dot = tl.sum(products, axis=1).to(tl.float32) * (scales * qc)
    elif DP4A and KIND == INT4:
        products = _dot8_nibbles(codes, qa[:, None, :], qb[:, None, :])
        products = tl.sum(products, axis=2) - qd[:, None]  # [groups, BLOCK_N]
        dot = tl.sum(products.to(tl.float32) * (scales * qc[:, None]), axis=0)
    elif KIND == INT4:
        offs_c = tl.arange(0, BC)
        packed = codes.to(tl.int32)
        dot = tl.zeros(packed.shape[:1], tl.float32)
        for half in tl.static_range(2):
            vector = (((packed >> (4 * half)) & 15) - 8).to(tl.float32) * scales
            # an odd number of dims leaves a nibble over
            vector = tl.where(((offs_c < C) & (int4_dims(offs_c, half, C) < D))[None, :], vector, 0.0)
            if SQUARED:
                vector = vector * vector
            dot += tl.sum(vector * (qa if half == 0 else qb)[None, :], axis=1)
    else:
        vector = decode_fp8(codes, NATIVE_FP8) if KIND == FP8 else codes.to(tl.float32)
        if SQUARED:
            vector = vector * vector
        dot = tl.sum(vector * qa[None, :], axis=1)
        if KIND == FP8 or KIND == INT8:
            dot = dot * (scales * scales if SQUARED else scales)
    return dot


@triton.jit
def _prepare_head(
    q_ptr, stride_qh, stride_qd, head, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, DP4A: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """What a head (or the average of `GROUP` heads) brings to every page: one or two query vectors and the norm."""
    a, b, c, d = prepare_query(
        q_ptr, stride_qh, stride_qd, head, scale, D, BD, C, BC, NG, GROUP, KIND, FORM, 0, DP4A, FRESH
    )
    e, f, g, h = a, b, c, d
    norm = 0.0
    if FORM == SCALAR:
        norm = group_norm(q_ptr, stride_qh, stride_qd, head, D, BD, GROUP, FRESH)
    elif FORM != MEAN:
        # squares of codes do not fit the integer products
        e, f, g, h = prepare_query(
            q_ptr, stride_qh, stride_qd, head, scale, D, BD, C, BC, NG, GROUP, KIND, FORM, 1,
            DP4A and FORM != DIAGONAL and FORM != MOMENT, FRESH,
        )  # fmt: skip
    return a, b, c, d, e, f, g, h, norm


@triton.jit
def _head_score(
    a, b, c, d, e, f, g, h, norm, codes, scales, spread, second_codes, second_scales, weight,
    D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Eq. 2 from what `_prepare_head` and `load_pages` gave."""
    score = dot_pages(a, b, c, d, codes, scales, D, C, BC, KIND, False, DP4A, NATIVE_FP8)
    if FORM == SCALAR:
        score += spread.to(tl.float32) * (weight * norm)
    elif FORM != MEAN:
        squared: tl.constexpr = FORM == DIAGONAL or FORM == MOMENT
        offset = dot_pages(
            e, f, g, h, second_codes, second_scales, D, C, BC, KIND, squared, DP4A and not squared, NATIVE_FP8
        )
        if FORM == DIAGONAL:
            offset = tl.sqrt(offset)
        score += offset if FORM == MINMAX else weight * offset
    return score


@triton.jit
def prepare_group(
    q_ptr, stride_qh, stride_qd, head, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr, DP4A: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """What the group of kv head `head` brings to every page: its average, or its first head where that will not do.

    `FRESH` reads past the first cache, for launches that have not waited for anything yet.
    """
    linear: tl.constexpr = VOTE == VOTE_MEAN and FORM != DIAGONAL
    # compilers that embed this kernel pass Python floats as float64
    scale = tl.full((), scale, tl.float32)
    return _prepare_head(
        q_ptr, stride_qh, stride_qd, head * G, scale, D, BD, C, BC, NG, G if linear else 1, KIND, FORM, DP4A, FRESH
    )


@triton.jit
def load_block(
    codes_ptr, scales_ptr, spread_ptr, stride_cp, stride_sp, stride_dp, physical, inside,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """What every score needs of pages `physical` of those that the pointers stand at: codes, scales, spread."""
    codes, scales = load_pages(
        codes_ptr, scales_ptr, physical * stride_cp, physical * stride_sp, inside, D, BD, C, BC, NG, KIND, DP4A
    )
    spread = tl.zeros(inside.shape, tl.float32)
    if FORM == SCALAR:
        spread = tl.load(spread_ptr + physical * stride_dp, mask=inside, other=0.0)
    return codes, scales, spread


@triton.jit
def score_pages(
    qa, qb, qc, qd, qe, qf, qg, qh, norm, codes, scales, spread, q_ptr, codes_ptr, scales_ptr, raw_ptr,
    stride_qh, stride_qd, stride_cp, stride_cv, stride_sp, stride_sv, stride_raw,
    head, pages, physical, inside, num_pages, weight, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, VOTE: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Eq. 2 and 3 for some pages of a row, `-inf` where not `inside`.

    The query comes from `prepare_group`, the pages from `load_block`. A vote that needs the best score of each head
    first leaves the scores of each head in `raw`.
    """
    weight = tl.full((), weight, tl.float32)
    second, second_scales = codes, scales
    if FORM != MEAN and FORM != SCALAR:
        if KIND >= FP8:
            scales_ptr += stride_sv
        # squares of codes do not fit the integer products
        second, second_scales = load_pages(
            codes_ptr + stride_cv, scales_ptr, physical * stride_cp, physical * stride_sp, inside,
            D, BD, C, BC, NG, KIND, DP4A and FORM != DIAGONAL and FORM != MOMENT,
        )  # fmt: skip
    best = _head_score(
        qa, qb, qc, qd, qe, qf, qg, qh, norm, codes, scales, spread, second, second_scales, weight,
        D, C, BC, KIND, FORM, DP4A, NATIVE_FP8,
    )  # fmt: skip
    if VOTE != VOTE_MEAN or FORM == DIAGONAL:
        if VOTE >= VOTE_SOFTMAX_MEAN:
            tl.store(raw_ptr + pages, tl.where(inside, best, float("-inf")), mask=pages < num_pages)
        for g in tl.static_range(1, G):
            a, b, c, d, e, f, gg, h, other_norm = _prepare_head(
                q_ptr, stride_qh, stride_qd, head * G + g, scale, D, BD, C, BC, NG, 1, KIND, FORM, DP4A, False
            )
            score = _head_score(
                a, b, c, d, e, f, gg, h, other_norm, codes, scales, spread, second, second_scales, weight,
                D, C, BC, KIND, FORM, DP4A, NATIVE_FP8,
            )  # fmt: skip
            if VOTE == VOTE_MAX:
                best = tl.maximum(best, score)
            elif VOTE == VOTE_MEAN:
                best += score
            else:
                score = tl.where(inside, score, float("-inf"))
                tl.store(raw_ptr + g * stride_raw + pages, score, mask=pages < num_pages)
        if VOTE == VOTE_MEAN:
            best = best / G
    return tl.where(inside, best, float("-inf"))
