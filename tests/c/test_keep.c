/*
 * Units that are kept, and let go, while they are in use: who must take windows away, what stays in HOST, what is
 * written, room from other groups, threads, faults swept one by one. Both back ends.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define SOON   om_deadline(20 * OM_NSEC)
#define UNITS  6
#define BLOCKS 2
#define BYTES  (200 * 1024 + 24)
#define HELD   om_up(BYTES, OM_PAGE) /* memory of one block */

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static int backend;

/* Units of blocks without an origin. `shown`: the windows, which only a user may read. */
struct model {
	struct om_store *store;
	struct om_stream *stream;
	char names[UNITS][BLOCKS][16];
	uint8_t *shown[UNITS][BLOCKS];
	uint8_t written[UNITS]; /* added to the bytes since they came */
};

static uint8_t byte_of(const struct model *m, size_t u, size_t b, size_t at)
{
	return (uint8_t)((u * 31 + b * 7 + at) * 2654435761u >> 11) + m->written[u];
}

static int try_open(struct model *m, uint64_t host_bytes)
{
	static const uint8_t streamed[BLOCKS] = { OM_KEEP_NOTHING, OM_KEEP_NOTHING };
	struct om_store_config c = { .host_limit_bytes = host_bytes,
		                     .disk_limit_bytes = 64 << 20,
		                     .directory = dir,
		                     .backend = backend };
	struct om_stream_unit list[UNITS];
	const char *names[UNITS][BLOCKS];
	uint8_t *data = malloc(BYTES);
	int code;

	memset(m, 0, sizeof(*m));
	code = om_store_create(&c, &m->store);
	for (size_t u = 0; u < UNITS; u++) {
		for (size_t b = 0; b < BLOCKS && !code; b++) {
			snprintf(m->names[u][b], sizeof(m->names[u][b]), "u%d.b%d", (int)u, (int)b);
			for (size_t i = 0; i < BYTES; i++)
				data[i] = byte_of(m, u, b, i);
			code = om_store_add(m->store, m->names[u][b], "model", data, BYTES, NULL,
			                    SOON);
			names[u][b] = m->names[u][b];
		}
		list[u] = (struct om_stream_unit){ "unit", names[u], streamed, BLOCKS };
	}
	free(data);
	return code ? code : om_stream_create(m->store, "model", list, UNITS, &m->stream);
}

static void check(const struct model *m)
{
	if (om_store_check(m->store)) {
		fprintf(stderr, "%s\n", om_err_last()->text);
		CHECK(!"invariant");
	}
}

static void open_model(struct model *m, uint64_t host_bytes)
{
	if (try_open(m, host_bytes)) {
		fprintf(stderr, "%s\n", om_err_last()->text);
		CHECK(!"open");
	}
	check(m);
}

static void close_model(struct model *m)
{
	om_stream_free(m->stream);
	om_store_unref(m->store);
}

static void show(struct model *m, size_t u)
{
	for (size_t b = 0; b < BLOCKS; b++)
		m->shown[u][b] = om_lease_data(om_stream_lease(m->stream, u, b));
}

static void hide(struct model *m, size_t u)
{
	memset(m->shown[u], 0, sizeof(m->shown[u]));
	om_stream_unbound(m->stream, u);
}

static int enter(struct model *m, size_t u)
{
	bool bind;
	int code = om_stream_enter(m->stream, u, SOON, &bind);

	if (!code && bind) {
		show(m, u);
		om_stream_bound(m->stream, u, true);
	}
	return code;
}

static bool leave(struct model *m, size_t u)
{
	bool unbind;

	CHECK_EQ(om_stream_leave(m->stream, u, &unbind), 0);
	if (unbind)
		hide(m, u);
	return unbind;
}

static bool keep(struct model *m, size_t u, bool kept)
{
	bool unbind;

	CHECK_EQ(om_stream_keep(m->stream, u, kept, &unbind), 0);
	if (unbind)
		hide(m, u);
	return unbind;
}

static void verify(const struct model *m, size_t u)
{
	for (size_t b = 0; b < BLOCKS; b++) {
		CHECK(m->shown[u][b]);
		for (size_t i = 0; i < BYTES; i += 97)
			CHECK_EQ(m->shown[u][b][i], byte_of(m, u, b, i));
	}
}

static void visit(struct model *m, size_t u)
{
	CHECK_EQ(enter(m, u), 0);
	verify(m, u);
	leave(m, u);
}

static uint64_t host_bytes(const struct model *m)
{
	struct om_group_stats g;

	CHECK_EQ(om_store_group_stats(m->store, "model", &g), 0);
	return g.host_bytes;
}

static void evict_all(struct model *m)
{
	for (size_t u = 0; u < UNITS; u++)
		for (size_t b = 0; b < BLOCKS; b++)
			CHECK_EQ(om_store_evict(m->store, m->names[u][b], SOON), 1);
}

static uint64_t users(const struct model *m)
{
	struct om_stream_stats s;

	CHECK_EQ(om_stream_stats(m->stream, &s), 0);
	return s.users;
}

/* ---- one thread ---- */

static void the_stream_is_a_user(void)
{
	struct model m;

	open_model(&m, 64 << 20);
	CHECK(!keep(&m, 2, true));
	CHECK_EQ(users(&m), 0);
	CHECK_EQ(enter(&m, 2), 0);
	CHECK_EQ(users(&m), 1);
	CHECK(!leave(&m, 2)); /* it stays */
	CHECK_EQ(users(&m), 0);
	verify(&m, 2);
	visit(&m, 2);
	check(&m);
	CHECK(keep(&m, 2, false)); /* nobody uses it */
	CHECK(!keep(&m, 2, false));
	CHECK(!m.shown[2][0]);
	check(&m);

	keep(&m, 2, true);
	CHECK_EQ(enter(&m, 2), 0);
	CHECK_EQ(enter(&m, 2), 0);
	CHECK(!keep(&m, 2, false)); /* two do */
	CHECK(!leave(&m, 2));
	verify(&m, 2);
	CHECK(leave(&m, 2));
	check(&m);
	CHECK_EQ(om_stream_keep(m.stream, UNITS, true, &(bool){ 0 }), OM_EVALUE);
	close_model(&m);
}

/* Entered and left at once: only while all are kept and bound, and never by the one that has to unbind. */
static void joining_what_stays(void)
{
	struct om_stream_stats before, after;
	struct model m;

	open_model(&m, 64 << 20);
	CHECK(!om_stream_join(m.stream, 0)); /* idle */
	for (size_t u = 0; u < UNITS; u++) {
		keep(&m, u, true);
		CHECK(!om_stream_join(m.stream, u)); /* kept, and not there yet */
		visit(&m, u);
	}
	CHECK_EQ(om_stream_stats(m.stream, &before), 0);
	for (size_t u = 0; u < UNITS; u++) {
		CHECK(om_stream_join(m.stream, u));
		verify(&m, u);
		CHECK_EQ(users(&m), 1);
		CHECK(om_stream_part(m.stream, u));
	}
	CHECK_EQ(om_stream_stats(m.stream, &after), 0);
	CHECK_EQ(after.enters - before.enters, UNITS);
	CHECK_EQ(after.hits - before.hits, UNITS);
	CHECK_EQ(after.mispredicted, before.mispredicted); /* the order is learned all the same */
	CHECK(!om_stream_part(m.stream, 0));               /* nobody is in it */
	CHECK(!om_stream_join(m.stream, UNITS));
	CHECK(!om_stream_part(m.stream, UNITS));

	CHECK(om_stream_join(m.stream, 1));
	CHECK(om_stream_join(m.stream, 1));
	CHECK(!keep(&m, 1, false));          /* two use it */
	CHECK(!om_stream_join(m.stream, 1)); /* it has to go */
	CHECK(!om_stream_join(m.stream, 0)); /* there is something to read ahead */
	CHECK(om_stream_part(m.stream, 1));
	verify(&m, 1);
	CHECK(!om_stream_part(m.stream, 1)); /* the last one takes the windows away */
	CHECK(leave(&m, 1));
	check(&m);
	keep(&m, 1, true);
	visit(&m, 1);
	CHECK(om_stream_join(m.stream, 0));
	CHECK(om_stream_part(m.stream, 0));
	check(&m);
	close_model(&m);
}

/* Whoever was to make the windows could not, or was interrupted: the unit is given back, kept or not. */
static void a_kept_unit_that_could_not_be_bound(void)
{
	struct model m;
	bool bind, unbind;

	open_model(&m, 64 << 20);
	keep(&m, 0, true);
	CHECK_EQ(om_stream_enter(m.stream, 0, SOON, &bind), 0);
	CHECK(bind);
	om_stream_bound(m.stream, 0, false);
	check(&m);
	CHECK_EQ(om_stream_enter(m.stream, 0, SOON, &bind), 0);
	CHECK(bind);
	CHECK_EQ(om_stream_leave(m.stream, 0, &unbind), 0);
	CHECK(unbind);
	om_stream_unbound(m.stream, 0);
	check(&m);
	visit(&m, 0);
	verify(&m, 0);
	close_model(&m);
}

static void what_goes_lingers(void)
{
	struct model m;
	uint64_t all = UNITS * BLOCKS * HELD;

	open_model(&m, 64 << 20);
	CHECK_EQ(om_stream_linger(m.stream, true), 0);
	for (size_t u = 0; u < UNITS; u++) {
		keep(&m, u, true);
		visit(&m, u);
	}
	CHECK_EQ(host_bytes(&m), all);
	CHECK_EQ(om_store_evict(m.store, "u3.b1", SOON), 0); /* leased */
	for (size_t u = 0; u < UNITS; u++)
		CHECK(keep(&m, u, false));
	visit(&m, 1);
	check(&m);
	CHECK_EQ(host_bytes(&m), all);
	CHECK_EQ(om_store_evict(m.store, "u3.b1", SOON), 1);
	CHECK_EQ(host_bytes(&m), all - HELD);
	visit(&m, 3);
	CHECK_EQ(host_bytes(&m), all);
	close_model(&m);
}

static bool in_host(struct model *m, size_t u)
{
	struct om_info info;

	CHECK_EQ(om_store_info(m->store, m->names[u][0], &info), 0);
	return info.tiers & OM_TIER_HOST;
}

/* A pass begins at the beginning: that goes last, also of what others have passed over. */
static void the_beginning_stays(void)
{
	struct om_pressed p;
	struct model m;

	open_model(&m, 64 << 20);
	CHECK_EQ(om_stream_linger(m.stream, true), 0);
	for (int pass = 0; pass < 3; pass++) {
		for (size_t u = 0; u < UNITS; u++)
			visit(&m, u);
		CHECK_EQ(om_store_press(m.store, OM_LOW, 0, UNITS / 2 * BLOCKS * HELD, SOON, &p),
		         0);
		CHECK_EQ(om_store_press(m.store, OM_LOW, 0, 0, SOON, &p), 0);
		for (size_t u = 0; u < UNITS; u++)
			CHECK_EQ(in_host(&m, u), u < UNITS / 2);
		check(&m);
	}
	close_model(&m);
}

static void what_passes_leaves(void)
{
	uint64_t limit = 3 * BLOCKS * HELD, until = SOON;
	struct model m;

	open_model(&m, 64 << 20);
	CHECK_EQ(om_stream_linger(m.stream, true), 0);
	for (size_t u = 0; u < UNITS; u++)
		visit(&m, u);
	CHECK_EQ(om_stream_linger(m.stream, false), 0);
	CHECK_EQ(om_store_group(m.store, "model", limit), 0);
	keep(&m, 0, true);
	while (host_bytes(&m) > limit && om_now() < until) { /* what is being written is rescued */
		for (size_t u = 0; u < UNITS; u++) {
			visit(&m, u);
			verify(&m, 0);
			check(&m);
		}
		usleep(20000);
	}
	for (size_t u = 0; u < 2 * UNITS; u++) {
		visit(&m, u % UNITS);
		check(&m);
		CHECK(host_bytes(&m) <= limit);
	}
	close_model(&m);
}

static void add_to_unit(struct model *m, size_t u, uint8_t more)
{
	CHECK_EQ(enter(m, u), 0);
	for (size_t b = 0; b < BLOCKS; b++) {
		CHECK(om_lease_writable(om_stream_lease(m->stream, u, b)));
		for (size_t i = 0; i < BYTES; i++)
			m->shown[u][b][i] += more;
	}
	m->written[u] += more;
	leave(m, u);
}

static void what_is_written_to_windows_stays(void)
{
	struct model m;

	open_model(&m, 64 << 20);
	CHECK_EQ(om_stream_linger(m.stream, true), 0);
	for (int round = 0; round < 3; round++) {
		for (size_t u = 0; u < UNITS; u++)
			add_to_unit(&m, u, (uint8_t)(u + 1));
		evict_all(&m);
		CHECK_EQ(host_bytes(&m), 0);
		check(&m);
		for (size_t u = 0; u < UNITS; u++)
			visit(&m, u);
	}
	close_model(&m);
}

/* Two units fit: all of them pass through, what was written to them too. */
static void more_than_memory(void)
{
	struct model m;

	open_model(&m, 4 << 20);
	evict_all(&m);
	CHECK_EQ(om_store_group(m.store, "model", 2 * BLOCKS * HELD), 0);
	for (int round = 0; round < 3; round++) {
		for (size_t u = 0; u < UNITS; u++)
			add_to_unit(&m, u, 3);
		check(&m);
		CHECK(host_bytes(&m) <= 2 * BLOCKS * HELD);
	}
	for (size_t u = 0; u < UNITS; u++)
		visit(&m, u);
	close_model(&m);
}

/* A model comes back at the expense of what others can read again, ahead of use. */
static void room_from_others(void)
{
	struct om_stream_stats before, after;
	struct om_lease *l;
	struct model m;
	char path[300], name[32];
	struct om_file_range r = { path, 0, 1 << 20 };
	uint8_t *file = calloc(1, 1 << 20);
	FILE *f;

	snprintf(path, sizeof(path), "%s/other", dir);
	f = fopen(path, "wb");
	CHECK(f && fwrite(file, 1, 1 << 20, f) == 1 << 20 && fclose(f) == 0);
	free(file);
	open_model(&m, 8 << 20);
	CHECK_EQ(om_stream_linger(m.stream, true), 0);
	evict_all(&m);
	for (int i = 0; i < 12; i++) { /* more than fit: HOST is full of them */
		snprintf(name, sizeof(name), "other%d", i);
		CHECK_EQ(om_store_add_file(m.store, name, "others", &r, 1, OM_NOT_ENCODED, NULL),
		         0);
		CHECK_EQ(om_store_lease(m.store, name, OM_READ, SOON, &l), 0);
		om_lease_unref(l);
	}
	CHECK_EQ(om_stream_stats(m.stream, &before), 0);
	for (size_t u = 0; u < UNITS; u++) {
		keep(&m, u, true);
		visit(&m, u);
		usleep(50000); /* what is read ahead arrives */
	}
	CHECK_EQ(om_stream_stats(m.stream, &after), 0);
	CHECK(after.hits - before.hits >= UNITS - 2);
	check(&m);
	for (size_t u = 0; u < UNITS; u++)
		verify(&m, u);
	close_model(&m);
	CHECK(unlink(path) == 0);
}

/* ---- threads ---- */

struct worker {
	struct model *m;
	unsigned long long seed;
	int steps;
};

static void *walk(void *arg)
{
	struct worker *w = arg;

	for (int i = 0; i < w->steps; i++)
		visit(w->m, (size_t)(om_test_random(&w->seed) % UNITS));
	return NULL;
}

static void *toggle(void *arg)
{
	struct worker *w = arg;

	for (int i = 0; i < w->steps; i++) {
		size_t u = (size_t)(om_test_random(&w->seed) % UNITS);
		size_t b = (size_t)(om_test_random(&w->seed) % BLOCKS);

		keep(w->m, u, om_test_random(&w->seed) % 2);
		if (i % 5 == 0)
			CHECK_EQ(om_stream_linger(w->m->stream, i % 2), 0);
		if (i % 3 == 0)
			CHECK(om_store_evict(w->m->store, w->m->names[u][b], SOON) >= 0);
		check(w->m);
	}
	return NULL;
}

static void threads(uint64_t host)
{
	struct worker w[5];
	pthread_t ids[5];
	struct model m;

	open_model(&m, host);
	for (size_t i = 0; i < 5; i++) {
		w[i] = (struct worker){ &m, i + 1, 120 };
		CHECK(pthread_create(&ids[i], NULL, i < 3 ? walk : toggle, &w[i]) == 0);
	}
	for (size_t i = 0; i < 5; i++)
		pthread_join(ids[i], NULL);
	CHECK_EQ(users(&m), 0);
	for (size_t u = 0; u < UNITS; u++) {
		keep(&m, u, false);
		CHECK(!m.shown[u][0]);
		visit(&m, u);
	}
	check(&m);
	close_model(&m);
}

/* ---- faults ---- */

/* In, written to, out, in again with a fault armed: a unit may fail, none may show wrong bytes. */
static int faulty_run(enum om_fault point, uint64_t nth, bool sticky)
{
	struct model m;
	int fired;

	om_fault_arm(point, nth, sticky);
	if (!try_open(&m, 64 << 20)) {
		om_stream_linger(m.stream, true);
		for (size_t i = 0; i < 3 * UNITS; i++) {
			size_t u = i % UNITS;

			keep(&m, u, i % 3 == 0);
			if (enter(&m, u) == 0) {
				verify(&m, u);
				for (size_t b = 0; b < BLOCKS; b++)
					for (size_t k = 0; k < BYTES; k++)
						m.shown[u][b][k]++;
				m.written[u]++;
				leave(&m, u);
			}
			keep(&m, u, false);
			om_store_evict(m.store, m.names[u][i % BLOCKS], SOON);
			check(&m);
		}
		fired = om_fault_fired(point) > 0;
		om_fault_reset();
		for (size_t u = 0; u < UNITS; u++)
			visit(&m, u);
	} else {
		fired = om_fault_fired(point) > 0;
		om_fault_reset();
		CHECK(fired);
	}
	close_model(&m);
	return fired;
}

static void sweep(void)
{
	static const enum om_fault points[] = { OM_FAULT_ALLOC, OM_FAULT_MAP, OM_FAULT_READ,
		                                OM_FAULT_WRITE, OM_FAULT_SHORT };

	for (size_t i = 0; i < sizeof(points) / sizeof(*points); i++)
		for (int sticky = 0; sticky < 2; sticky++) {
			if (sticky && points[i] == OM_FAULT_SHORT)
				continue; /* for ever a part of it: that ends never */
			for (uint64_t nth = 1; faulty_run(points[i], nth, sticky);
			     nth += nth < 60 ? 1 : nth / 8)
				CHECK(nth < 5000);
		}
}

int main(void)
{
	const char *io = getenv("OMNIMEM_IO");

	alarm(250);
	backend = io && !strcmp(io, "threads") ? 2 : io && !strcmp(io, "uring") ? 1 : 0;
	CHECK(mkdtemp(dir));
	the_stream_is_a_user();
	joining_what_stays();
	a_kept_unit_that_could_not_be_bound();
	what_goes_lingers();
	the_beginning_stays();
	what_passes_leaves();
	what_is_written_to_windows_stays();
	more_than_memory();
	room_from_others();
	threads(64 << 20);
	threads(6 << 20);
	sweep();
	CHECK(rmdir(dir) == 0);
	return 0;
}
