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
_POINTERS = frozenset(
    ("hrtimer", "work", "worker", "rip", "guest_rip", "gpa", "address", "e", "port", "info1")
)
"""Arguments that are read as hexadecimal numbers."""


class TrackEvents:
    """Writes packets to a file, one by one. Times are ns; those of a track have to ascend."""

    def __init__(self, file: BinaryIO) -> None:
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

        self._builder = StreamingTraceProtoBuilder(file)
        self._tracks = 0
        self._names: dict[tuple[str, str], int] = {}
        self._counts: dict[str, int] = {}
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
        self._write(packet)
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
        self._write(packet)
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
        self._write(packet)
        return self._tracks

    def begin(self, track: int, ts_ns: int, name: str, told: Arguments = (), flow: int = 0) -> None:
        """A slice begins; `flow`: the arrow that goes through it, never its end."""
        self._event(_SLICE_BEGIN, track, ts_ns, name, told, flow)
        self._open[track] = None

    def end(self, track: int, ts_ns: int, told: Arguments = ()) -> None:
        """The slice that began last on this track ends."""
        del self._open[track]
        self._event(_SLICE_END, track, ts_ns, "", told)

    def slice(
        self,
        track: int,
        start_ns: int,
        end_ns: int,
        name: str,
        told: Arguments = (),
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        """A whole slice; `ends`: the arrow ends here."""
        self._event(_SLICE_BEGIN, track, start_ns, name, told, flow, ends)
        self._event(_SLICE_END, track, end_ns)

    def instant(
        self,
        track: int,
        ts_ns: int,
        name: str,
        told: Arguments = (),
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        """Something without duration."""
        self._event(_INSTANT, track, ts_ns, name, told, flow, ends)

    def is_open(self, track: int) -> bool:
        """A slice of this track has begun and not ended."""
        return track in self._open

    def finish(self, ts_ns: int) -> None:
        """End what is open."""
        for track in list(self._open):
            self.end(track, ts_ns, [("cut", "the trace ends here")])

    def _event(
        self,
        kind: int,
        track: int,
        ts_ns: int,
        name: str = "",
        told: Arguments = (),
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        packet = self._packet()
        packet.timestamp = ts_ns
        event = packet.track_event
        event.type = kind
        event.track_uuid = track
        if name:
            event.name_iid = self._intern(packet, "event_names", name)
        if flow:
            (event.terminating_flow_ids if ends else event.flow_ids).append(flow)
        for key, value in told:
            if value is None:
                continue
            note = event.debug_annotations.add()
            note.name_iid = self._intern(packet, "debug_annotation_names", key)
            if isinstance(value, str):
                table = "debug_annotation_string_values"
                note.string_value_iid = self._intern(packet, table, value)
            elif value < 0:
                note.int_value = value
            elif key in _POINTERS:
                note.pointer_value = value
            else:
                note.uint_value = value
        self._write(packet)

    def _intern(self, packet: Any, table: str, text: str) -> int:
        """The number of a text in this sequence; the packet that needs it first brings it."""
        number = self._names.get((table, text))
        if number is None:
            number = self._counts[table] = self._counts.get(table, 0) + 1
            self._names[table, text] = number
            entry = getattr(packet.interned_data, table).add()
            entry.iid = number
            if table == "debug_annotation_string_values":
                entry.str = text.encode()
            else:
                entry.name = text
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

    def _write(self, packet: Any) -> None:
        self.packets += 1
        self._builder.write_packet(packet)


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
        told: Arguments,
        flow: int = 0,
        ends: bool = False,
    ) -> None:
        """A slice, or an instant if there is no end."""
        track = self._track(start_ns, end_ns or start_ns)
        if end_ns is None or track == self._crowded:
            self._file.instant(track, start_ns, name, told, flow, ends)
        else:
            self._file.slice(track, start_ns, end_ns, name, told, flow, ends)

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
