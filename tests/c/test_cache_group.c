/* Caches: exact order of victims, held entries among them; replacing; origins; rows; a random run against
 * a model; the nth failure; threads, with the limit looked at all the while. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/om_store_int.h"
#include "core/om_tally.h"
#include "om_test.h"

#define SOON om_deadline(20 * OM_NSEC)
#define PAGE 4096u

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static uint8_t data[1 << 20];

static struct om_store *open_store(uint64_t host)
{
	const char *io = getenv("OMNIMEM_IO");
	struct om_store_config c = { .host_limit_bytes = host,
		                     .directory = dir,
		                     .backend = !io            ? 0
		                                : io[0] == 'u' ? 1
		                                               : 2 };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static struct om_store *open_cache(uint64_t limit, uint32_t batch, uint32_t threshold)
{
	struct om_store *s = open_store(64 << 20);

	CHECK_EQ(om_store_cache(s, "c", &(struct om_cache_config){ limit, batch, threshold }), 0);
	return s;
}

static struct om_group_stats stats(struct om_store *s)
{
	struct om_group_stats g;

	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_store_group_stats(s, "c", &g), 0);
	return g;
}

/* An entry of so many pages, all bytes of one value. */
static int put(struct om_store *s, const char *name, uint64_t pages, int value)
{
	memset(data, value, pages * PAGE);
	return om_store_put(s, name, "c", data, pages * PAGE, NULL, OM_CODING_NONE, SOON);
}

static bool holds(const struct om_lease *l, int value)
{
	const uint8_t *p = om_lease_data(l);

	for (uint64_t i = 0; i < om_lease_nbytes(l); i++)
		if (p[i] != (uint8_t)value)
			return false;
	return true;
}

static struct om_lease *get(struct om_store *s, const char *name)
{
	struct om_lease *l = NULL;
	int code = om_store_get(s, "c", name, SOON, &l);

	CHECK(code == 0 || code == OM_ENAME);
	return l;
}

static void touch(struct om_store *s, const char *name)
{
	struct om_lease *l = get(s, name);

	CHECK(l);
	om_lease_unref(l);
}

/* The names, oldest first, each one letter. */
static void order(struct om_store *s, const char *want)
{
	struct om_entry *e;
	size_t count;

	CHECK_EQ(om_store_entries(s, "c", &e, &count), 0);
	CHECK_EQ(count, strlen(want));
	for (size_t i = 0; i < count; i++)
		CHECK_EQ(e[i].name[0], want[i]);
	om_entries_free(e, count);
}

static void oldest_go_first_held_or_not(void)
{
	struct om_store *s = open_cache(4 * PAGE, 0, 0);
	struct om_lease *held, *none = NULL;

	CHECK_EQ(put(s, "a", 1, 'a'), 1);
	CHECK_EQ(put(s, "b", 1, 'b'), 1);
	CHECK_EQ(put(s, "d", 2, 'd'), 1);
	held = get(s, "a");
	touch(s, "b");
	order(s, "dab");
	CHECK_EQ(put(s, "e", 1, 'e'), 1); /* d goes, and nothing else */
	order(s, "abe");
	CHECK_EQ(put(s, "f", 2, 'f'), 1); /* one page is free: a goes, though it is held */
	order(s, "bef");
	CHECK(get(s, "a") == NULL && holds(held, 'a'));
	CHECK_EQ(stats(s).host_bytes, 4 * PAGE);
	CHECK_EQ(stats(s).gone_bytes, PAGE);
	CHECK_EQ(stats(s).evictions, 2);
	CHECK_EQ(stats(s).traffic.hits, 2);
	CHECK_EQ(stats(s).traffic.misses, 1);
	CHECK_EQ(put(s, "a", 1, 'A'), 1);
	CHECK(holds(held, 'a'));
	om_lease_unref(held);
	CHECK_EQ(stats(s).gone_bytes, 0);
	CHECK_EQ(put(s, "x", 5, 'x'), OM_ELIMIT);
	CHECK_EQ(om_err_last()->need, 5 * PAGE);
	order(s, "efa");
	CHECK_EQ(om_store_put(s, "", "c", data, 1, NULL, OM_CODING_NONE, SOON), OM_EVALUE);
	CHECK_EQ(om_store_put(s, "x", "other", data, 1, NULL, OM_CODING_NONE, SOON), OM_EVALUE);
	CHECK_EQ(om_store_add(s, "x", "other", data, 1, NULL, SOON), 0);
	CHECK_EQ(put(s, "x", 1, 0), OM_EVALUE);
	CHECK_EQ(om_store_get_now(s, "c", "x", &none), OM_ENAME);
	CHECK_EQ(om_store_cache(s, "other", &(struct om_cache_config){ PAGE, 0, 0 }), OM_EVALUE);
	CHECK_EQ(om_store_cache(s, "new", &(struct om_cache_config){ 0 }), OM_EVALUE);
	CHECK_EQ(om_store_cache(s, "c", &(struct om_cache_config){ 3 * PAGE, 0, 0 }), 0);
	order(s, "fa");
	CHECK_EQ(stats(s).host_bytes, 3 * PAGE);
	om_store_unref(s);
}

static void the_same_name_replaces(void)
{
	struct om_store *s = open_cache(4 * PAGE, 0, 0);
	struct om_lease *old;
	struct om_entry *e;
	size_t count;
	void *where;

	CHECK_EQ(put(s, "a", 1, 1), 1);
	CHECK_EQ(put(s, "b", 3, 2), 1);
	old = get(s, "b");
	where = om_lease_data(old);
	CHECK_EQ(put(s, "b", 3, 3), 1); /* its own room is enough: a stays */
	CHECK(holds(old, 2));
	order(s, "ab");
	CHECK_EQ(stats(s).gone_bytes, 3 * PAGE);
	om_lease_unref(old);
	CHECK_EQ(stats(s).evictions, 0);
	old = get(s, "b");
	CHECK(holds(old, 3) && om_lease_data(old) != where);
	where = om_lease_data(old);
	om_lease_unref(old);
	CHECK_EQ(put(s, "b", 3, 4), 1); /* nobody holds it: the memory is used again */
	old = get(s, "b");
	CHECK(holds(old, 4) && om_lease_data(old) == where);
	om_lease_unref(old);
	CHECK_EQ(put(s, "b", 4, 5), 1);
	order(s, "b");
	CHECK_EQ(put(s, "b", 1, 6), 1);
	CHECK_EQ(stats(s).host_bytes, PAGE);
	CHECK_EQ(om_store_entries(s, "c", &e, &count), 0);
	CHECK_EQ(e[0].accesses, 8); /* put five times, asked for three times */
	CHECK_EQ(e[0].nbytes, PAGE);
	om_entries_free(e, count);
	CHECK_EQ(om_store_remove(s, "b"), 0);
	CHECK_EQ(om_store_put(s, "z", "c", NULL, 0, NULL, OM_CODING_NONE, SOON), 1);
	touch(s, "z");
	om_store_unref(s);
}

static void a_name_is_kept_the_third_time(void)
{
	struct om_store *s = open_cache(4 * PAGE, 0, 3);
	struct om_tally *t;

	for (int i = 0; i < 3; i++) {
		CHECK_EQ(put(s, "a", 1, i), i == 2);
		CHECK_EQ(om_store_contains(s, "a"), i == 2);
	}
	CHECK_EQ(put(s, "a", 1, 7), 1);
	CHECK_EQ(om_store_remove(s, "a"), 0);
	CHECK_EQ(put(s, "a", 1, 7), 0);
	om_store_unref(s);
	CHECK_EQ(om_tally_create(&t), 0);
	for (int turn = 1; turn <= 3; turn++)
		for (uint64_t i = 0; i < 1000; i++) /* many of one place */
			CHECK_EQ(om_tally_add(t, (i % 10) << 32 | i / 10), turn);
	for (uint64_t i = 0; i < 1000; i += 2)
		om_tally_forget(t, (i % 10) << 32 | i / 10);
	for (uint64_t i = 0; i < 1000; i++)
		CHECK_EQ(om_tally_add(t, (i % 10) << 32 | i / 10), i % 2 ? 4 : 1);
	for (uint64_t i = 0; i < 3 * OM_TALLY_MOST; i++)
		CHECK(om_tally_add(t, ~i) > 0); /* bounded */
	om_tally_destroy(t);
}

static void shedding_on_request(void)
{
	struct om_store *s = open_cache(8 * PAGE, 2, 0);
	struct om_shed done;
	struct om_lease *l;
	char name[2] = "a";

	for (int i = 0; i < 8; i++, name[0]++)
		CHECK_EQ(put(s, name, 1, name[0]), 1);
	l = get(s, "a");
	CHECK_EQ(om_store_shed(s, "c", PAGE + 1, 0, &done), 0);
	CHECK_EQ(done.entries, 2);
	CHECK_EQ(done.bytes, 2 * PAGE);
	order(s, "defgha");
	CHECK_EQ(om_store_shed(s, "c", UINT64_MAX, 3, &done), 0);
	CHECK_EQ(done.entries, 3);
	CHECK_EQ(put(s, "z", 8, 'z'), 1); /* three victims, in steps of two */
	order(s, "z");
	CHECK(holds(l, 'a'));
	CHECK_EQ(om_store_shed(s, "c", UINT64_MAX, 0, &done), 0);
	CHECK_EQ(done.bytes, 8 * PAGE);
	CHECK_EQ(om_store_shed(s, "none", 1, 0, &done), OM_EVALUE);
	om_lease_unref(l);
	CHECK_EQ(stats(s).host_bytes, 0);
	om_store_unref(s);
}

/* What other groups need goes from the cache, but not what is held. */
static void the_store_needs_room(void)
{
	struct om_store *s = open_store(8 << 20);
	struct om_lease *l, *zeros;

	CHECK_EQ(om_store_cache(s, "c", &(struct om_cache_config){ 6 << 20, 0, 0 }), 0);
	for (int i = 0; i < 6; i++)
		CHECK_EQ(put(s, (char[]){ (char)('a' + i), 0 }, 256, i), 1);
	l = get(s, "a");
	CHECK_EQ(om_store_add(s, "big", NULL, data, 1 << 20, NULL, SOON), 0);
	CHECK_EQ(om_store_add_zeros(s, "zeros", NULL, 6 << 20, NULL), 0);
	order(s, "bcdefa");
	CHECK_EQ(om_store_lease(s, "zeros", OM_READ, SOON, &zeros), 0);
	order(s, "a");
	CHECK(holds(l, 0));
	om_lease_unref(zeros);
	om_lease_unref(l);
	CHECK_EQ(stats(s).disk_bytes, 0);
	CHECK_EQ(om_store_evict(s, "a", SOON), 1);
	CHECK(!om_store_contains(s, "a"));
	om_store_unref(s);
}

static const struct om_desc matrix = {
	.code = 1, .bits = 8, .lanes = 1, .ndim = 2, .shape = { 100, 5000 }
};

static int file_value(uint64_t offset)
{
	return (int)(offset / 5000 + offset % 251);
}

static void write_file(char *path, size_t size)
{
	int fd = snprintf(path, 64, "%s/origin", dir) > 0 ? mkstemp(strcat(path, "XXXXXX")) : -1;
	uint8_t *bytes = malloc(size);

	for (size_t i = 0; i < size; i++)
		bytes[i] = (uint8_t)file_value(i);
	CHECK(fd >= 0 && write(fd, bytes, size) == (ssize_t)size);
	close(fd);
	free(bytes);
}

static void check_rows(const struct om_lease *l, uint64_t offset, const struct om_rows *runs,
                       size_t count)
{
	const uint8_t *p = (const uint8_t *)om_lease_data(l) + offset;

	for (size_t i = 0; i < count; i++)
		for (uint64_t k = 0; k < runs[i].count * 5000; k++)
			CHECK_EQ(*p++, (uint8_t)file_value(runs[i].first * 5000 + k));
}

static uint64_t read_bytes(struct om_store *s)
{
	struct om_stats st;

	CHECK_EQ(om_store_stats(s, &st), 0);
	return st.read_bytes;
}

/* Entries of files: what goes comes back, and rows are read alone. */
static void origins_and_rows(void)
{
	static const struct om_rows some[] = { { 3, 2 }, { 5, 1 }, { 90, 10 }, { 0, 1 } };
	struct om_store *s = open_cache(130 * PAGE, 0, 0);
	struct om_desc other = matrix;
	struct om_lease *l, *again;
	uint64_t offset, before;
	char path[64];

	write_file(path, 500000);
	CHECK_EQ(om_store_add_file(
			 s, "f", "c",
			 (struct om_file_range[]){ { path, 0, 300000 }, { path, 300000, 200000 } },
			 2, OM_NOT_ENCODED, &matrix),
	         0);
	CHECK_EQ(om_store_get_now(s, "c", "f", &l), OM_EAGAIN);
	CHECK_EQ(om_store_get_rows(s, "c", "f", &matrix, some, 4, SOON, &l, &offset), 0);
	check_rows(l, offset, some, 4);
	CHECK_EQ(om_lease_desc(l)->shape[0], 14);
	CHECK(read_bytes(s) >= 14 * 5000 && read_bytes(s) < 14 * 5000 + 8 * PAGE);
	CHECK_EQ(stats(s).host_bytes, 0);
	CHECK(stats(s).gone_bytes >= 14 * 5000);
	om_lease_unref(l);
	CHECK_EQ(stats(s).gone_bytes, 0);
	l = get(s, "f");
	before = read_bytes(s);
	CHECK_EQ(om_store_get_rows(s, "c", "f", &matrix, some, 1, SOON, &again, &offset), 0);
	CHECK(om_lease_data(again) == om_lease_data(l));
	CHECK_EQ(offset, 15000);
	check_rows(again, offset, some, 1);
	om_lease_unref(again);
	CHECK_EQ(om_store_get_rows(s, "c", "f", &matrix, some, 4, SOON, &again, &offset), 0);
	check_rows(again, offset, some, 4);
	om_lease_unref(again);
	CHECK_EQ(om_store_get_rows(s, "c", "f", &matrix, some, 0, SOON, &again, &offset), 0);
	CHECK_EQ(om_lease_nbytes(again), 0);
	om_lease_unref(again);
	CHECK_EQ(read_bytes(s), before);
	other.shape[0] = 50;
	CHECK_EQ(om_store_get_rows(s, "c", "f", &other, some, 1, SOON, &again, &offset), OM_EAGAIN);
	CHECK_EQ(om_store_get_rows(s, "c", "f", &matrix, &(struct om_rows){ 99, 2 }, 1, SOON,
	                           &again, &offset),
	         OM_EVALUE);
	CHECK_EQ(om_store_get_rows(s, "c", "g", &matrix, some, 1, SOON, &again, &offset), OM_ENAME);
	CHECK_EQ(put(s, "p", 20, 'p'), 1); /* f goes while it is held, and keeps its name */
	CHECK(om_store_contains(s, "f"));
	order(s, "p");
	check_rows(l, 0, &(struct om_rows){ 0, 100 }, 1);
	memset(om_lease_data(l), 0, 1000); /* some consumers write to what is read-only */
	again = get(s, "f");
	CHECK(om_lease_data(again) != om_lease_data(l));
	check_rows(again, 0, &(struct om_rows){ 0, 100 }, 1);
	order(s, "f");
	CHECK_EQ(stats(s).evictions, 2);
	om_lease_unref(l);
	om_lease_unref(again);
	CHECK_EQ(put(s, "f", 1, 'f'), 1);
	l = get(s, "f");
	CHECK(holds(l, 'f'));
	om_lease_unref(l);
	CHECK_EQ(truncate(path, 1000), 0);
	CHECK_EQ(om_store_add_file(s, "t", "c", &(struct om_file_range){ path, 0, 1000 }, 1,
	                           OM_NOT_ENCODED, NULL),
	         0);
	CHECK_EQ(truncate(path, 10), 0);
	CHECK(om_store_get(s, "c", "t", SOON, &l) < 0 && strstr(om_err_last()->text, path));
	om_store_unref(s);
	CHECK_EQ(unlink(path), 0);
}

/* ---- at random ---- */

#define NAMES 12
#define HELD  6

struct model {
	struct entry {
		bool there;
		uint64_t pages, used;
		int value;
	} entries[NAMES];
	uint64_t now, limit, evictions;
};

static uint64_t model_used(const struct model *m)
{
	uint64_t pages = 0;

	for (int i = 0; i < NAMES; i++)
		pages += m->entries[i].there ? m->entries[i].pages : 0;
	return pages;
}

static void model_shed(struct model *m, uint64_t most)
{
	while (model_used(m) > most) {
		struct entry *oldest = NULL;

		for (int i = 0; i < NAMES; i++)
			if (m->entries[i].there && (!oldest || m->entries[i].used < oldest->used))
				oldest = &m->entries[i];
		oldest->there = false;
		m->evictions++;
	}
}

static void step(struct om_store *s, struct model *m, struct om_lease **held, int *values,
                 unsigned long long *seed)
{
	int i = (int)(om_test_random(seed) % NAMES), slot = (int)(om_test_random(seed) % HELD);
	struct entry *e = &m->entries[i];
	uint64_t pages = 1 + om_test_random(seed) % 90;
	char name[2] = { (char)('a' + i), 0 };
	struct om_shed done;

	switch (om_test_random(seed) % 6) {
	case 0:
	case 1:
		e->there = false;
		model_shed(m, m->limit - OM_MIN(m->limit, pages));
		*e = (struct entry){ true, pages, ++m->now, (int)(om_test_random(seed) % 256) };
		CHECK_EQ(put(s, name, pages, e->value), 1);
		break;
	case 2:
	case 3: {
		struct om_lease *l = get(s, name);

		CHECK_EQ(l != NULL, e->there);
		if (!l)
			break;
		CHECK(holds(l, e->value) && om_lease_nbytes(l) == e->pages * PAGE);
		e->used = ++m->now;
		if (held[slot])
			om_lease_unref(held[slot]);
		held[slot] = l;
		values[slot] = e->value;
		break;
	}
	case 4:
		CHECK_EQ(om_store_remove(s, name), e->there ? 0 : OM_ENAME);
		e->there = false;
		break;
	default:
		pages = om_test_random(seed) % 100;
		model_shed(m, model_used(m) - OM_MIN(model_used(m), pages));
		CHECK_EQ(om_store_shed(s, "c", pages * PAGE, 0, &done), 0);
	}
	for (int k = 0; k < HELD; k++)
		CHECK(!held[k] || holds(held[k], values[k]));
}

static void at_random(void)
{
	struct model m = { .limit = 200 };
	struct om_store *s = open_cache(m.limit * PAGE, 3, 0);
	struct om_lease *held[HELD] = { NULL };
	unsigned long long seed = 42;
	int values[HELD];

	for (int i = 0; i < 3000; i++) {
		step(s, &m, held, values, &seed);
		CHECK_EQ(stats(s).host_bytes, model_used(&m) * PAGE);
		CHECK_EQ(stats(s).evictions, m.evictions);
	}
	CHECK(stats(s).host_peak_bytes <= m.limit * PAGE);
	om_store_unref(s);
	for (int k = 0; k < HELD; k++) {
		CHECK(!held[k] || holds(held[k], values[k]));
		if (held[k])
			om_lease_unref(held[k]);
	}
}

/* What goes is not kept for later beyond the limit, whatever the sizes are. */
static void mapped_bytes_stay_within_the_limit(void)
{
	struct om_store *s = open_cache(4 << 20, 0, 0);
	unsigned long long seed = 9;
	struct om_stats st;

	for (int i = 0; i < 200; i++) {
		CHECK_EQ(put(s, (char[]){ (char)('a' + i % 20), 0 },
		             80 + om_test_random(&seed) % 170, i),
		         1);
		CHECK_EQ(om_store_stats(s, &st), 0);
		CHECK(st.host.mapped_bytes <= 4 << 20);
	}
	om_store_unref(s);
}

/* ---- encoded ---- */

static const struct om_desc bf16 = { .code = 4, .bits = 16, .lanes = 1, .ndim = 1, .shape = { 0 } };

/* Weights of about one size: so many pages of bfloat16. */
static void weights(uint64_t pages, unsigned long long seed)
{
	uint16_t *to = (uint16_t *)(void *)data;

	seed = seed * 2654435761u + 1;
	for (uint64_t i = 0; i < pages * PAGE / 2; i++) {
		unsigned long long r = om_test_random(&seed);

		to[i] = (uint16_t)((r & 0x807f) | (120 + (r >> 16) % 6) << 7);
	}
}

static int put_coded(struct om_store *s, const char *name, uint64_t pages, unsigned long long seed)
{
	struct om_desc desc = bf16;

	desc.shape[0] = (int64_t)(pages * PAGE / 2);
	weights(pages, seed);
	return om_store_put(s, name, "c", data, pages * PAGE, &desc, OM_CODING_FAST, SOON);
}

static bool holds_weights(const struct om_lease *l, unsigned long long seed)
{
	weights(om_lease_nbytes(l) / PAGE, seed);
	return memcmp(om_lease_data(l), data, om_lease_nbytes(l)) == 0;
}

static void entries_are_kept_encoded(void)
{
	struct om_store *s = open_cache(200 * PAGE, 0, 0);
	struct om_lease *l, *m;
	struct om_entry *e;
	uint64_t form;
	size_t count;

	CHECK_EQ(put_coded(s, "a", 100, 1), 1);
	form = stats(s).host_bytes;
	CHECK(form > 50 * PAGE && form < 75 * PAGE);
	CHECK_EQ(stats(s).packed_bytes, form);
	CHECK_EQ(stats(s).host_peak_bytes, form); /* no plain copy beside it */
	CHECK_EQ(om_store_get_now(s, "c", "a", &l), OM_EAGAIN);
	l = get(s, "a");
	CHECK(holds_weights(l, 1));
	CHECK_EQ(stats(s).host_bytes, form + 100 * PAGE);
	CHECK_EQ(stats(s).traffic.hits, 1);
	om_lease_unref(l);
	CHECK_EQ(om_store_get_now(s, "c", "a", &l), 0); /* there is room for it */
	om_lease_unref(l);
	CHECK_EQ(put_coded(s, "b", 100, 2), 1); /* which others need now */
	CHECK_EQ(stats(s).host_bytes, 2 * form);
	CHECK_EQ(stats(s).evictions, 0);
	l = get(s, "a"); /* 100 + 68 fit, beside 68 not: b goes, being older */
	order(s, "a");
	CHECK_EQ(put_coded(s, "b", 100, 3), 1); /* a stays, what is held of it counts no more */
	order(s, "ab");
	CHECK_EQ(stats(s).host_bytes, 2 * form);
	CHECK_EQ(stats(s).gone_bytes, 100 * PAGE);
	memset(om_lease_data(l), 7, 500); /* what a consumer does to its bytes is nobody else's */
	m = get(s, "a");
	CHECK(holds_weights(m, 1) && om_lease_data(m) != om_lease_data(l));
	om_lease_unref(l);
	om_lease_unref(m);
	CHECK_EQ(put_coded(s, "a", 130, 4), 1); /* 130 and 87 are more than 200: plain */
	CHECK_EQ(stats(s).packed_bytes, 0);
	CHECK_EQ(put_coded(s, "a", 100, 5), 1);
	CHECK_EQ(om_store_entries(s, "c", &e, &count), 0);
	CHECK_EQ(count, 1);
	CHECK_EQ(e[0].packed_bytes, form);
	CHECK_EQ(e[0].plain_bytes, 0);
	om_entries_free(e, count);
	CHECK_EQ(om_store_cache(s, "c", &(struct om_cache_config){ 120 * PAGE, 0, 0 }), 0);
	CHECK_EQ(om_store_get(s, "c", "a", SOON, &l), OM_ELIMIT);
	CHECK_EQ(om_store_remove(s, "a"), 0);
	CHECK_EQ(stats(s).host_bytes, 0);
	for (uint64_t i = 0; i < 50 * PAGE; i++)
		data[i] = (uint8_t)(i * i >> 3 ^ i * 2654435761u >> 7);
	CHECK_EQ(om_store_put(s, "n", "c", data, 50 * PAGE, NULL, OM_CODING_FAST, SOON), 1);
	CHECK_EQ(stats(s).packed_bytes, 0); /* not worth it */
	om_store_unref(s);
}

static void encoded_at_random(void)
{
	struct om_store *s = open_cache(400 * PAGE, 2, 0);
	struct om_lease *held[HELD] = { NULL };
	unsigned long long seed = 4711, seeds[NAMES] = { 0 }, kept[HELD];

	for (unsigned i = 0; i < 1500; i++) {
		unsigned k = (unsigned)(om_test_random(&seed) % NAMES), slot = i % HELD;
		uint64_t pages = 1 + om_test_random(&seed) % 200;
		char name[2] = { (char)('a' + k), 0 };
		struct om_lease *l;

		if (i % 3 == 0) {
			seeds[k] = i;
			CHECK_EQ(i % 2 ? put_coded(s, name, pages, i)
			               : (weights(pages, i),
			                  om_store_put(s, name, "c", data, pages * PAGE, NULL,
			                               OM_CODING_NONE, SOON)),
			         1);
		} else if ((l = get(s, name))) {
			CHECK(holds_weights(l, seeds[k]));
			if (held[slot])
				om_lease_unref(held[slot]);
			held[slot] = l;
			kept[slot] = seeds[k];
		}
		CHECK(stats(s).host_bytes <= 400 * PAGE);
		slot = (slot + 1) % HELD;
		CHECK(!held[slot] || holds_weights(held[slot], kept[slot]));
	}
	CHECK(stats(s).evictions > 50 && stats(s).traffic.hits > 50);
	CHECK(stats(s).host_peak_bytes <= 400 * PAGE);
	for (unsigned k = 0; k < HELD; k++)
		if (held[k])
			om_lease_unref(held[k]);
	CHECK_EQ(stats(s).gone_bytes, 0);
	om_store_unref(s);
}

static void nothing_is_lost_when_memory_is_short(bool coded)
{
	for (int point = OM_FAULT_ALLOC; point <= OM_FAULT_MAP; point++) {
		int failures = 0, done = 0;

		for (uint64_t nth = 1; !done; nth++) {
			struct om_store *s = open_cache(100 * PAGE, 0, 2);
			struct om_lease *l, *held;
			int code;

			put(s, "a", 60, 1);
			CHECK_EQ(put(s, "a", 60, 1), 1);
			held = get(s, "a");
			om_fault_arm((enum om_fault)point, nth, true);
			code = coded ? put_coded(s, "a", 40, 2) : put(s, "a", 80, 2);
			done = code == 1 && !om_fault_fired((enum om_fault)point);
			om_fault_reset();
			failures += code < 0;
			l = get(s, "a");
			CHECK(l && holds(held, 1));
			CHECK(code == 1 && coded ? holds_weights(l, 2)
			                         : holds(l, code == 1 ? 2 : 1));
			CHECK_EQ(om_store_check(s), 0);
			om_lease_unref(l);
			om_lease_unref(held);
			om_store_unref(s);
		}
		CHECK(failures > 0);
	}
}

/* ---- threads ---- */

#define THREADS 8
#define LIMIT   (UINT64_C(300) * PAGE)

static bool stop; /* atomic */

struct worker {
	struct om_store *s;
	unsigned long long seed;
	uint8_t *bytes;
	uint64_t puts, hits;
};

/* Each word of an entry holds the number of its name and its version. */
static void fill(uint32_t *to, uint64_t pages, uint32_t value)
{
	for (uint64_t i = 0; i < pages * PAGE / sizeof(*to); i++)
		to[i] = value;
}

static void put_or_get(struct worker *w)
{
	uint32_t i = (uint32_t)(om_test_random(&w->seed) % 16);
	uint64_t pages = 1 + om_test_random(&w->seed) % 100;
	enum om_coding coding = i % 2 ? OM_CODING_FAST : OM_CODING_NONE;
	char name[2] = { (char)('a' + i), 0 };
	struct om_lease *l;
	int code;

	if (om_test_random(&w->seed) % 3 == 0) {
		fill((uint32_t *)(void *)w->bytes, pages, i << 16 | (uint32_t)pages);
		CHECK_EQ(om_store_put(w->s, name, "c", w->bytes, pages * PAGE, NULL, coding, SOON),
		         1);
		w->puts++;
		return;
	}
	code = om_store_get(w->s, "c", name, SOON, &l);
	CHECK(code == 0 || code == OM_ENAME);
	if (code)
		return;
	for (uint64_t k = 0, n = om_lease_nbytes(l) / sizeof(uint32_t); k < n; k += 97)
		CHECK_EQ(((uint32_t *)om_lease_data(l))[k],
		         i << 16 | (uint32_t)(n * sizeof(uint32_t) / PAGE));
	om_lease_unref(l);
	w->hits++;
}

static void *work(void *arg)
{
	struct worker *w = arg;

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED))
		put_or_get(w);
	return NULL;
}

static void threads_stay_below_the_limit(void)
{
	struct om_store *s = open_cache(LIMIT, 2, 0);
	struct worker workers[THREADS];
	pthread_t threads[THREADS];
	uint64_t until = om_deadline(OM_NSEC), puts = 0, hits = 0;

	for (int i = 0; i < THREADS; i++) {
		workers[i] =
			(struct worker){ s, (unsigned long long)i + 1, malloc(100 * PAGE), 0, 0 };
		CHECK_EQ(pthread_create(&threads[i], NULL, work, &workers[i]), 0);
	}
	while (om_now() < until) {
		struct om_group_stats g = stats(s);

		CHECK(g.host_bytes <= LIMIT && g.host_peak_bytes <= LIMIT);
	}
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (int i = 0; i < THREADS; i++) {
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
		free(workers[i].bytes);
		puts += workers[i].puts;
		hits += workers[i].hits;
	}
	CHECK(puts > 100 && hits > 100);
	CHECK_EQ(stats(s).gone_bytes, 0);
	om_store_unref(s);
}

/* An entry that is replaced all the time is there all the time. */
static void *replace(void *arg)
{
	struct worker *w = arg;

	for (int i = 0; !__atomic_load_n(&stop, __ATOMIC_RELAXED); i++) {
		uint64_t pages = 90 + (uint64_t)i % 10;

		fill((uint32_t *)(void *)w->bytes, pages, (uint32_t)pages);
		CHECK_EQ(om_store_put(w->s, "a", "c", w->bytes, pages * PAGE, NULL,
		                      i % 3 ? OM_CODING_NONE : OM_CODING_FAST, SOON),
		         1);
		w->puts++;
	}
	return NULL;
}

static void *look(void *arg)
{
	struct worker *w = arg;

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		struct om_lease *l;

		CHECK_EQ(om_store_get(w->s, "c", "a", SOON, &l), 0);
		for (uint64_t k = 0, n = om_lease_nbytes(l) / sizeof(uint32_t); k < n; k += 97)
			CHECK_EQ(((uint32_t *)om_lease_data(l))[k], n * sizeof(uint32_t) / PAGE);
		om_lease_unref(l);
		w->hits++;
	}
	return NULL;
}

static void readers_see_one_or_the_other(void)
{
	struct om_store *s = open_cache(LIMIT, 0, 0);
	struct worker workers[4];
	pthread_t threads[4];
	uint64_t until = om_deadline(OM_NSEC / 2);

	__atomic_store_n(&stop, false, __ATOMIC_RELAXED);
	CHECK_EQ(put(s, "a", 1, 0), 1);
	fill((uint32_t *)(void *)data, 1, 1);
	CHECK_EQ(om_store_put(s, "a", "c", data, PAGE, NULL, OM_CODING_NONE, SOON), 1);
	for (int i = 0; i < 4; i++) {
		workers[i] = (struct worker){ s, 0, malloc(100 * PAGE), 0, 0 };
		CHECK_EQ(pthread_create(&threads[i], NULL, i % 2 ? replace : look, &workers[i]), 0);
	}
	while (om_now() < until)
		CHECK(stats(s).host_bytes <= LIMIT);
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (int i = 0; i < 4; i++) {
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
		free(workers[i].bytes);
		CHECK(workers[i].puts + workers[i].hits > 10);
	}
	om_store_unref(s);
}

static void *until_closed(void *arg)
{
	struct worker *w = arg;
	struct om_lease *l;
	int code = 0;

	fill((uint32_t *)(void *)w->bytes, 90, 90);
	while (code >= 0) {
		code = om_store_put(w->s, "a", "c", w->bytes, 90 * PAGE, NULL, OM_CODING_FAST,
		                    SOON);
		if (code < 0)
			break;
		code = om_store_get(w->s, "c", "a", SOON, &l);
		if (!code)
			om_lease_unref(l);
	}
	CHECK_EQ(code, OM_ECLOSED);
	return NULL;
}

static void closing_while_threads_are_inside(void)
{
	for (int turn = 0; turn < 20; turn++) {
		struct om_store *s = open_cache(LIMIT, 0, 0);
		struct worker workers[4];
		pthread_t threads[4];

		for (int i = 0; i < 4; i++) {
			workers[i] = (struct worker){ s, 0, malloc(100 * PAGE), 0, 0 };
			CHECK_EQ(pthread_create(&threads[i], NULL, until_closed, &workers[i]), 0);
		}
		usleep(5000);
		CHECK_EQ(om_store_close(s), 0);
		for (int i = 0; i < 4; i++) {
			CHECK_EQ(pthread_join(threads[i], NULL), 0);
			free(workers[i].bytes);
		}
		om_store_unref(s);
	}
}

int main(void)
{
	CHECK(mkdtemp(dir) != NULL);
	oldest_go_first_held_or_not();
	the_same_name_replaces();
	a_name_is_kept_the_third_time();
	shedding_on_request();
	the_store_needs_room();
	origins_and_rows();
	at_random();
	mapped_bytes_stay_within_the_limit();
	entries_are_kept_encoded();
	encoded_at_random();
	nothing_is_lost_when_memory_is_short(false);
	nothing_is_lost_when_memory_is_short(true);
	threads_stay_below_the_limit();
	readers_see_one_or_the_other();
	closing_while_threads_are_inside();
	CHECK_EQ(rmdir(dir), 0);
	return 0;
}
