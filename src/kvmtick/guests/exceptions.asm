; exceptions - every exception from rings 0 and 3 in long mode, and a tick may come at any moment.
;
; The guest goes through its cases round after round, until it has taken `count` ticks (0: for ever)
; and ended a round, and leaves with code 0. A case raises one exception; what the processor pushed
; must be what the SDM says (vol. 3A, chapter 7): vector, error code, CS, RIP, RFLAGS with IF, TF, AC
; and RF, SS, RSP, and for a page fault CR2; so must the stack, SS and RFLAGS of the handler, and the
; registers after it. Otherwise it leaves with code 6 and a line that says what is wrong where, with
; code 5 where CPUID has no long mode. The first round prints a line a case:
;
;       #GP  ring 3  error 0078  rip ok  ticks 1  a selector beyond the GDT
;
; `ticks` is how many came during the case. Instead of error and RIP stands "not raised" where no
; exception came, or #UD for ICEBP, or #GP for #SS(0): emulated processors lack some. That ends
; nothing. The last line sums up.
;
; Ticks are the PIT's in mode 0, through the PIC; the handler, on an interrupt stack, loads counts
; from 1 to 32, so they come at all moments. Exceptions go through trap gates, IF stays set.
;
; snapshot[0] cases of the first round      snapshot[3] exceptions
;         [1] rounds                                [4] cases of the first round not raised
;         [2] ticks that came in a handler of an exception
; `divisor`, `param_ms`: not used.
;
; Not there: #MC, #VE and #CP, which no instruction raises by itself here; data breakpoints.

%define GUEST_NAME "exceptions"
%define TSS_LIMIT 83                    ; ends before IST7
%define IDT_LIMIT 0x40 * 16 - 1

%macro GUEST_DESCRIPTORS 0
        dq      0x00cf9a000000ffff      ; 0x28 code, ring 0, 32 bits
        dq      0x00cffa000000ffff      ; 0x30 code, ring 3, 32 bits
        dq      0x00cff2000000ffff      ; 0x38 data, ring 3
        dq      0x00affa000000ffff      ; 0x40 code, ring 3, 64 bits
        dq      0x00cf12000000ffff      ; 0x48 data, ring 0, not present
        dq      0x00cf72000000ffff      ; 0x50 data, ring 3, not present
%endmacro

%macro SAY_WHERE 0
        mov     rbx, [current]
        call    tell_name
        mov     esi, [rbx + A_CASE.text]
        call    print
        mov     al, ':'
        out     CONSOLE, al
        mov     al, ' '
        out     CONSOLE, al
%endmacro

%include "common.inc"
%include "long.inc"

CODE_32         equ MORE_DESCRIPTORS
USER_CODE_32    equ CODE_32 + 8 | 3
USER_DATA       equ CODE_32 + 16 | 3
USER_CODE_64    equ CODE_32 + 24 | 3
ABSENT_DATA     equ CODE_32 + 32
USER_ABSENT     equ CODE_32 + 40 | 3
NO_SELECTOR     equ 0x78                ; beyond the table

V_DE            equ 0                   ; vectors
V_DB            equ 1
V_BP            equ 3
V_OF            equ 4
V_BR            equ 5
V_UD            equ 6
V_NM            equ 7
V_DF            equ 8
V_TS            equ 10
V_NP            equ 11
V_SS             equ 12
V_GP            equ 13
V_PF            equ 14
V_MF            equ 16
V_AC            equ 17
V_XM            equ 19
EXCEPTIONS      equ 20
WITH_ERROR_CODE equ 1 << V_DF | 1 << V_TS | 1 << V_NP | 1 << V_SS | 1 << V_GP | 1 << V_PF | 1 << V_AC

VECTOR_END      equ 0x30                ; ends a case: gate with DPL 3
VECTOR_NO_STACK equ 0x31                ; a gate with IST7, which the TSS does not have
VECTOR_RING_0   equ 0x32                ; a gate with DPL 0
VECTOR_ABSENT   equ 0x33                ; a gate that is not present
VECTOR_BEYOND   equ 0x50                ; beyond the IDT

ERROR_IDT       equ 1 << 1              ; error code of a gate: vector * 8 + this
ERROR_EXT       equ 1 << 0              ; it happened while another event was delivered
PF_PRESENT      equ 1 << 0              ; error code of a page fault
PF_WRITE        equ 1 << 1
PF_USER         equ 1 << 2
PF_RESERVED     equ 1 << 3
PF_FETCH        equ 1 << 4
NO_ERROR        equ 0xffff
NOTHING         equ 0xff

FLAGS_TF        equ 1 << 8
FLAGS_NT        equ 1 << 14
FLAGS_RF        equ 1 << 16
FLAGS_AC        equ 1 << 18
FLAGS_CHECKED   equ FLAGS_TF | FLAGS_IF | FLAGS_NT | FLAGS_RF | FLAGS_AC | 0x3000
DR7_L0          equ 1 << 0              ; breakpoint 0 is on
CR0_TS          equ 1 << 3
CR0_AM          equ 1 << 18
CR4_OSFXSR      equ 1 << 9
CR4_OSXMMEXCPT  equ 1 << 10
CR4_RESERVED    equ 1 << 31

STACK_0         equ 0x17000             ; the cases' stacks; a page each
STACK_3         equ 0x18000
STACK_0_RSP     equ STACK_0 - 8         ; delivery aligns it to 16
STACK_3_RSP     equ STACK_3 - 0x10
PAGE_ABSENT     equ 0x20000             ; what may be done with a page
PAGE_READ_ONLY  equ 0x21000
PAGE_SUPERVISOR equ 0x22000
PAGE_RESERVED   equ 0x23000             ; a reserved bit is set in its entry
PAGE_NO_EXECUTE equ 0x24000
PF_OFFSET       equ 0x123
NOT_CANONICAL   equ 0x0000800000000000
PATTERN         equ 0x5a5a000000000000  ; R8 .. R15 are this + their number
NOBODY          equ 0x80                ; a port
DEFAULT_MXCSR   equ 0x1f80

%define PT_ENTRY(address) PT_LOW + 8 * ((address) / PAGE_BYTES)

; ---------------------------------------------------------------------------------------------
; How a case is written down: CASE, instructions, SAVED_RIP where RIP must point, END_CASE, and a
; RAISES for each ring it shall run in. The code is in pages of ring 3; ring 0 runs it there too.
; What a case needs besides is defined before its RAISES and holds until the next CASE.
; ---------------------------------------------------------------------------------------------

struc A_CASE
.entry:         resd 1
.rip:           resd 1
.resume:        resd 1
.text:          resd 1                  ; what it is
.cr2:           resd 1
.rflags:        resd 1                  ; to start with
.cr0:           resd 1                  ; bits that are different in CR0
.error:         resw 1                  ; NO_ERROR: the vector has none
.mode:          resb 1                  ; index into `modes`
.vector:        resb 1
.instead:       resd 1                  ; what comes where a processor cannot raise it
.rf:            resd 1                  ; FLAGS_RF or 0: in the flags that are pushed
.dr7:           resd 1                  ; DR0 is the address of `rip`
.gate:          resd 1                  ; byte in the IDT whose bit 7, Present, is off
.stack:         resd 1                  ; where the handler's stack starts
endstruc

struc A_MODE
.cs:            resw 1
.ss:            resw 1
.rsp:           resd 1
endstruc

RING_0          equ 0                   ; modes
RING_3          equ 1
RING_0_32       equ 2                   ; compatibility mode
RING_3_32       equ 3

%define HANDLER_STACK(mode) ((mode) & 1) * RSP0_STACK + (1 - ((mode) & 1)) * (STACK_0_RSP & ~15)
%define GATE_OF(vector) IDT + 16 * (vector) + 5
%define NO_GATE GATE_OF(0xff)           ; beyond the IDT

        [section .cases follows=.text align=8]
cases:
        [section .texts follows=.cases]
        [section .user follows=.texts align=4096]
user_start:
        bits 64

%assign case_number 0

%macro CASE 0-1 64
        bits    %1
%assign case_number case_number + 1
%define case_rflags FLAGS_IF
%define case_cr0 0
%define case_cr2 0
%define case_rf FLAGS_RF
%define case_dr7 0
%define case_gate NO_GATE
%define case_instead NOTHING
entry_ %+ case_number:
%endmacro

%macro SAVED_RIP 0-1 $
rip_ %+ case_number equ %1
%endmacro

%macro END_CASE 0
resume_ %+ case_number:
        int     VECTOR_END
        bits    64
%endmacro

; RAISES mode, vector, error code, text
%macro RAISES 4
        [section .texts]
%%text: db      %4, 0
        [section .cases]
        istruc A_CASE
        at A_CASE.entry, dd entry_ %+ case_number
        at A_CASE.rip, dd rip_ %+ case_number
        at A_CASE.resume, dd resume_ %+ case_number
        at A_CASE.text, dd %%text
        at A_CASE.cr2, dd case_cr2
        at A_CASE.rflags, dd case_rflags
        at A_CASE.cr0, dd case_cr0
        at A_CASE.error, dw %3
        at A_CASE.mode, db %1
        at A_CASE.vector, db %2
        at A_CASE.instead, dd case_instead
        at A_CASE.rf, dd case_rf
        at A_CASE.dr7, dd case_dr7
        at A_CASE.gate, dd case_gate
%if %2 == V_DF
        at A_CASE.stack, dd IST1_STACK
%else
        at A_CASE.stack, dd HANDLER_STACK(%1)
%endif
        iend
        [section .user]
%endmacro

%macro BOTH_RAISE 3                     ; RAISES in rings 0 and 3
        RAISES  RING_0, %1, %2, %3
        RAISES  RING_3, %1, %2, %3
%endmacro

; A trap leaves RIP behind the instruction, and RF clear.
%macro TRAP 0
        SAVED_RIP
%define case_rf 0
%endmacro

; ---------------------------------------------------------------------------------------------
; The cases
; ---------------------------------------------------------------------------------------------

        CASE
        xor     ecx, ecx
        SAVED_RIP
        div     ecx
        END_CASE
        BOTH_RAISE V_DE, NO_ERROR, "division by 0"

        CASE
        nop
        TRAP
        END_CASE
%define case_rflags FLAGS_IF | FLAGS_TF
        BOTH_RAISE V_DB, NO_ERROR, "single step"

        CASE
        db      0xf1
        TRAP
        END_CASE
%define case_instead V_UD
        BOTH_RAISE V_DB, NO_ERROR, "ICEBP"

        CASE
        int3
        TRAP
        END_CASE
        BOTH_RAISE V_BP, NO_ERROR, "INT3"

        CASE
        int     V_OF
        TRAP
        END_CASE
        BOTH_RAISE V_OF, NO_ERROR, "INT 4"

        CASE    32
        mov     al, 0x7f
        inc     al
        into
        TRAP
        END_CASE
        RAISES  RING_0_32, V_OF, NO_ERROR, "INTO in compatibility mode"
        RAISES  RING_3_32, V_OF, NO_ERROR, "INTO in compatibility mode"

        CASE    32
        mov     eax, USER_DATA
        mov     ds, eax
        mov     ecx, 5
        SAVED_RIP
        bound   ecx, [one_to_four]
        END_CASE
        RAISES  RING_0_32, V_BR, NO_ERROR, "BOUND in compatibility mode"
        RAISES  RING_3_32, V_BR, NO_ERROR, "BOUND in compatibility mode"
        align 4
one_to_four:
        dd      1, 4

        CASE
        SAVED_RIP
        ud2
        END_CASE
        BOTH_RAISE V_UD, NO_ERROR, "UD2"

        CASE
        SAVED_RIP
        db      0xce
        END_CASE
        BOTH_RAISE V_UD, NO_ERROR, "INTO, which 64-bit mode does not have"

        CASE
        SAVED_RIP
        fld1
        END_CASE
%define case_cr0 CR0_TS
        BOTH_RAISE V_NM, NO_ERROR, "x87 with CR0.TS"

        CASE
        xor     ecx, ecx
        SAVED_RIP
        div     ecx
        END_CASE
%define case_gate GATE_OF(V_DE)
        BOTH_RAISE V_DF, 0, "#DE with an absent gate"

        CASE
        SAVED_RIP
        mov     eax, [abs PAGE_ABSENT + PF_OFFSET]
        END_CASE
%define case_gate GATE_OF(V_PF)
%define case_cr2 PAGE_ABSENT + PF_OFFSET
        BOTH_RAISE V_DF, 0, "#PF with an absent gate"

        CASE
        SAVED_RIP
        int     VECTOR_NO_STACK
        END_CASE
        BOTH_RAISE V_TS, TSS_SELECTOR, "an interrupt stack beyond the TSS"

        CASE
        mov     eax, USER_ABSENT
        SAVED_RIP
        mov     ds, eax
        END_CASE
        BOTH_RAISE V_NP, USER_ABSENT & ~3, "a data segment that is not present"

        CASE
        SAVED_RIP
        int     VECTOR_ABSENT
        END_CASE
        BOTH_RAISE V_NP, 8 * VECTOR_ABSENT + ERROR_IDT, "a gate that is not present"

        CASE
        SAVED_RIP
        ud2
        END_CASE
%define case_gate GATE_OF(V_UD)
        BOTH_RAISE V_NP, 8 * V_UD + ERROR_IDT + ERROR_EXT, "#UD with an absent gate"

        CASE
        mov     eax, ABSENT_DATA
        SAVED_RIP
        mov     ss, eax
        END_CASE
        RAISES  RING_0, V_SS, ABSENT_DATA, "a stack segment that is not present"

        CASE
        mov     eax, USER_ABSENT
        SAVED_RIP
        mov     ss, eax
        END_CASE
        RAISES  RING_3, V_SS, USER_ABSENT & ~3, "a stack segment that is not present"

        CASE
        mov     rbp, NOT_CANONICAL
        SAVED_RIP
        mov     eax, [rbp]
        END_CASE
%define case_instead V_GP
        BOTH_RAISE V_SS, 0, "a stack address that is not canonical"

        CASE
        mov     rdx, NOT_CANONICAL
        SAVED_RIP
        mov     eax, [rdx]
        END_CASE
        BOTH_RAISE V_GP, 0, "an address that is not canonical"

        CASE
        mov     eax, NO_SELECTOR
        SAVED_RIP
        mov     ds, eax
        END_CASE
        BOTH_RAISE V_GP, NO_SELECTOR, "a selector beyond the GDT"

        CASE
        SAVED_RIP
        int     VECTOR_BEYOND
        END_CASE
        BOTH_RAISE V_GP, 8 * VECTOR_BEYOND + ERROR_IDT, "a vector beyond the IDT"

        CASE
        SAVED_RIP
        int     VECTOR_RING_0
        END_CASE
        RAISES  RING_3, V_GP, 8 * VECTOR_RING_0 + ERROR_IDT, "a gate of ring 0"

        CASE
        mov     rax, cr4
        or      eax, CR4_RESERVED
        SAVED_RIP
        mov     cr4, rax
        btr     rax, 31                 ; where it was taken
        mov     cr4, rax
        END_CASE
        RAISES  RING_0, V_GP, 0, "a reserved bit in CR4"

        CASE
        mov     ecx, 0x12345678
        SAVED_RIP
        rdmsr
        END_CASE
        RAISES  RING_0, V_GP, 0, "RDMSR of nothing"

        CASE
        SAVED_RIP
        cli
        END_CASE
        RAISES  RING_3, V_GP, 0, "CLI"

        CASE
        SAVED_RIP
        hlt
        END_CASE
        RAISES  RING_3, V_GP, 0, "HLT"

        CASE
        SAVED_RIP
        out     NOBODY, al
        END_CASE
        RAISES  RING_3, V_GP, 0, "OUT"

%macro READ_CASE 1
        CASE
        SAVED_RIP
        mov     eax, [abs %1 + PF_OFFSET]
        END_CASE
%define case_cr2 %1 + PF_OFFSET
%endmacro

%macro WRITE_CASE 1
        CASE
        SAVED_RIP
        mov     [abs %1 + PF_OFFSET], eax
        END_CASE
%define case_cr2 %1 + PF_OFFSET
%endmacro

%macro FETCH_CASE 1                     ; the page starts with INT VECTOR_END
        CASE
        mov     eax, %1
        jmp     rax
        SAVED_RIP %1
        END_CASE
%define case_cr2 %1
%endmacro

        READ_CASE PAGE_ABSENT
        RAISES  RING_0, V_PF, 0, "read: absent"
        RAISES  RING_3, V_PF, PF_USER, "read: absent"
        WRITE_CASE PAGE_ABSENT
        RAISES  RING_0, V_PF, PF_WRITE, "write: absent"
        RAISES  RING_3, V_PF, PF_WRITE | PF_USER, "write: absent"
        FETCH_CASE PAGE_ABSENT
        RAISES  RING_0, V_PF, PF_FETCH, "fetch: absent"
        RAISES  RING_3, V_PF, PF_FETCH | PF_USER, "fetch: absent"
        WRITE_CASE PAGE_READ_ONLY
        RAISES  RING_0, V_PF, PF_PRESENT | PF_WRITE, "write: read-only"
        RAISES  RING_3, V_PF, PF_PRESENT | PF_WRITE | PF_USER, "write: read-only"
        READ_CASE PAGE_SUPERVISOR
        RAISES  RING_3, V_PF, PF_PRESENT | PF_USER, "read: supervisor's"
        WRITE_CASE PAGE_SUPERVISOR
        RAISES  RING_3, V_PF, PF_PRESENT | PF_WRITE | PF_USER, "write: supervisor's"
        FETCH_CASE PAGE_SUPERVISOR
        RAISES  RING_3, V_PF, PF_PRESENT | PF_FETCH | PF_USER, "fetch: supervisor's"
        READ_CASE PAGE_RESERVED
        RAISES  RING_0, V_PF, PF_PRESENT | PF_RESERVED, "read: reserved bit"
        RAISES  RING_3, V_PF, PF_PRESENT | PF_RESERVED | PF_USER, "read: reserved bit"
        FETCH_CASE PAGE_NO_EXECUTE
        RAISES  RING_0, V_PF, PF_PRESENT | PF_FETCH, "fetch: no execution"
        RAISES  RING_3, V_PF, PF_PRESENT | PF_FETCH | PF_USER, "fetch: no execution"

        CASE
        fldcw   [x87_control]
        fld1
        fldz
        fdivp
        SAVED_RIP
        fwait
        END_CASE
        BOTH_RAISE V_MF, NO_ERROR, "x87 division by 0"
x87_control:
        dw      0x37b                   ; as after FNINIT, but division by 0 is not masked

        CASE
        SAVED_RIP
        mov     eax, [abs one_to_four + 1]
        END_CASE
%define case_cr0 CR0_AM
%define case_rflags FLAGS_IF | FLAGS_AC
        RAISES  RING_3, V_AC, 0, "an unaligned address"

        CASE
        ldmxcsr [sse_control]
        xorps   xmm0, xmm0
        movaps  xmm1, [one]
        SAVED_RIP
        divps   xmm1, xmm0
        END_CASE
        BOTH_RAISE V_XM, NO_ERROR, "SSE division by 0"
sse_control:
        dd      DEFAULT_MXCSR & ~(1 << 9)       ; division by 0 is not masked
        align 16
one:    times 4 dd 1.0

; In the first round only: an emulator translates all code anew when a breakpoint comes or goes.
        [section .cases]
cases_once:
        [section .user]

        CASE
        SAVED_RIP
        nop
        END_CASE
%define case_rf 0                       ; the one fault that leaves it clear
%define case_dr7 DR7_L0                 ; R/W0 = 0, execution
        BOTH_RAISE V_DB, NO_ERROR, "instruction breakpoint"

user_end:
        [section .cases]
cases_end:

; ---------------------------------------------------------------------------------------------
; Start
; ---------------------------------------------------------------------------------------------

        [section .text]
        bits 16
start:  SETUP
        call    pic_init
        jmp     enter_long

        bits 64
long_start:
        call    set_gates
        call    set_pages
        mov     rax, cr4
        or      eax, CR4_OSFXSR | CR4_OSXMMEXCPT
        mov     cr4, rax
        mov     rax, cr0
        and     eax, ~(CR0_TS | 1 << 2) ; EM: there is an FPU
        or      eax, 1 << 1             ; MP: FWAIT respects TS
        mov     cr0, rax
        mov     [plain_cr0], rax
        mov     dword [snapshot], (cases_end - cases) / A_CASE_size
        call    pit_load
        sti

next_round:
        lea     rbx, [cases]
next_case:
        mov     [current], rbx
        mov     byte [raised], 0
        fninit
        ldmxcsr [plain_mxcsr]
        mov     edi, [rbx + A_CASE.gate]
        and     byte [rdi], 0x7f
        xor     edx, edx
        mov     cr2, rdx
        mov     edx, [rbx + A_CASE.dr7]
        test    edx, edx
        jz      .no_breakpoint
        mov     dr7, rdx
        mov     edx, [rbx + A_CASE.rip]
        mov     dr0, rdx
.no_breakpoint:
        mov     edx, [counter]
        mov     [ticks_before], edx
%assign n 8
%rep 8
        mov     r %+ n, PATTERN + n
%assign n n + 1
%endrep
        call    mode_of                 ; RDX = the mode
        movzx   ecx, word [rdx + A_MODE.ss]
        push    rcx
        mov     ecx, [rdx + A_MODE.rsp]
        push    rcx
        mov     ecx, [rbx + A_CASE.rflags]
        push    rcx
        movzx   ecx, word [rdx + A_MODE.cs]
        push    rcx
        mov     ecx, [rbx + A_CASE.entry]
        push    rcx
        mov     rax, [plain_cr0]
        xor     eax, [rbx + A_CASE.cr0]
        mov     cr0, rax
        iretq

; Vector VECTOR_END, in the ring of the case: back to the main program.
end_of_case:
        mov     rbx, [current]
        call    mode_of
        pop     rcx                     ; RIP
        pop     rcx
        movzx   edx, word [rdx + A_MODE.cs]
        MUST_BE rcx, rdx, "CS at the end"
%assign n 8
%rep 8
        MUST_BE r %+ n, PATTERN + n, "a register at the end"
%assign n n + 1
%endrep
        mov     rsp, MAIN_STACK
        mov     edi, [rbx + A_CASE.gate]
        or      byte [rdi], 0x80
        mov     rax, [plain_cr0]
        mov     cr0, rax
        cmp     dword [rbx + A_CASE.dr7], 0
        je      .no_breakpoint
        xor     eax, eax
        mov     dr7, rax
.no_breakpoint:
        add     rbx, A_CASE_size
        lea     rax, [cases_once]
        cmp     dword [snapshot + 4], 0
        jne     .told
        lea     rax, [cases_end]        ; the first round
        call    tell
.told:  cmp     rbx, rax
        jne     next_case
        inc     dword [snapshot + 4]
        mov     eax, [count]
        test    eax, eax
        jz      next_round              ; 0: for ever
        cmp     [counter], eax
        jb      next_round
        call    sum_up
        mov     al, 0
        jmp     exit_64

; RDX = the mode of the case RBX. Leaves the rest alone.
mode_of:
        movzx   edx, byte [rbx + A_CASE.mode]
        push    rax
        lea     rax, [modes]
        lea     rdx, [rax + rdx * A_MODE_size]
        pop     rax
        ret

        align 8
modes:  dw      CODE_64, DATA
        dd      STACK_0_RSP
        dw      USER_CODE_64, USER_DATA
        dd      STACK_3_RSP
        dw      CODE_32, DATA
        dd      STACK_0_RSP
        dw      USER_CODE_32, USER_DATA
        dd      STACK_3_RSP

        align 8
current:        dq 0                    ; the case that is going on
plain_cr0:      dq 0
plain_mxcsr:    dd DEFAULT_MXCSR
ticks_before:   dd 0                    ; the case
raised:         db 0                    ; the case has raised its exception
in_handler:     db 0                    ; of an exception

; Gates for all exceptions, the tick, and those of the cases. Clobbers RAX, RCX, RDI.
set_gates:
        xor     ecx, ecx
        mov     edi, IDT
        lea     rax, [stubs]
.next:  mov     [rdi], ax
        mov     dword [rdi + 2], CODE_64
        mov     byte [rdi + 5], TRAP_GATE
        add     rax, STUB_BYTES
        add     edi, 16
        inc     ecx
        cmp     ecx, EXCEPTIONS
        jne     .next
        mov     byte [abs IDT + 16 * V_BP + 5], TRAP_GATE | DPL_3
        mov     byte [abs IDT + 16 * V_OF + 5], TRAP_GATE | DPL_3
        mov     byte [abs IDT + 16 * V_DF + 4], 1     ; IST1
        SET_GATE VECTOR_IRQ0, tick, INTERRUPT_GATE, 2
        SET_GATE VECTOR_IRQ0 + 7, spurious_64, INTERRUPT_GATE, 2
        SET_GATE VECTOR_END, end_of_case, TRAP_GATE | DPL_3, 0
        SET_GATE VECTOR_NO_STACK, end_of_case, TRAP_GATE | DPL_3, 7
        SET_GATE VECTOR_RING_0, end_of_case, TRAP_GATE, 0
        SET_GATE VECTOR_ABSENT, end_of_case, DPL_3 | TRAP_GATE & 0x7f, 0
        ret
DPL_3           equ 3 << 5

; The pages of ring 3, and those that fault. Clobbers RAX, RCX, RDI.
set_pages:
        mov     edi, user_start
        mov     ecx, user_end - 1
        shr     edi, PAGE_SHIFT
        shr     ecx, PAGE_SHIFT
.user:  or      byte [PT_LOW + 8 * rdi], PAGE_USER
        inc     edi
        cmp     edi, ecx
        jbe     .user
        or      byte [abs PT_ENTRY(STACK_3 - PAGE_BYTES)], PAGE_USER

        mov     edi, PAGE_ABSENT        ; what fetches without exception end in
.end:   mov     word [rdi], INT_VECTOR_END
        add     edi, PAGE_BYTES
        cmp     edi, PAGE_NO_EXECUTE
        jbe     .end
        and     byte [abs PT_ENTRY(PAGE_ABSENT)], ~PAGE_PRESENT
        xor     byte [abs PT_ENTRY(PAGE_READ_ONLY)], PAGE_USER | PAGE_WRITABLE
        or      byte [abs PT_ENTRY(PAGE_RESERVED)], PAGE_USER
        or      byte [abs PT_ENTRY(PAGE_NO_EXECUTE)], PAGE_USER
        or      byte [abs PT_ENTRY(PAGE_RESERVED) + 6], 1 << (51 - 48)
        or      byte [abs PT_ENTRY(PAGE_NO_EXECUTE) + 7], 1 << (63 - 56)
        mov     rax, cr3                ; and forget the old ones
        mov     cr3, rax
        ret
PAGE_SHIFT      equ 12
INT_VECTOR_END  equ VECTOR_END << 8 | 0xcd

; ---------------------------------------------------------------------------------------------
; Handlers
; ---------------------------------------------------------------------------------------------

; An exception comes to its stub, which makes all stacks alike: vector, error code, RIP, CS, RFLAGS,
; RSP, SS.
        align 16
stubs:
%assign vector 0
%rep EXCEPTIONS
        align 16
%if ((WITH_ERROR_CODE) >> vector & 1) = 0
        push    NO_ERROR
%endif
        push    vector
        jmp     near exception
%assign vector vector + 1
%endrep
STUB_BYTES      equ 16

struc A_FRAME                           ; behind the registers that `exception` saves
.registers:     resq 7
.vector:        resq 1
.error:         resq 1
.rip:           resq 1
.cs:            resq 1
.rflags:        resq 1
.rsp:           resq 1
.ss:            resq 1
endstruc

exception:
        push    rbp
        push    rdi
        push    rsi
        push    rdx
        push    rcx
        push    rbx
        push    rax
        mov     rbp, rsp
        mov     rbx, [current]
        movzx   eax, byte [in_handler]
        or      al, [raised]
        MUST_BE rax, 0, "a second exception"
        mov     byte [in_handler], 1
        inc     dword [snapshot + 12]
        mov     eax, [rbx + A_CASE.instead]
        cmp     rax, [rbp + A_FRAME.vector]
        je      .go_on
        call    check_frame
        call    check_handler
        mov     byte [raised], 1
.go_on: mov     eax, [rbx + A_CASE.resume]
        mov     [rbp + A_FRAME.rip], rax
        and     dword [rbp + A_FRAME.rflags], ~(FLAGS_TF | FLAGS_AC | FLAGS_RF)
        mov     byte [in_handler], 0
        pop     rax
        pop     rbx
        pop     rcx
        pop     rdx
        pop     rsi
        pop     rdi
        pop     rbp
        add     rsp, 2 * 8              ; vector, error code
        iretq

; What was pushed. RBX = the case, RBP = the frame. Clobbers RAX, RCX, RDX, RSI, RDI.
check_frame:
        movzx   ecx, byte [rbx + A_CASE.vector]
        MUST_BE [rbp + A_FRAME.vector], rcx, "the vector"
        movzx   ecx, word [rbx + A_CASE.error]
        MUST_BE [rbp + A_FRAME.error], rcx, "the error code"
        mov     ecx, [rbx + A_CASE.rip]
        MUST_BE [rbp + A_FRAME.rip], rcx, "the saved RIP"
        mov     ecx, [rbx + A_CASE.rflags]
        or      ecx, [rbx + A_CASE.rf]
        mov     edi, [rbp + A_FRAME.rflags]
        and     edi, FLAGS_CHECKED
        cmp     byte [rbx + A_CASE.vector], V_DF
        jne     .flags
        and     edi, ~FLAGS_RF          ; an abort: the SDM does not say
        and     ecx, ~FLAGS_RF
.flags: MUST_BE rdi, rcx, "the saved RFLAGS"
        mov     ecx, [rbx + A_CASE.cr2]
        mov     rdi, cr2
        MUST_BE rdi, rcx, "CR2"
        call    mode_of
        mov     rdi, rdx
        movzx   ecx, word [rdi + A_MODE.cs]
        MUST_BE [rbp + A_FRAME.cs], rcx, "the saved CS"
        movzx   ecx, word [rdi + A_MODE.ss]
        MUST_BE [rbp + A_FRAME.ss], rcx, "the saved SS"
        mov     ecx, [rdi + A_MODE.rsp]
        MUST_BE [rbp + A_FRAME.rsp], rcx, "the saved RSP"
        ret

; The state in the handler. RBX = the case, RBP = the frame. Clobbers RAX, RCX, RDX, RSI, RDI.
check_handler:
        mov     ecx, [rbx + A_CASE.stack]
        sub     ecx, FRAME_BYTES
        lea     rdi, [rbp + A_FRAME.rip]
        MUST_BE rdi, rcx, "where the frame is"
        pushfq
        pop     rdi
        and     edi, FLAGS_CHECKED
        MUST_BE rdi, FLAGS_IF, "RFLAGS in the handler"
        mov     edi, cs
        MUST_BE rdi, CODE_64, "CS in the handler"
        cmp     byte [rbx + A_CASE.vector], V_DF
        je      .over                   ; an interrupt stack may leave SS as it was
        movzx   edi, byte [rbx + A_CASE.mode]
        xor     ecx, ecx
        test    edi, RING_3
        jnz     .inner
        mov     ecx, DATA
.inner: mov     edi, ss                 ; null when the ring has changed
        MUST_BE rdi, rcx, "SS in the handler"
.over:  ret

; IRQ 0, on IST2.
tick:   push    rax
        push    rdx
        push    rsi
        lea     rax, [rsp + 3 * 8]
        MUST_BE rax, IST2_STACK - FRAME_BYTES, "RSP in the tick's handler"
        mov     eax, [rsp + 3 * 8 + 16]
        and     eax, FLAGS_IF
        MUST_BE rax, FLAGS_IF, "IF in the tick's saved RFLAGS"
        test    byte [rsp + 3 * 8 + 8], 3
        jz      .ring_0
        MUST_BE [rsp + 3 * 8 + 24], STACK_3_RSP, "the tick's saved RSP"
        MUST_BE [rsp + 3 * 8 + 32], USER_DATA, "the tick's saved SS"
.ring_0:
        inc     dword [counter]
        movzx   eax, byte [in_handler]
        add     [snapshot + 8], eax
        OUTB    PIC1_COMMAND, EOI
        call    pit_load
        pop     rsi
        pop     rdx
        pop     rax
spurious_64:                            ; no bit is in service, so there is no EOI
        iretq

; Load channel 0: the next tick comes after 1 to 32 counts. Clobbers RAX.
pit_load:
        OUTB    PIT_CONTROL, 0x30       ; channel 0, low then high byte, mode 0, binary
        imul    eax, [counter], 11
        and     eax, 31
        inc     eax
        out     PIT_CH0, al
        OUTB    PIT_CH0, 0              ; the counter starts
        ret

; ---------------------------------------------------------------------------------------------
; What is printed
; ---------------------------------------------------------------------------------------------

; Print the text %1. Clobbers RAX, RSI.
%macro PRINT 1
        lea     rsi, [%%text]
        call    print
        jmp     %%over
%%text: db      %1, 0
%%over:
%endmacro

; Print the number %1, 32 bits. Clobbers RAX, RCX, RDX, RSI.
%macro PRINT_NUMBER 1
        mov     eax, %1
        call    print_number
%endmacro

; The line of the case that is over. Clobbers RCX, RDX, RSI.
tell:   push    rax
        push    rbx
        mov     rbx, [current]
        call    .line
        pop     rbx
        pop     rax
        ret
.line:  call    tell_name
        cmp     byte [raised], 0
        jne     .raised
        inc     dword [snapshot + 16]
        PRINT   "not raised        "
        jmp     .ticks
.raised:
        PRINT   "error "
        cmp     word [rbx + A_CASE.error], NO_ERROR
        jne     .error
        PRINT   "none"
        jmp     .rip
.error: push    rbx
        movzx   ebx, word [rbx + A_CASE.error]
        mov     ecx, 4
        call    print_hex
        pop     rbx
.rip:   PRINT   "  rip ok"
.ticks: PRINT   "  ticks "
        mov     eax, [counter]
        sub     eax, [ticks_before]
        call    print_number
        PRINT   "  "
        mov     esi, [rbx + A_CASE.text]
        call    print
        jmp     newline

; "#GP  ring 3  " of the case RBX. Clobbers RAX, RCX, RSI.
tell_name:
        OUTB    CONSOLE, '#'
        movzx   ecx, byte [rbx + A_CASE.vector]
        lea     rsi, [vector_names]
        mov     al, [rsi + 2 * rcx]
        out     CONSOLE, al
        mov     al, [rsi + 2 * rcx + 1]
        out     CONSOLE, al
        test    byte [rbx + A_CASE.mode], RING_3
        jnz     .ring_3
        PRINT   "  ring 0  "
        ret
.ring_3:
        PRINT   "  ring 3  "
        ret
vector_names:
        db      "DEDB--BPOFBRUDNMDF--TSNPSSGPPF--MFAC--XM"

; The last line. Clobbers RAX, RCX, RDX, RSI.
sum_up: PRINT_NUMBER [snapshot]
        PRINT   " cases, "
        PRINT_NUMBER [snapshot + 16]
        PRINT   " not raised; "
        PRINT_NUMBER [snapshot + 4]
        PRINT   " rounds, "
        PRINT_NUMBER [snapshot + 12]
        PRINT   " exceptions; "
        PRINT_NUMBER [counter]
        PRINT   " ticks, "
        PRINT_NUMBER [snapshot + 8]
        PRINT   " in handlers"
        jmp     newline

; Print EAX, decimal. Clobbers RAX, RCX, RDX.
print_number:
        xor     ecx, ecx
.digit: xor     edx, edx
        div     dword [ten]
        push    rdx
        inc     ecx
        test    eax, eax
        jnz     .digit
.put:   pop     rax
        add     al, '0'
        out     CONSOLE, al
        loop    .put
        ret
ten:    dd      10
