/*
 * om_mover: the one thread that owns the I/O ring.
 *
 * It slides a window of requests over the moves that are queued (demand before prefetch before
 * spills), never hashes, and never runs a callback. It creates the back end itself, since a ring
 * belongs to the thread that made it. Requests of one move go out in the order of its plan; a fill
 * into fresh memory waits for the worker that faults its pages in, and other moves pass it.
 * A failed request fails its move once everything of it is back.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/om_store_int.h"
#include "plat/om_dev.h"

#define MAX_DEPTH     256u
#define POPULATE_STEP (UINT64_C(2) * OM_MIB)
#define DECAY_NS      (10 * OM_NSEC)

struct slot {
	struct om_io_req req;
	struct om_move *move;
	uint32_t index;  /* of the request in its move */
	void *bounce;    /* a spill of foreign memory: an aligned copy */
	uint32_t length; /* bytes that count */
	uint64_t began_ns;
	struct slot *next_free;
};

struct mover {
	struct om_store *store;
	struct slot *slots;
	struct slot *free;
	unsigned depth, inflight, spilling, reading;
	struct om_io_req *back[MAX_DEPTH];
};

static void wake_locked(struct om_store *s)
{
	if (s->io)
		om_io_wake(s->io);
}

/* ---- pages ahead of reads ---- */

struct populate_job {
	struct om_job job;
	struct om_store *store;
	struct om_segment *segment;
	struct om_move *move;
};

/* A step of a segment; the steps follow each other, segments can be faulted in side by side. */
static bool populate(struct om_job *job)
{
	struct populate_job *p = om_container_of(job, struct populate_job, job);
	struct om_segment *seg = p->segment;
	struct om_store *s = p->store;
	uint64_t at = __atomic_load_n(&seg->populated, __ATOMIC_RELAXED);

	if (at < seg->bytes && !__atomic_load_n(&s->closing, __ATOMIC_RELAXED) &&
	    !__atomic_load_n(&p->move->canceled, __ATOMIC_RELAXED)) {
		uint64_t bytes = OM_MIN(POPULATE_STEP, seg->bytes - at);

		if (om_host_populate((char *)seg->base + at, bytes))
			bytes = seg->bytes - at; /* the reads fault the pages, or fail and say so */
		at += bytes;
		/* Either the mover sees these pages, or this thread sees that it waits for them. */
		__atomic_store_n(&seg->populated, at, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&s->starved, __ATOMIC_SEQ_CST)) {
			om_mutex_lock(&s->lock); /* at close the mover takes its back end away */
			wake_locked(s);
			om_mutex_unlock(&s->lock);
		}
		if (at < seg->bytes)
			return true;
	}
	om_mutex_lock(&s->lock);
	seg->populating = false;
	if (at < seg->bytes) /* another move into this segment may still want the rest */
		wake_locked(s);
	om_move_unref(p->move);
	om_mutex_unlock(&s->lock);
	om_segment_unref(seg);
	om_free(p);
	return false;
}

/* Have the pages of a fresh segment faulted in; without memory for the job the reads fault them. The
 * mover asks for them, not the thread that starts the fill: that one may be about to map more memory,
 * and faulting and mapping wait for each other in the kernel. */
static void populate_ahead_locked(struct om_store *s, struct om_move *m)
{
	struct om_segment *seg = m->block->body->mem.segment;
	struct populate_job *p;

	if (seg->populating)
		return;
	p = om_alloc(1, sizeof(*p));
	if (!p) {
		__atomic_store_n(&seg->populated, seg->bytes, __ATOMIC_RELEASE);
		return;
	}
	p->job.run = populate;
	p->store = s;
	p->segment = seg;
	p->move = m;
	seg->populating = true;
	om_segment_ref(seg);
	om_move_ref(m);
	om_work_push(&s->work, &p->job);
	om_store_changed_locked(s); /* who waits can help */
}

static bool pages_there(const struct om_move *m, uint32_t length)
{
	const struct om_piece *piece = &m->pieces[m->issued.piece];
	struct om_segment *seg = m->block->body->mem.segment;
	uint64_t end;

	if (m->kind != OM_MOVE_FILL || seg->arena)
		return true;
	end = (uint64_t)(piece->mem + m->issued.done + length - (uint8_t *)seg->base);
	return end <= __atomic_load_n(&seg->populated, __ATOMIC_SEQ_CST);
}

/* ---- issuing ---- */

static void settle_error_locked(struct om_store *s, struct om_move *m)
{
	om_move_fail(m);
	om_list_del(&m->link);
	if (!m->inflight)
		om_fetch_landed_locked(s, m);
}

/* Something of a move is back: one that failed or was canceled issues nothing more. */
static void come_back_locked(struct om_store *s, struct om_move *m)
{
	m->inflight--;
	if (m->error->code || m->canceled)
		om_list_del(&m->link);
	if (!m->inflight && om_list_empty(&m->link))
		om_fetch_landed_locked(s, m);
}

/* Counts as in flight, so that the block and its files stay when the move is canceled meanwhile. */
static void check_files_locked(struct om_store *s, struct om_move *m)
{
	int code;

	m->inflight++;
	om_mutex_unlock(&s->lock);
	code = om_move_check_files(m);
	om_mutex_lock(&s->lock);
	m->checked = true;
	if (code)
		om_move_fail(m);
	come_back_locked(s, m);
}

static bool prepare_bounce(struct slot *slot, const struct om_move *m, const struct om_piece *p)
{
	uint64_t at = m->issued.done,
		 wanted = at < p->nbytes ? OM_MIN(p->nbytes - at, slot->length) : 0;

	if (om_fault(OM_FAULT_ALLOC) || posix_memalign(&slot->bounce, OM_PAGE, slot->length)) {
		om_err(-ENOMEM, "no memory for a bounce buffer of %u bytes", slot->length);
		return false;
	}
	om_racy_reads_begin();
	memcpy(slot->bounce, p->mem + at, wanted);
	om_racy_reads_end();
	memset((char *)slot->bounce + wanted, 0, slot->length - wanted);
	return true;
}

/* Put the move's next request into a slot and submit it. */
static bool issue_locked(struct mover *mv, struct om_move *m, uint32_t length)
{
	const struct om_piece *p = &m->pieces[m->issued.piece];
	struct slot *slot = mv->free;
	uint64_t exists = p->exists - m->issued.done;

	slot->length = length;
	slot->bounce = NULL;
	if (m->kind == OM_MOVE_SPILL && m->block->body->foreign && !prepare_bounce(slot, m, p)) {
		settle_error_locked(mv->store, m);
		return false;
	}
	mv->free = slot->next_free;
	slot->move = m;
	slot->index = m->issue_index++;
	slot->req = (struct om_io_req){
		.file = p->file,
		.write = m->kind == OM_MOVE_SPILL,
		.buf = slot->bounce ? slot->bounce : p->mem + m->issued.done,
		.len = length,
		.need = (uint32_t)OM_MIN(exists, length),
		.offset = p->offset + m->issued.done,
	};
	slot->began_ns = om_now();
	om_move_ref(m);
	m->inflight++;
	mv->inflight++;
	mv->store->counters.in_flight = mv->inflight;
	if (slot->req.write && !mv->spilling++)
		mv->store->write_since_ns = slot->began_ns;
	else if (!slot->req.write && !mv->reading++)
		mv->store->read_since_ns = slot->began_ns;
	om_move_step(m, &m->issued);
	if (!om_move_request(m, &m->issued))
		om_list_del(&m->link);
	om_io_submit(mv->store->io, &slot->req);
	return true;
}

/* Beside reads, writes get half of the window, so that one that comes does not wait behind all of them. */
static unsigned writes_at_most(const struct mover *mv)
{
	return mv->reading ? (mv->depth + 1) / 2 : mv->depth;
}

/* One request of the first move that can go on; false when none can. */
static bool issue_next_locked(struct mover *mv)
{
	struct om_store *s = mv->store;

	__atomic_store_n(&s->starved, false, __ATOMIC_RELAXED);
	for (int priority = 0; priority < OM_PRIORITIES; priority++) {
		OM_LIST_FOREACH_SAFE(link, &s->queue[priority]) {
			struct om_move *m = om_container_of(link, struct om_move, link);
			uint32_t length = om_move_request(m, &m->issued);

			if (m->kind == OM_MOVE_SPILL && mv->spilling >= writes_at_most(mv))
				continue;
			if (!m->checked) {
				check_files_locked(s, m); /* the lock was given up: look again */
				return true;
			}
			if (!length) { /* nothing to move */
				om_list_del(&m->link);
				om_fetch_landed_locked(s, m);
				om_store_changed_locked(s);
				return true;
			}
			if (!pages_there(m, length)) {
				populate_ahead_locked(s, m);
				__atomic_store_n(&s->starved, true, __ATOMIC_SEQ_CST);
				if (!pages_there(m, length))
					continue;
			}
			issue_locked(mv, m, length);
			return true;
		}
	}
	return false;
}

/* ---- completion ---- */

static void count_io(struct mover *mv, const struct slot *slot)
{
	struct om_store *s = mv->store;
	uint64_t now = om_now();

	om_latency_add(slot->req.write ? &s->write_latency : &s->read_latency,
	               now - slot->began_ns);
	if (slot->req.write) {
		if (!--mv->spilling)
			s->counters.write_busy_ns += now - s->write_since_ns;
		if (!slot->req.code)
			s->counters.written_bytes += slot->length;
		return;
	}
	if (!--mv->reading)
		s->counters.read_busy_ns += now - s->read_since_ns;
	if (!slot->req.code) {
		s->counters.read_bytes += slot->length;
		slot->move->block->group->read_bytes += slot->length;
	}
}

static void describe_error(const struct slot *slot)
{
	const struct om_io_req *r = &slot->req;
	const char *verb = r->write ? "write" : "read";

	if (r->write && (r->code == -ENOSPC || r->code == -EDQUOT || r->code == -EFBIG))
		om_err(OM_EDISKFULL,
		       "block '%s': no room on disk writing %u bytes at offset %llu of %s: %s; free some "
		       "space or lower disk_limit (the bytes are still in memory)",
		       slot->move->block->name, r->len, (unsigned long long)r->offset,
		       r->file->path, om_err_text(r->code));
	else if (r->code == -ENODATA)
		om_err(OM_ECORRUPT,
		       "block '%s': %s ended before offset %llu (need %u bytes at %llu): the file was "
		       "truncated",
		       slot->move->block->name, r->file->path,
		       (unsigned long long)(r->offset + r->need), r->need,
		       (unsigned long long)r->offset);
	else
		om_err(r->code, "block '%s': cannot %s %u bytes at offset %llu of %s: %s",
		       slot->move->block->name, verb, r->len, (unsigned long long)r->offset,
		       r->file->path, om_err_text(r->code));
	om_err_file(r->file->path);
}

static void complete_locked(struct mover *mv, struct slot *slot)
{
	struct om_move *m = slot->move;
	struct om_store *s = mv->store;

	count_io(mv, slot);
	free(slot->bounce);
	s->counters.in_flight = --mv->inflight;
	m->back[slot->index] = 1;
	if (slot->req.code) {
		om_meter_failed_locked(s, slot->req.write, slot->req.code);
		describe_error(slot);
		om_move_fail(m);
	}
	while (m->ready_index < m->issue_index && m->back[m->ready_index] && !m->error->code) {
		m->ready_index++;
		om_move_step(m, &m->ready);
	}
	come_back_locked(s, m);
	om_move_unref(m);
	slot->next_free = mv->free;
	mv->free = slot;
}

/* ---- the thread ---- */

static bool mover_init(struct mover *mv)
{
	struct om_store *s = mv->store;
	struct om_io *io = NULL;

	mv->depth = s->io_config.depth;
	mv->slots = om_alloc(mv->depth, sizeof(*mv->slots));
	s->mover_code = mv->slots ? om_io_create(&s->io_config, &io) : -ENOMEM;
	if (s->mover_code)
		s->mover_error = *om_err_last();
	for (unsigned i = 0; mv->slots && i < mv->depth; i++) {
		mv->slots[i].next_free = mv->free;
		mv->free = &mv->slots[i];
	}
	om_mutex_lock(&s->lock);
	s->io = io;
	s->mover_ready = true;
	om_cond_broadcast(&s->changed);
	om_mutex_unlock(&s->lock);
	return s->mover_code == 0;
}

static unsigned least_back(const struct mover *mv)
{
	/* A full window is refilled a quarter at a time: one wake-up of this thread for several
	 * requests, since each one takes a core from the model's threads. */
	if (mv->inflight == mv->depth)
		return OM_MAX(1u, mv->depth / 4);
	return mv->inflight ? 1 : 0;
}

struct shrink_job {
	struct om_job job;
	struct om_store *store;
};

static bool shrink(struct om_job *job)
{
	struct om_store *s = om_container_of(job, struct shrink_job, job)->store;

	om_mutex_lock(&s->lock);
	om_spill_shrink_locked(s);
	om_mutex_unlock(&s->lock);
	om_free(om_container_of(job, struct shrink_job, job));
	return false;
}

/* What is free in the swap file goes back a while after it became so much. */
static uint64_t decay_disk_locked(struct om_store *s)
{
	struct shrink_job *j;

	if (!om_disk_wasteful(&s->disk)) {
		s->disk_idle_ns = 0;
		return UINT64_MAX;
	}
	if (!s->disk_idle_ns)
		s->disk_idle_ns = om_now();
	if (s->disk_idle_ns + DECAY_NS > om_now())
		return s->disk_idle_ns + DECAY_NS;
	s->disk_idle_ns = 0;
	j = om_alloc(1, sizeof(*j));
	if (j) {
		j->job.run = shrink;
		j->store = s;
		om_work_push(&s->work, &j->job);
	}
	return UINT64_MAX;
}

/* Memory that no block has used for a while goes back, but for a warm reserve. A ring's slots wait for its
 * next unit, however long its user pauses. Returns when to look again. */
static uint64_t decay_memory_locked(struct om_store *s)
{
	struct om_pool *p = &s->pool;
	uint64_t oldest = om_pool_oldest(p);

	if (p->cached_bytes <= OM_POOL_WARM)
		return UINT64_MAX;
	OM_LIST_FOREACH(link, &s->groups) {
		const struct om_group *g = om_container_of(link, struct om_group, link);

		if (g->streams > g->lingering)
			return om_now() + DECAY_NS;
	}
	if (oldest + DECAY_NS > om_now())
		return oldest + DECAY_NS;
	om_pool_trim(p, OM_POOL_WARM, UINT64_MAX);
	return UINT64_MAX;
}

static uint64_t decay_locked(struct om_store *s)
{
	uint64_t until = OM_MIN(decay_memory_locked(s), decay_disk_locked(s));

	s->decaying = until != UINT64_MAX;
	return until;
}

void om_mover_decay_locked(struct om_store *s)
{
	s->decaying = true;
	wake_locked(s);
}

static void *mover_run(void *arg)
{
	struct mover mv = { .store = arg };
	struct om_store *s = arg;
	struct om_io *io = NULL;
	bool ready = mover_init(&mv);

	while (ready) {
		unsigned count;
		uint64_t until;

		om_mutex_lock(&s->lock);
		om_store_drain_locked(s);
		while (!s->closing && mv.free && issue_next_locked(&mv))
			;
		until = decay_locked(s);
		if (s->closing && !mv.inflight) {
			io = s->io;
			s->io = NULL; /* nobody wakes it from here on */
			om_mutex_unlock(&s->lock);
			break;
		}
		om_mutex_unlock(&s->lock);
		count = om_io_reap(s->io, mv.back, mv.depth, OM_MAX(1u, least_back(&mv)), until);
		if (!count)
			continue;
		om_mutex_lock(&s->lock);
		for (unsigned i = 0; i < count; i++)
			complete_locked(&mv, om_container_of(mv.back[i], struct slot, req));
		om_store_changed_locked(s);
		om_mutex_unlock(&s->lock);
	}
	om_io_destroy(io);
	om_free(mv.slots);
	return NULL;
}

int om_mover_start(struct om_store *s)
{
	int code;

	for (int i = 0; i < OM_PRIORITIES; i++)
		om_list_init(&s->queue[i]);
	code = om_work_start(&s->work);
	if (code)
		return code;
	code = om_thread_start(&s->mover_thread, "omnimem-mover", mover_run, s);
	if (code) {
		om_work_stop(&s->work);
		om_work_fini(&s->work);
		return code;
	}
	s->mover_started = true;
	om_mutex_lock(&s->lock);
	while (!s->mover_ready)
		om_cond_wait(&s->changed, &s->lock, UINT64_MAX);
	om_mutex_unlock(&s->lock);
	if (!s->mover_code)
		return 0;
	pthread_join(s->mover_thread, NULL);
	s->mover_started = false;
	om_work_stop(&s->work);
	om_work_fini(&s->work);
	return om_err_set(&s->mover_error);
}

void om_mover_stop(struct om_store *s)
{
	if (!s->mover_started)
		return;
	om_work_stop(&s->work); /* first: its jobs wake the back end */
	om_mutex_lock(&s->lock);
	wake_locked(s);
	om_mutex_unlock(&s->lock);
	pthread_join(s->mover_thread, NULL);
	s->mover_started = false;
}

void om_mover_queue_locked(struct om_store *s, struct om_move *m)
{
	om_move_rewind(m);
	om_list_push_tail(&s->queue[m->priority], &m->link);
	wake_locked(s);
}

void om_mover_promote_locked(struct om_store *s, struct om_move *m)
{
	if (!m || m->priority != OM_PREFETCH)
		return;
	m->priority = OM_DEMAND;
	if (!om_list_empty(&m->link)) {
		om_list_del(&m->link);
		om_list_push_tail(&s->queue[OM_DEMAND], &m->link);
		wake_locked(s);
	}
}
