# SPDX-License-Identifier: BSD-3-Clause
#
# Each command works in a fresh clone: it makes .venv, installs a pinned PyTorch, compiles the library and runs. Repeating one
# costs only what has changed.
#
#   make demo    the worked example          make bench   the measurements of docs/performance.md
#   make test    the tests                   make lint    format, style and type checks
#   make sass    what the compiler made of the CUDA kernels, against budgets and others' kernels; needs nvcc, no GPU
#   make docs    the site, in build/site     make dist    source archive and wheel, checked, in dist/
#   make wheels  a wheel for this Python and this PyTorch that runs where no compiler is, in dist/
#   make pages   what is measured into README and docs, from benchmarks/results, and the pictures of docs/pictures
#
# TORCH_VERSION=2.12.* takes another PyTorch, PYTHON=python3.12 another Python, TORCH_INDEX=URL another package index for torch
# (https://download.pytorch.org/whl/cpu: a torch without CUDA), JOBS=1 one compiler at a time. ARGS is passed on.

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.14.*
TORCH_INDEX ?=
JOBS ?= $(shell nproc)
ARGS ?=

BIN := $(VENV)/bin
# A stamp's name carries what it was made with, so that another version makes it anew.
TORCH := $(VENV)/.torch-$(subst *,x,$(TORCH_VERSION))
TOOLS := $(VENV)/.tools
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

# The packages of one of pyproject.toml's extras, and of those that it names.
extra = $(shell $(BIN)/python cmake/extra.py $(1))

# The build looks for ninja, and a test for cmake, on the PATH.
export PATH := $(abspath $(BIN)):$(PATH)

# What runs here needs the CUDA kernels, minutes of compilation, only where there is a device.
export TORCH_GATED_ATTN_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo 0)

.PHONY: demo test bench lint sass pages docs dist wheels clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	$(BIN)/python examples/evoformer_demo.py $(ARGS)

test: $(BUILT)
	$(BIN)/python -m pytest tests $(ARGS)

bench: $(BUILT)
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy torch_gated_attn
	find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# The torch of a GPU build brings Triton, and with it the disassembler.
sass: $(TORCH)
	MAX_JOBS=$(JOBS) $(BIN)/python benchmarks/sass_report.py --peers $(ARGS)

# Needs Python alone.
pages:
	$(PYTHON) docs/pictures
	$(PYTHON) benchmarks/tables.py

docs: $(TOOLS)
	$(BIN)/pip install $(call extra,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Without isolation, which would compile against another torch; the wheel is made from the source archive.
dist: $(BUILT)
	$(BIN)/pip install $(call extra,dist)
	rm -rf dist
	MAX_JOBS=$(JOBS) $(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents --toplevel torch_gated_attn dist/*.whl
	$(BIN)/python tests/wheel_contents.py dist/*.whl

# Without CUDA kernels: TORCH_GATED_ATTN_CUDA=0. The platform is what the symbols of glibc and libstdc++ allow; PyTorch's
# libraries, and the OpenMP that it brings, stay where they are.
wheels: $(TOOLS)
	$(BIN)/pip install $(call extra,dist)
	rm -rf build/wheels
	TORCH_GATED_ATTN_LOCAL_VERSION=1 MAX_JOBS=$(JOBS) $(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir build/wheels .
	$(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' --exclude 'libcudart*' \
	  --wheel-dir dist build/wheels/*.whl
	$(BIN)/python tests/wheel_contents.py dist/*+torch*.whl

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(TORCH): | $(BIN)/python
	rm -f $(VENV)/.torch-* $(BUILT)
	$(BIN)/pip install 'torch==$(TORCH_VERSION)' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

# mypy reads torch's types, so the linters share the environment.
$(TOOLS): pyproject.toml $(TORCH)
	$(BIN)/pip install $(call extra,dev)
	touch $@

$(BUILT): $(SOURCES) $(TOOLS)
	MAX_JOBS=$(JOBS) $(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info torch_gated_attn/*.so $(VENV)
