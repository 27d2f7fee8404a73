/* py_simulate: _core.simulate: arrays of unsigned integers in, counters out; runs without the GIL. */
#include "bind/py_bind.h"

#include <string.h>

/* One element of a buffer; false when it is negative. */
static bool element(const char *at, struct om_dl_type type, uint64_t *ret)
{
	uint64_t raw = 0;

	memcpy(&raw, at, type.bits / 8); /* both little-endian */
	*ret = raw;
	return type.code == OM_DL_UINT || !(raw >> (type.bits - 1));
}

static bool is_integers(const Py_buffer *b, struct om_dl_type *ret)
{
	return b->ndim == 1 && py_dtype_of_format(b->format, b->itemsize, ret) &&
	       (ret->code == OM_DL_UINT || ret->code == OM_DL_INT);
}

/* A buffer's integers as a fresh array (PyMem). */
static int numbers(PyObject *o, const char *what, uint64_t **ret, size_t *ret_count)
{
	uint64_t *values = NULL;
	struct om_dl_type type;
	Py_buffer b;
	size_t n, i = 0;

	if (PyObject_GetBuffer(o, &b, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS))
		return -1;
	n = (size_t)(b.itemsize ? b.len / b.itemsize : 0);
	if (!is_integers(&b, &type))
		PyErr_Format(PyExc_TypeError,
		             "%s must be one row of integers, not %d dimensions of format '%s'",
		             what, b.ndim, b.format ? b.format : "B");
	else if (!(values = PyMem_Malloc((n ? n : 1) * sizeof(*values))))
		PyErr_NoMemory();
	while (values && i < n &&
	       element((const char *)b.buf + (Py_ssize_t)i * b.itemsize, type, &values[i]))
		i++;
	PyBuffer_Release(&b);
	if (values && i < n) {
		PyErr_Format(PyExc_ValueError, "%s[%zu] is negative", what, i);
		PyMem_Free(values);
		values = NULL;
	}
	*ret = values;
	*ret_count = n;
	return values ? 0 : -1;
}

static PyObject *result_of(const struct om_simulation *r)
{
	PyObject *led = PyDict_New();

	for (unsigned i = 0; i < OM_EXPERTS && led; i++) {
		PyObject *count = PyLong_FromUnsignedLongLong(r->led[i]);

		if (!count || PyDict_SetItemString(led, om_expert_name(i), count))
			Py_CLEAR(led);
		Py_XDECREF(count);
	}
	return led ? Py_BuildValue("(KKKKN)", (unsigned long long)r->requests,
	                           (unsigned long long)r->misses, (unsigned long long)r->bytes,
	                           (unsigned long long)r->missed_bytes, led)
	           : NULL;
}

PyObject *py_simulate(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = { "ids", "capacity", "policy", "sizes", NULL };
	uint64_t *ids = NULL, *sizes = NULL, capacity;
	size_t count, size_count;
	struct om_simulation r;
	PyObject *given[4] = { NULL }, *result = NULL;
	const char *policy;
	int code;

	(void)module;
	if (py_args("simulate", args, nargs, kwnames, names, 3, 4, given) ||
	    py_size(given[1], "capacity", &capacity) || !(policy = py_text(given[2], "policy")) ||
	    numbers(given[0], "ids", &ids, &count))
		return NULL;
	size_count = count;
	if (given[3] && given[3] != Py_None && numbers(given[3], "sizes", &sizes, &size_count))
		goto out;
	if (size_count != count) {
		PyErr_Format(PyExc_ValueError, "%zu sizes for %zu ids: each request has one",
		             size_count, count);
		goto out;
	}
	Py_BEGIN_ALLOW_THREADS code = om_simulate(ids, sizes, count, capacity, policy, &r);
	Py_END_ALLOW_THREADS result = code ? py_raise(code) : result_of(&r);
out:
	PyMem_Free(ids);
	PyMem_Free(sizes);
	return result;
}
