/* Which pages of RAM hold translated code, and who must forget it when they change.
 *
 * A page without code is written by translated code itself ("dirty" in the TLB); every store to a
 * page with code comes to the library's slow path. Engines that map the same RAM, each with
 * translations of its own, form a ring: a page on which any of them has code is dirty in none, and
 * what one of them stores there the others forget. */

#include "shim.h"

static Engine *opened;               /* all engines of the process; changed with the GIL held */
static __thread Engine *invalidated; /* whose translations `forget` takes away */

void join_engines(Engine *self)
{
    self->sharing = self;
    self->next_opened = opened;
    opened = self;
}

static void leave_ring(Engine *self)
{
    Engine *before = self;
    while (before->sharing != self) {
        before = before->sharing;
    }
    before->sharing = self->sharing;
    self->sharing = self;
}

void leave_engines(Engine *self)
{
    for (Engine **link = &opened; *link != NULL; link = &(*link)->next_opened) {
        if (*link == self) {
            *link = self->next_opened;
            leave_ring(self);
            return;
        }
    }
}

static bool overlap(const RamRange *one, const Py_buffer *other)
{
    const char *start = one->view.buf;
    const char *other_start = other->buf;
    return start < other_start + other->len && other_start < start + one->view.len;
}

bool maps_memory(const Engine *self, const Py_buffer *view)
{
    for (int i = 0; i < self->ram_count; i++) {
        if (overlap(&self->ram[i], view)) {
            return true;
        }
    }
    return false;
}

static bool in_ring(const Engine *self, const Engine *wanted)
{
    const Engine *other = self;
    do {
        if (other == wanted) {
            return true;
        }
        other = other->sharing;
    } while (other != self);
    return false;
}

/* `self` is going to map `view`: its ring becomes one with those of all that map it. */
void share_memory(Engine *self, const Py_buffer *view)
{
    for (Engine *other = opened; other != NULL; other = other->next_opened) {
        if (maps_memory(other, view) && !in_ring(self, other)) {
            Engine *next = self->sharing;
            self->sharing = other->sharing;
            other->sharing = next;
        }
    }
}

/* The range that holds the byte at `host`, or NULL. */
static RamRange *range_of(Engine *self, const char *host)
{
    for (int i = 0; i < self->ram_count; i++) {
        if ((size_t)(host - (char *)self->ram[i].view.buf) < (size_t)self->ram[i].view.len) {
            return &self->ram[i];
        }
    }
    return NULL;
}

static char *host_of(Engine *self, uint64_t ram_address)
{
    for (int i = 0; i < self->ram_count; i++) {
        uint64_t offset = ram_address - self->ram[i].ram_address;
        if (offset < self->ram[i].size_bytes) {
            return (char *)self->ram[i].view.buf + offset;
        }
    }
    return NULL;
}

static uint8_t *mark_in(const RamRange *range, const char *host)
{
    return &range->code[(host - (char *)range->view.buf) / PAGE_BYTES];
}

static uint8_t *code_mark(Engine *self, const char *host)
{
    RamRange *range = range_of(self, host);
    return range == NULL ? NULL : mark_in(range, host);
}

/* `range` is the one of `self` that `host` is in. */
bool anybody_has_code_at(const Engine *self, const RamRange *range, const char *host)
{
    bool found = *mark_in(range, host);
    for (Engine *other = self->sharing; other != self && !found; other = other->sharing) {
        const uint8_t *mark = code_mark(other, host);
        found = mark != NULL && *mark;
    }
    return found;
}

/* Translated code may from now on store to the page of `linear`, to which the library has just
 * stored, by itself: unless there is code on it. */
void let_stores_be_fast(Engine *self, uint64_t linear, uint32_t oi)
{
    const char *host = lib.tlb_vaddr_to_host(self->env, linear, ACCESS_LOAD, OI_MMU_INDEX(oi));
    const RamRange *range = host != NULL ? range_of(self, host) : NULL;
    if (range != NULL && !anybody_has_code_at(self, range, host)) {
        lib.tlb_set_dirty(self->cpu, linear);
    }
}

static void watch_stores(Engine *self, const char *host)
{
    uintptr_t page = (uintptr_t)host & ~(uintptr_t)(PAGE_BYTES - 1);
    Engine *other = self;
    do {
        if (range_of(other, host) != NULL) {
            lib.tlb_reset_dirty(other->cpu, page, PAGE_BYTES);
        }
        other = other->sharing;
    } while (other != self);
}

/* Takes `self`'s translations of some bytes of one of its ranges away. */
static void forget(Engine *self, const RamRange *range, const char *host, uint64_t size_bytes)
{
    uint64_t start = range->ram_address + (uint64_t)(host - (char *)range->view.buf);
    Engine *outer = invalidated;
    invalidated = self;
    lib.invalidate_range(self->uc, start, start + size_bytes);
    invalidated = outer;
}

static void others_forget(Engine *self, const char *host, uint64_t size_bytes)
{
    for (Engine *other = self->sharing; other != self; other = other->sharing) {
        const uint8_t *mark = code_mark(other, host);
        if (mark != NULL && *mark) {
            forget(other, range_of(other, host), host, size_bytes);
        }
    }
}

/* The host wrote RAM: nobody who shares it has translations of it afterwards. Page by page, as
 * another engine may map only some of them. */
static void forget_in_range(Engine *self, const RamRange *range, uint64_t from, uint64_t to)
{
    while (from < to) {
        uint64_t next = (from | (PAGE_BYTES - 1)) + 1;
        uint64_t count = (next < to ? next : to) - from;
        const char *host = (char *)range->view.buf + (from - range->gpa);
        if (*code_mark(self, host)) {
            forget(self, range, host, count);
        }
        others_forget(self, host, count);
        from = next;
    }
}

void forget_written(Engine *self, uint64_t gpa, uint64_t size_bytes)
{
    uint64_t end = size_bytes > UINT64_MAX - gpa ? UINT64_MAX : gpa + size_bytes;
    for (int i = 0; i < self->ram_count; i++) {
        const RamRange *range = &self->ram[i];
        uint64_t range_end = range->gpa + range->size_bytes;
        forget_in_range(self, range, gpa > range->gpa ? gpa : range->gpa,
                        end < range_end ? end : range_end);
    }
}

/* Takes all of `self`'s translations of a range away. */
void forget_range(Engine *self, const RamRange *range)
{
    forget(self, range, range->view.buf, range->size_bytes);
}

static void copy_page(RamRange *range, size_t page)
{
    if (range->copies == NULL) {
        return;
    }
    if (range->copies[page] == NULL) {
        range->copies[page] = PyMem_RawMalloc(PAGE_BYTES);
    }
    if (range->copies[page] != NULL) {
        memcpy(range->copies[page], (char *)range->view.buf + page * PAGE_BYTES, PAGE_BYTES);
    }
}

/* Without a copy, for want of memory, it counts as changed. */
static void forget_changed_page(Engine *self, const RamRange *range, size_t page)
{
    const char *host = (char *)range->view.buf + page * PAGE_BYTES;
    const uint8_t *copy = range->copies[page];
    if (copy == NULL || memcmp(copy, host, PAGE_BYTES) != 0) {
        forget(self, range, host, PAGE_BYTES);
    }
}

/* The host may have written RAM that it shares: code that is not as it was when it was translated
 * is forgotten. So is code that the guest has rewritten itself; that costs a translation. */
void forget_changed(Engine *self)
{
    for (int i = 0; i < self->ram_count; i++) {
        const RamRange *range = &self->ram[i];
        const uint8_t *end = range->code + range->size_bytes / PAGE_BYTES;
        const uint8_t *mark = range->code;
        while (range->copies != NULL && (mark = memchr(mark, 1, (size_t)(end - mark))) != NULL) {
            forget_changed_page(self, range, (size_t)(mark++ - range->code));
        }
    }
}

/* ---- what the library calls ------------------------------------------------------------------- */

static Engine *engine_of_uc(const void *uc, int function)
{
    if (invalidated != NULL && invalidated->uc == uc) {
        return invalidated;
    }
    if (entered != NULL && entered->uc == uc) {
        return entered;
    }
    intercepted |= 1ull << function;
    return NULL;
}

/* The first block of code on a page has been translated. */
EXPORTED void tlb_protect_code_x86_64(void *uc, uint64_t ram_address)
{
    Engine *self = engine_of_uc(uc, PROTECT_CODE);
    lib.genuine.protect_code(uc, ram_address);
    char *host = self != NULL ? host_of(self, ram_address) : NULL;
    if (host != NULL) {
        RamRange *range = range_of(self, host);
        size_t page = (size_t)(host - (char *)range->view.buf) / PAGE_BYTES;
        range->code[page] = 1;
        copy_page(range, page);
        watch_stores(self, host);
    }
}

/* The last one is gone. */
EXPORTED void tlb_unprotect_code_x86_64(void *uc, uint64_t ram_address)
{
    Engine *self = engine_of_uc(uc, UNPROTECT_CODE);
    lib.genuine.unprotect_code(uc, ram_address);
    char *host = self != NULL ? host_of(self, ram_address) : NULL;
    if (host != NULL) {
        *code_mark(self, host) = 0;
    }
}

/* `self` is going to store to what holds code of somebody. Does not return when the running block
 * is rewritten: the library runs the instruction anew. */
void forget_stored(Engine *self, const RamRange *range, char *host, unsigned size_bytes,
                   uintptr_t return_address)
{
    uint64_t ram_address = range->ram_address + (uint64_t)(host - (char *)range->view.buf);
    others_forget(self, host, size_bytes);
    lib.genuine.invalidate_stored(self->uc, NULL, ram_address, (int)size_bytes, return_address);
}

/* A store to a page that is not dirty, whoever makes it: translated code, a helper, the delivery of
 * an event. */
EXPORTED void tb_invalidate_phys_page_fast_x86_64(void *uc, void *pages, uint64_t ram_address,
                                                  int size_bytes, uintptr_t return_address)
{
    Engine *self = engine_of_uc(uc, INVALIDATE_STORED);
    char *host = self != NULL ? host_of(self, ram_address) : NULL;
    if (host != NULL) {
        others_forget(self, host, (uint64_t)size_bytes);
    }
    lib.genuine.invalidate_stored(uc, pages, ram_address, size_bytes, return_address);
}
