/* Physical memory: RAM, and what is none. */

#include "shim.h"

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
    return ram_at(self, (uint32_t)linear) != NULL &&
           ram_at(self, (uint32_t)(linear + size_bytes - 1)) != NULL;
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

static uint64_t load(int size, void *env, uint64_t linear, uint32_t oi, uintptr_t return_address)
{
    Engine *self = engine_of(env, LOADS + size);
    if (self == NULL || is_ram_or_paged(self, linear, 1u << size)) {
        return lib.genuine.load[size](env, linear, oi, return_address);
    }
    return load_around_ram(self, linear, 1u << size);
}

/* QEMU's INS stores a 0 before it reads the port, to find out whether the store faults. Where no
 * RAM is it cannot, and a device would see it. */
static bool is_trial_of_ins(Engine *self, uintptr_t return_address)
{
    Prefixes prefixes;
    uint8_t opcode = opcode_at(self, running_instruction(self, return_address), &prefixes);
    bool is_ins = opcode == 0x6c || opcode == 0x6d;
    self->ins_has_tried = is_ins && !self->ins_has_tried;
    return self->ins_has_tried;
}

static void store(int size, void *env, uint64_t linear, uint64_t value, uint32_t oi,
                  uintptr_t return_address)
{
    Engine *self = engine_of(env, STORES + size);
    if (self == NULL) {
        lib.genuine.store[size](env, linear, value, oi, return_address);
    } else if (is_ram_or_paged(self, linear, 1u << size)) {
        lib.genuine.store[size](env, linear, value, oi, return_address);
        let_stores_be_fast(self, linear, oi);
    } else if (!is_trial_of_ins(self, return_address)) {
        store_around_ram(self, linear, value, 1u << size, oi, return_address);
    }
}

#define STAND_IN_FOR_LOAD(name, size)                                                            \
    EXPORTED uint64_t name(void *env, uint64_t linear, uint32_t oi, uintptr_t return_address)    \
    {                                                                                            \
        return load(size, env, linear, oi, return_address);                                      \
    }

#define STAND_IN_FOR_STORE(name, size)                                                           \
    EXPORTED void name(void *env, uint64_t linear, uint64_t value, uint32_t oi,                  \
                       uintptr_t return_address)                                                 \
    {                                                                                            \
        store(size, env, linear, value, oi, return_address);                                     \
    }

STAND_IN_FOR_LOAD(helper_ret_ldub_mmu_x86_64, BYTE)
STAND_IN_FOR_LOAD(helper_le_lduw_mmu_x86_64, WORD)
STAND_IN_FOR_LOAD(helper_le_ldul_mmu_x86_64, LONG)
STAND_IN_FOR_LOAD(helper_le_ldq_mmu_x86_64, QUAD)
STAND_IN_FOR_STORE(helper_ret_stb_mmu_x86_64, BYTE)
STAND_IN_FOR_STORE(helper_le_stw_mmu_x86_64, WORD)
STAND_IN_FOR_STORE(helper_le_stl_mmu_x86_64, LONG)
STAND_IN_FOR_STORE(helper_le_stq_mmu_x86_64, QUAD)

/* ---- memory --------------------------------------------------------------------------------- */

int unmap_gaps(Engine *self)
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
int map_gaps(Engine *self)
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

/* ---- for Python ---------------------------------------------------------------------------- */

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
    if (maps_memory(self, view)) {
        return "this memory is mapped already: map it once";
    }
    return self->ram_count == RAM_RANGES_MAX ? "too many RAM ranges" : NULL;
}

static void insert_ram(Engine *self, uint64_t gpa, const Py_buffer *view, uint8_t *code)
{
    share_memory(self, view);
    int i = self->ram_count++;
    for (; i > 0 && self->ram[i - 1].gpa > gpa; i--) {
        self->ram[i] = self->ram[i - 1];
    }
    uint64_t ram_address = lib.ram_address_of(self->uc, view->buf);
    self->ram[i] = (RamRange){gpa, (uint64_t)view->len, *view, ram_address, code};
    self->gaps_stale = true;
}

PyObject *engine_map_ram(PyObject *object, PyObject *args, PyObject *kwargs)
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
    uint8_t *code = PyMem_Calloc((size_t)view.len / PAGE_BYTES, 1);
    if (code == NULL) {
        PyBuffer_Release(&view);
        return PyErr_NoMemory();
    }
    int error = unmap_gaps(self);
    if (!error) {
        error = lib.mem_map_ptr(self->uc, gpa, (uint64_t)view.len, UC_PROT_ALL, view.buf);
    }
    self->gaps_stale = true;
    if (error) {
        raise_unicorn("map_ram", error);
        PyBuffer_Release(&view);
        PyMem_Free(code);
        return NULL;
    }
    insert_ram(self, gpa, &view, code);
    Py_RETURN_NONE;
}

PyObject *engine_ram_written(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gpa", "size_bytes", NULL};
    Engine *self = (Engine *)object;
    unsigned long long gpa, size_bytes;
    if (!check_open(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "KK:ram_written", names, &gpa, &size_bytes)) {
        return NULL;
    }
    forget_written(self, gpa, size_bytes);
    Py_RETURN_NONE;
}
