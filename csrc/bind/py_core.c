/*
 * py_core: the module omnimem._core: its types, its errors, and the fault points for tests.
 *
 * State is process-wide (the types and the error classes, made once), so the module lives in one
 * interpreter of a process.
 */
#include "bind/py_bind.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- errors ---- */

/* Classes by the name that om_err_class gives; in this order, the first is the fallback. */
static const char *const class_names[] = { "Error",       "LimitError",   "DiskFullError",
	                                   "IOFailure",   "CorruptError", "BusyError",
	                                   "ClosedError", "DeviceError" };
#define CLASSES (sizeof(class_names) / sizeof(class_names[0]))
static PyObject *classes[CLASSES];

static PyObject *find_class(const char *name)
{
	for (size_t i = 0; i < CLASSES; i++)
		if (strcmp(class_names[i], name) == 0)
			return classes[i];
	if (strcmp(name, "KeyError") == 0)
		return PyExc_KeyError;
	if (strcmp(name, "ValueError") == 0)
		return PyExc_ValueError;
	if (strcmp(name, "MemoryError") == 0)
		return PyExc_MemoryError;
	return classes[0];
}

static int load_classes(void)
{
	PyObject *errors = PyImport_ImportModule("omnimem.errors");

	if (!errors)
		return -1;
	for (size_t i = 0; i < CLASSES; i++) {
		classes[i] = PyObject_GetAttrString(errors, class_names[i]);
		if (!classes[i]) {
			Py_DECREF(errors);
			return -1;
		}
	}
	Py_DECREF(errors);
	return 0;
}

static PyObject *text_of(const char *text)
{
	return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

/* errno for the errors that are OSError but come from us. */
static int errno_of(int code)
{
	if (code == OM_EDISKFULL)
		return ENOSPC;
	return code == OM_ECORRUPT ? EIO : -code;
}

static int set_attribute(PyObject *o, const char *name, PyObject *value)
{
	int failed = value ? PyObject_SetAttrString(o, name, value) : -1;

	Py_XDECREF(value);
	return failed;
}

/* The names between '\n' as a tuple. */
static PyObject *holders_of(const char *names)
{
	PyObject *text = text_of(names), *list = NULL, *tuple = NULL;

	if (text && *names)
		list = PyObject_CallMethod(text, "split", "s", "\n");
	else if (text)
		list = PyList_New(0);
	if (list)
		tuple = PyList_AsTuple(list);
	Py_XDECREF(text);
	Py_XDECREF(list);
	return tuple;
}

static int add_details(PyObject *error, int code, const struct om_error *e)
{
	if (code == OM_EBUSY || code == OM_ETIMEOUT)
		return set_attribute(error, "holders", holders_of(e->holders));
	if (code != OM_ELIMIT)
		return 0;
	if (set_attribute(error, "need", PyLong_FromUnsignedLongLong(e->need)) ||
	    set_attribute(error, "used", PyLong_FromUnsignedLongLong(e->used)) ||
	    set_attribute(error, "limit", PyLong_FromUnsignedLongLong(e->limit)))
		return -1;
	return set_attribute(error, "which", text_of(e->which));
}

static PyObject *make_error(PyObject *class, const char *class_name, int code,
                            const struct om_error *e)
{
	const char *said = e->code == code && e->text[0] ? e->text : om_err_text(code);
	bool os = !strcmp(class_name, "IOFailure") || !strcmp(class_name, "DiskFullError") ||
	          !strcmp(class_name, "CorruptError");
	PyObject *text = text_of(said), *file, *error;

	if (!text)
		return NULL;
	if (os && e->filename[0]) {
		file = PyUnicode_DecodeFSDefault(e->filename);
		error = file ? PyObject_CallFunction(class, "iOO", errno_of(code), text, file)
		             : NULL;
		Py_XDECREF(file);
	} else if (os) {
		error = PyObject_CallFunction(class, "iO", errno_of(code), text);
	} else {
		error = PyObject_CallFunctionObjArgs(class, text, NULL);
	}
	Py_DECREF(text);
	return error;
}

PyObject *py_raise(int code)
{
	struct om_error e = *om_err_last(); /* constructing may run code that sets another */
	const char *name = om_err_class(code);
	PyObject *class = find_class(name), *error = make_error(class, name, code, &e);

	if (error && add_details(error, code, &e) == 0)
		PyErr_SetObject(class, error);
	Py_XDECREF(error);
	return NULL;
}

PyObject *py_done(int code)
{
	PyObject *result = NULL;

	if (code == 0)
		result = Py_NewRef(Py_None);
	else if (code != PY_RAISED)
		py_raise(code);
	py_collect();
	return result;
}

PyObject *py_raise_closed(const char *text)
{
	PyErr_SetString(find_class("ClosedError"), text);
	return NULL;
}

PyObject *py_raise_device(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	PyErr_FormatV(find_class("DeviceError"), fmt, ap);
	va_end(ap);
	return NULL;
}

/* ---- fault points, for tests ---- */

static const char *const fault_names[OM_FAULT_COUNT] = {
	[OM_FAULT_ALLOC] = "alloc", [OM_FAULT_MAP] = "map",       [OM_FAULT_SUBMIT] = "submit",
	[OM_FAULT_READ] = "read",   [OM_FAULT_SHORT] = "short",   [OM_FAULT_WRITE] = "write",
	[OM_FAULT_NOSPC] = "nospc", [OM_FAULT_THREAD] = "thread", [OM_FAULT_FLIP] = "flip",
};

static int find_fault(const char *name)
{
	for (int i = 0; i < OM_FAULT_COUNT; i++)
		if (strcmp(fault_names[i], name) == 0)
			return i;
	PyErr_Format(PyExc_ValueError, "no fault point '%s'", name);
	return -1;
}

static PyObject *fault_arm(PyObject *Py_UNUSED(module), PyObject *args)
{
	unsigned long long nth = 1;
	const char *name;
	int sticky = 0, point;

	if (!PyArg_ParseTuple(args, "s|Kp:_fault_arm", &name, &nth, &sticky))
		return NULL;
	point = find_fault(name);
	if (point < 0)
		return NULL;
	om_fault_arm((enum om_fault)point, nth, sticky);
	return Py_NewRef(Py_None);
}

static PyObject *fault_reset(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
	om_fault_reset();
	return Py_NewRef(Py_None);
}

static PyObject *fault_fired(PyObject *Py_UNUSED(module), PyObject *name)
{
	const char *text = py_text(name, "point");
	int point = text ? find_fault(text) : -1;

	return point < 0 ? NULL : PyLong_FromUnsignedLongLong(om_fault_fired((enum om_fault)point));
}

static PyObject *fault_points(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
	PyObject *tuple = PyTuple_New(OM_FAULT_COUNT);

	for (int i = 0; tuple && i < OM_FAULT_COUNT; i++)
		if (PyTuple_SetItem(tuple, i, PyUnicode_FromString(fault_names[i])))
			Py_CLEAR(tuple);
	return tuple;
}

/* (code, bits, lanes) of an element type. */
static PyObject *dtype_code(PyObject *Py_UNUSED(module), PyObject *name)
{
	const char *text = py_text(name, "dtype");
	struct om_dl_type type;

	if (!text || py_dtype_parse(text, &type))
		return NULL;
	return Py_BuildValue("(iii)", type.code, type.bits, type.lanes);
}

static PyObject *collect_last(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
	py_collect_last();
	return Py_NewRef(Py_None);
}

static PyMethodDef functions[] = {
	{ "_fault_arm", fault_arm, METH_VARARGS,
	  "_fault_arm(point, nth=1, sticky=False, /)\n--\n\nMake the nth pass of a fault point fail." },
	{ "_fault_reset", fault_reset, METH_NOARGS,
	  "_fault_reset()\n--\n\nDisarm all fault points." },
	{ "_fault_fired", fault_fired, METH_O,
	  "_fault_fired(point, /)\n--\n\nHow often the armed point fired." },
	{ "_fault_points", fault_points, METH_NOARGS,
	  "_fault_points()\n--\n\nNames of all fault points." },
	{ "_collect_last", collect_last, METH_NOARGS,
	  "_collect_last()\n--\n\nLet producers' memory go that nobody needs any more; no other ever." },
	{ "_dtype_code", dtype_code, METH_O,
	  "_dtype_code(dtype, /)\n--\n\nDLPack (code, bits, lanes) of an element type's name." },
	{ "_same_bytes", py_same_bytes, METH_VARARGS,
	  "_same_bytes(a, b, /)\n--\n\nWhether two buffers or tensors hold the same bytes." },
	{ "_block_setup", py_block_setup, METH_VARARGS,
	  "_block_setup(type, unpacker, /)\n--\n\nThe class made for blocks, and who decodes them." },
	{ "memory", PY_FAST(py_memory), PY_FAST_FLAGS,
	  "memory($module, /, root=None)\n--\n\n(total, available, source) of the tightest of system and "
	  "cgroups, in bytes." },
	{ "encode", PY_FAST(py_encode), PY_FAST_FLAGS,
	  "encode($module, /, data, dtype=None, coding='auto')\n--\n\nThe bytes of a buffer or tensor, "
	  "encoded; None where that saves less than 5 %." },
	{ "encode_into", PY_FAST(py_encode_into), PY_FAST_FLAGS,
	  "encode_into($module, /, data, out, dtype=None, coding='auto')\n--\n\nAs encode, into a buffer; "
	  "how many bytes, 0 for None." },
	{ "encode_bound", py_encode_bound, METH_O,
	  "encode_bound(nbytes, /)\n--\n\nThe room that encode_into needs." },
	{ "decode", py_decode, METH_O, "decode(coded, /)\n--\n\nThe bytes that encode was given." },
	{ "decode_into", PY_FAST(py_decode_into), PY_FAST_FLAGS,
	  "decode_into($module, /, coded, out, check=True)\n--\n\nAs decode, into a buffer of just that "
	  "size." },
	{ "_coded_compare", py_coded_compare, METH_VARARGS,
	  "_coded_compare(coded, data, /)\n--\n\nCorruptError unless coded decodes to data." },
	{ "coded_info", py_coded_info, METH_O,
	  "coded_info(coded, /)\n--\n\n(plain bytes, coding) of what encode made." },
	{ "_codec_use", py_codec_use, METH_O,
	  "_codec_use(path, /)\n--\n\nCode by 'plain', 'avx2', 'avx512' or 'auto'; whether it can." },
	{ "simulate", PY_FAST(py_simulate), PY_FAST_FLAGS,
	  "simulate($module, /, ids, capacity, policy, sizes=None)\n--\n\nRequests, misses, their bytes, "
	  "and how often each expert of \"adaptive\" led." },
	{ "_mark_end", py_mark_end, METH_O,
	  "_mark_end($module, mark, /)\n--\n\n(host, packed, disk): the most bytes while it was open." },
	{ "_totals_closed", py_totals_closed, METH_NOARGS,
	  "_totals_closed($module, /)\n--\n\n(number of stores closed, what they had counted)." },
	{ NULL, NULL, 0, NULL },
};

/* ---- the module ---- */

static const struct {
	const char *name;
	PyType_Spec *spec;
	PyTypeObject **type;
} types[] = {
	{ "Store", &py_store_spec, &py_store_type },
	{ "Lease", &py_lease_spec, &py_lease_type },
	{ "Window", &py_window_spec, &py_window_type },
	{ "Ticket", &py_ticket_spec, &py_ticket_type },
	{ "Stream", &py_stream_spec, &py_stream_type },
	{ "Hook", &py_hook_spec, &py_hook_type },
	{ "Pressure", &py_pressure_spec, &py_pressure_type },
	{ "Block", &py_block_spec, &py_block_type },
	{ "Ranking", &py_ranking_spec, &py_ranking_type },
	{ "Cache", &py_cache_spec, &py_cache_type },
	{ "Pools", &py_pools_spec, &py_pools_type },
	{ "Monitor", &py_monitor_spec, &py_monitor_type },
};
#define TYPES (sizeof(types) / sizeof(types[0]))

static int make_types(void)
{
	for (size_t i = 0; i < TYPES; i++) {
		*types[i].type = (PyTypeObject *)PyType_FromSpec(types[i].spec);
		if (!*types[i].type)
			return -1;
	}
	return 0;
}

static int module_exec(PyObject *module)
{
	static int64_t home = -1; /* the interpreter that the types belong to */
	int64_t here = PyInterpreterState_GetID(PyInterpreterState_Get());

	if (home >= 0 && home != here) {
		PyErr_SetString(
			PyExc_ImportError,
			"omnimem works in one interpreter of a process, and another has it");
		return -1;
	}
	if (home < 0 && (load_classes() || make_types()))
		return -1;
	home = here;
	for (size_t i = 0; i < TYPES; i++)
		if (PyModule_AddObjectRef(module, types[i].name, (PyObject *)*types[i].type))
			return -1;
	return 0;
}

static PyModuleDef_Slot slots[] = {
	{ Py_mod_exec, module_exec },
	{ 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "omnimem._core",
	.m_doc = "The C core of omnimem. Use the package omnimem, not this module.",
	.m_methods = functions,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void)
{
	return PyModuleDef_Init(&definition);
}
