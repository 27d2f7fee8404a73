/*
 * py_import: bytes of DLPack and buffer producers.
 *
 * A struct py_data owns what the producer lent (its managed tensor or its buffer) and, for strided
 * data, a contiguous copy, until py_data_fini. A capsule is renamed at once, so that its deleter is
 * ours to call, exactly once. DLPack goes first, since it knows bfloat16 and float8; a producer that
 * refuses with BufferError is asked for its buffer. What a capsule says is checked before it is
 * used; a lie is a BufferError, another device a DeviceError.
 */
#include "bind/py_bind.h"

#include <stdlib.h>
#include <string.h>

static bool is_cpu(long type)
{
	return type == OM_DL_CPU || type == OM_DL_CUDA_HOST || type == OM_DL_ROCM_HOST;
}

static int refuse_device(long type)
{
	py_raise_device("data is on DLPack device type %ld, only the CPU's memory can be added: "
	                "copy it there first",
	                type);
	return -1;
}

static int check_device(PyObject *o)
{
	PyObject *pair = PyObject_CallMethod(o, "__dlpack_device__", NULL), *type;
	long value = -1;

	if (!pair)
		return -1;
	type = PySequence_GetItem(pair, 0);
	Py_DECREF(pair);
	if (type)
		value = PyLong_AsLong(type);
	Py_XDECREF(type);
	if (value == -1 && PyErr_Occurred())
		return -1;
	return is_cpu(value) ? 0 : refuse_device(value);
}

static PyObject *ask_versioned(PyObject *method)
{
	PyObject *none = PyTuple_New(0), *keywords = NULL, *capsule = NULL;

	if (none)
		keywords = Py_BuildValue("{s(ii)}", "max_version", OM_DL_MAJOR, OM_DL_MINOR);
	if (keywords)
		capsule = PyObject_Call(method, none, keywords);
	Py_XDECREF(none);
	Py_XDECREF(keywords);
	return capsule;
}

/* The capsule of a producer; producers from before DLPack 1.0 know no keyword. */
static PyObject *ask(PyObject *o)
{
	PyObject *method = PyObject_GetAttrString(o, "__dlpack__"), *capsule;

	if (!method)
		return NULL;
	capsule = ask_versioned(method);
	if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
		PyErr_Clear();
		capsule = PyObject_CallNoArgs(method);
	}
	Py_DECREF(method);
	return capsule;
}

static void delete_managed(void *managed, bool versioned)
{
	struct om_dl_managed_versioned *v = managed;
	struct om_dl_managed *m = managed;

	if (versioned && v->deleter)
		v->deleter(v);
	else if (!versioned && m->deleter)
		m->deleter(m);
}

/* Makes the capsule's tensor ours. */
static int take_capsule(struct py_data *d, PyObject *capsule)
{
	const char *name, *used;

	if (!PyCapsule_CheckExact(capsule)) {
		PyErr_Format(PyExc_BufferError, "__dlpack__ returned %R, not a capsule",
		             Py_TYPE(capsule));
		return -1;
	}
	d->versioned = PyCapsule_IsValid(capsule, OM_DL_VERSIONED);
	name = d->versioned ? OM_DL_VERSIONED : OM_DL_NAME;
	used = d->versioned ? OM_DL_VERSIONED_USED : OM_DL_NAME_USED;
	if (!PyCapsule_IsValid(capsule, name)) {
		name = PyCapsule_GetName(capsule);
		PyErr_Clear();
		PyErr_Format(PyExc_BufferError,
		             "a capsule named '%s' is no DLPack tensor, or was taken before",
		             name ? name : "");
		return -1;
	}
	d->managed = PyCapsule_GetPointer(capsule, name);
	return PyCapsule_SetName(capsule, used);
}

static int refuse(const char *text)
{
	PyErr_Format(PyExc_BufferError, "bad DLPack tensor: %s", text);
	return -1;
}

/* No process can address more: a lie. */
#define ADDRESS_SPACE (UINT64_C(1) << 57)

/* Do the elements, from the lowest to the highest, lie where memory can be? */
static bool out_of_reach(const struct om_dl_tensor *t, uint64_t itemsize)
{
	uint64_t below = 0, above = itemsize, part, first;

	if (om_add_overflows((uintptr_t)t->data, t->byte_offset, &first))
		return true;
	for (int i = 0; i < t->ndim; i++) {
		int64_t s = t->strides[i];
		uint64_t stride = s < 0 ? 0 - (uint64_t)s : (uint64_t)s,
			 *side = s < 0 ? &below : &above;

		if (t->shape[i] < 2)
			continue;
		if (om_mul_overflows((uint64_t)t->shape[i] - 1, stride, &part) ||
		    om_mul_overflows(part, itemsize, &part) || om_add_overflows(*side, part, side))
			return true;
	}
	return below >= first || above >= ADDRESS_SPACE || om_add_overflows(first, above, &part);
}

static int check_tensor(struct py_data *d, const struct om_dl_tensor *t)
{
	struct om_dl_type type = t->dtype;
	uint64_t first, end;

	if (!is_cpu(t->device.type))
		return refuse_device(t->device.type);
	if (t->ndim < 0 || t->ndim > OM_MAX_NDIM) {
		PyErr_Format(PyExc_BufferError,
		             "bad DLPack tensor: %d dimensions, 0 to %d are possible", (int)t->ndim,
		             OM_MAX_NDIM);
		return -1;
	}
	if (type.bits == 0 || type.lanes == 0)
		return refuse("an element of no bits or lanes");
	if (!py_dtype_is_known(type)) {
		PyErr_Format(PyExc_BufferError,
		             "bad DLPack tensor: no element type has code %d and %d bits",
		             type.code, type.bits);
		return -1;
	}
	if (t->ndim && !t->shape)
		return refuse("shape is NULL");
	if (!py_dtype_nbytes(type, t->ndim, t->shape, &d->nbytes))
		return refuse("a dimension is negative, or the size overflows");
	if (d->nbytes && !t->data)
		return refuse("data is NULL");
	if (d->nbytes && t->strides && out_of_reach(t, py_dtype_size(type)))
		return refuse("strides or byte_offset reach out of memory");
	if (om_add_overflows((uintptr_t)t->data, t->byte_offset, &first) ||
	    om_add_overflows(first, d->nbytes, &end) || d->nbytes >= ADDRESS_SPACE ||
	    t->byte_offset >= ADDRESS_SPACE)
		return refuse("its size or byte_offset reaches out of memory");
	return 0;
}

static int refuse_strided(void)
{
	PyErr_SetString(
		PyExc_ValueError,
		"the data is not contiguous: take() keeps memory as it is; make it contiguous "
		"first, or add() it");
	return -1;
}

/* The strided elements that `d` describes, as the caller wants them. */
static int settle_strided(struct py_data *d, enum py_strided strided)
{
	struct om_array array = py_data_array(d);

	if (strided == PY_STRIDED_REFUSED)
		return refuse_strided();
	d->strided = strided == PY_STRIDED_KEPT;
	if (d->strided)
		return 0;
	d->copy = malloc(d->nbytes);
	if (!d->copy) {
		PyErr_Format(PyExc_MemoryError, "no memory to make %llu bytes contiguous",
		             (unsigned long long)d->nbytes);
		return -1;
	}
	Py_BEGIN_ALLOW_THREADS om_array_copy(&array, d->copy);
	Py_END_ALLOW_THREADS d->data = d->copy;
	return 0;
}

static int read_tensor(struct py_data *d, const struct om_dl_tensor *t, enum py_strided strided)
{
	if (check_tensor(d, t))
		return -1;
	d->desc.code = t->dtype.code;
	d->desc.bits = t->dtype.bits;
	d->desc.lanes = t->dtype.lanes;
	d->desc.ndim = t->ndim;
	for (int i = 0; i < t->ndim; i++)
		d->desc.shape[i] = t->shape[i];
	if (!d->nbytes)
		return 0;
	d->data = (char *)t->data + t->byte_offset;
	if (!t->strides || py_dims_contiguous(t->ndim, t->shape, t->strides))
		return 0;
	d->itemsize = py_dtype_size(t->dtype);
	if (!d->itemsize)
		return refuse("elements below a byte must be contiguous");
	d->ndim = t->ndim;
	for (int i = 0; i < t->ndim; i++) { /* of one element: never used, may hold anything */
		d->shape[i] = t->shape[i];
		d->strides[i] = t->shape[i] > 1 ? t->strides[i] * (int64_t)d->itemsize : 0;
	}
	return settle_strided(d, strided);
}

static int init_dlpack(struct py_data *d, PyObject *capsule, enum py_strided strided)
{
	struct om_dl_managed_versioned *v;

	if (take_capsule(d, capsule))
		return -1;
	v = d->managed;
	if (!d->versioned) {
		d->readonly = true; /* it cannot say so, and jax's arrays, which come so, are */
		return read_tensor(d, &((struct om_dl_managed *)d->managed)->tensor, strided);
	}
	if (v->version.major != OM_DL_MAJOR) {
		PyErr_Format(PyExc_BufferError, "DLPack %u.%u is not understood, %d.x is",
		             (unsigned)v->version.major, (unsigned)v->version.minor, OM_DL_MAJOR);
		return -1;
	}
	d->readonly = v->flags & OM_DL_READ_ONLY;
	if (v->flags & OM_DL_SUBBYTE_PADDED && v->tensor.dtype.bits % 8)
		return refuse("elements below a byte must be packed");
	return read_tensor(d, &v->tensor, strided);
}

static void read_format(struct py_data *d, const Py_buffer *b, struct om_dl_type type)
{
	d->desc.ndim = -1;
	if (b->ndim > OM_MAX_NDIM)
		return;
	if (!type.bits && !py_dtype_of_format(b->format, b->itemsize, &type))
		return;
	d->desc.code = type.code;
	d->desc.bits = type.bits;
	d->desc.lanes = type.lanes;
	d->desc.ndim = b->ndim;
	for (int i = 0; i < b->ndim; i++)
		d->desc.shape[i] = b->shape[i];
}

/* One with pointers to pointers, or with more dimensions than we know. */
static int settle_odd_buffer(struct py_data *d, enum py_strided strided)
{
	if (strided == PY_STRIDED_REFUSED)
		return refuse_strided();
	d->copy = malloc(d->nbytes);
	if (!d->copy) {
		PyErr_NoMemory();
		return -1;
	}
	d->data = d->copy;
	return PyBuffer_ToContiguous(d->copy, d->buffer, d->buffer->len, 'C');
}

/* The same elements as raw bytes each; NULL, with an exception, when `o` is no array of NumPy. */
static PyObject *view_raw(PyObject *o, PyObject *dtype, struct om_dl_type *ret)
{
	PyObject *name = PyObject_GetAttrString(dtype, "name"), *raw = NULL, *view = NULL;
	PyObject *itemsize = name ? PyObject_GetAttrString(dtype, "itemsize") : NULL;
	const char *text = itemsize && PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL)
	                                                     : NULL;

	if (text) {
		raw = PyUnicode_FromFormat("V%S", itemsize);
		if (py_dtype_parse(text, ret)) {
			PyErr_Clear();
			ret->bits = 0;
		} else if (PyLong_AsLong(itemsize) != (long)py_dtype_size(*ret)) {
			ret->bits = 0; /* ml_dtypes keeps a byte for each int4 */
		}
	}
	if (raw)
		view = PyObject_CallMethod(o, "view", "O", raw);
	Py_XDECREF(name);
	Py_XDECREF(itemsize);
	Py_XDECREF(raw);
	return view;
}

/* The buffer of `o`. NumPy has elements that no format stands for, such as those of ml_dtypes: then
 * *ret is what they are called, and its bits are 0 when that is no type either. */
static int get_buffer(PyObject *o, Py_buffer *b, struct om_dl_type *ret)
{
	PyObject *type, *value, *trace, *dtype, *view;
	int failed;

	*ret = (struct om_dl_type){ 0 };
	if (!PyObject_GetBuffer(o, b, PyBUF_FULL_RO))
		return 0;
	if (!PyErr_ExceptionMatches(PyExc_ValueError))
		return -1;
	PyErr_Fetch(&type, &value, &trace);
	dtype = PyObject_GetAttrString(o, "dtype");
	view = dtype ? view_raw(o, dtype, ret) : NULL;
	failed = !view || PyObject_GetBuffer(view, b, PyBUF_FULL_RO);
	Py_XDECREF(dtype);
	Py_XDECREF(view);
	if (failed) {
		PyErr_Clear();
		PyErr_Restore(type, value, trace);
		return -1;
	}
	Py_XDECREF(type);
	Py_XDECREF(value);
	Py_XDECREF(trace);
	return 0;
}

static int init_buffer(struct py_data *d, PyObject *o, enum py_strided strided)
{
	Py_buffer *b = calloc(1, sizeof(*b));
	struct om_dl_type type;

	if (!b) {
		PyErr_NoMemory();
		return -1;
	}
	if (get_buffer(o, b, &type)) {
		free(b);
		return -1;
	}
	d->buffer = b;
	d->data = b->buf;
	d->nbytes = (uint64_t)b->len;
	d->readonly = b->readonly;
	if (b->format && !strcmp(b->format, "O")) {
		PyErr_SetString(PyExc_ValueError, "the data are Python objects: their bytes mean "
		                                  "nothing but to this process");
		return -1;
	}
	read_format(d, b, type);
	if (!b->len || PyBuffer_IsContiguous(b, 'C'))
		return 0;
	if (b->suboffsets || b->ndim > OM_MAX_NDIM)
		return settle_odd_buffer(d, strided);
	d->itemsize = (uint64_t)b->itemsize;
	d->ndim = b->ndim;
	for (int i = 0; i < b->ndim; i++) {
		d->shape[i] = b->shape[i];
		d->strides[i] = b->strides[i];
	}
	return settle_strided(d, strided);
}

/* DLPack where the object speaks it: 1 done, 0 ask for the buffer, -1 raised. */
static int try_dlpack(struct py_data *d, PyObject *o, enum py_strided strided)
{
	PyObject *capsule, *type, *value, *trace;
	int code;

	if (PyCapsule_CheckExact(o))
		return init_dlpack(d, o, strided) ? -1 : 1;
	if (!PyObject_HasAttrString(o, "__dlpack__"))
		return 0;
	if (PyObject_HasAttrString(o, "__dlpack_device__") && check_device(o))
		return -1;
	capsule = ask(o);
	if (!capsule) {
		if (!PyErr_ExceptionMatches(PyExc_BufferError) || !PyObject_CheckBuffer(o))
			return -1;
		PyErr_Clear();
		return 0;
	}
	code = init_dlpack(d, capsule, strided) ? -1 : 1;
	PyErr_Fetch(&type, &value, &trace); /* the capsule's destructor must not see it */
	Py_DECREF(capsule);
	PyErr_Restore(type, value, trace);
	return code;
}

int py_data_init(struct py_data *d, PyObject *o, enum py_strided strided)
{
	int got;

	memset(d, 0, sizeof(*d));
	got = try_dlpack(d, o, strided);
	if (got == 0 && !PyObject_CheckBuffer(o)) {
		PyErr_Format(PyExc_TypeError,
		             "data must speak DLPack or the buffer protocol, %R does neither",
		             Py_TYPE(o));
		return -1;
	}
	if (got == 0)
		got = init_buffer(d, o, strided) ? -1 : 1;
	if (got < 0)
		py_data_fini(d);
	return got < 0 ? -1 : 0;
}

void py_data_fini(struct py_data *d)
{
	PyObject *type, *value, *trace;

	PyErr_Fetch(&type, &value, &trace); /* producers run Python code */
	if (d->managed)
		delete_managed(d->managed, d->versioned);
	if (d->buffer) {
		PyBuffer_Release(d->buffer);
		free(d->buffer);
	}
	free(d->copy);
	memset(d, 0, sizeof(*d));
	if (PyErr_Occurred())
		PyErr_WriteUnraisable(NULL);
	PyErr_Restore(type, value, trace);
}
