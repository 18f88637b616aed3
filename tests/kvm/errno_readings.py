"""What the rows of `kernel_errno.json` say in prose, as calls.

A reading is a sequence of acts on a fresh VM with a page of RAM; the last one is the row's, those
before prepare for it. `READINGS` gives readings to forms of rows: `{n}` in a form is a number,
`{_}` a remark, and so on (`PLACES`), and the function beside it gets what stood there.
"""

import errno
import mmap
import os
import re
from collections.abc import Callable, Iterator
from ctypes import CDLL, addressof, c_char, c_size_t, c_void_p, sizeof
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvmtick.abi import KvmError, caps, ioctls
from kvmtick.abi.structs import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
    KVM_PIT_SPEAKER_DUMMY,
    KvmStruct,
    kvm_clock_data,
    kvm_enable_cap,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msi,
    kvm_msr_entry,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_reinject_control,
    kvm_tpr_access_ctl,
    kvm_u64,
    kvm_vapic_addr,
    kvm_vcpu_events,
    make_irq_routing,
    make_msrs,
)
from kvmtick.conform.bench import ENABLED, MSI_ADDRESS, SVR, to_ioapic, to_msi, to_pic
from kvmtick.conform.bench import ID as LAPIC_ID
from kvmtick.kvm.api import Arg, Ioctls, System, Vcpu, Vm

__all__ = ["READINGS", "Answer", "Desk", "Pages", "Reading", "forms_of"]

NULL, BAD_POINTER, KERNEL_POINTER = 0, 0x1000, 0xFFFF_8880_0000_0000
UNKNOWN = ioctls.io(ioctls.KVMIO, 0xFF)
PAGE_BYTES = mmap.PAGESIZE
VECTOR = 0x40
NO_RAM = 0x4000_0000
U32, U64 = 0xFFFF_FFFF, (1 << 64) - 1


class Answer(NamedTuple):
    """What a call gave: the result, the errno's name, and what the row tells beside them."""

    rc: int
    errno: str
    told: str


@dataclass
class Desk:
    """A fresh VM of a back end, and what the rows need beside it."""

    system: System
    vm: Vm[Any]
    vcpu: Vcpu | None = None
    eventfds: list[int] = field(default_factory=list)
    pages: "Pages | None" = None

    def eventfd(self, number: int = 0) -> int:
        """The same descriptor for the same number."""
        while len(self.eventfds) <= number:
            self.eventfds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self.eventfds[number]

    def the_vcpu(self) -> Vcpu:
        assert self.vcpu is not None, "the reading has no vCPU"
        return self.vcpu

    def close(self) -> None:
        self.vm.close()
        for fd in self.eventfds:
            os.close(fd)


class Pages:
    """Two pages of this process, whose protection can be changed."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 2 * PAGE_BYTES)
        self.address = addressof(c_char.from_buffer(self._map))

    def protect(self, page: int, protection: int) -> None:
        """mprotect(2) of one of them; 0: no access."""
        libc = CDLL(None, use_errno=True)
        at, size = c_void_p(self.address + page * PAGE_BYTES), c_size_t(PAGE_BYTES)
        assert libc.mprotect(at, size, protection) == 0

    def write(self, data: bytes) -> None:
        self._map[: len(data)] = data

    def read(self, size_bytes: int) -> bytes:
        return self._map[:size_bytes]


Act = Callable[[Desk], Answer]
Given = Arg | Callable[[Desk], Arg]
Told = Callable[[Any], str]
"""What the row tells of the argument, after the call."""

# --- acts -----------------------------------------------------------------------------------------


def call(target: Callable[[Desk], Ioctls], name: str | int, given: Given, told: Told) -> Act:
    """An ioctl; `name` is without KVM_, or a request number."""
    request = name if isinstance(name, int) else ioctls.IOCTLS[f"KVM_{name}"]

    def act(desk: Desk) -> Answer:
        arg = given(desk) if callable(given) else _copy(given)
        try:
            rc, number = target(desk).ioctl(request, arg), 0
        except KvmError as error:
            rc, number = -1, error.errno or 0
        return Answer(rc, errno.errorcode.get(number, "-"), told(arg))

    return act


def _copy(arg: Arg) -> Arg:
    if isinstance(arg, int):
        return arg
    return bytearray(arg) if isinstance(arg, bytearray) else type(arg).from_buffer_copy(arg)


def nothing(arg: object) -> str:
    return ""


def system(name: str | int, given: Given = 0, told: Told = nothing) -> Act:
    return call(lambda desk: desk.system, name, given, told)


def vm(name: str | int, given: Given = 0, told: Told = nothing) -> Act:
    return call(lambda desk: desk.vm, name, given, told)


def vcpu(name: str | int, given: Given = 0, told: Told = nothing) -> Act:
    return call(Desk.the_vcpu, name, given, told)


def tried(act: Act) -> Act:
    """As a preparation, whether or not it is refused."""

    def either(desk: Desk) -> Answer:
        act(desk)
        return Answer(0, "-", "")

    return either


def done(do: Callable[[Desk], object]) -> Act:
    """Something that is no ioctl of the row."""

    def act(desk: Desk) -> Answer:
        do(desk)
        return Answer(0, "-", "")

    return act


def enable(cap: int, value: int = 0, flags: int = 0) -> Act:
    enabling = kvm_enable_cap(cap=cap, flags=flags)
    enabling.args[0] = value
    return vm("ENABLE_CAP", enabling)


def _make_vcpu(desk: Desk) -> None:
    desk.vcpu = desk.vm.create_vcpu(0)


def _enable_lapic(desk: Desk) -> None:
    lapic = desk.the_vcpu().get_lapic()
    lapic.set_reg(SVR, ENABLED)
    desk.the_vcpu().set_lapic(lapic)


CHIPS = vm("CREATE_IRQCHIP")
PIT2 = vm("CREATE_PIT2", kvm_pit_config())
VCPU = done(_make_vcpu)
LAPIC = (CHIPS, VCPU, done(_enable_lapic))


def split(pins: int = 24, flags: int = 0) -> Act:
    return enable(caps.KVM_CAP_SPLIT_IRQCHIP, pins, flags)


def x2apic_api(value: int) -> Act:
    return enable(caps.KVM_CAP_X2APIC_API, value)


def bus_cycle(value: int) -> Act:
    return enable(caps.KVM_CAP_X86_APIC_BUS_CYCLES_NS, value)


def create_pit2(flags: int = 0, pad: int = 0) -> Act:
    config = kvm_pit_config(flags=flags)
    config.pad[0] = pad
    return vm("CREATE_PIT2", config)


def line(gsi: int, level: int = 1) -> Act:
    return vm("IRQ_LINE", kvm_irq_level(irq=gsi, level=level))


def line_status(gsi: int) -> Act:
    told: Told = lambda given: f"status={given.status}"  # noqa: E731
    return vm("IRQ_LINE_STATUS", kvm_irq_level(irq=gsi, level=1), told)


def filled(struct: type[KvmStruct], byte: int) -> KvmStruct:
    return struct.from_buffer_copy(bytes([byte]) * sizeof(struct))


def pit2_of_ones(flags: int = 0) -> kvm_pit_state2:
    state = kvm_pit_state2(flags=flags)
    for channel in range(3):
        state.channels[channel] = filled(type(state.channels[0]), 0xFF)
    return state


def pit2_in_hex(state: kvm_pit_state2) -> str:
    """Without what is reserved, and with nothing where counters 1 and 2 tell when they were set."""
    for channel in state.channels[1:]:
        channel.count_load_time = 0
    return bytes(state)[: kvm_pit_state2.reserved.offset].hex()


def chip_of_ones(chip_id: int) -> kvm_irqchip:
    chip = kvm_irqchip(chip_id=chip_id)
    chip.chip = filled(type(chip.chip), 0xFF)
    return chip


def chip_just_read(chip_id: int) -> Given:
    def given(desk: Desk) -> kvm_irqchip:
        chip = kvm_irqchip(chip_id=chip_id)
        vm("GET_IRQCHIP", lambda _: chip)(desk)
        return chip

    return given


def routing(*entries: kvm_irq_routing_entry, flags: int = 0) -> Act:
    return vm("SET_GSI_ROUTING", make_irq_routing(entries, flags))


def pin_of(chip_id: int, pin: int, flags: int = 0) -> kvm_irq_routing_entry:
    entry = to_pic(4, 0)
    entry.flags, entry.u.irqchip.irqchip, entry.u.irqchip.pin = flags, chip_id, pin
    return entry


def msi_route(high: int = 0, low: int = MSI_ADDRESS, gsi: int = 24, flags: int = 0) -> Act:
    return routing(to_msi(gsi, VECTOR, high << 32 | low, flags))


def table_that_ends(desk: Desk) -> int:
    """Its head says 4096 entries; one page of it is there, the next is not."""
    desk.pages = Pages()
    desk.pages.write(bytes(kvm_irq_routing(nr=4096)))
    desk.pages.protect(1, 0)
    return desk.pages.address


def msi(data: int = VECTOR, high: int = 0, low: int = MSI_ADDRESS, flags: int = 0) -> Act:
    return vm("SIGNAL_MSI", kvm_msi(address_lo=low, address_hi=high, data=data, flags=flags))


EventFd = int | str
"""A number for `Desk.eventfd`, or one of these."""
NONE, VM_FD = "-1", "vm fd"


def _fd(desk: Desk, which: EventFd) -> int:
    if isinstance(which, int):
        return desk.eventfd(which)
    return -1 & U32 if which == NONE else desk.vm.fileno()


def irqfd(gsi: int = 4, flags: int = 0, fd: EventFd = 0, resample: EventFd = NONE) -> Act:
    def given(desk: Desk) -> kvm_irqfd:
        resamplefd = _fd(desk, resample)
        return kvm_irqfd(fd=_fd(desk, fd), gsi=gsi, flags=flags, resamplefd=resamplefd)

    return vm("IRQFD", given)


def unplug(gsi: int = 4, fd: EventFd = 0) -> Act:
    return irqfd(gsi, KVM_IRQFD_FLAG_DEASSIGN, fd)


def resampled(fd: EventFd = 0, resample: EventFd = 1, flags: int = 0) -> Act:
    return irqfd(4, KVM_IRQFD_FLAG_RESAMPLE | flags, fd, resample)


PIO, MATCH = KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DATAMATCH
DEASSIGN = KVM_IOEVENTFD_FLAG_DEASSIGN
MMIO_AT = 0xD000_0000


def ioeventfd(
    addr: int = 0x510, size: int = 2, flags: int = PIO, fd: EventFd = 0, match: int = 0
) -> Act:
    def given(desk: Desk) -> kvm_ioeventfd:
        at = _fd(desk, fd)
        signed = at - (1 << 32) if at >> 31 else at
        return kvm_ioeventfd(addr=addr, len=size, fd=signed, flags=flags, datamatch=match)

    return vm("IOEVENTFD", given)


def lapic_with_id(number: int) -> Act:
    def given(desk: Desk) -> kvm_lapic_state:
        lapic = desk.the_vcpu().get_lapic()
        lapic.set_reg(LAPIC_ID, number)
        return lapic

    return vcpu("SET_LAPIC", given)


def same_lapic(desk: Desk) -> Arg:
    lapic = kvm_lapic_state()
    vcpu("GET_LAPIC", lambda _: lapic)(desk)
    return lapic


def interrupt(vector: int) -> Act:
    return vcpu("INTERRUPT", kvm_interrupt(irq=vector))


def events(flags: int = 0, exception: int | None = None, irq: int | None = None) -> Act:
    given = kvm_vcpu_events(flags=flags)
    if exception is not None:
        given.exception.injected, given.exception.nr = 1, exception
    if irq is not None:
        given.interrupt.injected, given.interrupt.nr = 1, irq
    return vcpu("SET_VCPU_EVENTS", given)


def get_msr(index: int) -> Act:
    def told(given: bytearray) -> str:
        return hex(kvm_msr_entry.from_buffer_copy(given, 8).data)

    return vcpu("GET_MSRS", make_msrs([kvm_msr_entry(index=index)]), told)


def set_msr(index: int, value: int) -> Act:
    return vcpu("SET_MSRS", make_msrs([kvm_msr_entry(index=index, data=value)]))


def tsc_khz_times(twice: int) -> Act:
    """KVM_SET_TSC_KHZ of half the vCPU's rate, `twice` over."""
    return vcpu("SET_TSC_KHZ", lambda desk: desk.the_vcpu().get_tsc_khz() * twice // 2)


# --- readings -------------------------------------------------------------------------------------

Reading = tuple[Act, ...]

PIT_CALLS: dict[str, Given] = {
    "GET_PIT": kvm_pit_state(),
    "GET_PIT2": kvm_pit_state2(),
    "SET_PIT": kvm_pit_state(),
    "SET_PIT2": kvm_pit_state2(),
    "REINJECT_CONTROL": kvm_reinject_control(pit_reinject=1),
}


def pit_told(name: str) -> Told:
    return (lambda given: f"flags={given.flags}") if name == "GET_PIT2" else nothing


def pit_call(name: str, before: Reading) -> Reading:
    return (*before, vm(name, PIT_CALLS[name], pit_told(name)))


MSRS = {
    "APIC_BASE": 0x1B,
    "TSC": 0x10,
    "TSC_DEADLINE": 0x6E0,
    "TSC_ADJUST": 0x3B,
    "X2APIC_ID": 0x802,
    "X2APIC_EOI": 0x80B,
    "KVM_SYSTEM_TIME_NEW": 0x4B56_4D01,
    "KVM_PV_EOI_EN": 0x4B56_4D04,
}
APIC_BASE_BSP, APIC_BASE_EXTD = 1 << 8, 1 << 10

CHIP_IDS = {
    "PIC master": KVM_IRQCHIP_PIC_MASTER,
    "PIC slave": KVM_IRQCHIP_PIC_SLAVE,
    "IOAPIC": KVM_IRQCHIP_IOAPIC,
}
POINTERS = {"NULL": NULL, "bad user ptr": BAD_POINTER, "bad ptr": BAD_POINTER}
POINTERS["kernel ptr"] = KERNEL_POINTER
PIT_STATES: dict[str, Reading] = {
    "no irqchip": (),
    "irqchip, no PIT": (CHIPS,),
    "PIT2 flags0": (CHIPS, PIT2),
    "PIT2 speaker": (CHIPS, create_pit2(KVM_PIT_SPEAKER_DUMMY)),
}
VCPU_STATES: dict[str, Reading] = {"no irqchip": (VCPU,), "irqchip": (CHIPS, VCPU)}


def number(text: str) -> int:
    return int(text, 0)


PLACES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": (r"0x[0-9a-f]+|\d+", number),
    "_": (r"(?:ns| invalid| \(.*\))?", str),
    "ptr": ("|".join(POINTERS), POINTERS.__getitem__),
    "chip": ("|".join(CHIP_IDS), CHIP_IDS.__getitem__),
    "pit": ("|".join(PIT_STATES), PIT_STATES.__getitem__),
    "v": ("|".join(VCPU_STATES), VCPU_STATES.__getitem__),
    "pit_call": ("|".join(PIT_CALLS), str),
    "msr": ("|".join(MSRS), MSRS.__getitem__),
    "get_or_set": ("GET_IRQCHIP|SET_IRQCHIP", str),
    "delivery": ("NMI delivery|SMI delivery|INIT delivery|ExtINT", str),
}


def of_vcpu(act: Callable[..., Act]) -> Callable[..., Reading]:
    """The form has {v} first."""
    return lambda state, *places: (*state, act(*places))


def with_chips(act: Callable[..., Act]) -> Callable[..., Reading]:
    return lambda *places: (CHIPS, act(*places))


def with_pit(act: Callable[..., Act]) -> Callable[..., Reading]:
    return lambda *places: (CHIPS, PIT2, act(*places))


def just(*acts: Act) -> Callable[[], Reading]:
    return lambda: acts


READINGS: dict[str, Callable[..., Reading]] = {
    # System and VM.
    "CREATE_VM type {n}": lambda n: (system("CREATE_VM", n),),
    "/dev/kvm unknown ioctl 0xAEFF on system fd": just(system(UNKNOWN)),
    "/dev/kvm GET_API_VERSION arg=1": just(system("GET_API_VERSION", 1)),
    "/dev/kvm GET_VCPU_MMAP_SIZE arg=1": just(system("GET_VCPU_MMAP_SIZE", 1)),
    "/dev/kvm VM ioctl (CREATE_IRQCHIP) on system fd": just(system("CREATE_IRQCHIP")),
    "vm fd unknown ioctl 0xAEFF on vm fd": just(vm(UNKNOWN)),
    "vm fd vcpu ioctl KVM_RUN on vm fd": just(vm("RUN")),
    "vm fd KVM_NMI on vm fd": just(vm("NMI")),
    # The irqchip, and what is enabled.
    "CREATE_IRQCHIP fresh VM": just(CHIPS),
    "CREATE_IRQCHIP second time": just(CHIPS, CHIPS),
    "CREATE_IRQCHIP after a vCPU exists": just(VCPU, CHIPS),
    "CREATE_IRQCHIP arg non-zero (ignored)": just(vm("CREATE_IRQCHIP", 1)),
    "SPLIT_IRQCHIP ENABLE_CAP(121, 24) fresh VM": just(split()),
    "SPLIT_IRQCHIP second time": just(split(), split()),
    "SPLIT_IRQCHIP then CREATE_IRQCHIP": just(split(), CHIPS),
    "SPLIT_IRQCHIP then CREATE_PIT2": just(split(), PIT2),
    "SPLIT_IRQCHIP then GET_IRQCHIP chip0": just(split(), vm("GET_IRQCHIP", kvm_irqchip())),
    "SPLIT_IRQCHIP then IRQ_LINE gsi 0": just(split(), line(0)),
    "SPLIT_IRQCHIP then SIGNAL_MSI (no vcpu)": just(split(), msi()),
    "SPLIT_IRQCHIP routing with irqchip (PIC) entry": just(split(), routing(to_pic(4, 4))),
    "SPLIT_IRQCHIP routing with MSI entry": just(split(), msi_route()),
    "SPLIT_IRQCHIP args[0]={n}{_}": lambda n: (split(n),),
    "SPLIT_IRQCHIP ENABLE_CAP flags={n}": lambda n: (split(flags=n),),
    "SPLIT_IRQCHIP after a vCPU exists": just(VCPU, split()),
    "SPLIT_IRQCHIP after CREATE_IRQCHIP": just(CHIPS, split()),
    "X2APIC_API args={n}{_}": lambda n: (CHIPS, x2apic_api(n)),
    "ENABLE_CAP unknown cap {n}": lambda n: (enable(n),),
    "ENABLE_CAP X2APIC {n} then MSI addr_hi=0x1": lambda n: (*LAPIC, x2apic_api(n)),
    "APIC_BUS_CYCLES 237, {n}{_}": lambda n: (CHIPS, bus_cycle(n)),
    "APIC_BUS_CYCLES 237, 2^{n}": lambda n: (CHIPS, bus_cycle(1 << n)),
    "APIC_BUS_CYCLES 237 after vCPU": just(CHIPS, VCPU, bus_cycle(10)),
    "APIC_BUS_CYCLES 237 without irqchip": just(bus_cycle(10)),
    # The PIT.
    "CREATE_PIT no irqchip": just(vm("CREATE_PIT")),
    "CREATE_PIT2 no irqchip": just(PIT2),
    "CREATE_PIT2 no irqchip, {ptr} ptr": lambda ptr: (vm("CREATE_PIT2", ptr),),
    "CREATE_PIT after irqchip": just(CHIPS, vm("CREATE_PIT")),
    "CREATE_PIT twice": just(CHIPS, vm("CREATE_PIT"), vm("CREATE_PIT")),
    "CREATE_PIT2 after CREATE_PIT": just(CHIPS, vm("CREATE_PIT"), PIT2),
    "CREATE_PIT2 exists + {ptr} ptr": lambda ptr: (CHIPS, PIT2, vm("CREATE_PIT2", ptr)),
    "CREATE_PIT2 flags={n}": with_chips(create_pit2),
    "CREATE_PIT2 non-zero pad": just(CHIPS, create_pit2(pad=1)),
    "CREATE_PIT2 {ptr}": with_chips(lambda ptr: vm("CREATE_PIT2", ptr)),
    "CREATE_PIT2 after vCPU (irqchip present)": just(CHIPS, VCPU, PIT2),
    "{pit_call} {pit}": pit_call,
    "{pit_call} {pit} {ptr}": lambda name, before, ptr: (*before, vm(name, ptr)),
    "SET_PIT2 state flags={n}": with_pit(lambda n: vm("SET_PIT2", kvm_pit_state2(flags=n))),
    "SET_PIT2 all channel bytes 0xff (flags 0)": just(CHIPS, PIT2, vm("SET_PIT2", pit2_of_ones())),
    "SET_PIT2 all zero": just(CHIPS, PIT2, vm("SET_PIT2", kvm_pit_state2())),
    "GET_PIT2 after that": just(vm("GET_PIT2", kvm_pit_state2(), pit2_in_hex)),
    "REINJECT_CONTROL pit_reinject={n}": with_pit(
        lambda n: vm("REINJECT_CONTROL", kvm_reinject_control(pit_reinject=n))
    ),
    "REINJECT_CONTROL non-zero reserved": with_pit(
        lambda: vm("REINJECT_CONTROL", filled(kvm_reinject_control, 1))
    ),
    # The state of the chips.
    "{get_or_set} no irqchip": lambda name: (vm(name, kvm_irqchip()),),
    "{get_or_set} no irqchip {ptr}": lambda name, ptr: (vm(name, ptr),),
    "{get_or_set} {ptr}": with_chips(vm),
    "GET_IRQCHIP chip_id={n}": with_chips(lambda n: vm("GET_IRQCHIP", kvm_irqchip(chip_id=n))),
    "SET_IRQCHIP chip_id={n} (state just read)": with_chips(
        lambda n: vm("SET_IRQCHIP", chip_just_read(n))
    ),
    "SET_IRQCHIP chip {n} all 0xff": with_chips(lambda n: vm("SET_IRQCHIP", chip_of_ones(n))),
    # Lines and routing.
    "IRQ_LINE no irqchip": just(line(0)),
    "IRQ_LINE_STATUS no irqchip": just(vm("IRQ_LINE_STATUS", kvm_irq_level(level=1))),
    "IRQ_LINE no irqchip {ptr}": lambda ptr: (vm("IRQ_LINE", ptr),),
    "IRQ_LINE_STATUS gsi={n} level 1 (no vcpu)": with_chips(line_status),
    "IRQ_LINE gsi={n} level 0": lambda gsi: (CHIPS, line(gsi), line(gsi, 0)),
    "IRQ_LINE {ptr}": with_chips(lambda ptr: vm("IRQ_LINE", ptr)),
    "IRQ_LINE_STATUS {ptr}": with_chips(lambda ptr: vm("IRQ_LINE_STATUS", ptr)),
    "IRQ_LINE level={n}": with_chips(lambda n: line(0, n)),
    "IRQ_LINE_STATUS gsi {n} after empty table": lambda n: (CHIPS, routing(), line_status(n)),
    "SET_GSI_ROUTING no irqchip, nr=0": just(routing()),
    "SET_GSI_ROUTING no irqchip, 1 PIC entry": just(routing(to_pic(4, 4))),
    "SET_GSI_ROUTING no irqchip, 1 MSI entry": just(msi_route()),
    "SET_GSI_ROUTING nr=0 (clears all)": just(CHIPS, routing()),
    "SET_GSI_ROUTING {chip} pin {n}": with_chips(lambda chip, n: routing(pin_of(chip, n))),
    "SET_GSI_ROUTING irqchip {n}": with_chips(lambda n: routing(pin_of(n, 0))),
    "SET_GSI_ROUTING type {n}{_}": with_chips(
        lambda n: routing(kvm_irq_routing_entry(gsi=4, type=n))
    ),
    "SET_GSI_ROUTING table flags={n}": with_chips(lambda n: routing(to_pic(4, 4), flags=n)),
    "SET_GSI_ROUTING irqchip entry flags={n}": with_chips(
        lambda n: routing(pin_of(KVM_IRQCHIP_PIC_MASTER, 4, n))
    ),
    "SET_GSI_ROUTING MSI entry flags={n}{_}": with_chips(lambda n: msi_route(flags=n)),
    "SET_GSI_ROUTING MSI entry": with_chips(msi_route),
    "SET_GSI_ROUTING MSI addr_lo not fee ({n})": with_chips(lambda n: msi_route(low=n)),
    "SET_GSI_ROUTING MSI addr_hi={n} (no x2apic_format)": with_chips(msi_route),
    "SET_GSI_ROUTING x2apic_format MSI addr_hi={n}": lambda n: (CHIPS, x2apic_api(1), msi_route(n)),
    "SET_GSI_ROUTING gsi {n}": with_chips(lambda n: msi_route(gsi=n)),
    "SET_GSI_ROUTING gsi 0 -> PIC0 + IOAPIC2": just(CHIPS, routing(to_pic(0, 0), to_ioapic(0, 2))),
    "SET_GSI_ROUTING gsi 0 -> PIC0 pin0 twice": just(CHIPS, routing(to_pic(0, 0), to_pic(0, 0))),
    "SET_GSI_ROUTING gsi 0 -> IOAPIC 2 and IOAPIC 3": just(
        CHIPS, routing(to_ioapic(0, 2), to_ioapic(0, 3))
    ),
    "SET_GSI_ROUTING gsi 0 -> PIC0+PIC1+IOAPIC": just(
        CHIPS, routing(to_pic(0, 0), to_pic(0, 8), to_ioapic(0, 2))
    ),
    "SET_GSI_ROUTING gsi 24 -> MSI+MSI": just(CHIPS, routing(to_msi(24, 0x40), to_msi(24, 0x41))),
    "SET_GSI_ROUTING gsi 0 -> IOAPIC then MSI": just(
        CHIPS, routing(to_ioapic(0, 2), to_msi(0, VECTOR))
    ),
    "SET_GSI_ROUTING gsi 0 -> MSI then IOAPIC": just(
        CHIPS, routing(to_msi(0, VECTOR), to_ioapic(0, 2))
    ),
    "SET_GSI_ROUTING gsi 0 & gsi 1 both -> IOAPIC pin 2": just(
        CHIPS, routing(to_ioapic(0, 2), to_ioapic(1, 2))
    ),
    "SET_GSI_ROUTING nr=4097": lambda: (
        CHIPS,
        routing(*(to_msi(gsi % 4096, VECTOR) for gsi in range(4097))),
    ),
    "SET_GSI_ROUTING nr=0xffffffff": just(CHIPS, vm("SET_GSI_ROUTING", kvm_irq_routing(nr=U32))),
    "SET_GSI_ROUTING nr=4096 all MSI distinct gsi": lambda: (
        CHIPS,
        routing(*(to_msi(gsi, VECTOR) for gsi in range(4096))),
    ),
    "SET_GSI_ROUTING {ptr}": with_chips(lambda ptr: vm("SET_GSI_ROUTING", ptr)),
    "SET_GSI_ROUTING nr=4096, buffer one page of zeros (type 0)": just(
        CHIPS, vm("SET_GSI_ROUTING", table_that_ends)
    ),
    # Messages.
    "SIGNAL_MSI no irqchip": just(msi()),
    "SIGNAL_MSI {ptr} no irqchip": lambda ptr: (vm("SIGNAL_MSI", ptr),),
    "SIGNAL_MSI no vCPU": just(CHIPS, msi()),
    "SIGNAL_MSI vCPU0, LAPIC sw-disabled": just(CHIPS, VCPU, msi()),
    "SIGNAL_MSI LAPIC enabled vec {n}": lambda n: (*LAPIC, msi(n)),
    "SIGNAL_MSI again (coalesced)": just(*LAPIC, msi(), msi()),
    "SIGNAL_MSI dest id {n} absent": lambda n: (*LAPIC, msi(low=MSI_ADDRESS | n << 12)),
    "SIGNAL_MSI broadcast {n}": lambda n: (*LAPIC, msi(low=MSI_ADDRESS | n << 12)),
    "SIGNAL_MSI vector {n} (<16)": lambda n: (*LAPIC, msi(n)),
    "SIGNAL_MSI address_lo={n}": lambda n: (*LAPIC, msi(low=n)),
    "SIGNAL_MSI address_hi={n}, no x2apic_format": lambda n: (*LAPIC, msi(high=n)),
    "SIGNAL_MSI flags={n}{_}": lambda n: (*LAPIC, msi(flags=n)),
    "SIGNAL_MSI {delivery} ({n})": lambda _, n: (*LAPIC, msi(n | VECTOR)),
    "SIGNAL_MSI {ptr}": lambda ptr: (*LAPIC, vm("SIGNAL_MSI", ptr)),
    "SIGNAL_MSI x2apic_format: address_hi={n}": lambda n: (*LAPIC, x2apic_api(1), msi(high=n)),
    # Eventfds.
    "IRQFD no irqchip: assign gsi {n}": lambda n: (irqfd(n),),
    "IRQFD no irqchip: assign resample": just(resampled()),
    "IRQFD no irqchip: deassign gsi {n}": lambda n: (unplug(n),),
    "IRQFD assign gsi {n}": with_chips(irqfd),
    "IRQFD same eventfd again gsi {n}": lambda n: (CHIPS, irqfd(4), irqfd(n)),
    "IRQFD same eventfd, other gsi {n}": lambda n: (CHIPS, irqfd(4), irqfd(n)),
    "IRQFD other eventfd same gsi {n}": lambda n: (CHIPS, irqfd(n), irqfd(n, fd=1)),
    "IRQFD gsi {n}{_}": with_chips(irqfd),
    "IRQFD deassign gsi {n}": lambda n: (CHIPS, irqfd(n), unplug(n)),
    "IRQFD flags={n}": with_chips(lambda n: irqfd(flags=n)),
    "IRQFD fd=-1": with_chips(lambda: irqfd(fd=NONE)),
    "IRQFD fd is not an eventfd (vm fd)": with_chips(lambda: irqfd(fd=VM_FD)),
    "IRQFD deassign never assigned": with_chips(unplug),
    "IRQFD deassign wrong gsi": just(CHIPS, irqfd(), unplug(5)),
    "IRQFD deassign ok": just(CHIPS, irqfd(), unplug()),
    "IRQFD deassign twice": just(CHIPS, irqfd(), unplug(), unplug()),
    "IRQFD deassign fd=-1": with_chips(lambda: unplug(fd=NONE)),
    "IRQFD resample": with_chips(resampled),
    "IRQFD resample fd=-1": with_chips(lambda: resampled(resample=NONE)),
    "IRQFD resample fd not eventfd": with_chips(lambda: resampled(resample=VM_FD)),
    "IRQFD deassign with resample flag": just(
        CHIPS, resampled(), resampled(flags=KVM_IRQFD_FLAG_DEASSIGN)
    ),
    "IRQFD {ptr}": with_chips(lambda ptr: vm("IRQFD", ptr)),
    "IRQFD resample fd == trigger fd": with_chips(lambda: resampled(resample=0)),
    "IRQFD assign with count already 1": just(
        CHIPS, done(lambda desk: os.eventfd_write(desk.eventfd(), 1)), irqfd()
    ),
    "IRQFD split: resample": just(split(), resampled()),
    "IRQFD split: plain": just(split(), irqfd()),
    "IOEVENTFD pio {n} len {n}": lambda addr, size: (ioeventfd(addr, size),),
    "IOEVENTFD same again": just(ioeventfd(), ioeventfd()),
    "IOEVENTFD same addr other fd": just(ioeventfd(), ioeventfd(fd=1)),
    "IOEVENTFD datamatch differs, same addr": just(
        ioeventfd(), ioeventfd(flags=PIO | MATCH, match=7)
    ),
    "IOEVENTFD mmio len {n}": lambda size: (ioeventfd(MMIO_AT, size, 0),),
    "IOEVENTFD pio len {n}": lambda size: (ioeventfd(size=size),),
    "IOEVENTFD len {n} + datamatch": lambda size: (ioeventfd(MMIO_AT, size, MATCH),),
    "IOEVENTFD flags={n}{_}": lambda flags: (ioeventfd(MMIO_AT, 4, flags),),
    "IOEVENTFD addr wraps": just(ioeventfd(U64 - 1, 4, 0)),
    "IOEVENTFD fd=-1": just(ioeventfd(fd=NONE)),
    "IOEVENTFD fd not eventfd": just(ioeventfd(fd=VM_FD)),
    "IOEVENTFD deassign ok": just(ioeventfd(), ioeventfd(flags=PIO | DEASSIGN)),
    "IOEVENTFD deassign unknown": just(ioeventfd(flags=PIO | DEASSIGN)),
    "IOEVENTFD {ptr}": lambda ptr: (vm("IOEVENTFD", ptr),),
    # vCPUs.
    "CREATE_VCPU id {n} twice": lambda n: (VCPU, vm("CREATE_VCPU", n)),
    "CREATE_VCPU id {n}": lambda n: (vm("CREATE_VCPU", n),),
    "SET_BOOT_CPU_ID after vCPU": just(VCPU, vm("SET_BOOT_CPU_ID", 0)),
    "SET_BOOT_CPU_ID before vCPU, id {n}": lambda n: (vm("SET_BOOT_CPU_ID", n),),
    "SET_BOOT_CPU_ID id {n}": lambda n: (vm("SET_BOOT_CPU_ID", n),),
    # A vCPU, without and with an irqchip.
    "GET_LAPIC {v}": of_vcpu(lambda: vcpu("GET_LAPIC", kvm_lapic_state())),
    "SET_LAPIC {v} (same)": of_vcpu(lambda: vcpu("SET_LAPIC", same_lapic)),
    "GET_LAPIC {v} {ptr}": of_vcpu(lambda ptr: vcpu("GET_LAPIC", ptr)),
    "SET_LAPIC {v} {ptr}": of_vcpu(lambda ptr: vcpu("SET_LAPIC", ptr)),
    "SET_LAPIC {v} id reg={n} on vCPU0": of_vcpu(lapic_with_id),
    "SET_LAPIC {v} all 0xff": of_vcpu(lambda: vcpu("SET_LAPIC", filled(kvm_lapic_state, 0xFF))),
    "INTERRUPT {v} irq={n}": of_vcpu(interrupt),
    "INTERRUPT {v} second without run": lambda v: (*v, tried(interrupt(0x20)), interrupt(0x20)),
    "INTERRUPT {v} {ptr}": of_vcpu(lambda ptr: vcpu("INTERRUPT", ptr)),
    "NMI {v}": of_vcpu(lambda: vcpu("NMI")),
    "NMI {v} twice": lambda state: (*state, vcpu("NMI"), vcpu("NMI")),
    "GET_MP_STATE {v}": of_vcpu(
        lambda: vcpu("GET_MP_STATE", kvm_mp_state(), lambda given: f"={given.mp_state}")
    ),
    "SET_MP_STATE {v} state={n}": of_vcpu(lambda n: vcpu("SET_MP_STATE", kvm_mp_state(mp_state=n))),
    "GET_VCPU_EVENTS {v}": of_vcpu(lambda: vcpu("GET_VCPU_EVENTS", kvm_vcpu_events())),
    "SET_VCPU_EVENTS {v} same": of_vcpu(
        lambda: vcpu("SET_VCPU_EVENTS", lambda desk: desk.the_vcpu().get_vcpu_events())
    ),
    "SET_VCPU_EVENTS {v} flags={n} rest 0": of_vcpu(events),
    "SET_VCPU_EVENTS {v} exception injected nr={n}": of_vcpu(lambda n: events(exception=n)),
    "SET_VCPU_EVENTS {v} exception nr={n} (NMI)": of_vcpu(lambda n: events(exception=n)),
    "SET_VCPU_EVENTS {v} interrupt.injected nr {n}": of_vcpu(lambda n: events(irq=n)),
    "GET_CLOCK(vm) {v}": of_vcpu(lambda: vm("GET_CLOCK", kvm_clock_data())),
    "SET_CLOCK(vm) {v} flags={n}{_}": of_vcpu(lambda n: vm("SET_CLOCK", kvm_clock_data(flags=n))),
    "GET_TSC_KHZ(vcpu) {v}": of_vcpu(lambda: vcpu("GET_TSC_KHZ")),
    "SET_TSC_KHZ(vcpu) {v} {n}": of_vcpu(lambda n: vcpu("SET_TSC_KHZ", n)),
    "SET_TSC_KHZ(vcpu) {v} same": of_vcpu(lambda: tsc_khz_times(2)),
    "SET_TSC_KHZ(vcpu) {v} 2x": of_vcpu(lambda: tsc_khz_times(4)),
    "SET_TSC_KHZ(vcpu) {v} half": of_vcpu(lambda: tsc_khz_times(1)),
    "SET_TSC_KHZ(vm) {v}": of_vcpu(lambda: vm("SET_TSC_KHZ", lambda desk: desk.vm.get_tsc_khz())),
    "GET_TSC_KHZ(vm) {v}": of_vcpu(lambda: vm("GET_TSC_KHZ")),
    "TPR_ACCESS_REPORTING {v}": of_vcpu(
        lambda: vcpu("TPR_ACCESS_REPORTING", kvm_tpr_access_ctl(enabled=1, flags=1))
    ),
    "SET_VAPIC_ADDR {v}": of_vcpu(
        lambda: vcpu("SET_VAPIC_ADDR", kvm_vapic_addr(vapic_addr=NO_RAM))
    ),
    "SET_TSS_ADDR {v}": of_vcpu(lambda: vm("SET_TSS_ADDR", 0xFFFB_D000)),
    "SET_TSS_ADDR {v} {n}": of_vcpu(lambda n: vm("SET_TSS_ADDR", n)),
    "SET_IDENTITY_MAP {v} after vcpu": of_vcpu(
        lambda: vm("SET_IDENTITY_MAP_ADDR", kvm_u64(value=0xFFFB_C000))
    ),
    "GET_MSRS {v} {msr}": of_vcpu(get_msr),
    "SET_MSRS {v} APIC_BASE disable": of_vcpu(
        lambda: set_msr(MSRS["APIC_BASE"], 0xFEE0_0000 | APIC_BASE_BSP)
    ),
    "SET_MSRS {v} APIC_BASE en {n}": of_vcpu(lambda n: set_msr(MSRS["APIC_BASE"], n)),
    "SET_MSRS {v} APIC_BASE x2apic w/o cpuid {n}": of_vcpu(lambda n: set_msr(MSRS["APIC_BASE"], n)),
    "SET_MSRS {v} APIC_BASE extd only": of_vcpu(
        lambda: set_msr(MSRS["APIC_BASE"], 0xFEE0_0000 | APIC_BASE_BSP | APIC_BASE_EXTD)
    ),
    "SET_MSRS {v} APIC_BASE moved {n}": of_vcpu(lambda n: set_msr(MSRS["APIC_BASE"], n)),
    "SET_MSRS {v} {msr}={n}": of_vcpu(set_msr),
    "vcpu fd {v} unknown ioctl 0xAEFF": of_vcpu(lambda: vcpu(UNKNOWN)),
    "vcpu fd {v} KVM_RUN arg=1": of_vcpu(lambda: vcpu("RUN", 1)),
    "vcpu fd {v} vm ioctl CREATE_IRQCHIP": of_vcpu(lambda: vcpu("CREATE_IRQCHIP")),
    "ENABLE_CAP(vcpu) {v} cap {n}": of_vcpu(lambda n: vcpu("ENABLE_CAP", kvm_enable_cap(cap=n))),
}


def _pattern(form: str) -> re.Pattern[str]:
    """A form as a regular expression; a group for each of its places but remarks."""
    out = ""
    for text, place in re.findall(r"([^{]*)(?:\{(\w+)\})?", form):
        regex = PLACES[place][0] if place else ""
        out += re.escape(text) + (regex if place in ("", "_") else f"({regex})")
    return re.compile(out)


def _places(form: str) -> list[Callable[[str], Any]]:
    return [PLACES[place][1] for place in re.findall(r"\{(\w+)\}", form) if place != "_"]


_FORMS = [(form, _pattern(form), _places(form)) for form in READINGS]


def forms_of(row: str) -> Iterator[tuple[str, Reading]]:
    """The forms a row has, each with the reading it makes of it; one, if the forms are right."""
    for form, pattern, converters in _FORMS:
        if found := pattern.fullmatch(row):
            places = zip(converters, found.groups(), strict=True)
            yield form, READINGS[form](*(convert(text) for convert, text in places))
