/* Tests of core/om_arena.c against a naive model: one owner a granule. */
#include "core/om_arena.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/om_base.h"
#include "om_test.h"

#define GRANULE UINT64_C(4096)
#define MAX_N   1024 /* granules of the model */

struct model {
	struct om_arena *arena;
	uint64_t size;         /* granules */
	uint16_t owner[MAX_N]; /* 0: free, else 1 + the granule where the allocation begins */
	uint64_t used, count;
};

/* The largest room at a multiple of `align` granules. */
static uint64_t model_largest(const struct model *m, uint64_t align)
{
	uint64_t best = 0;

	for (uint64_t at = 0; at < m->size;) {
		uint64_t end = at;

		while (end < m->size && !m->owner[end])
			end++;
		uint64_t start = om_up(at, align);

		if (end > start)
			best = OM_MAX(best, end - start);
		at = end + 1;
	}
	return best;
}

static void model_compare(const struct model *m)
{
	CHECK_EQ(om_arena_check(m->arena), 0);
	CHECK_EQ(om_arena_size(m->arena), m->size * GRANULE);
	CHECK_EQ(om_arena_used(m->arena), m->used * GRANULE);
	CHECK_EQ(om_arena_count(m->arena), m->count);
	CHECK_EQ(om_arena_largest_free(m->arena), model_largest(m, 1) * GRANULE);
}

static void model_take(struct model *m, uint64_t offset, uint64_t n)
{
	uint64_t at = offset / GRANULE;

	CHECK_EQ(offset % GRANULE, 0);
	CHECK(at < m->size && n <= m->size - at);
	for (uint64_t i = at; i < at + n; i++) {
		CHECK_EQ(m->owner[i], 0);
		m->owner[i] = (uint16_t)(at + 1);
	}
	m->used += n;
	m->count++;
}

/* By handle nothing is missed, and an owner is told by its number, 1 + the granule of its record. */
static void step_take(struct model *m, unsigned long long *seed, uint64_t biggest)
{
	uint64_t bytes = 1 + om_test_random(seed) % (biggest * GRANULE), offset;
	uint64_t n = (bytes + GRANULE - 1) / GRANULE, align = 0, room;
	uint32_t owner = (uint32_t)om_test_random(seed), handle = 0;
	struct om_tile t;

	if (om_test_random(seed) % 4 == 0)
		align = UINT64_C(1) << om_test_random(seed) % 18;
	room = model_largest(m, align > GRANULE ? align / GRANULE : 1);
	int code = om_arena_take(m->arena, bytes, align, owner, &handle, &offset);

	CHECK_EQ(code, n <= room ? 0 : -ENOSPC);
	if (code)
		return;
	CHECK(!align || offset % align == 0);
	model_take(m, offset, n);
	t = om_arena_tile(m->arena, handle);
	CHECK(t.used && t.owner == owner && t.handle == handle);
	CHECK_EQ(t.offset, offset);
	CHECK_EQ(t.bytes, n * GRANULE);
}

static void step_give(struct model *m, unsigned long long *seed)
{
	uint64_t left = m->count ? om_test_random(seed) % m->count : 0;
	struct om_tile t = om_arena_beside(m->arena, 0, true);
	uint32_t hole;

	for (; t.handle; t = om_arena_beside(m->arena, t.handle, true))
		if (t.used && left-- == 0)
			break;
	if (!t.handle)
		return;
	for (uint64_t i = t.offset / GRANULE; i < (t.offset + t.bytes) / GRANULE; i++) {
		CHECK_EQ(m->owner[i], t.offset / GRANULE + 1);
		m->owner[i] = 0;
		m->used--;
	}
	m->count--;
	hole = om_arena_give(m->arena, t.handle);
	CHECK(!om_arena_tile(m->arena, hole).used);
	CHECK(om_arena_tile(m->arena, hole).offset <= t.offset);
	CHECK(om_arena_tile(m->arena, hole).bytes >= t.bytes);
}

/* The walk over holes finds all of at least `least`, each once. */
static void compare_holes(const struct model *m, uint64_t least)
{
	uint64_t want = 0, have = 0;
	uint32_t hole = 0;

	for (uint64_t at = 0, end; at < m->size; at = end + 1) {
		for (end = at; end < m->size && !m->owner[end];)
			end++;
		want += end - at >= least ? end - at : 0;
	}
	while ((hole = om_arena_next_hole(m->arena, hole, least * GRANULE)) != 0) {
		struct om_tile t = om_arena_tile(m->arena, hole);

		CHECK(!t.used && t.handle == hole);
		have += t.bytes >= least * GRANULE ? t.bytes / GRANULE : 0;
	}
	CHECK_EQ(have, want);
}

static void step_alloc(struct model *m, unsigned long long *seed, uint64_t biggest)
{
	uint64_t bytes = 1 + om_test_random(seed) % (biggest * GRANULE), offset;
	uint64_t n = (bytes + GRANULE - 1) / GRANULE, align = 0, room;

	if (om_test_random(seed) % 4 == 0)
		align = UINT64_C(1) << om_test_random(seed) % 18; /* 1 byte to 32 granules */
	room = model_largest(m, align > GRANULE ? align / GRANULE : 1);
	int code = om_arena_alloc(m->arena, bytes, align, &offset);

	if (!code) {
		CHECK(n <= room);
		CHECK(!align || offset % align == 0);
		model_take(m, offset, n);
		return;
	}
	CHECK_EQ(code, -ENOSPC);
	if (align > GRANULE)
		CHECK(room < n + n / 32 + align / GRANULE);
	else if (n < 64)
		CHECK(room < n); /* a class a size: nothing is missed */
	else
		CHECK(room <= n + n / 32);
}

static void step_alloc_some(struct model *m, unsigned long long *seed)
{
	uint64_t n = 1 + om_test_random(seed) % MAX_N, offset, got;
	uint64_t room = model_largest(m, 1);
	int code = om_arena_alloc_some(m->arena, n * GRANULE, &offset, &got);

	if (!room) {
		CHECK_EQ(code, -ENOSPC);
		return;
	}
	CHECK_EQ(code, 0);
	CHECK(got && got % GRANULE == 0 && got <= n * GRANULE);
	CHECK(got == n * GRANULE || got / GRANULE + room / 32 >= room);
	model_take(m, offset, got / GRANULE);
}

static void step_free(struct model *m, unsigned long long *seed)
{
	uint64_t at = om_test_random(seed) % (m->size + 1), owner;

	if (at == m->size || m->owner[at] != at + 1) { /* nothing begins there */
		CHECK_EQ(om_arena_free(m->arena, at * GRANULE), OM_EVALUE);
		CHECK_EQ(om_arena_free(m->arena, at * GRANULE + 1), OM_EVALUE);
	}
	if (at == m->size || !m->owner[at])
		return;
	owner = m->owner[at];
	CHECK_EQ(om_arena_free(m->arena, (owner - 1) * GRANULE + 512), OM_EVALUE);
	CHECK_EQ(om_arena_free(m->arena, (owner - 1) * GRANULE), 0);
	for (uint64_t i = owner - 1; i < m->size && m->owner[i] == owner; i++) {
		m->owner[i] = 0;
		m->used--;
	}
	m->count--;
}

static void step_resize(struct model *m, unsigned long long *seed)
{
	if (om_test_random(seed) % 2) {
		while (m->size && !m->owner[m->size - 1])
			m->size--;
		CHECK_EQ(om_arena_shrink(m->arena), m->size * GRANULE);
	} else {
		uint64_t size = m->size + om_test_random(seed) % (MAX_N - m->size + 1);

		CHECK_EQ(om_arena_grow(m->arena, size * GRANULE), 0);
		m->size = size;
	}
}

static void test_model(unsigned long long seed)
{
	struct model *m = om_alloc(1, sizeof(*m));

	CHECK(m);
	m->size = om_test_random(&seed) % (MAX_N + 1);
	CHECK_EQ(om_arena_create(m->size * GRANULE, GRANULE, &m->arena), 0);
	model_compare(m);
	for (int i = 0; i < 4000; i++) {
		/* Now filling, now draining; now small, now large. */
		unsigned fill = i / 500 % 2 ? 35 : 60, dice = om_test_random(&seed) % 100;
		uint64_t biggest = i / 1000 % 2 ? 200 : 12;

		if (dice < fill)
			step_alloc(m, &seed, biggest);
		else if (dice < fill + 2)
			step_alloc_some(m, &seed);
		else if (dice < fill + 4)
			step_resize(m, &seed);
		else
			step_free(m, &seed);
		model_compare(m);
	}
	om_arena_destroy(m->arena);
	om_free(m);
}

static void test_by_handle(unsigned long long seed)
{
	struct model *m = om_alloc(1, sizeof(*m));

	CHECK(m);
	m->size = om_test_random(&seed) % (MAX_N + 1);
	CHECK_EQ(om_arena_create_by_handle(m->size * GRANULE, GRANULE, &m->arena), 0);
	for (int i = 0; i < 3000; i++) {
		unsigned fill = i / 500 % 2 ? 35 : 60, dice = om_test_random(&seed) % 100;

		if (dice < fill)
			step_take(m, &seed, i / 1000 % 2 ? 200 : 12);
		else if (dice < fill + 4)
			step_resize(m, &seed);
		else
			step_give(m, &seed);
		model_compare(m);
		compare_holes(m, 1 + om_test_random(&seed) % 100);
	}
	om_arena_destroy(m->arena);
	om_free(m);
}

static void test_values(void)
{
	struct om_arena *a;
	uint64_t offset, got;

	CHECK_EQ(om_arena_create(4096, 0, &a), OM_EVALUE);
	CHECK_EQ(om_arena_create(4096, 3, &a), OM_EVALUE);
	CHECK_EQ(om_arena_create(4097, GRANULE, &a), OM_EVALUE);
	CHECK_EQ(om_arena_create(UINT64_C(1) << 63, GRANULE, &a), OM_EVALUE);
	CHECK(!a);
	om_arena_destroy(NULL);

	CHECK_EQ(om_arena_create(0, GRANULE, &a), 0); /* a swap file begins empty */
	CHECK_EQ(om_arena_alloc(a, 1, 0, &offset), -ENOSPC);
	CHECK_EQ(om_arena_alloc_some(a, 1, &offset, &got), -ENOSPC);
	CHECK_EQ(om_arena_largest_free(a), 0);
	CHECK_EQ(om_arena_shrink(a), 0);
	CHECK_EQ(om_arena_grow(a, 8 * GRANULE), 0);
	CHECK_EQ(om_arena_grow(a, 4 * GRANULE), OM_EVALUE);
	CHECK_EQ(om_arena_grow(a, 8 * GRANULE + 1), OM_EVALUE);
	CHECK_EQ(om_arena_alloc(a, 0, 0, &offset), OM_EVALUE);
	CHECK_EQ(om_arena_alloc(a, 1, 3, &offset), OM_EVALUE);
	CHECK_EQ(om_arena_alloc_some(a, 0, &offset, &got), OM_EVALUE);
	CHECK_EQ(om_arena_alloc(a, UINT64_MAX, 0, &offset), -ENOSPC);
	CHECK_EQ(om_arena_alloc(a, 1, UINT64_C(1) << 63, &offset), 0); /* offset 0 always fits */
	CHECK_EQ(offset, 0);
	CHECK_EQ(om_arena_alloc(a, 1, UINT64_C(1) << 63, &offset), -ENOSPC);
	CHECK_EQ(om_arena_alloc(a, 7 * GRANULE, 0, &offset), 0); /* exactly full */
	CHECK_EQ(offset, GRANULE);
	CHECK_EQ(om_arena_alloc_some(a, 1, &offset, &got), -ENOSPC);
	CHECK_EQ(om_arena_free(a, 0), 0);
	CHECK_EQ(om_arena_free(a, 0), OM_EVALUE); /* twice */
	CHECK_EQ(om_arena_free(a, 1 << 20), OM_EVALUE);
	CHECK_EQ(om_arena_free(a, GRANULE), 0);
	CHECK_EQ(om_arena_largest_free(a), 8 * GRANULE);
	CHECK_EQ(om_arena_check(a), 0);
	om_arena_destroy(a);
}

/* The largest first, then what is left. */
static void test_alloc_some(void)
{
	struct om_arena *a;
	uint64_t at[9], got, expected[] = { 5, 3, 1 };

	CHECK_EQ(om_arena_create(12 * GRANULE, GRANULE, &a), 0);
	for (int i = 0; i < 9; i++) {
		static const int sizes[] = { 1, 1, 3, 1, 5, 1 };

		if (i < 6)
			CHECK_EQ(om_arena_alloc(a, sizes[i] * GRANULE, 0, &at[i]), 0);
	}
	for (int i = 0; i < 6; i += 2)
		CHECK_EQ(om_arena_free(a, at[i]), 0); /* holes of 1, 3 and 5 */
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(om_arena_alloc_some(a, 12 * GRANULE, &at[i], &got), 0);
		CHECK_EQ(got, expected[i] * GRANULE);
	}
	CHECK_EQ(om_arena_alloc_some(a, GRANULE, &at[0], &got), -ENOSPC);
	CHECK_EQ(om_arena_check(a), 0);
	om_arena_destroy(a);
}

/* Swap files are larger than memory: 64-bit sizes all the way. */
static void test_huge(void)
{
	const uint64_t size = UINT64_C(1) << 62;
	struct om_arena *a;
	uint64_t offset;

	CHECK_EQ(om_arena_create(OM_GIB, 1, &a), 0);
	CHECK_EQ(om_arena_alloc(a, OM_GIB, 0, &offset), 0);
	CHECK_EQ(om_arena_grow(a, size), 0);
	CHECK_EQ(om_arena_largest_free(a), size - OM_GIB);
	CHECK_EQ(om_arena_alloc(a, size - OM_GIB + 1, 0, &offset), -ENOSPC);
	CHECK_EQ(om_arena_alloc(a, size / 2 + 17, 0, &offset), 0);
	CHECK_EQ(offset, OM_GIB);
	CHECK_EQ(om_arena_alloc(a, 17, size / 2, &offset), -ENOSPC);
	CHECK_EQ(om_arena_alloc(a, 17, size / 4, &offset), 0);
	CHECK_EQ(offset, 3 * (size / 4));
	CHECK_EQ(om_arena_check(a), 0);
	CHECK_EQ(om_arena_free(a, OM_GIB), 0);
	CHECK_EQ(om_arena_free(a, 0), 0);
	CHECK_EQ(om_arena_shrink(a), offset + 17);
	CHECK_EQ(om_arena_check(a), 0);
	om_arena_destroy(a);
}

/* Fails the nth allocation of bookkeeping, for all n: the arena stays as it was. */
static bool fault_run(uint64_t nth)
{
	struct om_arena *a;
	uint64_t offset, size = 0, used = 0;
	unsigned long long seed = 7;
	int code;

	om_fault_arm(OM_FAULT_ALLOC, nth, false);
	code = om_arena_create(64 * GRANULE, GRANULE, &a);
	if (code) {
		CHECK_EQ(code, -ENOMEM);
		CHECK(!a);
		return true;
	}
	size = 64;
	for (int i = 0; i < 200; i++) {
		uint64_t n = 1 + om_test_random(&seed) % 4, align = i % 3 ? 0 : 8 * GRANULE;

		code = i % 5 ? om_arena_alloc(a, n * GRANULE, align, &offset)
		             : om_arena_grow(a, (size + 40) * GRANULE);
		CHECK(!code || code == -ENOMEM || code == -ENOSPC);
		if (!code && i % 5)
			used += n;
		else if (!code)
			size += 40;
		CHECK_EQ(om_arena_check(a), 0);
		CHECK_EQ(om_arena_used(a), used * GRANULE);
		CHECK_EQ(om_arena_size(a), size * GRANULE);
	}
	bool fired = om_fault_fired(OM_FAULT_ALLOC) > 0;

	om_fault_arm(OM_FAULT_ALLOC, 1, true); /* free needs no memory */
	for (uint64_t at = 0; at < size; at++)
		om_arena_free(a, at * GRANULE);
	CHECK_EQ(om_fault_fired(OM_FAULT_ALLOC), 0);
	CHECK_EQ(om_arena_used(a), 0);
	CHECK_EQ(om_arena_largest_free(a), size * GRANULE);
	CHECK_EQ(om_arena_check(a), 0);
	om_fault_reset();
	om_arena_destroy(a);
	return fired;
}

static void test_faults(void)
{
	uint64_t n = 1;

	while (fault_run(n))
		n++;
	om_fault_reset();
	CHECK(n > 8);
	printf("allocation faults: %" PRIu64 "\n", n - 1);
}

/* Sizes just above a power of two are what wastes memory in buddy and rounding allocators. */
static void test_utilisation(void)
{
	const uint64_t size = OM_GIB;

	for (int k = 12; k <= 28; k += 4) {
		uint64_t request = (UINT64_C(1) << k) + 17, count = 0, offset, round;
		unsigned long long seed = 3;
		struct om_arena *a;

		CHECK_EQ(om_arena_create(size, GRANULE, &a), 0);
		while (!om_arena_alloc(a, request, 0, &offset))
			count++;
		round = om_up(request, GRANULE);
		CHECK_EQ(count, size / round);    /* no room for one more */
		for (int i = 0; i < 20000; i++) { /* random replacement leaves it as full */
			uint64_t at = om_test_random(&seed) % count * round;

			CHECK_EQ(om_arena_free(a, at), 0);
			CHECK_EQ(om_arena_alloc(a, request, 0, &offset), 0);
		}
		CHECK_EQ(om_arena_check(a), 0);
		printf("2^%d+17 bytes: %.2f %% of the arena, %.2f %% with rounding to granules\n",
		       k, 100.0 * (double)(count * request) / (double)size,
		       100.0 * (double)om_arena_used(a) / (double)size);
		om_arena_destroy(a);
	}
}

int main(void)
{
	test_values();
	test_alloc_some();
	test_huge();
	for (unsigned long long seed = 1; seed <= 8; seed++)
		test_model(seed * 7919);
	for (unsigned long long seed = 1; seed <= 4; seed++)
		test_by_handle(seed * 104729);
	test_faults();
	test_utilisation();
	return 0;
}
