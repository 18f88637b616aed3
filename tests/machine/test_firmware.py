"""Firmware as a guest: what is loaded where, and SeaBIOS, whose count of the day's ticks moves by
those of our PIT.
"""

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvmtick.abi import HostError
from kvmtick.cpu.hostkvm import HostKvm
from kvmtick.guests.build import assemble
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.firmware import load_firmware
from kvmtick.machine.image_file import LoadError
from kvmtick.machine.run import Run

HERE = Path(__file__).parent
BOOT_SECTOR = HERE / "bios-ticks.bin"
SEABIOS = Path("/usr/share/seabios")
needs_seabios = pytest.mark.skipif(
    not SEABIOS.is_dir(), reason=f"{SEABIOS} not found: install the package seabios"
)

QEMU = "qemu-system-x86_64"
BIOS_COUNT, TICKS, BEFORE, AFTER = 0x46C, 0x7C08, 0x7C0C, 0x7C10
NOTE_PORT = 0x80
PIT_HZ = 1_193_181
SLOWEST_PERIOD_NS = 65536 * 1_000_000_000 // PIT_HZ
"""18.2065 Hz."""
KIB = 1 << 10

HLT_AT_RESET = b"\xf4" + bytes(15)
JUMP_TO_F000 = b"\xea\x00\x00\x00\xf0"
"""JMP f000:0000, as every PC's BIOS has it."""


def firmware(path: Path, code: bytes, size_bytes: int = 64 * KIB) -> Path:
    """An image that jumps to `code` at f000:0000."""
    image = bytearray(size_bytes)
    image[-64 * KIB : -64 * KIB + len(code)] = code
    image[-16 : -16 + len(JUMP_TO_F000)] = JUMP_TO_F000
    path.write_bytes(image)
    return path


def word(vm: Any, gpa: int) -> int:
    return int.from_bytes(vm.read_memory(gpa, 4), "little")


# The image.


def test_shadow_ram_takes_stores_and_the_rom_does_not(tmp_path: Path) -> None:
    code = bytes.fromhex(
        "2e c6 06 00 01 41"  # mov byte [cs:0x100], 'A': into the shadow RAM
        "2e a0 00 01  e6 e9"  # mov al, [cs:0x100]; out 0xe9, al
        "b0 00 e6 f4"  # leave
    )
    guest = load_firmware(firmware(tmp_path / "bios", code, 128 * KIB))
    rom = (1 << 32) - 128 * KIB
    with ModelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs, True)
        vm.load(guest)
        run = vm.run()
        assert (run.exit.reason, run.console) == ("done", "A")
        assert vm.read_memory(0xF0100, 1) == b"A"
        assert vm.read_memory(rom, 128 * KIB) == (tmp_path / "bios").read_bytes()


def test_the_first_instruction_is_the_rom_s(tmp_path: Path) -> None:
    guest = load_firmware(firmware(tmp_path / "bios", b"\xf4"))
    with ModelVm(ram_bytes=guest.needs.ram_bytes) as vm:
        vm.prepare(guest.needs, True)
        vm.load(guest)
        sregs, regs = vm.vcpus[0].get_sregs(), vm.vcpus[0].get_regs()
        assert (sregs.cs.selector, sregs.cs.base) == (0xF000, 0xFFFF0000)
        assert regs.rip == 0xFFF0


def test_another_image_takes_the_first_one_s_place(tmp_path: Path) -> None:
    small = load_firmware(firmware(tmp_path / "small", b"\xf4"))
    large = load_firmware(firmware(tmp_path / "large", b"\xb0\x00\xe6\xf4", 256 * KIB))
    with ModelVm(ram_bytes=small.needs.ram_bytes) as vm:
        vm.prepare(small.needs, True)
        vm.load(small)
        vm.load(large)
        assert vm.run().exit.reason == "done"
        assert len(vm.read_memory((1 << 32) - 256 * KIB, 256 * KIB)) == 256 * KIB


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bytes(1000), "'IMAGE' has 1000 bytes, which is no multiple of 64 KiB up to 8 MiB"),
        (bytes(9 << 20), "'IMAGE' has 9437184 bytes, which is no multiple of 64 KiB up to 8 MiB"),
        (bytes(64 * KIB), "'IMAGE' has no jump at its reset vector"),
        (bytes(64 * KIB - 16) + HLT_AT_RESET, "'IMAGE' has no jump at its reset vector"),
        (b"", "'IMAGE' is empty"),
    ],
)
def test_files_that_are_no_firmware(tmp_path: Path, image: bytes, message: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(image)
    with pytest.raises(LoadError) as error:
        load_firmware(path)
    assert str(error.value).startswith(message.replace("IMAGE", str(path)))
    assert "\n" not in str(error.value)


def test_a_disk_has_whole_sectors(tmp_path: Path) -> None:
    bios = firmware(tmp_path / "bios", b"\xf4")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(700))
    with pytest.raises(LoadError, match=r"has 700 bytes: give a disk image of whole sectors"):
        load_firmware(bios, disk=disk)


def test_firmware_needs_the_first_megabyte(tmp_path: Path) -> None:
    bios = firmware(tmp_path / "bios", b"\xf4")
    with pytest.raises(LoadError, match=r"ram_bytes=65536: firmware needs 1 MiB or more"):
        load_firmware(bios, ram_bytes=64 * KIB)


# SeaBIOS.


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm not found: source not assembled")
def test_the_boot_sector_is_what_its_source_says() -> None:
    assert assemble(BOOT_SECTOR.with_suffix(".asm")) == BOOT_SECTOR.read_bytes()


def disk_image(folder: Path) -> Path:
    path = folder / "disk"
    path.write_bytes(BOOT_SECTOR.read_bytes() + bytes([0x41]) + bytes(1023 * 512 - 1))
    return path


def boot(vm: Any, folder: Path, notes: list[int] | None = None) -> Run:
    """SeaBIOS on the disk with bios-ticks; `notes` gets the time of each access to port 0x80 in
    virtual time.
    """
    guest = load_firmware(SEABIOS / "bios.bin", disk=disk_image(folder))
    vm.prepare(guest.needs, True)
    vm.load(guest)

    def note(port: int, size_bytes: int, value: int | None) -> None:
        if notes is not None:
            notes.append(vm.machine.clock.now_ns)

    run: Run = vm.run(limit_s=60, handlers={NOTE_PORT: note})
    assert run.exit.reason == "done", run.console
    assert "Booting from Hard Disk..." in run.console
    assert run.console.endswith("bios-ticks\n")
    assert (word(vm, AFTER) - word(vm, BEFORE), word(vm, TICKS)) == (18, 19)
    return run


@needs_seabios
def test_the_bios_s_count_moves_at_18_2_hz(tmp_path: Path) -> None:
    notes: list[int] = []
    with ModelVm(ram_bytes=16 << 20) as vm:
        run = boot(vm, tmp_path, notes)
        # the handler's way to the access is the same at all ticks
        assert {later - one for one, later in pairwise(notes)} == {SLOWEST_PERIOD_NS}
        assert len(notes) == 19
        assert run.pit is not None
        assert run.pit.period_ns == SLOWEST_PERIOD_NS
        assert run.ticks is not None
        assert run.ticks.count("delivered") == run.ticks.expired >= 19
        # the sector behind the boot sector was written, in memory only
        assert vm.machine.pc.ata.disk[512] == 0x42
        assert (tmp_path / "disk").read_bytes()[512] == 0x41


@needs_seabios
@pytest.mark.parametrize("image", ["bios.bin", "bios-256k.bin"])
def test_the_bios_counts_every_tick_while_it_has_no_disk(image: str) -> None:
    guest = load_firmware(SEABIOS / image)
    with ModelVm(ram_bytes=guest.needs.ram_bytes, fast=True) as vm:
        vm.prepare(guest.needs, True)
        vm.load(guest)
        vm.run(for_ns=2_000_000_000)
        before, delivered = word(vm, BIOS_COUNT), vm.ticks().count("delivered")
        run = vm.run(for_ns=20 * SLOWEST_PERIOD_NS)
        assert "No bootable device" in run.console
        assert word(vm, BIOS_COUNT) - before == 20
        assert vm.ticks().count("delivered") - delivered == 20


@needs_seabios
def test_the_same_boot_on_the_kernel(tmp_path: Path) -> None:
    try:
        vm = KernelVm(ram_bytes=16 << 20)
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with vm:
        boot(vm, tmp_path)
        assert vm.user.pc.ata.disk[512] == 0x42


@needs_seabios
def test_the_same_boot_on_the_host_s_cpu_and_the_model_s_chips(tmp_path: Path) -> None:
    try:
        host = HostKvm()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    with host, ModelVm(ram_bytes=16 << 20, clock="real", engine=host) as vm:
        boot(vm, tmp_path)


@needs_seabios
@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} not found: install qemu-system-x86")
def test_qemu_s_isa_pc_boots_it_the_same(tmp_path: Path) -> None:
    with ModelVm(ram_bytes=16 << 20, fast=True) as vm:
        console = boot(vm, tmp_path).console
        disk = bytes(vm.machine.pc.ata.disk)
    theirs, log = tmp_path / "disk", tmp_path / "log"
    done = subprocess.run(
        [
            *(QEMU, "-machine", "isapc,accel=tcg", "-cpu", "qemu32", "-m", "16", "-nodefaults"),
            *("-bios", str(SEABIOS / "bios.bin"), "-display", "none"),
            *("-drive", f"file={theirs},format=raw,if=ide"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
            *("-chardev", f"file,id=log,path={log}"),
            *("-device", "isa-debugcon,iobase=0x402,chardev=log"),
        ],
        timeout=60,
        check=False,
    )
    assert done.returncode == 1  # isa-debug-exit makes 1 of the guest's 0
    assert theirs.read_bytes() == disk
    assert memory_map(log.read_text()) == memory_map(console)


def memory_map(text: str) -> str:
    """What SeaBIOS says of it."""
    text = text[text.index("e820 map has") :]
    return text[: text.index("Unable to lock ram")]
