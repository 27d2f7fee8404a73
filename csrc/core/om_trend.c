/* om_trend: see om_trend.h. */
#include "core/om_trend.h"

#include <math.h>

#include "base/om_base.h"

#define LEAST   3             /* samples of a line that says anything */
#define STEP_NS (OM_NSEC / 2) /* noise of samples that lie closer is no turn */

static size_t place(const struct om_trend *t, uint64_t back)
{
	return (t->fed - back) % OM_TREND_SAMPLES;
}

/* Samples that are no older than `window_ns`. */
static size_t within(const struct om_trend *t, uint64_t window_ns)
{
	size_t have = (size_t)OM_MIN(t->fed, OM_TREND_SAMPLES), n = 0;
	uint64_t newest = have ? t->times_ns[place(t, 1)] : 0;

	while (n < have && newest - t->times_ns[place(t, n + 1)] <= window_ns)
		n++;
	return n;
}

void om_trend_feed(struct om_trend *t, uint64_t now_ns, double value)
{
	size_t at = t->fed++ % OM_TREND_SAMPLES;

	t->times_ns[at] = now_ns;
	t->values[at] = value;
}

void om_trend_forget(struct om_trend *t)
{
	t->fed = 0;
}

struct om_fit om_trend_fit(const struct om_trend *t, uint64_t window_ns)
{
	size_t n = within(t, window_ns);
	uint64_t first = n ? t->times_ns[place(t, n)] : 0;
	struct om_fit fit = { .samples = n, .slope = NAN, .r2 = NAN };
	double mean_t = 0, mean_v = 0, tt = 0, tv = 0, vv = 0;

	for (size_t k = 1; k <= n; k++) {
		mean_t += (double)(t->times_ns[place(t, k)] - first) / (double)OM_NSEC / (double)n;
		mean_v += t->values[place(t, k)] / (double)n;
	}
	for (size_t k = 1; k <= n; k++) {
		double dt = (double)(t->times_ns[place(t, k)] - first) / (double)OM_NSEC - mean_t;
		double dv = t->values[place(t, k)] - mean_v;

		tt += dt * dt;
		tv += dt * dv;
		vv += dv * dv;
	}
	if (n < LEAST || !(tt > 0))
		return fit;
	fit.seconds = (double)(t->times_ns[place(t, 1)] - first) / (double)OM_NSEC;
	fit.slope = tv / tt;
	fit.r2 = vv > 0 ? tv * tv / (tt * vv) : 1;
	return fit;
}

unsigned om_trend_turns(const struct om_trend *t, uint64_t window_ns, double dead)
{
	size_t n = within(t, window_ns), from = n;
	unsigned turns = 0;
	int way = 0;

	for (size_t k = n; k-- > 1;) { /* from the oldest to the newest */
		uint64_t ns = t->times_ns[place(t, k)] - t->times_ns[place(t, from)];
		double step = t->values[place(t, k)] - t->values[place(t, from)];
		int now;

		if (ns < STEP_NS)
			continue;
		from = k;
		if (fabs(step) <= dead * (double)ns / (double)OM_NSEC)
			continue;
		now = step > 0 ? 1 : -1;
		turns += way == -now;
		way = now;
	}
	return turns;
}
