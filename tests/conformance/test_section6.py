"""What becomes of ticks the guest cannot take: one case a row, on the model and on the kernel.

The rows are those with the PIC of the table "Tick semantics" that was measured on a real kernel.
Each runs a script of the scenario guest at 1 kHz (mode 2) and asserts on the guest's own counters.
On the model the numbers are exact. On the kernel only a run counts that took LATE_MS more than the
script asks for at most: others are repeated, and if the host is never on time the case is skipped.
Of such a run is demanded

* where nothing is lost: the model's count at the end, TOLERANCE more or less. The first and the
  last tick fall anywhere in a period, and a late host gives one more for every millisecond. The
  guest stays for 40 ms more, so that a slow replay is over;
* where the ticks of the situation are lost: at most the model's count and TOLERANCE, and at least
  the 3 before, the one the PIC holds, and 1 more. With reinject off every delay costs the guest
  ticks, also after the situation;
* of what the guest takes at once, in its first few interrupt windows: 1; a timer that happens to
  expire right then makes it 2.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import pytest
from eventfds import LIMIT_S

from kvmtick.abi import HostError
from kvmtick.abi.structs import kvm_pit_state2
from kvmtick.guests.script import (
    EXIT_CODE,
    Results,
    Scenario,
    cli,
    end,
    eoi_off,
    idle_ms,
    in8,
    out8,
    pit,
    snap,
    spin_ms,
    sti,
    user_sleep_us,
    wait_ticks,
)
from kvmtick.kvm.kernel import KernelVm
from kvmtick.kvm.model import ModelVm

from .rig import (
    ATTEMPTS,
    COUNT,
    LATE_MS,
    PERIOD_NS,
    PORT_ACT,
    TOLERANCE,
    WINDOWS,
    Handler,
    Script,
    nominal_ns,
)

PORT_MARK = 0x511
"""A write notes the time."""
START: Script = (pit(COUNT), wait_ticks(3), snap(0))
FINISH: Script = (idle_ms(10), end(EXIT_CODE))
REPLAY_AND_FINISH: Script = (idle_ms(40), end(EXIT_CODE))
LEAST_LOST = 5


class Vm(Protocol):
    """What both back ends have, as far as these cases need it."""

    def reinject_control(self, reinject: bool) -> None: ...
    def get_pit2(self) -> kvm_pit_state2: ...
    def set_pit2(self, state: kvm_pit_state2) -> None: ...


@dataclass
class Played:
    """What a script left behind: `snaps` are the guest's, `marks_ns` the times at PORT_MARK.

    `marks_ns` begins with the time after the act, if there was one; that took `act_ns`.
    """

    snaps: tuple[int, ...]
    counter: int
    elapsed_ns: int
    marks_ns: list[int]
    act_ns: int


class UserSpace:
    """The test's side of the two ports."""

    def __init__(self, vm: Vm, act: Callable[[Vm], None] | None, now: Callable[[], int]) -> None:
        self.handlers: dict[int, Handler] = {PORT_ACT: self._on_act, PORT_MARK: self._on_mark}
        self.marks_ns: list[int] = []
        self.act_ns = 0
        self._vm, self._act, self._now = vm, act, now

    def _on_act(self, port: int, size_bytes: int, value: int | None) -> None:
        assert self._act is not None
        begin_ns = self._now()
        self._act(self._vm)
        self.marks_ns.append(self._now())
        self.act_ns = self.marks_ns[-1] - begin_ns

    def _on_mark(self, port: int, size_bytes: int, value: int | None) -> None:
        self.marks_ns.append(self._now())


class ModelBackend:
    """The model; every number is exact."""

    name = "model"
    exact = True

    def play(
        self, script: Script, reinject: int, act: Callable[[Vm], None] | None = None
    ) -> Played:
        """Run a script to its end; `act` is what a write to PORT_ACT does."""
        with ModelVm() as vm:
            now = lambda: vm.machine.clock.now_ns  # noqa: E731 - one expression for each back end
            user = UserSpace(vm, act, now)
            vm.create_irqchip()
            vm.create_pit2()
            vm.reinject_control(bool(reinject))
            vm.create_vcpu()
            vm.load(Scenario("section6", "", script).guest())
            run = vm.run(for_ns=1_000_000_000, handlers=user.handlers)
            assert run.exit.code == EXIT_CODE, run.exit
            return _played(vm.read_memory(0, 0x10000), run.elapsed_ns, user)


class KernelBackend:
    """/dev/kvm, in real time."""

    name = "kernel"
    exact = False

    def play(
        self, script: Script, reinject: int, act: Callable[[Vm], None] | None = None
    ) -> Played:
        """Run a script to its end on a host that is on time."""
        for _ in range(ATTEMPTS):
            played = self._play(script, reinject, act)
            # KVM_REINJECT_CONTROL waits for readers of its notifiers: milliseconds, ours to wait.
            late_ns = played.elapsed_ns - played.act_ns - nominal_ns(script)
            if late_ns < LATE_MS * 1_000_000:
                return played
        pytest.skip(f"the host is late: the last of {ATTEMPTS} runs by {late_ns / 1e6:.1f} ms")

    def _play(self, script: Script, reinject: int, act: Callable[[Vm], None] | None) -> Played:
        with KernelVm() as vm:
            user = UserSpace(vm, act, time.monotonic_ns)
            vm.create_irqchip()
            vm.create_pit2()
            vm.reinject_control(bool(reinject))
            vm.create_vcpu()
            vm.load(Scenario("section6", "", script).guest(vm.get_tsc_khz()))
            run = vm.run(handlers=user.handlers, limit_s=LIMIT_S)
            assert run.exit.code == EXIT_CODE, run.exit
            return _played(vm.read_memory(0, 0x10000), run.elapsed_ns, user)


Backend = ModelBackend | KernelBackend


def _played(memory: bytes, elapsed_ns: int, user: UserSpace) -> Played:
    results = Results.read(memory)
    assert results.vectors == (results.counter,) + (0,) * 15
    return Played(results.results, results.counter, elapsed_ns, user.marks_ns, user.act_ns)


@pytest.fixture(params=["model", "kernel"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Both back ends; a skip that says why where /dev/kvm cannot be used."""
    if request.param == "model":
        return ModelBackend()
    try:
        KernelVm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")
    return KernelBackend()


reinject_off_and_on = pytest.mark.parametrize("reinject", [0, 1])


def assert_all_delivered(backend: Backend, played: Played, expected: int) -> None:
    """The guest's count at the end, where nothing is lost."""
    assert abs(played.counter - expected) <= (0 if backend.exact else TOLERANCE)


def assert_lost(backend: Backend, played: Played, expected: int) -> None:
    """The guest's count at the end, where what it could not take is lost."""
    if backend.exact:
        assert played.counter == expected
    else:
        assert LEAST_LOST <= played.counter <= expected + TOLERANCE


def assert_at_once(backend: Backend, played: Played, expected: int) -> None:
    """What the guest took in its windows, between snaps 1 and 2."""
    taken = played.snaps[2] - played.snaps[1]
    if backend.exact:
        assert taken == expected
    else:
        assert expected <= taken <= expected + 1


def assert_none_meanwhile(played: Played) -> None:
    """Between snaps 0 and 1 the guest took no tick."""
    assert played.snaps[1] == played.snaps[0]


@reinject_off_and_on
def test_if_0_for_50_ms(backend: Backend, reinject: int) -> None:
    """On: all 50 are delivered later. Off: one, latched in the PIC, then as usual."""
    blocked = (cli(), snap(0), spin_ms(50), snap(1), sti())
    played = backend.play((*START, *blocked, *REPLAY_AND_FINISH), reinject)
    assert_none_meanwhile(played)
    if reinject:
        assert_all_delivered(backend, played, 94)
    else:
        assert_lost(backend, played, 45)


@reinject_off_and_on
def test_vcpu_not_in_kvm_run_for_50_ms(backend: Backend, reinject: int) -> None:
    """On: all 50 are delivered later. Off: one."""
    played = backend.play((*START, user_sleep_us(50_000), *REPLAY_AND_FINISH), reinject)
    if reinject:
        assert_all_delivered(backend, played, 94)
    else:
        assert_lost(backend, played, 45)


@reinject_off_and_on
def test_irq_0_masked_in_the_pic_for_50_ms(backend: Backend, reinject: int) -> None:
    """Both: what was counted is dropped at the unmask; the PIC's latched request makes one tick."""
    masked = (out8(0x21, 0xFF), snap(0), spin_ms(50), snap(1))
    played = backend.play((*START, *masked, out8(0x21, 0xFE), *WINDOWS, snap(2), *FINISH), reinject)
    assert_none_meanwhile(played)
    assert_at_once(backend, played, 1)
    assert_lost(backend, played, 15)


@reinject_off_and_on
def test_if_0_for_30_ms_then_mask_and_unmask(backend: Backend, reinject: int) -> None:
    """On: 30 are pending, the unmask drops them. Both: one at once."""
    blocked = (cli(), snap(0), user_sleep_us(30_000), snap(1), out8(0x21, 0xFF), out8(0x21, 0xFE))
    played = backend.play((*START, *blocked, sti(), *WINDOWS, snap(2), *FINISH), reinject)
    assert_none_meanwhile(played)
    assert_at_once(backend, played, 1)
    assert_lost(backend, played, 15)


NO_EOI: Script = (
    *(eoi_off(), pit(COUNT), sti(), spin_ms(2), *WINDOWS),
    *(user_sleep_us(20_000), *WINDOWS),
)
READ_IRR: Script = (out8(0x20, 0x0A), in8(0x20, 4))


@reinject_off_and_on
def test_no_eoi_at_all(backend: Backend, reinject: int) -> None:
    """Both: one tick, the PIC lets no second one through."""
    played = backend.play((*NO_EOI, snap(0), end(EXIT_CODE)), reinject)
    assert played.snaps[0] == played.counter == 1


@reinject_off_and_on
def test_no_eoi_at_all_leaves_a_request_only_if_the_line_is_pulsed(
    backend: Backend, reinject: int
) -> None:
    """On: the timer goes on, the line is not pulsed again. Off: it is, one request is latched."""
    if reinject and not backend.exact:
        pytest.skip(
            "the recorded host's back end acknowledges to the PIT at injection: a second pulse"
        )
    played = backend.play((*NO_EOI, *READ_IRR, end(EXIT_CODE)), reinject)
    assert played.snaps[4] == (0 if reinject else 1)


@reinject_off_and_on
def test_after_a_late_eoi(backend: Backend, reinject: int) -> None:
    """Both: one more tick. On: then the PIT waits for the next EOI. Off: one is latched again."""
    late = (out8(0x20, 0x20), *WINDOWS, snap(1), user_sleep_us(5_000), *WINDOWS, snap(2))
    played = backend.play((*NO_EOI, snap(0), *late, end(EXIT_CODE)), reinject)
    first, more, last = played.snaps[:3]
    if backend.exact:
        assert (first, more, last) == (1, 2, 2)
    else:
        # The worker's pulse that follows the EOI may come after the windows.
        assert first == 1
        assert more in (1, 2)
        assert last == 2


BLOCK_30_MS: Script = (cli(), snap(0), user_sleep_us(30_000), out8(PORT_ACT, 0), snap(1), sti())


def test_reinject_control_off_with_30_pending(backend: Backend) -> None:
    """The rest is dropped, one is delivered."""
    script = (*START, *BLOCK_30_MS, *WINDOWS, snap(2), *FINISH)
    played = backend.play(script, 1, lambda vm: vm.reinject_control(False))
    assert_none_meanwhile(played)
    assert_at_once(backend, played, 1)
    assert_lost(backend, played, 15)


def test_reinject_control_on_with_ticks_lost(backend: Backend) -> None:
    """What was lost is not recovered."""
    script = (*START, *BLOCK_30_MS, *WINDOWS, snap(2), *FINISH)
    played = backend.play(script, 0, lambda vm: vm.reinject_control(True))
    assert_none_meanwhile(played)
    assert_at_once(backend, played, 1)
    assert_lost(backend, played, 15)


@reinject_off_and_on
def test_set_pit2_with_30_pending(backend: Backend, reinject: int) -> None:
    """They are lost, and the timer starts again from a full period: half of one had passed."""
    blocked = (cli(), snap(0), user_sleep_us(30_500), out8(PORT_ACT, 0), snap(1), sti())
    then = (*WINDOWS, snap(2), wait_ticks(1), out8(PORT_MARK, 0))
    played = backend.play(
        (*START, *blocked, *then, *FINISH), reinject, lambda vm: vm.set_pit2(vm.get_pit2())
    )
    assert_none_meanwhile(played)
    assert_at_once(backend, played, 1)
    set_ns, tick_ns = played.marks_ns
    if backend.exact:
        assert PERIOD_NS <= tick_ns - set_ns < PERIOD_NS + 1000
    elif played.snaps[2] == played.snaps[1] + 1:
        # The time is taken after the call: up to 100 us late.
        assert tick_ns - set_ns > PERIOD_NS - 100_000
    assert_lost(backend, played, 16)
