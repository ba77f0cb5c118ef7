"""Plain `generate`, end to end: captured sparse decoding against dense decoding in the same harness.

`python -m benchmarks.generate` on a CUDA device writes `benchmarks/results/generate_h200.json` after every row, most
important rows first, and stops starting rows after `--seconds`. `--smoke` runs a tiny case anywhere.

Models have the shapes of Qwen3 and random weights. `ms` is the time of one step of `model.generate`, its Python loop
included; `replay_ms` that of the graph alone; `dense_ms` that of the same model with attn_implementation="sdpa", its
step captured on a cache of that length (graph alone). Rows of "decode" start from a synthetic prefix, random keys and
values; rows of "prompt" read a real prompt. vLLM figures are stored ones of the same kind of GPU, not of this run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

import unique_hf
from benchmarks.environment import RESULTS, write_results
from unique_attention import ops
from unique_hf import UniqueConfig, capture, graphs

# hidden, intermediate, layers, heads, kv heads, head dim, vocabulary
MODELS = {
    "8B": (4096, 12288, 36, 32, 8, 128, 151936),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936),
    "smoke": (64, 96, 2, 4, 2, 32, 99),
}
# vLLM 0.24.0 (FlashAttention 3, CUDA graphs, torch.compile), dense, ms per step, measured once on an H200
STORED = {
    ("8B", 1, 32768): 6.32, ("8B", 16, 32768): 23.1, ("8B", 1, 131072): 9.80, ("8B", 6, 131072): 41.7,
    ("0.6B", 1, 32768): 2.58, ("0.6B", 1, 131072): 5.22, ("0.6B", 8, 131072): 29.1, ("0.6B", 32, 32768): 29.0,
}  # fmt: skip
SETTINGS = {"default": UniqueConfig(), "page 16, int8, budget 512": UniqueConfig(16, 512, stats_dtype="int8")}
STEPS = 128
SPARE = 256


class Clock(BaseStreamer):
    """Notes when each token is on the host."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Pinned(DynamicLayer):
    """A layer of one length, as a captured dense step needs it: every token goes to the last slot."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


def build(name: str, device: str) -> Any:
    """A model with random weights, made on the device."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = MODELS[name]
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocabulary, max_position_embeddings=1 << 19,
        rope_theta=1e6, tie_word_embeddings=name == "0.6B",
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="unique", dtype=dtype).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def weight_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def kv_bytes(model: Any, batch: int, tokens: int) -> int:
    c = model.config
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * next(model.parameters()).element_size()
    return batch * tokens * per_token


def prefix(model: Any, batch: int, context: int, settings: UniqueConfig, old: DynamicCache | None) -> DynamicCache:
    """A cache of `context` random tokens with statistics; the keys and values of `old` are used again."""
    cache = DynamicCache(config=model.config)
    capacity = math.ceil((context + SPARE) / 64) * 64
    c, parameter = model.config, next(model.parameters())
    shape = (batch, c.num_key_value_heads, capacity, c.head_dim)
    for index, layer in enumerate(cache.layers):
        if old is None:
            keys, values = (torch.empty(shape, dtype=parameter.dtype, device=parameter.device).normal_() for _ in "kv")
        else:
            keys, values = old.layers[index].buffers()
            old.layers[index] = None
        named = {"page_size": settings.page_size, "score": settings.score, "stats_dtype": settings.stats_dtype}
        layer.move_to(keys, values, *ops.page_stats(keys, **named), settings=settings)
        layer.leave_fixed(context)
    return cache


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak(reset: bool = False) -> int:
    if not torch.cuda.is_available():
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def generate(model: Any, ids: torch.Tensor, tokens: int, **kwargs: Any) -> list[float]:
    """Times of the tokens of one greedy call; the first entry is the prompt's."""
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        streamer=clock, **kwargs,
    )  # fmt: skip
    sync()
    return clock.times


def replays(replay: Any, repeats: int = 20) -> float:
    """Milliseconds of one replay."""
    replay()
    sync()
    begin = time.perf_counter()
    for _ in range(repeats):
        replay()
    sync()
    return (time.perf_counter() - begin) / repeats * 1e3


def replay_ms(model: Any, context: int) -> float | None:
    """The graph of the last call alone, on the buffers that it was captured on."""
    step = next(iter(capture._STEPS.get(model, [])), None)
    if step is None or step.replay is None:
        return None
    step.seq_lens.fill_(context)
    return replays(step.replay)


@torch.no_grad()
def dense_ms(model: Any, cache: DynamicCache, context: int) -> float:
    """One dense step of the same model on the first `context` slots of the same cache."""
    model.set_attn_implementation("sdpa")
    pinned = DynamicCache()
    pinned.layers = [Pinned(*(b[:, :, :context] for b in layer.buffers())) for layer in cache.layers]
    batch, device = cache.layers[0].keys.shape[0], model.device
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    position_ids = torch.full((batch, 1), context - 1, device=device)

    def step():
        return model(ids, position_ids=position_ids, past_key_values=pinned, logits_to_keep=1).logits

    try:
        if device.type != "cuda":
            return replays(step, 3)
        recorder = graphs.CudaGraph(device)
        recorder.warm(step)
        return replays(recorder.capture(step))
    finally:
        model.set_attn_implementation("unique")


def decode_rows(name: str, model: Any, batch: int, context: int, names: list[str]) -> list[dict]:
    """Sparse decoding from a synthetic prefix under some settings, and dense decoding of the same cache."""
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), device=model.device)
    rows, cache, dense = [], None, None
    for setting in names:
        settings = SETTINGS[setting]
        unique_hf.configure(model, **{k: v for k, v in settings.to_dict().items() if k != "format_version"})
        cache = prefix(model, batch, context, settings, cache)
        peak(reset=True)
        unique_hf.report(model, reset=True)
        times = generate(model, ids, STEPS, past_key_values=cache)[1:]
        most, tally = peak(), unique_hf.report(model).capture
        steps = [1e3 * (b - a) for a, b in zip(times, times[1:])]
        bare = weight_bytes(model) + kv_bytes(model, batch, context + STEPS)
        graph = replay_ms(model, context)
        cache.crop(context - cache.get_seq_length())
        if dense is None:
            dense = dense_ms(model, cache, context)
        ms, stored = statistics.mean(steps[4:]), STORED.get((name, batch, context))
        rows.append({
            "kind": "decode", "model": name, "batch": batch, "context": context, "prefill": "synthetic",
            "settings": setting, "ms": round(ms, 3), "ms_median": round(statistics.median(steps[4:]), 3),
            "replay_ms": graph and round(graph, 3), "dense_ms": round(dense, 3), "x_dense": round(dense / ms, 2),
            "x_dense_replay": graph and round(dense / graph, 2), "vllm_dense_ms_stored": stored,
            "x_vllm_stored": stored and round(stored / ms, 2), "first_steps_ms": [round(x, 1) for x in steps[:3]],
            "peak_over_weights_and_kv": round(most / bare - 1, 4) if most else None,
            "captured_steps": tally.steps, "eager_because": dict(tally.eager),
        })  # fmt: skip
    return rows


def first_token_rows(name: str, model: Any, batch: int, context: int) -> list[dict]:
    """From the end of the prompt to the first and the second decoded token: a first call, and later ones."""
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    before, rows = None, []
    for call in (1, 2, 3):
        unique_hf.report(model, reset=True)
        peak(reset=True)
        times = generate(model, ids, 24)[1:]
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
    times = generate(model, ids, 16, prefill_chunk_size=chunk)
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
    both = list(SETTINGS)
    eight = [
        functools.partial(first_token_rows, batch=1, context=8192),
        *(functools.partial(decode_rows, batch=b, context=n, names=both)
          for b, n in ((6, 131072), (1, 131072), (16, 32768), (1, 32768))),
        functools.partial(prefill_rows, context=32768),
    ]  # fmt: skip
    small = [
        *(functools.partial(decode_rows, batch=b, context=n, names=both)
          for b, n in ((8, 131072), (1, 32768), (1, 2048), (1, 131072), (32, 32768))),
        functools.partial(prefill_rows, context=32768),
    ]  # fmt: skip
    long = [functools.partial(prompt_rows, context=262144, chunk=32768)]
    return [("8B", job) for job in eight] + [("0.6B", job) for job in small] + [("8B", job) for job in long]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny case, on any device")
    parser.add_argument("--only", nargs="*", default=None, help="kinds of rows (decode, prefill, ...) or models")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no row after this time")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate_h200.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no CUDA device: run on a GPU, or with --smoke")
    begin, rows, built, model = time.perf_counter(), [], None, None
    for name, job in plan(args.smoke):
        kind = job.func.__name__.removesuffix("_rows").replace("_", " ")
        if args.only and not {kind, name} & set(args.only):
            continue
        if time.perf_counter() - begin > args.seconds:
            rows.append({"kind": kind, "model": name, **job.keywords, "skipped": f"after {args.seconds:.0f} s"})
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
            row["at_s"] = round(time.perf_counter() - begin, 1)
            print(row, flush=True)
        rows += found
        if not args.smoke:
            write_results(args.out, rows)


if __name__ == "__main__":
    main()
