"""Selection on two levels through everything `generate` does, and what report, recall and check say of it."""

import pytest
import torch
from transformers import StaticCache

import unique_hf
from tests.capture.recorder import recording_on_cpu
from tests.capture.test_generate import turns
from tests.integration import brute
from tests.integration.test_generate import CASES, PADDED, PLAIN, captured
from tests.integration.tiny import batch, greedy, make
from unique_hf import recording
from unique_hf.probe import measure

ONE = {"page_size": 2, "budget": 12}
TWO = {**ONE, "super_page_size": 4, "super_budget": 20}
OFF = {"super_page_size": None, "super_budget": None}


@pytest.fixture(scope="module")
def models():
    brute.register(**ONE)
    brute.register("brute_two", **TWO)
    return {name: make(attention=name) for name in ("unique", "brute", "brute_two")}


@pytest.mark.parametrize("case", CASES)
def test_two_levels_give_the_tokens_of_brute_force(models, case):
    run, inputs, brute_run = CASES[case]
    brute_run, model = brute_run or run, models["unique"]
    unique_hf.configure(model, **TWO, stats_dtype="fp32")
    unique_hf.report(model, reset=True)
    expected = brute_run(models["brute_two"], inputs).tolist()
    assert run(model, inputs).tolist() == expected
    assert expected != brute_run(models["brute"], inputs).tolist(), "super-pages do not matter here: shows nothing"
    if run is not captured:
        found = unique_hf.report(model)
        assert 0 < found.pages_read < found.pages_present


def test_a_budget_for_all_super_pages_changes_nothing(models):
    model = models["unique"]
    unique_hf.configure(model, **{**TWO, "super_budget": 1024}, stats_dtype="fp32")
    assert greedy(model, PADDED).tolist() == greedy(models["brute"], PADDED).tolist()


def test_super_pages_take_effect_at_once_on_a_kept_cache(models):
    model, steps = models["unique"], {}
    unique_hf.configure(model, **TWO, stats_dtype="fp32")
    mask = torch.nn.functional.pad(PADDED["attention_mask"], (0, 1), value=1)
    step = {"input_ids": PLAIN["input_ids"][:, :1], "attention_mask": mask}
    changes = {
        "two": {}, "larger": {"super_page_size": 8, "super_budget": 40}, "off": OFF, "again": TWO,
        "int4": {"stats_dtype": "int4"},
    }  # fmt: skip
    with torch.no_grad():
        cache = model(**PADDED, use_cache=True).past_key_values
        for name, change in changes.items():
            settings = unique_hf.configure(model, **change)
            kept = model(**step, past_key_values=cache).logits
            cache.crop(-1)
            fresh = model(**PADDED, use_cache=True).past_key_values
            assert torch.equal(kept, model(**step, past_key_values=fresh).logits), name
            assert fresh.layers[0].index.levels[-1].settings == (settings.upper or settings)
            steps[name] = kept
    unique_hf.configure(model, **OFF)
    assert torch.equal(steps["two"], steps["again"])
    assert not torch.allclose(steps["two"], steps["off"], atol=1e-3)


@pytest.mark.parametrize("run", [lambda m, i: greedy(m, i, tokens=67), turns], ids=["greedy", "turns"])
@pytest.mark.parametrize("padding", [(0, 0), (13, 0)])
def test_a_captured_step_keeps_both_levels(run, padding):
    model, inputs = make(), batch(padding=padding)
    one = unique_hf.configure(model, **ONE)
    plain = run(model, inputs)
    unique_hf.configure(model, **TWO)
    unique_hf.report(model, reset=True)
    expected = run(model, inputs)
    eager = unique_hf.report(model, reset=True)
    with recording_on_cpu() as log:
        assert run(model, inputs).tolist() == expected.tolist() != plain.tolist()
        found = unique_hf.report(model, reset=True)
        assert run(model, inputs).tolist() == expected.tolist()
        # another setting on the same model: recorded anew, and correct
        unique_hf.configure(model, **OFF)
        assert unique_hf.configure(model) == one
        assert run(model, inputs).tolist() == plain.tolist()
    assert found.capture.calls and not found.capture.eager and "replay" in log
    assert found.layers == eager.layers and found.total == eager.total


def test_a_compiled_static_step_is_one_graph_with_the_same_numbers():
    model = make(num_hidden_layers=1)
    unique_hf.configure(model, **TWO)
    inputs, found = batch(padding=(0, 0)), {}
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name, step in {"eager": model, "compiled": compiled}.items():
            cache = StaticCache(config=model.config, max_cache_len=64)
            token = model(inputs["input_ids"], past_key_values=cache).logits[:, -1:].argmax(-1)
            logits = []
            for at in range(40, 44):
                out = step(token, past_key_values=cache, position_ids=torch.full_like(token, at))
                token = out.logits.argmax(-1)
                logits.append(out.logits)
            found[name] = torch.cat(logits, 1)
    assert torch.equal(found["eager"], found["compiled"])


def decode_once(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        model(torch.full((len(mask), 1), 7), attention_mask=mask, past_key_values=cache)
    return cache


def test_report_counts_the_statistics_that_two_levels_read():
    model = make(num_hidden_layers=1)
    unique_hf.configure(model, page_size=2, budget=12, super_page_size=8, super_budget=32, stats_dtype="fp8")
    decode_once(model, batch(rows=2, length=40, padding=(13, 0)))
    found = unique_hf.report(model)
    # 41 slots from 13 and from 0: pages 6..20 in super-pages 1..5, and 0..20 in 0..5; 4 super-pages are kept, the
    # last of them with one page; super-page 1 is kept whole, of which row 0 has two pages
    assert found.pages_present == 15 + 21 and found.pages_read == 2 * 6
    token = 2 * (32 + 32) * 4  # two kv heads, keys and values of 32 numbers, fp32
    page = 2 * (32 + 2 + 2)  # fp8 mean, one bf16 scale, bf16 spread
    pages_scored = 2 * (3 * 4 + 1)
    assert found.bytes_read == 2 * 11 * token + (5 + 6 + pages_scored) * page
    assert found.bytes_dense == (28 + 41) * token


def test_all_super_pages_kept_means_all_pages_scored():
    model = make(num_hidden_layers=1)
    unique_hf.configure(model, page_size=2, budget=12, super_page_size=8, super_budget=1024, stats_dtype="fp8")
    decode_once(model, batch(rows=2, length=40, padding=(13, 0)))
    found = unique_hf.report(model)
    assert found.bytes_read == 2 * 11 * 2 * 64 * 4 + (15 + 21 + 5 + 6) * 2 * 36


def test_recall_is_that_of_the_pages_of_two_levels():
    model, inputs = make(num_hidden_layers=1), batch(rows=1, padding=(0,))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with recording.recorded(model) as seen:
            model(torch.full((1, 1), 7), past_key_values=cache)
    query, keys, scaling = seen.at(0, [0]), cache.layers[0].keys, seen.scaling[0]
    mass, recall = recording.by_page(recording.token_mass(query, keys, scaling), 2), {}
    for name, change in {"two": TWO, "one": {**ONE, **OFF}}.items():
        settings = unique_hf.configure(model, **change, stats_dtype="fp32", measure_recall=True)
        unique_hf.report(model, reset=True)
        decode_once(model, inputs)
        found = unique_hf.report(model).recall
        kept = recording.kept_pages(query, keys, settings, scaling)
        assert kept.shape == mass.shape and (kept.sum(-1) == 6).all()
        assert abs(found - float((mass * kept).sum(-1).mean())) < 1e-5
        expected = brute.Brute(**change)
        for head in range(2):
            pages = expected.pages(
                query[0, 2 * head : 2 * head + 2, 0].double(), keys[0, head].double(), torch.ones(41, dtype=torch.bool)
            )
            assert set(kept[0, head].nonzero().flatten().tolist()) == pages
        recall[name] = found
    assert recall["two"] < recall["one"]


def test_probe_measures_the_pages_of_two_levels():
    model, inputs, recall = make(num_hidden_layers=1), batch(padding=(13, 0)), {}
    for name, change in {"two": TWO, "all": {"super_budget": 1024}, "one": OFF}.items():
        unique_hf.configure(model, **{**ONE, **change}, temperature=0.1)
        recall[name] = measure(model, dict(inputs))
    assert recall["all"] == recall["one"]
    assert recall["two"]["recall"] < recall["one"]["recall"]
    # training ranks all pages
    assert recall["two"] == {**recall["one"], "recall": recall["two"]["recall"]}


def test_check_names_the_super_pages():
    model = make("gemma2")
    unique_hf.configure(model, **TWO)
    assert [layer.reason for layer in unique_hf.check(model).layers] == [
        "sliding window of 16 tokens",
        "pages by score, in the best super-pages of 4 (20 tokens)",
    ]
