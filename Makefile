# Each target prepares .venv by itself: a bare clone needs nothing but python3 and make.
PYTHON ?= python3
CONSTRAINTS := constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test proofs test-all lint types format clean

# Slow proofs that CI runs besides make test: what found most comes first.
PROOFS := tests/zoo/test_against_timm.py tests/zoo/test_models.py tests/zoo/test_accelerate.py tests/zoo/test_exporters.py \
	tests/train/test_resume.py tests/train/test_faults.py tests/train/test_distributed.py tests/train/test_dense.py

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

proofs: $(VENV)/.dev
	$(BIN)/python -m pytest $(PROOFS) -m slow -n 2 --dist worksteal

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
