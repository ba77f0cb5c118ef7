"""Norms and rotary embeddings in one launch each while a step is recorded. Imports torch and the kernel package.

In eager Transformers an RMS norm takes eight launches and a rotary embedding ten; a decoder layer has up to four norms
and one rotation, which together are most of what a captured step of a small model does. While a step is warmed or
recorded, those that compute what one launch can compute, which is tried out, run as that. Only attributes of module
instances are set, and taken away again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .backend import kernel_module
from .deferred import Deferred

ROTARY = "apply_rotary_pos_emb"
# largest difference to the module itself that rounding explains, relative to the largest result
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# modules are shared by threads: one at a time sets and takes away. It may then record, never the other way round
_FUSING = threading.RLock()


class Patch:
    """A module's forward while it is fused: for the thread that fused it; all others get the module's own.

    Args:
        own (`Callable`): The module's own forward.
        fast (`Callable`): What runs in its place.
    """

    def __init__(self, own: Callable[..., Any], fast: Callable[..., Any]):
        self.own, self.fast, self.thread = own, fast, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the module."""
        return (self.fast if self.thread == threading.get_ident() else self.own)(*args, **kwargs)


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
    return _close(found, expected)


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (expected.float() - found.float()).abs().max()
    return bool(error <= TOLERANCE[expected.dtype] * expected.float().abs().max())


@functools.cache
def _rotary() -> Callable[..., Any] | None:
    try:
        return importlib.import_module(f"{kernel_module().__name__}.rotary").rotary
    except ImportError:
        # no Triton, or a kernel from the Hub that does not have it
        return None


def _rotate(original: Any, fast: Any, deferred: Deferred | None, q: Any, k: Any, cos: Any, sin: Any, **more: Any):
    tensors = (q, k, cos, sin)
    plain = not more and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3 and q.shape[-1] % 2 == 0
    same = len({(x.dtype, x.shape[-1]) for x in tensors}) == 1 and all(x.stride(-1) == 1 for x in tensors)
    if plain and same and cos.shape == sin.shape and cos.shape[1] == q.shape[2] == k.shape[2]:
        waiting = deferred if deferred is not None and deferred.here() else None
        return fast(*tensors) if waiting is None else waiting.rotate(fast, original, *tensors)
    return original(*tensors, **more)


def _own_rotation(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The rotary function that a module's forward calls by its global name."""
    forward = type(module).forward
    plain = isinstance(forward, types.FunctionType) and not hasattr(forward, "__wrapped__")
    if not plain or "forward" in vars(module) or ROTARY not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(ROTARY)


def _same_rotation(module: torch.nn.Module, original: Callable[..., Any], fast: Callable[..., Any]) -> bool:
    parameter = next(module.parameters(), None)
    dim = getattr(module, "head_dim", 64)
    if parameter is None or parameter.dtype not in TOLERANCE or not isinstance(dim, int):
        return False
    x = torch.linspace(-3.0, 2.0, 16 * dim, device=parameter.device).cos().to(parameter.dtype)
    q, k = x[: 8 * dim].view(2, 4, 1, dim), x[8 * dim : 12 * dim].view(2, 2, 1, dim)
    cos, sin = x[12 * dim : 13 * dim].view(1, 1, dim), x[13 * dim : 14 * dim].view(1, 1, dim)
    try:
        expected, found = original(q, k, cos, sin), fast(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False
    return all(_close(a, b) for a, b in zip(found, expected))


def _with_rotation(module: torch.nn.Module, original: Any, fast: Any, deferred: Deferred | None) -> Any:
    forward: Any = type(module).forward
    names = {**forward.__globals__, ROTARY: functools.partial(_rotate, original, fast, deferred)}
    other = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    other.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(other, module)


@contextlib.contextmanager
def fused(model: torch.nn.Module, deferred: Deferred | None = None) -> Iterator[tuple[int, int]]:
    """Let the RMS norms and rotary embeddings of a model run in one launch each.

    Args:
        model (`torch.nn.Module`): The model; without grad.
        deferred (`Deferred`, *optional*): The mode under which the model will run; it takes the rotations.
    Yields:
        `tuple`: How many norms and how many rotations do. Waits for the device once per kind of each.

    Waits for other threads that do the same, and lasts for the calling thread alone.

    Numerics: norms in fp32 as in the modules, rounded once, or before and after the weight while linear layers wait;
    rotations round as the original does.
    """
    with _FUSING:
        yield from _fused(model, deferred)


def _fused(model: torch.nn.Module, deferred: Deferred | None) -> Iterator[tuple[int, int]]:
    kinds: dict[Any, bool] = {}
    norms, rotations = [], []
    fast = _rotary()
    try:
        with torch.no_grad():
            for module in model.modules():
                parts, rotation = _parts(module), _own_rotation(module)
                if parts is not None:
                    kind = (type(module), parts[0].dtype)
                    if kind not in kinds:
                        kinds[kind] = _same(module, parts[0])
                    if kinds[kind]:
                        original = functools.partial(type(module).forward, module)
                        module.forward = Patch(original, functools.partial(_run, module, original))
                        norms.append(module)
                elif rotation is not None and fast is not None:
                    kind = (type(module), rotation)
                    if kind not in kinds:
                        kinds[kind] = _same_rotation(module, rotation, fast)
                    if kinds[kind]:
                        original = functools.partial(type(module).forward, module)
                        module.forward = Patch(original, _with_rotation(module, rotation, fast, deferred))
                        rotations.append(module)
        yield len(norms), len(rotations)
    finally:
        for module in norms + rotations:
            vars(module).pop("forward", None)
