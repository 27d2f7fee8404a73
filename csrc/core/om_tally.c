/* om_tally: see om_tally.h. An open table with linear probing, at most half full. */
#include "core/om_tally.h"

#include <errno.h>

#include "base/om_base.h"

#define FIRST_SIZE 64u

struct entry {
	uint64_t hash;
	uint32_t count; /* 0: vacant */
};

struct om_tally {
	struct entry *entries;
	uint32_t size, used; /* size: a power of two */
};

int om_tally_create(struct om_tally **ret)
{
	struct om_tally *t = om_alloc(1, sizeof(*t));

	if (!t)
		return -ENOMEM;
	t->entries = om_alloc(FIRST_SIZE, sizeof(*t->entries));
	if (!t->entries) {
		om_free(t);
		return -ENOMEM;
	}
	t->size = FIRST_SIZE;
	*ret = t;
	return 0;
}

void om_tally_destroy(struct om_tally *t)
{
	if (!t)
		return;
	om_free(t->entries);
	om_free(t);
}

/* The place of a hash, or the vacant one where it would be. */
static struct entry *find(struct entry *entries, uint32_t size, uint64_t hash)
{
	uint32_t at = (uint32_t)hash & (size - 1);

	while (entries[at].count && entries[at].hash != hash)
		at = (at + 1) & (size - 1);
	return &entries[at];
}

/* Into a table of `size`, each count divided by `by`. */
static int rebuild(struct om_tally *t, uint32_t size, uint32_t by)
{
	struct entry *to = om_alloc(size, sizeof(*to));

	if (!to)
		return -ENOMEM;
	t->used = 0;
	for (uint32_t i = 0; i < t->size; i++) {
		struct entry e = t->entries[i];

		if (!(e.count /= by))
			continue;
		*find(to, size, e.hash) = e;
		t->used++;
	}
	om_free(t->entries);
	t->entries = to;
	t->size = size;
	return 0;
}

int64_t om_tally_add(struct om_tally *t, uint64_t hash)
{
	struct entry *e = find(t->entries, t->size, hash);

	if (!e->count && t->used >= t->size / 2) {
		int code = t->used < OM_TALLY_MOST ? rebuild(t, t->size * 2, 1) : 0;

		while (!code && t->used >= OM_TALLY_MOST)
			code = rebuild(t, t->size, 2);
		if (code)
			return code;
		e = find(t->entries, t->size, hash);
	}
	t->used += !e->count;
	e->hash = hash;
	e->count += e->count < UINT32_MAX;
	return e->count;
}

void om_tally_forget(struct om_tally *t, uint64_t hash)
{
	struct entry *hole = find(t->entries, t->size, hash);
	uint32_t at = (uint32_t)(hole - t->entries), next = at;

	if (!hole->count)
		return;
	t->used--;
	for (;;) { /* what was pushed past the hole moves back into it */
		uint32_t home;

		next = (next + 1) & (t->size - 1);
		if (!t->entries[next].count)
			break;
		home = (uint32_t)t->entries[next].hash & (t->size - 1);
		if (((next - home) & (t->size - 1)) < ((next - at) & (t->size - 1)))
			continue;
		t->entries[at] = t->entries[next];
		at = next;
	}
	t->entries[at].count = 0;
}
