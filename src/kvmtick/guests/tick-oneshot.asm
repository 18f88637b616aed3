; tick-oneshot - PIT in mode 0: each count gives one tick, so the handler loads the next one.
;
; The handler's own delay adds to every period: such a clock always runs late. Takes `count`
; ticks (0: for ever), then leaves with code 0. `param_ms`: not used.
;
; BX keeps the PIT count, ECX the ticks that are left; the handler owns AL.

%include "common.inc"

start:  SETUP
        SET_VECTOR VECTOR_IRQ0, tick
        call    pic_init
        mov     bx, [divisor]
        mov     ecx, [count]
        mov     al, 0x30                ; channel 0, low then high byte, mode 0, binary
        call    pit_start

        sti
idle:   hlt
        jmp     idle

tick:   inc     dword [counter]
        OUTB    PIC1_COMMAND, EOI
        dec     ecx
        jz      last
rearm:  OUTB    PIT_CH0, bl             ; a new count starts mode 0 again, no control word needed
        OUTB    PIT_CH0, bh
        iret

last:   cmp     dword [count], 0        ; an endless run comes here too, every 2^32 ticks
        je      rearm
        EXIT    0
