"""What the arms of the experiment are, and how a worker process trains and measures one."""

import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import unique_hf
from recipes.pocket_lm.evaluate import bits_per_byte
from recipes.soft_mask_sft.pocket_quality import Cell, evaluate, recall
from recipes.soft_mask_sft.pocket_training import Plan, batches_file, build_batches, mixed, train
from unique_hf.schedule import SoftMaskSchedule

START = Path(__file__).parents[2] / "models/pocket-lm"
HARD = (1e-4, 1e-4)  # in logits: every gate is open or shut, no gradient reaches the scores
SHIPPED_BUDGET = 512
# page size and score of every evaluation of models that were trained without a mask
GRID = (*((page, "scalar") for page in (16, 8, 4)), *((page, "minmax") for page in (16, 8)))


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
    tuning_cells: tuple  # asked on validation facts, while a plan is being chosen
    tuning_sizes: dict


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
        *(Cell(16384, budget) for budget in (128, 4096)),
        *(Cell(8192, budget) for budget in (None, 256)),
        *(Cell(32768, budget) for budget in (None, 512, 1024)),
        *(Cell(1024, budget) for budget in (None, 128)),
    ),
    sizes={1024: (16, 8), 8192: (8, 32), 16384: (8, 64), 32768: (8, 64)},
    rows={1024: 128, 8192: 256, 16384: 256, 32768: 128},
    recall_cell=(16384, 512),
    tuning_cells=(
        *(Cell(length, None) for length in (1024, 8192, 16384, 32768)),
        *(Cell(16384, budget) for budget in (256, 512)),
        Cell(32768, 1024),
    ),
    tuning_sizes={1024: (16, 8), 8192: (8, 32), 16384: (8, 64), 32768: (4, 64)},
)
SMOKE = Preset(
    plan=Plan(steps=3, tokens=512, lengths={256: 0.5, 128: 0.5}, dense_lengths={256: 1.0}, budgets=(64, 96), warmup=1),
    text_bytes=1 << 20,
    workers=1,
    cells=(Cell(512, None), Cell(512, 96), Cell(768, 96)),
    sizes={512: (2, 3), 768: (1, 3)},
    rows={512: 6, 768: 3},
    recall_cell=(512, 96),
    tuning_cells=(Cell(512, None), Cell(512, 96)),
    tuning_sizes={512: (1, 3)},
)
PRESETS = {"h200": H200, "smoke": SMOKE}
HALF = {"tokens": 32768, "steps": 300}
# masked rows as long as the model goes and budgets around 3 % of 16k, for the price of the preset's plan
LONG = {"steps": 200, "lengths": {32768: 0.2, 16384: 0.5, 8192: 0.3}, "budgets": (256, 1024)}
SHARP = {"temperature": (0.5, 0.02)}
# by name, what differs from the preset's plan
SCHEDULES = {
    "plan": {},
    "half": HALF,
    "wide": {"temperature": (1.0, 0.15)},
    "half-rate2": {**HALF, "rate": 0.2},
    "half-wide": {**HALF, "temperature": (1.0, 0.15)},
    "unclipped": {"clip": 1.0},
    "half-dense7": {**HALF, "dense_share": 0.7},
    "half-slow": {**HALF, "rate": 0.05},
    "sharp": SHARP,
    "long": LONG,
    "long-sharp": {**LONG, **SHARP},
    "long-sharp-clip5": {**LONG, **SHARP, "clip": 0.5},
    "long-clip5": {**LONG, "clip": 0.5},
    "long-wide-clip5": {**LONG, "temperature": (1.0, 0.15), "clip": 0.5},
}
# what the smoke preset keeps
SIZES = ("tokens", "steps", "lengths", "dense_lengths", "budgets")


def scheduled(preset, schedule):
    """A preset with the plan of a schedule, and its cells marked accordingly; the smoke preset keeps its sizes.

    Args:
        preset (`str`): One of `PRESETS`.
        schedule (`str`): One of `SCHEDULES`.
    """
    base, changes = PRESETS[preset], SCHEDULES[schedule]
    if preset == "smoke":
        changes = {name: value for name, value in changes.items() if name not in SIZES}
    plan = replace(base.plan, **changes)
    cells = tuple(replace(cell, trained=_met(cell, plan)) for cell in base.cells)
    return replace(base, plan=plan, cells=cells)


def _met(cell, plan):
    """Whether training has rows of that length, and, below a budget, the mask with one like it."""
    if cell.budget is None:
        return cell.length in {**plan.lengths, **plan.dense_lengths}
    return cell.length in plan.lengths and plan.budgets[0] <= cell.budget <= plan.budgets[1]


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
        if self.arm == "dense":
            return f"{self.arm}-s{self.seed}"
        score = "" if self.score == "scalar" else f"-{self.score}"
        return f"{self.arm}-p{self.page_size}{score}-s{self.seed}"


def tasks():
    """All arms, the most telling first; the start in front compiles kernels while others train."""
    order = []

    def masked(arm, page, seed, score="scalar"):
        order.append(Task(arm, seed, ((page, score),), page, score))

    masked("start", 16, 0)
    masked("start", 8, 0)
    masked("soft", 16, 0)
    masked("soft", 8, 0)
    order.append(Task("dense", 0, GRID))
    masked("hard", 16, 0)
    masked("hard", 8, 0)
    for page, score in GRID[2:]:
        masked("start", page, 0, score)
    masked("soft", 16, 0, "minmax")
    masked("soft", 4, 0)
    masked("soft", 16, 1)
    masked("soft", 8, 1)
    order.append(Task("dense", 1, GRID))
    masked("hard", 16, 1)
    masked("hard", 8, 1)
    masked("soft", 16, 1, "minmax")
    masked("soft", 4, 1)
    for seed in (0, 1):
        masked("hard", 4, seed)
        masked("soft", 8, seed, "minmax")
    return order


def schedule_of(task, plan):
    """The mask of each step of an arm; the hard arm has the dense steps and budgets of the soft one."""
    share = {"dense": 1.0, "hard": plan.dense_share, "soft": plan.dense_share}[task.arm]
    width = HARD if task.arm == "hard" else plan.temperature
    return SoftMaskSchedule(temperature=width, budget=plan.budgets, dense_share=share, seed=task.seed)


class Workers:
    """Processes that own a GPU each, or share it, and one that builds batches meanwhile.

    Args:
        per_gpu (`int`): Processes per GPU; while one trains, another one compiles or decodes.
    """

    def __init__(self, per_gpu):
        context = multiprocessing.get_context("spawn")
        cuda = torch.cuda.is_available()
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else ["cpu"]
        devices = context.Queue()
        for name in names * per_gpu:
            devices.put(name)
        self.pool = ProcessPoolExecutor(
            len(names) * per_gpu, mp_context=context, initializer=_claim, initargs=(devices,)
        )
        self.builder = ProcessPoolExecutor(1, mp_context=context)

    def submit(self, jobs, function, options):
        """Futures of `function(task, preset, options)`; the first jobs without training run while batches are built.

        Args:
            jobs (`list`): Pairs of `Task` and `Preset`.
        Returns:
            `dict`: Future to the job's place in `jobs`.
        """
        built = {}
        for index, (task, preset) in enumerate(jobs):
            if task.arm != "start":
                arguments = (preset.plan, task.seed, options["state"], preset.text_bytes, preset.workers)
                built[index] = self.builder.submit(build_batches, *arguments)
        futures = {}
        for index, job in enumerate(jobs):
            if index in built:
                built[index].result()
            futures[self.pool.submit(function, *job, options)] = index
        return futures

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.builder.shutdown(cancel_futures=True)
        self.pool.shutdown(cancel_futures=True)


_DEVICE = []


def _claim(devices):
    """Start of a worker process: takes a device for good."""
    _DEVICE[:] = [torch.device(devices.get())]
    if _DEVICE[0].type == "cuda":
        torch.cuda.set_device(_DEVICE[0])
    else:
        torch.set_num_threads(1)


@functools.cache
def tokenizer_of(path):
    """The tokenizer of a folder, loaded once per process, so that haystacks are made once too."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def trained(task, preset, options):
    """Trains one arm in a worker process, or nothing where the task is the start.

    Returns:
        `tuple`: The model in the dtype that ships, ready for [`mixed`]; the weights before and after; facts of the
        training, or `None`.
    """
    print(f"== {task.name} on {_DEVICE[0]}", flush=True)
    torch.manual_seed(task.seed)
    settings = {"page_size": task.page_size, "score": task.score, "budget": preset.plan.budgets[1]}
    model = load(options["model"], torch.float32, _DEVICE[0], settings)
    start, training = weights_of(model), None
    if task.arm != "start":
        schedule = schedule_of(task, preset.plan)
        training = train(model, preset.plan, schedule, batches_file(preset.plan, task.seed, options["state"]))
        training["schedule"] = asdict(schedule)
    end = weights_of(model)
    if _DEVICE[0].type == "cuda":
        # what is measured is what a user loads
        model = load(options["model"], torch.bfloat16, _DEVICE[0], settings)
    release()
    return model.eval(), start, end, training


def load(path, dtype, device, settings):
    """A model in a dtype; `model.to(dtype)` would round the rotary frequencies too, which ruins long contexts.

    Args:
        path (`Path`): Checkpoint.
        dtype (`torch.dtype`): Of the parameters.
        device (`torch.device`): Where to.
        settings (`dict`): Of UNIQUE attention.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="unique").to(device)
    unique_hf.configure(model, **settings)
    return model


def weights_of(model):
    """A copy of the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def release():
    """Gives memory that no tensor uses back to the GPU, where others train."""
    if _DEVICE and _DEVICE[0].type == "cuda":
        torch.cuda.empty_cache()


def run_task(task, preset, options):
    """Trains and evaluates one arm in a worker process.

    Returns:
        `list[dict]`: A record per evaluation; empty if the time left would not have been enough.
    """
    if time.time() + options["estimate"] > options["deadline"]:
        return []
    began = time.monotonic()
    model, start, end, training = trained(task, preset, options)
    tokenizer = tokenizer_of(options["model"])
    mixed(model, start, end, preset.plan.mix)
    if task.arm == "soft":
        unique_hf.configure(model, budget=min(SHIPPED_BUDGET, preset.plan.budgets[1]))
        model.save_pretrained(options["state"] / task.name, max_shard_size="14MB")
        tokenizer.save_pretrained(options["state"] / task.name)
    records = _evaluations(task, model, tokenizer, preset, options["split"])
    for record in records:
        record.update(training=training, seconds=round(time.monotonic() - began, 1))
    release()
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
        print(f"== {task.name} page {page_size} {score}: recall {mass:.3f} {shown(rows)}", flush=True)
    return records


def shown(rows):
    """Accuracies of cells for a line of the log."""
    return {f"{row['length']}/{row['budget'] or 'dense'}": round(row["accuracy"], 3) for row in rows}
