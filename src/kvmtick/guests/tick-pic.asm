; tick-pic - the plain case: PIT in mode 2, PIC, one EOI a tick, HLT in between.
;
; Takes `count` ticks (0: for ever), then leaves with code 0. `param_ms`: not used.
;
; This is also the guest that benchmarks run, so a tick costs few instructions: AL keeps the EOI
; command and ECX the ticks that are left; nothing else uses them.

%include "common.inc"

start:  SETUP
        SET_VECTOR VECTOR_IRQ0, tick
        call    pic_init
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start

        mov     ecx, [count]
        mov     al, EOI
        sti
idle:   hlt                             ; the handler decides when to end, so there is nothing
        jmp     idle                    ; to check here and no wake-up to lose

tick:   inc     dword [counter]
        out     PIC1_COMMAND, al        ; EOI: the PIC may send the next IRQ 0
        dec     ecx
        jz      last
        iret

last:   cmp     dword [count], 0        ; an endless run comes here too, every 2^32 ticks
        je      resume
        EXIT    0
resume: iret
