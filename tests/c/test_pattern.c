/* The pattern: the declared order, cycles, a jump to the last occurrence, what is forgotten. */
#include "base/om_base.h"
#include "core/om_pattern.h"
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
	return 0;
}
