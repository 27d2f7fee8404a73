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

void om_pack_drop_locked(struct om_store *s, struct om_block *b)
{
	struct om_block *inner = b->body ? om_block_set_packed(b, NULL) : NULL;

	if (!inner)
		return;
	om_block_lose_name(inner);
	om_fetch_cancel_locked(s, inner);
	om_store_reap_locked(s, inner);
	om_block_unref(inner);
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

/* Memory for bytes that come from a caller, filled without the lock: on no block yet. */
static int copy_in_locked(struct om_store *s, struct om_group *g, const void *data, uint64_t nbytes,
                          uint64_t deadline_ns, struct om_extent *ret, uint64_t *ret_hash)
{
	uint64_t bytes = om_up(OM_MAX(nbytes, 1), OM_PAGE);
	int code;

	do { /* other threads may be quicker to take the room */
		code = om_room_wait_locked(s, g, bytes, deadline_ns, NULL, 0);
		code = code ? code : om_fetch_reserve_locked(s, g, bytes, ret);
	} while (code == OM_ELIMIT && om_now() < deadline_ns && !s->closing &&
	         bytes <= s->host_limit_bytes && (!g->limit_bytes || bytes <= g->limit_bytes));
	if (code)
		return code;
	s->adding++; /* close waits for us */
	s->loose_bytes += ret->bytes;
	om_mutex_unlock(&s->lock);
	memcpy(ret->ptr, data, nbytes);
	*ret_hash = om_hash(ret->ptr, nbytes);
	om_mutex_lock(&s->lock);
	s->adding--;
	s->loose_bytes -= ret->bytes;
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

static int make_inner_locked(struct om_store *s, struct om_block *owner, uint64_t nbytes,
                             struct om_extent mem, struct om_block **ret)
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
	om_block_access(inner);
	fill_at_once(inner, mem);
	*ret = inner;
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
	if (b->body->shares != l->shares)
		return om_err(OM_EBUSY, "block '%s' may have been written to since it was leased",
		              b->name);
	return 0;
}

int om_lease_pack(struct om_lease *l, const void *data, uint64_t nbytes, uint8_t codec)
{
	struct om_store *s = l->store;
	struct om_block *b = l->block, *inner;
	struct om_extent mem;
	uint64_t hash, unused;
	int code = om_store_enter(s);

	if (code)
		return code;
	code = packable(l);
	if (code)
		return om_store_leave(s, code);
	b->body->holds++; /* nobody writes alone meanwhile; who shares the bytes is seen afterwards */
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
	code = code ? code : make_inner_locked(s, b, nbytes, mem, &inner);
	if (code) {
		om_pool_free(&s->pool, &mem);
		return om_store_leave(s, code);
	}
	om_block_disk_drop(b, &s->disk);
	om_pack_drop_locked(s, b);
	om_block_forget_origin(b);
	om_block_ref(inner);
	om_block_set_packed(b, inner);
	b->body->codec = codec;
	b->body->touched = false;
	b->body->hash = hash;
	b->body->hash_known = true;
	om_spill_locked(s, inner); /* when it fails, the next one that needs the room tries again */
	om_store_changed_locked(s);
	return om_store_leave(s, 0);
}

/* The packed form, if it is all that there is of the block. NULL: look at the code. */
static struct om_block *only_packed(const struct om_block *b)
{
	return b->named && b->host == OM_COPY_NONE && b->body ? b->body->packed : NULL;
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

/* The owner's bytes are back: those that they came from need not be in memory too. */
static void give_up_inner_locked(struct om_store *s, struct om_block *inner)
{
	if (inner->host == OM_COPY_VALID && !inner->leases && !inner->body->holds &&
	    om_block_clean(inner))
		om_room_drop_locked(s, inner);
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
		s->host_peak_bytes = OM_MAX(s->host_peak_bytes, s->pool.used_bytes);
		give_up_inner_locked(s, b->body->packed);
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
