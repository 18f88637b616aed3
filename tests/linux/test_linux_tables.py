"""What an installed kernel makes of what it is handed: memory map, ACPI tables, initrd."""

import re
from pathlib import Path

import pytest

from kvmtick.kvm.model import ModelVm
from kvmtick.machine.linux import load_linux

COMPLAINTS = re.compile(r"ACPI.*(?:Error|Warning|Exception)|BIOS (?:bug|Error)|FW[ _]BUG|MP-BIOS")
MEMORY_IS_UP = b"SLUB:"


@pytest.mark.parametrize("entry", ["64", "32"])
def test_a_kernel_reads_the_tables_without_complaint(kernel: Path, entry: str) -> None:
    initrd = bytes(3 * 4096)
    append = "earlyprintk=serial,keep"
    guest = load_linux(kernel, initrd=initrd, append=append, vcpus=4, entry=entry)
    with ModelVm(ram_bytes=guest.needs.ram_bytes, fast=True) as vm:
        vm.prepare(guest.needs)
        vm.load(guest)
        sent = bytearray()
        vm.machine.ports.on_text = sent.append
        run = vm.run(limit_s=120, until=lambda: MEMORY_IS_UP in sent)
    log = sent.decode()
    assert run.exit.reason == "until", log
    for words in (
        f"Command line: {append}",
        "BIOS-e820: [mem 0x000000000009fc00-0x000000000009ffff] reserved",
        "BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable",
        "RAMDISK: [mem 0x0fffd000-0x0fffffff]",
        "ACPI: RSDP 0x00000000000F0000",
        "ACPI: PM-Timer IO Port: 0x608",
        "ACPI: LAPIC_NMI (acpi_id[0xff] dfl dfl lint[0x1])",
        "IOAPIC[0]: apic_id 0, version 17, address 0xfec00000, GSI 0-23",
        "ACPI: INT_SRC_OVR (bus 0 bus_irq 0 global_irq 2 dfl dfl)",
        "ACPI: INT_SRC_OVR (bus 0 bus_irq 9 global_irq 9 high level)",
        "Allowing 4 CPUs, 0 hotplug CPUs",
    ):
        assert words in log, log
    assert not COMPLAINTS.search(log), log
