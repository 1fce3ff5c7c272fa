# Two commands: `make serve` and `make test`. Both set up what is missing first and do nothing twice.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= python3
CONFIG ?= cluster_configs/local.yaml

.PHONY: serve test unit lint docs dist gpu-check setup demo clean

serve: setup demo ## start Ray and the demo application in the foreground
	@exec $(BIN)/chameleon serve $(CONFIG)

test: setup lint docs ## all tests
	@$(BIN)/pytest

unit: setup ## the tests that take seconds
	@$(BIN)/pytest tests/unit tests/redis

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: setup ## the documentation site, in build/docs; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

dist: setup ## the wheel and the source archive, in dist/, as they are uploaded
	@rm -rf build/lib dist && $(BIN)/python -m build --no-isolation && $(BIN)/twine check --strict dist/*

gpu-check: ## on a machine with a GPU, with `pip install '.[gpu]'`: what runs there, is it right, how fast is it
	@$(GPU_PYTHON) benchmarks/gpu_check.py

setup: ## the virtual environment with the locked CPU set
	@PYTHON=$(PYTHON) VENV=$(VENV) ./setup.sh

demo: setup
	@$(BIN)/chameleon demo

clean: ## remove what setup and demo made
	rm -rf $(VENV) demo .chameleon build
