/*
 * om_io: asynchronous reads and writes of at most 1 MiB: one contract, two back ends.
 *
 * One thread (the mover) creates, submits to, reaps and closes an om_io; only om_io_wake may be
 * called from others. A request belongs to the caller and must stay where it is until it comes
 * back. This layer, above both back ends, keeps the promise of a transfer: a request comes back
 * either whole (code 0: exactly `len` bytes moved) or with an error. Short reads are continued
 * (restarting at an aligned offset where O_DIRECT wants it), a read that meets the file's end is
 * -ENODATA, a short write is -ENOSPC once nothing more goes in, EINTR and EAGAIN are retried a bounded
 * number of times, an O_DIRECT refusal (-EINVAL) falls back to the buffered descriptor once. A
 * request that is not aligned to its file's `align` goes through the buffered descriptor.
 *
 * After fork the child's copy is dead: requests come back with OM_ECLOSED, destroy only frees.
 */
#ifndef OM_IO_H
#define OM_IO_H

#include <stdbool.h>
#include <stdint.h>

#include "base/om_list.h"
#include "plat/om_file.h"

#define OM_IO_MAX_REQUEST (UINT32_C(1) << 20)

struct om_io_req {
	/* set by the caller */
	struct om_file *file;
	bool write;
	void *buf;
	uint32_t len;  /* aligned superset when the file is direct */
	uint32_t need; /* of len, the bytes that must exist: the superset's tail may pass the end
	                    * of the file, and a read may end anywhere at or after `need` */
	uint64_t offset;
	/* set by om_io when the request comes back */
	int code; /* 0, or -errno */
	/* owned by om_io in between */
	uint32_t done;    /* bytes moved so far */
	uint16_t retries; /* attempts that moved nothing */
	int fd;           /* of the attempt in flight */
	struct om_list link;
};

enum om_io_backend { OM_IO_AUTO, OM_IO_URING, OM_IO_THREADS };

struct om_io_config {
	enum om_io_backend backend;
	const char *directory; /* of the probe's few KiB (NULL: the default directory) */
	unsigned depth;        /* requests in flight at most; 0: 64 */
	unsigned threads;      /* of the thread back end; 0: 8 */
};

struct om_io;

/* Creates the back end after a real probe (a ring, one O_DIRECT write and read, compared; where no
 * file can be written, a read of the running program). OM_IO_URING fails when it is not to be had;
 * AUTO then takes threads and `om_io_reason` says why. With AUTO, the environment variable
 * OMNIMEM_IO=uring|threads decides instead, for users and tests; any other value is OM_EVALUE.
 * Must be called by the thread that will own it. */
int om_io_create(const struct om_io_config *config, struct om_io **ret);
/* Waits for what is in flight (every request comes back through nothing: the caller has reaped all
 * before), stops threads, frees. NULL is fine. */
void om_io_destroy(struct om_io *io);
const char *om_io_name(const struct om_io *io);   /* "uring" or "threads" */
const char *om_io_reason(const struct om_io *io); /* one sentence: which flags, or why not uring */
bool om_io_fell_back(const struct om_io *io);     /* AUTO wanted uring and did not get it */

/* Queue a request (never fails; it comes back with a code). Up to `depth` are in flight, others
 * wait for their turn; small ones may start at the next om_io_reap only. */
void om_io_submit(struct om_io *io, struct om_io_req *req);
/* Hand what is queued to the kernel, wait until at least `min` requests are back, om_io_wake was
 * called, or the deadline passes; returns how many were put in `ret` (at most max). min 0 polls.
 * With requests out, `min` counts as at most their number; with none out and min > 0 the call waits
 * for om_io_wake or the deadline. */
unsigned om_io_reap(struct om_io *io, struct om_io_req **ret, unsigned max, unsigned min,
                    uint64_t deadline_ns);
/* Any thread: make a running or the next om_io_reap return. */
void om_io_wake(struct om_io *io);

/* The table of a back end: raw transfers, no retries, no policy. */
struct om_io_ops {
	const char *name;
	int (*create)(const struct om_io_config *config, void **ret_state, char *reason,
	              unsigned reason_size);
	/* Waits for what is in flight. `inherited`: this is a forked child, threads and ring are not
	 * here; only descriptors and memory go. */
	void (*destroy)(void *state, bool inherited);
	/* Start req: bytes [done, len) of it through req->fd. 0, or -EAGAIN when it must be tried later. */
	int (*submit)(void *state, struct om_io_req *req);
	/* As om_io_reap; results[i] is the byte count or -errno of ret[i]'s attempt. May return early
	 * with less than `min`. */
	unsigned (*reap)(void *state, struct om_io_req **ret, int *results, unsigned max,
	                 unsigned min, uint64_t deadline_ns);
	void (*wake)(void *state); /* from any thread: the running or the next reap returns early */
};
extern const struct om_io_ops om_io_uring_ops, om_io_threads_ops;

#endif
