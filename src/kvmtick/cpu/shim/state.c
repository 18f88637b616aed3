/* What the guest's state says: flags, shadows, the code at an address. */

#include "shim.h"

uint64_t compute_rflags(const char *env)
{
    uint64_t arithmetic = lib.cc_compute_all(U64(env, ENV_CC_DST), U64(env, ENV_CC_SRC),
                                             U64(env, ENV_CC_SRC2), I32(env, ENV_CC_OP));
    uint64_t rest = U64(env, ENV_EFLAGS) & ~(uint64_t)(FLAGS_ARITHMETIC | FLAGS_DF);
    return rest | arithmetic | (I32(env, ENV_DF) & FLAGS_DF) | 2;
}

/* The bytes the guest has at `linear`, or NULL. Paging is off: linear is physical. */
const uint8_t *code_at(const Engine *self, uint64_t linear, uint32_t size_bytes)
{
    for (int i = 0; i < self->ram_count; i++) {
        const RamRange *ram = &self->ram[i];
        if (linear >= ram->gpa && linear + size_bytes <= ram->gpa + ram->size_bytes) {
            return (const uint8_t *)ram->view.buf + (linear - ram->gpa);
        }
    }
    return NULL;
}

bool is_prefix(uint8_t byte)
{
    switch (byte) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: /* segments */
    case 0x66: case 0x67:                                             /* sizes */
    case 0xf0: case 0xf2: case 0xf3:                                  /* LOCK, REPNE, REP */
        return true;
    default:
        return false;
    }
}

static bool is_string_operation(uint8_t opcode)
{
    return (opcode >= 0x6c && opcode <= 0x6f) || (opcode >= 0xa4 && opcode <= 0xa7) ||
           (opcode >= 0xaa && opcode <= 0xaf);
}

/* QEMU runs a REP string instruction once more with the count at zero, only to step over it. The
 * processor has no such step: it is neither counted nor a boundary. */
bool steps_over_finished_rep(const Engine *self, uint64_t address, uint32_t size_bytes)
{
    uint64_t count = REGISTER(self->env, RCX);
    if (likely(count & 0xffff)) {
        return false;
    }
    const uint8_t *code = code_at(self, address, size_bytes);
    bool repeated = false;
    bool wide = (U32(self->env, ENV_HFLAGS) & HF_CS32) != 0;
    if (code == NULL || size_bytes > 15) {
        return false;
    }
    uint32_t i = 0;
    for (; i < size_bytes && is_prefix(code[i]); i++) {
        repeated |= code[i] == 0xf2 || code[i] == 0xf3;
        wide ^= code[i] == 0x67;
    }
    return repeated && i < size_bytes && is_string_operation(code[i]) &&
           (!wide || (uint32_t)count == 0);
}

/* QEMU has one flag for both shadows; the instruction that cast it tells which. */
static unsigned shadow_kind(const Engine *self)
{
    uint64_t address = self->last_address;
    for (int i = 0; i < 14; i++, address++) {
        const uint8_t *code = code_at(self, address, 1);
        if (code == NULL || !is_prefix(*code)) {
            return code != NULL && *code == 0xfb ? SHADOW_STI : SHADOW_MOV_SS;
        }
    }
    return SHADOW_MOV_SS;
}

unsigned compute_interruptibility(const Engine *self)
{
    unsigned state = U32(self->env, ENV_HFLAGS2) & HF2_NMI ? SHADOW_NMI : 0;
    if (U32(self->env, ENV_HFLAGS) & HF_INHIBIT_IRQ) {
        state |= shadow_kind(self);
    }
    return state;
}
