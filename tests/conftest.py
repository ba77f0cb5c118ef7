"""Fixtures that several folders share."""

import importlib.util
import sys

import pytest

from tests.processes import ROOT


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, whatever ran before it."""
    # tests of packaging and layering never import torch and should not pay for it
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills what `torch.empty` and its kin return with NaN (integers: the maximum); unwritten outputs fail."""
    import torch

    def poison(x):
        if x.device.type == "meta" or x.numel() == 0:
            return x
        with torch.no_grad():
            if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                x.view(torch.uint8).fill_(0x7F)
            elif x.is_floating_point():
                x.fill_(float("nan"))
            elif x.dtype != torch.bool and not x.is_complex():
                x.fill_(torch.iinfo(x.dtype).max)
        return x

    def patched(function):
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, patched(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, patched(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def stage():
    """The staging script of the Hub kernel, as a module."""
    spec = importlib.util.spec_from_file_location("stage", ROOT / "hub_kernels/unique-attention/stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def staged_kernel(stage, tmp_path_factory):
    """A folder as `make kernel` leaves it."""
    folder = tmp_path_factory.mktemp("kernel")
    stage.stage(folder)
    return folder
