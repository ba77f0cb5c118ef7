"""Facts hidden in a long English text, asked for with dense attention and with unique attention, side by side.

`python -m unique_hf.demo`, or on a text of your own: `python -m unique_hf.demo --text FILE --ask "What is ...?"`.
The text is read once, exactly, and both ways answer from the same cache. With unique attention every question is fed
token by token, so that also its reading goes through the kept pages only; dense attention reads most of it at once,
which gives it the same answers sooner.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import configure, report
from .facts import make_haystack
from .picture import draw, sharpest_view
from .recording import recorded
from .report import Report
from .retrieval import ANSWER_TOKENS, ask, prefill
from .table import render
from .text import read_text, topics

CHECKOUT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = CHECKOUT / "models" / "pocket-lm"
TRAINED_MODEL = CHECKOUT / "models" / "pocket-lm-unique"  # the default model after training through the soft mask
# what the model must have alike before and after training, so that a difference comes from the training
SHARED = (
    "page_size", "budget", "sink_pages", "recent_pages", "score", "score_weight", "group_reduce", "stats_dtype",
    "super_page_size", "super_budget", "dense_below",
)  # fmt: skip
CONTEXT, FACTS, BATCH = 12544, 24, 8
SHARE = 16  # the budget is at most one part in SHARE of the context
TIGHT = 64  # and one part in TIGHT where a model is shown before and after training: at more, both are right


@dataclass(frozen=True)
class Task:
    """What is asked about which context; `expected` is `None` where nobody knows the answers."""

    input_ids: list[int]
    questions: list[str]
    question_ids: list[list[int]]
    expected: list[str] | None
    source: str


@dataclass(frozen=True)
class Arm:
    """One way of answering: texts, and seconds per decode step and row."""

    answers: list[str]
    token_seconds: float


def dot() -> None:
    """One sign of life."""
    print(".", end="", flush=True)


def load_model(name: str | None) -> tuple[Any, Any]:
    """The model in "unique" and its tokenizer.

    Args:
        name (`str`, *optional*): A folder or a Hub id; the pocket model of the checkout by default.
    Returns:
        `tuple`: Model and tokenizer.
    Raises:
        ValueError: There is no model there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if name is None and not (DEFAULT_MODEL / "config.json").is_file():
        raise ValueError(
            "expected the pocket model in models/pocket-lm of a checkout, got an installation without it: run the "
            "demo in a checkout, or name a model with --model PATH_OR_HUB_ID"
        )
    source = str(DEFAULT_MODEL) if name is None else name
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="unique")
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"expected a model folder or Hub id, got {source!r}: {reason}") from error
    # the whole text is tokenised before a window of it is taken; the length that counts is checked by `fit`
    tokenizer.model_max_length = int(1e9)
    return model.to(device).eval(), tokenizer


def built_in_task(tokenizer: Any, context: int, facts: int, seed: int) -> Task:
    """Facts and near-duplicates of them hidden in the held-out part of Python's own documentation."""
    hay = make_haystack(tokenizer, topics(held_out=True), context, facts, seed)
    order = sorted(range(facts), key=lambda i: hay.depths[i])  # the picture shows them by depth
    return Task(
        hay.input_ids,
        [_bare(hay.questions[i]) for i in order],
        [hay.question_ids[i] for i in order],
        [hay.answers[i] for i in order],
        f"pydoc_data.topics with {facts} facts and {hay.num_distractors} near-duplicates of them hidden in it",
    )


def _bare(question: str) -> str:
    return question.strip().removeprefix("Question:").removesuffix("Answer:").strip()


def own_task(tokenizer: Any, path: str, questions: Sequence[str]) -> Task:
    """The user's text and questions, asked in the form that the pocket model was trained on."""
    ids = tokenizer(read_text(path).rstrip(), add_special_tokens=False)["input_ids"]
    asked = [question.strip() for question in questions]
    if not all(asked):
        raise ValueError('expected a question after --ask, got an empty one: write --ask "What is ...?"')
    prompts = [f"\nQuestion: {question}\nAnswer:" for question in asked]
    question_ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    return Task(ids, asked, question_ids, None, str(path))


def fit(model: Any, task: Task, share: int = SHARE) -> Any:
    """Set the budget for the length of the context: the default one where it is small enough, else a part of the text.

    Args:
        model (`PreTrainedModel`): Its settings are changed.
        task (`Task`): The context.
        share (`int`, *optional*, defaults to 16): The budget is at most one part in `share` of the context, and never
            less than one page more than those that are always kept.
    Returns:
        `UniqueConfig`: The settings in force.
    Raises:
        ValueError: The context is too long for the model.
    """
    length, limit = len(task.input_ids), getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = length + max(map(len, task.question_ids)) + ANSWER_TOKENS
    if limit is not None and longest > limit:
        room = limit - (longest - length)
        raise ValueError(
            f"expected a context of at most {room:,} tokens (the model handles {limit:,} with question and answer), "
            f"got {length:,}: shorten the text, or name a model for longer ones with --model"
        )
    settings = configure(model)
    least = (settings.sink_pages + settings.recent_pages + 1) * settings.page_size
    budget = min(settings.budget, max(least, length // share // settings.page_size * settings.page_size))
    return configure(model, budget=budget)


def read(model: Any, task: Task, how: str) -> Any:
    """The cache of the context; prints a line of progress."""
    print(f"    read  {how}: ", end="", flush=True)
    started = time.perf_counter()
    cache = prefill(model, task.input_ids, on_layer=dot)
    print(f" {time.perf_counter() - started:.1f} s", flush=True)
    return cache


def answer(
    model: Any, tokenizer: Any, cache: Any, task: Task, attention: str, label: str | None = None
) -> tuple[Arm, list[Any]]:
    """All answers of one way, in batches; for sdpa also the recorded queries of the last token of every question."""
    model.set_attn_implementation(attention)
    print(f"{label or attention:>8}  ", end="", flush=True)
    begin, texts, times, recordings = time.perf_counter(), [], [], []
    for start in range(0, len(task.questions), BATCH):
        ids = task.question_ids[start : start + BATCH]
        with recorded(model) if attention == "sdpa" else nullcontext() as recording:
            found = ask(model, cache, ids, chunk=attention == "sdpa", on_step=dot)
        texts += [tokenizer.decode(tokens).strip() for tokens in found.ids]
        # the first step copies the cache into a buffer with room to grow
        times += [seconds / len(ids) for seconds in found.step_seconds[1:]]
        if recording is not None:
            recordings.append((recording, [len(question) - 1 - found.chunked for question in ids]))
    print(f" {time.perf_counter() - begin:.1f} s", flush=True)
    return Arm(texts, statistics.median(times)), recordings


def show_answers(task: Task, arms: dict[str, Arm]) -> None:
    """Print the answers side by side and, where they are known, how many are right."""
    header, columns = ["question", *arms], [task.questions, *(arm.answers for arm in arms.values())]
    if task.expected is not None:
        header.insert(1, "expected")
        columns.insert(1, task.expected)
    print("\n" + render(header, list(zip(*columns))) + "\n")
    if task.expected is not None:
        for name, arm in arms.items():
            right = sum(a == b for a, b in zip(arm.answers, task.expected))
            print(f"{name:>8}: {right} of {len(task.expected)} right ({right / len(task.expected):.1%})")


def show_costs(counts: Report, dense: Arm, sparse: Arm, length: int, settings: Any, device: str) -> None:
    """Print what the sparse steps read of what there was, and the time per token of both ways."""
    steps = counts.sparse_rows + counts.dense_rows
    print(
        f"   pages: {counts.pages_read:,} read of {counts.pages_present:,} present "
        f"({counts.pages_read / max(1, counts.pages_present):.1%}); {counts.sparse_rows:,} of {steps:,} steps x "
        "layers sparse"
    )
    print(
        f"   bytes: {counts.bytes_read:,} read, page statistics included; dense reads {counts.bytes_dense:,} "
        f"({counts.bytes_dense / max(1, counts.bytes_read):.1f} times as many)"
    )
    print(f"    time: {dense.token_seconds * 1e3:.1f} ms per token dense, {sparse.token_seconds * 1e3:.1f} ms unique")
    if device == "cpu":
        print("          on a CPU unique attention runs as its eager specification; the kernels are for GPUs")
    if length <= settings.budget:
        print(f"          all {length:,} tokens fit into the budget of {settings.budget:,}: everything was dense")


def show_settings(name: str, settings: Any, length: int) -> None:
    """Print a line of settings."""
    print(
        f"{name:>8}  budget {settings.budget:,} tokens (1/{length / settings.budget:.1f} of the text), pages of "
        f"{settings.page_size}, score {settings.score!r}, vote {settings.group_reduce!r}, statistics in "
        f"{settings.stats_dtype}"
    )


def before_and_after(model: Any, tokenizer: Any, cache: Any, task: Task) -> dict[str, Arm]:
    """Few and larger pages, as the trained model was trained for: the model without that training, and with it."""
    trained, _ = load_model(str(TRAINED_MODEL))
    chosen = fit(trained, task, TIGHT)
    configure(model, **{name: getattr(chosen, name) for name in SHARED})
    for layer in cache.layers:
        # the context stays, its pages change
        layer.index.forget()
        layer.index.wake(chosen)
        layer.index.refresh(layer.keys, None, None)
    show_settings("tight", chosen, len(task.input_ids))
    before, _ = answer(model, tokenizer, cache, task, "unique", "tight")
    print(f" trained  {TRAINED_MODEL.name}: the same model after training through the soft mask, settings of tight")
    own = read(trained, task, "again, by the trained model")
    after, _ = answer(trained, tokenizer, own, task, "unique", "trained")
    return {"tight": before, "trained": after}


def run(args: argparse.Namespace) -> None:
    """The demo with parsed arguments."""
    begin = time.perf_counter()
    model, tokenizer = load_model(args.model)
    if args.text is not None:
        task = own_task(tokenizer, args.text, args.ask)
    else:
        task = built_in_task(tokenizer, args.context, args.facts, args.seed)
    settings = fit(model, task)
    length = len(task.input_ids)
    print(f"    text  {task.source}: {length:,} tokens")
    show_settings("unique", settings, length)
    cache = read(model, task, "once, exactly, for both")
    print(
        "  answer  from copies of that cache, unique reading the questions token by token; a dot is a step of all rows"
    )
    dense, recordings = answer(model, tokenizer, cache, task, "sdpa")
    report(model, reset=True)
    sparse, _ = answer(model, tokenizer, cache, task, "unique")
    counts, arms = report(model), {"dense": dense, "unique": sparse}
    if args.model is None and args.text is None and (TRAINED_MODEL / "config.json").is_file():
        arms |= before_and_after(model, tokenizer, cache, task)
    show_answers(task, arms)
    show_costs(counts, dense, sparse, length, settings, model.device.type)
    if args.text is None or args.out is not None:
        path = Path(args.out or "build/demo.png")
        draw(sharpest_view(recordings, cache, settings), path, settings.page_size)
        print(f" picture: {path} (page score beside true attention mass)")
    print(f"   total: {time.perf_counter() - begin:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m unique_hf.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model",
        help="folder or Hub id (default: the pocket models of the checkout; with --text only the dense one)",
    )
    parser.add_argument("--text", metavar="FILE", help="ask about this text file instead of the built-in one")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="with --text; may be given several times")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of the built-in text (%(default)s)")
    parser.add_argument("--facts", type=int, default=FACTS, help="facts hidden in it and asked for (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="chooses facts and text (%(default)s)")
    parser.add_argument("--out", metavar="PNG", help="the picture (build/demo.png; with --text none by default)")
    args = parser.parse_args(argv)
    if (args.text is None) != (args.ask is None):
        parser.error("--text FILE and --ask QUESTION belong together")
    if args.facts < 1:
        parser.error(f"--facts must be at least 1, got {args.facts}")
    try:
        run(args)
    except (ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
