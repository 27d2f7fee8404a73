/*
 * Decoding of any bytes, under libFuzzer: an error or what was encoded, and nothing out of bounds. The hash of
 * the header is made right before they are given in, or no change to header and table would get by it.
 * Inputs begin as what om_encode makes of weights of each kind. `make fuzz` builds and runs it.
 */
#include <stdlib.h>
#include <string.h>

#include "core/om_codec.h"
#include "core/om_hash.h"

#define MOST_PLAIN (UINT64_C(8) * OM_MIB) /* more is refused here, to keep runs short */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void rehash(uint8_t *coded, uint64_t bytes)
{
	uint64_t nbytes, parts, hash;
	XXH3_state_t state;

	if (bytes < 40)
		return;
	memcpy(coded + 16, &bytes, sizeof(bytes));
	memcpy(&nbytes, coded + 8, sizeof(nbytes));
	parts = nbytes / OM_CODED_PART + (nbytes % OM_CODED_PART != 0);
	if (parts > (bytes - 40) / 8)
		return;
	XXH3_64bits_reset(&state);
	XXH3_64bits_update(&state, coded, 32);
	XXH3_64bits_update(&state, coded + 40, parts * 8);
	hash = XXH3_64bits_digest(&state);
	memcpy(coded + 32, &hash, sizeof(hash));
}

/* Something like weights of one of the types, encoded; 0: does not fit. */
static size_t fresh(uint8_t *ret, size_t room, unsigned seed)
{
	static const struct om_desc descs[] = { { 4, 16, 1, 0, { 0 } }, { 2, 16, 1, 0, { 0 } },
		                                { 2, 32, 1, 0, { 0 } }, { 10, 8, 1, 0, { 0 } },
		                                { 12, 8, 1, 0, { 0 } }, { 1, 8, 1, 0, { 0 } } };
	/* the byte that has the exponent, and what of it varies */
	static const uint8_t every[] = { 2, 2, 4, 1, 1, 1 },
			     mask[] = { 0x81, 0x84, 0x81, 0x9f, 0x87, 0x11 };
	uint64_t bits = (seed + UINT64_C(1)) * UINT64_C(0x9e3779b97f4a7c15);
	unsigned type = (unsigned)(bits >> 60) % 6;
	uint64_t nbytes = 4096 + (bits >> 40) % 16384, bytes = 0;
	uint8_t *plain = malloc(nbytes), *coded = malloc(om_encode_bound(nbytes));

	for (uint64_t i = 0; i < nbytes; i++) {
		seed = seed * 1103515245 + 12345;
		plain[i] = (uint8_t)(seed >> 16);
		if (i % every[type] + 1u == every[type])
			plain[i] = (plain[i] & mask[type]) | 0x20;
	}
	if (om_encode(plain, nbytes, &descs[type], 1 + (bits >> 32) % 2, coded,
	              om_encode_bound(nbytes), &bytes))
		abort();
	bytes = bytes <= room ? bytes : 0;
	memcpy(ret, coded, bytes);
	free(coded);
	free(plain);
	return bytes;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed)
{
	size_t made = seed % 32 == 0 || size < 64 ? fresh(data, room, seed) : 0;

	return made ? made : LLVMFuzzerMutate(data, size, room);
}

static void decode_parts(const uint8_t *coded, size_t size, bool stream)
{
	struct om_coded c;
	uint8_t *ret;

	if (om_coded_open(coded, size, &c) || c.nbytes > MOST_PLAIN)
		return;
	c.stream = stream;
	ret = aligned_alloc(64, om_up(c.nbytes, 64) + 64);
	for (uint64_t i = 0; i < c.parts; i++)
		om_coded_part(&c, i, 1, ret + om_up(c.nbytes, 64) - om_down(c.nbytes, 64));
	free(ret);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *coded = malloc(size ? size : 1), *ret;
	uint64_t nbytes;
	enum om_coding coding;

	memcpy(coded, data, size);
	rehash(coded, size);
	if (!om_coded_info(coded, size, &nbytes, &coding) && nbytes <= MOST_PLAIN) {
		for (int path = OM_PATH_PLAIN; path <= OM_PATH_AVX512; path++) {
			if (!om_codec_use((enum om_codec_path)path))
				continue;
			ret = malloc(nbytes ? nbytes : 1);
			om_decode(coded, size, ret, nbytes);
			free(ret);
			decode_parts(coded, size, path % 2);
		}
	}
	free(coded);
	return 0;
}
