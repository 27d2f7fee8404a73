/* om_meter: see om_meter.h. What is closed is added up in atomics, so that it needs no lock of its own. */
#include "core/om_meter.h"

#include <errno.h>
#include <string.h>

#include "core/om_store_int.h"

struct om_mark {
	struct om_list link; /* meter.marks; alone once the store is closed */
	struct om_store *store;
	struct om_peaks peaks;
};

static _Thread_local enum om_reason reason_now = OM_REASON_CAPACITY;

enum om_reason om_reason_now(void)
{
	return reason_now;
}

enum om_reason om_reason_enter(enum om_reason reason)
{
	enum om_reason former = reason_now;

	if (former == OM_REASON_CAPACITY)
		reason_now = reason;
	return former;
}

void om_reason_leave(enum om_reason former)
{
	reason_now = former;
}

/* ---- peaks ---- */

/* Memory of somebody else counts by lowering the pool's limit. */
static uint64_t host_bytes(const struct om_store *s)
{
	return s->pool.used_bytes + (s->host_limit_bytes - s->pool.limit_bytes);
}

void om_meter_init(struct om_store *s)
{
	om_list_init(&s->meter.marks);
}

void om_meter_peak_locked(struct om_store *s)
{
	s->host_peak_bytes = OM_MAX(s->host_peak_bytes, host_bytes(s));
}

static struct om_peaks higher(struct om_peaks a, struct om_peaks b)
{
	return (struct om_peaks){ OM_MAX(a.host_bytes, b.host_bytes),
		                  OM_MAX(a.packed_bytes, b.packed_bytes),
		                  OM_MAX(a.disk_bytes, b.disk_bytes) };
}

static struct om_peaks since_mark(const struct om_store *s)
{
	return (struct om_peaks){ s->host_peak_bytes, s->meter.packed.peak_bytes,
		                  s->disk.peak_bytes };
}

struct om_peaks om_meter_peaks_locked(const struct om_store *s)
{
	return higher(s->meter.past, since_mark(s));
}

/* All that are open have seen what there was; from now on it is counted anew. */
static void turn_locked(struct om_store *s)
{
	struct om_peaks seen = since_mark(s);

	s->meter.past = higher(s->meter.past, seen);
	OM_LIST_FOREACH(link, &s->meter.marks) {
		struct om_mark *m = om_container_of(link, struct om_mark, link);

		m->peaks = higher(m->peaks, seen);
	}
	s->host_peak_bytes = host_bytes(s);
	s->meter.packed.peak_bytes = s->meter.packed.used_bytes;
	s->disk.peak_bytes = s->disk.used_bytes;
}

int om_mark_begin(struct om_store *s, struct om_mark **ret)
{
	struct om_mark *m = om_alloc(1, sizeof(*m));
	int code = m ? om_store_enter(s) : -ENOMEM;

	if (code) {
		om_free(m);
		return code;
	}
	turn_locked(s);
	m->store = s;
	m->peaks = since_mark(s);
	om_list_push_tail(&s->meter.marks, &m->link);
	__atomic_add_fetch(&s->refs, 1, __ATOMIC_RELAXED);
	*ret = m;
	return om_store_leave(s, 0);
}

void om_mark_end(struct om_mark *m, struct om_peaks *ret)
{
	struct om_store *s = m->store;

	if (s->fork_generation != om_fork_generation()) {
		*ret = m->peaks; /* the memory and the lock are the parent's */
		return;
	}
	om_mutex_lock(&s->lock);
	if (!s->meter.retired)
		turn_locked(s);
	om_list_del(&m->link);
	om_mutex_unlock(&s->lock);
	*ret = m->peaks;
	om_free(m);
	om_store_unref_memory(s);
}

/* ---- counters ---- */

void om_meter_gone_locked(struct om_store *s, const struct om_block *b, enum om_reason reason)
{
	s->meter.counts.gone[reason]++;
	s->meter.counts.gone_bytes[reason] += om_block_counted_bytes(b);
	if (b->accessed_ns)
		om_latency_add(&s->meter.idle, om_now() - b->accessed_ns);
}

void om_meter_life_locked(struct om_store *s, const struct om_block *b)
{
	om_latency_add(&s->meter.life, om_now() - b->created_ns);
}

void om_meter_failed_locked(struct om_store *s, bool write, int code)
{
	enum om_failure class = OM_FAILURE_OTHER;

	s->counters.io_errors++;
	if (code == -ENOSPC || code == -EDQUOT || code == -EFBIG)
		class = OM_FAILURE_SPACE;
	else if (code == -ENODATA)
		class = OM_FAILURE_SHORT;
	else if (code == -EIO)
		class = OM_FAILURE_IO;
	s->meter.counts.failures[write][class]++;
}

uint64_t om_histogram_bound_ns(unsigned step)
{
	return step < OM_HISTOGRAM_STEPS - 1 ? UINT64_C(8000) << (2 * step) : UINT64_MAX;
}

static void add_groups_locked(struct om_store *s, struct om_totals *t)
{
	OM_LIST_FOREACH(link, &s->groups) {
		const struct om_group *g = om_container_of(link, struct om_group, link);

		*(g->cache ? &t->entry_hits : &t->block_hits) += g->traffic.hits;
		*(g->cache ? &t->entry_misses : &t->block_misses) += g->traffic.misses;
		t->decoded_bytes += g->decoded_bytes;
	}
}

static void total_up_locked(struct om_store *s, struct om_totals *t)
{
	const struct om_stats *c = &s->counters;

	*t = s->meter.counts;
	t->fills = c->fills;
	t->read_bytes = c->read_bytes;
	t->written_bytes = c->written_bytes;
	t->stall_ns = c->stall_ns;
	t->verified_bytes = c->verified_bytes;
	t->corrupt = c->corrupt;
	t->rereads = c->rereads;
	t->prefetches = c->prefetches;
	t->prefetch_hits = c->prefetch_hits;
	t->prefetch_waste = c->prefetch_waste;
	t->fell_back = c->io_fell_back;
	add_groups_locked(s, t);
	om_latency_histogram(&s->read_latency, &t->read);
	om_latency_histogram(&s->write_latency, &t->write);
	om_latency_histogram(&s->meter.in, &t->in);
	om_latency_histogram(&s->meter.out, &t->out);
	om_latency_histogram(&s->meter.idle, &t->idle);
	om_latency_histogram(&s->meter.life, &t->life);
}

static void gauge_locked(struct om_store *s, struct om_gauges *g)
{
	*g = (struct om_gauges){ .moving_in_bytes = s->meter.counts.in_begun_bytes -
		                                    s->meter.counts.in_ended_bytes,
		                 .moving_out_bytes = s->meter.counts.out_begun_bytes -
		                                     s->meter.counts.out_ended_bytes };
	OM_LIST_FOREACH(link, &s->groups) {
		const struct om_group *at = om_container_of(link, struct om_group, link);

		g->host_bytes += at->used_bytes + at->gone_bytes;
		g->packed_bytes += at->packed_bytes;
		g->entry_bytes += at->cache ? at->used_bytes - at->packed_bytes : 0;
	}
}

int om_store_totals(struct om_store *s, struct om_totals *ret, struct om_gauges *ret_gauges)
{
	bool retired;

	if (s->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED, "this store belongs to the process that forked this one");
	om_mutex_lock(&s->lock);
	total_up_locked(s, ret);
	gauge_locked(s, ret_gauges);
	retired = s->meter.retired;
	om_mutex_unlock(&s->lock);
	return retired;
}

/* ---- stores that are closed ---- */

#define COUNTERS (sizeof(struct om_totals) / sizeof(uint64_t))

static uint64_t closed[COUNTERS], closing_begun, closing_ended; /* atomic */

void om_meter_retire_locked(struct om_store *s)
{
	uint64_t counters[COUNTERS];
	struct om_totals totals;

	turn_locked(s);
	while (!om_list_empty(&s->meter.marks))
		om_list_del(s->meter.marks.next);
	total_up_locked(s, &totals);
	add_groups_locked(s, &s->meter.counts); /* the groups go */
	memcpy(counters, &totals, sizeof(counters));
	__atomic_add_fetch(&closing_begun, 1, __ATOMIC_SEQ_CST);
	for (size_t i = 0; i < COUNTERS; i++)
		__atomic_add_fetch(&closed[i], counters[i], __ATOMIC_SEQ_CST);
	s->meter.retired = true;
	__atomic_add_fetch(&closing_ended, 1, __ATOMIC_SEQ_CST);
}

uint64_t om_totals_closed(struct om_totals *ret)
{
	uint64_t counters[COUNTERS], ended = __atomic_load_n(&closing_ended, __ATOMIC_SEQ_CST);

	for (size_t i = 0; i < COUNTERS; i++)
		counters[i] = __atomic_load_n(&closed[i], __ATOMIC_SEQ_CST);
	memcpy(ret, counters, sizeof(*ret));
	return ended == __atomic_load_n(&closing_begun, __ATOMIC_SEQ_CST) ? ended : UINT64_MAX;
}
