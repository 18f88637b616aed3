"""gdb's remote protocol without a gdb: packets, answers, what goes wrong; same trace as without."""

import io
import socket
from collections.abc import Callable

import pytest
from gdb_client import Client, packet
from images import CLI_HLT, LOAD_AT, SPIN, ticker
from images import TRIPLE_FAULT as TRIPLE_FAULT_AT_8000

from kvmtick import guests
from kvmtick.cli import EXIT_USAGE, main
from kvmtick.guests import Guest, Needs
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.gdb_packets import PACKET_BYTES, PacketStream
from kvmtick.machine.gdb_registers import I386, I8086, X86_64, architecture_of
from kvmtick.machine.machine import QUANTUM_NS
from kvmtick.trace.ftrace import FtraceWriter

HANDLER = 0x7000
"""Where `ticker` has its handler."""
STEPS = bytes.fromhex("b001 b002 b003 e6f4")
"""mov al, 1; mov al, 2; mov al, 3; out 0xf4, al"""
DONE = "W00"
EIP = 8


def boot(guest: Guest | bytes, detail: bool = False, quantum_ns: int = QUANTUM_NS) -> ModelVm:
    vm = ModelVm(detail=detail, quantum_ns=quantum_ns)
    if isinstance(guest, bytes):
        guest = Guest("test", guest, LOAD_AT, (0, LOAD_AT), None)
    vm.prepare(guest.needs)
    vm.load(guest)
    return vm


def debug(image: bytes | Guest, *said: str | bytes, **options: int) -> list[str]:
    """The answers to what gdb said."""
    with boot(image) as vm:
        return Client(vm).run(said, **options)[1]


def le32(value: int) -> str:
    return value.to_bytes(4, "little").hex()


# --- packets ------------------------------------------------------------------------------------


@pytest.fixture
def stream() -> tuple[PacketStream, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    return PacketStream(theirs), ours


def test_packets_are_acknowledged_until_gdb_wants_no_more_of_it(
    stream: tuple[PacketStream, socket.socket],
) -> None:
    server, client = stream
    client.sendall(b"+" + packet("?") + b"+" + packet("g"))
    assert (server.receive(), server.receive()) == (b"?", b"g")
    assert client.recv(10) == b"++"
    server.acknowledges = False
    client.sendall(packet("k"))
    assert server.receive() == b"k"
    server.close()
    assert client.recv(10) == b""


def test_a_wrong_checksum_asks_for_the_packet_again(
    stream: tuple[PacketStream, socket.socket],
) -> None:
    server, client = stream
    client.sendall(b"$g#00" + b"$g#zz" + packet("g"))
    assert server.receive() == b"g"
    assert client.recv(10) == b"--+"


def test_what_gdb_did_not_understand_is_sent_again(
    stream: tuple[PacketStream, socket.socket],
) -> None:
    server, client = stream
    server.send(b"OK")
    client.sendall(b"-" + packet("?"))
    assert server.receive() == b"?"
    assert client.recv(100) == packet("OK") * 2 + b"+"


def test_bytes_that_mean_something_are_escaped_both_ways(
    stream: tuple[PacketStream, socket.socket],
) -> None:
    server, client = stream
    server.send(b"a#b$c*d}")
    assert client.recv(100) == packet(b"a}\x03b}\x04c}\x0ad}]")
    client.sendall(packet(b"X0,3:}\x03}]}\x04"))
    assert server.receive() == b"X0,3:#}$"


def test_a_packet_without_end_is_forgotten(stream: tuple[PacketStream, socket.socket]) -> None:
    server, client = stream
    client.sendall(b"$" + b"m" * 4 * PACKET_BYTES)
    client.sendall(b"#00" + packet("?"))
    assert server.receive() == b"?"


def test_ctrl_c_between_packets_is_seen_without_waiting(
    stream: tuple[PacketStream, socket.socket],
) -> None:
    server, client = stream
    assert not server.is_interrupted()
    client.sendall(b"\x03" + packet("?"))
    assert server.is_interrupted()
    assert not server.is_interrupted()
    assert server.receive() == b"?"


def test_a_closed_connection_is_a_connection_error(
    stream: tuple[PacketStream, socket.socket],
) -> None:
    server, client = stream
    client.close()
    with pytest.raises(ConnectionError):
        server.receive()
    with pytest.raises(ConnectionError):
        server.is_interrupted()


# --- registers ----------------------------------------------------------------------------------


def test_the_description_follows_the_mode() -> None:
    assert architecture_of({"cr0": 0x10}) is I8086
    assert architecture_of({"cr0": 0x11, "efer": 0}) is I386
    assert architecture_of({"cr0": 0x8000_0011, "efer": 0x500}) is X86_64


@pytest.mark.parametrize("architecture", [I8086, I386, X86_64], ids=lambda a: a.name)
def test_what_is_decoded_is_what_was_encoded(architecture: type[I386]) -> None:
    width = 8 * architecture.width_bytes
    registers = {r.source: 0x55 for r in architecture.registers if r.source}
    registers |= {"cs_access": 0xC09B, "cs_base": 0, "rip": 0x12345678 & (1 << width) - 1}
    for number, register in enumerate(architecture.registers):
        digits = architecture.encode(number, registers)
        assert len(digits) == 2 * register.size_bytes
        if register.source:
            data = bytes.fromhex(digits)
            expected = {register.source: registers[register.source]}
            assert architecture.decode(number, data, registers) == expected
        else:
            assert digits == "xx" * register.size_bytes
            assert architecture.decode(number, bytes(register.size_bytes), registers) == {}


def test_the_program_counter_is_linear_and_selectors_get_their_base() -> None:
    registers = {"cr0": 0x10, "cs": 0x1000, "cs_base": 0x1_0000, "rip": 0x20}
    assert I8086.encode(I8086.pc, registers) == le32(0x1_0020)
    assert I8086.decode(I8086.pc, bytes.fromhex(le32(0x1_0042)), registers) == {"rip": 0x42}
    cs = next(n for n, register in enumerate(I8086.registers) if register.name == "cs")
    written = I8086.decode(cs, bytes.fromhex(le32(0x2000)), registers)
    assert written == {"cs": 0x2000, "cs_base": 0x2_0000}
    assert I386.decode(cs, bytes.fromhex(le32(8)), registers | {"cr0": 0x11}) == {"cs": 8}


def test_registers_are_read_and_written() -> None:
    said = ["P0=78563412", "p0", f"p{EIP:x}", f"P{EIP:x}={le32(LOAD_AT + 6)}", "g", "p99", "p"]
    said += ["P0=12", "Pzz=00", "P10=00000000000000000000", "D"]
    ok, eax, eip, moved, all_, *errors, detached = debug(STEPS, *said)
    assert (ok, eax, eip, moved) == ("OK", "78563412", le32(LOAD_AT), "OK")
    assert all_.startswith("78563412")
    assert all_[8 * EIP : 8 * EIP + 8] == le32(LOAD_AT + 6)
    assert errors == ["E16"] * 5, "the last is st0, which is not there"
    assert detached == "OK"


def test_all_registers_at_once_and_the_guest_uses_them() -> None:
    [before, *_] = debug(STEPS, "g", "D")
    at_out = before[: 8 * EIP] + le32(LOAD_AT + 6) + before[8 * EIP + 8 :]
    said = ["G" + "07000000" + at_out[8:], "c"]
    assert debug(STEPS, *said) == ["OK", "W07"]
    assert debug(STEPS, "G00", "D")[0] == "E16"


# --- memory -------------------------------------------------------------------------------------


def test_memory_is_read_and_written() -> None:
    said: list[str | bytes] = [f"m{LOAD_AT:x},4", f"M{LOAD_AT:x},2:e6f4", f"m{LOAD_AT:x},2"]
    said += [b"X9000,3:a}\x03b", "m9000,4", "X9000,0:", "m9000,0"]
    heard = debug(STEPS, *said, "D")
    assert heard == ["b001b002", "OK", "e6f4", "OK", "61236200", "OK", "", "OK"]


def test_what_is_no_ram_is_an_error_and_nothing_is_written_in_part() -> None:
    said = ["mfee00000,4", "m1ffffe,8", "M1ffffe,4:11223344", "m1ffffe,2"]
    said += ["m0", "m0,", "mzz,4", "M0,2:11", "M0,1:zz", "m0,-1", "D"]
    heard = debug(STEPS, *said)
    assert heard == ["E0e", "0000", "E0e", "0000", *["E16"] * 6, "OK"]


def test_code_that_gdb_writes_is_executed() -> None:
    said = ["s", f"M{LOAD_AT + 2:x},4:b005e6f4", "c"]
    heard = debug(STEPS, *said)
    assert heard == ["T05thread:1;", "OK", "W05"]


# --- running ------------------------------------------------------------------------------------


def test_the_guest_waits_at_its_first_instruction() -> None:
    assert debug(STEPS, "?", f"p{EIP:x}", "c") == ["T05thread:1;", le32(LOAD_AT), "W03"]


def test_a_breakpoint_is_no_int3_and_comes_each_time() -> None:
    image = ticker()
    go = ["qSupported:swbreak+", f"Z0,{HANDLER:x},1", "c", f"p{EIP:x}", f"m{HANDLER:x},1"]
    go += [f"z0,{HANDLER:x},1", "s", f"Z1,{HANDLER:x},1", "c", "m500,4", f"z1,{HANDLER:x},1", "D"]
    heard = debug(image, *go, for_ns=10_000_000)
    stop = "T05thread:1;swbreak:;"
    assert heard[1:] == [
        *("OK", stop, le32(HANDLER), "66"),
        *("OK", "T05thread:1;", "OK", stop, "01000000", "OK", "OK"),
    ]


def test_a_step_is_an_instruction_or_the_way_into_a_handler() -> None:
    image = ticker()
    loop = LOAD_AT + image.index(bytes.fromhex("fbf4ebfc"))
    go = [f"Z0,{loop + 1:x},1", "c", f"z0,{loop + 1:x},1", "s", f"p{EIP:x}", "s", f"p{EIP:x}", "D"]
    heard = debug(image, *go, for_ns=10_000_000)
    assert heard[4:7] == [le32(loop + 2), "T05thread:1;", le32(HANDLER)]


def test_going_on_elsewhere() -> None:
    assert debug(STEPS, f"c{LOAD_AT + 4:x}") == ["W03"]
    assert debug(STEPS, f"s{LOAD_AT + 4:x}", f"p{EIP:x}", "C05") == [
        "T05thread:1;",
        le32(LOAD_AT + 6),
        "W03",
    ]
    assert debug(STEPS, "S05;8004", "c") == ["T05thread:1;", "W03"]


def test_ctrl_c_stops_a_guest_that_spins() -> None:
    said = packet("c") + b"\x03" + packet(f"p{EIP:x}") + packet("D")
    with boot(SPIN) as vm:
        run, heard = Client(vm).run(said, for_ns=5_000_000)
    assert heard == ["T02thread:1;", le32(LOAD_AT), "OK"]
    assert (run.exit.reason, run.elapsed_ns) == ("time", 5_000_000), "it ran on after that"


def test_kill_ends_the_run() -> None:
    for said, heard in ((["k"], []), (["vKill;1"], ["OK"]), (["s", "k"], ["T05thread:1;"])):
        with boot(SPIN) as vm:
            run, answered = Client(vm).run(said)
        assert (run.exit.reason, answered) == ("interrupted", heard)
        assert run.instructions <= 1


def test_how_the_guest_ended_is_told_last() -> None:
    assert debug(STEPS.replace(b"\x03", b"\x00"), "c") == [DONE]
    assert debug(SPIN, "c", for_ns=1000) == [DONE]
    assert debug(SPIN, "c", limit_s=0) == ["X0e"]


@pytest.mark.parametrize(("image", "signal"), [(TRIPLE_FAULT_AT_8000, "0b"), (CLI_HLT, "06")])
def test_a_guest_that_failed_can_be_looked_at(image: bytes, signal: str) -> None:
    stop, eip, end = debug(image, "c", f"p{EIP:x}", "c")
    assert (stop, end) == (f"T{signal}thread:1;", f"X{signal}")
    assert int.from_bytes(bytes.fromhex(eip), "little") > LOAD_AT


# --- threads ------------------------------------------------------------------------------------


def test_vcpus_are_threads() -> None:
    guest = guests.load("ipi-tick", ticks=3)
    said = ["qfThreadInfo", "qsThreadInfo", "qC", "T2", "T3", "Hg2", "qC", f"p{EIP:x}", "Hg9"]
    said += ["qThreadExtraInfo,2", "qThreadExtraInfo,7", "Hc-1", "Hcx", "vCont?", "vCont;c"]
    heard = debug(guest, *said)
    assert heard[:5] == ["m1,2", "l", "QC1", "OK", "E16"]
    assert heard[5:9] == ["OK", "QC2", le32(0xFFFF0), "E16"]
    assert bytes.fromhex(heard[9]).decode() == "vCPU 1 [uninitialized]"
    assert heard[10:] == ["E16", "OK", "E16", "vCont;c;C;s;S", DONE]


def test_a_step_is_for_one_thread_and_the_other_takes_its_turns() -> None:
    guest = guests.load("ipi-tick", ticks=3)
    said = ["vCont;s:2;c", f"p{EIP:x}", "vCont;s:2", "vCont;C05:1;c:-1"]
    first, eip, second, end = debug(guest, *said)
    assert (first, second, end) == ("T05thread:2;", "T05thread:2;", DONE)
    at = int.from_bytes(bytes.fromhex(eip), "little")
    assert LOAD_AT < at < LOAD_AT + len(guest.image), "vCPU 1 was started by vCPU 0"


def test_a_breakpoint_that_is_out_for_a_step_is_not_missed_by_another_thread() -> None:
    loop = bytes.fromhex("90 ebfd")  # nop; jmp to it
    guest = Guest("test", loop, LOAD_AT, (0, LOAD_AT), None, Needs(vcpus=2))
    put, out, step = f"Z0,{LOAD_AT:x},1", f"z0,{LOAD_AT:x},1", "vCont;s:1"
    with boot(guest, quantum_ns=2) as vm:
        vm.machine.board.vcpus[1].start_at(0, LOAD_AT)
        # The turn of thread 1 ends behind its second step, with which it is at the loop's start.
        said = [put, "vCont;c", out, step, put, step, out, step, "D"]
        _, heard = Client(vm).run(said, for_ns=10_000)
    at_breakpoint = "T05thread:{};swbreak:;"
    stops = [answer for answer in heard if answer != "OK"]
    assert stops[:3] == [at_breakpoint.format(1), "T05thread:1;", "T05thread:1;"]
    assert stops[3] == at_breakpoint.format(2)


def test_actions_that_are_none() -> None:
    said = ["vCont;x", "vCont;", "vCont;t", "vCont;s:9", "vCont;s:zz", "D"]
    assert debug(STEPS, *said) == ["E16"] * 5 + ["OK"]


# --- queries ------------------------------------------------------------------------------------


def test_queries() -> None:
    said = ["qSupported:multiprocess+", "qAttached", "QStartNoAckMode", "qOffsets", "Zx", "Z2,0,1"]
    heard = debug(STEPS, *said, "vMustReplyEmpty", "\xff\xfe", "", "qC", "qCRC:0,9", "D")
    assert f"PacketSize={PACKET_BYTES:x}" in heard[0]
    assert heard[1:] == ["1", "OK", "", "E16", "", "", "", "", "QC1", "", "OK"]


def test_the_description_comes_in_parts() -> None:
    read = "qXfer:features:read:target.xml:{:x},{:x}"
    size_bytes = len(I8086.description)
    said = [read.format(0, 100), read.format(100, PACKET_BYTES), read.format(size_bytes, 9)]
    said += ["qXfer:features:read:other.xml:0,9", "qXfer:features:read:target.xml:0", "D"]
    first, rest, end, *errors = debug(STEPS, *said)
    assert (first[0], rest[0], end) == ("m", "l", "l")
    assert first[1:] + rest[1:] == I8086.description
    assert errors == ["E00", "E16", "OK"]


def test_monitor_commands() -> None:
    def said(command: str) -> str:
        return f"qRcmd,{command.encode().hex()}"

    commands = ["ticks", "events", "info", "help", "nonsense"]
    heard = debug(STEPS, *map(said, commands), "qRcmd,zz", "D")
    texts = [bytes.fromhex(answer).decode() for answer in heard[:5]]
    assert texts[0] == "the verdicts\n"
    assert "kvm_apicv_inhibit_changed" in texts[1]
    assert "vCPU 0 [runnable]: real mode, cs 0x0, rip 0x8000" in texts[2]
    assert texts[3].startswith("monitor ticks ")
    assert texts[4].startswith("unknown command 'nonsense'\n")
    assert heard[5] == "E16"


# --- gdb goes away ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [b"", b"$", b"$g#", packet("?")[:-1], b"\x03\x03", b"\xff" * 1000, packet("Z0,8000,1")],
    ids=repr,
)
def test_a_connection_lost_while_it_stands_lets_the_guest_run_on(said: bytes) -> None:
    with boot(STEPS) as vm:
        run, _ = Client(vm).run(said, hangs_up=True)
    assert (run.exit.reason, run.exit.code) == ("guest-error", 3)


def test_a_connection_lost_while_it_runs_takes_the_breakpoints_along() -> None:
    with boot(ticker()) as vm:
        said = [f"Z0,{HANDLER:x},1", "c"]
        run, heard = Client(vm).run(said, hangs_up=True, for_ns=10_000_000)
    assert (run.exit.reason, run.elapsed_ns) == ("time", 10_000_000)
    assert heard == ["OK"]


# --- the same run -------------------------------------------------------------------------------


def trace_of(guest: Guest, run: Callable[[ModelVm], object]) -> str:
    """The ftrace text of a run, all details included."""
    text = io.StringIO()
    with boot(guest, detail=True) as vm:
        vm.machine.recorder.add_consumer(FtraceWriter(text, vm.machine.recorder.tasks))
        run(vm)
    return text.getvalue()


@pytest.mark.parametrize("name", ["tick-pic", "tick-lapic", "ipi-tick", "tick-long"])
def test_a_run_under_gdb_has_the_trace_of_one_without(name: str) -> None:
    guest = guests.load(name, ticks=4)
    plain = trace_of(guest, lambda vm: vm.run(limit_s=20))
    assert plain.count("\n") > 100

    def stepped(vm: ModelVm) -> None:
        last = len(vm.machine.board.vcpus)
        said = ["s"] * 250 + [f"vCont;s:{last:x};c"] * 300 + ["c"]
        *stops, end = Client(vm).run(said)[1]
        assert end == DONE
        assert len(stops) > 250
        assert set(stops) == {"T05thread:1;", f"T05thread:{last:x};"}

    assert trace_of(guest, stepped) == plain


def test_breakpoints_leave_the_trace_alone() -> None:
    guest = Guest("test", ticker(), LOAD_AT, (0, LOAD_AT), None)
    plain = trace_of(guest, lambda vm: vm.run(for_ns=20_000_000, limit_s=20))

    def broken(vm: ModelVm) -> None:
        over = [f"z0,{HANDLER:x},1", "s", f"Z0,{HANDLER:x},1", "c"]
        said = [f"Z0,{HANDLER:x},1", "c", *over * 15, f"z0,{HANDLER:x},1", "c"]
        _, heard = Client(vm).run(said, for_ns=20_000_000)
        assert heard.count("T05thread:1;swbreak:;") == 16

    assert trace_of(guest, broken) == plain


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["-1", "65536", "x", "1.5"])
def test_a_port_that_is_none_is_a_usage_error(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--gdb", port]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.startswith("kvmtick: --gdb")
    assert err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line_with_the_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["run", "--gdb", str(port)]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert (
        err == f"kvmtick: --gdb {port}: Address already in use; give another port, or 0 for any\n"
    )


def test_the_fast_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--gdb", "0", "--fast"]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.startswith("kvmtick: --fast: ")
    assert err.count("\n") == 1
