"""Norm and rotary embedding of queries and keys in one launch, rounded as torch does. May import torch and triton."""

import triton
import triton.language as tl
from torch import Tensor

from ._common import target_of


@triton.jit
def _rotary_fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_cb, stride_ct, stride_sb, stride_st, tokens, q_eps, k_eps,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HAS_NORMS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program `(head, token, row)`; heads `H ..` are those of the keys. out = x * cos + rotate_half(x) * sin.

    With `HAS_NORMS` x is the RMS norm of what is given.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    half: tl.constexpr = D // 2
    offsets = tl.arange(0, BLOCK)
    inside = offsets < half
    weight_ptr = q_weight_ptr
    eps = q_eps
    if PDL:
        tl.extra.cuda.gdc_wait()
    if head < H:
        x_ptr = q_ptr + b * stride_qb + head * stride_qh + t * stride_qt
        out_ptr = q_out_ptr + ((b * H + head) * tokens + t) * D
    else:
        x_ptr = k_ptr + b * stride_kb + (head - H) * stride_kh + t * stride_kt
        out_ptr = k_out_ptr + ((b * HK + head - H) * tokens + t) * D
        eps = k_eps
        if HAS_NORMS:
            weight_ptr = k_weight_ptr
    cos_ptr += b * stride_cb + t * stride_ct
    sin_ptr += b * stride_sb + t * stride_st
    dtype = q_out_ptr.dtype.element_ty
    first = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + half + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORMS:
        factor = 1.0 / tl.sqrt_rn((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
        first = (first * factor).to(dtype).to(tl.float32)
        second = (second * factor).to(dtype).to(tl.float32)
        first *= tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        second *= tl.load(weight_ptr + half + offsets, mask=inside, other=0.0).to(tl.float32)
        first = first.to(dtype).to(tl.float32)
        second = second.to(dtype).to(tl.float32)
    cos_first = tl.load(cos_ptr + offsets, mask=inside).to(tl.float32)
    cos_second = tl.load(cos_ptr + half + offsets, mask=inside).to(tl.float32)
    sin_first = tl.load(sin_ptr + offsets, mask=inside).to(tl.float32)
    sin_second = tl.load(sin_ptr + half + offsets, mask=inside).to(tl.float32)
    # torch rounds each product before it adds them
    low = (first * cos_first).to(dtype).to(tl.float32) - (second * sin_first).to(dtype).to(tl.float32)
    high = (second * cos_second).to(dtype).to(tl.float32) + (first * sin_second).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, low.to(dtype), mask=inside)
    tl.store(out_ptr + half + offsets, high.to(dtype), mask=inside)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    norms: tuple[Tensor, Tensor] | None = None, eps: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotates queries and keys by their positions, after an RMS norm of each head where there is one.

    Equation: out = x * cos + rotate_half(x) * sin, with rotate_half(x) = (-x[D/2:], x[:D/2]); with norms x stands for
    weight * x / sqrt(mean(x^2) + eps).

    Args:
        q (`torch.Tensor`): `[B, H, T, D]`.
        k (`torch.Tensor`): `[B, HK, T, D]`.
        cos (`torch.Tensor`): `[B or 1, T, D]`, in the dtype of `q`.
        sin (`torch.Tensor`): likewise.
        norms (`tuple`, *optional*): `[D]` weights of the norms of queries and keys.
        eps (`tuple`, *optional*): Their epsilons.
    Returns:
        `tuple`: Both rotated, contiguous.
    Raises:
        ValueError: shapes or dtypes do not fit.

    Numerics: products rounded to the dtype, then added in float32; norms in float32, rounded before and after the
    weight; one launch; graph-safe.
    """
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (batch, kv_heads, tokens, dim) or cos.shape != sin.shape or cos.shape[1:] != (tokens, dim):
        raise ValueError(
            f"`q` {list(q.shape)}, `k` {list(k.shape)} and `cos` {list(cos.shape)} do not fit: expected [B, H, T, D], "
            "[B, HK, T, D] and [B or 1, T, D]."
        )
    dtypes = {x.dtype for x in (q, k, cos, sin, *(norms or ()))}
    if dtypes != {q.dtype} or any(x.stride(-1) != 1 for x in (q, k, cos, sin)) or dim % 2:
        raise ValueError("`q`, `k`, `cos` and `sin` must share a dtype, an even head dim, and a contiguous last dim.")
    if norms is not None and any(w.shape != (dim,) for w in norms):
        raise ValueError(f"norms of heads of {dim} dims need as many weights, got {[list(w.shape) for w in norms]}.")
    q_out, k_out = (x.new_empty(x.shape) for x in (q, k))
    shared = [0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin)]
    pdl = target_of(q.device).dependent_launch
    # a fused multiply-add would leave a product unrounded
    _rotary_fwd_kernel[(heads + kv_heads, tokens, batch)](
        q, k, cos, sin, *(norms or (None, None)), q_out, k_out, *q.stride()[:3], *k.stride()[:3],
        shared[0], cos.stride(1), shared[1], sin.stride(1), tokens, *eps,
        H=heads, HK=kv_heads, D=dim, BLOCK=triton.next_power_of_2(dim // 2), HAS_NORMS=norms is not None, PDL=pdl,
        num_warps=1, enable_fp_fusion=False, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return q_out, k_out
