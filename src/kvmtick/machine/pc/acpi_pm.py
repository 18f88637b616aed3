"""ACPI's fixed hardware (ACPI specification 6.5, 4.8.3): PM1a events and control, PM timer.

* 0x600 PM1a_EVT: status (a 1 clears a bit) and enable. Only the timer's event ever happens; those
  of the global lock and the RTC can be enabled, which Linux does and checks; buttons are not here;
* 0x604 PM1a_CNT: ACPI mode is always on (SCI_EN); SLP_EN with the type of S5 switches off;
* 0x608 PM_TMR: 24 bits at 3.579545 MHz from the machine's clock.

SCI is GSI 9, level triggered. `kvmtick.machine.pc.acpi` tells the guest of all this.

Not modelled: general-purpose events, buttons, the RTC's wake event, firmware that would share the
global lock, sleeping states but S5.
"""

from typing import Final

from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.ports import PortHandler
from kvmtick.timing.queue import Deadline

__all__ = ["AcpiPm"]

BASE: Final = 0x600
STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
SIZE_BYTES: Final = 12
SCI: Final = 9

TMR_STS: Final = 1 << 0
TMR_EN, GBL_EN, RTC_EN = 1 << 0, 1 << 5, 1 << 10
ENABLE_BITS: Final = TMR_EN | GBL_EN | RTC_EN
SCI_EN: Final = 1 << 0
SLP_TYP_SHIFT, SLP_TYP_MASK = 10, 7
SLP_EN: Final = 1 << 13
S5: Final = 5
CONTROL_BITS: Final = SLP_TYP_MASK << SLP_TYP_SHIFT | 1 << 1

PM_TIMER_HZ: Final = 3_579_545
TIMER_BITS: Final = 24
CARRY: Final = 1 << TIMER_BITS - 1
NS_PER_S: Final = 1_000_000_000


class AcpiPm:
    """The registers; the timer's carry is looked at when somebody asks, and at its time only while
    its interrupt is on.
    """

    def __init__(self, host: PcHost) -> None:
        self._host = host
        self.status = 0
        self.enable = 0
        self.control = 0
        self._carries = self._count() // CARRY
        """Times that bit 23 of the timer has changed, as far as `status` knows."""
        self._deadline: Deadline | None = None
        self._line = 0

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        return dict.fromkeys(range(BASE, BASE + SIZE_BYTES), self._access)

    def timer(self) -> int:
        """PM_TMR as it reads now."""
        return self._count() & (1 << TIMER_BITS) - 1

    def _count(self) -> int:
        return self._host.clock.now_ns * PM_TIMER_HZ // NS_PER_S

    def _access(self, port: int, size_bytes: int, value: int | None) -> int | None:
        """Registers are bytes beside each other, for accesses of any width."""
        self._look_at_carry()
        at = port - BASE
        if value is None:
            shift = 8 * at
            return self._registers() >> shift & (1 << 8 * size_bytes) - 1
        for each in range(size_bytes):
            self._write_byte(at + each, value >> 8 * each & 0xFF)
        self._update()
        return None

    def _registers(self) -> int:
        words = (self.status, self.enable, self.control | SCI_EN, 0)
        low = sum(word << 16 * n for n, word in enumerate(words))
        return low | self.timer() << 8 * TIMER

    def _write_byte(self, at: int, byte: int) -> None:
        shift = 8 * (at & 1)
        if at & ~1 == STATUS:
            self.status &= ~(byte << shift)
        elif at & ~1 == ENABLE:
            self.enable = (self.enable & ~(0xFF << shift) | byte << shift) & ENABLE_BITS
        elif at & ~1 == CONTROL:
            written = self.control & ~(0xFF << shift) | byte << shift
            self.control = written & CONTROL_BITS
            if written & SLP_EN and written >> SLP_TYP_SHIFT & SLP_TYP_MASK == S5:
                self._host.power_off()

    def _look_at_carry(self) -> None:
        carries = self._count() // CARRY
        if carries != self._carries:
            self._carries = carries
            self.status |= TMR_STS

    def _update(self) -> None:
        """SCI, and the moment of the next carry."""
        level = int(self.status & self.enable != 0)
        if level != self._line:
            self._line = level
            self._host.set_irq_line(SCI, level)
        if self._deadline is not None and self._deadline.queued:
            self._host.queue.cancel(self._deadline)
        self._deadline = None
        if self.enable & TMR_EN:
            count = (self._carries + 1) * CARRY
            due_ns = -(-count * NS_PER_S // PM_TIMER_HZ)
            self._deadline = self._host.queue.add(due_ns, self._on_carry)

    def _on_carry(self) -> None:
        self._look_at_carry()
        self._update()
