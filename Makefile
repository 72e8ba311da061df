# Needs Python 3.11 or newer with venv, and make; all else is installed into .venv (and, for the tests against torch_xla,
# torch_tpu and clip_benchmark, into .venv-xla, .venv-torch-tpu and .venv-clip-benchmark).
PYTHON ?= python3
VENV := .venv
XLA := .venv-xla
TORCH_TPU := .venv-torch-tpu
CLIP_BENCHMARK := .venv-clip-benchmark
BIN := $(VENV)/bin
# What is compiled on installing.
NATIVE := setup.py $(wildcard clipkit/pixels/csrc/*)
UV := $(BIN)/uv
# Where this is set, every process compiles torch's, timm's and TensorFlow's sources anew: 20 s each time.
unexport PYTHONDONTWRITEBYTECODE
BROWSER := $(firstword $(foreach each,chromium chromium-browser google-chrome google-chrome-stable chrome,$(shell command -v $(each))))
TEST_ENV := CLIPKIT_XLA_PYTHON=$(CURDIR)/$(XLA)/bin/python
TEST_ENV += CLIPKIT_TORCH_TPU_PYTHON=$(CURDIR)/$(TORCH_TPU)/bin/python
TEST_ENV += CLIPKIT_CLIP_BENCHMARK_PYTHON=$(CURDIR)/$(CLIP_BENCHMARK)/bin/python

.PHONY: help install demo test lint types bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a first CLIP on embedded pictures and write its report (about ten minutes)"
	@echo "make test    all tests"
	@echo "make lint    ruff"
	@echo "make types   mypy"
	@echo "make bench   benchmarks against the peers"
	@echo "make docs    docs: the picture of the rooms and the walks, and what is listed from the code"
	@echo "make clean   remove the environments and caches"

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

# The stamps are newer than what they were made from, so an install runs only when the pins change.
$(VENV)/.demo: $(UV) setup.cfg $(NATIVE) constraints.txt
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[download,report]'
	@touch $@

$(VENV)/.dev: $(UV) setup.cfg $(NATIVE) constraints.txt
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(XLA)/.xla: $(UV) setup.cfg $(NATIVE) constraints-tpu.txt
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(XLA)
	$(UV) pip install --quiet --python $(XLA)/bin/python --constraint constraints-tpu.txt --editable '.[tpu]'
	@touch $@

$(TORCH_TPU)/.tpu: $(UV) setup.cfg $(NATIVE) constraints.txt
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(TORCH_TPU)
	$(UV) pip install --quiet --python $(TORCH_TPU)/bin/python --constraint constraints.txt --editable '.[torch-tpu]'
	@touch $@

$(CLIP_BENCHMARK)/.peer: $(UV) constraints-clip-benchmark.txt
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(CLIP_BENCHMARK)
	$(UV) pip install --quiet --python $(CLIP_BENCHMARK)/bin/python --constraint constraints-clip-benchmark.txt clip_benchmark requests
	@touch $@

install: $(VENV)/.dev $(XLA)/.xla $(TORCH_TPU)/.tpu $(CLIP_BENCHMARK)/.peer

demo: $(VENV)/.demo
	$(BIN)/clipkit demo

test: $(VENV)/.dev $(XLA)/.xla $(TORCH_TPU)/.tpu $(CLIP_BENCHMARK)/.peer
	@$(if $(BROWSER),,echo "No Chromium here: the tests that look at the report in a browser are left out.")
	$(TEST_ENV) $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(if $(BROWSER),,-m "not browser") $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy can't see setup.cfg's mapping of packages to folders: it gets a tree of links that looks as installed.
types: $(VENV)/.dev
	rm -rf .typing && mkdir -p .typing/clipkit
	ln -s $(CURDIR)/clipkit/* .typing/clipkit/
	ln -s $(CURDIR)/tfrecord_tools $(CURDIR)/eval $(CURDIR)/train .typing/clipkit/
	$(BIN)/mypy

bench: $(VENV)/.dev $(CLIP_BENCHMARK)/.peer
	@for each in benchmarks/[a-z]*.py benchmarks/training/[a-z]*.py; do echo "== $$each"; $(BIN)/python $$each || exit 1; done

docs: $(VENV)/.dev
	$(BIN)/python docs/architecture.py
	$(BIN)/python docs/accepts.py
	$(BIN)/python docs/models.py

clean:
	rm -rf $(VENV) $(XLA) $(TORCH_TPU) $(CLIP_BENCHMARK) .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
