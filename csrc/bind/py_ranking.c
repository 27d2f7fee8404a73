/*
 * py_ranking: _core.Ranking, the order in which members go. Owns the ranking of the core, and knows
 * numbers only: which object is meant by a slot, and what is pinned, is its user's. The GIL, held
 * throughout, is the serialising that the core asks for.
 */
#include "bind/py_bind.h"

struct py_ranking {
	PyObject_HEAD struct om_ranking *r;
};

PyTypeObject *py_ranking_type;

static struct om_ranking *ranking_of(PyObject *self)
{
	return ((struct py_ranking *)self)->r;
}

static PyObject *ranking_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "policy", "capacity", NULL };
	PyObject *given = NULL, *o;
	uint64_t capacity = 0;
	const char *policy;
	int code;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|O:Ranking", names, &policy, &given) ||
	    (given && py_size(given, "capacity", &capacity)))
		return NULL;
	o = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (!o)
		return NULL;
	code = om_ranking_create(policy, capacity, &((struct py_ranking *)o)->r);
	if (code) {
		py_raise(code);
		Py_DECREF(o);
		return NULL;
	}
	return o;
}

static void ranking_dealloc(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);

	om_ranking_free(ranking_of(self));
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

static PyObject *none_or_raise(int code)
{
	return code ? py_raise(code) : Py_NewRef(Py_None);
}

static PyObject *ranking_add(PyObject *self, PyObject *args)
{
	PyObject *size;
	uint64_t bytes;
	long long known;
	double used_at;
	int64_t slot;

	if (!PyArg_ParseTuple(args, "LOd:add", &known, &size, &used_at) ||
	    py_size(size, "size", &bytes))
		return NULL;
	slot = om_ranking_add(ranking_of(self), known, bytes, used_at);
	return slot < 0 ? py_raise((int)slot) : PyLong_FromLongLong(slot);
}

static PyObject *ranking_remove(PyObject *self, PyObject *slot)
{
	long long at = PyLong_AsLongLong(slot);

	return PyErr_Occurred() ? NULL : none_or_raise(om_ranking_remove(ranking_of(self), at));
}

static PyObject *ranking_access(PyObject *self, PyObject *args)
{
	long long slot;
	double used_at;

	return PyArg_ParseTuple(args, "Ld:access", &slot, &used_at)
	               ? none_or_raise(om_ranking_access(ranking_of(self), slot, used_at))
	               : NULL;
}

static PyObject *ranking_pass_by(PyObject *self, PyObject *args)
{
	long long slot;
	int pass;

	return PyArg_ParseTuple(args, "Lp:pass_by", &slot, &pass)
	               ? none_or_raise(om_ranking_pass(ranking_of(self), slot, pass))
	               : NULL;
}

static PyObject *ranking_victim(PyObject *self, PyObject *Py_UNUSED(unused))
{
	int64_t slot = om_ranking_victim(ranking_of(self));

	return slot < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(slot);
}

static PyMethodDef methods[] = {
	{ "add", ranking_add, METH_VARARGS,
	  "add($self, known, size, used_at, /)\n--\n\nThe slot of a member that comes in; known: its "
	  "former slot, or -1." },
	{ "remove", ranking_remove, METH_O,
	  "remove($self, slot, /)\n--\n\nIs no member any more." },
	{ "access", ranking_access, METH_VARARGS,
	  "access($self, slot, used_at, /)\n--\n\nIs used: nobody is more recent." },
	{ "pass_by", ranking_pass_by, METH_VARARGS,
	  "pass_by($self, slot, passed, /)\n--\n\nWhether victim passes it by, until its next use." },
	{ "victim", ranking_victim, METH_NOARGS,
	  "victim($self, /)\n--\n\nThe slot of the member to give up, or None." },
	{ NULL, NULL, 0, NULL },
};
static PyType_Slot slots[] = {
	{ Py_tp_doc,
	  "Ranking(policy, capacity=0)\n--\n\nWho goes next among members kept elsewhere." },
	{ Py_tp_new, ranking_new },
	{ Py_tp_dealloc, ranking_dealloc },
	{ Py_tp_methods, methods },
	{ 0, NULL },
};
PyType_Spec py_ranking_spec = {
	.name = "omnimem._core.Ranking",
	.basicsize = sizeof(struct py_ranking),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = slots,
};
