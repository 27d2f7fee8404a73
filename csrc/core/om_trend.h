/*
 * om_trend: where a number is going: the line through its last samples. Pure; the caller feeds samples with
 * their times, and serialises.
 */
#ifndef OM_TREND_H
#define OM_TREND_H

#include <stddef.h>
#include <stdint.h>

#define OM_TREND_SAMPLES 640u /* half a minute, 50 ms apart */

struct om_trend {
	uint64_t times_ns[OM_TREND_SAMPLES]; /* a ring */
	double values[OM_TREND_SAMPLES];
	uint64_t fed;
};
struct om_fit {
	size_t samples;
	double slope; /* a second; NaN with fewer than three samples, or all of one moment */
	double r2; /* share of the variance that the line explains; NaN as above, 1 when there is none */
	double seconds; /* from the first sample to the last */
};

void om_trend_feed(struct om_trend *t, uint64_t now_ns, double value);
void om_trend_forget(struct om_trend *t);
/* Least squares over the samples of the last `window_ns`, counted from the newest. */
struct om_fit om_trend_fit(const struct om_trend *t, uint64_t window_ns);
/* How often it turned in that time: steps of half a second or more that go the other way than the one before,
 * those by no more than `dead` a second left out. */
unsigned om_trend_turns(const struct om_trend *t, uint64_t window_ns, double dead);

#endif
