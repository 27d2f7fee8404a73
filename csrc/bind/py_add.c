/*
 * py_add: Store.add, Store.take and Store.add_file: bytes that come in.
 *
 * add holds the producer's bytes only while the core copies them; take hands them to the core until
 * it says otherwise (py_foreign.c); add_file hands over names and numbers only.
 */
#include "bind/py_bind.h"
#include "bind/py_foreign.h"

#include <stdlib.h>
#include <string.h>

struct add_call {
	struct om_store *s;
	const char *name, *group;
	const struct py_data *data;
	struct py_foreign *foreign; /* of take */
};

static int call_add(void *arg, uint64_t deadline_ns)
{
	const struct add_call *c = arg;
	const struct py_data *d = c->data;
	struct om_array array = py_data_array(d);

	if (d->strided)
		return om_store_add_array(c->s, c->name, c->group, &array, d->nbytes, &d->desc,
		                          deadline_ns);
	return om_store_add(c->s, c->name, c->group, d->data, d->nbytes, &d->desc, deadline_ns);
}

static int call_take(void *arg, uint64_t deadline_ns)
{
	const struct add_call *c = arg;
	const struct py_data *d = &c->foreign->data;

	return om_store_take(c->s, c->name, c->group, d->data, d->nbytes, &d->desc,
	                     py_foreign_release, c->foreign, deadline_ns);
}

/* The arguments that add and take share; `c` without the data. */
static int read_add(const char *function, PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                    PyObject *kwnames, struct add_call *c, PyObject **ret_data, uint64_t *ret_ns)
{
	static const char *const names[] = { "name", "data", "group", "timeout", NULL };
	PyObject *a[4] = { NULL };
	struct py_core *core = py_store_core(self);

	if (!core || py_args(function, args, nargs, kwnames, names, 2, 4, a))
		return -1;
	c->s = core->s;
	c->name = py_text(a[0], "name");
	if (!c->name || py_text_or_null(a[2], "group", &c->group) || py_deadline(a[3], ret_ns))
		return -1;
	*ret_data = a[1];
	return 0;
}

PyObject *py_store_add(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	struct add_call c = { 0 };
	struct py_data data;
	PyObject *o;
	uint64_t deadline_ns;
	int code;

	if (read_add("add", self, args, nargs, kwnames, &c, &o, &deadline_ns) ||
	    py_data_init(&data, o, PY_STRIDED_KEPT))
		return NULL;
	c.data = &data;
	code = py_wait(call_add, &c, deadline_ns);
	o = py_done(code); /* before the producer's code runs */
	py_data_fini(&data);
	return o;
}

PyObject *py_store_take(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	struct py_core *core = py_store_core(self);
	struct add_call c = { 0 };
	struct py_data data;
	PyObject *o;
	uint64_t deadline_ns;
	int code;

	if (read_add("take", self, args, nargs, kwnames, &c, &o, &deadline_ns) ||
	    py_data_init(&data, o, PY_STRIDED_REFUSED))
		return NULL;
	c.foreign = py_foreign_new(core, &data);
	if (!c.foreign) {
		py_data_fini(&data);
		return NULL;
	}
	code = py_wait(call_take, &c, deadline_ns);
	o = py_done(code);
	if (code) /* the core kept nothing */
		py_foreign_release(c.foreign);
	return o;
}

/* ---- add_file ---- */

struct file_list {
	size_t count;
	struct om_file_range *ranges;
	PyObject **paths; /* bytes that the ranges point into */
};

static void free_files(struct file_list *l)
{
	for (size_t i = 0; l->paths && i < l->count; i++)
		Py_XDECREF(l->paths[i]);
	free(l->paths);
	free(l->ranges);
}

static int alloc_files(struct file_list *l, size_t count)
{
	l->count = count;
	l->ranges = calloc(count ? count : 1, sizeof(*l->ranges));
	l->paths = calloc(count ? count : 1, sizeof(PyObject *));
	if (l->ranges && l->paths)
		return 0;
	PyErr_NoMemory();
	return -1;
}

static int read_range(struct file_list *l, size_t i, PyObject *path, PyObject *offset,
                      PyObject *nbytes)
{
	if (!PyUnicode_FSConverter(path, &l->paths[i]))
		return -1;
	l->ranges[i].path = PyBytes_AsString(l->paths[i]);
	if (py_size(offset, "offset", &l->ranges[i].offset))
		return -1;
	return py_size(nbytes, "nbytes", &l->ranges[i].nbytes);
}

static int read_triple(struct file_list *l, size_t i, PyObject *extent)
{
	PyObject *t = PySequence_Tuple(extent);
	int failed = -1;

	if (t && PyTuple_Size(t) == 3)
		failed = read_range(l, i, PyTuple_GetItem(t, 0), PyTuple_GetItem(t, 1),
		                    PyTuple_GetItem(t, 2));
	else if (t)
		PyErr_SetString(PyExc_ValueError, "an extent is (path, offset, nbytes)");
	Py_XDECREF(t);
	return failed;
}

static bool is_path(PyObject *o)
{
	return PyUnicode_Check(o) || PyBytes_Check(o) || PyObject_HasAttrString(o, "__fspath__");
}

/* Either path, offset, nbytes, or a list of such extents. */
static int read_files(struct file_list *l, PyObject *what, PyObject *offset, PyObject *nbytes)
{
	PyObject *list;
	int failed;

	if (is_path(what)) {
		if (offset && nbytes)
			return alloc_files(l, 1) ? -1 : read_range(l, 0, what, offset, nbytes);
		PyErr_SetString(PyExc_TypeError, "add_file() with a path needs offset and nbytes");
		return -1;
	}
	if (offset || nbytes) {
		PyErr_SetString(PyExc_TypeError, "offset and nbytes stand inside the extents");
		return -1;
	}
	list = PySequence_Tuple(what);
	if (!list)
		return -1;
	failed = alloc_files(l, (size_t)PyTuple_Size(list));
	for (size_t i = 0; !failed && i < l->count; i++)
		failed = read_triple(l, i, PyTuple_GetItem(list, (Py_ssize_t)i));
	Py_DECREF(list);
	return failed;
}

static int total_bytes(const struct file_list *l, uint64_t *ret)
{
	*ret = 0;
	for (size_t i = 0; i < l->count; i++)
		if (om_add_overflows(*ret, l->ranges[i].nbytes, ret) || *ret > INT64_MAX) {
			PyErr_SetString(PyExc_ValueError, "the extents' bytes overflow");
			return -1;
		}
	return 0;
}

int py_desc_read(PyObject *dtype, PyObject *shape, uint64_t total, struct om_desc *ret)
{
	struct om_dl_type type = { OM_DL_UINT, 8, 1 };
	const char *name;
	uint64_t nbytes;
	int ndim = 1;

	ret->ndim = -1;
	if (py_text_or_null(dtype, "dtype", &name) || (name && py_dtype_parse(name, &type)))
		return -1;
	if (!name && (!shape || shape == Py_None))
		return 0;
	ret->code = type.code;
	ret->bits = type.bits;
	ret->lanes = type.lanes;
	ret->shape[0] = (int64_t)(total * 8 / ((uint64_t)type.bits * type.lanes));
	if (total > INT64_MAX / 8) {
		PyErr_Format(PyExc_ValueError, "%llu bytes are too many for a dtype",
		             (unsigned long long)total);
		return -1;
	}
	if (shape && shape != Py_None && py_dims(shape, "shape", ret->shape, &ndim))
		return -1;
	if (!py_dtype_nbytes(type, ndim, ret->shape, &nbytes) || nbytes != total) {
		PyErr_Format(PyExc_ValueError,
		             "dtype %s and the shape do not make up the block's %llu bytes",
		             name ? name : "uint8", (unsigned long long)total);
		return -1;
	}
	ret->ndim = ndim;
	return 0;
}

PyObject *py_store_add_file(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames)
{
	static const char *const names[] = { "name",   "extents",        "offset",
		                             "nbytes", "dtype",          "shape",
		                             "group",  "decoded_nbytes", NULL };
	PyObject *a[8] = { NULL }, *result = NULL;
	struct py_core *core = py_store_core(self);
	struct file_list files = { 0 };
	struct om_desc desc = { 0 };
	const char *name, *group;
	uint64_t total, decoded = OM_NOT_ENCODED;
	int code;

	if (!core || py_args("add_file", args, nargs, kwnames, names, 2, 4, a))
		return NULL;
	name = py_text(a[0], "name");
	if (!name || py_text_or_null(a[6], "group", &group) ||
	    read_files(&files, a[1], a[2], a[3]) || total_bytes(&files, &total) ||
	    (a[7] && a[7] != Py_None && py_size(a[7], "decoded_nbytes", &decoded)) ||
	    py_desc_read(a[4], a[5], decoded == OM_NOT_ENCODED ? total : decoded, &desc))
		goto out;
	Py_BEGIN_ALLOW_THREADS code =
		om_store_add_file(core->s, name, group, files.ranges, files.count, decoded, &desc);
	Py_END_ALLOW_THREADS result = py_done(code);
out:
	free_files(&files);
	return result;
}

/* ---- encode ---- */

struct encode_call {
	struct om_store *s;
	const char *name;
	enum om_coding coding;
	uint64_t bytes;
};

static int call_encode(void *arg, uint64_t deadline_ns)
{
	struct encode_call *c = arg;

	return om_store_encode(c->s, c->name, c->coding, deadline_ns, &c->bytes);
}

int py_coding_read(PyObject *o, enum om_coding *ret)
{
	static const char *const names[] = {
		[OM_CODING_FAST] = "fast", [OM_CODING_BALANCED] = "balanced"
	};
	const char *text = py_text(o, "coding");

	for (int i = OM_CODING_FAST; text && i <= OM_CODING_BALANCED; i++)
		if (!strcmp(text, names[i])) {
			*ret = (enum om_coding)i;
			return 0;
		}
	if (text)
		PyErr_Format(PyExc_ValueError, "coding is 'fast' or 'balanced', not '%s'", text);
	return -1;
}

PyObject *py_store_encode(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
	static const char *const names[] = { "name", "coding", "timeout", NULL };
	struct py_core *core = py_store_core(self);
	struct encode_call c = { .coding = OM_CODING_FAST };
	PyObject *a[3] = { NULL };
	uint64_t deadline_ns;
	int code;

	if (!core || py_args("encode", args, nargs, kwnames, names, 1, 3, a) ||
	    (a[1] && py_coding_read(a[1], &c.coding)) || py_deadline(a[2], &deadline_ns))
		return NULL;
	c.s = core->s;
	c.name = py_text(a[0], "name");
	if (!c.name)
		return NULL;
	code = py_wait(call_encode, &c, deadline_ns);
	py_collect();
	if (code)
		return code == PY_RAISED ? NULL : py_raise(code);
	return PyLong_FromUnsignedLongLong(c.bytes);
}
