/* om_move: see om_move.h. */
#include "core/om_move.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "core/om_hash.h"

#define CACHE_STEP \
	(UINT64_C(256) * 1024) /* hashed bytes are still in the cache when they are moved */

static int create(struct om_block *b, enum om_move_kind kind, enum om_move_priority priority,
                  size_t piece_count, uint32_t request_bytes, struct om_move **ret)
{
	struct om_move *m = om_alloc(1, sizeof(*m));

	if (!m)
		return -ENOMEM;
	m->refs = 1;
	m->block = b;
	m->kind = kind;
	m->priority = priority;
	m->request_bytes = request_bytes;
	m->began_ns = om_now();
	om_list_init(&m->link);
	m->pieces = om_alloc(piece_count, sizeof(*m->pieces));
	m->hash_raw = om_alloc(1, sizeof(XXH3_state_t) + 64);
	m->error = om_alloc(1, sizeof(*m->error));
	if (!m->pieces || !m->hash_raw || !m->error) {
		om_move_unref(m);
		return -ENOMEM;
	}
	m->hash_memory = (void *)om_up((uint64_t)(uintptr_t)m->hash_raw, 64);
	XXH3_64bits_reset(m->hash_memory);
	m->piece_count = piece_count;
	*ret = m;
	return 0;
}

/* The plan is complete: count its requests. */
static int seal(struct om_move *m)
{
	for (size_t i = 0; i < m->piece_count; i++) {
		uint64_t bytes = m->pieces[i].bytes;

		m->bytes += bytes;
		m->request_count += (uint32_t)((bytes + m->request_bytes - 1) / m->request_bytes);
	}
	m->back = om_alloc(m->request_count, 1);
	if (!m->back) {
		om_move_unref(m);
		return -ENOMEM;
	}
	return 0;
}

static void plan_ranges(struct om_move *m)
{
	uint8_t *mem = m->block->body->mem.ptr;

	for (size_t i = 0; i < m->piece_count; i++) {
		const struct om_range *r = &m->block->body->ranges[i];
		struct om_piece *p = &m->pieces[i];

		p->file = r->file;
		p->offset = om_down(r->offset, OM_PAGE);
		p->head = r->offset - p->offset;
		p->nbytes = r->nbytes;
		p->exists = p->head + r->nbytes;
		p->bytes = r->nbytes ? om_up(p->exists, OM_PAGE) : 0;
		p->mem = mem;
		mem += om_up(p->exists, OM_PAGE);
	}
}

/* Runs of a disk copy, against contiguous memory that starts at a page. */
static void plan_runs(struct om_move *m, struct om_disk *disk, const struct om_disk_copy *copy,
                      uint8_t *mem)
{
	uint64_t left = m->block->nbytes, head = copy->head;

	for (size_t i = 0; i < m->piece_count; i++) {
		struct om_piece *p = &m->pieces[i];

		p->file = disk->file;
		p->offset = copy->runs[i].offset;
		p->bytes = p->exists = copy->runs[i].bytes;
		p->mem = mem;
		p->head = head;
		p->nbytes = OM_MIN(left, p->bytes - head);
		mem += p->bytes;
		left -= p->nbytes;
		head = 0;
	}
}

/* Choose where the block begins, and see whether any byte is read to another place. */
static void place(struct om_move *m)
{
	struct om_block *b = m->block;
	uint8_t *at;

	b->body->data = m->piece_count ? m->pieces[0].mem + m->pieces[0].head : b->body->mem.ptr;
	if ((uintptr_t)b->body->data % b->body->align)
		b->body->data -= (uintptr_t)b->body->data % OM_BLOCK_ALIGN;
	at = b->body->data;
	for (size_t i = 0; i < m->piece_count; i++) {
		m->displaced |= at != m->pieces[i].mem + m->pieces[i].head;
		at += m->pieces[i].nbytes;
	}
}

int om_move_create_fill(struct om_block *b, struct om_disk *disk, uint32_t request_bytes,
                        enum om_move_priority priority, struct om_move **ret)
{
	bool from_disk = b->disk == OM_COPY_VALID, decodes = om_block_coded(b);
	size_t pieces = decodes ? 0 : from_disk ? b->body->disk_copy.count : b->body->range_count;
	struct om_move *m;
	int code = create(b, OM_MOVE_FILL, priority, pieces, request_bytes, &m);

	if (code)
		return code;
	m->zeros = b->blank;
	if (from_disk)
		plan_runs(m, disk, &b->body->disk_copy, b->body->mem.ptr);
	else if (!decodes)
		plan_ranges(m);
	place(m);
	code = seal(m);
	if (!code)
		*ret = m;
	return code;
}

int om_move_create_spill(struct om_block *b, struct om_disk *disk, uint32_t request_bytes,
                         struct om_move **ret)
{
	struct om_move *m;
	int code = create(b, OM_MOVE_SPILL, OM_SPILL, b->body->disk_copy.count, request_bytes, &m);

	if (code)
		return code;
	plan_runs(m, disk, &b->body->disk_copy, b->body->data - b->body->disk_copy.head);
	code = seal(m);
	if (!code)
		*ret = m;
	return code;
}

void om_move_ref(struct om_move *m)
{
	if (m)
		m->refs++;
}

void om_move_unref(struct om_move *m)
{
	if (!m || --m->refs)
		return;
	om_free(m->pieces);
	om_free(m->back);
	om_free(m->hash_raw);
	om_free(m->error);
	om_decode_free(m->decoding);
	om_free(m);
}

uint32_t om_move_request(const struct om_move *m, const struct om_cursor *c)
{
	if (c->piece == m->piece_count)
		return 0;
	return (uint32_t)OM_MIN(m->pieces[c->piece].bytes - c->done, m->request_bytes);
}

static void skip_empty(const struct om_move *m, struct om_cursor *c)
{
	while (c->piece < m->piece_count && c->done == m->pieces[c->piece].bytes) {
		c->piece++;
		c->done = 0;
	}
}

void om_move_step(const struct om_move *m, struct om_cursor *c)
{
	c->done += om_move_request(m, c);
	skip_empty(m, c);
}

void om_move_rewind(struct om_move *m)
{
	struct om_cursor start = { 0 };

	skip_empty(m, &start);
	m->issued = m->ready = m->taken = start;
	m->out = m->block->body->data;
	m->issue_index = m->ready_index = 0;
	memset(m->back, 0, m->request_count);
	XXH3_64bits_reset(m->hash_memory);
	m->landed = false;
}

void om_move_fail(struct om_move *m)
{
	if (!m->error->code)
		*m->error = *om_err_last();
}

static void take(struct om_move *m, const uint8_t *from, uint64_t bytes)
{
	while (bytes) {
		uint64_t step = OM_MIN(bytes, CACHE_STEP);

		if (m->want_hash)
			om_hash_update(m->hash_memory, from, step);
		if (m->out != from)
			memmove(m->out, from, step);
		m->out += step;
		from += step;
		bytes -= step;
	}
}

void om_move_take(struct om_move *m, const struct om_cursor *to)
{
	struct om_cursor at = m->taken;

	while (at.piece < m->piece_count && (at.piece < to->piece || at.done < to->done)) {
		const struct om_piece *p = &m->pieces[at.piece];
		uint64_t end = at.piece < to->piece ? p->bytes : to->done;
		uint64_t first = OM_MAX(at.done, p->head), last = OM_MIN(end, p->head + p->nbytes);

		if (first < last)
			take(m, p->mem + first, last - first);
		at.done = end;
		if (at.done == p->bytes) {
			at.piece++;
			at.done = 0;
		}
	}
}

uint64_t om_move_digest(const struct om_move *m)
{
	return XXH3_64bits_digest(m->hash_memory);
}

int om_move_check_files(const struct om_move *m)
{
	for (size_t i = 0; i < m->block->body->range_count; i++) {
		int code = om_file_check(m->block->body->ranges[i].file);

		if (code) {
			struct om_error e = *om_err_last();

			om_err(code, "block '%s': %s", m->block->name, e.text);
			om_err_file(e.filename);
			return code;
		}
	}
	return 0;
}
