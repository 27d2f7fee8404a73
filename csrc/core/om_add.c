/*
 * om_add: blocks in and out of a store: copied in, adopted, read in place from files; removed, evicted.
 *
 * A block gets its name last, when its bytes are there; `adding` keeps close waiting meanwhile. Files
 * are opened, and bytes copied, without the lock.
 */
#include <errno.h>
#include <string.h>

#include "core/om_store_int.h"

int om_store_check_name(const char *name)
{
	size_t n = strlen(name);

	if (n == 0 || n > OM_MAX_NAME)
		return om_err(OM_EVALUE, "a name must have 1 to %d bytes, not %zu", OM_MAX_NAME, n);
	return 0;
}

/* A record on the store's list, without a name yet. */
static int begin_block_locked(struct om_store *s, const char *name, const char *group,
                              uint64_t nbytes, struct om_block **ret)
{
	struct om_group *g;
	int code = om_store_check_name(name);

	if (code)
		return code;
	if (om_table_find(&s->table, name))
		return om_err(OM_EVALUE, "block '%s' exists already; remove it first", name);
	g = om_store_find_group_locked(s, group);
	if (!g)
		return om_err_last()->code;
	code = om_block_create(name, nbytes, g, ret);
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
	int code = om_room_wait_locked(s, b->group, bytes, OM_ROOM_WRITE, deadline_ns);

	return code ? code : om_fetch_reserve_locked(s, b->group, bytes, ret);
}

/* Where the bytes of a block without an origin come from: one of these, or nowhere: zeros, made later. */
struct source {
	const void *data;
	const struct om_array *array;
	struct om_foreign *foreign;
	bool zeros;
};

static void copy_bytes(struct om_block *b, const struct source *from)
{
	if (from->array)
		om_array_copy(from->array, b->body->data);
	else if (b->nbytes)
		memcpy(b->body->data, from->data, b->nbytes);
}

static int add_bytes_locked(struct om_store *s, struct om_block *b, const struct source *from,
                            uint64_t deadline_ns)
{
	struct om_extent mem;
	int code = reserve_new_locked(s, b, deadline_ns, &mem);

	if (code)
		return code;
	om_block_fill_begin(b, mem);
	om_block_lease(b); /* nobody takes it away meanwhile */
	om_meter_peak_locked(s);
	om_mutex_unlock(&s->lock);
	copy_bytes(b, from);
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
	int code = om_room_wait_locked(s, b->group, bytes, OM_ROOM_WRITE | OM_ROOM_MAPPED,
	                               deadline_ns);

	/* A hole in a shared segment is no room for memory from elsewhere. */
	if (!code && om_pool_room(&s->pool) < bytes)
		code = om_room_wait_locked(s, b->group, OM_MAX(bytes, OM_POOL_SMALL + OM_PAGE),
		                           OM_ROOM_WRITE | OM_ROOM_MAPPED, deadline_ns);
	if (!code)
		code = name_block_locked(s, b);
	if (!code) {
		om_pool_trim(&s->pool, 0,
		             UINT64_MAX); /* the limit shrinks: nothing may be cached above it */
		om_block_adopt(b, &s->pool, foreign);
		om_meter_peak_locked(s);
	}
	return code;
}

/* The bytes, if there are any, and then the name. */
static int bring_in_locked(struct om_store *s, struct om_block *b, const struct source *from,
                           uint64_t deadline_ns)
{
	if (from->zeros)
		return om_table_insert(&s->table, b);
	om_block_access(b);
	return from->foreign ? adopt_bytes_locked(s, b, from->foreign, deadline_ns)
	                     : add_bytes_locked(s, b, from, deadline_ns);
}

static int add_sole(struct om_store *s, const char *name, const char *group,
                    const struct source *from, uint64_t nbytes, const struct om_desc *desc,
                    uint64_t deadline_ns)
{
	struct om_block *b;
	int code = om_store_enter(s);

	if (code)
		return code;
	code = begin_block_locked(s, name, group, nbytes, &b);
	if (code)
		return om_store_leave(s, code);
	if (desc || !from->zeros)
		code = om_block_wake(b, desc);
	if (!code)
		code = om_room_admit_locked(s, b);
	if (!code) {
		s->adding++; /* close waits for us */
		code = bring_in_locked(s, b, from, deadline_ns);
		s->adding--;
		if (code && om_block_admitted(b))
			om_room_unadmit_locked(s, nbytes);
	}
	if (code) {
		struct om_error error = *om_err_last();

		om_block_retire(b);
		om_err_set(&error);
	}
	om_store_changed_locked(s);
	return om_store_leave(s, code);
}

int om_store_add_zeros(struct om_store *s, const char *name, const char *group, uint64_t nbytes,
                       const struct om_desc *desc)
{
	return add_sole(s, name, group, &(struct source){ .zeros = true }, nbytes, desc, 0);
}

int om_store_add(struct om_store *s, const char *name, const char *group, const void *data,
                 uint64_t nbytes, const struct om_desc *desc, uint64_t deadline_ns)
{
	return add_sole(s, name, group, &(struct source){ .data = data }, nbytes, desc,
	                deadline_ns);
}

int om_store_add_array(struct om_store *s, const char *name, const char *group,
                       const struct om_array *a, uint64_t nbytes, const struct om_desc *desc,
                       uint64_t deadline_ns)
{
	return add_sole(s, name, group, &(struct source){ .array = a }, nbytes, desc, deadline_ns);
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
	code = add_sole(s, name, group, &(struct source){ .foreign = f }, nbytes, desc,
	                deadline_ns);
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

		for (size_t i = 0; b->body && i < b->body->range_count && !found; i++)
			if (!strcmp(b->body->ranges[i].file->path, path))
				found = b->body->ranges[i].file;
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

/* A new block's bytes are those of the ranges, which it owns from now on; or, with `decoded`, what they
 * decode to. On failure nothing is owned. */
static int set_origin_locked(struct om_store *s, struct om_block *b, struct om_range *ranges,
                             size_t count, uint64_t nbytes, bool decoded)
{
	struct om_block *owner = b;

	if (decoded) {
		int code = om_pack_make_inner_locked(s, owner, nbytes, &b);

		if (code)
			return code;
		owner->body->origin = b;
		owner->blank = false;
	}
	b->blank = false;
	b->body->ranges = ranges;
	b->body->range_count = count;
	return 0;
}

int om_store_add_file(struct om_store *s, const char *name, const char *group,
                      const struct om_file_range *ranges, size_t count, uint64_t decoded_bytes,
                      const struct om_desc *desc)
{
	struct om_range *opened;
	size_t opened_count;
	uint64_t nbytes;
	bool decoded = decoded_bytes != OM_NOT_ENCODED;
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
	code = s->closing
	               ? om_err(OM_ECLOSED, "the store is closed")
	               : begin_block_locked(s, name, group, decoded ? decoded_bytes : nbytes, &b);
	if (!code) {
		code = om_block_wake(b, desc);
		code = code ? code : om_table_insert(&s->table, b);
		if (!code) {
			code = set_origin_locked(s, b, opened, opened_count, nbytes, decoded);
			if (code)
				om_table_remove(&s->table, b);
		}
		if (code)
			om_block_retire(b);
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
	if (b->named || b->leases || om_list_empty(&b->all) || b->host == OM_COPY_FILLING ||
	    (b->body && (b->body->move || b->body->holds)))
		return;
	if (b->body) {
		if (b->host != OM_COPY_NONE)
			om_block_host_drop(b, &s->pool);
		om_block_disk_drop(b, &s->disk);
		om_pack_drop_locked(s, b);
	}
	if (om_block_admitted(b))
		om_room_unadmit_locked(s, b->nbytes);
	if (b->body)
		om_pack_forget_origin_locked(s, b);
	om_block_retire(b);
}

void om_store_forget_locked(struct om_store *s, struct om_block *b)
{
	om_block_ref(b);
	om_meter_life_locked(s, b);
	om_table_remove(&s->table, b);
	if (b->group->cache) /* who holds the bytes needs no other form of them */
		om_pack_drop_locked(s, b);
	om_fetch_cancel_locked(s, b);
	om_store_reap_locked(s, b);
	om_block_unref(b);
	om_store_changed_locked(s);
}

int om_store_remove(struct om_store *s, const char *name)
{
	struct om_block *b;
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code;
	om_store_forget_locked(s, b);
	return om_store_leave_block(s, b, 0);
}

int om_store_evict(struct om_store *s, const char *name, uint64_t deadline_ns)
{
	enum om_reason former;
	struct om_block *b;
	int code = om_store_enter_block(s, name, &b);

	if (code)
		return code;
	former = om_reason_enter(OM_REASON_EXPLICIT);
	code = om_room_evict_locked(s, b, deadline_ns);
	om_reason_leave(former);
	return om_store_leave_block(s, b, code);
}
