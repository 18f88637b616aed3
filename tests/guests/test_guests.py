"""The built-in guests: bytes and sources agree, the parameter block is where it is said to be."""

import shutil
import struct
from dataclasses import fields

import pytest

from kvmtick import guests
from kvmtick.guests import build

from .scenarios import (
    EXIT_CODE,
    PIC_INIT,
    RESULTS_AT,
    SCENARIOS,
    SCRIPT_AT,
    Code,
    Op,
    Results,
    Scenario,
    end,
    nop,
    pit,
)

ALL = [source.stem for source in build.sources()]


def in_memory(image: bytes, at: int = guests.LOAD_AT) -> bytes:
    """Guest RAM from address 0 on with `image` in it."""
    return bytes(at) + image


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm not found: sources not assembled")
@pytest.mark.parametrize("name", ALL)
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
    guest = guests.load(
        name, ticks=7, divisor=65536, param_ms=12, tsc_khz=2_596_122, flags=0x8000_0001
    )
    read = guests.Parameters.read(in_memory(guest.image))
    assert read == guests.Parameters.read(guest.image, at=4)
    assert read == guests.Parameters(
        count=7,
        divisor=65536,
        counter=0,
        tsc_khz=2_596_122,
        param_ms=12,
        flags=0x8000_0001,
        period_ns=guests.Parameters.read(guest.image, at=4).period_ns,
        reserved=0,
        snapshot=(0,) * 8,
    )


@pytest.mark.parametrize("name", ALL)
def test_defaults_are_those_in_the_source(name: str) -> None:
    raw = (build.HERE / f"{name}.bin").read_bytes()
    assert guests.load(name).image == raw
    read = guests.Parameters.read(raw, at=4)
    assert (read.count, read.divisor, read.tsc_khz, read.param_ms) == (1000, 1193, 1_000_000, 50)


def test_each_field_is_read_from_its_own_address() -> None:
    at = guests.PARAMETERS
    memory = bytearray(in_memory(guests.load("tick-pic").image))
    names = ["count", "divisor", "counter", "tsc_khz", "param_ms", "flags"]
    for number, name in enumerate(names):
        struct.pack_into("<I", memory, getattr(at, name), 100 + number)
    struct.pack_into("<2I", memory, at.reserved, 200, 201)
    struct.pack_into("<8I", memory, at.snapshot, *range(300, 308))
    read = guests.Parameters.read(memory)
    assert [getattr(read, name) for name in names] == [100, 101, 102, 103, 104, 105]
    assert read.reserved == (200, 201)
    assert read.snapshot == tuple(range(300, 308))
    assert {field.name for field in fields(read)} == {*names, "reserved", "snapshot"}
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
    assert Results.read(in_memory(guest.image)) == Results(0, (0,) * 32, (0,) * 16, 0)


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
    base = guests.LOAD_AT + RESULTS_AT
    struct.pack_into("<49I", memory, base, *range(1, 50))
    struct.pack_into("<I", memory, guests.PARAMETERS.counter, 77)
    assert Results.read(memory) == Results(77, tuple(range(1, 33)), tuple(range(33, 49)), 49)


def test_bad_scripts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must end with end\(\)"):
        Scenario("open", "no end", (nop(),)).guest()
    with pytest.raises(ValueError, match="operations, 3840 fit"):
        Scenario("long", "too long", ((nop(),) * 3840, end())).guest()
