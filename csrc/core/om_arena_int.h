/*
 * om_arena_int: an arena from the inside, for om_arena.c and om_arena_check.c.
 */
#ifndef OM_ARENA_INT_H
#define OM_ARENA_INT_H

#include "core/om_arena.h"

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
	/* A hole: its class. An allocation: its owner; next in its bucket. Unused: next. */
	uint32_t prev, next;
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
	uint32_t *buckets; /* record_count of them, by offset; NULL: allocations go by handle */
	bool by_handle;
	uint32_t record_count; /* a power of two */
	uint32_t fresh;        /* records from here on were never used */
	uint32_t unused;       /* chain of records given back */
	uint32_t unused_count;
};

static inline unsigned log2_of(uint64_t n)
{
	return 63 - (unsigned)__builtin_clzll(n);
}

/* The class that a hole of n > 0 granules belongs to. */
static inline unsigned class_of(uint64_t n)
{
	unsigned top;

	if (n < STEPS)
		return (unsigned)n;
	top = log2_of(n);
	return (top - STEP_BITS + 1) * STEPS + ((n >> (top - STEP_BITS)) & (STEPS - 1));
}

static inline uint32_t *class_head(const struct om_arena *a, unsigned class)
{
	return &a->levels[class / STEPS].head[class % STEPS];
}

static inline uint32_t *bucket_of(const struct om_arena *a, uint64_t at)
{
	uint64_t hash = at * UINT64_C(0x9e3779b97f4a7c15);

	return &a->buckets[(hash >> 32) & (a->record_count - 1)];
}

/* The link that points at the allocation at granule `at`, or at NIL. */
static inline uint32_t *bucket_find(const struct om_arena *a, uint64_t at)
{
	uint32_t *link = bucket_of(a, at);

	while (*link && a->records[*link].at != at)
		link = &a->records[*link].next;
	return link;
}

#endif
