# make train                                     set up .venv and train the default recipe
# make train CONFIG=configs/x.yaml PROCS=2 ARGS='--optim.lr 0.1'
# make test | test-all | lint
# make bench                                     a step beside other loops: ARGS="--processes 2 --rounds 5"
# make gpu                                       run the GPU parts here: ARGS='--only figures --minutes 3'
# make gpu-kit GPU_PYTHON=3.12 GPU_HAS=list.txt  pack gpu-kit/ for a machine without a package index
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
PROCS  ?= 1
ARGS   ?=

BIN := .venv/bin
SHELL_SCRIPTS := launch/*.sh slurm/*.sbatch slurm/common.sh tests/gpu/run.sh .ci/run .ci/wheel
# One process: a GPU if there is one; without a launcher, which would end at Ctrl-C before the run has saved.
# Several: as many GPUs, or that many processes on the CPU.
SEVERAL := $(BIN)/accelerate launch --quiet --num_machines 1 --main_process_port 0 --mixed_precision no \
           --dynamo_backend no --multi_gpu --num_processes $(PROCS)
LAUNCH   = $(if $(filter 1,$(PROCS)),$(BIN)/python,$(SEVERAL))
# Accelerate starts several processes without a GPU only when it is told so. To ask torch takes seconds: not for one.
HAS_NONE = import torch; print("false" if torch.cuda.is_available() else "true")
CPU      = $(if $(filter 1,$(PROCS)),,ACCELERATE_USE_CPU=$$($(BIN)/python -c '$(HAS_NONE)'))

.PHONY: train test test-all lint setup bench gpu gpu-kit

train: .venv/installed
	PYTHONHASHSEED=$${PYTHONHASHSEED:-0} $(CPU) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($$(getconf _NPROCESSORS_ONLN) + $(PROCS) - 1) / $(PROCS) ))} \
	  $(LAUNCH) distloop/train.py --config $(CONFIG) --expect-world $(PROCS) $(ARGS)

# In two parts, and both to their end: tests/unit on all cores, then the rest, whose ranks use them by themselves.
# PYTEST_ADDOPTS counts for both; with --junitxml=x.xml in it, the first part writes x-unit.xml and the second x.xml.
test: .venv/installed-dev
	@$(call in_two_parts,-m "not long")

test-all: .venv/installed-dev
	@$(call in_two_parts,)

# That one of them selects no test, pytest's code 5, is no failure.
in_two_parts = trap 'exit 130' INT; first=0 second=0; \
  PYTEST_ADDOPTS=$$(echo "$$PYTEST_ADDOPTS" | sed 's/\.xml/-unit.xml/') \
  $(BIN)/python -m pytest $(1) -n logical tests/unit || first=$$?; \
  $(BIN)/python -m pytest $(1) --ignore tests/unit || second=$$?; \
  case $$first$$second in 00 | 05 | 50) ;; *) exit 1 ;; esac

bench: .venv/installed-dev
	$(BIN)/python -m tests.bench.steps $(ARGS)

# From a kit, which brings what it needs, or from .venv.
gpu: $(if $(wildcard gpu-kit/wheels),,.venv/installed-dev)
	bash tests/gpu/run.sh $(ARGS)

# GPU_PYTHON: that machine's Python; GPU_HAS: its `pip freeze`. Default: this Python, and torch alone.
gpu-kit: .venv/installed-dev
	$(BIN)/python -m tests.gpu.kit $(if $(GPU_PYTHON),--python $(GPU_PYTHON)) $(if $(GPU_HAS),--has $(GPU_HAS))

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck -x $(SHELL_SCRIPTS); \
	 elif [ -n "$${CI:-}" ]; then echo "shellcheck is missing" >&2; exit 1; \
	 else echo "shellcheck is not installed: the shell scripts were not checked"; fi

setup: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
