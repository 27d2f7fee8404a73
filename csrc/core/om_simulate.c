/* om_simulate: a trace through a policy. Ids become slots by one hash table; the rest is om_cache. */

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/om_base.h"
#include "base/om_error.h"
#include "core/om_cache.h"
#include "core/om_heap.h"

/* ---- belady: only what has happened before can be used, unless one has the trace ---- */

struct belady {
	struct om_policy base;
	size_t *next; /* by request: when the same slot is asked for next; `count`: never */
	size_t now;
	struct om_heap members; /* latest next use first */
};

static void belady_fini(struct om_policy *p)
{
	om_free(((struct belady *)p)->next);
	om_heap_fini(&((struct belady *)p)->members);
}

static int belady_grow(struct om_policy *p, uint32_t slots)
{
	return om_heap_grow(&((struct belady *)p)->members, p->slots, slots);
}

static double belady_key(const struct belady *b)
{
	return -(double)b->next[b->now - 1];
}

static void belady_access(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit)
{
	struct belady *b = (struct belady *)p;

	(void)bytes;
	b->now++;
	if (hit)
		om_heap_set(&b->members, slot, belady_key(b));
}

static void belady_add(struct om_policy *p, uint32_t slot, uint64_t bytes)
{
	(void)bytes;
	om_heap_put(&((struct belady *)p)->members, slot, belady_key((struct belady *)p));
}

static uint32_t belady_victim(struct om_policy *p, om_may *may, void *arg)
{
	const struct om_heap *h = &((struct belady *)p)->members;

	(void)may;
	(void)arg;
	return h->count ? h->slots[0] : OM_NIL;
}

static void belady_drop(struct om_policy *p, uint32_t slot, bool evicted)
{
	(void)evicted;
	om_heap_del(&((struct belady *)p)->members, slot);
}

static const struct om_policy_ops belady_ops = {
	.name = "belady",
	.bytes = sizeof(struct belady),
	.fini = belady_fini,
	.grow = belady_grow,
	.access = belady_access,
	.add = belady_add,
	.victim = belady_victim,
	.drop = belady_drop,
};

/* ---- a run ---- */

struct run {
	uint32_t *slots; /* by request */
	uint64_t *sizes; /* by slot */
	uint64_t *first; /* by slot: its id */
	uint32_t *table; /* slot + 1, by hash of the id */
	size_t table_size, count;
	uint32_t unique;
	struct om_cache cache;
};

static void run_fini(struct run *r)
{
	om_policy_destroy(r->cache.policy);
	om_free(r->cache.member);
	om_free(r->slots);
	om_free(r->sizes);
	om_free(r->first);
	om_free(r->table);
}

static uint32_t slot_of(struct run *r, uint64_t id)
{
	size_t at = (size_t)((id * UINT64_C(0x9E3779B97F4A7C15)) >> 20) & (r->table_size - 1);

	while (r->table[at] && r->first[r->table[at] - 1] != id)
		at = (at + 1) & (r->table_size - 1);
	if (!r->table[at]) {
		r->first[r->unique] = id;
		r->table[at] = ++r->unique;
	}
	return r->table[at] - 1;
}

static int number_ids(struct run *r, const uint64_t *ids, const uint64_t *sizes)
{
	uint64_t total = 0;

	for (size_t i = 0; i < r->count; i++) {
		uint32_t known = r->unique, slot = slot_of(r, ids[i]);
		uint64_t bytes = sizes ? sizes[i] : 1;

		if (slot == known)
			r->sizes[slot] = bytes;
		else if (r->sizes[slot] != bytes)
			return om_err(OM_EVALUE,
			              "request %zu: id %" PRIu64 " has %" PRIu64
			              " bytes, and %" PRIu64
			              " before; give each size an id of its own",
			              i, ids[i], bytes, r->sizes[slot]);
		if (om_add_overflows(total, bytes, &total))
			return om_err(OM_EVALUE, "the sizes add up to more than 2^64 bytes");
		r->slots[i] = slot;
	}
	return 0;
}

static int run_init(struct run *r, const uint64_t *ids, const uint64_t *sizes, size_t count)
{
	*r = (struct run){ .table_size = 16, .count = count };
	if (count >= OM_NIL)
		return om_err(OM_EVALUE, "%zu requests: at most %u can be simulated", count,
		              OM_NIL - 1);
	while (r->table_size < 2 * count)
		r->table_size *= 2;
	r->slots = om_alloc(OM_MAX(count, 1), sizeof(*r->slots));
	r->sizes = om_alloc(OM_MAX(count, 1), sizeof(*r->sizes));
	r->first = om_alloc(OM_MAX(count, 1), sizeof(*r->first));
	r->table = om_alloc(r->table_size, sizeof(*r->table));
	if (!r->slots || !r->sizes || !r->first || !r->table)
		return -ENOMEM;
	return number_ids(r, ids, sizes);
}

static int look_ahead(struct belady *b, const struct run *r)
{
	size_t *next = om_alloc(OM_MAX(r->unique, 1), sizeof(*next));

	b->next = om_alloc(OM_MAX(r->count, 1), sizeof(*b->next));
	if (!next || !b->next) {
		om_free(next);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < r->unique; i++)
		next[i] = r->count;
	for (size_t i = r->count; i-- > 0;) {
		b->next[i] = next[r->slots[i]];
		next[r->slots[i]] = i;
	}
	om_free(next);
	return 0;
}

static int make_cache(struct run *r, uint64_t capacity, const char *policy)
{
	bool future = !strcmp(policy, belady_ops.name);
	const struct om_policy_ops *ops = future ? &belady_ops : om_policy_find(policy);
	int code;

	if (!ops)
		return om_err(OM_EVALUE,
		              "no policy is named '%s'; there are " OM_POLICY_NAMES ", and belady",
		              policy);
	code = om_policy_create(ops, capacity, &r->cache.policy);
	code = code ? code : om_policy_grow(r->cache.policy, r->unique);
	if (!code && future)
		code = look_ahead((struct belady *)r->cache.policy, r);
	r->cache.member = om_alloc(OM_MAX(r->unique, 1), 1);
	r->cache.sizes = r->sizes;
	return code || r->cache.member ? code : -ENOMEM;
}

const char *om_expert_name(unsigned expert)
{
	return om_policy_experts[expert]->name;
}

int om_simulate(const uint64_t *ids, const uint64_t *sizes, size_t count, uint64_t capacity,
                const char *policy, struct om_simulation *ret)
{
	struct run r;
	int code = run_init(&r, ids, sizes, count);

	*ret = (struct om_simulation){ .requests = count };
	if (!code && !capacity)
		code = om_err(OM_EVALUE, "a capacity of 0 holds nothing");
	code = code ? code : make_cache(&r, capacity, policy);
	for (size_t i = 0; i < count && !code; i++) {
		uint64_t bytes = r.sizes[r.slots[i]];

		ret->bytes += bytes;
		if (om_cache_request(&r.cache, r.slots[i], NULL, NULL))
			continue;
		ret->misses++;
		ret->missed_bytes += bytes;
	}
	if (!code && r.cache.policy->ops == &om_policy_adaptive)
		om_policy_adaptive_led(r.cache.policy, ret->led);
	run_fini(&r);
	return code;
}
