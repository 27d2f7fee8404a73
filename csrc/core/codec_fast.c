/*
 * codec_fast: a part under FAST: the sections of codec_planes with codes of 3 bits, each block with its own base.
 * Every section's place follows from the part's size, so one pass makes it.
 */
#include "core/om_codec.h"

#define CODE_BITS 3

size_t om_fast_encode(enum om_kind kind, const uint8_t *src, size_t nbytes, uint8_t *ret,
                      size_t room)
{
	struct om_layout l;
	struct om_planes p;
	size_t fixed;

	om_layout_init(&l, kind, CODE_BITS, nbytes);
	fixed = om_up(l.heads, 64) + l.planes + l.codes;
	if (fixed > room)
		return 0;
	for (size_t i = l.heads; i < om_up(l.heads, 64); i++)
		ret[i] = 0;
	p.heads = ret;
	p.planes = ret + om_up(l.heads, 64);
	p.codes = p.planes + l.planes;
	p.patches = p.codes + l.codes;
	p.patch_bytes = room - fixed;
	return om_planes_split(&l, src, -1, &p) ? fixed + p.patch_bytes : 0;
}

bool om_fast_decode(enum om_kind kind, const uint8_t *src, size_t bytes, uint8_t *ret,
                    size_t nbytes, bool stream)
{
	struct om_layout l;
	struct om_planes p;
	size_t fixed;

	om_layout_init(&l, kind, CODE_BITS, nbytes);
	fixed = om_up(l.heads, 64) + l.planes + l.codes;
	if (fixed > bytes)
		return false;
	p.heads = (uint8_t *)src;
	p.planes = p.heads + om_up(l.heads, 64);
	p.codes = p.planes + l.planes;
	p.patches = p.codes + l.codes;
	p.patch_bytes = bytes - fixed;
	return om_planes_merge(&l, &p, ret, stream);
}
