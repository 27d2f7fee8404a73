/*
 * om_strided: strided arrays copied to contiguous memory.
 *
 * What lies together is copied as one piece, and dimensions that follow each other without a gap count as
 * one. Where the source lies together along another dimension than the last, both are walked in tiles that
 * stay in the cache. Passive: no state, no lock; the caller has checked shape and strides.
 */
#include <string.h>

#include "omnimem.h"

#define TILE       32
#define TILE_BYTES 64 /* pieces of a cache line gain nothing from tiles */

/* Copies `n` pieces, `step` bytes apart, one behind the other. */
typedef void copy_row(char *dst, const char *src, int64_t n, int64_t step, uint64_t piece);

#define COPY_ROW(name, bytes)                                                                 \
	static void name(char *dst, const char *src, int64_t n, int64_t step, uint64_t piece) \
	{                                                                                     \
		(void)piece;                                                                  \
		for (int64_t i = 0; i < n; i++, dst += (bytes), src += step)                  \
			memcpy(dst, src, (bytes));                                            \
	}
COPY_ROW(copy_1, 1)
COPY_ROW(copy_2, 2)
COPY_ROW(copy_4, 4)
COPY_ROW(copy_8, 8)
COPY_ROW(copy_16, 16)
COPY_ROW(copy_any, piece)

static copy_row *row_of(uint64_t piece)
{
	switch (piece) {
	case 1:
		return copy_1;
	case 2:
		return copy_2;
	case 4:
		return copy_4;
	case 8:
		return copy_8;
	case 16:
		return copy_16;
	default:
		return copy_any;
	}
}

struct dim {
	int64_t count, from, to; /* steps in the source and in the copy, in bytes */
};

struct walk {
	struct dim dims[OM_MAX_NDIM]; /* the last one is the last of the copy */
	int ndim;
	uint64_t piece; /* bytes that lie together in both */
	copy_row *row;
};

/* Dimensions of more than one element, those without a gap between them as one. */
static void plan(struct walk *w, int ndim, const int64_t *shape, const int64_t *strides,
                 uint64_t itemsize)
{
	int64_t to = (int64_t)itemsize;
	struct dim dims[OM_MAX_NDIM];
	int n = 0; /* from the last dimension on */

	for (int i = ndim; i-- > 0; to *= shape[i]) {
		if (shape[i] == 1)
			continue;
		if (n && strides[i] == dims[n - 1].from * dims[n - 1].count)
			dims[n - 1].count *= shape[i];
		else
			dims[n++] = (struct dim){ shape[i], strides[i], to };
	}
	w->piece = itemsize;
	w->ndim = n;
	if (n && dims[0].from == (int64_t)itemsize) {
		w->piece *= (uint64_t)dims[0].count;
		w->ndim--;
	}
	for (int i = 0; i < w->ndim; i++)
		w->dims[i] = dims[n - 1 - i];
	w->row = row_of(w->piece);
}

static uint64_t distance(const struct dim *d)
{
	uint64_t step = d->from < 0 ? 0 - (uint64_t)d->from : (uint64_t)d->from;

	return step ? step : UINT64_MAX; /* repeated: any order will do */
}

/* Put the dimension along which the source lies closest right before the last; false: it is the last. */
static bool choose_tiles(struct walk *w)
{
	int best = w->ndim - 1;
	struct dim chosen;

	for (int i = 0; i < w->ndim - 1; i++)
		if (distance(&w->dims[i]) < distance(&w->dims[best]))
			best = i;
	if (best == w->ndim - 1 || w->piece >= TILE_BYTES)
		return false;
	chosen = w->dims[best];
	memmove(&w->dims[best], &w->dims[best + 1], sizeof(chosen) * (size_t)(w->ndim - 2 - best));
	w->dims[w->ndim - 2] = chosen;
	return true;
}

static void copy_tiles(const struct walk *w, char *dst, const char *src)
{
	const struct dim *a = &w->dims[w->ndim - 2], *b = a + 1;

	for (int64_t i = 0; i < a->count; i += TILE)
		for (int64_t k = 0; k < b->count; k += TILE) {
			int64_t rows = OM_MIN(a->count - i, TILE), n = OM_MIN(b->count - k, TILE);

			for (int64_t r = i; r < i + rows; r++)
				w->row(dst + r * a->to + k * b->to, src + r * a->from + k * b->from,
				       n, b->from, w->piece);
		}
}

static void copy_dims(const struct walk *w, int at, bool tiles, char *dst, const char *src)
{
	const struct dim *d = &w->dims[at];

	if (tiles && at == w->ndim - 2) {
		copy_tiles(w, dst, src);
		return;
	}
	if (at == w->ndim - 1) {
		w->row(dst, src, d->count, d->from, w->piece);
		return;
	}
	for (int64_t i = 0; i < d->count; i++)
		copy_dims(w, at + 1, tiles, dst + i * d->to, src + i * d->from);
}

void om_array_copy(const struct om_array *a, void *ret)
{
	struct walk w;
	bool tiles;

	for (int i = 0; i < a->ndim; i++)
		if (a->shape[i] == 0)
			return;
	if (!a->itemsize)
		return;
	plan(&w, a->ndim, a->shape, a->strides, a->itemsize);
	tiles = choose_tiles(&w);
	if (w.ndim)
		copy_dims(&w, 0, tiles, ret, a->data);
	else
		memcpy(ret, a->data, w.piece);
}
