/*
 * om_meter: what a store counts for those who watch it, beside om_stats: why copies left, what failed, how
 * long things took, how high its tiers came between two marks. Under the store lock.
 *
 * A tier's peak is kept where its bytes are counted, as one number, as if nobody asked; a mark that begins
 * or ends takes what that number has become to all that are open, and has it begin anew.
 */
#ifndef OM_METER_H
#define OM_METER_H

#include "base/om_list.h"
#include "core/om_group.h"
#include "core/om_latency.h"
#include "omnimem.h"

struct om_block;

struct om_meter {
	struct om_totals counts; /* those that are counted as they happen; no histograms */
	struct om_packed_count packed;
	struct om_peaks past; /* before the last mark began or ended */
	struct om_list marks;
	struct om_latency in, out;    /* copies that came, that were written out */
	struct om_latency idle, life; /* not used before it left; from adding to removing */
	bool retired;                 /* counted among those of stores that are closed */
};

void om_meter_init(struct om_store *s);
/* Bytes of HOST were taken. */
void om_meter_peak_locked(struct om_store *s);
/* The most that a tier ever held. */
struct om_peaks om_meter_peaks_locked(const struct om_store *s);
/* A copy leaves HOST for the reason that this thread has; how long it was idle. */
void om_meter_gone_locked(struct om_store *s, const struct om_block *b, enum om_reason reason);
/* A name goes. */
void om_meter_life_locked(struct om_store *s, const struct om_block *b);
/* A request failed for good. */
void om_meter_failed_locked(struct om_store *s, bool write, int code);
/* The store is closing: its marks keep what they saw, its counters live on in om_totals_closed. */
void om_meter_retire_locked(struct om_store *s);

/* Why this thread makes copies leave. om_reason_enter keeps a reason that was given before; both return what
 * is to be restored. */
enum om_reason om_reason_now(void);
enum om_reason om_reason_enter(enum om_reason reason);
void om_reason_leave(enum om_reason former);

#endif
