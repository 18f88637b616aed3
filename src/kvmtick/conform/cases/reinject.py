"""Ticks the guest could not take: KVM_REINJECT_CONTROL, acknowledgement, what drops them.

Most scripts let the PIT tick at 1 kHz for a while with IF=0 and then load mode 5, which stops the
timer and nothing else: what is pending stays, and the ticks the guest then takes can be counted
without any that come in between. How many expired is told by the TSC around load and stop, one more
or less; on a host of real time a count that does not fit is taken again, up to ATTEMPTS times, as
the host's timer may have been late.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvmtick.conform.bench import (
    COUNT,
    ENABLED,
    MASKED,
    PERIOD_NS,
    PORT_ACT,
    SVR,
    TOLERANCE,
    WINDOWS,
    Bench,
    Pc,
    Script,
    retried,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests import Needs, gsi_routing
from kvmtick.guests.script import (
    Op,
    Results,
    apic_eoi_off,
    cli,
    eoi_off,
    idle_ms,
    in8,
    ioapic_write,
    lapic_write,
    out8,
    pit,
    snap,
    snap_vector,
    spin_ms,
    sti,
    tsc_read,
    unreal,
    user_sleep_us,
    wait_ticks,
    wait_vector,
)

AT = 16
"""The first of the results of a case; before it are times."""
LEAST = 5
"""The 3 ticks before, the one that is latched, and 1 more."""
EIGHT_MS: Script = (user_sleep_us(8_000),)
STOP: Script = (pit(0, 0x3A),)
"""Counter 0 in mode 5: destroy_pit_timer, which leaves `pending` alone."""
WAIT: Script = (user_sleep_us(500), *WINDOWS)
"""Long enough for the worker to follow an acknowledgement, and what it pulsed is taken."""
DRAIN: Script = (sti(), *WINDOWS, *WAIT * 20)
"""All that is pending: at least one tick each time."""
POLL: Script = (out8(0x20, 0x0C), user_sleep_us(500))
REINJECT = {"reinject": (True,), "no-reinject": (False,)}

VECTOR = 0x40
PIN2 = 0x14
"""The low half of IOAPIC pin 2's redirection entry."""
THROUGH_IOAPIC: Script = (
    *(out8(0x21, 0xFF), unreal(), lapic_write(SVR, ENABLED), ioapic_write(PIN2, VECTOR)),
)


@dataclass(frozen=True, slots=True)
class Held:
    """What a script gave whose ticks were held back; how many expired meanwhile, and how long
    after their timer had stopped it ended.
    """

    got: Results
    least: int
    most: int
    after_ns: int


def route_to_pin_2(pc: Pc) -> None:
    """GSI 0 at the IOAPIC's pin 2, as on a PC."""
    table = gsi_routing(Needs(gsi0="ioapic-pin-2"))
    assert table is not None
    pc.vm.set_gsi_routing(table)


def held(
    bench: Bench,
    *then: Op | tuple[Op, ...],
    reinject: bool = True,
    before: Callable[[Pc], object] | None = None,
    **how: Any,
) -> Held:
    """`hold` in a VM of its own."""
    with bench.pc(pit=True, reinject=reinject) as pc:
        if before is not None:
            before(pc)
        return hold(pc, *then, **how)


def hold(
    pc: Pc,
    *then: Op | tuple[Op, ...],
    setup: Script = (),
    meanwhile: Script = EIGHT_MS,
    stop: Script = STOP,
    acts: Iterable[Callable[[Pc], object]] = (),
) -> Held:
    """Let the PIT tick for 8 ms with IF=0, stop it, and go on with `then`."""
    got = pc.run(
        *(*setup, cli(), tsc_read(0), pit(COUNT), tsc_read(2), *meanwhile),
        *(tsc_read(4), *stop, tsc_read(6), *then, tsc_read(8)),
        acts=[partial(act, pc) for act in acts],
    )
    late = 0 if pc.backend.exact else 1
    least = pc.elapsed_ns(got, 2, 4) // PERIOD_NS - late
    most = pc.elapsed_ns(got, 0, 6) // PERIOD_NS + late
    return Held(got, least, most, pc.elapsed_ns(got, 4, 8))


def ticks(got: Results) -> int:
    """Ticks that came through the PIC."""
    return got.counter


def vector_40s(got: Results) -> int:
    """Ticks that came through the IOAPIC."""
    return got.apic_vectors[VECTOR]


@retried
def delivers_all(
    bench: Bench, play: Callable[[], Held], taken: Callable[[Results], int] = ticks
) -> None:
    """What the guest takes must be all that expired."""
    what = play()
    got = taken(what.got)
    expected = f"{what.least} to {what.most}, all that expired"
    check(what.least <= got <= what.most, "ticks", expected, got)


# --- what is held back ----------------------------------------------------------------------------


@case(
    "With reinjection the ticks of 8 ms with IF=0 are all delivered later (pit_do_work, pending)."
)
def all_are_delivered(bench: Bench) -> None:
    delivers_all(bench, lambda: held(bench, *DRAIN))


@case("Without reinjection they are lost but for one, which the PIC's IRR holds (pit_do_work).")
def one_is_latched(bench: Bench) -> None:
    equal(held(bench, *DRAIN, reinject=False).got.counter, 1, "ticks after 8 ms with IF=0")


@case("Reinjection is on unless it is turned off (kvm_create_pit: kvm_pit_set_reinject(true)).")
def on_by_default(bench: Bench) -> None:
    def play() -> Held:
        with bench.pc() as pc:
            pc.vm.create_pit2()
            return hold(pc, *DRAIN)

    delivers_all(bench, play)


@case(
    "A held back tick comes when the one before is acknowledged, not earlier: with no EOI there is"
    " one (pit_do_work looks at irq_ack)."
)
def no_eoi_is_one_tick(bench: Bench) -> None:
    equal(held(bench, *DRAIN, setup=(eoi_off(),)).got.counter, 1, "ticks without EOI")


@case(
    "Without an acknowledgement the line is not pulsed again: IRR stays 0 while the timer goes on"
    " (pit_do_work, irq_ack)."
)
def no_eoi_no_pulse(bench: Bench) -> None:
    bench.needs("tick-acknowledged-by-eoi-alone")
    with bench.pc(pit=True) as pc:
        irr, taken = irr_and_ticks_without_eoi(pc)
        equal((irr, taken), (0, 1), "IRR bit 0 and ticks, after 20 ms without EOI")


@case(
    "Without reinjection every expiry pulses the line: IRR holds one behind the one in"
    " service (pit_do_work)."
)
def no_eoi_no_reinject_latches(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        irr, taken = irr_and_ticks_without_eoi(pc)
        equal((irr, taken), (1, 1), "IRR bit 0 and ticks, after 20 ms without EOI")


def irr_and_ticks_without_eoi(pc: Pc) -> tuple[int, int]:
    """With IF=1 and the timer running."""
    got = pc.run(
        *(eoi_off(), pit(COUNT), wait_ticks(1), user_sleep_us(20_000), *WINDOWS),
        *(out8(0x20, 0x0A), in8(0x20, AT)),
    )
    return got.results[AT] & 1, got.counter


@case("Ticks that are taken and ended in time are not made up for again (kvm_pit_ack_irq counts).")
def no_tick_comes_twice(bench: Bench) -> None:
    delivers_all(bench, lambda: held(bench, *DRAIN, meanwhile=(wait_ticks(5), cli())))


# --- what acknowledges ----------------------------------------------------------------------------


@variants(
    "OCW2 = {0:#x}, {1}, acknowledges IRQ 0: each brings one held back tick (pic_clear_isr ->"
    " kvm_notify_acked_irq -> kvm_pit_ack_irq).",
    {
        "eoi": (0x20, "a non-specific EOI"),
        "specific-eoi": (0x60, "a specific EOI"),
        "rotate-eoi": (0xA0, "a rotating EOI"),
        "rotate-specific-eoi": (0xE0, "a rotating specific EOI"),
    },
)
def eoi_acknowledges(bench: Bench, command: int, name: str) -> None:
    rounds = ((cli(), out8(0x20, command), wait_ticks(1), snap(AT + n)) for n in range(1, 4))
    script = (sti(), *WINDOWS, snap(AT), *(op for each in rounds for op in each))
    got = held(bench, *script, setup=(eoi_off(),)).got
    equal(got.results[AT : AT + 4], (1, 2, 3, 4), "ticks before, and after each of three EOIs")


@case("The EOI of another pin acknowledges nothing of IRQ 0 (kvm_notify_acked_irq, by GSI).")
def eoi_of_another_pin(bench: Bench) -> None:
    script = (sti(), *WINDOWS, out8(0x20, 0x65), *WAIT, *WAIT)
    got = held(bench, *script, setup=(eoi_off(),)).got
    equal(got.counter, 1, "ticks after a specific EOI of IR5")


@case("Automatic EOI acknowledges at INTA: all ticks come without the guest's EOI (pic_intack).")
def aeoi_acknowledges(bench: Bench) -> None:
    aeoi = tuple(out8(0x20 + (n > 0), icw) for n, icw in enumerate((0x11, 0x20, 0x04, 0x03, 0xFE)))
    delivers_all(bench, lambda: held(bench, *DRAIN, setup=(*aeoi, eoi_off())))


@case(
    "A poll acknowledges: poll after poll finds the next tick, until none is left (pic_poll_read)."
)
def poll_acknowledges(bench: Bench) -> None:
    polls = tuple((*POLL, in8(0x20, AT + n)) for n in range(20))

    def found(got: Results) -> int:
        return got.results[AT : AT + 20].count(0x80)

    script: Script = tuple(op for each in polls for op in each)
    delivers_all(bench, lambda: held(bench, *script), taken=found)


@case(
    "ICW1 acknowledges the request it forgets, or the PIT would wait for ever: the next tick is"
    " pulsed (pic_ioport_write -> pic_clear_isr)."
)
def icw1_acknowledges(bench: Bench) -> None:
    icws = (out8(0x20, 0x11), *(out8(0x21, icw) for icw in (0x20, 0x04, 0x01, 0xFE)))
    got = held(bench, *icws, wait_ticks(1), setup=(eoi_off(),)).got
    equal(got.counter, 1, "ticks after the initialisation")


@case("An EOI of the local APIC acknowledges the tick of its IOAPIC pin (kvm_ioapic_send_eoi).")
def ioapic_eoi_acknowledges(bench: Bench) -> None:
    delivers_all(
        bench,
        lambda: held(bench, *DRAIN, setup=THROUGH_IOAPIC, before=route_to_pin_2),
        taken=vector_40s,
    )


# --- what drops what is pending -------------------------------------------------------------------


def drops(bench: Bench, *then: Op | tuple[Op, ...], **how: Any) -> None:
    """After `then` the guest gets the one tick that the PIC holds, and no other."""

    def attempt() -> Results | None:
        # a timer that was started anew is not to expire before the end
        what = held(bench, *then, sti(), *WINDOWS, *WAIT * 4, **how)
        return None if what.after_ns > 50_000_000 else what.got

    equal(bench.quiet(attempt).counter, 1, "ticks taken, of about 8 that expired")


MASK_AND_UNMASK: Script = (out8(0x21, 0xFF), out8(0x21, 0xFE))


@case("Unmasking IRQ 0 in the PIC drops what is pending (pit_mask_notifer).")
def unmask_drops(bench: Bench) -> None:
    drops(bench, *MASK_AND_UNMASK)


@variants(
    "{0} drops nothing: the mask notifier is for a change of IRQ 0 (kvm_fire_mask_notifiers).",
    {
        "another-pin": ("Unmasking IRQ 5", (out8(0x21, 0xFE), out8(0x21, 0xDE))),
        "same-mask": ("Writing the mask as it is", (out8(0x21, 0xFE),)),
        "slave": ("Unmasking the slave's pins", (out8(0xA1, 0xFF), out8(0xA1, 0x00))),
    },
)
def other_masks_drop_nothing(bench: Bench, name: str, writes: Script) -> None:
    delivers_all(bench, lambda: held(bench, *writes, *DRAIN))


@case("Unmasking the IOAPIC pin of the tick drops what is pending (kvm_fire_mask_notifiers).")
def ioapic_unmask_drops(bench: Bench) -> None:
    again = (ioapic_write(PIN2, VECTOR | MASKED), ioapic_write(PIN2, VECTOR))
    got = held(bench, *again, *DRAIN, setup=THROUGH_IOAPIC, before=route_to_pin_2).got
    equal(vector_40s(got), 1, "ticks taken, of about 8 that expired")


@case("A new count for a mode with a timer drops what is pending (create_pit_timer).")
def reload_drops(bench: Bench) -> None:
    drops(bench, stop=(pit(0, 0x30),))


@case("A count for mode 5 stops the timer, and what is pending stays (destroy_pit_timer).")
def mode5_drops_nothing(bench: Bench) -> None:
    delivers_all(bench, lambda: held(bench, *DRAIN, stop=(pit(0x1234, 0x3A),)))


@case("KVM_SET_PIT2 loads counter 0 and so drops what is pending (kvm_vm_ioctl_set_pit2).")
def set_pit2_drops(bench: Bench) -> None:
    drops(bench, stop=(out8(PORT_ACT, 0),), acts=[lambda pc: pc.counter(0, count=0, mode=0)])


@case("KVM_SET_PIT loads counter 0 and so drops what is pending (kvm_vm_ioctl_set_pit).")
def set_pit_drops(bench: Bench) -> None:
    def set_pit(pc: Pc) -> None:
        state = pc.vm.get_pit()
        state.channels[0].count, state.channels[0].mode = 0, 0
        pc.vm.set_pit(state)

    drops(bench, stop=(out8(PORT_ACT, 0),), acts=[set_pit])


@case("Turning reinjection off drops what is pending (kvm_pit_set_reinject).")
def turning_off_drops(bench: Bench) -> None:
    drops(*(bench, out8(PORT_ACT, 0)), acts=[lambda pc: pc.vm.reinject_control(False)])


@case("Turning reinjection off and on again drops what is pending (kvm_pit_reset_reinject).")
def turning_off_and_on_drops(bench: Bench) -> None:
    def off_and_on(pc: Pc) -> None:
        pc.vm.reinject_control(False)
        pc.vm.reinject_control(True)

    drops(bench, out8(PORT_ACT, 0), acts=[off_and_on])


@case("Turning reinjection on that is on changes nothing (kvm_pit_set_reinject returns).")
def turning_on_again_drops_nothing(bench: Bench) -> None:
    acts = [lambda pc: pc.vm.reinject_control(True)]
    delivers_all(bench, lambda: held(bench, out8(PORT_ACT, 0), *DRAIN, acts=acts))


@case("Turning reinjection on recovers nothing that was lost before (kvm_pit_set_reinject).")
def turning_on_recovers_nothing(bench: Bench) -> None:
    drops(
        *(bench, out8(PORT_ACT, 0)),
        reinject=False,
        acts=[lambda pc: pc.vm.reinject_control(True)],
    )


# --- ticks that go on -----------------------------------------------------------------------------

BOTH = {"reinject": (True, "on"), "no-reinject": (False, "off")}
START: Script = (pit(COUNT), wait_ticks(3), snap(AT))
FIFTY_MS: Script = (spin_ms(4), user_sleep_us(46_000))
"""The model executes what a guest spins, so most of it is slept through."""


def equal_in_time(bench: Bench, got: int, expected: int, what: str, *, loses: bool) -> None:
    """A count of ticks at the end of a run that was on time."""
    if bench.exact:
        equal(got, expected, what)
        return
    least = LEAST if loses else expected - TOLERANCE
    check(least <= got <= expected + TOLERANCE, what, f"{least} to {expected + TOLERANCE}", got)


def taken_at_once(bench: Bench, got: Results) -> None:
    """Between the second and the third `snap` one tick was taken, or those of a late host."""
    taken = got.results[AT + 2] - got.results[AT + 1]
    equal(got.results[AT + 1], got.results[AT], "ticks at the end of what held them back")
    most = 1 if bench.exact else 1 + TOLERANCE
    check(1 <= taken <= most, "ticks at once", f"1 to {most}, not all that expired", taken)


@variants(
    "IF=0 for 50 ms, reinjection {1}: of 94 ticks in 93 ms the guest gets {2}, one a period after"
    " that (pit_do_work).",
    {"reinject": (True, "on", "all 94"), "no-reinject": (False, "off", "45")},
)
@retried
def if0_for_50_ms(bench: Bench, reinject: bool, how: str, what: str) -> None:
    blocked = (cli(), snap(AT), *FIFTY_MS, snap(AT + 1), sti())
    got = bench.on_time(*START, *blocked, idle_ms(40), reinject=reinject)
    equal(got.results[AT + 1], got.results[AT], "ticks at the end of IF=0")
    equal_in_time(bench, got.counter, 94 if reinject else 45, "ticks", loses=not reinject)


@variants(
    "A vCPU that is out of KVM_RUN for 50 ms with IF=1, reinjection {1}: of 94 ticks in 93 ms it"
    " gets {2} (pit_do_work).",
    {"reinject": (True, "on", "all 94"), "no-reinject": (False, "off", "45")},
)
@retried
def out_of_kvm_run_for_50_ms(bench: Bench, reinject: bool, how: str, what: str) -> None:
    got = bench.on_time(*START, user_sleep_us(50_000), idle_ms(40), reinject=reinject)
    equal_in_time(bench, got.counter, 94 if reinject else 45, "ticks", loses=not reinject)


@variants(
    "IRQ 0 masked in the PIC for 50 ms, reinjection {1}: one tick at the unmask, which IRR held,"
    " the rest is dropped (pit_mask_notifer).",
    BOTH,
)
@retried
def masked_for_50_ms(bench: Bench, reinject: bool, how: str) -> None:
    masked = (out8(0x21, 0xFF), snap(AT), *FIFTY_MS, snap(AT + 1), out8(0x21, 0xFE), *WINDOWS)
    got = bench.on_time(*START, *masked, snap(AT + 2), idle_ms(10), reinject=reinject)
    taken_at_once(bench, got)
    equal_in_time(bench, got.counter, 15, "ticks", loses=True)


@variants(
    "IF=0 for 30 ms, then IRQ 0 masked and unmasked, reinjection {1}: one tick at once, the rest is"
    " dropped, and ticks go on (pit_mask_notifer).",
    BOTH,
)
@retried
def if0_for_30_ms_then_unmask(bench: Bench, reinject: bool, how: str) -> None:
    blocked = (cli(), snap(AT), user_sleep_us(30_000), snap(AT + 1), *MASK_AND_UNMASK, sti())
    script = (*START, *blocked, *WINDOWS, snap(AT + 2), idle_ms(10))
    got = bench.on_time(*script, reinject=reinject)
    taken_at_once(bench, got)
    equal_in_time(bench, got.counter, 15, "ticks", loses=True)


@variants(
    "KVM_SET_PIT2 after 30 ms with IF=0, reinjection {1}: one tick at once, what is pending is"
    " lost, and ticks go on (kvm_vm_ioctl_set_pit2 loads counter 0).",
    BOTH,
)
@retried
def set_pit2_after_30_ms(bench: Bench, reinject: bool, how: str) -> None:
    got = bench.on_time(
        *(*START, cli(), snap(AT), user_sleep_us(30_500), out8(PORT_ACT, 0)),
        *(snap(AT + 1), sti(), *WINDOWS, snap(AT + 2)),
        idle_ms(10),
        reinject=reinject,
        acts=[lambda pc: pc.vm.set_pit2(pc.vm.get_pit2())],
    )
    taken_at_once(bench, got)
    equal_in_time(bench, got.counter, 15, "ticks", loses=True)


@variants(
    "A late EOI, reinjection {1}: one more tick follows, and the next waits for the next EOI"
    " (pit_do_work).",
    BOTH,
)
def late_eoi(bench: Bench, reinject: bool, how: str) -> None:
    late = (cli(), out8(0x20, 0x20), wait_ticks(1), user_sleep_us(5_000), *WINDOWS, snap(AT + 1))
    with bench.pc(pit=True, reinject=reinject) as pc:
        got = pc.run(
            *(eoi_off(), pit(COUNT), sti(), user_sleep_us(20_000), *WINDOWS, snap(AT), *late),
        )
        equal(got.results[AT : AT + 2], (1, 2), "ticks before the EOI, and 5 ms after it")


# --- through the IOAPIC ---------------------------------------------------------------------------

START_IOAPIC: Script = (
    *(*THROUGH_IOAPIC, pit(COUNT), wait_vector(VECTOR, 3), snap_vector(VECTOR, AT)),
)


@variants(
    "GSI 0 at IOAPIC pin 2, IF=0 for 50 ms, reinjection {1}: of 94 ticks in 93 ms the guest gets"
    " {2}{3} (pit_do_work).",
    {
        "reinject": (True, "on", "all 94", ""),
        "no-reinject": (False, "off", "45", ": one was in the local APIC's IRR"),
    },
)
@retried
def ioapic_if0_for_50_ms(bench: Bench, reinject: bool, how: str, what: str, why: str) -> None:
    blocked = (cli(), snap_vector(VECTOR, AT), *FIFTY_MS, snap_vector(VECTOR, AT + 1), sti())
    got = bench.on_time(
        *(*START_IOAPIC, *blocked, idle_ms(40)), reinject=reinject, before=route_to_pin_2
    )
    equal(got.results[AT + 1], got.results[AT], "ticks at the end of IF=0")
    taken = vector_40s(got)
    equal_in_time(bench, taken, 94 if reinject else 45, "ticks", loses=not reinject)


@variants(
    "GSI 0 at IOAPIC pin 2, out of KVM_RUN for 50 ms, reinjection {1}: of 94 ticks in 93 ms the"
    " guest gets {2} (pit_do_work).",
    {"reinject": (True, "on", "all 94"), "no-reinject": (False, "off", "45")},
)
@retried
def ioapic_out_of_kvm_run_for_50_ms(bench: Bench, reinject: bool, how: str, what: str) -> None:
    got = bench.on_time(
        *(*START_IOAPIC, user_sleep_us(50_000), idle_ms(40)),
        reinject=reinject,
        before=route_to_pin_2,
    )
    taken = vector_40s(got)
    equal_in_time(bench, taken, 94 if reinject else 45, "ticks", loses=not reinject)


@variants(
    "IOAPIC pin 2 masked for 50 ms, reinjection {1}: none is kept, an edge while masked is lost;"
    " the next tick comes at the next expiry (ioapic_set_irq).",
    BOTH,
)
@retried
def ioapic_masked_for_50_ms(bench: Bench, reinject: bool, how: str) -> None:
    got = bench.on_time(
        *(*START_IOAPIC, ioapic_write(PIN2, VECTOR | MASKED), *WINDOWS, snap_vector(VECTOR, AT)),
        *FIFTY_MS,
        *(snap_vector(VECTOR, AT + 1), ioapic_write(PIN2, VECTOR), *WINDOWS),
        *(snap_vector(VECTOR, AT + 2), idle_ms(10)),
        reinject=reinject,
        before=route_to_pin_2,
    )
    before, at_unmask, at_once = got.results[AT : AT + 3]
    equal(at_unmask, before, "ticks at the unmask")
    # the timer goes on, and the host may be late
    late = 0 if bench.exact else TOLERANCE
    check(at_once - at_unmask <= late, "ticks at once", 0, at_once - at_unmask)
    equal_in_time(bench, vector_40s(got), 14, "ticks", loses=True)


@variants(
    "GSI 0 at IOAPIC pin 2 and no EOI, reinjection {1}: one tick, and {3} (pit_do_work; its class"
    " stays in service, SDM 12.8.3).",
    {
        "reinject": (True, "on", set[int](), "no request behind it, for the line is not pulsed"),
        "no-reinject": (False, "off", {VECTOR}, "one request behind it in IRR"),
    },
)
def ioapic_no_eoi(bench: Bench, reinject: bool, how: str, requests: set[int], what: str) -> None:
    bench.needs("in-service-after-injection")
    with bench.pc(pit=True, reinject=reinject) as pc:
        route_to_pin_2(pc)
        got = pc.run(
            *(*THROUGH_IOAPIC, apic_eoi_off(), pit(COUNT), sti(), user_sleep_us(20_000), *WINDOWS),
            *(user_sleep_us(5_000), *WINDOWS),
        )
        equal(vector_40s(got), 1, "ticks taken in 25 ms")
        equal(pc.irr(), requests, "vectors in IRR")
