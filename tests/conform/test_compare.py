"""`conform.compare`: the built-in guests do the same on both, a fault in the model is found, and a
host that is late is neither.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count, cycle

import pytest

from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.conform import compare as module
from kvmtick.conform.compare import (
    ATTEMPTS,
    Difference,
    NoisyHostError,
    Side,
    Wanted,
    compare,
    differences,
    run_model,
)
from kvmtick.host.tracefs import open_tracefs
from kvmtick.irqchip.i8254 import Pit
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.timing.hrtimer import HrTimerRestart

LIMIT_S = 10.0


def wanted(name: str, ticks: int = 20, reinject: bool = True, **load: object) -> Wanted:
    """A built-in guest."""
    guest = guests.load(name, ticks=ticks, **load)  # type: ignore[arg-type]
    return Wanted(guest, reinject, limit_s=LIMIT_S)


def pit_of(vm: ModelVm) -> Pit:
    """The model's PIT."""
    pit = vm.machine.board.pit
    assert pit is not None
    return pit


# The live kernel, where there is one.


@pytest.fixture
def live() -> None:
    """Skip, saying why, where the kernel cannot be run or watched."""
    try:
        KernelVm().close()
        with open_tracefs() as tracefs:
            tracefs.instance().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm and a tracefs it may write to: {error}")


def compared(what: Wanted) -> module.Comparison:
    """`compare`; skips, saying why, on a host that is never on time."""
    try:
        return compare(what)
    except NoisyHostError as error:
        pytest.skip(str(error))


GUESTS = {
    "tick-pic": wanted("tick-pic"),
    "tick-if0": wanted("tick-if0", 40, param_ms=10),
    "tick-if0, reinject off": wanted("tick-if0", 40, reinject=False, param_ms=10),
    "tick-mask": wanted("tick-mask", 40, param_ms=10),
    "tick-mask, reinject off": wanted("tick-mask", 40, reinject=False, param_ms=10),
    "tick-oneshot": wanted("tick-oneshot"),
    "tick-ioapic": wanted("tick-ioapic"),
    "tick-msi": wanted("tick-msi"),
    "tick-lapic": wanted("tick-lapic"),
    "tick-lapic, one-shot": wanted("tick-lapic", timer="oneshot"),
    "tick-lapic, TSC deadline": wanted("tick-lapic", timer="tsc-deadline"),
    "tick-x2apic": wanted("tick-x2apic"),
    "nmi-watchdog": wanted("nmi-watchdog"),
    "nmi-watchdog, nobody acknowledges": wanted("nmi-watchdog", reinject=False, ack=False),
    "ipi-tick": wanted("ipi-tick"),
    "tick-long": wanted("tick-long"),
}


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("what", GUESTS.values(), ids=GUESTS)
def test_the_model_and_the_kernel_do_the_same(what: Wanted) -> None:
    result = compared(what)
    assert result.equal, result.differences
    assert result.model.events > 20
    assert result.kernel.events > 20


def period_off_by_one(vm: ModelVm) -> None:
    """The PIT's timer is 1 ns too slow."""
    pit = pit_of(vm)
    timer_fn = pit.timer.callback

    def slow() -> HrTimerRestart:
        pit.period_ns = 999_849
        return timer_fn()

    pit.timer.callback = slow


def level_left_high(vm: ModelVm) -> None:
    """The worker raises the line only."""
    pit = pit_of(vm)

    def work() -> None:
        vm.machine.board.routing.set_irq(pit.irq_source_id, 0, 1)

    pit.work.callback = work


def wrong_source(vm: ModelVm) -> None:
    """The PIT drives the line as user space does."""
    pit_of(vm).irq_source_id = 0


def impatient(vm: ModelVm) -> None:
    """The worker does not wait for the acknowledgement."""
    pit = pit_of(vm)
    do_work = pit.work.callback

    def work() -> None:
        pit.irq_ack = True
        do_work()

    pit.work.callback = work


def repeated(vm: ModelVm) -> None:
    """The guest's tenth tick is not counted: it takes one more."""
    pit = pit_of(vm)
    do_work = pit.work.callback
    calls = count(1)

    def work() -> None:
        if next(calls) == 10:
            at = guests.PARAMETERS.counter
            counted = int.from_bytes(vm.read_memory(at, 4), "little")
            vm.write_memory(at, (counted - 1).to_bytes(4, "little"))
        do_work()

    pit.work.callback = work


FAULTS: dict[str, tuple[str, int, Callable[[ModelVm], None], str]] = {
    "period": ("tick-pic", 20, period_off_by_one, "hrtimer"),
    "line": ("tick-pic", 20, level_left_high, "gsi"),
    "source": ("tick-ioapic", 20, wrong_source, "gsi"),
    "ack": ("tick-if0", 40, impatient, "worker"),
    "repeat": ("tick-pic", 60, repeated, "counts"),
}


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_into_the_model_is_found(fault: str) -> None:
    name, ticks, plant, line = FAULTS[fault]
    param_ms = 10 if name == "tick-if0" else None
    what = replace(wanted(name, ticks, param_ms=param_ms), plant=plant)
    # The guest may wait for ever; what has no end is nobody's difference.
    result = compared(replace(what, for_ns=60_000_000))
    assert not result.equal
    assert line in {each.line for each in result.differences}


@pytest.mark.usefixtures("live")
def test_a_guest_that_kvm_cannot_run_is_told() -> None:
    what = wanted("exceptions")
    with KernelVm(ram_bytes=what.guest.needs.ram_bytes) as vm:
        vm.prepare(what.guest.needs)
        vm.load(what.guest)
        if vm.run(limit_s=LIMIT_S).exit.reason != "guest-error":
            pytest.skip("KVM runs all of it here")
    with pytest.raises(HostError, match="KVM cannot run exceptions here: vCPU 0"):
        compare(what)


# How a difference is judged, with a kernel that is the model.


@pytest.fixture(scope="module")
def model() -> Side:
    """tick-pic on the model."""
    return run_model(wanted("tick-pic"))


def changed(side: Side, line: str, *steps: str) -> Side:
    """The same with other steps on a line."""
    return replace(side, lines={**side.lines, line: steps})


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what the kernel's runs give, one after the other, over and over, and which are late."""

    def give(*sides: Side, late: tuple[int, ...] = (), lost: int = 0) -> None:
        runs = cycle(enumerate(sides))
        now = {"late": False}

        def run_kernel(_: Wanted) -> tuple[Side, int]:
            index, side = next(runs)
            now["late"] = index in late
            return side, lost

        monkeypatch.setattr(module, "run_kernel", run_kernel)
        monkeypatch.setattr(module, "_was_late", lambda *_: now["late"])

    return give


def test_a_difference_counts_when_two_runs_on_time_show_it(
    model: Side, kernel: Callable[..., None]
) -> None:
    other, another = changed(model, "pic", "a"), changed(model, "pic", "b")
    kernel(other, another, other)
    result = compare(wanted("tick-pic"))
    assert result.runs == 3
    assert result.differences == [Difference("pic", 0, model.lines["pic"], ("a",))]


def test_a_late_run_is_made_again(model: Side, kernel: Callable[..., None]) -> None:
    kernel(changed(model, "pic", "a"), changed(model, "pic", "a"), model, late=(0, 1))
    result = compare(wanted("tick-pic"))
    assert result.equal
    assert result.runs == 3


def test_a_host_that_is_always_late_is_noisy(model: Side, kernel: Callable[..., None]) -> None:
    kernel(changed(model, "pic", *model.lines["pic"], "a"), late=(0,))
    with pytest.raises(NoisyHostError, match=f"of {ATTEMPTS} runs of the kernel {ATTEMPTS} were"):
        compare(wanted("tick-pic"))


def test_a_step_that_the_kernel_never_takes_counts_on_a_late_host_too(
    model: Side, kernel: Callable[..., None]
) -> None:
    gone = changed(model, "pic", *model.lines["pic"][1:])
    kernel(changed(gone, "gsi", "a"), gone, gone, late=(0, 1, 2))
    result = compare(wanted("tick-pic"))
    assert result.runs == module.NEVER
    assert result.differences == [Difference("pic", 0, model.lines["pic"][:1], ())]


def test_a_run_with_lost_events_does_not_count(model: Side, kernel: Callable[..., None]) -> None:
    kernel(model, lost=3)
    with pytest.raises(NoisyHostError):
        compare(wanted("tick-pic"))


def test_where_steps_are_missing_changed_or_more(model: Side) -> None:
    first, *rest = model.lines["vcpu"]
    last = rest[-1]
    theirs = changed(model, "vcpu", *rest[:-1], "x", last)
    assert differences(model, theirs) == [
        Difference("vcpu", 0, (first,), ()),
        Difference("vcpu", len(rest), (), ("x",)),
    ]


def expired(model: Side, number: int) -> Side:
    """The same with so many expiries."""
    assert "expire 20" in model.lines["counts"]
    counts = (each.replace("expire 20", f"expire {number}") for each in model.lines["counts"])
    return changed(model, "counts", *counts)


@pytest.mark.parametrize(("number", "close"), [(20, True), (23, True), (17, True), (24, False)])
def test_counts_may_be_close(model: Side, number: int, close: bool) -> None:
    theirs = expired(model, number)
    found = [Difference("counts", 1, ("expire 20",), (f"expire {number}",))]
    assert differences(model, theirs) == ([] if number == 20 else found)
    assert differences(model, theirs, close=True) == ([] if close else found)


def test_close_counts_differ_when_more_runs_on_time_say_so(
    model: Side, kernel: Callable[..., None]
) -> None:
    kernel(expired(model, 21))
    result = compare(wanted("tick-pic"))
    assert result.runs == module.SAME_CLOSE
    assert result.differences == [Difference("counts", 1, ("expire 20",), ("expire 21",))]


def test_one_run_with_the_same_counts_is_enough(model: Side, kernel: Callable[..., None]) -> None:
    kernel(expired(model, 21), expired(model, 21), model)
    assert compare(wanted("tick-pic")).equal


def test_close_counts_are_equal_on_a_host_that_is_always_late(
    model: Side, kernel: Callable[..., None]
) -> None:
    kernel(expired(model, 21), late=(0,))
    result = compare(wanted("tick-pic"))
    assert result.equal
    assert result.runs == module.NEVER


def test_where_time_ends_a_run_its_end_is_not_compared() -> None:
    what = replace(wanted("tick-pic"), for_ns=5_000_000)
    short, long = run_model(what), run_model(replace(what, for_ns=5_500_000))
    assert short.run.exit.reason == "time"
    vcpu = short.lines["vcpu"]
    assert not differences(short, changed(long, "vcpu", *vcpu[:-1]))
    assert differences(short, changed(long, "vcpu", "x", *vcpu[1:]))
