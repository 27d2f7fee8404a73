/*
 * omnimem: the core API. Each function is documented here and nowhere else.
 *
 * A block is named bytes. A lease is the only right to touch them. A store keeps blocks in HOST
 * (RAM) and DISK (a nameless swap file, or the block's origin: extents of files that are read in
 * place). A stream runs a fixed set of units (blocks used together, such as a decoder layer)
 * through a small ring beside its resident blocks.
 *
 * All functions are thread safe unless they say otherwise. Those that return int return 0 or a
 * negative code and set this thread's error (base/om_error.h). Those that take `deadline_ns`
 * (om_now() based) may wait; when it passes they return OM_EBUSY with the holders in the error, and
 * the work goes on: call again to go on waiting. The core never calls back, except `release` of
 * foreign memory, and that only from om_store_collect.
 * After fork the child's calls return OM_ECLOSED; releases there are harmless.
 */
#ifndef OMNIMEM_H
#define OMNIMEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/om_base.h"
#include "base/om_error.h"

#define OM_MAX_NDIM 16
#define OM_MAX_NAME 1024

struct om_store;
struct om_block;
struct om_lease;
struct om_ticket;
struct om_stream;
struct om_bank;
struct om_chunk;
struct om_monitor;

/* What a block's bytes mean; remembered, never interpreted by the core. DLPack type codes. */
struct om_desc {
	uint8_t code, bits;
	uint16_t lanes;
	int32_t ndim; /* -1: unknown, the bytes are uint8[nbytes] */
	int64_t shape[OM_MAX_NDIM];
};

/* How bytes are encoded, losslessly: FAST is a fixed-rate code of exponents, BALANCED a dense one; NONE
 * keeps them as they are, with the same header and checksum. */
enum om_coding { OM_CODING_NONE, OM_CODING_FAST, OM_CODING_BALANCED };

/* ---- store ---- */

enum om_level { OM_LOW, OM_MEDIUM, OM_HIGH, OM_CRITICAL }; /* of memory pressure */
enum om_verify { OM_VERIFY_ALWAYS, OM_VERIFY_FIRST };

struct om_store_config {
	uint64_t host_limit_bytes; /* everything mapped for blocks */
	uint64_t disk_limit_bytes; /* the swap file */
	const char *directory;     /* of the swap file; NULL: the default */
	int backend;               /* 0 auto, 1 uring, 2 threads (enum om_io_backend) */
	int verify;                /* enum om_verify */
	uint64_t window_bytes;     /* in flight at most; 0: 16 MiB */
	uint32_t request_bytes;    /* of one request; 0: 1 MiB */
	unsigned io_threads;       /* of the thread back end; 0: 8 */
};

int om_store_create(const struct om_store_config *config, struct om_store **ret);
/* Stops the threads, frees what nobody sees. Bytes under a lease stay valid until it goes. Every
 * later call but release returns OM_ECLOSED. Idempotent. Waits for I/O in flight. */
int om_store_close(struct om_store *s);
void om_store_ref(struct om_store *s);
void om_store_unref(struct om_store *s); /* the last one closes */

/* A named set of blocks with a HOST limit (0: only the store's binds). Blocks added with an
 * unknown group name create it without a limit. Lowering the limit below what the group uses moves
 * idle blocks out: what is on DISK or in an origin goes at once, the rest is being written out
 * when this returns. Leased blocks stay; let go, they go too, those to be written out not before
 * somebody needs room. */
int om_store_group(struct om_store *s, const char *group, uint64_t host_limit_bytes);

/* What passed through a group: accesses, and copies that left HOST for a lower tier or came back. */
struct om_traffic {
	uint64_t hits, misses; /* accesses that found the bytes in HOST, or did not */
	uint64_t outs, ins;    /* copies that left HOST, that came back */
	uint64_t out_bytes,
		in_bytes; /* moved for them; nothing when the lower copy was still good */
	uint64_t out_ns,
		in_ns; /* from the decision until the bytes were proven; summed over copies */
};
struct om_group_stats {
	uint64_t blocks, pinned, leases;
	uint64_t swapped; /* blocks whose only bytes lie below HOST, written there by the store */
	uint64_t host_bytes, host_peak_bytes, disk_bytes; /* extents of their copies */
	uint64_t idle_bytes;                              /* of host_bytes, those that may go now */
	uint64_t
		spare_bytes; /* of idle_bytes, those of blocks with an origin: they go for nothing */
	uint64_t
		missing_bytes; /* of blocks that are not in HOST: what would have to come, or be decoded */
	uint64_t limit_bytes;  /* 0: only the store's binds */
	uint64_t packed_bytes; /* of host_bytes, those of encoded forms */
	uint64_t
		gone_bytes; /* of blocks that lost their name while somebody holds them: not in host_bytes */
	uint64_t evictions;    /* of a cache: entries that made way */
	uint64_t issued, used; /* blocks fetched because they were foretold, and of those, used */
	/* Of the last accesses, 1024 at most: those of a block that had been accessed within as many, those
	 * that went on with the block just accessed, those that were foretold. */
	uint64_t recent, reused, repeated, foretold;
	struct om_traffic traffic;
	char trouble[OM_ERROR_TEXT]; /* why the last swapping out stopped early; "": it did not */
};
int om_store_group_stats(struct om_store *s, const char *group, struct om_group_stats *ret);

/* A cache: a group whose blocks, its entries, may be lost. An entry needs no admission. When the group is
 * over its limit entries go as its policy says, those that are leased too: one with an origin loses
 * its bytes in HOST, any other is removed. Who holds the bytes keeps them: they count in no limit
 * of the group from then on (om_group_stats.gone_bytes). When other groups need the store's memory,
 * only what nobody leases goes. Nothing of a cache is written to DISK.
 * A group becomes one while it has no blocks; called again for other limits. OM_EVALUE: it has blocks, no
 * limit, a name of more than 56 bytes. */
struct om_cache_config {
	uint64_t limit_bytes;
	uint32_t
		batch; /* entries that make way in one step, until others get the lock; 0: no bound */
	uint32_t threshold; /* a name is kept the so-manieth time that it is put; 0 or 1: at once */
};
int om_store_cache(struct om_store *s, const char *group, const struct om_cache_config *config);
/* Copy an entry in. It replaces one of the same name in a single step: who asks for the name gets the bytes
 * of one of the two, and who holds the former ones keeps them. Room is made as told above, no more than is
 * needed; the former bytes count as room. With `coding` it is kept as om_encode makes it of the caller's
 * bytes, where that is smaller and could be there decoded too; for whom it is decoded it is plain as
 * long as they hold it, and then until its room is needed. 1: it is there; 0: its name was not put often enough; OM_ELIMIT:
 * more bytes than the limit; OM_EVALUE: the group is no cache, another group has the name. */
int om_store_put(struct om_store *s, const char *name, const char *group, const void *data,
                 uint64_t nbytes, const struct om_desc *desc, enum om_coding coding,
                 uint64_t deadline_ns);
/* As om_store_lease for reading, of an entry of a cache. OM_ENAME (no error is set): there is none; it
 * counts as a miss of the group. */
int om_store_get(struct om_store *s, const char *group, const char *name, uint64_t deadline_ns,
                 struct om_lease **ret);
/* The same if the bytes are in HOST, else OM_EAGAIN, with no error set. */
int om_store_get_now(struct om_store *s, const char *group, const char *name,
                     struct om_lease **ret);
/* Some rows of an entry, whose bytes are taken as `desc` says, along its first dimension. Of an entry that
 * is not in HOST and has an origin only these are read, and they are no part of the cache. Elsewise one run
 * of rows is a lease of the entry, in which they begin at *ret_offset, and more are a copy. What is no part
 * of the cache counts in gone_bytes. OM_ENAME as above; OM_EAGAIN (no error is set): the entry
 * has another desc; OM_EVALUE: rows outside it, or no whole bytes. */
struct om_rows {
	uint64_t first, count;
};
int om_store_get_rows(struct om_store *s, const char *group, const char *name,
                      const struct om_desc *desc, const struct om_rows *runs, size_t count,
                      uint64_t deadline_ns, struct om_lease **ret, uint64_t *ret_offset);
/* Have the entries go that would go next, until `bytes` fewer count in the limit, at most `most` of them
 * (0: no bound). */
struct om_shed {
	uint64_t entries, bytes;
};
int om_store_shed(struct om_store *s, const char *group, uint64_t bytes, uint32_t most,
                  struct om_shed *ret);
/* The entries that are in HOST, the one that was not used for longest first. */
struct om_entry {
	char *name;
	uint64_t nbytes, accesses;
	uint64_t plain_bytes, packed_bytes; /* that count in the limit */
	unsigned leases;
};
int om_store_entries(struct om_store *s, const char *group, struct om_entry **ret,
                     size_t *ret_count);
void om_entries_free(struct om_entry *entries, size_t count);

/* Learn in what order a group's blocks are accessed, and fetch ahead of demand what is foretold, into free
 * room, as long as most of it is used; or stop that. */
int om_store_foresee(struct om_store *s, const char *group, bool on);

/* Who goes first when a group has to give: "lru" (what groups begin with), "clock", "s3fifo", "sieve" or
 * "adaptive". What the former policy had learned is forgotten. OM_EVALUE: another one. */
int om_store_policy(struct om_store *s, const char *group, const char *policy);

/* A whole group is in use (a model's pass begins, ends): counted; its blocks are the last to go meanwhile. When
 * memory is needed, a group over its own limit gives; else the one, of those that have idle blocks, whose next
 * use is expected last. A group that is never used as a whole is judged by the last access of the block that
 * would go. Makes the group. OM_EVALUE: an end without a begin. */
int om_store_use_begin(struct om_store *s, const char *group);
int om_store_use_end(struct om_store *s, const char *group);
struct om_usage {
	uint64_t uses, recent; /* ever; within the window asked for (of the last 64) */
	unsigned busy;         /* that have begun and not ended */
	/* om_now(); 0: never. Uses that follow each other within a second, without another group's between, are one
	 * run, and each run takes a turn. The next one is expected a typical number of turns after the last, as
	 * long as turns took of late; when it is late, in as many turns and one more; with one run alone the later
	 * the longer the group was not used; now while one goes on. */
	uint64_t first_ns, last_ns, next_ns;
	uint64_t
		gap_ns; /* typical time between the beginnings of runs (median of the last ones); 0: unknown */
};
int om_store_usage(struct om_store *s, const char *group, uint64_t window_ns, struct om_usage *ret);

/* Copy `nbytes` in. OM_EVALUE when the name exists; OM_ELIMIT or OM_EDISKFULL when not all blocks
 * without an origin would fit into HOST and DISK with room to exchange the largest. */
int om_store_add(struct om_store *s, const char *name, const char *group, const void *data,
                 uint64_t nbytes, const struct om_desc *desc, uint64_t deadline_ns);
/* An array whose elements need not lie together. `shape` has no negative dimension; strides are in
 * bytes. */
struct om_array {
	const void *data; /* the first element */
	int ndim;         /* at most OM_MAX_NDIM */
	const int64_t *shape, *strides;
	uint64_t itemsize;
};
/* The elements in C order, one behind the other; needs no store. */
void om_array_copy(const struct om_array *a, void *ret);
/* As om_store_add, of an array of `nbytes` in all: nothing is copied before there is room for it. */
int om_store_add_array(struct om_store *s, const char *name, const char *group,
                       const struct om_array *a, uint64_t nbytes, const struct om_desc *desc,
                       uint64_t deadline_ns);
/* Keep the caller's memory: it counts in the limit. `release(context)` runs once, from
 * om_store_collect, when the block's bytes are elsewhere or the block is gone and no lease is
 * left. On failure nothing is kept and `release` is not called. */
int om_store_take(struct om_store *s, const char *name, const char *group, void *data,
                  uint64_t nbytes, const struct om_desc *desc, void (*release)(void *context),
                  void *context, uint64_t deadline_ns);
/* A block of zeros that are made at its first access: until then it costs its record. The admission is
 * that of om_store_add. */
int om_store_add_zeros(struct om_store *s, const char *name, const char *group, uint64_t nbytes,
                       const struct om_desc *desc);
struct om_file_range {
	const char *path;
	uint64_t offset, nbytes;
};
#define OM_NOT_ENCODED UINT64_MAX
/* The block's bytes are these ranges, in order; read in place, on demand. The files are opened and
 * their identity is taken now. `decoded_bytes`: OM_NOT_ENCODED, or the ranges hold what om_encode
 * made, once or several times, end to end, and decode to so many bytes. */
int om_store_add_file(struct om_store *s, const char *name, const char *group,
                      const struct om_file_range *ranges, size_t count, uint64_t decoded_bytes,
                      const struct om_desc *desc);
/* The name is free now; the bytes go with the last lease. OM_ENAME when unknown. */
int om_store_remove(struct om_store *s, const char *name);
/* 1: no longer in HOST; 0: leased, still there; negative: error (the bytes are still in HOST). */
int om_store_evict(struct om_store *s, const char *name, uint64_t deadline_ns);
bool om_store_contains(struct om_store *s, const char *name);
/* All names, or those of one group (NULL: all), in the order of adding, as one om_alloc'ed array of
 * om_alloc'ed strings. */
int om_store_names(struct om_store *s, const char *group, char ***ret, size_t *ret_count);
/* The names of its groups, likewise. */
int om_store_groups(struct om_store *s, char ***ret, size_t *ret_count);
void om_names_free(char **names, size_t count);

enum om_tier_bit { OM_TIER_HOST = 1, OM_TIER_DISK = 2, OM_TIER_PACKED = 4 };
struct om_info {
	uint64_t nbytes;
	unsigned tiers; /* enum om_tier_bit: VALID copies */
	unsigned leases;
	bool has_origin;
	char origin[512]; /* path of the first range */
	uint64_t origin_offset;
	size_t origin_count;
	struct om_desc desc;
	char group[64];
};
int om_store_info(struct om_store *s, const char *name, struct om_info *ret);

struct om_tier_stats {
	uint64_t used_bytes; /* extents of copies */
	uint64_t peak_bytes;
	uint64_t limit_bytes;
	uint64_t mapped_bytes; /* HOST: segments, cached ones included; DISK: the file's size */
};
struct om_stats {
	struct om_tier_stats host, disk;
	uint64_t packed_bytes; /* of host.used_bytes, those of encoded forms */
	uint64_t packed_peak_bytes;
	uint64_t idle_bytes; /* of host.used_bytes, those that may go now */
	uint64_t
		spare_bytes; /* of idle_bytes, those of blocks with an origin: they go for nothing */
	uint64_t exported_bytes; /* of blocks with a live view (buffer, DLPack) */
	uint64_t blocks, leases;
	/* leases that found the bytes in HOST, or did not; asked for again after OM_EBUSY: counted once */
	uint64_t hits, misses;
	uint64_t fills, drops, writes; /* copies brought in, dropped for free, written to DISK */
	uint64_t read_bytes, written_bytes;   /* of device I/O, supersets included */
	uint64_t read_busy_ns, write_busy_ns; /* with at least one in flight */
	uint64_t read_p50_ns,
		read_p99_ns; /* of one request, from its issue on; 0: there was none */
	uint64_t write_p50_ns, write_p99_ns;
	unsigned in_flight, depth; /* requests now, and at most */
	unsigned moves;            /* copies on their way now */
	uint64_t stall_ns;         /* threads waited for bytes */
	/* speculation: issued, used, dropped unused */
	uint64_t prefetches, prefetch_hits, prefetch_waste;
	uint64_t verified_bytes, rereads, corrupt;
	uint64_t io_errors;
	char io_backend[16], io_reason[256];
	bool io_fell_back;
};
int om_store_stats(struct om_store *s, struct om_stats *ret);
/* Checks every invariant of csrc/README.md (I1..I6). OM_ECORRUPT naming the first broken one. */
int om_store_check(struct om_store *s);
/* Runs `release` of foreign memory that is no longer needed, on this thread, no lock held. */
void om_store_collect(struct om_store *s);

/* The last things that happened to the blocks of a store, oldest first; the counters of om_traffic are
 * their sums. */
enum om_event_kind {
	OM_EVENT_HIT,
	OM_EVENT_MISS,
	OM_EVENT_OUT,
	OM_EVENT_IN,
	OM_EVENT_PACKED_OUT, /* the encoded form of a block: its bytes and time count, the copy does not */
	OM_EVENT_PACKED_IN,
};
struct om_event {
	uint64_t at_ns; /* om_now() */
	uint64_t took_ns, bytes;
	enum om_event_kind kind;
	char group[64];
	char block[40]; /* the beginning of its name */
};
/* At most `count` events from number `from` on (0: the first one ever); *ret_next: the number after the
 * last one returned. Those that were overwritten are left out: *ret_first is the first one's number. */
int om_store_events(struct om_store *s, uint64_t from, struct om_event *ret, size_t count,
                    size_t *ret_count, uint64_t *ret_first, uint64_t *ret_next);

/* ---- numbers for those who watch ---- */

/* How high the tiers of a store came. */
struct om_peaks {
	uint64_t host_bytes, packed_bytes, disk_bytes; /* packed ones are among host's */
};
/* From its beginning to its end a mark sees how high the tiers come; any number at a time, nested or not, in any
 * order. It ends once, on any thread, also when the store is closed, which keeps what it saw. */
struct om_mark;
int om_mark_begin(struct om_store *s, struct om_mark **ret);
void om_mark_end(struct om_mark *m, struct om_peaks *ret);

/* Why a copy leaves HOST: room was needed or a limit lowered, memory is short, somebody asked for it. */
enum om_reason { OM_REASON_CAPACITY, OM_REASON_PRESSURE, OM_REASON_EXPLICIT, OM_REASONS };
/* What a request failed of: no space, EIO, the end of a file too early, all else. */
enum om_failure {
	OM_FAILURE_SPACE,
	OM_FAILURE_IO,
	OM_FAILURE_SHORT,
	OM_FAILURE_OTHER,
	OM_FAILURES
};
#define OM_HISTOGRAM_STEPS 16
struct om_histogram {
	uint64_t count, sum_ns;
	uint64_t counts[OM_HISTOGRAM_STEPS]; /* of those above the bound of the step before */
};
/* What a step holds is shorter: 8 us, times 4 from step to step; UINT64_MAX: the last. */
uint64_t om_histogram_bound_ns(unsigned step);
/* Counters that only grow, uint64_t all of them. */
struct om_totals {
	uint64_t block_hits, block_misses; /* accesses to blocks */
	uint64_t entry_hits, entry_misses; /* of caches: entries asked for */
	uint64_t gone[OM_REASONS], gone_bytes[OM_REASONS];
	uint64_t fills, read_bytes, written_bytes, stall_ns;
	uint64_t decoded_bytes, decode_ns; /* ns: summed over blocks */
	uint64_t verified_bytes, corrupt, rereads, repaired;
	uint64_t prefetches, prefetch_hits, prefetch_waste;
	uint64_t failures[2][OM_FAILURES]; /* of reads, of writes */
	uint64_t fell_back;                /* io_uring was wanted and denied */
	uint64_t in_begun_bytes, in_ended_bytes, out_begun_bytes, out_ended_bytes; /* of moves */
	struct om_histogram read, write;                                           /* requests */
	struct om_histogram in,
		out;              /* copies, from the request or decision until they are proven */
	struct om_histogram idle; /* copies that left: since their last use */
	struct om_histogram life; /* names that went: since they were added */
};
struct om_gauges {
	uint64_t moving_in_bytes, moving_out_bytes;
	uint64_t host_bytes, packed_bytes; /* packed ones are among host's */
	uint64_t entry_bytes;              /* of caches, plain; of host_bytes */
};
/* 1: it is closed, and what it counted among om_totals_closed. */
int om_store_totals(struct om_store *s, struct om_totals *ret, struct om_gauges *ret_gauges);
/* Of all stores that this process closed. Returns how many; UINT64_MAX: one is being added, ask again. */
uint64_t om_totals_closed(struct om_totals *ret);

/* ---- leases ---- */

enum om_access {
	OM_READ,  /* for reading, beside others */
	OM_WRITE, /* alone: waits until nobody else holds the bytes, then drops the other copies and
	           * the origin */
	OM_SHARE, /* for reading and writing, beside others that do: it drops the origin; whether other
	           * copies still hold the same bytes is found out when the memory is given up */
};
/* Bring the bytes to HOST if they are not there, and hold them. OM_EPACKED: they are there only as a
 * face encoded them: see om_store_unpack. */
int om_store_lease(struct om_store *s, const char *name, enum om_access access,
                   uint64_t deadline_ns, struct om_lease **ret);
/* As om_store_lease for reading, if the bytes are in HOST: never waits, does no work owed on them.
 * OM_EAGAIN (no error is set) when om_store_lease must decide. */
int om_store_lease_now(struct om_store *s, const char *name, struct om_lease **ret);
void *om_lease_data(const struct om_lease *l); /* never NULL, also for zero bytes */
uint64_t om_lease_nbytes(const struct om_lease *l);
const struct om_desc *om_lease_desc(const struct om_lease *l);
const char *om_lease_name(const struct om_lease *l);
bool om_lease_writable(const struct om_lease *l);
void om_lease_ref(struct om_lease *l);
/* Any thread, without the GIL, after close, at exit: an atomic decrement and, at zero, a push to a
 * lock-free list. No lock, no Python. */
void om_lease_unref(struct om_lease *l);
/* As ref and unref, for a reference that a foreign consumer holds: it shows in exported_bytes. */
void om_lease_view_ref(struct om_lease *l);
void om_lease_view_unref(struct om_lease *l);
/* Take what om_lease_unref pushed, if the store's lock is free; never waits. */
void om_store_drain(struct om_store *s);

/* ---- blocks by reference ---- */

/* The record of a block, which stays as it is when the block is removed: every function below then
 * returns OM_ENAME. Let go with om_block_unref. */
int om_store_block(struct om_store *s, const char *name, struct om_block **ret);
void om_block_ref(struct om_block *b);
void om_block_unref(struct om_block *b); /* any thread */
/* A place for the binding, NULL at first; the core never reads it. Its user serialises. */
void **om_block_face(struct om_block *b);
const char *om_block_name(const struct om_block *b);
/* A lease at once released: bring the bytes to HOST, and count an access. They stay as long as nobody
 * needs the room. *ret is a reference. A block of another group is OM_ENAME. */
int om_store_access(struct om_store *s, const char *group, const char *name, uint64_t deadline_ns,
                    struct om_block **ret);
/* The same if the bytes are in HOST, else OM_EAGAIN, with no error set; never waits. */
int om_store_access_now(struct om_store *s, const char *group, const char *name,
                        struct om_block **ret);
/* As om_store_lease. Counts as an access only if the bytes have to be brought in. */
int om_block_lease_bytes(struct om_store *s, struct om_block *b, enum om_access access,
                         uint64_t deadline_ns, struct om_lease **ret);
/* A pinned block's bytes, once in HOST, are never chosen to go. `tag` is the caller's. */
int om_block_mark(struct om_store *s, struct om_block *b, bool pinned, uint8_t tag);
struct om_block_state {
	uint64_t nbytes, created_ns, accessed_ns, accesses;
	uint64_t data;        /* address of the bytes in HOST; 0: not there */
	uint64_t disk_offset; /* in the swap file, where `on_disk` */
	unsigned leases;
	uint8_t tag;
	bool named, pinned, swapped, on_disk;
	bool blank; /* never accessed: no bytes yet */
};
/* Never fails: of a removed block it tells what is left. */
void om_block_state(struct om_store *s, struct om_block *b, struct om_block_state *ret);
struct om_outlook {
	uint64_t accesses, most_accesses; /* of the block, and of that of its group with the most */
	uint64_t age; /* accesses of the group since its last one, that included; 0: long ago */
	uint64_t distance; /* accesses until it is expected; UINT64_MAX: it is not foretold */
};
/* How likely it is that a block is wanted soon; a group that foresees nothing knows of no age and no
 * distance. */
int om_block_outlook(struct om_store *s, struct om_block *b, struct om_outlook *ret);
/* The blocks of a group with the most accesses (`most`) or the fewest, at most `count`, in that order.
 * Each *ret is a reference. Walks all blocks. */
int om_store_ranked(struct om_store *s, const char *group, bool most, size_t count,
                    struct om_block **ret, uint64_t *ret_accesses, size_t *ret_count);

/* ---- swapping out ---- */

struct om_swapped {
	uint64_t blocks, bytes; /* that left HOST by this call */
};
/* Move idle blocks of a group out, as its policy says, until `bytes` of HOST are free (0: until what is on
 * its way out is out), nothing more can go, or the disk refuses (see om_group_stats.trouble). It is no more
 * than the group has at the beginning: what others bring back meanwhile keeps nobody here. One thread.
 * om_swap_wait returns 0 when it is done and their memory is the system's again, but for a warm reserve;
 * OM_EBUSY at the deadline: call again to go on. What is being written when om_swap_end is called goes on. */
struct om_swap;
int om_swap_begin(struct om_store *s, const char *group, uint64_t bytes, struct om_swap **ret);
int om_swap_wait(struct om_swap *w, uint64_t deadline_ns);
void om_swap_end(struct om_swap *w, struct om_swapped *ret);
/* Memory is short, as `level` says, or no longer (OM_LOW). From OM_MEDIUM on nothing is fetched on a guess, and
 * memory that no block has used for a second, from OM_HIGH on any that no block uses, goes back to the system (but
 * for a stream's ring, unless it is OM_CRITICAL). `bytes` of HOST go besides: more of what no block uses, then
 * idle blocks, those of the groups whose next use is furthest first; what must be written is written. `ceiling`
 * (0..1): the share in use of the tightest memory of the process from which on the store gives up idle blocks
 * before it takes more; 0: the default, 0.9, and no less than 64 MiB (or a quarter) left for others. That is so in
 * every store, pressed or not; what is leased may still grow to host_limit_bytes. OM_EBUSY at the deadline: the
 * rest is on its way, *ret tells what went. OM_EVALUE: no such ceiling. */
struct om_pressed {
	uint64_t trimmed_bytes; /* that no block used */
	uint64_t dropped_bytes, dropped_blocks;
	uint64_t written_bytes, written_blocks;
	uint64_t left_bytes; /* of idle blocks, still there */
};
int om_store_press(struct om_store *s, enum om_level level, double ceiling, uint64_t bytes,
                   uint64_t deadline_ns, struct om_pressed *ret);
/* The same in steps, on one thread, for who waits in slices: wait until it is 0. */
struct om_press;
int om_press_begin(struct om_store *s, enum om_level level, double ceiling, uint64_t bytes,
                   struct om_press **ret);
int om_press_wait(struct om_press *p, uint64_t deadline_ns);
void om_press_end(struct om_press *p, struct om_pressed *ret);
/* Give memory that no block uses back to the system, but for `reserve` bytes that stay populated, and what
 * is free in the swap file. Both happen by themselves after ten seconds, with a reserve of 16 MiB. What the C
 * library keeps of memory that was freed goes back as well. */
int om_store_trim(struct om_store *s, uint64_t reserve_bytes);
/* Another limit of the swap file; and another directory (NULL: as it is), OM_EVALUE once there is a
 * file. */
int om_store_disk(struct om_store *s, const char *directory, uint64_t limit_bytes);

/* Blocks that a face encodes (the core calls nobody). The victim that the policy would choose, leased
 * for reading; OM_EAGAIN (no error set): there is none. */
int om_store_victim(struct om_store *s, const char *group, struct om_lease **ret);
/* `data` is what the leased bytes were encoded to: it replaces all other copies but the one in HOST, and is
 * on its way to DISK. `codec` is the caller's number of who encoded. OM_EBUSY: others lease the bytes, or
 * have leased them since `l` was made, and may have written to them; or somebody did who leased them for
 * reading, and what lies below is what counts. */
int om_lease_pack(struct om_lease *l, const void *data, uint64_t nbytes, uint8_t codec);
/* The encoded form of a block whose only bytes it is; OM_EAGAIN (no error set): it is not. */
int om_block_lease_packed(struct om_store *s, struct om_block *b, uint64_t deadline_ns,
                          struct om_lease **ret, uint8_t *ret_codec);
/* `data` is what that was decoded to. OM_ECORRUPT when it is not what was encoded: nothing is lost. */
int om_block_unpack(struct om_store *s, struct om_block *b, const void *data, uint64_t nbytes,
                    uint64_t deadline_ns);

/* ---- tickets ---- */

/* Start bringing blocks to HOST. What has no room at once starts when the ticket is waited for. */
int om_store_prefetch(struct om_store *s, const char *const *names, size_t count,
                      struct om_ticket **ret);
/* 0 when all are there; the first error of any; OM_EBUSY at the deadline; OM_ECANCELED. */
int om_ticket_wait(struct om_ticket *t, uint64_t deadline_ns);
bool om_ticket_done(struct om_ticket *t); /* settled: whole, failed or canceled */
/* What is queued is dropped, what is in flight is dropped when it lands. */
void om_ticket_cancel(struct om_ticket *t);
void om_ticket_free(struct om_ticket *t); /* does not cancel */

/* ---- streams ---- */

enum om_keep { /* what of a unit's block is in HOST all the time */
	       OM_KEEP_NOTHING,
	       OM_KEEP_PLAIN,
	       OM_KEEP_FAST, /* its bytes encoded (enum om_coding), decoded while the unit is in use; nothing where
	               * that would hardly be smaller */
	       OM_KEEP_BALANCED,
};
struct om_stream_unit {
	const char *name;
	const char *const *blocks; /* names, all in the stream's group */
	const uint8_t *keep;       /* per block: enum om_keep */
	size_t count;
};
struct om_stream_stats {
	uint64_t enters, hits;  /* of units with streamed blocks: entered, bytes were there */
	uint64_t packed_bytes;  /* of forms that are kept */
	uint64_t decoded_bytes; /* plain bytes that were decoded */
	uint64_t timed_bytes,
		timed_ns;    /* of these, all but the first time of each block; how long it took */
	uint64_t stall_ns;   /* waited in enter */
	uint64_t read_bytes; /* of this stream's fills, supersets included */
	uint64_t mispredicted; /* enters that the recorded order did not foretell */
	uint64_t users;        /* entered and not left now, over all units */
};

/* Units are numbered by their place in `units`. Their order is the first prediction; the recorded
 * order replaces it as units are entered. `group` must hold the blocks. */
int om_stream_create(struct om_store *s, const char *group, const struct om_stream_unit *units,
                     size_t count, struct om_stream **ret);
/* Lease the resident blocks (reading them), encode what is kept encoded. Call again after OM_EBUSY to go
 * on. */
int om_stream_load(struct om_stream *st, uint64_t deadline_ns);
/* Before loading: what is encoded is kept only as long as so many bytes of the group's limit are left for
 * what passes through the ring, beside all that is kept. */
int om_stream_reserve(struct om_stream *st, uint64_t ring_bytes);
/* Keep nothing of a unit encoded any more, and give the memory back: its bytes come from their origin. */
int om_stream_forget(struct om_stream *st, size_t unit);
/* A thread begins to use a unit: its streamed blocks are leased all or none (for sharing, where they have no
 * origin), then the next units of the order are fetched into what room the ring has, or what other groups have
 * idle and can read again. *ret_bind: the caller is the first, must make the windows and then call
 * om_stream_bound; others wait for that. */
int om_stream_enter(struct om_stream *st, size_t unit, uint64_t deadline_ns, bool *ret_bind);
/* The windows are made (ok), or could not be (the unit is given back). */
void om_stream_bound(struct om_stream *st, size_t unit, bool ok);
/* A thread is done with a unit. *ret_unbind: it was the last, must take the windows away and then
 * call om_stream_unbound, which lets the bytes go. */
int om_stream_leave(struct om_stream *st, size_t unit, bool *ret_unbind);
void om_stream_unbound(struct om_stream *st, size_t unit);
/* Enter a unit, where all units of the stream are kept and bound, and leave one that stays bound: at once, with
 * nothing to read or to bind. False: not now, or not at all; om_stream_enter and om_stream_leave do it, or say why. */
bool om_stream_join(struct om_stream *st, size_t unit);
bool om_stream_part(struct om_stream *st, size_t unit);
/* A unit that is kept has one user more, the stream: once entered, it stays bound when the others have left, until
 * it is not kept any more. *ret_unbind: nobody uses it now, the caller must take the windows away and call
 * om_stream_unbound. */
int om_stream_keep(struct om_stream *st, size_t unit, bool kept, bool *ret_unbind);
/* Whether what a unit lets go stays in HOST, idle, until somebody needs the room, or (as at first) leaves at
 * once: it is dropped, or written out where nothing below holds it. */
int om_stream_linger(struct om_stream *st, bool lingers);
/* The lease of a unit's block: those kept plain always (after load), others while entered.
 * Borrowed; NULL when there is none. */
struct om_lease *om_stream_lease(struct om_stream *st, size_t unit, size_t block);
int om_stream_stats(struct om_stream *st, struct om_stream_stats *ret);
/* Lets all its leases go and forgets. Views keep their bytes. */
void om_stream_free(struct om_stream *st);

/* ---- pools ---- */

/* A bank: memory without names that one device has, cut into chunks of any size. Its limit is no
 * reservation: addresses are taken ahead, pages come as they are touched, and those of free ranges go back to
 * the system, 2 MiB at a time. */
struct om_bank_config {
	const char *name; /* in messages; copied */
	uint64_t limit_bytes;
	bool locked; /* out of the kernel's swap (mlock) */
	/* What nobody has used goes back to the system after half as long at least, as long at most, on
	 * the thread that calls om_bank_decay. 0: at once. */
	uint64_t decay_ns;
	/* Above this fragmentation (see om_bank_stats): at once, too. */
	double most_fragmented;
};
#define OM_BANK_GRANULE   UINT64_C(256)       /* of chunks; their least alignment */
#define OM_BANK_MAX_ALIGN (UINT64_C(2) << 20) /* the largest */

int om_bank_create(const struct om_bank_config *config, struct om_bank **ret);
/* Every later call returns OM_ECLOSED. What has a view stays valid until the last one goes. *ret_chunks and
 * *ret_bytes (asked for): what nobody had freed. Idempotent: then 0 of both. */
int om_bank_close(struct om_bank *b, uint64_t *ret_chunks, uint64_t *ret_bytes);
void om_bank_ref(struct om_bank *b);
void om_bank_unref(struct om_bank *b); /* any thread; the last one closes */

/* A chunk of at least `bytes` at a multiple of `align` (a power of two to OM_BANK_MAX_ALIGN). Its content is
 * whatever the last user left, or zeros. `label` (NULL: none) is copied, for reports. OM_ELIMIT with
 * the details: more than the limit, or no free range is large enough (the text tells which). */
int om_bank_alloc(struct om_bank *b, uint64_t bytes, uint64_t align, const char *label,
                  struct om_chunk **ret);
/* The same, but OM_EAGAIN (no error is set) where there is no room: for callers that make some. */
int om_bank_try(struct om_bank *b, uint64_t bytes, uint64_t align, const char *label,
                struct om_chunk **ret);
/* The chunk is gone for the caller; its bytes stay as long as there are views. OM_EVALUE: a chunk of another
 * bank, or freed before (as long as its record was not used again). */
int om_bank_free(struct om_bank *b, struct om_chunk *c);
/* Is there something for om_bank_decay to do? Never waits. */
bool om_bank_due(const struct om_bank *b);
/* Give back what nobody has used for so long. Who allocates and frees calls it when it is due: nobody else does. */
int om_bank_decay(struct om_bank *b);
/* Give all pages of free ranges back now; *ret_bytes: how much. */
int om_bank_trim(struct om_bank *b, uint64_t *ret_bytes);
/* Another limit. Below what is held: nothing is taken away, and nothing more is given until enough is
 * freed. */
int om_bank_set_limit(struct om_bank *b, uint64_t limit_bytes);

/* A reference to the bytes of a chunk, for a consumer. It counts as a use. OM_EVALUE once it is freed. */
int om_chunk_view_ref(struct om_chunk *c);
/* Any thread, without the GIL, after close, at exit: atomic decrements and, at zero, a push to a lock-free
 * list; of a closed bank, the last one unmaps. */
void om_chunk_view_unref(struct om_chunk *c);
/* A place for the binding, NULL at first; the core never reads it. Its user serialises. */
void **om_chunk_face(struct om_chunk *c);

/* Of a chunk that is not freed; the caller sees to that. */
struct om_chunk_state {
	void *data;
	uint64_t bytes, held;         /* asked for; taken from the limit */
	uint64_t serial;              /* number of its allocation in this bank, from 1 */
	uint64_t created_ns, used_ns; /* clock of om_now(), to a few milliseconds */
	uint64_t uses;                /* allocation, and each view */
	unsigned views;
	const char *label; /* NULL: none; valid until it is freed */
};
void om_chunk_state(struct om_chunk *c, struct om_chunk_state *ret);
void *om_chunk_data(const struct om_chunk *c);
uint64_t om_chunk_bytes(const struct om_chunk *c);
/* The chunk with that number, or NULL. */
int om_bank_find(struct om_bank *b, uint64_t serial, struct om_chunk **ret);
/* All chunks that are not freed, the one used longest ago first, as one om_alloc'ed array. */
int om_bank_chunks(struct om_bank *b, struct om_chunk ***ret, size_t *ret_count);
/* Chunks that, freed together, make room for `bytes` in one piece, the one used longest ago first, as one
 * om_alloc'ed array (NULL: there is room): the oldest that has no view, then the older of those at the two
 * ends of the hole that this gives, until it fits. Chunks that lie together were mostly used together, so
 * that hardly any is young, and hardly a byte is left over. OM_ELIMIT: no chunks without views do. */
int om_bank_victims(struct om_bank *b, uint64_t bytes, uint64_t align, struct om_chunk ***ret,
                    size_t *ret_count);

struct om_bank_stats {
	uint64_t limit_bytes;
	uint64_t used_bytes, peak_used_bytes; /* asked for */
	uint64_t held_bytes, peak_held_bytes; /* in granules; of chunks freed under a view, too */
	uint64_t freed_bytes;                 /* of these: freed, held by views */
	uint64_t exported_bytes;              /* with a view */
	uint64_t mapped_bytes;                /* pages that were handed out and did not go back */
	uint64_t free_bytes;                  /* limit - held */
	uint64_t largest_bytes;               /* of these, in one piece */
	double fragmentation;                 /* 1 - largest / free; 0 when nothing is free */
	uint64_t chunks, allocs, frees, fails;
};
int om_bank_stats(struct om_bank *b, struct om_bank_stats *ret);
/* Whether all sums and lists agree. OM_ECORRUPT naming the first that does not. */
int om_bank_check(struct om_bank *b);

/* ---- a policy for bytes that somebody else keeps ---- */

/* Who goes next among members that the caller moves himself, by the policies that stores use. An id
 * is known by its slot, a small number from 0; one that is no member is OM_ENAME. Not thread safe:
 * the caller serialises. */
struct om_ranking;
/* `policy`: as in om_store_policy; OM_EVALUE: another one. `capacity`: the bytes that members can
 * have together, for policies that want to know; 0: the most that they had so far. */
int om_ranking_create(const char *policy, uint64_t capacity, struct om_ranking **ret);
void om_ranking_free(struct om_ranking *r);
/* A member comes in, last used at `used_at` (any clock). LRU gives it its place by that time, after
 * those of the same time, in as many steps as members were used later; to other policies it is used
 * now. `known`: the slot that its id has or had, else -1; a member is added anew. Returns the slot,
 * or an error: OM_EVALUE for no bytes, for more than 2^63 in all, for a time that is not finite.
 * The slot may be that of an id that was removed, whose `known` is -1 from then on: the one removed
 * first goes first, and a policy that learns about ids that are gone keeps the last 1024 of them, or
 * 8 for each member if that is more. */
int64_t om_ranking_add(struct om_ranking *r, int64_t known, uint64_t bytes, double used_at);
/* Is no member any more; it made way for others, and may come back. */
int om_ranking_remove(struct om_ranking *r, int64_t slot);
/* A member is used now: at `used_at`, or when the last use was if that is later. */
int om_ranking_access(struct om_ranking *r, int64_t slot, double used_at);
/* Whether a member is passed by; until its next use, or until it is added anew. */
int om_ranking_pass(struct om_ranking *r, int64_t slot, bool pass);
/* The member to give up, -1 when there is none that is not passed by. It stays one until it is removed.
 * Who finds that it cannot go passes it by and asks again: the policy goes on where it was. So what
 * cannot go is judged when it is chosen, and not before (under CLOCK, after its second chance). */
int64_t om_ranking_victim(struct om_ranking *r);

/* ---- memory pressure ---- */

struct om_memory {
	uint64_t total_bytes, available_bytes;
	char source[256]; /* "system", or "cgroup DIRECTORY" */
};
/* What this process can still have: the tightest of the system and of every memory cgroup (versions 1 and
 * 2) from its own up to the root, by share in use. Page cache that can be dropped at once is not in
 * use. Read anew at each call. `root` goes before every path (NULL: none), for tests. */
int om_memory_now(const char *root, struct om_memory *ret);

#define OM_PLACES 16
#define OM_GPUS   16
#define OM_UNTOLD UINT64_MAX /* the system does not tell it: never 0 */
/* Where memory is limited. */
struct om_place {
	uint64_t limit_bytes; /* the lower of a cgroup's max and high */
	uint64_t high_bytes;  /* above it a cgroup is slowed down; 0: nowhere */
	uint64_t used_bytes;  /* page cache that can be dropped at once is not in use */
	uint64_t available_bytes;
	char source[256]; /* as in om_memory */
};
struct om_gpu {
	unsigned index; /* NVML's */
	char uuid[96], name[96];
	uint64_t total_bytes, free_bytes;
};
/* How often limits of our cgroup and those above it were met, ever (version 1 tells MAX and OOM_KILL). */
enum om_strain { OM_STRAIN_HIGH, OM_STRAIN_MAX, OM_STRAIN_OOM, OM_STRAIN_OOM_KILL, OM_STRAINS };
struct om_sample {
	uint64_t at_ns; /* om_now() */
	uint64_t swap_total_bytes, swap_free_bytes;
	uint64_t rss_bytes;
	/* Some thread, all threads waited for memory so long, ever: of our cgroup, else of the machine. */
	uint64_t stall_some_us, stall_full_us;
	uint64_t strains[OM_STRAINS];
	/* The system, and every cgroup with a limit, ours first; GPUs that this process may use, without those that are
	 * cut into MIG devices. What lies behind the last one means nothing. */
	unsigned place_count, gpu_count;
	struct om_place places[OM_PLACES];
	struct om_gpu gpus[OM_GPUS];
};

/* A level of pressure from shares in use, and its trend. A level is entered at once when the share
 * reaches its threshold, and left 0.05 below it. */
struct om_pressure;
/* `thresholds`: of MEDIUM, HIGH, CRITICAL; OM_EVALUE unless they rise from above 0 to at most 1. */
int om_pressure_create(const double thresholds[3], struct om_pressure **ret);
void om_pressure_free(struct om_pressure *p);
/* Others; they count from the next share on. OM_EVALUE as above: those there were stay. */
int om_pressure_set(struct om_pressure *p, const double thresholds[3]);
void om_pressure_get(struct om_pressure *p, double ret_thresholds[3]);
enum om_level om_pressure_feed(struct om_pressure *p, double usage);
/* 1 rising, -1 falling, 0 neither: by the line through the shares of the last minute. */
int om_pressure_trend(struct om_pressure *p);

/* ---- the monitor ---- */

/* Takes samples, on a thread of its own ("omnimem-monitor") or on the caller's, decides on a level from each (by
 * the rules in core/om_pressure.h: RAM by the tightest place, stalls, the time that is left, limits that were met;
 * each GPU by its share in use; the highest counts), keeps their history, and with `act` has the stores and
 * banks that it watches give memory back:
 * from MEDIUM on what nobody uses; from HIGH on what the C library holds, too, and idle bytes of the stores, so that
 * less is in use, spare ones included, than where the level is left, at most a twentieth of all in one step unless
 * it is CRITICAL, in proportion to what each has idle; none while use falls by itself by 15 % a sample. At any
 * level idle bytes go when less is left than stores leave by themselves (om_store_press). What a GPU lacks, no
 * store can give. */
struct om_monitor_config {
	double thresholds[3]; /* shares in use at which MEDIUM, HIGH and CRITICAL begin */
	uint64_t
		interval_ns; /* between samples at most: 10 ms to a day. The nearer the end, the more often:
	                       * what is left, by the fastest growth seen (which is forgotten by half a
	                       * minute), down to 50 ms */
	bool act;
	const char *root; /* goes before every path (NULL: none), for tests */
};
/* OM_EVALUE: thresholds that do not rise from above 0 to at most 1, another interval. */
int om_monitor_create(const struct om_monitor_config *config, struct om_monitor **ret);
/* Stops, lets go of what is watched and wakes who waits. Every later call returns OM_ECLOSED. Idempotent. */
int om_monitor_close(struct om_monitor *m);
void om_monitor_free(struct om_monitor *m); /* closes; nobody may be inside */
/* Counted: as often unwatched as watched. One that was closed leaves by itself. What is no longer watched, or when
 * the monitor stops, is told that memory is not short any more. */
int om_monitor_watch(struct om_monitor *m, struct om_store *s);
int om_monitor_unwatch(struct om_monitor *m, struct om_store *s);
int om_monitor_watch_bank(struct om_monitor *m, struct om_bank *b);
int om_monitor_unwatch_bank(struct om_monitor *m, struct om_bank *b);
/* Start and stop its thread. Both idempotent. */
int om_monitor_start(struct om_monitor *m);
int om_monitor_stop(struct om_monitor *m);
bool om_monitor_running(struct om_monitor *m);

enum om_course { OM_STABLE, OM_RISING, OM_FALLING, OM_OSCILLATING };
#define OM_PEAK_BLOCKS 16
struct om_large {
	uint64_t nbytes;            /* of HOST */
	char block[128], group[64]; /* the beginning of its name */
};
/* Put the largest blocks of a store among those that are there, `*count` so far, in order. */
int om_store_largest(struct om_store *s, struct om_large ret[OM_PEAK_BLOCKS], unsigned *count);
struct om_peak {
	uint64_t bytes, at_ns, wall_ns;
	/* The largest blocks in HOST of the stores watched, when it was last at least 1 % above the former list. */
	unsigned count;
	struct om_large blocks[OM_PEAK_BLOCKS];
};
struct om_report {
	uint64_t number; /* of the sample, from 1 */
	bool asked; /* somebody took it by om_monitor_sample or _report: not the monitor's thread */
	uint64_t wall_ns;  /* CLOCK_REALTIME */
	unsigned tightest; /* which place of the sample's */
	/* Of what is in use there: idle blocks, of stores that are watched and pressed, that lie in files too. Like page cache
	 * that can be dropped at once they are not in use for levels and trend: they go before memory runs out. */
	uint64_t spare_bytes;
	double usage; /* share in use there, without the spare ones */
	enum om_level level, ram_level, gpu_levels[OM_GPUS];
	uint64_t level_since_ns;
	uint64_t transitions[4]; /* by level entered */
	char cause[512];         /* of the level, in numbers; "" when it is LOW */
	/* Shares of time stalled, over a second or since the last sample if that is longer; NaN: unknown. */
	double some, full;
	/* Of the bytes in use at the tightest place, without the spare ones, by the line through the last 30 s. */
	unsigned samples;
	double slope, r2; /* bytes a second; NaN with fewer than 8 samples */
	double seconds_left; /* NaN unless it rises, has risen for the last 5 s too, r2 >= 0.5, and the line is a
	                      * quarter as long at least */
	enum om_course course; /* a thousandth of all in a second is nothing */
	uint64_t interval_ns;  /* to the next sample */
	uint64_t lag_ns;       /* it came so late */
	uint64_t busy_ns;      /* processor time that all samples took */
	struct om_sample sample;
	struct om_peak peak;
};
/* Take a sample now, on this thread; and act, as the monitor's thread would. */
int om_monitor_sample(struct om_monitor *m, struct om_report *ret);
/* The last one; takes one if there was none. */
int om_monitor_report(struct om_monitor *m, struct om_report *ret);
/* Until a sample's number is above `since` and its level at least `level`; *ret_number: the last one's. OM_EBUSY (no
 * error is set) at the deadline. */
int om_monitor_wait(struct om_monitor *m, int64_t since, enum om_level level, uint64_t deadline_ns,
                    uint64_t *ret_number);
/* For who acts on samples, and is to sleep while nothing happens: as long as its thread runs, until there were more
 * than `since` stirs. *ret_stirs: how many there were. OM_EBUSY at the deadline, OM_ECANCELED when its thread does not
 * run (no error is set). A stir is om_monitor_stir, and each sample but a quiet one: one that the thread took at LOW
 * after one at LOW, while no end is in sight, and less than `usage` of RAM and of each GPU is in use. Every eighth is a
 * stir too, so that the reports since then are still there. */
int om_monitor_follow(struct om_monitor *m, uint64_t since, double usage, uint64_t deadline_ns,
                      uint64_t *ret_stirs);
int om_monitor_stir(struct om_monitor *m);
/* Reports of the last 16 samples, those with a number above `since` that its thread took, as one om_alloc'ed array, the
 * oldest first. */
int om_monitor_recent(struct om_monitor *m, uint64_t since, struct om_report **ret,
                      size_t *ret_count);
/* Bytes in use at the tightest place: of each of the last 600 seconds (`seconds` 1), 720 times 10 s or 1440 minutes
 * in which there was a sample, as one om_alloc'ed array, the oldest first. OM_EVALUE: other `seconds`. */
struct om_span {
	uint64_t start_ns, min_bytes, max_bytes, last_bytes;
	double mean_bytes;
};
int om_monitor_history(struct om_monitor *m, unsigned seconds, struct om_span **ret,
                       size_t *ret_count);
/* What it did, the last 256. TRIM: unused memory went back; EVICT: idle blocks went; HEAP: the C library's; RELAX:
 * told that memory is not short any more; NONE: bytes were wanted and nothing idle was left (told once, until
 * something else happens). */
enum om_action_kind { OM_ACT_TRIM, OM_ACT_EVICT, OM_ACT_HEAP, OM_ACT_RELAX, OM_ACT_NONE };
struct om_action {
	uint64_t number, at_ns, wall_ns; /* number: from 1 */
	enum om_action_kind kind;
	enum om_level level;
	uint64_t wanted_bytes, freed_bytes;
	char cause[768];
};
/* Those with a number above `since`, as one om_alloc'ed array. */
int om_monitor_actions(struct om_monitor *m, uint64_t since, struct om_action **ret,
                       size_t *ret_count);

/* ---- codec ---- */

#define OM_CODED_PART UINT64_C(262144) /* plain bytes that are encoded on their own */

/* Room that om_encode needs for `nbytes`. */
uint64_t om_encode_bound(uint64_t nbytes);
/* Encode `nbytes` of elements like `desc` into `ret`, of `room` bytes. Where `desc` is
 * NULL, unknown, of no type that the codec has or not worth it, a sample of each part decides what its bytes
 * are taken for. *ret_bytes: how long the result is; 0: less than 5 % would be saved, which a sample
 * tells in most cases, or it would not fit in less room than om_encode_bound, and nothing in `ret` is of use;
 * never with NONE, for which less room is OM_EVALUE. The result, a frame, depends on the
 * bytes, `desc` and `coding` alone, not on the processor. Frames may follow each other without a gap.
 * OM_EVALUE: no such coding. */
int om_encode(const void *data, uint64_t nbytes, const struct om_desc *desc, enum om_coding coding,
              void *ret, uint64_t room, uint64_t *ret_bytes);
/* What om_encode made, a frame or several end to end: *ret_nbytes plain bytes in all, and how (the densest
 * of their codings). OM_ECORRUPT: not made by it or by another version of it, or damaged in what comes before
 * the parts, or followed by other bytes. */
int om_coded_info(const void *coded, uint64_t coded_bytes, uint64_t *ret_nbytes,
                  enum om_coding *ret_coding);
/* Decode all of it, a frame or several, into `ret`, `nbytes` long, and compare the checksums of the plain
 * bytes. OM_ECORRUPT for whatever om_encode did not make, or not of `nbytes`; `ret` then has any bytes. Reads
 * and writes nothing out of bounds, whatever the input (which nobody may change meanwhile). */
int om_decode(const void *coded, uint64_t coded_bytes, void *ret, uint64_t nbytes);

/* For tests and benchmarks: by which instructions the process codes from now on. False: this processor
 * cannot. */
enum om_codec_path { OM_PATH_AUTO, OM_PATH_PLAIN, OM_PATH_AVX2, OM_PATH_AVX512 };
bool om_codec_use(enum om_codec_path path);

/* The same in three steps, for one frame, so that several threads can decode it. */
struct om_coded {
	const uint8_t *data; /* the caller's; it must outlive this */
	uint64_t bytes;      /* of the frame */
	uint64_t nbytes,
		parts; /* plain bytes; parts of OM_CODED_PART of them, the last one shorter */
	uint64_t hash; /* XXH3-64 of the plain bytes */
	enum om_coding coding;
	/* Write past the caches where `ret` is aligned to 64. Right for what is larger than they are or what a
	 * device reads next; om_coded_open chooses by size, and the caller may choose otherwise. */
	bool stream;
};
/* Prove the header and the table of parts. Other bytes, the next frame's, may follow the frame's own
 * (`bytes`) among `coded_bytes`. Nothing to free. */
int om_coded_open(const void *coded, uint64_t coded_bytes, struct om_coded *ret);
/* Decode `count` parts from `first` on into their places in `ret`, which has room for all of `nbytes`. Any
 * thread, any order; a few parts at a time, since each call of a BALANCED one allocates. The checksum is not
 * looked at. */
int om_coded_part(const struct om_coded *c, uint64_t first, uint64_t count, void *ret);
/* Compare the checksum of all the plain bytes. */
int om_coded_check(const struct om_coded *c, const void *ret);
/* Decode it, a few parts at a time, and compare with `data`, `nbytes` long. OM_ECORRUPT: it differs. */
int om_coded_compare(const struct om_coded *c, const void *data);

/* Encode a block's bytes (bringing them to HOST), and keep the form in HOST: it is decoded when the bytes
 * are needed next, and what is in HOST plain may go for nothing. *ret_bytes: of the form; 0: it would hardly
 * be smaller, the block stays as it is. */
int om_store_encode(struct om_store *s, const char *name, enum om_coding coding,
                    uint64_t deadline_ns, uint64_t *ret_bytes);

/* ---- simulation ---- */

#define OM_EXPERTS 4 /* that the adaptive policy follows */
const char *om_expert_name(unsigned expert);

struct om_simulation {
	uint64_t requests, misses;
	uint64_t bytes, missed_bytes;
	uint64_t led[OM_EXPERTS]; /* adaptive: re-uses for which each expert led */
};
/* What a cache of `capacity` would have missed: a trace through the policies that stores use.
 * Requests for `ids`, in order; sizes[i] belongs to ids[i] (NULL: 1 each). What is larger than the
 * capacity is missed and never kept. `policy`: "lru", "clock", "s3fifo", "sieve", "adaptive", or
 * "belady": the best that can be done by one that knows the future and keeps what was asked for last
 * (exact for equal sizes). Needs no store; any thread. OM_EVALUE: another policy, no capacity, an id
 * with two sizes, too many requests. */
int om_simulate(const uint64_t *ids, const uint64_t *sizes, size_t count, uint64_t capacity,
                const char *policy, struct om_simulation *ret);

#endif
