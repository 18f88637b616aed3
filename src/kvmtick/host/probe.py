"""What this host offers: /dev/kvm, capabilities, tracefs and the events of a tick; and whether
kvmtick is compiled.

`probe_host` never raises: what is absent is a value, with the reason and the remedy beside it.
"""

import importlib.util
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvmtick.abi import HostError, KvmError
from kvmtick.abi.caps import CAPS
from kvmtick.host.kvmdev import KVM_PATH, open_kvm
from kvmtick.host.tracefs import TICK_EVENTS, find_tracefs, open_tracefs

__all__ = [
    "HostProbe",
    "KvmProbe",
    "TracefsProbe",
    "is_compiled",
    "probe_host",
    "probe_kvm",
    "probe_parameters",
    "probe_tracefs",
    "probe_virtualization",
    "waited_for_cpu_ns",
]

_PARAMETERS = (
    "kvm/min_timer_period_us",
    "kvm/halt_poll_ns",
    "kvm/lapic_timer_advance",
    "kvm/lapic_timer_advance_ns",
    "kvm/pi_inject_timer",
    "kvm/kvmclock_periodic_sync",
    "kvm/vector_hashing",
    "kvm_intel/enable_apicv",
    "kvm_intel/preemption_timer",
    "kvm_amd/avic",
    "kvm_amd/vnmi",
)
"""Module parameters that change when or how a tick arrives; not every kernel has every one."""


@dataclass(frozen=True, slots=True)
class KvmProbe:
    """/dev/kvm: `error` and `remedy` are empty where it can be opened."""

    path: str
    present: bool
    openable: bool
    error: str = ""
    remedy: str = ""
    api_version: int | None = None
    vcpu_mmap_bytes: int | None = None
    caps: dict[str, int] = field(default_factory=dict)
    """Capability name: what KVM_CHECK_EXTENSION says (0: absent)."""


@dataclass(frozen=True, slots=True)
class TracefsProbe:
    """tracefs: `mounted_at` is None where only a private mount would do.

    `readable`: events can be looked at; `writable`: an instance could be made. `clocks` are the
    names `trace_clock` takes, `events` says of each event of a tick whether the kernel has it.
    """

    mounted_at: str | None
    readable: bool
    writable: bool
    error: str = ""
    remedy: str = ""
    clocks: tuple[str, ...] = ()
    events: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostProbe:
    """Everything: `backends` are the loaded modules that run guests (kvm_intel, kvm_amd, ...),
    `virtualization` is of `probe_virtualization`.
    """

    kernel: str
    cpus: int
    kvm: KvmProbe
    tracefs: TracefsProbe
    backends: tuple[str, ...]
    virtualization: str
    parameters: dict[str, str]


def probe_kvm(path: str = KVM_PATH) -> KvmProbe:
    """What /dev/kvm says of itself."""
    present = os.path.exists(path)
    try:
        with open_kvm(path) as device:
            return KvmProbe(
                path,
                present,
                True,
                api_version=device.api_version(),
                vcpu_mmap_bytes=device.vcpu_mmap_size(),
                caps={name: device.check_extension(number) for name, number in CAPS.items()},
            )
    except HostError as error:
        return KvmProbe(path, present, False, error.what, error.remedy)
    except KvmError as error:
        return KvmProbe(path, present, False, str(error))


def probe_tracefs(events: Iterable[str] = TICK_EVENTS) -> TracefsProbe:
    """Whether ticks can be recorded here; mounts nothing that stays."""
    mounted = None
    with suppress(OSError):
        mounted = find_tracefs()
    where = None if mounted is None else str(mounted)
    try:
        with open_tracefs() as tracefs:
            clocks = tracefs.read("trace_clock").replace("[", "").replace("]", "").split()
            return TracefsProbe(
                where,
                readable=True,
                writable=os.access(tracefs.root / "instances", os.W_OK),
                clocks=tuple(clocks),
                events={event: tracefs.has_event(event) for event in events},
            )
    except HostError as error:
        return TracefsProbe(where, False, False, error.what, error.remedy)
    except OSError as error:
        return TracefsProbe(where, False, False, str(error))


def probe_parameters(modules: Path = Path("/sys/module")) -> dict[str, str]:
    """Module parameters (`kvm/min_timer_period_us`: "200") that exist and can be read."""
    found = {}
    for name in _PARAMETERS:
        module, parameter = name.split("/")
        with suppress(OSError):
            found[name] = (modules / module / "parameters" / parameter).read_text().strip()
    return found


def _backends(modules: Path = Path("/sys/module")) -> tuple[str, ...]:
    """Modules that depend on kvm, or built into it, by name."""
    with suppress(OSError):
        return tuple(sorted(path.name for path in modules.glob("kvm_*")))
    return ()


def probe_virtualization(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's extension that runs guests: "vmx", "svm", or "" where it has none. Without one a
    KVM can still be there, whose instruction emulator executes the guest's kernel.
    """
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return next((flag for flag in ("vmx", "svm") if flag in line.split()), "")
    return ""


def is_compiled() -> bool:
    """Whether the modules a tick passes through are those that mypyc compiled."""
    spec = importlib.util.find_spec("kvmtick.irqchip.i8254")
    return spec is not None and spec.origin is not None and not spec.origin.endswith(".py")


def probe_host() -> HostProbe:
    """All of it, in a few milliseconds."""
    return HostProbe(
        kernel=os.uname().release,
        cpus=len(os.sched_getaffinity(0)),
        kvm=probe_kvm(),
        tracefs=probe_tracefs(),
        backends=_backends(),
        virtualization=probe_virtualization(),
        parameters=probe_parameters(),
    )


def waited_for_cpu_ns() -> int:
    """How long this thread, ready to run, has waited for a CPU (sched-stats.rst); 0 if unknown."""
    with suppress(OSError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return 0
