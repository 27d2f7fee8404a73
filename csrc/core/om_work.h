/*
 * om_work: one worker thread for what nobody waits for yet: it faults pages in ahead of reads, and
 * proves prefetched blocks that nobody has claimed.
 *
 * Its queue has its own lock (rank WORK). Jobs run without any lock.
 */
#ifndef OM_WORK_H
#define OM_WORK_H

#include "base/om_list.h"
#include "base/om_sync.h"

struct om_job {
	struct om_list link;
	void (*run)(struct om_job *job); /* frees the job */
};

struct om_work {
	struct om_mutex lock;
	struct om_cond wake;
	struct om_list jobs;
	pthread_t thread;
	bool started, stop;
};

int om_work_start(struct om_work *w);
void om_work_stop(struct om_work *w); /* runs what is queued, then joins */
void om_work_push(struct om_work *w, struct om_job *job);

#endif
