/*
 * The pattern: the declared order, cycles, a jump to the last occurrence, what is forgotten, trust,
 * locality, distance, all of it against a plain history; and the budget of speculation on it.
 */
#include <errno.h>
#include <string.h>

#include "base/om_base.h"
#include "core/om_pattern.h"
#include "core/om_speculation.h"
#include "om_test.h"

static const uint32_t in_order[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8 };

static uint32_t next(const struct om_pattern *p, size_t ahead)
{
	uint32_t id = UINT32_MAX;

	CHECK(om_pattern_next(p, ahead, &id));
	return id;
}

static void declared_order(void)
{
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 5, in_order, 5), 0);
	for (size_t k = 0; k < 12; k++)
		CHECK_EQ(next(&p, k), k % 5); /* beyond its end it repeats */
	for (uint32_t i = 0; i < 23; i++) {
		CHECK(om_pattern_record(&p, i % 5));
		CHECK_EQ(next(&p, 0), (i + 1) % 5);
		CHECK_EQ(next(&p, 3), (i + 4) % 5);
	}
	CHECK_EQ(p.mismatches, 0);
	om_pattern_fini(&p);
}

static void learns_another_order(void)
{
	static const uint32_t order[] = { 4, 2, 0, 3 };
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 5, in_order, 5), 0);
	for (int i = 0; i < 4; i++)
		om_pattern_record(&p, order[i]);
	for (int i = 0; i < 2; i++) /* the second round begins: jumps into the first */
		om_pattern_record(&p, order[i]);
	for (int i = 2; i < 40; i++) {
		CHECK_EQ(next(&p, 0), order[i % 4]);
		CHECK_EQ(next(&p, 2), order[(i + 2) % 4]);
		CHECK(om_pattern_record(&p, order[i % 4]));
	}
	om_pattern_fini(&p);
}

/* The declared order is a cycle, also for who begins at its end. */
static void begins_anywhere(void)
{
	for (uint32_t first = 1; first < 5; first++) {
		struct om_pattern p;

		CHECK_EQ(om_pattern_init(&p, 5, in_order, 5), 0);
		CHECK(!om_pattern_record(&p, first));
		for (uint32_t k = 0; k < 5; k++)
			CHECK_EQ(next(&p, k), (first + 1 + k) % 5);
		for (uint32_t i = first + 1; i < 30; i++)
			om_pattern_record(&p, i % 5);
		CHECK(p.mismatches <= 2); /* the start, and where its history begins */
		CHECK_EQ(next(&p, 0), 0);
		om_pattern_fini(&p);
	}
}

/* A mismatch throws nothing away: the old order is known again after one access. */
static void comes_back(void)
{
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 6, in_order, 6), 0);
	for (uint32_t i = 0; i < 12; i++)
		CHECK(om_pattern_record(&p, i % 6));
	CHECK(!om_pattern_record(&p, 3));
	CHECK_EQ(next(&p, 0), 4);
	CHECK(!om_pattern_record(&p, 1));
	CHECK_EQ(p.mismatches, 2);
	for (uint32_t i = 2; i < 6; i++)
		CHECK(om_pattern_record(&p, i));
	om_pattern_fini(&p);
}

static void one_id(void)
{
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 1, in_order, 1), 0);
	for (int i = 0; i < 200; i++) {
		CHECK_EQ(next(&p, 7), 0);
		CHECK(om_pattern_record(&p, 0));
	}
	om_pattern_fini(&p);
}

/* Ids that the declared order leaves out are learned when they come. */
static void declared_in_part(void)
{
	static const uint32_t order[] = { 4, 1 };
	struct om_pattern p;
	uint32_t id;

	CHECK_EQ(om_pattern_init(&p, 5, order, 2), 0);
	for (int i = 0; i < 5; i++) {
		CHECK_EQ(next(&p, 0), order[i % 2]);
		CHECK(om_pattern_record(&p, order[i % 2]));
	}
	CHECK(!om_pattern_record(&p, 2));
	CHECK(!om_pattern_next(&p, 0, &id));
	CHECK(!om_pattern_record(&p, 1));
	CHECK_EQ(next(&p, 0), 4);
	CHECK(om_pattern_record(&p, 4));
	CHECK(om_pattern_record(&p, 2)); /* as after the last 4 */
	CHECK_EQ(next(&p, 0), 1);
	om_pattern_fini(&p);

	CHECK_EQ(om_pattern_init(&p, 5, NULL, 0), 0);
	CHECK(!om_pattern_next(&p, 0, &id));
	om_pattern_fini(&p);
}

/* An id last seen before all that is remembered is no ground for a forecast. */
static void forgets(void)
{
	struct om_pattern p;
	uint32_t id;

	CHECK_EQ(om_pattern_init(&p, 4, in_order, 4), 0);
	for (size_t i = 0; i < 2 * p.capacity; i++)
		om_pattern_record(&p, (uint32_t)(i % 3));
	CHECK(!om_pattern_record(&p, 3));
	CHECK(!om_pattern_next(&p, 0, &id));
	CHECK(!om_pattern_record(&p, 1));
	CHECK_EQ(next(&p, 0), 3);
	om_pattern_fini(&p);
}

/* Any accesses: forecasts are ids, and stay inside the ring. */
static void at_random(void)
{
	unsigned long long seed = 3;
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 9, in_order, 9), 0);
	for (int i = 0; i < 5000; i++) {
		uint32_t id;

		om_pattern_record(&p, (uint32_t)(om_test_random(&seed) % 9));
		for (size_t k = 0; k < 20; k++)
			CHECK(!om_pattern_next(&p, k, &id) || id < 9);
	}
	om_pattern_fini(&p);
}

static void without_memory(void)
{
	struct om_pattern p;

	for (uint64_t nth = 1; nth <= 2; nth++) {
		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		CHECK(om_pattern_init(&p, 5, in_order, 5) < 0);
	}
	om_fault_reset();
}

/* ---- growth, forgetting, positions modulo 2^32 ---- */

static void cycle(struct om_pattern *p, uint32_t from, uint32_t ids, int rounds)
{
	for (int round = 0; round < rounds; round++)
		for (uint32_t i = 0; i < ids; i++)
			om_pattern_access(p, from + i);
}

static void grows(void)
{
	struct om_pattern p;
	uint32_t id;

	CHECK_EQ(om_pattern_init(&p, 0, NULL, 0), 0);
	for (uint32_t ids = 1; ids <= 3000; ids++) {
		CHECK_EQ(om_pattern_grow(&p, ids), 0);
		CHECK(p.ids >= ids && p.ids <= ids + ids / 2);
		om_pattern_access(&p, ids - 1);
	}
	for (uint32_t id = 0; id < 3000; id++) { /* what came before it grew is known */
		om_pattern_access(&p, id);
		CHECK_EQ(next(&p, 1), (id + 2) % 3000);
	}
	CHECK_EQ(p.mismatches, 3001);
	om_pattern_fini(&p);

	CHECK_EQ(om_pattern_init(&p, 4, NULL, 0), 0);
	cycle(&p, 0, 1, 1);
	for (uint32_t i = 0; i < p.capacity + 9; i++)
		om_pattern_access(&p, 1 + i % 3);
	/* A longer ring has what the short one had, no more. */
	CHECK_EQ(om_pattern_grow(&p, 40), 0);
	cycle(&p, 1, 3, 1);
	CHECK(!om_pattern_access(&p, 0));
	CHECK(!om_pattern_next(&p, 0, &id));
	om_pattern_fini(&p);

	CHECK_EQ(om_pattern_init(&p, 1000000, NULL, 0), 0);
	CHECK(p.ids * sizeof(*p.marks) + p.capacity * sizeof(*p.past) <= UINT64_C(12) * p.ids);
	om_pattern_fini(&p);
}

static void grows_without_memory(void)
{
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 5, in_order, 5), 0);
	for (uint64_t nth = 1; nth <= 2; nth++) {
		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		CHECK_EQ(om_pattern_grow(&p, 500), -ENOMEM);
		om_fault_reset();
		CHECK_EQ(p.ids, 5);
		for (uint32_t i = 0; i < 500; i++)
			CHECK(om_pattern_record(&p, i % 5));
	}
	CHECK_EQ(om_pattern_grow(&p, 500), 0);
	CHECK(om_pattern_record(&p, 0));
	CHECK(!om_pattern_record(&p, 499));
	om_pattern_fini(&p);
}

static void forgets_one_id(void)
{
	struct om_pattern p;
	uint32_t id;

	CHECK_EQ(om_pattern_init(&p, 8, NULL, 0), 0);
	cycle(&p, 0, 8, 4);
	om_pattern_forget(&p, 2);
	for (size_t k = 0; k < 30; k++) /* a gap in what is expected */
		CHECK(k % 8 == 2 ? !om_pattern_next(&p, k, &id) : next(&p, k) == k % 8);
	CHECK(om_pattern_access(&p, 0) && om_pattern_access(&p, 1));
	CHECK_EQ(om_pattern_distance(&p, 2, 8), OM_PATTERN_UNKNOWN);
	CHECK_EQ(om_pattern_distance(&p, 3, 8), 1);
	CHECK(!om_pattern_access(&p, 2)); /* another block: never seen before */
	CHECK(!om_pattern_next(&p, 0, &id));
	CHECK(!om_pattern_access(&p, 3));
	for (uint32_t i = 4; i < 8; i++)
		CHECK(om_pattern_access(&p, i));
	for (uint32_t i = 0; i < 16; i++) /* from then on as any other */
		CHECK(om_pattern_access(&p, i % 8));

	om_pattern_access(&p, 5);
	om_pattern_forget(&p, 5);
	CHECK(!om_pattern_access(&p, 5)); /* another block does not go on with the last access */
	om_pattern_fini(&p);
}

/* As if 2^32 accesses had gone by, of which the ring has none of id 3: its position looks recent, or
 * will once some more have. */
static void outlives_positions(void)
{
	struct om_pattern p;
	uint32_t since, id;

	CHECK_EQ(om_pattern_init(&p, 4, NULL, 0), 0);
	cycle(&p, 0, 4, 3);
	om_pattern_forget(&p, 3);
	om_pattern_access(&p, 3);
	cycle(&p, 0, 3, 100);
	for (uint32_t i = 0; i < 3; i++) /* which is how it would be then, too */
		CHECK(p.head - p.marks[i].born <= 2 * p.capacity);
	since = p.head - p.marks[3].last;
	for (int looks = -9; looks <= (int)(2 * p.capacity); looks++) {
		uint32_t by = (uint32_t)looks - since, past[64];
		struct om_pattern_mark marks[4];
		struct om_pattern q = p;

		CHECK_EQ(p.capacity, 64);
		q.marks = memcpy(marks, p.marks, sizeof(marks));
		q.past = memcpy(past, p.past, sizeof(past));
		q.head += by;
		for (uint32_t i = 0; i < 3; i++) {
			marks[i].last += by;
			marks[i].born += by;
		}
		CHECK(!om_pattern_access(&q, 3));
		CHECK(!om_pattern_next(&q, 0, &id));
		cycle(&q, 0, 2, 1);
		om_pattern_access(&q, 3);
		CHECK_EQ(next(&q, 0), 0); /* what it did since is remembered */
	}
	om_pattern_fini(&p);
}

/* ---- trust ---- */

static void trusts_after_matches(void)
{
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 50, NULL, 0), 0);
	cycle(&p, 0, 50, 1);
	CHECK(!om_pattern_trusted(&p));
	for (uint32_t i = 0; i < 50; i++) { /* the first one jumps */
		om_pattern_access(&p, i);
		CHECK_EQ(om_pattern_trusted(&p), i >= OM_PATTERN_TRUST);
	}
	cycle(&p, 0, 50, 10);
	cycle(&p, 0, 20, 1);
	om_pattern_access(&p, 45); /* one odd access */
	CHECK(!om_pattern_trusted(&p));
	for (uint32_t i = 20; i < 50; i++) {
		om_pattern_access(&p, i);
		CHECK_EQ(om_pattern_trusted(&p), i >= 20 + OM_PATTERN_TRUST);
	}
	om_pattern_fini(&p);
}

/* Runs of one id, as long as they happen to be, are the cycle of their ids. */
static void runs(void)
{
	unsigned long long seed = 11;
	struct om_pattern p;
	uint32_t before;

	CHECK_EQ(om_pattern_init(&p, 6, NULL, 0), 0);
	for (uint32_t i = 0; i < 600; i++) {
		om_pattern_access(&p, i % 6);
		before = p.head;
		for (uint64_t k = om_test_random(&seed) % 5; k > 0; k--)
			CHECK(om_pattern_access(&p, i % 6));
		CHECK_EQ(p.head, before);
	}
	CHECK_EQ(p.mismatches, 7);
	CHECK_EQ(next(&p, 0), 0);
	CHECK(p.locality.repeated > 500 && p.locality.reused == OM_PATTERN_WINDOW);
	CHECK_EQ(p.locality.foretold, p.locality.accesses - p.locality.repeated);
	om_pattern_fini(&p);
}

static void measures_distance(void)
{
	static const uint32_t order[] = { 0, 1, 2, 1, 3, 4 }; /* 1 comes twice in a round */
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, 9, NULL, 0), 0);
	om_pattern_access(&p, 8);
	for (int i = 0; i < 6; i++)
		om_pattern_access(&p, order[i]);
	CHECK_EQ(om_pattern_distance(&p, 1, 100), OM_PATTERN_UNKNOWN); /* not trusted yet */
	for (int i = 0; i < 60; i++)
		om_pattern_access(&p, order[i % 6]);
	CHECK_EQ(om_pattern_distance(&p, 0, 100), 0);
	CHECK_EQ(om_pattern_distance(&p, 1, 100), 1); /* the nearer one */
	CHECK_EQ(om_pattern_distance(&p, 4, 100), 5);
	CHECK_EQ(om_pattern_distance(&p, 4, 6), 5);
	CHECK_EQ(om_pattern_distance(&p, 4, 5), OM_PATTERN_UNKNOWN);
	CHECK_EQ(om_pattern_distance(&p, 0, 0), OM_PATTERN_UNKNOWN);
	CHECK_EQ(om_pattern_distance(&p, 8, 100), OM_PATTERN_UNKNOWN); /* behind the cursor */
	CHECK_EQ(om_pattern_distance(&p, 7, 100), OM_PATTERN_UNKNOWN); /* never seen */
	om_pattern_fini(&p);
}

/* Only what came within the window counts as used again. */
static void measures_reuse(void)
{
	struct om_pattern p;

	CHECK_EQ(om_pattern_init(&p, OM_PATTERN_WINDOW + 1, NULL, 0), 0);
	cycle(&p, 0, OM_PATTERN_WINDOW + 1, 3);
	CHECK_EQ(p.locality.accesses, OM_PATTERN_WINDOW);
	CHECK_EQ(p.locality.reused, 0);
	CHECK_EQ(p.locality.foretold, OM_PATTERN_WINDOW);
	cycle(&p, 0, OM_PATTERN_WINDOW, 2);
	CHECK_EQ(p.locality.reused, OM_PATTERN_WINDOW);
	om_pattern_fini(&p);
}

/* ---- against a plain history ---- */

enum { STEPS = 20000, MOST_IDS = 100, UNKNOWN = -1 };

struct history {
	long past[STEPS], n, oldest;
	long born[MOST_IDS]; /* first position that is this block's */
	long cursor, matches;
	bool repeated[STEPS], reused[STEPS], foretold[STEPS]; /* by access, runs not folded */
	long accesses;
};

static bool history_is(const struct history *h, long at, long id)
{
	return at >= h->oldest && at < h->n && h->past[at] == id && at >= h->born[id];
}

static long history_last(const struct history *h, long id)
{
	for (long at = h->n - 1; at >= h->oldest; at--)
		if (history_is(h, at, id))
			return at;
	return UNKNOWN;
}

static bool history_access(struct history *h, long id, long capacity, bool fold)
{
	long last = history_last(h, id), a = h->accesses++;

	h->reused[a] = last != UNKNOWN && h->n - last <= OM_PATTERN_WINDOW;
	h->repeated[a] = fold && last != UNKNOWN && last == h->n - 1;
	if (h->repeated[a])
		return true;
	h->foretold[a] = h->cursor != UNKNOWN && history_is(h, h->cursor, id);
	h->matches = h->foretold[a] ? h->matches + 1 : 0;
	if (h->foretold[a])
		h->cursor++;
	else
		h->cursor = last == UNKNOWN ? UNKNOWN : last + 1;
	h->past[h->n++] = id;
	h->oldest = OM_MAX(h->oldest, h->n - capacity);
	return h->foretold[a];
}

static long history_next(const struct history *h, long ahead)
{
	long at = h->cursor == UNKNOWN ? 0 : h->cursor + ahead % (h->n - h->cursor);

	return h->cursor != UNKNOWN && history_is(h, at, h->past[at]) ? h->past[at] : UNKNOWN;
}

static void history_locality(const struct history *h, struct om_locality *ret)
{
	*ret = (struct om_locality){ 0 };
	for (long a = OM_MAX(0, h->accesses - OM_PATTERN_WINDOW); a < h->accesses; a++) {
		ret->accesses++;
		ret->repeated += h->repeated[a];
		ret->reused += h->reused[a];
		ret->foretold += h->foretold[a];
	}
}

static void check_history(const struct om_pattern *p, const struct history *h, long id)
{
	struct om_locality locality;
	uint64_t distance = OM_PATTERN_UNKNOWN;
	uint32_t got;

	CHECK_EQ(om_pattern_trusted(p), h->matches >= OM_PATTERN_TRUST);
	for (long k = 0; k < 40; k++) {
		long expected = history_next(h, k);

		CHECK_EQ(om_pattern_next(p, (size_t)k, &got) ? (long)got : UNKNOWN, expected);
		if (expected == id && distance == OM_PATTERN_UNKNOWN)
			distance = (uint64_t)k;
	}
	if (h->matches < OM_PATTERN_TRUST)
		distance = OM_PATTERN_UNKNOWN;
	CHECK_EQ(om_pattern_distance(p, (uint32_t)id, 40), distance);
	history_locality(h, &locality);
	CHECK(!memcmp(&locality, &p->locality, sizeof(locality)));
}

/* Loops over some of the ids, noise, runs, now and then a block that goes or room for more. */
static void like_history(uint32_t head, bool fold, unsigned long long seed)
{
	static struct history h;
	struct om_pattern p;
	uint32_t from = 0, length = 1, at = 0, id = 0;

	memset(&h, 0, sizeof(h));
	h.cursor = UNKNOWN;
	CHECK_EQ(om_pattern_init(&p, 3, NULL, 0), 0);
	p.head = head;
	for (int step = 0; step < STEPS; step++) {
		uint64_t dice = om_test_random(&seed) % 1000;

		if (dice < 10) {
			from = (uint32_t)(om_test_random(&seed) % p.ids);
			length = 1 + (uint32_t)(om_test_random(&seed) % (p.ids - from));
		} else if (dice < 20) {
			uint32_t gone = (uint32_t)(om_test_random(&seed) % p.ids);

			om_pattern_forget(&p, gone);
			h.born[gone] = h.n;
		} else if (dice < 22 && p.ids < MOST_IDS / 2) {
			CHECK_EQ(om_pattern_grow(&p, p.ids + 1), 0);
		}
		if (dice >= 900 && dice < 930)
			id = (uint32_t)(om_test_random(&seed) % p.ids);
		else if (dice < 900)
			id = from + at++ % length;
		CHECK_EQ(fold ? om_pattern_access(&p, id) : om_pattern_record(&p, id),
		         history_access(&h, id, p.capacity, fold));
		check_history(&p, &h, (long)(om_test_random(&seed) % p.ids));
	}
	om_pattern_fini(&p);
}

/* ---- synthetic traces ---- */

struct shares {
	double trusted; /* of accesses */
	double right;   /* of those, foretold */
};

static struct shares shares_of(struct om_pattern *p, const uint32_t *trace, size_t count)
{
	size_t trusted = 0, right = 0;

	for (size_t i = 0; i < count; i++) {
		bool bet = om_pattern_trusted(p), foretold = om_pattern_access(p, trace[i]);

		trusted += bet;
		right += bet && foretold;
	}
	return (struct shares){ (double)trusted / (double)count,
		                trusted ? (double)right / (double)trusted : 0 };
}

enum { TRACE = 100000, SPACE = 1000 };
static uint32_t trace[TRACE];

static struct shares replay(void)
{
	struct om_pattern p;
	struct shares s;

	CHECK_EQ(om_pattern_init(&p, SPACE, NULL, 0), 0);
	s = shares_of(&p, trace, TRACE);
	om_pattern_fini(&p);
	return s;
}

static void foretells_cycles(void)
{
	unsigned long long seed = 5;
	struct shares s;

	for (uint32_t i = 0; i < TRACE; i++)
		trace[i] = i % SPACE;
	s = replay();
	CHECK(s.trusted > 0.98 && s.right == 1);
	for (uint32_t i = 0; i < TRACE; i++) /* most ids come twice in a round */
		trace[i] = i % 198 < 99 ? i % 198 : 198 - i % 198;
	s = replay();
	CHECK(s.trusted > 0.99 && s.right == 1);
	/* Two loops in turn, each some rounds long, which share some ids. */
	for (uint32_t i = 0; i < TRACE; i++)
		trace[i] = i / 900 % 2 ? 40 + i % 90 : i % 60;
	s = replay();
	CHECK(s.trusted > 0.95 && s.right > 0.99);
	for (uint32_t i = 0; i < TRACE; i++) /* one access in 20 is any */
		trace[i] = om_test_random(&seed) % 20 ? i % 100 : om_test_random(&seed) % SPACE;
	s = replay();
	CHECK(s.trusted > 0.5 && s.right > 0.85);
}

static void abstains_at_random(void)
{
	static double up_to[SPACE];
	unsigned long long seed = 7;
	double sum = 0;

	for (uint32_t i = 0; i < TRACE; i++)
		trace[i] = om_test_random(&seed) % SPACE;
	CHECK(replay().trusted < 0.001);
	for (uint32_t i = 0; i < SPACE; i++)
		up_to[i] = sum += 1.0 / (i + 1);
	for (uint32_t i = 0; i < TRACE; i++) {
		double at = (double)(om_test_random(&seed) >> 11) / 9007199254740992.0 * sum;

		for (trace[i] = 0; up_to[trace[i]] < at && trace[i] < SPACE - 1;)
			trace[i]++;
	}
	CHECK(replay().trusted < 0.001);
}

/* ---- the budget of speculation ---- */

static void budget_of_the_right(void)
{
	struct om_speculation s;

	om_speculation_init(&s);
	for (int i = 0; i < 100; i++) {
		CHECK(om_speculation_room(&s) <= OM_SPECULATION_MOST);
		while (om_speculation_room(&s))
			om_speculation_issue(&s);
		om_speculation_access(&s, true);
		om_speculation_end(&s, true);
		CHECK_EQ(s.depth == OM_SPECULATION_MOST, i + 1 >= 2 + 3 + 4 + 5 + 6 + 7);
	}
	CHECK_EQ(s.depth, OM_SPECULATION_MOST);
	CHECK_EQ(s.open, OM_SPECULATION_MOST - 1);
	CHECK_EQ(s.used_count, 100);
	CHECK_EQ(s.issued_count, 107);
}

/* Ends that are right as often as `share` of 100 says; the depth after them. */
static uint32_t depth_at(struct om_speculation *s, uint32_t share, uint32_t ends)
{
	for (uint32_t i = 0; i < ends; i++) {
		om_speculation_issue(s);
		om_speculation_end(s, i * share / 100 != (i + 1) * share / 100);
	}
	return s->depth;
}

static void budget_by_share(void)
{
	struct om_speculation s;

	om_speculation_init(&s);
	CHECK(depth_at(&s, 60, 200) < OM_SPECULATION_MOST); /* neither high nor low */
	CHECK_EQ(depth_at(&s, 100, 200), OM_SPECULATION_MOST);
	CHECK_EQ(depth_at(&s, 60, 200), OM_SPECULATION_MOST);
	CHECK(depth_at(&s, 40, 30) < OM_SPECULATION_MOST);
	CHECK_EQ(depth_at(&s, 0, 30), 0); /* however often it was right long ago */
	CHECK_EQ(om_speculation_room(&s), 0);

	for (int i = 1; i < OM_SPECULATION_PROBE; i++) {
		om_speculation_access(&s, true);
		om_speculation_access(&s, false);
		CHECK_EQ(om_speculation_room(&s), 0);
	}
	om_speculation_access(&s, true);
	CHECK_EQ(om_speculation_room(&s), 1);
	om_speculation_issue(&s);
	CHECK_EQ(om_speculation_room(&s), 0);
	om_speculation_end(&s, true);
	CHECK_EQ(s.depth, 1);
	CHECK_EQ(depth_at(&s, 100, 200), OM_SPECULATION_MOST);
}

/* What is never used nor goes is given up. */
static void budget_of_the_stale(void)
{
	struct om_speculation s;

	om_speculation_init(&s);
	CHECK_EQ(depth_at(&s, 100, 200), OM_SPECULATION_MOST);
	while (om_speculation_room(&s))
		om_speculation_issue(&s);
	for (int i = 1; i < OM_SPECULATION_PATIENCE; i++)
		om_speculation_access(&s, true);
	CHECK_EQ(om_speculation_room(&s), 0);
	om_speculation_access(&s, true);
	CHECK(om_speculation_room(&s) > 0);
	CHECK_EQ(s.wasted_count, OM_SPECULATION_MOST);
	om_speculation_end(&s, true); /* late, after all */
	CHECK_EQ(s.open, 0);
}

/* A cache that keeps nothing but what was issued, until it is used or 32 accesses old. */
struct bettor {
	struct om_pattern p;
	struct om_speculation s;
	uint32_t issued_at[SPACE]; /* 1 + the access; 0: not there */
	uint32_t accesses, open;
};

static void bettor_access(struct bettor *b, uint32_t id)
{
	bool bet = om_pattern_trusted(&b->p), foretold = om_pattern_access(&b->p, id);
	uint32_t ahead;

	b->accesses++;
	om_speculation_access(&b->s, bet && foretold);
	for (uint32_t i = 0; i < SPACE; i++) {
		if (!b->issued_at[i] || (i != id && b->accesses - b->issued_at[i] < 32))
			continue;
		om_speculation_end(&b->s, i == id);
		b->issued_at[i] = 0;
	}
	for (size_t k = 0; om_pattern_trusted(&b->p) && k < 2 * OM_SPECULATION_MOST; k++) {
		if (!om_speculation_room(&b->s))
			break;
		if (!om_pattern_next(&b->p, k, &ahead) || ahead == id || b->issued_at[ahead])
			continue;
		om_speculation_issue(&b->s);
		b->issued_at[ahead] = b->accesses;
	}
	CHECK(b->s.open <= OM_SPECULATION_MOST);
	CHECK_EQ(b->s.issued_count, b->s.used_count + b->s.wasted_count + b->s.open);
}

/* Follows the forecast while nothing is bet on it, and not while something is. */
static void bets_against_an_adversary(void)
{
	static struct bettor b;
	uint32_t id = 0, until;

	CHECK_EQ(om_pattern_init(&b.p, SPACE, NULL, 0), 0);
	om_speculation_init(&b.s);
	for (int i = 0; i < 20000; i++) {
		if (b.s.open || !om_pattern_next(&b.p, 0, &id))
			do
				id = (id + 7) % 100;
			while (b.issued_at[id]);
		bettor_access(&b, id);
	}
	CHECK(b.s.issued_count * 100 < 3 * (uint64_t)b.accesses);
	CHECK(b.s.issued_count > 20); /* but it goes on probing */
	CHECK_EQ(b.s.used_count, 0);

	/* The forecast becomes right: a few probes' worth of accesses later it is bet on in full. */
	until = b.accesses + 4 * OM_SPECULATION_PROBE;
	for (uint32_t i = 0; b.accesses < until; i++)
		bettor_access(&b, 200 + i % 50);
	CHECK_EQ(b.s.depth, OM_SPECULATION_MOST);
	om_pattern_fini(&b.p);
}

static void bets_as_things_change(void)
{
	static struct bettor b;
	unsigned long long seed = 9;
	uint64_t issued;

	CHECK_EQ(om_pattern_init(&b.p, SPACE, NULL, 0), 0);
	om_speculation_init(&b.s);
	for (uint32_t i = 0; i < 5000; i++)
		bettor_access(&b, i % 200);
	CHECK_EQ(b.s.depth, OM_SPECULATION_MOST);
	CHECK(b.s.used_count > 4700);
	CHECK_EQ(b.s.wasted_count, 0);

	issued = b.s.issued_count;
	for (uint32_t i = 0; i < 5000; i++)
		bettor_access(&b, (uint32_t)(om_test_random(&seed) % SPACE));
	CHECK(b.s.issued_count - issued < 20);

	issued = b.s.used_count;
	for (uint32_t i = 0; i < 5000; i++)
		bettor_access(&b, 300 + i % 200);
	CHECK_EQ(b.s.depth, OM_SPECULATION_MOST);
	CHECK(b.s.used_count - issued > 4500);
	om_pattern_fini(&b.p);
}

int main(void)
{
	declared_order();
	learns_another_order();
	begins_anywhere();
	comes_back();
	one_id();
	declared_in_part();
	forgets();
	at_random();
	without_memory();
	grows();
	grows_without_memory();
	forgets_one_id();
	outlives_positions();
	trusts_after_matches();
	runs();
	measures_distance();
	measures_reuse();
	like_history(0, true, 3);
	like_history(UINT32_MAX - STEPS / 2, true, 5);
	like_history(0, false, 7);
	foretells_cycles();
	abstains_at_random();
	budget_of_the_right();
	budget_by_share();
	budget_of_the_stale();
	bets_against_an_adversary();
	bets_as_things_change();
	return 0;
}
