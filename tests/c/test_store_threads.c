/*
 * The store under threads: leases, write leases, eviction, removal, prefetch and cancel at random
 * over more bytes than HOST holds; close under waiters and workers; fork while threads run.
 * OMNIMEM_SOAK=1 makes the random part a minute long.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define SOON     om_deadline(20 * OM_NSEC)
#define MSEC     (OM_NSEC / 1000)
#define THREADS  8
#define BLOCKS   40
#define FILES    10                                 /* the first ones have an origin */
#define WORDS(i) ((size_t)9000 + 911 * (size_t)(i)) /* of block i: 72 to 356 kB */

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static char path[256];
static int backend;
static bool stop; /* atomic */

static struct om_store *open_store(uint64_t host, uint64_t disk)
{
	struct om_store_config c = { .host_limit_bytes = host,
		                     .disk_limit_bytes = disk,
		                     .directory = dir,
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

static void name_of(int i, char ret[16])
{
	snprintf(ret, 16, "b%d", i);
}

/* Word k of version v of block i. The first word is the version itself. */
static uint64_t word(int i, uint64_t v, size_t k)
{
	return k ? (v * 1000003 + (uint64_t)i) * 0x9E3779B97F4A7C15u + k : v;
}

static void fill(uint64_t *words, int i, uint64_t v)
{
	for (size_t k = 0; k < WORDS(i); k++)
		words[k] = word(i, v, k);
}

static void verify(const struct om_lease *l, int i)
{
	const uint64_t *words = om_lease_data(l);

	CHECK_EQ(om_lease_nbytes(l), WORDS(i) * 8);
	for (size_t k = 1; k < WORDS(i); k++)
		if (words[k] != word(i, words[0], k)) {
			fprintf(stderr, "block %d, version %llu: word %zu is wrong\n", i,
			        (unsigned long long)words[0], k);
			CHECK(!"bytes");
		}
}

static uint64_t file_offset(int i)
{
	uint64_t at = 56; /* 8-byte aligned and no more, as tensors in a file are */

	for (int k = 0; k < i; k++)
		at += WORDS(k) * 8 + 24;
	return at;
}

static void make_file(void)
{
	FILE *f = fopen(path, "wb");
	uint64_t *words = malloc(WORDS(BLOCKS) * 8);

	CHECK(f && words);
	for (int i = 0; i < FILES; i++) {
		fill(words, i, 1);
		CHECK(fseek(f, (long)file_offset(i), SEEK_SET) == 0);
		CHECK(fwrite(words, 8, WORDS(i), f) == WORDS(i));
	}
	CHECK(fclose(f) == 0);
	free(words);
}

/* ---- random work ---- */

struct worker {
	struct om_store *store;
	unsigned long long seed;
	uint64_t *words;
	uint64_t done;
};

static int add(struct worker *w, int i)
{
	struct om_file_range r = { path, file_offset(i), WORDS(i) * 8 };
	char name[16];

	name_of(i, name);
	if (i < FILES)
		return om_store_add_file(w->store, name, "files", &r, 1, OM_NOT_ENCODED, NULL);
	fill(w->words, i, om_test_random(&w->seed) >> 8);
	return om_store_add(w->store, name, NULL, w->words, WORDS(i) * 8, NULL, SOON);
}

static void read_one(struct worker *w, const char *name, int i)
{
	struct om_lease *l;
	int code = om_store_lease(w->store, name, false, SOON, &l);

	if (code == OM_ENAME)
		return;
	CHECK_EQ(code, 0);
	verify(l, i);
	if (om_test_random(&w->seed) % 4 == 0) {
		om_lease_view_ref(l);
		om_lease_unref(l);
		verify(l, i);
		om_lease_view_unref(l);
	} else {
		om_lease_unref(l);
	}
}

static void write_one(struct worker *w, const char *name, int i)
{
	struct om_lease *l;
	int code = om_store_lease(w->store, name, true, SOON, &l);

	if (code == OM_ENAME)
		return;
	CHECK_EQ(code, 0);
	verify(l, i);
	fill(om_lease_data(l), i, om_test_random(&w->seed) >> 8);
	om_lease_unref(l);
}

static void prefetch_some(struct worker *w, bool cancel)
{
	char names[4][16];
	const char *list[4];
	struct om_ticket *t;
	int code;

	for (int k = 0; k < 4; k++) {
		name_of((int)(om_test_random(&w->seed) % BLOCKS), names[k]);
		list[k] = names[k];
	}
	code = om_store_prefetch(w->store, list, 4, &t);
	if (code == OM_ENAME)
		return;
	CHECK_EQ(code, 0);
	if (cancel) {
		om_ticket_cancel(t);
		CHECK(om_ticket_done(t));
	} else if (om_test_random(&w->seed) % 2) {
		code = om_ticket_wait(t, SOON);
		CHECK(code == 0 || code == OM_ENAME || code == OM_ECANCELED);
	}
	om_ticket_free(t);
}

static void step(struct worker *w)
{
	int i = (int)(om_test_random(&w->seed) % BLOCKS), code;
	char name[16];

	name_of(i, name);
	switch (om_test_random(&w->seed) % 16) {
	case 0:
	case 1:
		write_one(w, name, i);
		break;
	case 2:
	case 3:
		code = om_store_evict(w->store, name, SOON);
		CHECK(code >= 0 || code == OM_ENAME);
		break;
	case 4:
		code = om_store_remove(w->store, name);
		CHECK(code == 0 || code == OM_ENAME);
		code = add(w, i);
		CHECK(code == 0 || code == OM_EVALUE); /* somebody else has added it */
		break;
	case 5:
	case 6:
		prefetch_some(w, false);
		break;
	case 7:
		prefetch_some(w, true);
		break;
	case 8:
		check(w->store);
		break;
	default:
		read_one(w, name, i);
	}
}

static void *work(void *arg)
{
	struct worker *w = arg;

	for (; !__atomic_load_n(&stop, __ATOMIC_RELAXED); w->done++)
		step(w);
	return NULL;
}

static struct worker workers[THREADS];
static pthread_t ids[THREADS];

static void start_workers(struct om_store *s, void *(*run)(void *))
{
	__atomic_store_n(&stop, false, __ATOMIC_RELAXED);
	for (int t = 0; t < THREADS; t++) {
		workers[t].store = s;
		workers[t].seed = 77 + (unsigned)t;
		workers[t].done = 0;
		if (!workers[t].words)
			workers[t].words = malloc(WORDS(BLOCKS) * 8);
		CHECK(workers[t].words);
	}
	for (int i = 0; i < BLOCKS; i++)
		CHECK_EQ(add(&workers[0], i), 0);
	for (int t = 0; t < THREADS; t++)
		CHECK(pthread_create(&ids[t], NULL, run, &workers[t]) == 0);
}

static void join_workers(void)
{
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (int t = 0; t < THREADS; t++)
		pthread_join(ids[t], NULL);
}

static void at_random(void)
{
	const char *soak = getenv("OMNIMEM_SOAK");
	uint64_t until = om_deadline((soak && *soak == '1' ? 60 : 2) * OM_NSEC), done = 0;
	struct om_store *s = open_store(4 << 20, 64 << 20);

	start_workers(s, work);
	while (om_now() < until) {
		usleep(20000);
		check(s);
	}
	join_workers();
	check(s);
	for (int t = 0; t < THREADS; t++)
		done += workers[t].done;
	CHECK(done > THREADS);
	for (int i = 0; i < BLOCKS; i++) {
		char name[16];

		name_of(i, name);
		read_one(&workers[0], name, i);
	}
	om_store_unref(s);
}

/* Two that want to write the same block must not wait for each other. */
static void *write_often(void *arg)
{
	struct worker *w = arg;

	for (int i = 0; i < 50; i++)
		write_one(w, "b20", 20);
	return NULL;
}

static void writers_take_turns(void)
{
	struct om_store *s = open_store(16 << 20, 64 << 20);
	struct om_lease *held, *none;

	start_workers(s, write_often);
	for (int t = 0; t < THREADS; t++)
		pthread_join(ids[t], NULL);
	check(s);
	CHECK_EQ(om_store_lease(s, "b20", true, SOON, &held), 0);
	CHECK_EQ(om_store_lease(s, "b20", true, om_deadline(10 * MSEC), &none), OM_EBUSY);
	CHECK_EQ(om_store_lease(s, "b20", false, om_deadline(10 * MSEC), &none), OM_EBUSY);
	CHECK(strstr(om_err_last()->text, "writing") && strstr(om_err_last()->holders, "b20"));
	om_lease_unref(held);
	CHECK_EQ(om_store_lease(s, "b20", false, SOON, &held), 0);
	CHECK_EQ(om_store_lease(s, "b20", true, om_deadline(10 * MSEC), &none), OM_EBUSY);
	CHECK(strstr(om_err_last()->holders, "b20"));
	om_lease_unref(held);
	om_store_unref(s);
}

/* Who waits for a fill that somebody else canceled gets the bytes. */
static void *cancel_often(void *arg)
{
	struct worker *w = arg;
	const char *names[] = { "b1", "b2", "b3" };

	for (int i = 0; i < 40; i++) {
		struct om_ticket *t;

		CHECK_EQ(om_store_prefetch(w->store, names, 3, &t), 0);
		if (w->seed % 2) {
			om_ticket_cancel(t);
		} else {
			CHECK_EQ(om_ticket_wait(t, SOON), 0);
			for (int k = 0; k < 3; k++)
				CHECK(om_store_evict(w->store, names[k], SOON) >= 0);
		}
		om_ticket_free(t);
	}
	return NULL;
}

static void cancels_harm_nobody(void)
{
	struct om_store *s = open_store(16 << 20, 64 << 20);

	start_workers(s, cancel_often);
	for (int t = 0; t < THREADS; t++)
		pthread_join(ids[t], NULL);
	check(s);
	om_store_unref(s);
}

/* The mover looks at a block's files without the lock: they and the block stay meanwhile. */
static void removed_while_its_file_is_looked_at(void)
{
	struct om_store *s = open_store(16 << 20, 0);
	struct om_file_range r = { path, file_offset(0), WORDS(0) * 8 };
	const char *names[] = { "brief" };
	unsigned long long seed = 5;

	for (int i = 0; i < 3000; i++) {
		uint64_t until;
		struct om_ticket *t;

		CHECK_EQ(om_store_add_file(s, "brief", NULL, &r, 1, OM_NOT_ENCODED, NULL), 0);
		CHECK_EQ(om_store_prefetch(s, names, 1, &t), 0);
		until = om_now() + om_test_random(&seed) % 40000;
		while (om_now() < until)
			;
		CHECK_EQ(om_store_remove(s, "brief"), 0);
		om_ticket_free(t);
	}
	check(s);
	om_store_unref(s);
}

/* ---- close ---- */

static void *wait_for_room(void *arg)
{
	struct om_lease *l;

	CHECK_EQ(om_store_lease(arg, "big2", false, UINT64_MAX, &l), OM_ECLOSED);
	return NULL;
}

static void *wait_to_write(void *arg)
{
	struct om_lease *l;

	CHECK_EQ(om_store_lease(arg, "big1", true, UINT64_MAX, &l), OM_ECLOSED);
	return NULL;
}

static void close_under_waiters(void)
{
	struct om_file_range r = { path, 0, 1000000 };
	struct om_store *s = open_store(3 << 19, 0);
	struct om_lease *held;
	pthread_t waiters[4];

	CHECK_EQ(om_store_add_file(s, "big1", NULL, &r, 1, OM_NOT_ENCODED, NULL), 0);
	CHECK_EQ(om_store_add_file(s, "big2", NULL, &r, 1, OM_NOT_ENCODED, NULL), 0);
	CHECK_EQ(om_store_lease(s, "big1", false, SOON, &held), 0);
	for (int t = 0; t < 4; t++)
		CHECK(pthread_create(&waiters[t], NULL, t < 3 ? wait_for_room : wait_to_write, s) ==
		      0);
	usleep(50000);
	CHECK_EQ(om_store_close(s), 0);
	for (int t = 0; t < 4; t++)
		pthread_join(waiters[t], NULL);
	om_store_unref(s);
	om_lease_unref(held);
}

/* Leases until the store is closed: each is whole, or refused. */
static void *use_until_closed(void *arg)
{
	struct worker *w = arg;
	int code = 0;

	while (code != OM_ECLOSED) {
		int i = (int)(om_test_random(&w->seed) % BLOCKS);
		const char *names[1];
		struct om_ticket *t;
		struct om_lease *l;
		char name[16];

		name_of(i, name);
		names[0] = name;
		switch (om_test_random(&w->seed) % 4) {
		case 0:
			code = om_store_evict(w->store, name, SOON);
			break;
		case 1:
			code = om_store_prefetch(w->store, names, 1, &t);
			if (!code) {
				code = om_ticket_wait(t, SOON);
				om_ticket_free(t);
			}
			break;
		default:
			code = om_store_lease(w->store, name, false, SOON, &l);
			if (!code) {
				verify(l, i);
				om_lease_unref(l);
			}
		}
		CHECK(code >= 0 || code == OM_ECLOSED);
	}
	return NULL;
}

static void close_under_workers(void)
{
	for (int round = 0; round < 12; round++) {
		struct om_store *s = open_store(4 << 20, 64 << 20);

		start_workers(s, use_until_closed);
		usleep(1000 + 7000 * (unsigned)round);
		CHECK_EQ(om_store_close(s), 0);
		join_workers();
		om_store_unref(s);
	}
}

static void *evict_big(void *arg)
{
	int code = om_store_evict(arg, "big", SOON);

	CHECK(code >= 0 || code == OM_ECLOSED);
	return NULL;
}

/* A thread hashes what it is about to write out: the bytes stay until it is done. */
static void close_under_a_spill(void)
{
	uint64_t bytes = 48 << 20;
	uint8_t *data = calloc(1, bytes);

	CHECK(data);
	for (unsigned round = 0; round < 4; round++) {
		struct om_store *s = open_store(64 << 20, 256 << 20);
		pthread_t thread;

		CHECK_EQ(om_store_add(s, "big", NULL, data, bytes, NULL, SOON), 0);
		CHECK(pthread_create(&thread, NULL, evict_big, s) == 0);
		usleep(500 + 1500 * round);
		CHECK_EQ(om_store_close(s), 0);
		pthread_join(thread, NULL);
		om_store_unref(s);
	}
	free(data);
}

/* ---- fork ---- */

static int child_of(struct om_store *s, struct om_lease *held)
{
	struct om_lease *l;
	struct om_info info;
	struct om_stats stats;

	alarm(20);
	om_lease_unref(held); /* harmless */
	if (om_store_lease(s, "b1", false, SOON, &l) != OM_ECLOSED ||
	    om_store_info(s, "b1", &info) != OM_ECLOSED ||
	    om_store_stats(s, &stats) != OM_ECLOSED || om_store_check(s) != OM_ECLOSED ||
	    om_store_contains(s, "b1"))
		return 1;
	om_store_drain(s);
	om_store_unref(s);
	return 0;
}

static void fork_while_threads_run(void)
{
	struct om_store *s = open_store(4 << 20, 64 << 20);
	struct om_lease *held;

	start_workers(s, work);
	for (int i = 0; i < 3; i++) {
		int status = -1;
		pid_t child;

		if (om_store_lease(s, "b0", false, SOON, &held))
			continue; /* a worker has just removed it */
		child = fork();
		if (child == 0)
			_exit(child_of(s, held));
		CHECK(child > 0 && waitpid(child, &status, 0) == child);
		CHECK(WIFEXITED(status));
		CHECK_EQ(WEXITSTATUS(status), 0);
		om_lease_unref(held);
	}
	join_workers();
	check(s);
	om_store_unref(s);
}

#define EVEN 900000 /* bytes of a block of exchange() */

static void *exchange(void *arg)
{
	struct om_store *s = arg;
	unsigned long long seed = 1 + om_now();

	for (int n = 0; n < 150; n++) {
		int i = (int)(om_test_random(&seed) % 10);
		struct om_lease *l;
		char name[16];

		name_of(i, name);
		CHECK_EQ(om_store_lease(s, name, false, SOON, &l), 0);
		CHECK_EQ(*((uint8_t *)om_lease_data(l) + EVEN - 1), i);
		om_lease_unref(l);
		check(s);
	}
	return NULL;
}

/* Blocks that HOST and DISK only just hold together are exchanged by several threads: the disk copy of
 * what one of them is bringing in gives way to what another has to write out, once it is there. */
static void a_full_disk_is_waited_for(void)
{
	struct om_store *s = open_store(6 << 20, 6 * om_up(EVEN, OM_PAGE));
	uint8_t *bytes = malloc(EVEN);
	pthread_t threads[3];

	for (int i = 0; i < 10; i++) {
		char name[16];

		name_of(i, name);
		memset(bytes, i, EVEN);
		CHECK_EQ(om_store_add(s, name, NULL, bytes, EVEN, NULL, SOON), 0);
	}
	for (int t = 0; t < 3; t++)
		CHECK_EQ(pthread_create(&threads[t], NULL, exchange, s), 0);
	for (int t = 0; t < 3; t++)
		CHECK_EQ(pthread_join(threads[t], NULL), 0);
	free(bytes);
	om_store_unref(s);
}

int main(void)
{
	const char *io = getenv("OMNIMEM_IO"), *soak = getenv("OMNIMEM_SOAK");

	alarm(soak && *soak == '1' ? 200 : 60); /* something hangs */
	backend = io && !strcmp(io, "threads") ? 2 : io && !strcmp(io, "uring") ? 1 : 0;
	CHECK(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/file", dir);
	make_file();
	at_random();
	writers_take_turns();
	cancels_harm_nobody();
	removed_while_its_file_is_looked_at();
	close_under_waiters();
	close_under_workers();
	close_under_a_spill();
	fork_while_threads_run();
	a_full_disk_is_waited_for();
	for (int t = 0; t < THREADS; t++)
		free(workers[t].words);
	unlink(path);
	CHECK(rmdir(dir) == 0);
	return 0;
}
