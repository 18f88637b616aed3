"""gdb's remote serial protocol (gdb's manual, appendix E) on a machine: `kvmtick run --gdb`.

The server runs in the machine's own thread. While the guest stands it waits for packets; while the
guest runs, the run loop lets it `poll` for Ctrl-C after every stay in the guest. All-stop: what
stops one vCPU stops the machine. One gdb a run; when it is gone the guest runs on.

Not modelled: watchpoints (Z2 to Z4), non-stop mode, extended-remote, reverse execution, signals to
the guest (a PC has none: `C` and `S` are `c` and `s`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from kvmtick.machine.gdb_packets import PACKET_BYTES, PacketStream
from kvmtick.machine.gdb_target import Target
from kvmtick.machine.machine import Exit, Machine
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["GdbServer"]

HOST = "127.0.0.1"

SIGINT, SIGTRAP, SIGABRT, SIGSEGV, SIGALRM = 2, 5, 6, 11, 14
"""gdb's own numbers."""

OK = "OK"
BAD_ADDRESS = "E0e"
BAD_ARGUMENT = "E16"
UNSUPPORTED = ""

FEATURES = (
    f"PacketSize={PACKET_BYTES:x};qXfer:features:read+;vContSupported+;swbreak+;hwbreak+"
    ";QStartNoAckMode+"
)
MONITOR_HELP = """\
monitor ticks    the verdicts so far
monitor events   the last trace events
monitor info     where the machine stands
"""


class GdbServer:
    """Serves one gdb. Call `listen`, `wait`, then run the machine with `poll` as its `until`,
    and `finish` with what came of it.
    """

    def __init__(self, machine: Machine, ticks: Callable[[], str]) -> None:
        """`ticks` answers `monitor ticks`."""
        self._machine = machine
        self._listener: socket.socket | None = None
        self._stream: PacketStream | None = None
        self._target: Target | None = None
        self._stands = False
        self._stopped = ""
        self._thread = 1
        self._resume_thread = 0
        self._monitor: dict[str, Callable[[], str]] = {"ticks": ticks}

    def listen(self, port: int) -> int:
        """Open a port on this host (0: any that is free) and return it. OSError: it is taken."""
        self._listener = socket.create_server((HOST, port))
        number: int = self._listener.getsockname()[1]
        return number

    def wait(self) -> None:
        """Wait for gdb to connect, and on until it lets the guest run."""
        assert self._listener is not None
        connection, _ = self._listener.accept()
        self._listener.close()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.serve(connection)

    def serve(self, connection: socket.socket) -> None:
        """gdb is at the other end of `connection`; returns when it lets the guest run."""
        self._stream = PacketStream(connection)
        self._target = target = Target(self._machine)
        self._monitor |= {"events": target.events, "info": target.info}
        target.attach(self._on_debug)
        self._stop(target.current_thread, SIGTRAP, tell=False)

    def poll(self) -> bool:
        """Stop here if gdb asks for it; always false, the run goes on."""
        if self._stream is not None and self._target is not None:
            try:
                asked = self._stream.is_interrupted()
            except OSError:
                self._hang_up()
                return False
            if asked:
                self._stop(self._target.current_thread, SIGINT)
        return False

    def finish(self, exit_: Exit) -> None:
        """The run is over. A guest that failed can still be looked at, until gdb goes on."""
        target = self._target
        signal = _signal(exit_)
        if self._stream is not None and target is not None and signal in (SIGABRT, SIGSEGV):
            self._stop(target.current_thread, signal)
        if self._stream is not None:
            how = f"X{signal:02x}" if signal else f"W{exit_.code & 0xFF:02x}"
            self._send(how)
        self._hang_up()

    def close(self) -> None:
        """Give the sockets back; harmless when repeated."""
        self._hang_up()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # Standing.

    def _on_debug(self, vcpu: Vcpu) -> None:
        if self._target is not None:
            self._stop(self._target.thread_of(vcpu), SIGTRAP, is_step=vcpu.single_step)

    def _stop(self, thread: int, signal: int, *, is_step: bool = False, tell: bool = True) -> None:
        """The guest stands because of `thread`; do what gdb says until it may go on."""
        target = self._target
        assert target is not None
        target.stand()
        at_breakpoint = signal == SIGTRAP and not is_step and target.is_at_breakpoint(thread)
        self._thread = thread
        self._stopped = f"T{signal:02x}thread:{thread:x};{'swbreak:;' if at_breakpoint else ''}"
        self._stands = True
        if tell:
            self._send(self._stopped)
        while self._stands and self._stream is not None:
            try:
                packet = self._stream.receive()
            except OSError:
                self._hang_up()
                return
            reply = self._reply(packet)
            if reply is not None:
                self._send(reply)
                if packet == b"QStartNoAckMode" and self._stream is not None:
                    self._stream.acknowledges = False
                elif packet.startswith((b"D", b"vKill")):
                    self._hang_up()

    def _send(self, reply: str) -> None:
        if self._stream is not None:
            try:
                self._stream.send(reply.encode("latin-1"))
            except OSError:
                self._hang_up()

    def _hang_up(self) -> None:
        """gdb is gone: the guest runs on."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._target is not None:
            self._target.detach()
            self._target = None
        self._stands = False

    # Packets.

    def _reply(self, packet: bytes) -> str | None:
        """The answer to a packet, None for those that have none now; never raises for what is in
        it.
        """
        target = self._target
        assert target is not None
        text = packet.decode("latin-1")
        try:
            if text.startswith("X"):
                return self._write_binary(target, packet)
            for name, handler in _LONG_PACKETS.items():
                if text.startswith(name):
                    return handler(self, target, text.removeprefix(name))
            short = _PACKETS.get(text[:1])
            return UNSUPPORTED if short is None else short(self, target, text[1:])
        except (ValueError, IndexError):
            return BAD_ARGUMENT

    def _last_stop(self, target: Target, rest: str) -> str:
        return self._stopped

    def _general(self, target: Target, rest: str) -> str:
        return target.read_registers(self._thread)

    def _set_general(self, target: Target, rest: str) -> str:
        target.write_registers(self._thread, bytes.fromhex(rest.replace("x", "0")))
        return OK

    def _register(self, target: Target, rest: str) -> str:
        return target.read_register(self._thread, _hex(rest))

    def _set_register(self, target: Target, rest: str) -> str:
        number, _, digits = rest.partition("=")
        written = target.write_register(self._thread, _hex(number), bytes.fromhex(digits))
        return OK if written else BAD_ARGUMENT

    def _memory(self, target: Target, rest: str) -> str:
        address, size_bytes = _range(rest)
        size_bytes = min(size_bytes, PACKET_BYTES // 2)
        data = target.read_memory(self._thread, address, size_bytes)
        return data.hex() if data or not size_bytes else BAD_ADDRESS

    def _set_memory(self, target: Target, rest: str) -> str:
        where, _, digits = rest.partition(":")
        return self._write(target, where, bytes.fromhex(digits))

    def _write_binary(self, target: Target, packet: bytes) -> str:
        where, _, data = packet[1:].partition(b":")
        return self._write(target, where.decode("latin-1"), data)

    def _write(self, target: Target, where: str, data: bytes) -> str:
        address, size_bytes = _range(where)
        if size_bytes != len(data):
            return BAD_ARGUMENT
        return OK if target.write_memory(self._thread, address, data) else BAD_ADDRESS

    def _insert(self, target: Target, rest: str) -> str:
        return self._change_breakpoint(target.breakpoints.add, rest)

    def _remove(self, target: Target, rest: str) -> str:
        return self._change_breakpoint(target.breakpoints.discard, rest)

    def _change_breakpoint(self, change: Callable[[int], None], rest: str) -> str:
        kind, address, *_ = rest.split(",")
        if kind not in ("0", "1"):
            return UNSUPPORTED
        change(_hex(address))
        return OK

    # Threads.

    def _select(self, target: Target, rest: str) -> str:
        """`H`: the thread that registers and memory are of (`g`), or that `c` and `s` are for."""
        thread = _thread_id(rest[1:])
        if thread and thread not in target.threads:
            return BAD_ARGUMENT
        if rest[:1] == "c":
            self._resume_thread = thread
        elif thread:
            self._thread = thread
        return OK

    def _is_alive(self, target: Target, rest: str) -> str:
        return OK if _thread_id(rest) in target.threads else BAD_ARGUMENT

    def _threads(self, target: Target, rest: str) -> str:
        return "m" + ",".join(f"{thread:x}" for thread in target.threads)

    def _no_more_threads(self, target: Target, rest: str) -> str:
        return "l"

    def _current_thread(self, target: Target, rest: str) -> str:
        """`qC`; `qCRC` is another packet."""
        return UNSUPPORTED if rest else f"QC{self._thread:x}"

    def _thread_extra(self, target: Target, rest: str) -> str:
        thread = _thread_id(rest)
        if thread not in target.threads:
            return BAD_ARGUMENT
        return target.thread_info(thread).encode().hex()

    # Going on.

    def _go(self, target: Target, stepping: list[int]) -> None:
        target.resume(stepping)
        self._stands = False

    def _continue(self, target: Target, rest: str) -> None:
        if rest:
            target.write_pc(self._resume_thread or self._thread, _hex(rest))
        self._go(target, [])

    def _step(self, target: Target, rest: str) -> None:
        thread = self._resume_thread or self._thread
        if rest:
            target.write_pc(thread, _hex(rest))
        self._go(target, [thread])

    def _continue_with(self, target: Target, rest: str) -> None:
        self._continue(target, rest.partition(";")[2])

    def _step_with(self, target: Target, rest: str) -> None:
        self._step(target, rest.partition(";")[2])

    def _vcont(self, target: Target, rest: str) -> str | None:
        """The first action that names a thread, or none, is the thread's."""
        actions = [action.partition(":") for action in rest.split(";")]
        wanted: dict[int, str] = {}
        for action, _, where in actions:
            named = _thread_id(where) if where else 0
            if action[:1] not in ("c", "C", "s", "S", "t") or not action:
                return BAD_ARGUMENT
            for thread in target.threads:
                if named in (0, thread):
                    wanted.setdefault(thread, action[0])
        if not any(action in "cCsS" for action in wanted.values()):
            return BAD_ARGUMENT
        self._go(target, [thread for thread, action in wanted.items() if action in "sS"])
        return None

    def _vcont_actions(self, target: Target, rest: str) -> str:
        return "vCont;c;C;s;S"

    def _detach(self, target: Target, rest: str) -> str:
        self._stands = False
        return OK

    def _kill(self, target: Target, rest: str) -> str | None:
        target.end(Exit("interrupted", detail="gdb killed the guest"))
        self._stands = False
        if rest:
            return OK
        self._hang_up()
        return None

    # Queries.

    def _supported(self, target: Target, rest: str) -> str:
        return FEATURES

    def _no_acks(self, target: Target, rest: str) -> str:
        return OK

    def _attached(self, target: Target, rest: str) -> str:
        """1: when gdb quits it detaches, and the guest runs on."""
        return "1"

    def _features(self, target: Target, rest: str) -> str:
        name, _, where = rest.partition(":")
        if name != "target.xml":
            return "E00"
        offset, size_bytes = _range(where)
        if not offset:
            target.choose_architecture(self._thread)
        description = target.architecture.description
        part = description[offset : offset + min(size_bytes, PACKET_BYTES // 2)]
        return f"{'l' if offset + len(part) >= len(description) else 'm'}{part}"

    def _command(self, target: Target, rest: str) -> str:
        command = bytes.fromhex(rest).decode("utf-8", "replace").strip()
        answer = self._monitor.get(command)
        text = MONITOR_HELP if answer is None else answer()
        if answer is None and command not in ("", "help"):
            text = f"unknown command {command!r}\n{text}"
        return f"{text.rstrip()}\n".encode().hex()


_Handler = Callable[[GdbServer, Target, str], str | None]

_LONG_PACKETS: dict[str, _Handler] = {
    "qSupported": GdbServer._supported,
    "QStartNoAckMode": GdbServer._no_acks,
    "qXfer:features:read:": GdbServer._features,
    "qAttached": GdbServer._attached,
    "qfThreadInfo": GdbServer._threads,
    "qsThreadInfo": GdbServer._no_more_threads,
    "qThreadExtraInfo,": GdbServer._thread_extra,
    "qRcmd,": GdbServer._command,
    "qC": GdbServer._current_thread,
    "vCont?": GdbServer._vcont_actions,
    "vCont;": GdbServer._vcont,
    "vKill;": GdbServer._kill,
}
_PACKETS: dict[str, _Handler] = {
    "?": GdbServer._last_stop,
    "g": GdbServer._general,
    "G": GdbServer._set_general,
    "p": GdbServer._register,
    "P": GdbServer._set_register,
    "m": GdbServer._memory,
    "M": GdbServer._set_memory,
    "Z": GdbServer._insert,
    "z": GdbServer._remove,
    "H": GdbServer._select,
    "T": GdbServer._is_alive,
    "c": GdbServer._continue,
    "C": GdbServer._continue_with,
    "s": GdbServer._step,
    "S": GdbServer._step_with,
    "D": GdbServer._detach,
    "k": GdbServer._kill,
}


def _signal(exit_: Exit) -> int:
    """The signal that ended the guest, as gdb shall show it; 0: it ended by itself."""
    if exit_.reason == "triple-fault" or (exit_.reason == "guest-error" and not exit_.code):
        return SIGSEGV
    return {"deadlock": SIGABRT, "limit": SIGALRM, "interrupted": SIGINT}.get(exit_.reason, 0)


def _hex(digits: str) -> int:
    """A number of the protocol. ValueError: it is none."""
    if not digits or digits.strip("0123456789abcdefABCDEF"):
        raise ValueError(digits)
    return int(digits, 16)


def _range(text: str) -> tuple[int, int]:
    address, _, size_bytes = text.partition(",")
    return _hex(address), _hex(size_bytes)


def _thread_id(text: str) -> int:
    """0 for all (-1) and any (0)."""
    return 0 if text == "-1" else _hex(text)
