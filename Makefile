# LLaVA-TA. `make` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
# Where to take torch from, when not from PyPI, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV  := .venv
BIN   := $(VENV)/bin
LOCK  := requirements/lock.txt
STAMP := $(VENV)/.installed
# --no-compile: most of the packages' 23,000 modules are never imported. Those that are get compiled at the end of the
# install. Python must be let keep them: compiling anew costs each process 8 s, and a notebook is a process.
PIP   := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
# papermill hands the kernel's output on, so that progress bars show. `cat` makes it a pipe: a file would be truncated.
# Every kernel warns that it listens on a local socket; that is left out of stderr.
PAPERMILL := papermill --no-progress-bar --log-level WARNING --stdout-file /dev/stdout --stderr-file /dev/stdout
PIPELINE := python -u -m llava_ta.pipeline
SHOWN := 2> >(grep --line-buffered -v 'Kernel is running over TCP' >&2) | cat
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYDEVD_DISABLE_FILE_VALIDATION := 1
unexport PYTHONDONTWRITEBYTECODE
# peft asks transformers by a name that is to go: dozens of warnings in a run, of nothing that a user could change.
export PYTHONWARNINGS ?= ignore::FutureWarning:transformers.modeling_utils

.PHONY: help install demo openi study test test-slow test-gpu radgraph lab room docs prepare outputs idea export check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo
	@echo "  PYTHON=python3.12      the Python to make .venv with (3.11 or newer)"
	@echo "  TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "                         take torch from there: without CUDA, about 4 GB less"

install: $(STAMP)  ## make .venv with the tested versions

# The stamp is written last. An install that was cut short leaves .installing behind, and is started afresh.
$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and PYTHON=$(PYTHON) is `$(PYTHON) --version 2>&1`." \
	       "Name one: make install PYTHON=python3.12"; exit 1; } >&2
	@if [ -e $(VENV)/.installing ]; then echo "The last install was cut short: starting $(VENV) afresh."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.installing
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(PIP) --no-deps --index-url $(TORCH_INDEX) $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ;]*\).*/\1/p' $(LOCK))
endif
	$(PIP) --constraint $(LOCK) --editable '.[dev,lab,study]'
	$(BIN)/python tools/import_all.py
	@touch $@ && rm $(VENV)/.installing

demo: $(STAMP)  ## the whole pipeline on embedded data, ending in runs/demo/report.html
	@set -o pipefail; $(PIPELINE) --profile demo $(SHOWN)

.PHONY: openi-dir
openi-dir:
	@if [ -z "$(OPENI_DIR)" ] || { [ ! -d "$(OPENI_DIR)/NLMCXR_png" ] && \
	    { [ ! -f "$(OPENI_DIR)/index.csv" ] || [ ! -d "$(OPENI_DIR)/frontal" ]; }; }; then \
	  echo "make openi needs OPENI_DIR, a folder that holds NLMCXR_png/, or index.csv and frontal/" \
	       "(see data_manifests/README.md);" \
	       "OPENI_DIR is '$(OPENI_DIR)'." >&2; exit 2; fi

openi: openi-dir $(STAMP)  ## the same on real films: make openi OPENI_DIR=folder-of-open-i
	@set -o pipefail; export LLAVA_TA_OPENI_DIR="$$(cd "$(OPENI_DIR)" && pwd)"; $(PIPELINE) --profile openi $(SHOWN)

# A row whose record is there and whose inputs are unchanged is left alone; RECORDS=elsewhere makes it again.
study: openi-dir $(STAMP)  ## rows of the study: make study OPENI_DIR=folder [ROW=anatomy-0] [RECORDS=folder] [QUICK=1]
	@mkdir -p runs/study/notebooks
	@set -o pipefail; export LLAVA_TA_OPENI_DIR="$$(cd "$(OPENI_DIR)" && pwd)"; \
	$(PAPERMILL) nbs/11b_study.ipynb runs/study/notebooks/11b_study.ipynb -p profile study -p row "$(or $(ROW),all)" \
	  $(if $(QUICK),-p quick True,-p records "$(or $(RECORDS),study)") $(SHOWN)

# Two notebooks, or two files of tests, run at a time, with one thread each.
test test-slow: export OMP_NUM_THREADS := 1
test test-slow: export MKL_NUM_THREADS := 1
test test-slow test-gpu: export TOKENIZERS_PARALLELISM := false

# What examples leave behind has a folder of its own, which goes with the end of the test.
test: $(STAMP)  ## the notebooks' own tests, and the pipeline at its smallest
	@status=0; examples=$$(mktemp -d); trap 'rm -rf "$$examples"' EXIT; \
	TMPDIR="$$examples" nbdev_test --n_workers 2 || status=1; \
	python -m pytest tests -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder || status=1; \
	exit $$status

test-slow: $(STAMP)  ## a wheel in a clean environment, killing and resuming: up to an hour
	python -m pytest tests -m "slow and not gpu"

test-gpu: $(STAMP)  ## what needs a GPU
	python -m pytest tests -m gpu

radgraph: $(STAMP)  ## environments of their own for RadGraph F1: 6 GB each with CUDA
	python -m llava_ta.radgraph install $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

lab: $(STAMP)  ## JupyterLab on the notebooks
	jupyter lab --notebook-dir nbs

room: $(STAMP)  ## the reading room in a browser: make room RUN=demo
	python -m llava_ta.serve $(if $(RUN),--run "$(RUN)") $(if $(PROFILE),--profile "$(PROFILE)") $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)")

docs: $(STAMP)  ## the site, in _docs/, and README.md
	python tools/build_docs.py

outputs: $(STAMP)  ## run the notebooks and store what they show
	python tools/store_outputs.py

idea: $(STAMP)  ## draw the first page's figure again, with a model of minutes
	@mkdir -p runs/idea/notebooks
	@set -o pipefail; $(PAPERMILL) nbs/11a_idea.ipynb runs/idea/notebooks/11a_idea.ipynb $(SHOWN)

export: $(STAMP)  ## write llava_ta/ from nbs/
	nbdev_export

clean: $(STAMP)  ## strip what does not belong into a commit from nbs/
	python tools/clean_notebooks.py

check: $(STAMP)  ## lint, and the rules of the repository
	ruff check llava_ta tests tools
	python -m pytest tests/test_repository.py

prepare: $(STAMP)  ## before a commit: export, test, clean, docs
	$(MAKE) export
	$(MAKE) test
	$(MAKE) clean
	$(MAKE) docs
