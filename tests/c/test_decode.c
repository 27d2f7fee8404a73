/* Blocks whose bytes are encoded, in memory or in a file: fills that decode, streams that keep forms;
 * both back ends, threads, faults swept one by one. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define SOON   om_deadline(20 * OM_NSEC)
#define BLOCKS 6
#define BYTES  (UINT64_C(700) * 1024 + 2) /* the last part of a form is a short one */

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static char path[256], plain_path[256];
static uint8_t plain[BLOCKS][BYTES]; /* as bf16 weights are */
static uint64_t form_at[BLOCKS], form_bytes[BLOCKS];
static int backend;

static struct om_store *open_store(uint64_t host, uint64_t disk)
{
	struct om_store_config c = { .host_limit_bytes = host,
		                     .disk_limit_bytes = disk,
		                     .directory = dir,
		                     .backend = backend };
	struct om_store *s = NULL;

	return om_store_create(&c, &s) ? NULL : s;
}

static void check(struct om_store *s)
{
	CHECK_EQ(om_store_check(s), 0);
}

static const char *name_of(int i)
{
	static const char *const names[BLOCKS] = { "b0", "b1", "b2", "b3", "b4", "b5" };

	return names[i];
}

static int look(struct om_store *s, int i)
{
	struct om_lease *l;
	int code = om_store_lease(s, name_of(i), OM_READ, SOON, &l);

	if (code)
		return code;
	CHECK_EQ(om_lease_nbytes(l), BYTES);
	CHECK(memcmp(om_lease_data(l), plain[i], BYTES) == 0);
	om_lease_unref(l);
	return 0;
}

static unsigned tiers(struct om_store *s, int i)
{
	struct om_info info;

	CHECK_EQ(om_store_info(s, name_of(i), &info), 0);
	return info.tiers;
}

/* Two frames a block: of its first 300 KB, and of the rest. */
static void make_files(void)
{
	unsigned long long seed = 3;
	FILE *f = fopen(path, "wb");
	uint8_t *form = malloc(om_encode_bound(BYTES));

	CHECK(f && form);
	for (int i = 0; i < BLOCKS; i++) {
		uint16_t *element = (uint16_t *)(void *)plain[i];
		uint64_t cut = UINT64_C(300) * 1024, n;

		for (size_t k = 0; k < BYTES / 2; k++) {
			double u = (double)(om_test_random(&seed) >> 11) * 0x1p-53;
			float x = (float)(0.02 * sqrt(-2 * log(1 - u)));
			uint32_t bits;

			memcpy(&bits, &x, 4);
			element[k] = (uint16_t)(bits >> 16 | (om_test_random(&seed) & 0x8000));
		}
		fwrite("pad", 1, 3, f); /* forms lie anywhere in a file */
		form_at[i] = (uint64_t)ftell(f);
		CHECK_EQ(om_encode(plain[i], cut, NULL, OM_CODING_FAST, form,
		                   om_encode_bound(BYTES), &n),
		         0);
		CHECK(n && fwrite(form, 1, n, f) == n);
		form_bytes[i] = n;
		CHECK_EQ(om_encode(plain[i] + cut, BYTES - cut, NULL, OM_CODING_BALANCED, form,
		                   om_encode_bound(BYTES), &n),
		         0);
		CHECK(n && fwrite(form, 1, n, f) == n);
		form_bytes[i] += n;
	}
	CHECK(fclose(f) == 0);
	free(form);
	f = fopen(plain_path, "wb");
	CHECK(f && fwrite("plain", 1, 5, f) == 5 &&
	      fwrite(plain, 1, sizeof(plain), f) == sizeof(plain));
	CHECK(fclose(f) == 0);
}

static int add_form(struct om_store *s, int i, const char *group)
{
	struct om_file_range r = { path, form_at[i], form_bytes[i] };

	return om_store_add_file(s, name_of(i), group, &r, 1, BYTES, NULL);
}

/* ---- in memory ---- */

static void kept_in_memory(void)
{
	struct om_store *s = open_store(16 << 20, 16 << 20);
	struct om_stats stats;
	struct om_lease *l;
	uint64_t n;

	CHECK(s);
	CHECK_EQ(om_store_add(s, "b0", NULL, plain[0], BYTES, NULL, SOON), 0);
	CHECK_EQ(om_store_encode(s, "b0", OM_CODING_FAST, SOON, &n), 0);
	CHECK(n > BYTES / 2 && n < BYTES * 3 / 4);
	CHECK_EQ(tiers(s, 0), OM_TIER_HOST | OM_TIER_PACKED);
	check(s);
	CHECK_EQ(om_store_evict(s, "b0", SOON), 1);
	CHECK_EQ(tiers(s, 0), OM_TIER_PACKED);
	CHECK_EQ(look(s, 0), 0);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK(stats.packed_bytes >= n && stats.packed_bytes < n + 4096);
	CHECK_EQ(stats.written_bytes, 0);
	/* Who writes makes the memory the only copy. */
	CHECK_EQ(om_store_lease(s, "b0", OM_WRITE, SOON, &l), 0);
	check(s);
	CHECK_EQ(tiers(s, 0), OM_TIER_HOST);
	memset(om_lease_data(l), 7, 100);
	om_lease_unref(l);
	CHECK_EQ(om_store_evict(s, "b0", SOON), 1);
	CHECK_EQ(om_store_lease(s, "b0", OM_READ, SOON, &l), 0);
	CHECK(((uint8_t *)om_lease_data(l))[99] == 7);
	CHECK(memcmp((uint8_t *)om_lease_data(l) + 100, plain[0] + 100, BYTES - 100) == 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_remove(s, "b0"), 0);
	check(s);
	om_store_unref(s);
}

static void not_worth_it(void)
{
	static uint8_t noise[BYTES];
	unsigned long long seed = 9;
	struct om_store *s = open_store(16 << 20, 0);
	uint64_t n = 1;

	for (size_t i = 0; i < BYTES; i++)
		noise[i] = (uint8_t)(om_test_random(&seed) >> 24);
	CHECK_EQ(om_store_add(s, "b1", NULL, noise, BYTES, NULL, SOON), 0);
	CHECK_EQ(om_store_encode(s, "b1", OM_CODING_BALANCED, SOON, &n), 0);
	CHECK_EQ(n, 0);
	CHECK_EQ(tiers(s, 1), OM_TIER_HOST);
	CHECK_EQ(om_store_encode(s, "none", OM_CODING_FAST, SOON, &n), OM_ENAME);
	check(s);
	om_store_unref(s);
}

/* Forms go to the disk and come back like any bytes, when memory is short. */
static void forms_are_swapped(void)
{
	struct om_store *s = open_store(2 << 20, 16 << 20);
	struct om_stats stats;
	uint64_t n;

	for (int i = 0; i < BLOCKS; i++) {
		CHECK_EQ(om_store_add(s, name_of(i), NULL, plain[i], BYTES, NULL, SOON), 0);
		if (i % 2)
			CHECK_EQ(om_store_encode(s, name_of(i), OM_CODING_FAST, SOON, &n), 0);
		check(s);
	}
	for (int round = 0; round < 3; round++)
		for (int i = 0; i < BLOCKS; i++) {
			CHECK_EQ(look(s, (i * 5) % BLOCKS), 0);
			check(s);
		}
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK(stats.written_bytes > 0 && stats.corrupt == 0);
	om_store_unref(s);
}

/* ---- in a file ---- */

static void origins_are_decoded(void)
{
	struct om_store *s = open_store(3 << 20, 0);
	const char *names[BLOCKS];
	struct om_stats before, after;
	struct om_ticket *t;
	struct om_lease *l;

	for (int i = 0; i < BLOCKS; i++) {
		CHECK_EQ(add_form(s, i, NULL), 0);
		names[i] = name_of(i);
	}
	check(s);
	for (int round = 0; round < 2; round++)
		for (int i = 0; i < BLOCKS; i++) {
			CHECK_EQ(look(s, i), 0);
			check(s);
		}
	/* A prefetch brings the form, not what it decodes to. */
	CHECK_EQ(om_store_evict(s, "b0", SOON), 1);
	CHECK_EQ(om_store_prefetch(s, names, 1, &t), 0);
	CHECK_EQ(om_ticket_wait(t, SOON), 0);
	om_ticket_free(t);
	CHECK_EQ(tiers(s, 0), OM_TIER_PACKED);
	CHECK_EQ(om_store_stats(s, &before), 0);
	CHECK_EQ(look(s, 0), 0);
	CHECK_EQ(om_store_stats(s, &after), 0);
	CHECK_EQ(before.read_bytes, after.read_bytes);
	CHECK_EQ(after.prefetch_hits, 1);
	CHECK_EQ(tiers(s, 0), OM_TIER_HOST); /* it can be read again: no need to keep it */
	/* Without room to write it out, it cannot be written to: nobody else would have the bytes. */
	CHECK_EQ(om_store_lease(s, "b0", OM_WRITE, SOON, &l), 0);
	check(s);
	om_lease_unref(l);
	CHECK_EQ(tiers(s, 0), OM_TIER_HOST);
	CHECK_EQ(om_store_remove(s, "b0"), 0);
	check(s);
	om_store_unref(s);
}

static void write_at(uint64_t at, const void *bytes, size_t n)
{
	int fd = open(path, O_WRONLY);

	CHECK(fd >= 0 && pwrite(fd, bytes, n, (off_t)at) == (ssize_t)n);
	CHECK(close(fd) == 0);
}

static uint8_t byte_at(uint64_t at)
{
	int fd = open(path, O_RDONLY);
	uint8_t byte;

	CHECK(fd >= 0 && pread(fd, &byte, 1, (off_t)at) == 1);
	CHECK(close(fd) == 0);
	return byte;
}

/* Any one byte of a form that changes is seen, also where it decodes all the same. */
static void damage_is_seen(void)
{
	for (uint64_t at = form_at[2]; at < form_at[2] + form_bytes[2]; at += 39119) {
		uint8_t was = byte_at(at), is = was ^ 0x10;
		struct om_store *s;
		int code;

		write_at(at, &is, 1);
		s = open_store(8 << 20, 0);
		CHECK_EQ(add_form(s, 2, NULL), 0);
		code = look(s, 2); /* of right bytes, if it is a byte that does not count */
		CHECK(code == 0 || code == OM_ECORRUPT);
		CHECK(!code || strstr(om_err_last()->text, "b2"));
		check(s);
		om_store_unref(s);
		write_at(at, &was, 1);
	}
}

static void wrong_sizes(void)
{
	struct om_store *s = open_store(8 << 20, 0);
	struct om_file_range whole = { path, form_at[1], form_bytes[1] },
			     cut = { path, form_at[1], form_bytes[1] - 1 };
	struct om_lease *l;

	CHECK_EQ(om_store_add_file(s, "more", NULL, &whole, 1, BYTES + 1, NULL), 0);
	CHECK_EQ(om_store_add_file(s, "less", NULL, &whole, 1, BYTES - 1, NULL), 0);
	CHECK_EQ(om_store_add_file(s, "none", NULL, &whole, 1, 0, NULL), 0);
	CHECK_EQ(om_store_add_file(s, "cut", NULL, &cut, 1, BYTES, NULL), 0);
	for (int i = 0; i < 4; i++) {
		const char *name = (const char *[]){ "more", "less", "none", "cut" }[i];

		for (int again = 0; again < 2; again++) {
			CHECK_EQ(om_store_lease(s, name, OM_READ, SOON, &l), OM_ECORRUPT);
			CHECK(strstr(om_err_last()->text, name));
			check(s);
		}
		CHECK_EQ(om_store_remove(s, name), 0);
	}
	check(s);
	om_store_unref(s);
}

/* ---- threads ---- */

struct worker {
	struct om_store *s;
	unsigned long long seed;
};

static void *lease_and_evict(void *arg)
{
	struct worker *w = arg;

	for (int i = 0; i < 60; i++) {
		unsigned long long r = om_test_random(&w->seed);
		int b = (int)(r % BLOCKS);
		uint64_t n;

		if (r >> 8 & 1)
			CHECK_EQ(look(w->s, b), 0);
		else if (r >> 9 & 1)
			CHECK(om_store_evict(w->s, name_of(b), SOON) >= 0);
		else if (r >> 10 & 1)
			om_store_encode(w->s, name_of(b), OM_CODING_FAST, SOON, &n);
		check(w->s);
	}
	return NULL;
}

static void threads(void)
{
	struct om_store *s = open_store(6 << 20, 16 << 20);
	struct worker workers[4];
	pthread_t ids[4];

	for (int i = 0; i < BLOCKS; i++)
		CHECK_EQ(i % 2 ? add_form(s, i, NULL)
		               : om_store_add(s, name_of(i), NULL, plain[i], BYTES, NULL, SOON),
		         0);
	for (size_t i = 0; i < 4; i++) {
		workers[i] = (struct worker){ s, i + 1 };
		CHECK(pthread_create(&ids[i], NULL, lease_and_evict, &workers[i]) == 0);
	}
	for (size_t i = 0; i < 4; i++)
		pthread_join(ids[i], NULL);
	for (int i = 0; i < BLOCKS; i++)
		CHECK_EQ(look(s, i), 0);
	om_store_unref(s);
}

/* ---- streams ---- */

struct model {
	struct om_store *s;
	struct om_stream *st;
};

/* A unit a block. What is kept: a letter a block. 'e', 'E': from encoded files, kept not, or fast. */
static int open_model(struct model *m, const char *kept, uint64_t limit, uint64_t ring)
{
	struct om_stream_unit units[BLOCKS];
	const char *names[BLOCKS];
	uint8_t keep[BLOCKS];
	int code;

	m->st = NULL;
	m->s = open_store(limit + (4 << 20), 0);
	if (!m->s)
		return om_err_last()->code;
	code = om_store_group(m->s, "m", limit);
	for (int i = 0; i < BLOCKS && !code; i++) {
		struct om_file_range r = { plain_path, 5 + (uint64_t)i * BYTES, BYTES };

		keep[i] = kept[i] == 'p'                     ? OM_KEEP_PLAIN
		          : kept[i] == 'f' || kept[i] == 'E' ? OM_KEEP_FAST
		                                             : OM_KEEP_NOTHING;
		names[i] = name_of(i);
		code = kept[i] == 'e' || kept[i] == 'E'
		               ? add_form(m->s, i, "m")
		               : om_store_add_file(m->s, names[i], "m", &r, 1, OM_NOT_ENCODED,
		                                   NULL);
		units[i] = (struct om_stream_unit){ names[i], &names[i], &keep[i], 1 };
	}
	code = code ? code : om_stream_create(m->s, "m", units, BLOCKS, &m->st);
	code = code ? code : om_stream_reserve(m->st, ring);
	return code ? code : om_stream_load(m->st, SOON);
}

static void close_model(struct model *m)
{
	om_stream_free(m->st);
	if (m->s) {
		check(m->s);
		om_store_unref(m->s);
	}
}

static int visit(struct model *m, int i)
{
	bool bind, unbind;
	int code = om_stream_enter(m->st, (size_t)i, SOON, &bind);

	if (code)
		return code;
	if (bind)
		om_stream_bound(m->st, (size_t)i, true);
	check(m->s);
	CHECK(memcmp(om_lease_data(om_stream_lease(m->st, (size_t)i, 0)), plain[i], BYTES) == 0);
	CHECK_EQ(om_stream_leave(m->st, (size_t)i, &unbind), 0);
	if (unbind)
		om_stream_unbound(m->st, (size_t)i);
	check(m->s);
	return 0;
}

static void a_stream_keeps(const char *kept)
{
	uint64_t slot = om_up(BYTES, 4096) + 8192, limit = (uint64_t)BLOCKS * slot + 2 * slot;
	struct om_stream_stats stats;
	struct om_stats store;
	struct model m;
	uint64_t read;
	int encoded = 0, read_each_time = 0, decoded = 0;

	CHECK_EQ(open_model(&m, kept, limit, 2 * slot), 0);
	check(m.s);
	for (int i = 0; i < BLOCKS; i++) {
		encoded += kept[i] == 'f' || kept[i] == 'E';
		read_each_time += kept[i] == 'n' || kept[i] == 'e';
		decoded += kept[i] != 'p' && kept[i] != 'n';
	}
	CHECK_EQ(om_stream_stats(m.st, &stats), 0);
	CHECK((stats.packed_bytes > 0) == (encoded > 0));
	CHECK(stats.packed_bytes < (uint64_t)encoded * BYTES * 3 / 4 + 1);
	read = stats.read_bytes;
	for (int round = 0; round < 3; round++)
		for (int i = 0; i < BLOCKS; i++)
			CHECK_EQ(visit(&m, i), 0);
	CHECK_EQ(om_stream_stats(m.st, &stats), 0);
	CHECK((stats.read_bytes > read) == (read_each_time > 0));
	CHECK(stats.decoded_bytes >= 3 * (uint64_t)decoded * BYTES);
	for (int i = 0; i < BLOCKS; i++)
		CHECK_EQ(om_stream_forget(m.st, (size_t)i), 0);
	CHECK_EQ(om_stream_stats(m.st, &stats), 0);
	CHECK_EQ(stats.packed_bytes, 0);
	CHECK_EQ(om_store_stats(m.s, &store), 0);
	if (!strpbrk(kept, "eE")) /* those are read ahead */
		CHECK_EQ(store.packed_bytes, 0);
	for (int i = 0; i < BLOCKS; i++)
		CHECK_EQ(visit(&m, i), 0);
	close_model(&m);
}

/* What is kept encoded leaves the ring its room, and what has no room streams. */
static void a_stream_keeps_its_ring(void)
{
	uint64_t slot = om_up(BYTES, 4096) + 8192;
	struct om_stream_stats stats;
	struct om_stats store;
	struct model m;

	CHECK_EQ(open_model(&m, "ffffff", 4 * slot, 2 * slot), 0);
	CHECK_EQ(om_stream_stats(m.st, &stats), 0);
	CHECK(stats.packed_bytes > slot && stats.packed_bytes <= 2 * slot);
	for (int round = 0; round < 3; round++)
		for (int i = 0; i < BLOCKS; i++)
			CHECK_EQ(visit(&m, i), 0);
	CHECK_EQ(om_store_stats(m.s, &store), 0);
	CHECK(store.host.peak_bytes <= 4 * slot);
	close_model(&m);
}

/* ---- faults ---- */

static bool faulty_store(enum om_fault point, uint64_t nth, bool sticky)
{
	struct om_store *s;
	bool added[2] = { false }, fired;
	uint64_t n;

	om_fault_arm(point, nth, sticky);
	s = open_store(4 << 20, 8 << 20);
	if (s) {
		added[0] = !om_store_add(s, "b0", NULL, plain[0], BYTES, NULL, SOON);
		added[1] = !add_form(s, 1, NULL);
		for (int round = 0; round < 2; round++) {
			if (added[0])
				om_store_encode(s, "b0", OM_CODING_FAST, om_now(), &n);
			for (int i = 0; i < 2; i++) {
				if (added[i])
					look(s, i);
				check(s);
				if (added[i])
					om_store_evict(s, name_of(i), om_now());
				check(s);
			}
		}
	}
	fired = om_fault_fired(point) > 0;
	om_fault_reset();
	CHECK(s || fired);
	for (int i = 0; i < 2 && s; i++) /* healed: what was accepted is there */
		if (added[i])
			CHECK_EQ(look(s, i), 0);
	if (s)
		check(s);
	om_store_unref(s);
	return fired;
}

static bool faulty_model(enum om_fault point, uint64_t nth, bool sticky)
{
	static const char kept[] = "pfEnef";
	uint64_t slot = om_up(BYTES, 4096) + 8192;
	struct model m;
	bool fired, opened;

	om_fault_arm(point, nth, sticky);
	opened = !open_model(&m, kept, 8 * slot, 2 * slot);
	for (int i = 0; i < BLOCKS && opened; i++)
		visit(&m, i);
	fired = om_fault_fired(point) > 0;
	om_fault_reset();
	CHECK(opened || fired);
	for (int i = 0; i < BLOCKS && opened; i++)
		CHECK_EQ(visit(&m, i), 0);
	close_model(&m);
	return fired;
}

static void sweep(bool (*run)(enum om_fault, uint64_t, bool))
{
	static const enum om_fault points[] = { OM_FAULT_ALLOC, OM_FAULT_MAP,   OM_FAULT_SUBMIT,
		                                OM_FAULT_READ,  OM_FAULT_SHORT, OM_FAULT_THREAD };

	for (size_t i = 0; i < sizeof(points) / sizeof(*points); i++)
		for (int sticky = 0; sticky < 2; sticky++) {
			if (sticky && (points[i] == OM_FAULT_SUBMIT || points[i] == OM_FAULT_SHORT))
				continue; /* for ever "try later" is no fault of ours to answer */
			for (uint64_t nth = 1; run(points[i], nth, sticky); nth++)
				CHECK(nth < 2000);
		}
}

int main(void)
{
	const char *io = getenv("OMNIMEM_IO");

	alarm(250);
	backend = io && !strcmp(io, "threads") ? 2 : io && !strcmp(io, "uring") ? 1 : 0;
	CHECK(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/file", dir);
	snprintf(plain_path, sizeof(plain_path), "%s/plain", dir);
	make_files();
	kept_in_memory();
	not_worth_it();
	forms_are_swapped();
	origins_are_decoded();
	damage_is_seen();
	wrong_sizes();
	threads();
	a_stream_keeps("pppppp");
	a_stream_keeps("ffffff");
	a_stream_keeps("eeeeee");
	a_stream_keeps("EEEEEE");
	a_stream_keeps("pfnefE");
	a_stream_keeps_its_ring();
	sweep(faulty_store);
	sweep(faulty_model);
	unlink(path);
	unlink(plain_path);
	CHECK(rmdir(dir) == 0);
	return 0;
}
