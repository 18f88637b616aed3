"""A conformance case: one statement about what KVM does, and the code that looks whether it does.

A case is a function of a `Bench` under `case`, in a module of `kvmtick.conform.cases`:

    @case("Mode 2 counts down and reloads: N - elapsed mod N (i8254 datasheet; pit_get_count).")
    def mode2_reloads(bench: Bench) -> None:
        ...
        equal(count, 1193, "count right after loading")

Its name is `MODULE.FUNCTION` with dashes, `pit.mode2-reloads`. `variants` makes one case of each
set of arguments. A body that returns has passed; it fails by `equal`, `check` or any other
exception, and is skipped by `Bench.needs` and the like, always with a reason.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmtick.conform.bench import Bench

__all__ = [
    "MODULES",
    "Case",
    "Failed",
    "Skipped",
    "all_cases",
    "case",
    "check",
    "equal",
    "variants",
]

MODULES = (
    "pit",
    "pic",
    "ioapic",
    "lapic",
    "timer",
    "line_status",
    "routing",
    "reinject",
    "nmi_watchdog",
    "irqfd",
    "events",
    "state",
)
"""Of `kvmtick.conform.cases`, in the order in which they are run."""

Body = Callable[..., None]


class Failed(Exception):
    """The back end did something else: what was looked at, what is right, what it gave."""

    def __init__(self, what: str, expected: object, got: object) -> None:
        self.what, self.expected, self.got = what, expected, got
        super().__init__(what, expected, got)

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, got {self.got}"


class Skipped(Exception):
    """This host cannot show it; the reason."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case: `right` is a sentence on what is right and why (datasheet, kernel function)."""

    name: str
    right: str
    body: Callable[["Bench"], None]


_REGISTERED: dict[str, list[Case]] = {}


def case(right: str) -> Callable[[Body], Body]:
    """Make a function of a `Bench` a case."""
    return variants(right, {"": ()})


def variants(right: str, each: Mapping[str, tuple[Any, ...]]) -> Callable[[Body], Body]:
    """Make a case for each of `each`: by a name in dashes, the arguments behind the bench.

    `right` may use {0}, {1}, ... for the arguments.
    """

    def register(body: Body) -> Body:
        module = body.__module__.rpartition(".")[2]
        base = f"{module}.{body.__name__}".replace("_", "-")
        for variant, arguments in each.items():
            name = f"{base}-{variant}" if variant else base
            made = Case(name, right.format(*arguments), _bound(body, arguments))
            _REGISTERED.setdefault(module, []).append(made)
        return body

    return register


def _bound(body: Body, arguments: tuple[Any, ...]) -> Callable[["Bench"], None]:
    return lambda bench: body(bench, *arguments)


def all_cases() -> Iterator[Case]:
    """Every case there is, module by module."""
    for module in MODULES:
        import_module(f"kvmtick.conform.cases.{module}")
        yield from _REGISTERED.get(module, ())


# What a body says.


def equal(got: object, expected: object, what: str) -> None:
    """`got` must be `expected`."""
    if got != expected:
        raise Failed(what, expected, got)


def check(holds: bool, what: str, expected: object, got: object) -> None:
    """Something must hold that is no equality; `expected` says it in words."""
    if not holds:
        raise Failed(what, expected, got)
