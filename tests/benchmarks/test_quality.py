"""The quality benchmark measures what it says: exact settings equal dense attention, blind ones lose, no row lacks."""

import json
import math

import pytest
import torch

from benchmarks import decode, figures, quality
from unique_attention.settings import UniqueConfig

MODEL = str(quality.ROOT / "models" / "pocket-lm")
CONTEXT, FACTS = 640, 4


@pytest.fixture(scope="module")
def pocket():
    torch.set_num_threads(1)
    return quality.load(MODEL)


@pytest.fixture(scope="module")
def hay(pocket):
    return quality.read(*pocket, CONTEXT, FACTS, 0)


def keys_of(config):
    return tuple(getattr(config, key) for key in quality.KEYS)


def test_main_holds_the_speed_benchmark_the_paper_and_every_lever():
    main = quality.settings("main")
    found = {keys_of(config) for config in main}
    assert len(found) == len(main)
    for which in ("main", "full"):
        assert {keys_of(config) for _, configs in decode.plan(which) for config in configs} <= found
    paper = UniqueConfig(page_size=8, stats_dtype="bf16", score="scalar", budget=512)
    assert {keys_of(paper), keys_of(paper.replace(group_reduce="max")), keys_of(UniqueConfig())} <= found
    for index, values in enumerate(
        [(2, 4, 8, 16, 32), ("fp32", "bf16", "fp8", "int8", "int4"), quality.FORMS, quality.VOTES, (256, 512, 1024)]
    ):
        assert set(values) <= {keys[index] for keys in found}
    assert found < {keys_of(config) for config in quality.settings("full")}
    assert {(p, s, b) for p, _, _, _, _, s, b in found if s} >= {
        (p, s, b) for p in (4, 8) for s in (8, 16, 32, 64, 128) for b in (1024, 2048, 4096) if s > p
    }


def test_keeping_all_pages_is_dense_and_counts_no_sparse_row(pocket, hay):
    tally = quality.Tally()
    quality.add(tally, *pocket, hay, UniqueConfig(page_size=16, budget=1024))
    assert tally.correct == hay.correct == FACTS and tally.questions == FACTS
    assert tally.sparse_rows == 0 and tally.rows > 0
    assert math.isclose(tally.kept_mass, tally.free_mass, rel_tol=1e-6) and tally.free_mass > 1


def test_the_oracle_keeps_more_mass_than_scores_and_a_larger_budget_more_than_a_small_one(hay):
    tight = UniqueConfig(page_size=8, budget=64, stats_dtype="bf16")
    shares = {}
    for name, config in {
        "oracle": tight.replace(score="oracle"),
        "scalar": tight,
        "mean": tight.replace(score="mean"),
        "wide": tight.replace(budget=256),
    }.items():
        kept, free = quality.recall_of(hay, config)
        shares[name] = kept / free
    assert 0 < shares["mean"] < shares["oracle"] and shares["scalar"] < shares["oracle"] < 1
    assert shares["scalar"] < shares["wide"]


def test_recall_is_the_mass_of_kept_pages_outside_forced_ones(hay):
    config = UniqueConfig(page_size=16, budget=64, sink_pages=1, recent_pages=2, score="oracle", group_reduce="mean")
    kept, free = quality.recall_of(hay, config)
    expected_free = sum(
        float(mass[..., 16 : (mass.shape[-1] - 1) // 16 * 16 - 16].sum()) for mass in hay.mass.values()
    )
    assert math.isclose(free, expected_free, rel_tol=1e-5)
    # one scored page per query and kv head, so the best page bounds what can be kept
    pages = {layer: quality.by_page(mass, 16)[..., 1:-2] for layer, mass in hay.mass.items()}
    bound = sum(float(p.amax(-1).sum()) for p in pages.values())
    assert 0.5 * bound < kept <= bound * (1 + 1e-5)


def test_super_pages_keep_less_mass_than_all_pages_and_more_with_more_tokens(pocket, hay):
    one = UniqueConfig(page_size=4, budget=64)
    levels = {budget: one.replace(super_page_size=16, super_budget=budget) for budget in (96, 192, 1024)}
    shares = {}
    for budget, config in {**levels, None: one}.items():
        kept, free = quality.recall_of(hay, config)
        shares[budget] = kept / free
    assert 0 < shares[96] < shares[192] < shares[1024] == shares[None]
    tallies = {budget: quality.Tally() for budget in (96, 1024, None)}
    for budget, tally in tallies.items():
        quality.add(tally, *pocket, hay, levels.get(budget, one))
        assert tally.pages_read == tally.rows * 16
    assert (tallies[1024].correct, tallies[1024].kept_mass) == (tallies[None].correct, tallies[None].kept_mass)
    row = quality.row_of(levels[96], tallies[96], CONTEXT, 1.0, 128)
    assert (row["super_page_size"], row["super_budget"]) == (16, 96)
    assert row["index_bytes_per_token"] == 74 / 4 + 74 / 16


def test_settings_follow_each_other_on_one_cache_without_a_trace(pocket, hay):
    config = UniqueConfig(page_size=8, budget=64, score="mean", stats_dtype="int4")
    first, again = quality.Tally(), quality.Tally()
    quality.add(first, *pocket, hay, config)
    quality.add(quality.Tally(), *pocket, hay, UniqueConfig(page_size=4, budget=64))
    quality.add(again, *pocket, hay, config)
    assert (first.correct, first.kept_mass, first.pages_read) == (again.correct, again.kept_mass, again.pages_read)
    assert first.pages_read == first.rows * 8 and first.sparse_rows == first.rows


def test_a_run_writes_whole_rows_and_says_what_failed(pocket, tmp_path, capsys, monkeypatch):
    good, bad = UniqueConfig(page_size=4, stats_dtype="int4", budget=64), UniqueConfig(page_size=8, budget=64)
    kept_pages = quality.kept_pages

    def fail_for_bad(query, keys, config, scaling):
        if config.page_size == 8:
            raise NotImplementedError("no kernel for page 8")
        return kept_pages(query, keys, config, scaling)

    monkeypatch.setattr(quality, "load", lambda path: pocket)
    monkeypatch.setattr(quality, "settings", lambda preset: [bad, good])
    monkeypatch.setattr(quality, "kept_pages", fail_for_bad)
    out = tmp_path / "quality.json"
    with pytest.raises(SystemExit, match="1 settings failed"):
        quality.main(["--contexts", "600", "--haystacks", "1", "--facts", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "no kernel for page 8" in printed and printed.rstrip().splitlines()[-1].split()[1:3] == ["4", "int4"]
    results = json.loads(out.read_text())
    assert results["environment"]["torch"] == torch.__version__ and results["model"] == "pocket-lm"
    (row,) = results["rows"]
    assert tuple(row[key] for key in quality.KEYS) == keys_of(good)
    assert row["context"] == 600 and row["needles"] == 2 and row["dense_accuracy"] == 1.0
    assert 0 <= row["accuracy"] <= 1 and 0 < row["recall"] < 1
    assert row["sparse_share"] == 1.0 and row["tokens_per_kv_head"] == 64
    # per page of 4: 64 bytes of codes, 4 scales and the spread in bf16
    assert row["index_bytes_per_token"] == (64 + 4 * 2 + 2) / 4
    assert decode.quality_of(good, results["rows"])["needle_accuracy"] == row["accuracy"]


def test_the_floor_counts_both_levels():
    shape = decode.Shape(2, 1000, kv_heads=8, head_dim=128)
    one = UniqueConfig(page_size=4, stats_dtype="int4", budget=512)
    two = one.replace(super_page_size=16, super_budget=640)
    page, kept = 64 + 4 * 2 + 2, 512 * 2 * 128 * 2
    assert decode.floor_us(shape, one) == pytest.approx(16 * (250 * page + kept) / decode.READ_RATE * 1e6)
    assert decode.floor_us(shape, two) == pytest.approx(16 * ((63 + 160) * page + kept) / decode.READ_RATE * 1e6)


def test_a_step_of_the_speed_benchmark_appends_to_both_levels(capsys, tmp_path):
    (shape, configs), *_ = decode.plan("smoke")
    config = configs[-1]
    run = decode.Decode(shape, config, "cpu", 0)
    (x,) = run.inputs
    run.step(x)
    for stats, page_size in ((x["stats"], 4), (x["upper"], 16)):
        expected = decode.ops.page_stats(x["k"], page_size=page_size, seq_lens=x["lens"], stats_dtype="int4")
        assert all(torch.equal(a, b) for a, b in zip(stats, expected))
    assert torch.equal(x["k"][:, :, shape.context - 1], x["new"][0][:, :, 0])
    older = {key: value for key, value in zip(decode.KEYS, keys_of(config)) if not key.startswith("super")}
    rows = [{**older, "recall": 0.5, "accuracy": 0.7}, {**older, "super_page_size": 16, "super_budget": 128}]
    rows[1].update(recall=0.4, accuracy=0.6)
    row = decode.measure_setting(shape, config, "cpu", rows, 0, {"sdpa": 10.0}, decode.time_append(shape, "cpu"))
    assert row["append_us"] > 0
    assert set(row["parts_us"]) == {"score_us", "select_us", "attend_us"} and all(row["parts_us"].values())
    assert (row["super_page_size"], row["super_budget"], row["needle_accuracy"]) == (16, 128, 0.6)
    assert decode.quality_of(config.replace(super_page_size=None, super_budget=None), rows)["recall"] == 0.5
    assert figures.label(row) == "4 int4 in 16/128" and figures.label(older) == "4 int4"


def result_files(tmp_path, contexts=(4096, 32768)):
    shared = {"score": "scalar", "group_reduce": "mean", "budget": 512}
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    environment = {"gpu": "a GPU"}
    pairs = ((8, "bf16", 0.91), (4, "int4", 0.99))
    timed = [
        {**shared, **shape, "batch": 80, "context": n, "page_size": p, "stats_dtype": s, "speedup": 100 / p}
        for n in contexts
        for p, s, _ in pairs
    ]
    judged = [
        {**shared, "context": n, "page_size": p, "stats_dtype": s, "accuracy": a - (n != 16384), "dense_accuracy": 1.0}
        for n in (16384, 8192)
        for p, s, a in pairs
    ]
    for name, rows in (("decode", timed), ("quality", judged)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    return ["--decode", str(tmp_path / "decode.json"), "--quality", str(tmp_path / "quality.json")]


def test_figures_join_speed_and_accuracy_of_equal_settings(tmp_path):
    arguments = result_files(tmp_path)
    figures.main([*arguments, "--out", str(tmp_path)])
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("front.png", "decode.png"))
    speed, judged = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("decode", "quality"))
    rows = figures.front(speed, judged, tmp_path / "front.png")
    assert {(row["page_size"], row["needle_accuracy"], row["speedup"]) for row in rows} == {
        (8, 0.91, 12.5),
        (4, 0.99, 25),
    }


def test_figures_say_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"decode.json, which does not exist: run `python -m benchmarks.decode`"):
        figures.main(["--decode", str(tmp_path / "decode.json"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="got none"):
        figures.main([*result_files(tmp_path, contexts=(4096,)), "--out", str(tmp_path)])
