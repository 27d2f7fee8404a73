/*
 * om_bank: memory without names, cut into chunks: the pools' side of the core.
 *
 * Owns its regions, the records of its chunks, and one lock (never taken with a store's). No thread: what should
 * happen later happens when somebody calls (om_bank_due, om_bank_decay).
 *
 * A chunk's memory has holds: one while it is not freed, one a view. Whoever drops the last one, on any thread
 * and without the lock, pushes the chunk to `dropped`; the next one with the lock takes it from there. Of a
 * closed bank nobody has the lock any more: the pusher drops the region's reference himself, and the last one
 * unmaps. Every view holds a reference to the bank's own memory.
 *
 * A call that fails has changed nothing, but that free pages may have gone back to the system.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "core/om_bank_int.h"

/* ---- in and out ---- */

static int recycle_locked(struct om_bank *b, struct om_chunk *c)
{
	struct om_region *r = b->regions[c->region];
	uint32_t hole = om_arena_give(r->arena, c->handle);

	b->held_bytes -= om_chunk_held(c);
	c->next = b->unused;
	b->unused = c;
	om_bank_freed_locked(b, r, hole);
	return 0;
}

static struct om_chunk *take_dropped(struct om_bank *b)
{
	if (om_likely(!__atomic_load_n(&b->dropped, __ATOMIC_RELAXED)))
		return NULL;
	return __atomic_exchange_n(&b->dropped, NULL, __ATOMIC_ACQ_REL);
}

static void drain_locked(struct om_bank *b)
{
	struct om_chunk *c = take_dropped(b);

	while (c) {
		struct om_chunk *next = c->next;

		om_list_del(&c->link);
		b->freed_bytes -= om_chunk_held(c);
		recycle_locked(b, c);
		c = next;
	}
}

static void drain_closed(struct om_bank *b)
{
	struct om_chunk *c = take_dropped(b);

	while (c) {
		struct om_chunk *next = c->next;

		om_region_unref(b->regions[c->region]);
		c = next;
	}
}

int om_bank_enter(struct om_bank *b)
{
	if (b->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED,
		              "pool '%s' belongs to the process that forked this one; create a new "
		              "one here",
		              b->name);
	om_mutex_lock(&b->lock);
	if (b->closing) {
		om_mutex_unlock(&b->lock);
		return om_err(OM_ECLOSED, "pool '%s' is closed", b->name);
	}
	drain_locked(b);
	return 0;
}

static int leave(struct om_bank *b, int code)
{
	om_mutex_unlock(&b->lock);
	return code;
}

void om_bank_wait_locked(struct om_bank *b)
{
	b->waiters++;
	om_cond_wait(&b->changed, &b->lock, UINT64_MAX);
	b->waiters--;
	if (b->closing)
		om_cond_broadcast(&b->changed);
}

/* ---- life ---- */

int om_bank_create(const struct om_bank_config *config, struct om_bank **ret)
{
	struct om_bank *b;
	int code;

	if (config->most_fragmented < 0 || config->most_fragmented > 1 ||
	    config->most_fragmented != config->most_fragmented)
		return om_err(OM_EVALUE, "pool '%s': a fragmentation of %g is not from 0 to 1",
		              config->name, config->most_fragmented);
	if (config->limit_bytes > UINT64_C(1) << 62)
		return om_err(OM_EVALUE, "pool '%s': a limit of %" PRIu64 " bytes", config->name,
		              config->limit_bytes);
	code = om_fork_watch();
	b = code ? NULL : om_alloc(1, sizeof(*b));
	if (!b)
		return code ? code : -ENOMEM;
	*b = (struct om_bank){ .refs = 1,
		               .locked = config->locked,
		               .limit_bytes = config->limit_bytes,
		               .decay_ns = config->decay_ns,
		               .most_fragmented = config->most_fragmented,
		               .fork_generation = om_fork_generation() };
	om_list_init(&b->live);
	om_list_init(&b->freed);
	b->name = om_strdup(config->name);
	code = b->name ? om_mutex_init(&b->lock, OM_RANK_STORE) : -ENOMEM;
	if (!code) {
		code = om_cond_init(&b->changed);
		if (code)
			om_mutex_fini(&b->lock);
	}
	if (code) {
		om_free(b->name);
		om_free(b);
		return code;
	}
	*ret = b;
	return 0;
}

/* Everything is freed; what has a view holds its region from now on. */
static void let_all_go_locked(struct om_bank *b)
{
	OM_LIST_FOREACH_SAFE(link, &b->live) {
		struct om_chunk *c = om_chunk_of(link);

		om_list_del(&c->link);
		c->live = false;
		if (__atomic_sub_fetch(&c->holds, 1, __ATOMIC_ACQ_REL))
			om_list_push_tail(&b->freed, &c->link);
	}
	OM_LIST_FOREACH(link, &b->freed)
		b->regions[om_chunk_of(link)->region]->refs++;
}

int om_bank_close(struct om_bank *b, uint64_t *ret_chunks, uint64_t *ret_bytes)
{
	*ret_chunks = *ret_bytes = 0;
	if (b->fork_generation != om_fork_generation())
		return 0;
	om_mutex_lock(&b->lock);
	if (b->closing)
		return leave(b, 0);
	b->closing = true;
	while (b->leaving || b->waiters)
		om_cond_wait(&b->changed, &b->lock, UINT64_MAX);
	drain_locked(b);
	*ret_chunks = b->chunks;
	*ret_bytes = b->used_bytes;
	let_all_go_locked(b);
	__atomic_store_n(&b->closed, true, __ATOMIC_SEQ_CST);
	om_mutex_unlock(&b->lock);
	drain_closed(b);
	for (unsigned i = 0; i < b->region_count; i++)
		om_region_unref(b->regions[i]);
	return 0;
}

void om_bank_ref(struct om_bank *b)
{
	__atomic_add_fetch(&b->refs, 1, __ATOMIC_RELAXED);
}

void om_bank_unref(struct om_bank *b)
{
	uint64_t chunks, bytes;

	if (__atomic_sub_fetch(&b->refs, 1, __ATOMIC_ACQ_REL) ||
	    b->fork_generation != om_fork_generation())
		return;
	om_bank_close(b, &chunks, &bytes);
	for (uint32_t i = 0; i < b->slab_count * OM_BANK_SLAB; i++)
		om_free(om_bank_chunk(b, i)->label);
	for (uint32_t i = 0; i < b->slab_count; i++)
		om_free(b->slabs[i]);
	om_free(b->slabs);
	om_cond_fini(&b->changed);
	om_mutex_fini(&b->lock);
	om_free(b->name);
	om_free(b);
}

/* ---- chunks ---- */

/* More unused records. */
static int slab_add(struct om_bank *b)
{
	struct om_chunk *slab = om_alloc(OM_BANK_SLAB, sizeof(*slab));

	if (!slab)
		return -ENOMEM;
	if (b->slab_count == b->slab_room) {
		uint32_t room = b->slab_room ? 2 * b->slab_room : 8;
		struct om_chunk **slabs = om_realloc(b->slabs, room, sizeof(struct om_chunk *));

		if (!slabs) {
			om_free(slab);
			return -ENOMEM;
		}
		b->slabs = slabs;
		b->slab_room = room;
	}
	for (uint32_t i = OM_BANK_SLAB; i-- > 0;) {
		om_list_init(&slab[i].link);
		slab[i].bank = b;
		slab[i].index = b->slab_count * OM_BANK_SLAB + i;
		slab[i].next = b->unused;
		b->unused = &slab[i];
	}
	b->slabs[b->slab_count++] = slab;
	return 0;
}

uint64_t om_bank_largest_locked(const struct om_bank *b)
{
	uint64_t room = om_bank_room_locked(b), best = 0, most;

	for (unsigned i = 0; i < b->region_count; i++) {
		const struct om_region *r = b->regions[i];
		struct om_tile last = om_arena_beside(r->arena, 0, false);
		uint64_t tail = last.handle && !last.used ? last.bytes : 0;

		most = om_arena_largest_free(r->arena);
		best = OM_MAX(best, most);
		most = tail + OM_MIN(r->reserved - om_arena_size(r->arena), room);
		best = OM_MAX(best, most);
	}
	best = OM_MAX(best, room);
	most = om_bank_left(b);
	return OM_MIN(best, most);
}

double om_bank_fragmentation_locked(const struct om_bank *b)
{
	uint64_t left = om_bank_left(b);

	return left ? 1 - (double)om_bank_largest_locked(b) / (double)left : 0;
}

static int limit_error(struct om_bank *b, uint64_t bytes, bool quiet)
{
	b->fails++;
	if (quiet)
		return OM_EAGAIN;
	if (b->freed_bytes)
		om_err(OM_ELIMIT,
		       "pool '%s': need %" PRIu64 " bytes, %" PRIu64 " of at most %" PRIu64
		       " are in use, %" PRIu64
		       " of them by views of freed blocks: let some go, or raise the limit",
		       b->name, bytes, b->held_bytes, b->limit_bytes, b->freed_bytes);
	else
		om_err(OM_ELIMIT,
		       "pool '%s': need %" PRIu64 " bytes, %" PRIu64 " of at most %" PRIu64
		       " are in use: free some, or raise the limit",
		       b->name, bytes, b->held_bytes, b->limit_bytes);
	om_err_limit(b->name, bytes, b->held_bytes, b->limit_bytes);
	return OM_ELIMIT;
}

static int hole_error(struct om_bank *b, uint64_t bytes, bool quiet)
{
	b->fails++;
	if (quiet)
		return OM_EAGAIN;
	om_err(OM_ELIMIT,
	       "pool '%s': need %" PRIu64 " bytes in one piece; of %" PRIu64
	       " free ones the largest piece has %" PRIu64 " (%" PRIu64 " of at most %" PRIu64
	       " are in use): free neighbours (suggest_victims names them), or raise the limit",
	       b->name, bytes, om_bank_left(b), om_bank_largest_locked(b), b->held_bytes,
	       b->limit_bytes);
	om_err_limit(b->name, bytes, b->held_bytes, b->limit_bytes);
	return OM_ELIMIT;
}

/* A range for the chunk: its region, handle and data. */
static int place_locked(struct om_bank *b, struct om_chunk *c, uint64_t bytes, uint64_t align,
                        bool quiet)
{
	uint64_t offset = 0;
	int code = -ENOSPC;

	for (bool grown = false;;) {
		for (c->region = 0; c->region < b->region_count; c->region++) {
			code = om_arena_take(b->regions[c->region]->arena, bytes, align, c->index,
			                     &c->handle, &offset);
			if (code != -ENOSPC)
				break;
		}
		if (code != -ENOSPC || grown)
			break;
		code = om_bank_grow_locked(b, bytes, align);
		if (code)
			break;
		grown = true;
	}
	if (code)
		return code == -ENOSPC ? hole_error(b, bytes, quiet) : code;
	c->data = b->regions[c->region]->base + offset;
	om_bank_touch_locked(b, b->regions[c->region], offset, bytes);
	return 0;
}

static int check_request(struct om_bank *b, uint64_t bytes, uint64_t align, bool quiet)
{
	if (!bytes)
		return om_err(OM_EVALUE, "pool '%s': a block of 0 bytes", b->name);
	if (align & (align - 1) || align > OM_BANK_MAX_ALIGN)
		return om_err(OM_EVALUE,
		              "pool '%s': alignment %" PRIu64
		              " is no power of two from 1 to %" PRIu64,
		              b->name, align, OM_BANK_MAX_ALIGN);
	if (bytes > b->limit_bytes || om_up(bytes, OM_BANK_GRANULE) > om_bank_left(b))
		return limit_error(b, bytes, quiet);
	return 0;
}

static void born_locked(struct om_bank *b, struct om_chunk *c, uint64_t bytes)
{
	c->bytes = bytes;
	c->live = true;
	c->holds = 1;
	c->serial = ++b->allocs;
	c->used = ++b->uses;
	c->uses = 1;
	c->created_ns = c->used_ns = om_now_coarse();
	c->face = NULL;
	om_list_push_tail(&b->live, &c->link);
	b->chunks++;
	b->used_bytes += bytes;
	b->held_bytes += om_chunk_held(c);
	b->peak_used = OM_MAX(b->peak_used, b->used_bytes);
	b->peak_held = OM_MAX(b->peak_held, b->held_bytes);
}

static int relabel(struct om_chunk *c, const char *label)
{
	om_free(c->label);
	c->label = label ? om_strdup(label) : NULL;
	return label && !c->label ? -ENOMEM : 0;
}

static int alloc(struct om_bank *b, uint64_t bytes, uint64_t align, const char *label, bool quiet,
                 struct om_chunk **ret)
{
	struct om_chunk *c;
	int code = om_bank_enter(b);

	*ret = NULL;
	if (code)
		return code;
	code = check_request(b, bytes, align, quiet);
	if (!code && !b->unused)
		code = slab_add(b);
	if (code)
		return leave(b, code);
	c = b->unused;
	b->unused = c->next;
	code = om_unlikely(label || c->label) ? relabel(c, label) : 0;
	if (!code)
		code = place_locked(b, c, om_up(bytes, OM_BANK_GRANULE), align, quiet);
	if (code) {
		c->next = b->unused;
		b->unused = c;
		return leave(b, code);
	}
	born_locked(b, c, bytes);
	*ret = c;
	return leave(b, 0);
}

int om_bank_alloc(struct om_bank *b, uint64_t bytes, uint64_t align, const char *label,
                  struct om_chunk **ret)
{
	return alloc(b, bytes, align, label, false, ret);
}

int om_bank_try(struct om_bank *b, uint64_t bytes, uint64_t align, const char *label,
                struct om_chunk **ret)
{
	return alloc(b, bytes, align, label, true, ret);
}

int om_bank_free(struct om_bank *b, struct om_chunk *c)
{
	int code = om_bank_enter(b);

	if (code)
		return code;
	if (c->bank != b)
		return leave(b,
		             om_err(OM_EVALUE, "this block is of pool '%s', not of this pool '%s'",
		                    c->bank->name, b->name));
	if (!c->live)
		return leave(b,
		             om_err(OM_EVALUE, "pool '%s': this block was freed before", b->name));
	c->live = false;
	om_list_del(&c->link);
	b->chunks--;
	b->frees++;
	b->used_bytes -= c->bytes;
	/* Views are made under the lock: with no other hold there will be none. */
	if (om_likely(__atomic_load_n(&c->holds, __ATOMIC_ACQUIRE) == 1) ||
	    !__atomic_sub_fetch(&c->holds, 1, __ATOMIC_ACQ_REL)) {
		recycle_locked(b, c);
	} else {
		om_list_push_tail(&b->freed, &c->link);
		b->freed_bytes += om_chunk_held(c);
	}
	return leave(b, 0);
}

int om_bank_set_limit(struct om_bank *b, uint64_t limit_bytes)
{
	int code = om_bank_enter(b);

	if (code)
		return code;
	if (limit_bytes > UINT64_C(1) << 62)
		return leave(b, om_err(OM_EVALUE, "pool '%s': a limit of %" PRIu64 " bytes",
		                       b->name, limit_bytes));
	b->limit_bytes = limit_bytes;
	if (b->mapped_pages * OM_HUGE > om_up(limit_bytes, OM_HUGE))
		__atomic_store_n(&b->pressing, true, __ATOMIC_RELAXED);
	return leave(b, 0);
}

/* ---- views ---- */

int om_chunk_view_ref(struct om_chunk *c)
{
	struct om_bank *b = c->bank;
	int code = om_bank_enter(b);

	if (code)
		return code;
	if (!c->live)
		return leave(b, om_err(OM_EVALUE, "pool '%s': this block was freed", b->name));
	c->used = ++b->uses;
	c->uses++;
	c->used_ns = om_now_coarse();
	om_list_del(&c->link);
	om_list_push_tail(&b->live, &c->link);
	om_bank_ref(b);
	__atomic_add_fetch(&c->holds, 1, __ATOMIC_RELAXED);
	if (!__atomic_fetch_add(&c->views, 1, __ATOMIC_RELAXED))
		__atomic_add_fetch(&b->exported_bytes, c->bytes, __ATOMIC_RELAXED);
	return leave(b, 0);
}

void om_chunk_view_unref(struct om_chunk *c)
{
	struct om_bank *b = c->bank;

	if (b->fork_generation != om_fork_generation())
		return;
	if (__atomic_sub_fetch(&c->views, 1, __ATOMIC_RELAXED) == 0)
		__atomic_sub_fetch(&b->exported_bytes, c->bytes, __ATOMIC_RELAXED);
	if (!__atomic_sub_fetch(&c->holds, 1, __ATOMIC_ACQ_REL)) {
		c->next = __atomic_load_n(&b->dropped, __ATOMIC_RELAXED);
		while (!__atomic_compare_exchange_n(&b->dropped, &c->next, c, true,
		                                    __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
			;
		if (__atomic_load_n(&b->closed, __ATOMIC_SEQ_CST))
			drain_closed(b);
	}
	om_bank_unref(b);
}

void **om_chunk_face(struct om_chunk *c)
{
	return &c->face;
}

void *om_chunk_data(const struct om_chunk *c)
{
	return c->data;
}

uint64_t om_chunk_bytes(const struct om_chunk *c)
{
	return c->bytes;
}
