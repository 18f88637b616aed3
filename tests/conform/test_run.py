"""The runner: outcomes, reasons, limits, and what a host's quirks do to a case."""

import signal
import threading
from collections.abc import Callable

import pytest

from kvmtick import guests
from kvmtick.abi import KvmError
from kvmtick.conform.bench import ATTEMPTS, Bench, bench_of, retried
from kvmtick.conform.case import Case, Failed, Skipped, check, equal
from kvmtick.conform.probes import PROBES, Probe
from kvmtick.conform.run import NoSuchCase, as_dict, run_case, run_cases, select_cases
from kvmtick.guests.script import Op, cli, nop
from kvmtick.kvm.model import ModelVm

Body = Callable[[Bench], None]


def case_of(body: Body, name: str = "planted.case") -> Case:
    return Case(name, "It must be right (a datasheet).", body)


@pytest.fixture
def bench() -> Bench:
    return bench_of("model")


def fail(bench: Bench) -> None:
    equal(2, 1, "what was\nlooked at")


def skip(bench: Bench) -> None:
    raise Skipped("this host cannot")


def test_a_body_that_returns_has_passed(bench: Bench) -> None:
    result = run_case(case_of(lambda bench: None), bench)
    assert (result.outcome, result.reason) == ("passed", "")


def test_a_difference_fails_with_what_was_looked_at(bench: Bench) -> None:
    result = run_case(case_of(fail), bench)
    assert (result.outcome, result.reason) == ("failed", "what was looked at: expected 1, got 2")
    assert result.failed is not None
    assert (result.failed.expected, result.failed.got) == (1, 2)


def test_a_check_fails_with_its_words(bench: Bench) -> None:
    result = run_case(case_of(lambda bench: check(False, "the count", "less than 7", 9)), bench)
    assert result.reason == "the count: expected less than 7, got 9"


def test_a_skip_has_its_reason(bench: Bench) -> None:
    result = run_case(case_of(skip), bench)
    assert (result.outcome, result.reason) == ("skipped", "this host cannot")


def test_an_exception_is_a_failure_of_one_line(bench: Bench) -> None:
    def refused(bench: Bench) -> None:
        with bench.vm() as vm:
            vm.get_pit2()

    result = run_case(case_of(refused), bench)
    assert result.outcome == "failed"
    assert result.reason == (
        "KvmError: KVM_GET_PIT2: ENXIO: the VM has no PIT; call create_irqchip() and create_pit2()"
        " first"
    )
    assert "vm.get_pit2()" in result.traceback
    assert result.failed is None


def test_ctrl_c_is_no_outcome(bench: Bench) -> None:
    def interrupt(bench: Bench) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_case(case_of(interrupt), bench)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# --- limits ---------------------------------------------------------------------------------------


def wait_for_ever(bench: Bench) -> None:
    threading.Event().wait()


def compute_for_ever(bench: Bench) -> None:
    while True:
        try:
            sum(range(100))
        except Exception:
            continue


def guest_for_ever(bench: Bench) -> None:
    with bench.pc() as pc:
        pc.vm.load(_spinning())
        pc.vm.run(limit_s=None)


def _spinning() -> guests.Guest:
    return guests.Guest("spin", b"\xeb\xfe", guests.LOAD_AT, guests.ENTRY, None)


@pytest.mark.parametrize("body", [wait_for_ever, compute_for_ever, guest_for_ever])
def test_a_case_that_hangs_is_ended(bench: Bench, body: Body) -> None:
    result = run_case(case_of(body), bench, limit_s=0.1)
    assert (result.outcome, result.reason) == ("failed", "not over after 0.1 s")


def test_what_hangs_when_it_was_ended_is_ended_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmtick.conform.run.CLEAN_UP_LIMIT_S", 0.05)

    def hang_twice(bench: Bench) -> None:
        try:
            wait_for_ever(bench)
        finally:
            wait_for_ever(bench)

    assert run_case(case_of(hang_twice), bench, limit_s=0.05).outcome == "failed"


def test_the_limit_and_its_signal_are_gone_afterwards(bench: Bench) -> None:
    before = signal.getsignal(signal.SIGALRM)
    run_case(case_of(fail), bench)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_guest_that_hangs_fails_by_its_own_limit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmtick.conform.bench.LIMIT_NS", 1_000_000)

    def wait(bench: Bench) -> None:
        with bench.pc() as pc:
            pc.run_image(b"\xeb\xfe")
            pc.run(*(nop() for _ in range(2)), _endless())

    result = run_case(case_of(wait), bench)
    assert result.outcome == "failed"
    assert result.reason.startswith("exit code of the guest")


def _endless() -> Op:
    from kvmtick.guests.script import wait_ticks

    return wait_ticks(1)


# --- which cases ----------------------------------------------------------------------------------


def test_patterns_choose_cases_in_the_order_of_all() -> None:
    every = [case.name for case in select_cases([])]
    chosen = [case.name for case in select_cases(["pic.*", "pit.counts*"])]
    assert chosen == [name for name in every if name.startswith(("pic.", "pit.counts"))]
    assert [case.name for case in select_cases([every[3]])] == [every[3]]


def test_a_pattern_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(NoSuchCase, match="pot"):
        select_cases(["pit.*", "pot.*"])


def test_the_object_counts_outcomes(bench: Bench) -> None:
    cases = [case_of(fail, "a.b"), case_of(skip, "a.c"), case_of(lambda bench: None, "a.d")]
    assert as_dict("model", run_cases(cases, bench)) == {
        "backend": "model",
        "cases": 3,
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "results": [
            {
                "case": "a.b",
                "outcome": "failed",
                "reason": "what was looked at: expected 1, got 2",
            },
            {"case": "a.c", "outcome": "skipped", "reason": "this host cannot"},
            {"case": "a.d", "outcome": "passed", "reason": ""},
        ],
    }


# --- quirks and noise -----------------------------------------------------------------------------


def test_what_a_back_end_does_not_do_is_tried_once_and_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def holds(bench: Bench) -> bool:
        tried.append(bench.name)
        return False

    monkeypatch.setitem(PROBES, "planted", Probe("it does not", holds))
    bench = Bench("another VMM", ModelVm)
    for _ in range(2):
        result = run_case(case_of(lambda bench: bench.needs("planted")), bench)
        assert (result.outcome, result.reason) == ("skipped", "it does not")
    assert tried == ["another VMM"]


@pytest.mark.parametrize("name", PROBES)
def test_the_model_does_all_that_is_probed(bench: Bench, name: str) -> None:
    assert PROBES[name].holds(bench)


def test_a_probe_that_breaks_fails_the_case(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(bench: Bench) -> bool:
        raise KvmError(22, "KVM_RUN")

    monkeypatch.setitem(PROBES, "planted", Probe("it does not", breaks))
    assert run_case(case_of(lambda bench: bench.needs("planted")), bench).outcome == "failed"


def test_disturbed_attempts_end_in_a_skip_never_in_a_pass() -> None:
    attempts: list[None] = []

    def disturbed(bench: Bench) -> None:
        bench.quiet(lambda: attempts.append(None))

    result = run_case(case_of(disturbed), Bench("noisy", ModelVm))
    assert (result.outcome, len(attempts)) == ("skipped", ATTEMPTS)
    assert "busy" in result.reason


def test_a_quiet_attempt_is_the_last() -> None:
    gives = iter((None, None, 7))
    assert Bench("noisy", ModelVm).quiet(lambda: next(gives)) == 7


@pytest.mark.parametrize(("exact", "looks"), [(True, 1), (False, ATTEMPTS)])
def test_what_fails_each_time_it_is_looked_at_fails(exact: bool, looks: int) -> None:
    seen: list[int] = []

    @retried
    def look(bench: Bench, value: int) -> None:
        seen.append(value)
        fail(bench)

    with pytest.raises(Failed):
        look(Bench("bench", ModelVm, exact), 3)
    assert seen == [3] * looks


def test_a_script_late_by_more_than_it_may_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmtick.conform.bench.LATE_MS", -1)
    late = case_of(lambda bench: void(bench.on_time(cli())))
    assert run_case(late, Bench("late", ModelVm)).outcome == "skipped"


def void(value: object) -> None:
    """A body returns nothing."""
