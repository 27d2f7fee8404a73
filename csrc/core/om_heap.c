/* om_heap: see om_heap.h. */
#include "core/om_heap.h"

#include "base/om_base.h"
#include "core/om_policy.h"

int om_heap_grow(struct om_heap *h, uint32_t from, uint32_t to)
{
	int code = om_policy_grow_array(&h->keys, from, to, sizeof(*h->keys));

	code = code ? code : om_policy_grow_array(&h->slots, from, to, sizeof(*h->slots));
	return code ? code : om_policy_grow_array(&h->place, from, to, sizeof(*h->place));
}

void om_heap_fini(struct om_heap *h)
{
	om_free(h->keys);
	om_free(h->slots);
	om_free(h->place);
}

static void seat(struct om_heap *h, uint32_t at, uint32_t slot)
{
	h->slots[at] = slot;
	h->place[slot] = at;
}

static void sift_up(struct om_heap *h, uint32_t at)
{
	uint32_t slot = h->slots[at];

	for (; at && h->keys[h->slots[(at - 1) / 2]] > h->keys[slot]; at = (at - 1) / 2)
		seat(h, at, h->slots[(at - 1) / 2]);
	seat(h, at, slot);
}

static void sift_down(struct om_heap *h, uint32_t at)
{
	uint32_t slot = h->slots[at];

	for (;;) {
		uint32_t child = 2 * at + 1;

		if (child + 1 < h->count && h->keys[h->slots[child + 1]] < h->keys[h->slots[child]])
			child++;
		if (child >= h->count || h->keys[h->slots[child]] >= h->keys[slot])
			break;
		seat(h, at, h->slots[child]);
		at = child;
	}
	seat(h, at, slot);
}

void om_heap_put(struct om_heap *h, uint32_t slot, double key)
{
	h->keys[slot] = key;
	h->slots[h->count] = slot;
	sift_up(h, h->count++);
}

void om_heap_set(struct om_heap *h, uint32_t slot, double key)
{
	h->keys[slot] = key;
	sift_up(h, h->place[slot]);
	sift_down(h, h->place[slot]);
}

void om_heap_del(struct om_heap *h, uint32_t slot)
{
	uint32_t last = h->slots[--h->count];

	if (last == slot)
		return;
	seat(h, h->place[slot], last);
	sift_up(h, h->place[last]);
	sift_down(h, h->place[last]);
}

void om_heap_order(struct om_heap *h)
{
	for (uint32_t i = h->count / 2; i-- > 0;)
		sift_down(h, i);
}
