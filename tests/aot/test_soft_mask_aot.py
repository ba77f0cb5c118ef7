"""Soft-mask attention compiles for every target without a device, within its budgets and without large spills."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from tests.aot.launches import TARGETS, launch_and_compile
from unique_attention import soft_mask, soft_mask_select, soft_mask_stats

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles kernels, which the interpreter replaces"
)
MODULES = (soft_mask, soft_mask_select, soft_mask_stats)
# shared memory that one program may take
SHARED = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}
# bytes of stack per thread a kernel may spill to
SPILLS = {"_soft_mask_fwd_attend_kernel": 32, "_soft_mask_bwd_dq_kernel": 352, "_soft_mask_bwd_dkv_kernel": 480}


def train_step(dtype=torch.bfloat16, D=128, DV=None, H=8, HK=2, T=256, page_size=4, mask=False, **settings):
    """One forward and backward on the CPU, with recorded instead of executed launches."""
    q = torch.zeros(1, H, T, D, dtype=dtype, requires_grad=True)
    k = torch.zeros(1, HK, T, D, dtype=dtype, requires_grad=True)
    v = torch.zeros(1, HK, T, DV or D, dtype=dtype, requires_grad=True)
    token_mask = torch.ones(1, T, dtype=torch.bool) if mask else None
    settings = {"num_kept": 16, "temperature": 1.0, "page_size": page_size, "token_mask": token_mask} | settings
    soft_mask.soft_mask_attention(q, k, v, **settings).sum().backward()


def stack_bytes(kernel, folder):
    """Stack per thread of a compiled CUDA kernel, from its cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", listing.stdout + listing.stderr).group(1))


CASES = {
    "bf16 128": {},
    "bf16 64": {"D": 64, "page_size": 8},
    "bf16 256": {"D": 256, "page_size": 16, "score": "mean"},
    "fp16 80 everything": {
        "dtype": torch.float16, "D": 80, "DV": 48, "H": 7, "HK": 1, "mask": True, "softcap": 30.0,
        "sinks": torch.zeros(7), "threshold_grad": True,
    },
    "bf16 minmax one head": {"H": 2, "HK": 2, "page_size": 128, "score": "minmax"},
    "bf16 sixteen heads": {"H": 16, "HK": 1, "page_size": 2},
    "bf16 sixteen heads 256": {"H": 16, "HK": 1, "page_size": 4, "D": 256},
    "bf16 256 small pages": {"D": 256, "page_size": 2, "threshold_grad": True},
    "fp32 256 sixteen heads": {"H": 16, "HK": 1, "page_size": 2, "D": 256, "dtype": torch.float32, "mask": True},
    "fp32 minmax": {"page_size": 8, "score": "minmax", "dtype": torch.float32},
}  # fmt: skip


# ten kernels of some seconds each: the rest of the table is for the slow lane
FAST = {("bf16 128", target) for target in TARGETS}
FAST |= {(case, "cuda:90") for case in CASES if "bf16 sixteen" in case or "small pages" in case}
TABLE = [
    pytest.param(case, target, marks=() if (case, target) in FAST else pytest.mark.slow, id=f"{case}-{target}")
    for case in CASES
    for target in TARGETS
]


@pytest.mark.parametrize("case, target", TABLE)
def test_soft_mask_compiles_within_budget(case, target):
    kernels = launch_and_compile(lambda: train_step(**CASES[case]), MODULES, target)
    assert len(kernels) == 14, "features 2 x 2, selection 2, lists 3, attention 3, gradients of features 2"
    for kernel in kernels:
        shared = kernel.metadata.shared
        assert shared <= SHARED[target], f"{kernel.metadata.name} takes {shared} bytes of shared memory"


def test_soft_mask_does_not_spill_on_hopper(tmp_path):
    for kernel in launch_and_compile(train_step, MODULES, "cuda:90"):
        allowed = SPILLS.get(kernel.metadata.name, 0)
        assert stack_bytes(kernel, tmp_path) <= allowed, f"{kernel.metadata.name} spills"


def instructions(kernel, folder):
    """Machine code of a compiled CUDA kernel, as text."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def test_soft_mask_products_do_not_wait_one_by_one_on_hopper(tmp_path):
    kernels = launch_and_compile(lambda: train_step(page_size=8, H=16, HK=4), MODULES, "cuda:90")
    checked = 0
    for kernel in kernels:
        code = instructions(kernel, tmp_path)
        products, waits = len(re.findall(r"\bHGMMA", code)), len(re.findall(r"WARPGROUP\.DEPBAR", code))
        checked += products > 0
        assert 2 * waits <= products, f"{kernel.metadata.name}: {waits} waits for {products} products"
    assert checked == 5, "thresholds, tiles and the three attention kernels are made of products"


def test_soft_mask_lengths_do_not_recompile():
    keys = set()
    for length in (256, 257, 300, 1031, 4096):
        kernels = launch_and_compile(lambda length=length: train_step(T=length), MODULES, "cuda:90")
        keys.add(tuple(kernel.hash for kernel in kernels))
    assert len(keys) == 1
