/* Making room: exact limits, adopted memory, a disk that cannot be written, what keeps it from moving. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define SOON om_deadline(20 * OM_NSEC)

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static uint8_t data[1 << 20];
static int backend;

static struct om_store *open_store(uint64_t host, uint64_t disk)
{
	struct om_store_config c = { .host_limit_bytes = host,
		                     .disk_limit_bytes = disk,
		                     .directory = dir,
		                     .backend = backend };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static void add(struct om_store *s, const char *name, const char *group, uint64_t nbytes)
{
	CHECK_EQ(om_store_add(s, name, group, data, nbytes, NULL, SOON), 0);
	CHECK_EQ(om_store_check(s), 0);
}

static void nothing(void *context)
{
	(void)context;
}

/* A hole in a shared segment is no room for memory that somebody else has mapped. */
static void adopted_memory_counts(void)
{
	static uint8_t mine[100000];
	struct om_store *s = open_store(2 << 20, 32 << 20);
	struct om_lease *l;

	add(s, "small", NULL, 4096); /* maps a segment of 2 MiB */
	CHECK_EQ(om_store_take(s, "mine", NULL, mine, sizeof(mine), NULL, nothing, NULL, SOON), 0);
	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_store_lease(s, "small", false, SOON, &l), 0);
	CHECK(memcmp(om_lease_data(l), data, 4096) == 0);
	om_lease_unref(l);
	om_store_unref(s);
	om_store_collect(NULL);
}

/* A cached segment that is larger than the block must not carry its group over the limit. */
static void groups_stay_exact(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);

	add(s, "large", NULL, 900000);
	CHECK_EQ(om_store_remove(s, "large"), 0); /* its segment is kept for the next */
	CHECK_EQ(om_store_group(s, "tight", om_up(800000, OM_PAGE)), 0);
	add(s, "a", "tight", 800000);
	add(s, "b", "tight", 800000);
	om_store_unref(s);
}

/* Who waits for room hears why there is none, long before the deadline. */
/* Nor may what fits then keep others of the group out, that were planned beside it. */
static void limits_hold_what_they_are_for(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);
	struct om_lease *l;

	CHECK_EQ(om_store_group(s, "g", 1 << 20), 0);
	add(s, "x", NULL, 600 << 10);
	CHECK_EQ(om_store_remove(s, "x"), 0);
	add(s, "a", "g", 500 << 10);
	CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &l), 0);
	CHECK_EQ(om_store_add(s, "b", "g", data, 500 << 10, NULL, om_now()), 0);
	om_lease_unref(l);
	om_store_unref(s);
}

static void writes_that_fail_are_told(void)
{
	struct om_store *s = open_store(2 << 20, 32 << 20);
	struct om_lease *l;
	int code;

	add(s, "a", NULL, 900000);
	add(s, "b", NULL, 900000);
	om_fault_arm(OM_FAULT_WRITE, 1, true);
	code = om_store_add(s, "c", NULL, data, 900000, NULL, UINT64_MAX);
	CHECK_EQ(code, -EIO);
	CHECK(strstr(om_err_last()->text, "'a'") || strstr(om_err_last()->text, "'b'"));
	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_store_evict(s, "a", SOON), -EIO);
	om_fault_reset();
	CHECK(!om_store_contains(s, "c"));
	add(s, "c", NULL, 900000);
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(om_store_lease(s, (const char *[]){ "a", "b", "c" }[i], false, SOON, &l),
		         0);
		CHECK(memcmp(om_lease_data(l), data, 900000) == 0);
		om_lease_unref(l);
	}
	om_store_unref(s);
}

static void another_victim_is_tried(void)
{
	struct om_store *s = open_store(2 << 20, 32 << 20);

	add(s, "a", NULL, 900000);
	add(s, "b", NULL, 900000);
	om_fault_arm(OM_FAULT_WRITE, 1, false);
	add(s, "c", NULL, 900000);
	CHECK_EQ(om_fault_fired(OM_FAULT_WRITE), 1);
	om_fault_reset();
	om_store_unref(s);
}

static void prefetched(struct om_store *s, const char *name)
{
	struct om_ticket *t;

	CHECK_EQ(om_store_prefetch(s, &name, 1, &t), 0);
	CHECK_EQ(om_ticket_wait(t, SOON), 0);
	om_ticket_free(t);
}

/* What was fetched ahead counts once: as used, or as wasted. */
static void speculation_is_counted(void)
{
	struct om_store *s = open_store(2 << 20, 32 << 20);
	struct om_stats stats;
	struct om_lease *l;

	add(s, "a", NULL, 900000);
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(om_store_evict(s, "a", SOON), 1);
		prefetched(s, "a");
		for (int k = 0; k < i; k++) {
			CHECK_EQ(om_store_lease(s, "a", false, SOON, &l), 0);
			om_lease_unref(l);
		}
	}
	CHECK_EQ(om_store_evict(s, "a", SOON), 1);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK_EQ(stats.prefetches, 3);
	CHECK_EQ(stats.prefetch_hits, 2);
	CHECK_EQ(stats.prefetch_waste, 1);
	om_store_unref(s);
}

/* A lease that is waited for in slices is one hit or one miss for each block, as if at one go. */
static void slices_count_once(void)
{
	const char *names[] = { "a", "b" };
	struct om_stream_unit unit = { "u", names, (const uint8_t[]){ 0, 0 }, 2 };
	struct om_store *s = open_store(4 << 20, 32 << 20);
	struct om_stats stats;
	struct om_stream *st;
	struct om_lease *l;
	bool bind;
	int code;

	add(s, "a", NULL, 900000);
	add(s, "b", NULL, 900000);
	CHECK_EQ(om_store_evict(s, "a", SOON), 1);
	while ((code = om_store_lease(s, "a", false, om_now(), &l)) == OM_EBUSY)
		usleep(50);
	CHECK_EQ(code, 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK_EQ(stats.misses, 1);
	CHECK_EQ(stats.hits, 0);
	CHECK_EQ(om_stream_create(s, NULL, &unit, 1, &st), 0);
	CHECK_EQ(om_store_evict(s, "a", SOON), 1); /* one block is there, the other is not */
	while ((code = om_stream_enter(st, 0, om_now(), &bind)) == OM_EBUSY)
		usleep(50);
	CHECK_EQ(code, 0);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK_EQ(stats.misses, 2);
	CHECK_EQ(stats.hits, 1);
	om_stream_bound(st, 0, true);
	CHECK_EQ(om_store_lease(s, "b", false, SOON, &l), 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK_EQ(stats.hits, 2);
	for (int i = 0; i < 5; i++)
		CHECK_EQ(om_store_lease(s, "b", true, om_now(), &l), OM_EBUSY);
	om_stream_free(st);
	CHECK_EQ(om_store_lease(s, "b", true, SOON, &l), 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK_EQ(stats.hits, 3);
	CHECK_EQ(om_store_check(s), 0);
	om_store_unref(s);
}

static void leased_blocks_are_named(void)
{
	struct om_store *s = open_store(2 << 20, 32 << 20);
	struct om_lease *a, *b;

	add(s, "a", NULL, 900000);
	add(s, "b", NULL, 900000);
	CHECK_EQ(om_store_lease(s, "a", false, SOON, &a), 0);
	CHECK_EQ(om_store_lease(s, "b", false, SOON, &b), 0);
	CHECK_EQ(om_store_add(s, "c", NULL, data, 900000, NULL, om_deadline(OM_NSEC / 100)),
	         OM_EBUSY);
	CHECK(!strcmp(om_err_last()->holders, "a (1 leases, 0 views)\nb (1 leases, 0 views)"));
	CHECK(strstr(om_err_last()->text, "the store uses 1802240 of 2097152 bytes"));
	CHECK(!strstr(om_err_last()->text, "group"));
	CHECK_EQ(om_store_evict(s, "a", SOON), 0);
	om_lease_unref(a);
	add(s, "c", NULL, 900000);
	om_lease_unref(b);
	CHECK_EQ(om_store_add(s, "d", NULL, data, 3 << 20, NULL, SOON), OM_ELIMIT);
	CHECK(!strcmp(om_err_last()->which, "host"));
	om_store_unref(s);
}

/* The limit that binds is the one that is printed. */
static void the_tight_limit_is_named(void)
{
	static uint8_t mine[(1 << 20) + OM_PAGE];
	struct om_store *s = open_store(2 << 20, 32 << 20);
	struct om_lease *a, *b;

	CHECK_EQ(om_store_group(s, "g", 8192), 0);
	add(s, "a", "g", 5000);
	CHECK_EQ(om_store_lease(s, "a", false, SOON, &a), 0);
	CHECK_EQ(om_store_add(s, "b", "g", data, 5000, NULL, om_deadline(OM_NSEC / 100)), OM_EBUSY);
	CHECK(strstr(om_err_last()->text, "group 'g' uses 8192 of 8192 bytes"));
	om_lease_unref(a);
	CHECK_EQ(om_store_remove(s, "a"), 0);
	CHECK_EQ(om_store_take(s, "m", NULL, mine, sizeof(mine), NULL, nothing, NULL, SOON), 0);
	CHECK_EQ(om_store_lease(s, "m", false, SOON, &b), 0);
	CHECK_EQ(om_store_add(s, "b", NULL, data, 1 << 20, NULL, om_deadline(OM_NSEC / 100)),
	         OM_EBUSY);
	CHECK(strstr(om_err_last()->text, "the store uses 1052672 of 2097152 bytes"));
	om_lease_unref(b);
	om_store_unref(s);
	om_store_collect(NULL);
}

static uint64_t host_used(struct om_store *s)
{
	struct om_stats stats;

	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	return stats.host.used_bytes;
}

/* Both in HOST and on DISK. */
static void add_clean(struct om_store *s, const char *name, const char *group, uint64_t nbytes)
{
	struct om_lease *l;

	add(s, name, group, nbytes);
	CHECK_EQ(om_store_evict(s, name, SOON), 1);
	CHECK_EQ(om_store_lease(s, name, false, SOON, &l), 0);
	om_lease_unref(l);
}

/* A limit that is lowered below what the group uses: idle copies go, leased ones when they are let go. */
static void a_lowered_limit_evicts(void)
{
	struct om_store *s = open_store(16 << 20, 64 << 20);
	uint64_t until = SOON;
	struct om_lease *l;

	for (int i = 0; i < 3; i++) {
		add_clean(s, (const char *[]){ "c0", "c1", "c2" }[i], "g", 1 << 20);
		add(s, (const char *[]){ "d0", "d1", "d2" }[i], "g", 1 << 20);
	}
	CHECK_EQ(om_store_lease(s, "c1", false, SOON, &l), 0);
	CHECK_EQ(host_used(s), 6 << 20);
	CHECK_EQ(om_store_group(s, "g", 4 << 20), 0); /* clean ones, at once */
	CHECK_EQ(host_used(s), 4 << 20);
	CHECK_EQ(om_store_group(s, "g", 2 << 20), 0); /* dirty ones, written out */
	while (host_used(s) > 2 << 20 && om_now() < until)
		usleep(1000);
	CHECK_EQ(host_used(s), 2 << 20);
	CHECK_EQ(om_store_group(s, "g", OM_PAGE), 0); /* all but the leased one */
	while (host_used(s) > 1 << 20 && om_now() < until)
		usleep(1000);
	CHECK_EQ(host_used(s), 1 << 20);
	om_lease_unref(l);
	CHECK_EQ(host_used(s), 0);
	CHECK_EQ(om_store_group(s, "g", 0), 0);
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(
			om_store_lease(s, (const char *[]){ "d0", "d1", "d2" }[i], false, SOON, &l),
			0);
		CHECK(memcmp(om_lease_data(l), data, 1 << 20) == 0);
		om_lease_unref(l);
	}
	om_store_unref(s);
}

/* Fill the disk (room for two blocks) through a group that has room for one, beside block "a", which
 * is in HOST and on DISK: its copy there is what could give way. */
static struct om_store *short_of_disk(void)
{
	struct om_store *s = open_store(16 << 20, 2 << 20);

	add_clean(s, "a", NULL, 1 << 20);
	CHECK_EQ(om_store_group(s, "g", 1 << 20), 0);
	add(s, "x1", "g", 1 << 20);
	add(s, "x2", "g", 1 << 20); /* x1 goes to the disk: it is full */
	return s;
}

static int add_soon(struct om_store *s, const char *name)
{
	int code = om_store_add(s, name, "g", data, 1 << 20, NULL, om_deadline(OM_NSEC / 20));

	CHECK_EQ(om_store_check(s), 0);
	return code;
}

static void expect_stored(struct om_store *s, const char *name)
{
	struct om_lease *l;

	CHECK_EQ(om_store_evict(s, name, SOON), 1);
	CHECK_EQ(om_store_lease(s, name, false, SOON, &l), 0);
	CHECK(memcmp(om_lease_data(l), data, 1 << 20) == 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_check(s), 0);
}

/* torch ignores that a view is read-only: what a consumer wrote never replaces what was stored. */
static void written_views_are_not_believed(void)
{
	struct om_store *s = short_of_disk();
	struct om_lease *l;

	CHECK_EQ(om_store_lease(s, "a", false, SOON, &l), 0);
	((uint8_t *)om_lease_data(l))[12345] ^= 1;
	om_lease_unref(l);
	CHECK(add_soon(s, "x3") != 0); /* only the disk copy of "a" is right: it stays */
	CHECK_EQ(om_store_remove(s, "x1"), 0);
	expect_stored(s, "a");
	om_store_unref(s);
}

static void leased_blocks_keep_their_disk_copy(void)
{
	struct om_store *s = short_of_disk();
	struct om_lease *l;

	CHECK_EQ(om_store_lease(s, "a", false, SOON, &l), 0);
	CHECK_EQ(add_soon(s, "x3"), OM_EBUSY);
	CHECK(strstr(om_err_last()->holders, "a (1 leases"));
	CHECK_EQ(om_store_evict(s, "x2", om_deadline(OM_NSEC / 20)), OM_EBUSY);
	CHECK(strstr(om_err_last()->holders, "a (1 leases"));
	((uint8_t *)om_lease_data(l))[54321] ^= 1; /* now, after it was looked at */
	om_lease_unref(l);
	CHECK(add_soon(s, "x3") != 0);
	CHECK_EQ(om_store_remove(s, "x1"), 0);
	expect_stored(s, "a");
	om_store_unref(s);
}

static void proven_disk_copies_give_way(void)
{
	struct om_store *s = short_of_disk();

	CHECK_EQ(add_soon(s, "x3"), 0);
	CHECK_EQ(om_store_remove(s, "x1"), 0);
	expect_stored(s, "a");
	om_store_unref(s);
}

int main(void)
{
	const char *io = getenv("OMNIMEM_IO");

	alarm(100);
	backend = io && !strcmp(io, "threads") ? 2 : io && !strcmp(io, "uring") ? 1 : 0;
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 2654435761u >> 13);
	CHECK(mkdtemp(dir));
	adopted_memory_counts();
	groups_stay_exact();
	limits_hold_what_they_are_for();
	writes_that_fail_are_told();
	another_victim_is_tried();
	speculation_is_counted();
	slices_count_once();
	leased_blocks_are_named();
	the_tight_limit_is_named();
	a_lowered_limit_evicts();
	written_views_are_not_believed();
	leased_blocks_keep_their_disk_copy();
	proven_disk_copies_give_way();
	CHECK(rmdir(dir) == 0);
	return 0;
}
