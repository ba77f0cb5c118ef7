"""The public operations: validate, allocate, choose Triton or the reference. Triton is imported inside the calls.

Layouts, lengths, page tables and statistics are those of `reference.py`, the specification of every operation here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check_choice,
    check_dims,
    check_heads,
    check_page_size,
    check_triton_dims,
    empty_stats,
    kernels,
    resolve_scale,
    shared,
    use_triton,
)
from .ops_training import soft_mask_attention
from .reference import PageStats
from .settings import GROUP_REDUCES, SCORES, STATS_DTYPES, UniqueConfig, resolve_score_weight

__all__ = [
    "PageStats",
    "append_tokens",
    "empty_stats",
    "page_scores",
    "page_stats",
    "select_pages",
    "soft_mask_attention",
    "sparse_decode",
    "unique_decode",
]


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
        ValueError: bad page size, score, storage or dtype; `num_new` or a page table without `out`.

    Numerics: float32 accumulation, two passes; deterministic; reads each key once; graph-safe.
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
    settings["seq_lens"] = shared(seq_lens)
    if out is None:
        shape = tuple(k.shape[:2]) if page_table is not None else (*k.shape[:2], -(-k.shape[2] // page_size))
        out = empty_stats(shape, k.shape[-1], score=score, stats_dtype=stats_dtype, device=k.device)
        if page_table is not None:
            for field in out:
                if field is not None:
                    field.view(torch.uint8).zero_()
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
    for cache, new, name in ((k_cache, k_new, "keys"), (v_cache, v_new, "values")):
        if cache.dtype != new.dtype or cache.shape[-1] != new.shape[-1] or cache.shape[1] != new.shape[1]:
            raise ValueError(
                f"new {name} {list(new.shape)} {new.dtype} do not fit the cache {list(cache.shape)} {cache.dtype}: "
                "heads, head dim and dtype must agree."
            )
    settings = {
        "page_size": page_size, "score": score, "stats_dtype": stats_dtype, "seq_starts": seq_starts,
        "token_mask": token_mask, "page_table": page_table,
    }  # fmt: skip
    if not use_triton(k_cache, impl, score):
        reference.append_tokens(k_cache, v_cache, stats, k_new, v_new, seq_lens, **settings)
        return
    check_triton_dims(k_cache, v_cache)
    kernels("page_stats").append_tokens(k_cache, v_cache, stats, k_new, v_new, seq_lens=shared(seq_lens), **settings)


def page_scores(
    q: Tensor,
    stats: PageStats,
    *,
    page_size: int,
    score: str = "scalar",
    score_weight: float | None = None,
    group_reduce: str = "mean",
    stats_dtype: str = "int4",
    softmax_scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    page_table: Tensor | None = None,
    k: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """One score per page and kv head (Eq. 2 and 3).

    Equation: score(q, p) = q . mean_p + w * offset(q, p) per head, then the vote of the group.

    Args:
        q (`torch.Tensor`): `[B, H, 1, D]` queries, not scaled.
        stats (`PageStats`): Statistics of the pages.
        page_size (`int`): Tokens per page.
        score (`str`, *optional*, defaults to `"scalar"`): Form of the offset.
        score_weight (`float`, *optional*): w; `None` takes the form's default.
        group_reduce (`str`, *optional*, defaults to `"mean"`): Vote of the query heads of a kv head.
        stats_dtype (`str`, *optional*, defaults to `"int4"`): Storage of `stats`.
        softmax_scale (`float`, *optional*): s; `None` takes `D ** -0.5`.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        page_table (`torch.Tensor`, *optional*): `[B, N]` int32 physical page ids.
        k (`torch.Tensor`, *optional*): The keys, for `"oracle"` alone.
        impl (`str`, *optional*): `"triton"` or `"reference"`.
    Returns:
        `torch.Tensor`: `[B, HK, N]` float32, `-inf` outside the pages of the row.
    Raises:
        ValueError: bad shapes or names. NotImplementedError: a score without a kernel under `impl="triton"`.

    Numerics: float32; with dp4a, int8 codes meet the query as 15-bit fixed-point numbers and int4 codes as int8
    numbers with a step per 32 dims; deterministic; reads the statistics once; graph-safe.
    """
    check_page_size(page_size)
    check_choice("score", score, SCORES)
    check_choice("group_reduce", group_reduce, GROUP_REDUCES)
    check_heads(q, stats.codes.shape[1])
    settings = {
        "page_size": page_size, "score": score, "score_weight": resolve_score_weight(score, score_weight),
        "group_reduce": group_reduce, "stats_dtype": stats_dtype,
        "softmax_scale": resolve_scale(softmax_scale, q.shape[-1]), "seq_lens": seq_lens,
        "seq_starts": seq_starts, "page_table": page_table,
    }  # fmt: skip
    if not use_triton(q, impl, score):
        return reference.page_scores(q, stats, **settings, k=k)
    check_triton_dims(q)
    settings["seq_lens"] = shared(seq_lens)
    num_pages = stats.codes.shape[2] if page_table is None else page_table.shape[1]
    out = torch.empty((q.shape[0], stats.codes.shape[1], num_pages), dtype=torch.float32, device=q.device)
    return kernels("page_score").page_scores(q, stats, out, **settings)


def select_pages(
    scores: Tensor,
    *,
    num_kept: int,
    sink_pages: int,
    recent_pages: int,
    page_size: int,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The pages a row keeps (Eq. 4): sink, recent, and the best of the rest; ties go to the lower page id.

    Args:
        scores (`torch.Tensor`): `[B, HK, N]` float32.
        num_kept (`int`): K, sink and recent pages included.
        sink_pages (`int`): First pages of the row, always kept.
        recent_pages (`int`): Last pages of the row, always kept.
        page_size (`int`): Tokens per page.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        impl (`str`, *optional*): `"triton"` or `"reference"`.
    Returns:
        `torch.Tensor`: `[B, HK, K]` int32, ascending, `-1` where the row has fewer pages.
    Raises:
        ValueError: `num_kept` does not exceed `sink_pages + recent_pages`.

    Numerics: exact, deterministic, no atomics; graph-safe.
    """
    check_page_size(page_size)
    if num_kept <= sink_pages + recent_pages:
        raise ValueError(
            f"`num_kept` must exceed sink_pages + recent_pages = {sink_pages + recent_pages}, got {num_kept}."
        )
    settings = {"page_size": page_size, "sink_pages": sink_pages, "recent_pages": recent_pages,
                "seq_lens": seq_lens, "seq_starts": seq_starts}  # fmt: skip
    if not use_triton(scores, impl):
        return reference.select_pages(scores, num_kept=num_kept, **settings)
    settings["seq_lens"] = shared(seq_lens)
    page_ids = torch.empty((*scores.shape[:2], num_kept), dtype=torch.int32, device=scores.device)
    return kernels("page_select").select_pages(scores, page_ids, **settings)


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_ids: Tensor,
    *,
    page_size: int,
    softmax_scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Exact attention of one token per row over listed pages (Eq. 5).

    Equation: out = softmax(s * q . k_t + mask) v over the valid tokens t of the listed pages.

    Args:
        q (`torch.Tensor`): `[B, H, 1, D]`, after RoPE, not scaled.
        k (`torch.Tensor`): `[B, HK, S, D]`, or `[num_pages, HK, P, D]` with a page table.
        v (`torch.Tensor`): likewise, `DV`.
        page_ids (`torch.Tensor`): `[B, HK, K]` int32 logical pages, each at most once; `-1` entries are skipped.
        page_size (`int`): Tokens per page.
        softmax_scale (`float`, *optional*): s; `None` takes `D ** -0.5`.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, slots to attend to.
        page_table (`torch.Tensor`, *optional*): `[B, N]` int32 physical page ids.
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`.
        sinks (`torch.Tensor`, *optional*): `[H]` an extra logit per head in the denominator.
        impl (`str`, *optional*): `"triton"` or `"reference"`.
    Returns:
        `torch.Tensor`: `[B, H, 1, DV]` in the dtype of `q`; zeros for a row without valid tokens.
    Raises:
        ValueError: shapes or dtypes do not fit.

    Numerics: float32 accumulation; deterministic; reads the listed pages once; graph-safe.
    """
    check_page_size(page_size)
    check_heads(q, k.shape[1])
    check_dims(k, v)
    settings = {
        "page_size": page_size, "softmax_scale": resolve_scale(softmax_scale, q.shape[-1]), "seq_lens": seq_lens,
        "seq_starts": seq_starts, "token_mask": token_mask, "page_table": page_table, "softcap": softcap,
        "sinks": sinks,
    }  # fmt: skip
    if not use_triton(q, impl):
        return reference.sparse_decode(q, k, v, page_ids, **settings)
    check_triton_dims(k, v)
    settings["seq_lens"] = shared(seq_lens)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    return kernels("sparse_decode").sparse_decode(q, k, v, page_ids, out, **settings)


def unique_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stats: PageStats,
    *,
    config: UniqueConfig,
    softmax_scale: float | None = None,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_page_ids: bool = False,
    dense_below: int = 0,
    counters: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One decode step of UNIQUE attention: score all pages, keep the best, attend to them (Eq. 2 to 5).

    Args:
        q (`torch.Tensor`): `[B, H, 1, D]`, after RoPE, not scaled.
        k (`torch.Tensor`): `[B, HK, S, D]`, the new token included; `[num_pages, HK, P, D]` with a page table.
        v (`torch.Tensor`): likewise, `DV`.
        stats (`PageStats`): Statistics of `k`.
        config (`UniqueConfig`): Page size, budget, score, vote, storage.
        softmax_scale (`float`, *optional*): s; `None` takes `D ** -0.5`.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, slots to attend to.
        page_table (`torch.Tensor`, *optional*): `[B, N]` int32 physical page ids.
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`.
        sinks (`torch.Tensor`, *optional*): `[H]` an extra logit per head in the denominator.
        return_page_ids (`bool`, *optional*, defaults to `False`): Return `[B, HK, K]` int32 too.
        dense_below (`int`, *optional*, defaults to 0): Rows of at most this many tokens are dense (Triton).
        counters (`torch.Tensor`, *optional*): `[B * HK]` int32 zeros, left zeroed; spares a fill a call.
            One tensor per stream.
        new (`tuple`, *optional*): Keys `[B, HK, 1, D]` and values `[B, HK, 1, DV]` of this token, not yet in the
        cache:
            they are appended as by [`append_tokens`], in the same launch where that is possible.
        impl (`str`, *optional*): `"triton"` or `"reference"`.
    Returns:
        `torch.Tensor`: `[B, H, 1, DV]`; with `return_page_ids` also the page ids.
    Raises:
        ValueError: shapes or dtypes do not fit.

    Numerics: as the parts; deterministic; two launches; lengths stay on the device; graph-safe.
    """
    score = config.score
    if new is not None and seq_lens is None:
        raise ValueError("`new` needs `seq_lens`, the slots in use with the new token included.")
    if new is not None and not use_triton(q, impl, score):
        append_tokens(
            k, v, stats, *new, seq_lens, page_size=config.page_size, score=score, stats_dtype=config.stats_dtype,
            seq_starts=seq_starts, token_mask=token_mask, page_table=page_table, impl="reference",
        )  # fmt: skip
    if not use_triton(q, impl, score):
        return reference.unique_decode(
            q, k, v, stats, config=config, softmax_scale=softmax_scale, seq_lens=seq_lens, seq_starts=seq_starts,
            token_mask=token_mask, page_table=page_table, softcap=softcap, sinks=sinks,
            return_page_ids=return_page_ids,
        )  # fmt: skip
    check_heads(q, k.shape[1])
    check_dims(k, v)
    check_triton_dims(k, v)
    page_ids = torch.empty((q.shape[0], k.shape[1], config.num_kept), dtype=torch.int32, device=q.device)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    kernels("unique_decode").unique_decode(
        q, k, v, stats, out, page_ids, config=config, score_weight=resolve_score_weight(score, config.score_weight),
        softmax_scale=resolve_scale(softmax_scale, q.shape[-1]), seq_lens=shared(seq_lens), seq_starts=seq_starts,
        token_mask=token_mask, page_table=page_table, softcap=softcap, sinks=sinks, dense_below=dense_below,
        counters=counters, new=new,
    )  # fmt: skip
    return (out, page_ids) if return_page_ids else out
