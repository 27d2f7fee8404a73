/*
 * io_uring: the back end of one ring, owned by the thread that created it.
 *
 * user_data is slot index and generation: a completion whose slot has moved on is dropped. The
 * owner sleeps in one system call until `min` results are there. A wake from another thread
 * comes through an eventfd that the ring polls; as the kernel counts every completion alike, there
 * are as many polls as results that the owner waits for, so that one wake ends any wait. The
 * kernel keeps what an interrupted system call left in the submission queue; nothing is ever
 * prepared twice. Fails at creation with a sentence that says what denies io_uring.
 */
#include <errno.h>
#include <stdio.h>

#include "base/om_base.h"
#include "base/om_error.h"
#include "plat/om_io.h"

#ifdef OM_WITHOUT_LIBURING

static int create(const struct om_io_config *config, void **ret_state, char *reason,
                  unsigned reason_size)
{
	(void)config;
	(void)ret_state;
	(void)reason;
	(void)reason_size;
	return om_err(-ENOSYS, "omnimem was built without liburing");
}

const struct om_io_ops om_io_uring_ops = { .name = "uring", .create = create };

#else

#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define WAKE_DATA    UINT64_MAX
/* What is prepared goes to the kernel at once when it is worth a system call. Within one call the
 * block layer holds requests back to merge them, so that a batch of large ones starts late: 15 to
 * 20 % of a fast disk's throughput at 16 MiB in flight. Small ones wait for each other. */
#define SUBMIT_BYTES (256 * OM_KIB)

struct slot {
	struct om_io_req *req; /* NULL: free */
	uint32_t generation;
	uint32_t next_free;
	uint32_t entry; /* value of uring.prepared when its entry was prepared */
};

struct uring {
	struct io_uring ring;
	struct slot *slots;
	unsigned depth, flying;
	uint32_t free_slot; /* head of the free list; depth: none */
	int wake_fd;
	unsigned polls;    /* of wake_fd, in the ring */
	uint32_t prepared; /* submission entries so far; wraps */
	uint64_t unsent; /* bytes of the transfers prepared since the last entry into the kernel */
	int broken;      /* the code with which the kernel refuses to be entered, else 0 */
};

/* ---- creation ---- */

static const struct {
	unsigned flags;
	const char *name;
} ladder[] = {
	{ IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
	  "SINGLE_ISSUER, DEFER_TASKRUN" },
	{ IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN, "COOP_TASKRUN" },
	{ 0, "no flags" },
};

static int sysctl_disabled(void)
{
	int value = -1, fd = open("/proc/sys/kernel/io_uring_disabled", O_RDONLY | O_CLOEXEC);
	char digit;

	if (fd >= 0) {
		if (read(fd, &digit, 1) == 1)
			value = digit - '0';
		close(fd);
	}
	return value;
}

/* Who denies io_uring, and what to do about it. */
static int denied(int code)
{
	int sysctl = sysctl_disabled();

	if (code == -EPERM && sysctl > 0)
		return om_err(
			code,
			"the sysctl kernel.io_uring_disabled is %d: set it to 0%s to allow io_uring",
			sysctl, sysctl == 1 ? " or join the group of kernel.io_uring_group" : "");
	if (code == -EPERM || code == -EACCES)
		return om_err(
			code,
			"a seccomp profile or security module denies io_uring, as containers do "
			"by default: allow io_uring_setup, io_uring_enter and io_uring_register");
	if (code == -ENOSYS)
		return om_err(code,
		              "the kernel or a seccomp profile has no io_uring: use Linux 5.11 or "
		              "later and allow io_uring_setup, io_uring_enter and "
		              "io_uring_register");
	if (code == -ENOMEM)
		return om_err(code,
		              "no memory for an io_uring: raise RLIMIT_MEMLOCK (ulimit -l) or the "
		              "memory limit of the cgroup");
	return om_err(code, "cannot create an io_uring: %s", om_err_text(code));
}

static int open_ring(struct uring *u, char *reason, unsigned reason_size)
{
	int code = -EINVAL;

	for (unsigned i = 0; code == -EINVAL && i < sizeof(ladder) / sizeof(ladder[0]); i++) {
		/* Room for each slot's entry and as many polls; completions get twice that. */
		code = io_uring_queue_init(2 * u->depth, &u->ring, ladder[i].flags);
		if (!code)
			snprintf(reason, reason_size, "io_uring with %s", ladder[i].name);
	}
	if (code)
		return denied(code);
	om_order_after(ladder);
	if (!(u->ring.features & IORING_FEAT_EXT_ARG) || !(u->ring.features & IORING_FEAT_NODROP))
		code = om_err(-ENOSYS,
		              "this kernel's io_uring is too old: use Linux 5.11 or later");
	else if ((code = io_uring_ring_dontfork(&u->ring)))
		code = om_err(code, "cannot keep the io_uring from forked children: %s",
		              om_err_text(code));
	if (code)
		io_uring_queue_exit(&u->ring);
	return code;
}

static int create(const struct om_io_config *config, void **ret_state, char *reason,
                  unsigned reason_size)
{
	struct uring *u = om_alloc(1, sizeof(*u));
	int code = -ENOMEM;

	if (!u)
		return code;
	u->depth = config->depth;
	u->wake_fd = -1;
	u->slots = om_alloc(u->depth, sizeof(*u->slots));
	if (!u->slots)
		goto fail;
	for (uint32_t i = 0; i < u->depth; i++)
		u->slots[i].next_free = i + 1;
	u->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (u->wake_fd < 0) {
		code = om_err(-errno, "cannot create an eventfd: %s", om_err_text(-errno));
		goto fail;
	}
	code = open_ring(u, reason, reason_size);
	if (code)
		goto fail;
	*ret_state = u;
	return 0;
fail:
	if (u->wake_fd >= 0)
		close(u->wake_fd);
	om_free(u->slots);
	om_free(u);
	return code;
}

/* ---- submission ---- */

static int submit(void *state, struct om_io_req *req)
{
	struct uring *u = state;
	struct io_uring_sqe *sqe;
	struct slot *slot;
	char *at = (char *)req->buf + req->done;
	uint64_t offset = req->offset + req->done;

	if (u->free_slot == u->depth)
		return -EAGAIN;
	sqe = io_uring_get_sqe(&u->ring);
	if (!sqe)
		return -EAGAIN;
	if (req->write)
		io_uring_prep_write(sqe, req->fd, at, req->len - req->done, offset);
	else
		io_uring_prep_read(sqe, req->fd, at, req->len - req->done, offset);
	slot = &u->slots[u->free_slot];
	io_uring_sqe_set_data64(sqe, (uint64_t)++slot->generation << 32 | u->free_slot);
	u->free_slot = slot->next_free;
	slot->entry = u->prepared++;
	slot->req = req;
	u->flying++;
	u->unsent += req->len - req->done;
	if (u->unsent >= SUBMIT_BYTES && !u->broken) {
		u->unsent = 0;
		io_uring_submit(&u->ring); /* what fails stays queued; the next reap enters again */
	}
	return 0;
}

static void arm_polls(struct uring *u, unsigned want)
{
	while (u->polls < want) {
		struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);

		if (!sqe)
			return; /* room comes with the next entry into the kernel */
		io_uring_prep_poll_add(sqe, u->wake_fd, POLLIN);
		io_uring_sqe_set_data64(sqe, WAKE_DATA);
		u->prepared++;
		u->polls++;
	}
}

static void wake(void *state)
{
	struct uring *u = state;
	uint64_t one = 1;

	/* EAGAIN: the counter is full, so the owner is being woken already. */
	while (write(u->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		continue;
}

/* ---- completion ---- */

static struct om_io_req *free_slot(struct uring *u, uint32_t i)
{
	struct om_io_req *req = u->slots[i].req;

	u->slots[i].req = NULL;
	u->slots[i].next_free = u->free_slot;
	u->free_slot = i;
	u->flying--;
	return req;
}

/* Takes what is in the completion queue; *ret_woken when a poll of the eventfd fired. */
static unsigned take(struct uring *u, struct om_io_req **ret, int *results, unsigned max,
                     bool *ret_woken)
{
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0, n = 0;

	io_uring_for_each_cqe(&u->ring, head, cqe)
	{
		uint64_t data = cqe->user_data;
		uint32_t i = (uint32_t)data;

		if (n == max)
			break;
		seen++;
		if (data == WAKE_DATA) {
			u->polls--;
			*ret_woken = true;
		} else if (i < u->depth && u->slots[i].req &&
		           u->slots[i].generation == data >> 32) {
			results[n] = cqe->res;
			ret[n++] = free_slot(u, i);
		}
	}
	io_uring_cq_advance(&u->ring, seen);
	return n;
}

/* The kernel lets nobody enter any more (a filter denies io_uring_enter): what it has not taken
 * comes back unstarted. The entries stay in the queue, which is never entered again. */
static unsigned take_unstarted(struct uring *u, struct om_io_req **ret, int *results, unsigned max)
{
	uint32_t waiting = io_uring_sq_ready(&u->ring);
	unsigned n = 0;

	for (uint32_t i = 0; i < u->depth && n < max; i++)
		if (u->slots[i].req && u->prepared - u->slots[i].entry <= waiting) {
			results[n] = u->broken;
			ret[n++] = free_slot(u, i);
		}
	return n;
}

static void pause_until(uint64_t deadline_ns)
{
	uint64_t now = om_now(), most = OM_NSEC / 1000;

	if (deadline_ns > now) {
		struct timespec ts = { .tv_nsec = (long)OM_MIN(deadline_ns - now, most) };

		nanosleep(&ts, NULL);
	}
}

/* One entry into the kernel: submit, and sleep until `want` completions or the deadline. */
static void enter(struct uring *u, unsigned want, uint64_t deadline_ns)
{
	struct io_uring_cqe *cqe;
	uint64_t now = om_now(), left = deadline_ns > now ? deadline_ns - now : 0;

	u->unsent = 0;
	left = OM_MIN(left, 3600 * OM_NSEC); /* "for ever" would overflow the kernel's clock */
	struct __kernel_timespec ts = { .tv_sec = (long long)(left / OM_NSEC),
		                        .tv_nsec = (long long)(left % OM_NSEC) };
	int code;

	if (want && left)
		code = io_uring_submit_and_wait_timeout(&u->ring, &cqe, want, &ts, NULL);
	else
		code = io_uring_submit_and_get_events(&u->ring);
	if (code >= 0 || code == -ETIME || code == -EINTR)
		return;
	if (code != -EAGAIN && code != -EBUSY && code != -ENOMEM)
		u->broken = code;
	else if (!io_uring_cq_ready(&u->ring))
		pause_until(deadline_ns); /* short of memory for a moment; the caller comes again */
}

static unsigned reap(void *state, struct om_io_req **ret, int *results, unsigned max, unsigned min,
                     uint64_t deadline_ns)
{
	struct uring *u = state;
	bool woken = false;
	uint64_t count;
	unsigned n = 0;

	min = OM_MIN(min, max);
	if (!u->broken) {
		arm_polls(u, min);
		if (min || u->flying || io_uring_sq_ready(&u->ring))
			enter(u, min, deadline_ns);
		n = take(u, ret, results, max, &woken);
		if (woken && read(u->wake_fd, &count, sizeof(count)) < 0)
			count = 0; /* another poll of the same wake has emptied it */
	}
	if (u->broken) {
		n += take_unstarted(u, ret + n, results + n, max - n);
		if (!n && min)
			pause_until(deadline_ns);
	}
	return n;
}

static void destroy(void *state, bool inherited)
{
	struct uring *u = state;
	struct om_io_req *reqs[16];
	int results[16];

	if (inherited) {
		/* The ring's memory is not here, and others may be mapped in its place. */
		close(u->ring.ring_fd);
	} else {
		/* The kernel may write to the buffers until the last completion. */
		while (u->flying && !u->broken)
			reap(u, reqs, results, 16, 1, om_deadline(OM_NSEC));
		om_order_before(ladder); /* the next ring may be mapped where this one was */
		io_uring_queue_exit(&u->ring);
	}
	close(u->wake_fd);
	om_free(u->slots);
	om_free(u);
}

const struct om_io_ops om_io_uring_ops = {
	.name = "uring",
	.create = create,
	.destroy = destroy,
	.submit = submit,
	.reap = reap,
	.wake = wake,
};

#endif
