"""docs/json.md names every key of the JSON objects, and no other, with its type."""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
from differential.faults import FAULTS, faulty
from doc_blocks import ROOT
from real_vm import guest_command, needs_recording

from kvmtick.cli import main
from kvmtick.conform import compare
from kvmtick.conform.fuzz.search import Backends
from kvmtick.machine.machine import Exit
from kvmtick.ticks.verdict import Path

HOPS = ("expiry_to_work", "work_to_accept", "accept_to_inject", "inject_to_eoi", "expiry_to_eoi")
OPEN_OBJECTS = dict.fromkeys(
    ("faults", "capabilities", "events", "parameters", "crash.vcpus[].registers"), "name"
) | {"coverage": "operation"}
"""Objects whose keys depend on the host or the command line."""
WHOLE_OBJECTS = tuple(
    f"{of}sources[].{name}" for of in ("", "vms[].") for name in ("ticks", "latency_ns")
) + tuple(f"vms[].phases[].{name}" for name in ("verdicts", "interval_ns"))
"""Objects that are described elsewhere."""

Fields = dict[str, str]


def documented(section: str) -> Fields:
    """Key and type of every row in the tables of a section."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    body = re.split(r"\n##+ ", text.partition(f"# {section}\n")[2])[0]
    rows = re.findall(r"^\| `([^`]+)` \| (\w+(?: or null)?) \|", body, re.MULTILINE)
    assert rows, f"no table in {section!r}"
    return dict(rows)


def printed(*arguments: str, code: int = 0, command: Sequence[str] = ()) -> dict[str, Any]:
    """The object a verb prints; `command`: what it runs."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*arguments, "--json", *(("--", *command) if command else ())]) == code
    result = json.loads(out.getvalue())
    assert isinstance(result, dict)
    return result


def values(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(path, value) of every leaf, with the paths written as the page writes them."""
    if path not in WHOLE_OBJECTS and isinstance(value, dict) and (value or path):
        for key, inner in value.items():
            name = key
            if path in OPEN_OBJECTS:
                name = f"<{OPEN_OBJECTS[path]}>"
            elif path == "latency_ns":
                assert key in HOPS
                name = "<hop>"
            yield from values(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from values(inner, f"{path}[]")
    else:
        yield path, value


def faults(told: Fields, printed_object: dict[str, Any]) -> list[str]:
    """What the page and an object do not agree in."""
    found: dict[str, list[object]] = {}
    for path, value in values(printed_object):
        found.setdefault(path, []).append(value)
    wrong = [f"not told: {path}" for path in found if path not in told]
    wrong += [f"not there: {path}" for path in told if path not in found]
    for path in found.keys() & told.keys():
        allowed = told[path].split(" or ")
        wrong += [f"{path} is {v!r}" for v in found[path] if json_type(v) not in allowed]
    return wrong


def json_type(value: object) -> str:
    """The word the page uses for a value's type."""
    if value is None:
        return "null"
    for kind, word in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")):
        if isinstance(value, kind):
            return word
    return "array" if isinstance(value, list) else "object"


def test_run() -> None:
    result = printed("run", "--ticks", "20", "--story", "3", "--fault", "worker_delay=10us")
    assert not faults(documented("kvmtick run"), result)
    assert tuple(result["latency_ns"]) == HOPS
    (source,) = result["sources"]
    assert source["ticks"] == result["ticks"]
    assert source["latency_ns"] == result["latency_ns"]


@pytest.mark.parametrize("guest", ["tick-lapic", "tick-ioapic", "nmi-watchdog", "ipi-tick"])
def test_run_of_the_apics(guest: str) -> None:
    result = printed("run", guest, "--ticks", "5", "--story", "2", "--fault", "worker_delay=10us")
    assert not faults(documented("kvmtick run"), result)
    (source,) = result["sources"]
    assert source["ticks"] == result["ticks"]


def test_record(tmp_path: FilePath) -> None:
    needs_recording()
    file = str(tmp_path / "t.ktrace")
    result = printed("record", "-o", file, command=guest_command(milliseconds=1_500))
    assert not faults(documented("kvmtick record"), result)


def test_report(tmp_path: FilePath) -> None:
    """Of a run with something of everything: a tick that is lost, and one that came late."""
    trace = str(tmp_path / "run.ktrace")
    printed("run", "tick-if0", "--hold", "2ms", "--ticks", "20", "--no-reinject", "--trace", trace)
    result = printed("report", trace, "--story", "1")
    assert not faults(documented("kvmtick report"), result)


def test_paths() -> None:
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    table = text.partition("\n| path | by way of |\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(Path)


def test_a_story_that_did_not_happen() -> None:
    told = documented("kvmtick run")
    result = printed("run", "--ticks", "2", "--story", "99", "--fault", "worker_delay=10us")
    no_steps = {path for path in told if path.startswith("story.steps[]")}
    assert faults(told, result) == [
        "not told: story.steps",
        *(f"not there: {path}" for path in told if path in no_steps),
    ]


def test_exit_reasons() -> None:
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) \|$", text, re.MULTILINE))
    sources = (ROOT / "src/kvmtick").rglob("*.py")
    code = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    reasons = {*re.findall(r'\bExit\(\s*"([\w-]+)"', code), "done"}
    assert told.keys() | {"until"} == reasons
    assert {reason for reason in told if Exit(reason).is_failure} == {
        reason for reason, exit_code in told.items() if exit_code == "4"
    }


def test_the_crash_report(tmp_path: FilePath) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(bytes.fromhex("b001 e6f4"))  # mov al, 1; out 0xf4, al
    result = printed("run", str(image), code=4)
    assert not faults(documented("The crash report"), {"crash": result["crash"]})


def test_verdicts_add_up() -> None:
    ticks = printed("run", "tick-if0", "--hold", "2ms", "--ticks", "8", "--no-reinject")["ticks"]
    told = documented("kvmtick run")
    verdicts = [key for key in ticks if key not in ("source", "expired", "extra")]
    assert {f"ticks.{verdict}" for verdict in verdicts} < told.keys()
    assert sum(ticks[verdict] for verdict in verdicts) == ticks["expired"] > 8


def test_fuzz(monkeypatch: pytest.MonkeyPatch, tmp_path: FilePath) -> None:
    """With a finding, for a fault is planted."""
    fault = FAULTS["three NMIs that wait"]
    monkeypatch.setattr(Backends, "of", lambda left, right: faulty(fault, right))
    arguments = ("fuzz", "--backends", "model,model", "--save", str(tmp_path))
    assert not faults(documented("kvmtick fuzz"), printed(*arguments, code=1))


def test_conform() -> None:
    result = printed("conform", "--case", "pic.icw*")
    assert not faults(documented("kvmtick conform"), result)


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model in place of the kernel, so that it needs none; one step of it is changed."""

    def run_kernel(wanted: compare.Wanted) -> tuple[compare.Side, int]:
        side = compare.run_model(wanted)
        return replace(side, lines={**side.lines, "pic": ()}), 0

    monkeypatch.setattr(compare, "run_kernel", run_kernel)
    result = printed("compare", "tick-pic", code=1)
    assert not faults(documented("kvmtick compare"), result)


def test_doctor() -> None:
    result = printed("doctor")
    told = documented("kvmtick doctor")
    for name in OPEN_OBJECTS:
        if name in result and not result[name]:
            del result[name], told[f"{name}.<name>"]
    assert not faults(told, result)


# That these tests can fail.


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"new_key": 1}, "not told: new_key"),
        ({"seed": "0"}, "seed is '0'"),
        ({"guest": None}, "guest is None"),
    ],
)
def test_a_change_of_the_object_is_found(change: dict[str, object], fault: str) -> None:
    result = printed("run", "--ticks", "4", "--story", "1", "--fault", "vcpu_off=10us")
    assert faults(documented("kvmtick run"), result | change) == [fault]


def test_a_missing_key_is_found() -> None:
    result = printed("run", "--ticks", "4", "--story", "1", "--fault", "vcpu_off=10us")
    del result["drift_ppm"]
    assert faults(documented("kvmtick run"), result) == ["not there: drift_ppm"]
