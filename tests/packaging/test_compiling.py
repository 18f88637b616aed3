"""What the build compiles, what it says when it cannot, and that nothing old is tested."""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import compiled
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """setup.py's names; nothing is built."""
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    names = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    monkeypatch.delenv("KVMTICK_PURE", raising=False)
    return SimpleNamespace(**names)


def test_kvmtick_pure_leaves_the_modules_as_python(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMTICK_PURE", "1")
    assert setup_py.compiled_modules() == []


def test_nothing_is_translated_for_a_command_that_does_not_build(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    assert setup_py.compiled_modules() == []


def test_without_mypyc_one_line_says_what_to_do(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mypyc.build", None)
    with pytest.raises(SystemExit) as raised:
        setup_py.compiled_modules()
    message = str(raised.value)
    assert "\n" not in message
    assert "mypyc, which cannot be imported" in message
    assert "pip install 'mypy>=2.1'" in message
    assert "KVMTICK_PURE=1" in message


def test_without_a_compiler_it_is_named(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    missing = setup_py.missing_tool()
    message = setup_py.NEEDS.format(missing=missing)
    assert "the C compiler `no-such-compiler` was not found" in message
    assert "apt-get install gcc python3-dev" in message
    assert "\n" not in message


def test_make_builds_anew_when_any_compiled_module_changed(setup_py: SimpleNamespace) -> None:
    rooms = next(
        line.split()[2:]
        for line in (ROOT / "Makefile").read_text().splitlines()
        if line.startswith("ROOMS := ")
    )
    assert {pattern.partition("/")[0] for pattern in setup_py.COMPILED} <= set(rooms)


def build(package: Path, source: str, built: str, age_s: int) -> None:
    """A source, and what was built from it `age_s` before the source changed."""
    for name, at in ((source, 1_000_000), (built, 1_000_000 - age_s)):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (at, at))


@pytest.mark.parametrize("pure", [False, True])
def test_a_build_that_is_newer_is_tested(tmp_path: Path, pure: bool) -> None:
    build(tmp_path, "irqchip/pit.py", "irqchip/pit.cpython-311.so", 0)
    build(tmp_path, "cpu/shim/shim.c", "cpu/_shim.cpython-311.so", -1)
    assert compiled.stale(tmp_path, pure=pure) is None


def test_a_module_that_changed_since_is_named(tmp_path: Path) -> None:
    build(tmp_path, "irqchip/pit.py", "irqchip/pit.cpython-311.so", 1)
    found = compiled.stale(tmp_path)
    assert found is not None
    assert found.startswith("irqchip/pit.cpython-311.so is older than pit.py: build it: make")
    assert "\n" not in found
    assert compiled.stale(tmp_path, pure=True) is None, "it is not imported"


@pytest.mark.parametrize("pure", [False, True])
def test_a_shim_that_changed_since_is_named(tmp_path: Path, pure: bool) -> None:
    build(tmp_path, "cpu/shim/shim.c", "cpu/_shim.cpython-311.so", 1)
    assert "older than shim.c" in (compiled.stale(tmp_path, pure=pure) or "")


def test_no_test_runs_on_an_old_build(tmp_path: Path) -> None:
    build(tmp_path, "cpu/shim/shim.c", "cpu/_shim.cpython-311.so", 1)
    with pytest.raises(pytest.UsageError, match=r"older than shim\.c: build it"):
        compiled.refuse_stale(tmp_path)
