/*
 * om_press: a store gives memory back because memory is short.
 *
 * TO BE REPLACED AT THE MERGE by the store's own guard: this one trims, and has idle blocks go one after the other,
 * those of the first group first.
 */
#include "core/om_store_int.h"

static bool idle(const struct om_block *b)
{
	return b->host == OM_COPY_VALID && !b->leases && !b->pinned && b->body && !b->body->holds;
}

static uint64_t idle_bytes_locked(struct om_store *s)
{
	uint64_t bytes = 0;

	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);

		bytes += idle(b) ? om_block_host_bytes(b) : 0;
	}
	return bytes;
}

static struct om_block *victim_locked(struct om_store *s)
{
	struct om_block *b = NULL;

	OM_LIST_FOREACH(link, &s->groups) {
		b = om_room_victim_locked(s, om_container_of(link, struct om_group, link));
		if (b)
			break;
	}
	return b;
}

/* One block goes. 1, 0 or an error, as om_room_evict_locked. */
static int press_one_locked(struct om_store *s, struct om_block *b, uint64_t deadline_ns,
                            struct om_pressed *ret)
{
	uint64_t bytes = om_block_host_bytes(b);
	bool clean = om_block_expendable(b);
	int code;

	om_block_ref(b);
	code = om_room_evict_locked(s, b, deadline_ns);
	om_block_unref(b);
	if (code == 1 && clean) {
		ret->dropped_bytes += bytes;
		ret->dropped_blocks++;
	} else if (code == 1) {
		ret->written_bytes += bytes;
		ret->written_blocks++;
	}
	return code;
}

int om_store_press(struct om_store *s, enum om_level level, double ceiling, uint64_t bytes,
                   uint64_t deadline_ns, struct om_pressed *ret)
{
	int code = om_store_enter(s);
	uint64_t cached;

	(void)ceiling;
	*ret = (struct om_pressed){ 0 };
	if (code)
		return code;
	while (code >= 0 && !s->closing && ret->dropped_bytes + ret->written_bytes < bytes) {
		struct om_block *b = victim_locked(s);

		if (!b)
			break;
		code = press_one_locked(s, b, deadline_ns, ret);
	}
	cached = s->pool.cached_bytes;
	if (level >= OM_MEDIUM)
		om_pool_trim_to(&s->pool, 0);
	cached -= s->pool.cached_bytes;
	ret->trimmed_bytes = cached - OM_MIN(cached, ret->dropped_bytes + ret->written_bytes);
	ret->left_bytes = idle_bytes_locked(s);
	return om_store_leave(s, code < 0 ? code : 0);
}
