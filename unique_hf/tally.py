"""What generate calls did: captured steps, their rows and pages, and why a call decoded eagerly. Imports torch."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .backend import adapter


@dataclass
class Tally:
    """What the generate calls of a model did since the last reset.

    Args:
        calls (`int`): Calls that decoded through a captured step, wholly or in part.
        steps (`int`): Their decode steps, the eager first one of each capture included.
        captures (`int`): Recordings made.
        seconds (`float`): Time they took.
        together (`int`): How many of the recordings have linear layers that run together with what follows them.
        early (`int`): How many of the steps were under way when `generate` asked for them.
        vain (`int`): Steps beside these that were started for a token which was not chosen, and undone.
        eager (`Counter`): Calls that decoded eagerly, or went over to it, by reason.
    """

    calls: int = 0
    steps: int = 0
    captures: int = 0
    seconds: float = 0.0
    together: int = 0
    early: int = 0
    vain: int = 0
    eager: Counter = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """For people: one line per kind of call."""
        lines = []
        if self.calls:
            lines.append(
                f"{self.calls:,} generate calls captured: {self.steps:,} steps, {self.early:,} of them begun ahead, "
                f"{self.vain:,} more in vain, {self.captures} captures of "
                f"{self.seconds:.2f} s in all, {self.together} with linear layers run together"
            )
        return lines + [f"{count:,} generate calls eager: {reason}" for reason, count in sorted(self.eager.items())]


# by model, weakly, as the counters of `report`: copying or pickling a model never sees them
TALLIES: weakref.WeakKeyDictionary[torch.nn.Module, Tally] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def tally_of(model: torch.nn.Module) -> Tally:
    """The tally of a model, created on first use."""
    with _LOCK:
        return TALLIES.setdefault(model, Tally())


def collect(model: torch.nn.Module, reset: bool = False) -> Tally:
    """The tallies of a model and of the models inside it (PEFT, DDP), added up.

    Args:
        model (`torch.nn.Module`): The model.
        reset (`bool`, *optional*, defaults to `False`): Start anew afterwards.
    Returns:
        `Tally`: The sum.
    """
    total = Tally()
    for module in model.modules():
        with _LOCK:
            found = TALLIES.pop(module, None) if reset else TALLIES.get(module)
        if found is not None:
            for item in fields(total):
                name = item.name
                setattr(total, name, getattr(total, name) + getattr(found, name))
    return total


class StepCounts:
    """Counts the rows and pages of captured steps, which run no Python that could.

    Args:
        cache (`Cache`): A cache in fixed mode.
        settings (`UniqueConfig`): Settings of the model.
        starts (`list`, *optional*): First valid slot of each row.
    """

    def __init__(self, cache: Any, settings: Any, starts: list[int] | None):
        self.settings, self.starts, self.steps = settings, starts, 0
        # layers of one shape read the same pages: counted once per shape
        self._kinds: dict[tuple[int, ...], tuple[Any, torch.Tensor, torch.Tensor, tuple[int, ...]]] = {}
        self._layers = []
        for layer in cache.layers:
            keys, values = (buffer[:, :, :0] for buffer in layer.buffers())
            page_bytes = layer.index.page_bytes
            kind = (*keys.shape, values.shape[-1], *page_bytes)
            # sizes are all that is read of these tensors: empty ones keep no cache alive
            empty = (torch.empty_like(keys), torch.empty_like(values))
            self._kinds.setdefault(kind, (adapter().activity.Activity(), *empty, page_bytes))
            self._layers.append(kind)

    def add(self, length: int) -> None:
        """Count one step.

        Args:
            length (`int`): Slots in use, the new token included.
        """
        self.steps += 1
        for counts, keys, values, page_bytes in self._kinds.values():
            adapter().activity.count_sparse(counts, self.settings, keys, values, page_bytes, length, self.starts)

    def flush(self, modules: Iterable[torch.nn.Module]) -> None:
        """Add what was counted to the counters of the attention modules that ran, and start anew.

        Args:
            modules (`Iterable`): Attention modules in the order they ran.
        """
        activity = adapter().activity
        for module in modules:
            index = getattr(module, "layer_idx", 0)
            kind = self._layers[index if isinstance(index, int) and index < len(self._layers) else 0]
            counts, keys, _, _ = self._kinds[kind]
            into = activity.activity_of(module)
            for item in fields(counts):
                if isinstance(getattr(counts, item.name), int):
                    setattr(into, item.name, getattr(into, item.name) + getattr(counts, item.name))
            into.reasons["pages by score"] += self.steps * keys.shape[0]
        for kind, (_, keys, values, page_bytes) in self._kinds.items():
            self._kinds[kind] = (activity.Activity(), keys, values, page_bytes)
        self.steps = 0
