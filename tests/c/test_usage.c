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

static void use(struct om_use *u, uint64_t at_ns, struct om_turns *turns)
{
	om_use_begin(u, at_ns, turns);
	om_use_end(u, at_ns);
}

static void gaps_and_the_next_use(void)
{
	uint64_t second = OM_NSEC, now = 100 * second;
	struct om_turns turns = { 0 };
	struct om_use u = { 0 };

	CHECK_EQ(om_use_next(&u, 500, &turns), 0);
	use(&u, now, &turns);
	CHECK_EQ(u.gap_ns, 0);
	CHECK_EQ(om_use_next(&u, now + 300, &turns), now + 600); /* the longer ago, the later */
	use(&u, now += 10 * second, &turns);
	use(&u, now += 10 * second, &turns);
	use(&u, now += 500 * second, &turns); /* a pause is not typical */
	use(&u, now += 10 * second, &turns);
	CHECK_EQ(u.gap_ns, 10 * second);
	CHECK_EQ(u.gap_turns, 1);
	om_use_begin(&u, now += 10 * second, &turns);
	CHECK_EQ(om_use_next(&u, now + 7, &turns), now + 7); /* while it goes on */
	om_use_end(&u, now + 8);
	CHECK_EQ(u.count, 6);
	CHECK_EQ(u.first_ns, 100 * second);
	CHECK_EQ(om_use_recent(&u, now - 10 * second), 2);
	for (int i = 0; i < 1000; i++) /* the ring turns, the rhythm changes */
		use(&u, now += 7 * second, &turns);
	CHECK_EQ(u.gap_ns, 7 * second);
	CHECK_EQ(om_use_next(&u, now + second, &turns), now + 7 * second);
	CHECK_EQ(om_use_next(&u, now + 9 * second, &turns), now + 9 * second); /* any moment */
	CHECK_EQ(om_use_recent(&u, 0), OM_USES);
	CHECK_EQ(u.count, 1006);
}

/* Passes of one request follow each other closely; what counts is when requests come. */
static void passes_are_one_run(void)
{
	struct om_use a = { 0 }, b = { 0 };
	uint64_t second = OM_NSEC, now = 100 * second;
	struct om_turns turns = { 0 };

	for (int request = 0; request < 4; request++, now += 6 * second) {
		for (uint64_t pass = 0; pass < 8; pass++) {
			om_use_begin(&a, now + pass * second / 2, &turns);
			om_use_end(&a, now + pass * second / 2 + second / 4);
		}
		om_use_begin(&b, now + 4 * second, &turns);
		om_use_end(&b, now + 5 * second);
	}
	CHECK_EQ(a.count, 32);
	CHECK(a.run_count == 4 && b.run_count == 4);
	CHECK_EQ(a.gap_ns, 6 * second);
	CHECK_EQ(a.gap_turns, 2);
	om_use_begin(&b, now, &turns); /* more than a second later: another run all the same */
	CHECK_EQ(b.run_count, 5);
	om_use_end(&b, now + 1);
	om_use_begin(&b, now + 2, &turns);
	CHECK_EQ(b.run_count, 5);
	om_use_begin(&a, now + 2, &turns); /* both at once, in turns */
	om_use_begin(&b, now + 3, &turns);
	CHECK_EQ(b.run_count, 6);
}

/* a, b, c, a, b, c, ..., now slow, now quick: after c comes a, then b. */
static void turns_tell_however_long_they_take(void)
{
	static const uint64_t seconds[] = { 40, 1, 9, 2, 1, 1, 30, 1 };
	struct om_use u[3] = { 0 };
	struct om_turns turns = { 0 };
	uint64_t now = 100 * OM_NSEC, next[3];

	for (int i = 0; i < 12; i++) {
		om_use_begin(&u[i % 3], now, &turns);
		now += seconds[i % 8] * OM_NSEC;
		om_use_end(&u[i % 3], now);
		for (int g = 0; g < 3; g++)
			next[g] = om_use_next(&u[g], now, &turns);
		if (i >= 5) /* each has been used twice */
			CHECK(next[(i + 1) % 3] < next[(i + 2) % 3] &&
			      next[(i + 2) % 3] < next[i % 3]);
	}
	/* c again and again: a, whose turn it was, is late, and less and less likely to be next. */
	for (int i = 0; i < 4; i++)
		use(&u[2], now += 2 * OM_NSEC, &turns);
	CHECK(om_use_next(&u[1], now, &turns) > now);
	CHECK(om_use_next(&u[1], now, &turns) < om_use_next(&u[0], now, &turns));
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
		char name[16];

		for (int i = 0; i < 3; i++) {
			snprintf(name, sizeof(name), "%s%d", groups[g], i);
			add(s, name, groups[g]);
		}
	}
	for (uint64_t turn = 30; turn > 0; turn--) /* each every 30 s, the last one 10 s ago */
		use(use_of(s, groups[(30 - turn) % 3]), now - 10 * second * turn, &s->turns);
	CHECK(!strcmp(who_gives(s, groups, 3), "c"));
	CHECK_EQ(om_store_use_begin(s, "a"), 0); /* now a is furthest */
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
	turns_tell_however_long_they_take();
	the_furthest_gives();
	plain_groups_are_one_lru();
	what_is_told();
	CHECK_EQ(rmdir(dir), 0);
	return 0;
}
