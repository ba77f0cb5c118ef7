"""Kernels are compiled once, whatever the length of the prompt: the variants that launches ask for, without a GPU."""

import importlib
import os

import pytest
import torch

from tests.aot.launches import OPTIONS, TARGETS, recorded
from tests.capture.recorder import recording_on_cpu
from tests.capture.test_generate import model_with
from tests.integration.tiny import batch, greedy
from unique_attention import ops
from unique_attention.hf import pages

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
MODULES = [
    importlib.import_module(f"unique_attention.{name}")
    for name in ("page_stats", "page_score", "page_select", "second_level", "sparse_decode")
]
# as in the test on a device, capacities 512, 768 and 1024 among them; the second call finds the buffers of the first
EXTRA = (0, 0, 1, 7, 20, 64, 300)
# of scores that a step leaves for itself: as wide as there are pages, allocated by the kernels' side
SCRATCH = ("stride_ob", "stride_oh", "stride_og", "stride_ib", "stride_ih", "stride_ig")


def kind_of(value):
    """What Triton compiles an argument for."""
    if isinstance(value, torch.Tensor):
        # allocations are aligned, so the place inside one decides
        return value.dtype, value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return 1 if value == 1 else ("i64" if value >= 1 << 31 else "i32", value % 16 == 0)
    return value if value is None else type(value)


def variant(launch):
    """The compiled kernel that a launch needs: argument -> what it is compiled for."""
    kernel, _, args, kwargs = launch
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    found = {"kernel": kernel.fn.__name__, **{name: kwargs.get(name) for name in OPTIONS}}
    for param in kernel.params:
        value = bound[param.name]
        if param.is_constexpr:
            found[param.name] = value
        elif param.do_not_specialize or (param.name in SCRATCH and "score" in kernel.fn.__name__):
            found[param.name] = isinstance(value, int) and value >= 1 << 31
        else:
            found[param.name] = kind_of(value)
    return found


def shadowed(name, patch, launches):
    """Lets an operation also plan the launches of a GPU, which then do nothing."""
    original = getattr(ops, name)

    def call(*args, **kwargs):
        _, device = TARGETS["cuda:90"]
        with recorded(MODULES, device) as found:
            original(*args, **kwargs, impl="triton")
        launches.extend(variant(launch) for launch in found)
        return original(*args, **kwargs)

    patch.setattr(ops, name, call)


def nearest(seen, known):
    """What differs from the most similar variant of the same kernel that was known."""
    changes = [{k: (x[k], seen[k]) for k in seen if x[k] != seen[k]} for x in known if x["kernel"] == seen["kernel"]]
    return min(changes, key=len, default="a kernel that did not run before")


def new_variants(model, monkeypatch, length=500, tokens=4):
    """Variants that calls ask for after the first one, by the tokens that their prompts have more."""
    launches, known, found = [], [], []
    for name in ("append_tokens", "page_stats", "unique_decode"):
        shadowed(name, monkeypatch, launches)
    with recording_on_cpu():
        for index, more in enumerate(EXTRA):
            greedy(model, batch(length=length + more, padding=(0, 0)), tokens=tokens)
            for seen in launches:
                if seen not in known:
                    if index:
                        found.append((more, nearest(seen, known)))
                    known.append(seen)
            launches.clear()
    assert known
    return found


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("settings", [
    {"stats_dtype": "fp32"}, {}, {"stats_dtype": "int8", "page_size": 16},
    {"super_page_size": 16, "super_budget": 128}, {"super_page_size": 64, "super_budget": 512},
], ids=["fp32", "int4", "int8", "two levels", "large super-pages"])  # fmt: skip
def test_prompts_of_other_lengths_ask_for_no_new_variant(settings, captured, monkeypatch):
    model = model_with(**{"budget": 64, **settings}, capture=captured)
    assert not new_variants(model, monkeypatch)


def test_a_length_that_changes_the_alignment_of_a_stride_would_be_noticed(monkeypatch):
    monkeypatch.setattr(pages, "ALIGN_PAGES", 1)
    found = new_variants(model_with(budget=64, capture=False), monkeypatch)
    assert any("stride_dh" in change for _, change in found)
