"""The kernel goes to a Hub by the commands of its card and comes back by `kernels.get_kernel`, online and offline."""

import os
import re

import pytest

from tests.hub.loopback import KERNEL_CLIENT, LoopbackHub
from tests.processes import ROOT, run_python

pytest.importorskip("kernels")

REPO = "acme/unique-attention"
LOAD = f"""
import kernels
kernel = kernels.get_kernel({REPO!r}, version=1, trust_remote_code=[{REPO!r}])
print(kernel.__name__, kernel.UniqueConfig().num_kept)"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(trusted=("acme",)) as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, staged_kernel, tmp_path_factory):
    """Runs the publishing block of the card as it stands, with its placeholders filled in."""
    pytest.importorskip("huggingface_hub", minversion=KERNEL_CLIENT)
    card = (ROOT / "hub_kernels/unique-attention/CARD.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "upload_folder" in b)
    code = block.replace("<org>/unique-attention", REPO).replace("dist/kernel", str(staged_kernel))
    home = tmp_path_factory.mktemp("publisher")
    run_python(code, paths=(), env=hub.environment(home))
    return staged_kernel


def test_published_branch_holds_the_staged_folder(hub, published):
    repo = hub.repos["kernels", REPO]
    tree = repo.commits[repo.branches["v1"]]
    staged = {p.relative_to(published).as_posix(): p.read_bytes() for p in published.rglob("*") if p.is_file()}
    assert {path: file.content for path, file in tree.items()} == staged
    assert repo.commits[repo.branches["main"]] == {}


def test_publishing_again_without_a_change_makes_no_commit(hub, published, tmp_path):
    before = dict(hub.repos["kernels", REPO].branches)
    code = f"""
from huggingface_hub import HfApi
HfApi().upload_folder(repo_id={REPO!r}, folder_path={str(published)!r}, repo_type="kernel", revision="v1")"""
    run_python(code, paths=(), env=hub.environment(tmp_path))
    assert hub.repos["kernels", REPO].branches == before


def test_kernel_loads_from_the_hub(hub, published, tmp_path):
    name, num_kept = run_python(LOAD, paths=(), env=hub.environment(tmp_path))
    assert name.startswith("_unique_attention_cpu_") and num_kept == "256"


def test_kernel_loads_offline_after_the_branch_was_downloaded(hub, published, tmp_path):
    home = hub.environment(tmp_path)
    fetch = f"from huggingface_hub import snapshot_download as get\nget({REPO!r}, repo_type='kernel', revision='v1')"
    run_python(fetch, paths=(), env=home)
    asked = len(hub.requests)
    name, _ = run_python(LOAD, paths=(), env=home | {"HF_HUB_OFFLINE": "1"})
    assert name.startswith("_unique_attention_cpu_") and len(hub.requests) == asked


def test_only_this_machines_variant_is_downloaded(hub, published, tmp_path):
    asked = len(hub.requests)
    run_python(LOAD, paths=(), env=hub.environment(tmp_path))
    files = [path for method, path in hub.requests[asked:] if method == "GET" and "/resolve/" in path]
    assert files and all("/build/torch-cpu/" in path for path in files)


def test_publisher_must_be_trusted(published, hub, tmp_path):
    code = f"""
import kernels
try:
    kernels.get_kernel({REPO!r}, version=1)
    print("loaded")
except ValueError as error:
    print("trust_remote_code" in str(error))"""
    assert run_python(code, paths=(), env=hub.environment(tmp_path)) == ["loaded"]
    hub.trusted = ()
    try:
        assert run_python(code, paths=(), env=hub.environment(tmp_path)) == ["True"]
    finally:
        hub.trusted = ("acme",)


def test_backend_loads_a_hub_id(hub, published, tmp_path):
    code = "from unique_hf.backend import kernel_module\nprint(kernel_module().__name__)"
    for source in (REPO, f"{REPO}@v1"):
        (name,) = run_python(code, env=hub.environment(tmp_path) | {"UNIQUE_HF_KERNEL": source})
        assert name.startswith("_unique_attention_cpu_")


def test_wrong_token_and_missing_repository_are_clear(hub, tmp_path):
    code = """
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
try:
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="acme/none")
except HfHubHTTPError as error:
    print(type(error).__name__, error.response.status_code)"""
    assert run_python(code, env=hub.environment(tmp_path)) == ["RepositoryNotFoundError", "404"]
    answer = run_python(code, env=hub.environment(tmp_path, token="hf_wrong"))
    assert answer[-1] == "401"


def test_upload_cut_in_the_middle_loses_nothing_and_resumes(hub, tmp_path):
    weights = os.urandom(300_000)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    code = f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("acme/model", exist_ok=True)
try:
    api.upload_folder(repo_id="acme/model", folder_path={str(folder)!r})
    print("done")
except Exception as error:
    print(type(error).__name__)"""
    hub.cut("POST", "/commit/")
    env = hub.environment(tmp_path / "home")
    assert run_python(code, paths=(), env=env) != ["done"]
    repo = hub.repos["models", "acme/model"]
    assert repo.commits[repo.branches["main"]] == {}
    puts = sum(method == "PUT" for method, _ in hub.requests)
    assert run_python(code, paths=(), env=env) == ["done"]
    assert sum(method == "PUT" for method, _ in hub.requests) == puts
    code = """
from huggingface_hub import snapshot_download
import pathlib
print((pathlib.Path(snapshot_download("acme/model")) / "a.safetensors").stat().st_size)"""
    assert run_python(code, paths=(), env=hub.environment(tmp_path / "other")) == ["300000"]
    assert repo.commits[repo.branches["main"]]["a.safetensors"].content == weights
