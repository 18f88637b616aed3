/* Events: those of the VM entry and the guest's own exceptions and software interrupts.
 *
 * QEMU delivers them, through the guest's IVT or IDT. What is added here, from the SDM's vol. 3A:
 * RF in the flags a fault pushes (vol. 3B, 18.3.1.1), EXT in the error code of a fault during the
 * delivery of an event (7.13), the end of NMI blocking by an IRET that faults (7.7.1), INT1. */

#include "shim.h"

/* What is under way when a fault interrupts its delivery. */
enum { NOTHING, EXTERNAL_EVENT, SOFTWARE_INTERRUPT };

enum { HYPERCALL_BYTES = 3 };

static bool is_contributory(int vector)
{
    return vector == 0 || (vector >= 10 && vector <= 14) || vector == DOUBLE_FAULT;
}

/* Faults, of which the pushed RIP is on the instruction; #DB may be one, but sets no RF. */
static bool is_fault(int vector)
{
    switch (vector) {
    case 1: case 2: case 3: case 4: case DOUBLE_FAULT: case 18:
        return false;
    default:
        return vector < 32;
    }
}

/* Error codes with the EXT bit: those that may hold a selector. */
static bool tells_ext(int vector)
{
    return vector >= 10 && vector <= 13;
}

/* RF lasts for one instruction. QEMU clears it at the end of a block of them. */
void drop_stale_rf(Engine *self)
{
    if (self->started != self->iret_at) {
        U64(self->env, ENV_EFLAGS) &= ~(uint64_t)FLAGS_RF;
    }
}

/* The exit's flags and shadow are those of the next entry, which counts from 0. */
void carry_over(Engine *self)
{
    drop_stale_rf(self);
    self->iret_at = 0;
    self->sti_at = self->sti_at == self->started ? 0 : NEVER;
}

/* Does not return when the delivery faults: QEMU goes on with that exception. */
static void deliver_exception(Engine *self, int source)
{
    forget_last_instruction(self);
    self->delivering = source;
    lib.do_interrupt(self->cpu);
    self->delivering = NOTHING;
}

/* ---- the event of the VM entry ------------------------------------------------------------- */

static void deliver_entry_exception(Engine *self, int vector, int error_code)
{
    I32(self->cpu, CPU_EXCEPTION_INDEX) = vector;
    I32(self->env, ENV_EXCEPTION_IS_INT) = 0;
    I32(self->env, ENV_ERROR_CODE) = error_code;
    /* A fault on the way makes a double or triple fault of it (SDM vol. 3A, table 7-5). */
    I32(self->env, ENV_OLD_EXCEPTION) = is_contributory(vector) ? vector : -1;
    if (is_fault(vector)) {
        U64(self->env, ENV_EFLAGS) |= FLAGS_RF; /* as KVM has it in the guest state */
    }
    deliver_exception(self, EXTERNAL_EVENT);
    I32(self->cpu, CPU_EXCEPTION_INDEX) = -1;
}

static void deliver_interrupt(Engine *self, int vector, int source)
{
    forget_last_instruction(self);
    self->delivering = source;
    lib.do_interrupt_hardirq(self->env, vector, 1);
    self->delivering = NOTHING;
}

static void deliver_entry_event(Engine *self, uint32_t info)
{
    int vector = INTR_INFO_VECTOR(info);
    U32(self->env, ENV_HFLAGS) &= ~HF_INHIBIT_IRQ;
    switch (INTR_INFO_TYPE(info)) {
    case TYPE_EXTERNAL:
        deliver_interrupt(self, vector, EXTERNAL_EVENT);
        break;
    case TYPE_NMI:
        U32(self->env, ENV_HFLAGS2) |= HF2_NMI;
        deliver_interrupt(self, vector, EXTERNAL_EVENT);
        break;
    case TYPE_HARDWARE:
        deliver_entry_exception(
            self, vector, info & INTR_INFO_DELIVER_CODE ? (int)self->entry_error_code : 0);
        break;
    default:
        /* Software events push RIP as it stands: the contract has no instruction length. */
        deliver_interrupt(self, vector, SOFTWARE_INTERRUPT);
        break;
    }
}

/* Stands in for QEMU's x86_cpu_exec_interrupt: runs inside the CPU loop before the first block
 * (`enter` has set interrupt_request), where a fault during delivery is safe. */
bool take_entry_event(void *cpu, int request)
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

/* ---- the guest's own events ---------------------------------------------------------------- */

/* Unicorn has moved RIP behind the instruction; a fault from now on must find it on it. */
static void begin_software_interrupt(Engine *self)
{
    uint64_t next = U64(self->env, ENV_EXCEPTION_NEXT_EIP);
    U64(self->env, ENV_EIP) = next - self->software_interrupt_bytes;
}

/* Whether the instruction itself could not be read: no boundary has been seen before it. An engine
 * that is not exact takes a load from right behind an instruction for that. */
static bool faulted_on_fetch(const Engine *self, int vector)
{
    uint64_t linear = linear_rip(self->env);
    bool stored = I32(self->env, ENV_ERROR_CODE) & PAGE_FAULT_WRITE;
    if (self->exact && linear == self->last_address) {
        return false;
    }
    if (vector == PAGE_FAULT) {
        return !stored && U64(self->env, ENV_CR + 8 * 2) - linear < INSTRUCTION_BYTES_MAX;
    }
    return vector == GENERAL_PROTECTION && !is_canonical(self->env, linear);
}

/* The boundary before an instruction that could not be read. True: leave there. */
static bool leave_before_fetch(Engine *self)
{
    self->exit_reason = boundary_reason(self, linear_rip(self->env));
    if (self->exit_reason == EXIT_NONE) {
        self->started++; /* counts like any instruction that faults */
        return false;
    }
    I32(self->env, ENV_OLD_EXCEPTION) = -1;
    lib.emu_stop(self->uc);
    return true;
}

/* A gate's error code is vector * 8 + IDT (SDM vol. 3A, 7.13). QEMU has 16 instead, the bytes of a
 * gate in long mode. */
static void mend_gate_error_code(Engine *self, int vector)
{
    int32_t code = I32(self->env, ENV_ERROR_CODE);
    if ((U32(self->env, ENV_HFLAGS) & HF_LMA) && tells_ext(vector) && (code & ERROR_CODE_IDT)) {
        I32(self->env, ENV_ERROR_CODE) = (code >> 1 & ~7) | ERROR_CODE_IDT;
    }
}

static bool begin_exception(Engine *self, int vector)
{
    int interrupted = self->delivering;
    mend_gate_error_code(self, vector);
    if (interrupted == NOTHING && faulted_on_fetch(self, vector) && leave_before_fetch(self)) {
        return false;
    }
    if (interrupted == EXTERNAL_EVENT && tells_ext(vector)) {
        I32(self->env, ENV_ERROR_CODE) |= ERROR_CODE_EXT;
    }
    if (is_fault(vector)) {
        U64(self->env, ENV_EFLAGS) |= FLAGS_RF;
    }
    return true;
}

/* A fault in IRET: the library looked for the instruction by its return address, which was ours. */
static void find_faulting_iret(Engine *self)
{
    if (self->iret_return_address != 0) {
        lib.restore_state(self->cpu, self->iret_return_address, false);
        self->iret_return_address = 0;
    }
}

/* INTR hook: an exception or a software interrupt of the guest. */
void on_exception(void *uc, uint32_t vector, void *engine)
{
    (void)uc;
    Engine *self = engine;
    bool software = I32(self->env, ENV_EXCEPTION_IS_INT);
    find_faulting_iret(self);
    drop_stale_rf(self);
    self->ins_has_tried = false; /* nor will this INS do more */
    if (software) {
        begin_software_interrupt(self);
    } else if (!begin_exception(self, (int)vector)) {
        return;
    }
    U32(self->env, ENV_HFLAGS) &= ~HF_INHIBIT_IRQ; /* a faulting instruction leaves its shadow */
    deliver_exception(self, software ? SOFTWARE_INTERRUPT : EXTERNAL_EVENT);
}

/* Whether the code at RIP, any byte of it on a page of its own, is this. */
static bool is_at_rip(Engine *self, const uint8_t *expected, unsigned size_bytes)
{
    uint64_t linear = linear_rip(self->env);
    for (unsigned i = 0; i < size_bytes; i++) {
        const uint8_t *code = code_at(self, linear + i);
        if (code == NULL || *code != expected[i]) {
            return false;
        }
    }
    return true;
}

/* INT1, which QEMU does not know, is a trap that checks no DPL: #DB with RIP behind it. */
static bool is_int1(Engine *self)
{
    return is_at_rip(self, (const uint8_t[]){0xf1}, 1);
}

static bool is_hypercall(Engine *self)
{
    static const uint8_t vmcall[HYPERCALL_BYTES] = {0x0f, 0x01, 0xc1};
    static const uint8_t vmmcall[HYPERCALL_BYTES] = {0x0f, 0x01, 0xd9};
    return is_at_rip(self, vmcall, sizeof(vmcall)) || is_at_rip(self, vmmcall, sizeof(vmmcall));
}

static void finish_hypercall(Engine *self)
{
    uint64_t result = ask_hypercall(self);
    bool wide = U32(self->env, ENV_HFLAGS) & HF_CS64;
    REGISTER(self->env, RAX) = wide ? result : (uint32_t)result;
    U64(self->env, ENV_EIP) += HYPERCALL_BYTES;
    U32(self->env, ENV_HFLAGS) &= ~HF_INHIBIT_IRQ;
    drop_stale_rf(self);
}

/* INSN_INVALID hook: #UD, and what QEMU takes for it. True: go on. */
bool on_invalid_opcode(void *uc, void *engine)
{
    Engine *self = engine;
    int vector = INVALID_OPCODE;
    if (self->handlers[ON_HYPERCALL] != NULL && is_hypercall(self)) {
        finish_hypercall(self);
        return true;
    }
    if (is_int1(self)) {
        vector = DEBUG_EXCEPTION;
        U64(self->env, ENV_EIP) += 1;
        I32(self->cpu, CPU_EXCEPTION_INDEX) = vector;
    }
    on_exception(uc, (uint32_t)vector, engine);
    return true;
}

/* ---- instructions -------------------------------------------------------------------------- */

/* INT n and INT3. */
EXPORTED void helper_raise_interrupt_x86_64(void *env, int vector, int size_bytes)
{
    Engine *self = engine_of(env, RAISE_INTERRUPT);
    if (self != NULL) {
        self->software_interrupt_bytes = (unsigned)size_bytes;
    }
    lib.genuine.raise_interrupt(env, vector, size_bytes);
}

EXPORTED void helper_into_x86_64(void *env, int size_bytes)
{
    Engine *self = engine_of(env, INTO);
    if (self != NULL) {
        self->software_interrupt_bytes = (unsigned)size_bytes;
    }
    lib.genuine.into(env, size_bytes);
}

EXPORTED void helper_sti_x86_64(void *env)
{
    Engine *self = engine_of(env, STI);
    if (self != NULL) {
        self->sti_at = self->started;
    }
    lib.genuine.sti(env);
}

/* IRET ends the blocking of NMIs even when it faults. What it loads into RF holds for the
 * instruction behind it. */
static void begin_iret(Engine *self, void *return_address)
{
    self->iret_return_address = (uintptr_t)return_address;
    self->iret_at = self->started;
    U32(self->env, ENV_HFLAGS2) &= ~HF2_NMI;
}

static void end_iret(Engine *self)
{
    self->iret_return_address = 0;
    if (U64(self->env, ENV_EFLAGS) & FLAGS_RF) {
        set_watch(self);
    }
}

EXPORTED void helper_iret_real_x86_64(void *env, int shift)
{
    Engine *self = engine_of(env, IRET_REAL);
    if (self == NULL) {
        lib.genuine.iret_real(env, shift);
        return;
    }
    begin_iret(self, __builtin_return_address(0));
    lib.genuine.iret_real(env, shift);
    end_iret(self);
}

EXPORTED void helper_iret_protected_x86_64(void *env, int shift, int next_eip)
{
    Engine *self = engine_of(env, IRET_PROTECTED);
    if (self == NULL) {
        lib.genuine.iret_protected(env, shift, next_eip);
        return;
    }
    begin_iret(self, __builtin_return_address(0));
    lib.genuine.iret_protected(env, shift, next_eip);
    end_iret(self);
}
