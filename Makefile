# Everything runs from .venv, which the targets make themselves. Needs Python 3.11 to 3.13 with pip and venv, and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check chaos cluster long fuzz bench serve-env clean

VENV := .venv
BIN := $(VENV)/bin
SERVE := .venv-serve
DEMO := demo-run
BENCH ?= end_to_end
SCHEDULES ?= 20
FIRST_SEED ?= 0
# Test files run side by side; each worker is one thread wide, or they would wait for each other.
WORKERS ?= $(shell n=$$(nproc); echo $$(( n < 4 ? n : 4 )))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

# Stamps lie inside .venv, so deleting it deletes them.
$(VENV)/.done-venv:
	@for name in $${PYTHON:-python3.11 python3 python3.12 python3.13}; do \
		if "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
			echo "Making $(VENV) with $$("$$name" --version)"; \
			"$$name" -m venv $(VENV); touch $@; exit 0; \
		fi; \
	done; \
	echo "No Python 3.11, 3.12 or 3.13 found; name one: make PYTHON=/path/to/python3.11 demo" >&2; exit 1

# RapidOCR goes in without its dependencies, which are ours already: it asks for opencv-python, whose bundled Qt needs
# system libraries that a bare machine lacks; opencv-python-headless stands in for it. Its metadata also refuses Python
# 3.13, where it reads all the same: 1.4.4 was tried there with the versions of constraints.txt.
$(VENV)/.done-runtime: $(VENV)/.done-venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e .
	$(BIN)/python -m pip install -c constraints.txt --no-deps --ignore-requires-python rapidocr-onnxruntime
	@touch $@

$(VENV)/.done-dev: $(VENV)/.done-runtime
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.done-runtime ## Read the sample documents and videos into ./demo-run. Needs no GPU and no weights.
	@echo; echo "== 1 of 3: text of every page. Pages without a trustworthy text layer are read by the CPU engine."
	$(BIN)/pagereel ocr jobs/samples/documents -o $(DEMO)/ocr --engine cpu
	@$(BIN)/pagereel show $(DEMO)/ocr
	@echo; echo "== 2 of 3: layout blocks. Pages that must be read go through the whole MiniCPM-V road, on random weights."
	$(BIN)/pagereel parse jobs/samples/documents -o $(DEMO)/parse --model demo
	@$(BIN)/pagereel show $(DEMO)/parse --chars 120
	@echo; echo "== 3 of 3: captions of video segments, on random weights."
	$(BIN)/pagereel caption jobs/samples/videos -o $(DEMO)/caption --model demo
	@$(BIN)/pagereel show $(DEMO)/caption
	@echo
	@echo "Results: $(DEMO)/ocr, $(DEMO)/parse, $(DEMO)/caption. What the demo model wrote means nothing: its weights are random."
	@echo "Count:   $(BIN)/pagereel status $(DEMO)/ocr"
	@echo "Load:    $(BIN)/python -c \"import pandas; print(pandas.read_parquet('$(DEMO)/ocr/pages'))\""
	@echo "Again:   make demo resumes the same runs and computes nothing twice."

check: $(VENV)/.done-dev ## Lint, format, types, import rules.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## The checks, then the tests, a file a core: make test WORKERS=1 runs one after the other.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# pytest ends with 5 when it selected no test.
chaos: $(VENV)/.done-dev ## Kills of larger runs, then random faults by seed: make chaos SCHEDULES=200. Needs root.
	$(BIN)/pytest -m chaos || test $$? = 5
	$(BIN)/python -m tests.chaos --schedules $(SCHEDULES) --first-seed $(FIRST_SEED)

cluster: $(VENV)/.done-dev ## Runs on three hosts in network namespaces, which die or are cut off. Needs root and iproute2.
	$(BIN)/pytest -m cluster

long: $(VENV)/.done-dev ## One run over 50,000 tiny pages and 2,000 clips: memory, descriptors, processes stay flat.
	$(BIN)/python -m tests.long $(LONG)

fuzz: $(VENV)/.done-dev ## 2,000 damaged files through whole runs, beside good ones: make fuzz FUZZ="--seed 7".
	$(BIN)/python -m tests.fuzz $(FUZZ)

bench: $(VENV)/.done-dev ## A benchmark of jobs/bench: make bench BENCH=end_to_end.
	$(BIN)/python -m jobs bench $(BENCH)

# transformers wants torchvision to serve pictures, and beside a CPU build of torch its compiled part cannot load: it is
# kept out of .venv, and tests/endpoint/serve_launcher.py says how it is used all the same.
$(SERVE)/.done-serve: $(VENV)/.done-venv constraints.txt
	$(BIN)/python -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install -c constraints.txt torch transformers pillow numpy fastapi uvicorn openai accelerate
	$(SERVE)/bin/python -m pip install --no-deps torchvision==0.28.0
	@touch $@

serve-env: $(SERVE)/.done-serve ## An environment that runs `transformers serve`, for the test of the endpoint engine.
	@echo "PAGEREEL_SERVE_PYTHON=$(CURDIR)/$(SERVE)/bin/python make test"

clean: ## Delete .venv, demo-run and every cache.
	rm -rf $(VENV) $(SERVE) $(DEMO) build dist .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	find schemas operators pipeline jobs tests -name __pycache__ -prune -exec rm -rf {} +
