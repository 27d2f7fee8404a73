/* om_pattern: see om_pattern.h. */
#include "core/om_pattern.h"

#include <assert.h>
#include <errno.h>

#include "base/om_base.h"
#include "core/om_policy.h"

#define CYCLES    16 /* history kept, in ids */
#define LEAST     64
#define CYCLES_TO (UINT32_C(1) << 18) /* entries up to which so much is kept; then one an id */

enum { REPEATED = 1, REUSED = 2, FORETOLD = 4 };

static uint32_t capacity_of(uint64_t ids)
{
	return (uint32_t)OM_MAX(OM_MAX(ids, LEAST), OM_MIN(ids * CYCLES, CYCLES_TO));
}

static uint32_t index_of(const struct om_pattern *p, uint32_t age)
{
	return age <= p->at ? p->at - age : p->at + p->capacity - age;
}

/* A longer ring with the same entries. */
static int stretch(struct om_pattern *p, uint32_t capacity)
{
	uint32_t *past = om_alloc(capacity, sizeof(*past));

	if (!past)
		return -ENOMEM;
	for (uint32_t i = 0; i < p->kept; i++)
		past[i] = p->past[index_of(p, p->kept - i)];
	om_free(p->past);
	p->past = past;
	p->capacity = capacity;
	p->at = p->kept;
	return 0;
}

static int resize(struct om_pattern *p, uint32_t ids, uint32_t capacity)
{
	int code = om_policy_grow_array(&p->marks, p->ids, ids, sizeof(*p->marks));

	if (!code && capacity > p->capacity)
		code = stretch(p, capacity);
	if (!code)
		p->ids = ids;
	return code;
}

int om_pattern_init(struct om_pattern *p, size_t ids, const uint32_t *order, size_t count)
{
	int code;

	*p = (struct om_pattern){ 0 };
	code = resize(p, (uint32_t)ids, OM_MAX(capacity_of(ids), (uint32_t)(2 * count + 1)));
	if (code) {
		om_pattern_fini(p);
		return code;
	}
	/* Two rounds, of which `last` knows the first: the last id is followed by the first one. */
	for (size_t i = 0; i < count; i++) {
		p->past[i] = p->past[count + i] = order[i];
		p->marks[order[i]].last = (uint32_t)i;
	}
	p->kept = p->at = p->head = p->lag = (uint32_t)(2 * count);
	return 0;
}

void om_pattern_fini(struct om_pattern *p)
{
	om_free(p->past);
	om_free(p->marks);
	p->past = NULL;
	p->marks = NULL;
}

int om_pattern_grow(struct om_pattern *p, uint32_t ids)
{
	uint32_t to = OM_MAX(ids, p->ids + p->ids / 2);

	return ids <= p->ids ? 0 : resize(p, to, OM_MAX(p->capacity, capacity_of(to)));
}

void om_pattern_forget(struct om_pattern *p, uint32_t id)
{
	assert(id < p->ids);
	p->marks[id].born = p->head;
}

/* The id of that age; false when it was another block's. */
static bool entry(const struct om_pattern *p, uint32_t age, uint32_t *ret_id)
{
	*ret_id = p->past[index_of(p, age)];
	return age <= p->head - p->marks[*ret_id].born;
}

uint32_t om_pattern_age(const struct om_pattern *p, uint32_t id)
{
	uint32_t age, there;

	assert(id < p->ids);
	age = p->head - p->marks[id].last;
	/* A position of 2^32 accesses ago looks like a recent one, but the ring has another id. */
	return age - 1 < p->kept && entry(p, age, &there) && there == id ? age : 0;
}

static void note(struct om_pattern *p, unsigned flags)
{
	struct om_locality *l = &p->locality;
	uint8_t *slot = &p->recent[p->recent_at++ % OM_PATTERN_WINDOW];

	l->accesses += l->accesses < OM_PATTERN_WINDOW;
	l->repeated += !!(flags & REPEATED) - !!(*slot & REPEATED);
	l->reused += !!(flags & REUSED) - !!(*slot & REUSED);
	l->foretold += !!(flags & FORETOLD) - !!(*slot & FORETOLD);
	*slot = (uint8_t)flags;
}

static void push(struct om_pattern *p, uint32_t id, uint32_t age)
{
	struct om_pattern_mark *m = &p->marks[id];

	/* `born` moves along before it is so old that it would look recent. What the ring has of
	 * the id is not older than either place it moves to. */
	if (!age)
		m->born = p->head;
	else if (p->head - m->born > p->capacity)
		m->born = p->head - p->capacity;
	m->last = p->head++;
	p->past[p->at] = id;
	p->at = p->at + 1 < p->capacity ? p->at + 1 : 0;
	p->kept += p->kept < p->capacity;
}

/* An access to an id of that age. */
static bool step(struct om_pattern *p, uint32_t id, uint32_t age)
{
	uint32_t expected;
	bool foretold = p->lag && entry(p, p->lag, &expected) && expected == id;

	/* A match leaves the lag: cursor and head move by one each. */
	if (foretold) {
		p->matches++;
	} else {
		p->matches = 0;
		p->mismatches++;
		p->lag = age; /* one behind the last occurrence; without one nothing is known */
	}
	push(p, id, age);
	note(p, (age - 1 < OM_PATTERN_WINDOW ? REUSED : 0) | (foretold ? FORETOLD : 0));
	return foretold;
}

bool om_pattern_record(struct om_pattern *p, uint32_t id)
{
	return step(p, id, om_pattern_age(p, id));
}

bool om_pattern_access(struct om_pattern *p, uint32_t id)
{
	uint32_t age = om_pattern_age(p, id);

	if (age != 1)
		return step(p, id, age);
	note(p, REPEATED | REUSED);
	return true;
}

bool om_pattern_next(const struct om_pattern *p, size_t ahead, uint32_t *ret_id)
{
	/* Beyond the present the same stretch is taken to repeat. */
	return p->lag && entry(p, p->lag - (uint32_t)(ahead % p->lag), ret_id);
}

bool om_pattern_trusted(const struct om_pattern *p)
{
	return p->matches >= OM_PATTERN_TRUST;
}

uint64_t om_pattern_distance(const struct om_pattern *p, uint32_t id, uint64_t most)
{
	uint32_t age = om_pattern_age(p, id);

	if (!om_pattern_trusted(p) || !age || age > p->lag)
		return OM_PATTERN_UNKNOWN;
	/* Its last occurrence is ahead of the cursor; an earlier one may be nearer. */
	for (uint32_t k = 0; k < most && k <= p->lag - age; k++) {
		uint32_t there;

		if (entry(p, p->lag - k, &there) && there == id)
			return k;
	}
	return OM_PATTERN_UNKNOWN;
}
