/*
 * Swapping under threads, against a model: each thread knows what its own blocks hold, and registers,
 * accesses, writes through views, pins, removes and prefetches them, while all threads swap out and
 * encode whatever is next. Then the same with requests that fail, are cut short or come back damaged.
 * OMNIMEM_SOAK=1 makes each run a minute long.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define SOON     om_deadline(30 * OM_NSEC)
#define USEC     (OM_NSEC / 1000000)
#define THREADS  8
#define OWN      10 /* blocks of a thread */
#define BLOCKS   (THREADS * OWN)
#define WORDS(i) ((size_t)1030 + 311 * (size_t)(i)) /* of block i: 8 to 205 kB */
#define HOST     (6u << 20)
#define DISK     (16u << 20)

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static int backend;
static bool stop, faulty; /* atomic */
static unsigned taken;    /* memory given away and not yet released; atomic */

/* What a block holds is its version. Its owner changes it while it has the bytes to itself or shares
 * them, so that it stays as it is from om_store_victim to an om_lease_pack that succeeds. */
static uint64_t versions[BLOCKS]; /* atomic */

struct packed {
	uint64_t block, version;
};

struct worker {
	struct om_store *store;
	unsigned long long seed;
	int number;
	struct om_block *blocks[OWN]; /* NULL: not registered */
	uint64_t *words;
	uint64_t done, packs, unpacks;
};

static struct om_store *open_store(void)
{
	struct om_store_config c = { .host_limit_bytes = HOST,
		                     .disk_limit_bytes = DISK,
		                     .directory = dir,
		                     .request_bytes = 64 << 10,
		                     .backend = backend };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static void check(struct om_store *s)
{
	if (om_store_check(s)) {
		fprintf(stderr, "%s\n", om_err_last()->text);
		CHECK(!"invariant");
	}
}

static unsigned long long pick(struct worker *w, unsigned long long below)
{
	return om_test_random(&w->seed) % below;
}

static uint64_t version_of(int i)
{
	return __atomic_load_n(&versions[i], __ATOMIC_ACQUIRE);
}

/* Word k of version v of block i; version 0 is a blank block. */
static uint64_t word(int i, uint64_t v, size_t k)
{
	return v ? (v * 1000003 + (uint64_t)i) * 0x9E3779B97F4A7C15u + k : 0;
}

static void fill(uint64_t *words, int i, uint64_t v)
{
	for (size_t k = 0; k < WORDS(i); k++)
		words[k] = word(i, v, k);
}

static void verify(const struct om_lease *l, int i)
{
	const uint64_t *words = om_lease_data(l);
	uint64_t v = version_of(i);

	CHECK_EQ(om_lease_nbytes(l), WORDS(i) * 8);
	for (size_t k = 0; k < WORDS(i); k++)
		if (words[k] != word(i, v, k)) {
			fprintf(stderr, "block %d, version %llu: word %zu of %zu is wrong\n", i,
			        (unsigned long long)v, k, WORDS(i));
			CHECK(!"bytes");
		}
}

/* 0, or a code that an injected failure may have caused: the caller goes without. */
static bool failed(int code)
{
	if (code && __atomic_load_n(&faulty, __ATOMIC_RELAXED) &&
	    (code == -EIO || code == -EAGAIN || code == -ENOMEM || code == OM_ECORRUPT ||
	     code == OM_EDISKFULL || code == OM_ECANCELED))
		return true;
	CHECK_EQ(code, 0);
	return false;
}

/* ---- one thing at a time ---- */

static void release(void *memory)
{
	free(memory);
	__atomic_sub_fetch(&taken, 1, __ATOMIC_RELAXED);
}

static void add(struct worker *w, int own)
{
	int i = w->number * OWN + own, code;
	uint64_t v = pick(w, 3) ? om_test_random(&w->seed) >> 8 : 0;
	char name[16];
	void *memory;

	snprintf(name, sizeof(name), "b%d", i);
	__atomic_store_n(&versions[i], v, __ATOMIC_RELEASE);
	if (!v) {
		code = om_store_add_zeros(w->store, name, NULL, WORDS(i) * 8, NULL);
	} else if (pick(w, 3)) {
		fill(w->words, i, v);
		code = om_store_add(w->store, name, NULL, w->words, WORDS(i) * 8, NULL, SOON);
	} else {
		memory = malloc(WORDS(i) * 8);
		CHECK(memory);
		fill(memory, i, v);
		__atomic_add_fetch(&taken, 1, __ATOMIC_RELAXED);
		code = om_store_take(w->store, name, NULL, memory, WORDS(i) * 8, NULL, release,
		                     memory, SOON);
		if (code)
			release(memory);
	}
	if (code == OM_EDISKFULL || failed(code)) /* not all blocks fit together */
		return;
	CHECK_EQ(om_store_block(w->store, name, &w->blocks[own]), 0);
}

static void drop(struct worker *w, int own)
{
	struct om_lease *l = NULL;
	struct om_block *b = w->blocks[own];
	int i = w->number * OWN + own;

	if (pick(w, 2) && om_store_lease_now(w->store, om_block_name(b), &l))
		l = NULL;
	CHECK_EQ(om_store_remove(w->store, om_block_name(b)), 0);
	if (l) { /* the bytes go with the last lease */
		verify(l, i);
		om_lease_unref(l);
	}
	om_block_unref(b);
	w->blocks[own] = NULL;
}

/* Decode a block whose only bytes are encoded ones. False: it could not be. */
static bool unpack(struct worker *w, int own)
{
	struct om_block *b = w->blocks[own];
	int i = w->number * OWN + own, code;
	struct om_lease *l;
	uint8_t codec;
	struct packed p;

	code = om_block_lease_packed(w->store, b, SOON, &l, &codec);
	if (code == OM_EAGAIN)
		return true;
	if (failed(code))
		return false;
	memcpy(&p, om_lease_data(l), sizeof(p));
	om_lease_unref(l);
	CHECK_EQ(p.block, i);
	CHECK_EQ(p.version, version_of(i));
	CHECK_EQ(codec, i % 7);
	if (!pick(w, 16)) { /* what it does not decode to is refused, and nothing is lost */
		fill(w->words, i, p.version + 1);
		code = om_block_unpack(w->store, b, w->words, WORDS(i) * 8, SOON);
		CHECK(code == OM_ECORRUPT || failed(code));
	}
	fill(w->words, i, p.version);
	w->unpacks++;
	return !failed(om_block_unpack(w->store, b, w->words, WORDS(i) * 8, SOON));
}

/* NULL: it could not be had. */
static struct om_lease *lease(struct worker *w, int own, enum om_access access)
{
	struct om_lease *l;
	int code;

	for (;;) {
		code = om_block_lease_bytes(w->store, w->blocks[own], access, SOON, &l);
		if (code != OM_EPACKED)
			break;
		if (!unpack(w, own))
			return NULL;
	}
	return failed(code) ? NULL : l;
}

static void use(struct worker *w, int own, enum om_access access)
{
	struct om_lease *l = lease(w, own, access);
	int i = w->number * OWN + own;
	uint64_t v;

	if (!l)
		return;
	verify(l, i);
	if (access != OM_READ && pick(w, 4)) {
		v = om_test_random(&w->seed) >> 8;
		fill(om_lease_data(l), i, v);
		__atomic_store_n(&versions[i], v, __ATOMIC_RELEASE);
	}
	if (pick(w, 4)) {
		om_lease_unref(l);
		return;
	}
	om_lease_view_ref(l);
	om_lease_unref(l);
	if (!pick(w, 4))
		usleep((unsigned)pick(w, 500));
	verify(l, i);
	om_lease_view_unref(l);
}

static void touch(struct worker *w, int own)
{
	const char *name = om_block_name(w->blocks[own]);
	struct om_block *b;
	int code = om_store_access_now(w->store, "default", name, &b);

	if (code == OM_EAGAIN)
		code = om_store_access(w->store, "default", name, SOON, &b);
	if (code == OM_EPACKED) {
		unpack(w, own);
		return;
	}
	if (failed(code))
		return;
	CHECK(b == w->blocks[own]);
	om_block_unref(b);
}

static void prefetch(struct worker *w)
{
	const char *names[OWN];
	struct om_ticket *t;
	size_t count = 0;
	int code;

	for (int own = 0; own < OWN; own++)
		if (w->blocks[own] && pick(w, 4) == 0)
			names[count++] = om_block_name(w->blocks[own]);
	code = om_store_prefetch(w->store, names, count, &t);
	if (failed(code))
		return;
	if (pick(w, 2)) {
		om_ticket_cancel(t);
	} else {
		code = om_ticket_wait(t, SOON);
		CHECK(code == OM_EPACKED || code == OM_ECANCELED || code == OM_EBUSY || !code ||
		      failed(code));
	}
	om_ticket_free(t);
}

static void swap_out(struct worker *w)
{
	struct om_swapped done;
	struct om_swap *p;
	bool all = pick(w, 4) == 0;
	uint64_t bytes = all ? UINT64_MAX : pick(w, HOST / 4);
	int code;

	if (failed(om_swap_begin(w->store, NULL, bytes, &p)))
		return;
	code = om_swap_wait(p, pick(w, 2) ? SOON : om_now() + pick(w, 500) * USEC);
	while (code == OM_EBUSY && pick(w, 2))
		code = om_swap_wait(p, SOON);
	CHECK(code == 0 || code == OM_EBUSY);
	om_swap_end(p, &done);
}

/* Encode whatever the policy would have go, whoever owns it. */
static void pack(struct worker *w)
{
	uint8_t bytes[4000] = { 0 };
	struct om_lease *l;
	struct packed p;
	int code = om_store_victim(w->store, NULL, &l);

	if (code == OM_EAGAIN || failed(code))
		return;
	p.block = (uint64_t)atoi(om_lease_name(l) + 1);
	p.version = version_of((int)p.block);
	memcpy(bytes, &p, sizeof(p));
	if (!pick(w, 4))
		usleep((unsigned)pick(w, 300));
	code = om_lease_pack(l, bytes, sizeof(p) + pick(w, sizeof(bytes) - sizeof(p)),
	                     (uint8_t)(p.block % 7));
	if (code != OM_EBUSY && code != OM_ENAME && !failed(code))
		w->packs++;
	om_lease_unref(l);
}

static void settings(struct worker *w)
{
	static const char *const policies[] = { "lru", "clock", "adaptive", "s3fifo" };

	switch (pick(w, 5)) {
	case 0:
		failed(om_store_policy(w->store, "default", policies[pick(w, 4)]));
		break;
	case 1:
		CHECK_EQ(om_store_disk(w->store, NULL, DISK - pick(w, 2) * (DISK / 8)), 0);
		break;
	case 2:
		failed(om_store_foresee(w->store, "default", pick(w, 2)));
		break;
	case 3:
		CHECK_EQ(om_store_trim(w->store, pick(w, 2) << 20), 0);
		break;
	default:
		om_store_collect(w->store);
	}
}

static void pin(struct worker *w, int own)
{
	for (int i = 0; i < OWN; i++) /* one at a time: there must be room for others */
		if (w->blocks[i])
			CHECK_EQ(om_block_mark(w->store, w->blocks[i], i == own && pick(w, 2), 1),
			         0);
}

static void step(struct worker *w)
{
	int own = (int)pick(w, OWN);
	struct om_block_state state;

	if (!w->blocks[own]) {
		add(w, own);
		return;
	}
	switch (pick(w, 20)) {
	case 0:
		drop(w, own);
		break;
	case 1:
	case 2:
	case 3:
		use(w, own, OM_READ);
		break;
	case 4:
	case 5:
	case 6:
		use(w, own, OM_SHARE);
		break;
	case 7:
		use(w, own, OM_WRITE);
		break;
	case 8:
	case 9:
		touch(w, own);
		break;
	case 10:
		prefetch(w);
		break;
	case 11:
	case 12:
	case 13:
		swap_out(w);
		break;
	case 14:
	case 15:
	case 16:
		pack(w);
		break;
	case 17:
		pin(w, own);
		break;
	case 18:
		om_block_state(w->store, w->blocks[own], &state);
		CHECK(state.named && state.nbytes == WORDS(w->number * OWN + own) * 8);
		break;
	default:
		settings(w);
	}
}

static void *work(void *arg)
{
	struct worker *w = arg;

	for (; !__atomic_load_n(&stop, __ATOMIC_RELAXED); w->done++)
		step(w);
	return NULL;
}

/* ---- all of it ---- */

static void break_something(unsigned long long *seed)
{
	static const enum om_fault points[] = { OM_FAULT_READ,  OM_FAULT_WRITE,  OM_FAULT_SHORT,
		                                OM_FAULT_FLIP,  OM_FAULT_SUBMIT, OM_FAULT_NOSPC,
		                                OM_FAULT_ALLOC, OM_FAULT_MAP };
	unsigned long long r = om_test_random(seed);

	om_fault_arm(points[r % 8], 1 + (r >> 8) % 40, false);
}

static void run(bool broken, unsigned long long seed)
{
	const char *soak = getenv("OMNIMEM_SOAK");
	uint64_t until = om_deadline((soak && *soak == '1' ? 60 : 2) * OM_NSEC);
	static struct worker workers[THREADS];
	uint64_t done = 0, packs = 0, unpacks = 0;
	struct om_store *s = open_store();
	pthread_t ids[THREADS];
	struct om_group_stats g;

	__atomic_store_n(&stop, false, __ATOMIC_RELAXED);
	__atomic_store_n(&faulty, broken, __ATOMIC_RELAXED);
	memset(workers, 0, sizeof(workers));
	for (int t = 0; t < THREADS; t++) {
		workers[t] = (struct worker){ .store = s,
			                      .number = t,
			                      .seed = seed * 1000 + (unsigned)t };
		workers[t].words = malloc(WORDS(BLOCKS) * 8);
		CHECK(workers[t].words);
		CHECK(pthread_create(&ids[t], NULL, work, &workers[t]) == 0);
	}
	while (om_now() < until) {
		usleep(broken ? 2000 : 20000);
		if (broken)
			break_something(&seed);
		check(s);
	}
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (int t = 0; t < THREADS; t++)
		CHECK_EQ(pthread_join(ids[t], NULL), 0);
	om_fault_reset();
	__atomic_store_n(&faulty, false, __ATOMIC_RELAXED);
	check(s);
	for (int t = 0; t < THREADS; t++) {
		struct worker *w = &workers[t];

		done += w->done;
		packs += w->packs;
		unpacks += w->unpacks;
		pin(w, -1);
		for (int own = 0; own < OWN; own++) {
			if (!w->blocks[own])
				continue;
			use(w, own, OM_READ);
			om_block_unref(w->blocks[own]);
		}
		free(w->words);
	}
	check(s);
	CHECK_EQ(om_store_group_stats(s, NULL, &g), 0);
	CHECK(g.leases == 0 && g.pinned == 0);
	CHECK(g.traffic.outs && g.traffic.ins && packs && unpacks);
	printf("%llu steps, %llu out, %llu in, %llu encoded, %llu decoded\n",
	       (unsigned long long)done, (unsigned long long)g.traffic.outs,
	       (unsigned long long)g.traffic.ins, (unsigned long long)packs,
	       (unsigned long long)unpacks);
	om_store_close(s);
	om_store_collect(s);
	om_store_unref(s);
	CHECK_EQ(taken, 0);
}

static void *access_often(void *arg)
{
	struct worker *w = arg;

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		for (int own = 0; own < OWN; own++)
			touch(w, own);
		w->done++;
	}
	return NULL;
}

/* What others bring back while a thread swaps everything out does not keep that thread for ever. */
static void swapping_ends(void)
{
	static struct worker workers[THREADS];
	struct om_store *s = open_store();
	pthread_t ids[THREADS];

	__atomic_store_n(&stop, false, __ATOMIC_RELAXED);
	memset(workers, 0, sizeof(workers));
	for (int t = 0; t < THREADS; t++) {
		struct worker *w = &workers[t];

		*w = (struct worker){ .store = s, .number = t, .seed = 3 + (unsigned)t };
		w->words = malloc(WORDS(BLOCKS) * 8);
		CHECK(w->words);
		for (int own = 0; own < OWN; own++)
			add(w, own);
		CHECK_EQ(pthread_create(&ids[t], NULL, access_often, w), 0);
	}
	for (int i = 0; i < 20; i++) {
		struct om_swapped done;
		struct om_swap *p;

		CHECK_EQ(om_swap_begin(s, NULL, UINT64_MAX, &p), 0);
		CHECK_EQ(om_swap_wait(p, SOON), 0);
		om_swap_end(p, &done);
		CHECK(done.bytes <= HOST + WORDS(BLOCKS) * 8);
		usleep(20000);
	}
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (int t = 0; t < THREADS; t++) {
		CHECK_EQ(pthread_join(ids[t], NULL), 0);
		for (int own = 0; own < OWN; own++)
			if (workers[t].blocks[own])
				drop(&workers[t], own);
		free(workers[t].words);
	}
	check(s);
	om_store_close(s);
	om_store_collect(s);
	om_store_unref(s);
	CHECK_EQ(taken, 0);
}

int main(void)
{
	const char *io = getenv("OMNIMEM_IO"), *soak = getenv("OMNIMEM_SOAK");

	alarm(soak && *soak == '1' ? 240 : 100); /* something hangs */
	backend = io && !strcmp(io, "threads") ? 2 : io && !strcmp(io, "uring") ? 1 : 0;
	CHECK(mkdtemp(dir));
	run(false, 5);
	run(true, 7);
	swapping_ends();
	CHECK(rmdir(dir) == 0);
	return 0;
}
