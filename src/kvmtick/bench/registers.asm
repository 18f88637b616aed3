; registers - how fast plain code runs: `count` rounds of 10 instructions that touch no memory.
; Then `counter` says how many rounds it were, and the guest leaves.

%include "../guests/common.inc"

start:  SETUP
        mov     ecx, [count]
round:  inc     eax
        add     eax, ebx
        xor     ebx, eax
        lea     edx, [eax + ebx]
        sub     esi, edx
        or      edx, esi
        and     edi, edx
        not     edi
        dec     ecx
        jnz     round

        mov     eax, [count]
        sub     eax, ecx
        mov     [counter], eax
        EXIT    0
