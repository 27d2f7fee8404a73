/*
 * om_swap: giving memory back: moving a group's idle blocks out until enough is free, unmapping what no
 * block uses, and the bounds of the swap file.
 *
 * The caller's thread chooses, hashes and waits; the mover writes. A bounded number of bytes is on
 * its way at a time, so that memory goes back while the rest is still being written.
 */
#include <errno.h>
#include <stdio.h>

#include "core/om_store_int.h"

#define UNDER_WAY  64u /* writes begun and not yet waited for */
#define WARM_SHARE 16u /* of what is swapped out, one in so many bytes may stay populated */

/* A write that was begun here, and whose block's memory is to go. */
struct leaving {
	struct om_block *block;
	struct om_move *move;
};

struct om_swap {
	struct om_store *store;
	struct om_group *group; /* as long as the store is open */
	uint64_t want;          /* bytes to free */
	struct leaving ring[UNDER_WAY];
	unsigned first, count;
	uint64_t pending; /* bytes that will be free when all of the ring is written */
	bool enough;      /* nothing more is begun */
	struct om_swapped done;
};

static void note_gone(struct om_swap *w, const struct om_block *b, uint64_t bytes)
{
	w->done.blocks += !b->inner;
	w->done.bytes += bytes;
}

static void forget_oldest(struct om_swap *w)
{
	om_move_unref(w->ring[w->first].move);
	om_block_unref(w->ring[w->first].block);
	w->first = (w->first + 1) % UNDER_WAY;
	w->count--;
}

/* The next access finds memory ready, at the cost of a small part of what was freed. */
static void trim_locked(struct om_swap *w)
{
	uint64_t out = OM_MAX(w->done.bytes, w->group->disk_bytes);

	om_pool_trim_to(&w->store->pool, OM_MIN(OM_POOL_WARM, out / WARM_SHARE));
}

/* What keeps memory from going is for the group's statistics: nothing is lost, and what did go counts. */
static void stop(struct om_swap *w)
{
	snprintf(w->group->trouble, sizeof(w->group->trouble), "%s", om_err_last()->text);
	w->enough = true;
}

/* Wait for the oldest write. 0, OM_EBUSY at the deadline, OM_ECLOSED. */
static int settle_oldest_locked(struct om_swap *w, uint64_t deadline_ns)
{
	struct leaving *l = &w->ring[w->first];
	uint64_t bytes = om_block_host_bytes(l->block);
	int code = om_fetch_settle_locked(w->store, l->move, deadline_ns);

	if (!l->move->settled)
		return code;
	if (code)
		stop(w);
	else if (l->block->host == OM_COPY_NONE)
		note_gone(w, l->block, bytes);
	w->pending -= bytes;
	forget_oldest(w);
	trim_locked(w);
	return 0;
}

/* Send one block out. */
static void begin_one_locked(struct om_swap *w, struct om_block *b)
{
	struct om_store *s = w->store;
	uint64_t bytes = om_block_host_bytes(b);
	enum om_reason former = om_reason_enter(OM_REASON_EXPLICIT);

	om_block_ref(b);
	if (om_block_expendable(b))
		om_room_drop_locked(s, b);
	else if (om_spill_locked(s, b))
		stop(w);
	om_reason_leave(former);
	if (b->host == OM_COPY_LEAVING && b->body->move) {
		w->ring[(w->first + w->count++) % UNDER_WAY] = (struct leaving){ b, b->body->move };
		om_move_ref(b->body->move);
		w->pending += bytes;
		return;
	}
	if (b->host == OM_COPY_NONE)
		note_gone(w, b, bytes);
	om_block_unref(b);
}

int om_swap_begin(struct om_store *s, const char *group, uint64_t bytes, struct om_swap **ret)
{
	struct om_swap *w = om_alloc(1, sizeof(*w));
	int code = w ? om_store_enter_group(s, group, &w->group) : -ENOMEM;

	if (code) {
		om_free(w);
		return code;
	}
	w->store = s;
	w->want = OM_MIN(bytes, w->group->used_bytes);
	w->group->trouble[0] = '\0';
	om_store_ref(s);
	*ret = w;
	return om_store_leave(s, 0);
}

static uint64_t left_to_free(const struct om_swap *w)
{
	return w->want - OM_MIN(w->want, w->done.bytes);
}

int om_swap_wait(struct om_swap *w, uint64_t deadline_ns)
{
	struct om_store *s = w->store;
	struct om_group *g = w->group;
	int code = om_store_enter(s);

	if (code)
		return code;
	if (!g->limit_bytes) /* it has room for so much, until memory is free again */
		g->policy->capacity =
			OM_MAX(g->used_bytes - OM_MIN(g->used_bytes, left_to_free(w)), OM_PAGE);
	while (!code && !s->closing) {
		uint64_t leaving = OM_MAX(w->pending, g->leaving_bytes); /* of other threads too */
		bool more = !w->enough && w->done.bytes + leaving < w->want;
		struct om_block *b = more && w->count < UNDER_WAY ? om_room_victim_locked(s, g)
		                                                  : NULL;

		bool wait = w->count || (!w->want && leaving) || (more && !b && leaving);

		if (om_now() >= deadline_ns && (b || wait))
			code = om_err(OM_EBUSY,
			              "group '%s': %llu bytes are still moving at the deadline",
			              g->name, (unsigned long long)w->pending);
		else if (b)
			begin_one_locked(w, b);
		else if (w->count)
			code = settle_oldest_locked(w, deadline_ns);
		else if (wait)
			om_store_wait_locked(s, deadline_ns);
		else
			break;
	}
	if (s->closing)
		return om_store_leave(s, om_err(OM_ECLOSED, "the store is closed"));
	if (!code)
		trim_locked(w);
	return om_store_leave(s, code);
}

void om_swap_end(struct om_swap *w, struct om_swapped *ret)
{
	struct om_store *s = w->store;

	if (s->fork_generation == om_fork_generation()) {
		om_mutex_lock(&s->lock);
		while (w->count)
			forget_oldest(w);
		om_mutex_unlock(&s->lock);
	}
	*ret = w->done;
	om_free(w);
	om_store_unref(s);
}

int om_store_trim(struct om_store *s, uint64_t reserve_bytes)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	om_pool_trim_to(&s->pool, reserve_bytes);
	om_spill_shrink_locked(s);
	return om_store_leave(s, 0);
}

int om_store_disk(struct om_store *s, const char *directory, uint64_t limit_bytes)
{
	char *copy = directory ? om_strdup(directory) : NULL;
	int code = directory && !copy ? -ENOMEM : om_store_enter(s);

	if (!code && copy && (s->disk.file || s->disk.growing))
		code = om_store_leave(s, om_err(OM_EVALUE,
		                                "the swap file is in use already: its directory is "
		                                "fixed until the store is closed"));
	else if (!code) {
		if (copy) {
			om_free(s->disk.directory);
			s->disk.directory = copy;
			copy = NULL;
		}
		s->disk.limit_bytes = om_down(limit_bytes, OM_PAGE);
		om_store_changed_locked(s);
		om_mutex_unlock(&s->lock);
	}
	om_free(copy);
	return code;
}
