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
