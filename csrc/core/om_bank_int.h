/*
 * om_bank_int: a bank from the inside, for om_bank*.c.
 *
 * A region is a range of addresses with an arena over its first bytes (`committed`: the arena's size); for
 * each 2 MiB of it there is a state. Chunks are records in slabs that never move; the arena knows a
 * chunk by its number.
 */
#ifndef OM_BANK_INT_H
#define OM_BANK_INT_H

#include "base/om_list.h"
#include "base/om_sync.h"
#include "core/om_arena.h"
#include "omnimem.h"

#define OM_BANK_SLAB    256u /* chunks */
#define OM_BANK_REGIONS 64u

enum om_page_state {
	OM_PAGE_NONE,    /* no memory behind it, as far as we know */
	OM_PAGE_USED,    /* handed out since the last look, or in use */
	OM_PAGE_AGED,    /* free at the last look */
	OM_PAGE_LEAVING, /* being given back, without the lock: who gets it waits */
};

struct om_region {
	char *base;
	uint64_t reserved;      /* addresses */
	struct om_arena *arena; /* by handle */
	uint8_t *pages;         /* enum om_page_state of each OM_HUGE */
	uint64_t refs;          /* atomic: 1 of the bank; closed: 1 a chunk with views */
};

struct om_chunk {            /* two cache lines long */
	struct om_list link; /* of the bank's `live` or `freed` */
	struct om_bank *bank;
	char *data;
	uint64_t bytes, serial, used; /* used: the bank's `uses` at the last one */
	uint64_t created_ns, used_ns;
	uint32_t uses;
	uint32_t tried; /* the bank's `searches` when a search for victims came by in vain */
	uint32_t index, handle; /* own number; of the region's arena */
	uint32_t holds, views;  /* atomic: 1 while live, and the views; the views */
	uint16_t region;
	bool live;             /* not freed */
	struct om_chunk *next; /* in `dropped` or `unused` */
	char *label;
	void *face;
};

struct om_bank {
	struct om_mutex lock;
	struct om_cond changed; /* pages have left */
	char *name;
	unsigned fork_generation;
	bool locked, closing;
	bool closed;              /* atomic: whoever drops a view frees by himself */
	uint64_t refs;            /* atomic */
	struct om_chunk *dropped; /* atomic: whose last hold went */
	uint64_t exported_bytes;  /* atomic */
	uint64_t limit_bytes, decay_ns;
	double most_fragmented;

	struct om_region *regions[OM_BANK_REGIONS];
	unsigned region_count;
	uint64_t committed, mapped_pages;
	unsigned waiters; /* inside, until pages have left */
	bool leaving;     /* one thread gives pages back */
	bool pressing;    /* atomic: at once */
	uint64_t
		look_ns; /* atomic: when the next look at free pages is due; 0: nothing to look at */

	struct om_list live, freed; /* by last use; freed under a view */
	struct om_chunk **slabs;
	uint32_t slab_count, slab_room;
	struct om_chunk *unused;
	uint64_t uses;
	uint32_t searches;
	uint64_t used_bytes, held_bytes, freed_bytes, peak_used, peak_held;
	uint64_t chunks, allocs, frees, fails;
};

static inline struct om_chunk *om_chunk_of(struct om_list *link)
{
	return om_container_of(link, struct om_chunk, link);
}
static inline struct om_chunk *om_bank_chunk(const struct om_bank *b, uint32_t index)
{
	return &b->slabs[index / OM_BANK_SLAB][index % OM_BANK_SLAB];
}
static inline uint64_t om_chunk_held(const struct om_chunk *c)
{
	return om_up(c->bytes, OM_BANK_GRANULE);
}

/* What chunks may hold yet. The limit counts as whole granules, so that one chunk can have all of it. */
static inline uint64_t om_bank_left(const struct om_bank *b)
{
	uint64_t limit = om_up(b->limit_bytes, OM_BANK_GRANULE);

	return limit > b->held_bytes ? limit - b->held_bytes : 0;
}

/* Into a function of the bank: with the lock, or OM_ECLOSED. */
int om_bank_enter(struct om_bank *b);
/* Until some pages have left. Gives the lock up. */
void om_bank_wait_locked(struct om_bank *b);
/* What the limit still allows to commit. */
uint64_t om_bank_room_locked(const struct om_bank *b);
uint64_t om_bank_largest_locked(const struct om_bank *b);
double om_bank_fragmentation_locked(const struct om_bank *b);

/* ---- om_bank_pages.c: addresses, and the memory behind them ---- */

/* More room for a hole of `bytes`: commits more of the last region or makes another. -ENOSPC (no message): the
 * limit has no room for that. */
int om_bank_grow_locked(struct om_bank *b, uint64_t bytes, uint64_t align);
/* A range is handed out. May give the lock up while its pages are leaving. */
void om_bank_touch_locked(struct om_bank *b, struct om_region *r, uint64_t offset, uint64_t bytes);
/* A hole has grown: does something have to go at once? When is the next look due? */
void om_bank_freed_locked(struct om_bank *b, struct om_region *r, uint32_t hole);
void om_region_unref(struct om_region *r);

#endif
