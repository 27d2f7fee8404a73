/* om_assess and om_history on a fake clock: trends and the time that is left, stalls, when to look next, GPUs, causes in
 * words; limits lowered; and recorded traces (tests/data), for which levels must keep the promise of
 * om_pressure.h. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/om_assess.h"
#include "core/om_history.h"
#include "om_test.h"

#define SECOND OM_NSEC
#define TOTAL  (UINT64_C(8) * OM_GIB)

static const double ours[3] = { 0.75, 0.88, 0.95 };
static struct om_assessor a;
static struct om_report r;

static void begin(void)
{
	memset(&r, 0, sizeof(r));
	CHECK_EQ(om_assess_init(&a, ours, SECOND), 0);
}

/* A sample of one place, with nothing else known. */
static void sample(uint64_t at_ns, uint64_t total, uint64_t used, const char *source)
{
	struct om_sample *s = &r.sample;

	memset(s, 0, sizeof(*s));
	s->at_ns = at_ns;
	s->place_count = 1;
	s->places[0] = (struct om_place){ total, 0, used, total - OM_MIN(used, total), "" };
	snprintf(s->places[0].source, sizeof(s->places[0].source), "%s", source);
	s->stall_some_us = s->stall_full_us = s->rss_bytes = OM_UNTOLD;
	for (int i = 0; i < OM_STRAINS; i++)
		s->strains[i] = OM_UNTOLD;
}

static enum om_level feed(uint64_t at_ns, uint64_t total, uint64_t used)
{
	sample(at_ns, total, used, "system");
	om_assess_step(&a, &r);
	return r.level;
}

static bool near(double x, double y)
{
	return fabs(x - y) <= 0.01 * fabs(y);
}

static void running_out(void)
{
	begin();
	for (int i = 0; i < 7; i++) {
		feed((100 + i) * SECOND, TOTAL, OM_GIB + (uint64_t)i * 100 * OM_MIB);
		CHECK(isnan(r.slope) && isnan(r.seconds_left)); /* too few */
		CHECK_EQ(r.course, OM_STABLE);
	}
	feed(107 * SECOND, TOTAL, OM_GIB + 700 * OM_MIB);
	CHECK_EQ(r.samples, 8);
	CHECK(near(r.slope, 100 * OM_MIB) && near(r.r2, 1));
	CHECK(isnan(r.seconds_left)); /* 65 s from a line of 7 s: nobody knows */
	CHECK_EQ(r.course, OM_RISING);
	for (int i = 8; i < 16; i++)
		feed((100 + i) * SECOND, TOTAL, OM_GIB + (uint64_t)i * 100 * OM_MIB);
	CHECK(near(r.seconds_left, (7168 - 1500) / 100.0));
	for (int i = 16; i < 70; i++)
		feed((100 + i) * SECOND, TOTAL, OM_GIB + (uint64_t)i * 100 * OM_MIB);
	CHECK_EQ(r.level, OM_CRITICAL); /* 2.7 s */
	CHECK(r.cause[0] && r.transitions[1] == 1 && r.transitions[3] == 1);
	for (int i = 0; i < 40; i++)
		feed((170 + i) * SECOND, TOTAL, (7 - (uint64_t)OM_MIN(i, 6)) * OM_GIB);
	CHECK(isnan(r.seconds_left)); /* falling, then steady: never "in no time" */
}

/* A model was loaded: for half a minute the line rises, but nothing runs out. */
static void a_step(void)
{
	begin();
	for (int i = 0; i < 40; i++) {
		feed((100 + i) * SECOND, TOTAL, i < 20 ? OM_GIB : 5 * OM_GIB);
		if (i >= 25)
			CHECK(r.slope > 0 && isnan(r.seconds_left));
	}
	CHECK_EQ(r.level, OM_LOW);
	CHECK_EQ(r.transitions[1] + r.transitions[2] + r.transitions[3], 0);
}

static void courses(void)
{
	begin();
	for (int i = 0; i < 40; i++)
		feed((100 + i) * SECOND, TOTAL, (2 + (uint64_t)(i % 4 < 2)) * OM_GIB);
	CHECK_EQ(r.course, OM_OSCILLATING);
	for (int i = 0; i < 40; i++)
		feed((140 + i) * SECOND, TOTAL, 4 * OM_GIB - (uint64_t)i * 50 * OM_MIB);
	CHECK_EQ(r.course, OM_FALLING);
	for (int i = 0; i < 40; i++)
		feed((180 + i) * SECOND, TOTAL,
		     OM_GIB + (uint64_t)i * OM_MIB); /* a sixth of the band */
	CHECK_EQ(r.course, OM_STABLE);
	/* Somebody asks a thousand times at once, while something is allocated: that is one sample. */
	begin();
	for (int i = 0; i < 1000; i++)
		feed(100 * SECOND + (uint64_t)i * 1000, TOTAL, OM_GIB + (uint64_t)i * OM_MIB);
	CHECK_EQ(r.samples, 1);
	CHECK_EQ(r.level, OM_LOW);
	CHECK_EQ(r.number, 1000);
}

/* The tightest place is another one: what was seen is not about it. */
static void another_place(void)
{
	begin();
	for (int i = 0; i < 20; i++)
		feed((100 + i) * SECOND, TOTAL, OM_GIB + (uint64_t)i * 100 * OM_MIB);
	CHECK_EQ(r.samples, 20);
	sample(120 * SECOND, OM_GIB, OM_GIB / 2, "cgroup /x");
	om_assess_step(&a, &r);
	CHECK_EQ(r.samples, 1);
	CHECK(isnan(r.seconds_left));
	CHECK_EQ(r.interval_ns, SECOND);
	/* Its limit is lowered: the same bytes. */
	for (int i = 0; i < 20; i++) {
		sample((121 + i) * SECOND, OM_GIB, OM_GIB / 2, "cgroup /x");
		om_assess_step(&a, &r);
	}
	CHECK_EQ(r.level, OM_LOW);
	sample(141 * SECOND, OM_GIB / 2 + OM_MIB, OM_GIB / 2, "cgroup /x");
	om_assess_step(&a, &r);
	CHECK_EQ(r.level, OM_CRITICAL);
	CHECK_EQ(r.level_since_ns, 141 * SECOND);
	CHECK(!strcmp(r.cause, "RAM 99.8 % in use of 513.0 MiB (cgroup /x)"));
}

static void stall(uint64_t at_ms, uint64_t some_us, uint64_t full_us)
{
	sample(at_ms * 1000000, TOTAL, OM_GIB, "system");
	r.sample.stall_some_us = some_us;
	r.sample.stall_full_us = full_us;
	om_assess_step(&a, &r);
}

static void stalls(void)
{
	begin();
	stall(100000, 5000000, 4000000);
	CHECK(isnan(r.some) && isnan(r.full)); /* nothing to compare with: not 0 */
	stall(100050, 5040000, 4040000);
	CHECK(isnan(r.full)); /* too short to tell */
	stall(101000, 5500000, 4100000);
	CHECK(near(r.some, 0.5) && near(r.full, 0.1));
	stall(101050, 5525000, 4105000); /* 50 ms later: over a second all the same */
	CHECK(near(r.some, 0.5) && near(r.full, 0.1));
	stall(103050, 5525000, 4105000);
	CHECK(near(r.some, 0.0122) && near(r.full, 0.00244));
	stall(104050, 9000000, 4905000);
	CHECK(r.some == 1 && near(r.full, 0.8)); /* a clock that ran ahead */
	CHECK_EQ(r.level, OM_CRITICAL);
	CHECK(strstr(r.cause, "PSI full 80.0 %"));
	stall(105050, 10, 10); /* another cgroup's */
	CHECK(isnan(r.some) && isnan(r.full));
	sample(10605 * (SECOND / 100), TOTAL, OM_GIB, "system");
	om_assess_step(&a, &r);
	CHECK(isnan(r.some));
	CHECK_EQ(r.level, OM_CRITICAL);
	CHECK(strstr(r.cause, "quiet for 2.0 s; left after 10 s"));
}

static void limits_met(void)
{
	static const uint64_t met[] = { 5, 5, 6, 6 };

	begin();
	for (int i = 0; i < 4; i++) {
		sample((100 + i) * SECOND, TOTAL, 8 * TOTAL / 10, "system");
		r.sample.strains[OM_STRAIN_MAX] = met[i];
		om_assess_step(&a, &r);
		CHECK_EQ(r.level, i < 1 ? OM_LOW : i < 2 ? OM_MEDIUM : OM_CRITICAL);
		if (i == 2)
			CHECK(strstr(r.cause, "its limit was met"));
	}
}

/* What is left, by the fastest growth seen, which is forgotten. */
static void when_to_look(void)
{
	begin();
	feed(100 * SECOND, TOTAL, OM_GIB);
	CHECK_EQ(r.interval_ns, SECOND);
	feed(101 * SECOND, TOTAL, 5 * OM_GIB); /* 4 GiB/s, 3 GiB left */
	CHECK_EQ(r.interval_ns / 1000000, 750);
	feed(101 * SECOND + 1000, TOTAL,
	     5 * OM_GIB + OM_MIB); /* within a microsecond: says nothing */
	CHECK_EQ(r.interval_ns / 10000000, 74);
	feed(102 * SECOND, TOTAL, TOTAL - 10 * OM_MIB);
	CHECK_EQ(r.interval_ns, SECOND / 20);
	for (int i = 0; i < 600; i++)
		feed((103 + i) * SECOND, TOTAL, TOTAL - 10 * OM_MIB);
	CHECK_EQ(r.interval_ns, SECOND);
	feed(703 * SECOND, TOTAL, TOTAL); /* nothing left at all */
	CHECK_EQ(r.interval_ns, SECOND / 20);
}

static void gpu(uint64_t at_ns, uint64_t free_mib)
{
	sample(at_ns, TOTAL, OM_GIB, "system");
	r.sample.gpu_count = 2;
	r.sample.gpus[0] = (struct om_gpu){ 0, "GPU-a", "Small", OM_GIB, OM_GIB };
	r.sample.gpus[1] = (struct om_gpu){ 3, "GPU-b", "Large", 80 * OM_GIB, free_mib * OM_MIB };
	om_assess_step(&a, &r);
}

static void gpus(void)
{
	begin();
	gpu(100 * SECOND, 40000);
	CHECK_EQ(r.level, OM_LOW);
	gpu(101 * SECOND, 1024);
	CHECK_EQ(r.level, OM_CRITICAL);
	CHECK_EQ(r.ram_level, OM_LOW);
	CHECK_EQ(r.gpu_levels[0], OM_LOW);
	CHECK_EQ(r.gpu_levels[1], OM_CRITICAL);
	CHECK(!strcmp(r.cause, "GPU 3 (Large) 98.8 % in use of 80.0 GiB"));
	CHECK_EQ(r.transitions[OM_CRITICAL], 1);
}

/* ---- recorded ---- */

/* Plays tests/data/NAME.trace; the highest level. */
static enum om_level play(const char *name)
{
	const char *slash = strrchr(__FILE__, '/');
	uint64_t moved_ns = 0, fell_ns = 0;
	enum om_level before = OM_LOW, most = OM_LOW;
	double at, some, full;
	unsigned long long limit, used, met;
	char path[1024], line[256];
	unsigned samples = 0;
	FILE *f;

	snprintf(path, sizeof(path), "%.*s/../data/%s.trace", (int)(slash - __FILE__), __FILE__,
	         name);
	f = fopen(path, "r");
	CHECK(f != NULL);
	begin();
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lf %llu %llu %lf %lf %llu", &at, &limit, &used, &some, &full,
		           &met) != 6)
			continue;
		sample(SECOND + (uint64_t)(at * 1e9), limit, used, "cgroup /recorded");
		r.sample.strains[OM_STRAIN_MAX] = met;
		om_assess_step(&a, &r);
		samples++;
		if ((double)used >= 0.95 * (double)limit)
			CHECK_EQ(r.level, OM_CRITICAL);
		if (r.level < before) {
			CHECK(r.sample.at_ns - moved_ns >= 10 * SECOND && r.level == before - 1);
			fell_ns = r.sample.at_ns;
		} else if (r.level > before && r.level < OM_CRITICAL) {
			CHECK(!fell_ns || r.sample.at_ns - fell_ns >= 10 * SECOND);
		}
		moved_ns = r.level != before ? r.sample.at_ns : moved_ns;
		before = r.level;
		most = OM_MAX(most, before);
	}
	fclose(f);
	CHECK(samples > 100);
	return most;
}

static void recorded(void)
{
	CHECK_EQ(play("grow"), OM_CRITICAL);
	CHECK_EQ(play("saw"), OM_CRITICAL); /* of the first tooth nobody knows where it ends */
	CHECK(r.level == OM_MEDIUM && a.transitions[OM_CRITICAL] == 1);
	CHECK_EQ(play("read"),
	         OM_LOW); /* page cache meets the limit, and is none of our business */
}

/* ---- history ---- */

static void history(void)
{
	struct om_history h;
	struct om_span *spans;
	size_t count;

	for (uint64_t nth = 1; nth <= 3; nth++) {
		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		CHECK_EQ(om_history_init(&h), -ENOMEM);
	}
	om_fault_reset();
	CHECK_EQ(om_history_init(&h), 0);
	CHECK_EQ(om_history_tell(&h, 1, &spans, &count), 0);
	CHECK_EQ(count, 0);
	om_free(spans);
	CHECK_EQ(om_history_tell(&h, 2, &spans, &count), OM_EVALUE);
	om_fault_arm(OM_FAULT_ALLOC, 1, false);
	CHECK_EQ(om_history_tell(&h, 1, &spans, &count), -ENOMEM);
	om_fault_reset();
	for (uint64_t i = 0; i < 100000; i++) /* half a second apart: from 1000 s to 51000 s */
		om_history_feed(&h, 1000 * SECOND + i * SECOND / 2, i);
	CHECK_EQ(om_history_tell(&h, 1, &spans, &count), 0);
	CHECK_EQ(count, 600);
	CHECK_EQ(spans[599].start_ns, 50999 * SECOND);
	CHECK_EQ(spans[0].start_ns, 50400 * SECOND);
	CHECK(spans[599].min_bytes == 99998 && spans[599].max_bytes == 99999);
	CHECK(spans[599].last_bytes == 99999 && spans[599].mean_bytes == 99998.5);
	om_free(spans);
	CHECK_EQ(om_history_tell(&h, 10, &spans, &count), 0);
	CHECK_EQ(count, 720);
	CHECK(spans[719].min_bytes == 99980 && spans[719].max_bytes == 99999);
	om_free(spans);
	CHECK_EQ(om_history_tell(&h, 60, &spans, &count), 0);
	CHECK_EQ(count, 834); /* since 960 s */
	CHECK_EQ(spans[0].start_ns, 960 * SECOND);
	CHECK_EQ(spans[0].max_bytes, 39);
	om_free(spans);
	om_history_feed(&h, 51600 * SECOND, 7); /* a pause: what is older than the ring is gone */
	CHECK_EQ(om_history_tell(&h, 1, &spans, &count), 0);
	CHECK_EQ(count, 1);
	CHECK_EQ(spans[0].max_bytes, 7);
	om_free(spans);
	om_history_fini(&h);
}

int main(void)
{
	CHECK_EQ(om_assess_init(&a, (double[3]){ 0.5, 0.4, 0.9 }, SECOND), OM_EVALUE);
	running_out();
	a_step();
	courses();
	another_place();
	stalls();
	limits_met();
	when_to_look();
	gpus();
	history();
	recorded();
	return 0;
}
