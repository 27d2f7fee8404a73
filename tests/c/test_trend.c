/* om_trend: lines through samples, on a fake clock: exact ones, noise, what is too old or too few, turns. */
#include <math.h>
#include <string.h>

#include "base/om_base.h"
#include "core/om_trend.h"
#include "om_test.h"

#define WINDOW (30 * OM_NSEC)

static struct om_trend t;

static bool near(double a, double b)
{
	return fabs(a - b) <= 1e-6 * (1 + fabs(b));
}

static void line(double first, double per_second, int samples, uint64_t apart_ns, double wobble)
{
	om_trend_forget(&t);
	for (int i = 0; i < samples; i++)
		om_trend_feed(&t, 1000 * OM_NSEC + (uint64_t)i * apart_ns,
		              first + per_second * i * (double)apart_ns / 1e9 +
		                      (i % 2 ? wobble : -wobble));
}

static void fits(void)
{
	struct om_fit f = om_trend_fit(&t, WINDOW);

	CHECK(f.samples == 0 && isnan(f.slope) && isnan(f.r2));
	line(8e9, 1e6, 2, OM_NSEC, 0);
	f = om_trend_fit(&t, WINDOW);
	CHECK(f.samples == 2 && isnan(f.slope));
	line(8e9, 1e6, 3, OM_NSEC, 0); /* small steps of large numbers */
	f = om_trend_fit(&t, WINDOW);
	CHECK(near(f.slope, 1e6) && near(f.r2, 1) && near(f.seconds, 2));
	line(8e9, -3e7, 600, OM_NSEC / 20, 0);
	f = om_trend_fit(&t, WINDOW);
	CHECK(f.samples == 600 && near(f.slope, -3e7) && near(f.r2, 1));
	line(5, 0, 20, OM_NSEC, 0);
	f = om_trend_fit(&t, WINDOW);
	CHECK(near(f.slope, 0) && near(f.r2, 1));
	line(5, 0, 20, 0, 1); /* of one moment */
	CHECK(isnan(om_trend_fit(&t, WINDOW).slope));
	line(0, 1, 20, OM_NSEC, 100);
	CHECK(om_trend_fit(&t, WINDOW).r2 < 0.1);
}

static void the_window(void)
{
	struct om_fit f;

	line(0, 0, 100, OM_NSEC, 0);
	for (int i = 0; i <= 30; i++)
		om_trend_feed(&t, 1101 * OM_NSEC + (uint64_t)i * OM_NSEC, 1e6 * i);
	f = om_trend_fit(&t, WINDOW);
	CHECK_EQ(f.samples, 31);
	CHECK(near(f.slope, 1e6) && near(f.r2, 1)); /* what was before does not count */
	line(7, 2, 3 * OM_TREND_SAMPLES + 5, OM_NSEC / 1000, 0);
	CHECK_EQ(om_trend_fit(&t, WINDOW).samples, OM_TREND_SAMPLES); /* round and round */
	CHECK(near(om_trend_fit(&t, WINDOW).slope, 2));
}

static void turns(void)
{
	CHECK_EQ(om_trend_turns(&t, WINDOW, 0), 0);
	line(0, 0, 21, OM_NSEC, 5); /* to and fro, each second */
	CHECK_EQ(om_trend_turns(&t, WINDOW, 1), 19);
	CHECK_EQ(om_trend_turns(&t, WINDOW, 11), 0); /* too little to matter */
	line(0, 0, 601, OM_NSEC / 20, 5);            /* noise from sample to sample */
	CHECK_EQ(om_trend_turns(&t, WINDOW, 1), 0);
	om_trend_forget(&t);
	for (int i = 0; i < 31; i++) /* up for five seconds, then back */
		om_trend_feed(&t, 1000 * OM_NSEC + (uint64_t)i * OM_NSEC, 10.0 * (i % 5));
	CHECK_EQ(om_trend_turns(&t, WINDOW, 1), 11);
}

int main(void)
{
	fits();
	the_window();
	turns();
	return 0;
}
