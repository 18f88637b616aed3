"""What tracefs says of its own layout: an event's `format` file and `events/header_page`.

Source: Documentation/trace/events.rst, "Event formats". Offsets and sizes are taken from the text,
never from a kernel version.

Not modelled: fields of variable length (`__data_loc`), arrays.
"""

import re
from dataclasses import dataclass

__all__ = ["EventFormat", "Field", "FormatError", "parse_fields", "parse_format"]

_PLACE = re.compile(r"offset:(\d{1,9});size:(\d{1,9});signed:([01])")
_NAME = re.compile(r"^name: (\S+)$", re.MULTILINE)
_ID = re.compile(r"^ID: (\d{1,9})$", re.MULTILINE)


class FormatError(ValueError):
    """Text or bytes that are not what tracefs writes; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Field:
    """Where a field lies, in bytes from the start of what it is a field of."""

    offset: int
    size: int
    signed: bool


@dataclass(frozen=True, slots=True)
class EventFormat:
    """One event: its name, the id its records carry (`common_type`), its fields."""

    name: str
    id: int
    fields: dict[str, Field]


def parse_fields(text: str) -> dict[str, Field]:
    """The `field:` lines of a `format` file or of `header_page`, by name."""
    fields = {}
    for line in text.splitlines():
        declaration, *told = (part.strip() for part in line.split(";"))
        if declaration.startswith("field:"):
            match = _PLACE.fullmatch(";".join(told[:3]))
            words = declaration.removeprefix("field:").split()
            if match and words:
                offset, size, signed = match.groups()
                name = words[-1].lstrip("*").partition("[")[0]
                fields[name] = Field(int(offset), int(size), signed == "1")
    return fields


def parse_format(text: str) -> EventFormat:
    """An event's `format` file. Raises `FormatError`."""
    name, number = _NAME.search(text), _ID.search(text)
    if name is None or number is None:
        raise FormatError(f"no event format: {text[:40]!r}; give a format file of tracefs")
    return EventFormat(name[1], int(number[1]), parse_fields(text))
