"""The generate benchmark: names of rows, merging files, and that stored figures belong to the settings of a row."""

import fnmatch
import json

import pytest

from benchmarks import generate
from benchmarks.harness import MODELS
from unique_hf import UniqueConfig


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
