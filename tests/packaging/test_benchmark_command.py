"""`kernels benchmark` runs on the staged kernel, and its verification finds errors."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python

pytest.importorskip("kernels.cli.benchmark")

SCRIPT = "benchmarks/benchmark_attention.py"
SOURCE = ROOT / "hub_kernels/unique-attention" / SCRIPT
WORKLOADS = {f"{name}.{way}" for name in ("ManyRows", "OneRow", "TrainingStep") for way in ("dense", "unique")}


@pytest.fixture
def loaded():
    """Makes one of the benchmark classes ready to run, on the wheel's kernel and the CPU."""
    import unique_attention

    spec = importlib.util.spec_from_file_location(
        "benchmark_attention", ROOT / "hub_kernels/unique-attention" / SCRIPT
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(name):
        benchmark = getattr(module, name)()
        benchmark.kernel = unique_attention
        benchmark.setup()
        benchmark.benchmark_unique()
        return benchmark

    return make


def run_script(folder, env=None):
    # the command without its table, which needs one more package
    code = f"""
from pathlib import Path
from kernels.cli.benchmark import run_benchmark_script
folder = Path({str(folder)!r})
script = folder / {SCRIPT!r}
results, _ = run_benchmark_script(script, 1, 0, folder, str(folder), is_local=True, revision="local")
print(*(name for name, timing in results.items() if timing.verified is True))"""
    return set(run_python(code, env=env))


def test_every_workload_runs_and_is_verified(staged_kernel):
    assert run_script(staged_kernel, {"CUDA_VISIBLE_DEVICES": ""}) == WORKLOADS


def test_kernels_pass_the_verification():
    pytest.importorskip("triton")
    code = f"""
import importlib.util, sys, unique_attention
spec = importlib.util.spec_from_file_location("benchmark_attention", {str(SOURCE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name in ("OneRow", "TrainingStep"):
    benchmark = getattr(module, name)()
    benchmark.kernel = unique_attention
    benchmark.setup()
    benchmark.benchmark_unique()
    benchmark.verify_unique()
    print(name, "unique_attention.sparse_decode" in sys.modules or "unique_attention.soft_mask" in sys.modules)"""
    assert run_python(code, env={"TRITON_INTERPRET": "1"}) == ["OneRow", "True", "TrainingStep", "True"]


def test_small_errors_are_found(loaded):
    decode = loaded("OneRow")
    assert decode.verify_unique().shape == decode.out.shape
    decode.out = decode.out + 1e-3  # the command alone would let this pass
    with pytest.raises(RuntimeError, match="output: error"):
        decode.verify_unique()
    training = loaded("TrainingStep")
    training.verify_unique()
    training.results["dk"] = training.results["dk"] * 1.001
    with pytest.raises(RuntimeError, match="dk: error"):
        training.verify_unique()


def test_not_a_number_is_found(loaded):
    decode = loaded("OneRow")
    decode.out[0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="output: error nan"):
        decode.verify_unique()


def test_other_pages_are_found(loaded):
    decode = loaded("OneRow")
    kept = decode.page_ids[0, 0].tolist()
    dropped = [page for page in range(decode.k.shape[2] // 4) if page not in kept]
    decode.page_ids[0, 0, 1:-2] = decode.page_ids.new_tensor(dropped[: len(kept) - 3])
    with pytest.raises(RuntimeError, match="other pages"):
        decode.verify_unique()


def test_a_missing_token_and_wrong_statistics_are_found(loaded):
    decode = loaded("OneRow")
    decode.stats.codes[:, :, : decode.stats.codes.shape[2] // 8] = 0
    with pytest.raises(RuntimeError, match="statistics differ"):
        decode.verify_unique()
    decode.k[:, :, -1] = 0
    with pytest.raises(RuntimeError, match="not in the cache"):
        decode.verify_unique()


@pytest.mark.gpu
def test_the_command_on_a_device(staged_kernel, tmp_path):
    pytest.importorskip("tabulate")
    command = [Path(sys.executable).with_name("kernels"), "benchmark", staged_kernel, "--iterations", "10"]
    report = tmp_path / "report.json"
    done = subprocess.run([*command, "--warmup", "1", "--output", report], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(report.read_text())["results"]
    assert {row["workload"] for row in results if row["verified"]} == WORKLOADS
