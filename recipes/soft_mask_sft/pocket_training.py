"""Training of the pocket model's arms: batches built once, so that every arm sees the same data in the same order."""

import math
import multiprocessing
import os
import random
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import unique_hf
from recipes.pocket_lm.batches import KIND_NAMES, TEXT, Batches, Spec
from recipes.pocket_lm.model import BatchedMuon
from recipes.pocket_lm.tokenizer import load_tokenizer
from recipes.pocket_lm.train import losses, text_ids
from unique_hf.schedule import SoftMaskSchedule, softmax_scale_of

ROW_KINDS = {"pure": 0.1, "hay": 0.75, "text": 0.15}  # those of the last stage of the pocket model
TEXT_WEIGHT = 0.2
MUON_RATE, ADAM_RATE = 0.02, 2e-3  # peaks of the first training; arms use a share of them
_BATCHES = []


@dataclass(frozen=True)
class Plan:
    """How an arm trains; `lengths` and `dense_lengths` map row length to the share of masked and of dense steps."""

    steps: int
    tokens: int
    lengths: dict
    dense_lengths: dict
    budgets: tuple  # least and most tokens kept
    dense_share: float = 0.5
    temperature: tuple = (0.5, 0.08)  # of the mask, first and last, in logits
    rate: float = 0.1  # share of the rates of the first training
    warmup: int = 10
    # about twice the norm of a dense step: Muon's momentum averages gradients, and one masked step of a larger norm
    # would decide alone where the next twenty updates go
    clip: float = 0.1
    mix: float = 1.0  # the result is start + mix (trained - start), weight by weight


def spec_of(plan, seed, step):
    """What the batch of a step is made of; the same for all arms, also for those that train this step otherwise."""
    dense = SoftMaskSchedule(dense_share=plan.dense_share, seed=seed).is_dense(step)
    lengths = plan.dense_lengths if dense else plan.lengths
    [length] = random.Random(f"lengths/{seed}/{step}").choices(list(lengths), list(lengths.values()))
    return Spec(length=length, rows=max(1, plan.tokens // length), mix=ROW_KINDS, alphabet=4095)


def _build(plan, seed, step):
    ids, kinds = _BATCHES[0].build(spec_of(plan, seed, step), (seed, 1, step))
    return ids.astype(np.uint16), kinds


def batches_file(plan, seed, folder):
    """Where the batches of a seed lie; plans that draw the same batches share the file."""
    key = zlib.crc32(repr((plan.steps, plan.tokens, plan.lengths, plan.dense_lengths, plan.dense_share)).encode())
    return folder / f"batches_{seed}_{key:08x}.npz"


def build_batches(plan, seed, folder, text_bytes, workers):
    """Writes all batches of a seed to `folder` and returns the file; a file that is there is kept.

    Args:
        plan (`Plan`): Steps and shapes.
        seed (`int`): Of the data.
        folder (`Path`): Also caches the text.
        text_bytes (`int`): How much of the machine's text to use.
        workers (`int`): Processes.
    """
    file = batches_file(plan, seed, folder)
    if file.exists():
        return file
    tokenizer = load_tokenizer()
    ids = text_ids(tokenizer, text_bytes, folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _BATCHES[:] = [Batches(tokenizer, ids)]  # forked workers share it
    arrays = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        steps = range(plan.steps)
        for step, pair in zip(steps, pool.map(_build, [plan] * plan.steps, [seed] * plan.steps, steps)):
            arrays[f"ids{step}"], arrays[f"kinds{step}"] = pair
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    return partial.replace(file)


@torch.no_grad()
def mixed(model, start, trained, factor):
    """Sets the weights of `model` between those of two others; nothing is trained.

    Equation: w = start + factor (trained - start).

    Args:
        model (`PreTrainedModel`): Its parameters are written, in their own dtype.
        start (`dict`), trained (`dict`): Parameters by name, fp32.
        factor (`float`): 0 is the start, 1 what was trained.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(start[name].lerp(trained[name], factor))


def _optimizers(model, rate):
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    return [(BatchedMuon(matrices), MUON_RATE * rate), (adam, ADAM_RATE * rate)]


def _rate(step, plan):
    """Short warm-up, constant for a third, then linear to 5 %."""
    return min(1.0, (step + 1) / plan.warmup, max(0.05, 1.0 - 0.95 * (step / plan.steps - 0.33) / 0.67))


def train(model, plan, schedule: SoftMaskSchedule, batches, *, log_every=10):
    """Trains `model` in place, fp32 weights under bf16 autocast on a GPU.

    Args:
        model (`PreTrainedModel`): With attn_implementation="unique" and its settings.
        plan (`Plan`): Steps, shapes, rates.
        schedule (`SoftMaskSchedule`): The mask of each step.
        batches (`Path`): From `build_batches`.
    Returns:
        `dict`: Seconds, seconds per step by mode, rows through the soft mask, and the curve.
    Raises:
        FloatingPointError: loss or gradient is not finite.
    """
    device, data = model.device, np.load(batches)
    base, scale = unique_hf.configure(model), softmax_scale_of(model)
    optimizers, curve, waits = _optimizers(model, plan.rate), [], {True: [], False: []}
    unique_hf.report(model, reset=True)
    model.train()
    start = time.monotonic()
    for step in range(plan.steps):
        began = time.monotonic()
        ids = torch.from_numpy(data[f"ids{step}"].astype(np.int64)).to(device)
        kinds = torch.from_numpy(data[f"kinds{step}"]).to(device)
        settings = schedule.settings(step, plan.steps, base, scale, most=(ids.shape[1] - 1) // 4)
        unique_hf.configure(
            model, **{name: getattr(settings, name) for name in ("temperature", "budget", "soft_mask")}
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(ids[:, :-1], use_cache=False).logits
        # outside autocast, which would count hits in 16 bits
        loss, stats = losses(logits, ids[:, 1:], kinds[:, 1:], TEXT_WEIGHT)
        loss.backward()
        del logits
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * _rate(step, plan)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        # one wait for the device a step
        loss, norm, *stats = torch.cat([torch.stack([loss.detach(), norm]), stats.flatten()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}; settings {settings}")
        waits[settings.soft_mask].append(time.monotonic() - began)
        row = {"step": step, "length": ids.shape[1] - 1, "budget": settings.budget, "soft": settings.soft_mask}
        row.update(temperature=settings.temperature * scale, loss=loss, norm=norm, text=stats[TEXT])
        row.update({name: stats[len(KIND_NAMES) + i] for i, name in enumerate(KIND_NAMES) if name in ("fact", "rest")})
        curve.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        if step % log_every == 0 or step == plan.steps - 1:
            print(" ".join(f"{key} {value}" for key, value in curve[-1].items()), flush=True)
    model.eval()
    unique_hf.configure(model, **{name: getattr(base, name) for name in ("temperature", "budget", "soft_mask")})
    return {
        "seconds": round(time.monotonic() - start, 1),
        "seconds_per_step": {("soft" if soft else "dense"): _median(waits[soft]) for soft in waits},
        "soft_rows": unique_hf.report(model, reset=True).soft_rows,
        "curve": curve[:: max(1, plan.steps // 50)] + curve[-1:],
    }


def _median(values):
    return round(sorted(values)[len(values) // 2], 4) if values else None
