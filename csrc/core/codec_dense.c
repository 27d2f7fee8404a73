/*
 * codec_dense: a part under BALANCED: the sections of codec_planes with codes of 4 bits and one base, two codes
 * to a byte, and of zstd its Huffman stage alone over those bytes: a frame in their place. Matches are no
 * gain on weights, they make frames longer and slower, so the parameters leave next to none.
 *
 * The part begins with the frame's bytes (four; as many as there are codes: not a frame but the codes
 * themselves), heads follow. A part of OM_KIND_BYTES is a frame and nothing else.
 *
 * om_dense holds zstd's context and scratch for one call of the codec, on one thread.
 */
#include <errno.h>
#include <string.h>
#include <zstd.h>

#include "core/om_codec.h"

#define CODE_BITS  4
#define SIZE_BYTES 4
#define SCRATCH    (OM_CODED_PART / 2) /* codes of a part whose elements have a byte each */
#define PATCHES    (OM_CODED_PART / 8)

struct om_dense {
	ZSTD_CCtx *coder;
	ZSTD_DCtx *decoder;
	uint8_t *codes, *patches;
};

void om_dense_free(struct om_dense *d)
{
	if (!d)
		return;
	ZSTD_freeCCtx(d->coder);
	ZSTD_freeDCtx(d->decoder);
	om_free(d->codes);
	om_free(d->patches);
	om_free(d);
}

/* Literals are Huffman coded and matches hardly looked for; nothing in the frame that is known anyway. */
static bool set_up(ZSTD_CCtx *coder)
{
	static const struct {
		ZSTD_cParameter parameter;
		int value;
	} wanted[] = {
		{ ZSTD_c_strategy, ZSTD_fast }, { ZSTD_c_targetLength, 0 },
		{ ZSTD_c_minMatch, 7 },         { ZSTD_c_hashLog, 6 },
		{ ZSTD_c_windowLog, 17 },       { ZSTD_c_contentSizeFlag, 0 },
		{ ZSTD_c_checksumFlag, 0 },     { ZSTD_c_dictIDFlag, 0 },
	};

	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (ZSTD_isError(
			    ZSTD_CCtx_setParameter(coder, wanted[i].parameter, wanted[i].value)))
			return false;
	return true;
}

struct om_dense *om_dense_create(bool encode)
{
	struct om_dense *d = om_alloc(1, sizeof(*d));

	if (!d)
		return NULL;
	d->codes = om_alloc(1, SCRATCH);
	d->patches = encode && d->codes ? om_alloc(1, PATCHES) : NULL;
	if (d->codes && (d->patches || !encode) && !om_fault(OM_FAULT_ALLOC)) {
		if (encode)
			d->coder = ZSTD_createCCtx();
		else
			d->decoder = ZSTD_createDCtx();
		if (d->decoder || (d->coder && set_up(d->coder)))
			return d;
	}
	om_dense_free(d);
	om_err(-ENOMEM, "no memory for zstd's context");
	return NULL;
}

/* A frame of at most `room` bytes; 0: longer. */
static size_t frame(struct om_dense *d, const uint8_t *src, size_t nbytes, uint8_t *ret,
                    size_t room)
{
	size_t bytes = ZSTD_compress2(d->coder, ret, room, src, nbytes);

	return ZSTD_isError(bytes) ? 0 : bytes;
}

static bool unframe(struct om_dense *d, const uint8_t *src, size_t bytes, uint8_t *ret,
                    size_t nbytes)
{
	return ZSTD_decompressDCtx(d->decoder, ret, nbytes, src, bytes) == nbytes;
}

size_t om_dense_encode(struct om_dense *d, enum om_kind kind, uint8_t base, const uint8_t *src,
                       size_t nbytes, uint8_t *ret, size_t room)
{
	struct om_layout l;
	struct om_planes p;
	size_t front, bytes;

	if (kind == OM_KIND_BYTES)
		return frame(d, src, nbytes, ret, room);
	om_layout_init(&l, kind, CODE_BITS, nbytes);
	front = om_up(SIZE_BYTES + l.heads, 64);
	if (front + l.planes > room)
		return 0;
	memset(ret, 0, front);
	p.heads = ret + SIZE_BYTES;
	p.planes = ret + front;
	p.codes = d->codes;
	p.patches = d->patches;
	p.patch_bytes = PATCHES;
	if (!om_planes_split(&l, src, base, &p))
		return 0;
	room -= front + l.planes;
	bytes = frame(d, p.codes, l.codes, p.planes + l.planes, OM_MIN(room, l.codes - 1));
	if (!bytes && l.codes <= room) {
		bytes = l.codes;
		memcpy(p.planes + l.planes, p.codes, bytes);
	}
	if (!bytes || p.patch_bytes > room - bytes)
		return 0;
	memcpy(ret, &(uint32_t){ (uint32_t)bytes }, SIZE_BYTES);
	memcpy(p.planes + l.planes + bytes, p.patches, p.patch_bytes);
	return front + l.planes + bytes + p.patch_bytes;
}

bool om_dense_decode(struct om_dense *d, enum om_kind kind, const uint8_t *src, size_t bytes,
                     uint8_t *ret, size_t nbytes, bool stream)
{
	struct om_layout l;
	struct om_planes p;
	size_t front;
	uint32_t framed;

	if (kind == OM_KIND_BYTES)
		return unframe(d, src, bytes, ret, nbytes);
	om_layout_init(&l, kind, CODE_BITS, nbytes);
	front = om_up(SIZE_BYTES + l.heads, 64);
	if (bytes < front + l.planes)
		return false;
	bytes -= front + l.planes;
	memcpy(&framed, src, SIZE_BYTES);
	if (framed > bytes || framed > l.codes)
		return false;
	p.heads = (uint8_t *)src + SIZE_BYTES;
	p.planes = (uint8_t *)src + front;
	p.codes = p.planes + l.planes;
	p.patches = p.codes + framed;
	p.patch_bytes = bytes - framed;
	if (framed < l.codes) {
		if (!unframe(d, p.codes, framed, d->codes, l.codes))
			return false;
		p.codes = d->codes;
	}
	return om_planes_merge(&l, &p, ret, stream);
}
