"""Norms in one launch while a step is recorded. Imports torch only.

Eager RMS norms of Transformers are eight launches, and a decoder layer has up to four of them: most of what a captured
step of a small model does. While a step is warmed or recorded, those that compute what `F.rms_norm` computes, which is
tried out, run as that; the modules are as before afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

# largest difference to the module itself that rounding explains, relative to the largest result
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _parts(module: torch.nn.Module) -> tuple[torch.Tensor, float] | None:
    weight, own = getattr(module, "weight", None), vars(module)
    eps = own.get("variance_epsilon", own.get("eps"))
    plain = type(module).__name__.endswith("RMSNorm") and len(list(module.parameters())) == 1
    if not plain or "forward" in own or not isinstance(eps, float) or not torch.is_tensor(weight) or weight.dim() != 1:
        return None
    return (weight, eps) if weight.dtype in TOLERANCE else None


def _run(module: Any, original: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    weight, eps = module.weight, vars(module).get("variance_epsilon", vars(module).get("eps"))
    if x.dtype != weight.dtype or x.shape[-1:] != weight.shape:
        return original(x)
    return F.rms_norm(x, weight.shape, weight, eps)


def _same(module: torch.nn.Module, weight: torch.Tensor) -> bool:
    x = torch.linspace(-3.0, 2.0, 2 * weight.numel(), device=weight.device).cos().view(2, -1).to(weight.dtype)
    try:
        expected, found = module(x), _run(module, module.forward, x)
    except (TypeError, RuntimeError):
        # a gated norm, say, which takes more than one tensor
        return False
    if expected.dtype != found.dtype:
        return False
    error = (expected.float() - found.float()).abs().max()
    return bool(error <= TOLERANCE[weight.dtype] * expected.float().abs().max())


@contextlib.contextmanager
def fused_norms(model: torch.nn.Module) -> Iterator[int]:
    """Let the RMS norms of a model run in one launch each.

    Args:
        model (`torch.nn.Module`): The model; without grad.
    Yields:
        `int`: How many do. Waits for the device once per kind of norm.

    Numerics: fp32 inside, as the modules; one rounding of the result instead of two.
    """
    kinds: dict[tuple[type, torch.dtype], bool] = {}
    changed = []
    try:
        with torch.no_grad():
            for module in model.modules():
                parts = _parts(module)
                if parts is None:
                    continue
                kind = (type(module), parts[0].dtype)
                if kind not in kinds:
                    kinds[kind] = _same(module, parts[0])
                if kinds[kind]:
                    module.forward = functools.partial(_run, module, functools.partial(type(module).forward, module))
                    changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            # another thread that records the same model may have been here first
            vars(module).pop("forward", None)
