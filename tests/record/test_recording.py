"""The loop, with a kernel that hands out what a test wants."""

import errno
import os
from pathlib import Path

import pytest
from fake_proc import FakeProc
from fake_tracefs import FakeTracefs, pages_of

from kvmtick.abi import HostError
from kvmtick.host.tracefs import TICK_EVENTS
from kvmtick.host.vms import HostVms
from kvmtick.record.out_file import OutFile, UnwritableError
from kvmtick.record.recording import Recording, Settings, default_buffer_kib
from kvmtick.ticks.host import HostTicks
from kvmtick.trace.ktrace import KtraceReader

GUEST = "tick-pic"
PAGES = pages_of(GUEST)


def test_default_buffers() -> None:
    assert [default_buffer_kib(cpus) >> 10 for cpus in (1, 32, 64, 128, 1024)] == [16, 16, 8, 4, 2]


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    """A host with one VM, whose vCPU is that of the recorded guest."""
    (tmp_path / "proc").mkdir()
    proc = FakeProc(tmp_path / "proc")
    vcpu = vcpu_tid()
    proc.process(vcpu, "qemu", ("qemu", "-name", "web"), ("anon_inode:kvm-vm",))
    proc.thread(vcpu, vcpu, "CPU 0/KVM")
    return proc


def vcpu_tid() -> int:
    from fake_tracefs import RECORDED

    (tid,) = RECORDED["runs"][GUEST]["vcpus"]
    return int(tid)


def record(
    tracefs: FakeTracefs, proc: FakeProc, path: Path, settings: Settings | None = None
) -> Recording:
    with Recording(tracefs, HostVms(proc=proc.path), settings or Settings()) as recording:
        tracefs.made.at_end = recording.stop
        recording.run(path)
    return recording


def test_what_comes_is_what_can_be_read(tmp_path: Path, proc: FakeProc) -> None:
    tracefs = FakeTracefs([[page] for page in PAGES])
    recording = record(tracefs, proc, tmp_path / "t.ktrace")
    with KtraceReader(tmp_path / "t.ktrace") as trace:
        host = HostTicks(trace)
        host.read()
        assert (trace.cut, trace.lost) == ("", 0)
    (vm,) = host.vms
    assert (vm.name, vm.info.vcpus) == ("web", {vcpu_tid(): 0})
    summary = recording.summary()
    assert vm.assembler.report().expired == summary.ticks > 0
    assert summary.vms[0].ticks == {"pit": summary.ticks}
    assert summary.size_bytes == (tmp_path / "t.ktrace").stat().st_size
    assert summary.elapsed_ns > 0
    assert summary.cpu_ns > 0


def test_pages_are_cut_behind_their_last_event(tmp_path: Path, proc: FakeProc) -> None:
    whole = [(cpu, page.ljust(4096, b"\xaa")) for cpu, page in PAGES]
    record(FakeTracefs([whole]), proc, tmp_path / "t.ktrace")
    record(FakeTracefs([PAGES]), proc, tmp_path / "u.ktrace")
    assert b"\xaa" * 64 not in (tmp_path / "t.ktrace").read_bytes()
    sizes = [(tmp_path / name).stat().st_size for name in ("t.ktrace", "u.ktrace")]
    assert abs(sizes[0] - sizes[1]) < 200


def test_the_instance_is_set_up_before_it_starts(tmp_path: Path, proc: FakeProc) -> None:
    tracefs = FakeTracefs([])
    record(tracefs, proc, tmp_path / "t.ktrace", Settings(buffer_kib=128))
    made = tracefs.made
    assert made.calls == [
        ("buffer", "128"),
        ("buffer_percent", "25"),
        ("buffer_subbuf_size_kb", "8"),
        ("start",),
        ("stop",),
        ("close",),
    ]
    assert made.filters["timer:hrtimer_start"] == TICK_EVENTS["timer:hrtimer_start"]


def test_lost_events_are_told(tmp_path: Path, proc: FakeProc) -> None:
    recording = record(FakeTracefs([], lost=12), proc, tmp_path / "t.ktrace")
    assert recording.summary().lost.total == 12
    with KtraceReader(tmp_path / "t.ktrace") as trace:
        assert sum(len(batch) for batch in trace.batches()) == 0
        assert trace.lost == 12


def test_events_that_the_kernel_lacks_are_told(tmp_path: Path, proc: FakeProc) -> None:
    recording = record(FakeTracefs([]), proc, tmp_path / "t.ktrace")
    lacks = {"sched:sched_switch", "sched:sched_waking", "kvm:kvm_apicv_accept_irq"}
    assert lacks < set(recording.summary().missing)
    with KtraceReader(tmp_path / "t.ktrace") as trace:
        assert set(trace.header.missing) == set(recording.missing)


def test_a_vm_that_comes_while_it_records(
    tmp_path: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmtick.record.recording.FIRST_SCAN_S", 0)
    tracefs = FakeTracefs([[], []])
    recording = Recording(tracefs, HostVms(proc=proc.path), Settings())
    tracefs.made.at_end = recording.stop

    def started() -> int:
        proc.process(99, "firecracker", ("firecracker", "--id", "late"), ("anon_inode:kvm-vm",))
        return reader

    reader, writer = os.pipe()
    with recording:
        recording.run(tmp_path / "t.ktrace", started=started)
    os.close(reader)
    os.close(writer)
    with KtraceReader(tmp_path / "t.ktrace") as trace:
        assert [vm.name for vm in trace.header.vms] == ["web"]
        list(trace.batches())
        assert [vm.name for vm in trace.vms] == ["web", "late"]
    assert ("filter", "kvm:kvm_entry") in tracefs.made.calls


def test_it_ends_when_the_descriptor_can_be_read(tmp_path: Path, proc: FakeProc) -> None:
    tracefs = FakeTracefs([[page] for page in PAGES])
    reader, writer = os.pipe()
    os.write(writer, b"x")
    with Recording(tracefs, HostVms(proc=proc.path), Settings()) as recording:
        recording.run(tmp_path / "t.ktrace", started=lambda: reader)
    os.close(reader)
    os.close(writer)
    assert recording.summary().ticks == 0


def test_it_ends_when_the_time_is_over(tmp_path: Path, proc: FakeProc) -> None:
    tracefs = FakeTracefs([])
    with Recording(tracefs, HostVms(proc=proc.path), Settings(for_ns=1)) as recording:
        recording.run(tmp_path / "t.ktrace")
    assert recording.summary().elapsed_ns >= 1


def test_names_of_interrupted_threads(tmp_path: Path, proc: FakeProc) -> None:
    tracefs = FakeTracefs([PAGES])
    named = {tid: f"name{tid}" for tid in range(1, 100_000)}
    tracefs.comms = lambda: named
    recording = record(tracefs, proc, tmp_path / "t.ktrace")
    wanted = recording.tally.interrupted - {0, vcpu_tid()}
    with KtraceReader(tmp_path / "t.ktrace") as trace:
        list(trace.batches())
        assert {f"name{tid}-{tid}" for tid in wanted} <= set(trace.tasks)


def test_a_full_disk_leaves_what_was_written(tmp_path: Path, proc: FakeProc) -> None:
    """With a limit on the file's size in place of a full disk."""
    path = tmp_path / "t.ktrace"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _record_with_a_limit(proc, path, writer)
    os.close(writer)
    with os.fdopen(reader) as told:
        message = told.read()
    os.waitpid(pid, 0)
    assert message.startswith(f"{path}: File too large; what was recorded until then can be read:")
    assert message.endswith("give --out a place with more room")
    with KtraceReader(path) as trace:
        list(trace.batches())
        assert trace.cut


def _record_with_a_limit(proc: FakeProc, path: Path, writer: int) -> None:
    import resource
    import signal

    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            record(FakeTracefs([PAGES * 60]), proc, path)
        except HostError as error:
            os.write(writer, str(error).encode())
    finally:
        os._exit(0)


def test_a_file_that_cannot_be_opened(tmp_path: Path, proc: FakeProc) -> None:
    tracefs = FakeTracefs([])
    with pytest.raises(UnwritableError, match="No such file"):
        record(tracefs, proc, tmp_path / "no" / "t.ktrace")
    assert tracefs.made.calls[-1] == ("close",)
    assert ("start",) not in tracefs.made.calls


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnwritableError, match="fifo: No such device or address"):
        OutFile(tmp_path / "fifo")


def test_buffers_that_are_refused(tmp_path: Path, proc: FakeProc) -> None:
    tracefs = FakeTracefs([])

    def refuse(kib: int) -> None:
        raise HostError(os.strerror(errno.ENOMEM))

    tracefs.made.set_buffer_size = refuse
    with pytest.raises(HostError, match=r"99 KiB of buffer .* are refused.*smaller --buffer"):
        record(tracefs, proc, tmp_path / "t.ktrace", Settings(buffer_kib=99))
    assert not (tmp_path / "t.ktrace").exists()


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    with OutFile(tmp_path / "t.ktrace") as file:
        file.write(b"x")
    assert (tmp_path / "t.ktrace").stat().st_mode & 0o777 == 0o600


def test_a_kernel_without_kvm(proc: FakeProc) -> None:
    tracefs = FakeTracefs([])
    tracefs.has_event = lambda event: not event.startswith("kvm:")
    with pytest.raises(HostError, match=r"no trace event kvm:kvm_eoi; load KVM first: modprobe"):
        Recording(tracefs, HostVms(proc=proc.path), Settings())
