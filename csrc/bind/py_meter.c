/*
 * py_meter: groups, marks and totals, for omnimem.track and omnimem.metrics.
 *
 * A mark is a capsule that holds the core's mark until it is ended; dropped before, it ends by itself.
 */
#include "bind/py_bind.h"

#include <string.h>

static const char mark_name[] = "omnimem mark";

static void mark_drop(PyObject *capsule)
{
	struct om_mark *m = PyCapsule_GetPointer(capsule, mark_name);
	struct om_peaks peaks;

	if (m && !PyCapsule_GetContext(capsule))
		om_mark_end(m, &peaks);
}

PyObject *py_store_mark(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_core *core = py_store_core(self);
	struct om_mark *m;
	struct om_peaks peaks;
	PyObject *capsule;
	int code;

	if (!core)
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_mark_begin(core->s, &m);
	Py_END_ALLOW_THREADS if (code) return py_raise(code);
	capsule = PyCapsule_New(m, mark_name, mark_drop);
	if (!capsule)
		om_mark_end(m, &peaks);
	return capsule;
}

PyObject *py_mark_end(PyObject *Py_UNUSED(module), PyObject *capsule)
{
	struct om_mark *m = PyCapsule_GetPointer(capsule, mark_name);
	struct om_peaks peaks;

	if (!m)
		return NULL;
	if (PyCapsule_GetContext(capsule)) {
		PyErr_SetString(PyExc_ValueError, "the mark has ended");
		return NULL;
	}
	if (PyCapsule_SetContext(capsule, capsule)) /* anything: it is over */
		return NULL;
	Py_BEGIN_ALLOW_THREADS om_mark_end(m, &peaks);
	Py_END_ALLOW_THREADS return Py_BuildValue("(KKK)", (unsigned long long)peaks.host_bytes,
	                                          (unsigned long long)peaks.packed_bytes,
	                                          (unsigned long long)peaks.disk_bytes);
}

/* ---- totals ---- */

PyObject *py_names_list(char **names, size_t count)
{
	PyObject *list = PyList_New((Py_ssize_t)count);

	for (size_t i = 0; list && i < count; i++) {
		PyObject *name = PyUnicode_FromString(names[i]);

		if (!name || PyList_SetItem(list, (Py_ssize_t)i, name))
			Py_CLEAR(list);
	}
	om_names_free(names, count);
	return list;
}

PyObject *py_store_groups(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_core *core = py_store_core(self);
	char **names;
	size_t count;
	int code;

	if (!core)
		return NULL;
	code = om_store_groups(core->s, &names, &count);
	return code ? py_raise(code) : py_names_list(names, count);
}

static int put(PyObject *dict, const char *key, PyObject *value)
{
	int failed = value ? PyDict_SetItemString(dict, key, value) : -1;

	Py_XDECREF(value);
	return failed;
}

static PyObject *counters_list(const uint64_t *values, size_t count)
{
	PyObject *list = PyList_New((Py_ssize_t)count);

	for (size_t i = 0; list && i < count; i++) {
		PyObject *value = PyLong_FromUnsignedLongLong(values[i]);

		if (!value || PyList_SetItem(list, (Py_ssize_t)i, value))
			Py_CLEAR(list);
	}
	return list;
}

#define COUNTERS(values) counters_list((values), sizeof(values) / sizeof((values)[0]))

/* [number, ns in all, number of each step ...] */
static PyObject *histogram_list(const struct om_histogram *h)
{
	uint64_t values[2 + OM_HISTOGRAM_STEPS] = { h->count, h->sum_ns };

	memcpy(values + 2, h->counts, sizeof(h->counts));
	return COUNTERS(values);
}

static PyObject *totals_dict(const struct om_totals *t)
{
	const struct {
		const char *key;
		uint64_t value;
	} counters[] = {
		{ "block_hits", t->block_hits },
		{ "block_misses", t->block_misses },
		{ "entry_hits", t->entry_hits },
		{ "entry_misses", t->entry_misses },
		{ "fills", t->fills },
		{ "read_bytes", t->read_bytes },
		{ "written_bytes", t->written_bytes },
		{ "stall_ns", t->stall_ns },
		{ "decoded_bytes", t->decoded_bytes },
		{ "decode_ns", t->decode_ns },
		{ "verified_bytes", t->verified_bytes },
		{ "corrupt", t->corrupt },
		{ "rereads", t->rereads },
		{ "repaired", t->repaired },
		{ "prefetches", t->prefetches },
		{ "prefetch_hits", t->prefetch_hits },
		{ "prefetch_waste", t->prefetch_waste },
		{ "fell_back", t->fell_back },
	};
	PyObject *dict = PyDict_New();
	int failed = !dict;

	for (size_t i = 0; i < sizeof(counters) / sizeof(counters[0]) && !failed; i++)
		failed = put(dict, counters[i].key, PyLong_FromUnsignedLongLong(counters[i].value));
	if (failed || put(dict, "gone", COUNTERS(t->gone)) ||
	    put(dict, "gone_bytes", COUNTERS(t->gone_bytes)) ||
	    put(dict, "read_failures", COUNTERS(t->failures[0])) ||
	    put(dict, "write_failures", COUNTERS(t->failures[1])) ||
	    put(dict, "read_wait", histogram_list(&t->read)) ||
	    put(dict, "write_wait", histogram_list(&t->write)) ||
	    put(dict, "in", histogram_list(&t->in)) || put(dict, "out", histogram_list(&t->out)) ||
	    put(dict, "idle", histogram_list(&t->idle)) ||
	    put(dict, "life", histogram_list(&t->life)))
		Py_CLEAR(dict);
	return dict;
}

PyObject *py_store_totals(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_core *core = py_store_core(self);
	struct om_totals totals;
	struct om_gauges g;
	PyObject *dict;
	int code;

	if (!core)
		return NULL;
	code = om_store_totals(core->s, &totals, &g);
	if (code < 0)
		return py_raise(code);
	dict = totals_dict(&totals);
	if (!dict)
		return NULL;
	return Py_BuildValue("(N{sKsKsKsKsK}N)", dict, "moving_in_bytes",
	                     (unsigned long long)g.moving_in_bytes, "moving_out_bytes",
	                     (unsigned long long)g.moving_out_bytes, "host_bytes",
	                     (unsigned long long)g.host_bytes, "packed_bytes",
	                     (unsigned long long)g.packed_bytes, "entry_bytes",
	                     (unsigned long long)g.entry_bytes, PyBool_FromLong(code));
}

PyObject *py_totals_closed(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
	struct om_totals totals;
	uint64_t stores = om_totals_closed(&totals);

	return Py_BuildValue("(KN)", (unsigned long long)stores, totals_dict(&totals));
}
