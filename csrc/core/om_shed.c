/*
 * om_shed: victims of caches: groups whose blocks, called entries, may be lost.
 *
 * The oldest goes as the policy says, held or not. What lies below (an origin, a packed form) stays, and with
 * it the name; an entry without goes for good. Bytes that are leased cannot go: they are parted from
 * their entry, which gets a new record if it stays, and end with their last lease.
 * A plain copy of an entry that is there in a packed form too goes before any entry does.
 * Under the store lock, which is never given up here.
 */
#include <errno.h>
#include <stdlib.h>

#include "core/om_store_int.h"

struct wish {
	struct om_store *store;
	struct om_block *const *keep;
	size_t keep_count;
};

/* The entry that a copy belongs to; NULL: its owner has no name any more. */
static struct om_block *entry_of(struct om_store *s, const struct om_block *b)
{
	struct om_block *owner;

	if (!b->inner)
		return (struct om_block *)b;
	owner = om_table_find(&s->table, b->name);
	return owner && owner->body && (owner->body->packed == b || owner->body->origin == b)
	               ? owner
	               : NULL;
}

static bool settled(const struct om_block *b)
{
	return b->host != OM_COPY_FILLING && !b->body->move && !b->body->holds;
}

static bool may_shed(void *arg, const struct om_block *b)
{
	const struct wish *w = arg;
	const struct om_block *e = entry_of(w->store, b);

	if (!e || !settled(b) || !settled(e))
		return false;
	if (b->inner && b->leases &&
	    om_block_clean(b)) /* an encoded origin that is being decoded */
		return false;
	for (size_t i = 0; i < w->keep_count; i++)
		if (w->keep[i] == e)
			return false;
	return true;
}

static bool is_double(void *arg, const struct om_block *b)
{
	return !b->inner && b->body->packed && om_block_clean(b) && may_shed(arg, b);
}

/* The name goes to a record of its own, with what lies below; `b` keeps the bytes that are held. */
static int part_locked(struct om_store *s, struct om_block *b)
{
	struct om_block *heir;
	int code = om_block_create(b->name, b->nbytes, b->group, &heir);

	if (code)
		return code;
	om_list_push_tail(&s->blocks, &heir->all);
	code = om_block_wake(heir, &b->body->desc);
	if (code) {
		om_block_retire(heir);
		return code;
	}
	heir->blank = false;
	heir->created_ns = b->created_ns;
	heir->accessed_ns = b->accessed_ns;
	heir->accesses = b->accesses;
	heir->body->align = b->body->align;
	heir->body->hash = b->body->hash;
	heir->body->hash_known = b->body->hash_known;
	heir->body->verified = b->body->verified;
	heir->body->used_no = b->body->used_no;
	heir->body->codec = b->body->codec;
	heir->body->ranges = b->body->ranges;
	heir->body->range_count = b->body->range_count;
	heir->body->origin = b->body->origin;
	b->body->ranges = NULL;
	b->body->range_count = 0;
	b->body->origin = NULL;
	om_block_set_packed(heir, om_block_set_packed(b, NULL));
	om_table_remove(&s->table, b);
	om_table_insert(&s->table, heir); /* as many as before: it cannot fail */
	return 0;
}

int om_shed_locked(struct om_store *s, struct om_block *b)
{
	struct om_block *e = entry_of(s, b);

	if (b->inner && !om_block_clean(b) && om_block_has_origin(e)) {
		om_pack_drop_locked(s, e); /* the origin will do */
		return 0;
	}
	if (om_block_clean(b)) {
		bool lasts = b->body->packed;
		int code = b->leases ? part_locked(s, b) : 0;

		if (!b->leases)
			om_room_drop_locked(s, b);
		else if (!code)
			b->group->evictions += !lasts;
		return code;
	}
	e->group->evictions++;
	om_meter_gone_locked(s, b, om_reason_now());
	om_store_forget_locked(s, e);
	return 0;
}

int om_shed_oldest_locked(struct om_store *s, struct om_group *g, struct om_block *const *keep,
                          size_t keep_count)
{
	struct wish wish = { s, keep, keep_count };
	struct om_block *b = g->doubled ? om_group_victim(g, is_double, &wish) : NULL;

	b = b ? b : om_group_oldest(g, may_shed, &wish);
	if (!b)
		return OM_EAGAIN;
	if (b->inner && !om_block_clean(b)) { /* the held plain copy of the same entry goes first */
		struct om_block *e = entry_of(s, b);

		b = e->host == OM_COPY_VALID && om_block_clean(e) ? e : b;
	}
	return om_shed_locked(s, b);
}

void om_shed_trim_locked(struct om_store *s, const struct om_group *g, uint64_t bytes)
{
	uint64_t used = g->used_bytes + bytes;

	if (!g->limit_bytes)
		return;
	OM_LIST_FOREACH(link, &s->groups) {
		const struct om_group *other = om_container_of(link, struct om_group, link);

		if (other != g && (other->used_bytes || other->streams))
			return; /* the store's limit holds for all of them */
	}
	om_pool_trim(&s->pool, g->limit_bytes - OM_MIN(g->limit_bytes, used), UINT64_MAX);
}

int om_store_shed(struct om_store *s, const char *group, uint64_t bytes, uint32_t most,
                  struct om_shed *ret)
{
	struct om_group *g;
	enum om_reason former;
	uint64_t before, evicted;
	int code = om_store_enter_group(s, group, &g);

	*ret = (struct om_shed){ 0 };
	if (code)
		return code;
	if (!g->cache)
		return om_store_leave(s, om_err(OM_EVALUE, "group '%s' is no cache", g->name));
	before = g->used_bytes;
	evicted = g->evictions;
	former = om_reason_enter(OM_REASON_EXPLICIT);
	while (!code && before - g->used_bytes < bytes && (!most || ret->entries < most)) {
		code = om_shed_oldest_locked(s, g, NULL, 0);
		ret->entries = g->evictions - evicted;
	}
	om_reason_leave(former);
	ret->bytes = before - g->used_bytes;
	om_pool_trim(&s->pool, OM_POOL_WARM, UINT64_MAX);
	om_store_changed_locked(s);
	return om_store_leave(s, code == OM_EAGAIN ? 0 : code);
}

/* ---- who is there ---- */

struct seat {
	uint64_t used_no;
	const struct om_block *block;
};

static int by_use(const void *a, const void *b)
{
	uint64_t x = ((const struct seat *)a)->used_no, y = ((const struct seat *)b)->used_no;

	return x < y ? -1 : x > y;
}

static bool is_there(const struct om_block *b)
{
	return b && b->named && !b->inner &&
	       (b->host == OM_COPY_VALID || (b->host == OM_COPY_FILLING && !b->body->move) ||
	        (b->body->packed && b->body->packed->host != OM_COPY_NONE));
}

static int fill_entry(struct om_entry *ret, const struct om_block *b)
{
	const struct om_block *packed = b->body->packed;

	*ret = (struct om_entry){ om_strdup(b->name),
		                  b->nbytes,
		                  b->accesses,
		                  om_block_counted_bytes(b),
		                  packed ? om_block_counted_bytes(packed) : 0,
		                  b->leases };
	return ret->name ? 0 : -ENOMEM;
}

int om_store_entries(struct om_store *s, const char *group, struct om_entry **ret,
                     size_t *ret_count)
{
	struct om_group *g;
	struct seat *seats;
	size_t n = 0, made = 0;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	seats = om_alloc(g->seat_count, sizeof(*seats));
	*ret = om_alloc(g->seat_count, sizeof(**ret));
	code = seats && *ret ? 0 : -ENOMEM;
	for (uint32_t i = 0; !code && i < g->seat_count; i++)
		if (is_there(g->seats[i]))
			seats[n++] = (struct seat){ g->seats[i]->body->used_no, g->seats[i] };
	if (n)
		qsort(seats, n, sizeof(*seats), by_use);
	while (!code && made < n) {
		code = fill_entry(&(*ret)[made], seats[made].block);
		made += !code;
	}
	om_mutex_unlock(&s->lock);
	om_free(seats);
	*ret_count = made;
	if (code) {
		om_entries_free(*ret, made);
		*ret = NULL;
	}
	return code;
}

void om_entries_free(struct om_entry *entries, size_t count)
{
	while (entries && count)
		om_free(entries[--count].name);
	om_free(entries);
}
