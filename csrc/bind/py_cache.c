/*
 * py_cache: _core.Cache, the entries of one cache of a store by two names: the base of
 * omnimem.ModelWeightCache. py_rows.c reads its indices.
 *
 * Holds one reference to the store, also when it is closed: other threads may be inside. What `get` returns is torch's tensor where torch is
 * loaded, which is looked for in sys.modules and never imported here; else the lease or a window on it.
 * Both hold the bytes, so nothing here has to stay.
 */
#include "bind/py_cache.h"

#include <string.h>

PyTypeObject *py_cache_type;

struct py_cache {
	PyObject_HEAD struct py_core *core; /* NULL: not opened */
	bool closed;
	char group[64];
	char prefix[72]; /* of all names, so that two caches can share a store */
	int coding;
};

static struct py_cache *open_cache(PyObject *self)
{
	struct py_cache *o = (struct py_cache *)self;

	if (om_likely(o->core && !o->closed))
		return o;
	py_raise_closed("the cache is closed");
	return NULL;
}

/* ---- names ---- */

/* The name of an entry: model, colon, layer. A colon in the model's key, and a percent sign, are written as in
 * URLs, so that no two pairs have the same name. */
static int make_name(const struct py_cache *o, PyObject *model_key, PyObject *layer_name,
                     char name[OM_MAX_NAME + 1])
{
	const char *model = py_text(model_key, "model_key");
	const char *layer = model ? py_text(layer_name, "layer_name") : NULL;
	size_t n = strlen(o->prefix), rest;

	if (om_unlikely(!layer))
		return -1;
	rest = strlen(layer) + 2; /* with the colon and the end */
	memcpy(name, o->prefix, n);
	for (; *model && n + 3 + rest <= OM_MAX_NAME + 1; model++) {
		if (om_likely(*model != ':' && *model != '%')) {
			name[n++] = *model;
			continue;
		}
		memcpy(name + n, *model == ':' ? "%3A" : "%25", 3);
		n += 3;
	}
	if (*model || n + rest > OM_MAX_NAME + 1) {
		PyErr_Format(PyExc_ValueError,
		             "model_key and layer_name have more than %d bytes together: %R, %R",
		             OM_MAX_NAME, model_key, layer_name);
		return -1;
	}
	name[n++] = ':';
	memcpy(name + n, layer, rest - 1);
	return 0;
}

/* ---- get ---- */

/* torch.utils.dlpack.from_dlpack, once torch is loaded: borrowed; NULL: it is not. */
static PyObject *torch_import(void)
{
	static PyObject *function, *name;
	PyObject *module;

	if (om_likely(function))
		return function;
	if (!name)
		name = PyUnicode_InternFromString("torch.utils.dlpack");
	module = name ? PyImport_GetModule(name) : NULL;
	if (module)
		function = PyObject_GetAttrString(module, "from_dlpack");
	Py_XDECREF(module);
	PyErr_Clear(); /* it is being imported */
	return function;
}

static PyObject *torch_tensor(PyObject *from_dlpack, const struct py_view *v)
{
	PyObject *capsule = py_export(v, false, false), *tensor = NULL;

	if (capsule)
		tensor = PyObject_CallFunctionObjArgs(from_dlpack, capsule, NULL);
	Py_XDECREF(capsule);
	return tensor;
}

/* Takes over the lease. */
static PyObject *whole_entry(struct om_lease *l)
{
	PyObject *from_dlpack = torch_import(), *tensor;
	int64_t bytes_shape;
	struct py_view v;

	if (!from_dlpack)
		return py_lease_new(l);
	v = py_lease_view(l, &bytes_shape);
	tensor = torch_tensor(from_dlpack, &v);
	om_lease_unref(l);
	return tensor;
}

static PyObject *window_of(struct om_lease *l, const struct py_view *v, uint64_t offset)
{
	PyObject *lease = py_lease_new(l), *dtype = py_dtype_name(v->type);
	PyObject *shape = py_dims_tuple(v->shape, v->ndim), *window = NULL;

	if (lease && dtype && shape)
		window = PyObject_CallMethod(lease, "window", "KOO", (unsigned long long)offset,
		                             dtype, shape);
	Py_XDECREF(lease);
	Py_XDECREF(dtype);
	Py_XDECREF(shape);
	return window;
}

/* Takes over the lease, in which `rows` rows like those of `desc` begin at `offset`. */
static PyObject *some_rows(struct om_lease *l, const struct om_desc *desc, int64_t rows,
                           uint64_t offset)
{
	PyObject *from_dlpack = torch_import(), *tensor;
	struct om_desc part = *desc;
	struct py_view v = { .lease = l,
		             .data = (char *)om_lease_data(l) + offset,
		             .type = py_desc_type(desc),
		             .ndim = desc->ndim,
		             .shape = part.shape };

	part.shape[0] = rows;
	if (!from_dlpack)
		return window_of(l, &v, offset);
	tensor = torch_tensor(from_dlpack, &v);
	om_lease_unref(l);
	return tensor;
}

struct get_call {
	const struct py_cache *o;
	const char *name;
	const struct om_desc *desc;
	const struct py_rows *rows;
	struct om_lease *lease;
	uint64_t offset;
};

static int call_get(void *arg, uint64_t deadline_ns)
{
	struct get_call *c = arg;

	return om_store_get(c->o->core->s, c->o->group, c->name, deadline_ns, &c->lease);
}

static int call_get_rows(void *arg, uint64_t deadline_ns)
{
	struct get_call *c = arg;

	return om_store_get_rows(c->o->core->s, c->o->group, c->name, c->desc, c->rows->runs,
	                         c->rows->count, deadline_ns, &c->lease, &c->offset);
}

/* The answer to a code that is not 0: None where there is no entry. */
static PyObject *no_entry(int code)
{
	if (code == OM_ENAME)
		return Py_NewRef(Py_None);
	return code == PY_RAISED ? NULL : py_raise(code);
}

static int get_whole(struct get_call *c)
{
	int code = om_store_get_now(c->o->core->s, c->o->group, c->name, &c->lease);

	return om_likely(code != OM_EAGAIN)
	               ? code
	               : py_wait(call_get, c, om_deadline(PY_DEFAULT_TIMEOUT_NS));
}

static PyObject *get_rows(struct get_call *c, PyObject *index)
{
	uint64_t deadline_ns = om_deadline(PY_DEFAULT_TIMEOUT_NS);
	struct py_rows rows;
	struct om_info info;
	PyObject *result;
	int code;

	do { /* another entry of that name may come in meanwhile */
		code = om_store_info(c->o->core->s, c->name, &info);
		if (code == OM_ENAME) { /* which counts as a miss */
			code = get_whole(c);
			if (code)
				return no_entry(code);
			om_lease_unref(c->lease);
			code = OM_EAGAIN;
			continue;
		}
		if (code)
			return py_raise(code);
		if (py_rows_init(&rows, index, &info.desc))
			return NULL;
		c->desc = &info.desc;
		c->rows = &rows;
		code = py_wait(call_get_rows, c, deadline_ns);
		result = code ? NULL : some_rows(c->lease, c->desc, rows.total, c->offset);
		py_rows_fini(&rows);
	} while (code == OM_EAGAIN);
	return code ? no_entry(code) : result;
}

static PyObject *cache_get(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *kwnames)
{
	static const char *const names[] = { "model_key", "layer_name", "index", NULL };
	struct py_cache *o = open_cache(self);
	PyObject *a[3] = { NULL }, *result;
	struct get_call c = { .o = o };
	char name[OM_MAX_NAME + 1];
	int code;

	if (!o || py_args("get", args, nargs, kwnames, names, 2, 3, a) ||
	    make_name(o, a[0], a[1], name))
		return NULL;
	c.name = name;
	if (a[2] && a[2] != Py_None)
		return get_rows(&c, a[2]);
	code = get_whole(&c);
	result = om_likely(!code) ? whole_entry(c.lease) : no_entry(code);
	py_collect();
	return result;
}

struct peek_call {
	struct om_store *s;
	struct om_block *b;
	struct om_lease *lease;
};

static int call_peek(void *arg, uint64_t deadline_ns)
{
	struct peek_call *c = arg;

	return om_block_lease_bytes(c->s, c->b, OM_READ, deadline_ns, &c->lease);
}

/* By its whole name; what is in memory as it is counts as no access. */
static PyObject *cache_peek(PyObject *self, PyObject *key)
{
	struct py_cache *o = open_cache(self);
	const char *name = o ? py_text(key, "key") : NULL;
	struct peek_call c = { .s = o ? o->core->s : NULL };
	int code;

	if (!name)
		return NULL;
	code = om_store_block(c.s, name, &c.b);
	if (code)
		return no_entry(code);
	code = py_wait(call_peek, &c, om_deadline(PY_DEFAULT_TIMEOUT_NS));
	om_block_unref(c.b);
	return code ? no_entry(code) : whole_entry(c.lease);
}

/* ---- put ---- */

struct put_call {
	const struct py_cache *o;
	const char *name;
	const struct py_data *data;
	bool stored;
};

static int call_put(void *arg, uint64_t deadline_ns)
{
	struct put_call *c = arg;
	int code = om_store_put(c->o->core->s, c->name, c->o->group, c->data->data, c->data->nbytes,
	                        &c->data->desc, (enum om_coding)c->o->coding, deadline_ns);

	c->stored = code == 1;
	return c->stored ? 0 : code; /* positive codes are py_wait's own */
}

static PyObject *cache_put(PyObject *self, PyObject *args)
{
	struct py_cache *o = open_cache(self);
	PyObject *model, *layer, *data, *result;
	char name[OM_MAX_NAME + 1];
	struct put_call c = { .o = o, .name = name };
	struct py_data d;
	int code;

	if (!o || !PyArg_ParseTuple(args, "OOO:_put", &model, &layer, &data) ||
	    make_name(o, model, layer, name) || py_data_init(&d, data, true))
		return NULL;
	c.data = &d;
	code = py_wait(call_put, &c, om_deadline(PY_DEFAULT_TIMEOUT_NS));
	result = py_done(code); /* before the producer's code runs */
	py_data_fini(&d);
	if (!result)
		return NULL;
	Py_DECREF(result);
	return PyBool_FromLong(c.stored);
}

/* ---- the rest ---- */

static PyObject *cache_key(PyObject *self, PyObject *args)
{
	struct py_cache *o = open_cache(self);
	char name[OM_MAX_NAME + 1];
	PyObject *model, *layer;

	if (!o || !PyArg_ParseTuple(args, "OO:_key", &model, &layer) ||
	    make_name(o, model, layer, name))
		return NULL;
	return PyUnicode_FromString(name);
}

static PyObject *cache_contains(PyObject *self, PyObject *args)
{
	struct py_cache *o = open_cache(self);
	char name[OM_MAX_NAME + 1];
	PyObject *model, *layer;
	struct om_info info;
	int code;

	if (!o || !PyArg_ParseTuple(args, "OO:contains", &model, &layer) ||
	    make_name(o, model, layer, name))
		return NULL;
	code = om_store_info(o->core->s, name, &info);
	if (code && code != OM_ENAME)
		return py_raise(code);
	return PyBool_FromLong(!code && !strcmp(info.group, o->group));
}

static PyObject *cache_remove(PyObject *self, PyObject *args)
{
	PyObject *there = cache_contains(self, args), *model, *layer;
	const struct py_cache *o = (struct py_cache *)self;
	char name[OM_MAX_NAME + 1];
	int code;

	if (there != Py_True)
		return there;
	Py_DECREF(there);
	if (!PyArg_ParseTuple(args, "OO:remove", &model, &layer) ||
	    make_name(o, model, layer, name))
		return NULL;
	code = om_store_remove(o->core->s, name);
	if (code && code != OM_ENAME) /* else another thread was quicker */
		return py_raise(code);
	return PyBool_FromLong(!code);
}

static PyObject *cache_shed(PyObject *self, PyObject *args)
{
	struct py_cache *o = open_cache(self);
	unsigned long long bytes;
	struct om_shed done;
	unsigned int most;
	int code;

	if (!o || !PyArg_ParseTuple(args, "KI:_shed", &bytes, &most))
		return NULL;
	Py_BEGIN_ALLOW_THREADS code = om_store_shed(o->core->s, o->group, bytes, most, &done);
	Py_END_ALLOW_THREADS if (code) return py_raise(code);
	return Py_BuildValue("(KK)", (unsigned long long)done.entries,
	                     (unsigned long long)done.bytes);
}

/* [(name, accesses, plain bytes, encoded bytes, leases)], oldest first. */
static PyObject *cache_entries(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_cache *o = open_cache(self);
	struct om_entry *entries;
	PyObject *list;
	size_t count;
	int code;

	if (!o)
		return NULL;
	code = om_store_entries(o->core->s, o->group, &entries, &count);
	if (code)
		return py_raise(code);
	list = PyList_New((Py_ssize_t)count);
	for (size_t i = 0; list && i < count; i++) {
		const struct om_entry *e = &entries[i];
		PyObject *item = Py_BuildValue("(sKKKI)", e->name, (unsigned long long)e->accesses,
		                               (unsigned long long)e->plain_bytes,
		                               (unsigned long long)e->packed_bytes, e->leases);

		if (!item || PyList_SetItem(list, (Py_ssize_t)i, item))
			Py_CLEAR(list);
	}
	om_entries_free(entries, count);
	return list;
}

static PyObject *cache_close(PyObject *self, PyObject *Py_UNUSED(unused))
{
	((struct py_cache *)self)->closed = true;
	return Py_NewRef(Py_None);
}

/* ---- life ---- */

static int cache_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "store", "group",     "prefix", "limit",
		                 "batch", "threshold", "coding", NULL };
	struct py_cache *o = (struct py_cache *)self;
	const char *group, *prefix;
	struct om_cache_config c;
	unsigned long long limit;
	struct py_core *core;
	PyObject *store;
	int coding, code;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!ssKIIi:Cache", names, py_store_type,
	                                 &store, &group, &prefix, &limit, &c.batch, &c.threshold,
	                                 &coding))
		return -1;
	core = py_store_core(store);
	if (!core)
		return -1;
	if (o->core) {
		PyErr_SetString(PyExc_ValueError, "the cache is open: __init__ runs once");
		return -1;
	}
	c.limit_bytes = limit;
	Py_BEGIN_ALLOW_THREADS code = om_store_cache(core->s, group, &c);
	Py_END_ALLOW_THREADS if (code)
	{
		py_raise(code);
		return -1;
	}
	PyOS_snprintf(o->group, sizeof(o->group), "%s", group); /* the core took it: it fits */
	PyOS_snprintf(o->prefix, sizeof(o->prefix), "%.71s", prefix);
	o->coding = coding;
	o->core = py_core_ref(core);
	return 0;
}

static void cache_dealloc(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);
	PyObject *error, *value, *trace;

	PyErr_Fetch(&error, &value, &trace);
	if (((struct py_cache *)self)->core)
		py_core_unref(((struct py_cache *)self)->core);
	PyErr_Restore(error, value, trace);
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

static PyMethodDef cache_methods[] = {
	{ "get", PY_FAST(cache_get), PY_FAST_FLAGS,
	  "get($self, model_key, layer_name, index=None)\n--\n\nAn entry or rows of it, or None." },
	{ "contains", cache_contains, METH_VARARGS,
	  "contains($self, model_key, layer_name, /)\n--\n\nWhether `get` would find it." },
	{ "remove", cache_remove, METH_VARARGS,
	  "remove($self, model_key, layer_name, /)\n--\n\nForget an entry." },
	{ "_put", cache_put, METH_VARARGS,
	  "_put($self, model_key, layer_name, data, /)\n--\n\nCopy an entry in; False: not yet." },
	{ "_key", cache_key, METH_VARARGS,
	  "_key($self, model_key, layer_name, /)\n--\n\nThe entry's name in the store." },
	{ "_peek", cache_peek, METH_O, "_peek($self, key, /)\n--\n\nAn entry by its name." },
	{ "_shed", cache_shed, METH_VARARGS,
	  "_shed($self, nbytes, most, /)\n--\n\nHave the oldest entries go; (entries, bytes)." },
	{ "_entries", cache_entries, METH_NOARGS,
	  "_entries($self, /)\n--\n\nWhat is in memory, oldest first." },
	{ "_close", cache_close, METH_NOARGS, "_close($self, /)\n--\n\nLet the store go." },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot cache_slots[] = {
	{ Py_tp_doc, "The entries of one cache of a store (see omnimem.ModelWeightCache)." },
	{ Py_tp_init, cache_init },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_dealloc, cache_dealloc },
	{ Py_tp_methods, cache_methods },
	{ 0, NULL },
};

PyType_Spec py_cache_spec = {
	.name = "omnimem._core.Cache",
	.basicsize = sizeof(struct py_cache),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = cache_slots,
};
