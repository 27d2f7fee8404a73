/*
 * om_group: blocks that share a HOST limit and a policy. Passive, under the store lock.
 *
 * A block has a seat in its group from its creation on: the slot by which the policy knows it, so
 * that what was learned about it outlives its eviction. Copies in HOST are the policy's members, leased
 * ones too: they keep their place in its order, but are never chosen.
 *
 * A cache is a group whose blocks may be lost: a victim is removed, unless an origin or a packed form holds
 * its bytes. Its limit counts what has a name; who is chosen may be leased (om_shed.c).
 */
#ifndef OM_GROUP_H
#define OM_GROUP_H

#include "base/om_list.h"
#include "core/om_foresight.h"
#include "core/om_policy.h"
#include "core/om_usage.h"

struct om_block;

/* Bytes of encoded forms, of all groups of a store. */
struct om_packed_count {
	uint64_t used_bytes, peak_bytes;
};

struct om_group {
	struct om_list link; /* store->groups */
	char name[64];
	uint64_t limit_bytes;  /* 0: only the store's binds */
	uint64_t lowered_from; /* it used so much when its limit was lowered: om_store_check only */
	uint64_t used_bytes,
		peak_bytes;    /* HOST extents of its blocks with a name, or that get one */
	uint64_t packed_bytes; /* of these, of encoded forms */
	struct om_packed_count *packed; /* NULL: of no store */
	uint64_t loose_bytes;   /* of these, extents that a thread fills before a block has them */
	uint64_t gone_bytes;    /* HOST extents of those that had one: held by somebody */
	uint64_t leaving_bytes; /* of those, LEAVING */
	uint64_t read_bytes, decoded_bytes;
	uint64_t timed_bytes,
		timed_ns;       /* of these, those that were not compared: how long it took */
	uint64_t disk_bytes;    /* runs of the swap file that its blocks hold */
	uint64_t foreign_bytes; /* HOST bytes of somebody else */
	uint64_t blocks, leases, pinned;
	uint64_t swapped;    /* blocks whose only bytes lie below HOST */
	uint64_t idle;       /* copies that may be chosen to go: VALID, neither leased nor pinned */
	uint64_t idle_bytes; /* HOST bytes of these */
	uint64_t spare_bytes; /* of these, those that lie in an origin too */
	uint64_t doubled;     /* of these, those that are there in a packed form too */
	uint64_t
		missing_bytes; /* of its blocks with a name whose bytes are not in HOST, forms aside */
	uint64_t uses;         /* accesses ever */
	bool cache;            /* its blocks may be lost */
	uint32_t batch; /* of a cache: victims until others get the lock; 0: as many as it takes */
	uint32_t threshold;     /* of a cache: a name is kept the so-manieth time that it is put */
	struct om_use use;      /* as a whole */
	struct om_tally *tally; /* how often names were put that are not kept yet */
	uint64_t evictions;     /* of a cache: entries that made way */
	struct om_group *rows;  /* of a cache: parts of entries that were asked for */
	struct om_traffic traffic;
	char trouble[OM_ERROR_TEXT]; /* why swapping out stopped early; "": it did not */
	struct om_list ahead;        /* FILLING, not leased: fetched ahead of use */
	struct om_policy *policy;
	struct om_foresight *foresight; /* NULL: nothing is foretold, nothing fetched ahead */
	struct om_block **seats;        /* by slot; NULL: vacant */
	uint32_t *vacant;               /* slots, a stack */
	uint32_t vacant_count, seat_count;
	struct om_group_check {
		uint64_t bytes, packed_bytes, gone_bytes, disk_bytes, foreign_bytes, blocks, leases,
			pinned, swapped, idle, idle_bytes, spare_bytes, doubled, missing_bytes;
	} check; /* om_store_check only */
	unsigned
		streams; /* of these: what they fetch ahead is finished by the thread that uses it */
	unsigned lingering; /* of these, what their units let go stays: no ring has to be kept */
	bool apart; /* blocks that came in together go one by one: each has an extent of its own */
	bool mixed; /* what is kept, or forms, come from the same segments as the ring: no slots */
};

/* `name` is short enough. The policy is LRU. */
int om_group_create(const char *name, uint64_t capacity, struct om_group **ret);
void om_group_destroy(struct om_group *g);
/* A seat for a block, and giving it up: nothing of the block is remembered. */
int om_group_join(struct om_group *g, struct om_block *b);
void om_group_leave(struct om_group *g, struct om_block *b);
/* Begin to foretell what is asked for next, or leave it. */
int om_group_foresee(struct om_group *g, bool on);
/* Another policy, which begins with today's members. -ENOMEM leaves the one there was. */
int om_group_set_policy(struct om_group *g, const struct om_policy_ops *ops);
/* The policy's choice among idle copies that `may` go, or NULL. */
struct om_block *om_group_victim(struct om_group *g,
                                 bool (*may)(void *arg, const struct om_block *b), void *arg);

/* As om_group_victim, among all copies that are VALID, leased ones too. */
struct om_block *om_group_oldest(struct om_group *g,
                                 bool (*may)(void *arg, const struct om_block *b), void *arg);

#endif
