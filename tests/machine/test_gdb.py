"""A real gdb debugs real guests: real mode, long mode, several vCPUs."""

import json
import re
from pathlib import Path

import pytest
from gdb_session import Session, debug, needs_gdb
from images import CLI_HLT, LOAD_AT, STI_HLT

from kvmtick import guests

pytestmark = needs_gdb

INTERRUPT = """\
import gdb, os, signal, threading
def later(event):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
gdb.events.cont.connect(later)
"""


def address_of(name: str, code: str) -> int:
    """Where a built-in guest has these bytes, once."""
    image = guests.load(name, ticks=1).image
    assert image.count(bytes.fromhex(code)) == 1
    return LOAD_AT + image.index(bytes.fromhex(code))


def handler_of_tick_pic() -> int:
    """inc dword [counter]; out 0x20, al; dec ecx"""
    return address_of("tick-pic", "66ff061480 e620 6649")


def ended_well(session: Session) -> bool:
    return session.code == 0 and "exited normally" in session.printed[-1]


def test_real_mode() -> None:
    handler = handler_of_tick_pic()
    session = debug(
        ["tick-pic", "--ticks", "5", "--json"],
        [
            f"hbreak *{handler:#x}",
            "continue",
            "info registers eip eflags cs",
            "x/2i $pc",
            "stepi",
            "x/dw 0x8014",
            "stepi",
            "p $ecx",
            "set var $ecx = 2",
            "delete",
            "monitor ticks",
            "monitor events",
            "continue",
        ],
    )
    connected, hbreak, stop, registers, code, *rest = session.printed
    assert "0x00008000 in ?? ()" in connected
    assert hbreak == f"Hardware assisted breakpoint 1 at {handler:#x}"
    assert "Breakpoint 1, " in stop
    assert re.search(rf"eip +{handler:#x} +{handler:#x}\neflags .*\[ .*\]\ncs +0x0 +0", registers)
    assert f"=> {handler:#x}:\tincl   -0x7fec\n" in code, "gdb's way to write 0x8014"
    assert rest[1] == "0x8014:\t1"
    assert rest[3] == "$1 = 5"
    assert re.search(r"delivered +0$|delivered +1$", rest[6], re.MULTILINE)
    assert "kvm_inj_virq: IRQ 0x20" in rest[7]
    assert ended_well(session)
    result = json.loads(session.out)
    assert (result["guest_ticks"], result["ticks"]["expired"]) == (2, 2), "gdb set ecx to 2"


def test_a_breakpoint_comes_with_each_tick_and_loses_none(tmp_path: Path) -> None:
    plain, traced = tmp_path / "plain.txt", tmp_path / "traced.txt"
    debug(["--ticks", "6", "--trace", str(plain)], ["continue"])
    session = debug(
        ["--ticks", "6", "--trace", str(traced)],
        [f"break *{handler_of_tick_pic():#x}", *["continue"] * 6, "continue"],
    )
    stops = [text for text in session.printed if "Breakpoint 1, " in text]
    assert len(stops) == 6
    assert ended_well(session)
    assert traced.read_text() == plain.read_text()


def test_memory() -> None:
    session = debug(
        ["--ticks", "5", "--json"],
        [
            "x/s 0x8004",
            "set {int}0x800c = 3",
            "x/dw 0x800c",
            "set {char}0xfee00000 = 1",
            "x/xw 0xfee00000",
            "continue",
        ],
    )
    printed = session.printed
    assert '"KVMTICK1' in printed[1]
    assert printed[3] == "0x800c:\t3"
    assert printed[4] == "Cannot access memory at address 0xfee00000"
    assert "Cannot access memory at address 0xfee00000" in printed[5]
    assert json.loads(session.out)["guest_ticks"] == 3, "the guest reads its count later"


def test_long_mode_with_paging() -> None:
    idle = address_of("tick-long", "f4 4881fc00600100")  # hlt; cmp rsp, MAIN_STACK
    session = debug(
        ["tick-long", "--ticks", "5"],
        [
            f"hbreak *{idle:#x}",
            "continue",
            "unset tdesc filename",
            "p $efer",
            "x/i $pc",
            "stepi",
            "stepi",
            "p/x *(long*)$rsp",
            "p $rsp != 0x16000",
            "info registers rip cr0 cr3",
            "delete",
            "continue",
        ],
    )
    printed = session.printed
    assert printed[4] == "$1 = [ LME LMA NXE ]"
    assert printed[5] == f"=> {idle:#x}:\thlt"
    assert printed[8] == f"$2 = {idle + 1:#x}", "the handler's frame is on its interrupt stack"
    assert printed[9] == "$3 = 1"
    assert "[ PE ET NE WP NW CD PG ]" in printed[10]
    assert ended_well(session)


def test_threads() -> None:
    session = debug(
        ["ipi-tick", "--ticks", "3"],
        [
            "info threads",
            "thread 2",
            "stepi",
            "x/i $pc",
            "info threads",
            "thread 1",
            "p $cs",
            "continue",
        ],
    )
    threads = session.printed[1]
    assert "* 1    Thread 1 (vCPU 0 [runnable])" in threads
    assert "  2    Thread 2 (vCPU 1 [uninitialized])" in threads
    assert "=> 0x8" in session.printed[4], "it stepped when vCPU 0 had started it"
    assert "* 2    Thread 2 (vCPU 1 [runnable])" in session.printed[5]
    assert ended_well(session)


def test_ctrl_c(tmp_path: Path) -> None:
    image = tmp_path / "spin.bin"
    image.write_bytes(b"\xeb\xfe")
    session = debug(
        [str(image), "--limit", "60s"],
        [*_python(tmp_path), "continue", "x/i $pc", "kill"],
    )
    assert "received signal SIGINT" in session.printed[2]
    assert session.printed[3] == "=> 0x8000:\tjmp    0x8000"
    assert session.code == 130


def _python(tmp_path: Path) -> list[str]:
    """Commands that let gdb be interrupted a moment after it went on."""
    script = tmp_path / "interrupt.py"
    script.write_text(INTERRUPT)
    return [f"source {script}"]


def test_detach_and_quit_let_the_guest_run_on() -> None:
    for last in (["detach"], []):
        session = debug(["--ticks", "5", "--json"], [f"hbreak *{LOAD_AT:#x}", *last])
        assert session.code == 0
        assert json.loads(session.out)["guest_ticks"] == 5


@pytest.mark.parametrize(
    ("code", "stop", "end"),
    [
        (CLI_HLT, "SIGABRT", "terminated with signal SIGABRT"),
        (bytes.fromhex("0f011e0681 cd20"), "SIGSEGV", "terminated with signal SIGSEGV"),
        (bytes.fromhex("b005 e6f4"), None, "exited with code 05"),
    ],
)
def test_how_a_guest_ended_is_told(tmp_path: Path, code: bytes, stop: str | None, end: str) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(code)
    looks = ["continue", "info registers eip"] if stop else []
    session = debug([str(image)], [*looks, "continue"])
    if stop:
        assert f"received signal {stop}" in session.printed[1]
        assert "eip " in session.printed[2]
    assert end in session.printed[-1]
    assert session.code == 4
    assert "code:" in session.err


def test_real_time_is_debugged_too(tmp_path: Path) -> None:
    image = tmp_path / "idle.bin"
    image.write_bytes(STI_HLT)
    session = debug(
        [str(image), "--clock", "real", "--for", "10m"],
        [*_python(tmp_path), "continue", "x/i $pc", "kill"],
    )
    assert "received signal SIGINT" in session.printed[2]
    assert session.printed[3] == "=> 0x8002:\tjmp    0x8000"
    assert session.code == 130
