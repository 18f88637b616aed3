; bios-ticks - a boot sector that counts the BIOS's timer ticks.
;
; It hooks INT 1Ch, which the BIOS's handler of IRQ 0 calls at every tick, and waits for the first:
; from there on it counts 18 more, and keeps the BIOS's own count at 0x46c before and after them.
; Further: a line by INT 10h, the sector behind it read and written back by INT 13h.

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
        mov     word [0x1c * 4], hook
        mov     word [0x1c * 4 + 2], 0
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

        mov     dword [ticks], 0
first:  hlt
        cmp     dword [ticks], 1
        jb      first
        mov     eax, [BIOS_COUNT]
        mov     [before], eax
        out     0x80, al                ; the host notes the time
wait:   hlt
        cmp     dword [ticks], 1 + TICKS
        jb      wait
        mov     eax, [BIOS_COUNT]
        mov     [after], eax
        out     0x80, al
        xor     al, al
        out     0xf4, al
stop:   hlt
        jmp     stop

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
        jmp     stop

hook:   inc     dword [cs:ticks]
        iret

drive:  db      0
line:   db      "bios-ticks", 10, 0

        times   510 - ($ - $$) db 0
        dw      0xaa55
