"""Query vectors against page vectors, in every storage. May import torch, triton and `_common`.

A page vector meets one query vector: that is a matrix-vector product, done on the CUDA cores without unpacking into
tensor-core layouts. 8-bit and 4-bit codes are multiplied as integers, four at a time (`dp4a`).
"""

import triton
import triton.language as tl

from ._common import (
    ABSOLUTE,
    FP8,
    INT4,
    INT8,
    MINMAX,
    MOMENT,
    ROUND,
    decode_fp8,
    int4_dims,
)


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
def group_norm(q_ptr, stride_qh, stride_qd, first_head, D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr):
    """Mean over the group of the query norms."""
    offs_d = tl.arange(0, BD)
    total = 0.0
    for g in tl.static_range(GROUP):
        x = tl.load(q_ptr + (first_head + g) * stride_qh + offs_d * stride_qd, mask=offs_d < D, other=0.0)
        x = x.to(tl.float32)
        total += tl.sqrt(tl.sum(x * x, axis=0))
    return total / GROUP


@triton.jit
def prepare_query(
    q_ptr, stride_qh, stride_qd, first_head, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, VECTOR: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """The query vector that meets page vector `VECTOR`, as the four values that `dot_pages` wants for this storage."""
    if DP4A and KIND == INT8:
        # 15-bit fixed-point numbers in two int8 limbs: high words, low words, step
        dims = tl.arange(0, BD // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, dims < D, scale, GROUP, FORM, VECTOR)
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
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, dims < D, scale, GROUP, FORM, VECTOR)
        dims += 16
        y = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, dims < D, scale, GROUP, FORM, VECTOR)
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
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, mask, scale, GROUP, FORM, VECTOR)
        dims = int4_dims(offs_c, 1, C)
        mask = (offs_c < C) & (dims < D)
        return x, _group_query(q_ptr, stride_qh, stride_qd, first_head, dims, mask, scale, GROUP, FORM, VECTOR), x, x
    else:
        offs_d = tl.arange(0, BD)
        x = _group_query(q_ptr, stride_qh, stride_qd, first_head, offs_d, offs_d < D, scale, GROUP, FORM, VECTOR)
        return x, x, x, x


@triton.jit
def dot_pages(
    qa, qb, qc, qd, codes_ptr, scales_ptr, offs_pc, offs_ps, mask_page,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, NG: tl.constexpr,
    KIND: tl.constexpr, SQUARED: tl.constexpr, DP4A: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """`query . page vector` (its square if `SQUARED`) for `[BLOCK_N]` pages, float32; the query comes prepared."""
    if DP4A and KIND == INT8:
        offs_w = tl.arange(0, BD // 4)
        codes = tl.load(
            codes_ptr.to(tl.pointer_type(tl.int32)) + (offs_pc // 4)[:, None] + offs_w[None, :],
            mask=mask_page[:, None] & (offs_w < D // 4)[None, :],
            other=0,
        )
        page_scale = tl.load(scales_ptr + offs_ps, mask=mask_page, other=0.0).to(tl.float32)
        products = _dot4_wide(codes, qa[None, :], qb[None, :])
        dot = tl.sum(products, axis=1).to(tl.float32) * (page_scale * qc)
    elif DP4A and KIND == INT4:
        # groups of 32 dims are 4 words of codes
        offs_g = tl.arange(0, BD // 32)
        mask = mask_page[:, None] & (offs_g < NG)[None, :]
        words = (offs_pc // 4)[:, None, None] + offs_g[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        packed = tl.load(codes_ptr.to(tl.pointer_type(tl.int32)) + words, mask=mask[:, :, None], other=0)
        group_scale = tl.load(scales_ptr + offs_ps[:, None] + offs_g[None, :], mask=mask, other=0.0).to(tl.float32)
        products = tl.sum(_dot8_nibbles(packed, qa[None], qb[None]), axis=2) - qd[None, :]  # [BLOCK_N, groups]
        dot = tl.sum(products.to(tl.float32) * (group_scale * qc[None, :]), axis=1)
    elif KIND == INT4:
        offs_c = tl.arange(0, BC)
        packed = tl.load(
            codes_ptr + offs_pc[:, None] + offs_c[None, :], mask=mask_page[:, None] & (offs_c < C)[None, :], other=0
        ).to(tl.int32)
        dot = tl.zeros(offs_pc.shape, tl.float32)
        for half in tl.static_range(2):
            dims = int4_dims(offs_c, half, C)
            mask = mask_page[:, None] & ((offs_c < C) & (dims < D))[None, :]
            group_scale = tl.load(scales_ptr + offs_ps[:, None] + (dims // 32)[None, :], mask=mask, other=0.0)
            vector = (((packed >> (4 * half)) & 15) - 8).to(tl.float32) * group_scale.to(tl.float32)
            if SQUARED:
                vector = vector * vector
            dot += tl.sum(vector * (qa if half == 0 else qb)[None, :], axis=1)
    else:
        offs_d = tl.arange(0, BD)
        codes = tl.load(
            codes_ptr + offs_pc[:, None] + offs_d[None, :], mask=mask_page[:, None] & (offs_d < D)[None, :], other=0
        )
        vector = decode_fp8(codes, NATIVE_FP8) if KIND == FP8 else codes.to(tl.float32)
        if SQUARED:
            vector = vector * vector
        dot = tl.sum(vector * qa[None, :], axis=1)
        if KIND == FP8 or KIND == INT8:
            page_scale = tl.load(scales_ptr + offs_ps, mask=mask_page, other=0.0).to(tl.float32)
            dot = dot * (page_scale * page_scale if SQUARED else page_scale)
    return dot
