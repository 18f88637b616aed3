"""The scripts behind the traces of a real kernel (`base_1.txt`, `if0_0.txt`, ...).

Their port accesses are those of the recorded guests, and all end with exit code 0x5a as those did.
"""

from typing import Final

from kvmtick.guests.script import (
    EXIT_CODE,
    Scenario,
    cli,
    end,
    eoi_off,
    idle_ms,
    out8,
    pit,
    snap,
    spin_ms,
    sti,
    user_sleep_us,
    wait_ticks,
)

__all__ = ["SCENARIOS"]

SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "base",
            "20 ms of HLT at 1 kHz",
            (pit(1193), idle_ms(20), snap(0), end(EXIT_CODE)),
        ),
        Scenario(
            "if0",
            "3 ticks, 50 ms with IF=0, 10 ms of HLT",
            (
                pit(1193),
                wait_ticks(3),
                cli(),
                snap(0),
                spin_ms(50),
                snap(1),
                sti(),
                idle_ms(10),
                snap(2),
                end(EXIT_CODE),
            ),
        ),
        Scenario(
            "picmask",
            "3 ticks, IRQ 0 masked in the PIC for 50 ms with IF=1, 10 ms of HLT",
            (
                pit(1193),
                wait_ticks(3),
                out8(0x21, 0xFF),
                snap(0),
                spin_ms(50),
                snap(1),
                out8(0x21, 0xFE),
                idle_ms(10),
                snap(2),
                end(EXIT_CODE),
            ),
        ),
        Scenario(
            "ifmask",
            "3 ticks, 30 ms with IF=0, then IRQ 0 masked and unmasked, 10 ms of HLT",
            (
                pit(1193),
                wait_ticks(3),
                cli(),
                snap(0),
                spin_ms(30),
                out8(0x21, 0xFF),
                out8(0x21, 0xFE),
                snap(1),
                sti(),
                idle_ms(10),
                snap(2),
                end(EXIT_CODE),
            ),
        ),
        Scenario(
            "clamp",
            "20 ms of HLT with a PIT count of 10: 8.4 us, raised to 200 us",
            (pit(10), idle_ms(20), snap(0), end(EXIT_CODE)),
        ),
        Scenario(
            "notrun",
            "3 ticks, the vCPU 50 ms out of KVM_RUN with IF=1, 10 ms of HLT",
            (
                pit(1193),
                wait_ticks(3),
                snap(0),
                user_sleep_us(50_000),
                idle_ms(10),
                snap(1),
                end(EXIT_CODE),
            ),
        ),
        Scenario(
            "noeoi",
            "20 ms spun with IF=1 and no EOI, one EOI by hand, 10 ms more",
            (
                eoi_off(),
                pit(1193),
                sti(),
                spin_ms(20),
                snap(0),
                out8(0x20, 0x20),
                spin_ms(10),
                snap(1),
                end(EXIT_CODE),
            ),
        ),
    )
}
"""By name: those of the recorded traces `<name>_0.txt` (reinject off) and `<name>_1.txt` (on)."""
