"""What a trace shows of the PICs: the request of the pin that GSI 0 leads to, and its service.

The masks and the vectors come from the guest's port writes (i8259 datasheet: ICW1-4, OCW1-3) and
from the `imr` that kvm_pic_set_irq carries. Where the records begin in the middle, a request may be
set already, and the vector is that of the injection that an acknowledgement of the pin follows.

Not told apart, for no record tells: what user space sets with KVM_SET_IRQCHIP, and a line that
another source held high before the records began.
"""

from typing import Final

from mypy_extensions import mypyc_attr

from kvmtick.ticks.source import NO_VECTOR, Source
from kvmtick.ticks.tick import Claim, Tick
from kvmtick.ticks.verdict import Path, Verdict, Where
from kvmtick.trace.events import Record

__all__ = ["COALESCED", "DOUBTFUL", "HELD", "LATCHED", "MASKED", "PicPin"]

LATCHED: Final = 0
MASKED: Final = 1
COALESCED: Final = 2
HELD: Final = 3
DOUBTFUL: Final = 4
"""What became of a pulse; HELD: another source holds the line high, so there was no edge; DOUBTFUL:
it was masked, and latched already or not.
"""

PORT_COMMAND: Final = 0x20
PORT_DATA: Final = 0x21
SLAVE_PORTS: Final = 0x80
ICW1: Final = 0x10
OCW3: Final = 0x08
NO_COMMAND: Final = -1
ICW1_ICW4_NEEDED: Final = 0x01
READY: Final = 0
EXPECT_ICW2: Final = 1
EXPECT_ICW3: Final = 2
EXPECT_ICW4: Final = 3

_PIC: Final = Path.PIC


@mypyc_attr(acyclic=True)
class _Chip:
    """What the guest wrote to one of the pair."""

    __slots__ = ("base", "command", "imr", "init4", "init_state")

    def __init__(self) -> None:
        self.command = NO_COMMAND
        self.imr = 0
        self.base: int | None = None
        self.init_state = READY
        self.init4 = 0

    def begin_init(self, icw1: int) -> None:
        """ICW1 came."""
        self.init_state = EXPECT_ICW2
        self.init4 = icw1 & ICW1_ICW4_NEEDED
        self.imr = 0

    def write_data(self, value: int) -> None:
        """The odd port was written: ICW2 to ICW4, or the mask."""
        if self.init_state == EXPECT_ICW2:
            self.base = value & 0xF8
            self.init_state = EXPECT_ICW3
        elif self.init_state == EXPECT_ICW3:
            self.init_state = EXPECT_ICW4 if self.init4 else READY
        elif self.init_state == EXPECT_ICW4:
            self.init_state = READY
        else:
            self.imr = value


class PicPin:
    """The PIC pin of GSI 0 (0-15): whose its request is, who is in service."""

    __slots__ = (
        "_auto_eoi_claim",
        "_begun",
        "_blurred",
        "_candidate",
        "_master",
        "_request_known",
        "_slave",
        "_taken",
        "_unended",
        "auto_eoi",
        "foreign_request",
        "in_service",
        "pin",
        "request",
    )

    def __init__(self) -> None:
        self.pin = 0
        self.request: Claim | None = None
        self.foreign_request = False
        self.in_service: Claim | None = None
        self.auto_eoi = False
        self._unended = False
        """It was injected, for whomever, and not acknowledged since."""
        self._taken: list[Claim | None] = []
        """Requests that INTA took, and whose injection is still to be recorded; None: foreign."""
        self._auto_eoi_claim: Claim | None = None
        self._master = _Chip()
        self._slave = _Chip()
        self._begun = ""
        self._blurred = False
        """The command that an acknowledgement follows may be missing."""
        self._request_known = True
        self._candidate = NO_VECTOR

    @property
    def _chip(self) -> _Chip:
        """The one that the pin belongs to."""
        return self._slave if self.pin >> 3 else self._master

    @property
    def vector(self) -> int | None:
        """The vector of the pin; None while it is not known."""
        base = self._chip.base
        return None if base is None else base + (self.pin & 7)

    @property
    def masked(self) -> bool:
        """IMR masks the pin."""
        return self._chip.imr >> (self.pin & 7) & 1 != 0

    @property
    def is_idle(self) -> bool:
        """Nothing is under way, and the pin is a PC's timer's."""
        return (
            self.request is None
            and self.in_service is None
            and not self._unended
            and not self._taken
            and not self.foreign_request
            and not self.auto_eoi
            and not self.pin
        )

    @property
    def is_latched(self) -> bool:
        """While it is masked, a pulse of the pin, a PC's timer's, changes nothing."""
        requested = self.request is not None or self.foreign_request
        return requested and not self.auto_eoi and not self.pin

    @property
    def takes_none(self) -> bool:
        """No injection is the PIC's, whatever its vector."""
        return not self.asks or (not self.auto_eoi and self.masked)

    def has_imr(self, imr: int) -> bool:
        """The master's mask is known to be this."""
        return self._master.imr == imr

    @property
    def asks(self) -> bool:
        """The next injection may be the PIC's."""
        return self.auto_eoi or self.request is not None or self.foreign_request

    def takes(self, vector: int) -> bool:
        """An injection of `vector` is the PIC's: it comes before the local APIC."""
        if self.auto_eoi:
            return True
        requested = self.request is not None or self.foreign_request
        return requested and vector == self.vector and not self.masked

    def forget(self, why: str) -> None:
        """Records are missing: what is requested or in service, and how it is set up, is not known
        any more.
        """
        self._begun = why
        self._request_known = False
        self._blurred = True
        for chip in (self._master, self._slave):
            chip.base = None
            chip.init_state = READY
        self._candidate = NO_VECTOR
        self.request = self.in_service = self._auto_eoi_claim = None
        self.foreign_request = self.auto_eoi = self._unended = False
        self._taken.clear()
        self._forget_commands()

    def new_pulse(self) -> None:
        """A line rises: a command written before it ends nothing that comes after it. But the
        worker may raise it between the guest's EOI and the acknowledgement that this leads to.
        """
        if not self._unended:
            self._forget_commands()

    def _forget_commands(self) -> None:
        self._master.command = self._slave.command = NO_COMMAND

    def pulse(self, record: Record, source: Source, tick: Tick | None, held: bool) -> int:
        """The pin was driven high, for a tick or for somebody else: LATCHED, MASKED, ..."""
        ts_ns, _, _, irqchip, pin, elcr, imr, coalesced = record
        chip = self._slave if irqchip & 1 else self._master
        chip.imr = imr
        if self.masked and (self.request is not None or self.foreign_request):
            return MASKED
        if coalesced or (self.masked and not self._request_known):
            self.foreign_request = self.request is None
            self._request_known = True
            return COALESCED if coalesced else DOUBTFUL
        self._request_known = True
        if tick is not None and held:
            return MASKED if self.masked else HELD
        request, requested = self.request, self.request is not None or self.foreign_request
        self.request = source.claim(tick, _PIC, ts_ns) if tick is not None else None
        self.foreign_request = tick is None
        if requested and not elcr >> (pin & 7) & 1:
            # nothing else but INTA clears the request of an edge
            self._taken = [request]
        elif request is not None:
            request.source.lose(request, Where.PIC, "its PIC request was taken back")
        return LATCHED

    def inject(self, source: Source, vector: int, vcpu: int, ts_ns: int) -> None:
        """A vector that is no local APIC's was written into the VMCS."""
        self._blurred = False
        if self.auto_eoi:
            self.auto_eoi = False
            claim = self._auto_eoi_claim
            if claim is None:
                source.extra += 1
            elif claim.arrived:
                claim.tick.vector = None if vector == NO_VECTOR else vector
            return
        if self._begun and vector != NO_VECTOR and self.vector is None:
            self._inject_unknown(vector)
            return
        if vector != NO_VECTOR and self.vector not in (None, vector):
            source.extra += 1
            return
        self._unended = True
        self._forget_commands()
        if self._taken:
            claim = self._taken.pop()
        else:
            claim, self.request = self.request, None
            self.foreign_request = False
        if claim is None:
            source.extra += self._request_known
            self._request_known = True
            return
        self.in_service = claim
        source.arrive(claim, ts_ns, vcpu, None if vector == NO_VECTOR else vector)

    def _inject_unknown(self, vector: int) -> None:
        """An injection that may be that of the pin."""
        self._candidate = vector
        self._forget_request()

    def _forget_request(self) -> None:
        claim, self.request = self.request, None
        self.foreign_request = self._request_known = False
        if claim is not None:
            claim.tick.claims -= 1
            if claim.tick.verdict is Verdict.OUTSTANDING:
                claim.source.judge(claim.tick, Verdict.UNKNOWN, detail=self._begun)

    def acknowledge(self, ts_ns: int, vcpu: int) -> None:
        """The pin was acknowledged: by an EOI, ICW1, a poll or an automatic EOI."""
        chip = self._chip
        command, chip.command = chip.command, NO_COMMAND
        if self._candidate != NO_VECTOR and self._candidate & 7 == self.pin & 7:
            if chip.base is None:
                chip.base = self._candidate & 0xF8
                self._request_known = True
            self._candidate = NO_VECTOR
        self._unended = False
        if self._blurred:
            self._blurred = False
            if command == NO_COMMAND:
                self._forget_request()
                return
        if command == NO_COMMAND or command & (ICW1 | OCW3):
            self._acknowledge_request(command, ts_ns, vcpu)
        elif self.in_service is not None:
            claim, self.in_service = self.in_service, None
            claim.source.finish(claim, ts_ns)

    def _acknowledge_request(self, command: int, ts_ns: int, vcpu: int) -> None:
        """ICW1 forgot the request; a poll or an automatic EOI took it."""
        claim = self.request
        self.request = None
        self.foreign_request = False
        if command != NO_COMMAND and command & ICW1:
            if claim is not None:
                claim.source.lose(claim, Where.PIC, "ICW1 cleared its PIC request")
            return
        # An automatic EOI comes just before its injection, a poll just before its port read.
        self.auto_eoi = True
        self._auto_eoi_claim = claim
        if claim is not None:
            claim.source.arrive(claim, ts_ns, vcpu, None)
            claim.source.finish(claim, ts_ns)

    def pio(self, is_write: int, port: int, value: int) -> None:
        """The guest accessed a port."""
        if not is_write:
            self.auto_eoi = False
            return
        chip = self._slave if port & SLAVE_PORTS else self._master
        port &= ~SLAVE_PORTS
        if port == PORT_COMMAND:
            chip.command = value
            if value & ICW1:
                self._request_known |= chip is self._chip
                chip.begin_init(value)
        elif port == PORT_DATA:
            chip.write_data(value)
