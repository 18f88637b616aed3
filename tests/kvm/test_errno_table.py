"""What the calls answer: the 442 rows of a real kernel's errno table, on both back ends.

`kernel_errno.json` was recorded on Linux 6.18, on a KVM with another back end than VMX or SVM, on a
CPU whose TSC runs at 2596122 kHz; a row is the ioctl, what it was asked in prose, the result,
the errno's name, and what the call told beside them. `errno_readings` says what the prose means,
which is right when a live kernel gives the same.

Where a row has a number of that host, the answer is compared by what it means (`BY_MEANING`).
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backends import BACKENDS, make_vm
from errno_readings import PAGE_BYTES, READINGS, Answer, Desk, Reading, forms_of

from kvmtick import Kvm
from kvmtick.abi.caps import (
    KVM_CAP_TSC_CONTROL,
    KVM_CAP_VM_TYPES,
    KVM_CAP_X2APIC_API,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
)
from kvmtick.abi.structs import (
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST,
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST,
)
from kvmtick.kvm.api import System

ROWS = [
    (ioctl, case, Answer(rc, errno, told))
    for ioctl, case, rc, errno, told in json.loads(
        Path(__file__).with_name("kernel_errno.json").read_text()
    )
]
TEXTS = [f"{ioctl} {case}" for ioctl, case, _ in ROWS]


def reading(row: int) -> Reading:
    """Of the row of that number: an "after that" is after the row before."""
    (found,) = (reading for _, reading in forms_of(TEXTS[row]))
    return (*reading(row - 1), *found) if ROWS[row][1] == "after that" else found


def test_every_row_has_one_reading_and_no_reading_is_left_over() -> None:
    assert len(ROWS) == 442
    forms = [[form for form, _ in forms_of(text)] for text in TEXTS]
    assert [text for text, found in zip(TEXTS, forms, strict=True) if len(found) != 1] == []
    assert set(READINGS) == {form for found in forms for form in found}


# --- numbers of the host --------------------------------------------------------------------------

By = Callable[[Desk, Answer, Answer], bool]
"""Whether what was got means the same as what was recorded."""


def is_a_new_descriptor(desk: Desk, recorded: Answer, got: Answer) -> bool:
    os.close(got.rc)
    return recorded.rc > 2 and got[1:] == ("-", "")


def is_the_rate(desk: Desk, recorded: Answer, got: Answer) -> bool:
    """2596122 kHz there: that of the host's TSC, which a VM has from the start."""
    with make_vm(desk.system.backend, ram_bytes=PAGE_BYTES) as fresh:
        return recorded == (2596122, "-", "") and got == (fresh.get_tsc_khz(), "-", "")


def tells_a_time(desk: Desk, recorded: Answer, got: Answer) -> bool:
    """Some number of cycles."""
    return recorded[:2] == got[:2] and all(int(each.told, 16) >= 0 for each in (recorded, got))


def tells_the_pit(desk: Desk, recorded: Answer, got: Answer) -> bool:
    """Without the times of counters 1 and 2 (errno_readings.pit2_in_hex); one row ends earlier."""
    told = recorded.told
    for at in (80, 128):
        told = told[:at] + "0" * len(told[at : at + 16]) + told[at + 16 :]
    return recorded[:2] == got[:2] and got.told.startswith(told)


BY_MEANING: dict[str, By] = {
    r"CREATE_VCPU id (4095|255|256)": is_a_new_descriptor,
    r"GET_TSC_KHZ.*": is_the_rate,
    r"GET_MSRS .* TSC": tells_a_time,
    r"GET_PIT2 after that": tells_the_pit,
}


def meaning(text: str) -> By | None:
    return next((by for form, by in BY_MEANING.items() if re.fullmatch(form, text)), None)


def test_the_host_bound_rows_are_those_of_fidelity() -> None:
    text = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text()
    section = text.partition("### Host-bound rows of the errno table\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    host_bound = [text for text in TEXTS if meaning(text)]
    assert sorted(listed) == sorted(set(host_bound))
    assert f"the numbers in the {len(host_bound)} rows here" in section


# --- what a host may lack or have more of ---------------------------------------------------------

SUPPRESS_EOI = KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST | KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST

LIKE_THE_RECORDED: dict[str, tuple[str, Callable[[System], bool]]] = {
    r"CREATE_VM type 1": (
        "a kernel without KVM_X86_SW_PROTECTED_VM",
        lambda system: not system.check_extension(KVM_CAP_VM_TYPES) & 2,
    ),
    r"X2APIC_API args=(4|8|12)( .*)?": (
        "a kernel whose KVM_CAP_X2APIC_API knows EOI broadcasts",
        lambda system: system.check_extension(KVM_CAP_X2APIC_API) & SUPPRESS_EOI == SUPPRESS_EOI,
    ),
    r"APIC_BUS_CYCLES .*": (
        "KVM_CAP_X86_APIC_BUS_CYCLES_NS",
        lambda system: system.check_extension(KVM_CAP_X86_APIC_BUS_CYCLES_NS) == 1,
    ),
    r"SET_TSC_KHZ\(vcpu\) .* (half|0xffffffff)": (
        "a host without TSC scaling",
        lambda system: system.check_extension(KVM_CAP_TSC_CONTROL) == 0,
    ),
}
"""What a row needs of a host to give what was recorded; the model is like it in all of this."""


def needs(system: System, text: str) -> None:
    """Skip where this kernel is another than the recorded one, as far as it says so itself."""
    for form, (what, is_like) in LIKE_THE_RECORDED.items():
        if re.fullmatch(form, text) and not is_like(system):
            assert system.backend == "kernel"
            pytest.skip(f"needs {what}")


# --- the rows -------------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    vm = make_vm(request.param, ram_bytes=PAGE_BYTES)
    with Kvm(request.param) as system:
        made = Desk(system, vm)
        yield made
        made.close()


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[text.replace(" ", "-") for text in TEXTS])
def test_row(desk: Desk, row: int) -> None:
    needs(desk.system, TEXTS[row])
    *before, act = reading(row)
    for each in before:
        answer = each(desk)
        assert answer.errno == "-", f"a preparation was refused: {answer}"
    got, recorded = act(desk), ROWS[row][2]
    by = meaning(TEXTS[row])
    if by is None:
        assert got == recorded
    else:
        assert by(desk, recorded, got), f"{got} does not mean {recorded}"
