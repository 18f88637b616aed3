/*
 * What the parts of kvmtick.cpu._shim share: the numbers and structures of libunicorn 2.1.4, the
 * engine's state, and the functions that each part gives the others.
 *
 * One `Engine` is one virtual CPU. All state is in the object; the module's only globals are the
 * resolved functions of the library (`lib`), which never change once loaded, and a thread-local
 * pointer to the engine that is inside `enter`.
 */

#ifndef KVMTICK_SHIM_H
#define KVMTICK_SHIM_H

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
#define INLINE static inline __attribute__((always_inline))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- Unicorn's public API: the values we use --------------------------------------------- */

#define UNICORN_2_1_4 0x020104ffu
#define UC_ARCH_X86 4
#define UC_MODE_64 8
#define UC_PROT_READ 1
#define UC_PROT_WRITE 2
#define UC_PROT_EXEC 4
#define UC_PROT_ALL 7
#define UC_HOOK_INTR (1 << 0)
#define UC_HOOK_INSN (1 << 1)
#define UC_HOOK_CODE (1 << 2)
#define UC_HOOK_INSN_INVALID (1 << 14)
#define UC_ERR_FETCH_UNMAPPED 8
#define UC_ERR_FETCH_PROT 14
#define UC_INS_CPUID 113
#define UC_REG_CS 11
#define UC_REG_RAX 35
#define UC_REG_RIP 41
#define UC_REG_CR2 52
#define UC_REG_R15 113
#define UC_REG_IDTR 242
#define UC_REG_MSR 248
#define UC_REG_RFLAGS 253
/* The model of Unicorn's list that executes the most of what an Intel processor has. */
#define UC_CPU_ICELAKE_SERVER 26

#define UC_CTL_WRITE(number, arguments) ((number) | ((arguments) << 26) | (1u << 30))
#define UC_CTL_USE_EXITS UC_CTL_WRITE(4, 1)
#define UC_CTL_CPU_MODEL UC_CTL_WRITE(7, 1)
#define UC_CTL_FLUSH_TLB UC_CTL_WRITE(11, 0)
#define UC_CTL_TCG_BUFFER_SIZE UC_CTL_WRITE(13, 1)

/* ---- 2.1.4's structures: offsets in bytes, proven by prove_layout --------------------------
 * cc_dst, cc_src2, hflags2, ldt, tr and gdt are proven only by the fields around them. */

enum { /* uc_struct */
    UC_CPU = 440,
    UC_TCG = 768,
    UC_STOP_REQUEST = 1389,
    UC_ERROR = 1424,        /* invalid_error: what uc_emu_start returns */
    UC_NESTED_LEVEL = 14840, /* how many uc_emu_start are under way */
};

enum { /* TCGContext, and the operations of the block being translated */
    TCG_OPS = 29576,
    OP_KIND = 0,
    OP_NEXT = 8,
    OP_ARGUMENTS = 24,
};

enum { /* TranslationBlock */
    TB_PC = 0,
    TB_SIZE = 20,
    TB_INSTRUCTIONS = 22,
};

enum { /* CPUState */
    CPU_NEXT_BLOCK = 24, /* CFLAGS_NEXT_TB: how many instructions at most, NO_LIMIT */
    CPU_INTERRUPT_REQUEST = 28,
    CPU_ENV = 296,
    CPU_ACCESS_AT = 33144, /* MEM_IO_PC: where translated code accesses no RAM */
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
    ENV_SYSENTER_CS = 4800,
    ENV_SYSENTER_ESP = 4808,
    ENV_SYSENTER_EIP = 4816,
    ENV_STAR = 4824,
    ENV_LSTAR = 4840,
    ENV_CSTAR = 4848,
    ENV_FMASK = 4856,
    ENV_KERNEL_GS_BASE = 4864,
    ENV_TSC_AUX = 4896,
    ENV_XCR0 = 4904,
    ENV_ERROR_CODE = 5384,
    ENV_EXCEPTION_IS_INT = 5388,
    ENV_EXCEPTION_NEXT_EIP = 5392,
    ENV_DR = 5400,
    ENV_OLD_EXCEPTION = 5496,
};

enum { SEGMENT_BYTES = 24, SEG_SELECTOR = 0, SEG_BASE = 8, SEG_LIMIT = 16, SEG_FLAGS = 20 };
enum { ES, CS, SS, DS, FS, GS };
enum { RAX, RCX, RDX, RBX, RSP, RDI = 7, R11 = 11 };

#define U32(base, offset) (*(uint32_t *)((char *)(base) + (offset)))
#define U16(base, offset) (*(uint16_t *)((char *)(base) + (offset)))
#define BOOL(base, offset) (*((bool *)(base) + (offset)))
#define I32(base, offset) (*(int32_t *)((char *)(base) + (offset)))
#define U64(base, offset) (*(uint64_t *)((char *)(base) + (offset)))
#define POINTER(base, offset) (*(void **)((char *)(base) + (offset)))
#define REGISTER(env, number) U64(env, ENV_REGS + 8 * (number))
#define SEGMENT(env, number) ((char *)(env) + ENV_SEGS + SEGMENT_BYTES * (number))

#define NO_LIMIT UINT32_MAX
#define PAGE_WALK 1 /* no address of translated code */
#define CC_OP_FLAGS 1 /* cc_src holds the arithmetic flags */
#define CPU_INTERRUPT_HARD 2u
#define HF_CPL 0x3u
#define HF_INHIBIT_IRQ (1u << 3) /* the shadow of STI and MOV SS */
#define HF_CS32 (1u << 4)
#define HF_SS32 (1u << 5)
#define HF_ADDSEG (1u << 6)
#define HF_PE (1u << 7)
#define HF_MP_EM_TS (7u << 9)
#define HF_LMA (1u << 14)
#define HF_CS64 (1u << 15)
#define HF2_NMI (1u << 2) /* NMIs are blocked until IRET */
#define FLAGS_IF (1u << 9)
#define FLAGS_DF (1u << 10)
#define FLAGS_ARITHMETIC 0x8d5u /* CF PF AF ZF SF OF */
#define FLAGS_CF 1u
#define FLAGS_TF (1u << 8)
#define FLAGS_RF (1u << 16)
#define FLAGS_VM (1u << 17)
#define EFER_SCE (1u << 0)
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)
#define EFER_DEFINED 0xd01u /* these and NXE */
#define EFER_LONG_MODE 0x500u /* LME, LMA */
#define CR0_PE (1u << 0)
#define CR0_ET (1u << 4)
#define CR0_NW (1u << 29)
#define CR0_CD (1u << 30)
#define CR0_PG (1u << 31)
#define CR0_DEFINED 0xe005003fu
#define CR4_TSD (1u << 2)
#define CR4_PAE (1u << 5)
#define CR4_LA57 (1u << 12)
#define CR4_FSGSBASE (1u << 16)
#define CR4_OSXSAVE (1u << 18)
#define CR4_SMEP (1u << 20)
#define CR4_SMAP (1u << 21)
#define CR4_PKE (1u << 22)
/* What the CPU model executes: TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT LA57 FSGSBASE OSXSAVE
 * SMEP SMAP PKE; some of them only if CPUID offers them. */
#define CR4_DEFINED 0x7517fcu
#define PHYSICAL_ADDRESS_BITS 40
#define DR6_FIXED 0xffff0ff0u
#define DR7_FIXED 0x400u
#define XCR0_X87 1u
#define DEBUG_EXCEPTION 1
#define INVALID_OPCODE 6
#define DOUBLE_FAULT 8
#define GENERAL_PROTECTION 13
#define PAGE_FAULT 14
#define ERROR_CODE_EXT 1
#define ERROR_CODE_IDT 2
#define PAGE_FAULT_WRITE 2
#define INSTRUCTION_BYTES_MAX 15
#define OPERAND_64_BITS 2 /* as the helpers have it */
/* A segment's flags: bits 63:32 of its descriptor. */
#define SEG_DPL_SHIFT 13
#define SEG_PRESENT (1u << 15)
#define SEG_TYPE 0x1f00u /* and S */
#define SEG_BUSY (1u << 9) /* of a TSS */
#define SEG_LONG (1u << 21)
#define SEG_BIG (1u << 22)
#define CODE_SEGMENT_FLAGS 0x009b00u /* present, code, readable, accessed */

/* ---- the contract's numbers (kvmtick.cpu.engine) ------------------------------------------- */

enum {
    EXIT_NONE = 0, /* never returned: the basic exit reason 0 (an exception) is not ours */
    EXIT_EXTERNAL_INTERRUPT = 1,
    EXIT_TRIPLE_FAULT = 2,
    EXIT_INTERRUPT_WINDOW = 7,
    EXIT_NMI_WINDOW = 8,
    EXIT_HLT = 12,
    EXIT_PAUSE = 40,
    EXIT_PREEMPTION_TIMER = 52,
    EXIT_INTERNAL_ERROR = 0x10000,
    EXIT_BREAKPOINT = 0x10001,
    EXIT_ACCESS = 0x10002,
    EXIT_CALLBACK_FAILED = -1, /* never returned: enter raises */
};

enum { EXIT_INTERRUPTIBILITY_SHIFT = 24, EXIT_RETIRED_SHIFT = 32 };
enum { SHADOW_STI = 1, SHADOW_MOV_SS = 2, SHADOW_NMI = 8 };
enum { TYPE_EXTERNAL, TYPE_NMI = 2, TYPE_HARDWARE, TYPE_INT_N, TYPE_ICEBP, TYPE_INT3_INTO };

/* CPU_MSRS: those that are the CPU's own. */
#define MSR_SYSENTER_CS 0x174u
#define MSR_SYSENTER_ESP 0x175u
#define MSR_SYSENTER_EIP 0x176u
#define MSR_EFER 0xc0000080u
#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_FMASK 0xc0000084u
#define MSR_FS_BASE 0xc0000100u
#define MSR_GS_BASE 0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u
#define MSR_TSC_AUX 0xc0000103u

#define INTR_INFO_VALID (1u << 31)
#define INTR_INFO_DELIVER_CODE (1u << 11)
#define INTR_INFO_VECTOR(info) ((info) & 0xff)
#define INTR_INFO_TYPE(info) (((info) >> 8) & 7)

#define PAGE_BYTES 4096u
#define FOUR_GIB (1ull << 32)
#define PHYSICAL_END (1ull << PHYSICAL_ADDRESS_BITS)
#define NO_ADDRESS UINT64_MAX
#define NEVER UINT64_MAX
#define RAM_RANGES_MAX 128
#define CODE_CACHE_BYTES (64u << 20)

/* ---- the library ------------------------------------------------------------------------------ */

/* Sizes of memory accesses, as logarithms. */
enum { BYTE, WORD, LONG, QUAD, SIZES };

/* What translated code calls for accesses it cannot do by itself; the return address is the
 * library's business, and so is `oi` but for the privilege in it. Of `value` the low bits count. */
typedef uint64_t Load(void *env, uint64_t linear, uint32_t oi, uintptr_t return_address);
typedef void Store(void *env, uint64_t linear, uint64_t value, uint32_t oi,
                   uintptr_t return_address);
#define OI_MMU_INDEX(oi) ((oi) & 15)
/* The same for the library's own helpers. */
typedef uint32_t HelperLoad(void *env, uint64_t linear, int mmu_index, uintptr_t return_address);
typedef void HelperStore(void *env, uint64_t linear, uint32_t value, int mmu_index,
                         uintptr_t return_address);
#define MMU_KERNEL 2 /* without SMAP */
enum { ACCESS_LOAD, ACCESS_STORE, ACCESS_FETCH };

typedef uint64_t In(void *env, uint32_t port);
typedef void Out(void *env, uint32_t port, uint32_t value);
enum { PORT_SIZES = QUAD };

/* The library's own functions that this module stands in front of. */
typedef struct {
    void (*rdmsr)(void *env);
    void (*wrmsr)(void *env);
    Load *load[SIZES];
    Store *store[SIZES];
    HelperLoad *helper_load[QUAD]; /* of words and dwords */
    HelperStore *helper_store[QUAD];
    void (*raise_interrupt)(void *env, int vector, int size_bytes);
    void (*into)(void *env, int size_bytes);
    void (*iret_real)(void *env, int shift);
    void (*iret_protected)(void *env, int shift, int next_eip);
    void (*syscall)(void *env, int size_bytes);
    void (*sysret)(void *env, int operand_size);
    void (*sysenter)(void *env, int size_bytes);
    void (*sysexit)(void *env, int operand_size);
    void (*ltr)(void *env, int selector);
    uint64_t (*read_cr)(void *env, int number);
    void (*write_cr)(void *env, int number, uint64_t value);
    uint64_t (*rdrand)(void *env);
    void (*rdtsc)(void *env);
    void (*rdtscp)(void *env);
    void (*sti)(void *env);
    In *in[PORT_SIZES];
    Out *out[PORT_SIZES];
    void (*pause)(void *env, int size_bytes);
    void (*check_exit_request)(void *uc, uint32_t in_delay_slot);
    void (*translate)(void *cpu, void *block, int instructions_max);
    void (*loop_exit_noexc)(void *cpu);
    void (*find_state)(void *env, void *block, uint64_t *at_instruction);
    void (*protect_code)(void *uc, uint64_t ram_address);
    void (*unprotect_code)(void *uc, uint64_t ram_address);
    void (*invalidate_stored)(void *uc, void *pages, uint64_t ram_address, int size_bytes,
                              uintptr_t return_address);
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
    int (*mem_map_ptr)(void *, uint64_t, uint64_t, uint32_t, void *);
    int (*mem_unmap)(void *, uint64_t, uint64_t);
    int (*mmio_map)(void *, uint64_t, uint64_t, void *, void *, void *, void *);
    void (*resume)(void *uc);
    void (*cpu_reset)(void *cpu);
    /* QEMU's own functions, exported with the target's suffix. */
    bool (*cpu_exec_interrupt)(void *cpu, int request);
    void (*do_interrupt)(void *cpu);
    void (*do_interrupt_hardirq)(void *env, int vector, int is_hardware);
    uint64_t (*cc_compute_all)(uint64_t dst, uint64_t src, uint64_t src2, int op);
    void (*update_cr4)(void *env, uint32_t value);
    void (*update_dr7)(void *env, uint32_t value);
    void (*raise_exception)(void *env, int vector, int error_code, uintptr_t return_address);
    void (*remove_operation)(void *tcg, void *operation);
    void (*loop_exit)(void *cpu);
    void (*loop_exit_restore)(void *cpu, uintptr_t return_address);
    bool (*restore_state)(void *cpu, uintptr_t return_address, bool will_exit);
    void (*check_port[PORT_SIZES])(void *env, uint32_t port); /* #GP unless the TSS allows it */
    uint64_t (*page_of)(void *cpu, uint64_t linear, void *attributes);
    uint64_t (*ram_address_of)(void *uc, const void *host);
    void (*invalidate_range)(void *uc, uint64_t start, uint64_t end); /* RAM addresses */
    void (*tlb_set_dirty)(void *cpu, uint64_t linear);
    void (*tlb_reset_dirty)(void *cpu, uint64_t host, uint64_t size_bytes);
    void *(*probe_access)(void *env, uint64_t linear, int size_bytes, int access, int mmu_index,
                          uintptr_t return_address);
    bool (*tlb_vaddr_to_paddr)(void *env, uint64_t linear, int access, int mmu_index,
                               uint64_t *gpa);
    char *(*tlb_vaddr_to_host)(void *env, uint64_t linear, int access, int mmu_index);
    size_t class_slot; /* offset of cpu_exec_interrupt in the CPU class */
} Library;

extern Library lib;

/* ---- the engine ---------------------------------------------------------------------------- */

typedef struct {
    uint64_t gpa;
    uint64_t size_bytes;
    Py_buffer view;
    uint64_t ram_address; /* the library's own numbering of RAM */
    uint8_t *code;        /* a byte a page: whether the engine has translated code there */
    bool writable;
    uint8_t **copies; /* of pages with code as it was when translated; NULL: only we write it */
} RamRange;

typedef struct Engine Engine;

typedef struct { /* physical memory that is no RAM */
    Engine *engine;
    uint64_t gpa;
    uint64_t size_bytes;
} Gap;

/* In the order of `attach`; the first two are always there. */
enum {
    ON_OUT,
    ON_IN,
    ON_MMIO_WRITE,
    ON_MMIO_READ,
    ON_WRMSR,
    ON_RDMSR,
    ON_CPUID,
    ON_CR8_WRITE,
    ON_CR8_READ,
    ON_HYPERCALL,
    HANDLERS
};

struct Engine {
    PyObject_HEAD
    Engine *next_opened;
    Engine *sharing; /* the next one in the ring of those that share RAM; itself when alone */
    void *uc;        /* NULL when closed */
    char *cpu;
    char *env;

    /* Looked at before every instruction, or block of them. */
    uint64_t started;      /* instructions begun since the entry */
    uint64_t watch_from;   /* atomic; look closer once `started` is there: the budget, or 0 */
    uint64_t last_address; /* linear address of the instruction begun last */
    uint32_t last_block;   /* when not exact: the BLOCK_ bits of the block begun last */

    /* Looked at closer. */
    uint64_t budget;
    uint64_t deadline_ns; /* of CLOCK_MONOTONIC; 0: none */
    uint64_t look_at;     /* `started` at the next look at the clock, */
    uint64_t looked_at;   /* and at the last one, */
    uint64_t looked_ns;   /* and when that was */
    int kicked;  /* atomic; set by any thread */
    bool failed; /* a callback raised; the exception is in `exception` */
    bool refused; /* a handler does not answer the access now */
    bool irq_window;
    bool nmi_window;
    uint64_t *breakpoints; /* linear addresses, ascending */
    size_t breakpoint_count;

    bool exact;
    bool exits_on_pause;
    int exit_reason;
    uint32_t intr_info; /* the event of this entry until it is delivered */
    int delivering;     /* the event being delivered: of which kind (events.c) */
    unsigned software_interrupt_bytes; /* of the last INT n, INT3 or INTO */
    uint64_t iret_at;                  /* `started` at the last IRET */
    uintptr_t iret_return_address;     /* 0 outside of IRET */
    uintptr_t port_return_address;     /* 0: RIP and the flags are in their places */
    uint64_t sti_at;                   /* the same of STI */
    uint64_t random;                   /* state of the generator behind RDRAND */
    uint64_t tsc; /* the machine's, at the entry */
    bool live_tsc;
    uint64_t tsc_khz; /* the guest's: it was `tsc_value` at `tsc_at_ns` */
    uint64_t tsc_value;
    uint64_t tsc_at_ns;

    bool running;
    bool releases_gil;
    PyThreadState *released; /* while the guest runs without the GIL */
    PyObject *exception[3];
    PyObject *handlers[HANDLERS];

    RamRange ram[RAM_RANGES_MAX];
    int ram_count;
    bool ins_has_tried; /* INS has made its trial store (memory.c) */
    Gap gaps[RAM_RANGES_MAX + 2]; /* up to PHYSICAL_END */
    int gap_count;
    int high_gap_count; /* of those, from 4 GiB on: the first ones */
    bool gaps_stale;

    /* What the last exit reports. */
    unsigned long long rflags;
    unsigned int interruptibility;
    unsigned long long retired;
    unsigned int idt_vectoring_info;
    unsigned long long last_exit;
    unsigned int entry_error_code; /* of the exception that `enter` is given */
    unsigned long long rounds;
    PyObject *error;
};

/* The engine inside `enter` on this thread: QEMU's class functions carry no user data. Looked at in
 * every store, hence without a call of the dynamic linker. */
#define INITIAL_EXEC __attribute__((tls_model("initial-exec")))
extern __thread Engine *entered INITIAL_EXEC;

/* ---- what each part gives the others ------------------------------------------------------- */

/* library.c */
int resume(void *uc);
PyObject *shim_load(PyObject *module, PyObject *args);

/* engine.c */
int open_cpu(void **uc);
void raise_unicorn(const char *what, int error);
bool check_open(const Engine *self);
bool check_idle(const Engine *self);

/* state.c */
uint64_t compute_rflags(const char *env);
typedef struct {
    bool rep;
    bool address_size;
    unsigned size_bytes;
} Prefixes;
uint64_t linear_rip(const char *env);
const uint8_t *code_at(Engine *self, uint64_t linear);
uint8_t opcode_at(Engine *self, uint64_t linear, Prefixes *prefixes);
bool is_string_operation(uint8_t opcode);
uint64_t count_mask(const Engine *self, bool address_size_prefix);
void forget_last_instruction(Engine *self);
bool steps_over_finished_rep(Engine *self, uint64_t address);
uint64_t running_instruction(const Engine *self, uintptr_t return_address);
unsigned compute_interruptibility(const Engine *self);
void set_interruptibility(Engine *self, unsigned state);

/* boundary.c */
void set_watch(Engine *self);
int boundary_reason(Engine *self, uint64_t address);
void leave_block_behind(Engine *self, unsigned opcode_bytes);
void on_instruction(void *uc, uint64_t address, uint32_t size_bytes, void *engine);

/* events.c */
bool take_entry_event(void *cpu, int request);
void on_exception(void *uc, uint32_t vector, void *engine);
bool on_invalid_opcode(void *uc, void *engine);
void drop_stale_rf(Engine *self);
void carry_over(Engine *self);

/* callbacks.c */
void take_gil(Engine *self);
void give_gil(Engine *self);
void keep_exception(Engine *self);
PyObject *call_handler(Engine *self, int which, const unsigned long long *values, size_t count);
void settle_registers(Engine *self);
void write_port(Engine *self, uint32_t port, unsigned size_bytes, uint32_t value,
                uintptr_t return_address);
uint64_t read_port(Engine *self, uint32_t port, unsigned size_bytes, uintptr_t return_address);
void write_mmio(Engine *self, uint64_t gpa, unsigned size_bytes, uint64_t value,
                uintptr_t return_address);
uint64_t read_mmio(Engine *self, uint64_t gpa, unsigned size_bytes, uintptr_t return_address);
uint64_t ask_hypercall(Engine *self);
void on_mmio_write(void *uc, uint64_t offset, unsigned size_bytes, uint64_t value, void *user);
uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size_bytes, void *user);

/* code.c */
void join_engines(Engine *self);
void leave_engines(Engine *self);
bool maps_memory(const Engine *self, const Py_buffer *view);
void share_memory(Engine *self, const Py_buffer *view);
bool anybody_has_code_at(const Engine *self, const RamRange *range, const char *host);
void let_stores_be_fast(Engine *self, uint64_t linear, uint32_t oi);
void forget_written(Engine *self, uint64_t gpa, uint64_t size_bytes);
void forget_stored(Engine *self, const RamRange *range, char *host, unsigned size_bytes,
                   uintptr_t return_address);
void forget_range(Engine *self, const RamRange *range);
void forget_changed(Engine *self);

/* memory.c */
/* The range that holds the byte at `gpa`, or NULL. */
INLINE const RamRange *ram_at(const Engine *self, uint64_t gpa)
{
    for (int i = 0; i < self->ram_count; i++) {
        if (gpa - self->ram[i].gpa < self->ram[i].size_bytes) {
            return &self->ram[i];
        }
    }
    return NULL;
}
int unmap_gaps(Engine *self);
int map_gaps(Engine *self);
void free_range(RamRange *range);
PyObject *engine_map_ram(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *engine_unmap_ram(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *engine_ram_written(PyObject *object, PyObject *args, PyObject *kwargs);

/* system.c */
bool is_canonical(const char *env, uint64_t address);
uint32_t cpuid_vendor(Engine *self);
int on_cpuid(void *uc, void *engine);
uint64_t monotonic_ns(void);

/* registers.c */
void update_hflags(char *env);
void enter_real_mode(char *cpu);
bool has_task(const char *env);
int reset_cpu(Engine *self, uint16_t cs, uint16_t ip);
PyObject *engine_registers(PyObject *object, PyObject *unused);
PyObject *engine_set_registers(PyObject *object, PyObject *values);

/* ---- functions that stand in for the library's ------------------------------------------------
 *
 * In every engine of the process, ours and others'. Translated code calls them, so their return
 * address says which instruction runs. */

#define EXPORTED __attribute__((visibility("default"), noinline))

enum {
    LOADS = 0,
    STORES = SIZES,
    HELPER_LOADS = 2 * SIZES - WORD, /* of words and dwords */
    HELPER_STORES = HELPER_LOADS + QUAD - WORD,
    RDMSR = HELPER_STORES + QUAD,
    WRMSR,
    RAISE_INTERRUPT,
    INTO,
    IRET_REAL,
    IRET_PROTECTED,
    SYSCALL,
    SYSRET,
    SYSENTER,
    SYSEXIT,
    LTR,
    READ_CR,
    WRITE_CR,
    RDRAND,
    READ_TSC,
    READ_TSC_AUX,
    STI,
    INS,
    OUTS = INS + PORT_SIZES,
    OUTS_END = OUTS + PORT_SIZES - 1,
    PAUSE,
    CHECK_EXIT_REQUEST,
    TRANSLATE,
    LOOP_EXIT_NOEXC,
    FIND_STATE,
    PROTECT_CODE,
    UNPROTECT_CODE,
    INVALIDATE_STORED,
    INTERPOSED_COUNT,
};

/* Which of them were called for engines that are not ours; for prove_layout. */
extern __thread uint64_t intercepted INITIAL_EXEC;
extern __thread bool probing INITIAL_EXEC;
extern __thread uint64_t probed_instructions INITIAL_EXEC; /* in the blocks begun */
extern __thread bool probed_next_block INITIAL_EXEC;       /* CPU_NEXT_BLOCK is there */
extern __thread uintptr_t probed_access INITIAL_EXEC;      /* where the last load came from */

/* The engine whose guest runs in `env`, or NULL: somebody else's does. */
INLINE Engine *engine_of(const void *env, int function)
{
    Engine *self = entered;
    if (likely(self != NULL) && likely(self->env == env)) {
        return self;
    }
    intercepted |= 1ull << function;
    return NULL;
}

/* boundary.c */
EXPORTED void helper_check_exit_request_x86_64(void *uc, uint32_t in_delay_slot);
EXPORTED void helper_pause_x86_64(void *env, int size_bytes);
EXPORTED void gen_intermediate_code_x86_64(void *cpu, void *block, int instructions_max);
EXPORTED void cpu_loop_exit_noexc_x86_64(void *cpu);
EXPORTED void restore_state_to_opc_x86_64(void *env, void *block, uint64_t *at_instruction);

/* memory.c */
EXPORTED Load helper_ret_ldub_mmu_x86_64, helper_le_lduw_mmu_x86_64, helper_le_ldul_mmu_x86_64,
    helper_le_ldq_mmu_x86_64;
EXPORTED Store helper_ret_stb_mmu_x86_64, helper_le_stw_mmu_x86_64, helper_le_stl_mmu_x86_64,
    helper_le_stq_mmu_x86_64;
EXPORTED HelperLoad cpu_lduw_mmuidx_ra_x86_64, cpu_ldl_mmuidx_ra_x86_64;
EXPORTED HelperStore cpu_stw_mmuidx_ra_x86_64, cpu_stl_mmuidx_ra_x86_64;

/* events.c */
EXPORTED void helper_raise_interrupt_x86_64(void *env, int vector, int size_bytes);
EXPORTED void helper_into_x86_64(void *env, int size_bytes);
EXPORTED void helper_sti_x86_64(void *env);
EXPORTED void helper_iret_real_x86_64(void *env, int shift);
EXPORTED void helper_iret_protected_x86_64(void *env, int shift, int next_eip);

/* ports.c */
EXPORTED In helper_inb_x86_64, helper_inw_x86_64, helper_inl_x86_64;
EXPORTED Out helper_outb_x86_64, helper_outw_x86_64, helper_outl_x86_64;

/* syscall.c */
EXPORTED void helper_syscall_x86_64(void *env, int size_bytes);
EXPORTED void helper_sysret_x86_64(void *env, int operand_size);
EXPORTED void helper_sysenter_x86_64(void *env, int size_bytes);
EXPORTED void helper_sysexit_x86_64(void *env, int operand_size);

/* code.c */
EXPORTED void tlb_protect_code_x86_64(void *uc, uint64_t ram_address);
EXPORTED void tlb_unprotect_code_x86_64(void *uc, uint64_t ram_address);
EXPORTED void tb_invalidate_phys_page_fast_x86_64(void *uc, void *pages, uint64_t ram_address,
                                                  int size_bytes, uintptr_t return_address);

/* system.c */
EXPORTED void helper_rdmsr_x86_64(void *env);
EXPORTED void helper_wrmsr_x86_64(void *env);
EXPORTED void helper_ltr_x86_64(void *env, int selector);
EXPORTED void helper_write_crN_x86_64(void *env, int number, uint64_t value);
EXPORTED uint64_t helper_read_crN_x86_64(void *env, int number);
EXPORTED uint64_t helper_rdrand_x86_64(void *env);
EXPORTED void helper_rdtsc_x86_64(void *env);
EXPORTED void helper_rdtscp_x86_64(void *env);

#endif
