/* Accesses to I/O ports, and who may make them (SDM vol. 1, 19.5): the library lets everybody. */

#include "shim.h"

typedef void Check(void *env, uint32_t port);

static bool needs_permission(const char *env)
{
    uint32_t hflags = U32(env, ENV_HFLAGS);
    uint64_t flags = U64(env, ENV_EFLAGS);
    return (hflags & HF_PE) && ((hflags & HF_CPL) > (flags >> 12 & 3) || (flags & FLAGS_VM));
}

/* #GP(0) unless the TSS's I/O permission map allows the port. */
static void check_permission(Engine *self, Check *check, uint32_t port, void *return_address)
{
    if (unlikely(needs_permission(self->env))) {
        lib.restore_state(self->cpu, (uintptr_t)return_address, false);
        check(self->env, port);
    }
}

/* For others the library's own wants the return address into translated code: that is a jump. */
#define STAND_IN_FOR_IN(name, size, type)                                                        \
    EXPORTED uint64_t name(void *env, uint32_t port)                                             \
    {                                                                                            \
        Engine *self = engine_of(env, INS + size);                                               \
        void *return_address = __builtin_return_address(0);                                      \
        if (self == NULL) {                                                                      \
            return lib.genuine.in[size](env, port);                                              \
        }                                                                                        \
        check_permission(self, lib.check_port[size], port, return_address);                      \
        return (type)read_port(self, port, sizeof(type), (uintptr_t)return_address);             \
    }

#define STAND_IN_FOR_OUT(name, size, type)                                                       \
    EXPORTED void name(void *env, uint32_t port, uint32_t value)                                 \
    {                                                                                            \
        Engine *self = engine_of(env, OUTS + size);                                              \
        void *return_address = __builtin_return_address(0);                                      \
        if (self == NULL) {                                                                      \
            lib.genuine.out[size](env, port, value);                                             \
            return;                                                                              \
        }                                                                                        \
        check_permission(self, lib.check_port[size], port, return_address);                      \
        write_port(self, port, sizeof(type), (type)value, (uintptr_t)return_address);            \
    }

STAND_IN_FOR_IN(helper_inb_x86_64, BYTE, uint8_t)
STAND_IN_FOR_IN(helper_inw_x86_64, WORD, uint16_t)
STAND_IN_FOR_IN(helper_inl_x86_64, LONG, uint32_t)
STAND_IN_FOR_OUT(helper_outb_x86_64, BYTE, uint8_t)
STAND_IN_FOR_OUT(helper_outw_x86_64, WORD, uint16_t)
STAND_IN_FOR_OUT(helper_outl_x86_64, LONG, uint32_t)
