"""What a user would pick instead: QEMU and Bochs, run on the same guest images.

QEMU is run under TCG in its own virtual time (`-icount shift=0,sleep=off`: an instruction is 1 ns,
an idle CPU jumps to the next deadline). Bochs is run without any tie to real time (`sync=none`) at
10 million instructions a second of its time. Its Debian package has a debugger in it, which is told
to go on, and no display that draws nothing: it is the terminal's, drawn into a file.
"""

import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvmtick.bench.process import MeasureError, Spent, run_process
from kvmtick.bench.rom import exit_and_count, rom_of
from kvmtick.guests import LOAD_AT, PARAMETERS, Guest

__all__ = ["BOCHS", "BOCHS_IPS", "PEERS", "QEMU", "QEMU_EXIT_CODES", "QEMU_RAM", "Peer"]

BOCHS_IPS: Final = 10_000_000
QEMU_RAM: Final = "16M"
QEMU_EXIT_CODES: Final = tuple(range(1, 256, 2))
"""isa-debug-exit gives twice what is written, and 1."""
VERSION_TIMEOUT_S: Final = 60.0
_PERIOD_AT: Final = PARAMETERS.period_ns - LOAD_AT
_NS_PER_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Peer(ABC):
    """An engine that runs guests in virtual time."""

    name: str
    program: str

    @property
    def installed(self) -> bool:
        """Whether its program is in PATH."""
        return shutil.which(self.program) is not None

    def version(self) -> str | None:
        """What it says of itself, or why it does not, one line; None if it is not installed."""
        if not self.installed:
            return None
        try:
            told = run_process(
                [self.program, *self._version_options()],
                expected=range(256),
                timeout_s=VERSION_TIMEOUT_S,
            )
        except MeasureError as error:
            return str(error)
        lines = [line.strip() for line in (told.output + told.errors).splitlines()]
        return next((line for line in lines if self.name.lower() in line.lower()), self.program)

    def run(self, guest: Guest, rounds: int) -> Spent:
        """Run a guest from the start of the process to its end, and see that it says it did all of
        its `rounds`, ticks or loops; MeasureError if not.
        """
        with tempfile.TemporaryDirectory(prefix="kvmtick-bench-") as folder:
            rom, com1 = Path(folder, "rom.bin"), Path(folder, "com1.txt")
            rom.write_bytes(rom_of(self._image(guest)))
            spent = self._run(rom, com1)
            said = com1.read_text(errors="replace") if com1.exists() else ""
        try:
            code, count = exit_and_count(said)
        except ValueError:
            raise MeasureError(f"{self.name}: {guest.name} did not say how it ended") from None
        if code or count != rounds:
            raise MeasureError(
                f"{self.name}: {guest.name} left with code {code} after {count} of {rounds} rounds"
            )
        return spent

    def _image(self, guest: Guest) -> bytes:
        return guest.image

    @abstractmethod
    def _version_options(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _run(self, rom: Path, com1: Path) -> Spent: ...


class Qemu(Peer):
    """QEMU's PC, TCG with icount."""

    def _version_options(self) -> tuple[str, ...]:
        return ("--version",)

    def command(self, rom: Path, com1: Path) -> list[str]:
        """A PC under TCG, in real time."""
        return [
            *(self.program, "-accel", "tcg", "-m", QEMU_RAM, "-nodefaults", "-no-user-config"),
            *("-display", "none", "-bios", str(rom), "-serial", f"file:{com1}"),
            *("-device", "isa-debug-exit,iobase=0x501,iosize=1"),
        ]

    def _run(self, rom: Path, com1: Path) -> Spent:
        command = [*self.command(rom, com1), "-icount", "shift=0,sleep=off"]
        return run_process(command, expected=QEMU_EXIT_CODES)


class Bochs(Peer):
    """Bochs' PC. It ends with exit code 1 when the guest switches it off."""

    def _version_options(self) -> tuple[str, ...]:
        return ("--help",)

    def _image(self, guest: Guest) -> bytes:
        """The local APIC's timer of Bochs counts instructions, not ns."""
        period_ns = int.from_bytes(guest.image[_PERIOD_AT : _PERIOD_AT + 4], "little")
        count = period_ns * BOCHS_IPS // _NS_PER_S
        return (
            guest.image[:_PERIOD_AT] + count.to_bytes(4, "little") + guest.image[_PERIOD_AT + 4 :]
        )

    def _run(self, rom: Path, com1: Path) -> Spent:
        settings, commands = rom.with_name("bochsrc"), rom.with_name("commands")
        commands.write_text("c\n")
        settings.write_text(
            f"cpu: ips={BOCHS_IPS}\n"
            "clock: sync=none, time0=1\n"
            "megs: 16\n"
            f"romimage: file={rom}\n"
            "display_library: term\n"
            "sound: driver=dummy\n"
            f"com1: enabled=1, mode=file, dev={com1}\n"
            f"log: {rom.with_name('log')}\n"
            "info: action=ignore\n"
            "error: action=ignore\n"
            "panic: action=fatal\n"
        )
        command = [self.program, "-q", "-f", str(settings), "-rc", str(commands)]
        return run_process(command, expected=(0, 1), environment={"TERM": "vt100"})


QEMU: Final = Qemu("qemu", "qemu-system-x86_64")
BOCHS: Final = Bochs("bochs", "bochs")
PEERS: Final[dict[str, Peer]] = {peer.name: peer for peer in (QEMU, BOCHS)}
