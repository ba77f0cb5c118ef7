"""UniqueConfig: every setting is checked once, and survives being written down."""

import dataclasses
import json

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
    ],
)
def test_wrong_types_are_named(settings):
    (name,) = settings
    with pytest.raises(TypeError, match=f"`{name}` must be"):
        UniqueConfig(**settings)


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
