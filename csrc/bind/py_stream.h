/* py_stream: what py_stream.c and py_stream_windows.c share. */
#ifndef PY_STREAM_H
#define PY_STREAM_H

#include "bind/py_bind.h"

struct py_unit_window {
	size_t block;
	uint64_t offset;
	struct om_dl_type type;
	int ndim;
	int64_t *shape, *strides; /* strides NULL: contiguous */
};

/* What is known of a unit. */
struct py_unit {
	size_t blocks;
	uint8_t *keep;    /* a block: enum om_keep */
	uint64_t *nbytes; /* a block */
	size_t windows;
	struct py_unit_window *window;
	int64_t *shapes; /* and strides, of all windows */
};

struct py_stream {
	PyObject_HEAD struct om_stream *st; /* NULL: closed */
	struct py_core *core;
	size_t count;
	struct py_unit *units;
	unsigned inside; /* threads in a call without the GIL */
};

/* The number of a unit of an open stream, out of an argument. */
int py_stream_place(struct py_stream *o, PyObject *unit, size_t *ret);

/* Methods of Stream, in py_stream_windows.c. */
PyObject *py_stream_set_windows(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_stream_windows(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
/* A unit has no windows any more. */
void py_unit_clear_windows(struct py_unit *u);

#endif
