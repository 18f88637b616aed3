"""The rates that Linux measures are those of kvmtick's clocks, to 0.1 %.

CPUID tells none of them and there is no TSC deadline, so the kernel counts the TSC against the PIT
and the local APIC's timer against the TSC, checks that by ACPI's PM timer, and a second later
refines the TSC's rate by the PM timer.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_boots import UNWANTED, all_boots

from kvmtick.guests.linux import tiny_initrd
from kvmtick.kvm.model import ModelVm
from kvmtick.machine.linux import load_linux

LIMIT_S = 300.0
SCRIPT = b"cat /proc/cpuinfo\nsleep 1.2\n"
"""The refined rate comes a second after the kernel has its clock source."""
WITHIN = 1e-3
PM_TIMER_HZ = 3_579_545
CALIBRATION_S = 0.1


@dataclass(frozen=True)
class Setup:
    """What the kernel is told, and what it has to find out."""

    tsc_khz: int
    bus_cycle_ns: int
    vcpus: int = 1
    append: str = ""
    vendor: str | None = None


SETUPS = [
    pytest.param(Setup(2_400_000, 10, vcpus=2), id="2 vCPUs"),
    *(
        pytest.param(setup, id=name, marks=all_boots)
        for name, setup in (
            ("equal clocks", Setup(1_000_000, 1)),
            ("PIT through the PIC", Setup(700_000, 3, append="noapic")),
            ("no PM timer", Setup(3_100_000, 40, append="pmtmr=0")),
            ("AMD, xAPIC", Setup(1_900_000, 5, 2, "nox2apic", "AuthenticAMD")),
            ("4 vCPUs", Setup(2_400_000, 10, vcpus=4)),
        )
    ),
]


def boot(kernel: Path, setup: Setup) -> str:
    """What the guest prints until it powers off."""
    guest = load_linux(
        kernel,
        initrd=tiny_initrd(script=SCRIPT),
        append=f"console=ttyS0 apic=verbose ignore_loglevel {setup.append}",
        vcpus=setup.vcpus,
    )
    needs = replace(
        guest.needs,
        cpuid_off=("tsc_deadline",),
        cpuid_clocks=False,
        cpuid_vendor=setup.vendor,
    )
    printed = bytearray()
    with ModelVm(ram_bytes=needs.ram_bytes, fast=True) as vm:
        vm.set_tsc_khz(setup.tsc_khz)
        vm.machine.board.delivery.apic_bus_cycle_ns = setup.bus_cycle_ns
        vm.machine.ports.on_text = printed.append
        vm.prepare(needs)
        vm.load(guest)
        run = vm.run(limit_s=LIMIT_S)
    text = printed.decode(errors="replace").replace("\r", "")
    assert run.exit.reason == "power-off", text[-1000:]
    return text


def numbers(pattern: str, printed: str) -> list[float]:
    """In every line that has it."""
    return [float(number) for number in re.findall(pattern, printed)]


def jiffies_a_second(printed: str) -> int:
    """CONFIG_HZ: BogoMIPS are loops a jiffy times HZ / 500000."""
    found = re.search(r"timer frequency\.\. ([\d.]+) BogoMIPS \(lpj=(\d+)\)", printed)
    assert found
    return round(float(found[1]) * 500_000 / int(found[2]))


@pytest.mark.parametrize("setup", SETUPS)
def test_what_the_kernel_measures_is_true(kernel: Path, setup: Setup) -> None:
    printed = boot(kernel, setup)
    for text in UNWANTED:
        assert text not in printed
    tsc_mhz, bus_hz = setup.tsc_khz / 1000, 1e9 / setup.bus_cycle_ns
    hz = jiffies_a_second(printed)

    detected = numbers(r"tsc: Detected ([\d.]+) MHz processor", printed)
    assert detected == [pytest.approx(tsc_mhz, WITHIN)]
    per_jiffy = numbers(r"\.\.\.\.\. calibration result: (\d+)", printed)
    assert per_jiffy == [pytest.approx(bus_hz / hz, WITHIN)]

    pm_timer = "pmtmr=0" not in setup.append
    refined = numbers(r"Refined TSC clocksource calibration: ([\d.]+) MHz", printed)
    assert refined == ([pytest.approx(tsc_mhz, WITHIN)] if pm_timer else [])
    pm_cycles = numbers(r"PM-Timer delta = (\d+)", printed)
    assert pm_cycles == [pytest.approx(PM_TIMER_HZ * CALIBRATION_S if pm_timer else 0, WITHIN)]

    bogomips = numbers(r"bogomips\t: ([\d.]+)", printed)
    assert bogomips == [pytest.approx(2 * tsc_mhz, WITHIN)] * setup.vcpus
    assert numbers(r"cpu MHz\t\t: ([\d.]+)", printed) == [detected[0]] * setup.vcpus
    assert numbers(r"physical id\t: (\d+)", printed) == [0] * setup.vcpus
    assert numbers(r"siblings\t: (\d+)", printed) == [setup.vcpus] * setup.vcpus
    assert numbers(r"cpu cores\t: (\d+)", printed) == [setup.vcpus] * setup.vcpus
    assert numbers(r"core id\t\t: (\d+)", printed) == list(range(setup.vcpus))
