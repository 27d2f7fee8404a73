/*
 * codec_planes: a part of elements to sections and back, a block of OM_CODEC_BLOCK elements at a time.
 *
 * A head has four bytes: how many patches the block has (two), its base, 0. A patch has two: how much
 * further on its element is than the last one's (the first: than element 0), and its exponent. Where that is more than
 * 255, a patch in between says again what is there anyway: applying them takes no branch.
 *
 * Passive, no memory but the stack's (24 KiB). What is read back is checked before it is used as a place.
 */
#include <string.h>

#include "core/om_codec.h"

#define HEAD_BYTES 4

const struct om_cut om_cuts[OM_KIND_COUNT] = {
	[OM_KIND_BF16] = { 2, 1, 0 }, [OM_KIND_FP16] = { 2, 1, 3 }, [OM_KIND_FP32] = { 4, 3, 0 },
	[OM_KIND_WIDE] = { 4, 1, 0 }, [OM_KIND_E4M3] = { 1, 0, 4 }, [OM_KIND_E5M2] = { 1, 0, 3 },
};

/* Bytes of planes and rest bits of a block of `n` elements. */
static size_t planes_bytes(enum om_kind kind, size_t n)
{
	return n * om_cuts[kind].planes + n * om_cuts[kind].rest_bits / 8;
}

void om_layout_init(struct om_layout *l, enum om_kind kind, unsigned code_bits, size_t nbytes)
{
	size_t element = om_cuts[kind].element_bytes, filled;

	l->kind = kind;
	l->code_bits = code_bits;
	l->nbytes = nbytes;
	l->count = (nbytes + element - 1) / element;
	l->blocks = (l->count + OM_CODEC_BLOCK - 1) / OM_CODEC_BLOCK;
	filled = om_up(l->count, OM_CODEC_GROUP);
	l->last = filled - (l->blocks - 1) * OM_CODEC_BLOCK;
	l->heads = l->blocks * HEAD_BYTES;
	l->planes =
		(l->blocks - 1) * planes_bytes(kind, OM_CODEC_BLOCK) + planes_bytes(kind, l->last);
	l->codes = filled * code_bits / 8;
}

uint8_t om_planes_base(const uint16_t counts[256], unsigned bits, unsigned *ret_inside)
{
	unsigned width = 1u << bits, inside = 0, best = 0, at = 0, first = 0, end = 256;

	while (first < 255 && !counts[first])
		first++;
	while (end > first + 1 && !counts[end - 1])
		end--;
	first = OM_MIN(first, 256 - width);
	for (unsigned i = first; i < first + width; i++)
		inside += counts[i];
	best = inside;
	at = first;
	for (unsigned i = first + width; i < end; i++) {
		inside += counts[i];
		inside -= counts[i - width];
		if (inside > best) {
			best = inside;
			at = i - width + 1;
		}
	}
	*ret_inside = best;
	return (uint8_t)at;
}

/* A base by one exponent in 16, each time another one so that no column of a matrix is always met. */
static uint8_t choose_base(const uint8_t *exponents, size_t n, unsigned code_bits)
{
	uint16_t counts[256] = { 0 };
	unsigned unused;

	for (size_t i = 0; i < n; i += 16)
		counts[exponents[i + (i / 16 & 15)]]++;
	return om_planes_base(counts, code_bits, &unused);
}

/* Room that the patches of a block may need, in bytes. */
static size_t patches_most(const uint64_t *escapes, size_t n)
{
	size_t most = n / 256 + 1;

	for (size_t i = 0; i < n / 64; i++)
		most += (size_t)__builtin_popcountll(escapes[i]);
	return 2 * most;
}

/* The block's patches, for the bits of `escapes`; NULL when they might not fit below `end`. */
static uint8_t *write_patches(const uint8_t *exponents, const uint64_t *escapes, size_t n,
                              uint8_t *p, const uint8_t *end, unsigned *ret_count)
{
	size_t at = 0, room = (size_t)(end - p);
	uint8_t *first = p;

	if (room < 2 * n && room < patches_most(escapes, n))
		return NULL;
	for (size_t i = 0; i < n / 64; i++) {
		for (uint64_t bits = escapes[i]; bits; bits &= bits - 1) {
			size_t to = 64 * i + (size_t)__builtin_ctzll(bits);

			for (; to - at > 255; *p++ = exponents[at]) {
				at += 255;
				*p++ = 255;
			}
			*p++ = (uint8_t)(to - at);
			*p++ = exponents[to];
			at = to;
		}
	}
	*ret_count = (unsigned)(p - first) / 2;
	return p;
}

bool om_planes_split(const struct om_layout *l, const uint8_t *src, int base, struct om_planes *p)
{
	_Alignas(64) uint8_t exponents[OM_CODEC_BLOCK], rest[OM_CODEC_BLOCK],
		last[4 * OM_CODEC_BLOCK];
	uint64_t escapes[OM_CODEC_BLOCK / 64];
	const struct om_kernels *k = om_codec_kernels();
	const struct om_cut *cut = &om_cuts[l->kind];
	uint8_t *planes = p->planes, *codes = p->codes, *patch = p->patches;

	for (size_t b = 0; b < l->blocks; b++) {
		bool whole = b + 1 < l->blocks;
		size_t n = whole ? OM_CODEC_BLOCK : l->last, real = n;
		const uint8_t *from = src + b * OM_CODEC_BLOCK * cut->element_bytes;
		uint8_t *head = p->heads + HEAD_BYTES * b;
		unsigned count;

		if (!whole && l->nbytes != (b * OM_CODEC_BLOCK + n) * cut->element_bytes) {
			size_t bytes = l->nbytes - b * OM_CODEC_BLOCK * cut->element_bytes;

			real = l->count - b * OM_CODEC_BLOCK;
			memcpy(last, from, bytes);
			memset(last + bytes, 0, n * cut->element_bytes - bytes);
			from = last;
		}
		k->split(l->kind, from, n, exponents, rest, planes);
		if (cut->rest_bits == 3)
			k->pack3(rest, 0, n, planes + n * cut->planes, escapes);
		else if (cut->rest_bits)
			k->pack4(rest, 0, n, planes + n * cut->planes, escapes);
		head[2] = base < 0 ? choose_base(exponents, n, l->code_bits) : (uint8_t)base;
		memset(exponents + real, head[2], n - real);
		(l->code_bits == 3 ? k->pack3 : k->pack4)(exponents, head[2], n, codes, escapes);
		patch = write_patches(exponents, escapes, n, patch, p->patches + p->patch_bytes,
		                      &count);
		if (!patch)
			return false;
		head[0] = (uint8_t)count;
		head[1] = (uint8_t)(count >> 8);
		head[3] = 0;
		planes += planes_bytes(l->kind, n);
		codes += n * l->code_bits / 8;
	}
	p->patch_bytes = (size_t)(patch - p->patches);
	return true;
}

static bool apply_patches(const uint8_t *patch, unsigned count, uint8_t *exponents, size_t n)
{
	size_t at = 0;

	for (unsigned i = 0; i < count; i++) {
		at += patch[2 * i];
		if (at >= n)
			return false;
		exponents[at] = patch[2 * i + 1];
	}
	return true;
}

bool om_planes_merge(const struct om_layout *l, const struct om_planes *p, uint8_t *ret,
                     bool stream)
{
	_Alignas(64) uint8_t exponents[OM_CODEC_BLOCK], rest[OM_CODEC_BLOCK],
		last[4 * OM_CODEC_BLOCK];
	const struct om_kernels *k = om_codec_kernels();
	const struct om_cut *cut = &om_cuts[l->kind];
	const uint8_t *planes = p->planes, *codes = p->codes, *patch = p->patches;
	size_t left = p->patch_bytes;

	for (size_t b = 0; b < l->blocks; b++) {
		bool whole = b + 1 < l->blocks;
		size_t n = whole ? OM_CODEC_BLOCK : l->last;
		uint8_t *to = ret + b * OM_CODEC_BLOCK * cut->element_bytes;
		const uint8_t *head = p->heads + HEAD_BYTES * b;
		unsigned count = head[0] | (unsigned)head[1] << 8;

		if (2 * (size_t)count > left)
			return false;
		(l->code_bits == 3 ? k->unpack3 : k->unpack4)(codes, head[2], n, exponents);
		if (!apply_patches(patch, count, exponents, n))
			return false;
		if (cut->rest_bits == 3)
			k->unpack3(planes + n * cut->planes, 0, n, rest);
		else if (cut->rest_bits)
			k->unpack4(planes + n * cut->planes, 0, n, rest);
		if (whole || l->nbytes == (b * OM_CODEC_BLOCK + n) * cut->element_bytes) {
			k->merge(l->kind, exponents, rest, planes, n, to, stream);
		} else {
			k->merge(l->kind, exponents, rest, planes, n, last, false);
			memcpy(to, last, l->nbytes - b * OM_CODEC_BLOCK * cut->element_bytes);
		}
		planes += planes_bytes(l->kind, n);
		codes += n * l->code_bits / 8;
		patch += 2 * count;
		left -= 2 * count;
	}
	return left == 0;
}
