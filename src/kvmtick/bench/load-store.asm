; load-store - how fast memory is read and written: `count` rounds of 8 instructions, 2 of them
; loads and 2 stores. Then `counter` says how many rounds it were, and the guest leaves.

%include "../guests/common.inc"

SLOTS           equ 0x5000              ; 4 words on a page without code

start:  SETUP
        mov     ecx, [count]
round:  mov     eax, [SLOTS]
        add     eax, ecx
        mov     [SLOTS + 4], eax
        mov     ebx, [SLOTS + 8]
        xor     ebx, eax
        mov     [SLOTS + 12], ebx
        dec     ecx
        jnz     round

        mov     eax, [count]
        sub     eax, ecx
        mov     [counter], eax
        EXIT    0
