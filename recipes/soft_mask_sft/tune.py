"""Chooses a plan for the arms on validation facts: a few schedules for one arm, each at several mixing factors.

    python -m recipes.soft_mask_sft.tune --out OUT --minutes 4
    python -m recipes.soft_mask_sft.arms --out OUT --tuning OUT/tune.json $(cat OUT/chosen.txt)

The rule, fixed before any result: of all that lose at most half a point of dense accuracy at every length, the one
with the highest hard top-k accuracy at 3 % of 16k; if nothing qualifies, the one that loses least.
"""

import argparse
import json
import time
from concurrent.futures import as_completed
from pathlib import Path

from recipes.soft_mask_sft.arms import add_options, environment
from recipes.soft_mask_sft.experiment import (
    PRESETS,
    SCHEDULES,
    Task,
    Workers,
    release,
    scheduled,
    tokenizer_of,
    trained,
)
from recipes.soft_mask_sft.pocket_quality import evaluate
from recipes.soft_mask_sft.pocket_training import mixed
from unique_hf.table import render

FACTORS = (0.5, 0.75, 1.0)
ALLOWED_LOSS = 0.005


def run_schedule(task, preset, options):
    """Trains one arm in a worker process and asks validation facts at every mixing factor.

    Returns:
        `list[dict]`: A row per factor; empty if the time left would not have been enough.
    """
    if time.time() + options["estimate"] * (task.arm != "start") > options["deadline"]:
        return []
    began = time.monotonic()
    model, start, end, training = trained(task, preset, options)
    rows = []
    for factor in (0.0,) if task.arm == "start" else FACTORS:
        mixed(model, start, end, factor)
        cells = evaluate(
            model,
            tokenizer_of(options["model"]),
            preset.tuning_cells,
            preset.tuning_sizes,
            settings={"page_size": task.page_size, "score": task.score},
            rows_at_once=preset.rows,
            split="validation",
        )
        accuracy = {f"{cell['length']}/{cell['budget'] or 'dense'}": cell["accuracy"] for cell in cells}
        rows.append({"page_size": task.page_size, "mix": factor, "accuracy": accuracy})
    for row in rows:
        row["seconds"] = round(time.monotonic() - began, 1)
        row["training_seconds"] = training and training["seconds"]
    release()
    return rows


def loss_of(row, rows):
    """Largest loss of dense accuracy over the lengths, against the start."""
    start = next(r for r in rows if r["schedule"] == "start" and r["page_size"] == row["page_size"])
    return max(start["accuracy"][key] - row["accuracy"][key] for key in row["accuracy"] if key.endswith("/dense"))


def choose(rows, key):
    """The row that the rule above picks.

    Args:
        rows (`list[dict]`): `schedule, page_size, mix, accuracy`; one schedule is `"start"`.
        key (`str`): The cell that decides, `"16384/512"`.
    Returns:
        `dict`: One of `rows`, or `None` if only the start was measured.
    """
    trained_rows = [row for row in rows if row["schedule"] != "start"]
    good = [row for row in trained_rows if loss_of(row, rows) <= ALLOWED_LOSS + 1e-9]
    if good:
        return max(good, key=lambda row: row["accuracy"][key])
    return min(trained_rows, key=lambda row: loss_of(row, rows), default=None)


def report(rows, page_size):
    """The table of one page size."""
    rows = [row for row in rows if row["page_size"] == page_size]
    keys = list(rows[0]["accuracy"])
    lines = [
        [row["schedule"], row["mix"], *(f"{row['accuracy'][key]:.3f}" for key in keys), row["seconds"]] for row in rows
    ]
    return f"page {page_size}\n" + render(["schedule", "mix", *keys, "seconds"], lines)


def earlier(file):
    """Rows of an earlier call, whose schedules must be what they are now."""
    found = json.loads(file.read_text())
    now = json.loads(json.dumps(SCHEDULES))
    changed = {row["schedule"] for row in found["rows"] if row["schedule"] != "start"}
    changed = sorted(name for name in changed if found["schedules"][name] != now.get(name))
    if changed:
        raise ValueError(
            f"expected the schedules of {file} to be those of now, {', '.join(changed)} differ: leave --resume out, "
            "or give the new ones names of their own"
        )
    return found["rows"]


def jobs_of(args, done):
    """Names, tasks and presets to run: the start and each schedule, at each page size, without those that are done."""
    jobs = []
    for page_size in args.page_sizes:
        wanted = [("start", PRESETS[args.preset])]
        wanted += [(name, scheduled(args.preset, name)) for name in args.schedules]
        for name, preset in wanted:
            if (name, page_size) not in done:
                arm = "start" if name == "start" else "soft"
                jobs.append((name, (Task(arm, 0, (), page_size), preset)))
    return jobs


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--schedules", nargs="+", choices=sorted(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16], help="the first one decides")
    parser.add_argument("--resume", type=Path, help="tune.json of an earlier call: its rows are kept, not run again")
    return parser.parse_args()


def main():
    """Runs the schedules on all devices, writes OUT/tune.json after each and OUT/chosen.txt, and prints a table."""
    began, args = time.time(), parse_args()
    rows = earlier(args.resume) if args.resume else []
    jobs = jobs_of(args, {(row["schedule"], row["page_size"]) for row in rows})
    for folder in (args.out, args.state):
        folder.mkdir(parents=True, exist_ok=True)
    options = {
        "model": args.model, "state": args.state, "estimate": args.estimate, "deadline": began + 60 * args.minutes,
    }  # fmt: skip
    with Workers(args.per_gpu) as workers:
        futures = workers.submit([job for _, job in jobs], run_schedule, options)
        for future in as_completed(futures):
            name = jobs[futures[future]][0]
            if future.exception() is not None:
                print(f"== {name} FAILED: {future.exception()!r}", flush=True)
                continue
            found = [{"schedule": name, "revision": args.revision, **row} for row in future.result()]
            rows += found
            results = {"environment": environment(), "rows": rows, "schedules": SCHEDULES}
            (args.out / "tune.json").write_text(json.dumps(results, indent=1) + "\n")
            print(f"== {name}: {found or 'no time left'} after {time.time() - began:.0f} s", flush=True)
            conclude(args, rows)


def conclude(args, rows):
    """Writes what the rule picks of the rows so far to OUT/chosen.txt, as options of `arms.py`, and prints all."""
    for page_size in args.page_sizes:
        if any(row["page_size"] == page_size for row in rows):
            print("\n" + report(rows, page_size))
    key = "/".join(map(str, PRESETS[args.preset].recall_cell))
    if not any(row["schedule"] == "start" and row["page_size"] == args.page_sizes[0] for row in rows):
        return
    best = choose([row for row in rows if row["page_size"] == args.page_sizes[0]], key)
    if best is not None:
        chosen = f"--schedule {best['schedule']} --mix {best['mix']:g}"
        (args.out / "chosen.txt").write_text(chosen + "\n")
        print(f"\nchosen: {chosen}", flush=True)


if __name__ == "__main__":
    main()
