"""The ACPI tables: linked, summed up, and what ACPICA's disassembler reads in them."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kvmtick.machine.pc import aml
from kvmtick.machine.pc.acpi import acpi_tables
from kvmtick.machine.pc.acpi_pm import S5

AT = 0xF_0000
HEADER_BYTES = 36


class Tables:
    """Read as an operating system does, from the RSDP on."""

    def __init__(self, vcpus: int = 1) -> None:
        self.memory = acpi_tables(AT, vcpus)
        self.rsdt, self.length, self.xsdt = struct.unpack_from("<IIQ", self.memory, 16)
        entries = self.at(self.xsdt)[HEADER_BYTES:]
        addresses = struct.unpack(f"<{len(entries) // 8}Q", entries)
        self.by_name = {self.at(gpa)[:4].decode(): self.at(gpa) for gpa in addresses}
        facs, dsdt = struct.unpack_from("<II", self.by_name["FACP"], 36)
        self.facs_at = facs
        self.by_name |= {"FACS": self.at(facs), "DSDT": self.at(dsdt)}
        self.by_name |= {"RSDT": self.at(self.rsdt), "XSDT": self.at(self.xsdt)}

    def at(self, gpa: int) -> bytes:
        offset = gpa - AT
        (length,) = struct.unpack_from("<I", self.memory, offset + 4)
        assert offset + length <= len(self.memory)
        return self.memory[offset : offset + length]


def subtables(madt: bytes) -> list[tuple[int, bytes]]:
    """The MADT's entries, each with its type."""
    found, at = [], HEADER_BYTES + 8
    while at < len(madt):
        found.append((madt[at], madt[at + 2 : at + madt[at + 1]]))
        at += madt[at + 1]
    assert at == len(madt)
    return found


def test_every_sum_is_zero_and_every_table_is_where_it_is_looked_for() -> None:
    for vcpus in (1, 4, 255, 1024):
        tables = Tables(vcpus)
        assert tables.memory[:8] == b"RSD PTR "
        assert sum(tables.memory[:20]) % 256 == 0
        assert sum(tables.memory[: tables.length]) % 256 == 0
        assert set(tables.by_name) == {"FACP", "APIC", "FACS", "DSDT", "RSDT", "XSDT"}
        for name, table in tables.by_name.items():
            assert name == "FACS" or sum(table) % 256 == 0, name
        assert tables.facs_at % 64 == 0
        assert len(tables.by_name["FACS"]) == 64


def test_rsdt_and_xsdt_name_the_same_tables() -> None:
    tables = Tables()
    wide, narrow = (tables.by_name[name][HEADER_BYTES:] for name in ("XSDT", "RSDT"))
    assert struct.unpack("<2Q", wide) == struct.unpack("<2I", narrow)


def test_the_madt_lists_the_local_apics_and_the_timers_pin() -> None:
    entries = subtables(Tables(3).by_name["APIC"])
    apics = [body for kind, body in entries if kind == 0]
    assert [struct.unpack("<BBI", body) for body in apics] == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
    assert [body for kind, body in entries if kind == 1] == [struct.pack("<xxII", 0xFEC0_0000, 0)]
    overrides = [struct.unpack("<BBIH", body) for kind, body in entries if kind == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, 0b1101)]
    assert [body for kind, body in entries if kind == 4] == [b"\xff\0\0\x01"]


def test_processors_above_id_254_are_x2apics() -> None:
    entries = subtables(Tables(300).by_name["APIC"])
    assert sum(kind == 0 for kind, _ in entries) == 255
    ids = [struct.unpack_from("<2xI", body)[0] for kind, body in entries if kind == 9]
    assert ids == list(range(255, 300))


def test_a_long_package_has_a_length_of_two_bytes() -> None:
    assert aml.package(*[aml.integer(0)] * 61) == b"\x12\x3f\x3d" + bytes(61)
    assert aml.package(*[aml.integer(0)] * 62) == b"\x12\x41\x04\x3e" + bytes(62)
    with pytest.raises(ValueError, match="bytes of AML"):
        aml.scope("\\_SB_", bytes(4095))


@pytest.mark.skipif(
    shutil.which("iasl") is None, reason="iasl is not installed: apt-get install acpica-tools"
)
def test_the_tables_disassemble(tmp_path: Path) -> None:
    text = {}
    for name, table in Tables(2).by_name.items():
        binary = tmp_path / f"{name}.dat"
        binary.write_bytes(table)
        command = ["iasl", "-d", binary.name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert not any(word in output for word in ("Error", "Warning", "ERROR", "WARN")), output
        text[name] = (tmp_path / f"{name}.dsl").read_text()
        assert not any(word in text[name] for word in ("Invalid", "Unknown", "Incorrect")), name
    for words in ("_S5", f"0x{S5:02X}", 'EisaId ("PNP0501")', "0x03F8", "{4}", "PNP0B00"):
        assert words in text["DSDT"]
    for words in (
        "PM1A Event Block Address : 00000600",
        "PM1A Control Block Address : 00000604",
        "PM Timer Block Address : 00000608",
        "SCI Interrupt : 0009",
        "SMI Command Port : 00000000",
        "RTC Century Index : 32",
        "8042 Present on ports 60/64 (V2) : 1",
        "Reset Register Supported (V2) : 1",
        "Address : 0000000000000CF9",
        "Value to cause reset : 06",
    ):
        assert words in text["FACP"]
    recompiled = subprocess.run(["iasl", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True)
    assert recompiled.returncode == 0, recompiled.stdout
    compiled = (tmp_path / "DSDT.aml").read_bytes()
    assert compiled[HEADER_BYTES:] == Tables(2).by_name["DSDT"][HEADER_BYTES:]
