# make run: set up .venv once, then boot the built-in guest and show the life of its ticks.
# make test: set up what the tests need, then lint, type-check and run them all with the modules
# that mypyc compiled, and those of these modules once more as Python. make test-all: all both ways,
# and Linux in every set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := timing irqchip vcpu trace ticks cpu machine
SOURCES := $(wildcard src/kvmtick/cpu/shim/*) $(foreach room,$(ROOMS),$(wildcard src/kvmtick/$(room)/*.py))

# What tests the compiled modules themselves; the other tests see them from further away.
PURE_TESTS := $(addprefix tests/,timing irqchip vcpu trace ticks machine golden guests determinism kvm differential docs/test_json.py)

# A kernel to boot, a firmware to start, and what looks at our tables and archives.
TEST_PACKAGES := linux-image-cloud-amd64 seabios acpica-tools cpio

.PHONY: run test test-all bench lint clean

run: $(VENV)/.compiled
	@$(BIN)/kvmtick run

test: lint
	$(BIN)/python -m pytest
	@echo "uncompiled, left for make test-all: $(filter-out $(PURE_TESTS),$(patsubst %/,%,$(wildcard tests/*/)))"
	KVMTICK_PURE=1 $(BIN)/python -m pytest $(PURE_TESTS)

test-all: export KVMTICK_ALL_BOOTS = 1
test-all: lint
	$(BIN)/python -m pytest
	KVMTICK_PURE=1 $(BIN)/python -m pytest

lint: $(VENV)/.developed $(VENV)/.compiled
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.developed $(VENV)/.compiled
	@$(BIN)/kvmtick bench
	@for name in report_ticks record_vms; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit; done

$(VENV)/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"kvmtick needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools>=77' 'mypy>=2.1'
	@KVMTICK_PURE=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	@touch $@

# What was compiled before is kept in build, so that a change takes seconds.
$(VENV)/.compiled: $(VENV)/.installed $(SOURCES)
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	@$(BIN)/pip install --quiet --disable-pip-version-check 'kvmtick[dev]'
	@for tool in nasm gdb trace-cmd valgrind chromium chromedriver; do command -v $$tool >/dev/null || { \
		echo "installing $$tool, which some tests need"; \
		package=$$(echo $$tool | sed s/chromedriver/chromium-driver/); \
		{ apt-get update -qq && apt-get install --yes -qq --no-install-recommends $$package; } \
		>/dev/null 2>&1 || echo "$$tool could not be installed: those tests will be skipped"; }; done
	@if command -v apt-get >/dev/null && ! dpkg -s $(TEST_PACKAGES) >/dev/null 2>&1; then \
		echo "installing $(TEST_PACKAGES), which some tests need"; \
		{ apt-get update -qq && apt-get install --yes -qq --no-install-recommends $(TEST_PACKAGES); } \
		>/dev/null 2>&1 || echo "they could not be installed: those tests will be skipped"; fi
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info src/*.so src/kvmtick/*/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
