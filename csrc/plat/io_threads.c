/*
 * io_threads: the back end of plain pread and pwrite by a few threads, for systems that forbid
 * io_uring (the default seccomp profiles of containers do).
 *
 * Owns its threads, the queue of requests to start and the ring of results; both under `lock`
 * (rank OM_RANK_IO), which is never held across a transfer. A worker wakes the owner only when
 * the number of results that the owner waits for is there.
 */
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include "base/om_base.h"
#include "base/om_error.h"
#include "base/om_sync.h"
#include "plat/om_io.h"

struct result {
	struct om_io_req *req;
	int value;
};

struct threads {
	struct om_mutex lock;
	struct om_cond work;    /* a request is pending, or `stop` */
	struct om_cond done;    /* `want` results are there, or `woken` */
	struct om_list pending; /* of om_io_req.link */
	struct result *results; /* a ring of `depth` */
	unsigned first, count;  /* of results */
	unsigned want;          /* the owner sleeps until there are as many; 0: it does not sleep */
	unsigned flying, depth; /* submitted and not yet reaped, at most depth */
	bool stop, woken;
	unsigned started;
	pthread_t *workers;
};

static int transfer(const struct om_io_req *req)
{
	char *at = (char *)req->buf + req->done;
	size_t len = req->len - req->done;
	off_t offset = (off_t)(req->offset + req->done);
	ssize_t n;

	om_racy_reads_begin();
	n = req->write ? pwrite(req->fd, at, len, offset) : pread(req->fd, at, len, offset);
	om_racy_reads_end();
	return n < 0 ? -errno : (int)n;
}

static void *work(void *arg)
{
	struct threads *t = arg;

	om_mutex_lock(&t->lock);
	while (!t->stop) {
		if (om_list_empty(&t->pending)) {
			om_cond_wait(&t->work, &t->lock, UINT64_MAX);
			continue;
		}
		struct om_list *next = t->pending.next;
		struct om_io_req *req = om_container_of(next, struct om_io_req, link);

		om_list_del(next);
		om_mutex_unlock(&t->lock);
		int value = transfer(req);

		om_mutex_lock(&t->lock);
		t->results[(t->first + t->count++) % t->depth] = (struct result){ req, value };
		if (t->want && t->count >= t->want)
			om_cond_signal(&t->done);
	}
	om_mutex_unlock(&t->lock);
	return NULL;
}

static void destroy(void *state, bool inherited)
{
	struct threads *t = state;

	if (!inherited) {
		om_mutex_lock(&t->lock);
		t->stop = true;
		om_cond_broadcast(&t->work);
		om_mutex_unlock(&t->lock);
		for (unsigned i = 0; i < t->started; i++)
			pthread_join(t->workers[i], NULL);
		om_cond_fini(&t->done);
		om_cond_fini(&t->work);
		om_mutex_fini(&t->lock);
	}
	om_free(t->workers);
	om_free(t->results);
	om_free(t);
}

static int init_sync(struct threads *t)
{
	int code = om_mutex_init(&t->lock, OM_RANK_IO);

	if (code)
		return code;
	code = om_cond_init(&t->work);
	if (code)
		goto fail_lock;
	code = om_cond_init(&t->done);
	if (code)
		goto fail_work;
	return 0;
fail_work:
	om_cond_fini(&t->work);
fail_lock:
	om_mutex_fini(&t->lock);
	return code;
}

static int create(const struct om_io_config *config, void **ret_state, char *reason,
                  unsigned reason_size)
{
	struct threads *t = om_alloc(1, sizeof(*t));
	int code = -ENOMEM;

	if (!t)
		return code;
	om_list_init(&t->pending);
	t->depth = config->depth;
	t->results = om_alloc(t->depth, sizeof(*t->results));
	t->workers = om_alloc(config->threads, sizeof(*t->workers));
	if (t->results && t->workers)
		code = init_sync(t);
	if (code) {
		om_free(t->workers);
		om_free(t->results);
		om_free(t);
		return code;
	}
	/* Fewer than asked for do the work too, slower; none cannot. */
	while (t->started < config->threads) {
		code = om_thread_start(&t->workers[t->started], "omnimem-io", work, t);
		if (code)
			break;
		t->started++;
	}
	if (!t->started) {
		destroy(t, false);
		return code;
	}
	snprintf(reason, reason_size, "%u of %u threads with pread and pwrite", t->started,
	         config->threads);
	*ret_state = t;
	return 0;
}

static int submit(void *state, struct om_io_req *req)
{
	struct threads *t = state;

	if (t->flying == t->depth)
		return -EAGAIN;
	t->flying++;
	om_mutex_lock(&t->lock);
	om_list_push_tail(&t->pending, &req->link);
	om_cond_signal(&t->work);
	om_mutex_unlock(&t->lock);
	return 0;
}

static unsigned reap(void *state, struct om_io_req **ret, int *results, unsigned max, unsigned min,
                     uint64_t deadline_ns)
{
	struct threads *t = state;
	unsigned n = 0;

	om_mutex_lock(&t->lock);
	t->want = OM_MIN(min, max);
	while (t->count < t->want && !t->woken)
		if (!om_cond_wait(&t->done, &t->lock, deadline_ns))
			break;
	t->want = 0;
	t->woken = false;
	for (; n < max && t->count; n++, t->count--) {
		ret[n] = t->results[t->first].req;
		results[n] = t->results[t->first].value;
		t->first = (t->first + 1) % t->depth;
	}
	om_mutex_unlock(&t->lock);
	t->flying -= n;
	return n;
}

static void wake(void *state)
{
	struct threads *t = state;

	om_mutex_lock(&t->lock);
	t->woken = true;
	om_cond_signal(&t->done);
	om_mutex_unlock(&t->lock);
}

const struct om_io_ops om_io_threads_ops = {
	.name = "threads",
	.create = create,
	.destroy = destroy,
	.submit = submit,
	.reap = reap,
	.wake = wake,
};
