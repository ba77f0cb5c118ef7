"""The experiment: does training through the soft mask make hard top-k better? Arms on the pocket model, paired tests.

    python -m recipes.soft_mask_sft.arms --out OUT --minutes 9.3            # all GPUs of the machine
    python -m recipes.soft_mask_sft.arms --preset smoke --out OUT           # a minute on two CPU cores, learns nothing

Every arm starts from the same weights and sees the same batches in the same order: `start` (no training), `dense`
(the control), `hard` (the mask is a cut from the first step on) and `soft`. Arms run in the order of `tasks()`, two
per GPU at a time; `OUT/arms.json` is written after each, and arms that `--resume FILE` holds are not run again.
"""

import argparse
import importlib.metadata
import json
import shutil
import sys
import tarfile
import time
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch

from recipes.soft_mask_sft.experiment import PRESETS, SCHEDULES, START, Workers, run_task, scheduled, tasks
from recipes.soft_mask_sft.pocket_quality import bootstrap, mcnemar

PLANNED = ("steps", "tokens", "rate", "temperature", "dense_share", "clip", "mix")


def compare(records, sizes):
    """Paired tests of every soft record against start, dense and hard at the same page size, score and cell.

    Args:
        records (`list[dict]`): Of `run_task`.
        sizes (`dict`): Length to (haystacks, questions).
    Returns:
        `list[dict]`: One row per pair and cell; `gain` is the accuracy of soft minus that of the other.
    """
    rows = []
    for soft in records:
        others = [r for r in records if (r["page_size"], r["score"]) == (soft["page_size"], soft["score"])]
        for other in others if soft["arm"] == "soft" else ():
            # the start has one seed and is everyone's
            if other["arm"] == "soft" or (other["arm"] != "start" and other["seed"] != soft["seed"]):
                continue
            for a in soft["cells"]:
                b = next(c for c in other["cells"] if (c["length"], c["budget"]) == (a["length"], a["budget"]))
                row = {"task": soft["task"], "against": other["task"], "length": a["length"], "budget": a["budget"]}
                row.update(trained=a["trained"], gain=a["accuracy"] - b["accuracy"])
                row.update(mcnemar(a["outcomes"], b["outcomes"]))
                groups = sizes[a["length"]][0]
                row["interval"] = bootstrap(a["outcomes"], b["outcomes"], groups) if groups > 1 else None
                rows.append(row)
    return rows


def environment():
    """Device and versions."""
    cuda = torch.cuda.is_available()
    names = ("torch", "transformers", "triton", "numpy")
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 1,
        "python": sys.version.split()[0],
        "versions": {
            name: found.version
            for found in importlib.metadata.distributions()
            if (name := found.metadata["Name"]) in names
        },
    }


def earlier(file, preset, split):
    """Records of an earlier call, which must have trained by the same plan."""
    found = json.loads(file.read_text())
    plan = json.loads(json.dumps(asdict(preset.plan)))
    if (found["plan"], found["split"]) != (plan, split):
        raise ValueError(
            f"expected results of the same plan and split to resume, {file} has {found['plan']} on {found['split']}, "
            f"not {plan} on {split}: leave --resume out, or give the options of that call"
        )
    return [{"revision": found["revision"], **record} for record in found["records"]]


def write(out, preset, records, options):
    """Writes everything so far to `OUT/arms.json`."""
    results = {
        "environment": options["environment"],
        "revision": options["revision"],
        "plan": asdict(preset.plan),
        "split": options["split"],
        "tuning": options["tuning"],
        "records": records,
        "comparisons": compare(records, preset.sizes),
    }
    partial = out / "arms.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(out / "arms.json")


def ship(name, state, out):
    """Copies a checkpoint to `OUT/name`: shards, and the small files in one archive."""
    source, target = state / name, out / name
    if not source.is_dir():
        print(f"== no checkpoint of {name} to ship", flush=True)
        return
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target / "meta.tar", "w") as archive:
        for path in sorted(source.iterdir()):
            if path.suffix == ".safetensors":
                shutil.copy(path, target / path.name)
            else:
                archive.add(path, arcname=path.name)


def add_options(parser):
    """Options that the choice of a plan (`tune.py`) has too."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="h200")
    parser.add_argument("--model", type=Path, default=START, help="where all arms start")
    parser.add_argument("--out", type=Path, required=True, help="results and the checkpoints to ship go here")
    parser.add_argument("--state", type=Path, default=Path("build/soft_mask_sft"), help="batches, text, checkpoints")
    parser.add_argument("--minutes", type=float, default=1e6, help="no arm starts that would not end by then")
    parser.add_argument("--estimate", type=float, default=110, help="seconds an arm is expected to take")
    parser.add_argument("--per-gpu", type=int, default=2, help="arms at a time on one GPU")
    parser.add_argument("--revision", default="unknown", help="git revision to note in the results")


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--arms", nargs="+", help="only these, by name (soft-p16-s0, dense-s0, ...), in the usual order"
    )
    parser.add_argument("--resume", type=Path, help="arms.json of an earlier call: its arms are kept, not run again")
    parser.add_argument("--ship", nargs="*", default=["soft-p16-s0", "soft-p8-s0"], help="checkpoints to copy to OUT")
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="plan", help="a plan that `tune.py` tries")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--tokens", type=int, help="tokens per step")
    parser.add_argument("--rate", type=float, help="share of the learning rates of the first training")
    parser.add_argument("--temperature", type=float, nargs=2, help="first and last, in logits")
    parser.add_argument("--dense-share", type=float, help="share of dense steps")
    parser.add_argument("--clip", type=float, help="largest norm of a step's gradient")
    parser.add_argument("--mix", type=float, help="share of the training's change of the weights that is kept")
    parser.add_argument("--tuning", type=Path, help="tune.json that the plan was chosen from, to note in the results")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="facts asked; tune on the first"
    )
    return parser.parse_args()


def main():
    """Runs the arms on all devices, writes results after each."""
    began, args = time.time(), parse_args()
    preset = scheduled(args.preset, args.schedule)
    changes = {name: value for name in PLANNED if (value := getattr(args, name)) is not None}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    preset = replace(preset, plan=replace(preset.plan, **changes))
    wanted = tasks()
    if unknown := set(args.arms or ()) - {task.name for task in wanted}:
        raise ValueError(f"unknown arms {sorted(unknown)}; there are {', '.join(task.name for task in wanted)}")
    records = earlier(args.resume, preset, args.split) if args.resume else []
    done = {record["task"] for record in records}
    wanted = [task for task in wanted if task.name not in done and (not args.arms or task.name in args.arms)]
    args.out.mkdir(parents=True, exist_ok=True)
    args.state.mkdir(parents=True, exist_ok=True)
    options = {
        "model": args.model, "state": args.state, "split": args.split, "estimate": args.estimate,
        "deadline": began + 60 * args.minutes, "environment": environment(), "revision": args.revision,
        "tuning": json.loads(args.tuning.read_text())["rows"] if args.tuning else None,
    }  # fmt: skip
    failed = []
    with Workers(args.per_gpu) as workers:
        futures = workers.submit([(task, preset) for task in wanted], run_task, options)
        for future in as_completed(futures):
            name, error = wanted[futures[future]].name, future.exception()
            if error is not None:
                failed.append(name)
                print(f"== {name} FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            records += [{"revision": args.revision, **record} for record in future.result()]
            if not future.result():
                print(f"== {name}: no time left", flush=True)
            write(args.out, preset, records, options)
            if name in args.ship:
                ship(name, args.state, args.out)
            print(f"== {name} done after {time.time() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} arms failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
