"""kvmtick: follow a timer tick through KVM - run it, prove it.

KVM's x86 tick-interrupt emulation in Python (i8254, its hrtimer and worker, the two i8259, GSI
routing, vCPU kick and injection) under real guest code. `Kvm` is where programs start.
"""

from kvmtick import guests

__version__ = "0.1.0"
__all__ = ["Kvm", "KvmError", "__version__", "guests"]


def __getattr__(name: str) -> object:
    # `kvmtick --help` must not pay for the chips.
    if name == "Kvm":
        from kvmtick.kvm import Kvm

        return Kvm
    if name == "KvmError":
        from kvmtick.abi.errors import KvmError

        return KvmError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
