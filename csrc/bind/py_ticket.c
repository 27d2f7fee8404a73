/*
 * py_ticket: Store.prefetch and _core.Ticket, a promise that blocks come to memory.
 *
 * Owns one ticket of the core and a reference on its store.
 */
#include "bind/py_bind.h"

#include <stdlib.h>

PyTypeObject *py_ticket_type;

struct py_ticket {
	PyObject_HEAD struct om_ticket *t;
	struct py_core *core;
};

PyObject *py_ticket_new(struct py_core *core, struct om_ticket *t)
{
	struct py_ticket *o = PyObject_New(struct py_ticket, py_ticket_type);

	if (!o) {
		om_ticket_free(t);
		return NULL;
	}
	o->t = t;
	o->core = py_core_ref(core);
	return (PyObject *)o;
}

/* The names of a sequence, as text that the tuple keeps alive; NULL with an exception. */
static const char **name_array(PyObject *tuple)
{
	size_t count = (size_t)PyTuple_Size(tuple);
	const char **names = calloc(count + 1, sizeof(*names));

	if (!names) {
		PyErr_NoMemory();
		return NULL;
	}
	for (size_t i = 0; i < count; i++) {
		names[i] = py_text(PyTuple_GetItem(tuple, (Py_ssize_t)i), "a name");
		if (!names[i]) {
			free(names);
			return NULL;
		}
	}
	return names;
}

PyObject *py_store_prefetch(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames);

PyObject *py_store_prefetch(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames)
{
	static const char *const keywords[] = { "names", NULL };
	struct py_core *core = py_store_core(self);
	PyObject *list = NULL, *tuple, *result = NULL;
	struct om_ticket *t = NULL;
	const char **names;
	int code;

	if (!core || py_args("prefetch", args, nargs, kwnames, keywords, 1, 1, &list))
		return NULL;
	if (PyUnicode_Check(list)) {
		PyErr_SetString(PyExc_TypeError,
		                "prefetch() takes a sequence of names, not one str");
		return NULL;
	}
	tuple = PySequence_Tuple(list);
	names = tuple ? name_array(tuple) : NULL;
	if (names) {
		Py_BEGIN_ALLOW_THREADS code =
			om_store_prefetch(core->s, names, (size_t)PyTuple_Size(tuple), &t);
		Py_END_ALLOW_THREADS result = code ? py_raise(code) : py_ticket_new(core, t);
	}
	free(names);
	Py_XDECREF(tuple);
	py_collect();
	return result;
}

static void ticket_dealloc(PyObject *self)
{
	struct py_ticket *o = (struct py_ticket *)self;
	PyTypeObject *type = Py_TYPE(self);

	om_ticket_free(o->t);
	py_core_unref(o->core);
	PyObject_Free(self);
	Py_DECREF(type);
}

static int call_wait(void *arg, uint64_t deadline_ns)
{
	return om_ticket_wait(arg, deadline_ns);
}

static PyObject *ticket_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const names[] = { "timeout", NULL };
	struct py_ticket *o = (struct py_ticket *)self;
	PyObject *timeout = NULL, *result;
	uint64_t deadline_ns;
	int code;

	if (py_args("wait", args, nargs, kwnames, names, 0, 1, &timeout) ||
	    py_deadline(timeout ? timeout : Py_None, &deadline_ns))
		return NULL;
	code = py_wait(call_wait, o->t, deadline_ns);
	if (code == 0 || code == OM_EBUSY)
		result = PyBool_FromLong(code == 0);
	else
		result = code == PY_RAISED ? NULL : py_raise(code);
	py_collect();
	return result;
}

static PyObject *ticket_cancel(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_ticket *o = (struct py_ticket *)self;

	Py_BEGIN_ALLOW_THREADS om_ticket_cancel(o->t);
	Py_END_ALLOW_THREADS return Py_NewRef(Py_None);
}

static PyObject *get_done(PyObject *self, void *Py_UNUSED(unused))
{
	return PyBool_FromLong(om_ticket_done(((struct py_ticket *)self)->t));
}

PyDoc_STRVAR(
	wait_doc,
	"wait($self, timeout=None)\n--\n\n"
	"True when all blocks are in memory, False at the deadline; raises what a move raised.");
PyDoc_STRVAR(cancel_doc, "cancel($self, /)\n--\n\nDrop what is queued or in flight.");

static PyMethodDef ticket_methods[] = {
	{ "wait", PY_FAST(ticket_wait), PY_FAST_FLAGS, wait_doc },
	{ "cancel", ticket_cancel, METH_NOARGS, cancel_doc },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef ticket_getset[] = {
	{ "done", get_done, NULL, "True when whole, failed or canceled.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot ticket_slots[] = {
	{ Py_tp_doc, "A promise that blocks come to memory (Store.prefetch)." },
	{ Py_tp_dealloc, ticket_dealloc },
	{ Py_tp_methods, ticket_methods },
	{ Py_tp_getset, ticket_getset },
	{ 0, NULL },
};

PyType_Spec py_ticket_spec = {
	.name = "omnimem._core.Ticket",
	.basicsize = sizeof(struct py_ticket),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = ticket_slots,
};
