"""Linux kernels as bytes: the headers of a bzImage around code of our own."""

import struct

PREFERRED = 16 << 20
SETUP_SECTS = 1
KERNEL_OFFSET = (SETUP_SECTS + 1) * 512
ENTRY_64 = 0x200
CMDLINE_SIZE = 2047
XLF_KERNEL_64 = 1

ECHO_32 = bytes.fromhex("8bbe28020000 8a07 84c0 7405 e6e9 47 ebf5 31c0 e6f4 f4")
"""mov edi, [esi + cmd_line_ptr]; again: mov al, [edi]; test al, al; jz leave; out 0xe9, al;
inc edi; jmp again; leave: xor eax, eax; out 0xf4, al; hlt"""
ECHO_64 = bytes.fromhex("8bbe28020000 8a07 84c0 7406 e6e9 ffc7 ebf4 31c0 e6f4 f4")
"""The same, with the two bytes INC has there."""


def bzimage(
    version: int = 0x20F,
    *,
    code: bytes = ECHO_32,
    code_64: bytes = ECHO_64,
    loadflags: int = 1,
    xloadflags: int = XLF_KERNEL_64,
    preferred: int = PREFERRED,
    init_size: int = 1 << 20,
    initrd_addr_max: int = 0x7FFF_FFFF,
    cmdline_size: int = CMDLINE_SIZE,
) -> bytes:
    """A whole one; what a protocol before 2.10 does not have is left out of the header."""
    body = code.ljust(ENTRY_64, b"\xf4") + code_64
    body += bytes(-len(body) % 16)
    image = bytearray(KERNEL_OFFSET)
    image[0x1F1] = SETUP_SECTS
    struct.pack_into("<I", image, 0x1F4, len(body) // 16)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x201] = 0x268 - 0x202
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    image[0x211] = loadflags
    struct.pack_into("<I", image, 0x214, 0x10_0000)
    struct.pack_into("<I", image, 0x22C, initrd_addr_max)
    struct.pack_into("<I", image, 0x238, cmdline_size)
    if version >= 0x20A:
        struct.pack_into("<QI", image, 0x258, preferred, init_size)
    if version >= 0x20C:
        struct.pack_into("<H", image, 0x236, xloadflags)
    return bytes(image) + body
