"""A gdb that says all it has to say beforehand, and then hears what it was answered."""

import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvmtick.kvm.model import ModelVm
from kvmtick.machine.gdb import GdbServer
from kvmtick.machine.run import Run

PATIENCE_S = 5
"""How long the server waits for a packet that nobody sends; then the connection is lost."""


def packet(payload: str | bytes) -> bytes:
    """A payload as it goes over the wire."""
    body = payload.encode("latin-1") if isinstance(payload, str) else payload
    return b"$%s#%02x" % (body, sum(body) & 0xFF)


class Client:
    """A machine's server at the other end of a socket pair."""

    def __init__(self, vm: ModelVm) -> None:
        self.vm = vm
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(PATIENCE_S)
        self.server = GdbServer(vm.machine, lambda: "the verdicts")

    def run(
        self, said: Sequence[str | bytes] | bytes, hangs_up: bool = False, **options: Any
    ) -> tuple[Run, list[str]]:
        """Say it (bytes: as they are), run the guest to its end; the run and the answers.

        Who `hangs_up` does so after the last word.
        """
        with ThreadPoolExecutor(1) as executor:
            wire = executor.submit(self._hear)
            self.ours.sendall(said if isinstance(said, bytes) else b"".join(map(packet, said)))
            if hangs_up:
                self.ours.shutdown(socket.SHUT_WR)
            self.server.serve(self.theirs)
            run = self.vm.run(until=self.server.poll, **({"limit_s": 20} | options))
            self.server.finish(run.exit)
            self.server.close()
            self.theirs.close()
            return run, answers(wire.result())

    def _hear(self) -> bytes:
        """All that comes over the wire."""
        heard = b""
        while part := self.ours.recv(1 << 16):
            heard += part
        self.ours.close()
        return heard


def answers(wire: bytes) -> list[str]:
    """The payloads of packets whose checksums are right."""
    found = []
    for body, digits in re.findall(rb"\$([^#]*)#(..)", wire, re.DOTALL):
        assert int(digits, 16) == sum(body) & 0xFF
        found.append(body.decode("latin-1"))
    return found
