"""cpio archives in the "newc" format, as Linux unpacks them for an initramfs.

Implements what Documentation/driver-api/early-userspace/buffer-format.rst describes: directories,
regular files and device nodes. The same entries give the same bytes: owner 0, no times. There are
no links, no checksums ("crc" archives) and no compression.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Entry", "archive", "directory", "file", "node"]

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of an archive: its path without a leading slash, and what stat(2) calls st_mode."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    """Major and minor number, of a device node."""


def directory(path: str) -> Entry:
    """A directory; it must stand before what is in it."""
    return Entry(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | mode, data)


def node(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device."""
    return Entry(path, stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries`, in their order."""
    records = [_record(inode, entry) for inode, entry in enumerate(entries, 1)]
    return b"".join([*records, _record(0, Entry(TRAILER, 0))])


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        inode,
        entry.mode,
        *(0, 0),  # uid, gid
        links,
        0,  # mtime
        len(entry.data),
        *(0, 0),  # the device the file is on
        *entry.device,
        len(name),
        0,  # checksum
    )
    header = MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGN_BYTES)
