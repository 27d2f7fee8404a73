/*
 * om_file: an opened file: a checkpoint's shard (read in place) or the nameless swap file.
 *
 * Owns the descriptors. Reference counted (atomic); the last unref closes. `fd_direct` is open with
 * O_DIRECT when the file system takes it, else -1; `fd` is buffered. A refusal at transfer time
 * (om_file_refuse_direct) falls back to `fd` for this file. A transfer through `fd_direct` needs
 * file offset, length and memory aligned to `align` (a power of two, <= OM_PAGE).
 */
#ifndef OM_FILE_H
#define OM_FILE_H

#include <stdbool.h>
#include <stdint.h>

struct om_file_id { /* what must not change while blocks point into the file */
	uint64_t device, inode, size;
	int64_t mtime_ns;
};

struct om_file {
	char *path; /* as given, for messages; "(swap in DIR)" for the swap file */
	int fd, fd_direct;
	uint32_t align;
	struct om_file_id id;
	unsigned refs; /* atomic */
	bool refused;  /* atomic: O_DIRECT was refused at open or at transfer */
	bool writable;
};

/* Open a regular file for reading; symlinks are followed. -errno with file and path in the error;
 * OM_EVALUE when it is not a regular file. */
int om_file_open(const char *path, struct om_file **ret);
/* A nameless file, mode 0600, in a fresh private 0700 directory below `directory` (the default
 * cache directory when NULL): O_TMPFILE, else created and unlinked; the private directory is
 * removed at once when the file system allows it to be (nothing is left after SIGKILL). */
int om_file_create_swap(const char *directory, struct om_file **ret);
/* Grow to at least `bytes` with fallocate (ftruncate where the file system has none).
 * OM_EDISKFULL when the disk is full. Honours OM_FAULT_NOSPC. */
int om_file_grow(struct om_file *f, uint64_t bytes);
/* Give the disk blocks of a range back; it reads as zeros, and the size stays. -EOPNOTSUPP (no message):
 * the file system cannot. */
int om_file_punch(struct om_file *f, uint64_t offset, uint64_t bytes);
/* Have disk blocks behind a range below the size, punched or not. Errors as om_file_grow. */
int om_file_claim(struct om_file *f, uint64_t offset, uint64_t bytes);
/* Free bytes that the file system would still give to this process. */
int om_file_free_bytes(struct om_file *f, uint64_t *ret_bytes);
/* Compare device, inode, size, mtime with those of the opening: OM_ECORRUPT naming what changed.
 * Another file under the path counts, a path that is gone does not: the open bytes are intact. Of
 * the swap file only the size is compared. */
int om_file_check(const struct om_file *f);
/* Does the path still name this very file, unchanged? */
bool om_file_is_at(const struct om_file *f, const char *path);
/* The descriptor to use for the next transfer. */
static inline int om_file_fd(const struct om_file *f)
{
	return f->fd_direct >= 0 && !__atomic_load_n(&f->refused, __ATOMIC_RELAXED) ? f->fd_direct
	                                                                            : f->fd;
}
void om_file_refuse_direct(struct om_file *f);
void om_file_ref(struct om_file *f);
void om_file_unref(struct om_file *f); /* NULL is fine */

#endif
