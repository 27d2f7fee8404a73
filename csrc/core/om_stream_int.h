/*
 * om_stream_int: a stream's inside, shared by om_stream.c (units in use, the ring) and om_keep.c (what is in
 * HOST all the time, or as long as it is told to).
 */
#ifndef OM_STREAM_INT_H
#define OM_STREAM_INT_H

#include "core/om_pattern.h"
#include "core/om_store_int.h"

enum om_unit_state { OM_UNIT_IDLE, OM_UNIT_BINDING, OM_UNIT_BOUND, OM_UNIT_UNBINDING };

struct om_unit {
	char *name;
	enum om_unit_state state;
	unsigned users;
	bool kept; /* the stream is a user of it: bound, it stays so */
	size_t count, streamed_count;
	struct om_block **blocks; /* streamed ones first */
	struct om_lease **leases; /* in the order of `blocks` */
	struct om_lease **forms;  /* likewise: of the forms that are kept */
	uint8_t *keep;            /* likewise: enum om_keep */
	size_t *place;            /* caller's index -> index in `blocks` */
};

struct om_stream {
	struct om_store *store;
	struct om_group *group;
	struct om_unit *units;
	size_t count;
	size_t settled;            /* units that are kept, and bound */
	bool lingers;              /* what a unit lets go stays in HOST, idle */
	bool opened;               /* the group counts this stream */
	struct om_pattern pattern; /* of units that have streamed blocks */
	struct om_stream_stats stats;
	uint64_t read_bytes_before, decoded_bytes_before, timed_bytes_before, timed_ns_before;
	uint64_t ring_bytes; /* that what is kept leaves */
	uint32_t *ahead;     /* scratch: units foretold, in order */
};

/* om_stream.c */
/* Lease some of a unit's blocks, all or none. */
int om_stream_lease_unit_locked(struct om_stream *st, struct om_unit *u, size_t first, size_t count,
                                uint64_t deadline_ns, uint64_t *ret_stall_ns);
/* OM_EVALUE: there is no unit of that number. */
int om_stream_check_unit(const struct om_stream *st, size_t unit);

/* om_keep.c */
/* Give up a block's plain bytes, and a form that is not kept. */
void om_stream_forget_block_locked(struct om_stream *st, struct om_block *b);

#endif
