/*
 * codec_avx2: the inner loops for AVX2; called only where the processor has it.
 */
#include "core/codec_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

#define LOAD(p)     _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, x) _mm256_storeu_si256((__m256i *)(p), x)

AVX2 static void split_bf16(const uint8_t *src, size_t n, uint8_t *exponents, uint8_t *plane)
{
	const __m256i low = _mm256_set1_epi16(255);

	for (size_t i = 0; i < n; i += 32) {
		__m256i a = LOAD(src + 2 * i), b = LOAD(src + 2 * i + 32), e, p;

		a = _mm256_or_si256(_mm256_slli_epi16(a, 1), _mm256_srli_epi16(a, 15));
		b = _mm256_or_si256(_mm256_slli_epi16(b, 1), _mm256_srli_epi16(b, 15));
		e = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
		p = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
		STORE(exponents + i, _mm256_permute4x64_epi64(e, 0xd8));
		STORE(plane + i, _mm256_permute4x64_epi64(p, 0xd8));
	}
}

AVX2 static void merge_bf16(const uint8_t *exponents, const uint8_t *plane, size_t n, uint8_t *ret,
                            bool stream)
{
	for (size_t i = 0; i < n; i += 32) {
		__m256i e = _mm256_permute4x64_epi64(LOAD(exponents + i), 0xd8);
		__m256i p = _mm256_permute4x64_epi64(LOAD(plane + i), 0xd8);
		__m256i a = _mm256_unpacklo_epi8(p, e), b = _mm256_unpackhi_epi8(p, e);

		a = _mm256_or_si256(_mm256_srli_epi16(a, 1), _mm256_slli_epi16(a, 15));
		b = _mm256_or_si256(_mm256_srli_epi16(b, 1), _mm256_slli_epi16(b, 15));
		if (stream) {
			_mm256_stream_si256((__m256i *)(ret + 2 * i), a);
			_mm256_stream_si256((__m256i *)(ret + 2 * i + 32), b);
		} else {
			STORE(ret + 2 * i, a);
			STORE(ret + 2 * i + 32, b);
		}
	}
}

AVX2 static void split(enum om_kind kind, const uint8_t *src, size_t n, uint8_t *exponents,
                       uint8_t *rest, uint8_t *planes)
{
	if (kind == OM_KIND_BF16)
		split_bf16(src, n, exponents, planes);
	else
		om_split_any(kind, src, n, exponents, rest, planes);
}

AVX2 static void merge(enum om_kind kind, const uint8_t *exponents, const uint8_t *rest,
                       const uint8_t *planes, size_t n, uint8_t *ret, bool stream)
{
	_Alignas(64) uint8_t made[4 * OM_CODEC_BLOCK];
	size_t bytes = n * om_cuts[kind].element_bytes;

	if (kind == OM_KIND_BF16) {
		merge_bf16(exponents, planes, n, ret, stream);
		return;
	}
	om_merge_any(kind, exponents, rest, planes, n, stream ? made : ret);
	for (size_t i = 0; stream && i < bytes; i += 32)
		_mm256_stream_si256((__m256i *)(ret + i), LOAD(made + i));
}

/* Bit i: byte i is above `most`, a vector of 2^k - 1. */
AVX2 static inline uint32_t above(__m256i x, __m256i most)
{
	return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(x, most), most));
}

/* 256 elements, every second 32 of a group, to halves of its three rows of bytes. */
AVX2 static inline void pack3_half(const uint8_t *src, __m256i base, uint8_t *ret, uint8_t *escapes)
{
	const __m256i three = _mm256_set1_epi8(3), four = _mm256_set1_epi8(4);
	__m256i low[2], high = _mm256_setzero_si256();

#define PACK(s)                                                                                  \
	do {                                                                                     \
		__m256i x = _mm256_sub_epi8(LOAD(src + 64 * (s)), base);                         \
		uint32_t out = above(x, _mm256_set1_epi8(7));                                    \
		__m256i two = _mm256_slli_epi16(_mm256_and_si256(x, three), 2 * ((s) % 4));      \
                                                                                                 \
		memcpy(escapes + 8 * (s), &out, sizeof(out));                                    \
		low[(s) / 4] = (s) % 4 ? _mm256_or_si256(low[(s) / 4], two) : two;               \
		x = _mm256_cmpeq_epi8(_mm256_and_si256(x, four), four);                          \
		high = _mm256_or_si256(high,                                                     \
		                       _mm256_and_si256(x, _mm256_set1_epi8((char)(1 << (s))))); \
	} while (0)
	PACK(0);
	PACK(1);
	PACK(2);
	PACK(3);
	PACK(4);
	PACK(5);
	PACK(6);
	PACK(7);
#undef PACK
	STORE(ret, low[0]);
	STORE(ret + 64, low[1]);
	STORE(ret + 128, high);
}

AVX2 static void pack3(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret, uint64_t *escapes)
{
	__m256i bases = _mm256_set1_epi8((char)base);
	uint8_t *bits = (uint8_t *)escapes;

	for (size_t i = 0; i < n / OM_CODEC_GROUP; i++) {
		pack3_half(src + 512 * i, bases, ret + 192 * i, bits + 64 * i);
		pack3_half(src + 512 * i + 32, bases, ret + 192 * i + 32, bits + 64 * i + 4);
	}
}

AVX2 static inline void unpack3_half(const uint8_t *src, __m256i base, uint8_t *ret)
{
	const __m256i three = _mm256_set1_epi8(3), four = _mm256_set1_epi8(4);
	__m256i low[2] = { LOAD(src), LOAD(src + 64) }, high = LOAD(src + 128);

#define UNPACK(s)                                                                                \
	do {                                                                                     \
		__m256i two =                                                                    \
			_mm256_and_si256(_mm256_srli_epi16(low[(s) / 4], 2 * ((s) % 4)), three); \
		__m256i bit = _mm256_set1_epi8((char)(1 << (s)));                                \
                                                                                                 \
		bit = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);                       \
		bit = _mm256_and_si256(bit, four);                                               \
		STORE(ret + 64 * (s), _mm256_add_epi8(base, _mm256_or_si256(two, bit)));         \
	} while (0)
	UNPACK(0);
	UNPACK(1);
	UNPACK(2);
	UNPACK(3);
	UNPACK(4);
	UNPACK(5);
	UNPACK(6);
	UNPACK(7);
#undef UNPACK
}

AVX2 static void unpack3(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret)
{
	__m256i bases = _mm256_set1_epi8((char)base);

	for (size_t i = 0; i < n / OM_CODEC_GROUP; i++) {
		unpack3_half(src + 192 * i, bases, ret + 512 * i);
		unpack3_half(src + 192 * i + 32, bases, ret + 512 * i + 32);
	}
}

AVX2 static void pack4(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret, uint64_t *escapes)
{
	const __m256i bases = _mm256_set1_epi8((char)base), most = _mm256_set1_epi8(15);
	uint8_t *bits = (uint8_t *)escapes;

	for (size_t i = 0; i < n / 64;
	     i++) { /* half of 128 elements: 32 of the first 64, 32 of the second */
		const uint8_t *from = src + 128 * (i / 2) + 32 * (i % 2);
		uint8_t *out = bits + 16 * (i / 2) + 4 * (i % 2);
		__m256i a = _mm256_sub_epi8(LOAD(from), bases);
		__m256i b = _mm256_sub_epi8(LOAD(from + 64), bases);
		uint32_t out_a = above(a, most), out_b = above(b, most);

		memcpy(out, &out_a, sizeof(out_a));
		memcpy(out + 8, &out_b, sizeof(out_b));
		b = _mm256_slli_epi16(_mm256_and_si256(b, most), 4);
		STORE(ret + 32 * i, _mm256_or_si256(_mm256_and_si256(a, most), b));
	}
}

AVX2 static void unpack4(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret)
{
	const __m256i bases = _mm256_set1_epi8((char)base), most = _mm256_set1_epi8(15);

	for (size_t i = 0; i < n / 64; i++) {
		uint8_t *to = ret + 128 * (i / 2) + 32 * (i % 2);
		__m256i x = LOAD(src + 32 * i);
		__m256i a = _mm256_and_si256(x, most);
		__m256i b = _mm256_and_si256(_mm256_srli_epi16(x, 4), most);

		STORE(to, _mm256_add_epi8(bases, a));
		STORE(to + 64, _mm256_add_epi8(bases, b));
	}
}

static const struct om_kernels kernels = { "avx2", split, merge, pack3, pack4, unpack3, unpack4 };
const struct om_kernels *const om_kernels_avx2 = &kernels;

#else

const struct om_kernels *const om_kernels_avx2 = NULL;

#endif
