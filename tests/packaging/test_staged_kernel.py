"""The staged folder obeys the law of Hub kernels and is the same code as the wheel's."""

import filecmp
import re

import pytest

from tests.processes import KERNEL, ROOT, run_python

kernels = pytest.importorskip("kernels")

FOLDER = ROOT / "hub_kernels/unique-attention"
BACKENDS = ("cpu", "cuda", "rocm", "xpu")


def test_build_file_is_accepted():
    rust = pytest.importorskip("kernels._rust", reason="the parser of kernels 0.17")
    build = rust.Build.open(FOLDER)
    assert sorted(str(backend).lower().split(".")[-1] for backend in build.general.backends) == list(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_of_every_variant(staged_kernel, backend):
    rust = pytest.importorskip("kernels._rust", reason="the parser of kernels 0.17")
    metadata = rust.Metadata.read_from_file(staged_kernel / f"build/torch-{backend}/metadata.json")
    assert (str(metadata.name), metadata.version, metadata.license) == ("unique-attention", 1, "apache-2.0")
    assert metadata.name.python_name == KERNEL.name
    assert metadata.python_depends == [] and metadata.kernel_depends == []
    assert metadata.backend.backend_type == rust.Backend.from_str(backend)
    assert metadata.id.startswith(f"_unique_attention_{backend}_")


def test_variants_hold_exactly_the_package(staged_kernel):
    sources = {p.relative_to(KERNEL) for p in KERNEL.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    for backend in BACKENDS:
        variant = staged_kernel / f"build/torch-{backend}"
        staged = {p.relative_to(variant) for p in variant.rglob("*") if p.is_file()}
        assert {str(p) for p in staged - sources} == {"metadata.json"} and not sources - staged
        assert all(filecmp.cmp(KERNEL / p, variant / p, shallow=False) for p in sources)


def test_staging_again_replaces_what_was_there(stage, tmp_path):
    stage.stage(tmp_path)
    stale = tmp_path / "build/torch-cpu/stale.py"
    stale.write_text("")
    stage.stage(tmp_path)
    assert not stale.exists()


def test_local_kernel_has_the_same_public_names(staged_kernel):
    code = f"""
from pathlib import Path
import kernels, unique_attention
kernel = kernels.get_local_kernel(Path({str(staged_kernel)!r}))
assert kernel is not unique_attention and kernel.__all__ == unique_attention.__all__
assert [n for n in kernel.__all__ if getattr(kernel, n).__module__.startswith(kernel.__name__ + ".")] == kernel.__all__
print(kernel.UniqueConfig().num_kept == unique_attention.UniqueConfig().num_kept)"""
    assert run_python(code) == ["True"]


def test_name_does_not_send_transformers_elsewhere():
    repo = re.search(r'repo-id = "(.+)"', (FOLDER / "build.toml").read_text())[1]
    assert not re.search("flash|sdpa|flex_attention", repo)
    code = "import unique_attention as u\nprint(hasattr(u, 'flash_attn_varlen_func'), hasattr(u, 'sparse_atten_func'))"
    assert run_python(code) == ["False", "False"]
