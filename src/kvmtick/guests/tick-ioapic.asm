; tick-ioapic - the PIT's tick through the IOAPIC, as any system with an APIC has it.
;
; The VMM routes GSI 0 to IOAPIC pin 2. The pin sends vector 0x40, edge triggered, to this CPU; the
; PICs are closed and the EOI goes to the local APIC. Takes `count` ticks (0: for ever), then leaves
; with code 0. `param_ms`: not used.

%include "common.inc"
%include "apic.inc"
%include "apic-ticks.inc"

VECTOR_TICK     equ 0x40
PIN             equ 2                   ; where a PC has its timer

start:  SETUP
        SET_VECTOR VECTOR_TICK, apic_tick
        call    apic_init
        mov     eax, [dword LAPIC + LAPIC_ID]
        and     eax, 0xff000000         ; destination, physical: bits 63:56 of the entry
        IOAPIC_WRITE IOAPIC_PIN + 2 * PIN + 1, eax
        IOAPIC_WRITE IOAPIC_PIN + 2 * PIN, VECTOR_TICK  ; fixed, edge, active high; unmasks it
        mov     al, 0x34                ; channel 0, low then high byte, mode 2, binary
        call    pit_start
        jmp     take_ticks
