# Every target makes what it needs and is safe to repeat. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
NODES ?= 2
PROCS ?= 2
COUNT ?= 200
HOST := .venv/bin
TRAINER := .venv-trainer/bin
HOST_STAMP := .venv/.orch-stamp
TRAINER_STAMP := .venv-trainer/.orch-stamp
export ORCH_TRAINER_PYTHON := $(CURDIR)/$(TRAINER)/python

.PHONY: help setup setup-trainer engine sim demo clean-demo test unit parity contract integration soak lint dry-run bench

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(HOST_STAMP) ## the host's environment: the orch command in .venv/bin

$(HOST_STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "orch needs Python 3.11 or newer: set PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv || { echo "Python's venv is missing: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(HOST)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup-trainer: $(TRAINER_STAMP) ## the trainer's environment: torch and the rest, as in the image

$(TRAINER_STAMP): images/requirements-cpu.txt images/requirements-cpu.no-deps.txt
	@echo "installing torch and the rest into .venv-trainer (a minute or two)"
	@$(PYTHON) -m venv .venv-trainer
	@$(TRAINER)/pip install --quiet --disable-pip-version-check -r images/requirements-cpu.txt 'pytest~=9.0' 'pytest-timeout~=2.4'
	@$(TRAINER)/pip install --quiet --disable-pip-version-check --no-deps -r images/requirements-cpu.no-deps.txt
	@touch $@

engine: setup ## a Docker engine that answers, with buildx and compose
	@$(HOST)/orch sim engine >/dev/null

sim: setup ## a simulated cluster of NODES nodes
	@$(HOST)/orch sim up --nodes $(NODES)

demo: sim ## build, push, deploy and follow a real multi-node training job
	$(HOST)/orch build
	$(HOST)/orch deploy --nodes $(NODES) --gpus 0 --procs $(PROCS) --recipe demo

clean-demo: setup ## remove all that `make demo` has made, the engine it started included
	@$(HOST)/orch sim down --images --engine

test: setup setup-trainer lint unit parity contract integration ## every test, the real cluster's included

unit: setup setup-trainer ## seconds, no network
	$(HOST)/python -m pytest tests/unit --ignore=tests/unit/trainer
	$(TRAINER)/python -m pytest tests/unit/trainer tests/soak

parity: setup-trainer ## every parallel layout against one process: loss, each gradient, their norm
	$(TRAINER)/python -m pytest tests/parity

contract: setup setup-trainer engine ## the formats that two sides share
	$(HOST)/python -m pytest tests/contract --ignore=tests/contract/test_events_trainer.py
	$(TRAINER)/python -m pytest tests/contract/test_events_trainer.py

integration: setup setup-trainer engine ## a real sshd, engine, registry and cluster
	$(HOST)/python -m pytest tests/integration

soak: setup-trainer ## COUNT faults (kill -9, torn files, flipped bits, full disks) while checkpoints are written
	PYTHONPATH=. $(TRAINER)/python tests/soak/faults.py --count $(COUNT)

lint: setup ## style and the import contracts
	@$(HOST)/ruff check orchestrator trainer tests benchmarks
	@$(HOST)/lint-imports

dry-run: setup-trainer ## every recipe on this machine's CPU: a few steps, save, load, evaluate
	@for recipe in trainer/recipes/*.yaml; do \
	  $(TRAINER)/python -m trainer run --config $$(basename $$recipe .yaml) --dry_run || exit $$?; done

bench: setup setup-trainer sim ## side by side with the least that does the job; prints ratios
	$(HOST)/python benchmarks/run.py
