/* om_base: see om_base.h. Owns the fault counters and the fork generation (process-wide). */
#include "base/om_base.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/om_error.h"

static void *out_of_memory(size_t n, size_t size)
{
	om_err(-ENOMEM, "out of memory: %zu x %zu bytes of bookkeeping", n, size);
	return NULL;
}

void *om_alloc(size_t n, size_t size)
{
	void *p = om_fault(OM_FAULT_ALLOC) ? NULL : calloc(n ? n : 1, size ? size : 1);

	return p ? p : out_of_memory(n, size);
}

void *om_realloc(void *p, size_t n, size_t size)
{
	uint64_t bytes;
	void *q = NULL;

	if (!om_mul_overflows(n, size, &bytes) && !om_fault(OM_FAULT_ALLOC))
		q = realloc(p, bytes ? bytes : 1);
	return q ? q : out_of_memory(n, size);
}

char *om_strdup(const char *s)
{
	size_t n = strlen(s) + 1;
	char *copy = om_alloc(n, 1);

	return copy ? memcpy(copy, s, n) : NULL;
}

void om_free(void *p)
{
	free(p);
}

static uint64_t read_clock(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * OM_NSEC + (uint64_t)ts.tv_nsec;
}

uint64_t om_now(void)
{
	return read_clock(CLOCK_MONOTONIC);
}

uint64_t om_now_coarse(void)
{
	return read_clock(CLOCK_MONOTONIC_COARSE);
}

uint64_t om_deadline(uint64_t timeout_ns)
{
	uint64_t at;

	return om_add_overflows(om_now(), timeout_ns, &at) ? UINT64_MAX : at;
}

int om_fault_armed;
static struct {
	uint64_t left, fired;
	bool sticky;
} faults[OM_FAULT_COUNT];
static pthread_mutex_t fault_lock = PTHREAD_MUTEX_INITIALIZER;

static void count_armed(void)
{
	int armed = 0;

	for (int i = 0; i < OM_FAULT_COUNT; i++)
		armed |= faults[i].left > 0;
	__atomic_store_n(&om_fault_armed, armed, __ATOMIC_RELAXED);
}

void om_fault_arm(enum om_fault point, uint64_t nth, bool sticky)
{
	pthread_mutex_lock(&fault_lock);
	faults[point].left = nth;
	faults[point].fired = 0;
	faults[point].sticky = sticky;
	count_armed();
	pthread_mutex_unlock(&fault_lock);
}

void om_fault_reset(void)
{
	for (int i = 0; i < OM_FAULT_COUNT; i++)
		om_fault_arm((enum om_fault)i, 0, false);
}

uint64_t om_fault_fired(enum om_fault point)
{
	pthread_mutex_lock(&fault_lock);
	uint64_t fired = faults[point].fired;
	pthread_mutex_unlock(&fault_lock);
	return fired;
}

bool om_fault_slow(enum om_fault point)
{
	bool fire = false;

	pthread_mutex_lock(&fault_lock);
	if (faults[point].left == 1) {
		fire = true;
		faults[point].fired++;
		if (!faults[point].sticky)
			faults[point].left = 0;
		count_armed();
	} else if (faults[point].left > 1) {
		faults[point].left--;
	}
	pthread_mutex_unlock(&fault_lock);
	return fire;
}

static unsigned fork_generation;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static int fork_watch_code;

static void after_fork_in_child(void)
{
	__atomic_add_fetch(&fork_generation, 1, __ATOMIC_RELAXED);
}

static void watch_fork(void)
{
	fork_watch_code = -pthread_atfork(NULL, NULL, after_fork_in_child);
}

int om_fork_watch(void)
{
	pthread_once(&fork_once, watch_fork);
	return fork_watch_code ? om_err(fork_watch_code, "cannot watch for fork") : 0;
}

unsigned om_fork_generation(void)
{
	return __atomic_load_n(&fork_generation, __ATOMIC_RELAXED);
}
