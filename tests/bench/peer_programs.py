"""Programs in PATH that go by the names of peers."""

from pathlib import Path

import pytest

QEMU = "qemu-system-x86_64"


def only(monkeypatch: pytest.MonkeyPatch, folder: Path, **programs: str) -> None:
    """PATH has nothing but these shell scripts, by name; `qemu` is QEMU's own."""
    for name, script in programs.items():
        program = folder / (QEMU if name == "qemu" else name)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


SAYS = 'for word; do case $word in file:*) printf "{}" >${{word#file:}};; esac; done; exit 1'
"""What a QEMU does whose guest says this on COM1."""
