/* Memory that is short: the guard on a tree of text files (the soft ceiling, what goes first, what may grow all
 * the same, how often the files are read), and om_store_press. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/om_store_int.h"
#include "om_test.h"

#define SOON  om_deadline(20 * OM_NSEC)
#define MIB   OM_MIB
#define BYTES (1u << 20)

static char root[] = "/var/tmp/omnimem-test-XXXXXX", dir[] = "/var/tmp/omnimem-test-XXXXXX";
static uint8_t data[4 * BYTES];

static void put(const char *name, const char *text)
{
	char path[300];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", root, name);
	f = fopen(path, "w");
	CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

/* A machine of `total` MiB of which `used` are in use; `once`: what the store maps from now on is known by its
 * own counting alone. */
static void use(unsigned total, unsigned used)
{
	char text[200];

	snprintf(text, sizeof(text), "MemTotal: %u kB\nMemAvailable: %u kB\n", total * 1024,
	         (total - used) * 1024);
	put("proc/meminfo", text);
}

static void machine(unsigned total, unsigned used, bool once)
{
	use(total, used);
	om_guard_fake(root, once);
}

static struct om_store *open_store(uint64_t host, uint64_t disk)
{
	struct om_store_config c = { .host_limit_bytes = host,
		                     .disk_limit_bytes = disk,
		                     .directory = dir };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static struct om_stats stats(struct om_store *s)
{
	struct om_stats st;

	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_store_stats(s, &st), 0);
	return st;
}

static const char *name_of(int i)
{
	static _Thread_local char name[4][16];

	snprintf(name[i % 4], sizeof(name[0]), "b%d", i);
	return name[i % 4];
}

static void add(struct om_store *s, int i)
{
	data[0] = (uint8_t)i;
	CHECK_EQ(om_store_add(s, name_of(i), NULL, data, BYTES, NULL, SOON), 0);
}

static void expect(struct om_store *s, int i)
{
	struct om_lease *l;

	CHECK_EQ(om_store_lease(s, name_of(i), OM_READ, SOON, &l), 0);
	CHECK_EQ(*(const uint8_t *)om_lease_data(l), (uint8_t)i);
	om_lease_unref(l);
}

/* 1000 MiB, 880 in use, the ceiling at 900: 20 blocks of a MiB stay, the rest of 40 is written. */
static void idle_blocks_give_way(void)
{
	struct om_store *s;

	machine(1000, 880, true);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 40; i++)
		add(s, i);
	CHECK(stats(s).host.mapped_bytes <= 20 * MIB);
	CHECK(stats(s).host.mapped_bytes >= 16 * MIB); /* and not all of it went */
	CHECK_EQ(stats(s).idle_bytes, stats(s).host.used_bytes);
	for (int i = 0; i < 40; i++)
		expect(s, i);
	CHECK(stats(s).host.mapped_bytes <= 20 * MIB);
	om_store_unref(s);
}

/* A small one leaves more than a tenth to others: 64 MiB of 256, here. */
static void a_small_machine(void)
{
	struct om_store *s;

	machine(256, 172, true);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 40; i++)
		add(s, i);
	CHECK(stats(s).host.mapped_bytes <= 20 * MIB);
	CHECK(stats(s).host.mapped_bytes >= 16 * MIB);
	om_store_unref(s);
}

/* What others used a moment ago they will want again: 895 of 1000 MiB, then 300. */
static void peaks_of_others(void)
{
	struct om_store *s = open_store(64 * MIB, 128 * MIB);

	machine(1000, 895, false);
	om_guard_look();
	use(1000, 300);
	for (int i = 0; i < 40; i++)
		add(s, i);
	CHECK(stats(s).host.mapped_bytes <= 5 * MIB);
	for (int i = 0; i < 40; i++)
		expect(s, i);
	om_guard_look();
	use(1024, 300); /* of another place: what was seen of this one does not count */
	om_guard_look();
	for (int i = 0; i < 40; i++)
		expect(s, i);
	CHECK(stats(s).host.mapped_bytes > 30 * MIB);
	om_store_unref(s);
}

/* A stream that reads ahead takes what others have idle rather than memory that is short: 20 MiB to the ceiling. */
static void reading_ahead_keeps_below(void)
{
	enum { UNITS = 16 };
	static const uint8_t keep = OM_KEEP_NOTHING;
	const char *names[UNITS];
	struct om_stream_unit units[UNITS];
	struct om_stream *st;
	struct om_lease *l;
	char path[300], text[2 * UNITS][16];
	struct om_file_range r = { path, 0, BYTES };
	struct om_store *s;
	FILE *f;

	snprintf(path, sizeof(path), "%s/file", root);
	f = fopen(path, "wb");
	CHECK(f && fwrite(data, 1, BYTES, f) == BYTES && fclose(f) == 0);
	machine(1000, 880, true);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 2 * UNITS; i++) {
		snprintf(text[i], sizeof(text[i]), "unit%d", i);
		CHECK_EQ(om_store_add_file(s, text[i], i < UNITS ? "model" : "other", &r, 1,
		                           OM_NOT_ENCODED, NULL),
		         0);
	}
	for (int i = UNITS; i < 2 * UNITS; i++) {
		CHECK_EQ(om_store_lease(s, text[i], OM_READ, SOON, &l), 0);
		om_lease_unref(l);
	}
	CHECK_EQ(stats(s).host.mapped_bytes, UNITS * MIB);
	for (int i = 0; i < UNITS; i++) {
		names[i] = text[i];
		units[i] = (struct om_stream_unit){ text[i], &names[i], &keep, 1 };
	}
	CHECK_EQ(om_stream_create(s, "model", units, UNITS, &st), 0);
	CHECK_EQ(om_stream_linger(st, true), 0);
	for (size_t i = 0; i < 3 * UNITS; i++) {
		bool change;

		CHECK_EQ(om_stream_enter(st, i % UNITS, SOON, &change), 0);
		if (change)
			om_stream_bound(st, i % UNITS, true);
		CHECK(stats(s).host.mapped_bytes <= 20 * MIB);
		CHECK_EQ(om_stream_leave(st, i % UNITS, &change), 0);
		if (change)
			om_stream_unbound(st, i % UNITS);
	}
	om_stream_free(st);
	om_store_unref(s);
	CHECK(unlink(path) == 0);
}

/* What is leased may grow as ever: nobody can give way. And a full disk is no reason to fail. */
static void the_ceiling_is_soft(void)
{
	struct om_store *s;
	struct om_lease *leases[40];

	machine(1000, 895, true);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 40; i++) {
		add(s, i);
		CHECK_EQ(om_store_lease(s, name_of(i), OM_READ, SOON, &leases[i]), 0);
	}
	CHECK(stats(s).host.used_bytes >= 40 * MIB && !stats(s).idle_bytes);
	CHECK_EQ(stats(s).writes, 0);
	for (int i = 0; i < 40; i++)
		om_lease_unref(leases[i]);
	om_store_unref(s);

	machine(1000, 895, true);
	s = open_store(64 * MIB, 0); /* there is no room to write to */
	for (int i = 0; i < 40; i++)
		add(s, i);
	CHECK(stats(s).host.used_bytes >= 40 * MIB);
	om_store_unref(s);

	machine(1000, 895, true);
	s = open_store(64 * MIB, 128 * MIB);
	om_fault_arm(OM_FAULT_WRITE, 1, true);
	for (int i = 0; i < 40; i++)
		add(s, i);
	CHECK(om_fault_fired(OM_FAULT_WRITE) > 0);
	om_fault_reset();
	CHECK(stats(s).host.used_bytes >= 40 * MIB);
	for (int i = 0; i < 40; i++)
		expect(s, i);
	om_store_unref(s);
}

/* Memory that no block uses goes before any block does, and serves before more is mapped. */
static void cached_segments_go_first(void)
{
	struct om_store *s;

	machine(1000, 880, true);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 16; i++)
		add(s, i);
	CHECK_EQ(om_store_add(s, "large", NULL, data, 3 * BYTES, NULL, SOON), 0);
	CHECK_EQ(om_store_remove(s, "large"), 0);
	CHECK_EQ(stats(s).host.mapped_bytes, 19 * MIB);
	for (int i = 16; i < 20; i++) /* one is cut from what is mapped, and three are mapped */
		add(s, i);
	CHECK_EQ(stats(s).writes, 0);
	CHECK_EQ(stats(s).host.mapped_bytes, 20 * MIB);
	om_store_unref(s);
}

/* Nothing is read while nothing is mapped, and not at each mapping either. */
static void readings_are_few(void)
{
	struct om_store *s;
	uint64_t before;

	machine(1000, 100, false);
	s = open_store(128 * MIB, 128 * MIB);
	add(s, 0);
	add(s, 1);
	CHECK_EQ(om_store_remove(s, "b1"), 0);
	usleep(60000); /* the last reading is old */
	before = om_guard_readings();
	for (int i = 0; i < 1000; i++)
		expect(s, 0);
	for (int i = 0; i < 20; i++) {
		add(s, 1); /* in what is mapped */
		CHECK_EQ(om_store_remove(s, "b1"), 0);
	}
	CHECK_EQ(om_guard_readings(), before);
	add(s, 1);
	add(s, 2);
	CHECK_EQ(om_guard_readings(), before + 1);
	om_store_unref(s);
	/* Files that cannot be read: nobody is in the way. */
	put("proc/meminfo", "nothing\n");
	om_guard_fake(root, false);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 40; i++)
		add(s, i);
	CHECK(stats(s).host.used_bytes >= 40 * MIB);
	om_store_unref(s);
}

static void release(void *context)
{
	*(bool *)context = true;
}

/* Memory of somebody else is in use already: taking it makes nobody go. It goes like the rest. */
static void taken_memory(void)
{
	struct om_store *s;
	bool released = false;

	machine(1000, 899, true);
	s = open_store(64 * MIB, 128 * MIB);
	add(s, 0);
	CHECK_EQ(om_store_take(s, "taken", NULL, data, 4 * BYTES, NULL, release, &released, SOON),
	         0);
	CHECK_EQ(stats(s).writes, 0);
	add(s, 1); /* b0 is the older one, but one is not enough */
	add(s, 2);
	add(s, 3);
	om_store_collect(s);
	CHECK(released);
	CHECK(stats(s).writes >= 2);
	om_store_unref(s);
}

struct toucher {
	struct om_store *s;
	unsigned long long seed;
};

static void *touch(void *arg)
{
	struct toucher *t = arg;

	for (int k = 0; k < 300; k++)
		expect(t->s, (int)(om_test_random(&t->seed) % 60));
	return NULL;
}

/* Four threads that map at once: what all of them have mapped counts before it is filled. */
static void threads_together(void)
{
	struct toucher t[4];
	pthread_t threads[4];
	struct om_store *s;

	machine(1000, 880, true);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 60; i++)
		add(s, i);
	for (int i = 0; i < 4; i++) {
		t[i] = (struct toucher){ s, 7 + (unsigned)i };
		CHECK_EQ(pthread_create(&threads[i], NULL, touch, &t[i]), 0);
	}
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	CHECK(stats(s).host.mapped_bytes <= 24 * MIB); /* and what they held */
	om_store_unref(s);
}

static void pressing(void)
{
	struct om_store *s;
	struct om_pressed p;
	struct om_lease *l;

	machine(1000, 100, false);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 8; i++)
		add(s, i);
	CHECK_EQ(om_store_remove(s, "b7"), 0);
	CHECK_EQ(om_store_lease(s, "b6", OM_READ, SOON, &l), 0);
	CHECK_EQ(om_store_press(s, OM_LOW, 0, 0, SOON, &p), 0);
	CHECK(!p.trimmed_bytes && !p.dropped_bytes && !p.written_bytes);
	CHECK_EQ(p.left_bytes, 6 * MIB);
	CHECK_EQ(om_store_press(s, OM_MEDIUM, 0, 0, SOON, &p), 0);
	CHECK_EQ(p.trimmed_bytes, 0); /* it was in use a moment ago */
	CHECK_EQ(om_store_press(s, OM_HIGH, 0, 0, SOON, &p), 0);
	CHECK_EQ(p.trimmed_bytes, MIB);
	CHECK_EQ(om_store_press(s, OM_HIGH, 0, 2 * MIB, SOON, &p), 0);
	CHECK_EQ(p.written_bytes, 2 * MIB);
	CHECK_EQ(p.written_blocks, 2);
	CHECK_EQ(p.left_bytes, 4 * MIB);
	CHECK_EQ(stats(s).host.mapped_bytes, 5 * MIB); /* the system has it */
	expect(s, 0);                                  /* clean now: it has a copy on disk */
	CHECK_EQ(om_store_press(s, OM_CRITICAL, 0, UINT64_MAX, SOON, &p), 0);
	CHECK_EQ(p.dropped_blocks, 1);
	CHECK_EQ(p.written_blocks, 4);
	CHECK(!p.left_bytes);
	CHECK_EQ(stats(s).host.mapped_bytes, MIB); /* what is leased */
	om_lease_unref(l);
	for (int i = 0; i < 7; i++)
		expect(s, i);
	CHECK_EQ(om_store_press(s, OM_LOW, 1.5, 0, SOON, &p), OM_EVALUE);
	CHECK_EQ(om_store_press(s, OM_LOW, -0.5, 0, SOON, &p), OM_EVALUE);
	om_store_unref(s);

	machine(1000, 680, true); /* another ceiling: 20 MiB are left to 70 % */
	s = open_store(64 * MIB, 128 * MIB);
	CHECK_EQ(om_store_press(s, OM_LOW, 0.7, 0, SOON, &p), 0);
	for (int i = 0; i < 40; i++)
		add(s, i);
	CHECK(stats(s).host.mapped_bytes <= 20 * MIB);
	CHECK_EQ(om_store_press(s, OM_LOW, 0, 0, SOON, &p), 0); /* the default */
	for (int i = 0; i < 40; i++)
		expect(s, i);
	CHECK(stats(s).host.mapped_bytes > 30 * MIB);
	CHECK_EQ(om_store_close(s), 0);
	CHECK_EQ(om_store_press(s, OM_LOW, 0, 0, SOON, &p), OM_ECLOSED);
	om_store_unref(s);
}

/* A deadline, a disk that refuses, no room for bookkeeping: what can go went, and nothing is lost. */
static void pressing_that_fails(void)
{
	struct om_store *s;
	struct om_pressed p;
	int code;

	machine(1000, 100, false);
	s = open_store(64 * MIB, 128 * MIB);
	for (int i = 0; i < 8; i++)
		add(s, i);
	code = om_store_press(s, OM_HIGH, 0, UINT64_MAX, 0, &p);
	CHECK_EQ(code, OM_EBUSY);
	CHECK_EQ(p.left_bytes, 8 * MIB);
	for (uint64_t nth = 1; nth < 40; nth++) {
		enum om_fault points[] = { OM_FAULT_WRITE, OM_FAULT_ALLOC, OM_FAULT_NOSPC,
			                   OM_FAULT_SUBMIT };

		for (size_t k = 0; k < 4; k++) {
			om_fault_arm(points[k], nth, nth % 2);
			code = om_store_press(s, OM_HIGH, 0, UINT64_MAX, SOON, &p);
			om_fault_reset();
			CHECK_EQ(code, 0);
			CHECK_EQ(stats(s).idle_bytes, p.left_bytes);
			for (int i = 0; i < 8; i++)
				expect(s, i);
		}
	}
	om_store_unref(s);
}

int main(void)
{
	char path[300];

	CHECK(mkdtemp(dir) && mkdtemp(root));
	snprintf(path, sizeof(path), "%s/proc", root);
	CHECK_EQ(mkdir(path, 0700), 0);
	idle_blocks_give_way();
	a_small_machine();
	peaks_of_others();
	reading_ahead_keeps_below();
	the_ceiling_is_soft();
	cached_segments_go_first();
	readings_are_few();
	taken_memory();
	threads_together();
	pressing();
	pressing_that_fails();
	om_guard_fake(NULL, false);
	snprintf(path, sizeof(path), "rm -rf '%s' '%s'", root, dir);
	return system(path);
}
