# make demo, bench, docs, test: everything from set-up to result. Variables: PYTHON, VENV, TORCH, those of CONTRIBUTING.md.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo bench docs test lint check-cuda clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/python -m ewc_fast demo

# 25 minutes; BENCH=--quick, or other options, for something shorter. What is to be committed goes to benchmarks/results.
BENCH ?= --all
OUT ?= bench-results/{machine}
bench: $(READY)
	$(BIN)/python -m ewc_fast bench $(BENCH) --out "$(OUT)"

# The site, in site/. A warning is an error: a dead link, a page outside the nav, a docstring that does not parse.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: $(READY)
	$(BIN)/python -m pytest --cov=ewc_fast --cov-report=term --cov-fail-under=90

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

check-cuda: $(READY)
	$(BIN)/python tests/native/check_cuda.py

# torch first and on its own, so that nothing else chooses its version; the extension is compiled against it.
$(READY): $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ewc_fast needs Python 3.10 or later: make PYTHON=...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)" "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --no-build-isolation --editable ".[test,demo,docs]"
	@touch $@

clean:
	rm -rf $(READY) build dist *.egg-info ewc_fast/_C*.so ewc_fast/_build_info.json
	rm -rf site .coverage .mypy_cache .pytest_cache .ruff_cache
