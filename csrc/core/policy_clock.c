/*
 * policy_clock: second chance, and SIEVE, its sister. Both keep arrivals in order and one bit each.
 *
 *   a new one: at the new end, bit 0          asked for: bit 1
 *   CLOCK's victim: the old end, if its bit is 0; else clear the bit, put it at the new end, go on
 *   SIEVE's victim: where the hand is, if its bit is 0; else clear the bit and move the hand towards
 *   the new end (and from there to the old end): nothing changes its place, so that what is used
 *   once leaves soon, and what is used often stays behind the hand
 */
#include "base/om_base.h"
#include "core/om_policy.h"

struct clock {
	struct om_policy base;
	struct om_chain all;
	struct om_link *links;
	uint8_t *used; /* the bit */
	uint32_t hand; /* SIEVE; OM_NIL: at the old end */
};

static int init(struct om_policy *p)
{
	struct clock *c = (struct clock *)p;

	om_chain_init(&c->all);
	c->hand = OM_NIL;
	return 0;
}

static void fini(struct om_policy *p)
{
	struct clock *c = (struct clock *)p;

	om_free(c->links);
	om_free(c->used);
}

static int grow(struct om_policy *p, uint32_t slots)
{
	struct clock *c = (struct clock *)p;
	int code = om_policy_grow_array(&c->links, p->slots, slots, sizeof(*c->links));

	return code ? code : om_policy_grow_array(&c->used, p->slots, slots, sizeof(*c->used));
}

static void access(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit)
{
	(void)bytes;
	if (hit)
		((struct clock *)p)->used[slot] = 1;
}

static void add(struct om_policy *p, uint32_t slot, uint64_t bytes)
{
	struct clock *c = (struct clock *)p;

	(void)bytes;
	c->used[slot] = 0;
	om_chain_push(&c->all, c->links, slot);
}

static void drop(struct om_policy *p, uint32_t slot, bool evicted)
{
	struct clock *c = (struct clock *)p;

	(void)evicted;
	if (c->hand == slot)
		c->hand = c->links[slot].newer;
	om_chain_del(&c->all, c->links, slot);
}

/* Two rounds at most: after one all bits are clear, and what may not go is passed by. */
static uint32_t clock_victim(struct om_policy *p, om_may *may, void *arg)
{
	struct clock *c = (struct clock *)p;
	uint32_t at = c->all.oldest;

	for (uint64_t left = 2 * (uint64_t)c->all.count; left; left--) {
		uint32_t next = c->links[at].newer;

		if (!may || may(arg, at)) {
			if (!c->used[at])
				return at;
			c->used[at] = 0;
			om_chain_del(&c->all, c->links, at);
			om_chain_push(&c->all, c->links, at);
		}
		at = next == OM_NIL ? c->all.oldest : next;
	}
	return OM_NIL;
}

static uint32_t sieve_victim(struct om_policy *p, om_may *may, void *arg)
{
	struct clock *c = (struct clock *)p;
	uint32_t at = c->hand == OM_NIL ? c->all.oldest : c->hand;

	for (uint64_t left = 2 * (uint64_t)c->all.count; left; left--) {
		if (!may || may(arg, at)) {
			if (!c->used[at]) {
				c->hand = at;
				return at;
			}
			c->used[at] = 0;
		}
		at = c->links[at].newer == OM_NIL ? c->all.oldest : c->links[at].newer;
	}
	return OM_NIL;
}

const struct om_policy_ops om_policy_clock = {
	.name = "clock",
	.bytes = sizeof(struct clock),
	.init = init,
	.fini = fini,
	.grow = grow,
	.access = access,
	.add = add,
	.victim = clock_victim,
	.drop = drop,
};

const struct om_policy_ops om_policy_sieve = {
	.name = "sieve",
	.bytes = sizeof(struct clock),
	.init = init,
	.fini = fini,
	.grow = grow,
	.access = access,
	.add = add,
	.victim = sieve_victim,
	.drop = drop,
};
