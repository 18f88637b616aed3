"""The PIT as an NMI watchdog: LVT0 in NMI mode (pit_do_work, kvm_apic_nmi_wd_deliver).

A PC's PIT also drives LINT0. KVM delivers LVT0 of every vCPU with each pulse of the PIT as soon as
one of them has it in NMI mode, unmasked. The PIT is at 1 kHz (mode 2) unless a case says otherwise.
"""

from kvmtick import guests
from kvmtick.conform.apics import ON
from kvmtick.conform.bench import (
    COUNT,
    ENABLED,
    LVT0,
    LVT1,
    LVT_EXTINT,
    LVT_MASKED,
    LVT_NMI,
    MASKED,
    PERIOD_NS,
    PORT_ACT,
    SVR,
    WINDOWS,
    Bench,
    Pc,
    Script,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests import Needs, gsi_routing
from kvmtick.guests.script import (
    NMIS_AT,
    Op,
    in8,
    ioapic_write,
    lapic_write,
    mmio_read,
    out8,
    pit,
    tsc_read,
    unreal,
    user_sleep_us,
    wait_nmis,
    wait_vector,
)

VECTOR = 0x40
PIN = 0x14
"""The low half of pin 2's redirection entry."""
NMIS = guests.LOAD_AT + NMIS_AT
"""Where the guest counts them."""
CLOSE_PIC: Script = (out8(0x21, 0xFF),)
OPEN_PIC: Script = (out8(0x21, 0xFE),)
WATCHDOG: Script = (*ON, lapic_write(LVT0, LVT_NMI))
TEN_MS: Script = (user_sleep_us(10_000), *WINDOWS)


def route_through_the_ioapic(pc: Pc) -> None:
    """GSI 0 to pin 2, as a PC's user space has it."""
    table = gsi_routing(Needs(gsi0="ioapic-pin-2"))
    assert table is not None
    pc.vm.set_gsi_routing(table)


def nmis_of(bench: Bench, *script: Op | tuple[Op, ...], reinject: bool = False) -> int:
    """NMIs the guest takes, with IF=0."""
    with bench.pc(pit=True, reinject=reinject) as pc:
        return pc.run(*script).nmis


# Without reinjection.


@variants(
    "Without reinjection every period has an NMI, IF=0 and nothing acknowledged, with the PIC {0} "
    "and the IOAPIC's pin {1} (pit_do_work).",
    {
        "pic-open": ("open", "masked", 0xFE, VECTOR | MASKED),
        "pin-open": ("masked", "open", 0xFF, VECTOR),
        "both-open": ("open", "open", 0xFE, VECTOR),
        "both-masked": ("masked", "masked", 0xFF, VECTOR | MASKED),
    },
)
def every_period_has_one(bench: Bench, pic: str, pin: str, imr: int, entry: int) -> None:
    got = bench.on_time(
        *(*WATCHDOG, out8(0x21, imr), ioapic_write(PIN, entry), pit(COUNT), wait_nmis(10)),
        reinject=False,
        before=route_through_the_ioapic,
    )
    # on a kernel the wait may sleep over one
    check(got.nmis == 10 if bench.exact else got.nmis >= 10, "NMIs", 10, got.nmis)
    equal(sum(got.vectors) + sum(got.apic_vectors), 0, "interrupts")


@case("NMIs come no more often than the PIT expires (pit_timer_fn).")
def no_more_often_than_the_timer(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(*WATCHDOG, *CLOSE_PIC, tsc_read(0), pit(COUNT), wait_nmis(10), tsc_read(2))
        took_ns = pc.elapsed_ns(got, 0, 2)
        # on a kernel the worker of one expiry may come late, and that of the next at once
        least_ns = 10 * PERIOD_NS if bench.exact else 9 * PERIOD_NS * 0.999
        check(took_ns >= least_ns, "time to the 10th NMI", f"{least_ns} ns", f"{took_ns} ns")


@case("A one-shot PIT (mode 0) gives one NMI (pit_do_work).")
def one_shot_gives_one(bench: Bench) -> None:
    script = (*WATCHDOG, *CLOSE_PIC, pit(COUNT, 0x30), *TEN_MS)
    equal(nmis_of(bench, *script), 1, "NMIs")


@case("Without a PIT's count there is no NMI (pit_load_count starts the timer).")
def without_a_count(bench: Bench) -> None:
    equal(nmis_of(bench, *WATCHDOG, *CLOSE_PIC, *TEN_MS), 0, "NMIs")


@case("A pulse of GSI 0 by user space gives no NMI: the PIT's worker does (pit_do_work).")
def user_space_pulse_gives_none(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(*WATCHDOG, *CLOSE_PIC, out8(PORT_ACT, 0), *WINDOWS, acts=[lambda: pc.pulse(0)])
        equal(got.nmis, 0, "NMIs")


@case("LVT0 in NMI mode but masked gives none (kvm_apic_local_deliver).")
def masked_gives_none(bench: Bench) -> None:
    script = (*ON, lapic_write(LVT0, LVT_NMI | LVT_MASKED), *CLOSE_PIC, pit(COUNT), *TEN_MS)
    equal(nmis_of(bench, *script), 0, "NMIs")


@case("LVT0 masked again ends them (apic_manage_nmi_watchdog).")
def masking_ends_them(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(
            *(*WATCHDOG, *CLOSE_PIC, pit(COUNT), wait_nmis(3)),
            *(lapic_write(LVT0, LVT_NMI | LVT_MASKED), *WINDOWS, mmio_read(NMIS, 0)),
            *(*TEN_MS, mmio_read(NMIS, 1)),
        )
        equal(got.results[1], got.results[0], "NMIs 10 ms after the mask, and right after it")


@case("LVT1 is not wired to the PIT: in NMI mode it gives none (pit_do_work; LINT1).")
def lvt1_gives_none(bench: Bench) -> None:
    script = (*ON, lapic_write(LVT1, LVT_NMI), *CLOSE_PIC, pit(COUNT), *TEN_MS)
    equal(nmis_of(bench, *script), 0, "NMIs")


@case(
    "A software-disabled local APIC has LVT0 masked, so there are none, although it was written in "
    "NMI mode (SDM vol. 3A 12.4.7.2; kvm_apic_local_deliver)."
)
def software_disabled_gives_none(bench: Bench) -> None:
    script = (unreal(), lapic_write(SVR, 0xFF), lapic_write(LVT0, LVT_NMI))
    equal(nmis_of(bench, *script, *CLOSE_PIC, pit(COUNT), *TEN_MS), 0, "NMIs")


@case(
    "KVM_SET_LAPIC with LVT0 in NMI mode makes the watchdog as the guest does (kvm_apic_set_state)."
)
def set_lapic_makes_a_watchdog(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        pc.set_lapic({SVR: ENABLED, LVT0: LVT_NMI})
        got = pc.run(*CLOSE_PIC, pit(COUNT), wait_nmis(2))
        check(got.nmis >= 2, "NMIs", "2 or more", got.nmis)


# Every vCPU's LVT0.


@variants(
    "With the watchdog of vCPU 0 LVT0 of vCPU 1 is delivered as well; {0}: {1} "
    "(kvm_apic_nmi_wd_deliver).",
    {
        "nmi": ("in NMI mode", "an NMI, two wait at most", LVT_NMI, set(), 2),
        "fixed": ("in fixed mode", "its vector", 0x45, {0x45}, 0),
        "fixed-masked": ("in fixed mode, masked", "nothing", 0x45 | LVT_MASKED, set(), 0),
        "extint": ("in ExtINT mode", "nothing", LVT_EXTINT, set(), 0),
        "extint-masked": ("in ExtINT mode, masked", "nothing", LVT_EXTINT | LVT_MASKED, set(), 0),
    },
)
def lvt0_of_another_vcpu(
    bench: Bench, what: str, does: str, lvt0: int, requests: set[int], nmis: int
) -> None:
    with bench.pc(pit=True, vcpus=2, reinject=False) as pc:
        pc.set_lapic({SVR: ENABLED, LVT0: lvt0}, 1)
        pc.run(*WATCHDOG, *CLOSE_PIC, pit(COUNT), wait_nmis(3))
        equal(pc.irr(1), requests, "IRR of vCPU 1")
        equal(pc.vcpus[1].get_vcpu_events().nmi.pending, nmis, "pending NMIs of vCPU 1")


@case("LVT0 in fixed mode alone is no watchdog: it requests nothing (vapics_in_nmi_mode).")
def fixed_mode_alone(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        pc.run(*ON, lapic_write(LVT0, 0x45), *CLOSE_PIC, pit(COUNT), *TEN_MS)
        equal(pc.irr(), set(), "IRR")


# With reinjection a pulse waits for the acknowledgement of the one before.


@variants(
    "With reinjection and {0} there is one NMI ever: nobody acknowledges (pit_do_work: irq_ack).",
    {"irq-0-not-taken": ("IRQ 0 never taken", 0xFE), "pic-masked": ("the PIC masked", 0xFF)},
)
def reinjection_without_ack_gives_one(bench: Bench, what: str, imr: int) -> None:
    script = (*WATCHDOG, out8(0x21, imr), pit(COUNT), *TEN_MS)
    equal(nmis_of(bench, *script, reinject=True), 1, "NMIs")


@case(
    "With reinjection each tick acknowledged at the IOAPIC's pin is an NMI, too (kvm_pit_ack_irq)."
)
def goes_on_with_the_ioapics_ack(bench: Bench) -> None:
    got = bench.on_time(
        *(*WATCHDOG, *CLOSE_PIC, ioapic_write(PIN, VECTOR), pit(COUNT), wait_vector(VECTOR, 10)),
        before=route_through_the_ioapic,
    )
    # on a kernel the last pulse may be under way
    off, taken = 0 if bench.exact else 1, got.apic_vectors[VECTOR]
    check(
        abs(got.nmis - taken) <= off, "NMIs", f"{taken} as interrupts, {off} off at most", got.nmis
    )


@case(
    "A poll of the PIC acknowledges IRQ 0 with IF=0, and so lets the next NMI come (pic_poll_read)."
)
def goes_on_with_polls(bench: Bench) -> None:
    polls: list[Op | tuple[Op, ...]] = []
    for n in range(1, 6):
        polls += [user_sleep_us(4_000), *WINDOWS, out8(0x20, 0x0C), in8(0x20, n)]
    with bench.pc(pit=True) as pc:
        got = pc.run(*WATCHDOG, *OPEN_PIC, pit(COUNT), *polls, *TEN_MS)
        equal(got.results[1:6], (0x80,) * 5, "answers of the polls")
        # after the last poll one more
        equal(got.nmis, 6, "NMIs")
