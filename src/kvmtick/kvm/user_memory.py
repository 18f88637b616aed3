"""User memory: what an ioctl's argument points to (copy_from_user, copy_to_user).

An argument is a structure or a buffer, read and written in place, or an integer: a raw address of
this process. Such a one is read by process_vm_readv(2) and written by process_vm_writev(2) of the
own process, so an address that is not mapped, not writable, or the kernel's, is EFAULT as it is for
the kernel. A structure or buffer that is too short is EFAULT, too.
"""

import ctypes
import errno
import os
from ctypes import addressof, memmove, sizeof, string_at
from typing import TypeVar

from kvmtick.abi.errors import HostError
from kvmtick.abi.structs import KvmStruct
from kvmtick.kvm.api import Arg

__all__ = [
    "UserFault",
    "as_number",
    "copy_from_user",
    "copy_to_user",
    "get_struct",
    "memdup_struct",
    "put_struct",
]

_U64 = (1 << 64) - 1
_S = TypeVar("_S", bound=KvmStruct)


class UserFault(Exception):
    """EFAULT: there is not so much memory of this process at the address."""


def as_number(arg: Arg) -> int:
    """The argument as the unsigned long it is."""
    return arg & _U64 if isinstance(arg, int) else _address(arg)


def get_struct(arg: Arg, struct: type[_S]) -> _S:
    """copy_from_user of a structure. It may be the caller's own: only read it."""
    if type(arg) is struct:
        return arg
    return struct.from_buffer_copy(copy_from_user(arg, 0, sizeof(struct)))


def memdup_struct(arg: Arg, struct: type[_S]) -> _S:
    """memdup_user of a structure: a copy to work with."""
    if type(arg) is struct:
        return struct.from_buffer_copy(arg)
    return get_struct(arg, struct)


def put_struct(arg: Arg, value: KvmStruct) -> None:
    """copy_to_user of a structure."""
    if type(arg) is type(value):
        memmove(addressof(arg), addressof(value), sizeof(value))
    else:
        copy_to_user(arg, 0, bytes(value))


def copy_from_user(arg: Arg, offset: int, size_bytes: int) -> bytes:
    """The bytes from `offset` on."""
    if isinstance(arg, int):
        data = ctypes.create_string_buffer(size_bytes)
        _transfer("process_vm_readv", data, arg + offset, size_bytes)
        return data.raw
    if offset + size_bytes > _size_of(arg):
        raise UserFault
    if isinstance(arg, bytearray):
        return bytes(arg[offset : offset + size_bytes])
    return string_at(addressof(arg) + offset, size_bytes)


def copy_to_user(arg: Arg, offset: int, data: bytes) -> None:
    """Store bytes from `offset` on."""
    if isinstance(arg, int):
        buffer = ctypes.create_string_buffer(data, len(data))
        _transfer("process_vm_writev", buffer, arg + offset, len(data))
        return
    if offset + len(data) > _size_of(arg):
        raise UserFault
    if isinstance(arg, bytearray):
        arg[offset : offset + len(data)] = data
    else:
        memmove(addressof(arg) + offset, data, len(data))


def _size_of(buffer: KvmStruct | bytearray) -> int:
    return len(buffer) if isinstance(buffer, bytearray) else sizeof(buffer)


def _address(buffer: KvmStruct | bytearray) -> int:
    if isinstance(buffer, bytearray):
        return addressof(ctypes.c_char.from_buffer(buffer))
    return addressof(buffer)


class _iovec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def _transfer(call: str, local: "ctypes.Array[ctypes.c_char]", address: int, size: int) -> None:
    here = _iovec(addressof(local), size)
    there = _iovec(address & _U64, size)
    one = ctypes.c_ulong(1)
    moved = getattr(_libc, call)(
        os.getpid(), ctypes.byref(here), one, ctypes.byref(there), one, ctypes.c_ulong(0)
    )
    if moved == size:
        return
    code = ctypes.get_errno()
    if moved < 0 and code != errno.EFAULT:
        raise HostError(f"{call} of the own process: {os.strerror(code)}", "pass a buffer instead")
    raise UserFault
