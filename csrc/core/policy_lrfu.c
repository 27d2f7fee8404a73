/*
 * policy_lrfu: recency and frequency in one number (Lee et al., 2001), kept after eviction.
 *
 * Each use of an id counts 1, and half as much for every `half` accesses since: C. Victim: the least.
 * All decay alike, so log2 of C at a common moment orders members once and for all until they are
 * used again: key = last use / half + log2 C then. A binary heap of members by key, the least first.
 * `half` is 4 times the members, in powers of two, so that keys are made anew only when it changes.
 */
#include <math.h>

#include "base/om_base.h"
#include "core/om_heap.h"
#include "core/om_policy.h"

#define HALF_PER_MEMBER 4

struct item {
	uint64_t last; /* access count at its last use */
	float log_c;   /* log2 of C then */
	bool used;     /* at all */
};

struct lrfu {
	struct om_policy base;
	struct item *items;
	struct om_heap members;
	uint64_t now, half; /* a power of two */
};

static int init(struct om_policy *p)
{
	((struct lrfu *)p)->half = 32;
	return 0;
}

static void fini(struct om_policy *p)
{
	om_free(((struct lrfu *)p)->items);
	om_heap_fini(&((struct lrfu *)p)->members);
}

static int grow(struct om_policy *p, uint32_t slots)
{
	struct lrfu *l = (struct lrfu *)p;
	int code = om_policy_grow_array(&l->items, p->slots, slots, sizeof(*l->items));

	return code ? code : om_heap_grow(&l->members, p->slots, slots);
}

static double key_of(const struct lrfu *l, uint32_t slot)
{
	const struct item *it = &l->items[slot];

	return (double)it->last / (double)l->half + (double)it->log_c;
}

/* Keep `half` near 4 times the members; on a change all keys are made anew. */
static void set_half(struct lrfu *l)
{
	uint64_t wanted = (uint64_t)HALF_PER_MEMBER * OM_MAX(l->members.count, 8);

	if (wanted < 2 * l->half && 2 * wanted > l->half)
		return;
	while (l->half <= wanted / 2)
		l->half *= 2;
	while (l->half >= 2 * wanted)
		l->half /= 2;
	for (uint32_t i = 0; i < l->members.count; i++)
		l->members.keys[l->members.slots[i]] = key_of(l, l->members.slots[i]);
	om_heap_order(&l->members);
}

static void access(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit)
{
	struct lrfu *l = (struct lrfu *)p;
	struct item *it = &l->items[slot];
	float halves = (float)(++l->now - it->last) / (float)l->half;

	(void)bytes;
	it->log_c = it->used ? log2f(1.0f + exp2f(it->log_c - halves)) : 0.0f;
	it->used = true;
	it->last = l->now;
	if (hit)
		om_heap_set(&l->members, slot, key_of(l, slot));
}

static void add(struct om_policy *p, uint32_t slot, uint64_t bytes)
{
	struct lrfu *l = (struct lrfu *)p;

	(void)bytes;
	om_heap_put(&l->members, slot, key_of(l, slot));
	set_half(l);
}

static void drop(struct om_policy *p, uint32_t slot, bool evicted)
{
	(void)evicted;
	om_heap_del(&((struct lrfu *)p)->members, slot);
}

static void forget(struct om_policy *p, uint32_t slot)
{
	((struct lrfu *)p)->items[slot] = (struct item){ 0 };
}

static uint32_t victim(struct om_policy *p, om_may *may, void *arg)
{
	const struct om_heap *h = &((struct lrfu *)p)->members;
	uint32_t best = OM_NIL;

	if (h->count && (!may || may(arg, h->slots[0])))
		return h->slots[0];
	for (uint32_t i = 1; i < h->count; i++) /* rare: the first may not go */
		if ((best == OM_NIL || h->keys[h->slots[i]] < h->keys[best]) &&
		    (!may || may(arg, h->slots[i])))
			best = h->slots[i];
	return best;
}

const struct om_policy_ops om_policy_lrfu = {
	.name = "lrfu",
	.bytes = sizeof(struct lrfu),
	.init = init,
	.fini = fini,
	.grow = grow,
	.access = access,
	.add = add,
	.victim = victim,
	.drop = drop,
	.forget = forget,
};
