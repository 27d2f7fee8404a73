/* om_usage: see om_usage.h; and the functions of a store that keep and tell it. */
#include "core/om_usage.h"

#include <errno.h>

#include "core/om_store_int.h"

#define RUN_NS OM_NSEC /* passes that follow each other sooner answer one request */

/* The n-th last begin, from 0. */
static uint64_t begin_back(const struct om_use *u, uint64_t n)
{
	return u->begins_ns[(u->count - 1 - n) % OM_USES];
}

static const struct om_use_run *run_back(const struct om_use *u, uint64_t n)
{
	return &u->runs[(u->run_count - 1 - n) % OM_RUNS];
}

static uint64_t median(uint64_t *numbers, uint64_t n)
{
	for (uint64_t i = 1; i < n; i++) { /* insertion sort */
		uint64_t number = numbers[i], at = i;

		for (; at && numbers[at - 1] > number; at--)
			numbers[at] = numbers[at - 1];
		numbers[at] = number;
	}
	return n ? numbers[n / 2] : 0;
}

static void find_gaps(struct om_use *u)
{
	uint64_t ns[OM_RUNS - 1], turns[OM_RUNS - 1], n = OM_MIN(u->run_count, OM_RUNS) - 1;

	for (uint64_t i = 0; i < n; i++) {
		ns[i] = run_back(u, i)->begin_ns - run_back(u, i + 1)->begin_ns;
		turns[i] = run_back(u, i)->turn - run_back(u, i + 1)->turn;
	}
	u->gap_ns = median(ns, n);
	u->gap_turns = median(turns, n);
}

void om_use_begin(struct om_use *u, uint64_t now_ns, struct om_turns *turns)
{
	bool goes_on = u->count && run_back(u, 0)->turn == turns->count &&
	               (u->busy || now_ns - OM_MIN(u->left_ns, now_ns) < RUN_NS);

	u->begins_ns[u->count++ % OM_USES] = now_ns;
	if (u->count == 1)
		u->first_ns = now_ns;
	u->last_ns = now_ns;
	u->busy++;
	if (goes_on)
		return;
	turns->begins_ns[turns->count++ % OM_TURNS] = now_ns;
	u->runs[u->run_count++ % OM_RUNS] = (struct om_use_run){ now_ns, turns->count };
	find_gaps(u);
}

void om_use_end(struct om_use *u, uint64_t now_ns)
{
	u->busy--;
	u->left_ns = now_ns;
}

uint64_t om_use_recent(const struct om_use *u, uint64_t since_ns)
{
	uint64_t n = 0, most = OM_MIN(u->count, OM_USES);

	while (n < most && begin_back(u, n) >= since_ns)
		n++;
	return n;
}

/* How long a turn takes: the mean of the last ones. */
static uint64_t turn_ns(const struct om_turns *t)
{
	uint64_t n = OM_MIN(t->count, OM_TURNS);

	if (n < 2)
		return 0;
	return (t->begins_ns[(t->count - 1) % OM_TURNS] - t->begins_ns[(t->count - n) % OM_TURNS]) /
	       (n - 1);
}

uint64_t om_use_next(const struct om_use *u, uint64_t now_ns, const struct om_turns *turns)
{
	uint64_t due, begin_ns;

	if (!u->count)
		return 0;
	if (u->busy)
		return now_ns;
	if (!u->gap_turns)
		return om_use_next_since(OM_MAX(u->left_ns, u->last_ns), now_ns);
	due = run_back(u, 0)->turn + u->gap_turns;
	begin_ns = turns->begins_ns[(turns->count - 1) % OM_TURNS];
	if (due <= turns->count)
		return now_ns + (turns->count - due + 1) * turn_ns(turns);
	/* The turn that goes on may take longer than others; those after it still follow each other. */
	begin_ns = OM_MAX(begin_ns + turn_ns(turns), now_ns);
	return begin_ns + (due - turns->count - 1) * turn_ns(turns);
}

int om_store_use_begin(struct om_store *s, const char *group)
{
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	om_use_begin(&g->use, om_now(), &s->turns);
	return om_store_leave(s, 0);
}

int om_store_use_end(struct om_store *s, const char *group)
{
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	if (!g->use.busy)
		return om_store_leave(s,
		                      om_err(OM_EVALUE, "group '%s': no use has begun", g->name));
	om_use_end(&g->use, om_now());
	return om_store_leave(s, 0);
}

int om_store_usage(struct om_store *s, const char *group, uint64_t window_ns, struct om_usage *ret)
{
	uint64_t now_ns = om_now();
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	*ret = (struct om_usage){
		.uses = g->use.count,
		.recent = om_use_recent(&g->use, now_ns - OM_MIN(now_ns, window_ns)),
		.busy = g->use.busy,
		.first_ns = g->use.first_ns,
		.last_ns = g->use.last_ns,
		.next_ns = om_use_next(&g->use, now_ns, &s->turns),
		.gap_ns = g->use.gap_ns,
	};
	return om_store_leave(s, 0);
}
