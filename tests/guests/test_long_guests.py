"""The guests in 64-bit mode, on model and real kernel: what they checked of the CPU was right, and
they notice what is not.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from kvmtick import guests
from kvmtick.abi import HostError
from kvmtick.abi.structs import kvm_cpuid_entry2
from kvmtick.guests import Guest, Parameters
from kvmtick.host.kvmdev import open_kvm
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.run import Run

Vm = ModelVm | KernelVm
MakeVm = Callable[[], Vm]

TICKS = 300
LIMIT_S = 20.0
TIMER_PERIOD_NS = 700_000
ERROR_NO_MODE, ERROR_NO_LONG_MODE, ERROR_CHECK = 4, 5, 6

IST1_STACK, IST2_STACK, RSP0_STACK = 0x12000, 0x13000, 0x15000
CPUID_NX, CPUID_LONG_MODE = 1 << 20, 1 << 29

EXCEPTIONS = (
    "DE",
    "DB",
    "BP",
    "OF",
    "BR",
    "UD",
    "NM",
    "DF",
    "TS",
    "NP",
    "SS",
    "GP",
    "PF",
    "MF",
    "XM",
)
RINGS = {name: {"0", "3"} for name in EXCEPTIONS} | {"AC": {"3"}}
"""Alignment is checked in ring 3 only."""
NOT_RAISED = {
    ("SS", "0", "a stack address that is not canonical"),
    ("SS", "3", "a stack address that is not canonical"),
    ("AC", "3", "an unaligned address"),
    ("XM", "0", "SSE division by 0"),
    ("XM", "3", "SSE division by 0"),
}
"""By the unicorn engine."""

WRONG = "is [0-9a-f]{16}, not [0-9a-f]{16}"
LINE = re.compile(
    r"#(?P<name>[A-Z]{2})  ring (?P<ring>[03])"
    r"  (?:error (?P<error>[0-9a-f]{4}|none)  rip ok|not raised        )"
    r"  ticks (?P<ticks>\d+)  (?P<text>.+)"
)
SUM = re.compile(
    r"(\d+) cases, (\d+) not raised; (\d+) rounds, (\d+) exceptions; (\d+) ticks, (\d+) in handlers"
)


@pytest.fixture(params=["model", "model, fast", "kernel"])
def make_vm(request: pytest.FixtureRequest) -> MakeVm:
    """VMs of one back end; skips, saying why, where /dev/kvm cannot be used."""
    if request.param == "model":
        return ModelVm
    if request.param == "model, fast":
        return partial(ModelVm, fast=True)
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    return KernelVm


def play(vm: Vm, guest: Guest) -> tuple[Run, Parameters]:
    """Run a guest on a VM set up as it needs; skips where KVM itself cannot go on."""
    vcpu = vm.prepare(guest.needs)[0]
    vm.load(guest)
    run = vm.run(limit_s=LIMIT_S)
    if isinstance(vm, KernelVm) and (run.exit.reason, run.exit.code) == ("guest-error", 0):
        at = vcpu.get_regs().rip
        code = vm.read_memory(at, 8).hex(" ")
        pytest.skip(f"this host's KVM gave up {guest.name} at {at:#x}: {code}")
    return run, Parameters.read(vm.read_memory(0, 0x10000))


def load(vm: Vm, name: str, *, ticks: int = TICKS, hz: float | None = None) -> Guest:
    return guests.load(name, ticks=ticks, hz=hz, tsc_khz=vm.get_tsc_khz())


def patched(guest: Guest, old: bytes, new: bytes) -> Guest:
    """The guest with some bytes changed, which it has exactly once."""
    assert guest.image.count(old) == 1
    return replace(guest, image=guest.image.replace(old, new))


def ended(run: Run) -> tuple[str, int]:
    return run.exit.reason, run.exit.code


# --- tick-long ------------------------------------------------------------------------------------


def test_ticks_of_two_sources_in_64_bit_mode(make_vm: MakeVm) -> None:
    with make_vm() as vm:
        run, block = play(vm, load(vm, "tick-long"))
        assert (*ended(run), run.console) == ("done", 0, "")
        assert run.guest_ticks == block.counter == TICKS
        assert block.snapshot[0] > 0
        assert block.snapshot[1:] == (0,) * 7


@pytest.mark.parametrize("hz", [100, 1000, 2000])
def test_the_model_delivers_every_tick_of_both_sources(hz: float) -> None:
    with ModelVm() as vm:
        run, block = play(vm, load(vm, "tick-long", hz=hz))
        pit, timer = sorted(run.sources, key=lambda report: report.source, reverse=True)
        assert (pit.source, timer.source) == ("pit", "lapic")
        assert pit.count("delivered") == block.counter == TICKS
        assert timer.count("delivered") == block.snapshot[0]
        assert abs(block.snapshot[0] - run.elapsed_ns // TIMER_PERIOD_NS) <= 1


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        # The TSS has an interrupt stack elsewhere than the handler expects it.
        (word(IST1_STACK), word(IST1_STACK - 16), "RSP in the PIT's handler"),
        (word(IST2_STACK), word(IST2_STACK - 16), "RSP in the timer's handler"),
        # mov esp, MAIN_STACK
        (b"\xbc\x00\x60\x01\x00", b"\xbc\xf0\x5f\x01\x00", "the saved RSP"),
    ],
)
def test_tick_long_notices_what_is_wrong(old: bytes, new: bytes, text: str) -> None:
    with ModelVm() as vm:
        run, _ = play(vm, patched(load(vm, "tick-long"), old, new))
        assert ended(run) == ("guest-error", ERROR_CHECK)
        assert re.fullmatch(
            rf"tick-long: {text} is [0-9a-f]{{16}}, not [0-9a-f]{{16}}\n", run.console
        )


# --- what CPUID lacks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edx", [None, 0, CPUID_LONG_MODE, CPUID_NX], ids=["no leaf", "nothing", "no NX", "no long mode"]
)
@pytest.mark.parametrize("name", ["tick-long", "exceptions"])
def test_a_guest_says_what_cpuid_lacks(name: str, edx: int | None) -> None:
    with ModelVm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        highest = kvm_cpuid_entry2(function=0x8000_0000, eax=0x8000_0001)
        leaves = [highest, kvm_cpuid_entry2(function=0x8000_0001, edx=edx or 0)]
        vm.create_vcpu().set_cpuid2(leaves if edx is not None else [])
        vm.load(load(vm, name))
        run = vm.run(limit_s=LIMIT_S)
        assert ended(run) == ("guest-error", ERROR_NO_LONG_MODE)
        assert run.console == f"{name}: CPUID has no long mode\n"


def test_tick_long_says_that_the_timer_has_no_mode() -> None:
    with ModelVm() as vm:
        # cmp eax, LVT_PERIODIC | VECTOR_TIMER: one bit more
        guest = patched(load(vm, "tick-long"), b"\x3d\x50\x00\x02\x00", b"\x3d\x50\x00\x06\x00")
        run, block = play(vm, guest)
        assert ended(run) == ("guest-error", ERROR_NO_MODE)
        assert run.console.startswith("tick-long: LVTT does not keep its timer mode;")
        assert block.counter == 0


# --- exceptions -----------------------------------------------------------------------------------


def lines_of(run: Run) -> list[dict[str, str | None]]:
    """The cases' lines, and nothing else but the sum."""
    *lines, last = run.console.splitlines()
    assert SUM.fullmatch(last)
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), run.console
    return [match.groupdict() for match in found if match]


def test_every_exception_from_both_rings(make_vm: MakeVm) -> None:
    with make_vm() as vm:
        run, block = play(vm, load(vm, "exceptions"))
        assert ended(run) == ("done", 0), run.console
        assert run.drift_ppm is None
        lines = lines_of(run)
        raised: dict[str, set[str]] = {}
        for line in lines:
            raised.setdefault(str(line["name"]), set()).add(str(line["ring"]))
        assert raised == RINGS
        cases, rounds, in_handlers, exceptions, not_raised = block.snapshot[:5]
        told = [int(number) for number in SUM.findall(run.console)[0]]
        assert told == [cases, not_raised, rounds, exceptions, block.counter, in_handlers]
        assert cases == len(lines)
        assert block.counter >= TICKS
        assert block.counter // 4 < in_handlers < block.counter
        if isinstance(vm, KernelVm):
            assert not_raised == 0
        # #GP comes in place of #SS; two cases are in the first round only
        nothing_came = sum(line["error"] is None and line["name"] != "SS" for line in lines)
        assert exceptions == rounds * (cases - 2 - nothing_came) + 2


def test_what_the_unicorn_engine_does_not_raise() -> None:
    with ModelVm() as vm:
        run, _ = play(vm, load(vm, "exceptions", ticks=1))
        silent = {
            (line["name"], line["ring"], line["text"])
            for line in lines_of(run)
            if line["error"] is None
        }
        assert silent == NOT_RAISED


def test_exceptions_runs_alike_each_time() -> None:
    consoles = set()
    for _ in range(2):
        with ModelVm() as vm:
            consoles.add(play(vm, load(vm, "exceptions"))[0].console)
    assert len(consoles) == 1


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        # mov eax, NO_SELECTOR: another one beyond the table
        (b"\xb8\x78\0\0\0", b"\xb8\x70\0\0\0", "a selector beyond the GDT: the error code"),
        # mov eax, USER_ABSENT; mov ds, eax: the TSS's upper half, #GP
        (b"\xb8\x53\0\0\0\x8e\xd8", b"\xb8\x23\0\0\0\x8e\xd8", "that is not present: the vector"),
        # xor ecx, ecx; div ecx: a byte later
        (b"\x31\xc9\xf7\xf1\xcd\x30\x90", b"\x31\xc9\x90\xf7\xf1", "division by 0: the saved RIP"),
        (word(RSP0_STACK), word(RSP0_STACK - 16), "division by 0: where the frame is"),
        (word(IST2_STACK), word(IST2_STACK - 16), "RSP in the tick's handler"),
    ],
)
def test_exceptions_notices_what_is_wrong(old: bytes, new: bytes, text: str) -> None:
    with ModelVm() as vm:
        run, _ = play(vm, patched(load(vm, "exceptions"), old, new))
        assert ended(run) == ("guest-error", ERROR_CHECK)
        last = run.console.splitlines()[-1]
        assert re.fullmatch(rf"exceptions: #[A-Z]{{2}}  ring [03]  .*{text}.* {WRONG}", last)
