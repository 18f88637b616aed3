"""GSI routing and messages (api.rst 4.25, 4.52, 4.71; SDM vol. 3A 12.11; KVM's irq_comm.c).

What KVM_IRQ_LINE_STATUS says, and the default table, is `line_status`.
"""

from collections.abc import Callable

from kvmtick.abi.caps import KVM_CAP_IRQ_ROUTING, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API
from kvmtick.abi.structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_MSI_VALID_DEVID,
    KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_irq_routing_entry,
)
from kvmtick.conform.apics import GSI, PIN, VECTOR, errno_of, only_the_ioapic
from kvmtick.conform.bench import (
    DEST_ID_SHIFT,
    DFR,
    ENABLED,
    EOI,
    ISR,
    LDR,
    LEVEL,
    LIMIT_S,
    MASKED,
    MSI_ADDRESS,
    SVR,
    TMR,
    WINDOWS,
    Bench,
    Pc,
    Script,
    to_ioapic,
    to_msi,
    to_pic,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests.script import Scenario, end, lapic_write, unreal

ABSENT = 5
"""A destination nobody has."""
LOGICAL, REDIRECTION_HINT = 1 << 2, 1 << 3
"""Of a message's address."""
LEVEL_TRIGGERED, ASSERT = 1 << 15, 1 << 14
"""Of a message's data."""
DEST_SHIFT = 12


def statuses(pc: Pc, *levels: int) -> tuple[int, ...]:
    """KVM_IRQ_LINE_STATUS of a sequence of levels."""
    return tuple(pc.vm.irq_line_status(GSI, level) for level in levels)


def one_message(pc: Pc, data: int, address: int = MSI_ADDRESS) -> None:
    """`GSI` leads to a message; the local APIC of vCPU 0 is enabled."""
    pc.vm.set_gsi_routing([to_msi(GSI, data, address)])
    pc.enable_lapic()


# KVM_IRQ_LINE_STATUS.


@case("An interrupt for several answers how many took it (kvm_irq_delivery_to_apic).")
def status_is_how_many_took_it(bench: Bench) -> None:
    with bench.pc(vcpus=3) as pc:
        only_the_ioapic(pc, VECTOR | 0xFF << DEST_ID_SHIFT)
        pc.enable_lapic(2)
        equal(pc.vm.irq_line_status(GSI, 1), 2, "KVM_IRQ_LINE_STATUS, two of three enabled")


@case("Any level but 0 is high (kvm_vm_ioctl_irq_line).")
def any_level_but_0_is_high(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR)
        got = statuses(pc, 0xFFFF_FFFF, 2, 0, 0x8000_0000)
        equal(got, (1, 0, 1, 1), "KVM_IRQ_LINE_STATUS of levels 0xffffffff, 2, 0, 0x80000000")


# KVM_SET_GSI_ROUTING.


@case("A new table replaces the whole old one (api.rst 4.52).")
def table_is_replaced(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.set_gsi_routing([to_pic(5, 3)])
        got = [pc.vm.irq_line_status(gsi, 1) for gsi in (3, 5)]
        equal((got, pc.pic()["irr"]), ([-1, 1], 1 << 3), "status of GSI 3 and 5, PIC's IRR")


@case(
    "A GSI may lead to one pin of each chip, and drives all of them (api.rst 4.52; "
    "setup_routing_entry)."
)
def one_gsi_to_three_chips(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.set_gsi_routing([to_ioapic(40, 20), to_pic(40, 3), to_pic(40, 12)])
        pc.enable_lapic()
        pc.set_pin(20, VECTOR)
        equal(pc.vm.irq_line_status(40, 1), 3, "KVM_IRQ_LINE_STATUS")
        irrs = pc.pic()["irr"], pc.pic(KVM_IRQCHIP_PIC_SLAVE)["irr"]
        equal((pc.irr(), *irrs), ({VECTOR}, 1 << 3 | 1 << 2, 1 << 4), "IRRs of LAPIC and PICs")


@case(
    "A line keeps its level over a change of the table: chips keep lines, GSIs do not "
    "(kvm_set_irq_routing)."
)
def lines_survive_a_new_table(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR | LEVEL | MASKED)
        pc.vm.irq_line(GSI, 1)
        pc.vm.set_gsi_routing([to_ioapic(50, PIN)])
        irr = pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr
        equal(irr, 1 << PIN, "IOAPIC's irr")
        pc.vm.irq_line(50, 0)
        equal(pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr, 0, "irr after 50 fell")


def entry_of(
    gsi: int, type_: int, irqchip: int = 0, pin: int = 0, flags: int = 0
) -> kvm_irq_routing_entry:
    """Any entry, also a wrong one."""
    entry = kvm_irq_routing_entry(gsi=gsi, type=type_, flags=flags)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = irqchip, pin
    return entry


PINS = KVM_IRQ_ROUTING_IRQCHIP


@variants(
    "A table with {0} is refused with EINVAL, and the old one stays (api.rst 4.52; "
    "kvm_set_irq_routing).",
    {
        "gsi-4096": ("GSI 4096", lambda: [to_pic(4096, 1)]),
        "ioapic-pin-24": ("pin 24 of the IOAPIC", lambda: [to_ioapic(1, 24)]),
        "pic-pin-8": ("pin 8 of a PIC", lambda: [entry_of(1, PINS, 0, 8)]),
        "chip-3": ("a fourth chip", lambda: [entry_of(1, PINS, 3)]),
        "type-0": ("an entry of type 0", lambda: [entry_of(1, 0)]),
        "entry-flags": ("flags on a pin", lambda: [entry_of(1, PINS, flags=1)]),
        "chip-twice": ("one GSI to two pins of a chip", lambda: [to_pic(1, 1), to_pic(1, 2)]),
        "message-and-pin": (
            "a GSI to a message and a pin",
            lambda: [to_msi(1, 0x45), to_pic(1, 1)],
        ),
        "two-messages": ("a GSI to two messages", lambda: [to_msi(1, 0x45), to_msi(1, 0x46)]),
        "last-one-wrong": ("a wrong last entry", lambda: [to_pic(1, 1), to_ioapic(2, 24)]),
    },
)
def refused_table(
    bench: Bench, what: str, table: Callable[[], list[kvm_irq_routing_entry]]
) -> None:
    with bench.pc() as pc:
        pc.vm.set_gsi_routing([to_pic(1, 3)])
        equal(errno_of(pc.vm.set_gsi_routing, table()), "EINVAL", "KVM_SET_GSI_ROUTING")
        pc.vm.irq_line(1, 1)
        equal(pc.pic()["irr"], 1 << 3, "the PIC's IRR, by the old table")


@case("Flags of the table must be 0 (api.rst 4.52).")
def table_flags(bench: Bench) -> None:
    with bench.pc() as pc:
        equal(errno_of(pc.vm.set_gsi_routing, [], 1), "EINVAL", "flags 1")


@case("The highest GSI a table may use is KVM_CAP_IRQ_ROUTING less 1 (api.rst 4.52).")
def highest_gsi(bench: Bench) -> None:
    with bench.pc() as pc:
        highest = pc.vm.check_extension(KVM_CAP_IRQ_ROUTING) - 1
        pc.vm.set_gsi_routing([to_pic(highest, 3)])
        equal(pc.vm.irq_line_status(highest, 1), 1, f"KVM_IRQ_LINE_STATUS of GSI {highest}")


# What a message says.


def to_three(bench: Bench, address: int, data: int) -> list[set[int]]:
    """Send a message to three vCPUs, with logical ids 1, 2, 4; what each has requested."""
    with bench.pc(vcpus=3) as pc:
        for vcpu_id in range(3):
            pc.set_lapic({SVR: ENABLED, DFR: 0xFFFF_FFFF, LDR: 1 << 24 + vcpu_id}, vcpu_id)
        pc.vm.signal_msi(address, data)
        return [pc.irr(vcpu_id) for vcpu_id in range(3)]


@variants(
    "A message's destination, bits 12 to 19 of the address, {0}: {1} (SDM 12.11.1).",
    {
        "physical": ("physical 2", "vCPU 2", 2 << DEST_SHIFT, (0, 0, 1)),
        "physical-broadcast": ("physical 0xff", "all", 0xFF << DEST_SHIFT, (1, 1, 1)),
        "logical-one": ("logical 2", "vCPU 1", LOGICAL | 2 << DEST_SHIFT, (0, 1, 0)),
        "logical-two": ("logical 5", "vCPUs 0 and 2", LOGICAL | 5 << DEST_SHIFT, (1, 0, 1)),
        "logical-nobody": ("logical 8", "nobody", LOGICAL | 8 << DEST_SHIFT, (0, 0, 0)),
    },
)
def message_destination(
    bench: Bench, what: str, whom: str, address: int, who: tuple[int, ...]
) -> None:
    got = to_three(bench, MSI_ADDRESS | address, VECTOR)
    equal(got, [{VECTOR} if it else set() for it in who], "requests of three vCPUs")


@variants(
    "{0} a message for several reaches one of them (SDM 12.11.1, 12.11.2).",
    {
        "redirection-hint": ("With the redirection hint", REDIRECTION_HINT, 0),
        "lowest-priority": ("With lowest priority", 0, 0x100),
    },
)
def message_to_one_of(bench: Bench, what: str, address: int, data: int) -> None:
    got = to_three(bench, MSI_ADDRESS | LOGICAL | 7 << DEST_SHIFT | address, data | VECTOR)
    check(sorted(map(len, got)) == [0, 0, 1], "requests of three vCPUs", "one of them", got)


@variants(
    "Bit 15 of a message's data is its trigger mode: {0} (SDM 12.11.2).",
    {
        "edge": ("clear, edge, TMR stays 0", 0, set()),
        "level": ("set, level, TMR is set", LEVEL_TRIGGERED | ASSERT, {VECTOR}),
        "level-deassert": (
            "KVM takes a level message without assert for one with (kvm_set_msi_irq)",
            LEVEL_TRIGGERED,
            {VECTOR},
        ),
    },
)
def message_trigger_mode(bench: Bench, what: str, data: int, tmr: set[int]) -> None:
    with bench.pc() as pc:
        one_message(pc, data | VECTOR)
        pc.pulse(GSI)
        equal((pc.irr(), pc.vectors(TMR)), ({VECTOR}, tmr), "IRR, TMR")


@variants(
    "A message of delivery mode {0} to vCPU 1 answers {2}: {1} (SDM 12.11.2; __apic_accept_irq).",
    {
        "fixed": (0, "its vector is requested", 1, {VECTOR}, 0, KVM_MP_STATE_UNINITIALIZED),
        "lowest-priority": (
            1,
            "its vector is requested",
            1,
            {VECTOR},
            0,
            KVM_MP_STATE_UNINITIALIZED,
        ),
        "smi": (2, "no interrupt", 0, set(), 0, KVM_MP_STATE_UNINITIALIZED),
        "nmi": (4, "an NMI is pending", 1, set(), 1, KVM_MP_STATE_UNINITIALIZED),
        "init": (5, "it waits for SIPI", 1, set(), 0, KVM_MP_STATE_INIT_RECEIVED),
        "extint": (7, "nothing, KVM has it by LVT0", 0, set(), 0, KVM_MP_STATE_UNINITIALIZED),
    },
)
def message_of_mode(
    bench: Bench, mode: int, does: str, taken: int, requests: set[int], nmis: int, mp_state: int
) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        got = pc.vm.signal_msi(MSI_ADDRESS | 1 << DEST_SHIFT, mode << 8 | VECTOR)
        equal(got, taken, "KVM_SIGNAL_MSI")
        vcpu = pc.vcpus[1]
        equal(pc.irr(1), requests, "IRR")
        equal(vcpu.get_vcpu_events().nmi.pending, nmis, "pending NMIs")
        equal(vcpu.get_mp_state(), mp_state, "MP state")


# KVM_SIGNAL_MSI.


@variants(
    "KVM_SIGNAL_MSI to {0} answers {3}: how many took it (api.rst 4.71).",
    {
        "one": ("an enabled local APIC", MSI_ADDRESS, VECTOR, 1),
        "all": ("all of two", MSI_ADDRESS | 0xFF << DEST_SHIFT, VECTOR, 2),
        "nobody": ("an id nobody has", MSI_ADDRESS | ABSENT << DEST_SHIFT, VECTOR, 0),
        "illegal-vector": ("one, with vector 15, which is never delivered", MSI_ADDRESS, 15, 1),
        "address-0": ("address 0, for KVM does not look at 0xfee", 0, VECTOR, 1),
        "high-address": (
            "bits above 32 without 32-bit ids, which are ignored",
            0x105 << 32 | MSI_ADDRESS,
            VECTOR,
            1,
        ),
    },
)
def signal_msi(bench: Bench, whom: str, address: int, data: int, expected: int) -> None:
    with bench.pc(vcpus=2) as pc:
        for vcpu_id in (0, 1):
            pc.enable_lapic(vcpu_id)
        equal(pc.vm.signal_msi(address, data), expected, "KVM_SIGNAL_MSI")


@case("A message whose vector is requested already is taken again, as one (SDM 12.8.4).")
def signal_msi_twice(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        got = [pc.vm.signal_msi(MSI_ADDRESS, VECTOR) for _ in range(2)]
        equal((got, pc.irr()), ([1, 1], {VECTOR}), "KVM_SIGNAL_MSI twice, IRR")


@variants(
    "KVM_SIGNAL_MSI with flags {0} {1} (api.rst 4.71).",
    {
        "devid": (KVM_MSI_VALID_DEVID, "takes the device id, which means nothing here", 0),
        "unknown": (2, "is refused", "EINVAL"),
    },
)
def signal_msi_flags(bench: Bench, flags: int, does: str, expected: object) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        got = errno_of(pc.vm.signal_msi, MSI_ADDRESS, VECTOR, flags)
        equal(got, expected, "error of KVM_SIGNAL_MSI")


@case("Without a vCPU KVM_SIGNAL_MSI finds no local APIC: EPERM (kvm_send_userspace_msi: -1).")
def signal_msi_without_vcpu(bench: Bench) -> None:
    with bench.pc(vcpus=0) as pc:
        got = errno_of(pc.vm.signal_msi, MSI_ADDRESS, VECTOR)
        equal(got, "EPERM", "error of KVM_SIGNAL_MSI")


@variants(
    "With 32-bit ids the high address has bits 8 to 31 of the destination: {0} {1} (api.rst 7.7; "
    "kvm_msi_route_invalid).",
    {
        "low-byte": ("its low byte", "must be 0", 1 << 32, "EINVAL"),
        "id-0x100": ("0x100", "is an id that nobody has here", 0x100 << 32, 0),
    },
)
def with_32_bit_ids(bench: Bench, what: str, does: str, high: int, expected: object) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        pc.vm.enable_cap(KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS)
        taken: list[int] = []
        got = errno_of(lambda: taken.append(pc.vm.signal_msi(high | MSI_ADDRESS, VECTOR)))
        equal((got, taken), (expected, [] if expected else [0]), "error, KVM_SIGNAL_MSI")
        got = errno_of(pc.vm.set_gsi_routing, [to_msi(1, VECTOR, high | MSI_ADDRESS)])
        equal(got, expected, "error of KVM_SET_GSI_ROUTING")


# The split irqchip (KVM_CAP_SPLIT_IRQCHIP): user space has PICs and IOAPIC, KVM the local APICs.

RESERVED_PINS = 24


@case("With a split irqchip a table may hold messages only (api.rst 7.5).")
def split_takes_messages_only(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, RESERVED_PINS)
        got = [
            errno_of(vm.set_gsi_routing, [entry])
            for entry in (to_pic(1, 1), to_ioapic(1, 1), to_msi(1, VECTOR))
        ]
        equal(got, ["EINVAL", "EINVAL", 0], "errors of a PIC's pin, an IOAPIC's, a message")


@case("With a split irqchip there are no chips to read: ENXIO (api.rst 4.26, 7.5).")
def split_has_no_chips(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, RESERVED_PINS)
        got = [errno_of(vm.get_irqchip, chip_id) for chip_id in range(3)]
        equal(got, ["ENXIO"] * 3, "errors of KVM_GET_IRQCHIP")


@case(
    "With a split irqchip no GSI leads anywhere before there is a table (kvm_setup_empty_irq_"
    "routing)."
)
def split_starts_with_an_empty_table(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, RESERVED_PINS)
        vm.create_vcpu(0)
        equal([vm.irq_line_status(gsi, 1) for gsi in range(25)], [-1] * 25, "KVM_IRQ_LINE_STATUS")


@case("With a split irqchip a GSI's rise sends its message (api.rst 7.5; kvm_set_msi).")
def split_sends_messages(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, RESERVED_PINS)
        pc = Pc(bench, vm, [vm.create_vcpu(0)])
        one_message(pc, VECTOR)
        equal((statuses(pc, 1, 0), pc.irr()), ((1, -1), {VECTOR}), "status, IRR")


def ended(bench: Bench, gsi: int, trigger: int) -> list[int]:
    """Which vectors user space is told of (KVM_EXIT_IOAPIC_EOI) when the guest ends `VECTOR`."""
    told: list[int] = []
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, RESERVED_PINS)
        pc = Pc(bench, vm, [vm.create_vcpu(0)])
        vm.set_gsi_routing([to_msi(gsi, trigger | VECTOR)])
        bits = 1 << VECTOR % 32
        pc.set_lapic({SVR: ENABLED, ISR + 0x20: bits, TMR + 0x20: bits if trigger else 0})
        script: Script = (unreal(), lapic_write(EOI, 0), *WINDOWS, end(0))
        vm.load(Scenario("split", "", script).guest(pc.tsc_khz))
        run = vm.run(limit_s=LIMIT_S, on_ioapic_eoi=told.append)
        equal(run.exit.reason, "done", "end of the guest")
    return told


@variants(
    "With a split irqchip user space is told the end of {0}: {1} (api.rst 7.5; "
    "kvm_scan_ioapic_routes).",
    {
        "level": (
            "a level message of a reserved GSI",
            "yes",
            5,
            LEVEL_TRIGGERED | ASSERT,
            [VECTOR],
        ),
        "edge": ("an edge message", "no", 5, 0, []),
        "gsi-beyond": (
            "a level message of a GSI that is not reserved",
            "no",
            RESERVED_PINS,
            LEVEL_TRIGGERED | ASSERT,
            [],
        ),
    },
)
def split_eoi(
    bench: Bench, what: str, whether: str, gsi: int, trigger: int, expected: list[int]
) -> None:
    equal(ended(bench, gsi, trigger), expected, "vectors of KVM_EXIT_IOAPIC_EOI")
