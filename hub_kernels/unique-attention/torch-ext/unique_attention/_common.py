"""Helpers shared by the Triton kernels: storage kinds, row bounds, rows in step, launch settings.

Imports torch, triton and `_checks` only.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._checks import ROW_COUNTERS

# how a page vector is stored; the kernels branch on these at compile time
KIND = {"fp32": 0, "bf16": 1, "fp8": 2, "int8": 3, "int4": 4}
FP32, BF16, FP8, INT8, INT4 = (tl.constexpr(i) for i in range(5))

# which statistics a score reads: the kernels branch on these at compile time
FORM = {"mean": 0, "scalar": 1, "diagonal": 2, "absolute": 3, "moment": 4, "minmax": 5}
MEAN, SCALAR, DIAGONAL, ABSOLUTE, MOMENT, MINMAX = (tl.constexpr(i) for i in range(6))

# adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest even integer
ROUND = tl.constexpr(12582912.0)

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Target(NamedTuple):
    """What the launch code needs to know of a device."""

    backend: str
    arch: int
    num_sms: int

    @property
    def native_fp8(self) -> bool:
        """Whether the compiler converts `float8_e4m3fn` in hardware."""
        return self.backend == "cuda" and self.arch >= 89

    @property
    def dp4a(self) -> bool:
        """Whether four int8 products and their sum are one instruction."""
        return self.backend == "cuda" and self.arch >= 61

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start while its predecessor drains."""
        return self.backend == "cuda" and self.arch >= 90

    @property
    def in_step(self) -> bool:
        """Whether a row may go on to the next launch while other rows are still in this one."""
        return self.dependent_launch or self.backend == "interpreter"


@cache
def target_of(device: torch.device) -> Target:
    """The [`Target`] of a device; the interpreter counts as one of its own."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Target("hip", 0, properties.multi_processor_count)
        return Target("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count)
    return Target("interpreter" if INTERPRET else device.type, 0, 16)


def stride_of(tensor: torch.Tensor | None) -> int:
    """Stride of the batch dimension of a `[B]` or `[B, ...]` tensor; 0 for `None` and for what all rows share."""
    return 0 if tensor is None or tensor.numel() == 1 else tensor.stride(0)


def page_strides(tensor: torch.Tensor, paged: bool) -> tuple[int, int, int]:
    """Strides (row, head, page) of per-page storage `[B, HK, N, ...]`; with a page table `[num_pages, HK, ...]`."""
    if paged:
        return 0, tensor.stride(1), tensor.stride(0)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def stats_arguments(stats, stats_dtype: str, paged: bool) -> tuple:
    """Tensors and strides of the statistics, as the kernels take them."""
    codes, scales, spread = stats
    scale_strides = (0, 0, 0, 0) if scales is None else (*page_strides(scales, paged), scales.stride(-2))
    tensors = (codes.view(torch.uint8) if stats_dtype == "fp8" else codes, scales, spread)
    return tensors, (*page_strides(codes, paged), codes.stride(-2), *scale_strides, *page_strides(spread, paged))


def token_strides(tensor: torch.Tensor, paged: bool, page_size: int) -> tuple[int, int, int, int]:
    """Strides (row, head, page, token) of a cache `[B, HK, S, D]`; with a page table `[num_pages, HK, P, D]`."""
    if paged:
        return 0, tensor.stride(1), tensor.stride(0), tensor.stride(2)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2) * page_size, tensor.stride(2)


# what is counted per row, in words of one memory sector: programs that scored pages, super-pages listed, programs that
# scored their pages, pages chosen, partial results
COUNTERS = tl.constexpr(ROW_COUNTERS)
SCORED, LISTED, RESCORED, CHOSEN, MERGED = (tl.constexpr(i) for i in range(5))


@triton.jit
def signal_row(counter_ptr):
    """Counts this program in, after all that it wrote."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def await_row(counter_ptr, programs):
    """Waits until so many programs are counted in; what they wrote can then be read.

    They must all be running or done: of a launch that this one followed by `gdc_launch_dependents`, or of an earlier
    one.
    """
    counted = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while counted < programs:
        counted = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def prefetch(ptr, count):
    """Asks for `count` elements from `ptr` on to be brought into the second-level cache."""
    # in whole units of 16 bytes
    first = ptr.to(tl.int64) & -16
    last = ((ptr + count).to(tl.int64) + 15) & -16
    tl.inline_asm_elementwise(
        """{
        .reg .pred once;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 once, thread, 0;
        @once cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [first, (last - first).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def end_in_order(program):
    """Ends no sooner than the launch before, so that who waits for this one waits for all; program 0 is enough."""
    if program == 0:
        tl.extra.cuda.gdc_wait()


@triton.jit
def row_length(len_ptr, stride_len, b, capacity, HAS_LENS: tl.constexpr):
    """Slots in use of row `b` as given, which may be more than there are."""
    length = capacity
    if HAS_LENS:
        # past the first cache: read before a dependent launch waits for anything
        length = tl.load(len_ptr + b * stride_len, cache_modifier=".cg").to(tl.int32)
    return length


@triton.jit
def row_end(len_ptr, stride_len, b, capacity, HAS_LENS: tl.constexpr):
    """One past the last slot in use of row `b`."""
    return tl.minimum(row_length(len_ptr, stride_len, b, capacity, HAS_LENS), capacity)


@triton.jit
def row_start(start_ptr, stride_start, b, HAS_STARTS: tl.constexpr):
    """First valid slot of row `b`."""
    start = 0
    if HAS_STARTS:
        start = tl.load(start_ptr + b * stride_start, cache_modifier=".cg").to(tl.int32)
    return start


@triton.jit
def row_extent(
    len_ptr, start_ptr, stride_len, stride_start, b, capacity,
    P: tl.constexpr, HAS_LENS: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Row `b`: its length as given, its first slot and one past its last, its first page and one past its last."""
    length = row_length(len_ptr, stride_len, b, capacity, HAS_LENS)
    end = tl.minimum(length, capacity)
    start = row_start(start_ptr, stride_start, b, HAS_STARTS)
    last_page = tl.cdiv(end, P)
    return length, start, end, tl.minimum(start // P, last_page), last_page


@triton.jit
def physical_page(table_ptr, stride_table, b, pages, mask, HAS_TABLE: tl.constexpr):
    """Physical ids (int64) of logical pages of row `b`."""
    physical = pages
    if HAS_TABLE:
        physical = tl.load(table_ptr + b * stride_table + pages, mask=mask, other=0, cache_modifier=".cg")
    return physical.to(tl.int64)


@triton.jit
def round_up_bf16(x):
    """The smallest bfloat16 not below a non-negative float32, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def encode_fp8(x):
    """float32 (magnitude at most 448) to the bits of float8_e4m3fn, nearest even, without hardware conversion."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    step = ((tl.maximum(exponent, 121) - 3) << 23).to(tl.float32, bitcast=True)
    rounded = ((tl.div_rn(x, step) + ROUND) - ROUND) * step
    # scaled by 2**-8 the value is an exact float16 whose exponent field is that of the fp8 number
    half = (rounded * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (((half & 0x7FFF) >> 7) | ((half >> 8) & 0x80)).to(tl.uint8)


@triton.jit
def decode_fp8(bits, NATIVE_FP8: tl.constexpr):
    """Bits of float8_e4m3fn to float32."""
    if NATIVE_FP8:
        x = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        wide = bits.to(tl.int32)
        half = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
        x = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return x


@triton.jit
def int4_dims(offs_c, half, C: tl.constexpr):
    """The dim in the low (`half` 0) or high (1) nibble of byte `offs_c`; groups of 32 dims take 16 bytes."""
    group = offs_c // 16
    return group * 32 + half * (tl.minimum(32, 2 * C - group * 32) // 2) + offs_c % 16
