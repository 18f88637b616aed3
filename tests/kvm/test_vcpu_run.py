"""KVM_RUN and its exits: one body on the model and on the live kernel.

The guests are right on any KVM, also on one that looks for interrupts once in many instructions.
"""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from eventfds import MakeEventFd
from threads import JOIN_S, thread

from kvmtick.abi import HostError, KvmError, ioctls, structs
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP
from kvmtick.abi.exits import (
    Exit,
    ExitHlt,
    ExitInternalError,
    ExitIntr,
    ExitIo,
    ExitIoapicEoi,
    ExitIrqWindowOpen,
    ExitMmio,
    ExitSetTpr,
    ExitShutdown,
)
from kvmtick.abi.structs import (
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
    kvm_irq_routing_entry,
)
from kvmtick.guests.start import long_mode, protected
from kvmtick.host.kvmdev import open_kvm
from kvmtick.kvm.kernel import KernelVcpu, KernelVm
from kvmtick.kvm.model import ModelVcpu, ModelVm
from kvmtick.kvm.setup import cpuid_of

Vm = ModelVm | KernelVm
Vcpu = ModelVcpu | KernelVcpu
MakeVm = Callable[..., tuple[Vm, Vcpu]]

CODE = 0x1000
HANDLERS = 0x1800
STACK_TOP = 0x8000
SHORT_S = 0.05
DEVICE = 0xD000_0000
"""Where no RAM is."""

UNREAL = {
    "rsp": STACK_TOP,
    **{f"{name}_limit": 0xFFFF_FFFF for name in ("ds", "es")},
    **{f"{name}_access": 0x8093 for name in ("ds", "es")},
}
"""Data segments that reach 4 GiB in real mode."""

NOTIFY_40 = "e690 cf"  # out 0x90, al; iret
NOTIFY_41 = "e691 cf"  # out 0x91, al; iret
NOTIFY_NMI = "e692 cf"  # out 0x92, al; iret
SPIN = "ebfe"  # jmp $


@pytest.fixture(params=["model", "model-fast", "model-real", "kernel"])
def new_vm(request: pytest.FixtureRequest) -> Iterator[Callable[..., Vm]]:
    made: list[Vm] = []

    def make(ram_bytes: int = 1 << 20) -> Vm:
        match request.param:
            case "model":
                made.append(ModelVm(ram_bytes=ram_bytes))
            case "model-fast":
                made.append(ModelVm(ram_bytes=ram_bytes, fast=True))
            case "model-real":
                made.append(ModelVm(ram_bytes=ram_bytes, clock="real"))
            case _:
                made.append(KernelVm(ram_bytes=ram_bytes))
        return made[-1]

    if request.param == "kernel":
        try:
            open_kvm().close()
        except HostError as error:
            pytest.skip(f"needs /dev/kvm: {error}")
    yield make
    for vm in made:
        vm.close()


@pytest.fixture
def pc(new_vm: Callable[..., Vm]) -> MakeVm:
    """A VM whose vCPU 0 starts at the code given, with handlers by vector."""

    def make(
        code: str, handlers: dict[int, str] | None = None, *, irqchip: bool = False
    ) -> tuple[Vm, Vcpu]:
        vm = new_vm()
        if irqchip:
            vm.create_irqchip()
        return vm, start(vm, code, handlers)

    return make


def start(vm: Vm, code: str, handlers: dict[int, str] | None = None, vcpu_id: int = 0) -> Vcpu:
    at = CODE + 0x4000 * vcpu_id
    vm.write_memory(at, bytes.fromhex(code))
    for number, (vector, handler) in enumerate((handlers or {}).items()):
        address = HANDLERS + 0x40 * number
        vm.write_memory(address, bytes.fromhex(handler))
        vm.write_memory(4 * vector, address.to_bytes(4, "little"))
    vcpu = vm.create_vcpu(vcpu_id)
    vcpu.start_at(0, at, UNREAL)
    return vcpu


def answer_all(vcpu: Vcpu, answers: dict[int, bytes]) -> list[tuple[int, bytes]]:
    """A tiny VMM: answers reads by port or address up to the HLT, returns the writes."""
    writes: list[tuple[int, bytes]] = []
    while True:
        match vcpu.run():
            case ExitIo(port=at, is_write=True, data=data):
                writes.append((at, data))
            case ExitMmio(phys_addr=at, is_write=True, data=data):
                writes.append((at, data))
            case ExitIo(port=at) | ExitMmio(phys_addr=at):
                vcpu.answer(answers[at])
            case ExitHlt():
                return writes
            case other:
                raise AssertionError(other)


def port_of(exit_: Exit) -> int:
    assert isinstance(exit_, ExitIo), exit_
    return exit_.port


# ---- accesses ----------------------------------------------------------------------------------


def test_ports_of_every_size(pc: MakeVm) -> None:
    _, vcpu = pc(
        "66b844332211"  # mov eax, 0x11223344
        "e680"  # out 0x80, al
        "e781"  # out 0x81, ax
        "66e782"  # out 0x82, eax
        "e483"  # in al, 0x83
        "e684"  # out 0x84, al
        "e585"  # in ax, 0x85
        "e786"  # out 0x86, ax
        "66e587"  # in eax, 0x87
        "66e788"  # out 0x88, eax
        "f4"  # hlt
    )
    answers = {0x83: b"\xa1", 0x85: b"\xb1\xb2", 0x87: b"\xc1\xc2\xc3\xc4"}
    assert answer_all(vcpu, answers) == [
        (0x80, b"\x44"),
        (0x81, b"\x44\x33"),
        (0x82, b"\x44\x33\x22\x11"),
        (0x84, b"\xa1"),
        (0x86, b"\xb1\xb2"),
        (0x88, b"\xc1\xc2\xc3\xc4"),
    ]


def test_a_write_has_happened_and_a_read_has_not(pc: MakeVm) -> None:
    _, vcpu = pc("b007 e680 e481 f4")  # mov al, 7; out 0x80, al; in al, 0x81; hlt
    assert vcpu.run() == ExitIo(0x80, 1, 1, True, b"\x07")
    assert vcpu.get_regs().rip == CODE + 4
    assert vcpu.run() == ExitIo(0x81, 1, 1, False, b"")
    assert (vcpu.get_regs().rip, vcpu.get_regs().rax & 0xFF) == (CODE + 4, 7)
    vcpu.answer(b"\x2a")
    assert vcpu.run() == ExitHlt()
    assert (vcpu.get_regs().rip, vcpu.get_regs().rax & 0xFF) == (CODE + 7, 0x2A)


def test_memory_that_is_no_ram(pc: MakeVm) -> None:
    vm, vcpu = pc(
        "66bb000000d0"  # mov ebx, 0xd0000000
        "66b811223344"  # mov eax, 0x44332211
        "678803"  # mov [ebx], al
        "67894301"  # mov [ebx+1], ax
        "6667894305"  # mov [ebx+5], eax
        "678a4310"  # mov al, [ebx+16]
        "a20020"  # mov [0x2000], al
        "678b4311"  # mov ax, [ebx+17]
        "a30120"  # mov [0x2001], ax
        "66678b4321"  # mov eax, [ebx+33]
        "66a30320"  # mov [0x2003], eax
        "f4"  # hlt
    )
    answers = {DEVICE + 16: b"A", DEVICE + 17: b"BC", DEVICE + 33: b"DEFG"}
    assert answer_all(vcpu, answers) == [
        (DEVICE, b"\x11"),
        (DEVICE + 1, b"\x11\x22"),
        (DEVICE + 5, b"\x11\x22\x33\x44"),
    ]
    assert vm.read_memory(0x2000, 7) == b"ABCDEFG"


def test_an_access_of_8_bytes_is_one_exit(pc: MakeVm) -> None:
    vm, vcpu = pc(
        "66bb000000d0"  # mov ebx, 0xd0000000
        "670f6f03"  # movq mm0, [ebx]
        "670f7f4308"  # movq [ebx+8], mm0
        "0f7f060020"  # movq [0x2000], mm0
        "f4"  # hlt
    )
    assert answer_all(vcpu, {DEVICE: b"abcdefgh"}) == [(DEVICE + 8, b"abcdefgh")]
    assert vm.read_memory(0x2000, 8) == b"abcdefgh"


def test_an_access_over_the_end_of_a_page_is_two_exits(pc: MakeVm) -> None:
    _, vcpu = pc(
        "66bbfe0f00d0"  # mov ebx, 0xd0000ffe
        "66b811223344"  # mov eax, 0x44332211
        "66678903"  # mov [ebx], eax
        "66670103"  # add [ebx], eax
        "f4"  # hlt
    )
    answers = {DEVICE + 0xFFE: b"\x01\x00", DEVICE + 0x1000: b"\x02\x00"}
    assert answer_all(vcpu, answers) == [
        (DEVICE + 0xFFE, b"\x11\x22"),
        (DEVICE + 0x1000, b"\x33\x44"),
        (DEVICE + 0xFFE, b"\x12\x22"),
        (DEVICE + 0x1000, b"\x35\x44"),
    ]


def test_string_input_comes_at_once_and_output_one_by_one(pc: MakeVm) -> None:
    vm, vcpu = pc(
        "be0020"  # mov si, 0x2000
        "bf0030"  # mov di, 0x3000
        "ba8000"  # mov dx, 0x80
        "b90300"  # mov cx, 3
        "f36f"  # rep outsw
        "b90500"  # mov cx, 5
        "f36c"  # rep insb
        "e681"  # out 0x81, al
        "f4"  # hlt
    )
    vm.write_memory(0x2000, b"abcdef")
    for data in (b"ab", b"cd", b"ef"):
        assert vcpu.run() == ExitIo(0x80, 2, 1, True, data)
    assert vcpu.run() == ExitIo(0x80, 1, 5, False, b"")
    with pytest.raises(ValueError, match="the guest reads 5 bytes, the answer has 4"):
        vcpu.answer(b"1234")
    vcpu.answer(b"12345")
    assert port_of(vcpu.run()) == 0x81
    assert vm.read_memory(0x3000, 6) == b"12345\0"
    assert vcpu.get_regs().rcx & 0xFFFF == 0


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        # mov di, 0x3ffc; mov cx, 8; mov dx, 0x80; rep insb; hlt: to the end of the page, the rest
        ("bffc3f b90800 ba8000 f36c f4", [4, 4]),
        # mov di, 0x3003; std: downwards
        ("bf0330 b90300 ba8000 fd f36c f4", [3]),
        # mov di, 0x3000; mov cx, 0x800; rep insw: what the buffer holds
        ("bf0030 b90008 ba8000 f36d f4", [512] * 4),
    ],
)
def test_how_much_string_input_is_asked_for(pc: MakeVm, code: str, counts: list[int]) -> None:
    vm, vcpu = pc(code)
    asked = []
    while isinstance(exit_ := vcpu.run(), ExitIo):
        asked.append(exit_.count)
        vcpu.answer(b"\x5a" * exit_.count * exit_.size)
    assert exit_ == ExitHlt()
    assert asked == counts
    assert vm.read_memory(0x3000, 0x2000).count(b"\x5a") == sum(counts) * exit_size(code)


def exit_size(code: str) -> int:
    return 2 if "6d" in code else 1


def test_a_read_and_a_write_of_one_instruction(pc: MakeVm) -> None:
    _, vcpu = pc(
        "66be000000d0"  # mov esi, 0xd0000000
        "66bf001000d0"  # mov edi, 0xd0001000
        "66b902000000"  # mov ecx, 2
        "f367a5"  # a32 rep movsw
        "f4"  # hlt
    )
    answers = {DEVICE: b"ab", DEVICE + 2: b"cd"}
    assert answer_all(vcpu, answers) == [(DEVICE + 0x1000, b"ab"), (DEVICE + 0x1002, b"cd")]


def test_only_a_read_has_an_answer(pc: MakeVm) -> None:
    _, vcpu = pc("e680 f4")  # out 0x80, al; hlt
    vcpu.run()
    with pytest.raises(ValueError, match="nothing to answer"):
        vcpu.answer(b"\0")


# ---- HLT, shutdown, errors ---------------------------------------------------------------------


def test_hlt_without_an_irqchip_is_an_exit_and_goes_on(pc: MakeVm) -> None:
    _, vcpu = pc("f4 e680 f4")  # hlt; out 0x80, al; hlt
    assert vcpu.run() == ExitHlt()
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
    assert port_of(vcpu.run()) == 0x80
    assert vcpu.run() == ExitHlt()


def test_hlt_with_an_irqchip_waits_in_the_kernel(pc: MakeVm) -> None:
    _, vcpu = pc("f4 e680 f4", irqchip=True)  # hlt; out 0x80, al; hlt
    assert vcpu.run(SHORT_S) == ExitIntr("time")
    assert vcpu.get_mp_state() == KVM_MP_STATE_HALTED
    assert vcpu.area.exit_reason == structs.KVM_EXIT_INTR
    vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
    assert port_of(vcpu.run()) == 0x80


def test_a_triple_fault_shuts_down(pc: MakeVm) -> None:
    _, vcpu = pc("0f0b")  # ud2
    vcpu.start_at(0, CODE, protected(CODE))
    assert vcpu.run() == ExitShutdown()
    assert vcpu.run() == ExitShutdown()


def test_code_where_no_ram_is_cannot_be_emulated(pc: MakeVm) -> None:
    _, vcpu = pc("ea1000ffff")  # jmp 0xffff:0x0010
    exit_ = vcpu.run()
    assert isinstance(exit_, ExitInternalError)
    assert exit_.suberror == structs.KVM_INTERNAL_ERROR_EMULATION
    assert vcpu.area.u.internal.ndata == len(exit_.data)
    assert vcpu.get_regs().rip == 0x10
    assert vcpu.run() == exit_


def test_a_lower_cr8_is_an_exit_without_an_irqchip(new_vm: Callable[..., Vm]) -> None:
    vm = new_vm()
    vcpu = start(
        vm,
        "b805000000"  # mov eax, 5
        "440f22c0"  # mov cr8, rax
        "e680"  # out 0x80, al
        "440f22c0"  # mov cr8, rax
        "b803000000"  # mov eax, 3
        "440f22c0"  # mov cr8, rax
        "e681"  # out 0x81, al
        "440f20c0"  # mov rax, cr8
        "e682",  # out 0x82, al
    )
    for table in (0x9000, 0xA000):
        vm.write_memory(table, (table + 0x1000 | 3).to_bytes(8, "little"))
    vm.write_memory(0xB000, (0x83).to_bytes(8, "little"))  # 2 MiB from 0 on
    vcpu.set_cpuid2(cpuid_of(vm.get_supported_cpuid(), 0))
    vcpu.start_at(0, CODE, long_mode(CODE, 0x9000, rsp=STACK_TOP))
    assert port_of(vcpu.run()) == 0x80
    assert vcpu.area.cr8 == 5
    exit_ = vcpu.run()
    assert vcpu.area.cr8 == 3
    # a KVM whose emulator executes the instruction does not tell
    if isinstance(vm, ModelVm) or exit_ == ExitSetTpr():
        assert exit_ == ExitSetTpr()
        exit_ = vcpu.run()
    assert port_of(exit_) == 0x81
    vcpu.area.cr8 = 9
    assert vcpu.run() == ExitIo(0x82, 1, 1, True, b"\x09")


def test_cr8_is_user_spaces_without_an_irqchip(pc: MakeVm) -> None:
    _, vcpu = pc("e680 e681 f4")  # out 0x80, al; out 0x81, al; hlt
    vcpu.area.cr8 = 5
    assert port_of(vcpu.run()) == 0x80
    assert vcpu.area.cr8 == 5
    vcpu.area.cr8 = 16
    with pytest.raises(KvmError) as failure:
        vcpu.run()
    assert failure.value.errno == errno.EINVAL
    vcpu.area.cr8 = 0
    assert port_of(vcpu.run()) == 0x81


# ---- interrupts from user space ----------------------------------------------------------------


def test_an_interrupt_goes_in_whatever_if_is_and_the_last_counts(pc: MakeVm) -> None:
    _, vcpu = pc("e680 f4", {0x40: NOTIFY_40, 0x41: NOTIFY_41})  # out 0x80, al; hlt
    vcpu.interrupt(0x40)
    vcpu.interrupt(0x41)
    assert [port_of(vcpu.run()) for _ in range(2)] == [0x91, 0x80]


def test_an_nmi_comes_and_the_next_waits_for_iret(pc: MakeVm) -> None:
    _, vcpu = pc("e680 e681 f4", {2: NOTIFY_NMI})  # out 0x80, al; out 0x81, al; hlt
    assert port_of(vcpu.run()) == 0x80
    vcpu.nmi()
    vcpu.nmi()
    assert port_of(vcpu.run()) == 0x92
    assert sorted(port_of(vcpu.run()) for _ in range(2)) == [0x81, 0x92]


def test_the_interrupt_window(pc: MakeVm) -> None:
    """IF=0, then a guest that spins with IF=1."""
    _, vcpu = pc("e680 fb 90 ebfd", {0x40: NOTIFY_40})  # out 0x80, al; sti; l: nop; jmp l
    vcpu.area.request_interrupt_window = 1
    assert port_of(vcpu.run()) == 0x80
    area = vcpu.area
    assert (area.if_flag, area.ready_for_interrupt_injection) == (0, 0)
    assert vcpu.run() == ExitIrqWindowOpen()
    assert (area.if_flag, area.ready_for_interrupt_injection) == (1, 1)
    vcpu.interrupt(0x40)
    area.request_interrupt_window = 0
    assert port_of(vcpu.run()) == 0x90
    assert (area.if_flag, area.ready_for_interrupt_injection) == (0, 0)
    assert vcpu.run(SHORT_S) == ExitIntr("time")


def test_a_read_is_completed_before_an_interrupt_goes_in(pc: MakeVm) -> None:
    code = "fb 90 e480 e681 f4"  # sti; nop; in al, 0x80; out 0x81, al; hlt
    _, vcpu = pc(code, {0x40: NOTIFY_40})
    assert port_of(vcpu.run()) == 0x80
    vcpu.answer(b"\x55")
    vcpu.interrupt(0x40)
    assert vcpu.run() == ExitIo(0x90, 1, 1, True, b"\x55")
    assert vcpu.run() == ExitIo(0x81, 1, 1, True, b"\x55")


def test_an_in_kernel_interrupt_ends_hlt(pc: MakeVm) -> None:
    vm, vcpu = pc("fb f4 e680 ebfe", {0x20: NOTIFY_40}, irqchip=True)  # sti; hlt; out 0x80, al
    set_up_pic(vm)
    vm.irq_line(0, 1)
    assert port_of(vcpu.run()) == 0x90
    assert vcpu.area.ready_for_interrupt_injection == 1
    assert port_of(vcpu.run()) == 0x80


def test_an_eoi_finds_the_interrupt_that_lvt0_has_let_in(pc: MakeVm) -> None:
    vm, vcpu = pc(
        "66bb0000e0fe"  # mov ebx, 0xfee00000
        "6766c783f0000000ff010000"  # mov dword [ebx + SVR], 0x1ff
        "6766c7835003000000070100"  # mov dword [ebx + LVT0], masked, ExtINT
        "e680"  # out 0x80, al
        "fb"  # sti
        "6766c7830003000041000400"  # mov dword [ebx + ICR], to itself, 0x41
        "ebfe",  # jmp $
        {
            0x20: NOTIFY_40,
            # mov dword [ebx + LVT0], ExtINT; mov dword [ebx + EOI], 0; iret
            0x41: "6766c7835003000000070000 6766c783b000000000000000 cf",
        },
        irqchip=True,
    )
    set_up_pic(vm)
    assert port_of(vcpu.run()) == 0x80
    vm.irq_line(0, 1)
    assert port_of(vcpu.run(JOIN_S)) == 0x90


def set_up_pic(vm: Vm) -> None:
    """Vectors from 0x20 on, IRQ 0 alone unmasked, automatic EOI."""
    chip = vm.get_irqchip(structs.KVM_IRQCHIP_PIC_MASTER)
    chip.chip.pic.irq_base = 0x20
    chip.chip.pic.imr = 0xFE
    chip.chip.pic.auto_eoi = 1
    vm.set_irqchip(chip)


def test_a_split_irqchip_takes_interrupts_from_user_space(new_vm: Callable[..., Vm]) -> None:
    vm = new_vm()
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    # out 0x80, al; sti; out 0x81, al; l: nop; jmp l
    vcpu = start(vm, "e680 fb e681 90 ebfd", {0x40: NOTIFY_40})
    vcpu.interrupt(0x40)
    with pytest.raises(KvmError) as failure:
        vcpu.interrupt(0x41)
    assert failure.value.errno == errno.EEXIST
    assert port_of(vcpu.run()) == 0x80  # IF=0
    assert sorted(port_of(vcpu.run()) for _ in range(2)) == [0x81, 0x90]
    vcpu.area.request_interrupt_window = 1
    assert vcpu.run() == ExitIrqWindowOpen()


def test_user_spaces_ioapic_hears_of_an_eoi(new_vm: Callable[..., Vm]) -> None:
    vm = new_vm()
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    level_msi = kvm_irq_routing_entry(gsi=4, type=structs.KVM_IRQ_ROUTING_MSI)
    level_msi.u.msi.address_lo = 0xFEE0_0000
    level_msi.u.msi.data = 0x8000 | 0x4000 | 0x51  # level, assert
    vm.set_gsi_routing([level_msi])
    vcpu = start(
        vm,
        "66bb0000e0fe"  # mov ebx, 0xfee00000
        "6667c783b000000000000000"  # mov dword [ebx+0xb0], 0: EOI
        "ebfe",  # jmp $
    )
    lapic = vcpu.get_lapic()
    lapic.set_reg(0xF0, 0x1FF)
    lapic.set_reg(0x120, 1 << 0x11)  # ISR and TMR of 0x51
    lapic.set_reg(0x1A0, 1 << 0x11)
    vcpu.set_lapic(lapic)
    assert vcpu.run() == ExitIoapicEoi(0x51)
    assert vcpu.run(SHORT_S) == ExitIntr("time")


# ---- stopping it -------------------------------------------------------------------------------


def test_a_kick_before_the_run_ends_the_next_one_only(pc: MakeVm) -> None:
    _, vcpu = pc("e680 ebfe")  # out 0x80, al; jmp $
    vcpu.kick()
    assert vcpu.run() == ExitIntr("kick")
    assert port_of(vcpu.run()) == 0x80


@pytest.mark.parametrize("code", [SPIN, "f4"], ids=["spins", "halted"])
def test_a_kick_from_another_thread_ends_the_run(pc: MakeVm, code: str) -> None:
    _, vcpu = pc("e680" + code, irqchip=True)  # out 0x80, al
    assert port_of(vcpu.run()) == 0x80
    with thread(vcpu.kick):
        assert vcpu.run(JOIN_S) == ExitIntr("kick")


def test_the_limit_ends_a_guest_that_spins(pc: MakeVm) -> None:
    _, vcpu = pc(SPIN)
    assert vcpu.run(SHORT_S) == ExitIntr("time")
    assert vcpu.area.exit_reason == structs.KVM_EXIT_INTR


def test_immediate_exit_completes_the_access_and_is_eintr(pc: MakeVm) -> None:
    _, vcpu = pc("e480 e681 f4")  # in al, 0x80; out 0x81, al; hlt
    assert port_of(vcpu.run()) == 0x80
    vcpu.answer(b"\x77")
    vcpu.area.immediate_exit = 1
    with pytest.raises(KvmError) as failure:
        vcpu.ioctl(ioctls.KVM_RUN)
    assert failure.value.errno == errno.EINTR
    assert (vcpu.get_regs().rip, vcpu.get_regs().rax & 0xFF) == (CODE + 2, 0x77)
    assert vcpu.run() == ExitIntr("kick")
    vcpu.area.immediate_exit = 0
    assert vcpu.run() == ExitIo(0x81, 1, 1, True, b"\x77")


@contextmanager
def alarm(handler: Callable[[], None]) -> Iterator[None]:
    """SIGALRM comes in the middle of a run of SHORT_S."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, SHORT_S / 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_for_the_process_does_not_end_it(pc: MakeVm) -> None:
    _, vcpu = pc(SPIN)
    seen: list[bool] = []
    with alarm(lambda: seen.append(True)):
        assert vcpu.run(SHORT_S) == ExitIntr("time")
    assert seen == [True]


def test_one_at_a_time_runs_a_vcpu(pc: MakeVm) -> None:
    _, vcpu = pc(SPIN)

    def run_again() -> None:
        with pytest.raises(RuntimeError, match="running already"):
            vcpu.run()
        vcpu.kick()

    with alarm(run_again):
        assert vcpu.run(JOIN_S) == ExitIntr("kick")


@pytest.mark.parametrize("vm_first", [True, False])
def test_closing_in_any_order(pc: MakeVm, vm_first: bool) -> None:
    vm, vcpu = pc("e680 f4")  # out 0x80, al; hlt
    vcpu.run()
    area = vcpu.area
    for each in (vm, vcpu) if vm_first else (vcpu, vm):
        each.close()
        each.close()
    with pytest.raises(KvmError) as failure:
        vcpu.run()
    assert failure.value.errno == errno.EBADF
    with pytest.raises(KvmError):
        vcpu.area  # noqa: B018
    assert area.exit_reason == structs.KVM_EXIT_IO


# ---- several vCPUs -----------------------------------------------------------------------------


def test_init_and_sipi_start_a_vcpu_that_waits_in_its_thread(pc: MakeVm) -> None:
    vm, first = pc(
        "66bb0000e0fe"  # mov ebx, 0xfee00000
        "6667c783f0000000ff010000"  # mov dword [ebx+0xf0], 0x1ff
        "6667c7831003000000000001"  # mov dword [ebx+0x310], 0x01000000
        "6667c7830003000000450000"  # mov dword [ebx+0x300], 0x4500: INIT
        "6667c7830003000009460000"  # mov dword [ebx+0x300], 0x4609: SIPI
        "803e002001"  # wait: cmp byte [0x2000], 1
        "75f9"  # jne wait
        "e680"  # out 0x80, al
        "f4",  # hlt
        irqchip=True,
    )
    vm.write_memory(0x9000, bytes.fromhex("c606002001 e691 f4"))  # mov byte [0x2000], 1; out; hlt
    second = vm.create_vcpu(1)
    assert second.get_mp_state() == KVM_MP_STATE_UNINITIALIZED
    exits: list[Exit] = []
    with thread(lambda: exits.append(second.run(JOIN_S))):
        # so that it waits when INIT comes: INIT with SIPI behind it would do as well
        assert port_of(first.run(JOIN_S)) == 0x80
    assert port_of(exits[0]) == 0x91
    assert second.get_regs().rip == 7


def test_an_ipi_wakes_a_vcpu_that_sleeps_in_its_thread(pc: MakeVm) -> None:
    vm, first = pc(
        "66bb0000e0fe"  # mov ebx, 0xfee00000
        "6667c783f0000000ff010000"  # mov dword [ebx+0xf0], 0x1ff
        "6667c7831003000000000001"  # mov dword [ebx+0x310], 0x01000000
        "6667c7830003000040400000"  # mov dword [ebx+0x300], 0x4040: fixed, 0x40
        "e680"  # out 0x80, al
        "f4",  # hlt
        {0x40: NOTIFY_40},
        irqchip=True,
    )
    second = start(vm, "e681 fb f4 ebfd", vcpu_id=1)  # out 0x81, al; sti; l: hlt; jmp l
    second.set_mp_state(KVM_MP_STATE_RUNNABLE)
    lapic = second.get_lapic()
    lapic.set_reg(0xF0, 0x1FF)
    second.set_lapic(lapic)
    assert port_of(second.run()) == 0x81
    exits: list[Exit] = []
    with thread(lambda: exits.append(second.run(JOIN_S))):
        assert port_of(first.run(JOIN_S)) == 0x80
    assert port_of(exits[0]) == 0x90


def test_calls_reach_a_vcpu_that_runs_in_another_thread(pc: MakeVm) -> None:
    vm, vcpu = pc("e680 fb ebfe", {0x20: NOTIFY_40}, irqchip=True)  # out 0x80, al; sti; jmp $
    set_up_pic(vm)
    assert port_of(vcpu.run()) == 0x80
    with thread(lambda: vm.irq_line(0, 1)):
        assert port_of(vcpu.run(JOIN_S)) == 0x90


def test_an_irqfd_wakes_a_vcpu_that_sleeps(pc: MakeVm, eventfd: MakeEventFd) -> None:
    vm, vcpu = pc("e680 fb f4", {0x20: NOTIFY_40}, irqchip=True)  # out 0x80, al; sti; hlt
    set_up_pic(vm)
    event = eventfd()
    vm.irqfd(event.fd, 0)
    assert port_of(vcpu.run()) == 0x80
    with thread(lambda: os.eventfd_write(event.fd, 1)):
        assert port_of(vcpu.run(JOIN_S)) == 0x90


# ---- a whole VMM -------------------------------------------------------------------------------

TICKING = (
    "b011 e620 b020 e621 b004 e621 b001 e621"  # PIC: vectors from 0x20 on
    "b0fe e621"  # mov al, 0xfe; out 0x21, al: IRQ 0 alone
    "b034 e643 b0a9 e640 b004 e640"  # PIT: mode 2, every 1193 counts
    "fb f4 ebfd"  # sti; l: hlt; jmp l
)
TICK = (
    "ff060020"  # inc word [0x2000]
    "b020 e620"  # mov al, 0x20; out 0x20, al: EOI
    "e680"  # out 0x80, al
    "cf"  # iret
)


def test_a_guest_ticks_under_a_hand_written_vmm(new_vm: Callable[..., Vm]) -> None:
    vm = new_vm()
    vm.create_irqchip()
    vm.create_pit2()
    vcpu = start(vm, TICKING, {0x20: TICK})
    for tick in range(1, 21):
        assert vcpu.run() == ExitIo(0x80, 1, 1, True, b"\x20")
        assert vm.read_memory(0x2000, 2) == tick.to_bytes(2, "little")
