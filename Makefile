# Targets for people who train models and for people who change the code. 'make' alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install test test-all lint torture quickstart quickstart-boxes bench

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1
# two processes, each with whole files: what a file's tests share is built once
SIDE_BY_SIDE ?= -n 2 --dist loadfile

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv with everything the tests need; a second call does nothing

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,eval,web]'
	touch $(STAMP)

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## ruff, mypy and the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow' $(SIDE_BY_SIDE)

test-all: test ## then the tests that take minutes: browser, load, many ranks, torture
	$(BIN)/python -m pytest -m slow $(SIDE_BY_SIDE)

torture: install ## kills, full disks, lost ranks for some minutes; MINUTES=30 goes on for longer
	RESUME_MINUTES=$(or $(MINUTES),0) $(BIN)/python -m pytest -s -v tests/torture

quickstart: install ## fine-tune a tiny model on made-up faces, on the CPU
	$(BIN)/python -m minigpt4.tools.quickstart

quickstart-boxes: install ## the same, then boxes: train, score and draw them
	$(BIN)/python -m minigpt4.tools.quickstart --boxes

bench: install ## every benchmark in its quick form: ratios of two programs in one run; JSON and charts in output/bench
	mkdir -p output/bench
	for name in train_step wastes memory_growth packing feature_cache data_loading data_growth data_wait ddp_scaling \
	  doctor chat serve predict "gpu_real_size --size tiny --only reference ours"; do \
	  set -- $$name; echo "== $$1"; \
	  $(BIN)/python benchmarks/$$1.py "$${@:2}" --quick --json output/bench/$$1.json; \
	done
	$(BIN)/python benchmarks/charts.py output/bench --out output/bench
