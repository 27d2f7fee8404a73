/*
 * om_get: entries of caches, whole or in rows.
 *
 * Rows that are not a part of memory that is there anyhow get a block of their own, in a group beside
 * the cache's, whose name goes as soon as it is leased.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

/* ---- whole entries ---- */

static struct om_block *find_locked(struct om_store *s, const struct om_group *g, const char *name)
{
	struct om_block *b = om_table_find(&s->table, name);

	return b && b->group == g ? b : NULL;
}

/* As find_locked, with a reference; NULL: a miss, which is counted. */
static struct om_block *seek_locked(struct om_store *s, struct om_group *g, const char *name)
{
	struct om_block *b = find_locked(s, g, name);

	if (b)
		om_block_ref(b);
	else
		om_traffic_miss_locked(s, g, name);
	return b;
}

static int get(struct om_store *s, const char *group, const char *name, bool now,
               uint64_t deadline_ns, struct om_lease **ret)
{
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	do { /* one that is replaced while we wait: the next one of its name */
		struct om_block *b = seek_locked(s, g, name);

		if (!b)
			return om_store_leave(s, OM_ENAME);
		code = now && !om_lease_at_hand(b)
		               ? OM_EAGAIN
		               : om_lease_take_locked(s, b, OM_READ, deadline_ns, ret);
		om_block_unref(b);
	} while (code == OM_ENAME);
	return om_store_leave(s, code);
}

int om_store_get(struct om_store *s, const char *group, const char *name, uint64_t deadline_ns,
                 struct om_lease **ret)
{
	return get(s, group, name, false, deadline_ns, ret);
}

int om_store_get_now(struct om_store *s, const char *group, const char *name, struct om_lease **ret)
{
	return get(s, group, name, true, 0, ret);
}

/* ---- rows ---- */

struct rows {
	struct om_store *s;
	struct om_group *g; /* the cache */
	const struct om_desc *desc;
	const struct om_rows *runs;
	size_t count;
	uint64_t row_bytes;
	uint64_t total; /* rows */
	uint64_t deadline_ns;
};

/* Bytes of a row, and whether all runs lie inside. */
static int measure(struct rows *r, uint64_t nbytes)
{
	const struct om_desc *d = r->desc;
	uint64_t rows = d->ndim > 0 ? (uint64_t)d->shape[0] : 0,
		 bits = (uint64_t)d->bits * d->lanes;

	if (d->ndim < 1)
		return om_err(OM_EVALUE, "an entry without a dimension has no rows");
	for (int i = 1; i < d->ndim; i++)
		bits *= (uint64_t)d->shape[i];
	r->row_bytes = rows ? nbytes / rows : 0;
	if (rows && (bits % 8 || r->row_bytes != bits / 8))
		return om_err(OM_EVALUE, "rows of %llu bits are no whole bytes",
		              (unsigned long long)bits);
	for (size_t i = 0; i < r->count; i++) {
		if (r->runs[i].first > rows || r->runs[i].count > rows - r->runs[i].first)
			return om_err(OM_EVALUE, "rows %llu + %llu lie outside the %llu there are",
			              (unsigned long long)r->runs[i].first,
			              (unsigned long long)r->runs[i].count,
			              (unsigned long long)rows);
		if (om_add_overflows(r->total, r->runs[i].count, &r->total))
			return om_err(OM_EVALUE, "too many rows");
	}
	return 0;
}

static bool same_desc(const struct om_desc *a, const struct om_desc *b)
{
	return a->ndim == b->ndim && a->code == b->code && a->bits == b->bits &&
	       a->lanes == b->lanes &&
	       (a->ndim < 1 || !memcmp(a->shape, b->shape, sizeof(*a->shape) * (size_t)a->ndim));
}

/* A record for the rows, on the store's list; no name yet. */
static int make_part_locked(struct rows *r, const struct om_block *entry, struct om_block **ret)
{
	size_t size = strlen(entry->name) + 32;
	char *name = om_alloc(1, size);
	struct om_desc desc = *r->desc;
	int code = name ? 0 : -ENOMEM;

	if (code)
		return code;
	desc.shape[0] = (int64_t)r->total;
	do
		snprintf(name, size, "%s rows %llu", entry->name,
		         (unsigned long long)++r->g->rows->uses);
	while (om_table_find(&r->s->table, name));
	code = om_block_create(name, r->total * r->row_bytes, r->g->rows, ret);
	om_free(name);
	if (code)
		return code;
	om_list_push_tail(&r->s->blocks, &(*ret)->all);
	code = om_block_wake(*ret, &desc);
	if (code)
		om_block_retire(*ret);
	return code;
}

/* Append the ranges of `nbytes` from `offset` on of the entry's origin; those that adjoin become one. */
static size_t add_ranges(struct om_range *to, size_t n, const struct om_block *entry,
                         uint64_t offset, uint64_t nbytes)
{
	for (size_t i = 0; i < entry->body->range_count && nbytes; i++) {
		const struct om_range *from = &entry->body->ranges[i];
		uint64_t part;

		if (offset >= from->nbytes) {
			offset -= from->nbytes;
			continue;
		}
		part = OM_MIN(nbytes, from->nbytes - offset);
		if (n && to[n - 1].file == from->file &&
		    to[n - 1].offset + to[n - 1].nbytes == from->offset + offset) {
			to[n - 1].nbytes += part;
		} else {
			om_file_ref(from->file);
			to[n++] = (struct om_range){ from->file, from->offset + offset, part };
		}
		nbytes -= part;
		offset = 0;
	}
	return n;
}

static int set_origin(struct rows *r, const struct om_block *entry, struct om_block *part)
{
	struct om_range *ranges;
	size_t n = 0, most;

	if (om_mul_overflows(r->count, entry->body->range_count, &most))
		return om_err(OM_EVALUE, "too many rows");
	ranges = om_alloc(most, sizeof(*ranges));
	if (!ranges)
		return -ENOMEM;
	for (size_t i = 0; i < r->count; i++)
		n = add_ranges(ranges, n, entry, r->runs[i].first * r->row_bytes,
		               r->runs[i].count * r->row_bytes);
	part->blank = false;
	part->body->ranges = ranges;
	part->body->range_count = n;
	return 0;
}

/* Only these rows of the origin. */
static int read_rows_locked(struct rows *r, struct om_block *entry, struct om_lease **ret)
{
	struct om_block *part;
	int code = make_part_locked(r, entry, &part);

	if (code)
		return code;
	code = set_origin(r, entry, part);
	code = code ? code : om_table_insert(&r->s->table, part);
	if (code) {
		om_block_retire(part);
		return code;
	}
	om_traffic_note_locked(r->s, entry, OM_EVENT_MISS, 0, 0);
	om_block_ref(part);
	code = om_lease_take_locked(r->s, part, OM_READ, r->deadline_ns, ret);
	if (part->named)
		om_store_forget_locked(r->s, part);
	om_block_unref(part);
	return code;
}

static void gather(const struct rows *r, char *to, const char *from)
{
	for (size_t i = 0; i < r->count; i++) {
		uint64_t bytes = r->runs[i].count * r->row_bytes;

		if (bytes)
			memcpy(to, from + r->runs[i].first * r->row_bytes, bytes);
		to += bytes;
	}
}

/* A copy of the rows of an entry that is leased. */
static int copy_rows_locked(struct rows *r, const struct om_block *entry, const char *from,
                            struct om_lease **ret)
{
	struct om_store *s = r->s;
	struct om_block *part;
	struct om_extent mem;
	int code = make_part_locked(r, entry, &part);

	if (code)
		return code;
	code = om_room_wait_locked(s, r->g->rows, om_block_host_bytes(part), OM_ROOM_WRITE,
	                           r->deadline_ns);
	code = code ? code
	            : om_fetch_reserve_locked(s, r->g->rows, om_block_host_bytes(part), &mem);
	if (code) {
		om_block_retire(part);
		return code;
	}
	om_block_access(part);
	om_block_fill_begin(part, mem);
	om_block_lease(part);
	s->adding++; /* close waits for us */
	om_mutex_unlock(&s->lock);
	gather(r, part->body->mem.ptr, from);
	om_mutex_lock(&s->lock);
	s->adding--;
	om_block_fill_end(part);
	*ret = s->closing ? NULL : om_lease_make_locked(s, part, false);
	if (!*ret) {
		code = s->closing ? om_err(OM_ECLOSED, "the store was closed meanwhile") : -ENOMEM;
		om_block_unlease(part);
		om_store_reap_locked(s, part);
	}
	return code;
}

static bool only_below(const struct om_block *b)
{
	return b->host == OM_COPY_NONE && b->body && b->body->ranges && !b->body->packed;
}

static int rows_locked(struct rows *r, struct om_block *b, struct om_lease **ret,
                       uint64_t *ret_offset)
{
	struct om_lease *whole;
	int code;

	if (!b->body || !same_desc(&b->body->desc, r->desc))
		return OM_EAGAIN;
	r->total = 0;
	*ret_offset = 0;
	code = measure(r, b->nbytes);
	if (code)
		return code;
	if (only_below(b)) {
		if (r->total && r->row_bytes)
			return read_rows_locked(r, b, ret);
		om_traffic_note_locked(r->s, b, OM_EVENT_MISS, 0, 0);
		return copy_rows_locked(r, b, NULL, ret);
	}
	code = om_lease_take_locked(r->s, b, OM_READ, r->deadline_ns, &whole);
	if (code)
		return code;
	if (r->count == 1) {
		*ret_offset = r->runs[0].first * r->row_bytes;
		*ret = whole;
		return 0;
	}
	code = copy_rows_locked(r, b, whole->data, ret);
	om_lease_unref(whole);
	return code;
}

int om_store_get_rows(struct om_store *s, const char *group, const char *name,
                      const struct om_desc *desc, const struct om_rows *runs, size_t count,
                      uint64_t deadline_ns, struct om_lease **ret, uint64_t *ret_offset)
{
	struct rows r = {
		.s = s, .desc = desc, .runs = runs, .count = count, .deadline_ns = deadline_ns
	};
	int code = om_store_enter_group(s, group, &r.g);

	if (code)
		return code;
	if (!r.g->cache)
		return om_store_leave(s, om_err(OM_EVALUE, "group '%s' is no cache", r.g->name));
	do {
		struct om_block *b = seek_locked(s, r.g, name);

		if (!b)
			return om_store_leave(s, OM_ENAME);
		code = rows_locked(&r, b, ret, ret_offset);
		om_block_unref(b);
	} while (code == OM_ENAME);
	return om_store_leave(s, code);
}
