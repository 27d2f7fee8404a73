/*
 * om_assess: from samples to levels, a trend, and the time of the next sample. Pure: the clock is the samples' own,
 * nothing is read or done. The caller serialises.
 */
#ifndef OM_ASSESS_H
#define OM_ASSESS_H

#include "core/om_pressure.h"

#define OM_STALLS 32u

struct om_assessor {
	struct om_pressure_state ram, gpus[OM_GPUS];
	uint64_t interval_ns;
	struct om_trend trend;        /* bytes in use at the tightest place */
	char source[256];             /* which place that is */
	uint64_t trend_ns;            /* the trend's last sample */
	uint64_t last_ns, last_bytes; /* the last sample */
	double fill;                  /* the fastest growth seen, bytes a second */
	struct om_stall {
		uint64_t at_ns, some_us, full_us;
	} stalls[OM_STALLS]; /* a ring */
	uint64_t stall_count;
	uint64_t strains[OM_STRAINS];
	enum om_level level;
	uint64_t level_since_ns, transitions[4], number;
	char ram_cause[512]; /* of RAM's own level; "" when it is LOW */
};

int om_assess_init(struct om_assessor *a, const double thresholds[3], uint64_t interval_ns);
/* Fills what follows from ret->sample; `number`, levels and so on up to `interval_ns`. */
void om_assess_step(struct om_assessor *a, struct om_report *ret);

/* "1.5 GiB" */
const char *om_size_text(uint64_t bytes, char ret[24]);

/* The share in use of what is fullest, RAM or a GPU. */
double om_report_fullest(const struct om_report *r);

#endif
