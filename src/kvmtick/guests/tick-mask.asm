; tick-mask - a guest that masks IRQ 0 in the PIC for a while, with IF=1.
;
; Takes 3 ticks, masks IRQ 0 for `param_ms`, unmasks it, then goes on until `count` (0: for ever)
; and leaves with code 0. Whatever the reinjection setting, the ticks of the masked time are lost
; but one: the PIC latched an edge behind the mask. KVM drops its pending count at the unmask.
;
; snapshot[0]  counter when IRQ 0 is masked (3)
; snapshot[1]  counter just before the unmask (the same)
; snapshot[2]  counter at the first wake-up one period or more after the unmask
; snapshot[3]  counter at the first wake-up another ten periods or more later
; Entries not reached before `count` stay 0.

%include "common.inc"
%include "phases.inc"

start:  SETUP
        SET_VECTOR VECTOR_IRQ0, tick
        call    pic_init
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start

        mov     ebx, 3
        call    wait_counter            ; returns with IF=0: nothing comes before the mask

        SNAPSHOT 0
        OUTB    PIC1_DATA, 0xff         ; OCW1: mask everything
        sti
        mov     eax, [param_ms]
        call    spin_ms
        SNAPSHOT 1
        OUTB    PIC1_DATA, 0xfe         ; open IRQ 0 again

        mov     eax, 1
        call    wait_periods
        SNAPSHOT 2
        mov     eax, 10
        call    wait_periods
        SNAPSHOT 3
        jmp     take_the_rest
