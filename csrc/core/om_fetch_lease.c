/*
 * om_fetch_lease: counted leases: all blocks of a request in HOST and proven, or none leased. It finds what is
 * missing, has room made for all of it at once, has the fills begun, and waits for them (om_fetch.c).
 *
 * Under the store lock, which waiting gives up: everything is looked up again.
 */
#include <errno.h>
#include <stdio.h>

#include "core/om_store_int.h"

/* What keeps the blocks from being leased now: 0 nothing, else OM_EAGAIN (wait for a change) or an
 * error; *ret_need: HOST bytes to reserve first. */
static int survey_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                         uint64_t *ret_need)
{
	int code = s->closing ? om_err(OM_ECLOSED, "the store is closed") : 0;

	for (size_t i = 0; i < count && !code; i++) {
		const struct om_block *b = blocks[i];

		if (!b->named)
			code = om_err(OM_ENAME, "block '%s' was removed", b->name);
		else if (b->body->writer || (b->host == OM_COPY_FILLING &&
		                             (!b->body->move || b->body->move->canceled)))
			code = OM_EAGAIN;
		else if (b->host == OM_COPY_NONE && b->body->packed && !om_block_coded(b))
			code = om_err(OM_EPACKED,
			              "block '%s' is kept encoded: ask the face that encoded it",
			              b->name);
	}
	*ret_need = code ? 0 : om_fetch_missing_bytes(blocks, count, false);
	return code;
}

/* What survey_locked waits for besides room. */
static int unsettled_error(struct om_block *const *blocks, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		const struct om_block *b = blocks[i];

		if (!b->body->writer && b->host != OM_COPY_FILLING)
			continue;
		om_err(OM_EBUSY, "block '%s': %s at the deadline", b->name,
		       b->body->writer ? "leased for writing"
		       : b->body->move ? "a canceled fill is still in flight"
		                       : "still being put");
		snprintf(om_err_last()->holders, OM_ERROR_HOLDERS, "%s", b->name);
		return OM_EBUSY;
	}
	return 0;
}

/* Make each block VALID, FILLING or LEAVING, with the lock held since it was last seen so. */
static int summon_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                         uint64_t deadline_ns)
{
	unsigned failed = s->spills_failed;

	for (;;) {
		uint64_t need;
		int code = survey_locked(s, blocks, count, &need);

		if (!code && !need)
			return 0;
		if (!code)
			code = om_room_make_locked(s, blocks[0]->group, need, OM_ROOM_WRITE, blocks,
			                           count);
		if (!code)
			code = om_fetch_start_locked(s, blocks, count, OM_DEMAND);
		code = om_room_verdict_locked(s, code, failed);
		if (code != OM_EAGAIN && code != OM_EBUSY)
			return code;
		if (om_now() >= deadline_ns) {
			if (need || !unsettled_error(blocks, count))
				om_room_busy_error(s, blocks[0]->group, need);
			return OM_EBUSY;
		}
		om_store_wait_locked(s, deadline_ns);
	}
}

/* Count a lease as a hit or a miss. One that comes again after its deadline was counted then, so that
 * a caller who waits in slices counts once. (One that does not come again leaves the next uncounted.) */
static void count_lease_locked(struct om_store *s, struct om_block *b, struct om_move *m)
{
	bool again = b->counted > 0, guessed = b->body->guessed;
	/* A cache that encodes its entries finds them. */
	bool found = !m || (b->group->cache && m->decoding && !om_decode_reads(m));

	b->counted -= again;
	if (!again) {
		om_traffic_note_locked(s, b, found ? OM_EVENT_HIT : OM_EVENT_MISS, 0, 0);
		*(found ? &s->counters.hits : &s->counters.misses) += 1;
	}
	if (m) {
		s->counters.prefetch_hits += m->speculative;
		m->speculative = false;
	} else {
		s->counters.prefetch_hits += b->body->unused;
		b->body->unused = false;
	}
	if (guessed)
		om_foresight_end(b->group->foresight, b, true);
	if (guessed || m) /* the next of a row is fetched behind it */
		om_foresight_fetch_locked(s, b->group);
}

void om_fetch_hit_locked(struct om_store *s, struct om_block *b)
{
	om_block_access(b);
	count_lease_locked(s, b, NULL);
}

/* Has the fill failed, and taken the leases along? */
static bool lost(const struct om_move *m)
{
	return m && m->settled && m->error->code;
}

/* As om_fetch_lease_locked. *ret_again: what failed was begun ahead of need, maybe before its cause
 * was mended; a fill on demand has the last word. */
static int try_lease_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                            struct om_move **moves, uint64_t deadline_ns, bool *ret_again)
{
	int code;

	*ret_again = false;
	for (size_t i = 0; i < count; i++) {
		code = om_block_wake(blocks[i], NULL);
		if (code)
			return code;
	}
	for (size_t i = 0; i < count; i++) {
		struct om_block *form = om_block_coded(blocks[i]);

		if (!blocks[i]->counted) { /* else it comes again */
			om_block_access(blocks[i]);
			if (form)
				om_block_access(form);
		}
	}
	code = summon_locked(s, blocks, count, deadline_ns);
	if (code)
		return code;
	for (size_t i = 0; i < count; i++) {
		struct om_block *b = blocks[i];

		if (b->host == OM_COPY_LEAVING)
			om_block_leave_rescue(b);
		om_block_lease(b);
		moves[i] = b->host == OM_COPY_FILLING ? b->body->move : NULL;
		count_lease_locked(s, b, moves[i]);
		if (!moves[i])
			continue;
		om_move_ref(moves[i]);
		om_mover_promote_locked(s,
		                        moves[i]->decoding ? om_decode_reads(moves[i]) : moves[i]);
	}
	for (size_t i = 0; i < count && !code; i++)
		if (moves[i])
			code = om_fetch_settle_locked(s, moves[i], deadline_ns);
	for (size_t i = 0; i < count; i++)
		*ret_again |= lost(moves[i]) && moves[i]->ahead && !s->closing;
	for (size_t i = 0; i < count; i++) {
		blocks[i]->counted += code == OM_EBUSY || *ret_again;
		if (code && !lost(moves[i]))
			om_fetch_unlease_locked(s, blocks[i]);
		om_move_unref(moves[i]);
	}
	return code;
}

#define FEW 16

int om_fetch_lease_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                          uint64_t deadline_ns, uint64_t *ret_stall_ns)
{
	struct om_move *few[FEW], **moves = few;
	uint64_t started = 0;
	bool again;
	int code;

	if (count > FEW && !(moves = om_alloc(count, sizeof(struct om_move *))))
		return -ENOMEM;
	for (size_t i = 0; i < count && !started; i++)
		if (blocks[i]->host != OM_COPY_VALID)
			started = om_now();
	do
		code = try_lease_locked(s, blocks, count, moves, deadline_ns, &again);
	while (again);
	if (moves != few)
		om_free(moves);
	if (started) {
		uint64_t stall = om_now() - started;

		s->counters.stall_ns += stall;
		if (ret_stall_ns)
			*ret_stall_ns += stall;
	}
	return code;
}

void om_fetch_unlease_locked(struct om_store *s, struct om_block *b)
{
	om_block_unlease(b);
	om_room_released_locked(s, b);
	om_store_changed_locked(s);
	om_store_reap_locked(s, b);
}
