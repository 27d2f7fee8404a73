/*
 * om_codec: the container of encoded parts, and what a part's bytes are taken for.
 *
 * Header, then a table with an entry for each part, then the parts, each on a boundary of 64; all
 * little-endian. The header ends with a hash of itself and the table, so that what is opened is either whole
 * or refused, and with the hash of the plain bytes, which is what proves them. Parts are in order and leave no
 * gap but the padding, so an entry's place follows from those before it; it is written all the same, so that
 * threads find theirs at once.
 *
 * Functions of their arguments; BALANCED allocates scratch for the time of a call. No locks.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/om_codec.h"
#include "core/om_hash.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define MAGIC       UINT32_C(0x43444d4f) /* "OMDC" */
#define VERSION     1
#define PART_ALIGN  64
#define LEAST_CODED 1024 /* plain bytes below which a part is stored raw */
#define STREAM_BYTES \
	(UINT64_C(1) << 20) /* plain bytes from which on decoding writes past the caches */

struct header {
	uint32_t magic;
	uint16_t version;
	uint8_t coding, reserved;
	uint64_t nbytes, coded_bytes;
	uint64_t plain_hash;
	uint64_t head_hash; /* of all before it, and the table */
};
_Static_assert(sizeof(struct header) == 40, "as it is written");

struct entry {
	uint32_t place; /* in units of PART_ALIGN, from the header on */
	uint32_t what;  /* bytes, and enum om_kind in the highest 8 bits */
};

static uint64_t parts_of(uint64_t nbytes)
{
	return nbytes / OM_CODED_PART + (nbytes % OM_CODED_PART != 0);
}

/* Plain bytes of a part. */
static size_t part_bytes(uint64_t nbytes, uint64_t part)
{
	return (size_t)OM_MIN(OM_CODED_PART, nbytes - part * OM_CODED_PART);
}

static uint64_t table_end(uint64_t parts)
{
	return om_up(sizeof(struct header) + parts * sizeof(struct entry), PART_ALIGN);
}

/* What may be left of `nbytes` for it to be worth it. */
static uint64_t worth(uint64_t nbytes)
{
	return nbytes - nbytes / 20;
}

static uint64_t head_hash(const uint8_t *data, uint64_t parts)
{
	XXH3_state_t state;

	XXH3_64bits_reset(&state);
	om_hash_update(&state, data, offsetof(struct header, head_hash));
	om_hash_update(&state, data + sizeof(struct header), parts * sizeof(struct entry));
	return XXH3_64bits_digest(&state);
}

static struct entry entry_at(const uint8_t *data, uint64_t part)
{
	struct entry e;

	memcpy(&e, data + sizeof(struct header) + part * sizeof(e), sizeof(e));
	return e;
}

static uint32_t entry_bytes(struct entry e)
{
	return e.what & 0xffffff;
}

uint64_t om_encode_bound(uint64_t nbytes)
{
	return table_end(parts_of(nbytes)) + om_up(nbytes, PART_ALIGN);
}

/* ---- what bytes are taken for ---- */

#define SAMPLE_RUNS  16
#define SAMPLE_RUN   256
#define SAMPLE_BYTES (SAMPLE_RUNS * SAMPLE_RUN)

/* Bits that `n` exponents of which these are `counts` will take under `coding`. */
static double exponent_bits(const uint16_t counts[256], unsigned n, enum om_coding coding)
{
	unsigned inside;
	double bits = 0;

	om_planes_base(counts, coding == OM_CODING_FAST ? 3 : 4, &inside);
	if (coding == OM_CODING_FAST)
		return 3.0 * n + 16.5 * (n - inside);
	for (unsigned i = 0; i < 256; i++)
		if (counts[i])
			bits += counts[i] * log2((double)n / counts[i]);
	return bits + 16.5 * (n - inside);
}

/* The share of SAMPLE_BYTES that `kind` would leave, above 1 where it cannot be. */
static double share_left(enum om_kind kind, const uint8_t *sample, enum om_coding coding)
{
	_Alignas(64) uint8_t exponents[OM_CODEC_BLOCK], rest[OM_CODEC_BLOCK], planes[SAMPLE_BYTES];
	const struct om_cut *cut = &om_cuts[kind];
	uint16_t counts[256] = { 0 };
	unsigned n = SAMPLE_BYTES / cut->element_bytes;

	om_codec_kernels()->split(kind, sample, n, exponents, rest, planes);
	if (kind == OM_KIND_WIDE) {
		for (unsigned i = 0; i < SAMPLE_BYTES; i += 4)
			if (sample[i] || sample[i + 1])
				return 2;
	}
	for (unsigned i = 0; i < n; i++)
		counts[exponents[i]]++;
	return (exponent_bits(counts, n, coding) + n * (8.0 * cut->planes + cut->rest_bits)) /
	       (8.0 * SAMPLE_BYTES);
}

/* As many kinds as `desc` allows; 0: any. */
static unsigned kinds_of(const struct om_desc *desc, enum om_kind ret[2])
{
	enum { FLOAT = 2, BFLOAT = 4, FLOAT8_FIRST = 7, FLOAT8_E5M2 = 12, FLOAT8_LAST = 13 };

	if (!desc)
		return 0;
	ret[0] = OM_KIND_RAW;
	if (desc->code == BFLOAT && desc->bits == 16)
		ret[0] = OM_KIND_BF16;
	else if (desc->code == FLOAT && desc->bits == 16)
		ret[0] = OM_KIND_FP16;
	else if (desc->code == FLOAT && desc->bits == 32)
		ret[0] = OM_KIND_WIDE;
	else if (desc->code >= FLOAT8_FIRST && desc->code <= FLOAT8_LAST && desc->bits == 8)
		ret[0] = desc->code >= FLOAT8_E5M2 ? OM_KIND_E5M2 : OM_KIND_E4M3;
	ret[1] = OM_KIND_FP32;
	return ret[0] == OM_KIND_WIDE ? 2 : ret[0] != OM_KIND_RAW;
}

/* The kind under which a part shrinks most, those of `desc` first; *ret_share: to what share of it. */
static enum om_kind kind_of(const uint8_t *data, size_t nbytes, const struct om_desc *desc,
                            enum om_coding coding, double *ret_share)
{
	_Alignas(64) uint8_t sample[SAMPLE_BYTES];
	enum om_kind hinted[2], best = OM_KIND_RAW;
	unsigned hints = kinds_of(desc, hinted);

	*ret_share = 1;
	if (nbytes < SAMPLE_BYTES)
		return OM_KIND_RAW;
	if (!memcmp(data, data + 8, nbytes - 8)) {
		*ret_share = 0;
		return OM_KIND_SAME;
	}
	for (size_t i = 0; i < SAMPLE_RUNS; i++)
		memcpy(sample + i * SAMPLE_RUN,
		       data + om_down((nbytes - SAMPLE_RUN) / (SAMPLE_RUNS - 1) * i, 4),
		       SAMPLE_RUN);
	for (unsigned i = 0; i < hints + OM_KIND_COUNT - OM_KIND_BF16; i++) {
		enum om_kind kind = i < hints ? hinted[i] : OM_KIND_BF16 + (i - hints);
		double share;

		if (i == hints && *ret_share < 0.95)
			break;
		share = share_left(kind, sample, coding);
		if (share < *ret_share) {
			*ret_share = share;
			best = kind;
		}
	}
	return *ret_share < 0.95 ? best : OM_KIND_RAW;
}

/* ---- encoding ---- */

/* A part into `ret`, which has room for it raw; what it became. */
static struct entry encode_part(enum om_kind kind, const uint8_t *data, size_t nbytes,
                                enum om_coding coding, uint8_t *ret)
{
	size_t bytes = 0;

	(void)coding;
	if (kind == OM_KIND_SAME) {
		bytes = 8;
		memcpy(ret, data, bytes);
	} else if (kind != OM_KIND_RAW) {
		bytes = om_fast_encode(kind, data, nbytes, ret, worth(nbytes));
	}
	if (!bytes) {
		kind = OM_KIND_RAW;
		bytes = nbytes;
		memcpy(ret, data, nbytes);
	}
	return (struct entry){ 0, (uint32_t)(bytes | (size_t)kind << 24) };
}

/* Choose every part's kind, into the table. True: it will be worth it. */
static bool choose_kinds(const uint8_t *data, uint64_t nbytes, const struct om_desc *desc,
                         enum om_coding coding, uint8_t *ret)
{
	double left = 0;

	for (uint64_t i = 0; i < parts_of(nbytes); i++) {
		size_t n = part_bytes(nbytes, i);
		double share;
		uint32_t kind = kind_of(data + i * OM_CODED_PART, n, desc, coding, &share);
		struct entry e = { 0, kind << 24 };

		left += share * (double)n;
		memcpy(ret + sizeof(struct header) + i * sizeof(e), &e, sizeof(e));
	}
	return left < (double)worth(nbytes);
}

int om_encode(const void *data, uint64_t nbytes, const struct om_desc *desc, enum om_coding coding,
              void *ret, uint64_t room, uint64_t *ret_bytes)
{
	uint64_t parts = parts_of(nbytes), at = table_end(parts);
	struct header h = {
		.magic = MAGIC, .version = VERSION, .coding = (uint8_t)coding, .nbytes = nbytes
	};
	uint8_t *out = ret;

	*ret_bytes = 0;
	if (coding != OM_CODING_FAST)
		return om_err(OM_EVALUE, "coding %d is not known", (int)coding);
	if (nbytes > (uint64_t)UINT32_MAX * PART_ALIGN / 2)
		return om_err(OM_EVALUE, "%" PRIu64 " bytes are too many to encode at once",
		              nbytes);
	if (room < om_encode_bound(nbytes))
		return om_err(OM_EVALUE,
		              "encoding %" PRIu64 " bytes may need %" PRIu64
		              ", and there is room for %" PRIu64,
		              nbytes, om_encode_bound(nbytes), room);
	if (!nbytes || !choose_kinds(data, nbytes, desc, coding, out))
		return 0;
	for (uint64_t i = 0; i < parts; i++) {
		struct entry e = encode_part(entry_at(out, i).what >> 24,
		                             (const uint8_t *)data + i * OM_CODED_PART,
		                             part_bytes(nbytes, i), coding, out + at);
		uint64_t end = at + entry_bytes(e);

		e.place = (uint32_t)(at / PART_ALIGN);
		memcpy(out + sizeof(h) + i * sizeof(e), &e, sizeof(e));
		at = om_up(end, PART_ALIGN);
		memset(out + end, 0, at - end);
	}
	if (at > worth(nbytes))
		return 0;
	memset(out + sizeof(h) + parts * sizeof(struct entry), 0,
	       table_end(parts) - sizeof(h) - parts * sizeof(struct entry));
	h.coded_bytes = at;
	h.plain_hash = om_hash(data, nbytes);
	memcpy(out, &h, sizeof(h));
	h.head_hash = head_hash(out, parts);
	memcpy(out, &h, sizeof(h));
	*ret_bytes = at;
	return 0;
}

/* ---- decoding ---- */

/* Every part where it should be, and nothing else. */
static int prove_table(const struct om_coded *c)
{
	uint64_t at = table_end(c->parts);

	for (uint64_t i = 0; i < c->parts; i++) {
		struct entry e = entry_at(c->data, i);

		if ((uint64_t)e.place * PART_ALIGN != at || entry_bytes(e) > c->bytes - at)
			return om_err(OM_ECORRUPT,
			              "encoded bytes: part %" PRIu64 " of %" PRIu64
			              " does not lie where it should",
			              i, c->parts);
		at = om_up(at + entry_bytes(e), PART_ALIGN);
		if (at > c->bytes)
			break;
	}
	return at == c->bytes ? 0
	                      : om_err(OM_ECORRUPT,
	                               "encoded bytes: %" PRIu64
	                               " are given, and the parts end at %" PRIu64,
	                               c->bytes, at);
}

int om_coded_open(const void *coded, uint64_t coded_bytes, struct om_coded *ret)
{
	struct header h;

	if (coded_bytes < sizeof(h))
		return om_err(OM_ECORRUPT,
		              "encoded bytes: %" PRIu64 " are too few for the header's %zu",
		              coded_bytes, sizeof(h));
	memcpy(&h, coded, sizeof(h));
	if (h.magic != MAGIC)
		return om_err(OM_ECORRUPT, "these bytes were not encoded by omnimem");
	if (h.version != VERSION)
		return om_err(OM_ECORRUPT,
		              "encoded bytes: of version %u, and this omnimem reads version %u",
		              (unsigned)h.version, VERSION);
	if (h.coded_bytes != coded_bytes ||
	    parts_of(h.nbytes) > coded_bytes / sizeof(struct entry) ||
	    table_end(parts_of(h.nbytes)) > coded_bytes)
		return om_err(OM_ECORRUPT,
		              "encoded bytes: %" PRIu64 " are given, the header says %" PRIu64,
		              coded_bytes, h.coded_bytes);
	if (h.head_hash != head_hash(coded, parts_of(h.nbytes)) || h.coding != OM_CODING_FAST)
		return om_err(OM_ECORRUPT, "encoded bytes: the header is damaged");
	*ret = (struct om_coded){ .data = coded,
		                  .bytes = coded_bytes,
		                  .nbytes = h.nbytes,
		                  .parts = parts_of(h.nbytes),
		                  .hash = h.plain_hash,
		                  .coding = h.coding,
		                  .stream = h.nbytes >= STREAM_BYTES };
	return prove_table(ret);
}

static bool decode_part(enum om_kind kind, const uint8_t *src, size_t bytes, uint8_t *ret,
                        size_t nbytes, bool stream)
{
	if (kind == OM_KIND_RAW) {
		if (bytes != nbytes)
			return false;
		memcpy(ret, src, nbytes);
		return true;
	}
	if (kind == OM_KIND_SAME) {
		if (bytes != 8)
			return false;
		for (size_t i = 0; i < nbytes; i += 8)
			memcpy(ret + i, src, OM_MIN(nbytes - i, 8));
		return true;
	}
	if (kind >= OM_KIND_COUNT || !om_cuts[kind].element_bytes)
		return false;
	return om_fast_decode(kind, src, bytes, ret, nbytes, stream);
}

int om_coded_part(const struct om_coded *c, uint64_t first, uint64_t count, void *ret)
{
	bool stream = c->stream && (uintptr_t)ret % 64 == 0;
	int code = 0;

	if (first > c->parts || count > c->parts - first)
		return om_err(OM_EVALUE,
		              "parts %" PRIu64 " to %" PRIu64
		              " of an encoded block that has %" PRIu64,
		              first, first + count, c->parts);
	for (uint64_t i = first; i < first + count && !code; i++) {
		struct entry e = entry_at(c->data, i);
		uint64_t place = (uint64_t)e.place * PART_ALIGN;

		if (place > c->bytes || entry_bytes(e) > c->bytes - place ||
		    !decode_part(e.what >> 24, c->data + place, entry_bytes(e),
		                 (uint8_t *)ret + i * OM_CODED_PART, part_bytes(c->nbytes, i),
		                 stream))
			code = om_err(OM_ECORRUPT,
			              "encoded bytes: part %" PRIu64 " of %" PRIu64 " is damaged",
			              i, c->parts);
	}
#if defined(__SSE2__)
	_mm_sfence(); /* what went past the caches is there before this returns */
#endif
	return code;
}

int om_coded_check(const struct om_coded *c, const void *ret)
{
	uint64_t hash = om_hash(ret, c->nbytes);

	if (hash == c->hash)
		return 0;
	return om_err(OM_ECORRUPT,
	              "encoded bytes: decoded to other bytes than were encoded (XXH3 %016" PRIx64
	              ", stored %016" PRIx64 ")",
	              hash, c->hash);
}

int om_coded_info(const void *coded, uint64_t coded_bytes, uint64_t *ret_nbytes,
                  enum om_coding *ret_coding)
{
	struct om_coded c = { 0 };
	int code = om_coded_open(coded, coded_bytes, &c);

	if (code)
		return code;
	*ret_nbytes = c.nbytes;
	*ret_coding = c.coding;
	return 0;
}

int om_decode(const void *coded, uint64_t coded_bytes, void *ret, uint64_t nbytes)
{
	struct om_coded c = { 0 };
	int code = om_coded_open(coded, coded_bytes, &c);

	if (!code && c.nbytes != nbytes)
		code = om_err(OM_ECORRUPT,
		              "encoded bytes: of %" PRIu64 " plain ones, %" PRIu64 " are wanted",
		              c.nbytes, nbytes);
	code = code ? code : om_coded_part(&c, 0, c.parts, ret);
	return code ? code : om_coded_check(&c, ret);
}
