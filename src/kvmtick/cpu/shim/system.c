/* Model-specific registers, control registers, CPUID, random numbers and the time stamp counter. */

#include "shim.h"

enum { WRMSR_BYTES = 2 };

/* Addresses have 48 bits, or 57 with CR4.LA57; the ones above repeat the highest. */
bool is_canonical(const char *env, uint64_t address)
{
    int unused_bits = U64(env, ENV_CR + 8 * 4) & CR4_LA57 ? 64 - 57 : 64 - 48;
    return (uint64_t)((int64_t)(address << unused_bits) >> unused_bits) == address;
}

/* ---- handlers that may refuse --------------------------------------------------------------- */

/* False: #GP. After an exception the instruction counts as done and the execution ends. */
static bool handler_takes(Engine *self, int which, const unsigned long long *values, size_t count)
{
    take_gil(self);
    PyObject *result = call_handler(self, which, values, count);
    int taken = result != NULL ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    if (taken < 0) {
        keep_exception(self);
    }
    give_gil(self);
    return taken != 0;
}

/* False: the handler answered None. */
static bool handler_answers(Engine *self, int which, const unsigned long long *values,
                            size_t count, uint64_t *value)
{
    take_gil(self);
    PyObject *result = call_handler(self, which, values, count);
    bool answered = result != Py_None;
    if (result != NULL && answered) {
        *value = PyLong_AsUnsignedLongLongMask(result);
    }
    if (PyErr_Occurred()) {
        keep_exception(self);
    }
    Py_XDECREF(result);
    give_gil(self);
    return answered;
}

/* ---- model-specific registers --------------------------------------------------------------- */

/* CPU_MSRS of the contract, and what the SDM says of their values. */
static const struct {
    uint32_t index;
    unsigned offset;
    bool is_address; /* must be canonical */
    uint64_t reserved;
} CPU_MSRS[] = {
    {MSR_SYSENTER_CS, ENV_SYSENTER_CS, false, 0},
    {MSR_SYSENTER_ESP, ENV_SYSENTER_ESP, true, 0},
    {MSR_SYSENTER_EIP, ENV_SYSENTER_EIP, true, 0},
    {MSR_EFER, ENV_EFER, false, ~(uint64_t)EFER_DEFINED},
    {MSR_STAR, ENV_STAR, false, 0},
    {MSR_LSTAR, ENV_LSTAR, true, 0},
    {MSR_CSTAR, ENV_CSTAR, true, 0},
    {MSR_FMASK, ENV_FMASK, false, ~(uint64_t)UINT32_MAX},
    {MSR_FS_BASE, ENV_SEGS + SEGMENT_BYTES * FS + SEG_BASE, true, 0},
    {MSR_GS_BASE, ENV_SEGS + SEGMENT_BYTES * GS + SEG_BASE, true, 0},
    {MSR_KERNEL_GS_BASE, ENV_KERNEL_GS_BASE, true, 0},
    {MSR_TSC_AUX, ENV_TSC_AUX, false, ~(uint64_t)UINT32_MAX},
};
enum { NO_CPU_MSR = COUNT(CPU_MSRS) };

static size_t find_cpu_msr(uint32_t index)
{
    size_t i = 0;
    while (i < COUNT(CPU_MSRS) && CPU_MSRS[i].index != index) {
        i++;
    }
    return i;
}

/* False: #GP. LME may not change while paging is on; LMA is read-only. */
static bool write_efer(char *env, uint64_t value)
{
    uint64_t old = U64(env, ENV_EFER);
    if ((U64(env, ENV_CR) & CR0_PG) && ((old ^ value) & EFER_LME)) {
        return false;
    }
    U64(env, ENV_EFER) = (value & ~(uint64_t)EFER_LMA) | (old & EFER_LMA);
    return true;
}

static bool write_cpu_msr(char *env, size_t i, uint64_t value)
{
    if ((value & CPU_MSRS[i].reserved) ||
        (CPU_MSRS[i].is_address && !is_canonical(env, value))) {
        return false;
    }
    switch (CPU_MSRS[i].index) {
    case MSR_EFER:
        return write_efer(env, value);
    case MSR_SYSENTER_CS:
        U32(env, ENV_SYSENTER_CS) = (uint32_t)value;
        return true;
    default:
        U64(env, CPU_MSRS[i].offset) = value;
        return true;
    }
}

static bool write_msr(Engine *self, uint32_t index, uint64_t value)
{
    unsigned long long values[] = {index, value, self->started - 1};
    size_t i = find_cpu_msr(index);
    if (i != NO_CPU_MSR) {
        return write_cpu_msr(self->env, i, value);
    }
    return self->handlers[ON_WRMSR] != NULL &&
           handler_takes(self, ON_WRMSR, values, COUNT(values));
}

static bool read_msr(Engine *self, uint32_t index, uint64_t *value)
{
    unsigned long long values[] = {index, self->started - 1};
    size_t i = find_cpu_msr(index);
    if (i != NO_CPU_MSR) {
        *value = index == MSR_SYSENTER_CS ? U32(self->env, ENV_SYSENTER_CS)
                                          : U64(self->env, CPU_MSRS[i].offset);
        return true;
    }
    return self->handlers[ON_RDMSR] != NULL &&
           handler_answers(self, ON_RDMSR, values, COUNT(values), value);
}

EXPORTED void helper_rdmsr_x86_64(void *env)
{
    Engine *self = engine_of(env, RDMSR);
    uint64_t value = 0;
    if (self == NULL) {
        lib.genuine.rdmsr(env);
        return;
    }
    if (!read_msr(self, (uint32_t)REGISTER(env, RCX), &value)) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
    REGISTER(env, RAX) = (uint32_t)value;
    REGISTER(env, RDX) = (uint32_t)(value >> 32);
}

EXPORTED void helper_wrmsr_x86_64(void *env)
{
    Engine *self = engine_of(env, WRMSR);
    uint64_t value = REGISTER(env, RDX) << 32 | (uint32_t)REGISTER(env, RAX);
    if (self == NULL) {
        lib.genuine.wrmsr(env);
        return;
    }
    if (!write_msr(self, (uint32_t)REGISTER(env, RCX), value)) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
    leave_block_behind(self, WRMSR_BYTES);
}

/* ---- CPUID ------------------------------------------------------------------------------------ */

static bool unpack_cpuid(PyObject *result, unsigned long *answer)
{
    if (result == NULL || PyTuple_Check(result)) {
        return result != NULL && PyArg_ParseTuple(result, "kkkk:on_cpuid", &answer[0], &answer[1],
                                                  &answer[2], &answer[3]);
    }
    PyErr_SetString(PyExc_TypeError, "on_cpuid must return a tuple: EAX, EBX, ECX, EDX");
    return false;
}

static void ask_cpuid(Engine *self, uint32_t function, uint32_t index, unsigned long *answer)
{
    unsigned long long values[] = {function, index};
    if (self->handlers[ON_CPUID] == NULL) {
        return;
    }
    take_gil(self);
    PyObject *result = call_handler(self, ON_CPUID, values, COUNT(values));
    if (!unpack_cpuid(result, answer)) {
        keep_exception(self);
    }
    Py_XDECREF(result);
    give_gil(self);
}

/* EBX of leaf 0: how the vendor's name begins. */
uint32_t cpuid_vendor(Engine *self)
{
    unsigned long answer[4] = {0, 0, 0, 0};
    ask_cpuid(self, 0, 0, answer);
    return (uint32_t)answer[1];
}

/* CPUID hook; true: we have done the instruction. */
int on_cpuid(void *uc, void *engine)
{
    (void)uc;
    Engine *self = engine;
    unsigned long answer[4] = {0, 0, 0, 0};
    ask_cpuid(self, (uint32_t)REGISTER(self->env, RAX), (uint32_t)REGISTER(self->env, RCX), answer);
    REGISTER(self->env, RAX) = (uint32_t)answer[0];
    REGISTER(self->env, RBX) = (uint32_t)answer[1];
    REGISTER(self->env, RCX) = (uint32_t)answer[2];
    REGISTER(self->env, RDX) = (uint32_t)answer[3];
    return 1;
}

/* ---- control registers (SDM vol. 3A, 2.5; vol. 2B, MOV to control registers) ------------------ */

/* Whether CR0 may become this: it may not disagree with itself, nor with the mode it leads to. */
static bool cr0_is_right(const char *env, uint64_t value)
{
    bool pages = U64(env, ENV_CR) & CR0_PG, shall_page = value & CR0_PG;
    bool code_is_64bit = U32(SEGMENT(env, CS), SEG_FLAGS) & SEG_LONG;
    if (value > UINT32_MAX || (shall_page && !(value & CR0_PE)) ||
        ((value & CR0_NW) && !(value & CR0_CD))) {
        return false;
    }
    if (!pages && shall_page && (U64(env, ENV_EFER) & EFER_LME)) {
        return (U64(env, ENV_CR + 8 * 4) & CR4_PAE) && !code_is_64bit;
    }
    return shall_page || !(U32(env, ENV_HFLAGS) & HF_CS64);
}

static bool cr3_is_right(const char *env, uint64_t value)
{
    return !(U32(env, ENV_HFLAGS) & HF_LMA) || value >> PHYSICAL_ADDRESS_BITS == 0;
}

/* Bits of CR4 that are reserved when CPUID has not what they are for. */
static const struct {
    uint32_t bit;
    uint32_t function;
    int number; /* of EAX, EBX, ECX, EDX */
    uint32_t feature;
} CR4_FEATURES[] = {
    {CR4_LA57, 7, 2, 1u << 16},    {CR4_FSGSBASE, 7, 1, 1u << 0}, {CR4_OSXSAVE, 1, 2, 1u << 26},
    {CR4_SMEP, 7, 1, 1u << 7},     {CR4_SMAP, 7, 1, 1u << 20},    {CR4_PKE, 7, 2, 1u << 3},
};

static bool cr4_features_are_there(Engine *self, uint64_t set)
{
    for (size_t i = 0; i < COUNT(CR4_FEATURES); i++) {
        unsigned long answer[4] = {0, 0, 0, 0};
        if (set & CR4_FEATURES[i].bit) {
            ask_cpuid(self, CR4_FEATURES[i].function, 0, answer);
            if (!(answer[CR4_FEATURES[i].number] & CR4_FEATURES[i].feature)) {
                return false;
            }
        }
    }
    return true;
}

static bool cr4_is_right(Engine *self, uint64_t value)
{
    const char *env = self->env;
    uint64_t changed = U64(env, ENV_CR + 8 * 4) ^ value;
    bool leaves_mode = (U32(env, ENV_HFLAGS) & HF_LMA) && (changed & (CR4_PAE | CR4_LA57));
    return (value & ~(uint64_t)CR4_DEFINED) == 0 && !leaves_mode &&
           cr4_features_are_there(self, changed & value);
}

/* False: #GP. */
static bool write_cr8(Engine *self, uint64_t value)
{
    unsigned long long values[] = {value, self->started - 1};
    if (value > 15) {
        return false;
    }
    return self->handlers[ON_CR8_WRITE] == NULL ||
           handler_takes(self, ON_CR8_WRITE, values, COUNT(values));
}

static uint64_t read_cr8(Engine *self)
{
    unsigned long long values[] = {self->started - 1};
    uint64_t value = 0;
    if (self->handlers[ON_CR8_READ] != NULL) {
        handler_answers(self, ON_CR8_READ, values, COUNT(values), &value);
    }
    return value;
}

static bool write_control_register(Engine *self, int number, uint64_t value)
{
    switch (number) {
    case 0:
        if (!cr0_is_right(self->env, value)) {
            return false;
        }
        value &= CR0_DEFINED; /* reserved bits stay 0 */
        break;
    case 3:
        if (!cr3_is_right(self->env, value)) {
            return false;
        }
        break;
    case 4:
        if (!cr4_is_right(self, value)) {
            return false;
        }
        break;
    case 8:
        return write_cr8(self, value);
    default:
        break;
    }
    lib.genuine.write_cr(self->env, number, value);
    return true;
}

/* MOV to a control register, and LMSW. */
EXPORTED void helper_write_crN_x86_64(void *env, int number, uint64_t value)
{
    Engine *self = engine_of(env, WRITE_CR);
    if (self == NULL) {
        lib.genuine.write_cr(env, number, value);
        return;
    }
    if (!write_control_register(self, number, value)) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
}

EXPORTED uint64_t helper_read_crN_x86_64(void *env, int number)
{
    Engine *self = engine_of(env, READ_CR);
    if (self != NULL && number == 8) {
        return read_cr8(self);
    }
    return lib.genuine.read_cr(env, number);
}

/* ---- task register ------------------------------------------------------------------------------ */

/* The library takes a null selector, and aborts when it needs a TSS then. */
EXPORTED void helper_ltr_x86_64(void *env, int selector)
{
    if (engine_of(env, LTR) != NULL && (selector & 0xfffc) == 0) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
    lib.genuine.ltr(env, selector); /* wants our return address: this is a jump */
}

/* ---- random numbers --------------------------------------------------------------------------- */

/* splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014). */
static uint64_t next_random(Engine *self)
{
    uint64_t z = self->random += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* RDRAND and RDSEED: CF says that there was a number, the other flags are cleared. */
EXPORTED uint64_t helper_rdrand_x86_64(void *env)
{
    Engine *self = engine_of(env, RDRAND);
    if (self == NULL) {
        return lib.genuine.rdrand(env);
    }
    U64(env, ENV_CC_SRC) = FLAGS_CF;
    return next_random(self);
}

/* ---- time stamp counter -------------------------------------------------------------------- */

__extension__ typedef unsigned __int128 Product;

uint64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)(now.tv_sec * 1000000000ll + now.tv_nsec);
}

static uint64_t machine_tsc(const Engine *self)
{
    if (!self->live_tsc) {
        return self->tsc + self->started - 1;
    }
    return monotonic_ns();
}

static uint64_t read_tsc(const Engine *self)
{
    uint64_t elapsed_ns = machine_tsc(self) - self->tsc_at_ns, product;
    if (!__builtin_mul_overflow(elapsed_ns, self->tsc_khz, &product)) {
        return self->tsc_value + product / 1000000; /* a division of 128 bits is a call */
    }
    return self->tsc_value + (uint64_t)((Product)elapsed_ns * self->tsc_khz / 1000000);
}

static void put_tsc(Engine *self, char *env, uintptr_t return_address)
{
    if ((U64(env, ENV_CR + 8 * 4) & CR4_TSD) && (U32(env, ENV_HFLAGS) & HF_CPL)) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, return_address);
    }
    uint64_t tsc = read_tsc(self);
    REGISTER(env, RAX) = (uint32_t)tsc;
    REGISTER(env, RDX) = (uint32_t)(tsc >> 32);
}

/* The library's own look for the instruction in its block each time, for hooks. */
EXPORTED void helper_rdtsc_x86_64(void *env)
{
    Engine *self = engine_of(env, READ_TSC);
    if (self == NULL) {
        lib.genuine.rdtsc(env);
        return;
    }
    put_tsc(self, env, (uintptr_t)__builtin_return_address(0));
}

EXPORTED void helper_rdtscp_x86_64(void *env)
{
    Engine *self = engine_of(env, READ_TSC_AUX);
    if (self == NULL) {
        lib.genuine.rdtscp(env);
        return;
    }
    put_tsc(self, env, (uintptr_t)__builtin_return_address(0));
    REGISTER(env, RCX) = (uint32_t)U64(env, ENV_TSC_AUX);
}
