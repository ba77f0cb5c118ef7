"""What the documents say is so: code blocks compile or run, links lead somewhere, tables match the code."""

import json
import re
import subprocess
import sys

import pytest

from tests.processes import KERNEL, ROOT, run_python
from tests.test_layering import tracked

DOCUMENTS = [name for name in tracked(".md") if not name.startswith("docs/")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name, language):
    return [text for kind, text in BLOCK.findall((ROOT / name).read_text()) if kind == language]


PYTHON_BLOCKS = [(name, i, text) for name in DOCUMENTS for i, text in enumerate(blocks(name, "python"))]


@pytest.mark.parametrize("name,index,text", PYTHON_BLOCKS, ids=lambda value: str(value)[:40].split("\n")[0])
def test_python_blocks_compile(name, index, text):
    compile(text, f"{name} block {index}", "exec")


def test_readme_starts_with_the_two_commands_and_a_snippet():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    head = "\n".join(lines[:20])
    assert "make demo" in head and "make test" in head and "import unique_hf" in head


def test_readme_snippet_uses_public_names():
    pytest.importorskip("unique_hf")
    names = {name for text in blocks("README.md", "python") for name in re.findall(r"\bunique_hf\.(\w+)", text)}
    missing = run_python(f"import unique_hf\nprint(*[n for n in {sorted(names)} if not hasattr(unique_hf, n)])")
    assert names and not missing


def test_card_example_runs_on_the_staged_kernel(staged_kernel):
    card = blocks("hub_kernels/unique-attention/CARD.md", "python")
    runnable = [text for text in card if text.startswith("# runnable")]
    assert runnable
    for text in runnable:
        run_python(text, paths=(), env={"LOCAL_KERNELS": f"unique-hf/unique-attention={staged_kernel}"})


def test_card_names_every_public_op():
    card = (ROOT / "hub_kernels/unique-attention/CARD.md").read_text()
    public = run_python("import unique_attention\nprint(*unique_attention.__all__)")
    assert public and not [name for name in public if f"`{name}`" not in card]


def with_table(name):
    """A command that prints README.md as `docs/<name>.py --write` would leave it."""
    new = "r.insert(r.README.read_text(), t.START, t.END, t.render())"
    return [sys.executable, "-c", f"import readme as r, {name} as t; print({new}, end='')"]


def test_settings_table_is_current():
    done = subprocess.run(
        with_table("settings_table"),
        capture_output=True, text=True, cwd=ROOT / "docs", env={"PYTHONPATH": f"{KERNEL.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "README.md").read_text(), "run docs/settings_table.py --write"
    code = "import dataclasses, unique_attention as u\nprint(*[f.name for f in dataclasses.fields(u.UniqueConfig)])"
    fields = run_python(code)
    assert re.findall(r"^\| `(\w+)` \|", done.stdout, re.MULTILINE) == fields


def test_results_tables_are_current():
    done = subprocess.run(with_table("results_table"), capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "README.md").read_text(), "run docs/results_table.py --write"
    assert done.stdout.count("| 80 x 32,768 |") >= 5


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text()):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_in_documents_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE))
    assert said <= targets, f"{name} names unknown targets {said - targets}"


def test_results_record_their_conditions():
    for name in tracked(".json"):
        if "/results/" in name:
            text = (ROOT / name).read_text()
            json.loads(text)
            missing = [word for word in ("torch", "revision") if word not in text]
            assert not missing, f"{name} does not record {missing}"
