"""Replay files: a sequence that shows something, to be carried out again (`kvmtick fuzz --replay`).

One JSON object:

=========== =====================================================================================
format      `kvmtick-fuzz`
version     1; another one is refused
backends    names of the two that were compared
seed        of the run, and `number` of the sequence it was cut from
runs        whether the vCPUs enter the guest
operations  a list of objects: `op`, the kind, and its fields as `operations` has them; bytes in
            hexadecimal
difference  `step`, and `fields`: a list of name, left, right; null for a kernel log line
warning     the line of the kernel log, or empty
=========== =====================================================================================
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kvmtick.conform.fuzz.generate import Sequence
from kvmtick.conform.fuzz.operations import CPUID_KINDS, KINDS, Operation, SetCpuid2
from kvmtick.conform.fuzz.search import Finding
from kvmtick.conform.fuzz.side import Config

__all__ = ["ReplayError", "load", "save", "show"]

FORMAT, VERSION = "kvmtick-fuzz", 1


class ReplayError(ValueError):
    """A file that is no replay file: one line that says what is wrong with it."""


def save(finding: Finding, backends: tuple[str, str], directory: Path) -> Path:
    """Write a finding to a new file in `directory`, and return its path. OSError."""
    each = finding.sequence
    found = finding.found
    content = {
        "format": FORMAT,
        "version": VERSION,
        "backends": backends,
        "seed": each.seed,
        "number": each.number,
        "runs": each.config.runs,
        "operations": [_to_json(operation) for operation in each.operations],
        "difference": found
        and {"step": found.step, "fields": [asdict(each) for each in found.differences]},
        "warning": finding.warning,
    }
    path = directory / f"fuzz-{each.seed}-{each.number}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def load(path: Path) -> Sequence:
    """Read a replay file. ReplayError: it is none, or not whole. OSError."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ReplayError(
            f"{path} is not whole, or no JSON ({error}): give a replay file"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ReplayError(f"{path} is no replay file: its format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ReplayError(
            f"{path} has version {content.get('version')!r}, this kvmtick reads {VERSION}"
        )
    try:
        seed, number, runs = content["seed"], content["number"], content["runs"]
        _check(seed, int)
        _check(number, int)
        _check(runs, bool)
        operations = tuple(_from_json(each) for each in content["operations"])
    except KeyError as error:
        raise ReplayError(f"{path} has no {error}: is it whole?") from None
    except (TypeError, ValueError) as error:
        raise ReplayError(f"{path}: {error}") from None
    return Sequence(seed, number, Config(runs), operations)


def _to_json(operation: Operation) -> dict[str, Any]:
    out: dict[str, Any] = {"op": type(operation).__name__}
    for each in fields(operation):  # type: ignore[arg-type]
        value = getattr(operation, each.name)
        out[each.name] = value.hex() if isinstance(value, bytes) else value
    return out


def _from_json(content: Any) -> Operation:
    _check(content, dict)
    kind = KINDS.get(content.get("op"))
    if kind is None:
        raise ValueError(f"unknown operation {content.get('op')!r}")
    known = {each.name: str(each.type) for each in fields(kind)}  # type: ignore[arg-type]
    if set(content) - {"op"} != set(known):
        raise ValueError(f"{kind.__name__} has the fields {', '.join(known) or 'none'}")
    operation = kind(**{name: _value(type_, content[name]) for name, type_ in known.items()})
    if isinstance(operation, SetCpuid2) and operation.cpuid not in CPUID_KINDS:
        raise ValueError(f"SetCpuid2: no CPUID {operation.cpuid!r}")
    return operation


def _value(type_: str, value: Any) -> Any:
    if type_ == "int":
        return _check(value, int)
    if type_ == "str":
        return _check(value, str)
    if type_ == "bytes":
        return bytes.fromhex(_check(value, str))
    return _tuples(_check(value, list))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else _check(value, int)


def _check(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


def show(operation: Operation) -> str:
    """For people: numbers in hexadecimal."""

    def value(what: object) -> str:
        if isinstance(what, tuple):
            return "(" + "".join(f"{value(item)}, " for item in what) + ")"
        if isinstance(what, bytes):
            return what.hex()
        return hex(what) if isinstance(what, int) and what > 9 else repr(what)

    named = (
        f"{each.name}={value(getattr(operation, each.name))}"
        for each in fields(operation)  # type: ignore[arg-type]
    )
    return f"{type(operation).__name__}({', '.join(named)})"
