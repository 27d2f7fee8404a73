/*
 * om_bank_inspect: what a bank tells: its numbers, its chunks, whether they agree, and which chunks could make
 * room. Reads only, under the bank's lock.
 *
 * Victims: the chunk used longest ago, then the older of the two chunks beside the hole that this gives,
 * until the hole fits. Beside one that is old lie old ones, since what was allocated together lies
 * together. A chunk with views ends the hole; where it ends on both sides, the next oldest begins another.
 */
#include <errno.h>
#include <inttypes.h>

#include "core/om_bank_int.h"

int om_bank_stats(struct om_bank *b, struct om_bank_stats *ret)
{
	uint64_t free_bytes, largest;
	int code = om_bank_enter(b);

	if (code)
		return code;
	free_bytes = b->limit_bytes > b->held_bytes ? b->limit_bytes - b->held_bytes : 0;
	largest = om_bank_largest_locked(b);
	*ret = (struct om_bank_stats){
		.limit_bytes = b->limit_bytes,
		.used_bytes = b->used_bytes,
		.peak_used_bytes = b->peak_used,
		.held_bytes = b->held_bytes,
		.peak_held_bytes = b->peak_held,
		.freed_bytes = b->freed_bytes,
		.exported_bytes = __atomic_load_n(&b->exported_bytes, __ATOMIC_RELAXED),
		.mapped_bytes = b->mapped_pages * OM_HUGE,
		.free_bytes = free_bytes,
		.largest_bytes = OM_MIN(largest, free_bytes),
		.fragmentation = om_bank_fragmentation_locked(b),
		.chunks = b->chunks,
		.allocs = b->allocs,
		.frees = b->frees,
		.fails = b->fails,
	};
	om_mutex_unlock(&b->lock);
	return 0;
}

void om_chunk_state(struct om_chunk *c, struct om_chunk_state *ret)
{
	*ret = (struct om_chunk_state){
		.data = c->data,
		.bytes = c->bytes,
		.held = om_chunk_held(c),
		.serial = c->serial,
		.created_ns = c->created_ns,
		.used_ns = c->used_ns,
		.uses = c->uses,
		.views = __atomic_load_n(&c->views, __ATOMIC_RELAXED),
		.label = c->label,
	};
}

int om_bank_find(struct om_bank *b, uint64_t serial, struct om_chunk **ret)
{
	int code = om_bank_enter(b);

	*ret = NULL;
	if (code)
		return code;
	for (uint32_t i = 0; i < b->slab_count * OM_BANK_SLAB && !*ret; i++) {
		struct om_chunk *c = om_bank_chunk(b, i);

		if (c->live && c->serial == serial)
			*ret = c;
	}
	om_mutex_unlock(&b->lock);
	return 0;
}

int om_bank_chunks(struct om_bank *b, struct om_chunk ***ret, size_t *ret_count)
{
	int code = om_bank_enter(b);

	*ret = NULL;
	*ret_count = 0;
	if (code)
		return code;
	*ret = om_alloc(b->chunks, sizeof(struct om_chunk *));
	if (*ret)
		OM_LIST_FOREACH(link, &b->live)
			(*ret)[(*ret_count)++] = om_chunk_of(link);
	om_mutex_unlock(&b->lock);
	return *ret ? 0 : -ENOMEM;
}

/* ---- victims ---- */

/* A hole that grows. */
struct growth {
	struct om_bank *bank;
	struct om_region *region;
	struct om_chunk **picks; /* what it takes */
	size_t count, room;
	uint64_t bytes, chunk_bytes, need;
	struct om_tile ends[2]; /* what lies below and above it; handle 0: the end */
};

static bool may_go(const struct om_chunk *c)
{
	return c->live && !__atomic_load_n(&c->views, __ATOMIC_RELAXED);
}

/* What lies behind a chunk on that side; a hole before it is added to the bytes. */
static struct om_tile next_chunk(struct growth *g, uint32_t handle, bool above)
{
	const struct om_arena *a = g->region->arena;
	struct om_tile t = om_arena_beside(a, handle, above);
	uint64_t left = g->region->reserved - om_arena_size(a);

	if (t.handle && !t.used) {
		g->bytes += t.bytes;
		t = om_arena_beside(a, t.handle, above);
	}
	if (!t.handle && above) /* what may be committed yet */
		g->bytes += OM_MIN(left, om_bank_room_locked(g->bank));
	return t;
}

static int pick(struct growth *g, struct om_chunk *c, bool above)
{
	if (g->count == g->room) {
		size_t room = g->room ? 2 * g->room : 64;
		struct om_chunk **picks = om_realloc(g->picks, room, sizeof(struct om_chunk *));

		if (!picks)
			return -ENOMEM;
		g->picks = picks;
		g->room = room;
	}
	g->ends[above] = next_chunk(g, c->handle, above);
	g->bytes += om_chunk_held(c);
	g->chunk_bytes += om_chunk_held(c);
	g->picks[g->count++] = c;
	return 0;
}

static struct om_chunk *candidate(const struct growth *g, bool above)
{
	struct om_chunk *c;

	if (!g->ends[above].handle)
		return NULL;
	c = om_bank_chunk(g->bank, g->ends[above].owner);
	return may_go(c) ? c : NULL;
}

static bool fits(const struct growth *g)
{
	return g->bytes >= g->need && g->bank->held_bytes - g->chunk_bytes + g->need <=
	                                      om_up(g->bank->limit_bytes, OM_BANK_GRANULE);
}

/* From one chunk: 1 when the hole fits, 0 when it cannot. */
static int grow_from(struct growth *g, struct om_chunk *seed)
{
	int code;

	g->region = g->bank->regions[seed->region];
	g->count = 0;
	g->bytes = g->chunk_bytes = 0;
	code = pick(g, seed, true);
	if (code)
		return code;
	g->ends[0] = next_chunk(g, seed->handle, false);
	while (!fits(g)) {
		struct om_chunk *below = candidate(g, false);
		struct om_chunk *above = candidate(g, true);
		bool up = above && (!below || above->used < below->used);

		if (!below && !above)
			return 0;
		code = pick(g, up ? above : below, up);
		if (code)
			return code;
	}
	return 1;
}

static int grow(struct growth *g)
{
	struct om_bank *b = g->bank;
	int code = 0;

	b->searches++;
	OM_LIST_FOREACH(link, &b->live) {
		struct om_chunk *seed = om_chunk_of(link);

		if (!may_go(seed) || seed->tried == b->searches)
			continue;
		code = grow_from(g, seed);
		if (code)
			break;
		for (size_t i = 0; i < g->count; i++) /* none of them leads any further */
			g->picks[i]->tried = b->searches;
	}
	return code;
}

static int answer(const struct growth *g, struct om_chunk ***ret, size_t *ret_count)
{
	struct om_chunk **list = om_alloc(g->count, sizeof(*list));

	if (!list)
		return -ENOMEM;
	for (size_t i = 0; i < g->count; i++) {
		size_t k = i;

		for (; k && list[k - 1]->used > g->picks[i]->used; k--)
			list[k] = list[k - 1];
		list[k] = g->picks[i];
	}
	*ret = list;
	*ret_count = g->count;
	return 0;
}

static int victims_locked(struct om_bank *b, uint64_t need, uint64_t align, struct om_chunk ***ret,
                          size_t *ret_count)
{
	struct growth g = { .bank = b, .need = need };
	int code;

	if (align > OM_BANK_GRANULE)
		g.need += align - OM_BANK_GRANULE;
	if (g.need <= om_bank_largest_locked(b))
		return 0;
	code = g.need > om_up(b->limit_bytes, OM_BANK_GRANULE) ? 0 : grow(&g);
	if (code == 1) {
		code = answer(&g, ret, ret_count);
	} else if (!code) {
		om_err(OM_ELIMIT,
		       "pool '%s': no blocks without views make room for %" PRIu64
		       " bytes in one piece: %" PRIu64 " of at most %" PRIu64
		       " are in use, %" PRIu64 " have views",
		       b->name, need, b->held_bytes, b->limit_bytes,
		       __atomic_load_n(&b->exported_bytes, __ATOMIC_RELAXED));
		om_err_limit(b->name, need, b->held_bytes, b->limit_bytes);
		code = OM_ELIMIT;
	}
	om_free(g.picks);
	return code;
}

int om_bank_victims(struct om_bank *b, uint64_t bytes, uint64_t align, struct om_chunk ***ret,
                    size_t *ret_count)
{
	int code = om_bank_enter(b);

	*ret = NULL;
	*ret_count = 0;
	if (code)
		return code;
	if (!bytes || align & (align - 1) || align > OM_BANK_MAX_ALIGN)
		code = om_err(OM_EVALUE, "pool '%s': %" PRIu64 " bytes, aligned to %" PRIu64,
		              b->name, bytes, align);
	else if (bytes <= UINT64_C(1) << 62)
		code = victims_locked(b, om_up(bytes, OM_BANK_GRANULE), align, ret, ret_count);
	else
		code = om_err(OM_EVALUE, "pool '%s': %" PRIu64 " bytes", b->name, bytes);
	om_mutex_unlock(&b->lock);
	return code;
}

/* ---- check ---- */

static int broken(const char *what, uint64_t is, uint64_t should_be)
{
	return om_err(OM_ECORRUPT, "bank: %s is %" PRIu64 ", not %" PRIu64, what, is, should_be);
}

/* Each allocation of the arena is a chunk's, and its pages count as handed out. */
static int check_region(const struct om_bank *b, unsigned number, uint64_t *chunks)
{
	const struct om_region *r = b->regions[number];
	struct om_tile t = om_arena_beside(r->arena, 0, true);
	int code = om_arena_check(r->arena);

	for (; !code && t.handle; t = om_arena_beside(r->arena, t.handle, true)) {
		const struct om_chunk *c = t.used ? om_bank_chunk(b, t.owner) : NULL;

		if (!c)
			continue;
		++*chunks;
		if (c->region != number || c->handle != t.handle || c->index != t.owner)
			return broken("the handle of a chunk", c->handle, t.handle);
		if (c->data != r->base + t.offset || om_chunk_held(c) != t.bytes)
			return broken("the size of a chunk", om_chunk_held(c), t.bytes);
		for (uint64_t i = t.offset / OM_HUGE; i <= (t.offset + t.bytes - 1) / OM_HUGE; i++)
			if (r->pages[i] != OM_PAGE_USED)
				return broken("the state of a page in use", r->pages[i],
				              OM_PAGE_USED);
	}
	return code;
}

/* Sums over chunks that are live, or freed under views. */
static int check_list(const struct om_list *list, bool live, uint64_t *ret_count,
                      uint64_t *ret_bytes, uint64_t *ret_held)
{
	uint64_t used = 0;

	OM_LIST_FOREACH(link, list) {
		const struct om_chunk *c = om_chunk_of(link);

		if (link->next->prev != link)
			return om_err(OM_ECORRUPT, "bank: a list is broken");
		if (c->live != live)
			return broken("live", c->live, live);
		if (live && c->used <= used)
			return broken("the order of use", c->used, used + 1);
		used = c->used;
		++*ret_count;
		*ret_bytes += c->bytes;
		*ret_held += om_chunk_held(c);
	}
	return 0;
}

static int check_locked(const struct om_bank *b)
{
	uint64_t live = 0, freed = 0, used = 0, held = 0, lost = 0, freed_held = 0, tiles = 0;
	uint64_t size = 0, taken = 0, pages = 0;
	int code = check_list(&b->live, true, &live, &used, &held);

	code = code ? code : check_list(&b->freed, false, &freed, &lost, &freed_held);
	for (unsigned i = 0; !code && i < b->region_count; i++) {
		const struct om_region *r = b->regions[i];

		code = check_region(b, i, &tiles);
		size += om_arena_size(r->arena);
		taken += om_arena_used(r->arena);
		for (uint64_t k = 0; k < r->reserved / OM_HUGE; k++)
			pages += r->pages[k] != OM_PAGE_NONE;
	}
	if (code)
		return code;
	if (live != b->chunks || live + freed != tiles || b->allocs - b->frees != live)
		return broken("number of chunks", live + freed, tiles);
	if (used != b->used_bytes || freed_held != b->freed_bytes)
		return broken("used", b->used_bytes, used);
	if (held + freed_held != b->held_bytes || taken != b->held_bytes)
		return broken("held", b->held_bytes, taken);
	if (size != b->committed || pages != b->mapped_pages)
		return broken("committed or mapped", b->committed, size);
	return 0;
}

int om_bank_check(struct om_bank *b)
{
	int code = om_bank_enter(b);

	if (code)
		return code;
	while (b->waiters && !b->closing) /* they are in the middle of something */
		om_cond_wait(&b->changed, &b->lock, om_deadline(OM_NSEC / 1000));
	code = b->closing ? om_err(OM_ECLOSED, "pool '%s' is closed", b->name) : check_locked(b);
	om_mutex_unlock(&b->lock);
	return code;
}
