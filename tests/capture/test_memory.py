"""What a long prompt takes beside weights, keys and values: counted from torch's own allocations."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import unique_hf
from tests.capture.recorder import recording_on_cpu
from tests.integration.tiny import make
from unique_attention.hf import attention, pages
from unique_attention.hf.dense import dense_attention
from unique_hf import arena, capture
from unique_hf.arena import Arena, in_blocks

LAYERS, PROMPT, CHUNK, TOKENS = 8, 2048, 128, 2


def peak_bytes(run):
    """The most memory that `run()` has at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        run()
    events = [event for event in traced.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_the_counter_counts():
    def run():
        a = torch.empty(1 << 20)
        b = a + 1
        del a
        return torch.cat([b, b]).sum()

    assert 12 << 20 <= peak_bytes(run) < (12 << 20) + 4096


def long_call(model, ids):
    """The most memory of a call whose prompt is read in chunks, its tokens, and its cache."""
    with recording_on_cpu(), pytest.MonkeyPatch.context() as patch:
        # blocks that the counter sees
        patch.setattr(Arena, "_block", lambda arena, size: torch.empty(size, dtype=torch.uint8))
        # as layers of a long prompt are: a block each
        for name, size in (("BLOCK_BYTES", 1 << 16), ("LEAST_BYTES", 0), ("SEGMENT_BYTES", 512)):
            patch.setattr(arena, name, size)
        for module in (capture, pages):
            patch.setattr(module, "MIN_SPARE", 64)
        # what exact attention takes on a CPU says nothing about a GPU
        patch.setattr(attention, "dense_attention", lambda module, query, *args, **more: query.transpose(1, 2))
        cache = DynamicCache(config=model.config)
        found = []

        def run():
            found.append(model.generate(
                ids, past_key_values=cache, max_new_tokens=TOKENS, do_sample=False, prefill_chunk_size=CHUNK
            ).tolist())  # fmt: skip

        return peak_bytes(run), found[0], cache


@pytest.mark.parametrize("settings", [{}, {"super_page_size": 16, "super_budget": 256}])
def test_a_cache_gets_its_room_once_and_takes_little_more_than_its_tokens(settings, monkeypatch):
    model = make(num_hidden_layers=LAYERS, max_position_embeddings=1 << 14)
    unique_hf.configure(model, page_size=4, budget=64, **settings)
    ids = torch.randint(3, 90, (1, PROMPT))
    bare = LAYERS * 2 * 2 * 32 * 4 * (PROMPT + TOKENS)
    with torch.no_grad():
        chunk = peak_bytes(lambda: model(ids[:, :CHUNK], use_cache=False, logits_to_keep=1))
    most, tokens, cache = long_call(model, ids)
    (step,) = capture._STEPS[model]
    assert in_blocks(cache.layers) and step.arena.capacity == cache.layers[0].buffers()[0].shape[2]
    # int4 statistics of four tokens, 20 bytes beside 1024, and 64 slots at most beyond the end
    assert bare < step.arena.bytes < 1.06 * bare
    assert most < step.arena.bytes + chunk + bare / LAYERS / 2, "nothing is there twice, not even one layer"
    capture.release(model)
    monkeypatch.setattr(capture.Call, "_make_room", lambda *args: None)
    grown, expected, _ = long_call(model, ids)
    assert tokens == expected
    assert grown > most + bare / LAYERS / 2, "a cache that grows is copied layer by layer"


def test_attention_of_a_chunk_does_not_repeat_the_cache_for_each_query_head():
    query, keys = torch.randn(1, 16, 2, 64), torch.randn(2, 1, 2, 1 << 14, 64)
    marker = torch.empty(1, 1, 0, 0, dtype=torch.bool)

    def run():
        return dense_attention(torch.nn.Module(), query, *keys, marker, causal=True)

    assert peak_bytes(run) < 0.25 * keys.numel() * 4
