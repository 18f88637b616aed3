"""What KVM_IRQ_LINE_STATUS says: > 0 taken, 0 coalesced, < 0 masked or nobody (kvm_set_irq).

No vCPU runs, so nothing is acknowledged: what the first call of a sequence did is still there at
the next.
"""

from collections.abc import Callable

from kvmtick.conform.bench import (
    DEST_ID_SHIFT,
    LEVEL,
    MASKED,
    MSI_ADDRESS,
    NMI,
    Bench,
    Pc,
    to_ioapic,
    to_msi,
    to_pic,
)
from kvmtick.conform.case import case, equal, variants

LEVELS = (1, 1, 0, 1, 0, 0)
GSI = 5
PIN = 7
VECTOR = 0x45
ABSENT = 5
"""A destination nobody has."""

Prepare = Callable[[Pc], None]


def to_the_pic(irq: int, **registers: int) -> Prepare:
    """The GSI leads to a PIC's pin alone."""

    def prepare(pc: Pc) -> None:
        pc.vm.set_gsi_routing([to_pic(GSI, irq)])
        if registers:
            pc.pic(irq // 8, **registers)

    return prepare


def to_the_ioapic(entry: int, *, enabled: bool = True) -> Prepare:
    """The GSI leads to an IOAPIC pin alone; `enabled`: the local APIC is."""

    def prepare(pc: Pc) -> None:
        pc.vm.set_gsi_routing([to_ioapic(GSI, PIN)])
        if enabled:
            pc.enable_lapic()
        pc.set_pin(PIN, entry)

    return prepare


def to_a_message(data: int, address: int = MSI_ADDRESS) -> Prepare:
    """The GSI is a message."""

    def prepare(pc: Pc) -> None:
        pc.vm.set_gsi_routing([to_msi(GSI, data, address)])
        pc.enable_lapic()

    return prepare


PIC_EDGE, PIC_MASKED, PIC_LEVEL = (1, 1, 1, 0, 1, 1), (-1,) * 6, (1, 0, 1, 1, 1, 1)
IOAPIC_NOBODY = (0, 0, 1, 0, 1, 1)


@variants(
    "Levels 1 1 0 1 0 0 on an edge triggered, unmasked pin of the PIC's {0} give 1 1 1 0 1 1: an"
    " edge while the request is still there is coalesced (pic_set_irq1).",
    {"master": ("master", 3), "slave": ("slave", 11)},
)
def pic_edge(bench: Bench, chip: str, irq: int) -> None:
    sequence(bench, to_the_pic(irq), PIC_EDGE)


@variants(
    "A pin of the PIC's {0} that is masked, {1} triggered, gives -1 whatever the level"
    " (pic_set_irq1).",
    {
        "edge-master": ("master", "edge", 3, 0),
        "edge-slave": ("slave", "edge", 11, 0),
        "level-master": ("master", "level", 3, 8),
        "level-slave": ("slave", "level", 11, 8),
    },
)
def pic_masked(bench: Bench, chip: str, trigger: str, irq: int, elcr: int) -> None:
    sequence(bench, to_the_pic(irq, imr=0xFF, elcr=elcr), PIC_MASKED)


@variants(
    "Levels 1 1 0 1 0 0 on a level triggered pin of the PIC's {0} give 1 0 1 1 1 1: up while up is"
    " coalesced (pic_set_irq1).",
    {"master": ("master", 3), "slave": ("slave", 11)},
)
def pic_level(bench: Bench, chip: str, irq: int) -> None:
    sequence(bench, to_the_pic(irq, elcr=1 << 3), PIC_LEVEL)


@variants(
    "Levels 1 1 0 1 0 0 on an IOAPIC pin, {0}, give {1}: {2} (ioapic_set_irq, ioapic_service).",
    {
        "edge": (
            *("edge triggered", (1, 0, 1, 1, 1, 1)),
            *("up while up is coalesced, and an edge counts even if IRR has the vector", VECTOR),
        ),
        "edge-masked": (
            *("edge triggered and masked", (-1, 0, 1, -1, 1, 1)),
            *("an edge is lost", VECTOR | MASKED),
        ),
        "level": (
            *("level triggered", (1, -1, 1, -1, 1, 1)),
            *("Remote IRR refuses all until EOI", VECTOR | LEVEL),
        ),
        "level-masked": (
            *("level triggered and masked", (-1, -1, 1, -1, 1, 1)),
            *("a mask gives -1", VECTOR | LEVEL | MASKED),
        ),
        "absent-destination": (
            *("edge triggered to nobody", IOAPIC_NOBODY),
            *("nobody took the message", VECTOR | ABSENT << DEST_ID_SHIFT),
        ),
        "nmi": (
            *("with NMI delivery", (1, 0, 1, 1, 1, 1)),
            *("an NMI is always taken", NMI),
        ),
    },
)
def ioapic(bench: Bench, pin: str, expected: tuple[int, ...], why: str, entry: int) -> None:
    sequence(bench, to_the_ioapic(entry), expected)


@case(
    "An IOAPIC edge to a local APIC that is disabled by software gives 0: it takes no message"
    " (SDM 12.4.7.2; __apic_accept_irq)."
)
def ioapic_to_a_disabled_lapic(bench: Bench) -> None:
    sequence(bench, to_the_ioapic(VECTOR, enabled=False), IOAPIC_NOBODY)


@variants(
    "A GSI that is a message gives {1} at each level 1 and -1 at 0: a message has no line{2}"
    " (kvm_set_msi).",
    {
        "to-vcpu0": (MSI_ADDRESS, 1, ""),
        "absent-destination": (MSI_ADDRESS | ABSENT << 12, 0, "; nobody took it"),
    },
)
def msi(bench: Bench, address: int, taken: int, why: str) -> None:
    expected = (taken, taken, -1, taken, -1, -1)
    sequence(bench, to_a_message(VECTOR, address), expected)


def sequence(bench: Bench, prepare: Prepare, expected: tuple[int, ...]) -> None:
    """Drive the GSI to LEVELS."""
    with bench.pc() as pc:
        prepare(pc)
        got = tuple(pc.vm.irq_line_status(GSI, level) for level in LEVELS)
        equal(got, expected, f"status at levels {' '.join(map(str, LEVELS))}")


# --- what the values stand for --------------------------------------------------------------------


@case("A coalesced PIC edge leaves the one request there was (pic_set_irq1).")
def coalesced_edge_is_one_request(bench: Bench) -> None:
    with bench.pc() as pc:
        to_the_pic(3)(pc)
        equal([pc.vm.irq_line_status(GSI, level) for level in (1, 0, 1)], [1, 1, 0], "status")
        equal(pc.pic()["irr"], 1 << 3, "IRR")


@case("The edge that counts as taken while IRR has the vector is one request too (apic_set_irr).")
def lapic_merges_requests(bench: Bench) -> None:
    with bench.pc() as pc:
        to_the_ioapic(VECTOR)(pc)
        for _ in range(3):
            equal(pc.vm.irq_line_status(GSI, 1), 1, "status of an edge")
            equal(pc.irr(), {VECTOR}, "vectors in IRR")
            pc.vm.irq_line(GSI, 0)


@case("NMI delivery makes an NMI pending for every edge, and two wait at most (apic_set_nmi).")
def nmi_delivery_is_pending(bench: Bench) -> None:
    with bench.pc() as pc:
        to_the_ioapic(NMI)(pc)
        pc.pulse(GSI)
        equal(pc.vcpus[0].get_vcpu_events().nmi.pending, 1, "NMIs pending after one pulse")


# --- several chips --------------------------------------------------------------------------------


@case(
    "A GSI on two chips gives the sum, and a chip that says -1 counts as nothing beside one that"
    " does not (kvm_set_irq)."
)
def masked_chip_counts_as_nothing(bench: Bench) -> None:
    with bench.pc() as pc:
        got = [pc.vm.irq_line_status(3, level) for level in (1, 1, 0, 1, 0)]
        equal(got, [1, 1, 2, 0, 2], "status: PIC unmasked, IOAPIC masked, levels 1 1 0 1 0")


@case("With both chips unmasked the results of PIC and IOAPIC add up (kvm_set_irq).")
def results_add_up(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        pc.set_pin(3, VECTOR)
        got = [pc.vm.irq_line_status(3, level) for level in LEVELS]
        equal(got, [2, 1, 2, 1, 2, 2], "status at levels 1 1 0 1 0 0")


@case("-1 comes only where every chip says so (kvm_set_irq).")
def only_masked_chips(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(imr=0xFF)
        equal(pc.vm.irq_line_status(3, 1), -1, "status with both chips masked")


# --- GSIs without a PIC pin -----------------------------------------------------------------------


@variants(
    "GSI {0} has by default {2} (kvm_setup_default_irq_routing); the ioctl succeeds all the same.",
    {
        f"gsi-{gsi:x}": (gsi, status, what)
        for gsis, status, what in (
            ((16, 23), (-1, 1), "an IOAPIC pin alone, which is masked"),
            ((24, 4095, 4096, 0xFFFF_FFFF), (-1, -1), "no route"),
        )
        for gsi in gsis
    },
)
def default_gsi(bench: Bench, gsi: int, status: tuple[int, int], what: str) -> None:
    with bench.pc() as pc:
        got = (pc.vm.irq_line_status(gsi, 1), pc.vm.irq_line_status(gsi, 0))
        equal(got, status, "status at levels 1 0")


@case(
    "GSI n leads to pin n of the IOAPIC and of the PICs, GSI 0 as well: to pin 0, not pin 2"
    " (kvm_setup_default_irq_routing)."
)
def default_routing(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        for pin in range(24):
            pc.set_pin(pin, 0x40 + pin)
        for gsi in range(24):
            before = pc.irr()
            pc.vm.irq_line(gsi, 1)
            equal(pc.irr() - before, {0x40 + gsi}, f"vectors by GSI {gsi}")
            # pin 2 of the master is also the slave's
            irr = pc.pic(1)["irr"] << 8 | pc.pic()["irr"] & ~4 | (gsi >= 2) << 2
            equal(irr, (2 << min(gsi, 15)) - 1, f"IRR of the PICs after GSIs 0 to {gsi}")
            pc.vm.irq_line(gsi, 0)


@case("An empty routing table leads nowhere (api.rst, KVM_SET_GSI_ROUTING replaces the table).")
def empty_table(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.set_gsi_routing([])
        got = {pc.vm.irq_line_status(gsi, 1) for gsi in range(25)}
        equal(got, {-1}, "status of GSIs 0 to 24")
        equal(pc.pic()["irr"], 0, "IRR of the master")


@case(
    "Two GSIs of one source drive a pin together: the last call decides, for the level of a pin is"
    " kept by source, not by GSI (__kvm_irq_line_state)."
)
def two_gsis_on_a_pin(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.set_gsi_routing([to_pic(1, 3), to_pic(2, 3)])
        pc.pic(elcr=1 << 3)
        for gsi, level, irr in ((1, 1, 8), (2, 1, 8), (1, 0, 0), (2, 1, 8), (2, 0, 0)):
            pc.vm.irq_line(gsi, level)
            equal(pc.pic()["irr"], irr, f"IRR after GSI {gsi} went to {level}")
