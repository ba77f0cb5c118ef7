"""Rotary embedding of queries and keys in one launch, rounded as torch rounds it. May import torch and triton."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotary_fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_cb, stride_ct, stride_sb, stride_st, tokens,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program `(head, token, row)`; heads `H ..` are those of the keys. out = x * cos + rotate_half(x) * sin."""
    head = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    half: tl.constexpr = D // 2
    offsets = tl.arange(0, BLOCK)
    inside = offsets < half
    if head < H:
        x_ptr = q_ptr + b * stride_qb + head * stride_qh + t * stride_qt
        out_ptr = q_out_ptr + ((b * H + head) * tokens + t) * D
    else:
        x_ptr = k_ptr + b * stride_kb + (head - H) * stride_kh + t * stride_kt
        out_ptr = k_out_ptr + ((b * HK + head - H) * tokens + t) * D
    cos_ptr += b * stride_cb + t * stride_ct
    sin_ptr += b * stride_sb + t * stride_st
    dtype = q_out_ptr.dtype.element_ty
    first = tl.load(x_ptr + offsets, mask=inside).to(tl.float32)
    second = tl.load(x_ptr + half + offsets, mask=inside).to(tl.float32)
    cos_first = tl.load(cos_ptr + offsets, mask=inside).to(tl.float32)
    cos_second = tl.load(cos_ptr + half + offsets, mask=inside).to(tl.float32)
    sin_first = tl.load(sin_ptr + offsets, mask=inside).to(tl.float32)
    sin_second = tl.load(sin_ptr + half + offsets, mask=inside).to(tl.float32)
    # torch rounds each product before it adds them
    low = (first * cos_first).to(dtype).to(tl.float32) - (second * sin_first).to(dtype).to(tl.float32)
    high = (second * cos_second).to(dtype).to(tl.float32) + (first * sin_second).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, low.to(dtype), mask=inside)
    tl.store(out_ptr + half + offsets, high.to(dtype), mask=inside)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions.

    Equation: out = x * cos + rotate_half(x) * sin, with rotate_half(x) = (-x[D/2:], x[:D/2]).

    Args:
        q (`torch.Tensor`): `[B, H, T, D]`.
        k (`torch.Tensor`): `[B, HK, T, D]`.
        cos (`torch.Tensor`): `[B or 1, T, D]`, in the dtype of `q`.
        sin (`torch.Tensor`): likewise.
    Returns:
        `tuple`: Both rotated, contiguous.
    Raises:
        ValueError: shapes or dtypes do not fit.

    Numerics: products rounded to the dtype, then added in float32; one launch; graph-safe.
    """
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (batch, kv_heads, tokens, dim) or cos.shape != sin.shape or cos.shape[1:] != (tokens, dim):
        raise ValueError(
            f"`q` {list(q.shape)}, `k` {list(k.shape)} and `cos` {list(cos.shape)} do not fit: expected [B, H, T, D], "
            "[B, HK, T, D] and [B or 1, T, D]."
        )
    if {x.dtype for x in (q, k, cos, sin)} != {q.dtype} or any(x.stride(-1) != 1 for x in (q, k, cos, sin)) or dim % 2:
        raise ValueError("`q`, `k`, `cos` and `sin` must share a dtype, an even head dim, and a contiguous last dim.")
    q_out, k_out = (x.new_empty(x.shape) for x in (q, k))
    shared = [0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin)]
    _rotary_fwd_kernel[(heads + kv_heads, tokens, batch)](
        q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3],
        shared[0], cos.stride(1), shared[1], sin.stride(1), tokens,
        H=heads, HK=kv_heads, D=dim, BLOCK=triton.next_power_of_2(dim // 2), num_warps=1,
    )  # fmt: skip
    return q_out, k_out
