"""Compiles the launches that a call would make, for a device that is not here."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unique_attention import _common
from unique_attention._common import Target

TARGETS = {
    "cuda:80": (GPUTarget("cuda", 80, 32), Target("cuda", 80, 108)),
    "cuda:90": (GPUTarget("cuda", 90, 32), Target("cuda", 90, 132)),
    "cuda:100": (GPUTarget("cuda", 100, 32), Target("cuda", 100, 148)),
    "hip:gfx942": (GPUTarget("hip", "gfx942", 64), Target("hip", 0, 304)),
}
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = (
    "num_warps", "num_stages", "num_ctas", "launch_pdl", "launch_cooperative_grid", "maxnreg", "enable_fp_fusion",
)  # fmt: skip


class Recorder:
    """Stands in for a jitted kernel: keeps the arguments of each launch."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, grid, args, kwargs))


@contextmanager
def recorded(modules, device: Target):
    """Records the launches of the kernels of `modules`, as made for `device`."""
    launches: list = []
    with mock.patch.object(_common, "target_of", lambda _: device):
        patches = []
        for module in modules:
            for name, value in vars(module).items():
                if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                    patches.append(mock.patch.object(module, name, Recorder(value, launches)))
            if hasattr(module, "target_of"):
                patches.append(mock.patch.object(module, "target_of", lambda _: device))
        for patch in patches:
            patch.start()
        try:
            yield launches
        finally:
            for patch in patches:
                patch.stop()


def compile_launch(launch, target: GPUTarget):
    """Compiles one recorded launch; pointers and strides are taken as multiples of 16 where they are."""
    kernel, _, args, kwargs = launch
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    signature, constants, attrs = {}, {}, {}
    unspecialised = {kernel.params[i].name for i in range(len(kernel.params)) if kernel.params[i].do_not_specialize}
    for index, name in enumerate(kernel.arg_names):
        value = bound[name]
        param = kernel.params[index]
        if (
            param.is_constexpr
            or value is None
            or (value is not True and isinstance(value, int) and value == 1 and name not in unspecialised)
        ):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialised:
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options={k: v for k, v in kwargs.items() if k in OPTIONS})


def launch_and_compile(call, modules, name: str):
    """Compiled kernels of everything `call()` launches on target `name`."""
    target, device = TARGETS[name]
    with recorded(modules, device) as launches:
        call()
    if not launches:
        raise AssertionError("the call launched no kernel")
    return [compile_launch(launch, target) for launch in launches]
