"""`kvmtick doctor` on hosts that have everything, and on hosts that lack something."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from terminal import Terminal

from kvmtick.host.probe import HostProbe, KvmProbe, TracefsProbe

EVENTS = {"kvm:kvm_set_irq": True, "timer:hrtimer_start": True}
CAPS = {"KVM_CAP_IRQCHIP": 1, "KVM_CAP_PIT2": 1, "KVM_CAP_REINJECT_CONTROL": 1, "KVM_CAP_XEN": 0}
HOST = HostProbe(
    kernel="6.18.0",
    cpus=2,
    kvm=KvmProbe("/dev/kvm", True, True, api_version=12, caps=CAPS),
    tracefs=TracefsProbe("/sys/kernel/tracing", True, True, events=EVENTS),
    backends=("kvm_intel",),
    virtualization="vmx",
    parameters={"kvm/min_timer_period_us": "200"},
)
NO_KVM = KvmProbe("/dev/kvm", False, False, "/dev/kvm is absent", "modprobe kvm_intel (as root)")
NO_TRACEFS = TracefsProbe(None, False, False, "tracefs is forbidden", "run as root")


class Doctor:
    """Asks the doctor about a host of our making."""

    def __init__(self, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        self._terminal = terminal
        self._monkeypatch = monkeypatch

    def host(self, host: HostProbe) -> None:
        self._monkeypatch.setattr("kvmtick.cli.doctor.probe_host", lambda: host)

    def json(self) -> dict[str, Any]:
        result = self._terminal("doctor", "--json")
        assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
        told = json.loads(result.out)
        assert isinstance(told, dict)
        return told

    def text(self) -> str:
        result = self._terminal("doctor")
        assert (result.code, result.err) == (0, "")
        assert "\x1b" not in result.out
        return result.out

    def check(self, name: str) -> dict[str, Any]:
        (check,) = (c for c in self.json()["checks"] if c["name"] == name)
        assert isinstance(check, dict)
        return check


@pytest.fixture
def doctor(kvmtick: Terminal, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    made = Doctor(kvmtick, monkeypatch)
    made.host(HOST)
    return made


def test_a_host_that_has_everything(doctor: Doctor) -> None:
    told = doctor.json()
    assert told["ready"] is True
    assert {check["name"] for check in told["checks"]} == {
        *("Python", "C compiler", "unicorn", "native shim", "/dev/kvm", "in-kernel irqchip"),
        *("VMX or SVM", "tracefs", "trace events", "modules"),
    }
    assert (told["kernel"], told["cpus"], told["backends"]) == ("6.18.0", 2, ["kvm_intel"])
    assert told["capabilities"] == CAPS
    assert told["events"] == EVENTS
    assert told["parameters"] == HOST.parameters
    text = doctor.text()
    assert text.splitlines()[0].startswith("kvmtick ")
    assert "on Linux 6.18.0, 2 CPUs" in text
    assert "KVM_CAP_IRQCHIP=1" in text
    assert "absent: KVM_CAP_XEN" in text


def test_without_dev_kvm_and_tracefs_the_model_works_all_the_same(doctor: Doctor) -> None:
    doctor.host(replace(HOST, kvm=NO_KVM, tracefs=NO_TRACEFS, backends=()))
    assert doctor.json()["ready"] is True
    for name, found, remedy in (
        ("/dev/kvm", "/dev/kvm is absent", "modprobe kvm_intel (as root)"),
        ("tracefs", "tracefs is forbidden", "run as root"),
    ):
        check = doctor.check(name)
        assert (check["ok"], check["needed"]) == (False, False)
        assert (check["found"], check["remedy"]) == (found, remedy)
    text = doctor.text()
    assert "do: modprobe kvm_intel (as root)" in text
    assert "kvmtick run works here" in text


def test_a_kernel_without_an_irqchip_says_which_capabilities_it_lacks(doctor: Doctor) -> None:
    doctor.host(replace(HOST, kvm=replace(HOST.kvm, caps={"KVM_CAP_IRQCHIP": 1})))
    check = doctor.check("in-kernel irqchip")
    assert (check["ok"], check["needed"]) == (False, False)
    assert check["found"] == "no PIT2, REINJECT_CONTROL"


def test_a_cpu_that_cannot_run_guests_is_told_where_there_is_a_kvm(doctor: Doctor) -> None:
    assert doctor.check("VMX or SVM")["found"] == "vmx"
    doctor.host(replace(HOST, virtualization=""))
    check = doctor.check("VMX or SVM")
    assert (check["ok"], check["needed"]) == (False, False)
    assert "instruction emulator" in check["found"]
    doctor.host(replace(HOST, kvm=NO_KVM, virtualization=""))
    assert "VMX or SVM" not in {check["name"] for check in doctor.json()["checks"]}


def test_missing_trace_events_are_named(doctor: Doctor) -> None:
    events = {**EVENTS, "kvm:kvm_inj_virq": False}
    doctor.host(replace(HOST, tracefs=replace(HOST.tracefs, events=events)))
    assert doctor.check("trace events")["found"] == "no kvm:kvm_inj_virq"


def test_without_a_compiler_what_is_installed_works(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    check = doctor.check("C compiler")
    assert (check["ok"], check["needed"]) == (False, False)
    assert "not found" in check["found"]
    assert "apt-get install gcc python3-dev" in check["remedy"]
    assert doctor.json()["ready"] is True


@pytest.mark.parametrize("installed", [None, "2.0.1"])
def test_without_the_right_unicorn_nothing_runs(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("kvmtick.cli.doctor.version", version)
    check = doctor.check("unicorn")
    assert (check["ok"], check["needed"]) == (False, True)
    assert check["found"] == (installed or "not installed")
    assert check["remedy"] == "pip install unicorn==2.1.4"
    assert doctor.json()["ready"] is False
    assert "kvmtick run does not work here yet" in doctor.text()


def test_a_shim_that_does_not_load_is_told_with_its_reason(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise ImportError("libunicorn is another build")

    monkeypatch.setattr("kvmtick.cpu.unicorn.find_library", refuse)
    check = doctor.check("native shim")
    assert (check["ok"], check["needed"]) == (False, True)
    assert check["found"] == "libunicorn is another build"
    assert "pip install" in check["remedy"]


def test_a_host_like_this_one_is_examined_without_failing(kvmtick: Terminal) -> None:
    result = kvmtick("doctor", "--json")
    assert result.code == 0
    told = json.loads(result.out)
    assert told["ready"] is True, "these tests run, so kvmtick run does"


@pytest.mark.parametrize(
    ("pure", "origin", "found"),
    [
        ("", "i8254.cpython-311-x86_64-linux-gnu.so", "compiled by mypyc"),
        ("", "i8254.py", "Python, slower than compiled"),
        ("1", "i8254.py", "Python, slower than compiled: KVMTICK_PURE is set"),
    ],
)
def test_whether_the_modules_are_compiled_is_told(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, pure: str, origin: str, found: str
) -> None:
    spec = ModuleSpec("i8254", None, origin=origin)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setenv("KVMTICK_PURE", pure)
    assert doctor.json()["compiled"] is (found == "compiled by mypyc")
    check = doctor.check("modules")
    assert (check["ok"], check["found"]) == (True, found)
    assert bool(check["remedy"]) is (found == "Python, slower than compiled")


def test_with_kvmtick_pure_the_sources_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled modules may stand beside them; the shim has no source."""
    monkeypatch.setenv("KVMTICK_PURE", "1")
    script = (
        "import kvmtick.cpu._shim as shim, kvmtick.timing; from kvmtick.irqchip import i8254;"
        "print(i8254.__file__, kvmtick.timing.__file__, shim.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    chip, room, shim = run.stdout.split()
    assert (chip[-8:], room[-11:], shim[-3:]) == ("i8254.py", "__init__.py", ".so")
