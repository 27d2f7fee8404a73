/*
 * om_guard: before a store takes more memory from the system, is there enough of it? A soft ceiling on the
 * share in use of the tightest memory of the process (plat/om_sys.h), for all stores together.
 *
 * What is in use is the last reading, and what stores have mapped and unmapped since; for what others use, their peak
 * of the last seconds counts. Memory that was mapped
 * and is not filled yet is in no reading: it is counted apart (`fresh`). The numbers of the process are
 * atomic; a reading is taken by one thread at a time, under its store's lock, in about 50 us.
 */
#ifndef OM_GUARD_H
#define OM_GUARD_H

#include "omnimem.h"

#define OM_GUARD_CEILING 0.90
/* By default at least so much is left for everybody else, if that is no more than a quarter: what a process
 * takes at once, between two looks, does not shrink with its cgroup. */
#define OM_GUARD_LEFT (UINT64_C(64) * OM_MIB)

struct om_guard {             /* of a store, under its lock */
	double ceiling;       /* 0: OM_GUARD_CEILING, and OM_GUARD_LEFT */
	enum om_level level;  /* from OM_MEDIUM on nothing is fetched on a guess */
	uint64_t stuck_until; /* a write failed: until then nobody has to make way by one */
};

/* How many bytes others have to give up before `bytes` more are taken from the pool; 0: none. Costs nothing
 * while the pool does not grow for them. */
uint64_t om_guard_short_locked(struct om_store *s, uint64_t bytes);
/* Is there room for `bytes` on a guess? Nothing gives way. */
bool om_guard_room_locked(struct om_store *s, uint64_t bytes);
/* Take a reading now, unless another thread does: others use more than the guard may have seen. */
void om_guard_look(void);
/* Writing out has failed. */
void om_guard_stuck_locked(struct om_store *s);

/* How much of so much memory may be in use by default. */
static inline uint64_t om_guard_most(uint64_t total_bytes)
{
	uint64_t share = (uint64_t)(OM_GUARD_CEILING * (double)total_bytes);

	return OM_MIN(share, total_bytes - OM_MIN(OM_GUARD_LEFT, total_bytes / 4));
}

/* For the pool. Memory of stores: mapped and not filled; known to be filled. Any thread. */
void om_guard_count(int64_t fresh_bytes, int64_t filled_bytes);
/* Memory of somebody else came to a store (it may be new: a reading is due), or is let go. */
void om_guard_count_foreign(int64_t bytes);

/* For tests: where the system's files are (NULL: "/"), and whether one reading, the next, is to be enough. */
void om_guard_fake(const char *root, bool once);
uint64_t om_guard_readings(void); /* taken ever */
int64_t om_guard_held(void);      /* bytes that stores have mapped */

#endif
