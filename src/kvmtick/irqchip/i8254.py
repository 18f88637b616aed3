"""KVM's in-kernel i8254 interval timer (arch/x86/kvm/i8254.c, api.rst KVM_CREATE_PIT2).

Implements the Intel 8254 datasheet (order 231164): three counters, modes 0-5, LSB, MSB and word
access, the counter latch and read-back commands, the status byte, the gate of counter 2 and port
0x61; and what KVM builds around it: the hrtimer of counter 0, the `kvm-pit/<pid>` worker that
pulses GSI 0, and reinjection (`pending`, `irq_ack`).

Where KVM differs from the silicon, KVM's way is kept:

* counters run at 1193181 Hz and are computed from the clock when read, not stepped;
* loading and counting are binary whatever the BCD bit says; it is stored and reported;
* the status byte never shows NULL COUNT;
* a low gate does not stop a counter; a rising one restarts it in modes 1, 2, 3 and 5;
* a control word alone stops nothing; only a completed count does;
* counter 0 is read off its timer: in mode 5, which has none, it stands still, or goes on from where
  an earlier mode's timer left it;
* a periodic interval below 200 us (`min_timer_period_us`) is raised to that, except for the first
  expiry.

After the pulse the worker is the NMI watchdog: while any vCPU's LVT0 is in NMI mode, it delivers
the LVT0 of every vCPU.

Not modelled: the lock (a machine runs in one thread), the log line that tells of the clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, Protocol

from mypy_extensions import mypyc_attr

from kvmtick.abi.structs import (
    KVM_PIT_FLAGS_HPET_LEGACY,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
    KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_channel_state,
    kvm_pit_state,
    kvm_pit_state2,
)
from kvmtick.irqchip.delivery import IrqDelivery
from kvmtick.irqchip.iobus import IoBus, IoDevice
from kvmtick.irqchip.notifiers import Notifiers
from kvmtick.irqchip.routing import IrqRouting, IrqSourceIds
from kvmtick.timing.clock import Clock
from kvmtick.timing.hrtimer import NORESTART, RESTART, HrTimer, HrTimerRestart
from kvmtick.timing.kthread import KthreadWork, KthreadWorker
from kvmtick.trace.events import ApicvInhibitReason, Function
from kvmtick.trace.recorder import Recorder

__all__ = [
    "KVM_PIT_FREQ_HZ",
    "MIN_TIMER_PERIOD_NS",
    "Pit",
    "PitBoard",
    "PitChannel",
    "create_pit",
    "mul_u64_u32_div",
    "nominal_period_ns",
]

KVM_PIT_FREQ_HZ: Final = 1193181
NSEC_PER_SEC: Final = 1_000_000_000
MIN_TIMER_PERIOD_NS: Final = 200_000
"""Module parameter `min_timer_period_us` of kvm: its default, for PIT and local APIC."""

PIT_GSI: Final = 0
PIT_BASE_ADDRESS: Final = 0x40
PIT_MEM_LENGTH: Final = 4
PIT_COUNTER_MASK: Final = 3
CONTROL_REGISTER: Final = 3
SPEAKER_BASE_ADDRESS: Final = 0x61
SPEAKER_MEM_LENGTH: Final = 4
SPEAKER_CHANNEL: Final = 2
REFRESH_CLOCK_SHIFT: Final = 14
"""The refresh bit of port 0x61 toggles every 2^14 ns, near the PC's 15 us."""

MAX_COUNT: Final = 0x10000
MODE_NONE: Final = 0xFF
"""No control word written yet."""

# Access: what the next byte read from or written to a counter is (RW bits of the control word;
# a word goes LSB first, and the state then says which half is next).
RW_STATE_LSB: Final = 1
RW_STATE_MSB: Final = 2
RW_STATE_WORD0: Final = 3
RW_STATE_WORD1: Final = 4

READ_BACK: Final = 3
READ_BACK_NO_COUNT: Final = 0x20
READ_BACK_NO_STATUS: Final = 0x10

SPEAKER_GATE: Final = 0x01
SPEAKER_DATA: Final = 0x02
SPEAKER_REFRESH_SHIFT: Final = 4
SPEAKER_OUT_SHIFT: Final = 5

U64: Final = (1 << 64) - 1


def mul_u64_u32_div(value: int, multiplier: int, divisor: int) -> int:
    """The kernel's `mul_u64_u32_div`: unsigned 64-bit, the quotient rounded down."""
    return (value & U64) * multiplier // divisor & U64


def nominal_period_ns(count: int) -> int:
    """How often counter 0 ticks in mode 2 or 3 when loaded with `count` (1-65536), in ns."""
    return max(mul_u64_u32_div(count, NSEC_PER_SEC, KVM_PIT_FREQ_HZ), MIN_TIMER_PERIOD_NS)


PIT_CHANNEL_FIELDS: Final = (
    "bcd",
    "count",
    "count_latched",
    "count_load_time",
    "gate",
    "latched_count",
    "mode",
    "read_state",
    "rw_mode",
    "status",
    "status_latched",
    "write_latch",
    "write_state",
)
"""Those of struct kvm_pit_channel_state, but for what is reserved there."""


@mypyc_attr(acyclic=True)
class PitChannel:
    """One counter, under the names of struct kvm_pit_channel_state."""

    __slots__ = PIT_CHANNEL_FIELDS

    def __init__(self, gate: int) -> None:
        self.count = MAX_COUNT
        self.latched_count = 0
        self.count_latched = 0
        self.status_latched = 0
        self.status = 0
        self.read_state = 0
        self.write_state = 0
        self.write_latch = 0
        self.rw_mode = 0
        self.mode = MODE_NONE
        self.bcd = 0
        self.gate = gate
        self.count_load_time = 0

    def save(self) -> kvm_pit_channel_state:
        """All of it, as KVM_GET_PIT2 gives it."""
        return kvm_pit_channel_state(**{name: getattr(self, name) for name in PIT_CHANNEL_FIELDS})

    def restore(self, state: kvm_pit_channel_state) -> None:
        """Take over every field, unchecked, as the kernel does."""
        for name in PIT_CHANNEL_FIELDS:
            setattr(self, name, getattr(state, name))


class PitBoard(Protocol):
    """What the VM gives its PIT to stand on."""

    clock: Clock
    recorder: Recorder
    routing: IrqRouting
    notifiers: Notifiers
    bus: IoBus
    source_ids: IrqSourceIds
    delivery: IrqDelivery
    pid: int
    min_timer_period_ns: int

    def new_address(self) -> int:
        """A made-up kernel address, for the trace to name an object by."""

    def create_timer(self, function: Function, callback: Callable[[], HrTimerRestart]) -> HrTimer:
        """`hrtimer_setup` on CLOCK_MONOTONIC, absolute."""

    def create_worker(self, name: str) -> KthreadWorker:
        """`kthread_run_worker`: a new worker thread; KvmError if there can be none."""

    def set_apicv_inhibit(self, reason: ApicvInhibitReason, inhibit: bool) -> None:
        """`kvm_set_or_clear_apicv_inhibit`."""


class Speaker(IoDevice):
    """Port 0x61 on the bus: counter 2's gate and output, speaker data, refresh clock."""

    __slots__ = ("_pit",)

    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def io_read(self, port: int, size_bytes: int, stale: int) -> int:
        """`speaker_ioport_read`: one byte, the rest 0."""
        return self._pit.read_speaker() & 0xFF

    def io_write(self, port: int, size_bytes: int, value: int) -> None:
        """`speaker_ioport_write`."""
        self._pit.write_speaker(value & 0xFF)


class Pit(IoDevice):
    """struct kvm_pit with its kvm_kpit_state: counters, hrtimer, worker, reinjection.

    `pending` counts expiries not yet acknowledged, `irq_ack` says that the last pulse was; both
    are kept only while `reinject` is on.
    """

    __slots__ = (
        "_board",
        "_clock",
        "_delivery",
        "_recorder",
        "_routing",
        "channels",
        "flags",
        "irq_ack",
        "irq_source_id",
        "is_periodic",
        "pending",
        "period_ns",
        "reinject",
        "speaker",
        "timer",
        "work",
        "worker",
    )

    def __init__(self, board: PitBoard, irq_source_id: int, worker: KthreadWorker) -> None:
        """Reset, no timer running, reinject off, nothing registered: `create_pit` does the rest."""
        self._board = board
        self._clock = board.clock
        self._recorder = board.recorder
        self._routing = board.routing
        self._delivery = board.delivery
        self.irq_source_id = irq_source_id
        self.worker = worker
        self.work = KthreadWork(self.do_work, Function.PIT_DO_WORK, board.new_address())
        self.timer = board.create_timer(Function.PIT_TIMER_FN, self.timer_fn)
        self.speaker = Speaker(self)
        self.channels = tuple(PitChannel(gate=channel != SPEAKER_CHANNEL) for channel in range(3))
        self.flags = 0
        self.period_ns = 0
        self.is_periodic = False
        self.reinject = False
        self.pending = 0
        self.irq_ack = True
        for channel in self.channels[1:]:
            channel.count_load_time = self._clock.now_ns

    # The tick: expiry, worker, acknowledgement.

    def timer_fn(self) -> HrTimerRestart:
        """`pit_timer_fn`: an expiry counts and wakes the worker; periodic timers go on."""
        if self.reinject:
            self.pending += 1
        self.worker.queue_work(self.work)
        if not self.is_periodic:
            return NORESTART
        self.timer.add_expires_ns(self.period_ns)
        return RESTART

    def do_work(self) -> None:
        """`pit_do_work`: pulse GSI 0, unless the last pulse still waits for its acknowledgement;
        then the NMI watchdog.
        """
        if self.reinject:
            if not self.irq_ack:
                return
            self.irq_ack = False
        self._routing.pulse(self.irq_source_id, PIT_GSI)
        # The line is pulsed first: a PIC that is polled by the NMI's handler shows the request.
        if self._delivery.vapics_in_nmi_mode:
            self._delivery.deliver_nmi_watchdog()

    def ack_irq(self) -> None:
        """`kvm_pit_ack_irq`: the guest acknowledged GSI 0; the next counted expiry may follow."""
        self.irq_ack = True
        if self.pending > 0:
            self.pending -= 1
            if self.pending > 0:
                self.worker.queue_work(self.work)

    def mask_changed(self, masked: bool) -> None:
        """`pit_mask_notifer`: unmasking GSI 0 forgets what was missed."""
        if not masked:
            self.reset_reinject()

    def reset_reinject(self) -> None:
        """`kvm_pit_reset_reinject`."""
        if self.pending:
            self._recorder.kvm_pit_reset_reinject(self.pending)
        self.pending = 0
        self.irq_ack = True

    def set_reinject(self, reinject: bool) -> None:
        """`kvm_pit_set_reinject`: on, it needs every EOI, so it keeps APICv off."""
        if self.reinject == reinject:
            return
        self._board.set_apicv_inhibit(ApicvInhibitReason.PIT_REINJ, reinject)
        notifiers = self._board.notifiers
        if reinject:
            self.reset_reinject()
            notifiers.register_ack(PIT_GSI, self.ack_irq)
            notifiers.register_mask(PIT_GSI, self.mask_changed)
        else:
            notifiers.unregister_ack(PIT_GSI, self.ack_irq)
            notifiers.unregister_mask(PIT_GSI, self.mask_changed)
        self.reinject = reinject

    def migrate_timer(self) -> None:
        """`__kvm_migrate_pit_timer`: the timer follows vCPU 0 to the host CPU it runs on now."""
        if self.timer.cancel():
            self.timer.restart()

    # Counting.

    def load_count(self, index: int, value: int) -> None:
        """`pit_load_count`: counter `index` starts again from `value`; 0 means 65536."""
        channel = self.channels[index]
        channel.count = value or MAX_COUNT
        if index:
            channel.count_load_time = self._clock.now_ns
        elif channel.mode in (0, 1, 4):
            self._start_timer(channel.count, periodic=False)
        elif channel.mode in (2, 3):
            self._start_timer(channel.count, periodic=True)
        else:
            self._stop_timer()

    def count_of(self, index: int) -> int:
        """`pit_get_count`: what counter `index` stands at."""
        channel = self.channels[index]
        counted = self._counted(index)
        if channel.mode in (0, 1, 4, 5):
            return channel.count - counted & 0xFFFF
        if channel.mode == 3:
            return channel.count - 2 * counted % channel.count
        return channel.count - counted % channel.count

    def out_of(self, index: int) -> int:
        """`pit_get_out`: the OUT pin of counter `index`."""
        channel = self.channels[index]
        counted, count = self._counted(index), channel.count
        if channel.mode == 1:
            return int(counted < count)
        if channel.mode == 2:
            return int(counted % count == 0 and counted != 0)
        if channel.mode == 3:
            return int(counted % count < (count + 1) >> 1)
        if channel.mode in (4, 5):
            return int(counted == count)
        return int(counted >= count)

    def _counted(self, index: int) -> int:
        """Input clocks since counter `index` was loaded (`kpit_elapsed`)."""
        if index:
            elapsed_ns = self._clock.now_ns - self.channels[index].count_load_time
        elif self.period_ns:
            elapsed_ns = self.period_ns - self.timer.remaining_ns()
        else:
            return 0
        return mul_u64_u32_div(elapsed_ns, KVM_PIT_FREQ_HZ, NSEC_PER_SEC)

    def _start_timer(self, count: int, periodic: bool) -> None:
        """`create_pit_timer`. In HPET legacy mode the HPET drives IRQ 0 instead."""
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY:
            return
        interval_ns = mul_u64_u32_div(count, NSEC_PER_SEC, KVM_PIT_FREQ_HZ)
        self._stop_timer()
        self.period_ns = interval_ns
        self.is_periodic = periodic
        self.reset_reinject()
        if periodic and self.period_ns < self._board.min_timer_period_ns:
            self.period_ns = self._board.min_timer_period_ns
        self.timer.start(self._clock.now_ns + interval_ns)

    def _stop_timer(self) -> None:
        """`destroy_pit_timer`."""
        self.timer.cancel()
        self.worker.flush_work(self.work)

    def _latch_count(self, index: int) -> None:
        channel = self.channels[index]
        if not channel.count_latched:
            channel.latched_count = self.count_of(index) & 0xFFFF
            channel.count_latched = channel.rw_mode

    def _latch_status(self, index: int) -> None:
        channel = self.channels[index]
        if not channel.status_latched:
            channel.status = (
                self.out_of(index) << 7 | channel.rw_mode << 4 | channel.mode << 1 | channel.bcd
            ) & 0xFF
            channel.status_latched = 1

    # Ports 0x40-0x43.

    def io_write(self, port: int, size_bytes: int, value: int) -> None:
        """`pit_ioport_write`: only the low byte counts, whatever the size."""
        value &= 0xFF
        index = port & PIT_COUNTER_MASK
        if index == CONTROL_REGISTER:
            self._write_control(value)
        else:
            self._write_counter(index, value)

    def io_read(self, port: int, size_bytes: int, stale: int) -> int:
        """`pit_ioport_read`: one byte, the rest 0; the control register leaves the buffer alone."""
        index = port & PIT_COUNTER_MASK
        if index == CONTROL_REGISTER:
            return stale
        return self._read_counter(index) & 0xFF

    def _write_control(self, value: int) -> None:
        index = value >> 6
        if index == READ_BACK:
            self._read_back(value)
            return
        access = value >> 4 & 3
        if access == 0:
            self._latch_count(index)
            return
        channel = self.channels[index]
        channel.rw_mode = access
        channel.read_state = access
        channel.write_state = access
        mode = value >> 1 & 7
        channel.mode = mode - 4 if mode > 5 else mode
        channel.bcd = value & 1

    def _read_back(self, value: int) -> None:
        for index in range(3):
            if value & 2 << index:
                if not value & READ_BACK_NO_COUNT:
                    self._latch_count(index)
                if not value & READ_BACK_NO_STATUS:
                    self._latch_status(index)

    def _write_counter(self, index: int, value: int) -> None:
        channel = self.channels[index]
        if channel.write_state == RW_STATE_MSB:
            self.load_count(index, value << 8)
        elif channel.write_state == RW_STATE_WORD0:
            channel.write_latch = value
            channel.write_state = RW_STATE_WORD1
        elif channel.write_state == RW_STATE_WORD1:
            self.load_count(index, channel.write_latch | value << 8)
            channel.write_state = RW_STATE_WORD0
        else:
            self.load_count(index, value)

    def _read_counter(self, index: int) -> int:
        """A byte of the latched status, else of the latched count, else of the counter."""
        channel = self.channels[index]
        if channel.status_latched:
            channel.status_latched = 0
            return channel.status
        if channel.count_latched:
            return _read_latch(channel)
        count = self.count_of(index)
        if channel.read_state == RW_STATE_MSB:
            return count >> 8
        if channel.read_state == RW_STATE_WORD0:
            channel.read_state = RW_STATE_WORD1
        elif channel.read_state == RW_STATE_WORD1:
            channel.read_state = RW_STATE_WORD0
            return count >> 8
        return count

    # Port 0x61.

    def write_speaker(self, value: int) -> None:
        """`speaker_ioport_write`: bit 0 is counter 2's gate, bit 1 the speaker data."""
        if value & SPEAKER_DATA:
            self.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON
        else:
            self.flags &= ~KVM_PIT_FLAGS_SPEAKER_DATA_ON
        self._set_gate(SPEAKER_CHANNEL, value & SPEAKER_GATE)

    def read_speaker(self) -> int:
        """`speaker_ioport_read`."""
        refresh = self._clock.now_ns >> REFRESH_CLOCK_SHIFT & 1
        data = SPEAKER_DATA if self.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON else 0
        return (
            data
            | self.channels[SPEAKER_CHANNEL].gate
            | self.out_of(SPEAKER_CHANNEL) << SPEAKER_OUT_SHIFT
            | refresh << SPEAKER_REFRESH_SHIFT
        )

    def _set_gate(self, index: int, gate: int) -> None:
        """`pit_set_gate`: a rising gate restarts modes 1, 2, 3 and 5; a low one stops nothing."""
        channel = self.channels[index]
        if channel.mode in (1, 2, 3, 5) and channel.gate < gate:
            channel.count_load_time = self._clock.now_ns
        channel.gate = gate

    # What user space does.

    def get_state(self) -> kvm_pit_state:
        """KVM_GET_PIT."""
        state = kvm_pit_state()
        for index, channel in enumerate(self.channels):
            state.channels[index] = channel.save()
        return state

    def get_state2(self) -> kvm_pit_state2:
        """KVM_GET_PIT2."""
        state = kvm_pit_state2(flags=self.flags)
        for index, channel in enumerate(self.channels):
            state.channels[index] = channel.save()
        return state

    def set_state(self, state: kvm_pit_state) -> None:
        """KVM_SET_PIT: every counter starts again from the count given."""
        for channel, given in zip(self.channels, state.channels, strict=True):
            channel.restore(given)
        for index, channel in enumerate(self.channels):
            self.load_count(index, channel.count)

    def set_state2(self, state: kvm_pit_state2) -> None:
        """KVM_SET_PIT2: as KVM_SET_PIT; entering HPET legacy mode stops counter 0's timer."""
        hpet_starts = state.flags & ~self.flags & KVM_PIT_FLAGS_HPET_LEGACY
        for channel, given in zip(self.channels, state.channels, strict=True):
            channel.restore(given)
        self.flags = state.flags
        for index, channel in enumerate(self.channels):
            if index == 0 and hpet_starts:
                mode, channel.mode = channel.mode, MODE_NONE
                self.load_count(0, channel.count)
                channel.mode = mode
            else:
                self.load_count(index, channel.count)

    def free(self) -> None:
        """`kvm_free_pit`: take back everything `create_pit` did."""
        board = self._board
        board.bus.unregister(self.speaker)
        board.bus.unregister(self)
        self.set_reinject(False)
        self.timer.cancel()
        self.worker.destroy()
        board.source_ids.free(self.irq_source_id)


def _read_latch(channel: PitChannel) -> int:
    if channel.count_latched == RW_STATE_MSB:
        channel.count_latched = 0
        return channel.latched_count >> 8
    if channel.count_latched == RW_STATE_WORD0:
        channel.count_latched = RW_STATE_MSB
    else:
        channel.count_latched = 0
    return channel.latched_count


def create_pit(board: PitBoard, flags: int) -> Pit:
    """`kvm_create_pit`: source id, worker, reset chip, reinject on, ports; `flags` as CREATE_PIT2.

    A step that fails (its exception passes on) takes back all before it.
    """
    with ExitStack() as undo:
        source = board.source_ids.request()
        undo.callback(board.source_ids.free, source)
        worker = board.create_worker(f"kvm-pit/{board.pid}")
        undo.callback(worker.destroy)
        pit = Pit(board, source, worker)
        pit.set_reinject(True)
        undo.callback(pit.set_reinject, False)
        board.bus.register(PIT_BASE_ADDRESS, PIT_MEM_LENGTH, pit)
        undo.callback(board.bus.unregister, pit)
        if flags & KVM_PIT_SPEAKER_DUMMY:
            board.bus.register(SPEAKER_BASE_ADDRESS, SPEAKER_MEM_LENGTH, pit.speaker, decoded=1)
        undo.pop_all()
    return pit
