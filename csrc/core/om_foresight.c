/* om_foresight: see om_foresight.h. */
#include "core/om_foresight.h"

#include <errno.h>

#include "core/om_store_int.h"

#define LOOK_AHEAD (2 * OM_SPECULATION_MOST)
/* Unused bytes at most: two windows of reads, or an eighth of what the group has in memory. */
#define OPEN_LEAST (32 * OM_MIB)
#define OPEN_SHARE 8

int om_foresight_create(uint32_t seats, struct om_foresight **ret)
{
	struct om_foresight *f = om_alloc(1, sizeof(*f));

	if (!f)
		return -ENOMEM;
	if (om_pattern_init(&f->pattern, seats, NULL, 0)) {
		om_free(f);
		return -ENOMEM;
	}
	om_speculation_init(&f->bets);
	*ret = f;
	return 0;
}

void om_foresight_destroy(struct om_foresight *f)
{
	if (!f)
		return;
	om_pattern_fini(&f->pattern);
	om_free(f);
}

void om_foresight_access(struct om_foresight *f, const struct om_block *b)
{
	bool trusted = om_pattern_trusted(&f->pattern);
	bool right = om_pattern_access(&f->pattern, b->slot);

	om_speculation_access(&f->bets, trusted && right);
	f->most_accesses = OM_MAX(f->most_accesses, b->accesses + 1);
}

void om_foresight_end(struct om_foresight *f, struct om_block *b, bool used)
{
	b->body->guessed = false;
	f->open_bytes -= b->body->mem.bytes;
	om_speculation_end(&f->bets, used);
}

/* Is it worth a fetch: its bytes lie below memory, and there is room for them that nobody uses? */
static bool fetchable(struct om_store *s, const struct om_foresight *f, struct om_block *b)
{
	uint64_t bytes;

	if (!b || !b->named || b->host != OM_COPY_NONE || b->blank || om_block_wanted(b) != b)
		return false;
	bytes = om_block_host_bytes(b);
	return f->open_bytes + bytes <= OM_MAX(OPEN_LEAST, b->group->used_bytes / OPEN_SHARE) &&
	       om_room_free_locked(s, b->group, bytes);
}

void om_foresight_fetch_locked(struct om_store *s, struct om_group *g)
{
	struct om_foresight *f = g->foresight;

	if (!f || s->closing || !om_pattern_trusted(&f->pattern))
		return;
	for (size_t ahead = 0; ahead < LOOK_AHEAD && om_speculation_room(&f->bets); ahead++) {
		struct om_block *b;
		uint32_t slot;

		if (!om_pattern_next(&f->pattern, ahead, &slot))
			continue;
		b = g->seats[slot];
		if (!fetchable(s, f, b))
			continue;
		if (om_fetch_start_locked(s, &b, 1, OM_PREFETCH))
			return;
		b->body->guessed = true;
		f->open_bytes += b->body->mem.bytes;
		om_speculation_issue(&f->bets);
	}
}
