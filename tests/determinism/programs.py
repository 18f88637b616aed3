"""Random programs of privileged instructions, interrupts and accesses, in every CPU mode.

`system(seed)` is a PC with one or two vCPUs; each has a program of its own, in real, protected or
long mode, and 64 KiB for itself (`Region`): descriptor tables, stacks, handlers, code, data. vCPU 1
begins as it is given, without INIT and SIPI; programs may send both.

A program is a prologue that sets up the chips at random, and a loop over random operations. Before
each operation the program notes where the next one is; the handler of an exception goes on there,
so that a fault costs the rest of its operation and no more. The handlers of interrupts count, write
EOIs and return. All may still crash or hang: an operation may well break what others need.

What operations read is stored, so that it shows in RAM.
"""

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvmtick.guests import Needs

__all__ = ["INTERRUPTS", "MODES", "ROUNDS", "System", "Vcpu", "system"]

MODES: Final = ("real", "protected", "long")
OPERATIONS: Final = (12, 48)
REGION_BYTES: Final = 0x1_0000
FIRST_REGION: Final = 0x1_0000

# In a region:
GDT_AT, TSS_AT, RESUME_AT, POINTERS_AT = 0x1000, 0x1200, 0x1400, 0x1410
ROUNDS: Final = 0x1408
"""Where the program counts its rounds, and the handlers their interrupts; 4 bytes each."""
INTERRUPTS: Final = 0x140C
STUBS_AT, HANDLERS_AT, CODE_AT = 0x2000, 0x3000, 0x4000
DATA_AT, DATA_BYTES = 0x8000, 0x4000
STACK_AT, RSP0_AT, IST_AT = 0xD000, 0xE000, 0xF000

CODE_0, DATA_0, CODE_3, DATA_3, TASK, ABSENT = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x38
GDT_LIMIT = 0x3F
PML4, PDPT, PD_LOW, PT_LOW, PD_DEVICES, PD_32 = (0x1000 * number for number in range(1, 7))
HOLE, SUPERVISOR_PAGE, READ_ONLY_PAGE = 0x8_0000, 0x8_1000, 0x8_2000
FAULTING_PAGES = (HOLE, SUPERVISOR_PAGE, READ_ONLY_PAGE)
"""In long mode. Elsewhere who jumps there goes on in ring 0."""
RAM_BYTES: Final = 2 << 20

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
PIC_BASE = 0x20
TO_RING_0 = 0x80
"""The vector whose handler goes on in ring 0."""
EXCEPTIONS_WITH_CODE = (8, 10, 11, 12, 13, 14, 17)
CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = (1 << bit for bit in range(6))
CR0_WP, CR0_AM, CR0_PG = 1 << 16, 1 << 18, 1 << 31
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11

PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x80, 0xE9, 0x3F8, 0x3FD, 0x4D0)
WRITES = (
    *((0x20, 0x20), (0xA0, 0x20), (0x20, 0x0B), (0x21, 0x00), (0x21, 0xFF), (0x21, 0xFE)),
    *(
        (0x43, 0x00),
        (0x43, 0xC2),
        (0x61, 0x01),
        (0x61, 0x03),
        (0x80, 0xAA),
        (0xE9, 0x2E),
        (0x3F8, 0x41),
    ),
)
"""To ports."""
LAPIC_WRITES = (
    *((0xB0, 0), (0xB0, 0), (0x80, 0), (0x80, 0x30), (0xF0, 0x1FF), (0xF0, 0xFF), (0x280, 0)),
    *((0x350, 0x700), (0x350, 0x1_0000), (0x350, 0x400), (0xD0, 1 << 24), (0x370, 0xFE)),
)
LAPIC_READ = (0x20, 0x30, 0x80, 0xA0, 0xD0, 0xF0, 0x100, 0x200, 0x210, 0x280, 0x300, 0x320, 0x390)
MSRS = (
    *(
        0x10,
        0x1B,
        0x174,
        0x175,
        0x176,
        0x1A0,
        0x277,
        0xFE,
        0x200,
        0x6E0,
        0x802,
        0x808,
        0x80B,
        0x80D,
    ),
    *(0x80F, 0x828, 0x830, 0x838, 0x839, 0x83F, 0xC000_0080, 0xC000_0081, 0xC000_0082),
    *(0xC000_0084, 0xC000_0100, 0xC000_0101, 0xC000_0102, 0xC000_0103, 0x4B56_4D00, 0x1234_5678),
)
HARMLESS_MSRS = (
    0x174,
    0x175,
    0x176,
    0xC000_0081,
    0xC000_0082,
    0xC000_0084,
    0xC000_0102,
    0xC000_0103,
)
FLAGS = (
    0x002,
    0x202,
    0x202,
    0x203,
    0x246,
    0x302,
    0x602,
    0x3202,
    0x4202,
    0x4_0202,
    0x20_0202,
    0x8D5,
)


@dataclass(frozen=True, slots=True)
class Vcpu:
    """What a vCPU starts with."""

    mode: str
    registers: Mapping[str, int]
    region: int
    """Guest-physical address of its region."""


@dataclass(frozen=True, slots=True)
class System:
    """A PC: what to ask the VM for, what is in RAM, how the vCPUs start."""

    needs: Needs
    reinject: bool
    pieces: tuple[tuple[int, bytes], ...]
    vcpus: tuple[Vcpu, ...]


def system(seed: int) -> System:
    """The random system with that number."""
    rng = random.Random(seed)
    vcpus: list[Vcpu] = []
    pieces = [(PML4, _paging())]
    pieces += [(page, bytes((0xCD, TO_RING_0))) for page in FAULTING_PAGES]
    for number in range(1 + (rng.random() < 0.4)):
        program = _Program(rng, rng.choice(MODES), FIRST_REGION + number * REGION_BYTES)
        pieces.append((program.region, program.image()))
        vcpus.append(Vcpu(program.mode, program.registers(), program.region))
    needs = Needs(vcpus=len(vcpus), cpuid=())
    if rng.random() < 0.5:
        needs = replace(needs, gsi0="ioapic-pin-2")
    return System(needs, rng.random() < 0.7, tuple(pieces), tuple(vcpus))


def _paging() -> bytes:
    """From PML4 on: 4-level paging, the first 2 MiB in small pages; and a page directory of large
    pages for 32-bit paging. Linear addresses are physical ones.
    """
    memory = bytearray(6 * 0x1000)

    def entry(table: int, index: int, value: int) -> None:
        struct.pack_into("<Q", memory, table - PML4 + 8 * index, value)

    entry(PML4, 0, PDPT | 7)
    entry(PDPT, 0, PD_LOW | 7)
    entry(PDPT, 3, PD_DEVICES | 7)
    entry(PD_LOW, 0, PT_LOW | 7)
    for index in range(512):
        entry(PT_LOW, index, index << 12 | 7)
        entry(PD_DEVICES, index, 0xC000_0000 + (index << 21) | 0x9F)
    entry(PT_LOW, HOLE >> 12, 0)
    entry(PT_LOW, SUPERVISOR_PAGE >> 12, SUPERVISOR_PAGE | 3)
    entry(PT_LOW, READ_ONLY_PAGE >> 12, READ_ONLY_PAGE | 5)
    for index in range(1024):
        struct.pack_into("<I", memory, PD_32 - PML4 + 4 * index, index << 22 | 0x87)
    return bytes(memory)


class _Program:
    """Makes the region of a vCPU."""

    def __init__(self, rng: random.Random, mode: str, region: int) -> None:
        self.rng = rng
        self.mode = mode
        self.real, self.long = mode == "real", mode == "long"
        self.region = region
        self.base = 0 if self.real else region
        """What to add to an offset in the region to have an address."""
        self.code = bytearray()
        self.at = CODE_AT
        self.acknowledges = rng.random() < 0.9
        every: list[tuple[int, Callable[[], bytes]]] = [
            (3, lambda: b"\xfa"),  # cli
            (5, lambda: b"\xfb"),  # sti
            (8, self.sleep),
            (5, self.interrupt),
            (1, lambda: b"\xcc"),  # int3
            (1, lambda: b"\xf1"),  # int1
            (1, lambda: b"\xce"),  # into
            (3, self.return_from_interrupt),
            (4, self.flags),
            (3, self.shadow),
            (2, self.descriptor_tables),
            (4, self.control_register),
            (4, self.read_msr),
            (3, self.write_msr),
            (2, self.tsc_deadline),
            (3, lambda: b"\x0f\x31" + self.store()),  # rdtsc
            (2, lambda: b"\x0f\x01\xf9" + self.store()),  # rdtscp
            (3, self.random_number),
            (2, self.cpuid),
            (4, self.port_in),
            (3, self.port_out),
            (3, self.pit),
            (3, self.lapic_read),
            (4, self.lapic_write),
            (4, self.lapic_timer),
            (3, self.ipi),
            (3, self.ioapic),
            (2, self.invalidate),
            (4, self.fault),
            (4, self.string),
            (4, self.rewrite),
            (4, self.ring),
            (6, self.spin),
            (2, self.debug_register),
            (2, self.floating_point),
            (2, lambda: b"\xf3\x90"),  # pause
            (3, self.locked),
        ]
        self.weights = [weight for weight, _ in every]
        self.operations = [operation for _, operation in every]

    # Pieces of code. Registers: A 0, C 1, D 2, B 3, SP 4, BP 5, SI 6, DI 7.

    def wide(self, code: bytes) -> bytes:
        """An instruction with operands of 32 bits."""
        return b"\x66" + code if self.real else code

    def load(self, register: int, value: int) -> bytes:
        """MOV register, 32-bit value."""
        return self.wide(bytes((0xB8 | register,)) + struct.pack("<I", value & 0xFFFF_FFFF))

    def memory(self, opcode: bytes, register: int, offset: int) -> bytes:
        """An instruction whose memory operand is at an offset in the region."""
        if self.real:
            return opcode + bytes((register << 3 | 6,)) + struct.pack("<H", offset)
        where = bytes((register << 3 | 4, 0x25) if self.long else (register << 3 | 5,))
        return opcode + where + struct.pack("<I", self.base + offset)

    def store(self, register: int = 0) -> bytes:
        """What a register has goes to the data: anywhere, but mostly aligned."""
        return self.wide(self.memory(b"\x89", register, DATA_AT + self.offset(4)))

    def offset(self, size_bytes: int) -> int:
        offset = self.rng.randrange(DATA_BYTES - size_bytes)
        return offset if self.rng.random() < 0.2 else offset & ~(size_bytes - 1)

    def address(self, offset: int) -> int:
        return self.base + offset

    def device(self, opcode: int, gpa: int) -> bytes:
        """An instruction of EAX and 4 bytes of a device: through FS, which is flat, and EBX."""
        prefixes = b"\x64\x66\x67" if self.real else b"\x64"
        return self.load(3, gpa) + prefixes + bytes((opcode, 0x03))

    def write_device(self, gpa: int, value: int) -> bytes:
        return self.load(0, value) + self.device(0x89, gpa)

    def out(self, port: int, value: int) -> bytes:
        return b"\xb0" + bytes((value & 0xFF,)) + b"\xe6" + bytes((port,))

    def push_value(self, value: int) -> bytes:
        return b"\x68" + (
            struct.pack("<H", value & 0xFFFF) if self.real else struct.pack("<I", value)
        )

    # The region.

    def image(self) -> bytes:
        memory = bytearray(REGION_BYTES)
        struct.pack_into("<8Q", memory, GDT_AT, *self.descriptors())
        tss = bytearray(0x68)
        if self.long:
            struct.pack_into("<Q", tss, 4, self.address(RSP0_AT))
            struct.pack_into("<Q", tss, 0x24, self.address(IST_AT))
        else:
            struct.pack_into("<II", tss, 4, self.address(RSP0_AT), DATA_0)
        struct.pack_into("<H", tss, 0x66, 0x68)
        memory[TSS_AT : TSS_AT + len(tss)] = tss
        struct.pack_into("<HQ", memory, POINTERS_AT, GDT_LIMIT, self.region + GDT_AT)
        struct.pack_into("<HQ", memory, POINTERS_AT + 16, self.idt_limit, self.region)
        self.handlers(memory)
        program = self.program()
        memory[CODE_AT : CODE_AT + len(program)] = program
        memory[DATA_AT : DATA_AT + DATA_BYTES] = self.rng.randbytes(DATA_BYTES)
        return bytes(memory)

    def descriptors(self) -> tuple[int, ...]:
        code = 0x00AF_9B00_0000_FFFF if self.long else 0x00CF_9B00_0000_FFFF
        data, ring_3 = 0x00CF_9300_0000_FFFF, 3 << 45
        tss = self.region + TSS_AT
        low = 0x67 | (tss & 0xFF_FFFF) << 16 | 0x89 << 40
        absent = data ^ 1 << 47
        return 0, code, data, code | ring_3, data | ring_3, low, 0, absent

    @property
    def idt_limit(self) -> int:
        return 0x3FF if self.real else 0xFFF if self.long else 0x7FF

    def handlers(self, memory: bytearray) -> None:
        """IVT or IDT, a stub for each vector, and what they lead to."""
        exception, interrupt, to_ring_0 = self.exception(), self.interrupt_handler(), self.go_on()
        where = {}
        at = HANDLERS_AT
        for name, code in (("exception", exception), ("interrupt", interrupt), ("ring", to_ring_0)):
            where[name] = at
            memory[at : at + len(code)] = code
            at += len(code) + 15 & ~15
        for vector in range(256):
            stub = STUBS_AT + 16 * vector
            if vector == TO_RING_0:
                target, code = where["ring"], b""
            elif vector >= 32:
                target, code = where["interrupt"], b""
            else:
                # discard the error code
                has_code = vector in EXCEPTIONS_WITH_CODE and not self.real
                discard = (b"\x48" if self.long else b"") + b"\x8d\x64\x24"
                code = discard + (b"\x08" if self.long else b"\x04") if has_code else b""
                target = where["exception"]
            jump = target - (stub + len(code) + (3 if self.real else 5))
            code += b"\xe9" + struct.pack("<h" if self.real else "<i", jump)
            memory[stub : stub + len(code)] = code
            self.gate(memory, vector, stub)

    def gate(self, memory: bytearray, vector: int, offset: int) -> None:
        if self.real:
            struct.pack_into("<HH", memory, 4 * vector, offset, self.region >> 4)
            return
        address = self.address(offset)
        trap = vector < 32 and self.rng.random() < 0.3
        access = (0x8F if trap else 0x8E) | (0x60 if self.rng.random() < 0.7 else 0)
        ist = 1 if self.long and vector in (2, 8, 0x21) else 0
        low = address & 0xFFFF | CODE_0 << 16 | ist << 32 | access << 40 | (address >> 16) << 48
        struct.pack_into("<Q", memory, (16 if self.long else 8) * vector, low)

    def exception(self) -> bytes:
        """Go on at the next operation, in the same ring, with TF, NT and AC clear."""
        if self.real:  # push bp; mov bp, sp; push ax; mov ax, [RESUME]; mov [bp + 2], ax
            code = b"\x55\x89\xe5\x50\x2e\xa1" + struct.pack("<H", RESUME_AT) + b"\x89\x46\x02"
            return code + b"\x81\x66\x06\xff\xbe\x58\x5d\xcf"  # and word [bp + 6], ...; pop; iret
        if (
            self.long
        ):  # push rax; mov rax, [RESUME]; mov [rsp + 8], rax; and dword [rsp + 24]; iretq
            code = b"\x50\x48" + self.memory(b"\x8b", 0, RESUME_AT) + b"\x48\x89\x44\x24\x08"
            return code + b"\x81\x64\x24\x18\xff\xbe\xfb\xff\x58\x48\xcf"
        code = b"\x50\x2e" + self.memory(b"\x8b", 0, RESUME_AT) + b"\x89\x44\x24\x04"
        return code + b"\x81\x64\x24\x0c\xff\xbe\xfb\xff\x58\xcf"

    def interrupt_handler(self) -> bytes:
        """Count, acknowledge to whoever it may come from, return."""
        if self.long:
            count, back = b"\xf0" + self.memory(b"\xff", 0, INTERRUPTS), b"\x48\xcf"
        elif self.real:
            count, back = b"\x2e" + self.wide(self.memory(b"\xff", 0, INTERRUPTS)), b"\xcf"
        else:  # DS of ring 3 reaches everything, too
            count, back = self.memory(b"\xff", 0, INTERRUPTS), b"\xcf"
        code = self.wide(b"\x50") + self.wide(b"\x53") + count
        if self.acknowledges:
            code += self.out(0xA0, 0x20) + self.out(0x20, 0x20) + self.write_device(LAPIC + 0xB0, 0)
        return code + self.wide(b"\x5b") + self.wide(b"\x58") + back

    def go_on(self) -> bytes:
        """The program goes on in the handler's ring, 0."""
        if self.real:  # add sp, 6; jmp [RESUME]
            return b"\x83\xc4\x06\x2e" + self.memory(b"\xff", 4, RESUME_AT)
        return self.memory(b"\xff", 4, RESUME_AT)

    # The program.

    def program(self) -> bytes:
        self.code, self.at = bytearray(), CODE_AT
        for operation in self.prologue():
            self.add(operation)
        first = self.at
        for _ in range(self.rng.randint(*OPERATIONS)):
            self.add(self.rng.choices(self.operations, self.weights)[0])
        self.add(lambda: self.spin((1000, 3000, 6000)))
        self.put(self.wide(self.memory(b"\xff", 0, ROUNDS)))  # inc dword [ROUNDS]
        jump = 3 if self.real else 5
        self.put(b"\xe9" + struct.pack("<h" if self.real else "<i", first - (self.at + jump)))
        return bytes(self.code)

    def put(self, code: bytes) -> None:
        self.code += code
        self.at += len(code)

    def add(self, operation: Callable[[], bytes]) -> None:
        """Note where the next operation is, set up the stack, and the operation itself."""
        start = self.at
        head = self.head(0)
        self.at += len(head)
        body = operation()
        self.at = start
        self.put(self.head(start + len(head) + len(body)))
        self.put(body)

    def head(self, resume: int) -> bytes:
        """MOV [RESUME], resume; MOV SP, STACK. `at` is right for what follows it."""
        if self.real:
            store = b"\x2e\xc7\x06" + struct.pack("<HH", RESUME_AT, resume)
            return store + b"\xbc" + struct.pack("<H", STACK_AT)
        prefix = b"\x48" if self.long else b""
        store = (
            prefix + self.memory(b"\xc7", 0, RESUME_AT) + struct.pack("<I", self.address(resume))
        )
        return store + self.load(4, self.address(STACK_AT))

    def next(self, code: bytes) -> int:
        """The address behind `code`, if that is where an operation begins."""
        return self.address(self.at + len(code))

    def prologue(self) -> list[Callable[[], bytes]]:
        """PICs, PIT, local APIC and IOAPIC, or some of them."""
        rng = self.rng
        masks = rng.choice((0x00, 0xFE, 0xFB, 0xFF))
        icws = [(0x20, 0x11), (0x21, PIC_BASE), (0x21, 4), (0x21, rng.choice((1, 3)))]
        icws += [(0xA0, 0x11), (0xA1, PIC_BASE + 8), (0xA1, 2), (0xA1, 1), (0x21, masks)]
        pics = b"".join(self.out(port, value) for port, value in icws)
        lvt0 = rng.choice((0x700, 0x1_0000, 0x400, 0x700))
        lapic = self.write_device(LAPIC + 0xF0, 0x1FF if rng.random() < 0.9 else 0xFF)
        lapic += self.write_device(LAPIC + 0x350, lvt0) + self.write_device(LAPIC + 0x3E0, 0xB)
        pin = rng.choice((0, 2, 2))
        ioapic = b"".join(
            self.write_device(IOAPIC, register) + self.write_device(IOAPIC + 0x10, value)
            for register, value in ((0x11 + 2 * pin, 0), (0x10 + 2 * pin, 0x40 | self.trigger()))
        )
        every = [lambda: pics, lambda: lapic, lambda: ioapic, self.pit, self.lapic_timer]
        return [each for each in every if rng.random() < 0.85]

    def trigger(self) -> int:
        """Delivery and trigger mode of an IOAPIC pin."""
        return self.rng.choice((0, 0, 0, 0x8000, 0x100, 0x400))

    # Operations.

    def sleep(self) -> bytes:
        """STI, HLT, mostly with a timer that ends it; now and then without STI."""
        wake = self.one_shot() if self.rng.random() < 0.95 else b""
        return wake + (b"\xfb\xf4" if self.rng.random() < 0.95 else b"\xf4")

    def interrupt(self) -> bytes:
        return b"\xcd" + bytes(
            (self.rng.choice((0, 3, 4, 13, 0x20, 0x30, 0x41, 0x80, 0x80, 0xFF)),)
        )

    def ring(self) -> bytes:
        """IRET to ring 3, or an interrupt back to ring 0."""
        if self.real or self.rng.random() < 0.5:
            return b"\xcd" + bytes((TO_RING_0,))
        flags = self.rng.choice((0x202, 0x202, 0x3202, 0x302))
        stack = self.address(STACK_AT)
        pushes = (DATA_3, stack, flags, CODE_3, 0)
        back = b"\x48\xcf" if self.long else b"\xcf"
        code = b"".join(map(self.push_value, pushes)) + back
        return b"".join(map(self.push_value, (*pushes[:4], self.next(code)))) + back

    def return_from_interrupt(self) -> bytes:
        """IRET to the next operation, in the same ring."""
        if self.real:
            code = b"\x68\0\0\xcf"
            start = b"\x9c\x0e"  # pushf; push cs
            return start + self.push_value(self.next(start + code)) + b"\xcf"
        if self.long:  # mov eax, ss; push rax; push rsp; pushf; mov eax, cs; push rax; push; iretq
            start = b"\x8c\xd0\x50\x54\x9c\x8c\xc8\x50"
            return start + self.push_value(self.next(start + bytes(7))) + b"\x48\xcf"
        start = b"\x9c\x0e"
        return start + self.push_value(self.next(start + bytes(6))) + b"\xcf"

    def flags(self) -> bytes:
        if self.rng.random() < 0.5:
            return (
                b"\x9c" + (b"\x58" if not self.real else b"\x66\x58") + self.store()
            )  # pushf; pop
        return self.push_value(self.rng.choice(FLAGS)) + b"\x9d"  # popf

    def shadow(self) -> bytes:
        """MOV SS or POP SS, and what comes in its shadow."""
        load = b"\x8c\xd0\x8e\xd0" if self.long or self.rng.random() < 0.7 else b"\x16\x17"
        if self.rng.random() < 0.3:
            return self.one_shot() + b"\xfb" + load + b"\xf4"
        return load + self.rng.choice(
            (b"\xfb\x90", b"\xcc", b"\xfa", b"\x90", b"\x9c", b"\xcd\x30")
        )

    def descriptor_tables(self) -> bytes:
        """LGDT or LIDT of what is there, SGDT or SIDT, LTR."""
        which = self.rng.randrange(2)
        if self.rng.random() < 0.3:
            return self.memory(b"\x0f\x01", which, DATA_AT + self.offset(10))  # sgdt, sidt
        if self.rng.random() < 0.1:
            return self.memory(b"\x0f\x01", 2 + which, DATA_AT + self.offset(10))
        return self.wide(self.memory(b"\x0f\x01", 2 + which, POINTERS_AT + 16 * which))

    def control_register(self) -> bytes:
        rng = self.rng
        number = (
            rng.choice((0, 0, 0, 2, 3, 4, 4, 8)) if self.long else rng.choice((0, 0, 2, 3, 4, 4))
        )
        read = b"\x44\x0f\x20\xc0" if number == 8 else bytes((0x0F, 0x20, 0xC0 | number << 3))
        write = read.replace(b"\x0f\x20", b"\x0f\x22")
        kind = rng.randrange(6)
        if kind == 0:
            return read + self.store()
        if kind == 1 and number == 0:
            return b"\x0f\x06"  # clts
        if number == 0:
            bits = rng.choice((CR0_TS, CR0_EM, CR0_MP, CR0_WP, CR0_AM, CR0_TS, 1 << 30, CR0_NE))
            if rng.random() < 0.03:
                bits = rng.choice((CR0_PG, CR0_PE))
        elif number == 4:
            bits = rng.choice((1 << 2, 1 << 3, 1 << 7, 1 << 9, 1 << 8, 1 << 31, 1 << 6))
        elif number == 3:
            return read + write
        else:
            return self.load(0, rng.choice((0, 3, 4, 8, 15, 16, 0x1234_5678))) + write
        return read + self.wide(b"\x35" + struct.pack("<I", bits)) + write  # xor eax, bits

    def read_msr(self) -> bytes:
        return self.load(1, self.rng.choice(MSRS)) + b"\x0f\x32" + self.store() + self.store(2)

    def write_msr(self) -> bytes:
        rng = self.rng
        msr = rng.choice(HARMLESS_MSRS if rng.random() < 0.7 else MSRS)
        value = rng.choice((0, 1, 0x10, 0x40, 0x100, 0xFEE0_0900, rng.getrandbits(16)))
        return self.load(1, msr) + self.load(0, value) + self.load(2, 0) + b"\x0f\x30"

    def tsc_deadline(self) -> bytes:
        """LVTT in TSC-deadline mode, the deadline some microseconds ahead."""
        ahead = self.rng.choice((1, 500, 5_000, 60_000))
        add = self.wide(b"\x05" + struct.pack("<I", ahead))  # add eax, ahead
        mode = self.write_device(LAPIC + 0x320, 0x4_0044)
        return (
            mode + b"\x0f\x31" + add + self.wide(b"\x83\xd2\0") + self.load(1, 0x6E0) + b"\x0f\x30"
        )

    def random_number(self) -> bytes:
        """RDRAND or RDSEED."""
        return self.wide(b"\x0f\xc7" + self.rng.choice((b"\xf0", b"\xf8"))) + self.store() + b"\x9c"

    def cpuid(self) -> bytes:
        leaf = self.rng.choice((0, 1, 7, 0xB, 0x4000_0000, 0x4000_0001, 0x8000_0001, 0x8000_0008))
        stores = self.store() + self.store(1) + self.store(2) + self.store(3)
        return self.load(0, leaf) + self.load(1, 0) + b"\x0f\xa2" + stores

    def port_in(self) -> bytes:
        port = self.rng.choice(PORTS)
        opcode = self.rng.choice((b"\xec", b"\xec", b"\xed"))
        return self.load(2, port) + opcode + self.store()

    def port_out(self) -> bytes:
        rng = self.rng
        port, value = rng.choice(WRITES)
        return self.load(2, port) + self.load(0, value) + rng.choice((b"\xee", b"\xee", b"\xef"))

    def pit(self) -> bytes:
        """Channel 0 periodic or one-shot, from microseconds to half a millisecond."""
        mode = self.rng.choice((0x34, 0x34, 0x36, 0x30))
        count = self.rng.choice((1, 12, 60, 239, 600))
        return self.out(0x43, mode) + self.out(0x40, count) + self.out(0x40, count >> 8)

    def lapic_read(self) -> bytes:
        return self.device(0x8B, LAPIC + self.rng.choice(LAPIC_READ)) + self.store()

    def lapic_write(self) -> bytes:
        register, value = self.rng.choice(LAPIC_WRITES)
        return self.write_device(LAPIC + register, value)

    def one_shot(self) -> bytes:
        """An interrupt of the local APIC's timer in a while."""
        count = self.rng.choice((1, 20, 300, 4_000, 20_000))
        return self.write_device(LAPIC + 0x320, 0x44) + self.write_device(LAPIC + 0x380, count)

    def lapic_timer(self) -> bytes:
        mode = self.rng.choice((0x44, 0x44, 0x2_0045, 0x1_0044))
        count = self.rng.choice((1, 20, 300, 4_000, 20_000, 100_000))
        divide = self.write_device(LAPIC + 0x3E0, self.rng.choice((0xB, 0xB, 0)))
        start = self.write_device(LAPIC + 0x320, mode) + self.write_device(LAPIC + 0x380, count)
        return divide + start

    def ipi(self) -> bytes:
        """To itself, the other one, all: fixed, NMI, and now and then INIT and SIPI."""
        rng = self.rng
        shorthand = rng.choice((0, 0x4_0000, 0x8_0000, 0xC_0000))
        command = rng.choice((0x4042, 0x4043, 0x4046, 0x4400))
        if rng.random() < 0.03:
            command = rng.choice((0x4500, 0x4614))
        where = self.write_device(LAPIC + 0x310, rng.randrange(2) << 24)
        return where + self.write_device(LAPIC + 0x300, shorthand | command)

    def ioapic(self) -> bytes:
        rng = self.rng
        register = rng.choice((0, 1, 0x10, 0x14, 0x15, 0x16, 0x26))
        select = self.write_device(IOAPIC, register)
        if rng.random() < 0.5:
            return select + self.device(0x8B, IOAPIC + 0x10) + self.store()
        value = rng.choice((0x40, 0x40, 0x41, 0x1_0040)) | self.trigger()
        return select + self.write_device(IOAPIC + 0x10, value if register < 0x15 else 0)

    def invalidate(self) -> bytes:
        """INVLPG of the data, or WBINVD."""
        if self.rng.random() < 0.3:
            return b"\x0f\x09"
        return self.memory(b"\x0f\x01", 7, DATA_AT + self.offset(4))

    def fault(self) -> bytes:
        kind = self.rng.randrange(6)
        if kind == 0:
            return b"\x0f\x0b"  # ud2
        if kind == 1:
            return self.load(1, 0) + self.wide(b"\xf7\xf1")  # xor ecx; div ecx
        if kind == 2:
            load = self.load(0, self.rng.choice((ABSENT, 0x78, 0xFFF8))) + b"\x8e\xc0"  # mov es, ax
            return load + b"\x0e\x07" if self.real else load  # push cs; pop es
        if self.real:  # a word, or two, around the segment's end
            return b"\xbb\xff\xff" + self.rng.choice((b"\x8b\x07", b"\x66\x8b\x07", b"\x89\x07"))
        page = self.rng.choice(FAULTING_PAGES)
        if kind == 3:
            return self.load(0, page) + b"\xff\xe0"  # jmp eax
        opcode = self.rng.choice((b"\x8b", b"\x89", b"\xff"))
        return self.load(3, page + self.rng.randrange(8, 0x1000)) + opcode + b"\x03"

    def string(self) -> bytes:
        """REP STOS, MOVS, SCAS, INS, OUTS, some rounds of it, within the data."""
        rng = self.rng
        prefix = rng.choice((b"\xf3", b"\xf3", b"\xf2", b""))
        opcode = rng.choice(
            (b"\xaa", b"\xab", b"\xa4", b"\xa5", b"\xae", b"\xac", b"\x6c", b"\x6e")
        )
        count = (
            rng.choice((0, 1, 7, 300))
            if opcode not in (b"\x6c", b"\x6e")
            else rng.choice((0, 1, 3))
        )
        code = self.load(1, count) + self.load(2, rng.choice((0x21, 0x80, 0x40)))
        code += self.load(6, self.address(DATA_AT + rng.randrange(0x1000)))
        code += self.load(7, self.address(DATA_AT + 0x1000 + rng.randrange(0x1000)))
        return code + b"\xfc" + prefix + opcode

    def rewrite(self) -> bytes:
        """A store into code: of the value an instruction behind it loads, in the same block."""
        between = b"\x90" * self.rng.choice((0, 1, 9))
        override = b"\x2e" if self.real else b""
        length = len(override + self.memory(b"\xfe", 0, 0) + between)
        increment = override + self.memory(b"\xfe", 0, self.at + length + 1)
        return increment + between + b"\xb0\0" + self.store()  # inc byte [...]; mov al, 0

    def spin(self, counts: Sequence[int] = (5, 100, 2000)) -> bytes:
        """Some time passes."""
        body = self.rng.choice((b"", b"\x90", b"\x43\xfe\xc8"))  # nop; in 32 bits inc ebx; dec al
        return (
            self.load(1, self.rng.choice(counts)) + body + b"\xe2" + bytes((-2 - len(body) & 0xFF,))
        )

    def debug_register(self) -> bytes:
        number = self.rng.choice((0, 6, 7))
        if self.rng.random() < 0.5:
            return bytes((0x0F, 0x21, 0xC0 | number << 3)) + self.store()
        return self.load(0, 0) + bytes((0x0F, 0x23, 0xC0 | number << 3))

    def floating_point(self) -> bytes:
        return self.rng.choice(
            (b"\xdb\xe3", b"\xd9\xe8\xdd\xd8", b"\x9b", b"\x0f\x57\xc0", b"\x0f\x77")
        )

    def locked(self) -> bytes:
        """LOCK INC or XCHG of what both vCPUs see: the first word of the first region's data."""
        shared = FIRST_REGION + DATA_AT
        inc = self.rng.random() < 0.5
        prefixes = b"\x64\x66\x67" if self.real else b"\x64"
        code = b"\xf0" + prefixes + b"\xff\x03" if inc else prefixes + b"\x87\x03"
        return self.load(3, shared) + code

    # How the vCPU starts.

    def registers(self) -> dict[str, int]:
        region = self.region
        registers = {
            "rip": self.address(CODE_AT),
            "rsp": self.address(STACK_AT),
            "rflags": 2,
            "idtr_base": region,
            "idtr_limit": self.idt_limit,
            "gdtr_base": region + GDT_AT,
            "gdtr_limit": GDT_LIMIT,
        }
        if self.real:
            for name in ("cs", "ss", "ds", "es"):
                registers |= {name: region >> 4, f"{name}_base": region, f"{name}_limit": 0xFFFF}
            return registers | {"fs": 0, "fs_base": 0, "fs_limit": 0xFFFF_FFFF}
        for name in ("cs", "ss", "ds", "es", "fs", "gs"):
            registers |= {f"{name}_base": 0, f"{name}_limit": 0xFFFF_FFFF}
            registers |= {name: DATA_3, f"{name}_access": 0xC0F3}
        registers |= {"ss": DATA_0, "ss_access": 0xC093}
        registers |= {"cs": CODE_0, "cs_access": 0xA09B if self.long else 0xC09B}
        registers |= {"tr": TASK, "tr_base": region + TSS_AT, "tr_limit": 0x67, "tr_access": 0x8B}
        if not self.long:
            return registers | {"cr0": CR0_PE | CR0_ET | CR0_NE, "cr3": PD_32, "cr4": 0x610}
        cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG
        efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
        return registers | {"cr0": cr0, "cr3": PML4, "cr4": 0x620, "efer": efer}
