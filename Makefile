# The commands people type. All is installed into .venv, in the versions that constraints.txt pins.

PYTHON ?= python3
ARGS   ?=

V     := .venv
BIN   := $(V)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

# A .venv of an older Python, or one that was copied here from another folder, is made anew
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
USABLE := $(shell $(BIN)/python $(NEW_ENOUGH) 2>/dev/null && head -n 2 $(BIN)/pip 2>/dev/null | grep -qF '$(CURDIR)/$(V)/' && echo yes)
ifneq ($(USABLE),yes)
$(shell rm -f $(V)/.made $(V)/.torch $(V)/.core $(V)/.dev $(V)/.docs $(V)/.gpu)
endif

.PHONY: help quickstart test gpu-test bench build docs docs-test
.NOTPARALLEL:

help:
	@echo 'make quickstart  install what is needed, then train a dense and a sparse model on real text'
	@echo '                 (options: make quickstart ARGS="--steps 100 --pattern bigbird")'
	@echo 'make test        install the dev extra, then check the book and run its tests'
	@echo 'make gpu-test    the tests that need an NVIDIA GPU'
	@echo 'make build       make the package, the tests, the demo and the README from the notebooks'
	@echo 'make docs        render the docs site into _docs, with Quarto where it is installed, else with Sphinx'
	@echo 'make docs-test   render it with Sphinx and test every page in Chromium'
	@echo 'make bench       measure speed and memory, and draw the charts'
	@echo '                 (options: make bench ARGS="--quick"; it continues where it was interrupted)'

quickstart: $(V)/.core
	@$(BIN)/pythia_quickstart $(ARGS)

# Notebooks are tested side by side: threads that wait for one another must not keep a core from those that work
test: $(V)/.dev
	@$(BIN)/pythia_book check
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/pythia_book test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4

gpu-test: $(V)/.gpu
	@$(BIN)/python -m pytest -m cuda

build: $(V)/.dev
	@$(BIN)/pythia_book build

docs: $(V)/.docs
	@if command -v quarto >/dev/null; then $(BIN)/pythia_book docs; else $(BIN)/pythia_docs $(ARGS); fi

docs-test: $(V)/.docs
	@$(BIN)/pythia_docs --test $(ARGS)
	@$(BIN)/python -m pytest -m slow tests/test_24a_browser.py -k "not docs_site"

bench: $(if $(shell nvidia-smi -L 2>/dev/null),$(V)/.gpu,$(V)/.core)
	@$(BIN)/pythia_bench $(ARGS)

$(V)/.made:
	@test "$(USABLE)" = yes || $(PYTHON) $(NEW_ENOUGH) 2>/dev/null || { echo "pythia_nb needs Python 3.11 or newer, and\
	 $(PYTHON) is not that; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test "$(USABLE)" = yes || { echo "making $(V) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(V); }
	@touch $@

# On a machine without an NVIDIA GPU the CPU build, which is a tenth of the size. uv knows where those are kept.
$(V)/.torch: $(V)/.made constraints.txt
	@if nvidia-smi -L >/dev/null 2>&1; then echo "installing $(TORCH)"; $(PIP) $(TORCH); \
	else echo "installing $(TORCH), the CPU build"; $(PIP) uv; \
	  UV_HTTP_RETRIES=1 $(BIN)/uv pip install -qq --python $(BIN)/python --constraint constraints.txt --torch-backend=cpu $(TORCH) 2>/dev/null \
	  || { echo "the place of the CPU builds can't be reached: taking the $(TORCH) that pip finds"; $(PIP) $(TORCH); }; fi
	@touch $@

$(V)/.core: $(V)/.torch settings.ini setup.py pyproject.toml
	@echo "installing pythia_nb and what it needs"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(V)/.dev: $(V)/.core
	@echo "installing what the book's tests need"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(V)/.docs: $(V)/.dev
	@echo "installing what the docs site needs"
	@$(PIP) --no-build-isolation --editable '.[dev,docs]'
	@touch $@

$(V)/.gpu: $(V)/.dev
	@echo "installing CuPy"
	@$(PIP) --no-build-isolation --editable '.[dev,cuda]'
	@touch $@
