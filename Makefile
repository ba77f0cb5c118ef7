# `make demo` and `make test` each do all the set-up; the other targets build on the same .venv
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
CONSTRAINTS := $(if $(filter 0,$(HAS_GPU)),constraints-cpu.txt,constraints.txt)
PIP := $(PY) -m pip --disable-pip-version-check install -c $(CONSTRAINTS)
KERNEL := hub_kernels/unique-attention
# one thread a process: with xdist the workers would fight over the cores
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest
PARALLEL := -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-gpu lint format kernel wheel bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "expected Python 3.11 or newer, got " + sys.version.split()[0] + ": run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(wildcard constraints*.txt) | $(PY)
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(wildcard constraints*.txt) | $(PY)
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## answer questions from a long text, dense and sparse (CPU)
	$(PY) -m unique_hf.demo

test: $(VENV)/.dev  ## all CPU tests: kernels under the Triton interpreter, then everything else
	@status=0; \
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(PARALLEL) || status=1; \
	$(PYTEST) tests --ignore=tests/kernels $(PARALLEL) || status=1; \
	exit $$status

test-oldest:  ## the same tests on the oldest supported Transformers, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-gpu: $(VENV)/.dev  ## the tests that need a CUDA device
	$(PYTEST) tests -m gpu

lint: $(VENV)/.dev  ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.dev  ## apply ruff's fixes and layout
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

kernel: $(VENV)/.dev  ## stage the Hub kernel for every backend under dist/kernel
	$(PY) $(KERNEL)/stage.py --out dist/kernel

wheel: $(VENV)/.dev  ## build the wheel under dist
	$(PY) -m build --wheel --outdir dist .

bench: $(VENV)/.dev  ## decode benchmark on a CUDA device, after its tests are green
	$(PYTEST) tests/kernels -m gpu
	$(PY) -m benchmarks.decode

clean:  ## remove what the other targets made, .venv included
	rm -rf $(VENV) .venv-oldest dist build .pytest_cache .ruff_cache
