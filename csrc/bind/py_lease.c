/*
 * py_lease: _core.Lease, the right to a block's bytes.
 *
 * Owns one lease of the core until release(). Each buffer and each DLPack export holds a view
 * reference of its own, so that it outlives the release, the block's name and the store; the
 * object refers to no other Python object, so it needs no garbage collector.
 */
#include "bind/py_bind.h"

PyTypeObject *py_lease_type;

struct py_lease {
	PyObject_HEAD struct om_lease *l; /* NULL: released */
};

PyObject *py_lease_new(struct om_lease *l)
{
	struct py_lease *o = PyObject_New(struct py_lease, py_lease_type);

	if (om_unlikely(!o)) {
		om_lease_unref(l);
		return NULL;
	}
	o->l = l;
	return (PyObject *)o;
}

static void let_go(struct py_lease *o)
{
	struct om_lease *l = o->l;

	if (!l)
		return;
	o->l = NULL;
	om_lease_unref(l);
	py_collect();
}

static void lease_dealloc(PyObject *self)
{
	struct py_lease *o = (struct py_lease *)self;
	PyTypeObject *type = Py_TYPE(self);

	let_go(o);
	PyObject_Free(self);
	Py_DECREF(type);
}

struct om_lease *py_lease_held(PyObject *self)
{
	struct om_lease *l = ((struct py_lease *)self)->l;

	if (om_unlikely(!l))
		py_raise_closed("the lease was released: take a new one");
	return l;
}

static PyObject *lease_release(PyObject *self, PyObject *Py_UNUSED(unused))
{
	let_go((struct py_lease *)self);
	return Py_NewRef(Py_None);
}

static PyObject *lease_enter(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return py_lease_held(self) ? Py_NewRef(self) : NULL;
}

static PyObject *lease_exit(PyObject *self, PyObject *const *Py_UNUSED(args),
                            Py_ssize_t Py_UNUSED(nargs), PyObject *Py_UNUSED(kwnames))
{
	let_go((struct py_lease *)self);
	return Py_NewRef(Py_None);
}

static PyObject *lease_window(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
	struct om_lease *l = py_lease_held(self);

	return l ? py_window_new(l, args, nargs, kwnames) : NULL;
}

/* dtype and shape of the whole block: the remembered ones, else uint8. */
static int lease_shape(const struct om_lease *l, int64_t *bytes_shape, const int64_t **ret_shape)
{
	const struct om_desc *d = om_lease_desc(l);

	*bytes_shape = (int64_t)om_lease_nbytes(l);
	*ret_shape = d->ndim < 0 ? bytes_shape : d->shape;
	return d->ndim < 0 ? 1 : d->ndim;
}

struct py_view py_lease_view(struct om_lease *l, int64_t *bytes_shape)
{
	struct py_view v = { .lease = l,
		             .data = om_lease_data(l),
		             .type = py_desc_type(om_lease_desc(l)),
		             .writable = om_lease_writable(l) };

	v.ndim = lease_shape(l, bytes_shape, &v.shape);
	return v;
}

static PyObject *lease_dlpack(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
	struct om_lease *l = py_lease_held(self);
	int64_t bytes_shape;
	struct py_view v;

	if (!l)
		return NULL;
	v = py_lease_view(l, &bytes_shape);
	return py_export_args(&v, args, nargs, kwnames);
}

static int lease_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
	struct om_lease *l = py_lease_held(self);

	if (!l) {
		view->obj = NULL;
		return -1;
	}
	if (PyBuffer_FillInfo(view, self, om_lease_data(l), (Py_ssize_t)om_lease_nbytes(l),
	                      !om_lease_writable(l), flags))
		return -1;
	om_lease_view_ref(l);
	view->internal = l;
	return 0;
}

static void lease_releasebuffer(PyObject *Py_UNUSED(self), Py_buffer *view)
{
	om_lease_view_unref(view->internal);
	py_collect();
}

static PyObject *lease_repr(PyObject *self)
{
	struct om_lease *l = ((struct py_lease *)self)->l;

	if (!l)
		return PyUnicode_FromString("<omnimem lease, released>");
	return PyUnicode_FromFormat("<omnimem lease of '%s', %llu bytes%s>", om_lease_name(l),
	                            (unsigned long long)om_lease_nbytes(l),
	                            om_lease_writable(l) ? ", writable" : "");
}

static PyObject *get_name(PyObject *self, void *Py_UNUSED(unused))
{
	struct om_lease *l = py_lease_held(self);

	return l ? PyUnicode_FromString(om_lease_name(l)) : NULL;
}

static PyObject *get_nbytes(PyObject *self, void *Py_UNUSED(unused))
{
	struct om_lease *l = py_lease_held(self);

	return l ? PyLong_FromUnsignedLongLong(om_lease_nbytes(l)) : NULL;
}

static PyObject *get_dtype(PyObject *self, void *Py_UNUSED(unused))
{
	struct om_lease *l = py_lease_held(self);

	return l ? py_dtype_name(py_desc_type(om_lease_desc(l))) : NULL;
}

static PyObject *get_shape(PyObject *self, void *Py_UNUSED(unused))
{
	struct om_lease *l = py_lease_held(self);
	const int64_t *shape;
	int64_t bytes_shape;
	int ndim;

	if (!l)
		return NULL;
	ndim = lease_shape(l, &bytes_shape, &shape);
	return py_dims_tuple(shape, ndim);
}

static PyObject *get_writable(PyObject *self, void *Py_UNUSED(unused))
{
	struct om_lease *l = py_lease_held(self);

	return l ? PyBool_FromLong(om_lease_writable(l)) : NULL;
}

static PyObject *get_released(PyObject *self, void *Py_UNUSED(unused))
{
	return PyBool_FromLong(!((struct py_lease *)self)->l);
}

PyDoc_STRVAR(release_doc, "release($self, /)\n--\n\n"
                          "Let the bytes go; views that exist keep them. Idempotent.");
PyDoc_STRVAR(window_doc, "window($self, offset, dtype, shape, strides=None)\n--\n\n"
                         "A typed view from `offset` bytes on; strides in elements.");
PyDoc_STRVAR(dlpack_doc,
             "__dlpack__($self, /, *, stream=None, max_version=None, "
             "dl_device=None, copy=None)\n--\n\nA DLPack capsule that keeps the bytes.");

static PyMethodDef lease_methods[] = {
	{ "release", lease_release, METH_NOARGS, release_doc },
	{ "window", PY_FAST(lease_window), PY_FAST_FLAGS, window_doc },
	{ "__enter__", lease_enter, METH_NOARGS, NULL },
	{ "__exit__", PY_FAST(lease_exit), PY_FAST_FLAGS, NULL },
	{ "__dlpack__", PY_FAST(lease_dlpack), PY_FAST_FLAGS, dlpack_doc },
	{ "__dlpack_device__", py_export_device, METH_NOARGS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef lease_getset[] = {
	{ "name", get_name, NULL, "The block's name.", NULL },
	{ "nbytes", get_nbytes, NULL, "Bytes of the block.", NULL },
	{ "dtype", get_dtype, NULL, "Remembered element type; 'uint8' where none.", NULL },
	{ "shape", get_shape, NULL, "Remembered shape; (nbytes,) where none.", NULL },
	{ "writable", get_writable, NULL, "True for a write lease.", NULL },
	{ "released", get_released, NULL, "True after release().", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot lease_slots[] = {
	{ Py_tp_doc, "The right to a block's bytes: a context manager with the buffer protocol "
	             "(1-D uint8) and DLPack." },
	{ Py_tp_dealloc, lease_dealloc },
	{ Py_tp_repr, lease_repr },
	{ Py_tp_methods, lease_methods },
	{ Py_tp_getset, lease_getset },
	{ Py_bf_getbuffer, lease_getbuffer },
	{ Py_bf_releasebuffer, lease_releasebuffer },
	{ 0, NULL },
};

PyType_Spec py_lease_spec = {
	.name = "omnimem._core.Lease",
	.basicsize = sizeof(struct py_lease),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = lease_slots,
};
