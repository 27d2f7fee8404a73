/*
 * py_args: arguments of the hot methods without the parsing helpers, and waits that see Ctrl-C.
 *
 * Owns nothing. The GIL is dropped only inside py_wait. Fails with a Python exception.
 */
#include "bind/py_bind.h"

#include <math.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SLICE_NS  (OM_NSEC / 10) /* signals are seen this often, by the main thread */
#define OTHERS_NS OM_NSEC        /* by others, which have none to handle: idle ones are to sleep */
#define PAUSE_NS  (OM_NSEC / 1000) /* after a refusal that came before its deadline */
#define MAX_SIZE  (UINT64_C(1) << 62)

static int find_name(PyObject *key, const char *const *names)
{
	for (int i = 0; names[i]; i++)
		if (PyUnicode_CompareWithASCIIString(key, names[i]) == 0)
			return i;
	return -1;
}

static int spread_keywords(const char *function, PyObject *const *values, PyObject *kwnames,
                           const char *const *names, PyObject **out)
{
	Py_ssize_t n = PyTuple_Size(kwnames);

	for (Py_ssize_t k = 0; k < n; k++) {
		PyObject *key = PyTuple_GetItem(kwnames, k);
		int i = find_name(key, names);

		if (i < 0) {
			PyErr_Format(PyExc_TypeError, "%s() has no argument '%U'", function, key);
			return -1;
		}
		if (out[i]) {
			PyErr_Format(PyExc_TypeError, "%s() got '%U' twice", function, key);
			return -1;
		}
		out[i] = values[k];
	}
	return 0;
}

int py_args(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
            const char *const *names, int required, int positional, PyObject **out)
{
	if (nargs > positional) {
		PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments, got %zd",
		             function, positional, nargs);
		return -1;
	}
	for (Py_ssize_t i = 0; i < nargs; i++)
		out[i] = args[i];
	if (kwnames && spread_keywords(function, args + nargs, kwnames, names, out))
		return -1;
	for (int i = 0; i < required; i++)
		if (!out[i]) {
			PyErr_Format(PyExc_TypeError, "%s() misses argument '%s'", function,
			             names[i]);
			return -1;
		}
	return 0;
}

const char *py_text(PyObject *o, const char *what)
{
	Py_ssize_t size;
	const char *text;

	if (om_unlikely(!PyUnicode_Check(o))) {
		PyErr_Format(PyExc_TypeError, "%s must be a str, not %R", what, Py_TYPE(o));
		return NULL;
	}
	text = PyUnicode_AsUTF8AndSize(o, &size);
	if (om_unlikely(text && strlen(text) != (size_t)size)) {
		PyErr_Format(PyExc_ValueError, "%s has a NUL character: %R", what, o);
		return NULL;
	}
	return text;
}

int py_text_or_null(PyObject *o, const char *what, const char **ret)
{
	*ret = NULL;
	if (!o || o == Py_None)
		return 0;
	*ret = py_text(o, what);
	return *ret ? 0 : -1;
}

int py_size(PyObject *o, const char *what, uint64_t *ret)
{
	PyObject *index = PyNumber_Index(o);
	unsigned long long value;

	if (!index) {
		PyErr_Clear();
		PyErr_Format(PyExc_TypeError, "%s must be an int, not %R", what, Py_TYPE(o));
		return -1;
	}
	value = PyLong_AsUnsignedLongLong(index);
	Py_DECREF(index);
	if (PyErr_Occurred() || value > MAX_SIZE) {
		PyErr_Clear();
		PyErr_Format(PyExc_ValueError, "%s=%R must lie between 0 and 2**62", what, o);
		return -1;
	}
	*ret = value;
	return 0;
}

int py_deadline(PyObject *timeout, uint64_t *ret)
{
	double seconds;

	if (!timeout) {
		*ret = om_deadline(PY_DEFAULT_TIMEOUT_NS);
		return 0;
	}
	if (timeout == Py_None) {
		*ret = UINT64_MAX;
		return 0;
	}
	seconds = PyFloat_AsDouble(timeout);
	if (seconds == -1.0 && PyErr_Occurred()) {
		PyErr_Clear();
		PyErr_Format(PyExc_TypeError, "timeout must be seconds or None, not %R",
		             Py_TYPE(timeout));
		return -1;
	}
	if (!(seconds >= 0)) {
		PyErr_Format(PyExc_ValueError,
		             "timeout=%R must be seconds from 0, or None to wait for ever",
		             timeout);
		return -1;
	}
	/* 2^63 ns are 292 years: more than that is for ever. */
	*ret = seconds < 9.2e9 ? om_deadline((uint64_t)(seconds * 1e9)) : UINT64_MAX;
	return 0;
}

/* A call that refuses before its deadline must not become a busy loop. */
static void pause_until(uint64_t deadline_ns)
{
	uint64_t now = om_now(), left = deadline_ns > now ? deadline_ns - now : 0;
	struct timespec ts = { .tv_nsec = (long)OM_MIN(left, PAUSE_NS) };

	if (left)
		nanosleep(&ts, NULL);
}

int py_wait(int (*call)(void *arg, uint64_t deadline_ns), void *arg, uint64_t deadline_ns)
{
	uint64_t slice_ns = gettid() == getpid() ? SLICE_NS : OTHERS_NS;

	for (;;) {
		uint64_t slice = om_deadline(slice_ns);
		bool last = deadline_ns <= slice;
		int code;

		Py_BEGIN_ALLOW_THREADS code = call(arg, last ? deadline_ns : slice);
		if (code == OM_EBUSY && !last && om_now() < slice)
			pause_until(slice);
		Py_END_ALLOW_THREADS if (code != OM_EBUSY || last) return code;
		if (PyErr_CheckSignals())
			return PY_RAISED;
	}
}
