/*
 * om_pressure: a level of memory pressure from a reading, with hysteresis. One pure step, whose rules serve
 * every monitor; the caller feeds readings with their times, and serialises.
 *
 * A level is asked for while one of its conditions holds: the share in use, stalls, the time until nothing is
 * left, limits that were met. Where only shares count, and nothing has to be confirmed or to dwell, a level is
 * entered at once and left `margin` below its threshold. With a dwell:
 *
 * - CRITICAL is entered by the first reading that asks for it; other levels by the second in a row.
 * - A level is left, for the next lower one, once no reading has held it for a dwell. A reading holds it while the
 *   share is no lower than its threshold less the margin, or another condition of it, or of a higher one, holds.
 * - After a level was left, none but CRITICAL is entered until a dwell has passed.
 *
 * So a move down comes a dwell after any other move, and a move up comes a dwell after a move down, unless it is
 * to CRITICAL: in any dwell the level rises (in one step or in several), or falls by one, or rises to CRITICAL
 * after it fell.
 */
#ifndef OM_PRESSURE_H
#define OM_PRESSURE_H

#include "core/om_trend.h"
#include "omnimem.h"

#define OM_PRESSURE_MARGIN 0.05 /* a level is left that far below where it is entered */

struct om_pressure_rules {
	double thresholds[3]; /* of MEDIUM, HIGH, CRITICAL */
	double margin;
	bool confirm;
	uint64_t dwell_ns;
	/* Shares of time that some thread, that all threads waited, from which a level is asked for; 0: off. */
	double some[3], full[3];
	double seconds[3]; /* until nothing is left, below which it is asked for; 0: off */
	/* Limits that were met ask for CRITICAL, from the first threshold on: below it, it was page cache that
	 * met them, and made way. */
	bool events;
};

struct om_reading {
	uint64_t at_ns;
	double usage;        /* share in use */
	double some, full;   /* shares of time stalled; NaN: unknown */
	double seconds_left; /* NaN: unknown */
	bool met;            /* limits were met since the last reading */
};

enum om_cause {
	OM_CAUSE_NONE,
	OM_CAUSE_USE,
	OM_CAUSE_SOME,
	OM_CAUSE_FULL,
	OM_CAUSE_TIME,
	OM_CAUSE_MET
};

struct om_pressure_state {
	struct om_pressure_rules rules;
	enum om_level level;
	enum om_level asked; /* by the last reading */
	enum om_cause cause; /* by which the last reading held the level; NONE: the dwell alone */
	uint64_t held_ns;    /* the last time that a reading held the level */
	uint64_t fell_ns;    /* the last move down */
	bool fallen;         /* there was one */
};

/* OM_EVALUE, and nothing changes, unless 0 < first < second < third <= 1. */
int om_pressure_state_set(struct om_pressure_state *p, const double thresholds[3]);
/* Rules: shares alone, at once; and those of the monitor. */
void om_pressure_plain(struct om_pressure_state *p);
void om_pressure_full(struct om_pressure_state *p);
enum om_level om_pressure_step(struct om_pressure_state *p, const struct om_reading *r);

#endif
