"""The decode chain compiles for devices that are not here, within the register and shared-memory budget."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from tests.aot.launches import TARGETS, launch_and_compile
from unique_attention import ops
from unique_attention.settings import UniqueConfig

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so not interpreted")
NAMES = "page_stats page_score page_select second_level sparse_decode dense_decode unique_decode".split()
MODULES = [importlib.import_module(f"unique_attention.{name}") for name in NAMES]
# page size, storage, score, head dim, batch, context, super-page: many rows and few, every storage, an odd head dim
CASES = [
    (4, "int4", "scalar", 128, 80, 32768, None),
    (8, "bf16", "scalar", 128, 80, 32768, None),
    (16, "int8", "scalar", 128, 1, 131072, None),
    (4, "fp8", "scalar", 128, 1, 16384, None),
    (4, "fp32", "minmax", 256, 16, 8192, None),
    (8, "int4", "absolute", 80, 2, 8192, None),
    (4, "int4", "diagonal", 128, 16, 8192, None),
    (4, "int4", "scalar", 128, 80, 32768, 16),
    (4, "int4", "scalar", 128, 1, 32768, 32),
]


def step(page_size, stats_dtype, score, dim, batch, context, super_page_size):
    """Statistics of a prefill, then one decode step, on meta tensors."""
    k, v = (torch.empty(batch, 8, context, dim, dtype=torch.bfloat16, device="meta") for _ in "kv")
    q = torch.empty(batch, 32, 1, dim, dtype=torch.bfloat16, device="meta")
    lens = torch.empty(batch, dtype=torch.int32, device="meta")
    new = tuple(torch.empty(batch, 8, 1, dim, dtype=torch.bfloat16, device="meta") for _ in "kv")
    config = UniqueConfig(
        page_size=page_size, budget=512, stats_dtype=stats_dtype, score=score, super_page_size=super_page_size
    )  # fmt: skip
    names = {"page_size": page_size, "score": score, "stats_dtype": stats_dtype}
    stats = ops.empty_stats((batch, 8, context // page_size), dim, score=score, stats_dtype=stats_dtype, device="meta")
    ops.page_stats(k, **names, seq_lens=lens, out=stats, impl="triton")
    upper = None
    if super_page_size is not None:
        upper = ops.empty_stats(
            (batch, 8, context // super_page_size), dim, score=score, stats_dtype=stats_dtype, device="meta"
        )
    ops.unique_decode(q, k, v, stats, config=config, seq_lens=lens, new=new, super_stats=upper, impl="triton")


def paged_step(page_size, stats_dtype, batch, context, appended):
    """One decode step over physical pages, on meta tensors."""
    pages = context // page_size
    table = torch.empty(batch, pages, dtype=torch.int32, device="meta")
    k, v = (torch.empty(batch * pages, 8, page_size, 128, dtype=torch.bfloat16, device="meta") for _ in "kv")
    q = torch.empty(batch, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    lens = torch.empty(batch, dtype=torch.int32, device="meta")
    config = UniqueConfig(page_size=page_size, budget=512, stats_dtype=stats_dtype)
    rows = {"seq_lens": lens, "page_table": table, "impl": "triton"}
    stats = ops.page_stats(k, page_size=page_size, stats_dtype=stats_dtype, **rows)
    new = tuple(torch.empty(batch, 8, 1, 128, dtype=torch.bfloat16, device="meta") for _ in "kv")
    ops.unique_decode(q, k, v, stats, config=config, new=new if appended else None, **rows)


def registers_and_stack(kernel, tmp_path):
    """What ptxas gave a kernel, read from its binary."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


# what attends to everything: one launch, the statistics of the new token with it
DENSE = [(4, "int4", "scalar", 128, 1, 256, None), (8, "bf16", "diagonal", 80, 8, 512, None)]
# a compilation takes seconds: every target for the first cases, the rest of the table in the slow lane
TABLE = [
    pytest.param(
        case, target, id=f"{'-'.join(map(str, case))}-{target}",
        marks=() if case in CASES[:3] or target == "cuda:90" else pytest.mark.slow,
    )
    for case in CASES + DENSE
    for target in TARGETS
]  # fmt: skip


@pytest.mark.parametrize(("case", "target"), TABLE)
def test_decode_chain_compiles_within_its_budget(case, target, tmp_path):
    names = set()
    for kernel in launch_and_compile(lambda: step(*case), MODULES, target):
        names.add(kernel.metadata.name)
        # of 227 KiB a multiprocessor of sm_90 offers, so that two programs fit
        assert kernel.metadata.shared <= 113 * 1024, f"{kernel.metadata.name}: {kernel.metadata.shared} bytes"
        if target == "cuda:90":
            registers, stack = registers_and_stack(kernel, tmp_path)
            assert stack == 0, f"{kernel.metadata.name} spills: {registers} registers, {stack} bytes of stack"
    chain = {
        "_page_stats_fwd_kernel",
        "_page_score_fwd_kernel",
        "_page_select_fwd_kernel",
        "_sparse_decode_fwd_kernel",
    }
    second = {"_listed_score_fwd_kernel", "_listed_select_fwd_kernel"}
    dense = {"_page_stats_fwd_kernel", "_dense_decode_fwd_kernel"}
    assert names == (dense if case in DENSE else chain | (second if case[-1] else set()))


@pytest.mark.parametrize(("stats_dtype", "appended"), [("int4", False), ("fp8", False), ("int4", True)])
@pytest.mark.parametrize(("batch", "context"), [(1, 256), (1, 8192), (16, 32768)])
def test_pages_anywhere_and_no_new_token_compile(stats_dtype, appended, batch, context):
    kernels = launch_and_compile(lambda: paged_step(4, stats_dtype, batch, context, appended), MODULES, "cuda:90")
    assert len(kernels) == (2 if context == 256 else 4 + appended)
