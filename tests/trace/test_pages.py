"""Pages built by hand: every kind of entry that `header_event` names, and what is no page."""

import struct

import pytest

from kvmtick.trace.formats import FormatError
from kvmtick.trace.pages import UNKNOWN_COUNT, PageLayout

HEADER = """\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""
LAYOUT = PageLayout(HEADER)
PADDING, TIME_EXTEND, TIME_STAMP = 29, 30, 31
MISSED, COUNT_STORED = 1 << 31, 1 << 30
FIRST_NS = 1000


def entry(kind: int, delta_ns: int, *words: int) -> bytes:
    """An entry's word, and what follows."""
    return struct.pack(f"<I{len(words)}I", kind | delta_ns << 5, *words)


def page(*entries: bytes, flags: int = 0, behind: bytes = b"") -> bytes:
    """A page with these entries; `behind`: what comes after them."""
    data = b"".join(entries)
    return struct.pack("<QQ", FIRST_NS, len(data) | flags) + data + behind


def times_and_data(raw: bytes) -> list[tuple[int, bytes]]:
    """The events of a page."""
    return [(ns, raw[at : at + size]) for ns, at, size in LAYOUT.read(raw).events]


def test_times_are_since_the_entry_before() -> None:
    assert times_and_data(page(entry(1, 5, 0xA), entry(2, 7, 0xB, 0xC))) == [
        (1005, struct.pack("<I", 0xA)),
        (1012, struct.pack("<II", 0xB, 0xC)),
    ]


def test_a_length_of_0_is_in_the_first_word() -> None:
    raw = page(entry(0, 1, 12, 0xA, 0xB), entry(1, 1, 0xC))
    assert times_and_data(raw) == [
        (1001, struct.pack("<II", 0xA, 0xB)),
        (1002, struct.pack("<I", 0xC)),
    ]


def test_an_extended_time() -> None:
    raw = page(entry(1, 0, 1), entry(TIME_EXTEND, 3, 2), entry(1, 4, 2))
    assert [ns for ns, _ in times_and_data(raw)] == [1000, 1000 + (2 << 27) + 3 + 4]


def test_an_absolute_time_keeps_the_bits_above_it() -> None:
    high = 5 << 59
    raw = struct.pack("<QQ", high + 77, 24) + b"".join(
        (entry(1, 0, 1), entry(TIME_STAMP, 9, 3), entry(1, 1, 2))
    )
    assert [ns for ns, _ in times_and_data(raw)] == [high + 77, high + (3 << 27) + 9 + 1]


def test_padding_is_skipped_and_padding_without_time_ends_the_page() -> None:
    discarded = entry(PADDING, 1, 8, 0xDEAD)
    raw = page(entry(1, 1, 1), discarded, entry(1, 1, 2), entry(PADDING, 0, 0), entry(1, 1, 3))
    assert [data for _, data in times_and_data(raw)] == [
        struct.pack("<I", 1),
        struct.pack("<I", 2),
    ]


def test_an_empty_page() -> None:
    assert LAYOUT.read(page()).events == []


@pytest.mark.parametrize(
    ("flags", "behind", "missed"),
    [
        (0, struct.pack("<Q", 9), 0),
        (MISSED, struct.pack("<Q", 9), UNKNOWN_COUNT),
        (MISSED | COUNT_STORED, struct.pack("<Q", 9), 9),
        (MISSED | COUNT_STORED, b"", UNKNOWN_COUNT),
    ],
)
def test_what_was_lost_before_a_page(flags: int, behind: bytes, missed: int) -> None:
    taken = LAYOUT.read(page(entry(1, 1, 1), flags=flags, behind=behind))
    assert taken.missed == missed
    assert len(taken.events) == 1


def test_a_header_that_lies_elsewhere() -> None:
    text = HEADER.replace("offset:0;", "offset:8;").replace(
        "commit;\toffset:8;", "commit;\toffset:0;"
    )
    raw = page(entry(1, 5, 1))
    swapped = raw[8:16] + raw[:8] + raw[16:]
    assert PageLayout(text).read(swapped).events == LAYOUT.read(raw).events


@pytest.mark.parametrize(
    "raw",
    [
        page(entry(5, 1, 1)),
        page(entry(0, 1, 64, 1)),
        page(entry(0, 1, 4)),
        page(entry(0, 1)),
        page(entry(TIME_EXTEND, 1)),
    ],
)
def test_an_entry_that_passes_the_end_is_told(raw: bytes) -> None:
    with pytest.raises(FormatError, match="passes the page's end"):
        LAYOUT.read(raw)
