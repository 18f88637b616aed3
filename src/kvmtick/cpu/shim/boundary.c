/* Instruction boundaries: what ends an execution, and where. */

#include "shim.h"

/* `kick` sets its flag, then watch_from; here it is the other way round: no kick gets lost. */
void set_watch(Engine *self)
{
    bool now = self->irq_window || self->nmi_window || self->failed;
    __atomic_store_n(&self->watch_from, now ? 0 : self->budget, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&self->kicked, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&self->watch_from, 0, __ATOMIC_SEQ_CST);
    }
}

/* What ends the execution before the next instruction, in the contract's order. */
int boundary_reason(Engine *self)
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
void on_instruction(void *uc, uint64_t address, uint32_t size_bytes, void *engine)
{
    (void)uc, (void)size_bytes;
    Engine *self = engine;
    if (unlikely(address == self->last_address) &&
        steps_over_finished_rep(self, address)) {
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
