/* om_policy, om_cache, om_simulate: small answers worked out by hand, random operations against a set,
 * members that may not go, forgotten slots, changing capacity, memory that is refused; and stores, which
 * miss what the simulation says. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/om_cache.h"
#include "om_test.h"

#define SLOTS 40

static const struct om_policy_ops *const all[] = { &om_policy_lru,     &om_policy_clock,
	                                           &om_policy_sieve,   &om_policy_s3fifo,
	                                           &om_policy_nextuse, &om_policy_lrfu,
	                                           &om_policy_adaptive };
#define POLICIES (sizeof(all) / sizeof(*all))

static uint64_t misses(const char *policy, const char *trace, uint64_t capacity)
{
	uint64_t ids[64];
	struct om_simulation r;

	for (size_t i = 0; i < strlen(trace); i++)
		ids[i] = (uint64_t)trace[i] << 40; /* ids are no slots */
	CHECK_EQ(om_simulate(ids, NULL, strlen(trace), capacity, policy, &r), 0);
	CHECK_EQ(r.requests, strlen(trace));
	CHECK_EQ(r.missed_bytes, r.misses);
	return r.misses;
}

static void by_hand(void)
{
	CHECK_EQ(misses("lru", "abcabc", 3), 3);
	CHECK_EQ(misses("lru", "abcabc", 2), 6);
	CHECK_EQ(misses("lru", "abacab", 2), 4);   /* c takes b's place, b then c's */
	CHECK_EQ(misses("clock", "abacab", 2), 4); /* a has its second chance */
	CHECK_EQ(misses("clock", "abcabc", 2), 6);
	CHECK_EQ(misses("clock", "abbcbdb", 3), 4);
	CHECK_EQ(misses("sieve", "abacad", 2), 4); /* c, d come and go behind a */
	CHECK_EQ(misses("sieve", "abacadbb", 2), 5);
	CHECK_EQ(misses("belady", "abcabc", 2), 4);
	CHECK_EQ(misses("belady", "abcdabcd", 3), 5);
	CHECK_EQ(misses("belady", "abcdabcd", 4), 4);
	CHECK_EQ(misses("adaptive", "aaaa", 1), 1);
	CHECK_EQ(misses("lru", "", 1), 0);
}

/* A cycle that does not fit: nothing for LRU and CLOCK, the closed form for Belady. */
static void cycles(void)
{
	uint64_t ids[36 * 200];
	struct om_simulation r;

	for (size_t i = 0; i < 36 * 200; i++)
		ids[i] = i % 36;
	for (uint64_t c = 6; c <= 30; c += 6) {
		uint64_t first = 36 - c;

		CHECK_EQ(om_simulate(ids, NULL, 7200, c, "lru", &r), 0);
		CHECK_EQ(r.misses, 7200);
		CHECK_EQ(om_simulate(ids, NULL, 7200, c, "clock", &r), 0);
		CHECK_EQ(r.misses, 7200);
		CHECK_EQ(om_simulate(ids, NULL, 7200, c, "belady", &r), 0);
		/* (N - C) / (N - 1) of all after the start, give or take a few */
		CHECK(llabs((long long)(r.misses - 36) - (long long)(first * 7164 / 35)) < 36);
		CHECK_EQ(om_simulate(ids, NULL, 7200, c, "adaptive", &r), 0);
		CHECK((double)r.misses / 7200 < (double)(36 - c) / 35 + 0.02);
		CHECK(r.led[0] + r.led[1] + r.led[2] + r.led[3] == 7200 - 36);
	}
}

static void bad_input(void)
{
	uint64_t ids[] = { 1, 2, 1 }, sizes[] = { 5, 9, 6 }, huge[] = { 1, UINT64_MAX, 1 };
	struct om_simulation r;

	CHECK_EQ(om_simulate(ids, NULL, 3, 10, "fifo", &r), OM_EVALUE);
	CHECK(strstr(om_err_last()->text, "fifo") && strstr(om_err_last()->text, "lru"));
	CHECK_EQ(om_simulate(ids, NULL, 3, 0, "lru", &r), OM_EVALUE);
	CHECK_EQ(om_simulate(ids, sizes, 3, 10, "lru", &r), OM_EVALUE);
	CHECK(strstr(om_err_last()->text, "id 1 has 6"));
	CHECK_EQ(om_simulate(ids, huge, 3, 10, "lru", &r), OM_EVALUE);
	sizes[2] = 5;
	CHECK_EQ(om_simulate(ids, sizes, 3, 8, "lru", &r), 0); /* 2 is larger than all */
	CHECK(r.misses == 2 && r.missed_bytes == 14 && r.bytes == 19);
}

/* ---- any policy ---- */

struct model {
	bool member[SLOTS], busy[SLOTS];
	uint64_t bytes[SLOTS];
	unsigned count, idle;
};

static bool not_busy(void *arg, uint32_t slot)
{
	const struct model *m = arg;

	CHECK(m->member[slot]);
	return !m->busy[slot];
}

static void leave(struct om_policy *p, struct model *m, uint32_t slot, bool evicted)
{
	p->ops->drop(p, slot, evicted);
	m->member[slot] = false;
	m->count--;
	m->idle -= !m->busy[slot];
	m->busy[slot] = false;
}

/* Who is given up is a member and may go, whenever there is one. */
static void check_victim(struct om_policy *p, struct model *m)
{
	uint32_t at = p->ops->victim(p, not_busy, m);

	CHECK((at != OM_NIL) == (m->idle > 0));
	if (at == OM_NIL)
		return;
	CHECK(at < SLOTS && m->member[at] && !m->busy[at]);
	leave(p, m, at, true);
}

static void random_operations(const struct om_policy_ops *ops)
{
	unsigned long long seed = 11;
	struct om_policy *p;
	struct model m = { 0 };

	CHECK_EQ(om_policy_create(ops, 1000, &p), 0);
	for (uint32_t i = 1; i <= SLOTS; i += 13)
		CHECK_EQ(om_policy_grow(p, i), 0);
	CHECK_EQ(om_policy_grow(p, SLOTS), 0);
	for (int step = 0; step < 60000; step++) {
		uint32_t slot = (uint32_t)(om_test_random(&seed) % SLOTS);
		unsigned what = (unsigned)(om_test_random(&seed) % 16);

		if (!m.bytes[slot])
			m.bytes[slot] = 1 + om_test_random(&seed) % 150;
		if (what < 10) {
			ops->access(p, slot, m.bytes[slot], m.member[slot]);
			if (!m.member[slot]) {
				ops->add(p, slot, m.bytes[slot]);
				m.member[slot] = true;
				m.count++;
				m.idle++;
			}
		} else if (what < 12) {
			check_victim(p, &m);
		} else if (what == 12 && m.member[slot]) {
			leave(p, &m, slot, false);
		} else if (what == 13 && m.member[slot]) {
			m.busy[slot] = !m.busy[slot];
			m.idle += m.busy[slot] ? -1u : 1u;
		} else if (what == 14 && !m.member[slot]) {
			if (ops->forget)
				ops->forget(p, slot);
			m.bytes[slot] = 0;
		} else if (what == 15 && step % 64 == 0) {
			p->capacity = 200 + om_test_random(&seed) % 2000;
		}
	}
	while (m.idle)
		check_victim(p, &m);
	om_policy_destroy(p);
}

/* With everything let go, all members leave one after another. */
static void drains(const struct om_policy_ops *ops)
{
	struct om_policy *p;
	bool gone[SLOTS] = { false };

	CHECK_EQ(om_policy_create(ops, SLOTS / 2, &p), 0);
	CHECK_EQ(om_policy_grow(p, SLOTS), 0);
	CHECK_EQ(ops->victim(p, NULL, NULL), OM_NIL);
	for (int round = 0; round < 3; round++)
		for (uint32_t i = 0; i < SLOTS; i++) {
			ops->access(p, i, 1, round > 0);
			if (!round)
				ops->add(p, i, 1);
		}
	for (int i = 0; i < SLOTS; i++) {
		uint32_t at = ops->victim(p, NULL, NULL);

		CHECK(at < SLOTS && !gone[at]);
		gone[at] = true;
		ops->drop(p, at, true);
	}
	CHECK_EQ(ops->victim(p, NULL, NULL), OM_NIL);
	om_policy_destroy(p);
}

/* S3-FIFO looks through main, where nothing may go, and then through small, whose one member was used so
 * often that it moves to main: it is found there. */
static void the_only_one_has_just_moved(void)
{
	static const uint64_t bytes[] = { 100, 500, 500 }; /* the first is no larger than small */
	struct model m = { .busy = { [1] = true, [2] = true }, .count = 3, .idle = 1 };
	struct om_policy *p;

	CHECK_EQ(om_policy_create(&om_policy_s3fifo, 1000, &p), 0);
	CHECK_EQ(om_policy_grow(p, 3), 0);
	for (uint32_t slot = 0; slot < 3; slot++) {
		p->ops->add(p, slot, bytes[slot]);
		m.member[slot] = true;
	}
	p->ops->access(p, 0, 100, true);
	p->ops->access(p, 0, 100, true);
	check_victim(p, &m);
	om_policy_destroy(p);
}

static void without_memory(void)
{
	static const char *const names[] = {
		"lru", "clock", "sieve", "s3fifo", "adaptive", "belady"
	};
	uint64_t ids[] = { 1, 2, 3, 1, 2, 3 };
	struct om_simulation r;

	for (size_t k = 0; k < sizeof(names) / sizeof(*names); k++)
		for (uint64_t nth = 1;; nth++) {
			int code;

			om_fault_arm(OM_FAULT_ALLOC, nth, false);
			code = om_simulate(ids, NULL, 6, 2, names[k], &r);
			if (!om_fault_fired(OM_FAULT_ALLOC)) {
				CHECK_EQ(code, 0);
				break;
			}
			CHECK_EQ(code, -ENOMEM);
		}
	om_fault_reset();
}

/* What failed to grow works as before, and grows later. */
static void grows_later(const struct om_policy_ops *ops)
{
	for (uint64_t nth = 1;; nth++) {
		struct om_policy *p;
		int code;

		CHECK_EQ(om_policy_create(ops, 4, &p), 0);
		CHECK_EQ(om_policy_grow(p, 2), 0);
		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		code = om_policy_grow(p, 30);
		om_fault_reset();
		ops->access(p, 1, 1, false);
		ops->add(p, 1, 1);
		if (code)
			CHECK_EQ(om_policy_grow(p, 20), 0);
		ops->access(p, 19, 1, false);
		ops->add(p, 19, 1);
		CHECK(ops->victim(p, NULL, NULL) != OM_NIL);
		om_policy_destroy(p);
		if (!code)
			return;
	}
}

/* ---- stores ---- */

#define PIECE    (UINT64_C(64) << 10)
#define BLOCKS   60
#define KEPT     17
#define REQUESTS 3000

static struct om_store *open_store(const char *dir, const char *path, bool with_blocks)
{
	const char *io = getenv("OMNIMEM_IO");
	struct om_store_config c = { .host_limit_bytes = 64 * OM_MIB,
		                     .disk_limit_bytes = 64 * OM_MIB,
		                     .directory = dir,
		                     .backend = io && !strcmp(io, "threads") ? 2 : 0 };
	struct om_store *s;
	char name[16];

	CHECK_EQ(om_store_create(&c, &s), 0);
	CHECK_EQ(om_store_group(s, "g", KEPT * PIECE), 0);
	for (uint64_t i = 0; i < BLOCKS && with_blocks; i++) {
		struct om_file_range r = { path, i * PIECE, PIECE };

		snprintf(name, sizeof(name), "b%d", (int)i);
		CHECK_EQ(om_store_add_file(s, name, "g", &r, 1, OM_NOT_ENCODED, NULL), 0);
	}
	return s;
}

/* Popular ones, with a cycle now and then. */
static void make_trace(uint64_t *ids)
{
	unsigned long long seed = 5;

	for (size_t i = 0; i < REQUESTS; i++) {
		uint64_t r = om_test_random(&seed) % 1000;

		ids[i] = i / 500 % 2 ? i % 25 : r * r * BLOCKS / 1000000;
	}
}

static void use(struct om_store *s, uint64_t id)
{
	struct om_lease *l;
	char name[16];

	snprintf(name, sizeof(name), "b%d", (int)id);
	CHECK_EQ(om_store_lease(s, name, false, om_deadline(20 * OM_NSEC), &l), 0);
	CHECK_EQ(*(uint8_t *)om_lease_data(l), id);
	om_lease_unref(l);
}

static void stores_do_as_simulated(const char *dir, const char *path)
{
	static const char *const names[] = { "lru", "clock", "sieve", "s3fifo", "adaptive" };
	uint64_t ids[REQUESTS], sizes[REQUESTS];

	make_trace(ids);
	for (size_t i = 0; i < REQUESTS; i++)
		sizes[i] = PIECE;
	for (size_t k = 0; k < sizeof(names) / sizeof(*names); k++) {
		struct om_store *s = open_store(dir, path, true);
		struct om_simulation expected;
		struct om_stats got;

		CHECK_EQ(om_store_policy(s, "g", names[k]), 0);
		CHECK_EQ(om_simulate(ids, sizes, REQUESTS, KEPT * PIECE, names[k], &expected), 0);
		for (size_t i = 0; i < REQUESTS; i++)
			use(s, ids[i]);
		CHECK_EQ(om_store_check(s), 0);
		CHECK_EQ(om_store_stats(s, &got), 0);
		CHECK_EQ(got.misses, expected.misses);
		CHECK_EQ(got.hits + got.misses, REQUESTS);
		om_store_unref(s);
	}
}

/* Another policy at any time, with blocks of all kinds coming and going. */
static void policies_change(const char *dir, const char *path)
{
	static const char *const names[] = { "clock", "adaptive", "sieve", "s3fifo", "lru" };
	struct om_store *s = open_store(dir, path, true);
	static uint8_t own[PIECE];
	unsigned long long seed = 9;
	char name[16];

	CHECK_EQ(om_store_policy(s, "g", "fifo"), OM_EVALUE);
	CHECK(strstr(om_err_last()->text, "'fifo'") && strstr(om_err_last()->text, "sieve"));
	for (int i = 0; i < 1500; i++) {
		int id = (int)(om_test_random(&seed) % BLOCKS), code;

		if (i % 50 == 0)
			CHECK_EQ(om_store_policy(s, "g", names[i / 50 % 5]), 0);
		snprintf(name, sizeof(name), "own%d", id % 20);
		code = om_store_remove(s, name);
		CHECK(code == 0 || code == OM_ENAME);
		if (i % 3) {
			memset(own, id, sizeof(own));
			code = om_store_add(s, name, "g", own, sizeof(own), NULL,
			                    om_deadline(20 * OM_NSEC));
			CHECK_EQ(code, 0);
		}
		use(s, (uint64_t)id);
		CHECK_EQ(om_store_check(s), 0);
	}
	for (uint64_t nth = 1;; nth++) {
		int code;

		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		code = om_store_policy(s, "g", "adaptive");
		if (!om_fault_fired(OM_FAULT_ALLOC))
			break;
		om_fault_reset();
		CHECK_EQ(code, -ENOMEM);
		use(s, nth % BLOCKS);
		CHECK_EQ(om_store_check(s), 0);
	}
	om_fault_reset();
	om_store_unref(s);
}

static void in_stores(void)
{
	char dir[] = "/var/tmp/omnimem-test-XXXXXX", path[64];
	FILE *f;

	CHECK(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/file", dir);
	f = fopen(path, "wb");
	CHECK(f);
	for (uint64_t i = 0; i < BLOCKS * PIECE; i++)
		CHECK(fputc((int)(i / PIECE), f) != EOF);
	CHECK(fclose(f) == 0);
	stores_do_as_simulated(dir, path);
	policies_change(dir, path);
	CHECK(unlink(path) == 0 && rmdir(dir) == 0);
}

int main(void)
{
	by_hand();
	cycles();
	bad_input();
	for (size_t i = 0; i < POLICIES; i++) {
		random_operations(all[i]);
		drains(all[i]);
		grows_later(all[i]);
	}
	the_only_one_has_just_moved();
	without_memory();
	in_stores();
	return 0;
}
