"""What the options of `kvmtick run` ask for."""

from dataclasses import replace

from kvmtick.cli.run_options import with_cpuid
from kvmtick.guests import load


def test_cpuid_changes_add_up() -> None:
    guest = load("tick-pic")
    assert with_cpuid(guest, []) == guest
    changes = ["clocks=off", "x2apic=off", "vendor=AuthenticAMD", "tsc_deadline=off"]
    assert with_cpuid(guest, changes).needs == replace(
        guest.needs,
        cpuid_clocks=False,
        cpuid_off=("x2apic", "tsc_deadline"),
        cpuid_vendor="AuthenticAMD",
    )
