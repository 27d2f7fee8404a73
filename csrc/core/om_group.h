/* om_group: blocks that share a HOST limit and an order of eviction. Passive, under the store lock.
 *
 * A copy is on one of the lists iff it is not leased, so that a leased copy cannot be a victim. */
#ifndef OM_GROUP_H
#define OM_GROUP_H

#include "base/om_list.h"

struct om_group {
	struct om_list link; /* store->groups */
	char name[64];
	uint64_t limit_bytes;  /* 0: only the store's binds */
	uint64_t lowered_from; /* it used so much when its limit was lowered: om_store_check only */
	uint64_t used_bytes,
		peak_bytes; /* HOST extents of its blocks, FILLING and LEAVING included */
	uint64_t blocks;
	uint64_t leaving_bytes; /* of those, LEAVING */
	uint64_t read_bytes;
	struct om_list idle;  /* VALID, not leased: least recently released first */
	struct om_list ahead; /* FILLING, not leased: fetched ahead of use */
	uint64_t check_bytes; /* om_store_check only */
	unsigned
		streams; /* of these: what they fetch ahead is finished by the thread that uses it */
};

#endif
