/*
 * policy_nextuse: give up what is used latest from now, by how regularly it was used so far.
 *
 * For each id: the mean m and the mean error d of the number of accesses between its uses (moving
 * averages), kept after it is evicted. At age a (accesses since its last use) it is expected in
 *
 *   m - a        while it is not due                  d             while it is late by up to 2 d
 *   a            when it is overdue                   for ever      when it was used only once
 *
 * Victim: the latest; of those used once, the newest, so that a long cycle is not begun by giving up
 * its beginning. What is not due has a fixed moment (last use + m), and so a heap knows the latest of
 * all; of the overdue, whose time grows, the oldest of a sample is compared with it.
 */
#include <math.h>

#include "base/om_base.h"
#include "core/om_heap.h"
#include "core/om_policy.h"

#define SAMPLE 16
#define WEIGHT 0.3f /* of the newest interval */
#define ONCE   1e12 /* accesses: later than any expectation */

struct item {
	uint64_t last; /* access count at its last use; 0: never */
	float mean, error;
	uint32_t uses;
};

struct nextuse {
	struct om_policy base;
	struct item *items;
	struct om_heap members; /* by minus the expected moment: the latest first */
	uint64_t now, random;
};

static int init(struct om_policy *p)
{
	((struct nextuse *)p)->random = 88172645463325252u;
	return 0;
}

static void fini(struct om_policy *p)
{
	om_free(((struct nextuse *)p)->items);
	om_heap_fini(&((struct nextuse *)p)->members);
}

static int grow(struct om_policy *p, uint32_t slots)
{
	struct nextuse *n = (struct nextuse *)p;
	int code = om_policy_grow_array(&n->items, p->slots, slots, sizeof(*n->items));

	return code ? code : om_heap_grow(&n->members, p->slots, slots);
}

static double key_of(const struct item *it)
{
	return -((double)it->last + (it->uses < 2 ? ONCE : (double)it->mean));
}

static void access(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit)
{
	struct nextuse *n = (struct nextuse *)p;
	struct item *it = &n->items[slot];
	float interval = (float)(++n->now - it->last);

	(void)bytes;
	if (it->uses == 1) {
		it->mean = interval;
		it->error = 0;
	} else if (it->uses > 1) {
		it->error += WEIGHT * (fabsf(interval - it->mean) - it->error);
		it->mean += WEIGHT * (interval - it->mean);
	}
	it->uses += it->uses < UINT32_MAX;
	it->last = n->now;
	if (hit)
		om_heap_set(&n->members, slot, key_of(it));
}

static void add(struct om_policy *p, uint32_t slot, uint64_t bytes)
{
	struct nextuse *n = (struct nextuse *)p;

	(void)bytes;
	om_heap_put(&n->members, slot, key_of(&n->items[slot]));
}

static void drop(struct om_policy *p, uint32_t slot, bool evicted)
{
	(void)evicted;
	om_heap_del(&((struct nextuse *)p)->members, slot);
}

static void forget(struct om_policy *p, uint32_t slot)
{
	((struct nextuse *)p)->items[slot] = (struct item){ 0 };
}

static double distance(const struct nextuse *n, uint32_t slot)
{
	const struct item *it = &n->items[slot];
	double age = (double)(n->now - it->last), due = -n->members.keys[slot] - (double)n->now;

	if (due >= 0)
		return due;
	return -due <= 2 * (double)it->error ? (double)it->error : age;
}

static uint32_t random_member(struct nextuse *n)
{
	n->random ^= n->random << 13;
	n->random ^= n->random >> 7;
	n->random ^= n->random << 17;
	return n->members.slots[((n->random >> 32) * n->members.count) >> 32];
}

static uint32_t victim(struct om_policy *p, om_may *may, void *arg)
{
	struct nextuse *n = (struct nextuse *)p;
	const struct om_heap *h = &n->members;
	uint32_t best = OM_NIL;
	double farthest = -1;
	bool all = h->count <= SAMPLE || (may && !may(arg, h->slots[0]));

	if (h->count && !all) {
		best = h->slots[0];
		farthest = distance(n, best);
	}
	for (uint32_t i = 0; i < (all ? h->count : SAMPLE); i++) {
		uint32_t at = all ? h->slots[i] : random_member(n);
		double far = distance(n, at);

		if (far > farthest && (!may || may(arg, at))) {
			farthest = far;
			best = at;
		}
	}
	return best;
}

const struct om_policy_ops om_policy_nextuse = {
	.name = "nextuse",
	.bytes = sizeof(struct nextuse),
	.init = init,
	.fini = fini,
	.grow = grow,
	.access = access,
	.add = add,
	.victim = victim,
	.drop = drop,
	.forget = forget,
};
