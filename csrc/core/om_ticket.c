/*
 * om_ticket: prefetch. A ticket names blocks; what had room is on its way, the rest starts when
 * somebody waits. It holds block records, never bytes: a ticket is no lease.
 */
#include <errno.h>

#include "core/om_store_int.h"

struct om_ticket {
	struct om_store *store;
	size_t count, settled;
	bool canceled;
	int code;
	struct om_error *error;
	struct item {
		struct om_block *block;
		struct om_move *move; /* NULL: no room yet, or settled */
		bool settled;
	} items[];
};

static void settle_item_locked(struct om_ticket *t, struct item *it, int code)
{
	om_move_unref(it->move);
	it->move = NULL;
	it->settled = true;
	t->settled++;
	if (code && !t->code) {
		t->code = code;
		*t->error = *om_err_last();
	}
}

/* See what became of an item; start it if there is room. */
static void look_locked(struct om_ticket *t, struct item *it)
{
	struct om_store *s = t->store;
	struct om_block *b = om_block_wanted(it->block);

	if (it->settled)
		return;
	if (it->move && it->move->settled) {
		bool retry = it->move->error->code == OM_ECANCELED && it->block->named &&
		             !t->canceled;

		if (!retry) {
			int code = it->move->error->code;

			if (code)
				om_err_set(it->move->error);
			settle_item_locked(t, it, code);
			return;
		}
		om_move_unref(it->move); /* made way for something more urgent */
		it->move = NULL;
	}
	if (it->move)
		return;
	if (b->host == OM_COPY_VALID || b->host == OM_COPY_LEAVING) {
		settle_item_locked(t, it, 0);
	} else if (!b->named) {
		settle_item_locked(t, it, om_err(OM_ENAME, "block '%s' was removed", b->name));
	} else if (b->host == OM_COPY_NONE) {
		int code = om_room_make_locked(s, b->group, om_block_host_bytes(b), 0, NULL, 0);

		if (!code)
			code = om_fetch_start_locked(s, &b, 1, OM_PREFETCH);
		if (code && code != OM_EAGAIN && code != OM_EBUSY)
			settle_item_locked(t, it, code);
	}
	if (b->host == OM_COPY_FILLING && b->body->move && !it->settled &&
	    !b->body->move->canceled) {
		it->move = b->body->move;
		om_move_ref(it->move);
	}
}

int om_store_prefetch(struct om_store *s, const char *const *names, size_t count,
                      struct om_ticket **ret)
{
	struct om_ticket *t = om_alloc(1, sizeof(*t) + count * sizeof(t->items[0]));
	bool room = true;
	int code;

	if (!t)
		return -ENOMEM;
	t->error = om_alloc(1, sizeof(*t->error));
	code = t->error ? om_store_enter(s) : -ENOMEM;
	if (code) {
		om_free(t->error);
		om_free(t);
		return code;
	}
	t->store = s;
	for (size_t i = 0; i < count && !code; i++) {
		struct om_block *b = om_store_find_locked(s, names[i]);

		code = b ? om_block_wake(b, NULL) : OM_ENAME;
		if (code)
			break;
		om_block_ref(b);
		t->items[t->count++].block = b;
	}
	for (size_t i = 0; i < count && !code && room; i++) {
		look_locked(t, &t->items[i]);
		room = t->items[i].settled ||
		       t->items[i].move; /* in order: the next is less urgent */
	}
	if (code)
		while (t->count)
			om_block_unref(t->items[--t->count].block);
	om_mutex_unlock(&s->lock);
	if (code) {
		om_free(t->error);
		om_free(t);
		return code;
	}
	om_store_ref(s);
	*ret = t;
	return 0;
}

/* Wait for what keeps an item from being started: room, or a canceled fill that has to land. */
static int wait_start_locked(struct om_ticket *t, struct item *it, uint64_t deadline_ns)
{
	struct om_store *s = t->store;
	struct om_block *b = om_block_wanted(it->block);
	int code = 0;

	if (b->host == OM_COPY_NONE)
		code = om_room_wait_locked(s, b->group, om_block_host_bytes(b), OM_ROOM_WRITE,
		                           deadline_ns);
	if (code)
		return code;
	look_locked(t, it);
	if (it->settled || it->move)
		return 0;
	if (s->closing)
		return om_err(OM_ECLOSED, "the store is closed");
	if (om_now() >= deadline_ns)
		return om_err(OM_EBUSY, "block '%s' is not on its way at the deadline", b->name);
	om_store_wait_locked(s, deadline_ns);
	return 0;
}

int om_ticket_wait(struct om_ticket *t, uint64_t deadline_ns)
{
	struct om_store *s = t->store;
	int code = om_store_enter(s);

	if (code)
		return code;
	for (size_t i = 0; i < t->count && !code; i++) {
		struct item *it = &t->items[i];

		look_locked(t, it);
		while (!it->settled && !code && !t->canceled) {
			if (it->move)
				code = om_fetch_settle_locked(s, it->move, deadline_ns);
			else
				code = wait_start_locked(t, it, deadline_ns);
			if (it->move && it->move->settled)
				code = 0; /* the item has the error */
			look_locked(t, it);
		}
	}
	if (!code && t->canceled)
		code = om_err(OM_ECANCELED, "the prefetch was canceled");
	if (!code && t->code)
		code = om_err_set(t->error);
	om_mutex_unlock(&s->lock);
	return code;
}

bool om_ticket_done(struct om_ticket *t)
{
	bool done;

	if (om_store_enter(t->store))
		return true;
	for (size_t i = 0; i < t->count; i++)
		look_locked(t, &t->items[i]);
	done = t->canceled || t->settled == t->count;
	om_mutex_unlock(&t->store->lock);
	return done;
}

void om_ticket_cancel(struct om_ticket *t)
{
	if (om_store_enter(t->store))
		return;
	t->canceled = true;
	for (size_t i = 0; i < t->count; i++) {
		struct item *it = &t->items[i];

		if (it->move && !it->move->settled && it->move->speculative)
			om_fetch_cancel_locked(t->store, it->block);
	}
	om_store_changed_locked(t->store);
	om_mutex_unlock(&t->store->lock);
}

void om_ticket_free(struct om_ticket *t)
{
	struct om_store *s;

	if (!t)
		return;
	s = t->store;
	if (s->fork_generation == om_fork_generation()) {
		om_mutex_lock(&s->lock);
		for (size_t i = 0; i < t->count; i++) {
			om_move_unref(t->items[i].move);
			om_block_unref(t->items[i].block);
		}
		om_mutex_unlock(&s->lock);
	}
	om_free(t->error);
	om_free(t);
	om_store_unref(s);
}
