"""The `unicorn` engine: code that is rewritten while translations of it exist."""

from collections.abc import Callable
from mmap import mmap

import pytest
from engine_machine import CODE, HANDLERS, IRQ, RAM_BYTES, VECTOR, Cpu, write_code

from kvmtick.cpu.engine import ExitReason

TARGET = 0x5000
"""Where `mov eax, NUMBER; ret` is."""
OVER_PAGES = 0x5FFD
DATA = 0x8000
PAGE_DIRECTORY = 0x9000
ALIAS = 0x40_0000
"""With paging on, physical memory is here once more."""
ROUNDS = 1000
PLENTY = 100_000
PORT = 0x10

SSE_ON = "b800020000 0f22e0 0f20c0 83e0fb 0f22c0"  # the same without PG
PAGING_ON = (
    "b800900000 0f22d8"  # mov eax, PAGE_DIRECTORY; mov cr3, eax
    "b810020000 0f22e0"  # mov eax, PSE | OSFXSR; mov cr4, eax
    "0f20c0 0d02000080 83e0fb 0f22c0"  # mov eax, cr0; or eax, PG | MP; and eax, ~EM; mov cr0, eax
)


def dword(value: int) -> str:
    return value.to_bytes(4, "little").hex()


def call(at: int, target: int) -> str:
    return "e8" + dword(target - at - 5 & 0xFFFF_FFFF)


def length(code: str) -> int:
    return len(bytes.fromhex(code))


def target_code(number: int) -> str:
    return "b8" + dword(number) + "c3"


STORES: dict[str, Callable[[int], str]] = {
    "mov": lambda at: f"890d{dword(at)}",
    "bytes": lambda at: f"880d{dword(at)} 882d{dword(at + 1)}",
    "xchg": lambda at: f"89ca 8715{dword(at)}",
    "lock dec": lambda at: f"f0ff0d{dword(at)}",
    "push": lambda at: f"89e6 bc{dword(at + 4)} 51 89f4",
    "rep movsb": lambda at: (
        f"890d{dword(DATA)} 89ca be{dword(DATA)} bf{dword(at)} b904000000 f3a4 89d1"
    ),
    "movq": lambda at: f"0f6ec1 0f6205{dword(DATA + 0x10)} 0f7f05{dword(at)}",
    "movups": lambda at: f"660f6ec1 660feb05{dword(DATA + 0x20)} 0f1105{dword(at)}",
    "insd": lambda at: f"bf{dword(at)} ba{dword(PORT)} 6d",
}
"""Store ECX at an address; behind it is RET."""


def rewriting_cpu(store: str, target: int, alias: int, mode: str = PAGING_ON) -> Cpu:
    """Rewrites TARGET's number ROUNDS times and adds up in EBX what TARGET then answers.

    There are data on TARGET's page too, and writing begins before it holds translated code.
    """
    prologue = mode + f"b9{dword(ROUNDS)} 31db ff05{dword(target + 0x40)}"
    body = STORES[store](target + 1 + alias) + f"ff05{dword(target + 0x40)}"
    body += call(CODE + length(prologue) + length(body), target) + "01c3 49"
    cpu = Cpu(prologue + body + f"75{256 - length(body) - 2:02x} f4")
    write_code(cpu.ram, target, target_code(ROUNDS + 1))
    cpu.set_long(PAGE_DIRECTORY, 0x83)
    cpu.set_long(PAGE_DIRECTORY + 4, 0x83)
    cpu.ram[DATA + 0x10 : DATA + 0x30] = b"\xc3" * 16 + bytes(4) + b"\xc3" * 12
    numbers = iter(range(ROUNDS, 0, -1))

    def next_number(port: int) -> None:
        cpu.input = next(numbers)

    cpu.on_out = next_number
    cpu.reset_protected(CODE)
    cpu.set_registers(rsp=0xF000)
    return cpu


@pytest.mark.parametrize("alias", [0, ALIAS], ids=["same", "alias"])
@pytest.mark.parametrize("target", [TARGET, OVER_PAGES], ids=["page", "pages"])
@pytest.mark.parametrize("store", STORES)
def test_every_kind_of_store_is_seen(store: str, target: int, alias: int) -> None:
    cpu = rewriting_cpu(store, target, alias)
    assert cpu.enter(budget=PLENTY) is ExitReason.HLT
    assert cpu.register("rbx") == sum(range(ROUNDS + 1))
    assert cpu.long(target + 0x40) == ROUNDS + 1


@pytest.mark.parametrize("target", [TARGET, TARGET + 1, OVER_PAGES])
@pytest.mark.parametrize("store", STORES)
def test_every_kind_of_store_is_seen_without_paging(store: str, target: int) -> None:
    cpu = rewriting_cpu(store, target, 0, mode=SSE_ON)
    assert cpu.enter(budget=PLENTY) is ExitReason.HLT
    assert cpu.register("rbx") == sum(range(ROUNDS + 1))
    assert cpu.long(target + 0x40) == ROUNDS + 1


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_an_event_s_frame_rewrites_code(exact: bool) -> None:
    """FLAGS and CS become `nop; mov ax, FLAGS`, which the handler jumps to."""
    to_target = (TARGET - HANDLERS - 3).to_bytes(2, "little").hex()
    cpu = Cpu("f4", {VECTOR: "e9" + to_target}, exact=exact)
    write_code(cpu.ram, TARGET, "90 b83412 f4")
    cpu.engine.reset(0, TARGET)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax") == 0x1234
    cpu.set_registers(rip=CODE, cs=0xB890, cs_base=0, rsp=TARGET + 4, rflags=0x246)
    assert cpu.enter(IRQ) is ExitReason.HLT
    assert cpu.register("rax") == 0x246
    assert cpu.word(TARGET - 2) == CODE


WRITER = CODE
READER = 0x2000
HANDLER = 0x2800
IDT = 0x3800
IDTR = 0x3008


def looping(body: str) -> str:
    return body + f"f4 eb{256 - length(body) - 3:02x}"


def vcpu(ram: mmap, eip: int, gpa: int = 0) -> Cpu:
    """A CPU over `ram`, which it has at `gpa`."""
    cpu = Cpu("", ram=mmap(-1, RAM_BYTES) if gpa else ram)
    if gpa:
        cpu.engine.map_ram(gpa, ram)
    cpu.reset_protected(gpa + eip)
    cpu.set_registers(rsp=gpa + 0xF000)
    return cpu


def shared_ram() -> mmap:
    ram = mmap(-1, RAM_BYTES)
    write_code(ram, TARGET, target_code(0))
    write_code(ram, READER, looping(call(READER, TARGET)))
    write_code(ram, WRITER, looping(f"41 890d{dword(TARGET + 1)}"))
    return ram


def step(cpu: Cpu) -> None:
    assert cpu.enter() is ExitReason.HLT


def answer(cpu: Cpu) -> int:
    step(cpu)
    return cpu.register("rax")


@pytest.mark.parametrize("at", [READER, TARGET + 0x100], ids=["alone", "with its caller"])
def test_code_rewritten_by_another_vcpu(at: int) -> None:
    ram = shared_ram()
    write_code(ram, at, looping(call(at, TARGET)))
    writer, reader = vcpu(ram, WRITER), vcpu(ram, at)
    step(writer)
    for number in range(1, ROUNDS):
        assert answer(reader) == number
        step(writer)


def test_code_of_three_vcpus_that_all_write_it() -> None:
    ram = shared_ram()
    write_code(ram, READER, looping(f"890d{dword(TARGET + 1)}" + call(READER + 6, TARGET)))
    vcpus = [vcpu(ram, READER) for _ in range(3)]
    for number in range(ROUNDS):
        for index, cpu in enumerate(vcpus):
            cpu.set_registers(rcx=3 * number + index)
            assert answer(cpu) == 3 * number + index


def test_vcpus_that_have_the_ram_elsewhere() -> None:
    ram = shared_ram()
    write_code(ram, WRITER, looping(f"41 890d{dword(RAM_BYTES + TARGET + 1)}"))
    writer, reader = vcpu(ram, WRITER, RAM_BYTES), vcpu(ram, READER, 3 * RAM_BYTES)
    for number in range(1, 10):
        step(writer)
        assert answer(reader) == number


def test_vcpus_that_come_late_and_go_early() -> None:
    ram = shared_ram()
    writer = vcpu(ram, WRITER)
    step(writer)
    for number in range(1, 10):
        reader = vcpu(ram, READER)
        assert answer(reader) == number
        step(writer)
        assert answer(reader) == number + 1
        reader.engine.close()
        step(writer)
        assert answer(vcpu(ram, READER)) == number + 2
        writer.set_registers(rcx=number)
        step(writer)


def test_vcpus_of_which_a_third_one_knows_both_rams() -> None:
    """`far` and `near` share memory through `middle` only when they met by way of it."""
    ram, other = shared_ram(), shared_ram()
    near, far = vcpu(ram, READER), vcpu(other, READER)
    assert answer(near) == answer(far) == 0
    middle = vcpu(other, WRITER)
    middle.engine.map_ram(RAM_BYTES, ram)
    step(middle)
    assert (answer(near), answer(far)) == (0, 1)
    write_code(other, WRITER, looping(f"890d{dword(RAM_BYTES + TARGET + 1)}"))
    middle.engine.ram_written(WRITER, 0x100)
    middle.reset_protected(WRITER)
    middle.set_registers(rcx=7)
    step(middle)
    assert (answer(near), answer(far)) == (7, 1)


def test_delivery_of_an_event_pushes_onto_code() -> None:
    """The RIP that an interrupt pushes becomes TARGET's number; CS and the flags are code, too."""
    ram = shared_ram()
    write_code(ram, TARGET, target_code(0)[:-2] + "08000000 02020000 c3")
    reader, pusher = vcpu(ram, READER), vcpu(ram, READER)
    write_code(ram, HANDLER, "bc00f00000" + call(HANDLER + 5, TARGET) + "f4")
    ram[IDTR : IDTR + 6] = (IDT << 16 | 0x7FF).to_bytes(6, "little")
    gate = HANDLER >> 16 << 48 | 0x8E00 << 32 | 8 << 16 | HANDLER & 0xFFFF
    ram[IDT + 8 * 0x20 : IDT + 8 * 0x21] = gate.to_bytes(8, "little")
    gdt = 0x3100
    ram[gdt + 8 : gdt + 16] = 0x00CF_9B00_0000_FFFF.to_bytes(8, "little")
    ram[0x3000:0x3006] = (gdt << 16 | 0xFF).to_bytes(6, "little")
    write_code(ram, WRITER, "0f011500300000 0f011d08300000 fbf4")
    assert answer(reader) == answer(pusher) == 0
    pusher.reset_protected(WRITER)
    step(pusher)
    pusher_stands_at = pusher.register("rip")
    pusher.set_registers(rsp=TARGET + 13)
    assert pusher.enter(0x8000_0020) is ExitReason.HLT
    assert pusher.register("rax") == answer(reader) == pusher_stands_at


def test_the_host_rewrites_code() -> None:
    ram = shared_ram()
    first, second = vcpu(ram, READER), vcpu(ram, READER)
    for number in range(1, 100):
        write_code(ram, TARGET, target_code(number))
        first.engine.ram_written(TARGET + 1, 4)
        assert answer(first) == answer(second) == number


def test_ram_written_names_linear_addresses_no_more_than_the_guest_maps() -> None:
    """`ram_written` is about physical memory, whatever the page tables say."""
    cpu = rewriting_cpu("mov", TARGET, ALIAS)
    assert cpu.enter(budget=PLENTY) is ExitReason.HLT
    cpu.set_long(PAGE_DIRECTORY, 0)
    write_code(cpu.ram, CODE, target_code(0))
    for gpa, size_bytes in ((0, RAM_BYTES), (RAM_BYTES - 1, 1 << 63), (1 << 40, 5), (0, 0)):
        cpu.engine.ram_written(gpa, size_bytes)


def test_the_same_memory_twice_is_refused() -> None:
    cpu = Cpu("f4")
    with pytest.raises(ValueError, match="mapped already: map it once"):
        cpu.engine.map_ram(RAM_BYTES, cpu.ram)
