/* The library: finding its functions, proving its layout, putting ours in front.
 *
 * Unicorn's public API can run code and hook it, but it cannot raise an interrupt, knows no
 * interrupt window and never looks into the guest's IVT or IDT. The library exports QEMU's own
 * functions, though, so this module calls those: it replaces the CPU class's "take an interrupt"
 * function with one that delivers the event of the VM entry, and it hands exceptions back to
 * QEMU's delivery. It needs a few fields of structures that no header describes; their offsets are
 * proven on the loaded library before the first use (`prove_layout`), and any library where they
 * do not hold is refused.
 *
 * RDMSR and WRMSR have no hook, and a memory region's callbacks get wide and unaligned accesses in
 * pieces, but translated code calls `helper_rdmsr_x86_64`, `helper_le_stl_mmu_x86_64` and the like
 * through the dynamic linker. This module exports functions of those names and puts itself into the
 * global scope before it loads the library, so that they are found first; `prove_layout` sees to it
 * that they were. The library's own stay reachable by `dlsym`.
 */

#include "shim.h"

Library lib;
__thread Engine *entered;
__thread uint64_t intercepted;
__thread bool probing;
__thread uint64_t probed_instructions;
__thread bool probed_next_block;
__thread uintptr_t probed_access;

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
    {"uc_mem_map_ptr", offsetof(Library, mem_map_ptr)},
    {"uc_mem_unmap", offsetof(Library, mem_unmap)},
    {"uc_mmio_map", offsetof(Library, mmio_map)},
    {"x86_cpu_exec_interrupt_x86_64", offsetof(Library, cpu_exec_interrupt)},
    {"x86_cpu_do_interrupt_x86_64", offsetof(Library, do_interrupt)},
    {"do_interrupt_x86_hardirq_x86_64", offsetof(Library, do_interrupt_hardirq)},
    {"helper_cc_compute_all_x86_64", offsetof(Library, cc_compute_all)},
    {"resume_all_vcpus_x86_64", offsetof(Library, resume)},
    {"cpu_reset", offsetof(Library, cpu_reset)},
    {"cpu_x86_update_cr4_x86_64", offsetof(Library, update_cr4)},
    {"cpu_x86_update_dr7_x86_64", offsetof(Library, update_dr7)},
    {"raise_exception_err_ra_x86_64", offsetof(Library, raise_exception)},
    {"tcg_op_remove_x86_64", offsetof(Library, remove_operation)},
    {"cpu_loop_exit_x86_64", offsetof(Library, loop_exit)},
    {"cpu_loop_exit_restore_x86_64", offsetof(Library, loop_exit_restore)},
    {"cpu_restore_state_x86_64", offsetof(Library, restore_state)},
    {"helper_check_iob_x86_64", offsetof(Library, check_port[BYTE])},
    {"helper_check_iow_x86_64", offsetof(Library, check_port[WORD])},
    {"helper_check_iol_x86_64", offsetof(Library, check_port[LONG])},
    {"x86_cpu_get_phys_page_attrs_debug_x86_64", offsetof(Library, page_of)},
    {"qemu_ram_addr_from_host_x86_64", offsetof(Library, ram_address_of)},
    {"tb_invalidate_phys_range_x86_64", offsetof(Library, invalidate_range)},
    {"tlb_set_dirty_x86_64", offsetof(Library, tlb_set_dirty)},
    {"tlb_reset_dirty_x86_64", offsetof(Library, tlb_reset_dirty)},
    {"probe_access_x86_64", offsetof(Library, probe_access)},
    {"tlb_vaddr_to_paddr_x86_64", offsetof(Library, tlb_vaddr_to_paddr)},
    {"tlb_vaddr_to_host_x86_64", offsetof(Library, tlb_vaddr_to_host)},
};

/* uc_emu_start from where RIP is, without what an entry does not need. */
int resume(void *uc)
{
    BOOL(uc, UC_STOP_REQUEST) = false;
    I32(uc, UC_NESTED_LEVEL) = 1;
    lib.resume(uc);
    I32(uc, UC_NESTED_LEVEL) = 0;
    int error = I32(uc, UC_ERROR);
    I32(uc, UC_ERROR) = 0;
    return error;
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

static __thread char *probed_cpu;
static __thread bool probed_access_at; /* CPU_ACCESS_AT is there */

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

static bool msr_is_at(void *uc, uint32_t index, uint64_t value, const char *place)
{
    struct {
        uint32_t index;
        uint64_t value;
    } msr = {index, value};
    return lib.reg_write(uc, UC_REG_MSR, &msr) == 0 && U64(place, 0) == value;
}

static const char *wrong_msr(void *uc, char *env)
{
    if (U64(env, ENV_XCR0) != 0x203) return "xcr0"; /* all that the CPU model has */
    if (!msr_is_at(uc, MSR_SYSENTER_CS, 0x1234, env + ENV_SYSENTER_CS)) return "sysenter_cs";
    if (!msr_is_at(uc, MSR_SYSENTER_ESP, 0x12345, env + ENV_SYSENTER_ESP)) return "sysenter_esp";
    if (!msr_is_at(uc, MSR_SYSENTER_EIP, 0x12346, env + ENV_SYSENTER_EIP)) return "sysenter_eip";
    if (!msr_is_at(uc, MSR_STAR, 0x12347, env + ENV_STAR)) return "star";
    if (!msr_is_at(uc, MSR_LSTAR, 0x12348, env + ENV_LSTAR)) return "lstar";
    if (!msr_is_at(uc, MSR_CSTAR, 0x12349, env + ENV_CSTAR)) return "cstar";
    if (!msr_is_at(uc, MSR_FMASK, 0x1234a, env + ENV_FMASK)) return "fmask";
    if (!msr_is_at(uc, MSR_KERNEL_GS_BASE, 0x1234b, env + ENV_KERNEL_GS_BASE))
        return "kernel_gs_base";
    if (!msr_is_at(uc, MSR_TSC_AUX, 0x1234c, env + ENV_TSC_AUX)) return "tsc_aux";
    return NULL;
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
    return wrong_msr(uc, env);
}

/* Makes the code that goes through the functions this module stands in for: an MSR that the
 * library's own leave alone, loads and stores where every access takes the slow path, and a store
 * that rewrites its own block. Those for instructions of protected mode stand in the same table of
 * the library, filled by the same loader. */
#define NOT_PROBED                                                                               \
    (1ull << IRET_PROTECTED | 1ull << SYSRET | 1ull << SYSENTER | 1ull << SYSEXIT | 1ull << LTR)
#define PROBE_PAGE 0x1000
#define PROBE_ERROR 77
#define PROBE_HLT 0x60
#define PROBE_IRET (PROBE_HLT + 2)
/* In all blocks begun: what is behind the division in its block, and the store and what is behind
 * it, are in two. */
#define PROBE_INSTRUCTIONS (29 + 7 + 4 + 2)
static const uint8_t PROBE_CODE[] = {
    0xcd, 0x21,                                     /* int 0x21 */
    0xf7, 0xf3,                                     /* div bx */
    0x0f, 0x32, 0x0f, 0x30,                         /* rdmsr; wrmsr */
    0xce,                                           /* into */
    0x0f, 0x05,                                     /* syscall: does nothing */
    0x0f, 0x20, 0xc0, 0x0f, 0x22, 0xc0,             /* mov eax, cr0; mov cr0, eax */
    0x0f, 0xc7, 0xf0,                               /* rdrand ax */
    0x0f, 0x31, 0x0f, 0x01, 0xf9,                   /* rdtsc; rdtscp */
    0xfb,                                           /* sti */
    0xe4, 0x00, 0xe5, 0x00, 0x66, 0xe5, 0x00,       /* in al, 0; in ax, 0; in eax, 0 */
    0xe6, 0x00, 0xe7, 0x00, 0x66, 0xe7, 0x00,       /* out 0, al; out 0, ax; out 0, eax */
    0xf3, 0x90,                                     /* pause */
    0xa0, 0x00, 0x20, 0xa2, 0x00, 0x20,             /* mov al, [0x2000]; mov [0x2000], al */
    0xa1, 0x00, 0x20, 0xa3, 0x00, 0x20,             /* ax */
    0x66, 0xa1, 0x00, 0x20, 0x66, 0xa3, 0x00, 0x20, /* eax */
    0x0f, 0x6f, 0x06, 0x00, 0x20,                   /* movq mm0, [0x2000] */
    0x0f, 0x7f, 0x06, 0x00, 0x20,                   /* movq [0x2000], mm0 */
    0xbc, 0x00, 0x1f,                               /* mov sp, 0x1f00 */
    0x9c, 0x9a, PROBE_IRET, 0x10, 0x00, 0x00,       /* pushf; call 0:0x1000 + PROBE_IRET */
    0x66, 0x9c, 0x66, 0x9a, PROBE_IRET - 1, 0x10, 0x00, 0x00, 0x00, 0x00, /* the same, 32 bits */
    0xc6, 0x06, PROBE_HLT, 0x10, 0xf4,              /* mov byte [0x1000 + PROBE_HLT], 0xf4 */
    0xf4,                                           /* hlt */
    0x66, 0xcf,                                     /* iretd, and iret behind its prefix */
};
_Static_assert(sizeof PROBE_CODE == PROBE_IRET + 1, "the code rewrites its hlt, calls its iret");

static _Alignas(PAGE_BYTES) uint8_t probe_page[PAGE_BYTES];

static uint64_t probe_read(void *uc, uint64_t offset, unsigned size_bytes, void *user)
{
    (void)uc, (void)offset, (void)size_bytes, (void)user;
    probed_access_at = U64(probed_cpu, CPU_ACCESS_AT) == probed_access;
    return 0;
}

static void probe_write(void *uc, uint64_t offset, unsigned size_bytes, uint64_t value, void *user)
{
    (void)uc, (void)offset, (void)size_bytes, (void)value, (void)user;
}

/* Stops `resume` at once, with an error. */
static bool probe_stop(void *cpu, int request)
{
    (void)request;
    void *uc = POINTER(cpu, CPU_UC);
    U32(cpu, CPU_INTERRUPT_REQUEST) = 0;
    lib.emu_stop(uc);
    if (I32(uc, UC_NESTED_LEVEL) == 1 && BOOL(uc, UC_STOP_REQUEST)) {
        I32(uc, UC_ERROR) = PROBE_ERROR;
    }
    return false;
}

/* The fields of `resume` are those of uc_emu_start. */
static bool resume_works(void *uc, char *cpu, char *env)
{
    bool idle = I32(uc, UC_NESTED_LEVEL) == 0 && !BOOL(uc, UC_STOP_REQUEST);
    POINTER(POINTER(cpu, CPU_CLASS), lib.class_slot) = probe_stop;
    U32(cpu, CPU_INTERRUPT_REQUEST) = CPU_INTERRUPT_HARD;
    bool started = lib.emu_start(uc, PROBE_PAGE + PROBE_HLT, 0, 0, 0) == PROBE_ERROR;
    BOOL(uc, UC_STOP_REQUEST) = false;
    U32(cpu, CPU_INTERRUPT_REQUEST) = 0;
    bool resumed = resume(uc) == 0 && U32(cpu, CPU_HALTED) == 1;
    return idle && started && resumed && U64(env, ENV_EIP) == PROBE_PAGE + PROBE_HLT + 1;
}

static bool stores_are_fast(char *env, bool expected)
{
    const void *host = lib.tlb_vaddr_to_host(env, PROBE_PAGE, ACCESS_STORE, MMU_KERNEL);
    return host == (expected ? probe_page : NULL);
}

static bool pages_are_found(char *env)
{
    uint64_t gpa = 0;
    void *host = lib.probe_access(env, PROBE_PAGE + 5, 1, ACCESS_LOAD, MMU_KERNEL, 0);
    return host == &probe_page[5] &&
           lib.tlb_vaddr_to_paddr(env, PROBE_PAGE + 5, ACCESS_LOAD, MMU_KERNEL, &gpa) &&
           gpa == PROBE_PAGE + 5;
}

/* What holds code is slow to store to, until it is made fast, until it is made slow. */
static bool dirty_pages_work(void *uc, char *cpu, char *env)
{
    uint64_t ram_address = lib.ram_address_of(uc, probe_page);
    uintptr_t host = (uintptr_t)probe_page;
    bool slow = stores_are_fast(env, false);
    lib.tlb_set_dirty(cpu, PROBE_PAGE);
    bool fast = stores_are_fast(env, true);
    lib.tlb_reset_dirty(cpu, host, PAGE_BYTES);
    bool again = stores_are_fast(env, false);
    lib.invalidate_range(uc, ram_address, ram_address + PAGE_BYTES);
    return slow && fast && again &&
           lib.tlb_vaddr_to_host(env, PROBE_PAGE, ACCESS_LOAD, MMU_KERNEL) == (char *)host;
}

/* Runs that code with a pending interrupt and looks at what it left. */
static const char *wrong_execution_field(void *uc, char *cpu, char *env)
{
    Probe probe = {cpu, env, 0};
    size_t hook;
    uint64_t flags = 2;
    probe_request = 0;
    intercepted = 0;
    probed_cpu = cpu;
    probed_next_block = probed_access_at = false;
    enter_real_mode(cpu);
    memcpy(probe_page, PROBE_CODE, sizeof PROBE_CODE);
    if (lib.reg_write(uc, UC_REG_RFLAGS, &flags) ||
        lib.mem_map_ptr(uc, PROBE_PAGE, PAGE_BYTES, UC_PROT_ALL, probe_page) ||
        lib.mmio_map(uc, 0x2000, PAGE_BYTES, probe_read, NULL, probe_write, NULL) ||
        lib.hook_add(uc, &hook, UC_HOOK_INTR, probe_exception, &probe, 1, 0)) {
        return "memory or hooks";
    }
    POINTER(POINTER(cpu, CPU_CLASS), lib.class_slot) = probe_take_interrupt;
    U32(cpu, CPU_INTERRUPT_REQUEST) = CPU_INTERRUPT_HARD;
    probing = true;
    probed_instructions = 0;
    int error = lib.emu_start(uc, PROBE_PAGE, 0, 0, 0);
    probing = false;
    if (error || probe.right != 2) return "exception state";
    if (probe_request != CPU_INTERRUPT_HARD) return "interrupt_request";
    uint64_t end = PROBE_PAGE + PROBE_HLT + 1;
    if (U32(cpu, CPU_HALTED) != 1 || U64(env, ENV_EIP) != end) return "halted";
    if (!pages_are_found(env)) return "pages";
    if (!dirty_pages_work(uc, cpu, env)) return "dirty pages";
    if (!resume_works(uc, cpu, env)) return "resume";
    if ((intercepted | NOT_PROBED) != (1ull << INTERPOSED_COUNT) - 1) return CALLS_PASS_BY;
    if (probed_instructions != PROBE_INSTRUCTIONS) return "instructions of a block";
    if (!probed_next_block || U32(cpu, CPU_NEXT_BLOCK) != NO_LIMIT) return "cflags_next_tb";
    if (!probed_access_at) return "mem_io_pc";
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
    [HELPER_LOADS + WORD] = STANDS_IN(cpu_lduw_mmuidx_ra_x86_64, helper_load[WORD]),
    [HELPER_LOADS + LONG] = STANDS_IN(cpu_ldl_mmuidx_ra_x86_64, helper_load[LONG]),
    [HELPER_STORES + WORD] = STANDS_IN(cpu_stw_mmuidx_ra_x86_64, helper_store[WORD]),
    [HELPER_STORES + LONG] = STANDS_IN(cpu_stl_mmuidx_ra_x86_64, helper_store[LONG]),
    [RDMSR] = STANDS_IN(helper_rdmsr_x86_64, rdmsr),
    [WRMSR] = STANDS_IN(helper_wrmsr_x86_64, wrmsr),
    [RAISE_INTERRUPT] = STANDS_IN(helper_raise_interrupt_x86_64, raise_interrupt),
    [INTO] = STANDS_IN(helper_into_x86_64, into),
    [IRET_REAL] = STANDS_IN(helper_iret_real_x86_64, iret_real),
    [IRET_PROTECTED] = STANDS_IN(helper_iret_protected_x86_64, iret_protected),
    [SYSCALL] = STANDS_IN(helper_syscall_x86_64, syscall),
    [SYSRET] = STANDS_IN(helper_sysret_x86_64, sysret),
    [SYSENTER] = STANDS_IN(helper_sysenter_x86_64, sysenter),
    [SYSEXIT] = STANDS_IN(helper_sysexit_x86_64, sysexit),
    [LTR] = STANDS_IN(helper_ltr_x86_64, ltr),
    [READ_CR] = STANDS_IN(helper_read_crN_x86_64, read_cr),
    [WRITE_CR] = STANDS_IN(helper_write_crN_x86_64, write_cr),
    [RDRAND] = STANDS_IN(helper_rdrand_x86_64, rdrand),
    [READ_TSC] = STANDS_IN(helper_rdtsc_x86_64, rdtsc),
    [READ_TSC_AUX] = STANDS_IN(helper_rdtscp_x86_64, rdtscp),
    [STI] = STANDS_IN(helper_sti_x86_64, sti),
    [INS + BYTE] = STANDS_IN(helper_inb_x86_64, in[BYTE]),
    [INS + WORD] = STANDS_IN(helper_inw_x86_64, in[WORD]),
    [INS + LONG] = STANDS_IN(helper_inl_x86_64, in[LONG]),
    [OUTS + BYTE] = STANDS_IN(helper_outb_x86_64, out[BYTE]),
    [OUTS + WORD] = STANDS_IN(helper_outw_x86_64, out[WORD]),
    [OUTS + LONG] = STANDS_IN(helper_outl_x86_64, out[LONG]),
    [PAUSE] = STANDS_IN(helper_pause_x86_64, pause),
    [CHECK_EXIT_REQUEST] = STANDS_IN(helper_check_exit_request_x86_64, check_exit_request),
    [TRANSLATE] = STANDS_IN(gen_intermediate_code_x86_64, translate),
    [LOOP_EXIT_NOEXC] = STANDS_IN(cpu_loop_exit_noexc_x86_64, loop_exit_noexc),
    [FIND_STATE] = STANDS_IN(restore_state_to_opc_x86_64, find_state),
    [PROTECT_CODE] = STANDS_IN(tlb_protect_code_x86_64, protect_code),
    [UNPROTECT_CODE] = STANDS_IN(tlb_unprotect_code_x86_64, unprotect_code),
    [INVALIDATE_STORED] = STANDS_IN(tb_invalidate_phys_page_fast_x86_64, invalidate_stored),
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
            POINTER(&lib, INTERPOSED[i].offset) = symbol;
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

/* Another library is not even looked at: engines of other threads may be running. */
static bool is_in_use(const char *path)
{
    void *handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (handle != NULL) {
        dlclose(handle);
    }
    if (handle != lib.handle) {
        PyErr_Format(PyExc_ImportError, "%s: %s is in use in this process", path, lib.path);
    }
    return handle == lib.handle;
}

static bool load_library(const char *path)
{
    if (!rehearse(path) || !join_global_scope()) {
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
    snprintf(lib.path, sizeof lib.path, "%s", path);
    return true;
}

PyObject *shim_load(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&:load", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    const char *name = PyBytes_AS_STRING(path);
    bool loaded = true;
    if (strcmp(name, lib.path) != 0) {
        loaded = lib.handle == NULL ? load_library(name) : is_in_use(name);
    }
    Py_DECREF(path);
    if (!loaded) {
        return NULL;
    }
    Py_RETURN_NONE;
}
