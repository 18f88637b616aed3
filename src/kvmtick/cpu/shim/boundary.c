/* Boundaries: of instructions, or of blocks of them, and what ends an execution there. */

#include "shim.h"

enum {
    LOOK_NS = 5000,        /* between two looks at the clock, about */
    LEAST_UNWATCHED = 16,  /* instructions */
    MOST_UNWATCHED = 2048,
};

/* `kick` sets its flag, then watch_from; here it is the other way round: no kick gets lost. */
void set_watch(Engine *self)
{
    bool now = self->irq_window || self->nmi_window || self->failed || self->breakpoint_count > 0 ||
               (U64(self->env, ENV_EFLAGS) & FLAGS_RF);
    uint64_t first = self->budget < self->look_at ? self->budget : self->look_at;
    __atomic_store_n(&self->watch_from, now ? 0 : first, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&self->kicked, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&self->watch_from, 0, __ATOMIC_SEQ_CST);
    }
}

static bool is_breakpoint(const Engine *self, uint64_t address)
{
    size_t low = 0, high = self->breakpoint_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (self->breakpoints[middle] < address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < self->breakpoint_count && self->breakpoints[low] == address;
}

/* In real time `look_at` is when to look at the clock again: after some microseconds of what the
 * guest does now. */
static bool is_past_deadline(Engine *self)
{
    if (self->started < self->look_at) {
        return false;
    }
    uint64_t now_ns = monotonic_ns();
    uint64_t step = self->started - self->looked_at;
    step = now_ns - self->looked_ns > LOOK_NS ? step / 2 : step * 2;
    step = step < LEAST_UNWATCHED ? LEAST_UNWATCHED : step > MOST_UNWATCHED ? MOST_UNWATCHED : step;
    self->looked_ns = now_ns;
    self->looked_at = self->started;
    self->look_at = self->started + step;
    return now_ns >= self->deadline_ns;
}

/* What ends the execution before the instruction at `address`, in the contract's order. */
int boundary_reason(Engine *self, uint64_t address)
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
    if (self->started >= self->budget) {
        return EXIT_PREEMPTION_TIMER;
    }
    if (is_past_deadline(self)) {
        return EXIT_EXTERNAL_INTERRUPT;
    }
    return is_breakpoint(self, address) ? EXIT_BREAKPOINT : EXIT_NONE;
}

static bool leave_at_boundary(Engine *self, uint64_t address)
{
    drop_stale_rf(self);
    self->exit_reason = boundary_reason(self, address);
    if (self->exit_reason != EXIT_NONE) {
        lib.emu_stop(self->uc);
        return true;
    }
    if (!self->irq_window && !self->nmi_window) {
        set_watch(self); /* a kick came late and its exit is over */
    }
    return false;
}

static bool is_time_to_look(const Engine *self)
{
    return unlikely(self->started >= __atomic_load_n(&self->watch_from, __ATOMIC_RELAXED));
}

/* CODE hook: before every instruction. */
void on_instruction(void *uc, uint64_t address, uint32_t size_bytes, void *engine)
{
    (void)uc, (void)size_bytes;
    Engine *self = engine;
    if (unlikely(address == self->last_address) && steps_over_finished_rep(self, address)) {
        return;
    }
    if (is_time_to_look(self) && leave_at_boundary(self, address)) {
        lib.loop_exit(self->cpu); /* RIP and the flags are in their places before every CODE hook */
    }
    self->started++;
    self->last_address = address;
}

/* An instruction faults: what is RIP, and how are the flags kept? The library knows how before the
 * CODE hook, but makes the arithmetic flags of them behind it. */
EXPORTED void restore_state_to_opc_x86_64(void *env, void *block, uint64_t *at_instruction)
{
    Engine *self = engine_of(env, FIND_STATE);
    lib.genuine.find_state(env, block, at_instruction);
    if (self != NULL && self->exact) {
        I32(env, ENV_CC_OP) = CC_OP_FLAGS;
    }
}

/* QEMU begins an instruction anew that has rewritten its own block. */
EXPORTED void cpu_loop_exit_noexc_x86_64(void *cpu)
{
    Engine *self = entered;
    if (self == NULL || self->cpu != cpu) {
        intercepted |= 1ull << LOOP_EXIT_NOEXC;
        probed_next_block |= probing && U32(cpu, CPU_NEXT_BLOCK) == 1;
    } else if (self->exact) {
        self->started--;
    }
    lib.genuine.loop_exit_noexc(cpu);
}

/* A handler that kicked has changed what the next entry begins with, the TSC perhaps. A fast engine
 * leaves its block behind the instruction at RIP for it: the rest must not run before. With TF the
 * block has no rest. */
void leave_block_behind(Engine *self, unsigned opcode_bytes)
{
    char *env = self->env;
    Prefixes prefixes;
    if (self->exact || !is_time_to_look(self) || (U64(env, ENV_EFLAGS) & FLAGS_TF)) {
        return;
    }
    opcode_at(self, linear_rip(env), &prefixes);
    U64(env, ENV_EIP) += prefixes.size_bytes + opcode_bytes;
    U64(env, ENV_EFLAGS) &= ~(uint64_t)FLAGS_RF;
    U32(env, ENV_HFLAGS) &= ~HF_INHIBIT_IRQ;
    forget_last_instruction(self);
    lib.genuine.loop_exit_noexc(self->cpu);
}

EXPORTED void helper_pause_x86_64(void *env, int size_bytes)
{
    Engine *self = engine_of(env, PAUSE);
    if (self != NULL) {
        U32(env, ENV_HFLAGS) &= ~HF_INHIBIT_IRQ; /* of an STI before it; QEMU leaves it */
        if (self->exits_on_pause) {
            self->exit_reason = EXIT_PAUSE;
            lib.emu_stop(self->uc);
        } else {
            /* Nobody waits for the processor: on with the next block, without a way out of the
             * library and in again. */
            U64(env, ENV_EIP) += (unsigned)size_bytes;
            lib.genuine.loop_exit_noexc(self->cpu);
        }
    }
    lib.genuine.pause(env, size_bytes);
}

/* ---- translation ------------------------------------------------------------------------------
 *
 * Every block begins with a call of `check_exit_request`, and there is another one behind every
 * access to memory and every hook. They ask whether somebody wants the library to stop. With an
 * engine nobody does but at boundaries, so the others are taken away.
 *
 * An engine that is not exact has no CODE hook. The call at the start of a block is its boundary:
 * the arguments, which are constants, become the engine and what it has to know of the block. */

enum {
    BLOCK_INSTRUCTIONS = 0x3ff, /* how many there are; the library makes no more than 512 */
    BLOCK_END_SHIFT = 10,       /* the low 16 bits of the address behind it */
    BLOCK_END = 0xffff << BLOCK_END_SHIFT,
    BLOCK_REP = 1 << 26,          /* it is one string instruction with REP, */
    BLOCK_ADDRESS_SIZE = 1 << 27, /* with an address-size prefix */
    BLOCK_PROBED = 1 << 28,       /* for prove_layout */
};

/* As `steps_over_finished_rep`. A REP ends its block, and its further rounds are blocks of their own
 * that end where the first one did. */
static bool steps_over_finished_rep_block(const Engine *self, uint32_t block)
{
    uint64_t mask = count_mask(self, block & BLOCK_ADDRESS_SIZE);
    return self->last_block != 0 && ((block ^ self->last_block) & BLOCK_END) == 0 &&
           (REGISTER(self->env, RCX) & mask) == 0;
}

static void begin_block(Engine *self, uint32_t block)
{
    self->started += block & BLOCK_INSTRUCTIONS;
    self->last_block = block;
}

static __attribute__((noinline)) void look_at_block(Engine *self, uint32_t block,
                                                    uintptr_t return_address)
{
    if (block & BLOCK_PROBED) {
        intercepted |= 1ull << CHECK_EXIT_REQUEST;
        probed_instructions += block & BLOCK_INSTRUCTIONS;
    } else if (!(block & BLOCK_REP) || !steps_over_finished_rep_block(self, block)) {
        if (is_time_to_look(self) && leave_at_boundary(self, NO_ADDRESS)) {
            lib.loop_exit_restore(self->cpu, return_address);
        }
        begin_block(self, block);
    }
}

/* `uc` and 0, or an engine and the BLOCK_ bits. */
EXPORTED void helper_check_exit_request_x86_64(void *uc, uint32_t block)
{
    bool is_plain = block - 1 < BLOCK_REP - 1;
    if (likely(is_plain) && likely(!is_time_to_look(uc))) {
        begin_block(uc, block);
    } else if (block != 0) {
        look_at_block(uc, block, (uintptr_t)__builtin_return_address(0));
    } else {
        if (unlikely(probing)) {
            probed_instructions += BLOCK_INSTRUCTIONS; /* this call was to be removed */
        }
        /* It looks for its return address, which must be ours: this is a jump. */
        lib.genuine.check_exit_request(uc, 0);
    }
}

/* What the call at the start of the block being translated consists of: operations that move its
 * arguments, and itself. */
typedef struct {
    char *call;
    uint64_t *pointer;
    uint64_t *number;
} BlockStart;

static uint64_t *arguments(char *operation)
{
    return (uint64_t *)(operation + OP_ARGUMENTS);
}

/* False: it begins otherwise. */
static bool find_block_start(void *uc, BlockStart *start)
{
    char *first = POINTER(POINTER(uc, UC_TCG), TCG_OPS);
    char *second = first != NULL ? POINTER(first, OP_NEXT) : NULL;
    char *call = second != NULL ? POINTER(second, OP_NEXT) : NULL;
    if (call == NULL) {
        return false;
    }
    *start = (BlockStart){call, &arguments(first)[1], &arguments(second)[1]};
    return *start->pointer == (uintptr_t)uc && *start->number == 0 &&
           arguments(call)[0] == arguments(first)[0] &&
           arguments(call)[1] == arguments(second)[0] &&
           arguments(call)[2] == (uintptr_t)helper_check_exit_request_x86_64;
}

static void remove_further_calls(void *uc, const BlockStart *start)
{
    char *next = POINTER(start->call, OP_NEXT);
    while (next != NULL) {
        char *operation = next;
        next = POINTER(operation, OP_NEXT);
        if (U16(operation, OP_KIND) == U16(start->call, OP_KIND) &&
            arguments(operation)[2] == arguments(start->call)[2]) {
            lib.remove_operation(POINTER(uc, UC_TCG), operation);
        }
    }
}

static uint32_t block_bits(Engine *self, const char *block)
{
    uint64_t end = U64(block, TB_PC) + U16(block, TB_SIZE);
    uint32_t instructions = U16(block, TB_INSTRUCTIONS);
    uint32_t bits = instructions | ((uint32_t)end << BLOCK_END_SHIFT & BLOCK_END);
    Prefixes prefixes;
    if (instructions == 1 && is_string_operation(opcode_at(self, U64(block, TB_PC), &prefixes)) &&
        prefixes.rep) {
        bits |= BLOCK_REP | (prefixes.address_size ? BLOCK_ADDRESS_SIZE : 0);
    }
    return bits;
}

static void refuse_block(Engine *self)
{
    take_gil(self);
    PyErr_SetString(PyExc_RuntimeError, "unicorn: a block does not begin as expected");
    keep_exception(self);
    give_gil(self);
    lib.emu_stop(self->uc);
}

/* How many instructions surely fit on the page that a block begins on. Only the first one of a block
 * may go over its end: a fault of fetching the rest would be told of the block's start. */
static int instructions_on_page(const char *block)
{
    int left = (int)(PAGE_BYTES - U64(block, TB_PC) % PAGE_BYTES);
    return left < INSTRUCTION_BYTES_MAX ? 1 : left / INSTRUCTION_BYTES_MAX;
}

EXPORTED void gen_intermediate_code_x86_64(void *cpu, void *block, int instructions_max)
{
    int fitting = instructions_on_page(block);
    lib.genuine.translate(cpu, block, fitting < instructions_max ? fitting : instructions_max);
    Engine *self = entered;
    void *uc = POINTER(cpu, CPU_UC);
    BlockStart start;
    if (self == NULL || self->uc != uc) {
        intercepted |= 1ull << TRANSLATE;
        if (probing && find_block_start(uc, &start)) {
            remove_further_calls(uc, &start);
            *start.number = BLOCK_PROBED | U16(block, TB_INSTRUCTIONS);
        }
    } else if (!find_block_start(uc, &start)) {
        refuse_block(self);
    } else {
        remove_further_calls(uc, &start);
        if (!self->exact) {
            *start.pointer = (uintptr_t)self;
            *start.number = block_bits(self, block);
        }
    }
}
