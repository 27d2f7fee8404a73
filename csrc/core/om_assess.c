/* om_assess: see om_assess.h. */
#include "core/om_assess.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "plat/om_sys.h"

#define TREND_NS  (30 * OM_NSEC)
#define LATELY_NS (5 * OM_NSEC) /* use must have grown that long, too, for it to run out */
#define TREND_APART_NS \
	(OM_NSEC / 25) /* samples that somebody takes at once are one for the trend */
#define TREND_LEAST    8u
#define TREND_TRUST    0.5
#define TREND_TURNS    3u
#define TREND_REACH    4       /* a line says nothing about what is so many times its length away */
#define DEAD_SHARE     0.001   /* of all, a second */
#define STALL_NS       OM_NSEC /* shares of time are taken over that, at least */
#define STALL_LEAST_NS (OM_NSEC / 10)
#define FILL_LEAST_NS  (OM_NSEC / 50)
#define FILL_HALF_S    30.0
#define FASTEST_NS     (OM_NSEC / 20)

int om_assess_init(struct om_assessor *a, const double thresholds[3], uint64_t interval_ns)
{
	int code;

	memset(a, 0, sizeof(*a));
	om_pressure_full(&a->ram);
	code = om_pressure_state_set(&a->ram, thresholds);
	for (int i = 0; i < OM_GPUS; i++)
		a->gpus[i].rules = a->ram.rules;
	a->interval_ns = interval_ns;
	for (int i = 0; i < OM_STRAINS; i++)
		a->strains[i] = OM_UNTOLD;
	return code;
}

const char *om_size_text(uint64_t bytes, char ret[24])
{
	if (bytes >= OM_GIB)
		snprintf(ret, 24, "%.1f GiB", (double)bytes / (double)OM_GIB);
	else
		snprintf(ret, 24, "%.1f MiB", (double)bytes / (double)OM_MIB);
	return ret;
}

static double share(uint64_t now, uint64_t then, uint64_t ns)
{
	return fmin((double)(now - then) * 1000 / (double)ns, 1);
}

/* The newest stalls that are a second old, or the oldest there are. */
static void read_stalls(struct om_assessor *a, struct om_report *r)
{
	const struct om_sample *s = &r->sample;
	const struct om_stall *then = NULL;
	uint64_t have = OM_MIN(a->stall_count, OM_STALLS), ns = 0;

	for (uint64_t k = 1; k <= have && ns < STALL_NS; k++) {
		then = &a->stalls[(a->stall_count - k) % OM_STALLS];
		ns = s->at_ns - then->at_ns;
	}
	r->some = r->full = NAN;
	if (then && (s->stall_some_us < then->some_us || s->stall_full_us < then->full_us)) {
		a->stall_count = 0; /* somebody else's: our cgroup is another */
		then = NULL;
	}
	if (then && ns >= STALL_LEAST_NS && s->stall_some_us != OM_UNTOLD)
		r->some = share(s->stall_some_us, then->some_us, ns);
	if (then && ns >= STALL_LEAST_NS && s->stall_full_us != OM_UNTOLD)
		r->full = share(s->stall_full_us, then->full_us, ns);
	if (!a->stall_count || s->at_ns - a->stalls[(a->stall_count - 1) % OM_STALLS].at_ns >=
	                               STALL_NS / (OM_STALLS / 2))
		a->stalls[a->stall_count++ % OM_STALLS] =
			(struct om_stall){ s->at_ns, s->stall_some_us, s->stall_full_us };
}

/* Were limits met since the last sample? Being killed for memory counts, too. */
static bool limits_met(struct om_assessor *a, const struct om_sample *s)
{
	bool met = false;

	for (int i = 0; i < OM_STRAINS; i++) {
		met |= a->strains[i] != OM_UNTOLD && s->strains[i] != OM_UNTOLD &&
		       s->strains[i] > a->strains[i];
		a->strains[i] = s->strains[i];
	}
	return met;
}

/* The tightest place is another: what was seen is not about it. */
static void follow(struct om_assessor *a, const struct om_place *p)
{
	if (!strcmp(a->source, p->source))
		return;
	memcpy(a->source, p->source, sizeof(a->source));
	om_trend_forget(&a->trend);
	a->trend_ns = a->last_ns = 0;
	a->fill = 0;
}

/* Bytes in use for levels and trend. */
static uint64_t used_of(const struct om_report *r, const struct om_place *p)
{
	return p->used_bytes - OM_MIN(p->used_bytes, r->spare_bytes);
}

static void read_trend(struct om_assessor *a, struct om_report *r, const struct om_place *p)
{
	double dead = DEAD_SHARE * (double)p->limit_bytes;
	uint64_t now = r->sample.at_ns;
	double left = NAN;
	struct om_fit fit;

	if (!a->trend_ns || now - a->trend_ns >= TREND_APART_NS) {
		om_trend_feed(&a->trend, now, (double)used_of(r, p));
		a->trend_ns = now;
	}
	fit = om_trend_fit(&a->trend, TREND_NS);
	r->samples = (unsigned)fit.samples;
	r->slope = r->r2 = r->seconds_left = NAN;
	r->course = OM_STABLE;
	if (fit.samples < TREND_LEAST)
		return;
	r->slope = fit.slope;
	r->r2 = fit.r2;
	if (fit.r2 >= TREND_TRUST && fabs(fit.slope) > dead)
		r->course = fit.slope > 0 ? OM_RISING : OM_FALLING;
	else if (om_trend_turns(&a->trend, TREND_NS, dead) >= TREND_TURNS)
		r->course = OM_OSCILLATING;
	if (fit.r2 >= TREND_TRUST && fit.slope > 0 &&
	    !(om_trend_fit(&a->trend, LATELY_NS).slope <= dead))
		left = (double)(p->limit_bytes - used_of(r, p)) / fit.slope;
	r->seconds_left = left <= TREND_REACH * fit.seconds ? left : NAN;
}

static uint64_t next_interval(struct om_assessor *a, uint64_t now, const struct om_place *p)
{
	double seconds = a->last_ns ? (double)(now - a->last_ns) / (double)OM_NSEC : 0, left;

	a->fill *= exp2(-seconds / FILL_HALF_S);
	if (seconds * (double)OM_NSEC >= FILL_LEAST_NS && p->used_bytes > a->last_bytes)
		a->fill = fmax(a->fill, (double)(p->used_bytes - a->last_bytes) / seconds);
	left = a->fill > 0 ? (double)p->available_bytes / a->fill * (double)OM_NSEC : INFINITY;
	if (left >= (double)a->interval_ns)
		return a->interval_ns;
	return OM_MIN(OM_MAX((uint64_t)left, FASTEST_NS), a->interval_ns);
}

/* ---- the cause ---- */

static void tell_ram_cause(struct om_assessor *a, const struct om_report *r,
                           const struct om_place *p)
{
	const struct om_pressure_state *s = &a->ram;
	char size[24], *at = a->ram_cause;
	size_t room = sizeof(a->ram_cause);
	int n;

	*at = '\0';
	if (s->level == OM_LOW)
		return;
	n = snprintf(at, room, "RAM %.1f %% in use of %s (%.160s)", r->usage * 100,
	             om_size_text(p->limit_bytes, size), p->source);
	at += n;
	room -= (size_t)n;
	if (s->cause == OM_CAUSE_TIME)
		snprintf(at, room, ", full in %.1f s at %s/s", r->seconds_left,
		         om_size_text((uint64_t)r->slope, size));
	else if (s->cause == OM_CAUSE_MET)
		snprintf(at, room, ", its limit was met since the last sample");
	else if (s->cause == OM_CAUSE_SOME)
		snprintf(at, room, ", PSI some %.1f %%", r->some * 100);
	else if (s->cause == OM_CAUSE_FULL || r->full >= 0.01)
		snprintf(at, room, ", PSI full %.1f %%", r->full * 100);
	else if (s->cause == OM_CAUSE_NONE)
		snprintf(at, room, ", quiet for %.1f s; left after %.0f s",
		         (double)(r->sample.at_ns - s->held_ns) / 1e9,
		         (double)s->rules.dwell_ns / 1e9);
}

/* Of the GPU, or if that is -1 of RAM. */
static void tell_cause(struct om_assessor *a, struct om_report *r, const struct om_place *p,
                       int gpu)
{
	const struct om_gpu *g = &r->sample.gpus[gpu < 0 ? 0 : gpu];
	char size[24];

	tell_ram_cause(a, r, p);
	if (gpu < 0)
		memcpy(r->cause, a->ram_cause, sizeof(r->cause));
	else
		snprintf(r->cause, sizeof(r->cause), "GPU %u (%s) %.1f %% in use of %s", g->index,
		         g->name, 100 - 100 * (double)g->free_bytes / (double)g->total_bytes,
		         om_size_text(g->total_bytes, size));
}

/* ---- the step ---- */

/* The GPU whose level is the highest, if that is above RAM's; else -1. */
static int read_gpus(struct om_assessor *a, struct om_report *r)
{
	int found = -1;

	for (unsigned i = 0; i < r->sample.gpu_count; i++) {
		const struct om_gpu *g = &r->sample.gpus[i];
		struct om_reading x = { r->sample.at_ns,
			                1 - (double)g->free_bytes / (double)g->total_bytes,
			                NAN,
			                NAN,
			                NAN,
			                false };

		r->gpu_levels[i] = om_pressure_step(&a->gpus[i], &x);
		if (r->gpu_levels[i] > r->level) {
			r->level = r->gpu_levels[i];
			found = (int)i;
		}
	}
	return found;
}

void om_assess_step(struct om_assessor *a, struct om_report *r)
{
	const struct om_sample *s = &r->sample;
	const struct om_place *p = om_sample_tightest(s);
	struct om_reading x = { .at_ns = s->at_ns };
	int gpu;

	x.usage = r->usage = om_place_usage(p) -
	                     (double)(p->used_bytes - used_of(r, p)) / (double)p->limit_bytes;
	r->number = ++a->number;
	r->tightest = (unsigned)(p - s->places);
	follow(a, p);
	read_stalls(a, r);
	read_trend(a, r, p);
	x.some = r->some;
	x.full = r->full;
	x.seconds_left = r->seconds_left;
	x.met = limits_met(a, s);
	r->ram_level = r->level = om_pressure_step(&a->ram, &x);
	gpu = read_gpus(a, r);
	if (r->level != a->level || a->number == 1) {
		a->transitions[r->level] += a->number > 1 || r->level > OM_LOW;
		a->level_since_ns = s->at_ns;
	}
	a->level = r->level;
	r->level_since_ns = a->level_since_ns;
	memcpy(r->transitions, a->transitions, sizeof(r->transitions));
	tell_cause(a, r, p, gpu);
	r->interval_ns = next_interval(a, s->at_ns, p);
	a->last_ns = s->at_ns;
	a->last_bytes = p->used_bytes;
}

double om_report_fullest(const struct om_report *r)
{
	double usage = r->usage;

	for (unsigned i = 0; i < r->sample.gpu_count; i++) {
		const struct om_gpu *g = &r->sample.gpus[i];

		usage = fmax(usage, 1 - (double)g->free_bytes / (double)g->total_bytes);
	}
	return usage;
}
