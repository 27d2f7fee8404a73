/*
 * om_stream: a planned stream: units (a decoder layer, a vision block, ...) of blocks that are kept plain,
 * kept encoded, or not kept. Those kept plain are leased for good, and so are the forms of those kept encoded,
 * whose bytes are decoded while their unit is in use. These bytes, the blocks that are not kept of the units
 * that are in use, and what has to be read for the next ones by the recorded order, share what the group's
 * limit leaves: the ring. What passes through it is called streamed, whether it is read or decoded.
 *
 * A unit's state says who may touch its windows: IDLE -> BINDING (the first user makes them) ->
 * BOUND (any number of users) -> UNBINDING (the last one takes them away) -> IDLE. All under the store lock;
 * waits give it up. A unit's streamed blocks are leased all or none, so that two threads cannot
 * hold half a ring each.
 */
#include <errno.h>
#include <string.h>

#include "core/om_pattern.h"
#include "core/om_store_int.h"

enum unit_state { IDLE, BINDING, BOUND, UNBINDING };

struct unit {
	char *name;
	enum unit_state state;
	unsigned users;
	size_t count, streamed_count;
	struct om_block **blocks; /* streamed ones first */
	struct om_lease **leases; /* in the order of `blocks` */
	struct om_lease **forms;  /* likewise: of the forms that are kept */
	uint8_t *keep;            /* likewise: enum om_keep */
	size_t *place;            /* caller's index -> index in `blocks` */
};

struct om_stream {
	struct om_store *store;
	struct om_group *group;
	struct unit *units;
	size_t count;
	bool opened;               /* the group counts this stream */
	struct om_pattern pattern; /* of units that have streamed blocks */
	struct om_stream_stats stats;
	uint64_t read_bytes_before, decoded_bytes_before, decode_ns_before;
	uint64_t ring_bytes; /* that what is kept leaves */
	uint32_t *ahead;     /* scratch: units foretold, in order */
};

static void unit_fini(struct unit *u)
{
	for (size_t i = 0; i < u->count && u->blocks; i++)
		if (u->blocks[i])
			om_block_unref(u->blocks[i]);
	om_free(u->name);
	om_free(u->blocks);
	om_free(u->leases);
	om_free(u->forms);
	om_free(u->keep);
	om_free(u->place);
}

static int unit_init_locked(struct om_stream *st, struct unit *u, const struct om_stream_unit *in)
{
	size_t at[2] = { 0, 0 }; /* next place of a streamed, of a resident block */

	u->name = om_strdup(in->name);
	u->count = in->count;
	u->blocks = om_alloc(in->count, sizeof(*u->blocks));
	u->leases = om_alloc(in->count, sizeof(*u->leases));
	u->forms = om_alloc(in->count, sizeof(*u->forms));
	u->keep = om_alloc(in->count, sizeof(*u->keep));
	u->place = om_alloc(in->count, sizeof(*u->place));
	if (!u->name || !u->blocks || !u->leases || !u->forms || !u->keep || !u->place)
		return -ENOMEM;
	for (size_t i = 0; i < in->count; i++)
		u->streamed_count += in->keep[i] != OM_KEEP_PLAIN;
	at[1] = u->streamed_count;
	for (size_t i = 0; i < in->count; i++) {
		struct om_block *b = om_store_find_locked(st->store, in->blocks[i]);
		bool plain = in->keep[i] == OM_KEEP_PLAIN;

		if (!b)
			return OM_ENAME;
		if (b->group != st->group)
			return om_err(
				OM_EVALUE,
				"unit '%s': block '%s' is in group '%s', not in the stream's, '%s'",
				in->name, b->name, b->group->name, st->group->name);
		if (om_block_wake(b, NULL))
			return -ENOMEM;
		b->body->align = plain ? OM_BLOCK_ALIGN : OM_STREAM_ALIGN;
		u->place[i] = at[plain]++;
		u->blocks[u->place[i]] = b;
		u->keep[u->place[i]] = in->keep[i];
		om_block_ref(b);
	}
	return 0;
}

int om_stream_create(struct om_store *s, const char *group, const struct om_stream_unit *units,
                     size_t count, struct om_stream **ret)
{
	struct om_stream *st = om_alloc(1, sizeof(*st));
	size_t streamed = 0;
	int code = st ? om_store_enter(s) : -ENOMEM;

	if (code) {
		om_free(st);
		return code;
	}
	st->store = s;
	st->count = count;
	st->units = om_alloc(count, sizeof(*st->units));
	st->ahead = om_alloc(count, sizeof(*st->ahead));
	st->group = om_store_find_group_locked(s, group);
	code = st->units && st->ahead && st->group ? 0 : om_err_last()->code;
	for (size_t i = 0; i < count && !code; i++) {
		code = unit_init_locked(st, &st->units[i], &units[i]);
		if (st->units[i].streamed_count)
			st->ahead[streamed++] = (uint32_t)i;
	}
	if (!code)
		code = om_pattern_init(&st->pattern, count, st->ahead, streamed);
	if (!code) {
		st->group->streams++;
		st->opened = true;
		st->read_bytes_before = st->group->read_bytes;
		st->decoded_bytes_before = st->group->decoded_bytes;
		st->decode_ns_before = st->group->decode_ns;
	}
	om_mutex_unlock(&s->lock);
	om_store_ref(s);
	if (code) {
		struct om_error error = *om_err_last();

		om_stream_free(st);
		return om_err_set(&error);
	}
	*ret = st;
	return 0;
}

static int lease_unit_locked(struct om_stream *st, struct unit *u, size_t first, size_t count,
                             uint64_t deadline_ns, uint64_t *ret_stall_ns)
{
	struct om_store *s = st->store;
	int code = count ? om_fetch_lease_locked(s, u->blocks + first, count, deadline_ns,
	                                         ret_stall_ns)
	                 : 0;

	for (size_t i = first; i < first + count && !code; i++) {
		u->leases[i] = om_lease_make_locked(s, u->blocks[i], false);
		if (u->leases[i])
			continue;
		code = -ENOMEM;
		for (size_t k = i; k < first + count; k++) /* those without a lease object */
			om_fetch_unlease_locked(s, u->blocks[k]);
		for (size_t k = first; k < i; k++) {
			om_lease_unref(u->leases[k]);
			u->leases[k] = NULL;
		}
	}
	return code;
}

/* ---- what is kept ---- */

/* Begin to bring a block in, if there is room for it. OM_EAGAIN, OM_EBUSY: not now. */
static int start_kept_locked(struct om_stream *st, struct om_block *b)
{
	uint64_t bytes = om_fetch_missing_bytes(&b, 1, false);
	int code = bytes ? om_room_make_locked(st->store, st->group, bytes, false, &b, 1) : 0;

	return code ? code : om_fetch_start_locked(st->store, &b, 1, OM_DEMAND);
}

/* Blocks kept plain, of more than `least` bytes: start them all, then take them one by one as they come. */
static int load_plain_locked(struct om_stream *st, uint64_t least, uint64_t deadline_ns)
{
	int code = 0;

	for (size_t i = 0; i < st->count && !code; i++) {
		struct unit *u = &st->units[i];

		for (size_t k = u->streamed_count; k < u->count && !code; k++)
			if (u->blocks[k]->nbytes >= least && u->blocks[k]->host == OM_COPY_NONE)
				code = start_kept_locked(st, u->blocks[k]);
	}
	if (code == OM_EAGAIN || code == OM_EBUSY)
		code = 0; /* the leases below wait for room */
	for (size_t i = 0; i < st->count && !code; i++) {
		struct unit *u = &st->units[i];

		for (size_t k = u->streamed_count; k < u->count && !code; k++)
			if (u->blocks[k]->nbytes >= least && !u->leases[k])
				code = lease_unit_locked(st, u, k, 1, deadline_ns, NULL);
	}
	return code;
}

static bool kept_encoded(const struct unit *u, size_t k)
{
	return u->keep[k] == OM_KEEP_FAST || u->keep[k] == OM_KEEP_BALANCED;
}

static enum om_coding coding_of(const struct unit *u, size_t k)
{
	return u->keep[k] == OM_KEEP_FAST ? OM_CODING_FAST : OM_CODING_BALANCED;
}

/* The form is leased from now on, if the caller's lease of it is to stay. */
static int keep_form_locked(struct om_stream *st, struct unit *u, size_t k, struct om_block *form)
{
	u->forms[k] = om_lease_make_locked(st->store, form, false);
	if (!u->forms[k])
		om_fetch_unlease_locked(st->store, form);
	return u->forms[k] ? 0 : -ENOMEM;
}

/* A form that the block has already, if it is encoded as it should be. OM_EAGAIN: it is not. */
static int keep_own_form_locked(struct om_stream *st, struct unit *u, size_t k,
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
static void forget_block_locked(struct om_stream *st, struct om_block *b)
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
		const struct unit *u = &st->units[i];

		for (size_t k = 0; k < u->count; k++)
			if (k >= u->streamed_count)
				bytes += om_block_host_bytes(u->blocks[k]);
			else if (u->forms[k])
				bytes += u->forms[k]->block->body->mem.bytes;
	}
	return bytes;
}

/* May this form be kept as well, and the ring be as large as it has to be? */
static bool has_room(const struct om_stream *st, const struct om_block *form)
{
	uint64_t limit = st->group->limit_bytes;

	return !limit || kept_bytes(st) + om_block_host_bytes(form) + st->ring_bytes <= limit;
}

/* Read a block and encode it, unless it comes encoded. What would hardly be smaller is not kept. */
static int load_encoded_locked(struct om_stream *st, struct unit *u, size_t k, uint64_t deadline_ns)
{
	struct om_block *b = u->blocks[k], *form = NULL;
	int code = keep_own_form_locked(st, u, k, deadline_ns);

	if (code != OM_EAGAIN)
		return code;
	code = om_fetch_lease_locked(st->store, &b, 1, deadline_ns, NULL);
	if (code)
		return code;
	code = om_pack_encode_locked(st->store, b, coding_of(u, k), deadline_ns, &form);
	if (form && has_room(st, form)) {
		om_block_lease(form);
		code = keep_form_locked(st, u, k, form);
	} else if (!code) {
		u->keep[k] = OM_KEEP_NOTHING;
		om_pack_drop_locked(st->store, b);
	}
	om_block_unref(form);
	om_fetch_unlease_locked(st->store, b);
	forget_block_locked(st, b);
	return code;
}

struct place_of_block {
	struct unit *u;
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
	if (largest) /* slots would be taken whole, by what is smaller and stays */
		om_pool_trim(&s->pool, UINT64_MAX);
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

/* ---- the ring ---- */

/* Bytes that the unit's streamed blocks hold without being in use. */
static bool speculated(const struct unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++) {
		const struct om_block *b = u->blocks[i], *form = om_block_coded(b);

		if ((b->host != OM_COPY_NONE && !b->leases) ||
		    (form && form->host != OM_COPY_NONE && !form->leases))
			return true;
	}
	return false;
}

static void forget_unit_locked(struct om_stream *st, struct unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++)
		forget_block_locked(st, u->blocks[i]);
}

/* Let go what was fetched ahead for units that are not among the next ones. Did it free any bytes
 * now? (What is in flight goes when it lands.) */
static bool drop_strays_locked(struct om_stream *st, size_t foretold)
{
	uint64_t before = st->group->used_bytes;

	for (size_t i = 0; i < st->count; i++) {
		struct unit *u = &st->units[i];
		bool wanted = u->users > 0 || !speculated(u);

		for (size_t k = 0; k < foretold && !wanted; k++)
			wanted = st->ahead[k] == i;
		if (!wanted)
			forget_unit_locked(st, u);
	}
	return st->group->used_bytes < before;
}

static bool room_now(const struct om_stream *st, uint64_t bytes)
{
	const struct om_group *g = st->group;

	return (!g->limit_bytes || g->used_bytes + bytes <= g->limit_bytes) &&
	       om_pool_fits(&st->store->pool, bytes);
}

/* Fetch the next units of the order into what room the ring has. Forms are fetched, not decoded; when no
 * unit is in use (`between`), what the next one decodes to has its room kept. */
static void fetch_ahead_locked(struct om_stream *st, bool between)
{
	uint64_t kept = 0;
	size_t foretold = 0;

	for (size_t k = 0; k < st->count; k++) {
		uint32_t id;
		struct unit *u;
		uint64_t bytes;

		if (!om_pattern_next(&st->pattern, k, &id))
			return;
		st->ahead[foretold++] = id;
		u = &st->units[id];
		bytes = om_fetch_missing_bytes(u->blocks, u->streamed_count, true);
		if (between && !k)
			kept = om_fetch_missing_bytes(u->blocks, u->streamed_count, false) - bytes;
		if (!bytes)
			continue;
		while (!room_now(st, bytes + kept))
			if (!drop_strays_locked(st, foretold))
				return;
		if (om_fetch_start_locked(st->store, u->blocks, u->streamed_count, OM_PREFETCH))
			return; /* it will be fetched when it is needed */
	}
}

/* ---- use ---- */

static int check_unit(const struct om_stream *st, size_t unit)
{
	if (unit >= st->count)
		return om_err(OM_EVALUE, "unit %zu: the stream has %zu", unit, st->count);
	return 0;
}

/* Are the streamed bytes in memory, if not yet proven? */
static bool arrived(const struct unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++) {
		const struct om_block *b = om_block_wanted(u->blocks[i]);

		if (b->host == OM_COPY_NONE ||
		    (b->host == OM_COPY_FILLING && !(b->body->move && b->body->move->landed)))
			return false;
	}
	return true;
}

int om_stream_enter(struct om_stream *st, size_t unit, uint64_t deadline_ns, bool *ret_bind)
{
	struct om_store *s = st->store;
	struct unit *u;
	uint64_t stall = 0;
	bool hit;
	int code = check_unit(st, unit);

	if (code || (code = om_store_enter(s)))
		return code;
	u = &st->units[unit];
	hit = arrived(u);
	while ((u->state == BINDING || u->state == UNBINDING) && !code) {
		if (s->closing)
			code = om_err(OM_ECLOSED, "the store is closed");
		else if (om_now() >= deadline_ns)
			code = om_err(OM_EBUSY,
			              "unit '%s': another thread is binding it at the deadline",
			              u->name);
		else
			om_store_wait_locked(s, deadline_ns);
	}
	*ret_bind = u->state == IDLE;
	if (!code && *ret_bind) {
		u->state = BINDING;
		code = lease_unit_locked(st, u, 0, u->streamed_count, deadline_ns, &stall);
		st->stats.stall_ns += stall;
		if (code)
			u->state = IDLE;
	}
	if (!code) {
		u->users++;
		if (u->streamed_count) {
			st->stats.enters++;
			st->stats.hits += hit;
			st->stats.mispredicted += !om_pattern_record(&st->pattern, (uint32_t)unit);
			fetch_ahead_locked(st, false);
		}
	}
	om_store_changed_locked(s);
	om_mutex_unlock(&s->lock);
	return code;
}

static void release_unit_locked(struct om_stream *st, struct unit *u)
{
	for (size_t i = 0; i < u->streamed_count; i++) {
		if (u->leases[i])
			om_lease_unref(u->leases[i]);
		u->leases[i] = NULL;
	}
	u->state = IDLE;
	u->users = 0;
	om_store_drain_locked(st->store);
	forget_unit_locked(st, u);
	fetch_ahead_locked(st, true);
	om_store_changed_locked(st->store);
}

void om_stream_bound(struct om_stream *st, size_t unit, bool ok)
{
	struct unit *u = &st->units[unit];

	if (check_unit(st, unit) || om_store_enter(st->store))
		return;
	if (u->state == BINDING && ok)
		u->state = BOUND;
	else if (u->state == BINDING)
		release_unit_locked(st, u);
	om_store_changed_locked(st->store);
	om_mutex_unlock(&st->store->lock);
}

int om_stream_leave(struct om_stream *st, size_t unit, bool *ret_unbind)
{
	struct unit *u;
	int code = check_unit(st, unit);

	*ret_unbind = false;
	if (code || (code = om_store_enter(st->store)))
		return code;
	u = &st->units[unit];
	if (!u->users) {
		code = om_err(OM_EVALUE, "unit '%s' is left more often than it was entered",
		              u->name);
	} else if (!--u->users) {
		u->state = UNBINDING;
		*ret_unbind = true;
	}
	om_mutex_unlock(&st->store->lock);
	return code;
}

void om_stream_unbound(struct om_stream *st, size_t unit)
{
	if (check_unit(st, unit) || om_store_enter(st->store))
		return;
	if (st->units[unit].state == UNBINDING)
		release_unit_locked(st, &st->units[unit]);
	om_mutex_unlock(&st->store->lock);
}

struct om_lease *om_stream_lease(struct om_stream *st, size_t unit, size_t block)
{
	if (unit >= st->count || block >= st->units[unit].count)
		return NULL;
	return st->units[unit].leases[st->units[unit].place[block]];
}

int om_stream_stats(struct om_stream *st, struct om_stream_stats *ret)
{
	int code = om_store_enter(st->store);

	if (code)
		return code;
	*ret = st->stats;
	ret->read_bytes = st->group->read_bytes - st->read_bytes_before;
	ret->decoded_bytes = st->group->decoded_bytes - st->decoded_bytes_before;
	ret->decode_ns = st->group->decode_ns - st->decode_ns_before;
	ret->packed_bytes = 0;
	for (size_t i = 0; i < st->count; i++)
		for (size_t k = 0; k < st->units[i].streamed_count; k++)
			if (st->units[i].forms[k])
				ret->packed_bytes += st->units[i].forms[k]->block->body->mem.bytes;
	om_mutex_unlock(&st->store->lock);
	return 0;
}

static void forget_form_locked(struct om_stream *st, struct unit *u, size_t k)
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
		forget_block_locked(st, u->blocks[k]);
}

int om_stream_forget(struct om_stream *st, size_t unit)
{
	int code = check_unit(st, unit);

	if (code || (code = om_store_enter(st->store)))
		return code;
	for (size_t k = 0; k < st->units[unit].streamed_count; k++)
		if (om_block_has_origin(st->units[unit].blocks[k]))
			forget_form_locked(st, &st->units[unit], k);
	om_pool_trim_to(&st->store->pool, st->ring_bytes);
	om_store_changed_locked(st->store);
	return om_store_leave(st->store, 0);
}

static void let_leases_go(struct unit *u)
{
	for (size_t k = 0; k < u->count && u->leases && u->forms; k++) {
		if (u->leases[k])
			om_lease_unref(u->leases[k]);
		if (u->forms[k])
			om_lease_unref(u->forms[k]);
	}
}

/* What the stream has encoded goes where the bytes can be had from an origin. */
static void end_unit_locked(struct om_stream *st, struct unit *u)
{
	forget_unit_locked(st, u);
	for (size_t i = 0; i < u->streamed_count; i++)
		if (u->forms[i] && om_block_has_origin(u->blocks[i]))
			om_pack_drop_locked(st->store, u->blocks[i]);
}

void om_stream_free(struct om_stream *st)
{
	struct om_store *s;

	if (!st)
		return;
	s = st->store;
	if (s->fork_generation == om_fork_generation()) {
		for (size_t i = 0; i < st->count && st->units; i++)
			let_leases_go(&st->units[i]);
		if (st->opened &&
		    !om_store_enter(s)) { /* drains; a closed store has no group any more */
			for (size_t i = 0; i < st->count; i++)
				end_unit_locked(st, &st->units[i]);
			st->group->streams--;
			om_mutex_unlock(&s->lock);
		}
		for (size_t i = 0; i < st->count && st->units; i++)
			unit_fini(&st->units[i]);
	}
	om_pattern_fini(&st->pattern);
	om_free(st->units);
	om_free(st->ahead);
	om_free(st);
	om_store_unref(s);
}
