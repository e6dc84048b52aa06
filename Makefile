# `make demo` and `make test` set everything up by themselves: a virtual environment in VENV, at the versions of
# constraints.txt. Nothing is installed again until pyproject.toml or constraints.txt changes.
#
#   make demo         the tour on real text (under 4 minutes on 2 cores)
#   make test         the tests but the slow ones (10 minutes on 2 cores)     make lint    ruff: rules and format
#   make test-all     all tests (25 minutes on 2 cores)                       make types   mypy
#   make test-newest  the tests with the newest torch, transformers, peft     make wheel   the wheel, in DIST
#                     and triton, in an environment of their own              make docs    the pages, in build/docs
#   make durations    make test, and which modules are above their budget     make bench   speed beside rivals
#   make test-sanitized  the tests of the C++ forms, built with sanitizers (needs g++; test-all runs some of them)
#
# PYTHON      a Python >= 3.11 to build the environment from (found by itself)
# VENV        where the environment lives; NEWEST: that of `make test-newest`
# DIST        where the wheel goes
# TORCH_ARGS  more arguments for installing torch, such as an --index-url with builds without CUDA
# ARGS        more arguments for pytest, `headgate demo` or `headgate bench`
# JOBS        how many processes run tests (all cores); 0: one, in which a debugger works

VENV ?= .venv
DIST ?= dist
NEWEST ?= $(VENV)-newest
TORCH_ARGS ?=
ARGS ?=
JOBS ?= logical
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A module stays in one process, so that what its tests share is made once; tests/conftest.py says which come first.
SPREAD = -n $(JOBS) --dist loadscope --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD)

# The C++ forms watched by their own build, which lies beside the others. libstdc++ first, too: torch throws across both.
WATCHED = CXX="$(CURDIR)/tests/support/sanitizing_cxx" HEADGATE_CACHE="$(abspath $(VENV))/sanitized" OMP_NUM_THREADS=2 \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"
SANITIZED = $(WATCHED) $(BIN)/pytest -k "(native and not test_native) or watches" tests/kernels/test_native.py::test_the_library_watches_itself

.PHONY: setup demo test test-all test-sanitized test-newest durations bench lint types docs wheel clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# torch first and at its exact version: resolving it beside everything else may fetch several builds to compare.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: needs a Python >= 3.11 with venv and ensurepip (on Debian: python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/headgate demo $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)
	$(SANITIZED) tests/kernels/test_layouts.py tests/kernels/test_plan.py -m "not slow"

test-sanitized: $(STAMP)
	$(SANITIZED) tests/kernels $(ARGS)

durations: $(STAMP)
	$(PYTEST) -m "not slow" --durations=30 --module-budget=30 $(ARGS)

# The pins of constraints.txt without those of the four packages. torch first: it decides which triton may be installed.
test-newest:
	@test -n "$(PYTHON)" || { echo "make: needs a Python >= 3.11 with venv and ensurepip (on Debian: python3-venv)"; exit 1; }
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -vE '^(torch|transformers|peft|triton|tokenizers|huggingface_hub|setuptools)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install -U $(TORCH_ARGS) torch
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install -U -c $(NEWEST)/constraints.txt transformers peft
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install -c $(NEWEST)/constraints.txt -e '.[test]'
	$(NEWEST)/bin/headgate doctor
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest $(SPREAD) -m "not slow" $(ARGS)

bench: $(STAMP)
	$(BIN)/headgate bench moe $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy wants a folder of the package's name above the package: a link serves, whatever the checkout is called.
types: $(STAMP)
	@mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/headgate
	MYPYPATH=$(VENV)/types $(BIN)/mypy --cache-dir $(VENV)/.mypy_cache -p headgate

# the pages, in build/docs/index.html; a warning is an error, and nothing is fetched
docs: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

# setuptools would pack what an older build left in build/
wheel: $(STAMP)
	@rm -rf build
	$(PIP) wheel --no-deps -w $(DIST) .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
