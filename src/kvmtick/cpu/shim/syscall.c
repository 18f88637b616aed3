/* SYSCALL, SYSRET, SYSENTER and SYSEXIT (SDM vol. 2B), which the library leaves out or does as
 * AMD's processors do. In compatibility mode SYSCALL goes by CPUID's vendor, as with KVM
 * (em_syscall): AMD's and Hygon's have it (AMD64 Architecture Programmer's Manual vol. 3), Intel's
 * #UD. In legacy mode, where AMD's have it too, it is #UD here. */

#include "shim.h"

#define FLAT_CODE 0x809b00u  /* present, code, readable, accessed, 4 KiB granularity */
#define FLAT_STACK 0xc09300u /* present, data, writable, accessed, 4 KiB granularity, 32 bits */
#define USER_DPL (3u << SEG_DPL_SHIFT)
#define USER_RPL 3u
#define VENDOR_AMD 0x68747541u   /* "Auth", of AuthenticAMD */
#define VENDOR_HYGON 0x6f677948u /* "Hygo", of HygonGenuine */

static void load_flat(char *segment, uint32_t selector, uint32_t flags)
{
    U32(segment, SEG_SELECTOR) = selector & 0xffff;
    U64(segment, SEG_BASE) = 0;
    U32(segment, SEG_LIMIT) = UINT32_MAX;
    U32(segment, SEG_FLAGS) = flags;
}

static void enter_ring_0(char *env, uint32_t selector, bool is_64bit)
{
    load_flat(SEGMENT(env, CS), selector & ~3u, FLAT_CODE | (is_64bit ? SEG_LONG : SEG_BIG));
    load_flat(SEGMENT(env, SS), (selector & ~3u) + 8, FLAT_STACK);
    update_hflags(env);
}

static void enter_ring_3(char *env, uint32_t code, uint32_t stack, bool is_64bit)
{
    uint32_t width = is_64bit ? SEG_LONG : SEG_BIG;
    load_flat(SEGMENT(env, CS), code | USER_RPL, FLAT_CODE | USER_DPL | width);
    load_flat(SEGMENT(env, SS), stack | USER_RPL, FLAT_STACK | USER_DPL);
    update_hflags(env);
}

/* SYSRET, and Intel's SYSCALL, exist in 64-bit mode only, and when EFER.SCE says so. */
static bool has_syscall(const char *env)
{
    return (U32(env, ENV_HFLAGS) & HF_CS64) && (U64(env, ENV_EFER) & EFER_SCE);
}

static bool has_compatibility_syscall(Engine *self)
{
    const char *env = self->env;
    if (!(U32(env, ENV_HFLAGS) & HF_LMA) || !(U64(env, ENV_EFER) & EFER_SCE)) {
        return false;
    }
    uint32_t vendor = cpuid_vendor(self);
    return vendor == VENDOR_AMD || vendor == VENDOR_HYGON;
}

static void do_syscall(Engine *self, unsigned size_bytes)
{
    char *env = self->env;
    uint64_t flags = compute_rflags(env) & ~(uint64_t)FLAGS_RF;
    bool is_64bit = U32(env, ENV_HFLAGS) & HF_CS64;
    REGISTER(env, RCX) = U64(env, ENV_EIP) + size_bytes;
    REGISTER(env, R11) = flags;
    U64(env, ENV_EIP) = U64(env, is_64bit ? ENV_LSTAR : ENV_CSTAR);
    flags &= ~U64(env, ENV_FMASK);
    lib.reg_write(self->uc, UC_REG_RFLAGS, &flags);
    enter_ring_0(env, (uint32_t)(U64(env, ENV_STAR) >> 32), true);
}

EXPORTED void helper_syscall_x86_64(void *env, int size_bytes)
{
    Engine *self = engine_of(env, SYSCALL);
    if (self == NULL) {
        lib.genuine.syscall(env, size_bytes);
        return;
    }
    if (!has_syscall(env) && !has_compatibility_syscall(self)) {
        lib.raise_exception(env, INVALID_OPCODE, 0, (uintptr_t)__builtin_return_address(0));
    }
    do_syscall(self, (unsigned)size_bytes);
}

#define SYSRET_FLAGS 0x3c7fd7u

static void do_sysret(Engine *self, bool is_64bit)
{
    char *env = self->env;
    uint64_t flags = (REGISTER(env, R11) & SYSRET_FLAGS) | 2;
    uint32_t selector = (uint32_t)(U64(env, ENV_STAR) >> 48);
    U64(env, ENV_EIP) = is_64bit ? REGISTER(env, RCX) : (uint32_t)REGISTER(env, RCX);
    lib.reg_write(self->uc, UC_REG_RFLAGS, &flags);
    enter_ring_3(env, selector + (is_64bit ? 16 : 0), selector + 8, is_64bit);
}

EXPORTED void helper_sysret_x86_64(void *env, int operand_size)
{
    Engine *self = engine_of(env, SYSRET);
    bool is_64bit = operand_size == OPERAND_64_BITS;
    if (self == NULL) {
        lib.genuine.sysret(env, operand_size);
        return;
    }
    if (!has_syscall(env)) {
        lib.raise_exception(env, INVALID_OPCODE, 0, (uintptr_t)__builtin_return_address(0));
    }
    bool lands = !is_64bit || is_canonical(env, REGISTER(env, RCX));
    if ((U32(env, ENV_HFLAGS) & HF_CPL) || !lands) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
    do_sysret(self, is_64bit);
}

/* IA32_SYSENTER_CS holds a null selector: #GP. */
static bool has_sysenter(const char *env)
{
    return U32(env, ENV_SYSENTER_CS) & 0xfffc;
}

EXPORTED void helper_sysenter_x86_64(void *env, int size_bytes)
{
    Engine *self = engine_of(env, SYSENTER);
    if (self == NULL) {
        lib.genuine.sysenter(env, size_bytes);
        return;
    }
    if (!has_sysenter(env)) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
    bool is_64bit = U32(env, ENV_HFLAGS) & HF_LMA;
    uint64_t width = is_64bit ? UINT64_MAX : UINT32_MAX;
    U64(env, ENV_EFLAGS) &= ~(uint64_t)(FLAGS_VM | FLAGS_IF | FLAGS_RF);
    REGISTER(env, RSP) = U64(env, ENV_SYSENTER_ESP) & width;
    U64(env, ENV_EIP) = U64(env, ENV_SYSENTER_EIP) & width;
    enter_ring_0(env, U32(env, ENV_SYSENTER_CS), is_64bit);
}

EXPORTED void helper_sysexit_x86_64(void *env, int operand_size)
{
    Engine *self = engine_of(env, SYSEXIT);
    bool is_64bit = operand_size == OPERAND_64_BITS;
    if (self == NULL) {
        lib.genuine.sysexit(env, operand_size);
        return;
    }
    uint64_t stack = REGISTER(env, RCX), target = REGISTER(env, RDX);
    bool lands = !is_64bit || (is_canonical(env, stack) && is_canonical(env, target));
    if (!has_sysenter(env) || (U32(env, ENV_HFLAGS) & HF_CPL) || !lands) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
    uint32_t code = (U32(env, ENV_SYSENTER_CS) & ~3u) + (is_64bit ? 32 : 16);
    REGISTER(env, RSP) = is_64bit ? stack : (uint32_t)stack;
    U64(env, ENV_EIP) = is_64bit ? target : (uint32_t)target;
    enter_ring_3(env, code, code + 8, is_64bit);
}
