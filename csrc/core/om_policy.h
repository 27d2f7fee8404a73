/*
 * om_policy: who goes next. One table of functions, one policy a file (policy_*.c).
 *
 * A policy orders the members of a cache, known by slot: a small number that its owner gives to each
 * id. It moves nothing and locks nothing. The owner says what is asked for, what came in and what
 * went, asks for a victim, and does the rest; the same code serves stores and om_simulate. Nothing is
 * allocated but in om_policy_create and om_policy_grow. Passive: the caller serialises.
 */
#ifndef OM_POLICY_H
#define OM_POLICY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "omnimem.h"

#define OM_NIL UINT32_MAX

struct om_policy;

/* May this slot go now? NULL stands for "any". */
typedef bool om_may(void *arg, uint32_t slot);
/* Was this slot used later than the one in question? */
typedef bool om_later(void *arg, uint32_t slot);

struct om_policy_ops {
	const char *name;
	size_t bytes; /* of the policy's own record, which begins with struct om_policy */
	int (*init)(struct om_policy *p);                 /* may be NULL */
	void (*fini)(struct om_policy *p);                /* frees what grow and init made */
	int (*grow)(struct om_policy *p, uint32_t slots); /* room for slots below `slots` */
	/* The slot is asked for; `hit`: it is a member. Before anything makes room for it. */
	void (*access)(struct om_policy *p, uint32_t slot, uint64_t bytes, bool hit);
	void (*add)(struct om_policy *p, uint32_t slot, uint64_t bytes); /* is a member now */
	/* The slot, just added, was last used before those that are `later`: it takes its place
	 * behind them. NULL: what counts is the order of the calls. */
	void (*sink)(struct om_policy *p, uint32_t slot, om_later *later, void *arg);
	/* A member to give up, or OM_NIL when none may go. It stays one until `drop`. */
	uint32_t (*victim)(struct om_policy *p, om_may *may, void *arg);
	/* Is no member any more; `evicted`: made way for others, so that it may be remembered. */
	void (*drop)(struct om_policy *p, uint32_t slot, bool evicted);
	/* The slot will stand for another id: nothing of it is remembered. May be NULL. */
	void (*forget)(struct om_policy *p, uint32_t slot);
};

struct om_policy {
	const struct om_policy_ops *ops;
	uint64_t capacity; /* bytes; may change at any time */
	uint32_t slots;    /* room for slots below this */
};

extern const struct om_policy_ops om_policy_lru, om_policy_clock, om_policy_sieve, om_policy_s3fifo,
	om_policy_nextuse, om_policy_lrfu, om_policy_adaptive;

#define OM_POLICY_NAMES "lru, clock, s3fifo, sieve and adaptive"
/* By name; NULL: no such policy. */
const struct om_policy_ops *om_policy_find(const char *name);
int om_policy_create(const struct om_policy_ops *ops, uint64_t capacity, struct om_policy **ret);
void om_policy_destroy(struct om_policy *p);
/* Room for slots below `slots` at least (amortised: grows by half). All stays as it was on failure. */
int om_policy_grow(struct om_policy *p, uint32_t slots);
/* Grow one array of a policy to `to` elements of `size`, the new ones zero. For `grow`. */
int om_policy_grow_array(void *array, uint32_t from, uint32_t to, size_t size);

/* For om_policy_adaptive: the experts' names, and for how many accesses each one led. */
extern const struct om_policy_ops *const om_policy_experts[OM_EXPERTS];
void om_policy_adaptive_led(const struct om_policy *p, uint64_t ret[OM_EXPERTS]);

/* ---- lists of slots: a slot's links lie at its place in an array ---- */

struct om_link {
	uint32_t newer, older; /* OM_NIL: the end */
};
struct om_chain {
	uint32_t newest, oldest, count;
};

static inline void om_chain_init(struct om_chain *c)
{
	c->newest = c->oldest = OM_NIL;
	c->count = 0;
}

/* Next to `older`; OM_NIL: at the old end. */
static inline void om_chain_put(struct om_chain *c, struct om_link *links, uint32_t slot,
                                uint32_t older)
{
	uint32_t newer = older == OM_NIL ? c->oldest : links[older].newer;

	links[slot] = (struct om_link){ newer, older };
	if (newer == OM_NIL)
		c->newest = slot;
	else
		links[newer].older = slot;
	if (older == OM_NIL)
		c->oldest = slot;
	else
		links[older].newer = slot;
	c->count++;
}

static inline void om_chain_push(struct om_chain *c, struct om_link *links, uint32_t slot)
{
	om_chain_put(c, links, slot, c->newest);
}

static inline void om_chain_del(struct om_chain *c, struct om_link *links, uint32_t slot)
{
	struct om_link l = links[slot];

	if (l.newer == OM_NIL)
		c->newest = l.older;
	else
		links[l.newer].older = l.older;
	if (l.older == OM_NIL)
		c->oldest = l.newer;
	else
		links[l.older].newer = l.newer;
	c->count--;
}

#endif
