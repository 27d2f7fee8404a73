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
#define OM_CODEC_CORE UINT8_MAX /* om_codec: what it made is decoded by whoever needs the bytes */
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

/* What a block needs besides once it has bytes, or is to get some. Made at its first access, so that
 * a block that was only registered costs its record and its name. */
struct om_body {
	struct om_block *block;
	struct om_desc desc;
	struct om_list ahead;    /* group->ahead: FILLING and not leased */
	struct om_range *ranges; /* the origin; NULL: none */
	size_t range_count;

	struct om_extent mem;       /* HOST bytes; no segment when foreign */
	struct om_foreign *foreign; /* HOST bytes of somebody else */
	uint8_t *data;          /* first byte, inside mem or foreign; valid unless host is NONE */
	uint32_t align;         /* what a fill leaves where it was read, if that is so aligned */
	unsigned holds;         /* threads that hash the bytes without the lock */
	unsigned views;         /* atomic: references that foreign consumers hold */
	unsigned turns;         /* leases that came or went: whoever had one may have written */
	struct om_list holders; /* struct om_lease */
	struct om_disk_copy disk_copy;
	struct om_block
		*packed; /* the bytes as somebody encoded them: a block of its own, `inner` */
	struct om_block *origin; /* likewise, the ranges of an origin that is encoded */
	struct om_move *move;    /* under way for this block, or NULL */

	uint64_t hash;             /* XXH3-64 of the bytes of origin, disk copy or packed form */
	bool hash_known, verified; /* verified: compared at least once */
	bool writer;               /* the one lease is a write lease */
	bool touched; /* HOST was leased for sharing: it may differ from what lies below */
	bool shown;  /* HOST was leased: a consumer that ignores read-only may have written to it */
	bool unused; /* HOST was fetched ahead and nobody has leased it since */
	bool guessed;     /* of these: foretold, not asked for */
	uint8_t codec;    /* of `packed`: OM_CODEC_CORE, or the face's number of who encoded it */
	uint64_t used_no; /* the last access, by the group's count of them */
};

struct om_block {
	unsigned refs; /* atomic: the store, and each lease; outlives name and store */
	uint32_t slot; /* its seat in the group; OM_NIL: not accessed yet */
	unsigned leases;
	unsigned counted; /* leases counted already: left at their deadline, they come again */
	uint64_t name_hash, nbytes;
	struct om_block *chain; /* table */
	struct om_list all;     /* store->blocks, in the order of adding */
	struct om_group *group;
	struct om_body *body; /* NULL: never accessed, there are no bytes */
	void *face;           /* of the binding, which guards it */
	uint64_t created_ns, accessed_ns;
	uint32_t accesses;
	enum om_copy_state host : 8, disk : 8;
	uint8_t tag;     /* of the face */
	bool named : 1;  /* in the table; of an inner block: its owner keeps it */
	bool inner : 1;  /* an encoded form of another block, whose name it has */
	bool blank : 1;  /* never had bytes: they will be zeros */
	bool pinned : 1; /* its HOST copy is never chosen to go */
	bool gone : 1;   /* it had a name: its HOST bytes are in no group's limit any more */
	char name[];
};

/* A blank record; it has no seat and no body yet. */
int om_block_create(const char *name, uint64_t nbytes, struct om_group *group,
                    struct om_block **ret);
/* Body and seat, before anything else but the record is used. Idempotent. -ENOMEM leaves it as it was. */
int om_block_wake(struct om_block *b, const struct om_desc *desc);
/* Gives its seat up; the record goes with its last reference. */
void om_block_retire(struct om_block *b);

/* HOST bytes that a copy takes: each range in its own aligned superset; whole pages, at least one. */
uint64_t om_block_host_bytes(const struct om_block *b);
/* Those that count in the limit of its group now. */
uint64_t om_block_counted_bytes(const struct om_block *b);
/* With those of its encoded forms; NULL has none. */
uint64_t om_block_entry_bytes(const struct om_block *b);
static inline bool om_block_has_origin(const struct om_block *b)
{
	return b->body && (b->body->ranges || b->body->origin);
}
/* The form that a fill decodes; NULL: none is there that the core made. */
static inline struct om_block *om_block_coded(const struct om_block *b)
{
	return b->body->packed && b->body->codec == OM_CODEC_CORE ? b->body->packed
	                                                          : b->body->origin;
}
/* What has to come to HOST before the block can be leased: its bytes, or the form that they are encoded
 * to. */
static inline struct om_block *om_block_wanted(struct om_block *b)
{
	struct om_block *form = b->body->packed ? b->body->packed : b->body->origin;

	return b->host == OM_COPY_NONE && form ? form : b;
}
/* May the HOST copy be dropped, since the same bytes lie below it? */
static inline bool om_block_clean(const struct om_block *b)
{
	return om_block_has_origin(b) ||
	       ((b->disk == OM_COPY_VALID || b->body->packed) && !b->body->touched);
}
/* May the HOST copy be let go without writing it anywhere? Entries of a cache may be lost. */
static inline bool om_block_expendable(const struct om_block *b)
{
	return b->group->cache || om_block_clean(b);
}
/* Do the block's bytes count among those that must always find room? */
static inline bool om_block_admitted(const struct om_block *b)
{
	return !om_block_has_origin(b) && !b->inner && !b->group->cache;
}
/* Swapped: the only bytes lie below HOST, written there by the store. */
static inline bool om_block_swapped(const struct om_block *b)
{
	return b->host != OM_COPY_VALID && b->host != OM_COPY_LEAVING && b->body && !b->inner &&
	       (b->disk == OM_COPY_VALID || (b->body->packed && b->body->codec != OM_CODEC_CORE));
}

/* Bytes of a block with a name that are not in HOST: they would have to come, or to be decoded. */
static inline uint64_t om_block_missing_bytes(const struct om_block *b)
{
	bool here = b->host == OM_COPY_VALID || b->host == OM_COPY_LEAVING;

	return b->named && !b->inner && !here ? b->nbytes : 0;
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
/* Gives the bytes of an idle copy of our own away: VALID -> NONE. */
struct om_extent om_block_host_cede(struct om_block *b);
/* It has a name from now on, or none any more: see om_block_lose_name. */
void om_block_set_named(struct om_block *b, bool named);
/* The name (or, of an inner block, its owner) is gone: nothing pins it, and what is left of it, as long as
 * somebody holds it, counts in no limit of its group and is no member for its policy. */
void om_block_lose_name(struct om_block *b);
/* The block is asked for: the policy of its group learns of it. Before room is made. */
void om_block_access(struct om_block *b);
/* Leases of the HOST copy (VALID or FILLING); without one a VALID copy is idle: it may be chosen to go. */
void om_block_lease(struct om_block *b);
void om_block_unlease(struct om_block *b);
/* The fill that all leases wait for has failed: it takes them with it. */
void om_block_lose_leases(struct om_block *b);
/* Its HOST copy is never chosen to go, or may be again. */
void om_block_pin(struct om_block *b, bool pinned);
/* Forget the origin: the bytes in HOST are now the only ones. (An encoded one is the caller's to let
 * go.) */
void om_block_forget_origin(struct om_block *b);
/* The packed form, which the block keeps from now on (NULL: none any more); returns the former. The
 * codec is set before. */
struct om_block *om_block_set_packed(struct om_block *b, struct om_block *packed);

void om_foreign_unref(struct om_foreign *f); /* any thread; the last one queues the release */
void om_foreign_collect(void);               /* runs queued releases on this thread */

#endif
