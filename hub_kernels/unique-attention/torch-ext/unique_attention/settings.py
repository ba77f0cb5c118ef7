"""Every setting of UNIQUE attention, validated once. Imports the standard library only."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

FORMAT_VERSION = 1
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 2, 128

# score form -> vectors of head_dim numbers that one page stores for it
VECTORS_PER_PAGE = {
    "mean": 1,
    "scalar": 1,
    "diagonal": 2,
    "absolute": 2,
    "moment": 2,
    "principal": 3,
    "minmax": 2,
    "oracle": 0,
}
SCORES = tuple(VECTORS_PER_PAGE)
GROUP_REDUCES = ("mean", "max", "softmax_mean", "shifted_max")
STATS_DTYPES = ("fp32", "bf16", "fp8", "int8", "int4")
# weight of the offset in Eq. 2; the forms that are missing here have no offset
DEFAULT_SCORE_WEIGHT = {"scalar": 0.5, "diagonal": 2.0, "absolute": 0.5, "moment": 0.5, "principal": 2.0}


def vectors_per_page(score: str) -> int:
    """Number V of stored vectors per page for a score form.

    Args:
        score (`str`): One of `SCORES`.
    Returns:
        `int`: V of the statistics layout `[B, HK, N, V, C]`.
    Raises:
        ValueError: `score` is not one of `SCORES`.
    """
    _check_name("score", score, SCORES)
    return VECTORS_PER_PAGE[score]


def resolve_score_weight(score: str, score_weight: float | None = None) -> float:
    """Weight w of Eq. 2: the given one, or the default of the score form (0 where the form has no offset).

    Args:
        score (`str`): One of `SCORES`.
        score_weight (`float`, *optional*): Overrides the default of the form.
    Returns:
        `float`: The weight.
    Raises:
        ValueError: `score` is not one of `SCORES`.
    """
    _check_name("score", score, SCORES)
    return DEFAULT_SCORE_WEIGHT.get(score, 0.0) if score_weight is None else float(score_weight)


@dataclass(frozen=True)
class UniqueConfig:
    """Settings of UNIQUE attention: which pages are kept, how they are scored, how the index is stored.

    Args:
        page_size (`int`, *optional*, defaults to 4): Tokens per page P; power of two, 2..128.
        budget (`int`, *optional*, defaults to 1024): Tokens that a query attends to per kv head, sink and recent pages
            included; a multiple of `page_size`, with room for at least one page that is chosen by score.
        sink_pages (`int`, *optional*, defaults to 1): First pages of a row, always kept.
        recent_pages (`int`, *optional*, defaults to 2): Last pages of a row, always kept; the page being filled is one
            of them, so at least 1.
        score (`str`, *optional*, defaults to `"scalar"`): Form of the page score (Eq. 2), one of `SCORES`.
        score_weight (`float`, *optional*): Weight of the offset in Eq. 2; `None` takes `DEFAULT_SCORE_WEIGHT[score]`.
            Without effect for `"mean"`, `"minmax"` and `"oracle"`, which have no offset.
        group_reduce (`str`, *optional*, defaults to `"mean"`): How the query heads of a kv head vote (Eq. 3), one of
            `GROUP_REDUCES`.
        stats_dtype (`str`, *optional*, defaults to `"int4"`): Storage of the page statistics, one of `STATS_DTYPES`.
        super_page_size (`int`, *optional*): Tokens per super-page, a power of two beyond `page_size`, at most 128:
            decoding scores super-pages first, and then only the pages of the best ones. `None` scores every page.
        super_budget (`int`, *optional*): Tokens in the super-pages that are kept, a multiple of `super_page_size` with
            room for `budget` and two super-pages; `None` takes four times `budget`, or what must fit.
        dense_below (`int`, *optional*, defaults to 0): Rows of at most so many tokens attend to everything when they
            decode, as those that fit in the budget do. Sparse begins to pay at 2,048 tokens, or about
            `65536 // (batch * kv_heads)` if those are fewer, on an H200.
        temperature (`float`, *optional*, defaults to 1.0): Width of the sigmoid of the soft mask (Eq. 6), in units of
            the page score (unscaled `q . k`).
        threshold_grad (`bool`, *optional*, defaults to `False`): Let gradients flow through the threshold of Eq. 6.
        soft_mask (`bool`, *optional*, defaults to `True`): Train through the soft mask of Eq. 6; `False` trains dense.
        capture (`bool`, *optional*, defaults to `True`): Decode through a captured step where the device allows it.
        measure_recall (`bool`, *optional*, defaults to `False`): Measure the recall of true attention mass (slow).
    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range or unknown; the message says what was expected and what to change.
    """

    page_size: int = 4
    budget: int = 1024
    sink_pages: int = 1
    recent_pages: int = 2
    score: str = "scalar"
    score_weight: float | None = None
    group_reduce: str = "mean"
    stats_dtype: str = "int4"
    super_page_size: int | None = None
    super_budget: int | None = None
    dense_below: int = 0
    temperature: float = 1.0
    threshold_grad: bool = False
    soft_mask: bool = True
    capture: bool = True
    measure_recall: bool = False

    def __post_init__(self):
        for name in ("page_size", "budget", "sink_pages", "recent_pages", "dense_below"):
            _check_int(name, getattr(self, name))
        if self.dense_below < 0:
            raise ValueError(f"`dense_below` must be >= 0, got {self.dense_below}; with 0 the budget alone decides.")
        for name in ("threshold_grad", "soft_mask", "capture", "measure_recall"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(_type_message(name, "True or False", getattr(self, name)))
        _check_name("score", self.score, SCORES)
        _check_name("group_reduce", self.group_reduce, GROUP_REDUCES)
        _check_name("stats_dtype", self.stats_dtype, STATS_DTYPES)
        # numbers from YAML or JSON may be integers; equal settings must compare and serialise equally
        object.__setattr__(self, "temperature", _finite_float("temperature", self.temperature))
        if self.temperature <= 0:
            raise ValueError(
                f"`temperature` must be > 0, got {self.temperature}; use e.g. 0.05 for a nearly hard mask."
            )
        if self.score_weight is not None:
            object.__setattr__(self, "score_weight", _finite_float("score_weight", self.score_weight))
            if self.score_weight < 0:
                raise ValueError(
                    f"`score_weight` must be >= 0, got {self.score_weight}; None takes the form's default."
                )
        self._check_pages()
        self._check_super_pages()
        # no field: made once, since decoding asks at every step, and never compared or saved
        object.__setattr__(self, "_upper", self._first_level())

    def _check_pages(self):
        page_size = self.page_size
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise ValueError(
                f"`page_size` must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}, got {page_size}; "
                "4 gives the best accuracy per byte, 16 the highest speed."
            )
        if self.sink_pages < 0:
            raise ValueError(f"`sink_pages` must be >= 0, got {self.sink_pages}.")
        if self.recent_pages < 1:
            raise ValueError(
                f"`recent_pages` must be >= 1, got {self.recent_pages}: the page being filled is always kept."
            )
        least = (self.sink_pages + self.recent_pages + 1) * page_size
        if self.budget < least:
            raise ValueError(
                f"`budget` is in tokens and must hold {self.sink_pages} sink, {self.recent_pages} recent and at least "
                f"1 scored page of {page_size} tokens: expected >= {least}, got {self.budget}. Raise `budget`, or "
                "lower `page_size`, `sink_pages` or `recent_pages`."
            )
        if self.budget % page_size:
            raise ValueError(
                f"`budget` must be a multiple of page_size={page_size}, got {self.budget}; the nearest ones are "
                f"{self.budget // page_size * page_size} and {(self.budget // page_size + 1) * page_size}."
            )

    def _check_super_pages(self):
        size = self.super_page_size
        if size is None:
            if self.super_budget is not None:
                raise ValueError(
                    f"`super_budget` needs `super_page_size`, got super_budget={self.super_budget} alone; set both or "
                    "neither."
                )
            return
        _check_int("super_page_size", size)
        if not self.page_size < size <= MAX_PAGE_SIZE or size & (size - 1):
            raise ValueError(
                f"`super_page_size` must be a power of two beyond page_size={self.page_size}, at most "
                f"{MAX_PAGE_SIZE}, got {size}; None scores every page."
            )
        if self.score == "oracle" or self.group_reduce not in ("mean", "max"):
            raise ValueError(
                "`super_page_size` needs a score from page statistics and the vote 'mean' or 'max', got "
                f"score={self.score!r} and group_reduce={self.group_reduce!r}; set super_page_size=None."
            )
        if self.super_budget is not None:
            _check_int("super_budget", self.super_budget)
        budget, least, *_ = self._upper_pages(size)
        if budget < least:
            raise ValueError(
                "`super_budget` must hold the budget and two super-pages, and one super-page beside those of sink and "
                f"recent pages: expected >= {least}, got {budget}. Raise it, or lower `super_page_size`."
            )
        if budget % size:
            raise ValueError(f"`super_budget` must be a multiple of super_page_size={size}, got {budget}.")

    def _upper_pages(self, size: int) -> tuple[int, int, int, int]:
        """Tokens of the first level, the least there may be, forced first and forced last super-pages."""
        ratio = size // self.page_size
        # however the pages fall into super-pages, those hold every page that is forced
        forced = (self.sink_pages, self.recent_pages)
        sinks, recents = (-(-(pages + ratio - 1) // ratio) if pages else 0 for pages in forced)
        # the first and the last super-page of a row may hold few of its pages
        least = max(self.budget + 2 * size, (sinks + recents + 1) * size)
        budget = self.super_budget
        if budget is None:
            budget = -(-max(4 * self.budget, least) // size) * size
        return budget, least, sinks, recents

    @property
    def upper(self) -> UniqueConfig | None:
        """Settings of the first level, whose pages are the super-pages; `None` where every page is scored."""
        return vars(self)["_upper"]

    def _first_level(self) -> UniqueConfig | None:
        if self.super_page_size is None:
            return None
        budget, _, sinks, recents = self._upper_pages(self.super_page_size)
        return replace(
            self,
            page_size=self.super_page_size,
            budget=budget,
            sink_pages=sinks,
            recent_pages=recents,
            super_page_size=None,
            super_budget=None,
        )

    @property
    def num_kept(self) -> int:
        """Pages kept per query and kv head, K: sink, recent and scored pages together."""
        return self.budget // self.page_size

    @property
    def resolved_score_weight(self) -> float:
        """Weight w of Eq. 2 with the default of the score form filled in."""
        return resolve_score_weight(self.score, self.score_weight)

    def replace(self, **changes: Any) -> UniqueConfig:
        """A validated copy with some settings changed.

        Args:
            **changes: Settings by name.
        Returns:
            `UniqueConfig`: The copy.
        Raises:
            TypeError: a setting has the wrong type.
            ValueError: unknown name or value out of range.
        """
        _check_keys(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dict for JSON, with `format_version`; `from_dict` reads it back.

        Returns:
            `dict`: Names to plain Python values.
        """
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UniqueConfig:
        """Read the settings that `to_dict` wrote, or any subset of them.

        Args:
            values (`Mapping`): Names to values; missing ones take their defaults, as does `format_version`.
        Returns:
            `UniqueConfig`: The validated settings.
        Raises:
            TypeError: `values` is not a mapping, or a setting has the wrong type.
            ValueError: unknown name, value out of range, or a format version newer than this code.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"Expected a mapping of settings, got {type(values).__name__}.")
        settings = dict(values)
        version = settings.pop("format_version", FORMAT_VERSION)
        _check_int("format_version", version)
        if not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"Settings have format version {version}, this code reads 1 to {FORMAT_VERSION}; "
                "upgrade unique_hf (or the kernel revision) to the version that saved them."
            )
        _check_keys(settings)
        return cls(**settings)


_NAMES = tuple(field.name for field in fields(UniqueConfig))


def _check_keys(settings: Mapping[str, Any]) -> None:
    for key in settings:
        if key not in _NAMES:
            nearest = difflib.get_close_matches(str(key), _NAMES, n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown setting `{key}`; did you mean `{nearest}`? Known: {', '.join(_NAMES)}.")


def _check_name(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        nearest = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


def _check_int(name: str, value: Any) -> None:
    # bool is an int to Python; `budget=True` is a mistake
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(_type_message(name, "an int", value))


def _finite_float(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(_type_message(name, "a number", value))
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    return float(value)


def _type_message(name: str, expected: str, value: Any) -> str:
    return f"`{name}` must be {expected}, got {value!r} of type {type(value).__name__}."
