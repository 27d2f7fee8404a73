/* om_peak: the largest blocks of a store. Walks all of them under the store's lock, once. */
#include <stdio.h>

#include "core/om_store_int.h"

/* Into its place among the largest, which are sorted. */
static void insert(const struct om_block *b, uint64_t bytes, struct om_large *ret, unsigned *count)
{
	unsigned at = *count;

	if (at == OM_PEAK_BLOCKS && bytes <= ret[at - 1].nbytes)
		return;
	if (at == OM_PEAK_BLOCKS)
		at--;
	else
		(*count)++;
	for (; at && ret[at - 1].nbytes < bytes; at--)
		ret[at] = ret[at - 1];
	ret[at].nbytes = bytes;
	snprintf(ret[at].block, sizeof(ret[at].block), "%.*s", (int)sizeof(ret[at].block) - 1,
	         b->name);
	snprintf(ret[at].group, sizeof(ret[at].group), "%s", b->group->name);
}

int om_store_largest(struct om_store *s, struct om_large ret[OM_PEAK_BLOCKS], unsigned *count)
{
	int code = om_store_enter(s);

	if (code)
		return code;
	OM_LIST_FOREACH(link, &s->blocks) {
		const struct om_block *b = om_container_of(link, struct om_block, all);

		if (b->host == OM_COPY_VALID || b->host == OM_COPY_LEAVING)
			insert(b, om_block_host_bytes(b), ret, count);
	}
	return om_store_leave(s, 0);
}
