/*
 * om_work: one worker thread for what nobody waits for yet: it faults pages in ahead of reads, and
 * proves prefetched blocks that nobody has claimed. A thread that has nothing to do but wait helps:
 * where fresh pages are slow to come (a virtual machine that gave its memory back), faulting them
 * in binds, and two threads do it twice as fast.
 *
 * Its queue has its own lock (rank WORK). Jobs run without any lock, a piece at a time.
 */
#ifndef OM_WORK_H
#define OM_WORK_H

#include "base/om_list.h"
#include "base/om_sync.h"

struct om_job {
	struct om_list link;
	/* Do a piece of a few milliseconds at most. True: there is more, call again (any thread may).
	 * False: done, and the job is freed; the case at once when the store is closing. */
	bool (*run)(struct om_job *job);
};

struct om_work {
	struct om_mutex lock;
	struct om_cond wake;
	struct om_list jobs;
	pthread_t thread;
	bool ready, started, stop;
};

int om_work_start(struct om_work *w);
void om_work_stop(struct om_work *w); /* runs what is queued, then joins */
void om_work_fini(struct om_work *w); /* after that, once no thread helps any more */
void om_work_push(struct om_work *w, struct om_job *job);
bool om_work_pending(struct om_work *w); /* is a piece to be had? */
void om_work_help(struct om_work *w);    /* do a piece of the first job, if there is one */

#endif
