/*
 * py_store: _core.Store: everything but the ways in (py_add.c).
 *
 * The object holds one py_core. `close` closes the core's store but keeps the py_core, so that later
 * calls get the core's ClosedError. lease() asks for resident bytes with the GIL held, which costs
 * less than dropping it, and waits without it only for the others.
 */
#include "bind/py_bind.h"
#include "bind/py_foreign.h"

#include <string.h>

PyTypeObject *py_store_type;

struct py_core *py_store_core(PyObject *store)
{
	struct py_core *core = ((struct py_store *)store)->core;

	if (om_unlikely(!core))
		py_raise_closed("the store was never opened: __init__ did not run");
	return core;
}

static int choose(const char *what, const char *value, const char *const *names)
{
	for (int i = 0; names[i]; i++)
		if (strcmp(names[i], value) == 0)
			return i;
	PyErr_Format(PyExc_ValueError, "%s='%s' is unknown", what, value);
	return -1;
}

static int read_config(PyObject *args, PyObject *kwargs, struct om_store_config *c,
                       PyObject **ret_directory)
{
	static const char *const backends[] = { "auto", "uring", "threads", NULL };
	static const char *const verifies[] = { "always", "first", NULL };
	static char *names[] = { "host_limit", "disk_limit", "directory",  "io_backend", "verify",
		                 "io_window",  "io_request", "io_threads", NULL };
	unsigned long long host, disk, window = 0;
	unsigned int request = 0, threads = 0;
	PyObject *directory = Py_None;
	const char *backend = "auto", *verify = "always";

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KK|OssKII:Store", names, &host, &disk,
	                                 &directory, &backend, &verify, &window, &request,
	                                 &threads))
		return -1;
	*c = (struct om_store_config){ .host_limit_bytes = host,
		                       .disk_limit_bytes = disk,
		                       .window_bytes = window,
		                       .request_bytes = request,
		                       .io_threads = threads };
	c->backend = choose("io_backend", backend, backends);
	c->verify = choose("verify", verify, verifies);
	if (c->backend < 0 || c->verify < 0)
		return -1;
	if (directory != Py_None && !PyUnicode_FSConverter(directory, ret_directory))
		return -1;
	if (*ret_directory)
		c->directory = PyBytes_AsString(*ret_directory);
	return 0;
}

static int store_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
	struct py_store *o = (struct py_store *)self;
	struct om_store_config config;
	struct om_store *s = NULL;
	PyObject *directory = NULL;
	int code;

	if (o->core) {
		PyErr_SetString(PyExc_ValueError, "the store is open: __init__ runs once");
		return -1;
	}
	if (read_config(args, kwargs, &config, &directory)) {
		Py_XDECREF(directory);
		return -1;
	}
	Py_BEGIN_ALLOW_THREADS code = om_store_create(&config, &s);
	Py_END_ALLOW_THREADS Py_XDECREF(directory);
	if (code) {
		py_raise(code);
		return -1;
	}
	o->core = py_core_new(s);
	if (o->core)
		return 0;
	Py_BEGIN_ALLOW_THREADS om_store_unref(s);
	Py_END_ALLOW_THREADS return -1;
}

static int close_core(struct py_core *core)
{
	int code;

	Py_BEGIN_ALLOW_THREADS code = om_store_close(core->s);
	Py_END_ALLOW_THREADS py_collect();
	return code;
}

static void store_dealloc(PyObject *self)
{
	struct py_store *o = (struct py_store *)self;
	PyTypeObject *type = Py_TYPE(self);
	PyObject *error, *value, *trace;

	if (o->core) {
		PyErr_Fetch(&error, &value, &trace);
		close_core(o->core);
		py_core_unref(o->core);
		PyErr_Restore(error, value, trace);
	}
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

static PyObject *store_close(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_store *o = (struct py_store *)self;
	int code = o->core ? close_core(o->core) : 0;

	return code ? py_raise(code) : Py_NewRef(Py_None);
}

static PyObject *store_enter(PyObject *self, PyObject *Py_UNUSED(unused))
{
	return Py_NewRef(self);
}

static PyObject *store_exit(PyObject *self, PyObject *const *Py_UNUSED(args),
                            Py_ssize_t Py_UNUSED(nargs), PyObject *Py_UNUSED(kwnames))
{
	return store_close(self, NULL);
}

static PyObject *store_group(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const names[] = { "name", "host_limit", "policy", "foresee", NULL };
	PyObject *a[4] = { NULL };
	struct py_core *core = py_store_core(self);
	const char *name, *policy;
	uint64_t limit;
	int code, foresee = -1;

	if (!core || py_args("group", args, nargs, kwnames, names, 2, 4, a))
		return NULL;
	if (a[3] && a[3] != Py_None && (foresee = PyObject_IsTrue(a[3])) < 0)
		return NULL;
	name = py_text(a[0], "name");
	if (!name || py_size(a[1], "host_limit", &limit) ||
	    py_text_or_null(a[2], "policy", &policy))
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = policy ? om_store_policy(core->s, name, policy) : 0;
	code = code ? code : om_store_group(core->s, name, limit);
	if (!code && foresee >= 0)
		code = om_store_foresee(core->s, name, foresee);
	Py_END_ALLOW_THREADS return py_done(code);
}

struct name_call {
	struct om_store *s;
	const char *name;
	bool write;
	struct om_lease *lease;
};

static int call_lease(void *arg, uint64_t deadline_ns)
{
	struct name_call *c = arg;

	return om_store_lease(c->s, c->name, c->write ? OM_WRITE : OM_READ, deadline_ns, &c->lease);
}

/* Waits for the bytes, and has them decoded where they are there only encoded. */
static int lease_decoded(struct py_core *core, struct name_call *c, uint64_t deadline_ns)
{
	int code = py_wait(call_lease, c, deadline_ns);

	while (code == OM_EPACKED) {
		struct om_block *b;

		code = om_store_block(core->s, c->name, &b);
		if (code)
			return code;
		if (py_block_unpack(core, b))
			return PY_RAISED;
		code = py_wait(call_lease, c, deadline_ns);
	}
	return code;
}

static int call_evict(void *arg, uint64_t deadline_ns)
{
	struct name_call *c = arg;
	int code = om_store_evict(c->s, c->name, deadline_ns);

	if (code >= 0)
		c->write = code > 0; /* the answer; positive codes are py_wait's own */
	return code < 0 ? code : 0;
}

/* A write lease on memory that its producer calls read-only must get memory of our own: the block
 * is moved out, and the lease brings it back elsewhere. */
static int lease_own_memory(struct py_core *core, struct name_call *c, uint64_t deadline_ns)
{
	struct name_call evict = { .s = c->s, .name = c->name };
	int code = 0;

	while (code == 0 && py_core_is_readonly(core, om_lease_data(c->lease))) {
		om_lease_unref(c->lease);
		c->lease = NULL;
		code = py_wait(call_evict, &evict, deadline_ns);
		if (code == 0)
			code = py_wait(call_lease, c, deadline_ns);
	}
	return code;
}

static PyObject *store_lease(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const names[] = { "name", "write", "timeout", NULL };
	PyObject *a[3] = { NULL }, *result;
	struct py_core *core = py_store_core(self);
	struct name_call c = { 0 };
	uint64_t deadline_ns = 0;
	int write = 0, code;

	if (om_likely(nargs == 1 && !kwnames))
		a[0] = args[0];
	else if (py_args("lease", args, nargs, kwnames, names, 1, 3, a))
		return NULL;
	c.name = py_text(a[0], "name");
	if (om_unlikely(!core || !c.name))
		return NULL;
	if (a[1] && (write = PyObject_IsTrue(a[1])) < 0)
		return NULL;
	if (a[2] && py_deadline(a[2], &deadline_ns))
		return NULL;
	c.s = core->s;
	c.write = write;
	code = write ? OM_EAGAIN : om_store_lease_now(c.s, c.name, &c.lease);
	if (code == OM_EAGAIN) {
		if (!a[2])
			deadline_ns = om_deadline(PY_DEFAULT_TIMEOUT_NS);
		code = lease_decoded(core, &c, deadline_ns);
	}
	if (om_unlikely(write && code == 0 && core->foreign))
		code = lease_own_memory(core, &c, deadline_ns);
	if (om_likely(code == 0))
		result = py_lease_new(c.lease);
	else
		result = code == PY_RAISED ? NULL : py_raise(code);
	py_collect();
	return result;
}

static PyObject *store_evict(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const names[] = { "name", "timeout", NULL };
	PyObject *a[2] = { NULL }, *result;
	struct py_core *core = py_store_core(self);
	struct name_call c = { 0 };
	uint64_t deadline_ns;
	int code;

	if (!core || py_args("evict", args, nargs, kwnames, names, 1, 2, a))
		return NULL;
	c.s = core->s;
	c.name = py_text(a[0], "name");
	if (!c.name || py_deadline(a[1], &deadline_ns))
		return NULL;
	code = py_wait(call_evict, &c, deadline_ns);
	if (code == 0)
		result = PyBool_FromLong(c.write);
	else
		result = code == PY_RAISED ? NULL : py_raise(code);
	py_collect();
	return result;
}

static PyObject *store_remove(PyObject *self, PyObject *name)
{
	struct py_core *core = py_store_core(self);
	const char *text = py_text(name, "name");
	int code;

	if (!core || !text)
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_store_remove(core->s, text);
	Py_END_ALLOW_THREADS return py_done(code);
}

static int store_contains(PyObject *self, PyObject *name)
{
	struct py_core *core = py_store_core(self);
	const char *text;

	if (!core)
		return -1;
	if (!PyUnicode_Check(name))
		return 0;
	text = py_text(name, "name");
	if (!text) {
		PyErr_Clear(); /* NUL or a lone surrogate: no block can be called so */
		return 0;
	}
	return om_store_contains(core->s, text);
}

static PyObject *store_names(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const keywords[] = { "group", NULL };
	PyObject *given[1] = { NULL };
	struct py_core *core = py_store_core(self);
	const char *group;
	char **names;
	size_t count;
	int code;

	if (!core || py_args("names", args, nargs, kwnames, keywords, 0, 1, given) ||
	    py_text_or_null(given[0], "group", &group))
		return NULL;
	code = om_store_names(core->s, group, &names, &count);
	return code ? py_raise(code) : py_names_list(names, count);
}

static PyObject *store_check(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_core *core = py_store_core(self);
	int code;

	if (!core)
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_store_check(core->s);
	Py_END_ALLOW_THREADS return py_done(code);
}

/* (nbytes, (tier, ...), leases, origin or None, origin offset, extents, dtype or None, shape or
 * None, group): the fields of BlockInfo in order. */
static PyObject *info_tuple(const struct om_info *i)
{
	PyObject *dtype = NULL, *shape = NULL, *tiers, *origin;
	static const char *const names[] = { "host", "packed", "disk" };
	static const unsigned bits[] = { OM_TIER_HOST, OM_TIER_PACKED, OM_TIER_DISK };
	const char *in[3];
	size_t n = 0;

	for (size_t k = 0; k < 3; k++)
		if (i->tiers & bits[k])
			in[n++] = names[k];
	tiers = n == 3   ? Py_BuildValue("(sss)", in[0], in[1], in[2])
	        : n == 2 ? Py_BuildValue("(ss)", in[0], in[1])
	        : n == 1 ? Py_BuildValue("(s)", in[0])
	                 : PyTuple_New(0);
	origin = i->has_origin ? PyUnicode_DecodeFSDefault(i->origin) : Py_NewRef(Py_None);
	if (i->desc.ndim >= 0) {
		dtype = py_dtype_name(py_desc_type(&i->desc));
		shape = py_dims_tuple(i->desc.shape, i->desc.ndim);
	} else {
		dtype = Py_NewRef(Py_None);
		shape = Py_NewRef(Py_None);
	}
	return Py_BuildValue("(KNINKnNNs)", (unsigned long long)i->nbytes, tiers, i->leases, origin,
	                     (unsigned long long)i->origin_offset, (Py_ssize_t)i->origin_count,
	                     dtype, shape, i->group);
}

static PyObject *store_info(PyObject *self, PyObject *name)
{
	struct py_core *core = py_store_core(self);
	const char *text = py_text(name, "name");
	struct om_info info;
	int code;

	if (!core || !text)
		return NULL;
	memset(&info, 0, sizeof(info));
	code = om_store_info(core->s, text, &info);
	return code ? py_raise(code) : info_tuple(&info);
}

static PyObject *tier_tuple(const struct om_tier_stats *t)
{
	return Py_BuildValue("(KKKK)", (unsigned long long)t->used_bytes,
	                     (unsigned long long)t->peak_bytes, (unsigned long long)t->limit_bytes,
	                     (unsigned long long)t->mapped_bytes);
}

static int put(PyObject *dict, const char *key, PyObject *value)
{
	int failed = value ? PyDict_SetItemString(dict, key, value) : -1;

	Py_XDECREF(value);
	return failed;
}

static PyObject *latency_tuple(uint64_t p50_ns, uint64_t p99_ns)
{
	return Py_BuildValue("(dd)", (double)p50_ns / 1e9, (double)p99_ns / 1e9);
}

static PyObject *stats_dict(const struct om_stats *s)
{
	const struct {
		const char *key;
		uint64_t value;
	} counters[] = {
		{ "exported_bytes", s->exported_bytes },
		{ "packed_bytes", s->packed_bytes },
		{ "packed_peak_bytes", s->packed_peak_bytes },
		{ "idle_bytes", s->idle_bytes },
		{ "spare_bytes", s->spare_bytes },
		{ "blocks", s->blocks },
		{ "leases", s->leases },
		{ "hits", s->hits },
		{ "misses", s->misses },
		{ "fills", s->fills },
		{ "drops", s->drops },
		{ "writes", s->writes },
		{ "read_bytes", s->read_bytes },
		{ "written_bytes", s->written_bytes },
		{ "prefetches", s->prefetches },
		{ "prefetch_hits", s->prefetch_hits },
		{ "prefetch_waste", s->prefetch_waste },
		{ "verified_bytes", s->verified_bytes },
		{ "rereads", s->rereads },
		{ "corrupt", s->corrupt },
		{ "io_errors", s->io_errors },
		{ "io_in_flight", s->in_flight },
		{ "io_depth", s->depth },
		{ "moves", s->moves },
	};
	PyObject *dict = PyDict_New();
	int failed = !dict;

	for (size_t i = 0; i < sizeof(counters) / sizeof(counters[0]) && !failed; i++)
		failed = put(dict, counters[i].key, PyLong_FromUnsignedLongLong(counters[i].value));
	if (failed || put(dict, "host", tier_tuple(&s->host)) ||
	    put(dict, "disk", tier_tuple(&s->disk)) ||
	    put(dict, "read_busy_seconds", PyFloat_FromDouble((double)s->read_busy_ns / 1e9)) ||
	    put(dict, "write_busy_seconds", PyFloat_FromDouble((double)s->write_busy_ns / 1e9)) ||
	    put(dict, "read_latency", latency_tuple(s->read_p50_ns, s->read_p99_ns)) ||
	    put(dict, "write_latency", latency_tuple(s->write_p50_ns, s->write_p99_ns)) ||
	    put(dict, "stall_seconds", PyFloat_FromDouble((double)s->stall_ns / 1e9)) ||
	    put(dict, "io_backend", PyUnicode_FromString(s->io_backend)) ||
	    put(dict, "io_reason", PyUnicode_DecodeLocale(s->io_reason, "surrogateescape")) ||
	    put(dict, "io_fell_back", PyBool_FromLong(s->io_fell_back)))
		Py_CLEAR(dict);
	return dict;
}

static PyObject *store_stats(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_core *core = py_store_core(self);
	struct om_stats stats;
	int code;

	if (!core)
		return NULL;
	py_collect();
	memset(&stats, 0, sizeof(stats));
	code = om_store_stats(core->s, &stats);
	return code ? py_raise(code) : stats_dict(&stats);
}

PyDoc_STRVAR(add_doc, "add($self, name, data, group=None, timeout=30.0)\n--\n\n"
                      "Copy the bytes of `data` (DLPack or buffer) in.");
PyDoc_STRVAR(take_doc, "take($self, name, data, group=None, timeout=30.0)\n--\n\n"
                       "Keep the memory of `data` (DLPack or buffer) as the block's bytes.");
PyDoc_STRVAR(add_file_doc, "add_file($self, name, extents, offset=None, nbytes=None, *, "
                           "dtype=None, shape=None, group=None, decoded_nbytes=None)\n--\n\n"
                           "The block's bytes are ranges of files, read in place on demand.");
PyDoc_STRVAR(encode_doc, "encode($self, name, coding='fast', timeout=30.0)\n--\n\n"
                         "Keep a lossless encoding of the block's bytes in memory.");
PyDoc_STRVAR(lease_doc, "lease($self, name, write=False, timeout=30.0)\n--\n\n"
                        "Bring the bytes into memory and hold them.");
PyDoc_STRVAR(prefetch_doc, "prefetch($self, names)\n--\n\nStart bringing blocks into memory.");
PyDoc_STRVAR(evict_doc, "evict($self, name, timeout=30.0)\n--\n\n"
                        "Move a block out of memory; False when it is leased.");
PyDoc_STRVAR(remove_doc, "remove($self, name, /)\n--\n\n"
                         "Free the name now, the bytes with the last lease.");
PyDoc_STRVAR(names_doc, "names($self, group=None)\n--\n\n"
                        "All names, or those of one group, in the order of adding.");
PyDoc_STRVAR(info_doc, "_info($self, name, /)\n--\n\nThe fields of BlockInfo, as a tuple.");
PyDoc_STRVAR(stats_doc, "_stats($self, /)\n--\n\nThe fields of StoreStats, as a dict.");
PyDoc_STRVAR(check_doc, "check($self, /)\n--\n\nRaise CorruptError when an invariant is broken.");
PyDoc_STRVAR(trim_doc,
             "trim($self, reserve=0)\n--\n\n"
             "Give memory that no block uses back to the system, but for `reserve` bytes.");
PyDoc_STRVAR(
	group_doc,
	"group($self, name, host_limit, policy=None, foresee=None)\n--\n\n"
	"Limit the bytes in memory of a group of blocks; 0: only the store's limit binds.\n"
	"`policy` says who goes first: lru, clock, s3fifo, sieve or adaptive.\n"
	"Lowering the limit moves idle blocks out, as far as leases allow. `foresee`: learn the\n"
	"order of accesses, and fetch ahead of demand what is foretold.");
PyDoc_STRVAR(close_doc, "close($self, /)\n--\n\n"
                        "Stop the threads and free what nobody sees; live views keep their bytes.");

/* prefetch is in py_ticket.c */
PyObject *py_store_prefetch(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                            PyObject *kwnames);

static PyMethodDef store_methods[] = {
	{ "add", PY_FAST(py_store_add), PY_FAST_FLAGS, add_doc },
	{ "take", PY_FAST(py_store_take), PY_FAST_FLAGS, take_doc },
	{ "add_file", PY_FAST(py_store_add_file), PY_FAST_FLAGS, add_file_doc },
	{ "encode", PY_FAST(py_store_encode), PY_FAST_FLAGS, encode_doc },
	{ "lease", PY_FAST(store_lease), PY_FAST_FLAGS, lease_doc },
	{ "prefetch", PY_FAST(py_store_prefetch), PY_FAST_FLAGS, prefetch_doc },
	{ "evict", PY_FAST(store_evict), PY_FAST_FLAGS, evict_doc },
	{ "remove", store_remove, METH_O, remove_doc },
	{ "names", PY_FAST(store_names), PY_FAST_FLAGS, names_doc },
	{ "_info", store_info, METH_O, info_doc },
	{ "_stats", store_stats, METH_NOARGS, stats_doc },
	{ "check", store_check, METH_NOARGS, check_doc },
	{ "trim", PY_FAST(py_store_trim), PY_FAST_FLAGS, trim_doc },
	{ "_block", py_store_block, METH_O, "_block($self, name, /)\n--\n\nIts object, or None." },
	{ "_access", (PyCFunction)(void (*)(void))py_store_access, METH_FASTCALL,
	  "_access($self, group, name, /)\n--\n\nBring the bytes in, count an access; the block or None." },
	{ "_add_zeros", PY_FAST(py_store_add_zeros), PY_FAST_FLAGS,
	  "_add_zeros($self, name, nbytes, group=None, dtype=None, shape=None)\n--\n\nZeros, made at the first access." },
	{ "_swap_out", py_store_swap_out, METH_VARARGS,
	  "_swap_out($self, group, nbytes, timeout=None, /)\n--\n\nFree so many bytes: (blocks, bytes) that went." },
	{ "_victim", py_store_victim, METH_O,
	  "_victim($self, group, /)\n--\n\nA lease of who would go next, or None." },
	{ "_pack", py_store_pack, METH_VARARGS,
	  "_pack($self, lease, data, codec, /)\n--\n\nKeep `data` below instead of the leased bytes; "
	  "False: others lease them." },
	{ "_disk", py_store_disk, METH_VARARGS,
	  "_disk($self, directory, limit, /)\n--\n\nOther bounds of the swap file." },
	{ "_group_stats", py_store_group_stats, METH_O,
	  "_group_stats($self, group, /)\n--\n\nThe fields of GroupStats, as a dict." },
	{ "_ranked", py_store_ranked, METH_VARARGS,
	  "_ranked($self, group, most, count, /)\n--\n\n(name, accesses) of those used most or least." },
	{ "_events", py_store_events, METH_O,
	  "_events($self, since, /)\n--\n\nThe last events from number `since` on, as tuples." },
	{ "groups", py_store_groups, METH_NOARGS, "groups($self)\n--\n\nThe names of its groups." },
	{ "_mark", py_store_mark, METH_NOARGS,
	  "_mark($self)\n--\n\nA mark that sees how high the tiers come." },
	{ "_totals", py_store_totals, METH_NOARGS,
	  "_totals($self)\n--\n\n(counters that only grow, gauges, whether it is closed)." },
	{ "use_begin", py_store_use_begin, METH_O,
	  "use_begin($self, group, /)\n--\n\nA whole group is in use from now on." },
	{ "use_end", py_store_use_end, METH_O,
	  "use_end($self, group, /)\n--\n\nThat use is over." },
	{ "_usage", py_store_usage, METH_VARARGS,
	  "_usage($self, group, window, /)\n--\n\nThe fields of Usage, as a tuple." },
	{ "_press", py_store_press, METH_VARARGS,
	  "_press($self, level, nbytes, ceiling, timeout, /)\n--\n\nThe fields of Pressed, as a tuple." },
	{ "group", PY_FAST(store_group), PY_FAST_FLAGS, group_doc },
	{ "close", store_close, METH_NOARGS, close_doc },
	{ "__enter__", store_enter, METH_NOARGS, NULL },
	{ "__exit__", PY_FAST(store_exit), PY_FAST_FLAGS, NULL },
	{ NULL, NULL, 0, NULL },
};

/* Who encoded blocks of the store, by number. */
static PyObject *get_codecs(PyObject *self, void *Py_UNUSED(unused))
{
	struct py_core *core = py_store_core(self);

	return core ? Py_NewRef(core->codecs) : NULL;
}

static PyGetSetDef store_getset[] = {
	{ "_codecs", get_codecs, NULL, "Who encoded blocks, by number.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot store_slots[] = {
	{ Py_tp_doc, "A store of named blocks in HOST and DISK (see omnimem.Store)." },
	{ Py_tp_init, store_init },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_dealloc, store_dealloc },
	{ Py_tp_methods, store_methods },
	{ Py_tp_getset, store_getset },
	{ Py_sq_contains, store_contains },
	{ 0, NULL },
};

PyType_Spec py_store_spec = {
	.name = "omnimem._core.Store",
	.basicsize = sizeof(struct py_store),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = store_slots,
};
