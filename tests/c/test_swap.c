/* Swapping: zeros made at the first access, shared writing, giving memory back, encoded forms, pins,
 * and counters that are the sums of the events; at the end all of it against a model. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/om_store_int.h"
#include "om_test.h"

#define SOON  om_deadline(20 * OM_NSEC)
#define BYTES 300000u

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static uint8_t data[1 << 20];

static struct om_store *open_store(uint64_t host, uint64_t disk)
{
	struct om_store_config c = { .host_limit_bytes = host,
		                     .disk_limit_bytes = disk,
		                     .directory = dir };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static struct om_group_stats stats(struct om_store *s)
{
	struct om_group_stats g;

	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_store_group_stats(s, NULL, &g), 0);
	return g;
}

static struct om_swapped swap_out(struct om_store *s, uint64_t bytes)
{
	struct om_swap *w;
	struct om_swapped done;

	CHECK_EQ(om_swap_begin(s, NULL, bytes, &w), 0);
	CHECK_EQ(om_swap_wait(w, SOON), 0);
	om_swap_end(w, &done);
	CHECK_EQ(om_store_check(s), 0);
	return done;
}

static struct om_block *block_of(struct om_store *s, const char *name)
{
	struct om_block *b;

	CHECK_EQ(om_store_block(s, name, &b), 0);
	return b;
}

static struct om_block_state state(struct om_store *s, struct om_block *b)
{
	struct om_block_state st;

	om_block_state(s, b, &st);
	return st;
}

static void expect(struct om_store *s, const char *name, const uint8_t *bytes, uint64_t nbytes)
{
	struct om_lease *l;

	CHECK_EQ(om_store_lease(s, name, OM_READ, SOON, &l), 0);
	CHECK_EQ(om_lease_nbytes(l), nbytes);
	CHECK(memcmp(om_lease_data(l), bytes, nbytes) == 0);
	om_lease_unref(l);
}

static void zeros_are_made_at_the_first_access(void)
{
	static const uint8_t none[BYTES];
	struct om_store *s = open_store(8 << 20, 32 << 20);
	struct om_lease *l;
	struct om_block *b, *again;

	CHECK_EQ(om_store_add(s, "dirt", NULL, data, BYTES, NULL, SOON), 0);
	CHECK_EQ(om_store_remove(s, "dirt"), 0); /* its memory is used again, and is not zero */
	CHECK_EQ(om_store_add_zeros(s, "z", NULL, BYTES, NULL), 0);
	CHECK_EQ(om_store_add_zeros(s, "z", NULL, BYTES, NULL), OM_EVALUE);
	CHECK_EQ(om_store_add_zeros(s, "huge", NULL, UINT64_C(1) << 60, NULL), OM_ELIMIT);
	b = block_of(s, "z");
	CHECK(state(s, b).blank && !state(s, b).data && !state(s, b).swapped && !b->body);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 0);
	CHECK_EQ(om_store_access_now(s, "default", "z", &again), OM_EAGAIN);
	CHECK_EQ(om_store_access(s, "default", "z", SOON, &again), 0);
	CHECK(again == b && state(s, b).data && !state(s, b).blank);
	om_block_unref(again);
	expect(s, "z", none, BYTES);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	CHECK(state(s, b).swapped && !state(s, b).data);
	CHECK_EQ(stats(s).swapped, 1);
	expect(s, "z", none, BYTES);
	CHECK_EQ(om_store_add_zeros(s, "empty", NULL, 0, NULL), 0);
	CHECK_EQ(om_store_lease(s, "empty", OM_READ, SOON, &l), 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_remove(s, "z"), 0);
	CHECK(!state(s, b).named);
	CHECK_EQ(om_block_lease_bytes(s, b, OM_READ, SOON, &l), OM_ENAME);
	om_block_unref(b);
	om_store_unref(s);
}

/* Views that share a block see each other's writes, and what they wrote is what comes back. */
static void shared_writing(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);
	struct om_lease *one, *two, *reader;
	struct om_block *b;
	uint64_t written;

	CHECK_EQ(om_store_add(s, "a", NULL, data, BYTES, NULL, SOON), 0);
	b = block_of(s, "a");
	CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &one), 0);
	CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &two), 0);
	CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &reader), 0);
	CHECK(om_lease_writable(one) && !om_lease_writable(reader));
	((uint8_t *)om_lease_data(one))[7] ^= 1;
	CHECK_EQ(((uint8_t *)om_lease_data(reader))[7], data[7] ^ 1);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 0); /* viewed */
	om_lease_unref(one);
	om_lease_unref(two);
	om_lease_unref(reader);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	written = stats(s).traffic.out_bytes;
	CHECK(written >= BYTES);
	data[7] ^= 1;
	expect(s, "a", data, BYTES);
	/* Shared, but not written to: the copy on disk is still good. */
	CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &one), 0);
	om_lease_unref(one);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	CHECK_EQ(stats(s).traffic.out_bytes, written);
	/* Written to again. */
	CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &one), 0);
	((uint8_t *)om_lease_data(one))[BYTES - 1] ^= 1;
	om_lease_unref(one);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	CHECK(stats(s).traffic.out_bytes >= written + BYTES);
	data[BYTES - 1] ^= 1;
	expect(s, "a", data, BYTES);
	om_block_unref(b);
	om_store_unref(s);
}

/* A share lease rescues a copy that is being written out; what it writes then must not be mixed up with
 * what was being written. */
static void rescued_and_written_to(void)
{
	struct om_store *s = open_store(64 << 20, 64 << 20);
	struct om_block *b;
	struct om_lease *l;
	unsigned rescued = 0;

	CHECK_EQ(om_store_add(s, "a", NULL, data, sizeof(data), NULL, SOON), 0);
	b = block_of(s, "a");
	for (int i = 0; i < 200; i++) {
		struct om_swap *w;
		struct om_swapped done;

		CHECK_EQ(om_swap_begin(s, NULL, UINT64_MAX, &w), 0);
		om_swap_wait(w, om_now() + (uint64_t)(i % 20) * 100000);
		CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &l), 0);
		om_mutex_lock(&s->lock);
		rescued += b->body->move != NULL;
		om_mutex_unlock(&s->lock);
		data[i * 5000] = (uint8_t)(i + 1);
		((uint8_t *)om_lease_data(l))[i * 5000] = (uint8_t)(i + 1);
		om_lease_unref(l);
		om_swap_wait(w, i % 2 ? SOON : 0);
		om_swap_end(w, &done);
		CHECK_EQ(om_store_check(s), 0);
	}
	swap_out(s, UINT64_MAX);
	expect(s, "a", data, sizeof(data));
	printf("rescued %u of 200\n", rescued);
	om_block_unref(b);
	om_store_unref(s);
}

static void pinned_blocks_stay(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);
	struct om_block *b;

	CHECK_EQ(om_store_add(s, "a", NULL, data, BYTES, NULL, SOON), 0);
	CHECK_EQ(om_store_add(s, "b", NULL, data + 1, BYTES, NULL, SOON), 0);
	b = block_of(s, "a");
	CHECK_EQ(om_block_mark(s, b, true, 3), 0);
	CHECK(state(s, b).pinned && state(s, b).tag == 3 && stats(s).pinned == 1);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	CHECK(state(s, b).data && stats(s).swapped == 1);
	CHECK_EQ(om_store_evict(s, "a", SOON), 0);
	CHECK_EQ(om_block_mark(s, b, false, 3), 0);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	CHECK_EQ(om_block_mark(s, b, true, 3), 0); /* pinned while it is out */
	expect(s, "a", data, BYTES);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 0);
	CHECK_EQ(om_store_remove(s, "a"), 0);
	CHECK_EQ(stats(s).pinned, 0);
	om_block_unref(b);
	om_store_unref(s);
}

static void memory_goes_back(void)
{
	struct om_store *s = open_store(64 << 20, 64 << 20);
	char name[16];
	struct om_stats all;

	for (int i = 0; i < 40; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		CHECK_EQ(om_store_add(s, name, NULL, data, sizeof(data), NULL, SOON), 0);
	}
	CHECK_EQ(swap_out(s, 10 << 20).bytes, 10 << 20); /* not more than needed */
	CHECK_EQ(stats(s).swapped, 10);
	CHECK_EQ(om_store_stats(s, &all), 0);
	CHECK(all.host.mapped_bytes <= all.host.used_bytes + (10 << 20) / 16);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 30);
	CHECK_EQ(om_store_trim(s, 0), 0);
	CHECK_EQ(om_store_stats(s, &all), 0);
	CHECK_EQ(all.host.mapped_bytes, 0);
	om_store_unref(s);
}

static void a_full_disk_stops_it(void)
{
	struct om_store *s = open_store(8 << 20, 2 << 20);
	char name[16];

	for (int i = 0; i < 5; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		CHECK_EQ(om_store_add(s, name, NULL, data + i, sizeof(data) - 5, NULL, SOON), 0);
	}
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 2);
	CHECK(strstr(stats(s).trouble, "disk_limit"));
	for (int i = 0; i < 5; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		expect(s, name, data + i, sizeof(data) - 5);
	}
	/* The copies on disk of blocks that are in memory give way to others. */
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 2);
	CHECK_EQ(om_store_disk(s, NULL, 16 << 20), 0);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 3);
	CHECK_EQ(stats(s).trouble[0], '\0');
	CHECK_EQ(om_store_disk(s, "/tmp", 16 << 20), OM_EVALUE);
	om_fault_arm(OM_FAULT_WRITE, 1, true);
	expect(s, "b0", data, sizeof(data) - 5);
	CHECK_EQ(om_store_add(s, "c", NULL, data, BYTES, NULL, SOON), 0);
	swap_out(s, UINT64_MAX);
	CHECK(strstr(stats(s).trouble, "cannot write"));
	om_fault_reset();
	expect(s, "c", data, BYTES);
	om_store_unref(s);
}

static uint64_t disk_blocks(struct om_store *s)
{
	struct stat st;

	CHECK_EQ(fstat(s->disk.file->fd, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

/* When most of the swap file is free its disk blocks go back, and are had again before they are needed. */
static void the_swap_file_shrinks(void)
{
	struct om_store *s = open_store(256 << 20, 256 << 20);
	char name[16];

	for (int i = 0; i < 120; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		CHECK_EQ(om_store_add(s, name, NULL, data, sizeof(data) - i, NULL, SOON), 0);
	}
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 120);
	CHECK(disk_blocks(s) >= 120 << 20);
	for (int i = 0; i < 100; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		CHECK_EQ(om_store_remove(s, name), 0);
	}
	CHECK_EQ(om_store_trim(s, 0), 0);
	CHECK_EQ(om_store_check(s), 0);
	if (s->disk.no_holes) {
		fprintf(stderr, "no holes on this file system\n");
		om_store_unref(s);
		return;
	}
	CHECK(disk_blocks(s) <= 24 << 20);
	for (int i = 100; i < 120; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		expect(s, name, data, sizeof(data) - i);
	}
	for (int i = 0; i < 60; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		CHECK_EQ(om_store_add(s, name, NULL, data + i, sizeof(data) - 60, NULL, SOON), 0);
	}
	om_fault_arm(OM_FAULT_NOSPC, 1, true); /* no blocks behind the holes */
	swap_out(s, UINT64_MAX);
	CHECK(strstr(stats(s).trouble, "cannot grow"));
	om_fault_reset();
	swap_out(s, UINT64_MAX);
	CHECK_EQ(stats(s).swapped, 80);
	for (int i = 0; i < 60; i++) {
		snprintf(name, sizeof(name), "b%d", i);
		expect(s, name, data + i, sizeof(data) - 60);
	}
	om_store_unref(s);
}

static void events_add_up(struct om_store *s)
{
	static struct om_event events[OM_NOTES];
	struct om_traffic sum = { 0 }, is = stats(s).traffic;
	uint64_t first, next;
	size_t count;

	CHECK_EQ(om_store_events(s, 0, events, OM_NOTES, &count, &first, &next), 0);
	CHECK(first == 0 && next == count);
	for (size_t i = 0; i < count; i++) {
		const struct om_event *e = &events[i];
		bool out = e->kind == OM_EVENT_OUT || e->kind == OM_EVENT_PACKED_OUT;

		CHECK(!strcmp(e->group, "default") && (!i || e->at_ns >= e[-1].at_ns));
		sum.hits += e->kind == OM_EVENT_HIT;
		sum.misses += e->kind == OM_EVENT_MISS;
		sum.outs += e->kind == OM_EVENT_OUT;
		sum.ins += e->kind == OM_EVENT_IN;
		*(out ? &sum.out_bytes : &sum.in_bytes) += e->bytes;
		*(out ? &sum.out_ns : &sum.in_ns) += e->took_ns;
	}
	CHECK(memcmp(&sum, &is, sizeof(sum)) == 0);
	CHECK(is.outs && is.ins && is.hits && is.misses && is.out_bytes && is.in_bytes);
}

static void encoded_forms(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);
	static const uint8_t small[1000] = "the same in fewer bytes";
	struct om_block *b, *hit;
	struct om_lease *l, *packed;
	uint8_t codec = 0;

	CHECK_EQ(om_store_victim(s, NULL, &l), OM_EAGAIN);
	CHECK_EQ(om_store_add(s, "a", NULL, data, BYTES, NULL, SOON), 0);
	b = block_of(s, "a");
	CHECK_EQ(om_store_victim(s, NULL, &l), 0);
	CHECK_EQ(om_lease_pack(l, small, sizeof(small), 5), 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_evict(s, "a", SOON), 1);
	swap_out(s, UINT64_MAX);
	CHECK(stats(s).swapped == 1 && stats(s).blocks == 1);
	CHECK_EQ(stats(s).disk_bytes, OM_PAGE);
	CHECK_EQ(om_store_access(s, "default", "a", SOON, &hit), OM_EPACKED);
	CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &l), OM_EPACKED);
	CHECK_EQ(om_block_lease_packed(s, b, SOON, &packed, &codec), 0);
	CHECK(codec == 5 && om_lease_nbytes(packed) == sizeof(small));
	CHECK(memcmp(om_lease_data(packed), small, sizeof(small)) == 0);
	CHECK_EQ(om_block_unpack(s, b, data + 1, BYTES, SOON), OM_ECORRUPT); /* other bytes */
	CHECK_EQ(om_block_unpack(s, b, data, BYTES - 1, SOON), OM_ECORRUPT);
	om_lease_unref(packed);
	CHECK_EQ(om_store_check(s), 0);
	CHECK_EQ(om_block_unpack(s, b, data, BYTES, SOON), 0);
	CHECK_EQ(om_block_unpack(s, b, data + 1, BYTES, SOON), 0); /* no longer needed */
	CHECK_EQ(om_block_lease_packed(s, b, SOON, &packed, &codec), OM_EAGAIN);
	expect(s, "a", data, BYTES);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1); /* for free */
	CHECK_EQ(stats(s).disk_bytes, OM_PAGE);
	CHECK_EQ(om_block_lease_packed(s, b, SOON, &packed, &codec), 0);
	om_lease_unref(packed);
	CHECK_EQ(om_block_unpack(s, b, data, BYTES, SOON), 0);
	CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &l), 0);
	((uint8_t *)om_lease_data(l))[0] ^= 1;
	om_lease_unref(l);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1); /* plain: the encoded form is no longer true */
	data[0] ^= 1;
	expect(s, "a", data, BYTES);
	CHECK(stats(s).disk_bytes > OM_PAGE);
	events_add_up(s);
	CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &l), 0);
	CHECK_EQ(om_lease_pack(l, small, sizeof(small), 5), 0);
	CHECK_EQ(om_store_remove(s, "a"), 0);
	CHECK_EQ(om_lease_pack(l, small, sizeof(small), 5), OM_ENAME);
	om_lease_unref(l);
	CHECK_EQ(stats(s).blocks, 0);
	om_block_unref(b);
	om_store_unref(s);
}

/* A view that comes and goes while a face encodes the bytes may have written to them: what was made of
 * them must not replace them. */
static void written_to_while_it_is_encoded(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);
	static const uint8_t small[1000] = "what the bytes were";
	struct om_lease *victim, *view;
	struct om_block *b;

	CHECK_EQ(om_store_add(s, "a", NULL, data, BYTES, NULL, SOON), 0);
	b = block_of(s, "a");
	CHECK_EQ(om_store_victim(s, NULL, &victim), 0);
	CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &view), 0);
	CHECK_EQ(om_lease_pack(victim, small, sizeof(small), 5), OM_EBUSY);
	data[9] ^= 1;
	((uint8_t *)om_lease_data(view))[9] ^= 1;
	om_lease_unref(view);
	CHECK_EQ(om_lease_pack(victim, small, sizeof(small), 5), OM_EBUSY);
	om_lease_unref(victim);
	/* The view was there first. */
	CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &view), 0);
	CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &victim), 0);
	data[10] ^= 1;
	((uint8_t *)om_lease_data(view))[10] ^= 1;
	om_lease_unref(view);
	CHECK_EQ(om_lease_pack(victim, small, sizeof(small), 5), OM_EBUSY);
	om_lease_unref(victim);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	expect(s, "a", data, BYTES);
	om_block_unref(b);
	om_store_unref(s);
}

/* ---- against a model ---- */

#define MODEL_BLOCKS 24
#define MODEL_BYTES  (600u << 10)

static uint8_t model[MODEL_BLOCKS][MODEL_BYTES];
static bool there[MODEL_BLOCKS];

static void model_write(struct om_store *s, unsigned i, unsigned long long r)
{
	char name[16];
	struct om_lease *l;
	struct om_block *b;
	int code;

	snprintf(name, sizeof(name), "m%u", i);
	b = block_of(s, name);
	code = om_block_lease_bytes(s, b, r & 1 ? OM_SHARE : OM_WRITE, SOON, &l);
	om_block_unref(b);
	if (code == OM_EPACKED)
		return;
	CHECK_EQ(code, 0);
	CHECK(memcmp(om_lease_data(l), model[i], MODEL_BYTES) == 0);
	for (unsigned k = 0; k < 3; k++) {
		unsigned at = (unsigned)((r >> (8 + k * 8)) * 2654435761u % MODEL_BYTES);

		model[i][at] ^= (uint8_t)(r >> 3);
		((uint8_t *)om_lease_data(l))[at] ^= (uint8_t)(r >> 3);
	}
	om_lease_unref(l);
}

/* "Encodes" to half of the bytes, each of them twice... the codec here is the model itself. */
static void model_pack(struct om_store *s, unsigned long long r)
{
	struct om_lease *l;
	int code = om_store_victim(s, NULL, &l);

	if (code == OM_EAGAIN)
		return;
	CHECK_EQ(code, 0);
	code = om_lease_pack(l, om_lease_data(l), MODEL_BYTES / 2 + r % 1000, 1);
	CHECK(code == 0 || code == OM_EBUSY);
	om_lease_unref(l);
}

static void model_read(struct om_store *s, unsigned i)
{
	char name[16];
	struct om_lease *l;
	struct om_block *b;
	uint8_t codec;

	snprintf(name, sizeof(name), "m%u", i);
	b = block_of(s, name);
	if (om_block_lease_packed(s, b, SOON, &l, &codec) == 0) {
		CHECK(memcmp(om_lease_data(l), model[i], MODEL_BYTES / 2) == 0);
		om_lease_unref(l);
		CHECK_EQ(om_block_unpack(s, b, model[i], MODEL_BYTES, SOON), 0);
	}
	om_block_unref(b);
	CHECK_EQ(om_store_lease(s, name, OM_READ, SOON, &l), 0);
	CHECK(memcmp(om_lease_data(l), model[i], MODEL_BYTES) == 0);
	om_lease_unref(l);
}

static void model_add_or_remove(struct om_store *s, unsigned i, unsigned long long r)
{
	char name[16];

	snprintf(name, sizeof(name), "m%u", i);
	if (there[i]) {
		if (r % 4 == 0) {
			CHECK_EQ(om_store_remove(s, name), 0);
			there[i] = false;
		}
		return;
	}
	if (r & 8) {
		memset(model[i], 0, MODEL_BYTES);
		CHECK_EQ(om_store_add_zeros(s, name, NULL, MODEL_BYTES, NULL), 0);
	} else {
		for (unsigned k = 0; k < MODEL_BYTES; k += 8)
			memcpy(&model[i][k], &(uint64_t){ r * (k + 1) }, 8);
		CHECK_EQ(om_store_add(s, name, NULL, model[i], MODEL_BYTES, NULL, SOON), 0);
	}
	there[i] = true;
}

/* Memory for a third, disk for little more than the rest. */
static void against_a_model(unsigned long long seed)
{
	struct om_store *s = open_store(8 * MODEL_BYTES, 22 * MODEL_BYTES);
	static const char *const policies[] = { "lru", "clock", "adaptive" };

	memset(there, 0, sizeof(there));
	CHECK_EQ(om_store_policy(s, "default", policies[seed % 3]), 0);
	for (int step = 0; step < 1500; step++) {
		unsigned long long r = om_test_random(&seed);
		unsigned i = (unsigned)(r >> 40) % MODEL_BLOCKS;
		unsigned what = (unsigned)(r >> 32) % 16;

		if (!there[i] || what == 0)
			model_add_or_remove(s, i, r);
		else if (what < 6)
			model_read(s, i);
		else if (what < 10)
			model_write(s, i, r);
		else if (what < 12)
			model_pack(s, r);
		else if (what < 14)
			swap_out(s, (r >> 20) % (8 * MODEL_BYTES));
		else if (what == 14)
			CHECK_EQ(om_store_trim(s, 0), 0);
		CHECK_EQ(om_store_check(s), 0);
	}
	for (unsigned i = 0; i < MODEL_BLOCKS; i++)
		if (there[i])
			model_read(s, i);
	om_store_unref(s);
}

int main(void)
{
	unsigned long long seed = 1;

	CHECK(mkdtemp(dir));
	for (size_t i = 0; i < sizeof(data); i += 8)
		memcpy(data + i, &(uint64_t){ om_test_random(&seed) }, 8);
	zeros_are_made_at_the_first_access();
	shared_writing();
	rescued_and_written_to();
	pinned_blocks_stay();
	memory_goes_back();
	a_full_disk_stops_it();
	the_swap_file_shrinks();
	encoded_forms();
	written_to_while_it_is_encoded();
	for (seed = 1; seed <= 3; seed++)
		against_a_model(seed * 77);
	rmdir(dir);
	return 0;
}
