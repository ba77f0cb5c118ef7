"""Sparse decode (Eq. 5) and soft-mask attention for training (Eq. 6), eager torch. Imports torch and settings only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_pages import gather_slots, num_slots, row_bounds, valid_slots
from .reference_scores import group_vote, head_scores, oracle_scores
from .reference_stats import PageStats, accumulation_dtype, page_vectors
from .settings import resolve_score_weight


def _softmax_times_v(logits: Tensor, mask: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """Masked softmax with an optional extra logit, times v; queries that see nothing give 0."""
    logits = logits.masked_fill(~mask, -torch.inf)
    peak = logits.detach().amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.detach())
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weights = torch.exp(logits - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak)
    return (weights @ v) / total.masked_fill(total == 0, 1)


def _softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
) -> Tensor:
    """Exact attention of the newest query over the tokens of the kept pages.

    Equation: out = sum_t softmax_t(cap(s q . k_t)) v_t over valid tokens t of the pages in page_ids (Eq. 5), with
    cap(x) = softcap tanh(x / softcap), and sinks adding exp(sink_h) to the denominator.

    Args:
        q (`torch.Tensor`): `[B, H, 1, D]`, after RoPE, not yet scaled.
        k (`torch.Tensor`): `[B, HK, S, D]`, or `[num_pages, HK, P, D]` with a page table.
        v (`torch.Tensor`): `[B, HK, S, DV]`, or paged like `k`.
        page_ids (`torch.Tensor`): `[B, HK, K]` int32 logical pages, -1 padded, each at most once.
        page_size (`int`): Tokens per page P.
        softmax_scale (`float`, *optional*): s, `1 / sqrt(D)` by default.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, tokens that count.
        page_table (`torch.Tensor`, *optional*): `[B, N]` logical to physical pages.
        softcap (`float`, *optional*): Bound of the logits.
        sinks (`torch.Tensor`, *optional*): `[H]` extra logit per head.
    Returns:
        `torch.Tensor`: `[B, H, 1, DV]` in the dtype of `q`; 0 for rows without valid tokens.

    Numerics: fp32 accumulation (fp64 for fp64 queries); deterministic; reads the kept pages only.
    """
    batch, kv_heads = page_ids.shape[:2]
    acc = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    start, end = row_bounds(batch, num_slots(k, page_table, page_size), seq_lens, seq_starts, q.device)
    offsets = torch.arange(page_size, device=q.device)
    slots = (page_ids.long()[..., None] * page_size + offsets).flatten(2)  # [B, HK, K * P]
    valid = valid_slots(slots, start, end, token_mask)
    # slots that do not take part may hold anything, NaN included
    keys = gather_slots(k, slots, page_table, page_size).to(acc)
    values = gather_slots(v, slots, page_table, page_size).to(acc).masked_fill(~valid[..., None], 0)
    query = q.reshape(batch, kv_heads, -1, q.shape[-1]).to(acc)  # [B, HK, G, D]
    logits = _softcapped(scale * (query @ keys.mT), softcap)
    extra = None if sinks is None else sinks.to(acc).reshape(1, kv_heads, -1, 1)
    out = _softmax_times_v(logits, valid[:, :, None], values, extra)
    return out.reshape(batch, q.shape[1], 1, -1).to(q.dtype)


def _paginate(
    length: int, page_size: int, cu_seq_lens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Page and document of every token, `[T]` each, and token at every slot of the pages, `[N, P]` (T where empty)."""
    bounds = torch.zeros(1, dtype=torch.int64, device=device)
    if cu_seq_lens is not None:
        bounds = cu_seq_lens.to(device, torch.int64)
    bounds = torch.cat([bounds, bounds.new_tensor([length])])  # what follows the last document is one of its own
    pages_of = (bounds.diff() + page_size - 1) // page_size
    token = torch.arange(length, device=device)
    document = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    position = token - bounds[document]
    page = (pages_of.cumsum(0) - pages_of)[document] + position // page_size
    # sum of the rounded up lengths, without asking the device
    num_pages = (length + (bounds.numel() - 1) * (page_size - 1)) // page_size
    token_at = torch.full((num_pages * page_size,), length, device=device)
    token_at[page * page_size + position % page_size] = token
    return page, document, token_at.unflatten(0, (num_pages, page_size))


def _visible_and_forced(
    page: Tensor, document: Tensor, token_at: Tensor, valid: Tensor, sink_pages: int, recent_pages: int
) -> tuple[Tensor, Tensor]:
    """Pages of the query's row up to its own, and those of them that are always kept; `[B, T, N]` bool each."""
    batch, length = valid.shape
    num_pages, num_documents = token_at.shape[0], length + 1
    # first page with a valid token, per row and document: left padding takes no sink
    first = torch.full((batch, num_documents), num_pages, device=valid.device)
    candidate = torch.where(valid, page, num_pages)
    first.scatter_reduce_(1, document.expand(batch, -1), candidate, "amin")
    first = first.gather(1, document.expand(batch, -1))[..., None]  # [B, T, 1]
    ids = torch.arange(num_pages, device=valid.device)
    own = page[:, None]  # [T, 1]
    # documents are consecutive: pages from the first of the document to the query's own are all of that document
    visible = (ids >= first) & (ids <= own)
    forced = visible & ((ids < first + sink_pages) | (ids > own - recent_pages))
    return visible, forced


def _log_gate(scores: Tensor, free: Tensor, num_free: int, temperature: float, threshold_grad: bool) -> Tensor:
    """Log of the soft mask (Eq. 6) of free pages `[B, 1, T, N]`; 0 for all others and for queries without a choice."""
    if scores.shape[-1] <= num_free:
        return torch.zeros_like(scores)
    best = scores.masked_fill(~free, -torch.inf).topk(num_free + 1, dim=-1).values[..., -2:]
    choice = free.sum(-1, keepdim=True) > num_free
    theta = best.masked_fill(~choice, 0).mean(-1, keepdim=True)
    theta = theta if threshold_grad else theta.detach()
    soft = free & choice
    # the scores of other pages are -inf: they must not reach the sigmoid, whose gradient there is 0 * inf
    return F.logsigmoid((scores.masked_fill(~soft, 0) - theta) / temperature).masked_fill(~soft, 0)


def soft_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    page_size: int,
    num_kept: int,
    sink_pages: int = 1,
    recent_pages: int = 1,
    temperature: float,
    score: str = "scalar",
    score_weight: float | None = None,
    group_reduce: str = "mean",
    softmax_scale: float | None = None,
    token_mask: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    threshold_grad: bool = False,
) -> Tensor:
    """Causal attention under the differentiable soft top-k page mask, for training.

    Equation: g_ip = sigmoid((score_ip - theta_i) / temperature), theta_i the midpoint of the last kept and the first
    dropped score; logits of the tokens of page p get + log g_ip (Eq. 6). Sink and recent pages, and all pages of
    queries that see at most K, have g = 1. Scores use unquantised statistics (Eq. 1) of pages that are complete before
    the query; the query's own page counts as one of the recent ones.

    Args:
        q (`torch.Tensor`): `[B, H, T, D]`, after RoPE, not yet scaled.
        k (`torch.Tensor`): `[B, HK, T, D]`.
        v (`torch.Tensor`): `[B, HK, T, DV]`.
        page_size (`int`): Tokens per page P.
        num_kept (`int`): Pages kept K, sink and recent pages included.
        sink_pages (`int`, *optional*, defaults to 1): First pages of the row or document, always kept.
        recent_pages (`int`, *optional*, defaults to 1): Pages up to the query's own, always kept; at least 1.
        temperature (`float`): Width of the sigmoid, > 0, in units of the page score.
        score (`str`, *optional*, defaults to `"scalar"`): Score form (Eq. 2).
        score_weight (`float`, *optional*): w of Eq. 2; `None` takes the default of the form.
        group_reduce (`str`, *optional*, defaults to `"mean"`): Vote (Eq. 3) over the complete pages it sees.
        softmax_scale (`float`, *optional*): s, `1 / sqrt(D)` by default.
        token_mask (`torch.Tensor`, *optional*): `[B, T]` bool, tokens that count.
        cu_seq_lens (`torch.Tensor`, *optional*): `[documents + 1]` bounds of packed documents, B = 1; pages
            start anew in each document.
        softcap (`float`, *optional*): Bound of the logits, applied before the mask is added.
        sinks (`torch.Tensor`, *optional*): `[H]` extra logit per head.
        threshold_grad (`bool`, *optional*, defaults to `False`): Let gradients flow through theta.
    Returns:
        `torch.Tensor`: `[B, H, T, DV]` in the dtype of `q`; 0 for queries that see nothing.
    Raises:
        ValueError: K leaves no page to choose, recent_pages < 1, temperature <= 0, or packing with B > 1.

    Numerics: fp32 accumulation (fp64 for fp64 inputs); O(T^2) memory; gradients to q, v and k (statistics included).
    """
    _check_soft_mask(q, k, num_kept, sink_pages, recent_pages, temperature, cu_seq_lens)
    batch, heads, length, dim = q.shape
    kv_heads, acc = k.shape[1], accumulation_dtype(q.dtype)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    page, document, token_at = _paginate(length, page_size, cu_seq_lens, q.device)
    valid = q.new_ones(batch, length, dtype=torch.bool) if token_mask is None else token_mask
    visible, forced = _visible_and_forced(page, document, token_at, valid, sink_pages, recent_pages)

    # pages of keys; the extra column T stands for slots past the end of a document
    keys, query = k.to(acc), q.to(acc).reshape(batch, kv_heads, -1, length, dim)  # [B, HK, G, T, D]
    paged = F.pad(keys, (0, 0, 0, 1))[:, :, token_at]  # [B, HK, N, P, D]
    paged_valid = F.pad(valid, (0, 1))[:, None, token_at]  # [B, 1, N, P]
    if score == "oracle":
        scores = oracle_scores(query.flatten(2, 3), paged, paged_valid, scale)
    else:
        stats = PageStats(*_unquantised(page_vectors(paged, paged_valid, score)))
        scores = head_scores(query.flatten(2, 3), stats, score, resolve_score_weight(score, score_weight), scale)
    ids = torch.arange(token_at.shape[0], device=q.device)
    complete = (visible & (ids < page[:, None]))[:, None]  # [B, 1, T, N]
    scores = group_vote(scores.unflatten(2, (-1, length)), complete, group_reduce, scale)
    free = (visible & ~forced)[:, None]
    log_gate = _log_gate(scores, free, num_kept - sink_pages - recent_pages, temperature, threshold_grad)

    logits = _softcapped(scale * (query @ keys[:, :, None].mT), softcap) + log_gate[:, :, None, :, page]
    token = torch.arange(length, device=q.device)
    mask = (token <= token[:, None]) & (document == document[:, None]) & valid[:, None]
    extra = None if sinks is None else sinks.to(acc).reshape(1, kv_heads, -1, 1, 1)
    values = v.to(acc).masked_fill(~valid[:, None, :, None], 0)[:, :, None]
    out = _softmax_times_v(logits, mask[:, None, None], values, extra)
    return out.reshape(batch, heads, length, -1).to(q.dtype)


def _unquantised(vectors_and_spread: tuple[Tensor, Tensor]) -> tuple[Tensor, None, Tensor]:
    return vectors_and_spread[0], None, vectors_and_spread[1]


def _check_soft_mask(
    q: Tensor,
    k: Tensor,
    num_kept: int,
    sink_pages: int,
    recent_pages: int,
    temperature: float,
    cu_seq_lens: Tensor | None,
) -> None:
    if recent_pages < 1:
        raise ValueError(f"Expected recent_pages >= 1, got {recent_pages}: the query's own page is always kept.")
    if num_kept <= sink_pages + recent_pages:
        raise ValueError(
            f"Expected num_kept > sink_pages + recent_pages = {sink_pages + recent_pages}, got {num_kept}; raise the "
            "budget so that at least one page is chosen by its score."
        )
    if temperature <= 0:
        raise ValueError(f"Expected temperature > 0, got {temperature}; use a small one for a nearly hard mask.")
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"Expected as many keys as queries, got {k.shape[2]} and {q.shape[2]}; training has no cache."
        )
    if cu_seq_lens is not None and q.shape[0] != 1:
        raise ValueError(f"Packed documents need a batch of 1, got {q.shape[0]}; flatten the batch into one row.")
