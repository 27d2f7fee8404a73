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

static uint64_t run_back(const struct om_use *u, uint64_t n)
{
	return u->runs_ns[(u->run_count - 1 - n) % OM_RUNS];
}

static uint64_t typical_gap(const struct om_use *u)
{
	uint64_t gaps[OM_RUNS - 1], n = OM_MIN(u->run_count, OM_RUNS) - 1;

	for (uint64_t i = 0; i < n; i++) { /* insertion sort */
		uint64_t gap = run_back(u, i) - run_back(u, i + 1), at = i;

		for (; at && gaps[at - 1] > gap; at--)
			gaps[at] = gaps[at - 1];
		gaps[at] = gap;
	}
	return n ? gaps[n / 2] : 0;
}

void om_use_begin(struct om_use *u, uint64_t now_ns, uint64_t *turn)
{
	bool goes_on = u->count && u->turn == *turn &&
	               (u->busy || now_ns - OM_MIN(u->left_ns, now_ns) < RUN_NS);

	u->begins_ns[u->count++ % OM_USES] = now_ns;
	if (u->count == 1)
		u->first_ns = now_ns;
	u->last_ns = now_ns;
	u->busy++;
	if (goes_on)
		return;
	u->turn = ++*turn;
	u->runs_ns[u->run_count++ % OM_RUNS] = now_ns;
	u->gap_ns = typical_gap(u);
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

uint64_t om_use_next(const struct om_use *u, uint64_t now_ns)
{
	uint64_t expected, left = OM_MAX(u->left_ns, u->last_ns);

	if (!u->count)
		return 0;
	if (u->busy)
		return now_ns;
	expected = run_back(u, 0) + u->gap_ns;
	if (!u->gap_ns || expected <= left)
		return om_use_next_since(left, now_ns);
	return expected > now_ns ? expected : om_use_next_since(expected, now_ns);
}

int om_store_use_begin(struct om_store *s, const char *group)
{
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	om_use_begin(&g->use, om_now(), &s->turn);
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
		.next_ns = om_use_next(&g->use, now_ns),
		.gap_ns = g->use.gap_ns,
	};
	return om_store_leave(s, 0);
}
