; tick-lapic - ticks of the local APIC's timer, vector 0x41, every `period_ns` ns.
;
; flags 0  periodic: the timer loads itself again
;       1  one-shot: the handler loads the next count, so its own delay adds to every period
;       2  TSC deadline: the handler sets the last deadline + one period, so nothing adds up
; Takes `count` ticks (0: for ever), then leaves with code 0. Leaves with code 2 where TSC deadlines
; are asked for and CPUID has none, with code 4 where the timer's LVT entry does not keep its mode:
; KVM lets a guest have modes other than one-shot only if its CPUID was set and has leaf 1.
; `divisor`, `param_ms`: not used.

%define PERIOD_NS 1000000
%include "common.inc"
%include "apic.inc"
%include "apic-ticks.inc"

VECTOR_TICK     equ 0x41
FLAG_ONE_SHOT   equ 1
FLAG_DEADLINE   equ 2
ERROR_NO_DEADLINE equ 2
ERROR_NO_MODE   equ 4

step:           dq 0                    ; the period in TSC ticks

start:  SETUP
        SET_VECTOR VECTOR_TICK, apic_tick
        call    apic_init
        test    byte [flags], FLAG_DEADLINE
        jnz     deadlines
        LAPIC_WRITE LAPIC_TDCR, DIVIDE_BY_1
        mov     eax, LVT_PERIODIC | VECTOR_TICK
        test    byte [flags], FLAG_ONE_SHOT
        jz      .mode
        SET_VECTOR VECTOR_TICK, one_shot_tick
        mov     eax, VECTOR_TICK
.mode:  call    set_mode
        mov     ecx, [period_ns]
        LAPIC_WRITE LAPIC_TMICT, ecx    ; the timer starts
        jmp     take_ticks

; LVTT = EAX. Reading it back also makes sure that it is there before an MSR starts the timer.
set_mode:
        LAPIC_WRITE LAPIC_LVTT, eax
        cmp     [dword LAPIC + LAPIC_LVTT], eax
        je      .kept
        FAIL    ERROR_NO_MODE, "tick-lapic: LVTT does not keep its timer mode; set CPUID leaf 1"
.kept:  ret

one_shot_tick:                          ; ECX = the count
        inc     dword [counter]
        LAPIC_WRITE LAPIC_TMICT, ecx
        jmp     apic_eoi

deadlines:
        mov     eax, 1
        cpuid
        test    ecx, CPUID_1_ECX_TSC_DEADLINE
        jnz     .there
        FAIL    ERROR_NO_DEADLINE, "tick-lapic: CPUID has no TSC deadline"
.there: SET_VECTOR VECTOR_TICK, deadline_tick
        mov     eax, LVT_TSC_DEADLINE | VECTOR_TICK
        call    set_mode

        mov     eax, [period_ns]        ; step = period_ns * tsc_khz / 1000000, 64 bits
        mul     dword [tsc_khz]
        mov     ecx, 1000000
        mov     ebx, eax
        mov     eax, edx
        xor     edx, edx
        div     ecx
        mov     [step + 4], eax
        mov     eax, ebx
        div     ecx
        mov     [step], eax

        rdtsc
        add     eax, [step]
        adc     edx, [step + 4]
        mov     ecx, IA32_TSC_DEADLINE
        wrmsr                           ; the timer starts
        jmp     take_ticks

deadline_tick:                          ; EDX:EAX = the deadline that is over, ECX = the MSR
        inc     dword [counter]
        add     eax, [step]
        adc     edx, [step + 4]
        wrmsr
        jmp     apic_eoi
