"""A CPU in 64-bit mode: page tables, GDT, IDT and TSS, made by the host."""

from engine_machine import CODE, HANDLERS, Cpu, flat_segment, write_code

PML4, PDPT, PAGE_DIRECTORY, PAGE_TABLE = 0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000
PRESENT, WRITABLE, USER, LARGE = 1, 2, 4, 1 << 7
NO_EXECUTE = 1 << 63
SUPERVISOR_PAGE, ABSENT_PAGE, READ_ONLY_PAGE, DATA_PAGE = 0x4_0000, 0x4_1000, 0x4_2000, 0x4_3000

GDT, IDT, TSS = 0x3000, 0x5000, 0x6000
KERNEL_CODE, KERNEL_DATA, USER_CODE_32, USER_DATA, USER_CODE, TASK = 8, 0x10, 0x1B, 0x23, 0x2B, 0x38
ABSENT_SEGMENT = 0x48
KERNEL_CODE_32 = 0x50
DESCRIPTORS = {
    KERNEL_CODE: 0x00AF_9B00_0000_FFFF,
    KERNEL_DATA: 0x00CF_9300_0000_FFFF,
    USER_CODE_32 & ~3: 0x00CF_FB00_0000_FFFF,
    USER_DATA & ~3: 0x00CF_F300_0000_FFFF,
    USER_CODE & ~3: 0x00AF_FB00_0000_FFFF,
    0x30: 0x00CF_F300_0000_FFFF,  # the stack segment of SYSEXIT to 64 bits
    TASK: 0x0000_8B00_6000_0067,
    ABSENT_SEGMENT: 0x00CF_7300_0000_FFFF,  # for rings 0 and 3 as data, for ring 3 as a stack
    KERNEL_CODE_32: 0x00CF_9B00_0000_FFFF,
}

KERNEL_STACK, USER_STACK, RING_0_STACK, IST_1, IST_2 = 0x8000, 0x7000, 0x9000, 0xA000, 0xB000
CR0 = 0x8001_0033
"""PG, WP, NE, ET, MP, PE."""
CR4 = 0x0000_0620
"""OSXMMEXCPT, OSFXSR, PAE."""
EFER = 0x0D01
"""NXE, LMA, LME, SCE."""
FRAME = ("rip", "cs", "rflags", "rsp", "ss")


def long_mode(rip: int, ring: int) -> dict[str, int]:
    code, data = (USER_CODE, USER_DATA) if ring else (KERNEL_CODE, KERNEL_DATA)
    registers = {
        "rip": rip,
        "rsp": USER_STACK if ring else KERNEL_STACK,
        "rflags": 2,
        "cr0": CR0,
        "cr3": PML4,
        "cr4": CR4,
        "efer": EFER,
        "gdtr_base": GDT,
        "gdtr_limit": 0x57,
        "idtr_base": IDT,
        "idtr_limit": 0xFFF,
        "tr": TASK,
        "tr_base": TSS,
        "tr_limit": 0x67,
        "tr_access": 0x8B,
    }
    for name in ("es", "ss", "ds", "fs", "gs"):
        registers |= flat_segment(name, data, 0xC0F3 if ring else 0xC093)
    return registers | flat_segment("cs", code, 0xA0FB if ring else 0xA09B)


class LongCpu(Cpu):
    """64-bit mode in `ring` (0 or 3): the first 2 MiB in pages of 4 KiB, then 1 GiB in large ones.

    Each of `handlers` has a gate for all rings; `ist` says which of them use an interrupt stack.
    """

    def __init__(
        self,
        code: str,
        handlers: dict[int, str] | None = None,
        *,
        ring: int = 0,
        ist: dict[int, int] | None = None,
        exact: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(code, exact=exact, seed=seed)
        self._write_page_tables()
        for selector, descriptor in DESCRIPTORS.items():
            self.set_quad(GDT + selector, descriptor)
        self.set_quad(TSS + 4, RING_0_STACK)
        self.set_quad(TSS + 0x24, IST_1)
        self.set_quad(TSS + 0x2C, IST_2)
        self.ram[TSS + 0x66] = 0x68  # no I/O permission map
        for number, (vector, text) in enumerate((handlers or {}).items()):
            self.set_gate(vector, HANDLERS + 0x40 * number, (ist or {}).get(vector, 0))
            write_code(self.ram, HANDLERS + 0x40 * number, text)
        self.engine.set_registers(long_mode(CODE, ring))

    def _write_page_tables(self) -> None:
        flags = PRESENT | WRITABLE | USER
        self.set_quad(PML4, PDPT | flags)
        self.set_quad(PDPT, PAGE_DIRECTORY | flags)
        self.set_quad(PAGE_DIRECTORY, PAGE_TABLE | flags)
        for number in range(1, 512):
            self.set_quad(PAGE_DIRECTORY + 8 * number, number << 21 | flags | LARGE)
        for number in range(512):
            self.set_page(number << 12, number << 12 | flags)
        self.set_page(SUPERVISOR_PAGE, SUPERVISOR_PAGE | PRESENT | WRITABLE)
        self.set_page(ABSENT_PAGE, 0)
        self.set_page(READ_ONLY_PAGE, READ_ONLY_PAGE | PRESENT | USER)
        self.set_page(DATA_PAGE, DATA_PAGE | flags | NO_EXECUTE)

    def set_page(self, linear: int, entry: int) -> None:
        """The entry of one of the first 512 pages; the guest's TLB may not know."""
        self.set_quad(PAGE_TABLE + 8 * (linear >> 12), entry)

    def set_gate(self, vector: int, address: int, ist: int = 0, dpl: int = 3) -> None:
        low = address & 0xFFFF | KERNEL_CODE << 16 | ist << 32 | (0x8E | dpl << 5) << 40
        self.set_quad(IDT + 16 * vector, low | (address >> 16 & 0xFFFF) << 48)
        self.set_quad(IDT + 16 * vector + 8, address >> 32)

    def set_quad(self, address: int, value: int) -> None:
        self.ram[address : address + 8] = value.to_bytes(8, "little")

    def quad(self, address: int) -> int:
        return int.from_bytes(self.ram[address : address + 8], "little")

    def stack(self, count: int) -> list[int]:
        """The quadwords on top of the stack."""
        top = self.register("rsp")
        return [self.quad(top + 8 * i) for i in range(count)]

    def frame(self) -> dict[str, int]:
        """What an event without an error code has pushed."""
        return dict(zip(FRAME, self.stack(5), strict=True))

    def frame_with_code(self) -> tuple[int, dict[str, int]]:
        code, *rest = self.stack(6)
        return code, dict(zip(FRAME, rest, strict=True))

    @property
    def vector(self) -> int:
        """Of the handler, a HLT, that the guest has stopped in."""
        handler = self.register("rip") - 1
        return next(v for v in range(256) if self.quad(IDT + 16 * v) & 0xFFFF == handler & 0xFFFF)
