"""Where `kvmtick run` runs the guest: on whose CPU, with whose chips, in which time."""

import argparse
from dataclasses import dataclass
from typing import Final

from kvmtick.cli import UsageError

__all__ = ["Where", "where_of"]

_NEED_UNICORN: Final = {
    "fast": "it tells where the unicorn CPU looks for interrupts, the host's looks where it likes",
    "gdb": "a debugger stops at instructions, and the host's CPU does not tell of each",
}
_NEED_MODEL: Final = {
    "fault": "the kernel is as late as it is",
    "no_clamp": "there min_timer_period_us is a parameter of the module kvm, which the host's"
    " administrator sets",
    "quantum": "each vCPU has a thread of its own there, and Linux lets them run",
    "seed": "nothing is random there",
    "story": "it shows the state of chips from event to event, the kernel's cannot be seen",
    "strict": "the kernel answers the MSRs",
}
"""Options that go with the model's chips only, and why."""


@dataclass(frozen=True, slots=True)
class Where:
    """`cpu`: unicorn or kvm; `chips`: model or kernel; `clock`: virtual or real."""

    cpu: str
    chips: str
    clock: str


def where_of(options: argparse.Namespace) -> Where:
    """`--cpu`, `--chips` and `--clock`; UsageError for what does not go together, and for options
    that do not go with it.
    """
    chips = options.chips or "model"
    cpu = options.cpu or ("kvm" if chips == "kernel" else "unicorn")
    if cpu == "unicorn":
        if chips == "kernel":
            raise UsageError(
                "--cpu unicorn --chips kernel: the kernel's chips interrupt only vCPUs of /dev/kvm;"
                " give --cpu kvm, or leave --cpu out"
            )
        return Where(cpu, chips, options.clock or "virtual")
    if options.clock == "virtual":
        raise UsageError(
            "--clock virtual: the host's CPU counts no instructions, so its time is real;"
            " leave it out, or give --cpu unicorn"
        )
    _refuse(options, _NEED_UNICORN, "use --cpu unicorn")
    if chips == "kernel":
        _refuse(options, _NEED_MODEL, "use --chips model")
    return Where(cpu, chips, "real")


def _refuse(options: argparse.Namespace, refused: dict[str, str], remedy: str) -> None:
    for name, why in refused.items():
        value = vars(options)[name]
        if value not in (None, False, []):
            raise UsageError(f"--{name.replace('_', '-')}: {why}; {remedy}, or leave it out")
