"""What the calls do beside the rows of the errno table, on both back ends.

Which check comes first, memory that cannot be written, numbers that are no call, descriptors that
are something else or closed, other processes; KVM_SET_CPUID2 and KVM_GET_CLOCK (api.rst).
"""

import errno
import mmap
import os
import signal
from collections.abc import Callable
from ctypes import c_uint8, sizeof
from typing import Any

import pytest
from backends import MakeVm, make_vm, vms
from errno_readings import BAD_POINTER, KERNEL_POINTER, NULL, Pages

from kvmtick import Kvm, KvmError, guests
from kvmtick.abi import ioctls
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API
from kvmtick.abi.exits import ExitIo
from kvmtick.abi.structs import (
    KVM_CLOCK_TSC_STABLE,
    KVM_EXIT_INTR,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST,
    KvmStruct,
    kvm_clock_data,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_irq_level,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_msr_entry,
    kvm_pic_state,
    kvm_pit_state2,
    make_msrs,
)
from kvmtick.conform.bench import ID, MSR_APIC_BASE, MSR_TSC, SVR, VERSION, to_ioapic, to_pic
from kvmtick.host.kvmdev import KvmFile
from kvmtick.kvm.model import ModelVm
from kvmtick.kvm.model_file import file_of
from kvmtick.kvm.setup import cpuid_of

__all__ = ["vms"]

X2APIC_ID = 0x802


def refusal(call: Callable[..., object], *args: Any) -> str:
    """The errno's name; "-": the call was done."""
    try:
        call(*args)
    except KvmError as error:
        return errno.errorcode[error.errno or 0]
    return "-"


def pc(vms: MakeVm) -> tuple[Any, Any]:
    """A VM with chips, a PIT and a vCPU; and the vCPU."""
    vm = vms()
    vm.create_irqchip()
    vm.create_pit2()
    return vm, vm.create_vcpu(0)


# --- order of checks ------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [NULL, BAD_POINTER, KERNEL_POINTER])
def test_copying_comes_before_the_vms_state_but_for_get_pit2_and_the_lapic(
    vms: MakeVm, address: int
) -> None:
    bare = vms()
    vcpu = bare.create_vcpu(0)
    for name in ("CREATE_PIT2", "GET_PIT", "SET_PIT", "SET_PIT2", "REINJECT_CONTROL"):
        assert (name, refusal(bare.ioctl, ioctls.IOCTLS[f"KVM_{name}"], address)) == (
            name,
            "EFAULT",
        )
    for name in ("GET_IRQCHIP", "SET_IRQCHIP", "IRQ_LINE", "IRQ_LINE_STATUS", "SIGNAL_MSI"):
        assert refusal(bare.ioctl, ioctls.IOCTLS[f"KVM_{name}"], address) == "EFAULT"
    assert refusal(bare.ioctl, ioctls.KVM_GET_PIT2, address) == "ENXIO"
    assert refusal(vcpu.ioctl, ioctls.KVM_GET_LAPIC, address) == "EINVAL"
    assert refusal(vcpu.ioctl, ioctls.KVM_SET_LAPIC, address) == "EINVAL"


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def pages() -> Pages:
    return Pages()


def test_an_address_is_as_good_as_a_structure(vms: MakeVm, pages: Pages) -> None:
    vm, _ = pc(vms)
    pages.write(bytes(kvm_irq_level(irq=4, level=1)))
    vm.ioctl(ioctls.KVM_IRQ_LINE, pages.address)
    assert vm.get_irqchip(0).chip.pic.irr == 1 << 4
    vm.ioctl(ioctls.KVM_GET_PIT2, pages.address)
    told = kvm_pit_state2.from_buffer_copy(pages.read(sizeof(kvm_pit_state2)))
    assert [channel.count for channel in told.channels] == [0x10000] * 3


def test_get_into_a_page_that_cannot_be_written(vms: MakeVm, pages: Pages) -> None:
    vm, vcpu = pc(vms)
    pages.protect(0, mmap.PROT_READ)
    for name in ("GET_PIT", "GET_PIT2", "GET_IRQCHIP", "GET_CLOCK", "IRQ_LINE_STATUS"):
        assert refusal(vm.ioctl, ioctls.IOCTLS[f"KVM_{name}"], pages.address) == "EFAULT", name
    for name in ("GET_REGS", "GET_LAPIC", "GET_MP_STATE", "GET_VCPU_EVENTS"):
        assert refusal(vcpu.ioctl, ioctls.IOCTLS[f"KVM_{name}"], pages.address) == "EFAULT", name
    vm.ioctl(ioctls.KVM_IRQ_LINE, pages.address)  # reads only


def test_values_of_msrs_into_a_page_that_cannot_be_written(vms: MakeVm, pages: Pages) -> None:
    _, vcpu = pc(vms)
    pages.write(bytes(make_msrs([kvm_msr_entry(index=MSR_TSC)])))
    pages.protect(0, mmap.PROT_READ)
    assert refusal(vcpu.ioctl, ioctls.KVM_GET_MSRS, pages.address) == "EFAULT"
    assert vcpu.ioctl(ioctls.KVM_SET_MSRS, pages.address) == 1


def test_a_structure_over_the_end_of_what_is_mapped(vms: MakeVm, pages: Pages) -> None:
    vm, _ = pc(vms)
    pages.protect(1, 0)
    last = pages.address + mmap.PAGESIZE
    for call, struct in (
        (ioctls.KVM_GET_PIT2, kvm_pit_state2),
        (ioctls.KVM_SET_PIT2, kvm_pit_state2),
    ):
        assert refusal(vm.ioctl, call, last - sizeof(struct)) == "-"
        assert refusal(vm.ioctl, call, last - sizeof(struct) + 1) == "EFAULT"


# --- numbers and descriptors ----------------------------------------------------------------------


class odd(KvmStruct):
    """Of a size that no ioctl has."""

    _fields_ = (("bytes", c_uint8 * 77),)


def test_a_number_with_another_size_is_another_call(vms: MakeVm) -> None:
    vm, vcpu = pc(vms)
    other = ioctls.iowr(ioctls.KVMIO, 0x62, odd)
    assert other & 0xFFFF == ioctls.KVM_GET_IRQCHIP & 0xFFFF
    assert refusal(vm.ioctl, other, bytearray(1024)) == "ENOTTY"
    assert refusal(vcpu.ioctl, other, bytearray(1024)) == "EINVAL"


def on_number(vm: Any, fd: int, request: int) -> None:
    """An ioctl on whatever has that descriptor, as the VM's back end does it."""
    if isinstance(vm, ModelVm):
        file_of(fd).ioctl(request)
    else:
        KvmFile(os.dup(fd)).ioctl(request)


def test_an_eventfd_is_no_vm(vms: MakeVm) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        assert refusal(on_number, vms(), fd, ioctls.KVM_CREATE_IRQCHIP) == "ENOTTY"
    finally:
        os.close(fd)


def test_what_was_closed_answers_ebadf(vms: MakeVm) -> None:
    vm, vcpu = pc(vms)
    vm.close()
    assert refusal(vm.get_pit2) == refusal(vcpu.get_regs) == refusal(vm.create_vcpu, 1) == "EBADF"
    assert refusal(lambda: vcpu.area) == refusal(vcpu.run) == "EBADF"
    assert vm.fileno() == vcpu.fileno() == -1


def in_a_child(do: Callable[[], bool]) -> bool:
    """Fork, and whether the child found what it should."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if do() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_another_process_gets_eio(vms: MakeVm) -> None:
    vm, vcpu = pc(vms)
    unknown = ioctls.io(ioctls.KVMIO, 0xFF)

    def refused() -> bool:
        calls = (vm.get_pit2, vcpu.get_regs, vcpu.nmi, lambda: vm.ioctl(unknown))
        return {refusal(call) for call in calls} == {"EIO"}

    assert in_a_child(refused)
    assert vm.get_pit2().channels[0].count == 0x10000


def test_a_child_may_make_vms_of_its_own(vms: MakeVm) -> None:
    backend = "model" if isinstance(vms(), ModelVm) else "kernel"

    def makes_one() -> bool:
        with Kvm(backend) as system, system.create_vm() as vm:
            vm.create_irqchip()
            return vm.create_vcpu(0).get_mp_state() == 0

    assert in_a_child(makes_one)


# --- what some calls do ---------------------------------------------------------------------------


def test_a_refused_table_leaves_the_old_one(vms: MakeVm) -> None:
    vm, _ = pc(vms)
    vm.set_gsi_routing([to_pic(4, 5)])
    assert refusal(vm.set_gsi_routing, [to_pic(4, 6), to_pic(5, 6), to_ioapic(4, 24)]) == "EINVAL"
    vm.irq_line(4, 1)
    assert vm.get_irqchip(0).chip.pic.irr == 1 << 5


@pytest.mark.parametrize("chip_id", [0, 1])
def test_all_ones_go_into_a_pic_and_come_back(vms: MakeVm, chip_id: int) -> None:
    vm, _ = pc(vms)
    given = kvm_irqchip(chip_id=chip_id)
    given.chip.pic = kvm_pic_state.from_buffer_copy(b"\xff" * sizeof(kvm_pic_state))
    vm.set_irqchip(given)
    assert bytes(vm.get_irqchip(chip_id).chip.pic) == b"\xff" * 16


def test_a_count_of_0_is_65536_on_every_counter(vms: MakeVm) -> None:
    vm, _ = pc(vms)
    vm.set_pit2(kvm_pit_state2())
    assert [channel.count for channel in vm.get_pit2().channels] == [0x10000] * 3


def test_set_lapic_keeps_the_version_and_takes_the_id(vms: MakeVm) -> None:
    _, vcpu = pc(vms)
    for given in (0x0100_0000, 1, 0xFF00_0000):
        lapic = vcpu.get_lapic()
        lapic.set_reg(ID, given)
        vcpu.set_lapic(lapic)
        assert vcpu.get_lapic().reg(ID) == given
    vcpu.set_lapic(kvm_lapic_state.from_buffer_copy(b"\xff" * sizeof(kvm_lapic_state)))
    assert vcpu.get_lapic().reg(VERSION) == 0x5_0014
    assert vcpu.get_lapic().reg(SVR) == 0xFFFF_FFFF


def test_msrs_are_set_up_to_the_first_that_is_refused(vms: MakeVm) -> None:
    _, vcpu = pc(vms)
    assert vcpu.set_msrs({MSR_APIC_BASE: 0xFEE0_0100, X2APIC_ID: 0, MSR_TSC: 5}) == 1
    assert vcpu.get_msrs([MSR_APIC_BASE, X2APIC_ID, MSR_TSC]) == {MSR_APIC_BASE: 0xFEE0_0100}
    assert vcpu.set_msrs({MSR_APIC_BASE: 0xFED0_0900}) == 1
    assert vcpu.get_msrs([MSR_APIC_BASE]) == {MSR_APIC_BASE: 0xFED0_0900}


@pytest.mark.parametrize(("given", "told"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 0), (9, 9)])
def test_the_mp_state_reads_back(vms: MakeVm, given: int, told: int) -> None:
    """SIPI_RECEIVED (4) starts the vCPU at once."""
    vm, first = pc(vms)
    second = vm.create_vcpu(1)
    assert (first.get_mp_state(), second.get_mp_state()) == (0, 1)
    for vcpu in (first, second):
        vcpu.set_mp_state(given)
        assert vcpu.get_mp_state() == told


def test_with_the_split_irqchip_one_interrupt_waits_for_the_guest(vms: MakeVm) -> None:
    vm = vms()
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    vcpu = vm.create_vcpu(0)
    assert [refusal(vcpu.interrupt, 0x20) for _ in range(2)] == ["-", "EEXIST"]
    assert vcpu.get_lapic().reg(VERSION) == 0x5_0014


def test_suppressing_eoi_broadcasts_needs_the_split_irqchip(vms: MakeVm) -> None:
    whole, split = vms(), vms()
    whole.create_irqchip()
    split.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    offered = split.check_extension(KVM_CAP_X2APIC_API)
    if not offered & KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST:
        pytest.skip(f"this kernel has none: KVM_CAP_X2APIC_API is {offered}")
    assert whole.check_extension(KVM_CAP_X2APIC_API) == offered & ~4
    for flags, expected in ((4, "-"), (12, "EINVAL"), (16, "EINVAL")):
        assert refusal(split.enable_cap, KVM_CAP_X2APIC_API, flags) == expected
    assert refusal(whole.enable_cap, KVM_CAP_X2APIC_API, 4) == "EINVAL"


# --- signals --------------------------------------------------------------------------------------


def test_a_signal_ends_the_kernels_kvm_run() -> None:
    """The model's ends by kicks and its limit only (kvmtick.kvm.model_run)."""
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    with make_vm("kernel") as vm:
        vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        vm.load(guests.Guest("hlt", b"\xf4", 0x1000, (0, 0x1000), None))  # with IF=0: for ever
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            assert refusal(vcpu.ioctl, ioctls.KVM_RUN) == "EINTR"
        finally:
            signal.signal(signal.SIGALRM, before)
        assert vcpu.area.exit_reason == KVM_EXIT_INTR
    assert heard == [signal.SIGALRM]


# --- CPUID ----------------------------------------------------------------------------------------


def ran(vms: MakeVm) -> tuple[Any, Any]:
    """A VM whose vCPU has run; and the vCPU."""
    vm, vcpu = pc(vms)
    vcpu.set_cpuid2(cpuid_of(vm.get_supported_cpuid(), 0))
    vm.load(guests.load("tick-pic", ticks=2))
    assert vm.run().exit.reason == "done"
    return vm, vcpu


def test_cpuid_may_change_until_the_first_run(vms: MakeVm) -> None:
    vm, vcpu = pc(vms)
    entries = cpuid_of(vm.get_supported_cpuid(), 0)
    for given in (entries, entries[:3], [], entries):
        vcpu.set_cpuid2(given)
        # A kernel may add leaf 0xD, which follows XCR0.
        told = [entry.function for entry in vcpu.get_cpuid2() if entry.function != 0xD]
        assert told == [entry.function for entry in given if entry.function != 0xD]


def test_cpuid_stays_after_the_first_run(vms: MakeVm) -> None:
    _, vcpu = ran(vms)
    entries = vcpu.get_cpuid2()
    vcpu.set_cpuid2(entries)
    for given in (entries[:-1], entries[::-1], []):
        assert refusal(vcpu.set_cpuid2, given) == "EINVAL"
    entries[0].eax ^= 1
    assert refusal(vcpu.set_cpuid2, entries) == "EINVAL"


def test_cpuid_has_256_entries_at_most(vms: MakeVm) -> None:
    _, vcpu = pc(vms)
    entries = [kvm_cpuid_entry2(function=number) for number in range(257)]
    vcpu.set_cpuid2(entries[:256])
    assert refusal(vcpu.set_cpuid2, entries) == "E2BIG"


def test_cpuid_into_a_list_that_is_too_short(vms: MakeVm) -> None:
    vm, vcpu = pc(vms)
    vcpu.set_cpuid2(cpuid_of(vm.get_supported_cpuid(), 0)[:3])
    assert refusal(vcpu.ioctl, ioctls.KVM_GET_CPUID2, kvm_cpuid2(nent=2)) == "E2BIG"


@pytest.mark.parametrize(("bits", "expected"), [(0, "-"), (47, "EINVAL"), (48, "-"), (57, "-")])
def test_linear_addresses_have_48_bits_or_57(vms: MakeVm, bits: int, expected: str) -> None:
    _, vcpu = pc(vms)
    entry = kvm_cpuid_entry2(function=0x8000_0008, eax=bits << 8 | 36)
    assert refusal(vcpu.set_cpuid2, [entry]) == expected


# --- kvmclock -------------------------------------------------------------------------------------


def test_the_clock_is_stable_once_a_vcpu_has_run(vms: MakeVm) -> None:
    bare = vms()
    assert bare.get_clock().flags == 0
    vm, _ = ran(vms)
    if not vm.get_clock().flags:
        pytest.skip("this host's TSC is no clock: KVM uses no master clock")
    first, second = vm.get_clock(), vm.get_clock()
    assert first.flags & KVM_CLOCK_TSC_STABLE
    assert first.clock <= second.clock
    assert 0 < first.host_tsc <= second.host_tsc


def test_the_clock_is_not_stable_with_tscs_that_differ() -> None:
    with ModelVm() as vm:
        vcpu = vm.create_vcpu(0)
        vm.create_vcpu(1)
        vm.load(guests.Guest("hlt", b"\xf4", 0x1000, (0, 0x1000), None))
        vm.run(for_ns=1000)
        assert vm.get_clock().flags == KVM_CLOCK_TSC_STABLE
        vcpu.set_msrs({MSR_TSC: 1 << 40})
        assert vm.get_clock().flags == 0


# --- a run ----------------------------------------------------------------------------------------


def test_without_a_vcpu_there_is_nothing_to_run(vms: MakeVm) -> None:
    with pytest.raises(KvmError, match=r"KVM_RUN: ENOENT: .*call create_vcpu\(0\)"):
        vms().run()


def test_the_guest_starts_on_the_vcpu_that_boots(vms: MakeVm) -> None:
    vm = vms()
    vm.set_boot_cpu_id(1)
    vm.create_irqchip()
    vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    vm.load(guests.load("tick-pic", ticks=3))
    run = vm.run(limit_s=10)
    assert (run.exit.reason, run.guest_ticks) == ("done", 3)


def test_what_starts_anew_waits_for_nothing(vms: MakeVm) -> None:
    vm = vms()
    vm.create_irqchip()
    vm.write_memory(0x1000, b"\xfa\xf4")  # cli; hlt
    vm.write_memory(0x2000, b"\xe6\x10")  # out 0x10, al
    for vcpu_id, waits in ((0, KVM_MP_STATE_HALTED), (1, KVM_MP_STATE_UNINITIALIZED)):
        vcpu = vm.create_vcpu(vcpu_id)
        if vcpu_id == 0:
            vcpu.start_at(0, 0x1000)
            vcpu.run(limit_s=0.02)
        assert vcpu.get_mp_state() == waits
        vcpu.start_at(0, 0x2000)
        assert isinstance(vcpu.run(), ExitIo)


@pytest.mark.parametrize("ram_bytes", [5, -4096, 1 << 40])
def test_ram_is_in_pages_and_below_the_chips(vms: MakeVm, ram_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"ram_bytes={ram_bytes}: give a multiple of 4096 up to"):
        vms(ram_bytes=ram_bytes)


def test_memory_of_a_closed_vm_is_ebadf(vms: MakeVm) -> None:
    vm = vms()
    state = vm.save()
    vm.close()
    calls: list[Callable[[], object]] = [
        lambda: vm.read_memory(0, 1),
        lambda: vm.write_memory(0, b"x"),
        lambda: vm.load(guests.load("tick-pic")),
        lambda: vm.load(state),
    ]
    for call in calls:
        with pytest.raises(KvmError, match="EBADF: this VM was closed"):
            call()


# --- what an error says ---------------------------------------------------------------------------


def test_a_short_buffer_is_efault(vms: MakeVm) -> None:
    with pytest.raises(KvmError, match="EFAULT: the argument is not all memory"):
        vms().ioctl(ioctls.KVM_GET_CLOCK, bytearray(8))


MISTAKES: dict[str, Callable[[Any], object]] = {
    "below 4 GiB": lambda vm: vm.set_tss_addr(1 << 33),
    "before create_vcpu": lambda vm: vm.create_vcpu(0) and vm.set_identity_map_addr(0),
    "with a vCPU": lambda vm: vm.create_vcpu(0) and vm.set_tsc_khz(0),
    "this host cannot give": lambda vm: vm.create_vcpu(0).set_tsc_khz(1000),
    "no in-kernel local APIC": lambda vm: vm.create_vcpu(0).set_vapic_addr(0),
    "256 entries at most": lambda vm: vm.create_vcpu(0).set_cpuid2([kvm_cpuid_entry2()] * 257),
    "fewer than 256 MSRs": lambda vm: vm.create_vcpu(0).get_msrs(range(256)),
    "KVM_CLOCK_": lambda vm: vm.set_clock(kvm_clock_data(flags=0x10)),
    "fd is no open descriptor": lambda vm: vm.ioeventfd(0x510, 2, -1),
    "delete it first": lambda vm: vm.set_user_memory_region(0, 0, 4096, 0),
    "has no such ioctl": lambda vm: vm.ioctl(ioctls.KVM_RUN),
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_refusal_says_what_to_do(vms: MakeVm, told: str) -> None:
    with pytest.raises(KvmError) as caught:
        MISTAKES[told](vms())
    assert "\n" not in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("what", ["VM", "vCPU", "system"])
def test_what_was_closed_says_so_by_its_name(what: str, vms: MakeVm) -> None:
    vm = vms()
    vcpu = vm.create_vcpu(0)
    with Kvm(vm.backend) as system:
        files = {"VM": vm, "vCPU": vcpu, "system": system}
        files[what].close()
        with pytest.raises(KvmError, match=f": EBADF: this {what} was closed"):
            files[what].ioctl(ioctls.KVM_GET_API_VERSION)
