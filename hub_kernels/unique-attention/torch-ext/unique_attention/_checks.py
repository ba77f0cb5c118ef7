"""What the public operations share: implementation, validation, allocation. Imports torch and settings only."""

from __future__ import annotations

import importlib
import os

import torch
from torch import Tensor

from .reference_stats import PageStats
from .settings import STATS_DTYPES, VECTORS_PER_PAGE, vectors_per_page

MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
}
# words per row and kv head in which the launches of a decode step count what is ready: a memory sector
ROW_COUNTERS = 8
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


def fits_triton(*tensors: Tensor) -> bool:
    """Whether the kernels take tensors of these head dims and dtypes."""
    return all(MIN_HEAD_DIM <= x.shape[-1] <= MAX_HEAD_DIM and x.dtype in FLOATS for x in tensors)


def check_triton_dims(*tensors: Tensor):
    for x in tensors:
        if not fits_triton(x):
            raise NotImplementedError(
                f"the Triton kernels take head dims from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} in fp16, bf16 or fp32, got "
                f"{x.shape[-1]} in {x.dtype}; use impl='reference' or dense attention."
            )


def resolve_scale(softmax_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if softmax_scale is None else float(softmax_scale)


def shared(lengths: Tensor | None) -> Tensor | None:
    """One element instead of an expanded one: compilers refuse to pass overlapping memory to a kernel."""
    return lengths[:1] if lengths is not None and lengths.stride(0) == 0 else lengths


def dense_rows(x: Tensor | None) -> Tensor | None:
    """A tensor whose last dim the kernels can step through one by one."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def kernel_rows(slots: int, seq_lens, seq_starts, token_mask=None, page_table=None) -> dict[str, Tensor | None]:
    """Lengths, mask and page table as the kernels read them; slots that a narrow mask lacks do not count."""
    if token_mask is not None:
        if token_mask.dtype != torch.bool:
            raise ValueError(f"`token_mask` must be bool, got {token_mask.dtype}; call `.bool()` first.")
        if token_mask.shape[1] < slots:
            token_mask = torch.nn.functional.pad(token_mask, (0, slots - token_mask.shape[1]))
        if token_mask.stride(0) == 0:
            token_mask = token_mask.contiguous()
    return {
        "seq_lens": shared(seq_lens),
        "seq_starts": shared(seq_starts),
        "token_mask": dense_rows(token_mask),
        "page_table": dense_rows(page_table),
    }


def check_stats(stats: PageStats, *, score: str, stats_dtype: str, head_dim: int, num_kv_heads: int):
    check_choice("score", score, tuple(VECTORS_PER_PAGE))
    check_choice("stats_dtype", stats_dtype, STATS_DTYPES)
    width = (head_dim + 1) // 2 if stats_dtype == "int4" else head_dim
    got = (stats.codes.dtype, stats.codes.shape[1], *stats.codes.shape[-2:])
    expected = (CODES[stats_dtype], num_kv_heads, vectors_per_page(score), width)
    if got != expected or (stats.scales is None) != (stats_dtype in ("fp32", "bf16")):
        raise ValueError(
            f"expected statistics of score={score!r} stored as {stats_dtype!r}, head dim {head_dim}: codes of dtype, "
            f"kv heads, vectors and width {expected}, got {got}. Make them with the same settings."
        )
    # codes of 8 and 4 bits are read as words of 4 bytes
    steps = [n * stats.codes.element_size() for n in stats.codes.stride()[:-1]]
    if stats.codes.stride(-1) != 1 or (head_dim % 32 == 0 and any(n % 4 for n in steps)):
        raise ValueError("the vectors of the statistics must be contiguous and start at multiples of 4 bytes.")


def check_query(q: Tensor, k: Tensor, batch: int):
    check_heads(q, k.shape[1])
    if q.shape[-1] != k.shape[-1] or q.shape[0] != batch:
        raise ValueError(f"`q` {list(q.shape)} does not fit {batch} rows of keys with head dim {k.shape[-1]}.")


def check_new(cache: Tensor, new: Tensor, name: str, rows: int | None = None):
    """Refuses new keys or values that do not fit a cache, or with `rows` are not one token for each of them."""
    if cache.dtype != new.dtype or cache.shape[-1] != new.shape[-1] or cache.shape[1] != new.shape[1]:
        raise ValueError(
            f"new {name} {list(new.shape)} {new.dtype} do not fit the cache {list(cache.shape)} {cache.dtype}: "
            "heads, head dim and dtype must agree."
        )
    if rows is not None and (new.shape[0], new.shape[2]) != (rows, 1):
        raise ValueError(
            f"expected new {name} of one token for each of {rows} rows, got {list(new.shape)}; append several tokens "
            "with `append_tokens`."
        )


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
    codes = torch.empty((*shape, vectors, width), dtype=CODES[stats_dtype], device=device)
    scales = None
    if stats_dtype in ("fp8", "int8", "int4"):
        groups = (head_dim + 31) // 32 if stats_dtype == "int4" else 1
        scales = torch.empty((*shape, vectors, groups), dtype=torch.bfloat16, device=device)
    spread = torch.empty(shape, dtype=torch.float32 if stats_dtype == "fp32" else torch.bfloat16, device=device)
    return PageStats(codes, scales, spread)


def check_counters(counters: Tensor | None, rows: int, device: torch.device) -> None:
    """Refuses counters of a decode step that do not fit."""
    if counters is None:
        return
    fits = counters.dtype == torch.int32 and counters.is_contiguous() and counters.device == device
    if not fits or counters.numel() < rows * ROW_COUNTERS:
        raise ValueError(
            f"`counters` must be at least {rows * ROW_COUNTERS} contiguous int32 zeros on {device} ({ROW_COUNTERS} "
            f"per row and kv head), got {counters.numel()} of {counters.dtype} on {counters.device}."
        )
