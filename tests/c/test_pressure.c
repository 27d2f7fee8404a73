/* om_pressure: levels are entered at once and left 5 points below; the trend of the last minute. */
#include <math.h>
#include <string.h>

#include "core/om_pressure.h"
#include "om_test.h"

#define SECOND OM_NSEC

static const double usual[3] = { 0.7, 0.85, 0.95 };

static void levels(void)
{
	static const struct {
		double usage;
		enum om_level level;
	} steps[] = {
		{ 0.10, OM_LOW },      { 0.6999, OM_LOW },    { 0.70, OM_MEDIUM },
		{ 0.66, OM_MEDIUM },   { 0.649, OM_LOW },     { 0.99, OM_CRITICAL },
		{ 0.91, OM_CRITICAL }, { 0.899, OM_HIGH },    { 0.81, OM_HIGH },
		{ 0.79, OM_MEDIUM },   { 0.95, OM_CRITICAL }, { 0.0, OM_LOW },
		{ 1.0, OM_CRITICAL },  { 0.66, OM_MEDIUM },   { 0.5, OM_LOW },
	};
	struct om_pressure_state p = { 0 };

	CHECK_EQ(om_pressure_state_set(&p, usual), 0);
	for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++)
		CHECK_EQ(om_pressure_state_feed(&p, i * SECOND, steps[i].usage), steps[i].level);
}

static void thresholds(void)
{
	static const double wrong[][3] = { { 0, 0.5, 0.9 },   { 0.5, 0.5, 0.9 }, { 0.9, 0.8, 0.95 },
		                           { 0.5, 0.8, 1.1 }, { -1, 0.5, 0.9 },  { NAN, 0.5, 0.9 },
		                           { 0.5, NAN, 0.9 }, { 0.5, 0.6, NAN } };
	static const double low[3] = { 0.1, 0.2, 0.3 };
	struct om_pressure_state p = { 0 };

	CHECK_EQ(om_pressure_state_set(&p, usual), 0);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
		CHECK_EQ(om_pressure_state_set(&p, wrong[i]), OM_EVALUE);
		CHECK(strstr(om_err_last()->text, "rise"));
	}
	CHECK_EQ(om_pressure_state_feed(&p, 0, 0.5), OM_LOW); /* those that were there stayed */
	CHECK_EQ(om_pressure_state_set(&p, low), 0);
	CHECK_EQ(om_pressure_state_feed(&p, 1, 0.5), OM_CRITICAL); /* with the next share */
}

static int trend_of(double first, double per_second, int samples, double wobble)
{
	struct om_pressure_state p = { 0 };

	CHECK_EQ(om_pressure_state_set(&p, usual), 0);
	for (int i = 0; i < samples; i++)
		om_pressure_state_feed(&p, (uint64_t)i * SECOND,
		                       first + i * per_second + (i % 2 ? wobble : -wobble));
	return om_pressure_state_trend(&p);
}

static void trends(void)
{
	struct om_pressure_state p = { 0 };

	CHECK_EQ(om_pressure_state_trend(&p), 0);
	CHECK_EQ(trend_of(0.5, 0.01, 2, 0), 0); /* too few */
	CHECK_EQ(trend_of(0.5, 0.01, 3, 0), 1);
	CHECK_EQ(trend_of(0.5, -0.01, 30, 0), -1);
	CHECK_EQ(trend_of(0.5, 0, 30, 0), 0);
	CHECK_EQ(trend_of(0.5, 0.0001, 30, 0), 0); /* less than a point */
	CHECK_EQ(trend_of(0.5, 0, 60, 0.02), 0);   /* to and fro */
	CHECK_EQ(trend_of(0.3, 0.002, 300, 0.02), 1);
	/* What was long ago does not count, nor do samples of one moment. */
	CHECK_EQ(om_pressure_state_set(&p, usual), 0);
	for (int i = 0; i < 10; i++)
		om_pressure_state_feed(&p, (uint64_t)i * SECOND, 0.1 * i);
	CHECK_EQ(om_pressure_state_trend(&p), 1);
	for (int i = 0; i < 5; i++)
		om_pressure_state_feed(&p, 100 * SECOND, 0.1 * i);
	CHECK_EQ(om_pressure_state_trend(&p), 0);
}

static void the_object(void)
{
	double got[3];
	struct om_pressure *p;

	for (uint64_t nth = 1; nth <= 1; nth++) {
		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		CHECK(om_pressure_create(usual, &p) < 0);
	}
	om_fault_reset();
	CHECK_EQ(om_pressure_create((double[3]){ 1, 2, 3 }, &p), OM_EVALUE);
	CHECK_EQ(om_pressure_create(usual, &p), 0);
	CHECK_EQ(om_pressure_set(p, (double[3]){ 0.5, 0.4, 0.9 }), OM_EVALUE);
	om_pressure_get(p, got);
	CHECK(!memcmp(got, usual, sizeof(got)));
	CHECK_EQ(om_pressure_feed(p, 0.86), OM_HIGH);
	CHECK_EQ(om_pressure_trend(p), 0);
	om_pressure_free(p);
	om_pressure_free(NULL);
}

int main(void)
{
	levels();
	thresholds();
	trends();
	the_object();
	return 0;
}
