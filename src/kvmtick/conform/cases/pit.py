"""The PIT: counters, modes, latches, the gate, port 0x61 and the tick (8254 datasheet, i8254.c).

Where time matters the guest reads its TSC around what it does: then a counter's value has bounds,
and a host that takes its time only widens them.
"""

from collections.abc import Callable

from kvmtick.abi.structs import KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_SPEAKER_DUMMY
from kvmtick.conform.bench import (
    COUNT,
    LEAVE,
    PERIOD_NS,
    PORT_ACT,
    READ_AT,
    WINDOWS,
    Bench,
    Pc,
    Script,
    retried,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests.script import (
    Op,
    Results,
    cli,
    in8,
    out8,
    pit,
    snap,
    sti,
    tsc_read,
    user_sleep_us,
    wait_ticks,
)

HZ = 1_193_181
"""What KVM divides by (KVM_PIT_FREQ_HZ); the silicon has 1193182."""
MIN_PERIOD_NS = 200_000
"""Module parameter min_timer_period_us."""
CONTROL, SPEAKER = 0x43, 0x61
LSB, MSB, WORD = 1, 2, 3
ALL_MODES = {f"mode{mode}": (mode,) for mode in range(6)}
COUNTERS = {f"counter{channel}": (channel,) for channel in range(3)}
AT = 16
"""The first of the results of what a script looks at; before it are times."""


def control(channel: int, mode: int, access: int = WORD, bcd: int = 0) -> Op:
    """A control word."""
    return out8(CONTROL, channel << 6 | access << 4 | mode << 1 | bcd)


def data(channel: int, *values: int) -> tuple[Op, ...]:
    """Bytes to a counter's port."""
    return tuple(out8(0x40 + channel, value) for value in values)


def load(channel: int, mode: int, count: int, bcd: int = 0) -> tuple[Op, ...]:
    """Program a counter, LSB then MSB."""
    return control(channel, mode, WORD, bcd), *data(channel, count & 0xFF, count >> 8)


def latch(channel: int) -> Op:
    """The counter latch command."""
    return out8(CONTROL, channel << 6)


def read(channel: int, size: int, at: int = AT) -> tuple[Op, ...]:
    """results[at], ... = bytes from a counter's port."""
    return tuple(in8(0x40 + channel, at + n) for n in range(size))


def latch_and_read(channel: int, at: int = AT) -> tuple[Op, ...]:
    """results[at], results[at + 1] = the count as it is now."""
    return latch(channel), *read(channel, 2, at)


def status(channel: int, at: int = AT) -> tuple[Op, Op]:
    """results[at] = the status byte."""
    return out8(CONTROL, 0xE0 | 2 << channel), in8(0x40 + channel, at)


def word(got: Results, at: int = AT) -> int:
    """What `read` of two bytes gave."""
    return got.results[at] | got.results[at + 1] << 8


def counting(mode: int, count: int, clocks: int) -> int:
    """What a counter stands at so many clocks after its load (pit_get_count)."""
    if mode == 2:
        return count - clocks % count
    if mode == 3:
        return count - 2 * clocks % count
    return count - clocks & 0xFFFF


# --- after creation -------------------------------------------------------------------------------


@variants(
    "Counter {0} of a new PIT counts 65536, is in no mode (0xff), and its gate is {1}"
    " (kvm_pit_reset: gate = i != 2).",
    {"counter0": (0, 1), "counter1": (1, 1), "counter2": (2, 0)},
)
def after_creation(bench: Bench, channel: int, gate: int) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.counter(channel)
        equal((got.count, got.mode, got.gate), (0x10000, 0xFF, gate), "count, mode, gate")
        states = (got.rw_mode, got.read_state, got.write_state, got.bcd)
        equal(states, (0, 0, 0, 0), "access, read state, write state, BCD")


@case(
    "A new PIT is loaded at its creation: counters 1 and 2 have that time, counter 0, which has a"
    " timer instead, none (kvm_pit_reset, pit_load_count)."
)
def load_times_after_creation(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        times = [pc.counter(channel).count_load_time for channel in range(3)]
        equal(times[0], 0, "count_load_time of counter 0")
        check(
            0 <= times[1] <= times[2] < times[1] + 1_000_000_000,
            "count_load_time of counters 1 and 2",
            "the time of creation, twice",
            times[1:],
        )


@case("A new PIT does not tick: no timer runs before a count is loaded (create_pit_timer).")
def silent_after_creation(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(sti(), user_sleep_us(60_000), *WINDOWS)
        equal(got.counter, 0, "ticks in 60 ms, more than a period of 65536")


@case("Without a control word a counter's data port loads the low byte (pit_ioport_write).")
def unprogrammed_write_loads_the_low_byte(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(*data(2, 0x34))
        equal(pc.counter(2).count, 0x34, "count after 0x34 was written")
        pc.run(*data(2, 0x12))
        equal(pc.counter(2).count, 0x12, "count after 0x12 was written")


@case(
    "Latching a counter that was never programmed gives no latched byte: count_latched takes the"
    " access mode, and that is 0 (pit_latch_count)."
)
def unprogrammed_latch(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(latch(2))
        equal(pc.counter(2).count_latched, 0, "count_latched")


@case(
    "The status of a counter that was never programmed shows what of mode 0xff fits into the byte:"
    " bits 7:1, and OUT is lost among them (pit_latch_status)."
)
def unprogrammed_status(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        equal(pc.run(*status(0)).results[AT], 0xFE, "status byte")


# --- control words and counts ---------------------------------------------------------------------


@variants(
    "A control word with mode {0} is stored as mode {1}: X10 and X11 are modes 2 and 3 (8254"
    " datasheet, control word format).",
    {f"mode{mode}": (mode, mode - 4 if mode > 5 else mode) for mode in range(8)},
)
def control_word_stores_the_mode(bench: Bench, mode: int, stored: int) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(control(2, mode))
        equal(pc.counter(2).mode, stored, "mode")


@variants(
    "RW bits {0} set access, read state and write state: the next byte is the {1}"
    " (8254 datasheet, control word format).",
    {"lsb": (LSB, "LSB"), "msb": (MSB, "MSB"), "word": (WORD, "LSB, then the MSB")},
)
def control_word_sets_the_access(bench: Bench, access: int, first: str) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(control(2, 2, access))
        got = pc.counter(2)
        states = (got.rw_mode, got.read_state, got.write_state)
        equal(states, (access,) * 3, "access, read state, write state")


@variants(
    "{3} loads {2:#x}: the other byte is 0, and 0 is 65536 (8254 datasheet, write operations).",
    {
        "lsb": (LSB, (0x34,), 0x34, "LSB access, 34"),
        "msb": (MSB, (0x12,), 0x1200, "MSB access, 12"),
        "word": (WORD, (0x34, 0x12), 0x1234, "word access, 34 12"),
        "lsb-0": (LSB, (0,), 0x10000, "LSB access, 00"),
        "msb-0": (MSB, (0,), 0x10000, "MSB access, 00"),
        "word-0": (WORD, (0, 0), 0x10000, "word access, 00 00"),
    },
)
def count_is_loaded(
    bench: Bench, access: int, written: tuple[int, ...], count: int, how: str
) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(control(2, 2, access), *data(2, *written))
        equal(pc.counter(2).count, count, "count")


@case("The first byte of a word loads nothing, it waits in the write latch (pit_ioport_write).")
def half_a_word_loads_nothing(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(*load(2, 2, 0x1234), *data(2, 0x99))
        got = pc.counter(2)
        equal((got.count, got.write_latch), (0x1234, 0x99), "count, write latch")


@case("A control word between the bytes of a word starts the word over (8254 datasheet, RW bits).")
def control_word_restarts_the_word(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(control(2, 2), *data(2, 0x99), control(2, 2), *data(2, 0x34, 0x12))
        equal(pc.counter(2).count, 0x1234, "count")


@case(
    "The BCD bit is stored, but a count is loaded as binary: 0x1234 is 4660 (pit_load_count has no"
    " BCD; the silicon would load 1234)."
)
def bcd_loads_binary(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(*load(2, 2, 0x1234, bcd=1))
        got = pc.counter(2)
        equal((got.bcd, got.count), (1, 0x1234), "BCD, count")


@variants(
    "Counter {0} is programmed without a change to the others (8254 datasheet, SC bits).", COUNTERS
)
def counters_are_independent(bench: Bench, channel: int) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(*load(channel, 5, 0x1234))
        counts = [pc.counter(each).count for each in range(3)]
        expected = [0x1234 if each == channel else 0x10000 for each in range(3)]
        equal(counts, expected, "counts")


# --- reading --------------------------------------------------------------------------------------


@variants(
    "With {2} access every read gives that byte of the count (8254 datasheet, RW bits).",
    {"lsb": (LSB, 0x34, "LSB"), "msb": (MSB, 0x12, "MSB")},
)
def one_byte_access(bench: Bench, access: int, byte: int, name: str) -> None:
    with bench.pc(pit=True) as pc:
        # counter 0 in mode 5 has no timer and stands still
        pc.run(*load(0, 5, 0x1234), control(0, 5, access), *read(0, 2))
        got = pc.run(control(0, 5, access), *read(0, 2))
        equal(got.results[AT : AT + 2], (byte, byte), "two reads")


@case("With word access LSB and MSB alternate, read after read (8254 datasheet, read operations).")
def word_access_alternates(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(*load(0, 5, 0x1234), *read(0, 4))
        equal(got.results[AT : AT + 4], (0x34, 0x12, 0x34, 0x12), "four reads")


@case(
    "A write between the bytes of a read does not change which byte is next: reading and writing"
    " have states of their own (8254 datasheet, interleaved reads and writes)."
)
def interleaved_reads_and_writes(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        script = (*load(0, 5, 0x1234), *read(0, 1), *data(0, 0x78), *read(0, 1, AT + 1))
        got = pc.run(*script, *data(0, 0x56))
        equal(got.results[AT : AT + 2], (0x34, 0x12), "LSB and MSB around a write")
        equal(pc.counter(0).count, 0x5678, "count that was written around the read")


@case(
    "A latched count holds until it is read, while the counter goes on (8254 datasheet,"
    " counter latch command)."
)
def latch_holds(bench: Bench) -> None:
    latched: list[int] = []
    with bench.pc(pit=True) as pc:
        got = pc.run(
            *(*load(2, 0, 0xFFFF), latch(2), out8(PORT_ACT, 0), user_sleep_us(2_000)),
            *(*read(2, 2), *latch_and_read(2, AT + 2)),
            acts=[lambda: latched.append(pc.counter(2).latched_count)],
        )
    equal(word(got), latched[0], "latched count, read 2 ms later")
    check(
        word(got, AT + 2) != word(got), "the next latched count", "another one", word(got, AT + 2)
    )


@case(
    "A second latch command before the count is read is ignored (8254 datasheet, counter"
    " latch command)."
)
def second_latch_is_ignored(bench: Bench) -> None:
    latched: list[int] = []
    with bench.pc(pit=True) as pc:
        got = pc.run(
            *(*load(2, 0, 0xFFFF), latch(2), out8(PORT_ACT, 0), user_sleep_us(1_000), latch(2)),
            *read(2, 2),
            acts=[lambda: latched.append(pc.counter(2).latched_count)],
        )
    equal(word(got), latched[0], "count that was read")


@case("A latch command between the bytes of a latched count is ignored as well (pit_latch_count).")
def latch_between_the_bytes_is_ignored(bench: Bench) -> None:
    latched: list[int] = []
    with bench.pc(pit=True) as pc:
        got = pc.run(
            *(*load(2, 0, 0xFFFF), latch(2), out8(PORT_ACT, 0), *read(2, 1)),
            *(user_sleep_us(1_000), latch(2), *read(2, 1, AT + 1)),
            acts=[lambda: latched.append(pc.counter(2).latched_count)],
        )
    equal(word(got), latched[0], "count that was read")


@variants(
    "With {2} access a latched count is over after {1} read(s) (8254 datasheet, counter latch).",
    {"lsb": (LSB, 1, "LSB"), "msb": (MSB, 1, "MSB"), "word": (WORD, 2, "word")},
)
def latch_ends_with_its_last_byte(bench: Bench, access: int, size: int, name: str) -> None:
    latched: list[bool] = []
    with bench.pc(pit=True) as pc:
        look = out8(PORT_ACT, 0)
        reads = tuple((each, look) for each in read(2, size))
        pc.run(
            *(control(2, 2, access), *data(2, 0x34, 0x12)[:size], latch(2), look),
            *(op for pair in reads for op in pair),
            acts=[lambda: latched.append(pc.counter(2).count_latched != 0)],
        )
    equal(
        latched, [True] * size + [False], "whether a count is latched, before and after each read"
    )


@case(
    "The bytes of a latched count are read beside those of the counter itself: an unlatched word"
    " whose LSB was read goes on with its MSB (pit_ioport_read, count_latched and read_state)."
)
def latch_leaves_the_read_state(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        script = (*load(0, 5, 0x1234), *read(0, 1), latch(0), *read(0, 3, AT + 1))
        equal(pc.run(*script).results[AT : AT + 4], (0x34, 0x34, 0x12, 0x12), "four reads")


@variants("The latch command of counter {0} latches no other (8254 datasheet, SC bits).", COUNTERS)
def latch_selects_its_counter(bench: Bench, channel: int) -> None:
    with bench.pc(pit=True) as pc:
        loads = [op for each in range(3) for op in load(each, 5, 0x1234)]
        pc.run(*loads, latch(channel))
        latched = [pc.counter(each).count_latched != 0 for each in range(3)]
        equal(latched, [each == channel for each in range(3)], "latched counters")


SELECTIONS = {"none": 0b000, "counter0": 0b001, "counter2": 0b100, "all": 0b111}
READ_BACKS = {"count": (0xD0, 1, 0), "status": (0xE0, 0, 1), "both": (0xC0, 1, 1)}


@variants(
    "The read-back command {0:#x} latches what it says of the counters it selects, and of no other"
    " (8254 datasheet, read-back command).",
    {
        f"{what}-of-{which}": (command | selected << 1, selected, counts, statuses)
        for what, (command, counts, statuses) in READ_BACKS.items()
        for which, selected in SELECTIONS.items()
    },
)
def read_back(bench: Bench, command: int, selected: int, counts: int, statuses: int) -> None:
    with bench.pc(pit=True) as pc:
        loads = [op for each in range(3) for op in load(each, 5, 0x1234)]
        pc.run(*loads, out8(CONTROL, command))
        channels = [pc.counter(each) for each in range(3)]
        chosen = [selected >> each & 1 for each in range(3)]
        got = [(int(each.count_latched != 0), each.status_latched) for each in channels]
        equal(got, [(on & counts, on & statuses) for on in chosen], "latched counts and statuses")


@case(
    "When both are latched the status is read first, then the count (8254 datasheet,"
    " read-back command)."
)
def status_before_count(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(*load(0, 5, 0x1234), out8(CONTROL, 0xC2), *read(0, 3))
        equal(got.results[AT : AT + 3], (0x3A, 0x34, 0x12), "three reads")


@case(
    "A second status latch before the status is read is ignored (8254 datasheet, read-back"
    " command)."
)
def second_status_latch_is_ignored(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(control(0, 5), out8(CONTROL, 0xE2), control(0, 4, LSB), *status(0))
        equal(got.results[AT] & 0x7F, 0x3A, "status byte without OUT")


@case(
    "The status shows access, mode and BCD as the control word had them (8254 datasheet,"
    " status byte)."
)
def status_shows_the_control_word(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(control(2, 4, LSB, bcd=1), *status(2))
        equal(got.results[AT] & 0x3F, 0x19, "status byte, bits 5:0")


@case(
    "NULL COUNT, bit 6 of the status, is never set, not even between control word and count: KVM"
    " loads at once (pit_latch_status)."
)
def no_null_count(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(*load(2, 2, 0x1234), control(2, 2), *status(2))
        equal(got.results[AT] & 0x40, 0, "bit 6 of the status byte")


# --- what accesses are the PIT's ------------------------------------------------------------------

IN = {1: b"\xe4", 2: b"\xe5", 4: b"\x66\xe5"}
STORE_AX = b"\xa3" + READ_AT.to_bytes(2, "little")


@variants(
    "A read of {1} byte(s) at port {0:#x} is {2}: an access must lie within ports 0x40 to 0x43"
    " (pit_in_range, kvm_io_bus_read).",
    {
        f"{port:x}h-{size}": (port, size, "the PIT's" if port + size <= 0x44 else "an exit")
        for port, size in ((0x40, 4), (0x41, 4), (0x42, 2), (0x42, 4), (0x43, 1), (0x43, 2))
    },
)
def port_range(bench: Bench, port: int, size: int, whose: str) -> None:
    exits: list[int] = []
    with bench.pc(pit=True) as pc:
        pc.run_image(IN[size] + bytes((port,)) + LEAVE, {port: lambda *a: exits.append(a[1])})
    equal(exits, [] if whose == "the PIT's" else [size], "sizes of the accesses that exited")


@case("A word read from a counter gives one byte, the upper half is 0 (pit_ioport_read).")
def wide_read(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(*load(0, 5, 0x1234))
        pc.run_image(IN[2] + b"\x40" + STORE_AX + LEAVE)
        equal(int.from_bytes(pc.vm.read_memory(READ_AT, 2), "little"), 0x34, "word read at 0x40")


@case("Of a word written to a counter only the low byte is taken (pit_ioport_write).")
def wide_write(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(control(0, 5, LSB))
        pc.run_image(b"\xb8\x12\x99" + b"\xe7\x40" + LEAVE)
        equal(pc.counter(0).count, 0x12, "count after 0x9912 was written at 0x40")


@case("A read of the control port leaves the counters as they are (8254 datasheet: no operation).")
def control_port_read(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        pc.run(*load(0, 5, 0x1234), *read(0, 1))
        before = bytes(pc.counter(0))
        pc.run(in8(CONTROL, AT))
        equal(bytes(pc.counter(0)), before, "counter 0")


# --- counting -------------------------------------------------------------------------------------


def clocks_of(pc: Pc, got: Results, begin: int, end: int) -> int:
    """Input clocks between two times."""
    return pc.elapsed_ns(got, begin, end) * HZ // 1_000_000_000


def bracketed(
    pc: Pc, before: Script, origin: Script, between: Script, look: Script
) -> tuple[Results, int, int]:
    """Run, and tell how many clocks passed at least and at most from `origin` to `look`."""
    got = pc.run(
        *(*before, tsc_read(0), *origin, tsc_read(2), *between, tsc_read(4), *look, tsc_read(6))
    )
    least, most = clocks_of(pc, got, 2, 4), clocks_of(pc, got, 0, 6)
    # TSC and CLOCK_MONOTONIC may differ by 500 ppm (ntp_adjtime), and each division rounds
    return got, least - least // 1000 - 2, most + most // 1000 + 2


def looks_at_a_count(
    bench: Bench,
    count_after: Callable[[int], int],
    *,
    before: Script = (),
    origin: Script,
    between: Script,
    channel: int = 2,
    pit_flags: int = 0,
) -> None:
    """A counter must stand at `count_after(clocks since origin)`; asked after `between`."""

    def attempt() -> tuple[int, int, int] | None:
        with bench.pc(pit=True, pit_flags=pit_flags) as pc:
            got, least, most = bracketed(pc, before, origin, between, latch_and_read(channel))
            return None if most - least > 400 else (word(got), least, most)

    got, least, most = bench.quiet(attempt)
    possible = {count_after(clocks) for clocks in range(least, most + 1)}
    expected = f"the count of {least} to {most} clocks, such as {count_after(least)}"
    check(got in possible, "latched count", expected, got)


@variants(
    "In mode {0} counter {1}, loaded with 2000, counts {2} (8254 datasheet, modes; pit_get_count).",
    {
        f"mode{mode}-counter{channel}": (mode, channel, how)
        for channel in (0, 2)
        for mode, how in enumerate(
            (
                *("down and on below 0", "down and on below 0", "down and reloads"),
                *("down by twos and reloads", "down and on below 0", "down and on below 0"),
            )
        )
        if (mode, channel) != (5, 0)
    },
)
def counts(bench: Bench, mode: int, channel: int, how: str) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(mode, 2000, clocks)),
        origin=load(channel, mode, 2000),
        between=(user_sleep_us(3_000),),
        channel=channel,
    )


@case(
    "Counter 0 stands still in mode 5: it is read off its timer, and mode 5 starts none"
    " (kpit_elapsed, create_pit_timer)."
)
def counter0_stands_still_in_mode5(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(*load(0, 5, 0x1234), user_sleep_us(2_000), *latch_and_read(0))
        equal(word(got), 0x1234, "latched count after 2 ms")


@case(
    "With the BCD bit a counter counts in binary all the same (pit_get_count has no BCD; the"
    " silicon would step from 1000 to 0999)."
)
def bcd_counts_binary(bench: Bench) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(2, 0x2000, clocks)),
        origin=load(2, 2, 0x2000, bcd=1),
        between=(user_sleep_us(3_000),),
    )


@case("A new count starts counter 2 over at once, also in mode 2 (pit_load_count: load time now).")
def new_count_starts_over(bench: Bench) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(2, 0x8000, clocks)),
        before=(*load(2, 2, 0x4000), user_sleep_us(2_000)),
        origin=data(2, 0x00, 0x80),
        between=(user_sleep_us(1_000),),
    )


@case(
    "A control word alone does not start a counter over: the time since the load counts, by the"
    " rule of the new mode (pit_ioport_write stores the mode only)."
)
def control_word_changes_the_rule_only(bench: Bench) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(3, 0x8000, clocks)),
        origin=load(2, 2, 0x8000),
        between=(user_sleep_us(1_000), control(2, 3), user_sleep_us(1_000)),
    )


OUT_COUNT = 20_000
"""16.8 ms."""


@variants(
    "OUT in mode {0}: {3} (8254 datasheet, modes; pit_get_out).",
    {
        "mode0": (0, 0, 1, "low until the count is over, then high"),
        "mode1": (1, 1, 0, "high until the count is over, then low (KVM has it that way round)"),
        "mode2": (2, 0, 0, "low but for the clock at which it reloads"),
        "mode3": (3, 1, 0, "high in the first half of the period, low in the second"),
        "mode4": (4, 0, 0, "low but for the clock at which the count is over"),
        "mode5": (5, 0, 0, "low but for the clock at which the count is over"),
    },
)
def out_pin(bench: Bench, mode: int, first: int, second: int, how: str) -> None:
    late = (OUT_COUNT // 2, OUT_COUNT) if mode == 3 else (OUT_COUNT + 1, 2 * OUT_COUNT)
    wait_us = 12_000 if mode == 3 else 20_000

    def attempt() -> tuple[int, int] | None:
        with bench.pc(pit=True) as pc:
            script = (*status(2), tsc_read(8), user_sleep_us(wait_us))
            got, least, most = bracketed(
                pc, (), load(2, mode, OUT_COUNT), script, status(2, AT + 1)
            )
            disturbed = clocks_of(pc, got, 0, 8) >= OUT_COUNT // 2
            if disturbed or least < late[0] or most >= late[1]:
                return None
            return got.results[AT] >> 7, got.results[AT + 1] >> 7

    equal(bench.quiet(attempt), (first, second), "OUT at the load, and later")


@case(
    "In mode 3 the high half of an odd count is the longer one: of count 1 all is high"
    " (8254 datasheet, mode 3; pit_get_out)."
)
def out_of_an_odd_count(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(*load(2, 3, 1), *status(2))
        equal(got.results[AT] >> 7, 1, "OUT")


# --- the gate and port 0x61 -----------------------------------------------------------------------


@variants(
    "A low gate does not stop counter 2 in mode {0}: KVM has no gated counting"
    " (speaker_ioport_write; the silicon stops in modes 0, 2, 3 and 4).",
    ALL_MODES,
)
def low_gate_does_not_stop(bench: Bench, mode: int) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(mode, 0x8000, clocks)),
        before=(out8(SPEAKER, 1),),
        origin=load(2, mode, 0x8000),
        between=(out8(SPEAKER, 0), user_sleep_us(2_000)),
        pit_flags=KVM_PIT_SPEAKER_DUMMY,
    )


@variants(
    "A rising gate starts counter 2 over in mode {0} (8254 datasheet, gate pin; pit_set_gate).",
    {f"mode{mode}": (mode,) for mode in (1, 2, 3, 5)},
)
def rising_gate_restarts(bench: Bench, mode: int) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(mode, 0x8000, clocks)),
        before=(*load(2, mode, 0x8000), user_sleep_us(2_000)),
        origin=(out8(SPEAKER, 1),),
        between=(user_sleep_us(1_000),),
        pit_flags=KVM_PIT_SPEAKER_DUMMY,
    )


@variants(
    "A rising gate leaves counter 2 alone in mode {0}, which only a count starts (pit_set_gate).",
    {f"mode{mode}": (mode,) for mode in (0, 4)},
)
def rising_gate_does_not_restart(bench: Bench, mode: int) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(mode, 0x8000, clocks)),
        origin=load(2, mode, 0x8000),
        between=(user_sleep_us(2_000), out8(SPEAKER, 1), user_sleep_us(1_000)),
        pit_flags=KVM_PIT_SPEAKER_DUMMY,
    )


@variants(
    "A gate that {0} is no edge: counter 2 goes on in mode 2 (pit_set_gate looks at the change).",
    {"stays-high": ("stays high", 1), "falls": ("falls", 0)},
)
def gate_without_a_rise(bench: Bench, how: str, gate: int) -> None:
    looks_at_a_count(
        *(bench, lambda clocks: counting(2, 0x8000, clocks)),
        before=(out8(SPEAKER, 1),),
        origin=load(2, 2, 0x8000),
        between=(user_sleep_us(1_000), out8(SPEAKER, gate), user_sleep_us(1_000)),
        pit_flags=KVM_PIT_SPEAKER_DUMMY,
    )


@variants(
    "CREATE_PIT2 with flags {0:#x}: port 0x61 is {1}; only KVM_PIT_SPEAKER_DUMMY, bit 0, matters"
    " (api.rst, KVM_CREATE_PIT2).",
    {
        f"flags-{flags:x}": (flags, "the kernel's" if flags & 1 else "user space's")
        for flags in (0, 1, 2, 0xFFFF_FFFF)
    },
)
def speaker_flag(bench: Bench, flags: int, whose: str) -> None:
    exits: list[int] = []
    with bench.pc(pit=True, pit_flags=flags) as pc:
        code = b"\xe4\x61\xe6\x61" + LEAVE  # in al, 0x61; out 0x61, al
        pc.run_image(code, {SPEAKER: lambda *a: exits.append(SPEAKER)})
    equal(len(exits), 0 if flags & 1 else 2, "accesses of two that exited")


@case("KVM_CREATE_PIT is CREATE_PIT2 with the speaker port (kvm_arch_vm_ioctl).")
def create_pit_has_the_speaker(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.create_pit()
        got = pc.run(out8(SPEAKER, 3), in8(SPEAKER, AT))
        equal(got.results[AT] & 3, 3, "gate and speaker data")


@variants(
    "Gate and speaker data written to port 0x61 as {0:#04b} read back (speaker_ioport_write,"
    " speaker_ioport_read).",
    {f"{value:02b}": (value,) for value in range(4)},
)
def speaker_bits_read_back(bench: Bench, value: int) -> None:
    with bench.pc(pit=True, pit_flags=KVM_PIT_SPEAKER_DUMMY) as pc:
        got = pc.run(out8(SPEAKER, value ^ 3), out8(SPEAKER, value), in8(SPEAKER, AT))
        equal(got.results[AT] & 3, value, "bits 1:0 of port 0x61")
        equal(pc.counter(2).gate, value & 1, "gate of counter 2")
        equal(pc.vm.get_pit2().flags, value & 2, "flags, KVM_PIT_FLAGS_SPEAKER_DATA_ON")


@case("Bits 2, 3, 6 and 7 of port 0x61 read 0, whatever was written (speaker_ioport_read).")
def speaker_other_bits(bench: Bench) -> None:
    with bench.pc(pit=True, pit_flags=KVM_PIT_SPEAKER_DUMMY) as pc:
        got = pc.run(out8(SPEAKER, 0xFF), in8(SPEAKER, AT))
        equal(got.results[AT] & 0xCC, 0, "bits 7:6 and 3:2 of port 0x61")


@case("The refresh bit, bit 4 of port 0x61, toggles with time (speaker_ioport_read).")
def refresh_bit_toggles(bench: Bench) -> None:
    def attempt() -> set[int] | None:
        with bench.pc(pit=True, pit_flags=KVM_PIT_SPEAKER_DUMMY) as pc:
            samples = ((in8(SPEAKER, AT + n), user_sleep_us(17)) for n in range(32))
            got = pc.run(*samples)
            seen = {got.results[AT + n] & 0x10 for n in range(32)}
            return seen if bench.exact or len(seen) == 2 else None

    # 32 samples of a host that falls into step with it show one value only
    equal(bench.quiet(attempt), {0, 0x10}, "values of bit 4 in 32 reads")


@variants(
    "Bit 5 of port 0x61 is OUT of counter 2: {1} right after a load in mode {0}"
    " (speaker_ioport_read, pit_get_out).",
    {"mode0": (0, 0), "mode1": (1, 1)},
)
def speaker_shows_out2(bench: Bench, mode: int, out: int) -> None:
    def attempt() -> int | None:
        with bench.pc(pit=True, pit_flags=KVM_PIT_SPEAKER_DUMMY) as pc:
            got, _, most = bracketed(pc, (), load(2, mode, 0xFFFF), (), (in8(SPEAKER, AT),))
            return None if most >= 0xFFFF else got.results[AT] >> 5 & 1

    equal(bench.quiet(attempt), out, "bit 5 of port 0x61")


# --- ticks ----------------------------------------------------------------------------------------

NEXT_5_MS: Script = (*WINDOWS, snap(AT), user_sleep_us(5_000), *WINDOWS, snap(AT + 1))
"""What was latched is taken; then 5 ms, in which 5 ticks of COUNT would come."""


def more_ticks(got: Results) -> int:
    """How many came in the 5 ms."""
    return got.results[AT + 1] - got.results[AT]


@variants(
    "Mode {0} ticks periodically; 6 and 7 are 2 and 3 (pit_load_count, create_pit_timer).",
    {f"mode{mode}": (mode,) for mode in (2, 3, 6, 7)},
)
def periodic_modes(bench: Bench, mode: int) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(pit(COUNT, 0x30 | mode << 1), wait_ticks(3))
        check(got.counter >= 3, "ticks", "3", got.counter)


@variants(
    "Mode {0} ticks once, and again only for a new count (pit_load_count, create_pit_timer).",
    {f"mode{mode}": (mode,) for mode in (0, 1, 4)},
)
def one_shot_modes(bench: Bench, mode: int) -> None:
    with bench.pc(pit=True) as pc:
        again = (*data(0, COUNT & 0xFF, COUNT >> 8), wait_ticks(1))
        got = pc.run(pit(COUNT, 0x30 | mode << 1), wait_ticks(1), *NEXT_5_MS, *again)
        equal(more_ticks(got), 0, "ticks in the 5 ms after the first")
        equal(got.counter, 2, "ticks after a second count")


@case("Mode 5 has no timer and ends the one that runs (pit_load_count, destroy_pit_timer).")
def mode5_stops_the_ticks(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(pit(COUNT), wait_ticks(2), cli(), pit(COUNT, 0x3A), sti(), *NEXT_5_MS)
        equal(more_ticks(got), 0, "ticks in 5 ms")


@variants(
    "Counter {0} never ticks: only counter 0 has a timer (pit_load_count).",
    {"counter1": (1,), "counter2": (2,)},
)
def other_counters_do_not_tick(bench: Bench, channel: int) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(*load(channel, 2, COUNT), sti(), user_sleep_us(5_000), *WINDOWS)
        equal(sum(got.vectors), 0, "interrupts in 5 ms")


@variants(
    "A complete count starts the timer, with {2} access too (pit_ioport_write).",
    {
        "lsb": (LSB, (0xC8,), "LSB"),
        "msb": (MSB, (0x04,), "MSB"),
        "word": (WORD, (0xA9, 0x04), "word"),
    },
)
def complete_count_starts_ticks(
    bench: Bench, access: int, written: tuple[int, ...], name: str
) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(control(0, 2, access), *data(0, *written), wait_ticks(2))
        check(got.counter >= 2, "ticks", "2", got.counter)


@variants(
    "A control word of mode {0} alone neither stops the ticks of mode 2 nor makes them one-shot:"
    " only a count does (pit_ioport_write).",
    {f"mode{mode}": (mode,) for mode in (0, 3, 5)},
)
def control_word_does_not_stop_ticks(bench: Bench, mode: int) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(pit(COUNT), wait_ticks(1), control(0, mode), wait_ticks(3))
        check(got.counter >= 4, "ticks", "4", got.counter)


@case("Half of a new count does not stop the ticks of the old one (pit_ioport_write).")
def half_a_count_does_not_stop_ticks(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(pit(COUNT), wait_ticks(1), control(0, 2), *data(0, 0), wait_ticks(3))
        check(got.counter >= 4, "ticks", "4", got.counter)


@case(
    "Ticks come every count * 1000000000 / 1193181 ns, rounded down (create_pit_timer,"
    " KVM_PIT_FREQ_HZ)."
)
def period(bench: Bench) -> None:
    def attempt() -> int | None:
        with bench.pc(pit=True) as pc:
            got = pc.run(pit(COUNT), wait_ticks(1), tsc_read(0), wait_ticks(20), tsc_read(2))
            took_ns = pc.elapsed_ns(got, 0, 2)
            quiet = abs(took_ns - 20 * PERIOD_NS) < PERIOD_NS // 2
            return took_ns if bench.exact or quiet else None

    off_ns = abs(bench.quiet(attempt) - 20 * PERIOD_NS)
    limit_ns = 1_000 if bench.exact else PERIOD_NS // 2
    check(off_ns < limit_ns, "20 periods", f"{20 * PERIOD_NS} ns", f"{off_ns} ns off")


@case(
    "The first tick comes a full interval after the count is loaded, never before"
    " (create_pit_timer)."
)
def first_tick_is_not_early(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(tsc_read(0), pit(COUNT), tsc_read(2), wait_ticks(1), tsc_read(4))
        took_ns = pc.elapsed_ns(got, 0, 4)
        check(took_ns > PERIOD_NS * 0.999, "time to the first tick", f"{PERIOD_NS} ns", took_ns)


@case("Count 0 is 65536, the longest period: 54.9 ms (8254 datasheet, write operations).")
def count_0_is_the_longest_period(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        got = pc.run(tsc_read(0), pit(0), wait_ticks(1), tsc_read(2))
        took_ns = pc.elapsed_ns(got, 0, 2)
        check(took_ns > 54_900_000, "time to the first tick", "54.9 ms", f"{took_ns} ns")


@case(
    "A new count replaces the running timer: the tick comes when the new one is over"
    " (create_pit_timer)."
)
def shorter_count_replaces_a_longer_one(bench: Bench) -> None:
    def attempt() -> int | None:
        with bench.pc(pit=True) as pc:
            got = pc.run(pit(59_659), tsc_read(0), pit(COUNT), wait_ticks(1), tsc_read(2))
            took_ns = pc.elapsed_ns(got, 0, 2)
            return took_ns if bench.exact or took_ns < 25_000_000 else None

    took_ns = bench.quiet(attempt)
    check(took_ns < 25_000_000, "time to the tick", "about 1 ms, and not 50", took_ns)


@case("A longer count replaces a shorter one: its tick does not come any more (hrtimer_cancel).")
def longer_count_replaces_a_shorter_one(bench: Bench) -> None:
    def attempt() -> int | None:
        with bench.pc(pit=True) as pc:
            script = (tsc_read(0), pit(COUNT), pit(0), tsc_read(2), sti(), *NEXT_5_MS, tsc_read(4))
            got = pc.run(*script)
            took_ns = pc.elapsed_ns(got, 0, 2), pc.elapsed_ns(got, 0, 4)
            late = took_ns[0] >= PERIOD_NS or took_ns[1] >= 50 * PERIOD_NS
            return None if late else got.results[AT + 1]

    equal(bench.quiet(attempt), 0, "ticks in 5 ms")


@case("A periodic interval below 200 us is raised to 200 us (min_timer_period_us).")
@retried
def short_periods_are_clamped(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(pit(100), wait_ticks(1), tsc_read(0), wait_ticks(20), tsc_read(2))
        took_ns = pc.elapsed_ns(got, 0, 2)
    # the first may be late, and one may be latched behind it
    least_ns = (20 if bench.exact else 18) * MIN_PERIOD_NS - 1_000
    check(took_ns >= least_ns, "time of 20 ticks of 83.8 us", f"{least_ns} ns", f"{took_ns} ns")


@variants(
    "The {1} of a count of 20 comes after 16.8 us: it is not raised to 200 us"
    " (create_pit_timer starts with the interval itself).",
    {"first-of-mode2": (2, "first tick"), "mode0": (0, "only tick")},
)
def first_interval_is_not_clamped(bench: Bench, mode: int, which: str) -> None:
    def attempt() -> int | None:
        with bench.pc(pit=True, reinject=False) as pc:
            tries: list[Op | tuple[Op, ...]] = []
            for n in range(0, 40, 4):
                tries += [cli(), tsc_read(n), pit(20, 0x30 | mode << 1), wait_ticks(1)]
                tries += [tsc_read(n + 2), pit(0, 0x3A), sti(), *WINDOWS]
            got = pc.run(*tries)
            fastest_ns = min(pc.elapsed_ns(got, n, n + 2) for n in range(0, 40, 4))
            return fastest_ns if bench.exact or fastest_ns < MIN_PERIOD_NS else None

    fastest_ns = bench.quiet(attempt)
    check(fastest_ns < MIN_PERIOD_NS, "the fastest of 10 ticks", "16.8 us", f"{fastest_ns} ns")


# --- HPET legacy replacement ----------------------------------------------------------------------


def set_flags(pc: Pc, flags: int) -> None:
    """KVM_SET_PIT2 with the state as it is, but for the flags."""
    state = pc.vm.get_pit2()
    state.flags = flags
    pc.vm.set_pit2(state)


@case("KVM_PIT_FLAGS_HPET_LEGACY stops counter 0: IRQ 0 is the HPET's (api.rst, KVM_SET_PIT2).")
def hpet_legacy_stops_ticks(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(
            *(pit(COUNT), wait_ticks(2), out8(PORT_ACT, 0), *NEXT_5_MS),
            acts=[lambda: set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY)],
        )
        equal(more_ticks(got), 0, "ticks in 5 ms")


@case(
    "With HPET_LEGACY cleared counter 0 ticks again, as it is programmed (kvm_vm_ioctl_set_pit2)."
)
def hpet_legacy_cleared_resumes(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        got = pc.run(
            *(pit(COUNT), wait_ticks(2), out8(PORT_ACT, 0), *NEXT_5_MS, out8(PORT_ACT + 1, 0)),
            wait_ticks(2),
            acts=[
                lambda: set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY),
                lambda: set_flags(pc, 0),
            ],
        )
        check(got.counter >= 4, "ticks", "4", got.counter)


@case("Under HPET_LEGACY a count that is loaded is kept, but starts no timer (create_pit_timer).")
def hpet_legacy_keeps_counts(bench: Bench) -> None:
    with bench.pc(pit=True, reinject=False) as pc:
        set_flags(pc, KVM_PIT_FLAGS_HPET_LEGACY)
        got = pc.run(pit(COUNT), sti(), *NEXT_5_MS)
        equal(got.counter, 0, "ticks in 5 ms")
        state = pc.counter(0)
        equal((state.mode, state.count), (2, COUNT), "mode and count")
