# Two commands: `make serve` and `make test`. Both set up what is missing first and do nothing twice.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= cluster_configs/local.yaml

.PHONY: serve test unit lint docs setup demo clean

serve: setup demo ## start Ray and the demo application in the foreground
	@exec $(BIN)/chameleon serve $(CONFIG)

test: setup demo lint docs ## all tests
	@$(BIN)/pytest

unit: setup demo ## the tests that take seconds
	@$(BIN)/pytest tests/unit tests/redis

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: setup ## the documentation site, in build/docs; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

setup: ## the virtual environment with the locked CPU set
	@PYTHON=$(PYTHON) VENV=$(VENV) ./setup.sh

demo: setup
	@$(BIN)/chameleon demo

clean: ## remove what setup and demo made
	rm -rf $(VENV) demo
