/*
 * om_block: the record of a block, its copies and their states. om_block.c is the only file that
 * changes a state. Passive: the caller holds the store lock; only the reference count is atomic.
 */
#ifndef OM_BLOCK_H
#define OM_BLOCK_H

#include "base/om_list.h"
#include "core/om_disk.h"
#include "core/om_group.h"
#include "core/om_pool.h"
#include "omnimem.h"
#include "plat/om_file.h"

enum om_copy_state {
	OM_COPY_NONE,    /* no bytes. Next: FILLING, once the extent is reserved */
	OM_COPY_FILLING, /* being written, nobody reads. Next: VALID, or NONE on error */
	OM_COPY_VALID, /* readable under a lease; on a list iff leases == 0. Next: LEAVING, NONE */
	OM_COPY_LEAVING, /* being written out; a lease rescues it (back to VALID). Else: NONE */
};

struct om_move;

#define OM_BLOCK_ALIGN \
	64u /* of a block's first byte in memory: kernels are slower off a cache line */
#define OM_STREAM_ALIGN \
	8u /* of one that streams: moving it costs more than that; safetensors' own */

/* Memory of somebody else, kept by om_store_take. */
struct om_foreign {
	unsigned refs; /* atomic: the HOST copy, and each lease */
	void *data;
	void (*release)(void *context);
	void *context;
	struct om_foreign *next; /* on the process-wide list of those to release */
};

struct om_range { /* one extent of an origin */
	struct om_file *file;
	uint64_t offset, nbytes;
};

struct om_block {
	unsigned refs; /* atomic: the store, and each lease; outlives name and store */
	char *name;
	uint64_t name_hash, nbytes;
	struct om_desc desc;
	struct om_block *chain; /* table */
	struct om_list all;     /* store->blocks, in the order of adding */
	struct om_list ahead;   /* group->ahead: FILLING and not leased */
	struct om_group *group;
	uint32_t slot; /* its seat there */
	bool named;    /* in the table */

	struct om_range *ranges; /* the origin; NULL: none */
	size_t range_count;

	enum om_copy_state host, disk;
	struct om_extent mem;       /* HOST bytes; no segment when foreign */
	struct om_foreign *foreign; /* HOST bytes of somebody else */
	uint8_t *data;  /* first byte, inside mem or foreign; valid unless host is NONE */
	uint32_t align; /* what a fill leaves where it was read, if that is so aligned */
	unsigned leases;
	unsigned holds;         /* threads that hash the bytes without the lock */
	unsigned views;         /* atomic: references that foreign consumers hold */
	bool writer;            /* the one lease is a write lease */
	struct om_list holders; /* struct om_lease */
	struct om_disk_copy disk_copy;
	struct om_move *move; /* under way for this block, or NULL */

	uint64_t hash;             /* XXH3-64 of the bytes of origin or disk copy */
	bool hash_known, verified; /* verified: compared at least once */
	bool unused;               /* HOST was fetched ahead and nobody has leased it since */
	unsigned counted; /* leases counted already: left at their deadline, they come again */
};

int om_block_create(const char *name, uint64_t nbytes, struct om_group *group,
                    const struct om_desc *desc, struct om_block **ret);
void om_block_ref(struct om_block *b);
void om_block_unref(struct om_block *b); /* frees the record; all copies are gone by then */

/* HOST bytes that a copy takes: each range in its own aligned superset; whole pages, at least one. */
uint64_t om_block_host_bytes(const struct om_block *b);
static inline bool om_block_clean(const struct om_block *b)
{
	return b->ranges || b->disk == OM_COPY_VALID;
}

/* The transitions. Each asserts the state that it starts from. */
void om_block_fill_begin(struct om_block *b, struct om_extent mem); /* NONE -> FILLING */
void om_block_fill_end(struct om_block *b);                         /* FILLING -> VALID */
void om_block_fill_fail(struct om_block *b, struct om_pool *p);     /* FILLING -> NONE */
void om_block_leave_begin(struct om_block *b);                      /* VALID -> LEAVING */
void om_block_leave_rescue(struct om_block *b);                     /* LEAVING -> VALID */
void om_block_host_drop(struct om_block *b, struct om_pool *p);     /* VALID, LEAVING -> NONE */
/* NONE -> VALID; the bytes count in the limit of the pool, which has room for them. */
void om_block_adopt(struct om_block *b, struct om_pool *p, struct om_foreign *foreign);
void om_block_disk_begin(struct om_block *b);                   /* NONE -> FILLING */
void om_block_disk_end(struct om_block *b);                     /* FILLING -> VALID */
void om_block_disk_drop(struct om_block *b, struct om_disk *d); /* any -> NONE */
/* The block is asked for: the policy of its group learns of it. Before room is made. */
void om_block_access(struct om_block *b);
/* Leases of the HOST copy (VALID or FILLING); without one a VALID copy is idle: it may be chosen to go. */
void om_block_lease(struct om_block *b);
void om_block_unlease(struct om_block *b);
/* The fill that all leases wait for has failed: it takes them with it. */
void om_block_lose_leases(struct om_block *b);
/* Forget the origin: the bytes in HOST are now the only ones. */
void om_block_forget_origin(struct om_block *b);

void om_foreign_unref(struct om_foreign *f); /* any thread; the last one queues the release */
void om_foreign_collect(void);               /* runs queued releases on this thread */

#endif
