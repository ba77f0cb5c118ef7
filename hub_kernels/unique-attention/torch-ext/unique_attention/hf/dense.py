"""Exact dense attention for every call that is not sparse: sdpa where it can, an eager form for what sdpa lacks.

May import torch and, inside functions, Transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from .masks import is_lower_right

# elements of one block of logits in the eager form: 64 Mi fp32 numbers are 256 MiB
BLOCK_ELEMENTS = 1 << 26


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    causal: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Exact attention over all keys, equal to the model's own.

    Equation: softmax(softcap(s q.k) + mask, with one extra logit per head where `s_aux` is given) v.

    Args:
        module (`torch.nn.Module`): The attention module.
        query (`torch.Tensor`): `[B, H, T, D]`.
        key (`torch.Tensor`): `[B, HK, S, D]`.
        value (`torch.Tensor`): `[B, HK, S, DV]`.
        attention_mask (`torch.Tensor`, *optional*): 4-D, boolean or additive, or the lower-right marker.
        causal (`bool`): Causal where no mask is given; `T < S` then means a static prefill (aligned to the first key).
        scaling (`float`, *optional*): Softmax scale, `1 / sqrt(D)` by default.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the attention weights.
        softcap (`float`, *optional*): Logits become `softcap * tanh(logits / softcap)`.
        s_aux (`torch.Tensor`, *optional*): `[H]`, sink logits.
        **kwargs: Passed on to sdpa (`position_bias`, `cache`).
    Returns:
        `torch.Tensor`: `[B, T, H, DV]`.

    Numerics: softmax in fp32. The eager form works through blocks of queries of at most 256 MiB of logits each.
    """
    if softcap is None and s_aux is None:
        if is_lower_right(attention_mask):
            return _lower_right(query, key, value, scaling, dropout)
        # read late: Transformers loads it with its modelling code
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs.pop("is_causal", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
        )[0]
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            "attn_implementation='unique' has no position_bias together with softcap or sinks: use 'eager'"
        )
    return _eager(query, key, value, attention_mask, causal, scaling, dropout, softcap, s_aux)


def _lower_right(query, key, value, scaling, dropout) -> torch.Tensor:
    """Causal, aligned to the last key; keys and values of a long cache are never repeated for their query heads."""
    groups = query.shape[1] // key.shape[1]
    bias = causal_lower_right(query.shape[2], key.shape[2])
    call = {"attn_mask": bias, "dropout_p": dropout, "scale": scaling}
    if groups == 1:
        out = F.scaled_dot_product_attention(query, key, value, **call)
    elif can_use_flash_attention(SDPAParams(query, key, value, None, dropout, False, True)):
        out = F.scaled_dot_product_attention(query, key, value, **call, enable_gqa=True)
    else:
        parts = []
        for part, k, v in zip(query.split(groups, 1), key.split(1, 1), value.split(1, 1), strict=True):
            k, v = k.expand(-1, groups, -1, -1), v.expand(-1, groups, -1, -1)
            parts.append(F.scaled_dot_product_attention(part, k, v, **call))
        out = torch.cat(parts, dim=1)
    return out.transpose(1, 2).contiguous()


def _eager(query, key, value, mask, causal, scaling, dropout, softcap, sinks) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    causal = causal and length > 1
    offset = 0
    if is_lower_right(mask):
        mask, offset = None, key.shape[2] - length
    elif mask is not None:
        causal = False
    elif causal and key.shape[2] > length:
        key, value = key[:, :, :length], value[:, :, :length]
    scaling = dim**-0.5 if scaling is None else scaling
    step = max(1, BLOCK_ELEMENTS // (batch * heads * key.shape[2]))
    outs = []
    for begin in range(0, length, step):
        rows = slice(begin, begin + step)
        block_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        args = (query[:, :, rows], key, value, block_mask, offset + begin if causal else None)
        args = (*args, scaling, dropout, softcap, sinks)
        if torch.is_grad_enabled() and step < length:
            # otherwise the graph would hold the logits of all blocks at once
            outs.append(checkpoint(_block, *args, use_reentrant=False))
        else:
            outs.append(_block(*args))
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]


def _block(query, key, value, mask, first, scaling, dropout, softcap, sinks) -> torch.Tensor:
    batch, heads, length, _ = query.shape
    kv_heads, kv_length = key.shape[1], key.shape[2]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))  # [B, HK, G, T, D]
    logits = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)).float().flatten(1, 2) * scaling  # [B, H, T, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        # like Transformers' own masks: the least finite number keeps a fully masked row finite
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    elif first is not None:
        rows = torch.arange(first, first + length, device=query.device)
        hidden = rows[:, None] < torch.arange(kv_length, device=query.device)
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    if sinks is not None:
        extra = sinks.reshape(1, -1, 1, 1).expand(batch, heads, length, 1).to(logits.dtype)
        weights = torch.cat([logits, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    out = torch.matmul(weights.to(value.dtype).unflatten(1, (kv_heads, heads // kv_heads)), value[:, :, None])
    return out.flatten(1, 2).transpose(1, 2).contiguous()
