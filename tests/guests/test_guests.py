"""The built-in guests: bytes and sources agree, the parameter block is where it is said to be."""

import shutil
import struct
from dataclasses import fields

import pytest

from kvmtick import guests
from kvmtick.abi.structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
)
from kvmtick.guests import DEFAULT_NEEDS, MSI_ADDRESS, Needs, build, gsi_routing
from kvmtick.guests.script import (
    APIC_VECTORS_AT,
    EXIT_CODE,
    FAULTS_AT,
    NMIS_AT,
    PIC_INIT,
    RESULTS_AT,
    SCRIPT_AT,
    VECTORS_AT,
    Code,
    Op,
    Results,
    Scenario,
    end,
    ioapic_write,
    lapic_read,
    mmio_read,
    mmio_write,
    nop,
    pit,
    rdmsr,
    wrmsr,
    x2apic_write,
)

from .scenarios import SCENARIOS

SOURCES = [source.stem for source in build.sources()]
ALL = [name for name in SOURCES if name != "mailbox"]
"""Those with a parameter block; the fuzzer's has none."""
LAPIC_TIMED = {"tick-lapic", "tick-x2apic"}
TIMER_PERIOD_NS = dict.fromkeys(LAPIC_TIMED, 1_000_000) | {"tick-long": 700_000}
"""By default; tick-long's is beside the PIT's."""


def in_memory(image: bytes, at: int = guests.LOAD_AT) -> bytes:
    """Guest RAM from address 0 on with `image` in it."""
    return bytes(at) + image


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm not found: sources not assembled")
@pytest.mark.parametrize("name", SOURCES)
def test_source_and_bytes_agree(name: str) -> None:
    source = build.HERE / f"{name}.asm"
    assert build.assemble(source) == source.with_suffix(".bin").read_bytes(), (
        "run `python -m kvmtick.guests.build`"
    )


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm not found: nothing to refuse")
def test_nasm_says_what_it_refuses(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("asm") / "broken.asm"
    source.write_text("mov nothing\n")
    with pytest.raises(RuntimeError, match=r"broken\.asm:1: error"):
        build.assemble(source)


def test_every_listed_guest_has_a_source_and_every_source_loads() -> None:
    assert set(guests.names()) <= set(ALL)
    assert set(ALL) - set(guests.names()) == {"scenario"}
    for name in ALL:
        assert guests.load(name).name == name
    for description in guests.names().values():
        assert description
        assert "\n" not in description


@pytest.mark.parametrize("name", ALL)
def test_an_image_fits_and_starts_with_a_jump_over_the_block(name: str) -> None:
    guest = guests.load(name)
    assert guest.image[0] == 0xE9  # JMP rel16
    (displacement,) = struct.unpack_from("<H", guest.image, 1)
    assert 3 + displacement >= guests.PARAMETERS.end - guests.LOAD_AT
    assert guest.load_at == guests.LOAD_AT == 16 * guest.entry[0] + guest.entry[1]
    assert guest.load_at + len(guest.image) <= 0x10000
    assert guest.image[4:12] == guests.MAGIC


@pytest.mark.parametrize("name", ALL)
def test_the_block_round_trips(name: str) -> None:
    timed = name in LAPIC_TIMED
    by_pit = not timed and name != "exceptions"
    guest = guests.load(
        name,
        ticks=7,
        hz=500 if timed else None,
        divisor=65536 if by_pit else None,
        param_ms=12,
        tsc_khz=2_596_122,
        flags=0x8000_0001,
    )
    read = guests.Parameters.read(in_memory(guest.image))
    assert read == guests.Parameters.read(guest.image, at=4)
    assert read == guests.Parameters(
        count=7,
        divisor=65536 if by_pit else 1193,
        counter=0,
        tsc_khz=2_596_122,
        param_ms=12,
        flags=0x8000_0001,
        period_ns=2_000_000 if timed else TIMER_PERIOD_NS.get(name, 0),
        reserved=0,
        snapshot=(0,) * 8,
    )


@pytest.mark.parametrize("name", ALL)
def test_defaults_are_those_in_the_source(name: str) -> None:
    raw = (build.HERE / f"{name}.bin").read_bytes()
    assert guests.load(name).image == raw
    read = guests.Parameters.read(raw, at=4)
    assert (read.count, read.divisor, read.tsc_khz, read.param_ms) == (1000, 1193, 1_000_000, 50)
    assert read.period_ns == TIMER_PERIOD_NS.get(name, 0)


def test_each_field_is_read_from_its_own_address() -> None:
    at = guests.PARAMETERS
    memory = bytearray(in_memory(guests.load("tick-pic").image))
    names = ["count", "divisor", "counter", "tsc_khz", "param_ms", "flags", "period_ns", "reserved"]
    for number, name in enumerate(names):
        struct.pack_into("<I", memory, getattr(at, name), 100 + number)
    struct.pack_into("<8I", memory, at.snapshot, *range(300, 308))
    read = guests.Parameters.read(memory)
    assert [getattr(read, name) for name in names] == list(range(100, 108))
    assert read.snapshot == tuple(range(300, 308))
    assert {field.name for field in fields(read)} == {*names, "snapshot"}
    assert at.end == at.snapshot + 4 * 8


def test_memory_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter block") as error:
        guests.Parameters.read(bytes(0x9000))
    assert "0x8004" in one_line(error)
    with pytest.raises(ValueError, match="has only 0x10 bytes") as error:
        guests.Parameters.read(bytes(16))
    one_line(error)
    with pytest.raises(ValueError, match="no parameter block at -0x1") as error:
        guests.Parameters.read(bytes(0x9000), at=-1)
    one_line(error)


@pytest.mark.parametrize(
    ("hz", "divisor"),
    [(1000, 1193), (100, 11932), (18.2, 65536), (18.21, 65523), (1193181, 1), (4992, 239)],
)
def test_rate_to_count(hz: float, divisor: int) -> None:
    assert guests.divisor_for(hz) == divisor
    assert guests.Parameters.read(guests.load("tick-pic", hz=hz).image, 4).divisor == divisor


@pytest.mark.parametrize(
    ("hz", "period_ns"),
    [(1000, 1_000_000), (100, 10_000_000), (3, 333_333_333), (0.25, 4_000_000_000), (1e6, 1000)],
)
@pytest.mark.parametrize("name", sorted(LAPIC_TIMED))
def test_rate_to_period_of_the_local_apics_timer(name: str, hz: float, period_ns: int) -> None:
    assert guests.period_ns_for(hz) == period_ns
    assert guests.Parameters.read(guests.load(name, hz=hz).image, 4).period_ns == period_ns


@pytest.mark.parametrize("hz", [0, -1, 0.24, 1_000_001, float("nan"), float("inf"), True])
def test_rates_out_of_the_local_apics_range_are_refused(hz: float) -> None:
    with pytest.raises(ValueError, match="timer does not tick at that rate") as error:
        guests.load("tick-lapic", hz=hz)
    message = one_line(error)
    assert str(hz) in message
    assert "0.25 to 1000000" in message


def test_a_pit_count_is_nothing_for_a_guest_without_pit() -> None:
    with pytest.raises(ValueError, match="give hz") as error:
        guests.load("tick-lapic", divisor=1193)
    assert "divisor=1193: 'tick-lapic'" in one_line(error)


@pytest.mark.parametrize(
    ("timer", "flags", "cpuid"),
    [
        (None, 0, ()),
        ("periodic", 0, ()),
        ("oneshot", 1, ()),
        ("tsc-deadline", 2, ("tsc_deadline",)),
    ],
)
def test_the_timer_mode_is_a_flag(
    timer: guests.TimerMode | None, flags: int, cpuid: tuple[str, ...]
) -> None:
    guest = guests.load("tick-lapic", timer=timer)
    assert guests.Parameters.read(guest.image, 4).flags == flags
    assert guest.needs == Needs(tick_source="lapic", cpuid=cpuid)
    assert guests.load("tick-lapic", flags=flags).needs == guest.needs


def test_no_ack_is_a_flag() -> None:
    guest = guests.load("nmi-watchdog", ack=False, flags=0x100)
    assert guests.Parameters.read(guest.image, 4).flags == 0x110


def test_options_a_guest_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="use tick-lapic") as error:
        guests.load("tick-pic", timer="oneshot")
    assert "timer='oneshot': 'tick-pic'" in one_line(error)
    with pytest.raises(ValueError, match="there are periodic, oneshot, tsc-deadline") as error:
        guests.load("tick-lapic", timer="hourly")  # type: ignore[arg-type]
    one_line(error)
    with pytest.raises(ValueError, match="use nmi-watchdog") as error:
        guests.load("tick-msi", ack=False)
    assert "'tick-msi'" in one_line(error)
    with pytest.raises(ValueError, match="'exceptions' chooses the moments") as error:
        guests.load("exceptions", divisor=1193)
    assert "divisor=1193" in one_line(error)


@pytest.mark.parametrize("hz", [0, -1, 18.1, 1193182, 1e300, float("nan"), float("inf"), True])
def test_rates_out_of_range_are_refused(hz: float) -> None:
    with pytest.raises(ValueError, match="the PIT cannot tick") as error:
        guests.load("tick-pic", hz=hz)
    message = one_line(error)
    assert str(hz) in message
    assert "18.2 to 1193181" in message


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("ticks", -1),
        ("ticks", 1 << 32),
        ("ticks", 1.5),
        ("ticks", True),
        ("divisor", 0),
        ("divisor", 65537),
        ("param_ms", -1),
        ("param_ms", 3_600_001),
        ("tsc_khz", 0),
        ("tsc_khz", 10_000_001),
        ("flags", 1 << 32),
    ],
)
def test_values_out_of_range_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match="give a whole number from") as error:
        guests.load("tick-pic", **{argument: value})  # type: ignore[arg-type]
    assert f"{argument}={value!r}" in one_line(error)


def test_rate_and_count_together_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of them") as error:
        guests.load("tick-pic", hz=100, divisor=1193)
    one_line(error)


def test_unknown_name() -> None:
    with pytest.raises(guests.UnknownGuestError) as error:
        guests.load("tick-pik")
    message = one_line(error)
    assert "'tick-pik'" in message
    assert "did you mean 'tick-pic'?" in message
    assert all(name in message for name in guests.names())
    with pytest.raises(guests.UnknownGuestError) as error:
        guests.load("../../secret")
    assert "did you mean" not in one_line(error)


# --- what a guest needs of its VMM ---------------------------------------------------------------


def routes(needs: Needs) -> list[tuple[int, ...]]:
    """The table as (gsi, irqchip, pin) and (gsi, address, data)."""
    table = gsi_routing(needs)
    assert table is not None
    read = []
    for entry in table:
        assert (entry.flags, entry.pad) == (0, 0)
        if entry.type == KVM_IRQ_ROUTING_MSI:
            assert entry.u.msi.address_hi == 0
            read.append((entry.gsi, entry.u.msi.address_lo, entry.u.msi.data))
        else:
            assert entry.type == KVM_IRQ_ROUTING_IRQCHIP
            read.append((entry.gsi, entry.u.irqchip.irqchip, entry.u.irqchip.pin))
    return read


def default_routes() -> list[tuple[int, ...]]:
    """Those KVM_CREATE_IRQCHIP makes, of GSIs 1..23."""
    master, slave = KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
    pics = [(gsi, slave if gsi > 7 else master, gsi % 8) for gsi in range(1, 16)]
    return pics + [(gsi, KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(1, 24)]


@pytest.mark.parametrize("name", sorted(set(ALL) - {"tick-lapic", "tick-x2apic"}))
def test_who_needs_what(name: str) -> None:
    expected = {
        "tick-ioapic": Needs(gsi0="ioapic-pin-2"),
        "tick-msi": Needs(gsi0="msi", msi_vector=0x43, reinject=False),
        "ipi-tick": Needs(vcpus=2),
        "tick-long": Needs(gsi0="ioapic-pin-2", cpuid=()),
        "exceptions": Needs(cpuid=()),
    }
    assert guests.load(name).needs == expected.get(name, DEFAULT_NEEDS)


def test_the_default_needs_no_table_and_x2apic_a_cpuid() -> None:
    assert gsi_routing(DEFAULT_NEEDS) is None
    assert gsi_routing(Needs(vcpus=2, cpuid=())) is None
    assert guests.load("tick-x2apic").needs == Needs(tick_source="lapic", cpuid=("x2apic",))


def test_gsi_0_on_ioapic_pin_2_alone() -> None:
    table = routes(Needs(gsi0="ioapic-pin-2"))
    assert table[:2] == [(0, KVM_IRQCHIP_PIC_MASTER, 0), (0, KVM_IRQCHIP_IOAPIC, 2)]
    assert sorted(table[2:]) == sorted(set(default_routes()) - {(2, KVM_IRQCHIP_IOAPIC, 2)})
    pins = [route[1:] for route in table]
    assert len(pins) == len(set(pins))


def test_gsi_0_as_a_message_alone() -> None:
    table = routes(Needs(gsi0="msi", msi_vector=0x43))
    assert table[0] == (0, MSI_ADDRESS, 0x43)
    assert sorted(table[1:]) == sorted(default_routes())


# --- scenarios ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda s: s.name)
def test_scenario_image(scenario: Scenario) -> None:
    guest = scenario.guest(tsc_khz=2_000_000)
    ops = [
        Op(Code(code), arg16, arg32)
        for code, arg16, arg32 in struct.iter_unpack("<HHI", guest.image[SCRIPT_AT:])
    ]
    assert tuple(ops) == scenario.ops()
    assert ops[-1] == end(EXIT_CODE)
    assert guests.Parameters.read(guest.image, 4).tsc_khz == 2_000_000
    assert Results.read(in_memory(guest.image)) == Results(0, (0,) * 128, (0,) * 16, 0)


def test_scenario_writes_the_ports_of_the_recorded_trace() -> None:
    """The writes in `picmask_1.txt`, but for the handlers' EOIs."""
    assert SCENARIOS["picmask"].writes() == (
        (0x20, 1, 0x11),
        (0x21, 1, 0x20),
        (0x21, 1, 0x04),
        (0x21, 1, 0x01),
        (0x21, 1, 0xFE),
        (0xA1, 1, 0xFF),
        (0x43, 1, 0x34),
        (0x40, 1, 0xA9),
        (0x40, 1, 0x04),
        (0x21, 1, 0xFF),
        (0x21, 1, 0xFE),
        (0xF4, 1, 0x5A),
    )
    assert (0xD8, 4, 50_000) in SCENARIOS["notrun"].writes()
    for scenario in SCENARIOS.values():
        assert scenario.writes()[: len(PIC_INIT)] == PIC_INIT


def test_a_count_of_65536_is_written_as_0() -> None:
    assert [op.arg32 for op in pit(65536)] == [0x34, 0, 0]


def test_scenario_results_are_read_from_guest_memory() -> None:
    memory = bytearray(in_memory(SCENARIOS["base"].guest().image))
    base = guests.LOAD_AT
    struct.pack_into("<128I", memory, base + RESULTS_AT, *range(1, 129))
    struct.pack_into("<16I", memory, base + VECTORS_AT, *range(201, 217))
    struct.pack_into("<I", memory, base + NMIS_AT, 301)
    struct.pack_into("<I", memory, base + FAULTS_AT, 302)
    struct.pack_into("<256I", memory, base + APIC_VECTORS_AT, *range(400, 656))
    struct.pack_into("<I", memory, guests.PARAMETERS.counter, 77)
    assert Results.read(memory) == Results(
        77, tuple(range(1, 129)), tuple(range(201, 217)), 301, 302, tuple(range(400, 656))
    )


def test_apic_operations() -> None:
    assert mmio_write(0x1234_5678, 0xFF, 1) == (
        Op(Code.ADDR, 0, 0x1234_5678),
        Op(Code.MMIO_W8, 0, 0xFF),
    )
    assert mmio_read(0x1234_5678, 5, 2) == (Op(Code.ADDR, 0, 0x1234_5678), Op(Code.MMIO_R16, 5))
    assert lapic_read(0x20, 1) == mmio_read(0xFEE0_0020, 1)
    assert ioapic_write(0x14, 0x40) == (
        *mmio_write(0xFEC0_0000, 0x14),
        *mmio_write(0xFEC0_0010, 0x40),
    )
    assert wrmsr(0x6E0, 0x1_0000_0002) == (
        Op(Code.ADDR, 0, 0x6E0),
        Op(Code.MSR_HI, 0, 1),
        Op(Code.WRMSR, 0, 2),
    )
    assert rdmsr(0x1B, 3) == (Op(Code.ADDR, 0, 0x1B), Op(Code.RDMSR, 3))
    assert x2apic_write(0x3E0, 0xB) == wrmsr(0x83E, 0xB)


def test_a_scenario_hands_on_what_it_needs() -> None:
    needs = Needs(gsi0="ioapic-pin-2", cpuid=("x2apic",))
    assert Scenario("needy", "needs", (end(),), needs).guest().needs is needs
    assert SCENARIOS["base"].guest().needs == DEFAULT_NEEDS


def test_bad_scripts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must end with end\(\)"):
        Scenario("open", "no end", (nop(),)).guest()
    with pytest.raises(ValueError, match="operations, 3584 fit"):
        Scenario("long", "too long", ((nop(),) * 3584, end())).guest()
