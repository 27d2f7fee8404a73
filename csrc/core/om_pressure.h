/*
 * om_pressure: a level of memory pressure from shares in use, with hysteresis, and its trend. A pure
 * step over a sample: the caller feeds samples with their times, and serialises.
 */
#ifndef OM_PRESSURE_H
#define OM_PRESSURE_H

#include "omnimem.h"

#define OM_PRESSURE_SAMPLES 64
#define OM_PRESSURE_MARGIN  0.05 /* a level is left that far below where it is entered */

struct om_pressure_state {
	double thresholds[3]; /* of MEDIUM, HIGH, CRITICAL */
	enum om_level level;
	uint64_t times_ns[OM_PRESSURE_SAMPLES]; /* a ring */
	double usages[OM_PRESSURE_SAMPLES];
	uint64_t fed;
};

/* OM_EVALUE, and nothing changes, unless 0 < first < second < third <= 1. */
int om_pressure_state_set(struct om_pressure_state *p, const double thresholds[3]);
enum om_level om_pressure_state_feed(struct om_pressure_state *p, uint64_t now_ns, double usage);
/* 1 rising, -1 falling, 0 neither: the line through the last minute's samples leaves a point behind. */
int om_pressure_state_trend(const struct om_pressure_state *p);

#endif
