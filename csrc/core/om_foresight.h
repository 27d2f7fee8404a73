/*
 * om_foresight: what a group's blocks are likely to be asked for next, and fetching some of it ahead.
 *
 * A pattern of accesses by seat, and a budget of bets on it. What is fetched goes into room that is
 * free, behind all that somebody waits for. Under the store lock.
 */
#ifndef OM_FORESIGHT_H
#define OM_FORESIGHT_H

#include "core/om_pattern.h"
#include "core/om_speculation.h"

struct om_block;
struct om_group;
struct om_store;

struct om_foresight {
	struct om_pattern pattern;
	struct om_speculation bets;
	uint64_t open_bytes;    /* HOST bytes of blocks that were fetched so and are not used yet */
	uint32_t most_accesses; /* of any block */
};

int om_foresight_create(uint32_t seats, struct om_foresight **ret);
void om_foresight_destroy(struct om_foresight *f);
/* A block is asked for; before room is made. */
void om_foresight_access(struct om_foresight *f, const struct om_block *b);
/* A block that was fetched on a bet is used, or its bytes go unused. */
void om_foresight_end(struct om_foresight *f, struct om_block *b, bool used);
/* Fetch what a group is expected to be asked for next, as far as the bets and free room allow. Waits for
 * nothing. */
void om_foresight_fetch_locked(struct om_store *s, struct om_group *g);

#endif
