/*
 * om_codec: the parts of the codec that know each other. omnimem.h has its functions for callers.
 *
 * om_codec.c     the container: header and table of parts
 * codec_sample.c what a sample says a part's bytes are
 * codec_planes.c a part to planes and back: exponents as codes of 3 or 4 bits from a base, a list of
 *                patches for those further away, everything else as it is
 * codec_fast.c   a FAST part: planes with codes of 3 bits
 * codec_dense.c  a BALANCED part: planes with codes of 4 bits, which zstd's Huffman stage codes
 * codec_plain.c, codec_avx2.c, codec_avx512.c: the inner loops
 *
 * Everything here is a function of its arguments; no locks. What is made is the same by any path.
 */
#ifndef OM_CODEC_H
#define OM_CODEC_H

#include "omnimem.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "elements are read as they lie in memory");

/* What a part's bytes are taken for. Written to files: append only. */
enum om_kind {
	OM_KIND_RAW,   /* stored as they are */
	OM_KIND_SAME,  /* the first 8 bytes, again and again */
	OM_KIND_BYTES, /* no elements: BALANCED codes the bytes as they are */
	OM_KIND_BF16,
	OM_KIND_FP16,
	OM_KIND_FP32,
	OM_KIND_WIDE, /* fp32 whose low halves are all 0: born as bf16 */
	OM_KIND_E4M3,
	OM_KIND_E5M2,
	OM_KIND_COUNT
};

/* How an element is cut: its sign goes to the lowest bit, then exponent, rest bits, whole bytes. */
struct om_cut {
	uint8_t element_bytes;
	uint8_t planes;    /* whole bytes that are stored as they are, a plane each */
	uint8_t rest_bits; /* stored as they are: 0, 3 or 4 */
};
extern const struct om_cut om_cuts[OM_KIND_COUNT]; /* element_bytes 0: has no exponents */

#define OM_CODEC_BLOCK 4096 /* elements that are in the L1 cache at a time */
#define OM_CODEC_GROUP 512  /* kernels take a multiple of this; the last block is filled up */

/* ---- kernels: `n` is a multiple of OM_CODEC_GROUP, at most OM_CODEC_BLOCK ---- */

/*
 * Codes lie across a group: of 3 bits, bytes 0..63 and 64..127 have two bits of elements 64 s + j for s of
 * 0..3 and 4..7, bytes 128..191 the third, all in byte j. Of 4 bits, byte j of 64 has those of j and 64 + j.
 * So a wide register shifts and masks, and no lane needs another's bits.
 */
struct om_kernels {
	const char *name;
	/* Elements to exponents, rest bits and planes (plane p from planes + p * n on), and back. */
	void (*split)(enum om_kind kind, const uint8_t *src, size_t n, uint8_t *exponents,
	              uint8_t *rest, uint8_t *planes);
	/* `stream`: past the caches; ret is then aligned to 64. */
	void (*merge)(enum om_kind kind, const uint8_t *exponents, const uint8_t *rest,
	              const uint8_t *planes, size_t n, uint8_t *ret, bool stream);
	/* n bytes less `base` to codes. Bit i of `escapes` (n bits): byte i has no code. */
	void (*pack3)(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret, uint64_t *escapes);
	void (*pack4)(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret, uint64_t *escapes);
	void (*unpack3)(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret);
	void (*unpack4)(const uint8_t *src, uint8_t base, size_t n, uint8_t *ret);
};
extern const struct om_kernels om_kernels_plain;
extern const struct om_kernels *const om_kernels_avx2;   /* NULL where the compiler has none */
extern const struct om_kernels *const om_kernels_avx512; /* with VBMI2 */

/* What om_codec_use said, or the widest that there is. */
const struct om_kernels *om_codec_kernels(void);

/* ---- planes ---- */

/* Where a part's sections lie, in order: heads, planes and rest bits of each block, codes, patches. */
struct om_layout {
	enum om_kind kind;
	unsigned code_bits;
	size_t nbytes;               /* plain */
	size_t count, blocks;        /* elements, the last one perhaps filled up with 0 */
	size_t last;                 /* elements of the last block, filled up */
	size_t heads, planes, codes; /* bytes of these sections */
};
void om_layout_init(struct om_layout *l, enum om_kind kind, unsigned code_bits, size_t nbytes);

/* The sections, wherever they are. */
struct om_planes {
	uint8_t *heads, *planes, *codes, *patches;
	size_t patch_bytes; /* room for them, or how many there are */
};
/* `base` of all blocks, or negative: each chooses its own. False: not enough room for the patches. */
bool om_planes_split(const struct om_layout *l, const uint8_t *src, int base, struct om_planes *p);
/* False: they were not made by om_planes_split. */
bool om_planes_merge(const struct om_layout *l, const struct om_planes *p, uint8_t *ret,
                     bool stream);

/* The first of 2^bits neighbours that have most of `counts`; *ret_inside: how much that is. */
uint8_t om_planes_base(const uint16_t counts[256], unsigned bits, unsigned *ret_inside);

/* ---- a part ---- */

#define OM_CODEC_WORTH 0.95 /* the share that may be left of what is worth coding */

struct om_choice {
	enum om_kind kind;
	uint8_t base; /* for the codes of all blocks */
	double share; /* that a part is likely to shrink to */
};
/* What a part is taken for: one of the kinds of `desc` where that is worth it, else the one that leaves least. */
struct om_choice om_codec_choose(const uint8_t *data, size_t nbytes, const struct om_desc *desc,
                                 enum om_coding coding);

/* Encode into at most `room` bytes; 0: does not fit. */
size_t om_fast_encode(enum om_kind kind, const uint8_t *src, size_t nbytes, uint8_t *ret,
                      size_t room);
/* False: not made by om_fast_encode. */
bool om_fast_decode(enum om_kind kind, const uint8_t *src, size_t bytes, uint8_t *ret,
                    size_t nbytes, bool stream);

struct om_dense; /* scratch and zstd's context: of one thread, for one direction */
struct om_dense *om_dense_create(bool encode); /* NULL: -ENOMEM is set */
void om_dense_free(struct om_dense *d);
/* As above. `base`: of all codes. */
size_t om_dense_encode(struct om_dense *d, enum om_kind kind, uint8_t base, const uint8_t *src,
                       size_t nbytes, uint8_t *ret, size_t room);
bool om_dense_decode(struct om_dense *d, enum om_kind kind, const uint8_t *src, size_t bytes,
                     uint8_t *ret, size_t nbytes, bool stream);

#endif
