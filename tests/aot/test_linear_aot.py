"""The linear and rotary kernels of a captured step compile for devices that are not here, without spills."""

import importlib
import os

import pytest
import torch

from tests.aot.launches import TARGETS, launch_and_compile
from tests.aot.test_decode_aot import registers_and_stack

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so not interpreted")
MODULES = [importlib.import_module(f"unique_attention.{name}") for name in ("skinny_linear", "rotary")]
# rows, inputs, outputs of each weight, gated, residual
LINEARS = [
    (1, 4096, (4096, 1024, 1024), False, False),
    (1, 1024, (3072, 3072), True, False),
    (1, 3072, (1024,), False, True),
    (16, 4096, (4096, 1024, 1024), False, False),
    (16, 4096, (12288, 12288), True, False),
    (8, 3072, (1024,), False, True),
]


def linear(rows, depth, sizes, gated, residual):
    def empty(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    outs = tuple(empty(rows, n) for n in (sizes[:1] if gated else sizes))
    module = MODULES[0]
    weights = tuple(empty(n, depth) for n in sizes)
    added = empty(rows, sizes[0]) if residual else None
    module.skinny_linear(empty(rows, depth), weights, None, outs, added, gated)


def rotate(rows, norms):
    q, k = (torch.empty(rows, 1, h, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2) for h in (32, 8))
    cos, sin = (torch.empty(1, 1, 128, dtype=torch.bfloat16, device="meta") for _ in "cs")
    weights = (torch.empty(128, dtype=torch.bfloat16, device="meta"),) * 2 if norms else None
    MODULES[1].rotary(q, k, cos, sin, norms=weights, eps=(1e-6, 1e-6))


def check(call, target, tmp_path):
    for kernel in launch_and_compile(call, MODULES, target):
        assert kernel.metadata.shared <= 113 * 1024, f"{kernel.metadata.name}: {kernel.metadata.shared} bytes"
        if target == "cuda:90":
            registers, stack = registers_and_stack(kernel, tmp_path)
            assert stack == 0 and registers <= 255, f"{kernel.metadata.name} spills: {stack} bytes of stack"


SLOW = {"cuda:80", "cuda:100", "hip:gfx942"}


@pytest.mark.parametrize("case", LINEARS, ids=str)
@pytest.mark.parametrize("target", [pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW)) for t in TARGETS])
def test_skinny_linear_compiles_without_spills(case, target, tmp_path):
    check(lambda: linear(*case), target, tmp_path)


@pytest.mark.parametrize("target", [pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW)) for t in TARGETS])
def test_the_norm_compiles_without_spills(target, tmp_path):
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((16, 4096), (4096,)))
    check(lambda: MODULES[0].rms_norm(x, weight, 1e-6, x), target, tmp_path)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("target", [pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW)) for t in TARGETS])
def test_rotary_compiles_without_spills(norms, target, tmp_path):
    check(lambda: rotate(2, norms), target, tmp_path)
