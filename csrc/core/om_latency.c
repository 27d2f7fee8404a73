/* om_latency: see om_latency.h. */
#include "core/om_latency.h"

#include "base/om_base.h"

/* Durations are counted in us: the place of the highest bit, and the two bits below it. */
static unsigned step_of(uint64_t ns)
{
	uint64_t us = OM_MAX(ns / 1000, 4u);
	unsigned top = 63u - (unsigned)__builtin_clzll(us);
	unsigned step = (top - 2) * 4 + (unsigned)(us >> (top - 2) & 3);

	return OM_MIN(step, OM_LATENCY_STEPS - 1u);
}

/* The first duration that belongs to the next step. */
static uint64_t end_of(unsigned step)
{
	return (UINT64_C(5) + step % 4) << (step / 4);
}

void om_latency_add(struct om_latency *l, uint64_t ns)
{
	l->total++;
	l->sum_ns += ns;
	l->counts[step_of(ns)]++;
}

uint64_t om_latency_quantile(const struct om_latency *l, double share)
{
	uint64_t seen = 0;
	unsigned step = 0;

	if (!l->total)
		return 0;
	while (step < OM_LATENCY_STEPS - 1) {
		seen += l->counts[step];
		if ((double)seen >= share * (double)l->total)
			break;
		step++;
	}
	return end_of(step) * 1000;
}

void om_latency_histogram(const struct om_latency *l, struct om_histogram *ret)
{
	*ret = (struct om_histogram){ .count = l->total, .sum_ns = l->sum_ns };
	for (unsigned step = 0; step < OM_LATENCY_STEPS; step++) {
		unsigned wide = 0;

		while (end_of(step) * 1000 > om_histogram_bound_ns(wide))
			wide++;
		ret->counts[wide] += l->counts[step];
	}
}
