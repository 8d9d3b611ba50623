# Every target sets up what it needs: a virtual environment in .venv, from constraints.txt.
#   make demo     what the small model in the package sees, as one page: demo-output/report.html
#   make test     the tests with coverage, but for those that compile C++ or drive a browser
#   make test-all all tests; those of the app need Chromium or Chrome
#   make lint     ruff (rules and format) and types
#   make types    mypy, strict
#   make format   rewrite the sources in the house format
#   make docs     build the documentation into site/
#   make bench    compare the speed of the forward pass with other implementations
#   make clean    remove everything that these targets made
#
# Variables:
#   PYTHON        interpreter that makes the environment (3.10 or newer)
#   TORCH_INDEX   a further package index for torch. Empty: the package index's default build, which on Linux brings CUDA
#                 (2.7 GB to download). https://download.pytorch.org/whl/cpu: the CPU build (0.2 GB).
#   JOBS          test processes
#   TEST_ARGS, BENCH_ARGS, DEMO_ARGS   further arguments

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
TORCH_INDEX ?=
JOBS ?= 2
EXTRAS := dev,docs,demo,hf,datasets,search,viz,video,app,train,onnx
PY := $(BIN)/python
STAMP := .venv/.installed
SOURCES := src tests examples benchmarks tools hubconf.py

.PHONY: help setup demo test test-all lint types format docs bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "amradio needs Python 3.10 or newer: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)
	$(PY) -m amradio demo $(DEMO_ARGS)

test: $(STAMP)
	$(PY) -m pytest -n $(JOBS) -m 'not compile and not browser' --cov --cov-report=term $(TEST_ARGS)

test-all: $(STAMP)
	$(PY) -m pytest -n $(JOBS) $(TEST_ARGS)

lint: $(STAMP) types
	$(PY) -m ruff check $(wildcard $(SOURCES))
	$(PY) -m ruff format --check $(wildcard $(SOURCES))

types: $(STAMP)
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix $(wildcard $(SOURCES))
	$(PY) -m ruff format $(wildcard $(SOURCES))

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(STAMP)
	$(PY) benchmarks/model_forward.py $(BENCH_ARGS)

clean:
	rm -rf .venv site demo-output build dist htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
