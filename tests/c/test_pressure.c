/* om_pressure: by shares alone levels are entered at once and left 5 points below; by the monitor's rules they
 * are confirmed and dwell: ramps, steps, sawteeth, spikes, a limit lowered, stalls, and random traces, for
 * which the promise in om_pressure.h is checked move by move. A fake clock. */
#include <math.h>
#include <string.h>

#include "core/om_pressure.h"
#include "om_test.h"

#define SECOND OM_NSEC

static const double usual[3] = { 0.7, 0.85, 0.95 };

/* Shares alone, at once. */
static enum om_level feed(struct om_pressure_state *p, uint64_t now_ns, double usage)
{
	struct om_reading x = { now_ns, usage, NAN, NAN, NAN, false };

	return om_pressure_step(p, &x);
}

static struct om_pressure_state plain(void)
{
	struct om_pressure_state p = { 0 };

	om_pressure_plain(&p);
	CHECK_EQ(om_pressure_state_set(&p, usual), 0);
	return p;
}

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
	struct om_pressure_state p = plain();

	for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++)
		CHECK_EQ(feed(&p, i * SECOND, steps[i].usage), steps[i].level);
}

static void thresholds(void)
{
	static const double wrong[][3] = { { 0, 0.5, 0.9 },   { 0.5, 0.5, 0.9 }, { 0.9, 0.8, 0.95 },
		                           { 0.5, 0.8, 1.1 }, { -1, 0.5, 0.9 },  { NAN, 0.5, 0.9 },
		                           { 0.5, NAN, 0.9 }, { 0.5, 0.6, NAN } };
	static const double low[3] = { 0.1, 0.2, 0.3 };
	struct om_pressure_state p = plain();

	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
		CHECK_EQ(om_pressure_state_set(&p, wrong[i]), OM_EVALUE);
		CHECK(strstr(om_err_last()->text, "rise"));
	}
	CHECK_EQ(feed(&p, 0, 0.5), OM_LOW); /* those that were there stayed */
	CHECK_EQ(om_pressure_state_set(&p, low), 0);
	CHECK_EQ(feed(&p, 1, 0.5), OM_CRITICAL); /* with the next share */
}

/* ---- the monitor's rules ---- */

static const double ours[3] = { 0.75, 0.88, 0.95 };

static struct om_pressure_state full(void)
{
	struct om_pressure_state p = { 0 };

	om_pressure_full(&p);
	CHECK_EQ(om_pressure_state_set(&p, ours), 0);
	return p;
}

static struct om_reading quiet(uint64_t now_ns, double usage)
{
	return (struct om_reading){ now_ns, usage, NAN, NAN, NAN, false };
}

/* One sample a second from `*now` on; the level after the last one. */
static enum om_level hold(struct om_pressure_state *p, uint64_t *now, double usage, int seconds)
{
	for (int i = 0; i < seconds; i++, *now += SECOND)
		feed(p, *now, usage);
	return p->level;
}

static void confirmed(void)
{
	struct om_pressure_state p = full();
	uint64_t now = SECOND;

	CHECK_EQ(hold(&p, &now, 0.80, 1), OM_LOW); /* one sample is no pressure */
	CHECK_EQ(hold(&p, &now, 0.10, 1), OM_LOW);
	CHECK_EQ(hold(&p, &now, 0.80, 2), OM_MEDIUM);
	CHECK_EQ(p.cause, OM_CAUSE_USE);
	CHECK_EQ(hold(&p, &now, 0.90, 1), OM_MEDIUM);
	CHECK_EQ(hold(&p, &now, 0.90, 1), OM_HIGH);
	CHECK_EQ(hold(&p, &now, 0.95, 1), OM_CRITICAL); /* at once */
	p = full();
	now = SECOND;
	CHECK_EQ(hold(&p, &now, 0.80, 1), OM_LOW);
	CHECK_EQ(hold(&p, &now, 0.90, 1), OM_MEDIUM); /* two asked for that much */
	CHECK_EQ(hold(&p, &now, 0.90, 1), OM_HIGH);
	p = full();
	now = SECOND;
	CHECK_EQ(hold(&p, &now, 0.97, 1), OM_CRITICAL); /* a step, from nothing */
}

static void dwelt(void)
{
	struct om_pressure_state p = full();
	uint64_t now = SECOND;

	CHECK_EQ(hold(&p, &now, 0.96, 1), OM_CRITICAL);
	CHECK_EQ(hold(&p, &now, 0.905, 30), OM_CRITICAL); /* within the margin */
	CHECK_EQ(hold(&p, &now, 0.50, 9), OM_CRITICAL);
	CHECK_EQ(p.cause, OM_CAUSE_NONE);                /* the dwell alone */
	CHECK_EQ(hold(&p, &now, 0.905, 1), OM_CRITICAL); /* begins again */
	CHECK_EQ(hold(&p, &now, 0.50, 9), OM_CRITICAL);
	CHECK_EQ(hold(&p, &now, 0.50, 1), OM_HIGH);
	CHECK_EQ(hold(&p, &now, 0.50, 9), OM_HIGH);
	CHECK_EQ(hold(&p, &now, 0.50, 1), OM_MEDIUM);
	CHECK_EQ(hold(&p, &now, 0.80, 9), OM_MEDIUM);
	CHECK_EQ(hold(&p, &now, 0.50, 10), OM_LOW);
	CHECK_EQ(hold(&p, &now, 0.90, 9), OM_LOW); /* just fallen: not yet */
	CHECK_EQ(hold(&p, &now, 0.90, 1), OM_HIGH);
	CHECK_EQ(hold(&p, &now, 0.50, 10), OM_MEDIUM);
	CHECK_EQ(hold(&p, &now, 0.99, 1), OM_CRITICAL); /* but that is never late */
	/* Just fallen to MEDIUM, it is asked for HIGH by a condition that MEDIUM has not: it waits there. */
	CHECK_EQ(hold(&p, &now, 0.50, 21), OM_MEDIUM);
	for (int i = 0; i < 12; i++, now += SECOND) {
		struct om_reading x = quiet(now, 0.50);

		x.full = 0.2;
		CHECK(om_pressure_step(&p, &x) >= OM_MEDIUM);
	}
	CHECK_EQ(p.level, OM_HIGH);
}

static void stalled(void)
{
	struct om_pressure_state p = full();
	struct om_reading x = quiet(SECOND, 0.10);
	uint64_t now = SECOND;

	x.some = 0.07;
	om_pressure_step(&p, &x);
	x.at_ns += SECOND;
	CHECK_EQ(om_pressure_step(&p, &x), OM_MEDIUM);
	CHECK_EQ(p.cause, OM_CAUSE_SOME);
	x.at_ns += SECOND;
	x.full = 0.10;
	om_pressure_step(&p, &x);
	x.at_ns += SECOND;
	CHECK_EQ(om_pressure_step(&p, &x), OM_HIGH);
	CHECK_EQ(p.cause, OM_CAUSE_FULL);
	x.at_ns += SECOND;
	x.full = 0.40;
	CHECK_EQ(om_pressure_step(&p, &x), OM_CRITICAL);
	x.full = 0.09; /* stalls have no margin; those of MEDIUM go on */
	x.at_ns += SECOND;
	now = x.at_ns;
	for (int i = 0; i < 40; i++, x.at_ns += SECOND)
		om_pressure_step(&p, &x);
	CHECK_EQ(p.level, OM_MEDIUM);
	x.some = NAN;
	for (int i = 0; i < 11; i++, x.at_ns += SECOND)
		om_pressure_step(&p, &x);
	CHECK_EQ(p.level, OM_LOW);
	CHECK(now < x.at_ns);
}

static void running_out(void)
{
	static const struct {
		double left;
		enum om_level level;
	} steps[] = { { 61, OM_LOW }, { 59, OM_MEDIUM }, { 14, OM_HIGH }, { 2.9, OM_CRITICAL } };
	struct om_pressure_state p = full();
	struct om_reading x = quiet(SECOND, 0.30);

	for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++)
		for (int k = 0; k < 2; k++, x.at_ns += SECOND) {
			x.seconds_left = steps[i].left;
			om_pressure_step(&p, &x);
			CHECK_EQ(p.level, k        ? steps[i].level
			                  : i == 3 ? OM_CRITICAL
			                  : i      ? steps[i - 1].level
			                           : OM_LOW);
		}
	CHECK_EQ(p.cause, OM_CAUSE_TIME);
}

static void limits_met(void)
{
	struct om_pressure_state p = full();
	struct om_reading x = quiet(SECOND, 0.70);

	x.met = true; /* page cache met the limit, and made way */
	CHECK_EQ(om_pressure_step(&p, &x), OM_LOW);
	x.usage = 0.76;
	x.at_ns += SECOND;
	CHECK_EQ(om_pressure_step(&p, &x), OM_CRITICAL);
	CHECK_EQ(p.cause, OM_CAUSE_MET);
	p = plain();
	x.usage = 0.5;
	CHECK_EQ(om_pressure_step(&p, &x), OM_LOW); /* shares alone */
}

/* ---- traces ---- */

struct judge {
	struct om_pressure_state p;
	uint64_t rose_ns, fell_ns; /* the last moves; 0: none */
	unsigned moves;
};

/* Feed a reading and check what om_pressure.h promises about the move that it makes. */
static void judge(struct judge *j, const struct om_reading *x)
{
	enum om_level before = j->p.level, now = om_pressure_step(&j->p, x);
	uint64_t dwell = j->p.rules.dwell_ns;

	if (x->usage >= j->p.rules.thresholds[2])
		CHECK_EQ(now, OM_CRITICAL); /* within one sample */
	if (now < before) {
		CHECK_EQ(now, before - 1);
		CHECK(!j->rose_ns || x->at_ns - j->rose_ns >= dwell);
		CHECK(!j->fell_ns || x->at_ns - j->fell_ns >= dwell);
		j->fell_ns = x->at_ns;
	} else if (now > before) {
		CHECK(now == OM_CRITICAL || !j->fell_ns || x->at_ns - j->fell_ns >= dwell);
		j->rose_ns = x->at_ns;
	}
	j->moves += now != before;
}

static void any_trace(void)
{
	unsigned long long seed = 20240229;
	unsigned moves = 0;

	for (int trace = 0; trace < 300; trace++) {
		struct judge j = { .p = full() };
		uint64_t now = SECOND;
		double usage = 0.5;

		for (int i = 0; i < 2000; i++) {
			struct om_reading x;
			double jump = (double)(om_test_random(&seed) % 2001) / 1000 - 1;

			now += om_test_random(&seed) % (trace % 2 ? 2 * SECOND : SECOND / 5) + 1;
			usage += jump * (trace % 3 ? 0.03 : 0.3);
			usage = usage < 0 ? 0 : usage > 1 ? 1 : usage;
			x = quiet(now, usage);
			if (trace % 5 == 4) {
				x.full = (double)(om_test_random(&seed) % 1000) / 1500;
				x.some = x.full * 1.5;
				x.seconds_left = (double)(om_test_random(&seed) % 200);
				x.met = om_test_random(&seed) % 50 == 0;
			}
			judge(&j, &x);
		}
		moves += j.moves;
	}
	CHECK(moves > 1000);
}

/* `period` samples up, one down, around a threshold; 0.2 s apart for ten minutes. */
static unsigned sawtooth(double low, double high, int period)
{
	struct judge j = { .p = full() };

	for (int i = 0; i < 3000; i++) {
		struct om_reading x = quiet(SECOND + (uint64_t)i * SECOND / 5,
		                            low + (high - low) * (i % period) / (period - 1));
		judge(&j, &x);
	}
	return j.moves;
}

static void shapes(void)
{
	struct judge j = { .p = full() };
	enum om_level seen = OM_LOW;

	/* A ramp of a point a second meets each level in turn. */
	for (int i = 0; i < 80; i++) {
		struct om_reading x = quiet(SECOND + (uint64_t)i * SECOND, 0.2 + i * 0.01);

		judge(&j, &x);
		CHECK(j.p.level >= seen && j.p.level <= seen + 1);
		seen = j.p.level;
	}
	CHECK_EQ(seen, OM_CRITICAL);
	CHECK_EQ(j.moves, 3);
	CHECK_EQ(sawtooth(0.70, 0.80, 10),
	         1);                          /* it is never under pressure for less than a dwell */
	CHECK_EQ(sawtooth(0.87, 0.89, 2), 1); /* never two samples in a row: MEDIUM, and no more */
	CHECK_EQ(sawtooth(0.40, 0.60, 7), 0);
	CHECK_EQ(sawtooth(0.10, 0.97, 50), 3); /* CRITICAL each ten seconds: it stays */
	/* A spike of one sample. */
	j = (struct judge){ .p = full() };
	for (int i = 0; i < 100; i++) {
		struct om_reading x = quiet(SECOND + (uint64_t)i * SECOND, i == 20 ? 0.94 : 0.3);
		judge(&j, &x);
	}
	CHECK_EQ(j.moves, 0);
	/* The same bytes under half the limit. */
	j = (struct judge){ .p = full() };
	for (int i = 0; i < 60; i++) {
		struct om_reading x = quiet(SECOND + (uint64_t)i * SECOND, i < 30 ? 0.48 : 0.96);

		judge(&j, &x);
		CHECK_EQ(j.p.level, i < 30 ? OM_LOW : OM_CRITICAL);
	}
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
	CHECK_EQ(om_pressure_trend(p), 0); /* of one sample */
	for (int i = 1; i <= 8; i++)
		om_pressure_feed(p, 0.86 - 0.1 * i);
	CHECK_EQ(om_pressure_trend(p), -1);
	om_pressure_free(p);
	om_pressure_free(NULL);
}

int main(void)
{
	levels();
	thresholds();
	confirmed();
	dwelt();
	stalled();
	running_out();
	limits_met();
	any_trace();
	shapes();
	the_object();
	return 0;
}
