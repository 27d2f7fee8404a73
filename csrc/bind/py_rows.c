/*
 * py_rows: indices along a first dimension, as runs of consecutive rows. Owns the runs until
 * py_rows_fini. What is no slice or sequence of int is a TypeError, a row outside an IndexError.
 */
#include "bind/py_cache.h"

#include <stdlib.h>

static int begin(struct py_rows *r, Py_ssize_t most)
{
	r->runs = calloc(most > 0 ? (size_t)most : 1, sizeof(*r->runs));
	r->count = 0;
	r->total = 0;
	if (r->runs)
		return 0;
	PyErr_NoMemory();
	return -1;
}

static void add(struct py_rows *r, uint64_t row)
{
	struct om_rows *last = r->count ? &r->runs[r->count - 1] : NULL;

	r->total++;
	if (last && last->first + last->count == row)
		last->count++;
	else
		r->runs[r->count++] = (struct om_rows){ row, 1 };
}

static int read_slice(struct py_rows *r, PyObject *index, Py_ssize_t rows)
{
	Py_ssize_t start, stop, step, n;

	if (PySlice_Unpack(index, &start, &stop, &step))
		return -1;
	n = PySlice_AdjustIndices(rows, &start, &stop, step);
	if (begin(r, step == 1 ? 1 : n))
		return -1;
	if (step == 1 && n > 0)
		r->runs[r->count++] = (struct om_rows){ (uint64_t)start, (uint64_t)n };
	for (Py_ssize_t i = 0; step != 1 && i < n; i++)
		add(r, (uint64_t)(start + i * step));
	r->total = n;
	return 0;
}

static int read_row(PyObject *item, Py_ssize_t rows, Py_ssize_t *ret)
{
	PyObject *number = PyBool_Check(item) ? NULL : PyNumber_Index(item);

	if (!number) {
		PyErr_Clear();
		PyErr_Format(PyExc_TypeError, "index: a row must be an int, not %R", item);
		return -1;
	}
	*ret = PyNumber_AsSsize_t(number, PyExc_IndexError);
	Py_DECREF(number);
	if (*ret == -1 && PyErr_Occurred())
		return -1;
	if (*ret < -rows || *ret >= rows) {
		PyErr_Format(PyExc_IndexError, "index: row %zd lies outside the %zd there are",
		             *ret, rows);
		return -1;
	}
	*ret += *ret < 0 ? rows : 0;
	return 0;
}

static int read_list(struct py_rows *r, PyObject *index, Py_ssize_t rows)
{
	PyObject *list = PySequence_List(index);
	Py_ssize_t n, row;
	int failed;

	if (!list) {
		PyErr_Clear();
		PyErr_Format(PyExc_TypeError, "index must be a slice or a sequence of int, not %R",
		             Py_TYPE(index));
		return -1;
	}
	n = PyList_Size(list);
	failed = begin(r, n);
	for (Py_ssize_t i = 0; i < n && !failed; i++) {
		failed = read_row(PyList_GetItem(list, i), rows, &row);
		if (!failed)
			add(r, (uint64_t)row);
	}
	Py_DECREF(list);
	return failed;
}

int py_rows_init(struct py_rows *r, PyObject *index, const struct om_desc *desc)
{
	int failed;

	r->runs = NULL;
	if (desc->ndim < 1) {
		PyErr_SetString(PyExc_ValueError,
		                "index: an entry without a dimension has no rows");
		return -1;
	}
	if (PySlice_Check(index))
		failed = read_slice(r, index, (Py_ssize_t)desc->shape[0]);
	else
		failed = read_list(r, index, (Py_ssize_t)desc->shape[0]);
	if (failed)
		py_rows_fini(r);
	return failed;
}

void py_rows_fini(struct py_rows *r)
{
	free(r->runs);
	r->runs = NULL;
}
