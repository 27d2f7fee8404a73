/* py_codec: _core.encode and decode: buffers and tensors in, bytes out; the GIL is not held meanwhile. */
#include "bind/py_bind.h"

#include <string.h>

static const char *const codings[] = {
	[OM_CODING_NONE] = "none",
	[OM_CODING_FAST] = "fast",
	[OM_CODING_BALANCED] = "balanced",
};

/* "auto" (NULL too) is fast: where bytes are kept in memory, the denser code takes longer than it is worth. */
static int read_coding(PyObject *o, enum om_coding *ret)
{
	const char *name = o ? py_text(o, "coding") : "auto";

	if (!name)
		return -1;
	*ret = OM_CODING_FAST;
	if (!strcmp(name, "auto"))
		return 0;
	for (int i = OM_CODING_NONE; i <= OM_CODING_BALANCED; i++)
		if (!strcmp(name, codings[i])) {
			*ret = (enum om_coding)i;
			return 0;
		}
	PyErr_Format(PyExc_ValueError,
	             "coding '%s' is unknown: 'auto', 'fast', 'balanced' or 'none'", name);
	return -1;
}

/* What is to be encoded, and how. */
struct job {
	struct py_data data;
	enum om_coding coding;
};

static int job_init(struct job *j, PyObject *data, PyObject *dtype, PyObject *coding)
{
	struct om_dl_type type;
	const char *name;
	bool hinted = dtype && dtype != Py_None;

	if (read_coding(coding, &j->coding) ||
	    (hinted && (!(name = py_text(dtype, "dtype")) || py_dtype_parse(name, &type))) ||
	    py_data_init(&j->data, data, true))
		return -1;
	if (hinted) {
		j->data.desc.code = type.code;
		j->data.desc.bits = type.bits;
		j->data.desc.lanes = type.lanes;
		j->data.desc.ndim = 0; /* known; the shape is of no interest */
	}
	return 0;
}

/* Encodes; the core's code. */
static int job_run(struct job *j, void *ret, uint64_t room, uint64_t *ret_bytes)
{
	int code;

	/* A view may write to a block that is being encoded: _pack finds out. */
	Py_BEGIN_ALLOW_THREADS om_racy_reads_begin();
	code = om_encode(j->data.data, j->data.nbytes, &j->data.desc, j->coding, ret, room,
	                 ret_bytes);
	om_racy_reads_end();
	Py_END_ALLOW_THREADS return code;
}

PyObject *py_encode(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs,
                    PyObject *kwnames)
{
	static const char *const names[] = { "data", "dtype", "coding", NULL };
	PyObject *given[3] = { NULL }, *result = NULL;
	struct job j;
	uint64_t room, bytes;
	void *made;
	int code;

	if (py_args("encode", args, nargs, kwnames, names, 1, 3, given) ||
	    job_init(&j, given[0], given[1], given[2]))
		return NULL;
	room = om_encode_bound(j.data.nbytes);
	made = PyMem_Malloc(room);
	if (!made) {
		PyErr_NoMemory();
	} else {
		code = job_run(&j, made, room, &bytes);
		if (code)
			py_raise(code);
		else
			result = bytes ? PyBytes_FromStringAndSize(made, (Py_ssize_t)bytes)
			               : Py_NewRef(Py_None);
	}
	PyMem_Free(made);
	py_data_fini(&j.data);
	return result;
}

PyObject *py_encode_into(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames)
{
	static const char *const names[] = { "data", "out", "dtype", "coding", NULL };
	PyObject *given[4] = { NULL }, *result = NULL;
	struct job j;
	Py_buffer out;
	uint64_t bytes;
	int code;

	if (py_args("encode_into", args, nargs, kwnames, names, 2, 4, given) ||
	    job_init(&j, given[0], given[2], given[3]))
		return NULL;
	if (!PyObject_GetBuffer(given[1], &out, PyBUF_WRITABLE)) {
		code = job_run(&j, out.buf, (uint64_t)out.len, &bytes);
		result = code ? py_raise(code) : PyLong_FromUnsignedLongLong(bytes);
		PyBuffer_Release(&out);
	}
	py_data_fini(&j.data);
	return result;
}

PyObject *py_encode_bound(PyObject *Py_UNUSED(module), PyObject *arg)
{
	uint64_t nbytes;

	return py_size(arg, "nbytes", &nbytes)
	               ? NULL
	               : PyLong_FromUnsignedLongLong(om_encode_bound(nbytes));
}

PyObject *py_decode(PyObject *Py_UNUSED(module), PyObject *arg)
{
	PyObject *result = NULL;
	enum om_coding coding;
	uint64_t nbytes;
	Py_buffer in;
	int code;

	if (PyObject_GetBuffer(arg, &in, PyBUF_SIMPLE))
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_coded_info(in.buf, (uint64_t)in.len, &nbytes, &coding);
	Py_END_ALLOW_THREADS if (!code)
		result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)nbytes);
	if (result) {
		char *to = PyBytes_AsString(result);

		Py_BEGIN_ALLOW_THREADS code = om_decode(in.buf, (uint64_t)in.len, to, nbytes);
		Py_END_ALLOW_THREADS
	}
	if (code) {
		Py_CLEAR(result);
		py_raise(code);
	}
	PyBuffer_Release(&in);
	return result;
}

/* Without the GIL. */
static int decode_unchecked(const Py_buffer *in, const Py_buffer *out)
{
	struct om_coded c = { 0 };
	int code = om_coded_open(in->buf, (uint64_t)in->len, &c);

	if (!code && c.bytes != (uint64_t)in->len)
		code = om_err(OM_ECORRUPT,
		              "encoded bytes: %llu are given, and the first frame has %llu",
		              (unsigned long long)in->len, (unsigned long long)c.bytes);
	if (!code && c.nbytes != (uint64_t)out->len)
		code = om_err(OM_ECORRUPT, "encoded bytes: of %llu plain ones, %llu are wanted",
		              (unsigned long long)c.nbytes, (unsigned long long)out->len);
	return code ? code : om_coded_part(&c, 0, c.parts, out->buf);
}

PyObject *py_decode_into(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames)
{
	static const char *const names[] = { "coded", "out", "check", NULL };
	PyObject *given[3] = { NULL };
	Py_buffer in, out;
	int check, code;

	if (py_args("decode_into", args, nargs, kwnames, names, 2, 3, given))
		return NULL;
	check = given[2] ? PyObject_IsTrue(given[2]) : 1;
	if (check < 0 || PyObject_GetBuffer(given[0], &in, PyBUF_SIMPLE))
		return NULL;
	if (PyObject_GetBuffer(given[1], &out, PyBUF_WRITABLE)) {
		PyBuffer_Release(&in);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS code =
		check ? om_decode(in.buf, (uint64_t)in.len, out.buf, (uint64_t)out.len)
		      : decode_unchecked(&in, &out);
	Py_END_ALLOW_THREADS PyBuffer_Release(&in);
	PyBuffer_Release(&out);
	return code ? py_raise(code) : Py_NewRef(Py_None);
}

/* Is `in` one frame, of these bytes? The core's code; without the GIL. */
static int compare(const Py_buffer *in, const struct py_data *data)
{
	struct om_coded c = { 0 };
	int code = om_coded_open(in->buf, (uint64_t)in->len, &c);

	if (!code && (c.bytes != (uint64_t)in->len || c.nbytes != data->nbytes))
		code = om_err(OM_ECORRUPT,
		              "encoded bytes: %llu of %llu plain ones, not %llu of %llu",
		              (unsigned long long)c.bytes, (unsigned long long)c.nbytes,
		              (unsigned long long)in->len, (unsigned long long)data->nbytes);
	return code ? code : om_coded_compare(&c, data->data);
}

PyObject *py_coded_compare(PyObject *Py_UNUSED(module), PyObject *args)
{
	PyObject *coded, *plain;
	struct py_data data;
	Py_buffer in;
	int code;

	if (!PyArg_ParseTuple(args, "OO:_coded_compare", &coded, &plain) ||
	    PyObject_GetBuffer(coded, &in, PyBUF_SIMPLE))
		return NULL;
	if (py_data_init(&data, plain, true)) {
		PyBuffer_Release(&in);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS code = compare(&in, &data);
	Py_END_ALLOW_THREADS py_data_fini(&data);
	PyBuffer_Release(&in);
	return code ? py_raise(code) : Py_NewRef(Py_None);
}

PyObject *py_coded_info(PyObject *Py_UNUSED(module), PyObject *arg)
{
	enum om_coding coding;
	uint64_t nbytes;
	Py_buffer in;
	int code;

	if (PyObject_GetBuffer(arg, &in, PyBUF_SIMPLE))
		return NULL;
	code = om_coded_info(in.buf, (uint64_t)in.len, &nbytes, &coding);
	PyBuffer_Release(&in);
	return code ? py_raise(code)
	            : Py_BuildValue("(Ks)", (unsigned long long)nbytes, codings[coding]);
}

PyObject *py_codec_use(PyObject *Py_UNUSED(module), PyObject *arg)
{
	static const char *const paths[] = {
		[OM_PATH_AUTO] = "auto",
		[OM_PATH_PLAIN] = "plain",
		[OM_PATH_AVX2] = "avx2",
		[OM_PATH_AVX512] = "avx512",
	};
	const char *name = py_text(arg, "path");

	for (int i = 0; name && i <= OM_PATH_AVX512; i++)
		if (!strcmp(name, paths[i]))
			return PyBool_FromLong(om_codec_use((enum om_codec_path)i));
	if (name)
		PyErr_Format(PyExc_ValueError, "no path '%s'", name);
	return NULL;
}
