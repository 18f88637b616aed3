"""Crash reports: what is told of a guest that failed, in every mode, and that they never fail."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from images import CLI_HLT, LOAD_AT, out

from kvmtick.cli import EXIT_GUEST, main
from kvmtick.cpu.scripted import Hlt, Program, ScriptedEngine
from kvmtick.guests import Guest
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.crash import NO_CAPSTONE, CrashReport, VcpuReport, crash_report

TRIPLE_FAULT = bytes.fromhex("0f011e0681 cd20")
"""lidt [0x8106], which is 6 bytes of nought; int 0x20"""
PAGE_TABLES = 0x1000
CODE_ACCESS_32, CODE_ACCESS_64 = 0xC09B, 0xA09B


def stand(image: bytes, detail: bool = False, **registers: int) -> ModelVm:
    """A VM with an image in it, its vCPU in the state that `registers` make; it is not run."""
    vm = ModelVm(detail=detail)
    vm.create_irqchip()
    vm.create_pit2(1)
    vm.create_vcpu(0)
    vm.load(Guest("test", image, LOAD_AT, (0, LOAD_AT), None))
    vcpu = vm.machine.vcpu
    assert vcpu is not None
    if registers:
        vcpu.engine.set_registers(registers)
    return vm


def report_of(vm: ModelVm) -> VcpuReport:
    [vcpu] = crash_report(vm.machine).vcpus
    return vcpu


def texts(vcpu: VcpuReport) -> list[str]:
    return [instruction.text for instruction in vcpu.code]


# --- what a report holds ------------------------------------------------------------------------


def test_a_triple_fault_in_real_mode() -> None:
    with stand(out(0x80, 1) + TRIPLE_FAULT) as vm:
        run = vm.run(limit_s=5)
        assert run.exit.reason == "triple-fault"
        report = crash_report(vm.machine)
    [vcpu] = report.vcpus
    at = LOAD_AT + len(out(0x80, 1)) + 5
    assert (vcpu.mode, vcpu.rip, vcpu.registers["idtr_limit"]) == ("real mode", at, 0)
    assert texts(vcpu)[:5] == [
        "mov al, 1",
        "mov dx, 0x80",
        "out dx, al",
        "lidt [0x8106]",
        "int 0x20",
    ]
    text = report.text()
    assert f"->{at:06x}  cd 20" in text
    assert "eax 00000001" in text
    assert "idtr      base 00000000 limit 00000000" in text
    assert report.events[-1].endswith("pio_write at 0x80 size 1 count 1 val 0x1")
    assert all(line in text for line in report.events)


def test_at_most_32_events() -> None:
    with stand(out(0x80, 1) * 40 + CLI_HLT) as vm:
        assert vm.run(limit_s=5).exit.reason == "deadlock"
        report = crash_report(vm.machine)
    assert len(report.events) == 32
    assert "kvm_pio" in report.events[0]


def test_64_bit_code_behind_page_tables() -> None:
    # xor eax, eax; mov r15, [rax]; jmp -2 at 0x9000, seen at 0xffffffff80000000
    with stand(CLI_HLT) as vm:
        machine = vm.machine
        for gpa, entry in (
            (0x1000 + 511 * 8, 0x2003),
            (0x2000 + 510 * 8, 0x3003),
            (0x3000, 0x4003),
            (0x4000, 0x9003),
            (0x4008, 0xA003),
        ):
            machine.write_memory(gpa, entry.to_bytes(8, "little"))
        machine.write_memory(0x9000, bytes.fromhex("31c0 4c8b38 ebfe 06"))
        machine.write_memory(0xAFF8, (0x1122334455667788).to_bytes(8, "little"))
        base = 0xFFFF_FFFF_8000_0000
        assert machine.vcpu is not None
        machine.vcpu.engine.set_registers(
            {
                "cr3": PAGE_TABLES,
                "cr4": 1 << 5,
                "efer": 0x500,
                "cr0": 0x8000_0001,
                "cs_access": CODE_ACCESS_64,
                "rip": base,
                "rsp": base + 0x1FF8,
                "r15": 0xABCD,
            }
        )
        report = crash_report(machine)
    [vcpu] = report.vcpus
    assert (vcpu.mode, vcpu.rip) == ("64-bit mode", base)
    assert texts(vcpu) == [
        "xor eax, eax",
        "mov r15, qword ptr [rax]",
        "jmp 0xffffffff80000005",
    ], "0x06 is no instruction of 64-bit mode: decoding ends there"
    assert vcpu.stack == (0x1122334455667788,), "the page behind it is not mapped"
    text = report.text()
    assert "->ffffffff80000000  31 c0" in text
    assert "r15 000000000000abcd" in text
    assert "ffffffff80001ff8  1122334455667788" in text


def test_32_bit_code_and_registers_are_32_bits_wide() -> None:
    with stand(bytes.fromhex("40 ebfd"), cr0=1, cs_access=CODE_ACCESS_32, rax=0x12345678) as vm:
        report = crash_report(vm.machine)
    [vcpu] = report.vcpus
    assert vcpu.mode == "32-bit protected mode"
    assert texts(vcpu)[:2] == ["inc eax", "jmp 0x8000"]
    assert "eax 12345678  ebx 00000000" in report.text()


def test_bytes_that_are_no_instruction_are_shown() -> None:
    with stand(b"\x0f\xff" * 8, cr0=1, cs_access=CODE_ACCESS_32) as vm:
        vm.write_memory(LOAD_AT, b"\xff\xff" * 8)
        vcpu = report_of(vm)
    [instruction] = vcpu.code
    assert (instruction.address, instruction.text) == (LOAD_AT, "(no instruction)")
    assert instruction.data == b"\xff" * 15


@pytest.mark.parametrize("rip", [0x1000_0000, 0xFFFF_F000])
def test_what_is_not_mapped_is_told(rip: int) -> None:
    with stand(CLI_HLT, cr0=1, cs_access=CODE_ACCESS_32, rip=rip, rsp=rip) as vm:
        report = crash_report(vm.machine)
    [vcpu] = report.vcpus
    assert vcpu.code == ()
    assert vcpu.stack == ()
    assert f"code: {rip:#x} is not mapped" in report.text()


def test_instructions_before_rip_need_a_known_boundary() -> None:
    nops = bytes.fromhex("b8 c031") + b"\x90" * 5000  # mov ax, 0x31c0: also xor ax, ax from its end
    with stand(nops, rip=LOAD_AT + 3) as vm:
        assert texts(report_of(vm))[0] == "mov ax, 0x31c0"
        vm.machine.vcpu.engine.set_registers({"rip": LOAD_AT + 2})  # type: ignore[union-attr]
        assert texts(report_of(vm))[0] != "mov ax, 0x31c0", "the start does not lead to there"
        vm.machine.vcpu.engine.set_registers({"rip": LOAD_AT + 4800})  # type: ignore[union-attr]
        vcpu = report_of(vm)
        assert vcpu.code[0].address == vcpu.rip, "the start is too far away"
    far = b"\x90" * 4800 + out(0x80, 1) + CLI_HLT
    with stand(far, detail=True) as vm:
        assert vm.run(limit_s=5).exit.reason == "deadlock"
        assert "cli" in texts(report_of(vm)), "where the guest was entered after its OUT is known"


def test_every_vcpu_is_told() -> None:
    vm = ModelVm()
    vm.create_irqchip()
    vm.create_pit2(1)
    with vm:
        for vcpu_id in (0, 1):
            vm.create_vcpu(vcpu_id)
        vm.load(Guest("test", CLI_HLT, LOAD_AT, (0, LOAD_AT), None))
        assert vm.run(limit_s=5).exit.reason == "deadlock"
        report = crash_report(vm.machine)
    assert [(vcpu.vcpu_id, vcpu.state) for vcpu in report.vcpus] == [
        (0, "halted"),
        (1, "uninitialized"),
    ]
    assert "vCPU 1, uninitialized, real mode:" in report.text()


# --- it never fails -----------------------------------------------------------------------------


def test_without_capstone_there_are_bytes_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "capstone", None)
    with stand(CLI_HLT) as vm:
        report = crash_report(vm.machine)
    assert NO_CAPSTONE in report.text()
    assert "->008000  fa f4" in report.text()


class _Broken(ScriptedEngine):
    """An engine that tells no registers, or strange ones."""

    told: Mapping[str, int] | None = None

    def registers(self) -> dict[str, int]:
        if self.told is None:
            raise RuntimeError("the engine is closed")
        return dict(self.told)


def _halts() -> Program:
    yield Hlt()


ONES = (1 << 64) - 1


@pytest.mark.parametrize(
    "told",
    [
        None,
        {},
        {"rip": 0},
        {"rip": ONES, "rsp": ONES, "cr0": ONES, "cr3": ONES, "cr4": ONES, "efer": ONES},
        {"rip": ONES, "rsp": ONES, "cr0": 0x8000_0001, "cr3": ONES, "cr4": 0},
        {"rip": ONES, "rsp": 3, "cs": 0xFFFF, "cs_base": ONES},
        dict.fromkeys(("rip", "rsp", "cr0", "cr3", "cr4", "efer", "cs_access", "rflags"), ONES),
    ],
)
def test_whatever_the_registers_are(told: Mapping[str, int] | None) -> None:
    engine = _Broken(_halts)
    engine.told = told
    vm = ModelVm(engine=lambda: engine)
    with vm:
        vm.create_irqchip()
        vm.create_pit2(1)
        vm.create_vcpu(0)
        report = crash_report(vm.machine)
        assert report.text().startswith("vCPU 0, runnable, ")
        json.dumps(report.as_dict())


def test_a_closed_engine_is_told() -> None:
    with stand(CLI_HLT) as vm:
        assert vm.machine.vcpu is not None
        vm.machine.vcpu.engine.close()
        assert "no registers: " in crash_report(vm.machine).text()


def test_without_any_vcpu_there_are_the_events() -> None:
    with ModelVm() as vm:
        assert crash_report(vm.machine) == CrashReport((), ())
        assert crash_report(vm.machine).text() == "last events:\n  none"


# --- the command line ---------------------------------------------------------------------------


def run_file(tmp_path: Any, *options: str) -> int:
    image = tmp_path / "guest.bin"
    image.write_bytes(out(0x80, 1) + TRIPLE_FAULT)
    return main(["run", str(image), *options])


def test_the_report_goes_to_stderr_with_exit_code_4(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_file(tmp_path) == EXIT_GUEST
    err = capsys.readouterr().err
    assert err.startswith("kvmtick: guest.bin: triple-fault: ")
    assert "\n->00800b  cd 20" in err


def test_json_has_it_as_an_object(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_file(tmp_path, "--json") == EXIT_GUEST
    crash = json.loads(capsys.readouterr().out)["crash"]
    [vcpu] = crash["vcpus"]
    assert (vcpu["vcpu"], vcpu["mode"], vcpu["rip_linear"]) == (0, "real mode", "0x800b")
    assert vcpu["registers"]["rax"] == "0x1"
    assert {"address": "0x800b", "bytes": "cd20", "text": "int 0x20"} in vcpu["code"]
    assert "pio_write at 0x80" in crash["events"][-1]


def test_an_unknown_msr_ends_a_strict_run(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "guest.bin"
    # mov ecx, 0x12345; rdmsr; in real mode its #GP goes to 0000:0000
    image.write_bytes(bytes.fromhex("66b945230100 0f32") + CLI_HLT)
    assert main(["run", str(image), "--strict", "--json"]) == EXIT_GUEST
    printed = capsys.readouterr()
    assert "0x12345" in printed.err.splitlines()[0]
    result = json.loads(printed.out)
    assert result["exit"]["reason"] == "guest-error"
    [vcpu] = result["crash"]["vcpus"]
    assert vcpu["registers"]["rcx"] == "0x12345"
    assert (vcpu["rip_linear"], vcpu["registers"]["rsp"]) == ("0x8006", "0x0")
    assert {"address": "0x8006", "bytes": "0f32", "text": "rdmsr"} in vcpu["code"]
    main(["run", str(image), "--for", "1ms"])
    assert "0x12345" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--fast"], ["--clock", "real"]])
def test_a_strict_run_stands_before_the_access_in_ring_0_of_long_mode(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "exceptions", "--strict", "--json", *options]) == EXIT_GUEST
    [vcpu] = json.loads(capsys.readouterr().out)["crash"]["vcpus"]
    at = [code["text"] for code in vcpu["code"] if code["address"] == vcpu["rip_linear"]]
    assert (vcpu["mode"], at) == ("64-bit mode", ["rdmsr"])
    assert vcpu["registers"]["rcx"] == "0x12345678"


def test_a_guest_that_is_well_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--ticks", "3", "--json"]) == 0
    assert "crash" not in json.loads(capsys.readouterr().out)
