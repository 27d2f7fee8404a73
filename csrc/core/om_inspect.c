/* om_inspect: what a store looks like from outside: names, info, statistics, and the invariants. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

#define LLU(x) ((unsigned long long)(x))

int om_store_names(struct om_store *s, const char *group, char ***ret, size_t *ret_count)
{
	char **names;
	size_t n = 0;
	int code = om_store_enter(s);

	if (code)
		return code;
	names = om_alloc(s->table.count, sizeof(*names));
	code = names ? 0 : -ENOMEM;
	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);

		if (code || !b->named || b->inner || (group && strcmp(group, b->group->name)))
			continue;
		names[n] = om_strdup(b->name);
		if (names[n])
			n++;
		else
			code = -ENOMEM;
	}
	om_mutex_unlock(&s->lock);
	if (code) {
		om_names_free(names, n);
		return code;
	}
	*ret = names;
	*ret_count = n;
	return 0;
}

void om_names_free(char **names, size_t count)
{
	while (names && count)
		om_free(names[--count]);
	om_free(names);
}

int om_store_groups(struct om_store *s, char ***ret, size_t *ret_count)
{
	char **names;
	size_t room = 1, n = 0;
	int code = om_store_enter(s);

	if (code)
		return code;
	OM_LIST_FOREACH(link, &s->groups)
		room++;
	names = om_alloc(room, sizeof(*names));
	code = names ? 0 : -ENOMEM;
	OM_LIST_FOREACH(link, &s->groups) {
		if (code)
			break;
		names[n] = om_strdup(om_container_of(link, struct om_group, link)->name);
		if (names[n])
			n++;
		else
			code = -ENOMEM;
	}
	om_mutex_unlock(&s->lock);
	if (code) {
		om_names_free(names, n);
		return code;
	}
	*ret = names;
	*ret_count = n;
	return 0;
}

int om_store_info(struct om_store *s, const char *name, struct om_info *ret)
{
	struct om_block *b;
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code;
	memset(ret, 0, sizeof(*ret));
	ret->nbytes = b->nbytes;
	if (b->host == OM_COPY_VALID || b->host == OM_COPY_LEAVING)
		ret->tiers |= OM_TIER_HOST;
	if (b->disk == OM_COPY_VALID)
		ret->tiers |= OM_TIER_DISK;
	if (b->body && om_block_coded(b) && om_block_coded(b)->host == OM_COPY_VALID)
		ret->tiers |= OM_TIER_PACKED;
	ret->leases = b->leases;
	ret->desc.ndim = -1;
	if (b->body)
		ret->desc = b->body->desc;
	snprintf(ret->group, sizeof(ret->group), "%s", b->group->name);
	ret->has_origin = om_block_has_origin(b);
	if (ret->has_origin) {
		const struct om_body *from = b->body->origin ? b->body->origin->body : b->body;

		ret->origin_count = from->range_count;
		snprintf(ret->origin, sizeof(ret->origin), "%s", from->ranges[0].file->path);
		ret->origin_offset = from->ranges[0].offset;
	}
	return om_store_leave_block(s, b, 0);
}

int om_store_stats(struct om_store *s, struct om_stats *ret)
{
	struct om_peaks peaks;

	if (s->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED, "this store belongs to the process that forked this one");
	om_mutex_lock(&s->lock);
	if (!s->closing)
		om_store_drain_locked(s);
	*ret = s->counters;
	peaks = om_meter_peaks_locked(s);
	ret->host = (struct om_tier_stats){ s->pool.used_bytes, peaks.host_bytes,
		                            s->host_limit_bytes, s->pool.mapped_bytes };
	OM_LIST_FOREACH(link, &s->groups) {
		const struct om_group *g = om_container_of(link, struct om_group, link);

		ret->leases += g->leases;
		ret->host.used_bytes += g->foreign_bytes;
		ret->packed_bytes += g->packed_bytes;
		ret->idle_bytes += g->idle_bytes;
		ret->spare_bytes += g->spare_bytes;
	}
	ret->packed_peak_bytes = peaks.packed_bytes;
	ret->disk = (struct om_tier_stats){ s->disk.used_bytes, peaks.disk_bytes,
		                            s->disk.limit_bytes,
		                            s->disk.arena ? om_arena_size(s->disk.arena) : 0 };
	ret->read_p50_ns = om_latency_quantile(&s->read_latency, 0.5);
	ret->read_p99_ns = om_latency_quantile(&s->read_latency, 0.99);
	ret->write_p50_ns = om_latency_quantile(&s->write_latency, 0.5);
	ret->write_p99_ns = om_latency_quantile(&s->write_latency, 0.99);
	ret->depth = s->io_config.depth;
	ret->moves = s->moves;
	ret->blocks = s->table.count;
	ret->exported_bytes = __atomic_load_n(&s->exported_bytes, __ATOMIC_RELAXED);
	om_mutex_unlock(&s->lock);
	return 0;
}

void om_store_collect(struct om_store *s)
{
	(void)s;
	om_foreign_collect();
}

/* ---- one block ---- */

int om_block_mark(struct om_store *s, struct om_block *b, bool pinned, uint8_t tag)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	if (!b->named)
		return om_store_leave(s, om_err(OM_ENAME, "block '%s' was removed", b->name));
	b->tag = tag;
	om_block_pin(b, pinned);
	om_store_changed_locked(s);
	return om_store_leave(s, 0);
}

void om_block_state(struct om_store *s, struct om_block *b, struct om_block_state *ret)
{
	bool inherited = s->fork_generation != om_fork_generation();

	*ret = (struct om_block_state){ .nbytes = b->nbytes, .tag = b->tag };
	if (inherited)
		return;
	om_mutex_lock(&s->lock);
	if (!s->closing)
		om_store_drain_locked(s);
	ret->created_ns = b->created_ns;
	ret->accessed_ns = b->accessed_ns;
	ret->accesses = b->accesses;
	ret->pinned = b->pinned;
	ret->leases = b->leases;
	ret->named = b->named && !s->closing;
	ret->blank = b->blank;
	if (ret->named && (b->host == OM_COPY_VALID || b->host == OM_COPY_LEAVING))
		ret->data = (uint64_t)(uintptr_t)b->body->data;
	ret->swapped = ret->named && om_block_swapped(b);
	ret->on_disk = ret->named && b->disk == OM_COPY_VALID;
	if (ret->on_disk)
		ret->disk_offset = b->body->disk_copy.runs[0].offset + b->body->disk_copy.head;
	om_mutex_unlock(&s->lock);
}

/* ---- invariants ---- */

static int check_idle_block(const struct om_block *b)
{
	if (b->leases || b->host != OM_COPY_NONE || b->disk != OM_COPY_NONE || !b->blank)
		return om_err(OM_ECORRUPT, "block '%s' has copies and no body", b->name);
	return 0;
}

static int check_block(const struct om_block *b)
{
	const struct om_body *body = b->body;
	bool listed = body && body->ahead.next != &body->ahead;
	size_t holders = 0;

	if (!body)
		return check_idle_block(b);
	OM_LIST_FOREACH(link, &body->holders)
		holders++;
	/* I1: a block has its bytes somewhere, or never had any. */
	if (b->host == OM_COPY_NONE && !om_block_has_origin(b) && b->disk != OM_COPY_VALID &&
	    !body->packed && !b->blank && b->named)
		return om_err(OM_ECORRUPT, "I1: block '%s' has no copy and no origin", b->name);
	/* I2: leased copies are VALID or FILLING, and on no list. */
	if (b->leases && b->host != OM_COPY_VALID && b->host != OM_COPY_FILLING)
		return om_err(OM_ECORRUPT, "I2: block '%s' is leased in state %d", b->name,
		              b->host);
	if (listed != (b->host == OM_COPY_FILLING && !b->leases))
		return om_err(OM_ECORRUPT, "I2: block '%s' is %s the list of fills ahead", b->name,
		              listed ? "on" : "not on");
	if (b->slot >= b->group->seat_count || b->group->seats[b->slot] != b)
		return om_err(OM_ECORRUPT, "I2: block '%s' has no seat in its group", b->name);
	if (holders > b->leases)
		return om_err(OM_ECORRUPT, "I2: block '%s': %zu lease objects, %u leases", b->name,
		              holders, b->leases);
	/* I4: at most one copy is being filled, by one move. */
	if (b->host == OM_COPY_FILLING && b->disk == OM_COPY_FILLING)
		return om_err(OM_ECORRUPT, "I4: block '%s' fills two copies", b->name);
	if (b->host == OM_COPY_FILLING && !body->move && b->named && !b->leases)
		return om_err(OM_ECORRUPT, "I4: block '%s' fills without a move", b->name);
	/* I5: a LEAVING copy has no lease. */
	if (b->host == OM_COPY_LEAVING && b->leases)
		return om_err(OM_ECORRUPT, "I5: block '%s' leaves under a lease", b->name);
	if (body->packed && (b->disk != OM_COPY_NONE || (body->move && !body->move->decoding) ||
	                     !body->packed->inner))
		return om_err(OM_ECORRUPT, "block '%s' is packed and has other copies", b->name);
	return 0;
}

static void sum_block(const struct om_block *b, struct om_group_check *sum, uint64_t *pool,
                      uint64_t *disk, uint64_t *sole)
{
	uint64_t bytes = om_up(OM_MAX(b->nbytes, 1), OM_PAGE);
	const struct om_body *body = b->body;

	if (b->host != OM_COPY_NONE) {
		uint64_t taken = body->foreign ? bytes : body->mem.bytes;
		bool idle = b->host == OM_COPY_VALID && !b->leases && !b->pinned;

		*(b->gone ? &sum->gone_bytes : &sum->bytes) += taken;
		sum->packed_bytes += b->inner && !b->gone ? taken : 0;
		sum->foreign_bytes += body->foreign ? bytes : 0;
		sum->idle += idle;
		sum->idle_bytes += idle ? taken : 0;
		sum->spare_bytes += idle && om_block_has_origin(b) ? taken : 0;
		sum->doubled += idle && body->packed;
		*pool += body->foreign ? 0 : body->mem.bytes;
	}
	if (body) {
		uint64_t runs = om_disk_copy_bytes(&body->disk_copy);

		*disk += runs;
		sum->disk_bytes += b->disk == OM_COPY_NONE ? 0 : runs;
	}
	sum->blocks += b->named && !b->inner;
	sum->leases += b->leases;
	sum->pinned += b->pinned;
	sum->swapped += om_block_swapped(b);
	sum->missing_bytes += om_block_missing_bytes(b);
	*sole += om_block_admitted(b) ? bytes : 0;
}

static int check_group(struct om_group *g)
{
	const struct om_group_check is = { g->used_bytes, g->packed_bytes,  g->gone_bytes,
		                           g->disk_bytes, g->foreign_bytes, g->blocks,
		                           g->leases,     g->pinned,        g->swapped,
		                           g->idle,       g->idle_bytes,    g->spare_bytes,
		                           g->doubled,    g->missing_bytes };
	static const char *const names[] = {
		"HOST bytes", "encoded bytes",   "bytes without a name",
		"DISK bytes", "bytes of others", "blocks",
		"leases",     "pinned",          "swapped",
		"idle",       "idle bytes",      "spare bytes",
		"doubled",    "missing bytes"
	};
	const uint64_t *counted = (const uint64_t *)&is, *summed = (const uint64_t *)&g->check;

	for (size_t i = 0; i < sizeof(is) / sizeof(*counted); i++)
		if (counted[i] != summed[i])
			return om_err(OM_ECORRUPT, "I3: group '%s': %s are %llu, counted %llu",
			              g->name, names[i], LLU(summed[i]), LLU(counted[i]));
	/* I6: used bytes stay within the limit, or work down to one that was lowered. */
	g->lowered_from = OM_MIN(g->lowered_from, g->used_bytes);
	if (g->limit_bytes && g->used_bytes > OM_MAX(g->limit_bytes, g->lowered_from))
		return om_err(OM_ECORRUPT, "I6: group '%s' uses %llu of %llu bytes", g->name,
		              LLU(g->used_bytes), LLU(g->limit_bytes));
	return 0;
}

static int check_sums(struct om_store *s)
{
	uint64_t pool = 0, disk = 0, sole = 0, packed = 0;
	int code = 0;

	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);

		g->check = (struct om_group_check){ .bytes = g->loose_bytes };
	}
	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);

		sum_block(b, &b->group->check, &pool, &disk, &sole);
	}
	/* I3: a tier's used bytes are the sum of its copies' extents. */
	if (pool + s->loose_bytes != s->pool.used_bytes)
		return om_err(
			OM_ECORRUPT,
			"I3: HOST copies hold %llu bytes and threads %llu, the pool counts %llu",
			LLU(pool), LLU(s->loose_bytes), LLU(s->pool.used_bytes));
	if (disk != s->disk.used_bytes)
		return om_err(OM_ECORRUPT, "I3: DISK copies hold %llu bytes, the tier counts %llu",
		              LLU(disk), LLU(s->disk.used_bytes));
	if (sole != s->sole_bytes && !s->adding)
		return om_err(OM_ECORRUPT,
		              "blocks without an origin hold %llu bytes, %llu were admitted",
		              LLU(sole), LLU(s->sole_bytes));
	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);

		code = code ? code : check_group(g);
		packed += g->packed_bytes;
	}
	if (!code && packed != s->meter.packed.used_bytes)
		return om_err(OM_ECORRUPT, "I3: encoded forms hold %llu bytes, counted %llu",
		              LLU(packed), LLU(s->meter.packed.used_bytes));
	if (code)
		return code;
	if (s->pool.mapped_bytes > s->pool.limit_bytes)
		return om_err(OM_ECORRUPT, "I6: %llu bytes are mapped, the limit is %llu",
		              LLU(s->pool.mapped_bytes), LLU(s->pool.limit_bytes));
	return 0;
}

int om_store_check(struct om_store *s)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	OM_LIST_FOREACH(link, &s->blocks) {
		code = code ? code : check_block(om_container_of(link, struct om_block, all));
	}
	code = code ? code : check_sums(s);
	code = code ? code : om_pool_check(&s->pool);
	code = code ? code : om_disk_check(&s->disk);
	om_mutex_unlock(&s->lock);
	return code;
}
