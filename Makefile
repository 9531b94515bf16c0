# Two commands: `make demo` runs the main job, `make test` passes the tests. Both set up .venv once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)/onnxruntime-1.22

.PHONY: demo test lint format clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (some minutes the first time, then reused)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "uta-fx needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# where it has no wheel the tests that need it are skipped
$(OLDEST)/.ready: tests/onnxruntime_1.22.txt $(READY)
	$(BIN)/python -m venv --without-pip $(OLDEST)
	-$(BIN)/pip --python $(OLDEST)/bin/python install --quiet --no-deps --requirement $< && touch $@

demo: $(READY)  ## generate videos dense and sparse, side by side, into demo/
	$(BIN)/uta-fx generate --output demo

test: $(READY) $(OLDEST)/.ready  ## run the tests on all cores (no GPU needed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and what was generated
	rm -rf $(VENV) build dist demo *.egg-info
