/* Events: those of the VM entry and the guest's own exceptions. */

#include "shim.h"

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

/* INTR hook: an exception or a software interrupt of the guest; QEMU delivers it through the
 * guest's own vectors. Does not return when that faults in turn. */
void on_exception(void *uc, uint32_t vector, void *engine)
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
bool on_invalid_opcode(void *uc, void *engine)
{
    on_exception(uc, 6, engine);
    return true;
}
