# ARGS="key=value ..." goes on to the program; PYTHON=python3.12 chooses the interpreter of a new environment.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs

help:
	@echo 'make demo    private digits to a publishable synthetic set, in runs/; ARGS="privacy.epsilon=1"'
	@echo 'make test    the tests; ARGS="tests/privacy -k ledger", "-m long" for those of a minute or more, "-m chaos" for clusters, searches and faults, an hour'
	@echo 'make lint    style, types, and the lock against pyproject.toml and the environment'
	@echo 'make bench   every program in benchmarks/, on its quick setting'
	@echo 'make docs    the documents as a site in build/site'
	@echo 'The first of them installs into .venv.'

demo: .venv/.ready
	@$(BIN)/python jobs/pipeline.py $(ARGS)

test: .venv/.ready
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python .ci/lock.py check

bench: .venv/.ready
	@set -e; for program in $(BENCHMARKS); do echo "$$program"; $(BIN)/python $$program --quick $(ARGS); done

docs: .venv/.ready
	@$(BIN)/python docs/site/build.py build/site

.venv/.ready: pyproject.toml requirements.lock
	@echo 'installing into .venv (once; some minutes)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e ".[dev]"
	@# The reference of FID, for tests alone: it asks for torchvision, of which there is no build for every torch.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps torch-fidelity==0.4.0
	@touch $@
