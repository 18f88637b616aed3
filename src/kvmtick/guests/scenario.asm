; scenario - a small interpreter: the guest does what a script tells it to. For tests.
;
; The loader puts the script at image offset 0x1000. It initialises the PICs and the IVT; the PIT
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
;   13    UNREAL      -      -        32-bit addresses from now on; vectors 0x30..0xef are counted
;   14    ADDR        -      address  of the MMIO and MSR operations that follow
;   15    MMIO_W32    -      value    write 4 bytes at the address; needs UNREAL
;   16    MMIO_R32    i      -        results[i] = 4 bytes read there
;   17    MMIO_W16    -      value    the same with 2 bytes
;   18    MMIO_R16    i      -
;   19    MMIO_W8     -      value    and with one
;   20    MMIO_R8     i      -
;   21    MSR_HI      -      value    high half for the next WRMSR only, otherwise 0
;   22    WRMSR       -      value    low half; the address is the MSR's index
;   23    RDMSR       i      -        results[i], results[i + 1] = low, high half
;   24    CPUID       i      leaf     results[i..i + 3] = EAX, EBX, ECX, EDX; sub-leaf 0
;   25    APIC_EOI_ON -      how      handlers of 0x30..0xef write EOI: 0 by MMIO (as after UNREAL),
;                                     1 by x2APIC MSR
;   26    APIC_EOI_OFF -     -        they write none
;   27    TSC_READ    i      -        results[i], results[i + 1] = low, high half of the TSC
;   28    WAIT_VECTOR vector n        STI, HLT until apic_vectors[vector] is n or more
;   29    SNAP_VECTOR vector i        results[i] = apic_vectors[vector]
;   30    WAIT_NMIS   -      n        HLT with IF as it is until `nmis` is n or more
;
; IDLE_MS, WAIT_TICKS and WAIT_VECTOR leave IF=1. They wake only by an interrupt: without one they
; sleep for ever. A code that does not exist ends the run with ERROR_OPERATION.
; A WRMSR or RDMSR that the CPU refuses with #GP counts in `faults`; RDMSR then gives all ones.
; A slave PIC that the script has not initialised has vector base 0; give it 0x28.

%define SPIN_PAD 48
%include "common.inc"

ERROR_OPERATION equ 0xfe
VECTOR_GP       equ 13
APIC_VECTOR     equ 0x30                ; the first one that is counted in apic_vectors
APIC_VECTORS    equ 0xf0 - APIC_VECTOR
RESULTS         equ 128
EOI_BY_MMIO     equ 1
EOI_BY_MSR      equ 2

; Where the host looks (image offsets).
        times 0x100 - ($ - $$) int3
results:        times RESULTS dd 0      ; 0x100  filled by operations; index taken modulo 128
vectors:        times 16 dd 0           ; 0x300  interrupts taken at 0x20..0x2f
nmis:           dd 0                    ; 0x340  NMIs taken
faults:         dd 0                    ; 0x344  WRMSR and RDMSR refused with #GP
        times 0x400 - ($ - $$) db 0
apic_vectors:   times 256 dd 0          ; 0x400  interrupts taken at 0x30..0xef
                                        ; 0x800  end

eoi_on:         db 1
eoi_how:        db 0                    ; how the handlers of 0x30..0xef write EOI; 0: not
address:        dd 0
msr_high:       dd 0

%include "apic.inc"

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
        dw      op_out32, op_eoi_off, op_eoi_on, op_wait_ticks, op_snap, op_unreal, op_addr
        dw      op_mmio_w32, op_mmio_r32, op_mmio_w16, op_mmio_r16, op_mmio_w8, op_mmio_r8
        dw      op_msr_hi, op_wrmsr, op_rdmsr, op_cpuid, op_apic_eoi_on, op_apic_eoi_off
        dw      op_tsc_read, op_wait_vector, op_snap_vector, op_wait_nmis
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
store:  and     bx, RESULTS - 1         ; results[EBX] = EAX
        shl     bx, 2
        mov     [results + bx], eax
        jmp     next

op_unreal:
        pushf
        cli
        call    unreal
        call    set_apic_vectors
        popf
        mov     byte [eoi_how], EOI_BY_MMIO
        jmp     next

op_addr:
        mov     [address], eax
        jmp     next

op_mmio_w32:
        mov     ebx, [address]
        mov     [ebx], eax
        jmp     next

op_mmio_r32:
        mov     ebx, [address]
        mov     eax, [ebx]
store_dx:
        mov     bx, dx                  ; results[DX] = EAX
        jmp     store

op_mmio_w16:
        mov     ebx, [address]
        mov     [ebx], ax
        jmp     next

op_mmio_r16:
        mov     ebx, [address]
        xor     eax, eax
        mov     ax, [ebx]
        jmp     store_dx

op_mmio_w8:
        mov     ebx, [address]
        mov     [ebx], al
        jmp     next

op_mmio_r8:
        mov     ebx, [address]
        xor     eax, eax
        mov     al, [ebx]
        jmp     store_dx

op_msr_hi:
        mov     [msr_high], eax
        jmp     next

op_wrmsr:
        SET_VECTOR VECTOR_GP, gp
        xor     edx, edx
        xchg    edx, [msr_high]
        mov     ecx, [address]
wrmsr_here:
        wrmsr
        jmp     next

op_rdmsr:
        SET_VECTOR VECTOR_GP, gp
        mov     bx, dx
        or      eax, -1                 ; what it gives if refused
        mov     edx, eax
        mov     ecx, [address]
rdmsr_here:
        rdmsr
store_pair:                             ; results[BX], results[BX + 1] = EAX, EDX
        call    put
        mov     eax, edx
        call    put
        jmp     next

op_cpuid:
        push    dx
        xor     ecx, ecx
        cpuid
        mov     edi, ebx
        pop     bx
        call    put
        mov     eax, edi
        call    put
        mov     eax, ecx
        jmp     store_pair

put:    push    bx                      ; results[BX] = EAX, BX + 1
        and     bx, RESULTS - 1
        shl     bx, 2
        mov     [results + bx], eax
        pop     bx
        inc     bx
        ret

op_apic_eoi_on:
        inc     ax                      ; EOI_BY_MMIO or EOI_BY_MSR
        mov     [eoi_how], al
        jmp     next

op_apic_eoi_off:
        mov     byte [eoi_how], 0
        jmp     next

op_tsc_read:
        mov     bx, dx
        rdtsc
        jmp     store_pair

op_wait_vector:
        mov     ebx, eax
        mov     di, dx
        shl     di, 2
.sleep: cli
        cmp     [apic_vectors + di], ebx
        jae     op_sti
        sti
        hlt
        jmp     .sleep

op_snap_vector:
        mov     di, dx
        shl     di, 2
        mov     ebx, eax
        mov     eax, [apic_vectors + di]
        jmp     store

; An NMI that comes between the look and HLT is slept over: take some that repeats.
op_wait_nmis:
        cmp     [nmis], eax
        jae     next
        hlt
        jmp     op_wait_nmis

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

; Vectors 0x30..0xef: one CALL each, 4 bytes long. Its return address is 4 * (vector - 0x30) from
; that of the first: the offset in the table.
apic_stubs:
%rep APIC_VECTORS
        call    near apic_irq
        int3
%endrep

APIC_RETURN     equ apic_stubs + 3      ; what the first stub's CALL pushes

apic_irq:
        push    bp
        mov     bp, sp
        push    bx
        mov     bx, [bp + 2]
        inc     dword [apic_vectors + 4 * APIC_VECTOR - APIC_RETURN + bx]
        cmp     byte [eoi_how], EOI_BY_MMIO
        jb      .back
        ja      .msr
        LAPIC_WRITE LAPIC_EOI, 0
.back:  pop     bx
        pop     bp
        add     sp, 2                   ; the stub's return address
        iret
.msr:   push    eax
        push    ecx
        push    edx
        xor     eax, eax
        xor     edx, edx
        mov     ecx, X2APIC_MSR + LAPIC_EOI / 16
        wrmsr
        pop     edx
        pop     ecx
        pop     eax
        jmp     .back

; Vector 13. Only a refused MSR access is stepped over: both instructions have 2 bytes.
gp:     push    bp
        mov     bp, sp
        cmp     word [bp + 2], wrmsr_here
        je      .step
        cmp     word [bp + 2], rdmsr_here
        jne     unexpected
.step:  add     word [bp + 2], 2
        inc     dword [faults]
        pop     bp
        iret

; IVT entries 0x30..0xef and the spurious one. Clobbers EAX, CX, DI.
set_apic_vectors:
        SET_VECTOR VECTOR_SPURIOUS, spurious
        mov     di, APIC_VECTOR * 4
        mov     eax, apic_stubs
        mov     cx, APIC_VECTORS
.next:  stosd
        add     eax, 4
        loop    .next
        ret

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

        times 0x1000 - ($ - $$) int3
script: dw      0, 0                    ; END, code 0: stands for "no script"
        dd      0
