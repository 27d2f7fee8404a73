/*
 * codec_avx512: the inner loops for AVX-512 with VBMI2 (Ice Lake, Zen 4 and later); called only where the
 * processor has it.
 */
#include "core/codec_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))

#define LOAD(p)     _mm512_loadu_si512(p)
#define STORE(p, x) _mm512_storeu_si512(p, x)

AVX512 static void split_bf16(const uint8_t *src, size_t n, uint8_t *exponents, uint8_t *plane)
{
	const __m512i low = _mm512_set1_epi16(255);
	const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);

	for (size_t i = 0; i < n; i += 64) {
		__m512i a = LOAD(src + 2 * i), b = LOAD(src + 2 * i + 64), e, p;

		a = _mm512_shldi_epi16(a, a, 1);
		b = _mm512_shldi_epi16(b, b, 1);
		e = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
		p = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
		STORE(exponents + i, _mm512_permutexvar_epi64(order, e));
		STORE(plane + i, _mm512_permutexvar_epi64(order, p));
	}
}

AVX512 static void merge_bf16(const uint8_t *exponents, const uint8_t *plane, size_t n,
                              uint8_t *ret, bool stream)
{
	const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);

	for (size_t i = 0; i < n; i += 64) {
		__m512i e = _mm512_permutexvar_epi64(order, LOAD(exponents + i));
		__m512i p = _mm512_permutexvar_epi64(order, LOAD(plane + i));
		__m512i a = _mm512_unpacklo_epi8(p, e), b = _mm512_unpackhi_epi8(p, e);

		a = _mm512_shrdi_epi16(a, a, 1);
		b = _mm512_shrdi_epi16(b, b, 1);
		if (stream) {
			_mm512_stream_si512((void *)(ret + 2 * i), a);
			_mm512_stream_si512((void *)(ret + 2 * i + 64), b);
		} else {
			STORE(ret + 2 * i, a);
			STORE(ret + 2 * i + 64, b);
		}
	}
}

AVX512 static void split(enum om_kind kind, const uint8_t *src, size_t n, uint8_t *exponents,
                         uint8_t *rest, uint8_t *planes)
{
	if (kind == OM_KIND_BF16)
		split_bf16(src, n, exponents, planes);
	else
		om_split_any(kind, src, n, exponents, rest, planes);
}

AVX512 static void merge(enum om_kind kind, const uint8_t *exponents, const uint8_t *rest,
                         const uint8_t *planes, size_t n, uint8_t *ret, bool stream)
{
	_Alignas(64) uint8_t made[4 * OM_CODEC_BLOCK];
	size_t bytes = n * om_cuts[kind].element_bytes;

	if (kind == OM_KIND_BF16) {
		merge_bf16(exponents, planes, n, ret, stream);
		return;
	}
	om_merge_any(kind, exponents, rest, planes, n, stream ? made : ret);
	for (size_t i = 0; stream && i < bytes; i += 64)
		_mm512_stream_si512((void *)(ret + i), LOAD(made + i));
}

AVX512 static void pack3(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret,
                         uint64_t *escapes)
{
	const __m512i bases = _mm512_set1_epi8((char)base), most = _mm512_set1_epi8(7);
	const __m512i three = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);

	for (size_t i = 0; i < n / OM_CODEC_GROUP; i++, src += 512, ret += 192, escapes += 8) {
		__m512i low[2], high = _mm512_setzero_si512();

#define PACK(s)                                                                             \
	do {                                                                                \
		__m512i x = _mm512_sub_epi8(LOAD(src + 64 * (s)), bases);                   \
		__m512i two = _mm512_slli_epi16(_mm512_and_si512(x, three), 2 * ((s) % 4)); \
                                                                                            \
		escapes[s] = _mm512_cmpgt_epu8_mask(x, most);                               \
		low[(s) / 4] = (s) % 4 ? _mm512_or_si512(low[(s) / 4], two) : two;          \
		high = _mm512_mask_add_epi8(high, _mm512_test_epi8_mask(x, four), high,     \
		                            _mm512_set1_epi8((char)(1 << (s))));            \
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
}

AVX512 static void unpack3(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret)
{
	const __m512i bases = _mm512_set1_epi8((char)base);
	const __m512i three = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);

	for (size_t i = 0; i < n / OM_CODEC_GROUP; i++, src += 192, ret += 512) {
		__m512i low[2] = { LOAD(src), LOAD(src + 64) }, high = LOAD(src + 128);

#define UNPACK(s)                                                                                 \
	do {                                                                                      \
		__m512i x =                                                                       \
			_mm512_and_si512(_mm512_srli_epi16(low[(s) / 4], 2 * ((s) % 4)), three);  \
                                                                                                  \
		x = _mm512_add_epi8(x, bases);                                                    \
		STORE(ret + 64 * (s),                                                             \
		      _mm512_mask_add_epi8(                                                       \
			      x, _mm512_test_epi8_mask(high, _mm512_set1_epi8((char)(1 << (s)))), \
			      x, four));                                                          \
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
}

AVX512 static void pack4(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret,
                         uint64_t *escapes)
{
	const __m512i bases = _mm512_set1_epi8((char)base), most = _mm512_set1_epi8(15);

	for (size_t i = 0; i < n / 128; i++) {
		__m512i a = _mm512_sub_epi8(LOAD(src + 128 * i), bases);
		__m512i b = _mm512_sub_epi8(LOAD(src + 128 * i + 64), bases);

		escapes[2 * i] = _mm512_cmpgt_epu8_mask(a, most);
		escapes[2 * i + 1] = _mm512_cmpgt_epu8_mask(b, most);
		b = _mm512_slli_epi16(_mm512_and_si512(b, most), 4);
		STORE(ret + 64 * i, _mm512_or_si512(_mm512_and_si512(a, most), b));
	}
}

AVX512 static void unpack4(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret)
{
	const __m512i bases = _mm512_set1_epi8((char)base), most = _mm512_set1_epi8(15);

	for (size_t i = 0; i < n / 128; i++) {
		__m512i x = LOAD(src + 64 * i);
		__m512i a = _mm512_and_si512(x, most);
		__m512i b = _mm512_and_si512(_mm512_srli_epi16(x, 4), most);

		STORE(ret + 128 * i, _mm512_add_epi8(bases, a));
		STORE(ret + 128 * i + 64, _mm512_add_epi8(bases, b));
	}
}

static const struct om_kernels kernels = { "avx512", split, merge, pack3, pack4, unpack3, unpack4 };
const struct om_kernels *const om_kernels_avx512 = &kernels;

#else

const struct om_kernels *const om_kernels_avx512 = NULL;

#endif
