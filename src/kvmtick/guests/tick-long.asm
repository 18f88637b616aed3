; tick-long - 64-bit mode: the PIT's tick through the IOAPIC and the local APIC's own, side by side.
;
; The PIT's tick comes as vector 0x40 from IOAPIC pin 2 (the VMM routes GSI 0 there) and is counted in
; `counter`; the local APIC's timer ticks every `period_ns` ns at vector 0x50, counted in snapshot[0].
; The PICs are closed, each handler runs on an interrupt stack of its own (IST1, IST2), and the main
; program sleeps. Takes `count` ticks of the PIT (0: for ever), then leaves with code 0.
;
; Every handler checks where it runs and what was pushed: stack pointer, RIP, CS, RFLAGS, RSP, SS; the
; main program checks that it finds its stack and registers again. Leaves with code 6 and a line that
; says what is wrong, with code 5 where CPUID has no long mode, with code 4 where the timer's LVT
; entry does not keep its mode (see tick-lapic). `param_ms`: not used.

%define PERIOD_NS 700000
%define GUEST_NAME "tick-long"
%include "common.inc"
%include "long.inc"

VECTOR_PIT      equ 0x40
VECTOR_TIMER    equ 0x50
PIN             equ 2                   ; where a PC has its timer
ERROR_NO_MODE   equ 4
SLEEPER         equ 0x0123456789abcdef  ; what the main program has in RBX

        bits 16
start:  SETUP
        call    pic_init
        OUTB    PIC1_DATA, 0xff         ; closed
        jmp     enter_long

        bits 64
long_start:
        SET_GATE VECTOR_PIT, pit_tick, INTERRUPT_GATE, 1
        SET_GATE VECTOR_TIMER, timer_tick, INTERRUPT_GATE, 2
        SET_GATE VECTOR_SPURIOUS, spurious_64, INTERRUPT_GATE, 0

        LAPIC_WRITE_64 LAPIC_SVR, SVR_ENABLED
        LAPIC_WRITE_64 LAPIC_LVT0, LVT_MASKED
        LAPIC_READ_64 eax, LAPIC_ID
        and     eax, 0xff000000         ; destination, physical: bits 63:56 of the entry
        IOAPIC_WRITE_64 IOAPIC_PIN + 2 * PIN + 1, eax
        IOAPIC_WRITE_64 IOAPIC_PIN + 2 * PIN, VECTOR_PIT        ; fixed, edge; unmasks it

        LAPIC_WRITE_64 LAPIC_TDCR, DIVIDE_BY_1
        LAPIC_WRITE_64 LAPIC_LVTT, LVT_PERIODIC | VECTOR_TIMER
        LAPIC_READ_64 eax, LAPIC_LVTT
        cmp     eax, LVT_PERIODIC | VECTOR_TIMER
        jne     no_mode
        mov     eax, [period_ns]
        LAPIC_WRITE_64 LAPIC_TMICT, eax ; the timer starts

        OUTB    PIT_CONTROL, 0x34       ; channel 0, low then high byte, mode 2, binary
        OUTB    PIT_CH0, [divisor]
        OUTB    PIT_CH0, [divisor + 1]  ; the counter starts

        mov     rbx, SLEEPER
        sti
idle:   hlt                             ; the handlers decide when to end
        cmp     rsp, MAIN_STACK
        jne     wrong_sleeper
        mov     rax, SLEEPER
        cmp     rax, rbx
        je      idle
wrong_sleeper:
        cli
        MUST_BE rsp, MAIN_STACK, "the sleeper's RSP"
        MUST_BE rbx, SLEEPER, "the sleeper's RBX"
sleeper_end:

no_mode:
        lea     rsi, [.text]
        call    print
        mov     al, ERROR_NO_MODE
        jmp     exit_64
.text:  db      GUEST_NAME, ": LVTT does not keep its timer mode; set CPUID leaf 1", 10, 0

spurious_64:                            ; no bit is in service, so there is no EOI
        iretq

; A handler on the interrupt stack %1. At entry RSP points to RIP, CS, RFLAGS, RSP, SS.
%macro TICK_HANDLER 2
        push    rax
        push    rdx
        push    rsi
        lea     rax, [rsp + 3 * 8]
        MUST_BE rax, %1 - FRAME_BYTES, %2
        call    check_frame
%endmacro

pit_tick:
        TICK_HANDLER IST1_STACK, "RSP in the PIT's handler"
        inc     dword [counter]
        mov     eax, [count]
        test    eax, eax
        jz      tick_over               ; 0: for ever
        cmp     [counter], eax
        jne     tick_over
        mov     al, 0
        jmp     exit_64

timer_tick:
        TICK_HANDLER IST2_STACK, "RSP in the timer's handler"
        inc     dword [snapshot]
tick_over:
        LAPIC_WRITE_64 LAPIC_EOI, 0
        pop     rsi
        pop     rdx
        pop     rax
        iretq

; What the interrupt pushed, and the state it made. Clobbers RAX, RDX, RSI.
check_frame:
.frame  equ     4 * 8                   ; behind our return address and three registers
        mov     rax, [rsp + .frame]
        lea     rdx, [idle]
        sub     rax, rdx
        lea     rdx, [sleeper_end]
        sub     rdx, idle
        cmp     rax, rdx
        jb      .asleep
        MUST_BE [rsp + .frame], idle, "the saved RIP"
.asleep:
        MUST_BE [rsp + .frame + 8], CODE_64, "the saved CS"
        mov     rax, [rsp + .frame + 16]
        and     eax, FLAGS_IF
        MUST_BE rax, FLAGS_IF, "IF in the saved RFLAGS"
        MUST_BE [rsp + .frame + 24], MAIN_STACK, "the saved RSP"
        MUST_BE [rsp + .frame + 32], DATA, "the saved SS"
        pushfq
        pop     rax
        and     eax, FLAGS_IF
        MUST_BE rax, 0, "IF in a handler"
        ret
