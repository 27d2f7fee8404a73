/*
 * om_lease: leases: the right to touch a block's bytes, and the way back from it.
 *
 * A lease goes on any thread, without a lock: it is pushed to `dropped`, and whoever has the store
 * lock next takes it from there (om_store_drain_locked). It owns a reference to the record, to the
 * memory, and to the store's memory, so that it outlives all of them.
 */
#include <errno.h>
#include <stdio.h>

#include "core/om_store_int.h"

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
	om_store_unref_memory(s);
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

void om_lease_drain_closed(struct om_store *s)
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
		om_lease_drain_closed(s);
	om_store_unref_memory(s);
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
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code;
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
	return om_store_leave_block(s, b, code);
}

int om_store_lease_now(struct om_store *s, const char *name, struct om_lease **ret)
{
	struct om_block *b;
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code == OM_ENAME ? OM_EAGAIN : code;
	if (b->host != OM_COPY_VALID || b->writer)
		return om_store_leave_block(s, b, OM_EAGAIN);
	code = om_fetch_lease_locked(s, &b, 1, 0, NULL);
	if (!code && !(*ret = om_lease_make_locked(s, b, false))) {
		code = -ENOMEM;
		om_fetch_unlease_locked(s, b);
	}
	return om_store_leave_block(s, b, code);
}
