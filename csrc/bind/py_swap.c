/*
 * py_swap: the store's methods for giving memory back: swapping out, encoded forms, the swap file's bounds,
 * statistics of a group, events.
 */
#include "bind/py_bind.h"

#include <stdlib.h>
#include <string.h>

static int call_swap(void *arg, uint64_t deadline_ns)
{
	return om_swap_wait(arg, deadline_ns);
}

PyObject *py_store_swap_out(PyObject *self, PyObject *args)
{
	struct py_core *core = py_store_core(self);
	struct om_swapped done;
	struct om_swap *w;
	PyObject *timeout = Py_None;
	unsigned long long bytes;
	uint64_t deadline_ns;
	const char *group;
	int code;

	if (!core || !PyArg_ParseTuple(args, "sK|O:_swap_out", &group, &bytes, &timeout) ||
	    py_deadline(timeout, &deadline_ns))
		return NULL;
	code = om_swap_begin(core->s, group, bytes, &w);
	if (code)
		return py_raise(code);
	code = py_wait(call_swap, w, deadline_ns);
	if (code && code != PY_RAISED)
		py_raise(code);
	om_swap_end(w, &done);
	py_collect(); /* what was taken from a producer goes back to it */
	return code ? NULL
	            : Py_BuildValue("(KK)", (unsigned long long)done.blocks,
	                            (unsigned long long)done.bytes);
}

PyObject *py_store_victim(PyObject *self, PyObject *group)
{
	struct py_core *core = py_store_core(self);
	const char *text = core ? py_text(group, "group") : NULL;
	struct om_lease *l;
	int code;

	if (!text)
		return NULL;
	code = om_store_victim(core->s, text, &l);
	if (code == OM_EAGAIN)
		return Py_NewRef(Py_None);
	return code ? py_raise(code) : py_lease_new(l);
}

PyObject *py_store_pack(PyObject *self, PyObject *args)
{
	struct py_core *core = py_store_core(self);
	PyObject *lease, *data;
	struct om_lease *l;
	struct py_data d;
	int codec, code;

	if (!core || !PyArg_ParseTuple(args, "O!Oi:_pack", py_lease_type, &lease, &data, &codec))
		return NULL;
	l = py_lease_held(lease);
	if (!l || py_data_init(&d, data, PY_STRIDED_COPIED))
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_lease_pack(l, d.data, d.nbytes, (uint8_t)codec);
	Py_END_ALLOW_THREADS data = code == OM_EBUSY ? Py_NewRef(Py_False)
	                            : code           ? py_raise(code)
	                                             : Py_NewRef(Py_True);
	py_data_fini(&d);
	return data;
}

PyObject *py_store_disk(PyObject *self, PyObject *args)
{
	struct py_core *core = py_store_core(self);
	PyObject *directory, *path = NULL;
	unsigned long long limit;
	int code;

	if (!core || !PyArg_ParseTuple(args, "OK:_disk", &directory, &limit))
		return NULL;
	if (directory != Py_None && !PyUnicode_FSConverter(directory, &path))
		return NULL;
	code = om_store_disk(core->s, path ? PyBytes_AsString(path) : NULL, limit);
	Py_XDECREF(path);
	return py_done(code);
}

PyObject *py_store_trim(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	static const char *const names[] = { "reserve", NULL };
	struct py_core *core = py_store_core(self);
	PyObject *given[1] = { NULL };
	uint64_t reserve = 0;
	int code;

	if (!core || py_args("trim", args, nargs, kwnames, names, 0, 1, given) ||
	    (given[0] && py_size(given[0], "reserve", &reserve)))
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_store_trim(core->s, reserve);
	Py_END_ALLOW_THREADS return py_done(code);
}

PyObject *py_store_group_stats(PyObject *self, PyObject *group)
{
	struct py_core *core = py_store_core(self);
	const char *text = core ? py_text(group, "group") : NULL;
	struct om_group_stats g;
	const struct om_traffic *t = &g.traffic;
	int code;

	if (!text)
		return NULL;
	code = om_store_group_stats(core->s, text, &g);
	if (code)
		return py_raise(code);
	return Py_BuildValue(
		"{sKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsKsdsdsN}", "blocks", g.blocks,
		"pinned", g.pinned, "leases", g.leases, "swapped", g.swapped, "host_bytes",
		g.host_bytes, "host_peak_bytes", g.host_peak_bytes, "disk_bytes", g.disk_bytes,
		"idle_bytes", g.idle_bytes, "spare_bytes", g.spare_bytes, "missing_bytes",
		g.missing_bytes, "limit_bytes", g.limit_bytes, "packed_bytes", g.packed_bytes,
		"gone_bytes", g.gone_bytes, "evictions", g.evictions, "issued", g.issued, "used",
		g.used, "recent", g.recent, "reused", g.reused, "repeated", g.repeated, "foretold",
		g.foretold, "hits", t->hits, "misses", t->misses, "outs", t->outs, "ins", t->ins,
		"out_bytes", t->out_bytes, "in_bytes", t->in_bytes, "out_seconds",
		(double)t->out_ns / 1e9, "in_seconds", (double)t->in_ns / 1e9, "trouble",
		PyUnicode_DecodeLocale(g.trouble, "surrogateescape"));
}

PyObject *py_store_ranked(PyObject *self, PyObject *args)
{
	struct py_core *core = py_store_core(self);
	struct om_block **blocks = NULL;
	uint64_t *accesses = NULL;
	unsigned int most;
	PyObject *list = NULL;
	const char *group;
	size_t count = 0;
	int down, code;

	if (!core || !PyArg_ParseTuple(args, "spI:_ranked", &group, &down, &most))
		return NULL;
	blocks = calloc(most + 1u, sizeof(*blocks));
	accesses = calloc(most + 1u, sizeof(*accesses));
	if (!blocks || !accesses) {
		PyErr_NoMemory();
		goto out;
	}
	Py_BEGIN_ALLOW_THREADS code =
		om_store_ranked(core->s, group, down, most, blocks, accesses, &count);
	Py_END_ALLOW_THREADS if (code)
	{
		py_raise(code);
		goto out;
	}
	list = PyList_New((Py_ssize_t)count);
	for (size_t i = 0; list && i < count; i++) {
		PyObject *pair = Py_BuildValue("(sK)", om_block_name(blocks[i]),
		                               (unsigned long long)accesses[i]);

		if (!pair || PyList_SetItem(list, (Py_ssize_t)i, pair))
			Py_CLEAR(list);
	}
out:
	for (size_t i = 0; i < count; i++)
		om_block_unref(blocks[i]);
	free(blocks);
	free(accesses);
	return list;
}

PyObject *py_same_bytes(PyObject *Py_UNUSED(module), PyObject *args)
{
	PyObject *a, *b, *result;
	struct py_data one, two;
	bool same;

	if (!PyArg_ParseTuple(args, "OO:_same_bytes", &a, &b) ||
	    py_data_init(&one, a, PY_STRIDED_COPIED))
		return NULL;
	if (py_data_init(&two, b, PY_STRIDED_COPIED)) {
		py_data_fini(&one);
		return NULL;
	}
	/* A view may write to a block that is being encoded: _pack finds out. */
	Py_BEGIN_ALLOW_THREADS om_racy_reads_begin();
	same = one.nbytes == two.nbytes && !memcmp(one.data, two.data, one.nbytes);
	om_racy_reads_end();
	Py_END_ALLOW_THREADS result = PyBool_FromLong(same);
	py_data_fini(&one);
	py_data_fini(&two);
	return result;
}

/* ---- events ---- */

#define BATCH 512

static PyObject *event_tuple(const struct om_event *e, uint64_t number)
{
	static const char *const kinds[] = {
		[OM_EVENT_HIT] = "hit",
		[OM_EVENT_MISS] = "miss",
		[OM_EVENT_OUT] = "out",
		[OM_EVENT_IN] = "in",
		[OM_EVENT_PACKED_OUT] = "packed_out",
		[OM_EVENT_PACKED_IN] = "packed_in",
	};

	return Py_BuildValue(
		"(KdssNKd)", (unsigned long long)number, (double)e->at_ns / 1e9, kinds[e->kind],
		e->group, PyUnicode_DecodeUTF8(e->block, (Py_ssize_t)strlen(e->block), "replace"),
		(unsigned long long)e->bytes, (double)e->took_ns / 1e9);
}

static int append(PyObject *list, PyObject *item)
{
	int failed = item ? PyList_Append(list, item) : -1;

	Py_XDECREF(item);
	return failed;
}

PyObject *py_store_events(PyObject *self, PyObject *since)
{
	struct py_core *core = py_store_core(self);
	struct om_event *events;
	uint64_t first, from;
	PyObject *list;
	size_t count = 0;
	int code = 0, failed = 0;

	if (!core || py_size(since, "since", &from))
		return NULL;
	events = calloc(BATCH, sizeof(*events));
	list = events ? PyList_New(0) : PyErr_NoMemory();
	do {
		if (list)
			code = om_store_events(core->s, from, events, BATCH, &count, &first, &from);
		for (size_t i = 0; list && !code && i < count && !failed; i++)
			failed = append(list, event_tuple(&events[i], first + i));
	} while (list && !code && !failed && count == BATCH);
	free(events);
	if (code || failed)
		Py_CLEAR(list);
	if (code)
		py_raise(code);
	return list;
}
