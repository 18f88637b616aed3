; bios-ticks - a boot sector that counts the BIOS's timer ticks.
;
; It hooks INT 1Ch, which the BIOS's handler of IRQ 0 calls at every tick, and waits for the first:
; from there on it counts 18 more, and keeps the BIOS's own count at 0x46c before and after them.
; Before that it reads the disk's second sector by INT 13h, and writes it back changed.

TICKS   equ 18
BIOS_COUNT equ 0x46c
SECOND  equ 0x7e00                      ; where the second sector goes

        org     0x7c00
        bits    16

        jmp     0:start
        align   4
ticks:  dd      0                       ; at 0x7c08: what the hook has counted
before: dd      0                       ; 0x46c at the first tick
after:  dd      0                       ; and at the last
status: dd      0xff                    ; of the last INT 13h

start:  cli
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00
        mov     [drive], dl
        sti

        mov     si, line
print:  lodsb
        test    al, al
        jz      read
        out     0xe9, al
        jmp     print

read:   mov     ax, 0x0201              ; read one sector: cylinder 0, head 0, sector 2
        call    disk
        inc     byte [SECOND]
        mov     ax, 0x0301              ; and write it back, changed
        call    disk

        cli
        mov     word [0x1c * 4], hook
        mov     word [0x1c * 4 + 2], 0
        sti
idle:   hlt                             ; the hook leaves
        jmp     idle

disk:   mov     bx, SECOND
        mov     cx, 0x0002
        mov     dh, 0
        mov     dl, [drive]
        int     0x13
        mov     [status], ah
        jc      failed
        ret
failed: mov     al, 1
        out     0xf4, al
        jmp     idle

hook:   out     0x80, al                ; the host notes the time
        inc     dword [cs:ticks]
        push    ds
        push    eax
        xor     ax, ax
        mov     ds, ax
        mov     eax, [BIOS_COUNT]
        cmp     dword [ticks], 1
        je      begin
        cmp     dword [ticks], 1 + TICKS
        je      end
back:   pop     eax
        pop     ds
        iret

begin:  mov     [before], eax
        jmp     back

end:    mov     [after], eax
        xor     al, al
        out     0xf4, al
        jmp     idle

drive:  db      0
line:   db      "bios-ticks", 10, 0

        times   510 - ($ - $$) db 0
        dw      0xaa55
