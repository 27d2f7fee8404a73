/* om_work: see om_work.h. */
#include "core/om_work.h"

#include "base/om_base.h"

/* Take the first job and do a piece of it. What is left of it comes first again. */
static void do_piece_locked(struct om_work *w)
{
	struct om_job *job = om_container_of(w->jobs.next, struct om_job, link);
	bool more;

	om_list_del(&job->link);
	do {
		om_mutex_unlock(&w->lock);
		more = job->run(job);
		om_mutex_lock(&w->lock);
	} while (more && w->stop); /* the worker may be gone already */
	if (more) {
		om_list_push_head(&w->jobs, &job->link);
		om_cond_signal(&w->wake);
	}
}

static void *work(void *arg)
{
	struct om_work *w = arg;

	om_mutex_lock(&w->lock);
	while (!w->stop || !om_list_empty(&w->jobs)) {
		if (om_list_empty(&w->jobs))
			om_cond_wait(&w->wake, &w->lock, UINT64_MAX);
		else
			do_piece_locked(w);
	}
	om_mutex_unlock(&w->lock);
	return NULL;
}

int om_work_start(struct om_work *w)
{
	int code;

	*w = (struct om_work){ 0 };
	om_list_init(&w->jobs);
	code = om_mutex_init(&w->lock, OM_RANK_WORK);
	if (code)
		return code;
	code = om_cond_init(&w->wake);
	if (code) {
		om_mutex_fini(&w->lock);
		return code;
	}
	w->ready = true;
	code = om_thread_start(&w->thread, "omnimem-work", work, w);
	w->started = !code;
	if (code)
		om_work_fini(w);
	return code;
}

void om_work_stop(struct om_work *w)
{
	if (!w->started)
		return;
	om_mutex_lock(&w->lock);
	w->stop = true;
	om_cond_signal(&w->wake);
	om_mutex_unlock(&w->lock);
	pthread_join(w->thread, NULL);
	w->started = false;
}

void om_work_fini(struct om_work *w)
{
	if (!w->ready)
		return;
	om_cond_fini(&w->wake);
	om_mutex_fini(&w->lock);
	w->ready = false;
}

void om_work_push(struct om_work *w, struct om_job *job)
{
	om_mutex_lock(&w->lock);
	om_list_push_tail(&w->jobs, &job->link);
	om_cond_signal(&w->wake);
	om_mutex_unlock(&w->lock);
}

bool om_work_pending(struct om_work *w)
{
	bool any;

	om_mutex_lock(&w->lock);
	any = !w->stop && !om_list_empty(&w->jobs);
	om_mutex_unlock(&w->lock);
	return any;
}

void om_work_help(struct om_work *w)
{
	om_mutex_lock(&w->lock);
	if (!w->stop && !om_list_empty(&w->jobs))
		do_piece_locked(w);
	om_mutex_unlock(&w->lock);
}
