/*
 * om_store: life of a store, its groups and names, and the way in and out of every public function.
 *
 * Owns the one lock that matters. Lock rule: every public function enters with om_store_enter and
 * looks everything up again after each wait. Nothing here does I/O under the lock.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

#define WAIT_SLICE (UINT64_C(5) * 1000 * 1000) /* released leases come without a signal */

void om_store_unref_memory(struct om_store *s)
{
	if (__atomic_sub_fetch(&s->refs, 1, __ATOMIC_ACQ_REL))
		return;
	om_cond_fini(&s->changed);
	om_mutex_fini(&s->lock);
	om_free(s);
}

int om_store_enter(struct om_store *s)
{
	if (s->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED,
		              "this store belongs to the process that forked this one; create "
		              "a new one here");
	om_mutex_lock(&s->lock);
	if (s->closing) {
		om_mutex_unlock(&s->lock);
		return om_err(OM_ECLOSED, "the store is closed");
	}
	om_store_drain_locked(s);
	return 0;
}

int om_store_leave(struct om_store *s, int code)
{
	if (om_unlikely(!s->decaying && !s->closing &&
	                (s->pool.cached_bytes > OM_POOL_WARM || om_disk_wasteful(&s->disk))))
		om_mover_decay_locked(s);
	om_mutex_unlock(&s->lock);
	return code;
}

int om_store_enter_block(struct om_store *s, const char *name, struct om_block **ret)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	*ret = om_store_find_locked(s, name);
	if (!*ret)
		return om_store_leave(s, OM_ENAME);
	om_block_ref(*ret);
	return 0;
}

int om_store_leave_block(struct om_store *s, struct om_block *b, int code)
{
	om_block_unref(b);
	return om_store_leave(s, code);
}

void om_store_changed_locked(struct om_store *s)
{
	if (s->waiters)
		om_cond_broadcast(&s->changed);
}

void om_store_wait_locked(struct om_store *s, uint64_t deadline_ns)
{
	s->waiters++;
	if (!s->closing && om_work_pending(&s->work)) {
		om_mutex_unlock(&s->lock);
		om_work_help(&s->work);
		om_mutex_lock(&s->lock);
	} else {
		om_cond_wait(&s->changed, &s->lock, OM_MIN(deadline_ns, om_now() + WAIT_SLICE));
	}
	s->waiters--;
	om_store_drain_locked(s);
}

/* ---- life ---- */

static int init_parts(struct om_store *s, const struct om_store_config *c)
{
	int code = om_mutex_init(&s->lock, OM_RANK_STORE);

	if (code)
		return code;
	code = om_cond_init(&s->changed);
	if (code) {
		om_mutex_fini(&s->lock);
		return code;
	}
	om_list_init(&s->blocks);
	om_list_init(&s->groups);
	om_meter_init(s);
	om_pool_init(&s->pool, s->host_limit_bytes);
	code = om_table_init(&s->table);
	if (!code)
		code = om_traffic_init(s);
	if (!code)
		code = om_disk_init(&s->disk, c->directory, c->disk_limit_bytes);
	if (!code)
		code = om_mover_start(s);
	return code;
}

int om_store_create(const struct om_store_config *c, struct om_store **ret)
{
	uint64_t window = c->window_bytes ? c->window_bytes : 16 * OM_MIB;
	struct om_store *s;
	int code = om_fork_watch();

	if (code)
		return code;
	s = om_alloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->refs = 1;
	s->fork_generation = om_fork_generation();
	s->verify = c->verify == OM_VERIFY_FIRST ? OM_VERIFY_FIRST : OM_VERIFY_ALWAYS;
	s->request_bytes = c->request_bytes ? c->request_bytes : OM_IO_MAX_REQUEST;
	s->host_limit_bytes = om_down(c->host_limit_bytes, OM_PAGE);
	s->io_config = (struct om_io_config){
		.backend = (enum om_io_backend)c->backend,
		.directory = c->directory,
		.depth = (unsigned)OM_MIN(OM_MAX(window / s->request_bytes, 1), 256),
		.threads = c->io_threads,
	};
	code = init_parts(s, c);
	if (code) {
		struct om_error error = *om_err_last();

		om_disk_fini(&s->disk);
		om_table_fini(&s->table);
		om_free(s->notes);
		om_store_unref_memory(s);
		return om_err_set(&error);
	}
	snprintf(s->counters.io_backend, sizeof(s->counters.io_backend), "%s", om_io_name(s->io));
	snprintf(s->counters.io_reason, sizeof(s->counters.io_reason), "%s", om_io_reason(s->io));
	s->counters.io_fell_back = om_io_fell_back(s->io);
	*ret = s;
	return 0;
}

/* Fail every move, up to the first that settles by that: several blocks may go with it. */
static bool cancel_one_locked(struct om_store *s)
{
	OM_LIST_FOREACH(link, &s->blocks) {
		struct om_block *b = om_container_of(link, struct om_block, all);
		struct om_move *m = b->body ? b->body->move : NULL;

		if (!m)
			continue;
		om_err(OM_ECLOSED, "the store was closed while block '%s' moved", b->name);
		om_move_fail(m);
		om_list_del(&m->link);
		if (m->busy)
			continue;
		om_fetch_landed_locked(s, m);
		return true;
	}
	return false;
}

/* No thread is left: every move that is not settled was queued only. */
static void cancel_moves_locked(struct om_store *s)
{
	while (cancel_one_locked(s))
		;
}

/* Is it still there, it is leased: the leases' own references keep the bytes. */
static void forget_leased_locked(struct om_store *s, struct om_block *b)
{
	if (om_list_empty(&b->all))
		return;
	om_pack_drop_locked(s, b);
	om_pack_forget_origin_locked(s, b);
	om_list_del(&b->all);
	om_foreign_unref(b->body->foreign);
	b->body->foreign = NULL;
	om_block_unref(b);
}

static void forget_blocks_locked(struct om_store *s)
{
	while (!om_list_empty(
		&s->blocks)) { /* a packed form goes with its owner, which comes first */
		struct om_block *b = om_container_of(s->blocks.next, struct om_block, all);

		om_block_ref(b);
		if (b->named && !b->inner)
			om_table_remove(&s->table, b);
		b->named = false;
		om_store_reap_locked(s, b);
		forget_leased_locked(s, b);
		om_block_unref(b);
	}
	OM_LIST_FOREACH_SAFE(link, &s->groups) {
		om_list_del(link);
		om_group_destroy(om_container_of(link, struct om_group, link));
	}
}

int om_store_close(struct om_store *s)
{
	if (s->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED, "this store belongs to the process that forked this one");
	om_mutex_lock(&s->lock);
	if (s->closing)
		return om_store_leave(s, 0);
	__atomic_store_n(&s->closing, true, __ATOMIC_RELEASE);
	om_cond_broadcast(&s->changed);
	om_mutex_unlock(&s->lock);
	om_mover_stop(s);
	om_mutex_lock(&s->lock);
	cancel_moves_locked(s);
	while (s->moves || s->waiters || s->adding ||
	       s->inside) { /* others see `closing` and leave */
		om_cond_broadcast(&s->changed);
		om_cond_wait(&s->changed, &s->lock, om_now() + WAIT_SLICE);
		cancel_moves_locked(s);
	}
	om_work_fini(&s->work);
	om_store_drain_locked(s);
	om_meter_retire_locked(s);
	forget_blocks_locked(s);
	om_pool_fini(&s->pool);
	om_disk_fini(&s->disk);
	om_table_fini(&s->table);
	om_free(s->notes);
	s->notes = NULL;
	__atomic_store_n(&s->closed, true, __ATOMIC_SEQ_CST);
	om_mutex_unlock(&s->lock);
	om_lease_drain_closed(s);
	return 0;
}

void om_store_ref(struct om_store *s)
{
	__atomic_add_fetch(&s->users, 1, __ATOMIC_RELAXED);
}

void om_store_unref(struct om_store *s)
{
	if (!s || __atomic_sub_fetch(&s->users, 1, __ATOMIC_ACQ_REL) != UINT32_MAX)
		return;
	if (s->fork_generation != om_fork_generation())
		return; /* its memory and locks are the parent's */
	om_store_close(s);
	om_store_unref_memory(s);
}

/* ---- groups and names ---- */

struct om_group *om_store_find_group_locked(struct om_store *s, const char *name)
{
	struct om_group *g;

	name = name ? name : "default";
	OM_LIST_FOREACH(link, &s->groups) {
		g = om_container_of(link, struct om_group, link);
		if (!strcmp(g->name, name))
			return g;
	}
	if (!*name || strlen(name) >= sizeof(g->name)) {
		om_err(OM_EVALUE, "a group's name must have 1 to %zu bytes: '%s'",
		       sizeof(g->name) - 1, name);
		return NULL;
	}
	if (om_group_create(name, s->host_limit_bytes, &g))
		return NULL;
	g->packed = &s->meter.packed;
	om_list_push_tail(&s->groups, &g->link);
	return g;
}

int om_store_enter_group(struct om_store *s, const char *name, struct om_group **ret)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	*ret = om_store_find_group_locked(s, name);
	return *ret ? 0 : om_store_leave(s, om_err_last()->code);
}

int om_store_group(struct om_store *s, const char *group, uint64_t host_limit_bytes)
{
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	g->limit_bytes = om_down(host_limit_bytes, OM_PAGE);
	g->lowered_from = g->used_bytes;
	g->policy->capacity = g->limit_bytes ? g->limit_bytes : s->host_limit_bytes;
	om_room_shrink_locked(s, g);
	om_store_changed_locked(s);
	return om_store_leave(s, 0);
}

int om_store_policy(struct om_store *s, const char *group, const char *policy)
{
	const struct om_policy_ops *ops = om_policy_find(policy);
	struct om_group *g;
	int code;

	if (!ops)
		return om_err(OM_EVALUE, "no policy is named '%s'; there are " OM_POLICY_NAMES,
		              policy);
	code = om_store_enter_group(s, group, &g);
	return code ? code : om_store_leave(s, om_group_set_policy(g, ops));
}

int om_store_foresee(struct om_store *s, const char *group, bool on)
{
	struct om_group *g;
	int code = om_store_enter_group(s, group, &g);

	return code ? code : om_store_leave(s, om_group_foresee(g, on));
}

struct om_block *om_store_find_locked(struct om_store *s, const char *name)
{
	struct om_block *b = om_table_find(&s->table, name);

	if (!b)
		om_err(OM_ENAME, "no block is named '%s'", name);
	return b;
}

bool om_store_contains(struct om_store *s, const char *name)
{
	bool found;

	if (om_store_enter(s))
		return false;
	found = om_table_find(&s->table, name) != NULL;
	om_mutex_unlock(&s->lock);
	return found;
}
