"""The two PICs: initialisation, priorities, EOIs, polls, edge and level (8259A, i8259.c)."""

from kvmtick.conform.bench import Bench
from kvmtick.conform.case import equal, variants


@variants(
    "After creation all registers of the {0} are 0 but the pins ELCR may change, {2:#x}.",
    {"master": ("master", 0, 0xF8), "slave": ("slave", 1, 0xDE)},
)
def after_creation(bench: Bench, chip: str, chip_id: int, elcr_mask: int) -> None:
    with bench.pc() as pc:
        got = {name: value for name, value in pc.pic(chip_id).items() if value}
        equal(got, {"elcr_mask": elcr_mask}, "registers that are not 0")
