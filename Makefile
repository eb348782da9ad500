# fedlearn: everything that a person types. `make demo` and `make test` install what they need into .venv first.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# One torch thread a process: identical bytes are promised for equal thread counts, and small models are faster so.
export OMP_NUM_THREADS := 1

.PHONY: help install demo test check bench chaos protos docs clean

help:
	@echo "make demo     a coordinator and four hospitals on this machine, about a minute"
	@echo "make test     lint, types and tests"
	@echo "make check    everything in 'test', and the slow tests"
	@echo "make bench    the link's speed beside stock Flower's"
	@echo "make chaos    random crashes: 1,000 schedules of the release path, then kill -9 in real federations"
	@echo "make protos   regenerate fedlearn/proto from protos/"
	@echo "make docs     regenerate the generated parts of docs/"
	@echo "make clean    remove what the others made"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group test
	@touch $@

demo: $(STAMP)
	$(BIN)/fedlearn demo

test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

bench: $(STAMP)
	$(BIN)/python -m benchmarks.link

chaos: $(STAMP)
	$(BIN)/python -m pytest -q -m slow tests/unit/release tests/property
	$(BIN)/python -m tests.chaos --runs 20

protos: $(STAMP)
	$(BIN)/python protos/generate.py

docs: $(STAMP)
	$(BIN)/python -m fedlearn.cli.reference

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis runs demo-run
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
