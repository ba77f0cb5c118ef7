"""UNIQUE attention in eager torch: the specification that every kernel is tested against, and the path of the CPU.

`B` batch, `H` query heads, `HK` kv heads, `G = H / HK`, `S` slots, `D` head dim, `P` page size, `N` pages, `K` pages
kept, `s` softmax scale. Any float dtype; fp64 inputs are computed in fp64, all others accumulate in fp32.

1. Statistics of page p over its valid keys k_t: mean_p = avg_t k_t, var_p = avg_t (k_t - mean_p)^2,
   std_p = sqrt(sum_d var_p[d]). (`page_stats`, `moments`, `merge_moments`)
2. Score of one query head: score(q, p) = q . mean_p + w * offset(q, p). (`page_scores`, forms in `head_scores`)
3. Vote of the G query heads of a kv head: one score per page and kv head. (`group_vote`)
4. Selection: sink and recent pages, then the highest scores up to K pages; ties to the lower page id. (`select_pages`)
   Two levels: 1 to 4 on super-pages first; then only the pages of the super-pages kept compete. (`unique_decode`)
5. Decode: softmax attention over the tokens of the kept pages. (`sparse_decode`)
6. Training: logits of page p get + log sigmoid((score_ip - theta_i) / temperature), theta_i the midpoint of the last
   kept and the first dropped score of query i. (`soft_mask_attention`)

Imports torch and settings only; no kernel imports it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_attention import soft_mask_attention, sparse_decode
from .reference_pages import append_tokens, page_bounds, page_stats, row_bounds
from .reference_scores import group_vote, head_scores, page_scores, select_pages
from .reference_stats import (
    Moments,
    PageStats,
    dequantize,
    empty_stats,
    merge_moments,
    merge_pages,
    moments,
    quantize,
)
from .settings import UniqueConfig

__all__ = [
    "Moments",
    "PageStats",
    "append_tokens",
    "dequantize",
    "empty_stats",
    "group_vote",
    "head_scores",
    "merge_moments",
    "merge_pages",
    "moments",
    "page_scores",
    "page_stats",
    "quantize",
    "select_pages",
    "soft_mask_attention",
    "sparse_decode",
    "unique_decode",
]


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
    super_stats: PageStats | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Score, vote, select and attend for the newest query: one decode step of UNIQUE attention.

    Equation: Eq. 2 to 5 in turn.

    Args:
        q (`torch.Tensor`): `[B, H, 1, D]`, after RoPE, not yet scaled.
        k (`torch.Tensor`): `[B, HK, S, D]`, or `[num_pages, HK, P, D]` with a page table.
        v (`torch.Tensor`): `[B, HK, S, DV]`, or paged like `k`.
        stats (`PageStats`): Statistics of `k`, stored as `config` says.
        config (`UniqueConfig`): Settings.
        softmax_scale (`float`, *optional*): s, `1 / sqrt(D)` by default.
        seq_lens (`torch.Tensor`, *optional*): `[B]` slots in use.
        seq_starts (`torch.Tensor`, *optional*): `[B]` first valid slot.
        token_mask (`torch.Tensor`, *optional*): `[B, S]` bool, tokens that count.
        page_table (`torch.Tensor`, *optional*): `[B, N]` logical to physical pages.
        softcap (`float`, *optional*): Bound of the logits.
        sinks (`torch.Tensor`, *optional*): `[H]` extra logit per head.
        return_page_ids (`bool`, *optional*, defaults to `False`): Return the kept pages too.
        dense_below (`int`, *optional*): Rows of at most `dense_below // P` pages attend to all of them; `None` takes
            that of `config`.
        super_stats (`PageStats`, *optional*): Statistics of the super-pages of `k`, where `config` has them: only
            pages in the super-pages that are kept compete.
    Returns:
        `torch.Tensor` `[B, H, 1, DV]` in the dtype of `q`, or a tuple of it and `[B, HK, K]` int32 page ids, all -1
        for rows that attend to more than K pages.
    """
    num_pages = stats.spread.shape[-1] if page_table is None else page_table.shape[1]
    rows = {"page_size": config.page_size, "seq_lens": seq_lens, "seq_starts": seq_starts}
    dense_pages = (config.dense_below if dense_below is None else dense_below) // config.page_size
    if num_pages <= max(config.num_kept, dense_pages):
        # every page of the row is kept whatever its score
        scores = torch.zeros(q.shape[0], k.shape[1], num_pages, device=q.device)
    else:
        scores = _scores(q, stats, config, softmax_scale, rows, page_table=page_table, k=k, token_mask=token_mask)
    upper = config.upper
    if upper is not None:
        kept = _kept_super_pages(q, super_stats, upper, softmax_scale, seq_lens, seq_starts)
        ratio = upper.page_size // config.page_size
        scores = scores.masked_fill(~kept.repeat_interleave(ratio, dim=-1)[..., :num_pages], float("-inf"))
    page_ids = select_pages(
        scores, num_kept=config.num_kept, sink_pages=config.sink_pages, recent_pages=config.recent_pages, **rows
    )
    attended = page_ids
    if dense_pages > config.num_kept:
        attended, page_ids = _with_dense_rows(page_ids, scores, dense_pages, rows)
    # ids come first in ascending order, so columns past the number of pages are padding
    out = sparse_decode(
        q,
        k,
        v,
        attended[..., :num_pages],
        softmax_scale=softmax_scale,
        token_mask=token_mask,
        page_table=page_table,
        softcap=softcap,
        sinks=sinks,
        **rows,
    )
    return (out, page_ids) if return_page_ids else out


def _with_dense_rows(page_ids: Tensor, scores: Tensor, dense_pages: int, rows: dict) -> tuple[Tensor, Tensor]:
    """Pages to attend to, `[B, HK, dense_pages]`: all of a row that has no more, else its selection; ids to return."""
    (batch, _, num_pages), num_kept = scores.shape, page_ids.shape[-1]
    bounds = row_bounds(batch, num_pages * rows["page_size"], rows["seq_lens"], rows["seq_starts"], scores.device)
    first, stop = page_bounds(*bounds, rows["page_size"])
    count = (stop - first)[:, None, None]
    everything = select_pages(scores, num_kept=dense_pages, sink_pages=0, recent_pages=0, **rows)
    selected = F.pad(page_ids, (0, dense_pages - num_kept), value=-1)
    dense = count <= dense_pages
    return torch.where(dense, everything, selected), page_ids.masked_fill(dense & (count > num_kept), -1)


def _scores(q, stats, config: UniqueConfig, softmax_scale, rows: dict, **keys) -> Tensor:
    """The scores of one level, `[B, HK, N]`."""
    return page_scores(
        q,
        stats,
        score=config.score,
        score_weight=config.score_weight,
        group_reduce=config.group_reduce,
        stats_dtype=config.stats_dtype,
        softmax_scale=softmax_scale,
        **rows,
        **keys,
    )


def _kept_super_pages(q, stats, upper, softmax_scale, seq_lens, seq_starts) -> Tensor:
    """Which super-pages the first level keeps: `[B, HK, NS]` bool."""
    rows = {"page_size": upper.page_size, "seq_lens": seq_lens, "seq_starts": seq_starts}
    scores = _scores(q, stats, upper, softmax_scale, rows)
    ids = select_pages(
        scores, num_kept=upper.num_kept, sink_pages=upper.sink_pages, recent_pages=upper.recent_pages, **rows
    ).long()
    kept = torch.zeros((*ids.shape[:2], scores.shape[-1] + 1), dtype=torch.bool, device=ids.device)
    # unused entries go to a column of their own
    return kept.scatter(-1, ids.where(ids >= 0, scores.shape[-1]), True)[..., :-1]
