/*
 * om_pack: blocks whose bytes a face has encoded. The core calls nobody: a face takes a victim
 * (om_store_victim), encodes it, and hands the result over; when the block is wanted it decodes it.
 *
 * The encoded form is a block of its own, `inner`: it has the name of its owner but no place in the table,
 * and is filled, written out, checked and evicted like any other. Its owner keeps it until the bytes in
 * HOST may differ, or go their own way to DISK. A block with a packed form has no copy on DISK and no move.
 * It needs no admission: it is smaller than its owner, which has one, and stands in for it.
 */
#include <errno.h>
#include <string.h>

#include "core/om_hash.h"
#include "core/om_store_int.h"

static void let_inner_go_locked(struct om_store *s, struct om_block *inner)
{
	if (!inner)
		return;
	om_block_lose_name(inner);
	om_fetch_cancel_locked(s, inner);
	om_store_reap_locked(s, inner);
	om_block_unref(inner);
}

void om_pack_drop_locked(struct om_store *s, struct om_block *b)
{
	if (b->body)
		let_inner_go_locked(s, om_block_set_packed(b, NULL));
}

void om_pack_forget_origin_locked(struct om_store *s, struct om_block *b)
{
	struct om_block *origin = b->body->origin;

	om_block_forget_origin(b);
	let_inner_go_locked(s, origin);
}

int om_store_victim(struct om_store *s, const char *group, struct om_lease **ret)
{
	struct om_group *g;
	struct om_block *b;
	int code = om_store_enter_group(s, group, &g);

	if (code)
		return code;
	b = om_room_plain_victim_locked(g);
	if (!b)
		return om_store_leave(s, OM_EAGAIN);
	om_block_lease(b);
	*ret = om_lease_make_locked(s, b, false);
	if (!*ret)
		om_fetch_unlease_locked(s, b);
	return om_store_leave(s, *ret ? 0 : -ENOMEM);
}

/* Memory of `g` that a thread fills, before it is a block's. */
static void count_loose_locked(struct om_store *s, struct om_group *g, int64_t bytes)
{
	s->loose_bytes += (uint64_t)bytes;
	g->loose_bytes += (uint64_t)bytes;
	g->used_bytes += (uint64_t)bytes;
	g->peak_bytes = OM_MAX(g->peak_bytes, g->used_bytes);
	om_meter_peak_locked(s);
}

/* Memory that is loose; `whole`: a segment of its own, of that size. */
static int reserve_loose_locked(struct om_store *s, struct om_group *g, uint64_t bytes, bool whole,
                                uint64_t deadline_ns, struct om_extent *ret)
{
	int code;

	bytes = om_up(OM_MAX(bytes, 1), OM_PAGE);
	do { /* other threads may be quicker to take the room */
		code = om_room_wait_locked(s, g, bytes, OM_ROOM_WRITE, deadline_ns);
		if (!code)
			code = whole ? om_pool_alloc(&s->pool, bytes, bytes, ret)
			             : om_fetch_reserve_locked(s, g, bytes, ret);
	} while (code == OM_ELIMIT && om_now() < deadline_ns && !s->closing &&
	         bytes <= s->host_limit_bytes && (!g->limit_bytes || bytes <= g->limit_bytes));
	if (!code)
		count_loose_locked(s, g, (int64_t)ret->bytes);
	return code;
}

/* Memory for bytes that come from a caller, filled without the lock: on no block yet. */
static int copy_in_locked(struct om_store *s, struct om_group *g, const void *data, uint64_t nbytes,
                          uint64_t deadline_ns, struct om_extent *ret, uint64_t *ret_hash)
{
	int code = reserve_loose_locked(s, g, nbytes, false, deadline_ns, ret);

	if (code)
		return code;
	s->adding++; /* close waits for us */
	om_mutex_unlock(&s->lock);
	memcpy(ret->ptr, data, nbytes);
	*ret_hash = om_hash(ret->ptr, nbytes);
	om_mutex_lock(&s->lock);
	s->adding--;
	count_loose_locked(s, g, -(int64_t)ret->bytes);
	if (!s->closing)
		return 0;
	om_pool_free(&s->pool, ret);
	return om_err(OM_ECLOSED, "the store was closed meanwhile");
}

/* The block's HOST bytes are those of the extent, whole. */
static void fill_at_once(struct om_block *b, struct om_extent mem)
{
	om_block_fill_begin(b, mem);
	om_block_fill_end(b);
}

int om_pack_make_inner_locked(struct om_store *s, struct om_block *owner, uint64_t nbytes,
                              struct om_block **ret)
{
	struct om_block *inner;
	int code = om_block_create(owner->name, nbytes, owner->group, &inner);

	if (code)
		return code;
	inner->inner = inner->named = true;
	om_list_push_tail(&s->blocks, &inner->all);
	code = om_block_wake(inner, NULL);
	if (code) {
		om_block_retire(inner);
		return code;
	}
	om_block_ref(inner); /* its owner's */
	*ret = inner;
	return 0;
}

/* The owner's packed form is these bytes from now on, which are in HOST. */
static int take_form_locked(struct om_store *s, struct om_block *owner, struct om_extent mem,
                            uint64_t nbytes, uint8_t codec)
{
	struct om_block *inner;
	int code = om_pack_make_inner_locked(s, owner, nbytes, &inner);

	if (code)
		return code;
	om_block_access(inner);
	fill_at_once(inner, mem);
	om_block_disk_drop(owner, &s->disk);
	om_pack_drop_locked(s, owner);
	owner->body->codec = codec;
	om_block_set_packed(owner, inner);
	return 0;
}

/* May the bytes that `l` holds be replaced below by what they were encoded to? */
static int packable(const struct om_lease *l)
{
	const struct om_block *b = l->block;

	if (!b->named)
		return om_err(OM_ENAME, "block '%s' was removed", b->name);
	if (b->leases > 1 || b->pinned || b->body->move || b->body->holds)
		return om_err(OM_EBUSY, "block '%s' is in use", b->name);
	if (b->body->turns != l->turns)
		return om_err(OM_EBUSY, "block '%s' may have been written to since it was leased",
		              b->name);
	return 0;
}

int om_lease_pack(struct om_lease *l, const void *data, uint64_t nbytes, uint8_t codec)
{
	struct om_store *s = l->store;
	struct om_block *b = l->block;
	struct om_extent mem;
	uint64_t hash, unused;
	int code = om_store_enter(s);

	if (code)
		return code;
	code = packable(l);
	if (code)
		return om_store_leave(s, code);
	b->body->holds++; /* nobody writes alone meanwhile; who else leases the bytes is seen afterwards */
	s->inside++;
	om_mutex_unlock(&s->lock);
	hash = om_hash(l->data, b->nbytes);
	om_mutex_lock(&s->lock);
	code = s->closing ? om_err(OM_ECLOSED, "the store is closed")
	                  : copy_in_locked(s, b->group, data, nbytes, om_now(), &mem, &unused);
	b->body->holds--;
	s->inside--;
	if (code)
		return om_store_leave(s, code);
	code = packable(l);
	if (!code && om_block_clean(b) && b->body->hash_known && hash != b->body->hash)
		code = om_err(OM_EBUSY, "block '%s' was written to by who leased it for reading",
		              b->name);
	code = code ? code : take_form_locked(s, b, mem, nbytes, codec);
	if (code) {
		om_pool_free(&s->pool, &mem);
		return om_store_leave(s, code);
	}
	om_pack_forget_origin_locked(s, b);
	b->body->touched = false;
	b->body->hash = hash;
	b->body->hash_known = true;
	om_spill_locked(
		s,
		b->body->packed); /* when it fails, the next one that needs the room tries again */
	om_store_changed_locked(s);
	return om_store_leave(s, 0);
}

/* The form that a face made, if it is all that there is of the block. NULL: look at the code. */
static struct om_block *only_packed(const struct om_block *b)
{
	return b->named && b->host == OM_COPY_NONE && b->body && !om_block_coded(b)
	               ? b->body->packed
	               : NULL;
}

int om_block_lease_packed(struct om_store *s, struct om_block *b, uint64_t deadline_ns,
                          struct om_lease **ret, uint8_t *ret_codec)
{
	struct om_block *inner;
	int code = om_store_enter(s);

	if (code)
		return code;
	inner = only_packed(b);
	if (!inner)
		return om_store_leave(s, OM_EAGAIN);
	om_block_ref(inner);
	*ret_codec = b->body->codec;
	inner->counted++; /* the access is its owner's */
	code = om_fetch_lease_locked(s, &inner, 1, deadline_ns, NULL);
	if (!code && !(*ret = om_lease_make_locked(s, inner, false))) {
		om_fetch_unlease_locked(s, inner);
		code = -ENOMEM;
	}
	if (code == OM_ENAME) /* its owner dropped it meanwhile */
		code = OM_EAGAIN;
	return om_store_leave_block(s, inner, code);
}

void om_pack_give_up_locked(struct om_store *s, struct om_block *form)
{
	if (form->host == OM_COPY_VALID && !form->leases && !form->pinned && !form->body->holds &&
	    !form->body->move && om_block_clean(form))
		om_room_drop_locked(s, form);
}

int om_block_unpack(struct om_store *s, struct om_block *b, const void *data, uint64_t nbytes,
                    uint64_t deadline_ns)
{
	struct om_extent mem;
	uint64_t hash, began_ns = om_now();
	int code = om_store_enter(s);

	if (code)
		return code;
	om_block_ref(b);
	if (!only_packed(b))
		return om_store_leave_block(s, b, 0);
	if (nbytes != b->nbytes)
		return om_store_leave_block(
			s, b,
			om_err(OM_ECORRUPT,
		               "block '%s': decoded to %llu bytes, %llu were encoded; the encoded "
		               "bytes are kept",
		               b->name, (unsigned long long)nbytes, (unsigned long long)b->nbytes));
	code = copy_in_locked(s, b->group, data, nbytes, deadline_ns, &mem, &hash);
	if (code)
		return om_store_leave_block(s, b, code);
	if (only_packed(b) && hash == b->body->hash) {
		om_traffic_note_locked(s, b, OM_EVENT_IN, 0, began_ns);
		fill_at_once(b, mem);
		s->counters.fills++;
		s->counters.verified_bytes += nbytes;
		om_meter_peak_locked(s);
		om_pack_give_up_locked(s, b->body->packed);
	} else {
		if (only_packed(b))
			code = om_err(OM_ECORRUPT,
			              "block '%s': decoded to other bytes than were encoded (XXH3 "
			              "%016llx, stored %016llx); the encoded bytes are kept",
			              b->name, (unsigned long long)hash,
			              (unsigned long long)b->body->hash);
		om_pool_free(&s->pool, &mem);
	}
	om_store_changed_locked(s);
	return om_store_leave_block(s, b, code);
}

/* ---- forms that the core makes ---- */

int om_pack_loose_locked(struct om_store *s, struct om_group *g, uint64_t bytes,
                         uint64_t deadline_ns, struct om_extent *ret)
{
	return reserve_loose_locked(s, g, bytes, true, deadline_ns, ret);
}

void om_pack_cut_loose_locked(struct om_store *s, struct om_group *g, struct om_extent *mem,
                              uint64_t bytes)
{
	uint64_t was = mem->bytes;

	om_pool_cut(&s->pool, mem, bytes);
	count_loose_locked(s, g, (int64_t)(mem->bytes - was));
}

void om_pack_end_loose_locked(struct om_store *s, struct om_group *g, const struct om_extent *mem)
{
	count_loose_locked(s, g, -(int64_t)mem->bytes);
}

void om_pack_free_loose_locked(struct om_store *s, struct om_group *g, struct om_extent *mem)
{
	if (mem->segment)
		om_pack_end_loose_locked(s, g, mem);
	om_pool_free(&s->pool, mem);
}

int om_pack_encode(const struct om_block *b, const void *data, enum om_coding coding,
                   struct om_extent mem, struct om_coded *ret)
{
	int code =
		om_encode(data, b->nbytes, &b->body->desc, coding, mem.ptr, mem.bytes, &ret->bytes);

	if (code || !ret->bytes)
		return code;
	code = om_coded_open(mem.ptr, ret->bytes, ret);
	code = code ? code : om_coded_compare(ret, data);
	if (code != OM_ECORRUPT)
		return code;
	return om_err(
		code,
		"block '%s': what its bytes were encoded to decodes to others; it stays as it is",
		b->name);
}

/* May what the leased bytes were encoded to stand for them? */
static int keepable(const struct om_block *b, const struct om_coded *coded)
{
	if (b->body->touched)
		return om_err(OM_EBUSY, "block '%s' is shared for writing while it is encoded",
		              b->name);
	if (b->body->hash_known && b->body->hash != coded->hash)
		return om_err(OM_ECORRUPT,
		              "block '%s': the bytes in memory differ from those stored: somebody "
		              "wrote to a view that was for reading",
		              b->name);
	return 0;
}

/* `mem` begins with the form: it becomes the block's, in no more memory than it needs. */
static int keep_form_locked(struct om_store *s, struct om_block *b, const struct om_coded *coded,
                            struct om_extent *mem)
{
	struct om_extent form;
	int code = keepable(b, coded);

	if (code)
		return code;
	om_pack_cut_loose_locked(s, b->group, mem, coded->bytes);
	form = *mem;
	om_pack_end_loose_locked(s, b->group, mem);
	code = take_form_locked(s, b, form, coded->bytes, OM_CODEC_CORE);
	if (code) {
		count_loose_locked(s, b->group, (int64_t)mem->bytes);
		return code;
	}
	mem->segment = NULL;
	b->body->hash = coded->hash;
	b->body->hash_known = b->body->verified = true;
	return 0;
}

/* A spill that a lease has rescued goes on: until it is over it owns the copy on disk. */
static int await_spill_locked(struct om_store *s, struct om_block *b, uint64_t deadline_ns)
{
	struct om_move *m = b->body->move;
	int code = 0;

	if (!m)
		return 0;
	om_move_ref(m);
	code = om_fetch_settle_locked(s, m, deadline_ns);
	code = m->settled ? 0 : code; /* whether it succeeded is of no interest */
	om_move_unref(m);
	return code;
}

int om_pack_encode_locked(struct om_store *s, struct om_block *b, enum om_coding coding,
                          uint64_t most, uint64_t deadline_ns, struct om_block **ret)
{
	/* Encoding asks for room for the last part as it is. */
	uint64_t slack = OM_MIN(OM_CODED_PART, UINT64_MAX - most);
	uint64_t room = OM_MIN(b->nbytes - b->nbytes / 20 + OM_CODED_PART, most + slack);
	struct om_extent mem = { 0 };
	struct om_coded coded = { 0 };
	int code;

	*ret = NULL;
	if (!most)
		return 0;
	code = await_spill_locked(s, b, deadline_ns);
	code = code ? code : om_pack_loose_locked(s, b->group, room, deadline_ns, &mem);
	if (code)
		return code;
	b->body->holds++; /* nobody writes alone meanwhile */
	s->inside++;
	om_mutex_unlock(&s->lock);
	code = om_pack_encode(b, b->body->data, coding, mem, &coded);
	om_mutex_lock(&s->lock);
	b->body->holds--;
	s->inside--;
	if (!code && s->closing)
		code = om_err(OM_ECLOSED, "the store was closed meanwhile");
	if (!code && coded.bytes && coded.bytes <= most)
		code = keep_form_locked(s, b, &coded, &mem);
	if (!code && !mem.segment) {
		*ret = b->body->packed;
		om_block_ref(*ret);
	}
	om_pack_free_loose_locked(s, b->group, &mem);
	om_store_changed_locked(s);
	return code;
}

int om_store_encode(struct om_store *s, const char *name, enum om_coding coding,
                    uint64_t deadline_ns, uint64_t *ret_bytes)
{
	struct om_block *b, *form = NULL;
	int code = om_store_enter_block(s, name, &b);

	*ret_bytes = 0;
	if (code)
		return code;
	if (coding == OM_CODING_NONE)
		code = om_err(OM_EVALUE, "block '%s': coding 0 would keep its bytes twice",
		              b->name);
	code = code ? code : om_fetch_lease_locked(s, &b, 1, deadline_ns, NULL);
	if (code)
		return om_store_leave_block(s, b, code);
	if (b->body->writer || b->body->touched)
		code = om_err(OM_EBUSY, "block '%s' is shared for writing", b->name);
	code = code ? code : om_pack_encode_locked(s, b, coding, UINT64_MAX, deadline_ns, &form);
	if (form)
		*ret_bytes = form->nbytes;
	om_block_unref(form);
	om_fetch_unlease_locked(s, b);
	return om_store_leave_block(s, b, code);
}
