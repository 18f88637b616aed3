"""The rooms of the house: who may import whom, and who may read a clock of the host.

docs/architecture.md tells the same; its table is compared with `ROOMS`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "kvmtick"
ARCHITECTURE = ROOT / "docs" / "architecture.md"

ROOMS = (
    "abi",
    "host",
    "trace",
    "ticks",
    "timing",
    "report",
    "record",
    "irqchip",
    "guests",
    "cpu",
    "vcpu",
    "machine",
    "kvm",
    "conform",
    "bench",
    "cli",
)
"""From the bottom up: a room imports itself and rooms before it."""

ON_TOP = ("testing", "pytest_plugin", "__main__", "_pure")
"""Modules beside the rooms, for tests of guests and `python -m`; no room imports them."""

FACADE = "__init__"
"""`kvmtick` itself: what users import. It may import everything, a room only its version."""

CLOCK_MODULES = frozenset({"datetime", "time"})
CLOCK_READERS = {
    "timing": "the machine's clock in real time, the stopwatch, the kicker",
    "host": "deadlines of KVM_RUN",
    "record": "which of the kernel's records are complete, how long to record",
    "bench": "what it measures",
    "cli": "what people are shown",
    "kvm.kernel_run": "a guest's sleep on the real kernel",
    "kvm.kernel_trace": "which of the kernel's records are complete",
}
"""Rooms and modules that may read a clock of the host, and what for."""


def sources() -> list[Path]:
    """All modules of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`irqchip.i8254` for src/kvmtick/irqchip/i8254.py; a package goes by its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == FACADE else parts)


def room_of(module: str) -> str:
    """The room a module is in."""
    return module.partition(".")[0]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands; `from kvmtick import x` is `kvmtick.x`.

    Relative imports give a name that starts with a dot.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "kvmtick":
                yield from ((node.lineno, f"kvmtick.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def layering_faults(module: str, source: str) -> list[str]:
    """Imports of `module` that lead to a room above its own."""
    room = room_of(module)
    if room == FACADE or room in ON_TOP:
        return []
    allowed = ROOMS[: ROOMS.index(room) + 1]
    faults = []
    for line, name in imports(source):
        if name.startswith("."):
            faults.append(f"{module}:{line} imports relatively: {name}")
        if not name.startswith("kvmtick."):
            continue
        target = name.split(".")[1]
        if target not in allowed and name != "kvmtick.__version__":
            faults.append(f"{module}:{line} imports {name}; {room} may use {', '.join(allowed)}")
    return faults


def clock_faults(module: str, source: str) -> list[str]:
    """Clock imports of a module that may not have any."""
    if module in CLOCK_READERS or room_of(module) in CLOCK_READERS:
        return []
    return [
        f"{module}:{line} imports {name}: take the machine's clock"
        for line, name in imports(source)
        if name.partition(".")[0] in CLOCK_MODULES
    ]


def test_every_module_has_a_room() -> None:
    rooms = {room_of(module_name(path)) for path in sources()}
    assert rooms == {*ROOMS, *ON_TOP, FACADE}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_room_imports_only_rooms_below(path: Path) -> None:
    assert not layering_faults(module_name(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_only_some_may_read_a_host_clock(path: Path) -> None:
    assert not clock_faults(module_name(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", [name for name in CLOCK_READERS if "." in name])
def test_an_exception_is_still_needed(module: str) -> None:
    source = PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    assert any(name in CLOCK_MODULES for _, name in imports(source))


def test_architecture_names_the_same_rooms_in_the_same_order() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    section = text.partition("## The rooms")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` ", section, re.MULTILINE) == list(ROOMS)


# That these tests can fail.


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("irqchip.i8254", "from kvmtick.vcpu.vcpu import Vcpu"),
        ("irqchip.i8254", "import kvmtick.machine.board"),
        ("timing.clock", "def f():\n    from kvmtick.irqchip import i8254"),
        ("trace.events", "from kvmtick import guests"),
        ("cli.run", "from kvmtick.testing import GuestMachine"),
        ("kvm.model", "from kvmtick.cli import main"),
        ("vcpu.vcpu", "from ..machine import board"),
    ],
)
def test_an_import_from_above_is_found(module: str, source: str) -> None:
    assert len(layering_faults(module, source)) == 1


@pytest.mark.parametrize("source", ["import time", "from time import monotonic_ns"])
@pytest.mark.parametrize("module", ["irqchip.i8254", "vcpu.vcpu", "cpu.unicorn", "kvm.model"])
def test_a_host_clock_is_found(module: str, source: str) -> None:
    assert len(clock_faults(module, source)) == 1
