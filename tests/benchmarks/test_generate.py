"""The generate benchmark: names of rows, merging files, and that stored figures belong to the settings of a row."""

import fnmatch
import json

import pytest
import torch
from transformers import DynamicCache

from benchmarks import generate, harness
from benchmarks.harness import MODELS
from tests.capture.recorder import recording_on_cpu
from unique_hf import UniqueConfig, capture


def test_every_row_has_a_name_of_its_own_and_the_two_models_share_the_work():
    names = [generate.label(name, job) for name, job in generate.plan(smoke=False)]
    assert len(set(names)) == len(names)
    halves = [[n for n in names if fnmatch.fnmatch(n, f"{model}/*")] for model in MODELS if model != "smoke"]
    assert sorted(sum(halves, [])) == sorted(names) and all(halves)
    assert {f"{m}/decode/{b}x{n}" for m, b, n in generate.STORED} <= set(names)


def test_the_accuracy_beside_a_speed_is_that_of_its_settings(tmp_path, monkeypatch):
    rows = [
        {
            "page_size": 4,
            "stats_dtype": "int4",
            "score": "scalar",
            "group_reduce": "mean",
            "budget": 512,
            "accuracy": 0.5,
        }
    ]
    (tmp_path / "quality.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert generate.accuracy_of(UniqueConfig(budget=512)) == 0.5
    assert generate.accuracy_of(UniqueConfig(budget=1024)) is None
    assert generate.accuracy_of(UniqueConfig(budget=512, stats_dtype="fp8")) is None


def test_files_of_one_revision_are_merged_and_of_two_refused(tmp_path):
    for name, revision in (("a", "1"), ("b", "1"), ("c", "2")):
        facts = {"environment": {"revision": revision}, "rows": [{"model": name}]}
        (tmp_path / name).write_text(json.dumps(facts))
    generate.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert [row["model"] for row in json.loads((tmp_path / "out").read_text())["rows"]] == ["a", "b"]
    with pytest.raises(SystemExit, match="one revision"):
        generate.merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")


def test_every_setting_of_the_smoke_plan_runs_on_the_cache_of_the_one_before(monkeypatch):
    (job,) = [job for _, job in generate.plan(smoke=True) if job.func is generate.decode_rows]
    assert job.keywords["names"] == list(generate.SETTINGS) and len(generate.SETTINGS) > 2
    monkeypatch.setattr(generate, "STEPS", 12)
    # a graph outlives the call that it was recorded in, its stand-in on the CPU does not
    monkeypatch.setattr(generate, "replay_ms", lambda model, context: 1.0)
    with recording_on_cpu():
        rows = job("smoke", harness.build("smoke", "cpu"))
    assert [row["settings"] for row in rows] == list(generate.SETTINGS)
    for row in rows:
        assert row["captured_steps"] == 11 and row["begun_ahead"] == 9 and not row["eager_because"]
        assert row["ms"] > 0 and row["dense_ms"] > 0 and row["dense_plain_ms"] > 0
        assert row["plain_because"] == "Replayed records launch by launch" and not row["fused_launches"]


def test_a_prefix_used_again_under_other_settings_is_as_good_as_a_prompt():
    model, context, cache = harness.build("smoke", "cpu"), 520, None
    ids = torch.randint(0, model.config.vocab_size, (1, context + 1))
    for setting in (*generate.SETTINGS, *generate.SETTINGS):
        settings = generate.set_up(model, setting)
        cache = harness.prefix(model, 1, context, settings, cache)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        alone = DynamicCache(config=model.config)
        for layer, (keys, values) in zip(alone.layers, before):
            layer.index.wake(settings)
            layer.update(keys, values)
            layer.index.refresh(layer.keys, None, None)
        steps = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with recording_on_cpu():
            found = model.generate(ids, past_key_values=cache, **steps)
        expected = model.generate(ids, past_key_values=alone, **steps)
        found, expected = (torch.stack(x.logits) for x in (found, expected))
        torch.testing.assert_close(found, expected)
        cache.crop(context - cache.get_seq_length())
        for layer, (keys, values) in zip(cache.layers, before):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        capture.release(model)
