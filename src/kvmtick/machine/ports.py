"""What user space answers: debug exit, debug console, serial line, and memory nobody has.

* 0xf4, debug exit (QEMU's isa-debug-exit): the guest ends the run, 0 is success;
* 0xd8, host sleep: the vCPU stays in user space for the number of microseconds written;
* 0xe9 and 0x402, debug consoles (Bochs, QEMU's isa-debugcon; SeaBIOS writes to the latter): they
  read 0xe9, and write a byte of text;
* the ports of the PC's devices (`kvmtick.machine.pc`), which are made when the guest first accesses
  a port that is none of the above;
* everything else, ports and memory alike, reads all ones, as an undriven bus does.

`handlers` come before all of these: a program that runs the VM answers ports of its own with them.
"""

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from mypy_extensions import mypyc_attr

__all__ = ["PORT_DEBUG_EXIT", "PORT_HOST_SLEEP", "PortHandler", "PortMap", "PortOwner"]

PortHandler: TypeAlias = Callable[[int, int, int | None], int | None]
"""`(port, size_bytes, value)`: `value` is what the guest wrote, None when it reads.

The result answers a read (None: all ones) and is ignored for a write.
"""

PORT_HOST_SLEEP: Final = 0xD8
PORTS_DEBUG_CONSOLE: Final = (0xE9, 0x402)
DEBUG_CONSOLE_THERE: Final = 0xE9
PORT_DEBUG_EXIT: Final = 0xF4

CONSOLE_LIMIT_BYTES: Final = 1 << 20


@mypyc_attr(allow_interpreted_subclasses=True)
class PortOwner:
    """Whose ports they are: what the guest makes happen by them."""

    def guest_exit(self, value: int) -> None:
        """The guest wrote to 0xf4."""

    def guest_sleep(self, microseconds: int) -> None:
        """The guest wrote to 0xd8."""

    def port_devices(self) -> dict[int, PortHandler]:
        """The PC's, by port; asked for when a port is first accessed."""
        return {}

    def unknown_msr(self, vcpu_id: int, access: str, index: int, rip: int) -> None:
        """The guest's access ("read" or "write") to an MSR that nobody knows."""


class PortMap:
    """User space's side of ports, MMIO and IOAPIC EOIs. What the guest prints is in `console` and
    `serial`.

    Each keeps its first MiB and counts the rest in `dropped_bytes`. `on_text` gets every byte of
    both when the guest prints it.
    """

    defers = False

    def __init__(self, owner: PortOwner) -> None:
        self._owner = owner
        self.handlers: Mapping[int, PortHandler] = {}
        self._devices: dict[int, PortHandler] | None = None
        self.on_ioapic_eoi: Callable[[int], None] | None = None
        self.on_text: Callable[[int], None] | None = None
        self.console = bytearray()
        self.serial = bytearray()
        self.dropped_bytes = 0

    def read(self, port: int, size_bytes: int) -> int:
        """The value the guest reads; wider than a byte only undriven ports answer."""
        ones = (1 << 8 * size_bytes) - 1
        if handler := self._handler(port):
            answer = handler(port, size_bytes, None)
            return ones if answer is None else answer & ones
        if size_bytes == 1 and port in PORTS_DEBUG_CONSOLE:
            return DEBUG_CONSOLE_THERE
        return ones

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """The guest wrote `value`."""
        if handler := self._handler(port):
            handler(port, size_bytes, value)
        elif port == PORT_DEBUG_EXIT:
            self._owner.guest_exit(value)
        elif port == PORT_HOST_SLEEP:
            self._owner.guest_sleep(value)
        elif port in PORTS_DEBUG_CONSOLE:
            self._print(self.console, value & 0xFF)

    def _handler(self, port: int) -> PortHandler | None:
        handler = self.handlers.get(port)
        if handler is not None:
            return handler
        if self._devices is None:
            self._devices = self._owner.port_devices()
        return self._devices.get(port)

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        """Memory that is no RAM and no device reads all ones."""
        return (1 << 8 * size_bytes) - 1

    def mmio_write(self, gpa: int, size_bytes: int, value: int) -> None:
        """A write to nothing is lost."""

    def ioapic_eoi(self, vector: int) -> bool:
        """KVM_EXIT_IOAPIC_EOI: tell the IOAPIC in user space, if there is one."""
        if self.on_ioapic_eoi is not None:
            self.on_ioapic_eoi(vector)
        return False

    def set_tpr(self) -> None:
        """Nobody wants to know of CR8."""

    def unknown_msr(self, vcpu_id: int, access: str, index: int, rip: int) -> None:
        """KVM_EXIT_X86_RDMSR and _WRMSR."""
        self._owner.unknown_msr(vcpu_id, access, index, rip)

    def print_serial(self, byte: int) -> None:
        """A byte has left by the serial line."""
        self._print(self.serial, byte)

    def _print(self, text: bytearray, byte: int) -> None:
        if self.on_text is not None:
            self.on_text(byte)
        if len(text) < CONSOLE_LIMIT_BYTES:
            text.append(byte)
        else:
            self.dropped_bytes += 1
