/*
 * policy_s3fifo: three queues, first in first out (Yang et al., SOSP 2023).
 *
 *   small (10 % of the bytes)   new ones; at its old end: asked for twice or more since? to main, else out
 *   main                        at its old end: asked for since? again to the new end, one use less, else out
 *   ghost (ids, 90 %)           what left small; asked for again while there: comes back to main
 *
 * Main gives when it is over its share or small is empty. What is larger than all of small goes to
 * main at once (the paper's simulator refuses it; a store cannot). What may not go now is passed by.
 */
#include "base/om_base.h"
#include "core/om_policy.h"

#define PROMOTE_AT 2 /* uses in small */
#define MOST_USES  3

enum queue { NOWHERE, SMALL, MAIN, GHOST };

struct item {
	uint64_t bytes;
	uint8_t queue, uses;
};

struct s3fifo {
	struct om_policy base;
	struct om_chain queues[4];
	uint64_t used[4]; /* bytes */
	struct om_link *links;
	struct item *items;
	uint32_t wanted_back; /* was in ghost when it was asked for; OM_NIL: none */
};

static int init(struct om_policy *p)
{
	struct s3fifo *s = (struct s3fifo *)p;

	for (int q = 0; q < 4; q++)
		om_chain_init(&s->queues[q]);
	s->wanted_back = OM_NIL;
	return 0;
}

static void fini(struct om_policy *p)
{
	struct s3fifo *s = (struct s3fifo *)p;

	om_free(s->links);
	om_free(s->items);
}

static int grow(struct om_policy *p, uint32_t slots)
{
	struct s3fifo *s = (struct s3fifo *)p;
	int code = om_policy_grow_array(&s->links, p->slots, slots, sizeof(*s->links));

	return code ? code : om_policy_grow_array(&s->items, p->slots, slots, sizeof(*s->items));
}

static uint64_t small_capacity(const struct s3fifo *s)
{
	return s->base.capacity / 10;
}

/* To the new end of a queue (NOWHERE: out of all). */
static void put(struct s3fifo *s, uint32_t slot, enum queue to)
{
	struct item *it = &s->items[slot];

	if (it->queue) {
		om_chain_del(&s->queues[it->queue], s->links, slot);
		s->used[it->queue] -= it->bytes;
	}
	it->queue = (uint8_t)to;
	if (to) {
		om_chain_push(&s->queues[to], s->links, slot);
		s->used[to] += it->bytes;
	}
}

static void remember(struct s3fifo *s, uint32_t slot)
{
	uint64_t room = s->base.capacity - (s->base.capacity + 9) / 10,
		 bytes = s->items[slot].bytes;

	if (bytes > room)
		return;
	while (s->used[GHOST] + bytes > room)
		put(s, s->queues[GHOST].oldest, NOWHERE);
	put(s, slot, GHOST);
}

static void access(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit)
{
	struct s3fifo *s = (struct s3fifo *)p;
	struct item *it = &s->items[slot];

	(void)bytes;
	if (hit)
		it->uses += it->uses < UINT8_MAX;
	s->wanted_back = OM_NIL;
	if (it->queue == GHOST) {
		put(s, slot, NOWHERE);
		s->wanted_back = slot;
	}
}

static void add(struct om_policy *p, uint32_t slot, uint64_t bytes)
{
	struct s3fifo *s = (struct s3fifo *)p;

	put(s, slot, NOWHERE); /* it may have come without being asked for */
	s->items[slot].bytes = bytes;
	s->items[slot].uses = 0;
	put(s, slot, slot == s->wanted_back || bytes > small_capacity(s) ? MAIN : SMALL);
}

/* The oldest of small that was not asked for; those that were go to main on the way. */
static uint32_t small_victim(struct s3fifo *s, om_may *may, void *arg)
{
	uint32_t at = s->queues[SMALL].oldest;

	while (at != OM_NIL) {
		uint32_t next = s->links[at].newer;

		if (!may || may(arg, at)) {
			if (s->items[at].uses < PROMOTE_AT)
				return at;
			s->items[at].uses = 0;
			put(s, at, MAIN);
		}
		at = next;
	}
	return OM_NIL;
}

/* A round takes one use off each, so that after MOST_USES of them there is one without. */
static uint32_t main_victim(struct s3fifo *s, om_may *may, void *arg)
{
	uint32_t at = s->queues[MAIN].oldest;

	for (uint64_t left = (MOST_USES + 1) * (uint64_t)s->queues[MAIN].count; left; left--) {
		uint32_t next = s->links[at].newer;
		struct item *it = &s->items[at];

		if (!may || may(arg, at)) {
			if (!it->uses)
				return at;
			it->uses = (uint8_t)(OM_MIN(it->uses, MOST_USES) - 1);
			put(s, at, MAIN);
		}
		at = next == OM_NIL ? s->queues[MAIN].oldest : next;
	}
	return OM_NIL;
}

static uint32_t victim(struct om_policy *p, om_may *may, void *arg)
{
	struct s3fifo *s = (struct s3fifo *)p;
	uint64_t main_capacity = p->capacity - small_capacity(s);
	uint32_t at = OM_NIL;

	if (s->used[MAIN] <= main_capacity)
		at = small_victim(s, may, arg);
	if (at == OM_NIL)
		at = main_victim(s, may, arg);
	if (at == OM_NIL)
		at = small_victim(s, may, arg);
	return at == OM_NIL ? main_victim(s, may, arg) : at; /* what has just moved there */
}

static void drop(struct om_policy *p, uint32_t slot, bool evicted)
{
	struct s3fifo *s = (struct s3fifo *)p;
	bool was_small = s->items[slot].queue == SMALL;

	put(s, slot, NOWHERE);
	if (evicted && was_small)
		remember(s, slot);
}

static void forget(struct om_policy *p, uint32_t slot)
{
	put((struct s3fifo *)p, slot, NOWHERE);
}

const struct om_policy_ops om_policy_s3fifo = {
	.name = "s3fifo",
	.bytes = sizeof(struct s3fifo),
	.init = init,
	.fini = fini,
	.grow = grow,
	.access = access,
	.add = add,
	.victim = victim,
	.drop = drop,
	.forget = forget,
};
