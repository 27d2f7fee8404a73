/* om_pressure: see om_pressure.h; and the object with a lock that the binding uses. */
#include "core/om_pressure.h"

#include <errno.h>
#include <math.h>

#include "base/om_sync.h"
#include "plat/om_sys.h"

#define WINDOW_NS (60 * OM_NSEC)
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
		p->thresholds[i] = t[i];
	return 0;
}

enum om_level om_pressure_state_feed(struct om_pressure_state *p, uint64_t now_ns, double usage)
{
	size_t at = p->fed++ % OM_PRESSURE_SAMPLES;

	p->times_ns[at] = now_ns;
	p->usages[at] = usage;
	while (p->level > OM_LOW && usage < p->thresholds[p->level - 1] - OM_PRESSURE_MARGIN)
		p->level--;
	while (p->level < OM_CRITICAL && usage >= p->thresholds[p->level])
		p->level++;
	return p->level;
}

int om_pressure_state_trend(const struct om_pressure_state *p)
{
	size_t have = (size_t)OM_MIN(p->fed, OM_PRESSURE_SAMPLES), n = 0;
	double t = 0, u = 0, tt = 0, tu = 0, first = 0, slope;
	uint64_t newest = have ? p->times_ns[(p->fed - 1) % OM_PRESSURE_SAMPLES] : 0;

	for (size_t k = 1; k <= have; k++) { /* the newest first */
		size_t at = (p->fed - k) % OM_PRESSURE_SAMPLES;
		double age = (double)(newest - p->times_ns[at]) / (double)OM_NSEC;

		if (newest - p->times_ns[at] > WINDOW_NS)
			break;
		n++;
		t -= age;
		u += p->usages[at];
		tt += age * age;
		tu -= age * p->usages[at];
		first = age;
	}
	if (n < 3 || (double)n * tt - t * t <= 0)
		return 0;
	slope = ((double)n * tu - t * u) / ((double)n * tt - t * t);
	return slope * first > A_POINT ? 1 : slope * first < -A_POINT ? -1 : 0;
}

/* ---- the object ---- */

struct om_pressure {
	struct om_mutex lock;
	struct om_pressure_state state;
};

int om_memory_now(const char *root, struct om_memory *ret)
{
	return om_sys_memory(root, ret);
}

int om_pressure_create(const double thresholds[3], struct om_pressure **ret)
{
	struct om_pressure *p = om_alloc(1, sizeof(*p));
	int code = p ? om_pressure_state_set(&p->state, thresholds) : -ENOMEM;

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
		ret_thresholds[i] = p->state.thresholds[i];
	om_mutex_unlock(&p->lock);
}

enum om_level om_pressure_feed(struct om_pressure *p, double usage)
{
	enum om_level level;

	om_mutex_lock(&p->lock);
	level = om_pressure_state_feed(&p->state, om_now(), usage);
	om_mutex_unlock(&p->lock);
	return level;
}

int om_pressure_trend(struct om_pressure *p)
{
	int trend;

	om_mutex_lock(&p->lock);
	trend = om_pressure_state_trend(&p->state);
	om_mutex_unlock(&p->lock);
	return trend;
}
