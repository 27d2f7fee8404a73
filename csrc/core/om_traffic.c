/*
 * om_traffic: what happened to the blocks of each group: counters, and a ring of the last events, of which
 * the counters are the sums.
 *
 * Owns the ring. Under the store lock.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/om_store_int.h"

struct om_note { /* an event as it is kept; groups live as long as the store */
	uint64_t at_ns, took_ns, bytes;
	const struct om_group *group;
	uint8_t kind;
	char block[31];
};

int om_traffic_init(struct om_store *s)
{
	s->notes = om_alloc(OM_NOTES, sizeof(*s->notes));
	return s->notes ? 0 : -ENOMEM;
}

static void add_up(struct om_traffic *t, enum om_event_kind kind, uint64_t bytes, uint64_t took_ns)
{
	bool out = kind == OM_EVENT_OUT || kind == OM_EVENT_PACKED_OUT;

	t->hits += kind == OM_EVENT_HIT;
	t->misses += kind == OM_EVENT_MISS;
	t->outs += kind == OM_EVENT_OUT;
	t->ins += kind == OM_EVENT_IN;
	*(out ? &t->out_bytes : &t->in_bytes) += bytes;
	*(out ? &t->out_ns : &t->in_ns) += took_ns;
}

static struct om_note *make_note(struct om_store *s, struct om_group *g, const char *name,
                                 enum om_event_kind kind, uint64_t bytes, uint64_t began_ns)
{
	struct om_note *n = &s->notes[s->note_count++ % OM_NOTES];

	n->at_ns = om_now();
	n->took_ns = began_ns ? n->at_ns - began_ns : 0;
	n->bytes = bytes;
	n->group = g;
	n->kind = (uint8_t)kind;
	strncpy(n->block, name, sizeof(n->block) - 1);
	add_up(&g->traffic, kind, bytes, n->took_ns);
	if (n->took_ns && (kind == OM_EVENT_IN || kind == OM_EVENT_PACKED_IN))
		om_latency_add(&s->meter.in, n->took_ns);
	if (n->took_ns && (kind == OM_EVENT_OUT || kind == OM_EVENT_PACKED_OUT))
		om_latency_add(&s->meter.out, n->took_ns);
	return n;
}

void om_traffic_miss_locked(struct om_store *s, struct om_group *g, const char *name)
{
	make_note(s, g, name, OM_EVENT_MISS, 0, 0);
	s->counters.misses++;
}

void om_traffic_note_locked(struct om_store *s, struct om_block *b, enum om_event_kind kind,
                            uint64_t bytes, uint64_t began_ns)
{
	const struct om_note *n;

	if (b->inner && (kind == OM_EVENT_OUT || kind == OM_EVENT_IN))
		kind += OM_EVENT_PACKED_OUT - OM_EVENT_OUT;
	n = make_note(s, b->group, b->name, kind, bytes, began_ns);
	if (kind == OM_EVENT_HIT || kind == OM_EVENT_MISS) {
		b->accessed_ns = n->at_ns;
		b->accesses += b->accesses < UINT32_MAX;
	}
}

int om_store_events(struct om_store *s, uint64_t from, struct om_event *ret, size_t count,
                    size_t *ret_count, uint64_t *ret_first, uint64_t *ret_next)
{
	uint64_t oldest;
	int code = om_store_enter(s);

	if (code)
		return code;
	oldest = s->note_count > OM_NOTES ? s->note_count - OM_NOTES : 0;
	from = OM_MIN(OM_MAX(from, oldest), s->note_count);
	count = (size_t)OM_MIN(count, s->note_count - from);
	for (size_t i = 0; i < count; i++) {
		const struct om_note *n = &s->notes[(from + i) % OM_NOTES];

		ret[i] = (struct om_event){ n->at_ns, n->took_ns,
			                    n->bytes, (enum om_event_kind)n->kind,
			                    "",       "" };
		memcpy(ret[i].group, n->group->name, sizeof(ret[i].group));
		memcpy(ret[i].block, n->block, sizeof(n->block));
	}
	*ret_count = count;
	*ret_first = from;
	*ret_next = from + count;
	return om_store_leave(s, 0);
}

int om_store_group_stats(struct om_store *s, const char *group, struct om_group_stats *ret)
{
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	*ret = (struct om_group_stats){
		.blocks = g->blocks,
		.pinned = g->pinned,
		.leases = g->leases,
		.swapped = g->swapped,
		.host_bytes = g->used_bytes,
		.host_peak_bytes = g->peak_bytes,
		.idle_bytes = g->idle_bytes,
		.spare_bytes = g->spare_bytes,
		.missing_bytes = g->missing_bytes,
		.disk_bytes = g->disk_bytes,
		.limit_bytes = g->limit_bytes,
		.packed_bytes = g->packed_bytes,
		.gone_bytes =
			g->gone_bytes + (g->rows ? g->rows->used_bytes + g->rows->gone_bytes : 0),
		.evictions = g->evictions,
		.traffic = g->traffic,
	};
	if (g->foresight) {
		const struct om_locality *l = &g->foresight->pattern.locality;

		ret->issued = g->foresight->bets.issued_count;
		ret->used = g->foresight->bets.used_count;
		ret->recent = l->accesses;
		ret->reused = l->reused;
		ret->repeated = l->repeated;
		ret->foretold = l->foretold;
	}
	snprintf(ret->trouble, sizeof(ret->trouble), "%s", g->trouble);
	return om_store_leave(s, 0);
}

int om_block_outlook(struct om_store *s, struct om_block *b, struct om_outlook *ret)
{
	const struct om_foresight *f;
	int code = om_store_enter(s);

	if (code)
		return code;
	if (!b->named)
		return om_store_leave(s, om_err(OM_ENAME, "block '%s' was removed", b->name));
	f = b->group->foresight;
	*ret = (struct om_outlook){ .accesses = b->accesses,
		                    .most_accesses = b->accesses,
		                    .distance = UINT64_MAX };
	if (f && b->body) {
		ret->most_accesses = OM_MAX(f->most_accesses, b->accesses);
		ret->age = om_pattern_age(&f->pattern, b->slot);
		ret->distance = om_pattern_distance(&f->pattern, b->slot, OM_PATTERN_WINDOW);
	}
	return om_store_leave(s, 0);
}

/* ---- ranking ---- */

struct rank {
	struct om_block *block;
	uint64_t accesses;
};

static int by_accesses(const void *a, const void *b)
{
	uint64_t x = ((const struct rank *)a)->accesses, y = ((const struct rank *)b)->accesses;

	return x < y ? -1 : x > y;
}

static int by_accesses_down(const void *a, const void *b)
{
	return by_accesses(b, a);
}

/* Insert into the sorted ranks[0..n), which holds at most `count`; equal ones in the order of adding. */
static size_t insert(struct rank *ranks, size_t n, size_t count, struct rank r,
                     int (*compare)(const void *, const void *))
{
	size_t at = n;

	while (at && compare(&r, &ranks[at - 1]) < 0)
		at--;
	if (at == count)
		return n;
	n += n < count;
	memmove(&ranks[at + 1], &ranks[at], (n - at - 1) * sizeof(*ranks));
	ranks[at] = r;
	return n;
}

int om_store_ranked(struct om_store *s, const char *group, bool most, size_t count,
                    struct om_block **ret, uint64_t *ret_accesses, size_t *ret_count)
{
	struct rank *ranks = om_alloc(count + 1, sizeof(*ranks));
	struct om_group *g;
	size_t n = 0;
	int code = ranks ? om_store_enter_group(s, group, &g) : -ENOMEM;

	if (code) {
		om_free(ranks);
		return code;
	}
	OM_LIST_FOREACH(link, &s->blocks) {
		struct om_block *b = om_container_of(link, struct om_block, all);

		if (b->group == g && b->named && !b->inner)
			n = insert(ranks, n, count, (struct rank){ b, b->accesses },
			           most ? by_accesses_down : by_accesses);
	}
	for (size_t i = 0; i < n; i++) {
		om_block_ref(ranks[i].block);
		ret[i] = ranks[i].block;
		ret_accesses[i] = ranks[i].accesses;
	}
	*ret_count = n;
	om_mutex_unlock(&s->lock);
	om_free(ranks);
	return 0;
}
