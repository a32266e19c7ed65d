# Each target prepares .venv by itself: a bare clone needs nothing but python3 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint format clean

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,export,detection,dev]'
	touch $@

demo: $(READY)
	rm -rf runs/first_run
	$(BIN)/vicinal train --config configs/first_run.yaml --output runs/first_run

test: $(READY)
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist worksteal

test-all: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build dist runs
