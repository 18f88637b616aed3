"""The local APIC: registers, modes, priorities, IPIs (SDM vol. 3A chapter 12; KVM's lapic.c).

Its timer is `timer`, its LVT0 as a watchdog `nmi_watchdog`. Where an interrupt in service matters,
IF is 0 and KVM_SET_LAPIC sets ISR: that looks the same on a host whose KVM writes EOI when it
injects.
"""

from kvmtick import guests
from kvmtick.abi.caps import KVM_CAP_X2APIC_API
from kvmtick.abi.structs import (
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
)
from kvmtick.conform.apics import ON, VECTOR, run_quadwords, sends, store
from kvmtick.conform.bench import (
    APIC_BASE,
    DFR,
    ENABLED,
    EOI,
    ESR,
    ICR,
    ICR_HIGH,
    ID,
    IRR,
    ISR,
    LDR,
    LVT0,
    LVT1,
    LVT_EXTINT,
    LVT_MASKED,
    LVTERR,
    LVTPC,
    LVTT,
    LVTTHMR,
    MSI_ADDRESS,
    MSR_APIC_BASE,
    PORT_ACT,
    PPR,
    SELF_IPI,
    SVR,
    TDCR,
    TMCCT,
    TMICT,
    TMR,
    TO_SELF,
    TPR,
    VERSION,
    WINDOWS,
    X2APIC_BASE,
    Bench,
    Pc,
    Script,
)
from kvmtick.conform.case import case, check, equal, variants
from kvmtick.guests.script import (
    LAPIC,
    VECTORS_AT,
    Op,
    apic_eoi_off,
    apic_eoi_on,
    cli,
    lapic_read,
    lapic_write,
    mmio_read,
    mmio_write,
    out8,
    rdmsr,
    snap_vector,
    sti,
    unreal,
    wait_vector,
    wrmsr,
    x2apic_write,
)

ONES = 0xFFFF_FFFF
ASSERT, LOGICAL = 0x4000, 1 << 11
LOWEST, NMI, INIT = 0x100, 0x400, 0x500
SELF, ALL, ALL_BUT_SELF = 0x4_0000, 0x8_0000, 0xC_0000
CLUSTER = 0x0FFF_FFFF
DISABLED = APIC_BASE & ~(1 << 11)
RESET = {
    ID: 0,
    VERSION: 0x5_0014,
    TPR: 0,
    PPR: 0,
    LDR: 0,
    DFR: ONES,
    SVR: 0xFF,
    ESR: 0,
    ICR: 0,
    ICR_HIGH: 0,
    LVTT: LVT_MASKED,
    LVTTHMR: LVT_MASKED,
    LVTPC: LVT_MASKED,
    LVT0: LVT_EXTINT,
    LVT1: LVT_MASKED,
    LVTERR: LVT_MASKED,
    TMICT: 0,
    TMCCT: 0,
    TDCR: 0,
}
LVTS = {"timer": LVTT, "thermal": LVTTHMR, "counter": LVTPC}
LVTS |= {"lint0": LVT0, "lint1": LVT1, "error": LVTERR}


def bit(vector: int) -> int:
    """A vector's bit in its 32-bit register."""
    return 1 << vector % 32


def each(pc: Pc) -> list[set[int]]:
    """What every vCPU has requested."""
    return [pc.irr(vcpu_id) for vcpu_id in range(len(pc.vcpus))]


def taken_by(*who: bool) -> list[set[int]]:
    """VECTOR, by those who shall have it."""
    return [{VECTOR} if it else set() for it in who]


# Registers.


@case("The registers after reset are those of SDM vol. 3A 12.4.7.1, LVT0 lets the PIC through.")
def registers_after_reset(bench: Bench) -> None:
    with bench.pc() as pc:
        reads = tuple(lapic_read(register, n) for n, register in enumerate(RESET))
        got = dict(zip(RESET, pc.run(unreal(), *reads).results, strict=False))
        equal(got, RESET, "registers by offset")


@case(
    "A vCPU that does not boot has the same registers after reset, but its own id and LVT0 masked "
    "(kvm_lapic_reset)."
)
def registers_of_another_vcpu(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        got = {register: pc.lapic(register, 1) for register in RESET}
        equal(got, RESET | {ID: 1 << 24, LVT0: LVT_MASKED}, "registers by offset")


@case(
    "The version register says version 0x14 and six LVT entries (SDM 12.4.8; kvm_apic_set_version)."
)
def version_is_read_only(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(unreal(), lapic_write(VERSION, 0), lapic_read(VERSION, 0))
        equal(got.results[0], 0x5_0014, "version after a write of 0")


@variants(
    "Of {0:#x} written to register {1:#x} {2:#x} is kept (SDM vol. 3A 12.4 to 12.6; "
    "kvm_lapic_reg_write).",
    {
        "tpr": (ONES, TPR, 0xFF),
        "ldr": (ONES, LDR, 0xFF00_0000),
        "dfr": (0, DFR, 0x0FFF_FFFF),
        "svr": (ONES, SVR, 0x3FF),
        "esr": (ONES, ESR, 0),
        "icr2": (ONES, ICR_HIGH, 0xFF00_0000),
        "tdcr": (ONES, TDCR, 0xB),
        "tmict": (0x1234_5678, TMICT, 0x1234_5678),
        "id": (ONES, ID, 0xFF00_0000),
        "lvt-timer": (ONES, LVTT, 0x7_10FF),
        "lvt-thermal": (ONES, LVTTHMR, 0x1_17FF),
        "lvt-counter": (ONES, LVTPC, 0x1_17FF),
        "lvt-lint0": (ONES, LVT0, 0x1_F7FF),
        "lvt-lint1": (ONES, LVT1, 0x1_F7FF),
        "lvt-error": (ONES, LVTERR, 0x1_10FF),
    },
)
def writable_bits_of(bench: Bench, written: int, register: int, kept: int) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, lapic_write(register, written), lapic_read(register, 0))
        equal(hex(got.results[0]), hex(kept), f"register {register:#x}")


@case(
    "Without CPUID the timer's LVT has no mode bits at all (kvm_lapic_reg_write, timer_mode_mask)."
)
def lvtt_without_cpuid_has_no_modes(bench: Bench) -> None:
    with bench.pc(cpuid=False) as pc:
        got = pc.run(*ON, lapic_write(LVTT, ONES), lapic_read(LVTT, 0))
        equal(hex(got.results[0]), hex(0x1_10FF), "LVTT")


@case("ARBPRI reads 0 whatever was stored there (SDM 12.6.2.4; __apic_read).")
def arbitration_priority_reads_0(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_lapic({0x90: 0x55})
        equal(pc.run(unreal(), lapic_read(0x90, 0)).results[0], 0, "ARBPRI")


READ_ONLY = (0x00, 0x10, 0x30, 0x40, 0x70, 0x90, 0xA0, 0xC0, 0x100, 0x170, 0x180, 0x1F0)
ABSENT = (0x200, 0x270, 0x290, 0x2E0, 0x2F0, 0x390, 0x3A0, 0x3D0, 0x3F0, 0x400, 0xFF0)


def leaves_all_as_it_was(bench: Bench, *script: Op | tuple[Op, ...]) -> None:
    """The script changes nothing in the local APIC."""
    with bench.pc() as pc:
        states: list[bytes] = []
        pc.run(
            *(*ON, out8(PORT_ACT, 0), *script, out8(PORT_ACT, 0)),
            acts=[lambda: states.append(bytes(pc.vcpus[0].get_lapic()))],
        )
        changed = [at for at in range(0x400) if states[0][at] != states[1][at]]
        equal([hex(at) for at in changed], [], "offsets of the page that changed")


@variants(
    "Writes of {0} bytes to registers that are read-only or absent do nothing (SDM table 12-1; "
    "kvm_lapic_reg_write).",
    {"1-byte": (1,), "2-bytes": (2,), "4-bytes": (4,)},
)
def unwritable_by(bench: Bench, size_bytes: int) -> None:
    writes = (mmio_write(LAPIC + at, ONES, size_bytes) for at in READ_ONLY + ABSENT)
    leaves_all_as_it_was(bench, *writes)


@variants(
    "A register takes 32 bits only: {0} bytes do nothing (SDM 12.4.1.2; apic_mmio_write).",
    {"1-byte": (1,), "2-bytes": (2,)},
)
def write_is_ignored_of(bench: Bench, size_bytes: int) -> None:
    writes = (mmio_write(LAPIC + at, 0x51, size_bytes) for at in (TPR, SVR, ICR, LVT0, TMICT))
    leaves_all_as_it_was(bench, *writes)


@case(
    "A write that is not at the start of a register does nothing (SDM 12.4.1.2; apic_mmio_write)."
)
def unaligned_write_is_ignored(bench: Bench) -> None:
    writes = (mmio_write(LAPIC + TPR + at, 0x5050_5050) for at in (1, 2, 3, 4, 8, 12, 15))
    leaves_all_as_it_was(bench, *writes)


@case("A write of 8 bytes does nothing (apic_mmio_write: 4 bytes only).")
def quadword_write_is_ignored(bench: Bench) -> None:
    with bench.pc() as pc:
        run_quadwords(pc, store(LAPIC + TPR))
        equal(pc.lapic(TPR), 0, "TPR")


@case("Bytes and words of a register can be read (kvm_lapic_reg_read: 1, 2 or 4 within 32 bits).")
def parts_of_a_register_can_be_read(bench: Bench) -> None:
    parts = (
        *((0x30, 4, 0x5_0014), (0x30, 2, 0x14), (0x32, 2, 5), (0x30, 1, 0x14), (0x31, 1, 0)),
        *((0x32, 1, 5), (0x33, 1, 0), (0xF0, 1, 0xFF), (0xF1, 1, 0), (0xE2, 2, 0xFFFF)),
        *((0x350, 2, 0x700), (0x351, 1, 7), (0x362, 1, 1)),
    )
    with bench.pc() as pc:
        reads = (mmio_read(LAPIC + at, n, size) for n, (at, size, _) in enumerate(parts))
        got = pc.run(unreal(), *reads).results[: len(parts)]
        equal(got, tuple(value for _, _, value in parts), f"reads of {parts}")


@variants(
    "Where there is neither RAM nor a chip {0} bytes read all ones (KVM_EXIT_MMIO; user space).",
    {"1-byte": (1,), "2-bytes": (2,), "4-bytes": (4,)},
)
def nobody_answers(bench: Bench, size_bytes: int) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), mmio_read(LAPIC + 0x1000, 0, size_bytes)),
            mmio_read(0xD000_0000, 1, size_bytes),
        )
        ones = (1 << 8 * size_bytes) - 1
        equal(got.results[:2], (ones, ones), "behind the page, at 0xd0000000")


@case(
    "All ones written to every register but ICR leave what the registers can hold, and a machine "
    "that runs (kvm_lapic_reg_write)."
)
def ones_everywhere(bench: Bench) -> None:
    held = {TPR: 0xFF, DFR: ONES, SVR: 0x3FF, LVTT: 0x7_10FF, LVT0: 0x1_F7FF, TDCR: 0xB, ESR: 0}
    with bench.pc() as pc:
        offsets = (at for at in range(0, 0x1000, 0x10) if at != ICR)
        pc.run(unreal(), *(lapic_write(at, ONES) for at in offsets))
        equal({at: pc.lapic(at) for at in held}, held, "registers by offset")


# IA32_APIC_BASE.


@case(
    "Globally disabled the page reads all ones and swallows writes; enabled again the registers "
    "are as they were (SDM 12.4.3; apic_mmio_read, LAPIC_MMIO_HOLE)."
)
def disabled_page_reads_ones(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), lapic_write(TPR, 0x20), wrmsr(MSR_APIC_BASE, DISABLED)),
            *(lapic_read(VERSION, 0), lapic_write(TPR, 0x50), rdmsr(MSR_APIC_BASE, 1)),
            *(wrmsr(MSR_APIC_BASE, APIC_BASE), lapic_read(VERSION, 3), lapic_read(TPR, 4)),
        )
        equal(
            tuple(map(hex, got.results[:5])),
            tuple(map(hex, (ONES, DISABLED, 0, 0x5_0014, 0x20))),
            "version, IA32_APIC_BASE (2), then version, TPR",
        )


@case("Enabling the local APIC again gives its id back (SDM 12.4.6; __kvm_apic_set_base).")
def enabling_gives_the_id_back(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.run(
            *(unreal(), lapic_write(ID, 5 << 24), wrmsr(MSR_APIC_BASE, DISABLED)),
            wrmsr(MSR_APIC_BASE, APIC_BASE),
        )
        equal(pc.lapic(ID), 0, "id of vCPU 0")


@case("The page answers where IA32_APIC_BASE says (SDM 12.4.5; apic_mmio_in_range).")
def base_address_moves_the_page(bench: Bench) -> None:
    moved = 0xFED0_0000
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), wrmsr(MSR_APIC_BASE, moved | 0x900), mmio_read(moved + VERSION, 0)),
            lapic_read(VERSION, 1),
        )
        equal(got.results[:2], (0x5_0014, ONES), "version at the new and the old address")


@variants(
    "A write of {0:#x} to IA32_APIC_BASE is refused with #GP: {1} (SDM 12.4.4, 12.12.1; "
    "kvm_apic_set_base).",
    {
        "bit-0": (APIC_BASE | 1, "a reserved bit"),
        "bit-9": (APIC_BASE | 1 << 9, "a reserved bit"),
        "bit-63": (APIC_BASE | 1 << 63, "beyond the physical address width"),
        "extd-alone": (DISABLED | 1 << 10, "x2APIC mode of a disabled APIC"),
    },
)
def apic_base_refuses(bench: Bench, value: int, why: str) -> None:
    with bench.pc() as pc:
        got = pc.run(unreal(), wrmsr(MSR_APIC_BASE, value), rdmsr(MSR_APIC_BASE, 0))
        equal((got.faults, got.results[0]), (1, APIC_BASE), "faults, IA32_APIC_BASE after it")


# The PIC's interrupt, and what stops it.

PIC_IRQ = 1
OPEN_PIC: Script = (out8(0x21, 0xFC),)
PIC_TAKEN_AT = guests.LOAD_AT + VECTORS_AT + 4 * PIC_IRQ
"""Where the guest counts the interrupts of that pin."""
LOOK = lapic_write(ICR, TO_SELF | 0x30)
"""No write of LVT0 makes KVM look for the PIC's interrupt again; another interrupt does."""


def pic_interrupts(bench: Bench, before: Script, then: Script = ()) -> tuple[int, int]:
    """How often a PIC pin's pulse was taken after `before`, and how often in all after `then`."""
    with bench.pc() as pc:
        got = pc.run(
            *(*OPEN_PIC, unreal(), *before, out8(PORT_ACT, 0), sti(), *WINDOWS, cli()),
            *(mmio_read(PIC_TAKEN_AT, 0), *then, sti(), *WINDOWS),
            acts=[lambda: pc.pulse(PIC_IRQ)],
        )
        return got.results[0], got.vectors[PIC_IRQ]


TAKEN = "PIC interrupts taken, before and after it was opened again"


@case(
    "After reset the PIC's interrupt comes through LVT0 in ExtINT mode, although the local APIC is "
    "software-disabled (SDM 12.4.7.1; kvm_lapic_reset, kvm_apic_accept_pic_intr)."
)
def pic_gets_through_after_reset(bench: Bench) -> None:
    equal(pic_interrupts(bench, ()), (1, 1), TAKEN)


@case(
    "Clearing SVR's bit 8 masks LVT0 and so stops the PIC; what waited comes with LVT0 restored "
    "(SDM 12.4.7.2; apic_set_spiv)."
)
def software_disable_stops_the_pic(bench: Bench) -> None:
    off = (lapic_write(SVR, ENABLED), lapic_write(SVR, 0xFF))
    on = (lapic_write(SVR, ENABLED), lapic_write(LVT0, LVT_EXTINT), LOOK)
    equal(pic_interrupts(bench, off, on), (0, 1), TAKEN)


@case("LVT0 written while software-disabled comes out masked: no PIC interrupt (SDM 12.4.7.2).")
def lvt0_written_while_disabled_stops_the_pic(bench: Bench) -> None:
    before = (lapic_write(SVR, 0xFF), lapic_write(LVT0, LVT_EXTINT))
    equal(pic_interrupts(bench, before), (0, 0), TAKEN)


@case("LVT0 masked stops the PIC until it is unmasked (SDM 12.5.1; kvm_apic_accept_pic_intr).")
def lvt0_masked_stops_the_pic(bench: Bench) -> None:
    before = (lapic_write(SVR, ENABLED), lapic_write(LVT0, LVT_EXTINT | LVT_MASKED))
    then = (lapic_write(LVT0, LVT_EXTINT), LOOK)
    equal(pic_interrupts(bench, before, then), (0, 1), TAKEN)


@variants(
    "LVT0 in {0} mode neither passes the PIC's interrupt on nor requests a vector: KVM's knows "
    "ExtINT and the watchdog only (kvm_apic_accept_pic_intr).",
    {"fixed": ("fixed", VECTOR), "nmi": ("NMI", NMI)},
)
def pic_and_lvt0_in_mode(bench: Bench, mode: str, lvt0: int) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*OPEN_PIC, *ON, lapic_write(LVT0, lvt0), out8(PORT_ACT, 0), sti(), *WINDOWS),
            acts=[lambda: pc.pulse(PIC_IRQ)],
        )
        equal(
            (got.vectors[PIC_IRQ], got.nmis, pc.irr()), (0, 0, set()), "PIC interrupts, NMIs, IRR"
        )


@variants(
    "Globally disabled the local APIC is not there: the PIC's interrupt passes with LVT0 {0} (SDM "
    "12.4.3; kvm_apic_accept_pic_intr).",
    {
        "extint": ("ExtINT", LVT_EXTINT),
        "masked": ("masked", LVT_EXTINT | LVT_MASKED),
        "fixed": ("fixed", VECTOR),
    },
)
def pic_passes_a_disabled_apic(bench: Bench, how: str, lvt0: int) -> None:
    off = (lapic_write(SVR, ENABLED), lapic_write(LVT0, lvt0), wrmsr(MSR_APIC_BASE, DISABLED))
    equal(pic_interrupts(bench, off), (1, 1), TAKEN)


# Software disable.


@variants(
    "Without SVR's bit 8 every LVT is masked, here the {0} LVT: one written then comes out masked, "
    "and clearing the bit masks it (SDM 12.4.7.2; apic_set_spiv).",
    {name: (name, register) for name, register in LVTS.items()},
)
def software_disable_masks(bench: Bench, name: str, register: int) -> None:
    value = LVT_EXTINT if name.startswith("lint") else 0x40
    with bench.pc() as pc:
        got = pc.run(
            *(unreal(), lapic_write(register, value), lapic_read(register, 0)),
            *(lapic_write(SVR, ENABLED), lapic_write(register, value), lapic_read(register, 1)),
            *(lapic_write(SVR, 0xFF), lapic_read(register, 2)),
        )
        equal(
            tuple(map(hex, got.results[:3])),
            tuple(map(hex, (value | LVT_MASKED, value, value | LVT_MASKED))),
            "LVT written while disabled, while enabled, and after disabling",
        )


@case("A software-disabled local APIC takes no fixed interrupt (SDM 12.4.7.2; __apic_accept_irq).")
def software_disabled_takes_no_interrupt(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_lapic({SVR: 0xFF})
        equal(pc.vm.signal_msi(MSI_ADDRESS, VECTOR), 0, "KVM_SIGNAL_MSI while disabled")
        equal(pc.irr(), set(), "IRR while disabled")
        pc.enable_lapic()
        equal(pc.vm.signal_msi(MSI_ADDRESS, VECTOR), 1, "KVM_SIGNAL_MSI once enabled")
        equal(pc.irr(), {VECTOR}, "IRR once enabled")


@case("A software-disabled local APIC takes NMIs (SDM 12.4.7.2).")
def software_disabled_takes_nmis(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.set_lapic({SVR: 0xFF})
        equal(pc.vm.signal_msi(MSI_ADDRESS, NMI), 1, "KVM_SIGNAL_MSI of an NMI")
        equal(pc.vcpus[0].get_vcpu_events().nmi.pending, 1, "pending NMIs")


@case("What was requested before a software disable stays requested (SDM 12.4.7.2).")
def requests_survive_a_software_disable(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(ICR, TO_SELF | VECTOR), lapic_write(SVR, 0xFF)),
            *(lapic_read(IRR + 0x20, 0), lapic_write(SVR, ENABLED), wait_vector(VECTOR, 1)),
        )
        equal((got.results[0], got.apic_vectors[VECTOR]), (bit(VECTOR), 1), "IRR, taken")


@case("A software-disabled local APIC still sends IPIs (SDM 12.4.7.2; kvm_apic_send_ipi).")
def software_disabled_sends(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        pc.run(unreal(), sends(ASSERT | VECTOR, 1 << 24))
        equal(each(pc), taken_by(False, True), "requests of both vCPUs")


# Priorities.


@case("TPR holds back requests of its class and below, not those above (SDM 12.8.3.1).")
def tpr_holds_back_its_class_and_below(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(TPR, 0x50), sti()),
            *(lapic_write(ICR, TO_SELF | 0x45), lapic_write(ICR, TO_SELF | 0x5F), *WINDOWS),
            *(lapic_read(IRR + 0x20, 0), lapic_write(ICR, TO_SELF | 0x60), *WINDOWS),
            *(snap_vector(0x45, 1), snap_vector(0x5F, 2), snap_vector(0x60, 3)),
        )
        equal(got.results[:4], (bit(0x45) | bit(0x5F), 0, 0, 1), "IRR; 0x45, 0x5f, 0x60 taken")


@case("Lowering TPR lets in what is now above it (SDM 12.8.3.1; apic_update_ppr).")
def lowering_tpr_lets_in(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(TPR, 0x50), sti()),
            *(lapic_write(ICR, TO_SELF | 0x45), lapic_write(ICR, TO_SELF | 0x5F), *WINDOWS),
            *(lapic_write(TPR, 0x4F), *WINDOWS, snap_vector(0x5F, 0), snap_vector(0x45, 1)),
            *(lapic_write(TPR, 0), *WINDOWS, snap_vector(0x45, 2)),
        )
        equal(got.results[:3], (1, 0, 1), "0x5f at TPR 0x4f, 0x45 then, 0x45 at TPR 0")


@case("With nothing in service PPR is TPR, all its bits (SDM 12.8.3.1).")
def ppr_is_tpr_when_idle(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, lapic_write(TPR, 0x53), lapic_read(PPR, 0))
        equal(got.results[0], 0x53, "PPR")


@case("PPR is the class of the highest vector in service; EOI ends that (SDM 12.8.3.1, 12.8.5).")
def ppr_follows_what_is_in_service(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, out8(PORT_ACT, 0), lapic_read(PPR, 0), lapic_write(EOI, 0)),
            *(lapic_read(PPR, 1), lapic_write(EOI, 0), lapic_read(PPR, 2)),
            acts=[lambda: pc.take_into_service(0x45, 0x55)],
        )
        equal(got.results[:3], (0x50, 0x40, 0), "PPR with 0x45 and 0x55, with 0x45, with none")


@case("EOI clears the highest ISR bit and no other (SDM 12.8.5; apic_set_eoi).")
def eoi_ends_the_highest(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, out8(PORT_ACT, 0), lapic_read(ISR + 0x20, 0), lapic_write(EOI, 0)),
            *(lapic_read(ISR + 0x20, 1), lapic_write(EOI, 0), lapic_read(ISR + 0x20, 2)),
            acts=[lambda: pc.take_into_service(0x45, 0x55)],
        )
        equal(got.results[:3], (bit(0x45) | bit(0x55), bit(0x45), 0), "ISR before, after 1, 2 EOIs")


@case("EOI with nothing in service does nothing (SDM 12.8.5; apic_set_eoi).")
def spurious_eoi_does_nothing(bench: Bench) -> None:
    leaves_all_as_it_was(bench, lapic_write(EOI, 0), lapic_write(EOI, 0xFFFF_FFFF))


@variants(
    "Where TPR {0:#x} meets 0x45 in service PPR is {1:#x}: the higher class, and TPR's low bits if "
    "its class is not lower (SDM 12.8.3.1).",
    {"equal": (0x43, 0x43), "above": (0x53, 0x53), "below": (0x33, 0x40)},
)
def ppr_of_tpr_and_isr(bench: Bench, tpr: int, ppr: int) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, out8(PORT_ACT, 0), lapic_write(TPR, tpr), lapic_read(PPR, 0)),
            acts=[lambda: pc.take_into_service(0x45)],
        )
        equal(hex(got.results[0]), hex(ppr), "PPR")


@case("A vector in service holds back its class until EOI, in or below (SDM 12.8.3.1).")
def in_service_holds_back_its_class(bench: Bench) -> None:
    bench.needs("in-service-after-injection")
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, apic_eoi_off(), sti(), lapic_write(ICR, TO_SELF | 0x51), *WINDOWS),
            *(lapic_write(ICR, TO_SELF | 0x45), lapic_write(ICR, TO_SELF | 0x5F), *WINDOWS),
            *(snap_vector(0x45, 0), snap_vector(0x5F, 1), lapic_write(EOI, 0), *WINDOWS),
            *(snap_vector(0x45, 2), snap_vector(0x5F, 3), lapic_write(EOI, 0), *WINDOWS),
            snap_vector(0x45, 4),
        )
        equal(got.results[:5], (0, 0, 0, 1, 1), "0x45, 0x5f in service 0x51; after 1; after 2 EOIs")


@case("A higher class interrupts a handler (SDM 12.8.3.1).")
def higher_class_nests(bench: Bench) -> None:
    bench.needs("in-service-after-injection")
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, apic_eoi_off(), sti(), lapic_write(ICR, TO_SELF | 0x51), *WINDOWS),
            *(lapic_write(ICR, TO_SELF | 0x61), *WINDOWS, snap_vector(0x61, 0)),
            *(lapic_read(ISR + 0x20, 1), lapic_read(ISR + 0x30, 2), lapic_read(PPR, 3)),
        )
        equal(got.results[:4], (1, bit(0x51), bit(0x61), 0x60), "0x61 taken, ISR (2), PPR")


@case("At the handler's entry the vector has gone from IRR to ISR (SDM 12.8.4).")
def acceptance_moves_irr_to_isr(bench: Bench) -> None:
    bench.needs("in-service-after-injection")
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, apic_eoi_off(), lapic_write(ICR, TO_SELF | VECTOR), lapic_read(IRR + 0x20, 0)),
            *(lapic_read(ISR + 0x20, 1), sti(), *WINDOWS, cli()),
            *(lapic_read(IRR + 0x20, 2), lapic_read(ISR + 0x20, 3)),
        )
        equal(got.results[:4], (bit(VECTOR), 0, 0, bit(VECTOR)), "IRR, ISR before; IRR, ISR after")


@case("One vector can be requested again while it is in service: IRR and ISR both (SDM 12.8.4).")
def one_request_besides_the_one_in_service(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, out8(PORT_ACT, 0), lapic_write(ICR, TO_SELF | VECTOR)),
            *(lapic_read(IRR + 0x20, 0), lapic_read(ISR + 0x20, 1)),
            acts=[lambda: pc.take_into_service(VECTOR)],
        )
        equal(got.results[:2], (bit(VECTOR), bit(VECTOR)), "IRR, ISR")


@case("The highest vector is taken first, whatever came first (SDM 12.8.3).")
def highest_vector_first(bench: Bench) -> None:
    vectors = (0x41, 0x93, 0x62)
    with bench.pc() as pc:
        # each handler's return is at a window, so one is taken a window
        got = pc.run(
            *(*ON, *(lapic_write(ICR, TO_SELF | vector) for vector in vectors)),
            *(lapic_write(TPR, 0x70), sti(), *WINDOWS, snap_vector(0x93, 0), snap_vector(0x62, 1)),
            *(lapic_write(TPR, 0x50), *WINDOWS, snap_vector(0x62, 2), snap_vector(0x41, 3)),
        )
        equal(got.results[:4], (1, 0, 1, 0), "0x93, 0x62 above 0x70; 0x62, 0x41 above 0x50")


@variants(
    "TMR follows the last message of a vector: {0} (SDM 12.8.4; __apic_accept_irq).",
    {"level": ("level sets its bit", 0x8000, 0), "edge": ("edge clears it", 0, 1)},
)
def tmr_after(bench: Bench, does: str, data: int, before: int) -> None:
    with bench.pc() as pc:
        pc.set_lapic({SVR: ENABLED, TMR + 0x20: bit(VECTOR) * before})
        pc.vm.signal_msi(MSI_ADDRESS, data | VECTOR)
        equal(pc.vectors(TMR), {VECTOR} if data else set(), "TMR")


# IPIs.


@case("A self IPI requests its vector at once and is taken (SDM 12.6.1, shorthand 01).")
def self_ipi(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(ICR, TO_SELF | VECTOR), lapic_read(IRR + 0x20, 0)),
            wait_vector(VECTOR, 1),
        )
        equal((got.results[0], got.apic_vectors[VECTOR]), (bit(VECTOR), 1), "IRR, taken")


@case(
    "A new vCPU is reached by no id before the map of ids is made anew, as by any change of an id "
    "or an enable bit (kvm_recalculate_apic_map: a vCPU is reset before it is in the list)."
)
def new_vcpu_is_not_mapped_yet(bench: Bench) -> None:
    with bench.pc() as pc:
        before = pc.vm.signal_msi(MSI_ADDRESS, NMI)
        pc.set_lapic({})
        equal((before, pc.vm.signal_msi(MSI_ADDRESS, NMI)), (0, 1), "taken, before and after")


@variants(
    "Shorthand {0} reaches {1} (SDM 12.6.1, bits 18-19; kvm_apic_match_dest).",
    {
        "self": (1, "the sender alone", SELF, (True, False, False)),
        "all": (2, "all", ALL, (True, True, True)),
        "all-but-self": (3, "all others", ALL_BUT_SELF, (False, True, True)),
    },
)
def shorthand(bench: Bench, code: int, whom: str, icr: int, who: tuple[bool, ...]) -> None:
    with bench.pc(vcpus=3) as pc:
        for vcpu_id in (1, 2):
            pc.enable_lapic(vcpu_id)
        pc.run(*ON, lapic_write(ICR, ASSERT | icr | VECTOR))
        equal(each(pc), taken_by(*who), "requests of three vCPUs")


@variants(
    "Physical destination {0:#x} reaches {1} (SDM 12.6.2.1).",
    {
        "self": (0, "the sender", (True, False)),
        "other": (1, "vCPU 1", (False, True)),
        "nobody": (5, "nobody", (False, False)),
        "broadcast": (0xFF, "all", (True, True)),
    },
)
def physical_destination(bench: Bench, dest: int, whom: str, who: tuple[bool, ...]) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        pc.run(*ON, sends(ASSERT | VECTOR, dest << 24))
        equal(each(pc), taken_by(*who), "requests of both vCPUs")


@case("The guest may change its id, and is then reached by the new one (SDM 12.4.6; xAPIC).")
def changed_id_is_what_counts(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.run(*ON, lapic_write(ID, 9 << 24))
        equal(
            (
                pc.vm.signal_msi(MSI_ADDRESS, VECTOR),
                pc.vm.signal_msi(MSI_ADDRESS | 9 << 12, VECTOR),
            ),
            (0, 1),
            "messages taken, to 0 and to 9",
        )


def logical(bench: Bench, dfr: int, ldrs: tuple[int, ...], dest: int) -> list[set[int]]:
    """Whom a logical destination reaches; all have `dfr`, and the logical ids `ldrs`."""
    with bench.pc(vcpus=len(ldrs)) as pc:
        for vcpu_id, ldr in enumerate(ldrs):
            pc.set_lapic({SVR: ENABLED, DFR: dfr, LDR: ldr << 24}, vcpu_id)
        pc.run(unreal(), sends(ASSERT | LOGICAL | VECTOR, dest << 24))
        return each(pc)


@variants(
    "In the flat model destination {0:#x} reaches whose LDR, 1, 2 and 0x80, shares a bit with it "
    "(SDM 12.6.2.2.1).",
    {
        "one": (0x02, (False, True, False)),
        "two": (0x81, (True, False, True)),
        "none": (0x10, (False, False, False)),
        "all": (0xFF, (True, True, True)),
    },
)
def flat_destination(bench: Bench, dest: int, who: tuple[bool, ...]) -> None:
    equal(logical(bench, ONES, (0x01, 0x02, 0x80), dest), taken_by(*who), "requests of all")


@variants(
    "In the cluster model destination {0:#x} reaches the members its low bits name of the cluster "
    "in its high bits; they are 0x11, 0x12 and 0x21 (SDM 12.6.2.2.2).",
    {
        "one": (0x12, (False, True, False)),
        "two": (0x13, (True, True, False)),
        "other-cluster": (0x21, (False, False, True)),
        "none": (0x31, (False, False, False)),
        "all": (0xFF, (True, True, True)),
    },
)
def cluster_destination(bench: Bench, dest: int, who: tuple[bool, ...]) -> None:
    equal(logical(bench, CLUSTER, (0x11, 0x12, 0x21), dest), taken_by(*who), "requests of all")


@variants(
    "A logical id of several bits is reached by each of them: {0:#x} reaches {1} of 0x03 and 0x04 "
    "(SDM 12.6.2.2.1; kvm_apic_match_logical_addr).",
    {
        "first": (0x02, "the first", (True, False)),
        "second": (0x04, "the second", (False, True)),
        "none": (0x08, "none", (False, False)),
    },
)
def logical_id_of_several_bits(bench: Bench, dest: int, whom: str, who: tuple[bool, ...]) -> None:
    equal(logical(bench, ONES, (0x03, 0x04), dest), taken_by(*who), "requests of both vCPUs")


@variants(
    "Each local APIC reads a logical destination by its own DFR: {0:#x} for 0x10 in the flat and "
    "0x11 in the cluster model (kvm_apic_match_logical_addr).",
    {
        "both": (0x11, (True, True)),
        "other-member": (0x12, (True, False)),
        "other-cluster": (0x21, (False, False)),
    },
)
def logical_models_may_differ(bench: Bench, dest: int, who: tuple[bool, ...]) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.set_lapic({SVR: ENABLED, DFR: ONES, LDR: 0x10 << 24}, 0)
        pc.set_lapic({SVR: ENABLED, DFR: CLUSTER, LDR: 0x11 << 24}, 1)
        pc.run(unreal(), sends(ASSERT | LOGICAL | VECTOR, dest << 24))
        equal(each(pc), taken_by(*who), "requests of the flat one and the cluster's")


@case("A lowest-priority IPI for several is taken by one (SDM 12.6.2.4; vector hashing).")
def lowest_priority_reaches_one(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        for vcpu_id in (0, 1):
            pc.set_lapic({SVR: ENABLED, LDR: 1 << 24 + vcpu_id}, vcpu_id)
        pc.run(unreal(), sends(ASSERT | LOGICAL | LOWEST | VECTOR, 3 << 24))
        got = each(pc)
        check(sorted(map(len, got)) == [0, 1], "requests of both vCPUs", "one of them", got)


@case("Lowest priority does not choose a software-disabled local APIC (kvm_irq_delivery_to_apic).")
def lowest_priority_skips_the_disabled(bench: Bench) -> None:
    for vector in (VECTOR, VECTOR + 1):
        with bench.pc(vcpus=2) as pc:
            pc.set_lapic({SVR: ENABLED, LDR: 1 << 24}, 0)
            pc.set_lapic({LDR: 2 << 24}, 1)
            pc.run(unreal(), sends(ASSERT | LOGICAL | LOWEST | vector, 0xFF << 24))
            equal(each(pc), [{vector}, set()], "requests of both vCPUs")


@variants(
    "An IPI of delivery mode {0} to vCPU 1: {1} (SDM 12.6.1, bits 8-10; __apic_accept_irq).",
    {
        "fixed": (0, "the vector is requested", {VECTOR}, 0, KVM_MP_STATE_UNINITIALIZED),
        "lowest-priority": (1, "the vector is requested", {VECTOR}, 0, KVM_MP_STATE_UNINITIALIZED),
        "smi": (2, "no interrupt, no NMI", set(), 0, KVM_MP_STATE_UNINITIALIZED),
        "nmi": (4, "an NMI is pending", set(), 1, KVM_MP_STATE_UNINITIALIZED),
        "init": (5, "it waits for SIPI", set(), 0, KVM_MP_STATE_INIT_RECEIVED),
        "extint": (7, "nothing", set(), 0, KVM_MP_STATE_UNINITIALIZED),
    },
)
def ipi_of_mode(
    bench: Bench, mode: int, does: str, requests: set[int], nmis: int, mp_state: int
) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        pc.run(*ON, sends(ASSERT | mode << 8 | VECTOR, 1 << 24))
        vcpu = pc.vcpus[1]
        equal(pc.irr(1), requests, "IRR")
        equal(vcpu.get_vcpu_events().nmi.pending, nmis, "pending NMIs")
        equal(vcpu.get_mp_state(), mp_state, "MP state")


@variants(
    "An NMI IPI {0} comes with IF=0 (SDM 12.6.1; 7.7).",
    {"by-shorthand": ("by shorthand", ASSERT | SELF | NMI), "by-id": ("by id", ASSERT | NMI)},
)
def nmi_ipi_to_itself(bench: Bench, how: str, icr: int) -> None:
    with bench.pc() as pc:
        equal(pc.run(*ON, lapic_write(ICR, icr), *WINDOWS).nmis, 1, "NMIs taken")


@case("INIT level de-assert is ignored (SDM 12.6.1, bit 14: not on these processors).")
def init_deassert_is_ignored(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.run(*ON, sends(0x8000 | INIT, 1 << 24))
        equal(pc.vcpus[1].get_mp_state(), KVM_MP_STATE_UNINITIALIZED, "MP state")


@case("An IPI to nobody is lost without a trace in ESR: KVM has no bus errors (SDM 12.5.3).")
def ipi_to_nobody_is_lost(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, sends(ASSERT | VECTOR, 5 << 24), lapic_write(ESR, 0), lapic_read(ESR, 0)),
            lapic_read(ICR, 1),
        )
        equal(got.results[:2], (0, ASSERT | VECTOR), "ESR, ICR")


@case("No delivery mode does anything to nobody, physical or logical (kvm_irq_delivery_to_apic).")
def ipis_to_nobody_do_nothing(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        icrs = (mode << 8 | how | VECTOR for mode in range(8) for how in (0, LOGICAL))
        got = pc.run(*ON, sti(), *(sends(ASSERT | icr, 5 << 24) for icr in icrs), *WINDOWS)
        equal((got.nmis, each(pc)), (0, [set(), set()]), "NMIs, requests of both vCPUs")
        equal(pc.vcpus[1].get_mp_state(), KVM_MP_STATE_UNINITIALIZED, "MP state of vCPU 1")


@case("ICR reads back as written but for delivery status, which is never busy (SDM 12.6.1).")
def icr_is_never_busy(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, lapic_write(ICR, TO_SELF | 0x1000 | VECTOR), lapic_read(ICR, 0))
        equal(hex(got.results[0]), hex(TO_SELF | VECTOR), "ICR")


@case("Writing ICR's high half sends nothing (SDM 12.6.1: the low half does).")
def icr_high_sends_nothing(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.run(
            *(*ON, lapic_write(ICR, TO_SELF | VECTOR), wait_vector(VECTOR, 1), cli()),
            lapic_write(ICR_HIGH, 0),
        )
        equal(pc.irr(), set(), "IRR")


@variants(
    "Vector {0} is illegal; KVM requests it, never delivers it and sets no bit of ESR (SDM 12.5.2, "
    "12.8.4; apic_find_highest_irr, __apic_update_ppr).",
    {"0": (0,), "2": (2,), "15": (15,)},
)
def illegal_vector(bench: Bench, vector: int) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, sti(), lapic_write(ICR, TO_SELF | vector), *WINDOWS),
            *(lapic_write(ESR, 0), lapic_read(ESR, 0)),
        )
        # a vector that the guest does not expect ends the run
        equal((got.results[0], got.nmis), (0, 0), "ESR, NMIs")
        equal(pc.irr(), {vector}, "IRR")


@case("Interrupts wait in IRR while IF is 0 (SDM 7.8.1; 12.8.4).")
def requests_wait_for_if(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(ICR, TO_SELF | VECTOR), *WINDOWS, snap_vector(VECTOR, 0)),
            *(sti(), *WINDOWS, snap_vector(VECTOR, 1)),
        )
        equal(got.results[:2], (0, 1), "taken with IF=0, with IF=1")


# x2APIC.

X2APIC: Script = (
    *(unreal(), wrmsr(MSR_APIC_BASE, X2APIC_BASE), apic_eoi_on(x2apic=True)),
    x2apic_write(SVR, ENABLED),
)


def msr(register: int) -> int:
    """The MSR of a register, named by its xAPIC offset."""
    return 0x800 + register // 16


def to_x2apic(pc: Pc) -> None:
    """Every vCPU in x2APIC mode and enabled, from outside."""
    for vcpu in pc.vcpus:
        base = X2APIC_BASE if vcpu.vcpu_id == 0 else X2APIC_BASE & ~0x100
        equal(vcpu.set_msrs({MSR_APIC_BASE: base}), 1, "MSRs set")
        pc.enable_lapic(vcpu.vcpu_id)


@case("In x2APIC mode the id is the vCPU's 32-bit one (SDM 12.12.5.1; kvm_apic_set_x2apic_id).")
def x2apic_id(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        to_x2apic(pc)
        got = [vcpu.get_msrs([0x802]) for vcpu in pc.vcpus]
        equal(got, [{0x802: 0}, {0x802: 1}], "IA32_X2APIC_APICID")


@case("In x2APIC mode LDR is made of the id: cluster and member (SDM 12.12.10.2).")
def x2apic_ldr(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        to_x2apic(pc)
        got = [vcpu.get_msrs([0x80D]) for vcpu in pc.vcpus]
        equal(got, [{0x80D: 1}, {0x80D: 2}], "IA32_X2APIC_LDR")


@variants(
    "An x2APIC logical destination names a cluster and its members: {0:#x} (SDM 12.12.10.2).",
    {
        "members": (0x6, (False, True, True)),
        "other-cluster": (0x1_0006, (False, False, False)),
    },
)
def x2apic_cluster_destination(bench: Bench, dest: int, who: tuple[bool, ...]) -> None:
    with bench.pc(vcpus=3) as pc:
        to_x2apic(pc)
        pc.run(unreal(), wrmsr(msr(ICR), dest << 32 | ASSERT | LOGICAL | VECTOR))
        equal(each(pc), taken_by(*who), "requests of three vCPUs")


@variants(
    "Beside an xAPIC, too, an x2APIC looks at the cluster of a logical destination: {0:#x} "
    "(SDM 12.12.10.2; kvm_apic_match_logical_addr).",
    {"own-cluster": (0x1, (True, False)), "other-cluster": (0x1_0001, (False, False))},
)
def x2apic_beside_an_xapic(bench: Bench, dest: int, who: tuple[bool, ...]) -> None:
    with bench.pc(vcpus=2) as pc:
        equal(pc.vcpus[0].set_msrs({MSR_APIC_BASE: X2APIC_BASE}), 1, "MSRs set")
        pc.enable_lapic(0)
        pc.set_lapic({SVR: ENABLED, DFR: ONES, LDR: 0x02 << 24}, 1)
        pc.run(unreal(), wrmsr(msr(ICR), dest << 32 | ASSERT | LOGICAL | VECTOR))
        equal(each(pc), taken_by(*who), "requests of the x2APIC and the xAPIC")


@case("In x2APIC mode 0xffffffff is the broadcast destination (SDM 12.12.9).")
def x2apic_broadcast(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        to_x2apic(pc)
        pc.run(unreal(), wrmsr(msr(ICR), ONES << 32 | ASSERT | VECTOR))
        equal(each(pc), taken_by(True, True), "requests of both vCPUs")


@variants(
    "A message to 0xff reaches x2APICs {0} KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: {1} "
    "(api.rst 7.7; kvm_apic_broadcast).",
    {
        "with-quirk": ("without", "as a broadcast", 0, True),
        "without-quirk": ("with", "as id 255, which nobody has", 1, False),
    },
)
def x2apic_message_to_0xff(bench: Bench, how: str, what: str, quirk_off: int, taken: bool) -> None:
    with bench.pc(vcpus=2) as pc:
        if quirk_off:
            pc.vm.enable_cap(KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)
        to_x2apic(pc)
        pc.vm.signal_msi(MSI_ADDRESS | 0xFF << 12, VECTOR)
        equal(each(pc), taken_by(taken, taken), "requests of both vCPUs")


@case("SELF_IPI requests its vector, in x2APIC mode only (SDM 12.12.11).")
def x2apic_self_ipi(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*X2APIC, wrmsr(msr(SELF_IPI), VECTOR), rdmsr(msr(IRR) + 2, 0)),
            wait_vector(VECTOR, 1),
        )
        equal((got.results[0], got.apic_vectors[VECTOR]), (bit(VECTOR), 1), "IRR, taken")


@case("Interrupts end by MSR 0x80b: handlers that write it are called again (SDM 12.12.1.2).")
def x2apic_eoi(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*X2APIC, out8(PORT_ACT, 0), rdmsr(msr(ISR) + 2, 0), wrmsr(msr(EOI), 0)),
            *(rdmsr(msr(ISR) + 2, 2), wrmsr(msr(EOI), 0), rdmsr(msr(ISR) + 2, 4)),
            acts=[lambda: pc.take_into_service(0x45, 0x55)],
        )
        equal(got.results[0:5:2], (bit(0x45) | bit(0x55), bit(0x45), 0), "ISR before, after 1, 2")


@case("ICR is one MSR of 64 bits; there is none for its high half (SDM 12.12.9).")
def x2apic_icr_is_one_register(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.enable_lapic(1)
        got = pc.run(
            *(*X2APIC, wrmsr(msr(ICR), 1 << 32 | ASSERT | VECTOR), rdmsr(msr(ICR), 0)),
            rdmsr(msr(ICR_HIGH), 2),
        )
        equal(got.results[:2], (ASSERT | VECTOR, 1), "ICR, low and high")
        equal(got.faults, 1, "faults, of the high half's MSR")
        equal(pc.irr(1), {VECTOR}, "requests of vCPU 1")


@case("In x2APIC mode the page reads all ones and swallows writes (SDM 12.12.2; LAPIC_MMIO_HOLE).")
def x2apic_page_is_a_hole(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*X2APIC, lapic_read(VERSION, 0), lapic_write(TPR, 0x50), rdmsr(msr(TPR), 1)),
        )
        equal(got.results[:2], (ONES, 0), "version by MMIO, TPR by MSR")


@case("Without its CPUID bit x2APIC mode is refused and its MSRs fault (SDM 12.12.1).")
def x2apic_without_cpuid(bench: Bench) -> None:
    with bench.pc(cpuid=False) as pc:
        got = pc.run(
            *(unreal(), wrmsr(MSR_APIC_BASE, X2APIC_BASE), rdmsr(MSR_APIC_BASE, 0)),
            rdmsr(0x802, 2),
        )
        equal((got.results[0], got.faults), (APIC_BASE, 2), "IA32_APIC_BASE, faults")


@case("In xAPIC mode the x2APIC's MSRs fault (SDM 12.12.1.2).")
def x2apic_msrs_in_xapic_mode(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(*ON, rdmsr(0x802, 0), wrmsr(msr(EOI), 0), wrmsr(msr(SELF_IPI), VECTOR))
        equal(got.faults, 3, "faults")


@variants(
    "From x2APIC mode {0}: {1} (SDM 12.12.5, figure 12-27; kvm_apic_set_base).",
    {
        "to-xapic": ("to xAPIC mode", "#GP", (APIC_BASE,), 1),
        "to-disabled": ("to disabled", "allowed", (DISABLED,), 0),
        "to-disabled-and-back": (
            "to disabled and back",
            "#GP, only xAPIC mode comes after disabled",
            (DISABLED, X2APIC_BASE),
            1,
        ),
        "to-disabled-and-xapic": (
            "to disabled and to xAPIC mode",
            "allowed",
            (DISABLED, APIC_BASE),
            0,
        ),
        "to-extd-alone": ("to extended but disabled", "#GP", (DISABLED | 0x400,), 1),
        "to-itself": ("to itself", "allowed", (X2APIC_BASE,), 0),
    },
)
def x2apic_change(bench: Bench, how: str, what: str, bases: tuple[int, ...], faults: int) -> None:
    with bench.pc() as pc:
        got = pc.run(*X2APIC, *(wrmsr(MSR_APIC_BASE, base) for base in bases))
        equal(got.faults, faults, "faults")


@variants(
    "{0}: {1} (SDM table 12-6; kvm_x2apic_msr_read, kvm_x2apic_msr_write).",
    {
        "eoi-read": ("Reading EOI", "#GP", rdmsr(msr(EOI), 0), 1),
        "eoi-write-1": ("EOI takes 1: KVM does not look", "no fault", wrmsr(msr(EOI), 1), 0),
        "eoi-high-half": ("A high half of EOI", "#GP", wrmsr(msr(EOI), 1 << 32), 1),
        "dfr-read": ("There is no DFR to read", "#GP", rdmsr(msr(DFR), 0), 1),
        "dfr-write": ("There is no DFR to write", "#GP", wrmsr(msr(DFR), 0), 1),
        "self-ipi-read": ("Reading SELF_IPI", "#GP", rdmsr(msr(SELF_IPI), 0), 1),
        "self-ipi-0x100": ("Bit 8 of SELF_IPI", "#GP", wrmsr(msr(SELF_IPI), 0x100), 1),
        "esr-write-0": ("ESR takes 0", "no fault", wrmsr(msr(ESR), 0), 0),
        "esr-write-1": ("ESR takes no 1", "#GP", wrmsr(msr(ESR), 1), 1),
        "id-write": ("The id is read-only", "#GP", wrmsr(0x802, 0), 1),
        "version-write": ("The version is read-only", "#GP", wrmsr(0x803, 0), 1),
        "ldr-write": ("LDR is read-only", "#GP", wrmsr(0x80D, 0), 1),
        "isr-write": ("ISR is read-only", "#GP", wrmsr(msr(ISR), 0), 1),
        "tmcct-write": ("The current count is read-only", "#GP", wrmsr(msr(TMCCT), 0), 1),
        "tpr-high-half": ("A high half of TPR", "#GP", wrmsr(msr(TPR), 1 << 32), 1),
        "lvt0-write": ("LVT0 takes ExtINT", "no fault", wrmsr(msr(LVT0), LVT_EXTINT), 0),
        "icr-reserved": ("Bit 13 of ICR", "#GP", wrmsr(msr(ICR), TO_SELF | 1 << 13), 1),
        "0x801-read": ("There is no 0x801", "#GP", rdmsr(0x801, 0), 1),
        "0x804-read": ("There is no 0x804", "#GP", rdmsr(0x804, 0), 1),
        "0x8ff-read": ("There is no 0x8ff", "#GP", rdmsr(0x8FF, 0), 1),
        "0x8ff-write": ("There is no 0x8ff to write", "#GP", wrmsr(0x8FF, 0), 1),
    },
)
def x2apic_msr(bench: Bench, what: str, does: str, access: Script, faults: int) -> None:
    with bench.pc() as pc:
        equal(pc.run(*X2APIC, *access).faults, faults, "faults")


@case(
    "All ones fault in every x2APIC MSR that is read-only, absent or has reserved bits (SDM 12-6)."
)
def x2apic_ones_fault(bench: Bench) -> None:
    msrs = (0x801, 0x804, 0x808, 0x809, 0x80E, 0x810, 0x82F, 0x830, 0x831, 0x83F, 0x840, 0x8FF)
    with bench.pc() as pc:
        got = pc.run(*X2APIC, *(wrmsr(index, (1 << 64) - 1) for index in msrs))
        equal(got.faults, len(msrs), f"faults of {[hex(index) for index in msrs]}")


@case("TPR holds interrupts back in x2APIC mode, too (SDM 12.8.3.1, 12.12.1.2).")
def x2apic_tpr(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*X2APIC, x2apic_write(TPR, 0x50), wrmsr(msr(SELF_IPI), VECTOR), sti(), *WINDOWS),
            *(snap_vector(VECTOR, 0), rdmsr(msr(PPR), 1), x2apic_write(TPR, 0), *WINDOWS),
            snap_vector(VECTOR, 3),
        )
        equal((got.results[0], got.results[1], got.results[3]), (0, 0x50, 1), "taken, PPR, taken")


@variants(
    "KVM_GET_LAPIC has the id of an x2APIC {0} KVM_X2APIC_API_USE_32BIT_IDS {1} (api.rst 4.57).",
    {
        "without-32-bit-ids": ("without", "in bits 24 to 31", 0, 1 << 24),
        "with-32-bit-ids": ("with", "as it is", KVM_X2APIC_API_USE_32BIT_IDS, 1),
    },
)
def x2apic_id_in_get_lapic(bench: Bench, how: str, what: str, flags: int, expected: int) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.vm.enable_cap(KVM_CAP_X2APIC_API, flags)
        to_x2apic(pc)
        equal(hex(pc.lapic(ID, 1)), hex(expected), "id register of vCPU 1")


@case("All registers but id, LDR and ICR are kept on the way to x2APIC mode (SDM 12.12.5.1).")
def registers_survive_the_way_to_x2apic(bench: Bench) -> None:
    with bench.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(TPR, 0x30), lapic_write(LVTERR, 0x77), lapic_write(TDCR, 0xB)),
            *(wrmsr(MSR_APIC_BASE, X2APIC_BASE), rdmsr(msr(TPR), 0), rdmsr(msr(LVTERR), 2)),
            *(rdmsr(msr(TDCR), 4), rdmsr(msr(SVR), 6)),
        )
        equal(got.results[0:8:2], (0x30, 0x77, 0xB, ENABLED), "TPR, LVTERR, TDCR, SVR")


# INIT.


@case("INIT resets the local APIC but for its id and base (SDM 12.4.7.3; kvm_lapic_reset).")
def init_resets_the_registers(bench: Bench) -> None:
    with bench.pc(vcpus=2) as pc:
        pc.set_lapic(
            {SVR: ENABLED, TPR: 0x30, LVTERR: 0x77, ID: 9 << 24, IRR + 0x20: 1, ISR + 0x20: 2}, 1
        )
        pc.run(*ON, sends(ASSERT | INIT, 9 << 24), *WINDOWS)
        pc.vcpus[1].get_mp_state()
        got = {at: pc.lapic(at, 1) for at in (SVR, TPR, LVTERR, ID, IRR + 0x20, ISR + 0x20)}
        want = {SVR: 0xFF, TPR: 0, LVTERR: LVT_MASKED, ID: 9 << 24, IRR + 0x20: 0, ISR + 0x20: 0}
        equal(got, want, "registers by offset")
