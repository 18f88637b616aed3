"""The local APIC's timer as measured on a real kernel.

Its bus clock has 1 GHz: at divide 1 a count is a nanosecond. Times are the guest's, by its TSC, and
bounds come from reading that before and after.
"""

import time

import pytest
from eventfds import wait_for

from kvmtick.guests.script import (
    Op,
    Results,
    lapic_read,
    lapic_write,
    out8,
    rdmsr,
    snap_vector,
    spin_ms,
    sti,
    tsc_read,
    unreal,
    wait_vector,
    wrmsr,
)
from kvmtick.kvm.model import ModelVm

from .rig import (
    DIVIDE_BY_1,
    ENABLED,
    LVT_MASKED,
    LVT_PERIODIC,
    LVT_TSC_DEADLINE,
    LVTT,
    MSR_TSC,
    MSR_TSC_DEADLINE,
    PORT_ACT,
    SVR,
    TDCR,
    TMCCT,
    TMICT,
    WINDOWS,
    Backend,
    Pc,
    Script,
)

VECTOR = 0x4E
CLAMP_NS = 200_000
SECOND = 1_000_000_000
"""As a count at divide 1."""
SKEW = 0.001
"""The host disciplines its clock, but not the TSC."""
ON: Script = (unreal(), lapic_write(SVR, ENABLED), lapic_write(TDCR, DIVIDE_BY_1))


def tsc_ns(pc: Pc, got: Results, first: int, second: int) -> float:
    """The guest's time from one `tsc_read` to another, by their indices."""
    low, high = (got.results[at] | got.results[at + 1] << 32 for at in (first, second))
    return (high - low) * 1e6 / pc.tsc_khz


def timer(mode: int, count: int) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Start it; `mode` is that of LVTT."""
    return lapic_write(LVTT, mode | VECTOR), lapic_write(TMICT, count)


def counted(backend: Backend, given: Script, divisor: int) -> None:
    """TMCCT goes down by 1 every `divisor` ns."""
    with backend.pc() as pc:
        got = pc.run(
            *(unreal(), lapic_write(SVR, ENABLED), *given, lapic_write(TMICT, 0xFFFF_FFFF)),
            *(tsc_read(0), lapic_read(TMCCT, 2), tsc_read(3), spin_ms(2)),
            *(tsc_read(5), lapic_read(TMCCT, 7), tsc_read(8)),
        )
        gone_ns = (got.results[2] - got.results[7]) * divisor
        slack_ns = 2 * divisor + (0 if backend.exact else SKEW * gone_ns)
        assert tsc_ns(pc, got, 3, 5) - slack_ns <= gone_ns <= tsc_ns(pc, got, 0, 8) + slack_ns


@pytest.mark.parametrize(
    ("code", "divisor"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)],
)
def test_a_count_is_a_nanosecond_times_the_divisor(
    backend: Backend, code: int, divisor: int
) -> None:
    counted(backend, (lapic_write(TDCR, code), lapic_write(LVTT, VECTOR)), divisor)


@pytest.mark.parametrize("mode", [0, LVT_PERIODIC], ids=["one-shot", "periodic"])
def test_the_count_runs_while_masked(backend: Backend, mode: int) -> None:
    masked = (lapic_write(TDCR, DIVIDE_BY_1), lapic_write(LVTT, LVT_MASKED | mode | VECTOR))
    counted(backend, masked, 1)


def test_a_masked_expiry_is_no_interrupt(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(*ON, *timer(LVT_MASKED, 300_000), sti(), spin_ms(1), *WINDOWS)
        assert got.apic_vectors[VECTOR] == 0
        assert pc.irr() == set()
        assert pc.lapic(TMCCT) == 0


def test_one_shot_fires_once(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, tsc_read(0), *timer(0, 500_000), wait_vector(VECTOR, 1), tsc_read(2)),
            *(lapic_read(TMCCT, 4), lapic_read(TMICT, 5), spin_ms(2), *WINDOWS),
            snap_vector(VECTOR, 6),
        )
        assert got.results[4:7] == (0, 500_000, 1)
        took_ns = tsc_ns(pc, got, 0, 2)
        if backend.exact:
            assert 500_000 <= took_ns < 501_000
        else:
            assert took_ns > 500_000 * (1 - SKEW)


def test_periodic_fires_every_period(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, tsc_read(0), *timer(LVT_PERIODIC, 500_000), wait_vector(VECTOR, 10)),
            *(tsc_read(2), lapic_write(TMICT, 0), spin_ms(1), *WINDOWS, snap_vector(VECTOR, 4)),
        )
        took_ns = tsc_ns(pc, got, 0, 2)
        assert got.results[4] in ((10,) if backend.exact else (10, 11))
        if backend.exact:
            assert 5_000_000 <= took_ns < 5_001_000
        else:
            assert took_ns > 5_000_000 * (1 - SKEW)


def test_a_period_below_200_us_is_raised_to_200_us(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, tsc_read(0), *timer(LVT_PERIODIC, 1000), wait_vector(VECTOR, 20)),
            tsc_read(2),
        )
        took_ns = tsc_ns(pc, got, 0, 2)
        if backend.exact:
            assert 20 * CLAMP_NS <= took_ns < 20 * CLAMP_NS + 1000
        else:
            assert took_ns > 20 * CLAMP_NS * (1 - SKEW)


def test_a_one_shot_below_200_us_is_not_raised(backend: Backend) -> None:
    """Many in the time of a few periods; on the kernel the quickest counts."""
    with backend.pc() as pc:
        shots = tuple(
            (
                tsc_read(6 * n),
                *timer(0, 10_000)[1:],
                wait_vector(VECTOR, n + 1),
                tsc_read(6 * n + 2),
            )
            for n in range(20)
        )
        flat = tuple(item for shot in shots for item in shot)
        got = pc.run(*ON, lapic_write(LVTT, VECTOR), *flat)
        quickest_ns = min(tsc_ns(pc, got, 6 * n, 6 * n + 2) for n in range(20))
        assert 10_000 * (1 - SKEW) <= quickest_ns < CLAMP_NS
        assert got.apic_vectors[VECTOR] == 20


# --- TSC deadline ---------------------------------------------------------------------------------


def deadline(pc: Pc, ns: int) -> int:
    """TSC cycles."""
    return ns * pc.tsc_khz // 1_000_000


def test_a_tsc_deadline_fires_then_and_the_msr_reads_0_after(backend: Backend) -> None:
    with backend.pc() as pc:
        at = deadline(pc, 20_000_000)
        got = pc.run(
            *(*ON, lapic_write(LVTT, LVT_TSC_DEADLINE | VECTOR), wrmsr(MSR_TSC, 0)),
            *(wrmsr(MSR_TSC_DEADLINE, at), rdmsr(MSR_TSC_DEADLINE, 0), lapic_read(TMCCT, 2)),
            *(wait_vector(VECTOR, 1), tsc_read(4), rdmsr(MSR_TSC_DEADLINE, 6)),
            *(spin_ms(1), *WINDOWS, snap_vector(VECTOR, 8)),
        )
        assert got.results[:3] == (at & 0xFFFF_FFFF, at >> 32, 0)
        assert got.results[6:9] == (0, 0, 1)
        fired_at = got.results[4] | got.results[5] << 32
        assert fired_at >= at * (1 if backend.exact else 1 - SKEW)
        if backend.exact:
            assert fired_at < at + 1000


def test_a_deadline_in_the_past_fires_at_once(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(LVTT, LVT_TSC_DEADLINE | VECTOR), wrmsr(MSR_TSC, 1 << 40), sti()),
            *(wrmsr(MSR_TSC_DEADLINE, 1), *WINDOWS, snap_vector(VECTOR, 0)),
            rdmsr(MSR_TSC_DEADLINE, 2),
        )
        assert got.results[0] == 1
        assert got.results[2:4] == (0, 0)


def test_writing_0_disarms_the_deadline(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(LVTT, LVT_TSC_DEADLINE | VECTOR), wrmsr(MSR_TSC, 0)),
            *(wrmsr(MSR_TSC_DEADLINE, deadline(pc, 50_000_000)), wrmsr(MSR_TSC_DEADLINE, 0)),
            *(rdmsr(MSR_TSC_DEADLINE, 0), wrmsr(MSR_TSC, 1 << 40), sti(), spin_ms(1), *WINDOWS),
        )
        assert got.results[:2] == (0, 0)
        assert got.apic_vectors[VECTOR] == 0


def test_the_initial_count_is_not_for_tsc_deadline_mode(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(LVTT, LVT_TSC_DEADLINE | VECTOR), lapic_write(TMICT, 100_000)),
            *(lapic_read(TMICT, 0), lapic_read(TMCCT, 1), sti(), spin_ms(1), *WINDOWS),
        )
        assert got.results[:2] == (0, 0)
        assert got.apic_vectors[VECTOR] == 0


def test_the_deadline_msr_is_ignored_in_the_other_modes(backend: Backend) -> None:
    with backend.pc() as pc:
        got = pc.run(
            *(*ON, lapic_write(LVTT, VECTOR), wrmsr(MSR_TSC_DEADLINE, 1)),
            *(rdmsr(MSR_TSC_DEADLINE, 0), sti(), *WINDOWS),
        )
        assert got.results[:2] == (0, 0)
        assert (got.apic_vectors[VECTOR], got.faults) == (0, 0)


def test_without_its_cpuid_bit_there_is_no_tsc_deadline_mode(backend: Backend) -> None:
    """Bit 18 of LVTT is dropped, the MSR reads 0."""
    with backend.pc(cpuid=False) as pc:
        got = pc.run(
            *(*ON, lapic_write(LVTT, LVT_TSC_DEADLINE | VECTOR), lapic_read(LVTT, 0)),
            *(wrmsr(MSR_TSC_DEADLINE, 1), rdmsr(MSR_TSC_DEADLINE, 1), sti(), *WINDOWS),
        )
        assert got.results[:3] == (VECTOR, 0, 0)
        assert (got.apic_vectors[VECTOR], got.faults) == (0, 0)


# --- KVM_SET_LAPIC --------------------------------------------------------------------------------


def test_set_lapic_restores_the_current_count(backend: Backend) -> None:
    """It runs on from there."""
    with backend.pc() as pc:
        before_ns = time.monotonic_ns()
        pc.set_lapic(
            {SVR: ENABLED, TDCR: DIVIDE_BY_1, LVTT: VECTOR, TMICT: 4 * SECOND, TMCCT: 2 * SECOND}
        )
        count = pc.lapic(TMCCT)
        took_ns = time.monotonic_ns() - before_ns
        if backend.exact:
            assert count == 2 * SECOND
        else:
            assert 2 * SECOND - took_ns <= count < 2 * SECOND
        assert pc.lapic(TMICT) == 4 * SECOND
        count = pc.lapic(TMCCT)
        got = pc.run(unreal(), lapic_read(TMCCT, 0))
        assert 0 < got.results[0] < count


def test_the_request_is_set_only_when_the_vcpu_runs(backend: Backend) -> None:
    with backend.pc() as pc:
        pc.set_lapic(
            {SVR: ENABLED, TDCR: DIVIDE_BY_1, LVTT: VECTOR, TMICT: 1_000_000, TMCCT: 1_000_000}
        )
        if isinstance(pc.vm, ModelVm):
            pc.vm.machine.take_vcpu_off(3_000_000)
            assert pc.vm.run(for_ns=2_000_000).exit.reason == "time"
        wait_for(lambda: pc.lapic(TMCCT) == 0)
        assert pc.irr() == set()
        pc.run(out8(PORT_ACT, 0), acts=[lambda: None])
        assert pc.irr() == {VECTOR}
