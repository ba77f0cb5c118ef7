"""UNIQUE sparse attention for Transformers: importing this package makes `attn_implementation="unique"` available."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import capture
from .backend import adapter, kernel_module
from .check import check
from .configure import configure
from .report import report

if TYPE_CHECKING:
    from .hub import push_checkpoint as push_checkpoint
    from .hub import save_checkpoint as save_checkpoint
    from .schedule import SoftMaskSchedule as SoftMaskSchedule
    from .training import SoftMaskCallback as SoftMaskCallback

UniqueCache = adapter().UniqueCache
UniqueConfig = kernel_module().UniqueConfig

# plain `generate` decodes through a captured step from here on, for models that ask for unique attention
capture.install()

__version__ = "0.1.0"
__all__ = [
    "SoftMaskCallback",
    "SoftMaskSchedule",
    "UniqueCache",
    "UniqueConfig",
    "check",
    "configure",
    "push_checkpoint",
    "report",
    "save_checkpoint",
]

# names whose modules cost an import that plain inference does not need
_LAZY = {
    "SoftMaskCallback": ".training",
    "SoftMaskSchedule": ".schedule",
    "push_checkpoint": ".hub",
    "save_checkpoint": ".hub",
}


def __getattr__(name: str) -> object:
    home = _LAZY.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value
