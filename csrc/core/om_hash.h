/*
 * om_hash: XXH3-64 of a block's bytes, by the widest instructions that libxxhash can choose at run
 * time (its dispatching entry points, 1.7 times faster here; not every build of it has them).
 */
#ifndef OM_HASH_H
#define OM_HASH_H

#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

extern XXH64_hash_t XXH3_64bits_dispatch(const void *data, size_t bytes) __attribute__((weak));
extern XXH_errorcode XXH3_64bits_update_dispatch(XXH3_state_t *state, const void *data,
                                                 size_t bytes) __attribute__((weak));

static inline uint64_t om_hash(const void *data, size_t bytes)
{
	return XXH3_64bits_dispatch ? XXH3_64bits_dispatch(data, bytes) : XXH3_64bits(data, bytes);
}

static inline void om_hash_update(XXH3_state_t *state, const void *data, size_t bytes)
{
	if (XXH3_64bits_update_dispatch)
		XXH3_64bits_update_dispatch(state, data, bytes);
	else
		XXH3_64bits_update(state, data, bytes);
}

#endif
