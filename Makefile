# make run: set up .venv once, then boot the built-in guest and show the life of its ticks.
# make test: set up what the tests need, then lint, type-check and run them all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard src/kvmtick/cpu/shim/*)

.PHONY: run test bench lint clean

run: $(VENV)/.installed
	@$(BIN)/kvmtick run

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/first_light.py

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"kvmtick needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@command -v nasm >/dev/null || { echo "installing nasm, to compare the guests' bytes with their sources"; \
		{ apt-get update -qq && apt-get install --yes -qq nasm; } >/dev/null 2>&1 || \
		echo "nasm could not be installed: that comparison will be skipped"; }
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info src/kvmtick/cpu/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
