"""Features of queries and pages whose dot product is the page score (Eq. 1-3, linear forms), forward and backward.

Every form here is linear in what it reads of the query, so the vote "mean" over the query heads of a kv head can be
taken on the features: `score[t, p] = fq[t] . fp[p] + nq[t] * fs[p]`.

| form   | fq                                | fp         | nq                | fs           |
|--------|-----------------------------------|------------|-------------------|--------------|
| mean   | mean_g q                          | mean       | -                 | -            |
| scalar | mean_g q                          | mean       | w * mean_g ||q||  | total std    |
| minmax | mean_g max(q, 0), mean_g min(q,0) | max, min   | -                 | -            |

`fq` and `fp` have zero padded dims (`[B, HK, T | N, V * BLOCK_D]`) and are stored in fp32 for fp32 inputs, else in
fp16: the score needs more digits than bf16 has, and keys and queries do not need its range. `nq` and `fs` are fp32.
May import torch, triton and `_common`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import FORM, MINMAX, SCALAR

LINEAR_FORMS = ("scalar", "mean", "minmax")


class Features(NamedTuple):
    """What the page score reads: `fq [B, HK, T, F]`, `nq [B, HK, T]`, `fp [B, HK, N, F]`, `fs [B, HK, N]`."""

    fq: torch.Tensor
    nq: torch.Tensor
    fp: torch.Tensor
    fs: torch.Tensor


@triton.jit(do_not_specialize=["T", "HK"])
def _soft_mask_fwd_query_features_kernel(
    q_ptr, fq_ptr, nq_ptr,
    stride_qb, stride_qh, stride_qt,
    T, HK, weight,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, b * HK) writes fq and nq of its queries: Eq. 3, vote "mean"."""
    pid_t = tl.program_id(0).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    base = q_ptr + (pid_bh // HK) * stride_qb + (pid_bh % HK) * GROUP * stride_qh
    base = base + offs_t[:, None] * stride_qt + offs_d[None, :]
    first = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    norm = tl.zeros([BLOCK_T], tl.float32)
    for g in range(GROUP):
        q = tl.load(base + g * stride_qh, mask=mask, other=0.0).to(tl.float32)
        if FORM == MINMAX:
            first += tl.maximum(q, 0.0)
            second += tl.minimum(q, 0.0)
        else:
            first += q
            norm += tl.sqrt(tl.sum(q * q, axis=1))
    VECTORS: tl.constexpr = 2 if FORM == MINMAX else 1
    row = pid_bh * T + offs_t
    out = fq_ptr + row[:, None] * (VECTORS * BLOCK_D) + offs_d[None, :]
    mask_t = offs_t < T
    tl.store(out, (first / GROUP).to(fq_ptr.dtype.element_ty), mask=mask_t[:, None])
    if FORM == MINMAX:
        tl.store(out + BLOCK_D, (second / GROUP).to(fq_ptr.dtype.element_ty), mask=mask_t[:, None])
    if FORM == SCALAR:
        tl.store(nq_ptr + row, norm * (weight / GROUP), mask=mask_t)


@triton.jit(do_not_specialize=["T", "HK"])
def _soft_mask_bwd_query_features_kernel(
    q_ptr, dfq_ptr, dnq_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_dqb, stride_dqh, stride_dqt,
    T, HK, weight,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, b * HK) adds the gradient through fq and nq to dq."""
    pid_t = tl.program_id(0).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    base = q_ptr + (pid_bh // HK) * stride_qb + (pid_bh % HK) * GROUP * stride_qh
    base = base + offs_t[:, None] * stride_qt + offs_d[None, :]
    VECTORS: tl.constexpr = 2 if FORM == MINMAX else 1
    row = pid_bh * T + offs_t
    source = dfq_ptr + row[:, None] * (VECTORS * BLOCK_D) + offs_d[None, :]
    first = tl.load(source, mask=mask_t[:, None], other=0.0).to(tl.float32) / GROUP
    if FORM == MINMAX:
        second = tl.load(source + BLOCK_D, mask=mask_t[:, None], other=0.0).to(tl.float32) / GROUP
    if FORM == SCALAR:
        dnorm = tl.load(dnq_ptr + row, mask=mask_t, other=0.0) * (weight / GROUP)
    dq_ptr += (pid_bh // HK) * stride_dqb + (pid_bh % HK) * GROUP * stride_dqh
    for g in range(GROUP):
        out = dq_ptr + g * stride_dqh + offs_t[:, None] * stride_dqt + offs_d[None, :]
        dq = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        if FORM == MINMAX:
            q = tl.load(base + g * stride_qh, mask=mask, other=0.0)
            # at q = 0 the forms max(q, 0) and min(q, 0) have slope 0, as clamp has in torch outside its bounds
            dq += tl.where(q > 0, first, 0.0) + tl.where(q < 0, second, 0.0)
        else:
            dq += first
            if FORM == SCALAR:
                q = tl.load(base + g * stride_qh, mask=mask, other=0.0).to(tl.float32)
                norm = tl.sqrt(tl.sum(q * q, axis=1))
                dq += tl.where(norm > 0, dnorm / tl.where(norm > 0, norm, 1.0), 0.0)[:, None] * q
        tl.store(out, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_pages(
    k_ptr, valid_ptr,
    stride_kb, stride_kh, stride_ks, stride_mb,
    pid_n, pid_bh, S, HK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Keys of BLOCK_N pages in fp32 `[BLOCK_N, P, BLOCK_D]` (0 where invalid), their validity, count and mean."""
    offs_s = pid_n * BLOCK_N * PAGE_SIZE + tl.arange(0, BLOCK_N * PAGE_SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    valid = offs_s < S
    if HAS_MASK:
        valid = valid & (tl.load(valid_ptr + (pid_bh // HK) * stride_mb + offs_s, mask=valid, other=0) != 0)
    keys = k_ptr + (pid_bh // HK) * stride_kb + (pid_bh % HK) * stride_kh
    k = tl.load(
        keys + offs_s[:, None] * stride_ks + offs_d[None, :], mask=valid[:, None] & (offs_d < D)[None, :], other=0.0
    )
    k = tl.reshape(k.to(tl.float32), (BLOCK_N, PAGE_SIZE, BLOCK_D))
    valid = tl.reshape(valid, (BLOCK_N, PAGE_SIZE))
    count = tl.sum(valid.to(tl.float32), axis=1)  # [BLOCK_N]
    inverse = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)
    mean = tl.sum(k, axis=1) * inverse[:, None]  # [BLOCK_N, BLOCK_D]
    return k, valid, inverse, mean


@triton.jit(do_not_specialize=["stride_mb", "S", "N", "HK"])
def _soft_mask_fwd_page_features_kernel(
    k_ptr, valid_ptr, fp_ptr, fs_ptr,
    stride_kb, stride_kh, stride_ks, stride_mb,
    S, N, HK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, FORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Program (block of pages, b * HK) writes fp and fs of its pages: Eq. 1."""
    pid_n = tl.program_id(0).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    k, valid, inverse, mean = _load_pages(
        k_ptr, valid_ptr, stride_kb, stride_kh, stride_ks, stride_mb, pid_n, pid_bh, S, HK,
        D, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_MASK,
    )  # fmt: skip
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < BLOCK_D)[None, :]
    VECTORS: tl.constexpr = 2 if FORM == MINMAX else 1
    row = pid_bh * N + offs_n
    out = fp_ptr + row[:, None] * (VECTORS * BLOCK_D) + offs_d[None, :]
    if FORM == MINMAX:
        present = (inverse > 0)[:, None]
        top = tl.max(tl.where(valid[:, :, None], k, float("-inf")), axis=1)
        low = tl.min(tl.where(valid[:, :, None], k, float("inf")), axis=1)
        tl.store(out, tl.where(present, top, 0.0).to(fp_ptr.dtype.element_ty), mask=mask)
        tl.store(out + BLOCK_D, tl.where(present, low, 0.0).to(fp_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out, mean.to(fp_ptr.dtype.element_ty), mask=mask)
        if FORM == SCALAR:
            gap = tl.where(valid[:, :, None], k - mean[:, None, :], 0.0)
            variance = tl.sum(tl.sum(gap * gap, axis=2), axis=1) * inverse
            tl.store(fs_ptr + row, tl.sqrt(variance), mask=offs_n < N)


@triton.jit(do_not_specialize=["stride_mb", "stride_dfp", "S", "N", "HK"])
def _soft_mask_bwd_page_features_kernel(
    k_ptr, valid_ptr, dfp_ptr, dfs_ptr, dk_ptr,
    stride_kb, stride_kh, stride_ks, stride_mb, stride_dkb, stride_dkh, stride_dks, stride_dfp,
    S, N, HK,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, FORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Program (block of pages, b * HK) adds the gradient through fp and fs to dk."""
    pid_n = tl.program_id(0).to(tl.int64)
    pid_bh = tl.program_id(1).to(tl.int64)
    k, valid, inverse, mean = _load_pages(
        k_ptr, valid_ptr, stride_kb, stride_kh, stride_ks, stride_mb, pid_n, pid_bh, S, HK,
        D, BLOCK_D, BLOCK_N, PAGE_SIZE, HAS_MASK,
    )  # fmt: skip
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    VECTORS: tl.constexpr = 2 if FORM == MINMAX else 1
    row = pid_bh * stride_dfp + offs_n
    source = dfp_ptr + row[:, None] * (VECTORS * BLOCK_D) + offs_d[None, :]
    first = tl.load(source, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, BLOCK_D]
    if FORM == MINMAX:
        second = tl.load(source + BLOCK_D, mask=mask_n[:, None], other=0.0)
        top = tl.max(tl.where(valid[:, :, None], k, float("-inf")), axis=1)
        low = tl.min(tl.where(valid[:, :, None], k, float("inf")), axis=1)
        is_top = (valid[:, :, None] & (k == top[:, None, :])).to(tl.float32)
        is_low = (valid[:, :, None] & (k == low[:, None, :])).to(tl.float32)
        # ties share the gradient, as in torch.amax
        grad = is_top * (first / tl.maximum(tl.sum(is_top, axis=1), 1.0))[:, None, :]
        grad += is_low * (second / tl.maximum(tl.sum(is_low, axis=1), 1.0))[:, None, :]
    else:
        grad = tl.broadcast_to((first * inverse[:, None])[:, None, :], (BLOCK_N, PAGE_SIZE, BLOCK_D))
        if FORM == SCALAR:
            gap = tl.where(valid[:, :, None], k - mean[:, None, :], 0.0)
            std = tl.sqrt(tl.sum(tl.sum(gap * gap, axis=2), axis=1) * inverse)
            dstd = tl.load(dfs_ptr + row, mask=mask_n, other=0.0)
            grad += gap * tl.where(std > 0, dstd * inverse / tl.where(std > 0, std, 1.0), 0.0)[:, None, None]
    grad = tl.where(valid[:, :, None], grad, 0.0)
    offs_s = pid_n * BLOCK_N * PAGE_SIZE + tl.arange(0, BLOCK_N * PAGE_SIZE)
    dk_ptr += (pid_bh // HK) * stride_dkb + (pid_bh % HK) * stride_dkh
    out = dk_ptr + offs_s[:, None] * stride_dks + offs_d[None, :]
    mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
    dk = tl.load(out, mask=mask, other=0.0).to(tl.float32) + tl.reshape(grad, (BLOCK_N * PAGE_SIZE, BLOCK_D))
    tl.store(out, dk.to(dk_ptr.dtype.element_ty), mask=mask)


def _blocks(page_size: int, block_d: int) -> tuple[int, int]:
    """Queries and pages per program such that one program holds about 4096 numbers."""
    tokens = max(16, 4096 // block_d)
    return tokens, max(1, tokens // page_size)


def _feature_shapes(q: torch.Tensor, k: torch.Tensor, page_size: int, score: str) -> tuple[int, int, int, int, int]:
    vectors = 2 if score == "minmax" else 1
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    return (*_blocks(page_size, block_d), block_d, vectors * block_d, triton.cdiv(k.shape[2], page_size))


def features(q, k, *, page_size: int, score: str, score_weight: float, valid: torch.Tensor | None) -> Features:
    """Features of all queries and pages; no gradient.

    Equation: 1-3, with the vote "mean" taken on the features (table in the module docstring).

    Args:
        q (`torch.Tensor`): `[B, H, T, D]`.
        k (`torch.Tensor`): `[B, HK, S, D]`.
        page_size (`int`): Tokens per page P.
        score (`str`): One of `LINEAR_FORMS`.
        score_weight (`float`): Weight w of the offset.
        valid (`torch.Tensor`, *optional*): `[B, S]` uint8, 0 where a slot takes no part in the statistics.
    Returns:
        `Features`: `F = V * BLOCK_D`; `nq` and `fs` are empty for forms without a scalar offset.

    Numerics: fp32 accumulation, two-pass variance; deterministic.
    """
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    block_t, block_n, block_d, num_features, N = _feature_shapes(q, k, page_size, score)
    scalar = score == "scalar"
    stored = torch.float32 if q.dtype == torch.float32 else torch.float16
    fq = torch.empty(B, HK, T, num_features, dtype=stored, device=q.device)
    fp = torch.empty(B, HK, N, num_features, dtype=stored, device=q.device)
    nq = torch.empty((B, HK, T) if scalar else (0,), dtype=torch.float32, device=q.device)
    fs = torch.empty((B, HK, N) if scalar else (0,), dtype=torch.float32, device=q.device)
    _soft_mask_fwd_query_features_kernel[(triton.cdiv(T, block_t), B * HK)](
        q, fq, nq, *q.stride()[:3], T, HK, score_weight,
        GROUP=H // HK, D=D, BLOCK_D=block_d, BLOCK_T=block_t, FORM=FORM[score], num_warps=4,
    )  # fmt: skip
    mask = fp if valid is None else valid
    _soft_mask_fwd_page_features_kernel[(triton.cdiv(N, block_n), B * HK)](
        k, mask, fp, fs, *k.stride()[:3], mask.stride(0), S, N, HK,
        D=D, BLOCK_D=block_d, BLOCK_N=block_n, PAGE_SIZE=page_size, FORM=FORM[score], HAS_MASK=valid is not None,
        num_warps=4,
    )  # fmt: skip
    return Features(fq, nq, fp, fs)


def add_feature_grads(dq, dk, q, k, grads: Features, *, page_size: int, score: str, score_weight: float, valid):
    """Adds to `dq` and `dk`, in place, what the gradients of the features hand down to q and k.

    Equation: 1-3 differentiated; a zero norm, a zero std and a page without valid tokens hand down nothing.

    Args:
        dq (`torch.Tensor`): `[B, H, T, D]`; dk (`torch.Tensor`): `[B, HK, S, D]`.
        q (`torch.Tensor`): As in [`features`].
        k (`torch.Tensor`): As in [`features`].
        grads (`Features`): Gradients of `fq` (dtype of q), `nq`, `fp` and `fs` (fp32).
        page_size (`int`): Tokens per page P.
        score (`str`): One of `LINEAR_FORMS`.
        score_weight (`float`): Weight w of the offset.
        valid (`torch.Tensor`, *optional*): As in [`features`].

    Numerics: fp32 arithmetic, one more rounding to the dtype of `dq` and `dk`; deterministic.
    """
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    block_t, block_n, block_d, _, N = _feature_shapes(q, k, page_size, score)
    _soft_mask_bwd_query_features_kernel[(triton.cdiv(T, block_t), B * HK)](
        q, grads.fq, grads.nq, dq, *q.stride()[:3], *dq.stride()[:3], T, HK, score_weight,
        GROUP=H // HK, D=D, BLOCK_D=block_d, BLOCK_T=block_t, FORM=FORM[score], num_warps=4,
    )  # fmt: skip
    mask = grads.fp if valid is None else valid
    _soft_mask_bwd_page_features_kernel[(triton.cdiv(N, block_n), B * HK)](
        k, mask, grads.fp, grads.fs, dk, *k.stride()[:3], mask.stride(0), *dk.stride()[:3], grads.fp.shape[2],
        S, N, HK,
        D=D, BLOCK_D=block_d, BLOCK_N=block_n, PAGE_SIZE=page_size, FORM=FORM[score], HAS_MASK=valid is not None,
        num_warps=4,
    )  # fmt: skip
