"""Everything `generate` does, token for token: against sdpa with all pages kept, against brute force when not."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import unique_hf
from tests.integration import brute
from tests.integration.tiny import batch, greedy, make
from unique_attention.hf.attention import _warn_once
from unique_attention.hf.masks import is_lower_right, unique_mask

SPARSE = {"page_size": 4, "budget": 16, "stats_dtype": "fp32"}
PADDED = batch(rows=2, length=40, padding=(13, 0))
PLAIN = batch(rows=2, length=41, padding=(0, 0), seed=2)
SINGLE = batch(rows=1, length=37, padding=(0,), seed=3)
HOLES = batch(rows=2, length=40, padding=(3, 0), seed=4)
for _row, _holes in enumerate((slice(14, 25), slice(6, 8))):
    HOLES["attention_mask"][_row, _holes] = 0


def sample(model, inputs, **kwargs):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=9, do_sample=True, top_k=0, temperature=1.5, **kwargs)


def beams(model, inputs):
    return model.generate(**inputs, max_new_tokens=9, do_sample=False, num_beams=3, num_return_sequences=2)


def assisted(model, inputs):
    """Drafts of a near copy, some accepted, some not, so the cache is cropped; then plain decoding on that cache."""
    assistant = copy.deepcopy(model)
    assistant.set_attn_implementation("sdpa")
    with torch.no_grad():
        noise = torch.randn(assistant.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
        assistant.lm_head.weight.add_(0.08 * noise)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    cache = DynamicCache(config=model.config)
    first = model.generate(
        **inputs, past_key_values=cache, assistant_model=assistant, max_new_tokens=9, do_sample=False
    )
    mask = torch.ones_like(first)
    return model.generate(first, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False)


def stepwise(model, inputs):
    """Prompt in two calls, then one token at a time, all by hand with a kept cache."""
    ids, mask, cache, found = inputs["input_ids"], inputs["attention_mask"], None, []
    with torch.no_grad():
        for part in (slice(0, 30), slice(30, None)):
            out = model(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        for _ in range(8):
            found.append(out.logits[:, -1:].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = model(found[-1], attention_mask=mask, past_key_values=cache)
    return torch.cat(found, dim=1)


def turns(model, inputs):
    """Two turns of a conversation on one cache."""
    cache = DynamicCache(config=model.config)
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    more = torch.cat([first, PLAIN["input_ids"][: len(first), :7]], dim=1)
    grown = more.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    return model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)


def explicit(model, inputs):
    return greedy(model, inputs, past_key_values=unique_hf.UniqueCache(config=model.config))


def captured(model, inputs):
    """What a runner of a captured step does: lengths on the device, shapes and addresses fixed, no mask."""
    padding, found = inputs["attention_mask"].logical_not().sum(-1, keepdim=True), []
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        layers, length = out.past_key_values.layers, inputs["input_ids"].shape[1]
        seq_lens = torch.full((len(padding),), length)
        for layer in layers:
            layer.enter_fixed(seq_lens, capacity=length + 20)
        for _ in range(8):
            found.append(out.logits[:, -1:].argmax(-1))
            seq_lens += 1
            position_ids = seq_lens[:, None] - padding - 1
            out = model(found[-1], position_ids=position_ids, past_key_values=out.past_key_values)
        for layer in layers:
            layer.leave_fixed(length + 8)
        assert out.past_key_values.get_seq_length() == length + 8
    return torch.cat(found, dim=1)


def by_hand_masked(model, inputs):
    mask, found = inputs["attention_mask"], []
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for _ in range(8):
            found.append(out.logits[:, -1:].argmax(-1))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            position_ids = mask.sum(-1, keepdim=True) - 1
            out = model(found[-1], attention_mask=mask, position_ids=position_ids, past_key_values=out.past_key_values)
    return torch.cat(found, dim=1)


class OffloadedCache(DynamicCache):
    """Offloading as `Cache` does it, without the streams that need a GPU."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.layers[layer_idx].prefetch()
        found = super().update(keys, values, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        layer.offload()
        # on the CPU nothing moves; what the GPU would see is that the layer's tensors are others than those returned
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return found


def offloaded(model, inputs):
    return greedy(model, inputs, past_key_values=OffloadedCache(config=model.config))


def copied(model, inputs):
    """One prompt, two continuations from deep copies of its cache, and the original at the end."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    length = inputs["input_ids"].shape[1]
    for first, kept in ((5, copy.deepcopy(cache)), (6, copy.deepcopy(cache)), (5, cache)):
        ids = torch.nn.functional.pad(inputs["input_ids"], (0, 1), value=first)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        out = model.generate(ids, attention_mask=mask, past_key_values=kept, max_new_tokens=7, do_sample=False)
        found.append(out[:, length:])
    assert found[0].tolist() == found[2].tolist() != found[1].tolist()
    return torch.cat(found)


def static(model, inputs):
    return greedy(model, inputs, cache_implementation="static")


def static_by_hand(model, inputs):
    """A static cache without an attention mask: the length is known on the device only."""
    return by_hand_unmasked(model, inputs, StaticCache(config=model.config, max_cache_len=64))


def by_hand_unmasked(model, inputs, cache=None):
    cache, ids, found = cache or DynamicCache(config=model.config), inputs["input_ids"], []
    with torch.no_grad():
        out = model(ids, past_key_values=cache)
        for step in range(8):
            found.append(out.logits[:, -1:].argmax(-1))
            position = torch.full_like(found[-1], ids.shape[1] + step)
            out = model(found[-1], past_key_values=cache, position_ids=position)
    return torch.cat(found, dim=1)


# name -> (what to run, inputs, what brute force runs: it knows growing caches only)
CASES = {
    "greedy": (greedy, PLAIN, None),
    "greedy padded": (greedy, PADDED, None),
    "sampling": (sample, PADDED, None),
    "beams": (beams, PLAIN, None),
    "beams padded": (beams, PADDED, None),
    "assisted": (assisted, SINGLE, None),
    "chunked prefill": (lambda model, inputs: greedy(model, inputs, prefill_chunk_size=9), PLAIN, None),
    "chunked prefill padded": (lambda model, inputs: greedy(model, inputs, prefill_chunk_size=9), PADDED, None),
    "by hand": (stepwise, PLAIN, None),
    "by hand padded": (stepwise, PADDED, None),
    "by hand with holes": (by_hand_masked, HOLES, None),
    "two turns": (turns, PLAIN, None),
    "two turns padded": (turns, PADDED, None),
    "explicit cache": (explicit, PADDED, None),
    "offloaded": (offloaded, PADDED, greedy),
    "deep copies": (copied, PADDED, None),
    "static": (static, PLAIN, greedy),
    "static padded": (static, PADDED, greedy),
    "static by hand": (static_by_hand, PLAIN, by_hand_unmasked),
    "captured": (captured, PLAIN, by_hand_masked),
    "captured padded": (captured, PADDED, by_hand_masked),
}


@pytest.fixture(scope="module")
def models():
    brute.register(page_size=4, budget=16)
    return {name: make(attention=name) for name in ("sdpa", "unique", "brute")}


@pytest.fixture(scope="module")
def dense(models):
    """sdpa's tokens of every case, computed once."""
    # only our layers have the fixed form
    runs = {name: by_hand_masked if run is captured else run for name, (run, _, _) in CASES.items()}
    return {name: run(models["sdpa"], CASES[name][1]) for name, run in runs.items()}


@pytest.mark.parametrize("case", CASES)
def test_all_pages_kept_gives_the_tokens_of_sdpa(models, dense, case):
    run, inputs, _ = CASES[case]
    model = models["unique"]
    unique_hf.configure(model, page_size=4, budget=1024)
    unique_hf.report(model, reset=True)
    assert run(model, inputs).tolist() == dense[case].tolist()
    if run is not captured:  # its steps are the runner's to count
        found = unique_hf.report(model)
        assert found.pages_read == found.pages_present > 0


@pytest.mark.parametrize("case", CASES)
def test_few_pages_kept_gives_the_tokens_of_brute_force(models, dense, case):
    run, inputs, brute_run = CASES[case]
    model = models["unique"]
    unique_hf.configure(model, **SPARSE)
    unique_hf.report(model, reset=True)
    expected = (brute_run or run)(models["brute"], inputs)
    assert run(model, inputs).tolist() == expected.tolist()
    assert expected.tolist() != dense[case].tolist(), "the pages left out do not matter here: the case shows nothing"
    if run is not captured:
        found = unique_hf.report(model)
        assert found.sparse_rows > 0
        assert found.pages_read < found.pages_present


@pytest.mark.parametrize("budget", [16, 1024])
def test_long_chunks_without_a_mask_give_the_same_tokens(models, dense, monkeypatch, budget):
    model = models["unique"]
    unique_hf.configure(model, **{**SPARSE, "budget": budget})
    expected = greedy(model, PLAIN)
    marked = []

    def marking(*args, **kwargs):
        mask = unique_mask(*args, **kwargs)
        marked.append(is_lower_right(mask))
        return mask

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "unique", marking)
    monkeypatch.setattr("unique_attention.hf.masks.MARK_FROM", 1)
    assert greedy(model, PLAIN, prefill_chunk_size=9).tolist() == expected.tolist()
    assert sum(marked) == 4, "every chunk but the first is marked"
    assert (expected.tolist() == dense["greedy"].tolist()) == (budget == 1024)


def test_threads_do_not_disturb_each_other(models):
    model, inputs = models["unique"], [PLAIN, PADDED, SINGLE]
    unique_hf.configure(model, **SPARSE)
    alone = [greedy(model, given).tolist() for given in inputs]
    unique_hf.report(model, reset=True)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda given: greedy(model, given).tolist(), inputs))
    assert together == alone


@pytest.mark.parametrize("kept", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_rows_below_a_threshold_attend_to_everything(models, kept):
    model, dense = models["unique"], greedy(models["sdpa"], PADDED).tolist()
    # PADDED ends with rows of 36 and of 49 tokens
    for threshold, sparse in ((0, "all"), (40, "long"), (64, "none")):
        unique_hf.configure(model, **SPARSE, dense_below=threshold)
        unique_hf.report(model, reset=True)
        found, report = greedy(model, PADDED, **kept).tolist(), unique_hf.report(model)
        assert (report.sparse_rows > 0) == (sparse != "none")
        assert (report.dense_rows > 0) == (sparse != "all")
        assert (found[0] == dense[0]) == (sparse != "all") and (found[1] == dense[1]) == (sparse == "none")
    with pytest.raises(ValueError, match="dense_below"):
        unique_hf.configure(model, dense_below=-1)
    unique_hf.configure(model, dense_below=0)


def test_generation_without_cache_runs_the_soft_mask(models):
    model = models["unique"]
    unique_hf.configure(model, page_size=4, budget=1024)
    unique_hf.report(model, reset=True)
    assert greedy(model, PADDED, use_cache=False).tolist() == greedy(models["sdpa"], PADDED).tolist()
    found = unique_hf.report(model)
    assert found.soft_rows > 0 and found.sparse_rows == found.prompt_rows == 0


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def test_stock_cache_is_dense_and_says_so_once(models, dense):
    unique_hf.configure(models["unique"], **SPARSE)
    unique_hf.report(models["unique"], reset=True)
    reason, messages = "keys do not come from a cache of unique attention", Messages()
    logger = logging.getLogger("transformers.unique_attention")
    logger.addHandler(messages)
    _warn_once.cache_clear()
    try:
        for _ in range(2):
            tokens = greedy(models["unique"], PLAIN, past_key_values=DynamicCache())
            assert tokens.tolist() == dense["greedy"].tolist()
    finally:
        logger.removeHandler(messages)
    assert len([text for text in messages.texts if reason in text]) == 1
    found = unique_hf.report(models["unique"])
    assert found.sparse_rows == 0
    assert found.reasons == {reason: found.dense_rows}
    assert reason in str(found)


def test_settings_take_effect_at_once_on_a_kept_cache(models):
    model = models["unique"]
    unique_hf.configure(model, **SPARSE)
    with torch.no_grad():
        cache = model(**PADDED, use_cache=True).past_key_values
        steps, mask = {}, torch.nn.functional.pad(PADDED["attention_mask"], (0, 1), value=1)
        for name, change in {
            "sparse": {},
            "dense": {"budget": 1024},
            "again": {"budget": 16},
            "coarse": {"stats_dtype": "int4"},
            "minmax": {"score": "minmax", "stats_dtype": "fp32"},
        }.items():
            unique_hf.configure(model, **change)
            out = model(PLAIN["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
            steps[name] = out.logits
            cache.crop(-1)
        fresh = model(**PADDED, use_cache=True).past_key_values
        expected = model(PLAIN["input_ids"][:, :1], attention_mask=mask, past_key_values=fresh).logits
    unique_hf.configure(model, score="scalar")
    assert torch.equal(steps["sparse"], steps["again"])
    assert torch.equal(steps["minmax"], expected)
    assert not torch.allclose(steps["sparse"], steps["dense"], atol=1e-3)
    assert not torch.allclose(steps["sparse"], steps["minmax"], atol=1e-3)
