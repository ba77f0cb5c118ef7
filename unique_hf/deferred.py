"""Launches that wait for what comes next, while a step is recorded. Imports torch and the kernel package.

A decode step of few tokens is bound by reading weights and by the number of launches. Under this mode a linear layer
is not run where it is called, but where its result is first needed: then layers that share an input run in one launch,
a gated pair runs with its activation and product, the last layer of a branch with the addition of the residual, and
norms of heads with their rotation. It looks at torch functions, not at names of modules: whatever it does not know
makes everything that waits run first, as it would have.

What it cannot see is a foreign function that reads a tensor without asking torch. So a step is first run on trial:
every launch is compared with torch's own functions on the same inputs, and results are nan until they are computed,
which must leave no nan behind. Results of whole steps are not compared: where pages, or experts, are chosen by score,
other rounding may choose others, and both steps are right.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .backend import kernel_module

DTYPES = {torch.bfloat16, torch.float16}
# largest distance of a launch from torch's functions, relative to the norm of a row: a few roundings to bf16 give a
# hundredth at most, a wrong launch about one
TOLERANCE = 0.03
# functions that read no number; what they return lies in the memory of their argument
METADATA = {
    "__get__", "size", "dim", "ndimension", "stride", "storage_offset", "numel", "nelement", "element_size", "__len__",
    "is_contiguous", "is_floating_point", "is_complex", "is_inference", "view", "view_as", "transpose", "unsqueeze",
    "permute", "get_device", "__hash__",
}  # fmt: skip
_MUL = {torch.Tensor.mul, torch.Tensor.__mul__, torch.mul}
_ADD = {torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.add}
_NORM = {F.rms_norm, torch.rms_norm}


@dataclass(eq=False)
class _Linear:
    out: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(eq=False)
class _Silu:
    out: torch.Tensor
    source: _Linear


@dataclass(eq=False)
class _Norm:
    out: torch.Tensor
    source: _Linear
    # the view of the source that is normed
    x: torch.Tensor
    weight: torch.Tensor
    eps: float


@functools.cache
def kernel() -> Any:
    """The module of the linear kernel, or `None`: no Triton, or a kernel from the Hub that does not have it."""
    try:
        return importlib.import_module(f"{kernel_module().__name__}.skinny_linear")
    except ImportError:
        return None


def _plain(*tensors: Any) -> bool:
    """Whether all are ordinary tensors: quantised or sharded ones have functions of their own."""
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_contiguous() for t in tensors)


def _parameters(*tensors: Any) -> bool:
    """Whether all are ordinary parameters, which no launch of a step writes, or `None`."""
    return all(t is None or (type(t) is torch.nn.Parameter and t.is_contiguous()) for t in tensors)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Deferred(TorchFunctionMode):
    """Runs linear layers late and together.

    Args:
        module (`ModuleType`): `skinny_linear` of the kernel package.
        trial (`bool`, *optional*, defaults to `False`): Fill results with nan until they are computed, and compare
            each launch with torch's functions.
    """

    def __init__(self, module: Any, trial: bool = False):
        super().__init__()
        self.module, self.trial = module, trial
        # kind of launch, and its distance from torch's functions; on the device until somebody asks
        self._errors: list[tuple[str, torch.Tensor]] = []
        # launches made, by kind
        self.counts: Counter[str] = Counter()
        self._thread = 0
        self._waiting: list[Any] = []
        self._rules: dict[Any, Callable[..., Any]] = {F.linear: self._on_linear, F.silu: self._on_silu}
        for functions, rule in ((_MUL, self._on_mul), (_ADD, self._on_add), (_NORM, self._on_norm)):
            self._rules.update(dict.fromkeys(functions, rule))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in METADATA:
            rule = self._rules.get(func)
            out = None if rule is None else rule(*args, **kwargs)
            if out is not None:
                return out
            self.flush()
        return func(*args, **kwargs)

    def __enter__(self) -> Deferred:
        self._thread = threading.get_ident()
        super().__enter__()
        return self

    def here(self) -> bool:
        """Whether the calling thread is the one whose launches wait here; others use the same modules."""
        return self._thread == threading.get_ident()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        super().__exit__(kind, value, trace)
        if kind is None:
            self.flush()

    def _result(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        out = like.new_empty(shape)
        return out.fill_(torch.nan) if self.trial else out

    def _compare(self, kind: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        self._errors.append((kind, _distance(found, expected)))

    def complaint(self) -> str | None:
        """The launch that differs most from torch's functions, if one does after a trial. Waits for the device."""
        if not self._errors:
            return None
        distances = torch.stack([distance for _, distance in self._errors])
        # a nan counts as the largest
        worst = int(distances.argmax())
        if distances[worst] <= TOLERANCE:
            return None
        return f"the launch of {self._errors[worst][0]} is {float(distances[worst]):.2g} off torch's functions"

    def _find(self, tensor: Any, kind: type) -> Any:
        """What waits to be written to the whole of a tensor."""
        if not torch.is_tensor(tensor):
            return None
        key = _storage(tensor)
        for item in self._waiting:
            if isinstance(item, kind) and _storage(item.out) == key and item.out.numel() == tensor.numel():
                return item
        return None

    def _waits(self, tensor: torch.Tensor) -> bool:
        key = _storage(tensor)
        return any(_storage(item.out) == key for item in self._waiting)

    def _launch(self, items: list[_Linear], outs: tuple[torch.Tensor, ...], kind: str, **more: Any) -> None:
        biases = None if items[0].bias is None else tuple(item.bias for item in items)
        self.module.skinny_linear(items[0].x, tuple(item.weight for item in items), biases, outs, **more)
        self.counts[kind] += 1
        if self.trial:
            expected = [F.linear(item.x, item.weight, item.bias) for item in items]
            if more.get("gated"):
                expected = [F.silu(expected[0]) * expected[1]]
            if more.get("residual") is not None:
                expected = [expected[0] + more["residual"]]
            for found, right in zip(outs, expected):
                self._compare(kind, found, right)

    def flush(self) -> None:
        """Run all that waits: linear layers that share an input together."""
        waiting, self._waiting = self._waiting, []
        left = [item for item in waiting if isinstance(item, _Linear)]
        while left:
            first = left[0]
            group = [i for i in left if i.x is first.x and (i.bias is None) == (first.bias is None)][:3]
            left = [item for item in left if item not in group]
            self._launch(group, tuple(item.out for item in group), f"{len(group)} linear")
        for item in waiting:
            if isinstance(item, _Silu):
                item.out.copy_(F.silu(item.source.out))
            elif isinstance(item, _Norm):
                item.out.copy_(F.rms_norm(item.x, item.weight.shape, item.weight, item.eps))

    # --- rules: the result, or `None` for torch's own way after everything that waits ---

    def _on_linear(self, input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
        # weights are read before the launch in front has ended, so nothing on its way may be one
        if not _plain(input) or torch.is_grad_enabled() or not _parameters(weight, bias):
            return None
        width = input.shape[-1] if input.dim() else 0
        fits = weight.dim() == 2 and weight.shape[1] == width and width % 8 == 0 and weight.data_ptr() % 16 == 0
        same = {t.dtype for t in (input, weight, *(() if bias is None else (bias,)))} <= DTYPES
        if not fits or not same or input.dtype != weight.dtype or (bias is not None and bias.dtype != input.dtype):
            return None
        if not 1 <= input.numel() // width <= self.module.MAX_ROWS or input.device != weight.device:
            return None
        if self._waits(input):
            self.flush()
        out = self._result(input, *input.shape[:-1], weight.shape[0])
        self._waiting.append(_Linear(out, input, weight, bias))
        return out

    def _on_silu(self, input: Any, inplace: bool = False) -> torch.Tensor | None:
        source = self._find(input, _Linear)
        if source is None or inplace or input.shape != source.out.shape or not input.is_contiguous():
            return None
        out = self._result(source.out, *source.out.shape)
        self._waiting.append(_Silu(out, source))
        return out

    def _on_mul(self, input: Any, other: Any, **more: Any) -> torch.Tensor | None:
        for gate, up in ((self._find(input, _Silu), self._find(other, _Linear)),
                         (self._find(other, _Silu), self._find(input, _Linear))):  # fmt: skip
            if gate is None or up is None or more or gate.source is up or input.shape != other.shape:
                continue
            pair = gate.source
            if pair.x is not up.x or pair.weight.shape != up.weight.shape or (pair.bias is None) != (up.bias is None):
                continue
            if input.shape != pair.out.shape or not (input.is_contiguous() and other.is_contiguous()):
                continue
            self._waiting = [item for item in self._waiting if item not in (gate, pair, up)]
            out = self._result(pair.out, *pair.out.shape)
            self._launch([pair, up], (out,), "gated linear", gated=True)
            return out
        return None

    def _on_add(self, input: Any, other: Any, **more: Any) -> torch.Tensor | None:
        for own, residual in ((input, other), (other, input)):
            item = self._find(own, _Linear)
            if item is None or more or not _plain(own, residual) or self._waits(residual):
                continue
            if own.shape != item.out.shape or residual.shape != own.shape or residual.dtype != own.dtype:
                continue
            self._waiting.remove(item)
            out = self._result(item.out, *item.out.shape)
            self._launch([item], (out,), "linear and residual", residual=residual)
            return out
        return None

    def _on_norm(self, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor | None:
        if eps is None or not _plain(input) or weight is None or not _parameters(weight):
            return None
        if weight.dtype != input.dtype or input.dtype not in DTYPES:
            return None
        if weight.shape != input.shape[-1:] or tuple(normalized_shape) != tuple(weight.shape):
            return None
        source = self._find(input, _Linear)
        if source is not None:
            out = self._result(input, *input.shape)
            self._waiting.append(_Norm(out, source, input, weight, eps))
            return out
        self.flush()
        if not 1 <= input.numel() // weight.numel() <= self.module.MAX_ROWS:
            return None
        out = self._result(input, *input.shape)
        self.module.rms_norm(input, weight, eps, out)
        self.counts["norm"] += 1
        if self.trial:
            self._compare("norm", out, F.rms_norm(input, weight.shape, weight, eps))
        return out

    def rotate(self, fast: Callable[..., Any], original: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """Rotate queries and keys, with the norms that wait for them.

        Args:
            fast (`Callable`): `rotary` of the kernel package.
            original (`Callable`): The model's own function.
            *tensors (`torch.Tensor`): Queries, keys, cosines and sines.
        Returns:
            `tuple`: Rotated queries and keys.
        """
        with torch._C.DisableTorchFunction():
            pair = [self._find(tensor, _Norm) for tensor in tensors[:2]]
            if None in pair or any(not _same_heads(item, tensor) for item, tensor in zip(pair, tensors)):
                self.flush()
                self.counts["rotation"] += 1
                return self._rotated("rotation", fast(*tensors), original, tensors)
            self._waiting = [item for item in self._waiting if item not in pair]
            self.flush()
            # the same view of what comes before the norm
            q, k = (n.x.as_strided(t.shape, t.stride(), t.storage_offset()) for n, t in zip(pair, tensors))
            norms, eps = tuple(item.weight for item in pair), tuple(item.eps for item in pair)
            self.counts["norms and rotation"] += 1
            found = fast(q, k, *tensors[2:], norms=norms, eps=eps)
            if self.trial:
                tensors = (*(F.rms_norm(*x) for x in zip((q, k), [w.shape for w in norms], norms, eps)), *tensors[2:])
            return self._rotated("norms and rotation", found, original, tensors)

    def _rotated(self, kind: str, found: Any, original: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Any:
        if self.trial:
            for turned, expected in zip(found, original(*inputs)):
                self._compare(kind, turned, expected)
        return found


def _same_heads(item: _Norm, tensor: torch.Tensor) -> bool:
    dim = item.weight.numel()
    aligned = all(stride % dim == 0 for stride in (*tensor.stride()[:-1], tensor.storage_offset()))
    return tensor.shape[-1] == dim and tensor.stride(-1) == 1 and aligned and item.x.storage_offset() == 0


def _distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest distance of a row from the expected one, relative to its norm; nan where only one has a number."""
    found, expected = found.float(), expected.float()
    # what overflows in torch's functions does so here
    numbers = expected.isfinite()
    difference = torch.where(numbers, found - expected, 0.0).norm(dim=-1)
    scale = torch.where(numbers, expected, 0.0).norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / scale).max()


def nan_where_none_was(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """A complaint about results of a trial that are nan where those of the plain step are not. Waits for the device.

    Args:
        expected (`dict`): Fields of the plain step.
        found (`dict`): Fields of the step whose launches waited.
    Returns:
        `str` or `None`: The complaint.
    """
    for name, value in expected.items():
        if torch.is_tensor(value) and value.is_floating_point() and bool((found[name].isnan() & ~value.isnan()).any()):
            return f"something reads results before they are computed: `{name}` has nan"
    return None
