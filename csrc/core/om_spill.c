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

/* Give up the disk copy of an idle block that is in memory too. A consumer may have written to a view
 * that was read-only (torch ignores that), so the bytes in memory replace those on disk only when they
 * hash the same; else the memory goes, and the disk keeps what was stored. No flag "was exported"
 * would do instead: nearly every block in memory was, and without their disk copies giving way, blocks
 * could not be exchanged when the disk is full. The lock is given up; a lease meanwhile ends LEAVING. */
static bool drop_disk_copy_locked(struct om_store *s, struct om_block *b)
{
	bool same;

	om_block_leave_begin(b);
	b->holds++;
	s->inside++;
	om_mutex_unlock(&s->lock);
	same = om_hash(b->data, b->nbytes) == b->hash;
	om_mutex_lock(&s->lock);
	b->holds--;
	s->inside--;
	if (b->host == OM_COPY_LEAVING && !same) {
		om_room_drop_locked(s, b);
	} else if (b->host == OM_COPY_LEAVING) {
		om_block_disk_drop(b, &s->disk);
		om_block_leave_rescue(b);
	}
	om_store_reap_locked(s, b);
	om_store_changed_locked(s);
	return same;
}

/* Have one disk copy of a block that is in memory give way. 1: look again; 0: there is none; OM_EBUSY:
 * none now, but what is leased or on its way in may give way later, or room was made in memory. The
 * lock is given up. */
static int drop_stale_locked(struct om_store *s)
{
	int found = 0;

	OM_LIST_FOREACH(link, &s->blocks) {
		struct om_block *b = om_container_of(link, struct om_block, all);

		if (!b->disk_copy.count || b->host == OM_COPY_NONE)
			continue;
		if (b->disk == OM_COPY_VALID && b->host == OM_COPY_VALID && !b->leases && !b->holds)
			return drop_disk_copy_locked(s, b) ? 1 : OM_EBUSY;
		found = OM_EBUSY; /* on its way in or out, or whoever holds it may write to it */
	}
	return found;
}

static int grow_swap_locked(struct om_store *s, uint64_t target)
{
	struct om_file *file = s->disk.file;
	int code = 0;

	s->disk.growing = true;
	om_mutex_unlock(&s->lock);
	if (!file)
		code = om_file_create_swap(s->disk.directory, &file);
	if (!code)
		code = om_file_grow(file, target);
	om_mutex_lock(&s->lock);
	if (file && !s->disk.file)
		s->disk.file = file;
	s->disk.growing = false;
	om_store_changed_locked(s);
	return code ? code : om_disk_grown(&s->disk, target);
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

/* Room on disk for a block that is LEAVING. May give up the lock. */
static int disk_reserve_locked(struct om_store *s, struct om_block *b, uint64_t bytes)
{
	for (;;) {
		uint64_t target;
		int stale, code = om_disk_alloc(&s->disk, bytes, &b->disk_copy);

		if (code != -ENOSPC)
			return code;
		if (s->disk.growing) {
			om_store_wait_locked(s, UINT64_MAX);
			continue;
		}
		target = om_disk_target(&s->disk, bytes);
		code = target ? grow_swap_locked(s, target) : OM_EDISKFULL;
		if (!code)
			continue;
		stale = drop_stale_locked(s);
		if (stale == OM_EBUSY)
			return om_spill_busy_error(s, b, bytes);
		if (!stale)
			return target ? code : disk_full_error(s, b, bytes);
	}
}

int om_spill_locked(struct om_store *s, struct om_block *b)
{
	uint64_t hash = 0, head = b->foreign ? 0 : (uintptr_t)b->data % OM_PAGE;
	struct om_move *m;
	int code;

	om_block_leave_begin(b);
	if (b->move) /* rescued while it was being written: the write goes on, with the same bytes */
		return 0;
	b->holds++;
	s->inside++;
	code = disk_reserve_locked(s, b, om_up(OM_MAX(b->nbytes + head, 1), OM_PAGE));
	if (!code && b->host == OM_COPY_LEAVING && b->named) {
		om_mutex_unlock(&s->lock);
		hash = om_hash(b->data, b->nbytes);
		om_mutex_lock(&s->lock);
	}
	b->holds--;
	s->inside--;
	if (!code && s->closing)
		code = om_err(OM_ECLOSED, "the store is closed");
	if (b->host != OM_COPY_LEAVING || !b->named || code) { /* rescued, removed, or no room */
		om_disk_free(&s->disk, &b->disk_copy);
		if (b->host == OM_COPY_LEAVING)
			om_block_leave_rescue(b);
		om_store_reap_locked(s, b);
		return code;
	}
	b->disk_copy.head = (uint32_t)head;
	om_block_disk_begin(b);
	code = om_move_create_spill(b, &s->disk, s->request_bytes, &m);
	if (code) {
		om_block_disk_drop(b, &s->disk);
		om_block_leave_rescue(b);
		return code;
	}
	m->hash = hash;
	b->move = m;
	s->moves++;
	om_mover_queue_locked(s, m);
	return 0;
}
