/*
 * om_usage: when a group was used as a whole, and when it is likely to be used next. Passive, and without a
 * clock of its own: the caller says when it is now. Under the store lock.
 *
 * Uses come in runs: the passes that answer one request follow each other closely, and their rhythm says nothing
 * about when the next request comes. A run ends when another group is used, or after a second.
 *
 * Each run takes a turn. What is used next is foretold in turns, since requests take long or short: of groups used one
 * after the other each comes again after as many turns as there are groups, however long these take. A turn
 * takes as long as turns took of late.
 */
#ifndef OM_USAGE_H
#define OM_USAGE_H

#include "omnimem.h"

#define OM_USES 64u /* begins that are remembered */
#define OM_RUNS 6u  /* runs that are remembered: the gaps between them say what is typical */

#define OM_TURNS \
	16u /* turns that are remembered: how long they took says how long the next ones take */

/* The turns of groups that belong together. */
struct om_turns {
	uint64_t count;
	uint64_t begins_ns[OM_TURNS]; /* a ring */
};

struct om_use {
	uint64_t count;              /* begins ever */
	uint64_t begins_ns[OM_USES]; /* a ring */
	uint64_t first_ns, last_ns;  /* begins */
	uint64_t left_ns;            /* the last end; 0: there was none */
	uint64_t run_count;          /* ever */
	struct om_use_run {
		uint64_t begin_ns, turn;
	} runs[OM_RUNS];            /* a ring */
	uint64_t gap_ns, gap_turns; /* medians of the last gaps; 0: there is none */
	unsigned busy;              /* uses that have begun and not ended */
};

void om_use_begin(struct om_use *u, uint64_t now_ns, struct om_turns *turns);
void om_use_end(struct om_use *u, uint64_t now_ns);
/* Of the remembered begins, those since `since_ns`. */
uint64_t om_use_recent(const struct om_use *u, uint64_t since_ns);
/* When the next use is expected: now while one goes on, else the typical number of turns after the last run; when
 * its turn is over, in as many turns as it is late, and one. What was used in one run alone: the longer it was not
 * used, the later. 0: it was never used. */
uint64_t om_use_next(const struct om_use *u, uint64_t now_ns, const struct om_turns *turns);
/* The same of what was last used at `last_ns`, and of which nothing else is known. */
static inline uint64_t om_use_next_since(uint64_t last_ns, uint64_t now_ns)
{
	return now_ns + (now_ns > last_ns ? now_ns - last_ns : 0);
}

#endif
