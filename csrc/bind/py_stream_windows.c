/*
 * py_stream_windows: windows on the bytes of a stream's units.
 *
 * What a unit's windows look like is checked once, and kept in its record (py_stream.h). windows() is
 * the hot path of a layer: one capsule a window, no Python but the list. All under the GIL.
 */
#include "bind/py_stream.h"

#include <stdlib.h>

void py_unit_clear_windows(struct py_unit *u)
{
	free(u->window);
	free(u->shapes);
	u->window = NULL;
	u->shapes = NULL;
	u->windows = 0;
}

static int read_one_window(const struct py_unit *u, PyObject *o, struct py_unit_window *w)
{
	uint64_t block, nbytes;
	const char *dtype;
	int strides;

	if (!PyTuple_Check(o) || (PyTuple_Size(o) != 4 && PyTuple_Size(o) != 5)) {
		PyErr_SetString(PyExc_TypeError, "a window is a tuple (block index, offset, dtype, "
		                                 "shape), or one with strides");
		return -1;
	}
	dtype = py_text(PyTuple_GetItem(o, 2), "dtype");
	if (!dtype || py_dtype_parse(dtype, &w->type) ||
	    py_size(PyTuple_GetItem(o, 0), "block index", &block) ||
	    py_size(PyTuple_GetItem(o, 1), "offset", &w->offset) ||
	    py_dims(PyTuple_GetItem(o, 3), "shape", w->shape, &w->ndim))
		return -1;
	if (block >= u->blocks) {
		PyErr_Format(PyExc_ValueError, "block index %llu: the unit has %zu blocks",
		             (unsigned long long)block, u->blocks);
		return -1;
	}
	w->block = (size_t)block;
	w->strides = PyTuple_Size(o) == 5 ? w->shape + OM_MAX_NDIM : NULL;
	if (w->strides && py_dims(PyTuple_GetItem(o, 4), "strides", w->strides, &strides))
		return -1;
	if (w->strides && strides != w->ndim) {
		PyErr_Format(PyExc_ValueError, "window: %d strides for %d dimensions", strides,
		             w->ndim);
		return -1;
	}
	if (py_window_check(u->nbytes[block], w->offset, w->type, w->ndim, w->shape, w->strides,
	                    &nbytes))
		return -1;
	if (w->strides && py_dims_contiguous(w->ndim, w->shape, w->strides))
		w->strides = NULL;
	return 0;
}

PyObject *py_stream_set_windows(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
	static const char *const names[] = { "unit", "windows", NULL };
	struct py_stream *o = (struct py_stream *)self;
	PyObject *a[2] = { NULL }, *tuple;
	struct py_unit fresh = { 0 }, *u;
	size_t unit, n;

	if (py_args("set_windows", args, nargs, kwnames, names, 2, 2, a) ||
	    py_stream_place(o, a[0], &unit))
		return NULL;
	tuple = PySequence_Tuple(a[1]);
	if (!tuple)
		return NULL;
	u = &o->units[unit];
	n = (size_t)PyTuple_Size(tuple);
	fresh.window = calloc(n + 1, sizeof(*fresh.window));
	fresh.shapes = calloc(n + 1, sizeof(int64_t) * 2 * OM_MAX_NDIM);
	if (!fresh.window || !fresh.shapes) {
		PyErr_NoMemory();
		goto fail;
	}
	for (; fresh.windows < n; fresh.windows++) {
		struct py_unit_window *w = &fresh.window[fresh.windows];

		w->shape = fresh.shapes + fresh.windows * 2 * OM_MAX_NDIM;
		if (read_one_window(u, PyTuple_GetItem(tuple, (Py_ssize_t)fresh.windows), w))
			goto fail;
	}
	Py_DECREF(tuple);
	py_unit_clear_windows(u);
	u->window = fresh.window;
	u->shapes = fresh.shapes;
	u->windows = n;
	return Py_NewRef(Py_None);
fail:
	Py_DECREF(tuple);
	py_unit_clear_windows(&fresh);
	return NULL;
}

static PyObject *export_window(struct py_stream *o, size_t unit, const struct py_unit_window *w)
{
	struct py_view v = { .lease = om_stream_lease(o->st, unit, w->block),
		             .type = w->type,
		             .ndim = w->ndim,
		             .shape = w->shape,
		             .strides = w->strides };

	if (!v.lease)
		return py_raise_closed(
			"the unit's bytes are not in memory: load() and enter() come first");
	v.data = (char *)om_lease_data(v.lease) + w->offset;
	v.writable = om_lease_writable(v.lease);
	return py_export(&v, true, false);
}

PyObject *py_stream_windows(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames)
{
	static const char *const names[] = { "unit", "resident", NULL };
	struct py_stream *o = (struct py_stream *)self;
	PyObject *a[2] = { NULL }, *list;
	const struct py_unit *u;
	size_t unit;
	int resident = -1; /* both kinds */

	if (py_args("windows", args, nargs, kwnames, names, 1, 2, a) ||
	    py_stream_place(o, a[0], &unit))
		return NULL;
	if (a[1] && a[1] != Py_None && (resident = PyObject_IsTrue(a[1])) < 0)
		return NULL;
	u = &o->units[unit];
	list = PyList_New(0);
	for (size_t i = 0; list && i < u->windows; i++) {
		const struct py_unit_window *w = &u->window[i];
		PyObject *capsule;

		if (resident >= 0 && (u->keep[w->block] == OM_KEEP_PLAIN) != resident)
			continue;
		capsule = export_window(o, unit, w);
		if (!capsule || PyList_Append(list, capsule))
			Py_CLEAR(list);
		Py_XDECREF(capsule);
	}
	return list;
}
