# make quickstart   compress the model that ships and print what it cost and gained
# make test         the tests
# make check        formatting, lint and types
# make zoo          every family of transformers through Skink; writes docs/zoo.md (half an hour)
# make bench        CPU benchmarks; make bench-gpu: GPU benchmarks
# make bench-quality   what each method of decomposition loses, the study, and what training wins back (a day)
# make clean        remove what was built (not the environment)
#
# All of them share one virtual environment, made when it is missing or out of date. PYTHON=... chooses its interpreter.

PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
CPP := CMakeLists.txt build_backend.py $(shell find skink -name '*.h' -o -name '*.cpp')

.PHONY: quickstart test check zoo bench bench-gpu bench-quality clean environment

quickstart: $(VENV)/.skink
	$(BIN)/skink compress stdlib-llama --recipe quickstart --out build/quickstart --overwrite --onnx \
		--prompt "class Path:"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

zoo: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo

bench: $(VENV)/.skink
	@set -e; for suite in benchmarks/cpu/*.py; do echo "== $$suite"; $(BIN)/python $$suite; done

# There is nothing here yet: the one GPU kernel, of low_rank_linear, waits for a machine to be timed on.
bench-gpu: $(VENV)/.skink
	@set -e; suites=$$(ls benchmarks/gpu/*.py 2>/dev/null || true); \
	test -n "$$suites" || echo "There are no GPU benchmarks yet."; \
	for suite in $$suites; do echo "== $$suite"; $(BIN)/python $$suite; done

bench-quality: $(VENV)/.skink
	$(BIN)/python benchmarks/quality/low_rank.py --out benchmarks/results/low_rank_quality.md
	$(BIN)/python benchmarks/quality/study.py --out build/study --images docs/images
	$(BIN)/python benchmarks/quality/recovery.py --out benchmarks/results/recovery.md

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

environment: $(VENV)/.dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Skink needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# PyTorch comes first: the kernels are compiled against the copy that is installed, so they are built without isolation.
$(VENV)/.build: $(VENV)/bin/python constraints.txt
	$(PIP) $$(grep '^torch==' constraints.txt) scikit-build-core cmake ninja
	@touch $@

$(VENV)/.skink: $(VENV)/.build pyproject.toml $(CPP)
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.skink
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
