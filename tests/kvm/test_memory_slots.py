"""KVM_SET_USER_MEMORY_REGION: one body on the model and on the live kernel."""

import ctypes
import errno
from collections.abc import Callable, Iterator
from mmap import PROT_READ, mmap

import pytest

from kvmtick.abi import HostError, KvmError
from kvmtick.abi.exits import Exit, ExitHlt, ExitInternalError, ExitMmio
from kvmtick.abi.structs import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from kvmtick.guests.start import protected
from kvmtick.host.kvmdev import open_kvm
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm

Vm = ModelVm | KernelVm

CODE = 0x1000
AT = 0x20_0000
PAGE = 4096


@pytest.fixture(params=["model", "model-fast", "kernel"])
def vm(request: pytest.FixtureRequest) -> Iterator[Vm]:
    """A VM without any slot."""
    if request.param == "kernel":
        try:
            open_kvm().close()
        except HostError as error:
            pytest.skip(f"needs /dev/kvm: {error}")
        made: Vm = KernelVm(ram_bytes=0)
    else:
        made = ModelVm(ram_bytes=0, fast=request.param == "model-fast")
    with made:
        yield made


class Memory:
    """Anonymous memory of this process, and where it is."""

    def __init__(self, size_bytes: int) -> None:
        self.bytes = mmap(-1, size_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))


def with_code(vm: Vm, code: str) -> tuple[Memory, Callable[[], Exit]]:
    """Slot 0 with code, and what runs it from its start; the last exit is that of its HLT."""
    memory = Memory(16 * PAGE)
    memory.bytes[CODE : CODE + 64] = bytes.fromhex(code).ljust(64, b"\xf4")
    vm.set_user_memory_region(0, 0, 16 * PAGE, memory.address)
    vcpu = vm.create_vcpu()

    def run() -> Exit:
        vcpu.start_at(0, CODE, protected(CODE))
        return vcpu.run()

    return memory, run


def refused(vm: Vm, *region: int) -> int | None:
    with pytest.raises(KvmError) as failure:
        vm.set_user_memory_region(*region)
    return failure.value.errno


def test_a_vm_without_a_slot_has_no_memory() -> None:
    """The MMU of the recorded host has no room for anything then: ENOSPC."""
    with ModelVm(ram_bytes=0) as vm:
        vcpu = vm.create_vcpu()
        vcpu.start_at(0, CODE, protected(CODE))
        assert isinstance(vcpu.run(), ExitInternalError)


def test_the_guest_and_user_space_see_the_same_bytes(vm: Vm) -> None:
    memory, run = with_code(vm, "8b0d00200000 41 890d04200000")  # mov, inc, mov ecx
    memory.bytes[0x2000] = 7
    assert run() == ExitHlt()
    assert memory.bytes[0x2004] == 8


def test_user_space_may_rewrite_code(vm: Vm) -> None:
    memory, run = with_code(vm, "c60500200000 01")  # mov byte [0x2000], 1
    assert run() == ExitHlt()
    memory.bytes[CODE + 6] = 2
    assert run() == ExitHlt()
    assert memory.bytes[0x2000] == 2


def test_slots_come_move_and_go(vm: Vm) -> None:
    _, run = with_code(vm, "a100002000")  # mov eax, [AT]
    more = Memory(PAGE)
    read = ExitMmio(AT, 4, False, b"")
    assert run() == read
    vm.set_user_memory_region(1, AT, PAGE, more.address)
    assert run() == ExitHlt()
    vm.set_user_memory_region(1, AT + PAGE, PAGE, more.address)
    assert run() == read
    vm.set_user_memory_region(1, AT, PAGE, more.address)
    assert run() == ExitHlt()
    vm.set_user_memory_region(1, 0, 0, 0)
    assert run() == read


def test_writes_to_a_read_only_slot_are_exits(vm: Vm) -> None:
    _, run = with_code(vm, "a100002000 a304002000")  # mov eax, [AT]; mov [AT+4], eax
    rom = Memory(PAGE)
    rom.bytes[:4] = b"abcd"
    vm.set_user_memory_region(1, AT, PAGE, rom.address, KVM_MEM_READONLY)
    assert run() == ExitMmio(AT + 4, 4, True, b"abcd")
    assert rom.bytes[:8] == b"abcd\0\0\0\0"


def test_what_is_refused(vm: Vm) -> None:
    memory = Memory(4 * PAGE)
    at = memory.address
    for region in (
        (0, 0, PAGE + 1, at),
        (0, 1, PAGE, at),
        (0, 0, PAGE, at + 1),
        (0, 0, PAGE, at, 8),
        (32764, 0, PAGE, at),
        (1 << 16, 0, PAGE, at),
        (0, (1 << 64) - PAGE, 2 * PAGE, at),
        (0, 1 << 52, PAGE, at),
        (0, 0, PAGE, 1 << 63),
        (0, 0, PAGE, (1 << 47) - PAGE),
        (0, 0, 0, 0),  # there is none to delete
    ):
        assert refused(vm, *region) == errno.EINVAL, region
    vm.set_user_memory_region(1, 0, 2 * PAGE, at)
    assert refused(vm, 2, PAGE, PAGE, at + 2 * PAGE) == errno.EEXIST
    vm.set_user_memory_region(2, 2 * PAGE, PAGE, at + 2 * PAGE)
    assert refused(vm, 2, PAGE, PAGE, at + 2 * PAGE) == errno.EEXIST
    assert refused(vm, 1, 0, PAGE, at) == errno.EINVAL  # it keeps its size,
    assert refused(vm, 1, 0, 2 * PAGE, at + PAGE) == errno.EINVAL  # its memory,
    assert refused(vm, 1, 0, 2 * PAGE, at, KVM_MEM_READONLY) == errno.EINVAL  # and its kind
    vm.set_user_memory_region(1, 0, 2 * PAGE, at, KVM_MEM_LOG_DIRTY_PAGES)
    vm.set_user_memory_region(1, 0, 2 * PAGE, at)
    vm.set_user_memory_region(1, 0, 0, 0)
    assert refused(vm, 1, 0, 0, 0) == errno.EINVAL


def test_a_slot_whose_memory_is_gone() -> None:
    """An ordinary KVM says EFAULT; one that emulates instructions takes it for a device."""
    with ModelVm(ram_bytes=0) as vm:
        _, run = with_code(vm, "a100002000")  # mov eax, [AT]
        vm.set_user_memory_region(1, AT, PAGE, 1 << 46)  # nothing is mapped there
        with pytest.raises(KvmError) as failure:
            run()
        assert failure.value.errno == errno.EFAULT


def test_reading_and_writing_over_slots() -> None:
    with ModelVm(ram_bytes=2 * PAGE) as vm:
        more = Memory(PAGE)
        vm.set_user_memory_region(1, 2 * PAGE, PAGE, more.address)
        vm.write_memory(2 * PAGE - 2, b"abcd")
        assert vm.read_memory(2 * PAGE - 2, 4) == b"abcd"
        assert more.bytes[:2] == b"cd"
        with pytest.raises(ValueError, match="outside guest RAM"):
            vm.read_memory(3 * PAGE - 1, 2)


def test_user_space_reaches_every_slot(vm: Vm) -> None:
    low, high = Memory(2 * PAGE), Memory(2 * PAGE)
    vm.set_user_memory_region(0, AT, 2 * PAGE, low.address)
    vm.set_user_memory_region(1, AT + 2 * PAGE, 2 * PAGE, high.address, KVM_MEM_READONLY)
    vm.write_memory(AT + 2 * PAGE - 2, b"abcd")
    assert (low.bytes[-2:], high.bytes[:2]) == (b"ab", b"cd")
    assert vm.read_memory(AT + 2 * PAGE - 1, 2) == b"bc"
    assert vm.read_memory(0, 0) == b""
    for gpa, size_bytes in ((AT - 1, 2), (AT + 4 * PAGE - 1, 2), (0, 1), (-1, 1), (AT, -1)):
        with pytest.raises(ValueError, match=r"outside guest RAM; stay within 0x200000\.\."):
            vm.read_memory(gpa, size_bytes)
    vm.set_user_memory_region(0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"stay within 0x202000\.\.0x204000"):
        vm.write_memory(AT, b"x")
    vm.set_user_memory_region(1, 0, 0, 0)
    with pytest.raises(ValueError, match="this VM has no memory slot"):
        vm.read_memory(AT, 1)


def test_memory_that_this_process_may_not_write(vm: Vm) -> None:
    memory = mmap(-1, PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), PAGE, PROT_READ) == 0
    vm.set_user_memory_region(0, AT, PAGE, address, KVM_MEM_READONLY)
    assert vm.read_memory(AT, 2) == b"\0\0"
    with pytest.raises(ValueError, match="outside guest RAM"):
        vm.write_memory(AT, b"x")
