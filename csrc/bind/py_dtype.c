/*
 * py_dtype: names of element types as NumPy and torch spell them, DLPack codes, PEP 3118 formats,
 * shapes.
 *
 * Passive: no state. Fails with a Python exception where it says so.
 */
#include "bind/py_bind.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
	const char *name;
	struct om_dl_type type;
	const char *format; /* PEP 3118; NULL: none */
} known[] = {
	{ "uint8", { OM_DL_UINT, 8, 1 }, "B" },
	{ "bfloat16", { OM_DL_BFLOAT, 16, 1 }, NULL },
	{ "float32", { OM_DL_FLOAT, 32, 1 }, "f" },
	{ "float16", { OM_DL_FLOAT, 16, 1 }, "e" },
	{ "float64", { OM_DL_FLOAT, 64, 1 }, "d" },
	{ "int8", { OM_DL_INT, 8, 1 }, "b" },
	{ "int16", { OM_DL_INT, 16, 1 }, "h" },
	{ "int32", { OM_DL_INT, 32, 1 }, "i" },
	{ "int64", { OM_DL_INT, 64, 1 }, "q" },
	{ "uint16", { OM_DL_UINT, 16, 1 }, "H" },
	{ "uint32", { OM_DL_UINT, 32, 1 }, "I" },
	{ "uint64", { OM_DL_UINT, 64, 1 }, "Q" },
	{ "bool", { OM_DL_BOOL, 8, 1 }, "?" },
	{ "complex32", { OM_DL_COMPLEX, 32, 1 }, NULL },
	{ "complex64", { OM_DL_COMPLEX, 64, 1 }, "Zf" },
	{ "complex128", { OM_DL_COMPLEX, 128, 1 }, "Zd" },
	{ "float8_e3m4", { OM_DL_FLOAT8_E3M4, 8, 1 }, NULL },
	{ "float8_e4m3", { OM_DL_FLOAT8_E4M3, 8, 1 }, NULL },
	{ "float8_e4m3b11fnuz", { OM_DL_FLOAT8_E4M3B11FNUZ, 8, 1 }, NULL },
	{ "float8_e4m3fn", { OM_DL_FLOAT8_E4M3FN, 8, 1 }, NULL },
	{ "float8_e4m3fnuz", { OM_DL_FLOAT8_E4M3FNUZ, 8, 1 }, NULL },
	{ "float8_e5m2", { OM_DL_FLOAT8_E5M2, 8, 1 }, NULL },
	{ "float8_e5m2fnuz", { OM_DL_FLOAT8_E5M2FNUZ, 8, 1 }, NULL },
	{ "float8_e8m0fnu", { OM_DL_FLOAT8_E8M0FNU, 8, 1 }, NULL },
	{ "float6_e2m3fn", { OM_DL_FLOAT6_E2M3FN, 6, 1 }, NULL },
	{ "float6_e3m2fn", { OM_DL_FLOAT6_E3M2FN, 6, 1 }, NULL },
	{ "float4_e2m1fn", { OM_DL_FLOAT4_E2M1FN, 4, 1 }, NULL },
};
#define KNOWN (sizeof(known) / sizeof(known[0]))

/* Types that the table has no row for are spelled base, bits (a power of two) and, above one lane,
 * "x" and lanes; those of a row without a base, its name, "_x" and lanes, as torch does. */
static const char *const bases[OM_DL_CODES] = {
	[OM_DL_INT] = "int",       [OM_DL_UINT] = "uint",       [OM_DL_FLOAT] = "float",
	[OM_DL_BFLOAT] = "bfloat", [OM_DL_COMPLEX] = "complex", [OM_DL_BOOL] = "bool",
};

static int find_type(struct om_dl_type type)
{
	for (size_t i = 0; i < KNOWN; i++)
		if (known[i].type.code == type.code && known[i].type.bits == type.bits &&
		    known[i].type.lanes == type.lanes)
			return (int)i;
	return -1;
}

/* "int4", "uint1x8": base, bits, lanes. */
static bool parse_spelled(const char *name, struct om_dl_type *ret)
{
	for (int code = 0; code < OM_DL_CODES; code++) {
		size_t n = bases[code] ? strlen(bases[code]) : 0;
		unsigned bits = 0, lanes = 1;
		int end = 0;

		if (!n || strncmp(name, bases[code], n) || name[n] < '1' || name[n] > '9')
			continue;
		if (sscanf(name + n, "%3u%n", &bits, &end) == 1 && name[n + end] == 'x') {
			n += end + 1;
			if (name[n] < '1' || name[n] > '9' ||
			    sscanf(name + n, "%5u%n", &lanes, &end) != 1)
				return false;
		}
		if (name[n + end] || bits > 128 || (bits & (bits - 1)) || lanes > UINT16_MAX)
			return false;
		*ret = (struct om_dl_type){ (uint8_t)code, (uint8_t)bits, (uint16_t)lanes };
		return true;
	}
	return false;
}

/* "float4_e2m1fn_x2": a name of the table that has no base, lanes. */
static bool parse_lanes(const char *name, struct om_dl_type *ret)
{
	const char *x = strstr(name, "_x");
	unsigned lanes;
	int end;

	if (!x || x[2] < '1' || x[2] > '9' || sscanf(x + 2, "%5u%n", &lanes, &end) != 1 ||
	    x[2 + end] || lanes < 2 || lanes > UINT16_MAX)
		return false;
	for (size_t i = 0; i < KNOWN; i++)
		if (!bases[known[i].type.code] && strlen(known[i].name) == (size_t)(x - name) &&
		    !strncmp(known[i].name, name, (size_t)(x - name))) {
			*ret = known[i].type;
			ret->lanes = (uint16_t)lanes;
			return true;
		}
	return false;
}

bool py_dtype_is_known(struct om_dl_type type)
{
	struct om_dl_type one = { type.code, type.bits, 1 };

	if (!type.lanes || !type.bits || type.code >= OM_DL_CODES)
		return false;
	if (bases[type.code])
		return type.bits <= 128 && !(type.bits & (type.bits - 1));
	return find_type(one) >= 0;
}

int py_dtype_parse(const char *name, struct om_dl_type *ret)
{
	for (size_t i = 0; i < KNOWN; i++)
		if (strcmp(known[i].name, name) == 0) {
			*ret = known[i].type;
			return 0;
		}
	if (parse_spelled(name, ret) || parse_lanes(name, ret))
		return 0;
	PyErr_Format(PyExc_ValueError,
	             "dtype '%s' is unknown: write it as NumPy and torch do, such as 'bfloat16', "
	             "'float8_e4m3fn', 'uint8'",
	             name);
	return -1;
}

PyObject *py_dtype_name(struct om_dl_type type)
{
	int i = find_type(type);

	if (i >= 0)
		return PyUnicode_FromString(known[i].name);
	if (type.code < OM_DL_CODES && bases[type.code] && type.lanes == 1)
		return PyUnicode_FromFormat("%s%d", bases[type.code], type.bits);
	if (type.code < OM_DL_CODES && bases[type.code])
		return PyUnicode_FromFormat("%s%dx%d", bases[type.code], type.bits, type.lanes);
	i = find_type((struct om_dl_type){ type.code, type.bits, 1 });
	if (i >= 0)
		return PyUnicode_FromFormat("%s_x%d", known[i].name, type.lanes);
	return PyUnicode_FromFormat("dlpack(%d,%d,%d)", type.code, type.bits, type.lanes);
}

bool py_dtype_of_format(const char *format, Py_ssize_t itemsize, struct om_dl_type *ret)
{
	const char *f = format ? format : "B";
	int code = -1;

	if (*f == '@' || *f == '=' || *f == '<' || ((*f == '>' || *f == '!') && itemsize == 1))
		f++;
	if (f[0] == 'Z' && (f[1] == 'f' || f[1] == 'd') && !f[2])
		code = OM_DL_COMPLEX;
	else if (!f[0] || f[1] || itemsize > 8)
		return false;
	else if (strchr("bhilqn", f[0]))
		code = OM_DL_INT;
	else if (strchr("BcHILQN", f[0]))
		code = OM_DL_UINT;
	else if (strchr("efd", f[0]))
		code = OM_DL_FLOAT;
	else if (f[0] == '?')
		code = OM_DL_BOOL;
	if (code < 0 || itemsize < 1 || itemsize > 16)
		return false;
	*ret = (struct om_dl_type){ (uint8_t)code, (uint8_t)(itemsize * 8), 1 };
	return true;
}

const char *py_dtype_format(struct om_dl_type type)
{
	int i = find_type(type);

	return i < 0 ? NULL : known[i].format;
}

bool py_dtype_nbytes(struct om_dl_type type, int ndim, const int64_t *shape, uint64_t *ret)
{
	uint64_t bits = (uint64_t)type.bits * type.lanes;
	bool overflow = false, empty = false;

	for (int i = 0; i < ndim; i++) {
		if (shape[i] < 0)
			return false;
		empty |= shape[i] == 0;
		overflow |= om_mul_overflows(bits, (uint64_t)shape[i], &bits);
	}
	if (empty)
		bits = 0;
	else if (overflow || bits > (uint64_t)INT64_MAX - 7)
		return false;
	*ret = (bits + 7) / 8;
	return true;
}

static int read_dim(PyObject *o, const char *what, int64_t *ret)
{
	PyObject *index = PyNumber_Index(o);

	if (!index)
		return -1;
	*ret = PyLong_AsLongLong(index);
	Py_DECREF(index);
	if (*ret == -1 && PyErr_Occurred()) {
		PyErr_Clear();
		PyErr_Format(PyExc_ValueError, "%s: %R does not fit into 64 bits", what, o);
		return -1;
	}
	return 0;
}

int py_dims(PyObject *o, const char *what, int64_t *ret, int *ret_ndim)
{
	PyObject *tuple;
	Py_ssize_t n;
	int failed = 0;

	if (PyIndex_Check(o)) {
		*ret_ndim = 1;
		return read_dim(o, what, ret);
	}
	tuple = PySequence_Tuple(o);
	if (!tuple)
		return -1;
	n = PyTuple_Size(tuple);
	if (n > OM_MAX_NDIM) {
		PyErr_Format(PyExc_ValueError, "%s has %zd dimensions, at most %d are possible",
		             what, n, OM_MAX_NDIM);
		failed = -1;
	}
	for (Py_ssize_t i = 0; i < n && !failed; i++)
		failed = read_dim(PyTuple_GetItem(tuple, i), what, &ret[i]);
	Py_DECREF(tuple);
	*ret_ndim = (int)n;
	return failed;
}

PyObject *py_dims_tuple(const int64_t *dims, int ndim)
{
	PyObject *tuple = PyTuple_New(ndim);

	for (int i = 0; tuple && i < ndim; i++) {
		PyObject *dim = PyLong_FromLongLong(dims[i]);

		if (!dim || PyTuple_SetItem(tuple, i, dim)) {
			Py_DECREF(tuple);
			return NULL;
		}
	}
	return tuple;
}

void py_dims_strides(int ndim, const int64_t *shape, int64_t *ret_strides)
{
	uint64_t stride = 1; /* wraps only where a dimension of 0 makes it irrelevant */

	for (int i = ndim; i-- > 0;) {
		ret_strides[i] = (int64_t)(stride & INT64_MAX);
		stride *= shape[i] > 1 ? (uint64_t)shape[i] : 1;
	}
}

bool py_dims_contiguous(int ndim, const int64_t *shape, const int64_t *strides)
{
	int64_t stride = 1;

	for (int i = 0; i < ndim; i++)
		if (shape[i] == 0)
			return true;
	for (int i = ndim; i-- > 0; stride *= shape[i])
		if (shape[i] > 1 && strides[i] != stride)
			return false;
	return true;
}

struct om_dl_type py_desc_type(const struct om_desc *desc)
{
	if (desc->ndim < 0)
		return (struct om_dl_type){ OM_DL_UINT, 8, 1 };
	return (struct om_dl_type){ desc->code, desc->bits, desc->lanes };
}
