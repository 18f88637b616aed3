"""kvmclock as KVM_GET_CLOCK and KVM_SET_CLOCK have it (get_kvmclock, kvm_vm_ioctl_set_clock).

It counts the machine's time from the VM's creation. The answer has no flags, as on a host without a
master clock: CLOCK_MONOTONIC plus a constant (api.rst 4.31).

Not modelled: the guest's side, the paravirtual clock (CPUID does not offer it). In virtual time
there is no CLOCK_REALTIME, so KVM_CLOCK_REALTIME adds nothing there.
"""

import errno

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import (
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    kvm_clock_data,
)
from kvmtick.timing.clock import Clock
from kvmtick.timing.wall import realtime_ns

__all__ = ["KVM_CLOCK_VALID_FLAGS", "KvmClock"]

KVM_CLOCK_VALID_FLAGS = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC

_U64 = (1 << 64) - 1


class KvmClock:
    """The kvmclock of one VM."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_ns = -clock.now_ns

    def get(self) -> kvm_clock_data:
        """KVM_GET_CLOCK."""
        self._clock.refresh()
        return kvm_clock_data(clock=self._clock.now_ns + self._offset_ns & _U64)

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
