/*
 * om_sync: a mutex with a rank, a condition variable on the monotonic clock, a named thread.
 *
 * A thread may take a mutex only of a higher rank than those it holds; debug builds (OM_DEBUG)
 * check it. Ranks: see the table below, which is the whole lock order of omnimem.
 */
#ifndef OM_SYNC_H
#define OM_SYNC_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum om_rank {
	OM_RANK_TURN = 4,    /* struct om_monitor: taking a sample and acting on it */
	OM_RANK_MONITOR = 5, /* struct om_monitor: what it tells */
	OM_RANK_STORE = 10,  /* struct om_store: everything the store owns */
	OM_RANK_WORK = 20,   /* struct om_work: the queue of the worker threads */
	OM_RANK_IO = 30,     /* the thread back end's queues */
};

struct om_mutex {
	pthread_mutex_t native;
	enum om_rank rank;
};

struct om_cond {
	pthread_cond_t native;
};

int om_mutex_init(struct om_mutex *m, enum om_rank rank);
void om_mutex_fini(struct om_mutex *m);
void om_mutex_lock(struct om_mutex *m);
bool om_mutex_trylock(struct om_mutex *m);
void om_mutex_unlock(struct om_mutex *m);

int om_cond_init(struct om_cond *c);
void om_cond_fini(struct om_cond *c);
void om_cond_signal(struct om_cond *c);
void om_cond_broadcast(struct om_cond *c);
/* Waits until woken or om_now() >= deadline_ns (UINT64_MAX: for ever); false when the deadline
 * passed. Spurious wake-ups happen: look again at what you wait for. */
bool om_cond_wait(struct om_cond *c, struct om_mutex *m, uint64_t deadline_ns);

/* Starts a thread with all signals blocked (they are the interpreter's business). */
int om_thread_start(pthread_t *ret, const char *name, void *(*run)(void *), void *arg);

#endif
