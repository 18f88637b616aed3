"""When IRQ 0 was masked in the PIC, by what the guest wrote and what each pulse found.

Source: the i8259 datasheet (ICW1 to ICW4, OCW1); in KVM ICW3 is expected also of a single PIC.
"""

from bisect import bisect_right

from kvmtick.trace.events import Record

__all__ = ["PicMask"]

MOST_CHANGES = 100_000
"""Changes kept: the last ones."""

_COMMAND, _DATA = 0x20, 0x21
_ICW1, _ICW4_NEEDED = 0x10, 0x01
_IRQ0 = 1


class PicMask:
    """Follows the master PIC's IMR of one VM."""

    def __init__(self) -> None:
        self._times: list[int] = []
        self._masked: list[bool] = []
        self._init_words = 0

    def pulse(self, record: Record) -> None:
        """kvm_pic_set_irq, which has the IMR."""
        if not record[3]:
            self._is(record[0], bool(record[6] & _IRQ0))

    def pio(self, record: Record) -> None:
        """kvm_pio: the guest may write OCW1."""
        ts_ns, _, _, is_write, port, _, _, value = record
        if not is_write:
            return
        if port == _COMMAND:
            if value & _ICW1:
                self._init_words = 2 + (value & _ICW4_NEEDED)
                self._is(ts_ns, False)
        elif port == _DATA:
            if self._init_words:
                self._init_words -= 1
            else:
                self._is(ts_ns, bool(value & _IRQ0))

    def _is(self, ts_ns: int, masked: bool) -> None:
        if self._masked and self._masked[-1] == masked:
            return
        if len(self._times) >= MOST_CHANGES:
            half = MOST_CHANGES // 2
            del self._times[:half], self._masked[:half]
        self._times.append(ts_ns)
        self._masked.append(masked)

    def masked_ns(self, start_ns: int, end_ns: int) -> int:
        """For how long of a span it was masked, as far as is known."""
        at = max(0, bisect_right(self._times, start_ns) - 1)
        total = 0
        for position in range(at, len(self._times)):
            first_ns = max(self._times[position], start_ns)
            if first_ns >= end_ns:
                break
            last = position + 1 == len(self._times)
            last_ns = end_ns if last else min(self._times[position + 1], end_ns)
            if self._masked[position]:
                total += last_ns - first_ns
        return total
