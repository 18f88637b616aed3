/* Physical memory: RAM, and what is none. */

#include "shim.h"

/* ---- memory that is no RAM ---------------------------------------------------------------------
 *
 * The library's slow path. There it would split accesses as its memory regions have them: 8 bytes
 * into dwords, unaligned ones into bytes or the two aligned reads around them. KVM's emulator
 * (emulator_read_write) splits them where a page ends and nowhere else; so does this. The first
 * store to a page and all stores to pages with code come here, too. */

static bool has_paging(const char *env)
{
    return U64(env, ENV_CR) & CR0_PG;
}

/* Where an access of translated code goes: to one page or to two. */
typedef struct {
    Engine *self;
    uint64_t linear;
    unsigned size_bytes;
    int access;
    uint32_t oi;
    uintptr_t return_address;
    unsigned first_bytes; /* on the first page */
    uint64_t gpa[2];
} Access;

/* Stores to RAM that is read-only go where no RAM is. */
static bool takes_access(const Engine *self, uint64_t gpa, int access)
{
    const RamRange *ram = ram_at(self, gpa);
    return ram != NULL && (access != ACCESS_STORE || ram->writable);
}

/* Addresses have 32 bits outside of 64-bit code. */
static uint64_t linear_at(const Access *access, unsigned offset)
{
    uint64_t linear = access->linear + offset;
    return U32(access->self->env, ENV_HFLAGS) & HF_CS64 ? linear : (uint32_t)linear;
}

/* Does not return when the guest may not do that: QEMU goes on with the page fault. */
static uint64_t find_gpa(const Access *access, uint64_t linear)
{
    char *env = access->self->env;
    if (!has_paging(env)) {
        return (uint32_t)linear;
    }
    int index = OI_MMU_INDEX(access->oi);
    uint64_t gpa = 0;
    lib.probe_access(env, linear, 0, access->access, index, access->return_address);
    lib.tlb_vaddr_to_paddr(env, linear, access->access, index, &gpa);
    return gpa;
}

/* True: to RAM and nothing else. All faults come before the access has any effect. */
static bool goes_to_ram(Access *access)
{
    unsigned left = PAGE_BYTES - access->linear % PAGE_BYTES;
    access->first_bytes = left < access->size_bytes ? left : access->size_bytes;
    access->gpa[0] = find_gpa(access, access->linear);
    bool ram = takes_access(access->self, access->gpa[0], access->access);
    if (unlikely(left < access->size_bytes)) {
        access->gpa[1] = find_gpa(access, linear_at(access, left));
        ram &= takes_access(access->self, access->gpa[1], access->access);
    }
    return ram;
}

static uint64_t low_bytes(uint64_t value, unsigned size_bytes)
{
    return size_bytes == 8 ? value : value & ((1ull << (8 * size_bytes)) - 1);
}

static uint64_t load_part(const Access *access, uint64_t gpa, unsigned size_bytes)
{
    Engine *self = access->self;
    const RamRange *ram = ram_at(self, gpa);
    uint64_t value = 0;
    if (ram == NULL) {
        return low_bytes(read_mmio(self, gpa, size_bytes, access->return_address), size_bytes);
    }
    memcpy(&value, (const char *)ram->view.buf + (gpa - ram->gpa), size_bytes);
    return value;
}

/* A load of which some or all bytes are no RAM. */
static uint64_t load_around_ram(const Access *access)
{
    unsigned first = access->first_bytes;
    uint64_t value = load_part(access, access->gpa[0], first);
    if (first < access->size_bytes) {
        value |= load_part(access, access->gpa[1], access->size_bytes - first) << (8 * first);
    }
    return value;
}

/* Bytes of RAM are put there as the library does it with a store over two pages: it may be code. */
static void store_part(const Access *access, int part, uint64_t value, unsigned size_bytes)
{
    Engine *self = access->self;
    if (!takes_access(self, access->gpa[part], ACCESS_STORE)) {
        write_mmio(self, access->gpa[part], size_bytes, low_bytes(value, size_bytes),
                   access->return_address);
        return;
    }
    for (unsigned i = 0; i < size_bytes; i++) {
        uint64_t linear = linear_at(access, i + (part ? access->first_bytes : 0));
        lib.genuine.store[BYTE](self->env, linear, (uint8_t)(value >> (8 * i)), access->oi,
                                access->return_address);
    }
}

static void store_around_ram(const Access *access, uint64_t value)
{
    unsigned first = access->first_bytes;
    store_part(access, 0, value, first);
    if (first < access->size_bytes) {
        store_part(access, 1, value >> (8 * first), access->size_bytes - first);
    }
}

INLINE uint64_t load(int size, void *env, uint64_t linear, uint32_t oi, uintptr_t return_address)
{
    Engine *self = engine_of(env, LOADS + size);
    Access access = {self, linear, 1u << size, ACCESS_LOAD, oi, return_address, 0, {0, 0}};
    probed_access = return_address;
    if (self == NULL || goes_to_ram(&access)) {
        return lib.genuine.load[size](env, linear, oi, return_address);
    }
    return load_around_ram(&access);
}

/* What INS stores before it reads: a 0 at ES:DI, of which 16 bits are in each address size. 64-bit
 * code has no base there, whatever ES holds. */
static bool may_be_trial_of_ins(const Access *access, uint64_t value)
{
    const char *env = access->self->env;
    uint64_t base = U32(env, ENV_HFLAGS) & HF_CS64 ? 0 : U64(SEGMENT(env, ES), SEG_BASE);
    uint64_t offset = access->linear - base;
    return value == 0 && (uint16_t)offset == (uint16_t)REGISTER(env, RDI);
}

/* QEMU's INS stores a 0 before it reads the port, to find out whether the store faults. Where no
 * RAM is a device would see it. */
static bool is_trial_of_ins(const Access *access, uint64_t value)
{
    Engine *self = access->self;
    bool is_ins = false;
    if (may_be_trial_of_ins(access, value)) {
        Prefixes prefixes;
        uint64_t running = running_instruction(self, access->return_address);
        uint8_t opcode = opcode_at(self, running, &prefixes);
        is_ins = opcode == 0x6c || opcode == 0x6d;
    }
    self->ins_has_tried = is_ins && !self->ins_has_tried;
    return self->ins_has_tried;
}

/* Where there is code the library looks for the memory region, twice, and for a page it may not
 * make dirty. A store to such data (aligned, as the library's bitmap of code is made for) needs no
 * more than that the translations are forgotten; it does not return when it rewrites its block. */
static bool store_beside_code(const Access *access, uint64_t value)
{
    Engine *self = access->self;
    if (access->linear % access->size_bytes != 0) {
        return false;
    }
    const RamRange *ram = ram_at(self, access->gpa[0]);
    char *host = (char *)ram->view.buf + (access->gpa[0] - ram->gpa);
    if (!anybody_has_code_at(self, ram, host)) {
        return false;
    }
    forget_stored(self, ram, host, access->size_bytes, access->return_address);
    memcpy(host, &value, access->size_bytes);
    return true;
}

INLINE void store(int size, void *env, uint64_t linear, uint64_t value, uint32_t oi,
                  uintptr_t return_address)
{
    Engine *self = engine_of(env, STORES + size);
    Access access = {self, linear, 1u << size, ACCESS_STORE, oi, return_address, 0, {0, 0}};
    if (self == NULL) {
        lib.genuine.store[size](env, linear, value, oi, return_address);
    } else if (goes_to_ram(&access)) {
        if (!store_beside_code(&access, value)) {
            lib.genuine.store[size](env, linear, value, oi, return_address);
            let_stores_be_fast(self, linear, oi);
        }
    } else if (!is_trial_of_ins(&access, low_bytes(value, 1u << size))) {
        store_around_ram(&access, value);
    }
}

/* One function for each size, which is a constant in it. */
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

/* ---- accesses of helpers ----------------------------------------------------------------------
 *
 * To the IVT, the IDT and the stack: of the delivery of an event, of IRET and the like. The library
 * looks for the memory region each time. Without paging linear addresses are physical ones, and
 * what is on one page of RAM is found at once. */

/* NULL: the access has to be the library's. */
INLINE const RamRange *plain_ram(const Engine *self, uint32_t gpa, unsigned size_bytes)
{
    bool on_one_page = gpa % PAGE_BYTES <= PAGE_BYTES - size_bytes;
    return on_one_page && !has_paging(self->env) ? ram_at(self, gpa) : NULL;
}

INLINE uint32_t helper_load(int size, void *env, uint64_t linear, int mmu_index,
                            uintptr_t return_address)
{
    Engine *self = engine_of(env, HELPER_LOADS + size);
    const RamRange *ram = self != NULL ? plain_ram(self, (uint32_t)linear, 1u << size) : NULL;
    uint32_t value = 0;
    if (ram == NULL) {
        return lib.genuine.helper_load[size](env, linear, mmu_index, return_address);
    }
    memcpy(&value, (const char *)ram->view.buf + ((uint32_t)linear - ram->gpa), 1u << size);
    return value;
}

INLINE void helper_store(int size, void *env, uint64_t linear, uint32_t value, int mmu_index,
                         uintptr_t return_address)
{
    Engine *self = engine_of(env, HELPER_STORES + size);
    const RamRange *ram = self != NULL ? plain_ram(self, (uint32_t)linear, 1u << size) : NULL;
    char *host = ram != NULL ? (char *)ram->view.buf + ((uint32_t)linear - ram->gpa) : NULL;
    if (host == NULL || !ram->writable || anybody_has_code_at(self, ram, host)) {
        lib.genuine.helper_store[size](env, linear, value, mmu_index, return_address);
    } else {
        memcpy(host, &value, 1u << size);
    }
}

#define STAND_IN_FOR_HELPER_LOAD(name, size)                                                     \
    EXPORTED uint32_t name(void *env, uint64_t linear, int mmu_index, uintptr_t return_address)  \
    {                                                                                            \
        return helper_load(size, env, linear, mmu_index, return_address);                        \
    }

#define STAND_IN_FOR_HELPER_STORE(name, size)                                                    \
    EXPORTED void name(void *env, uint64_t linear, uint32_t value, int mmu_index,                \
                       uintptr_t return_address)                                                 \
    {                                                                                            \
        helper_store(size, env, linear, value, mmu_index, return_address);                       \
    }

STAND_IN_FOR_HELPER_LOAD(cpu_lduw_mmuidx_ra_x86_64, WORD)
STAND_IN_FOR_HELPER_LOAD(cpu_ldl_mmuidx_ra_x86_64, LONG)
STAND_IN_FOR_HELPER_STORE(cpu_stw_mmuidx_ra_x86_64, WORD)
STAND_IN_FOR_HELPER_STORE(cpu_stl_mmuidx_ra_x86_64, LONG)

/* ---- memory --------------------------------------------------------------------------------- */

/* Those below 4 GiB: the library flushes page by page, which takes too long for more. */
int unmap_gaps(Engine *self)
{
    while (self->gap_count > self->high_gap_count) {
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

/* The handlers answer for every physical address that is not RAM (`ram` is sorted). */
static int map_gaps_between(Engine *self, uint64_t start, uint64_t end)
{
    int error = 0;
    for (int i = 0; i < self->ram_count && start < end && !error; i++) {
        uint64_t ram_start = self->ram[i].gpa;
        uint64_t ram_end = ram_start + self->ram[i].size_bytes;
        if (ram_end > start) {
            error = map_gap(self, start, ram_start < end ? ram_start : end);
            start = ram_end;
        }
    }
    return error ? error : map_gap(self, start, end);
}

int map_gaps(Engine *self)
{
    int error = 0;
    if (self->high_gap_count == 0) {
        error = map_gaps_between(self, FOUR_GIB, PHYSICAL_END);
        self->high_gap_count = self->gap_count;
    }
    error = error ? error : map_gaps_between(self, 0, FOUR_GIB);
    self->gaps_stale = error != 0;
    return error;
}

/* ---- for Python ---------------------------------------------------------------------------- */

static const char *ram_mistake(const Engine *self, uint64_t gpa, const Py_buffer *view)
{
    uint64_t size_bytes = (uint64_t)view->len;
    if (size_bytes == 0 || size_bytes % PAGE_BYTES || gpa % PAGE_BYTES ||
        (uintptr_t)view->buf % PAGE_BYTES) {
        return "RAM must start and end on a page of 4096 bytes";
    }
    if (gpa > PHYSICAL_END || size_bytes > PHYSICAL_END - gpa) {
        return "RAM ends above the last address";
    }
    if (self->high_gap_count > 0 && gpa + size_bytes > FOUR_GIB) {
        return "RAM from 4 GiB on must be mapped before the first enter";
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

void free_range(RamRange *range)
{
    for (size_t page = 0; range->copies != NULL && page < range->size_bytes / PAGE_BYTES; page++) {
        PyMem_RawFree(range->copies[page]);
    }
    PyMem_Free(range->copies);
    PyMem_Free(range->code);
    PyBuffer_Release(&range->view);
}

/* False: no memory for what is kept of each page. */
static bool open_range(RamRange *range, bool shared)
{
    size_t pages = range->size_bytes / PAGE_BYTES;
    range->code = PyMem_Calloc(pages, 1);
    range->copies = shared ? PyMem_Calloc(pages, sizeof *range->copies) : NULL;
    return range->code != NULL && (range->copies != NULL || !shared);
}

static int map_range(Engine *self, const RamRange *range)
{
    uint32_t rights = UC_PROT_READ | UC_PROT_EXEC | (range->writable ? UC_PROT_WRITE : 0);
    int error = unmap_gaps(self);
    self->gaps_stale = true;
    if (!error) {
        error = lib.mem_map_ptr(self->uc, range->gpa, range->size_bytes, rights, range->view.buf);
    }
    return error;
}

static void insert_range(Engine *self, const RamRange *range)
{
    share_memory(self, &range->view);
    int i = self->ram_count++;
    for (; i > 0 && self->ram[i - 1].gpa > range->gpa; i--) {
        self->ram[i] = self->ram[i - 1];
    }
    self->ram[i] = *range;
    self->ram[i].ram_address = lib.ram_address_of(self->uc, range->view.buf);
}

PyObject *engine_map_ram(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gpa", "ram", "writable", "shared", NULL};
    Engine *self = (Engine *)object;
    unsigned long long gpa;
    int writable = true, shared = false;
    PyObject *ram;
    Py_buffer view;
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "KO|$pp:map_ram", names, &gpa, &ram, &writable,
                                     &shared) ||
        PyObject_GetBuffer(ram, &view, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    const char *mistake = ram_mistake(self, gpa, &view);
    if (mistake != NULL) {
        PyErr_SetString(PyExc_ValueError, mistake);
        PyBuffer_Release(&view);
        return NULL;
    }
    RamRange range = {.gpa = gpa, .size_bytes = (uint64_t)view.len, .view = view,
                      .writable = writable};
    if (!open_range(&range, shared)) {
        free_range(&range);
        return PyErr_NoMemory();
    }
    int error = map_range(self, &range);
    if (error) {
        raise_unicorn("map_ram", error);
        free_range(&range);
        return NULL;
    }
    insert_range(self, &range);
    Py_RETURN_NONE;
}

static int index_of_range(const Engine *self, uint64_t gpa)
{
    for (int i = 0; i < self->ram_count; i++) {
        if (self->ram[i].gpa == gpa) {
            return i;
        }
    }
    return -1;
}

/* The library walks page tables for it and may find a fault, which nobody shall hear of. */
static int unmap_range(Engine *self, const RamRange *range)
{
    uint64_t cr2 = U64(self->env, ENV_CR + 8 * 2);
    int32_t index = I32(self->cpu, CPU_EXCEPTION_INDEX);
    int32_t error_code = I32(self->env, ENV_ERROR_CODE);
    int error = unmap_gaps(self);
    self->gaps_stale = true;
    if (!error) {
        forget_range(self, range);
        error = lib.mem_unmap(self->uc, range->gpa, range->size_bytes);
    }
    U64(self->env, ENV_CR + 8 * 2) = cr2;
    I32(self->cpu, CPU_EXCEPTION_INDEX) = index;
    I32(self->env, ENV_ERROR_CODE) = error_code;
    return error;
}

PyObject *engine_unmap_ram(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"gpa", NULL};
    Engine *self = (Engine *)object;
    unsigned long long gpa;
    if (!check_idle(self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "K:unmap_ram", names, &gpa)) {
        return NULL;
    }
    int i = index_of_range(self, gpa);
    if (i < 0) {
        PyErr_SetString(PyExc_ValueError, "no RAM starts there");
        return NULL;
    }
    if (self->high_gap_count > 0 && gpa + self->ram[i].size_bytes > FOUR_GIB) {
        PyErr_SetString(PyExc_ValueError, "RAM from 4 GiB on must stay after the first enter");
        return NULL;
    }
    int error = unmap_range(self, &self->ram[i]);
    if (error) {
        raise_unicorn("unmap_ram", error);
        return NULL;
    }
    free_range(&self->ram[i]);
    self->ram_count--;
    memmove(&self->ram[i], &self->ram[i + 1], (size_t)(self->ram_count - i) * sizeof(RamRange));
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
