; nmi-watchdog - the PIT as an NMI watchdog: ticks that nothing but an NMI handler can hold up.
;
; LVT0 in NMI mode makes the PIC's output an NMI. Interrupts stay off (IF=0); each NMI wakes HLT,
; is counted, and the handler polls the PIC, which acknowledges IRQ 0 without an interrupt. Takes
; `count` ticks (0: for ever), then leaves with code 0.
;
; flags bit 4 (0x10): do not poll. With reinjection on the PIT then waits for ever for the
; acknowledgement of its first tick, so exactly one NMI comes. `param_ms`: not used.

%include "common.inc"
%include "apic.inc"
%include "apic-ticks.inc"

VECTOR_NMI      equ 2
FLAG_NO_ACK     equ 0x10
POLL            equ 0x0c                ; OCW3: the next read is an acknowledgement

start:  SETUP
        SET_VECTOR VECTOR_NMI, nmi
        call    unreal
        call    pic_init                ; IRQ 0 is open
        call    lapic_enable
        LAPIC_WRITE LAPIC_LVT0, LVT_NMI
        mov     ebx, [count]
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start
        jmp     idle                    ; take_ticks, but with IF=0

nmi:    inc     dword [counter]
        test    byte [flags], FLAG_NO_ACK
        jnz     .acked
        OUTB    PIC1_COMMAND, POLL
        in      al, PIC1_COMMAND        ; 0x80: IRQ 0 was there, and is gone
.acked: dec     ebx
        jz      last
        iret
