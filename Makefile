# Every command of the project; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# the engines start `maskdm` as a command: it must be the one of this environment
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONUNBUFFERED := 1
# stages are short processes: without its bytecode each of them would compile the package anew
unexport PYTHONDONTWRITEBYTECODE
# whoever has run out of tests takes some of another process's
PYTEST = $(PY) -m pytest --numprocesses auto --dist worksteal
# the first of these that is new enough, unless you say PYTHON=…
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))

.PHONY: help
help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-9s %s\n", $$1, $$2}'

.PHONY: install
install: $(INSTALLED)  ## create .venv with the locked dependencies (the other commands do it when needed)

$(INSTALLED): requirements.lock pyproject.toml
	@$(if $(PYTHON),true,echo "maskdm needs Python 3.11 or newer; found: $$(python3 --version 2>&1). Install one, or: make PYTHON=/path/to/python3.11" >&2; exit 1)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"maskdm needs Python 3.11 or newer; $(PYTHON) is {v.major}.{v.minor}. Try: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

.PHONY: demo
demo: $(INSTALLED)  ## run the default experiment through DVC and show what came out
	@git rev-parse --git-dir > /dev/null 2>&1 || { echo "DVC needs a git repository, and this folder is none: run 'git init', or use Snakemake: .venv/bin/snakemake --cores 2" >&2; exit 1; }
	dvc repro
	@echo
	@maskdm summary
	@echo "look at the arms in MLflow with: make ui"

.PHONY: ui
ui: $(INSTALLED)  ## open MLflow's UI and print the address that compares the arms
	@maskdm ui

.PHONY: test
test: $(INSTALLED)  ## run all tests (8 minutes on 2 cores)
	$(PYTEST)

.PHONY: quick
quick: $(INSTALLED)  ## check, and run the tests without whole pipelines (90 seconds on 2 cores)
	@$(MAKE) --no-print-directory --jobs 2 --output-sync check quick-test

.PHONY: quick-test
quick-test: $(INSTALLED)
	$(PYTEST) --quiet -m "not workflow"

.PHONY: bench
bench: $(INSTALLED)  ## measure speed and print which targets hold (minutes; leave the machine alone meanwhile)
	$(PY) -m benchmarks

.PHONY: check
check: $(INSTALLED)  ## format, lint, types, import contract, workflow lint
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-cache
	snakefmt --check Snakefile workflow
	snakemake --lint

.PHONY: format
format: $(INSTALLED)  ## rewrite the code in the project's format
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow

.PHONY: clean
clean:  ## remove results, logs and saved training states of the default experiment (DVC's cache stays)
	rm -rf results/* logs .work
