/*
 * py_window: _core.Window, a typed view on part of a lease's bytes.
 *
 * A window is a view: it holds a view reference on the lease and stays valid after its release.
 * Each buffer and DLPack export made from it holds one of its own. The buffer protocol shows the
 * element type where PEP 3118 has one, else the bytes (1-D uint8).
 */
#include "bind/py_bind.h"

#include <stdlib.h>

PyTypeObject *py_window_type;

struct py_window {
	PyObject_HEAD struct om_lease *l; /* view reference */
	uint64_t offset, nbytes;
	struct om_dl_type type;
	int ndim;
	bool contiguous;
	int64_t shape[OM_MAX_NDIM], strides[OM_MAX_NDIM]; /* strides in elements */
};

/* Bytes from the first to the last element that strides reach; false on overflow. */
static bool strided_extent(struct om_dl_type type, int ndim, const int64_t *shape,
                           const int64_t *strides, uint64_t *ret)
{
	uint64_t last = 0, part;

	for (int i = 0; i < ndim; i++)
		if (shape[i] == 0) {
			*ret = 0;
			return true;
		}
	for (int i = 0; i < ndim; i++)
		if (om_mul_overflows((uint64_t)shape[i] - 1, (uint64_t)strides[i], &part) ||
		    om_add_overflows(last, part, &last))
			return false;
	return !om_add_overflows(last, 1, &last) &&
	       !om_mul_overflows(last, py_dtype_size(type), ret);
}

int py_window_check(uint64_t block_nbytes, uint64_t offset, struct om_dl_type type, int ndim,
                    const int64_t *shape, const int64_t *strides, uint64_t *ret_nbytes)
{
	uint64_t extent, end;

	if (!py_dtype_nbytes(type, ndim, shape, ret_nbytes)) {
		PyErr_SetString(PyExc_ValueError,
		                "window: a dimension is negative, or the size overflows 64 bits");
		return -1;
	}
	extent = *ret_nbytes;
	for (int i = 0; strides && i < ndim; i++)
		if (strides[i] < 0) {
			PyErr_SetString(PyExc_ValueError, "window: strides must not be negative");
			return -1;
		}
	if (strides && !py_dims_contiguous(ndim, shape, strides)) {
		if (!py_dtype_size(type)) {
			PyErr_SetString(PyExc_ValueError,
			                "window: elements below a byte must be contiguous");
			return -1;
		}
		if (!strided_extent(type, ndim, shape, strides, &extent))
			extent = UINT64_MAX;
	}
	if (!om_add_overflows(offset, extent, &end) && end <= block_nbytes)
		return 0;
	PyErr_Format(
		PyExc_ValueError,
		"window: %llu bytes from offset %llu on do not lie within the block's %llu bytes",
		(unsigned long long)extent, (unsigned long long)offset,
		(unsigned long long)block_nbytes);
	return -1;
}

static int read_window(struct py_window *w, uint64_t block_nbytes, PyObject *const *a)
{
	const char *dtype = py_text(a[1], "dtype");
	bool strided = a[3] && a[3] != Py_None;
	int n;

	if (!dtype || py_dtype_parse(dtype, &w->type) || py_size(a[0], "offset", &w->offset) ||
	    py_dims(a[2], "shape", w->shape, &w->ndim))
		return -1;
	if (strided) {
		if (py_dims(a[3], "strides", w->strides, &n))
			return -1;
		if (n != w->ndim) {
			PyErr_Format(PyExc_ValueError, "window: %d strides for %d dimensions", n,
			             w->ndim);
			return -1;
		}
	}
	if (py_window_check(block_nbytes, w->offset, w->type, w->ndim, w->shape,
	                    strided ? w->strides : NULL, &w->nbytes))
		return -1;
	if (!strided)
		py_dims_strides(w->ndim, w->shape, w->strides);
	w->contiguous = py_dims_contiguous(w->ndim, w->shape, w->strides);
	return 0;
}

PyObject *py_window_new(struct om_lease *l, PyObject *const *args, Py_ssize_t nargs,
                        PyObject *kwnames)
{
	static const char *const names[] = { "offset", "dtype", "shape", "strides", NULL };
	PyObject *a[4] = { NULL };
	struct py_window *w;

	if (py_args("window", args, nargs, kwnames, names, 3, 4, a))
		return NULL;
	w = PyObject_New(struct py_window, py_window_type);
	if (!w)
		return NULL;
	w->l = NULL;
	if (read_window(w, om_lease_nbytes(l), a)) {
		Py_DECREF(w);
		return NULL;
	}
	om_lease_view_ref(l);
	w->l = l;
	return (PyObject *)w;
}

static void window_dealloc(PyObject *self)
{
	struct py_window *w = (struct py_window *)self;
	PyTypeObject *type = Py_TYPE(self);

	if (w->l)
		om_lease_view_unref(w->l);
	PyObject_Free(self);
	Py_DECREF(type);
	py_collect();
}

static PyObject *window_dlpack(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                               PyObject *kwnames)
{
	struct py_window *w = (struct py_window *)self;
	struct py_view v = { .lease = w->l,
		             .data = (char *)om_lease_data(w->l) + w->offset,
		             .type = w->type,
		             .ndim = w->ndim,
		             .shape = w->shape,
		             .strides = w->contiguous ? NULL : w->strides,
		             .writable = om_lease_writable(w->l) };

	return py_export_args(&v, args, nargs, kwnames);
}

/* ---- buffer protocol ---- */

/* What a Py_buffer of a window points into. */
struct window_buffer {
	struct om_lease *lease;
	Py_ssize_t shape[OM_MAX_NDIM], strides[OM_MAX_NDIM];
};

static bool fortran(const struct py_window *w)
{
	int64_t stride = 1;

	for (int i = 0; i < w->ndim; stride *= w->shape[i++])
		if (w->shape[i] == 0)
			return true;
		else if (w->shape[i] > 1 && w->strides[i] != stride)
			return false;
	return true;
}

static const char *refusal(const struct py_window *w, const char *format, int flags)
{
	if ((flags & PyBUF_WRITABLE) && !om_lease_writable(w->l))
		return "the lease is for reading: take it with write=True";
	if (w->contiguous && !(flags & PyBUF_F_CONTIGUOUS & ~PyBUF_STRIDES))
		return NULL;
	if ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS)
		return format && fortran(w) ? NULL : "the window is not Fortran-contiguous";
	if (w->contiguous)
		return NULL;
	if (!format)
		return "the window is strided and its element type has no buffer format";
	if ((flags & PyBUF_ANY_CONTIGUOUS) == PyBUF_ANY_CONTIGUOUS && fortran(w))
		return NULL;
	if ((flags & PyBUF_STRIDES) != PyBUF_STRIDES ||
	    (flags & PyBUF_C_CONTIGUOUS) == PyBUF_C_CONTIGUOUS ||
	    (flags & PyBUF_ANY_CONTIGUOUS) == PyBUF_ANY_CONTIGUOUS)
		return "the window is not contiguous";
	return NULL;
}

static void fill_buffer(const struct py_window *w, struct window_buffer *b, const char *format,
                        Py_buffer *view, int flags)
{
	Py_ssize_t itemsize = format ? (Py_ssize_t)py_dtype_size(w->type) : 1;

	view->ndim = format ? w->ndim : 1;
	for (int i = 0; i < view->ndim; i++) {
		b->shape[i] = format ? (Py_ssize_t)w->shape[i] : (Py_ssize_t)w->nbytes;
		b->strides[i] = (format ? (Py_ssize_t)w->strides[i] : 1) * itemsize;
	}
	view->buf = (char *)om_lease_data(w->l) + w->offset;
	view->len = (Py_ssize_t)w->nbytes;
	view->readonly = !om_lease_writable(w->l);
	view->itemsize = itemsize;
	view->format = NULL;
	if (flags & PyBUF_FORMAT)
		view->format = (char *)(format ? format : "B");
	view->shape = (flags & PyBUF_ND) ? b->shape : NULL;
	view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? b->strides : NULL;
	view->suboffsets = NULL;
}

static int window_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
	struct py_window *w = (struct py_window *)self;
	const char *format = py_dtype_format(w->type), *why = refusal(w, format, flags);
	struct window_buffer *b;

	view->obj = NULL;
	if (why) {
		PyErr_SetString(PyExc_BufferError, why);
		return -1;
	}
	b = malloc(sizeof(*b));
	if (!b) {
		PyErr_NoMemory();
		return -1;
	}
	fill_buffer(w, b, format, view, flags);
	om_lease_view_ref(w->l);
	b->lease = w->l;
	view->internal = b;
	view->obj = Py_NewRef(self);
	return 0;
}

static void window_releasebuffer(PyObject *Py_UNUSED(self), Py_buffer *view)
{
	struct window_buffer *b = view->internal;

	om_lease_view_unref(b->lease);
	free(b);
	py_collect();
}

/* ---- attributes ---- */

static PyObject *get_name(PyObject *self, void *Py_UNUSED(unused))
{
	return PyUnicode_FromString(om_lease_name(((struct py_window *)self)->l));
}

static PyObject *get_offset(PyObject *self, void *Py_UNUSED(unused))
{
	return PyLong_FromUnsignedLongLong(((struct py_window *)self)->offset);
}

static PyObject *get_nbytes(PyObject *self, void *Py_UNUSED(unused))
{
	return PyLong_FromUnsignedLongLong(((struct py_window *)self)->nbytes);
}

static PyObject *get_dtype(PyObject *self, void *Py_UNUSED(unused))
{
	return py_dtype_name(((struct py_window *)self)->type);
}

static PyObject *get_shape(PyObject *self, void *Py_UNUSED(unused))
{
	struct py_window *w = (struct py_window *)self;

	return py_dims_tuple(w->shape, w->ndim);
}

static PyObject *get_strides(PyObject *self, void *Py_UNUSED(unused))
{
	struct py_window *w = (struct py_window *)self;

	return py_dims_tuple(w->strides, w->ndim);
}

static PyObject *window_repr(PyObject *self)
{
	struct py_window *w = (struct py_window *)self;
	PyObject *dtype = py_dtype_name(w->type), *shape = py_dims_tuple(w->shape, w->ndim);
	PyObject *text = NULL;

	if (dtype && shape)
		text = PyUnicode_FromFormat("<omnimem window %U%R at %llu of '%s'>", dtype, shape,
		                            (unsigned long long)w->offset, om_lease_name(w->l));
	Py_XDECREF(dtype);
	Py_XDECREF(shape);
	return text;
}

PyDoc_STRVAR(dlpack_doc,
             "__dlpack__($self, /, *, stream=None, max_version=None, "
             "dl_device=None, copy=None)\n--\n\nA DLPack capsule that keeps the bytes.");

static PyMethodDef window_methods[] = {
	{ "__dlpack__", PY_FAST(window_dlpack), PY_FAST_FLAGS, dlpack_doc },
	{ "__dlpack_device__", py_export_device, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef window_getset[] = {
	{ "name", get_name, NULL, "The block's name.", NULL },
	{ "offset", get_offset, NULL, "Bytes from the block's start.", NULL },
	{ "nbytes", get_nbytes, NULL, "Bytes of the elements.", NULL },
	{ "dtype", get_dtype, NULL, "Element type.", NULL },
	{ "shape", get_shape, NULL, "Elements along each dimension.", NULL },
	{ "strides", get_strides, NULL, "Steps along each dimension, in elements.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot window_slots[] = {
	{ Py_tp_doc, "A typed view on part of a block, with the buffer protocol and DLPack." },
	{ Py_tp_dealloc, window_dealloc },
	{ Py_tp_repr, window_repr },
	{ Py_tp_methods, window_methods },
	{ Py_tp_getset, window_getset },
	{ Py_bf_getbuffer, window_getbuffer },
	{ Py_bf_releasebuffer, window_releasebuffer },
	{ 0, NULL },
};

PyType_Spec py_window_spec = {
	.name = "omnimem._core.Window",
	.basicsize = sizeof(struct py_window),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = window_slots,
};
