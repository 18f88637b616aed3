"""What a trace shows of the local APICs: who is requested, in service, or waits as an NMI.

A request is known by vCPU and vector. It begins with kvm_apic_accept_irq, unless one is there
already, and ends with the injection of that vector on that vCPU; from there to kvm_eoi it is in
service. NMIs have no vector and no EOI; two at most wait.

What is posted to the hardware (APICv, AVIC) has no injection, and an EOI only sometimes: it was
delivered if an EOI says so that can be no other's.

Not told apart, for no record tells: a message that a software-disabled local APIC did not take,
requests that user space sets or clears (KVM_SET_LAPIC, KVM_SET_VCPU_EVENTS), NMIs that came without
a message (KVM_NMI).
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from kvmtick.ticks.source import Source
from kvmtick.ticks.tick import Claim, Tick
from kvmtick.ticks.verdict import Path, Where

__all__ = ["DM_FIXED", "DM_INIT", "DM_LOWEST", "DM_NMI", "LocalApics"]

DM_FIXED: Final = 0x000
DM_LOWEST: Final = 0x100
DM_NMI: Final = 0x400
DM_INIT: Final = 0x500
"""Delivery modes as kvm_apic_accept_irq has them."""

NMI_LIMIT: Final = 2
"""How many NMIs can wait: one for the handler that runs, one more."""

NMI_VECTOR: Final = 2

POSTED: Final = "posted to the hardware (APICv): no event tells of its injection"
POSTED_LIMIT: Final = 2
"""A vector can be in service and requested."""

NMI: Final = 256
"""Stands for the vector of an NMI in `_known`: its own 2 can be an interrupt's as well."""

STRIDE: Final = 512

_NONE: Final[frozenset[int]] = frozenset()
"""One for all: an empty set of its own takes 200 bytes."""


class LocalApics:
    """IRR, ISR and pending NMIs of every vCPU, with the tick that each belongs to, if any."""

    def __init__(self, sees_nmis: Callable[[], bool]) -> None:
        """`sees_nmis`: whether the records show when an NMI is injected."""
        self.sees_nmis = sees_nmis
        self._irr: dict[int, Claim | None] = {}
        self._isr: dict[int, Claim] = {}
        self._nmis: dict[int, deque[Claim | None]] = {}
        self._known: dict[int, Source] = {}
        self._begun = ""
        self._sure = _NONE
        self._doubted = _NONE
        self._posted: dict[int, Claim] = {}
        self._owed: dict[int, int] = {}
        """How many EOIs may come for what was posted, by request."""
        self._maybe_nmis: dict[int, int] = {}

    def accept(
        self, vcpu: int, mode: int, vector: int, source: Source, tick: Tick, path: Path, ts_ns: int
    ) -> Claim | None:
        """A tick's message; None if it was merged with one that waits, or asks for no interrupt."""
        if mode == DM_NMI:
            waiting = self._nmis.setdefault(vcpu, deque())
            self._known[vcpu * STRIDE + NMI] = source
            if len(waiting) >= NMI_LIMIT:
                return None
            claim = source.claim(tick, Path.NMI, ts_ns)
            waiting.append(claim)
            return claim
        if mode not in (DM_FIXED, DM_LOWEST):
            return None
        key = vcpu * STRIDE + vector
        self._known[key] = source
        if key in self._irr:
            return None
        claim = self._irr[key] = source.claim(tick, path, ts_ns)
        return claim

    def doubt(self, vcpu: int, mode: int, vector: int) -> str:
        """Why it cannot be told whether a message of a tick's was merged with one that waited since
        before the records begin; empty if it can.
        """
        if not self._begun:
            return ""
        if mode == DM_NMI:
            return self._begun if self._maybe_nmis.get(vcpu, NMI_LIMIT) else ""
        if mode not in (DM_FIXED, DM_LOWEST):
            return ""
        key = vcpu * STRIDE + vector
        return "" if key in self._sure or key in self._irr else self._begun

    def is_free(self, vcpu: int, vector: int, source: Source) -> bool:
        """The vector is neither requested nor in service, for sure, and `source` used it last."""
        key = vcpu * STRIDE + vector
        return (
            key not in self._irr
            and key not in self._isr
            and (not self._begun or key in self._sure)
            and self._known.get(key) is source
        )

    def accept_doubtful(self, vcpu: int, mode: int, vector: int, source: Source) -> None:
        """A tick's message that may be merged with one before it: the injection is nobody's."""
        key = vcpu * STRIDE + (NMI if mode == DM_NMI else vector)
        self._known.setdefault(key, source)
        self._doubted |= {key}
        self.accept_foreign(vcpu, mode, vector)

    def accept_foreign(self, vcpu: int, mode: int, vector: int) -> None:
        """A message that is no tick's."""
        if mode == DM_NMI:
            waiting = self._nmis.setdefault(vcpu, deque())
            if len(waiting) < NMI_LIMIT:
                waiting.append(None)
            maybe = self._maybe_nmis.get(vcpu, NMI_LIMIT if self._begun else 0)
            self._maybe_nmis[vcpu] = min(NMI_LIMIT, maybe + 1) if maybe else 0
        elif mode in (DM_FIXED, DM_LOWEST):
            self._irr.setdefault(vcpu * STRIDE + vector)
        elif mode == DM_INIT:
            self._reset(vcpu)

    def forget(self, why: str) -> None:
        """Records are missing: who is requested or in service is not known any more."""
        self._begun = why
        self._sure = self._doubted = _NONE
        self._maybe_nmis.clear()
        self._irr.clear()
        self._isr.clear()
        self._nmis.clear()
        self._posted.clear()
        self._owed = dict.fromkeys(self._owed, POSTED_LIMIT)

    def created(self) -> None:
        """The VM is made here: nothing was before."""
        self._begun = ""

    def revoke(self, claim: Claim) -> None:
        """It turned out that the local APIC had not taken the message."""
        for key, requested in self._irr.items():
            if requested is claim:
                del self._irr[key]
                claim.tick.claims -= 1
                return

    def requested(self, vcpu: int | None, vector: int) -> bool:
        """The vector is in IRR; `vcpu` None: of any vCPU."""
        return self._key(vcpu, vector) is not None

    def injected(self, vcpu: int | None, vector: int) -> None:
        """The vector waits no more, if it did."""
        if self._begun and vcpu is not None and vcpu * STRIDE + vector not in self._sure:
            self._sure |= {vcpu * STRIDE + vector}

    def inject(self, vcpu: int | None, vector: int, ts_ns: int) -> None:
        """A requested vector was written into the VMCS."""
        key = self._key(vcpu, vector)
        if key is None:
            return
        self.injected(vcpu, vector)
        claim = self._irr.pop(key)
        if claim is not None:
            self._isr[key] = claim
            claim.source.arrive(claim, ts_ns, key // STRIDE, vector)
            return
        self._isr.pop(key, None)
        if key in self._doubted:
            self._doubted = self._doubted - {key} or _NONE
        elif key in self._known:
            self._known[key].extra += 1

    def inject_nmi(self, vcpu: int, pending: int, ts_ns: int) -> None:
        """An NMI was written into the VMCS; `pending`: how many still wait."""
        waiting = self._nmis.get(vcpu)
        maybe = self._maybe_nmis.get(vcpu, NMI_LIMIT if self._begun else 0)
        if maybe:
            self._maybe_nmis[vcpu] = min(maybe - 1, pending)
        source = self._known.get(vcpu * STRIDE + NMI)
        claim = waiting.popleft() if waiting else None
        if claim is not None:
            claim.source.arrive(claim, ts_ns, vcpu, NMI_VECTOR)
        elif source is not None and not maybe:
            source.extra += 1
        while waiting and len(waiting) > pending:
            merged = waiting.pop()
            if merged is not None:
                merged.source.merge(merged, Where.LAPIC, "as many NMIs as can wait were pending")

    def post(self, vcpu: int, vector: int) -> None:
        """The message that was accepted just now went to the hardware."""
        key = vcpu * STRIDE + vector
        claim = self._irr.pop(key, None)
        if key in self._doubted:
            self._doubted = self._doubted - {key} or _NONE
        before = self._posted.pop(key, None)
        owed = self._owed[key] = min(POSTED_LIMIT, self._owed.get(key, 0) + 1)
        if before is not None:
            before.source.give_up(before, POSTED)
        if claim is None:
            return
        if owed > 1:
            claim.source.give_up(claim, POSTED)
        else:
            self._posted[key] = claim

    def settle(self) -> None:
        """Everything was read."""
        for claim in self._posted.values():
            claim.source.give_up(claim, POSTED)
        self._posted.clear()

    def eoi(self, vcpu: int, vector: int, ts_ns: int) -> None:
        """The guest ended an interrupt."""
        key = vcpu * STRIDE + vector
        claim = self._isr.pop(key, None)
        if claim is not None:
            claim.source.finish(claim, ts_ns)
        elif key in self._owed:
            posted = self._posted.pop(key, None)
            self._owed[key] = max(0, self._owed[key] - 1)
            if posted is not None:
                posted.source.prove(posted, ts_ns, vcpu, vector, POSTED)

    def _key(self, vcpu: int | None, vector: int) -> int | None:
        if vcpu is not None:
            key = vcpu * STRIDE + vector
            return key if key in self._irr else None
        return next((key for key in self._irr if key % STRIDE == vector), None)

    def _reset(self, vcpu: int) -> None:
        lost = [self._irr.pop(key) for key in list(self._irr) if key // STRIDE == vcpu]
        for key in [key for key in self._isr if key // STRIDE == vcpu]:
            del self._isr[key]
        for claim in (*lost, *self._nmis.pop(vcpu, ())):
            if claim is not None:
                claim.source.lose(claim, Where.LAPIC, "INIT reset its local APIC")
