"""The mask function registered as "unique", and what the attention function reads off a mask. May import Transformers.

Masks are sdpa's, with two differences: a decode step (`T == 1`) never reads the padding on the host, and a long chunk
on a warm cache without padding gets a zero-size marker in place of a `T x S` mask.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

# from this many mask elements on, an unpadded chunk on a warm cache is marked instead of masked
MARK_FROM = 1 << 20


# configuration class -> whether its model adds the mask to the logits itself; filled by `wants_additive_mask`
_ADDITIVE: dict[type, bool] = {}


def wants_additive_mask(config: Any) -> bool:
    """Whether a model needs the additive mask of "eager" under any name of attention, read off its modelling file.

    Two kinds do: models without Transformers' attention interface (bloom, mpt, ...), which accept any registered name
    and compute their own attention, and models that append additive entries to the mask and never run with sdpa.

    Args:
        config (`PreTrainedConfig`): A model's configuration.
    Returns:
        `bool`: `False` also where the source cannot be read.
    """
    kind = type(config)
    known = _ADDITIVE.get(kind)
    if known is not None or torch.compiler.is_compiling():
        return bool(known)
    module = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
    try:
        source = "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        source = ""
    # a file without an attention class runs the layers of another file
    own_attention = "ALL_ATTENTION_FUNCTIONS" not in source and re.search(r"class \w*Attention\w*\(", source)
    appends = "_supports_sdpa = True" not in source and "torch.cat([attention_mask" in source
    _ADDITIVE[kind] = bool(own_attention or appends)
    return _ADDITIVE[kind]


class MaskFacts:
    """What a boolean 4-D mask says about the keys, computed once per forward and carried on the mask tensor.

    Args:
        token_mask (`torch.Tensor`): `[B, S]` bool, keys that some query sees.
        plain (`bool`, *optional*): Whether the mask is causal and padding, nothing else; `None`: not known yet. The
            training path keeps the answer here, and the boundaries of packed documents in `bounds`.
    """

    __slots__ = ("token_mask", "plain", "bounds", "_starts", "_starts_host")

    def __init__(self, token_mask: torch.Tensor, plain: bool | None = None):
        self.token_mask = token_mask
        self.plain = plain
        self.bounds: torch.Tensor | None = None
        self._starts: torch.Tensor | None = None
        self._starts_host: list[int] | None = None

    @property
    def seq_starts(self) -> torch.Tensor:
        """`[B]` int32, first valid slot of each row."""
        if self._starts is None:
            # argmax gives the first of equal values; uint8 has no argmax on every device
            self._starts = self.token_mask.to(torch.int32).argmax(-1).to(torch.int32)
        return self._starts

    @property
    def starts_host(self) -> list[int]:
        """The same as Python numbers: one device sync per forward, so only for prefill."""
        if self._starts_host is None:
            self._starts_host = self.seq_starts.tolist()
        return self._starts_host


def unique_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of attn_implementation="unique": sdpa's boolean `[B, 1, T, S]`, or `None` for plain causal attention.

    Args:
        batch_size (`int`): B.
        q_length (`int`): T.
        kv_length (`int`): S.
        q_offset (`int` or `torch.Tensor`): Tokens before the first query.
        kv_offset (`int`): Position of the first key.
        mask_function (`Callable`): Index-based mask of Transformers.
        attention_mask (`torch.Tensor`, *optional*): `[B, S]` bool, `False` for padding.
        local_size (`int`, *optional*): Window of sliding or chunked layers.
        allow_is_causal_skip (`bool`): Whether `None` is allowed.
        **kwargs: Passed on to `sdpa_mask`.
    Returns:
        `torch.Tensor` or `None`: The mask; zero-size for "causal, aligned to the last key, no padding".

    Numerics: no host sync for `T == 1`; few per forward otherwise, and no `T x S` tensor where nothing is padded.
    """
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    sizes.update(q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function, local_size=local_size)
    if wants_additive_mask(kwargs.get("config")):
        return eager_mask(**sizes, attention_mask=attention_mask, **kwargs)
    if q_length == 1 and attention_mask is not None:
        # sdpa would ask the device whether anything is padded, once per step
        allow_is_causal_skip = False
    plain = mask_function is causal_mask_function and kv_offset == 0
    if q_length == 1 and plain and attention_mask is None and allow_is_causal_skip and local_size is None:
        # sdpa's own answer, except that it builds a mask over all slots while a CUDA graph is recorded
        return None
    if plain and allow_is_causal_skip and _is_warm_chunk(q_length, kv_length, q_offset) and local_size is None:
        large = batch_size * q_length * kv_length >= MARK_FROM
        if large and (attention_mask is None or bool(attention_mask.all())):
            return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    mask = sdpa_mask(**sizes, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
    if mask is not None and plain and attention_mask is not None and attention_mask.shape[-1] == kv_length:
        if not torch.compiler.is_compiling():
            mask._unique_facts = MaskFacts(attention_mask, plain=True)
    return mask


def _is_warm_chunk(q_length: int, kv_length: int, q_offset: int | torch.Tensor) -> bool:
    # an int offset that fits is a growing cache; static caches give tensors and keep unused slots at the end
    return q_length > 1 and isinstance(q_offset, int) and q_offset > 0 and kv_length == q_offset + q_length


def is_lower_right(mask: torch.Tensor | None) -> bool:
    """Whether a mask is the zero-size marker of `unique_mask`."""
    return mask is not None and mask.numel() == 0


def facts_of(mask: torch.Tensor | None, batch_size: int) -> MaskFacts | None:
    """Facts of a boolean mask `[B or 1, heads, T, S]`; `None` without a mask, for the marker, and for float masks.

    Args:
        mask (`torch.Tensor`, *optional*): 4-D mask.
        batch_size (`int`): B.
    Returns:
        `MaskFacts` or `None`.
    """
    if mask is None or mask.dtype != torch.bool or is_lower_right(mask):
        return None
    facts = getattr(mask, "_unique_facts", None)
    if facts is None:
        seen = mask[:, 0, 0] if mask.shape[1] == 1 and mask.shape[2] == 1 else mask.any(dim=2).any(dim=1)
        facts = MaskFacts(seen.expand(batch_size, -1))
        if not torch.compiler.is_compiling():
            mask._unique_facts = facts
    return facts


def matches(mask: torch.Tensor, token_mask: torch.Tensor, documents: torch.Tensor | None = None) -> bool:
    """Whether a boolean mask is causal, padding and documents, and nothing else.

    Args:
        mask (`torch.Tensor`): 4-D bool.
        token_mask (`torch.Tensor`): `[B, T]` bool, tokens that count.
        documents (`torch.Tensor`, *optional*): `[B, T]`, document of each token.
    Returns:
        `bool`: One device sync.
    """
    length = mask.shape[-1]
    if mask.shape[1] != 1 or mask.shape[2] != length:
        return False
    steps = torch.arange(length, device=mask.device)
    equal = torch.ones((), dtype=torch.bool, device=mask.device)
    for begin in range(0, length, 1024):
        rows = slice(begin, begin + 1024)
        expected = (steps[rows, None] >= steps) & token_mask[:, None]
        if documents is not None:
            expected &= documents[:, rows, None] == documents[:, None]
        equal &= (mask[:, 0, rows] == expected).all()
    return bool(equal)
