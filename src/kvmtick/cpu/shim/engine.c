/* The Python type `Engine` and the module. */

#include "shim.h"

/* ---- Engine: life --------------------------------------------------------------------------------- */

void raise_unicorn(const char *what, int error)
{
    PyErr_Format(PyExc_RuntimeError, "unicorn: %s: %s", what, lib.strerror(error));
}

bool check_open(const Engine *self)
{
    if (self->uc == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the engine is closed");
    }
    return self->uc != NULL;
}

bool check_idle(const Engine *self)
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
    leave_engines(self);
    if (self->uc != NULL) {
        lib.close(self->uc);
        self->uc = NULL;
    }
    while (self->ram_count > 0) {
        free_range(&self->ram[--self->ram_count]);
    }
    self->gap_count = self->high_gap_count = 0;
}

int open_cpu(void **uc)
{
    int error = lib.open(UC_ARCH_X86, UC_MODE_64, uc);
    if (error) {
        return error;
    }
    if ((error = lib.ctl(*uc, UC_CTL_CPU_MODEL, UC_CPU_ICELAKE_SERVER)) ||
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

int add_hooks(Engine *self)
{
    int error;
    if ((self->exact && (error = add_hook(self, UC_HOOK_CODE, on_instruction))) ||
        (error = add_hook(self, UC_HOOK_INTR, on_exception)) ||
        (error = add_hook(self, UC_HOOK_INSN_INVALID, on_invalid_opcode))) {
        return error;
    }
    return add_instruction_hook(self, UC_INS_CPUID, on_cpuid);
}

static int engine_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seed", "exact", NULL};
    Engine *self = (Engine *)object;
    unsigned long long seed = 0;
    int exact = true;
    uint64_t rax;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$Kp:Engine", names, &seed, &exact)) {
        return -1;
    }
    if (lib.handle == NULL || self->uc != NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        self->uc ? "the engine is already open" : "call load() first");
        return -1;
    }
    self->exact = exact;
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
    join_engines(self);
    self->gaps_stale = true;
    self->rflags = 2;
    self->random = seed;
    self->tsc_khz = 1000000;
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
    PyMem_Free(self->breakpoints);
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
    static char *names[] = {"on_out",   "on_in",    "on_mmio_write", "on_mmio_read", "on_wrmsr",
                            "on_rdmsr", "on_cpuid", "on_cr8_write",  "on_cr8_read",
                            "on_hypercall", NULL};
    Engine *self = (Engine *)object;
    PyObject *given[HANDLERS] = {NULL};
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OOOOOOOO:attach", names,
                                     &given[ON_OUT], &given[ON_IN], &given[ON_MMIO_WRITE],
                                     &given[ON_MMIO_READ], &given[ON_WRMSR], &given[ON_RDMSR],
                                     &given[ON_CPUID], &given[ON_CR8_WRITE],
                                     &given[ON_CR8_READ], &given[ON_HYPERCALL]) ||
        !check_handlers(given)) {
        return NULL;
    }
    for (int i = 0; i < HANDLERS; i++) {
        PyObject *handler = given[i] == Py_None ? NULL : given[i];
        Py_XSETREF(self->handlers[i], Py_XNewRef(handler));
    }
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
    int error = reset_cpu(self, cs, ip);
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

static PyObject *engine_set_interruptibility(PyObject *object, PyObject *value)
{
    Engine *self = (Engine *)object;
    unsigned long state = PyLong_AsUnsignedLong(value);
    if (PyErr_Occurred() || !check_open(self)) {
        return NULL;
    }
    unsigned long shadows = state & (SHADOW_STI | SHADOW_MOV_SS);
    if ((state & ~(unsigned long)SHADOW_NMI) != shadows || shadows == (SHADOW_STI | SHADOW_MOV_SS)) {
        PyErr_Format(PyExc_ValueError, "no such interruptibility: %lu", state);
        return NULL;
    }
    set_interruptibility(self, (unsigned)state);
    Py_RETURN_NONE;
}

static PyObject *engine_set_tsc(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"khz", "value", "at_ns", "live", NULL};
    Engine *self = (Engine *)object;
    unsigned long khz;
    unsigned long long value, at_ns;
    int live;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "kKKp:set_tsc", names, &khz, &value, &at_ns,
                                     &live)) {
        return NULL;
    }
    self->tsc_khz = khz;
    self->tsc_value = value;
    self->tsc_at_ns = at_ns;
    self->live_tsc = live;
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

static PyObject *engine_exit_on_pause(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"enabled", NULL};
    Engine *self = (Engine *)object;
    int enabled;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "p:exit_on_pause", names, &enabled)) {
        return NULL;
    }
    self->exits_on_pause = enabled;
    Py_RETURN_NONE;
}

static int compare_addresses(const void *one, const void *other)
{
    uint64_t first = *(const uint64_t *)one, second = *(const uint64_t *)other;
    return (first > second) - (first < second);
}

/* `addresses` is a list or a tuple of numbers. NULL: an exception is set. */
static uint64_t *sorted_addresses(PyObject *addresses, size_t count)
{
    uint64_t *sorted = PyMem_Malloc((count + 1) * sizeof *sorted);
    if (sorted == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (size_t i = 0; i < count && !PyErr_Occurred(); i++) {
        sorted[i] = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(addresses, i));
    }
    if (PyErr_Occurred()) {
        PyMem_Free(sorted);
        return NULL;
    }
    qsort(sorted, count, sizeof *sorted, compare_addresses);
    return sorted;
}

static PyObject *engine_set_breakpoints(PyObject *object, PyObject *addresses)
{
    Engine *self = (Engine *)object;
    PyObject *sequence = PySequence_Fast(addresses, "set_breakpoints() takes addresses");
    if (sequence == NULL) {
        return NULL;
    }
    size_t count = (size_t)PySequence_Fast_GET_SIZE(sequence);
    uint64_t *sorted = NULL;
    if (count > 0 && !self->exact) {
        PyErr_SetString(PyExc_ValueError, "breakpoints need an engine that is exact");
    } else if (check_idle(self)) {
        sorted = sorted_addresses(sequence, count);
    }
    Py_DECREF(sequence);
    if (sorted == NULL) {
        return NULL;
    }
    PyMem_Free(self->breakpoints);
    self->breakpoints = sorted;
    self->breakpoint_count = count;
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

static PyObject *engine_refuse(PyObject *object, PyObject *unused)
{
    (void)unused;
    Engine *self = (Engine *)object;
    self->refused = true;
    Py_RETURN_NONE;
}

static PyObject *engine_forget_changed_code(PyObject *object, PyObject *unused)
{
    (void)unused;
    Engine *self = (Engine *)object;
    if (!check_idle(self)) {
        return NULL;
    }
    forget_changed(self);
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
    if (self->exit_reason == EXIT_INTERNAL_ERROR) {
        set_error(self, "an event is delivered through memory that is no RAM");
    }
    if (self->exit_reason != EXIT_NONE) {
        return self->exit_reason;
    }
    if (self->failed) {
        return EXIT_CALLBACK_FAILED;
    }
    if (error == UC_ERR_FETCH_UNMAPPED || error == UC_ERR_FETCH_PROT) {
        /* There is no instruction to hook, but the boundary before it is one all the same. */
        int reason = boundary_reason(self, NO_ADDRESS);
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
    Engine *outer = entered;
    entered = self;
    self->running = true;
    if (self->releases_gil) {
        self->released = PyEval_SaveThread();
    }
    int error = resume(self->uc);
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
    self->ins_has_tried = false;
    self->exit_reason = EXIT_NONE;
    self->failed = false;
    self->rounds = 1;
    U64(self->cpu, CPU_ACCESS_AT) = PAGE_WALK;
    /* Blocks of one instruction, with a budget of one. */
    U32(self->cpu, CPU_NEXT_BLOCK) = !self->exact && self->budget == 1 ? 1 : NO_LIMIT;
    self->delivering = 0;
    self->iret_return_address = 0;
    self->intr_info = intr_info;
    set_watch(self);
    I32(self->env, ENV_OLD_EXCEPTION) = -1;
    U32(self->cpu, CPU_INTERRUPT_REQUEST) = intr_info & INTR_INFO_VALID ? CPU_INTERRUPT_HARD : 0;
    return true;
}

static void pack_exit(Engine *self)
{
    self->last_exit = self->rflags | (uint64_t)self->interruptibility << EXIT_INTERRUPTIBILITY_SHIFT |
                      self->retired << EXIT_RETIRED_SHIFT;
}

/* As a VM entry fails that has no TSS in TR (SDM vol. 3C, 28.3.1.2). */
static PyObject *refuse_entry(Engine *self)
{
    self->retired = 0;
    pack_exit(self);
    set_error(self, "TR holds no TSS");
    return PyLong_FromLong(EXIT_INTERNAL_ERROR);
}

static PyObject *finish(Engine *self, int error)
{
    int reason = classify(self, error);
    self->interruptibility = compute_interruptibility(self);
    carry_over(self);
    self->rflags = compute_rflags(self->env);
    self->retired = self->started;
    pack_exit(self);
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
    if (unlikely(!has_task(self->env))) {
        return refuse_entry(self);
    }
    self->irq_window = irq_window;
    self->nmi_window = nmi_window;
    self->budget = budget;
    self->look_at = self->deadline_ns ? 1 : UINT64_MAX;
    self->looked_at = 0;
    self->looked_ns = tsc;
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
    {"unmap_ram", WITH_KEYWORDS(engine_unmap_ram), "Take RAM away again."},
    {"ram_written", WITH_KEYWORDS(engine_ram_written), "The host wrote guest RAM."},
    {"reset", WITH_KEYWORDS(engine_reset), "Real mode at cs:ip, as after RESET."},
    {"enter", (PyCFunction)(void (*)(void))engine_enter, METH_FASTCALL | METH_KEYWORDS,
     "Run the guest until the next VM exit."},
    {"refuse", engine_refuse, METH_NOARGS, "Leave the guest before the access."},
    {"forget_changed_code", engine_forget_changed_code, METH_NOARGS,
     "Look whether the host has written shared RAM."},
    {"kick", engine_kick, METH_NOARGS, "Leave the guest at the next instruction boundary."},
    {"set_tsc", WITH_KEYWORDS(engine_set_tsc), "Rate and value of the guest's TSC."},
    {"release_gil", WITH_KEYWORDS(engine_release_gil), "Let other threads run with the guest."},
    {"exit_on_pause", WITH_KEYWORDS(engine_exit_on_pause), "Whether PAUSE ends an entry."},
    {"set_breakpoints", engine_set_breakpoints, METH_O, "Where to stop, by linear address."},
    {"registers", engine_registers, METH_NOARGS, "The guest's registers by name."},
    {"set_registers", engine_set_registers, METH_O, "Write some of the guest's registers."},
    {"set_interruptibility", engine_set_interruptibility, METH_O, "What holds events back."},
    {"close", engine_close, METH_NOARGS, "Give everything back."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef engine_members[] = {
    {"deadline_ns", T_ULONGLONG, offsetof(Engine, deadline_ns), 0, "Of CLOCK_MONOTONIC; 0: none."},
    {"rflags", T_ULONGLONG, offsetof(Engine, rflags), 0, "RFLAGS at the last exit."},
    {"interruptibility", T_UINT, offsetof(Engine, interruptibility), 0, "Shadow at the last exit."},
    {"retired", T_ULONGLONG, offsetof(Engine, retired), 0, "Instructions in the last entry."},
    {"last_exit", T_ULONGLONG, offsetof(Engine, last_exit), READONLY, "All of these in one."},
    {"idt_vectoring_info", T_UINT, offsetof(Engine, idt_vectoring_info), 0, "Always 0."},
    {"entry_error_code", T_UINT, offsetof(Engine, entry_error_code), 0,
     "What an exception given to enter pushes."},
    {"exact", T_BOOL, offsetof(Engine, exact), READONLY, "Whether every boundary is looked at."},
    {"rounds", T_ULONGLONG, offsetof(Engine, rounds), READONLY, "What a refused REP has left."},
    {"error", T_OBJECT, offsetof(Engine, error), 0, "Why the last INTERNAL_ERROR happened."},
    {NULL, 0, 0, 0, NULL},
};

static PyObject *engine_rip(PyObject *object, void *unused)
{
    (void)unused;
    Engine *self = (Engine *)object;
    if (!check_open(self)) {
        return NULL;
    }
    settle_registers(self);
    return PyLong_FromUnsignedLongLong(U64(self->env, ENV_EIP));
}

static PyGetSetDef engine_properties[] = {
    {"rip", engine_rip, NULL, "RIP, without the other registers.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
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
    .tp_getset = engine_properties,
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
