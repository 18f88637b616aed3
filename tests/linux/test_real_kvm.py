"""Linux on /dev/kvm, with the model's chips and with the kernel's; and where KVM cannot do that."""

import os
from pathlib import Path

import pytest

from kvmtick.abi.errors import HostError
from kvmtick.cli import EXIT_HOST, main
from kvmtick.host.kvmdev import open_kvm

WHERE = [["--cpu", "kvm"], ["--cpu", "kvm", "--chips", "kernel"]]


@pytest.fixture
def kvm() -> None:
    """Skip, saying why, where /dev/kvm cannot be used."""
    try:
        open_kvm().close()
    except HostError as error:
        pytest.skip(f"needs /dev/kvm: {error}")


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("where", WHERE, ids=" ".join)
def test_a_kvm_that_emulates_is_refused(
    tmp_path: Path,
    echo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: list[str],
) -> None:
    monkeypatch.setattr("kvmtick.host.probe.probe_virtualization", lambda: "")
    trace = tmp_path / "kept.ktrace"
    trace.write_bytes(b"kept")
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        code = main(["run", "--kernel", str(echo), *where, "--trace", str(trace)])
    assert code == EXIT_HOST
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "neither VMX nor SVM" in err
    assert err.endswith("; run the model: leave --cpu and --chips out\n")
    assert trace.read_bytes() == b"kept"
