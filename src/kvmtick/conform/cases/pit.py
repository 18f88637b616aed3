"""The PIT: counting, latching, modes, the gate and port 0x61 (Intel 8254 datasheet, i8254.c)."""

from kvmtick.conform.bench import Bench
from kvmtick.conform.case import case, equal


@case("A new PIT counts 65536 on every counter, in no mode yet (kvm_pit_reset_ch, mode 0xff).")
def after_creation(bench: Bench) -> None:
    with bench.pc(pit=True) as pc:
        channels = pc.vm.get_pit2().channels
        equal([each.count for each in channels], [0x10000] * 3, "counts")
        equal([each.mode for each in channels], [0xFF] * 3, "modes")
        equal([each.gate for each in channels], [1, 1, 0], "gates")
