; boot - the last 512 bytes of a ROM that starts a built-in guest on any PC, without a BIOS.
;
; The CPU's first instruction is 16 bytes below the end. The guest's image lies at the ROM's start:
; it goes to 0000:8000, these 512 bytes go to 0000:7e00, LINT0 is opened for the PICs as a BIOS does
; it (KVM has it open from reset), and the guest is entered. Where it would stop for good it jumps
; to `ended` (rom.py sees to that): one line on COM1, "AA CCCCCCCC", tells its exit code and its own
; tick count in hexadecimal, and the PC is switched off.

        bits 16
        cpu 586
        org 0x7e00                      ; in the ROM f000:fe00, until `boot` is there

ROM             equ 0xf000              ; segment
GUEST           equ 0x8000
GUEST_BYTES     equ 0x6000              ; more than any has
COUNTER         equ GUEST + 0x14        ; in the parameter block (guests/__init__.py)
STACK_TOP       equ 0x7000
COM1            equ 0x3f8
COM1_LCR        equ COM1 + 3
COM1_STATUS     equ COM1 + 5            ; bit 5: it takes a byte, bit 6: nothing is left to send
QEMU_EXIT       equ 0x501               ; isa-debug-exit,iobase=0x501
BOCHS_EXIT      equ 0x8900              ; "Shutdown", letter by letter

here:
ended:  cli                             ; 0000:7e00; AL = the guest's exit code
        mov     ah, al
        mov     dx, COM1_LCR
        mov     al, 3                   ; 8 bits
        out     dx, al
        mov     al, ah
        call    print_byte
        mov     al, ' '
        call    print
        mov     di, COUNTER + 3
        mov     cx, 4
.byte:  mov     al, [di]
        dec     di
        call    print_byte
        loop    .byte
        mov     al, 10
        call    print

        mov     dx, COM1_STATUS
.wait:  in      al, dx
        test    al, 0x40                ; all is sent
        jz      .wait
        mov     si, shutdown
        mov     dx, BOCHS_EXIT
        mov     cx, shutdown.end - shutdown
        rep outsb
        mov     dx, QEMU_EXIT
        out     dx, al
.stay:  hlt
        jmp     .stay

shutdown:       db "Shutdown"
.end:

print_byte:                             ; AL, in hexadecimal. Clobbers AX, DX
        push    ax
        shr     al, 4
        call    print_digit
        pop     ax
        and     al, 0x0f
print_digit:
        add     al, '0'
        cmp     al, '9'
        jbe     print
        add     al, 'a' - '9' - 1
print:  mov     ah, al
        mov     dx, COM1_STATUS
.wait:  in      al, dx
        test    al, 0x20
        jz      .wait
        mov     dx, COM1
        mov     al, ah
        out     dx, al
        ret

%include "../guests/apic.inc"

reset:  mov     ax, ROM
        mov     ds, ax
        xor     ax, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, STACK_TOP
        cld
        xor     si, si
        mov     di, GUEST
        mov     cx, GUEST_BYTES
        rep movsb
        mov     si, here + 0x8000       ; f000:fe00
        mov     di, here
        mov     cx, 512
        rep movsb
        mov     ds, ax
        jmp     0:boot

boot:   call    unreal
        LAPIC_WRITE LAPIC_SVR, SVR_ENABLED
        LAPIC_WRITE LAPIC_LVT0, LVT_EXTINT
        jmp     GUEST

        times 0x1f0 - ($ - $$) db 0
        jmp     near reset              ; f000:fff0
        times 0x200 - ($ - $$) db 0
