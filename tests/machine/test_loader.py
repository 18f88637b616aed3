"""Foreign images: where they go, where they start, what is refused and in which words."""

import os
from pathlib import Path

import pytest

from kvmtick.machine.loader import LoadError, load_file

BOOT = b"\xf4" + bytes(509) + b"\x55\xaa"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "guest.img"


def test_a_boot_sector_goes_to_7c00(image: Path) -> None:
    image.write_bytes(BOOT)
    guest = load_file(image)
    assert (guest.name, guest.image) == ("guest.img", BOOT)
    assert (guest.load_at, guest.entry, guest.parameters) == (0x7C00, (0, 0x7C00), None)


@pytest.mark.parametrize(
    "data", [BOOT[:-2] + b"\xaa\x55", BOOT + b"\0", BOOT[:-1], b"\xf4", b"\x55\xaa"]
)
def test_anything_else_is_flat_and_goes_to_8000(image: Path, data: bytes) -> None:
    image.write_bytes(data)
    guest = load_file(image)
    assert (guest.load_at, guest.entry) == (0x8000, (0, 0x8000))


@pytest.mark.parametrize(
    ("load_at", "entry", "start"),
    [
        (0x1000, None, (0, 0x1000)),
        (0x1_0000, None, (0x1000, 0)),
        (0x8000, 0x8123, (0, 0x8123)),
        (0x2_0000, 0x2_FFFF, (0x2000, 0xFFFF)),
        (0, 0xF_FFFF, (0xF000, 0xFFFF)),
    ],
)
def test_addresses_become_real_mode_segments(
    image: Path, load_at: int, entry: int | None, start: tuple[int, int]
) -> None:
    image.write_bytes(b"\xf4")
    guest = load_file(image, load_at, entry)
    cs, ip = guest.entry
    assert guest.entry == start
    assert cs * 16 + ip == (load_at if entry is None else entry)


def test_an_image_may_end_where_real_mode_ends_and_not_behind(image: Path) -> None:
    image.write_bytes(bytes(0x10_0000 - 0x8000))
    assert load_file(image).load_at == 0x8000
    image.write_bytes(bytes(0x10_0000 - 0x8000 + 1))
    with pytest.raises(LoadError, match="does not fit at 0x8000: real mode ends at 0x100000"):
        load_file(image)


def test_what_cannot_be_loaded_is_named_with_the_remedy(image: Path) -> None:
    with pytest.raises(LoadError, match=r"guest\.img': No such file or directory: give"):
        load_file(image)
    with pytest.raises(LoadError, match="Is a directory: give a readable file"):
        load_file(image.parent)
    image.write_bytes(b"")
    with pytest.raises(LoadError, match="is empty: give a flat binary, a boot sector, "):
        load_file(image)
    image.write_bytes(b"\xf4")
    for load_at in (-1, 0x10_0000):
        with pytest.raises(LoadError, match=r"--load-at .* is out of real mode's reach"):
            load_file(image, load_at)
        with pytest.raises(LoadError, match=r"--entry .* is out of real mode's reach"):
            load_file(image, 0x8000, load_at)


def test_what_is_no_file_of_a_fitting_size_is_not_read(image: Path) -> None:
    os.mkfifo(image)
    for path in (image, Path("/dev/zero")):
        with pytest.raises(LoadError, match="is a device or a pipe: give a readable file"):
            load_file(path)
    image.unlink()
    image.touch()
    os.truncate(image, 1 << 40)
    with pytest.raises(LoadError, match="has 1099511627776 bytes: give a smaller file"):
        load_file(image)


def test_messages_are_one_line(image: Path) -> None:
    image.write_bytes(b"")
    with pytest.raises(LoadError) as caught:
        load_file(image)
    assert "\n" not in str(caught.value)
