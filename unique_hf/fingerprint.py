"""What a captured step of a model depends on besides its inputs, and which models cannot have one. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from .fused import Patch

_PLAIN = {bool, int, float, str, type(None)}
# what every module has: hooks, and weights and modules, which are looked at by themselves
_BASE = set(vars(torch.nn.Module())) - {"training"}


def fingerprint(model: torch.nn.Module) -> int:
    """A hash of what steers a model's forward: where its weights lie, its modules and their plain attributes.

    Adapters that are switched, merged or disabled, layers that are replaced, weights that move, and changed settings
    all change it; training the weights in place does not, since a graph reads them where they lie.

    Args:
        model (`torch.nn.Module`): The model.
    Returns:
        `int`: Equal while a recording of the forward stays valid.
    """
    parts: list[Any] = [torch.get_float32_matmul_precision()]
    for name, module in model.named_modules():
        # another thread may be fusing this model: a copy, and without what it sets for a while
        own = vars(module).copy()
        parts += [name, id(module), id(type(module).forward)]
        for key, value in own.items():
            if key in _BASE or isinstance(value, Patch):
                continue
            if type(value) in _PLAIN:
                # -1 and -2 have the same hash
                parts += [key, str(value) if type(value) is int else value]
            elif key in ("forward", "config"):
                parts += [key, id(value)]
            elif isinstance(value, (int, float, str, list, tuple, set)) or (
                isinstance(value, dict) and key[:1] != "_"
            ):
                parts += [key, repr(value)]
        # the values of these are tensors; modules have been walked already
        for tensors in (own["_parameters"], own["_buffers"]):
            for key, tensor in tensors.items():
                parts += [key, None if tensor is None else (tensor.data_ptr(), tensor.dtype)]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        parts.append(config.to_json_string(use_diff=False))
        parts += [part._attn_implementation for part in _configs(config)]
    return hash(tuple(parts))


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield part


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in chain(model.parameters(), model.buffers()))


def why_not_model(model: torch.nn.Module) -> str | None:
    """What about a model rules out a captured step.

    Args:
        model (`torch.nn.Module`): The model.
    Returns:
        `str` or `None`: The reason.
    """
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    if len(devices) > 1:
        return f"weights on several devices ({', '.join(sorted(map(str, devices)))})"
    if getattr(model, "_device_mesh", None) is not None or getattr(model, "tp_size", None) is not None:
        return "tensor parallelism"
    for name, module in model.named_modules():
        hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        # those that Transformers installs for `output_hidden_states` sleep without it
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return f"forward hooks on {name or type(module).__name__}, which a recording would not call"
    return None
