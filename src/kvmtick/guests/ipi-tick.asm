; ipi-tick - two CPUs: the first takes the PIT's tick and forwards it to the second by an IPI.
;
; CPU 0 takes IRQ 0 through the PIC, counts it in snapshot[0], writes the PIC's EOI and sends vector
; 0x42 to CPU 1, which counts it in `counter` and ends the run after `count` of them (0: for ever)
; with code 0. IPIs that come while one is waiting merge with it: snapshot[0] may then be ahead.
;
; CPU 0 starts CPU 1 with INIT, SIPI, SIPI at this image's own start, and leaves with code 3 if it
; has not come after AP_WAIT_MS. `param_ms`: not used.

%include "common.inc"
%include "apic.inc"
%include "apic-ticks.inc"

VECTOR_FORWARD  equ 0x42
AP_STACK_TOP    equ STACK_TOP - 0x1000
AP_WAIT_MS      equ 200
ERROR_NO_CPU_1  equ 3

ICR_ASSERT      equ 0x4000
ICR_INIT        equ ICR_ASSERT | 0x500
ICR_SIPI        equ ICR_ASSERT | 0x608  ; vector 8: starts at 0800:0000, this image
TO_CPU_1        equ 1 << 24

ap_ready:       db 0

; Both CPUs start here. CPU 1 has CS = 0x0800, so the same bytes have other offsets there: the far
; jump makes both see them at segment 0.
start:  jmp     0:.flat
.flat:  mov     ecx, IA32_APIC_BASE
        rdmsr
        test    ah, 1                   ; bit 8: the first CPU
        jz      cpu_1

        SETUP
        SET_VECTOR VECTOR_IRQ0, tick
        SET_VECTOR VECTOR_FORWARD, apic_tick
        call    unreal
        call    pic_init
        call    lapic_enable
        LAPIC_WRITE LAPIC_LVT0, LVT_EXTINT      ; the PIC interrupts this CPU

; The pauses that the MP specification wants between these are for real processors.
        LAPIC_WRITE LAPIC_ICR_HIGH, TO_CPU_1
        LAPIC_WRITE LAPIC_ICR, ICR_INIT
        LAPIC_WRITE LAPIC_ICR, ICR_SIPI
        LAPIC_WRITE LAPIC_ICR, ICR_SIPI         ; ignored where the first one was heard

        mov     eax, AP_WAIT_MS
        call    set_deadline_ms
.wait:  mov     cx, 1000
.look:  cmp     byte [ap_ready], 0
        loope   .look
        jne     .there
        call    before_deadline
        jc      .wait
        FAIL    ERROR_NO_CPU_1, "ipi-tick: CPU 1 did not start"
.there: mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start
        jmp     take_ticks

tick:   inc     dword [snapshot]
        OUTB    PIC1_COMMAND, EOI
        LAPIC_WRITE LAPIC_ICR, ICR_ASSERT | VECTOR_FORWARD      ; the destination is still set
        iret

; CPU 1. INIT has left interrupts off and its LVT0 masked; the IVT is the one CPU 0 has made.
cpu_1:  cld
        xor     ax, ax
        mov     ds, ax
        mov     ss, ax
        mov     sp, AP_STACK_TOP
        call    unreal
        call    lapic_enable
        mov     byte [ap_ready], 1
        jmp     take_ticks
