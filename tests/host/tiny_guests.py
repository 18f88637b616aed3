"""Guests of a few bytes, assembled by hand."""

from collections.abc import Callable

from kvmtick.guests import Guest
from kvmtick.kvm.kernel import KernelVm

CODE = 0x1000
LIMIT_S = 5.0


def bytes_at(image: bytes, load_at: int = CODE) -> Guest:
    """A guest at 0:0x1000."""
    return Guest("bytes", image, load_at, (0, CODE), None)


def out8(port: int, value: int) -> bytes:
    """mov al, value; out port, al"""
    return bytes((0xB0, value, 0xE6, port))


DONE = bytes((0xE6, 0xF4))
"""out 0xf4, al"""
SPIN = bytes((0xEB, 0xFE))
"""jmp $"""
HLT = b"\xf4"

TRIPLE_FAULT = b"\x0f\x01\x1e\x00\x00\x66\xb8\x01\x00\x00\x00\x0f\x22\xc0\x0f\x0b"
"""lidt [0] (an empty IDT); mov eax, 1; mov cr0, eax (protected mode); ud2"""

PIC_INIT = b"".join(
    out8(port, value)
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE))
)
"""Vectors from 0x20, only IRQ 0 open."""


def ticker(ticks: int, count: int = 1193) -> bytes:
    """Program channel 0 as a rate generator, take `ticks` interrupts, report their number."""
    head = (
        b"\xfa\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x10"  # cli; ds = ss = 0; sp = 0x1000
        b"\xc7\x06\x80\x00%b"  # [0x20 * 4] = isr
        b"\xc7\x06\x82\x00\x00\x00"
    )
    body = PIC_INIT + out8(0x43, 0x34) + out8(0x40, count & 0xFF) + out8(0x40, count >> 8)
    # cx = 0; again: sti; hlt; cmp cx, ticks; jb again; mov al, cl; out 0xf4, al
    body += b"\x31\xc9" + bytes((0xFB, 0xF4, 0x83, 0xF9, ticks, 0x72, 0xF9)) + b"\x88\xc8" + DONE
    # inc cx; EOI; push bp; mov bp, sp; and byte [bp + 7], ~2 (IF of the frame); pop bp; iret:
    # the next tick waits for the next sti, so the guest never takes one too many
    isr = b"\x41" + out8(0x20, 0x20) + b"\x55\x89\xe5\x80\x66\x07\xfd\x5d\xcf"
    isr_at = CODE + len(head % b"\0\0") + len(body)
    return head % isr_at.to_bytes(2, "little") + body + isr


MakeVm = Callable[..., KernelVm]


def accesses(vm: KernelVm, port: int) -> int:
    """Run the guest to its end; how many of its accesses to `port` came to user space."""
    seen = 0

    def handler(port: int, size_bytes: int, value: int | None) -> None:
        nonlocal seen
        seen += 1

    assert vm.run(handlers={port: handler}, limit_s=LIMIT_S).exit.reason != "limit"
    return seen
