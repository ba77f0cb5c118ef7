"""Models with random weights, synthetic caches and clocks for the generate benchmark. May import unique_hf."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from unique_attention import ops
from unique_hf import UniqueConfig, capture, deferred, graphs
from unique_hf.fused import fused

# hidden, intermediate, layers, heads, kv heads, head dim, vocabulary
MODELS = {
    "8B": (4096, 12288, 36, 32, 8, 128, 151936),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936),
    "smoke": (64, 96, 2, 4, 2, 32, 99),
}
SPARE = 256


class Clock(BaseStreamer):
    """Notes when each token is on the host, and the most memory that was in use until then."""

    def __init__(self):
        self.times: list[float] = []
        self.peaks: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.peaks.append(peak())

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
    """A cache of `context` random tokens with statistics; the keys and values of `old` are used again.

    Keys and values of a layer share a block, as in a captured step, which therefore moves nothing.
    """
    cache = DynamicCache(config=model.config)
    capacity = math.ceil((context + SPARE) / 64) * 64
    c, parameter = model.config, next(model.parameters())
    shape = (batch, c.num_key_value_heads, capacity, c.head_dim)
    for index, layer in enumerate(cache.layers):
        if old is None:
            keys, values = torch.empty((2, *shape), dtype=parameter.dtype, device=parameter.device).normal_()
        else:
            keys, values = old.layers[index].buffers()
            old.layers[index] = None
        stats: list[torch.Tensor | None] = []
        for level in (settings, settings.upper):
            if level is not None:
                named = {"page_size": level.page_size, "score": level.score, "stats_dtype": level.stats_dtype}
                stats += ops.page_stats(keys, **named)
        layer.move_to(keys, values, *stats, settings=settings)
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


def generate(model: Any, ids: torch.Tensor, tokens: int, **kwargs: Any) -> Clock:
    """Times of the tokens of one greedy call; the first entry is the prompt's."""
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        streamer=clock, **kwargs,
    )  # fmt: skip
    sync()
    return clock


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
def dense_ms(
    model: Any, cache: DynamicCache, context: int, fuse: bool = False, defer: bool = False
) -> tuple[float, dict[str, int]]:
    """One dense step of the same model on the first `context` slots of the same cache, and its launches that waited.

    `fuse` runs norms and rotations as the sparse step does, `defer`, where there is a GPU, linear layers too.
    """
    model.set_attn_implementation("sdpa")
    pinned = DynamicCache()
    pinned.layers = [Pinned(*(b[:, :, :context] for b in layer.buffers())) for layer in cache.layers]
    batch, device = cache.layers[0].keys.shape[0], model.device
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    position_ids = torch.full((batch, 1), context - 1, device=device)

    mode = deferred.Deferred(deferred.kernel()) if defer and device.type == "cuda" else None

    def step():
        # without a mask, sdpa reads grouped heads as they are instead of repeating them
        mask = {"full_attention": None}
        inputs = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": pinned}
        with contextlib.nullcontext() if mode is None else mode:
            return model(ids, **inputs, logits_to_keep=1).logits

    try:
        with fused(model, mode) if fuse else contextlib.nullcontext():
            if device.type != "cuda":
                return replays(step, 3), {}
            recorder = graphs.CudaGraph(device)
            recorder.warm(step)
            if mode is not None:
                mode.counts.clear()
            replay = recorder.capture(step)
        return replays(replay), {} if mode is None else dict(mode.counts)
    finally:
        model.set_attn_implementation("unique")
