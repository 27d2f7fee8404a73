/*
 * py_export: DLPack capsules of leases and windows.
 *
 * An export is one malloc'ed struct: the managed tensor, its shape and strides, and a view
 * reference on the lease (or, with copy=True, bytes of its own). Its deleter may run on any thread,
 * without the GIL and after the interpreter: it only lets the reference go and frees. Refusals of a
 * value are BufferError, never TypeError: torch would retry a TypeError with weaker arguments.
 */
#include "bind/py_bind.h"

#include <stdlib.h>
#include <string.h>

#define COPY_ALIGN 64
#define COPY_ALONE (UINT64_C(1) << 20) /* larger copies let other Python threads run */

struct export
{
	union {
		struct om_dl_managed legacy;
		struct om_dl_managed_versioned versioned;
	} managed;
	struct om_lease *lease; /* view reference; or `chunk` has one, or `copy` is ours */
	struct om_chunk *chunk;
	void *copy;
	int64_t dims[]; /* shape, then strides */
};

static void drop(struct export *e)
{
	if (e->lease)
		om_lease_view_unref(e->lease);
	if (e->chunk)
		om_chunk_view_unref(e->chunk);
	free(e->copy);
	free(e);
}

static void delete_legacy(struct om_dl_managed *m)
{
	drop(m->manager_ctx);
}

static void delete_versioned(struct om_dl_managed_versioned *m)
{
	drop(m->manager_ctx);
}

/* Nobody took the capsule: it still has its first name. */
static void free_capsule(PyObject *capsule)
{
	if (PyCapsule_IsValid(capsule, OM_DL_VERSIONED))
		delete_versioned(PyCapsule_GetPointer(capsule, OM_DL_VERSIONED));
	else if (PyCapsule_IsValid(capsule, OM_DL_NAME))
		delete_legacy(PyCapsule_GetPointer(capsule, OM_DL_NAME));
	py_collect();
}

/* Bytes of the view, contiguous, in fresh memory. */
static void *copy_view(const struct py_view *v, uint64_t nbytes)
{
	int64_t strides[OM_MAX_NDIM];
	struct om_array array = { v->data, v->ndim, v->shape, strides, py_dtype_size(v->type) };
	void *copy = NULL;

	if (posix_memalign(&copy, COPY_ALIGN, nbytes ? nbytes : 1)) {
		PyErr_Format(PyExc_MemoryError, "no memory for a copy of %llu bytes of block '%s'",
		             (unsigned long long)nbytes,
		             v->lease ? om_lease_name(v->lease) : "of a pool");
		return NULL;
	}
	for (int i = 0; v->strides && i < v->ndim; i++)
		strides[i] = v->strides[i] * (int64_t)array.itemsize;
	PyThreadState *state = nbytes >= COPY_ALONE ? PyEval_SaveThread() : NULL;
	if (v->strides)
		om_array_copy(&array, copy);
	else
		memcpy(copy, v->data, nbytes);
	if (state)
		PyEval_RestoreThread(state);
	return copy;
}

static void fill_tensor(struct om_dl_tensor *t, struct export *e, const struct py_view *v,
                        bool empty)
{
	int64_t *strides = e->dims + v->ndim;

	t->data = empty ? NULL : e->copy ? e->copy : v->data;
	t->device = (struct om_dl_device){ OM_DL_CPU, 0 };
	t->ndim = v->ndim;
	t->dtype = v->type;
	t->shape = e->dims;
	t->strides = strides;
	t->byte_offset = 0;
	for (int i = 0; i < v->ndim; i++)
		e->dims[i] = v->shape[i];
	if (v->strides && !e->copy)
		memcpy(strides, v->strides, sizeof(*strides) * (size_t)v->ndim);
	else
		py_dims_strides(v->ndim, v->shape, strides);
}

static PyObject *wrap(struct export *e, const struct py_view *v, bool versioned, bool empty)
{
	PyObject *capsule;

	if (versioned) {
		struct om_dl_managed_versioned *m = &e->managed.versioned;

		m->version = (struct om_dl_version){ OM_DL_MAJOR, OM_DL_MINOR };
		m->manager_ctx = e;
		m->deleter = delete_versioned;
		m->flags = (e->copy ? OM_DL_IS_COPIED : v->writable ? 0 : OM_DL_READ_ONLY);
		fill_tensor(&m->tensor, e, v, empty);
		capsule = PyCapsule_New(m, OM_DL_VERSIONED, free_capsule);
	} else {
		struct om_dl_managed *m = &e->managed.legacy;

		m->manager_ctx = e;
		m->deleter = delete_legacy;
		fill_tensor(&m->tensor, e, v, empty);
		capsule = PyCapsule_New(m, OM_DL_NAME, free_capsule);
	}
	if (!capsule)
		drop(e);
	return capsule;
}

PyObject *py_export(const struct py_view *v, bool versioned, bool copy)
{
	size_t dims = sizeof(int64_t) * 2 * (size_t)v->ndim;
	struct export *e = malloc(sizeof(*e) + dims);
	uint64_t nbytes;

	if (!e)
		return PyErr_NoMemory();
	e->lease = NULL;
	e->chunk = NULL;
	e->copy = NULL;
	if (!py_dtype_nbytes(v->type, v->ndim, v->shape, &nbytes)) {
		free(e);
		PyErr_SetString(PyExc_BufferError, "the view's size overflows");
		return NULL;
	}
	if (copy) {
		e->copy = copy_view(v, nbytes);
		if (!e->copy) {
			free(e);
			return NULL;
		}
	} else if (v->chunk) {
		int code = om_chunk_view_ref(v->chunk);

		if (code) {
			free(e);
			return py_raise(code);
		}
		e->chunk = v->chunk;
	} else {
		e->lease = v->lease;
		om_lease_view_ref(v->lease);
	}
	return wrap(e, v, versioned, nbytes == 0);
}

/* An exception of the caller's own objects passes, but for those that say that a value is none. */
static PyObject *refuse(const char *text, PyObject *value)
{
	if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError) &&
	    !PyErr_ExceptionMatches(PyExc_OverflowError))
		return NULL;
	PyErr_Clear();
	PyErr_Format(PyExc_BufferError, text, value);
	return NULL;
}

/* Reads a pair of int; false when it is none. */
static bool read_pair(PyObject *o, long *first, long *second)
{
	PyObject *a, *b;

	if (!PyTuple_Check(o) || PyTuple_Size(o) < 2)
		return false;
	a = PyNumber_Index(PyTuple_GetItem(o, 0));
	b = a ? PyNumber_Index(PyTuple_GetItem(o, 1)) : NULL;
	*first = a ? PyLong_AsLong(a) : 0;
	*second = b ? PyLong_AsLong(b) : 0;
	Py_XDECREF(a);
	Py_XDECREF(b);
	return !PyErr_Occurred();
}

PyObject *py_export_args(const struct py_view *v, PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames)
{
	static const char *const names[] = { "stream", "max_version", "dl_device", "copy", NULL };
	PyObject *a[4] = { NULL };
	long major = 0, minor, type, id;
	int copy = 0;

	if (py_args("__dlpack__", args, nargs, kwnames, names, 0, 0, a))
		return NULL;
	if (a[0] && a[0] != Py_None)
		return refuse("stream=%R: memory of the CPU takes no stream but None", a[0]);
	if (a[1] && a[1] != Py_None && !read_pair(a[1], &major, &minor))
		return refuse("max_version=%R must be None or a pair of int", a[1]);
	if (a[2] && a[2] != Py_None &&
	    (!read_pair(a[2], &type, &id) || type != OM_DL_CPU || id != 0))
		return refuse("dl_device=%R: the bytes are on the CPU, (1, 0)", a[2]);
	if (a[3] && a[3] != Py_None) {
		copy = PyObject_IsTrue(a[3]);
		if (copy < 0)
			return refuse("copy=%R must be None or a bool", a[3]);
	}
	return py_export(v, major >= 1, copy > 0);
}

PyObject *py_export_device(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused))
{
	return Py_BuildValue("(ii)", OM_DL_CPU, 0);
}
