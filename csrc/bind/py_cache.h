/* py_cache: what py_cache.c and py_rows.c share. */
#ifndef PY_CACHE_H
#define PY_CACHE_H

#include "bind/py_bind.h"

/* Rows that an index stands for, as runs of consecutive ones, in its order. */
struct py_rows {
	struct om_rows *runs;
	size_t count;
	int64_t total;
};
/* `index`: a slice or a sequence of int, as NumPy takes them along the first dimension. */
int py_rows_init(struct py_rows *r, PyObject *index, const struct om_desc *desc);
void py_rows_fini(struct py_rows *r);

#endif
