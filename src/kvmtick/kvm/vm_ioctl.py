"""The ioctls of a model's VM (kvm_vm_ioctl, kvm_arch_vm_ioctl; api.rst, "VM ioctls").

Each handler does what the kernel's function of its name does, in the kernel's order: what can fail
while the argument is copied in, what the VM's state forbids, what is wrong in the argument.

Not modelled: of KVM_ENABLE_CAP all but KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API and
KVM_CAP_X86_APIC_BUS_CYCLES_NS. KVM_SET_TSS_ADDR and KVM_SET_IDENTITY_MAP_ADDR are for CPUs
that cannot run real mode: checked, and nothing more.
"""

import errno
from collections.abc import Callable
from ctypes import c_int32, sizeof
from typing import TYPE_CHECKING, Final

from kvmtick.abi import ioctls
from kvmtick.abi.caps import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
)
from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_NR_IRQCHIPS,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST,
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST,
    kvm_clock_data,
    kvm_enable_cap,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_msi,
    kvm_pic_state,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_reinject_control,
    kvm_u64,
    kvm_userspace_memory_region,
)
from kvmtick.irqchip.delivery import SuppressEoiBroadcast
from kvmtick.irqchip.i8254 import Pit
from kvmtick.irqchip.i8259 import Pic, PicState
from kvmtick.irqchip.ioapic import Ioapic
from kvmtick.irqchip.routing import KVM_MAX_IRQ_ROUTES, USERSPACE_IRQ_SOURCE_ID
from kvmtick.kvm import dev_ioctl
from kvmtick.kvm.api import Arg
from kvmtick.kvm.model_file import Handler
from kvmtick.kvm.user_memory import (
    as_number,
    copy_from_user,
    copy_to_user,
    get_struct,
    memdup_struct,
    put_struct,
)
from kvmtick.machine.board import Board

if TYPE_CHECKING:
    from kvmtick.kvm.model import ModelVm

__all__ = ["VM_IOCTLS"]

MAX_RESERVED_IOAPIC_PINS: Final = KVM_MAX_IRQ_ROUTES
MAX_APIC_BUS_CYCLE_NS: Final = ((1 << 64) - 1) // (0xFFFF_FFFF * 128)
"""The longest count, divided by the most, has to fit into 64 bits of ns."""
MAX_TSS_ADDR: Final = (1 << 32) - 3 * 4096

_U32 = 0xFFFF_FFFF


# The VM.


def _check_extension(vm: "ModelVm", arg: Arg) -> int:
    """`kvm_vm_ioctl_check_extension_generic`."""
    cap = as_number(arg)
    value = dev_ioctl.check_extension(cap)
    if cap == KVM_CAP_X2APIC_API and not vm.machine.board.delivery.split:
        value &= ~KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST
    return value


def _create_vcpu(vm: "ModelVm", arg: Arg) -> int:
    return vm.create_vcpu(as_number(arg)).hand_out()


def _set_boot_cpu_id(vm: "ModelVm", arg: Arg) -> int:
    vcpu_id, board = as_number(arg), vm.machine.board
    if board.vcpus:
        raise KvmError(errno.EBUSY, "KVM_SET_BOOT_CPU_ID")
    if vcpu_id > dev_ioctl.KVM_MAX_VCPU_IDS:
        raise KvmError(errno.EINVAL, "KVM_SET_BOOT_CPU_ID")
    board.bsp_vcpu_id = vcpu_id
    return 0


def _set_tss_addr(vm: "ModelVm", arg: Arg) -> int:
    if as_number(arg) > MAX_TSS_ADDR:
        raise KvmError(errno.EINVAL, "KVM_SET_TSS_ADDR")
    return 0


def _set_identity_map_addr(vm: "ModelVm", arg: Arg) -> int:
    if vm.machine.board.vcpus:
        raise KvmError(errno.EINVAL, "KVM_SET_IDENTITY_MAP_ADDR")
    get_struct(arg, kvm_u64)
    return 0


def _set_user_memory_region(vm: "ModelVm", arg: Arg) -> int:
    region = get_struct(arg, kvm_userspace_memory_region)
    vm.machine.memory.set_slot(
        region.slot,
        region.flags,
        region.guest_phys_addr,
        region.memory_size,
        region.userspace_addr,
    )
    return 0


def _enable_cap(vm: "ModelVm", arg: Arg) -> int:
    """`kvm_vm_ioctl_enable_cap`."""
    cap = get_struct(arg, kvm_enable_cap)
    enable = _ENABLERS.get(cap.cap)
    if cap.flags or enable is None:
        raise KvmError(errno.EINVAL, "KVM_ENABLE_CAP")
    failure = enable(vm.machine.board, cap.args[0])
    if failure:
        raise KvmError(failure, "KVM_ENABLE_CAP")
    return 0


def _enable_split_irqchip(board: Board, reserved_pins: int) -> int:
    if reserved_pins > MAX_RESERVED_IOAPIC_PINS:
        return errno.EINVAL
    if board.irqchip_in_kernel or board.vcpus:
        return errno.EEXIST
    board.split_irqchip(reserved_pins)
    return 0


def _enable_x2apic_api(board: Board, flags: int) -> int:
    delivery, suppress = board.delivery, dev_ioctl.SUPPRESS_EOI_BROADCAST
    wants_split = flags & KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST and not delivery.split
    if flags & ~dev_ioctl.X2APIC_API_VALID or flags & suppress == suppress or wants_split:
        return errno.EINVAL
    if flags & KVM_X2APIC_API_USE_32BIT_IDS:
        delivery.x2apic_format = True
    if flags & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK:
        delivery.x2apic_broadcast_quirk_disabled = True
    if flags & KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST:
        delivery.suppress_eoi_broadcast = SuppressEoiBroadcast.ENABLED
    if flags & KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST:
        delivery.suppress_eoi_broadcast = SuppressEoiBroadcast.DISABLED
    return 0


def _set_apic_bus_cycle(board: Board, cycle_ns: int) -> int:
    if not 0 < cycle_ns <= MAX_APIC_BUS_CYCLE_NS:
        return errno.EINVAL
    if not board.irqchip_in_kernel:
        return errno.ENXIO
    if board.vcpus:
        return errno.EINVAL
    board.delivery.apic_bus_cycle_ns = cycle_ns
    return 0


_ENABLERS: Final[dict[int, Callable[[Board, int], int]]] = {
    KVM_CAP_SPLIT_IRQCHIP: _enable_split_irqchip,
    KVM_CAP_X2APIC_API: _enable_x2apic_api,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS: _set_apic_bus_cycle,
}


# The irqchip.


def _create_irqchip(vm: "ModelVm", arg: Arg) -> int:
    board = vm.machine.board
    if board.irqchip_in_kernel:
        raise KvmError(errno.EEXIST, "KVM_CREATE_IRQCHIP")
    if board.vcpus:
        raise KvmError(errno.EINVAL, "KVM_CREATE_IRQCHIP")
    board.create_irqchip()
    return 0


def _get_irqchip(vm: "ModelVm", arg: Arg) -> int:
    chip = memdup_struct(arg, kvm_irqchip)
    pic, ioapic = _chips(vm, "KVM_GET_IRQCHIP")
    if chip.chip_id >= KVM_NR_IRQCHIPS:
        raise KvmError(errno.EINVAL, "KVM_GET_IRQCHIP")
    if chip.chip_id == KVM_IRQCHIP_IOAPIC:
        chip.chip.ioapic = ioapic.save()
    else:
        chip.chip.pic = kvm_pic_state.from_buffer_copy(_pic_of(pic, chip.chip_id).save())
    put_struct(arg, chip)
    return 0


def _set_irqchip(vm: "ModelVm", arg: Arg) -> int:
    chip = get_struct(arg, kvm_irqchip)
    pic, ioapic = _chips(vm, "KVM_SET_IRQCHIP")
    if chip.chip_id == KVM_IRQCHIP_IOAPIC:
        ioapic.restore(chip.chip.ioapic)
    elif chip.chip_id < KVM_NR_IRQCHIPS:
        _pic_of(pic, chip.chip_id).restore(bytes(chip.chip.pic))
    # The kernel does so whatever the chip is, even one that there is not.
    pic.update_irq()
    if chip.chip_id >= KVM_NR_IRQCHIPS:
        raise KvmError(errno.EINVAL, "KVM_SET_IRQCHIP")
    return 0


def _chips(vm: "ModelVm", call: str) -> tuple[Pic, Ioapic]:
    """The PICs and the IOAPIC."""
    board = vm.machine.board
    if board.pic is None or board.ioapic is None:
        raise KvmError(errno.ENXIO, call)
    return board.pic, board.ioapic


def _pic_of(pic: Pic, chip_id: int) -> PicState:
    return pic.slave if chip_id == KVM_IRQCHIP_PIC_SLAVE else pic.master


def _irq_line(vm: "ModelVm", arg: Arg) -> int:
    _set_line(vm, "KVM_IRQ_LINE", get_struct(arg, kvm_irq_level), line_status=False)
    return 0


def _irq_line_status(vm: "ModelVm", arg: Arg) -> int:
    line = get_struct(arg, kvm_irq_level)
    status = _set_line(vm, "KVM_IRQ_LINE_STATUS", line, line_status=True)
    copy_to_user(arg, 0, (status & _U32).to_bytes(4, "little"))
    return 0


def _set_line(vm: "ModelVm", call: str, line: kvm_irq_level, line_status: bool) -> int:
    """`kvm_vm_ioctl_irq_line`."""
    board = vm.machine.board
    if not board.irqchip_in_kernel:
        raise KvmError(errno.ENXIO, call)
    level = int(line.level != 0)
    return board.routing.set_irq(USERSPACE_IRQ_SOURCE_ID, line.irq, level, line_status)


def _set_gsi_routing(vm: "ModelVm", arg: Arg) -> int:
    head, routing = get_struct(arg, kvm_irq_routing), vm.machine.board.routing
    if not routing.in_kernel or head.nr > KVM_MAX_IRQ_ROUTES or head.flags:
        raise KvmError(errno.EINVAL, "KVM_SET_GSI_ROUTING")
    data = copy_from_user(arg, sizeof(head), head.nr * sizeof(kvm_irq_routing_entry))
    routing.set_table(list((kvm_irq_routing_entry * head.nr).from_buffer_copy(data)))
    return 0


def _signal_msi(vm: "ModelVm", arg: Arg) -> int:
    msi, board = get_struct(arg, kvm_msi), vm.machine.board
    return board.routing.signal_msi(msi)


def _irqfd(vm: "ModelVm", arg: Arg) -> int:
    given = get_struct(arg, kvm_irqfd)
    fd, resamplefd = c_int32(given.fd).value, c_int32(given.resamplefd).value
    vm.machine.board.irqfds.set(fd, given.gsi, given.flags, resamplefd)
    vm.machine.wake_sleepers()
    return 0


def _ioeventfd(vm: "ModelVm", arg: Arg) -> int:
    given = get_struct(arg, kvm_ioeventfd)
    ioeventfds = vm.machine.board.ioeventfds
    ioeventfds.set(given.addr, given.len, given.fd, given.flags, given.datamatch)
    return 0


# The PIT.


def _create_pit(vm: "ModelVm", arg: Arg) -> int:
    return _make_pit(vm, "KVM_CREATE_PIT", KVM_PIT_SPEAKER_DUMMY)


def _create_pit2(vm: "ModelVm", arg: Arg) -> int:
    return _make_pit(vm, "KVM_CREATE_PIT2", get_struct(arg, kvm_pit_config).flags)


def _make_pit(vm: "ModelVm", call: str, flags: int) -> int:
    board = vm.machine.board
    if board.pit is not None:
        raise KvmError(errno.EEXIST, call)
    if board.pic is None:
        raise KvmError(errno.ENOENT, call)
    board.create_pit(flags)
    return 0


def _get_pit(vm: "ModelVm", arg: Arg) -> int:
    get_struct(arg, kvm_pit_state)
    put_struct(arg, _pit(vm, "KVM_GET_PIT").get_state())
    return 0


def _set_pit(vm: "ModelVm", arg: Arg) -> int:
    state = get_struct(arg, kvm_pit_state)
    _pit(vm, "KVM_SET_PIT").set_state(state)
    return 0


def _get_pit2(vm: "ModelVm", arg: Arg) -> int:
    put_struct(arg, _pit(vm, "KVM_GET_PIT2").get_state2())
    return 0


def _set_pit2(vm: "ModelVm", arg: Arg) -> int:
    state = get_struct(arg, kvm_pit_state2)
    _pit(vm, "KVM_SET_PIT2").set_state2(state)
    return 0


def _reinject_control(vm: "ModelVm", arg: Arg) -> int:
    control = get_struct(arg, kvm_reinject_control)
    _pit(vm, "KVM_REINJECT_CONTROL").set_reinject(control.pit_reinject != 0)
    return 0


def _pit(vm: "ModelVm", call: str) -> Pit:
    pit = vm.machine.board.pit
    if pit is None:
        raise KvmError(errno.ENXIO, call)
    return pit


# Time.


def _get_clock(vm: "ModelVm", arg: Arg) -> int:
    put_struct(arg, vm.kvmclock.get(vm.machine.board.vcpus))
    return 0


def _set_clock(vm: "ModelVm", arg: Arg) -> int:
    vm.kvmclock.set(get_struct(arg, kvm_clock_data))
    return 0


def _get_tsc_khz(vm: "ModelVm", arg: Arg) -> int:
    return vm.default_tsc_khz


def _set_tsc_khz(vm: "ModelVm", arg: Arg) -> int:
    if vm.machine.board.vcpus:
        raise KvmError(errno.EINVAL, "KVM_SET_TSC_KHZ")
    vm.default_tsc_khz = as_number(arg) & _U32 or vm.host_tsc_khz
    return 0


VM_IOCTLS: Final[dict[int, Handler]] = {
    ioctls.KVM_CHECK_EXTENSION: _check_extension,
    ioctls.KVM_CREATE_VCPU: _create_vcpu,
    ioctls.KVM_SET_BOOT_CPU_ID: _set_boot_cpu_id,
    ioctls.KVM_SET_USER_MEMORY_REGION: _set_user_memory_region,
    ioctls.KVM_SET_TSS_ADDR: _set_tss_addr,
    ioctls.KVM_SET_IDENTITY_MAP_ADDR: _set_identity_map_addr,
    ioctls.KVM_ENABLE_CAP: _enable_cap,
    ioctls.KVM_CREATE_IRQCHIP: _create_irqchip,
    ioctls.KVM_GET_IRQCHIP: _get_irqchip,
    ioctls.KVM_SET_IRQCHIP: _set_irqchip,
    ioctls.KVM_IRQ_LINE: _irq_line,
    ioctls.KVM_IRQ_LINE_STATUS: _irq_line_status,
    ioctls.KVM_SET_GSI_ROUTING: _set_gsi_routing,
    ioctls.KVM_SIGNAL_MSI: _signal_msi,
    ioctls.KVM_IRQFD: _irqfd,
    ioctls.KVM_IOEVENTFD: _ioeventfd,
    ioctls.KVM_CREATE_PIT: _create_pit,
    ioctls.KVM_CREATE_PIT2: _create_pit2,
    ioctls.KVM_GET_PIT: _get_pit,
    ioctls.KVM_SET_PIT: _set_pit,
    ioctls.KVM_GET_PIT2: _get_pit2,
    ioctls.KVM_SET_PIT2: _set_pit2,
    ioctls.KVM_REINJECT_CONTROL: _reinject_control,
    ioctls.KVM_GET_CLOCK: _get_clock,
    ioctls.KVM_SET_CLOCK: _set_clock,
    ioctls.KVM_GET_TSC_KHZ: _get_tsc_khz,
    ioctls.KVM_SET_TSC_KHZ: _set_tsc_khz,
}
