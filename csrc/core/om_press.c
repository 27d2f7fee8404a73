/*
 * om_press: what a store does when it is told that memory is short: what no block uses is unmapped, guesses
 * stop, idle blocks go as far as they are wanted (om_sweep.c). Who tells is a monitor, or anybody.
 */
#include <errno.h>

#include "core/om_sweep.h"

#define RECENT_NS OM_NSEC

/* Memory that no block uses now and that a ring takes again with its next unit: planned, and worth more than
 * the pages that it would save for a moment. */
static uint64_t ring_bytes(const struct om_store *s)
{
	uint64_t bytes = 0;

	OM_LIST_FOREACH(link, &s->groups) {
		const struct om_group *g = om_container_of(link, struct om_group, link);

		if (g->streams && g->limit_bytes > g->used_bytes)
			bytes += g->limit_bytes - g->used_bytes;
	}
	return bytes;
}

static uint64_t idle_bytes(const struct om_store *s)
{
	uint64_t bytes = 0;

	OM_LIST_FOREACH(link, &s->groups)
		bytes += om_container_of(link, struct om_group, link)->idle_bytes;
	return bytes;
}

uint64_t om_press_spare(struct om_store *s)
{
	uint64_t bytes = 0;

	if (om_store_enter(s))
		return 0;
	OM_LIST_FOREACH(link, &s->groups)
		bytes += om_container_of(link, struct om_group, link)->spare_bytes;
	om_mutex_unlock(&s->lock);
	return bytes;
}

/* What goes is what nobody has used since then. Where memory is not very short, what has only just been given up is
 * most likely taken again at once, by a model in place of another. */
static uint64_t idle_before(enum om_level level)
{
	return level >= OM_HIGH ? UINT64_MAX : om_now() - RECENT_NS;
}

struct om_press {
	struct om_sweep sweep;
};

static int begin(struct om_sweep *w, struct om_store *s, enum om_level level, double ceiling,
                 uint64_t bytes)
{
	uint64_t cached;
	int code;

	*w = (struct om_sweep){ .store = s, .want = bytes };
	if (!(ceiling >= 0 && ceiling <= 1))
		return om_err(
			OM_EVALUE,
			"ceiling=%g must be a share of memory in use, above 0 to 1, or 0 for %g",
			ceiling, OM_GUARD_CEILING);
	code = om_store_enter(s);
	if (code)
		return code;
	s->guard.level = level;
	s->guard.ceiling = ceiling;
	w->reserve = level == OM_CRITICAL ? 0 : ring_bytes(s);
	if (level >= OM_MEDIUM)
		w->done.trimmed_bytes = om_pool_trim(&s->pool, w->reserve, idle_before(level));
	cached = s->pool.cached_bytes;
	bytes = om_pool_trim(&s->pool, OM_MAX(w->reserve, cached - OM_MIN(cached, bytes)),
	                     UINT64_MAX);
	w->want -= OM_MIN(w->want, bytes);
	w->done.trimmed_bytes += bytes;
	w->done.left_bytes = idle_bytes(s);
	return om_store_leave(s, 0);
}

static int wait_for(struct om_sweep *w, uint64_t deadline_ns)
{
	int code;

	if (!w->want)
		return 0;
	code = om_store_enter(w->store);
	if (code)
		return code;
	code = om_sweep_run_locked(w, deadline_ns);
	w->done.left_bytes = idle_bytes(w->store);
	return om_store_leave(w->store, code);
}

static void end(struct om_sweep *w)
{
	if (w->store->fork_generation != om_fork_generation())
		return;
	om_mutex_lock(&w->store->lock);
	om_sweep_end_locked(w);
	om_mutex_unlock(&w->store->lock);
}

int om_store_press(struct om_store *s, enum om_level level, double ceiling, uint64_t bytes,
                   uint64_t deadline_ns, struct om_pressed *ret)
{
	struct om_sweep w;
	int code = begin(&w, s, level, ceiling, bytes);

	if (!code) {
		code = wait_for(&w, deadline_ns);
		end(&w);
	}
	*ret = w.done;
	return code;
}

int om_press_begin(struct om_store *s, enum om_level level, double ceiling, uint64_t bytes,
                   struct om_press **ret)
{
	struct om_press *p = om_alloc(1, sizeof(*p));
	int code = p ? begin(&p->sweep, s, level, ceiling, bytes) : -ENOMEM;

	if (code) {
		om_free(p);
		return code;
	}
	om_store_ref(s);
	*ret = p;
	return 0;
}

int om_press_wait(struct om_press *p, uint64_t deadline_ns)
{
	return wait_for(&p->sweep, deadline_ns);
}

void om_press_end(struct om_press *p, struct om_pressed *ret)
{
	struct om_store *s = p->sweep.store;

	end(&p->sweep);
	*ret = p->sweep.done;
	om_free(p);
	om_store_unref(s);
}
