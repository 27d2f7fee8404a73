/* The disk tier's records: runs from any free room, all or nothing, how far to grow. */
#include <errno.h>

#include "base/om_base.h"
#include "core/om_disk.h"
#include "om_test.h"

#define PAGES(n) ((uint64_t)(n)*OM_PAGE)

static void check(const struct om_disk *d)
{
	CHECK_EQ(om_disk_check(d), 0);
}

static void runs_fill_the_holes(void)
{
	struct om_disk_copy c[8], spread;
	struct om_disk d;

	CHECK_EQ(om_disk_init(&d, NULL, PAGES(64) + 100), 0);
	CHECK_EQ(d.limit_bytes, PAGES(64));
	CHECK_EQ(om_disk_alloc(&d, PAGES(1), &c[0]), -ENOSPC); /* nothing is grown yet */
	CHECK_EQ(om_disk_grown(&d, PAGES(64)), 0);
	CHECK_EQ(om_disk_grown(&d, PAGES(32)), 0); /* never shrinks */
	for (int i = 0; i < 8; i++)
		CHECK_EQ(om_disk_alloc(&d, PAGES(8), &c[i]), 0);
	CHECK_EQ(om_disk_alloc(&d, PAGES(1), &spread), -ENOSPC);
	check(&d);
	for (int i = 0; i < 8; i += 2)
		om_disk_free(&d, &c[i]);
	CHECK(c[0].count == 0 && c[0].runs == NULL);
	CHECK_EQ(d.used_bytes, PAGES(32));
	CHECK_EQ(om_disk_alloc(&d, PAGES(33), &spread), -ENOSPC);
	CHECK_EQ(om_disk_alloc(&d, PAGES(32), &spread), 0);
	CHECK_EQ(spread.count, 4);
	CHECK_EQ(d.used_bytes, PAGES(64));
	CHECK_EQ(d.peak_bytes, PAGES(64));
	check(&d);
	om_disk_free(&d, &spread);
	om_disk_free(&d, &spread); /* harmless */
	for (int i = 1; i < 8; i += 2)
		om_disk_free(&d, &c[i]);
	CHECK_EQ(d.used_bytes, 0);
	check(&d);
	om_disk_fini(&d);
}

static void all_or_nothing(void)
{
	struct om_disk_copy a, b, c;
	struct om_disk d;
	uint64_t nth;
	int code = -1;

	CHECK_EQ(om_disk_init(&d, NULL, PAGES(24)), 0);
	CHECK_EQ(om_disk_grown(&d, PAGES(24)), 0);
	CHECK_EQ(om_disk_alloc(&d, PAGES(8), &a), 0);
	CHECK_EQ(om_disk_alloc(&d, PAGES(8), &b), 0);
	om_disk_free(&d, &a); /* two holes: two runs */
	for (nth = 1; code; nth++) {
		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		code = om_disk_alloc(&d, PAGES(16), &c);
		CHECK(!code || code == -ENOMEM);
		om_fault_reset();
		CHECK_EQ(d.used_bytes, code ? PAGES(8) : PAGES(24));
		check(&d);
	}
	CHECK(nth > 3);
	om_disk_free(&d, &b);
	om_disk_free(&d, &c);
	om_disk_fini(&d);
}

static void how_far_to_grow(void)
{
	struct om_disk d;
	struct om_disk_copy c;

	CHECK_EQ(om_disk_init(&d, NULL, 200 * OM_MIB), 0);
	CHECK_EQ(om_disk_target(&d, OM_PAGE), 64 * OM_MIB); /* in large steps */
	CHECK_EQ(om_disk_target(&d, 100 * OM_MIB), 100 * OM_MIB);
	CHECK_EQ(om_disk_target(&d, 200 * OM_MIB), 200 * OM_MIB);
	CHECK_EQ(om_disk_target(&d, 200 * OM_MIB + OM_PAGE), 0);
	CHECK_EQ(om_disk_grown(&d, 192 * OM_MIB), 0);
	CHECK_EQ(om_disk_alloc(&d, 150 * OM_MIB, &c), 0);
	CHECK_EQ(om_disk_target(&d, 50 * OM_MIB), 200 * OM_MIB); /* up to the limit */
	CHECK_EQ(om_disk_target(&d, 51 * OM_MIB), 0);
	CHECK_EQ(om_disk_capacity(&d), 200 * OM_MIB); /* no file yet: the limit */
	om_disk_free(&d, &c);
	om_disk_fini(&d);
}

/* What is free is kept from others while holes are punched, and comes back as holes. */
static void free_runs_are_taken(void)
{
	struct om_disk d;
	struct om_disk_copy a, b, runs;

	CHECK_EQ(om_disk_init(&d, NULL, PAGES(64)), 0);
	CHECK_EQ(om_disk_grown(&d, PAGES(64)), 0);
	CHECK_EQ(om_disk_alloc(&d, PAGES(16), &a), 0);
	CHECK_EQ(om_disk_alloc(&d, PAGES(16), &b), 0);
	om_disk_free(&d, &a);
	CHECK_EQ(om_disk_take_free(&d, &runs), 0);
	CHECK_EQ(om_disk_copy_bytes(&runs), PAGES(48));
	CHECK(d.taken == PAGES(48) && d.used_bytes == PAGES(16) && d.peak_bytes == PAGES(32));
	check(&d);
	CHECK_EQ(om_disk_alloc(&d, OM_PAGE, &a), -ENOSPC);
	om_disk_give_back(&d, &runs, true);
	CHECK(!d.taken && d.holes == PAGES(48) && d.used_bytes == PAGES(16));
	CHECK_EQ(om_disk_capacity(&d), PAGES(64));
	CHECK_EQ(om_disk_alloc(&d, PAGES(48), &a), 0);
	check(&d);
	om_disk_free(&d, &a);
	om_disk_free(&d, &b);
	om_disk_fini(&d);
}

int main(void)
{
	free_runs_are_taken();
	runs_fill_the_holes();
	all_or_nothing();
	how_far_to_grow();
	return 0;
}
