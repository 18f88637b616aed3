; tick-latency - tick-pic that measures how late it is.
;
; Takes `count` ticks (0: as many as there is room for), stops the timer, takes those that it is
; still owed, and leaves with code 0. `param_ms`: not used.
;
; Every sample is 8 bytes of memory from 1 MiB on: the counts of PIT channels 0 and 2, latched at
; one moment, and the low half of the TSC right after it. Channel 0 is the tick's timer, so its
; count less its reload value is the time since the last expiry. Channel 2 runs through all 65536
; counts: it tells how many expiries lie between two samples, the TSC how often it went round.
; The samples are
;
;   9     with short waits between them: how fast the TSC runs
;   1     the timer has just been started
;   n     one a tick, its handler's first instruction
;   1     the timer has been stopped
;
; snapshot: how many samples, how many ticks came after the timer was stopped.
; guests/latency.py reads them.

%include "common.inc"
%include "apic.inc"

LATCH_0_AND_2   equ 0xda                ; read-back: the counts of channels 0 and 2, no status
SAMPLES         equ 0x100000
SAMPLES_END     equ 0x200000 - 16       ; room for the last tick's and the one behind it
WAITS           equ 8                   ; one or two of them may be disturbed
WAIT_COUNTS     equ 256                 ; of channel 2, 0.2 ms
QUIET           equ 23864               ; 20 ms, and so many looks: nothing is owed any more,
LOOKS           equ 100                 ; and it is not the host that keeps everything waiting

start:  SETUP
        call    unreal
        mov     edi, SAMPLES
        in      al, PORT_B
        and     al, 0xfc                ; no speaker
        or      al, 1                   ; gate of channel 2
        out     PORT_B, al

        call    channel2_start
        call    sample
        mov     cx, WAITS
calibrate:
        mov     si, dx
        add     edi, 8
.until: call    pause
        call    sample
        mov     ax, si
        sub     ax, dx
        cmp     ax, WAIT_COUNTS
        jb      .until
        loop    calibrate
        add     edi, 8

; Both channels start together: who was held up for a tick or more in between tries again, for then
; it is not known how many ticks that was.
again:  call    pit_stop
        call    pic_init                ; forgets the tick of a try before
        SET_VECTOR VECTOR_IRQ0, tick
        call    channel2_start
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start
        call    sample
        neg     dx                      ; counted by channel 2
        mov     ax, [divisor]
        sub     ax, bx                  ; and by channel 0, in this period
        sub     dx, ax
        movzx   edx, dx
        cmp     edx, [divisor]
        jae     again
        add     edi, 8

        mov     ecx, [count]
        test    ecx, ecx
        jnz     idle
        not     ecx
        shr     ecx, 1
idle:   sti
        hlt                             ; the handler decides when to end
        jmp     idle

tick:   call    sample
        add     edi, 8
        inc     dword [counter]
        cmp     edi, SAMPLES_END
        jae     last
        dec     ecx
        jg      next
        movzx   eax, bx                 ; stop in the first half of a period, where no expiry can
        shl     eax, 1                  ; slip in
        cmp     eax, [divisor]
        jae     last
next:   OUTB    PIC1_COMMAND, EOI
        iret

last:   call    pit_stop
        call    sample
        add     edi, 8
        sub     edi, SAMPLES
        shr     edi, 3
        mov     [snapshot], edi
        SET_VECTOR VECTOR_IRQ0, owed
        OUTB    PIC1_COMMAND, EOI
        mov     sp, STACK_TOP           ; it is not this tick's handler any more
        sti
drain:  mov     esi, [counter]
        call    channel2
        mov     cx, dx
        mov     di, LOOKS
.wait:  call    pause
        call    channel2
        cmp     esi, [counter]          ; behind it: who was held up after may have had a tick
        jne     drain
        mov     ax, cx
        sub     ax, dx
        dec     di
        jns     .wait
        inc     di                      ; enough of them
        cmp     ax, QUIET
        jb      .wait
        EXIT    0

owed:   push    ax
        inc     dword [counter]
        inc     dword [snapshot + 4]
        OUTB    PIC1_COMMAND, EOI
        pop     ax
        iret

; A sample to EDI; BX and DX are the counts of channels 0 and 2. Clobbers EAX.
sample: OUTB    PIT_CONTROL, LATCH_0_AND_2
        in      al, PIT_CH0
        mov     bl, al
        in      al, PIT_CH0
        mov     bh, al
        in      al, PIT_CH2
        mov     dl, al
        in      al, PIT_CH2
        mov     dh, al
        mov     [edi], bx
        mov     [edi + 2], dx
        push    dx
        rdtsc
        mov     [edi + 4], eax
        pop     dx
        ret

; DX = the count of channel 2. Clobbers AL.
channel2:
        OUTB    PIT_CONTROL, 0x80       ; latch
        in      al, PIT_CH2
        mov     dl, al
        in      al, PIT_CH2
        mov     dh, al
        ret

; Let channel 2 run through all its counts. Clobbers AL.
channel2_start:
        OUTB    PIT_CONTROL, 0xb4       ; channel 2, low then high byte, mode 2, binary
        xor     al, al
        out     PIT_CH2, al
        out     PIT_CH2, al
        ret

; Channel 0 loaded in mode 5 has no timer with KVM, and ticks that are pending stay so. Clobbers AL.
pit_stop:
        OUTB    PIT_CONTROL, 0x3a       ; channel 0, low then high byte, mode 5, binary
        xor     al, al
        out     PIT_CH0, al
        out     PIT_CH0, al
        ret

; Some time without a port access. Clobbers nothing.
pause:  push    cx
        mov     cx, 5000
        loop    $
        pop     cx
        ret
