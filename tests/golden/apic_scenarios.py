"""Scripts for the `scenario` guest behind the traces in which the APICs take part.

The guests recorded with the IOAPIC left the PICs uninitialised and closed, and took the tick at
vector 32, where the `scenario` guest has the handler of the PIC's IRQ 0. So these scripts write a
handler of their own into memory, which counts in the same `counter` and ends the interrupt at the
local APIC. The guest does initialise the PICs: `normalise.without_pic_setup`.

`SCENARIOS` holds those that the traces are compared with, and those of tests/guests/scenarios.py;
`NOEOI`, `level_held` and `RESAMPLE` are compared by what their guests see.
"""

from typing import Final

from guests import scenarios

from kvmtick import guests
from kvmtick.guests import Needs
from kvmtick.guests.script import (
    EXIT_CODE,
    Op,
    Scenario,
    apic_eoi_off,
    cli,
    end,
    idle_ms,
    ioapic_read,
    ioapic_write,
    lapic_write,
    mmio_write,
    out8,
    pit,
    snap,
    snap_vector,
    spin_ms,
    sti,
    unreal,
    wait_nmis,
    wait_ticks,
    wait_vector,
)

EOI, SVR, LVTT, LVT0, TMICT, TDCR = 0xB0, 0xF0, 0x320, 0x350, 0x380, 0x3E0
"""Registers of the local APIC."""

LAPIC_ON: Final = lapic_write(SVR, 0x1FF)
CLOSE_PICS: Final = (out8(0x21, 0xFF), out8(0xA1, 0xFF))
MASKED: Final = 0x10000
LVT_NMI: Final = 0x400
LVT_PERIODIC: Final = 0x20000
DIVIDE_BY_1: Final = 0xB

VECTOR: Final = 32
PIN: Final = 2
HANDLER_AT: Final = 0x7800
"""Between the guest's stack and its image."""

COUNT_TICK: Final = b"\x66\xff\x06" + guests.PARAMETERS.counter.to_bytes(2, "little")
"""inc dword [counter]"""
END_TICK: Final = bytes.fromhex("67 66 c7 05 b0 00 e0 fe 00 00 00 00")
"""mov dword [dword 0xfee000b0], 0: the local APIC's EOI register"""
IRET: Final = b"\xcf"

LEVEL_PIN: Final = 5
LEVEL_VECTOR: Final = 69
LEVEL: Final = 0x8000
LINE_PORT: Final = 0xD9
"""Where `level_held` asks user space for a level of its line, and `RESAMPLE` for its moves."""


def handler(vector: int, code: bytes) -> tuple[Op, ...]:
    """Put `code` into memory and let `vector` lead there; needs `unreal`."""
    padded = code.ljust(len(code) + -len(code) % 4, b"\x90")
    ops = [
        mmio_write(HANDLER_AT + at, int.from_bytes(padded[at : at + 4], "little"))
        for at in range(0, len(padded), 4)
    ]
    return tuple(op for pair in (*ops, mmio_write(4 * vector, HANDLER_AT)) for op in pair)


def redirection(pin: int, low: int) -> tuple[Op, ...]:
    """Write an entry of the IOAPIC's table: destination the local APIC 0, then `low`."""
    return *ioapic_write(0x11 + 2 * pin, 0), *ioapic_write(0x10 + 2 * pin, low)


def tick_by_ioapic(code: bytes = COUNT_TICK + END_TICK + IRET) -> tuple[Op | tuple[Op, ...], ...]:
    """Everything up to the programmed PIT, with `code` as the tick's handler."""
    return (
        unreal(),
        *CLOSE_PICS,
        handler(VECTOR, code),
        LAPIC_ON,
        redirection(PIN, VECTOR),
        pit(1193),
    )


IOAPIC_PIN_2: Final = Needs(gsi0="ioapic-pin-2")

NOEOI: Final = Scenario(
    "ioapic_noeoi",
    "IOAPIC pin 2: 20 ms spun with IF=1 and no EOI, one EOI by hand, 10 ms more",
    (
        *tick_by_ioapic(COUNT_TICK + IRET),
        sti(),
        spin_ms(20),
        snap(0),
        lapic_write(EOI, 0),
        spin_ms(10),
        snap(1),
        end(EXIT_CODE),
    ),
    IOAPIC_PIN_2,
)


def level_held(ends: int) -> Scenario:
    """A level line on IOAPIC pin 5 that stays high over `ends` EOIs, and falls before one more.

    results: pairs of the pin's redirection entry before and after each EOI, then the interrupts
    taken. User space hears of the line at LINE_PORT.
    """
    entry = 0x10 + 2 * LEVEL_PIN
    one = [
        (
            wait_vector(LEVEL_VECTOR, turn + 1),
            cli(),
            *((out8(LINE_PORT, 0),) if turn == ends else ()),
            *ioapic_read(entry, 2 * turn),
            *lapic_write(EOI, 0),
            *ioapic_read(entry, 2 * turn + 1),
        )
        for turn in range(ends + 1)
    ]
    return Scenario(
        "ioapic_level_held",
        f"IOAPIC pin {LEVEL_PIN}, level triggered: high over {ends} EOIs",
        (
            unreal(),
            *CLOSE_PICS,
            apic_eoi_off(),
            LAPIC_ON,
            redirection(LEVEL_PIN, LEVEL | LEVEL_VECTOR),
            out8(LINE_PORT, 1),
            *one,
            sti(),
            spin_ms(1),
            snap_vector(LEVEL_VECTOR, 2 * ends + 2),
            end(EXIT_CODE),
        ),
    )


RESAMPLE: Final = Scenario(
    "irqfd_resample",
    f"an irqfd with resampling on IOAPIC pin {LEVEL_PIN}: one interrupt, one EOI",
    (
        unreal(),
        *CLOSE_PICS,
        apic_eoi_off(),
        LAPIC_ON,
        redirection(LEVEL_PIN, LEVEL | LEVEL_VECTOR),
        out8(LINE_PORT, 1),
        wait_vector(LEVEL_VECTOR, 1),
        cli(),
        out8(LINE_PORT, 2),
        lapic_write(EOI, 0),
        out8(LINE_PORT, 3),
        sti(),
        spin_ms(1),
        snap_vector(LEVEL_VECTOR, 0),
        end(EXIT_CODE),
    ),
)
"""User space hears of 1: signal the irqfd; 2: the interrupt is in service; 3: it was ended."""


def nmi_watchdog(*rest: Op) -> tuple[Op | tuple[Op, ...], ...]:
    """The PIT as an NMI by LVT0, the PICs closed, IF=0."""
    return (
        cli(),
        unreal(),
        *CLOSE_PICS,
        LAPIC_ON,
        lapic_write(LVT0, LVT_NMI),
        pit(1193),
        *rest,
        end(EXIT_CODE),
    )


NMI_WATCHDOG: Final = (
    Scenario("nmi_wd", "LVT0=NMI, the PICs closed, IF=0: 4 ticks", nmi_watchdog(wait_nmis(4))),
    Scenario(
        "nmi_wd_spin",
        "LVT0=NMI, the PICs closed, IF=0: 53 ms spun",
        nmi_watchdog(spin_ms(53)),
    ),
)

LAPIC_PERIODIC: Final = Scenario(
    "lapic_periodic",
    "timer of the local APIC, periodic, 1 ms, vector 78: 5 ticks",
    (
        unreal(),
        *CLOSE_PICS,
        LAPIC_ON,
        lapic_write(LVT0, MASKED),
        lapic_write(TDCR, DIVIDE_BY_1),
        lapic_write(LVTT, LVT_PERIODIC | 78),
        lapic_write(TMICT, 1_000_000),
        wait_vector(78, 5),
        end(EXIT_CODE),
    ),
    Needs(tick_source="lapic", cpuid=()),
)

SCENARIOS: Final[dict[str, Scenario]] = {
    **scenarios.SCENARIOS,
    **{
        scenario.name: scenario
        for scenario in (
            Scenario(
                "ioapic_if0",
                "IOAPIC pin 2: 3 ticks, 50 ms with IF=0, 10 ms of HLT",
                (
                    *tick_by_ioapic(),
                    wait_ticks(3),
                    cli(),
                    spin_ms(50),
                    sti(),
                    idle_ms(10),
                    snap(0),
                    end(EXIT_CODE),
                ),
                IOAPIC_PIN_2,
            ),
            Scenario(
                "ioapic_mask",
                "IOAPIC pin 2: 3 ticks, 50 ms with the pin masked and IF=1, 10 ms of HLT",
                (
                    *tick_by_ioapic(),
                    wait_ticks(3),
                    ioapic_write(0x10 + 2 * PIN, MASKED | VECTOR),
                    spin_ms(50),
                    ioapic_write(0x10 + 2 * PIN, VECTOR),
                    idle_ms(10),
                    snap(0),
                    end(EXIT_CODE),
                ),
                IOAPIC_PIN_2,
            ),
            *NMI_WATCHDOG,
            LAPIC_PERIODIC,
        )
    },
}
"""By name."""
