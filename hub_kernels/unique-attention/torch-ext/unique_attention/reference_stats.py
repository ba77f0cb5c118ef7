"""Page statistics (Eq. 1) and their storage, in eager torch. Imports torch and settings only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import vectors_per_page

PRINCIPAL_ITERATIONS = 4  # power iterations of the score form "principal"
QMAX = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}  # largest code
INT4_GROUP = 32  # consecutive dims that share a scale
_STATS_DTYPE_OF = {
    torch.float64: "fp32",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
    torch.uint8: "int4",
}


class PageStats(NamedTuple):
    """Stored statistics of pages; `[B, HK, N, ...]`, or `[num_pages, HK, ...]` with a page table.

    Args:
        codes (`torch.Tensor`): `[B, HK, N, V, C]` vectors of the score form, in the storage dtype.
        scales (`torch.Tensor`, *optional*): `[B, HK, N, V, NG]` bf16 scales of fp8, int8 and int4 codes.
        spread (`torch.Tensor`): `[B, HK, N]` total standard deviation (Eq. 1); 0 for forms without it.
    """

    codes: Tensor
    scales: Tensor | None
    spread: Tensor


class Moments(NamedTuple):
    """Exactly mergeable statistics of a set of vectors.

    Args:
        count (`torch.Tensor`): `[...]` number of vectors.
        mean (`torch.Tensor`): `[..., D]`.
        m2 (`torch.Tensor`): `[..., D]` sum of squared deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where the statistics of one-token pages lie."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Count, mean and M2 of `x` over its next-to-last dim.

    Equation: mean = avg_t x_t, m2 = sum_t (x_t - mean)^2 (Eq. 1, two passes: no cancellation at large means).

    Args:
        x (`torch.Tensor`): `[..., P, D]`.
        mask (`torch.Tensor`, *optional*): `[..., P]` bool, vectors that count.
    Returns:
        `Moments`: over P; all zero where nothing counts.
    """
    x = x.to(accumulation_dtype(x.dtype))
    if mask is None:
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    mask = mask.expand(x.shape[:-1])
    count = mask.sum(-1).to(x.dtype)
    mean = x.masked_fill(~mask[..., None], 0).sum(-2) / count.clamp(min=1)[..., None]
    deviation = (x - mean[..., None, :]).masked_fill(~mask[..., None], 0)
    return Moments(count, mean, deviation.square().sum(-2))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets, without their vectors.

    Equation: n = n_a + n_b, mean = mean_a + (mean_b - mean_a) n_b / n,
    m2 = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / n (Eq. 1; Chan, Golub and LeVeque).

    Args:
        a (`Moments`): Of the first set.
        b (`Moments`): Of the second set, same shapes.
    Returns:
        `Moments`: Of the union.
    """
    count = a.count + b.count
    share = b.count / count.clamp(min=1)
    delta = b.mean - a.mean
    mean = a.mean + delta * share[..., None]
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * (a.count * share)[..., None])


def merge_pages(pages: Moments, factor: int) -> Moments:
    """Moments of super-pages of `factor` consecutive pages each.

    Equation: mean = sum_i n_i mean_i / n, m2 = sum_i m2_i + sum_i n_i (mean_i - mean)^2 (Eq. 1, Chan over many sets).

    Args:
        pages (`Moments`): `[..., N]` and `[..., N, D]`.
        factor (`int`): Pages per super-page; the last one may hold fewer.
    Returns:
        `Moments`: `[..., ceil(N / factor)]` and `[..., ceil(N / factor), D]`.
    """
    missing = -pages.count.shape[-1] % factor
    n = F.pad(pages.count, (0, missing)).unflatten(-1, (-1, factor))
    mean_i = F.pad(pages.mean, (0, 0, 0, missing)).unflatten(-2, (-1, factor))
    m2_i = F.pad(pages.m2, (0, 0, 0, missing)).unflatten(-2, (-1, factor))
    count = n.sum(-1)
    mean = (mean_i * n[..., None]).sum(-2) / count.clamp(min=1)[..., None]
    between = (n[..., None] * (mean_i - mean[..., None, :]).square()).sum(-2)
    return Moments(count, mean, m2_i.sum(-2) + between)


def _principal(deviation: Tensor, count: Tensor) -> Tensor:
    """First principal direction of `[..., P, D]` deviations times the standard deviation along it, `[..., D]`.

    A fixed number of power iterations, started from the longest deviation (the first one of equals); its sign is
    arbitrary. Written as Cov u / sqrt(u' Cov u), it leaves a residual variance that is never negative.
    """
    longest = deviation.square().sum(-1).argmax(-1)[..., None, None]
    u = F.normalize(deviation.take_along_dim(longest, -2), dim=-1, eps=1e-30)
    for _ in range(PRINCIPAL_ITERATIONS):
        u = F.normalize((deviation @ u.mT).mT @ deviation, dim=-1, eps=1e-30)
    along = deviation @ u.mT
    norm = safe_sqrt(count[..., None] * along.square().sum(-2))
    return ((along.mT @ deviation).squeeze(-2)) / torch.where(norm > 0, norm, 1)


def page_vectors(x: Tensor, mask: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """Unquantised statistics of pages given token by token (Eq. 1), differentiable.

    Args:
        x (`torch.Tensor`): `[..., P, D]` keys of each page.
        mask (`torch.Tensor`): `[..., P]` bool, valid tokens.
        score (`str`): Score form that decides which vectors are kept.
    Returns:
        `tuple`: vectors `[..., V, D]` and spread `[...]` in the accumulation dtype.
    """
    mask = mask.expand(x.shape[:-1])
    x = x.to(accumulation_dtype(x.dtype))
    none = torch.zeros(x.shape[:-2], dtype=x.dtype, device=x.device)
    if score == "oracle":
        return x.new_empty(*x.shape[:-2], 0, x.shape[-1]), none
    if score == "minmax":
        seen = mask.any(-1)[..., None]
        high = x.masked_fill(~mask[..., None], -torch.inf).amax(-2)
        low = x.masked_fill(~mask[..., None], torch.inf).amin(-2)
        return torch.stack([torch.where(seen, high, 0), torch.where(seen, low, 0)], -2), none
    count, mean, m2 = moments(x, mask)
    variance = m2 / count.clamp(min=1)[..., None]
    if score == "mean":
        return mean[..., None, :], none
    if score == "scalar":
        return mean[..., None, :], safe_sqrt(variance.sum(-1))
    if score == "principal":
        deviation = (x - mean[..., None, :]).masked_fill(~mask[..., None], 0)
        direction = _principal(deviation, count)
        residual = safe_sqrt((variance - direction.square()).clamp(min=0))
        return torch.stack([mean, direction, residual], -2), none
    return torch.stack([mean, safe_sqrt(variance)], -2), none


def _round_up_bf16(x: Tensor) -> Tensor:
    rounded = x.to(torch.bfloat16)
    above = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(rounded.to(x.dtype) < x, above, rounded)


def quantize(vectors: Tensor, spread: Tensor, stats_dtype: str) -> PageStats:
    """Store statistics as codes and scales.

    Equation: scale = round_up_to_bf16(absmax / qmax), code = round_half_even(x / scale); a zero scale gives zero
    codes. qmax is 448 (fp8), 127 (int8), 7 (int4); int4 has one scale per group of 32 dims and packs the first half
    of a group in the low and the second half in the high nibbles of its bytes, each as code + 8. fp32 keeps the
    numbers as they are (fp64 for fp64 keys).

    Args:
        vectors (`torch.Tensor`): `[..., V, D]`.
        spread (`torch.Tensor`): `[...]`; stored as bf16 unless `stats_dtype` is `"fp32"`.
        stats_dtype (`str`): One of `STATS_DTYPES`.
    Returns:
        `PageStats`: error per number at most scale / 2 (int8, int4), |x| / 16 + scale / 1024 (fp8), |x| / 256 (bf16).
    """
    if stats_dtype == "fp32":
        return PageStats(vectors, None, spread)
    spread = spread.to(torch.bfloat16)
    if stats_dtype == "bf16":
        return PageStats(vectors.to(torch.bfloat16), None, spread)
    dim, group = vectors.shape[-1], INT4_GROUP if stats_dtype == "int4" else vectors.shape[-1]
    grouped = F.pad(vectors, (0, -dim % group)).unflatten(-1, (-1, group))  # [..., V, NG, group]
    absmax = grouped.abs().amax(-1)
    # by a tensor: on GPUs torch multiplies by the reciprocal of a Python number, which is not the quotient
    scales = _round_up_bf16(absmax / torch.full_like(absmax, QMAX[stats_dtype]))
    divisor = torch.where(scales > 0, scales, 1).to(vectors.dtype)[..., None]
    scaled = (grouped / divisor).flatten(-2)[..., :dim]
    if stats_dtype == "fp8":
        return PageStats(scaled.to(torch.float8_e4m3fn), scales, spread)
    codes = scaled.round()
    if stats_dtype == "int8":
        return PageStats(codes.to(torch.int8), scales, spread)
    low, high = _halves((F.pad(codes, (0, dim % 2)) + 8).to(torch.uint8))
    return PageStats(low | (high << 4), scales, spread)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second half of every group of `INT4_GROUP` dims, and of the shorter group at the end."""
    whole = x.shape[-1] // INT4_GROUP * INT4_GROUP
    groups = x[..., :whole].unflatten(-1, (-1, 2, INT4_GROUP // 2))
    rest = x[..., whole:].unflatten(-1, (2, -1))
    low, high = (torch.cat([groups[..., half, :].flatten(-2), rest[..., half, :]], -1) for half in range(2))
    return low, high


def _join(low: Tensor, high: Tensor) -> Tensor:
    """Inverse of `_halves`."""
    whole = low.shape[-1] // (INT4_GROUP // 2) * (INT4_GROUP // 2)
    groups = torch.stack([x[..., :whole].unflatten(-1, (-1, INT4_GROUP // 2)) for x in (low, high)], -2)
    return torch.cat([groups.flatten(-3), low[..., whole:], high[..., whole:]], -1)


def codes_to_float(codes: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Codes `[..., C]` as numbers `[..., dim]`, not yet multiplied by their scales."""
    if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
        # exact, and several times faster than the conversion of torch on the CPU: the bits of an e4m3 number, moved
        # into the fields of a half, are the number times 2^-8
        bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return bits.view(torch.float16).to(dtype).mul_(256)
    if codes.dtype == torch.uint8:
        return _join(codes & 15, codes >> 4)[..., :dim].to(dtype).sub_(8)
    return codes.to(dtype)


def expand_scales(scales: Tensor, dim: int) -> Tensor:
    """Scales `[..., NG]` as factors of `[..., dim]` codes: one for all dims, or one per `INT4_GROUP` dims."""
    return scales if scales.shape[-1] == 1 else scales.repeat_interleave(INT4_GROUP, -1)[..., :dim]


def dequantize(stats: PageStats, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The vectors that stored statistics stand for.

    Args:
        stats (`PageStats`): From `page_stats` or `quantize`.
        head_dim (`int`): D (int4 codes of an odd D hold one number more).
        dtype (`torch.dtype`, *optional*, defaults to fp32): Of the result.
    Returns:
        `torch.Tensor`: `[..., V, D]`.
    """
    x = codes_to_float(stats.codes, head_dim, dtype)
    if stats.scales is None:
        return x
    return x * expand_scales(stats.scales.to(dtype), head_dim)


def stats_dtype_of(stats: PageStats) -> str:
    """Name in `STATS_DTYPES` of the storage that statistics use."""
    return _STATS_DTYPE_OF[stats.codes.dtype]


def empty_stats(shape: tuple[int, ...], head_dim: int, score: str, stats_dtype: str, like: Tensor) -> PageStats:
    """All-zero statistics for pages of leading dims `shape`, on the device of `like`."""
    acc = accumulation_dtype(like.dtype)
    zeros = torch.zeros(*shape, vectors_per_page(score), head_dim, dtype=acc, device=like.device)
    return quantize(zeros, torch.zeros(shape, dtype=acc, device=like.device), stats_dtype)
