"""Soft-mask attention for training (Eq. 6): fused forward and backward, O(T) memory and one byte per tile.

May import torch, triton, `settings`, `_common` and `soft_mask_*`. How a call runs:

1. Packed documents are moved to a layout in which every document starts at a page (`_pack`), so pages are aligned
   slots from here on and "same document" is "page not before the first page of the query's document".
2. Features of queries and pages make the page score a product `fq . fp + nq * fs` (`soft_mask_stats`).
3. Thresholds per query, exact, and from them the lists of open tiles (`soft_mask_select`).
4. Attention over the open tiles (`soft_mask_fwd`); two kernels walk the same lists backward (`soft_mask_bwd`).

Skipped tiles. With `L_i(X) = sum_{t in X} exp(logit_it)` before the gate, a query loses at most the share
`d_i = skip_below * L_i(skipped) / L_i(kept with g = 1)` of its softmax mass, and its output moves by at most
`2 d_i max|v|`. `skip_below` is `eps(dtype)^2` unless given: 6e-5 for bf16, 1e-6 for fp16, 1e-14 for fp32.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from ._common import target_of
from .settings import resolve_score_weight
from .soft_mask_bwd import _soft_mask_bwd_dkv_kernel, _soft_mask_bwd_dq_kernel
from .soft_mask_fwd import _soft_mask_fwd_attend_kernel
from .soft_mask_select import open_lists, select_tiles
from .soft_mask_stats import LINEAR_FORMS, Features, add_feature_grads, features


class Tile(NamedTuple):
    """Tile of one kernel and how its program runs."""

    rows: int  # queries of a tile, times the heads of a group
    keys: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """Tiles of the three attention kernels, and the program that searches thresholds."""

    fwd: Tile
    dq: Tile
    dkv: Tile
    step_rows: int  # rows that dk and dv take at a time
    threshold: tuple[int, int, int] = (128, 32, 8)  # queries, pages at a time, num_warps


# by largest head dim and bytes per number; two stages copy and compute in turn, three at the same time
LAUNCH = {
    (64, 2): Launch(*[Tile(64, 64, 4, 3)] * 3, 64),
    (128, 2): Launch(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 3), 64, threshold=(64, 32, 4)),
    (256, 2): Launch(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), 32),
    (64, 4): Launch(*[Tile(32, 32, 4, 1)] * 3, 32),
    (128, 4): Launch(*[Tile(32, 32, 4, 1)] * 3, 16),
    (256, 4): Launch(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), 16, threshold=(64, 32, 4)),
}
# where a program has less shared memory than on Hopper
LAUNCH_SMALL = LAUNCH | {(128, 2): Launch(Tile(64, 64, 4, 2), Tile(64, 64, 8, 3), Tile(64, 64, 8, 3), 32)}
# small tiles, so that small tests see many of them, of another shape in every kernel
LAUNCH_INTERPRETER = Launch(Tile(32, 32, 1, 1), Tile(32, 16, 1, 1), Tile(64, 32, 1, 1), 16, threshold=(16, 16, 1))
MAX_GROUP = 16
MIN_BLOCK_T = 4


class Layout(NamedTuple):
    """First valid slot of each query's row or document, int32 `[B, T]` (expanded), and validity, uint8 `[B, T]`."""

    start: torch.Tensor
    valid: torch.Tensor | None
    packed: bool = False  # whether queries of a row may differ in their first slot


class Settings(NamedTuple):
    """Everything about a call that is not a tensor."""

    page_size: int
    num_kept: int
    sink_pages: int
    recent_pages: int
    temperature: float
    score: str
    score_weight: float
    softmax_scale: float
    softcap: float | None
    threshold_grad: bool
    skip_below: float


def supports(*, score: str, group_reduce: str) -> bool:
    """Whether the kernels compute this score form and vote; the reference computes all of them.

    Args:
        score (`str`): Score form (Eq. 2).
        group_reduce (`str`): Vote (Eq. 3).
    Returns:
        `bool`: True for the forms that are linear in what they read of the query, with the vote "mean".
    """
    return score in LINEAR_FORMS and group_reduce == "mean"


def soft_mask_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    token_mask: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    threshold_grad: bool = False,
    skip_below: float | None = None,
) -> torch.Tensor:
    """Causal attention under the differentiable soft top-k page mask, for training.

    Equation: logits of the tokens of page p get + log sigmoid((score_ip - theta_i) / temperature) (Eq. 6).

    Args:
        q (`torch.Tensor`): `[B, H, T, D]`, fp16, bf16 or fp32, after RoPE, not yet scaled.
        k (`torch.Tensor`): `[B, HK, T, D]`.
        v (`torch.Tensor`): `[B, HK, T, DV]`.
        page_size (`int`): Tokens per page P, a power of two.
        num_kept (`int`): Pages kept K, sink and recent pages included.
        sink_pages (`int`, *optional*, defaults to 1): First pages of the row or document, always kept.
        recent_pages (`int`, *optional*, defaults to 1): Pages up to the query's own, always kept; at least 1.
        temperature (`float`): Width of the sigmoid, > 0, in units of the page score.
        score (`str`, *optional*, defaults to `"scalar"`): One of `LINEAR_FORMS`.
        score_weight (`float`, *optional*): w of Eq. 2; `None` takes the default of the form.
        group_reduce (`str`, *optional*, defaults to `"mean"`): Vote (Eq. 3); only `"mean"`.
        softmax_scale (`float`, *optional*): s, `1 / sqrt(D)` by default.
        token_mask (`torch.Tensor`, *optional*): `[B, T]` bool, tokens that count.
        cu_seq_lens (`torch.Tensor`, *optional*): `[documents + 1]` bounds of packed documents, B = 1; pages start
            anew in each.
        softcap (`float`, *optional*): Bound of the logits, applied before the mask is added.
        sinks (`torch.Tensor`, *optional*): `[H]` extra logit per head.
        threshold_grad (`bool`, *optional*, defaults to `False`): Let gradients flow through theta.
        skip_below (`float`, *optional*): Tiles in which no gate reaches it are skipped; `None` takes `eps(dtype)^2`, 0
            skips nothing.
    Returns:
        `torch.Tensor`: `[B, H, T, DV]` in the dtype of `q`; 0 for queries that see nothing.
    Raises:
        NotImplementedError: score form, vote, dtype or group size without a kernel.

    Numerics: fp32 softmax and statistics; with 16-bit inputs the features of queries and pages are rounded to fp16
    before their product, an error of the score that 1 / temperature amplifies; thresholds are exact for those scores.
    No atomics, bit for bit reproducible; never waits for the device.
    """
    _check_supported(q, k, page_size, score, group_reduce)
    settings = Settings(
        page_size, num_kept, sink_pages, recent_pages, temperature, score, resolve_score_weight(score, score_weight),
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, softcap, threshold_grad,
        torch.finfo(q.dtype).eps ** 2 if skip_below is None else skip_below,
    )  # fmt: skip
    if cu_seq_lens is None:
        return _SoftMaskAttention.apply(q, k, v, sinks, _row_layout(q, token_mask), settings)
    slots, num_slots, layout = _pack(cu_seq_lens, token_mask, q.shape[2], page_size)
    q, k, v = (x.new_zeros(*x.shape[:2], num_slots, x.shape[3]).index_copy(2, slots, x) for x in (q, k, v))
    return _SoftMaskAttention.apply(q, k, v, sinks, layout, settings).index_select(2, slots)


def _check_supported(q: torch.Tensor, k: torch.Tensor, page_size: int, score: str, group_reduce: str) -> None:
    if not supports(score=score, group_reduce=group_reduce):
        raise NotImplementedError(
            f"Expected score in {', '.join(LINEAR_FORMS)} with group_reduce='mean', got score={score!r} with "
            f"group_reduce={group_reduce!r}; use impl='reference' or another score."
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise NotImplementedError(f"Expected float16, bfloat16 or float32, got {q.dtype}; use impl='reference'.")
    if q.shape[1] // k.shape[1] > MAX_GROUP:
        raise NotImplementedError(
            f"Expected at most {MAX_GROUP} query heads per kv head, got {q.shape[1]} for {k.shape[1]}; use "
            "impl='reference'."
        )
    if page_size & (page_size - 1) or q.shape[-1] > 256:
        raise NotImplementedError(
            f"Expected a power of two as page_size and head_dim <= 256, got {page_size} and {q.shape[-1]}; use "
            "impl='reference'."
        )


def _row_layout(q: torch.Tensor, token_mask: torch.Tensor | None) -> Layout:
    B, _, T, _ = q.shape
    if token_mask is None:
        return Layout(torch.zeros(1, 1, dtype=torch.int32, device=q.device).expand(B, T), None)
    start = torch.where(token_mask.any(-1), token_mask.int().argmax(-1), T)
    return Layout(start.to(torch.int32)[:, None].expand(B, T), token_mask.to(torch.uint8).contiguous())


def _pack(cu_seq_lens, token_mask, length: int, page_size: int) -> tuple[torch.Tensor, int, Layout]:
    """Slots of the tokens when every document starts at a page, how many slots there are, and their layout."""
    device = cu_seq_lens.device
    # what follows the last document is one of its own
    bounds = torch.cat([cu_seq_lens.long(), torch.full((1,), length, device=device)])
    # the sum of the rounded up lengths is at most this, and asking the device for it would make the host wait
    num_slots = (length + (bounds.numel() - 1) * (page_size - 1)) // page_size * page_size
    rounded = (bounds.diff() + page_size - 1) // page_size * page_size
    first = rounded.cumsum(0) - rounded
    token = torch.arange(length, device=device)
    document = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    slots = first[document] + token - bounds[document]
    if token_mask is None:
        of_document, valid = first, None
    else:
        where = torch.where(token_mask[0], slots, num_slots)
        of_document = torch.full_like(first, num_slots).scatter_reduce(0, document, where, "amin")
        valid = torch.zeros(1, num_slots, dtype=torch.uint8, device=device)
        valid[0, slots] = token_mask[0].to(torch.uint8)
    start = torch.full((1, num_slots), num_slots, dtype=torch.int32, device=device)
    start[0, slots] = of_document[document].to(torch.int32)
    return slots, num_slots, Layout(start, valid, packed=True)


class Plan(NamedTuple):
    """What the kernels are launched with: shared settings, tiles of each, and the selection."""

    meta: dict
    fwd: dict
    dq: dict
    dkv: dict
    select: dict


def _plan(q, k, v, layout: Layout, settings: Settings) -> Plan:
    group = q.shape[1] // k.shape[1]
    group_pow2 = triton.next_power_of_2(group)
    block_d, block_dv = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v))
    size = q.element_size()
    num_features = block_d * (2 if settings.score == "minmax" else 1)
    target = target_of(q.device)
    launches = LAUNCH if target.backend == "cuda" and target.arch >= 90 else LAUNCH_SMALL
    interpreted = target.backend == "interpreter"
    launch = LAUNCH_INTERPRETER if interpreted else launches[max(64, block_d, block_dv), size]
    meta = {
        "sink_pages": settings.sink_pages, "recent_pages": settings.recent_pages, "scale": settings.softmax_scale,
        "softcap": settings.softcap or 0.0, "inv_temperature": min(1.0 / settings.temperature, 1e30),
        "GROUP": group, "GROUP_POW2": group_pow2, "D": q.shape[-1], "DV": v.shape[-1],
        "BLOCK_D": block_d, "BLOCK_DV": block_dv, "PAGE_SIZE": settings.page_size, "NUM_FEATURES": num_features,
        "HAS_SCALAR": settings.score == "scalar", "HAS_SOFTCAP": settings.softcap is not None,
        "HAS_MASK": layout.valid is not None, "PRECISION": "ieee" if size == 4 else "tf32",
    }  # fmt: skip

    def tile(rows: int, keys: int, num_warps: int, num_stages: int, hip_stages: int) -> dict:
        block_t = max(rows // group_pow2, MIN_BLOCK_T)
        while block_t * num_features * size > 32 * 1024:
            block_t //= 2
        # eight warps where four would have to spill: rows of many heads, long accumulators of dfq
        if not interpreted and (block_t * group_pow2 > rows or block_t * num_features >= 8192):
            num_warps = 8
        if target.backend == "hip":  # 64 KB of shared memory
            num_stages = min(num_stages, hip_stages)
        return {
            "BLOCK_T": block_t, "BLOCK_S": keys, "CHUNK": min(settings.page_size, keys // 16),
            "num_warps": num_warps, "num_stages": num_stages,
        }  # fmt: skip

    fwd, dq, dkv = tile(*launch.fwd, 3), tile(*launch.dq, 2), tile(*launch.dkv, 1)
    dkv["PACKED"] = layout.packed
    dkv["STEP_T"] = min(dkv["BLOCK_T"], max(MIN_BLOCK_T, launch.step_rows // group_pow2))
    meta["ROUND_T"] = max(x["BLOCK_T"] for x in (fwd, dq, dkv))
    # one map of open tiles serves all three: its tiles are the smallest of theirs
    block_t, block_s = (min(x[name] for x in (fwd, dq, dkv)) for name in ("BLOCK_T", "BLOCK_S"))
    (queries, pages, num_warps), chunks = launch.threshold, 64
    if num_features * size > 512:
        chunks = 32
        queries, pages, num_warps = min(queries, 64 if num_features * size <= 1024 else 32), min(pages, 32), 4
    parts = 1 if size == 4 else max(1, queries // block_t)  # fp32 products take registers, not tensor cores
    select = {
        "num_free": settings.num_kept - settings.sink_pages - settings.recent_pages,
        "cut": math.log(settings.skip_below / (1 - settings.skip_below)) if settings.skip_below > 0 else -math.inf,
        "threshold": {"BLOCK_T": queries, "BLOCK_N": pages, "num_warps": num_warps},
        "chunks": chunks,
        "tiles": {"BLOCK_T": block_t, "BLOCK_S": block_s, "PARTS": parts, "num_warps": num_warps},
    }  # fmt: skip
    return Plan(meta, fwd, dq, dkv, select)


class _SoftMaskAttention(torch.autograd.Function):
    """Forward and backward on aligned pages; `layout` and `settings` are no tensors to autograd."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, layout, settings):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        B, H, T, _ = q.shape
        HK = k.shape[1]
        plan = _plan(q, k, v, layout, settings)
        form = {name: getattr(settings, name) for name in ("page_size", "score", "score_weight")}
        feats = features(q, k, **form, valid=layout.valid)
        thresholds, is_open = select_tiles(*feats, layout, plan.meta, plan.select, settings.threshold_grad)
        # [B, T, H, DV] in memory: that is where the model wants it next
        out = torch.empty(B, T, H, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)
        lse = _per_row(B, HK, T, plan, q.device)
        valid = lse if layout.valid is None else layout.valid
        lists, counts = open_lists(is_open, T, plan.select["tiles"], plan.fwd, by_keys=False)
        NQB, NKB = lists.shape[1:]
        _soft_mask_fwd_attend_kernel[(NQB, B * HK)](
            q, k, v, out, lse, *feats, thresholds.theta, layout.start, valid, lse if sinks is None else sinks,
            lists, counts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *layout.start.stride(),
            valid.stride(0), T, feats.fp.shape[2], NQB, NKB, HK, **plan.meta, **plan.fwd, HAS_SINKS=sinks is not None,
        )  # fmt: skip
        # features and lists are cheap to make again and would stay in memory for every layer
        ctx.save_for_backward(q, k, v, sinks, out, lse, layout.start, layout.valid, *thresholds, is_open)
        ctx.threshold_grad, ctx.plan, ctx.form = settings.threshold_grad, plan, form
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, sinks, out, lse, start, valid, theta, above, below, is_open = ctx.saved_tensors
        plan, form = ctx.plan, ctx.form
        feats = features(q, k, **form, valid=valid)
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        (B, HK, T, _), N = k.shape, feats.fp.shape[2]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        delta = _per_row(B, HK, T, plan, q.device)
        dtheta = torch.empty_like(theta) if ctx.threshold_grad else theta
        dfq, dnq = torch.empty_like(feats.fq, dtype=q.dtype), torch.empty_like(feats.nq)
        mask = lse if valid is None else valid
        edges = (*start.stride(), mask.stride(0), T, N)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        lists, counts = open_lists(is_open, T, plan.select["tiles"], plan.dq, by_keys=False)
        NQB, NKB = lists.shape[1:]
        _soft_mask_bwd_dq_kernel[(NQB, B * HK)](
            q, k, v, out, dout, lse, *feats, theta, above, below, start, mask,
            lists, counts, dq, dfq, dnq, delta, dtheta,
            *strides, *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3], *edges, NQB, NKB, HK,
            **plan.meta, **plan.dq, THRESHOLD_GRAD=ctx.threshold_grad,
        )  # fmt: skip
        lists, counts = open_lists(is_open, T, plan.select["tiles"], plan.dkv, by_keys=True)
        NKB, NQB = lists.shape[1:]
        page_size, block_s = plan.meta["PAGE_SIZE"], plan.dkv["BLOCK_S"]
        pages_per_tile, tiles_per_page = max(1, block_s // page_size), max(1, page_size // block_s)
        dfp = torch.empty(B * HK, NKB, pages_per_tile, feats.fp.shape[3], dtype=torch.float32, device=q.device)
        dfs = torch.empty(dfp.shape[:3], dtype=torch.float32, device=q.device)
        _soft_mask_bwd_dkv_kernel[(B * HK, NKB)](
            q, k, v, dout, lse, delta, *feats, theta, dtheta, above, below, start, mask,
            lists, counts, dk, dv, dfp, dfs,
            *strides, *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *edges, NQB, NKB, HK,
            **plan.meta, **plan.dkv, THRESHOLD_GRAD=ctx.threshold_grad,
        )  # fmt: skip
        dfp, dfs = (_sum_tiles(x.flatten(1, 2), tiles_per_page).unflatten(0, (B, HK)) for x in (dfp, dfs))
        add_feature_grads(dq, dk, q, k, Features(dfq, dnq, dfp, dfs), **form, valid=valid)
        dsinks = None
        if sinks is not None:
            # d loss / d sink_h = -sum p_sink delta, with p_sink = exp(sink - lse)
            group = plan.meta["GROUP"]
            lse, delta = (x[:, :, :T, :group] for x in (lse, delta))
            p_sink = torch.exp2(sinks.float().view(HK, 1, group) * math.log2(math.e) - lse)
            dsinks = -(p_sink * delta).sum((0, 2)).flatten().to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None


def _per_row(B: int, HK: int, T: int, plan: Plan, device: torch.device) -> torch.Tensor:
    """A number per row of the tiles, `[B, HK, T rounded up, GROUP_POW2]`; 0 past the end, where nobody writes."""
    round_t = plan.meta["ROUND_T"]
    rows = torch.empty(
        B, HK, triton.cdiv(T, round_t) * round_t, plan.meta["GROUP_POW2"], dtype=torch.float32, device=device
    )
    rows[:, :, T:] = 0.0
    return rows


def _sum_tiles(x: torch.Tensor, tiles_per_page: int) -> torch.Tensor:
    """Adds up the parts of pages that are larger than a tile, `[B * HK, NKB, ...]` to `[B * HK, N, ...]`."""
    if tiles_per_page == 1:
        return x
    missing = -x.shape[1] % tiles_per_page
    x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, tiles_per_page)).sum(2)
