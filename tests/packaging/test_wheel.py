"""One wheel with both packages, each module once; the editable install finds both roots; the pins fit the ranges."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

from tests.processes import KERNEL, ROOT, run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(folder, kind):
    """Calls the build backend in a fresh process, without a network and without an isolated environment."""
    name = subprocess.run(
        [sys.executable, "-c", f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()[-1]  # fmt: skip
    return folder / name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), "wheel")


def test_wheel_holds_each_module_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"unique_hf", "unique_attention"}
    sources = {f"unique_attention/{p.relative_to(KERNEL).as_posix()}" for p in KERNEL.rglob("*.py")}
    sources |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "unique_hf").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_works_when_unpacked_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import unique_attention, unique_hf.backend\nprint(unique_attention.__file__, unique_hf.backend.__file__)"
    where = run_python(code, paths=[tmp_path / "site"], cwd=tmp_path)
    assert all(path.startswith(str(tmp_path / "site")) for path in where) and len(where) == 2


def test_editable_install_finds_both_roots(tmp_path):
    zipfile.ZipFile(build(tmp_path, "editable")).extractall(tmp_path / "site")
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
    code += "import unique_attention, unique_hf.backend\nprint(unique_attention.__file__, unique_hf.backend.__file__)"
    kernel, package = run_python(code, paths=[], cwd=tmp_path)
    assert kernel == str(KERNEL / "__init__.py") and package == str(ROOT / "unique_hf/backend.py")


def pins():
    for path in sorted(ROOT.glob("constraints*.txt")):
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-c")):
                yield Requirement(line)


def test_pins_lie_within_the_declared_ranges():
    extras = PYPROJECT["optional-dependencies"].values()
    declared = [Requirement(line) for line in [*PYPROJECT["dependencies"], *(r for extra in extras for r in extra)]]
    checked = set()
    for pin in pins():
        version = re.fullmatch(r"==([\w.]+)", str(pin.specifier))[1]
        for requirement in declared:
            if requirement.name == pin.name:
                assert version in requirement.specifier, f"{pin} is outside {requirement}"
                checked.add(pin.name)
    assert checked == {"torch", "transformers", "kernels", "trl", "huggingface_hub"}


def test_triton_is_optional_and_asked_for_only_where_it_has_wheels():
    assert not [line for line in PYPROJECT["dependencies"] if line.startswith("triton")]
    triton = next(Requirement(line) for line in PYPROJECT["optional-dependencies"]["dev"] if line.startswith("triton"))
    assert triton.marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"})
    assert not triton.marker.evaluate({"sys_platform": "darwin", "platform_machine": "arm64"})
    assert not triton.marker.evaluate({"sys_platform": "win32", "platform_machine": "AMD64"})


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("gpu,constraints", [(False, "constraints-cpu.txt"), (True, "constraints.txt")])
def test_make_pins_the_cpu_build_of_torch_without_a_gpu(tmp_path, gpu, constraints):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: something'\n" if gpu else "#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), f"VENV={tmp_path}/venv", "test", "demo"],
        capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"install -c {constraints} -e '.[dev]'" in done.stdout
    assert done.stdout.index("TRITON_INTERPRET=1") < done.stdout.index("--ignore=tests/kernels")
