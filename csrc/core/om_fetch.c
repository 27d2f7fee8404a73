/*
 * om_fetch: bringing bytes to HOST. Starts fills, waits for them, and does the work owed on them:
 * hashing behind the reads, moving bytes to where they belong, comparing.
 *
 * The work is done by the thread that waits, without the store lock, a piece at a time; `busy`
 * keeps it to one thread. A thread that leaves (deadline, Ctrl-C) leaves a fill that another can
 * take up. What nobody waits for is finished by the worker, but for a stream's fills, which are
 * finished by the thread that comes to use them.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

#define TAKE_STEP (UINT64_C(16) * OM_MIB) /* per piece of work, so that others can take over */

static bool hash_wanted(const struct om_store *s, const struct om_block *b)
{
	if (b->blank)
		return false;
	return !b->body->hash_known || s->verify == OM_VERIFY_ALWAYS || !b->body->verified;
}

/* The encoded form that is missing, too. */
static struct om_block *missing_form(const struct om_block *b)
{
	struct om_block *form = b->host == OM_COPY_NONE ? om_block_coded(b) : NULL;

	return form && form->host == OM_COPY_NONE ? form : NULL;
}

/* HOST bytes of the forms that are missing, and of the blocks themselves. */
static uint64_t missing_forms(struct om_block *const *blocks, size_t count)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < count; i++)
		if (missing_form(blocks[i]))
			bytes += om_block_host_bytes(missing_form(blocks[i]));
	return bytes;
}

static bool missing(const struct om_block *b, bool ahead)
{
	return b->host == OM_COPY_NONE && !(ahead && om_block_coded(b));
}

static uint64_t missing_blocks(struct om_block *const *blocks, size_t count, bool ahead)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < count; i++)
		if (missing(blocks[i], ahead))
			bytes += om_block_host_bytes(blocks[i]);
	return bytes;
}

uint64_t om_fetch_missing_bytes(struct om_block *const *blocks, size_t count, bool ahead)
{
	return missing_forms(blocks, count) + missing_blocks(blocks, count, ahead);
}

int om_fetch_reserve_locked(struct om_store *s, const struct om_group *g, uint64_t bytes,
                            struct om_extent *ret)
{
	uint64_t room = OM_MAX(om_pool_room(&s->pool), bytes), most = 0;
	int code;

	/* An extent may be larger than asked for, so that a cached segment can be used whole; not where a limit was
	 * planned to the page. Units of a ring have segments of their own, which follow each other in the same pages. */
	if (bytes > OM_POOL_SMALL || (g->streams && !g->mixed))
		most = g->limit_bytes || g->cache ? bytes : OM_MIN(room, bytes + bytes / 4);
	code = om_pool_alloc(&s->pool, bytes, most, ret);
	if (!code && g->cache)
		om_shed_trim_locked(s, g, bytes);
	return code;
}

static int start_one_locked(struct om_store *s, struct om_block *b, enum om_move_priority priority,
                            struct om_extent mem)
{
	struct om_move *m;
	int code;

	om_block_fill_begin(b, mem);
	code = om_move_create_fill(b, &s->disk, s->request_bytes, priority, &m);
	if (code) {
		om_block_fill_fail(b, &s->pool);
		return code;
	}
	om_meter_peak_locked(s);
	m->want_hash = hash_wanted(s, b);
	m->ahead = m->speculative = priority == OM_PREFETCH;
	if (om_block_coded(b) && (code = om_decode_begin_locked(s, m, om_block_coded(b)))) {
		om_move_unref(m);
		om_block_fill_fail(b, &s->pool);
		return code;
	}
	s->counters.prefetches += m->speculative;
	b->body->move = m;
	s->moves++;
	s->meter.counts.in_begun_bytes += m->bytes;
	if (m->decoding)
		m->ahead = om_decode_reads(m) && om_decode_reads(m)->ahead;
	else if (!m->zeros)
		om_mover_queue_locked(s, m);
	else if (priority == OM_DEMAND)
		m->landed = true; /* who needs it makes the zeros */
	else
		om_fetch_landed_locked(s, m);
	return 0;
}

/* Cut the first `bytes` off an extent; all of it when nothing is left to follow. */
static struct om_extent cut(struct om_extent *rest, uint64_t bytes, bool last)
{
	struct om_extent part = *rest;

	if (last) {
		rest->segment = NULL;
		return part;
	}
	part.bytes = bytes;
	rest->ptr = (char *)rest->ptr + bytes;
	rest->bytes -= bytes;
	return part;
}

/* Do blocks of a request get one extent, cut into parts? Those that are used together share a slot of a ring. What
 * lies in a shared segment cannot be cut, and what goes block by block would keep the segment of the others. */
static bool together(const struct om_group *g, uint64_t bytes)
{
	return (g->streams && !g->mixed) || (bytes > OM_POOL_SMALL && !g->apart);
}

static int start_some_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                             enum om_move_priority priority)
{
	bool ahead = priority == OM_PREFETCH;
	uint64_t left = missing_blocks(blocks, count, ahead);
	const struct om_group *g = blocks[0]->group;
	bool one = together(g, left);
	struct om_extent rest = { 0 };
	int code = left && one ? om_fetch_reserve_locked(s, g, left, &rest) : 0;

	for (size_t i = 0; i < count && !code; i++) {
		uint64_t bytes = om_block_host_bytes(blocks[i]);

		if (!missing(blocks[i], ahead))
			continue;
		left -= bytes;
		if (!one)
			code = om_fetch_reserve_locked(s, g, bytes, &rest);
		if (!code)
			code = start_one_locked(s, blocks[i], priority,
			                        cut(&rest, bytes, !one || !left));
	}
	om_pool_free(&s->pool, &rest);
	return code == OM_ELIMIT ? OM_EAGAIN : code;
}

int om_fetch_start_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                          enum om_move_priority priority)
{
	bool ahead = priority == OM_PREFETCH;
	struct om_block *form;
	int code = 0;

	if (!om_fetch_missing_bytes(blocks, count, ahead))
		return 0;
	if (s->closing)
		return om_err(OM_ECLOSED, "the store is closed");
	for (size_t i = 0; i < count; i++)
		if (!blocks[i]->named)
			return om_err(OM_ENAME, "block '%s' was removed", blocks[i]->name);
	for (size_t i = 0; i < count && !code; i++) /* forms go sooner than what they decode to */
		if ((form = missing_form(blocks[i])))
			code = start_some_locked(s, &form, 1, priority);
	return code ? code : start_some_locked(s, blocks, count, priority);
}

static void settle_locked(struct om_store *s, struct om_move *m)
{
	struct om_block *b = m->block;

	m->settled = true;
	b->body->move = NULL;
	s->moves--;
	*(m->kind == OM_MOVE_FILL ? &s->meter.counts.in_ended_bytes
	                          : &s->meter.counts.out_ended_bytes) += m->bytes;
	if (m->decoding)
		om_decode_end_locked(s, m);
	om_store_changed_locked(s);
	om_store_reap_locked(s, b);
	om_move_unref(m);
}

void om_fetch_fail_locked(struct om_store *s, struct om_move *m)
{
	if (!m->error->code) {
		om_err(OM_ECANCELED, "block '%s': the fill was canceled", m->block->name);
		om_move_fail(m);
	}
	om_block_lose_leases(m->block);
	om_block_fill_fail(m->block, &s->pool);
	settle_locked(s, m);
}

static void land_spill_locked(struct om_store *s, struct om_move *m)
{
	struct om_block *b = m->block;

	if (m->error->code) {
		s->spills_failed++;
		s->spill_error = *m->error;
		om_guard_stuck_locked(s);
		om_block_disk_drop(b, &s->disk);
		if (b->host == OM_COPY_LEAVING)
			om_block_leave_rescue(b);
	} else {
		om_block_disk_end(b);
		b->body->hash = m->hash;
		b->body->hash_known = true;
		b->body->verified = false;
		s->counters.writes++;
		if (b->body->touched || m->shown) { /* maybe written to while it was being read */
			om_block_disk_drop(b, &s->disk);
			if (b->host == OM_COPY_LEAVING)
				om_block_leave_rescue(b);
		} else if (b->host == OM_COPY_LEAVING) {
			om_meter_gone_locked(s, b, (enum om_reason)m->reason);
			om_traffic_note_locked(s, b, OM_EVENT_OUT, m->bytes, m->began_ns);
			om_block_host_drop(b, &s->pool);
		}
	}
	settle_locked(s, m);
}

struct finish_job {
	struct om_job job;
	struct om_store *store;
	struct om_move *move;
};

static bool finish_for_nobody(struct om_job *job)
{
	struct finish_job *f = om_container_of(job, struct finish_job, job);
	struct om_store *s = f->store;
	bool more;

	om_mutex_lock(&s->lock);
	more = !s->closing && om_fetch_work_locked(s, f->move);
	if (!more)
		om_move_unref(f->move);
	om_mutex_unlock(&s->lock);
	if (!more)
		om_free(f);
	return more;
}

/* Without memory for the job the work is the caller's alone, or of who comes next. */
void om_fetch_share_locked(struct om_store *s, struct om_move *m)
{
	struct finish_job *f = s->closing ? NULL : om_alloc(1, sizeof(*f));

	if (!f)
		return;
	f->job.run = finish_for_nobody;
	f->store = s;
	f->move = m;
	om_move_ref(m);
	om_work_push(&s->work, &f->job);
}

/* A whole fill that nobody waits for goes to the worker. */
static void offer_locked(struct om_store *s, struct om_move *m)
{
	if (!m->settled && m->landed && !m->waiters && !m->block->group->streams)
		om_fetch_share_locked(s, m);
}

void om_fetch_landed_locked(struct om_store *s, struct om_move *m)
{
	if (m->settled)
		return;
	if (m->kind == OM_MOVE_SPILL) {
		land_spill_locked(s, m);
		return;
	}
	m->landed = true;
	if (m->busy)
		return; /* who is busy looks again */
	if (m->error->code || m->canceled)
		om_fetch_fail_locked(s, m);
	else
		offer_locked(s, m);
}

void om_fetch_cancel_locked(struct om_store *s, struct om_block *b)
{
	struct om_move *m = b->body ? b->body->move : NULL;

	if (!m || m->kind != OM_MOVE_FILL || m->canceled || b->leases)
		return;
	__atomic_store_n(&m->canceled, true, __ATOMIC_RELAXED);
	s->counters.prefetch_waste += m->speculative;
	om_list_del(&m->link);
	if (!m->inflight)
		om_fetch_landed_locked(s, m);
}

void om_fetch_filled_locked(struct om_store *s, struct om_move *m)
{
	struct om_block *b = m->block;

	if (!m->zeros)
		om_traffic_note_locked(s, b, OM_EVENT_IN, m->bytes, m->began_ns);
	s->meter.counts.repaired += m->attempt > 0;
	om_block_fill_end(b);
	b->body->unused = m->speculative;
	s->counters.fills++;
	settle_locked(s, m);
}

/* Everything is read and taken: compare, and make the copy VALID. */
static void prove_locked(struct om_store *s, struct om_move *m, int files_code, uint64_t digest)
{
	struct om_block *b = m->block;

	if (files_code) {
		om_move_fail(m);
		om_fetch_fail_locked(s, m);
		return;
	}
	if (m->want_hash) {
		s->counters.verified_bytes += b->nbytes;
		if (b->body->hash_known && b->body->hash != digest) {
			s->counters.corrupt++;
			if (!m->attempt++) {
				s->counters.rereads++;
				om_mover_queue_locked(s, m);
				return;
			}
			om_err(OM_ECORRUPT,
			       "block '%s': %llu bytes read twice from %s differ from those stored (XXH3 %016llx, "
			       "stored %016llx); the file or the disk is damaged",
			       b->name, (unsigned long long)b->nbytes,
			       m->piece_count ? m->pieces[0].file->path : "nowhere",
			       (unsigned long long)digest, (unsigned long long)b->body->hash);
			if (m->piece_count)
				om_err_file(m->pieces[0].file->path);
			om_move_fail(m);
			om_fetch_fail_locked(s, m);
			return;
		}
		b->body->verified = b->body->hash_known;
		b->body->hash_known = true;
		b->body->hash = digest;
	}
	om_fetch_filled_locked(s, m);
}

static struct om_cursor take_target(const struct om_move *m)
{
	struct om_cursor to = m->ready;

	if (to.piece == m->taken.piece && to.done - m->taken.done > TAKE_STEP)
		to.done = m->taken.done + TAKE_STEP;
	return to;
}

bool om_fetch_work_locked(struct om_store *s, struct om_move *m)
{
	bool behind = (m->want_hash || m->displaced) &&
	              (m->taken.piece != m->ready.piece || m->taken.done != m->ready.done);
	struct om_cursor to = take_target(m);
	uint64_t digest = 0;
	int code = 0;

	if (m->decoding)
		return om_decode_work_locked(s, m);
	if (m->settled || m->busy || m->kind != OM_MOVE_FILL || (!behind && !m->landed))
		return false;
	m->busy = true;
	om_move_ref(m);
	om_mutex_unlock(&s->lock);
	if (behind) {
		om_move_take(m, &to);
	} else {
		if (m->zeros)
			memset(m->block->body->data, 0, m->block->nbytes);
		code = om_move_check_files(m);
		digest = om_move_digest(m);
	}
	om_mutex_lock(&s->lock);
	m->busy = false;
	if (behind)
		m->taken = to;
	if (m->landed && (m->error->code || m->canceled))
		om_fetch_fail_locked(s, m);
	else if (!behind)
		prove_locked(s, m, code, digest);
	om_store_changed_locked(s);
	om_move_unref(m);
	return true;
}

int om_fetch_settle_locked(struct om_store *s, struct om_move *m, uint64_t deadline_ns)
{
	int code = 0;

	struct om_move *read = om_decode_reads(m);

	om_move_ref(m);
	om_move_ref(read);
	m->waiters++;
	if (read)
		read->waiters++;
	while (!m->settled && !code) {
		if (s->closing)
			code = om_err(OM_ECLOSED, "the store was closed while block '%s' moved",
			              m->block->name);
		else if (om_fetch_work_locked(s, m))
			continue;
		else if (om_now() >= deadline_ns)
			code = om_err(OM_EBUSY,
			              "block '%s': still moving at the deadline (%llu bytes)",
			              m->block->name, (unsigned long long)m->bytes);
		else
			om_store_wait_locked(s, deadline_ns);
	}
	m->waiters--;
	if (read) {
		read->waiters--;
		offer_locked(s, read);
		om_move_unref(read);
	}
	if (m->settled)
		code = m->error->code ? om_err_set(m->error) : 0;
	else
		offer_locked(s, m);
	om_move_unref(m);
	return code;
}
