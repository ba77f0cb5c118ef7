"""Plain `generate`, end to end: captured sparse decoding against dense decoding in the same harness.

`python -m benchmarks.generate` on a CUDA device writes `benchmarks/results/generate_h200.json` after every row, most
important rows first, and stops starting rows after `--seconds`. `--rows '8B/*'` runs those whose name matches, so that
several devices can share the work (`--out`, then `--merge`); `--profile` prints what one replayed step launches;
`--smoke` runs a tiny case anywhere.

Models have the shapes of Qwen3 and random weights. `ms` is the time of one step of `model.generate`, its Python loop
included; `replay_ms` that of the graph alone; `dense_ms` that of the same model with attn_implementation="sdpa", its
step captured on a cache of that length (graph alone), and with the same norms, rotations and linear layers fused as in
the row (`dense_fused_launches`; where nothing was deferred in any row, `plain_because` says why, and norms and
rotations alone are fused); `dense_plain_ms` that of the step as Transformers launches it. `x_dense_replay` compares
graph with graph, `x_dense` the whole step of `generate` with the dense graph. Rows of "decode" start from a synthetic
prefix, random keys and values, since a step takes as long whatever filled its cache; rows of "prompt" read a real
prompt. vLLM figures are stored ones of the same kind of GPU, not of this run; needle accuracies are those of these
settings in `quality.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import unique_hf
from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.harness import build, dense_ms, free, generate, kv_bytes, peak, prefix, replay_ms, sync, weight_bytes
from unique_hf import UniqueConfig, capture, deferred

# vLLM 0.24.0 (FlashAttention 3, CUDA graphs, torch.compile), dense, ms per step, measured once on an H200
STORED = {
    ("8B", 1, 32768): 6.32, ("8B", 16, 32768): 23.1, ("8B", 1, 131072): 9.80, ("8B", 6, 131072): 41.7,
    ("0.6B", 1, 32768): 2.58, ("0.6B", 1, 131072): 5.22, ("0.6B", 8, 131072): 29.1, ("0.6B", 32, 32768): 29.0,
}  # fmt: skip
SETTINGS = {
    "default": UniqueConfig(),
    "budget 512": UniqueConfig(budget=512),
    "two levels": UniqueConfig(budget=512, super_page_size=16, super_budget=4096),
    "super-pages of 32": UniqueConfig(budget=512, super_page_size=32, super_budget=4096),
    "page 8": UniqueConfig(page_size=8, budget=512, super_page_size=32, super_budget=2048),
    "page 16": UniqueConfig(page_size=16, budget=512),
    "dense below 8,192": UniqueConfig(budget=512, dense_below=8192),
}
SHOWN = ("page_size", "stats_dtype", "budget", "super_page_size", "super_budget")
STEPS = 128


def accuracy_of(settings: UniqueConfig) -> float | None:
    """Needle accuracy of these settings as stored by `benchmarks.quality`, or `None`."""
    names = (*SHOWN, "score", "group_reduce")
    for row in json.loads((RESULTS / "quality.json").read_text())["rows"]:
        if all(row.get(name) == getattr(settings, name) for name in names):
            return row["accuracy"]
    return None


def set_up(model: Any, setting: str) -> UniqueConfig:
    settings = SETTINGS[setting]
    unique_hf.configure(model, **{k: v for k, v in settings.to_dict().items() if k != "format_version"})
    unique_hf.report(model, reset=True)
    return settings


def decode_row(name: str, model: Any, cache: DynamicCache, context: int, setting: str) -> dict:
    """Sparse decoding from a synthetic prefix under one setting."""
    batch = cache.layers[0].keys.shape[0]
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), device=model.device)
    bare = weight_bytes(model) + kv_bytes(model, batch, context + STEPS)
    begin = peak(reset=True)
    clock = generate(model, ids, STEPS, past_key_values=cache)
    times, tally = clock.times[1:], unique_hf.report(model).capture
    steps = [1e3 * (b - a) for a, b in zip(times, times[1:])]
    ms, stored = statistics.mean(steps[4:]), STORED.get((name, batch, context))
    graph, step = replay_ms(model, context), next(iter(capture._STEPS.get(model, [])), None)
    cache.crop(context - cache.get_seq_length())
    over = [round((most - bare) / 2**20) for most in (begin, *clock.peaks[1:4], peak())]
    return {
        "kind": "decode", "model": name, "batch": batch, "context": context, "prefill": "synthetic",
        "settings": setting, **{k: getattr(SETTINGS[setting], k) for k in SHOWN},
        "needle_accuracy_stored": accuracy_of(SETTINGS[setting]), "ms": round(ms, 3),
        "ms_median": round(statistics.median(steps[4:]), 3), "replay_ms": graph and round(graph, 3),
        "vllm_dense_ms_stored": stored, "x_vllm_stored": stored and round(stored / ms, 2),
        "x_vllm_stored_replay": stored and graph and round(stored / graph, 2),
        "first_steps_ms": [round(x, 1) for x in steps[:3]],
        "peak_over_weights_and_kv": round(peak() / bare - 1, 4) if peak() else None,
        # before the call, after the prompt, the eager step, the recording, and in all
        "peaks_over_weights_and_kv_mib": over if peak() else None,
        "fused_launches": dict(step.launches) if step is not None else None,
        "plain_because": None if step is None else step.plain_because,
        "captured_steps": tally.steps, "begun_ahead": tally.early, "in_vain": tally.vain,
        "eager_because": dict(tally.eager),
    }  # fmt: skip


def decode_rows(name: str, model: Any, batch: int, context: int, names: list[str]) -> list[dict]:
    """Sparse decoding from a synthetic prefix under some settings, and dense decoding of the same cache."""
    rows, cache = [], None
    for setting in names:
        cache = prefix(model, batch, context, set_up(model, setting), cache)
        rows.append(decode_row(name, model, cache, context, setting))
        capture.release(model)
    dense: Any = None
    plain: Any = None
    launches: dict[str, int] = {}
    with contextlib.suppress(torch.OutOfMemoryError):
        plain, _ = dense_ms(model, cache, context)
        # a dense baseline without what speeds up the sparse step would flatter it
        dense, launches = dense_ms(model, cache, context, fuse=True, defer=any(row["fused_launches"] for row in rows))
    for row in rows:
        row["dense_ms"], row["dense_plain_ms"] = dense and round(dense, 3), plain and round(plain, 3)
        row["dense_fused_launches"] = launches
        for ratio, ms in (("x_dense", row["ms"]), ("x_dense_replay", row["replay_ms"])):
            row[ratio] = dense and ms and round(dense / ms, 2)
    return rows


def profile(name: str, model: Any, batch: int, context: int, names: list[str]) -> list[dict]:
    """What one replayed step launches, by name, longest first; and the time between replays."""
    found = []
    for setting in names:
        cache = prefix(model, batch, context, set_up(model, setting), None)
        row = decode_row(name, model, cache, context, setting)
        step = capture._STEPS[model][0]
        step.seq_lens.fill_(context)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
            step.replay()
            sync()
        kernels = sorted(traced.key_averages(), key=lambda entry: -entry.self_device_time_total)
        print(f"{name} {batch}x{context} {setting}: step {row['ms']} ms, replay {row['replay_ms']} ms")
        print(f"  {sum(k.count for k in kernels)} launches, {sum(k.self_device_time_total for k in kernels):.0f} us")
        for entry in kernels[:25]:
            each = entry.self_device_time_total / entry.count
            print(f"  {entry.self_device_time_total:9.1f} us {entry.count:5d} x {each:7.2f} us  {entry.key[:90]}")
        found.append(row)
        del cache
        capture.release(model)
        free()
    return found


def first_token_rows(name: str, model: Any, batch: int, context: int) -> list[dict]:
    """From the end of the prompt to the first and the second decoded token: a first call, and later ones."""
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    before, rows = None, []
    for call in (1, 2, 3):
        unique_hf.report(model, reset=True)
        peak(reset=True)
        times = generate(model, ids, 24).times[1:]
        steps = [round(1e3 * (b - a), 2) for a, b in zip(times, times[1:])]
        held = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        rows.append({
            "kind": "first token", "model": name, "batch": batch, "context": context, "call": call,
            "first_step_ms": steps[0], "second_step_ms": steps[1], "later_ms": steps[-1],
            "captures": unique_hf.report(model).capture.captures,
            "held_after_mib": None if before is None else round((held - before) / 2**20, 1),
            "held_over_weights_mib": round((held - weight_bytes(model)) / 2**20, 1),
        })  # fmt: skip
        before = held
    return rows


@torch.no_grad()
def prefill_rows(name: str, model: Any, context: int) -> list[dict]:
    """The prompt alone: statistics included, against sdpa, alternating."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=model.device)
    seconds: dict[str, list[float]] = {"unique": [], "sdpa": []}
    for _ in range(3):
        for attention, found in seconds.items():
            model.set_attn_implementation(attention)
            cache = DynamicCache(config=model.config)
            sync()
            begin = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            sync()
            found.append(time.perf_counter() - begin)
            del cache
    model.set_attn_implementation("unique")
    unique, sdpa = (min(found[1:]) for found in seconds.values())
    return [{
        "kind": "prefill", "model": name, "batch": 1, "context": context, "unique_s": round(unique, 4),
        "sdpa_s": round(sdpa, 4), "over_sdpa": round(unique / sdpa - 1, 4),
    }]  # fmt: skip


def prompt_rows(name: str, model: Any, context: int, chunk: int) -> list[dict]:
    """A real prompt, read in chunks, and 16 tokens after it."""
    ids = torch.randint(0, model.config.vocab_size, (1, context), device=model.device)
    peak(reset=True)
    begin = time.perf_counter()
    times = generate(model, ids, 16, prefill_chunk_size=chunk).times
    bare = weight_bytes(model) + kv_bytes(model, 1, context + 16)
    return [{
        "kind": "prompt", "model": name, "batch": 1, "context": context, "chunk": chunk,
        "prompt_s": round(times[1] - begin, 2), "ms": round(1e3 * (times[-1] - times[-6]) / 5, 3),
        "peak_over_weights_and_kv": round(peak() / bare - 1, 4),
    }]  # fmt: skip


def plan(smoke: bool) -> list[tuple[str, Any]]:
    """Rows in the order of their importance, by model, so that each is built once."""
    if smoke:
        jobs = [
            functools.partial(first_token_rows, batch=2, context=48),
            functools.partial(decode_rows, batch=2, context=1024, names=list(SETTINGS)),
            functools.partial(prefill_rows, context=96),
            functools.partial(prompt_rows, context=96, chunk=32),
        ]
        return [("smoke", job) for job in jobs]
    # a threshold matters to short contexts only
    names = [name for name, settings in SETTINGS.items() if not settings.dense_below]
    decode, first = functools.partial(decode_rows, names=names), first_token_rows
    return [
        ("8B", functools.partial(decode, batch=1, context=131072)),
        ("8B", functools.partial(decode, batch=6, context=131072)),
        ("8B", functools.partial(decode, batch=16, context=32768)),
        ("8B", functools.partial(first, batch=1, context=8192)),
        ("8B", functools.partial(prefill_rows, context=32768)),
        ("8B", functools.partial(decode, batch=1, context=32768)),
        ("8B", functools.partial(prompt_rows, context=262144, chunk=16384)),
        ("0.6B", functools.partial(decode, batch=8, context=131072)),
        ("0.6B", functools.partial(decode, batch=1, context=32768)),
        ("0.6B", functools.partial(decode, batch=1, context=2048, names=list(SETTINGS))),
        ("0.6B", functools.partial(first, batch=1, context=8192)),
        ("0.6B", functools.partial(prefill_rows, context=32768)),
        ("0.6B", functools.partial(decode, batch=1, context=131072)),
        ("0.6B", functools.partial(decode, batch=32, context=32768)),
    ]


def label(name: str, job: Any) -> str:
    """Name of a row for `--rows`: model, kind, batch x context."""
    kind = job.func.__name__.removesuffix("_rows")
    return f"{name}/{kind}/{job.keywords.get('batch', 1)}x{job.keywords['context']}"


def merge(paths: list[Path], out: Path) -> None:
    """Put the rows of several files into one; all must be of one revision."""
    found = [json.loads(path.read_text()) for path in paths]
    if len({x["environment"]["revision"] for x in found}) > 1:
        raise SystemExit("expected results of one revision, got " + str([x["environment"]["revision"] for x in found]))
    out.write_text(json.dumps({**found[0], "rows": [row for x in found for row in x["rows"]]}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny case, on any device")
    parser.add_argument("--rows", nargs="*", default=["*"], help="names of rows, as in '8B/decode/1x131072', '0.6B/*'")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    parser.add_argument("--profile", action="store_true", help="print what a replayed step launches, store nothing")
    parser.add_argument("--plain", action="store_true", help="record linear layers one by one, for comparison")
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="files to put together into --out")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no row after this time")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate_h200.json")
    args = parser.parse_args()
    if args.merge:
        return merge(args.merge, args.out)
    if args.plain:
        deferred.kernel = lambda: None
    jobs = plan(args.smoke)
    if args.list:
        return print("\n".join(label(name, job) for name, job in jobs))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no CUDA device: run on a GPU, or with --smoke")
    # beside each row, since rows of another revision may be kept in one file with these
    revision = environment()["revision"]
    begin, rows, built, model = time.perf_counter(), [], None, None
    for name, job in jobs:
        kind = job.func.__name__.removesuffix("_rows").replace("_", " ")
        if not any(fnmatch.fnmatch(label(name, job), pattern) for pattern in args.rows):
            continue
        if args.profile:
            if kind != "decode":
                continue
            job = functools.partial(profile, **job.keywords)
        if time.perf_counter() - begin > args.seconds:
            late = {"revision": revision, "skipped": f"after {args.seconds:.0f} s"}
            rows.append({"kind": kind, "model": name, **job.keywords, **late})
            continue
        if name != built:
            model = None
            free()
            built, model = name, build(name, device)
        try:
            found = job(name, model)
        except torch.OutOfMemoryError as error:
            found = [{"kind": kind, "model": name, **job.keywords, "failed": str(error).split(". ")[0]}]
        capture.release(model)
        free()
        for row in found:
            row |= {"revision": revision, "at_s": round(time.perf_counter() - begin, 1)}
            print(row, flush=True)
        rows += found
        if not (args.smoke or args.profile):
            write_results(args.out, rows)


if __name__ == "__main__":
    main()
