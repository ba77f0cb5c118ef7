"""Page scores (Eq. 2), votes (Eq. 3) and selection (Eq. 4), in eager torch. Imports torch and settings only."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_pages import gather_slots, num_slots, page_bounds, row_bounds, valid_slots
from .reference_stats import PageStats, accumulation_dtype, codes_to_float, expand_scales, safe_sqrt, stats_dtype_of
from .settings import GROUP_REDUCES, resolve_score_weight

PAGES_AT_ONCE = 1024  # pages decoded from their codes at a time: the floats stay in the cache of a CPU


def _project(x: Tensor, stats: PageStats, vector: int, square: bool = False) -> Tensor:
    """`x . vector_p` (or `x . vector_p^2`) for every page, `[B, HK, M, D] -> [B, HK, M, N]`."""
    codes = stats.codes[..., vector, :].split(PAGES_AT_ONCE, -2)
    if stats.scales is None:
        scales = [None] * len(codes)
    else:
        scales = stats.scales[..., vector, :].to(x.dtype).split(PAGES_AT_ONCE, -2)
    products = []
    for code, scale in zip(codes, scales):
        y = codes_to_float(code, x.shape[-1], x.dtype)
        if scale is not None and scale.shape[-1] > 1:
            y, scale = y * expand_scales(scale, x.shape[-1]), None
        product = x @ (y.square() if square else y).mT
        # one scale per vector comes out of the dot product
        products.append(product if scale is None else product * (scale.square() if square else scale).mT)
    return torch.cat(products, -1)


def head_scores(q: Tensor, stats: PageStats, score: str, weight: float, softmax_scale: float) -> Tensor:
    """Score of every page for every query (Eq. 2).

    Equation: score(q, p) = q . mean_p + w * offset(q, p), with offset
    "scalar" ||q|| std_p; "diagonal" sqrt(sum_d q_d^2 var_p[d]); "absolute" sum_d |q_d| sqrt(var_p[d]);
    "moment" s / 2 sum_d q_d^2 var_p[d]; "principal" sqrt((q . a_p)^2 + sum_d q_d^2 r_p[d]^2) for direction a_p and
    residual r_p; "mean" 0; and "minmax" is sum_d max(q_d, 0) max_p[d] - max(-q_d, 0) min_p[d].

    Args:
        q (`torch.Tensor`): `[B, HK, M, D]` in the accumulation dtype.
        stats (`PageStats`): `[B, HK, N, ...]`.
        score (`str`): Score form of the statistics, not `"oracle"`.
        weight (`float`): w.
        softmax_scale (`float`): s, of `"moment"` only.
    Returns:
        `torch.Tensor`: `[B, HK, M, N]`, in units of the unscaled `q . k`.
    """
    if score == "minmax":
        return _project(q.clamp(min=0), stats, 0) - _project((-q).clamp(min=0), stats, 1)
    base = _project(q, stats, 0)
    if score == "mean":
        return base
    if score == "scalar":
        norm = safe_sqrt(q.square().sum(-1, keepdim=True))
        return base + weight * norm * stats.spread.to(q.dtype)[..., None, :]
    if score == "absolute":
        return base + weight * _project(q.abs(), stats, 1)
    if score == "moment":
        return base + weight * 0.5 * softmax_scale * _project(q.square(), stats, 1, square=True)
    if score == "diagonal":
        return base + weight * safe_sqrt(_project(q.square(), stats, 1, square=True))
    residual = _project(q.square(), stats, 2, square=True)
    return base + weight * safe_sqrt(_project(q, stats, 1).square() + residual)


def oracle_scores(q: Tensor, pages: Tensor, valid: Tensor, softmax_scale: float) -> Tensor:
    """True attention mass of every page as a score (Eq. 2, "oracle"), the ceiling of all score forms.

    Equation: score(q, p) = 1/s log sum_t exp(s q . k_t) over the valid tokens of the page (before any softcap).

    Args:
        q (`torch.Tensor`): `[B, HK, M, D]`.
        pages (`torch.Tensor`): `[B, HK, N, P, D]` keys.
        valid (`torch.Tensor`): `[B, HK or 1, N, P]` bool.
        softmax_scale (`float`): s.
    Returns:
        `torch.Tensor`: `[B, HK, M, N]`, the lowest finite number for pages without valid tokens.
    """
    logits = softmax_scale * (q @ pages.to(q.dtype).flatten(2, 3).mT).unflatten(-1, (-1, pages.shape[3]))
    lowest = torch.finfo(q.dtype).min
    mass = logits.masked_fill(~valid[:, :, None], lowest).logsumexp(-1) / softmax_scale
    return mass.masked_fill(~valid.any(-1)[:, :, None], lowest)


def group_vote(scores: Tensor, candidates: Tensor, group_reduce: str, softmax_scale: float) -> Tensor:
    """One score per kv head from those of its G query heads (Eq. 3).

    Equation: "mean" avg_g score_g; "max" max_g score_g; "softmax_mean" avg_g softmax_p(s score_g) over candidates;
    "shifted_max" max_g (score_g - max_p score_g).

    Args:
        scores (`torch.Tensor`): `[B, HK, G, ..., N]`.
        candidates (`torch.Tensor`): Bool, broadcast to `[B, HK, ..., N]`; all others get -inf.
        group_reduce (`str`): One of `GROUP_REDUCES`.
        softmax_scale (`float`): s.
    Returns:
        `torch.Tensor`: `[B, HK, ..., N]`.
    Raises:
        ValueError: unknown rule.
    """
    if group_reduce == "mean":
        voted = scores.mean(2)
    elif group_reduce == "max":
        voted = scores.amax(2)
    elif group_reduce in GROUP_REDUCES:
        # the lowest finite number instead of -inf: queries without candidates keep finite gradients
        masked = scores.masked_fill(~candidates.unsqueeze(2), torch.finfo(scores.dtype).min)
        if group_reduce == "softmax_mean":
            voted = torch.softmax(softmax_scale * masked, -1).mean(2)
        else:
            voted = (masked - masked.amax(-1, keepdim=True)).amax(2)
    else:
        raise ValueError(f"`group_reduce` must be one of {', '.join(GROUP_REDUCES)}, got {group_reduce!r}.")
    return voted.masked_fill(~candidates, -torch.inf)


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
    token_mask: Tensor | None = None,
) -> Tensor:
    """Score of every page for the newest query, one per kv head.

    Equation: Eq. 2 per query head (see `head_scores`), then the vote of Eq. 3 over the row's pages (see `group_vote`).

    Args:
        q (`torch.Tensor`): `[B, H, 1, D]`, after RoPE, not yet scaled.
        stats (`PageStats`): From `page_stats` with the same `score` and `stats_dtype`.
        page_size (`int`): Tokens per page P.
        score (`str`, *optional*, defaults to `"scalar"`): Score form.
        score_weight (`float`, *optional*): w of Eq. 2; `None` takes the default of the form.
        group_reduce (`str`, *optional*, defaults to `"mean"`): Vote of the query heads.
        stats_dtype (`str`, *optional*, defaults to `"int4"`): Storage of `stats`.
        softmax_scale (`float`, *optional*): s, `1 / sqrt(D)` by default.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        page_table (`torch.Tensor`, *optional*): `[B, N]` logical to physical pages.
        k (`torch.Tensor`, *optional*): Key cache; needed by `score="oracle"` only.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool; read by `score="oracle"` only.
    Returns:
        `torch.Tensor`: `[B, HK, N]` fp32 (fp64 for fp64 queries), -inf outside the row's pages.
    Raises:
        ValueError: `stats` stored otherwise than `stats_dtype` says, or `"oracle"` without `k`.
    """
    if stats_dtype_of(stats) != stats_dtype:
        raise ValueError(
            f"Expected statistics stored as {stats_dtype!r}, got {stats_dtype_of(stats)!r} ({stats.codes.dtype}); "
            "pass the `stats_dtype` that `page_stats` was called with."
        )
    if page_table is not None:
        table = page_table.clamp(min=0).long()
        codes, scales, spread = stats
        scales = None if scales is None else scales[table].transpose(1, 2)
        stats = PageStats(codes[table].transpose(1, 2), scales, spread[table].transpose(1, 2))
    batch, kv_heads, num_pages = stats.spread.shape
    acc = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q = q.to(acc).reshape(batch, kv_heads, -1, q.shape[-1])  # [B, HK, G, D]
    start, end = row_bounds(batch, num_pages * page_size, seq_lens, seq_starts, q.device)
    if score == "oracle":
        if k is None:
            raise ValueError("`score='oracle'` reads every key: expected `k`, got None; pass the key cache.")
        end = end.clamp(max=num_slots(k, page_table, page_size))
        slots = torch.arange(num_pages * page_size, device=q.device).expand(batch, 1, -1)
        pages = gather_slots(k, slots, page_table, page_size).unflatten(2, (-1, page_size))
        valid = valid_slots(slots, start, end, token_mask).unflatten(2, (-1, page_size))
        scores = oracle_scores(q, pages, valid, scale)
    else:
        scores = head_scores(q, stats, score, resolve_score_weight(score, score_weight), scale)
    first, stop = page_bounds(start, end, page_size)
    ids = torch.arange(num_pages, device=q.device)
    in_row = ((ids >= first[:, None]) & (ids < stop[:, None]))[:, None]  # [B, 1, N]
    return group_vote(scores, in_row, group_reduce, scale)


def select_pages(
    scores: Tensor,
    *,
    num_kept: int,
    sink_pages: int,
    recent_pages: int,
    page_size: int,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
) -> Tensor:
    """Pages that a query attends to: sinks, recent ones, and the best of the others.

    Equation: sinks + recent pages + the K - sink - recent highest scores of the rest, ties to the lower id (Eq. 4).

    Args:
        scores (`torch.Tensor`): `[B, HK, N]`; entries outside the row are ignored, NaN ranks lowest.
        num_kept (`int`): Pages kept K, sink and recent pages included.
        sink_pages (`int`): First pages of the row, always kept.
        recent_pages (`int`): Last pages of the row, always kept; the page being filled is one of them.
        page_size (`int`): Tokens per page P.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use; all pages by default.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
    Returns:
        `torch.Tensor`: `[B, HK, K]` int32, ascending, -1 padded; all pages of rows that have at most K.
    Raises:
        ValueError: K cannot hold the sink and recent pages.

    Numerics: exact and deterministic.
    """
    if num_kept < sink_pages + recent_pages:
        raise ValueError(
            f"Expected num_kept >= sink_pages + recent_pages = {sink_pages + recent_pages}, got {num_kept}; "
            "raise the budget."
        )
    batch, _, num_pages = scores.shape
    start, end = row_bounds(batch, num_pages * page_size, seq_lens, seq_starts, scores.device)
    first, stop = (x[:, None, None] for x in page_bounds(start, end, page_size))
    ids = torch.arange(num_pages, device=scores.device)
    in_row = (ids >= first) & (ids < stop)  # [B, 1, N]
    forced = in_row & ((ids < first + sink_pages) | (ids >= stop - recent_pages))
    limits = torch.finfo(scores.dtype)
    rank = scores.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    rank = rank.masked_fill(forced, torch.inf).masked_fill(~in_row, -torch.inf)
    # everything above the K-th best is kept, and of those equal to it the lowest ids that still fit
    threshold = rank.topk(min(num_kept, num_pages), dim=-1).values[..., -1:]
    above = rank > threshold
    equal = (rank == threshold) & in_row
    kept = above | (equal & (equal.cumsum(-1) <= num_kept - above.sum(-1, keepdim=True)))
    position = torch.where(kept, kept.cumsum(-1) - 1, num_kept)  # dropped pages land in one spare column
    page_ids = torch.full((*scores.shape[:2], num_kept + 1), -1, dtype=torch.int32, device=scores.device)
    page_ids.scatter_(-1, position, ids.to(torch.int32).expand_as(position))
    return page_ids[..., :num_kept].contiguous()
