"""Decode attention: UNIQUE against torch SDPA and FlashInfer, in one run, inside CUDA graphs.

`python -m benchmarks.decode` on a CUDA device writes `benchmarks/results/decode_h200.json`; `--smoke` runs a tiny
case anywhere. Every row carries the needle accuracy and the recall of attention mass that `benchmarks/quality.py`
measured for its settings. The time of UNIQUE includes writing the new token and its statistics; that of the
baselines does not: what writing the token alone takes stands beside it (`append_us`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, time_us, write_results
from unique_attention import ops
from unique_attention.settings import UniqueConfig

READ_RATE = 4.4e12  # bytes per second that dense decode reaches on an H200
MAX_DENSE = 2048  # tokens of a row beyond which pages are chosen, however few the rows
COLD_BYTES = 300 * 2**20  # inputs rotate until they exceed the L2 cache by far
# the settings of a row; files from before super-pages lack the last two
KEYS = ("page_size", "stats_dtype", "score", "group_reduce", "budget", "super_page_size", "super_budget")


@dataclass(frozen=True)
class Shape:
    """One decode problem."""

    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def dense_bytes(self) -> int:
        """Bytes of keys and values that dense attention reads."""
        return self.batch * self.context * self.kv_heads * self.head_dim * 2 * self.dtype.itemsize


def index_bytes(config: UniqueConfig, head_dim: int) -> float:
    """Bytes of statistics per page and kv head."""
    stats = ops.empty_stats((1, 1, 1), head_dim, score=config.score, stats_dtype=config.stats_dtype)
    return sum(x.numel() * x.element_size() for x in stats if x is not None) - (
        0 if config.score == "scalar" else stats.spread.element_size()
    )


def scored_bytes(config: UniqueConfig, context: int, head_dim: int) -> float:
    """Bytes of statistics that a token reads per kv head: all pages; or all super-pages, and pages of those kept."""
    upper = config.upper
    scored = context if upper is None else min(upper.budget, context)
    found = math.ceil(scored / config.page_size) * index_bytes(config, head_dim)
    return found if upper is None else found + scored_bytes(upper, context, head_dim)


def stored_bytes(config: UniqueConfig, head_dim: int) -> float:
    """Bytes of statistics per token and kv head, super-pages included."""
    levels = (config,) if config.upper is None else (config, config.upper)
    return sum(index_bytes(level, head_dim) / level.page_size for level in levels)


def floor_us(shape: Shape, config: UniqueConfig) -> float:
    """Time to read the statistics and the kept pages once at `READ_RATE`, in microseconds."""
    rows = shape.batch * shape.kv_heads
    kept = min(config.budget, shape.context) * 2 * shape.head_dim * shape.dtype.itemsize
    return rows * (scored_bytes(config, shape.context, shape.head_dim) + kept) / READ_RATE * 1e6


def dense_calls(shape: Shape, device: str) -> dict[str, list[Callable]]:
    """The dense baselines that run here, each as calls on rotating inputs."""
    sets = 1 if device == "cpu" else min(8, max(1, math.ceil(COLD_BYTES / shape.dense_bytes)))
    calls: dict[str, list[Callable]] = {}
    inputs = []
    for _ in range(sets):
        kv = [
            torch.randn(shape.batch, shape.kv_heads, shape.context, shape.head_dim, dtype=shape.dtype, device=device)
            for _ in "kv"
        ]
        inputs.append(
            (torch.randn(shape.batch, shape.heads, 1, shape.head_dim, dtype=shape.dtype, device=device), *kv)
        )
    backends = {"sdpa": None}
    if device == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}

    def sdpa(q, k, v, backend):
        if backend is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    for name, backend in backends.items():
        calls[name] = [lambda x=x, backend=backend: sdpa(*x, backend) for x in inputs]
    if device == "cuda":
        wrappers = [flashinfer_call(shape, x) for x in inputs]
        if wrappers[0] is not None:
            calls["flashinfer"] = wrappers
    return calls


def flashinfer_call(shape: Shape, inputs) -> Callable | None:
    """FlashInfer's paged decode with tensor cores on a copy of the inputs, or `None` where it is not installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    q, k, v = inputs
    page = 16
    pages = shape.context // page
    if shape.context % page:
        return None
    paged = [
        x.reshape(shape.batch, shape.kv_heads, pages, page, -1).transpose(1, 2).flatten(0, 1).contiguous()
        for x in (k, v)
    ]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * pages,
        torch.arange(shape.batch * pages, dtype=torch.int32, device="cuda"),
        torch.full((shape.batch,), page, dtype=torch.int32, device="cuda"),
        shape.heads, shape.kv_heads, shape.head_dim, page, q_data_type=shape.dtype, kv_data_type=shape.dtype,
    )  # fmt: skip
    flat = q[:, :, 0].contiguous()
    return lambda: wrapper.run(flat, tuple(paged))


def time_dense(shape: Shape, device: str) -> dict[str, float]:
    """Microseconds per call of each baseline."""
    times = {}
    for name, calls in dense_calls(shape, device).items():
        try:
            times[name] = time_us(calls)[0]
        except RuntimeError as error:
            print(f"  {name} does not run here: {str(error).splitlines()[0]}")
    return times


def time_append(shape: Shape, device: str) -> float:
    """Microseconds to write a token of each row to a static cache, as Transformers does: part of a dense step too."""
    sets = 1 if device == "cpu" else min(24, max(1, math.ceil(COLD_BYTES / shape.dense_bytes)))
    rows = (shape.batch, shape.kv_heads)
    calls = []
    for _ in range(sets):
        cache = [torch.zeros(*rows, shape.context, shape.head_dim, dtype=shape.dtype, device=device) for _ in "kv"]
        new = [torch.randn(*rows, 1, shape.head_dim, dtype=shape.dtype, device=device) for _ in "kv"]
        where = torch.tensor([shape.context - 1], device=device)
        calls.append(lambda c=cache, n=new, at=where: [x.index_copy_(2, at, y) for x, y in zip(c, n)])
    return time_us(calls)[0]


class Decode:
    """The whole chain on rotating inputs; every layer of a model has a cache of its own."""

    def __init__(self, shape: Shape, config: UniqueConfig, device: str, dense_below: int):
        self.shape, self.config = shape, config
        self.dense_below = min(MAX_DENSE, dense_below // (shape.batch * shape.kv_heads))
        self.level = config.upper or config  # the level that is scored whole
        touched = floor_us(shape, config) * READ_RATE / 1e6
        sets = 1 if device == "cpu" else min(24, max(1, math.ceil(COLD_BYTES / touched)))
        cache_bytes = shape.dense_bytes
        sets = max(1, min(sets, int(60e9 / cache_bytes)))
        self.inputs = [self._inputs(device) for _ in range(sets)]

    def _inputs(self, device: str) -> dict:
        shape, config = self.shape, self.config
        capacity = math.ceil(shape.context / config.page_size) * config.page_size
        size = (shape.batch, shape.kv_heads, capacity, shape.head_dim)
        k, v = (torch.randn(size, dtype=shape.dtype, device=device) for _ in "kv")
        lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
        names = {"score": config.score, "stats_dtype": config.stats_dtype, "seq_lens": lens}
        stats = ops.page_stats(k, page_size=config.page_size, **names)
        upper = None if config.upper is None else ops.page_stats(k, page_size=config.upper.page_size, **names)
        new = [
            torch.randn(shape.batch, shape.kv_heads, 1, shape.head_dim, dtype=shape.dtype, device=device) for _ in "kv"
        ]
        return {
            "q": torch.randn(shape.batch, shape.heads, 1, shape.head_dim, dtype=shape.dtype, device=device),
            "k": k, "v": v, "stats": stats, "upper": upper, "new": new, "lens": lens,
            "counters": torch.zeros(shape.batch * shape.kv_heads * ops.ROW_COUNTERS, dtype=torch.int32, device=device),
        }  # fmt: skip

    def step(self, x: dict):
        """Append one token's keys and values, score, select, attend."""
        return ops.unique_decode(
            x["q"], x["k"], x["v"], x["stats"], config=self.config, seq_lens=x["lens"], counters=x["counters"],
            dense_below=self.dense_below, new=tuple(x["new"]), super_stats=x["upper"],
        )  # fmt: skip

    def score(self, x: dict):
        """The score pass alone; with super-pages that of these."""
        c = self.level
        return ops.page_scores(
            x["q"], x["stats"] if x["upper"] is None else x["upper"], page_size=c.page_size, score=c.score,
            group_reduce=c.group_reduce, stats_dtype=c.stats_dtype, seq_lens=x["lens"],
        )  # fmt: skip

    def parts(self) -> dict[str, float]:
        """Microseconds of each part, alone: the first level, and attention to as many tokens as are kept."""
        pages = self.config
        for x in self.inputs:
            x["scores"] = self.score(x)
            if x["upper"] is None:
                x["ids"] = self.select(x)
            else:
                _, x["ids"] = ops.unique_decode(
                    x["q"], x["k"], x["v"], x["stats"], config=pages, seq_lens=x["lens"], super_stats=x["upper"],
                    return_page_ids=True,
                )  # fmt: skip
        calls = {
            "score_us": lambda x: self.score(x),
            "select_us": lambda x: self.select(x),
            "attend_us": lambda x: ops.sparse_decode(
                x["q"], x["k"], x["v"], x["ids"], page_size=pages.page_size, seq_lens=x["lens"]
            ),
        }
        return {
            name: time_us([lambda x=x, call=call: call(x) for x in self.inputs])[0] for name, call in calls.items()
        }

    def select(self, x: dict):
        """The selection alone; with super-pages that of these."""
        c = self.level
        return ops.select_pages(
            x["scores"], num_kept=c.num_kept, sink_pages=c.sink_pages, recent_pages=c.recent_pages,
            page_size=c.page_size, seq_lens=x["lens"],
        )  # fmt: skip


def quality_of(config: UniqueConfig, rows: list[dict]) -> dict:
    """Recall and needle accuracy of these settings, `None` where they were not measured."""
    for row in rows:
        if all(row.get(key) == getattr(config, key) for key in KEYS):
            return {"recall": row["recall"], "needle_accuracy": row["accuracy"]}
    return {"recall": None, "needle_accuracy": None}


def measure(
    shape: Shape, configs: list[UniqueConfig], device: str, quality: list[dict], dense_below: int
) -> list[dict]:
    """One row per setting, with the dense baselines of the same run."""
    dense = time_dense(shape, device)
    append_us = time_append(shape, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    rows = []
    for config in configs:
        rows.append(measure_setting(shape, config, device, quality, dense_below, dense, append_us))
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def measure_setting(
    shape: Shape, config: UniqueConfig, device: str, quality, dense_below: int, dense: dict, append_us: float
) -> dict:
    """The row of one setting."""
    best = min(dense, key=dense.__getitem__)
    decode = Decode(shape, config, device, dense_below)
    us, spread = time_us([lambda x=x: decode.step(x) for x in decode.inputs])
    row = {
        "batch": shape.batch, "context": shape.context, "heads": shape.heads, "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "dtype": str(shape.dtype).removeprefix("torch."),
        **{key: getattr(config, key) for key in KEYS}, "dense_below": decode.dense_below,
        "us": round(us, 2), "us_spread": round(spread, 2),
        "dense_us": round(dense[best], 2), "dense": best, "speedup": round(dense[best] / us, 3),
        "baselines_us": {name: round(value, 2) for name, value in dense.items()},
        "append_us": round(append_us, 2),
        "floor_us": round(floor_us(shape, config), 2),
        "parts_us": {name: round(value, 2) for name, value in decode.parts().items()},
        **quality_of(config, quality),
    }  # fmt: skip
    print(
        f"B{shape.batch:>3} x {shape.context:>7} H{shape.heads}/{shape.kv_heads} D{shape.head_dim} "
        f"page {config.page_size:>2} {config.stats_dtype:>4} budget {config.budget:>4} "
        f"super {config.super_page_size or '-':>3} {config.super_budget or '-':>5}: {us:7.1f} us "
        f"(floor {row['floor_us']:6.1f}) {row['speedup']:6.2f}x of {best} {dense[best]:7.1f} parts {row['parts_us']}",
        flush=True,
    )
    return row


def settings(*forms, budget: int = 512) -> list[UniqueConfig]:
    """Settings from `(page_size, stats_dtype)` or `(page_size, stats_dtype, super_page_size, super_budget)`."""
    names = ("page_size", "stats_dtype", "super_page_size", "super_budget")
    return [UniqueConfig(**dict(zip(names, form)), budget=budget) for form in forms]


def plan(which: str) -> list[tuple[Shape, list[UniqueConfig]]]:
    """The cases of a run: `main` for the targets, `full` with other shapes, `smoke` for any machine."""
    if which == "smoke":
        tiny = Shape(2, 256, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32)
        return [(tiny, settings((4, "int4"), (8, "fp8"), (4, "int4", 16, 128), budget=64))]
    levers = [(8, "bf16"), (8, "int8"), (8, "int4"), (4, "int8"), (4, "int4"), (16, "fp8"), (16, "int8"), (16, "int4")]
    many = [(8, "int4"), (4, "int4"), (16, "fp8"), (16, "int8")]
    single = [(4, "int4"), (16, "bf16"), (16, "int8"), (16, "int4")]
    # page size, super-page size and tokens of the first level, in int4
    several = ((4, 16, 2048), (4, 16, 4096), (4, 32, 2048), (4, 32, 3072), (4, 32, 4096), (8, 32, 2048), (8, 64, 4096))
    two = {
        (80, 32768): several,
        (16, 131072): several,
        (1, 131072): ((4, 32, 4096), (8, 32, 2048), (8, 64, 4096)),
        (1, 32768): ((4, 32, 4096), (8, 32, 2048)),
        (1, 1048576): ((4, 64, 4096), (8, 64, 4096), (8, 128, 4096), (16, 128, 8192)),
    }
    one = {
        (80, 32768): levers,
        (16, 131072): many,
        (1, 131072): single,
        (1, 32768): single,
        (1, 1048576): [(16, "int4"), (32, "int4")],
    }
    cases = [
        (Shape(*case), settings(*forms, *((p, "int4", size, tokens) for p, size, tokens in two[case])))
        for case, forms in one.items()
    ]
    for batch in (1, 8):
        cases += [(Shape(batch, n), settings((4, "int4"))) for n in (256, 1024, 2048, 4096, 8192)]
    if which == "full":
        cases += [(Shape(16, 32768, head_dim=d), settings((4, "int4"), (8, "int8"))) for d in (64, 256)]
        cases += [(Shape(16, 32768, heads=8 * g), settings((4, "int4"))) for g in (1, 7, 8, 16)]
        cases += [(Shape(16, 32768), settings((4, "int4"), budget=b)) for b in (1024, 2048, 4096)]
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny case, on any device")
    parser.add_argument("--which", choices=("main", "full"), default="full")
    parser.add_argument("--quality", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--dense-below", type=int, default=65536, help="dense up to so many tokens of all rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode_h200.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no CUDA device: run on a GPU, or with --smoke")
    quality = json.loads(args.quality.read_text())["rows"] if args.quality.exists() else []
    rows = []
    for shape, configs in plan("smoke" if args.smoke else args.which):
        rows += measure(shape, configs, device, quality, args.dense_below)
        if not args.smoke:
            write_results(args.out, rows, read_rate=READ_RATE)


if __name__ == "__main__":
    main()
