/* om_cache: see om_cache.h. */
#include "core/om_cache.h"

void om_cache_make_room(struct om_cache *c, uint64_t bytes, om_cache_evicted *evicted, void *arg)
{
	const struct om_policy_ops *ops = c->policy->ops;

	while (c->used && c->used + bytes > c->policy->capacity) {
		uint32_t gone = ops->victim(c->policy, NULL, NULL);

		ops->drop(c->policy, gone, true);
		c->member[gone] = 0;
		c->used -= c->sizes[gone];
		if (evicted)
			evicted(arg, gone);
	}
}

bool om_cache_request(struct om_cache *c, uint32_t slot, om_cache_evicted *evicted, void *arg)
{
	const struct om_policy_ops *ops = c->policy->ops;
	uint64_t bytes = c->sizes[slot];
	bool hit = c->member[slot];

	ops->access(c->policy, slot, bytes, hit);
	if (hit || bytes > c->policy->capacity)
		return hit;
	om_cache_make_room(c, bytes, evicted, arg);
	ops->add(c->policy, slot, bytes);
	c->member[slot] = 1;
	c->used += bytes;
	return false;
}
