/* om_inspect: what a store looks like from outside: names, info, statistics, and the invariants. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

#define LLU(x) ((unsigned long long)(x))

int om_store_names(struct om_store *s, char ***ret, size_t *ret_count)
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

		if (code || !b->named)
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
	ret->leases = b->leases;
	ret->desc = b->desc;
	snprintf(ret->group, sizeof(ret->group), "%s", b->group->name);
	ret->has_origin = b->ranges != NULL;
	ret->origin_count = b->range_count;
	if (b->range_count) {
		snprintf(ret->origin, sizeof(ret->origin), "%s", b->ranges[0].file->path);
		ret->origin_offset = b->ranges[0].offset;
	}
	return om_store_leave_block(s, b, 0);
}

int om_store_stats(struct om_store *s, struct om_stats *ret)
{
	if (s->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED, "this store belongs to the process that forked this one");
	om_mutex_lock(&s->lock);
	if (!s->closing)
		om_store_drain_locked(s);
	*ret = s->counters;
	ret->host = (struct om_tier_stats){ s->pool.used_bytes, s->host_peak_bytes,
		                            s->host_limit_bytes, s->pool.mapped_bytes };
	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);

		ret->leases += b->leases;
		if (b->foreign)
			ret->host.used_bytes += om_up(OM_MAX(b->nbytes, 1), OM_PAGE);
	}
	ret->disk = (struct om_tier_stats){ s->disk.used_bytes, s->disk.peak_bytes,
		                            s->disk.limit_bytes,
		                            s->disk.arena ? om_arena_size(s->disk.arena) : 0 };
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

/* ---- invariants ---- */

static int check_block(const struct om_block *b)
{
	bool listed = b->ahead.next != &b->ahead;
	size_t holders = 0;

	OM_LIST_FOREACH(link, &b->holders)
		holders++;
	/* I1: a block has its bytes somewhere. */
	if (b->host == OM_COPY_NONE && !b->ranges && b->disk != OM_COPY_VALID && b->named)
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
	if (b->host == OM_COPY_FILLING && !b->move && b->named)
		return om_err(OM_ECORRUPT, "I4: block '%s' fills without a move", b->name);
	/* I5: a LEAVING copy has no lease. */
	if (b->host == OM_COPY_LEAVING && b->leases)
		return om_err(OM_ECORRUPT, "I5: block '%s' leaves under a lease", b->name);
	return 0;
}

static int check_sums(struct om_store *s)
{
	uint64_t pool = 0, disk = 0, sole = 0;

	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);

		g->check_bytes = g->check_idle = 0;
	}
	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);
		uint64_t bytes = om_up(OM_MAX(b->nbytes, 1), OM_PAGE);

		if (b->host != OM_COPY_NONE) {
			b->group->check_bytes += b->foreign ? bytes : b->mem.bytes;
			b->group->check_idle += b->host == OM_COPY_VALID && !b->leases;
			pool += b->foreign ? 0 : b->mem.bytes;
		}
		for (size_t i = 0; i < b->disk_copy.count; i++)
			disk += b->disk_copy.runs[i].bytes;
		sole += b->ranges ? 0 : bytes;
	}
	/* I3: a tier's used bytes are the sum of its copies' extents. */
	if (pool != s->pool.used_bytes)
		return om_err(OM_ECORRUPT, "I3: HOST copies hold %llu bytes, the pool counts %llu",
		              LLU(pool), LLU(s->pool.used_bytes));
	if (disk != s->disk.used_bytes)
		return om_err(OM_ECORRUPT, "I3: DISK copies hold %llu bytes, the tier counts %llu",
		              LLU(disk), LLU(s->disk.used_bytes));
	if (sole != s->sole_bytes && !s->adding)
		return om_err(OM_ECORRUPT,
		              "blocks without an origin hold %llu bytes, %llu were admitted",
		              LLU(sole), LLU(s->sole_bytes));
	OM_LIST_FOREACH(link, &s->groups) {
		struct om_group *g = om_container_of(link, struct om_group, link);

		if (g->check_bytes != g->used_bytes)
			return om_err(OM_ECORRUPT,
			              "I3: group '%s' holds %llu bytes and counts %llu", g->name,
			              LLU(g->check_bytes), LLU(g->used_bytes));
		if (g->check_idle != g->idle)
			return om_err(OM_ECORRUPT,
			              "I2: group '%s' has %llu idle copies and counts %llu",
			              g->name, LLU(g->check_idle), LLU(g->idle));
		/* I6: used bytes stay within the limit, or work down to one that was lowered. */
		g->lowered_from = OM_MIN(g->lowered_from, g->used_bytes);
		if (g->limit_bytes && g->used_bytes > OM_MAX(g->limit_bytes, g->lowered_from))
			return om_err(OM_ECORRUPT, "I6: group '%s' uses %llu of %llu bytes",
			              g->name, LLU(g->used_bytes), LLU(g->limit_bytes));
	}
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
