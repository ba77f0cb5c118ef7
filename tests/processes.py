"""Fresh Python processes for tests about imports and loading, where this process has already imported too much."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL = ROOT / "hub_kernels/unique-attention/torch-ext/unique_attention"


def run_python(code, paths=(ROOT, KERNEL.parent), env=None, cwd=None):
    """Runs `code` with `paths` in front of `sys.path` and returns its words on stdout; a failure shows its stderr."""
    prelude = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    # the variables of this process would decide which kernel, Hub and interpreter the other one uses
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOCAL_KERNELS", "UNIQUE_HF_KERNEL", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        env=inherited | (env or {}),
        cwd=cwd,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.split()
