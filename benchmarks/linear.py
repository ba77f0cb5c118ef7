"""Linear layers of a decode step, our kernel against cuBLAS: microseconds and share of the memory bandwidth.

`python -m benchmarks.linear` on a CUDA device prints a table; `--sweep` tries other tiles per shape and prints entries
for `MEASURED` in `skinny_linear.py`. Weights are many and larger than the cache together, as in a model.
"""

from __future__ import annotations

import argparse
import itertools
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.environment import time_us
from unique_attention import skinny_linear as module
from unique_attention.skinny_linear import LinearLaunch, plan_linear, skinny_linear

# inputs, outputs of each weight, gated: the layers of the Qwen3 shapes of 8B and 0.6B
SHAPES = {
    "8B qkv": (4096, (4096, 1024, 1024), False),
    "8B o": (4096, (4096,), False),
    "8B gate, up": (4096, (12288, 12288), True),
    "8B down": (12288, (4096,), False),
    "8B head": (4096, (151936,), False),
    "0.6B qkv": (1024, (2048, 1024, 1024), False),
    "0.6B o": (2048, (1024,), False),
    "0.6B gate, up": (1024, (3072, 3072), True),
    "0.6B down": (3072, (1024,), False),
    "0.6B head": (1024, (151936,), False),
}
ROWS = (1, 6, 8, 16)
# bytes of weights per measurement: several times the cache of the device
BYTES = 400 << 20
# of reads, in a decode kernel of an H200
BANDWIDTH = 4.4e12
# a smaller gain over the rule is not worth an entry
GAIN = 1.02


def calls(rows: int, depth: int, sizes: tuple[int, ...], gated: bool, device: str) -> tuple[list, list, int]:
    """The same layer over many weights: ours, torch's, and the bytes of one call."""
    size = 2 * depth * sum(sizes)
    x = torch.randn(rows, depth, device=device, dtype=torch.bfloat16)
    outs = tuple(torch.empty(rows, n, device=device, dtype=torch.bfloat16) for n in (sizes[:1] if gated else sizes))
    ours, torchs = [], []
    for _ in range(max(2, BYTES // size)):
        weights = tuple(torch.randn(n, depth, device=device, dtype=torch.bfloat16) for n in sizes)
        ours.append(lambda w=weights: skinny_linear(x, w, None, outs, gated=gated))

        def plain(weights=weights):
            found = [F.linear(x, w) for w in weights]
            return F.silu(found[0]) * found[1] if gated else found

        torchs.append(plain)
    return ours, torchs, size


def tiles(rows: int, depth: int) -> list[LinearLaunch]:
    """Launch settings worth a try."""
    if rows == 1:
        found = [(1, n, k, 1, w) for n, k, w in itertools.product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8))]
    else:
        found = [(16, n, k, s, w) for n, k, s, w in itertools.product((16, 32, 64), (64, 128, 256, 512), (3, 4, 6, 8), (2, 4))]
    return [LinearLaunch(*x) for x in found if x[2] <= depth and 2 * (x[1] + x[0]) * x[2] * x[3] <= 160 << 10]


def entries(key: tuple[int, int, int, bool], times: dict[int, dict[LinearLaunch, float]]) -> list[str]:
    """Lines for the table: for a single row, and for more where other tiles beat the rule on all of them together.

    Args:
        key (`tuple`): Multiprocessors, outputs, inputs, gated.
        times (`dict`): By rows, the microseconds of each launch; the first one is the rule's.
    """
    num_sms, columns, depth, gated = key
    lines = []
    for kind in (1, module.MAX_ROWS):
        runs = [found for rows, found in times.items() if (rows == 1) == (kind == 1)]
        tried = [plan for plan in (runs[0] if runs else ()) if all(plan in found for found in runs)]
        if not tried:
            continue
        ruled = sum(next(iter(found.values())) for found in runs)
        best = min(tried, key=lambda plan: sum(found[plan] for found in runs))
        total = sum(found[best] for found in runs)
        if ruled >= GAIN * total:
            tiles = ", ".join(map(str, best))
            place = (num_sms, kind, columns, depth, gated)
            lines.append(f"    {place}: LinearLaunch({tiles}),  # {ruled:.1f} -> {total:.1f} us")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="try other tiles")
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    args = parser.parse_args()
    times: dict[tuple, dict[int, dict[LinearLaunch, float]]] = {}
    for (name, (depth, sizes, gated)), rows in itertools.product(SHAPES.items(), args.rows):
        if args.only not in name:
            continue
        ours, torchs, size = calls(rows, depth, sizes, gated, "cuda")
        columns = sizes[0] if gated else sum(sizes)
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        plans = [plan_linear(rows, columns, depth, gated, num_sms)] + (tiles(rows, depth) if args.sweep else [])
        found = []
        for plan in dict.fromkeys(plans):
            with mock.patch.object(module, "plan_linear", lambda *_, plan=plan: plan):
                try:
                    found.append((time_us(ours, repeats=3, target_ms=2)[0], plan))
                except (RuntimeError, module.triton.runtime.errors.OutOfResources) as error:
                    print(f"  {tuple(plan)}: {str(error)[:80]}")
        own, best, cublas = found[0][0], min(found), time_us(torchs, repeats=5)[0]
        floor = size / BANDWIDTH * 1e6
        print(
            f"{name:14} {rows:2} rows: ours {own:7.2f} us ({floor / own:4.0%}) torch {cublas:7.2f} us "
            f"({floor / cublas:4.0%}) best {best[0]:7.2f} us ({floor / best[0]:4.0%}) {tuple(best[1])}",
            flush=True,
        )
        times.setdefault((num_sms, columns, depth, gated), {})[rows] = {plan: time for time, plan in found}
    if args.sweep:
        print("\n".join(line for key, found in times.items() for line in entries(key, found)))


if __name__ == "__main__":
    main()
