"""What a result must record besides its numbers, and how kernels are timed."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict:
    """GPU, versions and revision of this run."""
    import transformers

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    revision = ROOT / "REVISION"
    if revision.exists():
        commit = revision.read_text().strip()
    else:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "revision": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_results(path: Path, rows: list[dict], **facts):
    """Writes `{"environment", ..., "rows"}` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **facts, "rows": rows}, indent=1) + "\n")


def time_us(calls: list, repeats: int = 15, target_ms: float = 4.0) -> tuple[float, float]:
    """Median and spread (p90 - p10) in microseconds of one call.

    On a GPU the calls, each on inputs of its own so that caches stay cold, are captured one after another into a
    CUDA graph.
    """
    if not torch.cuda.is_available():
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            for call in calls:
                call()
            samples.append((time.perf_counter() - start) / len(calls) * 1e6)
        return sorted(samples)[1], max(samples) - min(samples)
    stream = torch.cuda.Stream()
    # what fills the inputs, counters above all, may still be on its way
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    replays = max(1, min(50, int(target_ms / max(start.elapsed_time(end), 1e-3))))
    samples = []
    for _ in range(repeats):
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / replays / len(calls))
    samples.sort()
    return samples[len(samples) // 2], samples[int(len(samples) * 0.9)] - samples[int(len(samples) * 0.1)]
