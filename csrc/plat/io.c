/*
 * io: the layer above both back ends that keeps the promise of om_io.h.
 *
 * A request is in one of three places: `queued` (to be started, first or again), the back end, or
 * `ready` (finished, not fetched). All of it belongs to the owning thread; only `woken` is touched
 * by others. A raw result becomes, here and nowhere else, one of: finished, or started again from
 * `done`. Fault points act on raw results, so that every recovery below them is the real one.
 */
#include "plat/om_io.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/om_base.h"
#include "base/om_error.h"
#include "plat/om_dev.h"

#define DEFAULT_DEPTH   64
#define MAX_DEPTH       1024
#define DEFAULT_THREADS 8
#define MAX_THREADS     64
#define BATCH           64               /* results taken from the back end at a time */
#define MAX_RETRIES     16               /* EINTR, EAGAIN: attempts that moved nothing */
#define MAX_STUCK       3                /* attempts that moved less than one aligned step */
#define RETRY_NS        (OM_NSEC / 1000) /* pause before starting again what could not be started */
#define PROBE_NS        (10 * OM_NSEC)
#define PROBE_BYTES     (2 * OM_PAGE)

struct om_io {
	const struct om_io_ops *ops;
	void *state;
	struct om_list queued, ready;
	unsigned out;     /* submitted, not yet fetched by the owner */
	unsigned flying;  /* in the back end */
	unsigned readies; /* length of `ready` */
	unsigned fork_generation;
	bool fell_back;
	bool woken; /* atomic */
	char reason[512];
};

/* ---- one attempt ---- */

static bool is_direct(const struct om_io_req *req)
{
	return req->fd == req->file->fd_direct;
}

/* The aligned descriptor only for what is aligned: one odd request must not cost the file its
 * O_DIRECT. */
static int choose_fd(const struct om_io_req *req)
{
	const struct om_file *f = req->file;
	uint64_t odd = (uintptr_t)req->buf | req->offset | req->len | req->done;

	return odd & (f->align - 1) ? f->fd : om_file_fd(f);
}

static void finish(struct om_io *io, struct om_io_req *req, int code)
{
	req->code = code;
	om_list_push_tail(&io->ready, &req->link);
	io->readies++;
}

/* Try again later, unless it was tried often enough: then `code` is the outcome. */
static void again(struct om_io *io, struct om_io_req *req, int code, unsigned limit)
{
	if (++req->retries >= limit)
		finish(io, req, code);
	else
		om_list_push_tail(&io->queued, &req->link);
}

/* Hands queued requests to the back end until it has no more room. */
static void start_queued(struct om_io *io)
{
	OM_LIST_FOREACH_SAFE(pos, &io->queued) {
		struct om_io_req *req = om_container_of(pos, struct om_io_req, link);
		bool failed = om_fault(OM_FAULT_SUBMIT);

		om_list_del(pos);
		req->fd = choose_fd(req);
		if (!failed && !io->ops->submit(io->state, req)) {
			io->flying++;
		} else if (!failed && io->flying) {
			om_list_push_head(&io->queued, pos); /* full: a completion makes room */
			return;
		} else if (++req->retries >= MAX_RETRIES) {
			finish(io, req, -EAGAIN);
		} else {
			om_list_push_head(&io->queued, pos);
			return;
		}
	}
}

/* ---- one raw result ---- */

static int apply_faults(struct om_io_req *req, int result)
{
	if (result <= 0)
		return result;
	if (om_fault(req->write ? OM_FAULT_WRITE : OM_FAULT_READ))
		return -EIO;
	if (!req->write && om_fault(OM_FAULT_FLIP))
		((unsigned char *)req->buf)[req->done + (uint32_t)result / 2] ^= 0x10;
	if (om_fault(OM_FAULT_SHORT)) {
		int half = (int)om_down((uint64_t)result / 2, 512);
		int step = is_direct(req) ? (int)req->file->align : 512;

		/* What a kernel would never cut, the smallest transfer, stays whole. */
		if (half < step)
			return result;
		if (!req->write) /* what it did not bring is not there */
			memset((char *)req->buf + req->done + half, 0xA5, (size_t)(result - half));
		return half;
	}
	return result;
}

/* Some bytes moved, not enough of them. O_DIRECT goes on at an aligned place only, so that a few
 * bytes move twice; at the end of the file that makes no progress at all. */
static void go_on(struct om_io *io, struct om_io_req *req, uint32_t moved)
{
	uint32_t from = req->done;

	req->done += moved;
	if (is_direct(req))
		req->done = (uint32_t)om_down(req->done, req->file->align);
	if (req->done > from)
		om_list_push_tail(&io->queued, &req->link);
	else
		again(io, req, req->write ? -ENOSPC : -ENODATA, MAX_STUCK);
}

static void handle(struct om_io *io, struct om_io_req *req, int result)
{
	io->flying--;
	result = apply_faults(req, result);
	if (result == -EINTR || result == -EAGAIN) {
		again(io, req, result, MAX_RETRIES);
	} else if (result == -EINVAL && is_direct(req)) {
		om_file_refuse_direct(req->file);
		om_list_push_tail(&io->queued, &req->link);
	} else if (result < 0) {
		finish(io, req, result);
	} else if (result == 0) {
		finish(io, req, req->write ? -ENOSPC : -ENODATA);
	} else if ((uint32_t)result >= req->len - req->done ||
	           (!req->write && req->done + (uint32_t)result >= req->need)) {
		req->done += (uint32_t)result;
		finish(io, req, 0);
	} else {
		go_on(io, req, (uint32_t)result);
	}
}

/* ---- submit, reap, wake ---- */

static bool inherited(const struct om_io *io)
{
	return io->fork_generation != om_fork_generation();
}

void om_io_submit(struct om_io *io, struct om_io_req *req)
{
	req->code = 0;
	req->done = 0;
	req->retries = 0;
	req->fd = -1;
	om_list_init(&req->link);
	io->out++;
	if (inherited(io)) {
		finish(io, req, OM_ECLOSED);
	} else if (!req->len || req->len > OM_IO_MAX_REQUEST || req->need > req->len ||
	           (req->write && !req->file->writable)) {
		finish(io, req, -EINVAL);
	} else {
		om_list_push_tail(&io->queued, &req->link);
		start_queued(io);
	}
}

static unsigned take_ready(struct om_io *io, struct om_io_req **ret, unsigned max)
{
	unsigned n = 0;

	while (n < max && !om_list_empty(&io->ready)) {
		struct om_list *first = io->ready.next;

		om_list_del(first);
		ret[n++] = om_container_of(first, struct om_io_req, link);
	}
	io->readies -= n;
	io->out -= n;
	return n;
}

/* Takes what the back end has, waiting for `min` results of it. */
static void drain(struct om_io *io, unsigned min, uint64_t deadline_ns)
{
	struct om_io_req *reqs[BATCH];
	int results[BATCH];
	unsigned n =
		io->ops->reap(io->state, reqs, results, BATCH, OM_MIN(min, BATCH), deadline_ns);

	for (unsigned i = 0; i < n; i++)
		handle(io, reqs[i], results[i]);
}

unsigned om_io_reap(struct om_io *io, struct om_io_req **ret, unsigned max, unsigned min,
                    uint64_t deadline_ns)
{
	if (inherited(io))
		return take_ready(io, ret, max);
	min = OM_MIN(min, max);
	if (io->out)
		min = OM_MIN(min, io->out);
	for (;;) {
		uint64_t until = deadline_ns;
		unsigned want = 0;
		bool last;

		start_queued(io);
		last = __atomic_exchange_n(&io->woken, false, __ATOMIC_ACQUIRE) ||
		       io->readies >= min || om_now() >= deadline_ns;
		if (!last) {
			want = OM_MAX(1u, OM_MIN(min - io->readies, io->flying));
			if (!om_list_empty(&io->queued))
				until = OM_MIN(until, om_deadline(RETRY_NS));
		}
		drain(io, want, until);
		if (last || io->readies >= min)
			break;
	}
	start_queued(io);
	return take_ready(io, ret, max);
}

void om_io_wake(struct om_io *io)
{
	__atomic_store_n(&io->woken, true, __ATOMIC_RELEASE);
	io->ops->wake(io->state);
}

/* ---- create and destroy ---- */

/* One transfer to its end; used by the probe only. */
static int transfer(struct om_io *io, struct om_file *f, bool write, void *buf, uint32_t len)
{
	struct om_io_req req = { .file = f, .write = write, .buf = buf, .len = len, .need = len };
	struct om_io_req *back;

	om_io_submit(io, &req);
	if (om_io_reap(io, &back, 1, 1, om_deadline(PROBE_NS)) == 1)
		return req.code;
	/* `req` is on this stack: nothing may come back to it later. */
	io->ops->destroy(io->state, false);
	io->state = NULL;
	io->out = io->flying = 0;
	om_list_init(&io->queued);
	return -ETIME;
}

static int probe_write(struct om_io *io, struct om_file *f, unsigned char *buf)
{
	int code = om_file_grow(f, PROBE_BYTES);

	for (unsigned i = 0; i < PROBE_BYTES; i++)
		buf[i] = (unsigned char)(i * 7 + i / 256);
	if (!code)
		code = transfer(io, f, true, buf, PROBE_BYTES);
	if (!code) {
		memset(buf, 0, PROBE_BYTES);
		code = transfer(io, f, false, buf, PROBE_BYTES);
	}
	for (unsigned i = 0; !code && i < PROBE_BYTES; i++)
		if (buf[i] != (unsigned char)(i * 7 + i / 256))
			code = OM_ECORRUPT;
	return code;
}

static int probe_read(struct om_io *io, struct om_file *f, unsigned char *buf)
{
	int code = transfer(io, f, false, buf, OM_PAGE);

	if (!code && (pread(f->fd, buf + OM_PAGE, OM_PAGE, 0) != (ssize_t)OM_PAGE ||
	              memcmp(buf, buf + OM_PAGE, OM_PAGE)))
		code = OM_ECORRUPT;
	return code;
}

/* A ring that was created may still be of no use (a filter that allows io_uring_setup only, a file
 * system that fails): move real bytes once. */
static int probe(struct om_io *io, const char *directory)
{
	struct om_file *f = NULL;
	void *buf;
	bool direct = false;
	int code = om_host_map(PROBE_BYTES, &buf);

	if (code)
		return code;
	if (!om_file_create_swap(directory, &f))
		code = probe_write(io, f, buf);
	else if (!(code = om_file_open("/proc/self/exe", &f)))
		code = probe_read(io, f, buf);
	if (f)
		direct = om_file_fd(f) == f->fd_direct;
	om_file_unref(f);
	om_host_unmap(buf, PROBE_BYTES);
	if (code)
		return om_err(code, "the %s back end failed its probe: %s", io->ops->name,
		              om_err_text(code));
	if (!direct)
		snprintf(io->reason + strlen(io->reason), sizeof(io->reason) - strlen(io->reason),
		         "; the probed directory takes no O_DIRECT");
	return 0;
}

static void release_state(struct om_io *io)
{
	if (io->state)
		io->ops->destroy(io->state, inherited(io));
	io->state = NULL;
}

static int open_backend(struct om_io *io, const struct om_io_ops *ops,
                        const struct om_io_config *config)
{
	int code;

	io->ops = ops;
	io->reason[0] = '\0';
	code = ops->create(config, &io->state, io->reason, sizeof(io->reason));
	if (code)
		return code;
	code = probe(io, config->directory);
	if (code)
		release_state(io);
	return code;
}

static int choose_backend(struct om_io_config *config)
{
	const char *env = config->backend == OM_IO_AUTO ? getenv("OMNIMEM_IO") : NULL;

	if (!env || !env[0] || !strcmp(env, "auto"))
		return 0;
	if (!strcmp(env, "uring"))
		config->backend = OM_IO_URING;
	else if (!strcmp(env, "threads"))
		config->backend = OM_IO_THREADS;
	else
		return om_err(OM_EVALUE,
		              "OMNIMEM_IO is \"%s\"; use \"uring\", \"threads\" or \"auto\"", env);
	return 0;
}

static int open_any(struct om_io *io, const struct om_io_config *config)
{
	char why[OM_ERROR_TEXT];
	size_t n;
	int code;

	if (config->backend == OM_IO_THREADS)
		return open_backend(io, &om_io_threads_ops, config);
	code = open_backend(io, &om_io_uring_ops, config);
	if (!code || config->backend == OM_IO_URING)
		return code;
	snprintf(why, sizeof(why), "%s", om_err_last()->text);
	io->fell_back = true;
	code = open_backend(io, &om_io_threads_ops, config);
	n = strlen(io->reason);
	if (!code)
		snprintf(io->reason + n, sizeof(io->reason) - n, "; not uring: %s", why);
	return code;
}

int om_io_create(const struct om_io_config *config, struct om_io **ret)
{
	struct om_io_config c = *config;
	struct om_io *io;
	int code;

	*ret = NULL;
	c.depth = OM_MIN(c.depth ? c.depth : DEFAULT_DEPTH, MAX_DEPTH);
	c.threads = OM_MIN(c.threads ? c.threads : DEFAULT_THREADS, MAX_THREADS);
	code = choose_backend(&c);
	if (!code)
		code = om_fork_watch();
	if (code)
		return code;
	io = om_alloc(1, sizeof(*io));
	if (!io)
		return -ENOMEM;
	om_list_init(&io->queued);
	om_list_init(&io->ready);
	io->fork_generation = om_fork_generation();
	code = open_any(io, &c);
	if (code) {
		om_free(io);
		return code;
	}
	*ret = io;
	return 0;
}

void om_io_destroy(struct om_io *io)
{
	if (!io)
		return;
	release_state(io);
	om_free(io);
}

const char *om_io_name(const struct om_io *io)
{
	return io->ops->name;
}

const char *om_io_reason(const struct om_io *io)
{
	return io->reason;
}

bool om_io_fell_back(const struct om_io *io)
{
	return io->fell_back;
}
