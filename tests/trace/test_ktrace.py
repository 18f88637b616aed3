"""Recordings: what was written is read, and what became of the file is told, never raised."""

import contextlib
import gzip
import io
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import decode, decoder, kernel

from kvmtick.trace.events import Event, Record
from kvmtick.trace.formats import FormatError
from kvmtick.trace.ktrace import MAGIC, Header, KtraceReader, KtraceWriter
from kvmtick.trace.reading import open_trace
from kvmtick.trace.vms import VmInfo

KERNEL = kernel()
RUN = KERNEL["runs"]["tick-if0"]
PAGES = [(cpu, bytes.fromhex(page)) for cpu, page in RUN["pages"]]
CHUNK = struct.Struct("<BxHI")
HEADER, PAGE, MARK, UPDATE, END = range(1, 6)
LOST = int(Event.LOST_EVENTS)


def header(**changes: Any) -> Header:
    """Of the recordings' kernel."""
    told = {
        "kind": "host",
        "header_page": KERNEL["header_page"],
        "formats": KERNEL["formats"],
        "functions": KERNEL["functions"],
        "vms": [VmInfo(7, "a guest", {71: "CPU 0/KVM"}, {71: 0}, True)],
    }
    return Header(**{**told, **changes})


def recording(pages: list[tuple[int, bytes]] = PAGES, **changes: Any) -> bytes:
    """A whole file."""
    file = io.BytesIO()
    writer = KtraceWriter(file, header(**changes))
    for cpu, page in pages:
        writer.page(cpu, page)
    writer.update([VmInfo(7, "a guest", {71: "CPU 0/KVM", 72: "kvm-pit/7"}, {71: 0}, True)])
    writer.end(9_000, 3)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(path: Path) -> tuple[list[Record], KtraceReader]:
    """All records, in order, and the reader."""
    with open_trace(path) as trace:
        assert isinstance(trace, KtraceReader)
        records = [record for batch in trace.batches() for record in batch]
        times = [record[0] for record in records]
        assert times == sorted(times)
        return records, trace


WHOLE = recording()
EXPECTED = decode(RUN, decoder(KERNEL))
HEADER_END = len(MAGIC) + CHUNK.size + CHUNK.unpack_from(WHOLE, len(MAGIC))[2]


def without_tasks(records: list[Record]) -> list[Record]:
    """Named threads have other indices."""
    return [(*record[:2], *record[3:]) for record in records]


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_written_is_read(tmp_path: Path, packed: bool) -> None:
    data = gzip.compress(WHOLE) if packed else WHOLE
    records, trace = read(write(tmp_path / "a.ktrace", data))
    assert without_tasks(records) == without_tasks(EXPECTED)
    assert (trace.cut, trace.unknown, trace.lost, trace.is_complete) == ("", 0, 3, False)
    assert trace.vms == [VmInfo(7, "a guest", {71: "CPU 0/KVM", 72: "kvm-pit/7"}, {71: 0}, True)]
    assert {"CPU 0/KVM-71", "kvm-pit/7-72"} <= set(trace.tasks)
    assert Event.KVM_SET_IRQ in trace.events
    assert Event.SCHED_SWITCH not in trace.events


def test_marks_let_records_go_and_change_nothing(tmp_path: Path) -> None:
    file = io.BytesIO()
    writer = KtraceWriter(file, header())
    middle_ns = EXPECTED[len(EXPECTED) // 2][0]
    for cpu, page in PAGES:
        writer.page(cpu, page)
    for ts_ns in (0, middle_ns, middle_ns):
        writer.mark(ts_ns)
    writer.end(0, 0)
    with open_trace(write(tmp_path / "a.ktrace", file.getvalue())) as trace:
        batches = list(trace.batches())
    assert [record[0] < middle_ns for record in batches[1]] == [True] * len(batches[1])
    assert len(batches[1]) > 10
    assert without_tasks([record for batch in batches for record in batch]) == without_tasks(
        EXPECTED
    )


def test_every_prefix_gives_what_it_has_or_is_refused(tmp_path: Path) -> None:
    draw = random.Random(1)
    near = range(max(0, HEADER_END - 20), HEADER_END + 40)
    ends = {*range(20), *near, *range(len(WHOLE) - 90, len(WHOLE))}
    ends |= set(draw.sample(range(len(WHOLE)), 60))
    most = 0
    for end in sorted(ends):
        path = write(tmp_path / "a.ktrace", WHOLE[:end])
        if end < HEADER_END:
            with pytest.raises(FormatError) as told:
                open_trace(path)
            assert "\n" not in str(told.value)
            continue
        records, trace = read(path)
        assert trace.cut
        assert len(records) >= most, "more of the file is more records"
        most = len(records)
        assert set(without_tasks(records)) <= set(without_tasks(EXPECTED))
    assert most == len(EXPECTED)


def test_every_prefix_of_a_packed_file(tmp_path: Path) -> None:
    packed = gzip.compress(WHOLE)
    refused = 0
    for end in range(0, len(packed), 97):
        try:
            records, trace = read(write(tmp_path / "a.ktrace", packed[:end]))
        except FormatError:
            refused += 1
            continue
        assert trace.cut or (end > len(packed) - 32 and len(records) == len(EXPECTED))
    assert 0 < refused < 0.9 * len(packed) / 97, "only where the header was cut"


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    behind_header=st.booleans(),
    packed=st.booleans(),
)
def test_damage_never_raises_anything_but_a_format_error(
    tmp_path_factory: pytest.TempPathFactory,
    flips: list[tuple[int, int]],
    behind_header: bool,
    packed: bool,
) -> None:
    data = bytearray(WHOLE)
    for at, value in flips:
        if behind_header:
            at = HEADER_END + at % (len(WHOLE) - HEADER_END)
        data[at] = value
    if packed:
        data = bytearray(gzip.compress(bytes(data)))
        data[flips[0][0] % len(data)] ^= 1 + flips[0][1] % 255
    path = write(tmp_path_factory.getbasetemp() / "flipped.ktrace", bytes(data))
    with contextlib.suppress(FormatError):
        read(path)


def test_a_damaged_page_is_left_out_and_counted(tmp_path: Path) -> None:
    (cpu, page), *_ = PAGES
    bad = page[:16] + bytes(len(page) - 16)
    by = decoder(KERNEL)
    good = without_tasks(by.decode(page, cpu))
    records, trace = read(write(tmp_path / "a.ktrace", recording([(cpu, bad), (cpu, page)])))
    assert without_tasks(records) == [(good[0][0], LOST, cpu, -1), *good]
    assert trace.unknown == 1
    records, trace = read(write(tmp_path / "a.ktrace", recording([(cpu, page), (cpu, bad)])))
    assert without_tasks(records) == [*good, (good[-1][0], LOST, cpu, -1)]
    assert (trace.unknown, trace.cut) == (1, "")


def test_a_chunk_that_cannot_be_one_ends_the_reading(tmp_path: Path) -> None:
    for kind, length in ((9, 0), (PAGE, 1 << 21), (MARK, 9)):
        data = WHOLE[:HEADER_END] + CHUNK.pack(kind, 0, length) + WHOLE[HEADER_END:]
        records, trace = read(write(tmp_path / "a.ktrace", data))
        assert records == []
        assert trace.cut == (
            f"the file is damaged: a chunk of kind {kind} and {length} bytes;"
            " what follows was not read"
        )


def test_what_a_chunk_says_wrongly_is_counted(tmp_path: Path) -> None:
    bad = [
        CHUNK.pack(MARK, 0, 3) + b"abc",
        *(
            CHUNK.pack(UPDATE, 0, len(text)) + text
            for text in (
                b"\xff",
                b"[]",
                b'{"vms": 3}',
                b'{"vms": [{"pid": 1e999}]}',
                b"[" * 100_000,
                b"1" * 5_000,
                b'{"vms": [{"pid": 1, "name": 1, "threads": [], "vcpus": {}, "reinject": 1}]}',
            )
        ),
    ]
    data = WHOLE[:HEADER_END] + b"".join(bad) + WHOLE[HEADER_END:]
    records, trace = read(write(tmp_path / "a.ktrace", data))
    assert len(records) == len(EXPECTED)
    assert (trace.unknown, trace.cut) == (len(bad), "")


def with_header(payload: bytes) -> bytes:
    """A file with another header."""
    return MAGIC + CHUNK.pack(HEADER, 0, len(payload)) + payload + WHOLE[HEADER_END:]


def test_a_header_of_a_later_version_may_have_more_and_less(tmp_path: Path) -> None:
    told = header().as_dict()
    for name in ("start_ns", "origin", "missing", "vms"):
        del told[name]
    told["news"] = {"of": "later"}
    records, trace = read(write(tmp_path / "a.ktrace", with_header(json.dumps(told).encode())))
    assert len(records) == len(EXPECTED)
    assert (trace.header.origin, trace.header.start_ns) == ("", 0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 2}, "version 2, this kvmtick reads 1: update it"),
        ({"kind": "other"}, "kind 'other' is none of host, model"),
        ({"formats": 7}, "TypeError"),
        ({"formats": ["x"]}, "no event format"),
        ({"functions": []}, "AttributeError"),
        ({"functions": {"nowhere": "pit_timer_fn"}}, "ValueError"),
        ({"header_page": ""}, "no page header"),
        ({"vms": [{}]}, "KeyError"),
        ({"start_ns": float("inf")}, "OverflowError"),
    ],
)
def test_a_header_that_says_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    payload = json.dumps({**header().as_dict(), **change}).encode()
    with pytest.raises(FormatError) as told:
        open_trace(write(tmp_path / "a.ktrace", with_header(payload)))
    assert what in str(told.value)
    assert "record it anew" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("payload", [b"", b"{", b"[1]", b"[" * 100_000, b"9" * 9_000, b"\xff\xfe"])
def test_a_header_that_is_no_json_is_refused(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(FormatError, match="header cannot be read"):
        open_trace(write(tmp_path / "a.ktrace", with_header(payload)))


def test_a_format_with_impossible_places_is_refused(tmp_path: Path) -> None:
    text = next(text for text in KERNEL["formats"] if "name: kvm_set_irq\n" in text)
    for bad in (
        text.replace("offset:12;", "offset:999999999;"),
        text.replace("offset:12;", "offset:9;"),
        text.replace("size:4;", "size:3;"),
        text.replace("common_pid", "common_tid"),
    ):
        data = with_header(json.dumps(header(formats=[bad]).as_dict()).encode())
        with pytest.raises(FormatError, match="header cannot be read"):
            open_trace(write(tmp_path / "a.ktrace", data))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises((FormatError, OSError), match="no regular file"):
            open_trace(path)
    with pytest.raises(FormatError):
        open_trace(write(tmp_path / "empty", b""))
    with pytest.raises(FileNotFoundError):
        open_trace(tmp_path / "nothing")


def test_without_marks_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of two CPUs, a hundred times, as a recorder that never marked would leave them."""
    monkeypatch.setattr("kvmtick.trace.ktrace._MOST_WAITING", 500)
    cpu, page = PAGES[0]
    first_ns = int.from_bytes(page[:8], "little")
    pages = [
        (each, (first_ns + n * 1_000_000_000).to_bytes(8, "little") + page[8:])
        for n in range(100)
        for each in (0, 1)
    ]
    with open_trace(write(tmp_path / "a.ktrace", recording(pages))) as trace:
        batches = list(trace.batches())
    assert max(map(len, batches)) < 1_000
    records = [record for batch in batches for record in batch]
    assert len(records) == 200 * len(decoder(KERNEL).decode(page, cpu))
    assert [record[0] for record in records] == sorted(record[0] for record in records)
    assert LOST not in {record[1] for record in records}
