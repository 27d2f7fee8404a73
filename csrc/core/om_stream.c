/*
 * om_stream: a planned stream: units (a decoder layer, a vision block, ...) of blocks that are kept plain,
 * kept encoded, or not kept. Those kept plain are leased for good, and so are the forms of those kept encoded,
 * whose bytes are decoded while their unit is in use. These bytes, the blocks that are not kept of the units
 * that are in use, and what has to be read for the next ones by the recorded order, share what the group's
 * limit leaves: the ring. What passes through it is called streamed, whether it is read or decoded.
 *
 * A unit's state says who may touch its windows: IDLE -> BINDING (the first user makes them) ->
 * BOUND (any number of users) -> UNBINDING (the last one takes them away) -> IDLE. A unit that is kept has one
 * user more, the stream (om_keep.c): it stays BOUND. All under the store lock; waits give it up. A unit's
 * streamed blocks are leased all or none, so that two threads cannot hold half a ring each.
 *
 * Blocks without an origin are leased for sharing, since nothing but HOST has what is written to them.
 */
#include <errno.h>
#include <string.h>

#include "core/om_stream_int.h"

#define AHEAD_OF_OTHERS \
	4              /* units, the bytes of which are worth more than what others may use again */
#define AHEAD_ANYHOW 2 /* units that are read though memory is short and nobody has any to give */

static void unit_fini(struct om_unit *u)
{
	for (size_t i = 0; i < u->count && u->blocks; i++)
		if (u->blocks[i])
			om_block_unref(u->blocks[i]);
	om_free(u->name);
	om_free(u->blocks);
	om_free(u->leases);
	om_free(u->forms);
	om_free(u->keep);
	om_free(u->place);
}

static int unit_init_locked(struct om_stream *st, struct om_unit *u,
                            const struct om_stream_unit *in)
{
	size_t at[2] = { 0, 0 }; /* next place of a streamed, of a resident block */

	u->name = om_strdup(in->name);
	u->count = in->count;
	u->blocks = om_alloc(in->count, sizeof(*u->blocks));
	u->leases = om_alloc(in->count, sizeof(*u->leases));
	u->forms = om_alloc(in->count, sizeof(*u->forms));
	u->keep = om_alloc(in->count, sizeof(*u->keep));
	u->place = om_alloc(in->count, sizeof(*u->place));
	if (!u->name || !u->blocks || !u->leases || !u->forms || !u->keep || !u->place)
		return -ENOMEM;
	for (size_t i = 0; i < in->count; i++)
		u->streamed_count += in->keep[i] != OM_KEEP_PLAIN;
	at[1] = u->streamed_count;
	for (size_t i = 0; i < in->count; i++) {
		struct om_block *b = om_store_find_locked(st->store, in->blocks[i]);
		bool plain = in->keep[i] == OM_KEEP_PLAIN;

		if (!b)
			return OM_ENAME;
		if (b->group != st->group)
			return om_err(
				OM_EVALUE,
				"unit '%s': block '%s' is in group '%s', not in the stream's, '%s'",
				in->name, b->name, b->group->name, st->group->name);
		if (om_block_wake(b, NULL))
			return -ENOMEM;
		st->group->mixed |= om_block_coded(b) || in->keep[i] >= OM_KEEP_FAST;
		b->body->align = plain ? OM_BLOCK_ALIGN : OM_STREAM_ALIGN;
		u->place[i] = at[plain]++;
		u->blocks[u->place[i]] = b;
		u->keep[u->place[i]] = in->keep[i];
		om_block_ref(b);
	}
	return 0;
}

int om_stream_create(struct om_store *s, const char *group, const struct om_stream_unit *units,
                     size_t count, struct om_stream **ret)
{
	struct om_stream *st = om_alloc(1, sizeof(*st));
	size_t streamed = 0;
	int code = st ? om_store_enter(s) : -ENOMEM;

	if (code) {
		om_free(st);
		return code;
	}
	st->store = s;
	st->count = count;
	st->units = om_alloc(count, sizeof(*st->units));
	st->ahead = om_alloc(count, sizeof(*st->ahead));
	st->group = om_store_find_group_locked(s, group);
	code = st->units && st->ahead && st->group ? 0 : om_err_last()->code;
	for (size_t i = 0; i < count && !code; i++) {
		code = unit_init_locked(st, &st->units[i], &units[i]);
		if (st->units[i].streamed_count)
			st->ahead[streamed++] = (uint32_t)i;
	}
	if (!code)
		code = om_pattern_init(&st->pattern, count, st->ahead, streamed);
	if (!code) {
		st->group->streams++;
		st->opened = true;
		st->read_bytes_before = st->group->read_bytes;
		st->decoded_bytes_before = st->group->decoded_bytes;
		st->timed_bytes_before = st->group->timed_bytes;
		st->timed_ns_before = st->group->timed_ns;
	}
	om_mutex_unlock(&s->lock);
	om_store_ref(s);
	if (code) {
		struct om_error error = *om_err_last();

		om_stream_free(st);
		return om_err_set(&error);
	}
	*ret = st;
	return 0;
}

int om_stream_lease_unit_locked(struct om_stream *st, struct om_unit *u, size_t first, size_t count,
                                uint64_t deadline_ns, uint64_t *ret_stall_ns)
{
	struct om_store *s = st->store;
	int code = count ? om_fetch_lease_locked(s, u->blocks + first, count, deadline_ns,
	                                         ret_stall_ns)
	                 : 0;

	for (size_t i = first; i < first + count && !code; i++) {
		u->leases[i] = om_lease_make_locked(s, u->blocks[i], false);
		if (u->leases[i] && !om_block_has_origin(u->blocks[i]))
			u->leases[i]->share = u->blocks[i]->body->touched = true;
		if (u->leases[i])
			continue;
		code = -ENOMEM;
		for (size_t k = i; k < first + count; k++) /* those without a lease object */
			om_fetch_unlease_locked(s, u->blocks[k]);
		for (size_t k = first; k < i; k++) {
			om_lease_unref(u->leases[k]);
			u->leases[k] = NULL;
		}
	}
	return code;
}

/* ---- the ring ---- */

/* Bytes that the unit's streamed blocks hold without being in use. */
static bool speculated(const struct om_unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++) {
		const struct om_block *b = u->blocks[i], *form = om_block_coded(b);

		if ((b->host != OM_COPY_NONE && !b->leases) ||
		    (form && form->host != OM_COPY_NONE && !form->leases))
			return true;
	}
	return false;
}

static void forget_unit_locked(struct om_stream *st, struct om_unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++)
		om_stream_forget_block_locked(st, u->blocks[i]);
}

/* Let go what was fetched ahead for units that are not among the next ones. Did it free any bytes
 * now? (What is in flight goes when it lands.) */
static bool drop_strays_locked(struct om_stream *st, size_t foretold)
{
	uint64_t before = st->group->used_bytes;

	for (size_t i = 0; i < st->count; i++) {
		struct om_unit *u = &st->units[i];
		bool wanted = u->users > 0 || !speculated(u);

		for (size_t k = 0; k < foretold && !wanted; k++)
			wanted = st->ahead[k] == i;
		if (!wanted)
			forget_unit_locked(st, u);
	}
	return st->group->used_bytes < before;
}

static bool room_now(const struct om_stream *st, uint64_t bytes)
{
	const struct om_group *g = st->group;

	return (!g->limit_bytes || g->used_bytes + bytes <= g->limit_bytes) &&
	       om_pool_fits(&st->store->pool, bytes);
}

/* Make room for the last of the units foretold: what is of no use in the ring goes, then, for the first few,
 * what others can read again. Did anything go? */
static bool make_way_locked(struct om_stream *st, size_t foretold)
{
	if (!st->lingers && drop_strays_locked(st, foretold))
		return true;
	return foretold <= AHEAD_OF_OTHERS && om_room_take_locked(st->store, st->group);
}

/* Is there room for the last of the units foretold, or can it be made? Memory that is short, where nobody has any to
 * give, is room for the very next ones. */
static bool find_room_locked(struct om_stream *st, size_t foretold, uint64_t bytes)
{
	bool room = room_now(st, bytes);

	while (!room || om_guard_short_locked(st->store, bytes)) {
		if (!make_way_locked(st, foretold))
			return room && foretold <= AHEAD_ANYHOW;
		room = room_now(st, bytes);
	}
	return true;
}

/* Fetch the next units of the order into what room the ring has. Forms are fetched, not decoded; when no
 * unit is in use (`between`), what the next one decodes to has its room kept. */
static void fetch_ahead_locked(struct om_stream *st, bool between)
{
	uint64_t kept = 0;
	size_t foretold = 0;

	for (size_t k = 0; k < st->count && st->settled < st->count; k++) {
		uint32_t id;
		struct om_unit *u;
		uint64_t bytes;

		if (!om_pattern_next(&st->pattern, k, &id))
			return;
		st->ahead[foretold++] = id;
		u = &st->units[id];
		bytes = om_fetch_missing_bytes(u->blocks, u->streamed_count, true);
		if (between && !k)
			kept = om_fetch_missing_bytes(u->blocks, u->streamed_count, false) - bytes;
		if (!bytes)
			continue;
		if (!find_room_locked(st, foretold, bytes + kept))
			return;
		if (om_fetch_start_locked(st->store, u->blocks, u->streamed_count, OM_PREFETCH))
			return; /* it will be fetched when it is needed */
	}
}

/* ---- use ---- */

int om_stream_check_unit(const struct om_stream *st, size_t unit)
{
	if (unit >= st->count)
		return om_err(OM_EVALUE, "unit %zu: the stream has %zu", unit, st->count);
	return 0;
}

/* Are the streamed bytes in memory, if not yet proven? */
static bool arrived(const struct om_unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++) {
		const struct om_block *b = om_block_wanted(u->blocks[i]);

		if (b->host == OM_COPY_NONE ||
		    (b->host == OM_COPY_FILLING && !(b->body->move && b->body->move->landed)))
			return false;
	}
	return true;
}

static void count_user_locked(struct om_stream *st, struct om_unit *u, bool hit)
{
	u->users++;
	if (!u->streamed_count)
		return;
	st->stats.enters++;
	st->stats.hits += hit;
	st->stats.mispredicted += !om_pattern_record(&st->pattern, (uint32_t)(u - st->units));
}

int om_stream_enter(struct om_stream *st, size_t unit, uint64_t deadline_ns, bool *ret_bind)
{
	struct om_store *s = st->store;
	struct om_unit *u;
	uint64_t stall = 0;
	bool hit;
	int code = om_stream_check_unit(st, unit);

	if (code || (code = om_store_enter(s)))
		return code;
	u = &st->units[unit];
	hit = arrived(u);
	while ((u->state == OM_UNIT_BINDING || u->state == OM_UNIT_UNBINDING) && !code) {
		if (s->closing)
			code = om_err(OM_ECLOSED, "the store is closed");
		else if (om_now() >= deadline_ns)
			code = om_err(OM_EBUSY,
			              "unit '%s': another thread is binding it at the deadline",
			              u->name);
		else
			om_store_wait_locked(s, deadline_ns);
	}
	*ret_bind = u->state == OM_UNIT_IDLE;
	if (!code && *ret_bind) {
		u->state = OM_UNIT_BINDING;
		code = om_stream_lease_unit_locked(st, u, 0, u->streamed_count, deadline_ns,
		                                   &stall);
		st->stats.stall_ns += stall;
		if (code)
			u->state = OM_UNIT_IDLE;
	}
	if (!code) {
		count_user_locked(st, u, hit);
		if (u->streamed_count)
			fetch_ahead_locked(st, false);
	}
	om_store_changed_locked(s);
	om_mutex_unlock(&s->lock);
	return code;
}

/* Write out what is only in HOST, so that it makes room as what was dropped does. Where it cannot be, it stays,
 * and who needs the room hears why. Gives up the lock. */
static void expel_unit_locked(struct om_stream *st, struct om_unit *u)
{
	for (size_t i = 0; i < u->streamed_count && !st->store->closing; i++) {
		struct om_block *b = u->blocks[i];

		if (b->named && b->host == OM_COPY_VALID && !b->leases && !b->pinned &&
		    !b->body->holds && !om_block_clean(b))
			(void)om_spill_locked(st->store, b);
	}
}

static void release_unit_locked(struct om_stream *st, struct om_unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++) {
		if (u->leases[i])
			om_lease_unref(u->leases[i]);
		u->leases[i] = NULL;
	}
	u->state = OM_UNIT_IDLE;
	u->users = 0;
	om_store_drain_locked(st->store);
	om_store_changed_locked(st->store);
	if (st->lingers)
		return; /* that made no room */
	forget_unit_locked(st, u);
	expel_unit_locked(st, u);
	fetch_ahead_locked(st, true);
	om_store_changed_locked(st->store);
}

void om_stream_bound(struct om_stream *st, size_t unit, bool ok)
{
	struct om_unit *u = &st->units[unit];

	if (om_stream_check_unit(st, unit) || om_store_enter(st->store))
		return;
	if (u->state == OM_UNIT_BINDING && ok) {
		u->state = OM_UNIT_BOUND;
		st->settled += u->kept;
	} else if (u->state == OM_UNIT_BINDING) {
		release_unit_locked(st, u);
	}
	om_store_changed_locked(st->store);
	om_mutex_unlock(&st->store->lock);
}

int om_stream_leave(struct om_stream *st, size_t unit, bool *ret_unbind)
{
	struct om_unit *u;
	int code = om_stream_check_unit(st, unit);

	*ret_unbind = false;
	if (code || (code = om_store_enter(st->store)))
		return code;
	u = &st->units[unit];
	if (!u->users) {
		code = om_err(OM_EVALUE, "unit '%s' is left more often than it was entered",
		              u->name);
	} else if (!--u->users && (!u->kept || u->state != OM_UNIT_BOUND)) {
		u->state = OM_UNIT_UNBINDING;
		*ret_unbind = true;
	}
	om_mutex_unlock(&st->store->lock);
	return code;
}

bool om_stream_join(struct om_stream *st, size_t unit)
{
	bool joins;

	if (unit >= st->count || om_store_enter(st->store))
		return false;
	/* When all units are settled there is nothing to be read for the next ones. */
	joins = st->settled == st->count && st->units[unit].state == OM_UNIT_BOUND;
	if (joins)
		count_user_locked(st, &st->units[unit], true);
	om_mutex_unlock(&st->store->lock);
	return joins;
}

bool om_stream_part(struct om_stream *st, size_t unit)
{
	struct om_unit *u;
	bool parts;

	if (unit >= st->count || om_store_enter(st->store))
		return false;
	u = &st->units[unit];
	parts = u->state == OM_UNIT_BOUND && u->users && (u->users > 1 || u->kept);
	u->users -= parts;
	om_mutex_unlock(&st->store->lock);
	return parts;
}

void om_stream_unbound(struct om_stream *st, size_t unit)
{
	if (om_stream_check_unit(st, unit) || om_store_enter(st->store))
		return;
	if (st->units[unit].state == OM_UNIT_UNBINDING)
		release_unit_locked(st, &st->units[unit]);
	om_mutex_unlock(&st->store->lock);
}

struct om_lease *om_stream_lease(struct om_stream *st, size_t unit, size_t block)
{
	if (unit >= st->count || block >= st->units[unit].count)
		return NULL;
	return st->units[unit].leases[st->units[unit].place[block]];
}

int om_stream_stats(struct om_stream *st, struct om_stream_stats *ret)
{
	int code = om_store_enter(st->store);

	if (code)
		return code;
	*ret = st->stats;
	ret->read_bytes = st->group->read_bytes - st->read_bytes_before;
	ret->decoded_bytes = st->group->decoded_bytes - st->decoded_bytes_before;
	ret->timed_bytes = st->group->timed_bytes - st->timed_bytes_before;
	ret->timed_ns = st->group->timed_ns - st->timed_ns_before;
	ret->packed_bytes = ret->users = 0;
	for (size_t i = 0; i < st->count; i++)
		ret->users += st->units[i].users;
	for (size_t i = 0; i < st->count; i++)
		for (size_t k = 0; k < st->units[i].streamed_count; k++)
			if (st->units[i].forms[k])
				ret->packed_bytes += st->units[i].forms[k]->block->body->mem.bytes;
	om_mutex_unlock(&st->store->lock);
	return 0;
}

static void let_leases_go(struct om_unit *u)
{
	for (size_t k = 0; k < u->count && u->leases && u->forms; k++) {
		if (u->leases[k])
			om_lease_unref(u->leases[k]);
		if (u->forms[k])
			om_lease_unref(u->forms[k]);
	}
}

/* What the stream has encoded goes where the bytes can be had from an origin. */
static void end_unit_locked(struct om_stream *st, struct om_unit *u)
{
	forget_unit_locked(st, u);
	for (size_t i = 0; i < u->streamed_count; i++)
		if (u->forms[i] && om_block_has_origin(u->blocks[i]))
			om_pack_drop_locked(st->store, u->blocks[i]);
}

void om_stream_free(struct om_stream *st)
{
	struct om_store *s;

	if (!st)
		return;
	s = st->store;
	if (s->fork_generation == om_fork_generation()) {
		for (size_t i = 0; i < st->count && st->units; i++)
			let_leases_go(&st->units[i]);
		if (st->opened &&
		    !om_store_enter(s)) { /* drains; a closed store has no group any more */
			for (size_t i = 0; i < st->count; i++)
				end_unit_locked(st, &st->units[i]);
			st->group->streams--;
			st->group->lingering -= st->lingers;
			om_mutex_unlock(&s->lock);
		}
		for (size_t i = 0; i < st->count && st->units; i++)
			unit_fini(&st->units[i]);
	}
	om_pattern_fini(&st->pattern);
	om_free(st->units);
	om_free(st->ahead);
	om_free(st);
	om_store_unref(s);
}
