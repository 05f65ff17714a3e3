# Every target sets up what it needs: a virtual environment with the tested versions (constraints.txt).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: help demo test test-slow check format

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## ask the embedded model about the example pictures, then chat with it
	$(BIN)/llava demo

test: $(READY)  ## the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: $(READY)  ## the tests that take minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'slow and not gpu'

check: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## rewrite to the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
