/*
 * om_room: making room in HOST, and what may be accepted at all.
 *
 * Victims: idle copies of a group over its own limit, else of any group, as its policy says; then what
 * was fetched ahead and is not yet in use. A clean copy is dropped, a dirty one is
 * written out (om_spill.c). Nothing leased is touched, but in a cache that is over its own limit, whose
 * entries lose their names (om_shed.c).
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

static bool kept(const struct om_block *b, struct om_block *const *keep, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (keep[i] == b || om_block_coded(keep[i]) == b)
			return true;
	return false;
}

static bool group_fits(const struct om_group *g, uint64_t bytes)
{
	return !g->limit_bytes || g->used_bytes + bytes <= g->limit_bytes;
}

struct wish {
	bool dirty; /* one that has to be written out will do */
	struct om_block *const *keep;
	size_t keep_count;
	const struct om_group *but; /* none of this one */
};

static bool granted(void *arg, const struct om_block *b)
{
	const struct wish *w = arg;

	return (w->dirty || om_block_expendable(b)) && b->group != w->but &&
	       !kept(b, w->keep, w->keep_count);
}

static bool over_limit(const struct om_group *g)
{
	return g->limit_bytes && g->used_bytes > g->limit_bytes;
}

/* When a block is expected to be used, if its group is never used as a whole. */
static uint64_t next_access(struct om_store *s, const struct om_block *b, uint64_t now_ns)
{
	const struct om_block *owner = b->inner ? om_table_find(&s->table, b->name) : b;

	return om_use_next_since((owner ? owner : b)->accessed_ns, now_ns);
}

/* One of a group over its own limit, else of the group whose next use is furthest. */
static struct om_block *pick_furthest(struct om_store *s, struct wish *wish)
{
	struct om_block *found = NULL;
	uint64_t now_ns = om_now_coarse(), furthest = 0;

	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);
		uint64_t next = om_use_next(&g->use, now_ns, &s->turns);
		bool over = over_limit(g);
		struct om_block *b = NULL;

		if (over || !found || !next || next > furthest)
			b = om_group_victim(g, granted, wish);
		if (b && over)
			return b;
		next = b && !next ? next_access(s, b, now_ns) : next;
		if (!b || (found && next <= furthest))
			continue;
		found = b;
		furthest = next;
	}
	return found;
}

static struct om_block *pick_victim(struct om_store *s, struct om_group *only, bool dirty,
                                    struct om_block *const *keep, size_t keep_count)
{
	struct wish wish = { dirty, keep, keep_count, NULL };

	return only ? om_group_victim(only, granted, &wish) : pick_furthest(s, &wish);
}

bool om_room_free_locked(struct om_store *s, const struct om_group *g, uint64_t bytes)
{
	return group_fits(g, bytes) && om_pool_fits(&s->pool, bytes) &&
	       om_guard_room_locked(s, bytes);
}

struct om_block *om_room_victim_locked(struct om_store *s, struct om_group *g)
{
	return pick_victim(s, g, true, NULL, 0);
}

static bool is_plain(void *arg, const struct om_block *b)
{
	(void)arg;
	return !b->inner;
}

struct om_block *om_room_plain_victim_locked(struct om_group *g)
{
	return om_group_victim(g, is_plain, NULL);
}

bool om_room_take_locked(struct om_store *s, const struct om_group *g)
{
	struct wish wish = { false, NULL, 0, g };
	struct om_block *b = over_limit(g) ? NULL : pick_furthest(s, &wish);

	if (b)
		om_room_drop_locked(s, b);
	return b != NULL;
}

static struct om_block *pick_ahead(struct om_store *s, struct om_group *only,
                                   struct om_block *const *keep, size_t keep_count)
{
	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);

		if (only && g != only)
			continue;
		for (struct om_list *at = g->ahead.prev; at != &g->ahead; at = at->prev) {
			struct om_block *b = om_container_of(at, struct om_body, ahead)->block;

			if (b->body->move && !b->body->move->canceled && !kept(b, keep, keep_count))
				return b;
		}
	}
	return NULL;
}

/* Is enough on its way out already? */
static bool departing(struct om_store *s, struct om_group *only, uint64_t bytes, bool *ret_any)
{
	uint64_t leaving = 0;

	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);

		if (only && g != only)
			continue;
		leaving += g->leaving_bytes;
		OM_LIST_FOREACH(at, &g->ahead) {
			struct om_block *b = om_container_of(at, struct om_body, ahead)->block;

			if (b->body->move && b->body->move->canceled)
				leaving += b->body->mem.bytes;
		}
	}
	*ret_any = leaving > 0;
	return leaving >= bytes;
}

/* ---- room ---- */

static int limit_error(struct om_group *g, uint64_t bytes, uint64_t limit, bool is_group)
{
	char which[80];

	snprintf(which, sizeof(which), is_group ? "group %s" : "host", g->name);
	om_err(OM_ELIMIT, "%llu bytes can never fit: the limit of %s is %llu bytes; raise it",
	       (unsigned long long)bytes, which, (unsigned long long)limit);
	om_err_limit(which, bytes, g->used_bytes, limit);
	return OM_ELIMIT;
}

void om_room_drop_locked(struct om_store *s, struct om_block *b)
{
	if (b->group->cache && !om_block_clean(b)) {
		om_shed_locked(s, b); /* it is idle: that needs no memory */
		return;
	}
	b->group->evictions += !b->body->packed;
	s->counters.drops++;
	om_meter_gone_locked(s, b, om_reason_now());
	om_traffic_note_locked(s, b, OM_EVENT_OUT, 0, 0);
	s->counters.prefetch_waste += b->body->unused;
	om_block_host_drop(b, &s->pool);
}

/* Those of entries that may not go. */
static uint64_t entries_bytes(struct om_block *const *keep, size_t keep_count)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < keep_count; i++)
		bytes += om_block_entry_bytes(keep[i]);
	return bytes;
}

/* There is room for a request, but memory is `above` bytes over the ceiling: has somebody to give way first?
 * 0: no, nobody can; OM_ROOM_STEP: a clean copy went; OM_EAGAIN: something is on its way out, or would be if
 * the caller wrote. What was fetched ahead is planned, and stays. */
static int yield_locked(struct om_store *s, uint64_t above, unsigned how,
                        struct om_block *const *keep, size_t keep_count)
{
	bool any, stuck = om_now() < s->guard.stuck_until;
	struct om_block *b;

	if (departing(s, NULL, above, &any) && !stuck)
		return OM_EAGAIN;
	b = pick_victim(s, NULL, false, keep, keep_count);
	if (b) {
		om_room_drop_locked(s, b);
		return OM_ROOM_STEP;
	}
	if (stuck)
		return 0;
	b = pick_victim(s, NULL, true, keep, keep_count);
	if (b && (how & OM_ROOM_WRITE) &&
	    om_spill_locked(s, b)) { /* growing is better than failing */
		om_guard_stuck_locked(s);
		return OM_EAGAIN;
	}
	return b || any ? OM_EAGAIN : 0;
}

int om_room_step_locked(struct om_store *s, struct om_group *g, uint64_t bytes, uint64_t own_bytes,
                        unsigned how, struct om_block *const *keep, size_t keep_count)
{
	bool spill = how & OM_ROOM_WRITE;
	uint32_t victims = 0;

	if (g->limit_bytes && bytes > g->limit_bytes)
		return limit_error(g, bytes, g->limit_bytes, true);
	if (bytes > s->host_limit_bytes)
		return limit_error(g, bytes, s->host_limit_bytes, false);
	if (g->cache && own_bytes + entries_bytes(keep, keep_count) > g->limit_bytes &&
	    g->limit_bytes)
		return limit_error(g, own_bytes + entries_bytes(keep, keep_count), g->limit_bytes,
		                   true);
	for (;;) {
		bool own = !group_fits(g, own_bytes), any;
		struct om_group *only = own ? g : NULL;
		uint64_t need = (own ? own_bytes : bytes) +
		                (over_limit(g) ? g->used_bytes - g->limit_bytes : 0);
		struct om_block *b;

		if (!own && om_pool_fits(&s->pool, bytes)) {
			uint64_t above = how & OM_ROOM_MAPPED ? 0 : om_guard_short_locked(s, bytes);
			enum om_reason former = om_reason_enter(OM_REASON_PRESSURE);
			int code = above ? yield_locked(s, above, how, keep, keep_count) : 0;

			om_reason_leave(former);
			if (code != OM_ROOM_STEP)
				return code;
			continue;
		}
		if (departing(s, only, need, &any))
			return OM_EAGAIN;
		if (own && g->cache) {
			int code = om_shed_oldest_locked(s, g, keep, keep_count);

			if (code < 0 && code != OM_EAGAIN)
				return code;
			if (!code && spill && ++victims == g->batch)
				return OM_ROOM_STEP;
			if (!code)
				continue;
		}
		b = pick_victim(s, only, false, keep, keep_count);
		if (b) {
			om_room_drop_locked(s, b);
			continue;
		}
		b = spill ? pick_victim(s, only, true, keep, keep_count) : NULL;
		if (b) {
			int code = om_spill_locked(s, b);

			return code ? code : OM_EAGAIN;
		}
		b = pick_ahead(s, only, keep, keep_count);
		if (!b)
			return any ? OM_EAGAIN : OM_EBUSY;
		om_fetch_cancel_locked(s, b);
	}
}

void om_room_pause_locked(struct om_store *s)
{
	s->inside++;
	om_mutex_unlock(&s->lock);
	om_mutex_lock(&s->lock);
	s->inside--;
	om_store_changed_locked(s);
}

int om_room_make_locked(struct om_store *s, struct om_group *g, uint64_t bytes, unsigned how,
                        struct om_block *const *keep, size_t keep_count)
{
	for (;;) {
		int code = om_room_step_locked(s, g, bytes, bytes, how, keep, keep_count);

		if (code != OM_ROOM_STEP)
			return code;
		om_room_pause_locked(s);
		if (s->closing)
			return om_err(OM_ECLOSED, "the store is closed");
	}
}

void om_room_shrink_locked(struct om_store *s, struct om_group *g)
{
	while (!s->closing && over_limit(g)) {
		bool any;
		struct om_block *b;

		if (departing(s, g, g->used_bytes - g->limit_bytes, &any))
			return;
		if (g->cache && !om_shed_oldest_locked(s, g, NULL, 0))
			continue;
		b = pick_victim(s, g, false, NULL, 0);
		if (b) {
			om_room_drop_locked(s, b);
			continue;
		}
		b = pick_victim(s, g, true, NULL, 0);
		if (b) {
			if (om_spill_locked(s, b))
				return; /* who needs the room tries again, and hears why not */
			continue;
		}
		b = pick_ahead(s, g, NULL, 0);
		if (!b)
			return;
		om_fetch_cancel_locked(s, b);
	}
}

void om_room_released_locked(struct om_store *s, struct om_block *b)
{
	if (over_limit(b->group) && b->host == OM_COPY_VALID && !b->leases && !b->pinned &&
	    !b->body->holds && om_block_clean(b))
		om_room_drop_locked(s, b);
}

int om_room_verdict_locked(struct om_store *s, int code, unsigned failed_before)
{
	if ((code == OM_EAGAIN || code == OM_EBUSY) &&
	    s->spills_failed - failed_before >= OM_SPILL_TRIES)
		return om_err_set(&s->spill_error);
	return code;
}

int om_room_wait_locked(struct om_store *s, struct om_group *g, uint64_t bytes, unsigned how,
                        uint64_t deadline_ns)
{
	unsigned failed = s->spills_failed;

	for (;;) {
		int code = s->closing ? om_err(OM_ECLOSED, "the store is closed")
		                      : om_room_make_locked(s, g, bytes, how, NULL, 0);

		code = om_room_verdict_locked(s, code, failed);
		if (code != OM_EAGAIN && code != OM_EBUSY)
			return code;
		if (om_now() >= deadline_ns) {
			om_room_busy_error(s, g, bytes);
			return OM_EBUSY;
		}
		om_store_wait_locked(s, deadline_ns);
	}
}

/* Append the leased blocks, those with views or those without, as long as they fit. */
static void list_holders(struct om_store *s, const struct om_group *only, bool viewed, char *text,
                         size_t size)
{
	size_t used = strlen(text);

	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);
		unsigned views;
		int n;

		if ((!b->leases && !b->pinned) || b->host == OM_COPY_NONE ||
		    (only && b->group != only))
			continue;
		views = __atomic_load_n(&b->body->views, __ATOMIC_RELAXED);
		if ((views > 0) != viewed)
			continue;
		n = snprintf(text + used, size - used, "%s%s (%u leases, %u views%s)",
		             used ? "\n" : "", b->name, b->leases, views,
		             b->pinned ? ", pinned" : "");
		if (n < 0 || used + (size_t)n >= size) {
			text[used] = '\0';
			return;
		}
		used += (size_t)n;
	}
}

void om_room_holders(struct om_store *s, const struct om_group *only, char *text, size_t size)
{
	/* A stream's residents are always leased: views are what somebody can let go. */
	list_holders(s, only, true, text, size);
	list_holders(s, only, false, text, size);
}

void om_room_busy_error(struct om_store *s, struct om_group *g, uint64_t bytes)
{
	char holders[OM_ERROR_HOLDERS] = "", which[80];
	uint64_t used;
	struct om_group *only = group_fits(g, bytes) ? NULL : g;
	const struct om_block *victim = pick_victim(s, only, true, NULL, 0);

	if (!only && bytes && om_pool_fits(&s->pool, bytes)) {
		om_err(OM_EBUSY,
		       "memory is short, and what makes way for %llu bytes is still being written at "
		       "the deadline; wait longer, or free memory",
		       (unsigned long long)bytes);
		return;
	}
	if (victim && !om_disk_target(&s->disk, victim->nbytes)) {
		om_spill_busy_error(s, victim, victim->nbytes);
		return;
	}
	om_room_holders(s, only, holders, sizeof(holders));
	/* Memory of somebody else counts by lowering the pool's limit. */
	used = only ? g->used_bytes
	            : s->pool.used_bytes + (s->host_limit_bytes - s->pool.limit_bytes);
	snprintf(which, sizeof(which), only ? "group '%s'" : "the store", g->name);
	om_err(OM_EBUSY,
	       "no room for %llu bytes at the deadline: %s uses %llu of %llu bytes, and what is there "
	       "is in use; let leases and views go, or raise the limit",
	       (unsigned long long)bytes, which, (unsigned long long)used,
	       (unsigned long long)(only ? g->limit_bytes : s->host_limit_bytes));
	memcpy(om_err_last()->holders, holders, sizeof(holders));
}

int om_room_evict_locked(struct om_store *s, struct om_block *b, uint64_t deadline_ns)
{
	for (;;) {
		int code = 0;

		if (s->closing)
			return om_err(OM_ECLOSED, "the store is closed");
		if (b->host == OM_COPY_NONE)
			return 1;
		if (b->leases || b->pinned)
			return 0;
		if (b->host == OM_COPY_VALID && om_block_expendable(b) && !b->body->holds) {
			om_room_drop_locked(s, b);
			return 1;
		}
		if (b->host == OM_COPY_VALID && !b->body->holds) {
			code = om_spill_locked(s, b);
			if (code == OM_EBUSY && om_now() < deadline_ns) {
				om_store_wait_locked(s, deadline_ns);
				code = 0;
			}
		} else if (b->host == OM_COPY_LEAVING && b->body->move) {
			code = om_fetch_settle_locked(s, b->body->move, deadline_ns);
		} else {
			om_fetch_cancel_locked(s, b);
			if (b->host != OM_COPY_NONE) {
				if (om_now() >= deadline_ns)
					return om_err(OM_EBUSY,
					              "block '%s': still moving at the deadline",
					              b->name);
				om_store_wait_locked(s, deadline_ns);
			}
		}
		if (code)
			return code;
	}
}

/* ---- admission ---- */

static void find_largest_locked(struct om_store *s)
{
	s->sole_largest = 0;
	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);

		if (om_block_admitted(b) && b->named)
			s->sole_largest =
				OM_MAX(s->sole_largest, om_up(OM_MAX(b->nbytes, 1), OM_PAGE));
	}
}

/* While blocks are exchanged between HOST and DISK one more of the largest size may be on its way,
 * and a victim may be larger than the room that is needed. */
static bool admissible(struct om_store *s, uint64_t bytes, uint64_t capacity)
{
	uint64_t total = s->sole_bytes + bytes, largest = OM_MAX(s->sole_largest, bytes);

	return total <= s->host_limit_bytes ||
	       (largest <= s->host_limit_bytes &&
	        total + 2 * largest <= s->host_limit_bytes + capacity);
}

int om_room_admit_locked(struct om_store *s, const struct om_block *b)
{
	const char *name = b->name;
	uint64_t bytes = om_up(OM_MAX(b->nbytes, 1), OM_PAGE);
	uint64_t capacity = om_disk_capacity(&s->disk);

	if (b->group->cache)
		return 0;
	if (!admissible(s, bytes, capacity))
		find_largest_locked(s);
	if (admissible(s, bytes, capacity)) {
		s->sole_bytes += bytes;
		s->sole_largest = OM_MAX(s->sole_largest, bytes);
		return 0;
	}
	if (bytes > s->host_limit_bytes) {
		om_err(OM_ELIMIT, "block '%s': %llu bytes exceed host_limit, %llu bytes; raise it",
		       name, (unsigned long long)bytes, (unsigned long long)s->host_limit_bytes);
		om_err_limit("host", bytes, s->sole_bytes, s->host_limit_bytes);
		return OM_ELIMIT;
	}
	return om_err(
		OM_EDISKFULL,
		"block '%s': %llu bytes would not always find room: blocks without an origin hold "
		"%llu bytes, HOST has %llu, DISK %llu, and exchanging the largest needs twice its size; "
		"raise disk_limit or host_limit, or remove blocks",
		name, (unsigned long long)bytes, (unsigned long long)s->sole_bytes,
		(unsigned long long)s->host_limit_bytes, (unsigned long long)capacity);
}

void om_room_unadmit_locked(struct om_store *s, uint64_t bytes)
{
	s->sole_bytes -= om_up(OM_MAX(bytes, 1), OM_PAGE);
}
