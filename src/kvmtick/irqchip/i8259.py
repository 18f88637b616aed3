"""The two cascaded 8259A interrupt controllers of KVM (arch/x86/kvm/i8259.c).

Implements the Intel 8259A datasheet (order 231468-003): the initialisation sequence ICW1-ICW4, the
operation words OCW1-OCW3, fully nested and special fully nested mode, automatic EOI, specific and
automatic rotation, the poll command, edge and level sensing (ELCR, ports 0x4d0 and 0x4d1).

Where KVM differs from the silicon, KVM's way is kept: level sensing is set by the ELCR alone (LTIM
is ignored), single mode still expects ICW3, the special mask is stored without effect, a level
request that goes away before INTA leaves no spurious interrupt, and the acknowledgement of a poll
ends the service at once.

Not modelled: MCS-80/85 vectors, buffered mode, the contents of ICW3 (the slave is on IR2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mypy_extensions import mypyc_attr

from kvmtick.irqchip.iobus import IoBus, IoDevice
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import IrqTarget
from kvmtick.trace.recorder import Recorder

__all__ = ["CASCADE_PIN", "PIC_STATE_FIELDS", "Pic", "PicState"]

CASCADE_PIN: Final = 2
SPURIOUS_PIN: Final = 7
NO_PRIORITY: Final = 8
NO_IRQ: Final = -1

PORT_MASTER: Final = 0x20
PORT_SLAVE: Final = 0xA0
PORT_ELCR: Final = 0x4D0

ELCR_MASK_MASTER: Final = 0xF8
"""IR0-IR2 (timer, keyboard, cascade) are always edge triggered."""
ELCR_MASK_SLAVE: Final = 0xDE
"""IR8 (RTC) and IR13 (FPU) are always edge triggered."""

ICW1_ICW4_NEEDED: Final = 0x01
ICW1_INIT: Final = 0x10
ICW4_AEOI: Final = 0x02
ICW4_SFNM: Final = 0x10

OCW3_SELECT: Final = 0x08
OCW3_READ_ISR: Final = 0x01
OCW3_READ_REGISTER: Final = 0x02
OCW3_POLL: Final = 0x04
OCW3_SPECIAL_MASK: Final = 0x20
OCW3_SPECIAL_MASK_ENABLE: Final = 0x40

POLL_INTERRUPT: Final = 0x80
POLL_NOTHING: Final = 0x07

MASKED: Final = -1

PRIORITY: Final = tuple(
    tuple(
        next((step for step in range(8) if mask >> (step + add & 7) & 1), NO_PRIORITY)
        for mask in range(256)
    )
    for add in range(8)
)
"""`PRIORITY[priority_add][mask]`: 0 (highest) to 7 of the first set bit of `mask`, 8 if none."""

# Initialisation states: what the next write to the odd port is.
READY: Final = 0
EXPECT_ICW2: Final = 1
EXPECT_ICW3: Final = 2
EXPECT_ICW4: Final = 3

PIC_STATE_FIELDS: Final = (
    "last_irr",
    "irr",
    "imr",
    "isr",
    "priority_add",
    "irq_base",
    "read_reg_select",
    "poll",
    "special_mask",
    "init_state",
    "auto_eoi",
    "rotate_on_auto_eoi",
    "special_fully_nested_mode",
    "init4",
    "elcr",
    "elcr_mask",
)
"""The fields of struct kvm_pic_state, in order; each one byte."""


@mypyc_attr(acyclic=True)
class PicState:
    """The registers of one 8259A, under the names of struct kvm_pic_state."""

    __slots__ = (*PIC_STATE_FIELDS, "first_pin")

    def __init__(self, first_pin: int, elcr_mask: int) -> None:
        """`first_pin` is 0 for the master and 8 for the slave."""
        self.first_pin = first_pin
        self.last_irr = 0
        self.irr = 0
        self.imr = 0
        self.isr = 0
        self.priority_add = 0
        self.irq_base = 0
        self.read_reg_select = 0
        self.poll = 0
        self.special_mask = 0
        self.init_state = READY
        self.auto_eoi = 0
        self.rotate_on_auto_eoi = 0
        self.special_fully_nested_mode = 0
        self.init4 = 0
        self.elcr = 0
        self.elcr_mask = elcr_mask

    def save(self) -> bytes:
        """The 16 bytes of struct kvm_pic_state."""
        return bytes(getattr(self, name) for name in PIC_STATE_FIELDS)

    def restore(self, state: bytes) -> None:
        """Take over 16 bytes of struct kvm_pic_state, unchecked, as the kernel does."""
        for name, value in zip(PIC_STATE_FIELDS, state, strict=True):
            setattr(self, name, value)

    def priority(self, mask: int) -> int:
        """`get_priority`: 0 (highest) to 7 of the first set bit of `mask`, 8 if none is set."""
        return PRIORITY[self.priority_add & 7][mask]

    def set_line(self, pin: int, level: int) -> int:
        """`pic_set_irq1`: 1 the request is new or the line went low, 0 coalesced, -1 masked."""
        mask = 1 << pin
        result = 1
        if self.elcr & mask:
            if level:
                result = 0 if self.irr & mask else 1
                self.irr |= mask
                self.last_irr |= mask
            else:
                self.irr &= ~mask
                self.last_irr &= ~mask
        elif level:
            if not self.last_irr & mask:
                result = 0 if self.irr & mask else 1
                self.irr |= mask
            self.last_irr |= mask
        else:
            self.last_irr &= ~mask
        return MASKED if self.imr & mask else result

    def pending_irq(self) -> int:
        """`pic_get_irq`: the pin whose request outranks what is in service, -1 if none does."""
        requests = self.irr & ~self.imr
        if not requests:
            return NO_IRQ
        priorities = PRIORITY[self.priority_add & 7]
        priority = priorities[requests]
        in_service = self.isr
        if in_service:
            if self.special_fully_nested_mode and not self.first_pin:
                in_service &= ~(1 << CASCADE_PIN)
            if priority >= priorities[in_service]:
                return NO_IRQ
        return (priority + self.priority_add) & 7


class PicPorts(IoDevice):
    """The pair on the port bus (`picdev_master_ops`, `picdev_slave_ops`, `picdev_elcr_ops`)."""

    __slots__ = ("_pic",)

    def __init__(self, pic: Pic) -> None:
        self._pic = pic

    def io_read(self, port: int, size_bytes: int, stale: int) -> int:
        return self._pic.io_read(port, size_bytes)

    def io_write(self, port: int, size_bytes: int, value: int) -> None:
        self._pic.io_write(port, size_bytes, value)


class Pic(IrqTarget):
    """The master and slave pair; `output` is the INTR pin to the processor.

    `accepts_extint` says whether a vCPU would take ExtINT (`kvm_apic_accept_pic_intr`),
    `raise_intr` asks that vCPU to look at its events and kicks it (`pic_unlock`).
    """

    __slots__ = (
        "_accepts_extint",
        "_notifiers",
        "_raise_intr",
        "_recorder",
        "_stale",
        "irq_states",
        "master",
        "output",
        "slave",
    )

    def __init__(
        self,
        recorder: Recorder,
        notifiers: Notifiers,
        accepts_extint: Callable[[], bool],
        raise_intr: Callable[[], None],
    ) -> None:
        self._recorder = recorder
        self._notifiers = notifiers
        self._accepts_extint = accepts_extint
        self._raise_intr = raise_intr
        self.master = PicState(0, ELCR_MASK_MASTER)
        self.slave = PicState(8, ELCR_MASK_SLAVE)
        self.irq_states: dict[int, int] = {}
        """By pin, of those that are high: the sources that hold it so."""
        self.output = False
        # ICW1, ICW4 and a poll of the cascade leave INTR as it was: the next edge of any line, a
        # falling one too, drives it anew.
        self._stale = False

    def register(self, bus: IoBus) -> None:
        """Put the pair and the ELCR on the port bus (`kvm_pic_init`)."""
        ports = PicPorts(self)
        for port in (PORT_MASTER, PORT_SLAVE, PORT_ELCR):
            bus.register(port, 2, ports)

    def set_irq(self, pin: int, irq_source_id: int, level: int, line_status: bool = False) -> int:
        """`kvm_pic_set_irq`: drive pin 0-15; the result is `PicState.set_line`'s."""
        # `__kvm_irq_line_state`: the line is the OR over all sources.
        states = self.irq_states
        source = 1 << irq_source_id
        line = states.get(pin, 0) | source if level else states.get(pin, 0) & ~source
        if line:
            states[pin] = line
        else:
            states.pop(pin, None)
        chip = self.master if pin < 8 else self.slave
        detail = self._recorder.detail
        if not (line or chip.elcr or self._stale or self.slave.irr or detail):
            # The falling edge of an edge-triggered pin changes nothing that INTR depends on, unless
            # the slave still has a request to pass on.
            mask = 1 << (pin & 7)
            chip.last_irr &= ~mask
            return MASKED if chip.imr & mask else 1
        result = chip.set_line(pin & 7, line)
        self._stale = False
        self.update_irq()
        if level or detail:
            self._recorder.kvm_pic_set_irq(
                pin >> 3, pin & 7, chip.elcr, chip.imr, result == 0, not level
            )
        return result

    def pulse(self, pin: int, irq_source_id: int) -> None:
        """`set_irq` to 1 and then to 0, in one go where nothing else has a hand in it."""
        chip = self.master if pin < 8 else self.slave
        mask = 1 << (pin & 7)
        if pin in self.irq_states or chip.last_irr & mask or chip.elcr or self.slave.irr or pin > 7:
            self.set_irq(pin, irq_source_id, 1)
            self.set_irq(pin, irq_source_id, 0)
            return
        masked = chip.imr & mask
        coalesced = not masked and chip.irr & mask != 0
        chip.irr |= mask
        self._stale = False
        self.update_irq()
        self._recorder.kvm_pic_set_irq(0, pin, chip.elcr, chip.imr, coalesced)

    def read_irq(self) -> int:
        """`kvm_pic_read_irq`: the processor's INTA cycle; returns the vector.

        With nothing to give it is the spurious vector of the master, or of the slave if the
        cascade was requested.
        """
        self.output = False
        master = self.master
        irq = master.pending_irq()
        if irq < 0:
            vector = master.irq_base + SPURIOUS_PIN
        else:
            self._intack(master, irq)
            vector = master.irq_base + irq
            if irq == CASCADE_PIN:
                slave = self.slave
                slave_irq = slave.pending_irq()
                if slave_irq >= 0:
                    self._intack(slave, slave_irq)
                else:
                    slave_irq = SPURIOUS_PIN
                vector = slave.irq_base + slave_irq
        self.update_irq()
        # `kvm_queue_interrupt` keeps a byte: KVM_SET_IRQCHIP stores any irq_base.
        return vector & 0xFF

    def update_irq(self) -> None:
        """`pic_update_irq`: pass the slave's request on and drive the INTR pin."""
        if self.slave.irr and self.slave.pending_irq() >= 0:
            self.master.set_line(CASCADE_PIN, 1)
            self.master.set_line(CASCADE_PIN, 0)
        if self.master.pending_irq() < 0:
            self.output = False
        elif not self.output:
            self.output = True
            self._raise_intr()

    def io_read(self, port: int, size_bytes: int) -> int:
        """`picdev_read`. Anything but a byte reads 0."""
        if size_bytes != 1:
            return 0
        if port & ~1 == PORT_ELCR:
            return self.slave.elcr if port & 1 else self.master.elcr
        chip = self.slave if port & 0x80 else self.master
        if chip.poll:
            chip.poll = 0
            return self._poll(chip)
        if port & 1:
            return chip.imr
        return chip.isr if chip.read_reg_select else chip.irr

    def io_write(self, port: int, size_bytes: int, value: int) -> None:
        """`picdev_write`. Anything but a byte is ignored."""
        if size_bytes != 1:
            return
        if port & ~1 == PORT_ELCR:
            chip = self.slave if port & 1 else self.master
            chip.elcr = value & chip.elcr_mask
            return
        chip = self.slave if port & 0x80 else self.master
        if port & 1:
            self._write_data(chip, value)
        elif value & ICW1_INIT:
            self._write_icw1(chip, value)
        elif value & OCW3_SELECT:
            _write_ocw3(chip, value)
        else:
            self._write_ocw2(chip, value)

    def _write_icw1(self, chip: PicState, value: int) -> None:
        """`kvm_pic_reset`: edge requests are forgotten, level ones stay."""
        chip.init4 = value & ICW1_ICW4_NEEDED
        forgotten = chip.irr & ~chip.elcr
        chip.last_irr = 0
        chip.irr &= chip.elcr
        chip.imr = 0
        chip.priority_add = 0
        chip.special_mask = 0
        chip.read_reg_select = 0
        if not chip.init4:
            chip.special_fully_nested_mode = 0
            chip.auto_eoi = 0
        chip.init_state = EXPECT_ICW2
        self._stale = True
        # Whoever waits for the acknowledgement of a forgotten request would wait for ever.
        if forgotten and self._accepts_extint():
            for pin in range(8):
                if forgotten >> pin & 1:
                    self._end_service(chip, pin)

    def _write_data(self, chip: PicState, value: int) -> None:
        """A write to the odd port: OCW1, or the next initialisation word."""
        if chip.init_state == EXPECT_ICW2:
            chip.irq_base = value & 0xF8
            chip.init_state = EXPECT_ICW3
        elif chip.init_state == EXPECT_ICW3:
            chip.init_state = EXPECT_ICW4 if chip.init4 else READY
        elif chip.init_state == EXPECT_ICW4:
            chip.special_fully_nested_mode = 1 if value & ICW4_SFNM else 0
            chip.auto_eoi = 1 if value & ICW4_AEOI else 0
            chip.init_state = READY
            self._stale = True
        elif chip.init_state == READY:
            self._write_ocw1(chip, value)

    def _write_ocw1(self, chip: PicState, value: int) -> None:
        changed = chip.imr ^ value
        chip.imr = value
        first_pin = chip.first_pin
        for pin in range(8):
            if changed >> pin & 1:
                self._notifiers.fire_mask_notifiers(
                    first_pin >> 3, first_pin + pin, bool(value >> pin & 1)
                )
        self.update_irq()

    def _write_ocw2(self, chip: PicState, value: int) -> None:
        command, pin = value >> 5, value & 7
        if command in (0, 4):
            chip.rotate_on_auto_eoi = command >> 2
        elif command in (1, 5):
            priority = chip.priority(chip.isr)
            if priority == NO_PRIORITY:
                return
            pin = (priority + chip.priority_add) & 7
            if command == 5:
                chip.priority_add = (pin + 1) & 7
            self._end_service(chip, pin)
            self.update_irq()
        elif command in (3, 7):
            if command == 7:
                chip.priority_add = (pin + 1) & 7
            self._end_service(chip, pin)
            self.update_irq()
        elif command == 6:
            chip.priority_add = (pin + 1) & 7
            self.update_irq()

    def _intack(self, chip: PicState, pin: int) -> None:
        """`pic_intack`: a level request stays until its line drops."""
        mask = 1 << pin
        chip.isr |= mask
        if not chip.elcr & mask:
            chip.irr &= ~mask
        if chip.auto_eoi:
            if chip.rotate_on_auto_eoi:
                chip.priority_add = (pin + 1) & 7
            self._end_service(chip, pin)

    def _end_service(self, chip: PicState, pin: int) -> None:
        """`pic_clear_isr`: also tells who waits for the acknowledgement (slave pins are 8-15)."""
        chip.isr &= ~(1 << pin)
        first_pin = chip.first_pin
        self._notifiers.notify_acked_irq(first_pin >> 3, first_pin + pin)

    def _poll(self, chip: PicState) -> int:
        """`pic_poll_read`: acknowledge by reading, without INTA."""
        pin = chip.pending_irq()
        if pin < 0:
            self.update_irq()
            return POLL_NOTHING
        is_slave = bool(chip.first_pin)
        if is_slave:
            self.master.isr &= ~(1 << CASCADE_PIN)
            self.master.irr &= ~(1 << CASCADE_PIN)
        chip.irr &= ~(1 << pin)
        self._end_service(chip, pin)
        if is_slave or pin != CASCADE_PIN:
            self.update_irq()
        else:
            self._stale = True
        return POLL_INTERRUPT | pin


def _write_ocw3(chip: PicState, value: int) -> None:
    if value & OCW3_POLL:
        chip.poll = 1
    if value & OCW3_READ_REGISTER:
        chip.read_reg_select = value & OCW3_READ_ISR
    if value & OCW3_SPECIAL_MASK_ENABLE:
        chip.special_mask = 1 if value & OCW3_SPECIAL_MASK else 0
