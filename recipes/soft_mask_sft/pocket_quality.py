"""Accuracy of the pocket model under hard top-k, with the questions fed by decode, and paired tests between models.

Contexts of equal length are prefilled together; one prefill serves all budgets, every question is a row of its own.
"""

import functools
import math
import random
from dataclasses import dataclass

import unique_hf
from unique_hf.facts import encode_text, make_haystack
from unique_hf.retrieval import ask, prefill
from unique_hf.text import topics


@dataclass(frozen=True)
class Cell:
    """One measurement: context length, budget in tokens (`None`: dense), and whether training saw both."""

    length: int
    budget: int | None
    trained: bool = True


@functools.lru_cache(maxsize=8)
def haystacks(tokenizer, length, count, questions, split="test", seed=1000):
    """Haystacks of exactly `length` tokens, with facts that no training row held; filled up in front with text."""
    source = topics(held_out=True)
    filler = encode_text(tokenizer, source[:4000])
    found = []
    for index in range(count):
        haystack = make_haystack(tokenizer, source, length, questions, seed + index, split)
        missing = length - len(haystack.input_ids)
        found.append((filler[:missing] + haystack.input_ids, haystack))
    return found


def evaluate(model, tokenizer, cells, sizes, *, settings, rows_at_once, split="test"):
    """Outcomes of every cell; all models get the same questions in the same order.

    Args:
        model (`PreTrainedModel`): Loaded with attn_implementation="unique"; left as it was found.
        tokenizer: Of transformers or `tokenizers`.
        cells (`list[Cell]`): What to measure.
        sizes (`dict`): Length to `(haystacks, questions per haystack)`.
        settings (`dict`): Settings of UNIQUE attention beside the budget.
        rows_at_once (`dict`): Length to questions decoded together.
        split (`str`, *optional*, defaults to `"test"`): Facts to ask; settle settings on `"validation"`.
    Returns:
        `list[dict]`, one per cell: `length, budget, trained, questions, accuracy, outcomes` ("1" right, "0" wrong) and
        `pages_read`, the share of the pages that decoding read (1 where dense).
    Raises:
        RuntimeError: a sparse cell ran dense.
    """
    results = []
    for length in sorted({cell.length for cell in cells}):
        count, questions = sizes[length]
        stacks = haystacks(tokenizer, length, count, questions, split)
        group = max(1, rows_at_once[length] // questions)
        here = [cell for cell in cells if cell.length == length]
        outcomes, read = dict.fromkeys(here, ""), dict.fromkeys(here, 1.0)
        for start in range(0, count, group):
            part = stacks[start : start + group]
            for dense in (True, False):
                wanted = [cell for cell in here if (cell.budget is None) == dense]
                if wanted:
                    _evaluate_part(model, tokenizer, part, wanted, settings, dense, outcomes, read)
        results += [_row(cell, outcomes[cell], read[cell]) for cell in here]
    return results


def _evaluate_part(model, tokenizer, part, cells, settings, dense, outcomes, read):
    # dense rows come from Transformers' own attention, not from ours with everything kept
    name = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if dense else name)
    try:
        if not dense:
            unique_hf.configure(model, **settings, budget=max(cell.budget for cell in cells))
        cache = prefill(model, [ids for ids, _ in part])
        question_ids = [ids for _, haystack in part for ids in haystack.question_ids]
        expected = [answer for _, haystack in part for answer in haystack.answers]
        for cell in cells:
            if not dense:
                unique_hf.configure(model, budget=cell.budget)
                unique_hf.report(model, reset=True)
            answers = ask(model, cache, question_ids).ids
            right = [tokenizer.decode(ids).strip() == answer for ids, answer in zip(answers, expected)]
            outcomes[cell] += "".join("01"[ok] for ok in right)
            if not dense:
                read[cell] = _pages_read(model, cell)
    finally:
        model.set_attn_implementation(name)


def _pages_read(model, cell):
    """Share of the pages read; a cell that silently ran dense would look like a perfect result, so it is an error."""
    counts = unique_hf.report(model, reset=True)
    if counts.dense_rows or not counts.sparse_rows:
        raise RuntimeError(
            f"expected only sparse rows at length {cell.length} and budget {cell.budget}, got {counts.sparse_rows} "
            f"sparse and {counts.dense_rows} dense: choose a budget below the length"
        )
    return counts.pages_read / counts.pages_present


def _row(cell, outcomes, pages_read):
    return {
        "length": cell.length,
        "budget": cell.budget,
        "trained": cell.trained,
        "questions": len(outcomes),
        "accuracy": outcomes.count("1") / len(outcomes),
        "outcomes": outcomes,
        "pages_read": pages_read,
    }


def recall(model, tokenizer, length, budget, settings, split="test"):
    """Mean share of the true attention mass on the kept pages, over all layers and heads, while questions are read."""
    questions = min(16, length // 128)
    [(ids, haystack)] = haystacks(tokenizer, length, 1, questions, split, seed=2000)
    unique_hf.configure(model, **settings, budget=budget, measure_recall=True)
    cache = prefill(model, ids)
    unique_hf.report(model, reset=True)
    ask(model, cache, haystack.question_ids)
    found = unique_hf.report(model, reset=True).recall
    unique_hf.configure(model, measure_recall=False)
    return found


def mcnemar(first, second):
    """Two-sided exact McNemar test on paired outcomes.

    Equation: p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c)), b and c the pairs that only one got right.

    Args:
        first (`str`), second (`str`): "1" and "0" per question, in the same order.
    Returns:
        `dict`: `only_first, only_second, p`.
    """
    if len(first) != len(second):
        raise ValueError(f"expected paired outcomes of equal length, got {len(first)} and {len(second)}")
    pairs = list(zip(first, second))
    b, c = pairs.count(("1", "0")), pairs.count(("0", "1"))
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    return {"only_first": b, "only_second": c, "p": min(1.0, 2 * tail)}


def bootstrap(first, second, groups, draws=2000, seed=0):
    """95 % interval of the difference in accuracy, whole haystacks resampled (their questions share a context).

    Args:
        first (`str`), second (`str`): Paired outcomes.
        groups (`int`): Haystacks, of equally many questions.
    Returns:
        `list[float]`: Lower and upper bound of accuracy(first) - accuracy(second).
    """
    size = len(first) // groups
    parts = [slice(i * size, (i + 1) * size) for i in range(groups)]
    gains = [(first[part].count("1") - second[part].count("1")) / size for part in parts]
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(gains, k=groups)) / groups for _ in range(draws))
    return [means[int(0.025 * draws)], means[int(0.975 * draws) - 1]]
