"""Fixtures that several folders share."""

import importlib.util

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
