; tick-msi - the PIT's tick as a message: no PIC, no IOAPIC.
;
; The VMM routes GSI 0 to an MSI of vector 0x43, straight to the local APIC. Nothing tells the PIT
; that such a tick was acknowledged, so run it with reinjection off: with it on, one tick comes.
; Takes `count` ticks (0: for ever), then leaves with code 0. `param_ms`: not used.

%include "common.inc"
%include "apic.inc"
%include "apic-ticks.inc"

VECTOR_TICK     equ 0x43

start:  SETUP
        SET_VECTOR VECTOR_TICK, apic_tick
        call    apic_init
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start
        jmp     take_ticks
