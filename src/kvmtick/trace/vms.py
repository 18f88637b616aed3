"""What a recorder knows of the VMs on a host: processes, threads, names.

Not modelled: several VMs of one process; they are taken for one.
"""

from dataclasses import dataclass, field
from typing import Any

from kvmtick.host.vms import vcpu_of_name

__all__ = ["VmInfo", "vcpu_of_name"]


@dataclass(slots=True)
class VmInfo:
    """One VM, as far as it is known beside its records."""

    pid: int
    """The process that made it."""
    name: str
    """From its command line, else the process' own name."""
    threads: dict[int, str] = field(default_factory=dict)
    """All threads of the process and the VM's kvm-pit worker: tid to name (comm)."""
    vcpus: dict[int, int] = field(default_factory=dict)
    """tid to vCPU id, where it is known."""
    reinject: bool | None = None
    """How its PIT was set when the recording began; None if nobody knows."""
    from_start: bool = False
    """It is known not to have run before its first record."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pid": self.pid,
            "name": self.name,
            "threads": {str(tid): comm for tid, comm in self.threads.items()},
            "vcpus": {str(tid): vcpu for tid, vcpu in self.vcpus.items()},
            "reinject": self.reinject,
            "from_start": self.from_start,
        }

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "VmInfo":
        """From JSON. KeyError, TypeError or ValueError where it is none."""
        return cls(
            pid=int(told["pid"]),
            name=str(told["name"]),
            threads={int(tid): str(comm) for tid, comm in told["threads"].items()},
            vcpus={int(tid): int(vcpu) for tid, vcpu in told["vcpus"].items()},
            reinject=None if told["reinject"] is None else bool(told["reinject"]),
            from_start=bool(told.get("from_start", False)),
        )
