"""Which path a call of the attention function takes, and why: one decision for attention, check and report.

Imports torch and the checks of the operations only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._checks import fits_triton, use_triton

SPARSE, PREFILL, SOFT, DENSE = "sparse", "prefill", "soft", "dense"


class Mode(NamedTuple):
    """A path and its reason.

    Args:
        kind (`str`): `"sparse"` (decode over kept pages), `"prefill"` (exact, statistics updated), `"soft"` (training)
            or `"dense"` (exact, as sdpa or eager would).
        reason (`str`): For people, in `check` and `report`.
        fallback (`bool`): Dense where a user could expect sparse attention; logged once.
    """

    kind: str
    reason: str
    fallback: bool = False


def is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call is causal: the keyword, else the module's attribute, else yes."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def layer_type(module: torch.nn.Module) -> str | None:
    """The configured type of a module's layer, or `None` where the configuration does not say."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types[index] if types is not None and isinstance(index, int) and index < len(types) else None


def dense_reason(module: torch.nn.Module, kwargs: dict[str, Any]) -> Mode | None:
    """What rules out sparse attention before any tensor is looked at: properties of the module and of the call.

    Args:
        module (`torch.nn.Module`): The attention module.
        kwargs (`dict`): Keywords of the call.
    Returns:
        `Mode` or `None`: The dense mode, or `None` where tensors decide.
    """
    if kwargs.get("cache") is not None:
        return Mode(DENSE, "continuous batching brings its own paged cache", fallback=True)
    if not is_causal(module, kwargs):
        return Mode(DENSE, "not causal (encoder or cross-attention)")
    window = kwargs.get("sliding_window")
    kind = layer_type(module)
    if window is not None:
        return Mode(DENSE, f"sliding window of {window} tokens")
    if kind is not None and kind != "full_attention":
        return Mode(DENSE, f"layer type {kind}")
    if getattr(module, "kv_lora_rank", None) is not None:
        return Mode(DENSE, "multi-head latent attention: the cache holds latents, not keys", fallback=True)
    if getattr(module, "indexer", None) is not None:
        return Mode(DENSE, "the model selects tokens with its own indexer", fallback=True)
    if kwargs.get("position_bias") is not None:
        return Mode(DENSE, "position bias on the logits", fallback=True)
    return None


def decide(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: Any,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Mode:
    """The path of one call.

    Args:
        module (`torch.nn.Module`): The attention module.
        query (`torch.Tensor`): `[B, H, T, D]`.
        key (`torch.Tensor`): `[B, HK, S, D]`.
        value (`torch.Tensor`): `[B, HK, S, DV]`.
        layer (`UniqueDynamicLayer` or `UniqueStaticLayer`, *optional*): The layer that keys and values come from.
        attention_mask (`torch.Tensor`, *optional*): 4-D mask.
        kwargs (`dict`): Keywords of the call.
    Returns:
        `Mode`: The path with its reason; reads shapes and flags only, never values.
    """
    mode = dense_reason(module, kwargs)
    if mode is not None:
        return mode
    if use_triton(query, None) and not fits_triton(key, value):
        dims = f"head dims {key.shape[-1]} and {value.shape[-1]} in {query.dtype}"
        return Mode(DENSE, f"{dims}, for which there is no kernel", fallback=True)
    float_mask = attention_mask is not None and attention_mask.dtype != torch.bool
    if query.shape[2] > 1:
        learning = torch.is_grad_enabled() and query.requires_grad
        # without a cache a pass without grad belongs to training too: evaluation loss, log-probs of a policy
        if learning or (layer is None and kwargs.get("use_cache") is False):
            if query.shape[2] != key.shape[2]:
                return Mode(DENSE, "several new tokens on a warm cache, with grad", fallback=learning)
            if float_mask:
                return Mode(DENSE, "float mask", fallback=True)
            if kwargs.get("dropout", 0.0) > 0.0:
                return Mode(DENSE, "attention dropout, which the soft mask does not have", fallback=True)
            return Mode(SOFT, "soft mask (training or evaluation without a cache)")
    if layer is None:
        return Mode(DENSE, "keys do not come from a cache of unique attention", fallback=True)
    if query.shape[2] == 1:
        if float_mask:
            return Mode(DENSE, "float mask", fallback=True)
        if attention_mask is not None and attention_mask.shape[1] != 1:
            return Mode(DENSE, "a mask per head", fallback=True)
        return Mode(SPARSE, "pages by score")
    return Mode(PREFILL, "exact attention for several new tokens; page statistics updated")
