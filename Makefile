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

bench: $(VENV)/.developed
	@$(BIN)/kvmtick bench
	@for name in report_ticks record_vms; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit; done

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"kvmtick needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@for tool in nasm gdb trace-cmd valgrind chromium chromedriver; do command -v $$tool >/dev/null || { \
		echo "installing $$tool, which some tests need"; \
		package=$$(echo $$tool | sed s/chromedriver/chromium-driver/); \
		{ apt-get update -qq && apt-get install --yes -qq --no-install-recommends $$package; } \
		>/dev/null 2>&1 || echo "$$tool could not be installed: those tests will be skipped"; }; done
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info src/kvmtick/cpu/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
