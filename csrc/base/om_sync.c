/* om_sync: see om_sync.h. In debug builds each thread keeps the ranks that it holds. */
#include "base/om_sync.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <time.h>

#include "base/om_base.h"
#include "base/om_error.h"

#ifdef OM_DEBUG
#define MAX_HELD 8
static _Thread_local int held[MAX_HELD], held_count;

static void rank_push(int rank)
{
	assert(held_count < MAX_HELD);
	for (int i = 0; i < held_count; i++)
		assert(held[i] < rank && "lock order violated");
	held[held_count++] = rank;
}

static void rank_pop(int rank)
{
	int i = held_count - 1;

	while (i >= 0 && held[i] != rank)
		i--;
	assert(i >= 0 && "unlock of a mutex that is not held");
	held[i] = held[--held_count];
}
#else
static void rank_push(int rank)
{
	(void)rank;
}
static void rank_pop(int rank)
{
	(void)rank;
}
#endif

int om_mutex_init(struct om_mutex *m, enum om_rank rank)
{
	int code = pthread_mutex_init(&m->native, NULL);

	m->rank = rank;
	return code ? om_err(-code, "cannot create a mutex") : 0;
}

void om_mutex_fini(struct om_mutex *m)
{
	pthread_mutex_destroy(&m->native);
}

void om_mutex_lock(struct om_mutex *m)
{
	rank_push(m->rank);
	pthread_mutex_lock(&m->native);
}

bool om_mutex_trylock(struct om_mutex *m)
{
	if (pthread_mutex_trylock(&m->native))
		return false;
	rank_push(m->rank);
	return true;
}

void om_mutex_unlock(struct om_mutex *m)
{
	pthread_mutex_unlock(&m->native);
	rank_pop(m->rank);
}

int om_cond_init(struct om_cond *c)
{
	pthread_condattr_t attr;
	int code = pthread_condattr_init(&attr);

	if (!code) {
		pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
		code = pthread_cond_init(&c->native, &attr);
		pthread_condattr_destroy(&attr);
	}
	return code ? om_err(-code, "cannot create a condition variable") : 0;
}

void om_cond_fini(struct om_cond *c)
{
	pthread_cond_destroy(&c->native);
}

void om_cond_signal(struct om_cond *c)
{
	pthread_cond_signal(&c->native);
}

void om_cond_broadcast(struct om_cond *c)
{
	pthread_cond_broadcast(&c->native);
}

bool om_cond_wait(struct om_cond *c, struct om_mutex *m, uint64_t deadline_ns)
{
	struct timespec ts = { .tv_sec = (time_t)(deadline_ns / OM_NSEC),
		               .tv_nsec = (long)(deadline_ns % OM_NSEC) };
	int code;

	rank_pop(m->rank);
	if (deadline_ns == UINT64_MAX)
		code = pthread_cond_wait(&c->native, &m->native);
	else
		code = pthread_cond_timedwait(&c->native, &m->native, &ts);
	rank_push(m->rank);
	return code != ETIMEDOUT;
}

int om_thread_start(pthread_t *ret, const char *name, void *(*run)(void *), void *arg)
{
	sigset_t all, old;
	int code;

	if (om_fault(OM_FAULT_THREAD))
		return om_err(-EAGAIN, "cannot start thread %s", name);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	code = pthread_create(ret, NULL, run, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (code)
		return om_err(-code, "cannot start thread %s: %s", name, om_err_text(-code));
	pthread_setname_np(*ret, name);
	return 0;
}
