/*
 * kvmtick.cpu._shim: guest execution for the `unicorn` engine, on libunicorn 2.1.4.
 *
 * Unicorn's public API can run code and hook it, but it cannot raise an interrupt, knows no
 * interrupt window and never looks into the guest's IVT or IDT. The library exports QEMU's own
 * functions, though, so this module calls those: it replaces the CPU class's "take an interrupt"
 * function with one that delivers the event of the VM entry, and it hands exceptions back to
 * QEMU's delivery. It needs a few fields of structures that no header describes; their offsets are
 * proven on the loaded library before the first use (`prove_layout`), and any library where they
 * do not hold is refused.
 *
 * One `Engine` is one virtual CPU. All state is in the object; the module's only globals are the
 * resolved functions of the library (`lib`), which never change once loaded, and a thread-local
 * pointer to the engine that is inside `enter`.
 *
 * Instruction boundaries are seen by a CODE hook, which runs before every instruction
 * (`on_instruction`). Everything the contract promises about boundaries happens there.
 *
 * RDMSR and WRMSR have no hook, and a memory region's callbacks get wide and unaligned accesses in
 * pieces, but translated code calls `helper_rdmsr_x86_64`, `helper_le_stl_mmu_x86_64` and the like
 * through the dynamic linker. This module exports functions of those names and puts itself into the
 * global scope before it loads the library, so that they are found first; `prove_layout` sees to it
 * that they were. The library's own stay reachable by `dlsym`.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <dlfcn.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- Unicorn's public API: the values we use --------------------------------------------- */

#define UNICORN_2_1_4 0x020104ffu
#define UC_ARCH_X86 4
#define UC_MODE_64 8
#define UC_PROT_ALL 7
#define UC_HOOK_INTR (1 << 0)
#define UC_HOOK_INSN (1 << 1)
#define UC_HOOK_CODE (1 << 2)
#define UC_HOOK_INSN_INVALID (1 << 14)
#define UC_ERR_FETCH_UNMAPPED 8
#define UC_ERR_FETCH_PROT 14
#define UC_INS_CPUID 113
#define UC_INS_IN 218
#define UC_INS_OUT 500
#define UC_INS_RDTSC 608
#define UC_INS_RDTSCP 609
#define UC_REG_CS 11
#define UC_REG_RAX 35
#define UC_REG_RIP 41
#define UC_REG_CR2 52
#define UC_REG_R15 113
#define UC_REG_IDTR 242
#define UC_REG_RFLAGS 253
/* The last Intel model of Unicorn's list without RDRAND: with it CPUID says so, RDRAND is #UD and
 * runs are repeatable. It has RDTSCP, the TSC deadline timer and x2APIC. */
#define UC_CPU_SANDYBRIDGE 17
#define SANDYBRIDGE_SIGNATURE 0x206a1u

#define UC_CTL_WRITE(number, arguments) ((number) | ((arguments) << 26) | (1u << 30))
#define UC_CTL_USE_EXITS UC_CTL_WRITE(4, 1)
#define UC_CTL_CPU_MODEL UC_CTL_WRITE(7, 1)
#define UC_CTL_REMOVE_CACHE UC_CTL_WRITE(9, 2)
#define UC_CTL_FLUSH_TLB UC_CTL_WRITE(11, 0)
#define UC_CTL_TCG_BUFFER_SIZE UC_CTL_WRITE(13, 1)

/* ---- 2.1.4's structures: offsets in bytes, proven by prove_layout --------------------------
 * cc_dst, cc_src2, hflags2, ldt, tr and gdt are proven only by the fields around them. */

enum { UC_CPU = 440 }; /* uc_struct -> CPUState */

enum { /* CPUState */
    CPU_INTERRUPT_REQUEST = 28,
    CPU_ENV = 296,
    CPU_HALTED = 33176,
    CPU_EXCEPTION_INDEX = 33184,
    CPU_UC = 33192,
    CPU_CLASS = 33200,
};

enum { /* CPUX86State; a segment is selector, base, limit, flags */
    ENV_REGS = 0,
    ENV_EIP = 128,
    ENV_EFLAGS = 136,
    ENV_CC_DST = 144,
    ENV_CC_SRC = 152,
    ENV_CC_SRC2 = 160,
    ENV_CC_OP = 168,
    ENV_DF = 172,
    ENV_HFLAGS = 176,
    ENV_HFLAGS2 = 180,
    ENV_SEGS = 184,
    ENV_LDT = 328,
    ENV_TR = 352,
    ENV_GDT = 376,
    ENV_IDT = 400,
    ENV_CR = 424,
    ENV_EFER = 592,
    ENV_ERROR_CODE = 5384,
    ENV_EXCEPTION_IS_INT = 5388,
    ENV_EXCEPTION_NEXT_EIP = 5392,
    ENV_DR = 5400,
    ENV_OLD_EXCEPTION = 5496,
};

enum { SEGMENT_BYTES = 24, SEG_SELECTOR = 0, SEG_BASE = 8, SEG_LIMIT = 16, SEG_FLAGS = 20 };
enum { ES, CS, SS, DS, FS, GS };
enum { RAX, RCX, RDX, RBX };

#define U32(base, offset) (*(uint32_t *)((char *)(base) + (offset)))
#define I32(base, offset) (*(int32_t *)((char *)(base) + (offset)))
#define U64(base, offset) (*(uint64_t *)((char *)(base) + (offset)))
#define POINTER(base, offset) (*(void **)((char *)(base) + (offset)))
#define REGISTER(env, number) U64(env, ENV_REGS + 8 * (number))
#define SEGMENT(env, number) ((char *)(env) + ENV_SEGS + SEGMENT_BYTES * (number))

#define CPU_INTERRUPT_HARD 2u
#define HF_CPL 0x3u
#define HF_INHIBIT_IRQ (1u << 3) /* the shadow of STI and MOV SS */
#define HF_CS32 (1u << 4)
#define HF_SS32 (1u << 5)
#define HF_ADDSEG (1u << 6)
#define HF_LMA (1u << 14)
#define HF_CS64 (1u << 15)
#define HF2_NMI (1u << 2) /* NMIs are blocked until IRET */
#define FLAGS_IF (1u << 9)
#define FLAGS_DF (1u << 10)
#define FLAGS_ARITHMETIC 0x8d5u /* CF PF AF ZF SF OF */
#define EFER_LONG_MODE 0x500u   /* LME, LMA */
#define CR0_RESET 0x60000010u
#define CR0_PE 1u
#define CR0_PG (1u << 31)
#define DOUBLE_FAULT 8
#define GENERAL_PROTECTION 13
#define CODE_SEGMENT_FLAGS 0x009b00u /* present, system, code, readable, accessed */
#define DATA_SEGMENT_FLAGS 0x009300u
#define FLAT_CODE_FLAGS 0xc09b00u /* the same with 4 KiB granularity, 32 bits */
#define FLAT_DATA_FLAGS 0xc09300u
#define FLAT_CODE_SELECTOR 0x08
#define FLAT_DATA_SELECTOR 0x10
#define LDT_FLAGS 0x008200u
#define BUSY_TSS_FLAGS 0x008b00u

/* ---- the contract's numbers (kvmtick.cpu.engine) ------------------------------------------- */

enum {
    EXIT_NONE = 0, /* never returned: the basic exit reason 0 (an exception) is not ours */
    EXIT_EXTERNAL_INTERRUPT = 1,
    EXIT_TRIPLE_FAULT = 2,
    EXIT_INTERRUPT_WINDOW = 7,
    EXIT_NMI_WINDOW = 8,
    EXIT_HLT = 12,
    EXIT_PREEMPTION_TIMER = 52,
    EXIT_INTERNAL_ERROR = 0x10000,
    EXIT_CALLBACK_FAILED = -1, /* never returned: enter raises */
};

enum { SHADOW_STI = 1, SHADOW_MOV_SS = 2, SHADOW_NMI = 8 };
enum { TYPE_EXTERNAL, TYPE_NMI = 2, TYPE_HARDWARE, TYPE_INT_N, TYPE_ICEBP, TYPE_INT3_INTO };

/* The MSRs that handlers answer. */
#define MSR_TSC 0x10u
#define MSR_APIC_BASE 0x1bu
#define MSR_TSC_DEADLINE 0x6e0u
#define MSR_X2APIC_FIRST 0x800u
#define MSR_X2APIC_LAST 0x8ffu

#define INTR_INFO_VALID (1u << 31)
#define INTR_INFO_VECTOR(info) ((info) & 0xff)
#define INTR_INFO_TYPE(info) (((info) >> 8) & 7)

#define PAGE_BYTES 4096u
#define FOUR_GIB (1ull << 32)
#define NO_ADDRESS UINT64_MAX
#define RAM_RANGES_MAX 32
#define CODE_CACHE_BYTES (64u << 20)

/* ---- the library ------------------------------------------------------------------------------ */

/* Sizes of memory accesses, as logarithms. */
enum { BYTE, WORD, LONG, QUAD, SIZES };

/* What translated code calls for accesses it cannot do by itself; `oi` and the return address are
 * the library's business. Of `value` the low bits count. */
typedef uint64_t Load(void *env, uint64_t linear, uint32_t oi, uintptr_t return_address);
typedef void Store(void *env, uint64_t linear, uint64_t value, uint32_t oi,
                   uintptr_t return_address);

/* The library's own functions that this module stands in front of. */
typedef struct {
    void (*rdmsr)(void *env);
    void (*wrmsr)(void *env);
    Load *load[SIZES];
    Store *store[SIZES];
} Genuine;

typedef struct {
    void *handle;
    char path[PATH_MAX];
    Genuine genuine; /* without a handle: of a library that was refused but stays loaded */
    unsigned (*version)(unsigned *, unsigned *);
    const char *(*strerror)(int);
    int (*open)(int, int, void **);
    int (*close)(void *);
    int (*ctl)(void *, uint32_t, ...);
    int (*hook_add)(void *, size_t *, int, void *, void *, uint64_t, uint64_t, ...);
    int (*emu_start)(void *, uint64_t, uint64_t, uint64_t, size_t);
    int (*emu_stop)(void *);
    int (*reg_read)(void *, int, void *);
    int (*reg_write)(void *, int, const void *);
    int (*mem_map)(void *, uint64_t, uint64_t, uint32_t);
    int (*mem_map_ptr)(void *, uint64_t, uint64_t, uint32_t, void *);
    int (*mem_unmap)(void *, uint64_t, uint64_t);
    int (*mmio_map)(void *, uint64_t, uint64_t, void *, void *, void *, void *);
    int (*mem_write)(void *, uint64_t, const void *, uint64_t);
    /* QEMU's own functions, exported with the target's suffix. */
    bool (*cpu_exec_interrupt)(void *cpu, int request);
    void (*do_interrupt)(void *cpu);
    void (*do_interrupt_hardirq)(void *env, int vector, int is_hardware);
    uint64_t (*cc_compute_all)(uint64_t dst, uint64_t src, uint64_t src2, int op);
    void (*update_cr0)(void *env, uint32_t value);
    void (*update_cr3)(void *env, uint64_t value);
    void (*update_cr4)(void *env, uint32_t value);
    void (*raise_exception)(void *env, int vector, int error_code, uintptr_t return_address);
    size_t class_slot; /* offset of cpu_exec_interrupt in the CPU class */
} Library;

static Library lib;

static const struct {
    const char *name;
    size_t offset;
} SYMBOLS[] = {
    {"uc_version", offsetof(Library, version)},
    {"uc_strerror", offsetof(Library, strerror)},
    {"uc_open", offsetof(Library, open)},
    {"uc_close", offsetof(Library, close)},
    {"uc_ctl", offsetof(Library, ctl)},
    {"uc_hook_add", offsetof(Library, hook_add)},
    {"uc_emu_start", offsetof(Library, emu_start)},
    {"uc_emu_stop", offsetof(Library, emu_stop)},
    {"uc_reg_read", offsetof(Library, reg_read)},
    {"uc_reg_write", offsetof(Library, reg_write)},
    {"uc_mem_map", offsetof(Library, mem_map)},
    {"uc_mem_map_ptr", offsetof(Library, mem_map_ptr)},
    {"uc_mem_unmap", offsetof(Library, mem_unmap)},
    {"uc_mmio_map", offsetof(Library, mmio_map)},
    {"uc_mem_write", offsetof(Library, mem_write)},
    {"x86_cpu_exec_interrupt_x86_64", offsetof(Library, cpu_exec_interrupt)},
    {"x86_cpu_do_interrupt_x86_64", offsetof(Library, do_interrupt)},
    {"do_interrupt_x86_hardirq_x86_64", offsetof(Library, do_interrupt_hardirq)},
    {"helper_cc_compute_all_x86_64", offsetof(Library, cc_compute_all)},
    {"cpu_x86_update_cr0_x86_64", offsetof(Library, update_cr0)},
    {"cpu_x86_update_cr3_x86_64", offsetof(Library, update_cr3)},
    {"cpu_x86_update_cr4_x86_64", offsetof(Library, update_cr4)},
    {"raise_exception_err_ra_x86_64", offsetof(Library, raise_exception)},
};

/* ---- the engine ---------------------------------------------------------------------------- */

typedef struct {
    uint64_t gpa;
    uint64_t size_bytes;
    Py_buffer view;
} RamRange;

typedef struct Engine Engine;

typedef struct { /* physical memory that is no RAM */
    Engine *engine;
    uint64_t gpa;
    uint64_t size_bytes;
} Gap;

/* In the order of `attach`; the first two are always there. */
enum { ON_OUT, ON_IN, ON_MMIO_WRITE, ON_MMIO_READ, ON_WRMSR, ON_RDMSR, ON_CPUID, HANDLERS };

struct Engine {
    PyObject_HEAD
    void *uc; /* NULL when closed */
    char *cpu;
    char *env;

    /* Looked at before every instruction. */
    uint64_t started;      /* instructions begun since the entry */
    uint64_t watch_from;   /* atomic; look closer once `started` is there: the budget, or 0 */
    uint64_t last_address; /* linear address of the instruction begun last */

    /* Looked at closer. */
    uint64_t budget;
    int kicked;  /* atomic; set by any thread */
    bool failed; /* a callback raised; the exception is in `exception` */
    bool irq_window;
    bool nmi_window;

    int exit_reason;
    uint32_t intr_info; /* the event of this entry until it is delivered */
    uint64_t tsc;
    bool host_tsc;
    int64_t host_tsc_offset_ns;

    bool running;
    bool releases_gil;
    PyThreadState *released; /* while the guest runs without the GIL */
    PyObject *exception[3];
    PyObject *handlers[HANDLERS];

    RamRange ram[RAM_RANGES_MAX];
    int ram_count;
    uint64_t port_read_by; /* `started` at the last port read: which instruction that was */
    uint64_t near_ram;  /* start of the RAM range that was last accessed the slow way */
    uint64_t near_span; /* addresses from there on with 8 bytes of RAM: of its size, all but 7 */
    Gap gaps[RAM_RANGES_MAX + 1]; /* up to 4 GiB */
    int gap_count;
    bool gaps_stale;

    /* What the last exit reports. */
    unsigned long long rflags;
    unsigned int interruptibility;
    unsigned long long retired;
    unsigned int idt_vectoring_info;
    PyObject *error;
};

/* The engine inside `enter` on this thread: QEMU's class functions carry no user data. Looked at in
 * every store, hence without a call of the dynamic linker. */
static __thread Engine *entered __attribute__((tls_model("initial-exec")));

/* ---- guest state ------------------------------------------------------------------------------ */

static uint64_t compute_rflags(const char *env)
{
    uint64_t arithmetic = lib.cc_compute_all(U64(env, ENV_CC_DST), U64(env, ENV_CC_SRC),
                                             U64(env, ENV_CC_SRC2), I32(env, ENV_CC_OP));
    uint64_t rest = U64(env, ENV_EFLAGS) & ~(uint64_t)(FLAGS_ARITHMETIC | FLAGS_DF);
    return rest | arithmetic | (I32(env, ENV_DF) & FLAGS_DF) | 2;
}

/* The bytes the guest has at `linear`, or NULL. Paging is off: linear is physical. */
static const uint8_t *code_at(const Engine *self, uint64_t linear, uint32_t size_bytes)
{
    for (int i = 0; i < self->ram_count; i++) {
        const RamRange *ram = &self->ram[i];
        if (linear >= ram->gpa && linear + size_bytes <= ram->gpa + ram->size_bytes) {
            return (const uint8_t *)ram->view.buf + (linear - ram->gpa);
        }
    }
    return NULL;
}

static bool is_prefix(uint8_t byte)
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
static bool steps_over_finished_rep(const Engine *self, uint64_t address, uint32_t size_bytes)
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

static unsigned compute_interruptibility(const Engine *self)
{
    unsigned state = U32(self->env, ENV_HFLAGS2) & HF2_NMI ? SHADOW_NMI : 0;
    if (U32(self->env, ENV_HFLAGS) & HF_INHIBIT_IRQ) {
        state |= shadow_kind(self);
    }
    return state;
}

/* ---- instruction boundaries --------------------------------------------------------------- */

/* `kick` sets its flag, then watch_from; here it is the other way round: no kick gets lost. */
static void set_watch(Engine *self)
{
    bool now = self->irq_window || self->nmi_window || self->failed;
    __atomic_store_n(&self->watch_from, now ? 0 : self->budget, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&self->kicked, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&self->watch_from, 0, __ATOMIC_SEQ_CST);
    }
}

/* What ends the execution before the next instruction, in the contract's order. */
static int boundary_reason(Engine *self)
{
    if (self->failed) {
        return EXIT_CALLBACK_FAILED;
    }
    if (__atomic_exchange_n(&self->kicked, 0, __ATOMIC_SEQ_CST)) {
        return EXIT_EXTERNAL_INTERRUPT;
    }
    bool shadow = U32(self->env, ENV_HFLAGS) & HF_INHIBIT_IRQ;
    if (self->nmi_window && !shadow && !(U32(self->env, ENV_HFLAGS2) & HF2_NMI)) {
        return EXIT_NMI_WINDOW;
    }
    if (self->irq_window && !shadow && (U64(self->env, ENV_EFLAGS) & FLAGS_IF)) {
        return EXIT_INTERRUPT_WINDOW;
    }
    return self->started >= self->budget ? EXIT_PREEMPTION_TIMER : EXIT_NONE;
}

static bool leave_at_boundary(Engine *self)
{
    self->exit_reason = boundary_reason(self);
    if (self->exit_reason != EXIT_NONE) {
        lib.emu_stop(self->uc);
        return true;
    }
    if (!self->irq_window && !self->nmi_window) {
        set_watch(self); /* a kick came late and its exit is over */
    }
    return false;
}

/* CODE hook: before every instruction. */
static void on_instruction(void *uc, uint64_t address, uint32_t size_bytes, void *engine)
{
    (void)uc;
    Engine *self = engine;
    if (unlikely(address == self->last_address) &&
        steps_over_finished_rep(self, address, size_bytes)) {
        return;
    }
    uint64_t started = self->started;
    if (unlikely(started >= __atomic_load_n(&self->watch_from, __ATOMIC_RELAXED)) &&
        leave_at_boundary(self)) {
        return;
    }
    self->started = started + 1;
    self->last_address = address;
}

/* ---- events -------------------------------------------------------------------------------- */

static bool is_contributory(int vector)
{
    return vector == 0 || (vector >= 10 && vector <= 14) || vector == DOUBLE_FAULT;
}

static void deliver_exception(Engine *self, int vector)
{
    I32(self->cpu, CPU_EXCEPTION_INDEX) = vector;
    I32(self->env, ENV_EXCEPTION_IS_INT) = 0;
    I32(self->env, ENV_ERROR_CODE) = 0;
    /* A fault on the way makes a double or triple fault of it (SDM vol. 3A, table 6-5). */
    I32(self->env, ENV_OLD_EXCEPTION) = is_contributory(vector) ? vector : -1;
    lib.do_interrupt(self->cpu);
    I32(self->cpu, CPU_EXCEPTION_INDEX) = -1;
}

static void deliver_entry_event(Engine *self, uint32_t info)
{
    int vector = INTR_INFO_VECTOR(info);
    U32(self->env, ENV_HFLAGS) &= ~HF_INHIBIT_IRQ;
    self->last_address = NO_ADDRESS;
    switch (INTR_INFO_TYPE(info)) {
    case TYPE_NMI:
        U32(self->env, ENV_HFLAGS2) |= HF2_NMI;
        lib.do_interrupt_hardirq(self->env, vector, 1);
        break;
    case TYPE_HARDWARE:
        deliver_exception(self, vector);
        break;
    default:
        /* Software events push RIP as it stands: the contract has no instruction length. */
        lib.do_interrupt_hardirq(self->env, vector, 1);
        break;
    }
}

/* Stands in for QEMU's x86_cpu_exec_interrupt: runs inside the CPU loop before the first block
 * (`enter` has set interrupt_request), where a fault during delivery is safe. */
static bool take_entry_event(void *cpu, int request)
{
    (void)request;
    Engine *self = entered;
    U32(cpu, CPU_INTERRUPT_REQUEST) = 0;
    uint32_t info = self->intr_info;
    self->intr_info = 0;
    if (!(info & INTR_INFO_VALID)) {
        return false;
    }
    deliver_entry_event(self, info);
    return true;
}

/* INTR hook: an exception or a software interrupt of the guest; QEMU delivers it through the
 * guest's own vectors. Does not return when that faults in turn. */
static void on_exception(void *uc, uint32_t vector, void *engine)
{
    (void)uc;
    (void)vector;
    Engine *self = engine;
    if (I32(self->env, ENV_EXCEPTION_IS_INT)) {
        /* Unicorn has moved eip behind the instruction; a fault now must find it on it. */
        U64(self->env, ENV_EIP) = self->last_address - U64(SEGMENT(self->env, CS), SEG_BASE);
    }
    U32(self->env, ENV_HFLAGS) &= ~HF_INHIBIT_IRQ; /* a faulting instruction leaves its shadow */
    lib.do_interrupt(self->cpu);
}

/* INSN_INVALID hook: #UD. True: go on. */
static bool on_invalid_opcode(void *uc, void *engine)
{
    on_exception(uc, 6, engine);
    return true;
}

/* ---- callbacks into Python ------------------------------------------------------------------ */

static void take_gil(Engine *self)
{
    if (self->released != NULL) {
        PyEval_RestoreThread(self->released);
    }
}

static void give_gil(Engine *self)
{
    if (self->released != NULL) {
        self->released = PyEval_SaveThread();
    }
}

/* Keeps the current exception for the end of `enter`; the next boundary ends the execution. */
static void keep_exception(Engine *self)
{
    if (self->failed) {
        PyErr_Clear();
        return;
    }
    PyErr_Fetch(&self->exception[0], &self->exception[1], &self->exception[2]);
    self->failed = true;
    set_watch(self);
}

static PyObject *call_handler(Engine *self, int which, const unsigned long long *values,
                              size_t count)
{
    PyObject *arguments[4] = {NULL};
    PyObject *result = NULL;
    size_t made = 0;
    while (made < count) {
        arguments[made] = PyLong_FromUnsignedLongLong(values[made]);
        if (arguments[made] == NULL) {
            break;
        }
        made++;
    }
    if (made == count) {
        /* The access ends a shadow, so there is none. */
        self->interruptibility = U32(self->env, ENV_HFLAGS2) & HF2_NMI ? SHADOW_NMI : 0;
        result = PyObject_Vectorcall(self->handlers[which], arguments, count, NULL);
    }
    while (made > 0) {
        Py_DECREF(arguments[--made]);
    }
    return result;
}

/* Calls a handler that answers nothing; the GIL is held. */
static void tell(Engine *self, int which, const unsigned long long *values, size_t count)
{
    PyObject *result = call_handler(self, which, values, count);
    if (result == NULL) {
        keep_exception(self);
    }
    Py_XDECREF(result);
}

/* Calls a handler that answers a number; all ones when it raises. The GIL is held. */
static uint64_t ask(Engine *self, int which, const unsigned long long *values, size_t count)
{
    PyObject *result = call_handler(self, which, values, count);
    uint64_t value = UINT64_MAX;
    if (result != NULL) {
        value = PyLong_AsUnsignedLongLongMask(result);
        Py_DECREF(result);
    }
    if (value == UINT64_MAX && PyErr_Occurred()) {
        keep_exception(self);
    }
    return value;
}

/* Instructions retired before the running one; none runs while the entry's event is delivered. */
static uint64_t retired_before(const Engine *self)
{
    return self->started > 0 ? self->started - 1 : 0;
}

static void on_port_out(void *uc, uint32_t port, int size_bytes, uint32_t value, void *engine)
{
    (void)uc;
    Engine *self = engine;
    unsigned long long values[] = {port, (unsigned)size_bytes, value, self->started - 1};
    take_gil(self);
    tell(self, ON_OUT, values, COUNT(values));
    give_gil(self);
}

static uint32_t on_port_in(void *uc, uint32_t port, int size_bytes, void *engine)
{
    (void)uc;
    Engine *self = engine;
    unsigned long long values[] = {port, (unsigned)size_bytes, self->started - 1};
    self->port_read_by = self->started;
    take_gil(self);
    uint32_t value = (uint32_t)ask(self, ON_IN, values, COUNT(values));
    give_gil(self);
    return size_bytes == 4 ? value : value & ((1u << (8 * size_bytes)) - 1);
}

/* The first part of an access that raised is the last one: `failed` ends the execution. */
static bool nobody_answers(const Engine *self, int which)
{
    return self->handlers[which] == NULL || self->failed;
}

static void write_mmio(Engine *self, uint64_t gpa, unsigned size_bytes, uint64_t value)
{
    unsigned long long values[] = {gpa, size_bytes, value, retired_before(self)};
    if (nobody_answers(self, ON_MMIO_WRITE)) {
        return;
    }
    take_gil(self);
    tell(self, ON_MMIO_WRITE, values, COUNT(values));
    give_gil(self);
}

/* The caller cuts the answer to the size of the access. */
static uint64_t read_mmio(Engine *self, uint64_t gpa, unsigned size_bytes)
{
    unsigned long long values[] = {gpa, size_bytes, retired_before(self)};
    if (nobody_answers(self, ON_MMIO_READ)) {
        return UINT64_MAX;
    }
    take_gil(self);
    uint64_t value = ask(self, ON_MMIO_READ, values, COUNT(values));
    give_gil(self);
    return value;
}

/* Callbacks of a memory region: for what `store_around_ram` and `load_around_ram` leave alone. */
static void on_mmio_write(void *uc, uint64_t offset, unsigned size_bytes, uint64_t value,
                          void *user)
{
    (void)uc;
    const Gap *gap = user;
    write_mmio(gap->engine, gap->gpa + offset, size_bytes, value);
}

static uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size_bytes, void *user)
{
    (void)uc;
    const Gap *gap = user;
    return read_mmio(gap->engine, gap->gpa + offset, size_bytes);
}

/* ---- functions that stand in for the library's ------------------------------------------------
 *
 * In every engine of the process, ours and others'. Translated code calls them, so their return
 * address says which instruction runs. */

#define EXPORTED __attribute__((visibility("default"), noinline))

enum { LOADS = 0, STORES = SIZES, RDMSR = 2 * SIZES, WRMSR, INTERPOSED_COUNT };

/* Which of them were called for engines that are not ours; for prove_layout. */
static __thread unsigned intercepted;

/* The engine whose guest runs in `env`, or NULL: somebody else's does. */
static Engine *engine_of(const void *env, int function)
{
    Engine *self = entered;
    if (self != NULL && self->env == env) {
        return self;
    }
    intercepted |= 1u << function;
    return NULL;
}

/* ---- model-specific registers --------------------------------------------------------------- */

static bool handlers_answer_msr(uint32_t index)
{
    return index == MSR_TSC || index == MSR_APIC_BASE || index == MSR_TSC_DEADLINE ||
           (index >= MSR_X2APIC_FIRST && index <= MSR_X2APIC_LAST);
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

EXPORTED void helper_rdmsr_x86_64(void *env);
EXPORTED void helper_wrmsr_x86_64(void *env);

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

/* ---- memory that is no RAM ---------------------------------------------------------------------
 *
 * The library's slow path. There it would split accesses as its memory regions have them: 8 bytes
 * into dwords, unaligned ones into bytes or the two aligned reads around them. KVM's emulator
 * (emulator_read_write) splits them where a page ends and nowhere else; so does this, without
 * paging. All stores to RAM that may hold code come here too. */

static const RamRange *ram_at(const Engine *self, uint64_t gpa)
{
    for (int i = 0; i < self->ram_count; i++) {
        if (gpa - self->ram[i].gpa < self->ram[i].size_bytes) {
            return &self->ram[i];
        }
    }
    return NULL;
}

/* Without paging the address is physical, of 32 bits (A20 is always on). */
static bool is_ram_or_paged(Engine *self, uint64_t linear, unsigned size_bytes)
{
    if (U64(self->env, ENV_CR) & CR0_PG) {
        return true;
    }
    const RamRange *first = ram_at(self, (uint32_t)linear);
    if (first == NULL || ram_at(self, (uint32_t)(linear + size_bytes - 1)) == NULL) {
        return false;
    }
    self->near_ram = first->gpa;
    self->near_span = first->size_bytes - 7;
    return true;
}

/* The bytes of an access from `linear` on that are on its page. */
static unsigned bytes_on_page(uint64_t linear, unsigned size_bytes)
{
    unsigned left = PAGE_BYTES - linear % PAGE_BYTES;
    return left < size_bytes ? left : size_bytes;
}

static uint64_t low_bytes(uint64_t value, unsigned size_bytes)
{
    return size_bytes == 8 ? value : value & ((1ull << (8 * size_bytes)) - 1);
}

/* A load of which some or all bytes are no RAM. */
static uint64_t load_around_ram(Engine *self, uint64_t linear, unsigned size_bytes)
{
    uint64_t value = 0;
    unsigned done = 0;
    while (done < size_bytes) {
        uint32_t gpa = (uint32_t)(linear + done);
        unsigned count = bytes_on_page(gpa, size_bytes - done);
        const RamRange *ram = ram_at(self, gpa);
        uint64_t part = 0;
        if (ram != NULL) {
            memcpy(&part, (const char *)ram->view.buf + (gpa - ram->gpa), count);
        } else {
            part = low_bytes(read_mmio(self, gpa, count), count);
        }
        value |= part << (8 * done);
        done += count;
    }
    return value;
}

/* Puts bytes into RAM as the library does with a store over two pages: it may hold code. */
static void store_bytes(Engine *self, uint64_t linear, uint64_t value, unsigned count, uint32_t oi,
                        uintptr_t return_address)
{
    for (unsigned i = 0; i < count; i++) {
        lib.genuine.store[BYTE](self->env, linear + i, (uint8_t)(value >> (8 * i)), oi,
                                return_address);
    }
}

static void store_around_ram(Engine *self, uint64_t linear, uint64_t value, unsigned size_bytes,
                             uint32_t oi, uintptr_t return_address)
{
    unsigned done = 0;
    while (done < size_bytes) {
        uint32_t gpa = (uint32_t)(linear + done);
        unsigned count = bytes_on_page(gpa, size_bytes - done);
        uint64_t part = low_bytes(value >> (8 * done), count);
        if (ram_at(self, gpa) != NULL) {
            store_bytes(self, gpa, part, count, oi, return_address);
        } else {
            write_mmio(self, gpa, count, part);
        }
        done += count;
    }
}

static __attribute__((noinline)) uint64_t load_far(int size, void *env, uint64_t linear,
                                                   uint32_t oi, uintptr_t return_address)
{
    Engine *self = engine_of(env, LOADS + size);
    if (self == NULL || is_ram_or_paged(self, linear, 1u << size)) {
        return lib.genuine.load[size](env, linear, oi, return_address);
    }
    return load_around_ram(self, linear, 1u << size);
}

/* QEMU's INS stores a 0 before it reads the port, to find out whether the store faults. Where no
 * RAM is it cannot, and a device would see it. */
static bool is_trial_of_ins(const Engine *self)
{
    if (self->port_read_by == self->started) {
        return false;
    }
    uint64_t address = self->last_address;
    for (int i = 0; i < 14; i++, address++) {
        const uint8_t *code = code_at(self, address, 1);
        if (code == NULL || !is_prefix(*code)) {
            return code != NULL && (*code == 0x6c || *code == 0x6d);
        }
    }
    return false;
}

static __attribute__((noinline)) void store_far(int size, void *env, uint64_t linear,
                                                uint64_t value, uint32_t oi,
                                                uintptr_t return_address)
{
    Engine *self = engine_of(env, STORES + size);
    if (self == NULL || is_ram_or_paged(self, linear, 1u << size)) {
        lib.genuine.store[size](env, linear, value, oi, return_address);
        return;
    }
    if (!is_trial_of_ins(self)) {
        store_around_ram(self, linear, value, 1u << size, oi, return_address);
    }
}

/* Whether the library does the access in any case, whoever's `env` it is. */
static bool is_near(uint64_t linear)
{
    const Engine *self = entered;
    return likely(self != NULL && linear - self->near_ram < self->near_span);
}

#define STAND_IN_FOR_LOAD(name, size)                                                            \
    EXPORTED Load name;                                                                          \
    EXPORTED uint64_t name(void *env, uint64_t linear, uint32_t oi, uintptr_t return_address)    \
    {                                                                                            \
        return is_near(linear) ? lib.genuine.load[size](env, linear, oi, return_address)         \
                               : load_far(size, env, linear, oi, return_address);                \
    }

#define STAND_IN_FOR_STORE(name, size)                                                           \
    EXPORTED Store name;                                                                         \
    EXPORTED void name(void *env, uint64_t linear, uint64_t value, uint32_t oi,                  \
                       uintptr_t return_address)                                                 \
    {                                                                                            \
        if (is_near(linear)) {                                                                   \
            lib.genuine.store[size](env, linear, value, oi, return_address);                     \
        } else {                                                                                 \
            store_far(size, env, linear, value, oi, return_address);                             \
        }                                                                                        \
    }

STAND_IN_FOR_LOAD(helper_ret_ldub_mmu_x86_64, BYTE)
STAND_IN_FOR_LOAD(helper_le_lduw_mmu_x86_64, WORD)
STAND_IN_FOR_LOAD(helper_le_ldul_mmu_x86_64, LONG)
STAND_IN_FOR_LOAD(helper_le_ldq_mmu_x86_64, QUAD)
STAND_IN_FOR_STORE(helper_ret_stb_mmu_x86_64, BYTE)
STAND_IN_FOR_STORE(helper_le_stw_mmu_x86_64, WORD)
STAND_IN_FOR_STORE(helper_le_stl_mmu_x86_64, LONG)
STAND_IN_FOR_STORE(helper_le_stq_mmu_x86_64, QUAD)

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
static int on_cpuid(void *uc, void *engine)
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
static int on_rdtsc(void *uc, void *engine)
{
    (void)uc;
    Engine *self = engine;
    uint64_t tsc = read_tsc(self);
    REGISTER(self->env, RAX) = (uint32_t)tsc;
    REGISTER(self->env, RDX) = (uint32_t)(tsc >> 32);
    return 1;
}

static int on_rdtscp(void *uc, void *engine)
{
    Engine *self = engine;
    REGISTER(self->env, RCX) = 0; /* IA32_TSC_AUX */
    return on_rdtsc(uc, engine);
}

/* ---- memory --------------------------------------------------------------------------------- */

static int unmap_gaps(Engine *self)
{
    while (self->gap_count > 0) {
        const Gap *gap = &self->gaps[self->gap_count - 1];
        int error = lib.mem_unmap(self->uc, gap->gpa, gap->size_bytes);
        if (error) {
            return error;
        }
        self->gap_count--;
    }
    return 0;
}

static int map_gap(Engine *self, uint64_t start, uint64_t end)
{
    if (start >= end) {
        return 0;
    }
    Gap *gap = &self->gaps[self->gap_count];
    *gap = (Gap){self, start, end - start};
    int error = lib.mmio_map(self->uc, start, end - start, on_mmio_read, gap, on_mmio_write, gap);
    if (!error) {
        self->gap_count++;
    }
    return error;
}

/* The handlers answer for every physical address below 4 GiB that is not RAM (`ram` is sorted). */
static int map_gaps(Engine *self)
{
    uint64_t start = 0;
    int error = 0;
    for (int i = 0; i < self->ram_count && start < FOUR_GIB && !error; i++) {
        uint64_t ram_start = self->ram[i].gpa;
        error = map_gap(self, start, ram_start < FOUR_GIB ? ram_start : FOUR_GIB);
        start = ram_start + self->ram[i].size_bytes;
    }
    self->gaps_stale = false;
    return error ? error : map_gap(self, start, FOUR_GIB);
}

/* ---- opening, reset --------------------------------------------------------------------------- */

static int open_cpu(void **uc)
{
    int error = lib.open(UC_ARCH_X86, UC_MODE_64, uc);
    if (error) {
        return error;
    }
    if ((error = lib.ctl(*uc, UC_CTL_CPU_MODEL, UC_CPU_SANDYBRIDGE)) ||
        (error = lib.ctl(*uc, UC_CTL_TCG_BUFFER_SIZE, CODE_CACHE_BYTES)) ||
        /* Without exits enabled, `until` is an exit: leaving then walks page tables and spoils
         * CR2 and the exception in flight. */
        (error = lib.ctl(*uc, UC_CTL_USE_EXITS, 1))) {
        lib.close(*uc);
        *uc = NULL;
    }
    return error;
}

static int add_hook(Engine *self, int type, void *callback)
{
    size_t hook;
    return lib.hook_add(self->uc, &hook, type, callback, self, 1, 0);
}

static int add_instruction_hook(Engine *self, int instruction, void *callback)
{
    size_t hook;
    return lib.hook_add(self->uc, &hook, UC_HOOK_INSN, callback, self, 1, 0, instruction);
}

static int add_hooks(Engine *self)
{
    int error;
    if ((error = add_hook(self, UC_HOOK_CODE, on_instruction)) ||
        (error = add_hook(self, UC_HOOK_INTR, on_exception)) ||
        (error = add_hook(self, UC_HOOK_INSN_INVALID, on_invalid_opcode)) ||
        (error = add_instruction_hook(self, UC_INS_IN, on_port_in)) ||
        (error = add_instruction_hook(self, UC_INS_OUT, on_port_out)) ||
        (error = add_instruction_hook(self, UC_INS_CPUID, on_cpuid)) ||
        (error = add_instruction_hook(self, UC_INS_RDTSC, on_rdtsc))) {
        return error;
    }
    return add_instruction_hook(self, UC_INS_RDTSCP, on_rdtscp);
}

static void set_segment(char *segment, uint32_t selector, uint64_t base, uint32_t flags)
{
    U32(segment, SEG_SELECTOR) = selector;
    U64(segment, SEG_BASE) = base;
    U32(segment, SEG_LIMIT) = 0xffff;
    U32(segment, SEG_FLAGS) = flags;
}

/* Real mode, whatever the mode was: Unicorn opens the CPU half in long mode, which neither CR0
 * nor EFER writes would leave. */
static void enter_real_mode(char *env)
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

static int reset_cpu(Engine *self, uint16_t cs, uint16_t ip)
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

static int reset_cpu_protected(Engine *self, uint32_t eip)
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

/* ---- proving the layout ---------------------------------------------------------------------- */

static const char CALLS_PASS_BY[] = "calls of its own functions";
static __thread int probe_request; /* what the probe's interrupt function was called with */

static bool probe_take_interrupt(void *cpu, int request)
{
    probe_request = request;
    U32(cpu, CPU_INTERRUPT_REQUEST) = 0;
    return false;
}

typedef struct {
    char *cpu;
    char *env;
    int right; /* exceptions that left what we expect */
} Probe;

/* `int 0x21` sets every field that describes an exception. */
static bool int_left_its_marks(const Probe *probe)
{
    const char *env = probe->env;
    return I32(probe->cpu, CPU_EXCEPTION_INDEX) == 0x21 && I32(env, ENV_EXCEPTION_IS_INT) == 1 &&
           I32(env, ENV_ERROR_CODE) == 0 && U64(env, ENV_EXCEPTION_NEXT_EIP) == 0x1002 &&
           U64(env, ENV_EIP) == 0x1002 && I32(env, ENV_OLD_EXCEPTION) == -1;
}

/* A division by zero is a contributory exception: it becomes the exception in flight. */
static bool division_left_its_marks(const Probe *probe)
{
    return I32(probe->env, ENV_EXCEPTION_IS_INT) == 0 && I32(probe->env, ENV_OLD_EXCEPTION) == 0 &&
           U64(probe->env, ENV_EIP) == 0x1002;
}

static void probe_exception(void *uc, uint32_t vector, void *user)
{
    Probe *probe = user;
    (void)uc;
    if (vector == 0x21) {
        probe->right += int_left_its_marks(probe);
    } else {
        probe->right += vector == 0 && division_left_its_marks(probe);
        U64(probe->env, ENV_EIP) += 2; /* step over the division */
    }
}

static bool written_register_is_at(void *uc, int number, const char *place)
{
    uint64_t value = 0x1122334455660000ull + (unsigned)number;
    return lib.reg_write(uc, number, &value) == 0 && *(const uint64_t *)place == value;
}

static bool idtr_is_at(void *uc, const char *segment)
{
    struct {
        uint16_t selector;
        uint64_t base;
        uint32_t limit;
        uint32_t flags;
    } idtr = {0, 0x123456789a, 0x5a5a, 0};
    return lib.reg_write(uc, UC_REG_IDTR, &idtr) == 0 &&
           U64(segment, SEG_BASE) == 0x123456789a && U32(segment, SEG_LIMIT) == 0x5a5a;
}

static bool flags_are_at(void *uc, char *env)
{
    uint64_t value = FLAGS_IF | FLAGS_DF | 0x41; /* ZF and CF: kept apart, as cc_src */
    if (lib.reg_write(uc, UC_REG_RFLAGS, &value) != 0) {
        return false;
    }
    return (U64(env, ENV_EFLAGS) & FLAGS_IF) && I32(env, ENV_DF) == -1 &&
           U64(env, ENV_CC_SRC) == 0x41 && compute_rflags(env) == (value | 2);
}

/* The first field that is not where we expect it, or NULL. */
static const char *wrong_register_field(void *uc, char *env)
{
    uint16_t selector = 0x1234;
    /* Unicorn opens the CPU with CS64, LMA, EFER.LME and EFER.LMA set and DR7 at its fixed value. */
    if ((U32(env, ENV_HFLAGS) & (HF_CS64 | HF_LMA)) != (HF_CS64 | HF_LMA)) return "hflags";
    if ((U64(env, ENV_EFER) & EFER_LONG_MODE) != EFER_LONG_MODE) return "efer";
    if (U64(env, ENV_DR + 8 * 7) != 0x400) return "dr7";
    if (!written_register_is_at(uc, UC_REG_RAX, env + ENV_REGS)) return "rax";
    if (!written_register_is_at(uc, UC_REG_R15, env + ENV_REGS + 8 * 15)) return "r15";
    if (!written_register_is_at(uc, UC_REG_RIP, env + ENV_EIP)) return "rip";
    if (!written_register_is_at(uc, UC_REG_CR2, env + ENV_CR + 8 * 2)) return "cr2";
    if (!flags_are_at(uc, env)) return "rflags";
    if (lib.reg_write(uc, UC_REG_CS, &selector) || U32(SEGMENT(env, CS), SEG_SELECTOR) != 0x1234)
        return "cs";
    if (!idtr_is_at(uc, env + ENV_IDT)) return "idtr";
    return NULL;
}

/* Makes the code that goes through all the functions this module stands in for: an MSR that the
 * library's own leave alone, and loads and stores where every access takes the slow path. */
static const uint8_t PROBE_CODE[] = {
    0xcd, 0x21,                                     /* int 0x21 */
    0xf7, 0xf3,                                     /* div bx */
    0x0f, 0x32, 0x0f, 0x30,                         /* rdmsr; wrmsr */
    0xa0, 0x00, 0x20, 0xa2, 0x00, 0x20,             /* mov al, [0x2000]; mov [0x2000], al */
    0xa1, 0x00, 0x20, 0xa3, 0x00, 0x20,             /* ax */
    0x66, 0xa1, 0x00, 0x20, 0x66, 0xa3, 0x00, 0x20, /* eax */
    0x0f, 0x6f, 0x06, 0x00, 0x20,                   /* movq mm0, [0x2000] */
    0x0f, 0x7f, 0x06, 0x00, 0x20,                   /* movq [0x2000], mm0 */
    0xf4,                                           /* hlt */
};

static uint64_t probe_read(void *uc, uint64_t offset, unsigned size_bytes, void *user)
{
    (void)uc, (void)offset, (void)size_bytes, (void)user;
    return 0;
}

static void probe_write(void *uc, uint64_t offset, unsigned size_bytes, uint64_t value, void *user)
{
    (void)uc, (void)offset, (void)size_bytes, (void)value, (void)user;
}

/* Runs that code with a pending interrupt and looks at what it left. */
static const char *wrong_execution_field(void *uc, char *cpu, char *env)
{
    Probe probe = {cpu, env, 0};
    size_t hook;
    uint64_t flags = 2;
    probe_request = 0;
    intercepted = 0;
    enter_real_mode(env);
    if (lib.reg_write(uc, UC_REG_RFLAGS, &flags) ||
        lib.mem_map(uc, 0x1000, PAGE_BYTES, UC_PROT_ALL) ||
        lib.mem_write(uc, 0x1000, PROBE_CODE, sizeof PROBE_CODE) ||
        lib.mmio_map(uc, 0x2000, PAGE_BYTES, probe_read, NULL, probe_write, NULL) ||
        lib.hook_add(uc, &hook, UC_HOOK_INTR, probe_exception, &probe, 1, 0)) {
        return "memory or hooks";
    }
    POINTER(POINTER(cpu, CPU_CLASS), lib.class_slot) = probe_take_interrupt;
    U32(cpu, CPU_INTERRUPT_REQUEST) = CPU_INTERRUPT_HARD;
    int error = lib.emu_start(uc, 0x1000, 0, 0, 0);
    if (error || probe.right != 2) return "exception state";
    if (probe_request != CPU_INTERRUPT_HARD) return "interrupt_request";
    uint64_t end = 0x1000 + sizeof PROBE_CODE;
    if (U32(cpu, CPU_HALTED) != 1 || U64(env, ENV_EIP) != end) return "halted";
    if (intercepted != (1u << INTERPOSED_COUNT) - 1) return CALLS_PASS_BY;
    return NULL;
}

/* Finds the CPU class's cpu_exec_interrupt by its value. */
static bool find_class_slot(void *class)
{
    for (size_t offset = 0; offset < 512; offset += sizeof(void *)) {
        if (POINTER(class, offset) == (void *)lib.cpu_exec_interrupt) {
            lib.class_slot = offset;
            return true;
        }
    }
    return false;
}

static const char *wrong_field(void *uc)
{
    uint64_t rax;
    if (lib.reg_read(uc, UC_REG_RAX, &rax)) return "a readable CPU"; /* this creates it */
    char *cpu = POINTER(uc, UC_CPU);
    if (cpu == NULL || (uintptr_t)cpu % 8) return "cpu";
    char *env = POINTER(cpu, CPU_ENV);
    /* Both structures are one allocation; look no further than it. */
    if (env < cpu || env > cpu + 65536 || POINTER(cpu, CPU_UC) != uc) return "env";
    if (!find_class_slot(POINTER(cpu, CPU_CLASS))) return "cpu_exec_interrupt";
    const char *wrong = wrong_register_field(uc, env);
    if (wrong != NULL) return wrong;
    U64(env, ENV_CR + 8 * 2) = 0;
    I32(env, ENV_OLD_EXCEPTION) = -1;
    return wrong_execution_field(uc, cpu, env);
}

static const char REMEDY[] = "install the x86-64 Linux wheel: pip install unicorn==2.1.4";

static bool prove_layout(const char *path)
{
    void *uc = NULL;
    int error = open_cpu(&uc);
    const char *wrong = error ? lib.strerror(error) : wrong_field(uc);
    if (uc != NULL) {
        lib.close(uc);
    }
    if (wrong == CALLS_PASS_BY) {
        PyErr_Format(PyExc_ImportError,
                     "%s: was loaded before kvmtick could put itself in front of it; open the "
                     "first kvmtick engine before anything imports unicorn", path);
    } else if (wrong != NULL) {
        PyErr_Format(PyExc_ImportError,
                     "%s: is Unicorn 2.1.4 but not the build expected (checked: %s); %s", path,
                     wrong, REMEDY);
    }
    return wrong == NULL;
}

/* ---- loading ------------------------------------------------------------------------------------ */

#define STANDS_IN(function, field) {#function, offsetof(Library, genuine.field), function}

static const struct {
    const char *name;
    size_t offset;
    void *ours;
} INTERPOSED[INTERPOSED_COUNT] = {
    [LOADS + BYTE] = STANDS_IN(helper_ret_ldub_mmu_x86_64, load[BYTE]),
    [LOADS + WORD] = STANDS_IN(helper_le_lduw_mmu_x86_64, load[WORD]),
    [LOADS + LONG] = STANDS_IN(helper_le_ldul_mmu_x86_64, load[LONG]),
    [LOADS + QUAD] = STANDS_IN(helper_le_ldq_mmu_x86_64, load[QUAD]),
    [STORES + BYTE] = STANDS_IN(helper_ret_stb_mmu_x86_64, store[BYTE]),
    [STORES + WORD] = STANDS_IN(helper_le_stw_mmu_x86_64, store[WORD]),
    [STORES + LONG] = STANDS_IN(helper_le_stl_mmu_x86_64, store[LONG]),
    [STORES + QUAD] = STANDS_IN(helper_le_stq_mmu_x86_64, store[QUAD]),
    [RDMSR] = STANDS_IN(helper_rdmsr_x86_64, rdmsr),
    [WRMSR] = STANDS_IN(helper_wrmsr_x86_64, wrmsr),
};

static bool resolve_symbol(const char *path, const char *name, size_t offset)
{
    void *symbol = dlsym(lib.handle, name);
    if (symbol == NULL) {
        PyErr_Format(PyExc_ImportError, "%s: expected Unicorn 2.1.4, found no symbol %s; %s", path,
                     name, REMEDY);
        return false;
    }
    POINTER(&lib, offset) = symbol;
    return true;
}

static bool resolve(const char *path)
{
    for (size_t i = 0; i < COUNT(SYMBOLS); i++) {
        if (!resolve_symbol(path, SYMBOLS[i].name, SYMBOLS[i].offset)) {
            return false;
        }
    }
    for (size_t i = 0; i < COUNT(INTERPOSED); i++) {
        if (!resolve_symbol(path, INTERPOSED[i].name, INTERPOSED[i].offset)) {
            return false;
        }
    }
    unsigned version = lib.version(NULL, NULL);
    if (version != UNICORN_2_1_4) {
        PyErr_Format(PyExc_ImportError, "%s: expected Unicorn 2.1.4, found %u.%u.%u; %s", path,
                     version >> 24, version >> 16 & 255, version >> 8 & 255, REMEDY);
        return false;
    }
    return true;
}

/* Makes the exported functions of this module win over the library's. */
static bool join_global_scope(void)
{
    static void *self;
    Dl_info here;
    if (self == NULL && dladdr(&lib, &here)) {
        self = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_GLOBAL);
    }
    if (self == NULL) {
        PyErr_SetString(PyExc_ImportError, "kvmtick.cpu._shim cannot join the global scope");
    }
    return self != NULL;
}

static void cannot_load(void)
{
    PyErr_Format(PyExc_ImportError, "expected Unicorn 2.1.4, cannot load it: %s; %s", dlerror(),
                 REMEDY);
}

/* A refused library that calls this module's functions stays loaded, for them to pass on to. */
static void refuse(void *handle)
{
    bool calls_ours = false;
    for (size_t i = 0; i < COUNT(INTERPOSED); i++) {
        void *symbol = dlsym(handle, INTERPOSED[i].name);
        if (symbol != NULL && symbol != INTERPOSED[i].ours) {
            calls_ours = true;
            if (lib.handle == NULL) {
                POINTER(&lib, INTERPOSED[i].offset) = symbol;
            }
        }
    }
    if (!calls_ours) {
        dlclose(handle);
    }
}

/* Joining cannot be taken back, and from then on every library must be passed on to. So look first
 * whether this one is there and is the version it should be. */
static bool rehearse(const char *path)
{
    void *handle = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (handle == NULL) {
        cannot_load();
        return false;
    }
    Library before = lib;
    lib.handle = handle;
    bool right = resolve(path);
    lib = before;
    dlclose(handle);
    return right;
}

static bool load_library(const char *path)
{
    if ((lib.handle == NULL && !rehearse(path)) || !join_global_scope()) {
        return false;
    }
    /* Local: the library exports glib look-alikes that must not answer for anybody else. */
    void *handle = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (handle == NULL) {
        cannot_load();
        return false;
    }
    Library before = lib;
    lib.handle = handle;
    if (!resolve(path) || !prove_layout(path)) {
        lib = before;
        refuse(handle);
        return false;
    }
    if (before.handle != NULL && before.handle != handle) {
        PyErr_Format(PyExc_ImportError, "%s: %s is in use in this process", path, before.path);
        lib = before;
        dlclose(handle);
        return false;
    }
    snprintf(lib.path, sizeof lib.path, "%s", path);
    return true;
}

static PyObject *shim_load(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&:load", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    const char *name = PyBytes_AS_STRING(path);
    bool loaded = (lib.handle != NULL && strcmp(name, lib.path) == 0) || load_library(name);
    Py_DECREF(path);
    if (!loaded) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- Engine: life --------------------------------------------------------------------------------- */

static void raise_unicorn(const char *what, int error)
{
    PyErr_Format(PyExc_RuntimeError, "unicorn: %s: %s", what, lib.strerror(error));
}

static bool check_open(const Engine *self)
{
    if (self->uc == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the engine is closed");
    }
    return self->uc != NULL;
}

static bool check_idle(const Engine *self)
{
    if (!check_open(self)) {
        return false;
    }
    if (self->running) {
        PyErr_SetString(PyExc_RuntimeError, "not while the guest runs");
    }
    return !self->running;
}

static void release_engine(Engine *self)
{
    if (self->uc != NULL) {
        lib.close(self->uc);
        self->uc = NULL;
    }
    while (self->ram_count > 0) {
        PyBuffer_Release(&self->ram[--self->ram_count].view);
    }
    self->near_span = 0;
    self->gap_count = 0;
}

static int engine_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    Engine *self = (Engine *)object;
    uint64_t rax;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Engine", names)) {
        return -1;
    }
    if (lib.handle == NULL || self->uc != NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        self->uc ? "the engine is already open" : "call load() first");
        return -1;
    }
    int error = open_cpu(&self->uc);
    if (!error) {
        error = lib.reg_read(self->uc, UC_REG_RAX, &rax); /* creates the CPU */
    }
    if (!error) {
        self->cpu = POINTER(self->uc, UC_CPU);
        self->env = POINTER(self->cpu, CPU_ENV);
        POINTER(POINTER(self->cpu, CPU_CLASS), lib.class_slot) = take_entry_event;
        error = add_hooks(self);
    }
    if (!error) {
        error = reset_cpu(self, 0xf000, 0xfff0);
    }
    if (error) {
        raise_unicorn("open", error);
        release_engine(self);
        return -1;
    }
    self->gaps_stale = true;
    self->rflags = 2;
    return 0;
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args, (void)kwargs;
    Engine *self = (Engine *)type->tp_alloc(type, 0);
    if (self != NULL && (self->error = PyUnicode_FromString("")) == NULL) {
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static int engine_traverse(PyObject *object, visitproc visit, void *arg)
{
    Engine *self = (Engine *)object;
    for (int i = 0; i < HANDLERS; i++) {
        Py_VISIT(self->handlers[i]);
    }
    for (int i = 0; i < 3; i++) {
        Py_VISIT(self->exception[i]);
    }
    return 0;
}

static int engine_clear(PyObject *object)
{
    Engine *self = (Engine *)object;
    for (int i = 0; i < HANDLERS; i++) {
        Py_CLEAR(self->handlers[i]);
    }
    for (int i = 0; i < 3; i++) {
        Py_CLEAR(self->exception[i]);
    }
    return 0;
}

static void engine_dealloc(PyObject *object)
{
    Engine *self = (Engine *)object;
    PyObject_GC_UnTrack(object);
    release_engine(self);
    engine_clear(object);
    Py_CLEAR(self->error);
    Py_TYPE(object)->tp_free(object);
}

static PyObject *engine_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    Engine *self = (Engine *)object;
    if (self->running) {
        PyErr_SetString(PyExc_RuntimeError, "not while the guest runs");
        return NULL;
    }
    release_engine(self);
    engine_clear(object);
    Py_RETURN_NONE;
}

/* ---- Engine: set-up --------------------------------------------------------------------------------- */

static bool check_handlers(PyObject *const *handlers)
{
    for (int i = 0; i < HANDLERS; i++) {
        bool absent = handlers[i] == NULL || (i > ON_IN && handlers[i] == Py_None);
        if (!absent && !PyCallable_Check(handlers[i])) {
            PyErr_SetString(PyExc_TypeError, "attach() needs callables: on_out, on_in, and for "
                                             "the others callables or None");
            return false;
        }
    }
    return true;
}

static PyObject *engine_attach(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"on_out",   "on_in",    "on_mmio_write", "on_mmio_read",
                            "on_wrmsr", "on_rdmsr", "on_cpuid",      NULL};
    Engine *self = (Engine *)object;
    PyObject *given[HANDLERS] = {NULL};
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OOOOO:attach", names, &given[ON_OUT],
                                     &given[ON_IN], &given[ON_MMIO_WRITE], &given[ON_MMIO_READ],
                                     &given[ON_WRMSR], &given[ON_RDMSR], &given[ON_CPUID]) ||
        !check_handlers(given)) {
        return NULL;
    }
    for (int i = 0; i < HANDLERS; i++) {
        PyObject *handler = given[i] == Py_None ? NULL : given[i];
        Py_XSETREF(self->handlers[i], Py_XNewRef(handler));
    }
    Py_RETURN_NONE;
}

static const char *ram_mistake(const Engine *self, uint64_t gpa, const Py_buffer *view)
{
    uint64_t size_bytes = (uint64_t)view->len;
    if (size_bytes == 0 || size_bytes % PAGE_BYTES || gpa % PAGE_BYTES ||
        (uintptr_t)view->buf % PAGE_BYTES) {
        return "RAM must start and end on a page of 4096 bytes";
    }
    if (gpa + size_bytes < gpa) {
        return "RAM ends above the last address";
    }
    for (int i = 0; i < self->ram_count; i++) {
        const RamRange *other = &self->ram[i];
        if (gpa < other->gpa + other->size_bytes && other->gpa < gpa + size_bytes) {
            return "RAM overlaps RAM that is mapped";
        }
    }
    return self->ram_count == RAM_RANGES_MAX ? "too many RAM ranges" : NULL;
}

static void insert_ram(Engine *self, uint64_t gpa, const Py_buffer *view)
{
    int i = self->ram_count++;
    for (; i > 0 && self->ram[i - 1].gpa > gpa; i--) {
        self->ram[i] = self->ram[i - 1];
    }
    self->ram[i] = (RamRange){gpa, (uint64_t)view->len, *view};
    self->gaps_stale = true;
}

static PyObject *engine_map_ram(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gpa", "ram", NULL};
    Engine *self = (Engine *)object;
    unsigned long long gpa;
    PyObject *ram;
    Py_buffer view;
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "KO:map_ram", names, &gpa, &ram) ||
        PyObject_GetBuffer(ram, &view, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    const char *mistake = ram_mistake(self, gpa, &view);
    if (mistake != NULL) {
        PyErr_SetString(PyExc_ValueError, mistake);
        PyBuffer_Release(&view);
        return NULL;
    }
    int error = unmap_gaps(self);
    if (!error) {
        error = lib.mem_map_ptr(self->uc, gpa, (uint64_t)view.len, UC_PROT_ALL, view.buf);
    }
    self->gaps_stale = true;
    if (error) {
        raise_unicorn("map_ram", error);
        PyBuffer_Release(&view);
        return NULL;
    }
    insert_ram(self, gpa, &view);
    Py_RETURN_NONE;
}

static PyObject *engine_ram_written(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gpa", "size_bytes", NULL};
    Engine *self = (Engine *)object;
    unsigned long long gpa, size_bytes;
    if (!check_open(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "KK:ram_written", names, &gpa, &size_bytes)) {
        return NULL;
    }
    /* Page by page: Unicorn looks up only where a range starts. */
    unsigned long long end = gpa + size_bytes;
    while (gpa < end) {
        unsigned long long next = (gpa | (PAGE_BYTES - 1)) + 1;
        if (next == 0) {
            break; /* the last page there can be, and no RAM */
        }
        lib.ctl(self->uc, UC_CTL_REMOVE_CACHE, (uint64_t)gpa, (uint64_t)(next < end ? next : end));
        gpa = next;
    }
    Py_RETURN_NONE;
}

static PyObject *after_reset(Engine *self, int error)
{
    if (error) {
        raise_unicorn("reset", error);
        return NULL;
    }
    self->rflags = 2;
    self->interruptibility = 0;
    self->retired = 0;
    self->idt_vectoring_info = 0;
    Py_RETURN_NONE;
}

static PyObject *engine_reset(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"cs", "ip", NULL};
    Engine *self = (Engine *)object;
    unsigned short cs, ip;
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "HH:reset", names, &cs, &ip)) {
        return NULL;
    }
    return after_reset(self, reset_cpu(self, cs, ip));
}

static PyObject *engine_reset_protected(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"eip", NULL};
    Engine *self = (Engine *)object;
    unsigned eip;
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "I:reset_protected", names, &eip)) {
        return NULL;
    }
    return after_reset(self, reset_cpu_protected(self, eip));
}

static PyObject *engine_use_host_tsc(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"offset_ns", NULL};
    Engine *self = (Engine *)object;
    long long offset_ns;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L:use_host_tsc", names, &offset_ns)) {
        return NULL;
    }
    self->host_tsc = true;
    self->host_tsc_offset_ns = offset_ns;
    Py_RETURN_NONE;
}

static PyObject *engine_release_gil(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"enabled", NULL};
    Engine *self = (Engine *)object;
    int enabled;
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "p:release_gil", names, &enabled)) {
        return NULL;
    }
    self->releases_gil = enabled;
    Py_RETURN_NONE;
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

static PyObject *engine_registers(PyObject *object, PyObject *unused)
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

static PyObject *engine_set_register(PyObject *object, PyObject *args, PyObject *kwargs)
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

/* ---- Engine: enter, kick ---------------------------------------------------------------------------- */

static PyObject *engine_kick(PyObject *object, PyObject *unused)
{
    (void)unused;
    Engine *self = (Engine *)object;
    __atomic_store_n(&self->kicked, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&self->watch_from, 0, __ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

static const char *entry_mistake(const Engine *self, uint32_t info, uint64_t budget)
{
    uint32_t type = INTR_INFO_TYPE(info);
    if (self->handlers[ON_OUT] == NULL) {
        return "attach() must precede the first enter()";
    }
    if (budget == 0) {
        return "the budget must be positive";
    }
    if ((info & INTR_INFO_VALID) && (type == 1 || type == 7)) {
        return "the interruption type is reserved";
    }
    if ((info & INTR_INFO_VALID) && type == TYPE_NMI && INTR_INFO_VECTOR(info) != 2) {
        return "an NMI has vector 2";
    }
    return NULL;
}

static void set_error(Engine *self, const char *reason)
{
    char place[64];
    snprintf(place, sizeof place, "cs:rip %x:%llx", U32(SEGMENT(self->env, CS), SEG_SELECTOR),
             (unsigned long long)U64(self->env, ENV_EIP));
    PyObject *text = PyUnicode_FromFormat("%s at %s", reason, place);
    if (text == NULL) {
        PyErr_Clear();
        return;
    }
    Py_XSETREF(self->error, text);
}

/* Why the guest stopped, from what Unicorn's loop left behind. */
static int classify(Engine *self, int error)
{
    if (self->exit_reason != EXIT_NONE) {
        return self->exit_reason;
    }
    if (self->failed) {
        return EXIT_CALLBACK_FAILED;
    }
    if (error == UC_ERR_FETCH_UNMAPPED || error == UC_ERR_FETCH_PROT) {
        /* There is no instruction to hook, but the boundary before it is one all the same. */
        int reason = boundary_reason(self);
        if (reason != EXIT_NONE) {
            return reason;
        }
    }
    if (error) {
        set_error(self, lib.strerror(error));
        return EXIT_INTERNAL_ERROR;
    }
    if (I32(self->env, ENV_OLD_EXCEPTION) == DOUBLE_FAULT) {
        return EXIT_TRIPLE_FAULT;
    }
    if (U32(self->cpu, CPU_HALTED)) {
        return EXIT_HLT;
    }
    set_error(self, "the guest stopped without a reason");
    return EXIT_INTERNAL_ERROR;
}

static int run_guest(Engine *self)
{
    uint64_t begin = U64(self->env, ENV_EIP);
    Engine *outer = entered;
    entered = self;
    self->running = true;
    if (self->releases_gil) {
        self->released = PyEval_SaveThread();
    }
    int error = lib.emu_start(self->uc, begin, 0, 0, 0);
    if (self->releases_gil) {
        PyEval_RestoreThread(self->released);
        self->released = NULL;
    }
    self->running = false;
    entered = outer;
    return error;
}

static bool prepare(Engine *self, uint32_t intr_info)
{
    if (unlikely(self->gaps_stale)) {
        int error = unmap_gaps(self);
        if (!error) {
            error = map_gaps(self);
        }
        if (error) {
            raise_unicorn("map", error);
            return false;
        }
    }
    self->started = 0;
    self->port_read_by = 0;
    self->exit_reason = EXIT_NONE;
    self->failed = false;
    self->intr_info = intr_info;
    set_watch(self);
    I32(self->env, ENV_OLD_EXCEPTION) = -1;
    U32(self->cpu, CPU_INTERRUPT_REQUEST) = intr_info & INTR_INFO_VALID ? CPU_INTERRUPT_HARD : 0;
    return true;
}

static PyObject *finish(Engine *self, int error)
{
    int reason = classify(self, error);
    self->rflags = compute_rflags(self->env);
    self->interruptibility = compute_interruptibility(self);
    self->retired = self->started;
    if (reason == EXIT_CALLBACK_FAILED || self->failed) {
        PyErr_Restore(self->exception[0], self->exception[1], self->exception[2]);
        self->exception[0] = self->exception[1] = self->exception[2] = NULL;
        return NULL;
    }
    return PyLong_FromLong(reason);
}

static PyObject *enter_guest(Engine *self, PyObject *const *values)
{
    unsigned long intr_info = PyLong_AsUnsignedLong(values[0]);
    int irq_window = PyObject_IsTrue(values[1]);
    int nmi_window = PyObject_IsTrue(values[2]);
    unsigned long long budget = PyLong_AsUnsignedLongLong(values[3]);
    unsigned long long tsc = PyLong_AsUnsignedLongLongMask(values[4]);
    if (unlikely(PyErr_Occurred() != NULL) || !check_idle(self)) {
        return NULL;
    }
    const char *mistake = entry_mistake(self, (uint32_t)intr_info, budget);
    if (mistake != NULL) {
        PyErr_SetString(PyExc_ValueError, mistake);
        return NULL;
    }
    self->irq_window = irq_window;
    self->nmi_window = nmi_window;
    self->budget = budget;
    self->tsc = tsc;
    if (!prepare(self, (uint32_t)intr_info)) {
        return NULL;
    }
    return finish(self, run_guest(self));
}

static const char *const ENTER_NAMES[] = {"intr_info", "irq_window", "nmi_window", "budget", "tsc"};

/* Puts keyword arguments of `enter` where positional ones would be. */
static bool place_keywords(PyObject *const *args, Py_ssize_t count, PyObject *names,
                           PyObject **values)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        size_t k = 0;
        while (k < COUNT(ENTER_NAMES) &&
               PyUnicode_CompareWithASCIIString(name, ENTER_NAMES[k]) != 0) {
            k++;
        }
        if (k == COUNT(ENTER_NAMES) || values[k] != NULL) {
            return false;
        }
        values[k] = args[count + i];
    }
    return true;
}

static PyObject *engine_enter(PyObject *object, PyObject *const *args, Py_ssize_t count,
                              PyObject *names)
{
    PyObject *values[COUNT(ENTER_NAMES)] = {NULL};
    bool right = count <= (Py_ssize_t)COUNT(ENTER_NAMES);
    for (Py_ssize_t i = 0; right && i < count; i++) {
        values[i] = args[i];
    }
    if (right && names != NULL) {
        right = place_keywords(args, count, names, values);
    }
    for (size_t i = 0; i < COUNT(ENTER_NAMES); i++) {
        right = right && values[i] != NULL;
    }
    if (!right) {
        PyErr_SetString(PyExc_TypeError,
                        "enter() takes intr_info, irq_window, nmi_window, budget and tsc");
        return NULL;
    }
    return enter_guest((Engine *)object, values);
}

/* ---- the module --------------------------------------------------------------------------------------- */

#define WITH_KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS

static PyMethodDef engine_methods[] = {
    {"attach", WITH_KEYWORDS(engine_attach), "Set who answers the guest's accesses."},
    {"map_ram", WITH_KEYWORDS(engine_map_ram), "Put RAM at a guest-physical address."},
    {"ram_written", WITH_KEYWORDS(engine_ram_written), "The host wrote guest RAM."},
    {"reset", WITH_KEYWORDS(engine_reset), "Real mode at cs:ip, as after RESET."},
    {"reset_protected", WITH_KEYWORDS(engine_reset_protected), "32-bit protected mode at eip."},
    {"enter", (PyCFunction)(void (*)(void))engine_enter, METH_FASTCALL | METH_KEYWORDS,
     "Run the guest until the next VM exit."},
    {"kick", engine_kick, METH_NOARGS, "Leave the guest at the next instruction boundary."},
    {"use_host_tsc", WITH_KEYWORDS(engine_use_host_tsc), "The TSC is CLOCK_MONOTONIC - offset."},
    {"release_gil", WITH_KEYWORDS(engine_release_gil), "Let other threads run with the guest."},
    {"registers", engine_registers, METH_NOARGS, "The guest's registers by name."},
    {"set_register", WITH_KEYWORDS(engine_set_register), "Write one register."},
    {"close", engine_close, METH_NOARGS, "Give everything back."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef engine_members[] = {
    {"rflags", T_ULONGLONG, offsetof(Engine, rflags), 0, "RFLAGS at the last exit."},
    {"interruptibility", T_UINT, offsetof(Engine, interruptibility), 0, "Shadow at the last exit."},
    {"retired", T_ULONGLONG, offsetof(Engine, retired), 0, "Instructions in the last entry."},
    {"idt_vectoring_info", T_UINT, offsetof(Engine, idt_vectoring_info), 0, "Always 0."},
    {"error", T_OBJECT, offsetof(Engine, error), 0, "Why the last INTERNAL_ERROR happened."},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject engine_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "kvmtick.cpu._shim.Engine",
    .tp_doc = "One x86 CPU on libunicorn; see kvmtick.cpu.engine.Engine.",
    .tp_basicsize = sizeof(Engine),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = engine_new,
    .tp_init = engine_init,
    .tp_dealloc = engine_dealloc,
    .tp_traverse = engine_traverse,
    .tp_clear = engine_clear,
    .tp_methods = engine_methods,
    .tp_members = engine_members,
};

static PyMethodDef shim_methods[] = {
    {"load", shim_load, METH_VARARGS, "Load libunicorn and prove that it is the one expected."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef shim_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvmtick.cpu._shim",
    .m_doc = "Guest execution on libunicorn 2.1.4.",
    .m_size = -1,
    .m_methods = shim_methods,
};

PyMODINIT_FUNC PyInit__shim(void)
{
    if (PyType_Ready(&engine_type) < 0) {
        return NULL;
    }
    PyObject *module = PyModule_Create(&shim_module);
    if (module != NULL &&
        PyModule_AddObjectRef(module, "Engine", (PyObject *)&engine_type) < 0) {
        Py_CLEAR(module);
    }
    return module;
}
