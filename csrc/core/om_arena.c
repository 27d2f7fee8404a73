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
#include "core/om_arena.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/om_base.h"
#include "base/om_error.h"

#define NIL         0u
#define STEP_BITS   5
#define STEPS       (1u << STEP_BITS) /* classes a level */
#define MAX_SCAN    8                 /* holes looked at before the sure class */
#define MIN_RECORDS 16u
#define MAX_RECORDS (1u << 31)
#define MAX_SIZE    (UINT64_C(1) << 63) /* bytes; keeps every sum of two sizes in 64 bits */

struct record {
	uint64_t at;     /* first granule */
	uint64_t n : 63; /* granules; 0: the sentinel or an unused record */
	uint64_t used : 1;
	uint32_t below, above; /* neighbours by address, through the sentinel */
	uint32_t prev, next;   /* hole: its class; allocation: next in its bucket; unused: next */
};

struct level {
	uint32_t bitmap; /* classes that are not empty */
	uint32_t head[STEPS];
};

struct om_arena {
	unsigned shift;             /* log2 of the granule */
	uint64_t size, used, count; /* granules, granules, allocations */
	uint64_t bitmap;            /* levels that are not empty */
	struct level *levels;       /* as many as a hole of `size` needs */
	unsigned level_count;
	struct record *records;
	uint32_t *buckets;     /* record_count of them; by offset */
	uint32_t record_count; /* a power of two */
	uint32_t fresh;        /* records from here on were never used */
	uint32_t unused;       /* chain of records given back */
	uint32_t unused_count;
};

/* ---- size classes ---- */

static unsigned log2_of(uint64_t n)
{
	return 63 - (unsigned)__builtin_clzll(n);
}

/* The class that a hole of n > 0 granules belongs to. */
static unsigned class_of(uint64_t n)
{
	unsigned top;

	if (n < STEPS)
		return (unsigned)n;
	top = log2_of(n);
	return (top - STEP_BITS + 1) * STEPS + ((n >> (top - STEP_BITS)) & (STEPS - 1));
}

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

static uint32_t *class_head(const struct om_arena *a, unsigned class)
{
	return &a->levels[class / STEPS].head[class % STEPS];
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

static uint32_t *bucket_of(const struct om_arena *a, uint64_t at)
{
	uint64_t hash = at * UINT64_C(0x9e3779b97f4a7c15);

	return &a->buckets[(hash >> 32) & (a->record_count - 1)];
}

static void bucket_link(struct om_arena *a, uint32_t i)
{
	uint32_t *bucket = bucket_of(a, a->records[i].at);

	a->records[i].used = 1;
	a->records[i].next = *bucket;
	*bucket = i;
}

/* The link that points at the allocation at granule `at`, or at NIL. */
static uint32_t *bucket_find(const struct om_arena *a, uint64_t at)
{
	uint32_t *link = bucket_of(a, at);

	while (*link && a->records[*link].at != at)
		link = &a->records[*link].next;
	return link;
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
	buckets = om_alloc(count, sizeof(*buckets));
	if (!buckets)
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
	for (uint32_t i = 1; i < a->fresh; i++)
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

int om_arena_create(uint64_t size, uint64_t granule, struct om_arena **ret)
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
	unsigned class = next_class(a, class_of(n)), seen = 0;
	uint32_t best = NIL;

	for (; class && !best && seen < MAX_SCAN; class = next_class(a, class + 1)) {
		uint32_t i = *class_head(a, class);

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

/* Turn [pad, pad + n) of hole i into an allocation. */
static int carve(struct om_arena *a, uint32_t i, uint64_t pad, uint64_t n, uint64_t *ret_offset)
{
	uint64_t tail = a->records[i].n - pad - n;
	int code = records_reserve(a, (pad > 0) + (tail > 0));

	if (code)
		return code;
	hole_unlink(a, i);
	if (pad) {
		uint64_t at = a->records[i].at + pad;

		a->records[i].n = pad;
		hole_link(a, i);
		i = record_take(a, at, n, a->records[i].above);
	}
	a->records[i].n = n;
	if (tail)
		hole_link(a, record_take(a, a->records[i].at + n, tail, a->records[i].above));
	bucket_link(a, i);
	a->used += n;
	a->count++;
	*ret_offset = a->records[i].at << a->shift;
	return 0;
}

/* Bytes to granules, rounded up. */
static uint64_t granules(const struct om_arena *a, uint64_t bytes)
{
	return (bytes >> a->shift) + ((bytes & ((UINT64_C(1) << a->shift) - 1)) != 0);
}

int om_arena_alloc(struct om_arena *a, uint64_t size, uint64_t align, uint64_t *ret_offset)
{
	uint64_t n = granules(a, size), step = align ? granules(a, align) : 1;
	uint32_t i;

	if (!size)
		return om_err(OM_EVALUE, "arena: an allocation of 0 bytes");
	if (align & (align - 1))
		return om_err(OM_EVALUE, "arena: alignment %" PRIu64 " is not a power of two",
		              align);
	if (n > a->size - a->used)
		return -ENOSPC;
	if (step > a->size) /* only offset 0 is a multiple */
		step = UINT64_C(1) << (log2_of(a->size) + 1);
	i = find_hole(a, n, step);
	return i ? carve(a, i, pad_of(&a->records[i], step), n, ret_offset) : -ENOSPC;
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
	code = carve(a, i, 0, n, ret_offset);
	if (!code)
		*ret_size = n << a->shift;
	return code;
}

int om_arena_free(struct om_arena *a, uint64_t offset)
{
	uint64_t at = offset >> a->shift;
	uint32_t *link = bucket_find(a, at), i = *link, other;
	struct record *r = &a->records[i];

	if (!i || at << a->shift != offset)
		return om_err(OM_EVALUE, "arena: nothing is allocated at offset %" PRIu64, offset);
	*link = r->next;
	a->used -= r->n;
	a->count--;
	other = r->above;
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
	return 0;
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

/* ---- check ---- */

static int broken(const char *what, uint64_t where)
{
	return om_err(OM_ECORRUPT, "arena: %s (%" PRIu64 ")", what, where);
}

/* The tiles, in order. */
static int check_tiles(const struct om_arena *a, uint64_t *ret_holes)
{
	uint64_t at = 0, used = 0, count = 0, holes = 0;
	uint32_t below = NIL;
	bool was_hole = false;

	for (uint32_t i = a->records[NIL].above; i; below = i, i = a->records[i].above) {
		const struct record *r = &a->records[i];

		if (i >= a->fresh || r->below != below || r->at != at || !r->n)
			return broken("records do not tile the space at granule", at);
		if (!r->used && was_hole)
			return broken("two holes touch at granule", at);
		if (r->used && *bucket_find(a, at) != i)
			return broken("an allocation is not found by its offset, granule", at);
		was_hole = !r->used;
		at += r->n;
		used += r->used ? r->n : 0;
		count += r->used;
		holes += !r->used;
	}
	if (at != a->size || below != a->records[NIL].below)
		return broken("records end at granule", at);
	if (used != a->used || count != a->count)
		return broken("used granules or allocations are not", used);
	*ret_holes = holes;
	return 0;
}

/* The class lists hold exactly the holes, and the bit maps agree. */
static int check_classes(const struct om_arena *a, uint64_t holes)
{
	uint64_t seen = 0;

	for (unsigned class = 0; class < a->level_count * STEPS; class ++) {
		const struct level *level = &a->levels[class / STEPS];
		uint32_t prev = NIL, i = *class_head(a, class);

		if ((i != NIL) != (level->bitmap >> (class % STEPS) & 1))
			return broken("a class's bit is wrong, class", class);
		if ((level->bitmap != 0) != (a->bitmap >> (class / STEPS) & 1))
			return broken("a level's bit is wrong, class", class);
		for (; i; prev = i, i = a->records[i].next) {
			const struct record *r = &a->records[i];

			if (r->used || !r->n || r->prev != prev || class_of(r->n) != class)
				return broken("a hole is in the wrong list, class", class);
			if (++seen > holes)
				return broken("the lists hold more holes than there are,", holes);
		}
	}
	return seen == holes ? 0 : broken("holes in no list:", holes - seen);
}

int om_arena_check(const struct om_arena *a)
{
	uint64_t holes = 0, chained = 0, unused = 0;
	int code = check_tiles(a, &holes);

	if (!code)
		code = check_classes(a, holes);
	if (code)
		return code;
	for (uint32_t b = 0; b < a->record_count; b++)
		for (uint32_t i = a->buckets[b]; i && chained <= a->count; i = a->records[i].next)
			chained++;
	if (chained != a->count)
		return broken("allocations found by offset:", chained);
	for (uint32_t i = a->unused; i && unused <= a->unused_count; i = a->records[i].next)
		unused++;
	if (unused != a->unused_count || a->fresh != 1 + a->count + holes + unused)
		return broken("records given back:", unused);
	return 0;
}
