/*
 * policy_lru: least recently used.
 *
 *   asked for: to the new end of the list     victim: the old end
 *   added with a use in the past: from the new end back past those used later
 */
#include "base/om_base.h"
#include "core/om_policy.h"

struct lru {
	struct om_policy base;
	struct om_chain all;
	struct om_link *links;
};

static int init(struct om_policy *p)
{
	om_chain_init(&((struct lru *)p)->all);
	return 0;
}

static void fini(struct om_policy *p)
{
	om_free(((struct lru *)p)->links);
}

static int grow(struct om_policy *p, uint32_t slots)
{
	return om_policy_grow_array(&((struct lru *)p)->links, p->slots, slots,
	                            sizeof(struct om_link));
}

static void add(struct om_policy *p, uint32_t slot, uint64_t bytes)
{
	struct lru *l = (struct lru *)p;

	(void)bytes;
	om_chain_push(&l->all, l->links, slot);
}

static void drop(struct om_policy *p, uint32_t slot, bool evicted)
{
	struct lru *l = (struct lru *)p;

	(void)evicted;
	om_chain_del(&l->all, l->links, slot);
}

static void access(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit)
{
	struct lru *l = (struct lru *)p;

	if (!hit || l->all.newest == slot)
		return;
	drop(p, slot, false);
	add(p, slot, bytes);
}

static void sink(struct om_policy *p, uint32_t slot, om_later *later, void *arg)
{
	struct lru *l = (struct lru *)p;
	uint32_t at = l->links[slot].older;

	if (at == OM_NIL || !later(arg, at))
		return;
	om_chain_del(&l->all, l->links, slot);
	while (at != OM_NIL && later(arg, at))
		at = l->links[at].older;
	om_chain_put(&l->all, l->links, slot, at);
}

static uint32_t victim(struct om_policy *p, om_may *may, void *arg)
{
	struct lru *l = (struct lru *)p;
	uint32_t at = l->all.oldest;

	while (at != OM_NIL && may && !may(arg, at))
		at = l->links[at].newer;
	return at;
}

const struct om_policy_ops om_policy_lru = {
	.name = "lru",
	.bytes = sizeof(struct lru),
	.init = init,
	.fini = fini,
	.grow = grow,
	.access = access,
	.add = add,
	.sink = sink,
	.victim = victim,
	.drop = drop,
};
