/* om_monitor: on a fixture tree whose numbers change, with real stores and banks that it watches: what it does under
 * pressure and what it tells of it, its thread, waiting, peaks, closed stores, the nth failure, threads. */
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/om_monitor_int.h"
#include "core/om_store_int.h"
#include "om_test.h"

#define SOON  om_deadline(20 * OM_NSEC)
#define MIB   OM_MIB
#define TOTAL 1024 /* MiB, of the fixture */

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";

/* The fixture's system, in MiB: replaced in one step, since a thread may be reading. */
static void set_used(unsigned mib)
{
	char path[200], made[200];
	FILE *f;

	snprintf(path, sizeof(path), "%s/proc/meminfo", dir);
	snprintf(made, sizeof(made), "%s/proc/made", dir);
	f = fopen(made, "w");
	CHECK(f &&
	      fprintf(f, "MemTotal: %u kB\nMemAvailable: %u kB\n", TOTAL * 1024,
	              (TOTAL - mib) * 1024) > 0 &&
	      fclose(f) == 0);
	CHECK_EQ(rename(made, path), 0);
}

static struct om_monitor *open_monitor(bool act)
{
	struct om_monitor_config c = { { 0.75, 0.88, 0.95 }, OM_NSEC / 50, act, dir };
	struct om_monitor *m;

	CHECK_EQ(om_monitor_create(&c, &m), 0);
	return m;
}

static struct om_store *open_store(void)
{
	struct om_store_config c = { .host_limit_bytes = 512 * MIB,
		                     .disk_limit_bytes = 512 * MIB,
		                     .directory = dir };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static void add(struct om_store *s, const char *group, int count)
{
	uint8_t *data = calloc(1, MIB);
	char name[32];

	for (int i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "%s-%d", group, i);
		CHECK_EQ(om_store_add(s, name, group, data, MIB, NULL, SOON), 0);
	}
	free(data);
}

static uint64_t host_bytes(struct om_store *s)
{
	struct om_stats st;

	CHECK_EQ(om_store_stats(s, &st), 0);
	CHECK_EQ(om_store_check(s), 0);
	return st.host.used_bytes;
}

static struct om_report sampled(struct om_monitor *m)
{
	struct om_report r;

	CHECK_EQ(om_monitor_sample(m, &r), 0);
	return r;
}

/* How many actions of that kind there were; the last one. */
static unsigned actions(struct om_monitor *m, enum om_action_kind kind, struct om_action *ret)
{
	struct om_action *all;
	unsigned found = 0;
	size_t count;

	CHECK_EQ(om_monitor_actions(m, 0, &all, &count), 0);
	for (size_t i = 0; i < count; i++) {
		CHECK(i == 0 || all[i].number == all[i - 1].number + 1);
		if (all[i].kind != kind)
			continue;
		*ret = all[i];
		found++;
	}
	om_free(all);
	return found;
}

static void values(void)
{
	struct om_monitor_config c = { { 0.75, 0.88, 0.95 }, OM_NSEC, false, NULL };
	struct om_span *spans;
	struct om_monitor *m;
	size_t count;

	c.thresholds[1] = 0.5;
	CHECK_EQ(om_monitor_create(&c, &m), OM_EVALUE);
	c.thresholds[1] = 0.88;
	c.interval_ns = OM_NSEC / 101;
	CHECK_EQ(om_monitor_create(&c, &m), OM_EVALUE);
	c.interval_ns = 86401 * OM_NSEC;
	CHECK_EQ(om_monitor_create(&c, &m), OM_EVALUE);
	CHECK(strstr(om_err_last()->text, "86400"));
	c.interval_ns = OM_NSEC;
	CHECK_EQ(om_monitor_create(&c, &m), 0);
	CHECK(sampled(m).sample.rss_bytes > 0);
	CHECK_EQ(om_monitor_history(m, 3, &spans, &count), OM_EVALUE);
	om_monitor_free(m);
	om_monitor_free(NULL);
}

/* MEDIUM trims; HIGH has blocks go, a twentieth of all at most; CRITICAL as many as it takes. */
static void pressed(void)
{
	struct om_monitor *m = open_monitor(true);
	struct om_store *s = open_store(), *other = open_store();
	struct om_action a;
	uint64_t before;

	set_used(100);
	add(s, "model:a", 100);
	add(other, "model:b", 50);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	CHECK_EQ(om_monitor_watch(m, other), 0);
	CHECK_EQ(sampled(m).level, OM_LOW);
	before = host_bytes(s);
	set_used(800); /* 78 % */
	CHECK_EQ(sampled(m).level, OM_LOW);
	CHECK_EQ(sampled(m).level, OM_MEDIUM);
	CHECK_EQ(host_bytes(s), before);
	set_used(920); /* 90 % */
	CHECK_EQ(sampled(m).level, OM_MEDIUM);
	CHECK_EQ(sampled(m).level, OM_HIGH);
	CHECK(before - host_bytes(s) >= 32 * MIB && before - host_bytes(s) <= 37 * MIB);
	CHECK(50 * MIB - host_bytes(other) >= 15 * MIB); /* in proportion */
	CHECK_EQ(actions(m, OM_ACT_EVICT, &a), 1);
	CHECK(a.wanted_bytes / MIB == TOTAL / 20 && a.level == OM_HIGH);
	CHECK(a.freed_bytes >= 48 * MIB && a.freed_bytes <= 53 * MIB);
	CHECK(strstr(a.cause, "RAM 89.8 % in use of 1.0 GiB (system); 104.0 MiB left, "
	                      "wanted 51.2 MiB, got "));
	set_used(1000); /* 98 %: down to 90 % */
	CHECK_EQ(sampled(m).level, OM_CRITICAL);
	CHECK_EQ(actions(m, OM_ACT_EVICT, &a), 2);
	CHECK_EQ(a.wanted_bytes / MIB, 1000 - 921 - 1 + 8);
	sampled(m);
	CHECK_EQ(host_bytes(s) + host_bytes(other), 0); /* nothing is left */
	sampled(m);
	sampled(m);
	CHECK_EQ(actions(m, OM_ACT_NONE, &a), 1); /* told once */
	CHECK(strstr(a.cause, "nothing idle was left") && a.freed_bytes == 0 && a.wanted_bytes);
	CHECK_EQ(actions(m, OM_ACT_RELAX, &a), 0);
	om_monitor_free(m);
	om_store_unref(s);
	om_store_unref(other);
}

/* Blocks of a file, read and idle. */
static double ceiling_of(struct om_store *s)
{
	double ceiling;

	om_mutex_lock(&s->lock);
	ceiling = s->guard.ceiling;
	om_mutex_unlock(&s->lock);
	return ceiling;
}

/* Use that rises fast, as while a model is loaded, is HIGH for the time that is left: nobody has to give for that, and
 * stores may grow as always. Where the share in use is too high, they may not. */
static void time_alone(void)
{
	struct om_monitor *m = open_monitor(true);
	struct om_store *s = open_store();
	struct om_report r = { 0 };

	add(s, "g", 4);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	for (unsigned used = 100; used < 700 && r.ram_level < OM_HIGH; used += 20) {
		set_used(used);
		r = sampled(m);
		usleep(50000);
	}
	CHECK(r.ram_level >= OM_HIGH);
	CHECK(ceiling_of(s) == 0);
	set_used(920);
	sampled(m);
	sampled(m);
	CHECK(ceiling_of(s) > 0.8 && ceiling_of(s) < 0.88);
	om_monitor_free(m);
	om_store_unref(s);
}

static void add_read(struct om_store *s, const char *path, int count)
{
	struct om_file_range range = { path, 0, MIB };
	struct om_lease *l;
	char name[32];

	for (int i = 0; i < count; i++, range.offset += MIB) {
		snprintf(name, sizeof(name), "read-%d", i);
		CHECK_EQ(om_store_add_file(s, name, "model:f", &range, 1, OM_NOT_ENCODED, NULL), 0);
		CHECK_EQ(om_store_lease(s, name, OM_READ, SOON, &l), 0);
		om_lease_unref(l);
	}
}

/* What a store would give for nothing is not in use, and goes when little is left all the same. */
static void spare(void)
{
	struct om_monitor *m = open_monitor(true), *looker = open_monitor(false);
	struct om_store *s = open_store();
	struct om_lease *l;
	struct om_action a;
	char path[100];

	snprintf(path, sizeof(path), "%s/weights", dir);
	CHECK_EQ(fclose(fopen(path, "w")), 0);
	CHECK_EQ(truncate(path, 300 * MIB), 0);
	add_read(s, path, 200);
	add(s, "model:a", 30); /* would have to be written */
	CHECK_EQ(om_monitor_watch(m, s), 0);
	CHECK_EQ(om_monitor_watch(looker, s), 0);
	set_used(910);
	for (int i = 0; i < 3; i++) {
		struct om_report r = sampled(m);

		CHECK_EQ(r.spare_bytes, 200 * MIB);
		CHECK(r.level == OM_LOW && !m->pressed);
		r = sampled(looker); /* who does not act has nothing given up */
		CHECK(r.spare_bytes == 0 && (!i || r.level == OM_HIGH));
	}
	CHECK_EQ(host_bytes(s), 230 * MIB);
	CHECK_EQ(om_store_lease(s, "read-7", OM_READ, SOON, &l), 0);
	CHECK_EQ(sampled(m).spare_bytes, 199 * MIB); /* in use */
	om_lease_unref(l);
	set_used(960); /* 39 MiB more than stores leave to others */
	CHECK_EQ(sampled(m).level, OM_LOW);
	CHECK_EQ(actions(m, OM_ACT_EVICT, &a), 1);
	CHECK(strstr(a.cause, "64.0 MiB left, wanted 38.4 MiB, got 39.0 MiB in 39 blocks"));
	CHECK_EQ(actions(m, OM_ACT_RELAX, &a), 0);
	CHECK_EQ(host_bytes(s), 191 * MIB);
	om_monitor_free(m);
	om_monitor_free(looker);
	om_store_unref(s);
	CHECK_EQ(unlink(path), 0);
}

/* While use falls by itself, nothing is taken. */
static void falling(void)
{
	struct om_monitor *m = open_monitor(true);
	struct om_store *s = open_store();
	struct om_action a;

	add(s, "g", 100);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	set_used(1024);
	sampled(m);
	CHECK_EQ(actions(m, OM_ACT_EVICT, &a), 1);
	CHECK_EQ(om_monitor_close(m), 0);
	om_monitor_free(m);
	m = open_monitor(true);
	add(s, "h", 100);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	set_used(1023);
	m->acted_number = 0; /* as if there had been a sample before, of much more */
	m->acted_bytes = 1300 * MIB;
	CHECK_EQ(sampled(m).level, OM_CRITICAL);
	CHECK_EQ(actions(m, OM_ACT_EVICT, &a), 0);
	CHECK_EQ(sampled(m).level, OM_CRITICAL);
	CHECK_EQ(actions(m, OM_ACT_EVICT, &a), 1);
	om_monitor_free(m);
	om_store_unref(s);
}

/* Who was told that memory is short hears when it is not. */
static void relaxed(void)
{
	struct om_monitor *m = open_monitor(true);
	struct om_store *s = open_store();
	struct om_action a;

	add(s, "g", 4);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	m->assessor.ram.rules.dwell_ns = 0;
	set_used(100);
	sampled(m);
	CHECK_EQ(actions(m, OM_ACT_RELAX, &a), 0); /* nobody was told */
	set_used(1000);
	sampled(m);
	CHECK(m->pressed);
	set_used(100);
	CHECK_EQ(sampled(m).level, OM_LOW);
	CHECK_EQ(actions(m, OM_ACT_RELAX, &a), 1);
	CHECK(a.level == OM_LOW && !strcmp(a.cause, "memory is not short any more"));
	sampled(m);
	CHECK_EQ(actions(m, OM_ACT_RELAX, &a), 1); /* once */
	set_used(1000);
	sampled(m);
	CHECK_EQ(om_monitor_stop(m), 0); /* who does not look on does not press on */
	CHECK(!m->pressed);
	om_monitor_free(m);
	om_store_unref(s);
}

static void looks_on(void)
{
	struct om_monitor *m = open_monitor(false);
	struct om_store *s = open_store();
	struct om_action a;
	uint64_t before;

	add(s, "g", 20);
	before = host_bytes(s);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	set_used(1020);
	CHECK_EQ(sampled(m).level, OM_CRITICAL);
	CHECK_EQ(host_bytes(s), before);
	CHECK_EQ(actions(m, OM_ACT_EVICT, &a) + actions(m, OM_ACT_TRIM, &a), 0);
	om_monitor_free(m);
	om_store_unref(s);
}

static void banks(void)
{
	struct om_bank_config c = { .name = "cpu",
		                    .limit_bytes = 64 * MIB,
		                    .decay_ns = 3600 * OM_NSEC,
		                    .most_fragmented = 1 };
	struct om_monitor *m = open_monitor(true);
	struct om_bank_stats st;
	struct om_action a;
	struct om_chunk *c1;
	uint64_t chunks, bytes;
	struct om_bank *b;

	CHECK_EQ(om_bank_create(&c, &b), 0);
	CHECK_EQ(om_monitor_watch_bank(m, b), 0);
	CHECK_EQ(om_bank_alloc(b, 32 * MIB, 256, NULL, &c1), 0);
	CHECK_EQ(om_bank_free(b, c1), 0);
	set_used(800);
	sampled(m);
	CHECK_EQ(sampled(m).level, OM_MEDIUM);
	CHECK_EQ(om_bank_stats(b, &st), 0);
	CHECK_EQ(st.mapped_bytes, 0);
	CHECK_EQ(actions(m, OM_ACT_TRIM, &a), 1);
	CHECK_EQ(a.freed_bytes, 32 * MIB);
	CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
	sampled(m);
	CHECK_EQ(m->watched_count, 0);
	CHECK_EQ(om_monitor_unwatch_bank(m, b), 0);
	om_monitor_free(m);
	om_bank_unref(b);
}

static void watching(void)
{
	struct om_monitor *m = open_monitor(true);
	struct om_store *s = open_store(), *t = open_store();

	CHECK_EQ(om_monitor_watch(m, s), 0);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	CHECK_EQ(om_monitor_watch(m, t), 0);
	CHECK_EQ(m->watched_count, 2);
	CHECK_EQ(om_monitor_unwatch(m, s), 0);
	CHECK_EQ(m->watched_count, 2);
	CHECK_EQ(om_monitor_unwatch(m, s), 0);
	CHECK_EQ(m->watched_count, 1);
	CHECK_EQ(om_monitor_unwatch(m, s), 0); /* no longer watched: nothing */
	CHECK_EQ(om_store_close(t), 0);
	om_store_unref(t); /* the monitor's is the last */
	sampled(m);
	CHECK_EQ(m->watched_count, 0);
	for (int i = 0; i < 9; i++) {
		t = open_store();
		CHECK_EQ(om_monitor_watch(m, t), 0);
		om_store_unref(t);
	}
	CHECK_EQ(m->watched_count, 9); /* kept by the monitor alone */
	CHECK_EQ(om_monitor_close(m), 0);
	CHECK_EQ(om_monitor_close(m), 0);
	CHECK_EQ(om_monitor_watch(m, s), OM_ECLOSED);
	CHECK_EQ(om_monitor_start(m), OM_ECLOSED);
	CHECK_EQ(om_monitor_stop(m), OM_ECLOSED);
	CHECK(!om_monitor_running(m));
	om_monitor_free(m);
	om_store_unref(s);
}

static void peaks(void)
{
	struct om_monitor *m = open_monitor(false);
	struct om_store *s = open_store();
	struct om_report r;

	add(s, "small", 20);
	CHECK_EQ(om_store_add_zeros(s, "none", "g", 64 * MIB, NULL), 0); /* never touched */
	for (int i = 0; i < 3; i++) {
		char name[32];
		uint8_t *large = calloc(1, (size_t)(3 + i) * MIB);

		snprintf(name, sizeof(name), "large-%d", i);
		CHECK_EQ(om_store_add(s, name, "g", large, (uint64_t)(3 + i) * MIB, NULL, SOON), 0);
		free(large);
	}
	CHECK_EQ(om_monitor_watch(m, s), 0);
	set_used(100);
	r = sampled(m);
	CHECK_EQ(r.peak.bytes, 100 * MIB);
	CHECK_EQ(r.peak.count, OM_PEAK_BLOCKS);
	CHECK(!strcmp(r.peak.blocks[0].block, "large-2") && !strcmp(r.peak.blocks[0].group, "g"));
	CHECK(r.peak.blocks[0].nbytes == 5 * MIB && r.peak.blocks[2].nbytes == 3 * MIB);
	CHECK_EQ(r.peak.blocks[3].nbytes, MIB);
	CHECK_EQ(om_store_remove(s, "large-2"), 0);
	set_used(50);
	CHECK_EQ(sampled(m).peak.bytes, 100 * MIB);
	set_used(101); /* hardly more: the list stays */
	set_used(100);
	r = sampled(m);
	CHECK_EQ(r.peak.at_ns != r.sample.at_ns, 1);
	set_used(103);
	r = sampled(m);
	CHECK_EQ(r.peak.bytes, 103 * MIB);
	CHECK(!strcmp(r.peak.blocks[0].block, "large-1"));
	om_monitor_free(m);
	om_store_unref(s);
}

/* ---- its thread ---- */

static void the_thread(void)
{
	struct om_monitor *m = open_monitor(true);
	struct om_store *s = open_store();
	struct om_action a;
	struct om_report r;
	uint64_t number;
	char path[200];

	set_used(100);
	add(s, "g", 60);
	CHECK_EQ(om_monitor_watch(m, s), 0);
	CHECK_EQ(om_monitor_wait(m, 0, OM_LOW, om_now(), &number), OM_EBUSY);
	CHECK_EQ(om_monitor_start(m), 0);
	CHECK_EQ(om_monitor_start(m), 0);
	CHECK(om_monitor_running(m));
	CHECK_EQ(om_monitor_wait(m, 3, OM_LOW, SOON, &number), 0);
	CHECK(number > 3);
	CHECK_EQ(om_monitor_wait(m, 0, OM_MEDIUM, om_now() + OM_NSEC / 20, &number), OM_EBUSY);
	set_used(1000);
	CHECK_EQ(om_monitor_wait(m, (int64_t)number, OM_CRITICAL, SOON, &number), 0);
	CHECK_EQ(om_monitor_wait(m, (int64_t)number + 2, OM_CRITICAL, SOON, &number), 0);
	CHECK(actions(m, OM_ACT_EVICT, &a) > 0);
	CHECK_EQ(host_bytes(s), 0);
	CHECK_EQ(om_monitor_stop(m), 0);
	CHECK_EQ(om_monitor_stop(m), 0);
	CHECK(!om_monitor_running(m));
	CHECK_EQ(om_monitor_report(m, &r), 0);
	number = r.number;
	usleep(100000);
	CHECK_EQ(om_monitor_report(m, &r), 0);
	CHECK_EQ(r.number, number);
	CHECK_EQ(om_monitor_start(m), 0); /* again */
	CHECK_EQ(om_monitor_wait(m, (int64_t)number, OM_LOW, SOON, &number), 0);
	/* The system's numbers are gone for a while: it goes on when they are back. */
	snprintf(path, sizeof(path), "%s/proc/meminfo", dir);
	CHECK_EQ(truncate(path, 0), 0);
	CHECK_EQ(om_monitor_sample(m, &r), -ENODATA);
	set_used(100);
	CHECK_EQ(om_monitor_report(m, &r), 0);
	CHECK_EQ(om_monitor_wait(m, (int64_t)r.number, OM_LOW, SOON, &number), 0);
	om_monitor_free(m); /* while it runs */
	om_store_unref(s);
}

static struct om_report *recent(struct om_monitor *m, uint64_t since, size_t *ret_count)
{
	struct om_report *all;

	CHECK_EQ(om_monitor_recent(m, since, &all, ret_count), 0);
	for (size_t i = 0; i < *ret_count; i++)
		CHECK(!all[i].asked && all[i].number > since && all[i].sample.place_count == 1 &&
		      (!i || all[i].number > all[i - 1].number));
	return all;
}

/* Quiet samples wake nobody who follows, but for every eighth. */
static void followed(void)
{
	struct om_monitor *m = open_monitor(true);
	uint64_t number, stirs = 7, before;
	struct om_report *all;
	size_t count;

	set_used(100);
	CHECK_EQ(om_monitor_follow(m, 0, INFINITY, SOON, &stirs), OM_ECANCELED);
	CHECK_EQ(om_monitor_start(m), 0);
	CHECK_EQ(om_monitor_wait(m, 17, OM_LOW, SOON, &number), 0);
	CHECK_EQ(om_monitor_stop(m), 0);
	number = m->last->number;
	CHECK_EQ(m->stirs, number / 8);
	all = recent(m, number - 5, &count);
	CHECK(count == 5 && all[4].number == number);
	om_free(all);
	sampled(m); /* asked for: a stir, and none that the thread took */
	CHECK_EQ(m->stirs, number / 8 + 1);
	all = recent(m, 0, &count);
	CHECK_EQ(count, 15);
	om_free(all);
	all = recent(m, number + 1, &count);
	CHECK_EQ(count, 0);
	om_free(all);
	CHECK_EQ(om_monitor_start(m), 0);
	CHECK_EQ(om_monitor_follow(m, UINT64_MAX, INFINITY, om_now() + OM_NSEC / 50, &stirs),
	         OM_EBUSY);
	before = m->stirs;
	CHECK_EQ(om_monitor_stir(m), 0);
	CHECK_EQ(om_monitor_follow(m, before, INFINITY, SOON, &stirs), 0);
	CHECK(stirs > before);
	set_used(1000); /* rises at once; and each sample up there is a stir */
	for (int i = 0; i < 3; i++)
		CHECK_EQ(om_monitor_follow(m, stirs, INFINITY, SOON, &stirs), 0);
	CHECK_EQ(om_monitor_wait(m, 0, OM_CRITICAL, SOON, &number), 0);
	om_monitor_free(m);
	m = open_monitor(true);
	set_used(500);
	CHECK_EQ(om_monitor_follow(m, 0, 0.4, SOON, &stirs), OM_ECANCELED);
	CHECK_EQ(om_monitor_start(m), 0);
	CHECK_EQ(om_monitor_wait(m, 12, OM_LOW, SOON, &number), 0);
	CHECK_EQ(om_monitor_stop(m), 0);
	CHECK_EQ(m->stirs, m->last->number); /* all of them: so much is in use */
	CHECK_EQ(om_monitor_close(m), 0);
	CHECK_EQ(om_monitor_follow(m, 0, INFINITY, SOON, &stirs), OM_ECLOSED);
	CHECK_EQ(om_monitor_stir(m), OM_ECLOSED);
	om_monitor_free(m);
}

static void *follows(void *arg)
{
	uint64_t stirs;

	CHECK_EQ(om_monitor_follow(arg, UINT64_MAX, INFINITY, UINT64_MAX, &stirs), OM_ECLOSED);
	return NULL;
}

static void *waits(void *arg)
{
	uint64_t number;

	CHECK_EQ(om_monitor_wait(arg, 0, OM_CRITICAL, SOON, &number), OM_ECLOSED);
	return NULL;
}

static void *asks(void *arg)
{
	struct om_monitor *m = arg;
	struct om_action *all;
	struct om_span *spans;
	struct om_report r;
	size_t count;

	for (int i = 0; i < 60; i++) {
		CHECK_EQ(om_monitor_sample(m, &r), 0);
		CHECK_EQ(om_monitor_report(m, &r), 0);
		CHECK_EQ(om_monitor_history(m, 1, &spans, &count), 0);
		om_free(spans);
		CHECK_EQ(om_monitor_actions(m, 0, &all, &count), 0);
		om_free(all);
		om_free(recent(m, 0, &count));
		om_monitor_running(m);
	}
	return NULL;
}

static void *starts(void *arg)
{
	for (int i = 0; i < 20; i++) {
		CHECK_EQ(om_monitor_start(arg), 0);
		CHECK_EQ(om_monitor_stop(arg), 0);
	}
	return NULL;
}

static void *opens(void *arg)
{
	for (int i = 0; i < 10; i++) {
		struct om_store *s = open_store();

		add(s, "t", 5);
		CHECK_EQ(om_monitor_watch(arg, s), 0);
		if (i % 2)
			CHECK_EQ(om_store_close(s), 0);
		else
			CHECK_EQ(om_monitor_unwatch(arg, s), 0);
		om_store_unref(s);
	}
	return NULL;
}

static void threads(void)
{
	void *(*const runs[])(void *) = { asks, asks, starts, starts, opens, opens };
	struct om_monitor *m = open_monitor(true);
	pthread_t t[6], waiter, follower;

	set_used(990);
	for (int i = 0; i < 6; i++)
		CHECK_EQ(pthread_create(&t[i], NULL, runs[i], m), 0);
	for (int i = 0; i < 6; i++)
		CHECK_EQ(pthread_join(t[i], NULL), 0);
	sampled(m);
	CHECK_EQ(m->watched_count, 0);
	om_monitor_free(m);
	set_used(100);
	m = open_monitor(true);
	CHECK_EQ(om_monitor_start(m), 0);
	CHECK_EQ(pthread_create(&waiter, NULL, waits, m), 0);
	CHECK_EQ(pthread_create(&follower, NULL, follows, m), 0);
	usleep(50000);
	CHECK_EQ(om_monitor_close(m), 0);
	CHECK_EQ(pthread_join(waiter, NULL), 0);
	CHECK_EQ(pthread_join(follower, NULL), 0);
	om_monitor_free(m);
}

/* ---- the nth failure ---- */

static int faulty(struct om_store *s)
{
	struct om_monitor_config c = { { 0.75, 0.88, 0.95 }, OM_NSEC, true, dir };
	struct om_report *reports;
	struct om_action *all;
	struct om_span *spans;
	struct om_monitor *m;
	struct om_report r;
	size_t count;
	int code = om_monitor_create(&c, &m);

	if (code)
		return code;
	code = om_monitor_watch(m, s);
	code = code ? code : om_monitor_sample(m, &r);
	code = code ? code : om_monitor_start(m);
	code = code ? code : om_monitor_stop(m);
	if (!code)
		code = om_monitor_history(m, 60, &spans, &count);
	if (!code) {
		om_free(spans);
		code = om_monitor_actions(m, 0, &all, &count);
	}
	if (!code) {
		om_free(all);
		code = om_monitor_recent(m, 0, &reports, &count);
	}
	if (!code)
		om_free(reports);
	om_monitor_free(m);
	return code;
}

static void nth_failure(enum om_fault point, int want, uint64_t at_least)
{
	struct om_store *s = open_store();
	uint64_t nth = 1;

	add(s, "g", 2);
	set_used(1000);
	for (;; nth++) {
		int code;

		om_fault_arm(point, nth, false);
		code = faulty(s);
		CHECK(code == 0 || code == want);
		if (!om_fault_fired(point))
			break;
	}
	om_fault_reset();
	CHECK(nth > at_least);
	CHECK_EQ(om_store_check(s), 0);
	om_store_unref(s);
}

int main(void)
{
	char path[200];

	CHECK(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/proc", dir);
	CHECK_EQ(mkdir(path, 0700), 0);
	set_used(100);
	values();
	pressed();
	time_alone();
	spare();
	falling();
	relaxed();
	looks_on();
	banks();
	watching();
	peaks();
	the_thread();
	followed();
	threads();
	nth_failure(OM_FAULT_ALLOC, -ENOMEM, 8);
	nth_failure(OM_FAULT_THREAD, -EAGAIN, 1);
	snprintf(path, sizeof(path), "rm -rf '%s'", dir);
	return system(path);
}
