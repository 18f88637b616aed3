"""How a VM's state is taken and put back (`Vm.save`, `Vm.load`), by KVM's calls alone.

Both go in the order that KVM asks for. KVM_GET_MP_STATE comes first, for it takes INIT and SIPI; an
access to user space that is under way is finished (api.rst, "The kvm_run structure"). A vCPU is put
back as CPUID, TSC rate, special and general registers, MSRs, local APIC (its base is set by then),
TSC deadline (LVTT's mode is), events and MP state; then the chips, for the IOAPIC sends to the
local APICs what it still owes, and last the PIT, whose counters start with KVM_SET_PIT2.

Nothing is done to the VM before a model of it has taken the whole state.

Not modelled: the state of the PC's devices outside KVM (UART, RTC, ACPI PM, 8042, fw_cfg, ATA),
which are as at power-on in the new VM; guests with a ROM or a disk, which `save` refuses.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SMM,
    kvm_clock_data,
    kvm_irqchip,
    kvm_vcpu_events,
)
from kvmtick.cpu.paging import PAGE_BYTES
from kvmtick.irqchip.apicdef import MSR_IA32_TSC_DEADLINE
from kvmtick.kvm.state import (
    RUN_BYTES,
    GuestState,
    IrqchipState,
    PitState,
    RamRun,
    StateError,
    VcpuState,
    VmState,
)
from kvmtick.vcpu.msr import FIXED_MTRRS, MSR_IA32_TSC, VARIABLE_MTRRS

if TYPE_CHECKING:
    from kvmtick.cpu.scripted import Program
    from kvmtick.kvm.api import Vcpu, Vm

__all__ = ["MSRS", "load", "save"]

MSRS: Final = (
    MSR_IA32_TSC,
    0x3B,  # IA32_TSC_ADJUST
    *(0x174, 0x175, 0x176),  # SYSENTER_CS, ESP, EIP
    0x1A0,  # IA32_MISC_ENABLE
    0x277,  # IA32_CR_PAT
    *VARIABLE_MTRRS,
    *FIXED_MTRRS,
    0x2FF,  # IA32_MTRR_DEF_TYPE
    *range(0xC000_0081, 0xC000_0085),  # STAR, LSTAR, CSTAR, FMASK
    0xC000_0102,  # KERNEL_GS_BASE
    0xC000_0103,  # TSC_AUX
    MSR_IA32_TSC_DEADLINE,
)
"""The MSRs that are moved; those of the special registers and the local APIC are there."""

_ZEROS: Final = bytes(PAGE_BYTES)


# Taking it.


def save(vm: "Vm[Any]") -> VmState:
    """`Vm.save`."""
    told, guest = vm.told, vm.guest
    if guest is not None and (guest.roms or guest.disk):
        raise StateError(
            f"the guest {guest.name!r} has a ROM or a disk, which are not moved: run it from its"
            " start in the new VM"
        )
    vcpus = tuple(_save_vcpu(vcpu, told.irqchip != "none") for vcpu in vm.vcpus)
    return VmState(
        backend=vm.backend,
        guest=None if guest is None else GuestState.of(guest),
        irqchip=told.irqchip,
        boot_cpu_id=told.boot_cpu_id,
        caps=tuple(told.caps),
        routing=None if told.routing is None else tuple(told.routing),
        clock_ns=vm.get_clock().clock,
        chips=_save_chips(vm) if told.irqchip == "kernel" else None,
        pit=None
        if told.pit_flags is None
        else PitState(told.pit_flags, told.reinject, vm.get_pit2()),
        vcpus=vcpus,
        ram_bytes=vm.ram_bytes,
        ram=tuple(RamRun.of(gpa, data) for gpa, data in _runs(vm)),
    )


def _save_vcpu(vcpu: "Vcpu", has_lapic: bool) -> VcpuState:
    _finish_access(vcpu)
    mp_state = vcpu.get_mp_state()
    return VcpuState(
        vcpu_id=vcpu.vcpu_id,
        mp_state=mp_state,
        tsc_khz=vcpu.get_tsc_khz(),
        cpuid=tuple(vcpu.get_cpuid2()),
        regs=vcpu.get_regs(),
        sregs=vcpu.get_sregs(),
        # One by one: where there is none of a number, KVM_GET_MSRS stops.
        msrs={i: value for index in MSRS for i, value in vcpu.get_msrs([index]).items()},
        lapic=vcpu.get_lapic() if has_lapic else None,
        events=vcpu.get_vcpu_events(),
    )


def _finish_access(vcpu: "Vcpu") -> None:
    if vcpu.area.exit_reason in (KVM_EXIT_IO, KVM_EXIT_MMIO):
        vcpu.kick()
        vcpu.run()


def _save_chips(vm: "Vm[Any]") -> IrqchipState:
    return IrqchipState(
        vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic,
        vm.get_irqchip(KVM_IRQCHIP_PIC_SLAVE).chip.pic,
        vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic,
    )


def _runs(vm: "Vm[Any]") -> Iterator[tuple[int, bytes]]:
    """Runs of pages that are not all zeros, up to RUN_BYTES long."""
    for chunk in range(0, vm.ram_bytes, RUN_BYTES):
        data = vm.read_memory(chunk, min(RUN_BYTES, vm.ram_bytes - chunk))
        begin: int | None = None
        for at in range(0, len(data) + 1, PAGE_BYTES):
            used = data[at : at + PAGE_BYTES] not in (_ZEROS, b"")
            if used and begin is None:
                begin = at
            elif not used and begin is not None:
                yield chunk + begin, data[begin:at]
                begin = None


# Putting it back.


def load(vm: "Vm[Any]", state: VmState) -> None:
    """`Vm.load` of a state."""
    if vm.told.irqchip != "none" or vm.told.caps or vm.vcpus:
        raise StateError(
            "this VM has an irqchip, a vCPU or a capability already; load into a new one"
        )
    if vm.ram_bytes < state.ram_bytes:
        raise StateError(
            f"this VM has {vm.ram_bytes} bytes of RAM, the state {state.ram_bytes};"
            f" make it with ram_bytes={state.ram_bytes}"
        )
    _rehearse(state)
    try:
        _put(vm, state)
    except KvmError as error:
        if error.errno in (errno.EBADF, errno.EIO):
            raise  # nothing of the state: the VM was closed, or is another process's
        raise StateError(f"this back end refuses the state ({error}); close the VM") from error


def _rehearse(state: VmState) -> None:
    """A VM of the model takes it, all but the RAM. StateError: it contradicts itself."""
    from kvmtick.cpu.scripted import ScriptedEngine
    from kvmtick.kvm.model import ModelVm

    with ModelVm(engine=lambda: ScriptedEngine(_nothing), ram_bytes=PAGE_BYTES) as vm:
        try:
            _put_machine(vm, state)
        except KvmError as error:
            raise StateError(f"the state contradicts itself ({error}); save the VM again") from None


def _nothing() -> "Program":
    """A guest that is never run."""
    yield from ()


def _put(vm: "Vm[Any]", state: VmState) -> None:
    for gpa, data in _runs(vm):
        vm.write_memory(gpa, bytes(len(data)))
    for run in state.ram:
        vm.write_memory(run.gpa, run.data())
    _put_machine(vm, state)
    if state.guest is not None:
        vm.adopt(state.guest.guest())


def _put_machine(vm: "Vm[Any]", state: VmState) -> None:
    _set_up(vm, state)
    vm.set_clock(kvm_clock_data(clock=state.clock_ns))
    vcpus = [vm.create_vcpu(vcpu.vcpu_id) for vcpu in state.vcpus]
    for vcpu, saved in zip(vcpus, state.vcpus, strict=True):
        _put_vcpu(vcpu, saved)
    if state.chips is not None:
        _put_chips(vm, state.chips)
    if state.pit is not None:
        vm.reinject_control(state.pit.reinject)
        vm.set_pit2(state.pit.state)


def _set_up(vm: "Vm[Any]", state: VmState) -> None:
    """What comes before the vCPUs."""
    vm.set_boot_cpu_id(state.boot_cpu_id)
    if state.irqchip == "kernel":
        vm.create_irqchip()
    for cap, args in state.caps:
        vm.enable_cap(cap, *args)
    if state.pit is not None:
        vm.create_pit2(state.pit.flags)
    if state.routing is not None:
        vm.set_gsi_routing(state.routing)


def _put_vcpu(vcpu: "Vcpu", saved: VcpuState) -> None:
    if saved.cpuid:
        vcpu.set_cpuid2(saved.cpuid)
    if vcpu.get_tsc_khz() != saved.tsc_khz:
        # Where the host has no other rate the guest's TSC goes on at the host's.
        with suppress(KvmError):
            vcpu.set_tsc_khz(saved.tsc_khz)
    vcpu.set_sregs(saved.sregs)
    vcpu.set_regs(saved.regs)
    _put_msrs(vcpu, (item for item in saved.msrs.items() if item[0] != MSR_IA32_TSC_DEADLINE))
    if saved.lapic is None:
        # KVM_RUN takes CR8 from there.
        vcpu.area.cr8 = saved.sregs.cr8
    else:
        vcpu.set_lapic(saved.lapic)
    _put_msrs(vcpu, (item for item in saved.msrs.items() if item[0] == MSR_IA32_TSC_DEADLINE))
    events = kvm_vcpu_events.from_buffer_copy(saved.events)
    events.flags = (
        KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM
    )
    vcpu.set_vcpu_events(events)
    vcpu.set_mp_state(saved.mp_state)


def _put_msrs(vcpu: "Vcpu", msrs: Iterable[tuple[int, int]]) -> None:
    for index, value in msrs:
        if not vcpu.set_msrs({index: value}) and value:
            why = f"vCPU {vcpu.vcpu_id} takes no {value:#x} in MSR {index:#x}"
            raise KvmError(errno.EINVAL, "KVM_SET_MSRS", why)


def _put_chips(vm: "Vm[Any]", chips: IrqchipState) -> None:
    for chip_id, pic in (
        (KVM_IRQCHIP_PIC_MASTER, chips.pic_master),
        (KVM_IRQCHIP_PIC_SLAVE, chips.pic_slave),
    ):
        chip = kvm_irqchip(chip_id=chip_id)
        chip.chip.pic = pic
        vm.set_irqchip(chip)
    chip = kvm_irqchip(chip_id=KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic = chips.ioapic
    vm.set_irqchip(chip)
