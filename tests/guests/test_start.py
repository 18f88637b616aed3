"""The states a guest may start in: what their registers say, bit by bit."""

import pytest

from kvmtick.guests.start import BOOT_CS, BOOT_DS, GDT_32, GDT_64, long_mode, protected

FLAT_CODE_32, FLAT_CODE_64, FLAT_DATA = 0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00CF93000000FFFF


def descriptor(gdt: bytes, selector: int) -> int:
    return int.from_bytes(gdt[selector : selector + 8], "little")


def test_protected_mode_is_flat_without_paging() -> None:
    state = protected(0x10_0020, rax=0x2BAD_B002)
    assert (state["rip"], state["rax"]) == (0x10_0020, 0x2BAD_B002)
    assert state["cr0"] & 0x8000_0001 == 1
    assert "efer" not in state
    assert "cr3" not in state


def test_long_mode_is_active_and_has_page_tables() -> None:
    state = long_mode(0x20_0000, 0x9000, rdi=5)
    assert (state["rip"], state["cr3"], state["rdi"]) == (0x20_0000, 0x9000, 5)
    assert state["cr0"] & 0x8000_0001 == 0x8000_0001
    assert state["cr4"] & 1 << 5, "PAE"
    assert state["cr4"] & 1 << 9, "SSE"
    assert state["efer"] & 0x500 == 0x500, "LME and LMA"


@pytest.mark.parametrize(
    ("state", "gdt", "code"),
    [(protected(0), GDT_32, FLAT_CODE_32), (long_mode(0, 0), GDT_64, FLAT_CODE_64)],
    ids=["protected", "long"],
)
def test_segments_are_those_of_the_gdt(state: dict[str, int], gdt: bytes, code: int) -> None:
    assert descriptor(gdt, 0) == 0
    assert (descriptor(gdt, BOOT_CS), descriptor(gdt, BOOT_DS)) == (code, FLAT_DATA)
    assert len(gdt) == BOOT_DS + 8
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        wanted = code if name == "cs" else FLAT_DATA
        assert state[name] == (BOOT_CS if name == "cs" else BOOT_DS)
        assert (state[f"{name}_base"], state[f"{name}_limit"]) == (0, 0xFFFF_FFFF)
        # The access rights are bits 40 to 47 and 52 to 55 of the descriptor.
        assert state[f"{name}_access"] == wanted >> 40 & 0xF0FF
    assert (state["gdtr_limit"], state["idtr_limit"]) == (0, 0)


def test_what_is_given_by_name_comes_before_the_rest() -> None:
    assert protected(0, gdtr_base=0x500, gdtr_limit=31)["gdtr_limit"] == 31
    assert long_mode(0, 0, cr4=0x20)["cr4"] == 0x20
