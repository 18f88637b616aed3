"""The local APIC's timer (SDM vol. 3A 12.5.4; arch/x86/kvm/lapic.c).

One-shot, periodic and TSC-deadline mode, the divide register, the current count. KVM's way:

* the bus clock is 1 GHz (KVM_CAP_X86_APIC_BUS_CYCLES_NS makes it slower); the current count is
  computed from the clock when read, and runs while the LVT is masked;
* until KVM_SET_CPUID2 there is only one-shot mode; TSC-deadline mode needs its CPUID bit;
* an expiry makes the timer pending, and one that finds it pending is lost; the vCPU turns it into
  an interrupt before it enters the guest again;
* a periodic interval below 200 us is raised to 200 us, except for the first expiry after
  KVM_SET_LAPIC gave a current count;
* a periodic timer whose next expiry has passed already expires at once, once: no catching up;
* a new divisor leaves the count as it is; a one-shot that has expired expires again;
* a deadline that has passed expires at once; the MSR reads 0 after;
* a change between TSC-deadline and another mode stops the timer and clears the initial count;
* a deadline more than 2^64 / 10^6 TSC cycles ahead comes too early (the product wraps).

Not modelled: the VMX preemption timer, `timer_advance_ns` (a deadline's interrupt comes when it is
due), posted timer interrupts, the log lines that tell of a clamp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvmtick.irqchip.apicdef import (
    APIC_LVT_TIMER_ONESHOT,
    APIC_LVT_TIMER_PERIODIC,
    APIC_LVT_TIMER_TSCDEADLINE,
    APIC_TDR_MASK,
    U32,
    U64,
)
from kvmtick.irqchip.i8254 import mul_u64_u32_div
from kvmtick.timing.hrtimer import NORESTART, RESTART, HrTimerRestart
from kvmtick.trace.events import Function

if TYPE_CHECKING:
    from kvmtick.irqchip.lapic import LapicBoard, LapicVcpu

__all__ = ["GUEST_TSC_KHZ", "LapicTimer"]

GUEST_TSC_KHZ: Final = 1_000_000
"""The guest's TSC counts nanoseconds, unless KVM_SET_TSC_KHZ says otherwise."""

_NS_PER_MS: Final = 1_000_000


class LapicTimer:
    """struct kvm_timer with its registers LVTT, TMICT and TDCR: the timer half of a local APIC.

    `target_expiration_ns` is when the count reaches 0, on the machine's clock; `tscdeadline` is
    IA32_TSC_DEADLINE, kept in that mode only. `pending_timer` is 1 from an expiry until the vCPU
    takes it.
    """

    __slots__ = (
        "_bus_cycle_ns",
        "_clock",
        "_min_period_ns",
        "divide_count",
        "lvtt",
        "pending_timer",
        "period_ns",
        "target_expiration_ns",
        "tdcr",
        "timer",
        "timer_mode",
        "timer_mode_mask",
        "tmict",
        "tscdeadline",
        "vcpu",
    )

    def __init__(self, board: LapicBoard, vcpu: LapicVcpu) -> None:
        self._clock = board.clock
        self._bus_cycle_ns = board.delivery.apic_bus_cycle_ns
        self._min_period_ns = board.min_timer_period_ns
        self.vcpu = vcpu
        self.timer = board.create_timer(Function.APIC_TIMER_FN, self.timer_fn)
        self.lvtt = 0
        self.tmict = 0
        self.tdcr = 0
        self.divide_count = 0
        self.timer_mode = APIC_LVT_TIMER_ONESHOT
        self.timer_mode_mask = 0
        self.period_ns = 0
        self.target_expiration_ns = 0
        self.tscdeadline = 0
        self.pending_timer = 0

    @property
    def is_periodic(self) -> bool:
        """`apic_lvtt_period`."""
        return self.timer_mode == APIC_LVT_TIMER_PERIODIC

    @property
    def is_oneshot(self) -> bool:
        """`apic_lvtt_oneshot`."""
        return self.timer_mode == APIC_LVT_TIMER_ONESHOT

    @property
    def is_tscdeadline(self) -> bool:
        """`apic_lvtt_tscdeadline`."""
        return self.timer_mode == APIC_LVT_TIMER_TSCDEADLINE

    def timer_fn(self) -> HrTimerRestart:
        """`apic_timer_fn`."""
        self._expired()
        if self.timer_mode != APIC_LVT_TIMER_PERIODIC:
            return NORESTART
        self._advance_target()
        self.timer.expires_ns = self.target_expiration_ns
        return RESTART

    def current_count(self) -> int:
        """`apic_get_tmcct`: what the count stands at; 0 in TSC-deadline mode."""
        if self.is_tscdeadline or not self.tmict or not self.period_ns:
            return 0
        remaining_ns = max(self.target_expiration_ns - self._clock.now_ns, 0)
        # The kernel's modulo also turns a whole period into 0. There no time is that short, here a
        # count that was loaded this very nanosecond would read as one that has run out.
        if remaining_ns > self.period_ns:
            remaining_ns %= self.period_ns
        return remaining_ns // (self._bus_cycle_ns * self.divide_count) & U32

    def write_tmict(self, value: int) -> None:
        """A write to the initial count: starts the timer anew, but not in TSC-deadline mode."""
        if self.is_tscdeadline:
            return
        self.cancel_timer()
        self.tmict = value
        self.start_timer()

    def write_tdcr(self, value: int) -> None:
        """A write to the divide register: what remains of a running count takes longer or less."""
        old_divisor = self.divide_count
        self.tdcr = value & APIC_TDR_MASK
        self.update_divide_count()
        if self.divide_count != old_divisor and self.period_ns:
            self.timer.cancel()
            self._rescale_target(old_divisor)
            self._restart_timer()

    def set_deadline(self, value: int) -> None:
        """IA32_TSC_DEADLINE, in that mode: 0 stops the timer."""
        self.timer.cancel()
        self.tscdeadline = value
        self._restart_timer()

    def update_lvtt(self) -> None:
        """`apic_update_lvtt`: LVTT or what of it counts has changed."""
        mode = self.lvtt & self.timer_mode_mask
        if mode == self.timer_mode:
            return
        if APIC_LVT_TIMER_TSCDEADLINE in (mode, self.timer_mode):
            self.timer.cancel()
            self.tmict = 0
            self.period_ns = 0
            self.tscdeadline = 0
        self.timer_mode = mode
        self._limit_period()

    def update_divide_count(self) -> None:
        """`update_divide_count`."""
        code = (self.tdcr & 3 | (self.tdcr & 8) >> 1) + 1
        self.divide_count = 1 << (code & 7)

    def start_timer(self, count: int | None = None) -> None:
        """`__start_apic_timer`: go from the initial count, or (KVM_SET_LAPIC) from `count`."""
        if (self.is_periodic or self.is_oneshot) and not self._set_target(count):
            return
        self._restart_timer()

    def cancel_timer(self) -> None:
        """`cancel_apic_timer`."""
        self.timer.cancel()
        self.pending_timer = 0

    def migrate_timer(self) -> None:
        """`__kvm_migrate_apic_timer`: the timer follows its vCPU to another host CPU."""
        if self.timer.cancel():
            self.timer.restart()

    def taken(self) -> None:
        """The pending expiry has become an interrupt."""
        self.pending_timer = 0
        if self.timer_mode == APIC_LVT_TIMER_TSCDEADLINE:
            self.tscdeadline = 0
        elif self.timer_mode == APIC_LVT_TIMER_ONESHOT:
            self.target_expiration_ns = 0

    def _expired(self) -> None:
        """`apic_timer_expired`."""
        if self.pending_timer:
            return
        self.pending_timer = 1
        self.vcpu.request_unblock()

    def _advance_target(self) -> None:
        """`advance_periodic_target_expiration`."""
        now_ns = self._clock.now_ns
        target_ns = self.target_expiration_ns + self.period_ns
        self.target_expiration_ns = target_ns if target_ns > now_ns else now_ns

    def _count_ns(self, count: int) -> int:
        """`tmict_to_ns`."""
        return count * self._bus_cycle_ns * self.divide_count

    def _limit_period(self) -> None:
        """`limit_periodic_timer_frequency`."""
        if self.is_periodic and 0 < self.period_ns < self._min_period_ns:
            self.period_ns = self._min_period_ns

    def _set_target(self, count: int | None) -> bool:
        """`set_target_expiration`; False: the initial count is 0, so nothing shall run."""
        self.period_ns = self._count_ns(self.tmict)
        if not self.period_ns:
            return False
        self._limit_period()
        remaining_ns = self.period_ns
        if count is not None:
            remaining_ns = min(self._count_ns(count), self.period_ns)
            if not remaining_ns and self.is_periodic:
                remaining_ns = self.period_ns
        self.target_expiration_ns = self._clock.now_ns + remaining_ns
        return True

    def _rescale_target(self, old_divisor: int) -> None:
        """`update_target_expiration`."""
        self.period_ns = self._count_ns(self.tmict)
        self._limit_period()
        now_ns = self._clock.now_ns
        old_ns = max(self.target_expiration_ns - now_ns, 0)
        new_ns = mul_u64_u32_div(old_ns, self.divide_count, old_divisor)
        self.target_expiration_ns = now_ns + new_ns

    def _restart_timer(self) -> None:
        """`restart_apic_timer`, `start_sw_timer`."""
        if self.is_periodic:
            self._start_period()
        elif self.pending_timer:
            return
        elif self.is_oneshot:
            self._start_period()
        elif self.is_tscdeadline:
            self._start_tscdeadline()

    def _start_period(self) -> None:
        """`start_sw_period`."""
        if not self.period_ns:
            return
        if self._clock.now_ns > self.target_expiration_ns:
            self._expired()
            if self.is_oneshot:
                return
            self._advance_target()
        self.timer.start(self.target_expiration_ns)

    def _start_tscdeadline(self) -> None:
        """`start_sw_tscdeadline`."""
        if not self.tscdeadline:
            return
        ahead = self.tscdeadline - self.vcpu.guest_tsc()
        remaining_ns = (ahead * _NS_PER_MS & U64) // self.vcpu.tsc_khz
        if ahead > 0 and remaining_ns > 0:
            self.timer.start(self._clock.now_ns + remaining_ns)
        else:
            self._expired()
