"""The help pages name what there is."""

import pytest
from terminal import Terminal

from kvmtick import __version__, guests

OPTIONS = (
    *("--hz", "--ticks", "--for", "--fault", "--story", "--clock", "--reinject", "--no-reinject"),
    *("--seed", "--trace", "--json", "--limit", "--load-at", "--entry", "--counter", "--hold"),
    *("--ram", "--vcpus", "--append", "--module", "--quantum", "--fast"),
)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_page_names_the_verbs_and_the_exit_codes(kvmtick: Terminal, words: list[str]) -> None:
    result = kvmtick(*words)
    assert (result.code, result.err) == (0, "")
    for word in (
        "run",
        "doctor",
        "exit codes:",
        "2 usage",
        "4 the guest failed",
        "130 interrupted",
    ):
        assert word in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 100


def test_run_help_names_every_option_guest_fault_and_verdict(kvmtick: Terminal) -> None:
    result = kvmtick("run", "--help")
    assert (result.code, result.err) == (0, "")
    for word in (*OPTIONS, *guests.names(), "worker_delay=", "vcpu_off=", "late_expiry="):
        assert word in result.out
    for verdict in ("delivered", "late", "reinjected", "coalesced", "masked", "dropped"):
        assert verdict in result.out
    assert "1193181" in result.out


def test_doctor_help(kvmtick: Terminal) -> None:
    result = kvmtick("doctor", "--help")
    assert result.code == 0
    assert "--json" in result.out


def test_the_version(kvmtick: Terminal) -> None:
    result = kvmtick("--version")
    assert (result.code, result.out) == (0, f"kvmtick {__version__}\n")
