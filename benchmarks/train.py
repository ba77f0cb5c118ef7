"""Soft-mask attention, forward and backward, against torch SDPA flash in the same run.

`python -m benchmarks.train` on a CUDA device checks the gradients against the reference, then writes
`benchmarks/results/train_h200.json`. `--profile` prints the time of every kernel, `--sweep` tries other launches,
`TRITON_INTERPRET=1 python -m benchmarks.train --smoke` runs a tiny case on a CPU.

How much is skipped depends on the data, so every row says which and which share of the tiles stayed open:
"random" is independent Gaussian numbers, where every tile holds open pages; "topics" is a text in passages, each about
one of 32 topics, whose queries ask for their own topic: what a trained model's heads look like to the mask.
Temperatures are in units of the page score: at head dim 128, 1.0 is 0.09 attention logits, where training schedules
end, and wider masks skip less.
"""

from __future__ import annotations

import argparse
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from benchmarks.environment import RESULTS, write_results
from unique_attention import reference, soft_mask


@dataclass(frozen=True)
class Shape:
    """One training problem."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """One soft mask."""

    page_size: int
    budget: int
    temperature: float
    data: str

    @property
    def arguments(self) -> dict:
        """Keyword arguments of `soft_mask_attention`."""
        return {
            "page_size": self.page_size, "num_kept": self.budget // self.page_size, "recent_pages": 2,
            "temperature": self.temperature,
        }  # fmt: skip


def inputs(shape: Shape, data: str, device: str) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads):
        return torch.randn(1, heads, shape.length, shape.head_dim, generator=generator, device=device)

    q, k, v, dout = random(shape.heads), random(shape.kv_heads), random(shape.kv_heads), random(shape.heads)
    if data == "topics":
        passage = max(32, shape.length // 256)
        topics = F.normalize(torch.randn(32, shape.head_dim, generator=generator, device=device), dim=-1)
        of_passage = torch.randint(32, (math.ceil(shape.length / passage),), generator=generator, device=device)
        topic = topics[of_passage].repeat_interleave(passage, 0)[: shape.length]
        # a topic alone gives q . k of about 3 sqrt(D), a logit of 3; the noise adds 1
        strength = (3 * shape.head_dim**0.5) ** 0.5
        q, k = q + strength * topic, k + strength * topic
    return [x.to(shape.dtype) for x in (q, k, v, dout)]


@contextmanager
def recorded_tiles():
    """Collects the maps of open tiles of the calls made inside."""
    seen = []
    select = soft_mask.select_tiles

    def spy(*args):
        seen.append(select(*args))
        return seen[-1]

    with mock.patch.object(soft_mask, "select_tiles", spy):
        yield seen


def open_share(q, k, v, setting: Setting) -> float:
    """Share of the causal tiles that the mask leaves open."""
    with recorded_tiles() as seen, torch.no_grad():
        soft_mask.soft_mask_attention(q, k, v, **setting.arguments)
    is_open = seen[0][1]
    rows, columns = is_open.shape[1:]
    block_t, block_s = math.ceil(q.shape[2] / rows), math.ceil(q.shape[2] / columns)
    causal = sum(((i + 1) * block_t - 1) // block_s + 1 for i in range(rows))
    return is_open.sum().item() / (is_open.shape[0] * min(causal, rows * columns))


def train_step(function, tensors):
    """Forward and backward; returns the output and the gradients of q, k, v."""
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def sdpa(q, k, v):
    """Dense causal attention, flash where there is a GPU."""
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def time_ms(function, tensors, repeats: int) -> dict[str, float]:
    """Median and spread (p90 - p10) of forward + backward, of the forward alone, and peak memory with the inputs."""
    if not torch.cuda.is_available():
        train_step(function, tensors)
        return {}
    times = {"ms": [], "forward_ms": []}
    for _ in range(2):
        train_step(function, tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated() - sum(x.numel() * x.element_size() for x in tensors)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for name, samples in times.items():
        for _ in range(repeats):
            events[0].record()
            if name == "ms":
                train_step(function, tensors)
            else:
                with torch.no_grad():
                    function(*tensors[:3])
            events[1].record()
            torch.cuda.synchronize()
            samples.append(events[0].elapsed_time(events[1]))
    result = {"peak_mib": (torch.cuda.max_memory_allocated() - base) / 2**20}
    for name, samples in times.items():
        samples.sort()
        result[name] = samples[len(samples) // 2]
        result[f"{name}_spread"] = samples[int(len(samples) * 0.9)] - samples[int(len(samples) * 0.1)]
    return {name: round(value, 4) for name, value in result.items()}


def check_accuracy(shape: Shape, setting: Setting, device: str) -> list[dict]:
    """Errors of output and gradients against the reference in float64, next to what is allowed; raises if exceeded."""
    tensors = inputs(shape, setting.data, device)
    wide = [x.double() for x in tensors]
    oracle = train_step(lambda q, k, v: reference.soft_mask_attention(q, k, v, **setting.arguments), wide)
    low = train_step(lambda q, k, v: reference.soft_mask_attention(q, k, v, **setting.arguments), tensors)
    got = train_step(lambda q, k, v: soft_mask.soft_mask_attention(q, k, v, **setting.arguments), tensors)
    rows = []
    for name, exact, eager, kernel in zip(("out", "dq", "dk", "dv"), oracle, low, got):
        allowed = 2 * (eager.double() - exact).abs().max() + torch.finfo(shape.dtype).eps * exact.abs().max()
        error = (kernel.double() - exact).abs().max()
        rows.append({"tensor": name, "error": error.item(), "allowed": allowed.item()})
        print(f"accuracy {setting} {name}: error {error:.3g}, allowed {allowed:.3g}", flush=True)
        if not error <= allowed:
            raise SystemExit(f"{name} is off by {error:.3g} (allowed {allowed:.3g}): no timing of wrong numbers.")
    return rows


def measure(shape: Shape, settings: list[Setting], device: str, repeats: int) -> list[dict]:
    """One dense row per kind of data, and one row per setting."""
    rows = []
    for data in dict.fromkeys(setting.data for setting in settings):
        tensors = inputs(shape, data, device)
        dense = time_ms(sdpa, tensors, repeats)
        rows.append({"length": shape.length, "data": data, "kind": "sdpa flash", **dense})
        print(rows[-1], flush=True)
        for setting in settings:
            if setting.data != data:
                continue
            call = lambda q, k, v, s=setting: soft_mask.soft_mask_attention(q, k, v, **s.arguments)  # noqa: E731
            row = {
                "length": shape.length, "data": data, "kind": "soft mask", "page_size": setting.page_size,
                "budget": setting.budget, "temperature": setting.temperature,
                "open_tiles": round(open_share(*tensors[:3], setting), 4), **time_ms(call, tensors, repeats),
            }  # fmt: skip
            if dense:
                row["time_vs_sdpa"] = round(row["ms"] / dense["ms"], 3)
                row["memory_vs_sdpa"] = round(row["peak_mib"] / dense["peak_mib"], 3)
            rows.append(row)
            print(row, flush=True)
    return rows


def profile(shape: Shape, setting: Setting, device: str) -> None:
    """Prints the device time of every kernel of one step."""
    tensors = inputs(shape, setting.data, device)
    call = lambda q, k, v: soft_mask.soft_mask_attention(q, k, v, **setting.arguments)  # noqa: E731
    train_step(call, tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        train_step(call, tensors)
        torch.cuda.synchronize()
    print(shape, setting, f"open {open_share(*tensors[:3], setting):.3f}")
    for event in sorted(prof.key_averages(), key=lambda e: -e.device_time_total)[:14]:
        print(f"  {event.device_time_total / 1e3:9.3f} ms  {event.count:3d} x  {event.key[:90]}", flush=True)


def sweep(shape: Shape, setting: Setting, device: str) -> None:
    """Prints forward + backward and forward time for other launches of this head dim and dtype."""
    tensors = inputs(shape, setting.data, device)
    key = (shape.head_dim, tensors[0].element_size())
    call = lambda q, k, v: soft_mask.soft_mask_attention(q, k, v, **setting.arguments)  # noqa: E731
    best = soft_mask.LAUNCH[key]
    tiles = [(64, 64, 4, 2), (64, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2)]
    trials = [best]
    trials += [best._replace(**{name: soft_mask.Tile(*tile)}) for name in ("fwd", "dq", "dkv") for tile in tiles]
    trials += [best._replace(step_rows=step) for step in (16, 32, 64)]
    for launch in trials:
        try:
            with mock.patch.dict(soft_mask.LAUNCH, {key: launch}):
                result = time_ms(call, tensors, 5)
        except OutOfResources as error:  # that a launch does not fit is a result of the sweep
            result = {"failed": f"{type(error).__name__}: {str(error)[:80]}"}
        print(launch, {name: value for name, value in result.items() if "spread" not in name}, flush=True)


def main() -> None:
    """Checks, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--pages", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--data", nargs="+", default=["topics", "random"], choices=["topics", "random"])
    parser.add_argument("--budget", type=int, default=1024, help="tokens kept per query")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS / "train_h200.json")
    parser.add_argument("--profile", action="store_true", help="print the time of every kernel instead")
    parser.add_argument("--sweep", action="store_true", help="try other launches at the first length instead")
    parser.add_argument("--smoke", action="store_true", help="a tiny case on the CPU, under the interpreter")
    args = parser.parse_args()
    device, dtype = ("cpu", torch.float32) if args.smoke else ("cuda", torch.bfloat16)
    if args.smoke:
        shapes, check = [Shape(96, 4, 2, 32, dtype)], Shape(64, 4, 2, 32, dtype)
        settings = [Setting(4, 32, 0.5, "topics")]
    else:
        shapes, check = [Shape(length) for length in args.lengths], Shape(2048)
        settings = [
            Setting(page, args.budget, temperature, data)
            for data in args.data for page in args.pages for temperature in args.temperatures
        ]  # fmt: skip
    if args.profile or args.sweep:
        for shape in shapes if args.profile else shapes[:1]:
            (profile if args.profile else sweep)(shape, settings[0], device)
        return
    accuracy = []
    for setting in settings:
        small = Setting(setting.page_size, min(setting.budget, check.length // 4), setting.temperature, setting.data)
        accuracy.append({**vars(small), "length": check.length, "errors": check_accuracy(check, small, device)})
    rows = [row for shape in shapes for row in measure(shape, settings, device, args.repeats)]
    facts = {"heads": shapes[0].heads, "kv_heads": shapes[0].kv_heads, "head_dim": shapes[0].head_dim}
    write_results(args.out, rows, dtype=str(dtype), what="forward + backward", **facts, accuracy=accuracy)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
