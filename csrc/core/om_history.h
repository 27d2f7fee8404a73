/*
 * om_history: what a number was: least, most, mean and last of each second, ten seconds and minute, for as long
 * as the rings reach. A fixed amount of memory. Passive; the caller serialises.
 */
#ifndef OM_HISTORY_H
#define OM_HISTORY_H

#include "omnimem.h"

#define OM_HISTORY_RINGS 3

struct om_slot {
	uint64_t start_ns, least, most, last, count; /* count 0: nothing */
	double sum;
};
struct om_history {
	struct om_slot *rings[OM_HISTORY_RINGS];
	uint64_t newest_ns;
};

int om_history_init(struct om_history *h); /* -ENOMEM */
void om_history_fini(struct om_history *h);
void om_history_feed(struct om_history *h, uint64_t now_ns, uint64_t value);
/* The spans of `seconds` in which there was something, the oldest first. OM_EVALUE: no such ring; -ENOMEM. */
int om_history_tell(const struct om_history *h, unsigned seconds, struct om_span **ret,
                    size_t *ret_count);

#endif
