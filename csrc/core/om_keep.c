/*
 * om_keep: what a stream has in HOST all the time: blocks kept plain, and forms of those kept encoded, which
 * are made here when the stream is loaded; and whole units for as long as they are told to stay. Under the
 * store lock; reading and encoding give it up.
 */
#include <errno.h>

#include "core/om_stream_int.h"

/* Begin to bring a block in, if there is room for it. OM_EAGAIN, OM_EBUSY: not now. */
static int start_kept_locked(struct om_stream *st, struct om_block *b)
{
	uint64_t bytes = om_fetch_missing_bytes(&b, 1, false);
	int code = bytes ? om_room_make_locked(st->store, st->group, bytes, 0, &b, 1) : 0;

	return code ? code : om_fetch_start_locked(st->store, &b, 1, OM_DEMAND);
}

/* Blocks kept plain, of more than `least` bytes: start them all, then take them one by one as they come. */
static int load_plain_locked(struct om_stream *st, uint64_t least, uint64_t deadline_ns)
{
	int code = 0;

	for (size_t i = 0; i < st->count && !code; i++) {
		struct om_unit *u = &st->units[i];

		for (size_t k = u->streamed_count; k < u->count && !code; k++)
			if (u->blocks[k]->nbytes >= least && u->blocks[k]->host == OM_COPY_NONE)
				code = start_kept_locked(st, u->blocks[k]);
	}
	if (code == OM_EAGAIN || code == OM_EBUSY)
		code = 0; /* the leases below wait for room */
	for (size_t i = 0; i < st->count && !code; i++) {
		struct om_unit *u = &st->units[i];

		for (size_t k = u->streamed_count; k < u->count && !code; k++)
			if (u->blocks[k]->nbytes >= least && !u->leases[k])
				code = om_stream_lease_unit_locked(st, u, k, 1, deadline_ns, NULL);
	}
	return code;
}

static bool kept_encoded(const struct om_unit *u, size_t k)
{
	return u->keep[k] == OM_KEEP_FAST || u->keep[k] == OM_KEEP_BALANCED;
}

static enum om_coding coding_of(const struct om_unit *u, size_t k)
{
	return u->keep[k] == OM_KEEP_FAST ? OM_CODING_FAST : OM_CODING_BALANCED;
}

/* The form is leased from now on, if the caller's lease of it is to stay. */
static int keep_form_locked(struct om_stream *st, struct om_unit *u, size_t k,
                            struct om_block *form)
{
	u->forms[k] = om_lease_make_locked(st->store, form, false);
	if (!u->forms[k])
		om_fetch_unlease_locked(st->store, form);
	return u->forms[k] ? 0 : -ENOMEM;
}

/* A form that the block has already, if it is encoded as it should be. OM_EAGAIN: it is not. */
static int keep_own_form_locked(struct om_stream *st, struct om_unit *u, size_t k,
                                uint64_t deadline_ns)
{
	struct om_block *form = om_block_coded(u->blocks[k]);
	enum om_coding coding;
	uint64_t nbytes;
	int code;

	if (!form)
		return OM_EAGAIN;
	om_block_ref(form);
	code = om_fetch_lease_locked(st->store, &form, 1, deadline_ns, NULL);
	if (!code && !om_coded_info(form->body->data, form->nbytes, &nbytes, &coding) &&
	    coding == coding_of(u, k))
		code = keep_form_locked(st, u, k, form);
	else if (!code) {
		om_fetch_unlease_locked(st->store, form);
		code = OM_EAGAIN;
	}
	om_block_unref(form);
	return code;
}

/* Give up a block's plain bytes, and a form that is not kept. */
void om_stream_forget_block_locked(struct om_stream *st, struct om_block *b)
{
	struct om_block *form = om_block_coded(b), *both[] = { b, form };

	for (size_t i = 0; i < 2 && both[i]; i++) {
		if (both[i]->leases || both[i]->body->holds)
			continue;
		if (both[i]->host == OM_COPY_VALID && om_block_clean(both[i]))
			om_room_drop_locked(st->store, both[i]);
		else if (both[i]->host == OM_COPY_FILLING)
			om_fetch_cancel_locked(st->store, both[i]);
	}
}

/* Bytes that are kept, or will be when all is loaded: plain blocks, and forms that were made. */
static uint64_t kept_bytes(const struct om_stream *st)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < st->count; i++) {
		const struct om_unit *u = &st->units[i];

		for (size_t k = 0; k < u->count; k++)
			if (k >= u->streamed_count)
				bytes += om_block_host_bytes(u->blocks[k]);
			else if (u->forms[k])
				bytes += u->forms[k]->block->body->mem.bytes;
	}
	return bytes;
}

/* Bytes of forms that may be kept besides, so that the ring can be as large as it has to be. */
static uint64_t room_for_forms(const struct om_stream *st)
{
	uint64_t limit = st->group->limit_bytes, taken = kept_bytes(st) + st->ring_bytes;

	return limit ? om_down(limit - OM_MIN(limit, taken), OM_PAGE) : UINT64_MAX;
}

/* Read a block and encode it, unless it comes encoded. What would hardly be smaller is not kept. */
static int load_encoded_locked(struct om_stream *st, struct om_unit *u, size_t k,
                               uint64_t deadline_ns)
{
	struct om_block *b = u->blocks[k], *form = NULL;
	int code = keep_own_form_locked(st, u, k, deadline_ns);

	if (code != OM_EAGAIN)
		return code;
	code = om_fetch_lease_locked(st->store, &b, 1, deadline_ns, NULL);
	if (code)
		return code;
	code = om_pack_encode_locked(st->store, b, coding_of(u, k), room_for_forms(st), deadline_ns,
	                             &form);
	if (form) {
		om_block_lease(form);
		code = keep_form_locked(st, u, k, form);
	} else if (!code) {
		u->keep[k] = OM_KEEP_NOTHING;
	}
	om_block_unref(form);
	om_fetch_unlease_locked(st->store, b);
	om_stream_forget_block_locked(st, b);
	return code;
}

struct place_of_block {
	struct om_unit *u;
	size_t k;
};

/* The next block that is to be kept encoded and is not yet, from `at` on. */
static bool next_encoded(const struct om_stream *st, struct place_of_block *at)
{
	for (; at->u < st->units + st->count; at->u++, at->k = 0)
		for (; at->k < at->u->streamed_count; at->k++)
			if (kept_encoded(at->u, at->k) && !at->u->forms[at->k])
				return true;
	return false;
}

static int load_all_encoded_locked(struct om_stream *st, uint64_t deadline_ns)
{
	struct place_of_block at = { st->units, 0 };
	int code = 0;

	while (!code && next_encoded(st, &at)) {
		struct place_of_block ahead = { at.u, at.k + 1 };

		code = start_kept_locked(st, at.u->blocks[at.k]);
		if (!code && next_encoded(st, &ahead)) /* it is read while this one is encoded */
			code = start_kept_locked(st, ahead.u->blocks[ahead.k]);
		if (!code || code == OM_EAGAIN || code == OM_EBUSY)
			code = load_encoded_locked(st, at.u, at.k, deadline_ns);
	}
	return code;
}

/* Bytes of the largest block that is kept encoded. */
static uint64_t largest_encoded(const struct om_stream *st)
{
	struct place_of_block at = { st->units, 0 };
	uint64_t largest = 0;

	for (; next_encoded(st, &at); at.k++)
		largest = OM_MAX(largest, at.u->blocks[at.k]->nbytes);
	return largest;
}

int om_stream_load(struct om_stream *st, uint64_t deadline_ns)
{
	struct om_store *s = st->store;
	int code = om_store_enter(s);
	uint64_t largest;

	if (code)
		return code;
	/* Encoding takes the ring, and decoding what is kept plain takes its form beside it: so what is
	 * larger than a slot comes first, while there is room, and what is smaller comes last. */
	largest = largest_encoded(st);
	if (largest)
		code = load_plain_locked(st, largest, deadline_ns);
	code = code ? code : load_all_encoded_locked(st, deadline_ns);
	code = code ? code : load_plain_locked(st, 0, deadline_ns);
	om_mutex_unlock(&s->lock);
	return code;
}

int om_stream_reserve(struct om_stream *st, uint64_t ring_bytes)
{
	int code = om_store_enter(st->store);

	if (code)
		return code;
	st->ring_bytes = ring_bytes;
	return om_store_leave(st->store, 0);
}

static void forget_form_locked(struct om_stream *st, struct om_unit *u, size_t k)
{
	struct om_block *form = u->forms[k] ? u->forms[k]->block : NULL;

	if (!form)
		return;
	om_lease_unref(u->forms[k]);
	u->forms[k] = NULL;
	u->keep[k] = OM_KEEP_NOTHING;
	om_store_drain_locked(st->store);
	if (form == u->blocks[k]->body->packed)
		om_pack_drop_locked(st->store, u->blocks[k]);
	else
		om_stream_forget_block_locked(st, u->blocks[k]);
}

int om_stream_forget(struct om_stream *st, size_t unit)
{
	int code = om_stream_check_unit(st, unit);

	if (code || (code = om_store_enter(st->store)))
		return code;
	for (size_t k = 0; k < st->units[unit].streamed_count; k++)
		if (om_block_has_origin(st->units[unit].blocks[k]))
			forget_form_locked(st, &st->units[unit], k);
	om_pool_trim(&st->store->pool, st->ring_bytes, UINT64_MAX);
	om_store_changed_locked(st->store);
	return om_store_leave(st->store, 0);
}

/* ---- units that stay for a while ---- */

int om_stream_keep(struct om_stream *st, size_t unit, bool kept, bool *ret_unbind)
{
	struct om_unit *u;
	int code = om_stream_check_unit(st, unit);

	*ret_unbind = false;
	if (code || (code = om_store_enter(st->store)))
		return code;
	u = &st->units[unit];
	if (u->state == OM_UNIT_BOUND)
		st->settled += (size_t)kept - (size_t)u->kept;
	u->kept = kept;
	for (size_t i = 0; i < u->count && kept; i++) /* worth a move when it is read next */
		u->blocks[i]->body->align = OM_BLOCK_ALIGN;
	if (!kept && u->state == OM_UNIT_BOUND && !u->users) {
		u->state = OM_UNIT_UNBINDING;
		*ret_unbind = true;
	}
	return om_store_leave(st->store, 0);
}

int om_stream_linger(struct om_stream *st, bool lingers)
{
	struct om_group *g = st->group;
	int code = om_store_enter(st->store);

	if (code)
		return code;
	/* Passes are cycles: what was used last is used again last, and goes first. Who runs the model next then finds
	 * the beginning there, and computes while the rest is read. */
	if (lingers && g->policy->ops == &om_policy_lru) {
		code = om_group_set_policy(g, &om_policy_nextuse);
		if (code)
			return om_store_leave(st->store, code);
	}
	g->lingering += (unsigned)lingers - (unsigned)st->lingers;
	g->mixed = g->apart = true; /* units that are kept come and go like others */
	st->lingers = lingers;
	return om_store_leave(st->store, 0);
}
