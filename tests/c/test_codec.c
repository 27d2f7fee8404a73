/*
 * om_codec: what goes in comes out, by every kind and path, which make the same bytes; and nothing that
 * was damaged is taken for whole.
 */
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/om_codec.h"
#include "core/om_hash.h"
#include "om_test.h"

#define PART ((size_t)OM_CODED_PART)

static unsigned long long seed = 20250711;

static const enum om_codec_path paths[] = { OM_PATH_PLAIN, OM_PATH_AVX2, OM_PATH_AVX512 };

enum { BF16, FP16, FP32, WIDE, E4M3, E5M2, HINTS };
static const struct om_desc descs[HINTS] = {
	[BF16] = { 4, 16, 1, 0, { 0 } }, [FP16] = { 2, 16, 1, 0, { 0 } },
	[FP32] = { 2, 32, 1, 0, { 0 } }, [WIDE] = { 2, 32, 1, 0, { 0 } },
	[E4M3] = { 10, 8, 1, 0, { 0 } }, [E5M2] = { 12, 8, 1, 0, { 0 } },
};

static uint64_t random64(void)
{
	return om_test_random(&seed);
}

static void *bytes_of(size_t n)
{
	void *p = malloc(n ? n : 1); /* exactly, so that a sanitizer sees what is beyond */

	CHECK(p);
	return p;
}

static float gauss(void)
{
	double u = (double)(random64() >> 11) * 0x1p-53 + 1e-12;
	double v = (double)(random64() >> 11) * 0x1p-53;

	return (float)(0.02 * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

/* Weights of a type, as their bytes; the last element perhaps in part. */
static void weights(int type, uint8_t *ret, size_t nbytes)
{
	for (size_t at = 0; at < nbytes;) {
		float x = gauss();
		uint32_t bits, made;
		size_t bytes = om_cuts[OM_KIND_BF16].element_bytes;

		memcpy(&bits, &x, sizeof(bits));
		made = bits >> 16;
		if (type == FP32 || type == WIDE) {
			made = type == FP32 ? bits : bits & 0xffff0000;
			bytes = 4;
		} else if (type != BF16) { /* by cutting: only the distribution matters here */
			int exponent = (int)(bits >> 23 & 255) - 127 + 15;
			uint32_t half =
				exponent < 1 ? 0 : (uint32_t)exponent << 10 | (bits >> 13 & 1023);

			made = half | (bits >> 31) << 15;
			if (type != FP16) {
				bytes = 1;
				made = type == E5M2 ? made >> 8
				                    : (made >> 8 & 128) | (made >> 7 & 127);
			}
		}
		bytes = OM_MIN(bytes, nbytes - at);
		memcpy(ret + at, &made, bytes);
		at += bytes;
	}
}

static void noise(uint8_t *ret, size_t nbytes)
{
	for (size_t i = 0; i < nbytes; i++)
		ret[i] = (uint8_t)random64();
}

/* Every part on its own, backwards, past the caches and not. */
static void check_parts(const uint8_t *coded, uint64_t bytes, const uint8_t *data, size_t nbytes)
{
	struct om_coded c;
	uint8_t *back = aligned_alloc(64, om_up(nbytes, 64) + 64);

	CHECK(back);
	CHECK_EQ(om_coded_open(coded, bytes, &c), 0);
	CHECK_EQ(c.nbytes, nbytes);
	for (unsigned shift = 0; shift < 2; shift++) {
		for (int stream = 0; stream < 2; stream++) {
			c.stream = stream;
			memset(back, 0x5a, om_up(nbytes, 64) + 64);
			for (uint64_t i = c.parts; i--;)
				CHECK_EQ(om_coded_part(&c, i, 1, back + shift), 0);
			CHECK_EQ(om_coded_check(&c, back + shift), 0);
			CHECK(!memcmp(back + shift, data, nbytes));
			for (size_t i = shift + nbytes; i < om_up(nbytes, 64) + 64; i++)
				CHECK_EQ(back[i], 0x5a);
		}
	}
	CHECK_EQ(om_coded_part(&c, 0, c.parts + 1, back), OM_EVALUE);
	CHECK_EQ(om_coded_part(&c, c.parts, 0, back), 0);
	CHECK_EQ(om_coded_part(&c, UINT64_MAX, 2, back), OM_EVALUE);
	free(back);
}

/* Encode by each path, decode by each other; returns how long it is coded, 0: not worth it. */
static uint64_t round_trip(const uint8_t *data, size_t nbytes, const struct om_desc *desc,
                           enum om_coding coding)
{
	uint64_t room = om_encode_bound(nbytes), first = 0, bytes, told;
	uint8_t *coded = bytes_of(room), *other = bytes_of(room), *back = bytes_of(nbytes);
	enum om_coding how;

	for (size_t p = 0; p < 3; p++) {
		if (!om_codec_use(paths[p]))
			continue;
		memset(p ? other : coded, 0xa5, room);
		CHECK_EQ(om_encode(data, nbytes, desc, coding, p ? other : coded, room, &bytes), 0);
		CHECK(bytes <= nbytes - nbytes / 20);
		if (!p)
			first = bytes;
		CHECK_EQ(bytes, first);
		CHECK(!p || !memcmp(coded, other, bytes));
	}
	for (size_t p = 0; first && p < 3; p++) {
		uint8_t *exact = bytes_of(first);

		if (om_codec_use(paths[p])) {
			memcpy(exact, coded, first);
			CHECK_EQ(om_coded_info(exact, first, &told, &how), 0);
			CHECK_EQ(told, nbytes);
			CHECK_EQ(how, coding);
			memset(back, 0xee, nbytes);
			CHECK_EQ(om_decode(exact, first, back, nbytes), 0);
			CHECK(!memcmp(back, data, nbytes));
			CHECK_EQ(om_decode(exact, first, back, nbytes - 1), OM_ECORRUPT);
			check_parts(exact, first, data, nbytes);
		}
		free(exact);
	}
	CHECK(om_codec_use(OM_PATH_AUTO));
	free(back);
	free(other);
	free(coded);
	return first;
}

/* Both codings; `fast` and `dense`: the least ratios that the bytes must reach, 0: none is worth it. */
static void check_ratios(const uint8_t *data, size_t nbytes, const struct om_desc *desc,
                         double fast, double dense)
{
	uint64_t a = round_trip(data, nbytes, desc, OM_CODING_FAST);
	uint64_t b = round_trip(data, nbytes, desc, OM_CODING_BALANCED);

	if (getenv("OM_TEST_VERBOSE"))
		printf("%zu bytes: %.3f %.3f\n", nbytes, a ? (double)nbytes / (double)a : 0.0,
		       b ? (double)nbytes / (double)b : 0.0);
	CHECK(fast > 0 ? a && (double)nbytes / (double)a >= fast : !a);
	CHECK(dense > 0 ? b && (double)nbytes / (double)b >= dense : !b);
}

static void test_types(void)
{
	static const double least[HINTS][2] = {
		[BF16] = { 1.42, 1.50 }, [FP16] = { 1.12, 1.16 }, [FP32] = { 1.17, 1.19 },
		[WIDE] = { 2.83, 2.95 }, [E4M3] = { 1.06, 1.10 }, [E5M2] = { 1.26, 1.30 },
	};
	size_t nbytes = 5 * PART + 4 * 12345;
	uint8_t *data = bytes_of(nbytes);

	for (int type = 0; type < HINTS; type++) {
		weights(type, data, nbytes);
		check_ratios(data, nbytes, &descs[type], least[type][0], least[type][1]);
		check_ratios(data, nbytes, NULL, least[type][0], least[type][1]);
		round_trip(data, nbytes, &descs[(type + 1) % HINTS], OM_CODING_FAST);
		round_trip(data, nbytes, &descs[(type + 1) % HINTS], OM_CODING_BALANCED);
	}
	free(data);
}

static void test_sizes(void)
{
	static const size_t sizes[] = { 0,        1,        2,        3,        7,
		                        8,        15,       16,       17,       255,
		                        1023,     4095,     4096,     4097,     8190,
		                        8191,     8192,     8193,     8194,     16383,
		                        16385,    65537,    PART - 2, PART - 1, PART,
		                        PART + 1, PART + 2, PART + 3, 2 * PART, 2 * PART + 8191 };

	for (int type = 0; type < HINTS; type++) {
		for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
			/* an odd address, and the room of exactly one element too few beyond */
			uint8_t *place = bytes_of(sizes[i] + 1);
			uint64_t a, b;

			weights(type, place + 1, sizes[i]);
			a = round_trip(place + 1, sizes[i], &descs[type], OM_CODING_FAST);
			b = round_trip(place + 1, sizes[i], &descs[type], OM_CODING_BALANCED);
			CHECK(sizes[i] < 65536 || (a && b));
			free(place);
		}
	}
}

/* Each of the 65536 patterns of two bytes and 256 of one, in order and not, among weights or alone. */
static void test_patterns(void)
{
	size_t nbytes = 2 * PART;
	uint8_t *data = bytes_of(nbytes);

	for (int type = 0; type < HINTS; type++) {
		weights(type, data, nbytes);
		for (uint32_t i = 0; i < 65536; i += 37)
			memcpy(data + 4 * i % nbytes, &(uint16_t){ (uint16_t)i }, 2);
		round_trip(data, nbytes, &descs[type], OM_CODING_FAST);
		round_trip(data, nbytes, &descs[type], OM_CODING_BALANCED);
		for (uint32_t i = 0; i < nbytes / 2; i++)
			memcpy(data + 2 * i, &(uint16_t){ (uint16_t)i }, 2);
		round_trip(data, nbytes, &descs[type], OM_CODING_FAST);
		round_trip(data, nbytes, &descs[type], OM_CODING_BALANCED);
	}
	/* every bfloat16, where the sample sees weights: patches by the thousand, and the longest gaps */
	weights(BF16, data, nbytes);
	for (uint32_t i = 0; i < 65536; i++)
		memcpy(data + PART + 2 * i, &(uint16_t){ (uint16_t)(i * 40503) }, 2);
	CHECK(round_trip(data, nbytes, &descs[BF16], OM_CODING_FAST));
	for (uint32_t i = 0; i < PART / 2; i++)
		memcpy(data + 2 * i, &(uint16_t){ i % 300 ? 0x3c00 : 0x7fc1 }, 2);
	CHECK(round_trip(data, nbytes, &descs[BF16], OM_CODING_FAST));
	CHECK(round_trip(data, nbytes, &descs[BF16], OM_CODING_BALANCED));
	free(data);
}

static void test_special(void)
{
	static const uint32_t same[] = { 0,          0xffffffff, 0x7fc07fc0, 0x00010001,
		                         0x80008000, 0x3f800000, 0x01020304 };
	size_t nbytes = 3 * PART + 4 * 777 + 3;
	uint8_t *data = bytes_of(nbytes);

	for (size_t i = 0; i < sizeof(same) / sizeof(same[0]); i++) {
		for (size_t j = 0; j < nbytes; j++)
			data[j] = (uint8_t)(same[i] >> 8 * (j % 4));
		check_ratios(data, nbytes, &descs[BF16], 1000, 1000);
		check_ratios(data, nbytes, NULL, 1000, 1000);
	}
	noise(data, nbytes);
	check_ratios(data, nbytes, NULL, 0, 0);
	for (int type = 0; type < HINTS; type++)
		check_ratios(data, nbytes, &descs[type], 0, 0);
	for (size_t j = 0; j < nbytes; j++) /* no elements, and half of the bits */
		data[j] = (uint8_t)((random64() & 7) * 0x21 ^ (random64() & 1));
	check_ratios(data, nbytes, NULL, 0, 1.8);
	for (size_t j = 0; j < nbytes; j++) /* denormal bfloat16 numbers */
		data[j] = j % 2 ? (uint8_t)(random64() & 128) : (uint8_t)(random64() & 127);
	check_ratios(data, nbytes, &descs[BF16], 1.4, 1.7);
	weights(BF16, data, nbytes); /* one part of several is worth it, then most are */
	noise(data + PART, nbytes - PART);
	check_ratios(data, nbytes, &descs[BF16], 1.07, 1.1);
	weights(FP32, data + PART, PART);
	weights(E5M2, data + 2 * PART, PART);
	check_ratios(data, nbytes, NULL, 1.25, 1.3);
	free(data);
}

/* What a sample does not see: the part is stored raw, or the whole given up. */
static void test_sample_is_wrong(void)
{
	size_t nbytes = 4 * PART, step = (PART - 256) / 15 / 4 * 4;
	uint8_t *data = bytes_of(nbytes), *coded = bytes_of(om_encode_bound(nbytes));
	uint64_t bytes;

	noise(data, nbytes);
	for (size_t part = 0; part < 4; part++)
		for (size_t run = 0; run < 16; run++)
			weights(BF16, data + part * PART + run * step, 256);
	check_ratios(data, nbytes, &descs[BF16], 0, 0);
	weights(BF16, data, 3 * PART);
	check_ratios(data, nbytes, &descs[BF16], 1.2, 1.3);
	weights(WIDE, data, nbytes); /* low halves that are 0 but in one place */
	data[PART + 2000] = 1;
	check_ratios(data, nbytes, &descs[WIDE], 1.5, 1.5);
	CHECK_EQ(om_encode(data, nbytes, NULL, OM_CODING_FAST, coded, om_encode_bound(nbytes),
	                   &bytes),
	         0);
	free(coded);
	free(data);
}

/* What is stored as it is: of any size, in just the room that om_encode_bound tells. */
static void test_stored(void)
{
	static const size_t sizes[] = { 0, 1, 63, 64, 65, 1000, PART, PART + 1, 2 * PART + 77 };

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		size_t nbytes = sizes[i], room = om_encode_bound(nbytes);
		uint8_t *data = bytes_of(nbytes), *coded = bytes_of(room), *back = bytes_of(nbytes);
		uint64_t bytes, told;
		enum om_coding how = OM_CODING_FAST;
		struct om_coded c;

		noise(data, nbytes);
		memset(coded, 0xa5, room);
		CHECK_EQ(om_encode(data, nbytes, &descs[BF16], OM_CODING_NONE, coded, room, &bytes),
		         0);
		CHECK_EQ(bytes, room);
		CHECK_EQ(om_coded_info(coded, bytes, &told, &how), 0);
		CHECK_EQ(told, nbytes);
		CHECK_EQ(how, OM_CODING_NONE);
		CHECK_EQ(om_decode(coded, bytes, back, nbytes), 0);
		CHECK(!memcmp(back, data, nbytes));
		check_parts(coded, bytes, data, nbytes);
		CHECK_EQ(om_encode(data, nbytes, NULL, OM_CODING_NONE, coded, room - 1, &bytes),
		         OM_EVALUE);
		CHECK_EQ(om_coded_open(coded, room, &c), 0);
		CHECK_EQ(om_coded_compare(&c, data), 0);
		if (nbytes) {
			back[nbytes - 1] ^= 1;
			CHECK_EQ(om_coded_compare(&c, back), OM_ECORRUPT);
			coded[om_encode_bound(nbytes) - om_up(nbytes, 64)] ^= 1;
			CHECK_EQ(om_decode(coded, room, back, nbytes), OM_ECORRUPT);
		}
		free(back);
		free(coded);
		free(data);
	}
}

/* Frames end to end, of each coding and one of nothing: told and decoded together or one by one. */
static void test_frames(void)
{
	static const size_t sizes[] = { PART + 6, 0, 2 * PART, 100 };
	static const enum om_coding codings[] = { OM_CODING_FAST, OM_CODING_NONE,
		                                  OM_CODING_BALANCED, OM_CODING_NONE };
	size_t nbytes = 3 * PART + 106, room = om_encode_bound(nbytes) + 4 * 128, at = 0, plain = 0;
	uint8_t *data = bytes_of(nbytes), *coded = bytes_of(room), *back = bytes_of(nbytes);
	uint64_t ends[4], told, bytes;
	enum om_coding how;
	struct om_coded c;

	weights(BF16, data, nbytes);
	for (size_t i = 0; i < 4; plain += sizes[i++]) {
		CHECK_EQ(om_encode(data + plain, sizes[i], &descs[BF16], codings[i], coded + at,
		                   om_encode_bound(sizes[i]), &bytes),
		         0);
		CHECK(bytes);
		ends[i] = at += bytes;
	}
	CHECK_EQ(om_coded_info(coded, at, &told, &how), 0);
	CHECK_EQ(told, nbytes);
	CHECK_EQ(how, OM_CODING_BALANCED);
	CHECK_EQ(om_decode(coded, at, back, nbytes), 0);
	CHECK(!memcmp(back, data, nbytes));
	CHECK_EQ(om_decode(coded, at, back, nbytes - 1), OM_ECORRUPT);
	CHECK_EQ(om_decode(coded, ends[2], back, nbytes), OM_ECORRUPT);
	plain = 0;
	for (size_t i = 0; i < 4; i++) {
		CHECK_EQ(om_coded_open(coded + ends[i] - (i ? ends[i] - ends[i - 1] : ends[0]),
		                       at - (i ? ends[i - 1] : 0), &c),
		         0);
		CHECK_EQ(c.nbytes, sizes[i]);
		CHECK_EQ(om_coded_compare(&c, data + plain), 0);
		plain += sizes[i];
		CHECK_EQ(c.bytes, ends[i] - (i ? ends[i - 1] : 0));
	}
	/* other bytes behind, and a frame cut off */
	memset(coded + at, 0, 64);
	CHECK_EQ(om_coded_open(coded, at + 64, &c), 0);
	CHECK_EQ(c.bytes, ends[0]);
	for (uint64_t more = 1; more <= 64; more += 63) {
		CHECK_EQ(om_coded_info(coded, at + more, &told, &how), OM_ECORRUPT);
		CHECK_EQ(om_decode(coded, at + more, back, nbytes), OM_ECORRUPT);
		CHECK_EQ(om_coded_info(coded, at - more, &told, &how), OM_ECORRUPT);
		CHECK_EQ(om_decode(coded, at - more, back, nbytes), OM_ECORRUPT);
		CHECK_EQ(om_coded_open(coded, ends[0] - more, &c), OM_ECORRUPT);
	}
	free(back);
	free(coded);
	free(data);
}

struct share {
	const struct om_coded *c;
	uint8_t *ret;
	uint64_t *next;
};

static void *decode_share(void *arg)
{
	struct share *s = arg;

	for (;;) {
		uint64_t part = __atomic_fetch_add(s->next, 2, __ATOMIC_RELAXED);

		if (part >= s->c->parts)
			return NULL;
		CHECK_EQ(om_coded_part(s->c, part, OM_MIN(s->c->parts - part, 2), s->ret), 0);
	}
}

/* Several threads decode one block, two parts at a time. */
static void test_threads(void)
{
	size_t nbytes = 9 * PART + 1000, room = om_encode_bound(nbytes);
	uint8_t *data = bytes_of(nbytes), *coded = bytes_of(room);
	uint8_t *ret = aligned_alloc(64, om_up(nbytes, 64));

	weights(BF16, data, nbytes);
	for (int coding = OM_CODING_FAST; coding <= OM_CODING_BALANCED; coding++) {
		uint64_t bytes, next = 0;
		struct om_coded c;
		struct share share = { &c, ret, &next };
		pthread_t threads[3];

		CHECK_EQ(om_encode(data, nbytes, &descs[BF16], coding, coded, room, &bytes), 0);
		CHECK_EQ(om_coded_open(coded, bytes, &c), 0);
		CHECK(c.stream);
		memset(ret, 0, nbytes);
		for (size_t i = 0; i < 3; i++)
			CHECK_EQ(pthread_create(&threads[i], NULL, decode_share, &share), 0);
		for (size_t i = 0; i < 3; i++)
			CHECK_EQ(pthread_join(threads[i], NULL), 0);
		CHECK_EQ(om_coded_check(&c, ret), 0);
		CHECK(!memcmp(ret, data, nbytes));
	}
	free(ret);
	free(coded);
	free(data);
}

static void test_refused(void)
{
	size_t nbytes = PART;
	uint8_t *data = bytes_of(nbytes), *coded = bytes_of(om_encode_bound(nbytes)), byte;
	uint64_t bytes = 7, told, room = om_encode_bound(nbytes);
	enum om_coding how;

	weights(BF16, data, nbytes);
	CHECK_EQ(om_encode(data, nbytes, NULL, -1, coded, room, &bytes), OM_EVALUE);
	CHECK_EQ(bytes, 0);
	CHECK_EQ(om_encode(data, nbytes, NULL, 3, coded, room, &bytes), OM_EVALUE);
	for (uint64_t less = 0; less < room; less += 31 * 64 + 1) { /* it fits, or it is not made */
		CHECK_EQ(om_encode(data, nbytes, NULL, OM_CODING_FAST, coded, less, &bytes), 0);
		CHECK(bytes <= less);
	}
	CHECK_EQ(om_encode(data, UINT64_MAX / 2, NULL, OM_CODING_FAST, coded, room, &bytes),
	         OM_EVALUE);
	CHECK_EQ(om_encode(data, 0, NULL, OM_CODING_FAST, coded, room, &bytes), 0);
	CHECK_EQ(bytes, 0);
	CHECK_EQ(om_coded_info(data, nbytes, &told, &how), OM_ECORRUPT);
	CHECK_EQ(om_coded_info(data, 0, &told, &how), OM_ECORRUPT);
	CHECK_EQ(om_decode(data, nbytes, &byte, 0), OM_ECORRUPT);
	CHECK_EQ(om_encode(data, nbytes, NULL, OM_CODING_FAST, coded, room, &bytes), 0);
	coded[4]++;
	CHECK_EQ(om_coded_info(coded, bytes, &told, &how), OM_ECORRUPT);
	CHECK(strstr(om_err_last()->text, "version 2"));
	free(coded);
	free(data);
}

static void test_no_memory(void)
{
	size_t nbytes = 2 * PART;
	uint8_t *data = bytes_of(nbytes), *back = bytes_of(nbytes);
	uint64_t room = om_encode_bound(nbytes), bytes;
	uint8_t *coded = bytes_of(room);

	weights(BF16, data, nbytes);
	for (int coding = OM_CODING_FAST; coding <= OM_CODING_BALANCED; coding++) {
		for (uint64_t nth = 1;; nth++) {
			om_fault_arm(OM_FAULT_ALLOC, nth, false);
			int code =
				om_encode(data, nbytes, &descs[BF16], coding, coded, room, &bytes);

			if (!om_fault_fired(OM_FAULT_ALLOC)) {
				CHECK_EQ(code, 0);
				CHECK_EQ(nth, coding == OM_CODING_FAST ? 1 : 5);
				break;
			}
			CHECK_EQ(code, -ENOMEM);
			CHECK_EQ(bytes, 0);
		}
		for (uint64_t nth = 1;; nth++) {
			om_fault_arm(OM_FAULT_ALLOC, nth, false);
			int code = om_decode(coded, bytes, back, nbytes);

			if (!om_fault_fired(OM_FAULT_ALLOC)) {
				CHECK_EQ(code, 0);
				CHECK_EQ(nth, coding == OM_CODING_FAST ? 1 : 4);
				break;
			}
			CHECK_EQ(code, -ENOMEM);
		}
		om_fault_reset();
		CHECK(!memcmp(back, data, nbytes));
	}
	free(coded);
	free(back);
	free(data);
}

/* ---- damage ---- */

/* Hash header and table anew, so that what lies behind is reached. */
static void rehash(uint8_t *coded, uint64_t bytes)
{
	uint64_t nbytes, parts, hash;
	XXH3_state_t state;

	if (bytes < 40)
		return;
	memcpy(&nbytes, coded + 8, sizeof(nbytes));
	memcpy(coded + 16, &bytes, sizeof(bytes));
	parts = nbytes / PART + (nbytes % PART != 0);
	if (parts > (bytes - 40) / 8)
		return;
	XXH3_64bits_reset(&state);
	XXH3_64bits_update(&state, coded, 32);
	XXH3_64bits_update(&state, coded + 40, parts * 8);
	hash = XXH3_64bits_digest(&state);
	memcpy(coded + 32, &hash, sizeof(hash));
}

/* Damage `coded`; returns how long it is then, at most `room`. */
static uint64_t mutate(uint8_t *coded, uint64_t bytes, uint64_t room)
{
	static const uint32_t odd[] = { 0, 1, 7, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff };
	unsigned count = 1 + random64() % 3;

	while (count--) {
		uint64_t at = random64() % bytes, n, from;

		if (random64() %
		    2) /* where most is at stake: header, table, heads of the first part */
			at = random64() % OM_MIN(bytes, 256);
		switch (random64() % 8) {
		case 0:
		case 1:
			coded[at] ^= (uint8_t)(1 << random64() % 8);
			break;
		case 2:
			coded[at] = (uint8_t)random64();
			break;
		case 3: /* a size or a place that is another one */
			at = at / 4 * 4;
			if (at + 4 <= bytes)
				memcpy(coded + at, &odd[random64() % 8], 4);
			break;
		case 4: /* truncate */
			bytes = random64() % 4 ? OM_MAX(bytes - random64() % OM_MIN(bytes, 200), 1)
			                       : 1 + random64() % bytes;
			break;
		case 5: /* extend */
			n = OM_MIN(room - bytes, random64() % 200);
			noise(coded + bytes, n);
			bytes += n;
			break;
		case 6: /* splice */
			from = random64() % bytes;
			n = random64() % OM_MIN(bytes - OM_MAX(from, at), 512);
			memmove(coded + at, coded + from, n);
			break;
		default:
			noise(coded + at, OM_MIN(bytes - at, random64() % 64));
		}
	}
	if (random64() % 4)
		rehash(coded, bytes);
	return bytes;
}

/* Memory of `bytes` that ends where none may be touched: libzstd reads without a sanitizer's knowledge. */
static uint8_t *fenced(size_t bytes)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = om_up(bytes, page);
	uint8_t *p = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
	                  -1, 0);

	CHECK(p != MAP_FAILED);
	CHECK_EQ(mprotect(p + whole, page, PROT_NONE), 0);
	return p + whole - bytes;
}

static void test_damage(void)
{
	size_t nbytes = PART + 33333, room = om_encode_bound(nbytes) + 4096;
	uint8_t *data = bytes_of(nbytes), *back = fenced(nbytes), *coded = bytes_of(room);
	uint8_t *fence = fenced(room);
	unsigned whole = 0, broken = 0, opened = 0;

	for (unsigned block = 0; block < 2 * (HINTS + 1); block++) {
		enum om_coding coding = block % 2 ? OM_CODING_FAST : OM_CODING_BALANCED;
		int type = (int)(block / 2);
		uint64_t bytes;

		weights(type < HINTS ? type : BF16, data, nbytes);
		for (size_t i = 0; type == HINTS && i < nbytes; i++)
			data[i] &= 0x31;
		CHECK_EQ(om_encode(data, nbytes, type < HINTS ? &descs[type] : NULL, coding, coded,
		                   room, &bytes),
		         0);
		if (!bytes) /* bytes that are no elements, under FAST */
			continue;
		for (unsigned i = 0; i < 1000; i++) {
			uint8_t *exact;
			uint64_t length, told;
			enum om_coding how;
			int code;

			memcpy(fence, coded, bytes);
			length = mutate(fence, bytes, room);
			exact = i % 2 ? fence + room - length : bytes_of(length);
			memmove(exact, fence, length);
			om_codec_use(paths[i % 3]);
			code = om_decode(exact, length, back, nbytes);
			CHECK(code == 0 || code == OM_ECORRUPT);
			CHECK(code || !memcmp(back, data, nbytes));
			opened += !om_coded_info(exact, length, &told, &how);
			whole += !code;
			broken += code != 0;
			if (i % 2 == 0)
				free(exact);
		}
	}
	om_codec_use(OM_PATH_AUTO);
	CHECK(whole + broken >= 10000);
	CHECK(broken > 5000 && opened > 2000);
	free(coded);
	free(data);
}

/* One part that ends at the fence: with every length, and with other sizes of its frame. */
static void test_cut(void)
{
	size_t nbytes = 8192 + 100, room = 4 * nbytes;
	uint8_t *data = bytes_of(nbytes), *part = bytes_of(room), *fence = fenced(room);
	uint8_t *back = bytes_of(nbytes);
	struct om_dense *coder = om_dense_create(true), *decoder = om_dense_create(false);

	CHECK(coder && decoder);
	for (int type = 0; type < HINTS; type++) {
		enum om_kind kind =
			(enum om_kind[]){ OM_KIND_BF16, OM_KIND_FP16, OM_KIND_FP32,
			                  OM_KIND_WIDE, OM_KIND_E4M3, OM_KIND_E5M2 }[type];
		size_t fast, dense;

		weights(type, data, nbytes);
		dense = om_dense_encode(coder, kind, 0, data, nbytes, part, room);
		for (uint32_t framed = 0; framed < 6000; framed += 1 + framed % 7) {
			uint8_t *exact = fence + room - dense;

			memcpy(exact, part, dense);
			memcpy(exact, &framed, sizeof(framed));
			om_dense_decode(decoder, kind, exact, dense, back, nbytes, false);
		}
		for (size_t cut = 1; cut <= dense; cut++) {
			memcpy(fence + room - dense + cut, part, dense - cut);
			CHECK(!om_dense_decode(decoder, kind, fence + room - dense + cut,
			                       dense - cut, back, nbytes, false));
		}
		fast = om_fast_encode(kind, data, nbytes, part, room);
		for (size_t cut = 0; cut <= fast; cut++) {
			memcpy(fence + room - fast + cut, part, fast - cut);
			CHECK_EQ(om_fast_decode(kind, fence + room - fast + cut, fast - cut, back,
			                        nbytes, false),
			         cut == 0);
		}
	}
	om_dense_free(coder);
	om_dense_free(decoder);
	free(back);
	free(part);
	free(data);
}

int main(void)
{
	test_types();
	test_sizes();
	test_patterns();
	test_special();
	test_sample_is_wrong();
	test_stored();
	test_frames();
	test_threads();
	test_refused();
	test_no_memory();
	test_cut();
	test_damage();
	return 0;
}
