# Two commands: `make demo` shows the whole way on simulated tissue, `make test` proves it.
# Test processes share the cores, so each has one thread. A file of tests is run by one process, which
# makes once what they share; files go in order, so that the many small ones of src fill the end.
# Each makes .venv and installs what it needs there; a changed pyproject.toml installs again.
# PyPI's torch for Linux brings CUDA (gigabytes): TORCH=cpu takes PyTorch's own build without it
# (from its index, which no test reaches).

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
TORCH ?=
# Python compiles what is imported; of all that is installed that is a small part.
PIP := $(BIN)/python -m pip install --quiet --no-compile
# And keeps it: where PYTHONDONTWRITEBYTECODE is set, every process would compile torch anew (20 s).
export PYTHONDONTWRITEBYTECODE :=
TORCH_FIRST = $(if $(TORCH),$(PIP) torch --index-url https://download.pytorch.org/whl/$(TORCH))

.DEFAULT_GOAL := help
.PHONY: help demo test torture fuzz lint format docs clean

help:
	@echo "make demo    simulate a small cohort and run import, embed, fit, evaluate and predict"
	@echo "             (any of these with TORCH=cpu, or cu126: that build of torch, in a new .venv)"
	@echo "make test    run the tests (FAST=1 without the slow ones, PYTEST_ARGS='-k name' for some)"
	@echo "make torture let every single write of every command fail, in six ways (hours)"
	@echo "make fuzz    read N=5000 changed inputs of every kind (hours)"
	@echo "make lint    linters, type check and import contract"
	@echo "make format  format the code"
	@echo "make docs    build docs/_build/html, tutorials and all (a minute)"

demo: $(VENV)/.demo
	rm -rf strank-demo
	$(BIN)/strank demo -o strank-demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder $(if $(FAST),-m "not slow") $(PYTEST_ARGS)

torture: $(VENV)/.dev
	TORTURE=1 $(BIN)/pytest tests/torture tests/cli/test_processes.py -s $(PYTEST_ARGS)

fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/torture/fuzz.py --n $(or $(N),5000) --seed $(or $(SEED),0)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build/html
	@echo docs/_build/html/index.html

clean:
	rm -rf $(VENV) strank-demo docs/_build docs/generated

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(TORCH_FIRST)
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(TORCH_FIRST)
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo
