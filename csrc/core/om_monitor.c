/*
 * om_monitor: life of a monitor, what it watches, its thread, and what it tells.
 *
 * Owns the one thread that takes samples by itself ("omnimem-monitor"), and a reference to each store and bank that it
 * watches. Lock rule: see om_monitor_int.h. A sample that cannot be taken is an error for who asked for it; the
 * thread tries again after the interval.
 */
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include "core/om_bank_int.h"
#include "core/om_monitor_int.h"
#include "core/om_store_int.h"

#define LEAST_NS (OM_NSEC / 100)
#define MOST_NS  (86400 * OM_NSEC)

#define RECENT 16u          /* reports that are kept; */
#define OFTEN  (RECENT / 2) /* one of so many samples wakes who follows */

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * OM_NSEC + (uint64_t)ts.tv_nsec;
}

/* ---- life ---- */

static int init_locks(struct om_monitor *m)
{
	int code = om_mutex_init(&m->turn, OM_RANK_TURN);

	if (code)
		return code;
	code = om_mutex_init(&m->lock, OM_RANK_MONITOR);
	if (code)
		goto no_lock;
	code = om_cond_init(&m->changed);
	if (code)
		goto no_changed;
	code = om_cond_init(&m->stirred);
	if (code)
		goto no_stirred;
	code = om_cond_init(&m->wake);
	if (!code)
		return 0;
	om_cond_fini(&m->stirred);
no_stirred:
	om_cond_fini(&m->changed);
no_changed:
	om_mutex_fini(&m->lock);
no_lock:
	om_mutex_fini(&m->turn);
	return code;
}

static void free_parts(struct om_monitor *m)
{
	om_sampler_free(m->sampler);
	om_history_fini(&m->history);
	om_free(m->actions);
	om_free(m->recent);
	om_free(m->watched);
	om_free(m);
}

static int init(struct om_monitor *m, const struct om_monitor_config *c)
{
	int code = om_assess_init(&m->assessor, c->thresholds, c->interval_ns);

	if (code)
		return code;
	if (c->interval_ns < LEAST_NS || c->interval_ns > MOST_NS)
		return om_err(OM_EVALUE,
		              "an interval of %g s must lie between 0.01 s and a day (86400 s)",
		              (double)c->interval_ns / 1e9);
	m->config = *c;
	m->config.root = NULL;
	m->fork_generation = om_fork_generation();
	m->usage_asked = INFINITY;
	m->actions = om_alloc(OM_ACTIONS, sizeof(*m->actions));
	m->recent = om_alloc(RECENT, sizeof(*m->recent));
	if (!m->actions || !m->recent)
		return -ENOMEM;
	m->last = m->recent;
	code = om_history_init(&m->history);
	code = code ? code : om_sampler_create(c->root, &m->sampler);
	return code ? code : init_locks(m);
}

int om_monitor_create(const struct om_monitor_config *config, struct om_monitor **ret)
{
	int code = om_fork_watch();
	struct om_monitor *m;

	if (code)
		return code;
	m = om_alloc(1, sizeof(*m));
	code = m ? init(m, config) : -ENOMEM;
	if (code && m)
		free_parts(m);
	if (!code)
		*ret = m;
	return code;
}

static int check(const struct om_monitor *m)
{
	if (m->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED, "this monitor belongs to the process that forked this "
		                          "one; create a new one here");
	return 0;
}

/* With `turn` until leave: 0, or OM_ECLOSED. */
static int enter(struct om_monitor *m)
{
	int code = check(m);
	bool closed;

	if (code)
		return code;
	om_mutex_lock(&m->turn);
	om_mutex_lock(&m->lock);
	closed = m->closed;
	om_mutex_unlock(&m->lock);
	if (!closed)
		return 0;
	om_mutex_unlock(&m->turn);
	return om_err(OM_ECLOSED, "the monitor is closed");
}

static int leave(struct om_monitor *m, int code)
{
	om_mutex_unlock(&m->turn);
	return code;
}

/* With `lock`: 0, or OM_ECLOSED. */
static int enter_told(struct om_monitor *m)
{
	int code = check(m);

	if (code)
		return code;
	om_mutex_lock(&m->lock);
	if (!m->closed)
		return 0;
	om_mutex_unlock(&m->lock);
	return om_err(OM_ECLOSED, "the monitor is closed");
}

/* ---- what it watches ---- */

static void let_go(struct om_watched *w)
{
	if (w->store)
		om_store_unref(w->store);
	else
		om_bank_unref(w->bank);
}

static void remove_watched(struct om_monitor *m, struct om_watched *w)
{
	struct om_watched gone = *w;

	*w = m->watched[--m->watched_count];
	let_go(&gone);
}

static bool is_closed(const struct om_watched *w)
{
	return w->store ? __atomic_load_n(&w->store->closing, __ATOMIC_ACQUIRE)
	                : __atomic_load_n(&w->bank->closed, __ATOMIC_ACQUIRE);
}

static void forget_closed(struct om_monitor *m)
{
	for (size_t i = m->watched_count; i-- > 0;)
		if (is_closed(&m->watched[i]))
			remove_watched(m, &m->watched[i]);
}

static struct om_watched *find(struct om_monitor *m, struct om_store *s, struct om_bank *b)
{
	for (size_t i = 0; i < m->watched_count; i++)
		if (m->watched[i].store == s && m->watched[i].bank == b)
			return &m->watched[i];
	return NULL;
}

static int watch(struct om_monitor *m, struct om_store *s, struct om_bank *b)
{
	int code = enter(m);
	struct om_watched *w;

	if (code)
		return code;
	forget_closed(m);
	w = find(m, s, b);
	if (!w && m->watched_count == m->watched_room) {
		w = om_realloc(m->watched, 2 * m->watched_room + 4, sizeof(*w));
		if (!w)
			return leave(m, -ENOMEM);
		m->watched = w;
		m->watched_room = 2 * m->watched_room + 4;
		w = NULL;
	}
	if (!w) {
		w = &m->watched[m->watched_count++];
		*w = (struct om_watched){ s, b, 0 };
		if (s)
			om_store_ref(s);
		else
			om_bank_ref(b);
	}
	w->count++;
	return leave(m, 0);
}

static int unwatch(struct om_monitor *m, struct om_store *s, struct om_bank *b)
{
	int code = enter(m);
	struct om_watched *w = code ? NULL : find(m, s, b);

	if (code)
		return code;
	if (w && !--w->count) {
		om_relief_end(m, w);
		remove_watched(m, w);
	}
	return leave(m, 0);
}

int om_monitor_watch(struct om_monitor *m, struct om_store *s)
{
	return watch(m, s, NULL);
}

int om_monitor_unwatch(struct om_monitor *m, struct om_store *s)
{
	return unwatch(m, s, NULL);
}

int om_monitor_watch_bank(struct om_monitor *m, struct om_bank *b)
{
	return watch(m, NULL, b);
}

int om_monitor_unwatch_bank(struct om_monitor *m, struct om_bank *b)
{
	return unwatch(m, NULL, b);
}

/* ---- a sample ---- */

static void note_peak(struct om_monitor *m)
{
	struct om_report *r = &m->next;
	struct om_peak *peak = &r->peak;
	uint64_t used = r->sample.places[r->tightest].used_bytes;

	if (used <= peak->bytes)
		return;
	peak->bytes = used;
	peak->at_ns = r->sample.at_ns;
	peak->wall_ns = r->wall_ns;
	if (used - m->listed_bytes < m->listed_bytes / 100)
		return;
	m->listed_bytes = used;
	peak->count = 0;
	for (size_t i = 0; i < m->watched_count; i++)
		if (m->watched[i].store)
			om_store_largest(m->watched[i].store, peak->blocks, &peak->count);
}

/* What the stores that this monitor presses would give for nothing. */
static uint64_t spare_bytes(struct om_monitor *m)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < m->watched_count && m->config.act; i++)
		if (m->watched[i].store)
			bytes += om_press_spare(m->watched[i].store);
	return bytes;
}

static bool is_quiet(const struct om_monitor *m, const struct om_report *r)
{
	return !r->asked && m->last->level == OM_LOW && r->level == OM_LOW &&
	       isnan(r->seconds_left) && r->number % OFTEN && om_report_fullest(r) < m->usage_asked;
}

/* Most of a report is room for more places, GPUs and blocks than there are: that stays as it is. */
static void copy(struct om_report *ret, const struct om_report *r)
{
	const struct om_sample *s = &r->sample;

	memcpy(ret, r, offsetof(struct om_report, sample.places));
	memcpy(ret->sample.places, s->places, s->place_count * sizeof(*s->places));
	memcpy(ret->sample.gpus, s->gpus, s->gpu_count * sizeof(*s->gpus));
	memcpy(&ret->peak, &r->peak, offsetof(struct om_peak, blocks));
	memcpy(ret->peak.blocks, r->peak.blocks, r->peak.count * sizeof(*r->peak.blocks));
}

static void publish(struct om_monitor *m)
{
	const struct om_report *r = &m->next;

	om_mutex_lock(&m->lock);
	if (!is_quiet(m, r)) {
		m->stirs++;
		om_cond_broadcast(&m->stirred);
	}
	m->last = &m->recent[r->number % RECENT];
	copy(m->last, r);
	om_history_feed(&m->history, r->sample.at_ns, r->sample.places[r->tightest].used_bytes);
	om_cond_broadcast(&m->changed);
	om_mutex_unlock(&m->lock);
}

/* With `turn`. `due_ns`: when it was to be taken, 0: now. */
static int take(struct om_monitor *m, uint64_t due_ns)
{
	uint64_t began = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	struct om_report *r = &m->next;
	int code = om_sampler_read(m->sampler, &r->sample);

	if (code)
		return code;
	forget_closed(m);
	r->asked = !due_ns;
	r->wall_ns = clock_ns(CLOCK_REALTIME);
	r->lag_ns = due_ns && r->sample.at_ns > due_ns ? r->sample.at_ns - due_ns : 0;
	r->spare_bytes = spare_bytes(m);
	om_assess_step(&m->assessor, r);
	note_peak(m);
	r->busy_ns += clock_ns(CLOCK_THREAD_CPUTIME_ID) - began;
	publish(m);
	om_relief_act(m);
	return 0;
}

int om_monitor_sample(struct om_monitor *m, struct om_report *ret)
{
	int code = enter(m);

	if (code)
		return code;
	code = take(m, 0);
	if (!code)
		*ret = m->next;
	return leave(m, code);
}

int om_monitor_report(struct om_monitor *m, struct om_report *ret)
{
	int code = enter_told(m);

	if (code)
		return code;
	*ret = *m->last;
	om_mutex_unlock(&m->lock);
	return ret->number ? 0 : om_monitor_sample(m, ret);
}

/* ---- its thread ---- */

static void *run(void *arg)
{
	struct om_monitor *m = arg;
	uint64_t due = om_now(), interval = m->config.interval_ns;

	om_mutex_lock(&m->lock);
	while (!m->stopping) {
		if (om_now() < due) {
			om_cond_wait(&m->wake, &m->lock, due);
			continue;
		}
		om_mutex_unlock(&m->lock);
		om_mutex_lock(&m->turn);
		interval = take(m, due) ? m->config.interval_ns : m->next.interval_ns;
		om_mutex_unlock(&m->turn);
		due = om_deadline(interval);
		om_mutex_lock(&m->lock);
	}
	om_mutex_unlock(&m->lock);
	return NULL;
}

int om_monitor_start(struct om_monitor *m)
{
	int code = enter_told(m);

	if (code)
		return code;
	while (m->joining)
		om_cond_wait(&m->changed, &m->lock, UINT64_MAX);
	m->stopping = false;
	if (!m->started) {
		code = om_thread_start(&m->thread, "omnimem-monitor", run, m);
		m->started = !code;
	}
	om_mutex_unlock(&m->lock);
	return code;
}

/* Until the thread has ended, whoever ends it. */
static void stop_locked(struct om_monitor *m)
{
	while (m->joining)
		om_cond_wait(&m->changed, &m->lock, UINT64_MAX);
	if (!m->started)
		return;
	m->joining = m->stopping = true;
	om_cond_signal(&m->wake);
	om_mutex_unlock(&m->lock);
	pthread_join(m->thread, NULL);
	om_mutex_lock(&m->lock);
	m->joining = m->started = false;
	om_cond_broadcast(&m->changed);
	om_cond_broadcast(&m->stirred);
}

int om_monitor_stop(struct om_monitor *m)
{
	int code = enter_told(m);

	if (code)
		return code;
	stop_locked(m);
	om_mutex_unlock(&m->lock);
	code = enter(m);
	if (code)
		return code == OM_ECLOSED ? 0 : code;
	om_relief_end(m, NULL);
	return leave(m, 0);
}

bool om_monitor_running(struct om_monitor *m)
{
	bool running;

	if (enter_told(m))
		return false;
	running = m->started && !m->stopping;
	om_mutex_unlock(&m->lock);
	return running;
}

int om_monitor_close(struct om_monitor *m)
{
	int code = check(m);

	if (code)
		return code;
	om_mutex_lock(&m->lock);
	m->closed = true;
	om_cond_broadcast(&m->changed);
	om_cond_broadcast(&m->stirred);
	stop_locked(m);
	om_mutex_unlock(&m->lock);
	om_mutex_lock(&m->turn);
	om_relief_end(m, NULL);
	while (m->watched_count)
		let_go(&m->watched[--m->watched_count]);
	return leave(m, 0);
}

void om_monitor_free(struct om_monitor *m)
{
	if (!m || om_monitor_close(m))
		return; /* a child of fork: threads and locks are the parent's */
	om_cond_fini(&m->wake);
	om_cond_fini(&m->stirred);
	om_cond_fini(&m->changed);
	om_mutex_fini(&m->lock);
	om_mutex_fini(&m->turn);
	free_parts(m);
}

/* ---- what it tells ---- */

/* With `lock`, given back: an end for who waited. */
static int told(struct om_monitor *m, int code)
{
	code = m->closed ? om_err(OM_ECLOSED, "the monitor is closed") : code;
	om_mutex_unlock(&m->lock);
	return code;
}

int om_monitor_wait(struct om_monitor *m, int64_t since, enum om_level level, uint64_t deadline_ns,
                    uint64_t *ret_number)
{
	int code = enter_told(m);

	if (code)
		return code;
	while (!m->closed) {
		*ret_number = m->last->number;
		if (*ret_number && (int64_t)*ret_number > since && m->last->level >= level)
			return told(m, 0);
		if (!om_cond_wait(&m->changed, &m->lock, deadline_ns))
			return told(m, OM_EBUSY);
	}
	return told(m, 0);
}

int om_monitor_follow(struct om_monitor *m, uint64_t since, double usage, uint64_t deadline_ns,
                      uint64_t *ret_stirs)
{
	int code = enter_told(m);

	if (code)
		return code;
	m->usage_asked = fmin(m->usage_asked, usage);
	while (!m->closed) {
		if (!m->started || m->stopping)
			return told(m, OM_ECANCELED);
		*ret_stirs = m->stirs;
		if (m->stirs > since)
			return told(m, 0);
		if (!om_cond_wait(&m->stirred, &m->lock, deadline_ns))
			return told(m, OM_EBUSY);
	}
	return told(m, 0);
}

int om_monitor_stir(struct om_monitor *m)
{
	int code = enter_told(m);

	if (code)
		return code;
	m->stirs++;
	om_cond_broadcast(&m->stirred);
	om_mutex_unlock(&m->lock);
	return 0;
}

int om_monitor_recent(struct om_monitor *m, uint64_t since, struct om_report **ret,
                      size_t *ret_count)
{
	int code = enter_told(m);
	uint64_t last, first;

	if (code)
		return code;
	last = m->last->number;
	first = OM_MAX(since, last - OM_MIN(last, RECENT)) + 1;
	*ret = om_alloc(last < first ? 1 : last + 1 - first, sizeof(**ret));
	*ret_count = 0;
	for (uint64_t n = first; *ret && n <= last; n++)
		if (!m->recent[n % RECENT].asked)
			copy(&(*ret)[(*ret_count)++], &m->recent[n % RECENT]);
	om_mutex_unlock(&m->lock);
	return *ret ? 0 : -ENOMEM;
}

int om_monitor_history(struct om_monitor *m, unsigned seconds, struct om_span **ret,
                       size_t *ret_count)
{
	int code = enter_told(m);

	if (code)
		return code;
	code = om_history_tell(&m->history, seconds, ret, ret_count);
	om_mutex_unlock(&m->lock);
	return code;
}

int om_monitor_actions(struct om_monitor *m, uint64_t since, struct om_action **ret,
                       size_t *ret_count)
{
	int code = enter_told(m);
	uint64_t first, count;

	if (code)
		return code;
	first = m->action_count - OM_MIN(m->action_count, OM_ACTIONS);
	first = OM_MIN(OM_MAX(first, since), m->action_count);
	count = m->action_count - first;
	*ret = om_alloc(count, sizeof(**ret));
	*ret_count = *ret ? count : 0;
	for (uint64_t i = 0; i < *ret_count; i++)
		(*ret)[i] = m->actions[(first + i) % OM_ACTIONS];
	om_mutex_unlock(&m->lock);
	return *ret ? 0 : -ENOMEM;
}
