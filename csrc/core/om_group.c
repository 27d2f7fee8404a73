/* om_group: see om_group.h. Owns the policy and the seats; blocks are borrowed. */
#include "core/om_group.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "core/om_block.h"
#include "core/om_tally.h"

int om_group_create(const char *name, uint64_t capacity, struct om_group **ret)
{
	struct om_group *g = om_alloc(1, sizeof(*g));
	int code = g ? om_policy_create(&om_policy_lru, capacity, &g->policy) : -ENOMEM;

	if (code) {
		om_free(g);
		return code;
	}
	strncpy(g->name, name, sizeof(g->name) - 1);
	om_list_init(&g->link);
	om_list_init(&g->ahead);
	*ret = g;
	return 0;
}

void om_group_destroy(struct om_group *g)
{
	om_policy_destroy(g->policy);
	om_foresight_destroy(g->foresight);
	om_tally_destroy(g->tally);
	om_free(g->seats);
	om_free(g->vacant);
	om_free(g);
}

/* As many seats as the policy has room for. */
static int grow(struct om_group *g)
{
	uint32_t from = g->seat_count, to;
	int code = om_policy_grow(g->policy, OM_MAX(from + 1, 16u));

	to = g->policy->slots;
	if (g->foresight)
		code = code ? code : om_pattern_grow(&g->foresight->pattern, to);
	code = code ? code : om_policy_grow_array(&g->seats, from, to, sizeof(*g->seats));
	code = code ? code : om_policy_grow_array(&g->vacant, from, to, sizeof(*g->vacant));
	if (code)
		return code;
	for (uint32_t slot = to; slot-- > from;)
		g->vacant[g->vacant_count++] = slot;
	g->seat_count = to;
	return 0;
}

int om_group_join(struct om_group *g, struct om_block *b)
{
	int code = g->vacant_count ? 0 : grow(g);

	if (code)
		return code;
	b->slot = g->vacant[--g->vacant_count];
	g->seats[b->slot] = b;
	return 0;
}

void om_group_leave(struct om_group *g, struct om_block *b)
{
	assert(g->seats[b->slot] == b && b->host == OM_COPY_NONE);
	if (g->policy->ops->forget)
		g->policy->ops->forget(g->policy, b->slot);
	if (g->foresight)
		om_pattern_forget(&g->foresight->pattern, b->slot);
	g->seats[b->slot] = NULL;
	g->vacant[g->vacant_count++] = b->slot;
}

int om_group_foresee(struct om_group *g, bool on)
{
	if (on == !!g->foresight)
		return 0;
	if (on)
		return om_foresight_create(g->policy->slots, &g->foresight);
	for (uint32_t slot = 0; slot < g->seat_count; slot++)
		if (g->seats[slot])
			g->seats[slot]->body->guessed = false;
	om_foresight_destroy(g->foresight);
	g->foresight = NULL;
	return 0;
}

int om_group_set_policy(struct om_group *g, const struct om_policy_ops *ops)
{
	struct om_policy *p;
	int code = om_policy_create(ops, g->policy->capacity, &p);

	if (code)
		return code;
	code = om_policy_grow(p, g->policy->slots);
	if (code) {
		om_policy_destroy(p);
		return code;
	}
	for (uint32_t slot = 0; slot < g->seat_count; slot++) {
		const struct om_block *b = g->seats[slot];

		if (!b || b->host == OM_COPY_NONE || b->pinned || b->gone)
			continue;
		ops->access(p, slot, om_block_host_bytes(b), false);
		ops->add(p, slot, om_block_host_bytes(b));
	}
	om_policy_destroy(g->policy);
	g->policy = p;
	return 0;
}

struct choice {
	const struct om_group *group;
	bool (*may)(void *arg, const struct om_block *b);
	void *arg;
};

static bool is_whole(void *arg, uint32_t slot)
{
	const struct choice *c = arg;
	const struct om_block *b = c->group->seats[slot];

	return b->host == OM_COPY_VALID && c->may(c->arg, b);
}

struct om_block *om_group_oldest(struct om_group *g,
                                 bool (*may)(void *arg, const struct om_block *b), void *arg)
{
	struct choice c = { g, may, arg };
	uint32_t slot = g->policy->ops->victim(g->policy, is_whole, &c);

	return slot == OM_NIL ? NULL : g->seats[slot];
}

static bool may_go(void *arg, uint32_t slot)
{
	const struct choice *c = arg;
	const struct om_block *b = c->group->seats[slot];

	return b->host == OM_COPY_VALID && !b->leases && !b->body->holds && c->may(c->arg, b);
}

struct om_block *om_group_victim(struct om_group *g,
                                 bool (*may)(void *arg, const struct om_block *b), void *arg)
{
	struct choice c = { g, may, arg };
	uint32_t slot = g->idle ? g->policy->ops->victim(g->policy, may_go, &c) : OM_NIL;

	return slot == OM_NIL ? NULL : g->seats[slot];
}
