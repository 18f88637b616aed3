"""What goes into a vCPU and when: NMIs, the order of interrupts, HLT and MP states, INIT and SIPI,
KVM_INTERRUPT and KVM_SET_VCPU_EVENTS (SDM vol. 3A 7.7 to 7.9; arch/x86/kvm/x86.c).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmtick import guests
from kvmtick.abi.caps import KVM_CAP_SPLIT_IRQCHIP
from kvmtick.abi.exits import (
    Exit,
    ExitHlt,
    ExitIo,
    ExitIrqWindowOpen,
    ExitMmio,
    ExitShutdown,
)
from kvmtick.abi.structs import (
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI,
    kvm_vcpu_events,
)
from kvmtick.conform.apics import ON, VECTOR, errno_of, sends
from kvmtick.conform.bench import (
    DIVIDE_BY_1,
    LEAVE,
    LIMIT_S,
    LVTT,
    MSI_ADDRESS,
    MSR_APIC_BASE,
    PORT_ACT,
    TDCR,
    TMICT,
    WINDOWS,
    X2APIC_BASE,
    Bench,
    Handler,
    Pc,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests.script import (
    EXIT_CODE,
    NMIS_AT,
    lapic_write,
    out8,
    snap_vector,
    sti,
    wait_vector,
)
from kvmtick.kvm.api import Vcpu, Vm

HANDLER_AT = 0x7800
"""Between the scenario guest's stack and its image."""
COUNT_AT = 0x7900
VECTOR_NMI, VECTOR_UD = 2, 6
HALT_LIMIT_S = 0.02
"""A guest that sleeps for good is left to it for so long."""
HALT_ATTEMPTS = 100
"""A busy host may not have run it at all by then."""
IRET, CLI, STI, HLT = b"\xcf", b"\xfa", b"\xfb", b"\xf4"
WINDOW = b"\xe6\x80"
"""out 0x80, al"""
COUNT = b"\xff\x06" + COUNT_AT.to_bytes(2, "little")
"""inc word [COUNT_AT]"""
STACK = b"\x31\xc0\x8e\xd8\x8e\xd0\xbc\x00\x70"
"""xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000"""


def image(code: bytes) -> guests.Guest:
    """A guest of real-mode code."""
    return guests.Guest("image", code, guests.LOAD_AT, guests.ENTRY, None)


def handler(vm: Vm[Vcpu], vector: int, code: bytes, at: int = HANDLER_AT) -> None:
    """The handler of a vector in the IVT."""
    vm.write_memory(at, code)
    vm.write_memory(4 * vector, at.to_bytes(4, "little"))


def counted(vm: Vm[Vcpu]) -> int:
    """How often `COUNT` was executed."""
    return int.from_bytes(vm.read_memory(COUNT_AT, 2), "little")


def run_until_halted(pc: Pc, code: bytes) -> None:
    """Run real-mode code until vCPU 0 sleeps in the kernel for good."""
    pc.vm.load(image(code))
    for _ in range(HALT_ATTEMPTS):
        pc.vm.run(limit_s=HALT_LIMIT_S)
        if pc.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED:
            return
    equal(pc.vcpus[0].get_mp_state(), KVM_MP_STATE_HALTED, "MP state in HLT")


def finish(pc: Pc) -> None:
    """Run on, to the end of the code."""
    equal(pc.vm.run(limit_s=LIMIT_S).exit.code, EXIT_CODE, "exit code")


# NMIs.


@variants(
    "Of {0} NMIs {1} are taken: one may wait beside the one that is served (process_nmi).",
    {"1": (1, 1), "2": (2, 2), "3": (3, 2), "9": (9, 2)},
)
def nmi_limit(bench: Bench, sent: int, taken: int) -> None:
    with bench.pc() as pc:
        handler(pc.vm, VECTOR_NMI, COUNT + IRET)
        run_until_halted(pc, STACK + CLI + HLT + WINDOW * 4 + LEAVE)
        for _ in range(sent):
            pc.vcpus[0].nmi()
        equal(pc.vcpus[0].get_vcpu_events().nmi.pending, taken, "pending NMIs")
        finish(pc)
        equal(counted(pc.vm), taken, "NMIs taken")


@case("Beside an NMI that is being injected one may wait (process_nmi looks at nmi_injected).")
def nmi_limit_beside_an_injected_one(bench: Bench) -> None:
    with bench.pc() as pc:
        vcpu = pc.vcpus[0]
        events = kvm_vcpu_events()
        events.nmi.injected = 1
        vcpu.set_vcpu_events(events)
        for _ in range(3):
            vcpu.nmi()
        equal(vcpu.get_vcpu_events().nmi.pending, 1, "pending NMIs")


@case("An NMI is taken with IF=0 (SDM 7.7).")
def nmi_ignores_if(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(out8(PORT_ACT, 0), *WINDOWS, acts=[pc.vcpus[0].nmi])
        equal(got.nmis, 1, "NMIs")


@case("An NMI ends a HLT with IF=0 (SDM vol. 2, HLT).")
def nmi_wakes_hlt(bench: Bench) -> None:
    with bench.pc() as pc:
        handler(pc.vm, VECTOR_NMI, IRET)
        run_until_halted(pc, STACK + CLI + HLT + LEAVE)
        pc.vcpus[0].nmi()
        finish(pc)


def nmi_states(bench: Bench, sent_in_handler: int) -> list[tuple[int, int]]:
    """(pending, masked) in the handler of the first NMI, after `sent_in_handler` more, in that of
    the second, and at the end.
    """
    seen: list[tuple[int, int]] = []
    with bench.pc() as pc:

        def look() -> None:
            nmi = pc.vcpus[0].get_vcpu_events().nmi
            seen.append((nmi.pending, nmi.masked))

        def send() -> None:
            # push dx; mov dx, PORT_ACT + 1; out dx, al; pop dx; inc dword [nmis]; iret
            nmis_at = (guests.LOAD_AT + NMIS_AT).to_bytes(2, "little")
            code = b"\x52\xba\x11\x05\xee\x5a\x66\xff\x06" + nmis_at + IRET
            handler(pc.vm, VECTOR_NMI, code)
            pc.vcpus[0].nmi()

        def in_handler() -> None:
            if not seen:
                for _ in range(sent_in_handler):
                    pc.vcpus[0].nmi()
            look()

        pc.run(out8(PORT_ACT, 0), *WINDOWS, acts=[send, in_handler])
        look()
    return seen


@case("In an NMI's handler NMIs are masked, and IRET unmasks them (SDM 7.7.1).")
def nmis_are_masked_until_iret(bench: Bench) -> None:
    equal(nmi_states(bench, 0), [(0, 1), (0, 0)], "pending and masked, in the handler and after")


@case("While NMIs are masked one at most waits, and is taken after IRET (process_nmi: limit 1).")
def one_nmi_waits_while_masked(bench: Bench) -> None:
    equal(
        nmi_states(bench, 3),
        [(1, 1), (0, 1), (0, 0)],
        "pending and masked, in the first handler, in the second, after",
    )


@variants(
    "KVM_SET_VCPU_EVENTS {0} KVM_VCPUEVENT_VALID_NMI_PENDING {1} (api.rst 4.32).",
    {
        "without-its-flag": ("without", "leaves the pending NMIs", 0, 0),
        "with-its-flag": ("with", "sets the pending NMIs", KVM_VCPUEVENT_VALID_NMI_PENDING, 1),
    },
)
def pending_nmis_are_set(bench: Bench, how: str, does: str, flags: int, nmis: int) -> None:
    with bench.pc() as pc:

        def send() -> None:
            events = kvm_vcpu_events(flags=flags)
            events.nmi.pending = 1
            pc.vcpus[0].set_vcpu_events(events)

        equal(pc.run(out8(PORT_ACT, 0), *WINDOWS, acts=[send]).nmis, nmis, "NMIs taken")


@case("KVM_SET_VCPU_EVENTS can mask NMIs; one that comes then waits (api.rst 4.32; SDM 7.7.1).")
def masked_by_set_vcpu_events(bench: Bench) -> None:
    with bench.pc() as pc:
        seen: list[int] = []

        def mask_and_send() -> None:
            events = pc.vcpus[0].get_vcpu_events()
            events.nmi.masked = 1
            pc.vcpus[0].set_vcpu_events(events)
            pc.vcpus[0].nmi()

        got = pc.run(
            *(out8(PORT_ACT, 0), *WINDOWS, out8(PORT_ACT + 1, 0)),
            acts=[
                mask_and_send,
                lambda: seen.append(pc.vcpus[0].get_vcpu_events().nmi.pending),
            ],
        )
        equal((got.nmis, seen), (0, [1]), "NMIs taken, pending")


# Order.

EOI_MSR = b"\x66\x31\xc0\x66\x31\xd2\x66\xb9\x0b\x08\x00\x00\x0f\x30"
"""xor eax, eax; xor edx, edx; mov ecx, 0x80b; wrmsr"""
PIC_BASE = 0x20


def order_of(bench: Bench, vectors: tuple[int, ...], arm: Callable[[Pc], object]) -> list[int]:
    """In which order a guest takes what `arm` makes wait before it has IF=1; every handler ends its
    interrupt, in the local APIC (in x2APIC mode) and the master PIC.
    """
    with bench.pc() as pc:
        for n, vector in enumerate(vectors):
            # pusha; mov dx, PORT_ACT; mov al, vector; out dx, al; EOI; out 0x20, 0x20; popa
            code = b"\x60\xba\x10\x05\xb0" + bytes((vector,)) + b"\xee" + EOI_MSR
            code += b"\xb0\x20\xe6\x20\x61"
            handler(pc.vm, vector, code + IRET, HANDLER_AT + 0x30 * n)
        equal(pc.vcpus[0].set_msrs({MSR_APIC_BASE: X2APIC_BASE}), 1, "MSRs set")
        pc.enable_lapic()
        pc.pic(irq_base=PIC_BASE)
        pc.vm.load(image(STACK + STI + WINDOW * 8 + LEAVE))
        arm(pc)
        seen: list[int] = []
        handlers: dict[int, Handler] = {
            PORT_ACT: lambda port, size_bytes, value: seen.append(value or 0)
        }
        equal(pc.vm.run(limit_s=LIMIT_S, handlers=handlers).exit.code, EXIT_CODE, "exit code")
        return seen


def message(pc: Pc, *vectors: int) -> None:
    """Messages to vCPU 0."""
    for vector in vectors:
        pc.vm.signal_msi(MSI_ADDRESS, vector)


@case("Of several requests of the local APIC the highest vector comes first (SDM 12.8.3).")
def higher_vectors_first(bench: Bench) -> None:
    got = order_of(bench, (0x41, 0x93, 0x62), lambda pc: message(pc, 0x41, 0x93, 0x62))
    equal(got, [0x93, 0x62, 0x41], "vectors in order")


@case("Within a class, too, the higher vector comes first (SDM 12.8.3).")
def higher_vectors_first_in_a_class(bench: Bench) -> None:
    got = order_of(bench, (0x41, 0x4F), lambda pc: message(pc, 0x41, 0x4F))
    equal(got, [0x4F, 0x41], "vectors in order")


@case("The PIC's interrupt comes before the local APIC's (kvm_cpu_get_interrupt: ExtINT first).")
def pic_before_the_lapic(bench: Bench) -> None:
    def arm(pc: Pc) -> None:
        message(pc, 0x93)
        pc.vm.irq_line(1, 1)

    got = order_of(bench, (PIC_BASE + 1, 0x93), arm)
    equal(got, [PIC_BASE + 1, 0x93], "vectors in order")


@case(
    "An NMI goes in before an interrupt, whose turn is the handler's end or later (SDM table 7-2)."
)
def nmi_before_interrupts(bench: Bench) -> None:
    def arm(pc: Pc) -> None:
        message(pc, 0x93)
        pc.vcpus[0].nmi()

    got = order_of(bench, (VECTOR_NMI, 0x93), arm)
    equal(got, [VECTOR_NMI, 0x93], "vectors in order")


@case(
    "An event that KVM_SET_VCPU_EVENTS has as injected goes in before all that waits "
    "(kvm_check_and_inject_events)."
)
def injected_before_all(bench: Bench) -> None:
    def arm(pc: Pc) -> None:
        message(pc, 0x93)
        pc.vcpus[0].nmi()
        events = pc.vcpus[0].get_vcpu_events()
        events.interrupt.injected, events.interrupt.nr = 1, 0x41
        pc.vcpus[0].set_vcpu_events(events)

    got = order_of(bench, (VECTOR_NMI, 0x41, 0x93), arm)
    # the NMI comes before the first instruction of the handler of 0x41
    equal(sorted(got), [VECTOR_NMI, 0x41, 0x93], "vectors")
    check(got.index(0x41) < got.index(0x93), "vectors in order", "0x41 before 0x93", got)


@variants(
    "With {0} in KVM_SET_VCPU_EVENTS an interrupt is taken {1} (SDM 7.8.3; api.rst 4.32, "
    "interrupt.shadow).",
    {
        "none": ("no shadow", "at once", 0, 0),
        "sti": ("the shadow of STI", "after the next instruction", KVM_X86_SHADOW_INT_STI, 1),
        "mov-ss": ("that of MOV SS", "after the next instruction", KVM_X86_SHADOW_INT_MOV_SS, 1),
    },
)
def shadow(bench: Bench, how: str, when: str, bits: int, instructions: int) -> None:
    with bench.pc() as pc:
        # mov [COUNT_AT], dx; iret
        handler(pc.vm, VECTOR, b"\x89\x16" + COUNT_AT.to_bytes(2, "little") + IRET)
        # sti; mov dx, PORT_ACT; out dx, al; inc dx; out 0x80, al; inc dx
        code = STI + b"\xba\x10\x05\xee\x42" + WINDOW + b"\x42"

        def arm(port: int, size_bytes: int, value: int | None) -> None:
            message(pc, VECTOR)
            events = pc.vcpus[0].get_vcpu_events()
            events.flags = KVM_VCPUEVENT_VALID_SHADOW
            events.interrupt.shadow = bits
            pc.vcpus[0].set_vcpu_events(events)

        pc.enable_lapic()
        equal(pc.run_image(STACK + code + LEAVE, {PORT_ACT: arm}), EXIT_CODE, "exit code")
        equal(counted(pc.vm) - PORT_ACT, instructions, "instructions before the interrupt")


# HLT and MP states.


@case("HLT with IF=0 sleeps in the kernel, the MP state is HALTED (api.rst 4.38).")
def hlt_is_halted(bench: Bench) -> None:
    with bench.pc() as pc:
        run_until_halted(pc, CLI + HLT + LEAVE)


@case("KVM_SET_MP_STATE to RUNNABLE ends a HLT: the guest goes on behind it (api.rst 4.39).")
def set_mp_state_ends_hlt(bench: Bench) -> None:
    with bench.pc() as pc:
        run_until_halted(pc, CLI + HLT + LEAVE)
        pc.vcpus[0].set_mp_state(KVM_MP_STATE_RUNNABLE)
        equal(pc.vcpus[0].get_mp_state(), KVM_MP_STATE_RUNNABLE, "MP state")
        finish(pc)


@case("An interrupt does not end a HLT with IF=0 (SDM vol. 2, HLT; kvm_vcpu_has_events).")
def interrupt_leaves_hlt_with_if_0(bench: Bench) -> None:
    with bench.pc() as pc:
        run_until_halted(pc, CLI + HLT + LEAVE)
        pc.enable_lapic()
        equal(pc.vm.signal_msi(MSI_ADDRESS, VECTOR), 1, "KVM_SIGNAL_MSI")
        pc.vm.run(limit_s=HALT_LIMIT_S)
        equal(pc.vcpus[0].get_mp_state(), KVM_MP_STATE_HALTED, "MP state")


@case("An interrupt that TPR holds back does not end a HLT (kvm_vcpu_has_events: PPR).")
def held_back_interrupt_leaves_hlt(bench: Bench) -> None:
    with bench.pc() as pc:
        run_until_halted(pc, STI + HLT + LEAVE)
        pc.set_lapic({0xF0: 0x1FF, 0x80: 0x50})
        equal(pc.vm.signal_msi(MSI_ADDRESS, VECTOR), 1, "KVM_SIGNAL_MSI")
        pc.vm.run(limit_s=HALT_LIMIT_S)
        equal(pc.vcpus[0].get_mp_state(), KVM_MP_STATE_HALTED, "MP state")


@case("A vCPU that user space halts sleeps until an interrupt comes (api.rst 4.39).")
def halted_by_user_space(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(TDCR, DIVIDE_BY_1), lapic_write(LVTT, VECTOR)),
            *(sti(), lapic_write(TMICT, 20_000_000), out8(PORT_ACT, 0), snap_vector(VECTOR, 0)),
            acts=[lambda: pc.vcpus[0].set_mp_state(KVM_MP_STATE_HALTED)],
        )
        equal(got.results[0], 1, "interrupts of the timer, right after it was halted")


@case("After creation the vCPU that boots is runnable, the others wait for INIT (api.rst 4.38).")
def mp_states_after_creation(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        got = [vcpu.get_mp_state() for vcpu in pc.vcpus]
        equal(got, [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED], "MP states")


@case("KVM_SET_BOOT_CPU_ID says which vCPU boots (api.rst 4.41).")
def boot_cpu_id(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.create_irqchip()
        vm.set_boot_cpu_id(1)
        got = [vm.create_vcpu(vcpu_id).get_mp_state() for vcpu_id in (0, 1)]
        equal(got, [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_RUNNABLE], "MP states")


@case("Without an irqchip in the kernel every vCPU is runnable (api.rst 4.38).")
def mp_states_without_irqchip(bench: Bench) -> None:
    with bench.vm() as vm:
        got = [vm.create_vcpu(vcpu_id).get_mp_state() for vcpu_id in (0, 1)]
        equal(got, [KVM_MP_STATE_RUNNABLE] * 2, "MP states")


@variants(
    "KVM_SET_MP_STATE {0} takes {1} and no other state (kvm_arch_vcpu_ioctl_set_mpstate).",
    {
        "with-irqchip": ("with an irqchip", "0 to 4 and 9", True, [0, 1, 2, 3, 4, 9]),
        "without-irqchip": ("without an irqchip", "0", False, [0]),
    },
)
def settable_mp_states(
    bench: Bench, how: str, which: str, irqchip: bool, settable: list[int]
) -> None:
    with bench.vm() as vm:
        if irqchip:
            vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        got = [state for state in range(12) if errno_of(vcpu.set_mp_state, state) == 0]
        equal(got, settable, "states that were taken")


# INIT and SIPI. What a vCPU does when it starts lies at the SIPI's page.

STORE_CS = b"\x8c\xc8\xa3" + COUNT_AT.to_bytes(2, "little")
"""mov ax, cs; mov [COUNT_AT], ax"""
INIT, SIPI = 0x4500, 0x4600
TO_VCPU_1 = 1 << 24
NEVER = 0xEE
"""A vector that nobody sends."""


@variants(
    "After INIT and SIPI a vCPU starts at the SIPI's page {0:#x}: CS is {0:#x}00 (SDM 10.4.4.1; "
    "kvm_apic_accept_events).",
    {"3": (3,), "5": (5,)},
)
def sipi_starts_at(bench: Bench, page: int) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.vm.write_memory(page << 12, STORE_CS + LEAVE)
        pc.run(*ON, sends(INIT, TO_VCPU_1), sends(SIPI | page, TO_VCPU_1), wait_vector(NEVER, 1))
        equal(counted(pc.vm), page << 8, "CS of vCPU 1")


@case("A vCPU that was sent no SIPI does not start, although it got INIT (SDM 10.4.4).")
def init_alone_starts_nothing(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.run(*ON, sends(INIT, TO_VCPU_1), *WINDOWS)
        equal(pc.vcpus[1].get_mp_state(), KVM_MP_STATE_INIT_RECEIVED, "MP state of vCPU 1")


@case("A SIPI without INIT is ignored (SDM 10.4.4; kvm_apic_accept_events: INIT_RECEIVED only).")
def sipi_without_init(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.vm.write_memory(0x3000, STORE_CS + CLI + HLT)
        pc.run(*ON, sends(SIPI | 3, TO_VCPU_1), *WINDOWS)
        equal(pc.vcpus[1].get_mp_state(), KVM_MP_STATE_UNINITIALIZED, "MP state of vCPU 1")


@case("INIT throws away a SIPI that was not taken yet (__apic_accept_irq: INIT alone is pending).")
def init_forgets_a_sipi(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        for sent in (INIT, SIPI | 3, INIT):
            pc.vm.signal_msi(MSI_ADDRESS | 1 << 12, sent)
        equal(pc.vcpus[1].get_mp_state(), KVM_MP_STATE_INIT_RECEIVED, "MP state of vCPU 1")


@case("A SIPI to a vCPU that runs is ignored (SDM 12.6.1, start-up).")
def sipi_to_one_that_runs(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.write_memory(0x3000, b"\xb0\x01\xe6\xf4")
        pc.run(*ON, sends(SIPI | 3), *WINDOWS)
        equal(pc.vcpus[0].get_mp_state(), KVM_MP_STATE_RUNNABLE, "MP state")


@case("INIT stops a vCPU that runs: it waits for SIPI (SDM 12.6.1; kvm_apic_accept_events).")
def init_stops_one_that_runs(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        # mov dx, PORT_ACT; out dx, al; cli; hlt
        pc.vm.write_memory(0x3000, b"\xba\x10\x05\xee" + CLI + HLT)
        pc.run(
            *(*ON, sends(INIT, TO_VCPU_1), sends(SIPI | 3, TO_VCPU_1), wait_vector(VECTOR, 1)),
            *(sends(INIT, TO_VCPU_1), *WINDOWS),
            acts=[lambda: message(pc, VECTOR)],
        )
        equal(pc.vcpus[1].get_mp_state(), KVM_MP_STATE_INIT_RECEIVED, "MP state of vCPU 1")


@case(
    "KVM_SET_MP_STATE to SIPI_RECEIVED starts a vCPU at the vector of KVM_SET_VCPU_EVENTS "
    "(api.rst 4.32, 4.39)."
)
def sipi_by_set_mp_state(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        vcpu = pc.vcpus[1]
        vcpu.set_vcpu_events(kvm_vcpu_events(flags=KVM_VCPUEVENT_VALID_SIPI_VECTOR, sipi_vector=3))
        vcpu.set_mp_state(KVM_MP_STATE_SIPI_RECEIVED)
        equal(vcpu.get_mp_state(), KVM_MP_STATE_RUNNABLE, "MP state")
        pc.vm.write_memory(0x3000, STORE_CS + LEAVE)
        pc.run(wait_vector(NEVER, 1))
        equal(counted(pc.vm), 0x300, "CS of vCPU 1")


# KVM_INTERRUPT, and what else there is without an irqchip in the kernel.


@contextmanager
def bare(bench: Bench, code: bytes) -> Iterator[tuple[Vm[Vcpu], Vcpu]]:
    """A VM without irqchip, its vCPU at real-mode code."""
    with bench.vm() as vm:
        vcpu = vm.create_vcpu(0)
        vm.load(image(STACK + code))
        yield vm, vcpu


def io(port: int, value: int = 0) -> Exit:
    """The exit of a byte written to a port."""
    return ExitIo(port, 1, 1, True, bytes((value,)))


@case("Without an irqchip HLT is an exit (api.rst, KVM_EXIT_HLT).")
def hlt_exits(bench: Bench) -> None:
    with bare(bench, HLT) as (_, vcpu):
        equal(vcpu.run(LIMIT_S), ExitHlt(), "exit")


@variants(
    "Without an irqchip the ports of {0} are user space's (api.rst, KVM_EXIT_IO).",
    {
        "pic-master": ("the master PIC", 0x20),
        "pic-slave": ("the slave PIC", 0xA0),
        "pit": ("the PIT", 0x43),
    },
)
def ports_exit(bench: Bench, what: str, port: int) -> None:
    # mov al, 0x11; out port, al
    with bare(bench, b"\xb0\x11\xe6" + bytes((port,))) as (_, vcpu):
        equal(vcpu.run(LIMIT_S), io(port, 0x11), "exit")


@case("Without an irqchip there is no local APIC to read or set: EINVAL (api.rst 4.57).")
def no_lapic_without_irqchip(bench: Bench) -> None:
    with bare(bench, HLT) as (_, vcpu):
        equal(errno_of(vcpu.get_lapic), "EINVAL", "error of KVM_GET_LAPIC")


INTERRUPTED = b"\xb0\x09\xe6\x91"
"""mov al, 9; out 0x91, al: what the handler does."""


@variants(
    "KVM_INTERRUPT injects at the next KVM_RUN with IF={0}: nobody looks at IF (api.rst 4.16).",
    {"if-1": (1, STI), "if-0": (0, CLI)},
)
def interrupt_is_injected_with(bench: Bench, flag: int, set_if: bytes) -> None:
    with bare(bench, set_if + WINDOW + WINDOW) as (vm, vcpu):
        handler(vm, 0x40, INTERRUPTED)
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        vcpu.interrupt(0x40)
        equal(vcpu.run(LIMIT_S), io(0x91, 9), "exit after KVM_INTERRUPT")


@case(
    "A second KVM_INTERRUPT before the vCPU ran takes the place of the first (kvm_queue_interrupt)."
)
def second_interrupt_replaces(bench: Bench) -> None:
    with bare(bench, STI + WINDOW + WINDOW) as (vm, vcpu):
        handler(vm, 0x41, INTERRUPTED)
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        vcpu.interrupt(0x40)
        vcpu.interrupt(0x41)
        equal(vcpu.run(LIMIT_S), io(0x91, 9), "exit after KVM_INTERRUPT")


@case("KVM_INTERRUPT ends a HLT (api.rst 4.16, KVM_EXIT_HLT).")
def interrupt_after_hlt(bench: Bench) -> None:
    with bare(bench, STI + HLT) as (vm, vcpu):
        handler(vm, 0x40, INTERRUPTED)
        equal(vcpu.run(LIMIT_S), ExitHlt(), "exit")
        vcpu.interrupt(0x40)
        equal(vcpu.run(LIMIT_S), io(0x91, 9), "exit after KVM_INTERRUPT")


@variants(
    "kvm_run tells IF in if_flag, and in ready_for_interrupt_injection whether one may go in: {0} "
    "(api.rst, struct kvm_run).",
    {"if-1": (1, STI + b"\x90"), "if-0": (0, CLI)},
)
def kvm_run_tells_if(bench: Bench, flag: int, set_if: bytes) -> None:
    with bare(bench, set_if + WINDOW) as (_, vcpu):
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        area = vcpu.area
        equal((area.if_flag, area.ready_for_interrupt_injection), (flag, flag), "if_flag, ready")


@case(
    "With an interrupt queued kvm_run is not ready for another (kvm_run.ready_for_interrupt_"
    "injection; kvm_vcpu_ready_for_interrupt_injection)."
)
def kvm_run_is_not_ready_twice(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        vcpu = vm.create_vcpu(0)
        vm.load(image(STACK + CLI + WINDOW + WINDOW))
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        vcpu.interrupt(0x40)
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        equal(vcpu.area.ready_for_interrupt_injection, 0, "ready_for_interrupt_injection")


@case("A window that user space asks for is an exit as soon as IF=1 (KVM_EXIT_IRQ_WINDOW_OPEN).")
def window_is_told(bench: Bench) -> None:
    with bare(bench, CLI + WINDOW + STI + b"\x90" * 4 + WINDOW + b"\xeb\xfe") as (_, vcpu):
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        vcpu.area.request_interrupt_window = 1
        exits = [vcpu.run(LIMIT_S)]
        if exits[0] == io(0x80):
            exits.append(vcpu.run(LIMIT_S))
        check(exits[-1] == ExitIrqWindowOpen(), "exits", "a window", exits)


@case("KVM_NMI works without an irqchip (api.rst 4.64).")
def nmi_without_irqchip(bench: Bench) -> None:
    with bare(bench, CLI + WINDOW + WINDOW) as (vm, vcpu):
        handler(vm, VECTOR_NMI, INTERRUPTED)
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        vcpu.nmi()
        equal(vcpu.run(LIMIT_S), io(0x91, 9), "exit after KVM_NMI")


@case("Without an irqchip the local APIC's page is user space's (KVM_EXIT_MMIO).")
def lapic_page_exits(bench: Bench) -> None:
    # mov dword [0xfee00080], 0
    with bare(bench, b"\x67\x66\xc7\x05\x80\x00\xe0\xfe" + bytes(4)) as (_, vcpu):
        sregs = vcpu.get_sregs()
        sregs.ds.limit, sregs.ds.g = 0xFFFF_FFFF, 1
        vcpu.set_sregs(sregs)
        equal(vcpu.run(LIMIT_S), ExitMmio(0xFEE0_0080, 4, True, bytes(4)), "exit")


@variants(
    "KVM_INTERRUPT of {0} gives {1} (api.rst 4.16; kvm_vcpu_ioctl_interrupt).",
    {
        "255": (255, 0, False),
        "256": (256, "EINVAL", False),
        "with-irqchip": (0x40, "ENXIO", True),
        "256-with-irqchip": (256, "EINVAL", True),
    },
)
def interrupt_error(bench: Bench, irq: int, expected: object, irqchip: bool) -> None:
    with bench.vm() as vm:
        if irqchip:
            vm.create_irqchip()
        vcpu = vm.create_vcpu(0)
        equal(errno_of(vcpu.interrupt, irq), expected, "error of KVM_INTERRUPT")


@case(
    "With a split irqchip a second KVM_INTERRUPT is refused while one waits: EEXIST "
    "(kvm_vcpu_ioctl_interrupt: pending_external_vector)."
)
def split_second_interrupt(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        vcpu = vm.create_vcpu(0)
        got = [errno_of(vcpu.interrupt, irq) for irq in (0x40, 0x41)]
        equal(got, [0, "EEXIST"], "errors of KVM_INTERRUPT")


@case(
    "With a split irqchip KVM_INTERRUPT is the PIC's INTR: it waits for IF=1 (kvm_cpu_has_extint)."
)
def split_interrupt_waits_for_if(bench: Bench) -> None:
    with bench.vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        vcpu = vm.create_vcpu(0)
        handler(vm, 0x40, INTERRUPTED)
        vm.load(image(STACK + CLI + WINDOW + WINDOW + STI + b"\x90" + WINDOW + WINDOW))
        equal(vcpu.run(LIMIT_S), io(0x80), "exit")
        vcpu.interrupt(0x40)
        equal(vcpu.run(LIMIT_S), io(0x80), "exit with IF=0")
        exits = [vcpu.run(LIMIT_S)]
        if exits[0] == io(0x80):
            exits.append(vcpu.run(LIMIT_S))
        check(exits[-1] == io(0x91, 9), "exits with IF=1", "the handler's", exits)


# KVM_SET_VCPU_EVENTS.


@case("An interrupt that KVM_SET_VCPU_EVENTS has as injected goes in, IF or not (api.rst 4.32).")
def injected_interrupt_goes_in(bench: Bench) -> None:
    with bench.pc() as pc:
        handler(pc.vm, 0x40, COUNT + IRET)
        pc.vm.load(image(STACK + CLI + WINDOW * 2 + LEAVE))
        events = pc.vcpus[0].get_vcpu_events()
        events.interrupt.injected, events.interrupt.nr = 1, 0x40
        pc.vcpus[0].set_vcpu_events(events)
        got = pc.vcpus[0].get_vcpu_events().interrupt
        equal((got.injected, got.nr), (1, 0x40), "injected and vector, read back")
        finish(pc)
        equal(counted(pc.vm), 1, "times the handler ran")


@case("An exception that KVM_SET_VCPU_EVENTS has as injected goes in (api.rst 4.32).")
def injected_exception_goes_in(bench: Bench) -> None:
    with bench.pc() as pc:
        handler(pc.vm, VECTOR_UD, COUNT + IRET)
        pc.vm.load(image(STACK + CLI + WINDOW * 2 + LEAVE))
        events = pc.vcpus[0].get_vcpu_events()
        events.exception.injected, events.exception.nr = 1, VECTOR_UD
        pc.vcpus[0].set_vcpu_events(events)
        finish(pc)
        equal(counted(pc.vm), 1, "times the handler ran")


@variants(
    "KVM_SET_VCPU_EVENTS with {0} gives EINVAL (api.rst 4.32; kvm_vcpu_ioctl_x86_set_vcpu_events).",
    {
        "flags-0x10": ("flags whose capability is off", 0x10, 0),
        "flags-0x40": ("unknown flags", 0x40, 0),
        "exception-40": ("exception 40", 0, 40),
        "exception-2": ("exception 2, which is an NMI", 0, 2),
    },
)
def refused_events(bench: Bench, what: str, flags: int, exception: int) -> None:
    with bench.pc() as pc:
        events = kvm_vcpu_events(flags=flags)
        events.exception.injected, events.exception.nr = int(exception != 0), exception
        got = errno_of(pc.vcpus[0].set_vcpu_events, events)
        equal(got, "EINVAL", "error of KVM_SET_VCPU_EVENTS")


@case(
    "A triple fault is an exit: here an exception in protected mode without an IDT (SDM 7.15, "
    "interrupt 8; KVM_EXIT_SHUTDOWN)."
)
def triple_fault_exits(bench: Bench) -> None:
    # lidt [0x7900], which is 0; mov eax, cr0; or al, 1; mov cr0, eax; ud2
    code = b"\x0f\x01\x1e\x00\x79\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\x0f\x0b"
    with bare(bench, code) as (_, vcpu):
        equal(vcpu.run(LIMIT_S), ExitShutdown(), "exit")
