"""The local APIC's timer (SDM vol. 3A 12.5.4; arch/x86/kvm/lapic.c).

KVM's bus clock has 1 GHz: at divide 1 a count is a nanosecond. Times are the guest's, by its TSC,
and bounds come from reading that before and after. On the model they are exact. On a kernel a timer
is never early, but for `SKEW`; how late it is says nothing of KVM, so nothing is asked about that
but where many tries leave one that must have been quick.
"""

from itertools import pairwise

from kvmtick.abi.caps import KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_X86_APIC_BUS_CYCLES_NS
from kvmtick.conform.apics import ON as LAPIC_ON
from kvmtick.conform.apics import sends
from kvmtick.conform.bench import (
    DIVIDE_BY_1,
    ENABLED,
    LVT_MASKED,
    LVT_PERIODIC,
    LVT_TSC_DEADLINE,
    LVTT,
    MSR_APIC_BASE,
    MSR_TSC,
    MSR_TSC_DEADLINE,
    SVR,
    TDCR,
    TMCCT,
    TMICT,
    WINDOWS,
    X2APIC_BASE,
    Bench,
    Pc,
    Script,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests.script import (
    Op,
    Results,
    lapic_read,
    lapic_write,
    rdmsr,
    snap_vector,
    spin_ms,
    sti,
    tsc_read,
    unreal,
    user_sleep_us,
    wait_vector,
    wrmsr,
)

VECTOR, OTHER_VECTOR = 0x4E, 0x52
CLAMP_NS = 200_000
SECOND = 1_000_000_000
"""As a count at divide 1."""
SOON, LONG = 300_000, 2 * SECOND
ARMED = 20_000_000
"""Nothing expires before the guest has written the next register, on a busy host either."""
PAST_ARMED: Script = (sti(), user_sleep_us(ARMED // 1000 + 1_000), *WINDOWS)
SKEW = 0.001
"""The host disciplines its clock, but not the TSC."""
LATE_NS = 1_000
"""The model's guest takes an interrupt and reads the TSC within that."""
ON: Script = (*LAPIC_ON, lapic_write(TDCR, DIVIDE_BY_1))
SETTLE: Script = (user_sleep_us(1_000), *WINDOWS)
"""Out of the guest until what is due has come, then in it to take it."""


def timer(mode: int, count: int) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Start it; `mode` is that of LVTT."""
    return lapic_write(LVTT, mode | VECTOR), lapic_write(TMICT, count)


def took(bench: Bench, got_ns: float, least_ns: int, what: str) -> None:
    """A time that must be `least_ns`: the model's to LATE_NS, a kernel's or more."""
    low_ns = least_ns if bench.exact else least_ns * (1 - SKEW)
    high_ns = least_ns + LATE_NS if bench.exact else float("inf")
    check(low_ns <= got_ns < high_ns, what, f"{low_ns} to {high_ns} ns", f"{got_ns} ns")


def counted(bench: Bench, given: Script, count_ns: int) -> None:
    """TMCCT goes down by 1 every `count_ns`."""
    with bench.pc() as pc:
        count_goes(bench, pc, given, count_ns)


def count_goes(bench: Bench, pc: Pc, given: Script, count_ns: int) -> None:
    """The same on a given machine."""
    got = pc.run(
        *(*LAPIC_ON, *given, lapic_write(TMICT, 0xFFFF_FFFF), tsc_read(0), lapic_read(TMCCT, 2)),
        *(tsc_read(3), user_sleep_us(2_000), tsc_read(5), lapic_read(TMCCT, 7), tsc_read(8)),
    )
    gone_ns = (got.results[2] - got.results[7]) * count_ns
    slack_ns = 2 * count_ns + (0 if bench.exact else SKEW * gone_ns)
    low_ns, high_ns = pc.elapsed_ns(got, 3, 5) - slack_ns, pc.elapsed_ns(got, 0, 8) + slack_ns
    check(
        low_ns <= gone_ns <= high_ns,
        f"what the count lost, in ns at {count_ns} ns a count",
        f"{low_ns:.0f} to {high_ns:.0f}",
        gone_ns,
    )


# Counting.


@variants(
    "With divide configuration {0:#x} the count goes down every {1} ns: the bus clock is 1 GHz "
    "(SDM figure 12-10; update_divide_count).",
    {
        f"{divisor}": (code, divisor)
        for code, divisor in (
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (0xA, 128),
            (0xB, 1),
        )
    },
)
def divide_by(bench: Bench, code: int, divisor: int) -> None:
    counted(bench, (lapic_write(TDCR, code), lapic_write(LVTT, VECTOR)), divisor)


@variants(
    "The count runs while the LVT is masked, in {0} mode (SDM 12.5.4; apic_get_tmcct).",
    {"one-shot": ("one-shot", 0), "periodic": ("periodic", LVT_PERIODIC)},
)
def count_runs_while_masked(bench: Bench, name: str, mode: int) -> None:
    given = (lapic_write(TDCR, DIVIDE_BY_1), lapic_write(LVTT, LVT_MASKED | mode | VECTOR))
    counted(bench, given, 1)


@variants(
    "KVM_CAP_X86_APIC_BUS_CYCLES_NS makes a bus cycle {0} ns long (api.rst 7.38; tmict_to_ns).",
    {"10-ns": (10,), "3-ns": (3,)},
)
def bus_cycle_of(bench: Bench, cycle_ns: int) -> None:
    with bench.vm() as vm:
        vm.create_irqchip()
        vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, cycle_ns)
        pc = Pc(bench, vm, [vm.create_vcpu(0)])
        count_goes(bench, pc, (lapic_write(TDCR, DIVIDE_BY_1), lapic_write(LVTT, VECTOR)), cycle_ns)


@case("Nothing counts before an initial count is written: TMCCT is 0 (SDM 12.5.4).")
def without_initial_count(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, lapic_write(LVTT, VECTOR), sti(), *SETTLE, lapic_read(TMCCT, 0))
        equal((got.results[0], got.apic_vectors[VECTOR]), (0, 0), "TMCCT, interrupts")


@case("An initial count of 0 stops the timer (SDM 12.5.4).")
def initial_count_0_stops(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(0, ARMED), lapic_write(TMICT, 0), lapic_read(TMCCT, 0)),
            *PAST_ARMED,
        )
        equal((got.results[0], got.apic_vectors[VECTOR]), (0, 0), "TMCCT, interrupts")


@case("Writing the initial count starts the count anew from there (SDM 12.5.4).")
def initial_count_restarts(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(0, LONG), lapic_write(TMICT, SECOND), lapic_read(TMCCT, 0)),
            lapic_read(TMICT, 1),
        )
        check(0 < got.results[0] <= SECOND, "TMCCT", f"1 to {SECOND}", got.results[0])
        equal(got.results[1], SECOND, "TMICT")


@case(
    "The divisor can change under a running count, which stays as it is (SDM 12.5.4: KVM scales "
    "what remains; update_target_expiration)."
)
def new_divisor_keeps_the_count(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(0, LONG), lapic_write(TDCR, 9), lapic_read(TMCCT, 0)),
        )
        # 64 ns a count: a second of delay is 1.6e7 counts
        gone = LONG - got.results[0]
        check(0 <= gone < SECOND, "what the count lost", "less than half", gone)


# One-shot and periodic.


@case("A one-shot timer interrupts when its count is over, not before (SDM 12.5.4).")
def one_shot_is_on_time(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, tsc_read(0), *timer(0, 500_000), wait_vector(VECTOR, 1), tsc_read(2))
        took(bench, pc.elapsed_ns(got, 0, 2), 500_000, "time to the interrupt")


@case("A one-shot timer interrupts once, and its count stays 0 (SDM 12.5.4).")
def one_shot_fires_once(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(0, SOON), wait_vector(VECTOR, 1), lapic_read(TMCCT, 0)),
            *(lapic_read(TMICT, 1), *SETTLE, snap_vector(VECTOR, 2)),
        )
        equal(got.results[:3], (0, SOON, 1), "TMCCT, TMICT, interrupts")


@case("A periodic timer interrupts every period (SDM 12.5.4).")
def periodic_fires_every_period(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, tsc_read(0), *timer(LVT_PERIODIC, 500_000), wait_vector(VECTOR, 10)),
            tsc_read(2),
        )
        took(bench, pc.elapsed_ns(got, 0, 2), 10 * 500_000, "time to the 10th interrupt")


@case("The periodic count reloads: it never reads more than the initial count (SDM 12.5.4).")
def periodic_count_reloads(bench: Bench) -> None:
    with bench.pc() as pc:
        reads = tuple((user_sleep_us(170), *lapic_read(TMCCT, n)) for n in range(20))
        got = pc.run(*ON, *timer(LVT_PERIODIC | LVT_MASKED, 500_000), *reads).results[:20]
        check(all(count <= 500_000 for count in got), "TMCCT", "at most 500000", got)
        check(any(later > earlier for earlier, later in pairwise(got)), "TMCCT", "a reload", got)


@case("Writing 0 ends a periodic timer (SDM 12.5.4).")
def periodic_is_ended_by_0(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(LVT_PERIODIC, SOON), wait_vector(VECTOR, 2), lapic_write(TMICT, 0)),
            *(*WINDOWS, snap_vector(VECTOR, 0), *SETTLE, snap_vector(VECTOR, 1)),
        )
        equal(got.results[1], got.results[0], "interrupts a millisecond later")


@case(
    "A period below 200 us is raised to 200 us (min_timer_period_us; "
    "limit_periodic_timer_frequency)."
)
def short_period_is_raised(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, tsc_read(0), *timer(LVT_PERIODIC, 1000), wait_vector(VECTOR, 20), tsc_read(2)),
        )
        took(bench, pc.elapsed_ns(got, 0, 2), 20 * CLAMP_NS, "time to the 20th interrupt")


@case("A one-shot below 200 us is as short as it was asked to be (limit_periodic_timer_frequency).")
def short_one_shot_is_not_raised(bench: Bench) -> None:
    count, shots = 10_000, 20

    def quickest_ns() -> float | None:
        with bench.pc() as pc:
            script: list[Op | tuple[Op, ...]] = []
            for n in range(shots):
                script += [tsc_read(4 * n), lapic_write(TMICT, count), wait_vector(VECTOR, n + 1)]
                script += [tsc_read(4 * n + 2)]
            got = pc.run(*ON, lapic_write(LVTT, VECTOR), *script)
            quickest = min(pc.elapsed_ns(got, 4 * n, 4 * n + 2) for n in range(shots))
            return quickest if bench.exact or quickest < CLAMP_NS else None

    # a busy host is never quick; a clamp would be as late every time
    took_ns = bench.quiet(quickest_ns)
    check(count * (1 - SKEW) <= took_ns < CLAMP_NS, "quickest of 20", "10 to 200 us", took_ns)


@case(
    "A timer set from one-shot to periodic without a new count goes on and then repeats (SDM "
    "12.5.4.1 has no stop for it; apic_update_lvtt)."
)
def one_shot_becomes_periodic(bench: Bench) -> None:
    count = 2_000_000

    def attempt() -> Results | None:
        with bench.pc() as pc:
            got = pc.run(
                *(*ON, tsc_read(0), *timer(0, count), lapic_write(LVTT, LVT_PERIODIC | VECTOR)),
                *(tsc_read(2), sti(), user_sleep_us(5 * count // 1000), *WINDOWS),
                *(user_sleep_us(2 * count // 1000), *WINDOWS, lapic_read(TMICT, 4)),
            )
            return got if pc.elapsed_ns(got, 0, 2) < count else None

    got = bench.quiet(attempt)
    check(got.apic_vectors[VECTOR] >= 2, "interrupts", "2 or more", got.apic_vectors[VECTOR])
    equal(got.results[4], count, "TMICT")


@case("The interrupt has the vector of its delivery, not that of when it was armed (SDM 12.5.1).")
def vector_is_that_of_the_delivery(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(LVT_MASKED, SOON), lapic_write(LVTT, OTHER_VECTOR)),
            *(wait_vector(OTHER_VECTOR, 1), snap_vector(VECTOR, 0)),
        )
        equal(got.results[0], 0, "interrupts of the first vector")


@case("The timer's interrupt wakes a HLT (SDM 12.5.4; vol. 2, HLT).")
def wakes_hlt(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, *timer(0, SOON), wait_vector(VECTOR, 1))
        equal(got.apic_vectors[VECTOR], 1, "interrupts")


@case("A timer whose LVT is masked all the time makes no interrupt (SDM 12.5.1).")
def masked_expiry_is_no_interrupt(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, *timer(LVT_MASKED, SOON), sti(), *SETTLE, lapic_read(TMCCT, 0))
        equal((got.results[0], got.apic_vectors[VECTOR]), (0, 0), "TMCCT, interrupts")
        equal(pc.irr(), set(), "IRR")


@case(
    "An expiry while the LVT is masked is kept, and comes with the unmask: KVM's way "
    "(kvm_inject_apic_timer_irqs, apic_has_pending_timer; hardware would have lost it)."
)
def masked_expiry_comes_with_the_unmask(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(LVT_MASKED, SOON), sti(), *SETTLE, snap_vector(VECTOR, 0)),
            *(lapic_write(LVTT, VECTOR), spin_ms(1), *WINDOWS, snap_vector(VECTOR, 1)),
        )
        equal(got.results[:2], (0, 1), "interrupts before and after the unmask")


@case(
    "Periods that pass while the LVT is masked are not made up for (apic_timer_expired: pending)."
)
def masked_periods_are_not_made_up_for(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(
                *ON,
                *timer(LVT_PERIODIC | LVT_MASKED, CLAMP_NS),
                user_sleep_us(10 * CLAMP_NS // 1000),
            ),
            *(tsc_read(0), lapic_write(LVTT, LVT_PERIODIC | VECTOR), wait_vector(VECTOR, 6)),
            tsc_read(2),
        )
        took_ns = pc.elapsed_ns(got, 0, 2)
        # the one that waits comes at once, another within a period, four in four more
        least_ns = 4 * CLAMP_NS * (1 - SKEW)
        check(took_ns > least_ns, "time to the 6th interrupt", f"{least_ns} ns", f"{took_ns} ns")


@case("Expiries while IF is 0 are one interrupt: IRR has one bit (SDM 12.8.4).")
def expiries_with_if_0_are_one(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(LVT_PERIODIC, SOON), *WINDOWS, user_sleep_us(2_000), *WINDOWS),
            *(lapic_write(LVTT, LVT_PERIODIC | LVT_MASKED | VECTOR), sti(), *WINDOWS),
            snap_vector(VECTOR, 0),
        )
        equal(got.results[0], 1, "interrupts")


@case(
    "Software disable masks the timer and drops an expiry that waits (SDM 12.4.7.2; apic_set_spiv)."
)
def software_disable_drops_the_expiry(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, *timer(LVT_MASKED, SOON), user_sleep_us(1_000), lapic_write(SVR, 0xFF)),
            *(lapic_write(SVR, ENABLED), lapic_write(LVTT, VECTOR), sti(), spin_ms(1), *WINDOWS),
            snap_vector(VECTOR, 0),
        )
        equal(got.results[0], 0, "interrupts")


@case("A timer vector below 16 is never delivered (SDM 12.5.2, 12.8.4).")
def illegal_vector(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.run(*ON, lapic_write(LVTT, 15), lapic_write(TMICT, SOON), sti(), *SETTLE)
        equal(pc.irr(), {15}, "IRR")


@case("INIT stops the timer (SDM 12.4.7.3; kvm_lapic_reset).")
def init_stops_it(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.set_lapic({SVR: ENABLED, TDCR: DIVIDE_BY_1, LVTT: VECTOR, TMICT: LONG, TMCCT: LONG}, 1)
        check(pc.lapic(TMCCT, 1) > 0, "TMCCT before", "more than 0", pc.lapic(TMCCT, 1))
        pc.run(*ON, sends(0x4500, 1 << 24))
        pc.vcpus[1].get_mp_state()
        equal((pc.lapic(TMICT, 1), pc.lapic(TMCCT, 1)), (0, 0), "TMICT, TMCCT after INIT")


@case("The timer works by its MSRs in x2APIC mode (SDM table 12-6: 0x832, 0x838, 0x839, 0x83e).")
def x2apic_timer(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), wrmsr(MSR_APIC_BASE, X2APIC_BASE), wrmsr(0x80F, ENABLED)),
            *(wrmsr(0x83E, DIVIDE_BY_1), wrmsr(0x832, VECTOR), wrmsr(0x838, LONG), rdmsr(0x839, 0)),
            *(wrmsr(0x838, SOON), wait_vector(VECTOR, 1)),
        )
        check(0 < got.results[0] <= LONG, "TMCCT", f"1 to {LONG}", got.results[0])
        equal((got.apic_vectors[VECTOR], got.faults), (1, 0), "interrupts, faults")


# TSC deadline.


def cycles(pc: Pc, ns: int) -> int:
    """TSC cycles."""
    return ns * pc.tsc_khz // 1_000_000


DEADLINE: Script = (*ON, lapic_write(LVTT, LVT_TSC_DEADLINE | VECTOR))


@case("A TSC deadline interrupts when the TSC reaches it, not before (SDM 12.5.4.1).")
def deadline_is_on_time(bench: Bench) -> None:
    with bench.pc() as pc:
        at = cycles(pc, 10_000_000)
        got = pc.run(
            *(*DEADLINE, wrmsr(MSR_TSC, 0), wrmsr(MSR_TSC_DEADLINE, at)),
            *(wait_vector(VECTOR, 1), tsc_read(0)),
        )
        reached = got.results[0] | got.results[1] << 32
        took(bench, reached * 1e6 / pc.tsc_khz, 10_000_000, "TSC after the interrupt, in ns")


@case("IA32_TSC_DEADLINE reads what was written until it fires, and 0 after (SDM 12.5.4.1).")
def deadline_reads_0_after_it_fired(bench: Bench) -> None:
    with bench.pc() as pc:
        at = cycles(pc, 50_000_000)
        got = pc.run(
            *(
                *DEADLINE,
                wrmsr(MSR_TSC, 0),
                wrmsr(MSR_TSC_DEADLINE, at),
                rdmsr(MSR_TSC_DEADLINE, 0),
            ),
            *(wrmsr(MSR_TSC_DEADLINE, 1), sti(), *WINDOWS, rdmsr(MSR_TSC_DEADLINE, 2)),
            snap_vector(VECTOR, 4),
        )
        equal(got.results[0] | got.results[1] << 32, at, "IA32_TSC_DEADLINE before")
        equal(got.results[2:5], (0, 0, 1), "IA32_TSC_DEADLINE after, interrupts")


@case("A deadline fires once (SDM 12.5.4.1).")
def deadline_fires_once(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*DEADLINE, wrmsr(MSR_TSC, 0), wrmsr(MSR_TSC_DEADLINE, cycles(pc, SOON))),
            *(wait_vector(VECTOR, 1), *SETTLE, snap_vector(VECTOR, 0)),
        )
        equal(got.results[0], 1, "interrupts")


@case("A deadline in the past fires at once (SDM 12.5.4.1).")
def past_deadline_fires_at_once(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*DEADLINE, wrmsr(MSR_TSC, 1 << 40), sti(), wrmsr(MSR_TSC_DEADLINE, 1), *WINDOWS),
            snap_vector(VECTOR, 0),
        )
        equal(got.results[0], 1, "interrupts")


@case("Writing 0 to IA32_TSC_DEADLINE disarms the timer (SDM 12.5.4.1).")
def deadline_0_disarms(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*DEADLINE, wrmsr(MSR_TSC, 0), wrmsr(MSR_TSC_DEADLINE, cycles(pc, ARMED))),
            *(wrmsr(MSR_TSC_DEADLINE, 0), rdmsr(MSR_TSC_DEADLINE, 0)),
            *PAST_ARMED,
        )
        equal((*got.results[:2], got.apic_vectors[VECTOR]), (0, 0, 0), "MSR (2), interrupts")


@case("A new deadline replaces the one that was armed (SDM 12.5.4.1).")
def new_deadline_replaces_the_old(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*DEADLINE, wrmsr(MSR_TSC, 0), wrmsr(MSR_TSC_DEADLINE, cycles(pc, ARMED))),
            *(wrmsr(MSR_TSC_DEADLINE, cycles(pc, 2 * ARMED)), wait_vector(VECTOR, 1)),
            tsc_read(0),
        )
        reached = got.results[0] | got.results[1] << 32
        took(bench, reached * 1e6 / pc.tsc_khz, 2 * ARMED, "TSC after the interrupt, in ns")


@case(
    "In TSC-deadline mode writes to the initial count are ignored, and TMCCT is 0 (SDM 12.5.4.1)."
)
def initial_count_in_deadline_mode(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*DEADLINE, lapic_write(TMICT, 100_000), lapic_read(TMICT, 0), lapic_read(TMCCT, 1)),
            *(sti(), *SETTLE),
        )
        equal((*got.results[:2], got.apic_vectors[VECTOR]), (0, 0, 0), "TMICT, TMCCT, interrupts")


@variants(
    "In {0} mode writes to IA32_TSC_DEADLINE are ignored and it reads 0 (SDM 12.5.4.1).",
    {"one-shot": ("one-shot", 0), "periodic": ("periodic", LVT_PERIODIC)},
)
def deadline_msr_in(bench: Bench, name: str, mode: int) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(LVTT, mode | VECTOR), wrmsr(MSR_TSC_DEADLINE, 1)),
            *(rdmsr(MSR_TSC_DEADLINE, 0), sti(), *WINDOWS),
        )
        equal(
            (*got.results[:2], got.apic_vectors[VECTOR], got.faults),
            (0, 0, 0, 0),
            "MSR (2), interrupts, faults",
        )


@variants(
    "{0} stops what was armed before (SDM 12.5.4.1: such a change disarms the timer).",
    {
        "to-deadline": ("Changing to TSC-deadline mode", 0, LVT_TSC_DEADLINE),
        "from-deadline": ("Changing from TSC-deadline mode", LVT_TSC_DEADLINE, 0),
    },
)
def change_of_mode(bench: Bench, what: str, before: int, after: int) -> None:
    with bench.pc() as pc:
        armed: tuple[Op, ...] = lapic_write(TMICT, ARMED)
        if before:
            armed = (*wrmsr(MSR_TSC, 0), *wrmsr(MSR_TSC_DEADLINE, cycles(pc, ARMED)))
        got = pc.run(
            *(*ON, lapic_write(LVTT, before | VECTOR), armed, lapic_write(LVTT, after | VECTOR)),
            *(lapic_read(TMICT, 0), rdmsr(MSR_TSC_DEADLINE, 1)),
            *PAST_ARMED,
        )
        equal(got.results[:3], (0, 0, 0), "TMICT, IA32_TSC_DEADLINE (2)")
        equal(got.apic_vectors[VECTOR], 0, "interrupts")


@case(
    "Without its CPUID bit there is no TSC-deadline mode: LVTT's bit 18 is dropped, the MSR reads "
    "0 (SDM 12.5.4.1; timer_mode_mask)."
)
def no_deadline_mode_without_cpuid(bench: Bench) -> None:
    with bench.pc(cpuid=False) as pc:
        got = pc.run(
            *(*DEADLINE, lapic_read(LVTT, 0), wrmsr(MSR_TSC_DEADLINE, 1)),
            *(rdmsr(MSR_TSC_DEADLINE, 1), sti(), *WINDOWS),
        )
        equal(got.results[:3], (VECTOR, 0, 0), "LVTT, IA32_TSC_DEADLINE (2)")
        equal((got.apic_vectors[VECTOR], got.faults), (0, 0), "interrupts, faults")


@case(
    "User space arms the deadline by KVM_SET_MSRS, as the guest does "
    "(kvm_set_lapic_tscdeadline_msr)."
)
def deadline_by_set_msrs(bench: Bench) -> None:
    with bench.pc() as pc:
        vcpu = pc.vcpus[0]
        pc.run(*DEADLINE, wrmsr(MSR_TSC, 1 << 40))
        later = (1 << 40) + cycles(pc, 20 * SECOND)
        equal(vcpu.set_msrs({MSR_TSC_DEADLINE: later}), 1, "MSRs set")
        equal(vcpu.get_msrs([MSR_TSC_DEADLINE]), {MSR_TSC_DEADLINE: later}, "read back")
        equal(vcpu.set_msrs({MSR_TSC_DEADLINE: 1}), 1, "MSRs set, to the past")
        equal(pc.run(unreal(), sti(), *SETTLE).apic_vectors[VECTOR], 1, "interrupts")


# KVM_SET_LAPIC.


@variants(
    "KVM_SET_LAPIC lets the count go on from TMCCT, in {0} mode (kvm_apic_set_state, "
    "__start_apic_timer).",
    {"one-shot": ("one-shot", 0), "periodic": ("periodic", LVT_PERIODIC)},
)
def set_lapic_restores_the_count(bench: Bench, name: str, mode: int) -> None:
    with bench.pc() as pc:
        pc.set_lapic(
            {SVR: ENABLED, TDCR: DIVIDE_BY_1, LVTT: mode | VECTOR, TMICT: 4 * SECOND, TMCCT: LONG}
        )
        count = pc.lapic(TMCCT)
        equal(pc.lapic(TMICT), 4 * SECOND, "TMICT")
        check(SECOND < count <= LONG, "TMCCT", f"{LONG} or a little less", count)
        got = pc.run(unreal(), lapic_read(TMCCT, 0))
        check(0 < got.results[0] < count, "TMCCT in the guest", f"below {count}", got.results[0])


@case("A current count above the initial one is cut to it (set_target_expiration).")
def set_lapic_cuts_the_count(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_lapic({SVR: ENABLED, TDCR: DIVIDE_BY_1, LVTT: VECTOR, TMICT: SECOND, TMCCT: LONG})
        count = pc.lapic(TMCCT)
        check(0 < count <= SECOND, "TMCCT", f"1 to {SECOND}", count)


@case(
    "A one-shot that KVM_SET_LAPIC restores with count 0 fires (set_target_expiration: it expires "
    "now)."
)
def set_lapic_with_count_0_fires(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_lapic({SVR: ENABLED, TDCR: DIVIDE_BY_1, LVTT: VECTOR, TMICT: SECOND, TMCCT: 0})
        got = pc.run(unreal(), sti(), *SETTLE)
        equal(got.apic_vectors[VECTOR], 1, "interrupts")


@case(
    "An expired timer's interrupt is in IRR once the vCPU has run on "
    "(kvm_inject_pending_timer_irqs)."
)
def request_comes_when_the_vcpu_runs(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, *timer(0, SOON), user_sleep_us(1_000), *WINDOWS, lapic_read(TMCCT, 0))
        equal((got.results[0], pc.irr()), (0, {VECTOR}), "TMCCT, IRR")


# Capabilities.


@variants(
    "KVM_CHECK_EXTENSION of {0} is {1} (api.rst; KVM's default bus clock, its TSC deadline).",
    {
        "bus-cycles": ("KVM_CAP_X86_APIC_BUS_CYCLES_NS", 1, KVM_CAP_X86_APIC_BUS_CYCLES_NS),
        "tsc-deadline": ("KVM_CAP_TSC_DEADLINE_TIMER", 1, KVM_CAP_TSC_DEADLINE_TIMER),
    },
)
def capability(bench: Bench, name: str, value: int, cap: int) -> None:
    with bench.vm() as vm:
        equal(vm.check_extension(cap), value, name)
