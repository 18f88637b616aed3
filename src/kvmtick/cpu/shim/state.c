/* What the guest's state says: flags, shadows, the code at an address. */

#include "shim.h"

uint64_t compute_rflags(const char *env)
{
    uint64_t arithmetic = lib.cc_compute_all(U64(env, ENV_CC_DST), U64(env, ENV_CC_SRC),
                                             U64(env, ENV_CC_SRC2), I32(env, ENV_CC_OP));
    uint64_t rest = U64(env, ENV_EFLAGS) & ~(uint64_t)(FLAGS_ARITHMETIC | FLAGS_DF);
    return rest | arithmetic | (I32(env, ENV_DF) & FLAGS_DF) | 2;
}

/* Where the next instruction is. */
uint64_t linear_rip(const char *env)
{
    return U64(env, ENV_EIP) + U64(SEGMENT(env, CS), SEG_BASE);
}

/* The byte the guest has at `linear`, or NULL. Looks at no rights and sets no accessed bits. */
const uint8_t *code_at(Engine *self, uint64_t linear)
{
    uint64_t gpa = (uint32_t)linear;
    uint64_t attributes[2]; /* MemTxAttrs, and more */
    if (U64(self->env, ENV_CR) & CR0_PG) {
        uint64_t page = lib.page_of(self->cpu, linear, attributes);
        if (page == NO_ADDRESS) {
            return NULL;
        }
        gpa = page | linear % PAGE_BYTES;
    }
    const RamRange *ram = ram_at(self, gpa);
    return ram == NULL ? NULL : (const uint8_t *)ram->view.buf + (gpa - ram->gpa);
}

static bool is_prefix(const Engine *self, uint8_t byte)
{
    switch (byte) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: /* segments */
    case 0x66: case 0x67:                                             /* sizes */
    case 0xf0: case 0xf2: case 0xf3:                                  /* LOCK, REPNE, REP */
        return true;
    default:
        return (byte & 0xf0) == 0x40 && (U32(self->env, ENV_HFLAGS) & HF_CS64); /* REX */
    }
}

/* The first byte of the instruction at `linear` that is no prefix, 0 when there is none. */
uint8_t opcode_at(Engine *self, uint64_t linear, Prefixes *prefixes)
{
    *prefixes = (Prefixes){0};
    for (int i = 0; i < INSTRUCTION_BYTES_MAX; i++) {
        const uint8_t *code = code_at(self, linear + i);
        if (code == NULL) {
            return 0;
        }
        if (!is_prefix(self, *code)) {
            return *code;
        }
        prefixes->rep |= *code == 0xf2 || *code == 0xf3;
        prefixes->address_size |= *code == 0x67;
        prefixes->size_bytes++;
    }
    return 0;
}

bool is_string_operation(uint8_t opcode)
{
    return (opcode >= 0x6c && opcode <= 0x6f) || (opcode >= 0xa4 && opcode <= 0xa7) ||
           (opcode >= 0xaa && opcode <= 0xaf);
}

/* The bits of RCX that count the rounds of a REP. */
uint64_t count_mask(const Engine *self, bool address_size_prefix)
{
    uint32_t hflags = U32(self->env, ENV_HFLAGS);
    if (hflags & HF_CS64) {
        return address_size_prefix ? UINT32_MAX : UINT64_MAX;
    }
    return !(hflags & HF_CS32) == address_size_prefix ? UINT32_MAX : UINT16_MAX;
}

/* The next instruction is no further round of a REP. */
void forget_last_instruction(Engine *self)
{
    self->last_address = NO_ADDRESS;
    self->last_block = 0;
}

/* QEMU runs a REP string instruction once more with the count at zero, only to step over it. The
 * processor has no such step: it is neither counted nor a boundary. */
bool steps_over_finished_rep(Engine *self, uint64_t address)
{
    uint64_t count = REGISTER(self->env, RCX);
    Prefixes prefixes;
    if (likely(count & 0xffff)) {
        return false;
    }
    return is_string_operation(opcode_at(self, address, &prefixes)) && prefixes.rep &&
           (count & count_mask(self, prefixes.address_size)) == 0;
}

/* The linear address of the instruction that called a helper from `return_address`. */
uint64_t running_instruction(const Engine *self, uintptr_t return_address)
{
    char *env = self->env;
    if (self->exact) {
        return self->last_address;
    }
    uint64_t eip = U64(env, ENV_EIP);
    uint32_t cc_op = U32(env, ENV_CC_OP);
    lib.restore_state(self->cpu, return_address, false);
    uint64_t address = linear_rip(env);
    U64(env, ENV_EIP) = eip;
    U32(env, ENV_CC_OP) = cc_op;
    return address;
}

/* What holds behind the last instruction, or in a handler behind the access. */
void set_interruptibility(Engine *self, unsigned state)
{
    uint32_t hflags = U32(self->env, ENV_HFLAGS) & ~HF_INHIBIT_IRQ;
    uint32_t hflags2 = U32(self->env, ENV_HFLAGS2) & ~HF2_NMI;
    U32(self->env, ENV_HFLAGS) = hflags | (state & (SHADOW_STI | SHADOW_MOV_SS) ? HF_INHIBIT_IRQ : 0);
    U32(self->env, ENV_HFLAGS2) = hflags2 | (state & SHADOW_NMI ? HF2_NMI : 0);
    self->sti_at = !(state & SHADOW_STI) ? NEVER : self->running ? self->started : 0;
    self->interruptibility = state;
}

/* QEMU has one flag for both shadows; the instruction that cast it tells which. */
unsigned compute_interruptibility(const Engine *self)
{
    unsigned state = U32(self->env, ENV_HFLAGS2) & HF2_NMI ? SHADOW_NMI : 0;
    if (U32(self->env, ENV_HFLAGS) & HF_INHIBIT_IRQ) {
        state |= self->started == self->sti_at ? SHADOW_STI : SHADOW_MOV_SS;
    }
    return state;
}
