/*
 * codec_sample: what a part's bytes are taken for, by a sample of them: an estimate of what each kind would leave.
 *
 * Functions of their arguments; 24 KiB of stack.
 */
#include <math.h>
#include <string.h>

#include "core/om_codec.h"

#define SAMPLE_RUNS  16
#define SAMPLE_RUN   256
#define SAMPLE_BYTES (SAMPLE_RUNS * SAMPLE_RUN)

#define PATCH_BITS 16.5 /* of an exponent that has no code, with the patches in between */

/* Bits of `n` symbols, of which these are `counts`, each by itself. */
static double entropy(const uint16_t counts[256], unsigned n)
{
	double bits = 0;

	for (unsigned i = 0; i < 256; i++)
		if (counts[i])
			bits += counts[i] * log2((double)n / counts[i]);
	return bits;
}

/* What the sample would shrink to as elements of this kind; a share above 1 where they cannot be. */
static struct om_choice elements(enum om_kind kind, const uint8_t *sample, enum om_coding coding)
{
	_Alignas(64) uint8_t exponents[SAMPLE_BYTES], rest[SAMPLE_BYTES], planes[SAMPLE_BYTES];
	const struct om_cut *cut = &om_cuts[kind];
	struct om_choice choice = { kind, 0, 2 };
	uint16_t counts[256] = { 0 };
	unsigned n = SAMPLE_BYTES / cut->element_bytes, inside;
	bool fast = coding == OM_CODING_FAST;
	double bits;

	for (unsigned i = 0; kind == OM_KIND_WIDE && i < SAMPLE_BYTES; i += 4)
		if (sample[i] || sample[i + 1])
			return choice;
	om_codec_kernels()->split(kind, sample, n, exponents, rest, planes);
	for (unsigned i = 0; i < n; i++)
		counts[exponents[i]]++;
	choice.base = om_planes_base(counts, fast ? 3 : 4, &inside);
	bits = PATCH_BITS * (n - inside) + (fast ? 3.0 * n : entropy(counts, n));
	choice.share = (bits + n * (8.0 * cut->planes + cut->rest_bits)) / (8 * SAMPLE_BYTES);
	return choice;
}

/* The same of bytes that are no elements, which BALANCED alone codes. */
static struct om_choice bytes_alone(const uint8_t *sample)
{
	uint16_t counts[256] = { 0 };

	for (unsigned i = 0; i < SAMPLE_BYTES; i++)
		counts[sample[i]]++;
	return (struct om_choice){ OM_KIND_BYTES, 0,
		                   entropy(counts, SAMPLE_BYTES) / (8 * SAMPLE_BYTES) };
}

/* As many kinds as `desc` allows; 0: any. */
static unsigned kinds_of(const struct om_desc *desc, enum om_kind ret[2])
{
	enum { FLOAT = 2, BFLOAT = 4, FLOAT8_FIRST = 7, FLOAT8_E5M2 = 12, FLOAT8_LAST = 13 };

	if (!desc || desc->ndim < 0)
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

struct om_choice om_codec_choose(const uint8_t *data, size_t nbytes, const struct om_desc *desc,
                                 enum om_coding coding)
{
	_Alignas(64) uint8_t sample[SAMPLE_BYTES];
	struct om_choice best = { OM_KIND_RAW, 0, OM_CODEC_WORTH }, other;
	enum om_kind hinted[2];
	unsigned hints = kinds_of(desc, hinted);

	if (nbytes >= 16 && !memcmp(data, data + 8, nbytes - 8))
		return (struct om_choice){ OM_KIND_SAME, 0, 8.0 / (double)nbytes };
	if (nbytes < SAMPLE_BYTES)
		return (struct om_choice){ OM_KIND_RAW, 0, 1 };
	for (size_t i = 0; i < SAMPLE_RUNS; i++)
		memcpy(sample + i * SAMPLE_RUN,
		       data + om_down((nbytes - SAMPLE_RUN) / (SAMPLE_RUNS - 1) * i, 4),
		       SAMPLE_RUN);
	for (unsigned i = 0; i < hints; i++) {
		other = elements(hinted[i], sample, coding);
		best = other.share < best.share ? other : best;
	}
	if (best.kind != OM_KIND_RAW)
		return best;
	for (enum om_kind kind = OM_KIND_BF16; kind < OM_KIND_COUNT; kind++) {
		other = elements(kind, sample, coding);
		best = other.share < best.share ? other : best;
	}
	other = bytes_alone(sample);
	if (coding == OM_CODING_BALANCED && other.share < best.share)
		best = other;
	if (best.kind == OM_KIND_RAW)
		best.share = 1;
	return best;
}
