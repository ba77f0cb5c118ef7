"""Trains the pocket model from scratch: text, batches, curriculum, checkpoint, evaluation and card in one process.

    python -m recipes.pocket_lm.train --preset h200 --minutes 8 --out OUT        # one H200
    python -m recipes.pocket_lm.train --preset smoke --out OUT                   # seconds on two CPU cores

`--resume` continues from the state kept in `--state`; with more `--minutes` the learning rate comes back accordingly.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.pocket_lm import curriculum, publish
from recipes.pocket_lm.batches import END_ID, KIND_NAMES, TEXT, Batches
from recipes.pocket_lm.model import BatchedMuon, PocketLM, Shape
from recipes.pocket_lm.text import collect_text
from recipes.pocket_lm.tokenizer import load_tokenizer

PROCESS_START = time.monotonic()
KIND_WEIGHTS = (0.0, None, 0.5, 1.0, 1.0, 0.5)  # as KIND_NAMES; that of text is the stage's
PRESETS = {
    "h200": {"stages": curriculum.h200, "shape": Shape(), "tokens": 131072, "minutes": 8.0, "text": 64 << 20,
             "workers": 13, "lengths": [1024, 4096, 8192, 16384, 32768], "contexts": 4, "warmup": 20},
    "smoke": {"stages": curriculum.smoke, "tokens": 1024, "minutes": 0.15, "text": 1 << 20, "workers": 1,
              "lengths": [512], "contexts": 1, "warmup": 2,
              "shape": Shape(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, head_dim=16, max_position_embeddings=2048)},
}  # fmt: skip
_WORKER = {}


def text_ids(tokenizer, max_bytes, cache):
    """Token ids of the machine's text, shuffled by document, kept in `cache` for the next call."""
    file = cache / f"text_{max_bytes}.npy"
    if file.exists():
        return np.load(file)
    documents = collect_text(max_bytes)
    random.Random(0).shuffle(documents)
    encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    ids = np.concatenate([np.array([*e.ids, END_ID], np.uint16) for e in encoded])
    cache.mkdir(parents=True, exist_ok=True)
    np.save(file, ids)
    return ids


def _build(spec, seed):
    return _WORKER["batches"].build(spec, seed)


class Loader:
    """Batches built ahead by worker processes, forked before CUDA starts; a pure function of the step."""

    def __init__(self, batches, workers, tokens, seed):
        self.tokens, self.seed, self.ahead = tokens, seed, 2 * workers + 1
        self.queue, self.stage = deque(), None
        _WORKER["batches"] = batches
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
        self.pool.submit(_build, curriculum.smoke()[0].spec(256, 0.9), 0).result()  # forks all workers now

    def _submit(self, stage, step):
        spec = stage.spec(self.tokens, random.Random(f"{self.seed}/{step}").random())
        self.queue.append((step, spec, self.pool.submit(_build, spec, (self.seed, step))))

    def next(self, stage, step):
        """`(spec, ids, kinds)` of this step."""
        if stage is not self.stage:
            for _, _, future in self.queue:
                future.cancel()
            self.queue.clear()
            self.stage = stage
        while len(self.queue) < self.ahead:
            self._submit(stage, self.queue[-1][0] + 1 if self.queue else step)
        _, spec, future = self.queue.popleft()
        return spec, *future.result()


def fastest_backend(length, shape, tokens):
    """Flash or cuDNN attention, whichever is faster at this length, if their gradients agree."""
    torch.manual_seed(0)
    rows, found = max(1, tokens // length), {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
        generator = torch.Generator("cuda").manual_seed(0)
        leaves = [
            torch.randn(rows, length, h, shape.head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
            for h in heads
        ]
        try:
            for _ in range(3):
                inputs = [leaf.detach().requires_grad_() for leaf in leaves]
                torch.cuda.synchronize()
                start = time.perf_counter()
                with sdpa_kernel(backend):
                    q, k, v = (x.transpose(1, 2) for x in inputs)
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    out.backward(out.detach() * 2)
                torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"attention at {length}: {backend.name} unavailable: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        found[backend] = (time.perf_counter() - start, [out.detach(), *(x.grad for x in inputs)])
    best = SDPBackend.FLASH_ATTENTION
    if len(found) == 2:
        flash, cudnn = found[SDPBackend.FLASH_ATTENTION], found[SDPBackend.CUDNN_ATTENTION]
        error = max(((a - b).norm() / a.norm()).item() for a, b in zip(flash[1], cudnn[1]))
        print(
            f"attention at {length}: flash {flash[0]:.4f} s, cudnn {cudnn[0]:.4f} s, differ by {error:.4f}", flush=True
        )
        best = SDPBackend.CUDNN_ATTENTION if cudnn[0] < 0.95 * flash[0] and error < 0.02 else best
    return [best, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def losses(logits, targets, kinds, text_weight):
    """Weighted loss and statistics: every kind is a mean over its tokens, so rare answers weigh as much as text.

    Returns:
        `(loss, stats)`; `stats` is `[2, 6]`: per kind the mean loss and the accuracy, NaN where a kind is absent.
    """
    weights = torch.tensor([text_weight if w is None else w for w in KIND_WEIGHTS], device=logits.device)
    flat = kinds.flatten().long()
    values = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    members = F.one_hot(flat, len(KIND_NAMES)).float()
    counts = members.sum(0)
    present = (counts > 0) & (weights > 0)
    per_token = torch.where(present, weights / counts.clamp(min=1), 0.0)[flat]
    loss = (values * per_token).sum() / (weights * present).sum()
    with torch.no_grad():
        hits = (logits.argmax(-1) == targets).flatten().float()
        sums = torch.stack([values.detach(), hits]) @ members
    return loss, sums / counts


class Trainer:
    """Model, optimizers, curriculum position and log; everything that a later call needs is in `state()`."""

    def __init__(self, args, preset, loader, device):
        torch.manual_seed(args.seed)
        self.args, self.preset, self.loader, self.device = args, preset, loader, device
        self.model = PocketLM(preset["shape"]).to(device)
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "embed" in name]
        adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
        self.optimizers = [(BatchedMuon(matrices), 0.02), (adam, 2e-3)]
        self.stages = preset["stages"]()
        self.step, self.stage_index, self.stage_step, self.elapsed = 0, 0, 0, 0.0
        self.skipped, self.snapshot, self.damping = 0, None, 1.0
        self.log = {"stages": [], "curve": [], "skipped_steps": 0, "restored": 0, "calls": []}
        self.recent = deque(maxlen=10)
        self.attention = {}
        if device.type == "cuda":
            short, long = (fastest_backend(n, preset["shape"], preset["tokens"]) for n in (256, 8192))
            self.attention = {False: short, True: long}

    def state(self):
        """Everything needed to go on in another process."""
        keys = ("step", "stage_index", "stage_step", "elapsed", "damping", "log")
        state = {key: getattr(self, key) for key in keys}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        return state

    def load(self, state):
        """Takes over a saved state."""
        self._load_weights(state)
        for key in ("step", "stage_index", "stage_step", "elapsed", "damping", "log"):
            setattr(self, key, state[key])

    def start_from(self, folder):
        """Takes over exported weights and goes straight to the last stage."""
        from transformers import AutoModelForCausalLM

        self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).float().model.state_dict())
        self.stage_index = len(self.stages) - 1

    def _load_weights(self, state):
        self.model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def learning_rate(self, fraction):
        """Share of the peak: short warm-up, constant to 60 % of the time, then linear to 5 %."""
        warmup = min(1.0, (self.step + 1) / self.preset["warmup"])
        return warmup * self.damping * min(1.0, max(0.05, 1.0 - 0.95 * (fraction - 0.6) / 0.4))

    def train_step(self, fraction):
        """One update; returns statistics, or `None` if the step was dropped because it was not finite."""
        stage = self.stages[self.stage_index]
        spec, ids, kinds = self.loader.next(stage, self.step)
        ids = torch.from_numpy(ids).to(self.device, non_blocking=True).long()
        kinds = torch.from_numpy(kinds).to(self.device, non_blocking=True)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        attention = self.attention.get(spec.length >= 2048)
        with sdpa_kernel(attention, set_priority=True) if attention else contextlib.nullcontext():
            logits = self.model(ids[:, :-1], dtype)
            loss, stats = losses(logits, ids[:, 1:], kinds[:, 1:], stage.text_weight)
            loss.backward()
        del logits
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        loss, norm, *stats = torch.cat([torch.stack([loss.detach(), norm]), stats.flatten()]).tolist()
        rate = self.learning_rate(fraction)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for optimizer, peak in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        self._guard(finite)
        count = len(KIND_NAMES)
        row = {"length": spec.length, "loss": loss, "norm": norm, "rate": rate, "text": stats[TEXT]}
        row.update({name: stats[count + i] for i, name in enumerate(KIND_NAMES) if i > TEXT})
        return row if finite else None

    def _guard(self, finite):
        """Keeps a snapshot of good weights; ten bad steps in a row bring it back at half the rate."""
        if finite:
            self.skipped = 0
            if self.step % 200 == 0:
                torch.save(self.state(), self.args.state / "snapshot.pt")
                self.snapshot = self.args.state / "snapshot.pt"
            return
        self.skipped += 1
        self.log["skipped_steps"] += 1
        print(f"step {self.step}: loss or gradient not finite, step dropped", flush=True)
        if self.skipped >= 10 and self.snapshot:
            self._load_weights(torch.load(self.snapshot, map_location=self.device, weights_only=False))
            self.skipped, self.damping = 0, self.damping / 2
            self.log["restored"] += 1
            print(f"step {self.step}: weights of the last snapshot restored, rate halved", flush=True)

    def advance(self, row, fraction, tokens_seen):
        """Goes to the next stage when the gates pass or the deadline is over."""
        stage = self.stages[self.stage_index]
        if row["length"] == stage.length:
            self.recent.append(row)
        last = self.stage_index == len(self.stages) - 1
        means = {kind: _nan_mean([r[kind] for r in self.recent]) for kind in KIND_NAMES[TEXT + 1 :]}
        full = len(self.recent) == min(10, stage.min_steps)
        passed = full and all(means[kind] is not None and means[kind] >= gate for kind, gate in stage.gates.items())
        if last or self.stage_step < stage.min_steps or not (passed or fraction >= stage.deadline):
            return
        self.finish_stage(means, passed, tokens_seen)
        self.stage_index, self.stage_step = self.stage_index + 1, 0
        self.recent = deque(maxlen=min(10, self.stages[self.stage_index].min_steps))

    def finish_stage(self, means, passed, tokens_seen):
        """One row of the log per stage."""
        stage = self.stages[self.stage_index]
        row = {"stage": stage.name, "length": stage.length, "steps": self.stage_step, "passed": passed}
        row.update(end_step=self.step, end_seconds=round(self.elapsed, 1), tokens=tokens_seen, accuracy=means)
        self.log["stages"].append(row)
        shown = {kind: round(value, 3) for kind, value in means.items() if value is not None}
        print(f"== {stage.name}: {'passed' if passed else 'ENDED'} at {self.elapsed:.0f} s {shown}", flush=True)

    def run(self, total_seconds, stop_at):
        """Trains until `total_seconds` of training in all calls, or until the clock shows `stop_at`."""
        start, before, saved = time.monotonic(), self.elapsed, time.monotonic()
        while self.elapsed < total_seconds and time.monotonic() < stop_at:
            fraction = self.elapsed / total_seconds
            row = self.train_step(fraction)
            self.elapsed = before + time.monotonic() - start
            tokens = self.step * self.preset["tokens"]
            if row is None:
                continue
            if self.step % 10 == 0 or self.step <= 3:
                self._report(row, tokens)
            self.advance(row, self.elapsed / total_seconds, tokens)
            if time.monotonic() - saved > 120:
                torch.save(self.state(), self.args.state / "state.pt")
                saved = time.monotonic()
        means = {kind: _nan_mean([r[kind] for r in self.recent]) for kind in KIND_NAMES[TEXT + 1 :]}
        self.finish_stage(means, self.elapsed >= total_seconds, self.step * self.preset["tokens"])
        self.log["calls"].append({"seconds": round(self.elapsed - before, 1), "steps": self.step})
        torch.save(self.state(), self.args.state / "state.pt")

    def _report(self, row, tokens):
        shown = {key: round(value, 4) for key, value in row.items() if not math.isnan(value)}
        shown = {"step": self.step, "seconds": round(self.elapsed, 1), **shown}
        self.log["curve"].append(shown)
        print(" ".join(f"{key} {value:g}" for key, value in shown.items()), flush=True)


def _nan_mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else None


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="h200")
    parser.add_argument("--out", type=Path, required=True, help="weights, tokenizer, card and log go here")
    parser.add_argument("--state", type=Path, default=Path("build/pocket_lm"), help="resumable state and token cache")
    parser.add_argument("--minutes", type=float, help="training time over all calls; sets the schedule")
    parser.add_argument("--call-minutes", type=float, default=1e9, help="this call saves and ends by then")
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument("--init", type=Path, help="start the last stage from the weights of an earlier --out")
    parser.add_argument("--pack", action="store_true", help="put the small files of the checkpoint into OUT/meta.tar")
    parser.add_argument("--workers", type=int, help="processes that build batches")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    """Text, training, export, evaluation, card."""
    args = parse_args()
    preset = PRESETS[args.preset]
    if args.minutes:
        preset = {**preset, "minutes": args.minutes}
    args.state.mkdir(parents=True, exist_ok=True)
    saved = args.state / "state.pt"
    if args.resume and not saved.exists():
        raise FileNotFoundError(f"--resume needs {saved}, which an earlier call with the same --state writes")
    tokenizer = load_tokenizer()
    ids = text_ids(tokenizer, preset["text"], args.state)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loader = Loader(Batches(tokenizer, ids), args.workers or preset["workers"], preset["tokens"], args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(args, preset, loader, device)
    if args.resume:
        trainer.load(torch.load(saved, map_location=device, weights_only=False))
    elif args.init:
        trainer.start_from(args.init)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {len(ids) / 1e6:.1f} M text tokens, set up in "
        f"{time.monotonic() - PROCESS_START:.0f} s",
        flush=True,
    )
    # the rest of the call is for export and evaluation
    trainer.run(preset["minutes"] * 60, PROCESS_START + args.call_minutes * 60 - 75)
    loader.pool.shutdown(cancel_futures=True)
    facts = {
        "preset": args.preset,
        "seed": args.seed,
        "parameters": parameters,
        "shape": asdict(preset["shape"]),
        "tokens": trainer.step * preset["tokens"],
        "steps": trainer.step,
        "training_seconds": round(trainer.elapsed, 1),
        "scheduled_seconds": preset["minutes"] * 60,
        "text_tokens": len(ids),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "log": trainer.log,
    }
    publish.save(trainer.model, args.out, facts, preset["lengths"], preset["contexts"], device)
    if args.pack:
        publish.pack(args.out, publish.SMALL_FILES)
    print(json.dumps(facts["evaluation"]["summary"]), flush=True)


if __name__ == "__main__":
    main()
