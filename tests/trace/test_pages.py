"""Pages built by hand: every kind of entry that `header_event` names, and what is no page."""

import struct

import pytest

from kvmtick.trace.decoder import Decoder
from kvmtick.trace.events import Event
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


ID = 9
FORMAT = f"""\
name: kvm_ack_irq
ID: {ID}
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
\tfield:unsigned int irqchip;\toffset:8;\tsize:4;\tsigned:0;
\tfield:int pin;\toffset:12;\tsize:4;\tsigned:1;
"""
WORDS = 4


def event(delta_ns: int, irqchip: int, pin: int = -1) -> bytes:
    """An event that the decoder knows."""
    return entry(WORDS, delta_ns, ID, 0, irqchip, pin & 0xFFFF_FFFF)


def decode(raw: bytes) -> list[tuple[int, ...]]:
    """Times and fields of a page's records."""
    by = Decoder(HEADER, [FORMAT], {})
    return [(record[0], *record[3:]) for record in by.decode(raw)]


def test_times_are_since_the_entry_before() -> None:
    assert decode(page(event(5, 0xA), event(7, 0xB, 3))) == [(1005, 0xA, -1), (1012, 0xB, 3)]


def test_a_length_of_0_is_in_the_first_word() -> None:
    raw = page(entry(0, 1, 4 + 16, ID, 0, 1, 2), event(1, 3))
    assert decode(raw) == [(1001, 1, 2), (1002, 3, -1)]


def test_an_event_that_nobody_knows_is_skipped_and_takes_its_time() -> None:
    raw = page(entry(1, 3, ID + 1), entry(0, 3, 4 + 8, ID + 2, 0), event(1, 3))
    assert decode(raw) == [(1007, 3, -1)]


def test_an_extended_time() -> None:
    raw = page(event(0, 1), entry(TIME_EXTEND, 3, 2), event(4, 2))
    assert [ns for ns, *_ in decode(raw)] == [1000, 1000 + (2 << 27) + 3 + 4]


def test_a_page_may_end_with_a_time() -> None:
    assert [ns for ns, *_ in decode(page(event(0, 1), entry(TIME_EXTEND, 3, 2)))] == [1000]


def test_an_absolute_time_keeps_the_bits_above_it() -> None:
    high = 5 << 59
    body = event(0, 1) + entry(TIME_STAMP, 9, 3) + event(1, 2)
    raw = struct.pack("<QQ", high + 77, len(body)) + body
    assert [ns for ns, *_ in decode(raw)] == [high + 77, high + (3 << 27) + 9 + 1]


def test_a_time_stamp_that_goes_back_is_told() -> None:
    with pytest.raises(FormatError, match="a time stamp of 9 ns comes after 1001 ns"):
        decode(page(event(1, 1), entry(TIME_STAMP, 9, 0), event(1, 2)))


def test_padding_is_skipped_and_padding_without_time_ends_the_page() -> None:
    discarded = entry(PADDING, 1, 8, 0xDEAD)
    raw = page(event(1, 1), discarded, event(1, 2), entry(PADDING, 0, 0), event(1, 3))
    assert [irqchip for _, irqchip, _ in decode(raw)] == [1, 2]


def test_an_empty_page() -> None:
    assert decode(page()) == []


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
    raw = page(event(1, 1), flags=flags, behind=behind)
    assert LAYOUT.read(raw).missed == missed
    records = Decoder(HEADER, [FORMAT], {}).decode(raw, 3)
    lost = [(FIRST_NS, int(Event.LOST_EVENTS), 0, 3, missed)] if missed else []
    idle = 1  # of CPU 3
    assert records == [*lost, (FIRST_NS + 1, int(Event.KVM_ACK_IRQ), idle, 1, -1)]


def test_a_header_that_lies_elsewhere() -> None:
    text = HEADER.replace("offset:0;", "offset:8;").replace(
        "commit;\toffset:8;", "commit;\toffset:0;"
    )
    raw = page(event(5, 1))
    swapped = raw[8:16] + raw[:8] + raw[16:]
    assert PageLayout(text).read(swapped) == LAYOUT.read(raw)
    assert len(Decoder(text, [FORMAT], {}).decode(swapped)) == 1


@pytest.mark.parametrize(
    "raw",
    [
        page(entry(5, 1, 1)),
        page(entry(0, 1, 64, 1)),
        page(entry(0, 1, 4)),
        page(entry(0, 1)),
        page(entry(TIME_EXTEND, 1)),
        page(entry(PADDING, 1, 64)),
        page(event(1, 1)[:-4]),
        page(event(1, 1), event(1, 1)[:4]),
    ],
)
def test_an_entry_that_passes_the_end_is_told(raw: bytes) -> None:
    with pytest.raises(FormatError, match="passes the page's end"):
        Decoder(HEADER, [FORMAT], {}).decode(raw)


def test_an_event_that_is_shorter_than_its_format_is_told() -> None:
    with pytest.raises(FormatError, match="an event of 12 bytes is too short for 16"):
        Decoder(HEADER, [FORMAT], {}).decode(page(entry(3, 1, ID, 0, 1), event(1, 1)))
