/* om_pattern: see om_pattern.h. */
#include "core/om_pattern.h"

#include <errno.h>

#include "base/om_base.h"

#define CYCLES 16 /* history kept, in lengths of the declared order */

int om_pattern_init(struct om_pattern *p, size_t ids, const uint32_t *order, size_t count)
{
	*p = (struct om_pattern){ .ids = ids, .capacity = OM_MAX(ids * CYCLES, 64) };
	p->past = om_alloc(p->capacity, sizeof(*p->past));
	p->last = om_alloc(ids, sizeof(*p->last));
	if (!p->past || !p->last) {
		om_pattern_fini(p);
		return -ENOMEM;
	}
	/* Two rounds, of which `last` knows the first: the last id is followed by the first one. */
	for (size_t i = 0; i < count; i++) {
		p->past[i] = p->past[count + i] = order[i];
		p->last[order[i]] = i + 1;
	}
	p->head = 2 * count;
	return 0;
}

void om_pattern_fini(struct om_pattern *p)
{
	om_free(p->past);
	om_free(p->last);
	p->past = NULL;
	p->last = NULL;
}

static bool remembered(const struct om_pattern *p, uint64_t position)
{
	return position < p->head && p->head - position <= p->capacity;
}

bool om_pattern_record(struct om_pattern *p, uint32_t id)
{
	bool foretold = remembered(p, p->cursor) && p->past[p->cursor % p->capacity] == id;
	/* one behind the last occurrence; without one nothing is known */
	uint64_t before = p->last[id] ? p->last[id] : UINT64_MAX;

	if (foretold) {
		p->cursor++;
	} else {
		p->mismatches++;
		p->cursor = before;
	}
	p->past[p->head % p->capacity] = id;
	p->last[id] = ++p->head;
	if (!remembered(p, p->cursor))
		p->cursor = before; /* the walk reached the present, or what was forgotten */
	return foretold;
}

bool om_pattern_next(const struct om_pattern *p, size_t ahead, uint32_t *ret_id)
{
	uint64_t at = p->cursor;

	if (!remembered(p, at))
		return false;
	/* Beyond the present the same stretch is taken to repeat. */
	at += ahead % (p->head - at);
	*ret_id = p->past[at % p->capacity];
	return true;
}
