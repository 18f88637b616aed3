"""What the unicorn engine leaves behind when a handler refuses an access, and RAM that changes."""

import ctypes
from mmap import mmap

import pytest
from engine_machine import CODE, RAM_BYTES, Cpu, write_code

from kvmtick.cpu.engine import ExitReason

DEVICE = 0xD000_0000
MORE = 0x20_0000


@pytest.fixture(params=[True, False], ids=["exact", "fast"])
def exact(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def protected(code: str, exact: bool, **registers: int) -> Cpu:
    cpu = Cpu(code, exact=exact)
    cpu.reset_protected(CODE)
    cpu.set_registers(rsp=0x8000, **registers)
    return cpu


def refuse_from(cpu: Cpu, number: int) -> None:
    """Refuse each access from the one of this number on."""
    before = len(cpu.accesses)

    def refuse(_: int) -> None:
        if len(cpu.accesses) - before > number:
            cpu.engine.refuse()

    cpu.on_out = refuse


@pytest.mark.parametrize(
    "code",
    [
        "0103",  # add [ebx], eax
        "8703",  # xchg [ebx], eax
        "f00fc103",  # lock xadd [ebx], eax
        "ff33",  # push dword [ebx]
        "a5",  # movsd
        "df2b",  # fild qword [ebx]
        "0fc70b",  # cmpxchg8b [ebx]
        "0f1003",  # movups xmm0, [ebx]
        "ff13",  # call [ebx]
        "cf",  # iret
    ],
)
def test_nothing_of_the_instruction_has_happened(exact: bool, code: str) -> None:
    """Two instructions before, which leave flags of their own, count."""
    cpu = protected(f"31c9 39c0 {code} f4", exact)  # xor ecx, ecx; cmp eax, eax
    cpu.set_registers(rbx=DEVICE, rsi=DEVICE, rdi=0x5000, rax=0x1234, rcx=7, cr4=0x200)
    if code == "cf":
        cpu.set_registers(rsp=DEVICE)
    expected = cpu.engine.registers() | {"rip": CODE + 4, "rcx": 0, "rflags": 0x46}
    for _ in range(2):
        refuse_from(cpu, 0)
        assert cpu.enter() is ExitReason.ACCESS
        assert cpu.engine.registers() == expected
    assert len(cpu.accesses) == 2


def test_the_second_access_of_an_instruction_can_be_refused(exact: bool) -> None:
    """movsd from one device to another: the write is refused, the registers stand before both."""
    cpu = protected("a5 f4", exact, rsi=DEVICE, rdi=DEVICE + 8)
    refuse_from(cpu, 1)
    assert cpu.enter() is ExitReason.ACCESS
    assert [access[0] for access in cpu.accesses] == ["mmio read", "mmio write"]
    assert (cpu.register("rsi"), cpu.register("rdi")) == (DEVICE, DEVICE + 8)
    cpu.on_out = lambda _: None
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rsi") == DEVICE + 4


def test_a_rep_keeps_its_finished_rounds(exact: bool) -> None:
    cpu = protected("f36c f4", exact, rdi=0x5000, rcx=5, rdx=0x61)  # rep insb; hlt
    refuse_from(cpu, 2)
    assert cpu.enter() is ExitReason.ACCESS
    assert (cpu.register("rcx"), cpu.engine.rounds) == (3, 3)
    cpu.on_out = lambda _: None
    assert cpu.enter() is ExitReason.HLT
    assert cpu.ram[0x5000:0x5006] == b"\x5a" * 5 + b"\0"


def test_an_event_cannot_be_delivered_through_a_device(exact: bool) -> None:
    cpu = Cpu("f4", {0x20: "cf"}, exact=exact)
    cpu.set_registers(rsp=0x10, ss=0xFFFF, ss_base=0xFFFF0 + 0x10)  # the stack is behind the RAM
    refuse_from(cpu, 0)
    assert cpu.enter(0x8000_0020) is ExitReason.INTERNAL_ERROR
    assert "no RAM" in cpu.engine.error


# ---- RAM ---------------------------------------------------------------------------------------


def test_ram_comes_and_goes(exact: bool) -> None:
    # mov eax, [MORE]; hlt
    cpu = protected("a100002000 f4", exact)
    more = mmap(-1, 4096)
    more[:4] = b"abcd"
    cpu.engine.map_ram(MORE, more)
    assert cpu.enter() is ExitReason.HLT
    assert cpu.register("rax").to_bytes(4, "little") == b"abcd"
    cpu.engine.unmap_ram(MORE)
    cpu.reset_protected(CODE)
    assert cpu.enter() is ExitReason.HLT
    assert [access[:3] for access in cpu.accesses] == [("mmio read", MORE, 4)]
    with pytest.raises(ValueError, match="no RAM starts there"):
        cpu.engine.unmap_ram(MORE)
    more.close()  # nobody holds it


def test_code_in_ram_that_went_is_gone(exact: bool) -> None:
    cpu = protected("e9fbef1f00", exact)  # jmp MORE
    for value in (1, 2):
        page = mmap(-1, 4096)
        write_code(page, 0, f"b80{value}000000 f4")  # mov eax, value; hlt
        cpu.engine.map_ram(MORE, page)
        cpu.reset_protected(CODE)
        assert cpu.enter() is ExitReason.HLT
        assert cpu.register("rax") == value
        cpu.engine.unmap_ram(MORE)


def test_stores_to_read_only_ram_are_the_handlers(exact: bool) -> None:
    # mov eax, [MORE]; mov [MORE], ebx; inc dword [MORE]; mov [MORE-2], ebx; mov ecx, [MORE]; hlt
    cpu = protected(
        "a100002000 891d00002000 ff0500002000 891dfeff1f00 8b0d00002000 f4", exact, rbx=0x44332211
    )
    rom = mmap(-1, 4096)
    rom[:4] = b"\x08\0\0\0"
    cpu.engine.map_ram(MORE, rom, writable=False)
    assert cpu.enter() is ExitReason.HLT
    assert [access[:4] for access in cpu.accesses] == [
        ("mmio write", MORE, 4, 0x44332211),
        ("mmio write", MORE, 4, 9),
        ("mmio write", MORE - 2, 2, 0x2211),
        ("mmio write", MORE, 2, 0x4433),
    ]
    assert (cpu.register("rax"), cpu.register("rcx"), rom[:4]) == (8, 8, b"\x08\0\0\0")


def test_code_that_the_host_rewrites_in_shared_ram(exact: bool) -> None:
    cpu = protected("e9fbef1f00", exact)  # jmp MORE
    page = mmap(-1, 2 * 4096)
    array = (ctypes.c_char * len(page)).from_buffer(page)
    cpu.engine.map_ram(MORE, array, shared=True)
    for value in (1, 2, 3):
        write_code(page, 0, f"b80{value}000000 f4")  # mov eax, value; hlt
        cpu.engine.forget_changed_code()
        cpu.reset_protected(CODE)
        assert cpu.enter() is ExitReason.HLT
        assert cpu.register("rax") == value


def test_what_cannot_be_mapped(exact: bool) -> None:
    cpu = Cpu("f4", exact=exact)
    with pytest.raises(ValueError, match="overlaps"):
        cpu.engine.map_ram(RAM_BYTES - 4096, mmap(-1, 4096))
