; tick-x2apic - as tick-lapic with a periodic timer, but in x2APIC mode: every register is an MSR.
;
; Takes `count` ticks of `period_ns` ns at vector 0x41 (0: for ever), then leaves with code 0. Leaves
; with code 1 where CPUID has no x2APIC. `divisor`, `param_ms`: not used.

%define PERIOD_NS 1000000
%include "common.inc"
%include "apic.inc"
%include "apic-ticks.inc"

VECTOR_TICK     equ 0x41
ERROR_NO_X2APIC equ 1
X2APIC_ENABLE   equ 0x400               ; IA32_APIC_BASE, bit 10

; Write %2 to the local APIC's register %1. Clobbers EAX, ECX; EDX must be 0.
%macro X2APIC_WRITE 2
        mov     eax, %2
        mov     ecx, X2APIC_MSR + (%1) / 16
        wrmsr
%endmacro

start:  SETUP
        SET_VECTOR VECTOR_TICK, x2apic_tick
        SET_VECTOR VECTOR_SPURIOUS, spurious
        call    pic_close
        mov     eax, 1
        cpuid
        test    ecx, CPUID_1_ECX_X2APIC
        jnz     .there
        FAIL    ERROR_NO_X2APIC, "tick-x2apic: CPUID has no x2APIC"
.there: mov     ecx, IA32_APIC_BASE
        rdmsr
        or      eax, X2APIC_ENABLE
        wrmsr

        xor     edx, edx
        X2APIC_WRITE LAPIC_SVR, SVR_ENABLED
        X2APIC_WRITE LAPIC_LVT0, LVT_MASKED
        X2APIC_WRITE LAPIC_TDCR, DIVIDE_BY_1
        X2APIC_WRITE LAPIC_LVTT, LVT_PERIODIC | VECTOR_TICK
        X2APIC_WRITE LAPIC_TMICT, [period_ns]   ; the timer starts
        jmp     take_ticks

x2apic_tick:
        inc     dword [counter]
        X2APIC_WRITE LAPIC_EOI, 0       ; anything but 0 is #GP
        dec     ebx
        jz      last
        iret
