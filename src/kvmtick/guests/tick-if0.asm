; tick-if0 - a guest that keeps interrupts off for a while, as a long critical section does.
;
; Takes 3 ticks, spins `param_ms` with IF=0, then goes on until `count` (0: for ever) and leaves
; with code 0. With reinjection on, the ticks that fell due meanwhile are replayed, one for each
; EOI; with reinjection off, one is left: the request that the PIC had latched.
;
; snapshot[0]  counter when the spin begins (3)
; snapshot[1]  counter when it ends, IF still 0 (the same)
; snapshot[2]  counter at the first wake-up one period or more after STI
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
        call    wait_counter

        cli                             ; the critical section
        SNAPSHOT 0
        mov     eax, [param_ms]
        call    spin_ms
        SNAPSHOT 1

        mov     eax, 1                  ; from here on the waits open interrupts
        call    wait_periods
        SNAPSHOT 2
        mov     eax, 10
        call    wait_periods
        SNAPSHOT 3
        jmp     take_the_rest
