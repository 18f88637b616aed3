"""The kernel's ring buffer as `per_cpu/cpu*/trace_pipe_raw` hands it out: the head of a page.

Sources: `events/header_page` and `events/header_event` of tracefs, which describe a page's header
and the word before each event; Documentation/trace/ring-buffer-design.rst and ring-buffer-map.rst.
What follows the head is decoded by `kvmtick.trace.decoder`.

Not modelled: pages of a machine of the other byte order.
"""

from dataclasses import dataclass
from typing import Final

from kvmtick.trace.formats import FormatError, parse_fields

__all__ = ["COUNT_STORED", "MISSED", "UNKNOWN_COUNT", "Page", "PageLayout"]

UNKNOWN_COUNT: Final = -1
"""Events are missing before a page, nobody says how many."""

MISSED: Final = 1 << 31
"""In a page's length: events were lost before it."""
COUNT_STORED: Final = 1 << 30
"""In a page's length: how many were lost stands behind its events, in 8 bytes."""
_LENGTH: Final = (1 << 27) - 1
_COUNT_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Page:
    """What a page's head says."""

    first_ns: int
    """The time its events count from."""
    start: int
    """Where the events start."""
    end: int
    """Where they end."""
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
        """Read a page's head. Raises `FormatError` where it ends too early."""
        first_ns = self._number(page, self._time.offset, self._time.size)
        commit = self._number(page, self._commit.offset, self._commit.size)
        end = self._data + (commit & _LENGTH)
        if end > len(page):
            raise FormatError(f"a page of {len(page)} bytes cannot hold {end}: it was cut short")
        return Page(first_ns, self._data, end, _missed(page, commit, end))

    @staticmethod
    def _number(page: bytes, offset: int, size: int) -> int:
        if offset + size > len(page):
            raise FormatError(f"a page of {len(page)} bytes has no header: it was cut short")
        return int.from_bytes(page[offset : offset + size], "little")


def _missed(page: bytes, commit: int, end: int) -> int:
    if not commit & MISSED:
        return 0
    if commit & COUNT_STORED and end + _COUNT_BYTES <= len(page):
        return int.from_bytes(page[end : end + _COUNT_BYTES], "little")
    return UNKNOWN_COUNT
