"""kvmtick: follow a timer tick through KVM - run it, prove it.

KVM's x86 tick-interrupt emulation in Python (i8254, its hrtimer and worker, the two i8259, GSI
routing, vCPU kick and injection) under real guest code. `Kvm` is where programs start.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmtick import guests
    from kvmtick.abi.errors import KvmError
    from kvmtick.kvm import Kvm
    from kvmtick.machine.fleet import Fleet
    from kvmtick.machine.fleet_pool import run_fleet

__version__ = "0.1.0"
__all__ = ["Fleet", "Kvm", "KvmError", "__version__", "guests", "run_fleet"]

_HOMES = {
    "Fleet": "kvmtick.machine.fleet",
    "Kvm": "kvmtick.kvm",
    "KvmError": "kvmtick.abi.errors",
    "run_fleet": "kvmtick.machine.fleet_pool",
}

if os.environ.get("KVMTICK_PURE"):
    from kvmtick._pure import prefer_sources

    prefer_sources()


def __getattr__(name: str) -> object:
    # Imported when asked for: `kvmtick --help` must not pay for the chips.
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "guests":
        return import_module("kvmtick.guests")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
