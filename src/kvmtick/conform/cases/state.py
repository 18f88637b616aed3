"""State that is read and written back: what is kept, what starts again, what is made up.

That is how a VM moves: GET and SET of PIT, PICs, IOAPIC, local APIC, events, MP state and clock
(api.rst; kvm_vm_ioctl_set_pit2, kvm_vm_ioctl_set_irqchip, kvm_apic_set_state and the like).
"""

from collections.abc import Callable

from kvmtick.abi.structs import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MP_STATE_AP_RESET_HOLD,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI,
    kvm_ioapic_state,
    kvm_vcpu_events,
)
from kvmtick.conform.bench import (
    COUNT,
    DFR,
    DIVIDE_BY_1,
    ENABLED,
    ESR,
    ICR,
    ICR_HIGH,
    ID,
    IRR,
    ISR,
    LDR,
    LEVEL,
    LVT0,
    LVT1,
    LVT_MASKED,
    LVT_PERIODIC,
    LVT_TSC_DEADLINE,
    LVTERR,
    LVTPC,
    LVTT,
    LVTTHMR,
    MASKED,
    PERIOD_NS,
    PORT_ACT,
    PPR,
    REMOTE_IRR,
    SVR,
    TDCR,
    TMCCT,
    TMICT,
    TMR,
    TPR,
    VERSION,
    WINDOWS,
    Bench,
    Pc,
    Script,
    to_ioapic,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests.script import (
    cli,
    in8,
    ioapic_read,
    ioapic_write,
    out8,
    pit,
    snap_vector,
    sti,
    tsc_read,
    unreal,
    user_sleep_us,
    wait_ticks,
    wait_vector,
)

VECTOR = 0x45
PIN = GSI = 7

# --- the PIT --------------------------------------------------------------------------------------


@variants(
    "SET_PIT2 takes {0} of a counter as it is given, and GET_PIT2 gives it back"
    " (kvm_vm_ioctl_set_pit2 copies the channels).",
    {
        name.replace("_", "-"): (name, value)
        for name, value in (
            *(("latched_count", 0x1234), ("count_latched", 3), ("status_latched", 1)),
            *(("status", 0x9A), ("read_state", 4), ("write_state", 4), ("write_latch", 0x56)),
            *(("rw_mode", 2), ("mode", 0xFE), ("bcd", 1), ("gate", 1)),
        )
    },
)
def pit_keeps(bench: Bench, name: str, value: int) -> None:
    with bench.pc(pit=True) as pc:
        equal(getattr(pc.counter(2, **{name: value}), name), value, name)


@case("SET_PIT2 with count 0 reads back 65536, on every counter (pit_load_count).")
def pit_count_0(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        counts = [pc.counter(channel, count=0).count for channel in range(3)]
        equal(counts, [0x10000] * 3, "counts")


@case("A count beyond 16 bits is kept by SET_PIT2, nobody cuts it (kvm_pit_channel_state.count).")
def pit_count_beyond_16_bits(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        equal(pc.counter(2, count=0x12_3456).count, 0x12_3456, "count")


@case("The flags of SET_PIT2 are kept whole, known or not (kvm_vm_ioctl_set_pit2).")
def pit_flags(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        state = pc.vm.get_pit2()
        state.flags = 0xDEAD_BEEE
        pc.vm.set_pit2(state)
        equal(pc.vm.get_pit2().flags, 0xDEAD_BEEE, "flags")


@variants(
    "Counter {0} is loaded by SET_PIT2: its count_load_time becomes now, whatever is given"
    " (pit_load_count).",
    {"counter1": (1,), "counter2": (2,)},
)
def pit_load_time_is_now(bench: Bench, channel: int) -> None:
    with bench.pc(pit=True) as pc:
        before = pc.counter(channel).count_load_time
        pc.run(user_sleep_us(1_000))
        after = pc.counter(channel, count_load_time=77).count_load_time
        check(after >= before + 1_000_000, "count_load_time", f"{before} and 1 ms or more", after)


@case("Counter 0 keeps the count_load_time it is given: it has a timer instead (pit_load_count).")
def pit_load_time_of_counter0(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        equal(pc.counter(0, count_load_time=77).count_load_time, 77, "count_load_time")


@case("GET_PIT is GET_PIT2 without the flags (kvm_vm_ioctl_get_pit).")
def get_pit(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        old = bytes(pc.vm.get_pit())
        equal(old, bytes(pc.vm.get_pit2())[: len(old)], "the three channels")


@case("SET_PIT leaves the flags as they are (kvm_vm_ioctl_set_pit).")
def set_pit_leaves_the_flags(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        state = pc.vm.get_pit2()
        state.flags = 0x8000_0002
        pc.vm.set_pit2(state)
        pc.vm.set_pit(pc.vm.get_pit())
        equal(pc.vm.get_pit2().flags, 0x8000_0002, "flags")


def set_pit2_again(pc: Pc) -> None:
    """What was read is written back."""
    pc.vm.set_pit2(pc.vm.get_pit2())


@case("SET_PIT2 starts the period anew: the next tick is a full one away (create_pit_timer).")
def pit_starts_a_full_period(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(
            *(pit(COUNT), wait_ticks(2), cli(), user_sleep_us(700), tsc_read(0)),
            # a poll takes what was latched before
            *(out8(PORT_ACT, 0), out8(0x20, 0x0C), in8(0x20, 8), wait_ticks(1), tsc_read(2)),
            acts=[lambda: set_pit2_again(pc)],
        )
        took_ns = pc.elapsed_ns(got, 0, 2)
        check(took_ns >= PERIOD_NS * 0.999, "time to the next tick", f"{PERIOD_NS} ns", took_ns)


@case("A one-shot that is over ticks again after SET_PIT2, which loads it (pit_load_count).")
def pit_one_shot_starts_again(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        script = (pit(COUNT, 0x30), wait_ticks(1), out8(PORT_ACT, 0), wait_ticks(1))
        got = pc.run(*script, acts=[lambda: set_pit2_again(pc)])
        equal(got.counter, 2, "ticks")


@case("SET_PIT2 of a PIT that was never programmed starts no timer (pit_load_count, mode 0xff).")
def pit_unprogrammed_stays_silent(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        set_pit2_again(pc)
        got = pc.run(sti(), user_sleep_us(60_000), *WINDOWS)
        equal(got.counter, 0, "ticks in 60 ms")


def move_pit(bench: Bench, before: Script, after: Script) -> tuple[tuple[int, ...], Pc]:
    """`before` in one VM, its PIT into another, `after` there; what that read, and the VM."""
    with bench.pc(pit=True, pit_flags=KVM_PIT_SPEAKER_DUMMY) as pc:
        pc.run(*before)
        state = pc.vm.get_pit2()
    with bench.pc(pit=True, pit_flags=KVM_PIT_SPEAKER_DUMMY) as pc:
        pc.vm.set_pit2(state)
        return pc.run(*after).results, pc


@case("A latched count moves with the PIT: the new VM reads it first (latched_count).")
def pit_latched_count_moves(bench: Bench) -> None:
    before = (out8(0x43, 0x3A), out8(0x40, 0x34), out8(0x40, 0x12), out8(0x43, 0))
    # counter 0 stands still in mode 5: what is not latched comes after, the same
    results, _ = move_pit(
        bench, (*before, out8(0x40, 0x78), out8(0x40, 0x56)), (in8(0x40, 0), in8(0x40, 1))
    )
    equal(results[:2], (0x34, 0x12), "two reads of counter 0, which was loaded with 0x5678 since")


@case("A half-read word moves with the PIT: the new VM reads the other half (read_state).")
def pit_half_read_word_moves(bench: Bench) -> None:
    before = (out8(0x43, 0x3A), out8(0x40, 0x34), out8(0x40, 0x12), in8(0x40, 0))
    results, _ = move_pit(bench, before, (in8(0x40, 0),))
    equal(results[0], 0x12, "the next read")


@case("A half-written count moves with the PIT: the new VM completes it (write_latch).")
def pit_half_written_count_moves(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(out8(0x43, 0xB4), out8(0x42, 0x34))
        state = pc.vm.get_pit2()
    with bench.pc(pit=True) as pc:
        pc.vm.set_pit2(state)
        pc.run(out8(0x42, 0x12))
        equal(pc.counter(2).count, 0x1234, "count")


@case("Speaker data and gate move with the PIT: port 0x61 reads the same (kvm_vm_ioctl_set_pit2).")
def pit_speaker_moves(bench: Bench) -> None:
    results, _ = move_pit(bench, (out8(0x61, 3),), (in8(0x61, 0),))
    equal(results[0] & 3, 3, "bits 1:0 of port 0x61")


@case("A ticking PIT ticks on in the VM it is moved to (kvm_vm_ioctl_set_pit2 starts the timer).")
def pit_ticks_move(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(pit(COUNT), wait_ticks(2))
        state = pc.vm.get_pit2()
    with bench.pc(pit=True) as pc:
        pc.vm.set_pit2(state)
        check(pc.run(wait_ticks(3)).counter >= 3, "ticks", "3 or more", "fewer")


# --- the PICs -------------------------------------------------------------------------------------


@variants(
    "SET_IRQCHIP takes the PIC's {0} as it is given, {1:#x}, and GET_IRQCHIP gives it back"
    " (kvm_vm_ioctl_set_irqchip copies kvm_pic_state).",
    {
        name.replace("_", "-"): (name, value)
        for name, value in (
            *(("last_irr", 0xA5), ("irr", 0x28), ("imr", 0x5A), ("isr", 0x41)),
            *(("priority_add", 0xFF), ("irq_base", 0x57), ("read_reg_select", 1), ("poll", 1)),
            *(("special_mask", 1), ("init_state", 9), ("auto_eoi", 1), ("init4", 1)),
            *(("rotate_on_auto_eoi", 1), ("special_fully_nested_mode", 1), ("elcr", 0xFF)),
            ("elcr_mask", 0x12),
        )
    },
)
def pic_keeps(bench: Bench, name: str, value: int) -> None:
    with bench.pc() as pc:
        equal(pc.pic(**{name: value})[name], value, name)


@case("A request set in the slave asks the master at once (kvm_pic_update_irq).")
def slave_request_reaches_the_master(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(KVM_IRQCHIP_PIC_SLAVE, irr=0x20)
        equal(pc.pic()["irr"], 0x04, "IRR of the master")


@case("An initialisation that was half done goes on where it was (init_state).")
def pic_initialisation_goes_on(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(init_state=1, init4=1)
        pc.accesses((0x21, 0x50), (0x21, 0x04), (0x21, 0x03), (0x21, 0xA5))
        got = pc.pic()
        equal((got["irq_base"], got["auto_eoi"], got["imr"]), (0x50, 1, 0xA5), "base, AEOI, IMR")


@case("A poll that was asked for is answered after the move (picdev_read).")
def pic_poll_goes_on(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(irr=0x20, poll=1)
        equal(pc.accesses(0x20), (0x85,), "the next read of the command port")


@case(
    "The level of an edge triggered line moves in last_irr: raised again while high it is no edge"
    " (pic_set_irq1)."
)
def pic_line_level_moves(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.pic(last_irr=0x20)
        pc.vm.irq_line(5, 1)
        equal(pc.pic()["irr"], 0, "IRR after the line, known to be high, was raised")


@case("The two PICs are set one by one: the master's state leaves the slave's (chip_id).")
def pics_are_separate(bench: Bench) -> None:
    with bench.pc() as pc:
        before = pc.pic(KVM_IRQCHIP_PIC_SLAVE, imr=0x33, irq_base=0x70)
        pc.pic(imr=0xCC, irq_base=0x20)
        equal(pc.pic(KVM_IRQCHIP_PIC_SLAVE), before, "registers of the slave")


# --- the IOAPIC -----------------------------------------------------------------------------------


def ioapic(pc: Pc, change: Callable[[kvm_ioapic_state], None] | None = None) -> kvm_ioapic_state:
    """The IOAPIC's state, by KVM_GET_IRQCHIP; `change` is made before, by KVM_SET_IRQCHIP."""
    chip = pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
    if change is not None:
        change(chip.chip.ioapic)
        pc.vm.set_irqchip(chip)
    return pc.vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic


@variants(
    "SET_IRQCHIP takes the IOAPIC's {0} as it is given, and GET_IRQCHIP gives it back"
    " (kvm_set_ioapic).",
    {
        "id": ("id", 0x0B),
        "ioregsel": ("ioregsel", 0x2F),
        "base-address": ("base_address", 0xFEC1_0000),
    },
)
def ioapic_keeps(bench: Bench, name: str, value: int) -> None:
    with bench.pc() as pc:
        got = ioapic(pc, lambda state: setattr(state, name, value))
        equal(getattr(got, name), value, name)


@variants(
    "A redirection entry is kept with {0}, which a guest could not write (kvm_set_ioapic).",
    {
        "remote-irr": ("Remote IRR", MASKED | LEVEL | REMOTE_IRR | VECTOR),
        "delivery-status": ("the delivery status", MASKED | 1 << 12 | VECTOR),
        "reserved-bits": ("its reserved bits", 0xFF_FFFF_FFFE_0000 | MASKED | VECTOR),
    },
)
def ioapic_entry_is_kept(bench: Bench, what: str, entry: int) -> None:
    with bench.pc() as pc:
        pc.set_pin(PIN, entry)
        equal(pc.pin(PIN), entry, f"redirection entry {PIN}")


@case("The guest reads the register that was selected before the move (ioapic_mmio_read).")
def ioapic_selection_moves(bench: Bench) -> None:
    with bench.pc() as pc:
        ioapic(pc, lambda state: setattr(state, "ioregsel", 1))
        got = pc.run(unreal(), *ioapic_read(1, 0)[2:])
        equal(got.results[0], 0x17_0011, "the data register: version, register 1")


@variants(
    "A line that is high in the state ({0} triggered, unmasked) is an interrupt when it is set"
    " (kvm_ioapic_inject_all).",
    {"edge": ("edge", 0), "level": ("level", LEVEL)},
)
def ioapic_request_is_sent(bench: Bench, name: str, trigger: int) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()

        def change(state: kvm_ioapic_state) -> None:
            state.irr = 1 << PIN
            state.redirtbl[PIN].bits = VECTOR | trigger

        entry = ioapic(pc, change).redirtbl[PIN].bits
        equal(pc.irr(), {VECTOR}, "vectors in IRR")
        equal(entry, VECTOR | trigger | (REMOTE_IRR if trigger else 0), f"entry {PIN}")


@case(
    "A line that is high on a masked level triggered pin is kept until the unmask (kvm_set_ioapic)."
)
def ioapic_masked_level_is_kept(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()

        def change(state: kvm_ioapic_state) -> None:
            state.irr = 1 << PIN
            state.redirtbl[PIN].bits = VECTOR | LEVEL | MASKED

        equal(ioapic(pc, change).irr, 1 << PIN, "irr of the IOAPIC")
        pc.run(unreal(), ioapic_write(0x10 + 2 * PIN, VECTOR | LEVEL))
        equal(pc.irr(), {VECTOR}, "vectors in IRR after the unmask")


@case("With Remote IRR set a high line waits for the EOI, as before the move (ioapic_service).")
def ioapic_remote_irr_holds_back(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.enable_lapic()

        def change(state: kvm_ioapic_state) -> None:
            state.irr = 1 << PIN
            state.redirtbl[PIN].bits = VECTOR | LEVEL | REMOTE_IRR

        ioapic(pc, change)
        equal(pc.irr(), set(), "vectors in IRR")


# --- the local APIC -------------------------------------------------------------------------------

KEPT = {
    "id": (ID, 0x0500_0000),
    "tpr": (TPR, 0x35),
    "ldr": (LDR, 0xA500_0000),
    "dfr": (DFR, 0x0FFF_FFFF),
    "svr": (SVR, 0x1AB),
    "esr": (ESR, 0x60),
    "icr": (ICR, 0x0008_4045),
    "icr-high": (ICR_HIGH, 0x0700_0000),
    "lvtt": (LVTT, VECTOR | LVT_MASKED),
    "lvtthmr": (LVTTHMR, 0x1_0046),
    "lvtpc": (LVTPC, 0x1_0447),
    "lvt0": (LVT0, 0x0_8748),
    "lvt1": (LVT1, 0x0_0449),
    "lvterr": (LVTERR, 0x1_004A),
    "tdcr": (TDCR, DIVIDE_BY_1),
}


@variants(
    "SET_LAPIC takes register {0:#x} as it is given, {1:#x}, and GET_LAPIC gives it back"
    " (kvm_apic_set_state copies the page).",
    KEPT,
)
def lapic_keeps(bench: Bench, register: int, value: int) -> None:
    with bench.pc() as pc:
        pc.set_lapic({register: value})
        equal(pc.lapic(register), value, f"register {register:#x}")


@variants(
    "SET_LAPIC takes all of {1}, from vector 0 to 255 (kvm_apic_set_state copies the page).",
    {"irr": (IRR, "IRR"), "isr": (ISR, "ISR"), "tmr": (TMR, "TMR")},
)
def lapic_keeps_vectors(bench: Bench, first: int, name: str) -> None:
    with bench.pc() as pc:
        pc.set_lapic({first + 16 * word: 1 << word | 1 << (31 - word) for word in range(8)})
        expected = {32 * w + bit for w in range(8) for bit in (w, 31 - w)}
        equal(pc.vectors(first), expected, f"vectors in {name}")


@case("The version is KVM's, whatever SET_LAPIC says (kvm_apic_set_version).")
def lapic_version_is_not_taken(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_lapic({VERSION: 0x1234_5678})
        equal(pc.lapic(VERSION), 0x5_0014, "version")


@variants(
    "PPR is made up: with TPR {0:#x} and 0x45 in service it is {1:#x}, whatever SET_LAPIC says"
    " (apic_update_ppr).",
    {"by-tpr": (0x50, 0x50), "by-isr": (0x20, 0x40)},
)
def lapic_ppr_is_computed(bench: Bench, tpr: int, ppr: int) -> None:
    with bench.pc() as pc:
        pc.set_lapic({PPR: 0x99, TPR: tpr, SVR: ENABLED, ISR + 0x20: 1 << 5})
        pc.run()
        equal(pc.lapic(PPR), ppr, "PPR once the vCPU has run")


@case("A request that SET_LAPIC brings is taken at the next window (kvm_apic_set_state).")
def lapic_request_is_taken(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), sti(), out8(PORT_ACT, 0), *WINDOWS, snap_vector(VECTOR, 0)),
            acts=[lambda: pc.set_lapic({SVR: ENABLED, IRR + 0x20: 1 << 5})],
        )
        equal(got.results[0], 1, f"times vector {VECTOR:#x} was taken")


@case("What SET_LAPIC enables takes interrupts from then on (SVR; kvm_recalculate_apic_map).")
def lapic_set_enabled_takes_interrupts(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.set_gsi_routing([to_ioapic(GSI, PIN)])
        pc.set_pin(PIN, VECTOR)
        equal(pc.vm.irq_line_status(GSI, 1), 0, "status while disabled")
        pc.vm.irq_line(GSI, 0)
        pc.enable_lapic()
        equal(pc.vm.irq_line_status(GSI, 1), 1, "status when enabled")


@case("GET_LAPIC after SET_LAPIC of a whole page gives the page (kvm_apic_get_state).")
def lapic_page(bench: Bench) -> None:
    with bench.pc() as pc:
        registers = {**dict(KEPT.values()), LVT0: 0x1_0700}
        pc.set_lapic(registers)
        page = bytes(pc.vcpus[0].get_lapic())
        pc.vcpus[0].set_lapic(pc.vcpus[0].get_lapic())
        equal(bytes(pc.vcpus[0].get_lapic()), page, "page after it was set")


HOUR = 0xF000_0000
"""4 s in nanoseconds, as far as an initial count goes; nothing here lasts so long."""


def running_timer(pc: Pc, tmict: int, tmcct: int, mode: int = 0) -> int:
    """TMCCT right after SET_LAPIC with a timer that counts nanoseconds."""
    pc.set_lapic({SVR: ENABLED, LVTT: VECTOR | mode, TDCR: DIVIDE_BY_1, TMICT: tmict, TMCCT: tmcct})
    return pc.lapic(TMCCT)


@variants(
    "A timer that runs goes on from the current count, {1} (__start_apic_timer,"
    " limit_periodic_timer_frequency, set_target_expiration).",
    {"one-shot": (0, "one-shot"), "periodic": (LVT_PERIODIC, "periodic")},
)
def lapic_timer_goes_on(bench: Bench, mode: int, name: str) -> None:
    with bench.pc() as pc:
        left = running_timer(pc, HOUR, HOUR // 2, mode)
        check(
            HOUR // 4 < left <= HOUR // 2,
            "TMCCT after SET_LAPIC",
            f"{HOUR // 2}, less what has passed",
            left,
        )


@case("A current count above the initial one is cut to it (set_target_expiration).")
def lapic_timer_count_is_cut(bench: Bench) -> None:
    with bench.pc() as pc:
        left = running_timer(pc, HOUR // 2, HOUR)
        check(
            HOUR // 4 < left <= HOUR // 2,
            "TMCCT after SET_LAPIC",
            f"{HOUR // 2}, less what has passed",
            left,
        )


@case("With an initial count of 0 no timer runs, whatever the current count says (apic_get_tmcct).")
def lapic_timer_without_initial_count(bench: Bench) -> None:
    with bench.pc() as pc:
        equal(running_timer(pc, 0, HOUR), 0, "TMCCT after SET_LAPIC")


@case("A one-shot with nothing left is due: it comes when the vCPU runs (start_sw_period).")
def lapic_one_shot_is_due(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), out8(PORT_ACT, 0), wait_vector(VECTOR, 1)),
            acts=[lambda: running_timer(pc, HOUR, 0)],
        )
        equal(got.apic_vectors[VECTOR], 1, f"times vector {VECTOR:#x} was taken")


@case("A periodic timer with nothing left has a whole period to go (set_target_expiration).")
def lapic_periodic_goes_on_with_a_period(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), out8(PORT_ACT, 0), sti(), *WINDOWS),
            acts=[lambda: running_timer(pc, HOUR, 0, LVT_PERIODIC)],
        )
        equal(got.apic_vectors[VECTOR], 0, f"times vector {VECTOR:#x} was taken")
        left = pc.lapic(TMCCT)
        check(left > HOUR // 4, "TMCCT", f"{HOUR}, less what has passed", left)


@case("In TSC-deadline mode the initial count reads 0 (apic_set_reg of TMICT is not for it).")
def lapic_deadline_mode_has_no_count(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_lapic({SVR: ENABLED, LVTT: VECTOR | LVT_TSC_DEADLINE, TMICT: HOUR})
        equal(pc.lapic(TMICT), 0, "TMICT after SET_LAPIC")


# --- events, MP state, clock ----------------------------------------------------------------------


def events(
    pc: Pc, change: Callable[[kvm_vcpu_events], None] | None = None, flags: int = 0
) -> kvm_vcpu_events:
    """The events of vCPU 0; `change` is made before, by SET_VCPU_EVENTS with these flags."""
    got = pc.vcpus[0].get_vcpu_events()
    if change is not None:
        change(got)
        got.flags = flags
        pc.vcpus[0].set_vcpu_events(got)
        got = pc.vcpus[0].get_vcpu_events()
    return got


@case(
    "An external interrupt that was being injected is kept, with its vector (KVM_SET_VCPU_EVENTS)."
)
def injected_interrupt_is_kept(bench: Bench) -> None:
    with bench.pc() as pc:

        def change(state: kvm_vcpu_events) -> None:
            state.interrupt.injected, state.interrupt.nr = 1, VECTOR

        got = events(pc, change).interrupt
        equal((got.injected, got.nr, got.soft), (1, VECTOR, 0), "injected, nr, soft")


@case("No injected interrupt in the state ends the one there was (KVM_SET_VCPU_EVENTS).")
def injected_interrupt_is_cleared(bench: Bench) -> None:
    with bench.pc() as pc:

        def inject(state: kvm_vcpu_events) -> None:
            state.interrupt.injected, state.interrupt.nr = 1, VECTOR

        def clear(state: kvm_vcpu_events) -> None:
            state.interrupt.injected = 0

        events(pc, inject)
        equal(events(pc, clear).interrupt.injected, 0, "interrupt.injected")


@case("An interrupt that was being injected is delivered at the next entry (api.rst).")
def injected_interrupt_is_delivered(bench: Bench) -> None:
    with bench.pc() as pc:

        def inject(state: kvm_vcpu_events) -> None:
            state.interrupt.injected, state.interrupt.nr = 1, VECTOR

        got = pc.run(
            *(unreal(), sti(), out8(PORT_ACT, 0), *WINDOWS), acts=[lambda: events(pc, inject)]
        )
        equal(got.apic_vectors[VECTOR], 1, f"times vector {VECTOR:#x} was taken")


@variants(
    "With KVM_VCPUEVENT_VALID_NMI_PENDING {0} pending NMI(s) are set (KVM_SET_VCPU_EVENTS).",
    {str(count): (count,) for count in range(3)},
)
def pending_nmis_are_kept(bench: Bench, count: int) -> None:
    with bench.pc() as pc:
        pc.vcpus[0].nmi()
        got = events(
            pc,
            lambda state: setattr(state.nmi, "pending", count),
            KVM_VCPUEVENT_VALID_NMI_PENDING,
        )
        equal(got.nmi.pending, count, "nmi.pending")


@case("Without that flag nmi.pending is not looked at (KVM_SET_VCPU_EVENTS).")
def pending_nmis_without_the_flag(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vcpus[0].nmi()
        got = events(pc, lambda state: setattr(state.nmi, "pending", 0))
        equal(got.nmi.pending, 1, "nmi.pending")


@case("An NMI that is masked, as in its handler, stays so (api.rst 4.32).")
def masked_nmi_is_kept(bench: Bench) -> None:
    with bench.pc() as pc:
        got = events(pc, lambda state: setattr(state.nmi, "masked", 1))
        equal(got.nmi.masked, 1, "nmi.masked")


@case("While NMIs are masked by the state a pending one waits (api.rst 4.32).")
def masked_nmi_waits(bench: Bench) -> None:
    with bench.pc() as pc:

        def mask(state: kvm_vcpu_events) -> None:
            state.nmi.masked, state.nmi.pending = 1, 1

        got = pc.run(
            *(out8(PORT_ACT, 0), *WINDOWS),
            acts=[lambda: events(pc, mask, KVM_VCPUEVENT_VALID_NMI_PENDING)],
        )
        equal(got.nmis, 0, "NMIs taken")
        equal(events(pc).nmi.pending, 1, "nmi.pending")


@case("An NMI that was being injected is delivered at the next entry (api.rst 4.32).")
def injected_nmi_is_delivered(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(out8(PORT_ACT, 0), *WINDOWS),
            acts=[lambda: events(pc, lambda state: setattr(state.nmi, "injected", 1))],
        )
        equal(got.nmis, 1, "NMIs taken")


@variants(
    "With KVM_VCPUEVENT_VALID_SHADOW the shadow of {0} is set (KVM_SET_VCPU_EVENTS).",
    {
        "sti": ("STI", KVM_X86_SHADOW_INT_STI),
        "mov-ss": ("MOV SS", KVM_X86_SHADOW_INT_MOV_SS),
    },
)
def shadow_is_kept(bench: Bench, name: str, shadow: int) -> None:
    with bench.pc() as pc:
        got = events(
            pc,
            lambda state: setattr(state.interrupt, "shadow", shadow),
            KVM_VCPUEVENT_VALID_SHADOW,
        )
        equal(got.interrupt.shadow, shadow, "interrupt.shadow")


@variants(
    "MP state {1} reads back as it was set (KVM_SET_MP_STATE, KVM_GET_MP_STATE).",
    {
        "runnable": (KVM_MP_STATE_RUNNABLE, "runnable"),
        "uninitialized": (KVM_MP_STATE_UNINITIALIZED, "uninitialized"),
        "halted": (KVM_MP_STATE_HALTED, "halted"),
        "ap-reset-hold": (KVM_MP_STATE_AP_RESET_HOLD, "AP reset hold"),
    },
)
def mp_state_is_kept(bench: Bench, state: int, name: str) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.vcpus[1].set_mp_state(state)
        equal(pc.vcpus[1].get_mp_state(), state, "mp_state")


@case("A vCPU that was halted is woken by an interrupt after the move (KVM_MP_STATE_HALTED).")
def halted_vcpu_is_woken(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(
            *(pit(COUNT), sti(), out8(PORT_ACT, 0), wait_ticks(1)),
            acts=[lambda: pc.vcpus[0].set_mp_state(KVM_MP_STATE_HALTED)],
        )
        check(got.counter >= 1, "ticks", "1 or more", got.counter)


@case("kvmclock goes on from what SET_CLOCK says (api.rst, KVM_SET_CLOCK).")
def clock_goes_on(bench: Bench) -> None:
    with bench.pc() as pc:
        clock = pc.vm.get_clock()
        clock.clock, clock.flags = 1_000_000_000_000, 0
        pc.vm.set_clock(clock)
        got = pc.vm.get_clock().clock
        late_ns = got - 1_000_000_000_000
        check(0 <= late_ns < 10_000_000_000, "clock", "1000 s and what has passed", got)
