"""UniqueConfig: every setting is checked once, and survives being written down."""

import dataclasses
import json
import pickle

import pytest

from unique_attention.settings import (
    DEFAULT_SCORE_WEIGHT,
    FORMAT_VERSION,
    SCORES,
    UniqueConfig,
    resolve_score_weight,
    vectors_per_page,
)


def test_defaults_are_valid_and_keep_256_pages():
    config = UniqueConfig()
    assert (config.page_size, config.budget, config.sink_pages, config.recent_pages) == (4, 1024, 1, 2)
    assert (config.score, config.group_reduce, config.stats_dtype) == ("scalar", "mean", "int4")
    assert config.num_kept == 256


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UniqueConfig().budget = 8


@pytest.mark.parametrize("page_size", [2, 4, 8, 16, 32, 64, 128])
def test_page_sizes_that_are_powers_of_two_are_taken(page_size):
    assert UniqueConfig(page_size=page_size).num_kept == 1024 // page_size


@pytest.mark.parametrize("page_size", [-4, 0, 1, 3, 6, 12, 100, 256])
def test_other_page_sizes_are_refused(page_size):
    with pytest.raises(ValueError, match=f"power of two from 2 to 128, got {page_size}"):
        UniqueConfig(page_size=page_size, budget=2**16)


def test_budget_must_hold_sink_recent_and_one_scored_page():
    assert UniqueConfig(page_size=4, budget=16, sink_pages=1, recent_pages=2).num_kept == 4
    with pytest.raises(ValueError, match=r"expected >= 16, got 12.*Raise `budget`"):
        UniqueConfig(page_size=4, budget=12, sink_pages=1, recent_pages=2)


def test_budget_must_be_whole_pages():
    with pytest.raises(ValueError, match="multiple of page_size=16, got 1000; the nearest ones are 992 and 1008"):
        UniqueConfig(page_size=16, budget=1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_pages": -1}, "`sink_pages` must be >= 0, got -1"),
        ({"recent_pages": 0}, "`recent_pages` must be >= 1, got 0"),
        ({"score": "diag"}, "must be one of 'mean'.*got 'diag'; did you mean 'diagonal'"),
        ({"group_reduce": "softmax"}, "did you mean 'softmax_mean'"),
        ({"stats_dtype": "fp4"}, "`stats_dtype` must be one of .*got 'fp4'"),
        ({"temperature": 0}, "`temperature` must be > 0, got 0"),
        ({"temperature": float("inf")}, "`temperature` must be finite"),
        ({"score_weight": -0.5}, "`score_weight` must be >= 0, got -0.5"),
        ({"score_weight": float("nan")}, "`score_weight` must be finite"),
        ({"super_budget": 4096}, "`super_budget` needs `super_page_size`, got super_budget=4096 alone"),
        ({"super_page_size": 4}, "power of two beyond page_size=4, at most 128, got 4; None scores every page"),
        ({"super_page_size": 24}, "power of two beyond page_size=4, at most 128, got 24"),
        ({"super_page_size": 256}, "at most 128, got 256"),
        ({"super_page_size": 32, "super_budget": 1056}, "expected >= 1088, got 1056. Raise it, or lower"),
        ({"super_page_size": 32, "super_budget": 4100}, "multiple of super_page_size=32, got 4100"),
        ({"super_page_size": 32, "score": "oracle"}, "needs a score from page statistics .* got score='oracle'"),
        ({"super_page_size": 32, "group_reduce": "softmax_mean"}, "group_reduce='softmax_mean'; set super_page_size"),
    ],
)
def test_values_out_of_range_say_what_was_expected(settings, message):
    with pytest.raises(ValueError, match=message):
        UniqueConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 4.0},
        {"page_size": "4"},
        {"budget": True},
        {"temperature": "1"},
        {"temperature": True},
        {"score_weight": "0.5"},
        {"capture": 1},
        {"threshold_grad": None},
        {"soft_mask": 0},
        {"measure_recall": "no"},
        {"super_page_size": 32.0},
        {"super_page_size": True},
    ],
)
def test_wrong_types_are_named(settings):
    (name,) = settings
    with pytest.raises(TypeError, match=f"`{name}` must be"):
        UniqueConfig(**settings)


def test_super_budget_must_be_an_int():
    with pytest.raises(TypeError, match="`super_budget` must be an int, got 4096.0"):
        UniqueConfig(super_page_size=32, super_budget=4096.0)


def test_the_first_level_has_settings_of_its_own():
    assert UniqueConfig().upper is None
    config = UniqueConfig(score="diagonal", super_page_size=32, super_budget=4096)
    upper = config.upper
    assert (upper.page_size, upper.budget, upper.num_kept, upper.upper) == (32, 4096, 128, None)
    assert (upper.score, upper.stats_dtype, upper.group_reduce) == ("diagonal", "int4", "mean")
    assert config.upper is upper, "decoding asks at every step"
    assert pickle.loads(pickle.dumps(config)).upper == upper and config.replace(budget=512).upper == upper
    assert config.replace(super_page_size=None, super_budget=None).upper is None


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (1, 2), (5, 3), (8, 9)])
def test_forced_super_pages_hold_forced_pages_wherever_they_begin(sink, recent):
    upper = UniqueConfig(sink_pages=sink, recent_pages=recent, super_page_size=16).upper
    for name, pages in (("sink_pages", sink), ("recent_pages", recent)):
        touched = [len({(at + i) // 4 for i in range(pages)}) for at in range(4)]
        assert getattr(upper, name) == max(touched)


def test_a_super_budget_that_is_not_given_is_valid():
    assert UniqueConfig(budget=512, super_page_size=32).upper.budget == 2048
    for size in (8, 16, 32, 64, 128):
        for budget in (16, 64, 1028):
            upper = UniqueConfig(budget=budget, super_page_size=size).upper
            given = UniqueConfig(budget=budget, super_page_size=size, super_budget=upper.budget)
            assert given.upper == upper and upper.budget >= 4 * budget


def test_super_pages_survive_being_written_down():
    config = UniqueConfig(super_page_size=32, super_budget=4096)
    written = json.loads(json.dumps(config.to_dict()))
    assert (written["super_page_size"], written["super_budget"]) == (32, 4096) and "_upper" not in written
    assert UniqueConfig.from_dict(written) == config and hash(UniqueConfig.from_dict(written)) == hash(config)
    older = {name: value for name, value in UniqueConfig().to_dict().items() if not name.startswith("super_")}
    assert UniqueConfig.from_dict(older) == UniqueConfig()


def test_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match="Unknown setting `pagesize`; did you mean `page_size`"):
        UniqueConfig.from_dict({"pagesize": 8})
    with pytest.raises(ValueError, match="did you mean `recent_pages`"):
        UniqueConfig().replace(recent=3)


def test_dict_round_trip_through_json():
    config = UniqueConfig(page_size=8, budget=512, score="diagonal", score_weight=3, temperature=2, capture=False)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["format_version"] == FORMAT_VERSION
    assert UniqueConfig.from_dict(values) == config
    assert type(config.temperature) is float and type(config.score_weight) is float


def test_missing_settings_take_their_defaults():
    assert UniqueConfig.from_dict({}) == UniqueConfig()
    assert UniqueConfig.from_dict({"budget": 64}) == UniqueConfig(budget=64)


def test_from_dict_leaves_its_argument_alone():
    values = UniqueConfig().to_dict()
    UniqueConfig.from_dict(values)
    assert "format_version" in values


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0])
def test_other_format_versions_are_refused(version):
    with pytest.raises(ValueError, match=f"format version {version}, this code reads 1 to {FORMAT_VERSION}"):
        UniqueConfig.from_dict({"format_version": version})


def test_from_dict_needs_a_mapping():
    with pytest.raises(TypeError, match="mapping of settings, got list"):
        UniqueConfig.from_dict(["page_size"])


def test_replace_validates_again():
    assert UniqueConfig().replace(page_size=16).num_kept == 64
    with pytest.raises(ValueError, match="power of two"):
        UniqueConfig().replace(page_size=5)


@pytest.mark.parametrize("score", SCORES)
def test_weight_of_a_score_is_its_default_until_given(score):
    assert UniqueConfig(score=score).resolved_score_weight == DEFAULT_SCORE_WEIGHT.get(score, 0.0)
    assert UniqueConfig(score=score, score_weight=1.5).resolved_score_weight == 1.5
    assert resolve_score_weight(score, 0) == 0.0


def test_vectors_per_page_follow_the_layout():
    counts = {
        "mean": 1,
        "scalar": 1,
        "diagonal": 2,
        "absolute": 2,
        "moment": 2,
        "minmax": 2,
        "principal": 3,
        "oracle": 0,
    }
    assert {score: vectors_per_page(score) for score in SCORES} == counts
    with pytest.raises(ValueError, match="`score` must be one of"):
        vectors_per_page("quest")
