"""A bzImage of a few bytes: prints a prompt, gives every byte back, and is done at Ctrl-D."""

import struct

BASE = 1 << 20
ENTRY_64_OFFSET = 0x200
SECTOR_BYTES = 512

CODE = bytes.fromhex(
    "66baf903 b001 ee"  # mov dx, 0x3f9; mov al, 1; out dx, al       receive interrupts on
    "66baf803 b03e ee"  # mov dx, 0x3f8; mov al, '>'; out dx, al
    "66bafd03 ec a801"  # next: mov dx, 0x3fd; in al, dx; test al, 1
    "7504"  #             jnz take
    "f390 ebf3"  #        pause; jmp next
    "66baf803 ec"  # take: mov dx, 0x3f8; in al, dx
    "3c04"  #             cmp al, 4
    "7403"  #             je done
    "ee ebe7"  #          out dx, al; jmp next
    "30c0 e6f4"  #        done: xor al, al; out 0xf4, al
    "ebfe"
)


def echo_kernel() -> bytes:
    """The file."""
    body = (bytes(ENTRY_64_OFFSET) + CODE).ljust(2 * SECTOR_BYTES, b"\0")
    header = bytearray(2 * SECTOR_BYTES)
    header[0x1F1] = 1
    struct.pack_into("<I", header, 0x1F4, len(body) // 16)
    struct.pack_into("<H", header, 0x1FE, 0xAA55)
    header[0x201] = 0x66
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, 0x20C)
    header[0x211] = 1
    struct.pack_into("<I", header, 0x214, BASE)
    struct.pack_into("<I", header, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<HI", header, 0x236, 1, 255)
    struct.pack_into("<QI", header, 0x258, BASE, len(body))
    return bytes(header) + body
