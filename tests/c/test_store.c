/* The store: adding, evicting, reading in place, both back ends, faults swept one by one. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define SOON om_deadline(10 * OM_NSEC)

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static char path[256];
static uint8_t image[8 << 20];
static int backend;

static struct om_store *open_store(uint64_t host, uint64_t disk)
{
	struct om_store_config c = { .host_limit_bytes = host,
		                     .disk_limit_bytes = disk,
		                     .directory = dir,
		                     .backend = backend };
	struct om_store *s;
	int code = om_store_create(&c, &s);

	if (code)
		fprintf(stderr, "%s\n", om_err_last()->text);
	CHECK(code == 0);
	return s;
}

static void check(struct om_store *s)
{
	if (om_store_check(s)) {
		fprintf(stderr, "%s\n", om_err_last()->text);
		CHECK(!"invariant");
	}
}

static void expect_bytes(struct om_store *s, const char *name, const uint8_t *bytes, uint64_t n)
{
	struct om_lease *l;
	int code = om_store_lease(s, name, false, SOON, &l);

	if (code)
		fprintf(stderr, "%s: %s\n", name, om_err_last()->text);
	CHECK(code == 0);
	CHECK(om_lease_nbytes(l) == n);
	CHECK(memcmp(om_lease_data(l), bytes, n) == 0);
	CHECK((uintptr_t)om_lease_data(l) % 64 == 0);
	om_lease_unref(l);
	check(s);
}

static void make_file(void)
{
	FILE *f;

	for (size_t i = 0; i < sizeof(image); i++)
		image[i] = (uint8_t)(i * 2654435761u >> 13);
	snprintf(path, sizeof(path), "%s/file", dir);
	f = fopen(path, "wb");
	CHECK(f && fwrite(image, 1, sizeof(image), f) == sizeof(image));
	CHECK(fclose(f) == 0);
}

static void swap_round_trip(void)
{
	struct om_store *s = open_store(4 << 20, 64 << 20);
	char name[16];

	for (int i = 0; i < 24; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		CHECK(om_store_add(s, name, NULL, image + i * 1000, 700000 + i, NULL, SOON) == 0);
		check(s);
	}
	for (int round = 0; round < 3; round++)
		for (int i = 0; i < 24; i++) {
			snprintf(name, sizeof(name), "b%d", (i * 7) % 24);
			expect_bytes(s, name, image + ((i * 7) % 24) * 1000, 700000 + (i * 7) % 24);
		}
	CHECK(om_store_evict(s, "b3", SOON) == 1);
	expect_bytes(s, "b3", image + 3000, 700003);
	CHECK(om_store_remove(s, "b3") == 0);
	CHECK(om_store_remove(s, "b3") == OM_ENAME);
	check(s);
	CHECK(om_store_close(s) == 0);
	om_store_unref(s);
}

static void read_in_place(void)
{
	struct om_store *s = open_store(4 << 20, 0);
	struct om_file_range one = { path, 12345, 1500000 };
	struct om_file_range three[] = { { path, 100, 5000 },
		                         { path, 1000000, 777 },
		                         { path, 3000001, 70001 } };
	struct om_file_range none = { path, 4096, 0 }, beyond = { path, sizeof(image) - 10, 11 };
	uint8_t *joined = malloc(5000 + 777 + 70001);
	struct om_stats before, after;
	struct om_lease *l;

	memcpy(joined, image + 100, 5000);
	memcpy(joined + 5000, image + 1000000, 777);
	memcpy(joined + 5777, image + 3000001, 70001);
	CHECK(om_store_add_file(s, "one", NULL, &one, 1, OM_NOT_ENCODED, NULL) == 0);
	CHECK(om_store_add_file(s, "one", NULL, &one, 1, OM_NOT_ENCODED, NULL) == OM_EVALUE);
	CHECK(om_store_add_file(s, "three", NULL, three, 3, OM_NOT_ENCODED, NULL) == 0);
	CHECK(om_store_add_file(s, "none", NULL, &none, 1, OM_NOT_ENCODED, NULL) == 0);
	CHECK(om_store_add_file(s, "beyond", NULL, &beyond, 1, OM_NOT_ENCODED, NULL) == OM_EVALUE);
	for (int i = 0; i < 3; i++) {
		expect_bytes(s, "one", image + 12345, 1500000);
		expect_bytes(s, "three", joined, 75778);
		expect_bytes(s, "none", image, 0);
		CHECK(om_store_evict(s, "one", SOON) == 1);
		CHECK(om_store_evict(s, "three", SOON) == 1);
	}
	CHECK(om_store_stats(s, &before) == 0);
	CHECK(before.written_bytes == 0 && before.corrupt == 0);
	om_fault_arm(OM_FAULT_FLIP, 1, false);
	expect_bytes(s, "one", image + 12345, 1500000); /* read once more */
	CHECK(om_store_stats(s, &after) == 0);
	CHECK(after.rereads == 1 && after.corrupt == 1);
	CHECK(om_store_evict(s, "one", SOON) == 1);
	om_fault_arm(OM_FAULT_FLIP, 1, true);
	CHECK(om_store_lease(s, "one", false, SOON, &l) == OM_ECORRUPT);
	om_fault_reset();
	check(s);
	expect_bytes(s, "one", image + 12345, 1500000);
	CHECK(om_store_lease(s, "three", true, SOON, &l) == 0);
	memset(om_lease_data(l), 7, 75778);
	memset(joined, 7, 75778);
	om_lease_unref(l);
	check(s);
	expect_bytes(s, "three", joined, 75778);
	CHECK(truncate(path, 2000000) == 0);
	CHECK(om_store_evict(s, "one", SOON) == 1);
	CHECK(om_store_lease(s, "one", false, SOON, &l) == OM_ECORRUPT);
	CHECK(strstr(om_err_last()->text, "file"));
	check(s);
	make_file();
	free(joined);
	om_store_unref(s);
}

/* Bytes are moved to where they belong whether they are hashed or not. */
static void moved_without_a_hash(void)
{
	struct om_store_config c = { .host_limit_bytes = 8 << 20,
		                     .directory = dir,
		                     .backend = backend,
		                     .verify = OM_VERIFY_FIRST,
		                     .request_bytes = 64 << 10 };
	struct om_file_range two[] = { { path, 4095, 1200003 }, { path, 1300001, 900000 } };
	uint8_t *joined = malloc(2100003);
	struct om_stats before, after;
	struct om_store *s;

	memcpy(joined, image + 4095, 1200003);
	memcpy(joined + 1200003, image + 1300001, 900000);
	CHECK_EQ(om_store_create(&c, &s), 0);
	CHECK_EQ(om_store_add_file(s, "two", NULL, two, 2, OM_NOT_ENCODED, NULL), 0);
	for (int i = 0; i < 2; i++) {
		expect_bytes(s, "two", joined, 2100003);
		CHECK_EQ(om_store_evict(s, "two", SOON), 1);
	}
	CHECK_EQ(om_store_stats(s, &before), 0);
	for (int i = 0; i < 3; i++) {
		expect_bytes(s, "two", joined, 2100003);
		CHECK_EQ(om_store_evict(s, "two", SOON), 1);
	}
	CHECK_EQ(om_store_stats(s, &after), 0);
	CHECK_EQ(after.verified_bytes, before.verified_bytes);
	check(s);
	free(joined);
	om_store_unref(s);
}

/* One run of everything with a fault armed: each step may fail, none may give wrong bytes. */
static int faulty_run(enum om_fault point, uint64_t nth, bool sticky)
{
	struct om_store_config c = { .host_limit_bytes = 2 << 20,
		                     .disk_limit_bytes = 64 << 20,
		                     .directory = dir,
		                     .backend = backend };
	struct om_file_range range = { path, 12345, 900000 };
	struct om_store *s;
	char name[16];
	bool added[4] = { false };
	int fired;

	om_fault_arm(point, nth, sticky);
	if (om_store_create(&c, &s)) {
		fired = om_fault_fired(point) > 0;
		om_fault_reset();
		CHECK(fired);
		return fired;
	}
	for (int i = 0; i < 4; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		added[i] = !om_store_add(s, name, NULL, image + i, 900000, NULL, SOON);
		check(s);
	}
	added[0] = added[0] && om_store_contains(s, "b0");
	/* The first fill of an origin is what later ones are compared with: a flip in it goes unseen. */
	bool file = point != OM_FAULT_FLIP &&
	            !om_store_add_file(s, "file", NULL, &range, 1, OM_NOT_ENCODED, NULL);
	for (int i = 0; i < 5; i++) {
		struct om_lease *l;

		snprintf(name, sizeof(name), "b%d", i);
		if (i == 4 ? !file : !added[i])
			continue;
		if (om_store_lease(s, i == 4 ? "file" : name, false, SOON, &l) == 0) {
			CHECK(memcmp(om_lease_data(l), i == 4 ? image + 12345 : image + i,
			             900000) == 0);
			om_lease_unref(l);
		}
		check(s);
	}
	fired = om_fault_fired(point) > 0;
	om_fault_reset();
	/* healed: everything that was accepted is there */
	for (int i = 0; i < 4; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		if (added[i])
			expect_bytes(s, name, image + i, 900000);
	}
	if (file)
		expect_bytes(s, "file", image + 12345, 900000);
	om_store_unref(s);
	return fired;
}

static void sweep(void)
{
	for (int point = 0; point < OM_FAULT_COUNT; point++)
		for (int sticky = 0; sticky < 2; sticky++) {
			if (sticky && (point == OM_FAULT_SUBMIT || point == OM_FAULT_SHORT))
				continue; /* for ever "try later" is no fault of ours to answer */
			for (uint64_t nth = 1; faulty_run((enum om_fault)point, nth, sticky); nth++)
				CHECK(nth < 2000);
		}
}

static void views_outlive_the_store(void)
{
	struct om_store *s = open_store(4 << 20, 0);
	struct om_lease *l, *small;

	CHECK(om_store_add(s, "a", NULL, image, 900000, NULL, SOON) == 0);
	CHECK(om_store_add(s, "s", NULL, image + 5, 100, NULL, SOON) == 0);
	CHECK(om_store_lease(s, "a", false, SOON, &l) == 0);
	CHECK(om_store_lease(s, "s", false, SOON, &small) == 0);
	om_lease_view_ref(l);
	CHECK(om_store_close(s) == 0);
	CHECK(om_store_contains(s, "a") == false);
	CHECK(memcmp(om_lease_data(l), image, 900000) == 0);
	CHECK(memcmp(om_lease_data(small), image + 5, 100) == 0);
	om_lease_view_unref(l);
	om_store_unref(s);
	CHECK(memcmp(om_lease_data(l), image, 900000) == 0);
	om_lease_unref(l);
	om_lease_unref(small);
}

static void tickets(void)
{
	struct om_store *s = open_store(3 << 20, 0);
	const char *names[] = { "a", "b", "c" };
	struct om_ticket *t;
	struct om_lease *l;

	for (int i = 0; i < 3; i++) {
		struct om_file_range r = { path, (uint64_t)i * 1000003, 1000000 };

		CHECK(om_store_add_file(s, names[i], NULL, &r, 1, OM_NOT_ENCODED, NULL) == 0);
	}
	CHECK(om_store_prefetch(s, names, 2, &t) == 0);
	CHECK(om_ticket_wait(t, SOON) == 0 && om_ticket_done(t));
	om_ticket_free(t);
	CHECK(om_store_lease(s, "a", false, SOON, &l) == 0);
	CHECK(om_store_prefetch(s, names, 3, &t) == 0);
	CHECK(om_ticket_wait(t, SOON) == 0); /* b makes room for c, a is held */
	om_ticket_free(t);
	om_lease_unref(l);
	CHECK(om_store_prefetch(s, names, 3, &t) == 0);
	om_ticket_cancel(t);
	CHECK(om_ticket_done(t));
	om_ticket_free(t);
	for (int i = 0; i < 3; i++)
		expect_bytes(s, names[i], image + (uint64_t)i * 1000003, 1000000);
	om_store_unref(s);
}

static void release_marker(void *context)
{
	++*(int *)context;
}

static void foreign_memory(void)
{
	struct om_store *s = open_store(2 << 20, 64 << 20);
	uint8_t *mine = malloc(900003);
	int released = 0;
	struct om_lease *l;

	memcpy(mine, image + 9, 900003);
	CHECK(om_store_take(s, "t", NULL, mine, 900003, NULL, release_marker, &released, SOON) ==
	      0);
	CHECK(om_store_lease(s, "t", false, SOON, &l) == 0);
	CHECK(om_lease_data(l) == mine);
	om_lease_unref(l);
	CHECK(om_store_evict(s, "t", SOON) == 1);
	CHECK(released == 0);
	om_store_collect(s);
	CHECK(released == 1);
	memset(mine, 0, 900003);
	free(mine);
	expect_bytes(s, "t", image + 9, 900003);
	om_store_unref(s);
}

enum { FORMS = 4, FRAMES = 3 };
static const char *const forms[FORMS] = { "e0", "e1", "e2", "e3" };

/* Into the file, forms of the image from its beginning on, each of several frames, one of no bytes; end to
 * end, or with a gap. `sizes`: of the plain bytes. */
static void write_forms(struct om_file_range ranges[FORMS][FRAMES], uint64_t *sizes)
{
	static const enum om_coding codings[] = { OM_CODING_NONE, OM_CODING_FAST,
		                                  OM_CODING_BALANCED };
	uint8_t *coded = malloc(om_encode_bound(400000)), *plain = image;
	uint64_t at = 4096 + 64, length;
	FILE *f = fopen(path, "r+b");

	for (size_t i = 0; i < sizeof(image); i++) /* the codings make something of it */
		image[i] = (uint8_t)(i % 2 ? 60 + (i >> 8) % 4 : i * 7919 >> 5);
	for (int b = 0; b < FORMS; b++) {
		for (int i = 0; i < FRAMES; i++) {
			uint64_t bytes = i == b ? 0 : 100000 + 70000 * (uint64_t)i;

			CHECK_EQ(om_encode(plain, bytes, NULL, bytes ? codings[i] : OM_CODING_NONE,
			                   coded, om_encode_bound(400000), &length),
			         0);
			CHECK(length);
			ranges[b][i] = (struct om_file_range){ path, at, length };
			CHECK(!fseek(f, (long)at, SEEK_SET));
			CHECK(fwrite(coded, 1, length, f) == length);
			at += length + (uint64_t)(b % 2) * 64;
			plain += bytes;
			sizes[b] += bytes;
		}
	}
	fclose(f);
	free(coded);
}

/* Blocks that are encoded in files have room of their own, and what is decoded is what was encoded. */
static void read_encoded(void)
{
	struct om_store *s = open_store(16 << 20, 0);
	struct om_file_range ranges[FORMS][FRAMES];
	uint64_t sizes[FORMS] = { 0 }, bytes;
	struct om_lease *leases[FORMS];
	struct om_stats stats;

	write_forms(ranges, sizes);
	for (int b = 0; b < FORMS; b++)
		CHECK_EQ(om_store_add_file(s, forms[b], NULL, ranges[b], FRAMES, sizes[b], NULL),
		         0);
	CHECK_EQ(om_store_encode(s, forms[0], OM_CODING_NONE, SOON, &bytes), OM_EVALUE);
	for (int round = 0; round < 2; round++) {
		const uint8_t *plain = image;

		for (int b = 0; b < FORMS; b++)
			CHECK_EQ(om_store_lease(s, forms[b], OM_READ, SOON, &leases[b]), 0);
		CHECK_EQ(om_store_stats(s, &stats), 0);
		CHECK(stats.host.used_bytes >= sizes[0] + sizes[1] + sizes[2] + sizes[3]);
		for (int b = 0; b < FORMS; plain += sizes[b++]) {
			CHECK(!memcmp(om_lease_data(leases[b]), plain, sizes[b]));
			om_lease_unref(leases[b]);
		}
		check(s);
		for (int b = 0; b < FORMS; b++)
			CHECK_EQ(om_store_evict(s, forms[b], SOON), 1);
	}
	make_file();
	om_store_unref(s);
}

int main(void)
{
	const char *io = getenv("OMNIMEM_IO");

	backend = io && !strcmp(io, "threads") ? 2 : io && !strcmp(io, "uring") ? 1 : 0;
	CHECK(mkdtemp(dir));
	make_file();
	swap_round_trip();
	read_in_place();
	read_encoded();
	moved_without_a_hash();
	views_outlive_the_store();
	tickets();
	foreign_memory();
	sweep();
	unlink(path);
	CHECK(rmdir(dir) == 0);
	return 0;
}
