/*
 * om_ranking: a policy for members whose bytes somebody else keeps: it gives out slots, knows sizes and
 * times of use, and which members to pass by.
 *
 * Owns the policy. A removed slot stays its id's until another id needs it, the one removed first; if
 * the policy learns about ids that are gone, some are kept back for it. Passive: the caller serialises.
 */
#include <errno.h>
#include <math.h>

#include "base/om_base.h"
#include "base/om_error.h"
#include "core/om_policy.h"

#define KEPT_PER_MEMBER 8 /* the reach of ADAPTIVE's scores */
#define KEPT_AT_LEAST   1024
#define MOST_BYTES      (UINT64_C(1) << 63) /* so that no sum of a policy overflows */

struct place {
	uint64_t bytes;
	double used_at;
	bool member, passed;
};

struct om_ranking {
	struct om_policy *policy;
	bool grows;       /* the capacity: nobody told it */
	uint64_t used;    /* bytes of members */
	double newest;    /* time of the latest use */
	uint32_t members; /* of which `passed` are passed by */
	uint32_t passed;
	uint32_t given, room; /* slots given at some time, those that the arrays have room for */
	struct place *places;
	struct om_chain gone; /* removed */
	struct om_link *links;
};

int om_ranking_create(const char *policy, uint64_t capacity, struct om_ranking **ret)
{
	const struct om_policy_ops *ops = om_policy_find(policy);
	struct om_ranking *r;
	int code;

	if (!ops)
		return om_err(OM_EVALUE, "no policy is named '%s'; there are " OM_POLICY_NAMES,
		              policy);
	r = om_alloc(1, sizeof(*r));
	code = r ? om_policy_create(ops, capacity, &r->policy) : -ENOMEM;
	if (code) {
		om_free(r);
		return code;
	}
	r->grows = !capacity;
	r->newest = -INFINITY;
	om_chain_init(&r->gone);
	*ret = r;
	return 0;
}

void om_ranking_free(struct om_ranking *r)
{
	if (!r)
		return;
	om_policy_destroy(r->policy);
	om_free(r->places);
	om_free(r->links);
	om_free(r);
}

static int grow(struct om_ranking *r)
{
	int code = om_policy_grow(r->policy, OM_MAX(r->room + 1, 16u));
	uint32_t to = r->policy->slots;

	code = code ? code : om_policy_grow_array(&r->places, r->room, to, sizeof(*r->places));
	code = code ? code : om_policy_grow_array(&r->links, r->room, to, sizeof(*r->links));
	if (!code)
		r->room = to;
	return code;
}

static void forget(struct om_ranking *r, uint32_t slot)
{
	if (r->policy->ops->forget)
		r->policy->ops->forget(r->policy, slot);
}

/* A slot for an id that has none. */
static int64_t claim(struct om_ranking *r)
{
	uint64_t kept = OM_MAX(KEPT_PER_MEMBER * (uint64_t)r->members, KEPT_AT_LEAST);
	int code;

	if (r->gone.count > (r->policy->ops->forget ? kept : 0)) {
		uint32_t slot = r->gone.oldest;

		om_chain_del(&r->gone, r->links, slot);
		forget(r, slot);
		return slot;
	}
	code = r->given < r->room ? 0 : grow(r);
	return code ? code : (int64_t)r->given++;
}

static void let_pass(struct om_ranking *r, struct place *at, bool pass)
{
	r->passed = r->passed - at->passed + pass;
	at->passed = pass;
}

static void leave(struct om_ranking *r, uint32_t slot)
{
	struct place *at = &r->places[slot];

	r->policy->ops->drop(r->policy, slot, true);
	let_pass(r, at, false);
	at->member = false;
	r->members--;
	r->used -= at->bytes;
}

struct moment {
	const struct om_ranking *r;
	double used_at;
};

static bool later(void *arg, uint32_t slot)
{
	const struct moment *m = arg;

	return m->r->places[slot].used_at > m->used_at;
}

static void join(struct om_ranking *r, uint32_t slot, uint64_t bytes, double used_at)
{
	const struct om_policy_ops *ops = r->policy->ops;
	struct moment m = { r, used_at };

	r->places[slot] = (struct place){ .bytes = bytes, .used_at = used_at, .member = true };
	r->members++;
	r->used += bytes;
	if (r->grows)
		r->policy->capacity = OM_MAX(r->policy->capacity, r->used);
	ops->access(r->policy, slot, bytes, false);
	ops->add(r->policy, slot, bytes);
	if (ops->sink)
		ops->sink(r->policy, slot, later, &m);
	r->newest = OM_MAX(r->newest, used_at);
}

static int check_member(const struct om_ranking *r, int64_t slot)
{
	if (slot < 0 || slot >= r->given || !r->places[slot].member)
		return om_err(OM_ENAME, "slot %lld is no member", (long long)slot);
	return 0;
}

static int check_time(double used_at)
{
	return isfinite(used_at)
	               ? 0
	               : om_err(OM_EVALUE, "a time of use must be finite, not %g", used_at);
}

int64_t om_ranking_add(struct om_ranking *r, int64_t known, uint64_t bytes, double used_at)
{
	const struct place *before = known >= 0 && known < r->given ? &r->places[known] : NULL;
	uint64_t others = r->used - (before && before->member ? before->bytes : 0);
	int64_t slot;

	if (check_time(used_at))
		return OM_EVALUE;
	if (!bytes)
		return om_err(OM_EVALUE, "a block of 0 bytes: giving it up would free nothing");
	if (bytes > MOST_BYTES - others)
		return om_err(OM_EVALUE, "the sizes add up to more than 2^63 bytes");
	if (!before) {
		slot = claim(r);
		if (slot >= 0)
			join(r, (uint32_t)slot, bytes, used_at);
		return slot;
	}
	if (before->member)
		leave(r, (uint32_t)known);
	else
		om_chain_del(&r->gone, r->links, (uint32_t)known);
	if (before->bytes != bytes) /* policies may count on the size of an id that they remember */
		forget(r, (uint32_t)known);
	join(r, (uint32_t)known, bytes, used_at);
	return known;
}

int om_ranking_remove(struct om_ranking *r, int64_t slot)
{
	int code = check_member(r, slot);

	if (code)
		return code;
	leave(r, (uint32_t)slot);
	om_chain_push(&r->gone, r->links, (uint32_t)slot);
	return 0;
}

int om_ranking_access(struct om_ranking *r, int64_t slot, double used_at)
{
	int code = check_member(r, slot);
	struct place *at;

	code = code ? code : check_time(used_at);
	if (code)
		return code;
	at = &r->places[slot];
	at->used_at = r->newest = OM_MAX(r->newest, used_at);
	let_pass(r, at, false);
	r->policy->ops->access(r->policy, (uint32_t)slot, at->bytes, true);
	return 0;
}

int om_ranking_pass(struct om_ranking *r, int64_t slot, bool pass)
{
	int code = check_member(r, slot);

	if (!code)
		let_pass(r, &r->places[slot], pass);
	return code;
}

static bool may_go(void *arg, uint32_t slot)
{
	return !((const struct om_ranking *)arg)->places[slot].passed;
}

int64_t om_ranking_victim(struct om_ranking *r)
{
	uint32_t slot = OM_NIL;

	if (r->passed < r->members)
		slot = r->policy->ops->victim(r->policy, r->passed ? may_go : NULL, r);
	return slot == OM_NIL ? -1 : (int64_t)slot;
}
