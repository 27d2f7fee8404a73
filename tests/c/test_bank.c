/*
 * Tests of core/om_bank*.c: limits, alignment, views past freeing and closing, pages that go back,
 * victims, a model under random operations, faults, threads, fork.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define MIB OM_MIB

static struct om_bank *open_as(uint64_t limit, bool locked, uint64_t decay_ns)
{
	struct om_bank_config c = { .name = "cpu",
		                    .limit_bytes = limit,
		                    .locked = locked,
		                    .decay_ns = decay_ns,
		                    .most_fragmented = 1 };
	struct om_bank *b;

	CHECK_EQ(om_bank_create(&c, &b), 0);
	return b;
}

static struct om_bank *open_bank(uint64_t limit)
{
	return open_as(limit, false, 3600 * OM_NSEC);
}

static void close_bank(struct om_bank *b, uint64_t want_chunks)
{
	uint64_t chunks, bytes;

	CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
	CHECK_EQ(chunks, want_chunks);
	om_bank_unref(b);
}

static struct om_chunk *take_aligned(struct om_bank *b, uint64_t bytes, uint64_t align)
{
	struct om_chunk *c;

	CHECK_EQ(om_bank_alloc(b, bytes, align, NULL, &c), 0);
	CHECK_EQ(om_chunk_bytes(c), bytes);
	CHECK_EQ((uintptr_t)om_chunk_data(c) % OM_MAX(align, OM_BANK_GRANULE), 0);
	CHECK_EQ(om_bank_check(b), 0);
	return c;
}

static struct om_chunk *take(struct om_bank *b, uint64_t bytes)
{
	return take_aligned(b, bytes, 1);
}

static void give(struct om_bank *b, struct om_chunk *c)
{
	CHECK_EQ(om_bank_free(b, c), 0);
	CHECK_EQ(om_bank_check(b), 0);
}

static struct om_bank_stats stats(struct om_bank *b)
{
	struct om_bank_stats s;

	CHECK_EQ(om_bank_stats(b, &s), 0);
	return s;
}

/* Pages of memory behind a range. */
static uint64_t resident(const void *p, uint64_t bytes)
{
	unsigned char *in = malloc(bytes / OM_PAGE);
	uint64_t pages = 0;

	CHECK(in && !mincore((void *)(uintptr_t)p, bytes, in));
	for (uint64_t i = 0; i < bytes / OM_PAGE; i++)
		pages += in[i] & 1;
	free(in);
	return pages;
}

static bool mapped(const void *p)
{
	unsigned char in;

	return !mincore((void *)om_down((uintptr_t)p, OM_PAGE), OM_PAGE, &in);
}

/* ---- what is asked for ---- */

static void refuse(struct om_bank *b, uint64_t bytes, uint64_t align, int code)
{
	struct om_chunk *c = (void *)1;

	CHECK_EQ(om_bank_alloc(b, bytes, align, NULL, &c), code);
	CHECK(!c);
	CHECK_EQ(om_bank_check(b), 0);
}

static void test_values(void)
{
	struct om_bank_config bad = { .name = "x", .most_fragmented = 1.5 };
	struct om_bank *b, *other = open_bank(MIB);
	struct om_chunk *c;

	CHECK_EQ(om_bank_create(&bad, &b), OM_EVALUE);
	bad.most_fragmented = -0.1;
	CHECK_EQ(om_bank_create(&bad, &b), OM_EVALUE);
	bad = (struct om_bank_config){ .name = "x", .limit_bytes = UINT64_MAX };
	CHECK_EQ(om_bank_create(&bad, &b), OM_EVALUE);
	b = open_bank(8 * MIB);
	refuse(b, 0, 1, OM_EVALUE);
	refuse(b, 1, 3, OM_EVALUE);
	refuse(b, 1, 2 * OM_BANK_MAX_ALIGN, OM_EVALUE);
	refuse(b, 8 * MIB + 1, 1, OM_ELIMIT);
	CHECK_EQ(om_err_last()->limit, 8 * MIB);
	CHECK_EQ(om_err_last()->need, 8 * MIB + 1);
	refuse(b, UINT64_MAX, 1, OM_ELIMIT);
	for (uint64_t align = 1; align <= OM_BANK_MAX_ALIGN; align *= 2) {
		struct om_chunk *pad = take(b, 100);

		c = take_aligned(b, 1000, align);
		memset(om_chunk_data(c), 1, 1000);
		CHECK_EQ(om_bank_free(other, c), OM_EVALUE);
		CHECK(strstr(om_err_last()->text, "not of this pool"));
		give(b, c);
		CHECK_EQ(om_bank_free(b, c), OM_EVALUE);
		CHECK(strstr(om_err_last()->text, "freed before"));
		CHECK_EQ(om_chunk_view_ref(c), OM_EVALUE);
		give(b, pad);
	}
	close_bank(b, 0);
	b = open_bank(8 * MIB);
	c = take_aligned(b, 8 * MIB, 2 * MIB); /* all of it, in one piece */
	CHECK_EQ(stats(b).free_bytes, 0);
	refuse(b, 1, 1, OM_ELIMIT);
	CHECK_EQ(om_err_last()->used, 8 * MIB);
	om_err(0, " ");
	CHECK_EQ(om_bank_try(b, 1, 1, NULL, &c), OM_EAGAIN);
	CHECK_EQ(om_err_last()->code, 0);
	CHECK_EQ(stats(b).fails, 2);
	close_bank(b, 1);
	close_bank(other, 0);
}

static void test_stats(void)
{
	struct om_bank *b = open_bank(16 * MIB);
	struct om_chunk *a = take(b, 1000), *c = take(b, 3 * MIB + 1), *d = take(b, 256);
	struct om_bank_stats s = stats(b);
	struct om_chunk_state st;

	CHECK_EQ(s.used_bytes, 1000 + 3 * MIB + 1 + 256);
	CHECK_EQ(s.held_bytes, 1024 + 3 * MIB + 256 + 256);
	CHECK_EQ(s.free_bytes, 16 * MIB - s.held_bytes);
	CHECK_EQ(s.largest_bytes, s.free_bytes);
	CHECK(s.fragmentation == 0);
	CHECK_EQ(s.chunks, 3);
	CHECK_EQ(s.mapped_bytes, 4 * MIB);
	give(b, c);
	s = stats(b);
	CHECK_EQ(s.used_bytes, 1256);
	CHECK_EQ(s.peak_used_bytes, 1256 + 3 * MIB + 1);
	CHECK_EQ(s.largest_bytes, 16 * MIB - 1024 - 3 * MIB - 512);
	CHECK(s.fragmentation > 0.18 && s.fragmentation < 0.20);
	CHECK_EQ(s.allocs, 3);
	CHECK_EQ(s.frees, 1);
	om_chunk_state(d, &st);
	CHECK_EQ(st.serial, 3);
	CHECK_EQ(st.held, 256);
	CHECK_EQ(st.uses, 1);
	CHECK(!st.label && st.created_ns && st.data == om_chunk_data(d));
	CHECK_EQ(om_bank_find(b, 3, &c), 0);
	CHECK(c == d);
	CHECK_EQ(om_bank_find(b, 2, &c), 0);
	CHECK(!c);
	give(b, a);
	close_bank(b, 1);
}

static void test_limit(void)
{
	struct om_bank *b = open_bank(4 * MIB);
	struct om_chunk *a = take(b, 3 * MIB), *c;

	CHECK_EQ(om_bank_set_limit(b, 2 * MIB), 0); /* nothing is taken away */
	refuse(b, 1, 1, OM_ELIMIT);
	CHECK_EQ(stats(b).free_bytes, 0);
	give(b, a);
	refuse(b, 2 * MIB + 1, 1, OM_ELIMIT);
	give(b, take(b, 2 * MIB));
	CHECK_EQ(om_bank_set_limit(b, 64 * MIB), 0); /* addresses beside those there are */
	a = take(b, 60 * MIB);
	c = take(b, 3 * MIB);
	CHECK_EQ(stats(b).held_bytes, 63 * MIB);
	give(b, a);
	give(b, c);
	CHECK_EQ(om_bank_set_limit(b, UINT64_C(1) << 60), 0); /* more than there are addresses */
	a = take(b, MIB);
	c = take(b, UINT64_C(100) << 30);
	memset(om_chunk_data(c), 1, 10);
	give(b, c);
	give(b, a);
	CHECK_EQ(om_bank_set_limit(b, UINT64_MAX), OM_EVALUE);
	close_bank(b, 0);
}

static void test_labels(void)
{
	struct om_bank *b = open_bank(MIB);
	struct om_chunk *c, **list;
	struct om_chunk_state st;
	size_t count;

	CHECK_EQ(om_bank_alloc(b, 10, 1, "first", &c), 0);
	CHECK_EQ(om_bank_alloc(b, 10, 1, "second", &c), 0);
	CHECK_EQ(om_bank_chunks(b, &list, &count), 0);
	CHECK_EQ(count, 2);
	om_chunk_state(list[0], &st);
	CHECK_EQ(strcmp(st.label, "first"), 0);
	CHECK_EQ(om_chunk_view_ref(list[0]), 0); /* used last now */
	om_free(list);
	CHECK_EQ(om_bank_chunks(b, &list, &count), 0);
	om_chunk_state(list[1], &st);
	CHECK_EQ(strcmp(st.label, "first"), 0);
	CHECK_EQ(st.uses, 2);
	CHECK_EQ(st.views, 1);
	om_chunk_view_unref(list[1]);
	om_free(list);
	give(b, c);
	CHECK_EQ(om_bank_alloc(b, 10, 1, NULL, &c), 0); /* a record anew has no old label */
	om_chunk_state(c, &st);
	CHECK(!st.label);
	close_bank(b, 2);
}

/* ---- views ---- */

static void test_views(void)
{
	struct om_bank *b = open_bank(8 * MIB);
	struct om_chunk *c = take(b, 6 * MIB), *d, *none;
	unsigned char *p = om_chunk_data(c);
	uint64_t chunks, bytes;

	memset(p, 7, 6 * MIB);
	CHECK_EQ(om_chunk_view_ref(c), 0);
	CHECK_EQ(om_chunk_view_ref(c), 0);
	CHECK_EQ(stats(b).exported_bytes, 6 * MIB);
	give(b, c);
	CHECK_EQ(om_bank_free(b, c), OM_EVALUE);
	CHECK_EQ(stats(b).used_bytes, 0);
	CHECK_EQ(stats(b).freed_bytes, 6 * MIB);
	refuse(b, 3 * MIB, 1, OM_ELIMIT); /* what somebody sees is not used again */
	om_chunk_view_unref(c);
	refuse(b, 3 * MIB, 1, OM_ELIMIT);
	CHECK_EQ(p[6 * MIB - 1], 7);
	om_chunk_view_unref(c);
	CHECK_EQ(stats(b).held_bytes, 0);
	CHECK_EQ(stats(b).exported_bytes, 0);
	c = take(b, 8 * MIB);
	give(b, c);
	c = take(b, MIB);
	d = take(b, MIB);
	p = om_chunk_data(c);
	memset(p, 9, MIB);
	CHECK_EQ(om_chunk_view_ref(c), 0);
	CHECK_EQ(om_chunk_view_ref(d), 0);
	CHECK_EQ(om_bank_free(b, d), 0);
	CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
	CHECK_EQ(chunks, 1);
	CHECK_EQ(bytes, MIB);
	CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
	CHECK_EQ(chunks, 0);
	CHECK_EQ(om_bank_alloc(b, 1, 1, NULL, &none), OM_ECLOSED);
	CHECK_EQ(om_bank_check(b), OM_ECLOSED);
	om_bank_unref(b);
	CHECK_EQ(p[MIB - 1], 9);
	om_chunk_view_unref(d);
	CHECK_EQ(p[0], 9);
	CHECK(mapped(p));
	om_chunk_view_unref(c);
}

/* The last view of a closed bank unmaps. */
static void test_view_past_close(void)
{
	struct om_bank *b = open_bank(8 * MIB);
	struct om_chunk *c = take(b, 100);
	char *p = om_chunk_data(c);

	CHECK_EQ(om_chunk_view_ref(c), 0);
	close_bank(b, 1);
	p[0] = 1;
	om_chunk_view_unref(c);
	CHECK(!mapped(p));
}

/* ---- pages ---- */

static void wait_ns(uint64_t ns)
{
	uint64_t until = om_deadline(ns);

	while (om_now() < until)
		usleep(1000);
}

static void test_decay(void)
{
	struct om_bank *b = open_as(24 * MIB, false, OM_NSEC / 10);
	struct om_chunk *c = take(b, 16 * MIB), *d = take(b, 4 * MIB);
	char *p = om_chunk_data(c);
	uint64_t given;

	memset(p, 1, 16 * MIB);
	memset(om_chunk_data(d), 2, 4 * MIB);
	CHECK(!om_bank_due(b));
	give(b, c);
	CHECK(!om_bank_due(b));
	CHECK_EQ(om_bank_decay(b), 0); /* not yet */
	CHECK_EQ(resident(p, 16 * MIB), 4096);
	wait_ns(OM_NSEC / 15);
	CHECK(om_bank_due(b));
	CHECK_EQ(om_bank_decay(b), 0); /* a first look */
	CHECK_EQ(resident(p, 16 * MIB), 4096);
	CHECK_EQ(om_bank_check(b), 0);
	CHECK_EQ(stats(b).mapped_bytes, 20 * MIB);
	c = take(b, 8 * MIB); /* in use again: stays */
	CHECK(om_chunk_data(c) == p);
	wait_ns(OM_NSEC / 15);
	CHECK_EQ(om_bank_decay(b), 0);
	CHECK_EQ(resident(p, 8 * MIB), 2048);
	CHECK_EQ(resident(p + 8 * MIB, 8 * MIB), 0);
	CHECK_EQ(stats(b).mapped_bytes, 12 * MIB);
	CHECK_EQ(om_bank_check(b), 0);
	give(b, c);
	CHECK_EQ(om_bank_trim(b, &given), 0);
	CHECK_EQ(given, 8 * MIB);
	CHECK_EQ(resident(p, 16 * MIB), 0);
	CHECK_EQ(((char *)om_chunk_data(d))[4 * MIB - 1], 2);
	CHECK_EQ(stats(b).mapped_bytes, 4 * MIB);
	give(b, d);
	close_bank(b, 0);
}

/* What of a page is in use keeps it. */
static void test_partial_pages(void)
{
	struct om_bank *b = open_bank(16 * MIB);
	struct om_chunk *a = take(b, 3 * MIB), *c = take(b, 3 * MIB), *d = take(b, 1000);
	uint64_t given;

	memset(om_chunk_data(a), 1, 3 * MIB);
	memset(om_chunk_data(c), 2, 3 * MIB);
	give(b, a);
	CHECK_EQ(om_bank_trim(b, &given), 0);
	CHECK_EQ(given, 2 * MIB);
	CHECK_EQ(((char *)om_chunk_data(c))[0], 2);
	give(b, c);
	CHECK_EQ(om_bank_trim(b, &given), 0);
	CHECK_EQ(given, 4 * MIB);
	CHECK_EQ(om_bank_trim(b, &given), 0);
	CHECK_EQ(given, 0);
	give(b, d);
	close_bank(b, 0);
}

static void test_at_once(void)
{
	struct om_bank_config config = { .name = "cpu",
		                         .limit_bytes = 16 * MIB,
		                         .decay_ns = 3600 * OM_NSEC,
		                         .most_fragmented = 0.3 };
	struct om_bank *b = open_as(16 * MIB, false, 0);
	struct om_chunk *c[8];

	c[0] = take(b, 4 * MIB);
	give(b, c[0]);
	CHECK(om_bank_due(b));
	CHECK_EQ(om_bank_decay(b), 0);
	CHECK_EQ(stats(b).mapped_bytes, 0);
	CHECK(!om_bank_due(b));
	close_bank(b, 0);
	CHECK_EQ(om_bank_create(&config, &b), 0);
	for (int i = 0; i < 8; i++)
		c[i] = take(b, 2 * MIB);
	give(b, c[0]);
	CHECK(!om_bank_due(b)); /* one hole */
	give(b, c[2]);
	CHECK(om_bank_due(b)); /* two of them: fragmentation 0.5 */
	CHECK_EQ(om_bank_decay(b), 0);
	CHECK_EQ(stats(b).mapped_bytes, 12 * MIB);
	CHECK_EQ(om_bank_set_limit(b, 4 * MIB), 0); /* over the limit */
	CHECK(om_bank_due(b));
	CHECK_EQ(om_bank_decay(b), 0);
	give(b, c[1]);
	CHECK(om_bank_due(b));
	CHECK_EQ(om_bank_decay(b), 0);
	CHECK_EQ(stats(b).mapped_bytes, 10 * MIB);
	close_bank(b, 5);
}

/* ---- locked memory ---- */

static void in_child(void (*run)(void))
{
	pid_t child = fork();
	int status;

	CHECK(child >= 0);
	if (!child) {
		run();
		exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 0);
}

static uint64_t locked_kib(void)
{
	FILE *f = fopen("/proc/self/status", "r");
	unsigned long long kib = 0;
	char line[256];

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "VmLck: %llu", &kib) == 1)
			break;
	CHECK(f && !fclose(f));
	return kib;
}

/* Sanitizers make munlock do nothing. */
#if defined(__SANITIZE_ADDRESS__) || OM_TSAN
#define UNLOCKS false
#else
#define UNLOCKS true
#endif

/* Without the right to lock as much as it likes. */
static void run_locked(void)
{
	struct rlimit limit = { 4 * MIB, 4 * MIB };
	struct om_bank *b;
	struct om_chunk *c;
	uint64_t given;

	if (geteuid() == 0)
		CHECK(!setuid(65534));
	CHECK(!setrlimit(RLIMIT_MEMLOCK, &limit));
	b = open_as(64 * MIB, true, 3600 * OM_NSEC);
	c = take(b, 1 * MIB);
	memset(om_chunk_data(c), 1, 1 * MIB);
	CHECK_EQ(locked_kib(), 1024); /* a step of 32 MiB was refused */
	give(b, take(b, 2 * MIB));
	refuse(b, 8 * MIB, 1, OM_ELIMIT);
	CHECK_EQ(strcmp(om_err_last()->which, "RLIMIT_MEMLOCK"), 0);
	CHECK_EQ(om_err_last()->limit, 4 * MIB);
	CHECK(strstr(om_err_last()->text, "ulimit -l"));
	CHECK_EQ(om_bank_trim(b, &given), 0);
	CHECK_EQ(om_bank_check(b), 0);
	CHECK(!UNLOCKS || locked_kib() == 2048);
	give(b, c);
	CHECK_EQ(om_bank_trim(b, &given), 0);
	CHECK(!UNLOCKS || locked_kib() == 0);
	close_bank(b, 0);
}

/* ---- victims ---- */

static size_t victims(struct om_bank *b, uint64_t bytes, struct om_chunk ***ret)
{
	size_t count;

	CHECK_EQ(om_bank_victims(b, bytes, 1, ret, &count), 0);
	return count;
}

static void test_victims(void)
{
	struct om_bank *b = open_bank(8 * MIB);
	struct om_chunk *c[8], **list;
	size_t count;

	CHECK_EQ(victims(b, 8 * MIB, &list), 0); /* there is room */
	CHECK(!list);
	for (int i = 0; i < 8; i++)
		c[i] = take(b, MIB);
	CHECK_EQ(victims(b, MIB, &list), 1);
	CHECK(list[0] == c[0]);
	om_free(list);
	CHECK_EQ(victims(b, 3 * MIB, &list), 3); /* with its neighbours, the oldest first */
	CHECK(list[0] == c[0] && list[1] == c[1] && list[2] == c[2]);
	om_free(list);
	CHECK_EQ(om_chunk_view_ref(c[1]), 0);    /* held, and used last */
	CHECK_EQ(victims(b, 2 * MIB, &list), 2); /* c[0] leads nowhere */
	CHECK(list[0] == c[2] && list[1] == c[3]);
	om_free(list);
	CHECK_EQ(om_bank_victims(b, 7 * MIB, 1, &list, &count), OM_ELIMIT);
	CHECK_EQ(victims(b, 6 * MIB, &list), 6);
	om_free(list);
	om_chunk_view_unref(c[1]);
	CHECK_EQ(om_chunk_view_ref(c[0]), 0); /* ages: 2 3 4 5 6 7 1 0 */
	om_chunk_view_unref(c[0]);
	CHECK_EQ(victims(b, 3 * MIB, &list), 3);
	CHECK(list[0] == c[2] && list[1] == c[3] && list[2] == c[4]);
	om_free(list);
	give(b, c[4]);
	CHECK_EQ(victims(b, 2 * MIB, &list), 2); /* and the hole behind them */
	CHECK(list[0] == c[2] && list[1] == c[3]);
	om_free(list);
	CHECK_EQ(om_bank_victims(b, 9 * MIB, 1, &list, &count), OM_ELIMIT);
	CHECK_EQ(om_bank_victims(b, 0, 1, &list, &count), OM_EVALUE);
	CHECK_EQ(om_bank_victims(b, UINT64_MAX, 1, &list, &count), OM_EVALUE);
	CHECK_EQ(om_bank_set_limit(b, 4 * MIB), 0); /* the limit wants more than a hole */
	CHECK_EQ(victims(b, MIB, &list), 4);
	om_free(list);
	close_bank(b, 7);
}

static void test_victims_aligned(void)
{
	struct om_bank *b = open_bank(8 * MIB);
	struct om_chunk *c[8], **list;
	size_t count;

	for (int i = 0; i < 8; i++)
		c[i] = take(b, MIB);
	CHECK_EQ(om_chunk_view_ref(c[0]), 0); /* an odd one is the oldest */
	om_chunk_view_unref(c[0]);
	CHECK_EQ(om_bank_victims(b, 2 * MIB, 2 * MIB, &list, &count), 0);
	for (size_t i = 0; i < count; i++)
		give(b, list[i]);
	om_free(list);
	take_aligned(b, 2 * MIB, 2 * MIB);
	close_bank(b, 9 - count);
}

/* The hole may reach into what is not committed yet. */
static void test_victims_at_the_end(void)
{
	struct om_bank *b = open_bank(64 * MIB);
	struct om_chunk *c[8], **list;

	for (int i = 0; i < 8; i++)
		c[i] = take(b, 4 * MIB);
	for (int i = 7; i >= 0; i--) { /* the last one is the oldest */
		CHECK_EQ(om_chunk_view_ref(c[i]), 0);
		om_chunk_view_unref(c[i]);
	}
	CHECK_EQ(victims(b, 32 * MIB, &list), 0);
	CHECK_EQ(victims(b, 40 * MIB, &list), 2);
	CHECK(list[0] == c[7] && list[1] == c[6]);
	om_free(list);
	give(b, c[7]);
	give(b, c[6]);
	give(b, take(b, 40 * MIB));
	close_bank(b, 6);
}

/* ---- a model ---- */

#define LIVE 64

struct entry {
	struct om_chunk *c;
	unsigned char *p;
	uint64_t bytes;
	unsigned char mark;
	bool freed;
	unsigned views;
};

static void entry_check(const struct entry *e)
{
	CHECK_EQ(e->p[0], e->mark);
	CHECK_EQ(e->p[e->bytes / 2], e->mark);
	CHECK_EQ(e->p[e->bytes - 1], e->mark);
}

static void entry_fill(struct entry *e)
{
	e->p = om_chunk_data(e->c);
	memset(e->p, e->mark, OM_MIN(e->bytes, 5000));
	e->p[e->bytes / 2] = e->mark;
	e->p[e->bytes - 1] = e->mark;
}

static void model_alloc(struct om_bank *b, struct entry *e, unsigned long long *seed)
{
	uint64_t bytes =
		1 + om_test_random(seed) % (UINT64_C(1) << (1 + om_test_random(seed) % 22));
	uint64_t align = UINT64_C(1) << om_test_random(seed) % 16;
	struct om_bank_stats s = stats(b);
	int code = om_bank_alloc(b, bytes, align, NULL, &e->c);

	if (code) {
		CHECK_EQ(code, OM_ELIMIT);
		CHECK(s.largest_bytes < om_up(bytes, 256) + (align > 256 ? align : 0));
		return;
	}
	CHECK(s.largest_bytes >= om_up(bytes, 256));
	CHECK_EQ((uintptr_t)om_chunk_data(e->c) % align, 0);
	*e = (struct entry){ e->c, NULL, bytes, (unsigned char)om_test_random(seed), false, 0 };
	entry_fill(e);
}

static void model_make_room(struct om_bank *b, struct entry *all, unsigned long long *seed)
{
	uint64_t bytes = 1 + om_test_random(seed) % (4 * MIB);
	uint64_t align = UINT64_C(1) << om_test_random(seed) % 22;
	struct om_chunk **list, *c;
	size_t count;

	if (om_bank_victims(b, bytes, align, &list, &count))
		return;
	for (size_t i = 0; i < count; i++)
		for (int k = 0; k < LIVE; k++)
			if (all[k].c == list[i] && !all[k].freed) {
				entry_check(&all[k]);
				CHECK_EQ(all[k].views, 0);
				give(b, all[k].c);
				all[k] = (struct entry){ 0 };
			}
	om_free(list);
	CHECK_EQ(om_bank_alloc(b, bytes, align, NULL, &c), 0);
	give(b, c);
}

static void model_step(struct om_bank *b, struct entry *all, unsigned long long *seed)
{
	struct entry *e = &all[om_test_random(seed) % LIVE];
	uint64_t bytes;

	switch (om_test_random(seed) % 16) {
	case 0:
		CHECK_EQ(om_bank_set_limit(b, om_test_random(seed) % (24 * MIB)), 0);
		break;
	case 1:
		CHECK_EQ(om_bank_trim(b, &bytes), 0);
		break;
	case 2:
		CHECK_EQ(om_bank_decay(b), 0);
		break;
	case 3:
		model_make_room(b, all, seed);
		break;
	case 4:
	case 5:
		if (e->c && !e->freed) {
			CHECK_EQ(om_chunk_view_ref(e->c), 0);
			e->views++;
		}
		break;
	case 6:
	case 7:
		if (e->views) {
			entry_check(e);
			om_chunk_view_unref(e->c);
			if (!--e->views && e->freed)
				*e = (struct entry){ 0 };
		}
		break;
	default:
		if (!e->c) {
			model_alloc(b, e, seed);
		} else if (!e->freed) {
			entry_check(e);
			CHECK_EQ(om_bank_free(b, e->c), 0);
			e->freed = true;
			if (!e->views)
				*e = (struct entry){ 0 };
		}
	}
}

static void test_model(unsigned long long seed, bool locked)
{
	struct om_bank *b = open_as(16 * MIB, locked, seed % 2 ? 0 : OM_NSEC / 500);
	struct entry all[LIVE] = { { 0 } };
	uint64_t chunks, bytes;

	for (int i = 0; i < 3000; i++) {
		uint64_t used = 0, held = 0;

		model_step(b, all, &seed);
		CHECK_EQ(om_bank_check(b), 0);
		for (int k = 0; k < LIVE; k++) {
			if (!all[k].c)
				continue;
			used += all[k].freed ? 0 : all[k].bytes;
			held += om_up(all[k].bytes, 256);
			if (i % 64 == 0)
				entry_check(&all[k]);
		}
		CHECK_EQ(stats(b).used_bytes, used);
		CHECK_EQ(stats(b).held_bytes, held);
	}
	CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
	for (int k = 0; k < LIVE; k++)
		for (; all[k].views; all[k].views--) {
			entry_check(&all[k]);
			om_chunk_view_unref(all[k].c);
		}
	om_bank_unref(b);
}

/* ---- faults ---- */

static bool fault_run(enum om_fault point, uint64_t nth, bool locked)
{
	struct om_bank_config config = {
		.name = "cpu", .limit_bytes = 80 * MIB, .locked = locked, .most_fragmented = 1
	};
	struct om_chunk *c[600] = { NULL }, **list;
	struct om_bank *b;
	size_t count;
	bool fired;
	int code;

	om_fault_arm(point, nth, false);
	code = om_bank_create(&config, &b);
	if (!code) {
		for (int i = 0; i < 600; i++) {
			code = om_bank_alloc(b, i == 300 ? 40 * MIB : 4096, 1, "label", &c[i]);
			CHECK(code == 0 || code == -ENOMEM || (locked && code == OM_EDEVICE));
			CHECK(!code == !!c[i]);
			if (code || i % 100 == 0)
				CHECK_EQ(om_bank_check(b), 0);
		}
		code = om_bank_victims(b, 79 * MIB, 1, &list, &count);
		CHECK(code == 0 || code == -ENOMEM || code == OM_ELIMIT); /* in two pieces */
		om_free(list);
		code = om_bank_chunks(b, &list, &count);
		CHECK(code == 0 || code == -ENOMEM);
		om_free(list);
		for (int i = 0; i < 600; i += 2)
			if (c[i])
				CHECK_EQ(om_bank_free(b, c[i]), 0);
		CHECK_EQ(om_bank_check(b), 0);
		fired = om_fault_fired(point);
		om_fault_reset();
		CHECK_EQ(om_bank_alloc(b, MIB, 1, NULL, &c[0]), 0);
		om_bank_unref(b);
	} else {
		CHECK_EQ(code, -ENOMEM);
		fired = om_fault_fired(point);
		om_fault_reset();
	}
	return fired;
}

static void test_faults(void)
{
	uint64_t n = 1, m = 1;

	while (fault_run(OM_FAULT_ALLOC, n, false))
		n++;
	while (fault_run(OM_FAULT_MAP, m, false))
		m++;
	CHECK(n > 10 && m > 1);
	for (m = 1; fault_run(OM_FAULT_MAP, m, true);)
		m++;
	CHECK(m > 2);
}

/* ---- threads ---- */

#define THREADS 8

struct worker {
	struct om_bank *b;
	unsigned long long seed;
	struct om_chunk *hand; /* atomic: to the next thread, which drops its view */
	struct worker *next;
	int rounds;
};

static void *work(void *arg)
{
	struct worker *w = arg;
	struct om_chunk *mine[16] = { NULL };

	for (int i = 0; i < w->rounds; i++) {
		int k = (int)(om_test_random(&w->seed) % 16);
		uint64_t bytes = 8 + om_test_random(&w->seed) % (MIB / 4);
		struct om_chunk *c = __atomic_exchange_n(&w->hand, NULL, __ATOMIC_ACQ_REL);

		if (c) {
			CHECK_EQ(*(uint64_t *)om_chunk_data(c), (uintptr_t)om_chunk_data(c));
			om_chunk_view_unref(c);
		}
		if (!mine[k]) {
			if (om_bank_alloc(w->b, bytes, 64, i % 3 ? NULL : "w", &mine[k]))
				continue;
			*(uint64_t *)om_chunk_data(mine[k]) = (uintptr_t)om_chunk_data(mine[k]);
			continue;
		}
		CHECK_EQ(*(uint64_t *)om_chunk_data(mine[k]), (uintptr_t)om_chunk_data(mine[k]));
		if (i % 2) {
			CHECK_EQ(om_chunk_view_ref(mine[k]), 0);
			c = __atomic_exchange_n(&w->next->hand, mine[k], __ATOMIC_ACQ_REL);
			if (c)
				om_chunk_view_unref(c);
		}
		CHECK_EQ(om_bank_free(w->b, mine[k]), 0);
		mine[k] = NULL;
		if (i % 64 == 0)
			CHECK_EQ(om_bank_decay(w->b), 0);
		if (i % 512 == 0)
			CHECK_EQ(om_bank_trim(w->b, &bytes), 0);
	}
	for (int k = 0; k < 16; k++)
		if (mine[k])
			CHECK_EQ(om_bank_free(w->b, mine[k]), 0);
	return NULL;
}

static void test_threads(void)
{
	struct om_bank *b = open_as(16 * MIB, false, 0);
	struct worker w[THREADS];
	pthread_t t[THREADS];

	for (int i = 0; i < THREADS; i++)
		w[i] = (struct worker){ b, 77 + (unsigned)i, NULL, &w[(i + 1) % THREADS], 4000 };
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&t[i], NULL, work, &w[i]));
	for (int i = 0; i < 20; i++) {
		CHECK_EQ(om_bank_check(b), 0);
		usleep(1000);
	}
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_join(t[i], NULL));
	for (int i = 0; i < THREADS; i++)
		if (w[i].hand)
			om_chunk_view_unref(w[i].hand);
	CHECK_EQ(om_bank_check(b), 0);
	CHECK_EQ(stats(b).held_bytes, 0);
	close_bank(b, 0);
}

static void *trim_on(void *arg)
{
	uint64_t bytes;
	int code;

	do
		code = om_bank_trim(arg, &bytes);
	while (!code);
	CHECK_EQ(code, OM_ECLOSED);
	om_bank_unref(arg);
	return NULL;
}

/* Pages that are on their way out are not given to anybody; closing waits for whoever gives them back. */
static void test_trim_beside(void)
{
	for (int round = 0; round < 20; round++) {
		struct om_bank *b = open_bank(64 * MIB);
		uint64_t chunks, bytes;
		pthread_t t[2];

		for (int i = 0; i < 2; i++) {
			om_bank_ref(b);
			CHECK(!pthread_create(&t[i], NULL, trim_on, b));
		}
		for (int i = 0; i < 20; i++) {
			struct om_chunk *c;
			volatile char *p;

			CHECK_EQ(om_bank_alloc(b, 64 * MIB, 1, NULL, &c), 0);
			p = om_chunk_data(c);
			for (uint64_t at = 64 * MIB; at;
			     at -= 2 * MIB) /* the last page leaves last */
				p[at - 1] = (char)(i + 1);
			sched_yield();
			for (uint64_t at = 64 * MIB; at; at -= 2 * MIB)
				CHECK_EQ(p[at - 1], i + 1);
			CHECK_EQ(om_bank_free(b, c), 0);
		}
		sched_yield();
		CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
		om_bank_unref(b);
		for (int i = 0; i < 2; i++)
			CHECK(!pthread_join(t[i], NULL));
	}
}

/* Views that go while the bank closes. */
static void *drop_views(void *arg)
{
	struct om_chunk **c = arg;

	for (int i = 0; i < 200; i++)
		om_chunk_view_unref(c[i]);
	return NULL;
}

static void test_close_race(void)
{
	for (int round = 0; round < 50; round++) {
		struct om_bank *b = open_bank(4 * MIB);
		struct om_chunk *c[2][200];
		uint64_t chunks, bytes;
		pthread_t t[2];

		for (int i = 0; i < 400; i++) {
			CHECK_EQ(om_bank_alloc(b, 5000, 1, NULL, &c[i / 200][i % 200]), 0);
			CHECK_EQ(om_chunk_view_ref(c[i / 200][i % 200]), 0);
			if (i % 3)
				CHECK_EQ(om_bank_free(b, c[i / 200][i % 200]), 0);
		}
		for (int i = 0; i < 2; i++)
			CHECK(!pthread_create(&t[i], NULL, drop_views, c[i]));
		CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
		CHECK_EQ(chunks, 134);
		om_bank_unref(b);
		for (int i = 0; i < 2; i++)
			CHECK(!pthread_join(t[i], NULL));
	}
}

static struct om_bank *inherited;
static struct om_chunk *inherited_chunk;

static void run_forked(void)
{
	struct om_bank *b = inherited, *own;
	struct om_chunk *c, **list;
	struct om_bank_stats s;
	uint64_t chunks, bytes;
	size_t count;

	CHECK_EQ(om_bank_alloc(b, 1, 1, NULL, &c), OM_ECLOSED);
	CHECK(strstr(om_err_last()->text, "fork"));
	CHECK_EQ(om_bank_free(b, inherited_chunk), OM_ECLOSED);
	CHECK_EQ(om_bank_stats(b, &s), OM_ECLOSED);
	CHECK_EQ(om_bank_trim(b, &bytes), OM_ECLOSED);
	CHECK_EQ(om_bank_decay(b), OM_ECLOSED);
	CHECK_EQ(om_bank_set_limit(b, 1), OM_ECLOSED);
	CHECK_EQ(om_bank_check(b), OM_ECLOSED);
	CHECK_EQ(om_bank_chunks(b, &list, &count), OM_ECLOSED);
	CHECK_EQ(om_bank_victims(b, 1, 1, &list, &count), OM_ECLOSED);
	CHECK_EQ(om_bank_close(b, &chunks, &bytes), 0);
	om_chunk_view_unref(inherited_chunk);
	om_bank_unref(b);
	own = open_bank(MIB);
	take(own, 10);
	close_bank(own, 1);
}

static void test_fork(void)
{
	inherited = open_bank(MIB);
	inherited_chunk = take(inherited, 10);
	CHECK_EQ(om_chunk_view_ref(inherited_chunk), 0);
	in_child(run_forked);
	om_chunk_view_unref(inherited_chunk);
	give(inherited, inherited_chunk);
	close_bank(inherited, 0);
}

int main(void)
{
	test_values();
	test_stats();
	test_limit();
	test_labels();
	test_views();
	test_view_past_close();
	test_decay();
	test_partial_pages();
	test_at_once();
	in_child(run_locked);
	test_victims();
	test_victims_aligned();
	test_victims_at_the_end();
	for (unsigned long long seed = 1; seed <= 6; seed++)
		test_model(seed, false);
	test_model(7, true);
	test_faults();
	test_threads();
	test_trim_beside();
	test_close_race();
	test_fork();
	return 0;
}
