/* om_work: see om_work.h. */
#include "core/om_work.h"

#include "base/om_base.h"

static void *work(void *arg)
{
	struct om_work *w = arg;

	om_mutex_lock(&w->lock);
	while (!w->stop || !om_list_empty(&w->jobs)) {
		if (om_list_empty(&w->jobs)) {
			om_cond_wait(&w->wake, &w->lock, UINT64_MAX);
			continue;
		}
		struct om_job *job = om_container_of(w->jobs.next, struct om_job, link);

		om_list_del(&job->link);
		om_mutex_unlock(&w->lock);
		job->run(job);
		om_mutex_lock(&w->lock);
	}
	om_mutex_unlock(&w->lock);
	return NULL;
}

int om_work_start(struct om_work *w)
{
	int code;

	om_list_init(&w->jobs);
	w->started = w->stop = false;
	code = om_mutex_init(&w->lock, OM_RANK_WORK);
	if (code)
		return code;
	code = om_cond_init(&w->wake);
	if (!code) {
		code = om_thread_start(&w->thread, "omnimem-work", work, w);
		if (!code) {
			w->started = true;
			return 0;
		}
		om_cond_fini(&w->wake);
	}
	om_mutex_fini(&w->lock);
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
	om_cond_fini(&w->wake);
	om_mutex_fini(&w->lock);
	w->started = false;
}

void om_work_push(struct om_work *w, struct om_job *job)
{
	om_mutex_lock(&w->lock);
	om_list_push_tail(&w->jobs, &job->link);
	om_cond_signal(&w->wake);
	om_mutex_unlock(&w->lock);
}
