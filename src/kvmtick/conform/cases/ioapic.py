"""The IOAPIC: its registers, edges and levels, Remote IRR, delivery (82093AA datasheet, order
290566; arch/x86/kvm/ioapic.c).

Where an interrupt in service matters, IF is 0 and KVM_SET_LAPIC takes the vector into service: that
looks the same on a host whose KVM writes EOI when it injects.
"""

from kvmtick.abi.structs import (
    KVM_IRQCHIP_IOAPIC,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
)
from kvmtick.conform.apics import (
    GSI,
    ON,
    PIN,
    QUADWORD,
    REDTBL_HIGH,
    REDTBL_LOW,
    VECTOR,
    level_interrupt_in_service,
    load,
    only_the_ioapic,
    run_quadwords,
    store,
    store_byte,
)
from kvmtick.conform.bench import (
    DEST_ID_SHIFT,
    EOI,
    IRR,
    LDR,
    LEVEL,
    MASKED,
    NMI,
    POLARITY_LOW,
    PORT_ACT,
    READ_AT,
    REMOTE_IRR,
    TMR,
    WINDOWS,
    Bench,
    Pc,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests.script import (
    IOAPIC,
    Op,
    apic_eoi_off,
    apic_eoi_on,
    cli,
    ioapic_read,
    ioapic_write,
    lapic_write,
    mmio_read,
    mmio_write,
    out8,
    snap_vector,
    sti,
    tsc_read,
    unreal,
    wait_vector,
)

ID, VERSION, ARBITRATION = range(3)
"""What IOREGSEL selects, below the redirection entries."""
PINS = 24
IOREGSEL, IOWIN = IOAPIC, IOAPIC + 0x10
LOGICAL, LOWEST = 1 << 11, 0x100
ONES = 0xFFFF_FFFF
TO_VCPU_1 = 1 << DEST_ID_SHIFT
TO_ALL = 0xFF << DEST_ID_SHIFT
LEVEL_ENTRY = VECTOR | LEVEL


def read(bench: Bench, *accesses: tuple[Op, ...], count: int = 1) -> tuple[int, ...]:
    """The first results of a script of IOAPIC accesses."""
    with bench.pc() as pc:
        return pc.run(unreal(), *accesses).results[:count]


def state(pc: Pc) -> list[int]:
    """All redirection entries."""
    return [pc.pin(pin) for pin in range(PINS)]


# Registers.


@case("IOAPICVER reads 0x170011: 24 entries, version 0x11 (82093AA 3.2.2; ioapic_read_indirect).")
def version(bench: Bench) -> None:
    equal(read(bench, ioapic_read(VERSION, 0)), (0x17_0011,), "IOAPICVER")


@case("After reset every redirection entry is masked and otherwise 0 (82093AA 3.2.4).")
def entries_are_masked_after_reset(bench: Bench) -> None:
    reads = tuple(ioapic_read(0x10 + n, n) for n in range(2 * PINS))
    equal(read(bench, *reads, count=2 * PINS), (MASKED, 0) * PINS, "low and high halves")


@case("IOAPICID has four bits, 24 to 27, and takes what is written (82093AA 3.2.1).")
def id_has_four_writable_bits(bench: Bench) -> None:
    got = read(
        *(bench, ioapic_read(ID, 0), ioapic_write(ID, 0x0500_0000), ioapic_read(ID, 1)),
        *(ioapic_write(ID, ONES), ioapic_read(ID, 2)),
        count=3,
    )
    equal(got, (0, 0x0500_0000, 0x0F00_0000), "IOAPICID: after reset, after 5, after ones")


@case("IOAPICARB reads as the ID and cannot be written (82093AA 3.2.3; ioapic_read_indirect).")
def arbitration_id_is_the_id(bench: Bench) -> None:
    got = read(
        *(bench, ioapic_write(ID, 0x0500_0000), ioapic_write(ARBITRATION, 0x0300_0000)),
        *(ioapic_read(ARBITRATION, 0), ioapic_read(ID, 1)),
        count=2,
    )
    equal(got, (0x0500_0000, 0x0500_0000), "IOAPICARB, IOAPICID")


@case("Delivery status and Remote IRR are read-only to the guest (82093AA 3.2.4, bits 12 and 14).")
def status_bits_are_read_only(bench: Bench) -> None:
    got = read(bench, ioapic_write(REDTBL_LOW, ONES), ioapic_read(REDTBL_LOW, 0))
    equal(got, (0xFFFF_AFFF,), "low half after ones")


@case(
    "Reserved bits of a redirection entry are kept and read back: KVM stores all 64 bits "
    "(ioapic_write_indirect)."
)
def reserved_bits_of_an_entry_are_kept(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.run(
            unreal(), ioapic_write(REDTBL_LOW, 0xFFFF_0045), ioapic_write(REDTBL_HIGH, 0x5A_1234)
        )
        equal(pc.pin(PIN), 0x5A_1234_FFFF_0045, "redirection entry")


@case("The version register is read-only (82093AA 3.2.2).")
def version_is_read_only(bench: Bench) -> None:
    got = read(bench, ioapic_write(VERSION, 0), ioapic_read(VERSION, 0))
    equal(got, (0x17_0011,), "IOAPICVER after writing 0")


@variants(
    "Register {0:#x} does not exist: it reads all ones and a write changes no entry "
    "(ioapic_read_indirect, ioapic_write_indirect: beyond 24 entries).",
    {f"{register:#x}": (register,) for register in (0x40, 0x41, 0x80, 0xFF)},
)
def beyond_the_last_entry(bench: Bench, register: int) -> None:
    with bench.pc() as pc:
        got = pc.run(unreal(), ioapic_write(register, 0), ioapic_read(register, 0))
        equal(got.results[0], ONES, f"register {register:#x}")
        equal(state(pc), [MASKED] * PINS, "redirection entries")


@case("Registers 3 to 15 do not exist and read all ones (82093AA 3.2; ioapic_read_indirect).")
def below_the_first_entry(bench: Bench) -> None:
    reads = tuple(ioapic_read(register, register - 3) for register in range(3, 16))
    equal(read(bench, *reads, count=13), (ONES,) * 13, "registers 3 to 15")


@case("IOREGSEL keeps 8 bits and reads them back (82093AA 3.1.1; ioapic_mmio_write).")
def index_register_has_8_bits(bench: Bench) -> None:
    got = read(
        bench,
        mmio_write(IOREGSEL, 0x1234_5601),
        mmio_read(IOREGSEL, 0),
        mmio_read(IOWIN, 1),
        count=2,
    )
    equal(got, (0x01, 0x17_0011), "IOREGSEL, IOWIN")


# Access sizes. Hardware asks for 32 bits; KVM answers more.


@variants(
    "A read of {0} bytes gives the low part of the register (ioapic_mmio_read).",
    {"1-byte": (1, 0x11), "2-bytes": (2, 0x0011), "4-bytes": (4, 0x17_0011)},
)
def window_read_of(bench: Bench, size_bytes: int, expected: int) -> None:
    got = read(bench, ioapic_write(VERSION, 0), mmio_read(IOWIN, 0, size_bytes))
    equal(got, (expected,), f"{size_bytes} bytes of IOAPICVER")


@variants(
    "A write of {0} bytes to IOWIN is one of 32 bits with the rest 0 (ioapic_mmio_write).",
    {"1-byte": (1, 0x31), "2-bytes": (2, 0x8A31), "4-bytes": (4, 0x1_8A31)},
)
def window_write_of(bench: Bench, size_bytes: int, expected: int) -> None:
    with bench.pc() as pc:
        pc.run(unreal(), mmio_write(IOREGSEL, 0x12), mmio_write(IOWIN, 0x1_8A31, size_bytes))
        equal(pc.pin(1), expected, "entry 1, which was 0x10000")


@variants(
    "A write of {0} bytes to IOREGSEL takes the low byte (ioapic_mmio_write).",
    {"1-byte": (1,), "2-bytes": (2,)},
)
def index_write_of(bench: Bench, size_bytes: int) -> None:
    got = read(bench, mmio_write(IOREGSEL, 0x5501, size_bytes), mmio_read(IOWIN, 0))
    equal(got, (0x17_0011,), "IOWIN")


@case(
    "Between IOREGSEL, IOWIN and the end of its 256 bytes the IOAPIC reads 0, bytes within a "
    "register too, and swallows writes (ioapic_mmio_read, ioapic_mmio_write)."
)
def gaps_read_0(bench: Bench) -> None:
    offsets = (0x04, 0x08, 0x0C, 0x14, 0x20, 0x40, 0xFC)
    odd = (0x01, 0x03, 0x0F, 0x11, 0x13, 0xFF)
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), ioapic_write(VERSION, 0)),
            *(mmio_write(IOAPIC + offset, 0x10) for offset in offsets),
            *(mmio_read(IOAPIC + offset, n) for n, offset in enumerate(offsets)),
            *(mmio_read(IOAPIC + offset, 10 + n, 1) for n, offset in enumerate(odd)),
            mmio_read(IOWIN, 20),
        )
        equal(got.results[: len(offsets)], (0,) * len(offsets), "dwords in the gaps")
        equal(got.results[10 : 10 + len(odd)], (0,) * len(odd), "bytes in the gaps")
        equal(got.results[20], 0x17_0011, "IOWIN after the writes")
        equal(state(pc), [MASKED] * PINS, "redirection entries")


@case(
    "An access that begins in the IOAPIC's 256 bytes and ends beyond is nobody's and reads all "
    "ones (ioapic_in_range; KVM_EXIT_MMIO)."
)
def access_over_the_end_is_not_its(bench: Bench) -> None:
    got = read(
        bench,
        mmio_read(IOAPIC + 0xFE, 0),
        mmio_read(IOAPIC + 0xFF, 1, 2),
        mmio_read(IOAPIC + 0x100, 2),
        mmio_read(IOAPIC + 0xFFC, 3),
        count=4,
    )
    equal(got, (ONES, 0xFFFF, ONES, ONES), "reads at 0xfe, 0xff, 0x100, 0xffc")


@case(
    "An unaligned read over IOWIN's first byte is one access between registers: 0 "
    "(ioapic_mmio_read decodes the first address only)."
)
def unaligned_read_is_one_access(bench: Bench) -> None:
    got = read(
        bench,
        ioapic_write(VERSION, 0),
        mmio_read(IOAPIC + 0x0F, 0, 2),
        mmio_read(IOWIN + 1, 1),
        count=2,
    )
    equal(got, (0, 0), "2 bytes at 0x0f, 4 bytes at 0x11")


@case("A read of 8 bytes gives the register and 0 above it (ioapic_mmio_read).")
def quadword_read(bench: Bench) -> None:
    with bench.pc() as pc:
        got = run_quadwords(pc, store_byte(IOREGSEL, VERSION) + load(IOWIN) + store(READ_AT))
        equal(got, (0x17_0011).to_bytes(8, "little"), "8 bytes at IOWIN")


@case("Of a write of 8 bytes the low 4 count (ioapic_mmio_write).")
def quadword_write(bench: Bench) -> None:
    with bench.pc() as pc:
        run_quadwords(pc, store_byte(IOREGSEL, 0x10) + store(IOWIN))
        equal(pc.pin(0), int.from_bytes(QUADWORD[:4], "little") & ~0x5000, "entry 0")


@case(
    "All ones written to all of the IOAPIC's 256 bytes change the index and nothing else: there is "
    "no register 0xff (ioapic_mmio_write)."
)
def ones_everywhere(bench: Bench) -> None:
    with bench.pc() as pc:
        writes = (mmio_write(IOAPIC + offset, ONES) for offset in range(0, 0x100, 4))
        got = pc.run(unreal(), *writes, mmio_read(IOREGSEL, 0))
        equal(got.results[0], 0xFF, "IOREGSEL")
        equal(state(pc), [MASKED] * PINS, "redirection entries")


# Edges.


@variants(
    "An edge that comes while the pin is masked is lost: {0}, then unmasked, gives no interrupt "
    "(82093AA 3.2.4, bit 16; ioapic_service).",
    {"pulse": ("a pulse", 0), "line-stays-high": ("a line that stays high", 1)},
)
def masked_edge_is_lost(bench: Bench, what: str, level: int) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR | MASKED)
        pc.vm.irq_line(GSI, 1)
        pc.vm.irq_line(GSI, level)
        pc.run(unreal(), ioapic_write(REDTBL_LOW, VECTOR))
        equal(pc.irr(), set(), f"requests after {what} and the unmask")
        pc.vm.irq_line(GSI, 0)
        pc.vm.irq_line(GSI, 1)
        equal(pc.irr(), {VECTOR}, "requests after the next edge")


@case("An edge is sent once however long the line stays high (82093AA 3.2.4, bit 15).")
def edge_is_sent_once(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, ioapic_write(REDTBL_LOW, VECTOR), sti(), out8(PORT_ACT, 0), *WINDOWS),
            *(out8(PORT_ACT, 0), *WINDOWS, snap_vector(VECTOR, 0)),
            acts=[lambda: pc.vm.irq_line(GSI, 1)],
        )
        equal(got.results[0], 1, "interrupts of a line that was raised twice")


def fall_and_rise(pc: Pc) -> None:
    """GSI, which is high, down and up."""
    pc.vm.irq_line(GSI, 0)
    pc.vm.irq_line(GSI, 1)


@case("The line must fall before it can make another edge (82093AA 3.2.4; ioapic_set_irq).")
def second_edge_needs_a_fall(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, ioapic_write(REDTBL_LOW, VECTOR), sti(), out8(PORT_ACT, 0), *WINDOWS),
            *(out8(PORT_ACT + 1, 0), *WINDOWS, snap_vector(VECTOR, 0)),
            acts=[lambda: pc.vm.irq_line(GSI, 1), lambda: fall_and_rise(pc)],
        )
        equal(got.results[0], 2, "interrupts of two edges")


def pulse(pc: Pc, times: int) -> None:
    """Several pulses of GSI."""
    for _ in range(times):
        pc.pulse(GSI)


@case(
    "Edges that find their vector still requested in the local APIC are one interrupt (SDM vol. 3A "
    "12.8.4: IRR has one bit a vector)."
)
def edges_before_the_first_is_taken_are_one(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, ioapic_write(REDTBL_LOW, VECTOR), out8(PORT_ACT, 0), sti(), *WINDOWS),
            snap_vector(VECTOR, 0),
            acts=[lambda: pulse(pc, 3)],
        )
        equal(got.results[0], 1, "interrupts of three pulses with IF=0")


# Levels.


@case("A level line that is high when its pin is unmasked interrupts then (82093AA 3.2.4).")
def level_high_at_the_unmask_fires(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, LEVEL_ENTRY | MASKED)
        pc.vm.irq_line(GSI, 1)
        equal(pc.irr(), set(), "requests while masked")
        pc.run(unreal(), ioapic_write(REDTBL_LOW, LEVEL_ENTRY))
        equal(pc.irr(), {VECTOR}, "requests after the unmask")
        equal(pc.pin(PIN), LEVEL_ENTRY | REMOTE_IRR, "redirection entry")


@case("A level line that fell before the unmask is forgotten (82093AA 3.2.4; ioapic_set_irq).")
def level_that_fell_while_masked_is_forgotten(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, LEVEL_ENTRY | MASKED)
        pc.pulse(GSI)
        pc.run(unreal(), ioapic_write(REDTBL_LOW, LEVEL_ENTRY))
        equal(pc.irr(), set(), "requests after the unmask")
        equal(pc.pin(PIN), LEVEL_ENTRY, "redirection entry")


@case("A line that is high interrupts when its entry is made level-triggered (ioapic_service).")
def high_line_made_level_fires(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR | MASKED)
        pc.vm.irq_line(GSI, 1)
        pc.run(unreal(), ioapic_write(REDTBL_LOW, LEVEL_ENTRY))
        equal(pc.irr(), {VECTOR}, "requests")


@variants(
    "KVM ignores the polarity bit: high is asserted, {0} triggered too (api.rst 4.25, "
    "KVM_CAP_IOAPIC_POLARITY_IGNORED).",
    {"edge": ("edge", 0), "level": ("level", LEVEL)},
)
def polarity_is_ignored(bench: Bench, trigger: str, bit: int) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR | bit | POLARITY_LOW)
        pc.vm.irq_line(GSI, 0)
        equal(pc.irr(), set(), "requests with the line low")
        pc.vm.irq_line(GSI, 1)
        equal(pc.irr(), {VECTOR}, "requests with the line high")


@variants(
    "The message of a pin says how it is triggered: {0} {2} the vector's bit in TMR (SDM vol. 3A "
    "12.8.4; __apic_accept_irq).",
    {"edge": ("edge", 0, "clears"), "level": ("level", LEVEL, "sets")},
)
def trigger_mode_reaches_tmr(bench: Bench, trigger: str, bit: int, does: str) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR | bit)
        pc.set_lapic({TMR + 0x20: 0 if bit else 1 << VECTOR % 32})
        pc.vm.irq_line(GSI, 1)
        equal(pc.vectors(TMR), {VECTOR} if bit else set(), "TMR")


# Remote IRR and the end of an interrupt.


@variants(
    "Remote IRR is set when a level interrupt was accepted, and not for edges: here {0} (82093AA "
    "3.2.4, bit 14).",
    {"edge": ("edge", 0), "level": ("level", LEVEL)},
)
def remote_irr_after_delivery(bench: Bench, trigger: str, bit: int) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR | bit)
        pc.vm.irq_line(GSI, 1)
        equal(pc.pin(PIN), VECTOR | bit | (REMOTE_IRR if bit else 0), "redirection entry")


@case(
    "A level interrupt nobody accepts is not in service: Remote IRR stays 0 (82093AA 3.2.4: set "
    "when local APICs accept; ioapic_service)."
)
def remote_irr_needs_an_acceptor(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, LEVEL_ENTRY | 5 << DEST_ID_SHIFT)
        pc.vm.irq_line(GSI, 1)
        equal(pc.pin(PIN), LEVEL_ENTRY | 5 << DEST_ID_SHIFT, "redirection entry, to APIC 5")


@case(
    "While Remote IRR is set a level line does not interrupt again (82093AA 3.2.4; ioapic_service)."
)
def remote_irr_holds_the_next_back(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, LEVEL_ENTRY)
        level_interrupt_in_service(pc)
        pc.pulse(GSI)
        pc.vm.irq_line(GSI, 1)
        equal(pc.irr(), set(), "requests while in service")


def end_in_service(
    pc: Pc, *between: tuple[Op, ...], line: int = 1, after: tuple[Op, ...] = ()
) -> None:
    """A level interrupt comes into service, the line goes to `line`, the guest does `between`,
    writes EOI, and does `after`.
    """

    def raise_it() -> None:
        level_interrupt_in_service(pc)
        pc.vm.irq_line(GSI, line)

    pc.run(
        *(*ON, ioapic_write(REDTBL_LOW, LEVEL_ENTRY), out8(PORT_ACT, 0)),
        *(*between, lapic_write(EOI, 0), after),
        acts=[raise_it],
    )


@variants(
    "EOI clears Remote IRR; a line that is then {0} {1} (82093AA 3.2.4; "
    "kvm_ioapic_update_eoi_one).",
    {"low": ("low", "is quiet", 0), "high": ("high", "interrupts again", 1)},
)
def eoi_with_the_line(bench: Bench, what: str, does: str, line: int) -> None:
    with bench.pc() as pc:
        end_in_service(pc, line=line)
        equal(pc.irr(), {VECTOR} if line else set(), "requests after EOI")
        equal(pc.pin(PIN), LEVEL_ENTRY | (REMOTE_IRR if line else 0), "redirection entry")


@case(
    "EOI of a level interrupt whose pin is masked clears Remote IRR and does not interrupt again "
    "(kvm_ioapic_update_eoi_one)."
)
def eoi_of_a_masked_pin(bench: Bench) -> None:
    with bench.pc() as pc:
        end_in_service(pc, ioapic_write(REDTBL_LOW, LEVEL_ENTRY | MASKED))
        equal(pc.irr(), set(), "requests after EOI")
        equal(pc.pin(PIN), LEVEL_ENTRY | MASKED, "redirection entry")


@case(
    "A level line that is still high after 10,000 EOIs in a row interrupts again 10 ms later only "
    "(kvm_ioapic_update_eoi_one: IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT)."
)
def interrupt_storm_is_slowed_down(bench: Bench) -> None:
    # what a kernel counts in jiffies may be one less
    least_ns = 10_000_000 if bench.exact else 5_000_000
    with bench.pc() as pc:
        only_the_ioapic(pc, LEVEL_ENTRY)
        got = pc.run(
            *(*ON, apic_eoi_on(), out8(PORT_ACT, 0), sti(), wait_vector(VECTOR, 9_990)),
            *(tsc_read(0), wait_vector(VECTOR, 10_010), tsc_read(2)),
            acts=[lambda: pc.vm.irq_line(GSI, 1)],
        )
        took_ns = pc.elapsed_ns(got, 0, 2)
        check(took_ns >= least_ns, "ns from interrupt 9,990 to 10,010", "10 ms or more", took_ns)


@case("Masking a pin leaves its Remote IRR: the interrupt is still in service (82093AA 3.2.4).")
def mask_keeps_remote_irr(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, LEVEL_ENTRY)
        level_interrupt_in_service(pc)
        pc.run(unreal(), ioapic_write(REDTBL_LOW, LEVEL_ENTRY | MASKED))
        equal(pc.pin(PIN), LEVEL_ENTRY | MASKED | REMOTE_IRR, "redirection entry")


@case(
    "Unmasking a pin whose interrupt is in service sends nothing before the EOI (ioapic_service "
    "looks at Remote IRR)."
)
def unmask_in_service_sends_nothing(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, LEVEL_ENTRY)
        level_interrupt_in_service(pc)
        pc.run(
            *(unreal(), ioapic_write(REDTBL_LOW, LEVEL_ENTRY | MASKED)),
            ioapic_write(REDTBL_LOW, LEVEL_ENTRY),
        )
        equal(pc.irr(), set(), "requests after mask and unmask")


@case(
    "EOI finds the pins that hold its vector now: after the entry got another vector Remote IRR "
    "stays (kvm_ioapic_update_eoi compares vectors)."
)
def eoi_goes_by_the_vector_of_now(bench: Bench) -> None:
    with bench.pc() as pc:
        end_in_service(pc, ioapic_write(REDTBL_LOW, 0x46 | LEVEL))
        equal(pc.pin(PIN), 0x46 | LEVEL | REMOTE_IRR, "redirection entry")


@case("An EOI ends the interrupts of all pins with its vector (82093AA 3.2.4; SDM vol. 3A 12.8.5).")
def eoi_ends_all_pins_of_its_vector(bench: Bench) -> None:
    with bench.pc() as pc:

        def raise_both() -> None:
            for gsi in (GSI, GSI + 1):
                pc.vm.irq_line(gsi, 1)
            pc.take_into_service(VECTOR)
            for gsi in (GSI, GSI + 1):
                pc.vm.irq_line(gsi, 0)

        pc.run(
            *(
                *ON,
                ioapic_write(REDTBL_LOW, LEVEL_ENTRY),
                ioapic_write(REDTBL_LOW + 2, LEVEL_ENTRY),
            ),
            *(out8(PORT_ACT, 0), lapic_write(EOI, 0)),
            acts=[raise_both],
        )
        equal([pc.pin(PIN), pc.pin(PIN + 1)], [LEVEL_ENTRY] * 2, "redirection entries")


@case("EOI of another vector leaves Remote IRR alone (kvm_ioapic_update_eoi compares vectors).")
def eoi_of_another_vector(bench: Bench) -> None:
    with bench.pc() as pc:

        def raise_it() -> None:
            level_interrupt_in_service(pc)
            pc.take_into_service(0x66)

        pc.run(
            *(*ON, ioapic_write(REDTBL_LOW, LEVEL_ENTRY), out8(PORT_ACT, 0), lapic_write(EOI, 0)),
            acts=[raise_it],
        )
        equal(pc.pin(PIN), LEVEL_ENTRY | REMOTE_IRR, "redirection entry")


@variants(
    "Writing the {0} half of an entry that is edge-triggered clears Remote IRR: what an EOI "
    "register would be for (ioapic_write_indirect).",
    {"low": ("low", REDTBL_LOW, VECTOR | MASKED), "high": ("high", REDTBL_HIGH, 0)},
)
def edge_entry_written_clears_remote_irr(
    bench: Bench, half: str, register: int, value: int
) -> None:
    with bench.pc() as pc:
        pc.set_pin(PIN, VECTOR | MASKED | REMOTE_IRR)
        equal(pc.pin(PIN), VECTOR | MASKED | REMOTE_IRR, "entry as KVM_SET_IRQCHIP set it")
        pc.run(unreal(), ioapic_write(register, value))
        equal(pc.pin(PIN), VECTOR | MASKED, f"entry after its {half} half was written")


@case(
    "With IF=1 a level interrupt is taken once, and again after its EOI as long as the line is "
    "high (82093AA 3.2.4; SDM vol. 3A 12.8.5)."
)
def level_interrupt_is_taken_once_until_eoi(bench: Bench) -> None:
    bench.needs("in-service-after-injection")
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, apic_eoi_off(), ioapic_write(REDTBL_LOW, LEVEL_ENTRY), sti(), out8(PORT_ACT, 0)),
            *(*WINDOWS, snap_vector(VECTOR, 0), ioapic_read(REDTBL_LOW, 1), lapic_write(EOI, 0)),
            *(*WINDOWS, snap_vector(VECTOR, 2), out8(PORT_ACT + 1, 0), cli()),
            *(lapic_write(EOI, 0), sti(), *WINDOWS, snap_vector(VECTOR, 3)),
            ioapic_read(REDTBL_LOW, 4),
            acts=[lambda: pc.vm.irq_line(GSI, 1), lambda: pc.vm.irq_line(GSI, 0)],
        )
        in_service = LEVEL_ENTRY | REMOTE_IRR
        equal(
            got.results[:5], (1, in_service, 2, 2, LEVEL_ENTRY), "taken, entry, taken, taken, entry"
        )


# The RTC's pin.


@case(
    "On pin 8 KVM_IRQ_LINE_STATUS tells that the last interrupt was not ended yet: 0, coalesced "
    "(ioapic_set_irq, rtc_irq_check_coalesced)."
)
def rtc_is_coalesced_until_eoi(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR, gsi=8, pin=8)
        answers: list[int] = []

        def pulse() -> None:
            answers.append(pc.vm.irq_line_status(8, 1))
            pc.vm.irq_line_status(8, 0)

        def take() -> None:
            pulse()
            pulse()
            pc.take_into_service(VECTOR)
            pulse()

        pc.run(
            unreal(),
            out8(PORT_ACT, 0),
            lapic_write(EOI, 0),
            out8(PORT_ACT + 1, 0),
            acts=[take, pulse],
        )
        equal(answers, [1, 0, 0, 1], "sent, requested, in service, ended")


@variants(
    "KVM_SET_LAPIC with the vector of pin 8 {0} in service makes the next one {1} "
    "(kvm_rtc_eoi_tracking_restore_one).",
    {"set": ("set", "coalesced", True, 0), "clear": ("not", "a new one", False, 1)},
)
def rtc_follows_set_lapic(
    bench: Bench, what: str, does: str, in_service: bool, status: int
) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR, gsi=8, pin=8)
        if in_service:
            pc.take_into_service(VECTOR)
        else:
            pc.vm.irq_line_status(8, 1)
            pc.vm.irq_line_status(8, 0)
            pc.set_lapic({IRR + 0x20: 0})
        equal(pc.vm.irq_line_status(8, 1), status, "KVM_IRQ_LINE_STATUS")


@case(
    "KVM_IRQ_LINE, which asks for no status, is not held back on pin 8 (ioapic_set_irq: "
    "line_status)."
)
def rtc_without_status_is_not_coalesced(bench: Bench) -> None:
    with bench.pc() as pc:
        only_the_ioapic(pc, VECTOR, gsi=8, pin=8)
        equal(pc.vm.irq_line_status(8, 1), 1, "status of the first edge")
        pc.vm.irq_line(8, 0)
        pc.take_into_service(VECTOR)
        pc.vm.irq_line(8, 1)
        equal(pc.irr(), {VECTOR}, "requests after the second edge")


# Where it sends to.


@case("Physical destination mode goes to the local APIC with that id (82093AA 3.2.4, bits 56-63).")
def physical_destination(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        only_the_ioapic(pc, VECTOR | TO_VCPU_1)
        pc.enable_lapic(1)
        pc.pulse(GSI)
        equal((pc.irr(0), pc.irr(1)), (set(), {VECTOR}), "requests of both vCPUs")


@case("Physical destination 0xff is for all local APICs (SDM vol. 3A 12.6.2.1).")
def physical_broadcast(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        only_the_ioapic(pc, VECTOR | TO_ALL)
        pc.enable_lapic(1)
        pc.pulse(GSI)
        equal((pc.irr(0), pc.irr(1)), ({VECTOR}, {VECTOR}), "requests of both vCPUs")


@variants(
    "Logical destination {0:#x} goes to whose LDR has one of its bits; they have 1 and 2 (82093AA "
    "3.2.4, bit 11; SDM vol. 3A 12.6.2.2).",
    {
        "first": (1, True, False),
        "second": (2, False, True),
        "both": (3, True, True),
        "nobody": (4, False, False),
    },
)
def logical_destination(bench: Bench, dest: int, first: bool, second: bool) -> None:
    with bench.pc(vcpus=2) as pc:
        only_the_ioapic(pc, VECTOR | LOGICAL | dest << DEST_ID_SHIFT)
        pc.enable_lapic(1)
        for vcpu_id in (0, 1):
            pc.set_lapic({LDR: 1 << 24 + vcpu_id}, vcpu_id)
        pc.pulse(GSI)
        equal(
            (pc.irr(0), pc.irr(1)),
            ({VECTOR} if first else set(), {VECTOR} if second else set()),
            "requests of both vCPUs",
        )


@case("A lowest-priority interrupt for several is taken by exactly one (82093AA 3.2.4, mode 001).")
def lowest_priority_goes_to_one(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        only_the_ioapic(pc, VECTOR | LOWEST | LOGICAL | 3 << DEST_ID_SHIFT)
        pc.enable_lapic(1)
        for vcpu_id in (0, 1):
            pc.set_lapic({LDR: 1 << 24 + vcpu_id}, vcpu_id)
        pc.pulse(GSI)
        got = pc.irr(0), pc.irr(1)
        check(sorted(map(len, got)) == [0, 1], "requests of both vCPUs", "one of them", got)


@case("Written anew, an entry sends what it holds now (ioapic_service).")
def entry_sends_what_it_holds_now(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        only_the_ioapic(pc, VECTOR)
        pc.enable_lapic(1)
        pc.pulse(GSI)
        pc.run(unreal(), ioapic_write(REDTBL_LOW, 0x46), ioapic_write(REDTBL_HIGH, 1 << 24))
        pc.pulse(GSI)
        equal((pc.irr(0), pc.irr(1)), ({VECTOR}, {0x46}), "requests of both vCPUs")


@variants(
    "Delivery mode {0}: {1} (82093AA 3.2.4, bits 8-10; __apic_accept_irq).",
    {
        "fixed": (0, "the vector is requested", {VECTOR}, 0, KVM_MP_STATE_UNINITIALIZED),
        "lowest-priority": (1, "the vector is requested", {VECTOR}, 0, KVM_MP_STATE_UNINITIALIZED),
        "smi": (2, "no interrupt and no NMI", set(), 0, KVM_MP_STATE_UNINITIALIZED),
        "nmi": (
            4,
            "an NMI is pending, the vector is ignored",
            set(),
            1,
            KVM_MP_STATE_UNINITIALIZED,
        ),
        "init": (5, "the vCPU waits for SIPI", set(), 0, KVM_MP_STATE_INIT_RECEIVED),
        "extint": (7, "nothing: KVM has ExtINT by LVT0 only", set(), 0, KVM_MP_STATE_UNINITIALIZED),
    },
)
def delivery_mode(
    bench: Bench, mode: int, does: str, requests: set[int], nmis: int, mp_state: int
) -> None:
    with bench.pc(vcpus=2) as pc:
        only_the_ioapic(pc, VECTOR | mode << 8 | TO_VCPU_1)
        pc.enable_lapic(1)
        pc.pulse(GSI)
        vcpu = pc.vcpus[1]
        equal(pc.irr(1), requests, "requests")
        equal(vcpu.get_vcpu_events().nmi.pending, nmis, "pending NMIs")
        equal(vcpu.get_mp_state(), mp_state, "MP state")


@case("An interrupt of NMI delivery comes with IF=0 (82093AA 3.2.4, mode 100; SDM vol. 3A 7.7).")
def nmi_delivery_is_not_held_back_by_if(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, ioapic_write(REDTBL_LOW, NMI), out8(PORT_ACT, 0), *WINDOWS),
            acts=[lambda: pc.pulse(GSI)],
        )
        equal(got.nmis, 1, "NMIs taken with IF=0")


# KVM_GET_IRQCHIP and KVM_SET_IRQCHIP.


@case("KVM_GET_IRQCHIP tells of high lines, but not of edges that were sent (kvm_get_ioapic).")
def saved_irr_is_without_sent_edges(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        for pin, entry in ((3, VECTOR), (4, VECTOR | MASKED), (5, VECTOR | LEVEL)):
            pc.set_pin(pin, entry)
            pc.vm.irq_line(pin, 1)
        irr = pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.irr
        equal(irr, 1 << 4 | 1 << 5, "irr: 3 was sent, 4 is masked, 5 is level")


@variants(
    "A request that KVM_SET_IRQCHIP brings is raised, {0} triggered (kvm_set_ioapic, "
    "kvm_ioapic_inject_all).",
    {"edge": ("edge", 0), "level": ("level", LEVEL)},
)
def restored_request_is_raised(bench: Bench, trigger: str, bit: int) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        chip = pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        chip.chip.ioapic.redirtbl[PIN].bits = VECTOR | bit
        chip.chip.ioapic.irr = 1 << PIN
        pc.vm.set_irqchip(chip)
        equal(pc.irr(), {VECTOR}, "requests")


@case("A restored request of a masked pin waits in irr (kvm_ioapic_inject_all).")
def restored_request_of_a_masked_pin_waits(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()
        chip = pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        chip.chip.ioapic.redirtbl[PIN].bits = LEVEL_ENTRY | MASKED
        chip.chip.ioapic.irr = 1 << PIN
        pc.vm.set_irqchip(chip)
        equal(pc.irr(), set(), "requests while masked")
        pc.run(unreal(), ioapic_write(REDTBL_LOW, LEVEL_ENTRY))
        equal(pc.irr(), {VECTOR}, "requests after the unmask")


@case("KVM_SET_IRQCHIP takes Remote IRR and delivery status as they are (kvm_set_ioapic).")
def restored_entry_is_not_checked(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_pin(PIN, 0xFFFF_FFFF_FFFF_FFFF)
        equal(pc.pin(PIN), 0xFFFF_FFFF_FFFF_FFFF, "redirection entry")


@case(
    "The address KVM_SET_IRQCHIP gives takes the registers away from the default one "
    "(ioapic_in_range)."
)
def moved_base_address(bench: Bench) -> None:
    with bench.pc() as pc:
        chip = pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        equal(chip.chip.ioapic.base_address, IOAPIC, "base address after reset")
        chip.chip.ioapic.base_address = IOAPIC + 0x1000
        pc.vm.set_irqchip(chip)
        got = pc.run(unreal(), ioapic_read(VERSION, 0))
        equal(got.results[0], ONES, "IOAPICVER at the default address")
