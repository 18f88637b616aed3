; scenario - a small interpreter: the guest does what a script tells it to. For tests.
;
; The loader puts the script at image offset 0x800. It initialises the PICs and the IVT; the PIT
; and all else is up to the script. One operation is 8 bytes: u16 code, u16 arg16, u32 arg32.
;
;   code  name        arg16  arg32
;    0    END         -      exit code: low byte to port 0xf4
;    1    NOP1        -      -        nothing
;    2    CLI         -      -
;    3    STI         -      -
;    4    SPIN_MS     -      ms       busy-wait by RDTSC, IF as it is
;    5    IDLE_MS     -      ms       STI, HLT until a wake-up at which that time has passed
;    6    OUT8        port   value
;    7    IN8         port   i        results[i] = the byte read
;    8    OUT32       port   value
;    9    EOI_OFF     -      -        the handlers write no EOI from now on
;   10    EOI_ON      -      -
;   11    WAIT_TICKS  -      n        STI, HLT until `counter` has gone up by n
;   12    SNAP        -      i        results[i] = counter
;
; IDLE_MS and WAIT_TICKS leave IF=1. They wake only by an interrupt: without one they sleep for
; ever. A code that does not exist ends the run with ERROR_OPERATION.
; A slave PIC that the script has not initialised has vector base 0; give it 0x28.

%include "common.inc"

ERROR_OPERATION equ 0xfe

; Where the host looks (image offsets).
        times 0x100 - ($ - $$) int3
results:        times 32 dd 0           ; 0x100  filled by IN8 and SNAP; index taken modulo 32
vectors:        times 16 dd 0           ; 0x180  interrupts taken at 0x20..0x2f
nmis:           dd 0                    ; 0x1c0  NMIs taken
                                        ; 0x1c4  end
eoi_on:         db 1

; The script. SI = the next operation; handlers leave all registers alone.

start:  SETUP
        SET_VECTOR 2, nmi
        call    set_irq_vectors
        call    pic_init
        mov     si, script

next:   mov     bx, [si]
        mov     dx, [si + 2]
        mov     eax, [si + 4]
        add     si, 8
        cmp     bx, OPERATIONS
        jae     no_such_operation
        add     bx, bx
        jmp     [operations + bx]

operations:
        dw      op_end, op_nop, op_cli, op_sti, op_spin_ms, op_idle_ms, op_out8, op_in8
        dw      op_out32, op_eoi_off, op_eoi_on, op_wait_ticks, op_snap
OPERATIONS      equ ($ - operations) / 2

no_such_operation:
        EXIT    ERROR_OPERATION

op_end: out     EXIT_PORT, al
        jmp     dead

op_nop: jmp     next

op_cli: cli
        jmp     next

op_sti: sti
        jmp     next

op_spin_ms:
        call    spin_ms
        jmp     next

op_idle_ms:
        call    set_deadline_ms
.sleep: cli                             ; look with IF=0, then STI, HLT back to back:
        call    before_deadline         ; no interrupt falls between look and sleep
        jnc     op_sti
        sti
        hlt
        jmp     .sleep

op_out8:
        out     dx, al
        jmp     next

op_in8: mov     ebx, eax
        xor     eax, eax
        in      al, dx
        jmp     store

op_out32:
        out     dx, eax
        jmp     next

op_eoi_off:
        mov     byte [eoi_on], 0
        jmp     next

op_eoi_on:
        mov     byte [eoi_on], 1
        jmp     next

op_wait_ticks:
        mov     ebx, [counter]
        add     ebx, eax                ; the value to wait for
.sleep: cli
        mov     eax, [counter]
        sub     eax, ebx
        jns     op_sti                  ; there, or past it
        sti
        hlt
        jmp     .sleep

op_snap:
        mov     ebx, eax
        mov     eax, [counter]
store:  and     bx, 31                  ; results[EBX] = EAX
        shl     bx, 2
        mov     [results + bx], eax
        jmp     next

; Interrupts.

nmi:    inc     dword [nmis]
        iret

; Vector 0x20, the tick.
irq0:   inc     dword [counter]
        inc     dword [vectors]
        cmp     byte [eoi_on], 0
        je      .back
        push    ax
        OUTB    PIC1_COMMAND, EOI
        pop     ax
.back:  iret

; Vectors 0x21..0x2f: one stub each, which tells the common part the IRQ number.
%assign n 1
%rep 15
irq %+ n:
        push    ax
        mov     al, n
        jmp     near irq
%assign n n + 1
%endrep

IRQ_STUB_SIZE   equ irq2 - irq1

irq:    push    bx
        xor     bh, bh
        mov     bl, al
        shl     bx, 2
        inc     dword [vectors + bx]
        cmp     byte [eoi_on], 0
        je      .back
        cmp     al, 7
        je      .maybe_spurious7
        cmp     al, 15
        je      .maybe_spurious15
        cmp     al, 8
        jb      .master
.slave: OUTB    PIC2_COMMAND, EOI       ; the slave first, then its pin on the master
.master:
        OUTB    PIC1_COMMAND, EOI
.back:  pop     bx
        pop     ax
        iret

; IRQ 7 and 15 are also what a PIC answers when the request has gone away. Then bit 7 is not in
; service, and an EOI would end somebody else's interrupt.
.maybe_spurious7:
        OUTB    PIC1_COMMAND, 0x0b      ; OCW3: the next read gives the in-service register
        in      al, PIC1_COMMAND
        test    al, 0x80
        jz      .back
        jmp     .master
.maybe_spurious15:
        OUTB    PIC2_COMMAND, 0x0b
        in      al, PIC2_COMMAND
        test    al, 0x80
        jz      .master                 ; the master did deliver its pin 2
        jmp     .slave

; IVT entries 0x20..0x2f. Clobbers EAX, CX, DI.
set_irq_vectors:
        SET_VECTOR VECTOR_IRQ0, irq0
        mov     di, (VECTOR_IRQ0 + 1) * 4
        mov     eax, irq1
        mov     cx, 15
.next:  stosd
        add     eax, IRQ_STUB_SIZE
        loop    .next
        ret

        times 0x800 - ($ - $$) int3
script: dw      0, 0                    ; END, code 0: stands for "no script"
        dd      0
