"""The rules of the house, checked on the syntax tree: imports point down, budgets, names, what importing costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import KERNEL, ROOT, run_python

MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 60, 120
KERNEL_NAME = re.compile(r"_[a-z0-9]+(_[a-z0-9]+)*_(fwd|bwd)(_[a-z0-9]+)*_kernel$")

# what a layer may import besides the standard library and itself; the first folder that matches decides
LAYERS = {
    "hub_kernels/unique-attention/torch-ext/unique_attention/hf/": {"torch", "transformers"},
    "hub_kernels/unique-attention/torch-ext/unique_attention/": {"torch", "triton"},
    "unique_hf/": {
        "unique_attention", "torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "matplotlib",
    },
    "recipes/": {
        "recipes", "unique_hf", "torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy",
        "trl", "datasets", "accelerate", "peft", "matplotlib", "yaml", "jinja2",
    },
}  # fmt: skip


def tracked(*suffixes):
    """Files that git tracks or would track; a copy without git (a GPU machine) is walked instead."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        names = listed.stdout.split("\n")
    else:
        names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if ".venv" not in p.parts]
    return [n for n in sorted(set(names)) if n.endswith(suffixes) and (ROOT / n).is_file() and "__pycache__" not in n]


PYTHON = tracked(".py")
LAYERED = [name for name in PYTHON if name.startswith(tuple(LAYERS))]


def parse(name):
    return ast.parse((ROOT / name).read_text(), filename=name)


def type_checking_only(tree):
    """The nodes under `if TYPE_CHECKING:`, which never run."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    return {id(inner) for block in blocks for child in block.body for inner in ast.walk(child)}


def imports(tree):
    """Yields (node, absolute module or "", relative module or "") for every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            yield (node, "", "." * node.level + (node.module or "")) if node.level else (node, node.module or "", "")


def jit_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def code_lines(function):
    """Lines of a function without its docstring."""
    body = function.body
    lines = function.end_lineno - function.lineno + 1
    if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
        lines -= body[0].end_lineno - body[0].lineno + 1
    return lines


@pytest.mark.parametrize("name", LAYERED)
def test_imports_point_down(name):
    allowed = next(modules for folder, modules in LAYERS.items() if name.startswith(folder))
    for node, absolute, _ in imports(parse(name)):
        top = absolute.split(".")[0]
        if name == "unique_hf/backend.py" and top == "kernels":
            continue
        assert not top or top in sys.stdlib_module_names | allowed, f"{name}:{node.lineno} may not import {absolute}"


def test_kernel_core_does_not_know_its_adapter():
    for path in sorted(KERNEL.glob("*.py")):
        tree = parse(path.relative_to(ROOT).as_posix())
        ignored = type_checking_only(tree)
        for node, _, relative in imports(tree):
            assert id(node) in ignored or not relative.startswith(".hf"), (
                f"{path.name}:{node.lineno} imports {relative}"
            )


def test_reference_and_kernels_do_not_import_each_other():
    seen = 0
    for path in sorted(KERNEL.glob("*.py")):
        tree = parse(path.relative_to(ROOT).as_posix())
        found = [absolute or relative for _, absolute, relative in imports(tree)]
        is_reference, is_kernel = path.stem.startswith("reference"), any(jit_functions(tree))
        seen += is_reference or is_kernel
        if is_reference:
            wrong = [
                m
                for m in found
                if m.split(".")[0] == "triton" or (m[0] == "." and not re.match(r"\.(reference|settings)", m))
            ]
            assert not wrong, f"{path.name} is the specification and imports {wrong}"
        if is_kernel:
            assert not [m for m in found if m.startswith(".reference")], f"{path.name} imports the reference"
    assert seen >= 2


@pytest.mark.parametrize("name", [n for n in PYTHON if n.startswith(("unique_hf/", "hub_kernels/"))])
def test_environment_is_read_in_one_place(name):
    source = (ROOT / name).read_text()
    reads = re.findall(r"os\.(?:environ|getenv)[^\n]*", source)
    if name == "unique_hf/backend.py":
        assert len(reads) == 1
    elif name.startswith("hub_kernels/"):
        assert all("TRITON_INTERPRET" in line for line in reads), f"{name}: {reads}"
    else:
        assert not reads, (
            f"{name} reads the environment: {reads}; settings come from UniqueConfig or unique_hf/backend.py"
        )


@pytest.mark.parametrize("name", PYTHON)
def test_size_budgets(name):
    source = (ROOT / name).read_text()
    assert len(source.splitlines()) <= MAX_FILE, f"{name}: more than {MAX_FILE} lines, split it by idea"
    tree = ast.parse(source)
    kernels = set(jit_functions(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = MAX_KERNEL if node in kernels else MAX_FUNCTION
            assert code_lines(node) <= limit, (
                f"{name}:{node.lineno} {node.name} has {code_lines(node)} lines, limit {limit}"
            )


def test_kernel_names():
    names = []
    for path in sorted(KERNEL.rglob("*.py")):
        for node in jit_functions(parse(path.relative_to(ROOT).as_posix())):
            launched = any(isinstance(n, ast.Attribute) and n.attr == "program_id" for n in ast.walk(node))
            if launched or node.name.endswith("_kernel"):
                names.append(node.name)
                assert KERNEL_NAME.match(node.name), f"{path.name}: {node.name} is not _<op>_{{fwd,bwd}}[_part]_kernel"
    assert names, "no kernel found"


def test_banned_constructs():
    banned = re.compile(r"triton\.(autotune|heuristics)|make_block_ptr|tl\.advance")
    for path in sorted(KERNEL.rglob("*.py")):
        found = banned.search(path.read_text())
        assert not found, f"{path.name} uses {found[0]}: use the launch table and plain pointers"
    assert not [name for name in PYTHON if re.search(r"(^|/)_?utils?(/|\.py$)", name)], "name modules by their idea"


def test_no_machine_paths_or_registry_hosts():
    machine = r"(?:^|[^A-Za-z0-9_.])/(?:work|farm|root|tmp|home)/"
    stray = re.compile(machine + r"|python" + r"hosted|pypi[.]org|download[.]pytorch|[.][.]/shared", re.MULTILINE)
    suffixes = (".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cfg", "Makefile", "run", ".gitignore")
    for name in tracked(*suffixes):
        if name == Path(__file__).relative_to(ROOT).as_posix():
            continue
        found = stray.search((ROOT / name).read_text())
        assert not found, f"{name} holds {found[0]!r}"


@pytest.mark.parametrize(
    "code", ["import unique_attention", "from unique_attention import UniqueConfig; UniqueConfig()"]
)
def test_importing_the_kernel_package_is_free(code):
    heavy = "('torch', 'triton', 'transformers')"
    assert run_python(f"{code}\nprint([m for m in {heavy} if m in sys.modules])") == ["[]"]


def test_importing_the_ops_leaves_triton_and_transformers_out():
    code = "import unique_attention as u\nfor name in u.__all__: getattr(u, name)\n"
    assert run_python(code + "print([m for m in ('triton', 'transformers') if m in sys.modules])") == ["[]"]


def test_an_op_is_not_replaced_by_its_file():
    modules = [p.stem for p in sorted(KERNEL.glob("*.py")) if p.stem != "__init__"]
    code = f"""
import importlib, unique_attention as u
for module in {modules}:
    importlib.import_module("unique_attention." + module)
print(*[name for name in u.__all__ if not callable(getattr(u, name))])"""
    assert run_python(code) == []


def test_unknown_public_name_is_an_attribute_error():
    code = "import unique_attention as u\ntry: u.page_stat\nexcept AttributeError as e: print('page_stats' in str(e))"
    assert run_python(code) == ["True"]


def test_ruff_is_clean():
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, "\n".join((done.stdout + done.stderr).splitlines()[-40:])
