/*
 * om_pattern: what comes next, by replay of what came before.
 *
 * A ring of past ids, the last position of each id, one cursor. While accesses match the history the
 * cursor walks along it; on a mismatch it jumps behind the id's last occurrence. Nothing is thrown
 * away by a mismatch. Passive, under the store lock.
 */
#ifndef OM_PATTERN_H
#define OM_PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct om_pattern {
	uint32_t *past; /* ring: position % capacity */
	uint64_t *last; /* by id: 1 + position of the last occurrence; 0: never */
	size_t capacity, ids;
	uint64_t head;   /* positions recorded so far */
	uint64_t cursor; /* position whose id is expected next; not remembered: nothing is known */
	uint64_t mismatches;
};

/* Ids below `ids`; the declared order, each id at most once, is the first history. */
int om_pattern_init(struct om_pattern *p, size_t ids, const uint32_t *order, size_t count);
void om_pattern_fini(struct om_pattern *p);
/* An access. Returns whether it was foretold. */
bool om_pattern_record(struct om_pattern *p, uint32_t id);
/* The id expected `ahead` accesses from now (0: the next); false when unknown. */
bool om_pattern_next(const struct om_pattern *p, size_t ahead, uint32_t *ret_id);

#endif
