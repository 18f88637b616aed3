"""The `unicorn` engine: guest code on Unicorn 2.1.4 through a native shim.

Implements, in every CPU mode (real and unreal, protected with 16 and 32 bits, virtual-8086, long):
delivery of external interrupts, NMIs, exceptions and software interrupts through the IVT (Intel SDM
vol. 3A, 7.12; vol. 3B, 22.1.4) or the IDT with error codes, stack switches by TSS and IST, RF and
EXT (vol. 3A, 7.10 to 7.14), the shadows of STI and MOV SS (7.8.3), NMI blocking until IRET (7.7.1),
double and triple faults (7.15, interrupt 8), paging and protection (chapters 5 and 6), HLT, IN,
OUT, INS and OUTS (vol. 1, chapter 19), RDTSC and RDTSCP (vol. 3B, 18.17), SYSCALL, SYSRET,
SYSENTER, SYSEXIT and the checks of control registers and of the MSRs in `engine.CPU_MSRS` (vol. 2B
and 4; vol. 3A, 2.5), VM-entry event injection, interrupt-window and NMI-window exiting (vol. 3C,
27.6 and 26.2). Accesses to memory that is no RAM, CPUID (vol. 2A), CR8 and all other MSRs are
answered by the handlers; a refused access is #GP(0). RDRAND and RDSEED give splitmix64 of the
machine's seed.

The shim puts itself in front of some of the library's functions: helpers of such instructions, and
the loads and stores that translated code cannot do by itself. That works only in a process where
nothing has loaded the library before the first engine is opened; importing the `unicorn` package of
the same version later does no harm. Another build of the library that is loaded later would call
the functions of this one: do not.

Translated code stores to RAM by itself, except on pages that hold translated code. Engines may map
the same memory, each at addresses of its own and one entered at a time: code that one of them
rewrites, through any linear address, the others translate anew.

An engine that is not `exact` looks at boundaries where translated blocks begin. A block is up to
512 instructions; it ends at a jump, behind what may open a window, and before the end of a page, in
whose last 15 bytes each instruction is one. One that an exception leaves in the middle has counted
whole, and so has one that rewrites itself, before its rest counts once more.

Accesses to memory that is no RAM reach the handlers whole, as KVM's emulator has them
(`emulator_read_write`): 1, 2, 4 or 8 bytes at any address, split only where a page of 4096 bytes
ends, into two parts of any length. 16 bytes are two accesses of 8, a locked access is a read and a
write.

An instruction that faults counts in `retired` like one that completed: the time goes into the
delivery, and a guest that does nothing but fault still uses up its budget. REP string instructions
count their rounds, and one when there is none.

Not modelled:

* accesses that the library splits where no RAM is, 8 bytes into dwords, unaligned ones into bytes
  or the two aligned reads around them: those of CMPXCHG8B, BOUND, FXSAVE, floats of 80 bits,
  descriptors, far transfers and the delivery of events;
* 16 bytes over the end of a page: KVM counts the 8 bytes of the next access from there on;
* an entry without a TSS in TR is INTERNAL_ERROR, whether one would be needed or not;
* task gates are left to Unicorn, untested;
* #AC, #XM and machine checks never happen; a stack address that is not canonical is #GP, not #SS;
  PDPTEs are not checked when CR3 is loaded; segment limits beyond what QEMU looks at;
* IRET in virtual-8086 mode that faults for IOPL leaves NMIs blocked;
* an instruction breakpoint (DR0 to DR3) behind the instruction that IRET set RF for, when both are
  in one block; RF in the flags that an interrupt between the rounds of a REP pushes;
* breakpoints on data (DR0 to DR3) never match;
* INS in ring 3 to a port that it may not use has already written zeros when it gets #GP;
* AVX code does not get #UD, though there is no AVX; UMIP, PCID, VME, MPX and CET are absent;
* STI with IF already set casts a shadow here and none on the processor;
* an injected software interrupt or exception pushes RIP as it stands (the contract has no
  instruction length); an injected exception that has an error code pushes 0 without bit 11;
* segment limits in real mode: accesses beyond 0xFFFF of a segment do not fault;
* code fetched where no RAM is ends with INTERNAL_ERROR, as KVM does, instead of an exception;
* what CPUID tells decides only which bits of CR4 can be set, and who has SYSCALL in compatibility
  mode: instructions of `FEATURES` run whatever the handler answers;
* an instruction that rewrites the translated block it is in begins anew: what it read or wrote
  where no RAM is happens again, and so does what an unaligned store has put before the block's
  first byte, so that a read-modify-write happens to it twice;
* MOVBE where no RAM is, which is split like those above; that of 16 bits is #UD without OSFXSR;
* #DB for TF behind PAUSE, HLT and VMCALL comes an instruction late or, behind HLT, not at all;
* the shadow of MOV SS from memory that is no RAM, in that access's own handler;
* a handler that rewrites the code right behind the access it answers: the translated block still
  runs on;
* accessed and dirty bits that the page walk sets in a page table which is code as well;
* RAM from 4 GiB on that is mapped after the first entry, and the same memory twice in one engine:
  refused.
"""

import importlib.util
from pathlib import Path

from kvmtick.cpu import _shim
from kvmtick.irqchip.lapic_timer import GUEST_TSC_KHZ

__all__ = ["FEATURES", "UnicornEngine", "find_library"]

_LIBRARY = "libunicorn.so.2"
_REMEDY = "pip install unicorn==2.1.4"

FEATURES = {
    # FPU DE PSE TSC MSR PAE MCE CX8 SEP PGE CMOV PSE-36 CLFSH MMX FXSR SSE SSE2
    (0x1, 0, "edx"): 0x078A_A9FD,
    # SSE3 PCLMULQDQ SSSE3 CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE RDRAND
    (0x1, 0, "ecx"): 0x46D8_2203,
    # FSGSBASE BMI1 SMEP BMI2 ERMS RDSEED ADX SMAP CLFLUSHOPT CLWB
    (0x7, 0, "ebx"): 0x019C_0389,
    # PKU LA57
    (0x7, 0, "ecx"): 0x0001_0008,
    # XSAVEOPT, XGETBV with ECX = 1
    (0xD, 1, "eax"): 0x0000_0005,
    # LAHF in 64-bit mode, LZCNT, PREFETCHW
    (0x8000_0001, 0, "ecx"): 0x0000_0121,
    # SYSCALL NX 1-GiB-pages RDTSCP long-mode
    (0x8000_0001, 0, "edx"): 0x2C10_0800,
}
"""The CPUID bits (leaf, subleaf, register) of what the engine executes; physical addresses have 40
bits, XCR0 has x87, SSE and PKRU. The bits of APICs, MTRRs, machine checks and the like are the
machine's; OSXSAVE and OSPKE follow CR4."""


def find_library() -> str:
    """Path of the library in the installed `unicorn` package, which is not imported (it is slow).

    Raises ImportError when the package or its library is missing.
    """
    spec = importlib.util.find_spec("unicorn")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ImportError(f"the unicorn engine needs Unicorn 2.1.4: {_REMEDY}")
    for folder in folders:
        library = Path(folder) / "lib" / _LIBRARY
        if library.exists():
            return str(library)
    raise ImportError(f"{folders[0]} holds no lib/{_LIBRARY}: {_REMEDY} (x86-64 Linux)")


class UnicornEngine(_shim.Engine):
    """One x86 CPU that executes machine code; see `kvmtick.cpu.engine.Engine`.

    The first one takes some 10 ms to open, each further one less than 1 ms. Raises ImportError when
    Unicorn 2.1.4 is missing or was loaded by something else first.
    """

    name = "unicorn"
    real_time = False
    has_deadline = True
    tsc_khz = GUEST_TSC_KHZ
    read_tsc = None
    # VME to OSXMMEXCPT (VME and PVI do nothing), LA57, FSGSBASE, OSXSAVE, SMEP, SMAP, PKE
    cr4_bits = 0x75_17FF

    def __init__(self, *, seed: int = 0, exact: bool = True) -> None:
        """`seed` is that of RDRAND and RDSEED; not `exact`: boundaries are those of blocks."""
        _shim.load(find_library())
        super().__init__(seed=seed, exact=exact)
