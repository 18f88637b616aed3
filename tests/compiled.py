"""What of the package under test is compiled, and whether that is what its sources say."""

import os
from pathlib import Path

import pytest

from kvmtick.host.probe import is_compiled

PACKAGE = Path(__file__).parents[1] / "src" / "kvmtick"
PATCHES = "patches what is compiled here; KVMTICK_PURE=1 runs it, and so does `make test`"
REMEDY = "build it: make, or python setup.py -q build_ext --inplace"


def stale(package: Path = PACKAGE, *, pure: bool = False) -> str | None:
    """One line when something compiled is older than its source, or None.

    `pure`: the modules that mypyc compiled are not imported, and only the shim counts.
    """
    for built in sorted(package.rglob("*.so")):
        module = built.with_name(built.name.partition(".")[0])
        if module.name == "_shim":
            sources = list(package.glob("cpu/shim/*.[ch]"))
        else:
            sources = [] if pure else [module.with_suffix(".py")]
        for source in sources:
            if not source.exists() or source.stat().st_mtime > built.stat().st_mtime:
                return f"{built.relative_to(package)} is older than {source.name}: {REMEDY}"
    return None


def refuse_stale(package: Path = PACKAGE) -> None:
    """Ends pytest with that line, before a test tells of code that is no more."""
    found = stale(package, pure=bool(os.environ.get("KVMTICK_PURE")))
    if found is not None:
        raise pytest.UsageError(found)


def modules() -> str:
    """Which way the tests run."""
    return "compiled by mypyc" if is_compiled() else "Python (pure)"


def skip_where_patching_fails() -> None:
    """For what changes a class, a module or what a chip refers to; the pure pass does it."""
    if is_compiled():
        pytest.skip(PATCHES)
