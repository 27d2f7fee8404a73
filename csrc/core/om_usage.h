/*
 * om_usage: when a group was used as a whole, and when it is likely to be used next. Passive, and without a
 * clock of its own: the caller says when it is now. Under the store lock.
 *
 * Uses come in runs: the passes that answer one request follow each other closely, and their rhythm says nothing
 * about when the next request comes. So gaps are taken between the beginnings of runs. A run ends when another
 * group is used, or after a second.
 */
#ifndef OM_USAGE_H
#define OM_USAGE_H

#include "omnimem.h"

#define OM_USES 64u /* begins that are remembered */
#define OM_RUNS 16u /* runs that are remembered: the gaps between them say what is typical */

struct om_use {
	uint64_t count;              /* begins ever */
	uint64_t begins_ns[OM_USES]; /* a ring */
	uint64_t first_ns, last_ns;  /* begins */
	uint64_t left_ns;            /* the last end; 0: there was none */
	uint64_t run_count;          /* ever */
	uint64_t runs_ns[OM_RUNS];   /* a ring of their begins */
	uint64_t
		turn; /* the caller's, of its last begin: another one means that somebody else was used */
	uint64_t gap_ns; /* median of the last gaps; 0: there is none */
	unsigned busy;   /* uses that have begun and not ended */
};

/* `*turn` is that of all groups that belong together; a run that begins takes the next one. */
void om_use_begin(struct om_use *u, uint64_t now_ns, uint64_t *turn);
void om_use_end(struct om_use *u, uint64_t now_ns);
/* Of the remembered begins, those since `since_ns`. */
uint64_t om_use_recent(const struct om_use *u, uint64_t since_ns);
/* When the next use is expected: now while one goes on, else the typical gap after the last run began; when it is
 * late, after as much time again. What was used in one run alone, or is still expected in its last: the longer it
 * was not used, the later. 0: it was never used. */
uint64_t om_use_next(const struct om_use *u, uint64_t now_ns);
/* The same of what was last used at `last_ns`, and of which nothing else is known. */
static inline uint64_t om_use_next_since(uint64_t last_ns, uint64_t now_ns)
{
	return now_ns + (now_ns > last_ns ? now_ns - last_ns : 0);
}

#endif
