/*
 * py_hook: _core.Hook, what torch calls before and after a module that uses a unit, and instead of it.
 *
 * While all units of a stream are kept and bound, a user of one is only to be counted: that is done here, without
 * Python. In all other cases the methods that a subclass has, `come` and `go`, do it. Either way the lists of
 * the thread (`_Mine` in _torch_units.py) are the record of what it has entered; what is entered and noted, or
 * left and taken off, is so in one call, inside of which no signal handler runs.
 *
 * Any hook at all makes torch's way through a module several times as long. `call` goes its short way, that of a
 * module without hooks, where these are the only ones; else it calls what it stands for. All under the GIL.
 */
#include "bind/py_stream.h"

#include <stdlib.h>

PyTypeObject *py_hook_type;

enum name { ENTERED, COME, GO, FORWARD, LEAVES, ENTERS, BACKWARD, BACKWARD_PRE, NAMES };
static const char *const texts[NAMES] = { "entered",
	                                  "come",
	                                  "go",
	                                  "forward",
	                                  "_forward_hooks",
	                                  "_forward_pre_hooks",
	                                  "_backward_hooks",
	                                  "_backward_pre_hooks" };
static PyObject *names[NAMES]; /* interned, made with the first hook */

struct py_hook {
	PyObject_HEAD PyObject *stream, *number; /* of its unit */
	PyObject *mine;                          /* threading.local */
	PyObject *module, *plain;                /* and how it is called without us */
	PyObject *tracing, *others;              /* is torch tracing? the hooks of all modules */
	size_t unit;
	bool *inside; /* a unit: may be entered while it is */
};

/* The lists of this thread, as `_Mine.entered` has them. */
struct py_entered {
	PyObject *all, *held, *ended, *passes;
	size_t last; /* the unit that was entered last; SIZE_MAX: none */
};

static bool take_apart(struct py_entered *e)
{
	Py_ssize_t n;

	if (!PyTuple_Check(e->all) || PyTuple_Size(e->all) != 4)
		return false;
	e->held = PyTuple_GetItem(e->all, 1);
	e->ended = PyTuple_GetItem(e->all, 2);
	e->passes = PyTuple_GetItem(e->all, 3);
	if (!PyList_Check(e->held) || !PyList_Check(e->ended) || !PyList_Check(e->passes))
		return false;
	n = PyList_Size(e->held);
	e->last = n ? PyLong_AsSize_t(PyList_GetItem(e->held, n - 1)) : SIZE_MAX;
	return !PyErr_Occurred();
}

static int read_entered(struct py_hook *o, struct py_entered *e)
{
	e->all = PyObject_GetAttr(o->mine, names[ENTERED]);
	if (!e->all)
		return -1;
	if (take_apart(e))
		return 0;
	if (!PyErr_Occurred())
		PyErr_SetString(PyExc_TypeError,
		                "entered is a tuple (thread, held, ended, passes) with lists");
	Py_DECREF(e->all);
	return -1;
}

/* Hooks that came later see the weights, too, as long as the one that leaves is the last. -1: an exception. */
static int leaves_last(struct py_hook *o, PyObject *module)
{
	PyObject *hooks = PyObject_GetAttr(module, names[LEAVES]), *reversed = NULL, *key = NULL,
		 *last;
	int found = hooks && PyDict_Check(hooks) && PyDict_Size(hooks) == 1;

	if (hooks && PyDict_Check(hooks) && !found) {
		reversed = PyObject_CallFunctionObjArgs((PyObject *)&PyReversed_Type, hooks, NULL);
		key = reversed ? PyIter_Next(reversed) : NULL;
		last = key ? PyDict_GetItemWithError(hooks, key) : NULL;
		found = last && PyCFunction_CheckExact(last) &&
		        PyCFunction_GetSelf(last) == (PyObject *)o;
	}
	Py_XDECREF(key);
	Py_XDECREF(reversed);
	Py_XDECREF(hooks);
	return PyErr_Occurred() ? -1 : found;
}

/* Is there nothing to be done but to count a user? Not where an interrupt left something to take away, nor outside
 * any pass, nor while a unit is entered that this one is no part of. */
static bool goes_on(const struct py_hook *o, const struct py_entered *e)
{
	const struct py_stream *s = (const struct py_stream *)o->stream;

	return s->st && PyList_Size(e->ended) == 0 &&
	       (e->last < s->count ? o->inside[e->last] : PyList_Size(e->passes) > 0);
}

static int join(struct py_hook *o, const struct py_entered *e, bool *ret_done)
{
	struct om_stream *st = ((struct py_stream *)o->stream)->st;

	if (!goes_on(o, e))
		return 0;
	*ret_done = om_stream_join(st, o->unit);
	if (!*ret_done || !PyList_Append(e->held, o->number))
		return 0;
	if (!om_stream_part(st,
	                    o->unit)) /* kept no longer, meanwhile: the next hook takes it away */
		(void)om_stream_leave(st, o->unit, &(bool){ 0 });
	return -1;
}

/* Enter the unit, if that is only to count a user: *ret_done. -1: an exception. */
static int enter(struct py_hook *o, bool *ret_done)
{
	struct py_entered e;
	int failed;

	if (read_entered(o, &e))
		return -1;
	failed = join(o, &e, ret_done);
	Py_DECREF(e.all);
	return failed;
}

static PyObject *hook_enter(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
	struct py_hook *o = (struct py_hook *)self;
	bool done = false;
	int last;

	if (nargs != 2)
		return PyErr_Format(PyExc_TypeError, "enter() takes a module and its arguments");
	last = leaves_last(o, args[0]);
	if (last < 0 || (last && enter(o, &done)))
		return NULL;
	return done ? Py_NewRef(Py_None)
	            : PyObject_CallMethodObjArgs(self, names[COME], args[0], NULL);
}

/* Take off the unit that was entered last, if it is this one and stays bound. -1: an exception. */
static int part(struct py_hook *o)
{
	struct om_stream *st = ((struct py_stream *)o->stream)->st;
	struct py_entered e;
	Py_ssize_t n;
	int done;

	if (read_entered(o, &e))
		return -1;
	n = PyList_Size(e.held);
	done = st && PyList_Size(e.ended) == 0 && e.last == o->unit && om_stream_part(st, o->unit);
	if (done && PyList_SetSlice(e.held, n - 1, n, NULL))
		done = -1;
	Py_DECREF(e.all);
	return done;
}

static PyObject *hook_leave(PyObject *self, PyObject *const *Py_UNUSED(args), Py_ssize_t nargs)
{
	int done;

	if (nargs != 3)
		return PyErr_Format(PyExc_TypeError,
		                    "leave() takes a module, its arguments and its output");
	done = part((struct py_hook *)self);
	if (done < 0)
		return NULL;
	return done ? Py_NewRef(Py_None) : PyObject_CallMethodObjArgs(self, names[GO], NULL);
}

/* ---- instead of a module's call ---- */

/* Has the module none of these hooks, or, with `own`, just ours? */
static bool only(struct py_hook *o, enum name which, bool own)
{
	PyObject *hooks = PyObject_GetAttr(o->module, names[which]), *key, *value;
	Py_ssize_t at = 0;
	bool is = hooks && PyDict_Check(hooks) && PyDict_Size(hooks) == own;

	if (is && own)
		is = PyDict_Next(hooks, &at, &key, &value) && PyCFunction_CheckExact(value) &&
		     PyCFunction_GetSelf(value) == (PyObject *)o;
	Py_XDECREF(hooks);
	return is;
}

/* Would torch just call `forward`, were it not for us? An exception stops it. */
static bool is_plain(struct py_hook *o)
{
	PyObject *state;

	for (Py_ssize_t i = 0; i < PyTuple_Size(o->others); i++)
		if (PyDict_Size(PyTuple_GetItem(o->others, i)) != 0)
			return false;
	if (!only(o, ENTERS, true) || !only(o, LEAVES, true) || !only(o, BACKWARD, false) ||
	    !only(o, BACKWARD_PRE, false))
		return false;
	state = PyObject_CallObject(o->tracing, NULL);
	Py_XDECREF(state);
	return state == Py_None;
}

/* The unit is left whatever came of it; what goes wrong then is told, unless something had before. */
static PyObject *leave_with(struct py_hook *o, PyObject *result)
{
	PyObject *type = NULL, *value = NULL, *trace = NULL, *gone = NULL;
	int done;

	if (!result)
		PyErr_Fetch(&type, &value, &trace);
	done = part(o);
	if (!done)
		gone = PyObject_CallMethodObjArgs((PyObject *)o, names[GO], NULL);
	if (done < 0 || (!done && !gone)) {
		if (type)
			PyErr_WriteUnraisable((PyObject *)o);
		Py_CLEAR(result);
	}
	Py_XDECREF(gone);
	if (type)
		PyErr_Restore(type, value, trace);
	return result;
}

static PyObject *hook_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
	struct py_hook *o = (struct py_hook *)self;
	PyObject *forward, *result;
	bool done = false;

	if ((is_plain(o) && enter(o, &done)) || PyErr_Occurred())
		return NULL;
	if (!done)
		return PyObject_Call(o->plain, args, kwargs);
	forward = PyObject_GetAttr(o->module, names[FORWARD]);
	result = forward ? PyObject_Call(forward, args, kwargs) : NULL;
	Py_XDECREF(forward);
	return leave_with(o, result);
}

/* ---- life ---- */

static int read_outer(struct py_hook *o, PyObject *outer)
{
	size_t count = ((struct py_stream *)o->stream)->count;
	PyObject *units = PySequence_Tuple(outer);

	o->inside = calloc(count, sizeof(*o->inside));
	if (units && !o->inside)
		PyErr_NoMemory();
	for (Py_ssize_t i = 0; units && o->inside && i < PyTuple_Size(units); i++) {
		size_t unit;

		if (py_stream_place((struct py_stream *)o->stream, PyTuple_GetItem(units, i),
		                    &unit))
			break;
		o->inside[unit] = true;
	}
	Py_XDECREF(units);
	if (PyErr_Occurred())
		return -1;
	o->inside[o->unit] = true;
	return 0;
}

static int make_names(void)
{
	for (int i = 0; i < NAMES; i++)
		if (!names[i] && !(names[i] = PyUnicode_InternFromString(texts[i])))
			return -1;
	return 0;
}

static int read_others(struct py_hook *o, PyObject *others)
{
	o->others = PySequence_Tuple(others);
	if (!o->others)
		return -1;
	for (Py_ssize_t i = 0; i < PyTuple_Size(o->others); i++)
		if (!PyDict_Check(PyTuple_GetItem(o->others, i))) {
			PyErr_SetString(PyExc_TypeError, "others are dicts of hooks");
			return -1;
		}
	return 0;
}

static PyObject *hook_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *words[] = { "stream", "unit",    "outer",  "mine",
		                 "module", "tracing", "others", NULL };
	PyObject *stream, *number, *outer, *mine, *module, *tracing, *others;
	struct py_hook *o;
	size_t unit;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OOOOOO:Hook", words, py_stream_type,
	                                 &stream, &number, &outer, &mine, &module, &tracing,
	                                 &others) ||
	    py_stream_place((struct py_stream *)stream, number, &unit) || make_names())
		return NULL;
	o = (struct py_hook *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (!o)
		return NULL;
	o->stream = Py_NewRef(stream);
	o->number = Py_NewRef(number);
	o->mine = Py_NewRef(mine);
	o->module = Py_NewRef(module);
	o->tracing = Py_NewRef(tracing);
	o->plain = PyObject_GetAttrString(module, "_call_impl");
	o->unit = unit;
	if (!o->plain || read_others(o, others) || read_outer(o, outer)) {
		Py_DECREF(o);
		return NULL;
	}
	return (PyObject *)o;
}

/* The module has us, and we have it; its own dict is where that ends. */
static int hook_traverse(PyObject *self, visitproc visit, void *arg)
{
	struct py_hook *o = (struct py_hook *)self;

	Py_VISIT(Py_TYPE(self));
	Py_VISIT(o->mine);
	Py_VISIT(o->module);
	Py_VISIT(o->plain);
	Py_VISIT(o->tracing);
	Py_VISIT(o->others);
	return 0;
}

static void hook_dealloc(PyObject *self)
{
	struct py_hook *o = (struct py_hook *)self;
	PyTypeObject *type = Py_TYPE(self);

	PyObject_GC_UnTrack(self);
	Py_XDECREF(o->stream);
	Py_XDECREF(o->number);
	Py_XDECREF(o->mine);
	Py_XDECREF(o->module);
	Py_XDECREF(o->plain);
	Py_XDECREF(o->tracing);
	Py_XDECREF(o->others);
	free(o->inside);
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

PyDoc_STRVAR(enter_doc, "enter($self, module, args, /)\n--\n\n"
                        "A forward pre-hook: count a user of the unit, or call come(module).");
PyDoc_STRVAR(leave_doc, "leave($self, module, args, output, /)\n--\n\n"
                        "A forward hook: count one user less, or call go().");

PyDoc_STRVAR(call_doc, "call($self, /, *args, **kwargs)\n--\n\n"
                       "In place of the module's `_call_impl`.");

static PyMethodDef hook_methods[] = {
	{ "enter", PY_FAST(hook_enter), METH_FASTCALL, enter_doc },
	{ "leave", PY_FAST(hook_leave), METH_FASTCALL, leave_doc },
	{ "call", PY_FAST(hook_call), METH_VARARGS | METH_KEYWORDS, call_doc },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot hook_slots[] = {
	{ Py_tp_doc,
	  "Hook(stream, unit, outer, mine, module, tracing, others)\n--\n\n"
	  "What is called before and after a module that uses a unit, which may be entered inside of "
	  "`outer`. `mine.entered`: this thread's (thread, held, ended, passes)." },
	{ Py_tp_new, hook_new },
	{ Py_tp_dealloc, hook_dealloc },
	{ Py_tp_traverse, hook_traverse },
	{ Py_tp_methods, hook_methods },
	{ 0, NULL },
};

PyType_Spec py_hook_spec = {
	.name = "omnimem._core.Hook",
	.basicsize = sizeof(struct py_hook),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
	.slots = hook_slots,
};
