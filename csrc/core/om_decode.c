/*
 * om_decode: fills from an encoded form: what om_codec made, one frame or several back to back.
 *
 * The form is a block of its own (om_pack.c). The move leases it as long as it lives. Once its bytes are
 * in HOST, and proven if they were read, whoever waits for the move decodes them, some parts at a time,
 * without the store lock. Several threads may share a move: each takes the next parts; the one that
 * finishes last settles it. For a stream, whose user computes next, all of them go to the team that it
 * computes with (om_team.h); else the store's worker helps. (Measured on two cores, a layer of 100 MB,
 * then its matmuls of 5 ms: 8.2 ms alone, 6.2 with the worker, 4.4 with the team.)
 *
 * The first time a form is decoded, the plain bytes are compared with the checksum that each frame carries.
 * Later on they are not: what is read from a disk is compared as any fill is, before it is decoded, and
 * decoding the same bytes gives the same bytes. A form that cannot be decoded is OM_ECORRUPT; nothing is
 * dropped then.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_hash.h"
#include "core/om_store_int.h"
#include "plat/om_team.h"

#define FEW_FRAMES 4u
#define STEP \
	4u /* parts at a time: long enough to be worth taking the lock, short enough to share */

struct frame {
	struct om_coded coded;
	uint64_t at;    /* of its first plain byte in the block */
	uint64_t first; /* of its parts, counted over all frames */
};

struct om_decoding {
	struct om_block *from; /* the form: a reference, and a lease unless `read` has failed */
	struct om_move *read;  /* what brings the form to HOST; NULL: it was there */
	struct frame *frames;  /* of whoever opens it, until it is `opened` */
	size_t frame_count;
	uint64_t taken, parts; /* parts that are decoded or being decoded, and all there are */
	unsigned threads;      /* that are at work without the lock */
	bool opened;           /* the headers are read; seen under the lock only */
	uint64_t began_ns;     /* its bytes were here */
	bool on_team;          /* decoded at one go, by the team of whoever begins */
};

void om_decode_free(struct om_decoding *d)
{
	if (d)
		om_free(d->frames);
	om_free(d);
}

int om_decode_begin_locked(struct om_store *s, struct om_move *m, struct om_block *from)
{
	struct om_decoding *d = om_alloc(1, sizeof(*d));

	if (!d)
		return -ENOMEM;
	if (from->host == OM_COPY_LEAVING)
		om_block_leave_rescue(from);
	om_block_ref(from);
	om_block_lease(from);
	d->from = from;
	s->counters.prefetch_hits += from->body->unused;
	from->body->unused = false;
	if (from->host == OM_COPY_FILLING) {
		d->read = from->body->move;
		om_move_ref(d->read);
		s->counters.prefetch_hits += d->read->speculative;
		d->read->speculative = false;
	}
	m->want_hash = !m->block->body->verified;
	m->decoding = d;
	return 0;
}

struct om_move *om_decode_reads(const struct om_move *m)
{
	return m->decoding ? m->decoding->read : NULL;
}

static bool form_lost(const struct om_decoding *d)
{
	return d->read && d->read->settled && d->read->error->code;
}

void om_decode_end_locked(struct om_store *s, struct om_move *m)
{
	struct om_decoding *d = m->decoding;

	if (!d->from)
		return;
	if (!form_lost(d)) {
		om_fetch_unlease_locked(s, d->from);
		if (!m->error->code && !om_list_empty(&d->from->all))
			om_pack_give_up_locked(s, d->from);
	}
	om_move_unref(d->read);
	om_block_unref(d->from);
	d->read = NULL;
	d->from = NULL;
}

/* ---- the work ---- */

static int form_error(const struct om_move *m, const char *what)
{
	return om_err(OM_ECORRUPT, "block '%s': its encoded form, %llu bytes, %s", m->block->name,
	              (unsigned long long)m->decoding->from->nbytes, what);
}

/* With the codec's reason. */
static int codec_error(const struct om_move *m)
{
	char what[OM_ERROR_TEXT];

	snprintf(what, sizeof(what), "cannot be decoded: %.500s", om_err_last()->text);
	return form_error(m, what);
}

/* A longer array with the same frames; frees the old one. NULL: there is no memory. */
static struct frame *grow(struct frame *frames, size_t count, size_t room)
{
	struct frame *more = om_alloc(room, sizeof(*more));

	if (more && count)
		memcpy(more, frames, count * sizeof(*more));
	om_free(frames);
	return more;
}

/* Read the headers. No lock. */
static int open_frames(struct om_move *m)
{
	struct om_decoding *d = m->decoding;
	const uint8_t *data = d->from->body->data;
	uint64_t left = d->from->nbytes, at = 0, parts = 0;
	size_t room = FEW_FRAMES, n = 0;
	struct frame *frames = om_alloc(room, sizeof(*frames));

	while (left && frames && at <= m->block->nbytes) {
		struct om_coded coded;

		if (om_coded_open(data, left, &coded)) {
			om_free(frames);
			return codec_error(m);
		}
		if (n == room)
			frames = grow(frames, n, room *= 2);
		if (!frames)
			break;
		frames[n++] = (struct frame){ coded, at, parts };
		at += coded.nbytes;
		parts += coded.parts;
		data += coded.bytes;
		left -= coded.bytes;
	}
	if (!frames)
		return -ENOMEM;
	if (at != m->block->nbytes) {
		om_free(frames);
		return form_error(m, "holds another number of plain bytes than the block");
	}
	d->frames = frames;
	d->frame_count = n;
	d->parts = parts;
	return 0;
}

/* Parts [first, last), over all frames. No lock. */
static int decode_parts(struct om_move *m, uint64_t first, uint64_t last)
{
	const struct om_decoding *d = m->decoding;
	uint8_t *plain = m->block->body->data;

	for (size_t i = 0; i < d->frame_count && first < last; i++) {
		const struct frame *f = &d->frames[i];
		uint64_t end = OM_MIN(last, f->first + f->coded.parts);

		if (first >= end)
			continue;
		if (om_coded_part(&f->coded, first - f->first, end - first, plain + f->at))
			return codec_error(m);
		first = end;
	}
	return 0;
}

/* What the threads of a team share. */
struct shared {
	struct om_move *move;
	uint64_t next; /* atomic */
	int code;      /* atomic: of whoever failed last */
};

static void decode_shared(void *arg)
{
	struct shared *share = arg;
	uint64_t parts = share->move->decoding->parts, first;

	while ((first = __atomic_fetch_add(&share->next, STEP, __ATOMIC_RELAXED)) < parts) {
		int code = decode_parts(share->move, first, OM_MIN(first + STEP, parts));

		if (code)
			__atomic_store_n(&share->code, code, __ATOMIC_RELAXED);
	}
}

static int decode_on_team(struct om_move *m)
{
	struct shared share = { .move = m };

	om_team_run(decode_shared, &share);
	if (share.code) /* the error may be another thread's: find it again */
		return decode_parts(m, 0, m->decoding->parts);
	return 0;
}

/* Compare the plain bytes with the checksums of the frames, and know their hash. No lock. */
static int prove(struct om_move *m)
{
	const struct om_decoding *d = m->decoding;
	const struct om_body *body = m->block->body;

	if (!m->want_hash)
		return 0;
	for (size_t i = 0; i < d->frame_count; i++)
		if (om_coded_check(&d->frames[i].coded, body->data + d->frames[i].at))
			return form_error(m, "was decoded to other bytes than were encoded");
	m->hash = d->frame_count == 1 ? d->frames[0].coded.hash
	                              : om_hash(body->data, m->block->nbytes);
	if (body->hash_known && body->hash != m->hash)
		return form_error(m, "was decoded to other bytes than were encoded");
	return 0;
}

static void succeed_locked(struct om_store *s, struct om_move *m)
{
	struct om_block *b = m->block;

	if (!m->want_hash) {
		b->group->timed_bytes += b->nbytes;
		b->group->timed_ns += om_now() - m->decoding->began_ns;
	} else {
		b->body->hash = m->hash;
		b->body->hash_known = b->body->verified = true;
		s->counters.verified_bytes += b->nbytes;
	}
	b->group->decoded_bytes += b->nbytes;
	s->meter.counts.decode_ns += om_now() - m->decoding->began_ns;
	om_fetch_filled_locked(s, m);
}

/* Settle if nothing is left to do and nobody is at work. */
static void conclude_locked(struct om_store *s, struct om_move *m, bool proven)
{
	m->busy = m->decoding->threads > 0;
	if (m->busy || m->settled)
		return;
	if (m->error->code || m->canceled)
		om_fetch_fail_locked(s, m);
	else if (proven)
		succeed_locked(s, m);
}

enum step { OPEN, DECODE, PROVE };

static int work_unlocked(struct om_move *m, enum step step, uint64_t first, uint64_t last)
{
	if (step == OPEN)
		return open_frames(m);
	if (step == DECODE)
		return m->decoding->on_team ? decode_on_team(m) : decode_parts(m, first, last);
	return prove(m);
}

static void step_locked(struct om_store *s, struct om_move *m, enum step step, uint64_t first,
                        uint64_t last)
{
	struct om_decoding *d = m->decoding;
	int code;

	d->threads++;
	m->busy = true;
	om_move_ref(m);
	om_mutex_unlock(&s->lock);
	code = work_unlocked(m, step, first, last);
	om_mutex_lock(&s->lock);
	if (code)
		om_move_fail(m);
	d->threads--;
	d->opened |= step == OPEN && !code;
	if (step == OPEN && !code && !d->on_team)
		om_fetch_share_locked(s, m);
	conclude_locked(s, m, step == PROVE);
	om_store_changed_locked(s);
	om_move_unref(m);
}

bool om_decode_work_locked(struct om_store *s, struct om_move *m)
{
	struct om_decoding *d = m->decoding;
	uint64_t first = d->taken;
	enum step step;

	if (m->settled)
		return false;
	if (d->read && !d->read->settled)
		return om_fetch_work_locked(s, d->read);
	if (form_lost(d) && !m->error->code)
		*m->error = *d->read->error;
	if (m->error->code || m->canceled) {
		conclude_locked(s, m, false);
		return m->settled;
	}
	if (!d->opened && !d->threads) {
		d->on_team = m->block->group->streams && om_team_found();
		d->began_ns = om_now();
	}
	step = !d->opened ? OPEN : d->taken < d->parts ? DECODE : PROVE;
	if (step != DECODE && d->threads)
		return false; /* another one opens it, or others are at the last parts */
	if (step == DECODE)
		d->taken = d->on_team ? d->parts : OM_MIN(first + STEP, d->parts);
	step_locked(s, m, step, first, d->taken);
	return true;
}
