/*
 * om_swap: giving memory back on request: a group's idle blocks (om_sweep.c), memory that no block uses, and
 * the bounds of the swap file.
 */
#include <errno.h>

#include "core/om_sweep.h"
#include "plat/om_sys.h"

struct om_swap {
	struct om_sweep sweep;
};

int om_swap_begin(struct om_store *s, const char *group, uint64_t bytes, struct om_swap **ret)
{
	struct om_swap *swap = om_alloc(1, sizeof(*swap));
	struct om_sweep *w = swap ? &swap->sweep : NULL;
	int code = w ? om_store_enter_group(s, group, &w->group) : -ENOMEM;

	if (code) {
		om_free(swap);
		return code;
	}
	w->store = s;
	w->want = OM_MIN(bytes, w->group->used_bytes);
	w->group->trouble[0] = '\0';
	om_store_ref(s);
	*ret = swap;
	return om_store_leave(s, 0);
}

int om_swap_wait(struct om_swap *swap, uint64_t deadline_ns)
{
	struct om_sweep *w = &swap->sweep;
	struct om_group *g = w->group;
	uint64_t left = w->want - OM_MIN(w->want, om_sweep_bytes(w));
	int code = om_store_enter(w->store);

	if (code)
		return code;
	if (!g->limit_bytes) /* it has room for so much, until memory is free again */
		g->policy->capacity = OM_MAX(g->used_bytes - OM_MIN(g->used_bytes, left), OM_PAGE);
	return om_store_leave(w->store, om_sweep_run_locked(w, deadline_ns));
}

void om_swap_end(struct om_swap *swap, struct om_swapped *ret)
{
	struct om_sweep *w = &swap->sweep;
	struct om_store *s = w->store;

	if (s->fork_generation == om_fork_generation()) {
		om_mutex_lock(&s->lock);
		om_sweep_end_locked(w);
		om_mutex_unlock(&s->lock);
	}
	*ret = (struct om_swapped){ w->done.dropped_blocks + w->done.written_blocks,
		                    om_sweep_bytes(w) };
	om_free(swap);
	om_store_unref(s);
}

int om_store_trim(struct om_store *s, uint64_t reserve_bytes)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	om_pool_trim(&s->pool, reserve_bytes, UINT64_MAX);
	om_spill_shrink_locked(s);
	code = om_store_leave(s, 0);
	om_sys_heap_trim();
	return code;
}

int om_store_disk(struct om_store *s, const char *directory, uint64_t limit_bytes)
{
	char *copy = directory ? om_strdup(directory) : NULL;
	int code = directory && !copy ? -ENOMEM : om_store_enter(s);

	if (!code && copy && (s->disk.file || s->disk.growing))
		code = om_store_leave(s, om_err(OM_EVALUE,
		                                "the swap file is in use already: its directory is "
		                                "fixed until the store is closed"));
	else if (!code) {
		if (copy) {
			om_free(s->disk.directory);
			s->disk.directory = copy;
			copy = NULL;
		}
		s->disk.limit_bytes = om_down(limit_bytes, OM_PAGE);
		om_store_changed_locked(s);
		om_mutex_unlock(&s->lock);
	}
	om_free(copy);
	return code;
}
