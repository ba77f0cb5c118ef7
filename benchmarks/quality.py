"""Needle accuracy and recall of attention mass for settings of unique attention, on the pocket model.

`python -m benchmarks.quality` writes `benchmarks/results/quality.json`; `--preset smoke` is a small list for any
machine. Every context is read once per haystack, exactly; a setting only needs new page statistics. Questions are fed
by decode, token by token, so that sparse attention reads them too.

- accuracy: share of questions answered exactly; every fact has up to three near-duplicates in the same context.
- recall: share of the dense attention mass outside the sink and recent pages that the kept pages hold, summed over
  layers, kv heads and, per question, the queries of the dense run at its middle token, its last token and the first
  token of the answer. All settings see the same queries.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.decode import KEYS, plan, stored_bytes
from benchmarks.environment import RESULTS, ROOT, write_results
from unique_attention.settings import STATS_DTYPES, UniqueConfig
from unique_hf import configure, report
from unique_hf.facts import make_haystack
from unique_hf.recording import by_page, kept_pages, recorded, token_mass
from unique_hf.retrieval import ask, prefill
from unique_hf.table import render
from unique_hf.text import topics

FORMS = ("scalar", "diagonal", "mean", "minmax", "absolute", "principal", "oracle")
VOTES = ("mean", "max", "softmax_mean")
WARM_ROWS = 48  # launches depend on the number of rows


def settings(preset: str) -> list[UniqueConfig]:
    """The settings of a preset, each once; `main` and `full` hold all of `benchmarks.decode`."""
    if preset == "smoke":
        return [
            UniqueConfig(page_size=4, stats_dtype="int4", budget=128),
            UniqueConfig(page_size=16, stats_dtype="bf16", group_reduce="max", budget=128),
            UniqueConfig(page_size=8, score="oracle", budget=256),
            UniqueConfig(page_size=4, budget=128, super_page_size=16, super_budget=192),
        ]
    paper = {"page_size": 8, "stats_dtype": "bf16", "score": "scalar", "budget": 512}
    found = [UniqueConfig(**paper, group_reduce="max"), UniqueConfig(**paper), UniqueConfig()]
    found += [config for _, configs in plan("full") for config in configs]
    found += [UniqueConfig(page_size=p, stats_dtype=s, budget=512) for p in (2, 4, 8, 16, 32) for s in ("fp8", "int4")]
    found += [UniqueConfig(page_size=p, stats_dtype=s, budget=512) for p in (4, 8) for s in STATS_DTYPES]
    found += [UniqueConfig(page_size=8, stats_dtype="bf16", score=form, budget=512) for form in FORMS]
    found += [UniqueConfig(page_size=4, score=form, budget=512) for form in FORMS]
    found += [UniqueConfig(page_size=4, group_reduce=vote, budget=512) for vote in VOTES]
    found += [UniqueConfig(**paper, group_reduce=vote) for vote in VOTES]
    found += [UniqueConfig(page_size=p, budget=b) for p in (4, 8, 16) for b in (256, 512, 1024)]
    found += two_levels()
    if preset == "full":
        product = itertools.product((2, 4, 8, 16, 32), STATS_DTYPES, (256, 512, 1024))
        found += [UniqueConfig(page_size=p, stats_dtype=s, budget=b) for p, s, b in product]
        product = itertools.product((4, 8, 16), FORMS, VOTES)
        found += [
            UniqueConfig(page_size=p, stats_dtype="bf16", score=form, group_reduce=vote, budget=512)
            for p, form, vote in product
        ]
    return list(dict.fromkeys(found))


def two_levels(pages=(4, 8), sizes=(8, 16, 32, 64, 128), budgets=(1024, 2048, 4096)) -> list[UniqueConfig]:
    """Super-pages of several sizes and budgets, as far as they are valid."""
    product = itertools.product(pages, sizes, budgets)
    return [
        UniqueConfig(page_size=page, budget=512, super_page_size=size, super_budget=budget)
        for page, size, budget in product
        if size > page
    ]


@dataclass
class Haystack:
    """One context that was read, its questions, and what dense attention did with them."""

    facts: list
    question_ids: list
    cache: object
    correct: int
    queries: dict  # layer -> [3 * questions, H, 1, D]
    mass: dict  # layer -> [3 * questions, HK, S]
    scaling: dict


@dataclass
class Tally:
    """Sums of one setting over haystacks."""

    correct: int = 0
    questions: int = 0
    kept_mass: float = 0.0
    free_mass: float = 0.0
    sparse_rows: int = 0
    rows: int = 0
    pages_read: int = 0
    seconds: float = 0.0
    failures: list = field(default_factory=list)


def load(path: str):
    """Model (bf16 on a GPU, fp32 elsewhere) and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="unique")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.model_max_length = int(1e9)  # the haystack's text is longer than its window
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


def count_right(tokenizer, facts, answers) -> int:
    """Exact answers."""
    return sum(tokenizer.decode(ids).strip() == fact.answer for fact, ids in zip(facts, answers))


@torch.no_grad()
def read(model, tokenizer, context: int, num_facts: int, seed: int, split: str = "test") -> Haystack:
    """Prefill one haystack, answer its questions densely, and keep the queries and masses that recall needs."""
    hay = make_haystack(tokenizer, topics(held_out=True), context, num_facts, seed, split)
    cache = prefill(model, hay.input_ids)
    with recorded(model) as recording:
        dense = ask(model, cache, hay.question_ids)
    queries, mass = {}, {}
    for layer, taken in recording.queries.items():
        # a row takes no step after its question where no row has anything to say, in untrained models only
        ends = [len(ids) - 1 for ids in hay.question_ids]
        steps = ([end // 2 for end in ends], ends, [min(end + 1, len(taken) - 1) for end in ends])
        queries[layer] = torch.cat([recording.at(layer, at) for at in steps])
        mass[layer] = token_mass(queries[layer], cache.layers[layer].keys, recording.scaling[layer])
    correct = count_right(tokenizer, hay.facts, dense.ids)
    return Haystack(hay.facts, hay.question_ids, cache, correct, queries, mass, recording.scaling)


@torch.no_grad()
def recall_of(hay: Haystack, config: UniqueConfig) -> tuple[float, float]:
    """Mass outside sink and recent pages: on kept pages, and in all."""
    kept_sum = free_sum = 0.0
    for layer, query in hay.queries.items():
        keys = hay.cache.layers[layer].keys
        kept = kept_pages(query, keys, config, hay.scaling[layer])
        mass = by_page(hay.mass[layer], config.page_size)
        free = slice(config.sink_pages, mass.shape[-1] - config.recent_pages)
        kept_sum += float((mass * kept)[..., free].sum(dtype=torch.float64))
        free_sum += float(mass[..., free].sum(dtype=torch.float64))
    return kept_sum, free_sum


@torch.no_grad()
def add(tally: Tally, model, tokenizer, hay: Haystack, config: UniqueConfig) -> None:
    """Answer the questions of one haystack with one setting."""
    begin = time.perf_counter()
    configure(model, **asdict(config))
    for layer in hay.cache.layers:
        # the context stays, its pages change: once for one row, copied to all rows by `ask`
        layer.index.forget()
        layer.index.wake(config)
        layer.index.refresh(layer.keys, None, None)
    report(model, reset=True)
    found = ask(model, hay.cache, hay.question_ids)
    counts = report(model, reset=True)
    kept, free = recall_of(hay, config)
    tally.correct += count_right(tokenizer, hay.facts, found.ids)
    tally.questions += len(hay.facts)
    tally.kept_mass += kept
    tally.free_mass += free
    tally.sparse_rows += counts.sparse_rows
    tally.rows += counts.sparse_rows + counts.dense_rows
    tally.pages_read += counts.pages_read
    tally.seconds += time.perf_counter() - begin


def row_of(config: UniqueConfig, tally: Tally, context: int, dense: float, head_dim: int) -> dict:
    """One row of the results."""
    return {
        **{key: getattr(config, key) for key in KEYS},
        "context": context,
        "needles": tally.questions,
        "accuracy": tally.correct / tally.questions,
        "dense_accuracy": dense,
        "recall": round(tally.kept_mass / tally.free_mass, 5),
        "tokens_per_kv_head": round(tally.pages_read * config.page_size / tally.rows, 1),
        "index_bytes_per_token": stored_bytes(config, head_dim),
        "sparse_share": tally.sparse_rows / tally.rows,
        "seconds": round(tally.seconds, 2),
    }


def measure(model, tokenizer, configs, context: int, haystacks: int, facts: int, seed: int, split: str) -> list[dict]:
    """Rows of one context length, in the order of `configs`; settings that fail are printed and left out."""
    tallies = {config: Tally() for config in configs}
    right = asked = 0
    for index in range(haystacks):
        begin = time.perf_counter()
        model.set_attn_implementation("unique")
        hay = read(model, tokenizer, context, facts, seed + index, split)
        right, asked = right + hay.correct, asked + len(hay.facts)
        for config, tally in tallies.items():
            if tally.failures:
                continue
            try:
                add(tally, model, tokenizer, hay, config)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                # one setting without a kernel must not cost the others their run; main() ends with an error
                tally.failures.append(error)
                print(f"  {config}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        seconds = time.perf_counter() - begin
        print(
            f"{context} tokens, haystack {index + 1} of {haystacks}: dense {right} of {asked}, {seconds:.0f} s",
            flush=True,
        )
        del hay
    head_dim = model.config.get_text_config().head_dim
    good = [(config, tally) for config, tally in tallies.items() if not tally.failures]
    return [row_of(config, tally, context, right / asked, head_dim) for config, tally in good]


def warm(path: str, configs: list[UniqueConfig], context: int) -> None:
    """Compile the kernels of some settings into Triton's cache on disk."""
    model, tokenizer = load(path)
    hay = read(model, tokenizer, context, WARM_ROWS, 0)
    for config in configs:
        try:
            add(Tally(), model, tokenizer, hay, config)
        except (RuntimeError, ValueError, NotImplementedError):
            continue  # the main process meets the same error and reports it


def warm_all(path: str, configs: list[UniqueConfig], context: int, jobs: int) -> None:
    """Compile in several processes: compilation would otherwise take most of the run."""
    begin = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(warm, path, configs[i::jobs], context) for i in range(jobs)]:
            done.result()
    print(f"kernels of {len(configs)} settings compiled by {jobs} processes in {time.perf_counter() - begin:.0f} s")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "pocket-lm"))
    parser.add_argument("--preset", choices=("smoke", "main", "full"), default="main")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16384], help="benchmarks.decode quotes the first")
    parser.add_argument("--haystacks", type=int, default=4, help="contexts per length")
    parser.add_argument("--facts", type=int, default=48, help="needles per context")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args(argv)
    configs, rows = settings(args.preset), []
    if torch.cuda.is_available() and args.jobs > 1:
        warm_all(args.model, configs, args.contexts[0], args.jobs)
    model, tokenizer = load(args.model)
    for context in args.contexts:
        rows += measure(model, tokenizer, configs, context, args.haystacks, args.facts, args.seed, args.split)
        write_results(
            args.out, rows, model=Path(args.model).name, dtype=str(model.dtype).removeprefix("torch."), seed=args.seed,
            split=args.split, haystacks=args.haystacks, facts=args.facts, feed="decode",
        )  # fmt: skip
    columns = ("context", *KEYS, "accuracy", "dense_accuracy", "recall", "index_bytes_per_token", "sparse_share")
    print(render(columns, [[row[name] for name in columns] for row in rows]))
    missing = len(configs) * len(args.contexts) - len(rows)
    if missing:
        raise SystemExit(f"{missing} settings failed, see above")


if __name__ == "__main__":
    main()
