"""The PC's devices behind their ports: fixed addresses and IRQs, those of the PC/AT.

====================== ======================================================== ====
ports                  device                                                   IRQ
====================== ======================================================== ====
0x3f8-0x3ff            16550A UART, COM1 (`uart`)                               4
0x510-0x511            QEMU's firmware configuration (`kvmtick.machine.fw_cfg`)
0x1f0-0x1f7, 0x3f6     ATA hard disk (`ata`), absent unless the guest has one           14
0xe0-0xe3, 0x2000-2017 QEMU's pc-testdev (`kvmtick.machine.testdev`)
====================== ======================================================== ====

A device that is not here reads all ones, as an undriven bus does.
"""

from kvmtick.machine.fw_cfg import FwCfg
from kvmtick.machine.pc.ata import Ata
from kvmtick.machine.pc.host import PcHost
from kvmtick.machine.pc.uart import Uart
from kvmtick.machine.ports import PortHandler
from kvmtick.machine.testdev import PcTestdev

__all__ = ["Pc"]


class Pc:
    """All of them. No guest finds them but who looks there, so every machine has them."""

    def __init__(self, host: PcHost) -> None:
        self.uart = Uart(host)
        self.fw_cfg = FwCfg(host.ram_bytes, host.vcpus)
        self.ata = Ata(host)
        self.testdev = PcTestdev(host.set_irq_line)

    def ports(self) -> dict[int, PortHandler]:
        """Who answers which port."""
        devices = (self.uart, self.fw_cfg, self.ata, self.testdev)
        return {port: handler for device in devices for port, handler in device.ports().items()}
