"""Any bytes of an event, read as the fields that its format file says there are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtick.trace.event_reader import EventLayout
from kvmtick.trace.events import HAS_FUNCTION, TRACEPOINTS, Event, Function, Record
from kvmtick.trace.formats import EventFormat, Field

MAY_LACK = {"was_armed", "intr_info", "info1", "inhibits", "cpu"}
FUNCTIONS = {(1 << 64) - 5: Function.APIC_TIMER_FN, 7: Function.PIT_DO_WORK}
TS_NS, TASK, CPU, AT = 1 << 70, 12, 3, 5


@st.composite
def formats(draw: st.DrawFn) -> tuple[Event, EventFormat]:
    """An event whose fields have any size and sign, in any order, some of them missing."""
    event = draw(st.sampled_from(list(Event)))
    names = [
        name
        for name in draw(st.permutations(TRACEPOINTS[event].fields))
        if name != "cpu" and (name not in MAY_LACK or draw(st.booleans()))
    ]
    fields, offset = {}, 8
    for name in names:
        size = 8 if name == "function" else draw(st.sampled_from([1, 2, 4, 8]))
        fields[name] = Field(offset, size, name != "function" and draw(st.booleans()))
        offset += 8
    return event, EventFormat(TRACEPOINTS[event].name, 1, fields)


def expected(event: Event, format_: EventFormat, data: bytes) -> Record | None:
    """What these bytes are."""
    record = [TS_NS, int(event), TASK]
    for name in TRACEPOINTS[event].fields:
        field = format_.fields.get(name)
        if field is None:
            record.append(CPU if name == "cpu" else 0)
            continue
        text = data[field.offset : field.offset + field.size]
        value = int.from_bytes(text, "little", signed=field.signed)
        if name == "function":
            if value not in FUNCTIONS:
                return None
            value = int(FUNCTIONS[value])
        record.append(value)
    return tuple(record)


@settings(max_examples=150, deadline=None)
@given(drawn=formats(), bodies=st.lists(st.binary(min_size=64, max_size=64), max_size=4))
def test_fields_are_what_the_format_says(
    drawn: tuple[Event, EventFormat], bodies: list[bytes]
) -> None:
    event, format_ = drawn
    layout = EventLayout(event, format_)
    reader = layout.reader(TASK, CPU, FUNCTIONS, {}, lambda pid, comm: None)
    assert reader.size == max(field.offset + field.size for field in format_.fields.values())
    # The first comes twice and the last again: nothing of what was read before may be left over.
    for body in (bytes(64), *bodies[:1], *bodies, b"\xff" * 64, bytes(64)):
        data = bytearray(8) + body
        if event in HAS_FUNCTION and body[0] & 3:
            place = format_.fields["function"].offset
            address = list(FUNCTIONS)[body[0] & 1]
            data[place : place + 8] = address.to_bytes(8, "little")
        read = reader.read(bytes(AT) + bytes(data), AT, TS_NS)
        assert read == expected(event, format_, bytes(data))


@pytest.mark.parametrize("event", sorted(HAS_FUNCTION))
def test_events_of_other_functions_are_left_out(event: int) -> None:
    names = TRACEPOINTS[Event(event)].fields
    fields = {name: Field(8 + 8 * place, 8, False) for place, name in enumerate(names)}
    layout = EventLayout(Event(event), EventFormat("any", 1, fields))
    reader = layout.reader(TASK, CPU, FUNCTIONS, {}, lambda pid, comm: None)
    for address, function in ((8, None), (7, Function.PIT_DO_WORK), (0, None)):
        data = bytearray(8 + 8 * len(names))
        place = fields["function"].offset
        data[place : place + 8] = address.to_bytes(8, "little")
        read = reader.read(bytes(data), 0, TS_NS)
        assert (None if read is None else read[4]) == function
