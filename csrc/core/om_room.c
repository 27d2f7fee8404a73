/*
 * om_room: making room in HOST, and what may be accepted at all.
 *
 * Victims: idle copies of a group over its own limit, else of any group, least recently released
 * first; then what was fetched ahead and is not yet in use. A clean copy is dropped, a dirty one is
 * hashed by the thread that needs the room and written out by the mover. Nothing leased is touched.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_hash.h"
#include "core/om_store_int.h"

static bool kept(const struct om_block *b, struct om_block *const *keep, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (keep[i] == b)
			return true;
	return false;
}

static bool group_fits(const struct om_group *g, uint64_t bytes)
{
	return !g->limit_bytes || g->used_bytes + bytes <= g->limit_bytes;
}

/* First of a list that may go: clean ones only, unless `dirty`. */
static struct om_block *pick(struct om_list *list, bool dirty, struct om_block *const *keep,
                             size_t keep_count)
{
	OM_LIST_FOREACH(link, list) {
		struct om_block *b = om_container_of(link, struct om_block, order);

		if (!kept(b, keep, keep_count) && (dirty || om_block_clean(b)) && !b->holds)
			return b;
	}
	return NULL;
}

static bool over_limit(const struct om_group *g)
{
	return g->limit_bytes && g->used_bytes > g->limit_bytes;
}

static struct om_block *pick_victim(struct om_store *s, struct om_group *only, bool dirty,
                                    struct om_block *const *keep, size_t keep_count)
{
	struct om_block *found = NULL;

	if (only)
		return pick(&only->idle, dirty, keep, keep_count);
	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);
		struct om_block *b = pick(&g->idle, dirty, keep, keep_count);

		if (b && over_limit(g))
			return b;
		found = found ? found : b;
	}
	return found;
}

static struct om_block *pick_ahead(struct om_store *s, struct om_group *only,
                                   struct om_block *const *keep, size_t keep_count)
{
	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);

		if (only && g != only)
			continue;
		for (struct om_list *at = g->ahead.prev; at != &g->ahead; at = at->prev) {
			struct om_block *b = om_container_of(at, struct om_block, order);

			if (b->move && !b->move->canceled && !kept(b, keep, keep_count))
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
			struct om_block *b = om_container_of(at, struct om_block, order);

			if (b->move && b->move->canceled)
				leaving += b->mem.bytes;
		}
	}
	*ret_any = leaving > 0;
	return leaving >= bytes;
}

/* ---- spilling ---- */

/* Append the leased blocks, those with views or those without, as long as they fit. */
static void list_holders(struct om_store *s, const struct om_group *only, bool viewed, char *text,
                         size_t size)
{
	size_t used = strlen(text);

	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);
		unsigned views = __atomic_load_n(&b->views, __ATOMIC_RELAXED);
		int n;

		if (!b->leases || b->host == OM_COPY_NONE || (only && b->group != only) ||
		    (views > 0) != viewed)
			continue;
		n = snprintf(text + used, size - used, "%s%s (%u leases, %u views)",
		             used ? "\n" : "", b->name, b->leases, views);
		if (n < 0 || used + (size_t)n >= size) {
			text[used] = '\0';
			return;
		}
		used += (size_t)n;
	}
}

/* Give up the disk copy of an idle block that is in memory too. A consumer may have written to a view
 * that was read-only (torch ignores that), so the bytes in memory replace those on disk only when they
 * hash the same; else the memory goes, and the disk keeps what was stored. No flag "was exported"
 * would do instead: nearly every block in memory was, and without their disk copies giving way, blocks
 * could not be exchanged when the disk is full. The lock is given up; a lease meanwhile ends LEAVING. */
static bool drop_disk_copy_locked(struct om_store *s, struct om_block *b)
{
	bool same;

	om_block_leave_begin(b);
	b->holds++;
	s->inside++;
	om_mutex_unlock(&s->lock);
	same = om_hash(b->data, b->nbytes) == b->hash;
	om_mutex_lock(&s->lock);
	b->holds--;
	s->inside--;
	if (b->host == OM_COPY_LEAVING && !same) {
		om_room_drop_locked(s, b);
	} else if (b->host == OM_COPY_LEAVING) {
		om_block_disk_drop(b, &s->disk);
		om_block_leave_rescue(b);
	}
	om_store_reap_locked(s, b);
	om_store_changed_locked(s);
	return same;
}

/* Have one disk copy of a block that is in memory give way. 1: look again; 0: there is none; OM_EBUSY:
 * none now, but what is leased may be let go, or room was made in memory. Gives up the lock. */
static int drop_stale_locked(struct om_store *s)
{
	int found = 0;

	OM_LIST_FOREACH(link, &s->blocks) {
		struct om_block *b = om_container_of(link, struct om_block, all);

		if (b->disk != OM_COPY_VALID || b->host != OM_COPY_VALID)
			continue;
		if (!b->leases && !b->holds)
			return drop_disk_copy_locked(s, b) ? 1 : OM_EBUSY;
		found = OM_EBUSY; /* whoever holds it may write to it any time */
	}
	return found;
}

static int grow_swap_locked(struct om_store *s, uint64_t target)
{
	struct om_file *file = s->disk.file;
	int code = 0;

	s->disk.growing = true;
	om_mutex_unlock(&s->lock);
	if (!file)
		code = om_file_create_swap(s->disk.directory, &file);
	if (!code)
		code = om_file_grow(file, target);
	om_mutex_lock(&s->lock);
	if (file && !s->disk.file)
		s->disk.file = file;
	s->disk.growing = false;
	om_store_changed_locked(s);
	return code ? code : om_disk_grown(&s->disk, target);
}

static int disk_full_error(struct om_store *s, const struct om_block *b, uint64_t bytes)
{
	return om_err(
		OM_EDISKFULL,
		"block '%s': no room on disk for %llu bytes: used %llu, disk_limit %llu; raise "
		"disk_limit or remove blocks (the bytes are still in memory)",
		b->name, (unsigned long long)bytes, (unsigned long long)s->disk.used_bytes,
		(unsigned long long)s->disk.limit_bytes);
}

static int disk_busy_error(struct om_store *s, const struct om_block *b, uint64_t bytes)
{
	char holders[OM_ERROR_HOLDERS] = "";

	list_holders(s, NULL, true, holders, sizeof(holders));
	list_holders(s, NULL, false, holders, sizeof(holders));
	om_err(OM_EBUSY,
	       "block '%s': no room on disk for %llu bytes while blocks that are in use keep their copies "
	       "there: used %llu, disk_limit %llu; let leases and views go, or raise disk_limit",
	       b->name, (unsigned long long)bytes, (unsigned long long)s->disk.used_bytes,
	       (unsigned long long)s->disk.limit_bytes);
	memcpy(om_err_last()->holders, holders, sizeof(holders));
	return OM_EBUSY;
}

/* Room on disk for a block that is LEAVING. May give up the lock. */
static int disk_reserve_locked(struct om_store *s, struct om_block *b, uint64_t bytes)
{
	for (;;) {
		uint64_t target;
		int stale, code = om_disk_alloc(&s->disk, bytes, &b->disk_copy);

		if (code != -ENOSPC)
			return code;
		if (s->disk.growing) {
			om_store_wait_locked(s, UINT64_MAX);
			continue;
		}
		target = om_disk_target(&s->disk, bytes);
		code = target ? grow_swap_locked(s, target) : OM_EDISKFULL;
		if (!code)
			continue;
		stale = drop_stale_locked(s);
		if (stale == OM_EBUSY)
			return disk_busy_error(s, b, bytes);
		if (!stale)
			return target ? code : disk_full_error(s, b, bytes);
	}
}

/* Begin to write an idle dirty copy out. The lock is given up. Returns 0 when the move is under way or
 * no longer needed. */
static int spill_locked(struct om_store *s, struct om_block *b)
{
	uint64_t hash = 0, head = b->foreign ? 0 : (uintptr_t)b->data % OM_PAGE;
	struct om_move *m;
	int code;

	om_block_leave_begin(b);
	if (b->move) /* rescued while it was being written: the write goes on, with the same bytes */
		return 0;
	b->holds++;
	s->inside++;
	code = disk_reserve_locked(s, b, om_up(OM_MAX(b->nbytes + head, 1), OM_PAGE));
	if (!code && b->host == OM_COPY_LEAVING && b->named) {
		om_mutex_unlock(&s->lock);
		hash = om_hash(b->data, b->nbytes);
		om_mutex_lock(&s->lock);
	}
	b->holds--;
	s->inside--;
	if (!code && s->closing)
		code = om_err(OM_ECLOSED, "the store is closed");
	if (b->host != OM_COPY_LEAVING || !b->named || code) { /* rescued, removed, or no room */
		om_disk_free(&s->disk, &b->disk_copy);
		if (b->host == OM_COPY_LEAVING)
			om_block_leave_rescue(b);
		om_store_reap_locked(s, b);
		return code;
	}
	b->disk_copy.head = (uint32_t)head;
	om_block_disk_begin(b);
	code = om_move_create_spill(b, &s->disk, s->request_bytes, &m);
	if (code) {
		om_block_disk_drop(b, &s->disk);
		om_block_leave_rescue(b);
		return code;
	}
	m->hash = hash;
	b->move = m;
	s->moves++;
	om_mover_queue_locked(s, m);
	return 0;
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
	s->counters.drops++;
	s->counters.prefetch_waste += b->unused;
	om_block_host_drop(b, &s->pool);
}

int om_room_make_locked(struct om_store *s, struct om_group *g, uint64_t bytes, bool spill,
                        struct om_block *const *keep, size_t keep_count)
{
	if (g->limit_bytes && bytes > g->limit_bytes)
		return limit_error(g, bytes, g->limit_bytes, true);
	if (bytes > s->host_limit_bytes)
		return limit_error(g, bytes, s->host_limit_bytes, false);
	for (;;) {
		bool own = !group_fits(g, bytes), any;
		struct om_group *only = own ? g : NULL;
		uint64_t need = bytes + (over_limit(g) ? g->used_bytes - g->limit_bytes : 0);
		struct om_block *b;

		if (!own && om_pool_fits(&s->pool, bytes))
			return 0;
		if (departing(s, only, need, &any))
			return OM_EAGAIN;
		b = pick_victim(s, only, false, keep, keep_count);
		if (b) {
			om_room_drop_locked(s, b);
			continue;
		}
		b = spill ? pick_victim(s, only, true, keep, keep_count) : NULL;
		if (b) {
			int code = spill_locked(s, b);

			return code ? code : OM_EAGAIN;
		}
		b = pick_ahead(s, only, keep, keep_count);
		if (!b)
			return any ? OM_EAGAIN : OM_EBUSY;
		om_fetch_cancel_locked(s, b);
	}
}

void om_room_shrink_locked(struct om_store *s, struct om_group *g)
{
	while (!s->closing && over_limit(g)) {
		bool any;
		struct om_block *b;

		if (departing(s, g, g->used_bytes - g->limit_bytes, &any))
			return;
		b = pick_victim(s, g, false, NULL, 0);
		if (b) {
			om_room_drop_locked(s, b);
			continue;
		}
		b = pick_victim(s, g, true, NULL, 0);
		if (b) {
			if (spill_locked(s, b))
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
	if (over_limit(b->group) && b->host == OM_COPY_VALID && !b->leases && !b->holds &&
	    om_block_clean(b))
		om_room_drop_locked(s, b);
}

int om_room_verdict_locked(struct om_store *s, int code, unsigned failed_before)
{
	if ((code == OM_EAGAIN || code == OM_EBUSY) &&
	    s->spills_failed - failed_before >= OM_SPILL_TRIES)
		return om_err_set(&s->spill_error);
	return code;
}

int om_room_wait_locked(struct om_store *s, struct om_group *g, uint64_t bytes,
                        uint64_t deadline_ns, struct om_block *const *keep, size_t keep_count)
{
	unsigned failed = s->spills_failed;

	for (;;) {
		int code = s->closing ? om_err(OM_ECLOSED, "the store is closed")
		                      : om_room_make_locked(s, g, bytes, true, keep, keep_count);

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

void om_room_busy_error(struct om_store *s, struct om_group *g, uint64_t bytes)
{
	char holders[OM_ERROR_HOLDERS] = "", which[80];
	uint64_t used;
	struct om_group *only = group_fits(g, bytes) ? NULL : g;
	const struct om_block *victim = pick_victim(s, only, true, NULL, 0);

	if (victim && !om_disk_target(&s->disk, victim->nbytes)) {
		disk_busy_error(s, victim, victim->nbytes);
		return;
	}
	/* A stream's residents are always leased: views are what somebody can let go. */
	list_holders(s, only, true, holders, sizeof(holders));
	list_holders(s, only, false, holders, sizeof(holders));
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
		if (b->leases)
			return 0;
		if (b->host == OM_COPY_VALID && om_block_clean(b) && !b->holds) {
			om_room_drop_locked(s, b);
			return 1;
		}
		if (b->host == OM_COPY_VALID && !b->holds) {
			code = spill_locked(s, b);
			if (code == OM_EBUSY && om_now() < deadline_ns) {
				om_store_wait_locked(s, deadline_ns);
				code = 0;
			}
		} else if (b->host == OM_COPY_LEAVING && b->move) {
			code = om_fetch_settle_locked(s, b->move, deadline_ns);
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

		if (!b->ranges && b->named)
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

int om_room_admit_locked(struct om_store *s, const char *name, uint64_t bytes)
{
	uint64_t capacity = om_disk_capacity(&s->disk);

	bytes = om_up(OM_MAX(bytes, 1), OM_PAGE);
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
