"""The run loop: how a run ends, to the nanosecond; going on; the guest's ports; real code."""

from dataclasses import replace
from itertools import pairwise

import pytest
from images import (
    CLI_HLT,
    COUNTER,
    LOAD_AT,
    SPIN,
    STI_HLT,
    TRIPLE_FAULT,
    leave,
    out,
    out32,
    read_and_print,
    ticker,
)

from kvmtick import guests
from kvmtick.abi import KvmError
from kvmtick.cpu.unicorn import UnicornEngine
from kvmtick.guests import Guest
from kvmtick.kvm.model import ModelVm
from kvmtick.ticks.verdict import Verdict

PERIOD_NS = 999_848
MS = 1_000_000


def boot(
    guest: Guest | bytes | str, *, seed: int = 0, reinject: bool = True, **more: int
) -> ModelVm:
    """A VM with everything, and a guest in it."""
    vm = ModelVm(seed=seed)
    vm.create_irqchip()
    vm.create_pit2(1)
    vm.reinject_control(reinject)
    vm.create_vcpu(0)
    if isinstance(guest, str):
        guest = guests.load(guest, **more)
    elif isinstance(guest, bytes):
        guest = Guest("test", guest, LOAD_AT, (0, LOAD_AT), None)
    vm.load(guest)
    return vm


# --- how a run ends -----------------------------------------------------------------------------


def test_cli_hlt_is_a_deadlock_at_once_even_with_a_timer_and_an_end() -> None:
    for image in (CLI_HLT, ticker()[:-2] + CLI_HLT):
        with boot(image) as vm:
            run = vm.run(for_ns=10_000 * MS, limit_s=5)
            assert run.exit.reason == "deadlock"
            assert run.exit.is_failure
            assert "cli; hlt" in run.exit.detail
            assert run.elapsed_ns < MS
            assert "eip 0000" in vm.machine.crash_report()


def test_hlt_without_any_timer_is_a_deadlock_unless_an_end_was_given() -> None:
    with boot(STI_HLT) as vm:
        run = vm.run(limit_s=5)
        assert (run.exit.reason, run.elapsed_ns) == ("deadlock", 2)
        assert "no timer" in run.exit.detail
    with boot(STI_HLT) as vm:
        run = vm.run(for_ns=7 * MS, limit_s=5)
        assert (run.exit.reason, run.elapsed_ns) == ("time", 7 * MS)
        assert not run.exit.is_failure


def test_a_triple_fault_is_told_with_registers_and_last_events() -> None:
    with boot(out(0x80, 1) + TRIPLE_FAULT) as vm:
        # lidt's operand lies behind the code that is now 6 bytes further on
        vm.write_memory(LOAD_AT + 6 + 3, (LOAD_AT + 6 + 8).to_bytes(2, "little"))
        run = vm.run(limit_s=5)
        assert run.exit.reason == "triple-fault"
        assert run.exit.is_failure
        report = vm.machine.crash_report()
        assert report.startswith("vCPU 0, runnable, real mode:\n")
        assert "last events:\n" in report
        assert "pio_write at 0x80" in report


def test_a_guest_that_spins_ends_with_the_wall_time_limit() -> None:
    with boot(SPIN) as vm:
        run = vm.run(limit_s=0.01)
        assert run.exit.reason == "limit"
        assert run.exit.is_failure
        assert "0.01 s" in run.exit.detail


@pytest.mark.parametrize("code", [1, 0x5A, 0xFF])
def test_a_guest_that_writes_an_error_to_the_exit_port_failed(code: int) -> None:
    with boot(leave(code)) as vm:
        run = vm.run(limit_s=5)
        assert (run.exit.reason, run.exit.code, run.exit.is_failure) == ("guest-error", code, True)
        assert f"{code:#x}" in run.exit.detail


def test_a_guest_that_writes_nought_is_done_and_executes_nothing_more() -> None:
    with boot(leave(0) + out(0xE9, ord("!"))) as vm:
        run = vm.run(limit_s=5)
        assert (run.exit.reason, run.exit.code, run.exit.is_failure) == ("done", 0, False)
        assert run.console == ""
        again = vm.run(limit_s=5)
        assert (again.exit.reason, again.elapsed_ns) == ("done", run.elapsed_ns)


# --- the end in time ----------------------------------------------------------------------------


@pytest.mark.parametrize("for_ns", [1, 999_847, 999_848, 5 * MS + 1, 20 * MS])
@pytest.mark.parametrize("image", [SPIN, ticker()], ids=["spinning", "halting"])
def test_an_end_is_met_to_the_nanosecond(image: bytes, for_ns: int) -> None:
    with boot(image) as vm:
        run = vm.run(for_ns=for_ns, limit_s=20)
        assert (run.exit.reason, run.elapsed_ns) == ("time", for_ns)


def test_running_on_is_the_same_as_running_through() -> None:
    whole = boot(ticker())
    parts = boot(ticker())
    with whole, parts:
        through = whole.run(for_ns=30 * MS + 12345).as_dict()
        for step_ns in (1, 999_999, 9 * MS, 500, 20 * MS + 11845):
            last = parts.run(for_ns=step_ns)
        pieces = last.as_dict()
        for told in (through, pieces):
            told.pop("wall_s")
        assert pieces == through
        assert whole.read_memory(0, 0x10000) == parts.read_memory(0, 0x10000)


def test_ten_times_the_nominal_time_is_the_end_of_a_guest_that_gets_no_ticks() -> None:
    with boot("tick-noeoi", ticks=20) as vm:
        run = vm.run()
        assert (run.exit.reason, run.exit.is_failure) == ("time", False)
        assert run.elapsed_ns == 10 * 20 * PERIOD_NS
        assert run.guest_ticks == 1


def test_a_foreign_guest_ends_when_its_ticks_reached_it_or_after_ten_times_their_time() -> None:
    with boot(ticker()) as vm:
        run = vm.run(ticks=5, counter=COUNTER, limit_s=10)
        assert (run.exit.reason, run.guest_ticks) == ("done", 5)
        assert run.ticks is not None
        assert run.ticks.count("delivered") == 5
    noeoi = ticker().replace(bytes.fromhex("b020e620"), bytes.fromhex("90909090"))
    with boot(noeoi) as vm:
        run = vm.run(ticks=5, counter=COUNTER, limit_s=10)
        assert (run.exit.reason, run.guest_ticks) == ("time", 1)
        assert 50 * PERIOD_NS <= run.elapsed_ns < 70 * PERIOD_NS, "it is looked at now and then"


def test_until_ends_between_two_guest_entries_and_the_run_goes_on() -> None:
    with boot("tick-pic", ticks=50) as vm:
        for wanted in (3, 7, 20):
            run = vm.run(until=lambda: vm.ticks().expired >= wanted)  # noqa: B023
            assert run.exit.reason == "until"
            assert vm.ticks().expired == wanted
        assert vm.run().exit.reason == "done"
        assert vm.ticks().expired == 50


# --- a late host --------------------------------------------------------------------------------


@pytest.mark.parametrize("reinject", [True, False])
def test_a_vcpu_off_for_50_ms_gets_its_ticks_later_or_once(reinject: bool) -> None:
    """kernel-contract section 6: all replayed with reinject on; 1 with it off."""
    with boot("tick-pic", ticks=100, reinject=reinject) as vm:
        vm.run(for_ns=int(10.5 * PERIOD_NS))
        assert vm.ticks().count("delivered") == 10
        vm.machine.take_vcpu_off(50 * PERIOD_NS)
        vm.run(for_ns=50 * PERIOD_NS + 200_000)
        block = vm.parameters()
        assert block is not None
        assert block.counter == (60 if reinject else 11)
        report = vm.ticks()
        if reinject:
            assert report.count("reinjected") == 49
        else:
            assert report.count("coalesced") == 49
        assert report.count("late") == 1


def test_faults_show_in_the_hop_they_belong_to() -> None:
    for name, hop in (
        ("worker_delay", "expiry_to_work"),
        ("late_expiry", "expiry_to_work"),
        ("vcpu_off", "accept_to_inject"),
    ):
        with boot("tick-pic", ticks=20) as vm:
            vm.machine.host.set_fault(name, "200us")
            run = vm.run()
            assert run.exit.reason == "done"
            assert run.ticks is not None
            assert run.guest_ticks == 20
            late = {key for key, values in run.ticks.latency_ns.items() if values["max"] >= 200_000}
            assert late == {hop, "expiry_to_eoi"}
            assert run.ticks.latency_ns[hop]["p50"] == pytest.approx(200_000, rel=1 / 64)


def test_a_late_expiry_does_not_shift_the_next_one() -> None:
    with boot("tick-pic", ticks=10) as vm:
        vm.machine.host.set_fault("late_expiry", "300us")
        vm.run()
        ticks = list(vm.ticks())
        assert {b.expiry_ns - a.expiry_ns for a, b in pairwise(ticks)} == {PERIOD_NS}
        assert {tick.fired_ns - tick.expiry_ns for tick in ticks} == {300_000}


# --- the same run again -------------------------------------------------------------------------


FAULTS = (
    ("worker_delay", "exp:400us"),
    ("vcpu_off", "10%:3ms"),
    ("late_expiry", "uniform:0us..1ms"),
)


def stormy(seed: int) -> dict[str, object]:
    with boot("tick-pic", ticks=200, seed=seed) as vm:
        for name, delay in FAULTS:
            vm.machine.host.set_fault(name, delay)
        told = vm.run().as_dict()
        told["lives"] = [(t.verdict, t.work_ns, t.inject_ns, t.eoi_ns) for t in vm.ticks()]
        del told["wall_s"]
        return told


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    first = stormy(7)
    assert stormy(7) == first
    assert stormy(8) != first
    verdicts = first["ticks"]
    assert isinstance(verdicts, dict)
    assert verdicts["late"] or verdicts["reinjected"], "the storm was one"


def test_two_machines_in_one_process_do_not_disturb_each_other() -> None:
    with boot("tick-pic", ticks=30) as alone:
        wanted = alone.run().as_dict()
    one, two = boot("tick-pic", ticks=30), boot("tick-if0", ticks=40, param_ms=5)
    with one, two:
        while one.run(for_ns=3 * MS).exit.reason == "time":
            two.run(for_ns=2 * MS)
        told = one.run().as_dict()
        for result in (wanted, told):
            result.pop("wall_s")
        assert told == wanted


# --- ports --------------------------------------------------------------------------------------


def test_the_debug_console_and_the_serial_line_are_read_back_as_text() -> None:
    image = b"".join(out(0xE9, c) for c in b"hello\n") + b"".join(out(0x3F8, c) for c in b"ttyS0")
    with boot(image + read_and_print(0xE9) + leave(0)) as vm:
        run = vm.run(limit_s=5)
        assert (run.console, run.serial) == ("hello\n�", "ttyS0")


def test_the_serial_line_is_always_ready_and_keeps_its_divisor_from_the_text() -> None:
    image = out(0x3FB, 0x80) + out(0x3F8, 1) + out(0x3F9, 0) + out(0x3FB, 3) + out(0x3F8, ord("x"))
    with boot(image + read_and_print(0x3FD) + read_and_print(0x3FA) + leave(0)) as vm:
        run = vm.run(limit_s=5)
        assert run.serial == "x"
        assert vm.machine.ports.console == bytes((0x60, 0x01))


def test_a_port_nobody_answers_reads_ones() -> None:
    with boot(read_and_print(0x1234) + leave(0)) as vm:
        vm.run(limit_s=5)
        assert vm.machine.ports.console == b"\xff"


def test_the_host_sleep_port_keeps_the_vcpu_out_for_that_long() -> None:
    with boot(out32(0xD8, 1500) + leave(0)) as vm:
        run = vm.run(limit_s=5)
        assert run.exit.reason == "done"
        assert run.elapsed_ns == pytest.approx(1_500_000, abs=50)


def test_a_programs_own_port_handler_comes_first_and_lasts_one_run() -> None:
    image = out(0x510, 7) + read_and_print(0x511) + out(0xF4, 0) + b"\xf4"
    seen: list[tuple[int, int, int | None]] = []

    def answer(port: int, size: int, value: int | None) -> int | None:
        seen.append((port, size, value))
        return 0x142

    with boot(image) as vm:
        vm.run(limit_s=5, handlers={0x510: answer, 0x511: answer})
        assert seen == [(0x510, 1, 7), (0x511, 1, None)]
        assert vm.machine.ports.console == b"\x42"


def test_what_is_printed_beyond_a_mebibyte_is_counted_not_kept() -> None:
    ports = ModelVm().machine.ports
    for _ in range((1 << 20) + 5):
        ports.write(0xE9, 1, 0x41)
    assert len(ports.console) == 1 << 20
    assert ports.dropped_bytes == 5


# --- real time ----------------------------------------------------------------------------------


def test_fifty_ticks_in_real_time() -> None:
    vm = ModelVm(clock="real")
    vm.create_irqchip()
    vm.create_pit2(1)
    vm.create_vcpu(0)
    vm.load(guests.load("tick-pic", ticks=50))
    with vm:
        run = vm.run(limit_s=60)
        assert run.exit.reason == "done"
        assert (run.clock, run.guest_ticks) == ("real", 50)
        assert run.elapsed_ns >= 50 * PERIOD_NS, "a clock that runs ahead of the host's is none"
        assert run.ticks is not None
        assert run.ticks.expired >= 50
        assert sum(run.ticks.count(v) for v in Verdict) == run.ticks.expired
        assert run.ticks.count("coalesced") == run.ticks.count("dropped") == 0


def test_in_real_time_records_are_read_while_the_guest_sleeps() -> None:
    batches: list[int] = []
    guest = guests.load("tick-pic", ticks=20)
    with ModelVm(clock="real") as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        vm.machine.recorder.add_consumer(lambda batch: batches.append(len(batch)))
        assert vm.run(limit_s=20).exit.reason == "done"
    assert len(batches) > 2
    assert max(batches) < sum(batches) / 2


@pytest.mark.parametrize(
    "access", ["0f32", "0f01c1", "ee", "ec"], ids=["rdmsr", "vmcall", "out", "in"]
)
def test_a_guest_that_only_accesses_fills_no_more_than_a_batch(access: str) -> None:
    batches: list[int] = []
    # mov ecx, IA32_APIC_BASE; next: the access; jmp next
    code = bytes.fromhex("66b91b000000" + access)
    code += bytes((0xEB, 256 - 2 - len(access) // 2))
    with ModelVm(detail=True) as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        vm.load(Guest("test", code, 0x8000, (0, 0x8000), None))
        vm.machine.recorder.add_consumer(lambda batch: batches.append(len(batch)))
        vm.run(for_ns=10_000)
    assert sum(batches) > 10_000
    assert max(batches) < 3000


# --- the machine --------------------------------------------------------------------------------


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="clock 'atomic': choose virtual or real"):
        ModelVm(clock="atomic")
    for ram_bytes in (-4096, 4097, (3 << 30) + 4096):
        with pytest.raises(ValueError, match=rf"ram_bytes={ram_bytes}: give a multiple of 4096 up"):
            ModelVm(ram_bytes=ram_bytes)
    with pytest.raises(ValueError, match="fast=True: your engine decides that itself, leave"):
        ModelVm(engine=UnicornEngine, fast=True)
    with ModelVm() as vm:
        vm.create_irqchip()
        with pytest.raises(KvmError, match="no vCPU"):
            vm.run()
        for gpa, size in ((-1, 1), (2 << 20, 1), ((2 << 20) - 1, 2)):
            with pytest.raises(ValueError, match=r"outside guest RAM; stay within 0x0\.\.0x200000"):
                vm.read_memory(gpa, size)
            with pytest.raises(ValueError, match=r"outside guest RAM; stay within 0x0\.\.0x200000"):
                vm.write_memory(gpa, bytes(size))
    vm.close()


def test_memory_written_between_runs_is_executed() -> None:
    with boot(SPIN) as vm:
        vm.run(for_ns=100)
        vm.write_memory(LOAD_AT, leave(0))
        assert vm.run(for_ns=MS, limit_s=5).exit.reason == "done"


def test_a_guest_loaded_before_its_vcpu_starts_all_the_same() -> None:
    vm = ModelVm()
    vm.create_irqchip()
    vm.create_pit2()
    vm.load(guests.load("tick-pic", ticks=3))
    vm.create_vcpu(0)
    with vm:
        assert vm.run().guest_ticks == 3


def test_a_guest_that_overwrites_its_parameter_block_still_ends() -> None:
    # mov dword [0x8004], 0; mov al, 0; out 0xf4, al
    code = bytes.fromhex("66c706048000000000b000e6f4")
    guest = guests.load("tick-pic", ticks=1)
    image = guest.image[:0x60] + code + guest.image[0x60 + len(code) :]
    with ModelVm() as vm:
        vm.prepare(guest.needs)
        vm.load(replace(guest, image=image, entry=(0, guest.load_at + 0x60)))
        run = vm.run()
    assert (run.exit.reason, run.guest_ticks) == ("done", None)


def test_a_negative_end_is_refused() -> None:
    with boot(ticker()) as vm, pytest.raises(ValueError, match="for_ns=-5 is negative"):
        vm.run(for_ns=-5)
