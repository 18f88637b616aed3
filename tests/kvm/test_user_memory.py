"""What an ioctl's argument points to: kvmtick.kvm.user_memory."""

import mmap
from ctypes import addressof, sizeof

import pytest
from errno_readings import BAD_POINTER, KERNEL_POINTER, NULL, U64, Pages

from kvmtick.abi.structs import kvm_irq_level, kvm_mp_state, kvm_pit_config
from kvmtick.kvm.api import Arg
from kvmtick.kvm.user_memory import (
    UserFault,
    as_number,
    copy_from_user,
    copy_to_user,
    get_struct,
    memdup_struct,
    put_struct,
)

BAD = (NULL, BAD_POINTER, KERNEL_POINTER, U64, -1)


LINE = bytes(kvm_irq_level(irq=4, level=1))


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture(params=["structure", "buffer", "address"])
def arg(request: pytest.FixtureRequest, pages: Pages) -> Arg:
    pages.write(LINE)
    struct = kvm_irq_level.from_buffer_copy(LINE)
    forms = {"structure": struct, "buffer": bytearray(LINE), "address": pages.address}
    return forms[request.param]


def test_what_is_stored_is_read_back(arg: Arg) -> None:
    assert bytes(get_struct(arg, kvm_irq_level)) == LINE
    assert copy_from_user(arg, 4, 4) == b"\1\0\0\0"
    copy_to_user(arg, 4, b"\7\0")
    assert get_struct(arg, kvm_irq_level).level == 7
    put_struct(arg, kvm_irq_level(irq=5))
    assert (get_struct(arg, kvm_irq_level).irq, get_struct(arg, kvm_irq_level).level) == (5, 0)


def test_a_copy_leaves_the_callers_alone(arg: Arg) -> None:
    memdup_struct(arg, kvm_irq_level).level = 9
    assert get_struct(arg, kvm_irq_level).level == 1


@pytest.mark.parametrize("arg", [kvm_mp_state(), bytearray(4)], ids=["structure", "buffer"])
def test_a_structure_or_buffer_that_is_too_short(arg: Arg) -> None:
    with pytest.raises(UserFault):
        get_struct(arg, kvm_irq_level)
    with pytest.raises(UserFault):
        put_struct(arg, kvm_irq_level())
    with pytest.raises(UserFault):
        copy_to_user(arg, 1, b"\0" * 4)
    assert copy_from_user(arg, 0, 4) == bytes(4)


def test_a_longer_one_is_used_as_far_as_needed() -> None:
    arg = bytearray(LINE + b"rest")
    put_struct(arg, kvm_irq_level(irq=5, level=1))
    assert arg == bytes(kvm_irq_level(irq=5, level=1)) + b"rest"
    assert get_struct(kvm_pit_config(flags=3), kvm_mp_state).mp_state == 3


@pytest.mark.parametrize("address", BAD)
def test_an_address_that_is_not_ours(address: int) -> None:
    with pytest.raises(UserFault):
        get_struct(address, kvm_irq_level)
    with pytest.raises(UserFault):
        put_struct(address, kvm_irq_level())


def test_pages_are_checked_to_the_last_byte(pages: Pages) -> None:
    pages.protect(1, 0)
    size = sizeof(kvm_irq_level)
    last = pages.address + mmap.PAGESIZE - size
    put_struct(last, kvm_irq_level(irq=6))
    assert get_struct(last, kvm_irq_level).irq == 6
    with pytest.raises(UserFault):
        get_struct(last + 1, kvm_irq_level)
    with pytest.raises(UserFault):
        copy_to_user(last, size, b"x")
    pages.protect(0, mmap.PROT_READ)
    assert get_struct(last, kvm_irq_level).irq == 6
    with pytest.raises(UserFault):
        put_struct(last, kvm_irq_level())


def test_an_argument_as_the_number_it_is() -> None:
    struct = kvm_mp_state()
    assert as_number(7) == 7
    assert as_number(-1) == U64
    assert as_number(struct) == addressof(struct)
