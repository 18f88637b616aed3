/* Calls of the handlers, which are Python. */

#include "shim.h"

void take_gil(Engine *self)
{
    if (self->released != NULL) {
        PyEval_RestoreThread(self->released);
    }
}

void give_gil(Engine *self)
{
    if (self->released != NULL) {
        self->released = PyEval_SaveThread();
    }
}

/* Keeps the current exception for the end of `enter`; the next boundary ends the execution. */
void keep_exception(Engine *self)
{
    if (self->failed) {
        PyErr_Clear();
        return;
    }
    PyErr_Fetch(&self->exception[0], &self->exception[1], &self->exception[2]);
    self->failed = true;
    set_watch(self);
}

PyObject *call_handler(Engine *self, int which, const unsigned long long *values,
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
        self->refused = false;
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

/* The registers as they were before the running instruction. `return_address` is where translated
 * code goes on, 0 when they are so already; IRET has its own place for it. */
static bool restore_registers(Engine *self, uintptr_t return_address)
{
    if (self->iret_return_address != 0) {
        return_address = self->iret_return_address;
        self->iret_return_address = 0;
    }
    return return_address == 0 || lib.restore_state(self->cpu, return_address, true) || self->exact;
}

/* The access was refused: nothing of its instruction shall have happened. Does not return. */
static void leave_before_access(Engine *self, uintptr_t return_address)
{
    if (self->delivering || !restore_registers(self, return_address)) {
        self->exit_reason = EXIT_INTERNAL_ERROR;
    } else {
        self->exit_reason = EXIT_ACCESS;
        self->started -= self->exact;
    }
    lib.emu_stop(self->uc);
    lib.loop_exit(self->cpu);
}

/* RIP and the flags are put where they were before the access only when somebody asks for them:
 * few handlers do. */
void settle_registers(Engine *self)
{
    uintptr_t return_address = self->port_return_address;
    self->port_return_address = 0;
    if (return_address != 0) {
        lib.restore_state(self->cpu, return_address, false);
    }
}

/* Without the GIL other threads may ask, and at any time: they find them there. */
static void begin_port_access(Engine *self, uintptr_t return_address)
{
    if (self->released != NULL) {
        lib.restore_state(self->cpu, return_address, false);
    } else {
        self->port_return_address = return_address;
    }
    take_gil(self);
}

static void end_port_access(Engine *self)
{
    self->port_return_address = 0;
    give_gil(self);
}

void write_port(Engine *self, uint32_t port, unsigned size_bytes, uint32_t value,
                uintptr_t return_address)
{
    unsigned long long values[] = {port, size_bytes, value, self->started - 1};
    begin_port_access(self, return_address);
    tell(self, ON_OUT, values, COUNT(values));
    end_port_access(self);
    if (unlikely(self->refused)) {
        leave_before_access(self, return_address);
    }
}

/* How many rounds the instruction has left, if it is a REP INS; else 1. */
static uint64_t rounds_of_ins(Engine *self, uintptr_t return_address)
{
    Prefixes prefixes;
    uint8_t opcode = opcode_at(self, running_instruction(self, return_address), &prefixes);
    bool is_ins = opcode == 0x6c || opcode == 0x6d;
    uint64_t mask = count_mask(self, prefixes.address_size);
    return is_ins && prefixes.rep ? REGISTER(self->env, RCX) & mask : 1;
}

/* The caller cuts the answer to the size of the access. */
uint64_t read_port(Engine *self, uint32_t port, unsigned size_bytes, uintptr_t return_address)
{
    unsigned long long values[] = {port, size_bytes, self->started - 1};
    begin_port_access(self, return_address);
    uint64_t value = ask(self, ON_IN, values, COUNT(values));
    end_port_access(self);
    if (unlikely(self->refused)) {
        self->rounds = rounds_of_ins(self, return_address);
        leave_before_access(self, return_address);
    }
    return value;
}

/* VMCALL and VMMCALL: what RAX becomes. */
uint64_t ask_hypercall(Engine *self)
{
    unsigned long long values[] = {self->started - 1};
    take_gil(self);
    uint64_t result = ask(self, ON_HYPERCALL, values, COUNT(values));
    give_gil(self);
    return result;
}

/* The first part of an access that raised is the last one: `failed` ends the execution. */
static bool nobody_answers(const Engine *self, int which)
{
    return self->handlers[which] == NULL || self->failed;
}

void write_mmio(Engine *self, uint64_t gpa, unsigned size_bytes, uint64_t value,
                uintptr_t return_address)
{
    unsigned long long values[] = {gpa, size_bytes, value, retired_before(self)};
    if (nobody_answers(self, ON_MMIO_WRITE)) {
        return;
    }
    take_gil(self);
    tell(self, ON_MMIO_WRITE, values, COUNT(values));
    give_gil(self);
    if (unlikely(self->refused)) {
        leave_before_access(self, return_address);
    }
}

/* The caller cuts the answer to the size of the access. */
uint64_t read_mmio(Engine *self, uint64_t gpa, unsigned size_bytes, uintptr_t return_address)
{
    unsigned long long values[] = {gpa, size_bytes, retired_before(self)};
    if (nobody_answers(self, ON_MMIO_READ)) {
        return UINT64_MAX;
    }
    take_gil(self);
    uint64_t value = ask(self, ON_MMIO_READ, values, COUNT(values));
    give_gil(self);
    if (unlikely(self->refused)) {
        leave_before_access(self, return_address);
    }
    return value;
}

/* Where the access of a memory region's callback comes from, 0 in the delivery of an event. False:
 * it is of a page walk, before which nobody says so. */
static bool take_access_address(Engine *self, uintptr_t *address)
{
    *address = U64(self->cpu, CPU_ACCESS_AT);
    U64(self->cpu, CPU_ACCESS_AT) = PAGE_WALK;
    return *address != PAGE_WALK;
}

/* Callbacks of a memory region: for what `store_around_ram` and `load_around_ram` leave alone. */
void on_mmio_write(void *uc, uint64_t offset, unsigned size_bytes, uint64_t value,
                          void *user)
{
    (void)uc;
    const Gap *gap = user;
    uintptr_t from;
    if (take_access_address(gap->engine, &from)) {
        write_mmio(gap->engine, gap->gpa + offset, size_bytes, value, from);
    }
}

uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size_bytes, void *user)
{
    (void)uc;
    const Gap *gap = user;
    uintptr_t from;
    if (!take_access_address(gap->engine, &from)) {
        return 0; /* a page table: KVM finds nothing there (FNAME(walk_addr_generic)) */
    }
    return read_mmio(gap->engine, gap->gpa + offset, size_bytes, from);
}
