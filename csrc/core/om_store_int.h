/*
 * om_store_int: the store's inside, shared by om_store.c (life, groups, waiting), om_lease.c, om_add.c,
 * om_swap.c, om_press.c, om_sweep.c (giving memory back), om_guard.c (before more is mapped), om_usage.c,
 * om_pack.c (encoded forms), om_put.c, om_get.c, om_shed.c (caches), om_traffic.c (counters and events),
 * om_room.c (making room), om_spill.c, om_fetch.c (fills, waiting, the work owed), om_mover.c (the thread that owns
 * the ring), om_work.c (pages ahead of reads), om_ticket.c, om_stream.c, om_inspect.c. `_locked`: the
 * store lock is held.
 */
#ifndef OM_STORE_INT_H
#define OM_STORE_INT_H

#include "base/om_sync.h"
#include "core/om_guard.h"
#include "core/om_latency.h"
#include "core/om_meter.h"
#include "core/om_move.h"
#include "core/om_table.h"
#include "core/om_work.h"
#include "omnimem.h"
#include "plat/om_io.h"

struct om_lease {
	unsigned refs, views; /* atomic */
	struct om_store *store;
	struct om_block *block;
	struct om_segment *segment; /* its own reference: the bytes outlive the store */
	struct om_foreign *foreign; /* likewise */
	void *data;
	bool write, share;
	unsigned turns;        /* block->body->turns when it was made, its own included */
	struct om_list link;   /* block->holders */
	struct om_lease *next; /* store->dropped */
};

struct om_store {
	unsigned refs;  /* atomic: of this memory: one for all users, and each lease */
	unsigned users; /* atomic: of the store, less one */
	unsigned adding;
	unsigned inside; /* threads that gave up the lock in the middle of a spill: close waits */
	uint64_t exported_bytes; /* atomic */
	unsigned fork_generation;
	struct om_mutex lock;
	struct om_cond changed; /* a state, a cursor, a lease count changed */
	unsigned waiters;       /* threads in om_cond_wait on it */
	bool closing;
	bool closed;              /* atomic */
	struct om_lease *dropped; /* atomic, lock-free: released leases */

	enum om_verify verify;
	uint32_t request_bytes;
	uint64_t host_limit_bytes;
	struct om_list blocks, groups;
	struct om_turns turns; /* of the groups' uses */
	struct om_table table;
	struct om_pool pool;
	struct om_guard guard;
	struct om_disk disk;
	uint64_t host_peak_bytes; /* since a mark began or ended, as are those of disk and meter */
	uint64_t loose_bytes;     /* extents that a thread fills before a block has them */
	uint64_t sole_bytes, sole_largest; /* blocks without an origin: they must fit */

	/* the mover */
	pthread_t mover_thread;
	bool mover_started, mover_ready;
	int mover_code;
	struct om_error mover_error;
	struct om_io_config io_config;
	struct om_io *io;
	struct om_list queue[OM_PRIORITIES];
	unsigned moves; /* queued or in flight */
	unsigned spills_failed;
	struct om_error spill_error; /* of the last one */
	bool starved;                /* the mover waits for pages */
	bool decaying;               /* the mover will look for what is idle and goes back */
	uint64_t disk_idle_ns;       /* much of the swap file is free since; 0: it is not */
	struct om_work work;

	struct om_stats counters;
	uint64_t read_since_ns, write_since_ns;
	struct om_latency read_latency, write_latency;
	struct om_meter meter;
	struct om_note *notes; /* the last OM_NOTES events, a ring */
	uint64_t note_count;   /* ever made */
};

/* Enter a public function: 0 with the lock held, or OM_ECLOSED. */
int om_store_enter(struct om_store *s);
int om_store_leave(struct om_store *s, int code); /* returns the code */
/* As om_store_enter, with a block that stays until om_store_leave_block; also OM_ENAME. */
int om_store_enter_block(struct om_store *s, const char *name, struct om_block **ret);
int om_store_leave_block(struct om_store *s, struct om_block *b, int code);
/* As om_store_enter, with a group, which is made if need be; also OM_EVALUE, -ENOMEM. */
int om_store_enter_group(struct om_store *s, const char *name, struct om_group **ret);
void om_store_unref_memory(struct om_store *s); /* the last one frees it */
/* Wait for a change, at most until the deadline or a few milliseconds (released leases come without
 * a signal); with work queued, do a piece of that instead. */
void om_store_wait_locked(struct om_store *s, uint64_t deadline_ns);
void om_store_changed_locked(struct om_store *s);
struct om_group *om_store_find_group_locked(struct om_store *s, const char *name);
struct om_block *om_store_find_locked(struct om_store *s, const char *name); /* NULL: error set */

/* om_lease.c */
/* Take back the leases that were released. */
void om_store_drain_locked(struct om_store *s);
void om_lease_drain_closed(struct om_store *s); /* likewise, of a store that is closed */
/* Make a lease object of a counted lease. NULL: error set, the count is untouched. */
struct om_lease *om_lease_make_locked(struct om_store *s, struct om_block *b, bool write);
/* The body of om_store_lease. May give up the lock. */
int om_lease_take_locked(struct om_store *s, struct om_block *b, enum om_access access,
                         uint64_t deadline_ns, struct om_lease **ret);
/* Could a lease for reading be had without any waiting or work? */
bool om_lease_at_hand(const struct om_block *b);

/* om_add.c */
/* An open file of this store for the path, or a new one. */
int om_store_open_file(struct om_store *s, const char *path, struct om_file **ret);
/* It loses its name; what nobody holds goes at once (the block may). */
void om_store_forget_locked(struct om_store *s, struct om_block *b);
/* Is the name one that a block can have? */
int om_store_check_name(const char *name);
/* The block has no name, no lease and no move: it goes. */
void om_store_reap_locked(struct om_store *s, struct om_block *b);

/* om_room.c */
#define OM_SPILL_TRIES 4 /* failed writes that a thread waiting for room puts up with */
enum om_room_how {
	OM_ROOM_WRITE = 1, /* dirty idle copies make way too */
	OM_ROOM_MAPPED =
		2, /* the memory is there, somebody else's: no more is taken from the system */
};
/* Can `bytes` more be had in `g` now? Drops clean idle copies for it, never waits. 0; OM_EAGAIN: something
 * is on its way out; OM_EBUSY: leased copies are in the way; OM_ELIMIT: never. `how`: enum om_room_how; with
 * OM_ROOM_WRITE dirty idle copies are sent out as well (the lock is given up meanwhile: look everything up
 * again). Room is what the limits leave, and what the guard says can be taken from the system; but if
 * nobody can make way, that alone is no reason. */
int om_room_make_locked(struct om_store *s, struct om_group *g, uint64_t bytes, unsigned how,
                        struct om_block *const *keep, size_t keep_count);
/* As above, but that only `own_bytes` count in the limit of `g`, and that it stops with OM_ROOM_STEP after
 * so many victims as a cache's step may take. */
#define OM_ROOM_STEP 1
int om_room_step_locked(struct om_store *s, struct om_group *g, uint64_t bytes, uint64_t own_bytes,
                        unsigned how, struct om_block *const *keep, size_t keep_count);
/* Let others have the lock. */
void om_room_pause_locked(struct om_store *s);
/* As om_room_make_locked, waiting until there is room. */
int om_room_wait_locked(struct om_store *s, struct om_group *g, uint64_t bytes, unsigned how,
                        uint64_t deadline_ns);
/* Bring a group back under a limit that was lowered, as far as leases allow: clean idle copies go now,
 * dirty ones are on their way out. Waits for no I/O; may give up the lock. */
void om_room_shrink_locked(struct om_store *s, struct om_group *g);
/* The last lease of a block went: when its group is over its limit, a clean copy goes as well. */
void om_room_released_locked(struct om_store *s, struct om_block *b);
/* Could `bytes` more be had in `g` without anything giving way? */
bool om_room_free_locked(struct om_store *s, const struct om_group *g, uint64_t bytes);
/* The policy's choice among all idle copies of a group, or of those that are no packed form. */
struct om_block *om_room_victim_locked(struct om_store *s, struct om_group *g);
struct om_block *om_room_plain_victim_locked(struct om_group *g);
/* Have another group than `g` give up one idle copy that is expendable. False: none has any, or it is the limit of
 * `g` that binds. */
bool om_room_take_locked(struct om_store *s, const struct om_group *g);
/* Give up an idle copy that is expendable (the block may go). */
void om_room_drop_locked(struct om_store *s, struct om_block *b);
/* Let one idle or leaving block go. 1, 0 (leased) or an error. May give up the lock. */
int om_room_evict_locked(struct om_store *s, struct om_block *b, uint64_t deadline_ns);
/* Cancel a fill that nobody leases: at once when nothing is in flight. */
void om_fetch_cancel_locked(struct om_store *s, struct om_block *b);
/* Why there is no room yet: `code` of om_room_make_locked, or, when writing victims out has failed too
 * often since `failed_before` (s->spills_failed), that error. */
int om_room_verdict_locked(struct om_store *s, int code, unsigned failed_before);
void om_room_busy_error(struct om_store *s, struct om_group *g, uint64_t bytes);
/* List who leases blocks (of one group), those with views first, as far as it fits. `text` is "". */
void om_room_holders(struct om_store *s, const struct om_group *only, char *text, size_t size);
/* May a block be accepted whose bytes must always find room? */
int om_room_admit_locked(struct om_store *s, const struct om_block *b);
void om_room_unadmit_locked(struct om_store *s, uint64_t bytes);

/* om_shed.c: victims of caches */
/* Let the oldest entry of a cache go that is none of `keep`: what an origin or a packed form holds is
 * dropped, else the entry is removed; what somebody leases goes on without a name. 0; OM_EAGAIN: there
 * is none; -ENOMEM. */
int om_shed_oldest_locked(struct om_store *s, struct om_group *g, struct om_block *const *keep,
                          size_t keep_count);
/* Let one VALID copy go so. Idle ones cannot fail. */
int om_shed_locked(struct om_store *s, struct om_block *b);
/* `bytes` more are to be a cache's: nothing may stay mapped for later that takes it over its limit, if it
 * has the store for itself. */
void om_shed_trim_locked(struct om_store *s, const struct om_group *g, uint64_t bytes);

/* om_press.c */
/* Bytes of idle blocks with an origin. 0 when it is closed. */
uint64_t om_press_spare(struct om_store *s);

/* om_spill.c */
/* Begin to write an idle dirty copy out. 0: it is under way, or gone already (what lies below holds
 * the same bytes), or no longer needed; OM_EBUSY: the disk has no room until leases go; or an error. The
 * lock is given up. */
int om_spill_locked(struct om_store *s, struct om_block *b);
/* XXH3 of the bytes in HOST, which are LEAVING or leased by the caller. The lock is given up meanwhile: a
 * lease may rescue the one, and others may join the other. */
uint64_t om_spill_hash_locked(struct om_store *s, struct om_block *b);
/* Give the disk blocks of what is free in the swap file back, if that is much. False: it is not. The lock
 * is given up. */
bool om_spill_shrink_locked(struct om_store *s);
/* Sets the error of that OM_EBUSY. */
int om_spill_busy_error(struct om_store *s, const struct om_block *b, uint64_t bytes);

/* om_traffic.c */
#define OM_NOTES 4096u
int om_traffic_init(struct om_store *s);
/* Count an event of a block's group, and keep it in the ring. */
void om_traffic_note_locked(struct om_store *s, struct om_block *b, enum om_event_kind kind,
                            uint64_t bytes, uint64_t began_ns);
/* A group was asked for a name that it has not. */
void om_traffic_miss_locked(struct om_store *s, struct om_group *g, const char *name);

/* om_pack.c */
/* The packed form of a block is of no use any more; its origin is none any more. */
void om_pack_drop_locked(struct om_store *s, struct om_block *b);
void om_pack_forget_origin_locked(struct om_store *s, struct om_block *b);
/* The plain bytes are here: the form that they came from goes, if it need not be in memory too. */
void om_pack_give_up_locked(struct om_store *s, struct om_block *form);
/* A record for an encoded form, on the store's list, with a reference for its owner. */
int om_pack_make_inner_locked(struct om_store *s, struct om_block *owner, uint64_t nbytes,
                              struct om_block **ret);
/* Memory for bytes that are made without the lock, and are no block's yet: a segment of its own, of that
 * size. Counted in loose_bytes. */
int om_pack_loose_locked(struct om_store *s, struct om_group *g, uint64_t bytes,
                         uint64_t deadline_ns, struct om_extent *ret);
/* Only `bytes` of it are needed; it is a block's from now on; it is not needed. */
void om_pack_cut_loose_locked(struct om_store *s, struct om_group *g, struct om_extent *mem,
                              uint64_t bytes);
void om_pack_end_loose_locked(struct om_store *s, struct om_group *g, const struct om_extent *mem);
void om_pack_free_loose_locked(struct om_store *s, struct om_group *g, struct om_extent *mem);
/* Encode bytes that are, or are to be, those of a block, and decode the result to compare it. ret->bytes 0: it
 * would hardly be smaller. Without the lock. */
int om_pack_encode(const struct om_block *b, const void *data, enum om_coding coding,
                   struct om_extent mem, struct om_coded *ret);
/* Encode the bytes of a block that the caller leases, and keep the form in HOST beside them: a fill is
 * decoded from it from now on. *ret: the form, a reference; NULL: it would hardly be smaller, or of more than
 * `most` bytes. Gives up the
 * lock. */
int om_pack_encode_locked(struct om_store *s, struct om_block *b, enum om_coding coding,
                          uint64_t most, uint64_t deadline_ns, struct om_block **ret);

/* om_decode.c */
/* `m` fills its block from `from`, which is in HOST or on its way. -ENOMEM. */
int om_decode_begin_locked(struct om_store *s, struct om_move *m, struct om_block *from);
/* The move that `m` waits for before it can decode, or NULL. */
struct om_move *om_decode_reads(const struct om_move *m);
/* As om_fetch_work_locked, of a fill that decodes. */
bool om_decode_work_locked(struct om_store *s, struct om_move *m);
/* The move settles: it lets the form go. */
void om_decode_end_locked(struct om_store *s, struct om_move *m);

/* om_fetch.c */
/* HOST bytes that are missing for a lease of all blocks, or (`ahead`) for what has to be there before:
 * encoded forms are fetched ahead, not decoded. */
uint64_t om_fetch_missing_bytes(struct om_block *const *blocks, size_t count, bool ahead);
/* Memory for HOST bytes of a group; there is room. */
int om_fetch_reserve_locked(struct om_store *s, const struct om_group *g, uint64_t bytes,
                            struct om_extent *ret);
/* Reserve memory (there is room for all) and queue fills of those whose HOST is NONE (OM_PREFETCH: of what
 * om_fetch_missing_bytes calls ahead). OM_EAGAIN: the
 * room was not enough (pages lost in shared segments); some may have started: make room again. */
int om_fetch_start_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                          enum om_move_priority priority);
/* Lease all blocks or none, their bytes in HOST and proven. May give up the lock. */
int om_fetch_lease_locked(struct om_store *s, struct om_block *const *blocks, size_t count,
                          uint64_t deadline_ns, uint64_t *ret_stall_ns);
/* An access to bytes in HOST that takes no lease. */
void om_fetch_hit_locked(struct om_store *s, struct om_block *b);
/* Take the lease back (the block may go). */
void om_fetch_unlease_locked(struct om_store *s, struct om_block *b);
/* Wait until a move is settled, doing the work owed on it. 0 or its error, or OM_EBUSY. */
int om_fetch_settle_locked(struct om_store *s, struct om_move *m, uint64_t deadline_ns);
/* Do a piece of the work owed on a move, if any is to be had. Gives up the lock meanwhile. */
bool om_fetch_work_locked(struct om_store *s, struct om_move *m);
/* A fill is whole and proven; or has failed (its error is set, or it was canceled). */
void om_fetch_filled_locked(struct om_store *s, struct om_move *m);
void om_fetch_fail_locked(struct om_store *s, struct om_move *m);
/* Have the worker do some of what the caller is about to do on a move. */
void om_fetch_share_locked(struct om_store *s, struct om_move *m);
/* The mover calls this when all requests of a move are back. */
void om_fetch_landed_locked(struct om_store *s, struct om_move *m);

/* om_mover.c */
int om_mover_start(struct om_store *s);
void om_mover_stop(struct om_store *s); /* cancels what is queued, waits for what is in flight */
void om_mover_queue_locked(struct om_store *s, struct om_move *m);
void om_mover_decay_locked(struct om_store *s); /* there is memory that may go back in a while */
void om_mover_promote_locked(struct om_store *s, struct om_move *m);

#endif
