/* om_history: see om_history.h. A span's slot is its number modulo the ring's length. */
#include "core/om_history.h"

#include <errno.h>

static const struct {
	unsigned seconds;
	size_t slots;
} rings[OM_HISTORY_RINGS] = { { 1, 600 }, { 10, 720 }, { 60, 1440 } };

int om_history_init(struct om_history *h)
{
	*h = (struct om_history){ 0 };
	for (int i = 0; i < OM_HISTORY_RINGS; i++) {
		h->rings[i] = om_alloc(rings[i].slots, sizeof(struct om_slot));
		if (!h->rings[i]) {
			om_history_fini(h);
			return -ENOMEM;
		}
	}
	return 0;
}

void om_history_fini(struct om_history *h)
{
	for (int i = 0; i < OM_HISTORY_RINGS; i++)
		om_free(h->rings[i]);
	*h = (struct om_history){ 0 };
}

static void add(struct om_slot *slot, uint64_t start_ns, uint64_t value)
{
	if (!slot->count || slot->start_ns != start_ns)
		*slot = (struct om_slot){ .start_ns = start_ns, .least = value, .most = value };
	slot->least = OM_MIN(slot->least, value);
	slot->most = OM_MAX(slot->most, value);
	slot->last = value;
	slot->sum += (double)value;
	slot->count++;
}

void om_history_feed(struct om_history *h, uint64_t now_ns, uint64_t value)
{
	h->newest_ns = now_ns;
	for (int i = 0; i < OM_HISTORY_RINGS; i++) {
		uint64_t span = now_ns / (rings[i].seconds * OM_NSEC);

		add(&h->rings[i][span % rings[i].slots], span * rings[i].seconds * OM_NSEC, value);
	}
}

static int find(unsigned seconds)
{
	for (int i = 0; i < OM_HISTORY_RINGS; i++)
		if (rings[i].seconds == seconds)
			return i;
	return om_err(OM_EVALUE, "the history has spans of 1, 10 and 60 seconds, not of %u",
	              seconds);
}

int om_history_tell(const struct om_history *h, unsigned seconds, struct om_span **ret,
                    size_t *ret_count)
{
	int i = find(seconds);
	uint64_t newest;

	*ret = NULL;
	*ret_count = 0;
	if (i < 0)
		return i;
	*ret = om_alloc(rings[i].slots, sizeof(**ret));
	if (!*ret)
		return -ENOMEM;
	newest = h->newest_ns / (seconds * OM_NSEC);
	for (size_t back = rings[i].slots; back-- > 0;) {
		const struct om_slot *slot = &h->rings[i][(newest - back) % rings[i].slots];

		if (back > newest || !slot->count ||
		    slot->start_ns != (newest - back) * seconds * OM_NSEC)
			continue;
		(*ret)[(*ret_count)++] =
			(struct om_span){ .start_ns = slot->start_ns,
			                  .min_bytes = slot->least,
			                  .max_bytes = slot->most,
			                  .last_bytes = slot->last,
			                  .mean_bytes = slot->sum / (double)slot->count };
	}
	return 0;
}
