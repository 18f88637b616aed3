/* The reset state, and the registers by name. */

#include "shim.h"

#define TSS_16_TYPE 0x100u
#define TSS_32_TYPE 0x900u

/* ---- hidden flags -------------------------------------------------------------------------- */

static bool adds_segment_bases(const char *env, uint32_t hflags)
{
    if (!(hflags & HF_PE) || (U64(env, ENV_EFLAGS) & FLAGS_VM) || !(hflags & HF_CS32)) {
        return true; /* 16-bit code; loads of segments there do not look at the flag */
    }
    return U64(SEGMENT(env, DS), SEG_BASE) || U64(SEGMENT(env, ES), SEG_BASE) ||
           U64(SEGMENT(env, SS), SEG_BASE);
}

/* QEMU keeps in hflags what translated code depends on; here all of it that segments, CR0 and EFER
 * tell is made anew. What CR4 and DR7 tell, update_cr4 and update_dr7 look after. */
void update_hflags(char *env)
{
    uint32_t code = U32(SEGMENT(env, CS), SEG_FLAGS), stack = U32(SEGMENT(env, SS), SEG_FLAGS);
    uint32_t cr0 = U32(env, ENV_CR);
    uint32_t hflags = U32(env, ENV_HFLAGS);
    hflags &= ~(HF_CPL | HF_CS32 | HF_SS32 | HF_ADDSEG | HF_PE | HF_MP_EM_TS | HF_LMA | HF_CS64);
    hflags |= stack >> SEG_DPL_SHIFT & HF_CPL;
    hflags |= cr0 & CR0_PE ? HF_PE : 0;
    hflags |= cr0 << 8 & HF_MP_EM_TS;
    hflags |= U64(env, ENV_EFER) & EFER_LMA ? HF_LMA : 0;
    if ((hflags & HF_LMA) && (code & SEG_LONG)) {
        hflags |= HF_CS64 | HF_CS32 | HF_SS32;
    } else {
        hflags |= code & SEG_BIG ? HF_CS32 : 0;
        hflags |= stack & SEG_BIG ? HF_SS32 : 0;
        hflags |= adds_segment_bases(env, hflags) ? HF_ADDSEG : 0;
    }
    U32(env, ENV_HFLAGS) = hflags;
}

/* ---- reset --------------------------------------------------------------------------------- */

/* QEMU has TR as LTR loads it, not busy yet, and aborts when it needs a TSS and has none. */
bool has_task(const char *env)
{
    uint32_t flags = U32(env, ENV_TR + SEG_FLAGS);
    uint32_t type = flags & SEG_TYPE;
    return (flags & SEG_PRESENT) && (type == TSS_16_TYPE || type == TSS_32_TYPE);
}

/* RESET, but with CS at 0. QEMU's leaves CR4 and XCR0 as user programs like them, and TR busy. */
void enter_real_mode(char *cpu)
{
    char *env = POINTER(cpu, CPU_ENV);
    lib.cpu_reset(cpu);
    lib.update_cr4(env, 0);
    U64(env, ENV_XCR0) = XCR0_X87;
    U32(env, ENV_TR + SEG_FLAGS) &= ~SEG_BUSY;
    U32(SEGMENT(env, CS), SEG_SELECTOR) = 0;
    U64(SEGMENT(env, CS), SEG_BASE) = 0;
    U32(SEGMENT(env, CS), SEG_FLAGS) = CODE_SEGMENT_FLAGS;
    update_hflags(env);
}

int reset_cpu(Engine *self, uint16_t cs, uint16_t ip)
{
    uint64_t flags = 2;
    enter_real_mode(self->cpu);
    U32(SEGMENT(self->env, CS), SEG_SELECTOR) = cs;
    U64(SEGMENT(self->env, CS), SEG_BASE) = (uint64_t)cs << 4;
    U64(self->env, ENV_EIP) = ip;
    forget_last_instruction(self);
    int error = lib.reg_write(self->uc, UC_REG_RFLAGS, &flags); /* into QEMU's working form */
    return error ? error : lib.ctl(self->uc, UC_CTL_FLUSH_TLB);
}

/* ---- registers by name --------------------------------------------------------------------- */

typedef enum {
    NUMBER_16, /* in a field of 32 bits */
    NUMBER_32,
    NUMBER_64,
    ACCESS_RIGHTS,
    TASK_ACCESS_RIGHTS,
    FLAGS,
    CR0,
    CR4,
    PAGING, /* 64 bits that translations depend on */
    DEBUG,
    DR6,
} Kind;

typedef struct {
    const char *name;
    unsigned offset;
    Kind kind;
} Register;

#define GENERAL(name, number) {name, ENV_REGS + 8 * (number), NUMBER_64}
#define SELECTOR_AND_CACHE(name, offset)                                                         \
    {name, (offset) + SEG_SELECTOR, NUMBER_16}, {name "_base", (offset) + SEG_BASE, NUMBER_64},  \
        {name "_limit", (offset) + SEG_LIMIT, NUMBER_32},                                        \
        {name "_access", (offset) + SEG_FLAGS, ACCESS_RIGHTS}
#define TABLE(name, offset)                                                                      \
    {name "_base", (offset) + SEG_BASE, NUMBER_64}, {name "_limit", (offset) + SEG_LIMIT, NUMBER_32}

static const Register REGISTERS[] = {
    GENERAL("rax", 0),
    GENERAL("rcx", 1),
    GENERAL("rdx", 2),
    GENERAL("rbx", 3),
    GENERAL("rsp", 4),
    GENERAL("rbp", 5),
    GENERAL("rsi", 6),
    GENERAL("rdi", 7),
    GENERAL("r8", 8),
    GENERAL("r9", 9),
    GENERAL("r10", 10),
    GENERAL("r11", 11),
    GENERAL("r12", 12),
    GENERAL("r13", 13),
    GENERAL("r14", 14),
    GENERAL("r15", 15),
    {"rip", ENV_EIP, NUMBER_64},
    {"rflags", ENV_EFLAGS, FLAGS},
    SELECTOR_AND_CACHE("es", ENV_SEGS + SEGMENT_BYTES * ES),
    SELECTOR_AND_CACHE("cs", ENV_SEGS + SEGMENT_BYTES * CS),
    SELECTOR_AND_CACHE("ss", ENV_SEGS + SEGMENT_BYTES * SS),
    SELECTOR_AND_CACHE("ds", ENV_SEGS + SEGMENT_BYTES * DS),
    SELECTOR_AND_CACHE("fs", ENV_SEGS + SEGMENT_BYTES * FS),
    SELECTOR_AND_CACHE("gs", ENV_SEGS + SEGMENT_BYTES * GS),
    SELECTOR_AND_CACHE("ldtr", ENV_LDT),
    {"tr", ENV_TR + SEG_SELECTOR, NUMBER_16},
    {"tr_base", ENV_TR + SEG_BASE, NUMBER_64},
    {"tr_limit", ENV_TR + SEG_LIMIT, NUMBER_32},
    {"tr_access", ENV_TR + SEG_FLAGS, TASK_ACCESS_RIGHTS},
    TABLE("gdtr", ENV_GDT),
    TABLE("idtr", ENV_IDT),
    {"cr0", ENV_CR, CR0},
    {"cr2", ENV_CR + 8 * 2, NUMBER_64},
    {"cr3", ENV_CR + 8 * 3, PAGING},
    {"cr4", ENV_CR + 8 * 4, CR4},
    {"dr0", ENV_DR, DEBUG},
    {"dr1", ENV_DR + 8 * 1, DEBUG},
    {"dr2", ENV_DR + 8 * 2, DEBUG},
    {"dr3", ENV_DR + 8 * 3, DEBUG},
    {"dr6", ENV_DR + 8 * 6, DR6},
    {"dr7", ENV_DR + 8 * 7, DEBUG},
    {"efer", ENV_EFER, PAGING},
    {"sysenter_cs", ENV_SYSENTER_CS, NUMBER_32},
    {"sysenter_esp", ENV_SYSENTER_ESP, NUMBER_64},
    {"sysenter_eip", ENV_SYSENTER_EIP, NUMBER_64},
    {"star", ENV_STAR, NUMBER_64},
    {"lstar", ENV_LSTAR, NUMBER_64},
    {"cstar", ENV_CSTAR, NUMBER_64},
    {"fmask", ENV_FMASK, NUMBER_64},
    {"kernel_gs_base", ENV_KERNEL_GS_BASE, NUMBER_64},
    {"tsc_aux", ENV_TSC_AUX, NUMBER_64},
};

/* Access rights in a VMCS (SDM 26.4.1): the attributes of a descriptor, and "unusable". */
#define ACCESS_ATTRIBUTES 0xf0ffu
#define ACCESS_UNUSABLE (1u << 16)
/* The processor keeps a TSS that is busy in TR. */
#define ACCESS_BUSY (1u << 1)

static uint32_t access_of_flags(uint32_t flags)
{
    return (flags >> 8 & ACCESS_ATTRIBUTES) | (flags & SEG_PRESENT ? 0 : ACCESS_UNUSABLE);
}

static uint32_t flags_of_access(uint32_t access)
{
    uint32_t flags = (access & ACCESS_ATTRIBUTES) << 8;
    return access & ACCESS_UNUSABLE ? flags & ~SEG_PRESENT : flags;
}

static uint64_t read_register(const char *env, const Register *reg)
{
    switch (reg->kind) {
    case NUMBER_16:
    case NUMBER_32:
        return U32(env, reg->offset);
    case ACCESS_RIGHTS:
        return access_of_flags(U32(env, reg->offset));
    case TASK_ACCESS_RIGHTS:
        return access_of_flags(U32(env, reg->offset)) | ACCESS_BUSY;
    case FLAGS:
        return compute_rflags(env);
    default:
        return U64(env, reg->offset);
    }
}

static void write_register(Engine *self, const Register *reg, uint64_t value)
{
    char *env = self->env;
    switch (reg->kind) {
    case NUMBER_16:
        U32(env, reg->offset) = (uint16_t)value;
        break;
    case NUMBER_32:
        U32(env, reg->offset) = (uint32_t)value;
        break;
    case ACCESS_RIGHTS:
        U32(env, reg->offset) = flags_of_access((uint32_t)value);
        break;
    case TASK_ACCESS_RIGHTS:
        U32(env, reg->offset) = flags_of_access((uint32_t)value & ~ACCESS_BUSY);
        break;
    case FLAGS:
        lib.reg_write(self->uc, UC_REG_RFLAGS, &value);
        break;
    case CR0:
        U64(env, reg->offset) = value | CR0_ET;
        break;
    case CR4:
        lib.update_cr4(env, (uint32_t)value);
        break;
    case DR6:
        U64(env, reg->offset) = value | DR6_FIXED;
        break;
    default:
        U64(env, reg->offset) = value;
        break;
    }
}

static PyObject *register_dict(const char *env)
{
    PyObject *registers = PyDict_New();
    for (size_t i = 0; registers != NULL && i < COUNT(REGISTERS); i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(read_register(env, &REGISTERS[i]));
        if (value == NULL || PyDict_SetItemString(registers, REGISTERS[i].name, value) < 0) {
            Py_CLEAR(registers);
        }
        Py_XDECREF(value);
    }
    return registers;
}

PyObject *engine_registers(PyObject *object, PyObject *unused)
{
    (void)unused;
    Engine *self = (Engine *)object;
    if (!check_open(self)) {
        return NULL;
    }
    settle_registers(self);
    return register_dict(self->env);
}

/* ---- writing registers --------------------------------------------------------------------- */

static const Register *find_register(PyObject *name)
{
    for (size_t i = 0; i < COUNT(REGISTERS); i++) {
        if (PyUnicode_Check(name) &&
            PyUnicode_CompareWithASCIIString(name, REGISTERS[i].name) == 0) {
            return &REGISTERS[i];
        }
    }
    PyErr_Format(PyExc_ValueError, "no such register: %S", name);
    return NULL;
}

typedef struct {
    const Register *reg;
    uint64_t value;
} Write;

/* Whether there is such a register and the number fits into 64 bits. */
static bool parse_write(PyObject *item, Write *write)
{
    write->reg = find_register(PyTuple_GET_ITEM(item, 0));
    if (write->reg == NULL) {
        return false;
    }
    write->value = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(item, 1));
    return !PyErr_Occurred();
}

static void write_debug_registers(Engine *self, const Write *writes, Py_ssize_t count)
{
    char *env = self->env;
    uint64_t dr7 = U64(env, ENV_DR + 8 * 7);
    lib.update_dr7(env, DR7_FIXED); /* takes the breakpoints away at the old addresses */
    U64(env, ENV_DR + 8 * 7) = dr7;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (writes[i].reg->kind == DEBUG) {
            write_register(self, writes[i].reg, writes[i].value);
        }
    }
    dr7 = U64(env, ENV_DR + 8 * 7);
    U64(env, ENV_DR + 8 * 7) = DR7_FIXED;
    lib.update_dr7(env, (uint32_t)dr7);
}

static int write_registers(Engine *self, const Write *writes, Py_ssize_t count)
{
    bool paging = false, debug = false;
    for (Py_ssize_t i = 0; i < count; i++) {
        Kind kind = writes[i].reg->kind;
        paging |= kind == CR0 || kind == CR4 || kind == PAGING;
        debug |= kind == DEBUG;
        if (kind != DEBUG) {
            write_register(self, writes[i].reg, writes[i].value);
        }
    }
    update_hflags(self->env);
    int error = paging ? lib.ctl(self->uc, UC_CTL_FLUSH_TLB) : 0;
    if (debug) {
        write_debug_registers(self, writes, count); /* finds the breakpoints' pages: comes last */
    }
    forget_last_instruction(self);
    self->iret_at = 0; /* RF counts for the first instruction */
    self->rflags = compute_rflags(self->env);
    return error;
}

static PyObject *set_from_items(Engine *self, PyObject *items)
{
    Py_ssize_t count = PyList_GET_SIZE(items);
    Write *writes = PyMem_New(Write, count);
    if (writes == NULL) {
        return PyErr_NoMemory();
    }
    bool right = true;
    for (Py_ssize_t i = 0; right && i < count; i++) {
        right = parse_write(PyList_GET_ITEM(items, i), &writes[i]);
    }
    int error = right ? write_registers(self, writes, count) : 0;
    PyMem_Free(writes);
    if (error) {
        raise_unicorn("set_registers", error);
    }
    if (!right || error) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyObject *engine_set_registers(PyObject *object, PyObject *values)
{
    Engine *self = (Engine *)object;
    if (!check_idle(self)) {
        return NULL;
    }
    PyObject *items = PyMapping_Items(values);
    if (items == NULL) {
        return NULL;
    }
    PyObject *result = set_from_items(self, items);
    Py_DECREF(items);
    return result;
}
