/*
 * om_bank_pages: a bank's addresses and the memory behind them.
 *
 * A region's addresses reach beyond the limit, so that a higher one mostly finds them in the same piece: one range
 * without borders wastes least (random sizes up to 64 MiB fill 2 GiB in one piece to 87 %, in pieces of 256 MiB
 * to 84 %). What is committed, step by step, is what the system counts as promised or as locked.
 *
 * Memory goes back 2 MiB at a time: pages that lie in a hole are USED at first, AGED at the next look, and given
 * back at the one after. That is done without the lock (LEAVING), by one thread at a time.
 */
#include "core/om_bank_int.h"

#include <errno.h>
#include <string.h>

#include "plat/om_dev.h"

#define MAX_REGION (UINT64_C(1) << 40)
#define SPARE      3 /* times the limit, in addresses, for a higher one */
#define MAX_SPARE  (UINT64_C(64) * OM_GIB)
#define MIN_STEP   (UINT64_C(32) * OM_MIB) /* what is committed at once; it doubles */
#define MAX_STEP   (UINT64_C(256) * OM_MIB)
#define BATCH      64

void om_region_unref(struct om_region *r)
{
	if (__atomic_sub_fetch(&r->refs, 1, __ATOMIC_ACQ_REL))
		return;
	om_host_unmap(r->base, r->reserved);
	om_arena_destroy(r->arena);
	om_free(r->pages);
	om_free(r);
}

/* ---- growing ---- */

/* Addresses for `most` bytes, or as much of it as the system gives, but no less than `least`. */
static int reserve(uint64_t least, uint64_t most, char **ret, uint64_t *ret_bytes)
{
	void *p = NULL;
	int code;

	do {
		code = om_host_reserve(most, &p);
		*ret_bytes = most;
		most = OM_MAX(om_up(most / 2, OM_HUGE), least);
	} while (code == -ENOMEM && most < *ret_bytes);
	*ret = p;
	return code;
}

/* An empty region on the list. */
static int region_add(struct om_bank *b, uint64_t least, uint64_t most)
{
	struct om_region *r;
	int code;

	if (b->region_count == OM_BANK_REGIONS)
		return -ENOSPC;
	r = om_alloc(1, sizeof(*r));
	if (!r)
		return -ENOMEM;
	r->refs = 1;
	code = reserve(om_up(least, OM_HUGE), OM_MIN(om_up(most, OM_HUGE), MAX_REGION), &r->base,
	               &r->reserved);
	if (!code)
		code = om_arena_create_by_handle(0, OM_BANK_GRANULE, &r->arena);
	if (!code && !(r->pages = om_alloc(r->reserved / OM_HUGE, 1)))
		code = -ENOMEM;
	if (code) {
		om_region_unref(r);
		return code;
	}
	b->regions[b->region_count++] = r;
	return 0;
}

/* Bytes of the free range at the end of what is committed. */
static uint64_t tail_of(const struct om_region *r)
{
	struct om_tile last = om_arena_beside(r->arena, 0, false);

	return last.handle && !last.used ? last.bytes : 0;
}

static int commit_pages(const struct om_bank *b, char *p, uint64_t bytes)
{
	int code = om_host_commit(p, bytes);

	return !code && b->locked ? om_host_lock(p, bytes) : code;
}

/* Commit `bytes` more, or `least` where the system allows no more. */
static int commit(struct om_bank *b, struct om_region *r, uint64_t least, uint64_t bytes)
{
	uint64_t size = om_arena_size(r->arena);
	int code = commit_pages(b, r->base + size, bytes);

	if ((code == OM_ELIMIT || code == -ENOMEM) && bytes > least) {
		bytes = least;
		code = commit_pages(b, r->base + size, bytes);
	}
	if (code)
		return code;
	code = om_arena_grow(r->arena, size + bytes);
	if (code && b->locked)
		om_host_unlock(r->base + size, bytes);
	if (!code)
		b->committed += bytes;
	return code;
}

uint64_t om_bank_room_locked(const struct om_bank *b)
{
	uint64_t limit = om_up(b->limit_bytes, OM_PAGE);

	return limit > b->committed ? limit - b->committed : 0;
}

/* How much of a region to commit so that its tail has `bytes`; 0: it cannot. */
static uint64_t wanted(const struct om_bank *b, const struct om_region *r, uint64_t bytes,
                       uint64_t *ret_least)
{
	uint64_t left = OM_MIN(r->reserved - om_arena_size(r->arena), om_bank_room_locked(b));
	uint64_t tail = tail_of(r), least = bytes > tail ? om_up(bytes - tail, OM_PAGE) : OM_PAGE;
	uint64_t step = OM_MIN(OM_MAX(om_down(b->committed, OM_HUGE), MIN_STEP), MAX_STEP);

	if (least > left)
		return 0;
	*ret_least = least;
	return OM_MIN(OM_MAX(step, least), left);
}

static uint64_t spare_of(uint64_t bytes)
{
	return om_host_addresses_scarce() ? 0 : OM_MIN(bytes, MAX_SPARE / SPARE) * SPARE;
}

int om_bank_grow_locked(struct om_bank *b, uint64_t bytes, uint64_t align)
{
	uint64_t room = om_bank_room_locked(b), least, more;
	int code;

	if (align > OM_BANK_GRANULE && om_add_overflows(bytes, align, &bytes))
		return -ENOSPC;
	for (unsigned i = 0; i < b->region_count; i++) {
		more = wanted(b, b->regions[i], bytes, &least);
		if (more)
			return commit(b, b->regions[i], least, more);
	}
	if (align > OM_BANK_GRANULE)
		bytes -= align; /* a region begins at a multiple of any alignment */
	if (bytes > room || bytes > MAX_REGION)
		return -ENOSPC;
	code = region_add(b, bytes, room + spare_of(room));
	if (code)
		return code;
	more = wanted(b, b->regions[b->region_count - 1], bytes, &least);
	code = more ? commit(b, b->regions[b->region_count - 1], least, more) : -ENOSPC;
	if (code)
		om_region_unref(b->regions[--b->region_count]);
	return code;
}

/* ---- the state of pages ---- */

void om_bank_touch_locked(struct om_bank *b, struct om_region *r, uint64_t offset, uint64_t bytes)
{
	uint64_t last = (offset + bytes - 1) / OM_HUGE;

	for (uint64_t i = offset / OM_HUGE; i <= last; i++) {
		if (om_likely(r->pages[i] == OM_PAGE_USED))
			continue;
		while (r->pages[i] == OM_PAGE_LEAVING)
			om_bank_wait_locked(b);
		b->mapped_pages += r->pages[i] == OM_PAGE_NONE;
		r->pages[i] = OM_PAGE_USED;
	}
}

void om_bank_freed_locked(struct om_bank *b, struct om_region *r, uint32_t hole)
{
	if (om_arena_tile(r->arena, hole).bytes < OM_HUGE || b->pressing)
		return;
	if (!b->decay_ns || b->mapped_pages * OM_HUGE > om_up(b->limit_bytes, OM_HUGE) ||
	    (b->most_fragmented < 1 && om_bank_fragmentation_locked(b) > b->most_fragmented))
		__atomic_store_n(&b->pressing, true, __ATOMIC_RELAXED);
	else if (!b->look_ns)
		__atomic_store_n(&b->look_ns, om_now_coarse() + b->decay_ns / 2, __ATOMIC_RELAXED);
}

struct range {
	struct om_region *region;
	uint64_t page, count;
};

static bool may_leave(uint8_t state, bool all)
{
	return state == OM_PAGE_AGED || (all && state == OM_PAGE_USED);
}

/* Whole pages [*first, *end) of a hole. */
static void whole_pages(struct om_tile hole, uint64_t *first, uint64_t *end)
{
	*first = (hole.offset + OM_HUGE - 1) / OM_HUGE;
	*end = (hole.offset + hole.bytes) / OM_HUGE;
}

/* Free pages that may go, now LEAVING, as runs; returns how many runs, at most BATCH. */
static unsigned collect(struct om_bank *b, bool all, struct range *ret)
{
	unsigned n = 0;

	for (unsigned k = 0; k < b->region_count; k++) {
		struct om_region *r = b->regions[k];
		uint32_t h = 0;

		while ((h = om_arena_next_hole(r->arena, h, OM_HUGE)) != 0) {
			uint64_t i, end;

			whole_pages(om_arena_tile(r->arena, h), &i, &end);
			while (i < end) {
				uint64_t from = i;

				while (i < end && may_leave(r->pages[i], all))
					r->pages[i++] = OM_PAGE_LEAVING;
				if (i > from)
					ret[n++] = (struct range){ r, from, i - from };
				if (n == BATCH)
					return n;
				i += i == from;
			}
		}
	}
	return n;
}

static bool discard(const struct om_bank *b, const struct range *g)
{
	char *p = g->region->base + g->page * OM_HUGE;

	if (b->locked)
		return om_host_discard_locked(p, g->count * OM_HUGE);
	om_host_discard(p, g->count * OM_HUGE);
	return true;
}

/* Give back what may go; returns the pages. Gives the lock up. */
static uint64_t give_back_locked(struct om_bank *b, bool all)
{
	struct range ranges[BATCH];
	uint64_t pages = 0;
	unsigned n;

	while ((n = collect(b, all, ranges)) != 0) {
		bool gone = true;

		om_mutex_unlock(&b->lock);
		for (unsigned i = 0; i < n; i++)
			gone = discard(b, &ranges[i]) && gone;
		om_mutex_lock(&b->lock);
		for (unsigned i = 0; i < n; i++) {
			memset(ranges[i].region->pages + ranges[i].page,
			       gone ? OM_PAGE_NONE : OM_PAGE_USED, ranges[i].count);
			pages += gone ? ranges[i].count : 0;
			b->mapped_pages -= gone ? ranges[i].count : 0;
		}
		om_cond_broadcast(&b->changed);
		if (!gone)
			break;
	}
	return pages;
}

/* What is free now is AGED; true when there is any such page. */
static bool age_locked(struct om_bank *b)
{
	bool any = false;

	for (unsigned k = 0; k < b->region_count; k++) {
		struct om_region *r = b->regions[k];
		uint32_t h = 0;

		while ((h = om_arena_next_hole(r->arena, h, OM_HUGE)) != 0) {
			uint64_t i, end;

			for (whole_pages(om_arena_tile(r->arena, h), &i, &end); i < end; i++) {
				if (r->pages[i] == OM_PAGE_USED)
					r->pages[i] = OM_PAGE_AGED;
				any = any || r->pages[i] == OM_PAGE_AGED;
			}
		}
	}
	return any;
}

/* Free ends of a locked bank are unlocked, so that others may lock as much. */
static void uncommit_locked(struct om_bank *b)
{
	for (unsigned k = 0; b->locked && k < b->region_count; k++) {
		struct om_region *r = b->regions[k];
		uint64_t size = om_arena_size(r->arena);
		uint64_t keep = om_up(size - tail_of(r), OM_HUGE);

		if (keep >= size)
			continue;
		om_arena_shrink(r->arena);
		if (om_arena_grow(r->arena, keep)) /* no memory for a record: keep less */
			keep = om_arena_size(r->arena);
		b->committed -= size - keep;
		keep = om_up(keep, OM_HUGE);
		size = om_up(size, OM_HUGE);
		om_host_unlock(r->base + keep, size - keep);
		om_host_discard(r->base + keep, size - keep);
		for (uint64_t i = keep / OM_HUGE; i < size / OM_HUGE; i++) {
			b->mapped_pages -= r->pages[i] != OM_PAGE_NONE;
			r->pages[i] = OM_PAGE_NONE;
		}
	}
}

bool om_bank_due(const struct om_bank *b)
{
	uint64_t look_ns = __atomic_load_n(&b->look_ns, __ATOMIC_RELAXED);

	return __atomic_load_n(&b->pressing, __ATOMIC_RELAXED) ||
	       (look_ns && om_now_coarse() >= look_ns);
}

int om_bank_decay(struct om_bank *b)
{
	int code = om_bank_enter(b);
	bool all;

	if (code)
		return code;
	if (!b->leaving && om_bank_due(b)) {
		all = b->pressing;
		__atomic_store_n(&b->pressing, false, __ATOMIC_RELAXED);
		b->leaving = true;
		give_back_locked(b, all);
		b->leaving = false;
		__atomic_store_n(&b->look_ns, age_locked(b) ? om_now_coarse() + b->decay_ns / 2 : 0,
		                 __ATOMIC_RELAXED);
		om_cond_broadcast(&b->changed);
	}
	om_mutex_unlock(&b->lock);
	return 0;
}

int om_bank_trim(struct om_bank *b, uint64_t *ret_bytes)
{
	int code = om_bank_enter(b);

	*ret_bytes = 0;
	if (code)
		return code;
	while (b->leaving)
		om_bank_wait_locked(b);
	b->leaving = true;
	*ret_bytes = give_back_locked(b, true) * OM_HUGE;
	uncommit_locked(b);
	b->leaving = false;
	om_cond_broadcast(&b->changed);
	om_mutex_unlock(&b->lock);
	return 0;
}
