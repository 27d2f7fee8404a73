/*
 * codec_kernels: the inner loops in plain C, as the compiler vectorises them for the file that includes
 * this. Each path has the most used ones by hand, and takes the others from here.
 */
#ifndef OM_CODEC_KERNELS_H
#define OM_CODEC_KERNELS_H

#include <string.h>

#include "core/om_codec.h"

#define OM_INLINE static inline __attribute__((always_inline))

OM_INLINE uint16_t om_load16(const uint8_t *p)
{
	uint16_t x;

	memcpy(&x, p, sizeof(x));
	return x;
}

OM_INLINE uint32_t om_load32(const uint8_t *p)
{
	uint32_t x;

	memcpy(&x, p, sizeof(x));
	return x;
}

OM_INLINE uint16_t om_sign_down(uint16_t x)
{
	return (uint16_t)(x << 1 | x >> 15);
}

OM_INLINE uint16_t om_sign_up(uint16_t x)
{
	return (uint16_t)(x >> 1 | x << 15);
}

OM_INLINE void om_split_any(enum om_kind kind, const uint8_t *restrict src, size_t n,
                            uint8_t *restrict exponents, uint8_t *restrict rest,
                            uint8_t *restrict planes)
{
	switch (kind) {
	case OM_KIND_BF16:
		for (size_t i = 0; i < n; i++) {
			uint16_t x = om_sign_down(om_load16(src + 2 * i));

			exponents[i] = (uint8_t)(x >> 8);
			planes[i] = (uint8_t)x;
		}
		break;
	case OM_KIND_FP16:
		for (size_t i = 0; i < n; i++) {
			uint16_t x = om_sign_down(om_load16(src + 2 * i));

			exponents[i] = (uint8_t)(x >> 11);
			rest[i] = x >> 8 & 7;
			planes[i] = (uint8_t)x;
		}
		break;
	case OM_KIND_FP32:
		for (size_t i = 0; i < n; i++) {
			uint32_t x = om_load32(src + 4 * i);
			uint16_t high = om_sign_down((uint16_t)(x >> 16));

			exponents[i] = (uint8_t)(high >> 8);
			planes[i] = (uint8_t)high;
			planes[n + i] = (uint8_t)(x >> 8);
			planes[2 * n + i] = (uint8_t)x;
		}
		break;
	case OM_KIND_WIDE:
		for (size_t i = 0; i < n; i++) {
			uint16_t high = om_sign_down((uint16_t)(om_load32(src + 4 * i) >> 16));

			exponents[i] = (uint8_t)(high >> 8);
			planes[i] = (uint8_t)high;
		}
		break;
	case OM_KIND_E4M3:
		for (size_t i = 0; i < n; i++) {
			exponents[i] = src[i] >> 3 & 15;
			rest[i] = (uint8_t)((src[i] & 7) << 1 | src[i] >> 7);
		}
		break;
	default: /* OM_KIND_E5M2 */
		for (size_t i = 0; i < n; i++) {
			exponents[i] = src[i] >> 2 & 31;
			rest[i] = (uint8_t)((src[i] & 3) << 1 | src[i] >> 7);
		}
	}
}

OM_INLINE void om_merge_any(enum om_kind kind, const uint8_t *restrict exponents,
                            const uint8_t *restrict rest, const uint8_t *restrict planes, size_t n,
                            uint8_t *restrict ret)
{
	switch (kind) {
	case OM_KIND_BF16:
		for (size_t i = 0; i < n; i++) {
			uint16_t x = om_sign_up((uint16_t)(exponents[i] << 8 | planes[i]));

			memcpy(ret + 2 * i, &x, sizeof(x));
		}
		break;
	case OM_KIND_FP16:
		for (size_t i = 0; i < n; i++) {
			uint16_t x = om_sign_up(
				(uint16_t)((exponents[i] << 3 | rest[i]) << 8 | planes[i]));

			memcpy(ret + 2 * i, &x, sizeof(x));
		}
		break;
	case OM_KIND_FP32:
		for (size_t i = 0; i < n; i++) {
			uint16_t high = om_sign_up((uint16_t)(exponents[i] << 8 | planes[i]));
			uint32_t x = (uint32_t)high << 16 | (uint32_t)planes[n + i] << 8 |
			             planes[2 * n + i];

			memcpy(ret + 4 * i, &x, sizeof(x));
		}
		break;
	case OM_KIND_WIDE:
		for (size_t i = 0; i < n; i++) {
			uint32_t x = (uint32_t)om_sign_up((uint16_t)(exponents[i] << 8 | planes[i]))
			             << 16;

			memcpy(ret + 4 * i, &x, sizeof(x));
		}
		break;
	case OM_KIND_E4M3:
		for (size_t i = 0; i < n; i++)
			ret[i] = (uint8_t)(rest[i] << 7 | exponents[i] << 3 | rest[i] >> 1);
		break;
	default: /* OM_KIND_E5M2 */
		for (size_t i = 0; i < n; i++)
			ret[i] = (uint8_t)(rest[i] << 7 | (exponents[i] & 31) << 2 | rest[i] >> 1);
	}
}

/* Bit i: byte i of 64, less `base`, is above `most` (2^k - 1). */
OM_INLINE uint64_t om_escapes_any(const uint8_t *src, uint8_t base, uint8_t most)
{
	uint64_t ret = 0;

	for (unsigned i = 0; i < 8; i++) {
		uint8_t away[8];
		uint64_t x;

		for (unsigned j = 0; j < 8; j++)
			away[j] = (uint8_t)(src[8 * i + j] - base) & (uint8_t)~most;
		memcpy(&x, away, sizeof(x));
		/* the top bit of each byte that is not 0, gathered by one multiplication */
		x = (((x & UINT64_C(0x7f7f7f7f7f7f7f7f)) + UINT64_C(0x7f7f7f7f7f7f7f7f)) | x) >> 7 &
		    UINT64_C(0x0101010101010101);
		ret |= (x * UINT64_C(0x0102040810204080) >> 56) << 8 * i;
	}
	return ret;
}

OM_INLINE void om_pack3_any(const uint8_t *restrict src, uint8_t base, size_t n,
                            uint8_t *restrict ret, uint64_t *restrict escapes)
{
	for (size_t group = 0; group < n / OM_CODEC_GROUP; group++, src += 512, ret += 192) {
		memset(ret, 0, 192);
		for (unsigned s = 0; s < 8; s++) {
			uint8_t *pairs = ret + 64 * (s / 4);

			for (unsigned j = 0; j < 64; j++) {
				uint8_t code = (uint8_t)(src[64 * s + j] - base) & 7;

				pairs[j] |= (uint8_t)((code & 3) << 2 * (s % 4));
				ret[128 + j] |= (uint8_t)(code >> 2 << s);
			}
			escapes[8 * group + s] = om_escapes_any(src + 64 * s, base, 7);
		}
	}
}

OM_INLINE void om_unpack3_any(const uint8_t *restrict src, uint8_t base, size_t n,
                              uint8_t *restrict ret)
{
	for (size_t group = 0; group < n / OM_CODEC_GROUP; group++, src += 192, ret += 512) {
		for (unsigned s = 0; s < 8; s++) {
			const uint8_t *pairs = src + 64 * (s / 4);

			for (unsigned j = 0; j < 64; j++)
				ret[64 * s + j] = (uint8_t)(base + (pairs[j] >> 2 * (s % 4) & 3) +
				                            (src[128 + j] >> s & 1) * 4);
		}
	}
}

OM_INLINE void om_pack4_any(const uint8_t *restrict src, uint8_t base, size_t n,
                            uint8_t *restrict ret, uint64_t *restrict escapes)
{
	for (size_t i = 0; i < n / 128; i++, src += 128, ret += 64) {
		for (unsigned j = 0; j < 64; j++)
			ret[j] = (uint8_t)(((uint8_t)(src[j] - base) & 15) |
			                   ((uint8_t)(src[64 + j] - base) & 15) << 4);
		escapes[2 * i] = om_escapes_any(src, base, 15);
		escapes[2 * i + 1] = om_escapes_any(src + 64, base, 15);
	}
}

OM_INLINE void om_unpack4_any(const uint8_t *restrict src, uint8_t base, size_t n,
                              uint8_t *restrict ret)
{
	for (size_t i = 0; i < n / 128; i++, src += 64, ret += 128) {
		for (unsigned j = 0; j < 64; j++) {
			ret[j] = (uint8_t)(base + (src[j] & 15));
			ret[64 + j] = (uint8_t)(base + (src[j] >> 4));
		}
	}
}

#endif
