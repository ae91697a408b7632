# Two commands: `make demo` and `make test`. Both set themselves up in .venv; all they need is Python >= 3.11.
.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := /bin/sh

VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
FRAMEWORKS := .venv-integrations
DATA ?= digits
OUT ?= runs/demo
DEMO ?= compare $(DATA) --out $(OUT)
WORKERS ?= 2

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PYTHONUNBUFFERED := 1

.PHONY: help demo test integrations trainers docs lint format types imports pytest numerics data coverage slowest bench-quick dist versions clean distclean

help:
	@echo 'make demo   train on real handwritten digits and write $(OUT)/report.html'
	@echo 'make test   tests, doctests, lint, format, types, direction of imports'
	@echo 'make numerics  the numeric tests as three other processors compute'
	@echo 'make data   the tests that read Fashion-MNIST'
	@echo 'make integrations   the tests under Lightning, Hugging Face, timm, skorch, which it installs in $(FRAMEWORKS)'
	@echo 'make docs   the documentation, with its examples executed, in docs/_build/html'
	@echo 'make bench-quick   the step of every recipe: launches, and times beside torch, in about two minutes'
	@echo 'make coverage      lines and branches that the tests do not reach'
	@echo 'make slowest       the tests that take longest'
	@echo 'make versions TORCH=2.14.1   the tests with another torch, in an environment of its own'
	@echo 'make dist   wheel and source archive in dist/, checked as a package index would'
	@echo 'make clean  remove what these commands wrote, but not $(VENV) (make distclean: that too)'

demo: $(VENV)/installed-demo
	$(BIN)/precond $(DEMO)

# All checks run, whatever the ones before found; the tests come last.
test: $(VENV)/installed-test
	@$(MAKE) --no-print-directory --keep-going lint format types imports pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

format: $(VENV)/installed-test
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

imports: $(VENV)/installed-test
	$(BIN)/lint-imports

# Sums in other orders, as on other processors: torch's own code without vectors (which takes MKL along), that of AVX2 in torch, MKL and
# oneDNN, and MKL's code that is the same on all processors. A bound that holds on one of them alone was luck.
PROCESSORS := numerics-default numerics-avx2 numerics-compatible
NUMERICS := tests/contract tests/curvature tests/evidence/test_statements.py tests/inputs tests/matrix $(wildcard tests/test_*.py)
.PHONY: $(PROCESSORS)
numerics-default: export ATEN_CPU_CAPABILITY := default
numerics-avx2: export ATEN_CPU_CAPABILITY := avx2
numerics-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
numerics-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
numerics-compatible: export MKL_CBWR := COMPATIBLE

# One thread per process: small tensors gain nothing from more, and the workers of the tests share the cores.
demo pytest data trainers docs coverage slowest $(PROCESSORS): export OMP_NUM_THREADS := 1
demo pytest data trainers docs coverage slowest $(PROCESSORS): export MKL_NUM_THREADS := 1
demo pytest data trainers docs coverage slowest $(PROCESSORS): export OPENBLAS_NUM_THREADS := 1
pytest: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS)

numerics: $(VENV)/installed-test
	@$(MAKE) --no-print-directory --keep-going $(PROCESSORS)

$(PROCESSORS): $(VENV)/installed-test
	@echo '$@'
	$(BIN)/python -m pytest -q -n $(WORKERS) $(NUMERICS)

data: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m fashion_mnist

coverage: $(VENV)/installed-test $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --cov --cov-report=term-missing --cov-report=json
	$(BIN)/python tests/covered.py coverage.json

slowest: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n $(WORKERS) --durations=40

bench-quick: $(VENV)/installed-test
	$(BIN)/python benchmarks/launches.py
	$(BIN)/python benchmarks/step.py

dist: $(VENV)/installed-dev
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# Another torch than the lock file's; all else as it pins. From an index of processor builds: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL.
TORCH ?= 2.14.1
versions: VERSIONED := .venv-torch-$(TORCH)
versions:
	@mkdir -p $(VERSIONED)
	@sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(VERSIONED)/constraints.txt
	@$(MAKE) --no-print-directory VENV=$(VERSIONED) CONSTRAINTS=$(VERSIONED)/constraints.txt pytest

# The frameworks bring much with them, and have an environment and a lock file of their own.
integrations:
	@$(MAKE) --no-print-directory VENV=$(FRAMEWORKS) CONSTRAINTS=constraints-integrations.txt trainers

trainers: $(VENV)/installed-integrations
	$(BIN)/python -m pytest -n $(WORKERS) tests/integrations docs/test_documents.py \
		-k 'integrations or trainer or Lightning or Accelerate'

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

# An installation is renewed when what it depends on changes, and never otherwise.
$(VENV)/installed-demo: EXTRAS := cli,report
$(VENV)/installed-test: EXTRAS := cli,report,test
$(VENV)/installed-docs: EXTRAS := cli,report,docs
$(VENV)/installed-dev: EXTRAS := dev
$(VENV)/installed-integrations: EXTRAS := integrations,test
$(VENV)/installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/pyvenv.cfg
	@echo 'Installing precond[$(EXTRAS)] and the versions of $(CONSTRAINTS) in $(VENV) (minutes the first time) ...'
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) hatchling editables
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/pyvenv.cfg:
	@test -n '$(PYTHON)' || { echo 'precond needs Python 3.11 or newer, and none of python3.11, python3, python is.'; \
		echo 'Install it, or name it: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "precond needs Python 3.11 or newer; $(PYTHON) is $$('$(PYTHON)' --version 2>&1 || echo not found)."; \
		echo 'Name another one: make PYTHON=/path/to/python3.11 ...'; exit 1; }
	@'$(PYTHON)' -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'Python could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv'; exit 1; }

clean:
	rm -rf runs/demo dist build docs/_build docs/gallery docs/generated docs/sg_execution_times.rst
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests docs examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(FRAMEWORKS) .venv-torch-*
