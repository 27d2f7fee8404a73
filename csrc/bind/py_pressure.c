/* py_pressure: _core.Pressure and _core.memory. */
#include "bind/py_bind.h"

struct py_pressure {
	PyObject_HEAD struct om_pressure *p; /* NULL: not initialised */
};

PyTypeObject *py_pressure_type;

int py_thresholds(PyObject *o, double ret[3])
{
	PyObject *list = PySequence_List(o);

	if (!list)
		return -1;
	if (PyList_Size(list) != 3) {
		PyErr_Format(PyExc_ValueError,
		             "thresholds must be three, of MEDIUM, HIGH and "
		             "CRITICAL, not %R",
		             o);
		Py_DECREF(list);
		return -1;
	}
	for (int i = 0; i < 3; i++) {
		ret[i] = PyFloat_AsDouble(PyList_GetItem(list, i));
		if (PyErr_Occurred()) {
			Py_DECREF(list);
			return -1;
		}
	}
	Py_DECREF(list);
	return 0;
}

static int give_thresholds(struct py_pressure *me, PyObject *o)
{
	double thresholds[3];
	int code;

	if (py_thresholds(o, thresholds))
		return -1;
	code = me->p ? om_pressure_set(me->p, thresholds) : om_pressure_create(thresholds, &me->p);
	if (code)
		py_raise(code);
	return code ? -1 : 0;
}

static int pressure_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "thresholds", NULL };
	PyObject *given;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Pressure", names, &given))
		return -1;
	return give_thresholds((struct py_pressure *)self, given);
}

static void pressure_dealloc(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	om_pressure_free(((struct py_pressure *)self)->p);
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

static struct om_pressure *pressure_of(PyObject *self)
{
	struct om_pressure *p = ((struct py_pressure *)self)->p;

	if (!p)
		PyErr_SetString(PyExc_RuntimeError, "Pressure.__init__ was not called");
	return p;
}

static PyObject *pressure_feed(PyObject *self, PyObject *usage)
{
	struct om_pressure *p = pressure_of(self);
	double share = p ? PyFloat_AsDouble(usage) : 0;

	return p && !PyErr_Occurred() ? PyLong_FromLong((long)om_pressure_feed(p, share)) : NULL;
}

static PyObject *pressure_trend(PyObject *self, PyObject *unused)
{
	struct om_pressure *p = pressure_of(self);

	(void)unused;
	return p ? PyLong_FromLong(om_pressure_trend(p)) : NULL;
}

static PyObject *get_thresholds(PyObject *self, void *unused)
{
	struct om_pressure *p = pressure_of(self);
	double t[3];

	(void)unused;
	if (!p)
		return NULL;
	om_pressure_get(p, t);
	return Py_BuildValue("(ddd)", t[0], t[1], t[2]);
}

static int set_thresholds(PyObject *self, PyObject *value, void *unused)
{
	struct om_pressure *p = pressure_of(self);

	(void)unused;
	if (p && !value)
		PyErr_SetString(PyExc_AttributeError, "thresholds cannot be deleted");
	return p && value ? give_thresholds((struct py_pressure *)self, value) : -1;
}

static PyMethodDef methods[] = {
	{ "feed", pressure_feed, METH_O,
	  "feed($self, usage, /)\n--\n\nThe level, 0 to 3, with a new share in use." },
	{ "trend", pressure_trend, METH_NOARGS,
	  "trend($self, /)\n--\n\n1 rising, -1 falling, 0 neither, over the last minute." },
	{ NULL, NULL, 0, NULL },
};
static PyGetSetDef getset[] = {
	{ "thresholds", get_thresholds, set_thresholds,
	  "Shares in use at which MEDIUM, HIGH and CRITICAL begin.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};
static PyType_Slot slots[] = {
	{ Py_tp_doc, "Pressure(thresholds)\n--\n\nA level of memory pressure, with hysteresis." },
	{ Py_tp_init, pressure_init },
	{ Py_tp_dealloc, pressure_dealloc },
	{ Py_tp_methods, methods },
	{ Py_tp_getset, getset },
	{ 0, NULL },
};
PyType_Spec py_pressure_spec = { "omnimem._core.Pressure", sizeof(struct py_pressure), 0,
	                         Py_TPFLAGS_DEFAULT, slots };

PyObject *py_memory(PyObject *module, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = { "root", NULL };
	struct om_memory m;
	PyObject *given[1] = { NULL };
	const char *root;
	int code;

	(void)module;
	if (py_args("memory", args, nargs, kwnames, names, 0, 1, given) ||
	    py_text_or_null(given[0], "root", &root))
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_memory_now(root, &m);
	Py_END_ALLOW_THREADS return code
		? py_raise(code)
		: Py_BuildValue("(KKs)", (unsigned long long)m.total_bytes,
	                        (unsigned long long)m.available_bytes, m.source);
}
