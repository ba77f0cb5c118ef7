"""The public operations: validate, allocate, choose Triton or the reference. Triton is imported inside the calls.

Layouts, lengths, page tables and statistics are those of `reference.py`, the specification of every operation here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import (
    ROW_COUNTERS,
    check_choice,
    check_counters,
    check_dims,
    check_heads,
    check_new,
    check_page_size,
    check_query,
    check_stats,
    check_triton_dims,
    dense_rows,
    empty_stats,
    kernel_rows,
    kernels,
    resolve_scale,
    shared,
    use_triton,
)
from .ops_pages import append_tokens, page_stats
from .ops_training import soft_mask_attention
from .reference import PageStats
from .settings import GROUP_REDUCES, SCORES, UniqueConfig, resolve_score_weight

__all__ = [
    "ROW_COUNTERS",
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
    check_stats(stats, score=score, stats_dtype=stats_dtype, head_dim=q.shape[-1], num_kv_heads=stats.codes.shape[1])
    rows = kernel_rows(0, seq_lens, seq_starts, None, page_table)
    settings |= {name: rows[name] for name in ("seq_lens", "seq_starts", "page_table")}
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
    if scores.dtype != torch.float32:
        raise ValueError(f"`scores` must be float32, got {scores.dtype}.")
    settings |= {"seq_lens": shared(seq_lens), "seq_starts": shared(seq_starts)}
    page_ids = torch.empty((*scores.shape[:2], num_kept), dtype=torch.int32, device=scores.device)
    return kernels("page_select").select_pages(dense_rows(scores), page_ids, **settings)


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
    slots = k.shape[2] if page_table is None else page_table.shape[1] * page_size
    check_query(q, k, k.shape[0] if page_table is None else page_table.shape[0])
    settings |= kernel_rows(slots, seq_lens, seq_starts, token_mask, page_table) | {"sinks": dense_rows(sinks)}
    page_ids = page_ids.contiguous()
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
    dense_below: int | None = None,
    counters: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    super_stats: PageStats | None = None,
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
        dense_below (`int`, *optional*): Rows of at most `dense_below // P` pages attend to all of them; the page ids
            of those with more than K are `-1`. `None` takes that of `config`.
        counters (`torch.Tensor`, *optional*): At least `[B * HK * ROW_COUNTERS]` int32 zeros, contiguous, left
            zeroed; spares a fill a call. One tensor per stream.
        new (`tuple`, *optional*): Keys `[B, HK, 1, D]` and values `[B, HK, 1, DV]` of this token, not
            yet in the cache: they are appended as by [`append_tokens`].
        super_stats (`PageStats`, *optional*): Statistics of the super-pages of `k`, required where `config` has
            `super_page_size`; `new` refreshes them too.
        impl (`str`, *optional*): `"triton"` or `"reference"`.
    Returns:
        `torch.Tensor`: `[B, H, 1, DV]`; with `return_page_ids` also the page ids.
    Raises:
        ValueError: shapes or dtypes do not fit.

    Numerics: as the parts; deterministic; lengths stay on the device; graph-safe. Three launches (scores, selection,
    attention), five with super-pages, with `new` one more per level; where no row can have more pages than it attends
    to a single one, which takes `new` along, and one more for super-pages; two or three more for votes that need the
    best score of each head; and a fill without `counters`.
    """
    score, upper = config.score, config.upper
    dense_below = config.dense_below if dense_below is None else dense_below
    if new is not None and seq_lens is None:
        raise ValueError("`new` needs `seq_lens`, the slots in use with the new token included.")
    _check_levels(config, super_stats, page_table)
    if not use_triton(q, impl, score):
        if new is not None and seq_lens is not None:
            _append_reference(k, v, stats, super_stats, new, config, seq_lens, seq_starts, token_mask, page_table)
        return reference.unique_decode(
            q, k, v, stats, config=config, softmax_scale=softmax_scale, seq_lens=seq_lens, seq_starts=seq_starts,
            token_mask=token_mask, page_table=page_table, softcap=softcap, sinks=sinks,
            return_page_ids=return_page_ids, dense_below=dense_below, super_stats=super_stats,
        )  # fmt: skip
    check_query(q, k, k.shape[0] if page_table is None else page_table.shape[0])
    check_dims(k, v, *(new or ()))
    check_triton_dims(k, v)
    for level in (stats,) if super_stats is None else (stats, super_stats):
        check_stats(level, score=score, stats_dtype=config.stats_dtype, head_dim=k.shape[-1], num_kv_heads=k.shape[1])
    if upper is not None and super_stats is not None:
        pages, supers = stats.spread.shape[2], super_stats.spread.shape[2]
        if supers * upper.page_size < pages * config.page_size:
            raise ValueError(
                f"`super_stats` has {supers} super-pages of {upper.page_size} tokens, too few for {pages} pages of "
                f"{config.page_size}."
            )
    if new is not None:
        check_new(k, new[0], "keys", rows=q.shape[0])
        check_new(v, new[1], "values", rows=q.shape[0])
    check_counters(counters, q.shape[0] * k.shape[1], q.device)
    slots = k.shape[2] if page_table is None else page_table.shape[1] * config.page_size
    rows = kernel_rows(slots, seq_lens, seq_starts, token_mask, page_table)
    page_ids = torch.empty((q.shape[0], k.shape[1], config.num_kept), dtype=torch.int32, device=q.device)
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    kernels("unique_decode").unique_decode(
        q, k, v, stats, out, page_ids, config=config, score_weight=resolve_score_weight(score, config.score_weight),
        softmax_scale=resolve_scale(softmax_scale, q.shape[-1]), **rows, softcap=softcap, sinks=dense_rows(sinks),
        dense_below=dense_below, counters=counters, new=new, super_stats=super_stats,
    )  # fmt: skip
    return (out, page_ids) if return_page_ids else out


def _check_levels(config: UniqueConfig, super_stats: PageStats | None, page_table: Tensor | None) -> None:
    if (config.upper is None) != (super_stats is None):
        raise ValueError(
            f"super_page_size={config.super_page_size}, `super_stats` {'not ' if super_stats is None else ''}given: "
            "pass the statistics of pages of `super_page_size` tokens exactly where the settings have them."
        )
    if config.upper is not None and page_table is not None:
        raise NotImplementedError("super-pages need a contiguous cache, got a page table; set super_page_size=None.")


def _append_reference(k, v, stats, super_stats, new, config, seq_lens, seq_starts, token_mask, page_table):
    """Writes a token and refreshes its page and, where there are any, its super-page."""
    lengths = {"seq_starts": seq_starts, "token_mask": token_mask, "page_table": page_table}
    naming = {"score": config.score, "stats_dtype": config.stats_dtype}
    k_new, v_new = new
    reference.append_tokens(k, v, stats, k_new, v_new, seq_lens, page_size=config.page_size, **naming, **lengths)
    if super_stats is not None:
        reference.page_stats(
            k, page_size=config.super_page_size, **naming, **lengths, seq_lens=seq_lens, num_new=1, out=super_stats
        )
