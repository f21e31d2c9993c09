PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-portable test-oldest lint docs bench gpu clean

demo: $(INSTALLED)
	$(BIN)/fastgate train --preset demo

# the tests of one file share what takes long to make: they run in one process, one after the other
PARALLEL := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(PARALLEL) -m "not slow"

# with the slow cases of what `make test` has one case of
test-all: $(INSTALLED)
	$(PARALLEL)

# what trains, once more as on another processor: sums are rounded in other places
test-portable: $(INSTALLED)
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 \
	  $(BIN)/pytest -m "not slow" tests/training tests/paper tests/reports tests/test_cli.py

# the oldest NVML bindings that pyproject.toml allows, beside the installed ones
test-oldest: $(INSTALLED)
	$(BIN)/pip install -q --target $(VENV)/oldest --upgrade --no-deps nvidia-ml-py==12.535.77
	PYTHONPATH=$(VENV)/oldest $(BIN)/pytest tests/energy

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages, into site/; strict: no broken link, no name that is not there
docs: $(INSTALLED)
	$(BIN)/pip install -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

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
