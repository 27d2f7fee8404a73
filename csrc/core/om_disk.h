/*
 * om_disk: the DISK tier: one nameless swap file and an arena over its offsets.
 *
 * A copy is a list of runs (whole pages), so that any free room can be used. Under the store lock,
 * but for om_disk_grow's system call, which the caller makes without it. Records only; the bytes
 * are moved by the mover.
 */
#ifndef OM_DISK_H
#define OM_DISK_H

#include <stddef.h>

#include "core/om_arena.h"
#include "plat/om_file.h"

struct om_run {
	uint64_t offset, bytes;
};

struct om_disk_copy {
	struct om_run *runs;
	size_t count;
	uint32_t head; /* the block's first byte, within the first page */
};

struct om_disk {
	struct om_file *file; /* NULL until the first spill */
	struct om_arena *arena;
	char *directory;
	uint64_t limit_bytes, used_bytes, peak_bytes;
	uint64_t taken; /* free bytes, kept from others while holes are punched */
	uint64_t holes; /* free bytes without disk blocks: claim them before writing */
	bool no_holes;  /* the file system cannot */
	bool growing;   /* one thread is in the system call */
};

int om_disk_init(struct om_disk *d, const char *directory, uint64_t limit_bytes);
void om_disk_fini(struct om_disk *d);
/* Whole pages, in as few runs as there are holes for. -ENOSPC (no message): grow first. */
int om_disk_alloc(struct om_disk *d, uint64_t bytes, struct om_disk_copy *ret);
void om_disk_free(struct om_disk *d, struct om_disk_copy *copy);
/* How far the file should grow so that `bytes` fit; 0 when the limit forbids it. */
uint64_t om_disk_target(const struct om_disk *d, uint64_t bytes);
/* The file has grown to `bytes`. */
int om_disk_grown(struct om_disk *d, uint64_t bytes);
/* Is so much of the file free that its disk blocks should go back? */
bool om_disk_wasteful(const struct om_disk *d);
/* Take all free runs, so that nobody gets them while holes are punched (`taken`); and give them back,
 * which may all be holes now. -ENOMEM. */
int om_disk_take_free(struct om_disk *d, struct om_disk_copy *ret);
void om_disk_give_back(struct om_disk *d, struct om_disk_copy *runs, bool holes);
/* Bytes that the tier can hold as the file system is now. */
uint64_t om_disk_capacity(struct om_disk *d);
uint64_t om_disk_copy_bytes(const struct om_disk_copy *copy);
int om_disk_check(const struct om_disk *d);

#endif
