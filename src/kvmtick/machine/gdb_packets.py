"""Packets of gdb's remote serial protocol over a socket (gdb's manual, appendix E.1).

`$` payload `#` two digits of checksum, each acknowledged by `+` or asked for again by `-` until
QStartNoAckMode; byte 3 between packets asks a running guest to stop.
"""

import select
import socket

__all__ = ["PACKET_BYTES", "PacketStream"]

PACKET_BYTES = 0x4000
"""The longest payload we take: PacketSize of qSupported."""
INTERRUPT = b"\x03"
ESCAPE = b"}"
ESCAPE_XOR = 0x20
_TO_ESCAPE = b"#$*}"
_LONGEST_BYTES = 2 * PACKET_BYTES


class PacketStream:
    """One connection. ConnectionError from any method: gdb is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self.acknowledges = True
        self._connection = connection
        self._buffer = b""
        self._last = b""

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def receive(self) -> bytes:
        """Wait for the next packet; its payload, without escapes."""
        while (payload := self._take()) is None:
            self._fill()
        return payload

    def is_interrupted(self) -> bool:
        """Whether gdb wants the running guest to stop; never waits."""
        while select.select([self._connection], [], [], 0)[0]:
            self._fill()
            if INTERRUPT in self._buffer:
                break
        asked = INTERRUPT in self._buffer
        self._buffer = self._buffer.replace(INTERRUPT, b"")
        return asked

    def send(self, payload: bytes) -> None:
        """Send one packet."""
        escaped = b"".join(
            ESCAPE + bytes((byte ^ ESCAPE_XOR,)) if byte in _TO_ESCAPE else bytes((byte,))
            for byte in payload
        )
        self._last = b"$%s#%02x" % (escaped, sum(escaped) & 0xFF)
        self._write(self._last)

    def _take(self) -> bytes | None:
        """The first whole packet of what has arrived; None if there is none."""
        while True:
            junk, dollar, rest = self._buffer.partition(b"$")
            if b"-" in junk and self._last:
                self._write(self._last)
            body, hash_, tail = rest.partition(b"#")
            if not dollar or not hash_ or len(tail) < 2:
                is_too_long = len(rest) > _LONGEST_BYTES
                self._buffer = b"" if is_too_long else dollar + rest
                return None
            self._buffer = tail[2:]
            if not self.acknowledges:
                return _unescape(body)
            if _is_checksum(tail[:2], body):
                self._write(b"+")
                return _unescape(body)
            self._write(b"-")

    def _fill(self) -> None:
        data = self._connection.recv(_LONGEST_BYTES)
        if not data:
            raise ConnectionAbortedError
        self._buffer += data

    def _write(self, data: bytes) -> None:
        self._connection.sendall(data)


def _is_checksum(digits: bytes, body: bytes) -> bool:
    try:
        return int(digits, 16) == sum(body) & 0xFF
    except ValueError:
        return False


def _unescape(body: bytes) -> bytes:
    first, *rest = body.split(ESCAPE)
    return first + b"".join(bytes((part[0] ^ ESCAPE_XOR,)) + part[1:] for part in rest if part)
