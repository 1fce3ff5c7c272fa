# Two commands: `make serve` and `make test`. Both set up what is missing first and do nothing twice.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= cluster_configs/local.yaml

.PHONY: serve test unit lint setup demo clean

serve: setup demo ## start Ray and the demo application in the foreground
	@exec $(BIN)/chameleon serve $(CONFIG)

test: setup demo lint ## all tests
	@$(BIN)/pytest

unit: setup demo ## the tests that take seconds
	@$(BIN)/pytest tests/unit tests/redis

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

setup: ## the virtual environment with the locked CPU set
	@PYTHON=$(PYTHON) VENV=$(VENV) ./setup.sh

demo: setup
	@$(BIN)/chameleon demo

clean: ## remove what setup and demo made
	rm -rf $(VENV) demo
