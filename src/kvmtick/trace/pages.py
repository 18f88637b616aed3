"""The kernel's ring buffer as `per_cpu/cpu*/trace_pipe_raw` hands it out: pages of raw events.

Sources: `events/header_page` and `events/header_event` of tracefs, which describe a page's header
and the word before each event; Documentation/trace/ring-buffer-design.rst and ring-buffer-map.rst.

Not modelled: pages of a machine of the other byte order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvmtick.trace.formats import FormatError, parse_fields

__all__ = ["UNKNOWN_COUNT", "Page", "PageLayout"]

UNKNOWN_COUNT = -1
"""Events are missing before a page, nobody says how many."""

_LENGTH = (1 << 27) - 1
_MISSED = 1 << 31
_MISSED_COUNT_STORED = 1 << 30
_COUNT_BYTES = 8

_TYPE_BITS = 5
_TYPE_MASK = (1 << _TYPE_BITS) - 1
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_DELTA_BITS = 27
_WORD = 4
_STAMP_BITS = 59
"""What a time stamp event holds; the bits above are those of the time before it."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page: the events as `(time, offset, size)` of their bytes in `data`."""

    data: bytes
    events: list[tuple[int, int, int]]
    first_ns: int
    end: int
    """Where the events end in `data`."""
    missed: int
    """How many events were lost before it; `UNKNOWN_COUNT` if that is not stored."""


class PageLayout:
    """How this kernel's pages are laid out, from the text of `events/header_page`."""

    def __init__(self, header_page: str) -> None:
        fields = parse_fields(header_page)
        if not {"timestamp", "commit", "data"} <= fields.keys():
            raise FormatError(f"no page header: {header_page[:40]!r}; give events/header_page")
        self._time = fields["timestamp"]
        self._commit = fields["commit"]
        self._data = fields["data"].offset

    def read(self, page: bytes) -> Page:
        """Take a page apart. Raises `FormatError` where it ends too early."""
        first_ns = self._number(page, self._time.offset, self._time.size)
        commit = self._number(page, self._commit.offset, self._commit.size)
        end = self._data + (commit & _LENGTH)
        if end > len(page):
            raise FormatError(f"a page of {len(page)} bytes cannot hold {end}: it was cut short")
        events = list(_events(page, self._data, end, first_ns))
        return Page(page, events, first_ns, end, _missed(page, commit, end))

    @staticmethod
    def _number(page: bytes, offset: int, size: int) -> int:
        if offset + size > len(page):
            raise FormatError(f"a page of {len(page)} bytes has no header: it was cut short")
        return int.from_bytes(page[offset : offset + size], "little")


def _missed(page: bytes, commit: int, end: int) -> int:
    if not commit & _MISSED:
        return 0
    if commit & _MISSED_COUNT_STORED and end + _COUNT_BYTES <= len(page):
        return int.from_bytes(page[end : end + _COUNT_BYTES], "little")
    return UNKNOWN_COUNT


def _events(page: bytes, at: int, end: int, now_ns: int) -> Iterator[tuple[int, int, int]]:
    """`header_event`: 5 bits of type or length in words, 27 bits of time since the event before."""
    while at + _WORD <= end:
        word = _u32(page, at, end)
        kind, delta_ns = word & _TYPE_MASK, word >> _TYPE_BITS
        at += _WORD
        if kind == _PADDING:
            if not delta_ns:
                return
            at += _u32(page, at, end)
        elif kind == _TIME_EXTEND:
            now_ns += (_u32(page, at, end) << _DELTA_BITS) + delta_ns
            at += _WORD
        elif kind == _TIME_STAMP:
            low_ns = (_u32(page, at, end) << _DELTA_BITS) + delta_ns
            now_ns = now_ns >> _STAMP_BITS << _STAMP_BITS | low_ns
            at += _WORD
        else:
            now_ns += delta_ns
            # Length 0: the first word of the data says how long both are.
            size = kind * _WORD if kind else _u32(page, at, end) - _WORD
            if not kind:
                at += _WORD
            if size <= 0 or at + size > end:
                raise FormatError(f"an event of {size} bytes at {at} passes the page's end {end}")
            yield now_ns, at, size
            at += size


def _u32(page: bytes, at: int, end: int) -> int:
    if at + _WORD > end:
        raise FormatError(f"an event's word at {at} passes the page's end {end}")
    return int.from_bytes(page[at : at + _WORD], "little")
