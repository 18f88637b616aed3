"""The two PICs: initialisation, requests, priorities, EOIs, polls (8259A datasheet, i8259.c).

Most guests here run with IF=0, so that nobody takes an interrupt: what would be taken is polled.
"""

from kvmtick.abi.structs import KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
from kvmtick.conform.bench import LEAVE, PORT_ACT, READ_AT, WINDOWS, Bench, Pc, Script
from kvmtick.conform.case import case, equal, variants
from kvmtick.guests.script import cli, eoi_off, out8, sti

MASTER, SLAVE = KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
COMMAND, DATA, ELCR = (0x20, 0xA0), (0x21, 0xA1), (0x4D0, 0x4D1)
"""Ports, by chip."""
ELCR_MASK = (0xF8, 0xDE)
CHIPS = {"master": (MASTER, "master"), "slave": (SLAVE, "slave")}
EOI, POLL, READ_IRR, READ_ISR = 0x20, 0x0C, 0x0A, 0x0B
NOTHING = 0x07
"""What a poll gives when nothing is to be taken."""
Access = tuple[int, int]


def words(chip: int, *icws: int) -> tuple[Access, ...]:
    """ICW1 to the command port, the others to the data port."""
    first, *others = icws
    return (COMMAND[chip], first), *((DATA[chip], icw) for icw in others)


def init(chip: int, icw4: int = 0x01) -> tuple[Access, ...]:
    """The usual sequence: bases 0x20 and 0x28, nothing masked."""
    return *words(chip, 0x11, 0x20 + 8 * chip, 0x02 if chip else 0x04, icw4), (DATA[chip], 0)


def polled(pc: Pc, chip: int = MASTER) -> int:
    """A poll of a chip."""
    return pc.accesses((COMMAND[chip], POLL), COMMAND[chip])[0]


# --- after creation and initialisation ------------------------------------------------------------


@variants(
    "After creation all registers of the {1} are 0 but its ELCR mask (kvm_pic_init, elcr_mask).",
    CHIPS,
)
def after_creation(bench: Bench, chip: int, name: str) -> None:
    with bench.pc() as pc:
        got = {name: value for name, value in pc.pic(chip).items() if value}
        equal(got, {"elcr_mask": ELCR_MASK[chip]}, "registers that are not 0")


@variants(
    "ICW2 gives the {1} bits 7:3 of its vectors; its bits 2:0 are the pin's (datasheet, ICW2).",
    CHIPS,
)
def icw2_sets_the_base(bench: Bench, chip: int, name: str) -> None:
    with bench.pc() as pc:
        pc.accesses(*words(chip, 0x11, 0x57, 0x04, 0x01))
        equal(pc.pic(chip)["irq_base"], 0x50, "irq_base after ICW2 = 57")


@variants(
    "ICW1 with bit 0 announces an ICW4, so the {1}'s mask is the fifth byte (datasheet, figure 6).",
    CHIPS,
)
def sequence_with_icw4(bench: Bench, chip: int, name: str) -> None:
    with bench.pc() as pc:
        pc.accesses(*words(chip, 0x11, 0x20, 0x04, 0x01, 0xA5))
        got = pc.pic(chip)
        equal(
            (got["imr"], got["init_state"], got["init4"]), (0xA5, 0, 1), "IMR, state, ICW4 needed"
        )


@variants(
    "ICW1 without bit 0 announces none, so the {1}'s mask is the fourth byte (datasheet, ICW4).",
    CHIPS,
)
def sequence_without_icw4(bench: Bench, chip: int, name: str) -> None:
    with bench.pc() as pc:
        pc.accesses(*words(chip, 0x10, 0x20, 0x04, 0xA5))
        got = pc.pic(chip)
        equal(
            (got["imr"], got["init_state"], got["init4"]), (0xA5, 0, 0), "IMR, state, ICW4 needed"
        )


@case(
    "Single mode (ICW1 bit 1) still expects ICW3: KVM has a cascade always (pic_ioport_write,"
    " init_state 2; the silicon would skip it)."
)
def single_mode_expects_icw3(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.accesses(*words(MASTER, 0x13, 0x20, 0x04))
        equal(pc.pic()["init_state"], 3, "init_state after ICW3")


@case("LTIM (ICW1 bit 3) is ignored: only ELCR makes a pin level triggered (pic_ioport_write).")
def ltim_is_ignored(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.accesses(*words(MASTER, 0x19, 0x20, 0x04, 0x01, 0x00))
        pc.pulse(5)
        equal(polled(pc), 0x85, "poll after a pulse on an edge triggered pin")


@case("ICW1 in the middle of a sequence starts it over (datasheet, initialization sequence).")
def icw1_starts_over(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.accesses(*words(MASTER, 0x11, 0x50), *words(MASTER, 0x11, 0x60, 0x04, 0x01, 0xA5))
        got = pc.pic()
        equal((got["irq_base"], got["imr"]), (0x60, 0xA5), "irq_base, IMR")


@case("OCW2 and OCW3 between the ICWs leave the sequence where it is (pic_ioport_write).")
def commands_between_the_icws(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.accesses(
            *(*words(MASTER, 0x11, 0x50), (0x20, READ_ISR), (0x21, 0x04), (0x20, EOI)),
            *((0x21, 0x01), (0x21, 0xA5)),
        )
        got = pc.pic()
        equal((got["irq_base"], got["imr"], got["init_state"]), (0x50, 0xA5, 0), "base, IMR, state")


@variants(
    "ICW1 resets {0} to 0 (datasheet, ICW1: what occurs automatically; pic_ioport_write).",
    {
        name.replace("_", "-"): (name,)
        for name in ("imr", "last_irr", "priority_add", "special_mask", "read_reg_select")
    },
)
def icw1_resets(bench: Bench, name: str) -> None:
    with bench.pc() as pc:
        pc.pic(**{name: 1})
        pc.accesses((0x20, 0x11))
        equal(pc.pic()[name], 0, name)


@variants(
    "ICW1 leaves {0} as it is (pic_ioport_write; an ICW4 or the guest's commands change it).",
    {
        name.replace("_", "-"): (name, value)
        for name, value in (
            *(("isr", 0x08), ("irq_base", 0x50), ("elcr", 0x20), ("rotate_on_auto_eoi", 1)),
            *(("auto_eoi", 1), ("special_fully_nested_mode", 1)),
        )
    },
)
def icw1_keeps(bench: Bench, name: str, value: int) -> None:
    with bench.pc() as pc:
        pc.pic(**{name: value})
        pc.accesses((0x20, 0x11))
        equal(pc.pic()[name], value, name)


@variants(
    "ICW1 without ICW4 clears {0}: all functions of ICW4 are 0 then (datasheet, ICW1).",
    {name.replace("_", "-"): (name,) for name in ("auto_eoi", "special_fully_nested_mode")},
)
def icw1_without_icw4_clears(bench: Bench, name: str) -> None:
    with bench.pc() as pc:
        pc.pic(**{name: 1})
        pc.accesses((0x20, 0x10))
        equal(pc.pic()[name], 0, name)


@variants(
    "ICW4 = {0:#x} sets automatic EOI to {1} and special fully nested mode to {2} (datasheet,"
    " ICW4).",
    {f"{icw4:02x}": (icw4, icw4 >> 1 & 1, icw4 >> 4) for icw4 in (0x01, 0x03, 0x11, 0x13)},
)
def icw4_modes(bench: Bench, icw4: int, auto_eoi: int, nested: int) -> None:
    with bench.pc() as pc:
        pc.accesses(*init(MASTER, icw4 ^ 0x12), *init(MASTER, icw4))
        got = pc.pic()
        modes = (got["auto_eoi"], got["special_fully_nested_mode"])
        equal(modes, (auto_eoi, nested), "auto_eoi, special_fully_nested_mode")


@case("ICW1 forgets the request of an edge (datasheet, ICW1: the edge sense circuit is reset).")
def icw1_forgets_edges(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pulse(5)
        pc.accesses((0x20, 0x11))
        equal(pc.pic()["irr"], 0, "IRR")


@case("ICW1 keeps the request of a level triggered pin, which is the line (pic_ioport_write).")
def icw1_keeps_levels(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(elcr=0x20)
        pc.vm.irq_line(5, 1)
        pc.accesses((0x20, 0x11))
        equal(pc.pic()["irr"], 0x20, "IRR")


@case(
    "A line that was high over ICW1 counts as low: raised once more it is a new edge (last_irr is"
    " cleared)."
)
def line_held_high_over_icw1(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.irq_line(5, 1)
        pc.accesses(*init(MASTER))
        equal(pc.pic()["irr"], 0, "IRR after the initialisation")
        pc.vm.irq_line(5, 1)
        equal(pc.pic()["irr"], 0x20, "IRR after the line was raised again")


# --- requests, masks, edge and level --------------------------------------------------------------


@variants("The data port of the {1} reads its mask, OCW1 (datasheet, OCW1).", CHIPS)
def mask_reads_back(bench: Bench, chip: int, name: str) -> None:
    with bench.pc() as pc:
        got = pc.accesses((DATA[chip], 0xA5), DATA[chip])
        equal(got, (0xA5,), "data port after A5 was written")


@variants(
    "An edge whose line falls before INTA is kept: the {1} latches it (pic_set_irq1; the silicon"
    " would give IR7).",
    {"master": (5, "master"), "slave": (13, "slave")},
)
def short_edge_is_kept(bench: Bench, irq: int, name: str) -> None:
    with bench.pc() as pc:
        pc.pulse(irq)
        equal(polled(pc, irq // 8), 0x80 | irq % 8, "poll after a pulse")


@variants(
    "A level triggered request of the {1} is gone with its line, silently (pic_set_irq1).",
    {"master": (5, "master"), "slave": (12, "slave")},
)
def level_vanishes_with_its_line(bench: Bench, irq: int, name: str) -> None:
    with bench.pc() as pc:
        pc.pic(irq // 8, elcr=1 << irq % 8)
        pc.pulse(irq)
        equal(polled(pc, irq // 8), NOTHING, "poll after a pulse")


@case("A line that stays high is one edge (datasheet, edge triggered mode; pic_set_irq1).")
def steady_line_is_one_edge(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.irq_line(5, 1)
        equal(polled(pc), 0x85, "first poll")
        pc.vm.irq_line(5, 1)
        equal(polled(pc), NOTHING, "poll after the line was raised while high")


@case("A masked pin latches its edge, and gives it when it is unmasked (pic_set_irq1, IMR).")
def masked_edge_is_latched(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.accesses((0x21, 0x20))
        pc.pulse(5)
        equal(polled(pc), NOTHING, "poll while masked")
        equal(pc.pic()["irr"], 0x20, "IRR while masked")
        pc.accesses((0x21, 0x00))
        equal(polled(pc), 0x85, "poll after the unmask")


@case("A mask does not end service: the pin stays in ISR (datasheet, OCW1 acts on requests).")
def mask_leaves_service(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(isr=0x20)
        pc.accesses((0x21, 0xFF))
        equal(pc.pic()["isr"], 0x20, "ISR")


@variants(
    "ELCR of the {1} takes only the bits of pins that may be level triggered: timer, keyboard,"
    " cascade, RTC and FPU are always edge (elcr_mask).",
    CHIPS,
)
def elcr_is_masked(bench: Bench, chip: int, name: str) -> None:
    with bench.pc() as pc:
        got = pc.accesses((ELCR[chip], 0xFF), ELCR[chip])
        equal(got, (ELCR_MASK[chip],), "ELCR after FF was written")


@case("A level triggered line that is high fires again after each EOI (datasheet, level mode).")
def level_fires_again(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(elcr=0x20)
        eoi = (cli(), out8(0x20, EOI), sti(), *WINDOWS)
        got = pc.run(
            *(eoi_off(), out8(0x21, 0), sti(), out8(PORT_ACT, 0), *WINDOWS, *eoi),
            *(out8(PORT_ACT + 1, 0), *eoi),
            acts=[lambda: pc.vm.irq_line(5, 1), lambda: pc.vm.irq_line(5, 0)],
        )
        equal(got.vectors[5], 2, "times it was taken: first, and after the EOI with the line high")
        equal(pc.pic()["isr"], 0, "ISR after an EOI with the line low")


@case("A poll takes the request of a level triggered pin too, line high or not (pic_poll_read).")
def poll_takes_a_level(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(elcr=0x20)
        pc.vm.irq_line(5, 1)
        equal(polled(pc), 0x85, "first poll")
        equal(polled(pc), NOTHING, "second poll")


# --- priorities -----------------------------------------------------------------------------------


@case("Fully nested mode: of two requests the lower pin comes first (datasheet, section on FNM).")
def lower_pin_first(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pulse(5)
        pc.pulse(1)
        equal([polled(pc) for _ in range(3)], [0x81, 0x85, NOTHING], "three polls")


@variants(
    "With IR3 in service a request of IR{0} {2} (datasheet, fully nested mode; pic_get_irq).",
    {
        "higher": (1, 0x81, "interrupts"),
        "equal": (3, NOTHING, "waits"),
        "lower": (5, NOTHING, "waits"),
    },
)
def in_service_blocks(bench: Bench, irq: int, poll: int, what: str) -> None:
    with bench.pc() as pc:
        pc.pic(isr=0x08)
        pc.pulse(irq)
        equal(polled(pc), poll, f"poll with IR{irq} requested")


@variants(
    "Set priority, OCW2 = {0:#x}: IR{1} becomes the lowest (datasheet, specific rotation).",
    {f"{0xC0 | pin:x}": (0xC0 | pin, pin) for pin in (0, 2, 7)},
)
def set_priority(bench: Bench, command: int, lowest: int) -> None:
    with bench.pc() as pc:
        pc.pic(irr=0xFB)  # IR2 is the slave's
        pc.accesses((0x20, command))
        order = [(lowest + step) % 8 for step in range(1, 9) if (lowest + step) % 8 != 2]
        equal([polled(pc) & 7 for _ in order], order, "the pins in the order of polls")


@variants(
    "OCW2 = {0:#x} ({5}) with ISR {1:#x} and IR{2} highest leaves ISR {3:#x} and IR{4} highest"
    " (datasheet, OCW2).",
    {
        "eoi": (0x20, 0x28, 0, 0x20, 0, "non-specific EOI"),
        "eoi-by-rotated-priority": (0x20, 0x28, 4, 0x08, 4, "non-specific EOI"),
        "specific-eoi": (0x65, 0x28, 0, 0x08, 0, "specific EOI"),
        "specific-eoi-of-another": (0x61, 0x28, 0, 0x28, 0, "specific EOI"),
        "rotate-eoi": (0xA0, 0x28, 0, 0x20, 4, "rotate on non-specific EOI"),
        "rotate-eoi-by-rotated-priority": (0xA0, 0x28, 4, 0x08, 6, "rotate on non-specific EOI"),
        "rotate-specific-eoi": (0xE5, 0x28, 0, 0x08, 6, "rotate on specific EOI"),
        "rotate-eoi-of-nothing": (0xA0, 0x00, 3, 0x00, 3, "rotate on non-specific EOI"),
        "rotate-specific-eoi-of-another": (0xE1, 0x28, 0, 0x28, 2, "rotate on specific EOI"),
        "no-operation": (0x40, 0x28, 3, 0x28, 3, "no operation"),
    },
)
def ocw2(
    bench: Bench, command: int, isr: int, add: int, isr_after: int, add_after: int, name: str
) -> None:
    with bench.pc() as pc:
        pc.pic(isr=isr, priority_add=add)
        pc.accesses((0x20, command))
        got = pc.pic()
        equal((got["isr"], got["priority_add"]), (isr_after, add_after), "ISR, highest pin")


@variants(
    "OCW2 = {0:#x} switches rotation in automatic EOI mode {2} (datasheet, OCW2).",
    {"set": (0x80, 1, "on"), "clear": (0x00, 0, "off")},
)
def rotate_in_aeoi(bench: Bench, command: int, rotate: int, what: str) -> None:
    with bench.pc() as pc:
        pc.pic(rotate_on_auto_eoi=1 - rotate)
        pc.accesses((0x20, command))
        equal(pc.pic()["rotate_on_auto_eoi"], rotate, "rotate_on_auto_eoi")


@case(
    "The slave's EOI ends the slave's service only; the master's IR2 needs its own (8259A"
    " datasheet, cascading)."
)
def eoi_is_one_chips(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(MASTER, isr=0x04)
        pc.pic(SLAVE, isr=0x02)
        pc.accesses((0xA0, EOI))
        equal((pc.pic(MASTER)["isr"], pc.pic(SLAVE)["isr"]), (0x04, 0), "ISR of master and slave")


@variants(
    "With slave IR4 in service a request of slave IR1 {2} {1} special fully nested mode"
    " (datasheet, SFNM; pic_get_irq).",
    {"sfnm": (0x11, "with", "interrupts"), "no-sfnm": (0x01, "without", "waits")},
)
def slave_nests_in_sfnm(bench: Bench, icw4: int, how: str, what: str) -> None:
    with bench.pc() as pc:
        pc.accesses(*init(MASTER, icw4), *init(SLAVE))
        pc.pic(SLAVE, isr=0x10)
        pc.pic(MASTER, isr=0x04)
        pc.pulse(9)
        equal(polled(pc), 0x82 if icw4 & 0x10 else NOTHING, "poll of the master")


@case(
    "Special fully nested mode is about the cascade only: IR3 in service blocks IR3 (pic_get_irq)."
)
def sfnm_is_for_the_cascade(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.accesses(*init(MASTER, 0x11))
        pc.pic(isr=0x08)
        pc.pulse(3)
        equal(polled(pc), NOTHING, "poll with IR3 requested")


@case(
    "Special mask mode has no effect: a pin in service that is masked still blocks lower ones"
    " (pic_get_irq has no special_mask; the silicon would let them through)."
)
def special_mask_has_no_effect(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(isr=0x08)
        pc.accesses((0x21, 0x08), (0x20, 0x68))
        pc.pulse(5)
        equal(pc.pic()["special_mask"], 1, "special_mask")
        equal(polled(pc), NOTHING, "poll with IR5 requested")


# --- OCW3: which register is read, polls ----------------------------------------------------------


@variants(
    "OCW3 = {0:#x}: the command port reads {3} (datasheet, reading the 8259A status).",
    {
        "0a": (READ_IRR, READ_ISR, 0x20, "IRR"),
        "0b": (READ_ISR, READ_IRR, 0x08, "ISR"),
        "08-after-0b": (0x08, READ_ISR, 0x08, "what was chosen before, ISR"),
    },
)
def ocw3_selects(bench: Bench, command: int, before: int, value: int, name: str) -> None:
    with bench.pc() as pc:
        pc.pic(isr=0x08)
        pc.pulse(5)
        got = pc.accesses((0x20, before), (0x20, command), 0x20, 0x20)
        equal(got, (value, value), "two reads of the command port")


@variants(
    "A poll of the {1} gives bit 7 and the pin, takes the request, and ends its service at once"
    " (pic_poll_read; the silicon leaves it in service).",
    {"master": (5, "master"), "slave": (13, "slave")},
)
def poll_takes(bench: Bench, irq: int, name: str) -> None:
    chip = irq // 8
    with bench.pc() as pc:
        pc.pulse(irq)
        equal(polled(pc, chip), 0x80 | irq % 8, "poll")
        got = pc.pic(chip)
        equal((got["irr"], got["isr"]), (0, 0), "IRR, ISR")


@variants("A poll of the {1} with nothing to take gives 7 (pic_poll_read).", CHIPS)
def poll_of_nothing(bench: Bench, chip: int, name: str) -> None:
    with bench.pc() as pc:
        equal(polled(pc, chip), NOTHING, "poll")


@case("The data port too reads a poll, once it was asked for (picdev_read).")
def poll_through_the_data_port(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pulse(5)
        got = pc.accesses((0x21, 0x40), (0x20, POLL), 0x21, 0x21)
        equal(got, (0x85, 0x40), "data port: the poll, then the mask")


@case("A poll command is good for one read; the next read gives the register (datasheet, poll).")
def poll_is_one_read(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pulse(5)
        pc.pulse(6)
        got = pc.accesses((0x20, READ_IRR), (0x20, POLL), 0x20, 0x20)
        equal(got, (0x85, 0x40), "the poll, then IRR")


@case("A poll of the slave takes the master's IR2 with it (pic_poll_read).")
def poll_of_the_slave_clears_the_cascade(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pulse(13)
        equal(pc.pic(MASTER)["irr"], 0x04, "IRR of the master before")
        equal(polled(pc, SLAVE), 0x85, "poll of the slave")
        equal(pc.pic(MASTER)["irr"], 0, "IRR of the master after")


@case(
    "A poll of the master finds IR2 when the slave asks; the slave goes on asking (pic_poll_read)."
)
def poll_of_the_master_finds_the_cascade(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pulse(13)
        equal(polled(pc, MASTER), 0x82, "poll of the master")
        equal(pc.pic(SLAVE)["irr"], 0x20, "IRR of the slave")


# --- what is no byte ------------------------------------------------------------------------------

STORE_AX = b"\xa3" + READ_AT.to_bytes(2, "little")


@variants(
    "A word read at port {0:#x} gives 0: the PICs know bytes only (picdev_read).",
    {"20h": (0x20,), "a0h": (0xA0,), "4d0h": (0x4D0,)},
)
def word_read(bench: Bench, port: int) -> None:
    with bench.pc() as pc:
        pc.pic(imr=0xFF, irr=0xFF, elcr=0xF8)
        pc.pic(SLAVE, imr=0xFF, irr=0xFF, elcr=0xDE)
        pc.run_image(b"\xba" + port.to_bytes(2, "little") + b"\xed" + STORE_AX + LEAVE)
        equal(int.from_bytes(pc.vm.read_memory(READ_AT, 2), "little"), 0, f"word at {port:#x}")


@case("A word written to a PIC does nothing (picdev_write).")
def word_write(bench: Bench) -> None:
    with bench.pc() as pc:
        before = pc.pic(imr=0xA5, irr=0x20)
        pc.run_image(b"\xb8\x11\xff" + b"\xe7\x20" + LEAVE)  # mov ax, 0xff11; out 0x20, ax
        equal(pc.pic(), before, "registers of the master")


# --- interrupts that are taken --------------------------------------------------------------------


def ports(*writes: Access) -> Script:
    """Port writes of a script."""
    return tuple(out8(port, value) for port, value in writes)


OPEN: Script = ports(*init(MASTER), *init(SLAVE))


@variants(
    "IRQ n of the {1} is taken at its base + n (datasheet, ICW2; kvm_pic_read_irq).",
    {"master": ((0, 1, 3, 4, 5, 6, 7), "master"), "slave": (tuple(range(8, 16)), "slave")},
)
def vectors(bench: Bench, irqs: tuple[int, ...], name: str) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *OPEN, sti(), out8(PORT_ACT, 0), *WINDOWS * 2, acts=[lambda: pulse_all(pc, irqs)]
        )
        taken = tuple(irq for irq in range(16) if got.vectors[irq])
        equal(taken, irqs, "IRQs whose vectors were taken")


def pulse_all(pc: Pc, irqs: tuple[int, ...]) -> None:
    """A pulse on each line."""
    for irq in irqs:
        pc.pulse(irq)


def taken_once(pc: Pc, irq: int, setup: Script = OPEN) -> None:
    """Let the guest take an IRQ and write no EOI."""
    got = pc.run(
        *(*setup, eoi_off(), sti(), out8(PORT_ACT, 0), *WINDOWS, cli()),
        acts=[lambda: pc.pulse(irq)],
    )
    equal(got.vectors[irq], 1, f"times IRQ {irq} was taken")


@case("INTA moves an edge from IRR to ISR, where it stays until EOI (pic_intack).")
def inta_takes_into_service(bench: Bench) -> None:
    with bench.pc() as pc:
        taken_once(pc, 5)
        got = pc.pic()
        equal((got["irr"], got["isr"]), (0, 0x20), "IRR, ISR")


@case("INTA leaves the request of a level triggered pin in IRR, which is the line (pic_intack).")
def inta_keeps_a_level(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(elcr=0x20)
        pc.run(
            *(*OPEN, eoi_off(), sti(), out8(PORT_ACT, 0), *WINDOWS, cli()),
            acts=[lambda: pc.vm.irq_line(5, 1)],
        )
        got = pc.pic()
        equal((got["irr"], got["isr"]), (0x20, 0x20), "IRR, ISR")


@case("INTA of a slave's request puts both chips in service, the master at IR2 (kvm_pic_read_irq).")
def inta_of_the_slave(bench: Bench) -> None:
    with bench.pc() as pc:
        taken_once(pc, 13)
        equal((pc.pic(MASTER)["isr"], pc.pic(SLAVE)["isr"]), (0x04, 0x20), "ISR of both chips")


@case(
    "A second edge of a pin in service waits for the EOI, and is taken then (8259A datasheet, EOI)."
)
def eoi_lets_the_next_through(bench: Bench) -> None:
    requests: list[int] = []
    with bench.pc() as pc:
        got = pc.run(
            *(*OPEN, eoi_off(), sti(), out8(PORT_ACT, 0), *WINDOWS, out8(PORT_ACT, 0), *WINDOWS),
            *(cli(), out8(PORT_ACT + 1, 0), out8(0x20, EOI), sti(), *WINDOWS),
            acts=[lambda: pc.pulse(5), lambda: requests.append(pc.pic()["irr"])],
        )
    equal((requests, got.vectors[5]), ([0x20], 2), "IRR before the EOI, times taken")


@case(
    "A higher request interrupts the handler of a lower one, not the reverse (8259A"
    " datasheet, fully nested)."
)
def higher_interrupts_lower(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*OPEN, eoi_off(), sti(), out8(PORT_ACT, 0), *WINDOWS, out8(PORT_ACT + 1, 0)),
            *WINDOWS,
            acts=[lambda: pc.pulse(5), lambda: pulse_all(pc, (3, 6))],
        )
        taken = {irq for irq in range(8) if got.vectors[irq]}
        equal(taken, {3, 5}, "IRQs taken without EOI: 5, then 3 and 6 were requested")


@case("With automatic EOI nothing is in service after INTA (datasheet, AEOI mode; pic_intack).")
def aeoi_ends_service(bench: Bench) -> None:
    with bench.pc() as pc:
        taken_once(pc, 5, setup=ports(*init(MASTER, 0x03)))
        equal(pc.pic()["isr"], 0, "ISR")


@variants(
    "Rotation in automatic EOI mode makes the pin that was taken the lowest{2} (datasheet, OCW2).",
    {
        "aeoi": (0x03, 6, ""),
        "no-aeoi": (0x01, 0, "; without automatic EOI it does nothing"),
    },
)
def aeoi_rotates(bench: Bench, icw4: int, highest: int, but: str) -> None:
    with bench.pc() as pc:
        taken_once(pc, 5, setup=ports(*init(MASTER, icw4), (0x20, 0x80)))
        equal(pc.pic()["priority_add"], highest, "highest pin after IRQ 5 was taken")


@case(
    "IR2 of the master without a request of the slave gives the slave's spurious vector, base + 7,"
    " and nothing in service there (kvm_pic_read_irq)."
)
def spurious_of_the_slave(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*OPEN, eoi_off(), sti(), out8(PORT_ACT, 0), *WINDOWS),
            acts=[lambda: pc.pulse(2)],
        )
        equal(got.vectors[15], 1, "times vector 0x2f was taken")
        equal((pc.pic(MASTER)["isr"], pc.pic(SLAVE)["isr"]), (0x04, 0), "ISR of both chips")


@case(
    "An initialisation with INTR high leaves INTR high: INTA finds nothing and gives the spurious"
    " vector, base + 7 (pic_ioport_write updates no output, kvm_pic_read_irq)."
)
def spurious_of_the_master(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*OPEN, eoi_off(), cli(), out8(PORT_ACT, 0)),
            *(*ports(*words(MASTER, 0x11, 0x20, 0x04, 0x01)), sti(), *WINDOWS),
            acts=[lambda: pc.pulse(5)],
        )
        equal((got.vectors[7], got.vectors[5]), (1, 0), "times vectors 0x27 and 0x25 were taken")
        equal(pc.pic()["isr"], 0, "ISR")


@case("A request that SET_IRQCHIP brings is taken at the next window (kvm_vm_ioctl_set_irqchip).")
def set_request_is_taken(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*(*OPEN, sti(), out8(PORT_ACT, 0), *WINDOWS), acts=[lambda: pc.pic(irr=0x20)])
        equal(got.vectors[5], 1, "times IRQ 5 was taken")
