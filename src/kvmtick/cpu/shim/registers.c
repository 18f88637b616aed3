/* Reset states, and the registers by name. */

#include "shim.h"

static void set_segment(char *segment, uint32_t selector, uint64_t base, uint32_t flags)
{
    U32(segment, SEG_SELECTOR) = selector;
    U64(segment, SEG_BASE) = base;
    U32(segment, SEG_LIMIT) = 0xffff;
    U32(segment, SEG_FLAGS) = flags;
}

/* Real mode, whatever the mode was: Unicorn opens the CPU half in long mode, which neither CR0
 * nor EFER writes would leave. */
void enter_real_mode(char *env)
{
    U64(env, ENV_EFER) = 0;
    U32(env, ENV_HFLAGS) &=
        ~(HF_CPL | HF_INHIBIT_IRQ | HF_CS32 | HF_SS32 | HF_LMA | HF_CS64);
    U32(env, ENV_HFLAGS) |= HF_ADDSEG;
    lib.update_cr0(env, CR0_RESET);
    lib.update_cr3(env, 0);
    lib.update_cr4(env, 0);
    U64(env, ENV_CR + 8 * 2) = 0;
    set_segment(env + ENV_GDT, 0, 0, 0);
    set_segment(env + ENV_IDT, 0, 0, 0);
    set_segment(env + ENV_LDT, 0, 0, LDT_FLAGS);
    set_segment(env + ENV_TR, 0, 0, BUSY_TSS_FLAGS);
    for (int i = ES; i <= GS; i++) {
        set_segment(SEGMENT(env, i), 0, 0, DATA_SEGMENT_FLAGS);
    }
}

static int start_at(Engine *self, uint32_t eip)
{
    uint64_t flags = 2;
    char *env = self->env;
    for (int i = 0; i < 16; i++) {
        REGISTER(env, i) = 0;
    }
    REGISTER(env, RDX) = SANDYBRIDGE_SIGNATURE;
    U64(env, ENV_EIP) = eip;
    U32(env, ENV_HFLAGS2) &= ~HF2_NMI;
    I32(env, ENV_OLD_EXCEPTION) = -1;
    self->last_address = NO_ADDRESS;
    int error = lib.reg_write(self->uc, UC_REG_RFLAGS, &flags);
    return error ? error : lib.ctl(self->uc, UC_CTL_FLUSH_TLB);
}

int reset_cpu(Engine *self, uint16_t cs, uint16_t ip)
{
    enter_real_mode(self->env);
    set_segment(SEGMENT(self->env, CS), cs, (uint64_t)cs << 4, CODE_SEGMENT_FLAGS);
    return start_at(self, ip);
}

static void set_flat_segment(char *segment, uint32_t selector, uint32_t flags)
{
    set_segment(segment, selector, 0, flags);
    U32(segment, SEG_LIMIT) = UINT32_MAX;
}

int reset_cpu_protected(Engine *self, uint32_t eip)
{
    char *env = self->env;
    enter_real_mode(env);
    lib.update_cr0(env, CR0_RESET | CR0_PE);
    U32(env, ENV_HFLAGS) &= ~HF_ADDSEG; /* all bases are 0 */
    U32(env, ENV_HFLAGS) |= HF_CS32 | HF_SS32;
    U32(env + ENV_GDT, SEG_LIMIT) = 0;
    U32(env + ENV_IDT, SEG_LIMIT) = 0;
    for (int i = ES; i <= GS; i++) {
        set_flat_segment(SEGMENT(env, i), FLAT_DATA_SELECTOR, FLAT_DATA_FLAGS);
    }
    set_flat_segment(SEGMENT(env, CS), FLAT_CODE_SELECTOR, FLAT_CODE_FLAGS);
    return start_at(self, eip);
}

/* ---- Engine: registers ---------------------------------------------------------------------------- */

static const char *const GENERAL[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                      "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
static const char *const SEGMENTS[] = {"es", "cs", "ss", "ds", "fs", "gs"};
static const char *const CONTROL[] = {"cr0", NULL, "cr2", "cr3", "cr4"};

static bool put(PyObject *registers, const char *name, uint64_t value)
{
    PyObject *number = PyLong_FromUnsignedLongLong(value);
    bool done = number != NULL && PyDict_SetItemString(registers, name, number) == 0;
    Py_XDECREF(number);
    return done;
}

static bool put_all(PyObject *registers, const char *env)
{
    for (size_t i = 0; i < COUNT(GENERAL); i++) {
        if (!put(registers, GENERAL[i], REGISTER(env, i))) return false;
    }
    for (size_t i = 0; i < COUNT(SEGMENTS); i++) {
        if (!put(registers, SEGMENTS[i], U32(SEGMENT(env, i), SEG_SELECTOR))) return false;
    }
    for (size_t i = 0; i < COUNT(CONTROL); i++) {
        if (CONTROL[i] && !put(registers, CONTROL[i], U64(env, ENV_CR + 8 * i))) return false;
    }
    return put(registers, "rip", U64(env, ENV_EIP)) && put(registers, "rflags", compute_rflags(env));
}

PyObject *engine_registers(PyObject *object, PyObject *unused)
{
    (void)unused;
    Engine *self = (Engine *)object;
    PyObject *registers = check_open(self) ? PyDict_New() : NULL;
    if (registers != NULL && !put_all(registers, self->env)) {
        Py_CLEAR(registers);
    }
    return registers;
}

static bool set_one(Engine *self, const char *name, uint64_t value)
{
    for (size_t i = 0; i < COUNT(GENERAL); i++) {
        if (strcmp(name, GENERAL[i]) == 0) {
            REGISTER(self->env, i) = value;
            return true;
        }
    }
    if (strcmp(name, "rip") == 0) {
        U64(self->env, ENV_EIP) = value;
        self->last_address = NO_ADDRESS;
        return true;
    }
    if (strcmp(name, "rflags") == 0) {
        lib.reg_write(self->uc, UC_REG_RFLAGS, &value);
        self->rflags = compute_rflags(self->env);
        return true;
    }
    return false;
}

PyObject *engine_set_register(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "value", NULL};
    Engine *self = (Engine *)object;
    const char *name;
    unsigned long long value;
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "sK:set_register", names, &name, &value)) {
        return NULL;
    }
    if (!set_one(self, name, value)) {
        PyErr_Format(PyExc_ValueError, "no such register: %s", name);
        return NULL;
    }
    Py_RETURN_NONE;
}
