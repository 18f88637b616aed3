/* Model-specific registers, CPUID and the time stamp counter. */

#include "shim.h"

/* ---- model-specific registers --------------------------------------------------------------- */

/* CPU_MSRS of the contract: the library's own. */
static bool handlers_answer_msr(uint32_t index)
{
    bool sysenter = index >= MSR_SYSENTER_CS && index <= MSR_SYSENTER_EIP;
    bool long_mode = index >= MSR_EFER && index <= MSR_FMASK;
    bool base_or_aux = index >= MSR_FS_BASE && index <= MSR_TSC_AUX;
    return !sysenter && !long_mode && !base_or_aux;
}

/* False: #GP. After an exception the instruction counts as done and the execution ends. */
static bool write_msr(Engine *self, uint32_t index, uint64_t value)
{
    unsigned long long values[] = {index, value, self->started - 1};
    if (self->handlers[ON_WRMSR] == NULL) {
        return false;
    }
    take_gil(self);
    PyObject *result = call_handler(self, ON_WRMSR, values, COUNT(values));
    int taken = result != NULL ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    if (taken < 0) {
        keep_exception(self);
    }
    give_gil(self);
    return taken != 0;
}

static bool read_msr(Engine *self, uint32_t index, uint64_t *value)
{
    unsigned long long values[] = {index, self->started - 1};
    if (self->handlers[ON_RDMSR] == NULL) {
        return false;
    }
    take_gil(self);
    PyObject *result = call_handler(self, ON_RDMSR, values, COUNT(values));
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


EXPORTED void helper_rdmsr_x86_64(void *env)
{
    Engine *self = engine_of(env, RDMSR);
    uint64_t value = 0;
    if (self == NULL || !handlers_answer_msr((uint32_t)REGISTER(env, RCX))) {
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
    if (self == NULL || !handlers_answer_msr((uint32_t)REGISTER(env, RCX))) {
        lib.genuine.wrmsr(env);
        return;
    }
    if (!write_msr(self, (uint32_t)REGISTER(env, RCX), value)) {
        lib.raise_exception(env, GENERAL_PROTECTION, 0, (uintptr_t)__builtin_return_address(0));
    }
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

static void ask_cpuid(Engine *self, unsigned long *answer)
{
    unsigned long long values[] = {(uint32_t)REGISTER(self->env, RAX),
                                   (uint32_t)REGISTER(self->env, RCX)};
    take_gil(self);
    PyObject *result = call_handler(self, ON_CPUID, values, COUNT(values));
    if (!unpack_cpuid(result, answer)) {
        keep_exception(self);
    }
    Py_XDECREF(result);
    give_gil(self);
}

/* CPUID hook; true: we have done the instruction. */
int on_cpuid(void *uc, void *engine)
{
    (void)uc;
    Engine *self = engine;
    unsigned long answer[4] = {0, 0, 0, 0};
    if (self->handlers[ON_CPUID] != NULL) {
        ask_cpuid(self, answer);
    }
    REGISTER(self->env, RAX) = (uint32_t)answer[0];
    REGISTER(self->env, RBX) = (uint32_t)answer[1];
    REGISTER(self->env, RCX) = (uint32_t)answer[2];
    REGISTER(self->env, RDX) = (uint32_t)answer[3];
    return 1;
}

/* ---- time stamp counter -------------------------------------------------------------------- */

static uint64_t read_tsc(const Engine *self)
{
    if (!self->host_tsc) {
        return self->tsc + self->started - 1;
    }
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)(now.tv_sec * 1000000000ll + now.tv_nsec - self->host_tsc_offset_ns);
}

/* RDTSC and RDTSCP hooks; true: we have done the instruction. */
int on_rdtsc(void *uc, void *engine)
{
    (void)uc;
    Engine *self = engine;
    uint64_t tsc = read_tsc(self);
    REGISTER(self->env, RAX) = (uint32_t)tsc;
    REGISTER(self->env, RDX) = (uint32_t)(tsc >> 32);
    return 1;
}

int on_rdtscp(void *uc, void *engine)
{
    Engine *self = engine;
    REGISTER(self->env, RCX) = 0; /* IA32_TSC_AUX */
    return on_rdtsc(uc, engine);
}
