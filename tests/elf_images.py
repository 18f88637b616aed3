"""ELF files and Multiboot kernels made of bytes."""

import struct

GPA = 0x10_0000
EM_386, EM_X86_64, EM_AARCH64 = 3, 62, 183
ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
PT_LOAD, PT_INTERP = 1, 3
MAGIC = 0x1BAD_B002

HEADER_BYTES = {32: 52, 64: 64}
PROGRAM_HEADER_BYTES = {32: 32, 64: 56}

ECHO_COMMAND_LINE = bytes.fromhex(
    "3d02b0ad2b 7511"  # cmp eax, 0x2badb002; jne fail
    "8b7310"  # mov esi, [ebx + 16]
    "ac 84c0 7404 e6e9 ebf7"  # next: lodsb; test al, al; jz done; out 0xe9, al; jmp next
    "b000 e6f4 f4"  # done: mov al, 0; out 0xf4, al; hlt
    "b001 e6f4 f4"  # fail: mov al, 1; out 0xf4, al; hlt
)
"""A Multiboot kernel's code: prints its command line to port 0xe9."""

LONG_MODE = bytes.fromhex(
    "6a10 488d0503000000 50 48cb"  # push 0x10; lea rax, [rip + 3]; push rax; retfq
    "48b96745230101000000 48c1e920 83f901 7520"  # mov rcx, 0x101234567; shr rcx, 32; 1?
    "4883ec08 0f290424"  # sub rsp, 8; movaps [rsp], xmm0
    "be3000e0fe 8b06 3c00 740d"  # mov esi, 0xfee00030; mov eax, [rsi]; cmp al, 0; je fail
    "e6e9 b036 e6e9 b000 e6f4 f4 90 90"  # out 0xe9, al; '6' to 0xe9; 0 to 0xf4; hlt
    "b001 e6f4 f4"  # fail: 1 to 0xf4; hlt
)
"""64-bit code: reloads CS, stores to the aligned stack, reads the local APIC's version and prints
it and a 6 to port 0xe9."""

PROTECTED_MODE = bytes.fromhex(
    "8cd8 8ed8"  # mov eax, ds; mov ds, eax
    "6a10 e800000000 830424 05 cb"  # push 0x10; call next; next: add dword [esp], 5; retf
    "b033 e6e9 b000 e6f4 f4"  # '3' to 0xe9; 0 to 0xf4; hlt
)
"""32-bit code: reloads DS and CS, and prints a 3 to port 0xe9."""


def elf(
    code: bytes,
    bits: int = 32,
    *,
    gpa: int = GPA,
    address: int | None = None,
    entry: int | None = None,
    memory_bytes: int | None = None,
    machine: int | None = None,
    type_: int = ET_EXEC,
    more: tuple[tuple[int, int, bytes], ...] = (),
) -> bytes:
    """An ELF with `code` in one PT_LOAD at `gpa`, linked for `address` and started at its first
    byte; `more` are further program headers: type, address, contents.
    """
    address = gpa if address is None else address
    parts = [(PT_LOAD, gpa, address, code, memory_bytes or len(code))]
    parts += [(kind, at, at, data, len(data)) for kind, at, data in more]
    offset = HEADER_BYTES[bits] + len(parts) * PROGRAM_HEADER_BYTES[bits]
    program_headers = contents = b""
    for kind, at, linked_at, data, size in parts:
        where = offset + len(contents)
        if bits == 64:
            program_headers += struct.pack(
                "<IIQQQQQQ", kind, 7, where, linked_at, at, len(data), size, 1
            )
        else:
            program_headers += struct.pack(
                "<IIIIIIII", kind, where, linked_at, at, len(data), size, 7, 1
            )
        contents += data
    header = struct.pack(
        "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH",
        type_,
        machine or (EM_X86_64 if bits == 64 else EM_386),
        1,
        address if entry is None else entry,
        HEADER_BYTES[bits],
        0,
        0,
        HEADER_BYTES[bits],
        PROGRAM_HEADER_BYTES[bits],
        len(parts),
        0,
        0,
        0,
    )
    ident = b"\x7fELF" + bytes((bits // 32, 1, 1)) + bytes(9)
    return ident + header + program_headers + contents


def multiboot_header(flags: int = 0, *addresses: int, magic: int = MAGIC) -> bytes:
    """The header, and the address fields behind it."""
    checksum = -(magic + flags) & 0xFFFF_FFFF
    return struct.pack(f"<3I{len(addresses)}I", magic, flags, checksum, *addresses)


def kernel(code: bytes = ECHO_COMMAND_LINE, bits: int = 32, flags: int = 0) -> bytes:
    """A Multiboot kernel in an ELF: header, then `code` at GPA + 12."""
    return elf(multiboot_header(flags) + code, bits, entry=GPA + 12)


def kludge(code: bytes = ECHO_COMMAND_LINE, *, before: bytes = b"", bss_bytes: int = 0) -> bytes:
    """A Multiboot kernel that is no ELF: `before` lies in front of what is loaded."""
    size = 32 + len(code)
    header = multiboot_header(
        1 << 16, GPA, GPA, GPA + size, GPA + size + bss_bytes if bss_bytes else 0, GPA + 32
    )
    return before + header + code
