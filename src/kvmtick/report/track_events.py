"""A file of Perfetto's track events: tracks, slices, instants, flows.

Perfetto's "Writing TrackEvent Protos Synthetically" describes the format. All packets are of one
sequence, whose first one starts its interned names. Slices of a track have to nest: `Lanes` spreads
those that overlap over tracks of one name, which the UI shows as one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO

__all__ = ["Arguments", "Lanes", "TrackEvents"]

Arguments = Iterable[tuple[str, int | str | None]]
"""What is shown of an event, by name; None is left out."""

_SEQUENCE = 1
_STATE_CLEARED, _NEEDS_STATE = 1, 2
_SLICE_BEGIN, _SLICE_END, _INSTANT = 1, 2, 3
_EXPLICIT = 3
_U64 = (1 << 64) - 1
_VARINT, _FIXED64, _BYTES = 0, 1, 2
"""Types on the wire (protobuf's encoding, "Message Structure")."""
_BUFFER_BYTES = 1 << 16
_MOST_NOTES = 50_000
"""Annotations kept as they are in the file: most come again."""
_POINTERS = frozenset(
    ("hrtimer", "work", "worker", "rip", "guest_rip", "gpa", "address", "e", "port", "info1")
)
"""Arguments that are read as hexadecimal numbers."""


class TrackEvents:
    """Writes packets to a file, one by one. Times are ns; those of a track have to ascend."""

    def __init__(self, file: BinaryIO) -> None:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

        self._file = file
        self._buffer = bytearray()
        self._builder = StreamingTraceProtoBuilder(self)
        self._wire = _Wire(perfetto_trace_pb2)
        self._tracks = 0
        self._names: dict[str, dict[str, int]] = {}
        self._heads: dict[tuple[int, int, str], bytes] = {}
        self._notes: dict[tuple[str, int | str | None], bytes] = {}
        self._open: dict[int, None] = {}
        self.packets = 0
        """So many were written."""

    def process(self, pid: int, name: str) -> int:
        """A track for a process; its id, as of all the tracks."""
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid = self._next()
        track.process.pid = pid
        track.process.process_name = name
        track.child_ordering = _EXPLICIT
        self._builder.write_packet(packet)
        return self._tracks

    def thread(self, pid: int, tid: int, name: str, parent: int) -> int:
        """A track for a thread of a process."""
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid = self._next()
        track.parent_uuid = parent
        track.thread.pid = pid
        track.thread.tid = tid
        track.thread.thread_name = name
        self._builder.write_packet(packet)
        return self._tracks

    def track(self, name: str, parent: int = 0, rank: int = 0, description: str = "") -> int:
        """Any other track; `rank`: its place among its siblings."""
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid = self._next()
        track.name = name
        if parent:
            track.parent_uuid = parent
        if description:
            track.description = description
        track.sibling_order_rank = rank
        track.child_ordering = _EXPLICIT
        self._builder.write_packet(packet)
        return self._tracks

    def begin(self, track: int, ts_ns: int, name: str, notes: bytes = b"", flow: int = 0) -> None:
        """A slice begins; `flow`: the arrow that goes through it, never its end."""
        self._event(_SLICE_BEGIN, track, ts_ns, name, notes, flow)
        self._open[track] = None

    def end(self, track: int, ts_ns: int, notes: bytes = b"") -> None:
        """The slice that began last on this track ends."""
        del self._open[track]
        self._event(_SLICE_END, track, ts_ns, "", notes)

    def slice(
        self,
        track: int,
        start_ns: int,
        end_ns: int,
        name: str,
        notes: bytes = b"",
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        """A whole slice; `ends`: the arrow ends here."""
        self._event(_SLICE_BEGIN, track, start_ns, name, notes, flow, ends)
        self._event(_SLICE_END, track, end_ns)

    def instant(
        self,
        track: int,
        ts_ns: int,
        name: str,
        notes: bytes = b"",
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        """Something without duration."""
        self._event(_INSTANT, track, ts_ns, name, notes, flow, ends)

    def is_open(self, track: int) -> bool:
        """A slice of this track has begun and not ended."""
        return track in self._open

    def finish(self, ts_ns: int) -> None:
        """End what is open: this was all."""
        for track in list(self._open):
            self.end(track, ts_ns, self.notes([("cut", "the trace ends here")]))
        self._file.write(self._buffer)
        self._buffer.clear()

    def write(self, packet: bytes) -> None:
        """A packet as it is in the file."""
        self.packets += 1
        self._buffer += packet
        if len(self._buffer) > _BUFFER_BYTES:
            self._file.write(self._buffer)
            self._buffer.clear()

    def notes(self, told: Arguments) -> bytes:
        """What is told of an event, as the file has it."""
        parts = []
        known = self._notes
        for said in told:
            note = known.get(said)
            if note is None:
                key, value = said
                if value is None:
                    continue
                if len(known) > _MOST_NOTES:
                    known.clear()
                note = known[said] = self._note(key, value)
            parts.append(note)
        return b"".join(parts)

    def _event(
        self,
        kind: int,
        track: int,
        ts_ns: int,
        name: str = "",
        notes: bytes = b"",
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        head = self._heads.get((kind, track, name))
        if head is None:
            head = self._heads[kind, track, name] = self._wire.head(
                kind, track, self._intern("event_names", name) if name else 0
            )
        if flow:
            head += self._wire.flow(flow, ends)
        self.write(self._wire.packet(ts_ns, head + notes))

    def _note(self, key: str, value: int | str) -> bytes:
        """What a debug annotation is in the file."""
        name = self._intern("debug_annotation_names", key)
        if isinstance(value, str):
            number = self._intern("debug_annotation_string_values", value)
            return self._wire.note(name, "string_value_iid", number)
        if value < 0:
            return self._wire.note(name, "int_value", value & _U64)
        return self._wire.note(name, "pointer_value" if key in _POINTERS else "uint_value", value)

    def _intern(self, table: str, text: str) -> int:
        """The number of a text in this sequence; it is told before it is used."""
        names = self._names.setdefault(table, {})
        number = names.get(text)
        if number is None:
            number = names[text] = len(names) + 1
            packet = self._packet()
            entry = getattr(packet.interned_data, table).add()
            entry.iid = number
            if table == "debug_annotation_string_values":
                entry.str = text.encode()
            else:
                entry.name = text
            self._builder.write_packet(packet)
        return number

    def _next(self) -> int:
        self._tracks += 1
        return self._tracks

    def _packet(self) -> Any:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.sequence_flags = _NEEDS_STATE
        if not self.packets:
            packet.sequence_flags = _NEEDS_STATE | _STATE_CLEARED
            packet.first_packet_on_sequence = True
        return packet


class _Wire:
    """Packets of track events as protobuf has them on the wire, by the numbers of their fields.

    Most of a trace is these; put together from parts that are known they take a fifth of the time.
    """

    def __init__(self, messages: Any) -> None:
        trace = messages.Trace.DESCRIPTOR.fields_by_name
        packet = messages.TracePacket.DESCRIPTOR.fields_by_name
        event = messages.TrackEvent.DESCRIPTOR.fields_by_name
        self._packet = _tag(trace["packet"], _BYTES)
        self._timestamp = _tag(packet["timestamp"], _VARINT)
        sequence = messages.TracePacket(
            trusted_packet_sequence_id=_SEQUENCE, sequence_flags=_NEEDS_STATE
        )
        self._event = sequence.SerializeToString() + _tag(packet["track_event"], _BYTES)
        self._note = _tag(event["debug_annotations"], _BYTES)
        self._flow = _tag(event["flow_ids"], _FIXED64)
        self._last_flow = _tag(event["terminating_flow_ids"], _FIXED64)
        note = messages.DebugAnnotation.DESCRIPTOR.fields_by_name
        self._name = _tag(note["name_iid"], _VARINT)
        self._kinds = {
            kind: _tag(note[kind], _VARINT)
            for kind in ("uint_value", "int_value", "pointer_value", "string_value_iid")
        }
        self._messages = messages
        self._high, self._high_bytes = 0, b"\0"

    def head(self, kind: int, track: int, name: int) -> bytes:
        """What all events of one name on one track have in common."""
        event = self._messages.TrackEvent(type=kind, track_uuid=track)
        if name:
            event.name_iid = name
        data: bytes = event.SerializeToString()
        return data

    def flow(self, flow: int, ends: bool) -> bytes:
        """An arrow that comes through, or ends."""
        return (self._last_flow if ends else self._flow) + flow.to_bytes(8, "little")

    def note(self, name: int, kind: str, value: int) -> bytes:
        """A debug annotation, as a part of its event; `kind`: the field its value is in."""
        note = b"".join((self._name, _varint(name), self._kinds[kind], _varint(value)))
        return self._note + _varint(len(note)) + note

    def packet(self, ts_ns: int, event: bytes) -> bytes:
        """A whole packet, as a part of the trace."""
        body = b"".join(
            (self._timestamp, self._time(ts_ns), self._event, _length(len(event)), event)
        )
        return self._packet + _length(len(body)) + body

    def _time(self, ts_ns: int) -> bytes:
        """The same as `_varint`: the high bits are those of the time before, nearly always."""
        high = ts_ns >> 21
        if high != self._high:
            self._high = high
            self._high_bytes = _varint(high)
        low = (ts_ns & 0x7F | 0x80, ts_ns >> 7 & 0x7F | 0x80, ts_ns >> 14 & 0x7F | 0x80)
        return bytes(low) + self._high_bytes


def _tag(field: Any, wire_type: int) -> bytes:
    """What stands before a field's value (protobuf's encoding, "Message Structure")."""
    return _varint(field.number << 3 | wire_type)


def _varint(number: int) -> bytes:
    """A number in as few bytes as it needs (protobuf's encoding, "Base 128 Varints")."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_LENGTHS = [_varint(number) for number in range(512)]


def _length(number: int) -> bytes:
    return _LENGTHS[number] if number < len(_LENGTHS) else _varint(number)


class Lanes:
    """Tracks of one name for what may overlap, as few as are needed."""

    def __init__(
        self, file: TrackEvents, name: str, parent: int, rank: int = 0, most: int | None = None
    ) -> None:
        """`most`: with so many tracks taken, a slice is only an instant of one track more."""
        self._file = file
        self._most = most
        self._make = (name, parent, rank)
        self._lanes: list[tuple[int, int]] = []
        """Track, and when its last slice ended."""
        self._crowded = 0

    def put(
        self,
        start_ns: int,
        end_ns: int | None,
        name: str,
        notes: bytes,
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        """A slice, or an instant if there is no end."""
        track = self._track(start_ns, end_ns or start_ns)
        if end_ns is None or track == self._crowded:
            self._file.instant(track, start_ns, name, notes, flow, ends)
        else:
            self._file.slice(track, start_ns, end_ns, name, notes, flow, ends)

    def _track(self, start_ns: int, end_ns: int) -> int:
        for at, (track, free_ns) in enumerate(self._lanes):
            if free_ns <= start_ns:
                self._lanes[at] = (track, end_ns)
                return track
        if len(self._lanes) == self._most:
            self._crowded = self._crowded or self._file.track(*self._make)
            return self._crowded
        track = self._file.track(*self._make)
        self._lanes.append((track, end_ns))
        return track
