/*
 * om_monitor_int: a monitor from the inside: om_monitor.c (life, its thread, what it tells), om_relief.c (acting).
 *
 * Two locks. `turn` is held by who takes a sample and acts on it, so that stores hear of levels in order; it
 * guards what only such a one uses. `lock` guards what others ask for, and is held across nothing.
 */
#ifndef OM_MONITOR_INT_H
#define OM_MONITOR_INT_H

#include "base/om_sync.h"
#include "core/om_assess.h"
#include "core/om_history.h"
#include "plat/om_sys.h"

#define OM_ACTIONS 256u

struct om_watched { /* one of the two, with a reference */
	struct om_store *store;
	struct om_bank *bank;
	unsigned count; /* how often it is watched */
};

struct om_monitor {
	unsigned fork_generation;
	struct om_monitor_config config; /* `root` is not kept */

	struct om_mutex turn;
	struct om_sampler *sampler;
	struct om_assessor assessor;
	struct om_report next; /* being made */
	struct om_watched *watched;
	size_t watched_count, watched_room;
	bool pressed;          /* who is watched was told that memory is short */
	bool lowered;          /* and is to give up idle blocks earlier than always */
	uint64_t press_ns;     /* when stores were pressed last */
	uint64_t heap_ns;      /* when the C library was asked last */
	uint64_t acted_number; /* the last sample that was acted on, and the bytes in use then */
	uint64_t acted_bytes;
	uint64_t listed_bytes; /* the peak whose blocks were listed */
	bool vain;             /* the last action was that there was none */

	struct om_mutex lock;
	struct om_cond changed;   /* a sample was taken, or it is closed, or its thread ends */
	struct om_cond stirred;   /* for followers: `stirs` rose, or the same */
	struct om_cond wake;      /* the thread is to stop */
	struct om_report *last;   /* of `recent`; its number is 0 before the first sample */
	struct om_report *recent; /* a ring: sample n in slot n modulo its length */
	uint64_t stirs;
	double usage_asked; /* the least that a follower ever waited for */
	struct om_history history;
	struct om_action *actions; /* a ring */
	uint64_t action_count;
	pthread_t thread;
	bool started, stopping, joining, closed;
};

/* With `turn`: act on the sample in `next`. */
void om_relief_act(struct om_monitor *m);
/* With `turn`: who is watched may hear that memory is not short any more: one, or all. */
void om_relief_end(struct om_monitor *m, struct om_watched *one);

#endif
