"""An instance of our own: what it records, and that it goes away whatever happens."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_guests import MakeVm, ticker

from kvmtick.abi import HostError
from kvmtick.host import tracefs as module
from kvmtick.host.tracefs import TICK_EVENTS, Instance, Tracefs, find_tracefs, mount_private

LIMIT_S = 5.0


def ours(tracefs: Tracefs) -> list[str]:
    """The instances of this process."""
    return [name for name in tracefs.instances() if f"-{os.getpid()}-" in name]


def test_the_usual_mount_comes_first() -> None:
    usual = "tracefs /sys/kernel/tracing tracefs rw,nosuid 0 0"
    other = r"nodev /mnt/a\040b\134c tracefs rw 0 0"
    assert find_tracefs(["proc /proc proc rw 0 0"]) is None
    assert find_tracefs([other]) == Path(r"/mnt/a b\c")
    assert find_tracefs([other, usual]) == Path("/sys/kernel/tracing")


def test_event_names_are_checked() -> None:
    for name in ("kvm_pio", "kvm:../../x", "kvm:"):
        with pytest.raises(ValueError, match="write system:event"):
            module._event_path(name)


def test_instance_records_a_tick(tracefs: Tracefs, make_vm: MakeVm) -> None:
    vm = make_vm(ticker(3))
    with tracefs.instance() as trace:
        trace.set_buffer_size(512)
        assert trace.enable_known() == []
        trace.start()
        end = vm.run(limit_s=LIMIT_S).exit
        trace.stop()
        text, lost = trace.text(), trace.lost()
        trace.clear()
        assert "kvm_pio" not in trace.text()
    assert end.code == 3
    assert lost.total == 0
    for event in ("kvm_pio", "hrtimer_expire_entry", "kvm_pic_set_irq", "kvm_ack_irq"):
        assert f"{event}: " in text
    others = [line for line in text.splitlines() if "hrtimer_" in line]
    assert others
    assert all("function=pit_timer_fn" in line for line in others)
    assert ours(tracefs) == []


def test_nothing_is_recorded_before_start(tracefs: Tracefs, make_vm: MakeVm) -> None:
    vm = make_vm(ticker(1))
    with tracefs.instance() as trace:
        trace.enable("kvm:kvm_pio")
        assert vm.run(limit_s=LIMIT_S).exit.code == 1
        assert "kvm_pio" not in trace.text()
        assert "[mono]" in trace.read("trace_clock")


def test_lost_events_are_counted(tracefs: Tracefs, make_vm: MakeVm) -> None:
    # mov dx, 0x510; mov cx, 3000; again: out dx, al; loop again; then the exit port
    code = b"\xba\x10\x05\xb9\xb8\x0b\xee\xe2\xfd\xe6\xf4"
    vm = make_vm(code)
    with tracefs.instance() as trace:
        trace.set_buffer_size(4)
        trace.enable("kvm:kvm_pio")
        trace.start()
        assert vm.run(limit_s=LIMIT_S).exit.reason == "done"
        trace.stop()
        recorded = trace.text().count("kvm_pio: ")
        assert trace.lost().overrun >= 3001 - recorded > 0


def _fail(trace: Instance) -> None:
    with trace:
        trace.enable("kvm:kvm_pio")
        trace.start()
        assert trace.path.exists()
        raise RuntimeError("boom")


def test_clean_after_an_exception(tracefs: Tracefs) -> None:
    trace = tracefs.instance()
    with pytest.raises(RuntimeError, match="boom"):
        _fail(trace)
    assert ours(tracefs) == []
    trace.close()
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(number) != module._leave


def test_two_instances_are_apart(tracefs: Tracefs) -> None:
    with tracefs.instance() as one, tracefs.instance() as two:
        assert one.name != two.name
        one.enable("kvm:kvm_pio")
        assert one.read("events/kvm/kvm_pio/enable").strip() == "1"
        assert two.read("events/kvm/kvm_pio/enable").strip() == "0"


def test_an_instance_works_outside_the_main_thread(tracefs: Tracefs) -> None:
    def work() -> None:
        with tracefs.instance() as trace:
            trace.start()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT_S)
    assert ours(tracefs) == []


def test_unknown_event_and_bad_filter_are_told(tracefs: Tracefs) -> None:
    with tracefs.instance() as trace:
        with pytest.raises(HostError, match="no trace event kvm:kvm_no_such"):
            trace.enable("kvm:kvm_no_such")
        with pytest.raises(HostError, match="nonsense == 1"):
            trace.enable("kvm:kvm_pio", "nonsense == 1")
        assert trace.enable_known({"kvm:kvm_no_such": "", "kvm:kvm_pio": ""}) == ["kvm:kvm_no_such"]


def test_function_filter_by_address(tmp_path: Path) -> None:
    """What kernels before 6.3 need; nothing where the address is hidden or the name unknown."""
    symbols = tmp_path / "kallsyms"
    symbols.write_text("ffffffff812eb600 t pit_timer_fn\n0000000000000000 t hidden\n")
    ask = module._function_filter
    wanted = "function == 0xffffffff812eb600"
    assert ask("function.function == pit_timer_fn", symbols) == wanted
    assert ask("function.function == hidden", symbols) == ""
    assert ask("function.function == unknown", symbols) == ""
    assert ask("common_pid == 1", symbols) == ""
    assert ask("function.function == x", tmp_path / "absent") == ""


def test_an_older_kernel_s_entries_have_no_interrupt_information(
    tracefs: Tracefs, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    with tracefs.instance() as trace:

        def write(name: str, text: str) -> None:
            if "intr_info" in text:
                raise HostError("tracefs: filter: Invalid argument", "")
            written.append(text)

        monkeypatch.setattr(trace, "write", write)
        trace.set_filter("kvm:kvm_entry", TICK_EVENTS["kvm:kvm_entry"])
        trace.set_filter("kvm:kvm_entry", "(common_pid == 7) && (intr_info == 0x8 || vcpu_id == 1)")
        with pytest.raises(HostError, match="nonsense"):
            trace.set_filter("kvm:kvm_entry", "nonsense == 1, intr_infos")
    assert written == [
        "common_pid < 0 || common_pid < 0",
        "(common_pid == 7) && (common_pid < 0 || vcpu_id == 1)",
    ]


def test_function_addresses(tmp_path: Path) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text(
        "ffffffff812eb600 t pit_timer_fn\n0000000000000000 t hidden\n"
        "ffffffff8100 t pit_do_work.cold\n"
        "ffffffffc0001230 t pit_do_work\t[kvm]\nffffffff8200 t xapic_timer_fn\n"
    )
    names = {"pit_timer_fn", "pit_do_work", "apic_timer_fn", "hidden"}
    assert module._addresses(names, symbols) == {
        0xFFFFFFFF812EB600: "pit_timer_fn",
        0xFFFFFFFFC0001230: "pit_do_work",
    }


@pytest.mark.parametrize(
    ("number", "lockdown", "remedy"),
    [
        (errno.EPERM, "none integrity [confidentiality]", "locked down; boot with lockdown="),
        (errno.EPERM, "none [integrity] confidentiality", "Operation not permitted; run as root"),
        (errno.EBUSY, "", "tracing is busy: close the programs"),
        (errno.EROFS, "", "mount -o remount,rw"),
        (errno.ENOMEM, "", "ask for smaller buffers"),
        (errno.ENODEV, "", "it needs a reboot"),
    ],
)
def test_what_is_refused_has_a_remedy(
    number: int, lockdown: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCKDOWN", tmp_path / "lockdown")
    if lockdown:
        (tmp_path / "lockdown").write_text(lockdown + "\n")
    with pytest.raises(HostError, match=remedy), module._told(tmp_path / "tracing_on"):
        raise OSError(number, os.strerror(number))


def test_waiting_ends_with_another_descriptor(tracefs: Tracefs) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x")
    with tracefs.instance() as trace:
        trace.wait(LIMIT_S, [reader])
        trace.wait(0.001)
    os.close(reader)
    os.close(writer)


def test_waiting_ends_with_a_full_buffer(tracefs: Tracefs, make_vm: MakeVm) -> None:
    # mov dx, 0x510; mov cx, 3000; again: out dx, al; loop again; then the exit port
    vm = make_vm(b"\xba\x10\x05\xb9\xb8\x0b\xee\xe2\xfd\xe6\xf4")
    with tracefs.instance() as trace:
        trace.set_buffer_size(64)
        trace.write("buffer_percent", "25")
        trace.enable("kvm:kvm_pio")
        trace.start()
        assert vm.run(limit_s=LIMIT_S).exit.reason == "done"
        trace.wait(LIMIT_S)
        trace.stop()
        recorded, lost = trace.recorded(), trace.lost().total
        assert recorded + lost >= 3001
        assert sum(1 for _ in trace.pages()) >= 4
        assert trace.recorded() == recorded


def test_names_of_traced_threads(tracefs: Tracefs) -> None:
    comms = tracefs.comms()
    assert all(comm for pid, comm in comms.items() if pid)


def test_a_filter_can_be_changed(tracefs: Tracefs) -> None:
    with tracefs.instance() as trace:
        trace.enable("kvm:kvm_pio", "port == 0x40")
        trace.set_filter("kvm:kvm_pio", "port == 0x41")
        assert trace.read("events/kvm/kvm_pio/filter").strip() == "port == 0x41"
        trace.set_filter("kvm:kvm_pio", "0")
        assert trace.read("events/kvm/kvm_pio/filter").strip() == "none"


def test_format_text(tracefs: Tracefs) -> None:
    text = tracefs.format_text("kvm:kvm_set_irq")
    assert "field:unsigned int gsi;" in text
    with pytest.raises(HostError, match="No such file"):
        tracefs.format_text("kvm:kvm_no_such")


def test_every_event_of_a_tick_is_known_here(tracefs: Tracefs) -> None:
    missing = [event for event in TICK_EVENTS if not tracefs.has_event(event)]
    if missing:
        pytest.skip(f"this kernel lacks {', '.join(missing)}")


CHILD = """
import sys, time
from kvmtick.host.tracefs import open_tracefs
with open_tracefs() as tracefs, tracefs.instance() as trace:
    trace.enable("kvm:kvm_pio")
    trace.start()
    print(trace.name, flush=True)
    time.sleep(30)
"""


def _child() -> tuple["subprocess.Popen[str]", str]:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_removes_it(tracefs: Tracefs, number: signal.Signals) -> None:
    child, name = _child()
    with child:
        assert name in tracefs.instances()
        child.send_signal(number)
        child.wait(10)
    assert name not in tracefs.instances()


def test_what_a_killed_process_left_is_removed_by_the_next(tracefs: Tracefs) -> None:
    child, name = _child()
    with child:
        child.kill()
        child.wait(10)
    assert name in tracefs.instances()
    tracefs.instance().close()
    assert name not in tracefs.instances()


def test_only_dead_processes_leave_leftovers() -> None:
    namespace = module._pid_namespace()
    assert not module._is_leftover(f"kvmtick-{namespace}-{os.getpid()}-0")
    assert module._is_leftover(f"kvmtick-{namespace}-4194999-0")
    for foreign in (f"kvmtick-{namespace + 1}-4194999-0", "trace-cmd", "kvmtick-x-y-z"):
        assert not module._is_leftover(foreign)


def test_a_forked_child_leaves_it_alone(tracefs: Tracefs) -> None:
    with tracefs.instance() as trace:
        pid = os.fork()
        if pid == 0:
            trace.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert trace.name in tracefs.instances()
        trace.start()


def test_private_mount_leaves_nothing(tracefs: Tracefs) -> None:
    before = Path("/proc/mounts").read_text()
    try:
        private = mount_private()
    except HostError as error:
        pytest.skip(f"needs the right to mount: {error}")
    with private:
        assert private.mounted is None
        assert private.has_event("kvm:kvm_pio")
        with private.instance() as trace:
            trace.enable("kvm:kvm_pio")
            assert trace.name in tracefs.instances()
        assert Path("/proc/mounts").read_text() == before
    assert ours(tracefs) == []
    private.close()
