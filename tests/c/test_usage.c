/* When groups are used: gaps, what is expected next, under a clock that the test sets; and who makes way: of
 * three groups that are used in turn, the one whose next use is furthest. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/om_store_int.h"
#include "om_test.h"

#define SOON  om_deadline(20 * OM_NSEC)
#define BYTES 300000u

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static uint8_t data[BYTES];

/* Used for a moment, after somebody else was. */
static void use(struct om_use *u, uint64_t at_ns)
{
	static uint64_t turn;

	turn++;
	om_use_begin(u, at_ns, &turn);
	om_use_end(u, at_ns);
}

static void gaps_and_the_next_use(void)
{
	struct om_use u = { 0 };
	uint64_t turn = 0;

	CHECK_EQ(om_use_next(&u, 500), 0);
	use(&u, 1000);
	CHECK_EQ(u.gap_ns, 0);
	CHECK_EQ(om_use_next(&u, 1300), 1600); /* the longer ago, the later */
	use(&u, 1100);
	use(&u, 1200);
	use(&u, 5000); /* a pause is not typical */
	use(&u, 5100);
	CHECK_EQ(u.gap_ns, 100);
	CHECK_EQ(om_use_next(&u, 5150), 5200);
	CHECK_EQ(om_use_next(&u, 5200), 5200);
	CHECK_EQ(om_use_next(&u, 5201), 5202); /* a little late: any moment now */
	CHECK_EQ(om_use_next(&u, 6100), 7000);
	om_use_begin(&u, 7000, &turn);
	CHECK_EQ(om_use_next(&u, 7700), 7700); /* while it goes on */
	om_use_end(&u, 7700);
	CHECK_EQ(om_use_next(&u, 7800), 7900); /* it took longer than a gap: nothing is known */
	CHECK_EQ(u.count, 6);
	CHECK_EQ(u.first_ns, 1000);
	CHECK_EQ(om_use_recent(&u, 5000), 3);
	for (uint64_t i = 1; i <= 1000; i++) /* the ring turns, the rhythm changes */
		use(&u, 10000 + 7 * i);
	CHECK_EQ(u.gap_ns, 7);
	CHECK_EQ(om_use_recent(&u, 0), OM_USES);
	CHECK_EQ(u.count, 1006);
}

/* Passes of one request follow each other closely; what counts is when requests come. */
static void passes_are_one_run(void)
{
	struct om_use a = { 0 }, b = { 0 };
	uint64_t turn = 0, second = OM_NSEC, now = 100 * second;

	for (int request = 0; request < 4; request++, now += 6 * second) {
		for (uint64_t pass = 0; pass < 8; pass++) {
			om_use_begin(&a, now + pass * second / 2, &turn);
			om_use_end(&a, now + pass * second / 2 + second / 4);
		}
		om_use_begin(&b, now + 4 * second, &turn);
		om_use_end(&b, now + 5 * second);
	}
	CHECK_EQ(a.count, 32);
	CHECK_EQ(a.gap_ns, 6 * second);
	CHECK_EQ(b.gap_ns, 6 * second);
	CHECK_EQ(om_use_next(&a, now - second), now); /* a is next, b after it: LRU would give a */
	CHECK_EQ(om_use_next(&b, now - second), now + 4 * second);
	om_use_begin(&b, now, &turn); /* more than a second later: another run all the same */
	CHECK_EQ(b.run_count, 5);
	om_use_end(&b, now + 1);
	om_use_begin(&b, now + 2, &turn);
	CHECK_EQ(b.run_count, 5);
	om_use_begin(&a, now + 2, &turn); /* both at once, in turns */
	om_use_begin(&b, now + 3, &turn);
	CHECK_EQ(b.run_count, 6);
}

static struct om_store *open_store(uint64_t host)
{
	struct om_store_config c = { .host_limit_bytes = host,
		                     .disk_limit_bytes = 32 << 20,
		                     .directory = dir };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static void add(struct om_store *s, const char *name, const char *group)
{
	CHECK_EQ(om_store_add(s, name, group, data, BYTES, NULL, SOON), 0);
}

static struct om_use *use_of(struct om_store *s, const char *group)
{
	return &om_store_find_group_locked(s, group)->use;
}

static uint64_t host_of(struct om_store *s, const char *group)
{
	struct om_group_stats g;

	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_store_group_stats(s, group, &g), 0);
	return g.host_bytes;
}

/* The group that gives one block. */
static const char *who_gives(struct om_store *s, const char *const *groups, size_t count)
{
	uint64_t before[4];
	const char *found = NULL;
	struct om_pressed done;

	for (size_t i = 0; i < count; i++)
		before[i] = host_of(s, groups[i]);
	CHECK_EQ(om_store_press(s, OM_LOW, 0, 1, SOON, &done), 0);
	CHECK_EQ(done.dropped_blocks + done.written_blocks, 1);
	for (size_t i = 0; i < count; i++) {
		if (host_of(s, groups[i]) == before[i])
			continue;
		CHECK(!found);
		found = groups[i];
	}
	CHECK(found);
	return found;
}

/* a, b, c, a, b, c, ...: after c, a is next, then b, and c is furthest; LRU would give a. */
static void the_furthest_gives(void)
{
	static const char *const groups[] = { "a", "b", "c" };
	struct om_store *s = open_store(8 << 20);
	uint64_t now = om_now(), second = OM_NSEC;

	for (int g = 0; g < 3; g++) {
		char name[8];

		for (int i = 0; i < 3; i++) {
			snprintf(name, sizeof(name), "%s%d", groups[g], i);
			add(s, name, groups[g]);
		}
		for (uint64_t round = 10; round > 0; round--) /* a every 30 s, the last 25 s ago */
			use(use_of(s, groups[g]),
			    now + 5 * second - 30 * round * second + 10 * second * (uint64_t)g);
	}
	CHECK(!strcmp(who_gives(s, groups, 3), "c"));
	CHECK_EQ(om_store_use_begin(s, "a"), 0); /* now a is furthest: in 30 s, c in 25 */
	CHECK_EQ(om_store_use_end(s, "a"), 0);
	CHECK(!strcmp(who_gives(s, groups, 3), "a"));
	CHECK_EQ(om_store_use_begin(s, "c"), 0); /* in use: the last one to go */
	CHECK(!strcmp(who_gives(s, groups, 3), "a"));
	CHECK_EQ(om_store_use_begin(s, "a"), 0);
	CHECK(!strcmp(who_gives(s, groups, 3), "b"));
	CHECK_EQ(om_store_use_end(s, "a"), 0);
	CHECK_EQ(om_store_use_end(s, "c"), 0);
	CHECK_EQ(om_store_use_end(s, "c"), OM_EVALUE);
	/* One over its own limit goes before all of them, whatever is expected. */
	add(s, "d0", "d");
	add(s, "d1", "d");
	CHECK_EQ(om_store_use_begin(s, "d"), 0);
	om_store_find_group_locked(s, "d")->lowered_from = host_of(s, "d");
	om_store_find_group_locked(s, "d")->limit_bytes = OM_PAGE;
	CHECK(!strcmp(who_gives(s, (const char *const[]){ "a", "b", "c", "d" }, 4), "d"));
	om_store_unref(s);
}

/* Groups that are never used as a whole are like one: who was accessed longest ago goes. */
static void plain_groups_are_one_lru(void)
{
	static const char *const groups[] = { "a", "b" };
	struct om_store *s = open_store(8 << 20);
	struct om_lease *l;

	add(s, "a0", "a");
	usleep(20000); /* more than a tick of the coarse clock */
	add(s, "b0", "b");
	usleep(20000);
	add(s, "a1", "a");
	CHECK_EQ(om_store_lease(s, "a0", OM_READ, SOON, &l), 0);
	om_lease_unref(l);
	CHECK(!strcmp(who_gives(s, groups, 2), "b"));
	CHECK(!strcmp(who_gives(s, groups, 2), "a"));
	om_store_unref(s);
}

static void what_is_told(void)
{
	struct om_store *s = open_store(8 << 20);
	struct om_usage u;

	CHECK_EQ(om_store_usage(s, "g", OM_NSEC, &u), 0);
	CHECK(!u.uses && !u.first_ns && !u.last_ns && !u.next_ns && !u.gap_ns && !u.busy);
	CHECK_EQ(om_store_use_end(s, "g"), OM_EVALUE);
	CHECK_EQ(om_store_use_begin(s, "g"), 0);
	CHECK_EQ(om_store_use_begin(s, "g"), 0); /* two threads */
	CHECK_EQ(om_store_usage(s, "g", 60 * OM_NSEC, &u), 0);
	CHECK(u.uses == 2 && u.recent == 2 && u.busy == 2 && u.first_ns <= u.last_ns);
	CHECK(u.next_ns >= u.last_ns);
	CHECK_EQ(om_store_use_begin(s, ""), OM_EVALUE);
	CHECK_EQ(om_store_close(s), 0);
	CHECK_EQ(om_store_use_begin(s, "g"), OM_ECLOSED);
	CHECK_EQ(om_store_usage(s, "g", 0, &u), OM_ECLOSED);
	om_store_unref(s);
}

int main(void)
{
	CHECK(mkdtemp(dir));
	gaps_and_the_next_use();
	passes_are_one_run();
	the_furthest_gives();
	plain_groups_are_one_lru();
	what_is_told();
	CHECK_EQ(rmdir(dir), 0);
	return 0;
}
