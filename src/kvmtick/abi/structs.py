"""The uapi structures of /dev/kvm on x86 as ctypes, with the coded values their fields take.

Names, order and types are those of <linux/kvm.h> and <asm/kvm.h>; api.rst says what the fields
mean. Unions that are anonymous in C are called `u` here. `struct_fields`, `format_struct` and
`struct_diff` walk, print and compare any of them.

Not here: the structures of FPU and nested state.
"""

from collections.abc import Iterable, Iterator
from ctypes import (
    Array,
    Structure,
    Union,
    c_char,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    sizeof,
)
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "KVM_APIC_REG_SIZE",
    "KVM_API_VERSION",
    "KVM_CLOCK_HOST_TSC",
    "KVM_CLOCK_REALTIME",
    "KVM_CLOCK_TSC_STABLE",
    "KVM_CPUID_FLAG_SIGNIFCANT_INDEX",
    "KVM_EXIT_DEBUG",
    "KVM_EXIT_EXCEPTION",
    "KVM_EXIT_FAIL_ENTRY",
    "KVM_EXIT_HLT",
    "KVM_EXIT_HYPERCALL",
    "KVM_EXIT_INTERNAL_ERROR",
    "KVM_EXIT_INTR",
    "KVM_EXIT_IO",
    "KVM_EXIT_IOAPIC_EOI",
    "KVM_EXIT_IO_IN",
    "KVM_EXIT_IO_OUT",
    "KVM_EXIT_IRQ_WINDOW_OPEN",
    "KVM_EXIT_MMIO",
    "KVM_EXIT_NMI",
    "KVM_EXIT_SET_TPR",
    "KVM_EXIT_SHUTDOWN",
    "KVM_EXIT_SYSTEM_EVENT",
    "KVM_EXIT_TPR_ACCESS",
    "KVM_EXIT_UNKNOWN",
    "KVM_EXIT_WATCHDOG",
    "KVM_EXIT_X86_RDMSR",
    "KVM_EXIT_X86_WRMSR",
    "KVM_GUESTDBG_ENABLE",
    "KVM_GUESTDBG_SINGLESTEP",
    "KVM_INTERNAL_ERROR_DELIVERY_EV",
    "KVM_INTERNAL_ERROR_EMULATION",
    "KVM_INTERNAL_ERROR_SIMUL_EX",
    "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
    "KVM_IOAPIC_NUM_PINS",
    "KVM_IOEVENTFD_FLAG_DATAMATCH",
    "KVM_IOEVENTFD_FLAG_DEASSIGN",
    "KVM_IOEVENTFD_FLAG_PIO",
    "KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY",
    "KVM_IRQCHIP_IOAPIC",
    "KVM_IRQCHIP_PIC_MASTER",
    "KVM_IRQCHIP_PIC_SLAVE",
    "KVM_IRQFD_FLAG_DEASSIGN",
    "KVM_IRQFD_FLAG_RESAMPLE",
    "KVM_IRQ_ROUTING_IRQCHIP",
    "KVM_IRQ_ROUTING_MSI",
    "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_MEM_READONLY",
    "KVM_MP_STATE_AP_RESET_HOLD",
    "KVM_MP_STATE_HALTED",
    "KVM_MP_STATE_INIT_RECEIVED",
    "KVM_MP_STATE_RUNNABLE",
    "KVM_MP_STATE_SIPI_RECEIVED",
    "KVM_MP_STATE_UNINITIALIZED",
    "KVM_MSI_VALID_DEVID",
    "KVM_MSR_EXIT_REASON_FILTER",
    "KVM_MSR_EXIT_REASON_INVAL",
    "KVM_MSR_EXIT_REASON_UNKNOWN",
    "KVM_MSR_FILTER_DEFAULT_DENY",
    "KVM_MSR_FILTER_MAX_RANGES",
    "KVM_MSR_FILTER_READ",
    "KVM_MSR_FILTER_WRITE",
    "KVM_NR_INTERRUPTS",
    "KVM_NR_IRQCHIPS",
    "KVM_PIT_FLAGS_HPET_LEGACY",
    "KVM_PIT_FLAGS_SPEAKER_DATA_ON",
    "KVM_PIT_SPEAKER_DUMMY",
    "KVM_VCPUEVENT_VALID_NMI_PENDING",
    "KVM_VCPUEVENT_VALID_PAYLOAD",
    "KVM_VCPUEVENT_VALID_SHADOW",
    "KVM_VCPUEVENT_VALID_SIPI_VECTOR",
    "KVM_VCPUEVENT_VALID_SMM",
    "KVM_VCPUEVENT_VALID_TRIPLE_FAULT",
    "KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK",
    "KVM_X2APIC_API_USE_32BIT_IDS",
    "KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST",
    "KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST",
    "KVM_X86_SHADOW_INT_MOV_SS",
    "KVM_X86_SHADOW_INT_STI",
    "FieldDiff",
    "KvmStruct",
    "KvmUnion",
    "format_struct",
    "kvm_clock_data",
    "kvm_cpuid2",
    "kvm_cpuid_entry2",
    "kvm_debugregs",
    "kvm_dtable",
    "kvm_enable_cap",
    "kvm_guest_debug",
    "kvm_interrupt",
    "kvm_ioapic_redirtbl_entry",
    "kvm_ioapic_redirtbl_fields",
    "kvm_ioapic_state",
    "kvm_ioeventfd",
    "kvm_irq_level",
    "kvm_irq_routing",
    "kvm_irq_routing_entry",
    "kvm_irq_routing_irqchip",
    "kvm_irq_routing_msi",
    "kvm_irqchip",
    "kvm_irqchip_chip",
    "kvm_irqfd",
    "kvm_lapic_state",
    "kvm_mp_state",
    "kvm_msi",
    "kvm_msr_entry",
    "kvm_msr_filter",
    "kvm_msr_filter_range",
    "kvm_msrs",
    "kvm_pic_state",
    "kvm_pit_channel_state",
    "kvm_pit_config",
    "kvm_pit_state",
    "kvm_pit_state2",
    "kvm_regs",
    "kvm_reinject_control",
    "kvm_run",
    "kvm_run_exit",
    "kvm_segment",
    "kvm_signal_mask",
    "kvm_sregs",
    "kvm_tpr_access_ctl",
    "kvm_u64",
    "kvm_userspace_memory_region",
    "kvm_vapic_addr",
    "kvm_vcpu_events",
    "make_cpuid2",
    "make_irq_routing",
    "make_msrs",
    "offset_of",
    "struct_diff",
    "struct_fields",
    "to_chip",
    "to_msi",
]

KVM_API_VERSION = 12
KVM_NR_INTERRUPTS = 256
KVM_IOAPIC_NUM_PINS = 24
KVM_APIC_REG_SIZE = 0x400

# kvm_irqchip.chip_id, kvm_irq_routing_irqchip.irqchip
KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_NR_IRQCHIPS = 3

# kvm_pit_config.flags
KVM_PIT_SPEAKER_DUMMY = 1
"""The kernel answers port 0x61; without it each access to the port leaves KVM_RUN."""

# kvm_pit_state2.flags
KVM_PIT_FLAGS_HPET_LEGACY = 1 << 0
KVM_PIT_FLAGS_SPEAKER_DATA_ON = 1 << 1

# kvm_irq_routing_entry.type, .flags
KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_MSI_VALID_DEVID = 1 << 0

# kvm_irqfd.flags
KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1
"""The line stays up until the guest acknowledges it; `resamplefd` is signalled then."""

# kvm_ioeventfd.flags
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY = 1 << 3

# kvm_enable_cap.args[0] of KVM_CAP_X2APIC_API
KVM_X2APIC_API_USE_32BIT_IDS = 1 << 0
KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK = 1 << 1
KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST = 1 << 2
KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST = 1 << 3

# kvm_cpuid_entry2.flags (the header's spelling)
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0
"""The entry answers only for its `index` in ECX."""

# kvm_userspace_memory_region.flags
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

# kvm_run.exit_reason
KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_WATCHDOG = 21
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30

# kvm_run.u.io.direction
KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

# kvm_run.u.internal.suberror
KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4

# kvm_mp_state.mp_state
KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4
KVM_MP_STATE_AP_RESET_HOLD = 9

# kvm_clock_data.flags
KVM_CLOCK_TSC_STABLE = 1 << 1
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3

# kvm_vcpu_events.flags: which parts KVM_SET_VCPU_EVENTS takes
KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 1 << 1
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
KVM_VCPUEVENT_VALID_SMM = 1 << 3
KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5

# kvm_vcpu_events.interrupt.shadow
KVM_X86_SHADOW_INT_MOV_SS = 1 << 0
KVM_X86_SHADOW_INT_STI = 1 << 1

U8: TypeAlias = Annotated[int, c_uint8]
U16: TypeAlias = Annotated[int, c_uint16]
U32: TypeAlias = Annotated[int, c_uint32]
U64: TypeAlias = Annotated[int, c_uint64]
S32: TypeAlias = Annotated[int, c_int32]
S64: TypeAlias = Annotated[int, c_int64]


class KvmStruct(Structure):
    """A C structure of the uapi; `bytes(x)` is what the kernel sees."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)

    def union_member(self, field: str) -> str | None:
        """Which member of the union `field` is meant; None: the first one."""
        return None

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in struct_fields(self))
        return f"{type(self).__name__}({inside})"


class KvmUnion(Union):
    """A C union of the uapi."""


_C = TypeVar("_C", bound="type[KvmStruct] | type[KvmUnion]")


def _layout(cls: _C) -> _C:
    """Build ctypes' `_fields_` from the annotations, so that a field is written down once."""
    fields: list[Any] = []
    for name, hint in cls.__annotations__.items():
        # Annotated[int, c_type], Annotated[int, c_type, bits] or the structure itself
        fields.append((name, *getattr(hint, "__metadata__", (hint,))))
    cls._fields_ = fields
    return cls


@_layout
class kvm_pit_channel_state(KvmStruct):
    """One 8254 counter (KVM_GET_PIT2); `count` is in PIT clocks, 65536 where 0 was loaded."""

    count: U32
    latched_count: U16
    count_latched: U8
    status_latched: U8
    status: U8
    read_state: U8
    write_state: U8
    write_latch: U8
    rw_mode: U8
    mode: U8
    bcd: U8
    gate: U8
    count_load_time: S64
    """CLOCK_MONOTONIC nanoseconds (kernel: ktime) of the last load."""


@_layout
class kvm_pit_state(KvmStruct):
    """KVM_GET_PIT, KVM_SET_PIT."""

    channels: Annotated[Array[kvm_pit_channel_state], kvm_pit_channel_state * 3]


@_layout
class kvm_pit_state2(KvmStruct):
    """KVM_GET_PIT2, KVM_SET_PIT2; `flags`: KVM_PIT_FLAGS_*."""

    channels: Annotated[Array[kvm_pit_channel_state], kvm_pit_channel_state * 3]
    flags: U32
    reserved: Annotated[Array[c_uint32], c_uint32 * 9]


@_layout
class kvm_pit_config(KvmStruct):
    """KVM_CREATE_PIT2; `flags`: KVM_PIT_SPEAKER_DUMMY."""

    flags: U32
    pad: Annotated[Array[c_uint32], c_uint32 * 15]


@_layout
class kvm_reinject_control(KvmStruct):
    """KVM_REINJECT_CONTROL; non-zero `pit_reinject` replays ticks the guest could not take."""

    pit_reinject: U8
    reserved: Annotated[Array[c_uint8], c_uint8 * 31]


@_layout
class kvm_pic_state(KvmStruct):
    """One i8259 (KVM_GET_IRQCHIP, chip_id 0 and 1)."""

    last_irr: U8
    irr: U8
    imr: U8
    isr: U8
    priority_add: U8
    irq_base: U8
    read_reg_select: U8
    poll: U8
    special_mask: U8
    init_state: U8
    auto_eoi: U8
    rotate_on_auto_eoi: U8
    special_fully_nested_mode: U8
    init4: U8
    elcr: U8
    elcr_mask: U8


@_layout
class kvm_ioapic_redirtbl_fields(KvmStruct):
    """One IOAPIC redirection entry by its fields (82093AA datasheet, IOREDTBL)."""

    vector: U8
    delivery_mode: Annotated[int, c_uint8, 3]
    dest_mode: Annotated[int, c_uint8, 1]
    delivery_status: Annotated[int, c_uint8, 1]
    polarity: Annotated[int, c_uint8, 1]
    remote_irr: Annotated[int, c_uint8, 1]
    trig_mode: Annotated[int, c_uint8, 1]
    mask: Annotated[int, c_uint8, 1]
    reserve: Annotated[int, c_uint8, 7]
    reserved: Annotated[Array[c_uint8], c_uint8 * 4]
    dest_id: U8


@_layout
class kvm_ioapic_redirtbl_entry(KvmUnion):
    """One IOAPIC redirection entry: `bits` as a whole, or `fields`."""

    bits: U64
    fields: kvm_ioapic_redirtbl_fields


@_layout
class kvm_ioapic_state(KvmStruct):
    """The IOAPIC (KVM_GET_IRQCHIP, chip_id 2)."""

    base_address: U64
    ioregsel: U32
    id: U32
    irr: U32
    pad: U32
    redirtbl: Annotated[
        Array[kvm_ioapic_redirtbl_entry], kvm_ioapic_redirtbl_entry * KVM_IOAPIC_NUM_PINS
    ]


@_layout
class kvm_irqchip_chip(KvmUnion):
    """What kvm_irqchip carries; `chip_id` says which member."""

    dummy: Annotated[bytes, c_char * 512]
    pic: kvm_pic_state
    ioapic: kvm_ioapic_state


@_layout
class kvm_irqchip(KvmStruct):
    """KVM_GET_IRQCHIP, KVM_SET_IRQCHIP; `chip_id`: KVM_IRQCHIP_*."""

    chip_id: U32
    pad: U32
    chip: kvm_irqchip_chip

    def union_member(self, field: str) -> str | None:
        return {0: "pic", 1: "pic", 2: "ioapic"}.get(self.chip_id)


@_layout
class kvm_irq_level(KvmStruct):
    """KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS: `irq` is a GSI; on return its bytes are `status`."""

    irq: U32
    level: U32

    @property
    def status(self) -> int:
        """What KVM_IRQ_LINE_STATUS returned: >0 delivered, 0 coalesced, <0 ignored."""
        return c_int32(self.irq).value


@_layout
class kvm_irq_routing_irqchip(KvmStruct):
    """Route to pin `pin` of chip `irqchip` (KVM_IRQCHIP_*)."""

    irqchip: U32
    pin: U32


@_layout
class kvm_irq_routing_msi(KvmStruct):
    """Route to a message-signalled interrupt."""

    address_lo: U32
    address_hi: U32
    data: U32
    devid: U32


@_layout
class kvm_irq_routing_u(KvmUnion):
    """The target of a routing entry; `type` says which member."""

    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    pad: Annotated[Array[c_uint32], c_uint32 * 8]


@_layout
class kvm_irq_routing_entry(KvmStruct):
    """One entry of a routing table; `type`: KVM_IRQ_ROUTING_*."""

    gsi: U32
    type: U32
    flags: U32
    pad: U32
    u: kvm_irq_routing_u

    def union_member(self, field: str) -> str | None:
        return {KVM_IRQ_ROUTING_IRQCHIP: "irqchip", KVM_IRQ_ROUTING_MSI: "msi"}.get(
            self.type, "pad"
        )


@_layout
class kvm_irq_routing(KvmStruct):
    """Head of KVM_SET_GSI_ROUTING's argument; `nr` entries follow it (`make_irq_routing`)."""

    nr: U32
    flags: U32


def to_chip(gsi: int, irqchip: int, pin: int, flags: int = 0) -> kvm_irq_routing_entry:
    """A routing entry to a chip's pin."""
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP, flags=flags)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = irqchip, pin
    return entry


def to_msi(gsi: int, address: int, data: int, flags: int = 0) -> kvm_irq_routing_entry:
    """A routing entry to a message."""
    entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI, flags=flags)
    entry.u.msi.address_lo, entry.u.msi.address_hi = address & 0xFFFF_FFFF, address >> 32
    entry.u.msi.data = data
    return entry


def make_irq_routing(entries: Iterable[kvm_irq_routing_entry], flags: int = 0) -> bytearray:
    """The bytes KVM_SET_GSI_ROUTING takes: a kvm_irq_routing and its entries."""
    table = list(entries)
    return _with_entries(kvm_irq_routing(nr=len(table), flags=flags), table)


def _with_entries(head: KvmStruct, entries: Iterable[KvmStruct]) -> bytearray:
    return bytearray(b"".join(map(bytes, (head, *entries))))


@_layout
class kvm_msi(KvmStruct):
    """KVM_SIGNAL_MSI: a message as a device writes it; `flags`: KVM_MSI_VALID_DEVID."""

    address_lo: U32
    address_hi: U32
    data: U32
    flags: U32
    devid: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 12]


@_layout
class kvm_irqfd(KvmStruct):
    """KVM_IRQFD: an eventfd whose signal pulses `gsi`; `flags`: KVM_IRQFD_FLAG_*."""

    fd: U32
    gsi: U32
    flags: U32
    resamplefd: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 16]


@_layout
class kvm_ioeventfd(KvmStruct):
    """KVM_IOEVENTFD: an eventfd signalled by a guest's write; `flags`: KVM_IOEVENTFD_FLAG_*.

    `len` is 1, 2, 4 or 8 bytes, 0 for any.
    """

    datamatch: U64
    addr: U64
    len: U32
    fd: S32
    flags: U32
    pad: Annotated[Array[c_uint8], c_uint8 * 36]


@_layout
class kvm_enable_cap(KvmStruct):
    """KVM_ENABLE_CAP; `cap`: KVM_CAP_*, `args` as api.rst says for it."""

    cap: U32
    flags: U32
    args: Annotated[Array[c_uint64], c_uint64 * 4]
    pad: Annotated[Array[c_uint8], c_uint8 * 64]


@_layout
class kvm_interrupt(KvmStruct):
    """KVM_INTERRUPT: the vector of an external interrupt (no in-kernel PIC)."""

    irq: U32


@_layout
class kvm_cpuid_entry2(KvmStruct):
    """What CPUID answers for `function` in EAX (and `index` in ECX, if `flags` says so)."""

    function: U32
    index: U32
    flags: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


@_layout
class kvm_cpuid2(KvmStruct):
    """Head of KVM_SET_CPUID2's argument; `nent` entries follow it (`make_cpuid2`)."""

    nent: U32
    padding: U32


def make_cpuid2(entries: Iterable[kvm_cpuid_entry2]) -> bytearray:
    """The bytes KVM_SET_CPUID2 takes: a kvm_cpuid2 and its entries."""
    table = list(entries)
    return _with_entries(kvm_cpuid2(nent=len(table)), table)


@_layout
class kvm_msr_entry(KvmStruct):
    """One model-specific register."""

    index: U32
    reserved: U32
    data: U64


@_layout
class kvm_msrs(KvmStruct):
    """Head of KVM_GET_MSRS' and KVM_SET_MSRS' argument; `nmsrs` entries follow (`make_msrs`)."""

    nmsrs: U32
    pad: U32


def make_msrs(entries: Iterable[kvm_msr_entry]) -> bytearray:
    """The bytes KVM_GET_MSRS and KVM_SET_MSRS take: a kvm_msrs and its entries."""
    table = list(entries)
    return _with_entries(kvm_msrs(nmsrs=len(table)), table)


# kvm_msr_filter_range.flags, kvm_msr_filter.flags, KVM_CAP_X86_USER_SPACE_MSR
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1
KVM_MSR_FILTER_DEFAULT_DENY = 1 << 0
KVM_MSR_FILTER_MAX_RANGES = 16
KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2


@_layout
class kvm_msr_filter_range(KvmStruct):
    """`nmsrs` MSRs from `base` on; `bitmap` is the address of a bit each: 1 is allowed."""

    flags: U32
    nmsrs: U32
    base: U32
    pad: U32
    bitmap: U64


@_layout
class kvm_msr_filter(KvmStruct):
    """KVM_X86_SET_MSR_FILTER: which MSR accesses of the guest KVM handles itself."""

    flags: U32
    pad: U32
    ranges: Annotated[Array[kvm_msr_filter_range], kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES]


@_layout
class kvm_u64(KvmStruct):
    """The bare __u64 that KVM_SET_IDENTITY_MAP_ADDR takes."""

    value: U64


@_layout
class kvm_userspace_memory_region(KvmStruct):
    """KVM_SET_USER_MEMORY_REGION; sizes and addresses in bytes, page aligned."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64


@_layout
class kvm_regs(KvmStruct):
    """KVM_GET_REGS, KVM_SET_REGS."""

    rax: U64
    rbx: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    rsp: U64
    rbp: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    rflags: U64


@_layout
class kvm_segment(KvmStruct):
    """A segment register with its hidden part; `limit` in bytes whatever `g` says."""

    base: U64
    limit: U32
    selector: U16
    type: U8
    present: U8
    dpl: U8
    db: U8
    s: U8
    l: U8  # noqa: E741 - the kernel's name for the 64-bit code bit
    g: U8
    avl: U8
    unusable: U8
    padding: U8


@_layout
class kvm_dtable(KvmStruct):
    """GDTR or IDTR."""

    base: U64
    limit: U16
    padding: Annotated[Array[c_uint16], c_uint16 * 3]


@_layout
class kvm_sregs(KvmStruct):
    """KVM_GET_SREGS, KVM_SET_SREGS."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    interrupt_bitmap: Annotated[Array[c_uint64], c_uint64 * (KVM_NR_INTERRUPTS // 64)]


# kvm_guest_debug.control
KVM_GUESTDBG_ENABLE = 1 << 0
KVM_GUESTDBG_SINGLESTEP = 1 << 1


@_layout
class kvm_guest_debug(KvmStruct):
    """KVM_SET_GUEST_DEBUG; `control`: KVM_GUESTDBG_*."""

    control: U32
    pad: U32
    debugreg: Annotated[Array[c_uint64], c_uint64 * 8]


@_layout
class kvm_debugregs(KvmStruct):
    """KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS."""

    db: Annotated[Array[c_uint64], c_uint64 * 4]
    dr6: U64
    dr7: U64
    flags: U64
    reserved: Annotated[Array[c_uint64], c_uint64 * 9]


@_layout
class kvm_lapic_state(KvmStruct):
    """KVM_GET_LAPIC, KVM_SET_LAPIC: the xAPIC register page, one register each 16 bytes."""

    regs: Annotated[Array[c_uint8], c_uint8 * KVM_APIC_REG_SIZE]

    def reg(self, offset: int) -> int:
        """The 32-bit register at byte `offset` of the page (SDM vol. 3A, table 12-1)."""
        return int.from_bytes(self.regs[offset : offset + 4], "little")

    def set_reg(self, offset: int, value: int) -> None:
        """Store a 32-bit register at byte `offset` of the page."""
        self.regs[offset : offset + 4] = list(value.to_bytes(4, "little"))


@_layout
class kvm_signal_mask(KvmStruct):
    """Head of KVM_SET_SIGNAL_MASK's argument; `len` (8) bytes of sigset follow it."""

    len: U32


@_layout
class kvm_clock_data(KvmStruct):
    """KVM_GET_CLOCK, KVM_SET_CLOCK: kvmclock in ns; `flags`: KVM_CLOCK_*."""

    clock: U64
    flags: U32
    pad0: U32
    realtime: U64
    host_tsc: U64
    pad: Annotated[Array[c_uint32], c_uint32 * 4]


@_layout
class kvm_tpr_access_ctl(KvmStruct):
    """KVM_TPR_ACCESS_REPORTING."""

    enabled: U32
    flags: U32
    reserved: Annotated[Array[c_uint32], c_uint32 * 8]


@_layout
class kvm_vapic_addr(KvmStruct):
    """KVM_SET_VAPIC_ADDR; a guest-physical address."""

    vapic_addr: U64


@_layout
class kvm_mp_state(KvmStruct):
    """KVM_GET_MP_STATE, KVM_SET_MP_STATE; `mp_state`: KVM_MP_STATE_*."""

    mp_state: U32


@_layout
class kvm_vcpu_events_exception(KvmStruct):
    """The exception being delivered."""

    injected: U8
    nr: U8
    has_error_code: U8
    pending: U8
    error_code: U32


@_layout
class kvm_vcpu_events_interrupt(KvmStruct):
    """The interrupt being delivered, and the shadow (KVM_X86_SHADOW_INT_*)."""

    injected: U8
    nr: U8
    soft: U8
    shadow: U8


@_layout
class kvm_vcpu_events_nmi(KvmStruct):
    """NMIs: `pending` counts up to two, `masked` until IRET."""

    injected: U8
    pending: U8
    masked: U8
    pad: U8


@_layout
class kvm_vcpu_events_smi(KvmStruct):
    """System management mode."""

    smm: U8
    pending: U8
    smm_inside_nmi: U8
    latched_init: U8


@_layout
class kvm_vcpu_events_triple_fault(KvmStruct):
    """A triple fault waiting to be told."""

    pending: U8


@_layout
class kvm_vcpu_events(KvmStruct):
    """KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS; `flags`: KVM_VCPUEVENT_VALID_*."""

    exception: kvm_vcpu_events_exception
    interrupt: kvm_vcpu_events_interrupt
    nmi: kvm_vcpu_events_nmi
    sipi_vector: U32
    flags: U32
    smi: kvm_vcpu_events_smi
    triple_fault: kvm_vcpu_events_triple_fault
    reserved: Annotated[Array[c_uint8], c_uint8 * 26]
    exception_has_payload: U8
    exception_payload: U64


@_layout
class kvm_run_hw(KvmStruct):
    """KVM_EXIT_UNKNOWN."""

    hardware_exit_reason: U64


@_layout
class kvm_run_fail_entry(KvmStruct):
    """KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: U64
    cpu: U32


@_layout
class kvm_run_io(KvmStruct):
    """KVM_EXIT_IO: `count` items of `size` bytes at `data_offset` from the start of kvm_run."""

    direction: U8
    size: U8
    port: U16
    count: U32
    data_offset: U64


@_layout
class kvm_run_mmio(KvmStruct):
    """KVM_EXIT_MMIO: `len` bytes of `data`."""

    phys_addr: U64
    data: Annotated[Array[c_uint8], c_uint8 * 8]
    len: U32
    is_write: U8


@_layout
class kvm_run_internal(KvmStruct):
    """KVM_EXIT_INTERNAL_ERROR; `suberror`: KVM_INTERNAL_ERROR_*."""

    suberror: U32
    ndata: U32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@_layout
class kvm_run_system_event(KvmStruct):
    """KVM_EXIT_SYSTEM_EVENT."""

    type: U32
    ndata: U32
    data: Annotated[Array[c_uint64], c_uint64 * 16]


@_layout
class kvm_run_msr(KvmStruct):
    """KVM_EXIT_X86_RDMSR and _WRMSR; `reason`: KVM_MSR_EXIT_REASON_*. `error` 1 answers #GP."""

    error: U8
    pad: Annotated[Array[c_uint8], c_uint8 * 7]
    reason: U32
    index: U32
    data: U64


@_layout
class kvm_run_eoi(KvmStruct):
    """KVM_EXIT_IOAPIC_EOI (split irqchip)."""

    vector: U8


@_layout
class kvm_run_exit(KvmUnion):
    """The details of an exit; `exit_reason` says which member."""

    padding: Annotated[Array[c_uint8], c_uint8 * 256]
    hw: kvm_run_hw
    fail_entry: kvm_run_fail_entry
    io: kvm_run_io
    mmio: kvm_run_mmio
    internal: kvm_run_internal
    system_event: kvm_run_system_event
    eoi: kvm_run_eoi
    msr: kvm_run_msr


_EXIT_MEMBER = {
    KVM_EXIT_UNKNOWN: "hw",
    KVM_EXIT_FAIL_ENTRY: "fail_entry",
    KVM_EXIT_IO: "io",
    KVM_EXIT_MMIO: "mmio",
    KVM_EXIT_INTERNAL_ERROR: "internal",
    KVM_EXIT_SYSTEM_EVENT: "system_event",
    KVM_EXIT_IOAPIC_EOI: "eoi",
    KVM_EXIT_X86_RDMSR: "msr",
    KVM_EXIT_X86_WRMSR: "msr",
}


@_layout
class kvm_run(KvmStruct):
    """The page shared with the kernel (mmap of a vCPU fd); the rest of it is port data."""

    request_interrupt_window: U8
    immediate_exit: U8
    padding1: Annotated[Array[c_uint8], c_uint8 * 6]
    exit_reason: U32
    ready_for_interrupt_injection: U8
    if_flag: U8
    flags: U16
    cr8: U64
    apic_base: U64
    u: kvm_run_exit
    kvm_valid_regs: U64
    kvm_dirty_regs: U64
    s: Annotated[Array[c_uint8], c_uint8 * 2048]

    def union_member(self, field: str) -> str | None:
        return _EXIT_MEMBER.get(self.exit_reason)


def offset_of(struct: type[KvmStruct], field: str) -> int:
    """offsetof."""
    return int(getattr(struct, field).offset)


class FieldDiff(NamedTuple):
    """A field two structures disagree on."""

    name: str
    left: int | bytes | None
    right: int | bytes | None

    def __str__(self) -> str:
        return f"{self.name}: {_show(self.left)} != {_show(self.right)}"


_PADDING = ("pad", "pad0", "padding", "padding1", "reserved", "reserve")


def struct_fields(
    struct: KvmStruct | KvmUnion, *, padding: bool = False
) -> Iterator[tuple[str, int | bytes]]:
    """Every plain field as (`channels[0].count`, value), in the order of the structure.

    Of a union the member that counts is walked. Pads and reserved fields only with `padding`.
    """
    for field in struct._fields_:
        name = field[0]
        if padding or name not in _PADDING:
            yield from _walk(struct, name, getattr(struct, name), padding)


def _walk(
    owner: KvmStruct | KvmUnion, name: str, value: Any, padding: bool
) -> Iterator[tuple[str, int | bytes]]:
    if isinstance(value, KvmUnion):
        chosen = owner.union_member(name) if isinstance(owner, KvmStruct) else None
        member = chosen or value._fields_[0][0]
        yield from _walk(owner, f"{name}.{member}", getattr(value, member), padding)
    elif isinstance(value, KvmStruct):
        for inner, leaf in struct_fields(value, padding=padding):
            yield f"{name}.{inner}", leaf
    elif isinstance(value, Array):
        for index, item in enumerate(value):
            yield from _walk(owner, f"{name}[{index}]", item, padding)
    else:
        yield name, value


def _show(value: int | bytes | None) -> str:
    if isinstance(value, int) and not -10 < value < 10:
        return f"{value} ({value:#x})"
    return str(value)


def format_struct(struct: KvmStruct | KvmUnion, *, padding: bool = False) -> str:
    """One line a field: the name, the value, and in hexadecimal from 10 up."""
    lines = [type(struct).__name__]
    lines += [
        f"  {name} = {_show(value)}" for name, value in struct_fields(struct, padding=padding)
    ]
    return "\n".join(lines)


def struct_diff(
    left: KvmStruct, right: KvmStruct, ignore: Iterable[str] = (), *, padding: bool = False
) -> list[FieldDiff]:
    """The fields in which two structures differ, in order; empty when they agree.

    `ignore` names fields to leave out, in full (`channels[0].count`) or by their last part
    (`count_load_time`). A field only one side has counts as None on the other.
    """
    skip = set(ignore)
    a = dict(struct_fields(left, padding=padding))
    b = dict(struct_fields(right, padding=padding))
    return [
        FieldDiff(name, a.get(name), b.get(name))
        for name in [*a, *(name for name in b if name not in a)]
        if a.get(name) != b.get(name) and not {name, name.rsplit(".", 1)[-1]} & skip
    ]


# Layout slips show at import, not as a failing ioctl on some host.
assert sizeof(kvm_pit_state2) == 112
assert sizeof(kvm_irqchip) == 520
assert sizeof(kvm_run) == 2352
