/*
 * policy_adaptive: follow the best of four experts, each of which runs a cache of its own on ids alone.
 *
 *   experts     S3-FIFO, LRU, next use, recency and frequency: cycles, phases, skew, scans
 *   each access goes through the four shadow caches (same capacity); of an id seen before, an expert's
 *               score moves towards the bytes that it missed, over about 8 times the members
 *   the leader  changes when another's score is 5 % less; LRU's counts for 10 % more, since what LRU
 *               is good at the others nearly are
 *   victim      the member that left the leader's shadow first; if all are in it (the shadow's
 *               capacity is a little larger), the leader's own next one among them
 *
 * Size has its place in the score: a miss costs its bytes, so nothing is gained by many small hits
 * that cost a large one. First uses tell nothing about a policy, and do not count.
 */
#include <errno.h>

#include "base/om_base.h"
#include "core/om_cache.h"

#define WINDOW       8 /* accesses a member, for the scores */
#define SWITCH_BELOW 0.95
#define LRU_HANDICAP 1.1

enum { S3FIFO, LRU, NEXTUSE, LRFU };
const struct om_policy_ops *const om_policy_experts[OM_EXPERTS] = {
	[S3FIFO] = &om_policy_s3fifo,
	[LRU] = &om_policy_lru,
	[NEXTUSE] = &om_policy_nextuse,
	[LRFU] = &om_policy_lrfu,
};

struct expert {
	struct om_cache shadow;
	struct om_chain left; /* members that are not in the shadow, first gone first */
	struct om_link *links;
	uint8_t *listed; /* on `left` */
	double score;    /* bytes missed an access */
	uint64_t led;    /* accesses */
};

struct adaptive {
	struct om_policy base;
	struct expert experts[OM_EXPERTS];
	uint64_t *sizes;
	uint8_t *seen, *member;
	uint32_t count; /* members */
	unsigned leader;
};

struct departure { /* what an eviction from a shadow needs to know */
	struct adaptive *a;
	struct expert *e;
};

static int init(struct om_policy *p)
{
	struct adaptive *a = (struct adaptive *)p;

	a->leader = S3FIFO;
	for (int i = 0; i < OM_EXPERTS; i++) {
		struct expert *e = &a->experts[i];
		int code = om_policy_create(om_policy_experts[i], p->capacity, &e->shadow.policy);

		if (code)
			return code;
		om_chain_init(&e->left);
	}
	return 0;
}

static void fini(struct om_policy *p)
{
	struct adaptive *a = (struct adaptive *)p;

	for (int i = 0; i < OM_EXPERTS; i++) {
		om_policy_destroy(a->experts[i].shadow.policy);
		om_free(a->experts[i].shadow.member);
		om_free(a->experts[i].links);
		om_free(a->experts[i].listed);
	}
	om_free(a->sizes);
	om_free(a->seen);
	om_free(a->member);
}

static int grow_expert(struct expert *e, uint32_t from, uint32_t to)
{
	int code = om_policy_grow_array(&e->shadow.member, from, to, 1);

	code = code ? code : om_policy_grow_array(&e->links, from, to, sizeof(*e->links));
	code = code ? code : om_policy_grow_array(&e->listed, from, to, 1);
	return code ? code : om_policy_grow(e->shadow.policy, to);
}

static int grow(struct om_policy *p, uint32_t slots)
{
	struct adaptive *a = (struct adaptive *)p;
	int code = om_policy_grow_array(&a->sizes, p->slots, slots, sizeof(*a->sizes));

	code = code ? code : om_policy_grow_array(&a->seen, p->slots, slots, 1);
	code = code ? code : om_policy_grow_array(&a->member, p->slots, slots, 1);
	for (int i = 0; i < OM_EXPERTS && !code; i++)
		code = grow_expert(&a->experts[i], p->slots, slots);
	for (int i = 0; i < OM_EXPERTS; i++)
		a->experts[i].shadow.sizes = a->sizes;
	return code;
}

static void list(struct expert *e, uint32_t slot, bool on)
{
	if (e->listed[slot] == on)
		return;
	e->listed[slot] = on;
	if (on)
		om_chain_push(&e->left, e->links, slot);
	else
		om_chain_del(&e->left, e->links, slot);
}

static void shadow_evicted(void *arg, uint32_t slot)
{
	const struct departure *d = arg;

	if (d->a->member[slot])
		list(d->e, slot, true);
}

static double score(const struct adaptive *a, unsigned i)
{
	return a->experts[i].score * (i == LRU ? LRU_HANDICAP : 1.0);
}

static void elect(struct adaptive *a)
{
	unsigned best = a->leader;

	for (unsigned i = 0; i < OM_EXPERTS; i++)
		if (score(a, i) < score(a, best))
			best = i;
	if (score(a, best) < SWITCH_BELOW * score(a, a->leader))
		a->leader = best;
	a->experts[a->leader].led++;
}

static void access(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit)
{
	struct adaptive *a = (struct adaptive *)p;
	double rate = 1.0 / (WINDOW * (double)OM_MAX(a->count, 8));

	(void)hit;
	if (!a->seen[slot])
		a->sizes[slot] = bytes;
	for (int i = 0; i < OM_EXPERTS; i++) {
		struct expert *e = &a->experts[i];
		struct departure d = { a, e };
		bool missed;

		e->shadow.policy->capacity = p->capacity;
		missed = !om_cache_request(&e->shadow, slot, shadow_evicted, &d);

		if (e->shadow.member[slot])
			list(e, slot, false);
		if (a->seen[slot])
			e->score += rate * ((missed ? (double)bytes : 0.0) - e->score);
	}
	if (a->seen[slot])
		elect(a);
	a->seen[slot] = 1;
}

static void add(struct om_policy *p, uint32_t slot, uint64_t bytes)
{
	struct adaptive *a = (struct adaptive *)p;

	(void)bytes;
	a->member[slot] = 1;
	a->count++;
	for (int i = 0; i < OM_EXPERTS; i++)
		list(&a->experts[i], slot, !a->experts[i].shadow.member[slot]);
}

static void drop(struct om_policy *p, uint32_t slot, bool evicted)
{
	struct adaptive *a = (struct adaptive *)p;

	(void)evicted;
	a->member[slot] = 0;
	a->count--;
	for (int i = 0; i < OM_EXPERTS; i++)
		list(&a->experts[i], slot, false);
}

static void forget(struct om_policy *p, uint32_t slot)
{
	struct adaptive *a = (struct adaptive *)p;

	for (int i = 0; i < OM_EXPERTS; i++) {
		struct om_cache *s = &a->experts[i].shadow;

		if (s->member[slot]) {
			s->policy->ops->drop(s->policy, slot, false);
			s->member[slot] = 0;
			s->used -= s->sizes[slot];
		}
		if (s->policy->ops->forget)
			s->policy->ops->forget(s->policy, slot);
	}
	a->seen[slot] = 0;
}

struct filter {
	const struct adaptive *a;
	om_may *may;
	void *arg;
};

static bool member_may(void *arg, uint32_t slot)
{
	const struct filter *f = arg;

	return f->a->member[slot] && (!f->may || f->may(f->arg, slot));
}

static uint32_t victim(struct om_policy *p, om_may *may, void *arg)
{
	struct adaptive *a = (struct adaptive *)p;
	struct expert *e = &a->experts[a->leader];
	struct filter f = { a, may, arg };
	struct om_policy *shadow = e->shadow.policy;
	struct departure d = { a, e };

	/* A capacity that was lowered: what the leader would have given up for that goes first. */
	shadow->capacity = p->capacity;
	om_cache_make_room(&e->shadow, 0, shadow_evicted, &d);
	for (uint32_t at = e->left.oldest; at != OM_NIL; at = e->links[at].newer)
		if (!may || may(arg, at))
			return at;
	return shadow->ops->victim(shadow, member_may, &f);
}

void om_policy_adaptive_led(const struct om_policy *p, uint64_t ret[OM_EXPERTS])
{
	for (int i = 0; i < OM_EXPERTS; i++)
		ret[i] = ((const struct adaptive *)p)->experts[i].led;
}

const struct om_policy_ops om_policy_adaptive = {
	.name = "adaptive",
	.bytes = sizeof(struct adaptive),
	.init = init,
	.fini = fini,
	.grow = grow,
	.access = access,
	.add = add,
	.victim = victim,
	.drop = drop,
	.forget = forget,
};
