/*
 * Planned streams: units read at odd offsets through a ring of two, held views, order that changes,
 * threads, deadline slices, broken files, faults swept one by one. Both back ends.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "om_test.h"
#include "omnimem.h"

#define SOON      om_deadline(20 * OM_NSEC)
#define MSEC      (OM_NSEC / 1000)
#define MAX_UNITS 8
#define BLOCKS    3 /* of a unit: two streamed, one resident */

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static char path[256];
static uint8_t image[12 << 20];
static int backend;

/* A model of `units` units; a unit's blocks lie one after another in the file, at odd offsets. */
struct model {
	struct om_store *store;
	struct om_stream *stream;
	size_t units;
	char names[MAX_UNITS][BLOCKS][32];
	char unit_names[MAX_UNITS][32];
	uint64_t offset[MAX_UNITS][BLOCKS], nbytes[MAX_UNITS][BLOCKS];
	uint64_t resident_bytes, streamed_bytes, largest; /* supersets */
};

static uint64_t superset(uint64_t offset, uint64_t nbytes)
{
	return om_up(offset + nbytes, OM_PAGE) - om_down(offset, OM_PAGE);
}

static void make_file(const char *name, uint64_t bytes)
{
	FILE *f = fopen(name, "wb");

	CHECK(f && fwrite(image, 1, bytes, f) == bytes && fclose(f) == 0);
}

static void check(const struct model *m)
{
	if (om_store_check(m->store)) {
		fprintf(stderr, "%s\n", om_err_last()->text);
		CHECK(!"invariant");
	}
}

/* Where the blocks lie. Units differ a little in size, as do the two streamed blocks of one. */
static void lay_out(struct model *m, size_t units)
{
	uint64_t at = 1001;

	memset(m, 0, sizeof(*m));
	m->units = units;
	for (size_t u = 0; u < units; u++) {
		uint64_t sizes[BLOCKS] = { 600000 + 7 * u, 350000 - 1000 * u, 20001 + u }, unit = 0;

		snprintf(m->unit_names[u], sizeof(m->unit_names[u]), "unit%d", (int)u);
		for (int b = 0; b < BLOCKS; b++) {
			snprintf(m->names[u][b], sizeof(m->names[u][b]), "u%d.b%d", (int)u, b);
			m->offset[u][b] = at;
			m->nbytes[u][b] = sizes[b];
			at += sizes[b] + 13;
			if (b == BLOCKS - 1)
				m->resident_bytes += superset(m->offset[u][b], sizes[b]);
			else
				unit += superset(m->offset[u][b], sizes[b]);
		}
		m->streamed_bytes += unit;
		m->largest = OM_MAX(m->largest, unit);
	}
	CHECK(at < sizeof(image));
}

static int try_open(struct model *m, size_t units, const char *file_of_unit_2)
{
	static const uint8_t resident[BLOCKS] = { OM_KEEP_NOTHING, OM_KEEP_NOTHING, OM_KEEP_PLAIN };
	struct om_stream_unit list[MAX_UNITS];
	const char *names[MAX_UNITS][BLOCKS];
	struct om_store_config c = { .directory = dir, .backend = backend };
	uint64_t limit;
	int code;

	lay_out(m, units);
	limit = m->resident_bytes + 2 * m->largest;
	c.host_limit_bytes = om_up(limit, OM_HUGE) + 2 * OM_HUGE; /* small blocks share a segment */
	code = om_store_create(&c, &m->store);
	if (code)
		return code;
	code = om_store_group(m->store, "model", limit);
	for (size_t u = 0; u < units && !code; u++) {
		for (int b = 0; b < BLOCKS && !code; b++) {
			struct om_file_range r = { u == 2 && file_of_unit_2 ? file_of_unit_2 : path,
				                   m->offset[u][b], m->nbytes[u][b] };

			code = om_store_add_file(m->store, m->names[u][b], "model", &r, 1,
			                         OM_NOT_ENCODED, NULL);
			names[u][b] = m->names[u][b];
		}
		list[u] = (struct om_stream_unit){ m->unit_names[u], names[u], resident, BLOCKS };
	}
	if (!code)
		code = om_stream_create(m->store, "model", list, units, &m->stream);
	if (!code)
		code = om_stream_load(m->stream, SOON);
	return code;
}

static void close_model(struct model *m)
{
	om_stream_free(m->stream);
	om_store_unref(m->store);
}

static void open_model(struct model *m, size_t units, const char *file_of_unit_2)
{
	if (try_open(m, units, file_of_unit_2)) {
		fprintf(stderr, "%s\n", om_err_last()->text);
		CHECK(!"open");
	}
	check(m);
}

static void verify(const struct model *m, size_t u)
{
	for (int b = 0; b < BLOCKS; b++) {
		struct om_lease *l = om_stream_lease(m->stream, u, (size_t)b);

		CHECK(l && om_lease_nbytes(l) == m->nbytes[u][b]);
		CHECK(memcmp(om_lease_data(l), image + m->offset[u][b], m->nbytes[u][b]) == 0);
	}
}

static int enter(struct model *m, size_t u, uint64_t deadline_ns)
{
	bool bind;
	int code = om_stream_enter(m->stream, u, deadline_ns, &bind);

	if (!code && bind)
		om_stream_bound(m->stream, u, true);
	return code;
}

static void leave(struct model *m, size_t u)
{
	bool unbind;

	CHECK_EQ(om_stream_leave(m->stream, u, &unbind), 0);
	if (unbind)
		om_stream_unbound(m->stream, u);
}

static void visit(struct model *m, size_t u)
{
	CHECK_EQ(enter(m, u, SOON), 0);
	check(m);
	verify(m, u);
	leave(m, u);
	check(m);
}

static void within_limit(struct model *m)
{
	struct om_stats s;

	CHECK(om_store_stats(m->store, &s) == 0);
	CHECK(s.host.peak_bytes <= m->resident_bytes + 2 * m->largest);
	CHECK(s.corrupt == 0 && s.io_errors == 0 && s.written_bytes == 0);
}

/* ---- one thread ---- */

static uint64_t bytes_read(const struct model *m)
{
	struct om_stream_stats s;

	CHECK(om_stream_stats(m->stream, &s) == 0);
	return s.read_bytes;
}

/* What was asked for is all back: nothing of this stream is on its way. */
static uint64_t bytes_read_at_rest(struct model *m)
{
	uint64_t before, now = bytes_read(m);

	do {
		before = now;
		usleep(20000);
		now = bytes_read(m);
	} while (now != before);
	return now;
}

static void cycles_read_each_byte_once(void)
{
	struct om_stream_stats s;
	struct model m;
	uint64_t before;

	open_model(&m, 6, NULL);
	CHECK_EQ(bytes_read(&m), m.resident_bytes);
	for (size_t u = 0; u < 6; u++)
		visit(&m, u);
	before = bytes_read_at_rest(&m);
	for (int cycle = 1; cycle <= 3; cycle++) {
		for (size_t u = 0; u < 6; u++)
			visit(&m, u);
		CHECK_EQ(bytes_read_at_rest(&m) - before, m.streamed_bytes * (uint64_t)cycle);
	}
	CHECK(om_stream_stats(m.stream, &s) == 0);
	CHECK_EQ(s.enters, 24);
	CHECK_EQ(s.mispredicted, 0);
	within_limit(&m);
	close_model(&m);
}

/* A unit that is wholly resident is in no forecast: its use is not missed by one. */
static void resident_unit_is_not_foretold(void)
{
	static const uint8_t streamed[BLOCKS] = { 0, 0, 1 }, whole[BLOCKS] = { true, true, true };
	struct om_stream_unit list[6];
	const char *names[6][BLOCKS];
	struct om_stream_stats s;
	struct model m;

	struct om_stats stats;

	open_model(&m, 6, NULL);
	visit(&m, 0); /* others are fetched ahead: that goes with the stream */
	om_stream_free(m.stream);
	do
		CHECK(om_store_stats(m.store, &stats) == 0);
	while (stats.host.used_bytes > m.resident_bytes && !usleep(1000));
	CHECK_EQ(om_store_group(m.store, "model", 0), 0);
	for (size_t u = 0; u < 6; u++) {
		for (int b = 0; b < BLOCKS; b++)
			names[u][b] = m.names[u][b];
		list[u] = (struct om_stream_unit){ m.unit_names[u], names[u],
			                           u == 1 ? whole : streamed, BLOCKS };
	}
	CHECK_EQ(om_stream_create(m.store, "model", list, 6, &m.stream), 0);
	CHECK_EQ(om_stream_load(m.stream, SOON), 0);
	for (size_t i = 0; i < 18; i++)
		visit(&m, i % 6);
	CHECK_EQ(om_stream_stats(m.stream, &s), 0);
	CHECK_EQ(s.enters, 15);
	CHECK_EQ(s.mispredicted, 0);
	close_model(&m);
}

static void order_changes(void)
{
	static const size_t prefill[] = { 5, 0, 1, 2, 3, 4, 5 }, decode[] = { 1, 3, 0, 2, 4 };
	struct om_stream_stats before, after;
	struct model m;
	uint64_t bytes = 0, read;

	open_model(&m, 6, NULL);
	for (size_t i = 0; i < 7; i++)
		visit(&m, prefill[i]);
	for (int cycle = 0; cycle < 2; cycle++)
		for (size_t i = 0; i < 5; i++)
			visit(&m, decode[i]);
	CHECK(om_stream_stats(m.stream, &before) == 0);
	read = bytes_read_at_rest(&m);
	for (size_t i = 0; i < 5; i++) {
		visit(&m, decode[i]);
		for (int b = 0; b < BLOCKS - 1; b++)
			bytes += superset(m.offset[decode[i]][b], m.nbytes[decode[i]][b]);
	}
	CHECK(om_stream_stats(m.stream, &after) == 0);
	CHECK_EQ(after.mispredicted, before.mispredicted);
	CHECK_EQ(bytes_read_at_rest(&m) - read, bytes);
	within_limit(&m);
	close_model(&m);
}

static void jumps_at_random(void)
{
	unsigned long long seed = 42;
	struct model m;

	open_model(&m, 7, NULL);
	for (int i = 0; i < 60; i++)
		visit(&m, om_test_random(&seed) % 7);
	within_limit(&m);
	close_model(&m);
}

static struct om_lease *take_view(struct model *m, size_t u, size_t block)
{
	struct om_lease *l;

	CHECK_EQ(enter(m, u, SOON), 0);
	l = om_stream_lease(m->stream, u, block);
	om_lease_view_ref(l);
	leave(m, u);
	return l;
}

static void view_of(const struct model *m, const struct om_lease *l, size_t u, int b)
{
	CHECK(memcmp(om_lease_data(l), image + m->offset[u][b], m->nbytes[u][b]) == 0);
}

static void held_views(void)
{
	struct om_lease *held[4], *again;
	struct om_stream_stats before, after;
	struct model m;
	int code;

	open_model(&m, 6, NULL);
	held[0] = take_view(&m, 0, 0);
	held[1] = take_view(&m, 0, 1);
	for (size_t i = 1; i < 12; i++) { /* through what is left of the ring */
		visit(&m, i % 6);
		view_of(&m, held[0], 0, 0);
		view_of(&m, held[1], 0, 1);
	}
	CHECK(om_stream_stats(m.stream, &before) == 0);
	CHECK_EQ(enter(&m, 0, SOON), 0); /* its bytes are there */
	again = om_stream_lease(m.stream, 0, 0);
	CHECK(om_lease_data(again) == om_lease_data(held[0]));
	CHECK(om_stream_stats(m.stream, &after) == 0);
	CHECK_EQ(after.hits, before.hits + 1);
	leave(&m, 0);
	held[2] = take_view(&m, 1, 0);
	held[3] = take_view(&m, 1, 1);
	check(&m);
	code = enter(&m, 2, om_deadline(30 * MSEC));
	CHECK_EQ(code, OM_EBUSY);
	CHECK(strstr(om_err_last()->holders, "u0.b0") && strstr(om_err_last()->holders, "u1.b1"));
	CHECK(strstr(om_err_last()->holders, "u1.b1") < strstr(om_err_last()->holders, "u0.b2"));
	check(&m);
	CHECK_EQ(enter(&m, 2, om_deadline(30 * MSEC)), OM_EBUSY);
	visit(&m, 1); /* what is held can be used */
	for (int i = 0; i < 4; i++) {
		view_of(&m, held[i], i / 2, i % 2);
		om_lease_view_unref(held[i]);
	}
	for (size_t i = 2; i < 14; i++)
		visit(&m, i % 6);
	within_limit(&m);
	close_model(&m);
}

static void deadline_slices(void)
{
	struct model m;
	struct om_lease *held;

	open_model(&m, 6, NULL);
	for (size_t i = 0; i < 24; i++) {
		int code;

		do
			code = enter(&m, (i * 5) % 6, om_deadline(i % 2 ? 5 * MSEC : 0));
		while (code == OM_EBUSY);
		CHECK_EQ(code, 0);
		verify(&m, (i * 5) % 6);
		leave(&m, (i * 5) % 6);
		check(&m);
	}
	held = take_view(&m, 0, 0);
	for (size_t i = 1; i < 6; i++) {
		while (enter(&m, i, om_deadline(MSEC)) == OM_EBUSY)
			;
		verify(&m, i);
		leave(&m, i);
	}
	om_lease_view_unref(held);
	within_limit(&m);
	close_model(&m);
}

static void misuse(void)
{
	struct om_stream *none;
	struct om_stream_unit unit = { "unit", (const char *[]){ "u0.b0" }, (const uint8_t[]){ 0 },
		                       1 };
	struct model m;
	bool bind, unbind;

	open_model(&m, 3, NULL);
	CHECK_EQ(om_stream_leave(m.stream, 0, &unbind), OM_EVALUE);
	CHECK(!unbind);
	CHECK_EQ(om_stream_enter(m.stream, 3, SOON, &bind), OM_EVALUE);
	CHECK_EQ(om_stream_leave(m.stream, 3, &unbind), OM_EVALUE);
	CHECK_EQ(om_stream_create(m.store, "other", &unit, 1, &none), OM_EVALUE);
	unit.blocks = (const char *[]){ "nobody" };
	CHECK_EQ(om_stream_create(m.store, "model", &unit, 1, &none), OM_ENAME);
	CHECK(om_stream_lease(m.stream, 0, 0) == NULL); /* not entered */
	CHECK(om_stream_lease(m.stream, 9, 0) == NULL && om_stream_lease(m.stream, 0, 9) == NULL);
	CHECK_EQ(om_stream_enter(m.stream, 1, SOON, &bind), 0);
	CHECK(bind);
	om_stream_bound(m.stream, 1, false); /* no windows: the unit is given back */
	check(&m);
	CHECK_EQ(om_stream_leave(m.stream, 1, &unbind), OM_EVALUE);
	visit(&m, 1);
	CHECK_EQ(om_stream_enter(m.stream, 1, SOON, &bind), 0);
	om_stream_bound(m.stream, 1, true);
	CHECK_EQ(om_stream_enter(m.stream, 1, SOON, &bind), 0);
	CHECK(!bind); /* the second user */
	CHECK_EQ(om_stream_leave(m.stream, 1, &unbind), 0);
	CHECK(!unbind);
	CHECK_EQ(om_stream_leave(m.stream, 1, &unbind), 0);
	CHECK(unbind);
	om_stream_unbound(m.stream, 1);
	visit(&m, 2);
	close_model(&m);
}

static void removed_blocks(void)
{
	struct model m;
	bool bind;

	open_model(&m, 4, NULL);
	visit(&m, 0);
	CHECK_EQ(om_store_remove(m.store, "u3.b0"), 0);
	check(&m);
	visit(&m, 1);
	visit(&m, 2);
	CHECK_EQ(om_stream_enter(m.stream, 3, SOON, &bind), OM_ENAME);
	check(&m);
	visit(&m, 0);
	close_model(&m);
}

static void views_outlive_the_stream(void)
{
	struct model m;
	struct om_lease *streamed, *resident;

	open_model(&m, 4, NULL);
	streamed = take_view(&m, 2, 1);
	resident = om_stream_lease(m.stream, 1, 2);
	om_lease_view_ref(resident);
	CHECK_EQ(enter(&m, 3, SOON), 0);
	om_stream_free(m.stream); /* in the middle of a unit */
	check(&m);
	view_of(&m, streamed, 2, 1);
	view_of(&m, resident, 1, 2);
	om_store_unref(m.store);
	view_of(&m, streamed, 2, 1);
	view_of(&m, resident, 1, 2);
	om_lease_view_unref(streamed);
	om_lease_view_unref(resident);
}

static void a_truncated_file_fails_its_unit(void)
{
	struct model m;
	char bad[300];

	snprintf(bad, sizeof(bad), "%s/bad", dir);
	make_file(bad, sizeof(image));
	open_model(&m, 5, bad);
	for (size_t u = 0; u < 5; u++)
		visit(&m, u);
	CHECK(truncate(bad, (off_t)m.offset[2][1] + 10) == 0);
	for (int cycle = 0; cycle < 3; cycle++) {
		for (size_t u = 0; u < 5; u++) {
			if (u != 2) {
				visit(&m, u);
				continue;
			}
			/* The first may still have found the bytes that were read before. */
			if (enter(&m, 2, SOON) == 0) {
				CHECK(cycle == 0);
				leave(&m, 2);
				continue;
			}
			CHECK_EQ(om_err_last()->code, OM_ECORRUPT);
			CHECK(strstr(om_err_last()->text, bad) &&
			      !strcmp(om_err_last()->filename, bad));
			check(&m);
		}
	}
	close_model(&m);
	CHECK(unlink(bad) == 0);
}

/* ---- threads ---- */

struct walker {
	struct model *m;
	size_t stride, first;
	int steps;
};

static void *walk(void *arg)
{
	struct walker *w = arg;
	size_t u = w->first;

	for (int i = 0; i < w->steps; i++, u = (u + w->stride) % w->m->units)
		visit(w->m, u);
	return NULL;
}

static void threads(size_t count)
{
	struct walker walkers[3];
	pthread_t ids[3];
	struct model m;

	open_model(&m, 7, NULL);
	for (size_t i = 0; i < count; i++) {
		walkers[i] = (struct walker){ &m, i == 2 ? 6 : i + 1, i, 40 };
		CHECK(pthread_create(&ids[i], NULL, walk, &walkers[i]) == 0);
	}
	for (size_t i = 0; i < count; i++)
		pthread_join(ids[i], NULL);
	within_limit(&m);
	close_model(&m);
}

/* ---- faults ---- */

/* Two cycles with a fault armed: a unit may fail, none may show wrong bytes; healed, all work. */
static int faulty_run(enum om_fault point, uint64_t nth, bool sticky)
{
	struct model m;
	int fired;

	om_fault_arm(point, nth, sticky);
	if (try_open(&m, 4, NULL)) {
		fired = om_fault_fired(point) > 0;
		om_fault_reset();
		CHECK(fired);
	} else {
		for (size_t i = 0; i < 8; i++) {
			if (enter(&m, i % 4, SOON) == 0) {
				verify(&m, i % 4);
				leave(&m, i % 4);
			}
			check(&m);
		}
		fired = om_fault_fired(point) > 0;
		om_fault_reset();
		for (size_t u = 0; u < 4; u++)
			visit(&m, u);
	}
	close_model(&m);
	return fired;
}

static void sweep(void)
{
	static const enum om_fault points[] = { OM_FAULT_ALLOC, OM_FAULT_MAP,   OM_FAULT_SUBMIT,
		                                OM_FAULT_READ,  OM_FAULT_SHORT, OM_FAULT_THREAD };

	for (size_t i = 0; i < sizeof(points) / sizeof(*points); i++)
		for (int sticky = 0; sticky < 2; sticky++) {
			if (sticky && (points[i] == OM_FAULT_SUBMIT || points[i] == OM_FAULT_SHORT))
				continue; /* for ever "try later" is no fault of ours to answer */
			for (uint64_t nth = 1; faulty_run(points[i], nth, sticky); nth++)
				CHECK(nth < 2000);
		}
}

/* A flipped bit is seen once the bytes are known: the first fills are whole. */
static void flips_are_seen(void)
{
	struct om_stats s;
	struct model m;

	open_model(&m, 4, NULL);
	for (size_t u = 0; u < 8; u++)
		visit(&m, u % 4);
	bytes_read_at_rest(&m);
	om_fault_arm(OM_FAULT_FLIP, 1, false);
	for (size_t u = 0; u < 4; u++)
		visit(&m, u);
	CHECK(om_store_stats(m.store, &s) == 0);
	CHECK(s.corrupt == 1 && s.rereads == 1);
	om_fault_arm(OM_FAULT_FLIP, 1, true);
	for (size_t u = 0, failed = 0; u < 8; u++) {
		if (enter(&m, u % 4, SOON) == 0) {
			verify(&m, u % 4);
			leave(&m, u % 4);
		} else {
			CHECK_EQ(om_err_last()->code, OM_ECORRUPT);
			failed++;
		}
		CHECK(u < 7 || failed);
		check(&m);
	}
	om_fault_reset();
	for (size_t u = 0; u < 4; u++)
		visit(&m, u);
	close_model(&m);
}

int main(void)
{
	const char *io = getenv("OMNIMEM_IO");

	alarm(250);
	backend = io && !strcmp(io, "threads") ? 2 : io && !strcmp(io, "uring") ? 1 : 0;
	for (size_t i = 0; i < sizeof(image); i++)
		image[i] = (uint8_t)(i * 2654435761u >> 13);
	CHECK(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/file", dir);
	make_file(path, sizeof(image));
	cycles_read_each_byte_once();
	resident_unit_is_not_foretold();
	order_changes();
	jumps_at_random();
	held_views();
	deadline_slices();
	misuse();
	removed_blocks();
	views_outlive_the_stream();
	a_truncated_file_fails_its_unit();
	threads(2);
	threads(3);
	flips_are_seen();
	sweep();
	unlink(path);
	CHECK(rmdir(dir) == 0);
	return 0;
}
