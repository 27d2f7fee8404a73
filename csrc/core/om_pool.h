/*
 * om_pool: host memory as a growable set of segments.
 *
 * A request above OM_POOL_SMALL gets a segment of its own; smaller ones share 2 MiB segments, each
 * with an arena (granule OM_PAGE). A segment whose last extent is freed stays mapped and populated
 * in a cache (so that a ring of equal units never faults a page again) until the limit, a trim or
 * the decay takes it back. Everything mapped counts in the limit, cached segments too: a limit is
 * bytes that really exist. Passive: the caller holds the store lock. Segments are reference
 * counted (atomic), since an exported view may outlive the pool: the last unref unmaps.
 */
#ifndef OM_POOL_H
#define OM_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/om_list.h"
#include "core/om_arena.h"

#define OM_POOL_SMALL  (UINT64_C(256) << 10)
#define OM_POOL_SHARED (UINT64_C(2) << 20)
#define OM_POOL_WARM   (UINT64_C(16) << 20) /* may stay populated when the rest goes back */

struct om_segment {
	struct om_list link; /* pool's live (dedicated or shared) or cached list */
	void *base;
	uint64_t bytes;     /* mapped */
	uint64_t populated; /* atomic: pages of [0, populated) are faulted in */
	bool populating;    /* the mover's: a job that faults in the rest is queued */
	uint64_t
		fresh_bytes; /* mapped anew and not filled yet: they may be in no reading of om_guard */
	struct om_arena *arena; /* shared segments; NULL when dedicated */
	uint64_t used;          /* bytes of extents handed out */
	uint64_t freed_ns;      /* cached: since when */
	unsigned refs; /* atomic: 1 of the pool (live or cached) + one an extent's export */
};

struct om_extent { /* bytes of host memory: a whole number of pages, page aligned */
	struct om_segment *segment; /* NULL: none */
	void *ptr;
	uint64_t bytes; /* what it takes from the limit: >= the bytes asked for */
};

struct om_pool {
	uint64_t limit_bytes;  /* change it with om_pool_set_limit */
	uint64_t used_bytes;   /* sum of extents handed out */
	uint64_t mapped_bytes; /* sum of segments, cached ones included */
	uint64_t cached_bytes; /* of these, the cached ones */
	struct om_list shared, dedicated,
		cached; /* shared: full ones last; cached: longest idle first */
};

void om_pool_init(struct om_pool *p, uint64_t limit_bytes);
/* Lowered: cached segments go, longest idle first, until mapped <= limit or only live ones are
 * left (the caller evicts those). At all times mapped <= limit, or nothing is cached. */
void om_pool_set_limit(struct om_pool *p, uint64_t limit_bytes);
/* Cached and empty segments go; segments with live extents are left to their exports. */
void om_pool_fini(struct om_pool *p);
/* Bytes (rounded up to pages). `most` 0: a small request takes a hole in a shared segment, else a
 * new shared segment; where the limit has no room for that, and for a large request, a segment of its own.
 * With `most` > 0 it is always a segment of its own, which may be that large.
 * A segment comes from, in this order: the smallest cached one of at most 1.25x the size (`most` > 0: of at most
 * `most`) (a shared segment: of exactly its size), taken whole; one that is built of pieces of cached ones, longest
 * idle first, and of new pages where they do not suffice. Memory that comes from the cache keeps its populated
 * pages, wherever it moves. Nothing is mapped beside what is cached: cached bytes that cannot be used go.
 * OM_ELIMIT (with details) when mapped - cached + size > limit; -ENOMEM when the system refuses
 * and nothing cached is left to give back; OM_EVALUE for 0 bytes. */
int om_pool_alloc(struct om_pool *p, uint64_t bytes, uint64_t most, struct om_extent *ret);
/* e->segment becomes NULL; a NULL one is fine. The caller has seen the extent's exports end. A
 * segment that turns empty is cached, or unmapped while mapped > limit; if someone still holds a reference to it, it is not used
 * again and leaves the pool, and the last unref unmaps it. */
/* An extent may be cut into parts of whole pages, each freed on its own. */
void om_pool_free(struct om_pool *p, struct om_extent *e);
/* Give the end of an extent back that has a segment for itself: `bytes` of it stay, rounded up to pages. */
void om_pool_cut(struct om_pool *p, struct om_extent *e, uint64_t bytes);
/* Bytes of the limit that no live segment takes. */
uint64_t om_pool_room(const struct om_pool *p);
/* Could om_pool_alloc succeed now, as far as the limit goes? */
bool om_pool_fits(const struct om_pool *p, uint64_t bytes);
/* Bytes by which a request of `bytes` would have what is mapped grow. */
uint64_t om_pool_growth(const struct om_pool *p, uint64_t bytes);
/* The extent's bytes are there. */
void om_pool_filled(struct om_extent *e);
/* Unmap cached segments, longest idle first, until at most `reserve_bytes` of them are left, or only such as were
 * freed at `freed_before_ns` (UINT64_MAX: never) or later. Returns the bytes given back. */
uint64_t om_pool_trim(struct om_pool *p, uint64_t reserve_bytes, uint64_t freed_before_ns);
/* Since when the cached segment that is idle longest is; UINT64_MAX: there is none. */
uint64_t om_pool_oldest(const struct om_pool *p);
int om_pool_check(const struct om_pool *p); /* OM_ECORRUPT with the first broken sum */

void om_segment_ref(struct om_segment *s);
void om_segment_unref(struct om_segment *s); /* any thread, no lock: the last one unmaps */

#endif
