"""A tree like /proc, with the processes that a test wants."""

from pathlib import Path

KVM_RUN = "16 0x%x 0xae80 0x0 0x0 0x0 0x0 0x7ffd00000000 0x7f0000000000\n"
"""`syscall` of a thread that sleeps in ioctl(fd, KVM_RUN)."""
KERNEL_MADE = "16 0x%x 0xae80 0x0 0x0 0x0 0x0 0x0 0x0\n"
"""Of a thread that the kernel made while another one was in KVM_RUN."""


class FakeProc:
    """`path` is the tree; processes can be added and changed at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def process(
        self, pid: int, comm: str = "x", argv: tuple[str, ...] = (), fds: tuple[str, ...] = ()
    ) -> None:
        """A process of one thread with these descriptors, from 3 on."""
        where = self.path / str(pid)
        (where / "fd").mkdir(parents=True)
        (where / "comm").write_text(f"{comm}\n")
        (where / "cmdline").write_text("".join(f"{word}\0" for word in argv))
        (where / "status").write_text(f"Name:\t{comm}\nTgid:\t{pid}\nPid:\t{pid}\n")
        for target in fds:
            self.descriptor(pid, target)
        self.thread(pid, pid, comm)

    def descriptor(self, pid: int, target: str) -> None:
        """One more."""
        where = self.path / str(pid) / "fd"
        (where / str(3 + len(list(where.iterdir())))).symlink_to(target)

    def thread(self, pid: int, tid: int, comm: str, syscall: str = "running\n") -> None:
        """A thread, new or changed."""
        where = self.path / str(pid) / "task" / str(tid)
        where.mkdir(parents=True, exist_ok=True)
        (where / "comm").write_text(f"{comm}\n")
        (where / "syscall").write_text(syscall)
