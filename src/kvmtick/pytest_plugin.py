"""The pytest plugin: the fixture `kvmtick_machine` and `--kvmtick-seed`.

A test calls the fixture like `kvmtick.testing.GuestMachine` and gets a machine that is closed at
its end. When the test fails, the report names the seed and the commands that repeat it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvmtick.testing import GuestMachine

__all__ = ["kvmtick_machine"]

_MACHINES = pytest.StashKey[list["GuestMachine"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kvmtick-seed N`."""
    parser.getgroup("kvmtick").addoption(
        "--kvmtick-seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the machines that do not set their own (0)",
    )


@pytest.fixture
def kvmtick_machine(request: pytest.FixtureRequest) -> Iterator[Callable[..., GuestMachine]]:
    """Makes machines: `machine = kvmtick_machine("tick-pic", ticks=100)`."""
    from kvmtick.testing import GuestMachine

    machines: list[GuestMachine] = []
    request.node.stash[_MACHINES] = machines

    def make(*args: Any, **keywords: Any) -> GuestMachine:
        keywords.setdefault("seed", request.config.getoption("--kvmtick-seed"))
        machine = GuestMachine(*args, **keywords)
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        machine.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell, under a failure, how to repeat it."""
    report = yield
    machines = item.stash.get(_MACHINES, [])
    if report.when == "call" and report.failed and machines:
        lines = []
        for machine in machines:
            test = f"pytest {shlex.quote(item.nodeid)} --kvmtick-seed={machine.seed}"
            lines += [f"seed: {machine.seed}", f"repeat: {test}", f"guest:  {machine.command()}"]
        report.sections.append(("kvmtick", "\n".join(lines)))
    return report
