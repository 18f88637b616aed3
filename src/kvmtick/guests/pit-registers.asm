; pit-registers - what a program can read back from an i8254, printed on the debug console.
;
; Goes through the modes on channel 2, read-back and latch commands, byte and word access, the BCD
; bit and port 0x61. It runs with IF=0 and takes no tick. `count`, `param_ms`: not used.
;
; What depends on time is not printed as a number but as an answer ("counts down by 2"), so the
; same PIT gives the same text on any host. Answers in which silicon and KVM differ are only
; reported. The end is `ok`, code 0, unless a register did not hold what was written: `bad`, code 1.
;
; Status byte of a channel, by read-back: OUT (7), null count (6), access (5:4), mode (3:1), BCD (0)

%include "common.inc"

LOAD            equ 0xf000              ; count given to channel 2 where any will do

CONTROL_CH2     equ 0xb4                ; channel 2, word access, mode 2, binary
LATCH_CH2       equ 0x80                ; counter latch command for channel 2
READBACK_CH2    equ 0xc8                ; read-back of channel 2: status, then count
STATUS_CH2      equ 0xe8                ; read-back of channel 2: status only
STATUS_ALL      equ 0xee                ; read-back of all channels: status only
COUNT_CH1_CH2   equ 0xdc                ; read-back of channels 1 and 2: count only
COUNT_ALL       equ 0xde                ; read-back of all channels: count only

; Print a string. Clobbers AL.
%macro SAY 1+
        call    say
        db      %1, 0
%endmacro

; Count an error unless the condition %1 holds.
%macro EXPECT 1
        j%+1    %%good
        inc     byte [errors]
%%good:
%endmacro

; Load channel 2 with %1: low byte, high byte. Clobbers AX.
%macro LOAD_CH2 1
        mov     ax, %1
        call    load_ch2
%endmacro

start:  SETUP
        call    pic_init
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start
        OUTB    PIT_CONTROL, 0x74       ; channel 1, the same; count 0 means 65536:
        OUTB    PIT_CH1, 0              ; the clock against which channel 2 is measured
        OUTB    PIT_CH1, 0
        mov     al, 1
        call    port_b                  ; gate of channel 2 up

; --- the modes, on channel 2. In KVM 6 and 7 become 2 and 3; others keep the bits as written. ---

        mov     cl, 0
modes:  SAY     "ch2 mode "
        mov     al, cl
        call    digit
        mov     al, cl
        shl     al, 1
        or      al, 0xb0                ; channel 2, word access, mode CL, binary
        out     PIT_CONTROL, al
        LOAD_CH2 LOAD
        call    status_ch2
        mov     ch, al
        SAY     " status "
        mov     al, ch
        call    hex8
        SAY     " count f000 down by "
        call    speed_ch2
        mov     [speed], al
        call    digit
        call    newline

        cmp     cl, 6                   ; 6 and 7: reported, not judged
        jae     .next
        mov     al, cl
        shl     al, 1
        or      al, 0x30                ; what the status must show,
        and     ch, 0x3f                ; leaving out OUT and null count
        cmp     ch, al
        EXPECT  e
        and     al, 0x0c                ; mode 2 or 3: must count, by 1 or by 2
        cmp     al, 0x04
        jne     .next
        mov     al, cl
        dec     al
        cmp     al, [speed]
        EXPECT  e
.next:  inc     cl
        cmp     cl, 8
        jb      modes

; --- read-back of several channels at once -----------------------------------------------------

        SAY     "read-back status ch0 "
        OUTB    PIT_CONTROL, STATUS_ALL
        in      al, PIT_CH0
        call    hex8
        SAY     " ch1 "
        in      al, PIT_CH1
        call    hex8
        SAY     " ch2 "
        in      al, PIT_CH2
        call    hex8
        call    newline

        SAY     "read-back count in range ch0 "
        OUTB    PIT_CONTROL, COUNT_ALL
        mov     dx, PIT_CH0
        mov     bx, [divisor]
        call    read_in_range
        call    must_yes
        SAY     " ch1 "
        mov     dx, PIT_CH1
        xor     bx, bx
        call    read_in_range
        call    must_yes
        SAY     " ch2 "
        mov     dx, PIT_CH2
        mov     bx, LOAD
        call    read_in_range
        call    must_yes
        call    newline

        SAY     "read-back status before count "
        OUTB    PIT_CONTROL, CONTROL_CH2
        LOAD_CH2 LOAD
        OUTB    PIT_CONTROL, READBACK_CH2
        in      al, PIT_CH2
        and     al, 0x3f
        cmp     al, 0x34
        EXPECT  e
        mov     dx, PIT_CH2
        mov     bx, LOAD
        call    read_in_range
        call    must_yes
        call    newline

; --- the latch: it holds the count until it is read, and a second one changes nothing -----------

        SAY     "latch holds "
        OUTB    PIT_CONTROL, CONTROL_CH2
        LOAD_CH2 LOAD
        mov     bl, 0
        call    latch_holds
        call    must_yes
        SAY     " second latch ignored "
        OUTB    PIT_CONTROL, CONTROL_CH2
        LOAD_CH2 LOAD
        mov     bl, 1
        call    latch_holds
        call    must_yes
        call    newline

; --- byte and word access ----------------------------------------------------------------------
; The count is loaded with one byte, then read as a word: in KVM the counter goes on through the
; control word in between (silicon stops until a new count comes).

        SAY     "low byte only status "
        OUTB    PIT_CONTROL, 0x94       ; channel 2, low byte only, mode 2
        OUTB    PIT_CH2, 0xff           ; count 0x00ff
        call    status_ch2
        call    hex8
        SAY     " count at most 00ff "
        OUTB    PIT_CONTROL, CONTROL_CH2
        mov     bx, 0x00ff
        call    latch_in_range
        call    yes_no
        call    newline

        SAY     "high byte only status "
        OUTB    PIT_CONTROL, 0xa4       ; channel 2, high byte only, mode 2
        OUTB    PIT_CH2, 0x01           ; count 0x0100
        call    status_ch2
        call    hex8
        SAY     " count at most 0100 "
        OUTB    PIT_CONTROL, CONTROL_CH2
        mov     bx, 0x0100
        call    latch_in_range
        call    yes_no
        call    newline

        SAY     "word low then high "
        OUTB    PIT_CONTROL, CONTROL_CH2
        LOAD_CH2 0x00ff
        in      al, PIT_CH2             ; low: 1..ff
        mov     bl, al
        in      al, PIT_CH2             ; high: 0
        mov     cl, al
        in      al, PIT_CH2
        mov     bh, al
        in      al, PIT_CH2
        or      cl, al
        mov     al, 0
        test    cl, cl
        jnz     .word
        test    bl, bl
        jz      .word
        test    bh, bh
        jz      .word
        inc     al
.word:  call    must_yes
        call    newline

        SAY     "read between the bytes of a write "
        OUTB    PIT_CONTROL, CONTROL_CH2
        LOAD_CH2 LOAD
        OUTB    PIT_CH2, 0x00           ; low byte of the new count
        in      al, PIT_CH2
        in      al, PIT_CH2
        OUTB    PIT_CH2, 0xe0           ; high byte: 0xe000 is loaded now
        mov     bx, 0xe000
        call    latch_in_range
        call    must_yes
        call    newline

; --- BCD: is every digit of the count decimal, in 64 looks 20 us apart? -------------------------

        SAY     "bcd status "
        OUTB    PIT_CONTROL, CONTROL_CH2 | 1
        LOAD_CH2 0x9999
        call    status_ch2
        call    hex8
        SAY     " decimal "
        mov     cx, 64
        mov     byte [answer], 1
.look:  push    cx
        mov     eax, 20
        call    spin_us
        pop     cx
        call    latch_ch2
.digit: mov     bx, ax
        and     bx, 0x000f
        cmp     bx, 9
        jbe     .shift
        mov     byte [answer], 0
.shift: shr     ax, 4
        jnz     .digit
        loop    .look
        mov     al, [answer]
        call    yes_no
        call    newline

; --- port 0x61: gate and output of channel 2. A machine may lack it. ----------------------------

        SAY     "port 61 reads back "
        mov     cl, 0
        mov     byte [answer], 1
.bits:  mov     al, cl
        call    port_b
        in      al, PORT_B
        and     al, 0x03
        cmp     al, cl
        je      .same
        mov     byte [answer], 0
.same:  inc     cl
        cmp     cl, 4
        jb      .bits
        mov     al, [answer]
        call    yes_no
        call    newline
        cmp     byte [answer], 0
        je      finish

        SAY     "gate low stops mode 2 "
        mov     al, 1
        call    port_b
        OUTB    PIT_CONTROL, CONTROL_CH2
        LOAD_CH2 LOAD
        mov     al, 0
        call    port_b
        call    speed_ch2
        cmp     al, 0
        sete    al
        call    yes_no
        call    newline

; A rising gate starts the count again, or not: 3 ms after the load it is either far below it or
; close to it.
        SAY     "gate rise restarts mode"
        mov     cl, 0
.rise:  SAY     " "
        mov     al, cl
        call    digit
        SAY     " "
        mov     al, 1
        call    port_b
        mov     al, cl
        shl     al, 1
        or      al, 0xb0
        out     PIT_CONTROL, al
        LOAD_CH2 LOAD
        push    cx
        mov     eax, 3
        call    spin_ms
        pop     cx
        mov     al, 0
        call    port_b
        mov     al, 1
        call    port_b
        call    latch_ch2
        cmp     ax, LOAD - 1800         ; half of what 3 ms count down
        seta    al
        call    yes_no
        inc     cl
        cmp     cl, 6
        jb      .rise
        call    newline

; Bit 5 is OUT of channel 2: in mode 3 a square wave, here of 1024 counts or 0.86 ms. Bit 4 toggles
; with the memory refresh of the first PCs. Does 2 ms of looking see both values of each?
        SAY     "port 61 out2 toggles "
        OUTB    PIT_CONTROL, 0xb6       ; channel 2, word access, mode 3
        LOAD_CH2 1024
        mov     eax, 2
        call    set_deadline_ms
        xor     bx, bx                  ; BL: bits seen set, BH: bits seen clear
.poll:  in      al, PORT_B
        or      bl, al
        not     al
        or      bh, al
        call    before_deadline
        jc      .poll
        and     bl, bh
        test    bl, 0x20
        setnz   al
        call    yes_no
        SAY     " refresh toggles "
        test    bl, 0x10
        setnz   al
        call    yes_no
        call    newline

finish: cmp     byte [errors], 0
        jne     .bad
        SAY     "ok", 10
        EXIT    0
.bad:   SAY     "bad", 10
        EXIT    1

; ---------------------------------------------------------------------------------------------
; Channel 2
; ---------------------------------------------------------------------------------------------

; Load AX as its count. Clobbers AX.
load_ch2:
        out     PIT_CH2, al
        mov     al, ah
        out     PIT_CH2, al
        ret

; AX = its count, latched. AL is read first, then AH.
latch_ch2:
        OUTB    PIT_CONTROL, LATCH_CH2
read_ch2:
        in      al, PIT_CH2
        mov     ah, al
        in      al, PIT_CH2
        xchg    al, ah
        ret

; AL = its status byte.
status_ch2:
        OUTB    PIT_CONTROL, STATUS_CH2
        in      al, PIT_CH2
        ret

; AL = 1 if a word read at port DX lies in 1..BX (BX = 0: 65536), else 0. Clobbers AX, BX.
; latch_in_range: the same for channel 2, latched. Clobbers DX too.
latch_in_range:
        OUTB    PIT_CONTROL, LATCH_CH2
        mov     dx, PIT_CH2
read_in_range:
        in      al, dx
        mov     ah, al
        in      al, dx
        xchg    al, ah
        dec     ax                      ; 1..65536 becomes 0..65535
        dec     bx
        cmp     ax, bx
        setbe   al
        ret

; AL = 1 if a latched count is still the old one after 1 ms, else 0; BL = 1: latch once more before
; it is read. Clobbers EAX, EBX, ECX, EDX.
latch_holds:
        push    bx
        call    latch_ch2
        push    ax
        OUTB    PIT_CONTROL, LATCH_CH2
        mov     eax, 1
        call    spin_ms
        pop     cx                      ; CX = the count just before the latch
        pop     bx
        test    bl, bl
        jz      .read
        OUTB    PIT_CONTROL, LATCH_CH2
.read:  call    read_ch2
        mov     bx, ax
        sub     cx, ax                  ; before -> latched: short
        call    latch_ch2
        sub     bx, ax                  ; latched -> now: the millisecond
        cmp     cx, bx
        setb    al
        ret

; AL = how many channel 2 counts down while channel 1 counts one: 0, 1, 2 (at most 9).
; Both are latched by one command, twice, 1 ms apart. Clobbers EAX, EBX, EDX.
speed_ch2:
        push    ecx
        call    .counts
        push    ax
        push    bx
        mov     eax, 1
        call    spin_ms
        call    .counts
        pop     cx
        sub     cx, bx                  ; CX = steps of channel 2
        pop     bx
        sub     bx, ax                  ; BX = steps of channel 1
        movzx   eax, cx
        movzx   ebx, bx
        add     eax, eax                ; rounded: (2 * steps2 + steps1) / (2 * steps1)
        add     eax, ebx
        add     ebx, ebx
        jz      .none                   ; channel 1 stands still
        xor     edx, edx
        div     ebx
        cmp     eax, 9
        jbe     .done
.none:  mov     eax, 9
.done:  pop     ecx
        ret

.counts:                                ; AX = count of channel 1, BX = count of channel 2
        OUTB    PIT_CONTROL, COUNT_CH1_CH2
        call    read_ch2
        mov     bx, ax
        in      al, PIT_CH1
        mov     ah, al
        in      al, PIT_CH1
        xchg    al, ah
        ret

; Bits 1:0 of port 0x61 (gate, speaker) = AL. Clobbers AX.
port_b: mov     ah, al
        in      al, PORT_B
        and     al, 0xfc
        or      al, ah
        out     PORT_B, al
        ret

; Busy-wait EAX microseconds. Clobbers EAX, EBX, ECX, EDX.
spin_us:
        mul     dword [tsc_khz]
        mov     ecx, 1000
        div     ecx                     ; us * ticks a ms / 1000
        xor     edx, edx
        call    set_deadline
        jmp     spin

; ---------------------------------------------------------------------------------------------
; Printing
; ---------------------------------------------------------------------------------------------

; The string that follows the call, up to a zero byte; returns behind it. Clobbers AL, SI.
say:    pop     si
.next:  lodsb
        test    al, al
        jz      .end
        out     CONSOLE, al
        jmp     .next
.end:   jmp     si

; AL as two hexadecimal digits. Clobbers AX.
hex8:   mov     ah, al
        shr     al, 4
        call    digit
        mov     al, ah
        and     al, 0x0f
; AL = 0..15 as one digit. Clobbers AL.
digit:  cmp     al, 10
        jb      .decimal
        add     al, 'a' - 10 - '0'
.decimal:
        add     al, '0'
        out     CONSOLE, al
        ret

newline:
        OUTB    CONSOLE, 10
        ret

; AL = 0: "no", else "yes". must_yes counts a "no" as an error. Clobbers AL, SI.
must_yes:
        test    al, al
        EXPECT  nz
yes_no: test    al, al
        jz      .no
        SAY     "yes"
        ret
.no:    SAY     "no"
        ret

speed:          db 0
answer:         db 0
errors:         db 0
