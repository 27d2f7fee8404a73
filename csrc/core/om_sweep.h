/*
 * om_sweep: idle blocks of one group, or of all, go until enough of HOST is free: by om_swap on request, by
 * om_press under pressure.
 *
 * The caller's thread chooses, hashes and waits; the mover writes. A bounded number of bytes is on
 * its way at a time, so that memory goes back while the rest is still being written.
 */
#ifndef OM_SWEEP_H
#define OM_SWEEP_H

#include "core/om_store_int.h"

#define OM_SWEEP_WAYS 64u /* writes begun and not yet waited for */

struct om_sweep {
	struct om_store *store;
	struct om_group *group; /* NULL: all; as long as the store is open */
	uint64_t want;          /* bytes to free */
	uint64_t reserve;       /* of memory that no block uses, so much stays mapped at least */
	struct leaving {        /* a write that was begun here, and whose block's memory is to go */
		struct om_block *block;
		struct om_move *move;
	} ring[OM_SWEEP_WAYS];
	unsigned first, count;
	uint64_t pending; /* bytes that will be free when all of the ring is written */
	bool enough;      /* nothing more is begun */
	struct om_pressed done;
};

/* What left HOST so far. */
uint64_t om_sweep_bytes(const struct om_sweep *w);
/* Go on until it is done, nothing more can go, or the disk refuses (see om_group_stats.trouble). 0, OM_EBUSY
 * at the deadline, OM_ECLOSED. Gives up the lock. */
int om_sweep_run_locked(struct om_sweep *w, uint64_t deadline_ns);
/* What is being written goes on. */
void om_sweep_end_locked(struct om_sweep *w);

#endif
