"""The training benchmark runs to its file on a CPU, and times no wrong numbers."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import train
from tests.processes import ROOT


def test_smoke_writes_rows_beside_their_accuracy(tmp_path):
    out = tmp_path / "train.json"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "hub_kernels/unique-attention/torch-ext")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "benchmarks.train", "--smoke", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    result = json.loads(out.read_text())
    assert [row["kind"] for row in result["rows"]] == ["sdpa flash", "soft mask"]
    assert 0 < result["rows"][1]["open_tiles"] <= 1
    (checked,) = result["accuracy"]
    assert [error["tensor"] for error in checked["errors"]] == ["out", "dq", "dk", "dv"]
    assert all(0 < error["error"] <= error["allowed"] for error in checked["errors"])


def test_wrong_numbers_are_not_timed(monkeypatch):
    shape, setting = train.Shape(64, 4, 2, 32, torch.float32), train.Setting(4, 32, 0.5, "topics")
    right = train.reference.soft_mask_attention
    monkeypatch.setattr(train.soft_mask, "soft_mask_attention", right)
    train.check_accuracy(shape, setting, "cpu")
    monkeypatch.setattr(train.soft_mask, "soft_mask_attention", lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    with pytest.raises(SystemExit, match="out is off"):
        train.check_accuracy(shape, setting, "cpu")
