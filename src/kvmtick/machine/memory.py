"""Guest memory: the slots of KVM_SET_USER_MEMORY_REGION, and the engines that see them.

`set_slot` follows kvm_set_memory_region (virt/kvm/kvm_main.c) and
kvm_arch_prepare_memory_region. What backs a slot is memory of this process at any address.

Not modelled: the dirty log (the flag is taken, and nothing kept), address spaces but 0 (SMM), guest
memory of its own (guest_memfd). Two slots over the same memory, more than `MOST_RANGES` slots, and
a slot from 4 GiB on that comes or goes after the guest has run are ENOMEM.
"""

import errno
from ctypes import Array, addressof, c_char
from dataclasses import dataclass
from mmap import PAGESIZE, mmap

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from kvmtick.cpu.engine import Engine
from kvmtick.machine.address_space import Rights, rights_of

__all__ = [
    "FIRST_ROM_SLOT",
    "KVM_USER_MEM_SLOTS",
    "MOST_RAM_BYTES",
    "GuestMemory",
    "Slot",
    "check_ram_bytes",
]

MOST_RAM_BYTES = 3 << 30
"""Above are the IOAPIC and the local APICs."""

KVM_USER_MEM_SLOTS = 32764
FIRST_ROM_SLOT = 1
"""A guest's ROMs lie behind the RAM's slot, 0."""
MOST_PLACES = 4
"""How many slots an error names."""
MOST_RANGES = 128
"""What an engine can map."""
MOST_PAGES = (1 << 31) - 1
"""KVM_MEM_MAX_NR_PAGES."""
GPA_LIMIT = 1 << 40
"""The engine's physical addresses end there (kvm_mmu_max_gfn)."""
USER_LIMIT = (1 << 47) - PAGESIZE
"""TASK_SIZE_MAX: user addresses end there."""

_U64 = (1 << 64) - 1
Buffer = mmap | Array[c_char]


@dataclass(slots=True)
class Slot:
    """One memory slot; `ram` is its memory, None where this process has none at the address.

    `writable`: for the guest; `is_ours_to_write`: for this process.
    """

    number: int
    flags: int
    gpa: int
    size_bytes: int
    userspace_addr: int
    ram: Buffer | None
    writable: bool
    shared: bool
    is_ours_to_write: bool = True

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.gpa + self.size_bytes


class GuestMemory:
    """All slots of one machine."""

    def __init__(self) -> None:
        self._slots: dict[int, Slot] = {}
        self._engines: list[Engine] = []
        self.shared = False
        """Some slot's memory is written by others."""

    @property
    def slots(self) -> list[Slot]:
        """By address."""
        return sorted(self._slots.values(), key=lambda slot: slot.gpa)

    def add_engine(self, engine: Engine) -> None:
        """A new vCPU sees all slots."""
        for slot in self._slots.values():
            _map(engine, slot)
        self._engines.append(engine)

    def add_ram(self, gpa: int, ram: mmap) -> None:
        """Slot 0 is memory of our own."""
        address = addressof(c_char.from_buffer(ram))
        self._add(Slot(0, 0, gpa, len(ram), address, ram, writable=True, shared=False))

    def place_rom(self, number: int, gpa: int, data: bytes) -> mmap:
        """Read-only memory of our own, instead of what was in slot `number`; it is returned."""
        if (old := self._slots.get(number)) is not None:
            self._remove(old)
        rom = mmap(-1, len(data))
        rom[:] = data
        address = addressof(c_char.from_buffer(rom))
        flags = KVM_MEM_READONLY
        self._add(Slot(number, flags, gpa, len(rom), address, rom, writable=False, shared=False))
        return rom

    # KVM_SET_USER_MEMORY_REGION.

    def set_slot(
        self, number: int, flags: int, gpa: int, size_bytes: int, userspace_addr: int
    ) -> None:
        """Add, move, change or (size 0) delete a slot. KvmError: EINVAL, EEXIST, ENOMEM."""
        _check_region(number, flags, gpa, size_bytes, userspace_addr)
        old = self._slots.get(number)
        if not size_bytes:
            if old is None:
                raise _error(errno.EINVAL)
            self._remove(old)
            return
        if old is not None and _is_other_memory(old, flags, size_bytes, userspace_addr):
            raise _error(errno.EINVAL)
        if old is not None and old.gpa == gpa:
            old.flags = flags
            return
        if any(
            slot.number != number and slot.gpa < gpa + size_bytes and gpa < slot.end
            for slot in self._slots.values()
        ):
            raise _error(errno.EEXIST)
        if gpa + size_bytes > GPA_LIMIT:
            raise _error(errno.EINVAL)
        new = _user_slot(number, flags, gpa, size_bytes, userspace_addr)
        if old is not None:
            self._remove(old)
        try:
            self._add(new)
        except KvmError:
            if old is not None:
                self._add(old)
            raise

    def note_slot(
        self, number: int, flags: int, gpa: int, size_bytes: int, userspace_addr: int
    ) -> None:
        """As `set_slot`, once a kernel has done that; no engine sees it."""
        self._slots.pop(number, None)
        if size_bytes:
            new = _user_slot(number, flags, gpa, size_bytes, userspace_addr)
            self._slots[number] = new

    def _add(self, slot: Slot) -> None:
        mapped: list[Engine] = []
        try:
            for engine in self._engines:
                _map(engine, slot)
                mapped.append(engine)
        except ValueError as mistake:
            for engine in mapped:
                engine.unmap_ram(slot.gpa)
            raise _error(errno.ENOMEM, str(mistake)) from None
        self._slots[slot.number] = slot
        self.shared = any(slot.shared for slot in self._slots.values())

    def _remove(self, slot: Slot) -> None:
        if slot.ram is not None:
            try:
                for engine in self._engines:
                    engine.unmap_ram(slot.gpa)
            except ValueError as mistake:
                raise _error(errno.ENOMEM, str(mistake)) from None
        del self._slots[slot.number]
        self.shared = any(slot.shared for slot in self._slots.values())

    # Access from outside.

    def is_missing(self, gpa: int, *, writes: bool) -> bool:
        """`gpa` is in a slot of which this process has not the memory, or may not write it."""
        for slot in self._slots.values():
            if slot.gpa <= gpa < slot.end:
                read_only = slot.flags & KVM_MEM_READONLY != 0
                return slot.ram is None or (writes and not slot.writable and not read_only)
        return False

    def read(self, gpa: int, size_bytes: int) -> bytes | None:
        """Bytes of guest memory, over any slots; None if some of them are in none."""
        parts = self._parts(gpa, size_bytes)
        if parts is None:
            return None
        return b"".join(bytes(memoryview(ram)[at : at + count]) for ram, at, count in parts)

    def write(self, gpa: int, data: bytes) -> bool:
        """Store bytes; False, and nothing is done, if some of them are in no slot."""
        parts = self._parts(gpa, len(data), writes=True)
        if parts is None:
            return False
        done = 0
        for ram, at, count in parts:
            memoryview(ram).cast("B")[at : at + count] = data[done : done + count]
            done += count
        for engine in self._engines:
            engine.ram_written(gpa, len(data))
        return True

    def _parts(
        self, gpa: int, size_bytes: int, writes: bool = False
    ) -> list[tuple[Buffer, int, int]] | None:
        """Where the bytes lie: memory, offset, count."""
        parts: list[tuple[Buffer, int, int]] = []
        for slot in self.slots:
            if writes and not slot.is_ours_to_write:
                continue
            if size_bytes > 0 and slot.gpa <= gpa < slot.end and slot.ram is not None:
                count = min(size_bytes, slot.end - gpa)
                parts.append((slot.ram, gpa - slot.gpa, count))
                gpa += count
                size_bytes -= count
        return None if size_bytes else parts

    def outside(self, gpa: int, size_bytes: int) -> ValueError:
        """The error of who asked for bytes that are not all in slots."""
        places = [f"{slot.gpa:#x}..{slot.end:#x}" for slot in self.slots]
        if len(places) > MOST_PLACES:
            places[MOST_PLACES:] = ["..."]
        where = f"stay within {', '.join(places)}" if places else "this VM has no memory slot"
        return ValueError(f"{size_bytes} bytes at {gpa:#x} are outside guest RAM; {where}")


def check_ram_bytes(ram_bytes: int) -> None:
    """ValueError: a VM cannot have so much RAM at guest-physical 0."""
    if not 0 <= ram_bytes <= MOST_RAM_BYTES or ram_bytes % PAGESIZE:
        raise ValueError(f"ram_bytes={ram_bytes}: give a multiple of {PAGESIZE} up to 3 GiB")


def _error(code: int, why: str = "") -> KvmError:
    return KvmError(code, "KVM_SET_USER_MEMORY_REGION", why)


def _check_region(number: int, flags: int, gpa: int, size_bytes: int, userspace_addr: int) -> None:
    """What is wrong with a region whatever slots there are."""
    wrong = (
        number >= KVM_USER_MEM_SLOTS
        or flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)
        or (size_bytes | gpa | userspace_addr) % PAGESIZE
        or userspace_addr + size_bytes > USER_LIMIT
        or gpa + size_bytes > _U64
        or size_bytes // PAGESIZE > MOST_PAGES
    )
    if wrong:
        raise _error(errno.EINVAL)


def _is_other_memory(old: Slot, flags: int, size_bytes: int, userspace_addr: int) -> bool:
    """A slot keeps its memory as long as it lives."""
    return bool(
        userspace_addr != old.userspace_addr
        or size_bytes != old.size_bytes
        or (flags ^ old.flags) & KVM_MEM_READONLY
    )


def _user_slot(number: int, flags: int, gpa: int, size_bytes: int, userspace_addr: int) -> Slot:
    rights = rights_of(userspace_addr, size_bytes)
    ram = None
    if Rights.READ in rights:
        ram = (c_char * size_bytes).from_address(userspace_addr)
    ours = Rights.WRITE in rights
    writable = ours and not flags & KVM_MEM_READONLY
    return Slot(number, flags, gpa, size_bytes, userspace_addr, ram, writable, True, ours)


def _map(engine: Engine, slot: Slot) -> None:
    if slot.ram is not None:
        engine.map_ram(slot.gpa, slot.ram, writable=slot.writable, shared=slot.shared)
