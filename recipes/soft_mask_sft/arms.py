"""The experiment: does training through the soft mask make hard top-k better? Arms on the pocket model, paired tests.

    python -m recipes.soft_mask_sft.arms --out OUT --minutes 9.3            # all GPUs of the machine
    python -m recipes.soft_mask_sft.arms --preset smoke --out OUT           # a minute on two CPU cores, learns nothing

Every arm starts from the same weights and sees the same batches in the same order: `start` (no training), `dense`
(the control), `hard` (the mask is a cut from the first step on) and `soft`. Arms run in the order of `tasks()`, one
per GPU at a time; `OUT/arms.json` is written after each, and arms that `--resume FILE` holds are not run again.
"""

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import shutil
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import unique_hf
from recipes.pocket_lm.evaluate import bits_per_byte
from recipes.soft_mask_sft.pocket_quality import Cell, bootstrap, evaluate, mcnemar, recall
from recipes.soft_mask_sft.pocket_training import Plan, build_batches, train
from unique_hf.schedule import SoftMaskSchedule

START = Path(__file__).parents[2] / "models/pocket-lm"
HARD = (1e-4, 1e-4)  # in logits: every gate is open or shut, no gradient reaches the scores
SHIPPED_BUDGET = 512


@dataclass(frozen=True)
class Preset:
    """Sizes of the experiment; `sizes` maps length to (haystacks, questions each), `rows` to questions at once."""

    plan: Plan
    text_bytes: int
    workers: int
    cells: tuple
    sizes: dict
    rows: dict
    recall_cell: tuple


# 1.5, 3, 6 and 12 % of 16k; budgets and lengths outside (256..2048, 2k..16k) never meet the mask in training. Dense
# steps go to 32k as the first training did, or the model would unlearn that length whatever the mask does
H200 = Preset(
    plan=Plan(
        steps=250,
        tokens=65536,
        lengths={16384: 0.35, 8192: 0.3, 4096: 0.2, 2048: 0.15},
        dense_lengths={32768: 0.5, 16384: 0.25, 8192: 0.1, 4096: 0.1, 1024: 0.05},
        budgets=(256, 2048),
        dense_share=0.5,
    ),
    text_bytes=16 << 20,
    workers=14,
    cells=(
        *(Cell(16384, budget) for budget in (None, 256, 512, 1024, 2048)),
        *(Cell(16384, budget, trained=False) for budget in (128, 4096)),
        *(Cell(32768, budget, trained=False) for budget in (None, 512, 1024)),
        *(Cell(1024, budget, trained=False) for budget in (None, 128)),
    ),
    sizes={1024: (16, 8), 16384: (8, 64), 32768: (4, 48)},
    rows={1024: 128, 16384: 256, 32768: 96},
    recall_cell=(16384, 512),
)
SMOKE = Preset(
    plan=Plan(steps=3, tokens=512, lengths={256: 0.5, 128: 0.5}, dense_lengths={256: 1.0}, budgets=(64, 96), warmup=1),
    text_bytes=1 << 20,
    workers=1,
    cells=(Cell(512, None), Cell(512, 96), Cell(768, 96, trained=False)),
    sizes={512: (2, 3), 768: (1, 3)},
    rows={512: 6, 768: 3},
    recall_cell=(512, 96),
)
PRESETS = {"h200": H200, "smoke": SMOKE}


@dataclass(frozen=True)
class Task:
    """One training (or none), then an evaluation for each `(page_size, score)`."""

    arm: str  # start, dense, hard or soft
    seed: int
    evaluations: tuple
    page_size: int = 16
    score: str = "scalar"

    @property
    def name(self):
        """Unique among the tasks; also the folder of the checkpoint."""
        if self.arm in ("start", "dense"):
            return f"{self.arm}-s{self.seed}"
        score = "" if self.score == "scalar" else f"-{self.score}"
        return f"{self.arm}-p{self.page_size}{score}-s{self.seed}"


def tasks():
    """All arms, the most telling first."""
    grid = tuple((page, "scalar") for page in (16, 8, 4)) + ((16, "minmax"), (8, "minmax"))
    order = []

    def masked(arm, page, seed, score="scalar"):
        order.append(Task(arm, seed, ((page, score),), page, score))

    masked("soft", 16, 0)
    masked("soft", 8, 0)
    order.append(Task("dense", 0, grid))
    order.append(Task("start", 0, grid))
    masked("hard", 16, 0)
    masked("hard", 8, 0)
    masked("soft", 16, 1)
    masked("soft", 8, 1)
    order.append(Task("dense", 1, grid))
    for seed in (0, 1):
        masked("soft", 4, seed)
        masked("soft", 16, seed, "minmax")
        masked("hard", 4, seed)
    masked("hard", 16, 1)
    masked("hard", 8, 1)
    masked("soft", 8, 0, "minmax")
    masked("soft", 8, 1, "minmax")
    return order


def schedule_of(task, plan, temperature):
    """The mask of each step of an arm; the hard arm has the dense steps and budgets of the soft one."""
    share = {"dense": 1.0, "hard": plan.dense_share, "soft": plan.dense_share}[task.arm]
    width = HARD if task.arm == "hard" else temperature
    return SoftMaskSchedule(temperature=width, budget=plan.budgets, dense_share=share, seed=task.seed)


_DEVICE = []


def _claim(devices):
    """Start of a worker process: takes a device for good."""
    _DEVICE[:] = [torch.device(devices.get())]
    if _DEVICE[0].type == "cuda":
        torch.cuda.set_device(_DEVICE[0])
    else:
        torch.set_num_threads(1)


@functools.cache
def _tokenizer(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def run_task(task, preset, options):
    """Trains and evaluates one arm in a worker process.

    Returns:
        `list[dict]`: A record per evaluation; empty if the time left would not have been enough.
    """
    from transformers import AutoModelForCausalLM

    if time.time() + options["estimate"] > options["deadline"]:
        return []
    began = time.monotonic()
    print(f"== {task.name} on {_DEVICE[0]}", flush=True)
    torch.manual_seed(task.seed)
    model = AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=torch.float32, attn_implementation="unique"
    ).to(_DEVICE[0])
    tokenizer = _tokenizer(options["model"])
    settings = {"page_size": task.page_size, "score": task.score, "budget": preset.plan.budgets[1]}
    unique_hf.configure(model, **settings)
    training = None
    if task.arm != "start":
        schedule = schedule_of(task, preset.plan, options["temperature"])
        training = train(model, preset.plan, schedule, options["batches"][task.seed])
        training["schedule"] = asdict(schedule)
    if _DEVICE[0].type == "cuda":
        model = model.to(torch.bfloat16)  # what ships is what is measured
    model.eval()
    if task.arm == "soft":
        unique_hf.configure(model, budget=min(SHIPPED_BUDGET, preset.plan.budgets[1]))
        _save(model, tokenizer, options["state"] / task.name)
    records = _evaluations(task, model, tokenizer, preset, options["split"])
    for record in records:
        record.update(training=training, seconds=round(time.monotonic() - began, 1))
    return records


def _evaluations(task, model, tokenizer, preset, split):
    records, dense = [], []
    bits = bits_per_byte(model, tokenizer, length=min(2048, preset.cells[0].length), windows=8)
    for page_size, score in task.evaluations:
        settings = {"page_size": page_size, "score": score}
        wanted = [cell for cell in preset.cells if cell.budget is not None or not dense]
        rows = evaluate(
            model, tokenizer, wanted, preset.sizes, settings=settings, rows_at_once=preset.rows, split=split
        )
        # dense rows do not depend on the settings: measured once per model
        dense = dense or [row for row in rows if row["budget"] is None]
        rows = dense + [row for row in rows if row["budget"] is not None]
        mass = recall(model, tokenizer, *preset.recall_cell, settings, split)
        record = {"task": task.name, "arm": task.arm, "seed": task.seed, "page_size": page_size, "score": score}
        record.update(cells=rows, recall=mass, bits_per_byte=bits)
        records.append(record)
        shown = {f"{row['length']}/{row['budget'] or 'dense'}": round(row["accuracy"], 3) for row in rows}
        print(f"== {task.name} page {page_size} {score}: recall {mass:.3f} {shown}", flush=True)
    return records


def _save(model, tokenizer, folder):
    model.save_pretrained(folder, max_shard_size="14MB")
    tokenizer.save_pretrained(folder)


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


def earlier(file, preset, temperature, split):
    """Records of an earlier call, which must have trained by the same plan."""
    found = json.loads(file.read_text())
    plan = json.loads(json.dumps(asdict(preset.plan)))
    if (found["plan"], found["temperature"], found["split"]) != (plan, list(temperature), split):
        raise ValueError(
            f"expected results of the same plan to resume, {file} has {found['plan']} at {found['temperature']}, not "
            f"{plan} at {list(temperature)}, or another split: leave --resume out, or give the options of that call"
        )
    return found["records"]


def write(out, preset, records, options):
    """Writes everything so far to `OUT/arms.json`."""
    results = {
        "environment": options["environment"],
        "revision": options["revision"],
        "plan": asdict(preset.plan),
        "temperature": options["temperature"],
        "split": options["split"],
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


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="h200")
    parser.add_argument("--model", type=Path, default=START, help="where all arms start")
    parser.add_argument("--out", type=Path, required=True, help="arms.json and the checkpoints to ship go here")
    parser.add_argument("--state", type=Path, default=Path("build/soft_mask_sft"), help="batches, text, checkpoints")
    parser.add_argument("--minutes", type=float, default=1e6, help="no arm starts that would not end by then")
    parser.add_argument("--estimate", type=float, default=110, help="seconds an arm is expected to take")
    parser.add_argument(
        "--arms", nargs="+", help="only these, by name (soft-p16-s0, dense-s0, ...), in the usual order"
    )
    parser.add_argument("--resume", type=Path, help="arms.json of an earlier call: its arms are kept, not run again")
    parser.add_argument("--ship", nargs="*", default=["soft-p16-s0", "soft-p8-s0"], help="checkpoints to copy to OUT")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--rate", type=float, help="share of the learning rates of the first training")
    parser.add_argument("--temperature", type=float, nargs=2, default=(0.5, 0.08), help="first and last, in logits")
    parser.add_argument("--dense-share", type=float, help="share of dense steps")
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="facts asked; tune on the first"
    )
    parser.add_argument("--revision", default="unknown", help="git revision to note in the results")
    return parser.parse_args()


def main():
    """Builds batches, runs the arms on all devices, writes results after each."""
    began, args = time.time(), parse_args()
    preset = PRESETS[args.preset]
    changes = {name: value for name in ("steps", "rate", "dense_share") if (value := getattr(args, name)) is not None}
    preset = replace(preset, plan=replace(preset.plan, **changes))
    wanted = tasks()
    if unknown := set(args.arms or ()) - {task.name for task in wanted}:
        raise ValueError(f"unknown arms {sorted(unknown)}; there are {', '.join(task.name for task in wanted)}")
    records = earlier(args.resume, preset, args.temperature, args.split) if args.resume else []
    done = {record["task"] for record in records}
    wanted = [task for task in wanted if task.name not in done and (not args.arms or task.name in args.arms)]
    args.out.mkdir(parents=True, exist_ok=True)
    args.state.mkdir(parents=True, exist_ok=True)
    seeds = sorted({task.seed for task in wanted if task.arm != "start"})
    batches = {seed: build_batches(preset.plan, seed, args.state, preset.text_bytes, preset.workers) for seed in seeds}
    options = {
        "model": args.model, "state": args.state, "batches": batches, "temperature": tuple(args.temperature),
        "split": args.split, "estimate": args.estimate, "deadline": began + 60 * args.minutes,
        "environment": environment(), "revision": args.revision,
    }  # fmt: skip
    print(f"{len(wanted)} arms, batches of {len(seeds)} seeds after {time.time() - began:.0f} s", flush=True)
    failed = _run_all(wanted, preset, options, records, args.out)
    for name in args.ship:
        ship(name, args.state, args.out)
    if failed:
        raise SystemExit(f"{len(failed)} arms failed: {', '.join(failed)}")


def _run_all(wanted, preset, options, records, out):
    context = multiprocessing.get_context("spawn")
    cuda = torch.cuda.is_available()
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else ["cpu"]
    devices = context.Queue()
    for name in names:
        devices.put(name)
    failed = []
    with ProcessPoolExecutor(len(names), mp_context=context, initializer=_claim, initargs=(devices,)) as pool:
        futures = {pool.submit(run_task, task, preset, options): task for task in wanted}
        for future in as_completed(futures):
            task, error = futures[future], future.exception()
            if error is not None:
                failed.append(task.name)
                print(f"== {task.name} FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            records += future.result()
            if not future.result():
                print(f"== {task.name}: no time left", flush=True)
            write(out, preset, records, options)
    return failed


if __name__ == "__main__":
    main()
