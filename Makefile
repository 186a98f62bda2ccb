# mome_dist: everything starts with `make setup`; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The Python that makes the environment, and the environment itself.
PYTHON ?= python3
VENV ?= .venv
# Extra pip arguments for torch alone, such as the index of PyTorch's CPU builds (see tools/setup_environment.sh).
TORCH_PIP_ARGS ?=
# Arguments for pytest, such as PYTEST_ARGS='-k dispatch -x'.
PYTEST_ARGS ?=

STAMP := $(VENV)/.setup-stamp
PY := $(VENV)/bin/python
MOME_DIST := $(VENV)/bin/mome-dist
export PYTHON TORCH_PIP_ARGS

.PHONY: help setup assets lint test docs notebook quickstart clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)$$/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP)  ## make .venv with the pinned dependencies (a second run does nothing)

$(STAMP): setup.py pyproject.toml constraints.txt tools/setup_environment.sh tools/system_packages.sh
	tools/system_packages.sh
	tools/setup_environment.sh $(VENV)
	touch $@

assets: setup  ## fetch the pretrained models into the cache (a second run does nothing)
	$(MOME_DIST) fetch

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	printf '%s\n' 3.11 3.12 | xargs --max-procs 2 --replace=VERSION $(PY) -m mypy --python-version VERSION

# The tests of GPUs are rehearsed on the CPU; tools/gpu_suite.py runs them on a GPU.
test: export CUDA_VISIBLE_DEVICES :=
test: export MOME_DIST_TEST_DEVICE := cpu
# One process more than CONTRIBUTING.md's two cores: that of the cluster waits for jobs most of the time.
test: setup lint  ## lint and all tests, on the CPU
	$(MOME_DIST) fetch --for-tests
	$(PY) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

docs: setup  ## the site of the documentation, in site/; a link that leads nowhere is an error
	$(PY) -m mkdocs build --strict

notebook: setup  ## run the notebook of the documentation anew, on runs/tiny and its evaluation
	$(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[notebook]'
	$(VENV)/bin/jupyter execute --inplace --NotebookClient.record_timing=False docs/tutorials/notebook.ipynb

quickstart: setup  ## the whole pipeline on this machine's CPU: assets, corpus, training, evaluation, report
	$(MOME_DIST) fetch
	$(MOME_DIST) prepare synthetic
	$(MOME_DIST) launch --nproc 2 pretrain video
	$(MOME_DIST) launch --nproc 2 train experiment=quickstart
	$(MOME_DIST) launch --nproc 2 evaluate runs/quickstart baselines=[chance,untrained]
	$(MOME_DIST) report runs/quickstart

clean:  ## remove build products and tool caches; .venv, runs and the cache of models stay
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
