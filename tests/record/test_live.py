"""Samples of a recording, judged while it goes on."""

from pathlib import Path

import pytest
from fake_proc import FakeProc
from fake_tracefs import RECORDED, FakeTracefs, pages_of

from kvmtick.host.vms import HostVms
from kvmtick.record import live
from kvmtick.record.live import LiveSamples
from kvmtick.record.recording import Recording, Settings


class Samples(LiveSamples):
    """Counts how often it was shown."""

    shown = 0

    def show(self, recording: Recording) -> None:
        self.shown += 1


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    (tmp_path / "proc").mkdir()
    return FakeProc(tmp_path / "proc")


def sample(proc: FakeProc, path: Path, guest: str, deliveries: int = 3) -> tuple[int, Samples]:
    """Record a guest's pages; every second delivery is a sample's."""
    (tid,) = (int(tid) for tid in RECORDED["runs"][guest]["vcpus"])
    proc.process(tid, "qemu", fds=("anon_inode:kvm-vm",))
    proc.thread(tid, tid, "CPU 0/KVM")
    tracefs = FakeTracefs([[], pages_of(guest), *[[]] * (deliveries - 2)])
    watcher = Samples()
    with Recording(tracefs, HostVms(proc=proc.path), Settings()) as recording:
        tracefs.made.at_end = recording.stop
        recording.run(path, watcher)
    assert recording.summary().ticks > 0
    return tid, watcher


def test_what_was_sampled(proc: FakeProc, tmp_path: Path) -> None:
    tid, watcher = sample(proc, tmp_path / "t.ktrace", "tick-pic")
    sampled = watcher.vms[tid]
    assert (sampled.ticks, sampled.lost) == (3, 0)
    assert 0 < sampled.expiry_to_eoi.summary()["p99"] < 10_000_000


def test_a_sample_is_not_wanted_all_the_time(proc: FakeProc, tmp_path: Path) -> None:
    _, watcher = sample(proc, tmp_path / "t.ktrace", "tick-pic")
    assert watcher.window_s(0.0) == 0
    assert watcher.window_s(float("inf")) == live.WINDOW_S


def test_too_much_is_not_decoded(
    proc: FakeProc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_BYTES", 100)
    _, watcher = sample(proc, tmp_path / "t.ktrace", "tick-pic")
    assert watcher.vms == {}
    assert 0 < watcher.window_s(float("inf")) < live.WINDOW_S / 2


def test_it_is_shown_once_a_second(
    proc: FakeProc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmtick.record.recording.SHOW_EVERY_S", 0)
    _, watcher = sample(proc, tmp_path / "t.ktrace", "tick-pic", deliveries=5)
    assert watcher.shown >= 3
