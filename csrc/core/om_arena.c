/*
 * om_arena: see om_arena.h. Owns its records; never touches the memory that it describes.
 *
 * Sizes are counted in granules. [0, size) is tiled by records, each a hole or an allocation, in a
 * ring by address through record 0 (the sentinel, also the nil of every chain). Two holes never
 * touch. A hole is chained in the list of its size class: class n for n < 32, else one of 32 equal
 * steps of its power of two, so that up to 63 granules each size has its own class. An allocation
 * is chained in the hash bucket of its offset.
 *
 * alloc: look at the first few holes from the request's own class upwards, keep the smallest that
 * fits; else the head of the first class whose every hole fits (two bit searches); split.
 * free: look up, merge with the holes on both sides. Merging gives records back and never takes
 * one, which is why free needs no memory; alloc gets its records before it changes anything.
 *
 * Thread rule: the caller serialises. Failures leave the arena as it was.
 */
#include "core/om_arena_int.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

/* ---- size classes ---- */

/* The first class whose every hole has at least n granules. */
static unsigned sure_class(uint64_t n)
{
	return class_of(n < STEPS ? n : n + (UINT64_C(1) << (log2_of(n) - STEP_BITS)) - 1);
}

static unsigned levels_for(uint64_t size)
{
	return size ? class_of(size) / STEPS + 1 : 1;
}

/* The first class from `from` on that has a hole; 0 when none has. */
static unsigned next_class(const struct om_arena *a, unsigned from)
{
	unsigned level = from / STEPS;
	uint32_t here;
	uint64_t higher;

	if (level >= a->level_count)
		return 0;
	here = a->levels[level].bitmap & (UINT32_MAX << (from % STEPS));
	if (here)
		return level * STEPS + (unsigned)__builtin_ctz(here);
	higher = a->bitmap & (UINT64_MAX << (level + 1)); /* level + 1 <= 60 */
	if (!higher)
		return 0;
	level = (unsigned)__builtin_ctzll(higher);
	return level * STEPS + (unsigned)__builtin_ctz(a->levels[level].bitmap);
}

static void hole_link(struct om_arena *a, uint32_t i)
{
	struct record *r = &a->records[i];
	unsigned class = class_of(r->n);
	uint32_t *head = class_head(a, class);

	r->used = 0;
	r->prev = NIL;
	r->next = *head;
	if (*head)
		a->records[*head].prev = i;
	*head = i;
	a->levels[class / STEPS].bitmap |= 1u << (class % STEPS);
	a->bitmap |= UINT64_C(1) << (class / STEPS);
}

static void hole_unlink(struct om_arena *a, uint32_t i)
{
	struct record *r = &a->records[i];
	unsigned class = class_of(r->n);
	struct level *level = &a->levels[class / STEPS];

	if (r->next)
		a->records[r->next].prev = r->prev;
	if (r->prev) {
		a->records[r->prev].next = r->next;
		return;
	}
	level->head[class % STEPS] = r->next;
	if (r->next)
		return;
	level->bitmap &= ~(1u << (class % STEPS));
	if (!level->bitmap)
		a->bitmap &= ~(UINT64_C(1) << (class / STEPS));
}

/* ---- allocations by offset ---- */

static void bucket_link(struct om_arena *a, uint32_t i)
{
	uint32_t *bucket = bucket_of(a, a->records[i].at);

	a->records[i].next = *bucket;
	*bucket = i;
}

/* ---- records ---- */

/* Make sure that `n` records can be taken. Moves the records. */
static int records_reserve(struct om_arena *a, uint32_t n)
{
	uint32_t count = a->record_count, old = count, *buckets;
	struct record *records;

	if (count - a->fresh + a->unused_count >= n)
		return 0;
	if (count >= MAX_RECORDS)
		return om_err(-ENOMEM, "arena: %" PRIu32 " records are in use", count);
	count = count ? 2 * count : MIN_RECORDS;
	buckets = a->by_handle ? NULL : om_alloc(count, sizeof(*buckets));
	if (!buckets && !a->by_handle)
		return -ENOMEM;
	records = om_realloc(a->records, count, sizeof(*records));
	if (!records) {
		om_free(buckets);
		return -ENOMEM;
	}
	memset(records + old, 0, (count - old) * sizeof(*records));
	om_free(a->buckets);
	a->buckets = buckets;
	a->records = records;
	a->record_count = count;
	for (uint32_t i = 1; i < a->fresh && !a->by_handle; i++)
		if (records[i].used)
			bucket_link(a, i);
	return 0;
}

/* A reserved record, placed by address before `above`. */
static uint32_t record_take(struct om_arena *a, uint64_t at, uint64_t n, uint32_t above)
{
	uint32_t i = a->unused;
	struct record *r;

	if (i) {
		a->unused = a->records[i].next;
		a->unused_count--;
	} else {
		i = a->fresh++;
	}
	r = &a->records[i];
	r->at = at;
	r->n = n;
	r->above = above;
	r->below = a->records[above].below;
	a->records[r->below].above = i;
	a->records[above].below = i;
	return i;
}

static void record_give(struct om_arena *a, uint32_t i)
{
	struct record *r = &a->records[i];

	a->records[r->below].above = r->above;
	a->records[r->above].below = r->below;
	r->n = 0;
	r->used = 0;
	r->next = a->unused;
	a->unused = i;
	a->unused_count++;
}

static int levels_reserve(struct om_arena *a, uint64_t size)
{
	unsigned count = levels_for(size);
	struct level *levels;

	if (count <= a->level_count)
		return 0;
	levels = om_realloc(a->levels, count, sizeof(*levels));
	if (!levels)
		return -ENOMEM;
	memset(levels + a->level_count, 0, (count - a->level_count) * sizeof(*levels));
	a->levels = levels;
	a->level_count = count;
	return 0;
}

/* ---- the contract ---- */

static int create(uint64_t size, uint64_t granule, bool by_handle, struct om_arena **ret)
{
	struct om_arena *a;
	int code;

	*ret = NULL;
	if (!granule || (granule & (granule - 1)))
		return om_err(OM_EVALUE, "arena: granule %" PRIu64 " is not a power of two",
		              granule);
	a = om_alloc(1, sizeof(*a));
	if (!a)
		return -ENOMEM;
	a->shift = log2_of(granule);
	a->by_handle = by_handle;
	code = levels_reserve(a, 0);
	if (!code)
		code = records_reserve(a, 1);
	if (!code) {
		a->fresh = 1; /* the sentinel */
		code = om_arena_grow(a, size);
	}
	if (code) {
		om_arena_destroy(a);
		return code;
	}
	*ret = a;
	return 0;
}

int om_arena_create(uint64_t size, uint64_t granule, struct om_arena **ret)
{
	return create(size, granule, false, ret);
}

int om_arena_create_by_handle(uint64_t size, uint64_t granule, struct om_arena **ret)
{
	return create(size, granule, true, ret);
}

void om_arena_destroy(struct om_arena *a)
{
	if (!a)
		return;
	om_free(a->levels);
	om_free(a->records);
	om_free(a->buckets);
	om_free(a);
}

/* Granules lost at the start of hole r before a multiple of `align`. */
static uint64_t pad_of(const struct record *r, uint64_t align)
{
	return om_up(r->at, align) - r->at;
}

/* A hole for n granules at a multiple of `align` granules, or NIL. */
static uint32_t find_hole(const struct om_arena *a, uint64_t n, uint64_t align)
{
	unsigned own = class_of(n), class = next_class(a, own), seen = 0;
	uint32_t best = NIL;

	for (; class && !best && seen < MAX_SCAN; class = next_class(a, class + 1)) {
		uint32_t i = *class_head(a, class);

		if (class > own && align == 1) /* whichever: they differ by 1/32 at most */
			return i;
		for (; i && seen < MAX_SCAN; i = a->records[i].next, seen++) {
			const struct record *r = &a->records[i];

			if (r->n >= n + pad_of(r, align) && (!best || r->n < a->records[best].n))
				best = i;
			if (r->n == n && best == i)
				return best;
		}
	}
	if (best)
		return best;
	if (n + align - 1 > a->size) /* also keeps sure_class in range */
		return NIL;
	class = next_class(a, sure_class(n + align - 1));
	return class ? *class_head(a, class) : NIL;
}

/* Turn [pad, pad + n) of hole *at into an allocation, whose record *at is then. */
static int carve(struct om_arena *a, uint32_t *at, uint64_t pad, uint64_t n)
{
	uint32_t i = *at;
	uint64_t tail = a->records[i].n - pad - n;
	int code = records_reserve(a, (pad > 0) + (tail > 0));

	if (code)
		return code;
	hole_unlink(a, i);
	if (pad) {
		uint64_t from = a->records[i].at + pad;

		a->records[i].n = pad;
		hole_link(a, i);
		i = record_take(a, from, n, a->records[i].above);
	}
	a->records[i].n = n;
	if (tail)
		hole_link(a, record_take(a, a->records[i].at + n, tail, a->records[i].above));
	a->records[i].used = 1;
	a->used += n;
	a->count++;
	*at = i;
	return 0;
}

/* Bytes to granules, rounded up. */
static uint64_t granules(const struct om_arena *a, uint64_t bytes)
{
	return (bytes >> a->shift) + ((bytes & ((UINT64_C(1) << a->shift) - 1)) != 0);
}

/* Checks a request, and looks for its hole within bounds: 0 with *ret NIL when none was found. */
static int seek(const struct om_arena *a, uint64_t size, uint64_t align, uint64_t *ret_n,
                uint64_t *ret_step, uint32_t *ret)
{
	uint64_t n = granules(a, size), step = align ? granules(a, align) : 1;

	if (!size)
		return om_err(OM_EVALUE, "arena: an allocation of 0 bytes");
	if (align & (align - 1))
		return om_err(OM_EVALUE, "arena: alignment %" PRIu64 " is not a power of two",
		              align);
	if (n > a->size - a->used)
		return -ENOSPC;
	if (step > a->size) /* only offset 0 is a multiple */
		step = UINT64_C(1) << (log2_of(a->size) + 1);
	*ret = find_hole(a, n, step);
	*ret_n = n;
	*ret_step = step;
	return 0;
}

int om_arena_alloc(struct om_arena *a, uint64_t size, uint64_t align, uint64_t *ret_offset)
{
	uint64_t n = 0, step = 1;
	uint32_t i = NIL;
	int code = seek(a, size, align, &n, &step, &i);

	if (code || !i)
		return code ? code : -ENOSPC;
	code = carve(a, &i, pad_of(&a->records[i], step), n);
	if (code)
		return code;
	bucket_link(a, i);
	*ret_offset = a->records[i].at << a->shift;
	return 0;
}

int om_arena_alloc_some(struct om_arena *a, uint64_t size, uint64_t *ret_offset, uint64_t *ret_size)
{
	uint64_t n = granules(a, size);
	uint32_t i = NIL;
	int code;

	if (!size)
		return om_err(OM_EVALUE, "arena: an allocation of 0 bytes");
	if (a->used == a->size)
		return -ENOSPC;
	if (n <= a->size - a->used)
		i = find_hole(a, n, 1);
	if (!i) {
		unsigned level = log2_of(a->bitmap), seen = 0;
		uint32_t k = a->levels[level].head[log2_of(a->levels[level].bitmap)];

		for (; k && seen < MAX_SCAN; k = a->records[k].next, seen++)
			if (!i || a->records[k].n > a->records[i].n)
				i = k;
	}
	n = OM_MIN(n, a->records[i].n);
	code = carve(a, &i, 0, n);
	if (code)
		return code;
	bucket_link(a, i);
	*ret_offset = a->records[i].at << a->shift;
	*ret_size = n << a->shift;
	return 0;
}

/* Turn an allocation into a hole, merged with those beside it; returns its record. */
static uint32_t release(struct om_arena *a, uint32_t i)
{
	struct record *r = &a->records[i];
	uint32_t other = r->above;

	a->used -= r->n;
	a->count--;
	if (other && !a->records[other].used) {
		hole_unlink(a, other);
		r->n += a->records[other].n;
		record_give(a, other);
	}
	other = r->below;
	if (other && !a->records[other].used) {
		hole_unlink(a, other);
		a->records[other].n += r->n;
		record_give(a, i);
		i = other;
	}
	hole_link(a, i);
	return i;
}

int om_arena_free(struct om_arena *a, uint64_t offset)
{
	uint64_t at = offset >> a->shift;
	uint32_t *link = bucket_find(a, at), i = *link;

	if (!i || at << a->shift != offset)
		return om_err(OM_EVALUE, "arena: nothing is allocated at offset %" PRIu64, offset);
	*link = a->records[i].next;
	release(a, i);
	return 0;
}

/* ---- by handle ---- */

/* Any hole for n granules among those that find_hole may have missed. */
static uint32_t find_missed(const struct om_arena *a, uint64_t n, uint64_t align)
{
	unsigned last = sure_class(n + align - 1);

	for (unsigned class = next_class(a, class_of(n)); class && class < last;
	     class = next_class(a, class + 1))
		for (uint32_t i = *class_head(a, class); i; i = a->records[i].next)
			if (a->records[i].n >= n + pad_of(&a->records[i], align))
				return i;
	return NIL;
}

int om_arena_take(struct om_arena *a, uint64_t size, uint64_t align, uint32_t owner,
                  uint32_t *ret_handle, uint64_t *ret_offset)
{
	uint64_t n = 0, step = 1;
	uint32_t i = NIL;
	int code = seek(a, size, align, &n, &step, &i);

	if (!code && om_unlikely(!i))
		i = find_missed(a, n, step);
	if (code || !i)
		return code ? code : -ENOSPC;
	code = carve(a, &i, pad_of(&a->records[i], step), n);
	if (code)
		return code;
	a->records[i].prev = owner;
	*ret_handle = i;
	*ret_offset = a->records[i].at << a->shift;
	return 0;
}

uint32_t om_arena_give(struct om_arena *a, uint32_t handle)
{
	return release(a, handle);
}

struct om_tile om_arena_tile(const struct om_arena *a, uint32_t handle)
{
	const struct record *r = &a->records[handle];

	return (struct om_tile){ .offset = r->at << a->shift,
		                 .bytes = (uint64_t)r->n << a->shift,
		                 .handle = handle,
		                 .owner = r->used ? r->prev : 0,
		                 .used = r->used };
}

struct om_tile om_arena_beside(const struct om_arena *a, uint32_t handle, bool above)
{
	const struct record *r = &a->records[handle];

	return om_arena_tile(a, above ? r->above : r->below);
}

uint32_t om_arena_next_hole(const struct om_arena *a, uint32_t handle, uint64_t least)
{
	unsigned class = handle ? class_of(a->records[handle].n) + 1
	                        : class_of(OM_MAX(granules(a, least), 1));

	if (handle && a->records[handle].next)
		return a->records[handle].next;
	class = next_class(a, class);
	return class ? *class_head(a, class) : NIL;
}

int om_arena_grow(struct om_arena *a, uint64_t size)
{
	uint64_t n = granules(a, size), more;
	uint32_t last = a->records[NIL].below;
	int code;

	if (n << a->shift != size || size > MAX_SIZE - 1 || n < a->size)
		return om_err(OM_EVALUE, "arena: cannot grow from %" PRIu64 " to %" PRIu64 " bytes",
		              om_arena_size(a), size);
	more = n - a->size;
	if (!more)
		return 0;
	code = levels_reserve(a, n);
	if (!code)
		code = records_reserve(a, 1);
	if (code)
		return code;
	if (last && !a->records[last].used) {
		hole_unlink(a, last);
		a->records[last].n += more;
	} else {
		last = record_take(a, a->size, more, NIL);
	}
	hole_link(a, last);
	a->size = n;
	return 0;
}

uint64_t om_arena_shrink(struct om_arena *a)
{
	uint32_t last = a->records[NIL].below;

	if (last && !a->records[last].used) {
		hole_unlink(a, last);
		a->size = a->records[last].at;
		record_give(a, last);
	}
	return om_arena_size(a);
}

uint64_t om_arena_size(const struct om_arena *a)
{
	return a->size << a->shift;
}

uint64_t om_arena_used(const struct om_arena *a)
{
	return a->used << a->shift;
}

uint64_t om_arena_largest_free(const struct om_arena *a)
{
	uint64_t best = 0;
	unsigned level;

	if (!a->bitmap)
		return 0;
	level = log2_of(a->bitmap);
	for (uint32_t i = a->levels[level].head[log2_of(a->levels[level].bitmap)]; i;
	     i = a->records[i].next)
		best = OM_MAX(best, a->records[i].n);
	return best << a->shift;
}

uint64_t om_arena_count(const struct om_arena *a)
{
	return a->count;
}
