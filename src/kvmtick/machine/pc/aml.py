"""The few words of ACPI Machine Language a small DSDT needs (ACPI specification 6.3, 20.2), and
the resource descriptors of an ISA device (6.4).
"""

__all__ = [
    "device",
    "eisa_id",
    "integer",
    "io_ports",
    "irq",
    "name",
    "package",
    "scope",
    "template",
]

BYTE_PREFIX, DWORD_PREFIX = b"\x0a", b"\x0c"
NAME_OP, SCOPE_OP, BUFFER_OP, PACKAGE_OP, DEVICE_OP = (
    b"\x08",
    b"\x10",
    b"\x11",
    b"\x12",
    b"\x5b\x82",
)
MOST_IN_ONE_BYTE, MOST_IN_TWO_BYTES = 0x3F, 0xFFF

IRQ_DESCRIPTOR, IO_DESCRIPTOR, END_TAG = 0x22, 0x47, b"\x79\0"
DECODES_16_BITS = 1


def integer(value: int) -> bytes:
    """A number up to 255."""
    return BYTE_PREFIX + bytes((value,)) if value > 1 else bytes((value,))


def name(path: str, value: bytes) -> bytes:
    """Name (`path`, `value`)."""
    return NAME_OP + path.encode() + value


def package(*elements: bytes) -> bytes:
    """Package () { ... }."""
    return PACKAGE_OP + _with_length(bytes((len(elements),)) + b"".join(elements))


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (`path`) { ... }."""
    return SCOPE_OP + _with_length(path.encode() + b"".join(terms))


def device(segment: str, *terms: bytes) -> bytes:
    """Device (`segment`) { ... }."""
    return DEVICE_OP + _with_length(segment.encode() + b"".join(terms))


def eisa_id(text: str) -> bytes:
    """EisaId ("PNP0501"): three letters in 5 bits each, four hexadecimal digits, big-endian."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | (ord(letter) - ord("A") + 1)
    return DWORD_PREFIX + letters.to_bytes(2, "big") + bytes.fromhex(text[3:])


def template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { ... }."""
    resources = b"".join(descriptors) + END_TAG
    return BUFFER_OP + _with_length(integer(len(resources)) + resources)


def io_ports(port: int, count: int) -> bytes:
    """IO (Decode16, `port`, `port`, 1, `count`)."""
    where = port.to_bytes(2, "little")
    return bytes((IO_DESCRIPTOR, DECODES_16_BITS)) + where + where + bytes((1, count))


def irq(line: int) -> bytes:
    """IRQNoFlags () {`line`}: edge-triggered, active high."""
    return bytes((IRQ_DESCRIPTOR,)) + (1 << line).to_bytes(2, "little")


def _with_length(content: bytes) -> bytes:
    """`content` behind its PkgLength, which counts itself."""
    length = len(content) + 1
    if length <= MOST_IN_ONE_BYTE:
        return bytes((length,)) + content
    length += 1
    if length > MOST_IN_TWO_BYTES:
        raise ValueError(f"{len(content)} bytes of AML: more than a PkgLength of 2 bytes counts")
    return bytes((1 << 6 | length & 0xF, length >> 4)) + content
