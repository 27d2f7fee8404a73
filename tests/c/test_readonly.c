/* Consumers that write to what they leased for reading (torch does): no lower copy is replaced by it, none
 * becomes unreadable, and what is brought in next is what was stored. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static void expect(struct om_store *s, const char *name, const uint8_t *bytes, uint64_t nbytes)
{
	struct om_lease *l;

	CHECK_EQ(om_store_lease(s, name, OM_READ, SOON, &l), 0);
	CHECK_EQ(om_lease_nbytes(l), nbytes);
	CHECK(memcmp(om_lease_data(l), bytes, nbytes) == 0);
	om_lease_unref(l);
}

/* Consumers there are that write to what they leased for reading. Whatever they write while a copy goes
 * out, what comes back is what was stored or what they wrote, whole: never a mixture, never an error. */
static void rescued_and_written_to(void)
{
	struct om_store *s = open_store(64 << 20, 64 << 20);
	struct om_lease *l;
	struct om_block *b;
	unsigned rescued = 0;

	CHECK_EQ(om_store_add(s, "a", NULL, data, sizeof(data), NULL, SOON), 0);
	b = block_of(s, "a");
	for (int i = 0; i < 200; i++) {
		struct om_swap *w;
		struct om_swapped done;

		CHECK_EQ(om_block_lease_bytes(s, b, OM_SHARE, SOON, &l), 0);
		((uint8_t *)om_lease_data(l))[0] = data[0] =
			(uint8_t)(i + 1); /* it has to go out */
		om_lease_unref(l);
		CHECK_EQ(om_swap_begin(s, NULL, UINT64_MAX, &w), 0);
		om_swap_wait(w, om_now() + (uint64_t)(i % 20) * 100000);
		CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &l), 0);
		om_mutex_lock(&s->lock);
		rescued += b->body->move != NULL;
		om_mutex_unlock(&s->lock);
		memset(om_lease_data(l), i + 1, sizeof(data) / 2);
		memset((uint8_t *)om_lease_data(l) + sizeof(data) / 2, i + 1, sizeof(data) / 2);
		om_lease_unref(l);
		om_swap_wait(w, i % 2 ? SOON : 0);
		om_swap_end(w, &done);
		swap_out(s, UINT64_MAX);
		CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &l), 0);
		if (memcmp(om_lease_data(l), data, sizeof(data))) {
			memset(data, i + 1, sizeof(data));
			CHECK(memcmp(om_lease_data(l), data, sizeof(data)) == 0);
		}
		om_lease_unref(l);
	}
	printf("rescued %u of 200\n", rescued);
	om_block_unref(b);
	om_store_unref(s);
}

static void stains(struct om_store *s, const char *name)
{
	struct om_lease *l;

	CHECK_EQ(om_store_lease(s, name, OM_READ, SOON, &l), 0);
	((uint8_t *)om_lease_data(l))[3] ^= 1;
	om_lease_unref(l);
}

/* A writer makes HOST the only copy: it must be what was stored, plus what the writer writes. */
static void a_writer_finds_what_was_stored(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);
	struct om_lease *l;
	uint64_t drops;
	struct om_stats st;

	CHECK_EQ(om_store_add(s, "a", NULL, data, BYTES, NULL, SOON), 0);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	expect(s, "a", data, BYTES);
	stains(s, "a");
	CHECK_EQ(om_store_lease(s, "a", OM_WRITE, SOON, &l), 0);
	((uint8_t *)om_lease_data(l))[9] ^= 1;
	om_lease_unref(l);
	data[9] ^= 1;
	expect(s, "a", data, BYTES);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	expect(s, "a", data, BYTES);
	CHECK_EQ(om_store_stats(s, &st), 0);
	drops = st.drops;
	CHECK_EQ(om_store_lease(s, "a", OM_WRITE, SOON, &l),
	         0); /* not written to: nothing is dropped */
	om_lease_unref(l);
	CHECK_EQ(om_store_stats(s, &st), 0);
	CHECK_EQ(st.drops, drops);
	CHECK_EQ(om_store_check(s), 0);
	om_store_unref(s);
}

/* What a face encodes replaces what lies below: not when a reader wrote to it. */
static void what_readers_wrote_is_not_packed(void)
{
	struct om_store *s = open_store(8 << 20, 32 << 20);
	struct om_lease *l, *reader;

	CHECK_EQ(om_store_add(s, "a", NULL, data, BYTES, NULL, SOON), 0);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	stains(s, "a");
	CHECK_EQ(om_store_victim(s, "default", &l), 0);
	CHECK_EQ(om_lease_pack(l, "short", 5, 1), OM_EBUSY);
	om_lease_unref(l);
	CHECK_EQ(swap_out(s, UINT64_MAX).blocks, 1);
	expect(s, "a", data, BYTES);
	/* Nor when one came and went while it was encoded. */
	CHECK_EQ(om_store_victim(s, "default", &l), 0);
	CHECK_EQ(om_store_lease(s, "a", OM_READ, SOON, &reader), 0);
	om_lease_unref(reader);
	CHECK_EQ(om_lease_pack(l, "short", 5, 1), OM_EBUSY);
	om_lease_unref(l);
	CHECK_EQ(om_store_victim(s, "default", &l), 0);
	CHECK_EQ(om_lease_pack(l, "short", 5, 1), 0);
	om_lease_unref(l);
	CHECK_EQ(om_store_check(s), 0);
	om_store_unref(s);
}

int main(void)
{
	CHECK(mkdtemp(dir));
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 7 + i / 255);
	rescued_and_written_to();
	a_writer_finds_what_was_stored();
	what_readers_wrote_is_not_packed();
	rmdir(dir);
	return 0;
}
