/* Tests of core/om_pool.c: the limit, the order of reuse, faults, and segments that outlive it. */
#include "core/om_guard.h"
#include "core/om_pool.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "base/om_base.h"
#include "om_test.h"
#include "plat/om_dev.h"

#define MIB OM_MIB

static bool unmapped(void *p)
{
	unsigned char page;

	return mincore(p, OM_PAGE, &page) == -1 && errno == ENOMEM;
}

static struct om_extent take(struct om_pool *p, uint64_t bytes)
{
	struct om_extent e;

	CHECK(om_pool_fits(p, bytes));
	CHECK_EQ(om_pool_alloc(p, bytes, 0, &e), 0);
	CHECK(e.segment && e.ptr && e.bytes >= bytes && e.bytes % OM_PAGE == 0);
	CHECK_EQ((uintptr_t)e.ptr % OM_PAGE, 0);
	CHECK_EQ(om_pool_check(p), 0);
	return e;
}

static void give(struct om_pool *p, struct om_extent *e)
{
	om_pool_free(p, e);
	CHECK(!e->segment);
	CHECK_EQ(om_pool_check(p), 0);
}

static void refuse(struct om_pool *p, uint64_t bytes)
{
	struct om_extent e = { .bytes = 1 };
	uint64_t live = p->mapped_bytes - p->cached_bytes, cached = p->cached_bytes;

	CHECK(!om_pool_fits(p, bytes));
	CHECK_EQ(om_pool_alloc(p, bytes, 0, &e), OM_ELIMIT);
	CHECK(!e.segment);
	CHECK_EQ(om_err_last()->limit, p->limit_bytes);
	CHECK_EQ(om_err_last()->used, live);
	CHECK(om_err_last()->need >= bytes);
	CHECK_EQ(strcmp(om_err_last()->which, "host"), 0);
	CHECK_EQ(p->cached_bytes, cached); /* a refusal throws nothing away */
	CHECK_EQ(om_pool_check(p), 0);
}

static void test_limit(void)
{
	struct om_pool p;
	struct om_extent a, b, c, e;

	om_pool_init(&p, 10 * MIB);
	CHECK_EQ(om_pool_alloc(&p, 0, 0, &e), OM_EVALUE);
	refuse(&p, 10 * MIB + 1);
	refuse(&p, UINT64_MAX);
	refuse(&p, UINT64_MAX - 4096);
	a = take(&p, 10 * MIB - 5000); /* rounded up to pages */
	CHECK_EQ(a.bytes, 10 * MIB - 4096);
	refuse(&p, 4097);
	b = take(&p, 4096); /* no room for a shared segment: one of its own */
	CHECK(b.segment != a.segment && !b.segment->arena);
	CHECK_EQ(p.mapped_bytes, 10 * MIB);
	CHECK_EQ(p.used_bytes, 10 * MIB);
	refuse(&p, 1);
	give(&p, &a);
	CHECK_EQ(p.mapped_bytes, 10 * MIB); /* cached bytes are still mapped */
	CHECK_EQ(p.cached_bytes, 10 * MIB - 4096);
	CHECK_EQ(p.used_bytes, 4096);
	refuse(&p, 10 * MIB);
	c = take(&p, 6 * MIB);
	CHECK_EQ(p.mapped_bytes - p.cached_bytes, 6 * MIB + 4096);
	om_pool_set_limit(&p, 5 * MIB); /* lowered below what is live: the cached go */
	CHECK_EQ(p.mapped_bytes, 6 * MIB + 4096);
	refuse(&p, 1);
	give(&p, &c); /* above the limit nothing is cached */
	CHECK_EQ(p.mapped_bytes, 4096);
	c = take(&p, 4 * MIB);
	om_pool_set_limit(&p, 20 * MIB);
	give(&p, &c);
	CHECK_EQ(p.cached_bytes, 4 * MIB);
	c = take(&p, 4 * MIB);
	om_pool_free(&p, &c);
	om_pool_free(&p, &c); /* nothing is held: harmless */
	give(&p, &b);
	om_pool_fini(&p);
	CHECK_EQ(p.mapped_bytes, 0);
}

/* Small requests share; an empty shared segment is cached and serves small ones again. */
static void test_shared(void)
{
	struct om_pool p;
	struct om_extent e[9];
	void *base;

	om_pool_init(&p, 64 * MIB);
	for (int i = 0; i < 9; i++)
		e[i] = take(&p, OM_POOL_SMALL);
	for (int i = 0; i < 8; i++)
		CHECK(e[i].segment == e[0].segment);
	CHECK(e[8].segment != e[0].segment); /* eight fill 2 MiB */
	CHECK_EQ(p.mapped_bytes, 2 * OM_POOL_SHARED);
	for (int i = 0; i < 8; i++)
		memset(e[i].ptr, i, e[i].bytes);
	for (int i = 0; i < 8; i++)
		for (uint64_t k = 0; k < e[i].bytes; k += 511)
			CHECK_EQ(((char *)e[i].ptr)[k], i);
	give(&p, &e[3]);
	e[3] = take(&p, 4096); /* the hole of a shared segment comes first */
	CHECK(e[3].segment == e[0].segment);
	base = e[0].segment->base;
	e[0].segment->populated = MIB;
	for (int i = 0; i < 9; i++)
		give(&p, &e[i]);
	CHECK_EQ(p.cached_bytes, 2 * OM_POOL_SHARED);
	e[0] = take(&p, 100);
	e[1] = take(&p, 100);
	CHECK(e[0].segment == e[1].segment);
	CHECK_EQ(p.mapped_bytes, 2 * OM_POOL_SHARED); /* from the cache, nothing mapped */
	CHECK_EQ(p.cached_bytes, OM_POOL_SHARED);
	e[2] = take(&p, OM_POOL_SHARED); /* a cached shared one serves a large request */
	CHECK(!e[2].segment->arena);
	CHECK_EQ(p.mapped_bytes, 2 * OM_POOL_SHARED);
	give(&p, &e[2]);
	e[2] = take(&p, 7 * OM_POOL_SMALL); /* 1.75 MiB: within 1.25x */
	CHECK_EQ(e[2].bytes, OM_POOL_SHARED);
	give(&p, &e[0]);
	give(&p, &e[1]);
	give(&p, &e[2]);
	for (int i = 0; i < 9; i++) /* and back: a cached one without an arena gets one */
		e[i] = take(&p, OM_POOL_SMALL);
	CHECK_EQ(p.mapped_bytes, 2 * OM_POOL_SHARED);
	CHECK(e[0].segment->base == base || e[8].segment->base == base);
	CHECK(e[0].segment->populated == MIB || e[8].segment->populated == MIB);
	om_pool_fini(&p); /* live, but no one else holds them: gone (the sanitizer looks) */
}

static void stamp(const struct om_extent *e, uint32_t first)
{
	for (uint64_t i = 0; i < e->bytes; i += OM_PAGE)
		*(uint32_t *)((char *)e->ptr + i) = first++;
}

/* The stamp of the page at an offset. */
static uint32_t stamp_at(const struct om_extent *e, uint64_t offset)
{
	return *(uint32_t *)((char *)e->ptr + offset);
}

/* The order of reuse that the header promises for large requests, and the populated mark. */
static void test_reuse(void)
{
	struct om_pool p;
	struct om_extent a, b, c, d;
	void *base_a, *base_b;

	om_pool_init(&p, 40 * MIB);
	a = take(&p, 12 * MIB);
	b = take(&p, 11 * MIB);
	stamp(&a, 1);
	base_a = a.ptr;
	base_b = b.ptr;
	a.segment->populated = 12 * MIB;
	b.segment->populated = 5 * MIB;
	give(&p, &a);
	give(&p, &b);

	/* Best fit of at most 1.25x, whole, though a new mapping would fit. */
	c = take(&p, 10 * MIB);
	CHECK(c.ptr == base_b);
	CHECK_EQ(c.bytes, 11 * MIB);
	CHECK_EQ(c.segment->populated, 5 * MIB);
	/* 12 MiB is above 1.25 x 9 MiB: its pages move, 8 MiB from its front and one from its end. */
	CHECK_EQ(om_pool_growth(&p, 9 * MIB), 0);
	d = take(&p, 9 * MIB);
	CHECK_EQ(d.bytes, 9 * MIB);
	CHECK_EQ(d.segment->populated, 9 * MIB);
	CHECK_EQ(d.segment->fresh_bytes, 0);
	CHECK_EQ(stamp_at(&d, 0), 1);
	CHECK_EQ(stamp_at(&d, 8 * MIB - OM_PAGE), 8 * MIB / OM_PAGE);
	CHECK_EQ(stamp_at(&d, 8 * MIB), 11 * MIB / OM_PAGE + 1);
	CHECK_EQ(stamp_at(&d, 9 * MIB - OM_PAGE), 12 * MIB / OM_PAGE);
	CHECK(unmapped(base_a) && unmapped((char *)base_a + 11 * MIB));
	CHECK(!unmapped((char *)base_a + 8 * MIB));
	CHECK_EQ(p.mapped_bytes, 23 * MIB);
	CHECK_EQ(p.cached_bytes, 3 * MIB);
	/* What is cached does not suffice: new pages, and none are cached beside them. */
	CHECK_EQ(om_pool_growth(&p, 6 * MIB), 3 * MIB);
	a = take(&p, 6 * MIB);
	CHECK_EQ(a.bytes, 6 * MIB);
	CHECK_EQ(a.segment->populated, 2 * MIB);
	CHECK_EQ(a.segment->fresh_bytes, 4 * MIB);
	CHECK_EQ(stamp_at(&a, 0), 8 * MIB / OM_PAGE + 1);
	CHECK_EQ(p.mapped_bytes, 26 * MIB);
	CHECK_EQ(p.cached_bytes, 0);
	/* The ends go first, of which nothing can be built, then what was idle longest. */
	give(&p, &d); /* 9: four pieces of 2 MiB, and one */
	give(&p, &c); /* 11 */
	b = take(&p, 14 * MIB + MIB / 2);
	CHECK_EQ(b.segment->populated, 12 * MIB); /* all of the 9, and 5 of the 11 */
	CHECK_EQ(b.segment->fresh_bytes, 0);      /* of an end there is half a MiB */
	CHECK_EQ(p.mapped_bytes, 26 * MIB);
	CHECK_EQ(p.cached_bytes, 5 * MIB + MIB / 2);
	c = take(&p, 4096); /* a shared segment is a piece */
	CHECK_EQ(c.segment->populated, 0);
	CHECK_EQ(c.segment->fresh_bytes, 0);
	CHECK_EQ(p.mapped_bytes, 26 * MIB);
	CHECK_EQ(p.cached_bytes, 3 * MIB + MIB / 2);
	give(&p, &a);
	give(&p, &b);
	give(&p, &c);
	om_pool_fini(&p);
	CHECK_EQ(om_guard_held(), 0);
}

/* Segments that are built of others again and again, of all sizes: every page is where it should be, once, and none is
 * cleared that need not be. */
static void test_build(unsigned long long seed)
{
	enum { WAYS = 6 };
	struct om_extent e[WAYS];
	struct om_pool p;
	uint32_t next = 1;

	memset(e, 0, sizeof(e));
	om_pool_init(&p, 64 * MIB);
	for (int i = 0; i < 400; i++) {
		unsigned k = om_test_random(&seed) % WAYS;
		uint64_t bytes = OM_POOL_SMALL + (1 + om_test_random(&seed) % 3000) * OM_PAGE;
		uint64_t moved = 0, mapped = p.mapped_bytes + om_pool_growth(&p, bytes);

		if (e[k].segment) {
			CHECK_EQ(stamp_at(&e[k], 0), stamp_at(&e[k], e[k].bytes - OM_PAGE) + 1 -
			                                     (uint32_t)(e[k].bytes / OM_PAGE));
			give(&p, &e[k]);
			continue;
		}
		e[k] = take(&p, bytes);
		CHECK_EQ(p.mapped_bytes, mapped);
		for (uint64_t at = 0; at < e[k].bytes; at += OM_PAGE)
			moved += stamp_at(&e[k], at) != 0;
		CHECK_EQ(moved * OM_PAGE, e[k].bytes - e[k].segment->fresh_bytes);
		CHECK_EQ(om_guard_held(), (int64_t)p.mapped_bytes);
		stamp(&e[k], next);
		om_pool_filled(&e[k]);
		next += (uint32_t)(e[k].bytes / OM_PAGE);
	}
	for (int k = 0; k < WAYS; k++)
		om_pool_free(&p, &e[k]);
	om_pool_fini(&p);
	CHECK_EQ(om_guard_held(), 0);
}

static void test_trim(void)
{
	struct om_pool p;
	struct om_extent a, b;
	uint64_t middle;

	om_pool_init(&p, 64 * MIB);
	a = take(&p, 4 * MIB);
	b = take(&p, 8 * MIB);
	give(&p, &a);
	middle = om_now();
	while (om_now() <= middle)
		;
	give(&p, &b);
	CHECK_EQ(om_pool_trim(&p, 0, 0), 0);
	CHECK_EQ(om_pool_trim(&p, 0, middle + 1), 4 * MIB);
	CHECK_EQ(om_pool_trim(&p, 0, middle + 1), 0);
	CHECK_EQ(om_pool_check(&p), 0);
	CHECK_EQ(om_pool_trim(&p, 0, UINT64_MAX), 8 * MIB);
	CHECK_EQ(p.mapped_bytes, 0);
	CHECK_EQ(om_pool_check(&p), 0);
	om_pool_fini(&p);
}

static void *unref_later(void *arg)
{
	struct om_segment *s = arg;
	char *base = s->base, *last = base + s->bytes - OM_PAGE;

	/* The first use of the heap maps memory for this thread: not into the hole that we look at. */
	om_free(om_alloc(1, 1));
	*last = 1; /* still mapped */
	om_segment_unref(s);
	CHECK(unmapped(base) && unmapped(last));
	return NULL;
}

static void unref_on_a_thread(struct om_segment *s)
{
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, unref_later, s), 0);
	CHECK_EQ(pthread_join(thread, NULL), 0);
}

/* An exported view may outlive the pool: the last unref unmaps, on any thread. */
static void test_outlive(void)
{
	struct om_pool p;
	struct om_extent big, small, other;
	struct om_segment *s;

	om_pool_init(&p, 64 * MIB);
	big = take(&p, 4 * MIB);
	small = take(&p, 4096);
	om_segment_ref(big.segment);
	om_segment_ref(small.segment);
	om_pool_fini(&p);
	CHECK_EQ(p.mapped_bytes, 0);
	unref_on_a_thread(big.segment);
	unref_on_a_thread(small.segment);

	/* Freed while a consumer still sees it: never handed out again. */
	om_pool_init(&p, 64 * MIB);
	big = take(&p, 4 * MIB);
	s = big.segment;
	om_segment_ref(s);
	give(&p, &big);
	CHECK_EQ(p.cached_bytes, 0);
	other = take(&p, 4 * MIB);
	CHECK(other.segment != s && other.ptr != s->base);
	om_segment_unref(s);
	om_pool_fini(&p);
}

/* Random requests; afterwards the sums, the limit and every byte must be right. */
static void test_random(unsigned long long seed)
{
	enum { MAX_EXTENTS = 64 };
	struct om_extent e[MAX_EXTENTS];
	struct om_pool p;

	memset(e, 0, sizeof(e));
	om_pool_init(&p, 48 * MIB);
	for (int i = 0; i < 3000; i++) {
		unsigned k = om_test_random(&seed) % MAX_EXTENTS,
			 dice = om_test_random(&seed) % 100;
		uint64_t bytes = 1 + om_test_random(&seed) % (dice < 60 ? OM_POOL_SMALL : 6 * MIB);

		if (dice == 99) {
			om_pool_set_limit(&p, (16 + om_test_random(&seed) % 48) * MIB);
		} else if (dice == 98) {
			om_pool_trim(&p, 0, UINT64_MAX);
			CHECK_EQ(p.cached_bytes, 0);
		} else if (e[k].segment) {
			CHECK_EQ(*(uint32_t *)e[k].ptr, k + 1);
			CHECK_EQ(*(uint32_t *)((char *)e[k].ptr + e[k].bytes - 4), k + 1);
			om_pool_free(&p, &e[k]);
		} else {
			bool fits = om_pool_fits(&p, bytes);
			int code = om_pool_alloc(&p, bytes, 0, &e[k]);

			CHECK_EQ(code, fits ? 0 : OM_ELIMIT);
			if (!code) {
				CHECK(e[k].bytes >= bytes);
				CHECK(bytes <= OM_POOL_SMALL ||
				      e[k].bytes <= om_up(bytes, OM_PAGE) * 5 / 4);
				*(uint32_t *)e[k].ptr = k + 1;
				*(uint32_t *)((char *)e[k].ptr + e[k].bytes - 4) = k + 1;
				CHECK(p.mapped_bytes <= p.limit_bytes || e[k].segment->arena);
			}
		}
		CHECK_EQ(om_pool_check(&p), 0);
	}
	for (int k = 0; k < MAX_EXTENTS; k++)
		om_pool_free(&p, &e[k]);
	CHECK_EQ(p.used_bytes, 0);
	CHECK_EQ(p.mapped_bytes, p.cached_bytes);
	CHECK_EQ(om_pool_check(&p), 0);
	om_pool_fini(&p);
}

/* One scenario with the nth pass of `point` failing; true when it fired. */
static bool fault_run(enum om_fault point, uint64_t nth, bool sticky)
{
	static const uint64_t sizes[] = { 4096,    3 * MIB, 5 * MIB, 256 << 10,
		                          8 * MIB, 100,     2 * MIB, 9 * MIB };
	struct om_extent e[8];
	struct om_pool p;
	int code;

	om_pool_init(&p, 24 * MIB);
	memset(e, 0, sizeof(e));
	om_fault_arm(point, nth, sticky);
	for (int i = 0; i < 64; i++) {
		struct om_extent *x = &e[i * 5 % 8];
		uint64_t used = p.used_bytes, live = p.mapped_bytes - p.cached_bytes;

		if (x->segment) {
			om_pool_free(&p, x);
		} else {
			code = om_pool_alloc(&p, sizes[(i + i / 8) % 8], 0, x);
			CHECK(!code || code == -ENOMEM || code == OM_ELIMIT);
			CHECK(!code == (x->segment != NULL));
			if (code) {
				CHECK_EQ(p.used_bytes, used);
				CHECK_EQ(p.mapped_bytes - p.cached_bytes, live);
			}
		}
		CHECK_EQ(om_pool_check(&p), 0);
	}
	bool fired = om_fault_fired(point) > 0;

	om_fault_reset();
	for (int i = 0; i < 8; i++)
		om_pool_free(&p, &e[i]);
	CHECK_EQ(om_pool_check(&p), 0);
	CHECK_EQ(p.used_bytes, 0);
	om_pool_fini(&p);
	return fired;
}

static void test_faults(void)
{
	static const enum om_fault points[] = { OM_FAULT_ALLOC, OM_FAULT_MAP };

	for (int i = 0; i < 2; i++) {
		for (int sticky = 0; sticky < 2; sticky++) {
			uint64_t n = 1;

			while (fault_run(points[i], n, sticky))
				n++;
			CHECK(n > 4);
			printf("fault point %d%s: %" PRIu64 " runs\n", points[i],
			       sticky ? ", sticky" : "", n - 1);
		}
	}
}

/* When the system refuses a mapping, what is cached helps; then it is -ENOMEM. */
static void test_system_refuses(void)
{
	struct om_pool p;
	struct om_extent a, b, e;

	om_pool_init(&p, 64 * MIB);
	a = take(&p, 4 * MIB);
	b = take(&p, 10 * MIB);
	om_fault_arm(OM_FAULT_MAP, 1, true);
	CHECK_EQ(om_pool_alloc(&p, 4 * MIB, 0, &e), -ENOMEM);
	CHECK(!e.segment);
	give(&p, &b);
	CHECK_EQ(om_pool_alloc(&p, 5 * MIB, 0, &e), 0); /* a cached one, cut */
	CHECK_EQ(e.bytes, 5 * MIB);
	give(&p, &e);
	CHECK_EQ(om_pool_alloc(&p, 6 * MIB, 0, &e), -ENOMEM);
	CHECK_EQ(p.cached_bytes, 0); /* all was given back before giving up */
	CHECK_EQ(om_pool_check(&p), 0);
	om_fault_reset();
	b = take(&p, 4 * MIB);
	give(&p, &b);
	om_fault_arm(OM_FAULT_MAP, 1, false);
	e = take(&p, 8 * MIB); /* refused once; after unmapping the cached one it works */
	CHECK_EQ(om_fault_fired(OM_FAULT_MAP), 1);
	CHECK_EQ(p.cached_bytes, 0);
	om_fault_reset();
	give(&p, &e);
	give(&p, &a);
	om_pool_fini(&p);
}

/* om_pool_check is worth its name only if it sees what is wrong. */
static void test_check_sees(void)
{
	struct om_pool p;
	struct om_extent a, b;
	uint64_t *sums[] = { &p.used_bytes, &p.mapped_bytes, &p.cached_bytes };

	om_pool_init(&p, 64 * MIB);
	a = take(&p, 4096);
	b = take(&p, 4 * MIB);
	for (int i = 0; i < 3; i++) {
		*sums[i] += 4096;
		CHECK_EQ(om_pool_check(&p), OM_ECORRUPT);
		*sums[i] -= 4096;
	}
	a.segment->used += 4096;
	CHECK_EQ(om_pool_check(&p), OM_ECORRUPT);
	a.segment->used -= 4096;
	b.segment->populated = 5 * MIB;
	CHECK_EQ(om_pool_check(&p), OM_ECORRUPT);
	b.segment->populated = 4 * MIB;
	give(&p, &a);
	give(&p, &b);
	om_pool_fini(&p);
}

int main(void)
{
	test_limit();
	test_shared();
	test_reuse();
	for (unsigned long long seed = 1; seed <= 4; seed++)
		test_build(seed * 7919);
	test_trim();
	test_outlive();
	for (unsigned long long seed = 1; seed <= 6; seed++)
		test_random(seed * 104729);
	test_faults();
	test_system_refuses();
	test_check_sees();
	return 0;
}
