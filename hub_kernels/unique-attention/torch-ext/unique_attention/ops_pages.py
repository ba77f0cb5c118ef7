"""The public operations that write page statistics. Triton is imported inside the calls."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check_choice,
    check_dims,
    check_new,
    check_page_size,
    check_stats,
    check_triton_dims,
    empty_stats,
    kernel_rows,
    kernels,
    use_triton,
)
from .reference import PageStats
from .settings import SCORES, STATS_DTYPES


def page_stats(
    k: Tensor,
    *,
    page_size: int,
    score: str = "scalar",
    stats_dtype: str = "int4",
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    num_new: int | None = None,
    out: PageStats | None = None,
    impl: str | None = None,
) -> PageStats:
    """Statistics of the pages of a key cache (Eq. 1).

    Equation: mean_p = avg_t k_t, var_p = avg_t (k_t - mean_p)^2, std_p = sqrt(sum_d var_p[d]) over the valid tokens.

    Args:
        k (`torch.Tensor`): `[B, HK, S, D]` keys as cached, or `[num_pages, HK, P, D]` with a page table.
        page_size (`int`): Tokens per page P; power of two, 2..128.
        score (`str`, *optional*, defaults to `"scalar"`): Which statistics to store, by score form.
        stats_dtype (`str`, *optional*, defaults to `"int4"`): Storage: fp32, bf16, fp8, int8 or int4.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, slots that count.
        page_table (`torch.Tensor`, *optional*): `[B, N]` int32 physical page ids.
        num_new (`int`, *optional*): Write only the pages that hold the last `num_new` tokens of each row, into `out`.
        out (`PageStats`, *optional*): Storage to write to.
        impl (`str`, *optional*): `"triton"` or `"reference"`; by default chosen from the device.
    Returns:
        `PageStats`: `out`, or new tensors.
    Raises:
        ValueError: bad page size, score, storage or dtype; `num_new` without `out`.

    Numerics: float32 sums of distances from the first token that counts, in one pass; deterministic; reads each key
    once; graph-safe.
    """
    check_page_size(page_size)
    check_choice("score", score, SCORES)
    check_choice("stats_dtype", stats_dtype, STATS_DTYPES)
    check_dims(k)
    if out is None and num_new is not None:
        raise ValueError("`num_new` updates statistics in place: pass them as `out`.")
    settings = {
        "page_size": page_size, "score": score, "stats_dtype": stats_dtype, "seq_lens": seq_lens,
        "seq_starts": seq_starts, "token_mask": token_mask, "page_table": page_table, "num_new": num_new,
    }  # fmt: skip
    if score == "oracle" or not use_triton(k, impl, score):
        return reference.page_stats(k, **settings, out=out)
    check_triton_dims(k)
    slots = k.shape[2] if page_table is None else page_table.shape[1] * page_size
    settings |= kernel_rows(slots, seq_lens, seq_starts, token_mask, page_table)
    if out is None:
        shape = tuple(k.shape[:2]) if page_table is not None else (*k.shape[:2], -(-k.shape[2] // page_size))
        out = empty_stats(shape, k.shape[-1], score=score, stats_dtype=stats_dtype, device=k.device)
        if page_table is not None:
            for field in out:
                if field is not None:
                    field.view(torch.uint8).zero_()
    check_stats(out, score=score, stats_dtype=stats_dtype, head_dim=k.shape[-1], num_kv_heads=k.shape[1])
    kernels("page_stats").page_stats(k, out, **settings)
    return out


def append_tokens(
    k_cache: Tensor,
    v_cache: Tensor,
    stats: PageStats,
    k_new: Tensor,
    v_new: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    score: str,
    stats_dtype: str,
    seq_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Writes new keys and values into a cache and refreshes the statistics of the pages they touch, in one launch.

    Equation: slots `seq_lens - T .. seq_lens - 1` of each row take the `T` new tokens; then Eq. 1 on their pages.

    Args:
        k_cache (`torch.Tensor`): `[B, HK, S, D]`, written in place; `[num_pages, HK, P, D]` with a page table.
        v_cache (`torch.Tensor`): likewise, `DV`.
        stats (`PageStats`): Statistics of the cache, written in place.
        k_new (`torch.Tensor`): `[B, HK, T, D]`.
        v_new (`torch.Tensor`): `[B, HK, T, DV]`.
        seq_lens (`torch.Tensor`): `[B]` slots in use, the new tokens included.
        page_size (`int`): Tokens per page.
        score (`str`): Score form of `stats`.
        stats_dtype (`str`): Storage of `stats`.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, slots that count.
        page_table (`torch.Tensor`, *optional*): `[B, N]` int32 physical page ids.
        impl (`str`, *optional*): `"triton"` or `"reference"`.
    Raises:
        ValueError: shapes or dtypes of cache and new tokens differ.

    Numerics: as [`page_stats`]; rows that share a physical page must not append to it; graph-safe.
    """
    check_page_size(page_size)
    check_dims(k_cache, v_cache, k_new, v_new)
    check_new(k_cache, k_new, "keys")
    check_new(v_cache, v_new, "values")
    settings = {
        "page_size": page_size, "score": score, "stats_dtype": stats_dtype, "seq_starts": seq_starts,
        "token_mask": token_mask, "page_table": page_table,
    }  # fmt: skip
    if not use_triton(k_cache, impl, score):
        reference.append_tokens(k_cache, v_cache, stats, k_new, v_new, seq_lens, **settings)
        return
    check_triton_dims(k_cache, v_cache)
    check_stats(stats, score=score, stats_dtype=stats_dtype, head_dim=k_cache.shape[-1], num_kv_heads=k_cache.shape[1])
    slots = k_cache.shape[2] if page_table is None else page_table.shape[1] * page_size
    settings |= kernel_rows(slots, seq_lens, seq_starts, token_mask, page_table)
    kernels("page_stats").append_tokens(k_cache, v_cache, stats, k_new, v_new, **settings)
