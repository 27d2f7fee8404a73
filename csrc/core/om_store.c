/*
 * om_store: life of a store, adding and removing blocks, prefetch and tickets.
 *
 * Owns the one lock that matters. Lock rule: every public function enters with om_store_enter and
 * looks everything up again after each wait. Nothing here does I/O under the lock.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

#define WAIT_SLICE (UINT64_C(5) * 1000 * 1000) /* released leases come without a signal */

static void memory_unref(struct om_store *s)
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

static int leave(struct om_store *s, int code)
{
	om_mutex_unlock(&s->lock);
	return code;
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
	om_pool_init(&s->pool, s->host_limit_bytes);
	code = om_table_init(&s->table);
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
		memory_unref(s);
		return om_err_set(&error);
	}
	snprintf(s->counters.io_backend, sizeof(s->counters.io_backend), "%s", om_io_name(s->io));
	snprintf(s->counters.io_reason, sizeof(s->counters.io_reason), "%s", om_io_reason(s->io));
	s->counters.io_fell_back = om_io_fell_back(s->io);
	*ret = s;
	return 0;
}

/* No thread is left: every move that is not settled was queued only. */
static void cancel_moves_locked(struct om_store *s)
{
	OM_LIST_FOREACH_SAFE(link, &s->blocks) {
		struct om_block *b = om_container_of(link, struct om_block, all);
		struct om_move *m = b->move;

		if (!m)
			continue;
		om_err(OM_ECLOSED, "the store was closed while block '%s' moved", b->name);
		om_move_fail(m);
		om_list_del(&m->link);
		if (!m->busy)
			om_fetch_landed_locked(s, m);
	}
}

static void forget_blocks_locked(struct om_store *s)
{
	OM_LIST_FOREACH_SAFE(link, &s->blocks) {
		struct om_block *b = om_container_of(link, struct om_block, all);

		om_block_ref(b);
		if (b->named)
			om_table_remove(&s->table, b);
		om_store_reap_locked(s, b);
		if (!om_list_empty(
			    &b->all)) { /* leased: the leases' own references keep the bytes */
			om_list_del(&b->all);
			om_foreign_unref(b->foreign);
			b->foreign = NULL;
			om_block_unref(b);
		}
		om_block_unref(b);
	}
	OM_LIST_FOREACH_SAFE(link, &s->groups) {
		om_list_del(link);
		om_free(om_container_of(link, struct om_group, link));
	}
}

static void drain_closed(struct om_store *s);

int om_store_close(struct om_store *s)
{
	if (s->fork_generation != om_fork_generation())
		return om_err(OM_ECLOSED, "this store belongs to the process that forked this one");
	om_mutex_lock(&s->lock);
	if (s->closing)
		return leave(s, 0);
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
	forget_blocks_locked(s);
	om_pool_fini(&s->pool);
	om_disk_fini(&s->disk);
	om_table_fini(&s->table);
	__atomic_store_n(&s->closed, true, __ATOMIC_SEQ_CST);
	om_mutex_unlock(&s->lock);
	drain_closed(s);
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
	memory_unref(s);
}

/* ---- leases ---- */

struct om_lease *om_lease_make_locked(struct om_store *s, struct om_block *b, bool write)
{
	struct om_lease *l = om_alloc(1, sizeof(*l));

	if (!l)
		return NULL;
	l->refs = 1;
	l->store = s;
	l->block = b;
	l->data = b->data;
	l->write = write;
	l->segment = b->mem.segment;
	l->foreign = b->foreign;
	om_list_push_tail(&b->holders, &l->link);
	om_block_ref(b);
	if (l->segment)
		om_segment_ref(l->segment);
	if (l->foreign)
		__atomic_add_fetch(&l->foreign->refs, 1, __ATOMIC_RELAXED);
	__atomic_add_fetch(&s->refs, 1, __ATOMIC_RELAXED);
	return l;
}

/* What a lease owns beside its count. The store's memory may go. */
static void lease_free(struct om_lease *l)
{
	struct om_store *s = l->store;

	if (l->segment)
		om_segment_unref(l->segment);
	om_foreign_unref(l->foreign);
	om_block_unref(l->block);
	om_free(l);
	memory_unref(s);
}

static struct om_lease *take_dropped(struct om_store *s)
{
	if (om_likely(!__atomic_load_n(&s->dropped, __ATOMIC_RELAXED)))
		return NULL;
	return __atomic_exchange_n(&s->dropped, NULL, __ATOMIC_ACQ_REL);
}

void om_store_drain_locked(struct om_store *s)
{
	struct om_lease *l = take_dropped(s);

	while (l) {
		struct om_lease *next = l->next;
		struct om_block *b = l->block;

		om_list_del(&l->link);
		if (l->write)
			b->writer = false;
		if (l->segment) /* before the block may go, so that its segment can be kept for the next */
			om_segment_unref(l->segment);
		l->segment = NULL;
		om_fetch_unlease_locked(s, b);
		lease_free(l);
		l = next;
	}
}

static void drain_closed(struct om_store *s)
{
	struct om_lease *l = take_dropped(s);

	while (l) {
		struct om_lease *next = l->next;

		lease_free(l);
		l = next;
	}
}

void om_store_drain(struct om_store *s)
{
	if (!__atomic_load_n(&s->dropped, __ATOMIC_RELAXED) ||
	    s->fork_generation != om_fork_generation() || !om_mutex_trylock(&s->lock))
		return;
	if (!s->closing)
		om_store_drain_locked(s);
	om_mutex_unlock(&s->lock);
}

void om_lease_ref(struct om_lease *l)
{
	__atomic_add_fetch(&l->refs, 1, __ATOMIC_RELAXED);
}

void om_lease_unref(struct om_lease *l)
{
	struct om_store *s = l->store;

	if (__atomic_sub_fetch(&l->refs, 1, __ATOMIC_ACQ_REL) ||
	    s->fork_generation != om_fork_generation())
		return;
	/* The store's memory must outlive the look at `closed`. Either the closer sees this push, or
	 * this thread sees that it is closed. */
	__atomic_add_fetch(&s->refs, 1, __ATOMIC_RELAXED);
	l->next = __atomic_load_n(&s->dropped, __ATOMIC_RELAXED);
	while (!__atomic_compare_exchange_n(&s->dropped, &l->next, l, true, __ATOMIC_SEQ_CST,
	                                    __ATOMIC_RELAXED))
		;
	if (__atomic_load_n(&s->closed, __ATOMIC_SEQ_CST))
		drain_closed(s);
	memory_unref(s);
}

void om_lease_view_ref(struct om_lease *l)
{
	struct om_block *b = l->block;

	om_lease_ref(l);
	if (!__atomic_fetch_add(&b->views, 1, __ATOMIC_RELAXED))
		__atomic_add_fetch(&l->store->exported_bytes, b->nbytes, __ATOMIC_RELAXED);
}

void om_lease_view_unref(struct om_lease *l)
{
	struct om_block *b = l->block;

	if (__atomic_sub_fetch(&b->views, 1, __ATOMIC_RELAXED) == 0)
		__atomic_sub_fetch(&l->store->exported_bytes, b->nbytes, __ATOMIC_RELAXED);
	om_lease_unref(l);
}

void *om_lease_data(const struct om_lease *l)
{
	return l->data;
}

uint64_t om_lease_nbytes(const struct om_lease *l)
{
	return l->block->nbytes;
}

const struct om_desc *om_lease_desc(const struct om_lease *l)
{
	return &l->block->desc;
}

const char *om_lease_name(const struct om_lease *l)
{
	return l->block->name;
}

bool om_lease_writable(const struct om_lease *l)
{
	return l->write;
}

/* The bytes are leased once, by the caller: make them the only copy. */
static int become_sole_locked(struct om_store *s, struct om_block *b)
{
	int code = b->ranges ? om_room_admit_locked(s, b->name, b->nbytes) : 0;

	if (code)
		return code;
	om_block_forget_origin(b);
	om_block_disk_drop(b, &s->disk);
	b->writer = true;
	return 0;
}

static int alone_error(const struct om_block *b)
{
	om_err(OM_EBUSY,
	       "block '%s' cannot be leased for writing: %u other leases or views hold it at the deadline",
	       b->name, b->leases);
	snprintf(om_err_last()->holders, OM_ERROR_HOLDERS, "%s (%u leases, %u views)", b->name,
	         b->leases, __atomic_load_n(&b->views, __ATOMIC_RELAXED));
	return OM_EBUSY;
}

/* Lease the block when nobody else holds it. No lease is kept while waiting: two writers that wait
 * for each other's lease to go would wait for ever. */
static int lease_alone_locked(struct om_store *s, struct om_block *b, uint64_t deadline_ns)
{
	for (;;) {
		int code = om_fetch_lease_locked(s, &b, 1, deadline_ns, NULL);

		if (code || (b->leases == 1 && !b->move && !b->holds))
			return code;
		b->counted++; /* it comes again */
		om_fetch_unlease_locked(s, b);
		do {
			if (s->closing)
				return om_err(OM_ECLOSED, "the store is closed");
			if (om_now() >= deadline_ns)
				return alone_error(b);
			om_store_wait_locked(s, deadline_ns);
		} while (b->leases || b->holds);
	}
}

int om_store_lease(struct om_store *s, const char *name, bool write, uint64_t deadline_ns,
                   struct om_lease **ret)
{
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	b = om_store_find_locked(s, name);
	if (!b)
		return leave(s, OM_ENAME);
	om_block_ref(b);
	code = write ? lease_alone_locked(s, b, deadline_ns)
	             : om_fetch_lease_locked(s, &b, 1, deadline_ns, NULL);
	if (!code) {
		if (write)
			code = become_sole_locked(s, b);
		if (!code && !(*ret = om_lease_make_locked(s, b, write))) {
			code = -ENOMEM;
			b->writer = false;
		}
		if (code)
			om_fetch_unlease_locked(s, b);
	}
	om_block_unref(b);
	return leave(s, code);
}

int om_store_lease_now(struct om_store *s, const char *name, struct om_lease **ret)
{
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	b = om_store_find_locked(s, name);
	if (!b || b->host != OM_COPY_VALID || b->writer)
		return leave(s, OM_EAGAIN);
	om_block_ref(b);
	code = om_fetch_lease_locked(s, &b, 1, 0, NULL);
	if (!code && !(*ret = om_lease_make_locked(s, b, false))) {
		code = -ENOMEM;
		om_fetch_unlease_locked(s, b);
	}
	om_block_unref(b);
	return leave(s, code);
}

/* ---- adding ---- */

static int check_name(const char *name)
{
	size_t n = strlen(name);

	if (n == 0 || n > OM_MAX_NAME)
		return om_err(OM_EVALUE, "a name must have 1 to %d bytes, not %zu", OM_MAX_NAME, n);
	return 0;
}

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
	g = om_alloc(1, sizeof(*g));
	if (!g)
		return NULL;
	strcpy(g->name, name);
	om_list_init(&g->idle);
	om_list_init(&g->ahead);
	om_list_push_tail(&s->groups, &g->link);
	return g;
}

int om_store_group(struct om_store *s, const char *group, uint64_t host_limit_bytes)
{
	struct om_group *g;
	int code = om_store_enter(s);

	if (code)
		return code;
	g = om_store_find_group_locked(s, group);
	if (!g)
		return leave(s, om_err_last()->code);
	g->limit_bytes = om_down(host_limit_bytes, OM_PAGE);
	g->lowered_from = g->used_bytes;
	om_room_shrink_locked(s, g);
	om_store_changed_locked(s);
	return leave(s, 0);
}

struct om_block *om_store_find_locked(struct om_store *s, const char *name)
{
	struct om_block *b = om_table_find(&s->table, name);

	if (!b)
		om_err(OM_ENAME, "no block is named '%s'", name);
	return b;
}

/* A record on the store's list, without a name yet. */
static int begin_block_locked(struct om_store *s, const char *name, const char *group,
                              uint64_t nbytes, const struct om_desc *desc, struct om_block **ret)
{
	struct om_group *g;
	int code = check_name(name);

	if (code)
		return code;
	if (om_table_find(&s->table, name))
		return om_err(OM_EVALUE, "block '%s' exists already; remove it first", name);
	g = om_store_find_group_locked(s, group);
	if (!g)
		return om_err_last()->code;
	code = om_block_create(name, nbytes, g, desc, ret);
	if (!code)
		om_list_push_tail(&s->blocks, &(*ret)->all);
	return code;
}

static int name_block_locked(struct om_store *s, struct om_block *b)
{
	if (om_table_find(&s->table, b->name))
		return om_err(OM_EVALUE, "block '%s' exists already; remove it first", b->name);
	return om_table_insert(&s->table, b);
}

/* Room for a new block's bytes; the block is held by a lease of the caller. */
static int reserve_new_locked(struct om_store *s, struct om_block *b, uint64_t deadline_ns,
                              struct om_extent *ret)
{
	uint64_t bytes = om_block_host_bytes(b);
	int code = om_room_wait_locked(s, b->group, bytes, deadline_ns, NULL, 0);

	return code ? code : om_fetch_reserve_locked(s, b->group, bytes, ret);
}

static int add_bytes_locked(struct om_store *s, struct om_block *b, const void *data,
                            uint64_t deadline_ns)
{
	struct om_extent mem;
	int code = reserve_new_locked(s, b, deadline_ns, &mem);

	if (code)
		return code;
	om_block_fill_begin(b, mem);
	om_block_lease(b); /* nobody takes it away meanwhile */
	s->host_peak_bytes = OM_MAX(s->host_peak_bytes, s->pool.used_bytes);
	om_mutex_unlock(&s->lock);
	if (b->nbytes)
		memcpy(b->data, data, b->nbytes);
	om_mutex_lock(&s->lock);
	code = s->closing ? om_err(OM_ECLOSED, "the store was closed meanwhile")
	                  : name_block_locked(s, b);
	om_block_unlease(b);
	if (code)
		om_block_fill_fail(b, &s->pool);
	else
		om_block_fill_end(b);
	return code;
}

static int adopt_bytes_locked(struct om_store *s, struct om_block *b, struct om_foreign *foreign,
                              uint64_t deadline_ns)
{
	uint64_t bytes = om_block_host_bytes(b);
	int code = om_room_wait_locked(s, b->group, bytes, deadline_ns, NULL, 0);

	/* A hole in a shared segment is no room for memory from elsewhere. */
	if (!code && om_pool_room(&s->pool) < bytes)
		code = om_room_wait_locked(s, b->group, OM_MAX(bytes, OM_POOL_SMALL + OM_PAGE),
		                           deadline_ns, NULL, 0);
	if (!code)
		code = name_block_locked(s, b);
	if (!code) {
		om_pool_trim(&s->pool,
		             UINT64_MAX); /* the limit shrinks: nothing may be cached above it */
		om_block_adopt(b, &s->pool, foreign);
	}
	return code;
}

static int add_sole(struct om_store *s, const char *name, const char *group, const void *data,
                    uint64_t nbytes, const struct om_desc *desc, struct om_foreign *foreign,
                    uint64_t deadline_ns)
{
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	code = begin_block_locked(s, name, group, nbytes, desc, &b);
	if (code)
		return leave(s, code);
	code = om_room_admit_locked(s, name, nbytes);
	if (!code) {
		s->adding++; /* close waits for us */
		code = foreign ? adopt_bytes_locked(s, b, foreign, deadline_ns)
		               : add_bytes_locked(s, b, data, deadline_ns);
		s->adding--;
		if (code)
			om_room_unadmit_locked(s, nbytes);
	}
	if (code) {
		struct om_error error = *om_err_last();

		om_list_del(&b->all);
		b->group->blocks--;
		om_block_unref(b);
		om_err_set(&error);
	}
	om_store_changed_locked(s);
	return leave(s, code);
}

int om_store_add(struct om_store *s, const char *name, const char *group, const void *data,
                 uint64_t nbytes, const struct om_desc *desc, uint64_t deadline_ns)
{
	return add_sole(s, name, group, data, nbytes, desc, NULL, deadline_ns);
}

int om_store_take(struct om_store *s, const char *name, const char *group, void *data,
                  uint64_t nbytes, const struct om_desc *desc, void (*release)(void *context),
                  void *context, uint64_t deadline_ns)
{
	struct om_foreign *f = om_alloc(1, sizeof(*f));
	int code;

	if (!f)
		return -ENOMEM;
	*f = (struct om_foreign){ .refs = 1, .data = data, .release = release, .context = context };
	code = add_sole(s, name, group, NULL, nbytes, desc, f, deadline_ns);
	if (code)
		om_free(f);
	return code;
}

/* Open the files, one descriptor a path of this store; merge ranges that adjoin. */
static int open_ranges(struct om_store *s, const struct om_file_range *in, size_t count,
                       struct om_range **ret, size_t *ret_count, uint64_t *ret_nbytes)
{
	struct om_range *out = om_alloc(count, sizeof(*out));
	uint64_t total = 0;
	size_t n = 0;
	int code = out ? 0 : -ENOMEM;

	for (size_t i = 0; i < count && !code; i++) {
		struct om_file *file = NULL;
		uint64_t end;

		code = om_store_open_file(s, in[i].path, &file);
		if (code)
			break;
		if (om_add_overflows(in[i].offset, in[i].nbytes, &end) || end > file->id.size) {
			code = om_err(OM_EVALUE,
			              "%s: bytes %llu + %llu lie outside the file, %llu bytes",
			              in[i].path, (unsigned long long)in[i].offset,
			              (unsigned long long)in[i].nbytes,
			              (unsigned long long)file->id.size);
			om_file_unref(file);
			break;
		}
		total += in[i].nbytes;
		if (n && out[n - 1].file == file &&
		    out[n - 1].offset + out[n - 1].nbytes == in[i].offset) {
			out[n - 1].nbytes += in[i].nbytes;
			om_file_unref(file);
		} else {
			out[n++] = (struct om_range){ file, in[i].offset, in[i].nbytes };
		}
	}
	if (code) {
		while (n)
			om_file_unref(out[--n].file);
		om_free(out);
		return code;
	}
	*ret = out;
	*ret_count = n;
	*ret_nbytes = total;
	return 0;
}

int om_store_open_file(struct om_store *s, const char *path, struct om_file **ret)
{
	struct om_file *found = NULL;

	om_mutex_lock(&s->lock);
	for (struct om_list *at = s->blocks.prev; at != &s->blocks && !found; at = at->prev) {
		struct om_block *b = om_container_of(at, struct om_block, all);

		for (size_t i = 0; i < b->range_count && !found; i++)
			if (!strcmp(b->ranges[i].file->path, path))
				found = b->ranges[i].file;
	}
	if (found)
		om_file_ref(found);
	om_mutex_unlock(&s->lock);
	if (found && !om_file_is_at(found, path)) {
		om_file_unref(
			found); /* another file has the name now: blocks of the old one keep it */
		found = NULL;
	}
	*ret = found;
	return found ? 0 : om_file_open(path, ret);
}

int om_store_add_file(struct om_store *s, const char *name, const char *group,
                      const struct om_file_range *ranges, size_t count, const struct om_desc *desc)
{
	struct om_range *opened;
	size_t opened_count;
	uint64_t nbytes;
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	om_mutex_unlock(&s->lock);
	if (!count)
		return om_err(OM_EVALUE, "block '%s': no extents", name);
	code = open_ranges(s, ranges, count, &opened, &opened_count, &nbytes);
	if (code)
		return code;
	om_mutex_lock(&s->lock);
	code = s->closing ? om_err(OM_ECLOSED, "the store is closed")
	                  : begin_block_locked(s, name, group, nbytes, desc, &b);
	if (!code) {
		code = om_table_insert(&s->table, b);
		if (code) {
			om_list_del(&b->all);
			b->group->blocks--;
			om_block_unref(b);
		} else {
			b->ranges = opened;
			b->range_count = opened_count;
		}
	}
	om_mutex_unlock(&s->lock);
	if (code) {
		while (opened_count)
			om_file_unref(opened[--opened_count].file);
		om_free(opened);
	}
	return code;
}

/* ---- removing ---- */

void om_store_reap_locked(struct om_store *s, struct om_block *b)
{
	if (b->named || b->leases || b->move || b->holds || om_list_empty(&b->all) ||
	    b->host == OM_COPY_FILLING)
		return;
	if (b->host != OM_COPY_NONE)
		om_block_host_drop(b, &s->pool);
	om_block_disk_drop(b, &s->disk);
	if (!b->ranges)
		om_room_unadmit_locked(s, b->nbytes);
	om_list_del(&b->all);
	b->group->blocks--;
	om_block_unref(b);
}

int om_store_remove(struct om_store *s, const char *name)
{
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	b = om_store_find_locked(s, name);
	if (!b)
		return leave(s, OM_ENAME);
	om_table_remove(&s->table, b);
	om_block_ref(b);
	om_fetch_cancel_locked(s, b);
	om_store_reap_locked(s, b);
	om_block_unref(b);
	om_store_changed_locked(s);
	return leave(s, 0);
}

int om_store_evict(struct om_store *s, const char *name, uint64_t deadline_ns)
{
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	b = om_store_find_locked(s, name);
	if (!b)
		return leave(s, OM_ENAME);
	om_block_ref(b);
	code = om_room_evict_locked(s, b, deadline_ns);
	om_block_unref(b);
	return leave(s, code);
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
