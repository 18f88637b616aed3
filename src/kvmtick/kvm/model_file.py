"""What the model's system, VMs and vCPUs have in common as files that take ioctls.

Each class has a table of handlers by request number, as the kernel's kvm_dev_ioctl, kvm_vm_ioctl
and kvm_vcpu_ioctl have; a handler takes the object and the argument. What the kernel checks before
anything else is checked before the table is asked.

A file that an ioctl made is known by a number, as for the kernel: that of a placeholder descriptor,
an empty memfd. `file_of` gives the object.
"""

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from kvmtick.abi.errors import KvmError
from kvmtick.abi.ioctls import KVM_RUN, ioctl_name
from kvmtick.kvm.api import Arg, Ioctls
from kvmtick.kvm.user_memory import UserFault
from kvmtick.machine.machine import Machine

__all__ = ["Handler", "MachineFile", "ModelFile", "file_of"]

Handler = Callable[[Any, Arg], int]

_U32 = 0xFFFF_FFFF


class ModelFile(Ioctls):
    """Something open that takes ioctls."""

    kind: ClassVar[str]
    """What it is, for messages."""
    handlers: ClassVar[Mapping[int, Handler]]
    unknown: ClassVar[int]
    """The errno of a request that is not in `handlers`."""

    def __init__(self) -> None:
        self.closed = False
        self._placeholder: _Placeholder | None = None

    def ioctl(self, request: int, arg: Arg = 0) -> int:
        request &= _U32
        self.check_usable(request)
        return self._do(request, arg)

    def _do(self, request: int, arg: Arg) -> int:
        handler = self.handlers.get(request)
        if handler is None:
            raise KvmError(self.unknown, ioctl_name(request))
        try:
            return handler(self, arg)
        except UserFault:
            raise KvmError(errno.EFAULT, ioctl_name(request)) from None

    def check_usable(self, request: int) -> None:
        """Raises `KvmError` EBADF after `close`."""
        if self.closed:
            raise KvmError(errno.EBADF, ioctl_name(request), f"this {self.kind} was closed")

    def fileno(self) -> int:
        """A descriptor that stands for it, made when first asked for; -1 after `close`."""
        if self.closed:
            return -1
        if self._placeholder is None:
            self._placeholder = _Placeholder(type(self).__name__)
            _files[self._placeholder.fd] = self
        return self._placeholder.fd

    def hand_out(self) -> int:
        """`fileno` for an ioctl to return: until it is closed, nobody else need keep the object."""
        fd = self.fileno()
        for other, file in list(_handed_out.items()):
            if not file.stands_behind(other):
                del _handed_out[other]
        _handed_out[fd] = self
        return fd

    def close(self) -> None:
        self.closed = True
        if self._placeholder is not None:
            if _handed_out.get(self._placeholder.fd) is self:
                del _handed_out[self._placeholder.fd]
            self._placeholder.close()
            self._placeholder = None

    def stands_behind(self, fd: int) -> bool:
        """Whether `fd` is still its placeholder: somebody may have closed it by the number."""
        return self._placeholder is not None and self._placeholder.is_at(fd)


class MachineFile(ModelFile):
    """A VM or a vCPU: what belongs to one machine, and to the process that made it."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self._pid = os.getpid()

    def _do(self, request: int, arg: Arg) -> int:
        if request == KVM_RUN:
            return super()._do(request, arg)
        machine = self.machine
        with machine.lock:
            if self.closed:
                self.check_usable(request)
            machine.clock.refresh()
            # An irqfd that was signalled before this call was served before it.
            machine.board.irqfds.poll()
            try:
                return super()._do(request, arg)
            finally:
                machine.wake_threads()

    def closing(self) -> AbstractContextManager[None]:
        """Have the machine, to close something of it; where another process has the VM by fork(),
        the one who had the machine then is not in it.
        """
        return self.machine.lock if self._pid == os.getpid() else nullcontext()

    def check_usable(self, request: int) -> None:
        """As `ModelFile.check_usable`; EIO in another process, which has it by fork()."""
        super().check_usable(request)
        if self._pid != os.getpid():
            raise KvmError(errno.EIO, ioctl_name(request))


class _Placeholder:
    """A descriptor that is ours for as long as nobody closes it by its number."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        self._file = self._file_at(self.fd)

    def is_at(self, fd: int) -> bool:
        with suppress(OSError):
            return fd == self.fd and self._file_at(fd) == self._file
        return False

    @staticmethod
    def _file_at(fd: int) -> tuple[int, int]:
        status = os.fstat(fd)
        return status.st_dev, status.st_ino

    def close(self) -> None:
        if self.is_at(self.fd):
            os.close(self.fd)
        self.fd = -1

    def __del__(self) -> None:
        self.close()


_files: WeakValueDictionary[int, ModelFile] = WeakValueDictionary()
_handed_out: dict[int, ModelFile] = {}


def file_of(fd: int) -> ModelFile:
    """The VM or vCPU whose descriptor an ioctl returned.

    KvmError EBADF: there is nothing; ENOTTY: something else.
    """
    found = _files.get(fd)
    if found is not None and found.stands_behind(fd):
        return found
    try:
        os.fstat(fd)
    except OSError:
        raise KvmError(errno.EBADF, "ioctl", f"{fd} is no open descriptor") from None
    raise KvmError(errno.ENOTTY, "ioctl", f"{fd} is no descriptor of the model's")
