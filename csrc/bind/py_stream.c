/*
 * py_stream: _core.Stream, units of blocks that pass through a ring.
 *
 * Owns one stream of the core, and a record of each unit. What the units' windows look like is in
 * py_stream_windows.c.
 */
#include "bind/py_stream.h"

#include <stdlib.h>

PyTypeObject *py_stream_type;

static void free_units(struct py_unit *units, size_t count)
{
	for (size_t i = 0; units && i < count; i++) {
		py_unit_clear_windows(&units[i]);
		free(units[i].keep);
		free(units[i].nbytes);
	}
	free(units);
}

/* ---- creation ---- */

/* Blocks of one unit: names into `names`, the rest into `u`. */
static int read_blocks(struct py_core *core, PyObject *tuple, struct py_unit *u, const char **names)
{
	struct om_info info;

	for (size_t i = 0; i < u->blocks; i++) {
		PyObject *pair = PyTuple_GetItem(tuple, (Py_ssize_t)i);
		uint64_t keep;
		int code;

		if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) {
			PyErr_SetString(PyExc_TypeError,
			                "a unit's block is a tuple (name, what is kept)");
			return -1;
		}
		names[i] = py_text(PyTuple_GetItem(pair, 0), "a block's name");
		if (!names[i] || py_size(PyTuple_GetItem(pair, 1), "what is kept", &keep))
			return -1;
		if (keep > OM_KEEP_BALANCED) {
			PyErr_Format(PyExc_ValueError,
			             "block '%s': what is kept is 0 (nothing), 1 (plain), 2 (fast) "
			             "or 3 (balanced), not %llu",
			             names[i], (unsigned long long)keep);
			return -1;
		}
		code = om_store_info(core->s, names[i], &info);
		if (code) {
			py_raise(code);
			return -1;
		}
		u->keep[i] = (uint8_t)keep;
		u->nbytes[i] = info.nbytes;
	}
	return 0;
}

/* One unit; *ret_keep holds the tuple whose texts are pointed to. */
static int read_unit(struct py_core *core, PyObject *o, struct py_unit *u,
                     struct om_stream_unit *su, PyObject **ret_keep)
{
	const char **names;

	if (!PyTuple_Check(o) || PyTuple_Size(o) != 2) {
		PyErr_SetString(PyExc_TypeError,
		                "a unit is a tuple (name, [(block, what is kept), ...])");
		return -1;
	}
	su->name = py_text(PyTuple_GetItem(o, 0), "a unit's name");
	*ret_keep = su->name ? PySequence_Tuple(PyTuple_GetItem(o, 1)) : NULL;
	if (!*ret_keep)
		return -1;
	u->blocks = (size_t)PyTuple_Size(*ret_keep);
	u->keep = calloc(u->blocks + 1, sizeof(*u->keep));
	u->nbytes = calloc(u->blocks + 1, sizeof(*u->nbytes));
	names = calloc(u->blocks + 1, sizeof(*names));
	su->blocks = names;
	su->keep = u->keep;
	su->count = u->blocks;
	if (!u->keep || !u->nbytes || !names) {
		PyErr_NoMemory();
		return -1;
	}
	return read_blocks(core, *ret_keep, u, names);
}

static int create(struct py_stream *o, const char *group, PyObject *tuple)
{
	size_t n = (size_t)PyTuple_Size(tuple);
	struct om_stream_unit *su = calloc(n + 1, sizeof(*su));
	PyObject **keep = calloc(n + 1, sizeof(*keep));
	int failed = -1, code;

	o->units = calloc(n + 1, sizeof(*o->units));
	o->count = o->units ? n : 0;
	if (!su || !keep || !o->units) {
		PyErr_NoMemory();
		goto out;
	}
	for (size_t i = 0; i < n; i++)
		if (read_unit(o->core, PyTuple_GetItem(tuple, (Py_ssize_t)i), &o->units[i], &su[i],
		              &keep[i]))
			goto out;
	Py_BEGIN_ALLOW_THREADS code = om_stream_create(o->core->s, group, su, n, &o->st);
	Py_END_ALLOW_THREADS failed = code ? -1 : 0;
	if (code) {
		o->st = NULL;
		py_raise(code);
	}
out:
	for (size_t i = 0; i < n; i++) {
		if (su)
			free((void *)su[i].blocks);
		if (keep)
			Py_XDECREF(keep[i]);
	}
	free(su);
	free(keep);
	return failed;
}

static PyObject *stream_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "store", "group", "units", NULL };
	struct py_stream *o;
	struct py_core *core;
	PyObject *store, *units, *tuple;
	const char *group;
	int failed;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!sO:Stream", names, py_store_type, &store,
	                                 &group, &units))
		return NULL;
	core = py_store_core(store);
	if (!core)
		return NULL;
	o = (struct py_stream *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (!o)
		return NULL;
	o->core = py_core_ref(core);
	tuple = PySequence_Tuple(units);
	failed = tuple ? create(o, group, tuple) : -1;
	Py_XDECREF(tuple);
	if (failed) {
		Py_DECREF(o);
		return NULL;
	}
	return (PyObject *)o;
}

static void let_go(struct py_stream *o)
{
	struct om_stream *st = o->st;

	if (!st)
		return;
	o->st = NULL;
	Py_BEGIN_ALLOW_THREADS om_stream_free(st);
	Py_END_ALLOW_THREADS py_collect();
}

static void stream_dealloc(PyObject *self)
{
	struct py_stream *o = (struct py_stream *)self;
	PyTypeObject *type = Py_TYPE(self);

	let_go(o);
	free_units(o->units, o->count);
	if (o->core)
		py_core_unref(o->core);
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

/* ---- use ---- */

static struct om_stream *open_stream(struct py_stream *o)
{
	if (!o->st)
		py_raise_closed("the stream is closed");
	return o->st;
}

int py_stream_place(struct py_stream *o, PyObject *unit, size_t *ret)
{
	uint64_t number;

	if (!open_stream(o) || py_size(unit, "unit", &number))
		return -1;
	if (number >= o->count) {
		PyErr_Format(PyExc_ValueError, "unit %llu: the stream has %zu units",
		             (unsigned long long)number, o->count);
		return -1;
	}
	*ret = (size_t)number;
	return 0;
}

struct stream_call {
	struct om_stream *st;
	size_t unit;
	bool bind;
};

static int call_load(void *arg, uint64_t deadline_ns)
{
	return om_stream_load(((struct stream_call *)arg)->st, deadline_ns);
}

static int call_enter(void *arg, uint64_t deadline_ns)
{
	struct stream_call *c = arg;

	return om_stream_enter(c->st, c->unit, deadline_ns, &c->bind);
}

static int wait_inside(struct py_stream *o, int (*call)(void *, uint64_t), struct stream_call *c,
                       uint64_t deadline_ns)
{
	int code;

	c->st = o->st;
	o->inside++;
	code = py_wait(call, c, deadline_ns);
	o->inside--;
	if (code && code != PY_RAISED)
		py_raise(code);
	py_collect();
	return code;
}

static PyObject *stream_load(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const names[] = { "timeout", NULL };
	struct py_stream *o = (struct py_stream *)self;
	struct stream_call c = { 0 };
	PyObject *timeout = NULL;
	uint64_t deadline_ns;

	if (py_args("load", args, nargs, kwnames, names, 0, 1, &timeout) ||
	    py_deadline(timeout ? timeout : Py_None, &deadline_ns) || !open_stream(o))
		return NULL;
	return wait_inside(o, call_load, &c, deadline_ns) ? NULL : Py_NewRef(Py_None);
}

/* The unit was entered, but cannot be noted: give it back. */
static PyObject *undo_enter(struct om_stream *st, const struct stream_call *c)
{
	bool unbind = false;

	if (c->bind)
		om_stream_bound(st, c->unit, false);
	else if (om_stream_leave(st, c->unit, &unbind) == 0 && unbind)
		om_stream_unbound(st, c->unit);
	return NULL;
}

static PyObject *stream_enter(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
	static const char *const names[] = { "unit", "held", "timeout", NULL };
	struct py_stream *o = (struct py_stream *)self;
	struct stream_call c = { 0 };
	PyObject *a[3] = { NULL };
	uint64_t deadline_ns;

	if (py_args("enter", args, nargs, kwnames, names, 2, 3, a) ||
	    py_deadline(a[2], &deadline_ns) || py_stream_place(o, a[0], &c.unit))
		return NULL;
	if (!PyList_Check(a[1])) {
		PyErr_Format(PyExc_TypeError, "held must be a list, not %R", Py_TYPE(a[1]));
		return NULL;
	}
	if (wait_inside(o, call_enter, &c, deadline_ns))
		return NULL;
	if (PyList_Append(a[1], a[0]))
		return undo_enter(o->st, &c);
	return PyBool_FromLong(c.bind);
}

static PyObject *stream_bound(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
	static const char *const names[] = { "unit", "ok", NULL };
	struct py_stream *o = (struct py_stream *)self;
	PyObject *a[2] = { NULL };
	size_t unit;
	int ok = 1;

	if (py_args("bound", args, nargs, kwnames, names, 1, 2, a) ||
	    py_stream_place(o, a[0], &unit))
		return NULL;
	if (a[1] && (ok = PyObject_IsTrue(a[1])) < 0)
		return NULL;
	om_stream_bound(o->st, unit, ok);
	return Py_NewRef(Py_None);
}

static PyObject *stream_leave(PyObject *self, PyObject *number)
{
	struct py_stream *o = (struct py_stream *)self;
	bool unbind = false;
	size_t unit;
	int code;

	if (py_stream_place(o, number, &unit))
		return NULL;
	code = om_stream_leave(o->st, unit, &unbind);
	return code ? py_raise(code) : PyBool_FromLong(unbind);
}

static PyObject *stream_unbound(PyObject *self, PyObject *number)
{
	struct py_stream *o = (struct py_stream *)self;
	size_t unit;

	if (py_stream_place(o, number, &unit))
		return NULL;
	om_stream_unbound(o->st, unit);
	return Py_NewRef(Py_None);
}

static PyObject *stream_keep(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const names[] = { "unit", "kept", NULL };
	struct py_stream *o = (struct py_stream *)self;
	PyObject *a[2] = { NULL };
	bool unbind = false;
	size_t unit;
	int kept, code;

	if (py_args("keep", args, nargs, kwnames, names, 2, 2, a) ||
	    py_stream_place(o, a[0], &unit) || (kept = PyObject_IsTrue(a[1])) < 0)
		return NULL;
	code = om_stream_keep(o->st, unit, kept, &unbind);
	return code ? py_raise(code) : PyBool_FromLong(unbind);
}

static PyObject *stream_linger(PyObject *self, PyObject *on)
{
	struct py_stream *o = (struct py_stream *)self;
	int lingers = PyObject_IsTrue(on);

	if (lingers < 0 || !open_stream(o))
		return NULL;
	return py_done(om_stream_linger(o->st, lingers));
}

/* ---- the rest ---- */

static PyObject *stream_stats(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_stream *o = (struct py_stream *)self;
	struct om_stream_stats s = { 0 };
	int code;

	if (!open_stream(o))
		return NULL;
	code = om_stream_stats(o->st, &s);
	if (code)
		return py_raise(code);
	return Py_BuildValue("{sKsKsdsKsKsKsKsKsdsK}", "enters", (unsigned long long)s.enters,
	                     "hits", (unsigned long long)s.hits, "stall_seconds",
	                     (double)s.stall_ns / 1e9, "read_bytes",
	                     (unsigned long long)s.read_bytes, "mispredicted",
	                     (unsigned long long)s.mispredicted, "packed_bytes",
	                     (unsigned long long)s.packed_bytes, "decoded_bytes",
	                     (unsigned long long)s.decoded_bytes, "timed_bytes",
	                     (unsigned long long)s.timed_bytes, "timed_seconds",
	                     (double)s.timed_ns / 1e9, "users", (unsigned long long)s.users);
}

static PyObject *stream_reserve(PyObject *self, PyObject *ring)
{
	struct py_stream *o = (struct py_stream *)self;
	uint64_t bytes;
	int code;

	if (!open_stream(o) || py_size(ring, "ring", &bytes))
		return NULL;
	code = om_stream_reserve(o->st, bytes);
	return code ? py_raise(code) : Py_NewRef(Py_None);
}

static PyObject *stream_forget(PyObject *self, PyObject *number)
{
	struct py_stream *o = (struct py_stream *)self;
	size_t unit;
	int code;

	if (py_stream_place(o, number, &unit))
		return NULL;
	code = om_stream_forget(o->st, unit);
	return code ? py_raise(code) : Py_NewRef(Py_None);
}

static PyObject *stream_close(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_stream *o = (struct py_stream *)self;

	if (o->st && o->inside) {
		om_err(OM_EBUSY, "the stream cannot close: %u threads wait inside it", o->inside);
		return py_raise(OM_EBUSY);
	}
	let_go(o);
	return Py_NewRef(Py_None);
}

PyDoc_STRVAR(load_doc, "load($self, timeout=None)\n--\n\nRead the resident blocks and keep them.");
PyDoc_STRVAR(
	enter_doc,
	"enter($self, unit, held, timeout=30.0)\n--\n\n"
	"Bring the unit's streamed blocks in and append `unit` to the list `held`; True when the "
	"caller must make the windows and call bound().");
PyDoc_STRVAR(bound_doc,
             "bound($self, unit, ok=True)\n--\n\nThe windows are made, or could not be.");
PyDoc_STRVAR(leave_doc,
             "leave($self, unit, /)\n--\n\n"
             "Done with a unit; True when the caller must drop the windows and call unbound().");
PyDoc_STRVAR(unbound_doc, "unbound($self, unit, /)\n--\n\nThe windows are gone.");
PyDoc_STRVAR(set_windows_doc, "set_windows($self, unit, windows)\n--\n\n"
                              "What windows() returns: (block index, offset, dtype, shape) each, "
                              "or with strides in elements.");
PyDoc_STRVAR(keep_doc, "keep($self, unit, kept)\n--\n\n"
                       "Whether a unit stays bound when its users have left; True when the caller "
                       "must drop the windows now and call unbound().");
PyDoc_STRVAR(linger_doc, "linger($self, lingers, /)\n--\n\n"
                         "Whether what a unit lets go stays in memory until room is needed.");
PyDoc_STRVAR(
	windows_doc,
	"windows($self, unit, resident=None)\n--\n\n"
	"DLPack capsules, in the order of set_windows(), of all, resident or streamed blocks.");
PyDoc_STRVAR(reserve_doc, "reserve($self, ring, /)\n--\n\n"
                          "Bytes that what is kept encoded leaves to the ring; before load().");
PyDoc_STRVAR(forget_doc, "forget($self, unit, /)\n--\n\nKeep nothing of a unit encoded any more.");
PyDoc_STRVAR(stats_doc, "stats($self, /)\n--\n\nCounters.");
PyDoc_STRVAR(close_doc, "close($self, /)\n--\n\nLet all leases go; views keep their bytes.");

static PyMethodDef stream_methods[] = {
	{ "load", PY_FAST(stream_load), PY_FAST_FLAGS, load_doc },
	{ "enter", PY_FAST(stream_enter), PY_FAST_FLAGS, enter_doc },
	{ "bound", PY_FAST(stream_bound), PY_FAST_FLAGS, bound_doc },
	{ "leave", stream_leave, METH_O, leave_doc },
	{ "unbound", stream_unbound, METH_O, unbound_doc },
	{ "keep", PY_FAST(stream_keep), PY_FAST_FLAGS, keep_doc },
	{ "linger", stream_linger, METH_O, linger_doc },
	{ "set_windows", PY_FAST(py_stream_set_windows), PY_FAST_FLAGS, set_windows_doc },
	{ "windows", PY_FAST(py_stream_windows), PY_FAST_FLAGS, windows_doc },
	{ "reserve", stream_reserve, METH_O, reserve_doc },
	{ "forget", stream_forget, METH_O, forget_doc },
	{ "stats", stream_stats, METH_NOARGS, stats_doc },
	{ "close", stream_close, METH_NOARGS, close_doc },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot stream_slots[] = {
	{ Py_tp_doc,
	  "Stream(store, group, units)\n--\n\n"
	  "Units of blocks, (name, [(block, what is kept), ...]): 1 plain, 2 fast, 3 balanced; "
	  "the others, 0, pass through a ring." },
	{ Py_tp_new, stream_new },
	{ Py_tp_dealloc, stream_dealloc },
	{ Py_tp_methods, stream_methods },
	{ 0, NULL },
};

PyType_Spec py_stream_spec = {
	.name = "omnimem._core.Stream",
	.basicsize = sizeof(struct py_stream),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = stream_slots,
};
