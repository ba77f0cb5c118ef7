"""What the public operations share: implementation, validation, allocation. Imports torch and settings only."""

from __future__ import annotations

import importlib
import os

import torch
from torch import Tensor

from .reference_stats import PageStats
from .settings import STATS_DTYPES, vectors_per_page

MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_CODES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
}
# scores that only the reference computes: baselines and studies
REFERENCE_SCORES = ("oracle", "principal")


def kernels(name: str):
    return importlib.import_module(f".{name}", __package__)


def use_triton(tensor: Tensor, impl: str | None, score: str = "scalar") -> bool:
    """Triton on GPUs (and under its interpreter), the reference elsewhere and for the scores that only it computes."""
    if impl not in (None, "triton", "reference"):
        raise ValueError(f"`impl` must be None, 'triton' or 'reference', got {impl!r}.")
    if impl == "triton" and score in REFERENCE_SCORES:
        raise NotImplementedError(f"score={score!r} has no Triton kernel; use impl='reference' or another score.")
    if impl is not None:
        return impl == "triton"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return score not in REFERENCE_SCORES and (tensor.device.type in ("cuda", "xpu") or interpreted)


def check_page_size(page_size: int):
    if page_size < 2 or page_size > 128 or page_size & (page_size - 1):
        raise ValueError(f"`page_size` must be a power of two from 2 to 128, got {page_size}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def check_heads(q: Tensor, num_kv_heads: int):
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"`q` must be [B, H, 1, D] (one token per row), got {list(q.shape)}.")
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {num_kv_heads} kv heads: expected a multiple.")


def check_dims(*tensors: Tensor):
    for x in tensors:
        if x.dtype not in FLOATS + (torch.float64,):
            raise ValueError(
                f"keys, values and queries must be float16, bfloat16 or float32, got {x.dtype}. "
                "Quantised caches are not supported: convert the tensor before the call."
            )
        if x.stride(-1) != 1:
            raise ValueError("the last dim of keys and values must be contiguous; call `.contiguous()` first.")


def check_triton_dims(*tensors: Tensor):
    for x in tensors:
        if not MIN_HEAD_DIM <= x.shape[-1] <= MAX_HEAD_DIM:
            raise NotImplementedError(
                f"the Triton kernels take head dims from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {x.shape[-1]}; "
                "use impl='reference' or dense attention."
            )
        if x.dtype not in FLOATS:
            raise NotImplementedError(
                f"the Triton kernels take fp16, bf16 or fp32, got {x.dtype}; use impl='reference'."
            )


def resolve_scale(softmax_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if softmax_scale is None else float(softmax_scale)


def shared(lengths: Tensor | None) -> Tensor | None:
    """One element instead of an expanded one: compilers refuse to pass overlapping memory to a kernel."""
    return lengths[:1] if lengths is not None and lengths.stride(0) == 0 else lengths


def empty_stats(
    shape: tuple[int, ...], head_dim: int, *, score: str = "scalar", stats_dtype: str = "int4", device=None
) -> PageStats:
    """Unwritten storage for page statistics.

    Args:
        shape (`tuple`): `(B, HK, N)`, or `(num_pages, HK)` with a page table.
        head_dim (`int`): D of the keys.
        score (`str`, *optional*, defaults to `"scalar"`): Score form, sets the vectors per page.
        stats_dtype (`str`, *optional*, defaults to `"int4"`): Storage of the vectors.
        device (`torch.device`, *optional*): Where.
    Returns:
        `PageStats`: uninitialised tensors.
    Raises:
        ValueError: unknown `score` or `stats_dtype`.
    """
    check_choice("stats_dtype", stats_dtype, STATS_DTYPES)
    vectors = vectors_per_page(score)
    width = (head_dim + 1) // 2 if stats_dtype == "int4" else head_dim
    codes = torch.empty((*shape, vectors, width), dtype=_CODES[stats_dtype], device=device)
    scales = None
    if stats_dtype in ("fp8", "int8", "int4"):
        groups = (head_dim + 31) // 32 if stats_dtype == "int4" else 1
        scales = torch.empty((*shape, vectors, groups), dtype=torch.bfloat16, device=device)
    spread = torch.empty(shape, dtype=torch.float32 if stats_dtype == "fp32" else torch.bfloat16, device=device)
    return PageStats(codes, scales, spread)
