/* om_strided: random arrays against a walk over every element: permuted, reversed, repeated, with gaps, of all
 * sizes of elements. */
#include <stdlib.h>
#include <string.h>

#include "om_test.h"
#include "omnimem.h"

#define ROOM (1 << 20)

static uint8_t source[ROOM], got[ROOM + 1], want[ROOM];

/* The element at `index`, the slow way. */
static const uint8_t *element(const struct om_array *a, uint64_t index)
{
	const uint8_t *at = a->data;

	for (int i = a->ndim; i-- > 0; index /= (uint64_t)a->shape[i])
		at += (int64_t)(index % (uint64_t)a->shape[i]) * a->strides[i];
	return at;
}

static void check_array(const struct om_array *a, uint64_t count)
{
	uint64_t nbytes = count * a->itemsize;

	for (uint64_t i = 0; i < count; i++)
		memcpy(want + i * a->itemsize, element(a, i), a->itemsize);
	memset(got, 0xee, nbytes + 1);
	om_array_copy(a, got);
	CHECK(memcmp(got, want, nbytes) == 0);
	CHECK_EQ(got[nbytes], 0xee);
}

static void random_array(unsigned long long *seed)
{
	static const uint64_t sizes[] = { 1, 2, 3, 4, 6, 8, 16, 32 };
	struct om_array a = { .ndim = (int)(om_test_random(seed) % 6),
		              .itemsize = sizes[om_test_random(seed) % 8] };
	int64_t shape[OM_MAX_NDIM], strides[OM_MAX_NDIM], first = 0, step = (int64_t)a.itemsize;
	unsigned order[6] = { 0, 1, 2, 3, 4, 5 };
	uint64_t count = 1;

	for (int i = a.ndim; i-- > 1;) { /* in memory they may lie in any order */
		unsigned k = (unsigned)(om_test_random(seed) % (unsigned)(i + 1)), t = order[i];

		order[i] = order[k];
		order[k] = t;
	}
	for (int i = 0; i < a.ndim; i++) {
		unsigned at = order[i];
		bool large = om_test_random(seed) % 8 == 0 && a.ndim < 4;

		shape[at] = (int64_t)(om_test_random(seed) % (large ? 70 : 6));
		strides[at] = om_test_random(seed) % 6 ? step : 0;
		step *= shape[at] > 0 ? shape[at] : 1;
		step += om_test_random(seed) % 3 ? 0 : (int64_t)(om_test_random(seed) % 9);
		if (om_test_random(seed) % 4 == 0) {
			first += strides[at] * (shape[at] > 0 ? shape[at] - 1 : 0);
			strides[at] = -strides[at];
		}
		count *= (uint64_t)shape[at];
	}
	if ((uint64_t)step + a.itemsize > ROOM || count * a.itemsize > ROOM)
		return;
	a.data = source + first;
	a.shape = shape;
	a.strides = strides;
	check_array(&a, count);
}

/* More than one tile each way, and a remainder. */
static void transposed(uint64_t itemsize)
{
	int64_t shape[] = { 101, 75 }, strides[] = { (int64_t)itemsize, 101 * (int64_t)itemsize };
	struct om_array a = { source, 2, shape, strides, itemsize };

	check_array(&a, 101 * 75);
}

int main(void)
{
	unsigned long long seed = 3;

	for (size_t i = 0; i < sizeof(source); i += 8)
		memcpy(source + i, &(uint64_t){ om_test_random(&seed) }, 8);
	for (uint64_t size = 1; size <= 16; size++)
		transposed(size);
	for (int i = 0; i < 20000; i++)
		random_array(&seed);
	return 0;
}
