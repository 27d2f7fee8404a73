/*
 * om_speculation: how many blocks may be fetched on a forecast before it has proven right.
 *
 * Every fetch that nobody asked for is issued, and ends as used (somebody then asked for the block) or
 * wasted (it went unused, or was canceled). `depth` is how many may be open, neither used nor wasted,
 * at once. It begins small. Once as many have ended as the depth is, so that those issued at this
 * depth have been seen, it is judged by what ended lately:
 *
 * - at least three quarters used: one deeper, up to OM_SPECULATION_MOST;
 * - less than one half used: half as deep;
 * - between: as it is.
 *
 * "Lately": both counts are halved whenever they sum up to OM_SPECULATION_HORIZON, so that what was
 * long ago fades. A wasted block at depth 1 may bring it to 0. Then nothing is issued, and what the
 * forecast would have been worth shows without a fetch: after OM_SPECULATION_PROBE accesses since the
 * last issue that a trusted forecast got right, one block may be issued. If it is used the depth is 1
 * again, else it takes as many accesses to the next one. So a forecast that is wrong whenever it is
 * bet on costs a few blocks, and then at most one in OM_SPECULATION_PROBE accesses.
 *
 * A block that lies about unused, because nothing needs its room, must not hold its place for ever: when
 * OM_SPECULATION_PATIENCE accesses pass without an issue or an end, all that are open count as
 * wasted. The end that comes later still counts, once more.
 *
 * This says how many, not whether: that the link is idle and room is free is the caller's to know.
 * Owns nothing. Passive: the caller serialises.
 */
#ifndef OM_SPECULATION_H
#define OM_SPECULATION_H

#include <stdbool.h>
#include <stdint.h>

#define OM_SPECULATION_FIRST    2
#define OM_SPECULATION_MOST     8
#define OM_SPECULATION_HORIZON  16
#define OM_SPECULATION_PROBE    64
#define OM_SPECULATION_PATIENCE 1024

struct om_speculation {
	uint32_t depth;
	uint32_t open;         /* issued, not ended */
	uint32_t used, wasted; /* lately */
	uint32_t ended;        /* since the depth was judged */
	uint32_t right;        /* accesses foretold since the last issue */
	uint32_t quiet;        /* accesses since the last issue or end */
	uint64_t issued_count, used_count, wasted_count; /* in all */
};

void om_speculation_init(struct om_speculation *s);
/* How many may be issued now. */
uint32_t om_speculation_room(const struct om_speculation *s);
void om_speculation_issue(struct om_speculation *s);
/* One of those issued has ended. */
void om_speculation_end(struct om_speculation *s, bool used);
/* An access, of whatever block; `foretold`: by a forecast that was trusted. */
void om_speculation_access(struct om_speculation *s, bool foretold);

#endif
