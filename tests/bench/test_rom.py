"""The ROM that starts a guest elsewhere: bytes and sources agree, the guest's own bytes stay."""

import shutil
from pathlib import Path

import pytest

from kvmtick import bench, guests
from kvmtick.bench.guest_code import loop
from kvmtick.bench.rom import ENDED, ROM_BYTES, exit_and_count, rom_of
from kvmtick.guests import LOAD_AT, build

SOURCES = build.sources(Path(bench.__file__).parent)
END = bytes.fromhex("faf4ebfc")


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm not found: sources not assembled")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_source_and_bytes_agree(source: Path) -> None:
    assert build.assemble(source) == source.with_suffix(".bin").read_bytes(), (
        "run `python -m kvmtick.guests.build`"
    )


@pytest.mark.parametrize("name", ["tick-pic", "tick-ioapic", "tick-lapic"])
def test_only_the_end_of_a_guest_is_changed(name: str) -> None:
    image = guests.load(name, ticks=7).image
    rom = rom_of(image)
    assert len(rom) == ROM_BYTES
    at = image.index(END)
    assert [i for i in range(len(image)) if image[i] != rom[i]] == [at, at + 1, at + 2]
    assert rom[at] == 0xE9
    distance = int.from_bytes(rom[at + 1 : at + 3], "little", signed=True)
    assert (LOAD_AT + at + 3 + distance) & 0xFFFF == ENDED


def test_the_reset_vector_is_a_jump_within_the_rom() -> None:
    rom = rom_of(loop("registers", 1).image)
    assert rom[-16] == 0xE9
    assert 0xFE00 <= (0xFFF3 + int.from_bytes(rom[-15:-13], "little", signed=True)) < 0xFFF0


@pytest.mark.parametrize("image", [b"", END + b"\0" + END, END + bytes(0x6000)])
def test_what_is_no_guest_is_refused(image: bytes) -> None:
    with pytest.raises(ValueError, match="the guest"):
        rom_of(image)


def test_what_a_guest_says() -> None:
    assert exit_and_count("00 000493e0\n") == (0, 300_000)
    assert exit_and_count("ff 00000000\n") == (255, 0)


@pytest.mark.parametrize(
    "said", ["", "00 000493e", "00 000493e0", "\x10\x10 00000000\n", "0 12345678\n"]
)
def test_a_line_that_was_cut_is_no_count(said: str) -> None:
    with pytest.raises(ValueError, match="how the guest ended"):
        exit_and_count(said)
