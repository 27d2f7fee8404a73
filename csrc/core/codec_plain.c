/*
 * codec_plain: the inner loops for every processor, and the choice among those that there are.
 */
#include "core/codec_kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

static void split(enum om_kind kind, const uint8_t *src, size_t n, uint8_t *exponents,
                  uint8_t *rest, uint8_t *planes)
{
	om_split_any(kind, src, n, exponents, rest, planes);
}

static void merge(enum om_kind kind, const uint8_t *exponents, const uint8_t *rest,
                  const uint8_t *planes, size_t n, uint8_t *ret, bool stream)
{
#if defined(__SSE2__)
	if (stream) {
		_Alignas(64) uint8_t made[4 * OM_CODEC_BLOCK];
		size_t bytes = n * om_cuts[kind].element_bytes;

		om_merge_any(kind, exponents, rest, planes, n, made);
		for (size_t i = 0; i < bytes; i += 16)
			_mm_stream_si128((__m128i *)(ret + i),
			                 _mm_load_si128((__m128i *)(made + i)));
		return;
	}
#endif
	(void)stream;
	om_merge_any(kind, exponents, rest, planes, n, ret);
}

static void pack3(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret, uint64_t *escapes)
{
	om_pack3_any(src, base, n, ret, escapes);
}

static void pack4(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret, uint64_t *escapes)
{
	om_pack4_any(src, base, n, ret, escapes);
}

static void unpack3(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret)
{
	om_unpack3_any(src, base, n, ret);
}

static void unpack4(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret)
{
	om_unpack4_any(src, base, n, ret);
}

const struct om_kernels om_kernels_plain = {
	"plain", split, merge, pack3, pack4, unpack3, unpack4
};

static const struct om_kernels *used; /* NULL until it is chosen; threads choose the same */

static const struct om_kernels *kernels_of(enum om_codec_path path)
{
#if defined(__x86_64__)
	__builtin_cpu_init();
	bool avx2 = __builtin_cpu_supports("avx2");
	bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
	              __builtin_cpu_supports("avx512vbmi2");
#else
	bool avx2 = false, avx512 = false;
#endif

	if (path == OM_PATH_PLAIN)
		return &om_kernels_plain;
	if (avx512 && om_kernels_avx512 && path != OM_PATH_AVX2)
		return om_kernels_avx512;
	if (avx2 && om_kernels_avx2 && path != OM_PATH_AVX512)
		return om_kernels_avx2;
	return path == OM_PATH_AUTO ? &om_kernels_plain : NULL;
}

bool om_codec_use(enum om_codec_path path)
{
	const struct om_kernels *k = kernels_of(path);

	if (k)
		__atomic_store_n(&used, k, __ATOMIC_RELAXED);
	return k != NULL;
}

const struct om_kernels *om_codec_kernels(void)
{
	const struct om_kernels *k = __atomic_load_n(&used, __ATOMIC_RELAXED);

	if (!k) {
		k = kernels_of(OM_PATH_AUTO);
		__atomic_store_n(&used, k, __ATOMIC_RELAXED);
	}
	return k;
}
