; mailbox.asm - carries out single accesses that the host hands over, with interrupts off.
;
; Real mode, all segments 0; DS gets a limit of 4 GiB. A vCPU starts at 0x8000, by the host or by a
; SIPI with vector 8. The host lets one vCPU run at a time, so there is one mailbox for all:
;
;   +0   operation; the guest writes 0 here when it is done
;   +4   address, port or MSR
;   +8   value, low half            +12  high half
;   +16  result, low half           +20  high half
;   +24  1 if the access gave #GP, else 0
;
; A vCPU with nothing to do writes to PORT_DONE, which is where the host has it back.
;
; Operations: 0 and 1 nothing, 2-4 read memory (1, 2, 4 bytes), 5-7 write memory, 8-10 read a port
; (1, 2, 4 bytes), 11-13 write a port, 14 RDMSR, 15 WRMSR, 16 an interrupt window with an exit to
; user space in it (STI; OUT), 17 one that waits (STI; HLT).
;
; In a window one interrupt is taken: the handler returns with IF=0. Vectors taken are noted at LOG,
; each plus 1; NMIs are counted.

        bits 16
        cpu 586
        org 0x8000

MAILBOX         equ 0x600
NMIS            equ 0x700
MAY_FAULT       equ 0x704               ; an access that may give #GP is under way
LOG_BYTES       equ 0x708
LOG             equ 0x710               ; 64 words, written round and round
PORT_DONE       equ 0x510
PORT_WINDOW     equ 0x80
HANDLER         equ 0x8900

        times 8 nop                     ; an exit that INIT cut short may skip an instruction
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     esp, 0x7000
        lgdt    [gdt]                   ; protected mode, only for DS to get a limit of 4 GiB
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        mov     bx, 8
        mov     ds, bx
        and     al, 0xfe
        mov     cr0, eax
        xor     ax, ax
        mov     ds, ax
        jmp     0:next

next:   mov     dx, PORT_DONE
        out     dx, al
        mov     bx, [MAILBOX]
        cmp     bx, OPERATIONS
        jae     next
        add     bx, bx
        mov     esi, [MAILBOX + 4]
        mov     dx, si
        mov     ecx, esi
        mov     eax, [MAILBOX + 8]
        jmp     [operations + bx]

gdt:    dw      15, gdt, 0, 0           ; the first descriptor is not used: the pointer lies there
        dq      0x00cf92000000ffff      ; data, base 0, 4 GiB
operations:
        dw      next, done, read8, read16, read32, write8, write16, write32
        dw      in8, in16, in32, out8, out16, out32, rd_msr, wr_msr, window, wait_hlt
OPERATIONS      equ ($ - operations) / 2

read8:  xor     eax, eax
        mov     al, [esi]
        jmp     result
read16: xor     eax, eax
        mov     ax, [esi]
        jmp     result
read32: mov     eax, [esi]
        jmp     result
write8: mov     [esi], al
        jmp     done
write16: mov    [esi], ax
        jmp     done
write32: mov    [esi], eax
        jmp     done
in8:    xor     eax, eax
        in      al, dx
        jmp     result
in16:   xor     eax, eax
        in      ax, dx
        jmp     result
in32:   in      eax, dx
        jmp     result
out8:   out     dx, al
        jmp     done
out16:  out     dx, ax
        jmp     done
out32:  out     dx, eax
        jmp     done
rd_msr: xor     eax, eax
        xor     edx, edx
        mov     byte [MAY_FAULT], 1
        rdmsr
        mov     byte [MAY_FAULT], 0
        mov     [MAILBOX + 20], edx
        jmp     result
wr_msr: mov     edx, [MAILBOX + 12]
        mov     byte [MAY_FAULT], 1
        wrmsr
        mov     byte [MAY_FAULT], 0
        jmp     done
window: sti
        out     PORT_WINDOW, al
        cli
        jmp     done
wait_hlt:
        sti
        hlt
        cli
        jmp     done
result: mov     [MAILBOX + 16], eax
done:   mov     dword [MAILBOX], 0
        jmp     next

        times 0x800 - ($ - $$) nop
nmi:    inc     dword [cs:NMIS]         ; at 0x8800: vector 2, of an NMI or of an interrupt
        jmp     leave_off

        times 0x840 - ($ - $$) nop
gp:     cmp     byte [cs:MAY_FAULT], 0  ; at 0x8840: vector 13, of #GP or of an interrupt
        jne     fault
        jmp     13:HANDLER - 16 * 13
fault:  mov     dword [MAILBOX + 24], 1
        add     word [esp], 2           ; RDMSR and WRMSR are two bytes long
        iret

        times HANDLER - 0x8000 - ($ - $$) nop
        push    ax                      ; all other vectors, with the vector in CS
        push    bx
        mov     bx, [LOG_BYTES]
        and     bx, 0x7e
        mov     ax, cs
        inc     ax
        mov     [bx + LOG], ax
        add     word [LOG_BYTES], 2
        pop     bx
        pop     ax
leave_off:
        push    bp
        mov     bp, sp
        and     word [bp + 6], 0xfdff   ; IF=0 in the flags on the stack
        pop     bp
        iret
