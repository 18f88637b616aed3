"""The RTC and its RAM by their registers, as in the MC146818A datasheet; and under a guest."""

from datetime import UTC, datetime

import pytest
from pc_host import FakePc

import kvmtick
from kvmtick.abi import HostError
from kvmtick.guests import Guest
from kvmtick.machine.pc.cmos import Cmos

INDEX, DATA = 0x70, 0x71
NOON = datetime(2026, 3, 4, 12, 34, 56, tzinfo=UTC)  # a Wednesday
S = 1_000_000_000
US = 1_000
A, B, C, D = 10, 11, 12, 13
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 4, 2
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 1, 3, 5
CLOCK = {"second": 0, "minute": 2, "hour": 4, "weekday": 6, "day": 7, "month": 8, "year": 9}
CENTURY = 0x32
ANY = 0xFF


class Rtc(FakePc):
    def __init__(self, date: datetime = NOON, *, ram_bytes: int = 64 << 20, vcpus: int = 1) -> None:
        date_ns = int(date.timestamp()) * S
        super().__init__(ram_bytes=ram_bytes, date_at_0_ns=date_ns, vcpus=vcpus)
        self.ports = Cmos(self.host).ports()

    def get(self, index: int) -> int:
        self.write(INDEX, index)
        return self.read(DATA)

    def put(self, index: int, value: int) -> None:
        self.write(INDEX, index)
        self.write(DATA, value)

    def put_all(self, values: dict[int, int]) -> None:
        for index, value in values.items():
            self.put(index, value)

    def clock_reads(self) -> list[int]:
        return [self.get(index) for index in CLOCK.values()]

    def hms(self) -> tuple[int, int, int]:
        return self.get(4), self.get(2), self.get(0)

    def set_alarm(self, hour: int, minute: int, second: int) -> None:
        self.put_all({HOURS_ALARM: hour, MINUTES_ALARM: minute, SECONDS_ALARM: second})

    def rises(self) -> list[int]:
        assert {gsi for _, gsi, _ in self.lines} <= {8}
        return [ns for ns, _, level in self.lines if level]


# --- time and date --------------------------------------------------------------------------------


def test_bcd_and_binary() -> None:
    rtc = Rtc()
    assert rtc.get(B) == H24
    assert rtc.clock_reads() == [0x56, 0x34, 0x12, 4, 4, 3, 0x26]
    assert rtc.get(CENTURY) == 0x20
    rtc.put(B, H24 | BINARY)
    assert rtc.clock_reads() == [56, 34, 12, 4, 4, 3, 26]
    assert rtc.get(CENTURY) == 20


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"),
    [
        (0, 0x12, 12),
        (1, 0x01, 1),
        (11, 0x11, 11),
        (12, 0x92, 0x8C),
        (13, 0x81, 0x81),
        (23, 0x91, 0x8B),
    ],
)
def test_twelve_hours(hour: int, bcd: int, binary: int) -> None:
    rtc = Rtc(NOON.replace(hour=hour))
    rtc.put(B, 0)
    assert rtc.get(4) == bcd
    rtc.put(B, BINARY)
    assert rtc.get(4) == binary
    # and the same back, into a clock that shows another hour
    other = Rtc(NOON.replace(hour=(hour + 5) % 24))
    other.put(B, BINARY)
    other.put(B, BINARY | SET)
    other.put(4, binary)
    other.put(B, BINARY)
    other.put(B, BINARY | H24)
    assert other.get(4) == hour


def test_time_goes_on_with_the_date() -> None:
    rtc = Rtc(datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC))
    rtc.advance_to(S - 1)
    assert rtc.clock_reads() == [0x59, 0x59, 0x23, 6, 0x31, 0x12, 0x99]
    rtc.advance_to(S)
    assert rtc.clock_reads() == [0, 0, 0, 7, 1, 1, 0]
    assert rtc.get(CENTURY) == 0x20


def test_set_stops_the_registers_until_all_are_written() -> None:
    rtc = Rtc()
    rtc.put(B, H24 | SET)
    rtc.advance_to(3 * S)
    assert rtc.hms() == (0x12, 0x34, 0x56)
    rtc.put_all({9: 0x69, 8: 0x07, 7: 0x20, 4: 0x20, 2: 0x17, 0: 0x40, CENTURY: 0x19})
    assert rtc.hms() == (0x20, 0x17, 0x40)
    rtc.put(B, H24)
    # the day of the week is a counter of its own
    assert rtc.clock_reads() == [0x40, 0x17, 0x20, 4, 0x20, 7, 0x69]
    rtc.advance_to(63 * S)
    assert rtc.hms() == (0x20, 0x18, 0x40)
    assert rtc.get(CENTURY) == 0x19


def test_a_register_written_without_set() -> None:
    rtc = Rtc()
    rtc.put(2, 0x01)
    assert rtc.hms() == (0x12, 0x01, 0x56)
    rtc.advance_to(4 * S)
    assert rtc.hms() == (0x12, 0x02, 0x00)


def test_a_date_that_does_not_exist_for_a_moment() -> None:
    rtc = Rtc(NOON.replace(day=31))
    rtc.put(8, 0x04)  # April has 30 days
    assert rtc.clock_reads() == [0x56, 0x34, 0x12, 3, 0x31, 4, 0x26]
    rtc.put(7, 0x15)
    assert rtc.clock_reads() == [0x56, 0x34, 0x12, 3, 0x15, 4, 0x26]
    rtc.advance_to(4 * S)
    assert rtc.clock_reads() == [0, 0x35, 0x12, 3, 0x15, 4, 0x26]


@pytest.mark.parametrize(
    "values", [{8: 2, 7: 0x30}, {8: 0}, {7: 0}, {8: 0x13}, {4: 0x24}, {2: 0x60}, {0: 0xFF}]
)
def test_what_is_no_date_stands_until_it_is_one(values: dict[int, int]) -> None:
    rtc = Rtc()
    expected = dict(zip(CLOCK.values(), rtc.clock_reads(), strict=True)) | values
    rtc.put(B, H24 | SET)
    rtc.put_all(values)
    rtc.put(B, H24 | UIE)
    rtc.advance_to(3 * S)
    assert rtc.clock_reads() == list(expected.values())
    assert rtc.rises() == [S]  # updates go on
    # SET holds what is there, and changes nothing
    rtc.put(B, H24 | SET)
    assert rtc.clock_reads() == list(expected.values())
    rtc.put_all({8: 2, 7: 0x28, 4: 0x23, 2: 0x59, 0: 0x59})
    rtc.put(B, H24)
    rtc.advance_to(4 * S)
    assert rtc.clock_reads() == [0, 0, 0, 5, 1, 3, 0x26]


def test_no_alarm_by_a_clock_that_stands() -> None:
    rtc = Rtc()
    rtc.put(A, 0x20)
    rtc.set_alarm(ANY, ANY, ANY)
    rtc.put(7, 0x32)
    rtc.put(B, H24 | AIE)
    rtc.advance_to(3 * S)
    assert rtc.rises() == []
    assert rtc.get(C) == UF


def test_the_day_of_the_week_counts_by_itself() -> None:
    rtc = Rtc()
    rtc.put(6, 7)
    assert rtc.get(6) == 7
    rtc.put_all({7: 0x10, 8: 0x11})
    assert rtc.get(6) == 7
    rtc.advance_to(86_400 * S)
    assert (rtc.get(6), rtc.get(7)) == (1, 0x11)


@pytest.mark.parametrize(
    ("year", "next_year"), [(0x9999, 0x0000), (0x0000, 0x0001), (0x0399, 0x0400)]
)
def test_years_without_end(year: int, next_year: int) -> None:
    rtc = Rtc()
    rtc.put(B, H24 | SET)
    rtc.put_all({CENTURY: year >> 8, 9: year & 0xFF, 8: 0x12, 7: 0x31})
    rtc.put_all({4: 0x23, 2: 0x59, 0: 0x59})
    rtc.put(B, H24)
    assert (rtc.get(CENTURY), rtc.get(9)) == (year >> 8, year & 0xFF)
    rtc.advance_to(S)
    assert (rtc.get(CENTURY), rtc.get(9)) == (next_year >> 8, next_year & 0xFF)
    assert rtc.clock_reads()[:3] == [0, 0, 0]


def test_update_in_progress_before_the_second_ends() -> None:
    rtc = Rtc()
    assert rtc.get(A) == 0x26
    rtc.advance_to(S - 245 * US)
    assert rtc.get(A) == 0x26
    rtc.advance_to(S - 244 * US)
    assert rtc.get(A) == 0xA6
    rtc.put(B, H24 | SET)
    assert rtc.get(A) == 0x26
    rtc.put(B, H24)
    rtc.advance_to(S)
    assert rtc.get(A) == 0x26
    rtc.put(A, 0xAF)  # UIP is read only
    assert rtc.get(A) == 0x2F


# --- the periodic interrupt -----------------------------------------------------------------------


RATES = [(1, 128), (2, 256), *((rate, 1 << rate - 1) for rate in range(3, 16))]
"""Cycles of 32768 Hz (table 5): 256 Hz, 128 Hz, 8192 Hz, ..., 2 Hz."""


@pytest.mark.parametrize(("rate", "cycles"), RATES)
def test_periods_are_exact_and_do_not_drift(rate: int, cycles: int) -> None:
    rtc = Rtc()
    rtc.put(A, 0x20 | rate)
    rtc.put(B, H24 | PIE)
    periods = 1000
    for period in range(1, periods + 1):
        due_ns = -(-period * cycles * S // 32768)
        rtc.advance_to(due_ns - 1)
        assert len(rtc.lines) == 2 * (period - 1)
        rtc.advance_to(due_ns)
        assert rtc.get(C) & ~(UF | AF) == IRQF | PF
        assert rtc.lines[-2:] == [(due_ns, 8, 1), (due_ns, 8, 0)]


def test_a_guest_that_is_late_loses_periods_but_not_the_phase() -> None:
    rtc = Rtc()
    rtc.put(B, H24 | PIE)
    rtc.advance_to(10 * S + 1)
    assert rtc.rises() == [976_563]  # the line stays high until C is read
    rtc.get(C)
    rtc.advance_to(11 * S)
    assert rtc.rises() == [976_563, -(-(10 * 1024 + 1) * S // 1024)]


def test_rate_0_is_off_and_a_new_rate_counts_from_now() -> None:
    rtc = Rtc()
    rtc.put(A, 0x20)
    rtc.put(B, H24 | PIE)
    rtc.advance_to(S)
    assert rtc.rises() == []
    assert not rtc.get(C) & PF
    assert len(rtc.queue) == 0
    rtc.put(A, 0x2F)
    rtc.advance_to(S * 3 // 2)
    assert rtc.rises() == [S * 3 // 2]


def test_flags_come_without_being_allowed_and_interrupt_when_they_are() -> None:
    rtc = Rtc()
    rtc.get(C)
    rtc.advance_to(S // 2)
    assert rtc.get(C) == PF
    assert rtc.get(C) == 0
    rtc.advance_to(S * 3 // 4)
    rtc.put(B, H24 | PIE)
    assert rtc.rises() == [S * 3 // 4]
    # forbidden again: the line falls, the flag stays
    rtc.put(B, H24)
    assert rtc.lines[-1] == (S * 3 // 4, 8, 0)
    assert rtc.get(C) == PF


# --- update and alarm -----------------------------------------------------------------------------


def test_update_interrupt_every_second() -> None:
    rtc = Rtc()
    rtc.put(A, 0x20)
    rtc.advance_to(S // 3)
    rtc.put(B, H24 | UIE)
    for second in range(1, 11):
        rtc.advance_to(second * S)
        assert rtc.rises()[-1] == second * S
        assert rtc.get(C) & (IRQF | UF) == IRQF | UF
        assert rtc.lines[-1][2] == 0
    assert len(rtc.rises()) == 10


def test_set_takes_the_update_interrupt_away() -> None:
    rtc = Rtc()
    rtc.put(A, 0x20)
    rtc.put(B, H24 | UIE)
    rtc.put(B, H24 | UIE | SET)
    assert rtc.get(B) == H24 | SET
    rtc.advance_to(5 * S)
    assert rtc.rises() == []
    assert rtc.get(C) == 0


@pytest.mark.parametrize(
    ("alarm", "after_s"),
    [
        ((0x12, 0x34, 0x57), [1, 86_401]),
        ((0x12, 0x34, 0x56), [86_400, 172_800]),
        ((0x00, 0x00, 0x00), [41_104, 127_504]),  # midnight
        ((ANY, ANY, ANY), [1, 2, 3]),
        ((ANY, ANY, 0x00), [4, 64, 124]),
        ((ANY, 0x00, 0x00), [25 * 60 + 4, 85 * 60 + 4]),
        ((0xC0, 0x34, 0x10), [3_554, 7_154]),
        ((0x13, ANY, 0x00), [25 * 60 + 4, 26 * 60 + 4]),
        ((0x12, 0x35, ANY), [4, 5, 6]),
    ],
)
def test_alarms(alarm: tuple[int, int, int], after_s: list[int]) -> None:
    rtc = Rtc()
    rtc.put(A, 0x20)
    rtc.set_alarm(*alarm)
    rtc.put(B, H24 | AIE)
    for second in after_s:
        rtc.advance_to(second * S - 1)
        assert rtc.rises()[-1:] != [second * S]
        rtc.advance_to(second * S)
        assert rtc.rises()[-1] == second * S
        assert rtc.get(C) == IRQF | AF | UF
    assert len(rtc.rises()) == len(after_s)


def test_alarm_by_twelve_hours() -> None:
    rtc = Rtc()
    rtc.put(B, 0)
    rtc.set_alarm(0x81, 0x00, 0x00)  # 1 p.m.
    rtc.put(B, AIE)
    rtc.advance_to(2 * 3600 * S)
    assert rtc.rises() == [(25 * 60 + 4) * S]


def test_an_alarm_that_never_comes() -> None:
    rtc = Rtc()
    rtc.put(A, 0x20)
    rtc.set_alarm(0x25, 0x00, 0x00)
    rtc.put(B, H24 | AIE)
    rtc.advance_to(5 * 86_400 * S)
    assert rtc.rises() == []
    assert rtc.get(C) == UF


def test_alarm_follows_a_clock_that_is_set() -> None:
    rtc = Rtc()
    rtc.put(A, 0x20)
    rtc.set_alarm(0x18, 0x00, 0x00)
    rtc.put(B, H24 | AIE | SET)
    rtc.put_all({4: 0x17, 2: 0x59, 0: 0x50})
    rtc.put(B, H24 | AIE)
    rtc.advance_to(20 * S)
    assert rtc.rises() == [10 * S]


def test_reading_c_clears_all_flags_at_once() -> None:
    rtc = Rtc()
    rtc.set_alarm(ANY, ANY, ANY)
    rtc.put(B, H24 | PIE | AIE | UIE)
    rtc.advance_to(S)
    assert rtc.get(C) == IRQF | PF | AF | UF
    assert rtc.get(C) == 0
    assert rtc.lines[-1] == (S, 8, 0)


# --- RAM ------------------------------------------------------------------------------------------


def test_c_and_d_are_read_only() -> None:
    rtc = Rtc()
    rtc.put(C, 0xFF)
    rtc.put(D, 0)
    assert (rtc.get(C), rtc.get(D)) == (0, 0x80)


def test_ram_keeps_bytes_and_bit_7_of_the_index_is_no_address() -> None:
    rtc = Rtc()
    for index in (0x0E, 0x40, 0x7F):
        rtc.put(index, index ^ 0xFF)
    assert [rtc.get(0x80 | index) for index in (0x0E, 0x40, 0x7F)] == [0xF1, 0xBF, 0x80]
    assert rtc.ports[INDEX](INDEX, 1, None) is None
    assert rtc.ports[DATA](DATA, 2, None) is None


KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("ram_bytes", "base_kib", "extended_kib", "above_16_mib"),
    [
        (256 * KIB, 256, 0, 0),
        (MIB, 640, 0, 0),
        (16 * MIB, 640, 15 * 1024, 0),
        (64 * MIB, 640, 63 * 1024, 48 * 16),
        (65 * MIB, 640, 0xFFFF, 49 * 16),
        (2 * GIB, 640, 0xFFFF, 2032 * 16),
    ],
)
def test_sizes(ram_bytes: int, base_kib: int, extended_kib: int, above_16_mib: int) -> None:
    rtc = Rtc(ram_bytes=ram_bytes, vcpus=4)

    def word(at: int) -> int:
        return rtc.get(at) | rtc.get(at + 1) << 8

    assert (word(0x15), word(0x17), word(0x30)) == (base_kib, extended_kib, extended_kib)
    assert word(0x34) == above_16_mib
    assert rtc.get(0x5F) == 3


# --- a guest, on the model's chips and on the kernel's --------------------------------------------

CODE = 0x1000
TICKS = 20


def _out8(port: int, value: int) -> bytes:
    return bytes((0xB0, value, 0xE6, port))


def _rtc_ticker() -> bytes:
    """Take TICKS periodic interrupts at 1024 Hz; report their number, and above it what all the
    reads of register C have in common.
    """
    isr_vector = 0x28 * 4
    head = b"\xfa\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x10"  # cli; ds = ss = 0; sp = 0x1000
    head += b"\xc7\x06" + isr_vector.to_bytes(2, "little") + b"%b"  # [0x28 * 4] = isr
    head += b"\xc7\x06" + (isr_vector + 2).to_bytes(2, "little") + b"\0\0"
    master = ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFB))  # only the cascade
    slave = ((0xA0, 0x11), (0xA1, 0x28), (0xA1, 2), (0xA1, 1), (0xA1, 0xFE))  # and IRQ 8
    body = b"".join(_out8(port, value) for port, value in master + slave)
    # what is told already would interrupt at once: read C first
    body += _out8(INDEX, A) + _out8(DATA, 0x26) + _out8(INDEX, C) + b"\xe4\x71"
    body += _out8(INDEX, B) + _out8(DATA, H24 | PIE)
    # cx = 0; bl = 0xff; again: sti; hlt; cmp cx, TICKS; jb again
    body += b"\x31\xc9\xb3\xff" + bytes((0xFB, 0xF4, 0x83, 0xF9, TICKS, 0x72, 0xF9))
    body += b"\x88\xc8\x88\xdc\xe7\xf4"  # al = cl; ah = bl; out 0xf4, ax
    # inc cx; bl &= register C; EOI to both
    isr = b"\x41" + _out8(INDEX, C) + b"\xe4\x71\x20\xc3" + _out8(0xA0, 0x20) + _out8(0x20, 0x20)
    # push bp; mov bp, sp; and byte [bp + 7], ~2 (IF of the frame); pop bp; iret
    isr += b"\x55\x89\xe5\x80\x66\x07\xfd\x5d\xcf"
    isr_at = CODE + len(head % b"\0\0") + len(body)
    return head % isr_at.to_bytes(2, "little") + body + isr


@pytest.mark.parametrize("backend", ["model", "kernel"])
def test_a_guest_takes_periodic_interrupts_on_irq_8(backend: str) -> None:
    try:
        vm = kvmtick.Kvm(backend).create_vm()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        vm.load(Guest("rtc", _rtc_ticker(), CODE, (0, CODE), None))
        run = vm.run(limit_s=10.0)
    assert run.exit.reason != "limit"
    code = run.exit.code
    assert code & 0xFF == TICKS
    assert code >> 8 & (IRQF | PF) == IRQF | PF
    # the first comes at the end of a period that has begun before
    assert run.elapsed_ns >= (TICKS - 1) * S // 1024
    if backend == "model":
        assert run.elapsed_ns < (TICKS + 1) * S // 1024
