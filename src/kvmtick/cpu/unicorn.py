"""The `unicorn` engine: guest code on Unicorn 2.1.4 through a native shim.

Implements, in real mode (unreal mode included) and in 32-bit protected mode without paging:
delivery of external interrupts, NMIs and exceptions through the IVT (Intel SDM vol. 3A, 6.12;
vol. 3B, 21.1.4) or the IDT with error codes (vol. 3A, 6.10 to 6.13), the shadows of STI and MOV SS
(vol. 3A, 6.8.3), NMI blocking until IRET (6.7.1), double and triple faults (6.15, interrupt 8),
HLT, IN, OUT, INS and OUTS (vol. 1, chapter 19), RDTSC and RDTSCP (vol. 3B, 18.17), VM-entry event
injection, interrupt-window and NMI-window exiting (vol. 3C, 27.6 and 26.2). Accesses to memory that
is no RAM, CPUID (vol. 2A) and the MSRs in `engine.MSRS` (RDMSR and WRMSR, vol. 2B and 2C) are
answered by the handlers; a refused MSR access is #GP(0). The CPU calls itself a Sandy Bridge in EDX
after a reset.

The shim puts itself in front of ten of the library's functions: those for RDMSR, WRMSR and the
loads and stores that translated code cannot do by itself. That works only in a process where
nothing has loaded the library before the first engine is opened; importing the `unicorn` package of
the same version later does no harm. Another build of the library that is loaded later would call
the functions of this one: do not.

Accesses to memory that is no RAM reach the handlers whole, as KVM's emulator has them
(`emulator_read_write`): 1, 2, 4 or 8 bytes at any address, split only where a page of 4096 bytes
ends, into two parts of any length. 16 bytes are two accesses of 8, a locked access is a read and a
write.

An instruction that faults counts in `retired` like one that completed: the time goes into the
delivery, and a guest that does nothing but fault still uses up its budget. REP string instructions
count their rounds, and one when there is none.

Not modelled:

* paging, virtual-8086 mode and long mode: code there runs, but shadows and REP rounds may be told
  wrong, and faults on instruction fetch, CR8 and SYSCALL are not looked after;
* accesses that the library splits where no RAM is, 8 bytes into dwords, unaligned ones into bytes
  or the two aligned reads around them: all with paging, else those of CMPXCHG8B, BOUND, FXSAVE,
  floats of 80 bits, descriptors, far transfers and the delivery of events;
* 16 bytes over the end of a page: KVM counts the 8 bytes of the next access from there on;
* task gates and other privilege levels than 0 are left to Unicorn, untested;
* STI with IF already set casts a shadow here and none on the processor;
* an injected software interrupt or exception pushes RIP as it stands (the contract has no
  instruction length); an injected exception that has an error code pushes 0;
* segment limits in real mode: accesses beyond 0xFFFF of a segment do not fault;
* code fetched where no RAM is ends with INTERNAL_ERROR, as KVM does, instead of an exception;
* RF is not pushed on faults;
* the FPU, SSE, debug and the CPU's own model-specific registers keep their values over `reset`;
* RDRAND and RDSEED are absent (#UD, whatever the CPUID handler says): runs repeat;
* MSRs outside `engine.MSRS` are Unicorn's: unknown ones read 0 and swallow writes, without #GP;
  IA32_TSC_AUX reads 0 in RDTSCP;
* a store that rewrites the translated block it is in begins anew: what it read or wrote where no
  RAM is happens again, and it counts twice;
* the shadow of MOV SS from memory that is no RAM, in that access's own handler;
* a handler that rewrites the code right behind the access it answers: the translated block still
  runs on;
* two engines over the same RAM do not see each other's modified code (`ram_written` mends it);
* physical addresses from 4 GiB on that nobody mapped: INTERNAL_ERROR.
"""

import importlib.util
from pathlib import Path

from kvmtick.cpu import _shim

__all__ = ["UnicornEngine", "find_library"]

_LIBRARY = "libunicorn.so.2"
_REMEDY = "pip install unicorn==2.1.4"


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

    Opening takes some 10 ms. Raises ImportError when Unicorn 2.1.4 is missing or was loaded by
    something else first.
    """

    name = "unicorn"

    def __init__(self, *, seed: int = 0) -> None:
        """`seed` is that of RDRAND and RDSEED."""
        _shim.load(find_library())
        super().__init__(seed=seed)

    def exit_on_pause(self, enabled: bool) -> None:
        """Nothing so far, PAUSE ends no entry: the shim's own method will take this one's place."""
