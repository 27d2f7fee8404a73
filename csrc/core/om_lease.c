/*
 * om_lease: leases: the right to touch a block's bytes, and the way back from it.
 *
 * A lease goes on any thread, without a lock: it is pushed to `dropped`, and whoever has the store
 * lock next takes it from there (om_store_drain_locked). It owns a reference to the record, to the
 * memory, and to the store's memory, so that it outlives all of them.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "core/om_store_int.h"

struct om_lease *om_lease_make_locked(struct om_store *s, struct om_block *b, bool write)
{
	struct om_lease *l = om_alloc(1, sizeof(*l));

	if (!l)
		return NULL;
	l->refs = 1;
	l->store = s;
	l->block = b;
	l->data = b->body->data;
	l->write = write;
	l->turns = ++b->body->turns;
	b->body->shown = true;
	if (b->body->move) /* a spill, which goes on: nobody is to believe what it writes */
		b->body->move->shown = true;
	l->segment = b->body->mem.segment;
	l->foreign = b->body->foreign;
	om_list_push_tail(&b->body->holders, &l->link);
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
			b->body->writer = false;
		b->body->turns++;
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
	if (!__atomic_fetch_add(&b->body->views, 1, __ATOMIC_RELAXED))
		__atomic_add_fetch(&l->store->exported_bytes, b->nbytes, __ATOMIC_RELAXED);
}

void om_lease_view_unref(struct om_lease *l)
{
	struct om_block *b = l->block;

	if (__atomic_sub_fetch(&b->body->views, 1, __ATOMIC_RELAXED) == 0)
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
	return &l->block->body->desc;
}

const char *om_lease_name(const struct om_lease *l)
{
	return l->block->name;
}

bool om_lease_writable(const struct om_lease *l)
{
	return l->write || l->share;
}

/* The bytes are leased by the caller: HOST is to be their only copy, but for what may turn out to be the
 * same (`touched`). */
static int own_bytes_locked(struct om_store *s, struct om_block *b, enum om_access access)
{
	int code = om_block_has_origin(b) ? om_room_admit_locked(s, b) : 0;

	if (code)
		return code;
	if (access == OM_SHARE) {
		if (om_block_has_origin(b))
			om_pack_forget_origin_locked(s, b);
		b->body->touched = true;
		return 0;
	}
	om_pack_forget_origin_locked(s, b);
	om_block_disk_drop(b, &s->disk);
	om_pack_drop_locked(s, b);
	b->body->writer = true;
	return 0;
}

static int alone_error(const struct om_block *b)
{
	om_err(OM_EBUSY,
	       "block '%s' cannot be leased for writing: %u other leases or views hold it at the deadline",
	       b->name, b->leases);
	snprintf(om_err_last()->holders, OM_ERROR_HOLDERS, "%s (%u leases, %u views)", b->name,
	         b->leases, __atomic_load_n(&b->body->views, __ATOMIC_RELAXED));
	return OM_EBUSY;
}

static bool is_alone(const struct om_block *b)
{
	return b->leases == 1 && !b->body->move && !b->body->holds;
}

/* Is HOST, which a writer is about to make the only copy, still what lies below it? Whoever leased it for
 * reading may have written to it all the same. May give up the lock. */
static bool is_sound_locked(struct om_store *s, struct om_block *b)
{
	if (!b->body->shown || !b->body->hash_known || !om_block_clean(b))
		return true;
	return om_spill_hash_locked(s, b) == b->body->hash;
}

/* Lease the block when nobody else holds it. No lease is kept while waiting: two writers that wait
 * for each other's lease to go would wait for ever. */
static int lease_alone_locked(struct om_store *s, struct om_block *b, uint64_t deadline_ns)
{
	for (;;) {
		int code = om_fetch_lease_locked(s, &b, 1, deadline_ns, NULL);
		bool sound = true;

		if (!code && is_alone(b)) {
			sound = is_sound_locked(s, b);
			if (sound && is_alone(b) && !s->closing)
				return 0;
		}
		if (code)
			return code;
		b->counted++; /* it comes again */
		om_fetch_unlease_locked(s, b);
		if (!sound && b->host == OM_COPY_VALID && !b->leases && !b->body->holds) {
			om_room_drop_locked(s, b); /* what was stored comes back */
			continue;
		}
		do {
			if (s->closing)
				return om_err(OM_ECLOSED, "the store is closed");
			if (om_now() >= deadline_ns)
				return alone_error(b);
			om_store_wait_locked(s, deadline_ns);
		} while (b->leases || b->body->holds);
	}
}

int om_lease_take_locked(struct om_store *s, struct om_block *b, enum om_access access,
                         uint64_t deadline_ns, struct om_lease **ret)
{
	int code = access == OM_WRITE ? lease_alone_locked(s, b, deadline_ns)
	                              : om_fetch_lease_locked(s, &b, 1, deadline_ns, NULL);

	if (code)
		return code;
	if (access != OM_READ)
		code = own_bytes_locked(s, b, access);
	if (!code && !(*ret = om_lease_make_locked(s, b, access == OM_WRITE))) {
		code = -ENOMEM;
		b->body->writer &= access != OM_WRITE;
	}
	if (code)
		om_fetch_unlease_locked(s, b);
	else
		(*ret)->share = access == OM_SHARE;
	return code;
}

int om_store_lease(struct om_store *s, const char *name, enum om_access access,
                   uint64_t deadline_ns, struct om_lease **ret)
{
	struct om_block *b;
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code;
	return om_store_leave_block(s, b, om_lease_take_locked(s, b, access, deadline_ns, ret));
}

bool om_lease_at_hand(const struct om_block *b)
{
	return b->host == OM_COPY_VALID && !b->body->writer;
}

int om_store_lease_now(struct om_store *s, const char *name, struct om_lease **ret)
{
	struct om_block *b;
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code == OM_ENAME ? OM_EAGAIN : code;
	if (!om_lease_at_hand(b))
		return om_store_leave_block(s, b, OM_EAGAIN);
	return om_store_leave_block(s, b, om_lease_take_locked(s, b, OM_READ, 0, ret));
}

/* ---- blocks by reference ---- */

int om_store_block(struct om_store *s, const char *name, struct om_block **ret)
{
	int code = om_store_enter_block(s, name, ret);

	return code ? code : om_store_leave(s, 0);
}

void **om_block_face(struct om_block *b)
{
	return &b->face;
}

const char *om_block_name(const struct om_block *b)
{
	return b->name;
}

int om_block_lease_bytes(struct om_store *s, struct om_block *b, enum om_access access,
                         uint64_t deadline_ns, struct om_lease **ret)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	om_block_ref(b);
	if (!b->named)
		code = om_err(OM_ENAME, "block '%s' was removed", b->name);
	if (!code && om_lease_at_hand(b))
		b->counted++; /* who has accessed it takes a view now */
	if (!code)
		code = om_lease_take_locked(s, b, access, deadline_ns, ret);
	return om_store_leave_block(s, b, code);
}

static bool is_in(const struct om_block *b, const char *group)
{
	return !strcmp(b->group->name, group);
}

int om_store_access(struct om_store *s, const char *group, const char *name, uint64_t deadline_ns,
                    struct om_block **ret)
{
	struct om_block *b;
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code;
	if (is_in(b, group))
		code = om_fetch_lease_locked(s, &b, 1, deadline_ns, NULL);
	else
		code = om_err(OM_ENAME, "no block of group '%s' is named '%s'", group, name);
	if (code)
		return om_store_leave_block(s, b, code);
	om_fetch_unlease_locked(s, b);
	*ret = b;
	return om_store_leave(s, 0);
}

int om_store_access_now(struct om_store *s, const char *group, const char *name,
                        struct om_block **ret)
{
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	b = om_table_find(&s->table, name);
	if (!b || !om_lease_at_hand(b) || !is_in(b, group))
		return om_store_leave(s, OM_EAGAIN);
	om_fetch_hit_locked(s, b);
	om_block_ref(b);
	*ret = b;
	return om_store_leave(s, 0);
}
