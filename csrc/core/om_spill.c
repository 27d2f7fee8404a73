/*
 * om_spill: writing a dirty copy out, and room on DISK for it.
 *
 * The thread that needs the room in HOST reserves runs of the swap file and hashes the bytes, without the
 * lock; the mover writes them; om_fetch.c settles the move. Until then the copy is LEAVING, and a lease
 * rescues it: then nothing is lost but the work. When it fails the bytes are still in memory.
 */
#include <errno.h>
#include <string.h>

#include "core/om_hash.h"
#include "core/om_store_int.h"

uint64_t om_spill_hash_locked(struct om_store *s, struct om_block *b)
{
	uint64_t hash;

	b->body->holds++;
	s->inside++;
	om_mutex_unlock(&s->lock);
	hash = om_hash(b->body->data, b->nbytes);
	om_mutex_lock(&s->lock);
	b->body->holds--;
	s->inside--;
	return hash;
}

/* What lies below HOST may differ from it, or is not needed: it goes. */
static void drop_below_locked(struct om_store *s, struct om_block *b)
{
	om_block_disk_drop(b, &s->disk);
	om_pack_drop_locked(s, b);
}

/* Give up the lower copy of an idle block that is in memory too. A consumer may have written to a view
 * that was read-only (torch ignores that), so the bytes in memory replace those below only when they
 * hash the same; else the memory goes, and what was stored stays. No flag "was exported"
 * would do instead: nearly every block in memory was, and without their lower copies giving way, blocks
 * could not be exchanged when the disk is full. The lock is given up; a lease meanwhile ends LEAVING. */
static bool drop_lower_copy_locked(struct om_store *s, struct om_block *b)
{
	bool same;

	om_block_leave_begin(b);
	same = om_spill_hash_locked(s, b) == b->body->hash;
	if (b->host == OM_COPY_LEAVING && !same) {
		om_room_drop_locked(s, b);
	} else if (b->host == OM_COPY_LEAVING) {
		drop_below_locked(s, b);
		om_block_leave_rescue(b);
	}
	om_store_reap_locked(s, b);
	om_store_changed_locked(s);
	return same;
}

static bool packed_on_disk(const struct om_block *b)
{
	return b->body->packed && b->body->packed->body->disk_copy.count;
}

/* Have one lower copy of a block that is in memory give way. 1: look again; 0: there is none; OM_EBUSY:
 * none now, but what is leased or on its way in may give way later, or room was made in memory. The
 * lock is given up. */
static int drop_stale_locked(struct om_store *s)
{
	int found = 0;

	OM_LIST_FOREACH(link, &s->blocks) {
		struct om_block *b = om_container_of(link, struct om_block, all);
		struct om_body *body = b->body;

		if (b->host == OM_COPY_NONE || !(body->disk_copy.count || packed_on_disk(b)))
			continue;
		if (body->touched && !body->move && !body->holds) { /* the memory is what counts */
			drop_below_locked(s, b);
			return 1;
		}
		if ((b->disk == OM_COPY_VALID || packed_on_disk(b)) && b->host == OM_COPY_VALID &&
		    !b->leases && !body->holds && !body->move)
			return drop_lower_copy_locked(s, b) ? 1 : OM_EBUSY;
		found = OM_EBUSY; /* on its way in or out, or whoever holds it may write to it */
	}
	return found;
}

/* Grow the swap file to `least` bytes, or up to `target` where that takes no more than half of what is
 * free. */
static int grow_swap_locked(struct om_store *s, uint64_t least, uint64_t target)
{
	struct om_file *file = s->disk.file;
	uint64_t free_bytes;
	int code = 0;

	s->disk.growing = true;
	om_mutex_unlock(&s->lock);
	if (!file)
		code = om_file_create_swap(s->disk.directory, &file);
	if (!code && !om_file_free_bytes(file, &free_bytes))
		target = OM_MIN(target, om_down(file->id.size + free_bytes / 2, OM_PAGE));
	target = OM_MAX(target, least);
	if (!code)
		code = om_file_grow(file, target);
	om_mutex_lock(&s->lock);
	if (file && !s->disk.file)
		s->disk.file = file;
	s->disk.growing = false;
	om_store_changed_locked(s);
	return code ? code : om_disk_grown(&s->disk, target);
}

/* The runs may lie in holes: have disk blocks behind them, before any byte is at risk. */
static int claim_runs_locked(struct om_store *s, const struct om_disk_copy *copy)
{
	int code = 0;

	if (om_likely(!s->disk.holes))
		return 0;
	om_mutex_unlock(&s->lock);
	for (size_t i = 0; i < copy->count && !code; i++)
		code = om_file_claim(s->disk.file, copy->runs[i].offset, copy->runs[i].bytes);
	om_mutex_lock(&s->lock);
	for (size_t i = 0; i < copy->count && !code; i++)
		s->disk.holes -= OM_MIN(s->disk.holes, copy->runs[i].bytes);
	return code;
}

bool om_spill_shrink_locked(struct om_store *s)
{
	struct om_disk *d = &s->disk;
	struct om_disk_copy runs;
	int code = 0;

	if (s->closing || !om_disk_wasteful(d) || om_disk_take_free(d, &runs))
		return false;
	s->inside++;
	om_mutex_unlock(&s->lock);
	for (size_t i = 0; i < runs.count && !code; i++)
		code = om_file_punch(d->file, runs.runs[i].offset, runs.runs[i].bytes);
	om_mutex_lock(&s->lock);
	s->inside--;
	om_disk_give_back(d, &runs, !code);
	om_store_changed_locked(s);
	return true;
}

static int disk_full_error(struct om_store *s, const struct om_block *b, uint64_t bytes)
{
	return om_err(
		OM_EDISKFULL,
		"block '%s': no room on disk for %llu bytes: used %llu, disk_limit %llu; raise "
		"disk_limit or remove blocks (the bytes are still in memory)",
		b->name, (unsigned long long)bytes, (unsigned long long)s->disk.used_bytes,
		(unsigned long long)s->disk.limit_bytes);
}

int om_spill_busy_error(struct om_store *s, const struct om_block *b, uint64_t bytes)
{
	char holders[OM_ERROR_HOLDERS] = "";

	om_room_holders(s, NULL, holders, sizeof(holders));
	om_err(OM_EBUSY,
	       "block '%s': no room on disk for %llu bytes while blocks that are in use keep their copies "
	       "there: used %llu, disk_limit %llu; let leases and views go, or raise disk_limit",
	       b->name, (unsigned long long)bytes, (unsigned long long)s->disk.used_bytes,
	       (unsigned long long)s->disk.limit_bytes);
	memcpy(om_err_last()->holders, holders, sizeof(holders));
	return OM_EBUSY;
}

/* The swap file cannot grow. OM_EBUSY: what is in use or on its way may give way later. */
static int grow_error(int code, const struct om_block *b, const struct om_error *why)
{
	om_err(code, "block '%s': %s (the bytes are still in memory)", b->name, why->text);
	om_err_file(why->filename);
	return code;
}

static bool limit_binds(const struct om_disk *d, uint64_t bytes)
{
	return d->used_bytes + bytes > d->limit_bytes;
}

/* Runs within the limit, with disk blocks behind them. -ENOSPC: the file has to grow first. */
static int try_reserve_locked(struct om_store *s, struct om_block *b, uint64_t bytes)
{
	struct om_disk_copy *copy = &b->body->disk_copy;
	int code;

	if (limit_binds(&s->disk, bytes))
		return disk_full_error(s, b, bytes);
	if (s->disk.taken)
		return -ENOSPC;
	code = om_disk_alloc(&s->disk, bytes, copy);
	code = code ? code : claim_runs_locked(s, copy);
	if (code)
		om_disk_free(&s->disk, copy);
	return code;
}

/* Room on disk for a block that is LEAVING. May give up the lock. */
static int disk_reserve_locked(struct om_store *s, struct om_block *b, uint64_t bytes)
{
	for (;;) {
		bool limit = limit_binds(&s->disk, bytes);
		struct om_error why;
		int stale, code = try_reserve_locked(s, b, bytes);

		if (code == -ENOSPC && (s->disk.growing || s->disk.taken)) {
			om_store_wait_locked(s, UINT64_MAX);
			continue;
		}
		if (code == -ENOSPC) {
			code = grow_swap_locked(s, s->disk.used_bytes + bytes,
			                        om_disk_target(&s->disk, bytes));
			if (!code)
				continue;
		}
		if (!code || code == -ENOMEM)
			return code;
		why = *om_err_last();
		stale = drop_stale_locked(s);
		if (stale == OM_EBUSY)
			return limit ? om_spill_busy_error(s, b, bytes)
			             : grow_error(OM_EBUSY, b, &why);
		if (!stale)
			return limit ? om_err_set(&why) : grow_error(why.code, b, &why);
	}
}

/* A copy that was shared: nobody knows whether it was written to. Its hash tells: when it is that of
 * what lies below, the memory can go. */
static bool settle_touched_locked(struct om_store *s, struct om_block *b, uint64_t hash)
{
	struct om_body *body = b->body;

	body->touched = false;
	if (b->disk != OM_COPY_VALID && !body->packed)
		return false;
	if (hash != body->hash) {
		drop_below_locked(s, b);
		return false;
	}
	om_room_drop_locked(s, b);
	return true;
}

/* Runs on disk and a plan for a LEAVING copy whose bytes hash to `hash`. */
static int begin_move_locked(struct om_store *s, struct om_block *b, uint64_t hash,
                             uint64_t began_ns, uint64_t head)
{
	struct om_move *m;
	int code;

	b->body->disk_copy.head = (uint32_t)head;
	om_block_disk_begin(b);
	code = om_move_create_spill(b, &s->disk, s->request_bytes, &m);
	if (code) {
		om_block_disk_drop(b, &s->disk);
		om_block_leave_rescue(b);
		return code;
	}
	m->hash = hash;
	m->began_ns = began_ns;
	m->reason = (uint8_t)om_reason_now();
	s->meter.counts.out_begun_bytes += m->bytes;
	b->body->move = m;
	s->moves++;
	om_mover_queue_locked(s, m);
	return 0;
}

/* Still to be written out, as it was when the lock was given up? */
static bool leaves(const struct om_block *b)
{
	return b->host == OM_COPY_LEAVING && b->named;
}

int om_spill_locked(struct om_store *s, struct om_block *b)
{
	struct om_body *body = b->body;
	uint64_t hash, began_ns = om_now();
	uint64_t head = body->foreign ? 0 : (uintptr_t)body->data % OM_PAGE;
	int code = 0;

	om_block_leave_begin(b);
	if (body->move) /* rescued while it was being written: the write goes on, with the same bytes */
		return 0;
	hash = om_spill_hash_locked(s, b);
	if (leaves(b) && body->touched && settle_touched_locked(s, b, hash))
		goto out;
	if (leaves(b)) {
		body->holds++; /* the bytes stay as they were hashed: a lease ends LEAVING */
		s->inside++;
		code = disk_reserve_locked(s, b, om_up(OM_MAX(b->nbytes + head, 1), OM_PAGE));
		body->holds--;
		s->inside--;
	}
	if (s->closing && !code)
		code = om_err(OM_ECLOSED, "the store is closed");
	if (leaves(b) && !code)
		return begin_move_locked(s, b, hash, began_ns, head);
	if (b->disk == OM_COPY_NONE) /* rescued, removed, or no room */
		om_disk_free(&s->disk, &body->disk_copy);
	if (b->host == OM_COPY_LEAVING)
		om_block_leave_rescue(b);
out:
	om_store_reap_locked(s, b);
	om_store_changed_locked(s);
	return code;
}
