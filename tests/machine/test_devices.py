"""The devices that kvm-unit-tests ask a board for: fw_cfg and parts of pc-testdev."""

import pytest

from kvmtick.cpu.scripted import Hlt, In, MmioWrite, Out, Program, Routine, ScriptedEngine, Sti
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import Event, Record

EXIT, SELECTOR, DATA, LINES, STORAGE = 0xF4, 0x510, 0x511, 0x2000, 0xE0
SIGNATURE, ID, RAM_SIZE, NB_CPUS, KERNEL_SIZE, MAX_CPUS, FILE_DIR = 0, 1, 3, 5, 8, 0xF, 0x19
E820 = 0x20
"""The selector of the one file."""


def run(guest: Routine, *, vcpus: int = 1, irqchip: bool = True, **options: int) -> list[Record]:
    """Run `guest` on the first vCPU; the records."""
    records: list[Record] = []
    with ModelVm(engine=lambda: ScriptedEngine(guest), **options) as vm:  # type: ignore[arg-type]
        vm.machine.recorder.add_consumer(records.extend)
        if irqchip:
            vm.create_irqchip()
        for vcpu_id in range(vcpus):
            vm.create_vcpu(vcpu_id)
        assert vm.run().exit.reason == "done"
    return records


def read_item(key: int, size_bytes: int, **options: int) -> bytes:
    read = bytearray()

    def guest() -> Program:
        yield Out(SELECTOR, key, 2)
        for _ in range(size_bytes):
            read.append((yield In(DATA)))
        yield Out(EXIT, 0)

    run(guest, **options)
    return bytes(read)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (SIGNATURE, b"QEMU\0\0"),
        (ID, b"\x01\0\0\0"),
        (RAM_SIZE, (16 << 20).to_bytes(8, "little") + b"\0"),
        (NB_CPUS, b"\x03\0\0"),
        (MAX_CPUS, b"\x03\0"),
        (NB_CPUS | 0x4000, b"\x03\0"),
        (KERNEL_SIZE, bytes(4)),
        (FILE_DIR, bytes((0, 0, 0, 1, 0, 0, 0, 20, 0, 0x20, 0, 0)) + b"etc/e820\0"),
        (E820, bytes(8) + (16 << 20).to_bytes(8, "little") + b"\1\0\0\0\0"),
        (E820 + 1, bytes(4)),
        (NB_CPUS | 0x8000, bytes(4)),
        (0xFFFF, bytes(4)),
    ],
)
def test_fw_cfg_tells_of_the_machine_and_has_nothing_else(key: int, expected: bytes) -> None:
    assert read_item(key, len(expected), vcpus=3, ram_bytes=16 << 20) == expected


def test_selecting_an_item_starts_it_anew() -> None:
    read: list[int] = []

    def guest() -> Program:
        for _ in range(2):
            yield Out(SELECTOR, SIGNATURE, 2)
            read.append((yield In(DATA)))
            yield Out(DATA, 0)
            read.append((yield In(DATA)))
        yield Out(EXIT, 0)

    run(guest)
    assert read == list(b"QEQE")


def test_the_wrong_widths_are_nobodys() -> None:
    read: list[int] = []

    def guest() -> Program:
        yield Out(SELECTOR, NB_CPUS, 2)
        yield Out(SELECTOR, SIGNATURE, 1)
        yield Out(SELECTOR, SIGNATURE, 4)
        read.append((yield In(DATA, 2)))
        read.append((yield In(SELECTOR, 2)))
        read.append((yield In(DATA)))
        yield Out(EXIT, 0)

    run(guest)
    assert read == [0xFFFF, 0xFFFF, 1]


def set_irqs(records: list[Record]) -> list[tuple[int, ...]]:
    return [record[3:] for record in records if record[1] == Event.KVM_SET_IRQ]


def test_a_byte_to_a_line_drives_the_gsi_with_the_vmms_source() -> None:
    def guest() -> Program:
        yield Out(LINES + 4, 1)
        yield Out(LINES + 4, 0)
        yield Out(LINES + 23, 0x80)
        yield Out(EXIT, 0)

    assert set_irqs(run(guest)) == [(4, 1, 0), (4, 0, 0), (23, 1, 0)]


def test_other_widths_and_ports_drive_nothing() -> None:
    read: list[int] = []

    def guest() -> Program:
        yield Out(LINES + 4, 1, 2)
        yield Out(LINES + 24, 1)
        yield Out(LINES - 1, 1)
        read.append((yield In(LINES + 4)))
        yield Out(EXIT, 0)

    assert set_irqs(run(guest)) == []
    assert read == [0xFF]


def test_without_an_irqchip_nobody_listens() -> None:
    def guest() -> Program:
        yield Out(LINES + 4, 1)
        yield Out(EXIT, 0)

    assert set_irqs(run(guest, irqchip=False)) == []


def test_a_line_interrupts_the_guest_that_drives_it() -> None:
    """PIC, IRQ 4: the next instruction is the handler's."""
    seen: list[int] = []

    def guest() -> Program:
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF)):
            yield Out(port, value)
        yield Sti()
        yield Out(0x80, 0)
        yield Out(LINES + 4, 1)
        seen.append(1)
        yield Hlt()

    def handler() -> Program:
        seen.append(0)
        yield Out(EXIT, 0)

    with ModelVm(engine=lambda: ScriptedEngine(guest, {0x24: handler})) as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        assert vm.run().exit.reason == "done"
    assert seen == [0]


def test_a_level_line_of_the_ioapic_stays_up_until_it_is_written_down() -> None:
    with ModelVm(engine=lambda: ScriptedEngine(level_guest)) as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        assert vm.run().exit.reason == "done"
        ioapic = vm.machine.board.ioapic
        assert ioapic is not None
        assert ioapic.irr == 1 << 14


def level_guest() -> Program:
    yield MmioWrite(0xFEC0_0000, 0x10 + 2 * 14)
    yield MmioWrite(0xFEC0_0010, 1 << 15 | 0x77)
    for line, level in ((14, 1), (15, 1), (15, 0)):
        yield Out(LINES + line, level)
    yield Out(EXIT, 0)


def test_four_bytes_are_stored_in_any_width() -> None:
    read: list[int] = []

    def guest() -> Program:
        yield Out(STORAGE, 0x1234_5678, 4)
        for port, size_bytes in ((0, 4), (0, 2), (2, 2), (1, 1), (3, 1), (3, 4)):
            read.append((yield In(STORAGE + port, size_bytes)))
        yield Out(STORAGE + 1, 0xAB)
        yield Out(STORAGE + 2, 0xCDEF, 2)
        read.append((yield In(STORAGE, 4)))
        read.append((yield In(STORAGE + 4)))
        yield Out(EXIT, 0)

    run(guest)
    assert read == [0x1234_5678, 0x5678, 0x1234, 0x56, 0x12, 0x12, 0xCDEF_AB78, 0xFF]


def test_handlers_of_the_caller_come_first() -> None:
    def guest() -> Program:
        yield Out(EXIT, (yield In(DATA)))

    with ModelVm(engine=lambda: ScriptedEngine(guest)) as vm:
        vm.create_vcpu(0)
        assert vm.run(handlers={DATA: lambda port, size_bytes, value: 7}).exit.code == 7
