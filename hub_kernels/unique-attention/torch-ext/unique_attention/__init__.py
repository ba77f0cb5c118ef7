"""UNIQUE attention: page statistics and scores, top-k selection, sparse decode, as Triton kernels and in plain torch.

Every public name is loaded on first use, so importing this package costs no Triton, no Transformers, no torch. It is
at once a Hub kernel (relative imports only; standard library, torch and triton) and part of the `unique_hf` wheel.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hf.attention import flash_attn_forward as flash_attn_forward
    from .hf.attention import supports_flash_attn as supports_flash_attn
    from .ops import PageStats as PageStats
    from .ops import (
        append_tokens,
        page_scores,
        page_stats,
        select_pages,
        soft_mask_attention,
        sparse_decode,
        unique_decode,
    )
    from .settings import UniqueConfig

__all__ = [
    "PageStats",
    "UniqueConfig",
    "append_tokens",
    "page_scores",
    "page_stats",
    "select_pages",
    "soft_mask_attention",
    "sparse_decode",
    "unique_decode",
]

_HOME = dict.fromkeys(__all__, ".ops")
_HOME["UniqueConfig"] = ".settings"
# what Transformers looks for in a module named by `attn_implementation="<org>/unique-attention"`; asking for either
# loads the adapter, which registers the mask function and the cache layers
_HOME["flash_attn_forward"] = ".hf.attention"
_HOME["supports_flash_attn"] = ".hf.attention"


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Front(ModuleType):
    # importing a submodule binds it on its package; an op may share its file's name (`page_stats`): the op must win
    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
