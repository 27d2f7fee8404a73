/* om_pressure: see om_pressure.h; and the object with a lock, of shares alone, that the binding uses. */
#include "core/om_pressure.h"

#include <errno.h>
#include <math.h>

#include "base/om_sync.h"
#include "plat/om_sys.h"

#define WINDOW_NS (60 * OM_NSEC) /* of the trend */
#define A_POINT   0.01

int om_pressure_state_set(struct om_pressure_state *p, const double t[3])
{
	if (!(t[0] > 0 && t[0] < t[1] && t[1] < t[2] && t[2] <= 1)) /* NaN too */
		return om_err(
			OM_EVALUE,
			"thresholds (%g, %g, %g) must rise from above 0 to at most 1: shares in "
			"use at which MEDIUM, HIGH and CRITICAL begin",
			t[0], t[1], t[2]);
	for (int i = 0; i < 3; i++)
		p->rules.thresholds[i] = t[i];
	return 0;
}

void om_pressure_plain(struct om_pressure_state *p)
{
	p->rules = (struct om_pressure_rules){ .margin = OM_PRESSURE_MARGIN };
}

void om_pressure_full(struct om_pressure_state *p)
{
	p->rules = (struct om_pressure_rules){ .margin = OM_PRESSURE_MARGIN,
		                               .confirm = true,
		                               .dwell_ns = 10 * OM_NSEC,
		                               .some = { 0.07, 0, 0 },
		                               .full = { 0, 0.10, 0.40 },
		                               .seconds = { 60, 15, 3 },
		                               .events = true };
}

/* By which condition a reading asks for a level, or with a margin holds it. NaN asks for nothing. */
static enum om_cause asks(const struct om_pressure_rules *r, const struct om_reading *x, int level,
                          double margin)
{
	int i = level - 1;

	if (x->usage >= r->thresholds[i] - margin)
		return OM_CAUSE_USE;
	if (r->full[i] > 0 && x->full >= r->full[i])
		return OM_CAUSE_FULL;
	if (r->some[i] > 0 && x->some >= r->some[i])
		return OM_CAUSE_SOME;
	if (r->seconds[i] > 0 && x->seconds_left < r->seconds[i])
		return OM_CAUSE_TIME;
	if (level == OM_CRITICAL && r->events && x->met && x->usage >= r->thresholds[0])
		return OM_CAUSE_MET;
	return OM_CAUSE_NONE;
}

/* The highest level that a reading asks for. */
static enum om_level highest(const struct om_pressure_rules *r, const struct om_reading *x)
{
	int level = OM_CRITICAL;

	while (level > OM_LOW && !asks(r, x, level, 0))
		level--;
	return (enum om_level)level;
}

/* By what a reading holds a level: a condition of it, or of a higher one. */
static enum om_cause holds(const struct om_pressure_rules *r, const struct om_reading *x, int level)
{
	enum om_cause cause = asks(r, x, level, r->margin);

	for (int above = OM_CRITICAL; above > level && !cause; above--)
		cause = asks(r, x, above, r->margin);
	return cause;
}

static void rise(struct om_pressure_state *p, enum om_level asked, uint64_t now_ns)
{
	bool soon = p->fallen && now_ns - p->fell_ns < p->rules.dwell_ns;

	if (asked != OM_CRITICAL && soon)
		return;
	if (asked != OM_CRITICAL && p->rules.confirm)
		asked = OM_MIN(asked, p->asked);
	p->level = OM_MAX(p->level, asked);
}

/* One level a dwell; without one, as many as nothing holds. */
static void fall(struct om_pressure_state *p, const struct om_reading *x)
{
	while (p->level > OM_LOW && !holds(&p->rules, x, p->level) &&
	       x->at_ns - p->held_ns >= p->rules.dwell_ns) {
		p->level--;
		p->fallen = true;
		p->fell_ns = x->at_ns;
		if (p->rules.dwell_ns)
			p->held_ns = x->at_ns;
	}
}

enum om_level om_pressure_step(struct om_pressure_state *p, const struct om_reading *x)
{
	enum om_level asked = highest(&p->rules, x);

	fall(p, x);
	rise(p, asked, x->at_ns);
	p->asked = asked;
	p->cause = p->level ? holds(&p->rules, x, p->level) : OM_CAUSE_NONE;
	if (p->cause)
		p->held_ns = x->at_ns;
	return p->level;
}

/* ---- the object ---- */

struct om_pressure {
	struct om_mutex lock;
	struct om_pressure_state state;
	struct om_trend trend;
};

int om_memory_now(const char *root, struct om_memory *ret)
{
	return om_sys_memory(root, ret);
}

int om_pressure_create(const double thresholds[3], struct om_pressure **ret)
{
	struct om_pressure *p = om_alloc(1, sizeof(*p));
	int code = -ENOMEM;

	if (p) {
		om_pressure_plain(&p->state);
		code = om_pressure_state_set(&p->state, thresholds);
	}
	code = code ? code : om_mutex_init(&p->lock, OM_RANK_STORE);
	if (code) {
		om_free(p);
		return code;
	}
	*ret = p;
	return 0;
}

void om_pressure_free(struct om_pressure *p)
{
	if (!p)
		return;
	om_mutex_fini(&p->lock);
	om_free(p);
}

int om_pressure_set(struct om_pressure *p, const double thresholds[3])
{
	int code;

	om_mutex_lock(&p->lock);
	code = om_pressure_state_set(&p->state, thresholds);
	om_mutex_unlock(&p->lock);
	return code;
}

void om_pressure_get(struct om_pressure *p, double ret_thresholds[3])
{
	om_mutex_lock(&p->lock);
	for (int i = 0; i < 3; i++)
		ret_thresholds[i] = p->state.rules.thresholds[i];
	om_mutex_unlock(&p->lock);
}

enum om_level om_pressure_feed(struct om_pressure *p, double usage)
{
	struct om_reading x = { om_now(), usage, NAN, NAN, NAN, false };
	enum om_level level;

	om_mutex_lock(&p->lock);
	om_trend_feed(&p->trend, x.at_ns, usage);
	level = om_pressure_step(&p->state, &x);
	om_mutex_unlock(&p->lock);
	return level;
}

int om_pressure_trend(struct om_pressure *p)
{
	struct om_fit fit;
	double left; /* by the line, over all of its time; NaN: there is none */

	om_mutex_lock(&p->lock);
	fit = om_trend_fit(&p->trend, WINDOW_NS);
	om_mutex_unlock(&p->lock);
	left = fit.slope * fit.seconds;
	return left > A_POINT ? 1 : left < -A_POINT ? -1 : 0;
}
