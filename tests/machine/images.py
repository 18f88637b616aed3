"""Small real-mode guests as bytes, for 0x8000."""

LOAD_AT = 0x8000

SPIN = bytes.fromhex("ebfe")
"""jmp $"""
CLI_HLT = bytes.fromhex("faf4")
STI_HLT = bytes.fromhex("fbf4 ebfc")
"""sti; again: hlt; jmp again - and nothing that could wake it"""
TRIPLE_FAULT = bytes.fromhex("0f011e0880 cc f4f4 000000000000")
"""lidt [0x8008], whose limit is 0; int3"""


def out(port: int, value: int) -> bytes:
    """mov al, value; mov dx, port; out dx, al"""
    return bytes((0xB0, value, 0xBA, port & 0xFF, port >> 8, 0xEE))


def out32(port: int, value: int) -> bytes:
    """mov eax, value; mov dx, port; out dx, eax"""
    return (
        b"\x66\xb8"
        + value.to_bytes(4, "little")
        + bytes((0xBA, port & 0xFF, port >> 8, 0x66, 0xEF))
    )


def leave(code: int) -> bytes:
    """Write `code` to the debug exit port."""
    return out(0xF4, code) + b"\xf4"


def read_and_print(port: int) -> bytes:
    """mov dx, port; in al, dx; out 0xe9, al"""
    return bytes((0xBA, port & 0xFF, port >> 8, 0xEC, 0xE6, 0xE9))


def ticker(count: int = 1193) -> bytes:
    """PICs at 0x20, PIT mode 2 with `count`; a handler that counts at 0x500 and writes EOI."""
    handler = bytes.fromhex("66ff060005 50 b020 e620 58 cf")
    setup = bytes.fromhex("31c0 8ed8 8ed0 bc007c c7068000")  # vector 0x20 lies at 0x80
    setup += (0x7000).to_bytes(2, "little") + bytes.fromhex("c70682000000")
    # copy the handler to 0x7000: it follows the loop below
    programs = b"".join(
        out(port, value)
        for port, value in (
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 0x04),
            (0x21, 0x01),
            (0x21, 0xFE),
            (0x43, 0x34),
            (0x40, count & 0xFF),
            (0x40, count >> 8),
        )
    )
    loop = bytes.fromhex("fbf4 ebfc")
    copy_length = 14  # be imm16, bf imm16, b9 imm16, 8e c0, f3 a4, fc: below
    at = LOAD_AT + len(setup) + copy_length + len(programs) + len(loop)
    copy = bytes.fromhex("8ec0 fc be") + at.to_bytes(2, "little") + bytes.fromhex("bf0070 b9")
    copy += len(handler).to_bytes(2, "little") + bytes.fromhex("f3a4")
    assert len(copy) == copy_length
    return setup + copy + programs + loop + handler


COUNTER = 0x500
"""Where `ticker` counts, 32 bits."""
