/*
 * om_codec: the container of encoded parts.
 *
 * Header, then a table with an entry for each part, then the parts, each on a boundary of 64; all
 * little-endian. The header ends with a hash of itself and the table, so that what is opened is either whole
 * or refused, and with the hash of the plain bytes, which is what proves them. Parts are in order and leave no
 * gap but the padding, so an entry's place follows from those before it; it is written all the same, so that
 * threads find theirs at once. The header says where it all ends, so one may follow another; under
 * OM_CODING_NONE every part is raw.
 *
 * Functions of their arguments; BALANCED allocates scratch for the time of a call. No locks.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "core/om_codec.h"
#include "core/om_hash.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define MAGIC      UINT32_C(0x43444d4f) /* "OMDC" */
#define VERSION    1
#define PART_ALIGN 64
#define MOST_BYTES (UINT64_C(128) * OM_GIB) /* an entry could say twice as much */

/* Plain bytes from which on decoding writes past the caches. Into memory that no cache has, decoding takes half
 * as long so, and with a first read of it three quarters; into a buffer that a cache has, it takes longer. Those
 * are the small ones, used again and again. */
#define STREAM_BYTES OM_MIB

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

static bool known(int coding)
{
	return coding >= OM_CODING_NONE && coding <= OM_CODING_BALANCED;
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

/* ---- encoding ---- */

/* Is the part what OM_KIND_WIDE takes it for? A sample does not prove it. */
static bool is_wide(const uint8_t *data, size_t nbytes)
{
	uint32_t seen = 0, x;

	for (size_t i = 0; i < nbytes / 4; i++) {
		memcpy(&x, data + 4 * i, sizeof(x));
		seen |= x;
	}
	x = 0;
	memcpy(&x, data + nbytes / 4 * 4, nbytes % 4);
	return !((seen | x) & 0xffff);
}

/* A part into `ret`, which has room for it raw; what it became. `dense`: NULL under FAST. */
static struct entry encode_part(struct om_dense *dense, struct entry chosen, const uint8_t *data,
                                size_t nbytes, uint8_t *ret)
{
	enum om_kind kind = chosen.what >> 24;
	size_t bytes = 0, room = worth(nbytes);

	if (kind == OM_KIND_WIDE && !is_wide(data, nbytes))
		kind = OM_KIND_FP32; /* which has the same exponents */
	if (kind == OM_KIND_SAME) {
		bytes = 8;
		memcpy(ret, data, bytes);
	} else if (kind != OM_KIND_RAW) {
		bytes = dense ? om_dense_encode(dense, kind, (uint8_t)chosen.place, data, nbytes,
		                                ret, room)
		              : om_fast_encode(kind, data, nbytes, ret, room);
	}
	if (!bytes) {
		kind = OM_KIND_RAW;
		bytes = nbytes;
		memcpy(ret, data, nbytes);
	}
	return (struct entry){ 0, (uint32_t)(bytes | (size_t)kind << 24) };
}

/* Choose every part's kind, into the table, with its base for the time being where its place will be. True: it
 * will be worth it. */
static bool choose_kinds(const uint8_t *data, uint64_t nbytes, const struct om_desc *desc,
                         enum om_coding coding, uint8_t *ret)
{
	double left = 0;

	if (coding == OM_CODING_NONE) {
		memset(ret + sizeof(struct header), OM_KIND_RAW,
		       parts_of(nbytes) * sizeof(struct entry));
		return true;
	}
	for (uint64_t i = 0; i < parts_of(nbytes); i++) {
		size_t n = part_bytes(nbytes, i);
		struct om_choice choice =
			om_codec_choose(data + i * OM_CODED_PART, n, desc, coding);
		struct entry e = { choice.base, (uint32_t)choice.kind << 24 };

		left += choice.share * (double)n;
		memcpy(ret + sizeof(struct header) + i * sizeof(e), &e, sizeof(e));
	}
	return left < (double)worth(nbytes);
}

/* The parts, and the table that says where they are; *ret_hash of the plain bytes. Returns where they end; 0:
 * `room` is too short (for the last part as it is). */
static uint64_t encode_parts(struct om_dense *dense, const uint8_t *data, uint64_t nbytes,
                             uint8_t *ret, uint64_t room, uint64_t *ret_hash)
{
	uint64_t parts = parts_of(nbytes), at = table_end(parts);
	XXH3_state_t hash;

	XXH3_64bits_reset(&hash);
	for (uint64_t i = 0; i < parts; i++, data += OM_CODED_PART) {
		size_t n = part_bytes(nbytes, i);
		struct entry e;
		uint64_t end;

		if (at + om_up(n, PART_ALIGN) > room)
			return 0;
		om_hash_update(&hash, data, n); /* which brings them into the cache */
		e = encode_part(dense, entry_at(ret, i), data, n, ret + at);
		end = at + entry_bytes(e);
		e.place = (uint32_t)(at / PART_ALIGN);
		memcpy(ret + sizeof(struct header) + i * sizeof(e), &e, sizeof(e));
		at = om_up(end, PART_ALIGN);
		memset(ret + end, 0, at - end);
	}
	*ret_hash = XXH3_64bits_digest(&hash);
	return at;
}

int om_encode(const void *data, uint64_t nbytes, const struct om_desc *desc, enum om_coding coding,
              void *ret, uint64_t room, uint64_t *ret_bytes)
{
	uint64_t parts = parts_of(nbytes),
		 listed = sizeof(struct header) + parts * sizeof(struct entry);
	struct header h = {
		.magic = MAGIC, .version = VERSION, .coding = (uint8_t)coding, .nbytes = nbytes
	};
	struct om_dense *dense = NULL;
	uint8_t *out = ret;

	*ret_bytes = 0;
	if (!known(coding))
		return om_err(OM_EVALUE, "coding %d is not known: 0 is none, 1 fast, 2 balanced",
		              (int)coding);
	if (nbytes > MOST_BYTES)
		return om_err(OM_EVALUE,
		              "%" PRIu64 " bytes are too many to encode at once: %" PRIu64
		              " at most",
		              nbytes, MOST_BYTES);
	if (room < om_encode_bound(nbytes) && coding == OM_CODING_NONE)
		return om_err(OM_EVALUE,
		              "encoding %" PRIu64 " bytes may need %" PRIu64
		              ", and there is room for %" PRIu64,
		              nbytes, om_encode_bound(nbytes), room);
	if (coding != OM_CODING_NONE && (!nbytes || room < table_end(parts)))
		return 0;
	if (!choose_kinds(data, nbytes, desc, coding, out))
		return 0;
	if (coding == OM_CODING_BALANCED && !(dense = om_dense_create(true)))
		return -ENOMEM;
	h.coded_bytes = encode_parts(dense, data, nbytes, out, room, &h.plain_hash);
	om_dense_free(dense);
	if (coding != OM_CODING_NONE && (!h.coded_bytes || h.coded_bytes > worth(nbytes)))
		return 0;
	memset(out + listed, 0, table_end(parts) - listed);
	memcpy(out, &h, sizeof(h));
	h.head_hash = head_hash(out, parts);
	memcpy(out, &h, sizeof(h));
	*ret_bytes = h.coded_bytes;
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
	                               "encoded bytes: the header says %" PRIu64
	                               ", and the parts end at %" PRIu64,
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
	if (h.coded_bytes > coded_bytes ||
	    parts_of(h.nbytes) > h.coded_bytes / sizeof(struct entry) ||
	    table_end(parts_of(h.nbytes)) > h.coded_bytes)
		return om_err(OM_ECORRUPT,
		              "encoded bytes: %" PRIu64 " are given, the header says %" PRIu64
		              " for %" PRIu64 " plain ones",
		              coded_bytes, h.coded_bytes, h.nbytes);
	if (h.head_hash != head_hash(coded, parts_of(h.nbytes)) || !known(h.coding))
		return om_err(OM_ECORRUPT, "encoded bytes: the header is damaged");
	*ret = (struct om_coded){ .data = coded,
		                  .bytes = h.coded_bytes,
		                  .nbytes = h.nbytes,
		                  .parts = parts_of(h.nbytes),
		                  .hash = h.plain_hash,
		                  .coding = h.coding,
		                  .stream = h.nbytes >= STREAM_BYTES };
	return prove_table(ret);
}

static bool decode_part(struct om_dense *dense, const struct om_coded *c, uint64_t part,
                        uint8_t *ret, bool stream)
{
	struct entry e = entry_at(c->data, part);
	uint64_t place = (uint64_t)e.place * PART_ALIGN, bytes = entry_bytes(e);
	size_t nbytes = part_bytes(c->nbytes, part);
	enum om_kind kind = e.what >> 24;
	const uint8_t *src = c->data + place;

	if (place > c->bytes || bytes > c->bytes - place)
		return false;
	if (kind == OM_KIND_RAW) {
		if (bytes == nbytes)
			memcpy(ret, src, nbytes);
		return bytes == nbytes;
	}
	if (kind == OM_KIND_SAME) {
		for (size_t i = 0; i < nbytes && bytes == 8; i += 8)
			memcpy(ret + i, src, OM_MIN(nbytes - i, 8));
		return bytes == 8;
	}
	if (kind >= OM_KIND_COUNT || (!dense && kind == OM_KIND_BYTES))
		return false;
	return dense ? om_dense_decode(dense, kind, src, bytes, ret, nbytes, stream)
	             : om_fast_decode(kind, src, bytes, ret, nbytes, stream);
}

int om_coded_part(const struct om_coded *c, uint64_t first, uint64_t count, void *ret)
{
	bool stream = c->stream && (uintptr_t)ret % 64 == 0;
	struct om_dense *dense = NULL;
	int code = 0;

	if (first > c->parts || count > c->parts - first)
		return om_err(OM_EVALUE,
		              "%" PRIu64 " parts from %" PRIu64
		              " on of an encoded block that has %" PRIu64,
		              count, first, c->parts);
	if (c->coding == OM_CODING_BALANCED && !(dense = om_dense_create(false)))
		return -ENOMEM;
	for (uint64_t i = first; i < first + count && !code; i++)
		if (!decode_part(dense, c, i, (uint8_t *)ret + i * OM_CODED_PART, stream))
			code = om_err(OM_ECORRUPT,
			              "encoded bytes: part %" PRIu64 " of %" PRIu64 " is damaged",
			              i, c->parts);
	om_dense_free(dense);
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

#define FEW_PARTS 4u /* decoded at a time where the result is only looked at */

int om_coded_compare(const struct om_coded *c, const void *data)
{
	uint64_t step = FEW_PARTS * OM_CODED_PART;
	uint8_t *room = om_alloc(1, OM_MIN(step, c->nbytes));
	int code = room || !c->nbytes ? 0 : -ENOMEM;

	for (uint64_t at = 0; !code && at < c->nbytes; at += step) {
		uint64_t n = OM_MIN(step, c->nbytes - at), first = at / OM_CODED_PART;

		/* om_coded_part counts places from the first part's on */
		code = om_coded_part(c, first, parts_of(n), (void *)((uintptr_t)room - at));
		if (!code && memcmp(room, (const uint8_t *)data + at, n))
			code = om_err(OM_ECORRUPT,
			              "encoded bytes: among the %" PRIu64 " from %" PRIu64
			              " on, others are decoded than were encoded",
			              n, at);
	}
	om_free(room);
	return code;
}

int om_coded_info(const void *coded, uint64_t coded_bytes, uint64_t *ret_nbytes,
                  enum om_coding *ret_coding)
{
	const uint8_t *data = coded;
	struct om_coded c = { 0 };
	uint64_t nbytes = 0;
	enum om_coding coding = OM_CODING_NONE;

	do {
		int code = om_coded_open(data, coded_bytes, &c);

		if (code)
			return code;
		if (om_add_overflows(nbytes, c.nbytes, &nbytes))
			return om_err(OM_ECORRUPT, "encoded bytes: more plain ones than there are");
		coding = OM_MAX(coding, c.coding);
		data += c.bytes;
		coded_bytes -= c.bytes;
	} while (coded_bytes);
	*ret_nbytes = nbytes;
	*ret_coding = coding;
	return 0;
}

int om_decode(const void *coded, uint64_t coded_bytes, void *ret, uint64_t nbytes)
{
	const uint8_t *data = coded;
	uint8_t *plain = ret;
	uint64_t left = nbytes;
	struct om_coded c = { 0 };

	do {
		int code = om_coded_open(data, coded_bytes, &c);

		if (!code && c.nbytes > left)
			code = om_err(OM_ECORRUPT,
			              "encoded bytes: of %" PRIu64 " plain ones or more, %" PRIu64
			              " are wanted",
			              nbytes - left + c.nbytes, nbytes);
		code = code ? code : om_coded_part(&c, 0, c.parts, plain);
		code = code ? code : om_coded_check(&c, plain);
		if (code)
			return code;
		plain += c.nbytes;
		left -= c.nbytes;
		data += c.bytes;
		coded_bytes -= c.bytes;
	} while (coded_bytes);
	if (left)
		return om_err(OM_ECORRUPT,
		              "encoded bytes: of %" PRIu64 " plain ones, %" PRIu64 " are wanted",
		              nbytes - left, nbytes);
	return 0;
}
