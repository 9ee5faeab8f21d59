# Everything runs in .venv, which `make setup` builds from nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test lint types scale clean

help: ## what one can do here
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: .venv/.ready ## build the environment in .venv

# torch first and alone: where a CPU build of it is at hand, the rest is then content with that one.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup ## reshard a small DeepSeek-V3-shaped checkpoint, verify it, restore it
	$(BIN)/python examples/demo.py

test: lint types ## lint, types and all tests
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

scale: setup ## DeepSeek-R1 at real size: sparse in full, and one layer in bytes (35 GB of disk)
	$(BIN)/python benchmarks/real_scale.py

clean: ## remove what the other targets made
	rm -rf .venv build examples/out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
