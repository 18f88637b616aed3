"""Guests on a real CPU under the model's chips: the machine over `HostKvm`.

A busy host is late as it likes: nothing here asks for speed.
"""

import errno
import gc
import os
from collections.abc import Iterator

import pytest

from kvmtick import guests
from kvmtick.abi import HostError, KvmError
from kvmtick.cpu.hostkvm import HostKvm
from kvmtick.guests import Guest
from kvmtick.kvm.kernel import KernelSystem
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.run import Run
from kvmtick.ticks.verdict import Verdict

LIMIT_S = 30.0
CODE = 0x1000


@pytest.fixture
def host() -> Iterator[HostKvm]:
    """A VM of /dev/kvm; a skip that says why where there is none."""
    try:
        made = HostKvm()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with made:
        yield made


def run_guest(host: HostKvm, guest: Guest) -> Run:
    with ModelVm(engine=host, clock="real", ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        return vm.run(limit_s=LIMIT_S)


def run_code(host: HostKvm, code: str) -> tuple[Run, ModelVm]:
    """Real-mode code without an irqchip; the VM is closed."""
    with ModelVm(engine=host, clock="real") as vm:
        vm.create_vcpu(0)
        vm.load(Guest("code", bytes.fromhex(code), CODE, (0, CODE), None))
        return vm.run(limit_s=LIMIT_S), vm


@pytest.mark.parametrize(
    ("name", "timer"),
    [
        ("tick-pic", None),
        ("tick-if0", None),
        ("tick-mask", None),
        ("tick-oneshot", None),
        ("tick-ioapic", None),
        ("tick-msi", None),
        ("nmi-watchdog", None),
        ("ipi-tick", None),
        ("tick-lapic", "periodic"),
        ("tick-lapic", "tsc-deadline"),
        ("tick-x2apic", None),
        ("tick-long", None),
    ],
)
def test_a_guest_gets_its_ticks_and_each_has_a_verdict(
    host: HostKvm, name: str, timer: str | None
) -> None:
    if name in ("tick-lapic", "tick-x2apic") and not host.filters_msrs:
        pytest.skip("this host's KVM has no KVM_CAP_X86_MSR_FILTER")
    run = run_guest(host, guests.load(name, ticks=20, hz=100, timer=timer, tsc_khz=host.tsc_khz))
    assert (run.exit.reason, run.exit.code) == ("done", 0), run.exit
    assert run.guest_ticks == 20
    assert (run.cpu, run.chips, run.clock) == ("kvm", "model", "real")
    assert run.instructions is None
    for report in run.reports():
        assert sum(report.count(verdict) for verdict in Verdict) == report.expired
        assert report.count(Verdict.UNKNOWN) == 0


def test_the_end_of_time_and_a_question_end_a_run(host: HostKvm) -> None:
    guest = guests.load("tick-pic", ticks=0, tsc_khz=host.tsc_khz)
    with ModelVm(engine=host, clock="real") as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        assert vm.run(for_ns=20_000_000, limit_s=LIMIT_S).exit.reason == "time"
        ticks = vm.run(until=lambda: vm.ticks().expired >= 30, limit_s=LIMIT_S)
        assert ticks.exit.reason == "until"
        assert ticks.guest_ticks is not None
        assert ticks.guest_ticks > 0


def test_a_guest_that_does_not_come_out_is_stopped_at_the_limit(host: HostKvm) -> None:
    with ModelVm(engine=host, clock="real") as vm:
        vm.create_vcpu(0)
        vm.load(Guest("spin", b"\xeb\xfe", CODE, (0, CODE), None))
        assert vm.run(limit_s=0.2).exit.reason == "limit"


def test_code_where_no_ram_is_ends_the_run(host: HostKvm) -> None:
    with ModelVm(engine=host, clock="real", ram_bytes=1 << 20) as vm:
        vm.create_vcpu(0)
        # jmp 0xffff:0x10
        vm.load(Guest("jump", bytes.fromhex("ea1000ffff"), CODE, (0, CODE), None))
        run = vm.run(limit_s=LIMIT_S)
    assert run.exit.reason == "guest-error"
    assert "KVM" in run.exit.detail


def test_a_triple_fault_is_one(host: HostKvm) -> None:
    # lidt [0] (an empty IDT); mov eax, 1; mov cr0, eax (protected mode); ud2
    run, vm = run_code(host, "0f011e0000 66b801000000 0f22c0 0f0b")
    assert run.exit.reason == "triple-fault"
    assert vm.machine.vcpu is not None


def test_strings_reach_the_console_byte_by_byte(host: HostKvm) -> None:
    # mov si, 0x1010; mov cx, 5; mov dx, 0xe9; cld; rep outsb; xor ax, ax; out 0xf4, al
    code = "be1010 b90500 bae900 fc f36e 31c0 e6f4"
    padded = bytes.fromhex(code).ljust(0x10, b"\x90").hex() + b"hello".hex()
    run, _ = run_code(host, padded)
    assert (run.exit.reason, run.console) == ("done", "hello")


def test_an_unknown_msr_ends_a_strict_run_before_it(host: HostKvm) -> None:
    if not host.filters_msrs:
        pytest.skip("this host's KVM has no KVM_CAP_X86_MSR_FILTER")
    with ModelVm(engine=host, clock="real") as vm:
        vm.machine.strict = True
        vm.create_vcpu(0)
        # mov ecx, 0x12345678; rdmsr
        code = bytes.fromhex("66b978563412 0f32")
        vm.load(Guest("rdmsr", code, CODE, (0, CODE), None))
        run = vm.run(limit_s=LIMIT_S)
        assert run.exit.reason == "guest-error"
        assert "read of the unknown MSR 0x12345678" in run.exit.detail
        assert vm.machine.vcpu is not None
        assert vm.machine.vcpu.engine.rip == CODE + 6


def test_cpuid_offers_what_both_have(host: HostKvm) -> None:
    with ModelVm() as plain, ModelVm(engine=host, clock="real") as vm, KernelSystem() as system:
        ours = {leaf.function: leaf for leaf in plain.get_supported_cpuid()}
        theirs = {leaf.function: leaf for leaf in system.get_supported_cpuid() if not leaf.index}
        both = {leaf.function: leaf for leaf in vm.get_supported_cpuid()}
    x2apic, tsc_deadline, sse2 = 1 << 21, 1 << 24, 1 << 26
    assert bool(both[1].ecx & x2apic) == host.filters_msrs
    assert bool(both[1].ecx & tsc_deadline) == host.filters_msrs
    assert both[1].edx & sse2 == ours[1].edx & theirs[1].edx & sse2
    assert not both[0x8000_0001].edx & ~(ours[0x8000_0001].edx & theirs[0x8000_0001].edx)
    assert both[0x4000_0010].eax == host.tsc_khz == both[0x15].ebx


def test_a_real_cpu_needs_real_time(host: HostKvm) -> None:
    with ModelVm(engine=host) as vm, pytest.raises(ValueError, match="needs clock='real'"):
        vm.create_vcpu(0)


def descriptors() -> set[str]:
    """What this process has open of KVM."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if "kvm" in name:
            found.add(name)
    return found


@pytest.mark.parametrize("order", ["machine first", "host first", "nobody"])
def test_nothing_is_left_open_in_whatever_order_it_is_closed(host: HostKvm, order: str) -> None:
    host.close()
    gc.collect()
    before = descriptors()
    mine = HostKvm()
    vm = ModelVm(engine=mine, clock="real")
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    assert descriptors() > before
    if order == "machine first":
        vm.close()
        mine.close()
    elif order == "host first":
        mine.close()
        vm.close()
    else:
        vm.close()
    vm.close()
    assert descriptors() == before


def test_a_closed_host_makes_no_engine(host: HostKvm) -> None:
    host.close()
    host.close()
    with pytest.raises(RuntimeError, match="make another"):
        host()


def test_registers_that_contradict_each_other_are_refused(host: HostKvm) -> None:
    engine = host()
    with pytest.raises(KvmError, match="EINVAL"):
        engine.set_registers({"cr0": 0x8000_0010})  # paging without protection
    engine.close()


def test_kvm_run_of_one_vcpu_is_refused(host: HostKvm) -> None:
    with ModelVm(engine=host, clock="real") as vm:
        vcpu = vm.create_vcpu(0)
        with pytest.raises(KvmError, match=r"runs by Vm\.run") as failure:
            vcpu.run()
        assert failure.value.errno == errno.EOPNOTSUPP


SAYS_IT = "ff060020 e680 cf"  # inc word [0x2000]; out 0x80, al; iret
ONCE = "fb 90 fa e4 81 f4"  # sti; nop; cli; in al, 0x81; hlt


@pytest.mark.parametrize("cpu", ["unicorn", "kvm"])
def test_an_interrupt_whose_handler_meets_an_exception_is_not_repeated(
    cpu: str, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue("host") if cpu == "kvm" else None
    with ModelVm(engine=engine, clock="real") as vm:
        vm.write_memory(0x40 * 4, (0x500).to_bytes(4, "little"))
        vm.write_memory(0x500, bytes.fromhex(SAYS_IT))
        vcpu = vm.create_vcpu(0)
        vm.load(Guest("code", bytes.fromhex(ONCE), CODE, (0, CODE), None))
        vcpu.interrupt(0x40)
        with pytest.raises(ZeroDivisionError):
            vm.run(handlers={0x80: lambda *_: 1 // 0}, limit_s=LIMIT_S)
        assert vm.read_memory(0x2000, 2) == b"\1\0"
        run = vm.run(limit_s=LIMIT_S)
        assert run.exit.reason == "deadlock"
        assert vm.read_memory(0x2000, 2) == b"\1\0"
