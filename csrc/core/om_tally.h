/*
 * om_tally: how often each of many names was counted, known by a hash of 64 bits. Bounded: with more than
 * OM_TALLY_MOST names every count is halved, and those that reach 0 are forgotten. Passive, under the store
 * lock.
 */
#ifndef OM_TALLY_H
#define OM_TALLY_H

#include <stdint.h>

#define OM_TALLY_MOST 65536u

struct om_tally;

int om_tally_create(struct om_tally **ret);
void om_tally_destroy(struct om_tally *t); /* NULL is fine */
/* Count it once more: the count, 1 or more, or -ENOMEM. */
int64_t om_tally_add(struct om_tally *t, uint64_t hash);
void om_tally_forget(struct om_tally *t, uint64_t hash);

#endif
