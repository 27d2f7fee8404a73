/* om_arena_check: whether an arena's records agree with each other, see om_arena.h. Reads only. */
#include "core/om_arena_int.h"

#include <inttypes.h>

static int broken(const char *what, uint64_t where)
{
	return om_err(OM_ECORRUPT, "arena: %s (%" PRIu64 ")", what, where);
}

/* The tiles, in order. */
static int check_tiles(const struct om_arena *a, uint64_t *ret_holes)
{
	uint64_t at = 0, used = 0, count = 0, holes = 0;
	uint32_t below = NIL;
	bool was_hole = false;

	for (uint32_t i = a->records[NIL].above; i; below = i, i = a->records[i].above) {
		const struct record *r = &a->records[i];

		if (i >= a->fresh || r->below != below || r->at != at || !r->n)
			return broken("records do not tile the space at granule", at);
		if (!r->used && was_hole)
			return broken("two holes touch at granule", at);
		if (r->used && !a->by_handle && *bucket_find(a, at) != i)
			return broken("an allocation is not found by its offset, granule", at);
		was_hole = !r->used;
		at += r->n;
		used += r->used ? r->n : 0;
		count += r->used;
		holes += !r->used;
	}
	if (at != a->size || below != a->records[NIL].below)
		return broken("records end at granule", at);
	if (used != a->used || count != a->count)
		return broken("used granules or allocations are not", used);
	*ret_holes = holes;
	return 0;
}

/* The class lists hold exactly the holes, and the bit maps agree. */
static int check_classes(const struct om_arena *a, uint64_t holes)
{
	uint64_t seen = 0;

	for (unsigned class = 0; class < a->level_count * STEPS; class ++) {
		const struct level *level = &a->levels[class / STEPS];
		uint32_t prev = NIL, i = *class_head(a, class);

		if ((i != NIL) != (level->bitmap >> (class % STEPS) & 1))
			return broken("a class's bit is wrong, class", class);
		if ((level->bitmap != 0) != (a->bitmap >> (class / STEPS) & 1))
			return broken("a level's bit is wrong, class", class);
		for (; i; prev = i, i = a->records[i].next) {
			const struct record *r = &a->records[i];

			if (r->used || !r->n || r->prev != prev || class_of(r->n) != class)
				return broken("a hole is in the wrong list, class", class);
			if (++seen > holes)
				return broken("the lists hold more holes than there are,", holes);
		}
	}
	return seen == holes ? 0 : broken("holes in no list:", holes - seen);
}

int om_arena_check(const struct om_arena *a)
{
	uint64_t holes = 0, chained = 0, unused = 0;
	int code = check_tiles(a, &holes);

	if (!code)
		code = check_classes(a, holes);
	if (code)
		return code;
	for (uint32_t b = 0; b < a->record_count && a->buckets; b++)
		for (uint32_t i = a->buckets[b]; i && chained <= a->count; i = a->records[i].next)
			chained++;
	if (a->buckets && chained != a->count)
		return broken("allocations found by offset:", chained);
	for (uint32_t i = a->unused; i && unused <= a->unused_count; i = a->records[i].next)
		unused++;
	if (unused != a->unused_count || a->fresh != 1 + a->count + holes + unused)
		return broken("records given back:", unused);
	return 0;
}
