/*
 * om_cache: a cache of sizes without bytes: which slots a cache of some capacity would hold under a
 * policy. om_simulate runs traces through it, policy_adaptive its experts. Passive.
 */
#ifndef OM_CACHE_H
#define OM_CACHE_H

#include "core/om_policy.h"

struct om_cache {
	struct om_policy *policy;
	const uint64_t *sizes; /* by slot, the owner's: constant while a slot is a member */
	uint8_t *member;       /* by slot, the owner's, for this cache alone */
	uint64_t used;         /* bytes; the capacity is the policy's */
};

/* Is told of each member that makes way. */
typedef void om_cache_evicted(void *arg, uint32_t slot);

/* Members make way until `bytes` more fit. */
void om_cache_make_room(struct om_cache *c, uint64_t bytes, om_cache_evicted *evicted, void *arg);
/* A request: true when the slot is a member; else it becomes one, unless it is larger than all. */
bool om_cache_request(struct om_cache *c, uint32_t slot, om_cache_evicted *evicted, void *arg);

#endif
