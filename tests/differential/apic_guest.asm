; apic_guest.asm - carries out single accesses that the host hands over, with interrupts off.
;
; Real mode, all segments 0; the data segments must reach 4 GiB (the host sees to it). vCPU 0 starts
; at 0000:8000, vCPU 1 by a SIPI with vector 8 or 9. Each has a mailbox, which EBP points to:
;
;   +0   operation; the guest writes 0 here when it is done
;   +4   address, port or MSR
;   +8   value, low half            +12  high half
;   +16  result, low half           +20  high half
;   +24  1 if the access gave #GP, else 0
;   +28  port to write to when an operation is done
;
; NMIs are counted at 0x680, those of all vCPUs together.
;
; Operations: 0 nothing, 1 nothing, 2-4 read memory (1, 2, 4 bytes), 5-7 write memory, 8-9 read a
; port (1, 4 bytes), 10-11 write a port, 12 RDMSR, 13 WRMSR.

        bits 16
        cpu 586
        org 0x8000

MAILBOX0        equ 0x600
MAILBOX1        equ 0x640
NMIS            equ 0x680

start0: times 8 nop                     ; an exit that INIT cut short may skip an instruction
        mov     ebp, MAILBOX0
        mov     esp, 0x7000
        jmp     begin

begin:  xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
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
        jmp     0:next                  ; CS = 0: the vectors of IVT are for that segment

next:   mov     edx, [ebp + 28]
        out     dx, al
        mov     bx, [ebp]
        cmp     bx, OPERATIONS
        jae     next
        add     bx, bx
        mov     esi, [ebp + 4]
        mov     dx, si
        mov     ecx, esi
        mov     eax, [ebp + 8]
        jmp     [operations + bx]

gdt:    dw      15, gdt, 0, 0           ; the first descriptor is not used: the pointer lies there
        dq      0x00cf92000000ffff      ; data, base 0, 4 GiB
operations:
        dw      next, done, read8, read16, read32, write8, write16, write32, in8, in32, out8, out32
        dw      rd_msr, wr_msr
OPERATIONS      equ ($ - operations) / 2

read8: xor     eax, eax
        mov     al, [esi]
        jmp     result
read16: xor     eax, eax
        mov     ax, [esi]
        jmp     result
read32: mov     eax, [esi]
        jmp     result
write8: mov     [esi], al
        jmp     done
write16: mov     [esi], ax
        jmp     done
write32: mov     [esi], eax
        jmp     done
in8:    xor     eax, eax
        in      al, dx
        jmp     result
in32:   in      eax, dx
        jmp     result
out8:   out     dx, al
        jmp     done
out32:  out     dx, eax
        jmp     done
rd_msr: xor     eax, eax
        xor     edx, edx
        rdmsr
        mov     [ebp + 20], edx
        jmp     result
wr_msr: mov     edx, [ebp + 12]
        wrmsr
        jmp     done
result: mov     [ebp + 16], eax
done:   mov     dword [ebp], 0
        jmp     next

        times 0x800 - ($ - $$) nop
nmi:    inc     dword [cs:NMIS]         ; at 0x8800: vector 2; it may come before EBP is set
        iret

        times 0x840 - ($ - $$) nop
gp:     mov     dword [ebp + 24], 1     ; at 0x8840: vector 13
        add     word [esp], 2           ; the two instructions that may fault are two bytes long
        iret

        times 0x1000 - ($ - $$) nop
start1: times 8 nop
        mov     ebp, MAILBOX1
        mov     esp, 0x7800
        jmp     0:begin
