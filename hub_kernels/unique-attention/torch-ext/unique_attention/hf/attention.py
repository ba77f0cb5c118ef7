"""The attention function of attn_implementation="unique". May import Transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import ops
from ..settings import UniqueConfig
from . import activity, modes, soft
from .cache import UniqueDynamicLayer
from .dense import dense_attention
from .masks import MaskFacts, facts_of, unique_mask
from .modes import DENSE, PREFILL, SOFT, SPARSE, Mode, decide
from .pages import layer_of
from .settings import settings_of
from .static import UniqueStaticLayer

# what Transformers looks for in a Hub kernel, beside `flash_attn_forward`
supports_flash_attn = True


def unique_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for one module of a Transformers model: sparse decode, exact prefill, soft mask, or exact dense.

    Equation: see `decide` for the choice; Eq. 2 to 5 for decode, Eq. 6 for training.

    Args:
        module (`torch.nn.Module`): The attention module; `module.config` holds the settings.
        query (`torch.Tensor`): `[B, H, T, D]`, after RoPE.
        key (`torch.Tensor`): `[B, HK, S, D]`.
        value (`torch.Tensor`): `[B, HK, S, DV]`.
        attention_mask (`torch.Tensor`, *optional*): 4-D mask.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the attention weights.
        scaling (`float`, *optional*): Softmax scale, `1 / sqrt(D)` by default.
        is_causal (`bool`, *optional*): Overrides `module.is_causal`.
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`.
        s_aux (`torch.Tensor`, *optional*): `[H]`, sink logits.
        **kwargs: Keywords of Transformers (`sliding_window`, `position_ids`, `cu_seq_lens_q`, ...).
    Returns:
        `tuple`: Output `[B, T, H, DV]` and `None` (there are no attention weights).
    Raises:
        ValueError: `output_attentions` was asked for, or settings and cache do not fit.
        NotImplementedError: Sequence parallelism wraps the attention function.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer = layer_of(key, value)
    call = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    mode = decide(
        module, query, key, value, layer, attention_mask, {**kwargs, "is_causal": is_causal, "dropout": dropout}
    )
    if mode.kind == SOFT and not settings_of(module.config).soft_mask:
        mode = Mode(DENSE, "the soft mask is switched off")
    if mode.kind != DENSE and kwargs.get("output_attentions"):
        raise ValueError(
            "attn_implementation='unique' has no attention weights to return: for `output_attentions` load the model "
            "with attn_implementation='eager'"
        )
    if mode.kind in (SOFT, PREFILL) and not torch.compiler.is_compiling():
        _look_at_tables(module)
    facts = facts_of(attention_mask, query.shape[0]) if mode.kind != DENSE else None
    if mode.kind == SOFT:
        mode, where = soft.read_mask(mode, query, attention_mask, facts, kwargs)
        if mode.kind == SOFT:
            _count(module, mode, query, key, value)
            return soft.soft_attention(settings_of(module.config), query, key, value, **where, **call), None
    if mode.kind == SPARSE:
        return _decode(module, mode, query, key, value, facts, layer, call), None
    if mode.kind == PREFILL:
        _learn_pages(module, query, key, facts, layer)
    _count(module, mode, query, key, value)
    causal = modes.is_causal(module, {"is_causal": is_causal})
    return dense_attention(module, query, key, value, attention_mask, causal=causal, **call, **kwargs), None


# how `check` knows it, whatever the name it is registered under
unique_attention_forward.is_unique_attention = True
# the name under which Transformers finds the attention function of a Hub kernel
flash_attn_forward = unique_attention_forward


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    from transformers.utils import logging

    logging.get_logger("transformers.unique_attention").warning(
        f"unique attention: {name} runs dense: {reason}. `unique_hf.report(model)` counts it."
    )


def _count(module, mode: Mode, query, key, value) -> None:
    if torch.compiler.is_compiling():
        return
    counts = activity.note(module, mode, query)
    if counts is None:
        return
    if query.shape[2] == 1:
        activity.count_dense(counts, key, value)
    if mode.fallback:
        _warn_once(type(module).__name__, mode.reason)


def _refresh(key, num_new: int, facts: MaskFacts | None, layer) -> tuple[ops.PageStats, dict[str, Any]]:
    """Bring the layer's statistics up to date; also what else of the layer and the mask the decode op needs."""
    token_mask = None if facts is None else facts.token_mask
    seq_starts = None if facts is None else facts.seq_starts
    where = {"seq_lens": None, "seq_starts": seq_starts, "token_mask": token_mask}
    index = layer.index
    if isinstance_static(layer):
        where["seq_lens"] = layer.cumulative_length.expand(key.shape[0])
        stats = index.refresh_static(key, num_new, layer.host_length, **where)
    elif layer.fixed_lens is not None:
        where["seq_lens"] = layer.fixed_lens
        if facts is None:
            where["seq_starts"] = index.seq_starts
        stats = index.first(key.shape[2])
    else:
        stats = index.refresh(key, token_mask, seq_starts)
    where["super_stats"] = None if index.upper is None else index.upper.first(key.shape[2])
    return stats, where


def isinstance_static(layer: UniqueDynamicLayer | UniqueStaticLayer) -> bool:
    """Whether a layer has a fixed capacity; by attribute, since it may come from another copy of this package."""
    return hasattr(layer, "max_cache_len")


def _settings(module, layer) -> UniqueConfig:
    if torch.compiler.is_compiling() and layer.index.settings is not None:
        return layer.index.settings
    settings = settings_of(module.config)
    layer.index.wake(settings)
    return settings


def _learn_pages(module, query, key, facts: MaskFacts | None, layer) -> None:
    _settings(module, layer)
    with torch.no_grad():
        _refresh(key.detach(), query.shape[2], facts, layer)
    layer.index.seq_starts = None if facts is None else facts.seq_starts
    if not torch.compiler.is_compiling():
        layer.index.starts_host = None if facts is None else facts.starts_host


class _NoBackward(torch.autograd.Function):
    """Identity whose gradient is an error: a wrong gradient would go unnoticed."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "sparse decode has no gradient: run decode steps under torch.no_grad(), or train on whole sequences, "
            "where the soft mask is used"
        )


def _decode(module, mode: Mode, query, key, value, facts, layer, call) -> torch.Tensor:
    settings = _settings(module, layer)
    # a captured step is counted by its runner, which looks at the modes of the first run
    fixed = getattr(layer, "fixed_lens", None) is not None
    counting = not torch.compiler.is_compiling() and (not fixed or activity.is_probing())
    counts = activity.note(module, mode, query) if counting else None
    measure = counts is not None and settings.measure_recall
    with torch.no_grad():
        stats, where = _refresh(key.detach(), 1, facts, layer)
        if fixed:
            where.update(new=layer.take_pending(), counters=layer.counters)
        found = ops.unique_decode(
            query.detach(),
            key.detach(),
            value.detach(),
            stats,
            config=settings,
            softmax_scale=call["scaling"],
            softcap=call["softcap"],
            sinks=call["s_aux"],
            return_page_ids=measure,
            **where,
        )
    out, page_ids = found if measure else (found, None)
    if counts is not None:
        _count_pages(counts, settings, query, key, value, page_ids, facts, layer, call)
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoBackward.apply(out, query)
    return out.transpose(1, 2).contiguous()


def _count_pages(counts, settings, query, key, value, page_ids, facts, layer, call) -> None:
    length, index = layer.host_length if isinstance_static(layer) else key.shape[2], layer.index
    sparse = activity.count_sparse(counts, settings, key, value, index.page_bytes, length, index.starts_host)
    if page_ids is None or not sparse:
        return
    mass = activity.kept_mass(
        query.detach(),
        key.detach()[:, :, :length],
        page_ids,
        page_size=settings.page_size,
        scaling=call["scaling"],
        token_mask=None if facts is None else facts.token_mask,
        softcap=call["softcap"],
        sinks=call["s_aux"],
    )
    total = mass[sparse].sum()
    counts.recall_sum = total if counts.recall_sum is None else counts.recall_sum + total
    counts.recall_rows += len(sparse)


def _look_at_tables(module) -> None:
    """On calls of several tokens: refuse wrappers that split sequences, and bring our mask under a Hub name too."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    registered = ALL_ATTENTION_FUNCTIONS.get(name)
    if (getattr(registered, "__module__", None) or "").split(".")[0] == "deepspeed":
        raise NotImplementedError(
            "expected whole sequences, got DeepSpeed's sequence parallelism around the attention function: page "
            "scores need all tokens of a row. Set sp_size=1, or train with attn_implementation='sdpa'"
        )
    if registered is unique_attention_forward and ALL_MASK_ATTENTION_FUNCTIONS.get(name) is sdpa_mask:
        # Transformers registers a kernel from the Hub with sdpa's masks, which read the padding at every step
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, unique_mask)
