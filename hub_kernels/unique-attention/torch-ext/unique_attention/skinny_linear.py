"""Linear layers and norms of a few tokens, as fast as their weights can be read. May import torch and triton.

One launch takes up to three weights that share an input (queries, keys, values), or a gated pair with its product, or
adds a residual. No weight is copied or moved: a program picks its weight by its number.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from ._common import target_of

# what a launch of these kernels raises where they do not fit
FAILURES = (RuntimeError, ValueError, TypeError, TritonError)
# rows of one tile of the tensor cores; more tokens are what cuBLAS is good at
MAX_ROWS = 16


@triton.jit
def _weight_tile(w_ptr, offs_n, offs_k, n, k, K):
    """Rows `offs_n` and columns `k + offs_k` of a weight `[n, K]`; zeros outside."""
    mask = (offs_n < n)[:, None] & (k + offs_k < K)[None, :]
    return tl.load(w_ptr + offs_n.to(tl.int64)[:, None] * K + (k + offs_k)[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _skinny_linear_fwd_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, residual_ptr, o0_ptr, o1_ptr, o2_ptr,
    rows, n0, n1, n2, K,
    PARTS: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(columns)`, weight after weight, all rows. out = x w^T + b; gated: silu(x w0^T) * x w1^T."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    w_ptr, b_ptr, o_ptr, n = w0_ptr, b0_ptr, o0_ptr, n0
    if PARTS > 1 and not GATED:
        blocks0 = tl.cdiv(n0, BLOCK_N)
        blocks1 = tl.cdiv(n1, BLOCK_N)
        if pid >= blocks0:
            w_ptr, o_ptr, n = w1_ptr, o1_ptr, n1
            if HAS_BIAS:
                b_ptr = b1_ptr
        if PARTS > 2:
            if pid >= blocks0 + blocks1:
                w_ptr, o_ptr, n = w2_ptr, o2_ptr, n2
                if HAS_BIAS:
                    b_ptr = b2_ptr
            pid -= tl.where(pid >= blocks0 + blocks1, blocks1, 0)
        pid -= tl.where(pid >= blocks0, blocks0, 0)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        # the first weights are on their way before the input is there
        w = _weight_tile(w_ptr, offs_n, offs_k, n, 0, K)
        acc_k = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if GATED:
            u = _weight_tile(w1_ptr, offs_n, offs_k, n, 0, K)
            up_k = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if PDL:
            tl.extra.cuda.gdc_wait()
        for k in range(0, K, BLOCK_K):
            next_w = _weight_tile(w_ptr, offs_n, offs_k, n, k + BLOCK_K, K)
            if GATED:
                next_u = _weight_tile(w1_ptr, offs_n, offs_k, n, k + BLOCK_K, K)
            x = tl.load(x_ptr + k + offs_k, mask=k + offs_k < K, other=0.0).to(tl.float32)
            acc_k += w.to(tl.float32) * x[None, :]
            w = next_w
            if GATED:
                up_k += u.to(tl.float32) * x[None, :]
                u = next_u
        acc = tl.sum(acc_k, 1)[None, :]
        if GATED:
            up = tl.sum(up_k, 1)[None, :]
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if GATED:
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if PDL:
            tl.extra.cuda.gdc_wait()
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            mask_x = (offs_m < rows)[:, None] & (k + offs_k < K)[None, :]
            x = tl.load(x_ptr + offs_m[:, None] * K + (k + offs_k)[None, :], mask=mask_x, other=0.0)
            w = _weight_tile(w_ptr, offs_n, offs_k, n, k, K)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            if GATED:
                u = _weight_tile(w1_ptr, offs_n, offs_k, n, k, K)
                up = tl.dot(x, tl.trans(u), up, input_precision="ieee")
    dtype = o0_ptr.dtype.element_ty
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
    y = acc.to(dtype)
    # rounded where torch rounds: after every operation
    if GATED:
        if HAS_BIAS:
            up += tl.load(b1_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
        gate = y.to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        y = (gate * up.to(dtype).to(tl.float32)).to(dtype)
    mask = (offs_m < rows)[:, None] & (offs_n < n)[None, :]
    offs = offs_m[:, None] * n + offs_n[None, :]
    if HAS_RESIDUAL:
        y = (y.to(tl.float32) + tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(o_ptr + offs, y, mask=mask)


@triton.jit
def _rms_norm_fwd_kernel(x_ptr, weight_ptr, out_ptr, K, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program `(row)`. out = weight * x / sqrt(mean(x^2) + eps), rounded before the weight too."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    offs = tl.arange(0, BLOCK)
    mask = offs < K
    start = tl.program_id(0).to(tl.int64) * K
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / K + eps)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + start + offs, ((x * factor).to(dtype).to(tl.float32) * weight).to(dtype), mask=mask)


class LinearLaunch(NamedTuple):
    """Tile sizes of one launch."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    num_warps: int


# where `benchmarks.linear --sweep` found better tiles than the rule below, which prints entries for this table:
# multiprocessors, rows (1, or 16 for any more), outputs, inputs, gated
MEASURED: dict[tuple[int, int, int, int, bool], LinearLaunch] = {
    (132, 1, 6144, 4096, False): LinearLaunch(1, 1, 2048, 1, 2),
    (132, 16, 6144, 4096, False): LinearLaunch(16, 16, 512, 3, 2),
    (132, 1, 12288, 4096, True): LinearLaunch(1, 2, 2048, 1, 4),
    (132, 1, 4096, 1024, False): LinearLaunch(1, 8, 512, 1, 4),
    (132, 1, 1024, 2048, False): LinearLaunch(1, 4, 2048, 1, 8),
    (132, 1, 3072, 1024, True): LinearLaunch(1, 4, 512, 1, 2),
    (132, 16, 3072, 1024, True): LinearLaunch(16, 32, 256, 4, 4),
    (132, 1, 1024, 3072, False): LinearLaunch(1, 2, 2048, 1, 8),
    (132, 16, 1024, 3072, False): LinearLaunch(16, 32, 512, 3, 2),
    (132, 1, 151936, 1024, False): LinearLaunch(1, 4, 512, 1, 2),
}


def plan_linear(rows: int, columns: int, depth: int, gated: bool, num_sms: int) -> LinearLaunch:
    """Tiles for `rows` tokens, `columns` outputs of all weights together and `depth` inputs."""
    measured = MEASURED.get((num_sms, 1 if rows == 1 else MAX_ROWS, columns, depth, gated))
    if measured is not None:
        return measured
    if rows == 1:
        # four programs per multiprocessor keep its reads in flight
        block_n = next((b for b in (8, 4) if columns >= 4 * num_sms * b and not (gated and b == 8)), 2)
        return LinearLaunch(1, block_n, min(1024, triton.next_power_of_2(depth)), 1, 4)
    fits = max(16, triton.next_power_of_2(depth))
    if columns >= 64 * num_sms:
        return LinearLaunch(MAX_ROWS, 64, min(128, fits), 3 if gated else 4, 2)
    # one program per multiprocessor, if it has much to read, or two
    block_n = 32 if columns >= 24 * num_sms and depth >= 4096 else 16
    return LinearLaunch(MAX_ROWS, block_n, min(256, fits), 4 if gated else 6, 2)


def skinny_linear(
    x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...] | None, outs: tuple[Tensor, ...],
    residual: Tensor | None = None, gated: bool = False,
) -> None:  # fmt: skip
    """Linear layers of at most 16 tokens in one launch.

    Equation: out_i = x w_i^T + b_i (+ residual); gated: out_0 = silu(x w_0^T + b_0) * (x w_1^T + b_1).

    Args:
        x (`torch.Tensor`): `[..., K]`, contiguous, at most 16 rows.
        weights (`tuple`): One to three of `[N_i, K]`, contiguous; two of one shape where `gated`.
        biases (`tuple`, *optional*): `[N_i]` each.
        outs (`tuple`): `[..., N_i]`, contiguous, to be filled; one where `gated`.
        residual (`torch.Tensor`, *optional*): `[..., N_0]`, contiguous; one weight only.
        gated (`bool`, *optional*, defaults to `False`): The gated form.
    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Numerics: products summed in float32, every result rounded where torch rounds it; deterministic; reads each weight
    once; graph-safe. Does not wait for the launch before it until the input is needed.
    """
    depth = x.shape[-1]
    rows = x.numel() // max(depth, 1)
    tensors = (x, *weights, *(biases or ()), *outs, *(() if residual is None else (residual,)))
    expected = 1 if gated else len(weights)
    fits = 1 <= rows <= MAX_ROWS and 1 <= len(weights) <= 3 and len(outs) == expected
    fits = fits and all(w.dim() == 2 and w.shape[1] == depth for w in weights)
    fits = fits and all(o.numel() == rows * w.shape[0] for o, w in zip(outs, weights))
    fits = fits and (biases is None or [b.numel() for b in biases] == [w.shape[0] for w in weights])
    fits = fits and (not gated or (len(weights) == 2 and weights[0].shape == weights[1].shape))
    fits = fits and (residual is None or (expected == 1 and residual.numel() == outs[0].numel()))
    if not fits or any(t.dtype != x.dtype or not t.is_contiguous() for t in tensors):
        raise ValueError(
            f"expected 1 to {MAX_ROWS} rows, one to three weights over {depth} inputs, and results, biases and a "
            f"residual to match, contiguous and of {x.dtype}; got x {list(x.shape)}, weights "
            f"{[list(w.shape) for w in weights]}, results {[list(o.shape) for o in outs]}."
        )
    target = target_of(x.device)
    sizes = [w.shape[0] for w in weights]
    plan = plan_linear(rows, sizes[0] if gated else sum(sizes), depth, gated, target.num_sms)
    programs = sum(triton.cdiv(size, plan.block_n) for size in (sizes[:1] if gated else sizes))
    pad = (None,) * (3 - len(weights))
    pdl = target.dependent_launch
    _skinny_linear_fwd_kernel[(programs,)](
        x, *weights, *pad, *(biases or (None,) * len(weights)), *pad, residual, *outs, *(None,) * (3 - len(outs)),
        rows, *sizes, *(0,) * (3 - len(sizes)), depth,
        PARTS=len(weights), GATED=gated, HAS_BIAS=biases is not None, HAS_RESIDUAL=residual is not None,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, STAGES=plan.stages, PDL=pdl,
        num_warps=plan.num_warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """RMS norm of few rows, in one launch that starts while the one before it ends.

    Equation: out = weight * x / sqrt(mean(x^2) + eps), rounded before the multiplication as Transformers does.

    Args:
        x (`torch.Tensor`): `[..., K]`, contiguous.
        weight (`torch.Tensor`): `[K]`.
        eps (`float`): Added to the mean square.
        out (`torch.Tensor`): As `x`, to be filled.
    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Numerics: float32 inside; deterministic; graph-safe.
    """
    fits = x.dim() and weight.shape == x.shape[-1:] and out.shape == x.shape and x.dtype == weight.dtype == out.dtype
    if not fits or not (x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()):
        raise ValueError(
            f"expected a weight of {x.shape[-1:]} and a result like x, contiguous and of {x.dtype}; got weight "
            f"{list(weight.shape)}, {weight.dtype} and result {list(out.shape)}, {out.dtype}."
        )
    width, pdl = x.shape[-1], target_of(x.device).dependent_launch
    block = triton.next_power_of_2(width)
    _rms_norm_fwd_kernel[(x.numel() // width,)](
        x, weight, out, width, eps, BLOCK=block, PDL=pdl, num_warps=max(1, min(8, block // 512)),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
