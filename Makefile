# Each target prepares .venv by itself: a bare clone needs nothing but python3 and make.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test test-all lint types format clean

$(VENV)/.demo: setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[demo,export,detection,dev]'
	touch $@

demo: $(VENV)/.demo
	rm -rf runs/first_run
	$(BIN)/vicinal train --config configs/first_run.yaml --output runs/first_run

test: $(VENV)/.dev
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist worksteal

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest tests -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/python -m mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache dist runs
