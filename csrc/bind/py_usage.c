/* py_usage: the store's methods about use and pressure: when groups are used, and giving memory up. */
#include "bind/py_bind.h"

#include <math.h>

PyObject *py_store_use_begin(PyObject *self, PyObject *group)
{
	struct py_core *core = py_store_core(self);
	const char *text = core ? py_text(group, "group") : NULL;

	return text ? py_done(om_store_use_begin(core->s, text)) : NULL;
}

PyObject *py_store_use_end(PyObject *self, PyObject *group)
{
	struct py_core *core = py_store_core(self);
	const char *text = core ? py_text(group, "group") : NULL;

	return text ? py_done(om_store_use_end(core->s, text)) : NULL;
}

static double seconds(uint64_t ns)
{
	return (double)ns / 1e9;
}

/* (uses, recent, busy, first, last, next, gap), the fields of Usage in order; None: never, unknown. */
PyObject *py_store_usage(PyObject *self, PyObject *args)
{
	struct py_core *core = py_store_core(self);
	const char *group;
	struct om_usage u;
	double window;
	int code;

	if (!core || !PyArg_ParseTuple(args, "sd:_usage", &group, &window))
		return NULL;
	if (!(window >= 0)) {
		PyErr_Format(PyExc_ValueError, "window=%R must be seconds, 0 or more",
		             PyTuple_GetItem(args, 1));
		return NULL;
	}
	code = om_store_usage(core->s, group, window < 1e9 ? (uint64_t)(window * 1e9) : UINT64_MAX,
	                      &u);
	if (code)
		return py_raise(code);
	return Py_BuildValue("(KKIdddd)", (unsigned long long)u.uses, (unsigned long long)u.recent,
	                     u.busy, seconds(u.first_ns), seconds(u.last_ns), seconds(u.next_ns),
	                     seconds(u.gap_ns));
}

static int call_press(void *arg, uint64_t deadline_ns)
{
	return om_press_wait(arg, deadline_ns);
}

/* (trimmed, dropped bytes, dropped blocks, written bytes, written blocks, left bytes): the fields of Pressed. */
PyObject *py_store_press(PyObject *self, PyObject *args)
{
	struct py_core *core = py_store_core(self);
	PyObject *nbytes, *timeout;
	struct om_press *press;
	struct om_pressed p;
	uint64_t deadline_ns, bytes;
	double ceiling;
	int level, code;

	if (!core || !PyArg_ParseTuple(args, "iOdO:_press", &level, &nbytes, &ceiling, &timeout) ||
	    py_size(nbytes, "nbytes", &bytes) || py_deadline(timeout, &deadline_ns))
		return NULL;
	if (level < OM_LOW || level > OM_CRITICAL) {
		PyErr_Format(PyExc_ValueError, "level=%d must be 0 (low) to 3 (critical)", level);
		return NULL;
	}
	code = om_press_begin(core->s, (enum om_level)level, ceiling, bytes, &press);
	if (code)
		return py_raise(code);
	code = py_wait(call_press, press, deadline_ns);
	if (code && code != PY_RAISED)
		py_raise(code);
	om_press_end(press, &p);
	py_collect(); /* what was taken from a producer goes back to it */
	if (code)
		return NULL;
	return Py_BuildValue(
		"(KKKKKK)", (unsigned long long)p.trimmed_bytes,
		(unsigned long long)p.dropped_bytes, (unsigned long long)p.dropped_blocks,
		(unsigned long long)p.written_bytes, (unsigned long long)p.written_blocks,
		(unsigned long long)p.left_bytes);
}
