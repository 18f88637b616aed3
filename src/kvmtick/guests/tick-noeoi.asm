; tick-noeoi - a handler that forgets the EOI.
;
; IRQ 0 stays in service in the PIC, so no second tick arrives: `counter` stops at 1. The guest
; halts for ever; end it with a time limit. `count`, `param_ms`: not used.

%include "common.inc"

start:  SETUP
        SET_VECTOR VECTOR_IRQ0, tick
        call    pic_init
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start

        sti
idle:   hlt
        jmp     idle

tick:   inc     dword [counter]
        iret                            ; and no `out 0x20, 0x20`
