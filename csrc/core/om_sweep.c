/* om_sweep: see om_sweep.h. Owns references to the blocks and moves of its ring. */
#include "core/om_sweep.h"

#include <errno.h>
#include <stdio.h>

#define WARM_SHARE 16u /* of what a group swaps out, one in so many bytes may stay populated */

uint64_t om_sweep_bytes(const struct om_sweep *w)
{
	return w->done.dropped_bytes + w->done.written_bytes;
}

static void note_gone(struct om_sweep *w, const struct om_block *b, uint64_t bytes, bool written)
{
	*(written ? &w->done.written_blocks : &w->done.dropped_blocks) += !b->inner;
	*(written ? &w->done.written_bytes : &w->done.dropped_bytes) += bytes;
}

static void forget_oldest(struct om_sweep *w)
{
	om_move_unref(w->ring[w->first].move);
	om_block_unref(w->ring[w->first].block);
	w->first = (w->first + 1) % OM_SWEEP_WAYS;
	w->count--;
}

/* Who asked for a group's memory accesses it again: the next access finds memory ready, at the cost of a small
 * part of what was freed. */
static void trim_locked(struct om_sweep *w)
{
	uint64_t out = w->group ? OM_MAX(om_sweep_bytes(w), w->group->disk_bytes) : 0;

	om_pool_trim(&w->store->pool, OM_MAX(w->reserve, OM_MIN(OM_POOL_WARM, out / WARM_SHARE)),
	             UINT64_MAX);
}

/* What keeps memory from going is for the group's statistics: nothing is lost, and what did go counts. */
static void stop(struct om_sweep *w, struct om_group *g)
{
	snprintf(g->trouble, sizeof(g->trouble), "%s", om_err_last()->text);
	w->enough = true;
}

/* Wait for the oldest write. 0, OM_EBUSY at the deadline, OM_ECLOSED. */
static int settle_oldest_locked(struct om_sweep *w, uint64_t deadline_ns)
{
	struct leaving *l = &w->ring[w->first];
	uint64_t bytes = om_block_host_bytes(l->block);
	int code = om_fetch_settle_locked(w->store, l->move, deadline_ns);

	if (!l->move->settled)
		return code;
	if (code)
		stop(w, l->block->group);
	else if (l->block->host == OM_COPY_NONE)
		note_gone(w, l->block, bytes, true);
	w->pending -= bytes;
	forget_oldest(w);
	trim_locked(w);
	return 0;
}

/* Send one block out. */
static void begin_one_locked(struct om_sweep *w, struct om_block *b)
{
	struct om_store *s = w->store;
	uint64_t bytes = om_block_host_bytes(b);
	enum om_reason former = om_reason_enter(w->group ? OM_REASON_EXPLICIT : OM_REASON_PRESSURE);

	om_block_ref(b);
	if (om_block_expendable(b))
		om_room_drop_locked(s, b);
	else if (om_spill_locked(s, b))
		stop(w, b->group);
	om_reason_leave(former);
	if (b->host == OM_COPY_LEAVING && b->body->move) {
		w->ring[(w->first + w->count++) % OM_SWEEP_WAYS] =
			(struct leaving){ b, b->body->move };
		om_move_ref(b->body->move);
		w->pending += bytes;
		return;
	}
	if (b->host == OM_COPY_NONE)
		note_gone(w, b, bytes, false);
	om_block_unref(b);
}

/* Bytes that are on their way out, those of other threads too. */
static uint64_t leaving_bytes(const struct om_sweep *w)
{
	uint64_t bytes = 0;

	OM_LIST_FOREACH(link, &w->store->groups) {
		const struct om_group *g = om_container_of(link, struct om_group, link);

		if (!w->group || w->group == g)
			bytes += g->leaving_bytes;
	}
	return OM_MAX(w->pending, bytes);
}

static int late_error(const struct om_sweep *w)
{
	return om_err(OM_EBUSY, "%s%s%s: %llu bytes are still moving at the deadline",
	              w->group ? "group '" : "the store", w->group ? w->group->name : "",
	              w->group ? "'" : "", (unsigned long long)leaving_bytes(w));
}

int om_sweep_run_locked(struct om_sweep *w, uint64_t deadline_ns)
{
	struct om_store *s = w->store;
	int code = 0;

	while (!code && !s->closing) {
		uint64_t leaving = leaving_bytes(w);
		bool more = !w->enough && om_sweep_bytes(w) + leaving < w->want;
		struct om_block *b = more && w->count < OM_SWEEP_WAYS
		                             ? om_room_victim_locked(s, w->group)
		                             : NULL;
		bool wait = w->count || (!w->want && leaving) || (more && !b && leaving);

		if (om_now() >= deadline_ns && (b || wait))
			code = late_error(w);
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
		return om_err(OM_ECLOSED, "the store is closed");
	if (!code)
		trim_locked(w);
	return code;
}

void om_sweep_end_locked(struct om_sweep *w)
{
	while (w->count)
		forget_oldest(w);
}
