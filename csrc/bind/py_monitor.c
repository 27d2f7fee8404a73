/*
 * py_monitor: _core.Monitor, what omnimem.MemoryMonitor looks through.
 *
 * Owns one monitor of the core. The GIL is dropped around everything that reads files, gives memory back or waits.
 * Fails with an exception; what is unknown is None.
 */
#include "bind/py_bind.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

#define MAX_BANKS 16

PyTypeObject *py_monitor_type;

struct py_monitor {
	PyObject_HEAD struct om_monitor *m; /* NULL: not initialised */
};

static struct om_monitor *monitor_of(PyObject *self)
{
	struct om_monitor *m = ((struct py_monitor *)self)->m;

	if (!m)
		PyErr_SetString(PyExc_RuntimeError, "Monitor.__init__ was not called");
	return m;
}

/* ---- life ---- */

static int monitor_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "thresholds", "interval", "act", "root", NULL };
	struct py_monitor *o = (struct py_monitor *)self;
	struct om_monitor_config config = { .thresholds = { 0.75, 0.88, 0.95 } };
	PyObject *thresholds = NULL;
	double interval = 1.0;
	int act = 1, code;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|Od$pz:Monitor", names, &thresholds,
	                                 &interval, &act, &config.root) ||
	    (thresholds && py_thresholds(thresholds, config.thresholds)))
		return -1;
	if (o->m) {
		PyErr_SetString(PyExc_ValueError, "the monitor is there: __init__ runs once");
		return -1;
	}
	if (!(interval >= 0 && interval < 1e9)) {
		PyErr_Format(PyExc_ValueError, "interval must be seconds from 0.01 to 86400");
		return -1;
	}
	config.interval_ns = (uint64_t)(interval * 1e9);
	config.act = act;
	Py_BEGIN_ALLOW_THREADS code = om_monitor_create(&config, &o->m);
	Py_END_ALLOW_THREADS if (code) py_raise(code);
	return code ? -1 : 0;
}

static void monitor_dealloc(PyObject *self)
{
	struct om_monitor *m = ((struct py_monitor *)self)->m;
	PyTypeObject *type = Py_TYPE(self);

	Py_BEGIN_ALLOW_THREADS om_monitor_free(m);
	Py_END_ALLOW_THREADS((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

static PyObject *call(PyObject *self, int (*function)(struct om_monitor *))
{
	struct om_monitor *m = monitor_of(self);
	int code;

	if (!m)
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = function(m);
	Py_END_ALLOW_THREADS return py_done(code);
}

static PyObject *monitor_start(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return call(self, om_monitor_start);
}

static PyObject *monitor_stop(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return call(self, om_monitor_stop);
}

static PyObject *monitor_close(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return call(self, om_monitor_close);
}

static PyObject *monitor_stir(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return call(self, om_monitor_stir);
}

static PyObject *get_running(PyObject *self, void *Py_UNUSED(unused))
{
	struct om_monitor *m = monitor_of(self);

	return m ? PyBool_FromLong(om_monitor_running(m)) : NULL;
}

/* ---- what it watches ---- */

static PyObject *call_store(PyObject *self, PyObject *store,
                            int (*function)(struct om_monitor *, struct om_store *))
{
	struct om_monitor *m = monitor_of(self);
	struct py_core *core = NULL;
	int code;

	if (m && !PyType_IsSubtype(Py_TYPE(store), py_store_type))
		PyErr_Format(PyExc_TypeError, "store must be a Store, not %R", Py_TYPE(store));
	else if (m)
		core = py_store_core(store);
	if (!core)
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = function(m, core->s);
	Py_END_ALLOW_THREADS return py_done(code);
}

static PyObject *monitor_watch(PyObject *self, PyObject *store)
{
	return call_store(self, store, om_monitor_watch);
}

static PyObject *monitor_unwatch(PyObject *self, PyObject *store)
{
	return call_store(self, store, om_monitor_unwatch);
}

static PyObject *call_banks(PyObject *self, PyObject *pools,
                            int (*function)(struct om_monitor *, struct om_bank *))
{
	struct om_monitor *m = monitor_of(self);
	struct om_bank *banks[MAX_BANKS];
	int count = m ? py_pools_banks(pools, banks, MAX_BANKS) : -1, code = 0;

	if (count < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS for (int i = 0; i < count && !code; i++)
		code = function(m, banks[i]);
	Py_END_ALLOW_THREADS return py_done(code);
}

static PyObject *monitor_watch_pools(PyObject *self, PyObject *pools)
{
	return call_banks(self, pools, om_monitor_watch_bank);
}

static PyObject *monitor_unwatch_pools(PyObject *self, PyObject *pools)
{
	return call_banks(self, pools, om_monitor_unwatch_bank);
}

/* ---- what it tells ---- */

static PyObject *text(const char *s)
{
	return PyUnicode_DecodeUTF8(s, (Py_ssize_t)strlen(s), "replace");
}

static PyObject *number_or_none(double value)
{
	return isnan(value) ? Py_NewRef(Py_None) : PyFloat_FromDouble(value);
}

static PyObject *bytes_or_none(uint64_t value, uint64_t unknown)
{
	return value == unknown ? Py_NewRef(Py_None) : PyLong_FromUnsignedLongLong(value);
}

static double seconds(uint64_t ns)
{
	return (double)ns / 1e9;
}

/* A list of what `make` makes of `count` things. */
static PyObject *list_of(size_t count, PyObject *(*make)(const void *, size_t), const void *things)
{
	PyObject *list = PyList_New((Py_ssize_t)count);

	for (size_t i = 0; list && i < count; i++) {
		PyObject *item = make(things, i);

		if (!item || PyList_SetItem(list, (Py_ssize_t)i, item))
			Py_CLEAR(list);
	}
	return list;
}

static PyObject *make_place(const void *report, size_t i)
{
	const struct om_place *p = &((const struct om_report *)report)->sample.places[i];

	return Py_BuildValue("(NKNKK)", text(p->source), (unsigned long long)p->limit_bytes,
	                     bytes_or_none(p->high_bytes, 0), (unsigned long long)p->used_bytes,
	                     (unsigned long long)p->available_bytes);
}

static PyObject *make_gpu(const void *report, size_t i)
{
	const struct om_report *r = report;
	const struct om_gpu *g = &r->sample.gpus[i];

	return Py_BuildValue("(INNKKi)", g->index, text(g->uuid), text(g->name),
	                     (unsigned long long)g->total_bytes, (unsigned long long)g->free_bytes,
	                     (int)r->gpu_levels[i]);
}

static PyObject *make_large(const void *report, size_t i)
{
	const struct om_large *b = &((const struct om_report *)report)->peak.blocks[i];

	return Py_BuildValue("(NNK)", text(b->block), text(b->group),
	                     (unsigned long long)b->nbytes);
}

static PyObject *events_of(const struct om_sample *s)
{
	static const char *const names[OM_STRAINS] = { "high", "max", "oom", "oom_kill" };
	PyObject *dict = PyDict_New();

	for (int i = 0; dict && i < OM_STRAINS; i++) {
		PyObject *n = NULL;

		if (s->strains[i] == OM_UNTOLD)
			continue;
		n = PyLong_FromUnsignedLongLong(s->strains[i]);
		if (!n || PyDict_SetItemString(dict, names[i], n))
			Py_CLEAR(dict);
		Py_XDECREF(n);
	}
	return dict;
}

static PyObject *pair_or_none(double some, double full)
{
	if (isnan(some) && isnan(full))
		return Py_NewRef(Py_None);
	return Py_BuildValue("(NN)", number_or_none(some), number_or_none(full));
}

static PyObject *stalls_of(const struct om_sample *s)
{
	return pair_or_none(s->stall_some_us == OM_UNTOLD ? NAN : (double)s->stall_some_us / 1e6,
	                    s->stall_full_us == OM_UNTOLD ? NAN : (double)s->stall_full_us / 1e6);
}

static PyObject *transitions_of(const struct om_report *r)
{
	return Py_BuildValue("{iKiKiKiK}", 0, (unsigned long long)r->transitions[0], 1,
	                     (unsigned long long)r->transitions[1], 2,
	                     (unsigned long long)r->transitions[2], 3,
	                     (unsigned long long)r->transitions[3]);
}

static PyObject *peak_of(const struct om_report *r)
{
	return Py_BuildValue("(KddN)", (unsigned long long)r->peak.bytes, seconds(r->peak.at_ns),
	                     seconds(r->peak.wall_ns), list_of(r->peak.count, make_large, r));
}

static PyObject *tell(const struct om_report *r)
{
	static const char *const courses[] = { "stable", "rising", "falling", "oscillating" };
	const struct om_sample *s = &r->sample;
	const struct om_place *p = &s->places[r->tightest];

	return Py_BuildValue(
		"{sK sd sd si sd sN sd sK sK sK sN sN sN sN sN sN sN sN sN sN sI ss sN sd sd sd sN sN}",
		"number", (unsigned long long)r->number, "time", seconds(s->at_ns), "wall",
		seconds(r->wall_ns), "level", (int)r->level, "level_since",
		seconds(r->level_since_ns), "cause", text(r->cause), "usage", r->usage, "spare",
		(unsigned long long)r->spare_bytes, "total", (unsigned long long)p->limit_bytes,
		"available", (unsigned long long)p->available_bytes, "source", text(p->source),
		"places", list_of(s->place_count, make_place, r), "swap",
		Py_BuildValue("(KK)", (unsigned long long)s->swap_total_bytes,
	                      (unsigned long long)s->swap_free_bytes),
		"rss", bytes_or_none(s->rss_bytes, OM_UNTOLD), "psi",
		pair_or_none(r->some, r->full), "psi_seconds", stalls_of(s), "events", events_of(s),
		"gpus", list_of(s->gpu_count, make_gpu, r), "slope", number_or_none(r->slope), "r2",
		number_or_none(r->r2), "samples", r->samples, "trend", courses[r->course],
		"seconds_to_exhaustion", number_or_none(r->seconds_left), "interval",
		seconds(r->interval_ns), "lag_seconds", seconds(r->lag_ns), "overhead_seconds",
		seconds(r->busy_ns), "transitions", transitions_of(r), "peak", peak_of(r));
}

static PyObject *ask(PyObject *self, int (*function)(struct om_monitor *, struct om_report *))
{
	struct om_monitor *m = monitor_of(self);
	struct om_report report;
	int code;

	if (!m)
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = function(m, &report);
	Py_END_ALLOW_THREADS py_collect(); /* what was taken from a producer may have gone */
	return code ? py_raise(code) : tell(&report);
}

static PyObject *monitor_sample(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return ask(self, om_monitor_sample);
}

static PyObject *monitor_report(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return ask(self, om_monitor_report);
}

struct waiting {
	struct om_monitor *m;
	int64_t since;
	enum om_level level;
	double usage;
	uint64_t number;
};

static int call_wait(void *arg, uint64_t deadline_ns)
{
	struct waiting *w = arg;

	return om_monitor_wait(w->m, w->since, w->level, deadline_ns, &w->number);
}

static PyObject *monitor_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
	static const char *const names[] = { "since", "level", "timeout", NULL };
	struct waiting w = { .m = monitor_of(self) };
	PyObject *a[3] = { NULL };
	uint64_t deadline_ns;
	long level = 0;
	int code;

	if (!w.m || py_args("wait", args, nargs, kwnames, names, 1, 3, a) ||
	    py_deadline(a[2] ? a[2] : Py_None, &deadline_ns))
		return NULL;
	w.since = PyLong_AsLongLong(a[0]);
	if (a[1] && a[1] != Py_None)
		level = PyLong_AsLong(a[1]);
	if (PyErr_Occurred())
		return NULL;
	if (level < OM_LOW || level > OM_CRITICAL)
		return PyErr_Format(PyExc_ValueError, "level=%ld must lie between 0 and 3", level);
	w.level = (enum om_level)level;
	code = py_wait(call_wait, &w, deadline_ns);
	if (code == PY_RAISED)
		return NULL;
	return code ? PyLong_FromLong(-1) : PyLong_FromUnsignedLongLong(w.number);
}

static int call_follow(void *arg, uint64_t deadline_ns)
{
	struct waiting *w = arg;

	return om_monitor_follow(w->m, (uint64_t)w->since, w->usage, deadline_ns, &w->number);
}

static PyObject *monitor_follow(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
	static const char *const names[] = { "since", "usage", "timeout", NULL };
	struct waiting w = { .m = monitor_of(self), .usage = INFINITY };
	PyObject *a[3] = { NULL };
	uint64_t deadline_ns, since;
	int code;

	if (!w.m || py_args("follow", args, nargs, kwnames, names, 1, 3, a) ||
	    py_size(a[0], "since", &since) || py_deadline(a[2] ? a[2] : Py_None, &deadline_ns))
		return NULL;
	w.since = (int64_t)since;
	if (a[1] && a[1] != Py_None)
		w.usage = PyFloat_AsDouble(a[1]);
	if (PyErr_Occurred())
		return NULL;
	if (gettid() == getpid())
		code = py_wait(call_follow, &w, deadline_ns);
	else { /* without signals to handle, it is to sleep */
		Py_BEGIN_ALLOW_THREADS code = call_follow(&w, deadline_ns);
		Py_END_ALLOW_THREADS
	}
	if (code == PY_RAISED)
		return NULL;
	if (code && code != OM_EBUSY)
		return PyLong_FromLong(-1);
	return PyLong_FromUnsignedLongLong(w.number);
}

static PyObject *make_report(const void *reports, size_t i)
{
	return tell((const struct om_report *)reports + i);
}

static PyObject *monitor_recent(PyObject *self, PyObject *since)
{
	struct om_monitor *m = monitor_of(self);
	struct om_report *reports;
	PyObject *list;
	uint64_t from;
	size_t count;
	int code;

	if (!m || py_size(since, "since", &from))
		return NULL;
	code = om_monitor_recent(m, from, &reports, &count);
	if (code)
		return py_raise(code);
	list = list_of(count, make_report, reports);
	om_free(reports);
	return list;
}

static PyObject *make_span(const void *spans, size_t i)
{
	const struct om_span *s = (const struct om_span *)spans + i;

	return Py_BuildValue("(ddddd)", seconds(s->start_ns), (double)s->min_bytes,
	                     (double)s->max_bytes, s->mean_bytes, (double)s->last_bytes);
}

static PyObject *monitor_history(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *kwnames)
{
	static const char *const names[] = { "seconds", NULL };
	struct om_monitor *m = monitor_of(self);
	PyObject *given = NULL, *list;
	struct om_span *spans;
	uint64_t span;
	size_t count;
	int code;

	if (!m || py_args("history", args, nargs, kwnames, names, 1, 1, &given) ||
	    py_size(given, "seconds", &span))
		return NULL;
	code = om_monitor_history(m, (unsigned)OM_MIN(span, UINT32_MAX), &spans, &count);
	if (code)
		return py_raise(code);
	list = list_of(count, make_span, spans);
	om_free(spans);
	return list;
}

static PyObject *make_action(const void *actions, size_t i)
{
	static const char *const kinds[] = { "trim", "evict", "heap", "relax", "none" };
	const struct om_action *a = (const struct om_action *)actions + i;

	return Py_BuildValue("(KdsiNKKd)", (unsigned long long)a->number, seconds(a->at_ns),
	                     kinds[a->kind], (int)a->level, text(a->cause),
	                     (unsigned long long)a->wanted_bytes,
	                     (unsigned long long)a->freed_bytes, seconds(a->wall_ns));
}

static PyObject *monitor_actions(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                 PyObject *kwnames)
{
	static const char *const names[] = { "since", NULL };
	struct om_monitor *m = monitor_of(self);
	PyObject *given = NULL, *list;
	struct om_action *actions;
	uint64_t since = 0;
	size_t count;
	int code;

	if (!m || py_args("actions", args, nargs, kwnames, names, 0, 1, &given) ||
	    (given && py_size(given, "since", &since)))
		return NULL;
	code = om_monitor_actions(m, since, &actions, &count);
	if (code)
		return py_raise(code);
	list = list_of(count, make_action, actions);
	om_free(actions);
	return list;
}

static PyMethodDef methods[] = {
	{ "watch", monitor_watch, METH_O,
	  "watch($self, store, /)\n--\n\nHave its memory back when memory is short. Counted." },
	{ "unwatch", monitor_unwatch, METH_O,
	  "unwatch($self, store, /)\n--\n\nLeave it alone; a closed one is left by itself." },
	{ "watch_pools", monitor_watch_pools, METH_O,
	  "watch_pools($self, pools, /)\n--\n\nThe same for pools." },
	{ "unwatch_pools", monitor_unwatch_pools, METH_O,
	  "unwatch_pools($self, pools, /)\n--\n\nThe same for pools." },
	{ "start", monitor_start, METH_NOARGS,
	  "start($self, /)\n--\n\nTake samples on a thread. Idempotent." },
	{ "stop", monitor_stop, METH_NOARGS,
	  "stop($self, /)\n--\n\nEnd the thread; who is watched hears that all is well." },
	{ "sample", monitor_sample, METH_NOARGS,
	  "sample($self, /)\n--\n\nTake a sample now, and act on it." },
	{ "report", monitor_report, METH_NOARGS,
	  "report($self, /)\n--\n\nThe last sample; takes one if there was none." },
	{ "follow", PY_FAST(monitor_follow), PY_FAST_FLAGS,
	  "follow($self, /, since, usage=None, timeout=None)\n--\n\nHow many stirs there were, once that is more "
	  "than `since`, or at the timeout; -1 when its thread does not run." },
	{ "stir", monitor_stir, METH_NOARGS, "stir($self, /)\n--\n\nWake who follows." },
	{ "recent", monitor_recent, METH_O,
	  "recent($self, since, /)\n--\n\nReports of the samples above `since` that its thread took." },
	{ "wait", PY_FAST(monitor_wait), PY_FAST_FLAGS,
	  "wait($self, /, since, level=None, timeout=None)\n--\n\nThe number of the last sample, once it is "
	  "above since and its level at least that; -1 at the timeout or when closed." },
	{ "history", PY_FAST(monitor_history), PY_FAST_FLAGS,
	  "history($self, /, seconds)\n--\n\n(start, min, max, mean, last) of the bytes in use, of spans of "
	  "1, 10 or 60 seconds." },
	{ "actions", PY_FAST(monitor_actions), PY_FAST_FLAGS,
	  "actions($self, /, since=0)\n--\n\n(number, time, kind, level, cause, bytes wanted, bytes freed, "
	  "wall) of what was done." },
	{ "close", monitor_close, METH_NOARGS,
	  "close($self, /)\n--\n\nStop, and let go of what is watched. Idempotent." },
	{ NULL, NULL, 0, NULL },
};
static PyGetSetDef getset[] = {
	{ "running", get_running, NULL, "Whether its thread takes samples.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};
static PyType_Slot slots[] = {
	{ Py_tp_doc,
	  "Monitor(thresholds=(0.75, 0.88, 0.95), interval=1.0, *, act=True, root=None)\n--\n\n"
	  "How short memory is, why, and where that is going." },
	{ Py_tp_init, monitor_init },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_dealloc, monitor_dealloc },
	{ Py_tp_methods, methods },
	{ Py_tp_getset, getset },
	{ 0, NULL },
};
PyType_Spec py_monitor_spec = { "omnimem._core.Monitor", sizeof(struct py_monitor), 0,
	                        Py_TPFLAGS_DEFAULT, slots };
