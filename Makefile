PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench gpu clean

demo: $(INSTALLED)
	$(BIN)/fastgate train --preset demo

test: $(INSTALLED)
	$(BIN)/pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/pytest bench

# on a machine with a GPU: every kernel as compiled and the other GPU tests, then the benchmarks into
# bench/results/<device>/<date>.json; compiling takes longest, hence the processes
gpu: $(INSTALLED)
	$(BIN)/pytest -n 8 tests/kernels
	$(BIN)/pytest -n 4 -m gpu
	$(BIN)/python -m bench.record

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[train,dev]"
	touch $@

clean:
	rm -rf $(VENV)
