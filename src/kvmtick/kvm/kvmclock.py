"""kvmclock as KVM_GET_CLOCK and KVM_SET_CLOCK have it (get_kvmclock, kvm_vm_ioctl_set_clock).

It counts the machine's time from the VM's creation. It is derived from a master clock once a vCPU
has run and as long as the TSCs of all agree; the answer's flags say so (api.rst 4.29).

Not modelled: the guest's side, the paravirtual clock (CPUID does not offer it). In virtual time
there is no CLOCK_REALTIME: the answer does not tell it, and KVM_CLOCK_REALTIME adds nothing.
"""

import errno
from collections.abc import Collection

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    kvm_clock_data,
)
from kvmtick.timing.clock import Clock
from kvmtick.timing.wall import realtime_ns
from kvmtick.vcpu.vcpu import Vcpu

__all__ = ["KVM_CLOCK_VALID_FLAGS", "KvmClock"]

KVM_CLOCK_VALID_FLAGS = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC

_U64 = (1 << 64) - 1


def uses_master_clock(vcpus: Collection[Vcpu]) -> bool:
    """`pvclock_update_vm_gtod_copy`, which the first entry of a vCPU asks for."""
    tscs = {(vcpu.tsc_khz, vcpu.guest_tsc()) for vcpu in vcpus}
    return len(tscs) == 1 and any(vcpu.has_run for vcpu in vcpus)


class KvmClock:
    """The kvmclock of one VM."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_ns = -clock.now_ns

    def get(self, vcpus: Collection[Vcpu]) -> kvm_clock_data:
        """KVM_GET_CLOCK of the VM that has these vCPUs."""
        self._clock.refresh()
        now_ns = self._clock.now_ns
        data = kvm_clock_data(clock=now_ns + self._offset_ns & _U64)
        if uses_master_clock(vcpus):
            data.flags = KVM_CLOCK_TSC_STABLE
            data.host_tsc = now_ns
            if self._clock.live:
                data.flags |= KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC
                data.realtime = realtime_ns()
        return data

    def set(self, data: kvm_clock_data) -> None:
        """KVM_SET_CLOCK; with KVM_CLOCK_REALTIME plus the time since `realtime`.

        KvmError EINVAL: unknown flags.
        """
        if data.flags & ~KVM_CLOCK_VALID_FLAGS:
            raise KvmError(errno.EINVAL, "KVM_SET_CLOCK")
        self._clock.refresh()
        ahead_ns = 0
        if data.flags & KVM_CLOCK_REALTIME and self._clock.live:
            ahead_ns = max(0, realtime_ns() - data.realtime)
        self._offset_ns = data.clock + ahead_ns - self._clock.now_ns
