; serial-irq - a line out and a line in over COM1, both by IRQ 4 through the PIC.
;
; It prints `question`, one byte an interrupt of the empty transmitter, takes a line by the
; receiver's interrupts, gives it back behind `answer` in the way of the first, and leaves. Only one
; of the two causes is enabled at a time, so every interrupt has exactly one.

DATA            equ 0x3f8               ; COM1
IER             equ 0x3f9
IIR             equ 0x3fa               ; reading; writing is the FIFOs' control
LCR             equ 0x3fb
MCR             equ 0x3fc
LSR             equ 0x3fd
RECEIVED        equ 1                   ; in IER
EMPTY           equ 2
VECTOR_IRQ4     equ 0x24
EXIT_PORT       equ 0xf4

        org     0x8000
        bits    16

        jmp     near start
        align   4
empties:        dd 0                    ; at 0x8004: interrupts of the empty transmitter,
receipts:       dd 0                    ; of received data,
others:         dd 0                    ; and all that tell neither

%macro  out8    2                       ; port, value
        mov     dx, %1
        mov     al, %2
        out     dx, al
%endmacro

start:  cli
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7000
        cld
        mov     word [VECTOR_IRQ4 * 4], irq4
        mov     word [VECTOR_IRQ4 * 4 + 2], 0
        out8    0x20, 0x11              ; ICW1
        out8    0x21, 0x20              ; vectors from 0x20
        out8    0x21, 4
        out8    0x21, 1
        out8    0x21, ~(1 << 4) & 0xff  ; IRQ 4 only

        out8    LCR, 3                  ; 8 bits, no parity, one stop bit
        out8    IIR, 7                  ; FIFOs on and empty
        out8    MCR, 0x0b               ; DTR, RTS, and OUT2, the gate of the interrupt
        mov     si, question
        out8    IER, EMPTY
wait_:  sti
        hlt
        cli
        cmp     byte [done], 0
        je      wait_
        xor     al, al
        out     EXIT_PORT, al
        hlt

; si: what to send next, up to a 0; di: where the line goes
irq4:   mov     dx, IIR
        in      al, dx
        and     al, 0x0f
        cmp     al, 2
        je      send
        cmp     al, 4
        je      take
        inc     dword [others]
        jmp     eoi

send:   inc     dword [empties]
        lodsb
        test    al, al
        jz      sent
        mov     dx, DATA
        out     dx, al
        jmp     eoi
sent:   cmp     byte [answers], 0
        je      listen
        mov     byte [done], 1
        jmp     eoi
listen: mov     di, line
        out8    IER, RECEIVED
        jmp     eoi

take:   inc     dword [receipts]
next:   mov     dx, LSR
        in      al, dx
        test    al, 1
        jz      eoi
        mov     dx, DATA
        in      al, dx
        stosb
        cmp     al, 10
        jne     next
        mov     byte [di], 0
        mov     byte [answers], 1
        mov     si, answer
        out8    IER, EMPTY
eoi:    out8    0x20, 0x20
        iret

question:       db "who is there?", 10, 0
answers:        db 0
done:           db 0
answer:         db "hello, "            ; and the line behind it
line:           times 100 db 0
