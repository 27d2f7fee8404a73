/*
 * om_put: caches, and entries that come in.
 *
 * An entry takes its name as soon as there is memory for it and nothing can fail any more but a close of
 * the store; its bytes are copied without the lock, under a lease of the thread that puts, and who asks
 * meanwhile waits for that. So the former entry's memory can be room for the new one.
 *
 * One that is encoded is whole before it takes its name. While it is made its memory, which has pages as far as
 * it is written, is no entry's and in no limit but the store's.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_hash.h"
#include "core/om_store_int.h"
#include "core/om_tally.h"

#define ROWS " rows" /* the group of parts of a cache's entries has its name and this */

/* ---- caches ---- */

static int make_cache_locked(struct om_store *s, struct om_group *g)
{
	char rows[sizeof(g->name)];
	int n = snprintf(rows, sizeof(rows), "%s%s", g->name, ROWS);
	int code;

	if (n < 0 || (size_t)n >= sizeof(rows))
		return om_err(OM_EVALUE, "the name of a cache must have at most %zu bytes: '%s'",
		              sizeof(rows) - sizeof(ROWS), g->name);
	if (g->blocks || g->used_bytes || g->streams)
		return om_err(OM_EVALUE, "group '%s' has blocks already: it cannot be a cache",
		              g->name);
	code = g->tally ? 0 : om_tally_create(&g->tally);
	if (code)
		return code;
	g->rows = om_store_find_group_locked(s, rows);
	if (!g->rows)
		return om_err_last()->code;
	g->cache = g->rows->cache = true;
	return 0;
}

int om_store_cache(struct om_store *s, const char *group, const struct om_cache_config *c)
{
	uint64_t limit = om_down(c->limit_bytes, OM_PAGE);
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	if (!limit)
		code = om_err(OM_EVALUE,
		              "cache '%s': a limit of %llu bytes; the least is a page, %lu",
		              g->name, (unsigned long long)c->limit_bytes, (unsigned long)OM_PAGE);
	if (!code && !g->cache)
		code = make_cache_locked(s, g);
	if (code)
		return om_store_leave(s, code);
	g->batch = c->batch;
	g->threshold = c->threshold;
	om_mutex_unlock(&s->lock);
	return om_store_group(s, group, limit);
}

/* ---- entries ---- */

/* What it takes to put an entry. */
struct put {
	struct om_store *s;
	struct om_group *g;
	struct om_block *b;    /* the new record */
	struct om_extent mem;  /* of its bytes, or of what they are encoded to */
	struct om_coded coded; /* bytes 0: they are not */
	uint64_t deadline_ns;
};

/* Has the name been put often enough? 1, 0 or an error. */
static int often_enough(struct om_group *g, const char *name, bool there)
{
	int64_t count;

	if (g->threshold < 2 || there)
		return 1;
	count = om_tally_add(g->tally, om_hash(name, strlen(name)));
	return count < 0 ? (int)count : count >= g->threshold;
}

/* May its memory, as it is, be that of an entry of `bytes`? */
static bool reusable(const struct om_block *old, uint64_t bytes)
{
	return old && old->host == OM_COPY_VALID && !old->leases && !old->pinned &&
	       !old->body->foreign && !old->body->holds && !old->body->move &&
	       old->body->mem.bytes == bytes;
}

/* One try to get memory: 0, with the lock held since; OM_ROOM_STEP, OM_EAGAIN, OM_EBUSY: look again. */
static int try_reserve_locked(struct put *p, struct om_block *old)
{
	uint64_t bytes = p->coded.bytes ? p->mem.bytes : om_block_host_bytes(p->b);
	uint64_t back = om_block_entry_bytes(old);
	bool reuse = !p->coded.bytes && reusable(old, bytes);
	int code = om_room_step_locked(p->s, p->g, reuse || p->coded.bytes ? 0 : bytes,
	                               bytes - OM_MIN(bytes, back), OM_ROOM_WRITE, &old,
	                               old ? 1 : 0);

	if (code || p->coded.bytes)
		return code;
	if (reuse) {
		p->mem = om_block_host_cede(old);
		return 0;
	}
	code = om_fetch_reserve_locked(p->s, p->g, bytes, &p->mem);
	return code == OM_ELIMIT ? OM_EAGAIN : code; /* pages lost in shared segments */
}

/* The entry of that name, if the cache may replace it. */
static int find_old_locked(struct put *p, struct om_block **ret)
{
	*ret = om_table_find(&p->s->table, p->b->name);
	if (*ret && (*ret)->group != p->g)
		return om_err(OM_EVALUE, "block '%s' belongs to group '%s': choose another name",
		              p->b->name, (*ret)->group->name);
	return 0;
}

/* Memory for the entry, the lock held since; *ret_old: what it replaces. */
static int reserve_locked(struct put *p, struct om_block **ret_old)
{
	unsigned failed = p->s->spills_failed;

	for (;;) {
		int code = p->s->closing ? om_err(OM_ECLOSED, "the store is closed")
		                         : find_old_locked(p, ret_old);

		code = code ? code : try_reserve_locked(p, *ret_old);
		code = om_room_verdict_locked(p->s, code, failed);
		if (code == OM_ROOM_STEP) {
			om_room_pause_locked(p->s);
			continue;
		}
		if (code != OM_EAGAIN && code != OM_EBUSY)
			return code;
		if (om_now() >= p->deadline_ns) {
			om_room_busy_error(p->s, p->g, om_block_host_bytes(p->b));
			return OM_EBUSY;
		}
		om_store_wait_locked(p->s, p->deadline_ns);
	}
}

/* The new entry is the one of its name: nothing can fail once there is room in the table. */
static int take_name_locked(struct put *p, struct om_block *old)
{
	int code;

	if (old) {
		p->b->accesses += OM_MIN(old->accesses, UINT32_MAX - p->b->accesses);
		om_store_forget_locked(p->s, old);
	}
	code = om_table_insert(&p->s->table, p->b);
	if (!code)
		om_tally_forget(p->g->tally, p->b->name_hash);
	return code;
}

/* Its bytes are on their way. */
static void begin_fill_locked(struct put *p)
{
	struct om_store *s = p->s;
	struct om_block *b = p->b;

	om_block_access(b);
	om_block_fill_begin(b, p->mem);
	om_block_lease(b); /* it cannot be a victim before it is whole */
	om_meter_peak_locked(s);
}

static int fill_locked(struct put *p, const void *data)
{
	struct om_store *s = p->s;
	struct om_block *b = p->b;
	int code = 0;

	om_block_ref(b);
	s->adding++; /* close waits for us */
	om_mutex_unlock(&s->lock);
	if (b->nbytes)
		memcpy(b->body->data, data, b->nbytes);
	om_mutex_lock(&s->lock);
	s->adding--;
	if (s->closing) {
		code = om_err(OM_ECLOSED, "the store was closed meanwhile");
		om_block_lose_leases(b);
		om_block_fill_fail(b, &s->pool);
		if (b->named)
			om_table_remove(&s->table, b);
	} else {
		om_block_unlease(b);
		om_block_fill_end(b);
	}
	om_store_reap_locked(s, b); /* another one may have replaced it already */
	om_block_unref(b);
	om_store_changed_locked(s);
	return code;
}

static int put_locked(struct put *p, const void *data)
{
	struct om_block *old = NULL;
	int code = reserve_locked(p, &old);

	if (code)
		return code;
	code = take_name_locked(p, old); /* instead of another one it cannot fail */
	if (code) {
		om_pool_free(&p->s->pool, &p->mem);
		return code;
	}
	begin_fill_locked(p);
	return fill_locked(p, data);
}

/* ---- encoded entries ---- */

/* Encode the caller's bytes, in memory that is in no limit of the group before it is of its final size. What
 * could not be in the cache encoded and decoded at once stays plain. */
static int encode_locked(struct put *p, const void *data, enum om_coding coding)
{
	struct om_store *s = p->s;
	uint64_t plain = om_block_host_bytes(p->b);
	int code = om_pack_loose_locked(s, p->g->rows, om_encode_bound(p->b->nbytes),
	                                p->deadline_ns, &p->mem);

	if (code) /* what the store has no room to encode stays plain */
		return code == OM_ELIMIT ? 0 : code;
	om_mutex_unlock(&s->lock);
	code = om_pack_encode(p->b, data, coding, p->mem, &p->coded);
	om_mutex_lock(&s->lock);
	if (!code && s->closing)
		code = om_err(OM_ECLOSED, "the store was closed meanwhile");
	if (om_up(p->coded.bytes, OM_PAGE) + plain > p->g->limit_bytes)
		p->coded.bytes = 0;
	if (code || !p->coded.bytes) {
		om_pack_free_loose_locked(s, p->g->rows, &p->mem);
		p->coded.bytes = 0;
		return code;
	}
	om_pack_cut_loose_locked(s, p->g->rows, &p->mem, p->coded.bytes);
	return 0;
}

static void adopt_form_locked(struct put *p, struct om_block *form)
{
	struct om_block *b = p->b;

	om_pack_end_loose_locked(p->s, p->g->rows, &p->mem);
	om_block_access(b);
	om_block_access(form);
	om_block_fill_begin(form, p->mem);
	om_block_fill_end(form);
	b->blank = false;
	b->body->codec = OM_CODEC_CORE;
	b->body->hash = p->coded.hash;
	b->body->hash_known = b->body->verified = true;
	om_block_set_packed(b, form);
	om_shed_trim_locked(p->s, p->g, 0);
	om_store_changed_locked(p->s);
}

static int put_coded_locked(struct put *p)
{
	struct om_block *old = NULL, *form = NULL;
	int code = reserve_locked(p, &old);

	code = code ? code : om_pack_make_inner_locked(p->s, p->b, p->coded.bytes, &form);
	code = code ? code : take_name_locked(p, old);
	if (!code) {
		adopt_form_locked(p, form);
		return 0;
	}
	if (form) {
		om_block_unref(form);
		om_block_retire(form);
	}
	om_pack_free_loose_locked(p->s, p->g->rows, &p->mem);
	return code;
}

static int too_large(const struct om_group *g, const struct om_block *b)
{
	uint64_t bytes = om_block_host_bytes(b);

	if (bytes <= g->limit_bytes)
		return 0;
	om_err(OM_ELIMIT, "'%s' has %llu bytes, cache '%s' at most %llu: raise its limit", b->name,
	       (unsigned long long)b->nbytes, g->name, (unsigned long long)g->limit_bytes);
	om_err_limit(g->name, bytes, g->used_bytes, g->limit_bytes);
	return OM_ELIMIT;
}

/* A record on the store's list, without a name yet. */
static int begin_locked(struct put *p, const char *name, uint64_t nbytes,
                        const struct om_desc *desc)
{
	int code = om_block_create(name, nbytes, p->g, &p->b);

	if (code)
		return code;
	om_list_push_tail(&p->s->blocks, &p->b->all);
	code = om_block_wake(p->b, desc);
	code = code ? code : too_large(p->g, p->b);
	if (!code)
		return 0;
	om_block_retire(p->b);
	return code;
}

int om_store_put(struct om_store *s, const char *name, const char *group, const void *data,
                 uint64_t nbytes, const struct om_desc *desc, enum om_coding coding,
                 uint64_t deadline_ns)
{
	struct put p = { .s = s, .deadline_ns = deadline_ns };
	int code = om_store_enter_group(s, group, &p.g);

	if (code)
		return code;
	code = p.g->cache ? om_store_check_name(name)
	                  : om_err(OM_EVALUE, "group '%s' is no cache", p.g->name);
	code = code ? code : begin_locked(&p, name, nbytes, desc);
	if (code)
		return om_store_leave(s, code);
	code = often_enough(p.g, name, om_table_find(&s->table, name));
	if (code == 1) {
		s->adding++;
		code = coding == OM_CODING_NONE ? 0 : encode_locked(&p, data, coding);
		if (!code)
			code = p.coded.bytes ? put_coded_locked(&p) : put_locked(&p, data);
		s->adding--;
		if (!code)
			return om_store_leave(s, 1);
	}
	if (!om_list_empty(&p.b->all)) { /* it never got its name */
		struct om_error error = *om_err_last();

		om_block_retire(p.b);
		om_err_set(&error);
	}
	om_store_changed_locked(s);
	return om_store_leave(s, code);
}
