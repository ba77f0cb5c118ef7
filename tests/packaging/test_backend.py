"""Which kernel module runs: bundled, a staged folder, or a clear error."""

import pytest

from tests.processes import run_python
from unique_hf.backend import load_kernel

SAY = "from unique_hf.backend import kernel_module\nm = kernel_module()\nprint(m.__name__, m is kernel_module())"


def test_bundled_is_the_default():
    assert run_python(SAY) == ["unique_attention", "True"]
    assert run_python(SAY, env={"UNIQUE_HF_KERNEL": "bundled"}) == ["unique_attention", "True"]


def test_staged_folder_by_variable(staged_kernel):
    pytest.importorskip("kernels")
    name, same = run_python(SAY, env={"UNIQUE_HF_KERNEL": str(staged_kernel)})
    assert name.startswith("_unique_attention_cpu_") and same == "True"


@pytest.mark.parametrize("source", ["unique", "a/b/c", "org/", "org/name@"])
def test_bad_source_says_what_to_change(source):
    with pytest.raises(ValueError, match="UNIQUE_HF_KERNEL") as error:
        load_kernel(source)
    assert source in str(error.value)


def test_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="make kernel"):
        load_kernel(str(tmp_path / "none"))


def test_missing_kernels_package_says_what_to_install():
    code = """
import sys
sys.modules["kernels"] = None
from unique_hf.backend import load_kernel
try:
    load_kernel("org/name")
except ImportError as error:
    print("unique-hf[hub]" in str(error))"""
    assert run_python(code) == ["True"]
