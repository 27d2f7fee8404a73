/*
 * om_move: one asynchronous move of a block's bytes: a plan of pieces, and how far it is.
 *
 * A fill reads each range of an origin (or each run of a disk copy) in its own aligned superset
 * into the block's extent; a spill writes the HOST bytes to disk runs. The mover issues requests in
 * the order of the plan; the ready cursor follows behind what has completed without a gap, and
 * the thread that waits takes the bytes up to it: hashes them, and moves those down that lie
 * elsewhere than they belong. Under the store lock, except where noted.
 *
 * Life: QUEUED (mover's list) -> requests in flight -> landed (all requests are back)
 *       -> settled (fill: bytes proven, copy VALID; or error). A fill that failed, was canceled, or
 *       a spill, settles on the mover; a whole fill is settled by a thread that works on it.
 */
#ifndef OM_MOVE_H
#define OM_MOVE_H

#include "core/om_block.h"

enum om_move_kind { OM_MOVE_FILL, OM_MOVE_SPILL };
enum om_move_priority { OM_DEMAND, OM_PREFETCH, OM_SPILL, OM_PRIORITIES };

struct om_piece {
	struct om_file *file; /* borrowed from the block or the disk tier */
	uint64_t offset;      /* page aligned superset in the file */
	uint64_t bytes;       /* of the superset, whole pages */
	uint64_t exists;      /* of the superset, the bytes up to the end of what is wanted */
	uint8_t *mem;
	uint64_t head, nbytes; /* the wanted bytes within the superset */
};

struct om_cursor {
	size_t piece;
	uint64_t done; /* bytes of that piece */
};

struct om_move {
	unsigned refs;       /* under the store lock: block->move, mover list, tickets, waiters */
	struct om_list link; /* mover queue, while something is left to issue */
	struct om_block *block;
	enum om_move_kind kind;
	enum om_move_priority priority;
	struct om_piece *pieces;
	size_t piece_count;
	uint64_t bytes; /* of all supersets */
	uint32_t request_bytes;
	struct om_cursor issued, ready, taken;
	uint8_t *out; /* fill: where the next byte that is taken belongs */
	uint32_t issue_index, ready_index, request_count;
	uint8_t *back; /* per request: 1 when it is back */
	unsigned inflight;
	bool checked; /* identity of the files was compared before the first request */
	bool ahead;   /* begun before anybody needed it */
	bool zeros;   /* fill: nothing is read, the bytes are zeros */
	bool shown;   /* spill: the bytes were leased meanwhile, and maybe written to */
	uint64_t began_ns;
	bool want_hash, displaced, speculative, canceled, landed, settled, busy;
	uint8_t attempt;
	uint8_t reason;    /* spill: enum om_reason */
	void *hash_memory; /* aligned XXH3 state inside hash_raw */
	void *hash_raw;
	uint64_t hash;          /* spill: of the bytes sent */
	struct om_error *error; /* NULL until something failed */
	unsigned waiters;       /* threads that wait for it now */
	struct om_decoding
		*decoding; /* fill: from an encoded form (om_decode.c); NULL: it is read */
};

struct om_decoding;

/* Plan a fill of `b`, whose extent is reserved (b->data is set to where the first byte will be: where
 * it is read to, if that is aligned as b->align asks, else up to OM_BLOCK_ALIGN - 1 bytes before), or
 * a spill of it to `copy`. -ENOMEM leaves all as it was. */
int om_move_create_fill(struct om_block *b, struct om_disk *disk, uint32_t request_bytes,
                        enum om_move_priority priority, struct om_move **ret);
int om_move_create_spill(struct om_block *b, struct om_disk *disk, uint32_t request_bytes,
                         struct om_move **ret);
void om_decode_free(struct om_decoding *d); /* NULL is fine; its block and move were let go */
void om_move_ref(struct om_move *m);
void om_move_unref(struct om_move *m);
/* Length of the request at the cursor (0: the end), and the step over it. */
uint32_t om_move_request(const struct om_move *m, const struct om_cursor *c);
void om_move_step(const struct om_move *m, struct om_cursor *c);
/* Start again from the first request. */
void om_move_rewind(struct om_move *m);
/* Record this thread's error (the first one stays). Never fails: falls back to a shared record. */
void om_move_fail(struct om_move *m);
/* Do the work owed on the wanted bytes between the taken cursor and another one, which the caller then
 * makes the taken one: hash, move down. No lock. */
void om_move_take(struct om_move *m, const struct om_cursor *to);
uint64_t om_move_digest(const struct om_move *m);
/* Compare the identity of every file of the plan. No lock. */
int om_move_check_files(const struct om_move *m);

#endif
