"""The PC's devices behind their ports: fixed addresses and IRQs, those of the PC/AT.

====================== ===================================================== ===
ports                  device                                                IRQ
====================== ===================================================== ===
0x060, 0x064           8042 without a keyboard (`i8042`)
0x070-0x071            MC146818 RTC and CMOS RAM (`cmos`)                    8
0x092, 0xcf9           resets (`reset`)
0x0e0-0x0e3, 0x2000-   QEMU's pc-testdev (`kvmtick.machine.testdev`)
0x1f0-0x1f7, 0x3f6     ATA hard disk, if the guest has one (`ata`)           14
0x3f8-0x3ff            16550A UART, COM1 (`uart`)                            4
0x510-0x511            QEMU's firmware configuration (`machine.fw_cfg`)
0x600-0x60b            ACPI's fixed registers and PM timer (`acpi_pm`)       9
====================== ===================================================== ===

A device that is not here reads all ones, as an undriven bus does.
"""

from kvmtick.machine.fw_cfg import FwCfg
from kvmtick.machine.pc.acpi_pm import AcpiPm
from kvmtick.machine.pc.ata import Ata
from kvmtick.machine.pc.cmos import Cmos
from kvmtick.machine.pc.console import Console
from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.pc.i8042 import I8042
from kvmtick.machine.pc.reset import ResetPorts
from kvmtick.machine.pc.uart import Uart
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.testdev import PcTestdev

__all__ = ["Pc"]


class Pc:
    """All of them. No guest finds them but who looks there, so every machine has them."""

    def __init__(self, host: PcHost) -> None:
        self.uart = Uart(host)
        self.console: Console | None = None
        """Who feeds the UART."""
        self.fw_cfg = FwCfg(host.ram_bytes, host.vcpus)
        self.ata = Ata(host)
        self.cmos = Cmos(host)
        self.i8042 = I8042(host)
        self.reset = ResetPorts(host)
        self.acpi_pm = AcpiPm(host)
        self.testdev = PcTestdev(host.set_irq_line)

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        devices = (
            self.uart,
            self.fw_cfg,
            self.ata,
            self.cmos,
            self.i8042,
            self.reset,
            self.acpi_pm,
            self.testdev,
        )
        return {port: handler for device in devices for port, handler in device.ports().items()}
