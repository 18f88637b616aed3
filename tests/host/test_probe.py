"""What the host offers, told without raising."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kvmtick.abi import HostError
from kvmtick.abi.caps import CAPS
from kvmtick.host import probe
from kvmtick.host.tracefs import TICK_EVENTS, Tracefs


def test_absent_device(tmp_path: Path) -> None:
    found = probe.probe_kvm(str(tmp_path / "kvm"))
    assert (found.present, found.openable, found.api_version, found.caps) == (
        False,
        False,
        None,
        {},
    )
    assert "is not there" in found.error
    assert "modprobe" in found.remedy


def test_device_that_is_no_kvm() -> None:
    found = probe.probe_kvm("/dev/null")
    assert (found.present, found.openable) == (True, False)
    assert "is no KVM device" in found.error


@pytest.mark.usefixtures("kvm")
def test_live_device() -> None:
    found = probe.probe_kvm()
    assert (found.present, found.openable, found.error) == (True, True, "")
    assert found.api_version == 12
    assert list(found.caps) == list(CAPS)
    assert found.caps["KVM_CAP_USER_MEMORY"] == 1


@pytest.mark.parametrize(
    ("flags", "found"),
    [("fpu vmx sse", "vmx"), ("fpu svm sse", "svm"), ("fpu vmxnet sse", ""), ("", "")],
)
def test_the_cpus_extension_for_guests(tmp_path: Path, flags: str, found: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nmodel name\t: svm vmx\nflags\t\t: {flags}\nbugs\t\t: vmx\n\n"
    )
    assert probe.probe_virtualization(cpuinfo) == found
    assert probe.probe_virtualization(tmp_path / "absent") == ""


def test_live_tracefs(tracefs: Tracefs) -> None:
    found = probe.probe_tracefs()
    assert (found.readable, found.writable, found.error) == (True, True, "")
    assert "mono" in found.clocks
    assert list(found.events) == list(TICK_EVENTS)
    assert not probe.probe_tracefs(["kvm:kvm_no_such"]).events["kvm:kvm_no_such"]


def test_absent_tracefs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Tracefs:
        raise HostError("tracefs is not mounted", "mount it")

    monkeypatch.setattr(probe, "find_tracefs", lambda: None)
    monkeypatch.setattr(probe, "open_tracefs", refuse)
    found = probe.probe_tracefs()
    assert (found.mounted_at, found.readable, found.writable) == (None, False, False)
    assert (found.error, found.remedy) == ("tracefs is not mounted", "mount it")


def test_parameters_that_can_be_read(tmp_path: Path) -> None:
    where = tmp_path / "kvm" / "parameters"
    where.mkdir(parents=True)
    (where / "min_timer_period_us").write_text("200\n")
    assert probe.probe_parameters(tmp_path) == {"kvm/min_timer_period_us": "200"}
    assert probe.probe_parameters(tmp_path / "absent") == {}


def test_the_whole_is_plain_data() -> None:
    found = probe.probe_host()
    assert found.cpus >= 1
    json.dumps(asdict(found))
