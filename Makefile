# Three commands to learn: make serve, make test, make check. Each does its own set-up, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BARE := $(VENV)-bare
TORCH ?= torch==2.13.0
ARGS ?=
BENCH_ARGS ?= --workload cpu64 --model default --peer transformers
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
BARE_STAMP := $(BARE)/.ready
ROOMS := argosy/__init__.py argosy/__main__.py cluster placement kernels workers deploy tests benchmarks examples
# Tests run many small processes on few cores: one thread each is quicker than all of them fighting for the cores.
PYTEST := PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -P -m pytest

.PHONY: help setup serve check lint house test test-bare bench wheel clean

help:
	@echo "make serve            set up once, start a local Ray cluster and serve a model on 127.0.0.1:8000"
	@echo "make serve ARGS=...   the same with flags of 'argosy serve', such as ARGS='Qwen/Qwen3-0.6B --port 8080'"
	@echo "make test             set up once, then every check and every test that this machine can run"
	@echo "make check            format, lint, types, and the rules of the house (under a minute)"
	@echo "make bench            measure this machine; BENCH_ARGS=... for other workloads (see 'argosy bench --help')"
	@echo "make setup | clean    only the set-up | remove what it made"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Argosy needs Python 3.11, 3.12 or 3.13 with venv. On Debian or Ubuntu: sudo apt-get install python3 python3-venv" >&2; \
	  exit 1; fi
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (once; about two minutes)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@# torch first and by itself: on a machine without an NVIDIA card, a CPU build that is on offer is enough
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[serve,dev]'
	@touch $@

$(BARE_STAMP): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "Argosy needs Python 3.11, 3.12 or 3.13 with venv" >&2; exit 1; fi
	@[ -x $(BARE)/bin/python ] || $(PYTHON) -m venv $(BARE)
	@$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock \
	  msgspec prometheus-client pyyaml pytest pytest-timeout hypothesis
	@$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

serve: $(STAMP)
	@exec $(BIN)/argosy serve $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

house: $(STAMP)
	$(PYTEST) -q tests/house

check: lint house

# What the scheduler and the planner need is seen here: neither torch nor Ray is installed.
test-bare: $(BARE_STAMP)
	@! $(BARE)/bin/python -c 'import torch' 2>/dev/null && ! $(BARE)/bin/python -c 'import ray' 2>/dev/null
	PYTHONSAFEPATH=1 $(BARE)/bin/python -P -m pytest -q tests/cluster tests/placement

test: lint test-bare
	$(PYTEST) tests

bench: $(STAMP)
	$(BIN)/argosy bench $(BENCH_ARGS)

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(BARE) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis argosy.egg-info src/argosy.egg-info
