"""The MC146818 real-time clock and its RAM (Motorola MC146818A datasheet) at 0x70 and 0x71, IRQ 8.

Time and date come from `PcHost.date_ns`, shifted by whole seconds when the guest sets them; the
century is register 0x32, as on a PC. The day of the week counts by itself. Periodic, alarm and
update-ended interrupts; what nobody asks for is worked out when register C is read. The RAM holds
what a PC's firmware leaves there of the machine's size, where SeaBIOS looks for it.

UIP is set for t_BUC, 244 us, before an update; the update itself takes no time, and its flag comes
at the second. SET holds the registers, takes UIP away and keeps updates from happening.

Not modelled: the duration of an update (t_UC, 1984 us, in which the registers read anything), how
the clock counts on from what is no date or time of day (it stands until the guest has written one;
updates go on), registers that keep their old format when register B changes it, a divider that is
stopped or reset (register A's bits are kept only), daylight saving, the square wave, the NMI mask
in bit 7 of the index, checksums of the RAM.
"""

from collections.abc import Iterator
from typing import Final

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler
from kvmtick.timing.date import date_of, seconds_of
from kvmtick.timing.queue import Deadline

__all__ = ["Cmos"]

PORT_INDEX, PORT_DATA = 0x70, 0x71
IRQ: Final = 8
RAM_BYTES: Final = 128

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY, MONTH, YEAR = 6, 7, 8, 9
A, B, C, D = 10, 11, 12, 13
CENTURY: Final = 0x32
TIME_REGISTERS: Final = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY)

A_UPDATE_IN_PROGRESS, A_RATE = 0x80, 0x0F
A_AT_RESET: Final = 0x26
"""The divider for 32768 Hz, 1024 periodic interrupts a second."""
B_SET, B_PERIODIC, B_ALARM, B_UPDATE, B_BINARY, B_24_HOURS = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_INTERRUPT, C_PERIODIC, C_ALARM, C_UPDATE = 0x80, 0x40, 0x20, 0x10
INTERRUPTS: Final = C_PERIODIC | C_ALARM | C_UPDATE
"""At the same places in B, where they are allowed, and in C, where they are told."""
D_VALID: Final = 0x80
DO_NOT_CARE: Final = 0xC0
AFTERNOON: Final = 0x80

CRYSTAL_HZ: Final = 32768
NS_PER_S: Final = 1_000_000_000
UPDATE_NS: Final = 244_141
"""For so long before an update UIP says that it is near (t_BUC)."""
DAY_S: Final = 86_400

KIB, MIB = 1 << 10, 1 << 20
BASE_MEMORY_KIB: Final = 640
BASE_MEMORY, EXTENDED_MEMORY, EXTENDED_MEMORY_FOUND, MEMORY_ABOVE_16_MIB = 0x15, 0x17, 0x30, 0x34
"""Words: KiB below 1 MiB, KiB above it as set up and as found (the PC AT's), units of 64 KiB above
16 MiB (QEMU's and Bochs's, as are those below)."""
BOOT_DEVICE, LAST_VCPU = 0x3D, 0x5F
"""Bytes: what to boot from, the number of vCPUs less 1."""
FROM_HARD_DISK: Final = 0x02


class Cmos:
    """Registers and RAM."""

    def __init__(self, host: PcHost) -> None:
        self._host = host
        self.index = 0
        self.ram = bytearray(RAM_BYTES)
        self.ram[A] = A_AT_RESET
        self.ram[B] = B_24_HOURS
        self._describe(host.ram_bytes)
        self.offset_s = 0
        """The guest's clock is so far ahead of `date_ns`."""
        self.weekday_offset = 0
        """The guest's day of the week is so far ahead of the date's."""
        self.is_date = True
        """The time registers name a date and a time of day; while they do not, they stand still."""
        self.flags = 0
        self._seen_periods = self._periods()
        self._seen_s = self._now_s()
        self._deadline: Deadline | None = None
        self._line = 0

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        return {PORT_INDEX: self._access_index, PORT_DATA: self._access_data}

    def _describe(self, ram_bytes: int) -> None:
        """The machine's size, where firmware leaves it (QEMU's and Bochs's places)."""
        above_1_mib = min((ram_bytes - MIB) // KIB, 0xFFFF)
        above_16_mib = min(max(ram_bytes - 16 * MIB, 0) // (64 * KIB), 0xFFFF)
        for at, value in (
            (BASE_MEMORY, min(BASE_MEMORY_KIB, ram_bytes // KIB)),
            (EXTENDED_MEMORY, max(above_1_mib, 0)),
            (EXTENDED_MEMORY_FOUND, max(above_1_mib, 0)),
            (MEMORY_ABOVE_16_MIB, above_16_mib),
        ):
            self.ram[at : at + 2] = value.to_bytes(2, "little")
        self.ram[BOOT_DEVICE] = FROM_HARD_DISK

    # The guest's side.

    def _access_index(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if value is not None and size_bytes == 1:
            self.index = value & RAM_BYTES - 1
        return None

    def _access_data(self, port: int, size_bytes: int, value: int | None) -> int | None:
        if size_bytes != 1:
            return None
        self._look()
        if value is None:
            return self._read(self.index)
        self._write(self.index, value & 0xFF)
        self._plan()
        return None

    def _read(self, index: int) -> int:
        if index in TIME_REGISTERS and self._counts:
            return self._time_registers()[index]
        if index == A:
            return self.ram[A] | (A_UPDATE_IN_PROGRESS if self._is_updating() else 0)
        if index == C:
            flags, self.flags = self.flags, 0
            told = C_INTERRUPT if flags & self.ram[B] & INTERRUPTS else 0
            self._plan()
            return flags | told
        if index == D:
            return D_VALID
        if index == LAST_VCPU:
            return self._host.vcpus() - 1 & 0xFF
        return self.ram[index]

    def _write(self, index: int, value: int) -> None:
        if index in (C, D):
            return
        if index == A:
            self.ram[A] = value & ~A_UPDATE_IN_PROGRESS
            self._seen_periods = self._periods()
        elif index == B:
            self._write_b(value)
        elif index in TIME_REGISTERS and not self.ram[B] & B_SET:
            self._hold()
            self.ram[index] = value
            self._go_on()
        else:
            self.ram[index] = value

    def _write_b(self, value: int) -> None:
        before = self.ram[B]
        if value & ~before & B_SET:
            self._hold()
            value &= ~B_UPDATE
        self.ram[B] = value
        if before & ~value & B_SET:
            self._go_on()

    # Time and date.

    def _now_s(self) -> int:
        return self._host.date_ns() // NS_PER_S + self.offset_s

    @property
    def _counts(self) -> bool:
        """The time registers go on by themselves."""
        return self.is_date and not self.ram[B] & B_SET

    def _hold(self) -> None:
        """The time registers stay as they are now, for the guest to write."""
        if not self._counts:
            return
        for index, value in self._time_registers().items():
            self.ram[index] = value

    def _go_on(self) -> None:
        """From what the guest has written, if that is a date; else it stays as it is."""
        try:
            wanted_s = seconds_of(
                100 * self._decoded(CENTURY) + self._decoded(YEAR),
                self._decoded(MONTH),
                self._decoded(DAY),
                self._hour(self.ram[HOURS]),
                self._decoded(MINUTES),
                self._decoded(SECONDS),
            )
        except ValueError:
            self.is_date = False
            return
        self.is_date = True
        self.weekday_offset = self._decoded(DAY_OF_WEEK) - date_of(wanted_s).weekday
        self.offset_s += wanted_s - self._now_s()
        self._seen_s = self._now_s()

    def _time_registers(self) -> dict[int, int]:
        now = date_of(self._now_s())
        century, year = divmod(now.year % 10_000, 100)
        weekday = (now.weekday + self.weekday_offset - 1) % 7 + 1
        return {
            SECONDS: self._encoded(now.second),
            MINUTES: self._encoded(now.minute),
            HOURS: self._encoded_hour(now.hour),
            DAY_OF_WEEK: self._encoded(weekday),
            DAY: self._encoded(now.day),
            MONTH: self._encoded(now.month),
            YEAR: self._encoded(year),
            CENTURY: self._encoded(century),
        }

    def _encoded(self, number: int) -> int:
        """Binary, or two decimal digits."""
        return number if self.ram[B] & B_BINARY else number // 10 << 4 | number % 10

    def _encoded_hour(self, hour: int) -> int:
        if self.ram[B] & B_24_HOURS:
            return self._encoded(hour)
        return self._encoded((hour + 11) % 12 + 1) | (AFTERNOON if hour >= 12 else 0)

    def _decoded(self, index: int) -> int:
        return self._number(self.ram[index])

    def _number(self, value: int) -> int:
        return value if self.ram[B] & B_BINARY else 10 * (value >> 4) + (value & 0xF)

    def _hour(self, value: int) -> int:
        if self.ram[B] & B_24_HOURS:
            return self._number(value)
        return self._number(value & ~AFTERNOON) % 12 + (12 if value & AFTERNOON else 0)

    def _is_updating(self) -> bool:
        return not self.ram[B] & B_SET and self._host.date_ns() % NS_PER_S >= NS_PER_S - UPDATE_NS

    # Interrupts.

    def _period(self) -> int:
        """Of the periodic interrupt, in cycles of the crystal; 0: off (datasheet, table 5)."""
        rate = self.ram[A] & A_RATE
        if not rate:
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _periods(self) -> int:
        period = self._period()
        return self._host.clock.now_ns * CRYSTAL_HZ // NS_PER_S // period if period else 0

    def _look(self) -> None:
        """What has happened since the last look."""
        periods, now_s = self._periods(), self._now_s()
        if periods != self._seen_periods:
            self.flags |= C_PERIODIC
        if now_s > self._seen_s and not self.ram[B] & B_SET:
            self.flags |= C_UPDATE
            alarm_s = self._next_alarm_s(self._seen_s)
            if alarm_s is not None and alarm_s <= now_s:
                self.flags |= C_ALARM
        self._seen_periods, self._seen_s = periods, now_s

    def _next_alarm_s(self, after_s: int) -> int | None:
        """The first second behind `after_s` that the alarm registers name; None: they name none,
        or the clock stands.
        """
        if not self.is_date:
            return None
        day_s, second_of_day = divmod(after_s, DAY_S)
        for start_s, behind in ((day_s * DAY_S, second_of_day), ((day_s + 1) * DAY_S, -1)):
            for second in self._alarm_seconds(behind):
                return start_s + second
        return None

    def _alarm_seconds(self, behind: int) -> Iterator[int]:
        """Seconds of a day, behind one of them, that the alarm names."""
        hours = self._alarm(HOURS_ALARM, 24)
        minutes = self._alarm(MINUTES_ALARM, 60)
        seconds = self._alarm(SECONDS_ALARM, 60)
        for hour in hours:
            if (hour + 1) * 3600 <= behind:
                continue
            for minute in minutes:
                for second in seconds:
                    at = hour * 3600 + minute * 60 + second
                    if at > behind:
                        yield at

    def _alarm(self, index: int, count: int) -> range:
        value = self.ram[index]
        if value >= DO_NOT_CARE:
            return range(count)
        number = self._hour(value) if index == HOURS_ALARM else self._number(value)
        return range(number, number + 1) if number < count else range(0)

    def _plan(self) -> None:
        """The line, and the next moment at which it may rise."""
        level = int(self.flags & self.ram[B] & INTERRUPTS != 0)
        if level != self._line:
            self._line = level
            self._host.set_irq_line(IRQ, level)
        if self._deadline is not None and self._deadline.queued:
            self._host.queue.cancel(self._deadline)
        self._deadline = None
        due_ns = min(self._due_times_ns(), default=None)
        if due_ns is not None:
            self._deadline = self._host.queue.add(due_ns, self._on_due)

    def _due_times_ns(self) -> Iterator[int]:
        """When the allowed interrupts come next, on the machine's clock."""
        allowed = self.ram[B] & ~self.flags & INTERRUPTS
        now_ns, period = self._host.clock.now_ns, self._period()
        if allowed & B_PERIODIC and period:
            yield -(-(self._seen_periods + 1) * period * NS_PER_S // CRYSTAL_HZ)
        if self.ram[B] & B_SET:
            return
        ahead_ns = now_ns - self._host.date_ns() - self.offset_s * NS_PER_S
        if allowed & B_UPDATE:
            yield ahead_ns + (self._seen_s + 1) * NS_PER_S
        alarm_s = self._next_alarm_s(self._seen_s) if allowed & B_ALARM else None
        if alarm_s is not None:
            yield ahead_ns + alarm_s * NS_PER_S

    def _on_due(self) -> None:
        self._look()
        self._plan()
