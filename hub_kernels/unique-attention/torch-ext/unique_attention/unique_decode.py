"""One decode step: score (Eq. 2 and 3), select (Eq. 4), append (Eq. 1), attend (Eq. 5), each in a launch of its own.

Where the device allows it, a launch starts while the one before it runs, and a row goes on as soon as it is ready,
whatever the others do. With super-pages, two more launches score the pages of the best ones and select among them.
Where no row can have more pages than it attends to, one launch does it all.

May import torch, triton and the other kernels.
"""

import functools
from typing import NamedTuple

import torch

from ._checks import ROW_COUNTERS
from ._common import target_of
from .dense_decode import launch_dense
from .page_score import Scoring, launch_scores, page_scores, plan_scoring
from .page_select import SelectPlan, launch_select, padded, plan_selection, write_peaks
from .page_stats import append_tokens
from .second_level import check_listed, choose_listed
from .sparse_decode import capacity_of, launch_attend, launch_decode, plan_attention, row_bytes

# rows per multiprocessor up to which the statistics of the new token come before the attention; measured on an H200
APPEND_FIRST = 1


class Step(NamedTuple):
    """What the launches of one step share."""

    config: object
    lengths: dict
    scaling: dict
    page_table: torch.Tensor | None
    capacity: int
    dense_pages: int
    # one sector per row where launches run in step, else `None`
    counters: torch.Tensor | None
    pdl: bool


class Scratch(NamedTuple):
    """What a selection writes on the way.

    Torch gives freed memory out again in the order of the stream, which rows in step do not keep: it must all live
    until the last allocation of the step.
    """

    scores: torch.Tensor
    peaks: torch.Tensor
    groups: torch.Tensor
    # of the second level: super-pages kept, scores of their pages
    supers: torch.Tensor | None
    listed: torch.Tensor | None


class Selecting(NamedTuple):
    """How the pages of a step are chosen: sizes and scratch."""

    scoring: Scoring
    plan: SelectPlan
    scratch: Scratch
    ratio: int


def _plan_pages(scoring: Scoring, num_scored: int, page_ids, config) -> Selecting:
    """Sizes and scratch of a selection."""
    level = config.upper or config
    shape, ratio, device = page_ids.shape[:2], level.page_size // config.page_size, page_ids.device
    plan = plan_selection(num_scored, level.num_kept - level.sink_pages - level.recent_pages)
    supers = listed = None
    if ratio > 1:
        supers = torch.empty((*shape, level.num_kept), dtype=torch.int32, device=device)
        listed = torch.empty((*shape, level.num_kept * ratio), dtype=torch.float32, device=device)
    scratch = Scratch(
        padded(shape, num_scored, device), padded(shape, plan.peaks(num_scored), device),
        torch.empty((*shape, plan.groups), dtype=torch.int32, device=device), supers, listed,
    )  # fmt: skip
    return Selecting(scoring, plan, scratch, ratio)


def _first_scores(step: Step, pages: Selecting, q, scored):
    """Scores of the first level. Returns how many programs a row waits for, `None` if all are done."""
    config, level = step.config, step.config.upper or step.config
    scores, peaks = pages.scratch[:2]
    naming = {"stats_dtype": config.stats_dtype, "page_size": level.page_size, "page_table": step.page_table}
    forced = {"sink_pages": level.sink_pages, "recent_pages": level.recent_pages}
    if not pages.scoring.per_head:
        programs = launch_scores(
            q, scored, scores, peaks, pages.scoring, **naming, **step.lengths, **step.scaling, capacity=step.capacity,
            ratio=pages.ratio, dense_pages=step.dense_pages, forced=tuple(forced.values()),
            group_size=pages.plan.group_size, counters=step.counters, pdl=step.pdl,
        )  # fmt: skip
        return programs if step.counters is not None else None
    page_scores(
        q, scored, scores, score=config.score, group_reduce=config.group_reduce, **naming, **step.lengths,
        **step.scaling,
    )  # fmt: skip
    if pages.plan.group_size > 1:
        write_peaks(scores, peaks, pages.plan, page_size=level.page_size, **forced, **step.lengths)
    return None


def _choose(step: Step, pages: Selecting, q, stats, super_stats, page_ids):
    """Fills `page_ids [B, HK, K]`: all launches before the attention."""
    config, level = step.config, step.config.upper or step.config
    scores, peaks, groups, supers, listed = pages.scratch
    shared = {
        **step.lengths, "capacity": step.capacity, "ratio": pages.ratio, "dense_pages": step.dense_pages,
        "counters": step.counters, "pdl": step.pdl,
    }  # fmt: skip
    programs = _first_scores(step, pages, q, stats if supers is None else super_stats)
    launch_select(
        scores, peaks, groups, page_ids if supers is None else supers, pages.plan, page_size=level.page_size,
        sink_pages=level.sink_pages, recent_pages=level.recent_pages, programs=programs, **shared,
    )  # fmt: skip
    if supers is not None:
        choose_listed(
            q, stats, supers, page_ids, pages.scoring, page_size=config.page_size, stats_dtype=config.stats_dtype,
            **step.scaling, forced=(config.sink_pages, config.recent_pages), scores=listed, **shared,
        )  # fmt: skip


def _append(k, v, levels, token_mask, step: Step, new, first=0):
    """Writes a token, if there is any, and refreshes its page on every level from `first` on."""
    for stats, page_size in levels[first:]:
        if new is not None and stats is not None:
            append_tokens(
                k, v, stats, *new, page_size=page_size, score=step.config.score, stats_dtype=step.config.stats_dtype,
                page_table=step.page_table, token_mask=token_mask, **step.lengths, pdl=step.pdl,
            )  # fmt: skip


def unique_decode(
    q, k, v, stats, out, page_ids, *, config, score_weight, softmax_scale, softcap, sinks, seq_lens, seq_starts,
    token_mask, page_table, dense_below, counters, new, super_stats,
):  # fmt: skip
    """Fills `out [B, H, 1, DV]` and `page_ids [B, HK, K]`; with `new` keys and values the cache and the statistics."""
    batch, num_kv_heads, page_size = q.shape[0], k.shape[1], config.page_size
    rows, target = batch * num_kv_heads, target_of(q.device)
    num_pages = stats.codes.shape[2] if page_table is None else page_table.shape[1]
    dense_pages = max(config.num_kept, dense_below // page_size)
    if config.upper is not None:
        check_listed(config.upper.num_kept, config.upper.page_size // page_size)
    attended = min(dense_pages, num_pages) * page_size
    launch = launch_decode(rows, attended, row_bytes(k, v), target.num_sms, dense=num_pages <= dense_pages)
    if counters is None:
        counters = torch.zeros(rows * ROW_COUNTERS, dtype=torch.int32, device=q.device)
    call = plan_attention(
        q, k, v, out, launch, page_size=page_size, softcap=softcap, page_table=page_table, counters=counters,
        seq_lens=seq_lens, seq_starts=seq_starts, token_mask=token_mask, sinks=sinks,
    )  # fmt: skip
    step = Step(
        config, {"seq_lens": seq_lens, "seq_starts": seq_starts},
        {"score_weight": score_weight, "softmax_scale": softmax_scale}, page_table,
        min(capacity_of(k, page_table, page_size), num_pages * page_size), dense_pages,
        counters if target.in_step else None, target.dependent_launch,
    )  # fmt: skip
    num_scored = num_pages if super_stats is None else super_stats.codes.shape[2]
    scoring = plan_scoring(
        q, super_stats or stats, num_scored, score=config.score, group_reduce=config.group_reduce,
        stats_dtype=config.stats_dtype,
    )  # fmt: skip
    levels = ((stats, page_size), (super_stats, config.super_page_size))
    append = functools.partial(_append, k, v, levels, token_mask)
    attending = {"capacity": step.capacity, "softmax_scale": softmax_scale, "softcap": softcap, "pdl": step.pdl}
    if num_pages <= dense_pages:
        # no row can have more pages than it attends to
        launch_dense(
            call, page_ids, launch, stats, score=config.score, stats_dtype=config.stats_dtype, new=new, **attending
        )
        append(step, new, first=1)
        return
    if scoring.per_head:
        # these votes weigh all pages, that of the new token too
        append(step._replace(pdl=False), new)
        new = None
    # nobody waits for it before the next step, since no selection reads the page of the new token, for it is forced;
    # but the last launch is what the next step waits for, and where rows are many this one would take the others' room
    first = rows <= APPEND_FIRST * target.num_sms
    try:
        _choose(step, _plan_pages(scoring, num_scored, page_ids, config), q, stats, super_stats, page_ids)
        if first:
            append(step, new)
        launch_attend(
            call, page_ids, launch, dense_pages=dense_pages, new=new, waits=step.counters is not None, **attending
        )
    except BaseException:
        # rows would wait for ever for launches that were never made
        counters.zero_()
        raise
    if not first:
        append(step, new)
